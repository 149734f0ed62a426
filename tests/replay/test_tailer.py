"""The tailer: what it makes of what comes from Redis, whom it says is read here, and whom it takes for lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest
from conftest import eventually
from fake_client import Clock, FakeRedis
from redis import exceptions
from structlog.testing import capture_logs

from aisse.errors import StreamError
from aisse.replay import tailer as tailer_module
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.replay.mirror import interval_s
from aisse.replay.scripts import entries_key, state_key
from aisse.replay.tailer import Found, Tailer
from aisse.sse import frame
from aisse.streams.endings import Reason, ending, failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


LEASE_S = 2.0
READ_AHEAD_BYTES = 4000
ANOTHER_INTERVAL = interval_s(LEASE_S)


class Follower:
    """A stream that is generated elsewhere."""

    def __init__(self, number: int = 0) -> None:
        self.id = f"{number:022}"
        self.log = MemoryLog(ReplayMemory(1 << 40))
        self.reason: object = None
        self.furthest = 0
        self.readers = 1
        self.moved_until = 0.0
        self.last_reader_stalled = False
        self.ends: list[tuple[bytes, int]] = []

    def publish(self, frames: bytes, last_seq: int) -> None:
        self.log.append(frames, last_seq)

    def conclude(self, frames: bytes, last_seq: int) -> None:
        self.ends.append((frames, last_seq))
        self.log.append(frames, last_seq)
        self.reason = "ended"

    def burial(self) -> tuple[bytes, int]:
        reason = Reason.PRODUCER_LOST
        return ending(self.id, self.log.last_seq, reason, failure(reason), {"input_tokens": 0, "output_tokens": 0})

    def renunciation(self) -> tuple[bytes, int]:
        error = StreamError("api_error", "withdrawn")
        return ending(self.id, self.log.last_seq, Reason.ERROR, error, {"input_tokens": 0, "output_tokens": 0})

    def frames(self, first: int, last: int) -> bytes:
        return b"".join(frame("a", f"number {seq}", f"{self.id}.{seq}") for seq in range(first, last + 1))

    def entry(self, first: int, last: int) -> tuple[bytes, dict[bytes, bytes]]:
        """As Redis has it: the frames, and the number of the one before."""
        return b"%d-0" % last, {b"p": b"%d" % (first - 1), b"f": self.frames(first, last)}

    def end_entry(self, seq: int) -> tuple[bytes, dict[bytes, bytes]]:
        frames, last = ending(self.id, seq, Reason.COMPLETE, None, {"input_tokens": 0, "output_tokens": 0})
        return b"%d-0" % last, {b"p": b"%d" % seq, b"f": frames}

    @property
    def key(self) -> bytes:
        return entries_key(self.id).encode()

    @property
    def whole(self) -> bytes:
        return self.log.read(0, 1 << 30)


@dataclass
class Said:
    """What one call told Redis of the streams in it: whether each is read here, and how far; and of those that left."""

    about: dict[str, tuple[bool, int]]
    left: dict[str, tuple[int, bool]]


@dataclass
class Bed:
    """A tailer before a Redis in which every lease holds, unless a test says otherwise."""

    redis: FakeRedis
    waits: FakeRedis
    clock: Clock
    tailer: Tailer
    left_ms: dict[str, int | None] = field(default_factory=dict)
    """What is left of a stream's lease; None where Redis does not know it."""
    last_seq: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    said: list[Said] = field(default_factory=list)
    buried: list[str] = field(default_factory=list)

    async def attended(self, times: int = 1) -> None:
        """Returns after so many looks at everything, each in its time."""
        for _ in range(times):
            before = self.redis.count("ATTEND")
            self.clock.now += ANOTHER_INTERVAL
            await eventually(lambda before=before: self.redis.count("ATTEND") > before)  # type: ignore[misc]
            for _ in range(20):
                await asyncio.sleep(0)

    def about(self, follower: Follower) -> list[tuple[bool, int]]:
        return [said.about[follower.id] for said in self.said if follower.id in said.about]

    # The scripts' arguments are read here and nowhere else.

    def attend(self, keys: list[Any], args: list[Any]) -> Any:
        said: list[Any] = [1000]
        about, left = {}, {}
        for key, read, position, moved_ms, stalled in zip(keys[::2], *(args[at::4] for at in range(2, 6)), strict=True):
            stream_id = key.removesuffix(":state").rpartition(":")[2]
            about[stream_id] = (read == 1, position)
            left[stream_id] = (moved_ms, stalled == 1)
            left_ms = self.left_ms.get(stream_id, 1000)
            said += (left_ms, self.last_seq.get(stream_id, 0), int(stream_id in self.ended))
        self.said.append(Said(about, left))
        return said

    def bury(self, keys: list[Any], _args: list[Any]) -> Any:
        self.buried.append(keys[0].removesuffix(":state").rpartition(":")[2])
        return 1


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> Bed:
    redis, waits, clock = FakeRedis(), FakeRedis(), Clock(monkeypatch, "aisse.replay.tailer")
    tailer = Tailer(
        cast("Any", redis),
        cast("Any", waits),
        "me",
        tick_s=0.001,
        lease_s=LEASE_S,
        retention_s=10,
        read_ahead_bytes=READ_AHEAD_BYTES,
    )
    bed = Bed(redis, waits, clock, tailer)
    redis.answers = {"ATTEND": bed.attend, "BURY": bed.bury}
    return bed


@contextlib.asynccontextmanager
async def running(bed: Bed) -> AsyncIterator[None]:
    task = asyncio.create_task(bed.tailer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- what comes ---------------------------------------------------------------------------------------------------


async def test_stream_is_loaded_page_by_page_to_its_last_entry(bed: Bed) -> None:
    follower = Follower()
    bed.redis.entries[entries_key(follower.id)] = [follower.entry(seq, seq) for seq in range(1, 51)]
    await bed.tailer.load(follower)
    assert follower.whole == follower.frames(1, 50)
    assert bed.redis.count("xrange") == 4
    await bed.tailer.load(follower)
    assert follower.whole == follower.frames(1, 50)


async def test_what_comes_is_published_in_order_and_once(bed: Bed) -> None:
    one, other = Follower(1), Follower(2)
    async with running(bed):
        for each in (one, other):
            bed.tailer.follow(each)
        bed.waits.arrivals.put_nowait(
            [(one.key, [one.entry(1, 3)]), (other.key, [other.entry(1, 1), other.entry(2, 2)])]
        )
        # Again, as after an answer that was lost, and what is new.
        bed.waits.arrivals.put_nowait([(one.key, [one.entry(1, 3), one.entry(4, 4)])])
        await eventually(lambda: one.log.last_seq == 4)
        assert one.whole == one.frames(1, 4)
        assert other.whole == other.frames(1, 2)
        await eventually(lambda: bed.waits.count("xread") == 3)
        assert bed.waits.calls[-1].keys == [one.key, other.key]
        assert bed.waits.calls[-1].args[0] == [b"4-0", b"2-0"]


async def test_entries_cut_in_other_places_are_joined_where_this_process_stands(bed: Bed) -> None:
    """Redis was emptied, and its producer has said everything again."""
    follower = Follower()
    async with running(bed):
        bed.tailer.follow(follower)
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 3)])])
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 2), follower.entry(3, 7)])])
        await eventually(lambda: follower.log.last_seq == 7)
    assert follower.whole == follower.frames(1, 7)
    assert not follower.ends


async def test_end_is_the_last_that_comes(bed: Bed) -> None:
    follower, other = Follower(1), Follower(2)
    async with running(bed):
        bed.tailer.follow(follower)
        bed.tailer.follow(other)
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 2), follower.end_entry(2)])])
        await eventually(lambda: bool(follower.ends))
        assert follower.ends == [(follower.end_entry(2)[1][b"f"], 3)]
        await eventually(lambda: bed.waits.count("xread") == 2)
        assert bed.waits.calls[-1].keys == [other.key]
        bed.waits.arrivals.put_nowait([(follower.key, [follower.end_entry(3)])])
        await eventually(lambda: bed.waits.count("xread") == 3)
    assert len(follower.ends) == 1


async def test_end_that_somebody_else_wrote_ends_a_stream_that_is_further_here(bed: Bed) -> None:
    """Its producer is lost, and Redis had got less of it than this process."""
    follower = Follower()
    async with running(bed):
        bed.tailer.follow(follower)
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 5)])])
        await eventually(lambda: follower.log.last_seq == 5)
        error = failure(Reason.PRODUCER_LOST)
        frames, last = ending(follower.id, 3, Reason.PRODUCER_LOST, error, {"input_tokens": 0, "output_tokens": 0})
        bed.waits.arrivals.put_nowait([(follower.key, [(b"%d-0" % last, {b"p": b"3", b"f": frames})])])
        await eventually(lambda: bool(follower.ends))
    assert follower.ends == [(frames, last)]


async def test_hole_ends_the_stream_and_is_told_to_the_operator(bed: Bed) -> None:
    """What is missing will not come: to go on behind it would be a lie."""
    follower = Follower()
    with capture_logs() as logs:
        async with running(bed):
            bed.tailer.follow(follower)
            bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 2), follower.entry(4, 5)])])
            await eventually(lambda: bool(follower.ends))
    assert [line["event"] for line in logs] == ["shared log has a hole"]
    assert follower.whole.startswith(follower.frames(1, 2))
    assert b'"producer_lost"' in follower.ends[0][0]


async def test_connection_that_fails_is_replaced_and_what_was_missed_is_caught_up(bed: Bed) -> None:
    follower = Follower()
    async with running(bed):
        bed.tailer.follow(follower)
        bed.waits.arrivals.put_nowait(exceptions.ConnectionError())
        await eventually(lambda: bed.tailer.trouble == "the shared log does not answer")
        assert bed.waits.disconnected == 1
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 2)])])
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(3, 4)])])
        await eventually(lambda: follower.log.last_seq == 4)
        await eventually(lambda: bed.waits.named("xread")[-1].args[2] is not None)
        # Twice without waiting, and once more to see that nothing is left.
        assert [call.args[2] is None for call in bed.waits.named("xread")] == [False, True, True, True, False]
        bed.waits.arrivals.put_nowait([])
        await eventually(lambda: bed.tailer.trouble is None)


async def test_idle_tailer_is_not_woken_by_each_tick(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of the loops are counted; the one of the leases turns for ever, and is the clock here."""
    turned: Counter[str] = Counter()

    def heed() -> None:
        task = asyncio.current_task()
        assert task is not None
        turned[task.get_name().rpartition(" ")[2]] += 1

    monkeypatch.setattr(tailer_module, "heed_cancellation", heed)
    follower = Follower()
    async with running(bed):
        bed.tailer.follow(follower)
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 1), follower.end_entry(1)])])
        await eventually(lambda: bool(follower.ends))
        await eventually(lambda: turned["attend"] > 2)
        before = turned.copy()
        await eventually(lambda: turned["attend"] > before["attend"] + 20)
        assert turned["tail"] <= before["tail"] + 1


# --- who is read here ---------------------------------------------------------------------------------------------


async def test_readers_here_are_told_of_for_as_long_as_there_are_any(bed: Bed) -> None:
    follower = Follower()
    async with running(bed):
        bed.tailer.follow(follower)
        follower.furthest = 17
        await bed.attended()
        assert bed.about(follower)[-1] == (True, 17)
        follower.readers = 0
        await bed.attended()
        assert bed.about(follower)[-1] == (False, 17)
        follower.readers = 1
        bed.tailer.unfollow(follower)
        await bed.attended()
        assert bed.about(follower)[-1] == (False, 17)
        count = len(bed.about(follower))
        await bed.attended(2)
        assert len(bed.about(follower)) == count  # once


async def test_reader_that_has_got_on_is_told_of_at_once(bed: Bed) -> None:
    """A producer that waits for it must not wait for the next look, too. The clock stands."""
    follower, other = Follower(1), Follower(2)
    async with running(bed):
        bed.tailer.follow(follower)
        bed.tailer.follow(other)
        await bed.attended()
        follower.furthest = READ_AHEAD_BYTES // 4 - 1
        other.furthest = READ_AHEAD_BYTES // 4
        await eventually(lambda: (True, other.furthest) in bed.about(other))
        assert list(bed.said[-1].about) == [other.id]
        follower.furthest += 1
        await eventually(lambda: (True, follower.furthest) in bed.about(follower))
        count = len(bed.said)
        await asyncio.sleep(0.02)
        assert len(bed.said) == count


async def test_leaving_process_says_that_nobody_reads_here(bed: Bed) -> None:
    """Producers would hold their upstreams for its readers until its lease is over."""
    followers = [Follower(number) for number in range(3)]
    for follower in followers:
        bed.tailer.follow(follower)
    await bed.tailer.leave()
    [said] = bed.said
    assert said.about == {follower.id: (False, 0) for follower in followers}


async def test_leaving_waits_for_no_redis(bed: Bed) -> None:
    bed.redis.held.add("ATTEND")
    bed.tailer.follow(Follower())
    async with asyncio.timeout(5):
        await bed.tailer.leave()


async def test_readers_that_left_are_told_of_with_their_leaving(bed: Bed) -> None:
    """Told of later, their producer would have ended what they are to come back to, or read on without its brake."""
    follower = Follower()
    bed.tailer.follow(follower)
    async with running(bed):
        await bed.attended()
        assert bed.said[-1].left[follower.id] == (0, False)
        follower.moved_until = asyncio.get_running_loop().time() + 12
        follower.last_reader_stalled = True
        follower.readers = 0
        bed.tailer.unfollow(follower)
        await bed.attended()
        assert bed.about(follower)[-1] == (False, 0)
        moved_ms, stalled = bed.said[-1].left[follower.id]
        assert 11_000 < moved_ms <= 12_000
        assert stalled


async def test_stream_that_was_withdrawn_before_it_counted_as_read_is_none(bed: Bed) -> None:
    """Who is about to read it was not answered yet, and can ask for another one."""
    new, read = Follower(1), Follower(2)
    new.readers = 0
    bed.left_ms = {new.id: None, read.id: None}
    bed.ended = {new.id, read.id}
    for each in (new, read):
        bed.tailer.follow(each)
    assert await bed.tailer.hasten([new.id, read.id]) == [None, True]
    assert new.ends == []
    assert len(read.ends) == 1
    await bed.tailer._look_after_all(list(bed.tailer._followed.values()))
    assert new.id not in bed.said[-1].about


async def test_stream_that_is_about_to_be_read_counts_as_read_and_comes_at_once(bed: Bed) -> None:
    """The call that waits does not ask for it."""
    old, new = Follower(1), Follower(2)
    new.readers = 0
    async with running(bed):
        bed.tailer.follow(old)
        await eventually(lambda: bed.waits.count("xread") == 1)
        bed.tailer.follow(new)
        assert await bed.tailer.hasten([new.id]) == [True]
        assert bed.about(new)[-1] == (True, 0)
        assert bed.redis.count("unblock") == 1
        bed.waits.arrivals.put_nowait([])  # as a call brings that was unblocked
        await eventually(lambda: bed.waits.count("xread") == 2)
        assert bed.waits.calls[-1].keys == [old.key, new.key]


def doubtful(bed: Bed) -> bool:
    """Whether an answer that there is no such stream may be wrong at the moment."""
    return bed.tailer.doubtful


# --- what Redis knows ---------------------------------------------------------------------------------------------


async def test_found_streams_have_their_times_in_seconds(bed: Bed) -> None:
    bed.redis.answers["LOOK"] = lambda _keys, _args: [1, [b"5000", None], None, [b"6000", b"7500"]]
    bed.redis.answers["STOP_ASKED"] = lambda _keys, _args: [1, 1, None]
    assert await bed.tailer.find(["a", "b", "c"]) == [Found(5.0, None), None, Found(6.0, 7.5)]
    assert bed.redis.calls[-1].keys[1:] == [state_key(stream_id) for stream_id in "abc"]
    assert await bed.tailer.ask_to_stop(["a", "b"]) == [True, None]


@pytest.mark.parametrize("asks", ["LOOK", "STOP_ASKED"])
async def test_answers_are_doubtful_for_a_lease_after_redis_was_emptied(bed: Bed, asks: str) -> None:
    """Who asks learns of it first: it may be that what is unknown is about to be said again."""
    bed.redis.answers[asks] = lambda _keys, _args: [int(bed.redis.marked), None]
    ask = bed.tailer.find if asks == "LOOK" else bed.tailer.ask_to_stop
    bed.redis.marked = False
    await bed.tailer.mark()
    assert not doubtful(bed)  # it is the first time
    await ask(["a"])
    assert not doubtful(bed)
    bed.redis.marked = False
    await ask(["a"])
    assert doubtful(bed)
    bed.clock.now += LEASE_S - 0.1
    assert doubtful(bed)
    bed.clock.now += 0.2
    assert not doubtful(bed)


async def test_answers_are_doubtful_where_redis_is_seen_to_be_emptied_by_the_sweep(bed: Bed) -> None:
    bed.redis.marked = False
    async with running(bed):
        await bed.attended(2)
        assert not doubtful(bed)
        bed.redis.marked = False
        await bed.attended()
        assert doubtful(bed)


async def test_answers_are_doubtful_while_redis_does_not_answer(bed: Bed) -> None:
    async with running(bed):
        await bed.attended()
        bed.redis.answers["ATTEND"] = lambda _keys, _args: exceptions.ConnectionError()
        await bed.attended()
        assert doubtful(bed)
        await eventually(lambda: bed.tailer.trouble is not None)
        bed.redis.answers["ATTEND"] = bed.attend
        await bed.attended()
        await eventually(lambda: bed.tailer.trouble is None)


async def test_trouble_lasts_until_redis_has_answered(bed: Bed) -> None:
    """It is asked again for the trouble's sake: nothing else is due."""
    async with running(bed):
        await bed.attended()
        bed.redis.answers["ATTEND"] = lambda _keys, _args: exceptions.ConnectionError()
        await bed.attended()
        await eventually(lambda: bed.tailer.trouble is not None)
        before = bed.redis.count("ATTEND")
        await eventually(lambda: bed.redis.count("ATTEND") >= before + 2)
        assert bed.tailer.trouble is not None


# --- who is lost --------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def following(bed: Bed, last_seq: int = 2) -> AsyncIterator[Follower]:
    """A stream that Redis has been asked about for longer than a lease."""
    follower = Follower()
    follower.publish(follower.frames(1, last_seq), last_seq)
    bed.last_seq[follower.id] = last_seq
    async with running(bed):
        bed.tailer.follow(follower)
        await bed.attended(round(LEASE_S / ANOTHER_INTERVAL) + 2)
        assert bed.buried == []
        yield follower


async def test_producer_whose_lease_lapsed_is_lost_when_that_is_seen_twice(bed: Bed) -> None:
    async with following(bed) as follower:
        bed.left_ms[follower.id] = -1
        await bed.attended()
        assert bed.buried == []
        await bed.attended()
        assert bed.buried == [follower.id]
        [call] = bed.redis.named("BURY")
        frames, last = follower.burial()
        assert call.keys == [state_key(follower.id), entries_key(follower.id)]
        assert call.args[:3] == [2, last, frames]
        assert follower.ends == []  # the end comes as everything does


@pytest.mark.parametrize("why", ["renewed", "ended", "further there"])
async def test_producer_is_not_lost_where_its_lease_only_seemed_to_lapse(bed: Bed, why: str) -> None:
    async with following(bed) as follower:
        bed.left_ms[follower.id] = -1
        if why == "further there":
            bed.last_seq[follower.id] = 3
        await bed.attended()
        if why == "renewed":
            bed.left_ms[follower.id] = 500
            await bed.attended()
            bed.left_ms[follower.id] = -1
            await bed.attended()
        else:
            if why == "ended":
                bed.ended.add(follower.id)
            await bed.attended(3)
        assert bed.buried == []


@pytest.mark.parametrize("what", ["fails", "slow", "we stood still"])
async def test_producer_has_the_time_of_a_lease_after_redis_or_we_were_away(bed: Bed, what: str) -> None:
    """It had no chance to renew, or we none to see it."""
    async with following(bed) as follower:
        bed.left_ms[follower.id] = -1
        if what == "fails":
            bed.redis.answers["ATTEND"] = lambda _keys, _args: exceptions.ConnectionError()
            await bed.attended()
            bed.redis.answers["ATTEND"] = bed.attend
        elif what == "slow":
            bed.redis.held.add("ATTEND")
            await bed.attended()
            bed.clock.now += 1.5
            bed.redis.held.clear()
        else:
            bed.clock.now += 2 * LEASE_S
        await bed.attended(round(LEASE_S / ANOTHER_INTERVAL) - 2)
        assert bed.buried == []
        await bed.attended(5)
        assert follower.id in bed.buried


async def test_stream_that_redis_forgot_is_lost_when_nobody_has_said_it_again_for_a_lease(bed: Bed) -> None:
    async with following(bed) as follower:
        bed.left_ms[follower.id] = None
        await bed.attended(round(LEASE_S / ANOTHER_INTERVAL) - 1)
        assert follower.ends == []
        await bed.attended(3)
        assert follower.ends == [follower_burial(follower, 2)]
        assert bed.buried == []


def follower_burial(follower: Follower, last_seq: int) -> tuple[bytes, int]:
    same = Follower(int(follower.id))
    same.publish(same.frames(1, last_seq), last_seq)
    return same.burial()


async def test_stream_that_redis_forgot_for_a_moment_is_not_lost(bed: Bed) -> None:
    async with following(bed) as follower:
        for _ in range(3):
            bed.left_ms[follower.id] = None
            await bed.attended(round(LEASE_S / ANOTHER_INTERVAL) - 2)
            bed.left_ms[follower.id] = 500
            await bed.attended()
        assert follower.ends == []


async def test_stream_that_nobody_follows_any_more_is_not_ended(bed: Bed) -> None:
    async with following(bed) as follower:
        bed.left_ms[follower.id] = -1
        await bed.attended()
        bed.tailer.unfollow(follower)
        await bed.attended(3)
        assert bed.buried == []
