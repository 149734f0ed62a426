"""One look a second at every reader and stream, which nothing may stop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest
from conftest import eventually, prompt, serving
from rawclient import RawClient
from registry_bed import Attached, bed, sweeps
from structlog.testing import capture_logs

from aisse.streams import sweep as sweep_module
from aisse.streams.endings import Reason
from aisse.streams.reader import Reader
from aisse.streams.relay import Relay
from aisse.upstream.question import Question

if TYPE_CHECKING:
    from aisse.simulator import Simulator
    from aisse.streams.stream import Stream


@pytest.fixture
def fast_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep each 50 ms instead of each second."""
    monkeypatch.setattr(sweep_module, "SWEEP_S", 0.05)


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
