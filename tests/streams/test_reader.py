"""Readers that behave badly, and the bytes that they get.

What reader.py, outlet.py and response.py take for granted of their libraries is tested here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest
import uvloop
from aiohttp import web
from aiohttp_sse import EventSourceResponse
from conftest import Server, eventually, prompt, serving, settled
from hypothesis import given, settings
from hypothesis import strategies as st
from rawclient import ChunkedDecoder, Frame, RawClient, Written, parse
from structlog.testing import capture_logs

from aisse.app import runner_arguments
from aisse.formats.anthropic import Anthropic
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.settings import Settings
from aisse.sse import HEARTBEAT, frame, opening, reconnect
from aisse.streams import sweep as sweep_module
from aisse.streams.endings import Reason
from aisse.streams.leave import LeaveTime
from aisse.streams.outlet import Outlet
from aisse.streams.reader import Reader
from aisse.streams.registry import Registry
from aisse.streams.response import RETRY_MS, StreamResponse
from aisse.streams.stream import State, Stream
from aisse.upstream.client import Upstream
from aisse.upstream.question import Question

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

    from aisse.simulator import Simulator
    from aisse.upstream.connection import UpstreamResponse

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SOAK = os.environ.get("TESTS_SOAK") == "1"
NOWHERE = "http://127.0.0.1:9"
STREAM_ID = "s" * 22

# Everything that a client which never reads can make the server write: the client's receive buffer, the server's
# send buffer, both as the kernel counts them, and the bytes that count as full.
SWALLOWED_BYTES = 320 << 10

# Of a fixed size: the kernel makes a buffer that it may size itself larger while nobody reads, and takes bytes late.
RECEIVE_BUFFER_BYTES = 64 << 10


@dataclass
class OneStream:
    """A stream that the test itself publishes to; each GET attaches a reader, `?after=N` from event N on."""

    stream: Stream
    registry: Registry
    settings: Settings
    runner: web.AppRunner
    readers: list[Reader] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)
    """When each reader was about to begin, on the loop's clock."""

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.runner.addresses[0][:2]
        return host, port

    def publish(self, count: int = 1, size: int = 1000) -> None:
        """Publishes `count` numbered frames of about `size` bytes in one call, as one chunk of an upstream would be."""
        first = self.stream.log.last_seq + 1
        frames = [
            frame("content_block_delta", f"{seq}:{'x' * size}", f"{STREAM_ID}.{seq}")
            for seq in range(first, first + count)
        ]
        self.stream.publish(b"".join(frames), first + count - 1)

    @contextlib.asynccontextmanager
    async def reading(
        self, *, receive_buffer_bytes: int = RECEIVE_BUFFER_BYTES
    ) -> AsyncIterator[tuple[RawClient, Reader]]:
        """A client whose reader stands at the tail, and that reader."""
        connecting = RawClient.connect(self.address, receive_buffer_bytes=receive_buffer_bytes)
        async with await connecting as client:
            count = len(self.readers)
            await client.get("/")
            await client.answered()
            assert client.status == 200
            reader = self.readers[count]
            await eventually(lambda: is_at_tail(reader))
            yield client, reader

    async def fill(self, reader: Reader) -> None:
        """Publishes frame by frame until the client's kernel takes no more and `reader` is behind."""
        async with asyncio.timeout(60):
            while not is_blocked(reader):
                self.publish()
                await asyncio.sleep(0)
                if is_blocked(reader):
                    # The client's kernel may owe an acknowledgement: up to 40 ms, and more where others keep it busy.
                    await eventually(settled(lambda: reader.buffered_bytes))
        self.publish()
        assert not is_at_tail(reader)


@contextlib.asynccontextmanager
async def one_stream(**settings: Any) -> AsyncIterator[OneStream]:
    effective = Settings.model_validate({"upstream": NOWHERE, **settings})
    registry = Registry(effective, Upstream(NOWHERE, effective, Anthropic(effective)))
    stream = Stream(
        STREAM_ID,
        MemoryLog(ReplayMemory(effective.replay_bytes)),
        now=asyncio.get_running_loop().time(),
        read_ahead_bytes=effective.read_ahead_bytes,
        stream_bytes=effective.stream_bytes,
        leave=LeaveTime(effective.leave_s),
        on_left=lambda _: None,
        on_end=lambda _: None,
    )
    stream.begin()
    readers: list[Reader] = []
    begun: list[float] = []

    async def read(request: web.Request) -> web.StreamResponse:
        if "full" in request.query:
            await fill_kernel(request)
        after = int(request.query.get("after", 0))
        compact = Anthropic(effective).compact if "compact" in request.query else None
        reader = Reader(stream, effective, after, compact=compact)
        readers.append(reader)
        begun.append(asyncio.get_running_loop().time())
        with registry.reading(reader):
            return await reader.run(request)

    async with listening(read, effective) as runner:
        await registry.start()
        try:
            yield OneStream(stream, registry, effective, runner, readers, begun)
        finally:
            await registry.close()


@contextlib.asynccontextmanager
async def listening(handler: Handler, settings: Settings | None = None) -> AsyncIterator[web.AppRunner]:
    """An application with one handler, and limits as ours."""
    app = web.Application()
    app.router.add_get("/", handler)
    limits = runner_arguments(settings or Settings(upstream=NOWHERE))
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0, **limits)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner
    finally:
        await runner.cleanup()


async def fill_kernel(request: web.Request) -> None:
    """What answers that nobody read leave behind: a kernel that takes nothing more, and a little that waits for it."""
    transport = request.transport
    assert transport is not None
    while transport.get_write_buffer_size() == 0:
        transport.write(b"-" * 2048)
        await asyncio.sleep(0)


def is_blocked(reader: Reader) -> bool:
    return reader._outlet is not None and reader._outlet.full


def outlet_of(reader: Reader) -> Outlet:
    assert reader._outlet is not None
    return reader._outlet


def is_at_tail(reader: Reader) -> bool:
    return reader in reader.stream._caught_up


def written_bytes(reader: Reader) -> int:
    return outlet_of(reader).output_bytes


def suspends(coroutine: Coroutine[Any, Any, None]) -> bool:
    """Runs a coroutine to its end or to where it first waits; it goes no further."""
    try:
        coroutine.send(None)
    except StopIteration:
        return False
    coroutine.close()
    return True


def has_chunks(count: int) -> Callable[[RawClient], bool]:
    return lambda client: len(client.body.chunks) >= count


def has_heartbeats(count: int) -> Callable[[RawClient], bool]:
    return lambda client: client.body.chunks.count(b": heartbeat\n") >= count


async def seconds(duration: float) -> None:
    """Lets time pass in which something must not happen."""
    await asyncio.sleep(duration)


def sequence(client: RawClient) -> list[int]:
    """The numbers of the frames that a client has whole, and that are what was published."""
    frames = client.written.frames
    for item in frames:
        assert item.id == f"{STREAM_ID}.{item.seq}"
        assert item.event == "end" or item.data.startswith(f"{item.seq}:")
    return [item.seq for item in frames]


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """None within a test: what happens anyway needs none."""
    monkeypatch.setattr(sweep_module, "SWEEP_S", 3600.0)


@pytest.fixture
def fast_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep each 50 ms instead of each second; tests scale `stall_s` and `heartbeat_s` with it."""
    monkeypatch.setattr(sweep_module, "SWEEP_S", 0.05)


# --- what the libraries do ----------------------------------------------------------------------------------------


async def test_write_without_drain_never_suspends_even_where_the_socket_is_full() -> None:
    async with one_stream() as one, one.reading() as (_, reader):
        writer = outlet_of(reader)._writer
        assert not suspends(writer.write(b"x" * 100, drain=False))
        await one.fill(reader)
        assert not suspends(writer.write(b"x" * 200_000, drain=False))
        # The same write as everybody else would do it: the socket is indeed full.
        assert suspends(writer.write(b"x", drain=True))


async def test_ping_task_of_aiohttp_sse_writes_nothing() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = StreamResponse(STREAM_ID, Settings()) if "ours" in request.query else EventSourceResponse()
        response._ping_interval = 0.001
        await response.prepare(request)
        assert response._ping_task is not None
        await asyncio.wait([response._ping_task], timeout=0.1)
        ended = response._ping_task.done()
        await response.write(b"ended" if ended else b"running")
        response._ping_task.cancel()
        return response

    async with listening(handler) as runner:
        bodies = []
        for path in ("/?ours", "/"):
            async with await RawClient.connect(runner.addresses[0][:2]) as client:
                await client.get(path)
                await client.answered()
                await client.read_to_end()
                bodies.append(b"".join(client.body.chunks))
    assert bodies[0] == b"ended"
    # The one that is overridden does write, by the same method: should it be renamed, this fails.
    assert b": ping" in bodies[1]


async def test_write_buffer_limit_of_the_setting_is_where_writing_pauses() -> None:
    async with one_stream(write_buffer_bytes=8192) as one, one.reading() as (client, reader):
        assert outlet_of(reader)._transport.get_write_buffer_limits() == (2048, 8192)
        await one.fill(reader)
        # One past the limit, by no more than the write that crossed it.
        assert 8192 < reader.buffered_bytes <= 8192 + 1200
        one.stream.finish(Reason.COMPLETE)
        await client.read_to_end()


@pytest.mark.parametrize("query", ["", "?compact"])
@pytest.mark.parametrize("size", [1000, 100_000])
async def test_reader_that_takes_nothing_of_a_long_log_has_few_bytes_waiting(query: str, size: int) -> None:
    """Also one that may merge events and finds none that can be."""
    async with one_stream() as one, await RawClient.connect(one.address, receive_buffer_bytes=8 << 10) as client:
        for _ in range(4_000_000 // size):
            one.publish(size=size)
        await client.get("/" + query)
        await eventually(lambda: bool(one.readers) and is_blocked(one.readers[0]))
        # One write that was let in just below the limit, and the event of it that did not fit.
        assert one.readers[0].buffered_bytes <= 2 * one.settings.write_buffer_bytes + size + 200


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels report the size that was asked for")
async def test_send_buffer_of_the_setting_is_what_the_kernel_has() -> None:
    async with one_stream(send_buffer_bytes=16 << 10) as one, one.reading() as (_, reader):
        sock = outlet_of(reader)._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * (16 << 10)  # socket(7): doubled


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such limit")
async def test_kernel_gives_a_silent_peer_up_after_the_sweep_had_time_to_evict_it() -> None:
    async with one_stream(stall_s=7) as one, one.reading() as (_, reader):
        sock = outlet_of(reader)._transport.get_extra_info("socket")
        # The sweep sees the last byte taken up to a second late, and the end of stall_s as much again.
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > (7 + 2 * sweep_module.SWEEP_S) * 1000


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="the kernel has no such limit")
async def test_kernel_is_asked_to_keep_little_that_is_not_sent() -> None:
    async with one_stream() as one, one.reading() as (_, reader):
        sock = outlet_of(reader)._transport.get_extra_info("socket")
        limit = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
        assert limit == one.settings.write_buffer_bytes // 4


async def test_exception_in_a_reader_cuts_its_client_off_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers other errors would write its answer into the middle of the stream."""

    async def fail(_self: Reader, _outlet: Outlet) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Reader, "_write_what_is_logged", fail)
    async with one_stream() as one:
        one.publish(3)
        async with await RawClient.connect(one.address) as client:
            await client.get("/")
            await client.answered()
            await client.read_to_end()
            assert client.broken
            assert not client.body.ended
            assert client.body.rest == b""
            assert sequence(client) == [1, 2, 3]
        assert one.stream.readers == 0


async def test_exception_in_a_reader_that_takes_nothing_ends_its_connection_at_once() -> None:
    """To close it would wait for what is left to be taken, and no sweep looks after it any more."""
    async with one_stream(stall_s=3600) as one, one.reading() as (_, reader):
        await one.fill(reader)
        protocol = outlet_of(reader)._protocol
        await eventually(lambda: protocol._drain_waiter is not None)
        assert protocol._drain_waiter is not None
        protocol._drain_waiter.set_exception(RuntimeError("a bug"))
        await eventually(lambda: one.stream.readers == 0)
        assert one.runner.server is not None
        await eventually(lambda server=one.runner.server: not server.connections)  # type: ignore[misc]


async def test_reader_that_parts_has_all_from_before_and_nothing_of_the_same_step() -> None:
    """It comes back with its cursor for the rest. A write to what closes would take back what waits."""
    async with one_stream() as one, one.reading() as (client, reader):
        while reader.buffered_bytes == 0:
            one.publish(size=500)
        assert is_at_tail(reader)
        last = one.stream.log.last_seq
        reader.part()
        one.publish(3)
        await client.read_to_end()
        assert sequence(client) == list(range(1, last + 1))
        assert not client.body.ended


async def test_compact_reader_of_a_long_backlog_lets_others_run_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted are the reads of the log within one step of the loop."""
    read = MemoryLog.read
    reads: list[int] = [0]

    def counted(log: MemoryLog, position: int, limit: int = 1 << 14) -> bytes:
        reads[-1] += 1
        return read(log, position, limit)

    monkeypatch.setattr(MemoryLog, "read", counted)

    async def count_steps() -> None:
        while True:
            await asyncio.sleep(0)
            reads.append(0)

    async with one_stream() as one, await RawClient.connect(one.address, receive_buffer_bytes=1 << 20) as client:
        for _ in range(400):
            first = one.stream.log.last_seq + 1
            data = '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"x"}}'
            some = [frame("content_block_delta", data, f"{STREAM_ID}.{first + n}") for n in range(120)]
            one.stream.publish(b"".join(some), first + 119)
        one.stream.finish(Reason.COMPLETE)
        counting = asyncio.create_task(count_steps())
        await client.get("/?compact")
        await client.answered()
        await client.read_to_end()
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
        assert sum(reads) > 400
        # One write's with the head and one more.
        assert max(reads) <= 70


# --- the tail -----------------------------------------------------------------------------------------------------


async def test_reader_at_the_tail_is_written_in_the_step_that_publishes() -> None:
    async with one_stream() as one, one.reading() as (client, reader):
        for _ in range(20):
            before = written_bytes(reader)
            one.publish(size=500)
            # Nothing was awaited: whatever is written by now was written by publish itself.
            assert written_bytes(reader) >= before + 500
            assert is_at_tail(reader)
        await client.read_until(has_chunks(21))
        assert sequence(client) == list(range(1, 21))


async def test_frames_of_one_publish_reach_the_client_in_one_chunk() -> None:
    async with one_stream() as one, one.reading() as (client, _):
        for count in (1, 3, 7):
            one.publish(count)
        await client.read_until(has_chunks(4))
        opening, *chunks = client.body.chunks
        assert parse(opening).opening == f"{STREAM_ID}.0"
        assert [len(parse(chunk).frames) for chunk in chunks] == [1, 3, 7]


async def test_opening_leaves_with_the_headers_in_one_write() -> None:
    """Firefox gives up for good on a response that breaks between its headers and its first byte."""
    async with one_stream() as one, await RawClient.connect(one.address) as client:
        await client.get("/")
        received = await asyncio.get_running_loop().sock_recv(client.sock, 64 << 10)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"id: " + STREAM_ID.encode() + b".0\n" in body


# --- a reader that stops reading ----------------------------------------------------------------------------------


async def test_reader_that_stops_reading_blocks_early_and_catches_up_in_order() -> None:
    async with one_stream() as one, one.reading() as (client, reader):
        one.publish(10)
        await client.read_until(has_chunks(2))
        for _ in range(300):
            one.publish(10)
            await asyncio.sleep(0)
        assert is_blocked(reader)
        assert not is_at_tail(reader)
        assert written_bytes(reader) < SWALLOWED_BYTES
        assert one.stream.log.tail > 3_000_000
        one.stream.finish(Reason.COMPLETE)
        await client.read_to_end()
        assert client.body.ended
        assert sequence(client) == list(range(1, 3012))
        assert client.written.frames[-1].event == "end"


async def test_reader_that_catches_up_rejoins_the_tail() -> None:
    async with one_stream() as one, one.reading() as (client, reader):
        for _ in range(3):
            await one.fill(reader)
            one.publish(100)
            await client.read_until(lambda _: is_at_tail(reader))
            before = written_bytes(reader)
            one.publish()
            assert written_bytes(reader) > before
        one.stream.finish(Reason.COMPLETE)
        await client.read_to_end()
        assert sequence(client) == list(range(1, one.stream.log.last_seq + 1))


async def test_frame_larger_than_every_buffer_arrives_whole() -> None:
    async with one_stream() as one, one.reading() as (client, reader):
        one.publish(size=900_000)
        one.publish(2)
        one.publish(size=900_000)
        await eventually(lambda: is_blocked(reader))
        one.stream.finish(Reason.COMPLETE)
        await client.read_to_end()
        assert sequence(client) == [1, 2, 3, 4, 5]


async def test_reader_that_stops_reading_stops_the_upstream(simulator: Simulator) -> None:
    async with serving(simulator.url) as server, await RawClient.connect(server.address) as client:
        await client.post(prompt("[[tokens=4000 token_bytes=1000]]"))
        await client.answered()
        (reader,) = server.registry._readers
        await eventually(lambda: is_blocked(reader) and reader.stream.holds_back)
        await eventually(settled(lambda: simulator.stats.bytes_written))
        stopped_at = simulator.stats.bytes_written
        assert stopped_at < 1_000_000
        await seconds(0.5)
        assert simulator.stats.bytes_written == stopped_at
        await client.read_to_end()
        frames = client.written.frames
    assert [item.seq for item in frames] == list(range(1, len(frames) + 1))
    assert sum(item.event == "content_block_delta" for item in frames) == 4000
    assert frames[-1].event == "end"


async def test_reader_that_catches_up_before_the_relay_has_its_turn_does_not_leave_the_upstream_paused() -> None:
    """The chunk that closes the gate pauses the socket at once; the relay's task only then learns of it."""

    class Body:
        """An upstream's body that the test hands out."""

        size = 0
        ended = False
        paused = False

        def listen(self, _content: object, on_data: Callable[[bytes], None], _on_end: object) -> None:
            self.on_data = on_data

        def pause(self) -> None:
            self.paused = True

        def resume(self) -> None:
            self.paused = False

        def abort(self) -> None:
            self.ended = True

    class Response:
        content = None
        raw_body = Body()
        request_id = None

        def close(self) -> None:
            pass

    class Nowhere(Upstream):
        async def open(self, question: Question) -> UpstreamResponse:
            return cast("UpstreamResponse", response)

    class Behind:
        """A reader whose own task reads the log."""

        position = 0

        def push(self, _frames: bytes) -> bool:
            return False

        def wake(self) -> None:
            pass

    response = Response()
    body = response.raw_body
    settings = Settings(upstream=NOWHERE)
    registry = Registry(settings, Nowhere(NOWHERE, settings, Anthropic(settings)))
    stream = registry.create(Question([b"{}"]), leave_s=60)
    stream.attach(Behind())
    await eventually(lambda: hasattr(body, "on_data"))
    for _ in range(3):
        body.on_data(frame("content_block_delta", "x" * (70 << 10)))
        assert body.paused
        assert stream.holds_back
        stream.advance(stream.log.tail)
        await eventually(lambda: not body.paused)
    with capture_logs() as logs:
        await registry.close()
    assert [line["event"] for line in logs] == ["stream ended"]


async def test_neighbour_of_a_stalled_reader_never_leaves_the_tail() -> None:
    async with one_stream() as one, one.reading() as (_, stalled), one.reading() as (client, reader):
        for number in range(1, 2001):
            before = written_bytes(reader)
            one.publish()
            assert written_bytes(reader) > before
            await client.read_until(has_chunks(number + 1))
        assert is_blocked(stalled)
        assert is_at_tail(reader)
        assert sequence(client) == list(range(1, 2001))


# --- eviction -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast_sweep")
async def test_evicted_reader_is_cut_off_without_the_end_of_its_body_and_the_others_go_on() -> None:
    async with (
        one_stream(stall_s=0.4) as one,
        one.reading() as (stalled_client, stalled),
        one.reading() as (client, _),
    ):
        async with asyncio.timeout(60):
            while stalled in one.registry._readers:
                one.publish()
                await client.read()
                await asyncio.sleep(0.001)  # else the stream's limit is reached first
        assert one.stream.readers == 1
        one.publish(3)
        one.stream.finish(Reason.COMPLETE)
        await client.read_to_end()
        await stalled_client.read_to_end()
        last = one.stream.log.last_seq
        assert client.body.ended
        assert sequence(client) == list(range(1, last + 1))
        assert stalled_client.broken
        assert not stalled_client.body.ended
        got = sequence(stalled_client)
        assert got == list(range(1, len(got) + 1))
        assert 0 < len(got) < last


@pytest.mark.usefixtures("fast_sweep")
async def test_evicted_reader_can_come_back_with_its_cursor() -> None:
    async with one_stream(stall_s=0.4) as one, one.reading() as (client, reader):
        await one.fill(reader)
        await eventually(lambda: not one.registry._readers)
        await client.read_to_end()
        got = sequence(client)
        async with await RawClient.connect(one.address) as again:
            await again.get(f"/?after={got[-1]}")
            await again.answered()
            one.stream.finish(Reason.COMPLETE)
            await again.read_to_end()
            assert again.written.opening == f"{STREAM_ID}.{got[-1]}"
            assert got + sequence(again) == list(range(1, one.stream.log.last_seq + 1))


@pytest.mark.usefixtures("fast_sweep")
async def test_stream_of_an_evicted_reader_stays_stopped_and_ends_as_abandoned(simulator: Simulator) -> None:
    async with (
        serving(simulator.url, stall_s=0.4, leave_s=0.6) as server,
        await RawClient.connect(server.address) as client,
    ):
        await client.post(prompt("[[tokens=4000 token_bytes=1000]]"))
        await client.answered()
        (reader,) = server.registry._readers
        stream = reader.stream
        await eventually(lambda: server.registry.readers == 0)
        stopped_at = stream.log.tail
        await eventually(lambda: server.registry.active_streams == 0)
        assert stream.reason is Reason.ABANDONED
        assert stream.leave.unread_since is not None
        assert stream.ended is not None
        assert stream.leave.unread_since + 0.6 <= stream.ended
        # Its `error` and `end` were added, and no more: what it had not taken already exceeds what it comes back for.
        assert stream.log.tail < stopped_at + 1000
        await eventually(lambda: simulator.stats.aborted == 1)
        await client.read_to_end()
        assert not client.body.ended


async def test_stall_is_counted_from_when_the_socket_was_seen_with_room_or_took_a_byte() -> None:
    """Also where nothing was taken before: a connection that bytes of an earlier response wait on, below the mark."""
    model = Model(2048, 64 << 10)
    model.arrive(0, compacted=False)
    (one,) = model.connections
    await model.turns(lambda: one.is_at_tail)
    reader = one.reader
    assert reader is not None
    now = round(asyncio.get_running_loop().time()) + 1000
    assert reader.stalled_for(now) == 0
    while not one.wire.paused:
        model.publish([("other", 900)])
    assert reader.stalled_for(now + 1) == 1
    one.wire.give_room(100)
    assert one.wire.paused
    assert [reader.stalled_for(now + passed) for passed in (2, 3, 4)] == [0, 1, 2]
    await model.close()


@pytest.mark.usefixtures("fast_sweep")
async def test_reader_that_is_slow_but_moving_is_never_evicted() -> None:
    """The kernel reports progress in steps: up to 130 KB with an ordinary buffer on loopback, some KB with a small one.

    So does one who reads 32 KiB each 100 ms from the first, and one who reads 4 KiB from the second.
    """
    loop = asyncio.get_running_loop()
    async with (
        one_stream(stall_s=2) as one,
        one.reading() as (ordinary, reader),
        one.reading(receive_buffer_bytes=8 << 10) as (small, small_reader),
    ):
        for _ in range(600):
            one.publish(10)
        until = loop.time() + 5
        looks = blocked = 0
        while loop.time() < until:
            await ordinary.read(32 << 10)
            await small.read(4 << 10)
            await asyncio.sleep(0.1)
            looks += 1
            blocked += is_blocked(reader) and is_blocked(small_reader)
        # All that time both were behind and their sockets full: only their progress has kept them.
        assert blocked > 0.8 * looks
        assert one.registry._readers == {reader, small_reader}
        for client in (ordinary, small):
            assert not client.broken
            got = sequence(client)
            assert got == list(range(1, len(got) + 1))
        # And once they stop, they are.
        await eventually(lambda: one.registry.readers == 0, timeout_s=60)


@pytest.mark.usefixtures("fast_sweep")
async def test_reader_that_stops_within_the_last_bytes_is_evicted_too() -> None:
    """Too few bytes wait to block writing; left alone, the connection would stay for as long as the process."""
    async with one_stream(stall_s=0.4) as one, one.reading() as (client, reader):
        waiting = 0
        while waiting == 0:
            one.publish()
            await asyncio.sleep(0.002)
            waiting = reader.buffered_bytes
        assert not is_blocked(reader)
        one.stream.finish(Reason.COMPLETE)
        server = one.runner.server
        assert server is not None
        await eventually(lambda: not server.connections)
        assert one.registry.readers == 0
        await client.read_to_end()
        assert not client.body.ended


@pytest.mark.usefixtures("fast_sweep")
async def test_reader_on_a_connection_that_is_full_already_has_its_whole_stall_time() -> None:
    loop = asyncio.get_running_loop()
    async with one_stream(stall_s=0.6) as one, await RawClient.connect(one.address) as client:
        one.publish(100)
        await client.get("/?full")
        await eventually(lambda: bool(one.readers) and is_blocked(one.readers[0]))
        await eventually(lambda: one.registry.readers == 0)
        assert loop.time() - one.begun[0] >= 0.6


async def test_reader_that_fails_in_a_write_is_cut_off_and_the_stream_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with one_stream() as one, one.reading() as (bad_client, bad), one.reading() as (client, _):

        def fail(_self: Outlet, _data: bytes) -> None:
            raise RuntimeError("a bug")

        one.publish()
        await bad_client.read_until(has_chunks(2))
        with monkeypatch.context() as patch:
            write = Outlet.write
            patch.setattr(Outlet, "write", lambda self, data: (fail if self is outlet_of(bad) else write)(self, data))
            one.publish()
            await eventually(lambda: one.stream.readers == 1)
            await bad_client.read_to_end()
            assert one.stream.finish(Reason.COMPLETE)
        await client.read_to_end()
        assert sequence(client) == [1, 2, 3]
        assert sequence(bad_client) == [1]
        assert not bad_client.body.ended


# --- leaving ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_sweep")
@pytest.mark.parametrize(
    ("how", "stalled"),
    [("close", False), ("close", True), ("reset", False), ("reset", True), ("shutdown", False)],
)
async def test_reader_that_leaves_is_detached_at_once(how: str, stalled: bool) -> None:
    async with one_stream() as one, one.reading() as (client, reader):
        one.publish()
        if stalled:
            await one.fill(reader)
        if how == "close":
            client.close()
        elif how == "reset":
            client.reset()
        else:
            client.sock.shutdown(socket.SHUT_WR)
        await eventually(lambda: one.stream.readers == 0)
        assert one.registry.readers == 0
        # One that had taken everything may come back, and the stream goes on for it.
        assert one.stream.last_reader_stalled == stalled


@pytest.mark.usefixtures("fast_sweep")
async def test_reader_that_half_closes_and_takes_nothing_is_evicted() -> None:
    """Its connection is closing then, but stays for as long as bytes wait for it."""
    async with one_stream(stall_s=0.4) as one, one.reading() as (client, reader):
        await one.fill(reader)
        client.sock.shutdown(socket.SHUT_WR)
        await eventually(lambda: one.stream.readers == 0)


@pytest.mark.usefixtures("no_sweep")
async def test_reader_that_half_closes_with_a_few_bytes_waiting_leaves_at_the_next_frame() -> None:
    async with one_stream() as one, one.reading() as (client, reader):
        while reader.buffered_bytes == 0:
            one.publish()
            await asyncio.sleep(0.002)
            if reader.buffered_bytes:
                await asyncio.sleep(0.15)
        assert not is_blocked(reader)
        client.sock.shutdown(socket.SHUT_WR)
        transport = outlet_of(reader)._transport
        await eventually(transport.is_closing)
        assert one.stream.readers == 1
        one.publish()
        await eventually(lambda: one.stream.readers == 0)


# --- heartbeats ---------------------------------------------------------------------------------------------------


async def test_heartbeats_come_in_their_interval_while_the_upstream_thinks(simulator: Simulator) -> None:
    loop = asyncio.get_running_loop()
    async with (
        serving(simulator.url, heartbeat_s=2, first_byte_commit_s=0) as server,
        await RawClient.connect(server.address) as client,
    ):
        begun = loop.time()
        await client.post(prompt("[[first_s=60]]"))
        await client.answered()
        assert client.status == 200
        assert loop.time() - begun < 4  # the setting's default is 5
        times, sweeps = [begun], [len(server.registry.figures._rate._samples)]
        for count in range(1, 3):
            await client.read_until(has_heartbeats(count))
            times.append(loop.time())
            sweeps.append(len(server.registry.figures._rate._samples))
        # Counted in sweeps, for a busy machine delays those, too. The first only sees that the opening was written; a
        # heartbeat is due two later, and this client may notice it one too late.
        assert sweeps[1] - sweeps[0] <= 4
        assert sweeps[2] - sweeps[1] <= 3
        assert all(after - before > 0.99 for before, after in itertools.pairwise(times)), times
        assert client.body.chunks[1:] == [b": heartbeat\n"] * 2
        assert simulator.stats.bytes_written == 0


async def test_nothing_is_written_before_the_commit_and_heartbeats_after_it(simulator: Simulator) -> None:
    async with (
        serving(simulator.url, heartbeat_s=1, first_byte_commit_s=1.2) as server,
        await RawClient.connect(server.address) as client,
    ):
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await client.post(prompt("[[first_s=60]]"))
        await client.answered()
        # Not the settings' defaults, which are 5 and 15.
        assert 1.1 <= loop.time() - begun < 4.5
        await client.read_until(has_heartbeats(1), timeout_s=60)


@pytest.mark.usefixtures("fast_sweep")
async def test_no_heartbeat_while_frames_flow() -> None:
    loop = asyncio.get_running_loop()
    async with one_stream(heartbeat_s=0.6) as one, one.reading() as (client, _):
        pauses = 0  # of this process, long enough for a heartbeat
        for _ in range(30):
            before = loop.time()
            one.publish()
            await asyncio.sleep(0.06)
            pauses += loop.time() - before > 0.5
        await client.read_until(has_chunks(31))
        pauses += loop.time() - before > 0.5
        assert client.written.heartbeats <= pauses
        await client.read_until(has_heartbeats(pauses + 2), timeout_s=60)


@pytest.mark.usefixtures("fast_sweep")
async def test_heartbeat_is_one_line_between_whole_frames() -> None:
    async with one_stream(heartbeat_s=0.1) as one, one.reading() as (client, _):
        for count in range(1, 6):
            one.publish(size=300_000)
            await client.read_until(has_heartbeats(count))
        one.stream.finish(Reason.COMPLETE)
        await client.read_to_end()
        # `sequence` takes each chunk apart by itself: a heartbeat within a frame, or a blank line after one, fails.
        assert sequence(client) == [1, 2, 3, 4, 5, 6]
        assert b": heartbeat\n" in client.body.chunks


@pytest.mark.usefixtures("fast_sweep")
async def test_write_blocked_reader_gets_no_heartbeat_and_others_do() -> None:
    async with (
        one_stream(heartbeat_s=0.2) as one,
        one.reading() as (blocked_client, blocked),
        one.reading() as (client, _),
    ):
        await one.fill(blocked)
        before = written_bytes(blocked)
        await client.read_until(has_heartbeats(3))
        assert is_blocked(blocked)
        assert written_bytes(blocked) == before
        # It gets them again once it has caught up.
        await blocked_client.read_until(lambda client: client.body.chunks[-1] == b": heartbeat\n")
        assert sequence(blocked_client) == list(range(1, one.stream.log.last_seq + 1))


@pytest.mark.usefixtures("fast_sweep")
@pytest.mark.parametrize("stalled", [False, True], ids=["body taken", "body's end not taken"])
async def test_no_heartbeat_follows_the_end_of_a_body(stalled: bool) -> None:
    async with one_stream(heartbeat_s=0.1) as one, one.reading() as (client, reader):
        if stalled:
            await one.fill(reader)
        else:
            one.publish()
        one.stream.finish(Reason.COMPLETE)
        if stalled:
            await seconds(0.5)
        await client.read_to_end()
        if not stalled:
            await seconds(0.5)
        # The connection stays open, and what comes next on it is the next answer.
        await client.get("/nowhere")
        await client.answered()
        assert client.status == 404


async def test_heartbeat_comes_once_its_interval_has_passed_without_a_write() -> None:
    """By the sweeps' clock: what came between two of them is taken for half a sweep old."""
    model = Model(2048, 64 << 10)
    model.arrive(0, compacted=False)
    (one,) = model.connections
    one.wire.give_room(1 << 20)
    await model.turns(lambda: one.is_at_tail)
    reader = one.reader
    assert reader is not None
    beats = []
    for now in range(100, 160):
        if now in {131, 132}:
            model.publish([("other", 8)])
        if reader.beat(float(now), 14.5, 1.0):
            beats.append(now)
    assert beats == [114, 129, 146]
    await model.close()


async def test_no_heartbeat_follows_an_end_that_was_just_taken() -> None:
    """A sweep may come before the reader's task has its turn, and the next response would begin with the heartbeat."""
    model = Model(2048, 64 << 10)
    model.arrive(0, compacted=False)
    (one,) = model.connections
    await model.turns(lambda: one.is_at_tail)
    model.end(Reason.COMPLETE)
    await model.turns(lambda: one.wire.writes[-1] == b"0\r\n\r\n")
    assert one.wire.paused
    one.wire.give_room(1 << 20)
    model.beat(one)
    assert one.wire.writes[-1] == b"0\r\n\r\n"
    await model.turns(lambda: one.ended)
    await model.close()


async def test_second_stream_on_a_connection_is_as_good_as_the_first(server: Server) -> None:
    async with await RawClient.connect(server.address) as client:
        for tokens in (2000, 3):
            await client.post(prompt(f"[[tokens={tokens}]]"))
            await client.answered()
            await client.read_to_end()
            assert client.body.ended
            frames = client.written.frames
            assert sum(item.event == "content_block_delta" for item in frames) == tokens
            assert frames[-1].event == "end"


# --- any order ----------------------------------------------------------------------------------------------------


class Wire(asyncio.Transport):
    """A connection whose kernel takes as many bytes as the client has `room` for, and keeps account of every write."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.room = 0
        self.writes: list[bytes] = []
        self.wrong: list[bytes] = []  # where nothing was to be written
        self.taken = bytearray()
        self.waiting = bytearray()
        self.paused = False
        self._protocol = protocol
        self._closing = False
        self._high, self._low = 64 << 10, 16 << 10

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        # The head and the opening leave as they come, and the body's end. Noted only: here a reader would take it up.
        if self._closing or (self.paused and len(self.writes) > 1 and data != b"0\r\n\r\n"):
            self.wrong.append(bytes(data))
        self.writes.append(bytes(data))
        self.waiting += data
        self._move()

    def give_room(self, size: int) -> None:
        """The client reads `size` bytes, those included that are still to come."""
        if not self._closing:
            self.room += size
            self._move()

    def get_write_buffer_size(self) -> int:
        return len(self.waiting)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        assert low is None
        self._high, self._low = high, high // 4
        self._move()

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        self.lose(None)

    close = abort

    def lose(self, error: Exception | None) -> None:
        """The connection is gone, and with it what waits."""
        if not self._closing:
            self._closing = True
            self.waiting.clear()
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, error)

    def _move(self) -> None:
        size = min(self.room, len(self.waiting))
        self.room -= size
        self.taken += self.waiting[:size]
        del self.waiting[:size]
        if not self.paused and len(self.waiting) > self._high:
            self.paused = True
            self._protocol.pause_writing()
        elif self.paused and len(self.waiting) <= self._low:
            self.paused = False
            self._protocol.resume_writing()


@dataclass
class Connection:
    """One request on a connection of its own, and what it is to be answered with."""

    after: int
    compacted: bool
    wire: Wire
    protocol: web.RequestHandler
    reader: Reader | None = None
    task: asyncio.Task[Any] | None = None
    ended: bool = False  # its handler is
    pushed: set[int] = field(default_factory=set)  # numbers of the writes that `push` made
    told: list[int] = field(default_factory=list)

    @property
    def is_at_tail(self) -> bool:
        return self.reader is not None and is_at_tail(self.reader)

    @property
    def is_over(self) -> bool:
        """No handler runs for it, nor will."""
        return self.ended or (self.reader is None and self.protocol.transport is None)

    def received(self) -> tuple[Written, bool]:
        """What has arrived whole, and whether its end has."""
        _, _, body = bytes(self.wire.taken).partition(b"\r\n\r\n")
        decoder = ChunkedDecoder()
        decoder.feed(body)
        assert not decoder.ended or not decoder.rest
        cut = decoder.rest.partition(b"\r\n")[2]
        whole, blank, _ = (b"".join(decoder.chunks) + cut).rpartition(b"\n\n")
        return parse(whole + blank), decoder.ended


class Model:
    """A stream and real readers of it on connections that are the test's, against a plain list of frames."""

    def __init__(self, write_buffer_bytes: int, read_ahead_bytes: int) -> None:
        self.settings = Settings.model_validate({"upstream": NOWHERE, "write_buffer_bytes": write_buffer_bytes})
        self.write_buffer_bytes = write_buffer_bytes
        self.read_ahead_bytes = read_ahead_bytes
        self.stream = Stream(
            STREAM_ID,
            MemoryLog(ReplayMemory(1 << 30)),
            now=asyncio.get_running_loop().time(),
            read_ahead_bytes=read_ahead_bytes,
            stream_bytes=1 << 30,
            leave=LeaveTime(60),
            on_left=lambda _: None,
            on_end=lambda _: None,
        )
        self.stream.begin()
        self.frames: list[Frame] = []
        self.clients: list[list[Connection]] = []
        self.server = web.Server(self.handle, handler_cancellation=True)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = next(one for one in self.connections if one.protocol is request.protocol)
        compact = Anthropic(self.settings).compact if connection.compacted else None
        connection.reader = Reader(self.stream, self.settings, connection.after, compact=compact)
        connection.task = asyncio.current_task()
        try:
            return await connection.reader.run(cast("web.Request", request))
        finally:
            connection.ended = True

    @property
    def connections(self) -> list[Connection]:
        return [one for client in self.clients for one in client]

    # --- what may happen ---

    def publish(self, events: list[tuple[str, int]]) -> None:
        """Events that can be merged and others, of about so many bytes."""
        if self.stream.state is State.ENDED:
            return
        added = []
        for seq, (kind, size) in enumerate(events, len(self.frames) + 1):
            text = f"{seq}." * (size // 4)
            data = text_delta(text) if kind == "text" else f'{{"type":"other","data":"{text}"}}'
            added.append(Frame("content_block_delta", data, f"{STREAM_ID}.{seq}"))
        self.frames += added
        frames = b"".join(frame(one.event, one.data, one.id) for one in added)
        with self.pushing(lambda: frames):
            self.stream.publish(frames, len(self.frames))

    def end(self, reason: Reason) -> None:
        position = self.stream.log.tail
        with self.pushing(lambda: self.stream.log.read(position)):
            if self.stream.finish(reason):
                self.frames += parse(self.stream.log.read(position)).frames

    @contextlib.contextmanager
    def pushing(self, frames: Callable[[], bytes]) -> Iterator[None]:
        """Whoever stands at the tail and has room gets `frames` in one write; nobody gets anything else."""
        before = [(one, len(one.wire.writes), one.is_at_tail, one.wire.paused) for one in self.connections]
        yield
        for one, count, was_at_tail, was_paused in before:
            written = one.wire.writes[count:]
            if not was_at_tail or was_paused or one.wire.is_closing() or len(frames()) > self.write_buffer_bytes:
                assert written == []
            elif written or frames():
                assert [chunk_of(data) for data in written] == [frames()]
                one.pushed.add(count)

    def arrive(self, after: int, compacted: bool) -> None:
        self.clients.append([])
        self.connect(self.clients[-1], min(after, len(self.frames)), compacted)

    def come_back(self, client: list[Connection]) -> None:
        last = client[-1]
        if last.is_over and last.wire.is_closing():
            received = last.received()[0].frames
            self.connect(client, received[-1].seq if received else last.after, last.compacted)

    def connect(self, client: list[Connection], after: int, compacted: bool) -> None:
        protocol = self.server()
        wire = Wire(protocol)
        client.append(Connection(after, compacted, wire, protocol))
        protocol.connection_made(wire)
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")

    def tell(self, one: Connection) -> None:
        if one.reader is not None and not one.ended:
            one.told.append(len(one.told))
            one.reader.tell(reconnect(one.told[-1], resume=False, deadline_ms=0))

    def beat(self, one: Connection) -> None:
        if one.reader is None:
            return
        paused, count = one.wire.paused, len(one.wire.writes)
        now = asyncio.get_running_loop().time()
        # The first may only look what was written since.
        for _ in range(2):
            one.reader.beat(now, 0, 0)
        written = [chunk_of(data) for data in one.wire.writes[count:]]
        assert written == [HEARTBEAT] * len(written)
        assert not written or not (paused or one.ended)

    # --- what holds at any time ---

    def check(self) -> None:
        for one in self.connections:
            self.check_writes(one)
        for client in self.clients:
            self.check_received(client)
        self.check_gate()

    def check_writes(self, one: Connection) -> None:
        assert not one.wire.wrong
        if not one.wire.writes:
            return
        head, first, *others = one.wire.writes
        assert head.startswith(b"HTTP/1.1 200 ")
        assert head.endswith(b"\r\n\r\n")
        start = opening(RETRY_MS, f"{STREAM_ID}.{one.after}")
        assert chunk_of(first).startswith(start)
        self.check_logged(chunk_of(first).removeprefix(start), one, self.write_buffer_bytes)
        if others and others[-1] == b"0\r\n\r\n":
            others.pop()
        for number, data in enumerate(others, 2):
            chunk = chunk_of(data)
            if number in one.pushed or chunk == HEARTBEAT or parse(chunk).controls:
                assert number in one.pushed or not parse(chunk).frames
            else:
                self.check_logged(chunk, one, self.write_buffer_bytes // (1 if one.compacted else 2))

    def check_logged(self, chunk: bytes, one: Connection, limit: int) -> None:
        """Whole frames, and of several no more bytes than is taken from the log at a time."""
        if len(parse(chunk).frames) > 1:
            # Compact, one is added without knowing whether it fits.
            assert len(chunk) <= limit + (len(last_frame(chunk)) if one.compacted else 0)

    def check_received(self, client: list[Connection]) -> None:
        for one in client:
            written, ended = one.received()
            self.check_frames(one, written.frames)
            assert not ended or written.frames[-1].event == "end"
            retries = [control.retry_ms for control in written.controls]
            assert retries == sorted(set(retries) & set(one.told))

    def check_frames(self, one: Connection, got: list[Frame]) -> None:
        """Each is the one that follows, or in one the run that follows."""
        at = one.after
        if got and at == len(self.frames):
            at -= 1  # the end, again
        for item in got:
            run = self.frames[at : item.seq]
            assert run
            at = item.seq
            if len(run) == 1:
                assert item == run[0]
            else:
                assert one.compacted
                texts = [TEXT.fullmatch(each.data) for each in run]
                assert item.data == text_delta("".join(text[1] for text in texts if text is not None))
                assert None not in texts
        if one.is_at_tail and not one.wire.waiting and not one.wire.is_closing():
            assert at == len(self.frames), "at the tail, but not up to date"

    def check_gate(self) -> None:
        stream = self.stream
        if any(one.is_at_tail for one in self.connections) or stream.state is State.ENDED:
            assert not stream.holds_back
            return
        reached = max((one.reader.position for one in self.connections if one.reader is not None), default=0)
        limit = self.read_ahead_bytes if stream.readers or stream.last_reader_stalled else 1 << 30
        assert stream.holds_back == (stream.log.tail - reached >= limit)

    def is_caught_up(self) -> bool:
        for client in self.clients:
            self.come_back(client)
            client[-1].wire.give_room(1 << 30)
        return all(client[-1].is_at_tail or client[-1].received()[1] for client in self.clients)

    async def turns(self, condition: Callable[[], bool]) -> None:
        """As many turns of the event loop as `condition` takes; there is no clock and no kernel to wait for."""
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("nothing moves any more")

    async def run_out(self) -> None:
        """Everybody reads and comes back; then the stream ends. All have all of it."""
        await self.turns(self.is_caught_up)
        self.check()
        for client in self.clients:
            last = client[-1]
            if last.is_at_tail and last.told:
                assert last.received()[0].controls[-1].retry_ms == last.told[-1]
        self.end(Reason.COMPLETE)
        await self.turns(lambda: all(one.is_over for one in self.connections))
        self.check()
        for client in self.clients:
            written, ended = client[-1].received()
            assert ended
            assert written.frames[-1] == self.frames[-1]
        assert self.stream.readers == 0

    async def close(self) -> None:
        for one in self.connections:
            one.wire.abort()
        await self.turns(lambda: all(one.is_over for one in self.connections))
        await self.server.shutdown(1)


def chunk_of(data: bytes) -> bytes:
    """What is in a write that is one chunk."""
    decoder = ChunkedDecoder()
    decoder.feed(data)
    (chunk,) = decoder.chunks
    assert not decoder.rest
    return chunk


def last_frame(chunk: bytes) -> bytes:
    return chunk[chunk.rfind(b"\n\n", 0, -2) + 2 :]


def text_delta(text: str) -> str:
    return f'{{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":"{text}"}}}}'


TEXT = re.compile(re.escape(text_delta("@")).replace("@", "([0-9.]*)"))

STEPS = st.one_of(
    st.tuples(
        st.just("publish"),
        st.lists(
            st.tuples(
                st.sampled_from(["text", "text", "text", "other"]),
                st.sampled_from([0, 8, 8, 100, 500, 900, 3000, 9000, 20_000]),
            ),
            min_size=1,
            max_size=12,
        ),
    ),
    st.tuples(st.just("arrive"), st.integers(0, 60), st.booleans()),
    st.tuples(st.just("read"), st.integers(0, 3), st.sampled_from([1, 700, 5000, 40_000, 1 << 30])),
    st.tuples(st.sampled_from(["lose", "reset", "evict", "tell", "beat", "come back"]), st.integers(0, 3)),
    st.tuples(st.just("wait")),
    st.tuples(st.just("end"), st.sampled_from([Reason.COMPLETE, Reason.ABANDONED])),
)


async def play(model: Model, steps: list[tuple[tuple[Any, ...], int]]) -> None:
    for step, turns in steps:
        clients = model.clients
        match step:
            case "publish", events:
                model.publish(events)
            case "arrive", after, compacted:
                if len(clients) < 4:
                    model.arrive(after, compacted)
            case "end", reason:
                if len(model.frames) > 30:
                    model.end(reason)
            case "wait", *_:
                pass
            case what, which, *rest if clients:
                client = clients[which % len(clients)]
                last = client[-1]
                match what:
                    case "read":
                        last.wire.give_room(*rest)
                    case "lose":
                        last.wire.lose(None)
                    case "reset":
                        last.wire.lose(ConnectionResetError())
                    case "evict" if last.reader is not None and not last.ended:
                        last.reader.evict()
                    case "tell":
                        model.tell(last)
                    case "beat":
                        model.beat(last)
                    case "come back":
                        model.come_back(client)
        for _ in range(turns):
            await asyncio.sleep(0)
        model.check()
    await model.run_out()


@settings(max_examples=3000 if SOAK else 150, deadline=None, derandomize=not SOAK)
@given(
    steps=st.lists(st.tuples(STEPS, st.sampled_from([0, 1, 1, 2, 3, 8])), min_size=30, max_size=60),
    write_buffer_bytes=st.sampled_from([2048, 16 << 10]),
    read_ahead_bytes=st.sampled_from([1000, 64 << 10]),
)
def test_any_order_of_events_gives_every_reader_what_follows_its_cursor(
    steps: list[tuple[tuple[Any, ...], int]], write_buffer_bytes: int, read_ahead_bytes: int
) -> None:
    """Publishing, arriving, reading, stalling, leaving, coming back, evicting, telling, beating and ending at will."""

    async def run() -> None:
        model = Model(write_buffer_bytes, read_ahead_bytes)
        try:
            await play(model, steps)
        finally:
            await model.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_reader_told_something_while_it_waits_for_its_socket_gets_it_without_another_event() -> None:
    model = Model(2048, 64 << 10)
    model.arrive(0, compacted=False)
    (one,) = model.connections
    await model.turns(lambda: one.is_at_tail)
    # The first fills its buffer, the second has to wait in the log; once written, nothing is left there.
    for _ in range(2):
        model.publish([("other", 3400)])
    assert not one.is_at_tail
    one.wire.give_room(1700)
    writes = len(one.wire.writes)
    await model.turns(lambda: len(one.wire.writes) > writes)
    assert one.wire.paused
    model.tell(one)
    one.wire.give_room(1 << 20)
    await model.turns(lambda: one.is_at_tail)
    assert [control.retry_ms for control in one.received()[0].controls] == one.told
    await model.run_out()
    await model.close()


async def test_reader_that_leaves_is_closed_before_its_stream_learns_of_it() -> None:
    """What the stream does then, and what a sweep does that had begun before, writes nothing more to it."""
    model = Model(2048, 64 << 10)
    model.arrive(0, compacted=False)
    (one,) = model.connections
    one.wire.give_room(1 << 20)
    await model.turns(lambda: one.is_at_tail)
    wrote: list[int] = []

    def left(stream: Stream) -> None:
        model.beat(one)
        stream.finish(Reason.ABANDONED)
        model.beat(one)
        wrote.append(len(one.wire.writes))

    model.stream._on_left = left
    before = len(one.wire.writes)
    # A handler may be cancelled while its connection is open still.
    assert one.task is not None
    one.task.cancel()
    await model.turns(lambda: one.ended)
    assert wrote == [before]
    await model.close()
