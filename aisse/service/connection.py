"""One client's connection: aiohttp's, but for what aiohttp would say by itself to what is no request.

It answers that as plain text that quotes what was sent, logs an error for each, and tells a handler that waits for a
body nothing of what has broken it.
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

# Anybody can send thousands a second: they are counted, and told at most so often.
_TELL_S = 60.0

_log = structlog.get_logger("aisse.connection")


async def server_header(_request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: says who answers."""
    response.headers[hdrs.SERVER] = SERVER


class Refusals:
    """Logs the number of requests that are none: the first at once, those that follow a minute later in one line."""

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
            # By a timer, and not when the next one comes: after a flood none may.
            self._timer = asyncio.get_running_loop().call_later(_TELL_S, self._tell)


class Connection(web.RequestHandler):
    """Made by `connections`."""

    __slots__ = ("_refusals",)

    def __init__(self, refusals: Refusals, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._refusals = refusals

    def data_received(self, data: bytes) -> None:
        """What the socket gave. A body that it breaks is broken for whoever reads it, at once."""
        super().data_received(data)
        if not self._messages or isinstance(self._messages[-1][0], RawRequestMessage):
            return
        # aiohttp drops the body without a word: its handler would wait for the rest of it.
        broken = [payload for _, payload in self._messages if not payload.is_eof()]
        if self._current_request is not None and not self._current_request.content.is_eof():
            broken.append(self._current_request.content)
        for payload in broken:
            payload.set_exception(web.RequestPayloadError("no chunk of a body"))
            payload.feed_eof()  # or aiohttp would go on to read it away, and fail of that
            self._refusals.add()
            # One answer, to the request whose body it is, and then no other.
            self.close()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Sends a response; in place of aiohttp's to an `Expect` that it does not know, which quotes that, ours."""
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
        """Our answer to what is no request. Everything else ends within the application."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        self._refusals.add()
        request._version = HttpVersion11  # noqa: SLF001 - of what was not understood aiohttp takes HTTP/1.0 for it
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

    connection()  # an option that aiohttp does not know stops the start, and not the first connection
    return connection
