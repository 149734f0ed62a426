"""Readers whose connections are cut: at every byte, at random moments, and long after the answer has ended.

TESTS_SOAK=1 runs the full numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from command import health, served
from conftest import eventually, prompt, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import aiohttp

    from aisse.simulator import Simulator

SOAK = os.environ.get("TESTS_SOAK") == "1"

# More readers at once than this would find the client's own event loop the bottleneck.
AT_ONCE = 256

ANSWER_BYTES = 8 << 10


@dataclass
class Browser:
    """What an EventSource of the standard knows (WHATWG HTML, 9.2.6): an id counts once its event is complete."""

    events: list[tuple[str, str, str]] = field(default_factory=list)
    """Type, data and id of each event, over all connections."""
    last_id: str = ""
    _lines: bytes = b""
    _pending: dict[str, str] = field(default_factory=dict)

    def feed(self, data: bytes) -> None:
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            if not line:
                self._dispatch()
            elif not line.startswith(b":"):
                name, _, value = line.decode().partition(": ")
                self._pending[name] = value

    def cut(self) -> None:
        """What was not complete is forgotten."""
        self._lines = b""
        self._pending = {}

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1][0] == "end"

    @property
    def seqs(self) -> list[int]:
        return [int(event_id.rpartition(".")[2]) for _, _, event_id in self.events]

    @property
    def text(self) -> str:
        deltas = (json.loads(data)["delta"] for kind, data, _ in self.events if kind == "content_block_delta")
        return "".join(delta.get("text", "") for delta in deltas)

    def _dispatch(self) -> None:
        pending, self._pending = self._pending, {}
        self.last_id = pending.get("id", self.last_id)
        if "data" in pending:
            self.events.append((pending.get("event", "message"), pending["data"], self.last_id))


@dataclass
class Response:
    """The head of an answer; its body is read by the byte, whatever the chunks."""

    status: int
    location: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    _left: int = 0

    async def read(self, limit: int) -> bytes:
        """Some bytes of the body, at most `limit`; none at its clean end. EOFError where it is cut."""
        if not self._left:
            self._left = int(await self.reader.readuntil(b"\r\n"), 16)
            if not self._left:
                return b""
        data = await self.reader.read(min(limit, self._left))
        if not data:
            raise EOFError
        self._left -= len(data)
        if not self._left:
            await self.reader.readexactly(2)
        return data


@contextlib.asynccontextmanager
async def asking(
    address: tuple[str, int], method: str, path: str, last_id: str = "", body: bytes = b""
) -> AsyncIterator[Response]:
    """A request on a connection of its own, which is reset at the end."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: test\r\n"
        if last_id:
            head += f"Last-Event-ID: {last_id}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        said = (await reader.readuntil(b"\r\n\r\n")).decode()
        location = re.search(r"^Content-Location: (.*)\r$", said, re.MULTILINE)
        yield Response(int(said.split(" ")[1]), location[1] if location else "", reader, writer)
    finally:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


async def read_some(response: Response, browser: Browser, size: int) -> bool:
    """Feeds exactly `size` bytes of the body to the browser, and cuts. True if the body ended cleanly before."""
    while size:
        data = await response.read(size)
        if not data:
            return True
        size -= len(data)
        browser.feed(data)
    browser.cut()
    return False


async def read_on(address: tuple[str, int], path: str, browser: Browser) -> None:
    """Comes back with the browser's last id, until the server says that it was all."""
    async with asking(address, "GET", path, browser.last_id) as response:
        if response.status == 204:
            assert browser.ended
            return
        assert response.status == 200
        while data := await response.read(1 << 16):
            browser.feed(data)
    assert browser.ended


def check(browser: Browser, answer: str) -> None:
    """Asserts that the browser has the whole answer, each event once and in order."""
    assert browser.seqs == list(range(1, len(browser.events) + 1))
    assert [kind for kind, _, _ in browser.events].count("end") == 1
    assert browser.ended
    assert json.loads(browser.events[-1][1])["reason"] == "complete"
    assert browser.text == answer


TEXT = " ".join(f"wörd{number}" for number in range(45)) + " \N{BRAIN}\u2028 end"


# It takes half a minute, and more where the machine has other things to do.
@pytest.mark.timeout(600)
# Every seventh byte in one split of the upstream's writes, in the others every 17th, unless there is time for all.
@pytest.mark.parametrize(
    ("script", "step"),
    [("split=1", 7), ("", 17), ("split=7", 17), ("line_end=crlf split=3", 17)],
    ids=["bytes", "whole writes", "sevens", "crlf, threes"],
)
async def test_reader_cut_after_any_byte_gets_the_answer_to_the_byte(
    simulator: Simulator, script: str, step: int
) -> None:
    """Each cut comes while the stream runs, for all but those at its end: all readers of a batch follow it live."""
    asked = f"[[pace=0 text='{TEXT}' first_s=0.2 {script}]]"
    async with serving(simulator.url, first_byte_commit_s=0) as server:
        start = json.dumps(prompt(asked)).encode()

        async def cut(path: str, size: int) -> None:
            browser = Browser()
            async with asking(server.address, "GET", path) as response:
                assert response.status == 200
                await read_some(response, browser, size)
            await read_on(server.address, path, browser)
            check(browser, TEXT)

        async def batch(sizes: range) -> int:
            async with asking(server.address, "POST", "/api/chat", body=start) as response:
                path = response.location
                async with asyncio.TaskGroup() as tasks:
                    for size in sizes:
                        tasks.create_task(cut(path, size))
                whole = Browser()
                length = 0
                while data := await response.read(1 << 16):
                    whole.feed(data)
                    length += len(data)
                check(whole, TEXT)
            return length

        length = await batch(range(1))
        assert length >= ANSWER_BYTES
        sizes = range(1, length + 1, 1 if SOAK else step)
        batches = [sizes[first : first + AT_ONCE] for first in range(0, len(sizes), AT_ONCE)]
        for part in batches:
            assert await batch(part) == length
        assert simulator.stats.requests == simulator.stats.completed == 1 + len(batches)


@pytest.mark.timeout(600)
async def test_reader_of_a_finished_stream_cut_after_any_byte_gets_the_answer_to_the_byte(
    simulator: Simulator,
) -> None:
    async with serving(simulator.url) as server:
        body = json.dumps(prompt(f"[[pace=0 text='{TEXT}']]")).encode()
        async with asking(server.address, "POST", "/api/chat", body=body) as response:
            length = 0
            while data := await response.read(1 << 16):
                length += len(data)
            path = response.location
        assert length >= ANSWER_BYTES
        sizes = iter([*range(0, length, 1 if SOAK else 7), length])

        async def cut() -> None:
            for size in sizes:
                browser = Browser()
                async with asking(server.address, "GET", path) as response:
                    await read_some(response, browser, size)
                await read_on(server.address, path, browser)
                check(browser, TEXT)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(16):
                tasks.create_task(cut())
        assert simulator.stats.requests == 1
        await eventually(lambda: server.registry.readers == 0)


async def test_readers_dropped_at_random_moments_lose_nothing_and_pay_once(simulator: Simulator) -> None:
    readers, drops, tokens, pace = (500, 20, 300, 12) if SOAK else (100, 10, 150, 45)
    rng = random.Random(3)
    dropped_running = 0
    async with serving(simulator.url) as server:

        async def read(seed: int) -> None:
            nonlocal dropped_running
            dice = random.Random(seed)
            browser = Browser()
            body = json.dumps(prompt(f"[[tokens={tokens} pace={pace} seed={seed % 7}]]")).encode()
            # A token takes some 140 bytes: all drops together come before the end.
            sizes = [dice.randrange(tokens * 140 // drops) for _ in range(drops)]
            async with asking(server.address, "POST", "/api/chat", body=body) as response:
                assert response.status == 200
                path = response.location
                await read_some(response, browser, sizes[0])
            for size in sizes[1:]:
                async with asking(server.address, "GET", path, browser.last_id) as response:
                    assert response.status == 200
                    await read_some(response, browser, size)
                dropped_running += not browser.ended
                await asyncio.sleep(dice.choice((0, 0, 0.01, 0.1)))
            await read_on(server.address, path, browser)
            check(browser, " ".join(f"w{number}" for number in range(1, tokens + 1)))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(readers):
                tasks.create_task(read(rng.getrandbits(32)))
        assert dropped_running == readers * (drops - 1)
        assert simulator.stats.requests == simulator.stats.completed == readers
        assert server.registry.generations == readers
        assert server.registry.figures.failed == 0


@pytest.mark.timeout(300)
async def test_finished_streams_stay_within_the_memory_given_to_them(
    simulator: Simulator, client: aiohttp.ClientSession, record_property: Callable[[str, object], None]
) -> None:
    """Their logs fill `replay_bytes` to the brim; all that is kept beside them must fit into half as much again."""
    streams, limit = (10_000, 32 << 20) if SOAK else (1_500, 5 << 20)
    body = json.dumps(prompt("[[pace=0 tokens=16]]")).encode()
    async with served(
        *("--upstream", simulator.url, "--replay-bytes", str(limit), "--retention-s", "3600"),
        *("--log-level", "warning"),
    ) as running:

        async def ask(count: int) -> None:
            for _ in range(count):
                async with client.post(
                    running.url + "/api/chat", data=body, headers={"Content-Type": "application/json"}
                ) as response:
                    assert response.status == 200
                    assert b"event: end\n" in await response.read()

        async def ask_all(count: int) -> None:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(10):
                    tasks.create_task(ask(count // 10))

        # The first streams bring what every process needs once: connections, caches, compiled expressions.
        await ask_all(100)
        used = (await health(client, running))["replayBytes"]
        before = resident_bytes(running.pid)
        await ask_all(streams)
        growth = resident_bytes(running.pid) - before
        replayed = (await health(client, running))["replayBytes"]

        figures = {
            "streams": streams,
            "bytes a stream": used // 100,
            "replay / limit": round(replayed / limit, 3),
            "growth / limit": round(growth / limit, 3),
        }
        for name, value in figures.items():
            record_property(name, value)
        print(figures)  # noqa: T201 - the figures are what this is for
        assert 0.85 * limit <= replayed <= 1.01 * limit
        assert growth <= 1.5 * limit, figures


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", "rb") as file:  # noqa: PTH123 - a file of the kernel's never waits
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
