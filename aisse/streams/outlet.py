"""The socket that a reader's response is written to: its room, its writes, its heartbeats, and whether it stalls."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import structlog

from aisse.sse import HEARTBEAT

if TYPE_CHECKING:
    from aiohttp import web
    from aiohttp.http import StreamWriter

    from aisse.settings import Settings

# Bounds what the kernel keeps for a client that takes nothing; what is in flight is bounded by SO_SNDBUF alone.
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", None)

# Users filter their logs by this name. It stays, wherever the module is.
_log = structlog.get_logger("aisse.reader")


def bound_buffers(transport: asyncio.Transport, settings: Settings) -> None:
    """Has a connection count as full early: by default a client that stalls swallows megabytes first."""
    high = int(settings.write_buffer_bytes)
    transport.set_write_buffer_limits(high=high)
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in {socket.AF_INET, socket.AF_INET6}:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.send_buffer_bytes)
        if _TCP_NOTSENT_LOWAT is not None:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, high // 4)


class Outlet:
    """One response that has been opened, on its connection. Nothing else writes to it until the body ends.

    - Every write is whole frames or whole lines and none of them waits, so writers never interleave. Only `room` waits,
      and only the reader's own task calls it: aiohttp's waiters share one future
      (test_any_order_of_events_gives_every_reader_what_follows_its_cursor).
    - A heartbeat never goes to a socket that is full, and never follows the last chunk
      (test_no_heartbeat_follows_the_end_of_a_body).
    """

    __slots__ = (
        "_chunked",
        "_last_taken",
        "_last_write",
        "_protocol",
        "_stream_id",
        "_taken",
        "_transport",
        "_write_buffer_bytes",
        "_writer",
        "_written",
        "closing",
        "output_bytes",
    )

    def __init__(
        self,
        stream_id: str,
        transport: asyncio.Transport,
        protocol: web.RequestHandler,
        writer: StreamWriter,
        write_buffer_bytes: int,
    ) -> None:
        """`writer` is what the response's headers were given to; `write_buffer_bytes` is the most that `push` takes."""
        self._stream_id = stream_id
        self._transport = transport
        self._protocol = protocol
        self._writer = writer
        self._write_buffer_bytes = write_buffer_bytes
        self._chunked = writer.chunked
        self.closing = False
        """Nothing may be written any more."""
        self.output_bytes = 0
        """How many bytes were written, those of the headers among them."""
        self._written = 0  # as of the last look
        self._last_write = 0.0
        self._taken = 0
        self._last_taken = asyncio.get_running_loop().time()

    async def open(self, data: bytes) -> None:
        """Writes the first bytes in one send with the headers. Never waits.

        Firefox gives up for good on a response that breaks between the two.
        """
        await self._writer.write(data, drain=False)
        self.output_bytes = self._writer.output_size

    @property
    def full(self) -> bool:
        """Whether as many bytes wait for the socket as may."""
        return self._protocol.writing_paused

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait for the socket."""
        return self._transport.get_write_buffer_size()

    async def room(self) -> None:
        """Returns once the socket has room. It also returns when the connection was lost cleanly."""
        if self._protocol.writing_paused:
            await self._writer.drain()

    def write(self, data: bytes) -> None:
        """Writes whole frames or lines as one chunk. Raises ConnectionError where the connection is gone."""
        transport = self._transport
        if transport.is_closing():
            raise ConnectionResetError("the client has left")
        # The chunk's frame (RFC 9112, section 7.1) is put around it here: aiohttp's writer would take a coroutine and
        # three calls more for it, for every token.
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.output_bytes += len(data)
        transport.write(data)

    def push(self, frames: bytes) -> bool:
        """Writes `frames` now, in one write; False, and nothing is written, where the socket is full.

        False also where they alone would more than fill it: what an upstream says at once, when it is much, is read
        from the log.
        """
        if self._protocol.writing_paused or len(frames) > self._write_buffer_bytes:
            return False
        try:
            self.write(frames)
        except ConnectionError:
            # The handler's cancellation is on its way, unless the client has only shut down its sending side: then the
            # connection closes no earlier than when it has taken everything.
            self.cut()
        except Exception:
            # The stream is others' too: it must neither break off nor, at its end, be left half ended.
            _log.exception("reader failed", stream_id=self._stream_id[:8])
            self.closing = True
            self.cut()
        return True

    def beat(self, now: float, heartbeat_s: float, sweep_s: float) -> bool:
        """Writes a heartbeat where nothing was written for `heartbeat_s`; never waits. True if it wrote.

        This is asked every `sweep_s`. It sees by the count what was written since, and takes that for half a sweep old,
        so that a frame needs not read the clock.
        """
        if self.closing or self._protocol.writing_paused:
            return False
        if self.output_bytes > self._written:
            self._written = self.output_bytes
            self._last_write = now - sweep_s / 2
            return False
        if now - self._last_write < heartbeat_s:
            return False
        self._last_write = now
        try:
            self.write(HEARTBEAT)
        except ConnectionError:
            return False  # it has just left
        self._written = self.output_bytes
        return True

    def stalled_for(self, now: float) -> float:
        """Seconds since the client last took a byte, while bytes wait for it; 0 while none do."""
        if not self._protocol.writing_paused:
            self._last_taken = now
            return 0.0
        taken = self.output_bytes - self.buffered_bytes
        if taken > self._taken:
            self._taken = taken
            self._last_taken = now
        return now - self._last_taken

    def end(self) -> None:
        """Nothing but the end of the body follows; any byte of it that the client does not take counts as a stall."""
        # A heartbeat after the last chunk would be taken for the next response on this connection.
        self.closing = True
        # The sweep must still see a peer that never takes the last bytes, be they few. aiohttp would close its
        # connection when idle, but no earlier than the last byte has left: never.
        self._transport.set_write_buffer_limits(high=0)

    def close(self) -> None:
        """Closes the connection after what was written, without the end of the body."""
        self.closing = True
        self._transport.close()

    def cut(self) -> None:
        """Cuts the connection without the end of the body, so that the client knows and comes back."""
        self._transport.abort()
