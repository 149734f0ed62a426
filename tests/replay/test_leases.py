"""Leases: whether the streams that are generated here are still ours, and what is heard of their readers elsewhere."""

from __future__ import annotations

import asyncio

import pytest
from conftest import eventually
from mirror_bed import INTERVAL_S, LEASE_S, MirrorBed, ids, mirror_bed, publish, running, turns
from redis import exceptions

from aisse.replay.producer_scripts import CLOSED, MISSING, Create, Renew


@pytest.fixture
async def bed(monkeypatch: pytest.MonkeyPatch) -> MirrorBed:
    return mirror_bed(monkeypatch)


async def test_readers_elsewhere_are_told_of_until_they_have_left(bed: MirrorBed) -> None:
    log = bed.log()
    publish(log)
    async with running(bed):
        await bed.steady()
        bed.elsewhere[log.id] = 2, 17
        await bed.renewed(2)
        assert bed.producer.told[-1] == ("read", log.id, 2, 17)
        bed.elsewhere.clear()
        await bed.renewed(1)
        assert bed.producer.told[-1] == ("read", log.id, 0, 0)
        told = len(bed.producer.told)
        await bed.renewed(2)
        assert len(bed.producer.told) == told  # once


async def test_readers_that_others_have_moved_are_told_of_before_they_are_gone(bed: MirrorBed) -> None:
    """Where they were the last ones only that keeps the stream for them."""
    log = bed.log()
    publish(log)
    async with running(bed):
        await bed.steady()
        bed.elsewhere[log.id] = 1, 17
        await bed.renewed()
        bed.elsewhere.clear()
        bed.moved_ms = 2500
        await bed.renewed()
        assert bed.producer.told[-2:] == [("moved", log.id, 2.5), ("read", log.id, 0, 0)]
        # While Redis may not know of those that are there, too.
        bed.producer.told.clear()
        bed.mirror._leases._steady_since = bed.clock.now
        await bed.renewed()
        assert bed.producer.told == [("moved", log.id, 2.5)]


async def test_reader_that_left_elsewhere_with_bytes_waiting_is_told_of(bed: MirrorBed) -> None:
    log = bed.log()
    publish(log)
    async with running(bed):
        await bed.steady()
        bed.elsewhere[log.id] = 1, 5
        await bed.renewed()
        bed.elsewhere[log.id] = 0, 5
        bed.stalled = True
        await bed.renewed()
        assert bed.producer.told[-1] == ("read", log.id, 0, 5, "stalled")


async def test_stream_that_was_read_elsewhere_is_forgotten_after_its_end(bed: MirrorBed) -> None:
    log, other = bed.log(1), bed.log(2)
    publish(log)
    async with running(bed):
        await bed.steady()
        bed.elsewhere = dict.fromkeys((log.id, other.id), (1, 5))
        await bed.renewed()
        log.seal()
        assert await bed.mirror.settled(9)
        await bed.renewed()
        assert bed.mirror._leases._read_elsewhere == {other}


@pytest.mark.parametrize("said", ["it is closed", "it is missing", "it is read"])
async def test_stream_that_is_dropped_while_it_is_renewed_is_not_heeded(bed: MirrorBed, said: str) -> None:
    """One that is missing would have readers of others count that have left: as if Redis had been emptied."""
    log, other = bed.log(1), bed.log(2)
    async with running(bed):
        await bed.steady()
        bed.elsewhere[other.id] = 1, 0
        await bed.renewed()
        told = list(bed.producer.told)
        bed.redis.held.add(Renew)
        await bed.renewed()
        log.discard()
        match said:
            case "it is closed":
                bed.standings[log.id] = CLOSED
            case "it is missing":
                bed.standings[log.id] = MISSING
            case _:
                bed.elsewhere[log.id] = 1, 0
        bed.redis.held.clear()
        await eventually(lambda: len(bed.producer.told) > len(told))
        bed.elsewhere.clear()
        await bed.renewed()
    assert bed.producer.told == [*told, ("read", other.id, 1, 0), ("read", other.id, 0, 0)]


async def test_position_elsewhere_counts_no_further_than_the_tail(bed: MirrorBed) -> None:
    """An instance that has more than this one, as after a crash, would keep the gate open for good."""
    log = bed.log()
    publish(log)
    async with running(bed):
        assert await bed.mirror.settled(9)
        bed.elsewhere[log.id] = 1, 10**15
        await bed.renewed()
        assert bed.producer.told[-1] == ("read", log.id, 1, log.tail)


async def test_readers_elsewhere_stay_for_a_lease_after_redis_was_emptied(bed: MirrorBed) -> None:
    """They get to say again that they are there: until then Redis knows of none."""
    log = bed.log()
    publish(log)
    async with running(bed):
        await bed.steady()
        bed.elsewhere[log.id] = 1, 5
        await bed.renewed()
        bed.elsewhere.clear()
        bed.standings[log.id] = MISSING
        publish(log)
        await eventually(lambda: bed.redis.count(Create) >= 2)
        assert await bed.mirror.settled(9)
        told = list(bed.producer.told)
        await bed.renewed(round(LEASE_S / INTERVAL_S) - 1)
        assert bed.producer.told == told
        await bed.renewed(3)
        assert bed.producer.told == [*told, ("read", log.id, 0, 0)]


@pytest.mark.parametrize("trouble", ["fails", "slow"])
async def test_readers_elsewhere_stay_for_a_lease_after_redis_was_away(bed: MirrorBed, trouble: str) -> None:
    log = bed.log()
    publish(log)
    async with running(bed):
        await bed.steady()
        bed.elsewhere[log.id] = 1, 5
        await bed.renewed()
        bed.elsewhere.clear()
        if trouble == "fails":
            bed.redis.fails(Renew, exceptions.ConnectionError())
            await bed.renewed()
            bed.redis.answers[Renew] = bed.renew
            await eventually(lambda: bed.troubles.first is not None)
        else:
            bed.elsewhere[log.id] = 1, 5
            bed.redis.held.add(Renew)
            await bed.renewed()
            bed.clock.now += 1.5
            bed.redis.held.clear()
            count = len(bed.producer.told)
            await eventually(lambda: len(bed.producer.told) > count)
            bed.elsewhere.clear()
        told = list(bed.producer.told)
        await bed.renewed(round(LEASE_S / INTERVAL_S) - 2)
        assert bed.producer.told == told
        await bed.renewed(4)
        assert bed.producer.told == [*told, ("read", log.id, 0, 0)]


async def test_stream_that_its_readers_elsewhere_hold_back_asks_for_them_at_every_turn(bed: MirrorBed) -> None:
    """A lease's interval between two looks would be the time between two bursts."""
    log, other = bed.log(1), bed.log(2)
    for each in (log, other):
        publish(each)
        bed.elsewhere[each.id] = 1, 5
    async with running(bed):
        assert await bed.mirror.settled(9)
        await bed.renewed()
        count = bed.redis.count(Renew)
        await turns(200)
        assert bed.redis.count(Renew) == count
        bed.producer.holding.add(log.id)  # the clock stands
        await eventually(lambda: bed.redis.count(Renew) > count + 5)
        assert ids(bed.redis.calls_of(Renew)[-1]) == [log.id]


async def stands_still(bed: MirrorBed) -> None:
    """Of all this, the clock alone knows that the process did not run."""
    bed.clock.now += 60
    await asyncio.sleep(0.02)
    await eventually(lambda: not bed.mirror._leases._stood_still)


@pytest.mark.parametrize("renewed", [True, False])
async def test_stream_that_is_missing_after_this_process_stood_still_is_lost_unless_it_was_renewed(
    bed: MirrorBed, *, renewed: bool
) -> None:
    """Others may have ended it and forgotten it. Once Redis has said that it is ours, only Redis can have lost it."""
    log = bed.log()
    publish(log)
    async with running(bed):
        assert await bed.mirror.settled(9)
        if not renewed:
            bed.standings[log.id] = MISSING
            await stands_still(bed)
            await eventually(lambda: bed.producer.told == [("lost", log.id, b"", 0)])
            return
        await stands_still(bed)
        await bed.renewed()
        bed.standings[log.id] = MISSING
        bed.got.clear()
        await bed.renewed()
        await eventually(lambda: bed.redis.count(Create) >= 2)
        assert await bed.mirror.settled(9)
        assert bed.whole(log) == log.read(0, log.tail)
        assert bed.producer.told == []
