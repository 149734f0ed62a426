"""A client of what stands before aisse, by HTTP/1.1 or HTTP/2, over TLS or not: one request on one connection.

It reads exactly as far as a test asks, and tells a body that has ended from one that broke off.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from typing import TYPE_CHECKING, Any, Literal, Self

import h2.config
import h2.connection
import h2.errors
import h2.events
from rawclient import ChunkedDecoder

if TYPE_CHECKING:
    from types import TracebackType

Way = Literal["http1", "https1", "http2"]
"""HTTP/1.1, the same over TLS, HTTP/2 over TLS."""

READ_BYTES = 64 << 10


class Wire:
    """A socket, with TLS in it or without. Nothing is read ahead but what TLS needs for a record."""

    def __init__(self, sock: socket.socket, tls: ssl.SSLContext | None, name: str) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_hostname=name) if tls else None

    async def handshake(self) -> None:
        while self._tls is not None:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                assert await self._fill(READ_BYTES), "the connection ended within the handshake"
            else:
                await self._flush()
                return

    async def send(self, data: bytes) -> None:
        if self._tls is None:
            await self._loop.sock_sendall(self.sock, data)
            return
        self._tls.write(data)
        await self._flush()

    async def receive(self, size: int) -> bytes:
        """At most `size` bytes as they come; empty once the peer has closed or reset the connection."""
        if self._tls is None:
            return await self._take(size)
        while True:
            try:
                return self._tls.read(size)
            except ssl.SSLWantReadError:
                if not await self._fill(size):
                    return b""
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    async def _flush(self) -> None:
        await self._loop.sock_sendall(self.sock, self._outgoing.read())

    async def _fill(self, size: int) -> bool:
        data = await self._take(size)
        self._incoming.write(data)
        return bool(data)

    async def _take(self, size: int) -> bytes:
        try:
            return await self._loop.sock_recv(self.sock, size)
        except ConnectionError:
            return b""


class Client:
    """One request and its answer. `async with await connect(...) as client: ...`."""

    def __init__(self, wire: Wire, name: str) -> None:
        self.wire = wire
        self.name = name
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        """What has come so far."""
        self.ended = False
        """The body is complete."""
        self.broken = False
        """There will be no more, and the body is not complete."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wire.sock.close()

    async def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> None:
        """Sends a request. Header names are lower case."""
        raise NotImplementedError

    async def ask(self, question: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Sends `POST /api/chat`."""
        fields = {"content-type": "application/json"} | (headers or {})
        await self.request("POST", "/api/chat", json.dumps(question).encode(), fields)

    async def read(self, size: int = READ_BYTES) -> None:
        """Reads once from the connection, at most `size` bytes."""
        raise NotImplementedError

    async def leave(self) -> None:
        """Ends the request as a page that is closed does."""
        raise NotImplementedError

    async def answered(self, timeout_s: float = 60.0) -> None:
        """Reads until there are status and headers."""
        async with asyncio.timeout(timeout_s):
            while not self.status:
                assert not self.broken, "no answer has come"
                await self.read()

    async def until(self, text: bytes, timeout_s: float = 60.0) -> None:
        """Reads until `text` has come."""
        async with asyncio.timeout(timeout_s):
            while text not in self.body:
                assert not self.ended, f"{bytes(self.body[-500:])!r} is all"
                assert not self.broken, f"broken off after {bytes(self.body[-500:])!r}"
                await self.read()

    async def to_end(self, timeout_s: float = 60.0) -> str:
        """Reads until the body is complete, or the connection or stream broken off."""
        async with asyncio.timeout(timeout_s):
            while not (self.ended or self.broken):
                await self.read()
        return self.body.decode()


class Http1(Client):
    """HTTP/1.1."""

    def __init__(self, wire: Wire, name: str) -> None:
        super().__init__(wire, name)
        self._received = b""
        self._length: int | None = None
        self._chunks: ChunkedDecoder | None = None
        self._decoded = 0

    async def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> None:
        fields = {"host": self.name} | (headers or {})
        if body is not None:
            fields.setdefault("content-length", str(len(body)))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        await self.wire.send("\r\n".join(lines).encode() + (body or b""))

    async def read(self, size: int = READ_BYTES) -> None:
        data = await self.wire.receive(size)
        if not data:
            self.broken = not self.ended
            return
        if self.status:
            self._take(data)
            return
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if found:
            line, *fields = head.decode().split("\r\n")
            self.headers = {
                name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)
            }
            self.status = int(line.split(" ")[1])
            if "chunked" in self.headers.get("transfer-encoding", ""):
                self._chunks = ChunkedDecoder()
            else:
                self._length = int(self.headers.get("content-length", "0"))
            self._take(rest)

    def _take(self, data: bytes) -> None:
        if self._chunks is None:
            self.body += data
            self.ended = len(self.body) == self._length
            return
        self._chunks.feed(data)
        for chunk in self._chunks.chunks[self._decoded :]:
            self.body += chunk
        self._decoded = len(self._chunks.chunks)
        self.ended = self._chunks.ended

    async def leave(self) -> None:
        self.wire.sock.close()


class Http2(Client):
    """HTTP/2. Takes as much as it has read: windows open with `read`."""

    def __init__(self, wire: Wire, name: str) -> None:
        super().__init__(wire, name)
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._http.initiate_connection()
        self._stream = 0

    async def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> None:
        pseudo = {":method": method, ":scheme": "https", ":authority": self.name, ":path": path}
        fields = {name: value for name, value in (headers or {}).items() if name != "host"}
        self._stream = self._http.get_next_available_stream_id()
        self._http.send_headers(self._stream, [*pseudo.items(), *fields.items()], end_stream=body is None)
        left = memoryview(body or b"")
        while left:
            room = min(self._http.local_flow_control_window(self._stream), self._http.max_outbound_frame_size)
            if not room:
                await self.wire.send(self._http.data_to_send())
                await self.read()
                if self.status or self.broken:
                    break  # refused before all was sent
                continue
            self._http.send_data(self._stream, bytes(left[:room]), end_stream=len(left) <= room)
            left = left[room:]
        await self.wire.send(self._http.data_to_send())

    async def read(self, size: int = READ_BYTES) -> None:
        data = await self.wire.receive(size)
        if not data:
            self.broken = not self.ended
            return
        for event in self._http.receive_data(data):
            match event:
                case h2.events.ResponseReceived():
                    self.headers = {str(name): str(value) for name, value in event.headers}
                    self.status = int(self.headers.pop(":status"))
                case h2.events.DataReceived():
                    self.body += event.data
                    self._http.acknowledge_received_data(event.flow_controlled_length, self._stream)
                case h2.events.StreamEnded():
                    self.ended = True
                case h2.events.StreamReset():
                    self.broken = not self.ended
                case h2.events.ConnectionTerminated():
                    # No new requests; this one goes on.
                    assert event.error_code == h2.errors.ErrorCodes.NO_ERROR
        if unsent := self._http.data_to_send():
            try:
                await self.wire.send(unsent)
            except ConnectionError:
                pass  # what has come is read first

    async def leave(self) -> None:
        self._http.reset_stream(self._stream, h2.errors.ErrorCodes.CANCEL)
        await self.wire.send(self._http.data_to_send())


async def connect(
    address: tuple[str, int],
    way: Way,
    tls: ssl.SSLContext,
    *,
    source: str = "127.0.0.1",
    receive_buffer_bytes: int | None = None,
) -> Client:
    """Connects to `address` from `source`, by which a server may limit; `tls` is for the ways that have it."""
    sock = socket.socket()
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        sock.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(sock, address)
        wire = Wire(sock, None if way == "http1" else tls, address[0])
        async with asyncio.timeout(60):
            await wire.handshake()
    except BaseException:
        sock.close()
        raise
    name = f"{address[0]}:{address[1]}"
    return Http2(wire, name) if way == "http2" else Http1(wire, name)


def context(way: Way) -> ssl.SSLContext:
    """TLS for a way, without any trusted authority yet; only HTTP/2 is spoken where HTTP/2 is asked for."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.set_alpn_protocols(["h2"] if way == "http2" else ["http/1.1"])
    return tls
