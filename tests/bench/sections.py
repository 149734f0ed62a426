"""The three parts of the benchmark: paced streams, idle streams, stalled readers. Each returns plain records."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import descriptors, rss_kib
from processes import BenchError, Child, Kind, LoadDriver, Placement, http_json, start_relay

DIRECT = "no relay"
_SAMPLE_S = 0.25
_STILL_S = 1.0  # for so long without a byte, the upstream is no longer read
_SPARE_SOCKETS = 2  # connections that come and go while a relay is asked for its health
_WARM_UP_STREAMS = 20
_END_S = 60.0  # for all streams to end once they are told to

# A run is marked when one of these says that it measured something else than the relay at this load.
_DELIVERED = 0.98  # of the tokens offered
_P99_MS = 250.0
_TOKENS_A_READ = 1.2  # a relay that lets tokens wait for each other needs less CPU for each
_BUSY = 0.9  # of the CPU that upstream and load share
_LATE_MS = 25.0  # upstream behind its schedule, or the load's loop late, at p99


@dataclass(frozen=True)
class Scale:
    """How much of everything; times in seconds, `pace` in connections a second, `rate` in tokens a second."""

    runs: int = 5
    followed: int = 2000
    elsewhere: int = 100
    crowd: int = 10_000
    crowd_connections: int = 2000
    seconds: float = 6.0
    skip: float = 1.0
    warm_up: float = 10.0
    streams: int = 200
    rate: float = 50.0
    idle: int = 4000
    idle_pace: float = 300.0
    settle: float = 5.0
    heartbeat: float = 15.0
    hold: float = 36.0
    stalled: int = 200
    stalled_bytes: int = 5_000_000
    healthy: int = 20
    healthy_rate: float = 20.0
    baseline: float = 5.0
    stall: float = 5.0
    leave: float = 10.0
    patience: float = 12.0  # for the evictions, from stall on
    after: float = 12.0  # how long to look on after the eviction
    replay_events: int = 5000
    replays: int = 25
    resumes: int = 100
    replay_bytes: int = 64 << 20
    kept: int = 10_000
    kept_few: int = 100
    kept_tokens: int = 12  # 3 KB
    look_ups: int = 500
    overflow: int = 8000
    overflow_tokens: int = 24  # 5 KB
    logged: int = 10_000
    logged_at_once: int = 100
    logged_tokens: int = 20
    question_bytes: tuple[int, ...] = (8 << 20, 32 << 20)
    question_tries: int = 5


QUICK = Scale(
    followed=40,
    elsewhere=10,
    crowd=400,
    crowd_connections=100,
    runs=1,
    seconds=0.8,
    skip=0.2,
    warm_up=0.3,
    streams=20,
    rate=20.0,
    idle=50,
    idle_pace=200.0,
    settle=0.4,
    heartbeat=1.0,
    hold=4.0,
    stalled=10,
    healthy=4,
    baseline=0.5,
    stall=1.5,
    leave=0.5,
    patience=3.0,
    after=1.0,
    replay_events=300,
    replays=2,
    resumes=5,
    replay_bytes=2 << 20,
    kept=60,
    kept_few=10,
    look_ups=10,
    overflow=250,
    logged=120,
    logged_at_once=20,
    logged_tokens=5,
    question_bytes=(128 << 10,),
    question_tries=1,
)


@dataclass(frozen=True)
class Paced:
    """One window of paced streams through one relay, and the verdict on every one of their tokens."""

    offered_s: float
    tokens_s: float
    cpu_us: float  # user and system time of the relay, a token
    p50_ms: float
    p99_ms: float
    tokens_a_read: float  # 1: each token arrived alone; a relay that lags gets cheaper by merging them
    busy: dict[str, float]  # share of one CPU: relay, upstream, load
    verdict: dict[str, Any]
    marks: list[str]


@dataclass(frozen=True)
class Idle:
    """Streams whose model thinks. The second part is known only of a relay with heartbeats."""

    streams: int
    before_kib: int
    after_kib: int
    upstream_open: int
    alive: int
    fewest_heartbeats: int
    longest_silence_s: float

    @property
    def kib_a_stream(self) -> float:
        return (self.after_kib - self.before_kib) / self.streams


@dataclass(frozen=True)
class Sample:
    """One look at a relay with stalled readers. `stalled` is its own count, None where it has none."""

    at_s: float
    rss_kib: int
    sockets: int  # more than before
    upstream_bytes: int  # of all bulk answers
    stalled: int | None


@dataclass(frozen=True)
class Stalled:
    """Readers that stopped reading, beside healthy ones."""

    readers: int
    before_kib: int
    samples: list[Sample]
    stood_still: bool  # the upstream's count, for a second, before anybody was evicted
    evicting_at_s: float | None  # when the first was evicted; None: nobody ever was
    evicted: bool  # all of them, in the end
    p99_ms: dict[str, float]  # of the healthy: without, while the stalled ones fill, while they are stalled
    verdict: dict[str, Any]

    def kib_a_reader(self, *, after_eviction: bool) -> float | None:
        """The most that was resident, before or after the eviction; None after one that never came."""
        evicting = self.evicting_at_s
        if after_eviction and not self.evicted:
            return None
        part = [s.rss_kib for s in self.samples if (evicting is not None and s.at_s >= evicting) == after_eviction]
        return (max(part) - self.before_kib) / self.readers

    def upstream_kib(self, *, after_eviction: bool) -> float:
        """What the upstream had written for each, at the most, before or after the eviction."""
        evicting = self.evicting_at_s
        part = [s.upstream_bytes for s in self.samples if after_eviction or evicting is None or s.at_s < evicting]
        return max(part) / self.readers / 1024


@dataclass(frozen=True)
class Target:
    """Where readers connect: a relay's process, or the upstream itself."""

    name: str
    port: int
    relay: Child | None = None

    @property
    def path(self) -> str:
        return "/api/chat" if self.relay else "/v1/messages"


@dataclass
class Bench:
    """What every part needs."""

    scale: Scale
    cpus: Placement
    folder: Path
    upstream: Child
    upstream_port: int
    load: LoadDriver
    say: Callable[[str], None]

    @contextlib.contextmanager
    def relay(self, kind: Kind, **settings: float | str) -> Iterator[tuple[Target, Child]]:
        """A fresh relay process, and it as a target."""
        with start_relay(kind, self.upstream_port, self.cpus.relay, self.folder, stderr=None, **settings) as child:
            yield Target(kind.name, child.port(), child), child


def throughput(bench: Bench, kinds: Sequence[Kind]) -> dict[str, list[Paced]]:
    """Warmed relays, runs interleaved, beside runs with no relay at all."""
    scale = bench.scale
    with contextlib.ExitStack() as stack:
        targets = [Target(DIRECT, bench.upstream_port)]
        for kind in kinds:
            target, _ = stack.enter_context(bench.relay(kind, heartbeat_s=scale.heartbeat))
            targets.append(target)
            bench.say(f"throughput: warming up {kind.name}")
            warm = paced(bench, target, scale.streams, scale.warm_up)
            bench.say(f"throughput: {kind.name} while cold: {words(warm)}")
        results: dict[str, list[Paced]] = {target.name: [] for target in targets}
        for run in range(scale.runs):
            for target in targets:
                one = paced(bench, target, scale.streams, scale.seconds)
                results[target.name].append(one)
                bench.say(f"throughput {run + 1}/{scale.runs}, {target.name}: {words(one)}")
    return results


def idle(bench: Bench, kind: Kind) -> Idle:
    """One fresh process with thousands of streams on which nothing happens."""
    scale = bench.scale
    with bench.relay(kind, heartbeat_s=scale.heartbeat) as (target, child):
        paced(bench, target, _WARM_UP_STREAMS, scale.warm_up / 5)
        time.sleep(scale.settle / 5)
        before = rss_kib(child.pid)
        bench.say(f"idle, {kind.name}: opening {scale.idle} streams at {scale.idle_pace:g} a second")
        open_streams(bench, target, scale.idle, scale.idle_pace, {"think": True})
        time.sleep(scale.settle)
        after = rss_kib(child.pid)
        if kind.settings:
            bench.say(f"idle, {kind.name}: holding them for {scale.hold:g} s of heartbeats")
            time.sleep(scale.hold - scale.settle)
            after = max(after, rss_kib(child.pid))
        quiet = bench.load.do("silence")
        upstream_open = http_json(bench.upstream_port, "GET", "/stats")["active"]
        bench.load.do("close")
    result = Idle(
        scale.idle, before, after, upstream_open, quiet["alive"], quiet["fewest_heartbeats"], quiet["longest_s"]
    )
    bench.say(f"idle, {kind.name}: {result.kib_a_stream:.1f} KiB a stream, {result.alive} alive")
    return result


def stalled(bench: Bench, kind: Kind) -> Stalled:
    """Healthy readers alone, then beside readers that stop reading, until those are evicted and beyond."""
    scale = bench.scale
    with bench.relay(kind, stall_s=scale.stall, leave_s=scale.leave, heartbeat_s=scale.heartbeat) as (target, child):
        open_streams(bench, target, scale.healthy, scale.healthy * 4, {"rate": scale.healthy_rate})
        time.sleep(scale.baseline / 2)
        p99 = {"without": _window(bench, lambda: time.sleep(scale.baseline))}
        watch = _Watch(child, target.port, bench.upstream_port, has_health=kind.settings)
        bench.say(f"stalled, {kind.name}: {scale.stalled} readers stop reading")
        p99["filling"] = _window(bench, lambda: _fill(bench, watch))
        p99["stalled"] = _window(bench, lambda: _until_evicted(bench, watch, evicts=kind.settings))
        if watch.evicted():
            watch.look(lambda: False, scale.after)
        verdict = finish(bench)
    result = Stalled(
        readers=scale.stalled,
        before_kib=watch.before_kib,
        samples=watch.samples,
        stood_still=watch.stood_still,
        evicting_at_s=watch.evicting_at_s,
        evicted=watch.evicted(),
        p99_ms=p99,
        verdict=verdict,
    )
    bench.say(f"stalled, {kind.name}: {result.kib_a_reader(after_eviction=False):.0f} KiB a reader before eviction")
    return result


def paced(
    bench: Bench,
    target: Target,
    streams: int,
    seconds: float,
    *,
    elsewhere: int | None = None,
    engine: int | None = None,
) -> Paced:
    """One window of paced streams; read from an instance on the port `elsewhere`, with the CPU time of an engine."""
    scale = bench.scale
    open_streams(bench, target, streams, 200, {"rate": scale.rate}, elsewhere=elsewhere)
    time.sleep(scale.skip)
    http_json(bench.upstream_port, "GET", "/stats?reset=1")
    pids = {"upstream": bench.upstream.pid} | ({"relay": target.relay.pid} if target.relay else {})
    pids |= {"engine": engine} if engine is not None else {}
    bench.load.do("start", pids=pids)
    time.sleep(seconds)
    got = bench.load.do("stop")
    late_ms = http_json(bench.upstream_port, "GET", "/stats")["late_ms"]["p99"]
    verdict = finish(bench)
    busy = {name: cpu / got["seconds"] for name, cpu in got["cpu_s"].items()}
    offered, tokens = streams * scale.rate, got["tokens"] / got["seconds"]
    merged = got["tokens"] / max(got["reads"], 1)
    shared = busy["upstream"] + busy["load"] + busy.get("engine", 0.0)
    marks = {
        f"delivered {tokens / offered:.1%} of the tokens": tokens < _DELIVERED * offered,
        f"p99 lateness {got['p99_ms']:.0f} ms": got["p99_ms"] > _P99_MS,
        f"tokens waited for each other, {merged:.2f} a read": merged > _TOKENS_A_READ,
        f"upstream and load used {shared:.0%} of {len(bench.cpus.others)} CPU": shared > _BUSY * len(bench.cpus.others),
        f"the upstream was {late_ms:.0f} ms behind its schedule at p99": late_ms > _LATE_MS,
        f"the load's loop was {got['lag_p99_ms']:.0f} ms late at p99": got["lag_p99_ms"] > _LATE_MS,
        f"{verdict['incomplete']} streams did not end whole ({verdict['failures']})": verdict["incomplete"] > 0,
    }
    cpu_us = got["cpu_s"].get("relay", 0) * 1e6 / max(got["tokens"], 1)
    happened = [mark for mark, is_so in marks.items() if is_so]
    return Paced(
        offered_s=offered,
        tokens_s=tokens,
        cpu_us=cpu_us,
        p50_ms=got["p50_ms"],
        p99_ms=got["p99_ms"],
        tokens_a_read=merged,
        busy=busy,
        verdict=verdict,
        marks=happened,
    )


def open_streams(
    bench: Bench, target: Target, count: int, pace: float, script: dict[str, Any], *, elsewhere: int | None = None
) -> None:
    """Has the load open streams. BenchError where not all open."""
    where = {"port": target.port, "path": target.path, "elsewhere": elsewhere}
    limit_s = count / pace + 30
    got = bench.load.do("open", **where, count=count, pace=pace, script=script, limit_s=limit_s, within=2 * limit_s)
    if got["open"] < count:
        why = f"; it says: {target.relay.complaint()}" if target.relay else ""
        raise BenchError(f"only {got['open']} of {count} streams opened: {got['failures']}{why}")


def finish(bench: Bench, *, whole: bool = False) -> dict[str, Any]:
    """Has the paced streams end, or waits for their `whole`; holds what came against what the upstream sent."""
    if not whole:
        http_json(bench.upstream_port, "POST", "/finish")
    bench.load.do("wait", limit_s=_END_S)
    return bench.load.do("verify", sent=http_json(bench.upstream_port, "GET", "/stats")["tokens"])


def _window(bench: Bench, during: Callable[[], None]) -> float:
    """The healthy readers' p99 lateness, in milliseconds, while something happens."""
    bench.load.do("start", pids={})
    during()
    p99: float = bench.load.do("stop")["p99_ms"]
    return p99


@dataclass
class _Watch:
    """Looks at a relay every quarter of a second."""

    relay: Child
    port: int
    upstream_port: int
    has_health: bool
    samples: list[Sample] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)
    stood_still: bool = False
    evicting_at_s: float | None = None

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._sockets = descriptors(self.relay.pid)
        self.before_kib = rss_kib(self.relay.pid)

    def look(self, enough: Callable[[], bool], limit_s: float) -> None:
        """Samples until there is enough, or for `limit_s` seconds."""
        until = time.monotonic() + limit_s
        while True:
            self.samples.append(self._sample())
            self._note()
            if enough() or time.monotonic() > until:
                return
            time.sleep(_SAMPLE_S)

    def settled(self) -> bool:
        """Whether the upstream stood still, or it is too late to see it."""
        return self.stood_still or self.evicting_at_s is not None

    def evicted(self) -> bool:
        """Whether the readers' sockets are gone: at most those to the upstream are left."""
        return self.evicting_at_s is not None and self.samples[-1].sockets <= len(self.streams) + _SPARE_SOCKETS

    def _note(self) -> None:
        last, most = self.samples[-1], max(s.sockets for s in self.samples)
        if self.evicting_at_s is not None:
            return
        if most >= 2 * len(self.streams) and last.sockets < most - _SPARE_SOCKETS:
            self.evicting_at_s = last.at_s
            return
        since = min(s.at_s for s in self.samples if s.upstream_bytes == last.upstream_bytes)
        self.stood_still |= last.upstream_bytes > 0 and last.at_s - since >= _STILL_S

    def _sample(self) -> Sample:
        written = http_json(self.upstream_port, "GET", "/stats")["bytes"]
        health = http_json(self.port, "GET", "/health") if self.has_health else {}
        return Sample(
            time.monotonic() - self._began,
            rss_kib(self.relay.pid),
            descriptors(self.relay.pid) - self._sockets,
            sum(written.get(number, 0) for number in self.streams),
            health.get("stalledReaders"),
        )


def _fill(bench: Bench, watch: _Watch) -> None:
    """Opens the readers that stall, and waits until the upstream is no longer read."""
    scale = bench.scale
    got = bench.load.do(
        "stall", port=watch.port, path="/api/chat", count=scale.stalled, pace=scale.stalled, size=scale.stalled_bytes
    )
    if got["failures"]:
        raise BenchError(f"readers that were to stall were answered {got['failures']}")
    watch.streams = [str(number) for number in got["streams"]]
    watch.look(watch.settled, 2 * scale.stall)


def _until_evicted(bench: Bench, watch: _Watch, *, evicts: bool) -> None:
    scale = bench.scale
    watch.look(lambda: False, scale.baseline)
    if evicts:
        watch.look(watch.evicted, scale.stall + scale.patience)


def words(paced: Paced) -> str:
    """For the progress."""
    cpu = f", {paced.cpu_us:.1f} us of CPU a token" if paced.cpu_us else ""
    marks = f" MARKED: {'; '.join(paced.marks)}" if paced.marks else ""
    return f"{paced.tokens_s:,.0f} tokens/s{cpu}, p50 {paced.p50_ms:.2f} ms, p99 {paced.p99_ms:.2f} ms{marks}"
