"""The registry: admission, memory, leaving, and one sweep that nothing may stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import random
import time
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest
from conftest import Server, eventually, prompt, serving
from rawclient import RawClient
from structlog.testing import capture_logs

from aisse.errors import LimitError, RequestError, UpstreamError
from aisse.formats.anthropic import Anthropic, AnthropicFollower
from aisse.settings import Settings
from aisse.sse import frame
from aisse.streams import sweep as sweep_module
from aisse.streams.endings import Reason
from aisse.streams.reader import Reader
from aisse.streams.registry import Registry
from aisse.streams.relay import Relay
from aisse.streams.stream import State, Stream
from aisse.streams.table import KEPT_BYTES
from aisse.upstream.client import Upstream
from aisse.upstream.question import Question

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aisse.formats.format import Mark
    from aisse.simulator import Simulator
    from aisse.upstream.connection import UpstreamResponse

NOWHERE = "http://127.0.0.1:9"


class SilentUpstream(Upstream):
    """Never answers. `waiting` is how many requests wait for it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(NOWHERE, settings, Anthropic(settings))
        self.waiting = 0

    async def open(self, question: Question) -> UpstreamResponse:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        raise AssertionError


class FailingUpstream(SilentUpstream):
    """Has a bug in it for the body `bug`, refuses `refuse`, and is silent for every other."""

    async def open(self, question: Question) -> UpstreamResponse:
        body = question.pieces[0]
        if body == b"bug":
            raise KeyError("a bug")
        if body == b"refuse":
            raise UpstreamError("invalid_request_error", "no", 400, None, 400)
        if body == b"fail":
            raise UpstreamError("api_error", "failed", 502, None, 500)
        return await super().open(question)


class Attached:
    """A reader at the tail, as far as a stream knows."""

    def __init__(self, stream: Stream) -> None:
        self.position = 0
        self.got = b""
        self._stream = stream
        stream.attach(self)
        stream.catch_up(self)

    def push(self, frames: bytes) -> bool:
        self.got += frames
        return True

    def wake(self) -> None:
        pass

    def leave(self) -> None:
        self._stream.detach(self)


class Bed:
    """A registry in front of an upstream that does not answer: streams that do what the test says."""

    def __init__(self, kind: type[SilentUpstream], **settings: Any) -> None:
        self.settings = Settings.model_validate({"upstream": NOWHERE, **settings})
        self.upstream = kind(self.settings)
        self.registry = Registry(self.settings, self.upstream)

    def create(self, body: bytes = b"{}", leave_s: float = 60.0) -> Stream:
        return self.registry.create(Question([body]), leave_s)

    def finished(self, size: int = 1000) -> Stream:
        """A stream of at least `size` bytes that is complete."""
        stream = self.create()
        publish(stream, size)
        stream.finish(Reason.COMPLETE)
        return stream

    @property
    def kept(self) -> list[Stream]:
        """Finished streams that can still be read again, oldest end first."""
        return list(self.registry._table.kept.values())


def goes_on(stream: Stream) -> bool:
    return stream.reason is None


def publish(stream: Stream, size: int = 1000) -> None:
    stream.begin()
    seq = stream.log.last_seq + 1
    stream.publish(frame("content_block_delta", "x" * size, f"{stream.id}.{seq}"), seq)


@contextlib.asynccontextmanager
async def bed(kind: type[SilentUpstream] = SilentUpstream, **settings: Any) -> AsyncIterator[Bed]:
    bed = Bed(kind, **settings)
    await bed.registry.start()
    try:
        yield bed
    finally:
        await bed.registry.close()


@pytest.fixture
def fast_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep each 50 ms instead of each second."""
    monkeypatch.setattr(sweep_module, "SWEEP_S", 0.05)


def sweeps(registry: Registry) -> Callable[[int], Callable[[], bool]]:
    """Gives conditions: so many whole sweeps have ended since this call."""
    loop = asyncio.get_running_loop()
    since = loop.time()

    def ended(count: int) -> Callable[[], bool]:
        return lambda: sum(at > since for at, _ in registry.figures._rate._samples) >= count

    return ended


# --- admission ----------------------------------------------------------------------------------------------------


async def test_streams_up_to_the_limit_are_taken_and_one_past_it_refused() -> None:
    async with bed(max_streams=3) as b:
        streams = [b.create() for _ in range(3)]
        with pytest.raises(RequestError) as refused:
            b.create()
        assert (refused.value.status, refused.value.retry_after_s) == (503, 5)
        assert b.registry.generations == 3
        assert any("max_streams" in trouble for trouble in b.registry.figures.troubles())
        streams[0].finish(Reason.STOPPED)
        b.create()
        assert b.registry.active_streams == 3


async def test_client_past_the_limit_gets_503_and_when_to_come_back(simulator: Simulator) -> None:
    async with serving(simulator.url, max_streams=1, first_byte_commit_s=0) as server:
        async with await RawClient.connect(server.address) as first, await RawClient.connect(server.address) as second:
            await first.post(prompt("[[first_s=60]]"))
            await first.answered()
            await second.post(prompt("hello"))
            await second.answered()
            assert (second.status, second.headers["retry-after"]) == (503, "5")
            assert simulator.stats.requests <= 1
        # Nobody is left to read the first.
        await eventually(lambda: server.registry.readers == 0)


async def test_closing_registry_takes_no_streams() -> None:
    async with bed() as b:
        await b.registry.close()
        with pytest.raises(RequestError) as refused:
            b.create()
        assert refused.value.status == 503


async def test_ids_are_22_characters_that_never_repeat() -> None:
    async with bed() as b:
        ids = {b.create().id for _ in range(500)}
    assert len(ids) == 500
    assert {len(stream_id) for stream_id in ids} == {22}


# --- memory -------------------------------------------------------------------------------------------------------


async def test_finished_streams_go_oldest_end_first_when_memory_is_full() -> None:
    async with bed(replay_bytes=10_000) as b:
        running = [b.create() for _ in range(9)]
        for stream in running:
            publish(stream, 1000)
        # The last to begin is the first to end.
        for stream in reversed(running):
            stream.finish(Reason.COMPLETE)
        assert b.registry.replay_bytes >= 10_000
        assert b.kept == running[::-1]
        b.create()
        assert b.registry.replay_bytes < 10_000
        kept = b.kept
        assert 0 < len(kept) < 9
        assert kept == running[::-1][-len(kept) :]
        # No more than had to go.
        forgotten = running[::-1][-len(kept) - 1]
        assert forgotten.log.tail == 0
        assert b.registry.replay_bytes == sum(stream.log.tail + KEPT_BYTES for stream in kept)
        assert b.registry.replay_bytes + kept[0].log.tail + KEPT_BYTES >= 10_000


async def test_memory_below_its_limit_costs_no_stream() -> None:
    async with bed(replay_bytes=100_000) as b:
        streams = [b.finished() for _ in range(20)]
        assert b.kept == streams


async def test_finished_stream_that_is_read_is_kept_and_the_next_goes() -> None:
    async with bed(replay_bytes=4000 + 2 * KEPT_BYTES) as b:
        oldest = b.create()
        publish(oldest, 1500)
        reader = Attached(oldest)
        oldest.finish(Reason.COMPLETE)
        second, third = b.finished(1500), b.finished(1500)
        b.create()
        assert b.kept == [oldest, third]
        assert second.log.tail == 0
        reader.leave()
        b.finished(1500)
        b.create()
        assert oldest not in b.kept


async def test_memory_full_of_running_streams_refuses_new_ones_until_one_has_ended() -> None:
    async with bed(replay_bytes=4000) as b:
        streams = [b.create() for _ in range(4)]
        for stream in streams:
            publish(stream, 1000)
        with pytest.raises(RequestError) as refused:
            b.create()
        assert (refused.value.status, refused.value.retry_after_s) == (503, 5)
        assert any("replay_bytes" in trouble for trouble in b.registry.figures.troubles())
        assert [stream.state for stream in streams] == [State.STREAMING] * 4
        streams[2].finish(Reason.STOPPED)
        assert not b.registry.figures.troubles()
        b.create()
        assert b.kept == []


@pytest.mark.usefixtures("fast_sweep")
async def test_sweep_makes_room_without_a_new_stream() -> None:
    async with bed(replay_bytes=4000) as b:
        b.finished()
        running = b.create()
        publish(running, 5000)
        await eventually(lambda: b.kept == [])
        assert b.registry.replay_bytes == running.log.tail


@pytest.mark.usefixtures("fast_sweep")
async def test_finished_stream_is_kept_for_its_retention_and_for_as_long_as_it_is_read() -> None:
    loop = asyncio.get_running_loop()
    async with bed(retention_s=0.4) as b:
        read = b.create()
        reader = Attached(read)
        read.finish(Reason.COMPLETE)
        stream = b.finished()
        assert stream.ended is not None
        await eventually(lambda: stream not in b.kept)
        assert loop.time() - stream.ended >= 0.4
        assert b.kept == [read]
        reader.leave()
        await eventually(lambda: b.kept == [])
        assert b.registry.replay_bytes == 0


async def test_look_up_costs_as_much_among_thousands_of_streams_as_among_few() -> None:
    """In CPU time, where the machine was least disturbed; one that walked over all streams would be 100 times off."""

    def cost(registry: Registry, ids: list[str]) -> float:
        looked_up = random.Random(1).choices(ids, k=500)
        spent = []
        for _ in range(7):
            began = time.process_time()
            for stream_id in looked_up:
                registry.get(stream_id)
            spent.append(time.process_time() - began)
        return min(spent)

    async with bed() as few, bed() as many:
        ids = {b: [b.finished(1).id for _ in range(count)] for b, count in ((few, 10), (many, 5000))}
        assert cost(many.registry, ids[many]) < 20 * cost(few.registry, ids[few])


@pytest.mark.usefixtures("fast_sweep")
async def test_stream_that_ran_for_longer_than_the_retention_is_kept_for_all_of_it_from_its_end_on() -> None:
    async with bed(retention_s=60) as b:
        stream = b.create()
        stream.created -= 3600
        publish(stream)
        stream.finish(Reason.COMPLETE)
        await eventually(sweeps(b.registry)(3))
        assert b.kept == [stream]


async def test_stream_that_was_refused_before_its_commit_is_not_kept() -> None:
    async with bed(FailingUpstream) as b:
        stream = b.create(b"refuse")
        await eventually(lambda: b.registry.active_streams == 0)
        assert stream.reason is Reason.ERROR
        assert b.kept == []
        assert b.registry.replay_bytes == 0


@pytest.mark.usefixtures("fast_sweep")
async def test_forgotten_streams_are_garbage(simulator: Simulator) -> None:
    """Nothing else holds a stream, its relay or its reader once its record is gone."""
    async with serving(simulator.url, retention_s=0, leave_s=0) as server:
        before = alive()  # held on to: what earlier tests left behind must not go meanwhile, and hide what stays here
        for script in ("tokens=5", "tokens=4000 token_bytes=1000", "fault=error", "status=500"):
            async with await RawClient.connect(server.address) as client:
                await client.post(prompt(f"[[{script}]]"))
                await client.answered()
        await eventually(
            lambda: len(alive()) == len(before), timeout_s=30
        )  # each look goes through all objects of the process
        assert server.registry.generations == 4


def alive() -> list[object]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, Stream | Reader | Relay)]


# --- ending -------------------------------------------------------------------------------------------------------


async def test_end_closes_the_upstream_and_a_second_end_does_nothing() -> None:
    async with bed() as b:
        stream = b.create()
        reader = Attached(stream)
        await eventually(lambda: b.upstream.waiting == 1)
        with capture_logs() as logs:
            stream.finish(Reason.TIMEOUT, UpstreamError("timeout_error", "late", 504))
            stream.finish(Reason.STOPPED)
            stream.finish(Reason.LIMIT, LimitError("limit_error", "no"))
            await eventually(lambda: b.upstream.waiting == 0)
            await eventually(lambda: not b.registry._relays)
            stream.finish(Reason.STOPPED)
        assert stream.reason is Reason.TIMEOUT
        assert reader.got.count(b"event: end\n") == 1
        assert b.registry.figures.failed == 1
        assert [line["event"] for line in logs] == ["stream ended"]


async def test_close_ends_every_stream_as_shutdown_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    async with bed() as b:
        streams = [b.create() for _ in range(20)]
        readers = [Attached(stream) for stream in streams]
        await eventually(lambda: b.upstream.waiting == 20)
        await b.registry.close()
        assert asyncio.all_tasks() == before
        assert b.upstream.waiting == 0
        assert {stream.reason for stream in streams} == {Reason.SHUTDOWN}
        assert all(reader.got.count(b'"reason":"shutdown"') == 1 for reader in readers)
        await b.registry.close()
    assert asyncio.all_tasks() == before


async def test_close_right_after_create_leaves_no_task() -> None:
    """The relays' tasks have not run their first step then."""
    before = asyncio.all_tasks()
    async with bed() as b:
        stream = b.create()
    assert asyncio.all_tasks() == before
    assert stream.reason is Reason.SHUTDOWN


async def test_close_does_not_wait_for_an_upstream_that_never_ends_its_body(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aisse.streams.relay._TAIL_S", 60.0)
    async with serving(simulator.url) as server, await RawClient.connect(server.address) as client:
        await client.post(prompt("[[tokens=3 fault=stall at=1000]]"))
        await client.answered()
        await client.read_to_end()
        assert server.registry.active_streams == 0
        assert len(server.registry._relays) == 1
        async with asyncio.timeout(60):
            await server.registry.close()
        assert not server.registry._relays


async def test_close_of_a_registry_that_never_started_does_nothing() -> None:
    before = asyncio.all_tasks()
    await Bed(SilentUpstream).registry.close()
    assert asyncio.all_tasks() == before


async def test_server_that_is_stopped_under_load_leaves_no_task(simulator: Simulator) -> None:
    before = asyncio.all_tasks()
    async with contextlib.AsyncExitStack() as stack:
        async with serving(simulator.url, first_byte_commit_s=0) as server:
            for script in ("first_s=60", "thinking_s=60", "tokens=4000 token_bytes=1000", "fault=stall at=5"):
                client = await stack.enter_async_context(await RawClient.connect(server.address))
                await client.post(prompt(f"[[{script}]]"))
                await client.answered()
            await eventually(lambda: simulator.stats.active == 4)
            registry = server.registry
        assert registry.active_streams == 0
        assert registry.readers == 0
        await eventually(lambda: simulator.stats.active == 0)
    # The simulator's own handlers end as their connections are lost.
    await eventually(lambda: asyncio.all_tasks() == before)


# --- leaving ------------------------------------------------------------------------------------------------------


async def test_stream_with_leave_time_zero_ends_in_the_step_in_which_the_last_reader_leaves() -> None:
    async with bed() as b:
        stream = b.create(leave_s=0)
        first, second = Attached(stream), Attached(stream)
        first.leave()
        assert goes_on(stream)
        second.leave()
        assert stream.reason is Reason.ABANDONED
        await eventually(lambda: b.upstream.waiting == 0)
        assert b.registry.figures.failed == 0


@pytest.mark.usefixtures("fast_sweep")
async def test_stream_goes_on_for_its_leave_time_and_ends_as_abandoned() -> None:
    async with bed() as b:
        stream = b.create(leave_s=0.4)
        reader = Attached(stream)
        await eventually(sweeps(b.registry)(3))
        reader.leave()
        publish(stream)
        assert goes_on(stream)
        await eventually(lambda: stream.reason is not None)
        assert stream.reason is Reason.ABANDONED
        assert stream.leave.unread_since is not None
        assert stream.ended is not None
        # Compared as it is computed: a difference of two such sums may come out a rounding error short.
        assert stream.leave.unread_since + 0.4 <= stream.ended < stream.leave.unread_since + 5
        await eventually(lambda: b.upstream.waiting == 0)


@pytest.mark.usefixtures("fast_sweep")
async def test_reader_that_comes_back_within_the_leave_time_saves_the_stream() -> None:
    async with bed() as b:
        stream, other = b.create(leave_s=0.3), b.create(leave_s=0.3)
        for reader in (Attached(stream), Attached(other)):
            reader.leave()
        again = Attached(stream)
        await eventually(lambda: other.reason is Reason.ABANDONED)
        await eventually(sweeps(b.registry)(6))
        assert goes_on(stream)
        # Its time begins anew when that one leaves, too.
        again.leave()
        assert stream.leave.unread_since is not None
        await eventually(lambda: stream.reason is Reason.ABANDONED)
        assert stream.ended is not None
        assert stream.ended >= stream.leave.unread_since + 0.3


# --- the sweep ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast_sweep")
async def test_reader_whose_record_fails_costs_the_others_no_heartbeat(simulator: Simulator) -> None:
    class BadReader(Reader):
        def beat(self, *_: object) -> NoReturn:
            raise ZeroDivisionError("a bug")

    async with (
        serving(simulator.url, heartbeat_s=0.2, first_byte_commit_s=0, leave_s=0.3) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = []
        for _ in range(4):
            client = await stack.enter_async_context(await RawClient.connect(server.address))
            await client.post(prompt("[[first_s=60]]"))
            await client.answered()
            clients.append(client)
        streams = list(server.registry._table.running.values())
        body = prompt("[[first_s=60]]", model="m", max_tokens=1, stream=True)
        abandoned = server.registry.create(Question([json.dumps(body).encode()]), 0.3)
        Attached(abandoned).leave()
        with capture_logs() as logs, contextlib.ExitStack() as bad:
            # Before and after the others in whatever order the registry goes through them.
            for stream in [*streams, *streams]:
                bad.enter_context(server.registry.reading(BadReader(stream, server.settings)))
            for client in clients:
                await client.read_until(lambda client: client.written.heartbeats >= 3, timeout_s=60)
            await eventually(lambda: abandoned.reason is Reason.ABANDONED)
        assert any(line["event"] == "reader failed" for line in logs)
        assert [stream.reason for stream in streams] == [None] * 4


@pytest.mark.usefixtures("fast_sweep")
async def test_reader_whose_beat_fails_is_cut_off() -> None:
    """It would get no heartbeat, and log its fault again each second."""

    class Bad:
        buffered_bytes = 0
        evicted = False

        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def stalled_for(self, _now: float) -> float:
            return 0.0

        def beat(self, *_: object) -> NoReturn:
            raise ZeroDivisionError("a bug")

        def evict(self) -> None:
            self.evicted = True

    async with bed() as b:
        bad = Bad(b.create())
        with b.registry.reading(cast("Any", bad)):
            await eventually(lambda: bad.evicted)


class Stalled:
    """A reader whose client has taken nothing for so long."""

    buffered_bytes = 0

    def __init__(self, stream: Stream, stalled_s: float) -> None:
        self.stream = stream
        self.evicted = False
        self.beats = 0
        self._stalled_s = stalled_s

    def stalled_for(self, _now: float) -> float:
        return self._stalled_s

    def beat(self, *_: object) -> bool:
        self.beats += 1
        return False

    def evict(self) -> None:
        self.evicted = True


@pytest.mark.usefixtures("fast_sweep")
async def test_reader_that_takes_nothing_for_stall_s_is_cut_off_and_no_other() -> None:
    async with bed(stall_s=7) as b:
        stream = b.create()
        slow, stalled = Stalled(stream, 6.9), Stalled(stream, 7.0)
        with b.registry.reading(cast("Any", slow)), b.registry.reading(cast("Any", stalled)):
            await eventually(lambda: slow.beats >= 3)
        assert (slow.evicted, stalled.evicted) == (False, True)


async def test_registry_with_nothing_to_do_is_idle_at_once() -> None:
    """A drain would wait up to its deadline for what nobody will tell it."""
    async with bed() as b:
        b.finished()
        assert await b.registry.idle(0)


@pytest.mark.parametrize("what", ["answer", "reader", "stream"])
async def test_idle_comes_with_the_last(what: str) -> None:
    """A drain would find it out a second later."""
    async with bed() as b:
        with contextlib.ExitStack() as last:
            if what == "answer":
                last.enter_context(b.registry.answering())
            elif what == "reader":
                last.enter_context(b.registry.reading(Reader(b.finished(), b.settings)))
            else:
                last.callback(b.create().finish, Reason.COMPLETE)
            idle = asyncio.create_task(b.registry.idle(60))
            await asyncio.sleep(0)
            assert not idle.done()
        for _ in range(5):
            await asyncio.sleep(0)
        assert idle.done()
        assert await idle


@pytest.mark.usefixtures("fast_sweep")
async def test_stream_whose_record_fails_ends_and_the_others_are_looked_after(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed() as b:
        bad = b.create()
        late = b.create(leave_s=0.2)
        reader = Attached(bad)
        bad_relay, _ = b.registry._relays[bad.id]
        overdue = Relay.overdue

        def failing(self: Relay, now: float) -> Any:
            if self is bad_relay:
                raise ZeroDivisionError("a bug")
            return overdue(self, now)

        monkeypatch.setattr(Relay, "overdue", failing)
        Attached(late).leave()
        await eventually(lambda: late.reason is Reason.ABANDONED)
        assert bad.reason is Reason.ERROR
        assert reader.got.endswith(b"\n\n")
        assert reader.got.count(b'"reason":"error"') == 1
        assert b"a bug" not in reader.got
        await eventually(lambda: b.upstream.waiting == 0)


@pytest.mark.usefixtures("fast_sweep")
async def test_sweep_that_fails_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed(retention_s=0.05) as b:
        calls = 0

        def fail() -> NoReturn:
            nonlocal calls
            calls += 1
            raise ZeroDivisionError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(b.registry._table, "make_room", fail)
            await eventually(lambda: calls >= 3)
        b.finished()
        await eventually(lambda: b.kept == [])


@pytest.mark.usefixtures("fast_sweep")
async def test_sweep_over_hundreds_of_records_lets_others_run_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_BATCH", 10)
    async with bed(leave_s=0) as b:
        streams = [b.create() for _ in range(100)]
        looked_at: list[Relay] = []
        turns: list[int] = []
        overdue = Relay.overdue

        def counting(self: Relay, now: float) -> Any:
            looked_at.append(self)
            return overdue(self, now)

        monkeypatch.setattr(Relay, "overdue", counting)
        while len(looked_at) < 100:
            turns.append(len(looked_at))
            await asyncio.sleep(0)
        turns.append(len(looked_at))
        assert all(after - before <= 10 for before, after in itertools.pairwise(turns))
        # One that ends, and one that begins, while a sweep waits for its turn.
        streams[99].finish(Reason.STOPPED)
        b.create()
        await eventually(sweeps(b.registry)(2))
        assert b.registry.active_streams == 100


@pytest.mark.usefixtures("fast_sweep")
async def test_sweep_over_hundreds_of_readers_lets_others_run_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_BATCH", 10)
    async with bed() as b:
        stream = b.create()
        readers = [Stalled(stream, 0) for _ in range(100)]
        turns: list[int] = [0]
        with contextlib.ExitStack() as reading:
            for reader in readers:
                reading.enter_context(b.registry.reading(cast("Any", reader)))
            while turns[-1] < 100:
                await asyncio.sleep(0)
                turns.append(sum(reader.beats for reader in readers))
        assert all(after - before <= 10 for before, after in itertools.pairwise(turns))


async def test_lag_of_the_event_loop_is_measured() -> None:
    async with bed() as b:
        # A busy machine may make the first ones late.
        await eventually(lambda: len(b.registry.figures._rate._samples) > 0 and b.registry.figures.loop_lag_s < 0.5)
        # Nothing else runs until well past the next sweep.
        time.sleep(1.8)  # noqa: ASYNC251 - it is what is measured
        await eventually(lambda: b.registry.figures.loop_lag_s > 0.5)
        assert b.registry.figures.loop_lag_s < 10
        assert any("event loop" in trouble for trouble in b.registry.figures.troubles())
        await eventually(lambda: not b.registry.figures.troubles())


@pytest.mark.usefixtures("fast_sweep")
async def test_upstream_that_is_late_ends_its_stream_alone() -> None:
    async with bed(first_byte_s=0.3) as b:
        stream = b.create()
        await eventually(lambda: stream.reason is not None)
        assert stream.reason is Reason.TIMEOUT
        assert stream.ended is not None
        assert stream.ended - stream.created >= 0.3
        await eventually(lambda: b.upstream.waiting == 0)


@pytest.mark.usefixtures("fast_sweep")
async def test_rate_of_tokens_is_that_of_running_and_ended_streams() -> None:
    async with bed() as b:
        since = sweeps(b.registry)
        assert b.registry.figures.tokens_per_second() == 0
        await eventually(since(1))
        running, ended = b.create(), b.create()
        running.content_events = ended.content_events = 50
        ended.finish(Reason.COMPLETE)
        await eventually(since(3))
        (begun, before), (now, after) = b.registry.figures._rate._samples[0], b.registry.figures._rate._samples[-1]
        assert (before, after) == (0, 100)
        assert b.registry.figures.tokens_per_second() == pytest.approx(100 / (now - begun))


# --- bugs ---------------------------------------------------------------------------------------------------------


async def test_relay_that_fails_ends_its_stream_and_no_other() -> None:
    async with bed(FailingUpstream) as b:
        bad, good = b.create(b"bug"), b.create()
        reader, neighbour = Attached(bad), Attached(good)
        with capture_logs() as logs:
            await eventually(lambda: bad.reason is not None)
        assert bad.reason is Reason.ERROR
        assert reader.got.count(b"event: end\n") == 1
        assert b"a bug" not in reader.got
        assert [line["event"] for line in logs] == ["relay failed", "stream ended"]
        assert good.reason is None
        publish(good)
        assert neighbour.got
        assert b.registry.active_streams == 1
        assert b.registry.figures.failed == 1


async def test_relay_that_is_cancelled_by_somebody_else_ends_its_stream() -> None:
    async with bed() as b:
        stream = b.create()
        reader = Attached(stream)
        await eventually(lambda: b.upstream.waiting == 1)
        _, task = b.registry._relays[stream.id]
        task.cancel()
        await eventually(lambda: stream.reason is not None)
        assert stream.reason is Reason.ERROR
        assert reader.got.count(b"event: end\n") == 1
        assert b.registry.active_streams == 0


async def test_client_of_a_relay_that_fails_gets_an_end_and_its_neighbour_its_answer(
    server: Server, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = AnthropicFollower.observe

    def failing(self: AnthropicFollower, event_type: bytes, body: bytes) -> Mark:
        if b"poison" in body:
            raise ZeroDivisionError("a bug")
        return observe(self, event_type, body)

    monkeypatch.setattr(AnthropicFollower, "observe", failing)
    async with await RawClient.connect(server.address) as bad, await RawClient.connect(server.address) as good:
        await good.post(prompt("[[tokens=60 pace=100]]"))
        await bad.post(prompt("[[text='one two poison three' pace=20]]"))
        for client in (bad, good):
            await client.answered()
            await client.read_to_end()
            assert client.body.ended
        assert '"reason":"error"' in bad.written.frames[-1].data
        assert [frame.event for frame in bad.written.frames[-2:]] == ["error", "end"]
        assert '"reason":"complete"' in good.written.frames[-1].data
        assert sum(frame.event == "content_block_delta" for frame in good.written.frames) == 60
    # The upstream's connection is closed, not left to run.
    await eventually(lambda: simulator.stats.active == 0)


async def test_failures_of_the_upstream_in_a_row_are_a_trouble_and_refused_requests_are_none() -> None:
    async with bed(FailingUpstream) as b:
        for _ in range(10):
            b.create(b"refuse")
        await eventually(lambda: b.registry.active_streams == 0)
        assert not b.registry.figures.troubles()
        assert b.registry.figures.failed == 10
        for _ in range(5):
            b.create(b"fail")
        await eventually(lambda: b.registry.active_streams == 0)
        assert any("upstream failed" in trouble for trouble in b.registry.figures.troubles())
        b.finished()
        assert not b.registry.figures.troubles()
