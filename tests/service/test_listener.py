"""What becomes of connections that the kernel has made and nobody has accepted when the listener closes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.append(str(Path(__file__).parents[1] / "e2e"))

from activation import activated
from command import EXIT_S, START_S, served
from conftest import prompt

from aisse.errors import ConfigError
from aisse.service.listener import Listener

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

# More than aiohttp's own backlog of 128 would hold.
CONNECTIONS = 200

BODY = json.dumps(prompt("[[tokens=1 pace=0]]")).encode()
POST = (
    f"POST /api/chat HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
).encode() + BODY


@contextlib.asynccontextmanager
async def queued(pid: int, address: tuple[str, int]) -> AsyncIterator[list[socket.socket]]:
    """Connections that have sent a POST to a process that is stopped; the block has to let it go on or end it."""
    os.kill(pid, signal.SIGSTOP)
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        socks = []
        async with asyncio.timeout(60):
            for _ in range(CONNECTIONS):
                sock = stack.enter_context(contextlib.closing(socket.socket()))
                sock.setblocking(False)
                await loop.sock_connect(sock, address)
                await loop.sock_sendall(sock, POST)
                socks.append(sock)
        yield socks


async def status(sock: socket.socket) -> str:
    """Of the answer; `reset` or `closed` without one."""
    try:
        async with asyncio.timeout(START_S):
            said = await asyncio.get_running_loop().sock_recv(sock, 1 << 16)
    except ConnectionResetError:
        return "reset"
    return said[9:12].decode() or "closed"


async def test_everybody_who_has_connected_is_answered_when_the_listener_closes() -> None:
    async with served("--upstream", "simulator") as running, queued(running.pid, running.address) as socks:
        os.kill(running.pid, signal.SIGTERM)
        os.kill(running.pid, signal.SIGCONT)
        statuses = Counter(await asyncio.gather(*map(status, socks)))
        assert set(statuses) <= {"200", "503"}, statuses
        # Some may have been accepted before the signal was seen.
        assert statuses["503"] > CONNECTIONS / 2, statuses
        assert await running.exit() == 0


async def test_who_waits_in_an_inherited_socket_is_left_to_the_next_process() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=4096)) as held:
        address = held.getsockname()
        async with inheriting(held) as first, queued(first.pid, address) as socks:
            first.send_signal(signal.SIGTERM)
            first.send_signal(signal.SIGCONT)
            async with asyncio.timeout(EXIT_S):
                assert await first.wait() == 0
            async with inheriting(held):
                statuses = Counter(await asyncio.gather(*map(status, socks)))
        assert set(statuses) <= {"200", "503"}, statuses
        assert statuses["200"] > CONNECTIONS / 2, statuses


@contextlib.asynccontextmanager
async def inheriting(held: socket.socket) -> AsyncIterator[Process]:
    """A server with the simulator on a socket that it was given, once it accepts connections."""
    line, passed = activated([sys.executable, "-m", "aisse", "serve", "--upstream", "simulator"], held.fileno())
    with tempfile.TemporaryFile() as stderr:
        process = await asyncio.create_subprocess_exec(
            *line, **passed, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=stderr
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(START_S):
                assert re.match(rb"aisse \S+ on http", await process.stdout.readline())
                await process.stdout.readline()
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def test_close_is_idempotent_and_nobody_can_connect_afterwards() -> None:
    listener = await Listener.open(asyncio.Protocol, "127.0.0.1", 0)
    host, _, port = listener.url.removeprefix("http://").partition(":")
    await listener.close()
    await listener.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


async def test_connection_accepted_at_the_close_is_served_as_any_other() -> None:
    made: list[asyncio.Protocol] = []

    def factory() -> asyncio.Protocol:
        made.append(asyncio.Protocol())
        return made[-1]

    listener = await Listener.open(factory, "127.0.0.1", 0)
    host, _, port = listener.url.removeprefix("http://").partition(":")
    # Connected by the kernel, while the loop has had no turn to accept it.
    with contextlib.closing(socket.create_connection((host, int(port)), 10)):
        assert made == []
        await listener.close()
        assert len(made) == 1


async def test_port_that_is_taken_is_named() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^host, port: cannot listen on 127.0.0.1:{port}: "):
            await Listener.open(asyncio.Protocol, "127.0.0.1", port)
