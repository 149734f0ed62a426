"""What readers are told while the process shuts down."""

from __future__ import annotations

from rawclient import parse

from aisse.settings import Settings
from aisse.streams.farewell import Farewell


async def test_times_to_come_back_are_spread_evenly() -> None:
    farewell = Farewell(Settings(reconnect_spread_s=5))
    times = [parse(farewell.event(resume=False)).controls[0].retry_ms for _ in range(10_000)]
    assert min(times) >= 0
    assert max(times) <= 5000
    tenths = [sum(500 * tenth <= time < 500 * (tenth + 1) for time in times) for tenth in range(10)]
    # 1,000 each, give or take 30: this is seven times that.
    assert all(800 < count < 1200 for count in tenths), tenths
