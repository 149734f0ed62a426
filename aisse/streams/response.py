"""The HTTP response that a stream is read through: its headers, and how its body ends."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http import StreamWriter
from aiohttp_sse import EventSourceResponse

from aisse.sse import opening

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

    from aisse.settings import Settings

RETRY_MS = 2000

# SO_LINGER (socket(7)): on, with no time at all; off.
_RESET = struct.pack("ii", 1, 0)
_IN_ORDER = struct.pack("ii", 0, 0)

# The kernel counts from the last byte that the peer has acknowledged, eviction from the last byte that the kernel took,
# as the sweep saw it. Eviction has to come first, since it is what the log tells of.
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
        """Sends the headers. HTTP/1.0 knows no chunks: there, the body ends with the connection."""
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
        """Heartbeats are the sweep's; this task ends at once."""


async def turn_away(
    request: web.Request, response: StreamResponse, cursor: str | None, reconnect: bytes
) -> StreamResponse:
    """Answers a request for a stream that is not here with `reconnect` alone, and breaks the body off a second later.

    A native EventSource gives up for good on any status but 200; like this it comes back with its cursor. The handler
    is cancelled when the client leaves before that.
    """
    writer = await response.prepare(request)
    assert isinstance(writer, StreamWriter)
    await writer.write(opening(RETRY_MS, cursor) + reconnect, drain=False)
    await asyncio.sleep(BREAK_OFF_S)
    # Not by raising: aiohttp would log as an error what is meant.
    request.protocol.force_close()
    return response
