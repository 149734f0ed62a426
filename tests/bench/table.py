"""The benchmark's one table: what was measured, its bounds, and whether they were reached."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from hostile import Hostile
from resume import Kept, Replay, Resume
from sections import DIRECT, Idle, Paced, Scale, Stalled
from shared import Shared
from unread import Round, Unread

US = "aisse"
NAIVE, NODE = "naive", "node"

CPU_OF_NODE = 0.80
P50_OVER_NAIVE_MS = 1.0
IDLE_OVER_NAIVE_KIB = 10.0
STALLED_KIB = 320.0
# The sweep that sends heartbeats looks once a second; the rest is for the machine.
SILENCE_OVER_HEARTBEAT_S = 1.5
# "Unharmed": what a p99 moves from one quiet run to the next.
HEALTHY_P99_OVER_MS = 5.0
RESUME_BEYOND_PLAIN_MS = 5.0
COMPACT_MS = 50.0
# "A few": all that is no delta, and one of each 64 KiB of text.
COMPACT_FRAMES = 20
KEPT_RATIO = 1.5
SHARED_CPU = 1.5
ELSEWHERE_MS = 60.0
FOLLOWED_RATIO = 1.3
CONNECTIONS = 10
# "As in a run whose log is read": what a p99 of short answers moves from one run to the next.
UNREAD_P99_OVER_MS = 5.0
CROWD_RATIO = 2.0
# "Not slower": what a median moves from one quiet run to the next.
LOOK_UP_OVER_MS = 0.1
# How long others may wait, by the size of a question up to which that holds.
QUESTION_MS = {8 << 20: 20.0, 32 << 20: 60.0}


@dataclass(frozen=True)
class Row:
    """One line. `reached` is None where there is no bound or nothing to hold against it."""

    label: str
    cells: Mapping[str, str] = field(default_factory=dict)
    bound: str = ""
    reached: bool | None = None


@dataclass
class Report:
    """Everything that was measured, by relay."""

    scale: Scale
    paced: dict[str, list[Paced]] = field(default_factory=dict)
    idle: dict[str, Idle] = field(default_factory=dict)
    stalled: dict[str, Stalled] = field(default_factory=dict)
    resume: dict[str, Resume] = field(default_factory=dict)
    shared: dict[str, Shared] = field(default_factory=dict)
    unread: dict[str, Unread] = field(default_factory=dict)
    question: dict[str, list[Hostile]] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        return [
            *(_paced_rows(self.paced, self.scale) if self.paced else []),
            *(_idle_rows(self.idle, self.scale) if self.idle else []),
            *(_stalled_rows(self.stalled, self.scale) if self.stalled else []),
            *(_resume_rows(self.resume[US], self.scale) if US in self.resume else []),
            *(_shared_rows(self.shared[US], self.scale) if US in self.shared else []),
            *(_unread_rows(self.unread[US], self.scale) if US in self.unread else []),
            *(row for size in self.question.get(US, []) for row in _question_rows(size)),
        ]

    def marks(self) -> list[str]:
        """One line for each run that measured something else than it should."""
        return [
            f"marked: {name}, run {number} of {len(runs)}: {mark}"
            for name, runs in self.paced.items()
            for number, paced in enumerate(runs, 1)
            for mark in paced.marks
        ]


def text(rows: Sequence[Row], relays: Sequence[str]) -> str:
    """The rows in aligned columns: one for each relay that a row speaks of, the bound, the verdict."""
    columns = [name for name in (DIRECT, *relays) if any(name in row.cells for row in rows)]
    table = [["", *columns, "bound", "reached"]]
    for row in rows:
        verdict = {None: "", True: "yes", False: "NO"}[row.reached]
        if row.bound and row.reached is None:
            verdict = "not measured"
        table.append([row.label, *(row.cells.get(name, "") for name in columns), row.bound, verdict])
    widths = [max(len(line[at]) for line in table) for at in range(len(columns) + 3)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def _paced_rows(paced: dict[str, list[Paced]], scale: Scale) -> list[Row]:
    ours = paced.get(US)
    cpu = {name: runs for name, runs in paced.items() if name != DIRECT}
    to_node = _ratios(cpu, NODE)
    to_naive = _ratios(cpu, NAIVE)
    p50 = _differences(paced, NAIVE, lambda run: run.p50_ms)
    return [
        Row(f"{scale.streams} streams x {scale.rate:g} tokens/s, medians of {scale.runs}"),
        Row("  tokens/s", {name: f"{_median(runs, lambda run: run.tokens_s):,.0f}" for name, runs in paced.items()}),
        Row("  CPU us a token (min-max)", {name: _spread(runs) for name, runs in cpu.items()}),
        Row(
            "  CPU a token / node's",
            _two_places(to_node),
            f"<= {CPU_OF_NODE:.2f}",
            to_node[US] <= CPU_OF_NODE if US in to_node else None,
        ),
        Row("  CPU a token / naive's", _two_places(to_naive)),
        Row(
            "  lateness p50, ms", {name: f"{_median(runs, lambda run: run.p50_ms):.2f}" for name, runs in paced.items()}
        ),
        Row(
            "  lateness p99, ms", {name: f"{_median(runs, lambda run: run.p99_ms):.2f}" for name, runs in paced.items()}
        ),
        Row(
            "  p50 over no relay's, ms",
            _two_places(_differences(cpu | _only(paced, DIRECT), DIRECT, lambda run: run.p50_ms)),
        ),
        Row(
            "  p99 over no relay's, ms",
            _two_places(_differences(cpu | _only(paced, DIRECT), DIRECT, lambda run: run.p99_ms)),
        ),
        Row(
            "  p50 over naive's, ms",
            {US: f"{p50[US]:+.2f}"} if US in p50 else {},
            f"<= {P50_OVER_NAIVE_MS:+.2f}",
            p50[US] <= P50_OVER_NAIVE_MS if US in p50 else None,
        ),
        Row(
            "  tokens a read",
            _two_places({name: _median(runs, lambda run: run.tokens_a_read) for name, runs in paced.items()}),
        ),
        _verdicts({name: [run.verdict for run in runs] for name, runs in paced.items()}),
        _ids([run.verdict for run in ours] if ours else []),
        Row(
            "  CPU of upstream and load",
            {
                name: f"{_median(runs, lambda run: run.busy['upstream'] + run.busy['load']):.0%}"
                for name, runs in paced.items()
            },
        ),
        Row(
            "  runs marked",
            {name: f"{sum(bool(run.marks) for run in runs)} of {len(runs)}" for name, runs in paced.items()},
            "0",
            not any(run.marks for run in ours) if ours else None,
        ),
    ]


def _idle_rows(idle: dict[str, Idle], scale: Scale) -> list[Row]:
    ours, naive = idle.get(US), idle.get(NAIVE)
    limit = naive.kib_a_stream + IDLE_OVER_NAIVE_KIB if naive else None
    silence = scale.heartbeat + SILENCE_OVER_HEARTBEAT_S
    rows = [
        Row(f"{scale.idle:,} idle streams"),
        Row(
            "  resident KiB a stream",
            {name: f"{one.kib_a_stream:.1f}" for name, one in idle.items()},
            f"<= {limit:.1f}" if limit else f"<= naive + {IDLE_OVER_NAIVE_KIB:g}",
            ours.kib_a_stream <= limit if ours and limit else None,
        ),
        Row(
            "  streams alive",
            {name: f"{min(one.alive, one.upstream_open):,}" for name, one in idle.items()},
            f"{scale.idle:,}",
            min(ours.alive, ours.upstream_open) == scale.idle if ours else None,
        ),
    ]
    if ours:
        fewest = int(scale.hold // silence)
        rows += [
            Row(
                "  longest silence of any, s",
                {US: f"{ours.longest_silence_s:.2f}"},
                f"<= {silence:g}",
                ours.longest_silence_s <= silence,
            ),
            Row(
                f"  fewest heartbeats in {scale.hold:g} s",
                {US: f"{ours.fewest_heartbeats}"},
                f">= {fewest}",
                ours.fewest_heartbeats >= fewest,
            ),
        ]
    return rows


def _stalled_rows(stalled: dict[str, Stalled], scale: Scale) -> list[Row]:
    ours = stalled.get(US)
    answer_kib = scale.stalled_bytes / 1024
    still = ours is not None and ours.stood_still and ours.upstream_kib(after_eviction=False) < answer_kib
    rows = [Row(f"{scale.stalled} readers that stop reading, {scale.stalled_bytes / 1e6:g} MB answers")]
    for when, after in (("before eviction", False), ("after eviction", True)):
        kib = {name: one.kib_a_reader(after_eviction=after) for name, one in stalled.items()}
        mine = kib.get(US)
        reached = None if ours is None else mine is not None and mine <= STALLED_KIB
        cells = {name: _kib(stalled[name], value) for name, value in kib.items()}
        rows.append(Row(f"  resident KiB each, {when}", cells, f"<= {STALLED_KIB:g}", reached))
    return [
        *rows,
        Row(
            "  upstream wrote KiB each, before",
            {name: _written(one, after_eviction=False) for name, one in stalled.items()},
            "stands still",
            still if ours else None,
        ),
        Row(
            "  upstream wrote KiB each, in all",
            {name: _written(one, after_eviction=True) for name, one in stalled.items()},
            f"< {answer_kib:.0f}",
            ours.upstream_kib(after_eviction=True) < answer_kib if ours else None,
        ),
        Row("  stalled readers by /health, most / last", {US: _own_count(ours)} if ours else {}),
        Row("  healthy p99 without them, ms", _healthy(stalled, "without")),
        Row("  healthy p99 while they fill, ms", _healthy(stalled, "filling")),
        Row(
            "  healthy p99 while stalled, ms",
            _healthy(stalled, "stalled"),
            f"<= without + {HEALTHY_P99_OVER_MS:g}",
            ours.p99_ms["stalled"] <= ours.p99_ms["without"] + HEALTHY_P99_OVER_MS if ours else None,
        ),
        _verdicts({name: [one.verdict] for name, one in stalled.items()}),
    ]


def _resume_rows(ours: Resume, scale: Scale) -> list[Row]:
    few, many, full = ours.few, ours.many, ours.full
    limit_kib = KEPT_RATIO * scale.replay_bytes / 1024
    slower = many.look_up_ms - few.look_up_ms
    return [
        *_replay_rows(ours.finished, "finished"),
        *_replay_rows(ours.running, "running"),
        Row(f"answers kept, replay_bytes {scale.replay_bytes >> 20} MiB"),
        _memory(many, f"{many.streams:,} answers", limit_kib),
        _memory(full, f"{scale.overflow:,} more, limit reached", limit_kib),
        Row(f"  look-up beyond plain, ms, {few.streams:,} kept", {US: f"{few.look_up_ms:.3f}"}),
        Row(
            f"  look-up beyond plain, ms, {many.streams:,} kept",
            {US: f"{many.look_up_ms:.3f}"},
            f"<= {few.look_up_ms + LOOK_UP_OVER_MS:.3f}",
            slower <= LOOK_UP_OVER_MS,
        ),
    ]


def _replay_rows(replay: Replay, name: str) -> list[Row]:
    return [
        Row(f"reading a {name} answer of {replay.events:,} tokens again, fresh connections"),
        Row("  plain request, ms", {US: f"{replay.plain_ms:.2f}"}),
        Row(
            "  first replayed byte beyond it, ms",
            {US: f"{replay.beyond_plain_ms:+.2f}"},
            f"<= {RESUME_BEYOND_PLAIN_MS:+g}",
            replay.beyond_plain_ms <= RESUME_BEYOND_PLAIN_MS,
        ),
        Row(
            "  all of it, compact, ms (worst)",
            {US: f"{replay.compact_ms:.1f} ({replay.compact_worst_ms:.1f})"},
            f"<= {COMPACT_MS:g}",
            replay.compact_ms <= COMPACT_MS,
        ),
        Row(
            "  its frames",
            {US: f"{replay.compact_frames}"},
            f"<= {COMPACT_FRAMES}",
            replay.compact_frames <= COMPACT_FRAMES,
        ),
        Row(f"  all of it, {replay.whole_frames:,} frames, ms", {US: f"{replay.whole_ms:.1f}"}),
        Row("  tokens out of place", {US: f"{replay.wrong}"}, "0", not replay.wrong),
    ]


def _shared_rows(ours: Shared, scale: Scale) -> list[Row]:
    verdicts = [run.verdict for run in (*ours.memory, *ours.shared, ours.elsewhere)]
    ratio = ours.followed_kib / ours.local_kib
    marked = sum(bool(run.marks) for run in (*ours.memory, *ours.shared))
    return [
        Row(f"shared log in {ours.engine}, {scale.streams} streams x {scale.rate:g} tokens/s"),
        Row("  CPU us a token, in memory (min-max)", {US: _spread(ours.memory)}),
        Row("  CPU us a token, shared (min-max)", {US: _spread(ours.shared)}),
        Row("  CPU a token, shared / in memory", {US: f"{ours.cost:.2f}"}, f"<= {SHARED_CPU}", ours.cost <= SHARED_CPU),
        Row("  CPU of the engine / of aisse", {US: f"{ours.engine_share:.2f}"}, "< 1", ours.engine_share < 1),
        Row("  tokens/s that one CPU of the engine carries", {US: f"{ours.carried:,.0f}"}),
        Row("  idle streams that it carries, each followed", {US: f"{ours.idle_carried:,.0f}"}),
        Row("  memory of the engine / bytes logged", {US: f"{ours.stored_ratio:.2f}"}),
        Row("  lateness elsewhere p50, ms", {US: f"{ours.elsewhere.p50_ms:.1f}"}),
        Row(
            "  lateness elsewhere p99, ms",
            {US: f"{ours.elsewhere.p99_ms:.1f}"},
            f"<= {ELSEWHERE_MS:g}",
            ours.elsewhere.p99_ms <= ELSEWHERE_MS,
        ),
        Row(
            f"  KiB followed / local, {ours.streams:,} idle",
            {US: f"{ours.followed_kib:.1f} / {ours.local_kib:.1f} ({ratio:.2f})"},
            f"<= {FOLLOWED_RATIO}",
            ratio <= FOLLOWED_RATIO,
        ),
        Row(
            "  connections to the engine, of two instances",
            {US: f"{ours.connections}"},
            f"<= {CONNECTIONS}",
            ours.connections <= CONNECTIONS,
        ),
        _crowds(ours, scale),
        _verdicts({US: verdicts}),
        _ids(verdicts),
        Row("  runs marked", {US: f"{marked} of {2 * len(ours.memory)}"}, "0", not marked),
    ]


def _question_rows(ours: Hostile) -> list[Row]:
    bound = next(bound for size, bound in QUESTION_MS.items() if ours.size <= size)
    worst_ms = ours.waits_ms[ours.worst]
    return [
        Row(f"{len(ours.waits_ms)} hostile questions of {ours.size / (1 << 20):g} MiB, medians of {ours.tries}"),
        Row("  longest wait of others without them, ms", {US: f"{ours.quiet_ms:.1f}"}),
        Row("  longest wait of others, the median, ms", {US: f"{median(ours.waits_ms.values()):.1f}"}),
        Row("  longest wait of others, the worst, ms", {US: f"{worst_ms:.1f}"}, f"<= {bound:g}", worst_ms <= bound),
        Row(f"    {ours.worst}"),
    ]


def _crowds(ours: Shared, scale: Scale) -> Row:
    """Nobody is to be hurt by who asks for what there is not."""
    cpu = ours.unknown.cpu_us / ours.known.cpu_us
    commands = ours.unknown.commands / ours.known.commands
    right = ours.known.right == ours.unknown.right == scale.crowd
    return Row(
        f"  CPU and commands, {scale.crowd:,} unknown / known",
        {US: f"{cpu:.2f}, {commands:.2f}" if right else "wrong answers"},
        f"<= {CROWD_RATIO:g}",
        right and max(cpu, commands) <= CROWD_RATIO,
    )


def _memory(kept: Kept, what: str, limit_kib: float) -> Row:
    cell = f"{kept.resident_kib / 1024:.1f} of {kept.logged_kib / 1024:.1f} ({kept.ratio:.2f})"
    return Row(
        f"  resident / counted MiB, {what}",
        {US: cell},
        f"<= {limit_kib / 1024:g}",
        kept.resident_kib <= limit_kib,
    )


def _unread_rows(ours: Unread, scale: Scale) -> list[Row]:
    both = (ours.read, ours.unread)
    over = median(
        nobody.p99_ms - read.p99_ms for read, nobody in zip(ours.read.rounds, ours.unread.rounds, strict=True)
    )

    def medians(value: Callable[[Round], float], places: int) -> dict[str, str]:
        return {US: " / ".join(f"{median(map(value, run.rounds)):.{places}f}" for run in both)}

    return [
        Row(f"{scale.logged:,} answers, {scale.logged_at_once} at a time, a log that is read / that nobody reads"),
        Row("  lateness p50 of a round, ms", medians(lambda one: one.p50_ms, 2)),
        Row("  lateness p99 of a round, ms", medians(lambda one: one.p99_ms, 2)),
        Row("  p99 over read's, ms", {US: f"{over:+.2f}"}, f"<= {UNREAD_P99_OVER_MS:+g}", over <= UNREAD_P99_OVER_MS),
        Row("  CPU us an answer", medians(lambda one: one.cpu_us, 0)),
        Row(
            "  log lines dropped, as it counts",
            {US: " / ".join(f"{run.dropped:,}" for run in both)},
            "0 / some",
            ours.read.dropped == 0 < ours.unread.dropped,
        ),
        _verdicts({US: [one.verdict for run in both for one in run.rounds]}),
    ]


def _verdicts(verdicts: dict[str, list[dict[str, int]]]) -> Row:
    """Tokens that are not as they were sent, of whichever relay: then its other figures mean nothing either."""
    names = ("lost", "doubled", "reordered", "malformed")
    sums = {relay: [sum(one[name] for one in all_of) for name in names] for relay, all_of in verdicts.items()}
    cells = {relay: " / ".join(map(str, counts)) for relay, counts in sums.items()}
    return Row("  " + " / ".join(names), cells, "all 0", not any(map(any, sums.values())))


def _ids(verdicts: list[dict[str, int]]) -> Row:
    faults = sum(one["id_faults"] for one in verdicts)
    return Row("  ids out of sequence", {US: str(faults)} if verdicts else {}, "0", not faults if verdicts else None)


def _written(one: Stalled, *, after_eviction: bool) -> str:
    note = "" if after_eviction or one.stood_still else ", growing"
    return f"{one.upstream_kib(after_eviction=after_eviction):.0f}{note}"


def _kib(one: Stalled, value: float | None) -> str:
    if value is not None:
        return f"{value:.0f}"
    return "never evicted" if one.evicting_at_s is None else "not all evicted"


def _own_count(one: Stalled) -> str:
    counts = [sample.stalled for sample in one.samples if sample.stalled is not None]
    return f"{max(counts)} / {counts[-1]}" if counts else "none"


def _healthy(stalled: dict[str, Stalled], when: str) -> dict[str, str]:
    return {name: f"{one.p99_ms[when]:.2f}" for name, one in stalled.items()}


def _median(runs: Sequence[Paced], value: Callable[[Paced], float]) -> float:
    return median(map(value, runs))


def _spread(runs: Sequence[Paced]) -> str:
    values = sorted(run.cpu_us for run in runs)
    return f"{median(values):.1f} ({values[0]:.1f}-{values[-1]:.1f})"


def _ratios(paced: dict[str, list[Paced]], base: str) -> dict[str, float]:
    """Each relay's CPU time a token over the base's in the same round: the median of the rounds."""
    return {
        name: median(one.cpu_us / other.cpu_us for one, other in zip(runs, paced[base], strict=True))
        for name, runs in paced.items()
        if base in paced
    }


def _differences(paced: dict[str, list[Paced]], base: str, value: Callable[[Paced], float]) -> dict[str, float]:
    """Each relay's value less the base's in the same round: the median of the rounds."""
    return {
        name: median(value(one) - value(other) for one, other in zip(runs, paced[base], strict=True))
        for name, runs in paced.items()
        if base in paced and name != base
    }


def _only(paced: dict[str, list[Paced]], name: str) -> dict[str, list[Paced]]:
    return {name: paced[name]} if name in paced else {}


def _two_places(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.2f}" for name, value in values.items()}
