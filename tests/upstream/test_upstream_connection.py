"""Idle connections that close: which questions are asked again, and which never are."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import re
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from asking import ANSWER, OWN, answer, ask, closing, server_side, started
from conftest import Server, prompt, serving
from rawupstream import LAST_CHUNK, Connection, Request, chunk, head, message_start, raw_upstream

from aisse.errors import UpstreamError
from aisse.upstream.connection import Connector, Sending
from aisse.upstream.question import Question

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    import aiohttp

    from aisse.upstream.client import Upstream

SOAK = os.environ.get("TESTS_SOAK") == "1"


async def answered(upstream: Upstream, question: bytes = b"{}") -> bytes:
    """The whole body of the answer to one question."""
    response = await upstream.open(Question([question]))
    out: list[bytes] = []
    ended = asyncio.get_running_loop().create_future()
    response.raw_body.listen(response.content, out.append, lambda: ended.set_result(None))
    async with asyncio.timeout(20):
        await ended
    response.close()
    return b"".join(out)


@pytest.fixture(params=["plain", "TLS"])
def tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext | None:
    """None, or what a server has to have for its certificate to be trusted here."""
    return server_side(monkeypatch) if request.param == "TLS" else None


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("size", [2, 300_000, 3_000_000])
async def test_question_that_meets_the_close_of_an_idle_connection_is_asked_again(
    tls: ssl.SSLContext | None, how: str, size: int
) -> None:
    question = b"{" + b" " * size + b"}"
    async with raw_upstream(closing(0, how=how), tls=tls) as upstream, started(upstream.url) as asked:
        for _ in range(3):
            assert await answered(asked, question) == b"".join(ANSWER)
        # The third meets a connection of its own: that of the repetition is not kept.
        assert [connection.requests for connection in upstream.connections] == [2, 1, 1]
        assert {request.body for request in upstream.requests} == {question}
        assert upstream.requests[2].headers["connection"] == "close"
        assert upstream.requests[2].headers["x-api-key"] == OWN


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_question_is_asked_again_where_the_connection_closes_while_it_is_written(how: str) -> None:
    """However long that takes: what was not sent whole cannot have been generated."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            try:
                request_head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            length = int(re.search(rb"(?i)content-length: (\d+)", request_head)[1])  # type: ignore[index]
            if connections == 1 and length > 1000:
                if how == "rst":
                    writer.transport.abort()
                break
            await reader.readexactly(length)
            writer.write(b"".join([head(), *map(chunk, ANSWER), LAST_CHUNK]))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, started(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as asked:
        assert await answered(asked) == b"".join(ANSWER)
        assert await answered(asked, b" " * 8_000_000) == b"".join(ANSWER)
    assert connections == 2


async def test_question_is_asked_again_once() -> None:
    async def serve(request: Request, connection: Connection) -> None:
        if len(upstream.requests) == 1:
            await answer(request, connection)
        else:
            connection.fin()

    async with raw_upstream(serve) as upstream, started(upstream.url) as asked:
        await answered(asked)
        with pytest.raises(UpstreamError) as failed:
            await answered(asked)
        assert failed.value.cause == "connection closed before an answer"
        assert [connection.requests for connection in upstream.connections] == [2, 1]


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_question_on_a_fresh_connection_is_never_asked_again(how: str) -> None:
    async with raw_upstream(closing(0, how=how, before=0)) as upstream, started(upstream.url) as asked:
        with pytest.raises(UpstreamError):
            await answered(asked)
        assert len(upstream.requests) == 1


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("sent", [b"H", b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"\x15"])
async def test_question_that_got_a_byte_of_an_answer_is_not_asked_again(sent: bytes, how: str) -> None:
    """An interim response, too, says that the request was read: it may be generated, and billed."""

    async def serve(request: Request, connection: Connection) -> None:
        if connection.requests == 1:
            await answer(request, connection)
            return
        connection.send(sent)
        await connection.delivered()
        # A reset takes what the other side has not read, and then nobody has had an answer's byte.
        with contextlib.suppress(ProcessLookupError, ValueError):  # either side has closed already
            while connection.unread():
                await asyncio.sleep(0.001)
        connection.rst() if how == "rst" else connection.fin()

    async with raw_upstream(serve) as upstream, started(upstream.url) as asked:
        await answered(asked)
        with pytest.raises(UpstreamError):
            await answered(asked)
        assert len(upstream.requests) == 2


async def test_question_that_waited_too_long_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been generated, and billed: a second is what a close takes that was on its way."""
    monkeypatch.setattr("aisse.upstream.connection._CLOSING_S", -1.0)
    async with raw_upstream(closing(0)) as upstream, started(upstream.url) as asked:
        await answered(asked)
        with pytest.raises(UpstreamError):
            await answered(asked)
        assert len(upstream.requests) == 2


async def test_close_counts_as_met_for_a_second() -> None:
    """What has waited longer may have been generated, and billed."""
    sending = Sending(Question([b"{}"]))
    sending.reused = True
    assert sending.met_a_close()  # not even written whole
    now = sending._sent = asyncio.get_running_loop().time()
    assert sending.met_a_close()  # the loop's clock stands within a step
    sending._sent = now - 1.1
    assert not sending.met_a_close()


async def test_connection_whose_close_has_come_carries_no_question(tls: ssl.SSLContext | None) -> None:
    """It is seen in the moment of asking, before the event loop has looked: nothing is sent, nothing repeated."""
    async with raw_upstream(answer, tls=tls) as upstream, started(upstream.url) as asked:
        await answered(asked)
        [connection] = upstream.connections
        with socket.socket(fileno=os.dup(connection._sock.fileno())) as end:
            end.shutdown(socket.SHUT_WR)
        await answered(asked)
        await answered(asked)
        assert [connection.requests for connection in upstream.connections] == [1, 2]


async def test_connection_that_said_something_unasked_carries_no_question() -> None:
    """Some servers say 408 before they close: whoever took it for the answer would be told of a timeout."""
    late = head("408 Request Timeout", "text/plain", "Connection: close", framing="0")

    async with raw_upstream(answer) as upstream, started(upstream.url) as asked:
        await answered(asked)
        upstream.connections[0].send(late)
        await upstream.connections[0].delivered()
        await answered(asked)
        assert [connection.requests for connection in upstream.connections] == [1, 1]


async def test_bytes_that_come_between_the_look_and_the_question_are_no_answer_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Writing the question gives the event loop a turn, or many."""
    look = Connector._is_idle
    unasked = b"".join([head(), chunk(b"data: unasked\n\n"), LAST_CHUNK])

    def before_they_come(self: Connector, protocol: Any) -> bool:
        idle = look(self, protocol)
        protocol.data_received(unasked)
        return idle

    async with raw_upstream(answer) as upstream, started(upstream.url) as asked:
        await answered(asked)
        monkeypatch.setattr(Connector, "_is_idle", before_they_come)
        assert await answered(asked) == b"".join(ANSWER)
        assert len(upstream.connections) == 2


async def test_timeout_said_on_a_reused_connection_is_its_close() -> None:
    """RFC 9110, section 15.5.9: the request has not come, and may be repeated."""
    late = head("408 Request Timeout", "text/plain", "Connection: close", framing="0")
    async with raw_upstream(closing(0, late)) as upstream, started(upstream.url) as asked:
        for _ in range(2):
            assert await answered(asked) == b"".join(ANSWER)
    async with raw_upstream(closing(0, late, before=0)) as upstream, started(upstream.url) as asked:
        with pytest.raises(UpstreamError) as failed:
            await answered(asked)
        assert (failed.value.status, failed.value.upstream_status) == (504, 408)


async def test_question_is_not_kept_while_its_answer_is_read() -> None:
    """It may be of many MiB, and the answer go on for an hour."""

    async def serve(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(message_start()))
        await connection.lost.wait()

    async with raw_upstream(serve) as upstream, started(upstream.url) as asked:
        response = await asked.open(Question([b" " * 100_000]))
        gc.collect()
        assert not [kept for kept in gc.get_objects() if isinstance(kept, Sending)]
        response.raw_body.abort()
        response.close()


async def test_question_asked_again_is_stopped_like_any_other(client: aiohttp.ClientSession) -> None:
    async def serve(request: Request, connection: Connection) -> None:
        if len(upstream.requests) == 1:
            await answer(request, connection)
        elif len(upstream.requests) == 2:
            connection.fin()
        else:
            connection.send(head(), chunk(message_start()))
            await connection.lost.wait()

    async with raw_upstream(serve) as upstream, serving(upstream.url) as server:
        await ask(client, server)
        async with client.post(server.chat, json=prompt("anything")) as response:
            async with client.delete(server.url + response.headers["Content-Location"]) as stopped:
                assert stopped.status == 204
            assert '"reason":"stopped"' in await response.text()
        await asyncio.wait_for(upstream.connections[1].lost.wait(), 5)
        assert len(upstream.requests) == 3


async def test_question_asked_again_in_vain_is_told_as_any_other() -> None:
    async def serve(request: Request, connection: Connection) -> None:
        if connection.requests == 1:
            await answer(request, connection)
        else:
            listener.close()
            connection.fin()

    async with raw_upstream(serve) as upstream, started(upstream.url) as asked:
        listener = upstream.server
        await answered(asked)
        with pytest.raises(UpstreamError) as failed:
            await answered(asked)
        assert failed.value.cause == "connection refused"


@pytest.mark.timeout(600)
async def test_questions_survive_connections_that_close_at_random(client: aiohttp.ClientSession) -> None:
    """Each is answered, and generated once, by an upstream that closes idle connections whenever it likes."""
    randomly = random.Random(13)
    generated: Counter[str] = Counter()
    closed_in_the_face = 0
    loop = asyncio.get_running_loop()

    def close_if_idle(connection: Connection, requests: int) -> None:
        if connection.requests == requests and not connection.lost.is_set():
            connection.rst() if randomly.random() < 0.3 else connection.fin()

    async def serve(request: Request, connection: Connection) -> None:
        nonlocal closed_in_the_face
        if connection.requests > 1 and randomly.random() < 0.2:
            # In the moment in which the request was on its way.
            closed_in_the_face += 1
            connection.rst() if randomly.random() < 0.5 else connection.fin()
            return
        generated[request.prompt] += 1
        await answer(request, connection)
        if randomly.random() < 0.7:
            loop.call_later(randomly.uniform(0, 0.03), close_if_idle, connection, connection.requests)

    async def questions(numbers: Iterator[int], server: Server) -> None:
        for number in numbers:
            status, _, body = await ask(client, server, f"question {number}")
            assert status == 200, number
            assert '"reason":"complete"' in body, number
            await asyncio.sleep(randomly.uniform(0, 0.03))

    count = 5000 if SOAK else 400
    async with raw_upstream(serve) as upstream, serving(upstream.url) as server:
        numbers = iter(range(count))
        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(questions(numbers, server))
        assert server.registry.figures.failed == 0
    assert generated == Counter(f"question {number}" for number in range(count))
    assert closed_in_the_face > count // 50
    assert len(upstream.requests) >= count + closed_in_the_face
