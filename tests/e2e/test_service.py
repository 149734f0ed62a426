"""aisse under systemd: the units as they are shipped in a real instance, and the protocols on any machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from activation import activated
from command import START_S, command, ending, events
from conftest import eventually, prompt
from manager import ENVIRONMENT, PROGRAM, PYTHON, Manager, UnavailableError, booted

from aisse import deploy
from aisse.settings import Settings

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from aisse.simulator import Simulator

KEY = "a-key-of-the-upstream"
REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")

needs_activate = pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None and "systemd" not in REQUIRED,
    reason="systemd-socket-activate is not installed (Debian's package is systemd)",
)

# Serves like the command does, until a signal blocks its event loop for good.
_BLOCKABLE = (
    "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600)); "
    "from aisse.cli import main; main(['serve'])"
)


def own_address() -> tuple[str, int]:
    """A loopback address that no other test and no outgoing connection uses: its port stays free until it is taken."""
    host = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(1, 254)}"
    with socket.socket() as probe:
        probe.bind((host, 0))
        return host, probe.getsockname()[1]


# --- a flow of requests ---------------------------------------------------------------------------------------


@dataclass
class Flow:
    """New requests at a steady rate, each on a connection of its own, whatever becomes of them."""

    url: str
    limit_s: float
    sent: int = 0
    answered: list[tuple[float, float]] = field(default_factory=list)
    """When it was sent, and how long it took, of each request that was answered whole."""
    turned_away: list[float] = field(default_factory=list)
    """When a 503 came."""
    failed: list[str] = field(default_factory=list)

    async def ask(self, client: aiohttp.ClientSession) -> None:
        began = time.monotonic()
        self.sent += 1
        try:
            async with (
                asyncio.timeout(self.limit_s),
                client.post(self.url + "/api/chat", json=prompt("[[pace=0 tokens=3]]")) as response,
            ):
                text = await response.text()
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            self.failed.append(f"{time.monotonic() - began:.3f} s: {error!r}")
        else:
            if response.status == 503 and response.headers.get("Retry-After", "").isdecimal():
                self.turned_away.append(time.monotonic())
            elif response.status == 200 and ending(text) == "complete":
                self.answered.append((began, time.monotonic() - began))
            else:
                self.failed.append(f"{response.status}: {text[-200:]}")


@contextlib.asynccontextmanager
async def flowing(url: str, *, limit_s: float, every_s: float = 0.04) -> AsyncIterator[Flow]:
    """A Flow as long as the block runs; all of its requests are over after it."""
    flow = Flow(url, limit_s)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as client,
        asyncio.TaskGroup() as requests,
    ):

        async def send() -> None:
            while True:
                requests.create_task(flow.ask(client))
                await asyncio.sleep(every_s)

        sender = requests.create_task(send())
        try:
            yield flow
        finally:
            sender.cancel()


# --- the protocols, with a supervisor of our own --------------------------------------------------------------


class Supervisor:
    """A notification socket, and what was said on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[tuple[float, str]] = []
        """With the time of arrival."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(path))
        asyncio.get_running_loop().add_reader(self._socket, self._receive)

    def _receive(self) -> None:
        self.lines += [(time.monotonic(), line) for line in self._socket.recv(4096).decode().split("\n")]

    def said(self, line: str) -> bool:
        return any(line == heard for _, heard in self.lines)

    def times(self, line: str) -> list[float]:
        return [at for at, heard in self.lines if heard == line]

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    with contextlib.closing(Supervisor(tmp_path / "notify")) as supervisor:
        yield supervisor


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A listening socket that outlives the processes that serve it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(4096)
        yield listening


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()
    return f"http://{host}:{port}"


@contextlib.asynccontextmanager
async def started(
    supervisor: Supervisor, upstream: str, *arguments: str, listening: socket.socket | None = None, **environ: str
) -> AsyncIterator[tuple[Process, Path]]:
    """`aisse serve ARGUMENTS` as a service, with the file of its log; killed at the end if it still runs."""
    line = [sys.executable, "-m", "aisse", "serve", "--upstream", upstream, *arguments]
    passed: dict[str, Any] = {}
    if listening is not None:
        line, given = activated(line, listening.fileno())
        passed = dict(given)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AISSE_")}
    with tempfile.NamedTemporaryFile() as stderr:
        process = await asyncio.create_subprocess_exec(
            *line,
            env=inherited | {"NOTIFY_SOCKET": str(supervisor.path)} | environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=stderr,
            **passed,
        )
        try:
            yield process, Path(stderr.name)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def exit_code(process: Process, timeout_s: float = 30) -> int:
    async with asyncio.timeout(timeout_s):
        return await process.wait()


async def test_ready_is_said_once_connections_are_accepted(supervisor: Supervisor, simulator: Simulator) -> None:
    host, port = own_address()
    async with started(supervisor, simulator.url, "--host", host, "--port", str(port)) as (process, log):
        refused_before = 0
        while not supervisor.said("READY=1"):
            with socket.socket() as probe:
                probe.settimeout(5)
                refused_before += probe.connect_ex((host, port)) != 0
            await asyncio.sleep(0.01)
            assert process.returncode is None, log.read_text()
        assert refused_before > 0
        socket.create_connection((host, port), timeout=5).close()
        process.terminate()
        assert await exit_code(process) == 0


async def test_status_has_live_counts_and_the_watchdog_is_answered_through_the_drain(
    supervisor: Supervisor, simulator: Simulator, client: aiohttp.ClientSession, held: socket.socket
) -> None:
    arguments = ("--drain-s", "3")
    async with started(supervisor, simulator.url, *arguments, listening=held, WATCHDOG_USEC="1000000") as (process, _):
        await eventually(lambda: supervisor.said("READY=1"), START_S)
        await eventually(lambda: supervisor.said("STATUS=0 streams, 0 readers"))
        async with client.post(url_of(held) + "/api/chat", json=prompt("[[tokens=100000 pace=20]]")) as response:
            assert response.status == 200
            await eventually(lambda: supervisor.said("STATUS=1 streams, 1 readers"))
            assert not supervisor.said("STOPPING=1")
            process.terminate()
            await eventually(lambda: supervisor.said("STOPPING=1"))
            await eventually(lambda: supervisor.said("STATUS=draining: 1 streams, 1 readers"))
            assert ending(await response.text()) == "shutdown"
        assert await exit_code(process) == 0
    (stopping,) = supervisor.times("STOPPING=1")
    assert len(supervisor.times("READY=1")) == 1
    alive = supervisor.times("WATCHDOG=1")
    # Half of the watchdog's second apart, of which a busy machine may take some: what counts is that they go on.
    assert sum(stopping < at for at in alive) >= 3
    assert max(alive) - stopping > 2


async def test_supervisor_that_is_gone_does_not_stop_the_service(
    supervisor: Supervisor, simulator: Simulator, client: aiohttp.ClientSession, held: socket.socket
) -> None:
    async with started(supervisor, simulator.url, listening=held) as (process, _):
        await eventually(lambda: supervisor.said("READY=1"), START_S)
        supervisor.path.unlink()
        async with client.post(url_of(held) + "/api/chat", json=prompt("[[pace=0 tokens=3]]")) as response:
            assert ending(await response.text()) == "complete"
        process.terminate()
        assert await exit_code(process) == 0


async def test_restarts_with_the_socket_held_refuse_nobody(
    supervisor: Supervisor, simulator: Simulator, held: socket.socket
) -> None:
    drain_s, restarts = 6.0, 6
    draining: list[tuple[float, float]] = []
    arguments = ("--drain-s", str(drain_s))
    async with contextlib.AsyncExitStack() as last:
        async with flowing(url_of(held), limit_s=drain_s + 2) as flow:
            for _ in range(restarts):
                supervisor.lines.clear()
                async with started(supervisor, simulator.url, *arguments, listening=held) as (process, log):
                    await eventually(lambda: supervisor.said("READY=1"), START_S)
                    enough = len(flow.answered) + 20
                    await eventually(lambda: len(flow.answered) >= enough, 30)  # noqa: B023 - called here alone
                    terminated = time.monotonic()
                    process.terminate()
                    assert await exit_code(process) == 0
                    draining.append((terminated, time.monotonic()))
                    assert '"level": "error"' not in log.read_text()
            # Whoever still waits is served by one more.
            await last.enter_async_context(started(supervisor, simulator.url, *arguments, listening=held))
    assert flow.failed == []
    assert len(flow.answered) >= 20 * restarts
    assert max(took for _, took in flow.answered) <= drain_s + 2
    # Only a process that is on its way out turns anybody away.
    assert all(any(begin <= at <= end for begin, end in draining) for at in flow.turned_away)


@needs_activate
async def test_socket_of_systemd_socket_activate_is_served(
    supervisor: Supervisor, simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    """It listens, and becomes the service at the first connection, which must not be lost."""
    host, port = own_address()
    url = f"http://{host}:{port}"
    line = ["-m", "aisse", "serve", "--upstream", simulator.url, "--drain-s", "5"]
    process = await asyncio.create_subprocess_exec(
        *("systemd-socket-activate", f"--listen={host}:{port}", f"--setenv=NOTIFY_SOCKET={supervisor.path}"),
        *(sys.executable, *line),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(START_S):
            while b"Listening on" not in (line_said := await process.stderr.readline()):
                assert line_said, "it does not listen"
            assert not supervisor.said("READY=1")
            async with client.post(url + "/api/chat", json=prompt("[[pace=0 tokens=3]]")) as response:
                assert ending(await response.text()) == "complete"
        assert supervisor.said("READY=1")
        process.terminate()
        assert await exit_code(process) == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
