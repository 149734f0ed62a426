"""What one instance sees of others (elsewhere, followed, claims), before a Redis that says what the test wants.

Whole fleets before real ones are in tests/streams/test_shared.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from conftest import Server, eventually, prompt, serving
from redis import exceptions

from aisse.errors import KeyReusedError, LogUnavailableError, RequestError, UnknownStreamError
from aisse.formats.anthropic import Anthropic
from aisse.replay.follower_scripts import Asked, AskToStop, Attend, Attended, Found, Lease, Look, Looked
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.replay.producer_scripts import Append, Appended, Claim, Create, Holder, Renew, Renewed, Standing, Withdraw
from aisse.replay.scripts import StreamKeys
from aisse.service.drain import Drain
from aisse.settings import Settings
from aisse.sse import frame
from aisse.streams import shared as shared_module
from aisse.streams.endings import Reason, ending
from aisse.streams.farewell import Farewell
from aisse.streams.followed import FollowedStream
from aisse.streams.registry import Registry
from aisse.streams.shared import Shared
from aisse.streams.table import KEPT_BYTES
from aisse.upstream.client import Upstream
from aisse.upstream.question import Question

sys.path.insert(0, str(Path(__file__).parents[1] / "replay"))
from fake_client import FakeRedis, Read, entry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from aisse.simulator import Simulator
    from aisse.streams.stream import Stream
    from aisse.upstream.connection import UpstreamResponse

NOWHERE = "http://127.0.0.1:9"
LEASE_S = 1.0
ID = "A" * 22
KEY = (b"who", "key")
USAGE = {"input_tokens": 0, "output_tokens": 0}


class SilentUpstream(Upstream):
    """Never answers. `waiting` is how many requests wait for it."""

    waiting = 0

    async def open(self, question: Question) -> UpstreamResponse:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        raise AssertionError


class Reading:
    """A reader at the tail, as far as a stream knows."""

    position = 0

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        stream.attach(self)
        stream.catch_up(self)

    def push(self, _frames: bytes) -> bool:
        return True

    def wake(self) -> None:
        pass

    def leave(self) -> None:
        self._stream.detach(self)


@dataclass
class Bed:
    """A registry with a shared log."""

    redis: FakeRedis
    waits: FakeRedis
    upstream: SilentUpstream
    registry: Registry
    settings: Settings
    known: dict[str, Found] = field(default_factory=dict)
    read_here: dict[str, bool] = field(default_factory=dict)
    """What Redis was told last."""
    elsewhere: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def shared(self) -> Shared:
        assert self.registry._shared is not None
        return self.registry._shared

    def create(self, leave_s: float = 60.0) -> Stream:
        return self.registry.create(Question([b"{}"]), leave_s)

    def is_there(self, stream_id: str = ID, count: int = 2, *, ended: float | None = None) -> None:
        """Has Redis know a stream of so many events."""
        self.known[stream_id] = Found(5.0, ended)
        entries = self.redis.entries[StreamKeys(stream_id).entries] = []
        for seq in range(1, count + 1):
            frames = frame("content_block_delta", f"number {seq}", f"{stream_id}.{seq}")
            entries.append(entry(seq - 1, seq, frames))
        if ended is not None:
            frames, last = ending(stream_id, count, Reason.COMPLETE, None, USAGE)
            entries.append(entry(count, last, frames))

    def look(self, call: Look) -> Looked:
        return Looked(self.redis.marked, [self.known.get(stream_id) for stream_id in call.stream_ids])

    def ask_to_stop(self, call: AskToStop) -> Asked:
        return Asked(self.redis.marked, [stream_id in self.known for stream_id in call.stream_ids])

    def attend(self, call: Attend) -> Attended:
        for stream in call.streams:
            self.read_here[stream.keys.id] = stream.read
        return Attended(1000, [Lease(1000, 0, False)] * len(call.streams))

    def renew(self, call: Renew) -> list[Renewed]:
        read = [self.elsewhere.get(keys.id, (0, 0)) for keys in call.streams]
        return [Renewed(Standing.OURS, instances, position, 0, False) for instances, position in read]


def takes(call: Append) -> list[Appended]:
    """What a Redis says in which all is well."""
    return [(Standing.OURS, group.last) for group in call.groups]


def made(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Bed:
    """Everything but started."""
    redis, waits = FakeRedis(), FakeRedis()
    redis.marked = False  # this instance is the first
    clients = iter((redis, waits))
    monkeypatch.setattr(shared_module, "connect", lambda *_args, **_options: next(clients))
    effective = Settings.model_validate(
        {"upstream": NOWHERE, "log": "redis://nowhere", "lease_s": LEASE_S, "log_tick_s": 0.001, **settings}
    )
    upstream = SilentUpstream(NOWHERE, effective, Anthropic(effective))
    b = Bed(redis, waits, upstream, Registry(effective, upstream, Shared), effective)
    redis.answers = {
        Create: lambda call: [True] * len(call.streams),
        Append: takes,
        Renew: b.renew,
        Attend: b.attend,
        Look: b.look,
        AskToStop: b.ask_to_stop,
        Claim: lambda call: Holder(call.stream_id, call.request),
        Withdraw: lambda _call: None,
    }
    return b


@contextlib.asynccontextmanager
async def bed(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> AsyncIterator[Bed]:
    b = made(monkeypatch, **settings)
    await b.registry.start()
    try:
        yield b
    finally:
        b.redis.held.clear()
        await b.registry.close()


@contextlib.asynccontextmanager
async def server(
    monkeypatch: pytest.MonkeyPatch, simulator: Simulator, **settings: Any
) -> AsyncIterator[tuple[Bed, Server]]:
    """The same as a whole server."""
    b = made(monkeypatch)
    clients = iter((b.redis, b.waits))
    monkeypatch.setattr(shared_module, "connect", lambda *_args, **_options: next(clients))
    async with serving(simulator.url, log="redis://nowhere", lease_s=LEASE_S, **settings) as running:
        b.registry = running.registry
        yield b, running


async def in_trouble(b: Bed, stream: Stream) -> None:
    """Has Redis not take what comes of a stream."""
    b.redis.fails(Append, exceptions.ConnectionError())
    stream.publish(frame("content_block_delta", "x", f"{stream.id}.1"), 1)
    await eventually(lambda: b.shared.trouble is not None)


# --- finding ------------------------------------------------------------------------------------------------------


async def test_look_up_goes_on_for_others_where_one_who_asked_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        b.is_there()
        b.redis.held.add(Look)
        first, second = (asyncio.create_task(b.registry.find(ID)) for _ in range(2))
        await eventually(lambda: b.redis.count(Look) == 1)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        b.redis.held.clear()
        stream = await second
        assert (stream.id, stream.events) == (ID, 2)
        assert b.redis.count(Look) == 1


@pytest.mark.parametrize("what", ["find", "stop"])
async def test_stream_that_an_emptied_redis_does_not_know_is_in_doubt(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Its producer is about to say it again: 404 would make clients give it up."""
    async with bed(monkeypatch) as b:
        b.redis.marked = False
        with pytest.raises(LogUnavailableError):
            await (b.registry.find(ID) if what == "find" else b.registry.stop(ID))


async def test_stream_that_cannot_be_loaded_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        b.is_there(count=40)
        page = b.redis.xrange

        async def fails_later(key: bytes, after: str, count: int) -> Any:
            if after.startswith("(0"):
                return await page(key, after, count)
            raise exceptions.ConnectionError

        monkeypatch.setattr(b.redis, "xrange", fails_later)
        with pytest.raises(LogUnavailableError):
            await b.registry.find(ID)
        assert b.registry.replay_bytes == 0


async def test_end_elsewhere_has_the_time_that_redis_has(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        b.is_there(ended=7.5)
        stream = await b.registry.find(ID)
        assert (stream.created_at, stream.ended_at, stream.reason) == (5.0, 7.5, Reason.COMPLETE)


async def test_stream_whose_time_is_over_while_it_is_brought_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        b.is_there(ended=7.5)
        b.redis.entries.clear()
        with pytest.raises(UnknownStreamError):
            await b.registry.find(ID)
        assert b.registry.replay_bytes == 0
        assert b.shared.following.get(ID) is None


@pytest.mark.parametrize("read", [False, True])
async def test_stream_that_is_withdrawn_while_it_is_brought(monkeypatch: pytest.MonkeyPatch, read: bool) -> None:
    """Who asked for it may find its key free. Who reads it meanwhile is told its end, and does not wait for ever."""
    async with bed(monkeypatch) as b:
        b.is_there(count=0)
        reading: list[Reading] = []

        def withdrawn(call: Attend) -> Attended:
            for each in call.streams:
                stream = b.shared.following.get(each.keys.id)
                if read and stream is not None and not reading:
                    reading.append(Reading(stream))
            return Attended(1000, [Lease(None, 0, True)] * len(call.streams))

        b.redis.answers[Attend] = withdrawn
        if read:
            assert await b.registry.find(ID) is reading[0]._stream
            assert reading[0]._stream.reason is Reason.ERROR
        else:
            with pytest.raises(UnknownStreamError):
                await b.registry.find(ID)
            assert b.registry.replay_bytes == 0
        assert b.shared.following.get(ID) is None


async def test_first_readers_who_were_told_of_a_stream_elsewhere_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its producer would otherwise end it before they have come, where nobody else reads it."""
    async with bed(monkeypatch) as b:
        b.is_there()
        told: list[int] = []

        def attend(call: Attend) -> Attended:
            told.extend(stream.moved_ms for stream in call.streams)
            return b.attend(call)

        b.redis.answers[Attend] = attend
        stream = await b.registry.find(ID)
        stream.leave.expect_reader(asyncio.get_running_loop().time() + 10)
        await eventually(lambda: bool(told) and 9000 < told[-1] <= 10_000)


async def test_stream_that_was_only_looked_at_is_let_go_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        b.is_there()
        b.is_there("B" * 22)
        await b.registry.find(ID)
        read = Reading(await b.registry.find("B" * 22))
        await eventually(lambda: b.read_here.get("B" * 22, False))
        now = asyncio.get_running_loop().time()
        b.shared.following.sweep(now + 1)
        assert await b.registry.find(ID) is await b.registry.find(ID)
        b.shared.following.sweep(now + 60)
        await eventually(lambda: not b.read_here[ID])
        assert b.read_here["B" * 22]
        b.waits.arrivals.put_nowait([])
        await eventually(lambda: list(b.waits.calls_of(Read)[-1].after) == [StreamKeys("B" * 22).entries])
        read.leave()
        b.shared.following.sweep(now + 120)
        assert b.registry.replay_bytes == 0
        # Whoever asks again gets it again.
        assert (await b.registry.find(ID)).events == 2


async def test_end_that_comes_is_kept_and_counted_and_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch, retention_s=1) as b:
        b.is_there()
        stream = await b.registry.find(ID)
        frames, last = ending(ID, 2, Reason.COMPLETE, None, USAGE)
        b.waits.arrivals.put_nowait([(StreamKeys(ID).entries, [entry(2, last, frames)])])
        await eventually(lambda: stream.reason is Reason.COMPLETE)
        assert b.registry.replay_bytes == stream.log.tail + KEPT_BYTES
        assert await b.registry.find(ID) is stream
        assert b.registry.get(ID) is stream
        assert b.shared.following._followed == {}
        await eventually(lambda: b.registry.replay_bytes == 0)


async def test_streams_of_others_need_room_like_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch, replay_bytes=2048) as b:
        own = b.create()
        own.publish(frame("content_block_delta", "x" * 2048, f"{own.id}.1"), 1)
        b.is_there()
        with pytest.raises(RequestError) as caught:
            await b.registry.find(ID)
        assert caught.value.status == 503


async def test_usage_of_a_stream_that_runs_elsewhere_is_what_its_frames_say() -> None:
    log, anthropic = MemoryLog(ReplayMemory(1 << 30)), Anthropic(Settings())
    stream = FollowedStream(ID, log, anthropic, now=0.0, created_at=0.0, on_end=lambda _: None)
    data = '{"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}'
    stream.publish(frame("message_start", data, f"{ID}.1"), 1)
    stream.publish(frame("message_delta", '{"type":"message_delta","usage":{"output_tokens":80}}', f"{ID}.2"), 2)
    assert stream.usage == {"input_tokens": 25, "output_tokens": 80}


async def test_ids_that_were_here_are_not_remembered_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        for number in range(20_000):
            b.registry._table.note_gone(f"{number:022}")
        assert len(b.registry._table._past) <= 10_000
        # The last ones are, and are asked for once.
        assert not await b.shared.following.bring(f"{19_999:022}")
        assert b.redis.count(Look) == 1


# --- leaving ------------------------------------------------------------------------------------------------------


async def test_instance_that_closes_says_that_nobody_reads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        b.is_there()
        Reading(await b.registry.find(ID))
        await eventually(lambda: b.read_here.get(ID, False))
    assert b.read_here == {ID: False}


async def test_stream_has_a_grace_for_readers_that_have_come_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are heard of with the next renewal but one at the latest."""
    async with bed(monkeypatch) as b:
        stream, cancelled = b.create(leave_s=5), b.create(leave_s=0)
        reader = Reading(stream)
        reader.leave()
        now = asyncio.get_running_loop().time()
        grace_s = b.shared.leave_grace_s
        assert grace_s > 0
        b.registry._sweep._look_at_stream(stream, now + 5 + grace_s / 2)
        assert b.registry.active_streams == 2
        b.registry._sweep._look_at_stream(stream, now + 6 + grace_s)
        assert stream.reason is Reason.ABANDONED
        Reading(cancelled).leave()
        assert cancelled.reason is Reason.ABANDONED


async def test_readers_elsewhere_hold_a_stream_as_readers_here_do(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch, read_ahead_bytes=4096, receive_buffer_bytes=4096) as b:
        stream = b.create()
        b.elsewhere[stream.id] = 1, 0
        await eventually(lambda: stream.readers == 1)
        stream.publish(frame("content_block_delta", "x" * 5000, f"{stream.id}.1"), 1)
        assert held(stream)
        b.elsewhere[stream.id] = 1, stream.log.tail
        await eventually(lambda: not held(stream))
        stream.publish(frame("content_block_delta", "x" * 5000, f"{stream.id}.2"), 2)
        assert held(stream)
        # Gone while they held it back: it stands until it is read again, and does not run on into the memory.
        b.shared.elsewhere.read_elsewhere(stream.id, 0, 0, stalled=False)
        assert stream.readers == 0
        assert held(stream)


async def test_reader_elsewhere_that_stalled_before_it_held_the_stream_back_is_its_brake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bed(monkeypatch, read_ahead_bytes=4096, receive_buffer_bytes=4096) as b:
        for stalled in (True, False):
            stream = b.create(leave_s=60)
            b.elsewhere[stream.id] = 1, 0
            await eventually(lambda stream=stream: stream.readers == 1)  # type: ignore[misc]
            stream.publish(frame("content_block_delta", "x" * 500, f"{stream.id}.1"), 1)
            assert not held(stream)
            b.shared.elsewhere.read_elsewhere(stream.id, 0, 0, stalled=stalled)
            assert stream.readers == 0
            stream.publish(frame("content_block_delta", "x" * 5000, f"{stream.id}.2"), 2)
            assert held(stream) is stalled


async def test_time_of_readers_that_others_have_moved_is_never_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        stream = b.create(leave_s=0)
        now = asyncio.get_running_loop().time()
        b.shared.elsewhere.moved_elsewhere(stream.id, 12.0)
        b.shared.elsewhere.moved_elsewhere(stream.id, 3.0)
        b.shared.elsewhere.moved_elsewhere("unknown", 3.0)
        Reading(stream).leave()
        assert stream.reason is None
        assert now + 12 <= (stream.leave.ends_at or 0) < now + 13


def held(stream: Stream) -> bool:
    return stream.holds_back


async def test_stream_that_others_have_ended_is_not_generated_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        known, unknown = b.create(), b.create()
        await eventually(lambda: b.upstream.waiting == 2)
        frames, last = ending(known.id, 0, Reason.STOPPED, None, USAGE)
        b.shared.elsewhere.lost(known.id, frames, last)
        b.shared.elsewhere.lost(unknown.id, b"", 0)
        assert (known.reason, unknown.reason) == (Reason.STOPPED, Reason.PRODUCER_LOST)
        await eventually(lambda: b.upstream.waiting == 0)


# --- keys ---------------------------------------------------------------------------------------------------------


def withdrawn(b: Bed) -> list[tuple[str | None, bool]]:
    """Each claim that was taken back, by its key's digest, and whether it may still be on its way."""
    return [(call.digest, call.refused_ms > 0) for call in b.redis.calls_of(Withdraw)]


async def test_claim_without_an_answer_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been heard, or will be: the key would stay with a stream that never began."""
    async with bed(monkeypatch) as b:
        b.redis.fails(Claim, exceptions.TimeoutError())
        with pytest.raises(LogUnavailableError):
            await b.registry.create_once(KEY, Question([b"{}"], digest=b"d"), 60)
        await eventually(lambda: len(withdrawn(b)) == 1)
        [claim] = b.redis.calls_of(Claim)
        assert withdrawn(b) == [(claim.digest, True)]
        assert b.registry.generations == 0


async def test_claim_whose_client_leaves_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        b.redis.held.add(Claim)
        asking = asyncio.create_task(b.registry.create_once(KEY, Question([b"{}"], digest=b"d"), 60))
        await eventually(lambda: b.redis.count(Claim) == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        b.redis.held.clear()
        await eventually(lambda: len(withdrawn(b)) == 1)
        assert b.registry.generations == 0


async def test_key_that_is_refused_for_room_is_free_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch, max_streams=1) as b:
        b.create()
        with pytest.raises(RequestError) as caught:
            await b.registry.create_once(KEY, Question([b"{}"], digest=b"d"), 60)
        assert caught.value.status == 503
        await eventually(lambda: len(withdrawn(b)) == 1)
        [claim] = b.redis.calls_of(Claim)
        assert withdrawn(b)[0][0] == claim.digest


async def test_key_is_refused_at_once_while_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would wait for Redis's timeout, and all who come with the same key behind it."""
    async with bed(monkeypatch) as b:
        await in_trouble(b, b.create())
        assert not b.registry.hands_over
        with pytest.raises(LogUnavailableError):
            await b.registry.create_once(KEY, Question([b"{}"], digest=b"d"), 60)
        assert b.redis.count(Claim) == 0


async def test_key_names_its_caller_too_and_is_told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        for who, key in ((b"who", "key"), (b"other", "key"), (b"who", "yek")):
            await b.registry.create_once((who, key), Question([b"{}"], digest=b"d"), 60)
        digests = [call.digest for call in b.redis.calls_of(Claim)]
        assert len(set(digests)) == 3
        assert all(len(digest) == 43 and "key" not in digest for digest in digests)


async def test_key_of_another_question_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch) as b:
        b.redis.answers[Claim] = lambda _call: Holder(ID, "of another")
        with pytest.raises(KeyReusedError):
            await b.registry.create_once(KEY, Question([b"{}"], digest=b"d"), 60)


def drain(b: Bed) -> asyncio.Task[None]:
    return asyncio.create_task(Drain(b.settings, b.registry, Farewell(b.settings)).run(report=lambda *_: None))


# --- going --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["idle", "at the end"])
async def test_drain_ends_when_others_can_read_everything(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    async with bed(monkeypatch, drain_s=20) as b:
        stream = b.create()
        await eventually(lambda: b.shared.behind == 0)
        b.redis.held.add(Append)
        close = b.registry.close
        behind = []

        async def closing() -> None:
            behind.append(b.shared.behind)
            await close()

        monkeypatch.setattr(b.registry, "close", closing)
        if when == "idle":
            stream.finish(Reason.COMPLETE)
        draining = drain(b)
        await asyncio.sleep(0.01)
        stream.finish(Reason.COMPLETE)
        await eventually(lambda: b.redis.count(Append) > 0)
        await asyncio.sleep(0.1)
        assert not draining.done()
        b.redis.held.clear()
        async with asyncio.timeout(9):
            await draining
        assert behind == [0]  # closing waits for a moment, too


class Told:
    """A reader that is told to come back elsewhere, at times that the test says."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.told_s = self.stalled_s = 0.0
        self.controls: list[bytes] = []
        self.parted = self.evicted = False
        self.buffered_bytes = 0

    def tell(self, control: bytes) -> None:
        self.controls.append(control)

    def told_for(self, _now: float) -> float:
        return self.told_s

    def stalled_for(self, _now: float) -> float:
        return self.stalled_s

    def beat(self, _now: float, _heartbeat_s: float, _sweep_s: float) -> bool:
        return False

    def part(self) -> None:
        self.parted = True

    def evict(self) -> None:
        self.evicted = True


async def test_drain_moves_who_has_heard_it_and_cuts_off_who_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(monkeypatch, drain_s=20) as b:
        stream = b.create()
        told, fresh, stalled = (Told(stream) for _ in range(3))
        told.told_s = 1.0
        stalled.stalled_s = 3.0
        fresh.told_s = 0.9
        fresh.stalled_s = 2.9
        with contextlib.ExitStack() as reading:
            for reader in (told, fresh, stalled):
                reading.enter_context(b.registry.reading(cast("Any", reader)))
            draining = asyncio.create_task(
                Drain(b.settings, b.registry, Farewell(b.settings)).run(report=lambda *_: None)
            )
            await eventually(lambda: told.parted and stalled.evicted)
            assert (told.evicted, stalled.parted) == (False, False)
            assert (fresh.parted, fresh.evicted) == (False, False)
            assert all(b'"resume":true' in reader.controls[0] for reader in (told, fresh, stalled))
            # For as long as they may take to come back the stream does not end for want of a reader.
            assert stream.leave.moved_until > asyncio.get_running_loop().time() + b.settings.reconnect_spread_s
        stream.finish(Reason.COMPLETE)
        await draining


async def test_drain_moves_nobody_while_the_log_is_in_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here alone they can go on."""
    async with bed(monkeypatch, drain_s=20) as b:
        stream = b.create()
        reader = Told(stream)
        with b.registry.reading(cast("Any", reader)):
            draining = asyncio.create_task(
                Drain(b.settings, b.registry, Farewell(b.settings)).run(report=lambda *_: None)
            )
            await eventually(lambda: bool(reader.controls))
            await in_trouble(b, stream)
            reader.told_s = 5.0
            await asyncio.sleep(0.3)
            assert not reader.parted
            b.redis.answers[Append] = takes
            await eventually(lambda: reader.parted)
        stream.finish(Reason.COMPLETE)
        await draining


# --- over HTTP ----------------------------------------------------------------------------------------------------

STATE = {"Accept": "application/json"}


async def test_state_is_said_as_json_by_a_server_that_goes(
    monkeypatch: pytest.MonkeyPatch, simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    """Readers are sent elsewhere with an event stream; who asks for JSON could make nothing of one."""
    async with server(monkeypatch, simulator, drain_s=20) as (_, running):
        question = prompt("[[tokens=100000 pace=100]]")
        async with client.post(running.chat, json=question, headers={"Prefer": "respond-async"}) as answer:
            url = running.url + answer.headers["Location"]
        draining = asyncio.create_task(running.drain.run(report=lambda *_: None))
        await eventually(lambda: running.registry.draining)
        async with client.get(url, headers=STATE) as answer:
            assert (answer.status, answer.content_type) == (200, "application/json")
        async with client.delete(url) as answer:
            assert answer.status == 204
        await draining


async def test_event_source_comes_back_where_nobody_knows_for_the_moment(
    monkeypatch: pytest.MonkeyPatch, simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    """A native one gives up for good on a 503."""
    async with server(monkeypatch, simulator) as (b, running):
        b.redis.fails(Look, exceptions.ConnectionError())
        url = f"{running.chat}/{ID}"
        async with client.get(url, headers={"Accept": "text/event-stream"}) as answer:
            assert (answer.status, answer.content_type) == (200, "text/event-stream")
            text = (await answer.content.readuntil(b"\n\n")).decode()
            assert "event: reconnect" in text
        async with client.get(url, headers=STATE) as answer:
            assert answer.status == 503
