"""The application: its limits and its life; and what somebody who embeds it can rely on."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from conftest import Server, eventually, prompt, serving
from raw import connected, request

from aisse import app as app_module
from aisse.app import REGISTRY, create_app, runner_arguments, serve
from aisse.errors import ConfigError
from aisse.formats.anthropic import Anthropic
from aisse.settings import Settings
from aisse.streams.registry import Registry
from aisse.upstream.client import Upstream

if TYPE_CHECKING:
    from aisse.simulator import Simulator


def application(upstream: str, **settings: object) -> web.Application:
    effective = Settings.model_validate({"upstream": upstream, **settings})
    return create_app(effective, Upstream(upstream, effective, Anthropic(effective)))


# --- limits ---------------------------------------------------------------------------------------------------


async def test_runner_takes_every_limit(simulator: Simulator) -> None:
    """It meets an argument that it does not know by dropping all of them, with no more than a warning."""
    async with serving(simulator.url, keep_alive_s=12.5) as server:
        assert server.runner.server is not None
        handler = server.runner.server()
        assert handler.keepalive_timeout == 12.5
        assert handler._lingering_time == app_module._LINGERING_S
        assert handler.access_logger is None
        assert server.runner.server._kwargs["auto_decompress"] is False
        assert server.runner.server.handler_cancellation is True


async def test_serving_with_a_limit_that_is_not_taken_is_refused(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistyped(settings: Settings) -> dict[str, object]:
        return {**runner_arguments(settings), "lingring_time": 1.0}

    monkeypatch.setattr(app_module, "runner_arguments", mistyped)
    settings = Settings(upstream=simulator.url, port=0)
    stop = asyncio.Event()
    stop.set()
    with pytest.raises(TypeError, match="lingring_time"):
        await serve(settings, stop, key_for=lambda _url: None, announce=lambda _url, _name: None)


async def test_connection_that_sends_nothing_more_is_closed_after_keep_alive_s(simulator: Simulator) -> None:
    async with serving(simulator.url, keep_alive_s=1) as server, connected(server.address) as connection:
        assert await connection.usable()
        assert await connection.rest() == b""


async def test_client_that_leaves_while_it_waits_is_noticed_at_once(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 3600.0)  # it is not the sweep that notices
    async with serving(simulator.url, leave_s=0) as server:
        async with connected(server.address) as connection:
            await connection.send(request("POST", "/api/chat", json.dumps(prompt("[[first_s=3600]]")).encode()))
            await eventually(lambda: simulator.stats.active == 1)
        await eventually(lambda: simulator.stats.active == 0)
        assert simulator.stats.aborted == 1
        assert server.registry.active_streams == 0


# --- who answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/"), ("GET", "/nowhere"), ("PUT", "/api/chat"), ("POST", "/api/chat")],
)
async def test_answer_names_the_server_without_versions(simulator: Simulator, method: str, path: str) -> None:
    app = application(simulator.url)
    async with (
        TestClient(TestServer(app)) as client,
        client.request(method, path, json=prompt("[[tokens=1]]") if method == "POST" else None) as response,
    ):
        assert response.headers.getall("Server") == ["aisse"]


@pytest.mark.parametrize("sent", [b"nonsense\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nA\r\n\r\n"])
async def test_answer_to_what_is_no_request_names_the_server_without_versions(
    simulator: Simulator, sent: bytes
) -> None:
    """The library would write it by itself."""
    stop = asyncio.Event()
    announced: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = Settings(upstream=simulator.url, port=0, drain_s=0)
    serving_task = asyncio.create_task(
        serve(settings, stop, key_for=lambda _url: None, announce=lambda url, _name: announced.set_result(url))
    )
    host, _, port = (await announced).removeprefix("http://").rpartition(":")
    async with connected((host, int(port))) as connection:
        await connection.send(sent)
        answer = await connection.answer()
    assert (answer.status, answer.headers.getall("Server")) == (400, ["aisse"])
    stop.set()
    await serving_task


# --- its life -------------------------------------------------------------------------------------------------


async def test_embedded_in_a_test_server_it_streams_and_ends_its_streams(simulator: Simulator) -> None:
    """No runner of ours: neither the session nor the sweep may depend on one."""
    app = application(simulator.url, drain_s=0.2)
    async with TestClient(TestServer(app)) as client:
        async with client.post("/api/chat", json=prompt("[[tokens=3]]")) as response:
            assert response.status == 200
            assert (await response.text()).count("event: end\n") == 1
        async with client.get("/health") as response:
            assert (await response.json())["totalRequests"] == 1

        running = await client.post("/api/chat", json=prompt("[[pace=20 tokens=10000]]"))
        await eventually(lambda: app[REGISTRY].active_streams == 1)
    # Leaving the block ran the application's own shutdown.
    assert app[REGISTRY].active_streams == 0
    await eventually(lambda: simulator.stats.active == 0)
    running.close()


async def test_embedded_under_a_runner_that_decompresses_compressed_bodies_are_still_refused(
    simulator: Simulator,
) -> None:
    """That limit is the embedder's to forget, and ours to hold."""
    app = application(simulator.url)
    async with (
        TestClient(TestServer(app)) as client,
        client.post(
            "/api/chat",
            data=gzip.compress(json.dumps(prompt("x")).encode()),
            headers={"Content-Encoding": "gzip", "Content-Type": "application/json"},
        ) as response,
    ):
        assert response.status == 415
        assert app[REGISTRY].generations == 0


async def test_shutdown_of_an_embedder_ends_a_running_stream_with_shutdown(simulator: Simulator) -> None:
    app = application(simulator.url, drain_s=0.2)
    async with TestClient(TestServer(app)) as client:
        response = await client.post("/api/chat", json=prompt("[[pace=20 tokens=10000]]"))
        reading = asyncio.create_task(response.text())
        await eventually(lambda: app[REGISTRY].readers == 1)
        async with asyncio.timeout(60):
            await client.server.close()
            text = await reading
    assert text.count("event: end\n") == 1
    (end,) = re.findall(r"event: end\ndata: (.*)\n", text)
    assert json.loads(end)["reason"] == "shutdown"
    assert text.index("event: error\n") < text.index("event: end\n")


async def test_embedded_application_starts_no_thread(simulator: Simulator) -> None:
    """Logging is its embedder's; the one that writes logs is the command's."""
    before = set(threading.enumerate())
    async with TestClient(TestServer(application(simulator.url))) as client:
        async with client.post("/api/chat", json=prompt("[[tokens=1]]")) as response:
            await response.read()
        async with client.get("/health") as response:
            assert (await response.json())["logLinesDropped"] == 0
        assert {thread for thread in threading.enumerate() if "log" in thread.name} <= before


async def test_application_can_be_started_and_stopped_without_a_request(simulator: Simulator) -> None:
    tasks = asyncio.all_tasks()
    async with TestServer(application(simulator.url)):
        assert asyncio.all_tasks() > tasks
    assert asyncio.all_tasks() <= tasks


@pytest.mark.parametrize("part", [Registry, Upstream])
async def test_start_that_fails_half_way_leaves_no_part_open(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, part: type[Registry | Upstream]
) -> None:
    """Whichever part it is that fails, at its end."""
    settings = Settings.model_validate({"upstream": simulator.url})
    upstream = Upstream(simulator.url, settings, Anthropic(settings))
    start = part.start

    async def fail(self: Registry | Upstream) -> None:
        await start(self)  # type: ignore[arg-type]
        raise ConfigError("no")

    monkeypatch.setattr(part, "start", fail)
    tasks = asyncio.all_tasks()
    runner = web.AppRunner(create_app(settings, upstream), **runner_arguments(settings))
    with pytest.raises(ConfigError):
        await runner.setup()
    assert upstream._session is None
    assert asyncio.all_tasks() <= tasks


async def test_two_applications_in_one_process_share_nothing(simulator: Simulator) -> None:
    async with serving(simulator.url) as one, serving(simulator.url) as other, aiohttp.ClientSession() as client:
        async with client.post(one.chat, json=prompt("[[tokens=1]]")) as response:
            await response.read()
        assert (one.registry.generations, other.registry.generations) == (1, 0)
        assert (one.registry.replay_bytes > 0, other.registry.replay_bytes) == (True, 0)


async def test_serve_announces_once_it_accepts_and_returns_when_told(simulator: Simulator) -> None:
    stop = asyncio.Event()
    announced: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()

    def announce(url: str, upstream: str) -> None:
        announced.set_result((url, upstream))

    settings = Settings(upstream=simulator.url, port=0, drain_s=0)
    serving_task = asyncio.create_task(serve(settings, stop, key_for=lambda _url: None, announce=announce))
    url, upstream = await announced
    assert upstream == simulator.url
    async with aiohttp.ClientSession() as client:
        async with client.get(url + "/health/ready") as response:
            assert response.status == 200
        stop.set()
        await asyncio.wait_for(serving_task, 60)
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get(url + "/health/live")


async def test_serve_told_to_stop_while_its_model_loads_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, closed = asyncio.Event(), asyncio.Event()

    class SlowModel:
        async def start(self) -> str:
            loading.set()
            await asyncio.Event().wait()
            raise AssertionError

        async def close(self) -> None:
            closed.set()

    monkeypatch.setattr("aisse.local.LocalModel", SlowModel)
    tasks = asyncio.all_tasks()
    stop = asyncio.Event()
    settings = Settings(upstream="local", port=0)
    running = asyncio.create_task(serve(settings, stop, key_for=lambda _url: None, announce=lambda _url, _name: None))
    await loading.wait()
    stop.set()
    await asyncio.wait_for(running, 60)
    assert closed.is_set()
    assert asyncio.all_tasks() <= tasks


async def test_serve_cancelled_leaves_no_task(simulator: Simulator) -> None:
    announced = asyncio.Event()
    tasks = asyncio.all_tasks()
    settings = Settings(upstream="simulator", port=0)
    running = asyncio.create_task(
        serve(settings, asyncio.Event(), key_for=lambda _url: None, announce=lambda _url, _name: announced.set())
    )
    await announced.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() <= tasks


async def test_serve_asks_for_the_key_of_its_upstream_and_of_no_built_in_one(simulator: Simulator) -> None:
    for upstream, expected in ((simulator.url, [simulator.url]), ("simulator", [])):
        asked: list[str] = []
        stop = asyncio.Event()
        stop.set()

        def key_for(url: str, asked: list[str] = asked) -> str | None:
            asked.append(url)
            return None

        settings = Settings(upstream=upstream, port=0)
        await serve(settings, stop, key_for=key_for, announce=lambda _url, _name: None)
        assert asked == expected


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("https://api.ezaiapi.com", "EZAI_API_KEY"),
        ("https://ezaiapi.com/v2", "EZAI_API_KEY"),
        ("https://API.Anthropic.com", "ANTHROPIC_API_KEY"),
    ],
)
async def test_serve_refuses_an_upstream_whose_key_is_missing(url: str, variable: str) -> None:
    with pytest.raises(ConfigError, match=variable) as refused:
        await serve(Settings(upstream=url), asyncio.Event(), key_for=lambda _url: None, announce=print)
    assert "simulator" in str(refused.value)
    assert "\n" not in str(refused.value)


async def test_serve_refuses_a_port_in_use(server: Server) -> None:
    settings = Settings(upstream="simulator", port=server.address[1])
    tasks = asyncio.all_tasks()
    with pytest.raises(ConfigError, match=rf"port.*127\.0\.0\.1:{server.address[1]}.*in use"):
        await serve(settings, asyncio.Event(), key_for=lambda _url: None, announce=print)
    assert asyncio.all_tasks() <= tasks
