"""One reader: a cursor on a stream's log, and the response that it is written to.

At the tail and with room in its socket a reader is written by the relay itself, in `push`. Otherwise its own task,
which alone ever waits for the socket, writes from the log until it stands at the tail again. Heartbeats come from
the registry's sweep. Every write is whole frames or whole lines and none of them waits, so writers never interleave.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING

import structlog
from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http import StreamWriter
from aiohttp_sse import EventSourceResponse

from aisse.sse import HEARTBEAT, opening
from aisse.streams.latch import Latch
from aisse.streams.stream import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.abc import AbstractStreamWriter

    from aisse.settings import Settings
    from aisse.streams.stream import Stream

RETRY_MS = 2000

# How often a reader whose cursor lies beyond the tail looks whether the stream has got there.
_AHEAD_S = 0.1

# How many reads of the log are merged into one write: enough for a few frames out of thousands, and no more than the
# event loop can be kept from others for.
_COMPACT_READS = 32

# Bounds what the kernel keeps for a client that takes nothing; what is in flight is bounded by SO_SNDBUF alone.
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", None)

# SO_LINGER (socket(7)): on, with no time at all; off.
_RESET = struct.pack("ii", 1, 0)
_IN_ORDER = struct.pack("ii", 0, 0)

_log = structlog.get_logger("aisse.reader")

# The kernel counts from the peer's last acknowledged byte, eviction from the last byte that the kernel took, as the
# sweep saw it. Eviction has to come first: it is what the log tells of.
_PEER_GRACE_S = 5.0


# Chromium drops bytes that arrive together with the end of a connection that breaks.
BREAK_OFF_S = 1.0
"""How long a reader has to take `reconnect` before its body is broken off."""


def stream_url(stream_id: str, settings: Settings) -> str:
    """Where that stream is read and stopped, as clients reach it: below `base_path`."""
    return f"{settings.base_path}/api/chat/{stream_id}"


class StreamResponse(EventSourceResponse):
    """aiohttp-sse's response, without its ping task: nothing but a Reader may write here."""

    def __init__(self, stream_id: str, settings: Settings) -> None:
        super().__init__(allow_all_methods=True, send_timeout=settings.stall_s + _PEER_GRACE_S)
        self.headers[hdrs.CACHE_CONTROL] = "no-cache, no-transform"
        self.headers[hdrs.CONTENT_LOCATION] = stream_url(stream_id, settings)
        # Without it a client cannot know how much silence is too much.
        self.headers["Aisse-Heartbeat"] = f"{settings.heartbeat_s:g}"
        self._ends_with_connection: socket.socket | None = None

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Sends the headers. To HTTP/1.0, which knows no chunks, the body's end is the connection's."""
        if request.version < HttpVersion11 and not self.prepared:
            self.force_close()
            del self.headers[hdrs.CONNECTION]
            sock = request.transport.get_extra_info("socket") if request.transport is not None else None
            if sock is not None:
                # Until `finish` whatever closes the connection resets it: an end in order would say that this is all.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self._ends_with_connection = sock
        return await super().prepare(request)

    async def finish(self) -> None:
        """Ends the body so that the client knows that this is all."""
        if self._ends_with_connection is not None and self._ends_with_connection.fileno() >= 0:
            self._ends_with_connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _IN_ORDER)
        await self.write_eof()

    async def _ping(self) -> None:
        """Heartbeats are the registry's; this task ends at once."""


class Reader:
    """`run` is the request handler's; the rest is called synchronously by the stream and by the registry's sweep."""

    __slots__ = (
        "_chunked",
        "_closing",
        "_compact",
        "_control",
        "_expected",
        "_last_taken",
        "_last_write",
        "_loop",
        "_off_tail",
        "_output_bytes",
        "_protocol",
        "_seq",
        "_settings",
        "_taken",
        "_told",
        "_transport",
        "_write_buffer_bytes",
        "_writer",
        "_written",
        "position",
        "stream",
    )

    def __init__(
        self,
        stream: Stream,
        settings: Settings,
        seq: int = 0,
        *,
        compact: Callable[[bytes], bytes] | None = None,
        expected: bool = False,
    ) -> None:
        """Continues after event `seq`; `compact` merges runs of deltas where the reader is behind (see Format).

        `expected` is who may be the one that was told of the stream's URL.

        At or beyond the end of a stream that has ended, `end` is written again. Beyond the tail of one that runs, the
        reader waits for it: a producer that crashed may have told its readers more than it had put into a shared log.
        """
        self.stream = stream
        self.position = 0
        self._compact = compact
        self._expected = expected
        self._seq = seq
        self._settings = settings
        self._write_buffer_bytes = int(settings.write_buffer_bytes)
        self._loop = asyncio.get_running_loop()
        # All three from the moment that the response is open.
        self._writer: StreamWriter | None = None
        self._protocol: web.RequestHandler | None = None
        self._transport: asyncio.Transport | None = None
        self._chunked = False
        self._output_bytes = 0
        self._closing = False  # nothing may be written any more
        self._control = b""
        self._told: float | None = None
        self._off_tail = Latch()
        self._written = 0  # as of the last look
        self._last_write = 0.0
        self._taken = 0
        self._last_taken = 0.0

    async def run(self, request: web.Request) -> web.StreamResponse:
        """Answers `request` with the stream from this reader's cursor to its end.

        Raises StreamError where the stream failed before anybody was answered. Cancellation (the client left)
        detaches the reader; a client that takes nothing is ended by `evict`, which raises ConnectionError here.
        """
        stream = self.stream
        stream.attach(self, expected=self._expected)
        try:
            await stream.answerable(self._settings.first_byte_commit_s)
            response = StreamResponse(stream.id, self._settings)
            try:
                await self._serve(request, response)
            except ConnectionError:
                pass  # it has left, or was evicted; with its connection gone there is nobody to answer
            except Exception:
                # Whatever answers this error must not write it into the middle of the stream.
                if self._transport is not None:
                    self._transport.abort()
                raise
            return response
        finally:
            self._closing = True
            stream.detach(self, stalled=self._protocol is not None and self._protocol.writing_paused)

    async def _serve(self, request: web.Request, response: StreamResponse) -> None:
        stream = self.stream
        self.position = self._beginning()
        ahead = self._is_ahead()
        await self._open(request, response)
        if ahead:
            # After a crash only: being woken by the stream instead would cost every token of every stream.
            while self._is_ahead():
                await self._write_control()
                stream.advance(stream.log.tail)  # it asked for none of that: waiting for it must not close the gate
                await asyncio.sleep(_AHEAD_S)
            self.position = self._beginning()
        while True:
            await self._write_what_is_logged()
            if stream.state is State.ENDED:
                break
            if self._closing:
                raise ConnectionResetError("moved")
            stream.catch_up(self)
            await self._off_tail.wait()  # `push` has found the socket full, or the stream has ended
        # A heartbeat after the last chunk would be taken for the next response on this connection.
        self._closing = True
        # Here and not by returning: the sweep must still see a peer that never takes the last bytes, be they few.
        # aiohttp would close its connection when idle, but no earlier than the last byte has left: never.
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=0)
        await response.finish()

    def _beginning(self) -> int:
        log = self.stream.log
        if self.stream.state is State.ENDED and self._seq >= log.last_seq:
            return log.position_after(log.last_seq - 1)
        return log.position_after(self._seq)

    def _is_ahead(self) -> bool:
        return self._seq > self.stream.log.last_seq and self.stream.state is not State.ENDED

    async def _open(self, request: web.Request, response: StreamResponse) -> None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        # "Full" has to come early: by default a stalled client swallows megabytes first.
        transport.set_write_buffer_limits(high=self._write_buffer_bytes)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in {socket.AF_INET, socket.AF_INET6}:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._settings.send_buffer_bytes)
            if _TCP_NOTSENT_LOWAT is not None:
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, self._write_buffer_bytes // 4)
        writer = await response.prepare(request)
        assert isinstance(writer, StreamWriter)
        self._writer = writer
        self._transport = transport
        self._protocol = request.protocol
        self._last_taken = self._loop.time()
        # In one send with the headers: Firefox gives up for good on a response that breaks between the two.
        frames = self._next_frames(self._write_buffer_bytes)
        await writer.write(opening(RETRY_MS, f"{self.stream.id}.{self._seq}") + frames, drain=False)
        # From here on nothing but `_write` writes, until write_eof.
        self._chunked = writer.chunked
        self._output_bytes = writer.output_size

    def _fail(self) -> None:
        _log.exception("reader failed", stream_id=self.stream.id[:8])
        self._closing = True
        self.evict()

    def _next_frames(self, limit: int) -> bytes:
        """Whole frames from the log to be written at once: `limit` bytes, or a frame more; empty at the tail."""
        frames = self._read(limit)
        if self._compact is not None:
            frames = self._read_on(self._compact(frames), limit, self._compact)
        self.stream.advance(self.position)
        return frames

    def _read_on(self, frames: bytes, limit: int, compact: Callable[[bytes], bytes]) -> bytes:
        """`frames`, which are compact, and of what follows as much as fits when it is compact, too."""
        reads = 1
        while reads < _COMPACT_READS and len(frames) < limit and (more := self._read(limit - len(frames))):
            frames += compact(more)
            reads += 1
        # A run may go on from one read to the next.
        return compact(frames) if reads > 1 else frames

    def _read(self, limit: int) -> bytes:
        frames = self.stream.log.read(self.position, limit)
        self.position += len(frames)
        return frames

    async def _write_control(self) -> None:
        while self._control:
            await self._room()
            control, self._control = self._control, b""
            self._write(control)
            self._told = self._loop.time()

    async def _room(self) -> None:
        assert self._protocol is not None
        if self._protocol.writing_paused:
            assert self._writer is not None
            await self._writer.drain()

    async def _write_what_is_logged(self) -> None:
        while True:
            await self._write_control()
            await self._room()
            # drain() also returns when the connection was lost cleanly; the next write raises then.
            # Half a buffer at a time: what the kernel is given at once it keeps, whether the client takes it or not.
            # Compact it is a whole one, for the sake of few frames.
            frames = self._next_frames(self._write_buffer_bytes // (1 if self._compact else 2))
            if not frames:
                if self._control:
                    continue  # told while the socket was waited for: nobody else would write it
                return
            self._write(frames)
            if self._compact:
                await asyncio.sleep(0)  # merging took a while: others first

    def _write(self, data: bytes) -> None:
        """Writes whole frames or lines as one chunk. Raises ConnectionError where the connection is gone."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        # The chunk's frame (RFC 9112, section 7.1) is put around it here: aiohttp's writer would take a coroutine and
        # three calls more for it, for every token.
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._output_bytes += len(data)
        transport.write(data)

    def tell(self, control: bytes) -> None:
        """Has a control event written between two frames, as soon as the response is open and its socket has room.

        One that was not written yet is replaced: only the last one still holds.
        """
        self._control = control
        # By the task that alone waits for the socket: at the tail nobody would write to a reader that is blocked.
        self.stream.fall_behind(self)

    def told_for(self, now: float) -> float:
        """Seconds since the client was told something by a control event; 0 where it was not."""
        return now - self._told if self._told is not None else 0.0

    def part(self) -> None:
        """Closes the connection after what was written, without the end of the body: the client comes back elsewhere.

        Not for one that takes nothing: that never comes to its end.
        """
        self._closing = True
        self.stream.detach(self)
        assert self._transport is not None
        self._transport.close()
        self.wake()

    # --- called by the stream ---------------------------------------------------------------------------------

    def push(self, frames: bytes) -> bool:
        """Writes `frames` now, in one write; False, and nothing is written, where the socket is full.

        Also where they alone would more than fill it: an upstream that has much to say at once is read from the log.
        """
        assert self._protocol is not None
        if self._protocol.writing_paused or len(frames) > self._write_buffer_bytes:
            return False
        try:
            self._write(frames)
        except ConnectionError:
            # The handler's cancellation is on its way, unless the client has only shut down its sending side: then the
            # connection closes no earlier than when it has taken everything.
            self.evict()
        except Exception:
            # The stream is others' too: it must neither break off nor, at its end, be left half ended.
            self._fail()
        return True

    def wake(self) -> None:
        """Lets `run` look at the stream again."""
        self._off_tail.open()

    # --- called by the registry's sweep -----------------------------------------------------------------------

    def beat(self, now: float, heartbeat_s: float, sweep_s: float) -> bool:
        """Writes a heartbeat where nothing was written for `heartbeat_s`; never waits. True if it wrote.

        Asked every `sweep_s`: what was written since is seen by its count, and taken for half a sweep old, so that a
        frame needs not read the clock.
        """
        if self._closing or self._protocol is None or self._protocol.writing_paused:
            return False
        if self._output_bytes > self._written:
            self._written = self._output_bytes
            self._last_write = now - sweep_s / 2
            return False
        if now - self._last_write < heartbeat_s:
            return False
        self._last_write = now
        try:
            self._write(HEARTBEAT)
        except ConnectionError:
            return False  # it has just left
        self._written = self._output_bytes
        return True

    def stalled_for(self, now: float) -> float:
        """Seconds since the client last took a byte, while bytes wait for it; 0 while none do."""
        if self._protocol is None or not self._protocol.writing_paused:
            self._last_taken = now
            return 0.0
        taken = self._output_bytes - self.buffered_bytes
        if taken > self._taken:
            self._taken = taken
            self._last_taken = now
        return now - self._last_taken

    def evict(self) -> None:
        """Cuts the connection without the end of the body, so that the client knows and comes back."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait for this reader's socket."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0


async def turn_away(
    request: web.Request, response: StreamResponse, cursor: str | None, reconnect: bytes
) -> StreamResponse:
    """Answers a request for a stream that is not here with `reconnect` alone, and breaks the body off a second later.

    For a native EventSource, which gives up for good on any status but 200, so that it comes back with its cursor.
    Cancelled when the client leaves before that.
    """
    writer = await response.prepare(request)
    assert isinstance(writer, StreamWriter)
    await writer.write(opening(RETRY_MS, cursor) + reconnect, drain=False)
    await asyncio.sleep(BREAK_OFF_S)
    # Not by raising: aiohttp would log as an error what is meant.
    request.protocol.force_close()
    return response
