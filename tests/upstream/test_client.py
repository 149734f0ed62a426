"""The upstream side: what is sent, with which key, and what becomes of what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gzip
import json
import os
import re
import socket
import sys
import termios
import tracemalloc
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp.resolver import DefaultResolver
from asking import ANSWER, OWN, answer, ask, closing, server_side, started
from conftest import Server, eventually, prompt, serving, settled
from rawupstream import (
    LAST_CHUNK,
    PING,
    Connection,
    RawUpstream,
    Request,
    chunk,
    delta,
    event,
    head,
    message_start,
    raw_upstream,
)
from structlog.testing import capture_logs

import aisse
from aisse.formats.anthropic import Anthropic
from aisse.settings import Settings
from aisse.upstream.client import Upstream
from aisse.upstream.keys import key_for
from aisse.upstream.question import Question

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    import aiohttp

    from aisse.simulator import Simulator

SOAK = os.environ.get("TESTS_SOAK") == "1"

EZAI, ANTHROPIC, CREDENTIAL = "ez-key-1f2e3d", "sk-ant-key-4c5b6a", "cred-key-0d1e2f"
PROVIDERS = {"EZAI_API_KEY": EZAI, "ANTHROPIC_API_KEY": ANTHROPIC}


def events_of(body: str) -> list[tuple[str, dict[str, Any]]]:
    return [(kind, json.loads(data)) for kind, data in re.findall(r"^event: (.*)\ndata: (.*)\n", body, re.MULTILINE)]


# --- what a real request carries ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def real_process(environ: Mapping[str, str], *arguments: str) -> AsyncIterator[str]:
    """`aisse serve` with nothing but `environ`; yields its URL, and ends it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "aisse",
        "serve",
        "--port=0",
        "--log-level=error",
        *arguments,
        env={"PATH": os.defpath, **environ},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        yield line.decode().split()[-1]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_provider_keys_do_not_arrive_at_another_server(client: aiohttp.ClientSession, host: str) -> None:
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    async with raw_upstream(answer, host) as upstream, real_process(PROVIDERS, f"--upstream={upstream.url}") as url:
        async with client.post(url + "/api/chat", json=prompt("anything")) as response:
            assert response.status == 200
            await response.read()
        assert_no_key(upstream)


@pytest.mark.parametrize("source", ["AISSE_UPSTREAM_KEY", "CREDENTIALS_DIRECTORY"])
async def test_upstream_key_arrives_and_no_other_does(
    client: aiohttp.ClientSession, source: str, tmp_path: Path
) -> None:
    (tmp_path / "upstream_key").write_text(CREDENTIAL)
    value = {"AISSE_UPSTREAM_KEY": OWN, "CREDENTIALS_DIRECTORY": str(tmp_path)}[source]
    async with (
        raw_upstream(answer) as upstream,
        real_process(PROVIDERS | {source: value}, f"--upstream={upstream.url}") as url,
    ):
        async with client.post(url + "/api/chat", json=prompt("anything")) as response:
            assert response.status == 200
            await response.read()
        [request] = upstream.requests
        assert request.headers["x-api-key"] == {"AISSE_UPSTREAM_KEY": OWN, "CREDENTIALS_DIRECTORY": CREDENTIAL}[source]
        assert not any(key in str(request) for key in PROVIDERS.values())


@pytest.mark.parametrize(
    "host",
    [
        "api.ezaiapi.com",  # its own, but in the open
        "ezaiapi.com.evil.example",
        "evilezaiapi.com",
        "api.anthropic.com",
        "api.anthropic.com.evil",
        "API.ANTHROPIC.COM.",
        "localhost",
    ],
)
async def test_provider_keys_do_not_arrive_under_any_name(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """Whatever the name, it is this machine that answers to it."""

    async def resolve(_self: object, name: str, port: int = 0, **_: Any) -> list[dict[str, Any]]:
        assert name.lower().rstrip(".") == host.lower().rstrip(".")
        return [{"hostname": name, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]

    monkeypatch.setattr(DefaultResolver, "resolve", resolve)
    async with raw_upstream(answer) as upstream:
        named = upstream.url.replace("127.0.0.1", host)
        found = key_for(named, Settings(), PROVIDERS)
        async with serving(named, key=found[0] if found else None) as server:
            assert (await ask(client, server))[0] == 200
        assert upstream.requests[0].headers["host"].lower().startswith(host.lower().rstrip("."))
        assert_no_key(upstream)


def assert_no_key(upstream: RawUpstream) -> None:
    assert upstream.requests
    for request in upstream.requests:
        assert "x-api-key" not in request.headers
        assert "authorization" not in request.headers
        assert not any(key in str(request) for key in (*PROVIDERS.values(), OWN, CREDENTIAL))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_not_followed_and_is_502(client: aiohttp.ClientSession, status: int) -> None:
    async def redirect(request: Request, connection: Connection) -> None:
        connection.send(head(f"{status} Moved", "text/plain", f"Location: {elsewhere.url}/v1/messages", framing="0"))

    async with (
        raw_upstream(answer) as elsewhere,
        raw_upstream(redirect) as upstream,
        serving(upstream.url, key=OWN) as server,
    ):
        answered, _, body = await ask(client, server)
        assert answered == 502
        assert elsewhere.url not in body
        assert OWN not in body
        assert len(upstream.requests) == 1
        assert not elsewhere.connections


@pytest.mark.parametrize(
    ("variable", "wanted"),
    [
        ("HTTP_PROXY", False),
        ("http_proxy", False),
        ("ALL_PROXY", False),
        ("all_proxy", False),
        ("HTTP_PROXY", True),
        ("http_proxy", True),
    ],
)
async def test_proxy_of_the_environment_is_used_only_where_the_setting_says_so(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, variable: str, wanted: bool
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    async with raw_upstream(answer) as proxy, raw_upstream(answer) as upstream:
        monkeypatch.setenv(variable, proxy.url)
        async with serving(upstream.url, key=OWN, proxy_from_env=wanted) as server:
            assert (await ask(client, server))[0] == 200
        assert len(proxy.connections) == int(wanted)
        assert len(upstream.connections) == int(not wanted)
        if wanted:
            assert proxy.requests[0].line == f"POST {upstream.url}/v1/messages HTTP/1.1"


async def test_netrc_is_not_read(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("default login someone password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    async with raw_upstream(answer) as upstream, serving(upstream.url) as server:
        await ask(client, server)
        assert_no_key(upstream)


async def test_request_has_the_headers_of_the_api_and_none_of_the_clients(client: aiohttp.ClientSession) -> None:
    token = "access-token-of-the-client"
    headers = {
        "Authorization": f"Bearer {token}",
        "Cookie": "session=private",
        "X-Forwarded-For": "192.0.2.1",
        "X-Api-Key": "the-clients-own",
        "Anthropic-Version": "1999-01-01",
        "Accept-Encoding": "gzip, br",
        "User-Agent": "the-clients-browser",
    }
    async with raw_upstream(answer) as upstream, serving(upstream.url, key=OWN, access_tokens=(token,)) as server:
        async with client.post(server.chat, json=prompt("anything"), headers=headers) as response:
            assert response.status == 200
            await response.read()
        [request] = upstream.requests
        assert request.line == "POST /v1/messages HTTP/1.1"
        sent = dict(request.headers)
        assert sent.pop("host") == upstream.url.removeprefix("http://")
        assert sent.pop("content-length") == str(len(request.body))
        assert sent == {
            "accept": "text/event-stream",
            "accept-encoding": "identity",
            "anthropic-version": "2023-06-01",
            "content-type": "application/json",
            "user-agent": f"aisse/{aisse.__version__}",
            "x-api-key": OWN,
        }
        assert json.loads(request.body)["stream"] is True


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("", "/v1/messages"),
        ("/", "/v1/messages"),
        ("//", "/v1/messages"),
        ("/v1", "/v1/messages"),
        ("/v1/", "/v1/messages"),
        ("/v1/messages", "/v1/messages"),
        ("/v1/messages/", "/v1/messages"),
        ("/team/a", "/team/a/v1/messages"),
        ("/anthropic/v1", "/anthropic/v1/messages"),
        ("/anthropic/v1/", "/anthropic/v1/messages"),
        ("/anthropic/v1/messages", "/anthropic/v1/messages"),
        ("/a%2Fb/v1", "/a%2Fb/v1/messages"),
        # no version of this API's
        ("/v1beta", "/v1beta/v1/messages"),
        ("/v11", "/v11/v1/messages"),
        ("/apiv1", "/apiv1/v1/messages"),
        ("/V1", "/V1/v1/messages"),
        ("/v1/team", "/v1/team/v1/messages"),
        ("/messages", "/messages/v1/messages"),
        ("/v1/v1", "/v1/v1/messages"),
    ],
)
async def test_base_url_may_end_in_what_other_tools_want_there(
    client: aiohttp.ClientSession, path: str, endpoint: str
) -> None:
    async with raw_upstream(answer) as upstream:
        base_url = Settings(upstream=upstream.url + path).upstream
        async with serving(base_url) as server:
            assert (await ask(client, server))[0] == 200
        assert upstream.requests[0].line == f"POST {endpoint} HTTP/1.1"


def test_base_url_whose_host_is_called_v1_keeps_it() -> None:
    assert str(Upstream("https://v1", Settings(), Anthropic(Settings()))._url) == "https://v1/v1/messages"


async def test_cookies_are_not_kept(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    async with serving(simulator.url) as server:
        for _ in range(3):
            status, headers, _ = await ask(client, server, "[[cookie='session=private; Path=/' tokens=1]]")
            assert status == 200
            assert "Set-Cookie" not in headers
        assert simulator.stats.requests == 3
        assert simulator.stats.cookied == 0


async def test_cookie_of_an_upstream_that_has_a_name_is_not_sent_with_the_next_question(
    client: aiohttp.ClientSession,
) -> None:
    """Aiohttp's own jar keeps none of an address: this is what would happen with every real upstream."""

    async def serve(request: Request, connection: Connection) -> None:
        fields = head("200 OK", "text/event-stream", "Set-Cookie: session=private; Path=/")
        connection.send(fields, *map(chunk, ANSWER), LAST_CHUNK)

    async with raw_upstream(serve) as upstream, serving(upstream.url.replace("127.0.0.1", "localhost")) as server:
        for _ in range(2):
            assert (await ask(client, server))[0] == 200
        assert len(upstream.requests) == 2
        assert all("cookie" not in request.headers for request in upstream.requests)


# --- failures before the commit are real statuses -------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "kind"),
    [
        (400, 400, "invalid_request_error"),
        (413, 413, "request_too_large"),
        (422, 422, "invalid_request_error"),
        (401, 502, "api_error"),
        (403, 502, "api_error"),
        (402, 502, "api_error"),
        (404, 404, "not_found_error"),
        (405, 502, "api_error"),
        (406, 502, "api_error"),
        (407, 502, "api_error"),
        (408, 504, "timeout_error"),
        (409, 409, "invalid_request_error"),
        (410, 410, "invalid_request_error"),
        (411, 502, "api_error"),
        (415, 502, "api_error"),
        (418, 418, "invalid_request_error"),
        (424, 424, "invalid_request_error"),
        (429, 429, "rate_limit_error"),
        (431, 502, "api_error"),
        (451, 451, "invalid_request_error"),
        (499, 499, "invalid_request_error"),
        (500, 502, "api_error"),
        (501, 502, "api_error"),
        (502, 502, "api_error"),
        (503, 503, "api_error"),
        (504, 504, "timeout_error"),
        (520, 502, "api_error"),
        (522, 504, "timeout_error"),
        (524, 504, "timeout_error"),
        (529, 503, "overloaded_error"),
        (599, 502, "api_error"),
    ],
)
async def test_status_of_the_upstream_becomes_ours(
    server: Server, client: aiohttp.ClientSession, theirs: int, ours: int, kind: str
) -> None:
    status, headers, body = await ask(client, server, f"[[status={theirs} retry_after=17 message='what is wrong']]")
    assert status == ours
    assert headers["Content-Type"].startswith("application/json")
    assert "Content-Location" not in headers  # there is no stream to come back to
    assert headers.get("Retry-After") == ("17" if ours in {429, 503} else None)
    error = json.loads(body)
    assert error["type"] == "error"
    assert error["error"]["type"] == kind
    of_the_account = {
        401: "the upstream did not accept this server's key",
        402: "the upstream does not serve this server's account at the moment",
        403: "the upstream did not accept this server's key",
    }
    of_the_server = dict.fromkeys((405, 406, 407, 411, 415, 431), "the upstream does not take what this server sends")
    assert error["error"]["message"] == (of_the_account | of_the_server).get(theirs, "what is wrong")
    assert server.registry.active_streams == 0
    assert server.registry.replay_bytes == 0


@pytest.mark.parametrize("given", ["0", "120", "Wed, 21 Oct 2015 07:28:00 GMT"])
async def test_retry_after_is_kept_as_it_is(client: aiohttp.ClientSession, given: str) -> None:
    assert (await refused_with(client, "429 Slow", f"Retry-After: {given}"))[1].get("Retry-After") == given


@pytest.mark.parametrize("given", ["", "soon", "-1", "1e3", "99999999", "x" * 30, "12; evil", "key 0123456789abcdef"])
async def test_retry_after_that_is_none_is_dropped(client: aiohttp.ClientSession, given: str) -> None:
    status, headers, _ = await refused_with(client, "429 Slow", f"Retry-After: {given}")
    assert status == 429
    assert "Retry-After" not in headers


async def refused_with(client: aiohttp.ClientSession, status: str, *fields: str) -> tuple[int, Mapping[str, str], str]:
    async def refuse(request: Request, connection: Connection) -> None:
        connection.send(head(status, "text/plain", *fields, framing="2"), b"no")

    async with raw_upstream(refuse) as upstream, serving(upstream.url) as server:
        return await ask(client, server)


@pytest.mark.parametrize("status", ["204 No Content", "206 Partial Content", "304 Not Modified", "299 Fine"])
async def test_success_that_is_no_answer_is_502(client: aiohttp.ClientSession, status: str) -> None:
    async def refuse(request: Request, connection: Connection) -> None:
        connection.send(head(status, framing="0"))

    async with raw_upstream(refuse) as upstream, serving(upstream.url) as server:
        assert (await ask(client, server))[0] == 502


async def test_something_else_than_a_stream_is_502(server: Server, client: aiohttp.ClientSession) -> None:
    status, headers, body = await ask(client, server, "[[fault=html]]")
    assert status == 502
    assert headers["Content-Type"].startswith("application/json")
    assert json.loads(body)["error"]["type"] == "api_error"
    assert "html" not in body


async def test_redirect_of_the_simulator_is_502(server: Server, client: aiohttp.ClientSession) -> None:
    assert (await ask(client, server, "[[fault=redirect]]"))[0] == 502


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        ("invalid_request_error", 400),
        ("request_too_large", 413),
        ("authentication_error", 502),
        ("permission_error", 502),
        ("not_found_error", 404),
        ("billing_error", 502),
        ("rate_limit_error", 429),
        ("timeout_error", 504),
        ("overloaded_error", 503),
        ("api_error", 502),
        ("invented_error", 502),  # an upstream's own words are for no log, where the type goes
    ],
)
async def test_error_event_before_any_other_is_a_status(
    server: Server, client: aiohttp.ClientSession, kind: str, ours: int
) -> None:
    status, headers, body = await ask(client, server, f"[[fault=error at=0 error_type={kind} message='not now']]")
    assert status == ours
    assert headers["Content-Type"].startswith("application/json")
    error = json.loads(body)["error"]
    hidden = kind in {"authentication_error", "permission_error", "billing_error"}
    assert error["type"] == ("api_error" if hidden or kind == "invented_error" else kind)
    assert ("not now" in error["message"]) is not hidden


async def test_error_event_after_only_pings_is_a_status(client: aiohttp.ClientSession) -> None:
    failed = event({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})

    async def fail(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(PING), chunk(PING), chunk(failed), LAST_CHUNK)

    async with raw_upstream(fail) as upstream, serving(upstream.url) as server:
        assert (await ask(client, server))[0] == 503


async def test_stream_without_any_event_is_502(server: Server, client: aiohttp.ClientSession) -> None:
    status, _, body = await ask(client, server, "[[fault=no_events]]")
    assert status == 502
    assert json.loads(body)["error"]["type"] == "truncated_error"


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200", head()[:-2], head(), b"not HTTP at all\r\n\r\n", b"\x16\x03\x01"]
)
async def test_connection_that_breaks_before_the_first_event_is_502(
    client: aiohttp.ClientSession, how: str, sent: bytes
) -> None:
    async def break_off(request: Request, connection: Connection) -> None:
        connection.send(sent)
        connection.rst() if how == "rst" else connection.fin()

    async with raw_upstream(break_off) as upstream, serving(upstream.url) as server:
        status, headers, body = await ask(client, server)
        assert status == 502
        assert headers["Content-Type"].startswith("application/json")
        assert "HTTP" not in body


async def test_refused_connection_is_502(client: aiohttp.ClientSession) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can get the port meanwhile
        taken.bind(("127.0.0.1", 0))
        async with serving(f"http://127.0.0.1:{taken.getsockname()[1]}") as server:
            status, _, body = await ask(client, server)
    assert status == 502
    assert json.loads(body)["error"] == {"type": "api_error", "message": "the upstream could not be reached"}


async def test_name_that_does_not_resolve_is_502(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def resolve(_self: object, name: str, port: int = 0, **_: Any) -> list[dict[str, Any]]:
        asked.append(name)
        raise OSError(None, "no such name")

    monkeypatch.setattr(DefaultResolver, "resolve", resolve)
    async with serving("http://upstream.invalid") as server:
        status, _, body = await ask(client, server)
    assert asked == ["upstream.invalid"]
    assert status == 502
    assert "upstream.invalid" not in body


async def test_upstream_without_tls_under_https_is_502(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    async with serving(simulator.url.replace("http:", "https:")) as server:
        assert (await ask(client, server))[0] == 502
        assert simulator.stats.requests == 0


async def test_connection_that_is_not_accepted_in_time_is_504(client: aiohttp.ClientSession) -> None:
    """A listener whose queue is full: the kernel drops what asks for more."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        stack.enter_context(socket.create_connection(listener.getsockname()))
        async with serving(f"http://127.0.0.1:{listener.getsockname()[1]}", connect_s=0.2) as server:
            status, _, body = await ask(client, server)
    assert status == 504
    assert json.loads(body)["error"]["type"] == "timeout_error"


@pytest.mark.parametrize("script", ["first_s=3600", "fault=stall at=0"], ids=["no headers", "no event"])
async def test_no_first_byte_in_time_is_504(
    simulator: Simulator, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr("aisse.streams.sweep.SWEEP_S", 0.02)
    async with serving(simulator.url, first_byte_s=0.2, first_byte_commit_s=60) as server:
        status, _, body = await ask(client, server, f"[[{script}]]")
        assert status == 504
        assert json.loads(body)["error"]["type"] == "timeout_error"
        await eventually(lambda: simulator.stats.active == 0)  # and it is told so


async def test_error_body_that_never_ends_delays_the_status_no_longer_than_its_limit(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aisse.upstream.client._ERROR_BODY_S", 0.1)

    async def trickle(request: Request, connection: Connection) -> None:
        connection.send(head("400 Bad Request", "application/json"), chunk(b'{"type":"error",'))
        await connection.lost.wait()

    async with raw_upstream(trickle) as upstream, serving(upstream.url) as server:
        status, _, body = await ask(client, server)
        assert status == 400
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        await asyncio.wait_for(upstream.connections[0].lost.wait(), 60)


async def test_error_body_without_end_is_not_read_to_it(client: aiohttp.ClientSession) -> None:
    async def flood(request: Request, connection: Connection) -> None:
        connection.send(head("500 Oops", "text/plain"))
        while not connection.lost.is_set():
            connection.send(chunk(b"x" * 10_000))
            await connection.drain()
            await asyncio.sleep(0)

    async with raw_upstream(flood) as upstream, serving(upstream.url) as server:
        assert (await ask(client, server))[0] == 502
        await asyncio.wait_for(upstream.connections[0].lost.wait(), 60)


async def test_error_body_at_full_speed_is_read_no_further_than_its_bound(client: aiohttp.ClientSession) -> None:
    sent = 0

    async def flood(request: Request, connection: Connection) -> None:
        nonlocal sent
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        connection.send(head("500 Oops", "text/plain"))
        while not connection.lost.is_set():
            connection.send(chunk(b"x" * 10_000))
            await connection.drain()
            sent += 10_000
            await asyncio.sleep(0)

    async with raw_upstream(flood) as upstream, serving(upstream.url) as server:
        assert (await ask(client, server))[0] == 502
        await asyncio.wait_for(upstream.connections[0].lost.wait(), 20)
    assert sent < 1 << 20


async def test_receive_buffer_of_the_setting_is_what_the_kernel_has() -> None:
    async def begin(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(message_start()))

    async with raw_upstream(begin) as server, started(server.url, receive_buffer_bytes=16 << 10) as upstream:
        response = await upstream.open(Question([b"{}"]))
        assert response.connection is not None
        assert response.connection.transport is not None
        sock = response.connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * (16 << 10)  # socket(7): doubled
        response.raw_body.abort()
        response.close()


# --- generations that nobody wants any more ---------------------------------------------------------------------


async def test_upstream_that_does_not_read_its_question_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is closed in order would first send all that waits, however long the upstream takes nothing."""
    ours: list[socket.socket] = []
    make = Upstream._socket

    def noted(self: Upstream, address: tuple[Any, ...]) -> socket.socket:
        ours.append(make(self, address))
        return ours[-1]

    monkeypatch.setattr(Upstream, "_socket", noted)
    loop = asyncio.get_running_loop()
    size = 8 << 20
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        async with started(f"http://127.0.0.1:{listening.getsockname()[1]}") as upstream:
            asking = asyncio.create_task(upstream.open(Question([b"x" * size])))
            connection, _ = await loop.sock_accept(listening)
            with connection:
                connection.setblocking(False)
                [sock] = ours
                await eventually(lambda: unsent(sock) > 0)
                await eventually(settled(lambda: unsent(sock)))
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                await eventually(lambda: sock.fileno() < 0)
                got = 0
                with contextlib.suppress(ConnectionResetError):
                    async with asyncio.timeout(20):
                        while part := await loop.sock_recv(connection, 1 << 16):
                            got += len(part)
    assert got < size


def unsent(sock: socket.socket) -> int:
    """Bytes that the kernel has of what was written, and the peer has not."""
    count = bytearray(4)
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)


@dataclass
class Between:
    """What hands on everything between us and an upstream, until the upstream is to hear nothing any more."""

    url: str
    mute: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when our side of a connection is."""


@contextlib.asynccontextmanager
async def between(upstream: RawUpstream) -> AsyncIterator[Between]:
    port = int(upstream.url.rpartition(":")[2])

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_there, there = await asyncio.open_connection("127.0.0.1", port)

        async def back() -> None:
            while data := await from_there.read(1 << 16):
                writer.write(data)

        task = asyncio.create_task(back())
        try:
            while data := await reader.read(1 << 16):
                if not one.mute.is_set():
                    there.write(data)
        except ConnectionResetError:
            pass
        finally:
            one.gone.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for each in (writer, there):
                each.transport.abort()

    listening = await asyncio.start_server(hand_on, "127.0.0.1", 0)
    one = Between(f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    async with listening:
        yield one


async def test_upstream_that_says_no_goodbye_over_tls_is_gone_at_once(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it has, a connection that is closed in order stays open, and the generation goes on."""

    async def begin(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(message_start()), chunk(delta("a")))

    async with (
        raw_upstream(begin, tls=server_side(monkeypatch)) as upstream,
        between(upstream) as one,
        serving(one.url) as server,
        client.post(server.chat, json=prompt("anything")) as response,
    ):
        await response.content.readuntil(b"content_block_delta")
        one.mute.set()
        async with client.delete(server.url + response.headers["Content-Location"]) as stopped:
            assert stopped.status == 204
        await asyncio.wait_for(one.gone.wait(), 9)  # a goodbye is waited for longer


async def test_upstream_that_thinks_and_says_no_goodbye_over_tls_is_gone_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same before its answer begins."""

    async def think(request: Request, connection: Connection) -> None:
        await connection.lost.wait()

    async with (
        raw_upstream(think, tls=server_side(monkeypatch)) as upstream,
        between(upstream) as one,
        started(one.url) as asked,
    ):
        asking = asyncio.create_task(asked.open(Question([b"{}"])))
        await eventually(lambda: bool(upstream.requests))
        one.mute.set()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(one.gone.wait(), 9)  # a goodbye is waited for longer


# --- failures after the commit are events ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "reason", "kind"),
    [
        ("status=400", "error", "invalid_request_error"),
        ("status=401", "error", "api_error"),
        ("status=429", "error", "rate_limit_error"),
        ("status=500", "error", "api_error"),
        ("status=529", "error", "overloaded_error"),
        ("status=504", "timeout", "timeout_error"),
        ("fault=html", "error", "api_error"),
        ("fault=redirect", "error", "api_error"),
        ("fault=no_events", "truncated", "truncated_error"),
        ("fault=error at=0", "error", "overloaded_error"),
        ("fault=cut at=0", "truncated", "truncated_error"),
        ("fault=cut at=0 rst=true", "truncated", "truncated_error"),
    ],
)
async def test_failure_after_the_commit_is_an_error_event_and_the_end(
    simulator: Simulator, client: aiohttp.ClientSession, script: str, reason: str, kind: str
) -> None:
    async with serving(simulator.url, first_byte_commit_s=0) as server:
        status, headers, body = await ask(client, server, f"[[{script}]]")
        assert status == 200
        assert headers["Content-Type"].startswith("text/event-stream")
        assert "Retry-After" not in headers
        [(first, error), (last, end)] = events_of(body)
        assert (first, last) == ("error", "end")
        assert error["type"] == "error"
        assert error["error"]["type"] == kind
        assert end["reason"] == reason


async def test_commit_comes_with_the_first_event_that_is_no_ping(client: aiohttp.ClientSession) -> None:
    """And not with the upstream's headers, nor with a ping."""
    go_on = asyncio.Event()

    async def slow(request: Request, connection: Connection) -> None:
        connection.send(head(), chunk(PING))
        await go_on.wait()
        connection.send(*map(chunk, ANSWER), LAST_CHUNK)

    async with raw_upstream(slow) as upstream, serving(upstream.url, first_byte_commit_s=3600) as server:
        asked = asyncio.create_task(ask(client, server))
        await eventually(lambda: any(stream.log.last_seq == 1 for stream in server.registry._table.running.values()))
        assert server.registry.readers == 1
        assert not asked.done()
        go_on.set()
        status, _, body = await asked
        assert status == 200
        assert [kind for kind, _ in events_of(body)][:2] == ["ping", "message_start"]


async def test_connection_that_fails_after_the_commit_is_an_error_event(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = asyncio.Event()

    async def resolve(_self: object, name: str, port: int = 0, **_: Any) -> list[dict[str, Any]]:
        await answered.wait()
        raise OSError(None, "no such name")

    monkeypatch.setattr(DefaultResolver, "resolve", resolve)
    async with (
        serving("http://upstream.invalid", first_byte_commit_s=0) as server,
        client.post(server.chat, json=prompt("anything")) as response,
    ):
        assert response.status == 200
        answered.set()
        [(first, error), (last, end)] = events_of(await response.text())
    assert (first, last) == ("error", "end")
    assert error["error"] == {"type": "api_error", "message": "the upstream could not be reached"}
    assert end["reason"] == "error"


async def test_upstream_that_was_never_started_is_a_bug() -> None:
    upstream = Upstream("http://127.0.0.1:1", Settings(), Anthropic(Settings()))
    with pytest.raises(AssertionError):
        await upstream.open(Question([b"{}"]))
    await upstream.close()  # idempotent


# --- what operators are told ----------------------------------------------------------------------------------------


async def logged(client: aiohttp.ClientSession, url: str, **settings: Any) -> Mapping[str, Any]:
    """What the log says of the end of a stream of that upstream."""
    async with serving(url, **settings) as server:
        with capture_logs() as lines:
            await ask(client, server)
            await eventually(lambda: any(line["event"] == "stream ended" for line in lines))
    [line] = [line for line in lines if line["event"] == "stream ended"]
    return line


async def test_refused_connection_is_logged_as_that(client: aiohttp.ClientSession) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        line = await logged(client, f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert line["upstream_error"] == "connection refused"


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n"])
async def test_closed_connection_is_logged_as_that(client: aiohttp.ClientSession, sent: bytes) -> None:
    async with raw_upstream(closing(0, sent, before=0)) as upstream:
        line = await logged(client, upstream.url)
    assert line["upstream_error"] == "connection closed before an answer"


async def test_name_that_is_not_found_is_logged_as_that(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(_self: object, name: str, port: int = 0, **_: Any) -> list[dict[str, Any]]:
        raise socket.gaierror(socket.EAI_NONAME, "secret")

    monkeypatch.setattr(DefaultResolver, "resolve", resolve)
    assert (await logged(client, "http://upstream.invalid"))["upstream_error"] == "name not found"


YESTERDAY = datetime.now(UTC) - timedelta(days=1)
TOMORROW = datetime.now(UTC) + timedelta(days=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"trusted": False}, "certificate not trusted (its authority is unknown)"),
        ({"name": "example.com"}, "certificate for another address"),
        ({"not_before": YESTERDAY - timedelta(days=9), "not_after": YESTERDAY}, "certificate expired"),
        ({"not_before": TOMORROW, "not_after": TOMORROW + timedelta(days=9)}, "certificate not yet valid"),
    ],
)
async def test_certificate_that_is_not_accepted_is_logged_with_its_fault(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str | None
) -> None:
    async with raw_upstream(answer, tls=server_side(monkeypatch, **options)) as upstream:
        assert (await logged(client, upstream.url))["upstream_error"] == words


async def test_upstream_that_speaks_no_tls_is_logged_as_that(client: aiohttp.ClientSession) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        line = await logged(client, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert line["upstream_error"] == "TLS failed: it does not speak TLS on that port"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "GZIP", "gzip, br", "made-up\t1"])
@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_compressed_stream_is_said_as_that_whatever_its_coding(
    client: aiohttp.ClientSession, coding: str, framing: str
) -> None:
    async def compress(request: Request, connection: Connection) -> None:
        body = b"\x1f\x8b garbage"
        connection.send(head("200 OK", "text/event-stream", f"Content-Encoding: {coding}", framing=framing))
        connection.send(chunk(body) + LAST_CHUNK if framing == "chunked" else body)
        if framing == "close":
            connection.fin()

    async with raw_upstream(compress) as upstream, serving(upstream.url) as server:
        with capture_logs() as lines:
            status, _, body = await ask(client, server)
    assert status == 502
    assert "compresses" in json.loads(body)["error"]["message"]
    [line] = [line for line in lines if line["event"] == "stream ended"]
    known = coding.lower() if coding.isalpha() else "a coding that is not known here"
    assert (
        line["upstream_error"]
        == f"compresses its stream ({known}) though asked not to; turn that off for event streams"
    )


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
async def test_compressed_error_is_read_where_that_is_possible(client: aiohttp.ClientSession, coding: str) -> None:
    payload = json.dumps({"error": {"message": "what is wrong"}}).encode()
    packed = {"gzip": gzip.compress(payload), "deflate": zlib.compress(payload), "br": b"garbage"}[coding]

    async def refuse(request: Request, connection: Connection) -> None:
        fields = f"Content-Encoding: {coding}"
        connection.send(head("400 No", "application/json", fields, framing=str(len(packed))), packed)

    async with raw_upstream(refuse) as upstream, serving(upstream.url) as server:
        with capture_logs() as lines:
            status, _, body = await ask(client, server)
            await eventually(lambda: any(line["event"] == "stream ended" for line in lines))
    said = "the upstream answered with status 400" if coding == "br" else "what is wrong"
    assert (status, json.loads(body)["error"]["message"]) == (400, said)
    [line] = [line for line in lines if line["event"] == "stream ended"]
    cause = "compresses what it says (br) though asked not to, so that it cannot be read" if coding == "br" else None
    assert line["upstream_error"] == cause


async def test_compressed_error_that_unpacks_to_much_is_not_unpacked(client: aiohttp.ClientSession) -> None:
    packed = gzip.compress(b" " * (64 << 20))[: 16 << 10]

    async def refuse(request: Request, connection: Connection) -> None:
        connection.send(head("400 No", "application/json", "Content-Encoding: gzip", framing=str(len(packed))), packed)

    async with raw_upstream(refuse) as upstream, serving(upstream.url) as server:
        tracemalloc.start()
        try:
            assert (await ask(client, server))[0] == 400
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("payload", "ours", "says"),
    [
        (b'{"error":{"type":"overloaded_error","message":"busy"}}', 503, "busy"),
        (b'{"error":{"message":"slow","type":"tokens","code":"rate_limit_exceeded"}}', 429, "slow"),
        (b'{"error":"model is required","code":400}', 400, "model is required"),
        (b'{"type":"message","content":[]}', 502, "something else than a stream"),
        (b"Hello!", 502, "something else than a stream"),
    ],
)
async def test_error_as_json_under_status_200_has_its_own_status(
    client: aiohttp.ClientSession, payload: bytes, ours: int, says: str
) -> None:
    async def refuse(request: Request, connection: Connection) -> None:
        fields = ("application/json", "Retry-After: 9")
        connection.send(head("200 OK", *fields, framing=str(len(payload))), payload)

    async with raw_upstream(refuse) as upstream, serving(upstream.url) as server:
        status, headers, body = await ask(client, server)
    assert status == ours
    assert says in json.loads(body)["error"]["message"]
    assert headers.get("Retry-After") == ("9" if ours in {429, 503} else None)


@pytest.mark.parametrize("status", ["200 OK", "429 Slow"])
async def test_upstreams_name_of_a_request_is_logged(client: aiohttp.ClientSession, status: str) -> None:
    async def named(request: Request, connection: Connection) -> None:
        fields = ("x-request-id: other", "request-id: req_1")
        if status.startswith("200"):
            connection.send(head(status, "text/event-stream", *fields), *map(chunk, ANSWER), LAST_CHUNK)
        else:
            connection.send(head(status, "text/plain", *fields, framing="0"))

    async with raw_upstream(named) as upstream:
        line = await logged(client, upstream.url)
    assert line["upstream_request_id"] == "req_1"
    assert line["upstream_error"] == (None if status.startswith("200") else "rate limit reached")


async def test_milliseconds_to_wait_become_seconds(client: aiohttp.ClientSession) -> None:
    _, headers, _ = await refused_with(client, "429 Slow", "retry-after-ms: 1500", "Retry-After: 9")
    assert headers["Retry-After"] == "2"
