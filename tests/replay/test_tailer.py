"""The tailer: what it makes of what comes from Redis, and how soon it comes."""

from __future__ import annotations

import asyncio

import pytest
from conftest import eventually
from fake_client import Range, Read, Unblock, entry, turns_of_loops
from redis import exceptions
from structlog.testing import capture_logs
from tailer_bed import Follower, TailerBed, running, tailer_bed

from aisse.replay.follower_scripts import Attend
from aisse.streams.endings import Reason, ending, failure


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> TailerBed:
    return tailer_bed(monkeypatch)


# --- what comes ---------------------------------------------------------------------------------------------------


async def test_stream_is_loaded_page_by_page_to_its_last_entry(bed: TailerBed) -> None:
    follower = Follower()
    bed.redis.entries[follower.key] = [follower.entry(seq, seq) for seq in range(1, 51)]
    await bed.tailer.load(follower)
    assert follower.whole == follower.frames(1, 50)
    assert bed.redis.count(Range) == 4
    await bed.tailer.load(follower)
    assert follower.whole == follower.frames(1, 50)


async def test_what_comes_is_published_in_order_and_once(bed: TailerBed) -> None:
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
        await eventually(lambda: bed.waits.count(Read) == 3)
        assert bed.waits.calls_of(Read)[-1].after == {one.key: b"4-0", other.key: b"2-0"}


async def test_entries_cut_in_other_places_are_joined_where_this_process_stands(bed: TailerBed) -> None:
    """Redis was emptied, and its producer has said everything again."""
    follower = Follower()
    async with running(bed):
        bed.tailer.follow(follower)
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 3)])])
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 2), follower.entry(3, 7)])])
        await eventually(lambda: follower.log.last_seq == 7)
    assert follower.whole == follower.frames(1, 7)
    assert not follower.ends


async def test_end_is_the_last_that_comes(bed: TailerBed) -> None:
    follower, other = Follower(1), Follower(2)
    async with running(bed):
        bed.tailer.follow(follower)
        bed.tailer.follow(other)
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 2), follower.end_entry(2)])])
        await eventually(lambda: bool(follower.ends))
        assert follower.ends == [(follower.end_entry(2)[1][b"f"], 3)]
        await eventually(lambda: bed.waits.count(Read) == 2)
        assert list(bed.waits.calls_of(Read)[-1].after) == [other.key]
        bed.waits.arrivals.put_nowait([(follower.key, [follower.end_entry(3)])])
        await eventually(lambda: bed.waits.count(Read) == 3)
    assert len(follower.ends) == 1


async def test_end_that_somebody_else_wrote_ends_a_stream_that_is_further_here(bed: TailerBed) -> None:
    """Its producer is lost, and Redis had got less of it than this process."""
    follower = Follower()
    async with running(bed):
        bed.tailer.follow(follower)
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 5)])])
        await eventually(lambda: follower.log.last_seq == 5)
        error = failure(Reason.PRODUCER_LOST)
        frames, last = ending(follower.id, 3, Reason.PRODUCER_LOST, error, {"input_tokens": 0, "output_tokens": 0})
        bed.waits.arrivals.put_nowait([(follower.key, [entry(3, last, frames)])])
        await eventually(lambda: bool(follower.ends))
    assert follower.ends == [(frames, last)]


async def test_hole_ends_the_stream_and_is_told_to_the_operator(bed: TailerBed) -> None:
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


async def test_connection_that_fails_is_replaced_and_what_was_missed_is_caught_up(bed: TailerBed) -> None:
    follower = Follower()
    async with running(bed):
        bed.tailer.follow(follower)
        bed.waits.arrivals.put_nowait(exceptions.ConnectionError())
        await eventually(lambda: bed.troubles.first == "the shared log does not answer")
        assert bed.waits.disconnected == 1
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 2)])])
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(3, 4)])])
        await eventually(lambda: follower.log.last_seq == 4)
        await eventually(lambda: bed.waits.calls_of(Read)[-1].block is not None)
        # Twice without waiting, and once more to see that nothing is left.
        assert [call.block is None for call in bed.waits.calls_of(Read)] == [False, True, True, True, False]
        bed.waits.arrivals.put_nowait([])
        await eventually(lambda: bed.troubles.first is None)


async def test_idle_tailer_is_not_woken_by_each_tick(bed: TailerBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of the loops are counted; the one of the attendance turns for ever, and is the clock here."""
    turned = turns_of_loops(monkeypatch)
    follower = Follower()
    async with running(bed):
        bed.tailer.follow(follower)
        bed.waits.arrivals.put_nowait([(follower.key, [follower.entry(1, 1), follower.end_entry(1)])])
        await eventually(lambda: bool(follower.ends))
        await eventually(lambda: turned["attend"] > 2)
        before = turned.copy()
        await eventually(lambda: turned["attend"] > before["attend"] + 20)
        assert turned["tail"] <= before["tail"] + 1


async def test_stream_that_is_about_to_be_read_counts_as_read_and_comes_at_once(bed: TailerBed) -> None:
    """The call that waits does not ask for it."""
    old, new = Follower(1), Follower(2)
    new.readers = 0
    async with running(bed):
        bed.tailer.follow(old)
        await eventually(lambda: bed.waits.count(Read) == 1)
        bed.tailer.follow(new)
        assert await bed.tailer.hasten([new.id]) == [True]
        assert (True, 0) in bed.about(new)
        assert bed.redis.count(Unblock) == 1
        bed.waits.arrivals.put_nowait([])  # as a call brings that was unblocked
        await eventually(lambda: bed.waits.count(Read) == 2)
        assert list(bed.waits.calls_of(Read)[-1].after) == [old.key, new.key]


# --- leaving ------------------------------------------------------------------------------------------------------


async def test_leaving_process_says_that_nobody_reads_here(bed: TailerBed) -> None:
    """Producers would hold their upstreams for its readers until its lease is over."""
    followers = [Follower(number) for number in range(3)]
    for follower in followers:
        bed.tailer.follow(follower)
    await bed.tailer.leave()
    [told] = bed.told
    assert [(stream_id, here.read) for stream_id, here in told.items()] == [(each.id, False) for each in followers]


async def test_leaving_waits_for_no_redis(bed: TailerBed) -> None:
    bed.redis.held.add(Attend)
    bed.tailer.follow(Follower())
    async with asyncio.timeout(5):
        await bed.tailer.leave()
