"""The HTTP client: one pooled session to one LLM API, its key, its errors."""

from __future__ import annotations

import asyncio
import re
import select
import socket
import urllib.request
import zlib
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

import aisse
from aisse.errors import ConfigError, UpstreamError
from aisse.formats.errors import Said
from aisse.upstream.body import Body
from aisse.upstream.failures import refusal, request_id, said_error, said_in_success, unreachable
from aisse.upstream.question import Pieces, Question

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection

    from aisse.formats.format import Format
    from aisse.settings import Settings

# Whose key goes where: the variable, and the one domain it belongs to.
PROVIDER_KEYS = (("EZAI_API_KEY", "ezaiapi.com", True), ("ANTHROPIC_API_KEY", "api.anthropic.com", False))

# An error's body is read no further than this, and no longer than that.
_ERROR_BODY_BYTES = 16 << 10
_ERROR_BODY_S = 5.0

# Idle connections are kept for less than the 5 s after which uvicorn and Node close theirs, so that most are closed by
# us and not in the moment in which a question leaves. Looking at the connection and asking again are for the rest (2 s
# of gunicorn, a balancer that restarts): to keep them shorter would cost a quiet server a TLS handshake a question.
_IDLE_S = 4.0

# A request that got no answer within this, on a connection that had been idle, met the close of it: what the upstream
# would have read of it before closing, it would have answered. Later it may have been generated, and billed.
_CLOSING_S = 1.0

# Of no more than this, what was written is with the kernel as good as at once.
_AT_ONCE_BYTES = 64 << 10


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


class _Sending(Pieces):
    """A question on its way, and what becomes of it: whether it may be sent again."""

    def __init__(self, question: Question) -> None:
        super().__init__(question.pieces)
        self._sent: float | None = None
        self.reused = False
        """Whether its connection had carried an answer before."""
        self.answered = False
        """Whether a byte of an answer has come, an interim one's included: the upstream has read the request then."""

    def met_a_close(self) -> bool:
        """Whether an idle connection closed before the request had got through, now that it has failed."""
        if not self.reused or self.answered:
            return False
        return self._sent is None or asyncio.get_running_loop().time() - self._sent <= _CLOSING_S

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Writes it to the connection, and notes when it has left."""
        await super().write(writer)
        assert self._size is not None
        if self._size > _AT_ONCE_BYTES:
            await _written(writer)
        self._sent = asyncio.get_running_loop().time()


async def _written(writer: AbstractStreamWriter) -> None:
    """Returns once the kernel has everything that was written, or the connection is lost."""
    transport = writer.transport
    if transport is None:
        return
    # Not 0: over TLS a connection with nothing to write would count as full.
    transport.set_write_buffer_limits(high=1, low=0)
    try:
        await writer.drain()
    finally:
        transport.set_write_buffer_limits()


class _Request(aiohttp.ClientRequest):
    """A request whose body knows what connection it goes out on."""

    fresh = False

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Begins to send it."""
        sending = self.body
        assert isinstance(sending, _Sending)
        sending.reused = not self.fresh
        response = await super().send(conn)
        assert isinstance(response, UpstreamResponse)
        response.sending = sending
        return response


class _Connector(aiohttp.TCPConnector):
    """Connections that are looked at before they are used again, and requests that know whether theirs is fresh."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._poll = select.poll()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's
    ) -> Connection:
        """A connection that is open as far as this machine knows now."""
        while True:
            connection = await super().connect(req, traces, timeout)
            if getattr(req, "fresh", True) or self._is_idle(connection.protocol):
                return connection
            connection.close()

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's
    ) -> ResponseHandler:
        if isinstance(req, _Request):
            req.fresh = True
        return await super()._create_connection(req, traces, timeout)

    def _is_idle(self, protocol: ResponseHandler | None) -> bool:
        """Whether nothing has come: to a connection without a question, that is its end, or an answer to none."""
        if protocol is None or protocol.transport is None or protocol.should_close:
            return False
        descriptor = protocol.transport.get_extra_info("socket").fileno()
        if descriptor < 0:
            return False
        # The loop has not looked since it last slept, and has had a hundred questions to see to meanwhile.
        self._poll.register(descriptor, select.POLLIN)
        try:
            return not self._poll.poll(0)
        finally:
            self._poll.unregister(descriptor)


class UpstreamResponse(aiohttp.ClientResponse):
    """A response whose body is also given out as it comes, by `raw_body`."""

    raw_body: Body
    sending: _Sending | None = None
    request_id: str | None = None

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Puts the Body in place before the first byte of the response is read."""
        # Not kept: the answer may go on for an hour, and the question be large.
        sending, self.sending = self.sending, None
        protocol = connection.protocol
        if protocol is None or protocol.should_close:
            # Something came that nobody had asked for: aiohttp would take it for this answer.
            raise aiohttp.ServerDisconnectedError
        self.raw_body = Body(connection)
        try:
            return await super().start(connection)
        except BaseException:
            if sending is not None:
                sending.answered = self.raw_body.begun
            self.raw_body.abort()
            raise


class Upstream:
    """Requests to one base URL, which speaks `wire_format`.

    `name` is what operators are shown: the URL, or the built-in upstream's name.
    """

    def __init__(
        self, base_url: str, settings: Settings, wire_format: Format, *, key: str | None = None, name: str | None = None
    ) -> None:
        self.name = name or base_url
        self.format = wire_format
        url = URL(base_url)
        self._url = url.with_path(wire_format.endpoint(url.raw_path), encoded=True)
        self._settings = settings
        self._key = key
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None
        self._proxy: str | None = None
        if settings.proxy_from_env and not urllib.request.proxy_bypass(self._url.host or ""):
            # Not by aiohttp's trust_env, which would send what ~/.netrc has for the host, too.
            self._proxy = urllib.request.getproxies().get(self._url.scheme)

    async def start(self) -> None:
        """Opens the sessions; nothing is sent yet."""
        self._session = self._open_session(keepalive_timeout=_IDLE_S)
        # What is asked again must not meet another connection that is about to close.
        self._fresh = self._open_session(force_close=True)

    def _open_session(self, **options: Any) -> aiohttp.ClientSession:
        settings = self._settings
        headers = {
            "Accept": "text/event-stream",
            # A compressed stream would be held back until the compressor has enough.
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": f"aisse/{aisse.__version__}",
            **self.format.headers(self._key),
        }
        return aiohttp.ClientSession(
            connector=_Connector(limit=0, socket_factory=self._socket, **options),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            # Every other limit is the registry's sweep: a timer per read would cost more than the read.
            timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_s),
            read_bufsize=16 << 10,
            # aiohttp fails at the head where it lacks a coding's library, and then nobody knows why.
            auto_decompress=False,
            request_class=_Request,
            response_class=UpstreamResponse,
        )

    async def close(self) -> None:
        """Closes every connection. Idempotent."""
        for session in (self._session, self._fresh):
            if session is not None:
                await session.close()
        self._session = self._fresh = None

    async def open(self, question: Question) -> UpstreamResponse:
        """Sends one request and returns its response at its headers: 200 and an event stream.

        A request that met the close of an idle connection (RFC 9112, section 9.3.1) is sent once more, at once, on a
        connection of its own. The caller closes the response. Raises UpstreamError for anything else; cancellation
        closes the connection.
        """
        try:
            response = await self._ask(question)
        except aiohttp.ConnectionTimeoutError as error:
            raise UpstreamError(
                "timeout_error", "the upstream could not be reached in time", 504, cause=unreachable(error)
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError("api_error", "the upstream could not be reached", cause=unreachable(error)) from error
        try:
            response.request_id = request_id(response.headers, self._key)
            if (refused := await self._refusal(response)) is not None:
                refused.request_id = response.request_id
                raise refused
        except BaseException:
            response.close()
            raise
        return response

    async def _ask(self, question: Question) -> UpstreamResponse:
        assert self._session is not None
        assert self._fresh is not None
        sending = _Sending(question)
        try:
            response = await self._post(self._session, question, sending)
        except (aiohttp.ClientError, OSError):
            if not sending.met_a_close():
                raise
        else:
            # What some servers say as they close an idle connection, RFC 9110, section 15.5.9: no request has come.
            if not (response.status == 408 and sending.met_a_close()):
                return response
            response.close()
        return await self._post(self._fresh, question, _Sending(question))

    async def _post(self, session: aiohttp.ClientSession, question: Question, sending: _Sending) -> UpstreamResponse:
        response = await session.post(
            self._url, data=sending, headers=question.headers, allow_redirects=False, proxy=self._proxy
        )
        assert isinstance(response, UpstreamResponse)
        return response

    def failure(self, payload: bytes) -> UpstreamError:
        """The error that an upstream's `error` event stands for, with the status a real one would have had."""
        return said_error(self.format.read_error(payload), self._key)

    async def _refusal(self, response: UpstreamResponse) -> UpstreamError | None:
        """Why a response is no stream to relay; None if it is one."""
        coding = _coding(response)
        known = coding if coding in _CODINGS else "a coding that is not known here"
        if response.status != 200 or response.content_type != "text/event-stream":
            payload = await _error_body(response)
            if response.status != 200:
                error = refusal(response.status, response.headers, self.format.read_error(payload), self._key)
            else:
                # An answer in plain text is no error only because it is one.
                said = self.format.read_error(payload) if payload.lstrip()[:1] in {b"{", b"["} else Said()
                error = said_in_success(response.headers, said, self._key)
            if coding != "identity" and not payload:
                error.cause = f"compresses what it says ({known}) though asked not to, so that it cannot be read"
            return error
        if coding != "identity":
            return UpstreamError(
                "api_error",
                "the upstream compresses its stream, which it was asked not to do",
                upstream_status=200,
                cause=f"compresses its stream ({known}) though asked not to; turn that off for event streams",
            )
        return None

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        family, kind, proto, _, _ = address
        sock = socket.socket(family, kind, proto)
        # Small, so that an upstream feels a slow reader after kilobytes instead of megabytes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._settings.receive_buffer_bytes)
        return sock


def _coding(response: aiohttp.ClientResponse) -> str:
    return ", ".join(response.headers.getall("Content-Encoding", ())).strip().lower() or "identity"


async def _error_body(response: aiohttp.ClientResponse) -> bytes:
    """What an error says, as far as it comes soon and is short; empty where it cannot be read."""
    payload = b""
    try:
        async with asyncio.timeout(_ERROR_BODY_S):
            while len(payload) < _ERROR_BODY_BYTES and (part := await response.content.readany()):
                payload += part
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass  # what has come, or the status alone, says enough
    payload = payload[:_ERROR_BODY_BYTES]
    match _coding(response):
        case "identity":
            return payload
        case "gzip" | "x-gzip" | "deflate":
            try:
                return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(payload, _ERROR_BODY_BYTES)
            except zlib.error:
                return b""
        case _:
            return b""


# RFC 9110, section 8.4.1, and what has been registered since: these words may go into the log.
_CODINGS = frozenset({"br", "compress", "deflate", "gzip", "x-gzip", "x-compress", "zstd", "dcb", "dcz"})
