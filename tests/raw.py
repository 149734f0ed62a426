"""HTTP by hand: what an HTTP library would not send, and what it would not show of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from multidict import CIMultiDict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

ANSWER_S = 60.0


@dataclass
class Answer:
    """One response, its body read by its length or its chunks; `chunks` are None for a body that has a length."""

    status: int
    version: str
    headers: CIMultiDict[str]
    body: bytes
    chunks: list[bytes] | None = None

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One TCP connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Hands `data` to the kernel; a peer that closes meanwhile is no error."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def head(self) -> Answer:
        """Status line and headers of the next response; its body stays to be read. Raises EOFError at the end."""
        async with asyncio.timeout(ANSWER_S):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status, _ = lines[0].split(" ", 2)
        headers: CIMultiDict[str] = CIMultiDict()
        for line in lines[1:-2]:
            name, _, value = line.partition(":")
            headers.add(name, value.strip())
        return Answer(int(status), version, headers, b"")

    async def answer(self, method: str = "POST") -> Answer:
        """The next response with its body. Raises EOFError where the connection ends before it does."""
        answer = await self.head()
        async with asyncio.timeout(ANSWER_S):
            if method == "HEAD" or answer.status in {204, 304}:
                pass
            elif answer.headers.get("Transfer-Encoding") == "chunked":
                answer.chunks = [chunk async for chunk in self._chunks()]
                answer.body = b"".join(answer.chunks)
            elif "Content-Length" in answer.headers:
                answer.body = await self.reader.readexactly(int(answer.headers["Content-Length"]))
            else:
                answer.body = await self.reader.read()
        return answer

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    async def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        async with asyncio.timeout(ANSWER_S):
            return await self.reader.read()

    async def usable(self) -> bool:
        """True if a further request on this connection is answered, False if the server has closed it in order."""
        await self.send(request("GET", "/health/live"))
        try:
            answer = await self.answer("GET")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise AssertionError("the connection was closed in the middle of something") from error
            return False
        except ConnectionResetError:
            return False  # our request crossed the server's close
        assert answer.status == 200
        return True

    def reset(self) -> None:
        """Ends the connection with a RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(address: tuple[str, int]) -> AsyncIterator[Connection]:
    """A connection, closed at the end."""
    reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str | None] | None = None,
    *,
    version: str = "HTTP/1.1",
) -> bytes:
    """A request's bytes. A body brings its length and type; a header that is None is left out."""
    fields: dict[str, str | None] = {"Host": "localhost"}
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= headers or {}
    lines = [f"{method} {path} {version}"] + [f"{name}: {value}" for name, value in fields.items() if value is not None]
    # Header values as they are given, whatever bytes stand behind them.
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")
