"""Attendance: whom it says is read here, and whom it takes for lost."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from conftest import eventually
from redis import exceptions
from tailer_bed import ANOTHER_INTERVAL, LEASE_S, READ_AHEAD_BYTES, Follower, TailerBed, running, tailer_bed

from aisse.replay.follower_scripts import Attend, Bury

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> TailerBed:
    return tailer_bed(monkeypatch)


# --- who is read here ---------------------------------------------------------------------------------------------


async def test_readers_here_are_told_of_for_as_long_as_there_are_any(bed: TailerBed) -> None:
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


async def test_reader_that_has_got_on_is_told_of_at_once(bed: TailerBed) -> None:
    """A producer that waits for it must not wait for the next look, too. The clock stands."""
    follower, other = Follower(1), Follower(2)
    async with running(bed):
        bed.tailer.follow(follower)
        bed.tailer.follow(other)
        await bed.attended()
        follower.furthest = READ_AHEAD_BYTES // 4 - 1
        other.furthest = READ_AHEAD_BYTES // 4
        await eventually(lambda: (True, other.furthest) in bed.about(other))
        assert list(bed.told[-1]) == [other.id]
        follower.furthest += 1
        await eventually(lambda: (True, follower.furthest) in bed.about(follower))
        count = len(bed.told)
        await asyncio.sleep(0.02)
        assert len(bed.told) == count


async def test_readers_that_left_are_told_of_with_their_leaving(bed: TailerBed) -> None:
    """Told of later, their producer would have ended what they are to come back to, or read on without its brake."""
    follower = Follower()
    bed.tailer.follow(follower)
    async with running(bed):
        await bed.attended()
        here = bed.told[-1][follower.id]
        assert (here.moved_ms, here.stalled) == (0, False)
        follower.awaits_until = asyncio.get_running_loop().time() + 12
        follower.last_reader_stalled = True
        follower.readers = 0
        bed.tailer.unfollow(follower)
        await bed.attended()
        assert bed.about(follower)[-1] == (False, 0)
        here = bed.told[-1][follower.id]
        assert 11_000 < here.moved_ms <= 12_000
        assert here.stalled


async def test_trouble_lasts_until_redis_has_answered(bed: TailerBed) -> None:
    """It is asked again for the trouble's sake: nothing else is due."""
    async with running(bed):
        await bed.attended()
        bed.redis.fails(Attend, exceptions.ConnectionError())
        await bed.attended()
        await eventually(lambda: bed.troubles.first is not None)
        before = bed.redis.count(Attend)
        await eventually(lambda: bed.redis.count(Attend) >= before + 2)
        assert bed.troubles.first is not None


# --- who is lost --------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def following(bed: TailerBed, last_seq: int = 2) -> AsyncIterator[Follower]:
    """A stream that Redis has been asked about for longer than a lease."""
    follower = Follower()
    follower.publish(follower.frames(1, last_seq), last_seq)
    bed.last_seq[follower.id] = last_seq
    async with running(bed):
        bed.tailer.follow(follower)
        await bed.attended(round(LEASE_S / ANOTHER_INTERVAL) + 2)
        assert bed.buried == []
        yield follower


async def test_producer_whose_lease_lapsed_is_lost_when_that_is_seen_twice(bed: TailerBed) -> None:
    async with following(bed) as follower:
        bed.left_ms[follower.id] = -1
        await bed.attended()
        assert bed.buried == []
        await bed.attended()
        assert bed.buried == [follower.id]
        [call] = bed.redis.calls_of(Bury)
        frames, end = follower.burial()
        assert (call.last, call.end, call.frames) == (2, end, frames)
        assert follower.ends == []  # the end comes as everything does


@pytest.mark.parametrize("why", ["renewed", "ended", "further there"])
async def test_producer_is_not_lost_where_its_lease_only_seemed_to_lapse(bed: TailerBed, why: str) -> None:
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
async def test_producer_has_the_time_of_a_lease_after_redis_or_we_were_away(bed: TailerBed, what: str) -> None:
    """It had no chance to renew, or we none to see it."""
    async with following(bed) as follower:
        bed.left_ms[follower.id] = -1
        if what == "fails":
            bed.redis.fails(Attend, exceptions.ConnectionError())
            await bed.attended()
            bed.redis.answers[Attend] = bed.attend
        elif what == "slow":
            bed.redis.held.add(Attend)
            await bed.attended()
            bed.clock.now += 1.5
            bed.redis.held.clear()
        else:
            bed.clock.now += 2 * LEASE_S
        await bed.attended(round(LEASE_S / ANOTHER_INTERVAL) - 2)
        assert bed.buried == []
        await bed.attended(5)
        assert follower.id in bed.buried


async def test_stream_that_redis_forgot_is_lost_when_nobody_has_said_it_again_for_a_lease(bed: TailerBed) -> None:
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


async def test_stream_that_redis_forgot_for_a_moment_is_not_lost(bed: TailerBed) -> None:
    async with following(bed) as follower:
        for _ in range(3):
            bed.left_ms[follower.id] = None
            await bed.attended(round(LEASE_S / ANOTHER_INTERVAL) - 2)
            bed.left_ms[follower.id] = 500
            await bed.attended()
        assert follower.ends == []


async def test_stream_that_nobody_follows_any_more_is_not_ended(bed: TailerBed) -> None:
    async with following(bed) as follower:
        bed.left_ms[follower.id] = -1
        await bed.attended()
        bed.tailer.unfollow(follower)
        await bed.attended(3)
        assert bed.buried == []
