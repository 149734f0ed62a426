"""Streams that are kept, and the memory of all."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import pytest
from conftest import eventually
from registry_bed import Attached, FailingUpstream, bed, publish, sweeps

from aisse.errors import RequestError
from aisse.streams import sweep as sweep_module
from aisse.streams.endings import Reason
from aisse.streams.stream import State
from aisse.streams.table import KEPT_BYTES

if TYPE_CHECKING:
    from aisse.streams.registry import Registry


@pytest.fixture
def fast_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep each 50 ms instead of each second."""
    monkeypatch.setattr(sweep_module, "SWEEP_S", 0.05)


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
