"""Measures aisse beside the naive aiohttp relay and its twin in Node: CPU a token, latency, memory, lost tokens,
what it takes to read an answer again, a log that nobody reads, and how long others wait beside the worst questions.

Upstream, relay and load are processes of their own, on CPUs of their own where there are two; every token is verified
by its number. Prints one table to stdout, progress to stderr; the exit code is 1 where a bound was missed.
"""

import argparse
import contextlib
import dataclasses
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import hostile
import resume
import sections
import shared
import unread
from measure import machine
from processes import FOLDER, BenchError, Child, Kind, LoadDriver, placement, relay_kinds
from table import NODE, Report, text

_PARTS = ("throughput", "idle", "stalled", "resume", "shared", "log", "question")
_RELAYS = ("aisse", "naive", "node")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="measured runs of each relay (default 5)")
    parser.add_argument("--seconds", type=float, help="length of a measured run (default 6)")
    parser.add_argument("--only", type=_listed, default=_PARTS, help=f"parts: {','.join(_PARTS)} (default all)")
    parser.add_argument("--relays", type=_listed, default=_RELAYS, help="relays: aisse,naive,node (default all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--quick", action="store_true", help="shows that the benchmark works; its figures mean nothing")
    parser.add_argument("--no-fail", action="store_true", help="exit 0 where a bound was missed, too")
    parsed = parser.parse_args(argv)
    if unknown := set(parsed.only) - set(_PARTS):
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}")
    return parsed


def main() -> int:
    asked = arguments()
    # Ended from outside, the processes end with it; without a handler no `finally` would run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        kinds = relay_kinds(asked.relays)
        report = measure(asked, [kind for kind in kinds if not kind.missing])
    except BenchError as error:
        say(f"the benchmark stopped: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    rows = report.rows()
    lines = [_machine(kinds), "", text(rows, asked.relays), *report.marks()]
    lines += [f"skipped: {kind.name}: {kind.missing}" for kind in kinds if kind.missing]
    if asked.quick:
        lines.append("quick: these figures mean nothing")
    sys.stdout.write("\n".join(lines) + "\n")
    if asked.json:
        found = {"machine": lines[0], "asked": vars(asked) | {"json": None}, **dataclasses.asdict(report)}
        asked.json.write_text(json.dumps(found | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    missed = any(row.reached is False for row in rows)
    return int(missed and not asked.no_fail)


def measure(asked: argparse.Namespace, kinds: Sequence[Kind]) -> Report:
    """Runs the parts that were asked for, one after the other. BenchError where one cannot be run."""
    scale = sections.QUICK if asked.quick else sections.Scale()
    chosen = {"runs": asked.runs, "seconds": asked.seconds}
    scale = dataclasses.replace(scale, **{name: value for name, value in chosen.items() if value is not None})
    report = Report(scale)
    with bench(scale) as ready:
        if "throughput" in asked.only:
            report.paced = sections.throughput(ready, kinds)
        if "idle" in asked.only:
            report.idle = {kind.name: sections.idle(ready, kind) for kind in kinds}
        if "stalled" in asked.only:
            report.stalled = {kind.name: sections.stalled(ready, kind) for kind in kinds}
        if "resume" in asked.only:
            # Who has no settings has no replay.
            report.resume = {kind.name: resume.resume(ready, kind) for kind in kinds if kind.settings}
        if "shared" in asked.only:
            report.shared = {kind.name: shared.shared(ready, kind) for kind in kinds if kind.settings}
        if "log" in asked.only:
            report.unread = {kind.name: unread.unread(ready, kind) for kind in kinds if kind.settings}
        if "question" in asked.only:
            report.question = {kind.name: hostile.hostile(ready, kind) for kind in kinds if kind.settings}
    return report


@contextlib.contextmanager
def bench(scale: sections.Scale) -> Iterator[sections.Bench]:
    """Upstream and load, ready."""
    cpus = placement()
    with tempfile.TemporaryDirectory(prefix="aisse-bench-") as name:
        folder = Path(name)
        command = [sys.executable, str(FOLDER / "upstream.py")]
        with Child("upstream", command, cpus.others, folder) as upstream, LoadDriver(cpus.others, folder) as load:
            yield sections.Bench(scale, cpus, folder, upstream, upstream.port(), load, say)


_BEGAN = time.monotonic()


def say(line: str) -> None:
    """Progress, with the time since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _BEGAN), 60)
    sys.stderr.write(f"{minutes:02}:{seconds:02} {line}\n")


def _machine(kinds: Sequence[Kind]) -> str:
    node = [kind for kind in kinds if kind.name == NODE and not kind.missing]
    if not node:
        return machine(None)
    version = subprocess.run([node[0].command[0], "--version"], capture_output=True, text=True, check=True)
    return machine(version.stdout.strip())


def _listed(value: str) -> tuple[str, ...]:
    return tuple(part for part in value.split(",") if part)


if __name__ == "__main__":
    sys.exit(main())
