"""Makes small changes to aisse, one at a time, and says which of them no test notices.

`changes.toml` is the list: a text that stands exactly once in a file, what it is replaced by, and why that matters. It
is chosen by hand and not made by rule, as mutmut and cosmic-ray do: thousands of changes, nearly all of no meaning,
each of which would run a server's tests for seconds. Nothing happens in the checkout: every job works in a copy.
"""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CHANGES = Path(__file__).with_name("changes.toml")

# A change may make a test wait for what never comes. pytest ends such a test, and we a process that does not end.
_TEST_S = 40
# How many times as long as without a change, and how much longer than that.
_SLOWER, _GRACE_S = 4, 30.0

# pytest's exit codes (its reference, "Exit codes").
_PASSED, _NOTHING_RUN, _USAGE = 0, 5, 4


class ListError(Exception):
    """The list does not fit to the code or to the tests."""


@dataclass(frozen=True)
class Change:
    """One entry of the list. `tests` are arguments for pytest, one string a call, which run in this order."""

    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]
    equivalent: str = ""
    """Why nobody could notice it, where that is so."""

    @property
    def name(self) -> str:
        lines = [line.strip() for line in self.old.strip().splitlines()]
        return f"{self.file}: {lines[0][:60]}{' ...' if len(lines) > 1 else ''}"


class Outcome(NamedTuple):
    """`said` is None for a change that survived."""

    change: Change
    said: str | None
    seconds: float


def read_list(path: Path) -> list[Change]:
    """The changes, in order. A file's tests come after the ones that an entry names first."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    changes = []
    for module in data["module"]:
        for entry in module["change"]:
            tests = [*entry.pop("first", []), *module["tests"]]
            changes.append(Change(file=module["file"], tests=tuple(dict.fromkeys(tests)), **entry))
    return changes


def changed(change: Change, text: str) -> str:
    """The file's text with the change in it. Raises ListError where it cannot be made."""
    if (count := text.count(change.old)) != 1:
        raise ListError(f"the list is stale: this stands {count} times in {change.file}, not once:\n{change.old}")
    result = text.replace(change.old, change.new)
    try:
        compile(result, change.file, "exec")
    except SyntaxError as error:
        raise ListError(f"this change to {change.file} is no Python ({error}):\n{change.new}") from None
    return result


class Copy:
    """A copy of the tree, in which one job changes files and runs tests."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            # What git calls a file may be a link to the environment's folder, or deleted.
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)
        self._environ = os.environ | {
            # Before whatever the environment has installed.
            "PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parent}",
            # What is killed leaves its files.
            "TMPDIR": str(folder / "tmp"),
            "FIRST_FAILURE": str(folder / "tmp" / "first_failure"),
            # Two changes within a second may have the same length: their bytecode would be taken for each other's.
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # Lest a bench or a browser that is not there be noticed instead of the change.
        self._environ.pop("TESTS_REQUIRE", None)

    def run(self, tests: str, within_s: float | None) -> str | None:
        """What a call of pytest noticed; None where all is well. Raises ListError where it ran nothing."""
        shutil.rmtree(self._environ["TMPDIR"], ignore_errors=True)
        Path(self._environ["TMPDIR"]).mkdir()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "first_failure"]
        process = subprocess.Popen(
            [*command, f"--timeout={_TEST_S}", *shlex.split(tests)],
            cwd=self._folder,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output = process.communicate(timeout=within_s)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            return "it hangs"
        finally:
            # With it goes what its tests have started, of which a killed pytest leaves some.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        if process.returncode == _PASSED:
            return None
        if process.returncode in {_NOTHING_RUN, _USAGE}:
            raise ListError(f"pytest {tests} runs nothing:\n{output[-2000:]}")
        note = Path(self._environ["FIRST_FAILURE"])
        return note.read_text(encoding="utf-8") if note.exists() else f"pytest ended with {process.returncode}"

    def try_out(self, change: Change, limits: dict[str, float]) -> Outcome:
        """Runs a change's tests until one notices it."""
        path = self._folder / change.file
        text = path.read_text(encoding="utf-8")
        begun = time.monotonic()
        path.write_text(changed(change, text), encoding="utf-8")
        try:
            for tests in change.tests:
                if (said := self.run(tests, limits[tests])) is not None:
                    return Outcome(change, said, time.monotonic() - begun)
        finally:
            path.write_text(text, encoding="utf-8")
        return Outcome(change, None, time.monotonic() - begun)


def try_all(root: Path, changes: list[Change], jobs: int) -> list[Outcome]:
    """Every change's outcome. Raises ListError where the list is stale, or tests fail without any change."""
    stale = []
    for change in changes:
        try:
            changed(change, (root / change.file).read_text(encoding="utf-8"))
        except (ListError, FileNotFoundError) as error:
            stale.append(str(error))
    if stale:
        raise ListError("\n\n".join(stale))
    with tempfile.TemporaryDirectory(prefix="aisse-mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(jobs):
            copies.put(Copy(root, Path(folder) / str(number)))

        wrong = []

        def measure(tests: str) -> float:
            copy = copies.get()
            begun = time.monotonic()
            try:
                if (failed := copy.run(tests, None)) is not None:
                    wrong.append(f"without any change, pytest {tests} says: {failed}")
            except ListError as error:
                wrong.append(str(error))
            finally:
                copies.put(copy)
            return (time.monotonic() - begun) * _SLOWER + _GRACE_S

        def try_one(change: Change) -> Outcome:
            copy = copies.get()
            try:
                outcome = copy.try_out(change, limits)
            finally:
                copies.put(copy)
            say(outcome)
            return outcome

        # Tests that fail anyway would notice everything.
        calls = list(dict.fromkeys(tests for change in changes for tests in change.tests))
        tell(f"{len(changes)} changes; first {len(calls)} calls of pytest without any")
        try:
            limits = dict(zip(calls, pool.map(measure, calls), strict=True))
            if wrong:
                raise ListError("\n\n".join(wrong))
            return list(pool.map(try_one, changes))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def tell(text: str) -> None:
    """A line for who waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say(outcome: Outcome) -> None:
    """One line of an outcome."""
    change, said, seconds = outcome
    word = f"noticed   {said}" if said else f"equal     {change.equivalent}" if change.equivalent else "SURVIVES"
    tell(f"{seconds:6.1f} s  {change.name}\n          {word}")


def summary(outcomes: list[Outcome]) -> int:
    """Prints how many there are of each kind, and what survives; the exit code."""
    equivalent = [outcome for outcome in outcomes if outcome.change.equivalent]
    # Somebody can notice it after all.
    wrong = [outcome for outcome in equivalent if outcome.said]
    survivors = [outcome for outcome in outcomes if not outcome.said and not outcome.change.equivalent]
    noticed = len(outcomes) - len(equivalent) - len(survivors)
    tell(f"\n{len(outcomes)} changes: {noticed} noticed, {len(survivors)} survive, {len(equivalent)} change nothing")
    for change, _, _ in survivors:
        tell(f"\n{change.name}\n  {change.why}\n--- {change.old}\n+++ {change.new}")
    for change, said, _ in wrong:
        tell(f"\nsaid to change nothing, but is noticed: {change.name}\n  {said}")
    return 1 if survivors or wrong else 0


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """0 where everything was noticed, 1 where something survives, 2 where the list is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="how many changes are tried at a time (%(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="files whose path has this in it")
    parser.add_argument("--text", default="", metavar="WORD", help="changes whose text or reason has this in it")
    parser.add_argument("--list", type=Path, default=CHANGES, help="the changes (%(default)s)")
    parser.add_argument("--check", action="store_true", help="only look whether the list fits to the code")
    options: Any = parser.parse_args(arguments)
    changes = [
        change
        for change in read_list(options.list)
        if any(word in change.file for word in options.only or [""])
        and options.text in change.old + change.new + change.why
    ]
    if options.check:
        stale = 0
        for change in changes:
            try:
                changed(change, (root / change.file).read_text(encoding="utf-8"))
            except (ListError, FileNotFoundError) as error:
                tell(str(error))
                stale += 1
        tell(f"{len(changes)} changes, {stale} of them stale")
        return 2 if stale else 0
    try:
        return summary(try_all(root, changes, options.jobs))
    except ListError as error:
        tell(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
