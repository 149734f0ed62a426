"""The benchmark's load: opens streams, verifies every token, and measures, over raw uvloop protocols.

Obeys one JSON command a line on stdin, answers each with one JSON line on stdout, ends when stdin does. Commands are
the public methods of `Load`.
"""

import asyncio
import contextlib
import gc
import json
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import uvloop
from measure import cpu_ns, percentile_ms
from wire import Dechunker, Verifier

_LAG_STEP_S = 0.01


@dataclass
class Window:
    """What is measured between `start` and `stop`."""

    open: bool = False
    began_ns: int = 0
    cpu_at_start: dict[str, int] = field(default_factory=dict)
    lateness_ns: list[int] = field(default_factory=list)
    lag_ns: list[int] = field(default_factory=list)
    reads: int = 0


def request(port: int, path: str, script: dict[str, Any]) -> bytes:
    """A POST whose prompt is the upstream's script."""
    body = json.dumps({"messages": [{"role": "user", "content": json.dumps(script)}]}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Accept: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Reader(asyncio.Protocol):
    """One stream's client. `began` is set at its first event, `over` when its body or its connection ends."""

    def __init__(self, stream: int, ask: bytes, window: Window) -> None:
        self.check = Verifier(stream)
        self.began = asyncio.Event()
        self.over = asyncio.Event()
        self.failure = ""
        self.longest_silence_ns = 0
        self._ask = ask
        self._window = window
        self._head = b""
        self._body: Dechunker | None = None
        self._last_ns = 0
        self._transport: asyncio.Transport | None = None

    @property
    def complete(self) -> bool:
        """The upstream's last event came, a relay with ids said `end`, and the body ended cleanly."""
        check, body = self.check, self._body
        return check.stopped and (check.ended or not check.last_id) and body is not None and body.ended

    def silence_ns(self) -> int:
        """The longest time without a byte, from the response's head until now."""
        return max(self.longest_silence_ns, time.monotonic_ns() - self._last_ns)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._ask)

    def connection_lost(self, exc: Exception | None) -> None:
        self.failure = self.failure or f"connection lost: {exc}"
        self.over.set()
        self.began.set()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        body = self._body
        if body is None:
            body, data = self._headers(data)
            if body is None:
                return
            self._body, self._last_ns = body, now
        self.longest_silence_ns = max(self.longest_silence_ns, now - self._last_ns)
        self._last_ns = now
        stamps = self.check.feed(body.feed(data))
        if self._window.open and stamps:
            self._window.reads += 1
            for stamp in stamps:
                self._window.lateness_ns.append(now - stamp)
        if body.ended:
            self.over.set()
        if self.check.started:
            self.began.set()

    def _headers(self, data: bytes) -> tuple[Dechunker | None, bytes]:
        """The body's decoder and its first bytes, once the headers are whole and those of a stream."""
        self._head += data
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if not end:
            return None, b""
        if not head.startswith(b"HTTP/1.1 200") or b"transfer-encoding: chunked" not in head.lower():
            status = head.split(b"\r\n")[0].decode("latin-1")
            self.failure = f"answered {status}: {rest[:200]!r}"
            self.close()
            return None, b""
        return Dechunker(), rest


class Load:
    """The commands. Times are in seconds, `pace` is connections a second."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._window = Window()
        self._readers: dict[int, Reader] = {}
        self._stalled: list[socket.socket] = []
        self._numbers = 0
        self._lags = self._loop.create_task(self._watch_lag())

    async def open(
        self, *, port: int, path: str, count: int, pace: float, script: dict[str, Any], limit_s: float
    ) -> dict[str, Any]:
        """Opens streams, each on a phase of its own, and waits for the first event of each."""
        readers = [self._reader(port, path, script | {"phase": n / count}) for n in range(count)]
        began = self._loop.time()
        for n, reader in enumerate(readers):
            await asyncio.sleep(began + n / pace - self._loop.time())
            await self._loop.create_connection(partial(_same, reader), "127.0.0.1", port)
        await _all_of([reader.began for reader in readers], limit_s)
        failures = [reader.failure or "no event" for reader in readers if reader.failure or not reader.began.is_set()]
        return {"open": count - len(failures), "failures": failures[:3]}

    async def start(self, pids: dict[str, int]) -> dict[str, Any]:
        """Begins to measure: lateness and loop lag here, CPU time of these processes and of this one."""
        self._pids = pids | {"load": os.getpid()}
        self._window.lateness_ns.clear()
        self._window.lag_ns.clear()
        self._window.reads = 0
        self._window.cpu_at_start = {name: cpu_ns(pid) for name, pid in self._pids.items()}
        self._window.began_ns = time.monotonic_ns()
        self._window.open = True
        return {}

    async def stop(self) -> dict[str, Any]:
        """Ends the measurement: tokens, the reads they came in, lateness, loop lag, CPU seconds of each process."""
        window = self._window
        window.open = False
        wall = time.monotonic_ns() - window.began_ns
        cpu = {name: (cpu_ns(pid) - window.cpu_at_start[name]) / 1e9 for name, pid in self._pids.items()}
        late, lag = sorted(window.lateness_ns), sorted(window.lag_ns)
        return {
            "seconds": wall / 1e9,
            "tokens": len(late),
            "reads": window.reads,
            "cpu_s": cpu,
            "p50_ms": percentile_ms(late, 0.5),
            "p99_ms": percentile_ms(late, 0.99),
            "max_ms": percentile_ms(late, 1),
            "lag_p99_ms": percentile_ms(lag, 0.99),
        }

    async def wait(self, *, limit_s: float) -> dict[str, Any]:
        """Waits for the end of every stream."""
        await _all_of([reader.over for reader in self._readers.values()], limit_s)
        return {}

    async def verify(self, sent: dict[str, int]) -> dict[str, Any]:
        """Holds what came against what was sent, and forgets the streams."""
        for number, reader in self._readers.items():
            reader.check.settle(sent[str(number)])
        readers = list(self._readers.values())
        await self.close()
        names = ("lost", "doubled", "reordered", "malformed", "id_faults")
        counts = {name: sum(getattr(reader.check, name) for reader in readers) for name in names}
        incomplete = [reader.failure or "no end" for reader in readers if not reader.complete]
        return counts | {"incomplete": len(incomplete), "failures": incomplete[:3]}

    async def silence(self) -> dict[str, Any]:
        """How many streams are alive, how few heartbeats one had, and the longest silence on any."""
        readers = self._readers.values()
        return {
            "alive": sum(reader.check.started and not reader.over.is_set() for reader in readers),
            "fewest_heartbeats": min((reader.check.heartbeats for reader in readers), default=0),
            "longest_s": round(max((reader.silence_ns() for reader in readers), default=0) / 1e9, 3),
        }

    async def stall(self, port: int, path: str, count: int, pace: float, size: int) -> dict[str, Any]:
        """Opens streams of `size` bytes with ordinary sockets, reads their headers, and never reads again."""
        first = self._take(count)
        began = self._loop.time()
        heads = []
        for n in range(count):
            await asyncio.sleep(began + n / pace - self._loop.time())
            ask = request(port, path, {"stream": first + n, "bytes": size})
            heads.append(self._loop.create_task(self._stalled_reader(port, ask)))
        answers = await asyncio.gather(*heads)
        return {
            "streams": list(range(first, first + count)),
            "failures": [head for head in answers if not head.startswith("HTTP/1.1 200")][:3],
        }

    async def close(self) -> dict[str, Any]:
        """Drops every connection."""
        for reader in self._readers.values():
            reader.close()
        for stalled in self._stalled:
            stalled.close()
        self._readers.clear()
        self._stalled.clear()
        return {}

    def _take(self, count: int) -> int:
        first = self._numbers
        self._numbers += count
        return first

    def _reader(self, port: int, path: str, script: dict[str, Any]) -> Reader:
        number = self._take(1)
        reader = Reader(number, request(port, path, script | {"stream": number}), self._window)
        self._readers[number] = reader
        return reader

    async def _stalled_reader(self, port: int, ask: bytes) -> str:
        client = socket.socket()
        self._stalled.append(client)
        client.setblocking(False)
        await self._loop.sock_connect(client, ("127.0.0.1", port))
        await self._loop.sock_sendall(client, ask)
        head = b""
        while b"\r\n\r\n" not in head:
            data = await self._loop.sock_recv(client, 512)
            if not data:
                return "connection lost"
            head += data
        return head.decode("latin-1")

    async def _watch_lag(self) -> None:
        while True:
            before = time.monotonic_ns()
            await asyncio.sleep(_LAG_STEP_S)
            if self._window.open:
                self._window.lag_ns.append(time.monotonic_ns() - before - int(_LAG_STEP_S * 1e9))


def _same(reader: Reader) -> Reader:
    return reader


async def _all_of(events: list[asyncio.Event], limit_s: float) -> None:
    """Waits until all are set, or for `limit_s` seconds altogether."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            for event in events:
                await event.wait()


async def obey() -> None:
    """Runs commands until stdin ends; an exception is its command's answer."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    load = Load()
    while line := await lines.readline():
        command = json.loads(line)
        try:
            answer = await getattr(load, command.pop("do"))(**command)
        except Exception as error:  # whatever it is, the one who asked must hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    gc.disable()  # a collection among thousands of readers would be lateness of the load's own
    uvloop.run(obey())
