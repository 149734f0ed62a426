"""The benchmark itself: it runs, it verifies every token, and it can fail."""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import resume
from hostile import Hostile
from resume import Kept, Replay, Resume
from sections import Scale
from table import Report
from wire import LAST_CHUNK, Dechunker, Verifier, chunk, closing, delta, opening

RUN = Path(__file__).with_name("run.py")
FAULTS = ("lose", "double", "swap")
RUN_S = 250  # ten times what a run takes; for a machine that has other things to do

pytestmark = pytest.mark.timeout(600)


class Outcome:
    """What one run of the benchmark left: exit code, table, progress, record."""

    def __init__(self, process: subprocess.Popen[str], record: Path) -> None:
        self.table, self.progress = process.communicate(timeout=RUN_S)
        self.code = process.returncode
        self.record: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """The whole benchmark in parts and two special ones, in a fraction of their time; most are side by side."""
    folder = tmp_path_factory.mktemp("bench")
    asked = {
        "whole": (["--relays", "aisse", "--only", "throughput,idle,stalled", "--no-fail"], None),
        "resume": (["--relays", "aisse,naive", "--only", "resume,question", "--no-fail"], None),
        "faulty": (["--relays", ",".join(f"faulty-{fault}" for fault in FAULTS), "--only", "throughput"], None),
        "no node": (["--relays", "node", "--only", "throughput"], {"PATH": ""}),
    }
    started = {name: _start(flags, folder / name, env) for name, (flags, env) in asked.items()}
    try:
        outcomes = {name: Outcome(process, folder / name) for name, process in started.items()}
        # By itself: with its engine and three relays it is as much as two others.
        flags = ["--relays", "aisse,naive", "--only", "shared,log", "--no-fail"]
        started["shared"] = _start(flags, folder / "shared", None)
        outcomes["shared"] = Outcome(started["shared"], folder / "shared")
        yield outcomes
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def test_quick_run_verifies_tokens_of_every_part(outcomes: dict[str, Outcome]) -> None:
    """Streams were opened, ended whole, and were right to the last token; memory and silence were measured."""
    whole = outcomes["whole"]
    assert whole.code == 0, whole.progress
    for name in ("no relay", "aisse"):
        (run,) = whole.record["paced"][name]
        assert run["tokens_s"] > 0
        assert _clean(run["verdict"])
    idle = whole.record["idle"]["aisse"]
    assert (idle["alive"], idle["upstream_open"]) == (idle["streams"], idle["streams"])
    assert idle["fewest_heartbeats"] >= 1
    stalled = whole.record["stalled"]["aisse"]
    assert _clean(stalled["verdict"])
    assert stalled["samples"][-1]["upstream_bytes"] > 0


def test_quick_run_reads_every_token_again(outcomes: dict[str, Outcome]) -> None:
    """Of a finished and of a running answer, from the middle and from the beginning; kept answers were counted."""
    assert outcomes["resume"].code == 0, outcomes["resume"].progress
    resumed, scale = outcomes["resume"].record["resume"]["aisse"], outcomes["resume"].record["scale"]
    for name, beside in (("finished", 6), ("running", 2)):  # events that are no tokens
        replay = resumed[name]
        assert (replay["wrong"], replay["whole_frames"]) == (0, scale["replay_events"] + beside)
        assert 0 < replay["compact_frames"] < 10
    assert (resumed["few"]["streams"], resumed["many"]["streams"]) == (scale["kept_few"], scale["kept"])
    assert 0 < resumed["few"]["logged_kib"] < resumed["many"]["logged_kib"]
    assert resumed["full"]["logged_kib"] < scale["replay_bytes"] / 1024
    assert "first replayed byte beyond it" in outcomes["resume"].table


def test_quick_run_shares_every_token(outcomes: dict[str, Outcome]) -> None:
    """Beside the log in memory, read on another instance, and with streams that are followed."""
    assert outcomes["shared"].code == 0, outcomes["shared"].progress
    shared = outcomes["shared"].record["shared"]["aisse"]
    for run in (*shared["memory"], *shared["shared"], shared["elsewhere"]):
        assert run["tokens_s"] > 0
        assert _clean(run["verdict"])
    assert shared["shared"][0]["busy"]["engine"] > 0
    assert shared["elsewhere"]["p50_ms"] > 0
    assert 2 <= shared["connections"] <= 10
    for crowd in (shared["known"], shared["unknown"]):
        assert crowd["right"] == outcomes["shared"].record["scale"]["crowd"]
        assert crowd["cpu_us"] > 0
    assert shared["unknown"]["commands"] < shared["known"]["commands"]
    assert "lateness elsewhere p99" in outcomes["shared"].table


def test_quick_run_answers_where_nobody_reads_the_log(outcomes: dict[str, Outcome]) -> None:
    """What is dropped is counted, once the pipe and the buffer are full; every answer is whole."""
    logged = outcomes["shared"].record["unread"]["aisse"]
    for run in (logged["read"], logged["unread"]):
        assert len(run["rounds"]) > 1
        assert all(_clean(one["verdict"]) for one in run["rounds"])
    assert logged["unread"]["dropped"] > 0
    assert "that nobody reads" in outcomes["shared"].table


def test_quick_run_prints_table_with_bounds(outcomes: dict[str, Outcome]) -> None:
    """The machine, one line for each figure, bounds and verdicts; progress is elsewhere."""
    whole = outcomes["whole"]
    lines = whole.table.splitlines()
    assert "Python" in lines[0]
    assert lines[2].split() == ["no", "relay", "aisse", "bound", "reached"]
    labels = [line.strip() for line in lines]
    for label in (
        "tokens/s",
        "CPU us a token",
        "lost / doubled",
        "resident KiB a stream",
        "healthy p99 while stalled",
    ):
        assert any(line.startswith(label) for line in labels), label
    assert "throughput 1/1, aisse" in whole.progress


def test_faulty_relay_fails_the_run_by_the_fault_it_has(outcomes: dict[str, Outcome]) -> None:
    """A relay that loses, doubles or swaps one token a stream is caught once for each stream, and the run fails."""
    faulty = outcomes["faulty"]
    assert faulty.code == 1, faulty.progress
    streams = faulty.record["scale"]["streams"]
    found = {fault: faulty.record["paced"][f"faulty-{fault}"][0]["verdict"] for fault in FAULTS}
    counts = {fault: (one["lost"], one["doubled"], one["reordered"]) for fault, one in found.items()}
    assert counts == {"lose": (streams, 0, 0), "double": (0, streams, 0), "swap": (0, 0, streams)}
    assert any(line.endswith(" NO") for line in faulty.table.splitlines())


def test_relay_that_cannot_run_is_skipped_with_reason(outcomes: dict[str, Outcome]) -> None:
    """Without Node the rest is measured and the table says what is missing."""
    assert outcomes["no node"].code == 0, outcomes["no node"].progress
    assert "skipped: node: node is not installed" in outcomes["no node"].table


def test_quick_run_sends_every_hostile_question(outcomes: dict[str, Outcome]) -> None:
    """Others were answered beside each, and each was answered."""
    (found,) = outcomes["resume"].record["question"]["aisse"]
    assert found["waits_ms"].keys() == found["statuses"].keys() == {name for name, _ in hostile.bodies(found["size"])}
    assert len(found["waits_ms"]) >= 30
    assert all(wait_ms > 0 for wait_ms in found["waits_ms"].values())
    assert set(found["statuses"].values()) == {200, 400}  # too small for the bounds


def test_question_row_names_the_worst_and_whether_it_is_within_its_bound() -> None:
    for size, worst_ms, reached in ((8 << 20, 20.0, True), (8 << 20, 20.1, False), (9 << 20, 60.0, True)):
        found = Hostile(size, 5, {"a": 1.0, "b": worst_ms}, {"a": 200, "b": 400}, 0.5)
        rows = Report(Scale(), question={"aisse": [found]}).rows()
        assert [row.reached for row in rows if row.bound] == [reached]
        assert rows[-1].label.strip() == "b"


def test_resume_rows_name_the_bound_that_was_missed() -> None:
    """Each figure beyond its bound, and it alone, is a NO."""
    well = Replay(5000, 0.3, 4.9, 49.0, 80.0, 20, 30.0, 5006, 0)
    kept = Kept(100, resident_kib=100, logged_kib=90.0, look_up_ms=0.1)
    good = Resume(well, well, kept, kept, kept)
    assert _missed(good) == []
    for change, label in (
        ({"beyond_plain_ms": 5.1}, "first replayed byte beyond it, ms"),
        ({"compact_ms": 50.1}, "all of it, compact, ms (worst)"),
        ({"compact_frames": 21}, "its frames"),
        ({"wrong": 1}, "tokens out of place"),
    ):
        for name in ("finished", "running"):
            bad: dict[str, Any] = {name: dataclasses.replace(well, **change)}
            assert _missed(dataclasses.replace(good, **bad)) == [label]
    large = dataclasses.replace(kept, resident_kib=int(1.51 * Scale().replay_bytes / 1024))
    assert len(_missed(dataclasses.replace(good, many=large))) == 1
    assert len(_missed(dataclasses.replace(good, full=large))) == 1
    slow = dataclasses.replace(kept, look_up_ms=0.21)
    assert len(_missed(dataclasses.replace(good, many=slow))) == 1


def test_replay_that_loses_doubles_or_swaps_a_token_is_wrong() -> None:
    def body(numbers: list[int]) -> bytes:
        return b"".join(delta(resume.NUMBER, number, 0) for number in numbers)

    assert resume.wrong(body([2, 3, 4]), 2, 5) == 0
    for numbers in ([2, 3], [2, 4], [3, 4], [2, 3, 3, 4], [2, 4, 3], [2, 3, 4, 5], []):
        assert resume.wrong(body(numbers), 2, 5) > 0


def test_killed_run_leaves_no_process_behind(tmp_path: Path) -> None:
    """Upstream, load and relay die with the benchmark, even where it could not end them itself."""
    process = _start(["--relays", "naive", "--only", "throughput"], tmp_path / "record", None)
    assert process.stderr
    assert "warming up" in process.stderr.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    watched = [os.pidfd_open(int(child)) for child in children]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(watched) == 3
    for child in watched:
        _wait_for_end(child)


def test_verifier_of_right_stream_counts_nothing() -> None:
    """All tokens in order, however they are cut."""
    body = _body([*range(5)])
    for size in (1, 7, len(body)):
        check = _verified(body, size)
        assert _counts(check) == (0, 0, 0, 0)
        assert check.started
        assert check.stopped


@pytest.mark.parametrize(
    ("numbers", "counts"),
    [
        ([0, 1, 3, 4], (1, 0, 0, 0)),
        ([0, 1, 2, 3], (1, 0, 0, 0)),  # the last one: only the upstream's own count tells
        ([0, 1, 1, 2, 3, 4], (0, 1, 0, 0)),
        ([0, 2, 1, 3, 4], (0, 0, 1, 0)),
        ([0, 1, 2, 3, 4, 5], (0, 0, 0, 1)),  # one that was never sent
    ],
)
def test_verifier_names_each_fault(numbers: list[int], counts: tuple[int, int, int, int]) -> None:
    assert _counts(_verified(_body(numbers))) == counts


def test_verifier_counts_foreign_and_changed_tokens_as_malformed() -> None:
    """A token of another stream, and one whose frame a relay altered."""
    body = _body([0, 1, 2, 3]) + delta(8, 4, 0) + delta(7, 4, 0).replace(b"text_delta", b"text-delta")
    assert _counts(_verified(body)) == (1, 0, 0, 2)


@pytest.mark.parametrize(("ids", "faults"), [([1, 2, 3], 0), ([1, 3, 4], 1), ([1, 1, 2], 1), ([1, None, 2], 2)])
def test_verifier_counts_ids_out_of_sequence(ids: list[int | None], faults: int) -> None:
    """A relay that numbers events once numbers all of them, from 1, without holes."""
    check = Verifier(7)
    for number, relay_id in enumerate(ids):
        line = b"" if relay_id is None else b"id: %b.%d\n" % (b"A" * 22, relay_id)
        check.feed(delta(7, number, 0)[:-1] + line + b"\n")
    assert check.id_faults == faults


def test_verifier_counts_heartbeats_once_wherever_they_are_cut() -> None:
    """On a silent stream and right before a frame."""
    body = opening(7)[0] + b": heartbeat\n: heartbeat\n" + delta(7, 0, 0) + b": heartbeat\n"
    for size in (1, 5, len(body)):
        assert _verified(body, size).heartbeats == 3


def test_dechunker_gives_same_body_for_every_cut() -> None:
    parts = [b"a", b"bc" * 20, b"\r\n"]
    wire = b"".join(map(chunk, parts)) + LAST_CHUNK
    for size in range(1, len(wire) + 1):
        dechunker = Dechunker()
        assert b"".join(dechunker.feed(piece) for piece in _cut(wire, size)) == b"".join(parts)
        assert dechunker.ended


def _start(flags: list[str], record: Path, env: dict[str, str] | None) -> subprocess.Popen[str]:
    command = [sys.executable, str(RUN), "--quick", "--json", str(record), *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ) | (env or {})
    )


def _wait_for_end(child: int) -> None:
    """Of the process behind a descriptor, which becomes readable then."""
    try:
        assert select.select([child], [], [], 60)[0]
    finally:
        os.close(child)


def _missed(resumed: Resume) -> list[str]:
    rows = Report(Scale(), resume={"aisse": resumed}).rows()
    return [row.label.strip() for row in rows if row.reached is False]


def _clean(verdict: dict[str, Any]) -> bool:
    return not any(verdict.values())


def _body(numbers: list[int]) -> bytes:
    return b"".join([*opening(7), *(delta(7, number, number) for number in numbers), *closing(len(numbers))])


def _verified(body: bytes, size: int = 1 << 20) -> Verifier:
    check = Verifier(7)
    for piece in _cut(body, size):
        check.feed(piece)
    check.settle(5)
    return check


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def _counts(check: Verifier) -> tuple[int, int, int, int]:
    return check.lost, check.doubled, check.reordered, check.malformed
