"""What tests share: servers of ours in this process, on ports from the system."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import uvloop
from aiohttp import web
from hypothesis import settings as hypothesis_settings

from aisse.app import DRAIN, REGISTRY, create_app, runner_arguments
from aisse.formats.anthropic import Anthropic
from aisse.service.connection import connections
from aisse.service.listener import Listener
from aisse.settings import Settings
from aisse.simulator import Script, Simulator
from aisse.upstream.client import Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from aisse.service.drain import Drain
    from aisse.streams.registry import Registry

# An example may take as long as a busy machine makes it. The same examples each time, but where there is time for more.
hypothesis_settings.register_profile("tests", deadline=None, derandomize=os.environ.get("TESTS_SOAK") != "1")
hypothesis_settings.load_profile("tests")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that the server runs on."""
    return {"uvloop": uvloop.new_event_loop}


# Limits that have no effect within a test which does not set them, however little of the machine it gets.
PATIENT = {"leave_s": 300, "stall_s": 300, "silence_s": 300, "body_s": 300, "connect_s": 300, "keep_alive_s": 300}


@dataclass
class Server:
    """An aisse in this process."""

    url: str
    settings: Settings
    registry: Registry
    runner: web.AppRunner
    drain: Drain

    @property
    def chat(self) -> str:
        return self.url + "/api/chat"

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)


@contextlib.asynccontextmanager
async def serving(upstream: str, *, key: str | None = None, **settings: Any) -> AsyncIterator[Server]:
    """An aisse in front of `upstream` (a base URL), with `settings` that differ from the defaults and from PATIENT."""
    effective = Settings.model_validate({"upstream": upstream, "drain_s": 0, **PATIENT, **settings})
    app = create_app(effective, Upstream(upstream, effective, Anthropic(effective), key=key))
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=2.0, **runner_arguments(effective))
    await runner.setup()
    try:
        assert runner.server is not None
        listener = await Listener.open(connections(runner.server, runner_arguments(effective)), "127.0.0.1", 0)
        try:
            yield Server(listener.url, effective, app[REGISTRY], runner, app[DRAIN])
        finally:
            await listener.close()
    finally:
        await runner.cleanup()


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """The built-in upstream, as fast as its peer reads unless a prompt says otherwise. `simulator.url` is its base."""
    simulator = Simulator(Script(pace=0))
    await simulator.start()
    try:
        yield simulator
    finally:
        await simulator.close()


@pytest.fixture
async def server(simulator: Simulator) -> AsyncIterator[Server]:
    """An aisse with default settings in front of the simulator."""
    async with serving(simulator.url) as running:
        yield running


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


def prompt(text: str, **parameters: Any) -> dict[str, Any]:
    """A request's body with one question. `[[...]]` in it scripts the simulator."""
    return {"messages": [{"role": "user", "content": text}], **parameters}


async def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Returns once `condition` holds; fails the test if it does not within `timeout_s`.

    By default that is longer than any machine takes for anything, and shorter than PATIENT.
    """
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def settled(figure: Callable[[], int], for_s: float = 0.5) -> Callable[[], bool]:
    """A condition: `figure` has not changed for `for_s`."""
    loop = asyncio.get_running_loop()
    last: list[tuple[int, float]] = [(figure(), loop.time())]

    def holds() -> bool:
        now = figure()
        if now != last[0][0]:
            last[0] = now, loop.time()
        return loop.time() - last[0][1] >= for_s

    return holds
