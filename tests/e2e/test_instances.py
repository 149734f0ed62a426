"""Instances with one log as processes of their own: killed, stopped and restarted, and what is left behind.

TESTS_SOAK=1 runs the full numbers: 50 kills, and Redis away for a minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from command import Command, refused, served
from conftest import eventually, prompt
from rawclient import parse
from redis_server import any_binary, redis_server

from aisse.streams.endings import HOLE

if TYPE_CHECKING:
    import contextlib
    from collections.abc import AsyncIterator

    from redis_server import Server

SOAK = os.environ.get("TESTS_SOAK") == "1"
KILLS = 50 if SOAK else 2
STREAMS = 60 if SOAK else 20
LOST_S = 10.0 if SOAK else 30.0  # among other tests everything may be late

# As short as a process is not kept waiting, whatever else the machine does.
LEASE_S = "3"

pytestmark = pytest.mark.timeout(3600 if SOAK else 300)


@pytest.fixture
async def redis() -> AsyncIterator[Server]:
    async with redis_server(any_binary()) as server:
        yield server


@pytest.fixture
async def upstream() -> AsyncIterator[Command]:
    async with served("simulate") as running:
        yield running


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        yield session


def instance(upstream: Command, redis: Server, *options: str) -> contextlib.AbstractAsyncContextManager[Command]:
    return served("--upstream", upstream.url, "--log", redis.url, *options)


@dataclass
class Reader:
    """Reads one stream, wherever it may, until its end."""

    path: str
    instances: list[str]
    text: str = ""
    ended_at: float = 0.0
    requests: int = 0
    cursors: list[int] = field(default_factory=list)
    """From which it went on, each time."""

    @property
    def frames(self) -> list[Any]:
        return parse(self.text.encode()).frames

    async def run(self, client: aiohttp.ClientSession) -> None:
        seq = 0
        while True:
            url = self.instances[self.requests % len(self.instances)]
            self.requests += 1
            self.cursors.append(seq)
            headers = {"Last-Event-ID": f"{self.path[-22:]}.{seq}"}
            part = ""
            try:
                async with client.get(url + self.path, headers=headers) as answer:
                    if answer.status == 204:
                        return
                    assert answer.status == 200, await answer.text()
                    async for data in answer.content.iter_any():
                        part += data.decode()
                        if "\nevent: end\n" in part and part.endswith("\n\n"):
                            self.ended_at = self.ended_at or time.monotonic()
            except (aiohttp.ClientError, ConnectionError):
                await asyncio.sleep(0.05)
            whole = part[: part.rfind("\n\n") + 2]
            found = parse(whole.encode()).frames if "event:" in whole else []
            if found:
                seq = found[-1].seq
                # What is opened with is not part of the stream.
                self.text += whole[whole.index("event: ") :]

    def lost_producer(self) -> list[int]:
        """The numbers before the hole; AssertionError unless it was told the end once, and as it should be."""
        frames = self.frames
        assert [frame.event for frame in frames[-2:]] == ["error", "end"]
        assert sum(frame.event == "end" for frame in frames) == 1
        assert json.loads(frames[-1].data)["reason"] == "producer_lost"
        assert json.loads(frames[-2].data)["error"]["type"] == "producer_lost_error"
        numbers = [frame.seq for frame in frames[:-2]]
        assert numbers == list(range(1, len(numbers) + 1))
        assert frames[-1].seq == frames[-2].seq + 1 > HOLE
        return numbers


async def ask(client: aiohttp.ClientSession, url: str, text: str, **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()} | {"Prefer": "respond-async"}
    async with client.post(url + "/api/chat", json=prompt(text), headers=named) as answer:
        assert answer.status == 202, await answer.text()
        path: str = answer.headers["Location"]
        return path


async def kept(redis: Server, path: str) -> list[int]:
    """The number of the last frame of each of a stream's entries."""
    key = f"aisse:{{{path[-22]}}}:{path[-22:]}"
    connection = redis.client()
    entries: Any = await connection.xrange(key)
    await connection.aclose()
    return [int(name.partition(b"-")[0]) for name, _ in entries]


async def test_kill_of_the_producer_ends_its_streams_once_for_everybody(
    redis: Server, upstream: Command, client: aiohttp.ClientSession
) -> None:
    """Readers of the one that dies, of the other, and of both in turn; by the default lease."""
    # What was appended is looked at within the retention.
    options = ("--retention-s", "8", "--log-level", "error")
    slowest = 0.0
    async with instance(upstream, redis, *options) as survivor:
        base = len(await redis.client().client_list())
        for _ in range(KILLS):
            async with instance(upstream, redis, *options) as victim:
                paths = [await ask(client, victim.url, "[[tokens=100000 pace=30]]") for _ in range(STREAMS)]
                readers = [
                    Reader(path, [[victim.url, survivor.url], [survivor.url]][number % 2])
                    for number, path in enumerate(paths * 2)
                ]
                async with asyncio.TaskGroup() as tasks:
                    for reader in readers:
                        tasks.create_task(reader.run(client))
                    await asyncio.sleep(1)  # load
                    victim.process.kill()
                    killed_at = time.monotonic()
                    await victim.process.wait()
                    for reader in readers:  # nobody waits for who is gone
                        reader.instances = [survivor.url]
            entries = {path: await kept(redis, path) for path in paths}
            for reader in readers:
                numbers = reader.lost_producer()
                slowest = max(slowest, reader.ended_at - killed_at)
                # All that had been appended.
                appended = [last for last in entries[reader.path] if last < HOLE]
                assert numbers[-1] >= appended[-1]
                assert len(entries[reader.path]) == len(appended) + 1
        assert slowest < LOST_S
        print(f"\n{KILLS} kills of {STREAMS} streams: the last end after {slowest:.1f} s")  # noqa: T201
        connection = redis.client()
        async with asyncio.timeout(60):
            while len(await connection.keys()) > 1:  # the survivor's own
                await asyncio.sleep(0.1)
        async with asyncio.timeout(60):
            while len(await connection.client_list()) > base + len(redis._clients):
                await asyncio.sleep(0.05)


async def test_reader_ahead_of_what_was_shared_still_ends(
    redis: Server, upstream: Command, client: aiohttp.ClientSession
) -> None:
    """By any number of events: two are as many as the end's own frames."""
    slow = ("--log-tick-s", "1", "--lease-s", LEASE_S)
    async with instance(upstream, redis, "--lease-s", LEASE_S) as survivor, instance(upstream, redis, *slow) as victim:
        path = await ask(client, victim.url, "[[tokens=100000 pace=50]]")
        first = Reader(path, [victim.url])
        reading = asyncio.create_task(first.run(client))
        async with asyncio.timeout(60):
            while len(await kept(redis, path)) < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # half a tick
        victim.process.kill()
        last = (await kept(redis, path))[-1]
        readers = [Reader(path, [survivor.url]) for _ in range(6)]
        first.instances = [survivor.url]

        async def go_on(reader: Reader, cursor: int) -> str:
            async with client.get(survivor.url + path, headers={"Last-Event-ID": f"{path[-22:]}.{cursor}"}) as answer:
                return await answer.text()

        texts = await asyncio.gather(*(go_on(reader, last + ahead) for ahead, reader in enumerate(readers)))
        await reading
        assert first.cursors[-1] > HOLE
        assert sum(frame.event == "end" for frame in first.frames) == 1
        for text in texts:
            assert [frame.event for frame in parse(text.encode()).frames] == ["error", "end"]


async def test_producer_that_stood_still_past_its_lease_appends_nothing_and_stops_its_upstream(
    redis: Server, upstream: Command, client: aiohttp.ClientSession
) -> None:
    options = ("--lease-s", LEASE_S)
    async with instance(upstream, redis, *options) as frozen, instance(upstream, redis, *options) as other:
        path = await ask(client, frozen.url, "[[tokens=100000 pace=50]]")
        here, there = Reader(path, [frozen.url]), Reader(path, [other.url])
        tasks = [asyncio.create_task(reader.run(client)) for reader in (here, there)]
        async with asyncio.timeout(60):
            while len(await kept(redis, path)) < 20:
                await asyncio.sleep(0.01)
        os.kill(frozen.pid, signal.SIGSTOP)
        await tasks[1]
        there.lost_producer()
        entries = await kept(redis, path)
        os.kill(frozen.pid, signal.SIGCONT)
        await tasks[0]
        here.lost_producer()

        async def active() -> int:
            async with client.get(upstream.url + "/stats") as answer:
                return int((await answer.json())["active"])

        async with asyncio.timeout(60):
            while await active():
                await asyncio.sleep(0.02)
        assert await kept(redis, path) == entries
        assert await frozen.until_logged("stream lost to other instances")


async def test_producer_that_stood_still_until_its_streams_were_forgotten_does_not_begin_again(
    redis: Server, upstream: Command, client: aiohttp.ClientSession
) -> None:
    options = ("--lease-s", LEASE_S, "--retention-s", "0.5")
    async with instance(upstream, redis, *options) as frozen, instance(upstream, redis, *options) as other:
        path = await ask(client, frozen.url, "[[tokens=100000 pace=50]]")
        here, there = Reader(path, [frozen.url]), Reader(path, [other.url])
        tasks = [asyncio.create_task(reader.run(client)) for reader in (here, there)]
        async with asyncio.timeout(60):
            while len(await kept(redis, path)) < 20:
                await asyncio.sleep(0.01)
        os.kill(frozen.pid, signal.SIGSTOP)
        await tasks[1]
        connection = redis.client()
        async with asyncio.timeout(60):
            while len(await connection.keys()) > 2 or time.monotonic() - there.ended_at < 6:
                await asyncio.sleep(0.05)
        os.kill(frozen.pid, signal.SIGCONT)
        await tasks[0]
        assert sum(frame.event == "end" for frame in here.frames) == 1
        assert not await kept(redis, path)


@pytest.mark.parametrize("away_s", [5, 60] if SOAK else [4])
async def test_redis_that_is_away_costs_no_reader_an_event(
    redis: Server, upstream: Command, client: aiohttp.ClientSession, away_s: float
) -> None:
    """Ended, and started again empty; then stopped by a signal, and continued."""
    lease = ("--lease-s", LEASE_S)
    async with instance(upstream, redis, *lease) as one, instance(upstream, redis, *lease) as other:
        for stand_still in (False, True):
            tokens = round((away_s + 6) * 20)  # it ends after that is over, and everybody has heard of it
            paths = [await ask(client, one.url, f"[[tokens={tokens} pace=20]]") for _ in range(10)]
            readers = [Reader(path, [url]) for path in paths for url in (one.url, other.url)]
            async with asyncio.TaskGroup() as tasks:
                for reader in readers:
                    tasks.create_task(reader.run(client))
                await asyncio.sleep(1)
                if stand_still:
                    redis.pause()
                else:
                    await redis.stop()
                await asyncio.sleep(away_s)
                async with client.get(one.url + "/health") as answer:
                    said = await answer.json()
                assert said["status"] == "degraded"
                assert "the shared log does not answer" in said["reasons"][0]
                if stand_still:
                    redis.resume()
                else:
                    await redis.start()
            for reader in readers:
                frames = reader.frames
                assert [frame.seq for frame in frames] == list(range(1, len(frames) + 1))
                assert json.loads(frames[-1].data)["reason"] == "complete"
        await eventually(lambda: not one.logged("reader evicted"))


@pytest.mark.parametrize("how", ["stopped", "standing still"])
async def test_drain_without_redis_lets_readers_stay_and_is_over_in_time(
    redis: Server, upstream: Command, client: aiohttp.ClientSession, how: str
) -> None:
    async with instance(upstream, redis, "--drain-s", "3") as one:
        paths = [await ask(client, one.url, f"[[tokens={tokens} pace=20]]") for tokens in (60, 100_000)]
        readers = [asyncio.create_task(read(client, one.url + path)) for path in paths]
        async with asyncio.timeout(60):
            while not await kept(redis, paths[1]):
                await asyncio.sleep(0.01)
        if how == "stopped":
            await redis.stop()
        else:
            redis.pause()
        async with asyncio.timeout(60):
            while not one.logged("shared log in trouble"):
                await asyncio.sleep(0.02)
        begun = time.monotonic()
        one.process.send_signal(signal.SIGTERM)
        assert await one.exit() == 0
        # Not the two seconds of aisse/deploy/README.md: this machine may be busy. But it waits for no answer of Redis.
        assert time.monotonic() - begun < 3 + 6
        assert [json.loads(parse((await reader).encode()).frames[-1].data)["reason"] for reader in readers] == [
            "complete",
            "shutdown",
        ]


async def read(client: aiohttp.ClientSession, url: str) -> str:
    async with client.get(url) as answer:
        return await answer.text()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://127.0.0.1:{port}/99", "no database of that number"),
        ("redis://:wrong@127.0.0.1:{port}/0", "refuses the user or password"),
        ("redis://127.0.0.1:{http}/0", "is no Redis"),
        ("http://127.0.0.1:1", "must be `memory`, redis://"),
        ("redis://", "must be `memory`, redis://"),
        ("redis://127.0.0.1:port/0", "is no URL"),
    ],
)
async def test_wrong_url_is_refused_by_one_line_that_names_it(
    redis: Server, upstream: Command, url: str, why: str
) -> None:
    text = url.format(port=redis.port, http=upstream.address[1])
    said = await refused("serve", "--port", "0", "--upstream", "simulator", environ={"AISSE_LOG": text})
    assert "log" in said.lower()
    assert why in said
    assert ":wrong@" not in said


async def test_password_in_a_flag_is_refused() -> None:
    said = await refused("serve", "--upstream", "simulator", "--log", "redis://:secret@127.0.0.1/0")
    assert "AISSE_LOG" in said
    assert "secret" not in said


async def test_password_is_never_shown(redis: Server) -> None:
    await redis.client().config_set("requirepass", "a-long-secret")
    url = f"redis://:a-long-secret@127.0.0.1:{redis.port}/0"
    async with served("--upstream", "simulator", environ={"AISSE_LOG": url}) as running:
        async with aiohttp.ClientSession() as session, session.get(running.url + "/health") as answer:
            assert (await answer.json())["log"] == "redis"
        os.kill(running.pid, signal.SIGTERM)
        await running.exit()
        assert "a-long-secret" not in running.stderr() + "".join(running.said)
    said = await refused("serve", "--upstream", "simulator", environ={"AISSE_LOG": redis.url})
    assert "password" in said
