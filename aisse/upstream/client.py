"""The HTTP client: asks one LLM API, and turns every answer that is no stream into an UpstreamError."""

from __future__ import annotations

import asyncio
import socket
import urllib.request
import zlib
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

import aisse
from aisse.errors import UpstreamError
from aisse.formats.errors import Said
from aisse.upstream.connection import Connector, Request, Sending, UpstreamResponse
from aisse.upstream.failures import refusal, request_id, said_error, said_in_success, unreachable

if TYPE_CHECKING:
    from aisse.formats.format import Format
    from aisse.settings import Settings
    from aisse.upstream.question import Question


# So much of an error's body is read at most, and for so long.
_ERROR_BODY_BYTES = 16 << 10
_ERROR_BODY_S = 5.0

# uvicorn and Node close idle connections after 5 s. Ours are kept for less, so that most are closed by us, and not by
# the upstream in the moment in which a question leaves. For the rest (gunicorn closes after 2 s, a balancer restarts)
# the connection is looked at, and the question is asked again. A shorter time would cost a quiet server a TLS handshake
# for each question.
_IDLE_S = 4.0


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
            # Not by aiohttp's trust_env: that would also send what ~/.netrc has for the host.
            self._proxy = urllib.request.getproxies().get(self._url.scheme)

    async def start(self) -> None:
        """Opens the sessions; nothing is sent yet."""
        self._session = self._open_session(keepalive_timeout=_IDLE_S)
        # A question that is asked again must not meet another connection that is about to close.
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
            connector=Connector(limit=0, socket_factory=self._socket, **options),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            # Every other limit is the registry's sweep: a timer per read would cost more than the read.
            timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_s),
            read_bufsize=16 << 10,
            # aiohttp would fail at the head if it lacks a coding's library, and nobody would know why.
            auto_decompress=False,
            request_class=Request,
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
        sending = Sending(question)
        try:
            response = await self._post(self._session, question, sending)
        except (aiohttp.ClientError, OSError):
            if not sending.met_a_close():
                raise
        else:
            # Some servers say 408 as they close an idle connection: no request has come (RFC 9110, section 15.5.9).
            if not (response.status == 408 and sending.met_a_close()):
                return response
            response.close()
        return await self._post(self._fresh, question, Sending(question))

    async def _post(self, session: aiohttp.ClientSession, question: Question, sending: Sending) -> UpstreamResponse:
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
        # Small, so that a slow reader holds the upstream back after kilobytes instead of megabytes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._settings.receive_buffer_bytes)
        return sock


def _coding(response: aiohttp.ClientResponse) -> str:
    return ", ".join(response.headers.getall("Content-Encoding", ())).strip().lower() or "identity"


async def _error_body(response: aiohttp.ClientResponse) -> bytes:
    """The beginning of an error's body, as far as it comes soon; empty where it cannot be read."""
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


# The codings of RFC 9110, section 8.4.1, and those registered since. These words may go into the log.
_CODINGS = frozenset({"br", "compress", "deflate", "gzip", "x-gzip", "x-compress", "zstd", "dcb", "dcz"})
