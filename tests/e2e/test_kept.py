"""What a process of ours takes of the machine's memory, beside what it counts."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import aiohttp
import pytest
from command import Command, health, served

SOAK = os.environ.get("TESTS_SOAK") == "1"
ANSWERS = 2_000 if SOAK else 300

# So many frees before that the heap has its shape.
WARM_UP = 100


# 16 KiB are a segment of the log: a little of one, a little more than one, and than two.
@pytest.mark.parametrize("tokens", [30, 110, 120, 160, 220, 700] if SOAK else [120, 220])
async def test_kept_answers_take_at_most_a_fifth_more_than_is_counted(tokens: int) -> None:
    environ = {"AISSE_REPLAY_BYTES": "1GiB", "AISSE_RETENTION_S": "3600"}
    async with served("--upstream", "simulator", environ=environ) as server, aiohttp.ClientSession() as client:
        await _ask(client, server, tokens, WARM_UP)
        resident, counted = _resident_bytes(server), (await health(client, server))["replayBytes"]
        await _ask(client, server, tokens, ANSWERS)
        resident, counted = _resident_bytes(server) - resident, (await health(client, server))["replayBytes"] - counted
    assert resident <= 1.2 * counted + (1 << 20)  # what else a process takes now and then


async def _ask(client: aiohttp.ClientSession, server: Command, tokens: int, times: int) -> None:
    """Twenty at a time, as their frees have to mix."""
    question = {"messages": [{"role": "user", "content": f"[[tokens={tokens} pace=0]]"}]}
    left = iter(range(times))

    async def some() -> None:
        for _ in left:
            async with client.post(server.url + "/api/chat", json=question) as response:
                assert (await response.read()).count(b"\nevent: end\n") == 1

    await asyncio.gather(*(some() for _ in range(20)))


def _resident_bytes(server: Command) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10
