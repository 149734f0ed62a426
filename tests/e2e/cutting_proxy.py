"""A TCP proxy that breaks a connection off at a chosen byte of what the server sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self, cast

if TYPE_CHECKING:
    from types import TracebackType

Part = Literal["head", "body", "heartbeat", "framing", "end"]
Place = tuple[Part, int]
"""A byte of a chunked response: its part, and its number there from 0.

`head` is everything to the blank line; `body` the chunks' content without heartbeats, so that a number means the same
byte in every run, whenever heartbeats came and however events were grouped; `heartbeat` the content of those chunks;
`framing` the chunks' sizes and the line ends around them; `end` the terminating chunk.
"""


class Places:
    """Names the bytes of one response as they come."""

    def __init__(self) -> None:
        self._counts: Counter[Part] = Counter()
        self._part: Literal["head", "size", "content", "close", "end"] = "head"
        self._line = bytearray()
        self._left = 0
        self._kind: Part = "body"

    def name(self, byte: int) -> Place:
        """The place of the next byte."""
        part = self._named(byte)
        number = self._counts[part]
        self._counts[part] += 1
        return part, number

    def _named(self, byte: int) -> Part:
        match self._part:
            case "head":
                self._line.append(byte)
                if self._line.endswith(b"\r\n\r\n"):
                    self._begin("size")
                return "head"
            case "size":
                self._line.append(byte)
                if self._line == b"0":
                    self._begin("end")
                    return "end"
                if self._line.endswith(b"\r\n"):
                    self._left = int(self._line, 16)
                    self._begin("content")
                return "framing"
            case "content":
                if not self._line:
                    # Each write of the server is a chunk, and only a heartbeat begins like this.
                    self._kind = "heartbeat" if byte == ord(":") else "body"
                    self._line.append(byte)
                self._left -= 1
                if not self._left:
                    self._begin("close")
                return self._kind
            case "close":
                self._line.append(byte)
                if self._line == b"\r\n":
                    self._begin("size")
                return "framing"
            case "end":
                return "end"

    def _begin(self, part: Literal["size", "content", "close", "end"]) -> None:
        self._part = part
        self._line.clear()


@dataclass
class Line:
    """A port of the proxy. Its first connection is cut before the byte at `place`; later ones are left alone."""

    place: Place | None
    port: int = 0
    cut: bool = False
    requests: int = 0
    """Requests that came in on all its connections."""
    passed: bytearray = field(default_factory=bytearray)
    """What the first connection's client got before the cut, or of all if there was none."""

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class CuttingProxy:
    """Stands before the server at `address`. `async with` closes every port and connection of it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.connections: set[_FromClient] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.close()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def line(self, place: Place | None) -> Line:
        """A new port; None cuts nothing."""
        line = Line(place)
        server = await asyncio.get_running_loop().create_server(lambda: _FromClient(self, line), "127.0.0.1", 0)
        self._servers.append(server)
        line.port = server.sockets[0].getsockname()[1]
        return line


class _FromClient(asyncio.Protocol):
    def __init__(self, proxy: CuttingProxy, line: Line) -> None:
        self._proxy = proxy
        self._line = line
        self._places: Places | None = None
        self._client: asyncio.Transport | None = None
        self._server: asyncio.Transport | None = None
        self._unsent: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client = cast("asyncio.Transport", transport)  # uvloop's is one in all but its class
        self._proxy.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if not self._line.requests:
            self._places = Places()
        # Clients send a request's head in one write.
        self._line.requests += data.startswith((b"GET ", b"POST "))
        if self._server is not None:
            self._server.write(data)
            return
        self._unsent.append(data)
        if len(self._unsent) == 1:
            task = asyncio.create_task(self._connect())
            self._proxy.tasks.add(task)
            task.add_done_callback(self._proxy.tasks.discard)

    def connection_lost(self, exc: Exception | None) -> None:
        self.close()

    async def _connect(self) -> None:
        with contextlib.suppress(ConnectionError):
            host, port = self._proxy.address
            server, _ = await asyncio.get_running_loop().create_connection(lambda: _FromServer(self), host, port)
            if self._client is None:
                server.abort()
                return
            server.writelines(self._unsent)
            self._server = server
            return
        self.close()

    def from_server(self, data: bytes) -> None:
        if self._client is None:
            return
        if self._places is None:
            self._client.write(data)
            return
        for index, byte in enumerate(data):
            if self._places.name(byte) == self._line.place:
                self._pass(data[:index])
                self._line.cut = True
                self.close()
                return
        self._pass(data)

    def _pass(self, data: bytes) -> None:
        assert self._client is not None
        self._line.passed += data
        self._client.write(data)

    def close(self) -> None:
        """Lets the client have what was passed on, and ends both connections."""
        self._proxy.connections.discard(self)
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._server is not None:
            self._server.abort()
            self._server = None


class _FromServer(asyncio.Protocol):
    def __init__(self, client: _FromClient) -> None:
        self._client = client

    def data_received(self, data: bytes) -> None:
        self._client.from_server(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.close()
