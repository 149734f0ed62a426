"""One stream: its states, its end, its gate, and what its readers get."""

from __future__ import annotations

import asyncio
import enum
import json
import math
import os
import time
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from aisse.errors import StreamError, UpstreamError
from aisse.replay.memory import SEGMENT_BYTES, MemoryLog, ReplayMemory
from aisse.sse import Parser, frame
from aisse.streams.endings import HOLE, Reason, ending, failure
from aisse.streams.leave import LeaveTime
from aisse.streams.stream import TRANSITIONS, StandIn, State, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

SOAK = os.environ.get("TESTS_SOAK") == "1"
ID = "fqBYVmVpYWb0mJ4ZXc_-1A"
READ_AHEAD = 1000
STREAM_BYTES = 10_000


def nothing(stream: Stream) -> None:
    """For `on_left` and `on_end` where nobody listens."""


def make_stream(
    *,
    read_ahead_bytes: int = READ_AHEAD,
    stream_bytes: int = STREAM_BYTES,
    leave_s: float = 10.0,
    on_left: Callable[[Stream], None] = nothing,
    on_end: Callable[[Stream], None] = nothing,
) -> Stream:
    return Stream(
        ID,
        MemoryLog(ReplayMemory(1 << 30)),
        now=asyncio.get_running_loop().time(),
        read_ahead_bytes=read_ahead_bytes,
        stream_bytes=stream_bytes,
        leave=LeaveTime(leave_s),
        on_left=on_left,
        on_end=on_end,
    )


def numbered(seq: int, size: int = 0) -> bytes:
    return frame("content_block_delta", "x" * size, f"{ID}.{seq}")


def publish(stream: Stream, *sizes: int) -> bytes:
    """Publishes frames with data of these sizes, in one go; returns them."""
    begin = stream.log.last_seq + 1
    frames = b"".join(numbered(seq, size) for seq, size in enumerate(sizes, begin))
    stream.publish(frames, begin + len(sizes) - 1)
    return frames


def publish_bytes(stream: Stream, size: int) -> bytes:
    """Publishes one frame of exactly `size` bytes."""
    return publish(stream, size - len(numbered(stream.log.last_seq + 1)))


# Functions, because a type checker takes a property to stay what an assertion found it to be.
def held_back(stream: Stream) -> bool:
    return stream.holds_back


def state_of(stream: Stream) -> State:
    return stream.state


def logged(stream: Stream, position: int = 0) -> bytes:
    parts = []
    while part := stream.log.read(position):
        parts.append(part)
        position += len(part)
    return b"".join(parts)


def events(frames: bytes) -> list[tuple[str, Any, str]]:
    """Type, data and id of our own events, each frame in the one form that DESIGN.md gives it."""
    found = []
    for one in frames.removesuffix(b"\n\n").split(b"\n\n"):
        first, second, third = one.decode("ascii").split("\n")
        found.append(
            (first.removeprefix("event: "), json.loads(second.removeprefix("data: ")), third.removeprefix("id: "))
        )
        assert one.decode() == f"event: {found[-1][0]}\n{second}\nid: {found[-1][2]}"
    assert frames.endswith(b"\n\n")
    return found


class FakeReader:
    """A reader whose socket is full or not, as the test says."""

    def __init__(self, *, full: bool = False) -> None:
        self.position = 0
        self.full = full
        self.got: list[bytes] = []
        self.woken = 0

    def push(self, frames: bytes) -> bool:
        if self.full:
            return False
        self.got.append(frames)
        return True

    def wake(self) -> None:
        self.woken += 1


def behind(stream: Stream) -> FakeReader:
    """A reader that is attached and has read nothing yet."""
    reader = FakeReader()
    stream.attach(reader)
    return reader


def at_tail(stream: Stream) -> FakeReader:
    """A reader that has read all there is."""
    reader = behind(stream)
    reader.position = stream.log.tail
    stream.advance(reader.position)
    stream.catch_up(reader)
    return reader


class Flow:
    """`Stream.flow` as the relay awaits it, without the event loop: each step is the test's."""

    def __init__(self, stream: Stream) -> None:
        self._coroutine: Coroutine[Any, Any, None] = stream.flow()
        self._future: asyncio.Future[None] | None = None
        self.done = False
        self.run()

    @property
    def may_run(self) -> bool:
        """Whether the event loop would run it."""
        return not self.done and (self._future is None or self._future.done())

    def run(self) -> bool:
        """Runs until it waits or is done; returns whether it is."""
        while self.may_run:
            try:
                self._future = self._coroutine.send(None)
            except StopIteration:
                self.done = True
        return self.done

    def close(self) -> None:
        self._coroutine.close()


# --- states -------------------------------------------------------------------------------------------------------


async def test_stream_waits_then_streams_then_ends() -> None:
    stream = make_stream()
    assert state_of(stream) is State.WAITING
    stream.begin()
    assert state_of(stream) is State.STREAMING
    stream.finish(Reason.COMPLETE)
    assert state_of(stream) is State.ENDED


async def test_stream_may_end_while_it_waits() -> None:
    stream = make_stream()
    stream.finish(Reason.TIMEOUT)
    assert state_of(stream) is State.ENDED


async def test_stream_started_again_or_after_its_end_stays_as_it_is() -> None:
    stream = make_stream()
    stream.begin()
    stream.begin()
    assert state_of(stream) is State.STREAMING
    stream.finish(Reason.COMPLETE)
    stream.begin()
    assert state_of(stream) is State.ENDED


async def test_commit_does_not_start_a_stream() -> None:
    """A slow upstream's readers are answered, but what it will do is open."""
    stream = make_stream()
    stream.commit()
    assert state_of(stream) is State.WAITING


@pytest.mark.parametrize(("before", "after"), list(product(State, State)))
async def test_state_changes_only_as_the_table_allows(before: State, after: State) -> None:
    allowed = {
        (State.WAITING, State.STREAMING),
        (State.WAITING, State.ENDED),
        (State.STREAMING, State.ENDED),
    }
    assert (after in TRANSITIONS[before]) is ((before, after) in allowed)
    stream = make_stream()
    stream.state = before
    if (before, after) in allowed:
        stream._enter(after)
        assert state_of(stream) is after
    else:
        with pytest.raises(AssertionError):
            stream._enter(after)
        assert state_of(stream) is before


# --- the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [0, 1, 3])
@pytest.mark.parametrize("reason", Reason)
async def test_end_is_the_last_event_and_says_how(reason: Reason, published: int) -> None:
    stream = make_stream()
    before = publish(stream, *[5] * published) if published else b""
    stream.usage.update(input_tokens=25, output_tokens=80)
    assert stream.finish(reason)
    assert (stream.reason, stream.state) == (reason, State.ENDED)
    found = events(logged(stream, len(before)))
    seq = published
    hole = HOLE if reason is Reason.PRODUCER_LOST else 0
    if reason not in {Reason.COMPLETE, Reason.STOPPED}:
        seq += 1
        event_type, data, event_id = found.pop(0)
        assert (event_type, event_id) == ("error", f"{ID}.{seq + hole}")
        assert data.keys() == {"type", "error"}
        assert data["type"] == "error"
        assert data["error"].keys() == {"type", "message"}
        assert all(isinstance(text, str) and text for text in data["error"].values())
        assert stream.error is not None
        assert stream.error.status == {Reason.TIMEOUT: 504, Reason.SHUTDOWN: 503}.get(reason, 502)
    else:
        assert stream.error is None
    usage = {"input_tokens": 25, "output_tokens": 80}
    end = {"type": "end", "reason": reason.value, "events": seq, "usage": usage}
    assert found == [("end", end, f"{ID}.{seq + 1 + hole}")]
    assert stream.log.last_seq == seq + 1 + hole
    assert stream.events == seq + 1


async def test_end_that_was_written_elsewhere_ends_the_stream_with_what_it_says() -> None:
    stream = make_stream()
    publish(stream, 5, 5)
    frames, last_seq = ending(ID, 2, Reason.TIMEOUT, failure(Reason.TIMEOUT), {"input_tokens": 3, "output_tokens": 4})
    stream.conclude(frames, last_seq, 1000.0)
    assert (stream.reason, stream.state, stream.ended_at) == (Reason.TIMEOUT, State.ENDED, 1000.0)
    assert stream.usage == {"input_tokens": 3, "output_tokens": 4}
    assert logged(stream).endswith(frames)
    stream.conclude(frames, last_seq)
    assert not stream.finish(Reason.STOPPED)
    assert logged(stream).count(b"event: end\n") == 1


@pytest.mark.parametrize("cursor", [2, 3, 4, 100])
async def test_reader_ahead_of_a_lost_producer_gets_its_end(cursor: int) -> None:
    """It was told what the log never got: no number that it can have seen is one of the end's."""
    stream = make_stream()
    before = publish(stream, 5, 5)
    stream.finish(Reason.PRODUCER_LOST)
    assert stream.log.position_after(cursor) == len(before)
    assert stream.log.position_after(1) == len(before) // 2


async def test_error_that_is_given_is_what_readers_are_told() -> None:
    stream = make_stream()
    error = UpstreamError("overloaded_error", "Overloaded", 503)
    stream.finish(Reason.ERROR, error)
    assert stream.error is error
    assert events(logged(stream))[0][1] == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "Overloaded"},
    }


@pytest.mark.parametrize(
    "text",
    [
        "\n\nevent: end\ndata: {}\n\n",
        "\r\rid: 9\r",
        "\u2028\u2029\u0085",
        "\ud800",
        "\0",
        '"}}',
        f"\nid: {ID}.1\n\n",
        "\ufeff",
    ],
)
async def test_text_of_an_error_forges_no_line(text: str) -> None:
    stream = make_stream()
    stream.finish(Reason.ERROR, UpstreamError(text, text, 502))
    assert logged(stream).isascii()
    (event_type, data, _), (end_type, _, _) = events(logged(stream))
    assert (event_type, end_type) == ("error", "end")
    assert data["error"] == {"type": text, "message": text}
    assert len(Parser(1 << 20).feed(logged(stream))) == 2
    assert stream.log.position_after(1) < stream.log.position_after(2) == stream.log.tail


@pytest.mark.parametrize(("first", "second"), list(product(Reason, [Reason.COMPLETE, Reason.ERROR])))
async def test_first_finish_wins(first: Reason, second: Reason) -> None:
    ended: list[Stream] = []
    stream = make_stream(on_end=ended.append)
    reader = at_tail(stream)
    publish(stream, 5)
    assert stream.finish(first) is True
    before = (logged(stream), stream.error, stream.ended, list(reader.got), reader.woken)
    assert stream.finish(second, StreamError("api_error", "late")) is False
    assert (logged(stream), stream.error, stream.ended, reader.got, reader.woken) == before
    assert stream.reason is first
    assert ended == [stream]


async def test_stream_is_ended_in_every_respect_when_on_end_is_called() -> None:
    seen: list[tuple[Any, ...]] = []

    def on_end(stream: Stream) -> None:
        seen.append((stream.state, stream.reason, stream.ended is not None, events(logged(stream))[-1][0]))

    make_stream(on_end=on_end).finish(Reason.STOPPED)
    assert seen == [(State.ENDED, Reason.STOPPED, True, "end")]


async def test_log_is_sealed_behind_its_last_frame() -> None:
    class Sealable(MemoryLog):
        sealed_at = -1

        def seal(self) -> None:
            assert self.sealed_at == -1
            self.sealed_at = self.tail
            super().seal()

    stream = make_stream()
    stream.log = log = Sealable(ReplayMemory(1 << 30))
    publish(stream, 5)
    assert log.sealed_at == -1
    stream.finish(Reason.TRUNCATED)
    stream.finish(Reason.COMPLETE)
    assert log.sealed_at == log.tail > 0


async def test_reader_at_the_tail_gets_the_end_in_one_write_and_is_woken() -> None:
    stream = make_stream()
    reader = at_tail(stream)
    stream.finish(Reason.TRUNCATED)
    assert reader.got == [logged(stream)]
    assert reader.woken == 1
    assert reader.position == stream.log.tail


async def test_reader_with_a_full_socket_finds_the_end_in_the_log() -> None:
    stream = make_stream()
    before = publish(stream, 5)
    reader, other = at_tail(stream), at_tail(stream)
    reader.full = True
    stream.finish(Reason.COMPLETE)
    assert reader.got == []
    assert reader.woken >= 1
    assert reader.position == len(before)
    assert events(logged(stream, reader.position))[-1][0] == "end"
    assert other.got == [logged(stream, len(before))]


async def test_reader_behind_is_left_to_itself_at_the_end() -> None:
    stream = make_stream()
    reader = behind(stream)
    publish(stream, 5)
    stream.finish(Reason.COMPLETE)
    assert (reader.got, reader.woken, reader.position) == ([], 0, 0)


# --- the answer's status ------------------------------------------------------------------------------------------


async def test_failure_before_the_commit_is_a_refusal() -> None:
    stream = make_stream()
    assert stream.refusal is None
    error = UpstreamError("rate_limit_error", "slow down", 429)
    stream.finish(Reason.ERROR, error)
    assert stream.refusal is error


async def test_failure_after_the_commit_is_none() -> None:
    for commit in (Stream.commit, Stream.begin):
        stream = make_stream()
        commit(stream)
        stream.finish(Reason.ERROR)
        assert stream.refusal is None
        assert stream.error is not None


@pytest.mark.parametrize("reason", [Reason.COMPLETE, Reason.STOPPED])
async def test_good_end_before_the_commit_is_no_refusal(reason: Reason) -> None:
    stream = make_stream()
    stream.finish(reason)
    assert stream.refusal is None


async def test_commit_after_the_end_takes_no_refusal_back() -> None:
    """A reader's deadline may pass in the very step in which the stream fails; its log is gone by then."""
    stream = make_stream()
    stream.finish(Reason.ERROR)
    stream.commit()
    assert stream.refusal is stream.error is not None


@pytest.mark.parametrize(
    "decide",
    [Stream.commit, Stream.begin, lambda stream: stream.finish(Reason.ERROR)],
    ids=["commit", "begin", "finish"],
)
async def test_decided_waits_until_it_is_decided(decide: Callable[[Stream], object]) -> None:
    stream = make_stream()
    waiting = [asyncio.create_task(stream.decided()) for _ in range(3)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    decide(stream)
    async with asyncio.timeout(60):
        await asyncio.gather(*waiting)
        await stream.decided()


async def test_decided_survives_that_one_of_its_waiters_leaves() -> None:
    stream = make_stream()
    leaving, staying = (asyncio.create_task(stream.decided()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert not staying.done()
    stream.begin()
    async with asyncio.timeout(60):
        await staying


async def test_refusal_is_told_to_each_who_asks_by_an_error_of_its_own() -> None:
    """One for all would keep the frames that it came through, and with them each request, for as long as any reads."""
    stream = make_stream()
    stream.finish(Reason.ERROR)
    told = []
    for _ in range(2):
        with pytest.raises(StreamError) as refused:
            await stream.answerable(0)
        told.append(refused.value)
    assert stream.error is not None
    assert [error.body() for error in told] == [stream.error.body()] * 2
    assert stream.error.__traceback__ is None


# --- readers ------------------------------------------------------------------------------------------------------


async def test_reader_at_the_tail_is_written_each_publish_once() -> None:
    stream = make_stream()
    first = publish(stream, 5)
    reader, other = at_tail(stream), at_tail(stream)
    published = [publish(stream, 1), publish(stream, 2, 3, 4)]
    assert reader.got == other.got == published
    assert logged(stream) == first + b"".join(published)


async def test_reader_that_is_behind_is_not_written() -> None:
    stream = make_stream()
    reader = behind(stream)
    publish(stream, 5)
    assert (reader.got, reader.position, reader.woken) == ([], 0, 0)


async def test_reader_whose_socket_is_full_goes_on_from_there_by_itself() -> None:
    stream = make_stream()
    first, second, third = at_tail(stream), at_tail(stream), at_tail(stream)
    before = publish(stream, 5)
    second.full = True
    missed = publish(stream, 6, 7)
    assert (second.got, second.position, second.woken) == ([before], len(before), 1)
    second.full = False
    after = publish(stream, 8)
    assert (second.got, second.position, second.woken) == ([before], len(before), 1)
    assert logged(stream, second.position) == missed + after
    assert first.got == third.got == [before, missed, after]
    assert first.woken == third.woken == 0


async def test_readers_that_all_fall_behind_in_one_publish_are_all_told() -> None:
    stream = make_stream()
    readers = [at_tail(stream) for _ in range(4)]
    before = publish(stream, 5)
    for reader in readers:
        reader.full = True
    publish(stream, 5)
    assert [(reader.position, reader.woken) for reader in readers] == [(len(before), 1)] * 4


async def test_reader_that_caught_up_again_is_written_again() -> None:
    stream = make_stream()
    reader = at_tail(stream)
    reader.full = True
    publish(stream, 5)
    reader.full = False
    stream.catch_up(reader)
    published = publish(stream, 6)
    assert reader.got == [published]


async def test_reader_that_left_is_not_written() -> None:
    stream = make_stream()
    reader, other = at_tail(stream), at_tail(stream)
    stream.detach(reader)
    published = publish(stream, 5)
    stream.finish(Reason.COMPLETE)
    assert reader.got == []
    assert other.got[0] == published


async def test_last_reader_that_leaves_is_reported_once() -> None:
    left: list[Stream] = []
    stream = make_stream(on_left=left.append)
    reader, other = behind(stream), at_tail(stream)
    assert stream.readers == 2
    stream.detach(reader)
    stream.detach(reader)
    assert (stream.readers, stream.leave.unread_since is None, left) == (1, True, [])
    stream.detach(other)
    stream.detach(other)
    assert (stream.readers, stream.leave.unread_since is None, left) == (0, False, [stream])
    behind(stream)
    assert (stream.readers, stream.leave.unread_since is None, left) == (1, True, [stream])


async def test_last_reader_that_leaves_may_end_the_stream() -> None:
    def on_left(stream: Stream) -> None:
        stream.finish(Reason.ABANDONED)

    stream = make_stream(on_left=on_left)
    reader = at_tail(stream)
    stream.detach(reader)
    assert stream.reason is Reason.ABANDONED
    assert reader.got == []


def time_left(stream: Stream) -> float:
    """How long the stream goes on from now on without readers."""
    assert stream.leave.ends_at is not None
    return stream.leave.ends_at - asyncio.get_running_loop().time()


async def test_stream_goes_on_until_everybody_has_come_who_was_told_of_it() -> None:
    stream = make_stream(leave_s=0)
    now = asyncio.get_running_loop().time()
    stream.leave.expect_reader(now + 100)
    stream.leave.expect_reader(now + 50)
    for _ in range(2):
        reader = FakeReader()
        stream.attach(reader)  # it knew of the stream by itself
        stream.detach(reader)
        assert time_left(stream) > 90
    for expects in (True, False):
        reader = FakeReader()
        stream.attach(reader, expected=True)
        stream.detach(reader)
        assert (time_left(stream) > 90) is expects


def finish(stream: Stream, _readers: list[FakeReader]) -> None:
    stream.finish(Reason.COMPLETE)


def block_all(stream: Stream, readers: list[FakeReader]) -> None:
    for reader in readers:
        reader.full = True
    publish(stream, 5)


def tell_all(stream: Stream, readers: list[FakeReader]) -> None:
    for reader in readers:
        stream.fall_behind(reader)


def detach_all(stream: Stream, readers: list[FakeReader]) -> None:
    for reader in readers:
        stream.detach(reader)


@pytest.mark.parametrize("leave", [finish, block_all, tell_all, detach_all])
async def test_time_in_which_readers_leave_the_tail_grows_with_their_number_only(
    leave: Callable[[Stream, list[FakeReader]], None],
) -> None:
    """40 ms; to look all of them through for each takes minutes."""
    stream = make_stream()
    readers = [at_tail(stream) for _ in range(30_000)]
    begun = time.perf_counter()
    leave(stream, readers)
    assert time.perf_counter() - begun < 5
    assert {reader.woken for reader in readers} == {1}


# --- the gate -----------------------------------------------------------------------------------------------------


async def test_upstream_is_read_ahead_of_a_reader_that_is_behind_up_to_the_mark() -> None:
    stream = make_stream()
    behind(stream)
    publish_bytes(stream, READ_AHEAD - 1)
    assert not held_back(stream)
    publish_bytes(stream, 100)
    assert held_back(stream)


async def test_upstream_is_held_back_at_the_mark_exactly() -> None:
    stream = make_stream()
    behind(stream)
    publish_bytes(stream, READ_AHEAD)
    assert held_back(stream)


async def test_upstream_is_never_held_back_while_a_reader_is_at_the_tail() -> None:
    stream = make_stream()
    behind(stream)
    at_tail(stream)
    for _ in range(8):
        publish_bytes(stream, READ_AHEAD)
        assert not held_back(stream)


async def test_upstream_runs_on_while_nobody_is_attached_up_to_the_streams_bound() -> None:
    stream = make_stream()
    publish_bytes(stream, STREAM_BYTES - 100)
    assert not held_back(stream)
    publish_bytes(stream, 100)
    assert held_back(stream)
    assert stream.reason is None


async def test_upstream_runs_on_after_the_last_reader_left() -> None:
    stream = make_stream()
    reader = behind(stream)
    publish_bytes(stream, READ_AHEAD)
    assert held_back(stream)
    stream.detach(reader)
    assert not held_back(stream)


async def test_upstream_stays_held_back_after_the_last_reader_left_stalled() -> None:
    stream = make_stream()
    reader = behind(stream)
    publish_bytes(stream, READ_AHEAD)
    flow = Flow(stream)
    stream.detach(reader, stalled=True)
    assert held_back(stream)
    assert not flow.run()
    # It comes back, reads nothing, and leaves as a reader with an empty socket does.
    reader = behind(stream)
    assert held_back(stream)
    assert not flow.run()
    stream.detach(reader)
    assert not held_back(stream)
    assert flow.run()


async def test_upstream_stays_held_back_after_readers_elsewhere_left_stalled() -> None:
    """They were the brake as much as one here is."""
    stream = make_stream()
    elsewhere = StandIn()
    stream.attach(elsewhere)
    publish_bytes(stream, READ_AHEAD)
    flow = Flow(stream)
    stream.detach(elsewhere, stalled=True)
    assert held_back(stream)
    assert not flow.run()
    stream.attach(elsewhere)
    stream.detach(elsewhere)
    assert not held_back(stream)
    assert flow.run()


async def test_upstream_after_a_stall_is_read_ahead_up_to_the_mark_only() -> None:
    """What a stalled reader had taken at the tail counts; from there on it is the read-ahead that is left."""
    stream = make_stream()
    reader = at_tail(stream)
    publish_bytes(stream, 5 * READ_AHEAD)
    stream.detach(reader, stalled=True)
    publish_bytes(stream, READ_AHEAD - 1)
    assert not held_back(stream)
    publish_bytes(stream, 100)
    assert held_back(stream)


async def test_upstream_stays_held_back_by_a_stall_whoever_asks_for_the_status() -> None:
    """Asking again for a stream by its key, without reading it, takes no byte that was left untaken."""
    stream = make_stream()
    reader = behind(stream)
    publish_bytes(stream, READ_AHEAD)
    flow = Flow(stream)
    with stream.asked():
        stream.detach(reader, stalled=True)
    assert held_back(stream)
    with stream.asked():
        pass
    assert held_back(stream)
    assert not flow.run()
    stream.detach(behind(stream))
    assert flow.run()


async def test_stream_that_is_to_go_on_without_readers_does_so_after_a_stall_too() -> None:
    stream = make_stream(leave_s=math.inf)
    reader = behind(stream)
    publish_bytes(stream, READ_AHEAD)
    flow = Flow(stream)
    assert not flow.run()
    stream.detach(reader, stalled=True)
    assert flow.run()
    publish_bytes(stream, 5 * READ_AHEAD)
    assert not held_back(stream)
    # Nor is it for ever: its own bound ends it.
    publish_bytes(stream, STREAM_BYTES)
    assert stream.reason is Reason.LIMIT


async def test_stalled_reader_that_was_not_the_last_does_not_bind_the_others() -> None:
    stream = make_stream()
    stalled, other = behind(stream), behind(stream)
    publish_bytes(stream, READ_AHEAD)
    stream.detach(stalled, stalled=True)
    assert held_back(stream)
    stream.detach(other)
    assert not held_back(stream)


async def test_reader_that_attaches_narrows_the_gate() -> None:
    stream = make_stream()
    publish_bytes(stream, 2 * READ_AHEAD)
    assert not held_back(stream)
    behind(stream)
    assert held_back(stream)


async def test_furthest_reader_counts_even_after_it_has_left() -> None:
    stream = make_stream()
    behind(stream)
    first = at_tail(stream)
    publish_bytes(stream, 3 * READ_AHEAD)
    stream.detach(first)
    assert not held_back(stream)
    publish_bytes(stream, READ_AHEAD - 1)
    assert not held_back(stream)
    stream.advance(10)  # the other reader, far behind
    assert not held_back(stream)
    publish_bytes(stream, 100)
    assert held_back(stream)


async def test_reader_that_falls_behind_counts_up_to_what_it_got() -> None:
    stream = make_stream()
    reader = at_tail(stream)
    publish_bytes(stream, 3 * READ_AHEAD)
    reader.full = True
    publish_bytes(stream, READ_AHEAD - 1)
    assert not held_back(stream)
    publish_bytes(stream, 100)
    assert held_back(stream)


async def test_furthest_position_is_the_tail_while_a_reader_stands_there() -> None:
    """Other instances are told of it: one that counted where it last fell behind would be waited for."""
    stream = make_stream()
    behind(stream)
    reader = at_tail(stream)
    publish_bytes(stream, 300)
    assert stream.furthest == 300
    reader.full = True
    publish_bytes(stream, 100)
    assert stream.furthest == 300
    stream.advance(350)
    assert stream.furthest == 350


async def test_flow_of_an_open_gate_does_not_wait() -> None:
    stream = make_stream()
    assert Flow(stream).done


async def test_flow_opens_once_a_reader_has_advanced_enough() -> None:
    stream = make_stream()
    behind(stream)
    publish_bytes(stream, READ_AHEAD + 100)
    flow = Flow(stream)
    stream.advance(100)
    assert not flow.run()
    stream.advance(101)
    assert flow.run()


async def test_flow_opens_when_a_reader_catches_up() -> None:
    stream = make_stream()
    publish_bytes(stream, 2 * READ_AHEAD)
    reader = behind(stream)
    flow = Flow(stream)
    assert not flow.run()
    stream.catch_up(reader)
    assert flow.run()


async def test_flow_opens_when_the_last_reader_leaves() -> None:
    stream = make_stream()
    readers = [behind(stream), behind(stream)]
    publish_bytes(stream, READ_AHEAD)
    flow = Flow(stream)
    stream.detach(readers[0])
    assert not flow.run()
    stream.detach(readers[1])
    assert flow.run()


@pytest.mark.parametrize("reason", [Reason.COMPLETE, Reason.ABANDONED])
async def test_flow_opens_at_the_end(reason: Reason) -> None:
    stream = make_stream()
    behind(stream)
    publish_bytes(stream, READ_AHEAD)
    flow = Flow(stream)
    stream.finish(reason)
    assert flow.run()
    assert not held_back(stream)


async def test_flow_that_was_opened_and_shut_again_waits_on() -> None:
    """The gate may close between the step that opens it and the one in which the relay wakes."""
    stream = make_stream()
    reader = behind(stream)
    publish_bytes(stream, 2 * READ_AHEAD)
    flow = Flow(stream)
    stream.detach(reader)
    assert flow.may_run
    behind(stream)
    assert not flow.run()
    stream.advance(READ_AHEAD + 1)
    assert flow.run()


async def test_flow_may_be_cancelled_and_awaited_again() -> None:
    stream = make_stream()
    behind(stream)
    publish_bytes(stream, READ_AHEAD)
    cancelled = asyncio.create_task(stream.flow())
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    waiting = asyncio.create_task(stream.flow())
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.advance(stream.log.tail)
    async with asyncio.timeout(60):
        await waiting


# --- the bound ----------------------------------------------------------------------------------------------------


async def test_stream_at_its_bound_goes_on() -> None:
    stream = make_stream()
    at_tail(stream)
    publish_bytes(stream, STREAM_BYTES)
    assert stream.reason is None


async def test_stream_one_byte_past_its_bound_ends_as_limit() -> None:
    ended: list[Stream] = []
    stream = make_stream(on_end=ended.append)
    at_tail_reader, behind_reader = at_tail(stream), behind(stream)
    published = publish_bytes(stream, STREAM_BYTES + 1)
    assert stream.reason is Reason.LIMIT
    assert ended == [stream]
    assert [event_type for event_type, _, _ in events(logged(stream, len(published)))] == ["error", "end"]
    assert at_tail_reader.got == [published, logged(stream, len(published))]
    assert behind_reader.got == []


# --- any order ----------------------------------------------------------------------------------------------------


class Place(enum.Enum):
    """Where a connection's task stands."""

    BEHIND = enum.auto()  # it reads the log, or waits for its socket
    TAIL = enum.auto()  # it waits to be woken; the relay writes
    CLOSED = enum.auto()


class Connection:
    """A reader and its task, in the steps between which the event loop may run others; what it got stays."""

    def __init__(self, stream: Stream, seq: int, read_bytes: int) -> None:
        self.stream = stream
        self.read_bytes = read_bytes
        self.seq = seq
        self.position = stream.log.position_after(seq)
        self.place = Place.BEHIND
        self.room: int | None = None  # writes until the socket is full; None: it never is
        self.broken = False  # the client is gone, the task does not know yet
        self.got = bytearray()
        self.taken = 0  # the furthest position that it has read up to
        stream.attach(self)

    def push(self, frames: bytes) -> bool:
        assert self.place is Place.TAIL, "written by the relay and by its own task at once"
        if self.full:
            return False
        self._write(frames)
        return True

    def wake(self) -> None:
        if self.place is Place.TAIL:
            self.place = Place.BEHIND

    @property
    def full(self) -> bool:
        return self.room == 0

    def step(self) -> None:
        if self.place is not Place.BEHIND or self.full:
            return
        if self.broken:
            self.close()
            return
        frames = self.stream.log.read(self.position, self.read_bytes)
        self.position += len(frames)
        self.taken = self.position
        self.stream.advance(self.position)
        if frames:
            self._write(frames)
        elif self.stream.state is State.ENDED:
            self.close()
        else:
            self.place = Place.TAIL
            self.stream.catch_up(self)

    def close(self, *, stalled: bool = False) -> None:
        # As a handler does: whatever the stream does to it while it leaves finds it closed.
        self.place = Place.CLOSED
        self.stream.detach(self, stalled=stalled)

    def _write(self, frames: bytes) -> None:
        if self.room is not None:
            self.room -= 1
        if not self.broken:
            self.got += frames


class Client:
    """Someone who reads the stream from one cursor on, over any number of connections."""

    def __init__(self, connection: Connection) -> None:
        self.begin = connection.seq
        self.frames: list[bytes] = []  # of earlier connections
        self.connection = connection

    @property
    def connected(self) -> bool:
        return self.connection.place is not Place.CLOSED


class Streams(RuleBasedStateMachine):
    """A stream against a plain list of frames: every client gets the list from its cursor on, no gap, no double."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[bytes] = []
        self.clients: list[Client] = []
        self.reached = 0  # position
        self.steps = 0
        self.expected_reason: Reason | None = None
        self.leaves = 0
        self.left_calls = 0
        self.end_calls = 0
        self.tight = False
        self.flow: Flow | None = None

    @initialize(
        read_ahead_bytes=st.sampled_from([1, 300, 4000, 64 << 10]),
        stream_bytes=st.sampled_from([1000, 20_000, 1 << 20, 1 << 20, 1 << 20]),
        abandon=st.sampled_from([False, False, False, True]),
        lives=st.integers(0, 60),
        leave_s=st.sampled_from([10.0, 10.0, math.inf]),
        max_clients=st.integers(1, 4),
        read_bytes=st.sampled_from([1, 600, 8192, SEGMENT_BYTES]),
    )
    def begin(
        self,
        *,
        read_ahead_bytes: int,
        stream_bytes: int,
        abandon: bool,
        leave_s: float,
        lives: int,
        max_clients: int,
        read_bytes: int,
    ) -> None:
        self.read_bytes = read_bytes  # as much as a connection takes at a time
        self.lives = lives  # steps before it may end
        self.max_clients = max_clients
        self.read_ahead_bytes = read_ahead_bytes
        self.stream_bytes = stream_bytes
        self.abandon = abandon
        self.goes_on = leave_s == math.inf
        self.stream = make_stream(
            read_ahead_bytes=read_ahead_bytes,
            stream_bytes=stream_bytes,
            leave_s=leave_s,
            on_left=self.on_left,
            on_end=self.on_end,
        )

    def on_left(self, stream: Stream) -> None:
        self.left_calls += 1
        if self.abandon and stream.finish(Reason.ABANDONED):
            self.expected_reason = Reason.ABANDONED

    def on_end(self, stream: Stream) -> None:
        self.end_calls += 1

    # --- what may happen ---

    # Few rules and few clients: what has to meet for a hand-over to go wrong, meets often.

    @property
    def may_publish(self) -> bool:
        return self.expected_reason is None and (self.flow is None or self.flow.may_run)

    @precondition(lambda self: self.may_publish)
    @rule(sizes=st.lists(st.sampled_from([0, 1, 10, 300, 5000, SEGMENT_BYTES]), min_size=1, max_size=4))
    def publish(self, sizes: list[int]) -> None:
        """The relay, once the gate lets it, reads a chunk and publishes what is in it."""
        if self.flow is not None:
            if not self.flow.run():
                return  # opened, and shut again before the relay was woken
            self.flow = None
        begin = len(self.frames) + 1
        added = [numbered(seq, size) for seq, size in enumerate(sizes, begin)]
        self.frames += added
        if len(b"".join(self.frames)) > self.stream_bytes:
            self.expected_reason = Reason.LIMIT
        self.stream.publish(b"".join(added), len(self.frames))
        self.stream.begin()
        if self.stream.holds_back:
            self.flow = Flow(self.stream)

    @precondition(lambda self: len(self.clients) < self.max_clients)
    @rule(cursor=st.integers(0, 40), from_the_end=st.booleans(), steps=st.integers(0, 4))
    def arrive(self, cursor: int, from_the_end: bool, steps: int) -> None:
        cursor = min(cursor, len(self.frames))
        client = Client(self.connect(len(self.frames) - cursor if from_the_end else cursor))
        self.clients.append(client)
        self.run(client, steps)

    @precondition(lambda self: len(self.attached) < len(self.clients))
    @rule(which=st.integers(0, 3), steps=st.integers(0, 4))
    def come_back(self, which: int, steps: int) -> None:
        client = pick([client for client in self.clients if not client.connected], which)
        client.connection = self.connect(client.begin + len(client.frames))
        self.run(client, steps)

    @precondition(lambda self: self.attached)
    @rule(which=st.integers(0, 3), steps=st.integers(1, 4))
    def run_reader(self, which: int, steps: int) -> None:
        self.run(pick(self.attached, which), steps)

    @precondition(lambda self: self.attached)
    @rule(which=st.integers(0, 3), writes=st.sampled_from([None, 0, 0, 1, 2]))
    def have_room_for(self, which: int, writes: int | None) -> None:
        pick(self.attached, which).connection.room = writes

    @precondition(lambda self: self.attached)
    @rule(which=st.integers(0, 3), lost=st.integers(0, 3), how=st.sampled_from(["leave", "evicted", "unnoticed"]))
    def go(self, which: int, lost: int, how: str) -> None:
        """The client is gone, and with it what was written last but did not arrive."""
        client = pick(self.attached, which)
        if how == "unnoticed":
            client.connection.broken = True
            return
        stalled = how == "evicted"
        client.connection.close(stalled=stalled)
        self.note_leave(client, lost, stalled=stalled)

    @rule()
    def ask(self) -> None:
        """Somebody asks for the answer's status and does not read."""
        with self.stream.asked():
            pass
        self.note_none_left()

    @precondition(lambda self: self.steps >= self.lives)
    @rule(reason=st.sampled_from([reason for reason in Reason if reason is not Reason.PRODUCER_LOST]))
    def finish(self, reason: Reason) -> None:
        assert self.stream.finish(reason) is (self.expected_reason is None)
        self.expected_reason = self.expected_reason or reason

    def connect(self, seq: int) -> Connection:
        return Connection(self.stream, seq, self.read_bytes)

    def run(self, client: Client, steps: int) -> None:
        for _ in range(steps):
            connected = client.connected
            client.connection.step()
            if connected and not client.connected:
                self.note_leave(client, lost=0, stalled=False)

    def note_leave(self, client: Client, lost: int, *, stalled: bool) -> None:
        got = whole_frames(client.connection.got)
        client.frames += got[: max(0, len(got) - lost)]
        self.tight = stalled
        self.note_none_left()

    def note_none_left(self) -> None:
        if not self.attached:
            self.leaves += 1

    # --- what holds at any time ---

    @property
    def attached(self) -> list[Client]:
        return [client for client in self.clients if client.connected]

    @invariant()
    def what_must_hold_holds(self) -> None:
        self.steps += 1
        self.the_end_came_once_and_as_expected()
        self.the_log_is_the_list()
        self.every_reader_has_the_list_from_its_cursor_on()
        self.readers_are_counted()
        self.the_gate_is_where_it_should_be()

    def the_end_came_once_and_as_expected(self) -> None:
        assert self.stream.reason is self.expected_reason
        assert self.end_calls == (self.expected_reason is not None)
        if self.expected_reason is not None and not self.frames_are_final:
            ending = whole_frames(logged(self.stream, len(b"".join(self.frames))))
            expected = ["end"] if self.expected_reason in {Reason.COMPLETE, Reason.STOPPED} else ["error", "end"]
            found = events(b"".join(ending))
            first = len(self.frames) + 1
            assert [(event_type, event_id) for event_type, _, event_id in found] == [
                (event_type, f"{ID}.{seq}") for seq, event_type in enumerate(expected, first)
            ]
            assert found[-1][1]["reason"] == self.expected_reason
            assert found[-1][1]["events"] == first + len(expected) - 2
            self.frames += ending

    @property
    def frames_are_final(self) -> bool:
        return bool(self.frames) and self.frames[-1].startswith(b"event: end\n")

    def the_log_is_the_list(self) -> None:
        assert self.stream.log.last_seq == len(self.frames)
        assert logged(self.stream) == b"".join(self.frames)

    def every_reader_has_the_list_from_its_cursor_on(self) -> None:
        for client in self.clients:
            connection = client.connection
            expected = b"".join(self.frames[connection.seq :])
            got = bytes(connection.got)
            assert expected.startswith(got)
            assert b"".join(whole_frames(got)) == got
            if connection.place is Place.TAIL and not connection.broken:
                assert got == expected, "at the tail, but not up to date"
            if self.expected_reason is not None:
                assert connection.place is not Place.TAIL, "sleeps over the end"

    def readers_are_counted(self) -> None:
        assert self.stream.readers == len(self.attached)
        assert self.left_calls == self.leaves
        assert (self.stream.leave.unread_since is None) == (bool(self.attached) or not self.leaves)

    def the_gate_is_where_it_should_be(self) -> None:
        self.reached = max([self.reached, *(client.connection.taken for client in self.clients)])
        if any(client.connection.place is Place.TAIL for client in self.attached):
            self.reached = self.stream.log.tail
            holds_back = False
        else:
            tight = self.attached or (self.tight and not self.goes_on)
            limit = self.read_ahead_bytes if tight else self.stream_bytes
            holds_back = self.stream.log.tail - self.reached >= limit and self.expected_reason is None
        assert self.stream.holds_back is holds_back
        if self.flow is not None and not holds_back:
            assert self.flow.may_run, "the relay sleeps at an open gate"

    def teardown(self) -> None:
        if not hasattr(self, "stream"):
            return
        if self.flow is not None:
            self.flow.close()
        self.stream.finish(Reason.STOPPED)
        whole = whole_frames(logged(self.stream))
        assert sum(one.startswith(b"event: end\n") for one in whole) == 1
        for client in self.clients:
            if client.connection.broken or not client.connected:
                if client.connected:
                    client.connection.close()
                    client.frames += whole_frames(client.connection.got)
                client.connection = self.connect(client.begin + len(client.frames))
            client.connection.room = None
            for _ in range(len(whole) + 1):
                client.connection.step()
            assert not client.connected, "does not come to the end"
            assert client.frames + whole_frames(client.connection.got) == whole[client.begin :]
        assert self.stream.readers == 0
        positions = accumulate((len(one) for one in whole), initial=0)
        assert [self.stream.log.position_after(seq) for seq in range(len(whole) + 1)] == list(positions)


def pick(clients: list[Client], which: int) -> Client:
    return clients[which % len(clients)]


def whole_frames(stream: bytes | bytearray) -> list[bytes]:
    """The whole frames of `stream`, which begins with one; what is left over is dropped."""
    return [bytes(part) + b"\n\n" for part in stream.split(b"\n\n")[:-1]]


@pytest.mark.timeout(1800 if SOAK else 300)
async def test_any_order_of_events_gives_every_reader_every_frame_once() -> None:
    """Publishing, arriving, reading, stalling, leaving, coming back, evicting and ending, interleaved at will."""
    run_machine(
        Streams,
        settings=settings(max_examples=2_000 if SOAK else 300, stateful_step_count=60),
    )
