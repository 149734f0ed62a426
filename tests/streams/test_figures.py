"""What operators see of the streams."""

from __future__ import annotations

import pytest
from conftest import eventually
from registry_bed import FailingUpstream, bed, sweeps

from aisse.streams import sweep as sweep_module
from aisse.streams.endings import Reason


@pytest.fixture
def fast_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep each 50 ms instead of each second."""
    monkeypatch.setattr(sweep_module, "SWEEP_S", 0.05)


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
