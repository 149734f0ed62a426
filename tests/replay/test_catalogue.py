"""The catalogue: which streams Redis knows, and when an answer that it knows none may be wrong."""

from __future__ import annotations

import pytest
from conftest import eventually
from redis import exceptions
from tailer_bed import LEASE_S, TailerBed, running, tailer_bed

from aisse.replay.follower_scripts import Asked, AskToStop, Attend, Found, Look, Looked


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> TailerBed:
    return tailer_bed(monkeypatch)


def doubtful(bed: TailerBed) -> bool:
    """Whether an answer that there is no such stream may be wrong at the moment."""
    return bed.catalogue.doubtful


async def test_each_stream_that_is_asked_for_has_its_answer(bed: TailerBed) -> None:
    known = [Found(5.0, None), None, Found(6.0, 7.5)]
    bed.redis.answers[Look] = lambda _call: Looked(True, known)
    bed.redis.answers[AskToStop] = lambda _call: Asked(True, [True, False])
    assert await bed.catalogue.find(["a", "b", "c"]) == known
    assert await bed.catalogue.ask_to_stop(["a", "b"]) == [True, None]
    assert [call.stream_ids for call in bed.redis.calls_of(Look)] == [["a", "b", "c"]]


@pytest.mark.parametrize("asks", [Look, AskToStop])
async def test_answers_are_doubtful_for_a_lease_after_redis_was_emptied(
    bed: TailerBed, asks: type[Look | AskToStop]
) -> None:
    """Who asks learns of it first: it may be that what is unknown is about to be said again."""
    bed.redis.answers[Look] = lambda _call: Looked(bed.redis.marked, [None])
    bed.redis.answers[AskToStop] = lambda _call: Asked(bed.redis.marked, [False])
    ask = bed.catalogue.find if asks is Look else bed.catalogue.ask_to_stop
    bed.redis.marked = False
    await bed.catalogue.mark()
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


async def test_answers_are_doubtful_where_redis_is_seen_to_be_emptied_by_the_sweep(bed: TailerBed) -> None:
    bed.redis.marked = False
    async with running(bed):
        await bed.attended(2)
        assert not doubtful(bed)
        bed.redis.marked = False
        await bed.attended()
        assert doubtful(bed)


async def test_answers_are_doubtful_while_redis_does_not_answer(bed: TailerBed) -> None:
    async with running(bed):
        await bed.attended()
        bed.redis.fails(Attend, exceptions.ConnectionError())
        await bed.attended()
        assert doubtful(bed)
        await eventually(lambda: bed.troubles.first is not None)
        bed.redis.answers[Attend] = bed.attend
        await bed.attended()
        await eventually(lambda: bed.troubles.first is None)
