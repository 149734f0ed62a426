"""The registry: admission, leaving, and how all of it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import TYPE_CHECKING

import pytest
from conftest import Server, eventually, prompt, serving
from rawclient import RawClient
from registry_bed import Attached, Bed, FailingUpstream, SilentUpstream, bed, goes_on, publish, sweeps
from structlog.testing import capture_logs

from aisse.errors import LimitError, RequestError, UpstreamError
from aisse.formats.anthropic import AnthropicFollower
from aisse.streams import sweep as sweep_module
from aisse.streams.endings import Reason
from aisse.streams.reader import Reader
from aisse.streams.relay import Relay
from aisse.streams.stream import Stream

if TYPE_CHECKING:
    from aisse.formats.format import Mark
    from aisse.simulator import Simulator


@pytest.fixture
def fast_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep each 50 ms instead of each second."""
    monkeypatch.setattr(sweep_module, "SWEEP_S", 0.05)


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


# --- what is left -------------------------------------------------------------------------------------------------


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


# --- idle ---------------------------------------------------------------------------------------------------------


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
