"""The sixth part of the benchmark: what it does to answers that nobody reads the log."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from processes import Kind, http_json, start_relay
from sections import Bench, Target, finish, open_streams

# Small, as the pipe is, so that the log is in the way soon.
_BUFFER_BYTES = 32 << 10


@dataclass(frozen=True)
class Round:
    """Short answers at once, through one process."""

    p50_ms: float
    p99_ms: float
    cpu_us: float  # of the relay, an answer
    verdict: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """All rounds through one process, and the log lines that it dropped, as it counts them."""

    rounds: list[Round]
    dropped: int


@dataclass(frozen=True)
class Unread:
    """The same answers with a log that is read, and with one that is not."""

    read: Run
    unread: Run


def unread(bench: Bench, kind: Kind) -> Unread:
    """Both processes take turns, a round each: what else the machine does meets both. Their log is a pipe."""
    scale = bench.scale
    bench.say(f"log, {kind.name}: {scale.logged} answers whose log is read, and as many whose log is not")
    with _serving(bench, kind, read=True) as read, _serving(bench, kind, read=False) as nobody:
        targets = (read, nobody)
        for target in targets:
            _round(bench, target)
        rounds = [[_round(bench, target) for target in targets] for _ in range(scale.logged // scale.logged_at_once)]
        dropped = [http_json(target.port, "GET", "/health")["logLinesDropped"] for target in targets]
    return Unread(*(Run([each[at] for each in rounds], dropped[at]) for at in range(2)))


@contextlib.contextmanager
def _serving(bench: Bench, kind: Kind, *, read: bool) -> Iterator[Target]:
    with (
        _pipe(read=read) as writing,
        start_relay(
            kind, bench.upstream_port, bench.cpus.relay, bench.folder, stderr=writing, log_buffer_bytes=_BUFFER_BYTES
        ) as child,
    ):
        yield Target(kind.name, child.port(), child)


def _round(bench: Bench, target: Target) -> Round:
    assert target.relay is not None
    scale = bench.scale
    script = {"rate": scale.rate, "events": scale.logged_tokens}
    bench.load.do("start", pids={"relay": target.relay.pid})
    open_streams(bench, target, scale.logged_at_once, scale.logged_at_once * 3, script)
    verdict = finish(bench, whole=True)
    got = bench.load.do("stop")
    return Round(got["p50_ms"], got["p99_ms"], got["cpu_s"]["relay"] / scale.logged_at_once * 1e6, verdict)


@contextlib.contextmanager
def _pipe(*, read: bool) -> Iterator[int]:
    """Where to write to; somebody reads it, or nobody."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4 << 10)

    def drain() -> None:
        while os.read(reading, 1 << 16):
            pass

    reader = threading.Thread(target=drain) if read else None
    if reader is not None:
        reader.start()
    try:
        yield writing
    finally:
        os.close(writing)
        if reader is not None:
            reader.join()
        os.close(reading)
