"""The simulator, seen by an ordinary HTTP client, by bare sockets and by an independent SSE client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import httpx
import httpx_sse
import pytest
from conftest import eventually
from played import events, text_of, types

from aisse.simulator import Script, Simulator, server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

VERSION = {"anthropic-version": "2023-06-01"}


def body(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "m", "max_tokens": 10_000_000, "stream": True, "messages": messages} | fields


class Peer:
    """A client of one bare socket: it sees each byte, chooses when to read, and how to leave."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def ask(self, text: str, *, complete: bool = True, **fields: Any) -> None:
        """Sends a request, all but its last byte unless `complete`."""
        content = json.dumps(body(text, **fields)).encode()
        lines = ["POST /v1/messages HTTP/1.1", "Host: test", "anthropic-version: 2023-06-01"]
        request = "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content
        await asyncio.get_running_loop().sock_sendall(self.sock, request if complete else request[:-1])

    async def read(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, 65_536)

    async def read_until(self, mark: bytes) -> bytes:
        received = bytearray()
        seen = 0
        while received.find(mark, seen) < 0:
            seen = max(0, len(received) - len(mark))
            chunk = await self.read()
            assert chunk, "closed too early"
            received += chunk
        return bytes(received)

    async def read_to_end(self) -> tuple[bytes, bytes, bool]:
        """Head, body and whether the connection ended with a reset."""
        received, reset = b"", False
        try:
            while chunk := await self.read():
                received += chunk
        except ConnectionResetError:
            reset = True
        head, _, rest = received.partition(b"\r\n\r\n")
        return head, rest, reset

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@contextlib.asynccontextmanager
async def peer_of(simulator: Simulator, receive_buffer: int | None = None) -> AsyncIterator[Peer]:
    with socket.socket() as sock:
        sock.setblocking(False)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        address = urlsplit(simulator.url)
        await asyncio.get_running_loop().sock_connect(sock, (address.hostname, address.port))
        yield Peer(sock)


def unchunked(encoded: bytes) -> tuple[bytes, list[int], bool]:
    """What is there of a chunked body: its bytes, the sizes that the chunks announce, whether it ends as it should."""
    content, sizes = bytearray(), list[int]()
    start = 0
    while start < len(encoded):
        end = encoded.index(b"\r\n", start)
        size = int(encoded[start:end], 16)
        if size == 0:
            return bytes(content), sizes, encoded[end:] == b"\r\n\r\n"
        sizes.append(size)
        content += encoded[end + 2 : end + 2 + size]
        start = end + 2 + size + 2
    return bytes(content), sizes, False


# --- answers ------------------------------------------------------------------------------------------------------


async def test_stream_is_the_plan_to_the_byte(client: aiohttp.ClientSession) -> None:
    script = Script(pace=0, seed=1, thinking_tokens=5)
    async with (
        Simulator(script) as simulator,
        client.post(f"{simulator.url}/v1/messages", json=body(), headers=VERSION) as response,
    ):
        stream = await response.read()
        record = simulator.records[-1]
        plan = script.frames(message_id=record.id, model="m", input_tokens=8)
        assert stream == b"".join(frame for _, frame in plan)
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["request-id"].startswith("req_")
        await eventually(lambda: record.outcome == "completed")
        assert (record.bytes_written, record.events) == (len(stream), len(events(stream)))
        assert simulator.stats.stop_reasons == {"end_turn": 1}


async def test_connection_is_kept_for_the_next_question(simulator: Simulator) -> None:
    async with peer_of(simulator) as peer:
        for _ in range(2):
            await peer.ask("[[tokens=2]]")
            assert b"message_stop" in await peer.read_until(b"\r\n0\r\n\r\n")
    await eventually(lambda: simulator.stats.completed == 2)


async def test_question_without_stream_gets_one_json_message(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    question = body("[[tokens=3 thinking_tokens=1]]", stream=False, max_tokens=3)
    async with client.post(f"{simulator.url}/v1/messages", json=question, headers=VERSION) as response:
        message = await response.json()
    assert response.content_type == "application/json"
    assert [(block["type"], block.get("text"), block.get("thinking")) for block in message["content"]] == [
        ("thinking", None, "t1"),
        ("text", "w1 w2", None),
    ]
    assert message["stop_reason"] == "max_tokens"
    assert message["usage"]["output_tokens"] == 3
    assert simulator.stats.stop_reasons == {"max_tokens": 1}


@pytest.mark.parametrize("line_end", ["lf", "crlf", "cr"])
@pytest.mark.parametrize("split", [0, 1, 3])
async def test_stream_in_any_line_ends_and_pieces_is_read_alike_by_an_independent_client(
    simulator: Simulator, line_end: str, split: int
) -> None:
    question = body(f"[[line_end={line_end} split={split} text='Zwölf Boxkämpfer 🥊 jagen']]")
    async with (
        httpx.AsyncClient(trust_env=False) as client,
        httpx_sse.aconnect_sse(
            client, "POST", f"{simulator.url}/v1/messages", json=question, headers=VERSION
        ) as source,
    ):
        received = [(event.event, json.loads(event.data)) async for event in source.aiter_sse()]
    assert received[-1] == ("message_stop", {"type": "message_stop"})
    assert "".join(data["delta"]["text"] for kind, data in received if kind == "content_block_delta") == (
        "Zwölf Boxkämpfer 🥊 jagen"
    )


@pytest.mark.parametrize(("split", "sizes"), [(1, {1}), (7, {7})])
async def test_split_stream_has_each_piece_in_its_own_chunk(simulator: Simulator, split: int, sizes: set[int]) -> None:
    async with peer_of(simulator) as peer:
        await peer.ask(f"[[tokens=2 seed=1 split={split}]]")
        received = await peer.read_until(b"\r\n0\r\n\r\n")
    content, found, ended = unchunked(received.partition(b"\r\n\r\n")[2])
    assert ended
    assert types(content)[-1] == "message_stop"
    # The last piece of each event is what remains.
    assert sizes <= set(found) <= set(range(1, split + 1))
    assert len(found) >= len(content) / split


async def test_split_stream_is_read_piece_by_piece_by_a_peer_on_the_same_loop(simulator: Simulator) -> None:
    class Reads(asyncio.Protocol):
        def __init__(self) -> None:
            self.sizes = list[int]()
            self.ended = asyncio.get_running_loop().create_future()

        def data_received(self, data: bytes) -> None:
            self.sizes.append(len(data))

        def connection_lost(self, exc: Exception | None) -> None:
            self.ended.set_result(None)

    async with peer_of(simulator) as peer:
        await peer.ask("[[tokens=2 split=1 close_delimited=true]]")
        _, reads = await asyncio.get_running_loop().create_connection(Reads, sock=peer.sock.dup())
        await reads.ended
    assert max(reads.sizes[1:]) <= 3, "the first has the headers"


async def test_close_delimited_stream_ends_with_its_connection(simulator: Simulator) -> None:
    async with peer_of(simulator) as peer:
        await peer.ask("[[tokens=4 close_delimited=yes]]")
        head, content, reset = await peer.read_to_end()
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert text_of(content) == "w1 w2 w3 w4"
    assert not reset


async def test_pace_is_kept(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """Lateness has no upper bound on a busy machine; earliness has."""
    question = body("[[tokens=20 pace=100 jitter=0 first_s=0.05 thinking_s=0.05]]")
    started = time.monotonic()
    async with client.post(f"{simulator.url}/v1/messages", json=question, headers=VERSION) as response:
        assert time.monotonic() - started >= 0.045
        await response.read()
    assert time.monotonic() - started >= 0.295


async def test_delay_of_one_event_delays_no_other_that_is_not_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own: the third event takes 2.5 s, the fourth follows at once, the fifth is in time."""
    now, written = 0.0, list[float]()

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Body:
        async def event(self, frame: bytes) -> None:
            nonlocal now
            written.append(now)
            now += float(frame)

    monkeypatch.setattr(server, "_sleep", sleep)
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: now))
    plan = iter([(0.0, b"0"), (1.0, b"0"), (1.0, b"2.5"), (1.0, b"0"), (2.0, b"0")])
    await server._play(plan, cast("server._Body", Body()))
    assert written == [0, 1, 2, 4.5, 5]


async def test_question_without_stream_takes_as_long_as_one_with(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    started = time.monotonic()
    question = body("[[tokens=10 pace=100]]", stream=False)
    async with client.post(f"{simulator.url}/v1/messages", json=question, headers=VERSION) as response:
        await response.read()
    assert time.monotonic() - started >= 0.095


async def test_many_streams_at_once_are_all_whole(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    async def read() -> bytes:
        question = body("[[tokens=20 pace=200]]")
        async with client.post(f"{simulator.url}/v1/messages", json=question, headers=VERSION) as response:
            return await response.read()

    streams = await asyncio.gather(*(read() for _ in range(100)))
    assert {text_of(stream) for stream in streams} == {Script(tokens=20).answer()}
    await eventually(lambda: (simulator.stats.completed, simulator.stats.active) == (100, 0))


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "retry_after"),
    [
        (400, "invalid_request_error", None),
        (401, "authentication_error", None),
        (429, "rate_limit_error", "3"),
        (500, "api_error", None),
        (503, "api_error", "3"),
        (529, "overloaded_error", "3"),
    ],
)
async def test_status_is_answered_in_the_shape_of_the_real_api(
    simulator: Simulator, client: aiohttp.ClientSession, status: int, kind: str, retry_after: str | None
) -> None:
    question = body(f"[[status={status} message='line\nevent: end']]")
    async with client.post(f"{simulator.url}/v1/messages", json=question, headers=VERSION) as response:
        answer = await response.json()
    assert response.status == status
    assert answer == {
        "type": "error",
        "error": {"type": kind, "message": "line\nevent: end"},
        "request_id": response.headers["request-id"],
    }
    assert response.headers.get("Retry-After") == retry_after
    assert simulator.stats.fault == 1
    assert simulator.records[-1].status == status


async def test_error_without_message_names_its_type(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    question = body("[[fault=error at=0 error_type=rate_limit_error]]")
    async with client.post(f"{simulator.url}/v1/messages", json=question, headers=VERSION) as response:
        stream = await response.read()
    error = {"type": "rate_limit_error", "message": "rate limit error"}
    assert events(stream) == [{"type": "error", "error": error}]


async def test_html_is_a_page_with_status_200(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    async with client.post(f"{simulator.url}/v1/messages", json=body("[[fault=html]]"), headers=VERSION) as response:
        assert (response.status, response.content_type) == (200, "text/html")
        assert (await response.text()).startswith("<!doctype html>")


async def test_redirect_points_where_the_script_says(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    question = body("[[fault=redirect location=http://127.0.0.1:9/x]]")
    async with client.post(
        f"{simulator.url}/v1/messages", json=question, headers=VERSION, allow_redirects=False
    ) as response:
        assert (response.status, response.headers["Location"]) == (302, "http://127.0.0.1:9/x")


async def test_cookie_is_set_and_its_return_counted(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    for prompt in ["[[tokens=1 cookie='sid=1; Path=/']]", "[[tokens=1]]"]:
        headers = VERSION | ({} if "cookie" in prompt else {"Cookie": "sid=1"})
        async with client.post(f"{simulator.url}/v1/messages", json=body(prompt), headers=headers) as response:
            await response.read()
            if "cookie" in prompt:
                assert response.headers["Set-Cookie"] == "sid=1; Path=/"
    assert simulator.stats.cookied == 1


async def test_no_events_is_headers_and_a_clean_end(simulator: Simulator) -> None:
    async with peer_of(simulator) as peer:
        await peer.ask("[[fault=no_events]]")
        received = await peer.read_until(b"0\r\n\r\n")
    assert received.partition(b"\r\n\r\n")[2] == b"0\r\n\r\n"
    await eventually(lambda: simulator.stats.fault == 1)


@pytest.mark.parametrize("rst", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("close_delimited", [False, True], ids=["chunked", "close_delimited"])
async def test_cut_at_each_byte_delivers_exactly_the_bytes_before_it(
    simulator: Simulator, rst: bool, close_delimited: bool
) -> None:

    def prompt(at: int) -> str:
        overrides = f"[[tokens=1 seed=1 fault=cut at={at} rst={rst} close_delimited={close_delimited}]]"
        return overrides.ljust(120)  # the answer tells the prompt's length

    async with peer_of(simulator) as peer:
        await peer.ask(prompt(1_000_000))
        _, whole, _ = await peer.read_to_end()
    whole = whole if close_delimited else unchunked(whole)[0]
    assert types(whole)[-1] == "message_stop"
    for at in range(len(whole) + 2):
        async with peer_of(simulator) as peer:
            await peer.ask(prompt(at))
            _, received, reset = await peer.read_to_end()
        content, ended = received, False
        if not close_delimited:
            content, _, ended = unchunked(received)
        assert content == whole[:at]
        assert reset == rst
        assert not ended
    assert simulator.stats.fault == len(whole) + 3


@pytest.mark.parametrize("rst", [False, True], ids=["fin", "rst"])
async def test_cut_behind_more_than_the_buffers_hold_loses_nothing_before_it(simulator: Simulator, rst: bool) -> None:
    """The peer starts to read only once the simulator is blocked: a reset must wait until all before it has arrived."""
    at = 3_000_001
    async with peer_of(simulator, receive_buffer=4096) as peer:
        await peer.ask(f"[[tokens=4000 token_bytes=1000 fault=cut at={at} rst={rst} close_delimited=true]]")
        await steady(simulator)
        assert simulator.stats.bytes_written < at
        _, content, reset = await peer.read_to_end()
    assert len(content) == at
    assert reset == rst


async def steady(simulator: Simulator) -> None:
    """Returns once the count of bytes has risen from zero and then stood still for a tenth of a second."""
    await eventually(lambda: simulator.stats.bytes_written > 0)
    last, since = -1, 0.0
    async with asyncio.timeout(60):
        while time.monotonic() - since < 0.1:
            if simulator.stats.bytes_written != last:
                last, since = simulator.stats.bytes_written, time.monotonic()
            await asyncio.sleep(0.005)


async def test_stall_sends_nothing_more_and_keeps_the_connection(simulator: Simulator) -> None:
    async with peer_of(simulator) as peer:
        await peer.ask("[[fault=stall at=3]]")
        await peer.read_until(b'{"type": "ping"}\n\n\r\n')
        await eventually(lambda: simulator.records[-1].events == 3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.read(), 0.1)
        assert simulator.stats.active == 1
    await eventually(lambda: simulator.stats.aborted == 1)


# --- the counts ---------------------------------------------------------------------------------------------------


async def test_reader_that_stops_stops_the_count_until_it_reads_on(simulator: Simulator) -> None:
    async with peer_of(simulator, receive_buffer=4096) as peer:
        await peer.ask("[[tokens=5000 token_bytes=1000]]")
        await steady(simulator)
        record = simulator.records[-1]
        assert record.bytes_written == simulator.stats.bytes_written < 80_000
        received = await peer.read_until(b"\r\n0\r\n\r\n")
        await eventually(lambda: record.outcome == "completed")
    content, _, _ = unchunked(received.partition(b"\r\n\r\n")[2])
    assert record.bytes_written == len(content) > 5_000_000


async def test_reader_that_stops_within_a_huge_event_is_counted_within_it(simulator: Simulator) -> None:
    async with peer_of(simulator, receive_buffer=4096) as peer:
        await peer.ask("[[fault=huge at=0 size=8000000]]")
        await steady(simulator)
        assert 0 < simulator.stats.bytes_written < 80_000


PHASES = {
    "waiting for the first byte": "[[first_s=60]]",
    "thinking": "[[thinking_s=60]]",
    "between two events": "[[pace=0.01]]",
    "stalled": "[[fault=stall at=5]]",
    "stalled before any event": "[[fault=stall at=0]]",
    "write-blocked": "[[tokens=5000 token_bytes=1000]]",
    "write-blocked before a reset": "[[tokens=5000 token_bytes=1000 fault=cut at=4000000 rst=true]]",
    "as fast as it can": "[[tokens=1000000 thinking_tokens=10 split=1]]",
}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("phase", PHASES)
async def test_peer_that_leaves_is_noticed_at_once_and_counted(simulator: Simulator, phase: str, reset: bool) -> None:
    async with peer_of(simulator, receive_buffer=4096) as peer:
        await peer.ask(PHASES[phase])
        await eventually(lambda: simulator.stats.active == 1)
        if phase != "waiting for the first byte":
            await peer.read_until(b"\r\n\r\n")
        if phase.startswith("write-blocked"):
            await steady(simulator)
        left = time.monotonic()
        if reset:
            peer.reset()
        else:
            peer.sock.close()
        await eventually(lambda: simulator.stats.active == 0)
    record = simulator.records[-1]
    assert (simulator.stats.aborted, record.outcome) == (1, "aborted")
    assert record.ended is not None
    assert record.ended - left < 5  # not only by its next write, a minute later


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_peer_that_leaves_within_its_question_is_counted(simulator: Simulator, reset: bool) -> None:
    async with peer_of(simulator) as peer:
        await peer.ask("[[tokens=1]]", complete=False)
        await eventually(lambda: simulator.stats.active == 1)
        if reset:
            peer.reset()
        else:
            peer.sock.close()
        await eventually(lambda: simulator.stats.active == 0)
    assert simulator.stats.aborted == 1


async def test_stats_are_served_as_json_and_keep_no_key(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    for headers in [VERSION, VERSION | {"x-api-key": "canary-key"}]:
        async with client.post(f"{simulator.url}/v1/messages", json=body("[[tokens=1]]"), headers=headers) as response:
            await response.read()
    await eventually(lambda: simulator.stats.completed == 2)
    async with client.get(f"{simulator.url}/stats") as response:
        text = await response.text()
    stats = json.loads(text)
    assert (stats["requests"], stats["keyed"], stats["active"]) == (2, 1, 0)
    assert stats["stop_reasons"] == {"end_turn": 2}
    assert "canary" not in text + repr(simulator.records) + repr(simulator.stats)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"{", "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b"[" * 100_000, "Invalid JSON: recursion limit"),
        (b'{"max_tokens":1,"messages":[{"role":"user","content":"x"}]}', "model: Field required"),
        (b'{"model":"m","messages":[{"role":"user","content":"x"}]}', "max_tokens: Field required"),
        (b'{"model":"m","max_tokens":0,"messages":[{"role":"user","content":"x"}]}', "max_tokens: "),
        (b'{"model":"m","max_tokens":1,"messages":[]}', "messages: "),
        (b'{"model":"m","max_tokens":1,"messages":[{"role":"cat","content":"x"}]}', "messages.0.role: "),
        (b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"x"}],"stream":"yes"}', "stream: "),
        (b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"[[x=1]]"}]}', "script: x: no such name"),
        (json.dumps(body("[[tokens=9999 token_bytes=9999]]", stream=False)).encode(), "stream: must be true"),
    ],
)
async def test_wrong_body_is_refused_by_the_name_of_its_field(
    simulator: Simulator, client: aiohttp.ClientSession, raw: bytes, named: str
) -> None:
    async with client.post(f"{simulator.url}/v1/messages", data=raw, headers=VERSION) as response:
        answer = await response.json()
    assert response.status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"].startswith(named)
    assert (simulator.stats.refused, simulator.records[-1].status) == (1, 400)


async def test_request_without_version_is_refused(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    async with client.post(f"{simulator.url}/v1/messages", json=body()) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == "anthropic-version: header is required"


async def test_body_over_the_limit_is_refused(client: aiohttp.ClientSession) -> None:
    class Small(Simulator):
        MAX_BODY_BYTES = 200

    async with Small(Script(pace=0, tokens=1)) as simulator:
        for size, status in [(200, 200), (201, 413)]:
            raw = json.dumps(body()).ljust(size)
            async with client.post(f"{simulator.url}/v1/messages", data=raw, headers=VERSION) as response:
                assert response.status == status
                await response.read()
        assert simulator.stats.refused == 1


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [("/v1/elsewhere", 404, "not_found_error"), ("/v1/messages", 405, "invalid_request_error")],
)
async def test_unknown_address_is_refused_as_json(
    simulator: Simulator, client: aiohttp.ClientSession, path: str, status: int, kind: str
) -> None:
    async with client.get(simulator.url + path) as response:
        assert response.status == status
        assert (await response.json())["error"]["type"] == kind


async def test_root_explains_each_field(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    async with client.get(simulator.url) as response:
        text = await response.text()
    assert text.startswith("POST /v1/messages ")
    assert all(f"  {name}=" in text for name in Script.model_fields)


async def test_only_the_last_user_message_scripts_the_answer(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    messages = [
        {"role": "user", "content": "[[tokens=9]]"},
        {"role": "assistant", "content": "[[nonsense]]"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "[[tokens=2]]"}]},
        {"role": "assistant", "content": "Well, [["},
    ]
    question = body(messages=messages, system="[[nonsense]]", temperature=1)
    async with client.post(f"{simulator.url}/v1/messages", json=question, headers=VERSION) as response:
        assert text_of(await response.read()) == "w1 w2"


# --- start and close ----------------------------------------------------------------------------------------------


def open_sockets() -> int:
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the directory
            count += str(descriptor.readlink()).startswith("socket:")
    return count


async def test_close_ends_each_connection_and_task_whatever_it_does() -> None:
    async with contextlib.AsyncExitStack() as stack:
        sockets = open_sockets()
        simulator = Simulator(Script(pace=0))
        await simulator.start()
        peers = []
        for prompt in PHASES.values():
            peers.append(await stack.enter_async_context(peer_of(simulator, receive_buffer=4096)))
            await peers[-1].ask(prompt)
        for idle in range(2):
            peers.append(await stack.enter_async_context(peer_of(simulator)))
            await peers[-1].ask("[[tokens=1]]", complete=idle == 0)
        await eventually(lambda: (simulator.stats.active, simulator.stats.completed) == (len(PHASES) + 1, 1))
        async with asyncio.timeout(60):
            await asyncio.gather(simulator.close(), simulator.close())
            await simulator.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert (simulator.stats.active, simulator.stats.closed) == (0, len(PHASES) + 1)
        # Also those of write-blocked connections, whose peers have read nothing.
        await eventually(lambda: open_sockets() == sockets + len(peers))
        for peer in peers:
            async with asyncio.timeout(60):
                await peer.read_to_end()
        with pytest.raises(ConnectionRefusedError):
            async with peer_of(simulator):
                pass


async def test_closed_simulator_can_start_again(client: aiohttp.ClientSession) -> None:
    simulator = Simulator(Script(pace=0))
    for _ in range(2):
        url = await simulator.start()
        async with client.post(f"{url}/v1/messages", json=body(), headers=VERSION) as response:
            assert text_of(await response.read()) == simulator.script.answer()
        await simulator.close()
    assert simulator.stats.completed == 2


async def test_start_on_a_taken_port_fails_and_leaves_nothing_behind(simulator: Simulator) -> None:
    second = Simulator(port=urlsplit(simulator.url).port or 0)
    before = asyncio.all_tasks()
    with pytest.raises(OSError, match="in use"):
        await second.start()
    assert asyncio.all_tasks() == before
    await second.close()


async def test_records_are_bounded(client: aiohttp.ClientSession) -> None:
    class Forgetful(Simulator):
        KEPT_RECORDS = 2

    async with Forgetful(Script(pace=0, tokens=1)) as simulator:
        for _ in range(3):
            async with client.post(f"{simulator.url}/v1/messages", json=body(), headers=VERSION) as response:
                await response.read()
        assert (len(simulator.records), simulator.stats.requests) == (2, 3)
