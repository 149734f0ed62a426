"""A short rolling restart; `make rolling` runs a longer one."""

from __future__ import annotations

import os

import pytest
from node import NodeMissingError
from redis_server import any_binary
from rolling import roll

from nginx import found


async def test_rolling_restart_moves_every_answer_and_loses_none() -> None:
    required = os.environ.get("TESTS_REQUIRE", "").split(",")
    binary = next((path for path in found().values() if path is not None), None)
    if binary is None:
        assert "nginx" not in required
        pytest.skip("nginx is not there")
    try:
        # Answers that take less than half of a drain fit into it, however late a busy machine begins them.
        seen = await roll(binary, any_binary(), streams=40, restarts=3, drain_s=5, longest=0.4)
    except NodeMissingError as error:
        if "node" in required:
            raise
        pytest.skip(str(error))
    assert seen.whole, seen.table()
    # It was a restart under load: readers were moved, and some answers could not end in time.
    assert len(seen.moves) > 10
    assert seen.reasons["complete"] > 40
    assert seen.reasons["shutdown"] > 0
