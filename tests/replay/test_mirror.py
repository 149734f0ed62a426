"""The mirror: what it tells Redis of the streams that are generated here, in which order, and what it hears of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import eventually
from fake_client import entry, turns_of_loops
from mirror_bed import LEASE_S, RETENTION_S, MirrorBed, ids, mirror_bed, publish, running, turns
from redis import exceptions

from aisse.replay import mirror as mirror_module
from aisse.replay.memory import SEGMENT_BYTES
from aisse.replay.producer_scripts import CLOSED, MISSING, STOP_ASKED, Append, Create, Renew, Withdraw
from aisse.sse import last_seq_of


@pytest.fixture
async def bed(monkeypatch: pytest.MonkeyPatch) -> MirrorBed:
    return mirror_bed(monkeypatch)


# --- appends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", ["before Redis has anything", "while it takes the first group", "at the end"])
async def test_stream_that_ends_far_ahead_of_redis_is_closed_by_its_last_group_alone(
    bed: MirrorBed, sealed: str
) -> None:
    """Closed by an earlier one it would have lost the rest, and readers elsewhere would wait for ever."""
    log = bed.log()
    publish(log, count=100)
    assert log.tail > 5 * SEGMENT_BYTES
    if sealed.startswith("before"):
        log.seal()
    else:
        bed.redis.held.add(Append)
    whole = log.read(0, log.tail)
    async with running(bed):
        if sealed.startswith("while"):
            await eventually(lambda: bed.redis.count(Append) >= 1)
            log.seal()
        bed.redis.held.clear()
        if sealed.startswith("at"):
            assert await bed.mirror.settled(9)
            publish(log)
            log.seal()
        assert await bed.mirror.settled(9)
    groups = bed.got[log.id]
    assert len(groups) > 5
    assert [group.ends for group in groups] == [False] * (len(groups) - 1) + [True]
    assert [group.before for group in groups] == [0, *(group.last for group in groups[:-1])]
    assert bed.whole(log)[: len(whole)] == whole
    assert groups[-1].last == log.last_seq
    assert [group.last for group in groups] == [last_seq_of(group.frames) for group in groups]


async def test_appends_of_many_backlogs_are_bounded_in_bytes(bed: MirrorBed) -> None:
    """One script of all would stop Redis for everybody."""
    logs = [bed.log(number) for number in range(200)]
    for log in logs:
        publish(log, count=40)
    async with running(bed):
        assert await bed.mirror.settled(9)
    assert sum(bed.sizes) == sum(log.tail for log in logs) > 7 << 20
    assert max(bed.sizes) <= (1 << 20) + SEGMENT_BYTES


async def test_streams_that_have_got_nothing_come_before_those_that_have(bed: MirrorBed) -> None:
    """Where every second call fails, as of a Redis that is nearly full, the first ones would get everything first."""
    logs = [bed.log(number) for number in range(150)]
    for log in logs:
        publish(log, count=60)
    bed.redis.held.add(Append)  # or as much as there is time for would be gone already
    async with running(bed):
        await eventually(lambda: all(log.known for log in logs))
    bed.redis.held.clear()
    assert not bed.got

    def every_second_fails(call: Append) -> Any:
        return bed.append(call) if bed.redis.count(Append) % 2 else exceptions.OutOfMemoryError()

    late = bed.log(999)
    publish(late)
    bed.redis.answers[Append] = every_second_fails
    async with running(bed):
        await eventually(lambda: late.id in bed.got)
        assert max(len(groups) for groups in bed.got.values()) <= 2


async def test_group_without_an_answer_is_repeated_with_the_same_boundaries(bed: MirrorBed) -> None:
    log = bed.log()
    publish(log, count=3)
    bed.redis.fails(Append, exceptions.TimeoutError())
    async with running(bed):
        await eventually(lambda: bed.redis.count(Append) >= 1)
        await eventually(lambda: bed.troubles.first == "the shared log does not answer")
        assert not await bed.mirror.settled(0)
        bed.redis.answers[Append] = bed.append
        assert await bed.mirror.settled(9)
        assert bed.troubles.first is None
    first, *again = bed.redis.calls_of(Append)
    assert again
    assert all(call == first for call in again)
    assert bed.whole(log) == log.read(0, log.tail)


async def test_redis_that_has_more_than_its_answers_said_is_gone_on_from_there(bed: MirrorBed) -> None:
    log = bed.log()
    publish(log, count=5)
    bed.there[log.id] = 3
    async with running(bed):
        await eventually(lambda: bed.redis.count(Append) >= 1)
        assert await bed.mirror.settled(9)
    [group] = bed.got[log.id]
    assert (group.before, group.last) == (3, 5)
    assert group.frames == log.read(log.position_after(3))


async def test_emptied_redis_gets_everything_again_from_the_beginning(bed: MirrorBed) -> None:
    log = bed.log(claim=("d" * 43, "r" * 43))
    publish(log, count=3)
    async with running(bed):
        assert await bed.mirror.settled(9)
        bed.got.clear()
        bed.standings[log.id] = MISSING
        publish(log)
        await eventually(lambda: bed.redis.count(Create) >= 2)
        assert await bed.mirror.settled(9)
    assert bed.whole(log) == log.read(0, log.tail)
    first, *_, second = bed.redis.calls_of(Create)
    assert first.streams == second.streams
    assert bed.producer.told == []


async def test_stream_that_others_have_ended_is_lost_with_the_frames_that_end_it(bed: MirrorBed) -> None:
    log, empty = bed.log(1), bed.log(2)
    bed.redis.entries[log.keys.entries] = [entry(0, 1, b"first"), entry(1, 9, b"the end")]
    for each in (log, empty):
        publish(each)
        bed.standings[each.id] = CLOSED
    bed.redis.held.add(Renew)  # or the first renewal might be told instead
    async with running(bed):
        await eventually(lambda: len(bed.producer.told) == 2)
        assert bed.producer.told == [("lost", log.id, b"the end", 9), ("lost", empty.id, b"", 0)]
        publish(log)
        assert await bed.mirror.settled(9)
    assert bed.redis.count(Append) == 1


async def test_stream_that_redis_knows_as_anothers_is_lost(bed: MirrorBed) -> None:
    log = bed.log()
    bed.redis.answers[Create] = lambda _call: [False]
    async with running(bed):
        await eventually(lambda: bed.producer.told == [("lost", log.id, b"", 0)])


@pytest.mark.parametrize("said_by", [Append, Renew])
async def test_stop_that_somebody_asked_for_elsewhere_reaches_the_producer(bed: MirrorBed, said_by: type) -> None:
    log = bed.log()
    async with running(bed):
        await eventually(lambda: log.known)
        bed.standings[log.id] = STOP_ASKED
        if said_by is Append:
            publish(log)
        else:
            await bed.renewed()
        await eventually(lambda: ("stop", log.id) in bed.producer.told)
    assert set(bed.producer.told) == {("stop", log.id)}


async def test_append_that_brings_a_stop_counts_as_taken(bed: MirrorBed) -> None:
    """The rest, its end above all, would never follow."""
    log = bed.log()
    publish(log)
    bed.standings[log.id] = STOP_ASKED
    bed.redis.held.add(Renew)
    async with running(bed):
        assert await bed.mirror.settled(9)
        assert len(bed.got[log.id]) == 1


async def test_stream_that_was_dropped_is_not_told_of_any_more(bed: MirrorBed) -> None:
    log, other = bed.log(1), bed.log(2)
    publish(log)
    bed.redis.held.add(Append)
    async with running(bed):
        await eventually(lambda: bed.redis.count(Append) >= 1)
        log.discard()
        before = bed.redis.count(Renew)
        bed.standings[log.id] = CLOSED
        bed.redis.held.clear()
        publish(other)
        assert await bed.mirror.settled(9)
        await bed.renewed(2)
    assert bed.producer.told == []
    assert bed.mirror.behind == 0
    assert {tuple(ids(call)) for call in bed.redis.calls_of(Renew)[before:]} == {(other.id,)}


async def test_stream_that_has_ended_is_not_renewed_once_redis_has_its_end(bed: MirrorBed) -> None:
    log = bed.log()
    publish(log)
    log.seal()
    async with running(bed):
        assert await bed.mirror.settled(9)
        count = bed.redis.count(Renew)
        bed.clock.now += LEASE_S
        other = bed.log(1)
        await eventually(lambda: other.known)
        await bed.renewed()
        assert all(ids(call) == [other.id] for call in bed.redis.calls_of(Renew)[count:])


async def test_idle_mirror_is_not_woken_by_each_tick(bed: MirrorBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of the loops are counted; the one of the leases turns for ever, and is the clock here."""
    turned = turns_of_loops(monkeypatch)
    async with running(bed):
        publish(bed.log())
        assert await bed.mirror.settled(9)
        await eventually(lambda: turned["leases"] > 2)
        before = turned.copy()
        await eventually(lambda: turned["leases"] > before["leases"] + 20)
        assert turned["append"] <= before["append"] + 1
        assert turned["create"] <= before["create"] + 1


async def test_new_stream_is_said_at_once_however_long_a_tick_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was told of it may ask any instance for it."""
    bed = mirror_bed(monkeypatch, tick_s=3600)
    async with running(bed):
        await turns()
        log = bed.log()
        await eventually(lambda: log.known)
        bed.clock.now += 3600
        later = bed.log(1)
        await eventually(lambda: later.known)


async def test_unknown_streams_get_nothing_appended(bed: MirrorBed) -> None:
    """Redis would take it for a stream that it has lost."""
    log = bed.log()
    publish(log)
    bed.redis.held.add(Create)
    async with running(bed):
        await eventually(lambda: bed.redis.count(Create) >= 1)
        publish(log)
        await asyncio.sleep(0.01)
        assert bed.redis.count(Append) == 0
        bed.redis.held.clear()
        assert await bed.mirror.settled(9)


# --- keys ---------------------------------------------------------------------------------------------------------


async def test_withdrawal_is_repeated_until_redis_has_heard_it(bed: MirrorBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key would stay with a stream that never began."""
    monkeypatch.setattr(mirror_module, "backoff_s", lambda _failures: 0.0)
    answers = iter((exceptions.ConnectionError(), OSError(), None))
    bed.redis.answers[Withdraw] = lambda _call: next(answers)
    await bed.mirror.withdraw("A" * 22, "key", b"", 2)
    assert [call.stream_id for call in bed.redis.calls_of(Withdraw)] == ["A" * 22] * 3


async def test_withdrawal_is_given_up_when_redis_has_forgotten_by_itself(
    bed: MirrorBed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "backoff_s", lambda _failures: 0.0)

    def fail(_call: Withdraw) -> Any:
        assert bed.redis.count(Withdraw) < 100
        bed.clock.now += LEASE_S
        return exceptions.ConnectionError()

    bed.redis.answers[Withdraw] = fail
    await bed.mirror.withdraw("A" * 22, "key", b"", 2)
    assert bed.redis.count(Withdraw) == (RETENTION_S + LEASE_S) / LEASE_S


async def test_trouble_in_one_thing_is_told_until_it_is_over(bed: MirrorBed) -> None:
    log = bed.log()
    async with running(bed):
        await eventually(lambda: log.known)
        bed.redis.fails(Renew, exceptions.OutOfMemoryError())
        await bed.renewed()
        publish(log)
        assert await bed.mirror.settled(9)
        await eventually(lambda: bed.troubles.first == "the shared log is full (maxmemory)")
        bed.redis.answers[Renew] = bed.renew
        await bed.renewed()
        await eventually(lambda: bed.troubles.first is None)
