"""An HTTP and SSE client for tests: one socket, read exactly as far as a test asks, nothing forgiven.

Real clients read ahead, skip what they do not know and hide where a chunk ended; this one shows all of it.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_OPENING = re.compile(r"retry: \d+\n(?:id: (\S+\.\d+)\n)?")
_FRAME = re.compile(r"event: (.*)\n((?:data: .*\n)+)id: (\S+)\n\n")
_CONTROL = re.compile(r"event: (reconnect)\nretry: (\d+)\ndata: (.*)\n\n")
_HEARTBEAT = ": heartbeat\n"


@dataclass(frozen=True)
class Frame:
    """One event as it was written."""

    event: str
    data: str
    id: str

    @property
    def seq(self) -> int:
        return int(self.id.rpartition(".")[2])


@dataclass(frozen=True)
class Control:
    """One control event: it has a time to come back after, and no id."""

    event: str
    retry_ms: int
    data: dict[str, Any]


@dataclass
class Written:
    """What one or more writes of the server held, in order: heartbeats, frames, controls, and the opening's cursor."""

    opening: str | None = None
    items: list[Frame | Control | str] = field(default_factory=list)

    @property
    def frames(self) -> list[Frame]:
        return [item for item in self.items if isinstance(item, Frame)]

    @property
    def controls(self) -> list[Control]:
        return [item for item in self.items if isinstance(item, Control)]

    @property
    def heartbeats(self) -> int:
        return self.items.count("heartbeat")


def parse(payload: bytes) -> Written:
    """Takes an event stream apart. AssertionError unless it consists of whole events and whole heartbeats only."""
    text = payload.decode()
    written = Written()
    position = 0
    if (match := _OPENING.match(text)) is not None:
        written.opening = match[1]
        position = match.end()
    while position < len(text):
        if text.startswith(_HEARTBEAT, position):
            written.items.append("heartbeat")
            position += len(_HEARTBEAT)
            continue
        if (match := _CONTROL.match(text, position)) is not None:
            written.items.append(Control(match[1], int(match[2]), json.loads(match[3])))
            position = match.end()
            continue
        match = _FRAME.match(text, position)
        assert match is not None, f"neither a frame nor a heartbeat: {text[position : position + 200]!r}"
        lines = match[2].removeprefix("data: ").removesuffix("\n")
        written.items.append(Frame(match[1], lines.replace("\ndata: ", "\n"), match[3]))
        position = match.end()
    return written


def joined(frames: list[Frame]) -> dict[tuple[int, str], bytes]:
    """What a client accumulates: text by block and kind, in UTF-16, which is what JavaScript's strings are."""
    texts: dict[tuple[int, str], bytes] = {}
    for item in frames:
        data = json.loads(item.data)
        if item.event == "content_block_delta":
            for name in ("text", "thinking"):
                if name in data["delta"]:
                    at = data["index"], data["delta"]["type"]
                    piece = data["delta"][name].encode("utf-16-le", "surrogatepass")
                    texts[at] = texts.get(at, b"") + piece
    return texts


def mergeable(item: Frame) -> bool:
    return item.event == "content_block_delta" and bool(re.search(r"(text|thinking)_delta", item.data))


class ChunkedDecoder:
    """RFC 9112 section 7.1, without extensions and trailers, which aiohttp does not send."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        """Whole chunks, in order."""
        self.ended = False
        """The terminating chunk has come; what follows it is in `rest`."""
        self.rest = b""
        """Bytes that are no whole chunk yet."""

    def feed(self, data: bytes) -> None:
        self.rest += data
        while not self.ended:
            line, found, after = self.rest.partition(b"\r\n")
            if not found:
                return
            size = int(line, 16)
            if len(after) < size + 2:
                return
            assert after[size : size + 2] == b"\r\n"
            self.rest = after[size + 2 :]
            if size:
                self.chunks.append(after[:size])
            else:
                self.ended = True


class RawClient:
    """One connection. `async with await RawClient.connect(address) as client: ...`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.broken = False
        """The peer has closed or reset the connection."""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = ChunkedDecoder()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(
        cls, address: tuple[str, int], *, receive_buffer_bytes: int | None = None, source: str | None = None
    ) -> Self:
        """Connects from the address `source`; with `receive_buffer_bytes`, to a kernel buffer of that size."""
        sock = socket.socket()
        sock.setblocking(False)
        try:
            if receive_buffer_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
            if source is not None:
                sock.bind((source, 0))
            await asyncio.get_running_loop().sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """FIN, or RST where the kernel holds bytes that were not read."""
        self.sock.close()

    def reset(self) -> None:
        """RST, whatever is on its way."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def get(self, path: str) -> None:
        await self.send(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())

    async def post(self, body: dict[str, Any], path: str = "/api/chat") -> None:
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
        await self.send(head.encode() + b"\r\n\r\n" + payload)

    async def answered(self) -> None:
        """Reads the status line and headers; what came with them of the body is in `body`. May be called again."""
        received = self.body.rest
        self.body = ChunkedDecoder()
        while b"\r\n\r\n" not in received:
            data = await self._recv(64 << 10)
            assert data, f"the connection ended within the head of a response: {received!r}"
            received += data
        head, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        self.status = int(status.split(" ")[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if self.headers.get("transfer-encoding") == "chunked":
            self.body.feed(rest)
        else:
            self.body.rest = rest

    async def read(self, size: int = 64 << 10) -> bytes:
        """Takes at most `size` bytes from the socket, as they come; empty once the connection is broken."""
        data = await self._recv(size)
        self.body.feed(data)
        return data

    async def read_until(self, condition: Callable[[RawClient], bool], timeout_s: float = 60.0) -> None:
        """Reads until `condition` of this client holds, or the connection is broken, which fails the test."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                assert await self.read() or condition(self), f"the connection ended after {self.body.chunks[-1:]}"

    async def read_to_end(self, timeout_s: float = 60.0) -> None:
        """Reads until the body has ended cleanly or the connection is broken."""
        async with asyncio.timeout(timeout_s):
            while not self.body.ended and not self.broken:
                await self.read()

    @property
    def written(self) -> Written:
        """The body so far. AssertionError unless every chunk by itself is whole frames and heartbeats."""
        whole = Written()
        for number, chunk in enumerate(self.body.chunks):
            part = parse(chunk)
            assert part.opening is None or number == 0
            whole.opening = whole.opening or part.opening
            whole.items += part.items
        return whole

    async def _recv(self, size: int) -> bytes:
        # What the kernel has already is returned without a turn for anybody else, such as the server under test.
        await asyncio.sleep(0)
        try:
            data = await self._loop.sock_recv(self.sock, size)
        except ConnectionError:
            data = b""
        if not data:
            self.broken = True
        return data
