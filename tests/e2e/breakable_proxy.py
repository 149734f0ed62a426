"""A TCP proxy whose running event streams a test breaks: by a reset, or in silence."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Self, cast

if TYPE_CHECKING:
    from types import TracebackType

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER without time: what close() then sends is a RST


class BreakableProxy:
    """Stands before the server at `address`. `async with` closes its port and every connection."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._server_address = address
        self._connections: set[_FromClient] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._down = False
        self.port = 0
        self.streams = 0
        """Event streams that came through."""
        self.broken = 0
        """Event streams that were broken before their end."""
        self.refused = 0
        """Connections that were reset when they came, since the proxy was down."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.get_running_loop().create_server(lambda: _FromClient(self), "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for connection in list(self._connections):
            connection.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> None:
        """Resets the connections that an event stream runs on."""
        for connection in [one for one in self._connections if one.streaming]:
            self.broken += 1
            connection.reset()

    def down(self, *, silently: bool = False) -> None:
        """Until `up` nothing comes through. Connections are reset; `silently`, streams are just not heard of again."""
        self._down = True
        for connection in list(self._connections):
            self.broken += connection.streaming
            if silently and connection.streaming:
                connection.silence()
            else:
                connection.reset()

    def up(self) -> None:
        self._down = False

    # --- for the connections ------------------------------------------------------------------------------------

    def begin(self, connection: _FromClient) -> bool:
        """Whether it may live."""
        if self._down:
            self.refused += 1
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: _FromClient) -> None:
        self._connections.discard(connection)

    def connect(self, connection: _FromClient) -> None:
        task = asyncio.create_task(connection.connect(self._server_address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _FromClient(asyncio.Protocol):
    def __init__(self, proxy: BreakableProxy) -> None:
        self._proxy = proxy
        self._server: asyncio.Transport | None = None
        self._unsent: list[bytes] = []
        self._silent = False
        self._closed = False
        self.streaming = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client = cast("asyncio.Transport", transport)  # uvloop's is one in all but its class
        if self._proxy.begin(self):
            self._proxy.connect(self)
        else:
            self.reset()

    def data_received(self, data: bytes) -> None:
        if self._silent:
            return
        # Browsers do not pipeline: a request comes when the response before it is over.
        self.streaming = False
        if self._server is None:
            self._unsent.append(data)
        else:
            self._server.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.close()

    async def connect(self, address: tuple[str, int]) -> None:
        with contextlib.suppress(ConnectionError):
            server, _ = await asyncio.get_running_loop().create_connection(lambda: _FromServer(self), *address)
            if self._closed or self._silent:
                server.abort()
                return
            server.writelines(self._unsent)
            self._server = server
            return
        self.close()

    def from_server(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 200") and b"text/event-stream" in data.partition(b"\r\n\r\n")[0]:
            self.streaming = True
            self._proxy.streams += 1
        if data.endswith(b"0\r\n\r\n"):
            self.streaming = False
        self._client.write(data)

    def reset(self) -> None:
        sock: socket.socket = self._client.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._client.abort()
        self.close()

    def silence(self) -> None:
        """Leaves the client's side open. The server sees that its peer is gone."""
        self._silent = True
        self.streaming = False
        if self._server is not None:
            self._server.abort()

    def close(self) -> None:
        """Lets the client have what was passed on, and ends both connections."""
        if self._closed:
            return
        self._closed = True
        self._proxy.forget(self)
        self._client.close()
        if self._server is not None:
            self._server.abort()


class _FromServer(asyncio.Protocol):
    def __init__(self, client: _FromClient) -> None:
        self._client = client

    def data_received(self, data: bytes) -> None:
        self._client.from_server(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._client._silent:
            self._client.close()
