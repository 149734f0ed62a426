"""What any replay log has to do, held against a plain list of frames."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aisse.replay.connection import Client
from aisse.replay.memory import SEGMENT_BYTES, MemoryLog, ReplayMemory
from aisse.replay.mirror import Mirror
from aisse.replay.terms import Terms
from aisse.replay.troubles import Troubles
from aisse.sse import Parser, frame

SOAK = os.environ.get("TESTS_SOAK") == "1"
PROPERTY = settings(
    max_examples=2_000 if SOAK else 200,
    # The fixture is a function that makes a new log for each example.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

STREAM = "fqBYVmVpYWb0mJ4ZXc_-1A"

NewLog = Callable[[ReplayMemory], MemoryLog]


@pytest.fixture(params=["memory", "redis"])
def new_log(request: pytest.FixtureRequest) -> NewLog:
    """Makes an empty log of STREAM. Every log that there is belongs into `params`.

    What the shared one does beside these calls is test_mirror.py's; here nothing is connected.
    """
    if request.param == "memory":
        return MemoryLog
    mirror = Mirror(Client(), Nobody(), Terms(0.02, lease_s=6, retention_s=300, stream_s=3600), Troubles())
    return lambda memory: mirror.log(STREAM, memory)


class Nobody:
    """Whom a log that is not connected has nothing to say to."""

    def read_elsewhere(self, stream_id: str, instances: int, position: int, *, stalled: bool) -> None: ...

    def moved_elsewhere(self, stream_id: str, within_s: float) -> None: ...

    def stop_asked(self, stream_id: str) -> None: ...

    def lost(self, stream_id: str, frames: bytes, last_seq: int) -> None: ...

    def held_back(self, stream_id: str) -> bool:
        return False


@pytest.fixture
def memory() -> ReplayMemory:
    return ReplayMemory(1 << 30)


@pytest.fixture
def log(new_log: NewLog, memory: ReplayMemory) -> MemoryLog:
    return new_log(memory)


def numbered(seq: int, data: str = "", event_type: str = "content_block_delta") -> bytes:
    return frame(event_type, data, f"{STREAM}.{seq}")


def fill(log: MemoryLog, sizes: list[int], per_append: int = 1) -> list[bytes]:
    """Appends a frame for each size of its data, some at a time; returns them."""
    frames = [numbered(log.last_seq + offset, "x" * size) for offset, size in enumerate(sizes, 1)]
    for at in range(0, len(frames), per_append):
        group = frames[at : at + per_append]
        log.append(b"".join(group), log.last_seq + len(group))
    return frames


def reads(log: MemoryLog, position: int, limit: int = SEGMENT_BYTES) -> list[bytes]:
    """What a reader at `position` gets, read by read, up to the tail."""
    got = []
    while part := log.read(position, limit):
        got.append(part)
        position += len(part)
    assert position == log.tail
    return got


def positions(frames: list[bytes]) -> list[int]:
    return list(accumulate((len(one) for one in frames), initial=0))


# --- reading ------------------------------------------------------------------------------------------------------


def test_empty_log_has_nothing_to_read(log: MemoryLog) -> None:
    assert (log.tail, log.last_seq) == (0, 0)
    assert log.read(0) == b""


def test_frame_is_read_as_it_was_appended(log: MemoryLog) -> None:
    log.append(numbered(1, "hello"), 1)
    assert log.read(0) == numbered(1, "hello")
    assert (log.tail, log.last_seq) == (len(numbered(1, "hello")), 1)


def test_read_at_the_tail_is_empty_until_the_next_append(log: MemoryLog) -> None:
    fill(log, [10, 10])
    position = log.tail
    assert log.read(position) == b""
    (added,) = fill(log, [10])
    assert log.read(position) == added
    assert log.read(log.tail) == b""


@pytest.mark.parametrize("per_append", [1, 7, 1000])
def test_log_of_many_segments_is_read_from_every_frame_on(log: MemoryLog, per_append: int) -> None:
    frames = fill(log, [37] * 1500, per_append)
    assert log.tail > 4 * SEGMENT_BYTES
    whole = b"".join(frames)
    for position in positions(frames):
        assert b"".join(reads(log, position)) == whole[position:]


@pytest.mark.parametrize("per_append", [1, 7])
@pytest.mark.parametrize("limit", [1, 60, 400, 5000, SEGMENT_BYTES, 10 * SEGMENT_BYTES])
def test_read_gives_whole_frames_up_to_its_limit_but_at_least_one(log: MemoryLog, limit: int, per_append: int) -> None:
    """A reader's write is what one read gives: neither a part of a frame nor a flood, nor a frame at a time."""
    frames = fill(log, [100, 5000, 3, 3, 3, 20_000, 3] * 30, per_append)
    borders = set(positions(frames))
    position = 0
    parts = reads(log, 0, limit)
    for part in parts:
        position += len(part)
        assert position in borders
        assert len(part) <= limit or part in frames
    # Two neighbours that fit into one read are apart only where a segment ends: one that is full, or the short one
    # before an append that fills one by itself.
    apart = sum(len(first) + len(second) <= limit for first, second in pairwise(parts))
    assert apart <= 2 * (log.tail // SEGMENT_BYTES) + 1


def test_read_at_its_limit_exactly_is_not_cut(log: MemoryLog) -> None:
    first, second, third = fill(log, [10, 20, 30])
    assert log.read(0, len(first + second)) == first + second
    assert log.read(0, len(first + second) - 1) == first
    assert log.read(0, len(first + second) + 1) == first + second
    assert log.read(0, len(first)) == log.read(0, len(first) - 1) == first
    assert log.read(len(first), len(second)) == second
    assert log.read(len(first), len(second + third)) == second + third


def test_frame_that_fills_a_segment_exactly_is_followed_by_the_next(log: MemoryLog) -> None:
    overhead = len(numbered(1))
    frames = fill(log, [SEGMENT_BYTES - overhead, 0, SEGMENT_BYTES - 2 * overhead, SEGMENT_BYTES - overhead - 1, 0, 0])
    assert len(frames[0]) == SEGMENT_BYTES
    assert b"".join(reads(log, 0)) == b"".join(frames)
    for seq, position in enumerate(positions(frames)):
        assert log.position_after(seq) == position
        assert b"".join(reads(log, position)) == b"".join(frames[seq:])


def test_frames_larger_than_a_segment_stay_whole(log: MemoryLog) -> None:
    frames = fill(log, [5, 3 * SEGMENT_BYTES, 5, 10 * SEGMENT_BYTES, SEGMENT_BYTES, 5])
    assert b"".join(reads(log, 0)) == b"".join(frames)
    for seq, position in enumerate(positions(frames)):
        assert log.position_after(seq) == position
        part = log.read(position)
        assert part.startswith(b"".join(frames[seq : seq + 1]))


def test_many_frames_in_one_append_are_found_one_by_one(log: MemoryLog) -> None:
    frames = fill(log, [11] * 3000, per_append=3000)
    for seq, position in enumerate(positions(frames)):
        assert log.position_after(seq) == position


# --- positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_append", [1, 7])
def test_every_number_has_its_position_while_the_log_grows(log: MemoryLog, per_append: int) -> None:
    """Through 1 to 1,200: no number is found in another that contains its digits."""
    appended: list[bytes] = []
    for _ in range(1200 // 60):
        appended += fill(log, [40] * 60, per_append)
        for seq, position in enumerate(positions(appended)):
            assert log.position_after(seq) == position


def test_position_before_the_first_frame_is_the_beginning(log: MemoryLog) -> None:
    assert log.position_after(0) == 0
    fill(log, [10, 10])
    assert log.position_after(0) == 0


@pytest.mark.parametrize("before", [0, 1, 3, 400])
def test_position_in_a_hole_is_the_first_frame_behind_it(log: MemoryLog, before: int) -> None:
    """As a producer leaves one that was lost: in the open segment, and in one that is closed."""
    frames = fill(log, [100] * before)
    log.append(numbered(before + 1000), before + 1000)
    log.append(numbered(before + 1001), before + 1001)
    for _ in range(2):
        for seq in (before + 1, before + 2, before + 999):
            assert log.position_after(seq) == sum(map(len, frames))
        assert log.position_after(before + 1000) == sum(map(len, frames)) + len(numbered(before + 1000))
        log.seal()


def test_position_beyond_the_last_frame_is_the_tail(log: MemoryLog) -> None:
    assert log.position_after(1) == 0
    fill(log, [10, 10])
    assert [log.position_after(seq) for seq in (2, 3, 2**53)] == [log.tail] * 3


@pytest.mark.parametrize(
    "text",
    [
        f"id: {STREAM}.1",
        f'"\\nid: {STREAM}.3\\n\\n"',
        f"\u2028id: {STREAM}.3\u2028\u2028",
        f"id: {STREAM}.3 event: end",
        f"data: id: {STREAM}.2",
    ],
)
@pytest.mark.parametrize("size", [0, SEGMENT_BYTES])
def test_text_like_an_id_line_misleads_no_position(log: MemoryLog, text: str, size: int) -> None:
    frames = [
        numbered(1, text),
        # Several data lines, as the upstream may send them.
        f"event: {text}\ndata: \ndata: {text}\ndata: \ndata: {text}\nid: {STREAM}.2\n\n".encode(),
        numbered(3, text + "x" * size),
        numbered(4, "", text),
    ]
    for seq, one in enumerate(frames, 1):
        log.append(one, seq)
    assert [log.position_after(seq) for seq in range(5)] == positions(frames)


# --- the end of a log ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [10], [37] * 1500, [3 * SEGMENT_BYTES], [10, 3 * SEGMENT_BYTES, 10]])
def test_sealed_log_reads_as_before(log: MemoryLog, memory: ReplayMemory, sizes: list[int]) -> None:
    frames = fill(log, sizes)
    log.seal()
    assert (log.tail, log.last_seq, memory.used) == (len(b"".join(frames)), len(frames), log.tail)
    assert b"".join(reads(log, 0)) == b"".join(frames)
    for seq, position in enumerate(positions(frames)):
        assert log.position_after(seq) == position
    assert log.read(log.tail) == b""


@pytest.mark.parametrize("segments", [0, 1, 2, 5])
@pytest.mark.parametrize("rest", [1, SEGMENT_BYTES // 2, SEGMENT_BYTES - 100])
def test_sealed_log_keeps_no_short_piece_beside_whole_ones(memory: ReplayMemory, segments: int, rest: int) -> None:
    """It would leave a hole in the heap that fits nothing."""
    log = MemoryLog(memory)
    fill(log, [SEGMENT_BYTES // 64] * 64 * segments + [rest])
    log.seal()
    assert all(len(piece) >= SEGMENT_BYTES for piece in log._segments[: len(log._segments) if segments else 0])


def test_sealed_log_copies_no_long_piece_for_a_short_one(memory: ReplayMemory) -> None:
    log = MemoryLog(memory)
    fill(log, [1 << 20, 10])
    long = log._segments[0]
    log.seal()
    assert log._segments[0] is long


def test_discarded_log_gives_back_what_it_held_and_no_more(new_log: NewLog, memory: ReplayMemory) -> None:
    kept, empty, short, long, sealed = (new_log(memory) for _ in range(5))
    for log, sizes in ((kept, [100]), (short, [10]), (long, [37] * 1500), (sealed, [10, 2 * SEGMENT_BYTES])):
        fill(log, sizes)
    sealed.seal()
    for log in (empty, short, long, sealed):
        before = memory.used
        held = log.tail
        log.discard()
        assert memory.used == before - held
    assert memory.used == kept.tail == len(kept.read(0))


def test_log_discarded_twice_gives_back_once(log: MemoryLog, new_log: NewLog, memory: ReplayMemory) -> None:
    other = new_log(memory)
    fill(other, [10])
    fill(log, [10])
    log.discard()
    log.discard()
    assert memory.used == other.tail


def test_memory_counts_every_append_of_every_log(new_log: NewLog, memory: ReplayMemory) -> None:
    logs = [new_log(memory) for _ in range(3)]
    for round_ in range(50):
        for log in logs:
            fill(log, [round_ * 100, 5], per_append=2)
            assert memory.used == sum(other.tail for other in logs)
    assert all(log.tail == len(b"".join(reads(log, 0))) for log in logs)


@pytest.mark.parametrize(("number_of_logs", "frames_each"), [(50, 100), (2, 2500)], ids=["short", "long"])
def test_log_costs_little_more_than_it_counts(
    new_log: NewLog, memory: ReplayMemory, number_of_logs: int, frames_each: int
) -> None:
    """The bound on replay memory is a bound on real memory: within 2%.

    While a log grows its last segment is in pieces, of which each costs as much as any object of Python's.

    Beside that a log costs some objects of its own, whose size does not depend on what it holds.
    """
    frames = [numbered(seq, "x" * 60) for seq in range(1, frames_each + 1)]
    logs = [new_log(memory) for _ in range(number_of_logs)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]

        def cost() -> int:
            return tracemalloc.get_traced_memory()[0] - before

        for log in logs:
            for seq, one in enumerate(frames, 1):
                log.append(one, seq)
        open_cost = cost()
        for log in logs:
            log.seal()
        sealed_cost = cost()
        for log in logs:
            log.discard()
        discarded_cost = cost()
    finally:
        tracemalloc.stop()
    counted = len(b"".join(frames)) * len(logs)
    objects = 400 * len(logs) + 4096
    pieces = min(frames_each, SEGMENT_BYTES // len(frames[0]) + 1)
    assert open_cost < counted * 1.02 + objects + 50 * pieces * len(logs)
    assert sealed_cost < counted * 1.02 + objects
    assert discarded_cost < objects


# --- anything -----------------------------------------------------------------------------------------------------

sizes = st.integers(0, 60) | st.sampled_from([1000, SEGMENT_BYTES - 60, SEGMENT_BYTES, 3 * SEGMENT_BYTES])
batches = st.lists(st.lists(sizes, min_size=1, max_size=5), max_size=12)


@PROPERTY
@given(
    batches=batches,
    cursors=st.lists(st.integers(0, 60), max_size=4),
    limit=st.integers(1, 4 * SEGMENT_BYTES),
    sealed=st.booleans(),
)
def test_any_log_is_the_list_of_its_frames(
    new_log: NewLog, batches: list[list[int]], cursors: list[int], limit: int, sealed: bool
) -> None:
    """With readers that follow it while it grows, from wherever they begin."""
    memory = ReplayMemory(1 << 30)
    log = new_log(memory)
    frames: list[bytes] = []
    followers: list[tuple[int, int, list[bytes]]] = []  # first number, position, what it got

    def follow() -> None:
        for index, (begin, position, got) in enumerate(followers):
            part = log.read(position, limit)
            got.append(part)
            followers[index] = (begin, position + len(part), got)

    for number, batch in enumerate(batches):
        frames += fill(log, batch, per_append=len(batch))
        if number < len(cursors):
            begin = min(cursors[number], len(frames))
            followers.append((begin, log.position_after(begin), []))
        follow()
        assert (log.tail, log.last_seq, memory.used) == (len(b"".join(frames)), len(frames), log.tail)
    if sealed:
        log.seal()
    for _ in batches:
        follow()

    for begin, position, got in followers:
        assert b"".join(got) + b"".join(reads(log, position)) == b"".join(frames[begin:])
    assert [log.position_after(seq) for seq in range(len(frames) + 2)] == [*positions(frames), log.tail]
    for seq, position in enumerate(positions(frames)):
        parts = reads(log, position, limit)
        assert b"".join(parts) == b"".join(frames[seq:])
        # Whole frames: each read parses to its last byte without the next.
        assert sum(len(Parser(1 << 20).feed(part)) for part in parts) == len(frames) - seq
    log.discard()
    assert memory.used == 0
