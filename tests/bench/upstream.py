"""The benchmark's upstream: scripted token streams in Anthropic's format, over raw uvloop protocols.

Raw, because the upstream must not be what a run measures. `POST /v1/messages` answers by the script that the last
message's text holds as JSON; `POST /finish` lets every paced stream end after its next token; `GET /stats` counts.
"""

import argparse
import asyncio
import gc
import heapq
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import uvloop
from measure import percentile_ms
from wire import LAST_CHUNK, chunk, closing, delta, opening

_TICK_S = 0.001  # uvloop's timers are no finer
_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_BULK_FRAMES = 100


@dataclass(frozen=True)
class Script:
    """What one stream does: `rate` tokens a second (`events` of them, 0 for no end), due `phase` periods after a beat
    that all streams share; or `think`: message_start, then silence; or `bytes`: that many, as fast as they go.
    The first `burst` tokens come at once, before all that.
    """

    stream: int = 0
    events: int = 0
    rate: float = 50.0
    phase: float = 0.0
    think: bool = False
    bytes: int = 0
    burst: int = 0


def script_of(body: bytes) -> Script:
    """The script in a request's last message; ValueError, KeyError or TypeError where there is none."""
    content = json.loads(body)["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    return Script(**json.loads(text))


class Stream:
    """One answer on one connection."""

    def __init__(self, script: Script, transport: asyncio.Transport, over: Callable[[bool], None]) -> None:
        self.script = script
        self.tokens = 0
        self.finishing = False
        self.done = False
        self._transport = transport
        self._written = 0
        self._unsent = 0
        self._over = over
        frames = opening(script.stream)
        if script.think and not script.burst:
            del frames[1:]
        now = time.monotonic_ns()
        frames += [delta(script.stream, number, now) for number in range(script.burst)]
        self.tokens = script.burst
        self._write(_HEAD + b"".join(map(chunk, frames)))

    def sent_bytes(self) -> int:
        """Bytes that the kernel has taken."""
        return self._written - (self._unsent if self.done else self._transport.get_write_buffer_size())

    def token(self, now_ns: int) -> None:
        """Writes the next token, or the end."""
        script = self.script
        if self.finishing or (script.events and self.tokens >= script.events):
            self.end()
            return
        self._write(chunk(delta(script.stream, self.tokens, now_ns)))
        self.tokens += 1

    def pump(self, *, may_write: bool) -> None:
        """Writes a bulk answer for as long as the transport takes it; `may_write` is false while it is full."""
        if may_write and not self.done:
            now = time.monotonic_ns()
            count = min(_BULK_FRAMES, -(-(self.script.bytes - self._written) // 150))
            if count <= 0:
                self.end()
                return
            frames = (delta(self.script.stream, self.tokens + n, now) for n in range(count))
            self._write(b"".join(map(chunk, frames)))
            self.tokens += count

    def end(self) -> None:
        """Writes the end."""
        self._write(b"".join(map(chunk, closing(self.tokens))) + LAST_CHUNK)
        self.done = True
        self._over(False)

    def abort(self) -> None:
        """The connection is gone."""
        if not self.done:
            self._unsent = self._transport.get_write_buffer_size()
            self.done = True
            self._over(True)

    def _write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)


class Service:
    """All streams, their schedule and the counts. Counts of a stream outlive it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: list[tuple[int, int, Stream]] = []
        self._order = 0
        self._ticking = False
        self.streams: dict[int, Stream] = {}
        self.active = 0
        self.requests = 0
        self.aborted = 0
        self.late_ns: list[int] = []

    def begin(self, script: Script, transport: asyncio.Transport) -> Stream:
        self.requests += 1
        self.active += 1
        stream = self.streams[script.stream] = Stream(script, transport, self._over)
        if not script.think and not script.bytes:
            period = int(1e9 / script.rate)
            beat = time.monotonic_ns() // period + 1
            self._push(int((beat + script.phase) * period), stream)
        return stream

    def _over(self, aborted: bool) -> None:
        self.active -= 1
        self.aborted += aborted

    def finish(self) -> None:
        for stream in self.streams.values():
            stream.finishing = True

    def stats(self, *, reset: bool) -> dict[str, Any]:
        """`late_ms`: how far behind its schedule a token was handed to the socket, since the last reset."""
        late = sorted(self.late_ns)
        if reset:
            self.late_ns.clear()
        streams = self.streams.items()
        return {
            "requests": self.requests,
            "active": self.active,
            "aborted": self.aborted,
            "tokens": {number: stream.tokens for number, stream in streams},
            "bytes": {number: stream.sent_bytes() for number, stream in streams if stream.script.bytes},
            "late_ms": {"p50": percentile_ms(late, 0.5), "p99": percentile_ms(late, 0.99)},
        }

    def _push(self, due_ns: int, stream: Stream) -> None:
        self._order += 1
        heapq.heappush(self._due, (due_ns, self._order, stream))
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        due, now = self._due, time.monotonic_ns()
        while due and due[0][0] <= now:
            due_ns, order, stream = due[0]
            if stream.done:
                heapq.heappop(due)
                continue
            now = time.monotonic_ns()
            self.late_ns.append(now - due_ns)
            stream.token(now)
            # Absolute: a late token does not make the following ones late.
            heapq.heapreplace(due, (due_ns + int(1e9 / stream.script.rate), order, stream))
        self._ticking = bool(due)
        if due:
            self._loop.call_later(max(_TICK_S, (due[0][0] - now) / 1e9), self._tick)


class Connection(asyncio.Protocol):
    """HTTP/1.1 as far as the relays speak it: keep-alive, bodies with Content-Length."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._buffer = b""
        self._stream: Stream | None = None
        self._may_write = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        # Small buffers, so that "bytes written" stops soon after the relay stops reading.
        self._transport.set_write_buffer_limits(high=16384)
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stream is not None:
            self._stream.abort()

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        self._pump()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].decode("latin-1")
            request, *lines = head.split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            stop = end + 4 + int(headers.get("content-length", "0"))
            if len(self._buffer) < stop:
                return
            body, self._buffer = self._buffer[end + 4 : stop], self._buffer[stop:]
            method, target, _ = request.split(" ")
            self._answer(method, target, body)

    def _answer(self, method: str, target: str, body: bytes) -> None:
        path, _, query = target.partition("?")
        if (method, path) == ("GET", "/stats"):
            self._json(200, self._service.stats(reset=query == "reset=1"))
        elif (method, path) == ("POST", "/finish"):
            self._service.finish()
            self._json(200, {})
        elif (method, path) == ("POST", "/v1/messages"):
            self._begin(body)
        else:
            self._json(404, {"type": "error", "error": {"type": "not_found_error", "message": path}})

    def _begin(self, body: bytes) -> None:
        try:
            script = script_of(body)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self._json(400, {"type": "error", "error": {"type": "invalid_request_error", "message": str(error)}})
            return
        self._stream = self._service.begin(script, self._transport)
        self._pump()

    def _pump(self) -> None:
        stream = self._stream
        if stream is not None and stream.script.bytes and not stream.done:
            stream.pump(may_write=self._may_write)
            # One block a turn of the loop: paced streams keep their schedule beside bulk ones.
            if self._may_write and not stream.done:
                asyncio.get_running_loop().call_soon(self._pump)

    def _json(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)


async def serve(port: int) -> None:
    """Listens on a loopback port (0: one from the system), says which on stdout, and serves until cancelled."""
    loop = asyncio.get_running_loop()
    service = Service(loop)
    server = await loop.create_server(lambda: Connection(service), "127.0.0.1", port, backlog=4096)
    bound = server.sockets[0].getsockname()[1]
    sys.stdout.write(f"http://127.0.0.1:{bound}\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    gc.disable()  # a collection among thousands of streams would be lateness of the upstream's own
    try:
        uvloop.run(serve(arguments.port))
    except KeyboardInterrupt:
        os._exit(0)


if __name__ == "__main__":
    main()
