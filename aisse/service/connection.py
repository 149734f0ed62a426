"""One client's connection. It is aiohttp's, except for what happens when a client sends something that is no request.

aiohttp alone would answer that in plain text which quotes what was sent, and log an error for each. A handler that
waits for a body would not be told that the body is broken.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.http_parser import RawRequestMessage

from aisse.errors import error_body

if TYPE_CHECKING:
    from collections.abc import Callable

SERVER = "aisse"
"""What the header `Server` says. It says no versions of libraries: those would help whoever looks for holes."""

# Anybody can send thousands of them a second. So they are counted, and logged no more often than this.
_TELL_S = 60.0

_log = structlog.get_logger("aisse.connection")


async def server_header(_request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: says who answers."""
    response.headers[hdrs.SERVER] = SERVER


class Refusals:
    """Logs how many requests were no HTTP: the first one at once, those after it in one line, a minute later."""

    def __init__(self) -> None:
        self._untold = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self) -> None:
        """One more."""
        self._untold += 1
        if self._timer is None:
            self._tell()

    def _tell(self) -> None:
        self._timer = None
        if self._untold:
            _log.info("requests refused that are no HTTP", requests=self._untold)
            self._untold = 0
            # A timer does it, and not the next refusal: after a flood there may be none.
            self._timer = asyncio.get_running_loop().call_later(_TELL_S, self._tell)


class Connection(web.RequestHandler):
    """Made by `connections`."""

    __slots__ = ("_refusals",)

    def __init__(self, refusals: Refusals, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._refusals = refusals

    def data_received(self, data: bytes) -> None:
        """Takes what the socket gave. If that breaks a body, whoever reads the body is told at once."""
        super().data_received(data)
        if not self._messages or isinstance(self._messages[-1][0], RawRequestMessage):
            return
        # aiohttp drops such a body without a word, and its handler would wait for the rest of it.
        broken = [payload for _, payload in self._messages if not payload.is_eof()]
        if self._current_request is not None and not self._current_request.content.is_eof():
            broken.append(self._current_request.content)
        for payload in broken:
            payload.set_exception(web.RequestPayloadError("no chunk of a body"))
            payload.feed_eof()  # or aiohttp would try to read what is left of it, and fail
            self._refusals.add()
            # The request whose body it is gets an answer. No other request on this connection does.
            self.close()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Sends a response. aiohttp's own to an unknown `Expect` quotes that header, so ours takes its place."""
        if isinstance(resp, web.HTTPExpectationFailed):
            error = error_body("invalid_request_error", "nothing but 100-continue may be expected", "Expect")
            resp = web.json_response(error, status=resp.status)
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Makes our answer to what is no request. Every other error ends within the application."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        self._refusals.add()
        request._version = HttpVersion11  # noqa: SLF001 - aiohttp takes what it did not understand for HTTP/1.0
        if isinstance(exc, LineTooLong):
            status, text = 431, "a line of the request's head is too long"
        else:
            text = "this is no HTTP/1.1 request; a client or a proxy in between sends it malformed"
        response = web.json_response(error_body("invalid_request_error", text), status=status)
        response.headers[hdrs.SERVER] = SERVER
        response.force_close()
        return response


def connections(server: web.Server, options: dict[str, Any]) -> Callable[[], Connection]:
    """Makes the connections of a runner's `server`; `options` are what the runner was given."""
    refusals = Refusals()
    loop = asyncio.get_running_loop()
    own = {name: value for name, value in options.items() if name != "handler_cancellation"}  # the server's

    def connection() -> Connection:
        return Connection(refusals, server, loop=loop, **own)

    connection()  # an option that aiohttp does not know has to stop the start, and not the first connection
    return connection
