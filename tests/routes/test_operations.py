"""Health: every field, and what makes a service unhealthy, not ready or full."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Server, eventually, prompt, serving
from raw import connected, request

import aisse
from aisse.streams.sweep import SWEEP_S
from aisse.streams.table import KEPT_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aisse.simulator import Simulator

FIELDS: dict[str, type | tuple[type, ...]] = {
    "status": str,
    "activeStreams": int,
    "totalRequests": int,
    "failedRequests": int,
    "totalTokens": int,
    "uptimeSeconds": int,
    "memoryMB": int,
    "tokensPerSecond": (int, float),
    "readers": int,
    "stalledReaders": int,
    "oldestStallSeconds": (int, float),
    "bufferedBytes": int,
    "replayBytes": int,
    "bodiesBytes": int,
    "eventLoopLagMs": (int, float),
    "logLinesDropped": int,
    "log": str,
    "upstream": str,
    "version": str,
}

HUGE = "[[tokens=100000 token_bytes=2000]]"
ENDLESS = "[[tokens=1000000 pace=100]]"


async def health(server: Server) -> dict[str, Any]:
    async with connected(server.address) as connection:
        await connection.send(request("GET", "/health"))
        answer = await connection.answer("GET")
    assert answer.status == 200
    said: dict[str, Any] = answer.json()
    return said


async def ask(server: Server, text: str) -> tuple[int, str]:
    """Status and body of a whole answer to `text`."""
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", json.dumps(prompt(text)).encode()))
        answer = await connection.answer()
        return answer.status, answer.body.decode()


@contextlib.asynccontextmanager
async def reading_nothing(server: Server, text: str) -> AsyncIterator[None]:
    """A client that asks, takes the headers, and then nothing."""
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", json.dumps(prompt(text)).encode()))
        assert (await connection.head()).status == 200
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's streams use one that can
        yield
        connection.reset()


async def test_health_of_an_idle_server_has_every_field(server: Server) -> None:
    said = await health(server)
    assert said.keys() == FIELDS.keys()
    for name, kind in FIELDS.items():
        assert isinstance(said[name], kind), name
        assert not isinstance(said[name], bool), name
    counts = {name: value for name, value in said.items() if value == 0}
    assert counts.keys() >= {
        *("activeStreams", "totalRequests", "failedRequests", "totalTokens", "tokensPerSecond"),
        *("readers", "stalledReaders", "oldestStallSeconds", "bufferedBytes", "replayBytes", "bodiesBytes"),
    }
    assert said["status"] == "healthy"
    assert said["logLinesDropped"] == 0
    assert said["log"] == "memory"
    assert said["upstream"] == server.settings.upstream
    assert said["version"] == aisse.__version__


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_probe_is_json_that_no_cache_keeps(server: Server, path: str, method: str) -> None:
    async with connected(server.address) as connection:
        await connection.send(request(method, path))
        answer = await connection.answer(method)
        assert answer.status == 200
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Type"].startswith("application/json")
        assert (answer.body == b"") == (method == "HEAD")
        assert await connection.usable()


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
async def test_probe_refuses_other_methods(server: Server, path: str) -> None:
    async with connected(server.address) as connection:
        await connection.send(request("POST", path, b"{}"))
        answer = await connection.answer()
        assert answer.status == 405
        assert answer.json()["type"] == "error"


async def test_probe_needs_no_token(simulator: Simulator) -> None:
    async with serving(simulator.url, access_tokens=("a-token-of-some-length",)) as server:
        assert (await health(server))["status"] == "healthy"


async def test_probe_of_a_foreign_page_is_not_for_it_to_read(simulator: Simulator) -> None:
    async with serving(simulator.url, cors_origins=("https://app.example",)) as server:
        async with connected(server.address) as connection:
            await connection.send(request("GET", "/health", None, {"Origin": "https://app.example"}))
            answer = await connection.answer("GET")
        assert "Access-Control-Allow-Origin" not in answer.headers


# --- counts ---------------------------------------------------------------------------------------------------


async def test_answers_are_counted_by_how_they_ended(simulator: Simulator) -> None:
    async with serving(simulator.url, leave_s=0) as server:

        async def counts() -> tuple[int, int, int]:
            said = await health(server)
            assert (said["activeStreams"], said["readers"]) == (0, 0)
            return said["totalRequests"], said["failedRequests"], said["totalTokens"]

        assert (await ask(server, "[[tokens=5 thinking_tokens=2]]"))[0] == 200
        assert await counts() == (1, 0, 7)

        # Left by its reader: abandoned, which is no failure. Its tokens were reported when it began.
        async with reading_nothing(server, HUGE):
            pass
        await eventually(lambda: server.registry.active_streams == 0)
        started, failed, tokens = await counts()
        assert (started, failed) == (2, 0)
        assert tokens == 7 + 1

        # Failed after it had begun, and refused by the upstream before.
        assert "event: error" in (await ask(server, "[[tokens=5 fault=cut at=700]]"))[1]
        assert (await counts())[:2] == (3, 1)
        assert "event: error" in (await ask(server, "[[tokens=5 fault=error at=3]]"))[1]
        assert (await counts())[:2] == (4, 2)
        for count, status in enumerate((400, 429, 500, 529), 1):
            assert (await ask(server, f"[[status={status}]]"))[0] in {400, 429, 502, 503}
            assert (await counts())[:2] == (4 + count, 2 + count)

        # Refused by ourselves: no generation, no failure.
        async with connected(server.address) as connection:
            await connection.send(request("POST", "/api/chat", b"{}"))
            assert (await connection.answer()).status == 400
        assert (await counts())[:2] == (8, 6)


async def test_tokens_of_a_running_answer_count_as_the_upstream_reports_them(server: Server) -> None:
    async with reading_nothing(server, "[[tokens=50 fault=stall at=10]]"):
        await eventually(lambda: server.registry.active_streams == 1)
        assert (await health(server))["totalTokens"] == 1  # message_start's


async def test_readers_and_streams_are_counted_while_they_last(simulator: Simulator) -> None:
    async with serving(simulator.url, leave_s=0) as server:
        async with reading_nothing(server, ENDLESS), reading_nothing(server, ENDLESS):
            said = await health(server)
            assert (said["activeStreams"], said["readers"], said["totalRequests"]) == (2, 2, 2)
            assert said["replayBytes"] > 0
        await eventually(lambda: server.registry.readers == 0)
        said = await health(server)
        assert (said["activeStreams"], said["readers"], said["totalRequests"]) == (0, 0, 2)


async def test_request_that_waits_for_its_upstream_counts_already(simulator: Simulator) -> None:
    async with serving(simulator.url, leave_s=0) as server, connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", json.dumps(prompt("[[first_s=3600]]")).encode()))
        await eventually(lambda: simulator.stats.active == 1)
        said = await health(server)
        assert (said["activeStreams"], said["readers"], said["totalRequests"]) == (1, 1, 1)


async def test_replay_bytes_are_what_answers_weigh_until_retention_is_over(simulator: Simulator) -> None:
    async with serving(simulator.url, retention_s=0) as server:
        _, text = await ask(server, "[[tokens=100]]")
        frames = text.partition("\n")[2].partition("\n")[2]  # without the opening, which is the response's own
        assert (await health(server))["replayBytes"] == len(frames) + KEPT_BYTES
        await eventually(lambda: server.registry.replay_bytes == 0)
        assert (await health(server))["replayBytes"] == 0


async def test_memory_is_what_the_system_says(server: Server) -> None:
    said = (await health(server))["memoryMB"]
    assert abs(said - resident_kib() / 1024) < 8


def resident_kib() -> int:
    (resident,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(resident)


async def test_uptime_is_whole_seconds_since_the_start(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    monkeypatch.setattr("aisse.app.time.monotonic", lambda: begun)
    async with serving(simulator.url) as server:
        assert (await health(server))["uptimeSeconds"] == 0
        monkeypatch.setattr("aisse.app.time.monotonic", lambda: begun + 86_400.9)
        assert (await health(server))["uptimeSeconds"] == 86_400


async def test_stalled_reader_shows_with_what_waits_for_it_and_others_show_their_rate(simulator: Simulator) -> None:
    async with serving(simulator.url, leave_s=0) as server, connected(server.address) as flowing:
        await flowing.send(request("POST", "/api/chat", json.dumps(prompt("[[tokens=1000000 pace=200]]")).encode()))
        taking = asyncio.create_task(flowing.answer())
        try:
            async with reading_nothing(server, HUGE):
                said = await until(server, lambda said: said["oldestStallSeconds"] >= 2 * SWEEP_S)
                assert said["readers"] == 2
                assert said["stalledReaders"] == 1
                assert said["oldestStallSeconds"] < 10
                # Full is noticed after a write, and one write may carry all that was read at once.
                assert 0 < said["bufferedBytes"] < server.settings.write_buffer_bytes + (48 << 10)
                assert said["status"] == "healthy"
            said = await until(server, lambda said: said["readers"] == 1)
            assert (said["stalledReaders"], said["oldestStallSeconds"]) == (0, 0)
            await until(server, lambda said: said["tokensPerSecond"] > 0)
        finally:
            taking.cancel()
            await asyncio.wait([taking])


async def test_rate_is_of_the_last_seconds_and_falls_to_nothing(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 0.05)  # so that the rate is that of half a second
    async with serving(simulator.url) as server:
        async with connected(server.address) as connection:
            await connection.send(request("POST", "/api/chat", json.dumps(prompt("[[tokens=400 pace=400]]")).encode()))
            begun = time.monotonic()
            rates = []
            answering = asyncio.create_task(connection.answer())
            while not answering.done():
                rates.append((await health(server))["tokensPerSecond"])
            await answering
        # What is held up on a busy machine comes in a burst: at most all of it within the half second.
        average = 400 / (time.monotonic() - begun)
        assert 0.7 * average < max(rates) < 400 / 0.4
        await until(server, lambda said: said["tokensPerSecond"] == 0)


async def until(server: Server, condition: Any, timeout_s: float = 60.0) -> dict[str, Any]:
    """What /health says once `condition` holds for it."""
    async with asyncio.timeout(timeout_s):
        while not condition(said := await health(server)):
            await asyncio.sleep(0.02)
    return said


# --- degraded, and healthy again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        ("[[status=500]]", "failed with 500"),
        ("[[status=529]]", "overloaded"),
        ("[[status=401]]", "key refused"),
        ("[[status=402]]", "account without credit, or past its limit"),
        ("[[fault=cut at=600]]", "connection lost in the middle of the answer"),
        ("[[fault=html]]", "answered with something else than an event stream"),
        ("[[fault=redirect]]", "redirects; set its final address"),
        ("[[fault=no_events]]", "ended without its last event"),
        ("[[fault=error at=3]]", "overloaded"),
    ],
)
async def test_five_failures_of_the_upstream_in_a_row_degrade_and_a_success_heals(
    server: Server, failure: str, cause: str
) -> None:
    """Health says since when, and why the last one failed."""
    await ask(server, "[[tokens=1]]")
    before = datetime.now(UTC).replace(microsecond=0)
    await ask(server, failure)
    after = datetime.now(UTC)
    for _ in range(3):
        await ask(server, failure)
    assert (await health(server))["status"] == "healthy"
    await ask(server, failure)
    said = await health(server)
    assert said["status"] == "degraded"
    [reason] = said["reasons"]
    found = re.fullmatch(r"the last 5 answers of the upstream failed, since (\S+Z), the last one: (.*)", reason)
    assert found is not None, reason
    assert before <= datetime.fromisoformat(found[1]) <= after
    assert found[2] == cause
    async with connected(server.address) as connection:
        await connection.send(request("GET", "/health/ready"))
        assert (await connection.answer("GET")).status == 200  # another instance would fare no better

    assert (await ask(server, "[[tokens=1]]"))[0] == 200
    said = await health(server)
    assert said["status"] == "healthy"
    assert "reasons" not in said


@pytest.mark.parametrize("refusal", ["[[status=400]]", "[[status=413]]", "[[status=422]]", "[[status=429]]"])
async def test_requests_that_the_upstream_refuses_do_not_degrade(server: Server, refusal: str) -> None:
    for _ in range(6):
        await ask(server, refusal)
    said = await health(server)
    assert said["status"] == "healthy"
    assert said["failedRequests"] == 6


async def test_upstream_that_cannot_be_reached_degrades() -> None:
    async with serving("http://127.0.0.1:9") as server:
        for _ in range(5):
            assert (await ask(server, "hello"))[0] == 502
        assert (await health(server))["status"] == "degraded"


async def test_late_event_loop_degrades_until_it_is_on_time_again(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 0.2)
    async with serving(simulator.url) as server:
        await asyncio.sleep(0)
        monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 1.5)  # the sweep after the late one leaves time to look
        time.sleep(0.9)  # noqa: ASYNC251 - the very thing that is to be noticed
        await eventually(lambda: server.registry.figures.loop_lag_s > 0.5)
        said = await health(server)
        assert said["status"] == "degraded"
        assert said["eventLoopLagMs"] > 500
        (reason,) = said["reasons"]
        assert re.fullmatch(r"the event loop is \d+ ms late", reason)
        assert (await until(server, lambda said: said["status"] == "healthy"))["eventLoopLagMs"] < 500


# --- full -----------------------------------------------------------------------------------------------------


async def test_stream_beyond_max_streams_is_refused_until_one_has_ended(simulator: Simulator) -> None:
    async with serving(simulator.url, max_streams=2, leave_s=0) as server:
        async with reading_nothing(server, ENDLESS):
            assert (await health(server))["status"] == "healthy"
            async with reading_nothing(server, ENDLESS):
                await refused_as_overloaded(server, "too many")
                said = await health(server)
                assert said["status"] == "degraded"
                assert said["reasons"] == ["max_streams is reached; new streams get 503"]
                # A refusal of ours is no generation and no failure.
                assert (said["activeStreams"], said["totalRequests"], said["failedRequests"]) == (2, 2, 0)
                assert simulator.stats.requests == 2
            await eventually(lambda: server.registry.active_streams == 1)
            assert (await ask(server, "[[tokens=1]]"))[0] == 200
        assert (await health(server))["status"] == "healthy"


async def test_stream_beyond_replay_bytes_is_refused_until_finished_ones_can_go(simulator: Simulator) -> None:
    async with serving(simulator.url, replay_bytes=2048, leave_s=0) as server:
        async with reading_nothing(server, ENDLESS):
            await eventually(lambda: server.registry.replay_bytes >= 2048)
            await refused_as_overloaded(server, "memory")
            said = await health(server)
            assert said["status"] == "degraded"
            assert said["reasons"] == ["replay_bytes is reached; new streams get 503"]
            assert (said["totalRequests"], said["failedRequests"]) == (1, 0)
        await eventually(lambda: server.registry.active_streams == 0)
        # What is finished makes room: it can be read again only while there is some.
        assert (await ask(server, "[[tokens=50]]"))[0] == 200
        assert (await ask(server, "[[tokens=50]]"))[0] == 200
        assert (await health(server))["status"] == "healthy"


async def refused_as_overloaded(server: Server, message: str) -> None:
    async with connected(server.address) as connection:
        await connection.send(request("POST", "/api/chat", json.dumps(prompt("hello")).encode()))
        answer = await connection.answer()
        assert await connection.usable()
    assert answer.status == 503
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    error = answer.json()["error"]
    assert error["type"] == "overloaded_error"
    assert message in error["message"]
