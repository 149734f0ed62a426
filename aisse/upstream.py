"""The HTTP client: one pooled session to one LLM API, its key, its errors."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.request
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

from aisse.body import Body
from aisse.errors import MESSAGE_CHARS, ConfigError, UpstreamError
from aisse.formats import error_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.connector import Connection

    from aisse.settings import Settings

ANTHROPIC_VERSION = "2023-06-01"

# Whose key goes where: the variable, and the one domain it belongs to.
PROVIDER_KEYS = (("EZAI_API_KEY", "ezaiapi.com", True), ("ANTHROPIC_API_KEY", "api.anthropic.com", False))

# An error's body is read no further than this, and no longer than that.
_ERROR_BODY_BYTES = 16 << 10
_ERROR_BODY_S = 5.0

# What keys look like, whoever's they are: an upstream's message may quote one.
_KEY_LIKE = re.compile(r"(?i)\b(?:sk|pk|key|ezai|bearer|api[_-]?key)[-_ :=]+[A-Za-z0-9._~+/-]{8,}=*|[A-Za-z0-9_-]{40,}")

# RFC 9110, section 10.2.3: seconds, or a date. Nothing else gets through to clients.
_RETRY_AFTER = re.compile(r"[0-9]{1,6}|[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")


def key_for(base_url: str, settings: Settings, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The key that may be sent to `base_url`, and where it came from; None where there is none for that host.

    `upstream_key` (by environment or credential) belongs to the configured upstream, whichever it is. A provider's
    key belongs to its domain alone, and over TLS alone. Raises ConfigError for a key that cannot be a header.
    """
    found: tuple[str, str] | None = None
    directory = environ.get("CREDENTIALS_DIRECTORY")
    url = URL(base_url)
    if settings.upstream_key is not None and settings.upstream_key.get_secret_value():
        found = settings.upstream_key.get_secret_value(), "AISSE_UPSTREAM_KEY"
    elif directory and (credential := _read_credential(directory)):
        found = credential, "credential upstream_key"
    elif url.scheme == "https":
        for variable, domain, subdomains in PROVIDER_KEYS:
            key = environ.get(variable)
            if key and _belongs(url, domain, subdomains):
                found = key, variable
                break
    if found is not None and re.fullmatch(r"[\x21-\x7e]+", found[0]) is None:
        raise ConfigError(f"{found[1]}: is no key: it has spaces, line ends or other than ASCII in it")
    return found


def _read_credential(directory: str) -> str:
    try:
        with open(f"{directory}/upstream_key", encoding="ascii") as file:  # noqa: PTH123 - systemd's path, joined as its manual does
            return file.read().strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        raise ConfigError("credential upstream_key: cannot be read") from None


def needs_key(base_url: str) -> str | None:
    """The variable whose key this host is known to ask for, or None."""
    for variable, domain, subdomains in PROVIDER_KEYS:
        if _belongs(URL(base_url), domain, subdomains):
            return variable
    return None


def _belongs(url: URL, domain: str, subdomains: bool) -> bool:
    # Whole labels only: "[2001:db8::1%25.ezaiapi.com]" and "evil.example%00.ezaiapi.com" end in the domain, too.
    labels = r"(?:[a-z0-9_-]+\.)*" if subdomains else ""
    return re.fullmatch(rf"{labels}{re.escape(domain)}\.?", (url.host or "").lower()) is not None


class UpstreamResponse(aiohttp.ClientResponse):
    """A response whose body is also given out as it comes, by `raw_body`."""

    raw_body: Body

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Puts the Body in place before the first byte of the response is read."""
        protocol = connection.protocol
        if protocol is None or protocol.should_close:
            # While it was idle something came that nobody had asked for: aiohttp would take it for this answer.
            raise aiohttp.ServerDisconnectedError
        self.raw_body = Body(connection)
        try:
            return await super().start(connection)
        except BaseException:
            self.raw_body.abort()
            raise


class Upstream:
    """Requests to one base URL. `name` is what operators are shown: the URL, or the built-in upstream's name."""

    def __init__(self, base_url: str, settings: Settings, *, key: str | None = None, name: str | None = None) -> None:
        self.name = name or base_url
        self._url = URL(base_url + "/v1/messages")
        self._settings = settings
        self._key = key
        self._session: aiohttp.ClientSession | None = None
        self._proxy: str | None = None
        if settings.proxy_from_env and not urllib.request.proxy_bypass(self._url.host or ""):
            # Not by aiohttp's trust_env, which would send what ~/.netrc has for the host, too.
            self._proxy = urllib.request.getproxies().get(self._url.scheme)

    async def start(self) -> None:
        """Opens the session; nothing is sent yet."""
        settings = self._settings
        headers = {
            "Accept": "text/event-stream",
            # A compressed stream would be held back until the compressor has enough.
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "anthropic-version": ANTHROPIC_VERSION,
        }
        if self._key is not None:
            headers["x-api-key"] = self._key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=self._socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            # Every other limit is the registry's sweep: a timer per read would cost more than the read.
            timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_s),
            read_bufsize=16 << 10,
            response_class=UpstreamResponse,
        )

    async def close(self) -> None:
        """Closes every connection. Idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def open(self, body: bytes) -> UpstreamResponse:
        """Sends one request and returns its response at its headers: 200 and an event stream.

        The caller closes the response. Raises UpstreamError for anything else; cancellation closes the connection.
        """
        assert self._session is not None
        try:
            response = await self._session.post(self._url, data=body, allow_redirects=False, proxy=self._proxy)
        except aiohttp.ConnectionTimeoutError as error:
            raise UpstreamError("timeout_error", "the upstream could not be reached in time", 504) from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError("api_error", "the upstream could not be reached") from error
        assert isinstance(response, UpstreamResponse)
        try:
            if response.status != 200:
                raise await self._refusal(response)
            if response.content_type != "text/event-stream":
                raise UpstreamError("api_error", "the upstream answered with something else than a stream")
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise UpstreamError("api_error", "the upstream compresses its stream, which it was asked not to do")
        except BaseException:
            response.close()
            raise
        return response

    def failure(self, payload: bytes) -> UpstreamError:
        """The error that an upstream's `error` event stands for, with the status a real one would have had."""
        kind, message = error_of(payload)
        return self._error(_STATUS_OF_KIND.get(kind, 500), kind, message, None)

    async def _refusal(self, response: aiohttp.ClientResponse) -> UpstreamError:
        payload = b""
        try:
            async with asyncio.timeout(_ERROR_BODY_S):
                while len(payload) < _ERROR_BODY_BYTES and (part := await response.content.readany()):
                    payload += part
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # the status alone says enough
        kind, message = error_of(payload[:_ERROR_BODY_BYTES])
        return self._error(response.status, kind, message, response.headers.get("Retry-After"))

    def _error(self, status: int, kind: str, message: str, retry_after: str | None) -> UpstreamError:
        if status in {401, 403}:
            # Our key, our fault; what the upstream says of it is not for clients.
            return UpstreamError("api_error", "the upstream did not accept this server's key", 502, None, status)
        if 300 <= status < 400:
            return UpstreamError("api_error", "the upstream redirects; set its final address", 502, None, status)
        ours = {400: 400, 413: 413, 422: 422, 429: 429, 503: 503, 504: 504, 529: 503}.get(status, 502)
        if kind not in _KINDS:  # it goes into the log, where no text of an upstream's may
            kind = "rate_limit_error" if status == 429 else "invalid_request_error" if ours < 500 else "api_error"
        if retry_after is None or _RETRY_AFTER.fullmatch(retry_after) is None:
            retry_after = None
        text = self._clean(message) or f"the upstream answered with status {status}"
        return UpstreamError(kind, text, ours, retry_after if ours in {429, 503} else None, status)

    def _clean(self, text: str) -> str:
        """An upstream's words for a client's eyes: one line, without what looks like a key, shortened."""
        if self._key is not None:
            text = text.replace(self._key, "[removed]")
        text = _KEY_LIKE.sub("[removed]", "".join(c if c.isprintable() else " " for c in text[: 8 * MESSAGE_CHARS]))
        return text if len(text) <= MESSAGE_CHARS else text[: MESSAGE_CHARS - 1] + "…"

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        family, kind, proto, _, _ = address
        sock = socket.socket(family, kind, proto)
        # Small, so that an upstream feels a slow reader after kilobytes instead of megabytes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._settings.receive_buffer_bytes)
        return sock


_STATUS_OF_KIND = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_KINDS = _STATUS_OF_KIND.keys() | {"api_error", "billing_error"}
