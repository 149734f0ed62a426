"""Failures as clients see them, and what the log says of them."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from typing import TYPE_CHECKING

import aiohttp
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from raw import connected, request

from aisse.app import create_app
from aisse.errors import ConfigError, RequestError, UpstreamError
from aisse.formats.anthropic import Anthropic
from aisse.settings import Settings
from aisse.telemetry import log
from aisse.upstream.client import Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CANARY = "canary-7f3a"


@contextlib.asynccontextmanager
async def failing(error: Exception) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    """A started application with a route that fails."""

    async def fail(_request: web.Request) -> web.StreamResponse:
        raise error

    async def fail_late(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        raise error

    settings = Settings(upstream="http://127.0.0.1:9")
    app = create_app(settings, Upstream(settings.upstream, settings, Anthropic(settings)))
    app.router.add_get("/fail", fail)
    app.router.add_get("/late", fail_late)
    server = TestServer(app)
    await server.start_server(access_log=None)
    async with TestClient(server, timeout=aiohttp.ClientTimeout(60)) as client:
        yield client


BUGS = [ValueError(CANARY), KeyError(CANARY), RecursionError(CANARY), ConfigError(CANARY), AssertionError(CANARY)]


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
async def test_unexpected_exception_becomes_a_500_without_its_message(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with failing(error) as client:
        async with client.get(f"/fail?{CANARY}") as response:
            assert response.status == 500
            assert response.content_type == "application/json"
            text = await response.text()
        said = json.loads(text)
        assert said["type"] == "error"
        assert said["error"]["type"] == "api_error"
        assert said["error"]["message"]
        assert CANARY not in text
        assert "Traceback" not in text
        async with client.get("/health/live") as response:
            assert response.status == 200


@pytest.mark.parametrize(
    "error",
    [*BUGS, RequestError(400, "invalid_request_error", CANARY), UpstreamError("api_error", CANARY), web.HTTPNotFound()],
    ids=lambda error: type(error).__name__,
)
async def test_exception_after_the_headers_breaks_the_body_off(error: Exception) -> None:
    """A second response would be taken for more of the first; a clean end would be taken for success."""
    async with failing(error) as client, connected((client.host, client.port or 0)) as connection:
        await connection.send(request("GET", "/late"))
        assert (await connection.head()).status == 200
        assert await connection.rest() == b"5\r\nbegun\r\n"


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (RequestError(400, "invalid_request_error", "is wrong", "field"), 400, None),
        (RequestError(503, "overloaded_error", "full", retry_after_s=7), 503, "7"),
        (UpstreamError("rate_limit_error", "slow down", 429, "12"), 429, "12"),
        (UpstreamError("api_error", "broken", 502), 502, None),
    ],
)
async def test_error_of_ours_becomes_its_status_and_shape(
    error: RequestError | UpstreamError, status: int, retry_after: str | None
) -> None:
    async with failing(error) as client, client.get("/fail") as response:
        assert response.status == status
        assert response.headers.get("Retry-After") == retry_after
        assert await response.json() == error.body()


@pytest.mark.parametrize("status", [404, 405, 413, 417])
async def test_http_exception_becomes_json_with_its_status(status: int) -> None:
    error: web.HTTPException = {
        404: web.HTTPNotFound(text=CANARY),
        405: web.HTTPMethodNotAllowed("GET", ["POST", "DELETE"]),
        413: web.HTTPRequestEntityTooLarge(1, 2),
        417: web.HTTPExpectationFailed(),
    }[status]
    async with failing(error) as client, client.get("/fail") as response:
        assert response.status == status
        said = await response.json()
        assert said["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
        assert CANARY not in str(said)
        if status == 405:
            assert set(re.split(r",\s*", response.headers["Allow"])) == {"POST", "DELETE"}


async def test_unexpected_exception_is_logged_without_its_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The place where it was raised is enough to find it; the message may quote a prompt."""
    root, configured = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    try:
        log.configure("json", "debug")
        async with failing(ValueError(CANARY)) as client, client.get(f"/fail?{CANARY}") as response:
            assert response.status == 500
    finally:
        structlog.configure(**configured)
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (line,) = [line for line in lines if line["level"] == "error"]
    assert line["exception"] == "builtins.ValueError"
    assert any("test_routes_errors.py" in place for place in line["raised_at"])
    assert CANARY not in json.dumps(lines)
