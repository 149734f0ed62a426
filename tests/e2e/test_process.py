"""What surrounds the process: who reads what it says, how it is told to stop, and what its parent has closed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import random
import shlex
import signal
import socket
import sys
import termios
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from command import START_S, ending, served
from conftest import prompt

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

FOLDER = Path(__file__).parent.parent.parent
ASK = "[[pace=0 tokens=1]]"
SERVE = ("serve", "--port", "0", "--upstream", "simulator")

# `aisse` as pip installs it: this is what it writes into the script.
ENTRY = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["scripts"]["aisse"].partition(":")
SCRIPT = f"import re, sys; from {ENTRY[0]} import {ENTRY[2]}; sys.argv[0] = 'aisse'; sys.exit({ENTRY[2]}())"
STARTS = {"module": ["-m", "aisse"], "script": ["-c", SCRIPT]}


@contextlib.asynccontextmanager
async def started(*line: str, shell: str = "", environ: dict[str, str] | None = None) -> AsyncIterator[Process]:
    """A process of ours, its output piped to us except as redirections of `shell` have it; killed at the end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AISSE_")}
    process = await asyncio.create_subprocess_shell(
        f"exec {shlex.join([sys.executable, *line])} {shell}",
        env=inherited | (environ or {}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def outcome(process: Process) -> tuple[int, str, str]:
    """Its exit code, and what it wrote to standard output and error."""
    async with asyncio.timeout(START_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def answer(client: aiohttp.ClientSession, url: str, text: str = ASK) -> str:
    async with client.post(url + "/api/chat", json=prompt(text)) as response:
        assert response.status == 200
        return ending(await response.text())


async def until_serving(client: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(START_S):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with client.get(url + "/health/ready"):
                    return
            await asyncio.sleep(0.02)


def own_address() -> tuple[str, str]:
    """A loopback address that nobody else uses: its port stays free until it is taken."""
    host = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(1, 254)}"
    with socket.socket() as probe:
        probe.bind((host, 0))
        return host, str(probe.getsockname()[1])


# --- who reads the log ----------------------------------------------------------------------------------------


def small_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    return reading, writing


@contextlib.asynccontextmanager
async def unread(*arguments: str, full: bool = False) -> AsyncIterator[tuple[Process, str, int]]:
    """A server whose standard error nobody reads: the process, its URL, and the end from which it could be read.

    `full`: there is no room in it from the start.
    """
    reading, writing = small_pipe()
    if full:
        os.write(writing, b"-" * 4095 + b"\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aisse", *SERVE, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=writing,
    )
    os.close(writing)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            first = (await process.stdout.readline()).decode()
        yield process, first.split()[-1], reading
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        os.close(reading)


@pytest.mark.parametrize("full", [False, True], ids=["fills", "full"])
async def test_log_that_nobody_reads_stops_nothing_and_is_counted(client: aiohttp.ClientSession, full: bool) -> None:
    async with unread("--log-buffer-bytes", "16KiB", full=full) as (process, url, reading):
        turn = asyncio.Semaphore(50)

        async def ask() -> str:
            async with turn:
                return await answer(client, url)

        assert set(await asyncio.gather(*(ask() for _ in range(300)))) == {"complete"}
        async with client.get(url + "/health") as response:
            dropped = (await response.json())["logLinesDropped"]
        assert 200 < dropped < 300

        # Whoever reads on finds what there was room for, then how much is missing, then what came after it.
        text = await asyncio.to_thread(os.read, reading, 4096)
        os.set_blocking(reading, False)
        while b"were dropped" not in text:
            with contextlib.suppress(BlockingIOError):
                text += os.read(reading, 4096)
            await asyncio.sleep(0.002)
        assert await answer(client, url) == "complete"
        process.send_signal(signal.SIGTERM)
        os.set_blocking(reading, True)
        while part := await asyncio.to_thread(os.read, reading, 4096):
            text += part
        assert await process.wait() == 0
        lines = [json.loads(line) for line in text.splitlines() if line.startswith(b"{")]
        kinds = [line["event"] for line in lines]
        (gap,) = [at for at, kind in enumerate(kinds) if "were dropped" in kind]
        assert lines[gap]["lines"] == dropped
        assert kinds[gap + 1 :] == ["stream ended", "stopping", "stopped"]
        assert kinds.count("stream ended") == 301 - dropped


async def test_log_that_nobody_reads_does_not_keep_the_process_from_its_end(client: aiohttp.ClientSession) -> None:
    async with unread(full=True) as (process, url, _):
        assert await answer(client, url) == "complete"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_second_signal_ends_it_at_once_also_where_nobody_reads(client: aiohttp.ClientSession) -> None:
    async with (
        unread("--drain-s", "600", full=True) as (process, url, _),
        client.post(url + "/api/chat", json=prompt("[[tokens=100000 pace=40]]")) as response,
    ):
        assert response.status == 200
        process.send_signal(signal.SIGTERM)
        await until_draining(url)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 128 + signal.SIGTERM


async def until_draining(url: str) -> None:
    """Returns once its listener is closed."""
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.01)


async def test_stopped_terminal_stops_no_answer_and_no_drain(client: aiohttp.ClientSession) -> None:
    """Ctrl-S: its lines, the announcement and the progress of a drain wait or are missed, and nobody with them."""
    host, port = own_address()
    ours, theirs = pty.openpty()
    # What Ctrl-S does.
    termios.tcflow(theirs, termios.TCOOFF)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aisse", *SERVE[:1], "--host", host, "--port", port, *SERVE[3:], "--drain-s", "60"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    try:
        url = f"http://{host}:{port}"
        await until_serving(client, url)
        async with client.post(url + "/api/chat", json=prompt("[[tokens=60 pace=40]]")) as response:
            process.send_signal(signal.SIGTERM)
            assert ending(await response.text()) == "complete"
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(ours)
        os.close(theirs)


# Fails while it serves, with lines that were said just before.
CRASHING = """
import structlog
from aisse import app
from aisse.commands import cli
async def serve(*_, **__):
    for number in range(50):
        structlog.get_logger("aisse.app").info("before", number=number)
    raise RuntimeError("a bug")
app.serve = serve
cli.main(["serve"])
"""


async def test_crash_shows_its_traceback_after_the_lines_before_it() -> None:
    async with started("-c", CRASHING) as process:
        code, out, err = await outcome(process)
    assert (code, out) == (1, "")
    lines, traceback_ = err[: err.index("Traceback")], err[err.index("Traceback") :]
    assert [json.loads(line)["number"] for line in lines.splitlines()] == list(range(50))
    assert traceback_.endswith("RuntimeError: a bug\n")
    assert err.count("Traceback") == 1


async def test_refused_start_is_said_after_the_lines_before_it() -> None:
    async with started("-c", CRASHING.replace("RuntimeError", "cli.ConfigError")) as process:
        code, _, err = await outcome(process)
    assert code == 78
    assert err.splitlines()[-1] == "aisse: a bug"
    assert len(err.splitlines()) == 51


# --- standard streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        *("<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- 2>&-", "<&- >&- 2>&-"),
        *(">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full", "<&- >/dev/full 2>&-"),
    ],
)
async def test_streams_that_are_closed_or_full_at_the_start_change_nothing(
    client: aiohttp.ClientSession, how: str
) -> None:
    host, port = own_address()
    line = ("-m", "aisse", "serve", "--host", host, "--port", port, "--upstream", "simulator")
    async with started(*line, shell=how) as process:
        await until_serving(client, f"http://{host}:{port}")
        for descriptor, closed in ((0, "<&-"), (1, " >&-"), (2, "2>&-")):
            if closed in f" {how}":
                # A link in /proc is no file that could be waited for.
                assert Path(f"/proc/{process.pid}/fd/{descriptor}").readlink() == Path(os.devnull)  # noqa: ASYNC240
        for _ in range(3):
            async with aiohttp.ClientSession() as fresh:  # connections that close, too
                assert await answer(fresh, f"http://{host}:{port}") == "complete"
        process.terminate()
        code, _, err = await outcome(process)
        assert code == 0
        assert "Exception ignored" not in err


@pytest.mark.parametrize(
    "arguments", [["config"], ["unit"], ["simulate"], ["--help"], ["serve", "--help"], ["--version"]]
)
@pytest.mark.parametrize(("how", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")])
async def test_command_that_cannot_print_says_so_in_one_line(arguments: list[str], how: str, why: str) -> None:
    async with started("-m", "aisse", *arguments, shell=how) as process:
        code, _, err = await outcome(process)
    assert code == 74
    assert [line for line in err.splitlines() if "standard output" in line] == [f"aisse: standard output: {why}"]
    assert "Traceback" not in err
    assert "Exception ignored" not in err


async def test_command_that_cannot_print_in_its_encoding_says_so_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "é.toml"
    file.write_text('model = "other"')
    line = ("-m", "aisse", "config", "--config", str(file))
    async with started(*line, environ={"PYTHONIOENCODING": "ascii"}) as process:
        code, out, err = await outcome(process)
    assert (code, out) == (74, "")
    assert err == "aisse: standard output: ascii lacks a character; set PYTHONIOENCODING=utf-8\n"


@pytest.mark.parametrize("arguments", [["config"], ["unit"], ["serve", "--help"]])
async def test_command_whose_reader_has_left_says_nothing(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aisse", *arguments), stdout=writing, stderr=asyncio.subprocess.PIPE
    )
    os.close(writing)
    code, _, err = await outcome_of_error(process)
    assert code == 128 + signal.SIGPIPE
    assert [line for line in err.splitlines() if not line.startswith("aisse: ")] == []


async def outcome_of_error(process: Process) -> tuple[int, str, str]:
    async with asyncio.timeout(START_S):
        _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, "", err.decode()


async def test_refusal_that_cannot_be_said_keeps_its_exit_code() -> None:
    async with started("-m", "aisse", "serve", "--port", "x", shell="2>/dev/full") as process:
        assert (await outcome(process))[0] == 78


# --- signals --------------------------------------------------------------------------------------------------

# Stands still in the middle of imports, and says that it does.
SLOW_IMPORT = """
import os, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["SLOW"]:
            os.write(1, b"importing\\n")
            time.sleep(3600)
sys.meta_path.insert(0, Slow())
"""


# Becomes a command that has a signal ignored.
IGNORING = "import os, signal, sys; signal.signal(signal.SIG{}, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.parametrize("module", ["aisse.commands.cli", "aiohttp", "aisse.app", "uvloop"])
@pytest.mark.parametrize("start", STARTS)
async def test_ctrl_c_while_modules_are_imported_says_nothing(tmp_path: Path, start: str, module: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    path = os.pathsep.join(filter(None, [str(tmp_path), str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    line = [*STARTS[start], *SERVE]
    async with started(*line, environ={"PYTHONPATH": path, "SLOW": module}) as process:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            assert await process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert await outcome(process) == (-signal.SIGINT, "", "")


async def test_ctrl_c_that_is_ignored_from_the_start_stays_so_while_modules_are_imported(tmp_path: Path) -> None:
    """As in a background job of a shell script."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT.replace("3600", "0.2"))
    path = os.pathsep.join([str(tmp_path), str(FOLDER)])
    line = ["-c", IGNORING.format("INT"), sys.executable, "-m", "aisse", "--version"]
    async with started(*line, environ={"PYTHONPATH": path, "SLOW": "aisse.commands.cli"}) as process:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            assert await process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        code, out, err = await outcome(process)
    assert (code, err) == (0, "")
    assert out.startswith("aisse ")


async def test_sighup_ends_as_sigterm_does_and_comes_twice_where_a_terminal_closes(
    client: aiohttp.ClientSession,
) -> None:
    async with served("--upstream", "simulator", "--drain-s", "60") as running:
        async with client.post(running.url + "/api/chat", json=prompt("[[tokens=40 pace=40]]")) as response:
            running.process.send_signal(signal.SIGHUP)
            await until_draining(running.url)
            running.process.send_signal(signal.SIGHUP)
            text = await response.text()
        assert ending(text) == "complete"
        assert "event: reconnect\n" in text
        while running.process.returncode is None:  # also in its last moments
            running.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.001)
        assert await running.exit() == 0
        assert running.log()[-1]["event"] == "stopped"


async def test_sigterm_after_sighup_ends_it_at_once(client: aiohttp.ClientSession) -> None:
    async with (
        served("--upstream", "simulator", "--drain-s", "600") as running,
        client.post(running.url + "/api/chat", json=prompt("[[tokens=100000 pace=40]]")) as response,
    ):
        assert response.status == 200
        running.process.send_signal(signal.SIGHUP)
        await until_draining(running.url)
        running.process.send_signal(signal.SIGTERM)
        assert await running.exit() == 128 + signal.SIGTERM


async def test_sighup_that_is_ignored_at_the_start_stays_so(client: aiohttp.ClientSession) -> None:
    """As under nohup."""
    host, port = own_address()
    url = f"http://{host}:{port}"
    serve = ("-m", "aisse", "serve", "--host", host, "--port", port, "--upstream", "simulator")
    async with started("-c", IGNORING.format("HUP"), sys.executable, *serve) as process:
        await until_serving(client, url)
        process.send_signal(signal.SIGHUP)
        assert await answer(client, url) == "complete"
        async with client.get(url + "/health/ready") as response:
            assert response.status == 200
        process.send_signal(signal.SIGTERM)
        assert (await outcome(process))[0] == 0


async def test_terminal_that_closes_ends_it_in_order(client: aiohttp.ClientSession) -> None:
    """What it would say from then on cannot be written any more."""
    host, port = own_address()
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "aisse", *SERVE[:1], "--host", host, "--port", port, *SERVE[3:], "--drain-s", "60"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", IN_A_TERMINAL, *line),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        url = f"http://{host}:{port}"
        await until_serving(client, url)
        async with client.post(url + "/api/chat", json=prompt("[[tokens=60 pace=40]]")) as response:
            os.close(ours)
            assert ending(await response.text()) == "complete"
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


# Makes standard input the controlling terminal, whose end the kernel tells by SIGHUP, and becomes the command.
IN_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
