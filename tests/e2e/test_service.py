"""aisse under systemd: the units as they are shipped in a real instance, and the protocols on any machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from activation import activated
from command import START_S, ending
from conftest import eventually, prompt
from manager import ENVIRONMENT, PROGRAM, PYTHON, Manager, UnavailableError, booted

from aisse.deploy import units
from aisse.settings import Settings

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Iterator

    from aisse.simulator import Simulator

KEY = "a-key-of-the-upstream"
REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")

needs_activate = pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None and "systemd" not in REQUIRED,
    reason="systemd-socket-activate is not installed (Debian's package is systemd)",
)

# Serves like the command does, until a signal blocks its event loop for good.
_BLOCKABLE = (
    "import os, signal, time; "
    "signal.signal(signal.SIGUSR1, lambda *_: (os.write(2, b'now blocked'), time.sleep(3600))); "
    "from aisse.commands.cli import main; main(['serve'])"
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

    @property
    def over(self) -> int:
        return len(self.answered) + len(self.turned_away) + len(self.failed)

    async def caught_up(self) -> None:
        """Returns once those who wait now have been served, and twenty more."""
        enough = self.sent + 20
        await eventually(lambda: self.over >= enough, 60)

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


async def exit_code(process: Process, timeout_s: float = 60) -> int:
    async with asyncio.timeout(timeout_s):
        return await process.wait()


async def test_ready_is_said_once_connections_are_accepted(supervisor: Supervisor, simulator: Simulator) -> None:
    host, port = own_address()
    async with started(supervisor, simulator.url, "--host", host, "--port", str(port)) as (process, log):
        refused_before = 0
        while not supervisor.said("READY=1"):
            with socket.socket() as probe:
                probe.settimeout(60)
                refused_before += probe.connect_ex((host, port)) != 0
            await asyncio.sleep(0.01)
            assert process.returncode is None, log.read_text()
        assert refused_before > 0
        socket.create_connection((host, port), timeout=60).close()
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
    drain_s, restarts = 25.0, 6
    draining: list[tuple[float, float]] = []
    arguments = ("--drain-s", str(drain_s))
    async with contextlib.AsyncExitStack() as last, flowing(url_of(held), limit_s=drain_s + 2) as flow:
        for _ in range(restarts):
            supervisor.lines.clear()
            async with started(supervisor, simulator.url, *arguments, listening=held) as (process, log):
                await eventually(lambda: supervisor.said("READY=1"), START_S)
                await flow.caught_up()
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


@pytest.mark.parametrize(
    ("arguments", "environ", "code"),
    [((), {}, 78), (("--open",), {}, 0), ((), {"AISSE_ACCESS_TOKENS": "a-token-of-some-length"}, 0)],
)
async def test_inherited_socket_beyond_loopback_needs_what_such_a_host_needs(
    supervisor: Supervisor, simulator: Simulator, arguments: tuple[str, ...], environ: dict[str, str], code: int
) -> None:
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        async with started(supervisor, simulator.url, *arguments, listening=everywhere, **environ) as (process, log):
            await eventually(lambda: supervisor.said("READY=1") or process.returncode is not None, START_S)
            if code == 0:
                process.terminate()
            assert await exit_code(process) == code
            assert (log.read_text().startswith("aisse: LISTEN_FDS: ")) == (code != 0)
            assert supervisor.said("READY=1") == (code == 0)


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


# --- a real instance of systemd -------------------------------------------------------------------------------


@dataclass
class Machine:
    """The units as they are printed, in a running instance, in front of a simulator."""

    manager: Manager
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def stderr(self) -> str:
        """What services wrote to standard error."""
        file = self.manager.directory / "stderr"
        return file.read_text() if file.exists() else ""

    def set(self, **settings: object) -> None:
        """What is in /etc/aisse/aisse.env."""
        lines = [f"AISSE_{name.upper()}={value}\n" for name, value in settings.items()]
        (self.manager.directory / "etc/aisse.env").write_text("".join(lines))

    async def change(self, unit: str, *lines: str) -> None:
        """Lines of a service's section that differ from the shipped ones."""
        self.manager.write(f"{unit}.d/test.conf", "\n".join(["[Service]", *lines, ""]))
        await self.manager.reload()

    async def until(self, unit: str, name: str, expected: str, timeout_s: float = 60) -> None:
        """Returns once a property of a unit has that value."""
        value = ""
        try:
            async with asyncio.timeout(timeout_s):
                while (value := await self.manager.show(unit, name)) != expected:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{name} of {unit} is {value}\n{self.manager.log()}\n{self.stderr}") from None

    async def ended_well(self, unit: str) -> None:
        """It came to the end of its shutdown and exited 0, and systemd had nothing to kill."""
        assert await self.manager.show(unit, "ActiveState") == "inactive", self.manager.log()
        about = [line for line in self.manager.log().splitlines() if f"{unit}: " in line]
        assert about[-1].endswith(f"{unit}: Deactivated successfully."), about
        assert not any("Killing" in line or "exited" in line for line in about)
        assert json.loads(self.stderr.splitlines()[-1])["event"] == "stopped"


@pytest.fixture
async def machine(simulator: Simulator) -> AsyncIterator[Machine]:
    host, port = own_address()
    if shutil.which(PROGRAM) is None and "systemd" in REQUIRED:
        pytest.fail("systemd is not installed (Debian's package is systemd)")
    async with contextlib.AsyncExitStack() as stack:
        try:
            manager = await stack.enter_async_context(booted())
        except UnavailableError as error:
            pytest.skip(str(error))
        machine = Machine(manager, host, port)
        etc = manager.directory / "etc"
        etc.mkdir()
        (etc / "upstream_key").write_text(KEY)
        (etc / "upstream_key").chmod(0o600)
        # By name: a service has to be able to look one up.
        machine.set(upstream=simulator.url.replace("127.0.0.1", "localhost"), host=host)
        for name in units.UNITS:
            text = units.unit(name, Settings(host=host, port=port), PYTHON, None)
            manager.write(name, text.replace("/etc/aisse/", f"{etc}/"))
            if name.endswith(".service"):
                # Where the interpreter's imports are, and where the log can be read from outside.
                lines = [f"Environment={variable}={value}" for variable, value in ENVIRONMENT.items()]
                lines.append(f"StandardError=append:{manager.directory}/stderr")
                manager.write(f"{name}.d/here.conf", "\n".join(["[Service]", *lines, ""]))
        await manager.reload()
        yield machine


def asked(client: aiohttp.ClientSession, url: str, text: str = "[[pace=0 tokens=3]]") -> Any:
    return client.post(url + "/api/chat", json=prompt(text))


def about(pid: int, what: str) -> str:
    return Path(f"/proc/{pid}/{what}").read_text()


async def test_unit_runs_as_it_is_shipped(
    machine: Machine, simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    manager = machine.manager
    await manager.ctl("start", "aisse.service")  # returns when it is ready
    assert (await manager.ctl("is-active", "aisse.service", "aisse.socket")).split() == ["active", "active"]
    await machine.until("aisse.service", "StatusText", "0 streams, 0 readers")

    async with asked(client, machine.url) as response:
        assert ending(await response.text()) == "complete"
    assert (simulator.stats.requests, simulator.stats.keyed) == (1, 1)  # the credential arrived

    async with client.get(machine.url + "/health") as response:
        assert (await response.json())["memoryMB"] > 0  # of what is left of /proc
    pid = await manager.main_pid("aisse.service")
    status = about(pid, "status")
    assert re.search(r"^Uid:\t(?!0\t)", status, re.MULTILINE)
    for capabilities in re.findall(r"^Cap\w+:\t(\w+)$", status, re.MULTILINE):
        assert int(capabilities, 16) == 0
    (open_files,) = re.findall(r"^Max open files +(\d+) ", about(pid, "limits"), re.MULTILINE)
    # An instance that may not raise limits gives what it has.
    assert int(open_files) in {20064, min(20064, resource.getrlimit(resource.RLIMIT_NOFILE)[1])}
    assert KEY not in about(pid, "environ")

    async with asked(client, machine.url, "[[tokens=100000 pace=20]]") as response:
        await machine.until("aisse.service", "StatusText", "1 streams, 1 readers")
        response.close()
    await manager.ctl("stop", "aisse.socket", "aisse.service")
    await machine.ended_well("aisse.service")
    for line in machine.stderr.splitlines():
        assert json.loads(line)["level"] in {"info", "warning"}, line


async def test_first_connection_starts_the_service(machine: Machine, client: aiohttp.ClientSession) -> None:
    await machine.manager.ctl("start", "aisse.socket")
    assert await machine.manager.show("aisse.service", "ActiveState") == "inactive"
    async with asyncio.timeout(START_S), asked(client, machine.url) as response:
        assert ending(await response.text()) == "complete"
    assert await machine.manager.show("aisse.service", "ActiveState") == "active"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGSTOP], ids=["blocked", "stopped"])
async def test_event_loop_that_does_not_turn_is_started_again(
    machine: Machine, client: aiohttp.ClientSession, number: signal.Signals
) -> None:
    await machine.change(
        "aisse.service", "WatchdogSec=4", "ExecStart=", f"ExecStart={PYTHON} -c {json.dumps(_BLOCKABLE)}"
    )
    await machine.manager.ctl("start", "aisse.service")
    assert await machine.manager.show("aisse.service", "NRestarts") == "0"
    pid = await machine.manager.main_pid("aisse.service")
    os.kill(pid, number)
    await eventually(lambda: "now blocked" in machine.stderr or "State:\tT" in about(pid, "status"))
    # Whoever comes meanwhile waits for the next process.
    async with asyncio.timeout(START_S), asked(client, machine.url) as response:
        assert ending(await response.text()) == "complete"
    assert await machine.manager.show("aisse.service", "NRestarts") == "1"
    assert "aisse.service: Watchdog timeout" in machine.manager.log()
    assert "Fatal Python error: Aborted" in machine.stderr  # and where it was
    if number == signal.SIGUSR1:
        assert 'File "<string>", line 1 in <lambda>' in machine.stderr


async def test_drain_outlives_the_watchdog_and_its_readers_are_told(
    machine: Machine, client: aiohttp.ClientSession
) -> None:
    await machine.change("aisse.service", "WatchdogSec=4", "Environment=AISSE_DRAIN_S=9")
    await machine.manager.ctl("start", "aisse.service")
    async with asked(client, machine.url, "[[tokens=100000 pace=20]]") as response:
        assert response.status == 200
        await machine.manager.ctl("stop", "--no-block", "aisse.socket", "aisse.service")
        await machine.until("aisse.service", "StatusText", "draining: 1 streams, 1 readers")
        assert await machine.manager.show("aisse.service", "ActiveState") == "deactivating"
        text = await response.text()
    assert ending(text) == "shutdown"
    assert text.count("\nevent: reconnect\n") == 1
    await machine.until("aisse.service", "ActiveState", "inactive")
    await machine.ended_well("aisse.service")


async def test_restarts_of_the_service_refuse_nobody(machine: Machine) -> None:
    await machine.manager.ctl("start", "aisse.service")
    async with flowing(machine.url, limit_s=Settings().drain_s + 2) as flow:
        for _ in range(4):
            await flow.caught_up()
            await machine.manager.ctl("restart", "aisse.service")
    assert flow.failed == []
    assert len(flow.answered) >= 80
    assert await machine.manager.show("aisse.service", "NRestarts") == "0"  # none by itself


async def test_instances_serve_a_port_each_and_stop_one_by_one(machine: Machine, client: aiohttp.ClientSession) -> None:
    ports = []
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            probe = stack.enter_context(socket.socket())
            probe.bind((machine.host, 0))
            ports.append(probe.getsockname()[1])
    units = [f"aisse@{port}.service" for port in ports]
    await machine.manager.ctl("start", *units)
    for port in ports:
        async with asked(client, f"http://{machine.host}:{port}") as response:
            assert ending(await response.text()) == "complete"
    await machine.manager.ctl("stop", units[0])
    await machine.ended_well(units[0])
    async with asked(client, f"http://{machine.host}:{ports[1]}") as response:
        assert ending(await response.text()) == "complete"
    with pytest.raises(aiohttp.ClientConnectorError):
        await asked(client, f"http://{machine.host}:{ports[0]}")
    await machine.manager.ctl("restart", units[1])
    async with asked(client, f"http://{machine.host}:{ports[1]}") as response:
        assert ending(await response.text()) == "complete"
    await machine.manager.ctl("stop", units[1])
    await machine.ended_well(units[1])


async def test_wrong_setting_stays_down_and_is_said(machine: Machine) -> None:
    machine.set(heartbeat_s=0)
    code, _ = await machine.manager.run("systemctl", "start", "aisse@3001.service")
    assert code != 0
    assert await machine.manager.show("aisse@3001.service", "ExecMainStatus") == "78"
    await stays_down(machine, "aisse@3001.service")
    assert machine.stderr.startswith("aisse: AISSE_HEARTBEAT_S: ")
    assert machine.stderr.count("\n") == 1


async def test_missing_key_stays_down_and_is_said(machine: Machine) -> None:
    (machine.manager.directory / "etc/upstream_key").unlink()
    code, _ = await machine.manager.run("systemctl", "start", "aisse@3001.service")
    assert code != 0
    await stays_down(machine, "aisse@3001.service")
    assert "status=243/CREDENTIALS" in machine.manager.log()


async def stays_down(machine: Machine, unit: str) -> None:
    """Where systemd would start it again, it is `activating (auto-restart)` from the moment it failed."""
    assert await machine.manager.show(unit, "ActiveState") == "failed", machine.manager.log()
    assert await machine.manager.show(unit, "NRestarts") == "0"


async def test_crash_is_followed_by_a_start(machine: Machine, client: aiohttp.ClientSession) -> None:
    await machine.manager.ctl("start", "aisse.service")
    pid = await machine.manager.main_pid("aisse.service")
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not os.path.exists(f"/proc/{pid}"))  # noqa: PTH110 - asked again and again
    async with asyncio.timeout(START_S), asked(client, machine.url) as response:
        assert ending(await response.text()) == "complete"
    assert await machine.manager.show("aisse.service", "NRestarts") == "1"
