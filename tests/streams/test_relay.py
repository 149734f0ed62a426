"""One upstream response on its way to a reader: what is relayed, what ends it, and with which words."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pytest
from conftest import Server, eventually, prompt, serving
from rawupstream import (
    LAST_CHUNK,
    MESSAGE_STOP,
    PING,
    Connection,
    Request,
    chunk,
    delta,
    event,
    head,
    message_delta,
    message_start,
    raw_upstream,
)

from aisse.formats.anthropic import AnthropicFollower
from aisse.upstream.client import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

    import aiohttp

    from aisse.formats.format import Mark
    from aisse.simulator import Simulator
    from aisse.streams.stream import Stream
    from aisse.upstream.connection import UpstreamResponse
    from aisse.upstream.question import Question

SOAK = os.environ.get("TESTS_SOAK") == "1"


@dataclass
class Answer:
    """What a reader got, down to the clean end of the body; a body that broke off raises instead."""

    stream_id: str
    frames: list[bytes]

    @property
    def end(self) -> dict[str, Any]:
        return data_of(self.frames[-1])

    def holds(self, events: list[bytes], reason: str) -> None:
        """Fails unless there are exactly `events`, numbered from 1, and what says how it ended."""
        count = len(events)
        assert self.frames[:count] == numbered(events, self.stream_id)
        rest = self.frames[count:]
        assert [type_of(frame) for frame in rest] == (["end"] if reason == "complete" else ["error", "end"])
        for seq, frame in enumerate(rest, count + 1):
            assert frame.endswith(f"\nid: {self.stream_id}.{seq}\n\n".encode())
        assert self.end["reason"] == reason
        assert self.end["events"] == count + len(rest) - 1


def numbered(events: list[bytes], stream_id: str) -> list[bytes]:
    return [whole[:-1] + f"id: {stream_id}.{seq}\n\n".encode() for seq, whole in enumerate(events, 1)]


def parsed(body: bytes, stream_id: str) -> Answer:
    opening = f"retry: 2000\nid: {stream_id}.0\n".encode()
    assert body.startswith(opening)
    *frames, rest = body[len(opening) :].split(b"\n\n")
    assert rest == b""
    return Answer(stream_id, [frame + b"\n\n" for frame in frames])


def type_of(frame: bytes) -> str:
    return re.match(rb"event: (.*)\n", frame)[1].decode()  # type: ignore[index]  # what has no type should fail here


def data_of(frame: bytes) -> dict[str, Any]:
    [data] = re.findall(rb"^data: (.*)$", frame, re.MULTILINE)
    loaded: dict[str, Any] = json.loads(data)
    return loaded


async def ask(client: aiohttp.ClientSession, server: Server, text: str = "anything") -> Answer:
    async with asyncio.timeout(60), client.post(server.chat, json=prompt(text)) as response:
        assert response.status == 200
        stream_id = response.headers["Content-Location"].removeprefix("/api/chat/")
        return parsed(await response.read(), stream_id)


def only_stream(server: Server) -> Stream:
    [stream] = server.registry._table.running.values()
    return stream


async def plain(request: Request, connection: Connection) -> None:
    """A short answer, and the connection kept."""
    connection.send(head(), *map(chunk, SHORT), LAST_CHUNK)


SHORT = [message_start(), delta("Hello"), delta(", world"), message_delta(), MESSAGE_STOP]


# --- cut at every byte ----------------------------------------------------------------------------------------


def eight_kib() -> list[bytes]:
    """An answer of exactly 8,192 bytes: all kinds of events, characters of one to four bytes, U+2028 among them."""
    words = ["w", "two words", "naïve", "日本語", "😀", "line\nend", "\u2028", "id: x.1", "event: end"]
    events = [message_start(), PING, *(delta(f" {words[n % len(words)]}{'.' * (n % 23)}") for n in range(55))]
    last = [message_delta(), MESSAGE_STOP]
    missing = 8192 - len(b"".join([*events, *last, delta("")]))
    return [*events, delta("x" * missing), *last]


ANSWER = eight_kib()
PLAIN = b"".join(ANSWER)
assert len(PLAIN) == 8192


def broken_off(cut: int, framing: str) -> list[bytes]:
    """The response of PLAIN as far as byte `cut` of its body, as its framing has it."""
    if framing == "events":  # each in a chunk of its own, as the real API sends them
        sent, parts = 0, [head()]
        for whole in ANSWER:
            keep = whole[: cut - sent]
            parts.append(chunk(whole) if len(keep) == len(whole) else b"%x\r\n%b" % (len(whole), keep))
            sent += len(keep)
            if sent == cut:
                break
        return parts
    if framing == "chunk":
        return [head(), b"%x\r\n" % len(PLAIN), PLAIN[:cut]]
    return [head(framing=str(len(PLAIN)) if framing == "length" else "close"), PLAIN[:cut]]


async def serve_cut(request: Request, connection: Connection) -> None:
    cut, framing, how = request.prompt.split()
    connection.send(*broken_off(int(cut), framing))
    connection.rst() if how == "rst" else connection.fin()


async def read_cuts(server: Server, cuts: Iterator[int], framing: str, how: str) -> None:
    """One answer after the other, on one connection, as far as `cuts` has any left."""
    reader, writer = await asyncio.open_connection(*server.address)
    try:
        for cut in cuts:
            body = json.dumps(prompt(f"{cut} {framing} {how}")).encode()
            fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(b"POST /api/chat HTTP/1.1\r\n" + fields.encode() + body)
            headers = await reader.readuntil(b"\r\n\r\n")
            chunks = await reader.readuntil(b"\r\n0\r\n\r\n")  # or IncompleteReadError: it did not end cleanly
            stream_id = re.search(rb"Content-Location: /api/chat/(\S+)", headers)[1].decode()  # type: ignore[index]
            check_cut(parsed(dechunked(chunks), stream_id), cut, clean=framing == "close" and how == "fin")
    finally:
        writer.transport.abort()


def dechunked(chunks: bytes) -> bytes:
    parts: list[bytes] = []
    position = 0
    while True:
        line_end = chunks.index(b"\r\n", position)
        size = int(chunks[position:line_end], 16)
        if not size:
            assert chunks[line_end:] == b"\r\n\r\n"
            return b"".join(parts)
        parts.append(chunks[line_end + 2 : line_end + 2 + size])
        position = line_end + 4 + size


def check_cut(answer: Answer, cut: int, *, clean: bool = False) -> None:
    """`clean`: nothing says that the body was cut, so that its last event may do without its blank line."""
    whole = (PLAIN[:cut] + b"\n\n" * (clean and PLAIN[cut - 1 : cut] in {b"}", b"\n"})).count(b"}\n\n")
    if clean and cut and PLAIN[cut - 1 : cut] == b"}" and PLAIN[cut : cut + 1] != b"\n":
        whole -= 1  # inside the JSON
    answer.holds(ANSWER[:whole], "complete" if whole == len(ANSWER) else "truncated")
    usage = {"input_tokens": 7 if whole else 0, "output_tokens": 11 if whole >= len(ANSWER) - 1 else int(whole > 0)}
    assert answer.end["usage"] == usage


# Every byte takes its time, and more of it where the machine has other things to do.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(
    ("framing", "step"),
    [("events", 1), ("chunk", 1 if SOAK else 13), ("length", 1 if SOAK else 14), ("close", 1 if SOAK else 16)],
)
async def test_upstream_cut_at_every_byte_gives_the_whole_frames_before_it(how: str, framing: str, step: int) -> None:
    """The reset leaves in the same step as the bytes, headers included: none of them may be lost to it."""
    async with raw_upstream(serve_cut) as upstream, serving(upstream.url, first_byte_commit_s=0) as server:
        if not SOAK:
            # Nothing depends on a single byte of fin: it is the reset that may overtake what came before it.
            step *= 9 if how == "fin" else 5
        cuts = iter([*range(0, len(PLAIN), step), len(PLAIN)])
        async with asyncio.TaskGroup() as group:
            for _ in range(32):
                group.create_task(read_cuts(server, cuts, framing, how))
        assert server.registry.active_streams == 0


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_upstream_cut_while_the_relay_waits_gives_the_whole_frames_before_it(
    client: aiohttp.ClientSession, how: str
) -> None:
    """As above, but the last bytes and the cut meet a relay that has relayed the first and waits for more."""
    relayed: dict[str, asyncio.Event] = {}
    first = len(ANSWER[0] + ANSWER[1] + ANSWER[2])

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), b"%x\r\n" % len(PLAIN), PLAIN[:first])
        await relayed[request.prompt].wait()
        connection.send(PLAIN[first : int(request.prompt)])
        connection.rst() if how == "rst" else connection.fin()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        for cut in range(first, len(PLAIN), 1 if SOAK else 101):
            relayed[str(cut)] = asyncio.Event()
            async with client.post(server.chat, json=prompt(str(cut))) as response:
                stream_id = response.headers["Content-Location"].removeprefix("/api/chat/")
                body = await response.content.readuntil(b".3\n\n")
                relayed[str(cut)].set()
                body += await response.content.read()
            check_cut(parsed(body, stream_id), cut)


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("framing", ["events", "chunk", "length", "close"])
async def test_upstream_cut_before_the_relay_runs_gives_the_whole_frames_before_it(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, framing: str, how: str
) -> None:
    """As above, but the relay's task gets its turn only after the connection is gone."""
    open_ = Upstream.open

    async def open_late(self: Upstream, question: Question) -> UpstreamResponse:
        response = await open_(self, question)
        connection = response.connection
        if connection is not None:
            await eventually(lambda: connection.transport is None)
        return response

    monkeypatch.setattr(Upstream, "open", open_late)
    async with raw_upstream(serve_cut) as upstream, serving(upstream.url, first_byte_commit_s=0) as server:
        await read_cuts(server, iter([0, 10, 300, 1000, 8191, 8192]), framing, how)


async def test_upstream_cut_after_its_terminal_event_is_complete(client: aiohttp.ClientSession) -> None:
    """What the body's framing still lacks is nothing that a reader would miss."""

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(b"".join(SHORT)), b"ff")
        connection.rst() if request.prompt == "rst" else connection.fin()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        for how in ("fin", "rst"):
            (await ask(client, server, how)).holds(SHORT, "complete")


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
async def test_body_that_ends_without_terminal_event_is_truncated(client: aiohttp.ClientSession, framing: str) -> None:
    events = SHORT[:-1]
    whole = b"".join(events)

    async def answer(request: Request, connection: Connection) -> None:
        if framing == "chunked":
            connection.send(head(), chunk(whole), LAST_CHUNK)
        else:
            connection.send(head(framing=str(len(whole)) if framing == "length" else "close"), whole)
        connection.fin()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(events, "truncated")


@pytest.mark.parametrize(("wire", "reason"), [(LAST_CHUNK, "complete"), (b"", "truncated")])
async def test_answer_that_its_format_calls_complete_is_so_where_its_body_ends_in_order(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, wire: bytes, reason: str
) -> None:
    monkeypatch.setattr(AnthropicFollower, "is_complete", lambda _self: True)

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(b"".join(SHORT[:-1])), wire)
        connection.fin()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT[:-1], reason)


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("framing", ["chunked", "close", "length", "HTTP/1.0"])
async def test_last_event_needs_no_blank_line_where_the_body_is_whole(
    client: aiohttp.ClientSession, framing: str, missing: int
) -> None:
    body = b"".join(SHORT)[:-missing]
    wires = {
        "chunked": head() + chunk(body) + LAST_CHUNK,
        "close": head(framing="close") + body,
        "length": head(framing=str(len(body))) + body,
        "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body,
    }

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(wires[framing])
        if framing in {"close", "HTTP/1.0"}:
            connection.fin()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT, "complete")


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("how", ["no last chunk", "short", "reset"])
async def test_event_without_its_blank_line_is_none_where_the_body_was_cut(
    client: aiohttp.ClientSession, how: str, missing: int
) -> None:
    """WHATWG HTML 9.2.6: what the last blank line does not close is discarded, a terminal event too."""
    body = b"".join(SHORT)[:-missing]
    wires = {
        "no last chunk": head() + chunk(body),
        "short": head(framing=str(len(body) + missing)) + body,
        "reset": head(framing="close") + body,
    }

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(wires[how])
        await connection.delivered()
        # Until it is relayed: a reset takes what the relay's kernel has.
        await eventually(lambda: only_stream(server).log.last_seq == len(SHORT) - 1)
        connection.rst() if how == "reset" else connection.fin()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT[:-1], "truncated")


async def test_half_an_event_is_none_where_nothing_says_that_the_body_was_cut(client: aiohttp.ClientSession) -> None:
    """A server that crashes closes its connections as cleanly as one that is done."""

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(framing="close"), *SHORT[:2], SHORT[2][:-9])
        connection.fin()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT[:2], "truncated")


async def test_bug_in_the_last_event_ends_the_stream_as_an_error(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = AnthropicFollower.observe

    def fail_at_the_end(self: AnthropicFollower, event_type: bytes, body: bytes) -> Mark:
        if event_type == b"message_stop":
            raise ZeroDivisionError
        return observe(self, event_type, body)

    monkeypatch.setattr(AnthropicFollower, "observe", fail_at_the_end)

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(b"".join(SHORT)[:-1]), LAST_CHUNK)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT[:-1], "error")


# --- while a slow reader holds the relay back -----------------------------------------------------------------


class SlowReader:
    """A client that takes nothing until it is told to."""

    def __init__(self, server: Server) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.setblocking(False)

    async def __aenter__(self) -> Self:
        body = json.dumps(prompt("anything")).encode()
        fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await self._loop.sock_connect(self._socket, self._server.address)
        await self._loop.sock_sendall(self._socket, b"POST /api/chat HTTP/1.1\r\n" + fields.encode() + body)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._socket.close()

    async def read(self) -> Answer:
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            part = await self._loop.sock_recv(self._socket, 1 << 16)
            assert part, "the body did not end cleanly"
            received += part
        headers, _, chunks = received.partition(b"\r\n\r\n")
        stream_id = re.search(rb"Content-Location: /api/chat/(\S+)", headers)[1].decode()  # type: ignore[index]
        return parsed(dechunked(chunks), stream_id)


class Flood:
    """An upstream that sends until the relay reads no more, then some that stays in its socket."""

    def __init__(self) -> None:
        self.server: Server | None = None
        self.sent: list[bytes] = []
        self.full = asyncio.Event()
        self.go_on = asyncio.Event()

    async def fill(self, connection: Connection) -> None:
        assert self.server is not None
        connection.send(head())
        await self._send(connection, message_start())
        stream = only_stream(self.server)
        while not stream.holds_back:
            await self._send(connection, delta("x" * 1000))
            await eventually(lambda: stream.holds_back or stream.log.last_seq == len(self.sent))
        relay, _ = self.server.registry._relays[stream.id]
        assert relay._response_body is not None
        taken = relay._response_body.size
        for _ in range(8):
            await self._send(connection, delta("y" * 1000))
        await connection.delivered()
        assert stream.holds_back
        assert relay._response_body.size == taken  # they are in the kernel and nowhere else
        self.full.set()
        await self.go_on.wait()

    async def _send(self, connection: Connection, whole: bytes) -> None:
        connection.send(chunk(whole))
        self.sent.append(whole)
        await connection.drain()


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_cut_while_held_back_by_a_slow_reader_loses_none_of_what_arrived(how: str) -> None:
    flood = Flood()

    async def answer(request: Request, connection: Connection) -> None:
        await flood.fill(connection)
        connection.rst() if how == "rst" else connection.fin()
        await connection.lost.wait()
        flood.full.set()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        flood.server = server
        async with SlowReader(server) as reader:
            await flood.full.wait()
            flood.full.clear()
            flood.go_on.set()
            await flood.full.wait()
            stream = only_stream(server)
            assert stream.reason is None  # its reader has the rest to take first
            (await reader.read()).holds(flood.sent, "truncated")


async def test_silence_is_not_held_against_an_upstream_that_we_do_not_read() -> None:
    """The clock is set here, not waited for."""
    flood = Flood()

    async def answer(request: Request, connection: Connection) -> None:
        await flood.fill(connection)
        connection.send(chunk(MESSAGE_STOP), LAST_CHUNK)
        flood.sent.append(MESSAGE_STOP)

    async with (
        raw_upstream(answer) as upstream,
        serving(upstream.url, silence_s=60, no_content_s=60) as server,
    ):
        flood.server = server
        async with SlowReader(server) as reader:
            await flood.full.wait()
            relay, _ = server.registry._relays[only_stream(server).id]
            now = asyncio.get_running_loop().time()
            assert [relay.overdue(now + seconds) for seconds in (1, 50, 100, 200, 3000)] == [None] * 5
            flood.go_on.set()
            (await reader.read()).holds(flood.sent, "complete")


# --- timeouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "pings", "message"),
    [
        ({"silence_s": 0.3}, False, "the upstream fell silent"),
        # Counted from the question on: the answer has to have begun before.
        ({"no_content_s": 1}, True, "the upstream sends pings only"),
        ({"stream_s": 1}, True, "the answer took longer than the server allows"),
    ],
    ids=["silence_s", "no_content_s", "stream_s"],
)
async def test_late_upstream_is_a_timeout_and_its_connection_is_closed(
    client: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    pings: bool,
    message: str,
) -> None:
    monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 0.02)

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(message_start()))
        while pings and not connection.lost.is_set():
            await asyncio.sleep(0.01)
            connection.send(chunk(PING))

    async with raw_upstream(answer) as upstream, serving(upstream.url, **settings) as server:
        answered = await ask(client, server)
        answered.holds([message_start(), *[PING] * (len(answered.frames) - 3)], "timeout")
        assert data_of(answered.frames[-2]) == {
            "type": "error",
            "error": {"type": "timeout_error", "message": message},
        }
        await asyncio.wait_for(upstream.connections[0].lost.wait(), 60)


async def test_silence_and_no_content_are_measured_apart(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte resets the one, an event that is more than a ping the other. The clock is set here, not waited for."""
    # Who looks notes what has come with the time of the look.
    monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 3600.0)
    go_on = asyncio.Queue[bytes]()

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(message_start()))
        while (whole := await go_on.get()) != MESSAGE_STOP:
            connection.send(chunk(whole))
        connection.send(chunk(MESSAGE_STOP), LAST_CHUNK)

    async with raw_upstream(answer) as upstream, serving(upstream.url, silence_s=60, no_content_s=100) as server:
        asked = asyncio.create_task(ask(client, server))
        await eventually(lambda: server.registry.active_streams == 1)
        stream = only_stream(server)
        relay, _ = server.registry._relays[stream.id]
        start = asyncio.get_running_loop().time()

        def late(seconds: float) -> str | None:
            error = relay.overdue(start + seconds)
            return str(error) if error is not None else None

        await eventually(lambda: stream.log.last_seq == 1)
        assert late(0) is None
        assert late(59.9) is None
        assert late(60.1) == "the upstream fell silent"

        go_on.put_nowait(PING)
        await eventually(lambda: stream.log.last_seq == 2)
        assert late(60.2) is None
        assert late(99.9) is None
        assert late(100.1) == "the upstream sends pings only"

        go_on.put_nowait(delta("x"))
        await eventually(lambda: stream.log.last_seq == 3)
        assert late(100.2) is None
        assert late(160.1) is None
        assert late(160.3) == "the upstream fell silent"

        go_on.put_nowait(MESSAGE_STOP)
        (await asked).holds([message_start(), PING, delta("x"), MESSAGE_STOP], "complete")


async def test_first_byte_and_stream_limits_are_told_apart(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 3600.0)
    go_on = asyncio.Event()

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head())  # headers are not yet an answer's first byte
        await go_on.wait()
        connection.send(chunk(b"".join(SHORT)), LAST_CHUNK)

    async with (
        raw_upstream(answer) as upstream,
        serving(upstream.url, silence_s=1, first_byte_s=60, stream_s=100) as server,
    ):
        asked = asyncio.create_task(ask(client, server))
        await eventually(lambda: server.registry.active_streams == 1)
        stream = only_stream(server)
        relay, _ = server.registry._relays[stream.id]

        def late(seconds: float) -> str | None:
            error = relay.overdue(stream.created + seconds)
            return str(error) if error is not None else None

        assert late(59.9) is None
        assert late(60.1) == "the upstream did not begin its answer in time"
        assert late(99.9) == "the upstream did not begin its answer in time"
        assert late(100.1) == "the answer took longer than the server allows"
        go_on.set()
        (await asked).holds(SHORT, "complete")


# --- what is relayed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", ["line_end=crlf", "line_end=cr", "split=1", "split=1 line_end=crlf", "split=3", "close_delimited=true"]
)
async def test_frames_are_the_same_however_the_upstream_writes_them(
    server: Server, client: aiohttp.ClientSession, script: str
) -> None:
    what = "tokens=30 thinking_tokens=3 seed=1"
    # Of one length, which usage counts.
    expected = await ask(client, server, f"[[{what}]]".ljust(100))
    events = [re.sub(rb"id: \S+\n\n$", b"\n", frame) for frame in expected.frames[:-1]]
    expected.holds(events, "complete")
    assert len(events) > 33
    (await ask(client, server, f"[[{what} {script}]]".ljust(100))).holds(events, "complete")


async def test_answer_whose_every_byte_on_the_wire_comes_alone_is_whole(client: aiohttp.ClientSession) -> None:
    """Headers and chunk sizes too, not only the events."""

    async def answer(request: Request, connection: Connection) -> None:
        for byte in b"".join([head(), *map(chunk, SHORT), LAST_CHUNK]):
            connection.send(bytes([byte]))
            await connection.delivered()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT, "complete")


TINY = [b"event: a\ndata: {}\n\n", b"event: b\ndata: {}\n\n", b"event: message_stop\ndata: {}\n\n"]
WHOLE = b"".join(TINY)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "response",
    [
        b"".join([CHUNKED, *map(chunk, TINY), LAST_CHUNK]),
        CHUNKED + b"".join(b'%06X;name=value;other="a b"\r\n%b\r\n' % (len(e), e) for e in TINY) + b"000;x\r\n\r\n",
        CHUNKED + chunk(WHOLE) + b"0\r\nX-Trailer: 1\r\nX-Other: data: {}\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n"
        + CHUNKED
        + chunk(WHOLE)
        + LAST_CHUNK,
        b"HTTP/1.1 200\r\ntransfer-encoding:Chunked\r\ncontent-type:TEXT/event-stream;charset=UTF-8\r\n\r\n"
        + chunk(WHOLE)
        + LAST_CHUNK,
        HEAD + b"Content-Length: %d\r\n\r\n" % len(WHOLE) + WHOLE,
        HEAD + b"Content-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(WHOLE) + LAST_CHUNK,
    ],
    ids=["chunks", "extensions", "trailers", "interim responses", "spellings", "length", "identity"],
)
async def test_response_in_two_packets_is_relayed_wherever_it_is_split(
    client: aiohttp.ClientSession, response: bytes
) -> None:
    """One answer after the other, on one connection, which each of them has to leave as it was."""

    async def answer(request: Request, connection: Connection) -> None:
        split = int(request.prompt)
        connection.send(response[:split])
        for _ in range(3):  # on this loop, a step is enough for the other side to read
            await asyncio.sleep(0)
        connection.send(response[split:])

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        for split in range(1, len(response)):
            (await ask(client, server, str(split))).holds(TINY, "complete")
            await eventually(lambda: not server.registry._relays)
        assert len(upstream.connections) == 1


async def test_compressed_stream_is_refused(client: aiohttp.ClientSession) -> None:
    """It was asked not to: a compressor holds tokens back until it has enough of them."""

    async def answer(_request: Request, connection: Connection) -> None:
        coded = b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.send(HEAD, coded, chunk(gzip.compress(WHOLE)), LAST_CHUNK)

    async with (
        raw_upstream(answer) as upstream,
        serving(upstream.url) as server,
        client.post(server.chat, json=prompt("anything")) as response,
    ):
        assert response.status == 502
        assert "compresses" in (await response.json())["error"]["message"]


async def test_long_body_of_given_length_is_relayed_whole(client: aiohttp.ClientSession) -> None:
    """It goes through aiohttp's parser, which pauses itself where more has come than fits its buffer."""
    events = [delta(f" {n}") for n in range(3_000)]
    body = b"".join([*events, MESSAGE_STOP])

    async def answer(_request: Request, connection: Connection) -> None:
        connection.send(HEAD, b"Content-Length: %d\r\n\r\n" % len(body), body)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds([*events, MESSAGE_STOP], "complete")


@pytest.mark.parametrize(
    "broken",
    [
        b"zz\r\n",
        b"-5\r\n",
        b"+5\r\n",
        b"0x5\r\n",
        b" 5\r\n",
        b"\r\n",
        b"5\n",
        b"FFFFFFFFFFFFFFFFF\r\n",
        b"5" * 20_000,
        b"5;" + b"x" * 200_000,
        b"5\r\nabcdefgh\r\n",
        b"event: message_stop\ndata: {}\n\n",
        b"\x00\r\n",
    ],
)
async def test_chunks_that_make_no_sense_end_the_stream_and_the_connection(
    client: aiohttp.ClientSession, broken: bytes
) -> None:
    async def answer(request: Request, connection: Connection) -> None:
        if request.prompt == "again":
            connection.send(CHUNKED, chunk(WHOLE), LAST_CHUNK)
            return
        connection.send(CHUNKED, chunk(TINY[0]), broken)
        await connection.lost.wait()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(TINY[:1], "truncated")
        await asyncio.wait_for(upstream.connections[0].lost.wait(), 60)
        (await ask(client, server, "again")).holds(TINY, "complete")
        assert len(upstream.connections) == 2


FORGED = b"".join([CHUNKED, chunk(b"event: forged\ndata: {}\n\n"), chunk(TINY[-1]), LAST_CHUNK])


async def test_bytes_that_come_with_the_end_of_an_answer_are_nobodys(client: aiohttp.ClientSession) -> None:
    """They would otherwise be the next client's answer."""

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(CHUNKED, chunk(WHOLE), LAST_CHUNK, FORGED)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        for _ in range(3):
            (await ask(client, server)).holds(TINY, "complete")
            await asyncio.wait_for(upstream.connections[-1].lost.wait(), 60)
        assert len(upstream.connections) == 3


@pytest.mark.parametrize("status", ["200 OK", "429 Slow"])
async def test_bytes_that_come_while_a_connection_is_idle_are_nobodys(
    client: aiohttp.ClientSession, status: str
) -> None:
    idle = asyncio.Semaphore(0)

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(CHUNKED.replace(b"200 OK", status.encode()), chunk(WHOLE), LAST_CHUNK)
        await eventually(lambda: not server.registry._relays)
        connection.send(FORGED)
        await connection.delivered()
        idle.release()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        async with asyncio.timeout(60):
            for _ in range(3):
                async with client.post(server.chat, json=prompt("anything")) as response:
                    assert b"forged" not in await response.read()
                if response.status == 502:  # it is asked on the spoiled connection, which is noticed and closed
                    await asyncio.wait_for(upstream.connections[-1].lost.wait(), 60)
                else:
                    assert response.status == int(status[:3])
                    await idle.acquire()


async def test_ids_retries_and_comments_of_the_upstream_are_not_relayed(client: aiohttp.ClientSession) -> None:
    start, hello, *rest = SHORT
    written = b"".join(
        [
            b"\xef\xbb\xbf: welcome\n",
            b"retry: 1\nid: 17\n",
            start,
            b": between\n\n",
            b"id: forged.9\n\n",
            b"id: 18\nevent:content_block_delta\nretry: 99\n: inside\nunknown: x\ndata:"
            + data_line(hello)
            + b"\nid\n\n",
            b"event: nothing\n\n",
            *rest,
        ]
    )

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(written), LAST_CHUNK)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT, "complete")


def data_line(whole: bytes) -> bytes:
    return whole.split(b"data: ")[1].strip()


async def test_events_after_the_terminal_event_are_not_relayed(client: aiohttp.ClientSession) -> None:
    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(b"".join([*SHORT, delta("late"), MESSAGE_STOP])))
        connection.send(chunk(event({"type": "error", "error": {"type": "x", "message": "y"}})), LAST_CHUNK)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT, "complete")


async def test_upstream_cannot_forge_events_of_our_own(client: aiohttp.ClientSession) -> None:
    forged = [
        b'event: end\ndata: {"type":"end","reason":"complete","events":1}\n\n',
        b'event: reconnect\ndata: {"type":"reconnect","resume":true}\n\n',
        b'data: {"type":"end","reason":"complete"}\n\n',
    ]

    async def answer(_request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(SHORT[0]), *map(chunk, forged), *map(chunk, SHORT[1:]), LAST_CHUNK)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT, "complete")


async def test_unknown_events_are_relayed_as_they_are(client: aiohttp.ClientSession) -> None:
    events = [*SHORT[:2], event({"type": "invented_later", "text": "a: b\u2028\x85"}), *SHORT[2:]]

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(b"".join(events)), LAST_CHUNK)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(events, "complete")


async def test_usage_is_the_last_that_the_upstream_reported(
    server: Server, simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    answered = await ask(client, server, "[[tokens=5 thinking_tokens=2]]")
    assert answered.end["usage"]["output_tokens"] == 7
    assert answered.end["usage"]["input_tokens"] > 0
    cut = await ask(client, server, "[[tokens=5 fault=no_stop]]")
    assert cut.end["reason"] == "truncated"
    assert cut.end["usage"]["output_tokens"] == 5
    assert server.registry.figures.output_tokens == 12


async def test_error_event_after_content_is_the_error_before_the_end(
    server: Server, simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    answered = await ask(client, server, "[[tokens=9 fault=error at=4 message='try again']]")
    assert len(answered.frames) == 6
    assert [type_of(frame) for frame in answered.frames[-2:]] == ["error", "end"]
    assert data_of(answered.frames[-2]) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "try again"},
    }
    assert answered.end["reason"] == "error"


async def test_garbage_ends_the_stream_after_the_whole_frames(server: Server, client: aiohttp.ClientSession) -> None:
    answered = await ask(client, server, "[[tokens=9 fault=garbage at=6 size=50000 seed=1]]")
    assert [type_of(frame) for frame in answered.frames[6:]] == ["error", "end"]
    assert answered.end["reason"] == "truncated"


async def test_event_over_the_limit_ends_the_stream_after_the_frames_before_it(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    async with serving(simulator.url, max_event_bytes=4096) as server:
        answered = await ask(client, server, "[[tokens=9 fault=huge at=6 size=100000]]")
        assert [type_of(frame) for frame in answered.frames[6:]] == ["error", "end"]
        assert answered.end["reason"] == "limit"
        assert data_of(answered.frames[-2])["error"]["type"] == "limit_error"
        await eventually(lambda: simulator.stats.active == 0)
        assert simulator.records[-1].outcome == "aborted"


async def test_event_within_the_limit_is_relayed(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    async with serving(simulator.url, max_event_bytes="1MiB") as server:
        answered = await ask(client, server, "[[tokens=9 fault=huge at=6 size=1000000]]")
        assert answered.end["reason"] == "complete"
        assert max(len(frame) for frame in answered.frames) > 999_000


async def test_stream_over_the_limit_ends_and_its_upstream_is_closed(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    async with serving(simulator.url, stream_bytes="64KiB") as server:
        answered = await ask(client, server, "[[tokens=100000 token_bytes=500]]")
        assert answered.end["reason"] == "limit"
        assert 64 << 10 < sum(map(len, answered.frames)) < 128 << 10
        await eventually(lambda: simulator.stats.active == 0)
        assert simulator.records[-1].outcome == "aborted"


# --- the connection -------------------------------------------------------------------------------------------


async def test_answers_one_after_the_other_use_one_upstream_connection(client: aiohttp.ClientSession) -> None:
    async with raw_upstream(plain) as upstream, serving(upstream.url) as server:
        for _ in range(5):
            (await ask(client, server)).holds(SHORT, "complete")
            await eventually(lambda: not server.registry._relays)
        assert len(upstream.requests) == 5
        assert len(upstream.connections) == 1


async def test_end_of_body_in_a_later_packet_still_saves_the_connection(client: aiohttp.ClientSession) -> None:
    ended = asyncio.Event()

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), *map(chunk, SHORT))
        await ended.wait()
        connection.send(LAST_CHUNK)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        for _ in range(2):
            ended.clear()
            (await ask(client, server)).holds(SHORT, "complete")
            ended.set()
            await eventually(lambda: not server.registry._relays)
        assert len(upstream.connections) == 1


async def test_upstream_that_never_ends_its_body_delays_no_reader_and_is_hung_up_on(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aisse.streams.relay._TAIL_S", 0.05)

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), *map(chunk, SHORT))
        await connection.lost.wait()

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT, "complete")
        await asyncio.wait_for(upstream.connections[0].lost.wait(), 60)
        (await ask(client, server)).holds(SHORT, "complete")
        assert len(upstream.connections) == 2


async def test_reader_has_its_end_while_the_upstreams_body_is_still_open(client: aiohttp.ClientSession) -> None:
    read = asyncio.Event()

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), *map(chunk, SHORT))
        await read.wait()
        assert not connection.lost.is_set()
        connection.send(LAST_CHUNK)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT, "complete")
        read.set()


async def test_upstream_that_talks_on_after_the_end_is_hung_up_on(client: aiohttp.ClientSession) -> None:
    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), *map(chunk, SHORT))
        while not connection.lost.is_set():
            connection.send(chunk(PING * 100))
            await connection.drain()
            await asyncio.sleep(0)

    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        (await ask(client, server)).holds(SHORT, "complete")
        await asyncio.wait_for(upstream.connections[0].lost.wait(), 60)


# --- a bug of our own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["first", "later"])
async def test_exception_in_one_relay_ends_that_stream_alone(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Where the bytes came along with the headers, and where the event loop hands them to the relay."""
    observe = AnthropicFollower.observe

    def failing(self: AnthropicFollower, event_type: bytes, body: bytes) -> Mark:
        if b"poison" in body:
            raise ZeroDivisionError("poison")
        return observe(self, event_type, body)

    monkeypatch.setattr(AnthropicFollower, "observe", failing)
    failed = asyncio.Event()
    connections: dict[str, Connection] = {}

    async def answer(request: Request, connection: Connection) -> None:
        connections[request.prompt] = connection
        connection.send(head(), *map(chunk, SHORT[:2]))
        if request.prompt == "neighbour":
            await failed.wait()
            connection.send(*map(chunk, SHORT[2:]), LAST_CHUNK)
        elif at == "first":
            connection.send(chunk(delta("poison")))
        else:
            await eventually(
                lambda: any(s.log.last_seq == 2 for s in server.registry._table.running.values() if s is not kept)
            )
            connection.send(chunk(delta("poison")))

    async with raw_upstream(answer) as upstream, serving(upstream.url, first_byte_commit_s=0) as server:
        neighbour = asyncio.create_task(ask(client, server, "neighbour"))
        await eventually(lambda: server.registry.active_streams == 1)
        kept = only_stream(server)
        await eventually(lambda: kept.log.last_seq == 2)
        answered = await ask(client, server, "victim")
        answered.holds(SHORT[:2] if at == "later" else answered_before(answered), "error")
        assert b"poison" not in b"".join(answered.frames)
        await asyncio.wait_for(connections["victim"].lost.wait(), 60)
        assert not connections["neighbour"].lost.is_set()
        failed.set()
        (await neighbour).holds(SHORT, "complete")


def answered_before(answered: Answer) -> list[bytes]:
    """Events in the same chunk as the one that failed may or may not have been relayed; none is lost in between."""
    return SHORT[: len(answered.frames) - 2]


async def test_stream_that_failed_keeps_nothing_but_its_error(client: aiohttp.ClientSession) -> None:
    """What an error was caused by, and the frames that it came through, hold the question for as long as it is kept."""
    async with serving("http://127.0.0.1:9", first_byte_commit_s=0) as server:
        answer = await ask(client, server)
        assert answer.end["reason"] == "error"
        stream = server.registry.get(answer.stream_id)
        assert stream is not None
        error = stream.error
        assert error is not None
        assert (error.__cause__, error.__context__, error.__traceback__) == (None, None, None)
