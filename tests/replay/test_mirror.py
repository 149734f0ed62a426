"""The mirror: what it tells Redis of the streams that are generated here, in which order, and what it hears of them."""

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

from aisse.replay import mirror as mirror_module
from aisse.replay import scripts
from aisse.replay.memory import SEGMENT_BYTES, ReplayMemory
from aisse.replay.mirror import Mirror, RedisLog, interval_s
from aisse.sse import frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# Twice as long is still less than what a process is taken to have stood still for.
LEASE_S = 2.0
RETENTION_S = 10.0


@dataclass
class Group:
    """What one append says of one stream."""

    before: int
    last: int
    ends: bool
    frames: bytes


class Producer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.holding: set[str] = set()

    def read_elsewhere(self, stream_id: str, instances: int, position: int, *, stalled: bool) -> None:
        self.told.append(("read", stream_id, instances, position, *["stalled"] * stalled))

    def moved_elsewhere(self, stream_id: str, within_s: float) -> None:
        self.told.append(("moved", stream_id, within_s))

    def stop_asked(self, stream_id: str) -> None:
        self.told.append(("stop", stream_id))

    def lost(self, stream_id: str, frames: bytes, last_seq: int) -> None:
        self.told.append(("lost", stream_id, frames, last_seq))

    def held_back(self, stream_id: str) -> bool:
        return stream_id in self.holding


@dataclass
class Bed:
    """A mirror before a Redis that takes everything, unless a test says otherwise."""

    redis: FakeRedis
    clock: Clock
    producer: Producer
    mirror: Mirror
    memory: ReplayMemory = field(default_factory=lambda: ReplayMemory(1 << 40))
    codes: dict[str, int] = field(default_factory=dict)
    """What APPEND or RENEW says of a stream the next time; that it is missing until it is created."""
    elsewhere: dict[str, tuple[int, int]] = field(default_factory=dict)
    moved_ms: int = 0
    stalled: bool = False
    got: dict[str, list[Group]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    """Bytes of frames in each append."""

    def log(self, number: int = 0, claim: tuple[str, str] | None = None) -> RedisLog:
        return self.mirror.log(f"{number:022}", self.memory, claim)

    def whole(self, log: RedisLog) -> bytes:
        return b"".join(group.frames for group in self.got.get(log.id, []))

    async def renewed(self, times: int = 1) -> None:
        """Returns after so many renewals of everything, each in its time."""
        for _ in range(times):
            before = self.redis.count("RENEW")
            self.clock.now += interval_s(LEASE_S)
            await eventually(lambda before=before: self.redis.count("RENEW") > before)  # type: ignore[misc]
            await turns()

    # The scripts' arguments are read here and nowhere else.

    def _code(self, stream_id: str) -> int:
        code = self.codes.pop(stream_id, scripts.OK)
        if code == scripts.MISSING:
            self.codes[stream_id] = code
        return code

    def create(self, keys: list[Any], _args: list[Any]) -> Any:
        for key in keys[::4]:
            if self.codes.get(stream_id := self._id(key)) == scripts.MISSING:
                del self.codes[stream_id]
        return [1] * (len(keys) // 4)

    def append(self, keys: list[Any], args: list[Any]) -> Any:
        said = []
        self.sizes.append(sum(len(frames) for frames in args[5::4]))
        for key, before, last, ends, frames in zip(
            keys[::2], args[2::4], args[3::4], args[4::4], args[5::4], strict=True
        ):
            stream_id = self._id(key)
            code = self._code(stream_id)
            if code in {scripts.OK, scripts.STOP}:
                self.got.setdefault(stream_id, []).append(Group(before, last, ends == 1, frames))
            said.append(code)
        return said

    def renew(self, keys: list[Any], _args: list[Any]) -> Any:
        said: list[int] = []
        for key in keys[::3]:
            stream_id = self._id(key)
            said += (self._code(stream_id), *self.elsewhere.get(stream_id, (0, 0)), self.moved_ms, int(self.stalled))
        return said

    def _id(self, state_key: bytes) -> str:
        return state_key.decode().removesuffix(":state").rpartition(":")[2]


async def turns(count: int = 20) -> None:
    """Lets every task have its turn."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running(bed: Bed) -> AsyncIterator[None]:
    task = asyncio.create_task(bed.mirror.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def bed(monkeypatch: pytest.MonkeyPatch) -> Bed:
    return make_bed(monkeypatch)


def make_bed(monkeypatch: pytest.MonkeyPatch, tick_s: float = 0.001) -> Bed:
    monkeypatch.setattr(mirror_module, "_CLOCK_S", 0.001)
    redis, clock, producer = FakeRedis(), Clock(monkeypatch, "aisse.replay.mirror"), Producer()
    client = cast("Any", redis)
    mirror = Mirror(client, producer, tick_s=tick_s, lease_s=LEASE_S, retention_s=RETENTION_S)
    bed = Bed(redis, clock, producer, mirror)
    redis.answers = {"CREATE": bed.create, "APPEND": bed.append, "RENEW": bed.renew}
    return bed


def publish(log: RedisLog, size: int = 1000, count: int = 1) -> None:
    for _ in range(count):
        seq = log.last_seq + 1
        log.append(frame("content_block_delta", "x" * size, f"{log.id}.{seq}"), seq)


# --- appends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", ["before Redis has anything", "while it takes the first group", "at the end"])
async def test_stream_that_ends_far_ahead_of_redis_is_closed_by_its_last_group_alone(bed: Bed, sealed: str) -> None:
    """Closed by an earlier one it would have lost the rest, and readers elsewhere would wait for ever."""
    log = bed.log()
    publish(log, count=100)
    assert log.tail > 5 * SEGMENT_BYTES
    if sealed.startswith("before"):
        log.seal()
    else:
        bed.redis.held.add("APPEND")
    whole = log.read(0, log.tail)
    async with running(bed):
        if sealed.startswith("while"):
            await eventually(lambda: bed.redis.count("APPEND") >= 1)
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


async def test_appends_of_many_backlogs_are_bounded_in_bytes(bed: Bed) -> None:
    """One script of all would stop Redis for everybody."""
    logs = [bed.log(number) for number in range(200)]
    for log in logs:
        publish(log, count=40)
    async with running(bed):
        assert await bed.mirror.settled(9)
    assert sum(bed.sizes) == sum(log.tail for log in logs) > 7 << 20
    assert max(bed.sizes) <= (1 << 20) + SEGMENT_BYTES


async def test_streams_that_have_got_nothing_come_before_those_that_have(bed: Bed) -> None:
    """Where every second call fails, as of a Redis that is nearly full, the first ones would get everything first."""
    logs = [bed.log(number) for number in range(150)]
    for log in logs:
        publish(log, count=60)
    async with running(bed):
        await eventually(lambda: all(log.known for log in logs))
        bed.got.clear()

    def every_second_fails(keys: list[Any], args: list[Any]) -> Any:
        return bed.append(keys, args) if bed.redis.count("APPEND") % 2 else exceptions.OutOfMemoryError()

    late = bed.log(999)
    publish(late)
    bed.redis.answers["APPEND"] = every_second_fails
    async with running(bed):
        await eventually(lambda: late.id in bed.got)
        assert max(len(groups) for groups in bed.got.values()) <= 2


async def test_group_without_an_answer_is_repeated_with_the_same_boundaries(bed: Bed) -> None:
    log = bed.log()
    publish(log, count=3)
    bed.redis.answers["APPEND"] = lambda _keys, _args: exceptions.TimeoutError()
    async with running(bed):
        await eventually(lambda: bed.redis.count("APPEND") >= 1)
        await eventually(lambda: bed.mirror.trouble == "the shared log does not answer")
        assert not await bed.mirror.settled(0)
        bed.redis.answers["APPEND"] = bed.append
        assert await bed.mirror.settled(9)
        assert bed.mirror.trouble is None
    first, *again = bed.redis.named("APPEND")
    assert again
    assert all(call.args == first.args for call in again)
    assert bed.whole(log) == log.read(0, log.tail)


async def test_redis_that_has_more_than_its_answers_said_is_gone_on_from_there(bed: Bed) -> None:
    log = bed.log()
    publish(log, count=5)
    bed.codes[log.id] = -3 - 1  # the last frame there is the third
    async with running(bed):
        await eventually(lambda: bed.redis.count("APPEND") >= 1)
        assert await bed.mirror.settled(9)
    [group] = bed.got[log.id]
    assert (group.before, group.last) == (3, 5)
    assert group.frames == log.read(log.position_after(3))


async def test_emptied_redis_gets_everything_again_from_the_beginning(bed: Bed) -> None:
    log = bed.log(claim=("d" * 43, "r" * 43))
    publish(log, count=3)
    async with running(bed):
        assert await bed.mirror.settled(9)
        bed.got.clear()
        bed.codes[log.id] = scripts.MISSING
        publish(log)
        await eventually(lambda: bed.redis.count("CREATE") >= 2)
        assert await bed.mirror.settled(9)
    assert bed.whole(log) == log.read(0, log.tail)
    first, *_, second = bed.redis.named("CREATE")
    assert (first.keys, first.args[4:]) == (second.keys, second.args[4:])
    assert bed.producer.told == []


async def test_stream_that_others_have_ended_is_lost_with_the_frames_that_end_it(bed: Bed) -> None:
    log, empty = bed.log(1), bed.log(2)
    bed.redis.entries[log.entries_key.decode()] = [(b"1-0", {b"f": b"first"}), (b"9-0", {b"f": b"the end"})]
    for each in (log, empty):
        publish(each)
        bed.codes[each.id] = scripts.CLOSED
    async with running(bed):
        await eventually(lambda: len(bed.producer.told) == 2)
        assert bed.producer.told == [("lost", log.id, b"the end", 9), ("lost", empty.id, b"", 0)]
        publish(log)
        assert await bed.mirror.settled(9)
    assert bed.redis.count("APPEND") == 1


async def test_stream_that_redis_knows_as_anothers_is_lost(bed: Bed) -> None:
    log = bed.log()
    bed.redis.answers["CREATE"] = lambda _keys, _args: [0]
    async with running(bed):
        await eventually(lambda: bed.producer.told == [("lost", log.id, b"", 0)])


@pytest.mark.parametrize("said_by", ["APPEND", "RENEW"])
async def test_stop_that_somebody_asked_for_elsewhere_reaches_the_producer(bed: Bed, said_by: str) -> None:
    log = bed.log()
    async with running(bed):
        await eventually(lambda: log.known)
        bed.codes[log.id] = scripts.STOP
        if said_by == "APPEND":
            publish(log)
        else:
            await bed.renewed()
        await eventually(lambda: ("stop", log.id) in bed.producer.told)
    assert set(bed.producer.told) == {("stop", log.id)}


async def test_append_that_brings_a_stop_counts_as_taken(bed: Bed) -> None:
    """The rest, its end above all, would never follow."""
    log = bed.log()
    publish(log)
    bed.codes[log.id] = scripts.STOP
    bed.redis.held.add("RENEW")
    async with running(bed):
        assert await bed.mirror.settled(9)
        assert len(bed.got[log.id]) == 1


async def test_stream_that_was_dropped_is_not_told_of_any_more(bed: Bed) -> None:
    log, other = bed.log(1), bed.log(2)
    publish(log)
    bed.redis.held.add("APPEND")
    async with running(bed):
        await eventually(lambda: bed.redis.count("APPEND") >= 1)
        log.discard()
        bed.codes[log.id] = scripts.CLOSED
        bed.redis.held.clear()
        publish(other)
        assert await bed.mirror.settled(9)
        await bed.renewed(2)
    assert bed.producer.told == []
    assert bed.mirror.behind == 0
    assert all(
        call.keys == [other.state_key, other.entries_key, other.readers_key] for call in bed.redis.named("RENEW")
    )


async def test_stream_that_has_ended_is_not_renewed_once_redis_has_its_end(bed: Bed) -> None:
    log = bed.log()
    publish(log)
    log.seal()
    async with running(bed):
        assert await bed.mirror.settled(9)
        count = bed.redis.count("RENEW")
        bed.clock.now += LEASE_S
        other = bed.log(1)
        await eventually(lambda: other.known)
        await bed.renewed()
        assert {key for call in bed.redis.named("RENEW")[count:] for key in call.keys[::3]} == {other.state_key}


async def test_idle_mirror_is_not_woken_by_each_tick(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of the loops are counted; the one of the leases turns for ever, and is the clock here."""
    turned: Counter[str] = Counter()

    def heed() -> None:
        task = asyncio.current_task()
        assert task is not None
        turned[task.get_name().rpartition(" ")[2]] += 1

    monkeypatch.setattr(mirror_module, "heed_cancellation", heed)
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
    bed = make_bed(monkeypatch, tick_s=3600)
    async with running(bed):
        await turns()
        log = bed.log()
        await eventually(lambda: log.known)
        bed.clock.now += 3600
        later = bed.log(1)
        await eventually(lambda: later.known)


async def test_unknown_streams_get_nothing_appended(bed: Bed) -> None:
    """Redis would take it for a stream that it has lost."""
    log = bed.log()
    publish(log)
    bed.redis.held.add("CREATE")
    async with running(bed):
        await eventually(lambda: bed.redis.count("CREATE") >= 1)
        publish(log)
        await asyncio.sleep(0.01)
        assert bed.redis.count("APPEND") == 0
        bed.redis.held.clear()
        assert await bed.mirror.settled(9)


# --- keys ---------------------------------------------------------------------------------------------------------


async def test_withdrawal_is_repeated_until_redis_has_heard_it(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key would stay with a stream that never began."""
    monkeypatch.setattr(mirror_module, "backoff_s", lambda _failures: 0.0)
    answers = iter((exceptions.ConnectionError(), OSError(), None))
    bed.redis.answers["WITHDRAW"] = lambda _keys, _args: next(answers)
    await bed.mirror.withdraw("A" * 22, "key", b"", 2)
    assert [call.args[0] for call in bed.redis.named("WITHDRAW")] == ["A" * 22] * 3


async def test_withdrawal_is_given_up_when_redis_has_forgotten_by_itself(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "backoff_s", lambda _failures: 0.0)

    def fail(_keys: list[Any], _args: list[Any]) -> Any:
        assert bed.redis.count("WITHDRAW") < 100
        bed.clock.now += LEASE_S
        return exceptions.ConnectionError()

    bed.redis.answers["WITHDRAW"] = fail
    await bed.mirror.withdraw("A" * 22, "key", b"", 2)
    assert bed.redis.count("WITHDRAW") == (RETENTION_S + LEASE_S) / LEASE_S


# --- leases -------------------------------------------------------------------------------------------------------


async def test_readers_elsewhere_are_told_of_until_they_have_left(bed: Bed) -> None:
    log = bed.log()
    publish(log)
    async with running(bed):
        assert await bed.mirror.settled(9)
        bed.clock.now += 2 * LEASE_S
        bed.elsewhere[log.id] = 2, 17
        await bed.renewed(2)
        assert bed.producer.told[-1] == ("read", log.id, 2, 17)
        bed.elsewhere.clear()
        await bed.renewed(1)
        assert bed.producer.told[-1] == ("read", log.id, 0, 0)
        told = len(bed.producer.told)
        await bed.renewed(2)
        assert len(bed.producer.told) == told  # once


async def test_readers_that_others_have_moved_are_told_of_before_they_are_gone(bed: Bed) -> None:
    """Where they were the last ones only that keeps the stream for them."""
    log = bed.log()
    publish(log)
    async with running(bed):
        assert await bed.mirror.settled(9)
        bed.clock.now += 2 * LEASE_S
        bed.elsewhere[log.id] = 1, 17
        await bed.renewed()
        bed.elsewhere.clear()
        bed.moved_ms = 2500
        bed.mirror._steady_since = 0.0
        await bed.renewed()
        assert bed.producer.told[-2:] == [("moved", log.id, 2.5), ("read", log.id, 0, 0)]
        # While Redis may not know of those that are there, too.
        bed.producer.told.clear()
        bed.mirror._steady_since = bed.clock.now
        await bed.renewed()
        assert bed.producer.told == [("moved", log.id, 2.5)]


async def test_reader_that_left_elsewhere_with_bytes_waiting_is_told_of(bed: Bed) -> None:
    log = bed.log()
    publish(log)
    async with running(bed):
        assert await bed.mirror.settled(9)
        bed.clock.now += 2 * LEASE_S
        bed.elsewhere[log.id] = 1, 5
        await bed.renewed()
        bed.elsewhere[log.id] = 0, 5
        bed.stalled = True
        bed.mirror._steady_since = 0.0
        await bed.renewed()
        assert bed.producer.told[-1] == ("read", log.id, 0, 5, "stalled")


async def test_position_elsewhere_counts_no_further_than_the_tail(bed: Bed) -> None:
    """An instance that has more than this one, as after a crash, would keep the gate open for good."""
    log = bed.log()
    publish(log)
    async with running(bed):
        assert await bed.mirror.settled(9)
        bed.elsewhere[log.id] = 1, 10**15
        await bed.renewed()
        assert bed.producer.told[-1] == ("read", log.id, 1, log.tail)


async def test_readers_elsewhere_stay_for_a_lease_after_redis_was_emptied(bed: Bed) -> None:
    """They get to say again that they are there: until then Redis knows of none."""
    log = bed.log()
    publish(log)
    async with running(bed):
        assert await bed.mirror.settled(9)
        bed.clock.now += 2 * LEASE_S
        bed.elsewhere[log.id] = 1, 5
        await bed.renewed()
        bed.elsewhere.clear()
        bed.codes[log.id] = scripts.MISSING
        publish(log)
        await eventually(lambda: bed.redis.count("CREATE") >= 2)
        assert await bed.mirror.settled(9)
        told = list(bed.producer.told)
        await bed.renewed(round(LEASE_S / interval_s(LEASE_S)) - 1)
        assert bed.producer.told == told
        await bed.renewed(3)
        assert bed.producer.told == [*told, ("read", log.id, 0, 0)]


@pytest.mark.parametrize("trouble", ["fails", "slow"])
async def test_readers_elsewhere_stay_for_a_lease_after_redis_was_away(bed: Bed, trouble: str) -> None:
    log = bed.log()
    publish(log)
    async with running(bed):
        assert await bed.mirror.settled(9)
        bed.clock.now += 2 * LEASE_S
        bed.elsewhere[log.id] = 1, 5
        await bed.renewed()
        bed.elsewhere.clear()
        if trouble == "fails":
            bed.redis.answers["RENEW"] = lambda _keys, _args: exceptions.ConnectionError()
            await bed.renewed()
            bed.redis.answers["RENEW"] = bed.renew
            await eventually(lambda: bed.mirror.trouble is not None)
        else:
            bed.elsewhere[log.id] = 1, 5
            bed.redis.held.add("RENEW")
            await bed.renewed()
            bed.clock.now += 1.5
            bed.redis.held.clear()
            count = len(bed.producer.told)
            await eventually(lambda: len(bed.producer.told) > count)
            bed.elsewhere.clear()
        told = list(bed.producer.told)
        await bed.renewed(round(LEASE_S / interval_s(LEASE_S)) - 2)
        assert bed.producer.told == told
        await bed.renewed(4)
        assert bed.producer.told == [*told, ("read", log.id, 0, 0)]


async def test_stream_that_its_readers_elsewhere_hold_back_asks_for_them_at_every_turn(bed: Bed) -> None:
    """A lease's interval between two looks would be the time between two bursts."""
    log, other = bed.log(1), bed.log(2)
    for each in (log, other):
        publish(each)
        bed.elsewhere[each.id] = 1, 5
    async with running(bed):
        assert await bed.mirror.settled(9)
        await bed.renewed()
        count = bed.redis.count("RENEW")
        await turns(200)
        assert bed.redis.count("RENEW") == count
        bed.producer.holding.add(log.id)  # the clock stands
        await eventually(lambda: bed.redis.count("RENEW") > count + 5)
        assert bed.redis.named("RENEW")[-1].keys == [log.state_key, log.entries_key, log.readers_key]


async def stands_still(bed: Bed) -> None:
    """Of all this, the clock alone knows that the process did not run."""
    bed.clock.now += 60
    await asyncio.sleep(0.02)
    await eventually(lambda: not bed.mirror._stood_still)


@pytest.mark.parametrize("renewed", [True, False])
async def test_stream_that_is_missing_after_this_process_stood_still_is_lost_unless_it_was_renewed(
    bed: Bed, *, renewed: bool
) -> None:
    """Others may have ended it and forgotten it. Once Redis has said that it is ours, only Redis can have lost it."""
    log = bed.log()
    publish(log)
    async with running(bed):
        assert await bed.mirror.settled(9)
        if not renewed:
            bed.codes[log.id] = scripts.MISSING
            await stands_still(bed)
            await eventually(lambda: bed.producer.told == [("lost", log.id, b"", 0)])
            return
        await stands_still(bed)
        await bed.renewed()
        bed.codes[log.id] = scripts.MISSING
        bed.got.clear()
        await bed.renewed()
        await eventually(lambda: bed.redis.count("CREATE") >= 2)
        assert await bed.mirror.settled(9)
        assert bed.whole(log) == log.read(0, log.tail)
        assert bed.producer.told == []


async def test_trouble_in_one_thing_is_told_until_it_is_over(bed: Bed) -> None:
    log = bed.log()
    async with running(bed):
        await eventually(lambda: log.known)
        bed.redis.answers["RENEW"] = lambda _keys, _args: exceptions.OutOfMemoryError()
        await bed.renewed()
        publish(log)
        assert await bed.mirror.settled(9)
        await eventually(lambda: bed.mirror.trouble == "the shared log is full (maxmemory)")
        bed.redis.answers["RENEW"] = bed.renew
        await bed.renewed()
        await eventually(lambda: bed.mirror.trouble is None)


async def test_read_only_redis_is_left_for_what_takes_its_address(bed: Bed) -> None:
    log = bed.log()
    publish(log)
    bed.redis.answers["APPEND"] = lambda _keys, _args: exceptions.ReadOnlyError()
    async with running(bed):
        await eventually(lambda: bed.redis.disconnected > 0)
        bed.redis.answers["APPEND"] = bed.append
        assert await bed.mirror.settled(9)
