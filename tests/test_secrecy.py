"""What may leave the server: an upstream's words only cleaned and encoded, and nothing private into the log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from conftest import eventually, prompt, serving
from httpx_sse._decoders import SSEDecoder
from rawupstream import (
    LAST_CHUNK,
    Connection,
    Request,
    chunk,
    delta,
    event,
    head,
    message_start,
    raw_upstream,
)

from aisse.simulator import Script, Simulator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    import aiohttp

KEY = "Canary.Key/5f0e7d~with+odd=signs"
PROMPT = "canary-prompt-93ab"
COMPLETION = "cNry7z"  # short enough for one delta of the simulator
QUERY = "canary-query-c2d1"
TOKEN = "canary-token-of-a-client-77e0"
UPSTREAM_TEXT = "canary-upstream-text-1b8c"
CANARIES = (KEY, PROMPT, COMPLETION, QUERY, TOKEN, UPSTREAM_TEXT)

# --- text from upstream errors: what it can forge -------------------------------------------------------------

FORGERIES = [
    'x\n\nevent: end\ndata: {"type":"end","reason":"complete"}\n\n',
    "x\r\n\r\nevent: message_stop\r\ndata: {}\r\n\r\n",
    "x\r\revent: forged\rdata: {}\r\r",
    "x\u2028\u2028event: forged\u2028data: {}\u2028\u2028",
    "x\u2029event: forged\u2029data: {}",
    "x\x85\x85event: forged\x85data: {}",
    "x\x0b\x0cevent: forged\x1c\x1d\x1edata: {}",
    "x\x00\x00id: forged.1\x00",
    "\ud800 lone \udfff surrogates \n\nevent: forged",
    "\ufeffevent: forged\ndata: {}",
    '"}\n\nevent: forged\ndata: {"',
    "</script><script>alert(1)</script>\n\nevent: forged\ndata: {}",
    "x" * 100_000 + "\n\nevent: forged\ndata: {}\n\n",
    "\n" * 5000,
    "\u202eevent: forged\u202c",
]


@dataclass
class Got:
    """What a client got of one answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def everything(self) -> str:
        return f"{self.headers!s}\n{self.body.decode()}"

    def events(self) -> list[tuple[str, str]]:
        """As an independent parser sees them, which splits at more than SSE's line ends: nothing may hang on it."""
        decoder = SSEDecoder()
        found = [decoder.decode(line) for line in self.body.decode().splitlines()]
        return [(sse.event, sse.data) for sse in found if sse is not None]


async def ask(client: aiohttp.ClientSession, url: str, body: Any = None, **arguments: Any) -> Got:
    body = prompt("anything") if body is None else body
    async with asyncio.timeout(60), client.post(url + "/api/chat", json=body, **arguments) as response:
        return Got(response.status, response.headers, await response.read())


def failing_with(error: bytes, how: str) -> Any:
    """An upstream that says `error`: as a status's body, as its first event, or as an event after content."""

    async def answer(request: Request, connection: Connection) -> None:
        if how == "status":
            connection.send(head("500 Oops", "application/json"), chunk(error), LAST_CHUNK)
        else:
            before = [message_start(), delta("so far")] if how == "later" else []
            connection.send(head(), *map(chunk, before), chunk(b"event: error\ndata: " + error + b"\n\n"), LAST_CHUNK)

    return answer


def assert_only_the_error(got: Got, how: str, committed: bool) -> dict[str, Any]:
    """The error object, once it is sure that there is nothing beside it."""
    if how != "later" and not committed:
        assert got.status >= 400
        assert got.headers["Content-Type"].startswith("application/json")
        found: dict[str, Any] = json.loads(got.body)
    else:
        assert got.status == 200
        before = ["message_start", "content_block_delta"] if how == "later" else []
        events = got.events()
        assert [kind for kind, _ in events] == [*before, "error", "end"]
        found = json.loads(events[-2][1])
        end = json.loads(events[-1][1])
        assert end["reason"] == "error"
        assert end["events"] == len(before) + 1
    assert got.body.isascii()
    assert found.keys() == {"type", "error"}
    assert found["error"].keys() == {"type", "message"}
    assert re.fullmatch(r"[a-z][a-z0-9_]{0,63}", found["error"]["type"])
    message = found["error"]["message"]
    assert 0 < len(message) <= 500
    assert message.isprintable()
    return found


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("how", ["status", "first", "later"])
@pytest.mark.parametrize("text", FORGERIES, ids=range(len(FORGERIES)))
async def test_text_of_an_upstream_error_forges_nothing(
    client: aiohttp.ClientSession, text: str, how: str, committed: bool
) -> None:
    error = json.dumps({"type": "error", "error": {"type": text, "message": text}}).encode()
    async with (
        raw_upstream(failing_with(error, how)) as upstream,
        serving(upstream.url, first_byte_commit_s=0 if committed else 60) as server,
    ):
        assert_only_the_error(await ask(client, server.url), how, committed)


NO_ERRORS = [
    b"",
    b"\x00not text, event: forged",
    b"\xff\xfe\x00not UTF-8",
    b"null",
    b"[]",
    b'"text"',
    b"1e999",
    b"NaN",
    b"{}",
    b'{"error": null}',
    b'{"error": "text"}',
    b'{"error": {"type": 7, "message": ["list"]}}',
    b'{"error": {"type": {"a": 1}, "message": {"b": 2}}}',
    b'{"error": {"message": ""}}',
    b'{"error": {"message": "   "}}',
    b'{"error": {"type": "", "message": null}}',
    b'{"error": {"type": "' + b"a" * 65 + b'", "message": "x"}}',
    b"[" * 30_000,
    b'{"a":' * 30_000,
    b'{"error": {"type": "api_error", "message": "' + b"\\u0000" * 5000 + b'"}}',
    b'{"error": {"message": ' + b"9" * 10_000 + b"}}",
    b"<html>\r\n\r\n<title>event: forged</title>",
]


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("how", ["status", "first", "later"])
@pytest.mark.parametrize("error", NO_ERRORS, ids=range(len(NO_ERRORS)))
async def test_error_in_no_known_shape_is_still_one_in_ours(
    client: aiohttp.ClientSession, error: bytes, how: str, committed: bool
) -> None:
    if how != "status":
        # As one event's data, however many lines that makes.
        error = b"\ndata: ".join(error.splitlines() or [b""])
    async with (
        raw_upstream(failing_with(error, how)) as upstream,
        serving(upstream.url, first_byte_commit_s=0 if committed else 60) as server,
    ):
        found = assert_only_the_error(await ask(client, server.url), how, committed)
        assert "forged" not in found["error"]["message"]


@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize(
    "lines",
    [
        'event: error\ndata: {"error": {"type": "x",\ndata: "message": "a"}}\nid: 9\nevent: error\n\n',
        'event: error\ndata: x\n\nevent: end\ndata: {"reason": "complete"}\n\n',
        "event: error\nevent: end\nevent: error\ndata\n\n",
    ],
)
async def test_nothing_follows_an_error_event_however_it_is_written(
    client: aiohttp.ClientSession, lines: str, line_end: str
) -> None:
    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(message_start() + lines.replace("\n", line_end).encode()), LAST_CHUNK)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        got = await ask(client, server.url)
        assert [kind for kind, _ in got.events()] == ["message_start", "error", "end"]
        assert json.loads(got.events()[-1][1])["reason"] == "error"


# --- text from upstream errors: what it can leak --------------------------------------------------------------

SECRETS = [
    (f"invalid x-api-key: {KEY}", [KEY]),
    (f"invalid key '{KEY}' and again {KEY}{KEY}", [KEY]),
    (KEY, [KEY]),
    ("Incorrect API key: sk-ant-api03-AbCdEf123456_-xyz.", ["sk-ant-api03-AbCdEf123456_-xyz", "AbCdEf123456"]),
    ("Incorrect API key provided: sk-proj-AbCdEf123456", ["AbCdEf123456"]),
    ("Authorization: Bearer abc.DEF-123_456~x/y==", ["abc.DEF-123_456"]),
    ("authorization: BEARER abcdef0123456789", ["abcdef0123456789"]),
    ("api_key=abcdef0123456789&x=1", ["abcdef0123456789"]),
    ("api-key: abcdef0123456789", ["abcdef0123456789"]),
    ("ezai-abcdef0123456789 is no key", ["abcdef0123456789"]),
    ("the token " + "Ab1" * 20 + " is too old", ["Ab1Ab1"]),
    ("padding " * 60 + KEY, [KEY, KEY[:12]]),
    ("p" * 490 + KEY, [KEY, KEY[:12]]),
    ("sk-ant-" + "A1b2" * 2000, ["A1b2A1b2"]),
    (KEY * 200, [KEY, KEY[:12]]),
    (f"{KEY[:9]}\x00{KEY[9:]}", [KEY]),
]


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("how", ["status", "first", "later"])
@pytest.mark.parametrize(("text", "secrets"), SECRETS, ids=range(len(SECRETS)))
async def test_text_of_an_upstream_error_leaks_no_key(
    client: aiohttp.ClientSession, text: str, secrets: list[str], how: str, committed: bool
) -> None:
    error = json.dumps({"type": "error", "error": {"type": "api_error", "message": text}}).encode()
    async with (
        raw_upstream(failing_with(error, how)) as upstream,
        serving(upstream.url, key=KEY, first_byte_commit_s=0 if committed else 60) as server,
    ):
        got = await ask(client, server.url)
        assert_only_the_error(got, how, committed)
        assert not any(secret in got.everything for secret in secrets)


@pytest.mark.parametrize("how", ["status", "first", "later"])
@pytest.mark.parametrize("key", ["all_lower_case_key_0123", "abcdefgh"])
async def test_type_of_an_upstream_error_leaks_no_key(client: aiohttp.ClientSession, key: str, how: str) -> None:
    """A key may look like the name of an error."""
    error = json.dumps({"type": "error", "error": {"type": f"error_{key}", "message": "x"}}).encode()
    async with raw_upstream(failing_with(error, how)) as upstream, serving(upstream.url, key=key) as server:
        got = await ask(client, server.url)
        assert_only_the_error(got, how, committed=False)
        assert key not in got.everything


async def test_headers_of_an_upstream_error_do_not_reach_the_client(client: aiohttp.ClientSession) -> None:
    fields = [f"{name}: {KEY}" for name in ("Retry-After", "Set-Cookie", "Location", "Server", "X-Echo", "request-id")]

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(f"429 {KEY}", "application/json", *fields, framing="2"), b"{}")

    async with raw_upstream(answer) as upstream, serving(upstream.url, key=KEY) as server:
        got = await ask(client, server.url)
        assert got.status == 429
        assert KEY not in got.everything


async def test_words_of_an_upstream_that_are_no_secret_do_reach_the_client(client: aiohttp.ClientSession) -> None:
    text = "messages.0.content: text must be at most 200000 characters (the key is fine), naïve 日本語"
    error = json.dumps({"type": "error", "error": {"type": "invalid_request_error", "message": text}}).encode()
    for how in ("status", "first", "later"):
        async with raw_upstream(failing_with(error, how)) as upstream, serving(upstream.url, key=KEY) as server:
            found = assert_only_the_error(await ask(client, server.url), how, committed=False)
            assert found["error"] == {"type": "invalid_request_error", "message": text}


# --- the log of a real process --------------------------------------------------------------------------------

# A process as `python -m aisse` starts it, with a bug: one kind of event breaks the relay, with an exception that
# quotes all that it knows.
WITH_A_BUG = f"""
from aisse.commands import cli
from aisse.formats import anthropic
observe = anthropic.AnthropicFollower.observe
def broken(self, event_type, body):
    if b"signature_delta" in body:
        raise ValueError("cannot read {PROMPT} {COMPLETION} {KEY} {QUERY} {TOKEN}")
    return observe(self, event_type, body)
anthropic.AnthropicFollower.observe = broken
cli.main()
"""


@dataclass
class Process:
    """A server in a process of its own, everything that it writes kept in a file."""

    url: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def lines(self) -> list[dict[str, Any]]:
        """The log; a line that is no JSON, such as a traceback, fails here."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def holds(self, **fields: object) -> bool:
        return any(fields.items() <= line.items() for line in self.lines())


@contextlib.asynccontextmanager
async def process(
    tmp_path: Path, upstream: str, *arguments: str, start: tuple[str, ...] = ("-m", "aisse"), **environ: str
) -> AsyncIterator[Process]:
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        running = await asyncio.create_subprocess_exec(
            sys.executable,
            *start,
            "serve",
            "--port=0",
            f"--upstream={upstream}",
            "--log-level=debug",
            "--log-format=json",
            *arguments,
            env={"PATH": os.defpath, "AISSE_UPSTREAM_KEY": KEY, "AISSE_ACCESS_TOKENS": TOKEN, **environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
        )
    try:
        assert running.stdout is not None
        line = await asyncio.wait_for(running.stdout.readline(), 60)
        assert line, log.read_text()
        yield Process(line.decode().split()[-1], running, log)
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}

SCRIPTS = [
    "",
    "thinking_tokens=3",
    "line_end=crlf split=3",
    "close_delimited=true",
    *(f"status={status}" for status in (400, 401, 402, 403, 404, 413, 422, 429, 500, 502, 503, 504, 529)),
    "fault=error at=0",
    "fault=error at=4",
    "fault=cut at=0",
    "fault=cut at=100 rst=true",
    "fault=cut at=900",
    "fault=cut at=900 rst=true",
    "fault=garbage at=3 size=3000",
    "fault=huge at=3 size=3000000",
    "fault=no_stop",
    "fault=no_events",
    "fault=html",
    f"fault=redirect location=/?{QUERY}",
    "cookie=canary=1",
    "token_bytes=400000",  # longer than a stream may be
]


def scripted(script: str, tokens: int = 8) -> dict[str, Any]:
    words = f"{PROMPT} [[text='{(COMPLETION + ' ') * tokens}' message='{UPSTREAM_TEXT} {KEY} {PROMPT}' {script}]]"
    return prompt(words, system=PROMPT, metadata={"user_id": PROMPT})


def valid(**parameters: Any) -> bytes:
    return json.dumps(prompt(PROMPT, **parameters)).encode()


BAD_BODIES: list[bytes] = [
    b"",
    PROMPT.encode(),
    f'{{"messages": [{{"role": "user", "content": "{PROMPT}'.encode(),
    f'{{"messages": "{PROMPT}"}}'.encode(),
    f'{{"messages": ["{PROMPT}"]}}'.encode(),
    f'{{"messages": [{{"role": "{PROMPT}", "content": "{PROMPT}"}}]}}'.encode(),
    f'{{"messages": [{{"role": "user", "content": {{"{PROMPT}": "{PROMPT}"}}}}]}}'.encode(),
    f'{{"messages": [{{"role": "user", "content": ["{PROMPT}"]}}]}}'.encode(),
    f'{{"messages": [], "system": "{PROMPT}"}}'.encode(),
    f'"{PROMPT}"'.encode(),
    f'["{PROMPT}"]'.encode(),
    f'{{"messages": [{{"role": "user", "content": "{PROMPT}"}}], NaN}}'.encode(),
    f'{{"messages": [{{"role": "user", "content": "{PROMPT}\n"}}]}}'.encode(),
    b'{"messages": [{"role": "user", "content": "' + PROMPT.encode() + b'\xff"}]}',
    b'{"messages": [{"role": "user", "content": "' + PROMPT.encode() + b'\\ud800"}]}',
    b"[" * 100_000 + PROMPT.encode(),
    valid(model=PROMPT + " with spaces"),
    valid(model=7),
    valid(max_tokens=PROMPT),
    valid(max_tokens=0),
    valid(max_tokens=10**9),
    valid(temperature=PROMPT),
    valid(stop_sequences=PROMPT),
    valid(stream=False),
    valid(thinking=PROMPT),
    valid(tools=[PROMPT]),
    valid(invented=PROMPT),
    b" " * (1 << 20) + valid(),
]

BAD_HEADERS: list[dict[str, str]] = [
    {"Content-Type": "text/plain"},
    {"Content-Type": f"multipart/form-data; boundary={PROMPT}"},
    {"Content-Encoding": "gzip"},
    {"Content-Encoding": PROMPT},
    {"Origin": f"https://{QUERY}.example"},
    {"Authorization": f"Bearer {KEY}"},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": ""},
    {"Last-Event-ID": PROMPT},
    {"Idempotency-Key": PROMPT},
    {"Prefer": PROMPT},
    {"Aisse-On-Leave": PROMPT},
    {"Expect": "the-unexpected"},
    {"Cookie": f"session={KEY}"},
]

MALFORMED: list[bytes] = [
    f"BREW /?{QUERY} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    f"GET /?{QUERY} HTTP/9.9\r\nHost: x\r\n\r\n".encode(),
    f"GET /?{QUERY}\r\n\r\n".encode(),
    f"{QUERY} / HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    f"GET http://{QUERY}:port/ HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    f"GET //[{QUERY} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    f"GET /%zz%00?{QUERY} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    f"CONNECT {QUERY}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    f"GET / HTTP/1.1\r\nHost: x\r\n{QUERY}\r\n\r\n".encode(),
    f"GET / HTTP/1.1\r\nHost: x\r\nX: {QUERY}\x00\r\n\r\n".encode(),
    f"GET / HTTP/1.1\r\nHost: x\r\nX: {QUERY * 10_000}\r\n\r\n".encode(),
    f"GET /{QUERY * 2_000} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    f"POST /api/chat?{QUERY} HTTP/1.1\r\nHost: x\r\nContent-Length: {QUERY}\r\n\r\n".encode(),
    f"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{PROMPT}".encode(),
    f"POST /api/chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: {QUERY}\r\n\r\n{PROMPT}".encode(),
    (
        f"POST /api/chat?{QUERY} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{PROMPT}\r\n\r\n"
    ).encode(),
    (
        f"POST /api/chat?{QUERY} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: 999\r\n\r\n{PROMPT}"
    ).encode(),
    f"GET /ws?{QUERY} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n".encode(),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + QUERY.encode(),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + QUERY.encode(),
    b"\x00" * 100 + QUERY.encode() + b"\r\n\r\n",
]


async def every_script(client: aiohttp.ClientSession, url: str) -> list[Got]:
    return [
        await ask(client, url, scripted(script), headers=AUTHORIZED, params={"secret": QUERY}) for script in SCRIPTS
    ]


async def every_bad_request(client: aiohttp.ClientSession, url: str) -> list[Got]:
    found = []
    as_json = AUTHORIZED | {"Content-Type": "application/json"}
    cases: list[tuple[bytes, dict[str, str]]] = [(body, as_json) for body in BAD_BODIES]
    cases += [(valid(), as_json | headers) for headers in BAD_HEADERS]
    for body, headers in cases:
        async with client.post(f"{url}/api/chat?{QUERY}", data=io.BytesIO(body), headers=headers) as response:
            found.append(Got(response.status, response.headers, await response.read()))
    for method, path in [
        ("GET", "/"),
        ("GET", "/health"),
        ("GET", "/health/live"),
        ("GET", "/api/chat"),
        ("GET", "/api/chat/AAAAAAAAAAAAAAAAAAAAAA"),
        ("DELETE", "/api/chat/AAAAAAAAAAAAAAAAAAAAAA"),
        ("PUT", "/api/chat"),
        ("OPTIONS", "/api/chat"),
        ("GET", "/api/../../etc/passwd"),
        ("GET", "/nothing"),
    ]:
        async with client.request(method, f"{url}{path}?{QUERY}", headers={"Referer": QUERY}) as response:
            found.append(Got(response.status, response.headers, await response.read()))
    return found


async def every_malformed_request(address: tuple[str, int]) -> None:
    for sent in MALFORMED:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            # aiohttp's own answers quote the client's request to the client, which is no leak.
            answered = await asyncio.wait_for(reader.read(), 60)
            assert b"Traceback" not in answered
            assert KEY.encode() not in answered
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def leave_early(client: aiohttp.ClientSession, url: str) -> None:
    """In the middle of an answer, and with a reset."""
    script = scripted("pace=100", tokens=10_000)
    async with client.post(f"{url}/api/chat?{QUERY}", json=script, headers=AUTHORIZED) as response:
        await response.content.readany()
        assert response.connection is not None
        assert response.connection.transport is not None
        sock: socket.socket = response.connection.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        response.connection.transport.abort()


async def running_stream(client: aiohttp.ClientSession, url: str) -> aiohttp.ClientResponse:
    script = scripted("pace=100", tokens=10_000)
    response = await client.post(f"{url}/api/chat?{QUERY}", json=script, headers=AUTHORIZED)
    assert response.status == 200
    await response.content.readany()
    return response


def assert_silent(text: str, where: str) -> None:
    found = [canary for canary in CANARIES if canary in text]
    assert not found, f"{found} in {where}"


def check_client_side(answered: list[Got]) -> None:
    """Errors quote nothing that is private: not a key, and not even what the client itself sent or would have got."""
    for got in answered:
        assert KEY not in got.everything
        assert TOKEN not in got.everything
        assert "Traceback" not in got.everything
        if got.status >= 400:
            assert COMPLETION not in got.everything
            assert QUERY not in got.everything


@pytest.mark.parametrize("debug", ["0", "1"], ids=["", "asyncio debug"])
async def test_log_of_a_process_that_went_through_everything_holds_nothing_private(
    client: aiohttp.ClientSession, tmp_path: Path, debug: str
) -> None:
    async with (
        Simulator(Script(pace=0)) as simulator,
        process(
            tmp_path,
            simulator.url,
            "--leave-s=0",
            "--drain-s=0.2",
            "--stream-bytes=2MiB",
            start=("-c", WITH_A_BUG),
            PYTHONASYNCIODEBUG=debug,
        ) as server,
    ):
        answered = await every_script(client, server.url)
        check_client_side(answered)
        # The canaries were really there.
        assert answered[0].status == 200
        assert COMPLETION in answered[0].everything
        assert simulator.stats.keyed == simulator.stats.requests == len(SCRIPTS)

        refused = await every_bad_request(client, server.url)
        check_client_side(refused)
        for got in refused:
            if got.status >= 400:
                assert PROMPT not in got.everything
        assert sum(got.status >= 400 for got in refused) > len(BAD_BODIES) + 5

        await every_malformed_request(server.address)
        await leave_early(client, server.url)
        await eventually(lambda: server.holds(reason="abandoned"))

        bug = next(index for index, script in enumerate(SCRIPTS) if "thinking" in script)
        assert b"this answer failed inside the server" in answered[bug].body
        assert "cannot read" not in answered[bug].everything
        assert server.holds(event="relay failed", exception="builtins.ValueError")

        streams = [await running_stream(client, server.url) for _ in range(3)]
        server.process.send_signal(signal.SIGTERM)
        for response in streams:
            assert (await response.read()).endswith(b"\n\n")
        assert await asyncio.wait_for(server.process.wait(), 60) == 0
        assert server.holds(event="stream ended", reason="shutdown")

        assert len(server.lines()) > len(SCRIPTS)
        reasons = {line.get("reason") for line in server.lines()}
        assert reasons >= {"complete", "error", "truncated", "limit", "abandoned", "shutdown"}
        assert_silent(server.log.read_text(), "the log")
        assert server.process.stdout is not None
        assert_silent((await server.process.stdout.read()).decode(), "standard output")


async def test_log_of_a_process_whose_upstream_is_gone_holds_nothing_private(
    client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with process(tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}") as server:
            got = await ask(client, server.url, scripted(""), headers=AUTHORIZED)
            assert got.status == 502
            assert_silent(got.everything, "the answer")
            await eventually(lambda: server.holds(event="stream ended", error_type="api_error"))
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(server.process.wait(), 60) == 0
            assert_silent(server.log.read_text(), "the log")


async def test_log_of_a_process_whose_upstream_echoes_holds_nothing_private(
    client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """An upstream that writes what it was sent wherever it can: status line, headers, events, error types."""

    async def echo(request: Request, connection: Connection) -> None:
        said = f"{KEY} {PROMPT}"
        as_type = PROMPT.replace("-", "_")
        error = {"type": "error", "error": {"type": as_type, "message": said}}
        match request.prompt.split()[-1]:
            case "status":
                fields = [f"X-Echo: {said}", f"Location: /?{said}", f"Retry-After: {PROMPT}"]
                connection.send(
                    head(f"429 {said}", "application/json", *fields), chunk(json.dumps(error).encode()), LAST_CHUNK
                )
            case "broken":
                connection.send(f"HTTP/1.1 {said}\r\n{said}\r\n\r\n".encode())
                connection.fin()
            case "header":
                connection.send(f"HTTP/1.1 200 OK\r\n{said}\r\nX: \x00{said}\r\n\r\n".encode())
                connection.fin()
            case "chunk":
                connection.send(head(), chunk(message_start()), said.encode(), b"\r\n")
                connection.fin()
            case "error":
                connection.send(head(), chunk(message_start()), chunk(event(error)), LAST_CHUNK)
            case "type":
                connection.send(head("200 OK", f"text/{PROMPT}"), chunk(said.encode()), LAST_CHUNK)
            case "encoding":
                connection.send(
                    head("200 OK", "text/event-stream", "Content-Encoding: gzip"), chunk(said.encode()), LAST_CHUNK
                )

    cases = ["status", "broken", "header", "chunk", "error", "type", "encoding"]
    async with (
        raw_upstream(echo) as upstream,
        process(tmp_path, upstream.url, PYTHONASYNCIODEBUG="1") as server,
    ):
        for case in cases:
            got = await ask(client, server.url, prompt(f"{PROMPT} {case}"), headers=AUTHORIZED)
            assert KEY not in got.everything, case
        assert len(upstream.requests) == len(cases)
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(server.process.wait(), 60) == 0
        text = server.log.read_text()
        assert_silent(text, "the log")
        assert PROMPT.replace("-", "_") not in text


async def test_start_that_is_refused_does_not_quote_the_key(tmp_path: Path) -> None:
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "aisse",
        "serve",
        "--port=0",
        env={"PATH": os.defpath, "AISSE_UPSTREAM_KEY": f"{KEY}\nsecond line", "AISSE_ACCESS_TOKENS": TOKEN},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(running.communicate(), 60)
    assert running.returncode == 78
    assert err.count(b"\n") == 1
    assert_silent((out + err).decode(), "what it said")
    assert b"AISSE_UPSTREAM_KEY" in err
