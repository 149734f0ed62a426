"""What is said to requests that are none, and to those whose body breaks: at once, in our shape, hardly logged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING

import pytest
from conftest import Server, eventually, prompt
from raw import connected, request
from structlog.testing import capture_logs

from aisse.service.connection import Refusals

if TYPE_CHECKING:
    from raw import Answer

HEAD = (
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
FIRST = b'5\r\n{"mes\r\n'
CANARY = "s3cr3t"


def is_refusal(answer: Answer, status: int = 400) -> None:
    """In the one shape of errors, and with nothing of what was sent."""
    assert (answer.version, answer.status) == ("HTTP/1.1", status)
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers.getall("Server") == ["aisse"]
    said = answer.json()
    assert (said["type"], said["error"]["type"]) == ("error", "invalid_request_error")
    assert CANARY not in answer.body.decode()


@pytest.mark.parametrize(
    "junk",
    [b"zz\r\n", b"-1\r\n", b"3\r\nfooXX", b"ffffffffffffffffff\r\n", b"\r\n", b"0\r\n" + b"x" * 10_000 + b"\r\n"],
)
async def test_body_that_breaks_is_refused_at_once(server: Server, junk: bytes) -> None:
    """Not once it has not arrived in time, which is half a minute later."""
    async with connected(server.address) as connection:
        await connection.send(HEAD + FIRST)
        await eventually(lambda: server.registry.bodies.used > 0)
        await connection.send(junk)
        is_refusal(await connection.answer())
        # What follows is not understood: no further answer, and no further request.
        assert await connection.rest() == b""
    assert server.registry.bodies.used == 0
    assert server.registry.generations == 0


async def test_body_that_breaks_in_its_first_packet_is_refused_at_once(server: Server) -> None:
    async with connected(server.address) as connection:
        await connection.send(HEAD + FIRST + b"zz\r\n")
        is_refusal(await connection.answer())
        assert await connection.rest() == b""


async def test_body_that_breaks_behind_all_that_was_needed_starts_nothing(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """It may go on with anything: what came is not what was sent."""
    question = json.dumps(prompt("[[tokens=3]]")).encode()
    async with connected(server.address) as connection:
        await connection.send(HEAD + b"%x\r\n%b\r\n" % (len(question), question))
        await eventually(lambda: server.registry.bodies.used > 0)
        await connection.send(b"zz\r\n")
        is_refusal(await connection.answer())
        assert await connection.rest() == b""
    assert server.registry.generations == 0
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


async def test_body_that_breaks_behind_a_request_that_runs_is_told_of_after_it(server: Server) -> None:
    async with connected(server.address) as connection:
        question = json.dumps(prompt("[[tokens=3]]")).encode()
        await connection.send(request("POST", "/api/chat", question) + HEAD + FIRST)
        first = await connection.head()
        assert first.status == 200
        await connection.send(b"zz\r\n")
        rest = await connection.rest()
        # The first answer is whole, whatever came behind its question.
        assert b"\nevent: end\n" in rest
        assert b"\r\n0\r\n\r\n" in rest


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: s3cr3t\x01\r\n\r\n", 400),
        (b"GET /s3cr3t\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"s3cr3t\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00s3cr3t", 400),  # TLS to a port without it
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: s3cr3t\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /" + b"s3cr3t" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"s3cr3t" * 3000 + b"\r\n\r\n", 431),
    ],
)
async def test_what_is_no_request_is_refused_in_our_shape(server: Server, sent: bytes, status: int) -> None:
    async with connected(server.address) as connection:
        await connection.send(sent)
        is_refusal(await connection.answer(), status)
        assert await connection.rest() == b""


@pytest.mark.parametrize("path", ["/api/chat", "/nowhere"])
async def test_expectation_that_is_not_known_is_refused_in_our_shape(server: Server, path: str) -> None:
    async with connected(server.address) as connection:
        await connection.send(request("GET", path, headers={"Expect": CANARY}))
        is_refusal(await connection.answer(), 417)


async def test_requests_that_are_none_cannot_fill_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with capture_logs() as lines, caplog.at_level(logging.DEBUG):
        for _ in range(50):
            async with connected(server.address) as connection:
                await connection.send(b"GET /health HTTP/1.1\r\nX-Secret: s3cr3t\x01\r\n\r\n")
                await connection.answer()
    assert [line["event"] for line in lines] == ["requests refused that are no HTTP"]
    assert lines[0]["log_level"] == "info"
    assert not [record for record in caplog.records if record.name != "asyncio"]
    assert CANARY not in caplog.text + repr(lines)


async def test_refusals_are_told_once_in_a_while_also_where_no_other_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aisse.service.connection._TELL_S", 0.01)
    refusals = Refusals()
    with capture_logs() as lines:
        for _ in range(4):
            refusals.add()
        assert [line["requests"] for line in lines] == [1]
        await eventually(lambda: len(lines) == 2)
        for _ in range(3):
            refusals.add()
        await eventually(lambda: sum(line["requests"] for line in lines) == 7)
    assert lines[1]["requests"] == 3


async def test_error_of_the_application_is_still_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr(server.registry, "create", fail)
    with capture_logs() as lines:
        async with connected(server.address) as connection:
            await connection.send(request("POST", "/api/chat", json.dumps(prompt("hello")).encode()))
            answer = await connection.answer()
    assert answer.status == 500
    assert [line["log_level"] for line in lines] == ["error"]


async def test_what_is_cut_off_on_purpose_is_no_error(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Readers that are evicted, and readers of what is elsewhere while the server drains."""
    body = json.dumps(prompt("[[tokens=100000 pace=50]]")).encode()
    with capture_logs() as lines, caplog.at_level(logging.DEBUG):
        async with connected(server.address) as reading, connected(server.address) as turned_away:
            await reading.send(request("POST", "/api/chat", body))
            assert (await reading.head()).status == 200
            assert await turned_away.usable()
            for reader in server.registry.attached():
                reader.evict()
            with contextlib.suppress(ConnectionResetError):
                assert not (await reading.rest()).endswith(b"0\r\n\r\n")
            drain = asyncio.create_task(server.drain.run())
            await eventually(lambda: server.registry.draining)
            await turned_away.send(request("GET", "/api/chat/" + "A" * 22))
            assert b"event: reconnect" in await turned_away.rest()
            drain.cancel()
            await asyncio.gather(drain, return_exceptions=True)
            await server.registry.close()
    assert not [line for line in lines if line["log_level"] not in {"info", "warning"}]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
