"""Looking streams up that Redis is about to know: held against what whoever asks has to be told, whatever interleaves.

Time is the test's own: it jumps to whatever is due next, so that nothing depends on how fast the machine is.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jumping import Loop
from redis import exceptions

from aisse.errors import LogUnavailableError
from aisse.replay import lookup
from aisse.replay.lookup import EXCHANGES, GATHER_S, PATIENCE_S, Lookup

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

TICK_S = 0.02
FOREVER = 1e9

# An id is asked for again after 20 ms, then after twice the time: at 0, 20, 40, 80, 160 and for the last time at 270.
LOOKS = 6


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """By a clock that jumps, at most to the end of a minute."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(bounded())


@dataclass
class Call:
    begun: float
    took: float
    ids: list[str]
    failed: bool = False


@dataclass
class FakeRedis:
    """Knows streams from a time on; its answers take the time that is given, in turn."""

    known_from: dict[str, float] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)
    """Of each call; without a sign that says that it fails. Later ones take none."""
    calls: list[Call] = field(default_factory=list)
    busy: bool = False

    async def ask(self, ids: Sequence[str]) -> list[str | None]:
        loop = asyncio.get_running_loop()
        assert not self.busy, "one call at a time"
        assert ids
        assert len(set(ids)) == len(ids), "each once"
        self.busy = True
        took = self.took[len(self.calls)] if len(self.calls) < len(self.took) else 0.0
        self.calls.append(call := Call(loop.time(), abs(took), list(ids), failed=took < 0))
        try:
            await asyncio.sleep(abs(took) / 2)
            now = loop.time()
            answers = [each if self.known_from.get(each, FOREVER) <= now else None for each in ids]
            await asyncio.sleep(abs(took) / 2)
            if call.failed:
                raise exceptions.ConnectionError
            return answers
        finally:
            self.busy = False


async def closed(looking: asyncio.Task[None], subject: Lookup[Any]) -> None:
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    assert not subject._waiting
    assert asyncio.all_tasks() == {asyncio.current_task()}


@dataclass
class Asked:
    stream_id: str
    at: float
    cancelled_after: float
    said: object = None
    done_at: float = 0.0


times = st.floats(0, 1.2).map(lambda seconds: round(seconds, 3))
asks = st.builds(
    Asked, stream_id=st.sampled_from("abc"), at=times, cancelled_after=st.one_of(st.just(FOREVER), st.floats(0, 0.4))
)
answers = st.one_of(st.sampled_from([0.0, 0.001, 0.05, 0.1, -0.001, -0.1]), st.floats(0, 0.3))


@given(
    st.lists(asks, min_size=1, max_size=12),
    st.dictionaries(st.sampled_from("abc"), times),
    st.lists(answers, max_size=20),
)
def test_everybody_is_told_what_is_right_whatever_interleaves(
    asked: list[Asked], known_from: dict[str, float], took: list[float]
) -> None:
    async def work() -> None:
        redis = FakeRedis(known_from, took)
        subject: Lookup[str] = Lookup(redis.ask, TICK_S)
        loop = asyncio.get_running_loop()
        looking = asyncio.create_task(subject.run())

        async def ask(one: Asked) -> None:
            await asyncio.sleep(one.at)
            try:
                async with asyncio.timeout(one.cancelled_after):
                    one.said = await subject.find(one.stream_id)
            except (LogUnavailableError, TimeoutError) as error:
                one.said = type(error)
            one.done_at = loop.time()

        await asyncio.gather(*(ask(one) for one in asked))
        longest = max((call.took for call in redis.calls), default=0.0)
        patience = TICK_S + max(PATIENCE_S, EXCHANGES * longest)
        # The call under way, the wait for the next, and that; and as much as the last question came late.
        latest = patience + 2 * (longest + GATHER_S)
        for one in asked:
            calls = [call for call in redis.calls if one.stream_id in call.ids]
            mine = [call for call in calls if call.begun + call.took + 1e-9 >= one.at and call.begun <= one.done_at]
            since = known_from.get(one.stream_id, FOREVER)
            if one.said is TimeoutError:
                assert one.done_at == pytest.approx(one.at + one.cancelled_after)
                continue
            assert one.done_at - one.at <= latest + 1e-6
            if one.said is LogUnavailableError:
                assert any(call.failed for call in mine)
            elif one.said is None:
                assert since > mine[-1].begun + mine[-1].took / 2 - 1e-6
                assert not mine[-1].failed
            else:
                assert one.said == one.stream_id
                assert since <= one.done_at
        # What is known as soon as a tick and the time of two answers has gone by is never said to be unknown.
        for stream_id in set(known_from) & {one.stream_id for one in asked}:
            first = min(one.at for one in asked if one.stream_id == stream_id)
            if known_from[stream_id] <= first + TICK_S + PATIENCE_S:
                assert all(one.said is not None for one in asked if one.stream_id == stream_id)
        for before, after in zip(redis.calls, redis.calls[1:], strict=False):
            assert after.begun - before.begun >= GATHER_S - 1e-9
        for stream_id in "abc":
            # One round of looks for all who ask meanwhile.
            rounds = sum(one.stream_id == stream_id for one in asked)
            assert sum(stream_id in call.ids for call in redis.calls) <= rounds * (LOOKS + 1)
        await asyncio.sleep(latest)  # those that were left
        await closed(looking, subject)

    for one in asked:
        one.said = None
    run(work)


def test_unknown_id_is_asked_for_a_few_times_and_then_unknown() -> None:
    async def work() -> None:
        redis = FakeRedis()
        subject: Lookup[str] = Lookup(redis.ask, TICK_S)
        looking = asyncio.create_task(subject.run())
        many = [f"{number}" for number in range(1000)]
        assert set(await asyncio.gather(*map(subject.find, many * 3))) == {None}
        assert len(redis.calls) == LOOKS
        assert all(call.ids == many for call in redis.calls)
        now = asyncio.get_running_loop().time()
        assert TICK_S + PATIENCE_S <= now <= TICK_S + PATIENCE_S + GATHER_S
        await closed(looking, subject)

    run(work)


@pytest.mark.parametrize("took", [0.05, 0.1])
def test_unknown_id_is_unknown_within_half_a_second_where_redis_is_slow(took: float) -> None:
    async def work() -> None:
        redis = FakeRedis(took=[took] * 100)
        subject: Lookup[str] = Lookup(redis.ask, TICK_S)
        looking = asyncio.create_task(subject.run())
        loop = asyncio.get_running_loop()

        async def ask(number: int) -> float:
            await asyncio.sleep(number / 1000)
            begun = loop.time()
            assert await subject.find(f"{number}") is None
            return loop.time() - begun

        assert max(await asyncio.gather(*map(ask, range(200)))) < 0.5
        await closed(looking, subject)

    run(work)


def test_stream_is_waited_for_longer_where_an_answer_took_long() -> None:
    """Its producer's calls took as long, and it had one or two to wait for."""

    async def work() -> None:
        redis = FakeRedis({"a": 1.0}, took=[0.5, 0.5])
        subject: Lookup[str] = Lookup(redis.ask, TICK_S)
        looking = asyncio.create_task(subject.run())
        assert await subject.find("a") == "a"
        await closed(looking, subject)

    run(work)


def test_id_that_nobody_waits_for_is_asked_for_once() -> None:
    async def work() -> None:
        redis = FakeRedis({"a": 0.0})
        subject: Lookup[str] = Lookup(redis.ask, TICK_S)
        looking = asyncio.create_task(subject.run())
        assert await subject.find("a", patient=False) == "a"
        assert await subject.find("b", patient=False) is None
        assert len(redis.calls) == 2
        await closed(looking, subject)

    run(work)


def test_cancelled_asker_hurts_no_other() -> None:
    async def work() -> None:
        redis = FakeRedis({"a": 0.1})
        subject: Lookup[str] = Lookup(redis.ask, TICK_S)
        looking = asyncio.create_task(subject.run())
        one, other = (asyncio.create_task(subject.find("a")) for _ in range(2))
        await asyncio.sleep(0.05)
        one.cancel()
        assert await other == "a"
        assert one.cancelled()
        await closed(looking, subject)

    run(work)


def test_one_too_many_is_told_that_nobody_knows_and_the_others_wait_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "WAITING", 3)

    async def work() -> None:
        redis = FakeRedis({"1": 0.1})
        subject: Lookup[str] = Lookup(redis.ask, TICK_S)
        looking = asyncio.create_task(subject.run())
        waiting = [asyncio.create_task(subject.find(f"{number % 3}")) for number in range(6)]
        await asyncio.sleep(0.05)
        with pytest.raises(LogUnavailableError):
            await subject.find("3")
        assert [await task for task in waiting] == [None, "1", None] * 2
        assert await subject.find("3") is None
        await closed(looking, subject)

    run(work)


def test_whoever_waits_when_it_is_over_is_told_that_nobody_knows() -> None:
    async def work() -> None:
        redis = FakeRedis(took=[10.0])
        subject: Lookup[str] = Lookup(redis.ask, TICK_S)
        looking = asyncio.create_task(subject.run())
        waiting = asyncio.create_task(subject.find("a"))
        await asyncio.sleep(1)
        looking.cancel()
        with pytest.raises(LogUnavailableError):
            await waiting
        with pytest.raises(LogUnavailableError):
            await subject.find("a")
        await closed(looking, subject)

    run(work)


def test_failure_of_any_kind_is_told_and_does_not_end_it(capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        errors: list[Exception] = [KeyError("surprise"), exceptions.ResponseError("OOM"), TimeoutError()]

        async def ask(ids: Sequence[str]) -> list[str | None]:
            if errors:
                raise errors.pop()
            return list(ids)

        subject: Lookup[str] = Lookup(ask, TICK_S)
        looking = asyncio.create_task(subject.run())
        for _ in range(3):
            with pytest.raises(LogUnavailableError):
                await subject.find("a")
        assert await subject.find("a") == "a"
        await closed(looking, subject)

    run(work)
    assert "surprise" in capsys.readouterr().out
