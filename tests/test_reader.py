"""Readers that behave badly, the bytes that they get, and what reader.py takes for granted of its libraries."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiohttp import web
from aiohttp_sse import EventSourceResponse
from conftest import Server, eventually, prompt, serving
from rawclient import RawClient, parse
from structlog.testing import capture_logs

from aisse import registry as registry_module
from aisse.app import runner_arguments
from aisse.reader import Reader, StreamResponse
from aisse.registry import Registry
from aisse.replay import MemoryLog, ReplayMemory
from aisse.settings import Settings
from aisse.sse import frame
from aisse.stream import Reason, Stream
from aisse.upstream import Upstream, UpstreamResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from aisse.simulator import Simulator

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

NOWHERE = "http://127.0.0.1:9"
STREAM_ID = "s" * 22

# Everything that a client which never reads can make the server write: the client's receive buffer, the server's
# send buffer, both as the kernel counts them, and the bytes that count as full.
SWALLOWED_BYTES = 320 << 10


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
    async def reading(self, **options: Any) -> AsyncIterator[tuple[RawClient, Reader]]:
        """A client whose reader stands at the tail, and that reader."""
        async with await RawClient.connect(self.address, **options) as client:
            count = len(self.readers)
            await client.get("/")
            await client.answered()
            assert client.status == 200
            reader = self.readers[count]
            await eventually(lambda: is_at_tail(reader))
            yield client, reader

    async def fill(self, reader: Reader) -> None:
        """Publishes frame by frame until the client's kernel takes no more and `reader` is behind."""
        async with asyncio.timeout(10):
            while not is_blocked(reader):
                self.publish()
                await asyncio.sleep(0)
                if is_blocked(reader):
                    await asyncio.sleep(0.15)  # the client's kernel may owe an acknowledgement: up to 40 ms
        self.publish()
        assert not is_at_tail(reader)


@contextlib.asynccontextmanager
async def one_stream(**settings: Any) -> AsyncIterator[OneStream]:
    effective = Settings.model_validate({"upstream": NOWHERE, **settings})
    registry = Registry(effective, Upstream(NOWHERE, effective))
    stream = Stream(
        STREAM_ID,
        MemoryLog(STREAM_ID, ReplayMemory(effective.replay_bytes)),
        now=asyncio.get_running_loop().time(),
        read_ahead_bytes=effective.read_ahead_bytes,
        stream_bytes=effective.stream_bytes,
        leave_s=effective.leave_s,
        on_left=lambda _: None,
        on_end=lambda _: None,
    )
    stream.start()
    readers: list[Reader] = []
    begun: list[float] = []

    async def read(request: web.Request) -> web.StreamResponse:
        if "full" in request.query:
            await fill_kernel(request)
        reader = Reader(stream, effective, int(request.query.get("after", 0)))
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
    return reader._protocol is not None and reader._protocol.writing_paused


def is_at_tail(reader: Reader) -> bool:
    return reader in reader.stream._caught_up


def written_bytes(reader: Reader) -> int:
    return reader._output_bytes


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
    monkeypatch.setattr(registry_module, "SWEEP_S", 3600.0)


@pytest.fixture
def fast_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep each 50 ms instead of each second; tests scale `stall_s` and `heartbeat_s` with it."""
    monkeypatch.setattr(registry_module, "SWEEP_S", 0.05)


# --- what the libraries do ----------------------------------------------------------------------------------------


async def test_write_without_drain_never_suspends_even_where_the_socket_is_full() -> None:
    async with one_stream() as one, one.reading() as (_, reader):
        writer = reader._writer
        assert writer is not None
        assert not suspends(writer.write(b"x" * 100, drain=False))
        await one.fill(reader)
        assert not suspends(writer.write(b"x" * 200_000, drain=False))
        # The same write as everybody else would do it: the socket is indeed full.
        assert suspends(writer.write(b"x", drain=True))


async def test_ping_task_of_aiohttp_sse_writes_nothing() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = StreamResponse(STREAM_ID, 30) if "ours" in request.query else EventSourceResponse()
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
        assert reader._transport is not None
        assert reader._transport.get_write_buffer_limits() == (2048, 8192)
        await one.fill(reader)
        # One past the limit, by no more than the write that crossed it.
        assert 8192 < reader.buffered_bytes <= 8192 + 1200
        one.stream.finish(Reason.COMPLETE)
        await client.read_to_end()


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels report the size that was asked for")
async def test_send_buffer_of_the_setting_is_what_the_kernel_has() -> None:
    async with one_stream(send_buffer_bytes=16 << 10) as one, one.reading() as (_, reader):
        assert reader._transport is not None
        sock = reader._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * (16 << 10)  # socket(7): doubled


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such limit")
async def test_kernel_gives_a_silent_peer_up_after_the_sweep_had_time_to_evict_it() -> None:
    async with one_stream(stall_s=7) as one, one.reading() as (_, reader):
        assert reader._transport is not None
        sock = reader._transport.get_extra_info("socket")
        # The sweep sees the last byte taken up to a second late, and the end of stall_s as much again.
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > (7 + 2 * registry_module.SWEEP_S) * 1000


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

        def close(self) -> None:
            pass

    class Nowhere(Upstream):
        async def open(self, body: bytes) -> UpstreamResponse:
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
    registry = Registry(settings, Nowhere(NOWHERE, settings))
    stream = registry.create(b"{}", leave_s=60)
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


def settled(figure: Callable[[], int], for_s: float = 0.5) -> Callable[[], bool]:
    """A condition: `figure` has not changed for `for_s`."""
    loop = asyncio.get_running_loop()
    last: list[tuple[int, float]] = [(figure(), loop.time())]

    def holds() -> bool:
        now = figure()
        if now != last[0][0]:
            last[0] = now, loop.time()
        return loop.time() - last[0][1] >= for_s

    return holds


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
        async with asyncio.timeout(10):
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
        assert stream.left is not None
        assert stream.ended is not None
        assert stream.left + 0.6 <= stream.ended
        # Its `error` and `end` were added, and no more: what it had not taken already exceeds what it comes back for.
        assert stream.log.tail < stopped_at + 1000
        await eventually(lambda: simulator.stats.aborted == 1)
        await client.read_to_end()
        assert not client.body.ended


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
        await eventually(lambda: one.registry.readers == 0, timeout_s=15)


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

        def fail(_self: Reader, _data: bytes) -> None:
            raise RuntimeError("a bug")

        one.publish()
        await bad_client.read_until(has_chunks(2))
        with monkeypatch.context() as patch:
            write = Reader._write
            patch.setattr(Reader, "_write", lambda self, data: (fail if self is bad else write)(self, data))
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
        transport = reader._transport
        assert transport is not None
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
        times, sweeps = [begun], [len(server.registry._samples)]
        for count in range(1, 3):
            await client.read_until(has_heartbeats(count))
            times.append(loop.time())
            sweeps.append(len(server.registry._samples))
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
        await client.read_until(has_heartbeats(1), timeout_s=10)


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
        await client.read_until(has_heartbeats(pauses + 2), timeout_s=10)


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
