"""Several instances of aisse with one log, in this process, before real servers of both kinds.

What happens when a process dies or stands still is tests/e2e/test_instances.py's. TESTS_SOAK=1 raises the counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from conftest import Server, eventually, prompt, serving
from hypothesis import given
from hypothesis import strategies as st
from rawclient import RawClient, parse
from rawupstream import LAST_CHUNK, MESSAGE_STOP, Connection, Request, chunk, delta, head, message_start, raw_upstream
from redis_server import Server as Redis
from redis_server import binaries, redis_server, required
from structlog.testing import capture_logs

from aisse.errors import ConfigError, UnknownStreamError
from aisse.formats.anthropic import Anthropic
from aisse.replay.connection import SCRIPTS
from aisse.replay.lookup import GATHER_S, PATIENCE_S
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.replay.producer_scripts import Claim, Create, Withdraw
from aisse.settings import Settings
from aisse.simulator import Script, Simulator
from aisse.streams import registry as registry_module
from aisse.streams.followed import FollowedStream
from aisse.streams.shared import Shared
from aisse.streams.table import Table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aisse.replay import scripts
    from aisse.replay.mirror import RedisLog
    from aisse.streams.stream import Stream

    Run = Callable[[], Awaitable[Any]]

SOAK = os.environ.get("TESTS_SOAK") == "1"
STATE = {"Accept": "application/json"}

# Longer than a busy machine ever keeps one process waiting: tests that are about a lease's end set a short one.
LEASE_S = 20.0


@pytest.fixture(params=list(binaries()))
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    async with redis_server(required(request.param)) as server:
        yield server


@pytest.fixture
async def redis() -> AsyncIterator[Redis]:
    """Whichever there is, where the kind makes no difference."""
    async with redis_server() as server:
        yield server


@dataclass
class Fleet:
    """Instances before one log, and a client."""

    instances: list[Server]
    client: aiohttp.ClientSession
    simulator: Simulator

    @property
    def generations(self) -> int:
        return sum(instance.registry.generations for instance in self.instances)

    async def ask(self, instance: int, text: str, *, shared: bool = True, **headers: str) -> str:
        """The path of a stream that runs there, without a reader; once Redis has it, if `shared`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()} | {"Prefer": "respond-async"}
        async with self.client.post(self.instances[instance].chat, json=prompt(text), headers=named) as answer:
            assert answer.status == 202, await answer.text()
            path: str = answer.headers["Location"]
        if shared:
            log = self.instances[instance].registry._shared
            assert log is not None
            logs = log._mirror._logs
            await eventually(lambda: path[-22:] not in logs or logs[path[-22:]].known)
        return path

    async def read(self, instance: int, path: str, cursor: int | None = None) -> str:
        """The body of a GET, to its end."""
        async with self.get(instance, path, cursor) as answer:
            assert answer.status == 200, await answer.text()
            text: str = await answer.text()
            return text

    def get(self, instance: int, path: str, cursor: int | None = None) -> Any:
        headers = {"Last-Event-ID": f"{path[-22:]}.{cursor}"} if cursor is not None else {}
        return self.client.get(self.instances[instance].url + path, headers=headers)

    async def state(self, instance: int, path: str) -> dict[str, Any]:
        async with self.client.get(self.instances[instance].url + path, headers=STATE) as answer:
            assert answer.status == 200
            said: dict[str, Any] = await answer.json()
            return said

    async def get_status(self, instance: int, path: str) -> int:
        """What the state of a stream is answered with."""
        async with self.client.get(self.instances[instance].url + path, headers=STATE) as answer:
            return answer.status

    async def health(self, instance: int) -> dict[str, Any]:
        async with self.client.get(self.instances[instance].url + "/health") as answer:
            said: dict[str, Any] = await answer.json()
            return said

    def seq(self, instance: int, path: str) -> int:
        """The last event that this instance has of a stream."""
        stream = self.instances[instance].registry.get(path[-22:]) or self.followed(instance).get(path[-22:])
        return stream.log.last_seq if stream is not None else 0

    def followed(self, instance: int) -> dict[str, Any]:
        shared = self.instances[instance].registry._shared
        assert shared is not None
        return dict(shared.following._followed)


@contextlib.asynccontextmanager
async def fleet(
    url: str, *, count: int = 2, upstream: str | None = None, pace: float = 0, **settings: Any
) -> AsyncIterator[Fleet]:
    simulator = Simulator(Script(pace=pace))
    await simulator.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(simulator.close)
        options: dict[str, Any] = {"log": url, "lease_s": LEASE_S} | settings
        instances = [
            await stack.enter_async_context(serving(upstream or simulator.url, **options)) for _ in range(count)
        ]
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        yield Fleet(instances, client, simulator)


async def stream_keys(client: Any) -> list[bytes]:
    """All but what each instance has for itself, and what refuses a claim that comes too late."""
    return [key for key in await client.keys() if b":instance:" not in key and not key.endswith(b":withdrawn")]


async def shared_by(f: Fleet, instance: int) -> None:
    """Returns once Redis has everything of that instance."""
    shared = f.instances[instance].registry._shared
    assert shared is not None
    await eventually(lambda: shared.behind == 0)


async def certain(f: Fleet, instance: int) -> None:
    """Returns once that instance takes what Redis does not have for unknown, as it does not after a slow answer."""
    shared = f.instances[instance].registry._shared
    assert shared is not None
    await eventually(lambda: not shared._catalogue.doubtful)


def reason(text: str) -> str:
    written = parse(text.encode())
    assert [frame.event for frame in written.frames].count("end") == 1
    assert written.frames[-1].event == "end"
    said: str = json.loads(written.frames[-1].data)["reason"]
    return said


def numbers(text: str) -> list[int]:
    return [frame.seq for frame in parse(text.encode()).frames]


# --- reading elsewhere --------------------------------------------------------------------------------------------


async def test_reader_elsewhere_gets_the_answer_to_the_byte(engine: Redis) -> None:
    """By TCP and by the socket: the one that generates, one that follows from the beginning, one that comes late."""
    async with fleet(engine.url) as f, fleet(engine.unix_url, count=1) as other:
        path = await f.ask(0, "[[tokens=60 pace=60]]")
        here = asyncio.create_task(f.read(0, path))
        there = asyncio.create_task(f.read(1, path))
        await eventually(lambda: f.seq(1, path) > 20)
        late = await other.read(0, path)
        assert await here == await there == late
        assert reason(late) == "complete"
        assert numbers(late) == list(range(1, len(numbers(late)) + 1))
        assert await f.read(1, path) == late  # again, from what it kept
        assert f.generations == 1


async def test_reader_goes_on_elsewhere_after_whatever_it_has(redis: Redis) -> None:
    async with fleet(redis.url, count=3) as f:
        path = await f.ask(0, "[[tokens=100 pace=100]]")
        whole = asyncio.create_task(f.read(0, path))
        random_ = random.Random(1)
        got: list[int] = []
        instance = 1
        while True:
            instance = 3 - instance
            async with f.get(instance, path, len(got)) as answer:
                if answer.status == 204:
                    break
                text = ""
                size = random_.randrange(1, 3000)
                async for data in answer.content.iter_any():
                    text += data.decode()
                    if len(text) > size:
                        break
            frames = text[: text.rfind("\n\n") + 2]
            got += numbers(frames) if "\nevent:" in frames else []
        assert got == numbers(await whole)


async def test_state_elsewhere_is_that_of_the_producer(redis: Redis) -> None:
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=20 pace=0]]", Aisse_On_Leave="60")
        await f.read(0, path)
        await shared_by(f, 0)
        here, there = await f.state(0, path), await f.state(1, path)
        assert (there["status"], there["reason"]) == ("ended", "complete")
        # Of the end's time each has its own clock's word; of the beginning's, to a millisecond.
        times = {"created": 0, "ended": 0}
        assert here | times == there | times
        created = [datetime.fromisoformat(said["created"]) for said in (here, there)]
        assert abs((created[0] - created[1]).total_seconds()) < 0.005
        running = await f.ask(0, "[[tokens=1000 pace=50]]")
        await eventually(lambda: f.seq(0, running) > 5)
        said = await f.state(1, running)
        assert (said["status"], said["reason"], said["ended"]) == ("streaming", None, None)
        assert said["usage"]["input_tokens"] == (await f.state(0, running))["usage"]["input_tokens"] > 0


async def test_end_is_answered_204_elsewhere_and_what_never_was_404(redis: Redis) -> None:
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=3]]")
        last = numbers(await f.read(0, path))[-1]
        await shared_by(f, 0)
        async with f.get(1, path, last) as answer:
            assert answer.status == 204
        await certain(f, 1)
        for path in ("/api/chat/" + "A" * 22, "/api/chat/short", "/api/chat/" + "A" * 21 + "%0a"):
            async with f.get(1, path) as answer:
                assert answer.status == 404
            async with f.client.delete(f.instances[1].url + path) as answer:
                assert answer.status == 404


async def test_post_with_a_cursor_joins_elsewhere(redis: Redis) -> None:
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=30 pace=60]]")
        await eventually(lambda: f.seq(0, path) > 5)
        headers = {"Last-Event-ID": f"{path[-22:]}.4"}
        async with f.client.post(f.instances[1].chat, json=prompt("other"), headers=headers) as answer:
            text = await answer.text()
        assert numbers(text)[0] == 5
        assert reason(text) == "complete"
        assert f.generations == 1


async def test_stream_that_was_just_told_of_is_found_elsewhere(redis: Redis) -> None:
    """However slowly its log is shared."""
    async with fleet(redis.url, log_tick_s=0.3) as f:
        for _ in range(5):
            path = await f.ask(0, "[[tokens=1]]", shared=False)
            assert reason(await f.read(1, path)) == "complete"
            async with f.client.post(f.instances[0].chat, json=prompt("[[tokens=1]]")) as answer:
                assert reason(await f.read(1, answer.headers["Content-Location"])) == "complete"


@pytest.mark.timeout(1800 if SOAK else 120)
@pytest.mark.parametrize("delay_s", [0.0, 0.025, 0.05] if SOAK else [0.0, 0.025], ids=lambda s: f"{2000 * s:g} ms")
async def test_stream_is_known_everywhere_at_the_first_byte_of_its_answer(redis: Redis, delay_s: float) -> None:
    """Stopped, read, looked at and joined there, also where Redis is slow: each of its answers takes so long."""

    async def stopped(f: Fleet, path: str) -> int:
        async with f.client.delete(f.instances[1].url + path) as there:
            return there.status

    async def read(f: Fleet, path: str) -> int:
        async with f.get(1, path) as there:
            assert there.status != 200 or (await there.content.readuntil(b"\n\n")).startswith(b"retry:")
            return int(there.status)

    async def looked_at(f: Fleet, path: str) -> int:
        return await f.get_status(1, path)

    async def joined(f: Fleet, path: str) -> int:
        headers = {"Last-Event-ID": f"{path[-22:]}.0"}
        async with f.client.post(f.instances[1].chat, json=prompt("other"), headers=headers) as there:
            assert there.status != 200 or (await there.content.readuntil(b"\n\n")).startswith(b"retry:")
            return there.status

    async with slowed(redis, delay_s) as url, fleet(url, lease_s=2) as f:
        # So many that they meet each other's calls, and so few that four connections do for them.
        room = asyncio.Semaphore(16)

        async def ask(kind: Callable[[Fleet, str], Awaitable[int]], headers: dict[str, str]) -> None:
            async with (
                room,
                f.client.post(f.instances[0].chat, json=prompt("[[tokens=9000 pace=20]]"), headers=headers) as answer,
            ):
                path = answer.headers["Content-Location"]
                assert await answer.content.readexactly(1)
                said = await kind(f, path)
                assert said == (204 if kind is stopped else 200), (kind.__name__, said)
                if kind is not stopped:
                    async with f.client.delete(f.instances[0].url + path):
                        pass
                elif not headers:
                    assert reason("retry: 1\n" + (await answer.text()).partition("\n")[2]) == "stopped"

        kinds = (stopped, read, looked_at, joined)
        each = 500 if SOAK else 40 if not delay_s else 20
        async with asyncio.TaskGroup() as tasks:
            for kind in kinds * each:
                tasks.create_task(ask(kind, {}))
        # What a native EventSource does: it gets the URL by another request, and reads elsewhere.
        async with asyncio.TaskGroup() as tasks:
            for _ in range(each):
                tasks.create_task(ask(read, {"Prefer": "respond-async"}))
        await eventually(lambda: f.simulator.stats.active == 0)


@contextlib.asynccontextmanager
async def slowed(redis: Redis, delay_s: float) -> AsyncIterator[str]:
    """The URL by which each request and each answer takes `delay_s` longer."""
    switch = await Switch.open(redis.address, delay_s)
    try:
        yield f"redis://127.0.0.1:{switch.port}"
    finally:
        await switch.close()


async def test_unknown_ids_are_asked_for_together_and_then_404(redis: Redis) -> None:
    async with fleet(redis.url, count=1) as f:
        registry = f.instances[0].registry
        ids = [secrets.token_urlsafe(16) for _ in range(300)]
        client = redis.client()
        await client.config_resetstat()
        answers = await asyncio.gather(*map(registry.find, ids * 2), *map(registry.stop, ids), return_exceptions=True)
        assert {type(answer) for answer in answers} == {UnknownStreamError}
        said = await client.info("commandstats")
        # Of each of the two kinds one call in GATHER_S at the most, in which a hundred ids make one command.
        rounds = round((f.instances[0].settings.log_tick_s + PATIENCE_S) / GATHER_S) + 2
        commands = sum(said.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("exists", "hmget"))
        assert commands <= rounds * 2 * (3 + 1) < len(answers) / 5
        shared = registry._shared
        assert shared is not None
        assert not shared.following._opening
        assert not shared.following._finds._waiting


async def test_stream_that_was_here_is_asked_for_once(redis: Redis) -> None:
    """One that ended and was forgotten, and one that was only read here: nothing is about to come of either."""
    async with fleet(redis.url, retention_s=0.1, lease_s=1) as f:
        path = await f.ask(0, "[[tokens=3]]")
        await f.read(1, path)
        for instance in (0, 1):
            await eventually(lambda instance=instance: f.instances[instance].registry.get(path[-22:]) is None)  # type: ignore[misc]
        client = redis.client()
        for key in await stream_keys(client):
            await client.delete(key)
        for instance in (0, 1):
            await client.config_resetstat()
            assert await f.get_status(instance, path) == 404
            async with f.client.delete(f.instances[instance].url + path) as answer:
                assert answer.status == 404
            # The stream, and what says that Redis was not emptied.
            assert (await client.info("commandstats"))["cmdstat_exists"]["calls"] == 2 * 2


async def test_first_stream_waits_for_no_script_and_no_connection(redis: Redis) -> None:
    async with fleet(redis.url, count=1) as f:
        client = redis.client()
        assert all(await client.script_exists(*(hashlib.sha1(script.LUA.encode()).hexdigest() for script in SCRIPTS)))
        before = len(await client.client_list())
        await asyncio.gather(*(f.ask(0, "[[tokens=1]]", Idempotency_Key=f"{number}") for number in range(20)))
        assert len(await client.client_list()) <= before
        assert (await client.info("commandstats"))["cmdstat_script|load"]["calls"] == len(SCRIPTS)


async def test_new_streams_are_said_beside_appends(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told of one may ask for it at once, and an append may take long."""
    async with fleet(redis.url, count=1) as f:
        shared = f.instances[0].registry._shared
        assert shared is not None
        mirror = shared._mirror
        append = mirror._append_some
        new: list[RedisLog] = []

        async def appended(some: list[RedisLog]) -> int:
            if not new:
                new.append(mirror.log("A" * 22, shared._memory))
                await eventually(lambda: new[0].known)
            return await append(some)

        monkeypatch.setattr(mirror, "_append_some", appended)
        await f.ask(0, "[[tokens=3]]")
        await eventually(lambda: bool(new) and new[0].known and shared.behind == 0)


async def test_kept_streams_go_when_their_time_is_over(redis: Redis) -> None:
    async with fleet(redis.url, retention_s=0.5, lease_s=2) as f:
        path = await f.ask(0, "[[tokens=3]]", Idempotency_Key="k")
        await f.read(1, path)
        client = redis.client()
        # The claim is small, and goes by itself a little later: it holds no longer than its stream does.
        async with asyncio.timeout(60):
            while [key for key in await stream_keys(client) if b":key:" not in key]:
                await asyncio.sleep(0.05)
        await eventually(lambda: not f.followed(1) and f.instances[1].registry.replay_bytes == 0)
        await certain(f, 1)
        async with f.get(1, path) as answer:
            assert answer.status == 404
        assert await f.ask(1, "[[tokens=3]]", Idempotency_Key="k") != path
        for key in await client.keys():
            assert await client.pttl(key) > 0


async def test_many_streams_are_followed_by_few_connections(redis: Redis) -> None:
    async with fleet(redis.url) as f, contextlib.AsyncExitStack() as stack:
        paths = [await f.ask(0, "[[tokens=40 pace=20]]") for _ in range(100)]
        clients = [await stack.enter_async_context(await RawClient.connect(f.instances[1].address)) for _ in paths]
        for client, path in zip(clients, paths, strict=True):
            await client.get(path)
            await client.answered()  # more at once may have to come back: a slow answer counts as none
        await asyncio.gather(*(client.read_to_end(timeout_s=60) for client in clients))
        assert all(numbers_of(client) for client in clients)
        info = await redis.client().client_list()
        assert len(info) <= 2 * 5 + 1  # and the one that asks


def numbers_of(client: RawClient) -> bool:
    frames = client.written.frames
    return [frame.seq for frame in frames] == list(range(1, len(frames) + 1)) and frames[-1].event == "end"


# --- stop, leave and slow readers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["tokens=5000 pace=50", "tokens=5 thinking_s=60"], ids=["speaking", "silent"])
async def test_delete_elsewhere_stops_the_generation_within_a_second(redis: Redis, script: str) -> None:
    """The fastest of three counts: what else the machine does is not to be measured."""
    took: list[float] = []
    async with fleet(redis.url) as f:
        for _ in range(3):
            path = await f.ask(0, f"[[{script}]]")
            reader = asyncio.create_task(f.read(0, path))
            await eventually(lambda: f.instances[0].registry.readers == 1)
            begun = time.monotonic()
            async with f.client.delete(f.instances[1].url + path) as answer:
                assert answer.status == 204
            assert reason(await reader) == "stopped"
            took.append(time.monotonic() - begun)
            await eventually(lambda: f.simulator.stats.active == 0)
            async with f.client.delete(f.instances[1].url + path) as answer:
                assert answer.status == 204
    assert min(took) < 1.0, took


async def test_stream_is_abandoned_when_nobody_reads_it_anywhere(redis: Redis) -> None:
    async with fleet(redis.url, leave_s=0.5) as f:
        path = await f.ask(0, "[[tokens=5000 pace=50]]")
        async with f.get(0, path):
            pass
        async with f.get(1, path) as answer:
            await answer.content.readany()
            # Longer than leave time and lease: the reader elsewhere alone holds it.
            before = f.seq(0, path)
            await eventually(lambda: f.seq(0, path) > before + 150)
            assert (await f.state(0, path))["status"] == "streaming"
        # Kept for who comes back, then for its leave time.
        await eventually(lambda: f.instances[0].registry.active_streams == 0)
        assert (await f.state(0, path))["reason"] == "abandoned"


async def test_slow_reader_elsewhere_holds_the_upstream_back(redis: Redis) -> None:
    written = 0
    read = asyncio.Event()

    async def flood(request: Request, connection: Connection) -> None:
        nonlocal written
        # A small one, so that what is not read is soon felt.
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
        connection.send(head(), chunk(message_start()))
        await read.wait()
        event = chunk(delta("x" * 900))
        while written < 2_000_000 and not connection.lost.is_set():
            connection.send(event)
            await connection.drain()
            written += len(event)
        connection.send(chunk(MESSAGE_STOP), LAST_CHUNK)

    async with raw_upstream(flood) as llm, fleet(redis.url, upstream=llm.url, stall_s=60) as f:
        path = await f.ask(0, "hello")
        async with await RawClient.connect(f.instances[1].address, receive_buffer_bytes=4096) as slow:
            await slow.get(path)
            await slow.answered()
            await eventually(lambda: f.instances[0].registry._table.running[path[-22:]].readers == 1)
            read.set()
            stood = 0
            while stood < 5 or not written:  # until it has not moved for half a second
                before = written
                await asyncio.sleep(0.1)
                stood = stood + 1 if written == before else 0
            assert 0 < written < 1_000_000
            slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # it is slow no more
            await slow.read_to_end(timeout_s=60)
            assert written >= 2_000_000
            assert numbers_of(slow)


# --- Idempotency-Key ----------------------------------------------------------------------------------------------


async def test_key_starts_one_generation_on_all_instances(engine: Redis) -> None:
    async with fleet(engine.url, count=3) as f:
        headers = {"Idempotency-Key": "the-same", "Prefer": "respond-async"}

        async def ask(number: int, text: str = "[[tokens=20]]") -> tuple[int, str]:
            async with f.client.post(f.instances[number % 3].chat, json=prompt(text), headers=headers) as answer:
                return answer.status, answer.headers.get("Location", "")

        answers = set(await asyncio.gather(*(ask(number) for number in range(30))))
        assert len(answers) == 1
        ((status, path),) = answers
        assert status == 202
        assert f.generations == 1
        assert reason(await f.read(2, path)) == "complete"
        assert {(await ask(number, "other"))[0] for number in range(3)} == {422}
        assert f.generations == 1


async def test_key_of_a_refused_request_is_free_on_all_instances(redis: Redis) -> None:
    async with fleet(redis.url) as f:
        for instance in (0, 1, 0):
            headers = {"Idempotency-Key": "refused"}
            chat = f.instances[instance].chat
            async with f.client.post(chat, json=prompt("[[status=400]]"), headers=headers) as answer:
                assert answer.status == 400
            client = redis.client()
            async with asyncio.timeout(60):
                while await stream_keys(client):
                    await asyncio.sleep(0.01)
        assert f.generations == 3


async def test_key_of_a_request_that_is_refused_while_another_joins_it_goes_to_that(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who asks a question is told that there is no such stream."""
    async with fleet(redis.url) as f:
        registry = f.instances[1].registry
        find, client = registry.find, redis.client()

        async def find_late(stream_id: str) -> Stream:
            async with asyncio.timeout(9):
                while await stream_keys(client):
                    await asyncio.sleep(0.01)
            return await find(stream_id)

        monkeypatch.setattr(registry, "find", find_late)
        headers = {"Idempotency-Key": "k"}
        question = prompt("[[first_s=0.5 status=400]]")

        async def ask(instance: int) -> int:
            async with f.client.post(f.instances[instance].chat, json=question, headers=headers) as answer:
                return answer.status

        first = asyncio.create_task(ask(0))
        await eventually(lambda: f.instances[0].registry.active_streams == 1)
        assert await ask(1) == await first == 400
        assert [instance.registry.generations for instance in f.instances] == [1, 1]


async def test_key_whose_client_left_before_its_answer_is_free(redis: Redis) -> None:
    async with fleet(redis.url) as f:
        redis.pause()
        async with await RawClient.connect(f.instances[0].address) as client:
            body = json.dumps(prompt("hello")).encode()
            await client.send(
                b"POST /api/chat HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nIdempotency-Key: k\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            await eventually(lambda: len(f.instances[0].registry._claiming) == 1)
        await eventually(lambda: not f.instances[0].registry._claiming)
        redis.resume()
        client_ = redis.client()
        async with asyncio.timeout(60):
            while await stream_keys(client_):
                await asyncio.sleep(0.01)
        assert f.generations == 0


# --- deploys ------------------------------------------------------------------------------------------------------


async def test_drain_moves_readers_and_goes_on_generating_for_them(redis: Redis) -> None:
    async with fleet(redis.url, drain_s=600, reconnect_spread_s=1) as f:
        path = await f.ask(0, "[[tokens=150 pace=50]]", Aisse_On_Leave="cancel")
        async with await RawClient.connect(f.instances[0].address) as moved:
            await moved.get(path)
            await moved.answered()
            await eventually(lambda: f.seq(0, path) > 10)
            begun = time.monotonic()
            drain = asyncio.create_task(f.instances[0].drain.run())
            await moved.read_to_end()
            assert time.monotonic() - begun >= 1.0
            assert moved.broken
            assert not moved.body.ended
            (told,) = moved.written.controls
            assert told.data["resume"] is True
            frames = moved.written.frames
        rest = await f.read(1, path, frames[-1].seq)
        assert reason(rest) == "complete"
        assert [frame.seq for frame in frames] + numbers(rest) == list(range(1, numbers(rest)[-1] + 1))
        await asyncio.wait_for(drain, 60)  # with its last stream, and not with its deadline
        assert f.generations == 1


async def test_readers_moved_by_an_instance_that_only_follows_have_their_time(redis: Redis) -> None:
    """Their stream would end with the last of them, under `cancel`, before they are where they were sent."""
    async with fleet(redis.url, drain_s=60, count=3) as f:
        path = await f.ask(0, "[[tokens=5000 pace=50]]", Aisse_On_Leave="cancel")
        stream = f.instances[0].registry.get(path[-22:])
        assert stream is not None
        async with await RawClient.connect(f.instances[1].address) as moved:
            await moved.get(path)
            await moved.answered()
            await eventually(lambda: stream.readers == 1)
            assert stream.leave.moved_until == 0
            await f.instances[1].drain.run()
            await moved.read_to_end()
        await eventually(lambda: stream.readers == 0)
        assert stream.reason is None
        assert (stream.leave.ends_at or 0) > asyncio.get_running_loop().time() + 5
        async with f.get(2, path, moved.written.frames[-1].seq) as back:
            assert back.status == 200
            await back.content.readuntil(b"\n\n")


async def test_late_joiner_leaves_those_their_time_that_were_moved(redis: Redis) -> None:
    async with fleet(redis.url, drain_s=60) as f:
        path = await f.ask(0, "[[tokens=5000 pace=50]]", Aisse_On_Leave="cancel")
        stream = f.instances[0].registry.get(path[-22:])
        assert stream is not None
        async with await RawClient.connect(f.instances[0].address) as moved:
            await moved.get(path)
            await moved.answered()
            drain = asyncio.create_task(f.instances[0].drain.run())
            try:
                await moved.read_to_end()
                until = stream.leave.ends_at
                assert until is not None
                headers = {"Last-Event-ID": f"{path[-22:]}.1"}
                async with f.client.post(f.instances[0].chat, json=prompt("hello"), headers=headers) as late:
                    assert late.status == 200
                    assert stream.leave.unread_since is None
                await eventually(lambda: stream.leave.unread_since is not None)
                assert max(stream.leave.ends_at or 0, 0) >= until
                assert stream.reason is None
            finally:
                drain.cancel()
                await asyncio.gather(drain, return_exceptions=True)
                await f.instances[0].registry.close()


async def test_stream_that_outlasts_the_drain_ends_as_shutdown_elsewhere(redis: Redis) -> None:
    async with fleet(redis.url, drain_s=1.5) as f:
        path = await f.ask(0, "[[tokens=5000 pace=50]]")
        reader = asyncio.create_task(f.read(1, path))
        await eventually(lambda: f.seq(1, path) > 5)
        await f.instances[0].drain.run()
        assert reason(await reader) == "shutdown"


async def test_reader_that_comes_while_draining_is_sent_elsewhere(redis: Redis) -> None:
    async with fleet(redis.url, drain_s=600) as f:
        path = await f.ask(0, "[[tokens=100 pace=50]]")
        drain = asyncio.create_task(f.instances[0].drain.run())
        await eventually(lambda: f.instances[0].registry.draining)
        async with await RawClient.connect(f.instances[0].address) as client:
            await client.get(path)
            await client.answered()
            await client.read_to_end()
            assert client.broken
            (told,) = client.written.controls
            assert told.data["resume"] is True
        assert reason(await f.read(1, path)) == "complete"
        await drain


# --- trouble ------------------------------------------------------------------------------------------------------


async def degraded(f: Fleet, instance: int, why: str) -> None:
    async with asyncio.timeout(60):
        while not any(why in reason for reason in (await f.health(instance)).get("reasons", [])):
            await asyncio.sleep(0.02)


async def healthy(f: Fleet, instance: int) -> None:
    async with asyncio.timeout(60):
        while (await f.health(instance))["status"] != "healthy":
            await asyncio.sleep(0.02)


async def both_whole(f: Fleet, path: str, *readers: asyncio.Task[str]) -> None:
    """Each got each event once, and they got the same."""
    texts = [await reader for reader in readers]
    for text in texts:
        assert reason(text) == "complete"
        assert numbers(text) == list(range(1, len(numbers(text)) + 1))
    late = await f.read(1, path)
    assert {frames(text) for text in texts} == {frames(late)}


def frames(text: str) -> str:
    """Without heartbeats and opening."""
    return "".join(f"{frame}\n" for frame in parse(text.encode()).frames)


async def test_redis_that_is_emptied_gets_everything_again(engine: Redis) -> None:
    async with fleet(engine.url) as f:
        path = await f.ask(0, "[[tokens=160 pace=40]]")
        here, there = (asyncio.create_task(f.read(instance, path)) for instance in (0, 1))
        client = engine.client()
        for _ in range(3):
            seen = f.seq(1, path)
            # A machine that is too busy for all three has had fewer of them.
            await eventually(lambda seen=seen: f.seq(1, path) > seen + 10 or here.done())  # type: ignore[misc]
            await client.flushall()
        await both_whole(f, path, here, there)


async def test_redis_that_is_restarted_empty_gets_everything_again(engine: Redis) -> None:
    async with fleet(engine.url) as f:
        path = await f.ask(0, "[[tokens=150 pace=40]]")
        here, there = (asyncio.create_task(f.read(instance, path)) for instance in (0, 1))
        await eventually(lambda: f.seq(1, path) > 10)
        await engine.stop()
        for instance in (0, 1):
            await degraded(f, instance, "does not answer")
        # Here it goes on; nobody else can tell, and is not told that there is nothing.
        before = f.seq(0, path)
        await eventually(lambda: f.seq(0, path) > before + 10)
        async with f.client.get(f.instances[1].url + "/api/chat/" + "A" * 22, headers=STATE) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        async with f.get(1, "/api/chat/" + "A" * 22) as answer:
            assert answer.status == 200
            assert b"event: reconnect" in await answer.content.readuntil(b"\n\n")
        headers = {"Idempotency-Key": "k"}
        async with f.client.post(f.instances[1].chat, json=prompt("x"), headers=headers) as answer:
            assert answer.status == 503
        async with f.client.post(f.instances[1].chat, json=prompt("[[tokens=3]]")) as answer:
            assert reason(await answer.text()) == "complete"
        await engine.start()
        for instance in (0, 1):
            await healthy(f, instance)
        await both_whole(f, path, here, there)


async def test_redis_that_stands_still_past_the_lease_loses_no_stream(engine: Redis) -> None:
    """Nobody takes for dead who could not say that it is alive."""
    lease_s = 3.0
    async with fleet(engine.url, lease_s=lease_s) as f:
        path = await f.ask(0, "[[tokens=300 pace=40]]")
        here, there = (asyncio.create_task(f.read(instance, path)) for instance in (0, 1))
        await eventually(lambda: f.seq(1, path) > 10)
        engine.pause()
        paused = time.monotonic()
        await degraded(f, 0, "does not answer")
        await degraded(f, 1, "does not answer")
        assert (await f.health(0))["status"] == "degraded"
        await asyncio.sleep(paused + lease_s * 1.2 - time.monotonic())
        engine.resume()
        await healthy(f, 0)
        await both_whole(f, path, here, there)


async def test_redis_that_is_full_costs_readers_here_nothing_and_gets_the_rest_later(engine: Redis) -> None:
    lease_s = 2.0
    async with fleet(engine.url, lease_s=lease_s) as f:
        path = await f.ask(0, "[[tokens=200 pace=40]]")
        readers = [asyncio.create_task(f.read(instance, path)) for instance in (0, 1)]
        await eventually(lambda: f.seq(1, path) > 10)
        client = engine.client()
        await client.config_set("maxmemory", 1)
        await degraded(f, 0, "full (maxmemory)")
        before = f.seq(0, path)
        # Longer than a lease lasts, which goes on being kept.
        await asyncio.sleep(lease_s * 1.2)
        await eventually(lambda: f.seq(0, path) > before + 40)
        assert f.seq(1, path) < before + 20
        await client.config_set("maxmemory", 0)
        await healthy(f, 0)
        await both_whole(f, path, *readers)


async def test_failover_to_a_replica_loses_nothing(redis: Redis) -> None:
    """The one address leads to another server, which lacks the last appends."""
    async with redis_server(redis.binary) as replica:
        await replica.client().replicaof("127.0.0.1", str(redis.port))
        switch = await Switch.open(redis.address)
        async with fleet(f"redis://127.0.0.1:{switch.port}") as f:
            path = await f.ask(0, "[[tokens=200 pace=40]]")
            here, there = (asyncio.create_task(f.read(instance, path)) for instance in (0, 1))
            await eventually(lambda: f.seq(1, path) > 10)
            replica.pause()  # it falls behind
            before = f.seq(1, path)
            await eventually(lambda: f.seq(1, path) > before + 10)
            await redis.stop()
            replica.resume()
            await replica.client().replicaof("NO", "ONE")
            switch.to = replica.address
            await both_whole(f, path, here, there)
        await switch.close()


async def test_redis_that_only_reads_is_named_and_left_for_what_takes_its_address(redis: Redis) -> None:
    async with redis_server(redis.binary) as other:
        switch = await Switch.open(redis.address)
        async with fleet(f"redis://127.0.0.1:{switch.port}") as f:
            path = await f.ask(0, "[[tokens=200 pace=40]]")
            here, there = (asyncio.create_task(f.read(instance, path)) for instance in (0, 1))
            await eventually(lambda: f.seq(1, path) > 10)
            await redis.client().replicaof("127.0.0.1", str(other.port))
            await degraded(f, 0, "read-only")
            switch.to = other.address
            await both_whole(f, path, here, there)
        await switch.close()


class Switch:
    """An address that leads to a server, and later to another. Connections stay where they are.

    Whatever goes through is `delay_s` later at the other side, in both directions.
    """

    def __init__(self, to: tuple[str, int], delay_s: float = 0.0) -> None:
        self.to = to
        self._delay_s = delay_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @classmethod
    async def open(cls, to: tuple[str, int], delay_s: float = 0.0) -> Switch:
        switch = cls(to, delay_s)
        switch._server = await asyncio.start_server(switch._serve, "127.0.0.1", 0)
        return switch

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection(*self.to)
        except OSError:
            writer.transport.abort()
            return
        both = [
            asyncio.create_task(pump(reader, other_writer, self._delay_s)),
            asyncio.create_task(pump(other_reader, writer, self._delay_s)),
        ]
        self._tasks.update(both)
        await asyncio.gather(*both, return_exceptions=True)

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        try:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(deliver())
        data = b"-"
        while data:
            try:
                data = await reader.read(1 << 16)
            except OSError:
                data = b""
            under_way.put_nowait((loop.time() + delay_s, data))


async def test_start_without_redis_is_said_and_made_up_for(redis: Redis, capsys: pytest.CaptureFixture[str]) -> None:
    await redis.stop()
    async with fleet(redis.url) as f:
        assert "shared log is not there yet" in capsys.readouterr().out
        await degraded(f, 0, "does not answer")
        path = await f.ask(0, "[[tokens=100 pace=40]]", shared=False)
        here = asyncio.create_task(f.read(0, path))
        await redis.start()
        await healthy(f, 0)
        await healthy(f, 1)
        await both_whole(f, path, here, asyncio.create_task(f.read(1, path)))


async def test_streams_that_were_read_elsewhere_are_forgotten_where_they_were_generated(redis: Redis) -> None:
    async with fleet(redis.url, retention_s=0.5) as f:
        for _ in range(5):
            path = await f.ask(0, "[[tokens=5000 pace=30]]")
            reader = asyncio.create_task(f.read(1, path))
            await eventually(lambda: bool(f.instances[0].registry._shared.elsewhere._readers))  # type: ignore[union-attr]
            await f.instances[0].registry.stop(path[-22:])
            await reader
        await eventually(lambda: f.instances[0].registry.replay_bytes == 0)


async def test_trouble_is_over_when_redis_is_back_also_where_nothing_is_left_to_do(redis: Redis) -> None:
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=60 pace=40]]")
        async with f.get(1, path) as answer:
            await answer.content.readany()
            await redis.stop()
            await degraded(f, 0, "does not answer")
            await degraded(f, 1, "does not answer")
        await f.read(0, path)
        await redis.start()
        await healthy(f, 0)
        await healthy(f, 1)
        await f.ask(1, "[[tokens=1]]", Idempotency_Key="k")


async def test_claim_without_an_answer_takes_no_key_from_a_stream_that_has_it(redis: Redis) -> None:
    """Whichever Redis gets to first, the late claim or its withdrawal."""
    async with fleet(redis.url, lease_s=6) as f:
        path = await f.ask(0, "[[tokens=600 pace=30]]", Idempotency_Key="held", Aisse_On_Leave="60")
        redis.pause()
        for key in ("held", "free"):
            headers = {"Idempotency-Key": key}
            async with f.client.post(f.instances[1].chat, json=prompt("[[tokens=600 pace=30]]"), headers=headers) as no:
                assert no.status == 503
        redis.resume()
        await healthy(f, 1)
        assert await f.ask(1, "[[tokens=600 pace=30]]", Idempotency_Key="held") == path
        assert f.generations == 1
        # Nobody is led to a stream that never began.
        free = await f.ask(1, "[[tokens=3]]", Idempotency_Key="free")
        assert reason(await f.read(0, free)) == "complete"


async def test_keys_survive_an_emptied_redis_for_as_long_as_their_streams_run(redis: Redis) -> None:
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=600 pace=30]]", Idempotency_Key="k", Aisse_On_Leave="60")
        await redis.client().flushall()
        async with asyncio.timeout(60):
            while (await f.get_status(1, path)) == 503:
                await asyncio.sleep(0.05)
        assert await f.ask(1, "[[tokens=600 pace=30]]", Idempotency_Key="k") == path
        assert f.generations == 1


async def test_silent_stream_is_not_taken_for_unknown_after_redis_was_emptied(redis: Redis) -> None:
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=5 thinking_s=20]]", Aisse_On_Leave="60")
        # Each has noted that it knows this Redis.
        await eventually(lambda: all(i.registry._shared._catalogue._marked for i in f.instances))  # type: ignore[union-attr]
        await redis.client().flushall()
        statuses = {await f.get_status(1, path) for _ in range(20)}
        assert statuses <= {200, 503}
        await eventually(lambda: path[-22:] in f.followed(1))


async def test_reader_elsewhere_holds_its_stream_also_where_redis_was_emptied(redis: Redis) -> None:
    """The set of readers went with everything else; with no leave time a moment without one would end the stream."""
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=5000 pace=40]]", Aisse_On_Leave="cancel")
        reader = asyncio.create_task(f.read(1, path))
        await eventually(lambda: bool(f.instances[0].registry._shared.elsewhere._readers))  # type: ignore[union-attr]
        for _ in range(4):
            seen = f.seq(1, path)
            await redis.client().flushall()
            await eventually(lambda seen=seen: f.seq(1, path) > seen + 20)  # type: ignore[misc]
        async with f.client.delete(f.instances[0].url + path) as answer:
            assert answer.status == 204
        assert reason(await reader) == "stopped"


async def test_stream_whose_keys_were_half_deleted_holds_up_no_other(redis: Redis) -> None:
    go_on = asyncio.Event()

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(message_start()), *(chunk(delta(str(number))) for number in range(20)))
        await go_on.wait()
        for number in range(40):
            connection.send(chunk(delta(str(number))))
            await asyncio.sleep(0.02)
        connection.send(chunk(MESSAGE_STOP), LAST_CHUNK)

    async with raw_upstream(answer) as llm, fleet(redis.url, upstream=llm.url) as f:
        paths = [await f.ask(0, "hello") for _ in range(3)]
        readers = [asyncio.create_task(f.read(1, path)) for path in paths]
        # What is deleted before it was read elsewhere would be missing there.
        await eventually(lambda: all(f.seq(1, path) == 21 for path in paths))
        client = redis.client()
        for path, suffix in zip(paths, (":state", "", ":readers"), strict=True):
            await client.delete(f"aisse:{{{path[-22]}}}:{path[-22:]}{suffix}")
        go_on.set()
        for reader in readers:
            text = await reader
            assert reason(text) == "complete"
            assert numbers(text) == list(range(1, len(numbers(text)) + 1))


async def test_connection_that_was_replaced_costs_nobody_a_wait(redis: Redis) -> None:
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=200 pace=40]]")
        first = asyncio.create_task(f.read(1, path))
        await eventually(lambda: f.seq(1, path) > 5)
        client = redis.client()
        for each in await client.client_list():
            if each["cmd"] == "xread":
                await client.client_kill_filter(_id=each["id"])
        await healthy(f, 1)
        second = await f.ask(0, "[[tokens=3]]")
        assert reason(await f.read(1, second)) == "complete"
        await both_whole(f, path, first)


async def test_instance_closes_also_where_a_cancellation_is_swallowed(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As redis-py does at times: a loop without end would go on, and whoever closes wait for ever."""

    async def swallow(*_: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)

    async with asyncio.timeout(60):
        async with fleet(redis.url, count=1) as f:
            shared = f.instances[0].registry._shared
            assert shared is not None
            monkeypatch.setattr(shared._tailer._attendance, "attend", swallow)
            monkeypatch.setattr(shared._mirror._leases, "_renew", swallow)
            await f.ask(0, "[[tokens=500 pace=50]]")
            await asyncio.sleep(0.5)


# --- where rooms meet ---------------------------------------------------------------------------------------------


def refusing(refuse: asyncio.Event) -> Callable[[Request, Connection], Awaitable[None]]:
    """An upstream that refuses its first request, once it is told to, and answers every other."""
    requests = itertools.count()

    async def answer(_request: Request, connection: Connection) -> None:
        if next(requests):
            connection.send(head(), chunk(message_start() + delta("well") + MESSAGE_STOP), LAST_CHUNK)
        else:
            await refuse.wait()
            connection.send(head("429 Too Many Requests", "application/json", framing="2"), b"{}")

    return answer


async def post(f: Fleet, instance: int, key: str) -> tuple[int, str]:
    headers = {"Idempotency-Key": key}
    async with f.client.post(f.instances[instance].chat, json=prompt("hello"), headers=headers) as answer:
        return answer.status, await answer.text()


def shared_of(f: Fleet, instance: int) -> Shared:
    shared = f.instances[instance].registry._shared
    assert shared is not None
    return shared


def instead(
    monkeypatch: pytest.MonkeyPatch,
    shared: Shared,
    kind: type[scripts.Script[Any]],
    work: Callable[[Run], Awaitable[Any]],
) -> None:
    """Has `work` done where a script of this kind would be run, which it may do itself."""
    run = shared._client.run

    async def some(script: scripts.Script[Any]) -> Any:
        return await (work(lambda: run(script)) if isinstance(script, kind) else run(script))

    monkeypatch.setattr(shared._client, "run", some)


@pytest.mark.parametrize("again", [False, True], ids=["the first", "after it was emptied"])
async def test_key_of_a_refused_request_stays_free_where_word_of_its_stream_comes_late(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, *, again: bool
) -> None:
    """What tells Redis of a stream, and what has it forgotten, go by different connections."""
    refuse, under_way, withdrawn, came = (asyncio.Event() for _ in range(4))
    async with raw_upstream(refusing(refuse)) as llm, fleet(redis.url, upstream=llm.url, count=1) as f:
        shared, client = shared_of(f, 0), redis.client()

        async def create_late(create: Run) -> Any:
            under_way.set()
            await withdrawn.wait()
            said = await create()
            came.set()
            return said

        async def withdraw_first(withdraw: Run) -> None:
            await withdraw()
            withdrawn.set()

        instead(monkeypatch, shared, Withdraw, withdraw_first)
        if not again:
            instead(monkeypatch, shared, Create, create_late)
        first = asyncio.create_task(post(f, 0, "k"))
        if again:
            await eventually(lambda: [log.known for log in shared._mirror._logs.values()] == [True])
            instead(monkeypatch, shared, Create, create_late)
            await client.flushall()
        await under_way.wait()
        refuse.set()
        assert (await first)[0] == 429
        await came.wait()
        assert not await stream_keys(client)
        status, text = await post(f, 0, "k")
        assert (status, reason(text)) == (200, "complete")


async def test_request_with_a_key_that_is_about_to_be_free_waits_for_that(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse, asked = asyncio.Event(), asyncio.Event()
    refuse.set()
    async with raw_upstream(refusing(refuse)) as llm, fleet(redis.url, upstream=llm.url, count=1) as f:
        registry, client = f.instances[0].registry, redis.client()
        create_once = registry.create_once

        async def withdraw_late(withdraw: Run) -> None:
            await asked.wait()
            for _ in range(20):
                await client.ping()  # longer than a claim takes that waits for nothing
            await withdraw()

        async def create(*arguments: Any) -> Stream:
            asked.set()
            return await create_once(*arguments)

        instead(monkeypatch, shared_of(f, 0), Withdraw, withdraw_late)
        assert (await post(f, 0, "k"))[0] == 429
        monkeypatch.setattr(registry, "create_once", create)
        async with asyncio.timeout(9):
            status, text = await post(f, 0, "k")
        assert (status, reason(text)) == (200, "complete")
        assert f.generations == 2


async def test_reader_elsewhere_of_a_stream_that_is_withdrawn_is_told_at_once(redis: Redis) -> None:
    """And not after a lease, as where Redis was emptied."""
    refuse = asyncio.Event()
    async with raw_upstream(refusing(refuse)) as llm, fleet(redis.url, upstream=llm.url, lease_s=60) as f:
        first = asyncio.create_task(post(f, 0, "k"))
        await eventually(lambda: f.instances[0].registry.active_streams == 1)
        second = asyncio.create_task(post(f, 1, "k"))
        await eventually(lambda: f.instances[1].registry.readers == 1)
        refuse.set()
        assert (await first)[0] == 429
        async with asyncio.timeout(9):
            text = (await second)[1]
            assert reason(text) == "error"
            assert "rate_limit_error" in text
            assert await f.read(1, f"/api/chat/{text[text.index('id: ') + 4 :][:22]}") == text
        assert reason((await post(f, 1, "k"))[1]) == "complete"
        assert f.generations == 2


async def test_key_whose_request_a_shutdown_refuses_is_free_on_other_instances(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "_SHARED_S", 9.0)
    async with raw_upstream(refusing(asyncio.Event())) as llm, fleet(redis.url, upstream=llm.url) as f:
        shared, client = shared_of(f, 0), redis.client()
        mirror, close = shared._mirror, shared.close
        left: list[list[bytes]] = []

        async def withdraw_late(withdraw: Run) -> None:
            for _ in range(100):
                await client.ping()
            await withdraw()

        async def close_with_nothing_left() -> None:
            left.append(await stream_keys(client))
            await close()

        instead(monkeypatch, shared, Withdraw, withdraw_late)
        monkeypatch.setattr(shared, "close", close_with_nothing_left)
        first = asyncio.create_task(post(f, 0, "k"))
        await eventually(lambda: [log.known for log in mirror._logs.values()] == [True] and len(llm.requests) == 1)
        await f.instances[0].registry.close()
        assert (await first)[0] == 503
        assert left == [[]]
        assert reason((await post(f, 1, "k"))[1]) == "complete"


async def test_key_whose_client_leaves_goes_to_the_request_that_waits_for_it(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed, asked, go = (asyncio.Event() for _ in range(3))
    async with fleet(redis.url, count=1) as f:
        shared, registry = shared_of(f, 0), f.instances[0].registry
        create_once = registry.create_once

        async def claim_late(claim: Run) -> Any:
            said = await claim()
            if not claimed.is_set():
                claimed.set()
                await go.wait()
            return said

        async def create(*arguments: Any) -> Stream:
            asked.set()
            return await create_once(*arguments)

        instead(monkeypatch, shared, Claim, claim_late)
        first = asyncio.create_task(post(f, 0, "k"))
        await claimed.wait()
        monkeypatch.setattr(registry, "create_once", create)
        second = asyncio.create_task(post(f, 0, "k"))
        await asked.wait()
        first.cancel()
        await eventually(lambda: bool(shared.claims._withdrawing))
        go.set()
        status, text = await second
        assert (status, reason(text)) == (200, "complete")
        assert f.generations == 1
        assert not registry._claiming


async def test_keys_wait_for_no_other_key(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet(redis.url, count=1) as f:
        shared, together = shared_of(f, 0), asyncio.Barrier(20)
        claim = shared._mirror.claim

        async def claim_together(*arguments: str) -> tuple[str, str]:
            await together.wait()
            return await claim(*arguments)

        monkeypatch.setattr(shared._mirror, "claim", claim_together)
        async with asyncio.timeout(9):
            answers = await asyncio.gather(*(post(f, 0, f"{number}") for number in range(20)))
        assert {(status, reason(text)) for status, text in answers} == {(200, "complete")}
        assert not f.instances[0].registry._claiming


async def test_key_that_is_known_here_waits_for_nothing(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet(redis.url, count=1) as f:
        path = await f.ask(0, "[[tokens=3]]", Idempotency_Key="known")
        waiting = asyncio.Event()

        async def never(*_: str) -> tuple[str, str]:
            waiting.set()
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(shared_of(f, 0)._mirror, "claim", never)
        other = asyncio.create_task(post(f, 0, "other"))
        await waiting.wait()
        async with asyncio.timeout(9):
            assert await f.ask(0, "[[tokens=3]]", Idempotency_Key="known") == path
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)


async def test_slow_reader_elsewhere_that_leaves_still_holds_the_upstream_back(redis: Redis) -> None:
    read = asyncio.Event()

    async def flood(_request: Request, connection: Connection) -> None:
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
        connection.send(head(), chunk(message_start()))
        await read.wait()
        while not connection.lost.is_set():
            connection.send(chunk(delta("x" * 900)))
            await connection.drain()

    async with raw_upstream(flood) as llm, fleet(redis.url, upstream=llm.url, stall_s=60, leave_s=60) as f:
        path = await f.ask(0, "hello", Aisse_On_Leave="60")
        stream = f.instances[0].registry._table.running[path[-22:]]
        async with await RawClient.connect(f.instances[1].address, receive_buffer_bytes=4096) as slow:
            await slow.get(path)
            await slow.answered()
            await eventually(lambda: stream.readers == 1)
            read.set()
            stood = 0.0
            while stood < 0.5:  # until it has not moved for so long
                before = stream.log.tail
                await asyncio.sleep(0.1)
                stood = stood + 0.1 if stream.log.tail == before and stream.holds_back else 0.0
        await eventually(lambda: stream.readers == 0)
        assert stream.holds_back
        waiter = stream._gate._waiter
        assert waiter is not None
        assert not waiter.done()


async def test_reader_elsewhere_that_stalls_and_leaves_early_holds_the_upstream_back_too(redis: Redis) -> None:
    """Before it did so while it was there."""
    said = asyncio.Event()
    left = asyncio.Event()

    async def flood(_request: Request, connection: Connection) -> None:
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
        connection.send(head(), chunk(message_start()))
        await said.wait()
        for _ in range(20):
            connection.send(chunk(delta("x" * 9000)))
        await left.wait()
        while not connection.lost.is_set():
            connection.send(chunk(delta("x" * 9000)))
            await connection.drain()

    options: dict[str, Any] = {"stall_s": 60, "read_ahead_bytes": "1MiB", "write_buffer_bytes": 4096}
    async with raw_upstream(flood) as llm, fleet(redis.url, upstream=llm.url, **options) as f:
        path = await f.ask(0, "hello", Aisse_On_Leave="60")
        stream = f.instances[0].registry._table.running[path[-22:]]
        async with await RawClient.connect(f.instances[1].address, receive_buffer_bytes=4096) as slow:
            await slow.get(path)
            await slow.answered()
            await eventually(lambda: stream.readers == 1)
            said.set()
            await eventually(lambda: f.seq(1, path) == 21)
            assert not stream.holds_back
        await eventually(lambda: stream.readers == 0)
        left.set()
        await eventually(lambda: stream.holds_back)
        assert stream.log.tail < 2 << 20


async def test_reader_elsewhere_that_leaves_has_read_what_it_got(redis: Redis) -> None:
    """Also what it got since it was last told of: who has taken everything was no brake."""
    read = asyncio.Event()

    async def answer(_request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(message_start()))
        await read.wait()
        connection.send(chunk(delta("x" * 900)))
        await connection.lost.wait()

    async with raw_upstream(answer) as llm, fleet(redis.url, upstream=llm.url, lease_s=6) as f:
        path = await f.ask(0, "hello", Aisse_On_Leave="60")
        stream = f.instances[0].registry._table.running[path[-22:]]
        async with f.get(1, path) as reader:
            await eventually(lambda: stream.readers == 1)
            read.set()
            await reader.content.readuntil(b".2\n\n")
        await eventually(lambda: stream.readers == 0)
        assert stream.furthest == stream.log.tail
        assert not stream.last_reader_stalled


async def test_full_memory_turns_away_nobody_who_reads_what_is_here(redis: Redis) -> None:
    async with (
        fleet(redis.url) as f,
        serving(f.simulator.url, log=redis.url, lease_s=LEASE_S, replay_bytes="64KiB") as small,
    ):
        f.instances[1] = small
        path, other = [await f.ask(0, "[[tokens=9000 pace=300 token_bytes=200]]") for _ in range(2)]
        async with f.get(1, path) as reader:
            async for _ in reader.content.iter_any():
                if small.registry.replay_bytes > 64 << 10:
                    break
            assert (await f.state(1, path))["status"] == "streaming"
            assert await f.get_status(1, other) == 503
        async with f.get(1, path, 100) as back:
            assert b".101\n\n" in await back.content.readuntil(b".101\n\n")


async def test_stream_that_has_come_and_was_forgotten_before_its_reader_came_is_brought_again(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever else got the turn between the two may have needed its room."""
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=3]]")
        whole = await f.read(0, path)
        await shared_by(f, 0)
        shared, registry = shared_of(f, 1), f.instances[1].registry
        opened = shared.following._opened
        forgotten: list[Stream] = []

        def forget(stream_id: str, task: Any) -> None:
            opened(stream_id, task)
            if not forgotten:
                forgotten.append(registry._table.kept[stream_id])
                registry._table.forget(registry._table.kept[stream_id])

        monkeypatch.setattr(shared.following, "_opened", forget)
        assert frames(await f.read(1, path)) == frames(whole)
        assert forgotten


async def test_stream_that_ended_while_nothing_came_leaves_no_trouble(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one that was followed: what is asked of Redis next names none."""
    async with fleet(redis.url) as f:
        path = await f.ask(0, "[[tokens=5000 pace=50]]")
        reader = asyncio.create_task(f.read(1, path))
        await eventually(lambda: f.seq(1, path) > 5)
        tailer = shared_of(f, 1)._tailer
        xread, down = tailer._blocking.xread, True
        asked: list[Any] = []

        async def xread_once_up(streams: Any, **options: Any) -> Any:
            if down:
                raise ConnectionError
            asked.append(dict(streams))
            return await xread(streams, **options)

        monkeypatch.setattr(tailer._blocking, "xread", xread_once_up)
        await eventually(lambda: shared_of(f, 1).trouble is not None)
        async with f.client.delete(f.instances[0].url + path):
            pass
        await shared_by(f, 0)
        down = False
        assert reason(await reader) == "stopped"
        await eventually(lambda: shared_of(f, 1).trouble is None)
        assert asked
        assert all(asked)


async def test_trouble_of_an_instance_that_has_nothing_to_do_is_logged_once_and_its_end_once(redis: Redis) -> None:
    async with fleet(redis.url, count=1) as f:
        with capture_logs() as logs:
            await redis.stop()
            await degraded(f, 0, "does not answer")
            await redis.start()
            await healthy(f, 0)
        said = [line["event"] for line in logs if "shared log" in line["event"]]
        assert said == ["shared log in trouble", "shared log is back"]


async def test_drain_with_nobody_to_wait_for_does_not_wait_for_a_redis_that_is_gone(redis: Redis) -> None:
    async with fleet(redis.url, count=1, drain_s=60) as f:
        await redis.stop()
        async with f.client.post(f.instances[0].chat, json=prompt("[[tokens=3]]")) as answer:
            assert reason(await answer.text()) == "complete"
        await degraded(f, 0, "does not answer")
        with capture_logs() as logs:
            async with asyncio.timeout(9):
                await f.instances[0].drain.run()
        assert [line["streams"] for line in logs if "has not got everything" in line["event"]] == [1]


async def test_drain_waits_for_what_a_slow_redis_has_not_got(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet(redis.url, drain_s=60) as f:
        mirror, go, waits = shared_of(f, 0)._mirror, asyncio.Event(), asyncio.Event()
        append = mirror._append_some

        async def appended(some: list[RedisLog]) -> int:
            await go.wait()
            return await append(some)

        monkeypatch.setattr(mirror, "_append_some", appended)
        path = await f.ask(0, "[[tokens=3]]")
        whole = await f.read(0, path)
        drain = asyncio.create_task(f.instances[0].drain.run(report=lambda *_: waits.set()))
        await waits.wait()
        assert not drain.done()
        go.set()
        await drain
        assert frames(await f.read(1, path)) == frames(whole)


async def test_close_that_is_asked_for_again_waits_and_warns_once(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(redis.url, count=1) as f:
        registry, mirror = f.instances[0].registry, shared_of(f, 0)._mirror

        async def never(_logs: list[RedisLog]) -> int:
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(mirror, "_append_some", never)
        path = await f.ask(0, "[[tokens=3]]")
        await f.read(0, path)
        with capture_logs() as logs:
            await asyncio.gather(registry.close(), registry.close())
            await registry.close()
        assert len([line for line in logs if "has not got everything" in line["event"]]) == 1


async def test_start_that_is_refused_leaves_nothing_open(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"upstream": "simulator", "log": f"redis://127.0.0.1:{redis.port}/99"})
    shared = Shared(settings, Table(ReplayMemory(1), retention_s=1), Anthropic(settings))
    closed = []
    for client in (shared._client, shared._blocking):

        async def aclose(close: Any = client.aclose) -> None:
            closed.append(close)
            await close()

        monkeypatch.setattr(client, "aclose", aclose)
    with pytest.raises(ConfigError):
        await shared.start()
    assert len(set(closed)) == 2
    assert not shared.runs


class UnreadLog(MemoryLog):
    """Nobody reads what was appended."""

    def read(self, position: int, limit: int = 0) -> bytes:
        raise AssertionError


USAGES = st.fixed_dictionaries(
    {}, optional={"input_tokens": st.integers(0, 9999) | st.just(None), "output_tokens": st.integers(0, 9999)}
)
EVENTS = st.one_of(
    USAGES.map(lambda usage: ("message_start", {"type": "message_start", "message": {"usage": usage}})),
    USAGES.map(lambda usage: ("message_delta", {"type": "message_delta", "usage": usage})),
    USAGES.map(lambda usage: ("", {"type": "message_delta", "usage": usage})),
    st.sampled_from(["word", '"usage":{"output_tokens":5}']).map(
        lambda text: ("content_block_delta", {"type": "content_block_delta", "delta": {"text": text}})
    ),
)


@given(batches=st.lists(st.lists(EVENTS, min_size=1, max_size=5), max_size=8))
def test_usage_of_a_followed_stream_is_known_as_its_events_come(batches: list[list[tuple[str, Any]]]) -> None:
    stream_id = "A" * 22
    log = UnreadLog(ReplayMemory(1 << 20))
    anthropic = Anthropic(Settings())
    stream = FollowedStream(stream_id, log, anthropic, now=0.0, created_at=0.0, on_end=lambda _stream: None)
    usage = {"input_tokens": 0, "output_tokens": 0}
    follower, seq = anthropic.follow(usage), 0
    for batch in batches:
        text = b""
        for event_type, data in batch:
            seq += 1
            lines = (f"event: {event_type}\n" if event_type else "") + f"data: {json.dumps(data)}"
            follower.observe(event_type.encode(), lines.encode())
            text += f"{lines}\nid: {stream_id}.{seq}\n\n".encode()
        stream.publish(text, seq)
        assert stream.usage == usage
    burial, _ = stream.burial()
    assert json.loads(parse(burial).frames[-1].data)["usage"] == usage
