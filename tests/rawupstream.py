"""An HTTP upstream made of bytes: it answers exactly what a test says, and breaks off where a test says."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import socket
import struct
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    Answer = Callable[["Request", "Connection"], Awaitable[None]]


@dataclass
class Request:
    """A request as it came, body included. Header names are lower case."""

    line: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def prompt(self) -> str:
        """The text of its last message."""
        content: str = json.loads(self.body)["messages"][-1]["content"]
        return content


class Connection(asyncio.Protocol):
    """One accepted connection. `answer` runs for each request in turn."""

    def __init__(self, upstream: RawUpstream) -> None:
        self._upstream = upstream
        self._received = b""
        self._room = asyncio.Event()
        self._room.set()
        self.requests = 0
        self.lost = asyncio.Event()
        """Set once the connection is gone, whoever closed it."""

    def send(self, *parts: bytes) -> None:
        """Hands bytes to the kernel, or buffers what it does not take. Does nothing once the connection is lost."""
        if not self._transport.is_closing():
            self._transport.write(b"".join(parts))

    async def drain(self) -> None:
        """Returns once nothing but the kernel buffers, or the connection is lost."""
        await self._room.wait()

    async def delivered(self) -> None:
        """Returns once the peer's kernel has everything, which a reset cannot take back, or the connection is lost."""
        await self.drain()
        unsent = bytearray(4)
        while self._sock.fileno() >= 0:
            fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, unsent)
            if not int.from_bytes(unsent, sys.byteorder):
                return
            await asyncio.sleep(0.001)

    def unread(self) -> int:
        """Bytes that the peer's kernel has and the peer has not read."""
        own, peer = (f":{address[1]:04X}" for address in (self._sock.getsockname(), self._sock.getpeername()))
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, queues, *_ = line.split()
            if local.endswith(peer) and remote.endswith(own):
                return int(queues.partition(":")[2], 16)
        raise ProcessLookupError("the peer has closed its socket")

    def fin(self) -> None:
        """Closes in an orderly way."""
        self._transport.close()

    def rst(self) -> None:
        """Resets."""
        if self._sock.fileno() < 0:
            return  # the other side has closed already
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # --- asyncio.Protocol -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self._transport.set_write_buffer_limits(high=0)
        self._sock: socket.socket = transport.get_extra_info("socket")
        self._upstream.connections.append(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            line, *fields = self._received[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
            whole = end + 4 + int(headers.get("content-length", "0"))
            if len(self._received) < whole:
                return
            request = Request(line, headers, self._received[end + 4 : whole])
            self._received = self._received[whole:]
            self.requests += 1
            self._upstream.take(request, self)

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._room.set()
        self.lost.set()


class RawUpstream:
    """The server. `requests` and `connections` hold all there were, in order."""

    def __init__(self, answer: Answer, tasks: asyncio.TaskGroup, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self.url = ""
        self.requests: list[Request] = []
        self.connections: list[Connection] = []
        self._answer = answer
        self._tasks = tasks
        self._running: set[asyncio.Task[None]] = set()

    def take(self, request: Request, connection: Connection) -> None:
        """Answers in a task of its own."""
        self.requests.append(request)
        task = self._tasks.create_task(self._run(request, connection))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, request: Request, connection: Connection) -> None:
        await self._answer(request, connection)

    async def start(self, host: str) -> asyncio.Server:
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self), host, 0, backlog=4096, ssl=self._tls
        )
        port = server.sockets[0].getsockname()[1]
        scheme = "https" if self._tls is not None else "http"
        self.url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        self.server = server
        return server

    def close(self) -> None:
        for connection in self.connections:
            if not connection.lost.is_set():
                connection.rst()
        for task in self._running:
            task.cancel()


@contextlib.asynccontextmanager
async def raw_upstream(
    answer: Answer, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawUpstream]:
    """A server whose every request is answered by `answer(request, connection)`, until the block ends.

    What is raised in `answer` ends the block at once, and is raised there.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            upstream = RawUpstream(answer, tasks, tls)
            server = await upstream.start(host)
            try:
                yield upstream
            finally:
                server.close()
                upstream.close()
                await server.wait_closed()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise


def head(
    status: str = "200 OK", content_type: str = "text/event-stream", *fields: str, framing: str = "chunked"
) -> bytes:
    """A response's headers. `framing`: `chunked`, `close`, or the length in bytes."""
    framed = {"chunked": "Transfer-Encoding: chunked", "close": "Connection: close"}.get(
        framing, f"Content-Length: {framing}"
    )
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", framed, *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def event(data: dict[str, Any], line_end: str = "\n") -> bytes:
    """One event as the Messages API sends it."""
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {data['type']}\ndata: {encoded}\n\n".replace("\n", line_end).encode()


def message_start(input_tokens: int = 7) -> bytes:
    """The first event of an answer."""
    usage = {"input_tokens": input_tokens, "output_tokens": 1}
    return event(
        {"type": "message_start", "message": {"id": "msg_1", "role": "assistant", "content": [], "usage": usage}}
    )


def delta(text: str) -> bytes:
    """One piece of an answer's text."""
    return event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})


def message_delta(output_tokens: int = 11) -> bytes:
    """The last but one event of an answer."""
    usage = {"output_tokens": output_tokens}
    return event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage})


PING = b'event: ping\ndata: {"type": "ping"}\n\n'
MESSAGE_STOP = event({"type": "message_stop"})
