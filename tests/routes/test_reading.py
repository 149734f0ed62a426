"""`/api/chat/<stream>` and the POSTs that join: cursors, states, leaving, stopping, bounds, compact replay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Server, eventually, prompt, serving
from raw import Answer, connected, request
from rawclient import RawClient, Written, joined, mergeable, parse
from rawupstream import LAST_CHUNK, MESSAGE_STOP, Connection, Request, chunk, delta, head, message_start
from rawupstream import raw_upstream as raw_upstream_of

from aisse.streams.table import KEPT_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rawupstream import RawUpstream

    from aisse.simulator import Simulator

SOAK = os.environ.get("TESTS_SOAK") == "1"
TOKEN, OTHER_TOKEN = "a-token-of-some-length.1", "another-token-of-length.2"
ALIEN = "A" * 22
STATE = {"Accept": "application/json"}


async def ask(
    server: Server,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    /,
    **headers: str | None,
) -> Answer:
    """One request on a connection of its own, answered in full, with no trace of our inside in it."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    data = json.dumps(body).encode() if body is not None else None
    async with connected(server.address) as connection:
        await connection.send(request(method, path, data, names))
        answer = await connection.answer(method)
    assert b"Traceback" not in answer.body
    assert answer.status != 500
    return answer


async def state(server: Server, path: str) -> dict[str, Any]:
    answer = await ask(server, "GET", path, **STATE)
    assert answer.status == 200
    said: dict[str, Any] = answer.json()
    return said


async def finished(server: Server, text: str = "[[tokens=5]]", **headers: str) -> tuple[str, Written]:
    """A stream that has ended: its path, and all that was written of it."""
    answer = await ask(server, "POST", "/api/chat", prompt(text), **headers)
    assert answer.status == 200
    await eventually(lambda: server.registry.readers == 0)
    return answer.headers["Content-Location"], parse(answer.body)


async def accepted(server: Server, text: str, **headers: str) -> str:
    """The path of a stream that runs without any reader so far."""
    answer = await ask(server, "POST", "/api/chat", prompt(text), Prefer="respond-async", **headers)
    assert answer.status == 202, answer.body
    return answer.headers["Location"]


def stream_of(server: Server, path: str) -> Any:
    return server.registry.get(path.rpartition("/")[2])


def id_of(path: str, seq: int) -> str:
    return f"{path.rpartition('/')[2]}.{seq}"


def refused(answer: Answer, status: int) -> None:
    assert answer.status == status, answer.body[:300]
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json()["type"] == "error"
    assert len(answer.body) < 1000


def reason_of(written: Written) -> str:
    (end,) = [item for item in written.frames if item.event == "end"]
    assert written.items[-1] == end
    reason: str = json.loads(end.data)["reason"]
    assert (len(written.frames) > 1 and written.frames[-2].event == "error") == (reason not in {"complete", "stopped"})
    return reason


@dataclass
class Puppet:
    """An upstream whose answers the test plays: `connections` in the order of the requests."""

    url: str
    upstream: RawUpstream
    asked: list[Connection] = field(default_factory=list)

    def send(self, *events: bytes, to: int = 0) -> None:
        self.asked[to].send(*map(chunk, events))

    def complete(self, to: int = 0) -> None:
        self.asked[to].send(chunk(MESSAGE_STOP), LAST_CHUNK)


@contextlib.asynccontextmanager
async def puppet(*, silent: bool = False) -> AsyncIterator[Puppet]:
    """Answers each request with headers and `message_start`, with nothing if `silent`; the rest is the test's."""
    played: Puppet

    async def answer(_request: Request, connection: Connection) -> None:
        if not silent:
            connection.send(head(), chunk(message_start()))
        played.asked.append(connection)

    async with raw_upstream_of(answer) as upstream:
        played = Puppet(upstream.url, upstream)
        yield played


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps often, so that times of tenths of a second mean something."""
    monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 0.02)


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """None within a test: what happens at once happens without one."""
    monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 3600.0)


# --- GET: the stream and its state ----------------------------------------------------------------------------


@pytest.mark.parametrize("accept", [None, "*/*", "text/event-stream", "text/event-stream, application/json"])
async def test_finished_stream_is_read_again_from_the_beginning(server: Server, accept: str | None) -> None:
    path, first = await finished(server)
    answer = await ask(server, "GET", path, Accept=accept)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["Content-Location"] == path
    assert answer.headers["Cache-Control"] == "no-cache, no-transform"
    assert answer.body.startswith(f"retry: 2000\nid: {id_of(path, 0)}\n".encode())
    assert parse(answer.body) == first


async def test_state_tells_where_a_finished_stream_stands(server: Server) -> None:
    before = datetime.now(UTC)
    path, written = await finished(server)
    answer = await ask(server, "GET", path, **STATE)
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["Content-Location"] == path
    assert answer.headers["Cache-Control"] == "no-store"
    said = answer.json()
    created, ended = datetime.fromisoformat(said.pop("created")), datetime.fromisoformat(said.pop("ended"))
    assert before.replace(microsecond=0) <= created <= ended <= datetime.now(UTC)
    assert said == {
        "id": path.rpartition("/")[2],
        "status": "ended",
        "reason": "complete",
        "events": len(written.frames),
        "last_event_id": written.frames[-1].id,
        "usage": json.loads(written.frames[-1].data)["usage"],
    }


async def test_state_tells_where_a_running_stream_stands() -> None:
    async with puppet() as upstream, serving(upstream.url) as server:
        path = await accepted(server, "hello")
        said = await state(server, path)
        assert (said["status"], said["reason"], said["ended"]) == ("streaming", None, None)
        assert (said["events"], said["last_event_id"]) == (1, id_of(path, 1))
        assert said["usage"] == {"input_tokens": 7, "output_tokens": 1}
        assert server.registry.readers == 0


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("application/json", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("application/*", "application/json"),
        ("*/*;q=0.5, application/*", "application/json"),
        ("text/event-stream;q=0, */*", "application/json"),
        ("text/*;q=0.4, application/json;q=0.5", "application/json"),
        ("text/*;q=1, application/json;q=0.5", "text/event-stream"),
        ("text/*, application/json", "application/json"),
        ("text/*, application/*", "text/event-stream"),
        ("application/json;q=0", "text/event-stream"),
        ("application/json;q=0, */*", "text/event-stream"),
        ("text/html, */*;q=0.8", "text/event-stream"),
        ("image/png", "text/event-stream"),
        ("application/json;q=0.5, */*;q=0.6", "text/event-stream"),
        ("TEXT/*; Q=0.9 , application/json; q=0.8", "text/event-stream"),
    ],
)
async def test_accept_prefers_by_weight_then_by_what_is_named_closer(
    server: Server, accept: str, expected: str
) -> None:
    path, _ = await finished(server)
    answer = await ask(server, "GET", path, Accept=accept)
    assert answer.headers["Content-Type"].partition(";")[0] == expected


async def test_accept_in_several_fields_is_read_as_one(server: Server) -> None:
    path, _ = await finished(server)
    async with connected(server.address) as connection:
        fields = b"Host: localhost\r\nAccept: text/html\r\nAccept: application/json\r\n\r\n"
        await connection.send(b"GET %b HTTP/1.1\r\n%b" % (path.encode(), fields))
        answer = await connection.answer("GET")
    assert answer.headers["Content-Type"].partition(";")[0] == "application/json"


async def test_state_is_told_whatever_cursor_came_with_the_question(server: Server) -> None:
    path, written = await finished(server)
    answer = await ask(server, "GET", path, Accept="application/json", Last_Event_ID=written.frames[-1].id)
    assert answer.status == 200
    assert answer.json()["status"] == "ended"


async def test_reader_gets_what_was_and_what_comes_without_a_seam() -> None:
    async with puppet() as upstream, serving(upstream.url) as server:
        path = await accepted(server, "hello")
        upstream.send(delta("a"))
        await eventually(lambda: stream_of(server, path).log.last_seq == 2)
        async with await RawClient.connect(server.address) as client:
            await client.get(path)
            await client.answered()
            await client.read_until(lambda client: len(client.written.frames) == 2)
            upstream.send(delta("b"), delta("c"))
            upstream.complete()
            await client.read_to_end()
            assert client.body.ended
            assert [frame.seq for frame in client.written.frames] == [1, 2, 3, 4, 5, 6]
            assert reason_of(client.written) == "complete"


# --- cursors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["header", "last_event_id", "lastEventId"])
async def test_reader_continues_after_its_cursor(server: Server, way: str) -> None:
    path, first = await finished(server)
    for seq in range(len(first.frames)):
        cursor = id_of(path, seq)
        if way == "header":
            answer = await ask(server, "GET", path, Last_Event_ID=cursor)
        else:
            answer = await ask(server, "GET", f"{path}?{way}={cursor}")
        assert answer.status == 200
        # The cursor that this response continues from, in the same chunk as the first replayed events.
        assert answer.chunks is not None
        assert answer.chunks[0].startswith(f"retry: 2000\nid: {cursor}\nevent: ".encode())
        written = parse(answer.body)
        assert written.opening == cursor
        assert written.frames == first.frames[seq:]


async def test_cursor_of_the_header_wins_over_the_query_and_the_name_over_its_alias(server: Server) -> None:
    path, first = await finished(server)
    query = f"{path}?lastEventId={id_of(path, 1)}&last_event_id={id_of(path, 2)}"
    assert parse((await ask(server, "GET", query)).body).frames == first.frames[2:]
    answer = await ask(server, "GET", query, Last_Event_ID=id_of(path, 3))
    assert parse(answer.body).frames == first.frames[3:]
    # Native EventSource keeps the query for ever: what it read since is in the header.
    answer = await ask(server, "GET", f"{path}?last_event_id=nonsense", Last_Event_ID=id_of(path, 3))
    assert parse(answer.body).frames == first.frames[3:]


@pytest.mark.parametrize("query", ["?last_event_id=", "?lastEventId=", "?last_event_id=&lastEventId=", "?other=x"])
async def test_empty_cursor_is_none(server: Server, query: str) -> None:
    path, first = await finished(server)
    assert parse((await ask(server, "GET", path + query, Last_Event_ID="")).body) == first


async def test_cursor_at_the_end_is_answered_with_nothing_and_for_good(server: Server) -> None:
    """The one status at which a native EventSource stops."""
    path, first = await finished(server)
    last = first.frames[-1].id
    for answer in (
        await ask(server, "GET", path, Last_Event_ID=last),
        await ask(server, "GET", f"{path}?last_event_id={last}"),
        await ask(server, "GET", f"{path}?compact=1", Last_Event_ID=last),
    ):
        assert answer.status == 204
        assert answer.body == b""
        assert answer.headers["Content-Location"] == path


@pytest.mark.parametrize("seq", [1, 1000, 2**53 - 100])
async def test_cursor_beyond_the_tail_of_an_ended_stream_gets_its_end(server: Server, seq: int) -> None:
    path, first = await finished(server)
    answer = await ask(server, "GET", path, Last_Event_ID=id_of(path, len(first.frames) + seq))
    assert answer.status == 200
    assert parse(answer.body).frames == first.frames[-1:]


async def test_reader_beyond_the_tail_waits_for_a_stream_that_runs() -> None:
    async with puppet() as upstream, serving(upstream.url) as server, await RawClient.connect(server.address) as client:
        path = await accepted(server, "hello")
        await client.get(f"{path}?last_event_id={id_of(path, 3)}")
        await client.answered()
        assert client.status == 200
        await client.read_until(lambda client: client.written.opening == id_of(path, 3))
        upstream.send(delta("2"), delta("3"), delta("4"))
        await client.read_until(lambda client: bool(client.written.frames))
        upstream.complete()
        await client.read_to_end()
        assert [frame.seq for frame in client.written.frames] == [4, 5, 6]
        assert reason_of(client.written) == "complete"


async def test_reader_beyond_the_tail_of_a_stream_that_ends_gets_its_end() -> None:
    async with puppet() as upstream, serving(upstream.url) as server, await RawClient.connect(server.address) as client:
        path = await accepted(server, "hello")
        await client.get(f"{path}?last_event_id={id_of(path, 2**53)}")
        await client.answered()
        upstream.complete()
        await client.read_to_end()
        assert [frame.event for frame in client.written.frames] == ["end"]


async def test_reader_far_beyond_the_tail_does_not_hold_its_stream_up(server: Server) -> None:
    """It takes nothing and asks for nothing; read-ahead counted against it would stop the stream for ever."""
    path = await accepted(server, "[[tokens=3000]]", Aisse_On_Leave="300")
    async with asyncio.timeout(60), await RawClient.connect(server.address) as client:
        await client.get(f"{path}?last_event_id={id_of(path, 2**53)}")
        await client.answered()
        await client.read_to_end()
        assert reason_of(client.written) == "complete"


@pytest.mark.parametrize(
    "name",
    [ALIEN, "x", "A" * 21, "A" * 23, "é", "%00", "%0d%0a", "..%2f..%2fhealth", "A" * 6000, "%ff", "%F0%9F%A7%A0"],
)
async def test_unknown_stream_is_not_found(server: Server, name: str) -> None:
    quoted = name.replace("é", "%C3%A9")
    for method, path in (
        ("GET", f"/api/chat/{quoted}"),
        ("DELETE", f"/api/chat/{quoted}"),
        ("POST", f"/api/chat/{quoted}/stop"),
        ("GET", f"/api/chat/{quoted}?last_event_id={ALIEN}.1"),
    ):
        refused(await ask(server, method, path), 404)
    refused(await ask(server, "GET", f"/api/chat/{quoted}", **STATE), 404)


# `{id}` stands for the stream's own. All are refused, wherever they stand.
NO_CURSORS = {
    "word": "nonsense",
    "no number": "{id}",
    "no number after the dot": "{id}.",
    "no id": ".1",
    "number alone": "1",
    "negative": "{id}.-1",
    "plus": "{id}.+1",
    "fraction": "{id}.1.5",
    "exponent": "{id}.1e3",
    "hexadecimal": "{id}.0x1",
    "underscore": "{id}.1_0",
    "beyond 2^53": "{id}.9007199254740993",
    "beyond 2^64": "{id}.18446744073709551617",
    "1,000 digits": "{id}." + "9" * 1000,
    "id too short": "AAA.1",
    "id too long": "{id}A.1",
    "of another stream": ALIEN + ".1",
    "another's with case": "{ID}.1",
    "two": "{id}.1,{id}.2",
    "space within": "{id}. 1",
}


@pytest.mark.parametrize("pattern", NO_CURSORS.values(), ids=NO_CURSORS.keys())
async def test_cursor_that_is_none_is_refused(server: Server, pattern: str) -> None:
    path, _ = await finished(server)
    own = path.rpartition("/")[2]
    text = pattern.replace("{id}", own).replace("{ID}", own.swapcase())
    refused(await ask(server, "GET", path, Last_Event_ID=text), 400)
    quoted = text.replace("+", "%2B").replace(" ", "%20")
    for name in ("last_event_id", "lastEventId"):
        refused(await ask(server, "GET", f"{path}?{name}={quoted}"), 400)


@pytest.mark.parametrize(
    "tail", ["%0d%0aX:y", "%0a", "%0d", "%00", "%20", "%EF%BC%91", "%D9%A1", "%ff", "%F0%9F%A7%A0"]
)
async def test_cursor_with_bytes_that_no_header_carries_is_refused(server: Server, tail: str) -> None:
    """CR, LF, NUL, digits of other scripts, bytes that are no UTF-8: `int` would take some of them."""
    path, _ = await finished(server)
    for cursor in (id_of(path, 1) + tail, tail + id_of(path, 1), path.rpartition("/")[2] + "." + tail):
        answer = await ask(server, "GET", f"{path}?last_event_id={cursor}")
        refused(answer, 400)
        assert "X" not in answer.headers


@pytest.mark.parametrize(
    "value", [b"\x00", b"\r", b"\n", b"\xff\xfe", "\uff11".encode(), b"\x7f", b"\x01", b"\r\n \r\n", b"\xe9"]
)
async def test_raw_bytes_in_the_header_of_the_cursor_are_refused(server: Server, value: bytes) -> None:
    path, _ = await finished(server)
    own = path.rpartition("/")[2].encode()
    for text in (own + b"." + value, own + b".1" + value + b"1", value + own + b".1"):
        async with connected(server.address) as connection:
            await connection.send(b"GET %b HTTP/1.1\r\nHost: a\r\nLast-Event-ID: %b\r\n\r\n" % (path.encode(), text))
            answer = await connection.answer("GET")
        assert answer.status == 400, (text, answer.body[:200])
        assert b"Traceback" not in answer.body


async def test_cursor_of_a_megabyte_is_refused(server: Server) -> None:
    path, _ = await finished(server)
    for cursor in ("A" * (1 << 20), id_of(path, 1) + "0" * (1 << 20)):
        for data in (
            request("GET", path, headers={"Last-Event-ID": cursor}),
            request("GET", f"{path}?last_event_id={cursor}"),
            request("GET", f"/api/chat/{cursor}"),
        ):
            async with connected(server.address) as connection:
                await connection.send(data)
                # The server may close while we still send, which a kernel may turn into a reset.
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    assert (await connection.answer("GET")).status in {400, 404, 414, 431}
    assert (await ask(server, "GET", path)).status == 200


async def test_boundaries_of_cursors(server: Server) -> None:
    path, first = await finished(server)
    for number in ("0", "00", "0000000000000000"):
        answer = await ask(server, "GET", path, Last_Event_ID=f"{path.rpartition('/')[2]}.{number}")
        assert parse(answer.body).frames == first.frames
    assert (await ask(server, "GET", path, Last_Event_ID=id_of(path, 2**53))).status == 200
    refused(await ask(server, "GET", path, Last_Event_ID=id_of(path, 2**53 + 1)), 400)


# --- Prefer: respond-async ------------------------------------------------------------------------------------


async def test_accepted_stream_is_named_and_generates(server: Server, simulator: Simulator) -> None:
    answer = await ask(server, "POST", "/api/chat", prompt("[[tokens=5]]"), Prefer="respond-async")
    assert answer.status == 202
    path = answer.headers["Location"]
    assert answer.headers["Content-Location"] == path
    said = answer.json()
    assert said.keys() == {"id", "url", "status"}
    assert said["url"] == path == f"/api/chat/{said['id']}"
    assert said["status"] in {"streaming", "ended"}
    await eventually(lambda: simulator.stats.completed == 1)
    written = parse((await ask(server, "GET", path)).body)
    assert reason_of(written) == "complete"
    assert simulator.stats.requests == 1


@pytest.mark.parametrize(
    "prefer", ["Respond-Async", "wait=5, respond-async", "respond-async; x=y", "a,respond-async ,b"]
)
async def test_preference_is_read_as_http_writes_it(server: Server, prefer: str) -> None:
    assert (await ask(server, "POST", "/api/chat", prompt("hello"), Prefer=prefer)).status == 202


@pytest.mark.parametrize("prefer", ["", "respond-sync", "xrespond-async", 'x="respond-async', "return=minimal"])
async def test_other_preferences_change_nothing(server: Server, prefer: str) -> None:
    answer = await ask(server, "POST", "/api/chat", prompt("[[tokens=1]]"), Prefer=prefer)
    assert answer.status == 200


async def test_accepted_stream_that_nobody_reads_is_abandoned(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, swift: None
) -> None:
    monkeypatch.setattr("aisse.routes.chat._FIRST_READER_S", 0.1)
    async with serving(simulator.url, leave_s=0.1) as server:
        path = await accepted(server, "[[fault=stall at=3]]")
        stream = stream_of(server, path)
        await eventually(lambda: server.registry.active_streams == 0)
        assert stream.leave.unread_since + 0.1 <= stream.ended
        assert (await state(server, path))["reason"] == "abandoned"
        await eventually(lambda: simulator.stats.aborted == 1)


async def test_accepted_stream_waits_for_its_first_reader_even_without_leave_time(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, swift: None
) -> None:
    monkeypatch.setattr("aisse.routes.chat._FIRST_READER_S", 3600.0)
    async with serving(simulator.url, leave_s=0) as server:
        path = await accepted(server, "[[fault=stall at=3]]", Aisse_On_Leave="cancel")
        await asyncio.sleep(0.1)  # several sweeps, each of which could end it
        assert (await state(server, path))["status"] == "streaming"
        async with await RawClient.connect(server.address) as client:
            await client.get(path)
            await client.answered()
            assert client.status == 200
            await client.read_until(lambda client: len(client.written.frames) == 3)
        # It has had its first reader: from here on the leave time counts, which is none.
        await eventually(lambda: server.registry.active_streams == 0)
        assert (await state(server, path))["reason"] == "abandoned"


@pytest.mark.parametrize(("status", "expected"), [(400, 400), (413, 413), (401, 502), (500, 502), (529, 503)])
async def test_failure_before_the_commit_is_a_status_for_who_asked_async(
    server: Server, status: int, expected: int
) -> None:
    answer = await ask(server, "POST", "/api/chat", prompt(f"[[status={status}]]"), Prefer="respond-async")
    refused(answer, expected)
    assert "Location" not in answer.headers
    assert server.registry.replay_bytes == 0


async def test_stream_is_accepted_after_the_commit_time_before_the_upstream_has_spoken(simulator: Simulator) -> None:
    async with serving(simulator.url, first_byte_commit_s=0.05) as server:
        answer = await ask(server, "POST", "/api/chat", prompt("[[first_s=3600]]"), Prefer="respond-async")
        assert answer.status == 202
        assert answer.json()["status"] == "waiting"
        said = await state(server, answer.headers["Location"])
        assert (said["status"], said["events"]) == ("waiting", 0)


async def test_client_that_leaves_before_the_acceptance_leaves_nothing_running(simulator: Simulator) -> None:
    async with serving(simulator.url, leave_s=0) as server:
        async with connected(server.address) as connection:
            body = json.dumps(prompt("[[first_s=3600]]")).encode()
            await connection.send(request("POST", "/api/chat", body, {"Prefer": "respond-async"}))
            await eventually(lambda: simulator.stats.active == 1)
            connection.reset()
        await eventually(lambda: simulator.stats.aborted == 1)
        assert server.registry.active_streams == 0


# --- POST that joins ------------------------------------------------------------------------------------------


async def test_post_with_a_cursor_joins(server: Server, simulator: Simulator) -> None:
    path, first = await finished(server)
    for body in (prompt("[[tokens=5]]"), prompt("something else"), {}):
        answer = await ask(server, "POST", "/api/chat", body, Last_Event_ID=id_of(path, 2))
        assert answer.status == 200
        assert answer.headers["Content-Location"] == path
        written = parse(answer.body)
        assert written.opening == id_of(path, 2)
        assert written.frames == first.frames[2:]
    assert simulator.stats.requests == server.registry.generations == 1


async def test_post_with_a_cursor_goes_live() -> None:
    async with puppet() as upstream, serving(upstream.url) as server, await RawClient.connect(server.address) as client:
        path = await accepted(server, "hello")
        body = json.dumps(prompt("hello")).encode()
        await client.send(request("POST", "/api/chat", body, {"Last-Event-ID": id_of(path, 1)}))
        await client.answered()
        upstream.send(delta("a"))
        upstream.complete()
        await client.read_to_end()
        assert [frame.seq for frame in client.written.frames] == [2, 3, 4]
        assert len(upstream.asked) == 1


async def test_post_at_the_end_gets_the_end_again(server: Server, simulator: Simulator) -> None:
    """Clients that POST again after the end retry a 204 for ever; of the end they take notice."""
    path, first = await finished(server)
    for seq in (len(first.frames), len(first.frames) + 1, 2**53):
        answer = await ask(server, "POST", "/api/chat", prompt("hello"), Last_Event_ID=id_of(path, seq))
        assert answer.status == 200
        assert parse(answer.body).frames == first.frames[-1:]
    assert simulator.stats.requests == 1


async def test_post_with_a_cursor_has_its_body_checked_like_any_other(simulator: Simulator) -> None:
    async with serving(simulator.url, max_body_bytes=2048) as server:
        path, _ = await finished(server)
        refused(await ask(server, "POST", "/api/chat", prompt("x" * 3000), Last_Event_ID=id_of(path, 1)), 413)
        plain = {"Last_Event_ID": id_of(path, 1), "Content_Type": "text/plain"}
        refused(await ask(server, "POST", "/api/chat", prompt("hello"), **plain), 415)


async def test_post_with_a_cursor_and_a_large_body_is_missed_when_its_client_leaves(server: Server) -> None:
    """A body that nobody reads stops what tells of it."""
    path = await accepted(server, "[[tokens=100000 pace=20]]")
    body = json.dumps(prompt("x" * (1 << 20))).encode()
    async with await RawClient.connect(server.address) as client:
        await client.send(request("POST", "/api/chat", body, {"Last-Event-ID": id_of(path, 1)}))
        await client.answered()
        await eventually(lambda: server.registry.readers == 1)
    await eventually(lambda: server.registry.readers == 0)


@pytest.mark.parametrize(("cursor", "status"), [(f"{ALIEN}.0", 404), (f"{ALIEN}.7", 404), ("nonsense", 400)])
async def test_post_with_a_cursor_never_starts(server: Server, simulator: Simulator, cursor: str, status: int) -> None:
    refused(await ask(server, "POST", "/api/chat", prompt("hello"), Last_Event_ID=cursor), status)
    headers = {"Last_Event_ID": cursor, "Idempotency_Key": "k", "Prefer": "respond-async"}
    refused(await ask(server, "POST", "/api/chat", prompt("hello"), **headers), status)
    assert simulator.stats.requests == server.registry.generations == 0


async def test_joining_needs_the_access_token_that_starting_needs(simulator: Simulator) -> None:
    async with serving(simulator.url, access_tokens=(TOKEN,)) as server:
        path, first = await finished(server, Authorization=f"Bearer {TOKEN}")
        refused(await ask(server, "POST", "/api/chat", prompt("x"), Last_Event_ID=id_of(path, 1)), 401)
        # The id itself is what a reader needs.
        assert parse((await ask(server, "GET", path)).body) == first


async def test_same_key_joins_from_the_beginning(server: Server, simulator: Simulator) -> None:
    path, first = await finished(server, Idempotency_Key="key-1")
    answer = await ask(server, "POST", "/api/chat", prompt("[[tokens=5]]"), Idempotency_Key="key-1")
    assert answer.headers["Content-Location"] == path
    assert parse(answer.body) == first
    assert await accepted(server, "[[tokens=5]]", Idempotency_Key="key-1") == path
    assert simulator.stats.requests == server.registry.generations == 1
    other, _ = await finished(server, Idempotency_Key="key-2")
    assert other != path
    assert simulator.stats.requests == 2


async def test_same_body_in_other_bytes_is_another(server: Server, simulator: Simulator) -> None:
    """Who repeats a request sends the same bytes; to compare meanings would mean to parse megabytes."""
    await finished(server, "hello", Idempotency_Key="k")
    body = {"messages": [{"content": "hello", "role": "user"}]}
    refused(await ask(server, "POST", "/api/chat", body, Idempotency_Key="k"), 422)
    assert simulator.stats.requests == 1


async def test_same_key_with_another_body_is_refused(server: Server, simulator: Simulator) -> None:
    await finished(server, "hello", Idempotency_Key="k")
    answer = await ask(server, "POST", "/api/chat", prompt("other"), Idempotency_Key="k")
    refused(answer, 422)
    assert answer.json()["error"]["field"] == "Idempotency-Key"
    assert simulator.stats.requests == server.registry.generations == 1


@pytest.mark.parametrize("prefer", [None, "respond-async"])
async def test_identical_posts_that_race_start_one_generation(
    server: Server, simulator: Simulator, prefer: str | None
) -> None:
    headers = {"Idempotency_Key": "race", "Prefer": prefer}
    text = "[[tokens=20 first_s=0.05]]"
    answers = await asyncio.gather(*(ask(server, "POST", "/api/chat", prompt(text), **headers) for _ in range(20)))
    assert {answer.status for answer in answers} == {202 if prefer else 200}
    assert len({answer.headers["Content-Location"] for answer in answers}) == 1
    if not prefer:  # a 202 says how the answer stands, too, which may begin between two of them
        assert len({answer.body for answer in answers}) == 1
    assert simulator.stats.requests == server.registry.generations == 1


async def test_reader_that_raced_and_left_does_not_end_the_other_ones_stream() -> None:
    async with puppet(silent=True) as upstream, serving(upstream.url, leave_s=0) as server:
        body = json.dumps(prompt("hello")).encode()
        data = request("POST", "/api/chat", body, {"Idempotency-Key": "k"})
        async with connected(server.address) as first, connected(server.address) as second:
            await first.send(data)
            await second.send(data)
            await eventually(lambda: server.registry.readers == 2)
            first.reset()
            await eventually(lambda: server.registry.readers == 1 and bool(upstream.asked))
            upstream.asked[0].send(head(), chunk(message_start()), chunk(MESSAGE_STOP), LAST_CHUNK)
            assert reason_of(parse((await second.answer()).body)) == "complete"
        assert len(upstream.asked) == 1


async def test_get_of_a_stream_that_waits_is_answered_at_once_and_told_of_its_refusal() -> None:
    """Its id is known where another instance has answered who joined it."""
    async with puppet(silent=True) as upstream, serving(upstream.url) as server:
        body = json.dumps(prompt("hello")).encode()
        async with connected(server.address) as asking, connected(server.address) as reading:
            await asking.send(request("POST", "/api/chat", body, {"Idempotency-Key": "k"}))
            await eventually(lambda: bool(upstream.asked))
            [stream_id] = server.registry._table.running
            await reading.send(request("GET", f"/api/chat/{stream_id}"))
            await eventually(lambda: server.registry.readers == 2)
            upstream.asked[0].send(head("429 Too Many Requests", "application/json", framing="2"), b"{}")
            answer = await reading.answer()
            assert answer.status == 200
            assert reason_of(parse(answer.body)) == "error"
            # Who asked gets the real status, and the key is free.
            assert (await asking.answer()).status == 429
            state = await ask(server, "GET", f"/api/chat/{stream_id}", Accept="application/json")
            assert json.loads(state.body)["reason"] == "error"
            await asking.send(request("POST", "/api/chat", body, {"Idempotency-Key": "k"}))
            await eventually(lambda: len(upstream.asked) == 2)


async def test_key_is_free_again_after_a_refusal(server: Server, simulator: Simulator) -> None:
    """What was never answered was never billed: trying again has to be possible, with the same key."""
    refused(await ask(server, "POST", "/api/chat", prompt("[[status=529]]"), Idempotency_Key="k"), 503)
    refused(await ask(server, "POST", "/api/chat", prompt("[[status=529]]"), Idempotency_Key="k"), 503)
    assert simulator.stats.requests == 2
    path, _ = await finished(server, "[[tokens=2]]", Idempotency_Key="k")
    assert (await finished(server, "[[tokens=2]]", Idempotency_Key="k"))[0] == path
    assert simulator.stats.requests == 3


async def test_keys_of_different_tokens_do_not_meet(simulator: Simulator) -> None:
    async with serving(simulator.url, access_tokens=(TOKEN, OTHER_TOKEN)) as server:
        one, _ = await finished(server, "one", Idempotency_Key="k", Authorization=f"Bearer {TOKEN}")
        other, _ = await finished(server, "other", Idempotency_Key="k", Authorization=f"Bearer {OTHER_TOKEN}")
        assert one != other
        assert (await finished(server, "one", Idempotency_Key="k", Authorization=f"Bearer {TOKEN}"))[0] == one
        assert simulator.stats.requests == 2


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256, "a\tb"])
async def test_malformed_key_is_refused(server: Server, simulator: Simulator, key: str) -> None:
    refused(await ask(server, "POST", "/api/chat", prompt("hello"), Idempotency_Key=key), 400)
    assert simulator.stats.requests == 0


@pytest.mark.parametrize("key", ["x" * 255, "!", '"quoted"', "~{}[];,="])
async def test_key_may_be_any_visible_text(server: Server, key: str) -> None:
    path, _ = await finished(server, Idempotency_Key=key)
    assert (await finished(server, Idempotency_Key=key))[0] == path


# --- many readers ---------------------------------------------------------------------------------------------


async def test_readers_of_one_stream_go_at_their_own_pace(simulator: Simulator) -> None:
    """One that takes nothing holds back nobody, and gets everything once it reads."""
    async with serving(simulator.url, stall_s=600) as server:
        path = await accepted(server, "[[tokens=3000 token_bytes=400]]")
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    await RawClient.connect(server.address, receive_buffer_bytes=4096 if number == 0 else None)
                )
                for number in range(8)
            ]
            for client in clients:
                await client.get(path)
            await clients[0].answered()

            async def read(client: RawClient, step: int) -> None:
                await client.answered()
                async with asyncio.timeout(60):
                    while not client.body.ended:
                        assert await client.read(step)

            await asyncio.gather(*(read(client, 2048 << number) for number, client in enumerate(clients[1:])))
            assert not clients[0].body.ended
            await clients[0].read_to_end()
            whole = [frame.id for frame in clients[1].written.frames]
            assert len(whole) > 3000
            for client in clients:
                assert client.written.opening == id_of(path, 0)
                assert [frame.id for frame in client.written.frames] == whole
                assert reason_of(client.written) == "complete"
        assert simulator.stats.requests == 1


async def test_readers_with_different_cursors_get_their_own_rest() -> None:
    async with puppet() as upstream, serving(upstream.url) as server, contextlib.AsyncExitStack() as stack:
        path = await accepted(server, "hello")
        upstream.send(*(delta(str(number)) for number in range(8)))
        await eventually(lambda: stream_of(server, path).log.last_seq == 9)
        clients = []
        for seq in range(10):
            client = await stack.enter_async_context(await RawClient.connect(server.address))
            await client.get(f"{path}?last_event_id={id_of(path, seq)}")
            await client.answered()
            clients.append(client)
        upstream.complete()
        for seq, client in enumerate(clients):
            await client.read_to_end()
            assert [frame.seq for frame in client.written.frames] == list(range(seq + 1, 12))


# --- leaving --------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def reading(server: Server, path: str) -> AsyncIterator[RawClient]:
    """A reader that has been answered."""
    async with await RawClient.connect(server.address) as client:
        await client.get(path)
        await client.answered()
        assert client.status == 200
        yield client


async def begun(server: Server, **headers: str) -> tuple[RawClient, str]:
    """A client that reads a stream which it started, and that goes on until it is told otherwise."""
    client = await RawClient.connect(server.address)
    body = json.dumps(prompt("[[fault=stall at=4]]")).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    await client.send(request("POST", "/api/chat", body, names))
    await client.answered()
    assert client.status == 200
    await client.read_until(lambda client: len(client.written.frames) == 4)
    return client, client.headers["content-location"]


@pytest.mark.parametrize(
    ("leave_s", "header"), [(0, {}), (60, {"Aisse_On_Leave": "cancel"}), (60, {"Aisse_On_Leave": "0"})]
)
async def test_stream_ends_at_once_where_nobody_is_waited_for(
    simulator: Simulator, leave_s: float, header: dict[str, str], no_sweep: None
) -> None:
    async with serving(simulator.url, leave_s=leave_s) as server:
        client, path = await begun(server, **header)
        client.close()
        await eventually(lambda: simulator.stats.aborted == 1)
        said = await state(server, path)
        assert (said["status"], said["reason"]) == ("ended", "abandoned")
        answer = await ask(server, "GET", path, Last_Event_ID=id_of(path, 4))
        assert [frame.event for frame in parse(answer.body).frames] == ["error", "end"]
        assert reason_of(parse(answer.body)) == "abandoned"


async def test_leave_time_of_the_request_replaces_the_default(simulator: Simulator, swift: None) -> None:
    async with serving(simulator.url, leave_s=0) as server:
        client, path = await begun(server, Aisse_On_Leave="0.3")
        stream = stream_of(server, path)
        client.close()
        await eventually(lambda: server.registry.active_streams == 0)
        # Compared as it is computed: a difference of two such sums may come out a rounding error short.
        assert stream.leave.unread_since + 0.3 <= stream.ended
        assert (await state(server, path))["reason"] == "abandoned"


async def test_reader_that_returns_in_time_finds_the_generation_running(swift: None) -> None:
    async with puppet() as upstream, serving(upstream.url, leave_s=1.5) as server:
        path = await accepted(server, "hello")
        for _ in range(3):
            async with reading(server, path):
                await asyncio.sleep(0.55)  # longer in all than the leave time
            await eventually(lambda: server.registry.readers == 0)
            await asyncio.sleep(0.1)
        async with reading(server, path) as client:
            upstream.send(delta("a"))
            upstream.complete()
            await client.read_to_end()
            assert reason_of(client.written) == "complete"
        assert len(upstream.asked) == 1


async def test_leaving_counts_over_all_readers(simulator: Simulator, swift: None) -> None:
    async with serving(simulator.url, leave_s=0) as server:
        client, path = await begun(server)
        async with reading(server, path), reading(server, path):
            client.close()
            await eventually(lambda: server.registry.readers == 2)
            await asyncio.sleep(0.1)
            assert server.registry.active_streams == 1
        await eventually(lambda: server.registry.active_streams == 0)
        assert (await state(server, path))["reason"] == "abandoned"


async def test_asking_for_the_state_is_not_reading(simulator: Simulator, swift: None) -> None:
    async with serving(simulator.url, leave_s=0.2) as server:
        client, path = await begun(server)
        client.close()
        async with asyncio.timeout(60):
            while (await state(server, path))["status"] != "ended":
                await asyncio.sleep(0.01)


async def test_stream_goes_on_without_readers_where_both_sides_want_it(swift: None) -> None:
    async with puppet() as upstream, serving(upstream.url, leave_s=0, allow_continue=True) as server:
        client = await RawClient.connect(server.address)
        body = json.dumps(prompt("hello")).encode()
        await client.send(request("POST", "/api/chat", body, {"Aisse-On-Leave": "continue"}))
        await client.answered()
        path = client.headers["content-location"]
        client.close()
        await eventually(lambda: server.registry.readers == 0)
        await asyncio.sleep(0.1)
        upstream.send(delta("a"))
        upstream.complete()
        await eventually(lambda: server.registry.active_streams == 0)
        assert (await state(server, path))["reason"] == "complete"


@pytest.mark.parametrize(
    "value", ["continue", "", "stay", "-1", "1e2", "nan", "inf", "Cancel", " ", "301", "300.001", "9" * 400, "\uff11"]
)
async def test_leave_time_that_is_none_or_too_long_is_refused(server: Server, simulator: Simulator, value: str) -> None:
    answer = await ask(server, "POST", "/api/chat", prompt("hello"), Aisse_On_Leave=value)
    refused(answer, 400)
    assert answer.json()["error"]["field"] == "Aisse-On-Leave"
    assert simulator.stats.requests == 0


@pytest.mark.parametrize("value", ["cancel", "0", "0.5", "300", "300.000"])
async def test_leave_time_up_to_the_limit_is_taken(server: Server, value: str) -> None:
    answer = await ask(server, "POST", "/api/chat", prompt("[[tokens=1]]"), Aisse_On_Leave=value)
    assert answer.status == 200


# --- stopping -------------------------------------------------------------------------------------------------

STOPS = [("DELETE", ""), ("POST", "/stop")]


@pytest.mark.parametrize(("method", "suffix"), STOPS)
@pytest.mark.parametrize(
    ("script", "frames", "commit_s"),
    [("first_s=3600", 0, 0), ("thinking_s=3600 ping_s=0", 1, 5), ("fault=stall at=9", 9, 5)],
    ids=["connecting", "thinking", "streaming"],
)
async def test_stopped_stream_ends_without_error_and_closes_its_upstream(
    simulator: Simulator, no_sweep: None, *, script: str, frames: int, commit_s: float, method: str, suffix: str
) -> None:
    async with serving(simulator.url, first_byte_commit_s=commit_s) as server:
        path = await accepted(server, f"[[{script}]]")
        async with reading(server, path) as client:
            await client.read_until(lambda client: len(client.written.frames) == frames)
            await eventually(lambda: simulator.stats.active == 1)
            answer = await ask(server, method, path + suffix)
            assert (answer.status, answer.body) == (204, b"")
            await client.read_to_end()
            assert client.body.ended
            assert len(client.written.frames) == frames + 1
            assert reason_of(client.written) == "stopped"
        await eventually(lambda: simulator.stats.aborted == 1)
        for again, other in [*STOPS, *STOPS]:
            assert (await ask(server, again, path + other)).status == 204
        said = await state(server, path)
        assert (said["reason"], said["events"]) == ("stopped", frames + 1)
        assert server.registry.figures.failed == 0


@pytest.mark.parametrize(("method", "suffix"), STOPS)
async def test_stopping_a_finished_stream_changes_nothing(server: Server, method: str, suffix: str) -> None:
    path, first = await finished(server)
    assert (await ask(server, method, path + suffix)).status == 204
    assert parse((await ask(server, "GET", path)).body) == first
    assert (await state(server, path))["reason"] == "complete"


@pytest.mark.parametrize(("method", "suffix"), STOPS)
async def test_stopping_names_the_stream_that_it_stopped(server: Server, method: str, suffix: str) -> None:
    path, _ = await finished(server)
    assert (await ask(server, method, path + suffix)).headers["Content-Location"] == path


async def test_stop_reaches_who_waits_for_the_first_byte(simulator: Simulator) -> None:
    async with serving(simulator.url) as server:
        waiting = asyncio.create_task(
            ask(server, "POST", "/api/chat", prompt("[[first_s=3600]]"), Idempotency_Key="k"),
        )
        await eventually(lambda: simulator.stats.active == 1)
        (stream_id,) = server.registry._table.running
        assert (await ask(server, "DELETE", f"/api/chat/{stream_id}")).status == 204
        answer = await waiting
        assert answer.status == 200
        assert reason_of(parse(answer.body)) == "stopped"


async def test_leaving_is_not_stopping(simulator: Simulator) -> None:
    async with serving(simulator.url, leave_s=60) as server:
        client, path = await begun(server)
        client.close()
        await eventually(lambda: server.registry.readers == 0)
        assert (await state(server, path))["status"] == "streaming"


# --- bounds ---------------------------------------------------------------------------------------------------


async def test_evicted_reader_comes_back_and_loses_nothing(simulator: Simulator, swift: None) -> None:
    async with serving(simulator.url, stall_s=0.4) as server:
        path = await accepted(server, "[[tokens=2000 token_bytes=1000]]")
        evicted = Written()
        async with await RawClient.connect(server.address, receive_buffer_bytes=4096) as client:
            await client.get(path)
            await client.answered()
            await client.read_until(lambda client: len(client.body.chunks) > 3)
            await eventually(lambda: server.registry.readers == 0)
            await client.read_to_end()
            assert client.broken
            assert not client.body.ended
            evicted = client.written
        assert 0 < len(evicted.frames) < 1500
        answer = await ask(server, "GET", path, Last_Event_ID=evicted.frames[-1].id)
        rest = parse(answer.body)
        seqs = [frame.seq for frame in evicted.frames + rest.frames]
        assert seqs == list(range(1, len(seqs) + 1))
        assert reason_of(rest) == "complete"
        assert simulator.stats.requests == 1


async def test_slow_reader_that_moves_is_never_evicted(simulator: Simulator, swift: None) -> None:
    async with serving(simulator.url, stall_s=1) as server:
        path = await accepted(server, "[[tokens=400 token_bytes=1000]]")
        begun_at = asyncio.get_running_loop().time()
        async with await RawClient.connect(server.address, receive_buffer_bytes=4096) as client:
            await client.get(path)
            await client.answered()
            while not client.body.ended:
                assert await client.read(6 << 10)
                await asyncio.sleep(0.03)
            assert reason_of(client.written) == "complete"
            assert len(client.written.frames) > 400
        assert asyncio.get_running_loop().time() - begun_at > 2 * server.settings.stall_s


async def test_stream_past_its_size_ends_as_limit(simulator: Simulator) -> None:
    async with serving(simulator.url, stream_bytes=20_000) as server:
        path, written = await finished(server, "[[tokens=1000]]")
        assert reason_of(written) == "limit"
        assert 20_000 < stream_of(server, path).log.tail < 20_000 + (64 << 10)
        await eventually(lambda: simulator.stats.active == 0)


async def test_oldest_finished_streams_make_room_first(simulator: Simulator, swift: None) -> None:
    async with serving(simulator.url, replay_bytes=60_000) as server:
        paths = [(await finished(server, "[[tokens=50]]"))[0] for _ in range(4)]
        size = stream_of(server, paths[0]).log.tail + KEPT_BYTES
        count = 60_000 // size + 1  # so many are above the bound
        while len(paths) < count:
            paths.append((await finished(server, "[[tokens=50]]"))[0])
        await eventually(lambda: server.registry.replay_bytes < 60_000)
        statuses = [(await ask(server, "GET", path)).status for path in paths]
        gone = statuses.count(404)
        assert 1 <= gone <= 2
        assert statuses == [404] * gone + [200] * (count - gone)


async def test_streams_that_run_or_are_read_keep_their_log_and_new_ones_are_refused(swift: None) -> None:
    async with puppet() as upstream, serving(upstream.url, replay_bytes=8192) as server:
        ended, running = await accepted(server, "ended"), await accepted(server, "running")
        upstream.send(delta("x" * 3000), to=0)
        upstream.send(delta("x" * 6000), to=1)
        async with reading(server, ended) as client:
            upstream.complete(to=0)
            await client.read_to_end()
        await eventually(lambda: server.registry.replay_bytes < 8192)
        refused(await ask(server, "GET", ended), 404)
        upstream.send(delta("x" * 3000), to=1)
        await eventually(lambda: server.registry.replay_bytes > 8192)
        answer = await ask(server, "POST", "/api/chat", prompt("one more"))
        refused(answer, 503)
        assert int(answer.headers["Retry-After"]) > 0
        async with reading(server, running) as client:
            upstream.complete(to=1)
            await client.read_to_end()
            assert [frame.seq for frame in client.written.frames] == [1, 2, 3, 4, 5]


async def test_stream_is_forgotten_after_its_retention(simulator: Simulator, swift: None) -> None:
    async with serving(simulator.url, retention_s=0.3) as server:
        path, first = await finished(server, Idempotency_Key="k")
        ended = stream_of(server, path).ended
        async with asyncio.timeout(60):
            while (answer := await ask(server, "GET", path)).status == 200:
                assert parse(answer.body) == first
                await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - ended >= 0.3
        refused(answer, 404)
        refused(await ask(server, "GET", path, **STATE), 404)
        refused(await ask(server, "DELETE", path), 404)
        refused(await ask(server, "POST", "/api/chat", prompt("x"), Last_Event_ID=id_of(path, 1)), 404)
        assert server.registry.replay_bytes == 0
        # Its key has gone with it.
        other, _ = await finished(server, Idempotency_Key="k")
        assert other != path


# --- compact replay -------------------------------------------------------------------------------------------


async def test_compact_replay_is_the_same_answer_in_a_few_frames(server: Server) -> None:
    path, first = await finished(server, "[[tokens=3000 thinking_tokens=2000]]")
    answer = await ask(server, "GET", f"{path}?compact=1")
    written = parse(answer.body)
    assert written.opening == id_of(path, 0)
    assert joined(written.frames) == joined(first.frames)
    assert len(joined(first.frames)) == 2
    kept = [item for item in first.frames if not mergeable(item)]
    assert [item for item in written.frames if not mergeable(item)] == kept
    assert len(written.frames) < len(kept) + 20
    assert answer.chunks is not None
    assert len(answer.chunks) < 10
    ids = [item.id for item in first.frames]
    positions = [ids.index(item.id) for item in written.frames]
    assert positions == sorted(set(positions))


@pytest.mark.parametrize("query", ["", "?compact=0", "?compact=", "?compact=true"])
async def test_replay_is_compact_for_those_who_ask(server: Server, query: str) -> None:
    path, first = await finished(server, "[[tokens=50]]")
    assert parse((await ask(server, "GET", path + query)).body) == first


async def test_compact_reader_continues_from_the_middle_of_a_run(server: Server) -> None:
    path, first = await finished(server, "[[tokens=50]]")
    for seq in range(len(first.frames)):
        written = parse((await ask(server, "GET", f"{path}?compact=1", Last_Event_ID=id_of(path, seq))).body)
        assert written.opening == id_of(path, seq)
        assert joined(first.frames[:seq] + written.frames) == joined(first.frames)
        assert written.frames[-1] == first.frames[-1]


async def test_compact_reader_gets_single_events_once_it_is_up_to_date() -> None:
    async with puppet() as upstream, serving(upstream.url) as server:
        path = await accepted(server, "hello")
        upstream.send(delta("a"), delta("b"), delta("c"))
        await eventually(lambda: stream_of(server, path).log.last_seq == 4)
        async with reading(server, f"{path}?compact=1") as client:
            await client.read_until(lambda client: len(client.written.frames) == 2)
            assert [item.seq for item in client.written.frames] == [1, 4]
            for number in (5, 6):
                upstream.send(delta(str(number)))
                await client.read_until(lambda client: client.written.frames[-1].seq == number)  # noqa: B023 - awaited
            upstream.complete()
            await client.read_to_end()
            assert [item.seq for item in client.written.frames] == [1, 4, 5, 6, 7, 8]
