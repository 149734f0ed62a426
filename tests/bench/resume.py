"""The fourth part of the benchmark: answers that are read again, and what it costs to keep them.

One blocking client, because every request is timed alone. Readers that come back have lost their connection, so each
of their requests, and each plain one beside it, is timed from before it connects.
"""

import json
import os
import random
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

from measure import rss_kib
from processes import BenchError, Kind, http_json
from sections import Bench
from wire import LAST_CHUNK, Dechunker

_LIMIT_S = 30.0
_SIDE_BY_SIDE = 8  # answers at once while many are made; one waits for the upstream while another is worked on
NUMBER = 99_999  # of all streams here: nobody tells them apart
_WARM_UP = 200
_BEFORE_TOKENS = 2  # events that every answer begins with
_LEAVE_S = 300
_END_BYTES = 256  # what may follow the last frame: a line end, the last chunk, heartbeats

_TOKEN = re.compile(rb"~%05d\.(\d{8})\.\d{19}~" % NUMBER)
_LOCATION = re.compile(rb"\r\nContent-Location: /api/chat/([\w-]{22})\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Replay:
    """One answer, read again and again; times are medians in milliseconds, frames are the events of one reading."""

    events: int
    plain_ms: float
    beyond_plain_ms: float  # the first replayed byte, of a reader in the middle
    compact_ms: float
    compact_worst_ms: float
    compact_frames: int
    whole_ms: float
    whole_frames: int
    wrong: int  # tokens of all readings that were not the ones to come next


@dataclass(frozen=True)
class Kept:
    """Answers that have ended and can be read again. Both sizes are what was added since none was."""

    streams: int
    resident_kib: int
    logged_kib: float  # as the server counts it against replay_bytes
    look_up_ms: float  # beyond a plain request, on a connection that is open

    @property
    def ratio(self) -> float:
        return self.resident_kib / self.logged_kib


@dataclass(frozen=True)
class Resume:
    """`few` and `many` are all within the memory for replay; `full` is after many more than it holds."""

    finished: Replay
    running: Replay
    few: Kept
    many: Kept
    full: Kept


def resume(bench: Bench, kind: Kind) -> Resume:
    """Resume time and replay of one long answer, then thousands of short ones that are kept."""
    scale = bench.scale
    with _beside(bench.cpus.others):
        with bench.relay(kind) as (target, _):
            events = {"burst": scale.replay_events, "rate": 1000.0}
            finished = _replay(bench, target.port, "finished", events | {"events": scale.replay_events})
            running = _replay(bench, target.port, "running", events | {"think": True})
        with bench.relay(kind, replay_bytes=scale.replay_bytes, retention_s=3600) as (target, child):
            _answers(target.port, _WARM_UP, scale.kept_tokens)
            _look_ups(target.port, _answers(target.port, 1, 1), scale.look_ups)
            time.sleep(scale.settle / 5)
            before = rss_kib(child.pid), _logged_kib(target.port)

            def kept(streams: Sequence[str]) -> Kept:
                look_up_ms = _look_ups(target.port, streams, scale.look_ups)
                resident, logged = rss_kib(child.pid) - before[0], _logged_kib(target.port) - before[1]
                result = Kept(len(streams), resident, logged, look_up_ms)
                bench.say(
                    f"resume, {kind.name}: {result.streams:,} answers more, {logged / 1024:.1f} MiB logged, "
                    f"{resident / 1024:.1f} MiB resident, {look_up_ms:.2f} ms a look-up"
                )
                return result

            streams = _answers(target.port, scale.kept_few, scale.kept_tokens)
            few = kept(streams)
            streams += _answers(target.port, scale.kept - scale.kept_few, scale.kept_tokens)
            many = kept(streams)
            more = _answers(target.port, scale.overflow, scale.overflow_tokens)
            full = kept(more[-scale.kept_few :])
    return Resume(finished, running, few, many, full)


def _replay(bench: Bench, port: int, name: str, script: dict[str, Any]) -> Replay:
    scale = bench.scale
    stream = _begin(port, script)
    last = _logged(port, stream, scale.replay_events)
    plain: list[float] = []
    beyond: list[float] = []
    compact: list[float] = []
    whole: list[float] = []
    faults = 0
    middle = scale.replay_events // 2
    for _ in range(scale.resumes):
        health, *_ = _read(port, _get("/health/live"), b"\r\n\r\n", b"")
        first, _, body = _read(port, _get(f"/api/chat/{stream}", f"{stream}.{middle}"), b"\nevent: ", last)
        plain.append(health)
        beyond.append(first - health)
        faults += wrong(body, middle - _BEFORE_TOKENS, scale.replay_events)
    frames = {}
    for _ in range(scale.replays):
        for query, times in (("", whole), ("?compact=1", compact)):
            _, last_ms, body = _read(port, _get(f"/api/chat/{stream}{query}"), b"\nevent: ", last)
            times.append(last_ms)
            faults += wrong(body, 0, scale.replay_events)
            frames[query] = body.count(b"\nevent: ")
    http_json(port, "DELETE", f"/api/chat/{stream}")
    result = Replay(
        events=scale.replay_events,
        plain_ms=median(plain),
        beyond_plain_ms=median(beyond),
        compact_ms=median(compact),
        compact_worst_ms=max(compact),
        compact_frames=frames["?compact=1"],
        whole_ms=median(whole),
        whole_frames=frames[""],
        wrong=faults,
    )
    bench.say(
        f"resume, {name}: {result.beyond_plain_ms:+.2f} ms beyond {result.plain_ms:.2f}; {result.events:,} tokens in "
        f"{result.compact_frames} frames {result.compact_ms:.1f} ms, in {result.whole_frames:,} frames "
        f"{result.whole_ms:.1f} ms"
    )
    return result


def _begin(port: int, script: dict[str, Any]) -> str:
    """Starts an answer that nobody reads; its id."""
    with closing(_connect(port)) as sock:
        sock.sendall(_post(script, f"Prefer: respond-async\r\nAisse-On-Leave: {_LEAVE_S}\r\n"))
        head = b""
        while b"\r\n\r\n" not in head:
            head += _receive(sock)
    return _id_of(head)


def _logged(port: int, stream: str, tokens: int) -> bytes:
    """The last frame's id line, once all tokens and, where the answer ends, its end are in the log."""
    until = time.monotonic() + _LIMIT_S
    while time.monotonic() < until:
        state = _state(port, stream)
        if state["events"] == tokens + _BEFORE_TOKENS or state["status"] == "ended":
            return b"id: %b\n\n" % state["last_event_id"].encode()
        time.sleep(0.01)
    raise BenchError(f"of {tokens} tokens to be replayed, {state['events']} events were logged")


def _state(port: int, stream: str) -> dict[str, Any]:
    with closing(_connect(port)) as sock:
        return _ask_state(sock, stream)


def _ask_state(sock: socket.socket, stream: str) -> dict[str, Any]:
    sock.sendall(_get(f"/api/chat/{stream}", accept="application/json"))
    head, _, body = _answer(sock).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise BenchError(f"a look-up was answered {head[:40]!r}")
    state: dict[str, Any] = json.loads(body)
    return state


def _look_ups(port: int, streams: Sequence[str], count: int) -> float:
    """The median time of asking for the state of one of `streams`, beyond a plain request's."""
    beyond = []
    chosen = random.Random(count).choices(streams, k=count)
    with closing(_connect(port)) as sock:
        for stream in chosen:
            began = time.perf_counter_ns()
            sock.sendall(_get("/health/live"))
            _answer(sock)
            between = time.perf_counter_ns()
            _ask_state(sock, stream)
            beyond.append((time.perf_counter_ns() - between) - (between - began))
    return median(beyond) / 1e6


def _answers(port: int, count: int, tokens: int) -> list[str]:
    """Asks for answers and reads them to their ends; their ids."""
    streams: list[str] = []
    ask = _post({"burst": tokens, "events": tokens, "rate": 1000.0}, "")
    with ExitStack() as stack:
        socks = [stack.enter_context(closing(_connect(port))) for _ in range(min(count, _SIDE_BY_SIDE))]
        while len(streams) < count:
            asked = socks[: count - len(streams)]
            for sock in asked:
                sock.sendall(ask)
            for sock in asked:
                got = b""
                while not got.endswith(LAST_CHUNK):
                    got += _receive(sock)
                streams.append(_id_of(got))
    return streams


def _logged_kib(port: int) -> float:
    replay_bytes: int = http_json(port, "GET", "/health")["replayBytes"]
    return replay_bytes / 1024


# --- the wire -----------------------------------------------------------------------------------------------------


def _read(port: int, ask: bytes, first: bytes, last: bytes) -> tuple[float, float, bytes]:
    """Milliseconds until `first` and until `last` had come, and the body as far as it came then."""
    got = bytearray()
    began = time.perf_counter_ns()
    with closing(_connect(port)) as sock:
        sock.sendall(ask)
        while first not in got:
            got += _receive(sock)
        first_ns = time.perf_counter_ns() - began
        while last not in got[-_END_BYTES:]:
            got += _receive(sock)
        last_ns = time.perf_counter_ns() - began
    head, _, body = bytes(got).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise BenchError(f"a reader that came back was answered {head[:40]!r}")
    return first_ns / 1e6, last_ns / 1e6, Dechunker().feed(body) if last else body


def wrong(body: bytes, first: int, end: int) -> int:
    """How many tokens of `body` are not the one that has to come there, from number `first` up to `end`."""
    numbers = [int(number) for number in _TOKEN.findall(body)]
    return sum(got != due for got, due in zip_longest(numbers, range(first, end)))


def _connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=_LIMIT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _receive(sock: socket.socket) -> bytes:
    try:
        data = sock.recv(1 << 18)
    except TimeoutError:
        raise BenchError(f"a relay was silent for {_LIMIT_S:g} s") from None
    if not data:
        raise BenchError("a relay hung up in the middle of an answer")
    return data


def _answer(sock: socket.socket) -> bytes:
    """One whole response with a Content-Length."""
    got = _receive(sock)
    while b"\r\n\r\n" not in got:
        got += _receive(sock)
    length = re.search(rb"\r\nContent-Length: (\d+)\r\n", got, re.IGNORECASE)
    if length is None:
        raise BenchError(f"a look-up was answered {got[:40]!r}")
    while len(got) < got.index(b"\r\n\r\n") + 4 + int(length[1]):
        got += _receive(sock)
    return got


def _get(path: str, cursor: str = "", accept: str = "*/*") -> bytes:
    last = f"Last-Event-ID: {cursor}\r\n" if cursor else ""
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n{last}\r\n".encode()


def _post(script: dict[str, Any], fields: str) -> bytes:
    text = json.dumps(script | {"stream": NUMBER})
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    head = f"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{fields}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _id_of(answer: bytes) -> str:
    found = _LOCATION.search(answer)
    if found is None or not answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 202")):
        raise BenchError(f"a question was answered {answer[:200]!r}")
    return found[1].decode()


@contextmanager
def _beside(cpus: frozenset[int]) -> Iterator[None]:
    """Runs this process on the CPUs of upstream and load: none of its work is to be the relay's loss."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
