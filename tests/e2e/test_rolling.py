"""A short rolling restart; `make rolling` runs a longer one."""

from __future__ import annotations

import os

import pytest
from rolling import roll

from nginx import found


async def test_rolling_restart_loses_no_answer_that_fits_into_the_drain() -> None:
    binary = next((path for path in found().values() if path is not None), None)
    if binary is None:
        assert "nginx" not in os.environ.get("TESTS_REQUIRE", "").split(",")
        pytest.skip("nginx is not there")
    seen = await roll(binary, streams=30, rounds=1, drain_s=4)
    assert seen.flawless, seen.table()
    # It was a restart under load, and some answers could not end in time.
    assert seen.told > 0
    assert seen.reasons["complete"] > 30
    assert seen.reasons["shutdown"] > 0
