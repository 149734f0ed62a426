"""The sixth part of the benchmark: how long others wait while somebody sends the worst questions that we know of.

One reader after the other is asked for its liveness all the time; of each body that comes meanwhile the longest such
wait counts. Run as a script this is the upstream: it reads what it is sent without looking at it, and answers shortly.
"""

import asyncio
import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self

from processes import BenchError, Child, Kind, start_relay
from sections import Bench
from wire import LAST_CHUNK, chunk, closing, delta, opening

_PAUSE_S = 0.001  # between two probes
_AFTER_S = 0.03  # what an answer leaves to be done
_ANSWER_S = 60.0
_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


@dataclass(frozen=True)
class Hostile:
    """The longest wait of another request beside bodies of one size: the median of some tries of each body."""

    size: int
    tries: int
    waits_ms: dict[str, float]
    statuses: dict[str, int]
    quiet_ms: float
    """The same with no body at all."""

    @property
    def worst(self) -> str:
        return max(self.waits_ms, key=lambda name: self.waits_ms[name])


def hostile(bench: Bench, kind: Kind) -> list[Hostile]:
    """Bodies of each size, one after the other, at one relay. BenchError where it does not answer."""
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(
            Child("sink", [sys.executable, str(Path(__file__)), "sink"], bench.cpus.others, bench.folder)
        )
        relay = stack.enter_context(start_relay(kind, sink.port(), bench.cpus.relay, bench.folder))
        stack.enter_context(_placed(bench.cpus.others))
        probe = stack.enter_context(_Probe(relay.port()))
        return [_at_size(bench, kind, relay.port(), probe, size) for size in bench.scale.question_bytes]


def _at_size(bench: Bench, kind: Kind, port: int, probe: "_Probe", size: int) -> Hostile:
    tries = bench.scale.question_tries
    waits: dict[str, float] = {}
    statuses: dict[str, int] = {}
    quiet = median(probe.longest_ms(lambda: time.sleep(0.2)) for _ in range(tries))
    for name, body in bodies(size):

        def once(name: str = name, body: bytes = body) -> None:
            statuses[name] = ask(port, body)

        waits[name] = median(probe.longest_ms(once) for _ in range(tries))
        bench.say(f"question, {kind.name}, {size >> 10:,} KiB: {name}: {waits[name]:.1f} ms, {statuses[name]}")
    return Hostile(size, tries, waits, statuses, quiet)


def ask(port: int, body: bytes) -> int:
    """Posts `body`, reads the answer to its end, and returns its status."""
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), _ANSWER_S) as sock:
        with contextlib.suppress(ConnectionError):  # refused and closed before all was sent; the answer tells
            sock.sendall(head % len(body))
            sock.sendall(body)
        got = b""
        with contextlib.suppress(ConnectionError):
            while not _complete(got) and (part := sock.recv(1 << 16)):
                got += part
    if not got.startswith(b"HTTP/1.1 "):
        raise BenchError("a question was not answered")
    return int(got[9:12])


def _complete(got: bytes) -> bool:
    head, end, body = got.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return bool(end) and (len(body) >= int(length[1]) if length else body.endswith(LAST_CHUNK))


def bodies(size: int) -> Iterator[tuple[str, bytes]]:
    """Thirty bodies of about `size` bytes, each made when it is needed."""
    good = b'{"role":"user","content":"x"}'

    def fill(unit: bytes, room: int = 200) -> bytes:
        return unit * ((size - room) // len(unit))

    def with_messages(member: bytes) -> bytes:
        return b'{"messages":[' + good + b"]," + member + b"}"

    def numbered(form: str) -> bytes:
        parts, length, number = [], 0, 0
        while length < size - 200:
            parts.append((form % number).encode())
            length += len(parts[-1]) + 1
            number += 1
        return b",".join(parts)

    def content(value: bytes) -> bytes:
        return b'{"messages":[{"role":"user","content":' + value + b"}]}"

    yield "one long text", content(b'"' + fill(b"x") + b'"')
    yield "escapes in a text", content(b'"' + fill(b"\\n") + b'"')
    yield "unicode escapes in a text", content(b'"' + fill(b"\\u0041") + b'"')
    yield "surrogate pairs in a text", content(b'"' + fill(b"\\ud83d\\ude00") + b'"')
    yield "escaped quotes in a text", content(b'"' + fill(b'\\"') + b'"')
    yield "backslashes in a text", content(b'"' + fill(b"\\\\") + b'"')
    yield "text of three bytes a character", content(b'"' + fill("語".encode()) + b'"')
    yield "a photo in a block", content(b'[{"type":"image","source":{"data":"' + fill(b"QUJD") + b'"}}]')
    yield "escapes in a block", content(b'[{"text":"' + fill(b"\\u00e9") + b'"}]')
    yield "many messages", b'{"messages":[' + fill(good + b",") + good + b"]}"
    yield (
        "ten thousand messages",
        b'{"messages":['
        + b",".join([b'{"role":"user","content":"' + b"x" * max(1, size // 10_000 - 35) + b'"}'] * 10_000)
        + b"]}",
    )
    yield "many blocks", content(b"[" + fill(b"{},") + b"{}]")
    yield "blocks of one name each", content(b"[" + fill(b'{"a":1},') + b"{}]")
    yield "many names in a block", content(b'[{"type":"text",' + numbered('"k%d":0') + b"}]")
    yield "the same name over and over", content(b"[{" + fill(b'"a":0,') + b'"a":0}]')
    yield "empty arrays", with_messages(b'"metadata":{"a":[' + fill(b"[],") + b"[]]}")
    yield "empty arrays as the whole", b"[" + fill(b"[],") + b"[]]"
    yield "numbers", with_messages(b'"metadata":{"a":[' + fill(b"1,") + b"1]}")
    yield "one huge number", with_messages(b'"max_tokens":' + fill(b"9"))
    yield "deep nesting", with_messages(b'"metadata":{"a":' + fill(b"[") + b"}")
    yield "nesting, not so deep", with_messages(b'"metadata":{"a":[' + fill(b"[" * 900 + b"]" * 900 + b",") + b"1]}")
    yield "many fields that are unknown", b"{" + numbered('"k%d":0') + b"}"
    yield "an unknown field at the end", content(b'"' + fill(b"x") + b'"')[:-1] + b',"unknown":1}'
    yield "an unknown field with a huge name", b'{"' + fill(b"\\n") + b'":1}'
    yield "a huge name in a block", content(b'[{"' + fill(b"\\u0041") + b'":1}]')
    yield "a huge name of a model", with_messages(b'"model":"' + fill(b"\\n") + b'"')
    yield "a huge role", b'{"messages":[{"role":"' + fill(b"\\n") + b'","content":"x"}]}'
    yield "whitespace", fill(b" \n") + content(b'"x"')
    yield "whitespace between values", with_messages(b'"metadata":{"a":[' + fill(b"1" + b" " * 200 + b",") + b"1]}")
    yield (
        "a wrong type at the end",
        b'{"messages":['
        + b",".join([b'{"role":"user","content":"' + b"x" * max(1, size // 10_000 - 35) + b'"}'] * 9_999)
        + b",5]}",
    )
    yield "cut in a text", content(b'"' + fill(b"\\t"))[:-4]
    yield "invalid UTF-8 at the end", content(b'"' + fill("é".encode()) + b'\xff"')
    yield "NaN at the end", with_messages(b'"system":"' + fill(b"y") + b'","metadata":{"a":NaN}')
    yield "a lone surrogate at the end", content(b'"' + fill(b"\\u00e9") + b'\\ud800"')
    yield "quotes", fill(b'"')
    yield "random bytes", os.urandom(size)
    yield "stop sequences", with_messages(b'"stop_sequences":[' + fill(b'"",') + b'""]')
    yield (
        "tools, system and text at once",
        (
            b'{"messages":[{"role":"user","content":"%b"}],"system":"%b","tools":[{"a":"%b"}]}'
            % ((b"\\n" * (size // 6 - 50),) * 3)
        ),
    )


class _Probe:
    """A thread that asks whether the relay is alive, over and over, and notes how long each answer took."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = threading.Event()
        self._took: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def longest_ms(self, during: Callable[[], object]) -> float:
        """The longest wait of a request while something happens, in milliseconds."""
        begin = time.perf_counter()
        during()
        time.sleep(_AFTER_S)
        waits = [end - start for start, end in list(self._took) if end > begin]
        self._took.clear()
        if not waits:
            raise BenchError("nobody could ask while a question was read")
        return max(waits) * 1000

    def _run(self) -> None:
        request = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self._port), _ANSWER_S) as sock:
            while not self._over.is_set():
                start = time.perf_counter()
                sock.sendall(request)
                sock.recv(1 << 16)
                self._took.append((start, time.perf_counter()))
                time.sleep(_PAUSE_S)


@contextlib.contextmanager
def _placed(cpus: frozenset[int]) -> Iterator[None]:
    """Keeps this process off the relay's CPU as long as the block runs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Sink(asyncio.Protocol):
    _ANSWER = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"".join(map(chunk, (*opening(1), delta(1, 0, 0), *closing(1))))
        + LAST_CHUNK
    )

    def __init__(self) -> None:
        self._head = b""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._left:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            length = _LENGTH.search(head)
            assert length
            self._left, self._head = int(length[1]), b""
        self._left -= len(data)
        if not self._left:
            self._transport.write(self._ANSWER)


async def _sink() -> None:
    server = await asyncio.get_running_loop().create_server(_Sink, "127.0.0.1", 0)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_sink())
