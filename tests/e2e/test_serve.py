"""`aisse serve` and `aisse simulate` as users start and stop them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from command import Command, command, ending, events, health, refused, refuses_connections, served
from conftest import prompt
from raw import connected, request

import aisse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOKEN = "a-token-of-some-length"
CANARY = "canary-prompt-71b2"


@contextlib.asynccontextmanager
async def asking(
    client: aiohttp.ClientSession, running: Command, text: str, **headers: str
) -> AsyncIterator[aiohttp.ClientResponse]:
    """An answer to `text`, begun."""
    async with client.post(running.url + "/api/chat", json=prompt(text), headers=headers) as response:
        assert response.status == 200, await response.text()
        yield response


async def until_refused(running: Command) -> None:
    """Returns once the process has closed its listener."""
    async with asyncio.timeout(60):
        while not await refuses_connections(running):
            await asyncio.sleep(0.01)


def limits(running: Command) -> tuple[int, int]:
    """Soft and hard limit of open files that the process runs with."""
    text = Path(f"/proc/{running.pid}/limits").read_text()
    found = re.search(r"^Max open files +(\d+) +(\d+) ", text, re.MULTILINE)
    assert found is not None
    return int(found[1]), int(found[2])


# --- starting -------------------------------------------------------------------------------------------------


async def test_simulator_needs_nothing_and_is_named_wherever_one_looks(client: aiohttp.ClientSession) -> None:
    async with served("--upstream", "simulator") as running:
        assert running.said == [
            f"aisse {aisse.__version__} on {running.url}",
            "upstream: simulator (built in: no key, no network, scripted answers)",
        ]
        assert running.url.startswith("http://127.0.0.1:")
        async with asking(client, running, f"[[pace=0 tokens=20]] {CANARY}") as response:
            text = await response.text()
        assert ending(text) == "complete"
        deltas = [data["delta"]["text"] for kind, data in events(text) if kind == "content_block_delta"]
        assert "".join(deltas) == " ".join(f"w{number}" for number in range(1, 21))
        assert events(text)[-1][1]["usage"]["output_tokens"] == 20

        said = await health(client, running)
        assert (said["status"], said["upstream"], said["totalRequests"]) == ("healthy", "simulator", 1)
        assert said["version"] == aisse.__version__
        resident = re.search(r"^VmRSS:\s+(\d+) kB$", status_of(running.pid), re.MULTILINE)
        assert resident is not None
        assert abs(said["memoryMB"] - int(resident[1]) / 1024) < 8

        (listening,) = await running.until_logged("listening")
        assert listening["upstream"] == "simulator"
        assert listening["url"] == running.url
        (ended,) = await running.until_logged("stream ended")
        assert (ended["reason"], ended["output_tokens"]) == ("complete", 20)
        # Without tokens it says that whoever reaches it may ask.
        assert any("access tokens" in line["event"] for line in running.log() if line["level"] == "warning")
        assert CANARY not in running.stderr()


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


async def test_wrong_setting_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "aisse.toml"
    file.write_text("stall_s = 0\n")
    by_flag, by_variable, by_file, unknown = await asyncio.gather(
        refused("serve", "--heartbeat-s", "soon"),
        refused("serve", environ={"AISSE_PORT": "70000"}),
        refused("serve", "--config", str(file)),
        refused("serve", environ={"AISSE_HARTBEAT_S": "1"}),
    )
    assert by_flag.startswith("--heartbeat-s: ")
    assert by_variable.startswith("AISSE_PORT: ")
    assert by_file.startswith(f"{file}: stall_s: ")
    assert unknown.startswith("AISSE_HARTBEAT_S: there is no such setting")


async def test_address_beyond_loopback_without_tokens_is_refused() -> None:
    line = await refused("serve", "--upstream", "simulator", "--host", "0.0.0.0")
    assert line.startswith("--host: ")
    assert "AISSE_ACCESS_TOKENS" in line
    assert "--open" in line


async def test_upstream_that_needs_a_key_without_one_is_refused() -> None:
    line = await refused("serve", "--port", "0", environ={"ANTHROPIC_API_KEY": "of-another-host"})
    assert "EZAI_API_KEY" in line
    assert "--upstream simulator" in line


async def test_key_of_the_upstream_is_taken_and_nowhere_to_be_seen(client: aiohttp.ClientSession) -> None:
    key = "canary-key-0123456789"
    async with served(environ={"EZAI_API_KEY": key}) as running:
        assert running.said[1] == "upstream: https://api.ezaiapi.com"
        said = await health(client, running)
        assert said["upstream"] == "https://api.ezaiapi.com"
        running.process.send_signal(signal.SIGTERM)
        assert await running.exit() == 0
        assert key not in running.stderr() + json.dumps(said) + "".join(running.said)


@pytest.mark.parametrize("arguments", [["serve", "--upstream", "simulator"], ["simulate"]])
async def test_port_in_use_is_refused_with_the_address(arguments: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = await refused(*arguments, "--port", str(port))
    assert f"127.0.0.1:{port}" in line
    assert "port" in line
    assert line.lower().endswith("address already in use")


async def test_address_that_may_be_reachable_serves_with_open(client: aiohttp.ClientSession) -> None:
    # Only this machine reaches it, but the spelling is none of those that are known to be loopback.
    assert (await refused("serve", "--upstream", "simulator", "--host", "127.1")).startswith("--host: ")
    async with (
        served("--upstream", "simulator", "--host", "127.1", "--open") as running,
        asking(client, running, "[[pace=0 tokens=1]]") as response,
    ):
        assert ending(await response.text()) == "complete"


async def test_ipv6_address_is_printed_as_a_url(client: aiohttp.ClientSession) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
    async with served("--upstream", "simulator", "--host", "::1") as running:
        assert running.url.startswith("http://[::1]:")
        assert (await health(client, running))["status"] == "healthy"


async def test_token_guards_who_may_ask_and_stays_secret(client: aiohttp.ClientSession) -> None:
    environ = {"AISSE_ACCESS_TOKENS": f"{TOKEN}-other,{TOKEN}"}
    # With a token any address is fine.
    async with served("--upstream", "simulator", "--host", "127.1", environ=environ) as running:
        for headers, status in (
            ({}, 401),
            ({"Authorization": f"Bearer {TOKEN}x"}, 401),
            ({"Authorization": f"Bearer {TOKEN}"}, 200),
        ):
            async with client.post(
                running.url + "/api/chat", json=prompt("[[pace=0 tokens=1]]"), headers=headers
            ) as response:
                assert response.status == status
                await response.read()
        assert (await health(client, running))["totalRequests"] == 1
        await running.until_logged("stream ended")
        assert not any("access tokens" in line["event"] for line in running.log())
        assert TOKEN not in running.stderr()
        assert TOKEN not in "".join(running.said)


async def test_config_file_of_another_start_is_understood(tmp_path: Path, client: aiohttp.ClientSession) -> None:
    file = tmp_path / "aisse.toml"
    async with command("config", "--upstream", "simulator", "--port", "0", "--drain-s", "0.25") as running:
        assert await running.exit() == 0
        file.write_text("\n".join(running.said))
    async with served("--config", str(file), "--max-streams", "7") as running:
        assert (await health(client, running))["upstream"] == "simulator"
        running.process.send_signal(signal.SIGTERM)
        assert await running.exit() == 0
        assert running.logged("stopping")[0]["drain_s"] == 0.25


# --- descriptors ----------------------------------------------------------------------------------------------


async def test_soft_limit_of_open_files_is_raised_and_a_hard_one_too_low_is_said(
    client: aiohttp.ClientSession,
) -> None:
    async with (
        served("--upstream", "simulator", open_files=(64, 512)) as too_low,
        served("--upstream", "simulator", "--max-streams", "224", open_files=(64, 512)) as enough,
    ):
        for running in (too_low, enough):
            assert limits(running) == (512, 512)
            async with asking(client, running, "[[pace=0 tokens=1]]") as response:
                assert ending(await response.text()) == "complete"
        await asyncio.gather(too_low.until_logged("stream ended"), enough.until_logged("stream ended"))
        (warning,) = [line for line in too_low.log() if "open_files" in line]
        assert (warning["level"], warning["open_files"], warning["needed"]) == ("warning", 512, 10_064)
        assert "max_streams" in warning["event"]
        assert not any("open_files" in line for line in enough.log())


# --- stopping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_signal_lets_a_stream_complete_and_ends_one_that_cannot(number: signal.Signals) -> None:
    async with (
        aiohttp.ClientSession() as client,
        served("--upstream", "simulator", "--drain-s", "3") as running,
        connected(running.address) as kept,
        asking(client, running, "[[tokens=30 pace=40]]") as short,
        asking(client, running, "[[tokens=100000 pace=40]]") as long,
    ):
        assert await kept.usable()
        begun = time.monotonic()
        running.process.send_signal(number)
        await until_refused(running)
        # A connection from before still tells how it stands.
        await kept.send(request("GET", "/health"))
        assert (await kept.answer("GET")).json()["status"] == "draining"
        await kept.send(request("POST", "/api/chat", json.dumps(prompt("more")).encode()))
        refusal = await kept.answer()
        assert refusal.status == 503
        assert int(refusal.headers["Retry-After"]) > 0

        # Reading to the end raises nothing: both bodies ended cleanly.
        completed, cut = await asyncio.gather(short.text(), long.text())
        assert ending(completed) == "complete"
        assert ending(cut) == "shutdown"
        assert await running.exit() == 0
        assert 3 <= time.monotonic() - begun < 12  # a runner that waited for its own limits would take ten longer
        assert [line["reason"] for line in running.logged("stream ended")] == ["complete", "shutdown"]
        assert running.log()[-1]["event"] == "stopped"
        assert not [line for line in running.log() if line["level"] == "error"]


async def test_signal_without_streams_ends_at_once(client: aiohttp.ClientSession) -> None:
    """Connections that are only kept are nothing to wait for."""
    async with served("--upstream", "simulator", "--drain-s", "600") as running, connected(running.address) as kept:
        assert await kept.usable()
        await health(client, running)
        running.process.send_signal(signal.SIGTERM)
        assert await running.exit() == 0
        assert await kept.rest() == b""
        assert not [line for line in running.log() if line["level"] in {"warning", "error"}][1:]


async def test_drain_ends_once_the_last_stream_has() -> None:
    async with (
        aiohttp.ClientSession() as client,
        served("--upstream", "simulator", "--drain-s", "600") as running,
        asking(client, running, "[[tokens=20 pace=40]]") as response,
    ):
        running.process.send_signal(signal.SIGTERM)
        assert ending(await response.text()) == "complete"
        assert await running.exit() == 0


@pytest.mark.parametrize("text", ["[[tokens=100000 token_bytes=4000 pace=0]]", "[[first_s=3600]]"])
async def test_reader_that_takes_nothing_does_not_hold_the_end_up(text: str) -> None:
    async with (
        served("--upstream", "simulator", "--drain-s", "0.2", "--first-byte-commit-s", "0") as running,
        connected(running.address) as stalled,
    ):
        await stalled.send(request("POST", "/api/chat", json.dumps(prompt(text)).encode()))
        assert (await stalled.head()).status == 200
        stalled.writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's streams use one that can
        running.process.send_signal(signal.SIGTERM)
        assert await running.exit() == 0
        (line,) = running.logged("stream ended")
        assert line["reason"] == "shutdown"
        assert not [line for line in running.log() if line["level"] == "error"]


async def test_request_that_waits_for_its_upstream_is_answered_at_the_end(client: aiohttp.ClientSession) -> None:
    async with served("--upstream", "simulator", "--drain-s", "0.2", "--first-byte-commit-s", "60") as running:
        asked = asyncio.create_task(
            client.post(running.url + "/api/chat", json=prompt("[[first_s=3600]]")),
        )
        async with asyncio.timeout(60):
            while (await health(client, running))["activeStreams"] == 0:
                await asyncio.sleep(0.01)
        running.process.send_signal(signal.SIGTERM)
        async with await asked as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) > 0
            assert (await response.json())["error"]["type"] == "shutdown_error"
        assert await running.exit() == 0


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
async def test_second_signal_ends_at_once(numbers: tuple[signal.Signals, signal.Signals]) -> None:
    async with (
        aiohttp.ClientSession() as client,
        served("--upstream", "simulator", "--drain-s", "600") as running,
        asking(client, running, "[[tokens=100000 pace=40]]") as response,
    ):
        running.process.send_signal(numbers[0])
        await until_refused(running)
        running.process.send_signal(numbers[1])
        assert await running.exit() == 128 + numbers[1]
        with pytest.raises(aiohttp.ClientPayloadError):  # not whole, and the client knows
            await response.read()
        running.log()


# --- simulate -------------------------------------------------------------------------------------------------


async def test_simulator_alone_serves_the_relay_in_front_of_it(client: aiohttp.ClientSession) -> None:
    async with (
        served("simulate", "--tokens", "3", "--pace", "0") as upstream,
        served("--upstream", upstream.url) as running,
    ):
        assert upstream.said == [f"aisse {aisse.__version__} simulator on {upstream.url}"]
        assert running.said[1] == f"upstream: {upstream.url}"
        async with asking(client, running, "hello") as response:
            text = await response.text()
        assert ending(text) == "complete"
        assert [kind for kind, _ in events(text)].count("content_block_delta") == 3
        async with client.get(upstream.url + "/stats") as response:
            stats = await response.json()
        assert (stats["requests"], stats["completed"], stats["keyed"], stats["cookied"]) == (1, 1, 0, 0)

        # The upstream goes first: its users are told, and it can come back.
        async with asking(client, running, "[[tokens=100000 pace=40]]") as response:
            upstream.process.send_signal(signal.SIGTERM)
            assert await upstream.exit() == 0
            assert upstream.stderr() == ""
            assert ending(await response.text()) == "truncated"
        async with client.post(running.url + "/api/chat", json=prompt("hello")) as response:
            assert response.status == 502


async def test_simulator_misbehaves_as_its_flags_say(client: aiohttp.ClientSession) -> None:
    async with (
        served("simulate", "--pace", "0", "--fault", "cut", "--at", "900", "--rst") as upstream,
        served("--upstream", upstream.url) as running,
    ):
        async with asking(client, running, "hello") as response:
            assert ending(await response.text()) == "truncated"
        # A prompt overrides the flags for its own answer.
        async with asking(client, running, "[[fault=none tokens=2]]") as response:
            assert ending(await response.text()) == "complete"
        assert (await health(client, running))["failedRequests"] == 1
