"""One reader: a cursor on a stream's log, and the outlet that it writes to.

At the tail and with room in its socket a reader is written by the relay itself, in `push`. Otherwise its own task
writes from the log until it stands at the tail again; that task alone ever waits for the socket. Heartbeats come from
the sweep.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp.http import StreamWriter

from aisse.sse import opening
from aisse.streams.latch import Latch
from aisse.streams.outlet import Outlet, bound_buffers
from aisse.streams.response import RETRY_MS, StreamResponse
from aisse.streams.stream import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from aisse.settings import Settings
    from aisse.streams.stream import Stream

# How often a reader whose cursor lies beyond the tail looks whether the stream has got there.
_AHEAD_S = 0.1

# How many reads of the log are merged into one write: enough for a few frames out of thousands, and no more than the
# event loop can be kept from others for.
_COMPACT_READS = 32


class Reader:
    """`run` is the request handler's; the rest is called synchronously by the stream, the sweep and the drain.

    - A client gets every frame behind its cursor once, in order, whoever writes it
      (test_any_order_of_events_gives_every_reader_what_follows_its_cursor).
    - Its body ends cleanly only after `end` (test_exception_in_a_reader_cuts_its_client_off_and_writes_nothing).
    """

    __slots__ = (
        "_compact",
        "_control",
        "_expected",
        "_knows_id",
        "_loop",
        "_off_tail",
        "_outlet",
        "_seq",
        "_settings",
        "_told",
        "_write_buffer_bytes",
        "position",
        "push",
        "stream",
    )

    push: Callable[[bytes], bool]
    """The outlet's own, from the moment that it is open. A method in between would be one call more for every token."""

    def __init__(
        self,
        stream: Stream,
        settings: Settings,
        seq: int = 0,
        *,
        compact: Callable[[bytes], bytes] | None = None,
        knows_id: bool = False,
        expected: bool = False,
    ) -> None:
        """Continues after event `seq`; `compact` merges runs of deltas where the reader is behind (see Format).

        `knows_id` is for a client that asks for the stream by its id: it is answered with 200 at once, and told of a
        failure by an event. With another status a native EventSource would give up for good. `expected` says that this
        may be the reader who was told of the stream's URL.

        At or beyond the end of a stream that has ended, `end` is written again. Beyond the tail of one that runs, the
        reader waits for it: a producer that crashed may have told its readers more than it had put into a shared log.
        """
        self.stream = stream
        self.position = 0
        self._compact = compact
        self._knows_id = knows_id
        self._expected = expected
        self._seq = seq
        self._settings = settings
        self._write_buffer_bytes = int(settings.write_buffer_bytes)
        self._loop = asyncio.get_running_loop()
        self._outlet: Outlet | None = None  # not before the response is open
        self._control = b""
        self._told: float | None = None
        self._off_tail = Latch()

    async def run(self, request: web.Request) -> web.StreamResponse:
        """Answers `request` with the stream from this reader's cursor to its end.

        Raises StreamError where the stream failed before anybody was answered. Cancellation (the client left)
        detaches the reader; a client that takes nothing is ended by `evict`, which raises ConnectionError here.
        """
        stream = self.stream
        stream.attach(self, expected=self._expected)
        try:
            if self._knows_id:
                stream.known = True
            else:
                await stream.answerable(self._settings.first_byte_commit_s)
            response = StreamResponse(stream.id, self._settings)
            try:
                await self._serve(request, response)
            except ConnectionError:
                pass  # it has left, or was evicted; with its connection gone there is nobody to answer
            except Exception:
                # Whatever answers this error must not write it into the middle of the stream.
                self.evict()
                raise
            return response
        finally:
            outlet = self._outlet
            if outlet is not None:
                outlet.closing = True
            stream.detach(self, stalled=outlet is not None and outlet.full)

    async def _serve(self, request: web.Request, response: StreamResponse) -> None:
        stream = self.stream
        self.position = self._beginning()
        ahead = self._is_ahead()
        outlet = await self._open(request, response)
        if ahead:
            # This happens after a crash only. To be woken by the stream instead would cost every token of every stream.
            while self._is_ahead():
                await self._write_control(outlet)
                stream.advance(stream.log.tail)  # it asked for none of that: waiting for it must not close the gate
                await asyncio.sleep(_AHEAD_S)
            self.position = self._beginning()
        while True:
            await self._write_what_is_logged(outlet)
            if stream.state is State.ENDED:
                break
            if outlet.closing:
                raise ConnectionResetError("moved")
            stream.catch_up(self)
            await self._off_tail.wait()  # `push` has found the socket full, or the stream has ended
        outlet.end()
        # Here and not by returning: the sweep has to look after the reader until everything is taken.
        await response.finish()

    def _beginning(self) -> int:
        log = self.stream.log
        if self.stream.state is State.ENDED and self._seq >= log.last_seq:
            return log.position_after(log.last_seq - 1)
        return log.position_after(self._seq)

    def _is_ahead(self) -> bool:
        return self._seq > self.stream.log.last_seq and self.stream.state is not State.ENDED

    async def _open(self, request: web.Request, response: StreamResponse) -> Outlet:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        bound_buffers(transport, self._settings)
        writer = await response.prepare(request)
        assert isinstance(writer, StreamWriter)
        outlet = Outlet(self.stream.id, transport, request.protocol, writer, self._write_buffer_bytes)
        self._outlet = outlet
        self.push = outlet.push
        frames = self._next_frames(self._write_buffer_bytes)
        await outlet.open(opening(RETRY_MS, f"{self.stream.id}.{self._seq}") + frames)
        return outlet

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

    async def _write_control(self, outlet: Outlet) -> None:
        while self._control:
            await outlet.room()
            control, self._control = self._control, b""
            outlet.write(control)
            self._told = self._loop.time()

    async def _write_what_is_logged(self, outlet: Outlet) -> None:
        while True:
            await self._write_control(outlet)
            # Where the connection was lost cleanly this returns, too; the next write raises then.
            await outlet.room()
            # Half a buffer at a time: what the kernel is given at once it keeps, whether the client takes it or not.
            # A compact reader writes a whole one, for the sake of few frames.
            frames = self._next_frames(self._write_buffer_bytes // (1 if self._compact else 2))
            if not frames:
                if self._control:
                    continue  # told while the socket was waited for: nobody else would write it
                return
            outlet.write(frames)
            if self._compact:
                await asyncio.sleep(0)  # merging took a while: others first

    # --- called by the drain ----------------------------------------------------------------------------------

    def tell(self, control: bytes) -> None:
        """Has a control event written between two frames, as soon as the response is open and its socket has room.

        One that was not written yet is replaced: only the last one still holds.
        """
        self._control = control
        # The reader's own task writes it. Only that task waits for the socket, and at the tail nobody else would write
        # to a blocked reader.
        self.stream.fall_behind(self)

    def told_for(self, now: float) -> float:
        """Seconds since the client was told something by a control event; 0 where it was not."""
        return now - self._told if self._told is not None else 0.0

    def part(self) -> None:
        """Closes the connection after what was written, without the end of the body: the client comes back elsewhere.

        Only for a reader that was told so, and not for one that takes nothing: that never comes to its end.
        """
        assert self._outlet is not None
        # Detached first: what is published in this step is not written to it any more.
        self.stream.detach(self)
        self._outlet.close()
        self.wake()

    # --- called by the stream ---------------------------------------------------------------------------------

    def wake(self) -> None:
        """Lets `run` look at the stream again."""
        self._off_tail.open()

    # --- called by the sweep ----------------------------------------------------------------------------------

    def beat(self, now: float, heartbeat_s: float, sweep_s: float) -> bool:
        """As the outlet's, once there is one."""
        return self._outlet is not None and self._outlet.beat(now, heartbeat_s, sweep_s)

    def stalled_for(self, now: float) -> float:
        """As the outlet's; 0 before there is one."""
        return self._outlet.stalled_for(now) if self._outlet is not None else 0.0

    def evict(self) -> None:
        """Cuts the connection without the end of the body, so that the client knows and comes back."""
        if self._outlet is not None:
            self._outlet.cut()

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait for this reader's socket."""
        return self._outlet.buffered_bytes if self._outlet is not None else 0
