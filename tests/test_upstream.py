"""The upstream side: whose key goes where, what is sent, and what becomes of what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp.resolver import DefaultResolver
from conftest import Server, eventually, prompt, serving
from pydantic import SecretStr
from rawupstream import (
    LAST_CHUNK,
    MESSAGE_STOP,
    PING,
    Connection,
    RawUpstream,
    Request,
    chunk,
    delta,
    event,
    head,
    message_delta,
    message_start,
    raw_upstream,
)

from aisse.errors import ConfigError
from aisse.settings import Settings
from aisse.upstream import Upstream, key_for, needs_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    import aiohttp

    from aisse.simulator import Simulator

EZAI, ANTHROPIC, OWN, CREDENTIAL = "ez-key-1f2e3d", "sk-ant-key-4c5b6a", "own-key-7a8b9c", "cred-key-0d1e2f"
PROVIDERS = {"EZAI_API_KEY": EZAI, "ANTHROPIC_API_KEY": ANTHROPIC}

ANSWER = [message_start(), delta("Hello"), message_delta(), MESSAGE_STOP]


async def answer(request: Request, connection: Connection) -> None:
    connection.send(head(), *map(chunk, ANSWER), LAST_CHUNK)


async def ask(
    client: aiohttp.ClientSession, server: Server, text: str = "anything"
) -> tuple[int, Mapping[str, str], str]:
    async with asyncio.timeout(20), client.post(server.chat, json=prompt(text)) as response:
        return response.status, response.headers, await response.text()


def events_of(body: str) -> list[tuple[str, dict[str, Any]]]:
    return [(kind, json.loads(data)) for kind, data in re.findall(r"^event: (.*)\ndata: (.*)\n", body, re.MULTILINE)]


# --- whose key goes where -------------------------------------------------------------------------------------

THEIR_HOSTS = [
    ("https://ezaiapi.com", "EZAI_API_KEY"),
    ("https://api.ezaiapi.com", "EZAI_API_KEY"),
    ("https://a.b-c.ezaiapi.com:8443/base", "EZAI_API_KEY"),
    ("https://API.EzaiAPI.Com", "EZAI_API_KEY"),
    ("HTTPS://api.ezaiapi.com", "EZAI_API_KEY"),
    ("https://api.ezaiapi.com.", "EZAI_API_KEY"),
    ("https://api.anthropic.com", "ANTHROPIC_API_KEY"),
    ("https://api.anthropic.com:443/base", "ANTHROPIC_API_KEY"),
    ("https://API.ANTHROPIC.COM", "ANTHROPIC_API_KEY"),
    ("https://api.anthropic.com.", "ANTHROPIC_API_KEY"),
]

OTHER_HOSTS = [
    # look-alikes
    "https://ezaiapi.com.evil.example",
    "https://api.ezaiapi.com.evil.example",
    "https://evilezaiapi.com",
    "https://api-ezaiapi.com",
    "https://ezaiapi.co",
    "https://ezaiapi.comm",
    "https://ezaiapi.example",
    "https://api.anthropic.com.evil",
    "https://evilapi.anthropic.com",
    "https://x.api.anthropic.com",
    "https://anthropic.com",
    "https://console.anthropic.com",
    "https://api.anthropic.co",
    "https://ezai\u0430pi.com",  # a Cyrillic letter
    "https://api.\u0430nthropic.com",
    # the domain is somewhere, but is not the host
    "https://api.anthropic.com@evil.example",
    "https://api.anthropic.com:443@evil.example",
    "https://ezaiapi.com:x@evil.example/",
    "https://evil.example/.ezaiapi.com",
    "https://evil.example/@api.anthropic.com",
    "https://evil.example?.ezaiapi.com",
    "https://evil.example#@api.anthropic.com",
    "https://evil.example:443#.ezaiapi.com",
    # what ends like the domain, and is no host name: a resolver would stop earlier
    "https://[::1%25.ezaiapi.com]",
    "https://[2001:db8::1%25.ezaiapi.com]",
    "https://evil.example\x00.ezaiapi.com",
    "https://evil.example%00.ezaiapi.com",
    "https://evil.example%2F.ezaiapi.com",
    "https://evil.example .ezaiapi.com",
    "https://evil.example;.ezaiapi.com",
    "https://.ezaiapi.com",
    # in the open
    "http://ezaiapi.com",
    "http://api.ezaiapi.com",
    "http://api.ezaiapi.com:443",
    "http://api.anthropic.com",
    # addresses, and this machine
    "https://127.0.0.1",
    "http://127.0.0.1:3000",
    "https://93.184.216.34",
    "https://[::1]",
    "https://[2001:db8::1]:8443",
    "https://[::ffff:127.0.0.1]",
    "https://localhost",
    "https://ezaiapi.com.localhost",
    # no such thing
    "wss://api.ezaiapi.com",
    "ftp://api.anthropic.com",
    "//api.ezaiapi.com",
    "https:///api.ezaiapi.com",
    "api.ezaiapi.com",
]


@pytest.mark.parametrize(("url", "variable"), THEIR_HOSTS)
def test_provider_key_goes_to_its_own_domain(url: str, variable: str) -> None:
    assert key_for(url, Settings(), PROVIDERS) == (PROVIDERS[variable], variable)
    assert key_for(url, Settings(), {variable: "k"}) == ("k", variable)
    assert needs_key(url) == variable


@pytest.mark.parametrize(("url", "variable"), THEIR_HOSTS)
def test_provider_key_of_another_is_not_taken_instead(url: str, variable: str) -> None:
    others = {name: key for name, key in PROVIDERS.items() if name != variable}
    assert key_for(url, Settings(), others) is None


@pytest.mark.parametrize("url", OTHER_HOSTS)
def test_provider_key_goes_to_no_other_host(url: str) -> None:
    assert key_for(url, Settings(), PROVIDERS) is None


@pytest.mark.parametrize(
    "url", ["https://api.ezaiapi.com", "https://api.anthropic.com", "http://127.0.0.1:1", "https://evil.example"]
)
def test_upstream_key_goes_to_the_configured_upstream_before_any_other(url: str, tmp_path: Path) -> None:
    (tmp_path / "upstream_key").write_text(CREDENTIAL)
    environ = PROVIDERS | {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert key_for(url, Settings(upstream_key=SecretStr(OWN)), environ) == (OWN, "AISSE_UPSTREAM_KEY")
    assert key_for(url, Settings(), environ) == (CREDENTIAL, "credential upstream_key")


def test_empty_key_is_none(tmp_path: Path) -> None:
    (tmp_path / "upstream_key").write_text("\n")
    environ = {"EZAI_API_KEY": "", "ANTHROPIC_API_KEY": "", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    settings = Settings(upstream_key=SecretStr(""))
    for url in ("https://api.ezaiapi.com", "https://api.anthropic.com", "https://other.example"):
        assert key_for(url, settings, environ) is None
    assert key_for("https://api.ezaiapi.com", settings, environ | PROVIDERS) == (EZAI, "EZAI_API_KEY")


def test_directory_without_the_credential_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "another_key").write_text(CREDENTIAL)
    assert key_for("https://other.example", Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path)}) is None
    assert key_for("https://other.example", Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path / "gone")}) is None


def test_line_end_of_the_credentials_file_is_not_part_of_the_key(tmp_path: Path) -> None:
    (tmp_path / "upstream_key").write_text(CREDENTIAL + "\r\n")
    found = key_for("https://other.example", Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert found == (CREDENTIAL, "credential upstream_key")


MALFORMED = [
    "sec ret",
    "sec\tret",
    "secret\nx",
    "secret\r\nx-evil: 1",
    "s\u00e9cret",
    "\u2028secret",
    "secret\x00x",
    "secret\x7f",
]


@pytest.mark.parametrize("key", [*MALFORMED, "secret\n", " secret"])
@pytest.mark.parametrize("source", ["EZAI_API_KEY", "AISSE_UPSTREAM_KEY"])
def test_key_that_cannot_be_a_header_is_refused_without_being_quoted(key: str, source: str) -> None:
    own = SecretStr(key) if source == "AISSE_UPSTREAM_KEY" else None
    assert_refused(Settings(upstream_key=own), {} if own else {source: key}, source)


@pytest.mark.parametrize("key", MALFORMED)
def test_credential_that_cannot_be_a_header_is_refused_without_being_quoted(key: str, tmp_path: Path) -> None:
    (tmp_path / "upstream_key").write_bytes(key.encode())
    assert_refused(Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path)}, "credential upstream_key")


def assert_refused(settings: Settings, environ: Mapping[str, str], source: str) -> None:
    with pytest.raises(ConfigError) as refused:
        key_for("https://api.ezaiapi.com", settings, environ)
    message = str(refused.value)
    assert message.startswith(f"{source}: ")
    assert not any(part in message for part in ("sec", "ret", "evil", "\n"))
    assert refused.value.__cause__ is None


def test_credential_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "upstream_key").mkdir()
    with pytest.raises(ConfigError, match="credential upstream_key"):
        key_for("https://api.ezaiapi.com", Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_settings_show_no_key() -> None:
    settings = Settings(upstream_key=SecretStr(OWN))
    assert OWN not in repr(settings)
    assert OWN not in str(settings.model_dump())
    assert OWN not in settings.model_dump_json()


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
        "Anthropic-Beta": "everything",
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
        assert "browser" not in sent.pop("user-agent")
        assert sent == {
            "accept": "text/event-stream",
            "accept-encoding": "identity",
            "anthropic-version": "2023-06-01",
            "content-type": "application/json",
            "x-api-key": OWN,
        }
        assert json.loads(request.body)["stream"] is True


async def test_base_url_with_a_path_keeps_it(client: aiohttp.ClientSession) -> None:
    async with raw_upstream(answer) as upstream, serving(upstream.url + "/team/a") as server:
        await ask(client, server)
        assert upstream.requests[0].line == "POST /team/a/v1/messages HTTP/1.1"


async def test_cookies_are_not_kept(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    async with serving(simulator.url) as server:
        for _ in range(3):
            status, headers, _ = await ask(client, server, "[[cookie='session=private; Path=/' tokens=1]]")
            assert status == 200
            assert "Set-Cookie" not in headers
        assert simulator.stats.requests == 3
        assert simulator.stats.cookied == 0


# --- failures before the commit are real statuses -------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "kind"),
    [
        (400, 400, "invalid_request_error"),
        (413, 413, "request_too_large"),
        (422, 422, "invalid_request_error"),
        (401, 502, "api_error"),
        (403, 502, "api_error"),
        (402, 502, "billing_error"),
        (404, 502, "not_found_error"),
        (405, 502, "invalid_request_error"),
        (408, 502, "invalid_request_error"),
        (429, 429, "rate_limit_error"),
        (500, 502, "api_error"),
        (501, 502, "api_error"),
        (502, 502, "api_error"),
        (503, 503, "api_error"),
        (504, 504, "timeout_error"),
        (520, 502, "api_error"),
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
    said = "the upstream did not accept this server's key" if theirs in {401, 403} else "what is wrong"
    assert error["error"]["message"] == said
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
        ("not_found_error", 502),
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
    hidden = kind in {"authentication_error", "permission_error"}
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
    monkeypatch.setattr("aisse.registry.SWEEP_S", 0.02)
    async with serving(simulator.url, first_byte_s=0.2, first_byte_commit_s=60) as server:
        status, _, body = await ask(client, server, f"[[{script}]]")
        assert status == 504
        assert json.loads(body)["error"]["type"] == "timeout_error"
        await eventually(lambda: simulator.stats.active == 0)  # and it is told so


async def test_error_body_that_never_ends_delays_the_status_no_longer_than_its_limit(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aisse.upstream._ERROR_BODY_S", 0.1)

    async def trickle(request: Request, connection: Connection) -> None:
        connection.send(head("400 Bad Request", "application/json"), chunk(b'{"type":"error",'))
        await connection.lost.wait()

    async with raw_upstream(trickle) as upstream, serving(upstream.url) as server:
        status, _, body = await ask(client, server)
        assert status == 400
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        await asyncio.wait_for(upstream.connections[0].lost.wait(), 5)


async def test_error_body_without_end_is_not_read_to_it(client: aiohttp.ClientSession) -> None:
    async def flood(request: Request, connection: Connection) -> None:
        connection.send(head("500 Oops", "text/plain"))
        while not connection.lost.is_set():
            connection.send(chunk(b"x" * 10_000))
            await connection.drain()
            await asyncio.sleep(0)

    async with raw_upstream(flood) as upstream, serving(upstream.url) as server:
        assert (await ask(client, server))[0] == 502
        await asyncio.wait_for(upstream.connections[0].lost.wait(), 5)


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
        await eventually(lambda: any(stream.log.last_seq == 1 for stream in server.registry._running.values()))
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
    upstream = Upstream("http://127.0.0.1:1", Settings())
    with pytest.raises(AssertionError):
        await upstream.open(b"{}")
    await upstream.close()  # idempotent
