"""POST /api/chat: what is refused and how, what a good request becomes, and how its answer begins."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import socket
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from conftest import Server, eventually, prompt, serving
from raw import Answer, connected, request

from aisse.simulator import Script, Simulator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

TOKEN = "a-token-of-some-length.1"
ALLOWED = "https://app.example"
MESSAGES = '"messages":[{"role":"user","content":"hello"}]'


def body(**parameters: Any) -> bytes:
    return json.dumps(prompt("hello", **parameters)).encode()


def raw_body(members: str) -> bytes:
    """A body whose last members are given as they stand, for what no encoder writes."""
    return f"{{{MESSAGES},{members}}}".encode()


def refused(answer: Answer, status: int, named: str) -> dict[str, Any]:
    """Asserts that `answer` is the one shape of a refusal and names `named`; returns its error."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"].startswith("application/json")
    assert b"Traceback" not in answer.body
    said: dict[str, Any] = answer.json()
    assert said.keys() == {"type", "error"}
    assert said["type"] == "error"
    error: dict[str, Any] = said["error"]
    assert error.keys() == {"type", "message", "field"}
    assert error["field"] == named
    assert error["message"].startswith(f"{named}: ")
    assert re.fullmatch(r"[a-z_]+", error["type"])
    assert len(answer.body) < 1000
    return error


def untouched(server: Server, simulator: Simulator) -> None:
    """Asserts that no generation was started, neither here nor at the upstream."""
    assert simulator.stats.requests == 0
    assert server.registry.generations == 0
    assert server.registry.figures.failed == 0
    assert server.registry.active_streams == 0
    assert server.registry.replay_bytes == 0


async def post(server: Server, data: bytes, **headers: str | None) -> Answer:
    """One POST on a connection of its own, which must be in order afterwards."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", data, names))
        answer = await connection.answer()
        assert await connection.usable()
    return answer


async def test_prompt_is_answered_with_the_stream(server: Server, client: aiohttp.ClientSession) -> None:
    async with client.post(server.chat, json=prompt("[[tokens=3]]")) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        body = await response.text()
    assert body.endswith("\n\n")
    assert body.count("event: end\n") == 1


# --- bodies that are refused ----------------------------------------------------------------------------------

NO_JSON = {
    "empty": b"",
    "blank": b" \n",
    "word": b"hello",
    "half": b'{"messages":[{"role":"user","con',
    "trailing": body() + b"x",
    "two": body() + body(),
    "single quotes": b"{'messages':[]}",
    "comment": b"{/**/" + body()[1:],
    "bare name": b'{messages:[{"role":"user","content":"hello"}]}',
    "NUL": b"\x00" * 100,
    "not UTF-8": b"\xff\xfe\xfd",
    "not UTF-8 in a string": body().replace(b"hello", b"caf\xe9"),
    "overlong UTF-8 in a string": body().replace(b"hello", b"\xc0\xaf"),
    "surrogate in UTF-8": body().replace(b"hello", b"\xed\xa0\x80"),
    "UTF-16": body().decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + body(),
    "lone surrogate, high": body().replace(b"hello", b"\\ud800"),
    "lone surrogate, low": body().replace(b"hello", b"\\udc00"),
    "lone surrogate, nested": raw_body(r'"tools":[{"name":"\ud83d"}]'),
    "raw line end in a string": body().replace(b"hello", b"a\nb"),
    "braces, 100,000": b'{"tools":' + b'{"a":' * 100_000,
    "brackets, 100,000, closed": raw_body('"tools":[{"a":' + "[" * 100_000 + "]" * 100_000 + "}]"),
    "control character in a name": raw_body('"metadata":{"a\x01":1}'),
    "escape that is none": raw_body(r'"metadata":{"a":"\x"}'),
    "number with a zero in front": raw_body('"metadata":{"a":01}'),
    "number without an end": raw_body('"metadata":{"a":1.}'),
    "comma too many": raw_body('"metadata":{"a":[1,]}'),
    "bracket of another kind": raw_body('"metadata":{"a":[1}}'),
    "form": b"messages=hello",
}


@pytest.mark.parametrize("data", NO_JSON.values(), ids=NO_JSON.keys())
async def test_body_that_is_no_json_is_refused(server: Server, simulator: Simulator, data: bytes) -> None:
    error = refused(await post(server, data), 400, "body")
    assert error["type"] == "invalid_request_error"
    assert "hello" not in error["message"]
    untouched(server, simulator)


@pytest.mark.parametrize("data", [b"[]", b"null", b"true", b'"hello"', b"1", b"[" + body() + b"]", b"[" * 100_000])
async def test_body_that_is_no_object_is_refused(server: Server, simulator: Simulator, data: bytes) -> None:
    refused(await post(server, data), 400, "body")
    untouched(server, simulator)


# The field that must be named, and wrong values for it.
WRONG_TEXTS: list[tuple[str, list[Any]]] = [
    ("", [5, True, {}, [], ""]),
    (".0", [["x"], [5], [[]], [None]]),
    (".2", [[{}, {}, ""]]),
]
WRONG_FIELDS: list[tuple[str, list[Any]]] = [
    ("messages", ["x", 5, True, {}, [], None]),
    ("messages.0", [["x"], [5], [None], [[]]]),
    ("messages.0.role", [[{"content": "x"}], *([{"content": "x", "role": role}] for role in ("system", "", 1, None))]),
    ("messages.0.content", [[{"role": "user"}], [{"role": "user", "content": None}]]),
    *(
        (f"messages.0.content{at}", [[{"role": "user", "content": value}] for value in values])
        for at, values in WRONG_TEXTS
    ),
    ("messages.1.role", [[{"role": "user", "content": "x"}, {"content": "x"}]]),
    ("messages.1", [[{"role": "user", "content": "x"}, 5]]),
    ("model", [5, True, [], {}, "", "a b", "../x", "a\nb", "é", "-x", "x" * 129]),
    ("max_tokens", [0, -1, 64_001, 10**30, -(10**30), True, "5", [], {}, 5.5, 5.0]),
    *((f"system{at}", values) for at, values in WRONG_TEXTS),
    ("temperature", ["1", True, [], {}, -0.1, 2.1, 1e300]),
    ("top_p", ["1", True, [], {}, -0.1, 1.1]),
    ("top_k", ["1", True, [], {}, -1, 1.5, 1.0]),
    ("stop_sequences", ["x", 5, True, {}]),
    ("stop_sequences.1", [["x", 5], ["x", True], ["x", None], ["x", []]]),
    ("thinking", ["x", 5, True, []]),
    ("tools", ["x", 5, True, {}]),
    ("tools.1", [[{}, "x"], [{}, 5], [{}, None], [{}, []]]),
    ("tool_choice", ["auto", 5, True, []]),
    ("metadata", ["x", 5, True, []]),
    ("output_config", ["x", 5, True, []]),
    ("cache_control", ["x", 5, True, []]),
    ("service_tier", [5, True, [], {}]),
    ("stream", [False, 0, 1, 1.0, "true", [], {}]),
]
WRONG = [(name, value) for name, values in WRONG_FIELDS for value in values]


@pytest.mark.parametrize(("named", "value"), WRONG, ids=[f"{name}={value!r:.40}" for name, value in WRONG])
async def test_parameter_of_wrong_type_or_range_is_named(
    server: Server, simulator: Simulator, named: str, value: Any
) -> None:
    name = named.partition(".")[0]
    error = refused(await post(server, json.dumps({**prompt("hello"), name: value}).encode()), 400, named)
    assert error["type"] == "invalid_request_error"
    untouched(server, simulator)


@pytest.mark.parametrize(
    ("member", "named"),
    [
        ('"max_tokens":' + "9" * 5000, "max_tokens"),
        ('"temperature":0.' + "9" * 5000, "temperature"),
        ('"model":"' + "x" * 5000 + '"', "model"),
        ('"messages":[{"role":"' + "x" * 5000 + '","content":"x"}]', "messages.0.role"),
    ],
)
async def test_huge_value_of_a_small_parameter_is_named(
    server: Server, simulator: Simulator, member: str, named: str
) -> None:
    refused(await post(server, raw_body(member)), 400, named)
    untouched(server, simulator)


async def test_body_without_messages_is_refused(server: Server, simulator: Simulator) -> None:
    refused(await post(server, b'{"model":"claude-sonnet-4-20250514"}'), 400, "messages")
    untouched(server, simulator)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(
    "member",
    [
        '"temperature":%s',
        '"tools":[{"name":"t","input_schema":{"maximum":%s}}]',
        '"metadata":{"a":[%s]}',
        '"system":[{"a":%s}]',
    ],
    ids=["temperature", "tools", "metadata", "system"],
)
async def test_number_that_json_does_not_have_is_refused(
    server: Server, simulator: Simulator, member: str, number: str
) -> None:
    error = refused(await post(server, raw_body(member % number)), 400, "body")
    assert re.search(r"invalid character \(byte [0-9]+\)", error["message"])
    untouched(server, simulator)


@pytest.mark.parametrize("number", ["1e400", "-1e400"])
async def test_number_too_large_for_a_float_is_refused_only_where_it_is_looked_at(
    server: Server, simulator: Simulator, number: str
) -> None:
    """Its grammar is JSON's: what is passed on unread is the upstream's to judge."""
    refused(await post(server, raw_body(f'"temperature":{number}')), 400, "temperature")
    untouched(server, simulator)
    async with recording() as upstream, serving(upstream.url) as other:
        assert (await post(other, raw_body(f'"metadata":{{"a":[ {number} ]}}'))).status == 200
    assert f'"metadata":{{"a":[ {number} ]}}'.encode() in upstream.requests[0].body


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (body(unknown=1), "unknown"),
        (body(max_token=5), "max_token"),
        (body(Model="x"), "Model"),
        (body(api_key="x"), "api_key"),
        (body(betas=["x"]), "betas"),
        (body(**{"": 1}), "body"),
        (body(mcp_servers=[]), "mcp_servers"),
        (body(container="x"), "container"),
        (body(context_management={}), "context_management"),
        (b'{"messages":[{"role":"user","content":"x","name":"me"}]}', "messages.0.name"),
        (b'{"messages":[{"role":"user","content":"x"},{"role":"user","content":"x","id":1}]}', "messages.1.id"),
    ],
)
async def test_unknown_field_is_named(server: Server, simulator: Simulator, data: bytes, named: str) -> None:
    refused(await post(server, data), 400, named)
    untouched(server, simulator)


async def test_unknown_field_with_a_hostile_name_is_shortened_and_encoded(server: Server) -> None:
    name = "\r\nevent: end\r\ndata: {}\r\n\r\n\u2028<script>" + "x" * 5000
    answer = await post(server, body(**{name: 1}))
    assert answer.status == 400
    assert answer.json()["error"]["field"] == name[:128]
    assert b"\n" not in answer.body
    assert b"\r" not in answer.body
    assert len(answer.body) < 1000


async def test_name_given_twice_is_sent_once_as_it_was_checked(client: aiohttp.ClientSession) -> None:
    """Two parsers that take different ones of the two would let the first pass what the second then acts on."""
    async with recording() as upstream, serving(upstream.url) as server:
        assert (await post(server, raw_body('"max_tokens":1,"max_tokens":64001'))).status == 400
        assert (await post(server, raw_body('"max_tokens":1,"max_token\\u0073":64001'))).status == 400
        assert upstream.requests == []
        assert (await post(server, raw_body('"max_tokens":64001,"max_tokens":7'))).status == 200
    (received,) = upstream.requests
    assert received.body.count(b"max_tokens") == 1
    assert received.json()["max_tokens"] == 7


@pytest.mark.parametrize("models", [("claude-a",), ("claude-a", "claude-b")])
async def test_model_that_is_not_offered_is_refused(simulator: Simulator, models: tuple[str, ...]) -> None:
    async with serving(simulator.url, model="claude-a", models=models) as server:
        for model in ("claude-c", "claude-A", "claude-a ", "claude-", "claude-a1"):
            refused(await post(server, body(model=model)), 400, "model")
        untouched(server, simulator)
        for model in models:
            assert (await post(server, body(model=model))).status == 200


@pytest.mark.parametrize("name", ["model", "mod\\u0065l"])
async def test_model_given_twice_is_checked_as_it_is_sent(name: str) -> None:
    async with recording() as upstream, serving(upstream.url, model="claude-a", models=("claude-a",)) as server:
        refused(await post(server, raw_body(f'"model":"claude-a","{name}":"claude-b"')), 400, "model")
        assert upstream.requests == []
        assert (await post(server, raw_body(f'"{name}":"claude-b","model":"claud\\u0065-a"'))).status == 200
    (received,) = upstream.requests
    assert received.body.count(b"claude-b") == 0
    assert received.json()["model"] == "claude-a"


@pytest.mark.parametrize(("asked", "status"), [(1, 200), (10, 200), (11, 400)])
async def test_max_tokens_is_allowed_up_to_its_limit(simulator: Simulator, asked: int, status: int) -> None:
    async with serving(simulator.url, max_tokens=5, max_tokens_limit=10) as server:
        answer = await post(server, body(max_tokens=asked))
        assert answer.status == status
        if status == 400:
            assert "10" in refused(answer, 400, "max_tokens")["message"]
            untouched(server, simulator)


# --- bodies that are too large, too slow, or not what they claim ----------------------------------------------

SMALL = 2048


def body_of(size: int) -> bytes:
    """A good body of so many bytes."""
    empty = len(json.dumps(prompt("[[tokens=1]]")))
    return json.dumps(prompt("[[tokens=1]]" + "x" * (size - empty))).encode()


def chunked(data: bytes, size: int = 1000) -> bytes:
    """A POST whose body comes in chunks: its length is known only at its end."""
    head = request("POST", "/api/chat", b"", {"Content-Length": None, "Transfer-Encoding": "chunked"})
    parts = (data[start : start + size] for start in range(0, len(data), size))
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("excess", [0, 1])
@pytest.mark.parametrize("encode", [lambda data: request("POST", "/api/chat", data), chunked], ids=["length", "chunks"])
async def test_body_is_taken_up_to_max_body_bytes(simulator: Simulator, encode: Any, excess: int) -> None:
    async with serving(simulator.url, max_body_bytes=SMALL) as server, connected(server.address) as connection:
        await connection.send(encode(body_of(SMALL + excess)))
        answer = await connection.answer()
        if excess:
            assert refused(answer, 413, "body")["type"] == "request_too_large"
            untouched(server, simulator)
        else:
            assert answer.status == 200
        assert await connection.usable()


async def test_body_declared_too_large_is_refused_before_it_is_sent(simulator: Simulator) -> None:
    async with serving(simulator.url) as server, connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", None, {**JSON, "Content-Length": str(1 << 40)}))
        refused(await connection.answer(), 413, "body")
        assert server.registry.generations == 0
        # It never comes, so the connection cannot be used again.
        assert not await connection.usable()
        untouched(server, simulator)


async def test_chunks_without_end_are_refused_at_the_limit(simulator: Simulator) -> None:
    async with serving(simulator.url, max_body_bytes=SMALL) as server, connected(server.address) as connection:
        await connection.send(chunked(b" " * (4 * SMALL))[:-5])
        refused(await connection.answer(), 413, "body")
        assert not await connection.usable()
        untouched(server, simulator)


JSON = {"Content-Type": "application/json"}


async def test_body_that_trickles_is_refused_after_body_s(simulator: Simulator) -> None:
    async with serving(simulator.url, body_s=0.3) as server, connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", None, {**JSON, "Content-Length": "1000"}))
        answering = asyncio.create_task(connection.answer())
        for byte in body_of(1000):
            await connection.send(bytes([byte]))
            if (await asyncio.wait([answering], timeout=0.05))[0]:
                break
        answer = await answering
        assert answer.headers["Connection"] == "close"
        error = refused(answer, 408, "body")
        assert error["type"] == "timeout_error"
        assert "0.3" in error["message"]
        assert not await connection.usable()
        untouched(server, simulator)


async def test_body_has_a_second_more_for_each_64_kib_that_have_come(simulator: Simulator) -> None:
    """Photos from a phone: what moves is not cut off."""
    async with serving(simulator.url, body_s=2) as server, connected(server.address) as connection:
        data = body_of(200 << 10)
        await connection.send(request("POST", "/api/chat", data)[: -(10 << 10)])
        await asyncio.sleep(2.2)
        await connection.send(data[-(10 << 10) :])
        assert (await connection.answer()).status == 200


async def test_body_within_body_s_is_taken_however_it_is_cut(simulator: Simulator) -> None:
    async with serving(simulator.url) as server, connected(server.address) as connection:
        for byte in request("POST", "/api/chat", body_of(200)):
            await connection.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await connection.answer()).status == 200


@pytest.mark.parametrize("ending", ["closed", "half-closed", "reset"])
async def test_body_that_breaks_off_starts_nothing(server: Server, simulator: Simulator, ending: str) -> None:
    async with connected(server.address) as connection:
        data = body_of(1000)
        # Valid as far as it goes: a server that took it for whole would start a generation.
        await connection.send(request("POST", "/api/chat", data, {"Content-Length": "2000"}))
        await eventually(lambda: len(server.runner.server.connections) == 1 if server.runner.server else False)
        if ending == "reset":
            connection.reset()
        elif ending == "half-closed":
            connection.writer.write_eof()
            assert await connection.rest() == b""
        else:
            connection.writer.close()
        await eventually(lambda: server.runner.server is not None and not server.runner.server.connections)
    untouched(server, simulator)


@pytest.mark.parametrize("chunk", [b"zz\r\nab\r\n", b"-1\r\n", b"5\r\nabc\r\n0\r\n\r\n", b"fffffffffffffffff\r\n"])
async def test_malformed_chunk_is_refused(server: Server, simulator: Simulator, chunk: bytes) -> None:
    async with connected(server.address) as connection:
        await connection.send(chunked(body())[:-5])
        await connection.send(chunk)
        answer = await connection.answer()
        assert answer.status == 400
        assert b"Traceback" not in answer.body
        assert await connection.rest() == b""
    untouched(server, simulator)


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", gzip.compress(body())),
        ("x-gzip", gzip.compress(body())),
        ("deflate", zlib.compress(body())),
        ("gzip, gzip", gzip.compress(gzip.compress(body()))),
        ("gzip", gzip.compress(bytes(64 << 20), 9)),
        ("gzip", b"no gzip at all"),
        ("br", body()),
        ("zstd", body()),
        ("identity, gzip", body()),
        ("aes128gcm", body()),
        ("", body()),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}",
)
async def test_compressed_body_is_refused_unread(
    server: Server, simulator: Simulator, coding: str, data: bytes
) -> None:
    refused(await post(server, data, Content_Encoding=coding), 415, "Content-Encoding")
    untouched(server, simulator)


async def test_body_declared_as_uncompressed_is_taken(server: Server) -> None:
    assert (await post(server, body(), Content_Encoding="Identity")).status == 200


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "json",
        "application/jsonp",
        "text/json",
        "application/json+x",
        "*/*",
        "text/plain; application/json",
    ],
)
async def test_other_content_type_is_refused(server: Server, simulator: Simulator, content_type: str | None) -> None:
    """What an HTML form can send, too: without this any site's form could start streams."""
    refused(await post(server, body(), Content_Type=content_type), 415, "Content-Type")
    untouched(server, simulator)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json;"])
async def test_content_type_of_json_is_taken_however_written(server: Server, content_type: str) -> None:
    assert (await post(server, body(), Content_Type=content_type)).status == 200


async def test_get_without_a_body_on_the_collection_is_refused(server: Server, simulator: Simulator) -> None:
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat"))
        refused(await connection.answer(), 415, "Content-Type")
        assert await connection.usable()
    untouched(server, simulator)


# --- who may ask ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer{TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        f"Bearer {TOKEN} {TOKEN}",
        f"Bearer {TOKEN},{TOKEN}",
        f"Bearer caf\N{LATIN SMALL LETTER E WITH ACUTE}-{TOKEN}",
        f"Bearer \udcff\udcfe{TOKEN}",
        f"B\udce9arer {TOKEN}",
        "Bearer " + "x" * 7000,
    ],
    ids=lambda value: ascii(value)[:40],
)
async def test_request_without_a_valid_token_is_refused(simulator: Simulator, authorization: str | None) -> None:
    async with serving(simulator.url, access_tokens=("another-token-entirely", TOKEN)) as server:
        answer = await post(server, body(), Authorization=authorization)
        error = refused(answer, 401, "Authorization")
        assert error["type"] == "authentication_error"
        assert TOKEN not in error["message"]
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        untouched(server, simulator)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
async def test_request_with_a_valid_token_is_answered(simulator: Simulator, scheme: str) -> None:
    async with serving(simulator.url, access_tokens=("another-token-entirely", TOKEN)) as server:
        assert (await post(server, body(), Authorization=f"{scheme} {TOKEN}")).status == 200


async def test_token_is_asked_for_before_the_body_is_looked_at(simulator: Simulator) -> None:
    """Who may not ask learns nothing of what would be allowed, and has nothing read for him."""
    async with serving(simulator.url, access_tokens=(TOKEN,)) as server:
        refused(await post(server, b"not json"), 401, "Authorization")
        refused(await post(server, body(), Content_Type="text/plain"), 401, "Authorization")


async def test_token_in_the_query_is_not_taken(simulator: Simulator) -> None:
    async with serving(simulator.url, access_tokens=(TOKEN,)) as server, connected(server.address) as connection:
        await connection.send(request("POST", f"/api/chat?access_token={TOKEN}&token={TOKEN}", body()))
        refused(await connection.answer(), 401, "Authorization")
        untouched(server, simulator)


LOOK_ALIKES = [
    "null",
    "",
    "https://app.example.evil.example",
    "https://evil-app.example",
    "https://sub.app.example",
    "http://app.example",
    "https://app.example:8443",
    "https://app.example/",
    "https://app.exampl",
    "HTTPS://APP.EXAMPLE",
    "https://app.example, https://evil.example",
    "https://app.example@evil.example",
    "https://evil.example#https://app.example",
    "//app.example",
    "app.example",
    "*",
    "file://",
    "https://app.ex\N{CYRILLIC SMALL LETTER A}mple",
]


@pytest.mark.parametrize("origin", LOOK_ALIKES)
@pytest.mark.parametrize("host", ["our.example:3000", None, ""], ids=["host", "no host", "empty host"])
async def test_request_of_a_foreign_origin_is_refused(simulator: Simulator, origin: str, host: str | None) -> None:
    async with serving(simulator.url, cors_origins=(ALLOWED,)) as server, connected(server.address) as connection:
        await connection.send(
            request("POST", "/api/chat", body(), {"Host": host, "Origin": origin}, version="HTTP/1.0")
        )
        answer = await connection.answer()
        assert refused(answer, 403, "Origin")["type"] == "permission_error"
        assert "Access-Control-Allow-Origin" not in answer.headers
        untouched(server, simulator)


@pytest.mark.parametrize(
    "origin",
    [
        "http://our.example",
        "http://our.example:3001",
        "http://our.example:3000.evil.example",
        "http://xour.example:3000",
        "http://our.example:3000/",
        "http://our.example:3000:3000",
        "null",
    ],
)
async def test_request_of_an_origin_like_our_own_is_refused(server: Server, simulator: Simulator, origin: str) -> None:
    refused(await post(server, body(), Host="our.example:3000", Origin=origin), 403, "Origin")
    untouched(server, simulator)


@pytest.mark.parametrize("origin", ["http://our.example:3000", "https://our.example:3000", None])
async def test_request_of_our_own_page_or_of_no_page_is_answered(simulator: Simulator, origin: str | None) -> None:
    """TLS may end in a proxy, so the scheme is not ours to see."""
    async with serving(simulator.url, open=True) as server:
        answer = await post(server, body(), Host="our.example:3000", Origin=origin)
    assert answer.status == 200
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("origin", ["null", "", "http://", "https://", "file://", "//"])
@pytest.mark.parametrize("host", [None, ""], ids=["no host", "empty host"])
async def test_page_without_a_host_is_none_of_ours_where_no_host_is_named(
    simulator: Simulator, origin: str, host: str | None
) -> None:
    """Also where everybody may ask: any page can make its origin `null`."""
    async with serving(simulator.url, open=True) as server, connected(server.address) as connection:
        fields = {"Host": host, "Origin": origin}
        await connection.send(request("POST", "/api/chat", body(), fields, version="HTTP/1.0"))
        refused(await connection.answer(), 403, "Origin")
        untouched(server, simulator)


@pytest.mark.parametrize("host", ["localhost:3000", "127.0.0.1:3000", "[::1]:3000", "127.0.0.1"])
async def test_request_of_a_page_of_this_machine_is_answered(server: Server, host: str) -> None:
    assert (await post(server, body(), Host=host, Origin=f"http://{host}")).status == 200


@pytest.mark.parametrize("host", ["evil.example:3000", "localhost.evil.example", "127.0.0.1.evil.example:3000"])
async def test_page_whose_name_leads_to_this_machine_is_refused(
    server: Server, simulator: Simulator, host: str
) -> None:
    """DNS rebinding: any site can have its name resolve to 127.0.0.1, and then is its own origin here."""
    refused(await post(server, body(), Host=host, Origin=f"http://{host}"), 403, "Origin")
    untouched(server, simulator)


# --- pages of other sites -------------------------------------------------------------------------------------

EXPOSED = {"Content-Location", "Location", "Retry-After", "Aisse-Heartbeat"}


def listed(answer: Answer, name: str) -> set[str]:
    return {part.strip() for value in answer.headers.getall(name, []) for part in value.split(",")}


@pytest.mark.parametrize(
    ("data", "status"),
    [(body(), 200), (b"no", 400), (body(messages=[{"role": "user", "content": "[[status=429]]"}]), 429)],
    ids=["stream", "refused by us", "refused upstream"],
)
async def test_answer_can_be_read_by_a_page_of_an_allowed_origin(
    simulator: Simulator, data: bytes, status: int
) -> None:
    async with serving(simulator.url, cors_origins=("https://other.example", ALLOWED)) as server:
        answer = await post(server, data, Origin=ALLOWED)
        assert answer.status == status
        assert answer.headers.getall("Access-Control-Allow-Origin") == [ALLOWED]
        assert listed(answer, "Access-Control-Expose-Headers") >= EXPOSED
        assert "Origin" in listed(answer, "Vary")
        # Tokens travel in a header of their own; cookies have no business here.
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("origin", [None, "https://evil.example"])
async def test_answer_to_others_still_says_that_it_depends_on_the_origin(
    simulator: Simulator, origin: str | None
) -> None:
    """Else a cache could hand the answer for one origin to another."""
    async with serving(simulator.url, cors_origins=(ALLOWED,)) as server:
        answer = await post(server, body(), Origin=origin)
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "Origin" in listed(answer, "Vary")


async def test_preflight_of_an_allowed_origin_allows_what_clients_send(simulator: Simulator) -> None:
    async with serving(simulator.url, cors_origins=(ALLOWED,), access_tokens=(TOKEN,)) as server:
        for path in ("/api/chat", "/api/chat/AAAAAAAAAAAAAAAAAAAAAA", f"/api/chat/{'A' * 22}/stop"):
            answer = await preflight(server, path, ALLOWED)
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == ALLOWED
            assert listed(answer, "Access-Control-Allow-Methods") >= {"GET", "POST", "DELETE"}
            assert {name.lower() for name in listed(answer, "Access-Control-Allow-Headers")} >= {
                *("authorization", "content-type", "last-event-id", "idempotency-key", "prefer", "aisse-on-leave"),
                *("accept", "cache-control", "anthropic-beta"),
            }
            assert "Origin" in listed(answer, "Vary")
        untouched(server, simulator)


@pytest.mark.parametrize("cors_origins", [(), (ALLOWED,)])
async def test_preflight_of_another_origin_allows_nothing(simulator: Simulator, cors_origins: tuple[str, ...]) -> None:
    async with serving(simulator.url, cors_origins=cors_origins) as server:
        answer = await preflight(server, "/api/chat", "https://evil.example")
        assert "Access-Control-Allow-Origin" not in answer.headers


async def preflight(server: Server, path: str, origin: str) -> Answer:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    async with connected(server.address) as connection:
        await connection.send(request("OPTIONS", path, None, headers))
        return await connection.answer()


# --- what a good request becomes ------------------------------------------------------------------------------


@dataclass
class Received:
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Recorder:
    """An upstream that keeps what it was asked, and answers with one token."""

    url: str = ""
    requests: list[Received] = field(default_factory=list)


@contextlib.asynccontextmanager
async def recording() -> AsyncIterator[Recorder]:
    recorder = Recorder()
    answer = b"".join(frame for _, frame in Script(tokens=1, pace=0).frames())

    async def messages(request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        recorder.requests.append(Received(headers, await request.read()))
        return web.Response(body=answer, content_type="text/event-stream")

    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/messages", messages)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        recorder.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield recorder
    finally:
        await runner.cleanup()


TEXT = (
    "naïve 日本語 \N{BRAIN} \N{WOMAN}\u200d\N{GIRL} \u2028\u2029 \u0000\u001f\u007f \\u0041 </script>"
    " \r\n\r\nevent: end\r\ndata: {} \ufeff\uffff"
)
SCHEMA = {
    "zeta": 1,
    "alpha": [True, None, {"größe": {"$ref": "#/$defs/日本"}}, [], {}, [[[]]]],
    "exact": [0, -1, 2**53 + 1, 10**40, 0.1, 1e-7, -0.0, 5e-324, 1.7976931348623157e308],
    "": "",
    TEXT: TEXT,
}
PARAMETERS: dict[str, Any] = {
    "model": "claude-3.5:latest/x@1",
    "max_tokens": 64_000,
    "system": [{"type": "text", "text": TEXT, "cache_control": {"type": "ephemeral"}}],
    "temperature": 0.7,
    "top_p": 0.95,
    "top_k": 40,
    "stop_sequences": ["\n\nHuman:", TEXT, ""],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "tools": [{"name": "first", "input_schema": SCHEMA}, {"name": "second"}],
    "tool_choice": {"type": "tool", "name": "first", "disable_parallel_tool_use": True},
    "metadata": {"user_id": "x"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    "cache_control": {"type": "ephemeral", "ttl": "1h"},
    "service_tier": "auto",
    "stream": True,
}
CONVERSATION = [
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "first", "input": SCHEMA}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text"}]}]},
]


@pytest.mark.parametrize("ascii_only", [True, False])
async def test_every_allowed_parameter_reaches_the_upstream_unchanged(ascii_only: bool) -> None:
    asked = {"messages": CONVERSATION, **PARAMETERS}
    async with recording() as upstream, serving(upstream.url) as server:
        answer = await post(server, json.dumps(asked, ensure_ascii=ascii_only).encode())
        assert answer.status == 200, answer.body
    (received,) = upstream.requests
    sent = received.json()
    assert sent.keys() == asked.keys()
    for name, value in asked.items():
        # As text: order within objects counts (prompt caches compare prefixes), and so does 1 against 1.0.
        assert json.dumps(sent[name]) == json.dumps(value), name


@pytest.mark.parametrize(("name", "value"), PARAMETERS.items(), ids=PARAMETERS.keys())
async def test_absent_parameters_get_defaults_or_stay_absent(name: str, value: Any) -> None:
    defaults = {"model": "some-model", "max_tokens": 77, "stream": True}
    async with recording() as upstream, serving(upstream.url, model="some-model", max_tokens=77) as server:
        assert (await post(server, body())).status == 200
        assert (await post(server, body(**{name: value}))).status == 200
    plain, given = (received.json() for received in upstream.requests)
    assert plain == {"messages": [{"role": "user", "content": "hello"}], **defaults}
    assert given == {**plain, name: value}


@pytest.mark.parametrize("name", PARAMETERS)
async def test_parameter_that_is_null_counts_as_absent(name: str) -> None:
    async with recording() as upstream, serving(upstream.url) as server:
        assert (await post(server, body())).status == 200
        assert (await post(server, body(**{name: None}))).status == 200
    plain, given = upstream.requests
    assert plain.body == given.body


async def test_null_within_a_tool_is_no_absence() -> None:
    async with recording() as upstream, serving(upstream.url) as server:
        assert (await post(server, body(tools=[{"a": None}]))).status == 200
    assert upstream.requests[0].json()["tools"] == [{"a": None}]


async def test_headers_of_the_client_do_not_reach_the_upstream() -> None:
    async with recording() as upstream, serving(upstream.url, access_tokens=(TOKEN,)) as server:
        answer = await post(
            server,
            body(),
            Authorization=f"Bearer {TOKEN}",
            Cookie="session=canary",
            x_api_key="canary",
            anthropic_version="canary",
            X_Forwarded_For="canary",
            User_Agent="canary",
            Accept_Encoding="gzip",
        )
        assert answer.status == 200
    (received,) = upstream.requests
    assert "canary" not in str(received.headers)
    assert TOKEN not in str(received.headers)
    assert received.headers["anthropic-version"] == "2023-06-01"
    assert received.headers["content-type"] == "application/json"
    assert received.headers["accept-encoding"] == "identity"
    assert received.headers.keys().isdisjoint({"authorization", "cookie", "x-api-key", "anthropic-beta"})


@pytest.mark.parametrize("value", [{"type": "adaptive"}, {"type": "enabled", "budget_tokens": 9, "display": "omitted"}])
async def test_thinking_of_any_kind_is_passed_on(value: Any) -> None:
    async with recording() as upstream, serving(upstream.url) as server:
        assert (await post(server, body(thinking=value))).status == 200
    assert upstream.requests[0].json()["thinking"] == value


async def test_values_are_sent_as_they_were_written() -> None:
    """Prompt caches compare bytes, and nothing is rounded."""
    messages = (
        '[ { "content" : "caf\\u00e9 \\/ \N{BRAIN}","role":"us\\u0065r" },\n{"role":"assistant","content":[ { } ]}]'
    )
    schema = '[{"b":1.10,"a":1E+2, "a":10000000000000000000001}]'
    asked = f'{{"tools": {schema} , "messages":{messages}}}'.encode()
    async with recording() as upstream, serving(upstream.url, model="m", max_tokens=7) as server:
        assert (await post(server, asked)).status == 200
    expected = f'{{"model":"m","max_tokens":7,"stream":true,"messages":{messages},"tools":{schema}}}'
    assert upstream.requests[0].body == expected.encode()


@pytest.mark.parametrize("size", [60_000, 70_000, 3_000_000])
async def test_long_question_arrives_whole(size: int) -> None:
    """What is sent in pieces, too."""
    text = "".join(f"{number:06}" for number in range(size // 6))
    asked = prompt("first", system=text, tools=[{"photo": text}])
    async with recording() as upstream, serving(upstream.url) as server:
        assert (await post(server, json.dumps(asked).encode())).status == 200
    sent = upstream.requests[0]
    assert {name: sent.json()[name] for name in asked} == asked
    assert sent.headers["content-length"] == str(len(sent.body))
    assert "transfer-encoding" not in sent.headers


async def test_fields_that_are_allowed_are_passed_on_as_they_are(client: aiohttp.ClientSession) -> None:
    opened = ("container", "no_such_field", "x-y.1", "max_tokens")
    async with recording() as upstream, serving(upstream.url, allow_fields=opened) as server:
        assert (await post(server, raw_body('"no_such_field":[ 1 ],"x-\\u0079.1":{},"container":null'))).status == 200
        refused(await post(server, body(mcp_servers=[])), 400, "mcp_servers")
        # What is open anyhow is checked all the same.
        refused(await post(server, body(max_tokens="5")), 400, "max_tokens")
    (received,) = upstream.requests
    assert b'"no_such_field":[ 1 ]' in received.body
    assert received.json()["x-y.1"] == {}
    assert "container" not in received.json()


BETAS = ("context-1m-2025-08-07", "files-api-2025-04-14")


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ([], None),
        ([""], None),
        ([BETAS[0]], BETAS[0]),
        ([f" {BETAS[1]} ,, {BETAS[0]}"], f"{BETAS[1]},{BETAS[0]}"),
        ([BETAS[0], BETAS[1], BETAS[0]], ",".join(BETAS)),
    ],
)
async def test_betas_that_are_allowed_reach_the_upstream(fields: list[str], sent: str | None) -> None:
    async with recording() as upstream, serving(upstream.url, allow_betas=BETAS) as server:
        assert (await post_with_betas(server, fields)).status == 200
    assert upstream.requests[0].headers.get("anthropic-beta") == sent


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["other-2025-01-01"], "other-2025-01-01"),
        ([BETAS[0].upper()], BETAS[0].upper()),
        ([f"{BETAS[0]},other"], "other"),
        ([BETAS[0], "other"], "other"),
        ([f"{BETAS[0]} {BETAS[1]}"], "one of its values"),
        (["x" * 200], "one of its values"),
    ],
)
async def test_beta_that_is_not_allowed_is_refused_and_named(
    simulator: Simulator, fields: list[str], said: str
) -> None:
    """To drop it would change what was asked without a word."""
    async with serving(simulator.url, allow_betas=BETAS) as server:
        error = refused(await post_with_betas(server, fields), 400, "anthropic-beta")
        assert error["message"] == f"anthropic-beta: {said} is not allowed here"
        untouched(server, simulator)


async def test_no_beta_is_allowed_by_default(server: Server, simulator: Simulator) -> None:
    refused(await post_with_betas(server, [BETAS[0]]), 400, "anthropic-beta")
    untouched(server, simulator)


async def test_key_with_other_betas_is_another_request(simulator: Simulator) -> None:
    async with serving(simulator.url, allow_betas=BETAS) as server:
        first = await post_with_betas(server, [BETAS[0]], "Idempotency-Key: k")
        again = await post_with_betas(server, [f" {BETAS[0]}"], "Idempotency-Key: k")
        assert first.headers["Content-Location"] == again.headers["Content-Location"]
        assert (await post_with_betas(server, [], "Idempotency-Key: k")).status == 422
        assert (await post_with_betas(server, [BETAS[1]], "Idempotency-Key: k")).status == 422
    assert simulator.stats.requests == 1


async def post_with_betas(server: Server, fields: list[str], *more: str) -> Answer:
    head, _, rest = request("POST", "/api/chat", body()).partition(b"\r\n")
    lines = [head, *(b"anthropic-beta: " + value.encode() for value in fields), *(line.encode() for line in more), rest]
    async with connected(server.address) as connection:
        await connection.send(b"\r\n".join(lines))
        return await connection.answer()


# --- how the answer begins and ends ---------------------------------------------------------------------------

STREAM = re.compile(r"/api/chat/([A-Za-z0-9_-]{22})")


async def test_answer_names_its_stream_and_asks_not_to_be_buffered(server: Server) -> None:
    answer = await post(server, body())
    headers = answer.headers
    found = STREAM.fullmatch(headers["Content-Location"])
    assert found is not None
    assert headers["Content-Type"] == "text/event-stream"
    assert {part.strip() for part in headers["Cache-Control"].split(",")} == {"no-cache", "no-transform"}
    assert headers["X-Accel-Buffering"] == "no"
    assert headers["Aisse-Heartbeat"] == "15"
    assert "Content-Length" not in headers
    assert "Content-Encoding" not in headers
    assert answer.body.startswith(b"retry: 2000\nid: %b.0\n" % found[1].encode())
    # Each line of ids belongs to the same stream, and none is missing.
    ids = re.findall(rb"^id: (\S+)$", answer.body, re.MULTILINE)
    assert ids == [b"%b.%d" % (found[1].encode(), seq) for seq in range(len(ids))]


async def test_streams_get_ids_of_their_own(server: Server) -> None:
    locations = {(await post(server, body())).headers["Content-Location"] for _ in range(20)}
    assert len(locations) == 20


async def test_headers_and_opening_leave_in_one_segment(simulator: Simulator) -> None:
    """Firefox gives up for good on a response that breaks between the two."""
    async with serving(simulator.url, first_byte_commit_s=0, leave_s=0) as server:
        data = request("POST", "/api/chat", json.dumps(prompt("[[first_s=3600]]")).encode())

        def first_segment() -> bytes:
            with socket.create_connection(server.address, timeout=60) as sock:
                sock.sendall(data)
                return sock.recv(65536)

        for _ in range(20):
            head, _, begun = (await asyncio.to_thread(first_segment)).partition(b"\r\n\r\n")
            found = STREAM.search(head.decode())
            assert found is not None
            # One chunk, with both lines and no blank line after them.
            opening = b"retry: 2000\nid: %b.0\n" % found[1].encode()
            assert begun == b"%x\r\n%b\r\n" % (len(opening), opening)


async def test_each_chunk_of_the_body_is_whole_frames(server: Server) -> None:
    """A proxy or a client that acts on what has arrived never sees half an event because of us."""
    answer = await post(server, json.dumps(prompt("[[tokens=50 pace=2000 split=7]]")).encode())
    assert answer.chunks is not None
    assert len(answer.chunks) > 10
    assert all(chunk.endswith(b"\n\n") for chunk in answer.chunks)


@pytest.mark.parametrize("asked", [None, "close", "keep-alive", "Keep-Alive, Upgrade"])
async def test_stream_never_says_that_its_connection_closes(server: Server, asked: str | None) -> None:
    """Node 20's fetch takes a cut body for a clean end where the response says so."""
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", body(), {"Connection": asked}))
        answer = await connection.answer()
    assert answer.chunks is not None
    assert "close" not in answer.headers.get("Connection", "").lower()
    assert b"event: end\n" in answer.body


@pytest.mark.parametrize("asked", [None, "close", "keep-alive"])
async def test_http_1_0_client_gets_the_stream_up_to_the_end_of_the_connection(
    server: Server, asked: str | None
) -> None:
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", body(), {"Connection": asked}, version="HTTP/1.0"))
        answer = await connection.answer()
    assert answer.status == 200
    assert answer.chunks is None
    assert "Transfer-Encoding" not in answer.headers
    assert "keep-alive" not in answer.headers.get("Connection", "").lower()  # it would wait for a length or a chunk
    assert answer.body.startswith(b"retry: 2000\nid: ")
    assert answer.body.count(b"event: end\n") == 1
    assert answer.body.endswith(b"\n\n")


LONG_BODY = json.dumps(prompt("[[tokens=10000 pace=20]]")).encode()


@pytest.mark.parametrize("how", ["part", "evict"])
async def test_http_1_0_client_is_reset_where_the_stream_is_cut(server: Server, how: str) -> None:
    """An end in order would be the body's: nothing else tells it there."""
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", LONG_BODY, version="HTTP/1.0"))
        assert (await connection.head()).status == 200
        await connection.reader.readuntil(b"event: content_block_delta")
        (reader,) = server.registry.attached()
        getattr(reader, how)()
        with pytest.raises(ConnectionResetError):
            await connection.rest()


async def test_http_1_0_client_is_reset_where_it_is_turned_away(server: Server) -> None:
    server.registry.draining = True
    headers = {"Accept": "text/event-stream", "Connection": "keep-alive"}
    async with connected(server.address) as connection:
        await connection.send(request("GET", f"/api/chat/{'s' * 22}", headers=headers, version="HTTP/1.0"))
        answer = await connection.head()
        assert answer.status == 200
        assert "Connection" not in answer.headers
        with pytest.raises(ConnectionResetError):
            await connection.rest()


@pytest.mark.parametrize("asked", [None, "close", "keep-alive"])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/", 200),
        ("HEAD", "/aisse.js", 200),
        ("GET", "/nowhere", 404),
        ("POST", "/api/chat", 400),
        ("POST", "/api/chat", 202),
        ("DELETE", f"/api/chat/{'s' * 22}", 404),
    ],
)
async def test_http_1_0_answer_of_known_length_keeps_the_connection_where_that_was_asked(
    server: Server, method: str, path: str, status: int, asked: str | None
) -> None:
    data = None if method != "POST" else body() if status == 202 else b"{}"
    headers = {"Connection": asked, "Prefer": "respond-async" if status == 202 else None}
    async with connected(server.address) as connection:
        for _ in range(2 if asked == "keep-alive" else 1):
            await connection.send(request(method, path, data, headers, version="HTTP/1.0"))
            answer = await connection.answer(method)
            assert answer.status == status
            assert "Content-Length" in answer.headers
            assert answer.headers.get("Connection") == ("keep-alive" if asked == "keep-alive" else None)
        if asked != "keep-alive":
            assert await connection.rest() == b""


async def test_connection_serves_one_stream_after_another(server: Server, simulator: Simulator) -> None:
    async with connected(server.address) as connection:
        for count in range(1, 4):
            await connection.send(request("POST", "/api/chat", body()))
            assert (await connection.answer()).body.count(b"event: end\n") == 1
            assert simulator.stats.requests == count


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"])
async def test_other_method_is_refused_with_those_allowed(server: Server, simulator: Simulator, method: str) -> None:
    async with connected(server.address) as connection:
        await connection.send(request(method, "/api/chat"))
        answer = await connection.answer(method)
        assert answer.status == 405
        assert "POST" in listed(answer, "Allow")
        assert answer.headers["Content-Type"].startswith("application/json")
        if method == "HEAD":
            assert answer.body == b""
        else:
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert await connection.usable()
    untouched(server, simulator)


@pytest.mark.parametrize(
    "path",
    [
        "/api",
        "/api/",
        "/api/chats",
        "/api/chat/",
        "/api//chat",
        "/API/chat",
        "/api/chat%00",
        "/api/chat/a/b/c",
        "/nowhere?secret=canary",
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/<script>",
        "/%ff",
    ],
)
async def test_unknown_path_is_refused_as_json(server: Server, simulator: Simulator, path: str) -> None:
    async with connected(server.address) as connection:
        await connection.send(request("POST", path, body()))
        answer = await connection.answer()
        assert answer.status == 404
        assert answer.headers["Content-Type"].startswith("application/json")
        assert answer.json()["error"]["type"] == "not_found_error"
        assert b"canary" not in answer.body
        assert b"script" not in answer.body
        assert await connection.usable()
    untouched(server, simulator)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03canary\r\n\r\n",
        b"canary\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: a\r\ncanary\r\n\r\n",
        b"POST /api/chat HTTP/9.9\r\nHost: a\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
    ids=["tls", "word", "header", "version", "length", "smuggling", "long header"],
)
async def test_malformed_http_is_refused_without_a_traceback(server: Server, simulator: Simulator, data: bytes) -> None:
    async with connected(server.address) as connection:
        await connection.send(data)
        answer = await connection.answer()
        assert 400 <= answer.status < 500 or answer.status == 505
        assert b"Traceback" not in answer.body
        assert await connection.rest() == b""
    untouched(server, simulator)


# --- headers that have a grammar ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "accepted"),
    [
        (["respond-async"], True),
        (["wait=10, Respond-Async"], True),
        (["respond-async;foo=bar"], True),
        (["wait=10", "respond-async"], True),
        (["respond-asynchronously"], False),
        (["handling=lenient"], False),
    ],
)
async def test_preference_for_an_answer_at_once_is_found_in_every_field(
    server: Server, fields: list[str], accepted: bool
) -> None:
    body = json.dumps(prompt("[[tokens=2]]")).encode()
    lines = request("POST", "/api/chat", body)
    head, _, rest = lines.partition(b"\r\n")
    async with connected(server.address) as connection:
        await connection.send(
            b"\r\n".join([head, *(b"Prefer: " + field.encode() for field in fields)]) + b"\r\n" + rest
        )
        assert (await connection.answer()).status == (202 if accepted else 200)


@pytest.mark.parametrize(
    ("accept", "state"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/json, text/plain, */*", True),
        ("text/event-stream;q=0.5, application/json", True),
        ("text/event-stream;q=0, application/json", True),
        ("", False),
        ("*/*", False),
        ("text/event-stream", False),
        ("text/event-stream, application/json", False),
        ("text/event-stream, application/json;q=0.9", False),
        ("application/json;q=0, */*", False),
        ("application/json;q=0.5, */*", False),
        ("application/json;q=much", False),
        ("application/json-patch+json", False),
        (";;,,q=", False),
    ],
)
async def test_accept_decides_between_the_stream_and_its_state(server: Server, accept: str, state: bool) -> None:
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", json.dumps(prompt("[[tokens=2]]")).encode()))
        path = (await connection.answer()).headers["Content-Location"]
        await connection.send(request("GET", path, headers={"Accept": accept}))
        answer = await connection.answer("GET")
    assert answer.status == 200
    assert answer.headers["Content-Type"].partition(";")[0] == ("application/json" if state else "text/event-stream")


async def test_every_answer_of_the_api_but_a_stream_stays_out_of_caches(server: Server) -> None:
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", json.dumps(prompt("[[tokens=2]]")).encode()))
        stream = await connection.answer()
        assert stream.headers["Cache-Control"] == "no-cache, no-transform"
        path = stream.headers["Content-Location"]
        last_id = re.findall(rb"^id: (.*)$", stream.body, re.MULTILINE)[-1].decode()
        for method, target, headers, status in (
            ("GET", path, {"Accept": "application/json"}, 200),
            ("GET", path, {"Last-Event-ID": last_id}, 204),
            ("DELETE", path, {}, 204),
            ("GET", "/api/chat/" + "A" * 22, {}, 404),
            ("GET", path, {"Last-Event-ID": "no"}, 400),
        ):
            await connection.send(request(method, target, headers=headers))
            answer = await connection.answer(method)
            assert (answer.status, answer.headers["Cache-Control"]) == (status, "no-store")


@pytest.mark.parametrize("name", ["last_event_id", "lastEventId"])
async def test_cursor_in_the_query_that_is_none_is_named_as_it_was_given(server: Server, name: str) -> None:
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", json.dumps(prompt("[[tokens=2]]")).encode()))
        path = (await connection.answer()).headers["Content-Location"]
        await connection.send(request("GET", f"{path}?{name}=nothing"))
        answer = await connection.answer("GET")
    assert answer.status == 400
    assert answer.json()["error"]["field"] == name


# --- below a path ---------------------------------------------------------------------------------------------


async def answer_to(server: Server, method: str, path: str, data: bytes | None = None, **headers: str) -> Answer:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with connected(server.address) as connection:
        await connection.send(request(method, path, data, names))
        return await connection.answer(method)


BASES = ["/llm", "/a/b", "/~me/chat"]
PREFIXES = [(base, prefix) for base in BASES for prefix in ("", base)]


@pytest.mark.parametrize(("base", "prefix"), PREFIXES)
async def test_every_url_begins_with_base_path_and_works_with_it_and_without(
    simulator: Simulator, base: str, prefix: str
) -> None:
    """`prefix` is what the proxy has left."""
    script = json.dumps(prompt("[[tokens=3]]")).encode()
    async with serving(simulator.url, base_path=base) as server:
        accepted = await answer_to(server, "POST", f"{prefix}/api/chat", script, Prefer="respond-async")
        url = accepted.headers["Location"]
        assert re.fullmatch(rf"{base}/api/chat/[\w-]{{22}}", url)
        assert (accepted.status, accepted.json()["url"]) == (202, url)
        path = prefix + url.removeprefix(base)
        stream = await answer_to(server, "GET", path)
        last_id = re.findall(rb"^id: (.*)$", stream.body, re.MULTILINE)[-1].decode()
        state = await answer_to(server, "GET", path, Accept="application/json")
        over = await answer_to(server, "GET", path, Last_Event_ID=last_id)
        joined = await answer_to(server, "POST", f"{prefix}/api/chat", script, Last_Event_ID=f"{last_id[:22]}.1")
        stopped = await answer_to(server, "DELETE", path)
        alias = await answer_to(server, "POST", f"{path}/stop")
        asked = await answer_to(server, "POST", f"{prefix}/api/chat", script)
        server.registry.draining = True
        late = await answer_to(server, "GET", f"{path}?last_event_id={last_id[:22]}.1")
    statuses = [it.status for it in (stream, state, over, joined, stopped, alias, asked, late)]
    assert statuses == [200, 200, 204, 200, 204, 204, 200, 200]
    assert {it.headers["Content-Location"] for it in (accepted, stream, state, over, joined, stopped, alias)} == {url}
    assert late.headers["Content-Location"] == url
    assert asked.headers["Content-Location"].startswith(f"{base}/api/chat/")
    assert {it.headers["Cache-Control"] for it in (accepted, state, over, stopped, alias)} == {"no-store"}
    assert simulator.stats.requests == 2


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_reader_of_a_stream_that_is_elsewhere_is_told_its_url_below_base_path(
    simulator: Simulator, prefix: str
) -> None:
    stream = "A" * 22
    async with serving(simulator.url, base_path="/llm") as server, connected(server.address) as connection:
        server.registry.draining = True
        await connection.send(request("GET", f"{prefix}/api/chat/{stream}"))
        head = await connection.head()
    assert (head.status, head.headers["Content-Location"]) == (200, f"/llm/api/chat/{stream}")


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_refusal_is_the_same_with_base_path_and_without(simulator: Simulator, prefix: str) -> None:
    async with serving(simulator.url, base_path="/llm", cors_origins=(ALLOWED,)) as server:
        for method, path, status in (
            ("POST", "/api/chat", 415),
            ("PUT", "/api/chat", 405),
            ("GET", f"/api/chat/{'A' * 22}", 404),
            ("GET", "/api/nothing", 404),
        ):
            answer = await answer_to(server, method, prefix + path, Origin=ALLOWED)
            assert (answer.status, answer.json()["type"]) == (status, "error")
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Access-Control-Allow-Origin"] == ALLOWED
            assert ("Allow" in answer.headers) == (status == 405)
        for path in ("/api/chat", f"/api/chat/{'A' * 22}", f"/api/chat/{'A' * 22}/stop"):
            allowed = await preflight(server, prefix + path, ALLOWED)
            assert (allowed.status, allowed.headers["Access-Control-Allow-Origin"]) == (204, ALLOWED)
        server.registry.draining = True
        refusal = await answer_to(server, "POST", f"{prefix}/api/chat", body())
        assert (refusal.status, refusal.headers["Connection"]) == (503, "close")
        assert "Connection" not in (await answer_to(server, "GET", f"{prefix}/health/live")).headers


@pytest.mark.parametrize(
    "path", ["/llm", "/llm/", "/llm/api/chat", "/other/api/chat", "/llm/llm/api/chat", "/llmapi/chat"]
)
@pytest.mark.parametrize("base", ["", "/other/llm"])
async def test_path_below_another_base_is_unknown(simulator: Simulator, base: str, path: str) -> None:
    async with serving(simulator.url, base_path=base) as server:
        assert (await answer_to(server, "POST", path, body())).status == 404
        untouched(server, simulator)
