"""aisse's commands as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator
    from typing import IO

    import aiohttp

# Importing everything takes most of a second; this allows for a machine that is busy with other tests.
START_S = 100.0
EXIT_S = 60.0

# Sets a hard limit of open files, then becomes the command.
_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


@dataclass
class Command:
    """One process. `url` and `said` (its lines on standard output) are there once it serves."""

    process: Process
    stderr_file: IO[bytes]
    url: str = ""
    said: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host.strip("[]"), int(port)

    def stderr(self) -> str:
        """Everything that it wrote to standard error so far."""
        # Without a seek: the process writes at the same offset, and would overwrite what it had written.
        descriptor = self.stderr_file.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()

    def log(self) -> list[dict[str, Any]]:
        """Its log lines so far. AssertionError for anything else on standard error, a traceback above all."""
        text = self.stderr()
        try:
            return [json.loads(line) for line in text.splitlines()]
        except ValueError:
            raise AssertionError(f"not only log lines: {text}") from None

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log lines of one kind."""
        return [line for line in self.log() if line["event"] == event]

    async def until_logged(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """The log lines of one kind, once there are `count`: a thread writes them, a moment after what they tell of."""
        async with asyncio.timeout(EXIT_S):
            while len(lines := self.logged(event)) < count:
                await asyncio.sleep(0.01)
        return lines

    async def exit(self, timeout_s: float = EXIT_S) -> int:
        """Its exit code, once it has ended; standard output is read to its end."""
        async with asyncio.timeout(timeout_s):
            out, _ = await self.process.communicate()
        self.said += out.decode().splitlines()
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.asynccontextmanager
async def command(
    *arguments: str, environ: dict[str, str] | None = None, open_files: tuple[int, int] | None = None
) -> AsyncIterator[Command]:
    """`python -m aisse ...` with no settings but those given; killed at the end if it still runs.

    `open_files` are the soft and hard limits of descriptors that it begins with.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("AISSE_") and name not in {"EZAI_API_KEY", "ANTHROPIC_API_KEY", "CREDENTIALS_DIRECTORY"}
    }
    line = ["-m", "aisse", *arguments]
    if open_files is not None:
        line = ["-c", _LIMITED, *map(str, open_files), *line]
    with tempfile.TemporaryFile() as stderr:  # a file never fills, as a pipe that nobody reads does
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *line,
            env=inherited | (environ or {}),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
        )
        try:
            yield Command(process, stderr)
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


@contextlib.asynccontextmanager
async def served(
    *arguments: str, environ: dict[str, str] | None = None, open_files: tuple[int, int] | None = None
) -> AsyncIterator[Command]:
    """`aisse ARGUMENTS`, `serve` with a free port if there is no command in them, once it accepts connections."""
    line = arguments if arguments[:1] == ("simulate",) else ("serve", "--port", "0", *arguments)
    async with command(*line, environ=environ, open_files=open_files) as running:
        stdout = running.process.stdout
        assert stdout is not None
        async with asyncio.timeout(START_S):
            first = (await stdout.readline()).decode().rstrip("\n")
            found = re.fullmatch(r"aisse \S+ (?:simulator )?on (http://\S+:\d+)", first)
            assert found is not None, f"{first!r}, {running.stderr()}"
            running.url = found[1]
            running.said.append(first)
            if "simulate" not in line:
                running.said.append((await stdout.readline()).decode().rstrip("\n"))
        yield running


async def refused(*arguments: str, environ: dict[str, str] | None = None) -> str:
    """The one line with which a start is refused."""
    async with command(*arguments, environ=environ) as running:
        assert await running.exit(START_S) == 78
        assert running.said == []
        text = running.stderr()
    assert text.startswith("aisse: ")
    assert text.count("\n") == 1
    return text.removeprefix("aisse: ").rstrip("\n")


async def health(client: aiohttp.ClientSession, running: Command) -> dict[str, Any]:
    async with client.get(running.url + "/health") as response:
        assert response.status == 200
        said: dict[str, Any] = await response.json()
        return said


def events(text: str) -> list[tuple[str, Any]]:
    """Type and data of each event in a body of ours."""
    return [(kind, json.loads(data)) for kind, data in re.findall(r"^event: (.*)\ndata: (.*)$", text, re.MULTILINE)]


def ending(text: str) -> str:
    """The reason in the one `end` event, which must be the last."""
    seen = events(text)
    assert [kind for kind, _ in seen].count("end") == 1, text[-500:]
    assert seen[-1][0] == "end"
    reason: str = seen[-1][1]["reason"]
    assert (seen[-2][0] == "error") == (reason not in {"complete", "stopped"})
    return reason


async def refuses_connections(running: Command) -> bool:
    """Whether nobody listens at its address any more."""
    try:
        _, writer = await asyncio.open_connection(*running.address)
    except ConnectionRefusedError:
        return True
    writer.close()
    await writer.wait_closed()
    return False
