"""A body as it comes: what is refused before it is parsed, and how much of all bodies is kept at a time."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from conftest import Server, eventually, prompt, serving
from hypothesis import given
from hypothesis import strategies as st
from raw import Connection, connected, request

from aisse.errors import RequestError
from aisse.routes import intake
from aisse.routes.intake import MAX_BACKSLASHES, MAX_NAME_BYTES, MAX_OUTSIDE_BYTES, MAX_VALUES, STEP_BYTES, Look
from aisse.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from aiohttp import web

    from aisse.simulator import Simulator

TOKEN = "a-token-of-some-length.1"


def look(pieces: Iterable[bytes]) -> int:
    """Looks at a body that comes in these pieces; returns how many steps that took."""
    look = Look()
    body = bytearray()
    steps = 0
    for piece in pieces:
        body += piece
        look.at(piece)
        while look.behind:
            look.go_on(body)
            steps += 1
    look.end()
    return steps


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def status_of(pieces: Iterable[bytes]) -> int:
    try:
        look(pieces)
    except RequestError as error:
        return error.status
    return 200


# --- what is refused before it is parsed ----------------------------------------------------------------------

CUTS = st.lists(st.integers(0, 1 << 20), max_size=12)


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), CUTS)
def test_bytes_are_refused_where_they_are_no_utf8_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    try:
        data.decode()
        expected = 200
    except UnicodeDecodeError:
        expected = 400
    assert status_of(cut(data, cuts)) == expected


TEXTS = st.text(st.sampled_from('\\\\\\"",[{:]} ax/é\n'), max_size=12)
VALUES = st.recursive(
    TEXTS | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES, st.integers(1, 9), CUTS, st.booleans())
def test_values_are_counted_outside_of_strings_however_the_body_is_cut(
    value: Any, step: int, cuts: list[int], ascii_only: bool
) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    bare = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)
    count = sum(bare.count(mark) for mark in (b",", b"[", b"{"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake, "STEP_BYTES", step)
        patch.setattr(intake, "MAX_NAME_BYTES", 1 << 20)
        patch.setattr(intake, "MAX_VALUES", max(count, data.count(b'"')))
        assert status_of(cut(data, cuts)) == 200
        if count and len(data) > step:
            patch.setattr(intake, "MAX_VALUES", count - 1)
            assert status_of(cut(data, cuts)) == 400


@pytest.mark.parametrize(
    ("unit", "values"), [(b"0,", 1), (b"[],", 2), (b'{"":0},', 2), (b'"",', 1), (b'{"a":[{"b":0}]},', 4)]
)
def test_body_has_values_up_to_the_bound(unit: bytes, values: int) -> None:
    # The list itself is one, and each unit's comma another.
    fits = (MAX_VALUES - 2) // values
    assert status_of([b"[" + unit * fits + b"0]"]) == 200
    assert status_of([b"[" + unit * (fits + 2) + b"0]"]) == 400


@pytest.mark.parametrize(
    ("start", "unit", "most"),
    [
        (b'["', b"\\n", MAX_BACKSLASHES),
        (b'["', b'\\"', MAX_BACKSLASHES),
        (b"", b" ", MAX_OUTSIDE_BYTES),
        (b"", b"9", MAX_OUTSIDE_BYTES),
    ],
)
def test_body_has_what_parses_slowly_up_to_its_bound(start: bytes, unit: bytes, most: int) -> None:
    assert status_of([start + unit * (most - len(start))]) == 200
    assert status_of([start + unit * (most + 1)]) == 400


@pytest.mark.parametrize("unit", [b'"', b'""', b'"\\', b"\\", b"]", b":", b" ", b"9", b"\xc3\xa9", b'\\"'])
def test_every_step_is_as_long_as_any_other(unit: bytes) -> None:
    """Whatever comes, and in whatever pieces: nobody else waits for more than one step."""
    data = (unit * (4 << 20))[: 4 << 20]
    sizes: list[int] = []

    class Counting(Look):
        def _count(self, piece: bytes) -> None:
            sizes.append(len(piece))
            super()._count(piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(look.__globals__, "Look", Counting)
        status_of([data])
    assert sizes
    assert max(sizes) <= STEP_BYTES + 1
    assert len(sizes) <= len(data) // STEP_BYTES + 1


def test_quotes_alone_are_refused_at_twice_the_bound() -> None:
    assert status_of([b'"' * (4 * MAX_VALUES + STEP_BYTES)]) == 400


TOO_LONG = 3 * STEP_BYTES


@pytest.mark.parametrize("unit", [b"x", b"\\\\", b'\\"', b"\\n", b"\\u0041", "é".encode(), b",", b":", b" "])
@pytest.mark.parametrize("colon", [b":", b" :", b" " * STEP_BYTES + b":", b"\n\t\r :"])
@pytest.mark.parametrize("before", [0, 1, STEP_BYTES - 10])
def test_long_name_is_refused_and_long_text_is_not(unit: bytes, colon: bytes, before: int) -> None:
    """An unknown one would be unescaped, and quoted in an error: 400 ms for 32 MiB."""
    start = b" " * before + b'{"'
    text = unit * (TOO_LONG // len(unit) + 1)
    assert status_of([start + text + b'"' + colon + b"1}"]) == 400
    short = unit * (MAX_NAME_BYTES // len(unit) - 1)
    assert status_of([start + short + b'"' + colon + b"1}", b" " * STEP_BYTES]) == 200
    assert status_of([start + b'a"' + colon + b'"' + text + b'"}']) == 200
    assert status_of([start + b'a"' + colon + b'["' + text + b'","' + text + b'"]}']) == 200


# --- the bytes of all bodies ----------------------------------------------------------------------------------


def body_of(size: int, text: str = "[[first_s=3600]]") -> bytes:
    empty = len(json.dumps(prompt(text)))
    return json.dumps(prompt(text + "x" * (size - empty))).encode()


def announced(size: int, **headers: str) -> bytes:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return request("POST", "/api/chat", b"", {"Content-Length": str(size)} | names)


async def used(server: Server, size: int) -> None:
    await eventually(lambda: server.registry.bodies.used == size)


async def test_others_run_between_pieces_that_have_come_already() -> None:
    class Content:
        async def iter_any(self) -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b"x"

    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    request = SimpleNamespace(content_type="application/json", headers={}, content_length=None, content=Content())
    task = asyncio.create_task(other())
    await intake.read_away(cast("web.Request", request), Settings())
    task.cancel()
    assert turns == 9


async def test_body_is_counted_as_it_comes_and_not_as_it_is_announced(server: Server) -> None:
    async with connected(server.address) as connection:
        data = body_of(100_000)
        await connection.send(announced(len(data)))
        await eventually(lambda: server.registry._unanswered == 1)
        assert server.registry.bodies.used == 0
        await connection.send(data[:60_000])
        await used(server, 60_000)
        await connection.send(data[60_000:])
        await used(server, 100_000)
        connection.reset()
    await eventually(lambda: server.registry._unanswered == 0)


@pytest.mark.parametrize("how", ["reset", "closed"])
async def test_body_that_breaks_off_is_counted_no_more(server: Server, how: str) -> None:
    async with connected(server.address) as connection:
        await connection.send(announced(100_000) + body_of(100_000)[:50_000])
        await used(server, 50_000)
        connection.reset() if how == "reset" else connection.writer.close()
        await used(server, 0)


@pytest.mark.parametrize(
    ("data", "headers", "status"),
    [
        (b"x" * 5000, {}, 400),
        (b"\xff" * 5000, {}, 400),
        (body_of(70_000)[:-1], {}, 400),
        (body_of(5000), {"Idempotency_Key": "\x7f"}, 400),
        (body_of(5000), {"Aisse_On_Leave": "never"}, 400),
        (body_of(100_001), {"Content_Length": "", "Transfer_Encoding": "chunked"}, 413),
        (body_of(5000, "[[status=429]]"), {}, 429),
        (body_of(5000, "[[status=400]]"), {}, 400),
    ],
)
async def test_body_that_is_refused_is_counted_no_more(
    simulator: Simulator, data: bytes, headers: dict[str, str], status: int
) -> None:
    names = {name.replace("_", "-"): value or None for name, value in headers.items()}
    if "Transfer-Encoding" in names:
        data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
        message = request("POST", "/api/chat", b"", names) + data
    else:
        message = request("POST", "/api/chat", data, names)
    async with serving(simulator.url, max_body_bytes=100_000) as server, connected(server.address) as connection:
        await connection.send(message)
        assert (await connection.answer()).status == status
        await used(server, 0)


async def test_body_that_is_too_late_is_counted_no_more(simulator: Simulator) -> None:
    async with serving(simulator.url, body_s=0.05) as server, connected(server.address) as connection:
        await connection.send(announced(100_000) + b" " * 5000)
        assert (await connection.answer()).status == 408
        await used(server, 0)


async def test_nothing_of_a_body_is_read_before_its_token_was_looked_at(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(intake.Look, "at", lambda _self, piece: read.append(len(piece)))
    async with serving(simulator.url, access_tokens=(TOKEN,)) as server, connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", body_of(5000)))
        assert (await connection.answer()).status == 401
        assert server.registry.bodies.used == 0
    assert read == []


async def test_body_is_counted_until_the_answer_begins(simulator: Simulator) -> None:
    """Until then it may have to be sent once more."""
    data = body_of(5000, "[[first_s=0.2 tokens=1000000 pace=20]]")
    async with serving(simulator.url, first_byte_commit_s=0) as server, connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", data))
        assert (await connection.head()).status == 200
        assert server.registry.bodies.used == 5000
        await used(server, 0)
        assert server.registry.active_streams == 1
        connection.reset()


@pytest.mark.parametrize("how", ["stopped", "abandoned", "unreachable", "shutdown"])
async def test_body_of_a_stream_that_ends_before_its_answer_is_counted_no_more(simulator: Simulator, how: str) -> None:
    url = "http://127.0.0.1:1" if how == "unreachable" else simulator.url
    settings: dict[str, Any] = {"first_byte_commit_s": 0, "leave_s": 0}
    async with serving(url, **settings) as server, connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", body_of(5000)))
        assert (await connection.head()).status == 200
        if how == "stopped":
            (stream_id,) = server.registry._table.running
            async with connected(server.address) as other:
                await other.send(request("DELETE", f"/api/chat/{stream_id}"))
                assert (await other.answer("DELETE")).status == 204
        elif how == "abandoned":
            connection.reset()
        elif how == "shutdown":
            await server.drain.run()
        await used(server, 0)


async def test_body_that_joins_by_its_key_is_not_kept(server: Server) -> None:
    data = body_of(5000)
    message = request("POST", "/api/chat", data, {"Idempotency-Key": "k", "Prefer": "respond-async"})
    async with connected(server.address) as first, connected(server.address) as second:
        for connection in (first, second):
            await connection.send(message)
        await eventually(lambda: server.registry._unanswered == 2 and server.registry.active_streams == 1)
        await used(server, 5000)
        (stream,) = server.registry._table.running
        await server.registry.stop(stream)
        await used(server, 0)


async def test_body_that_only_comes_with_a_cursor_is_not_kept(simulator: Simulator) -> None:
    limits: dict[str, Any] = {"max_body_bytes": 2048, "bodies_bytes": 2048}
    async with serving(simulator.url, **limits) as server, connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", body_of(200, "[[tokens=1]]")))
        path = (await connection.answer()).headers["Content-Location"]
        async with connected(server.address) as full:
            await full.send(announced(2048) + body_of(2048)[:-1])
            await used(server, 2047)
            headers = {"Last-Event-ID": f"{path.rpartition('/')[2]}.1"}
            await connection.send(request("POST", "/api/chat", body_of(2048), headers))
            assert (await connection.answer()).status == 200
            await connection.send(request("POST", "/api/chat", body_of(2049), headers))
            assert (await connection.answer()).status == 413
            full.reset()


async def test_newcomer_is_refused_while_all_bodies_together_are_at_their_bound(simulator: Simulator) -> None:
    limits: dict[str, Any] = {"max_body_bytes": 2048, "bodies_bytes": 4096, "first_byte_commit_s": 0}
    async with serving(simulator.url, **limits) as server, connected(server.address) as connection:
        async with connected(server.address) as one, connected(server.address) as two:
            for holder in (one, two):
                await holder.send(request("POST", "/api/chat", body_of(2000)))
                assert (await holder.head()).status == 200
            await connection.send(request("POST", "/api/chat", body_of(97)))
            answer = await connection.answer()
            assert answer.status == 503
            assert answer.headers["Retry-After"] == "1"
            assert answer.json()["error"]["type"] == "overloaded_error"
            assert server.registry.bodies.used == 4000
            await connection.send(request("POST", "/api/chat", body_of(96, "[[tokens=1]]")))
            assert (await connection.answer()).status == 200
            for stream in list(server.registry._table.running):
                await server.registry.stop(stream)
        await used(server, 0)
        await connection.send(request("POST", "/api/chat", body_of(2000, "[[tokens=1]]")))
        assert (await connection.answer()).status == 200


@pytest.mark.parametrize("seed", range(6))
async def test_bodies_in_any_order_never_exceed_their_bound_and_leave_nothing(simulator: Simulator, seed: int) -> None:
    """Some arrive, some break off, are refused, wait, are answered or stopped, all at once."""
    chance = random.Random(seed)
    texts = ("[[tokens=3]]", "[[first_s=3600]]", "[[status=429]]", "[[status=500]]", "[[first_s=0.01 tokens=2]]")
    limits: dict[str, Any] = {"max_body_bytes": 16_384, "bodies_bytes": 40_000, "first_byte_commit_s": 0, "leave_s": 0}
    most = 0
    async with serving(simulator.url, **limits) as server:
        registry = server.registry

        async def begin(connection: Connection) -> bytes:
            data = body_of(chance.randrange(200, 18_000), chance.choice(texts))
            if chance.random() < 0.2:
                data = data[:-1] + b"x"
            key = {"Idempotency_Key": chance.choice("ab")} if chance.random() < 0.3 else {}
            await connection.send(announced(len(data), **key))
            return data

        open_: list[tuple[Connection, Any, bytes]] = []
        for _ in range(150):
            if len(open_) < 8:
                context = connected(server.address)
                connection = await context.__aenter__()
                open_.append((connection, context, await begin(connection)))
            index = chance.randrange(len(open_))
            connection, context, data = open_[index]
            if chance.random() < 0.25:
                connection.reset()
                await context.__aexit__(None, None, None)
                del open_[index]
            else:
                size = chance.randrange(1, 9000)
                await connection.send(data[:size])
                open_[index] = (connection, context, data[size:])
            if chance.random() < 0.1 and registry._table.running:
                await registry.stop(chance.choice(list(registry._table.running)))
            most = max(most, registry.bodies.used)
            assert registry.bodies.used <= 40_000
        assert most > 10_000
        for connection, context, _ in open_:
            connection.reset()
            await context.__aexit__(None, None, None)
        await used(server, 0)
