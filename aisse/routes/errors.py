"""Failures as clients see them: every one becomes JSON in the one shape of errors, or cuts its response off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from aiohttp import hdrs, web

from aisse.errors import DrainingError, RequestError, StreamError, error_body

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

# Users filter their logs by this name. It stays, wherever the module is.
_log = structlog.get_logger("aisse.app")


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers a failure before the response has begun. A failure after that cuts the response off."""
    try:
        return await handler(request)
    except Exception as error:
        if request.writer.output_size == 0:
            response = _answer_to(error, request.method)
            if request.content.exception() is not None:
                response.force_close()  # what follows the body is not understood
            return response
        # The client would take an answer for more of the body.
        if not isinstance(error, ConnectionError):
            _log.error("request failed after its response had begun", method=request.method, exc_info=error)
        # The error is not raised further: aiohttp would log it once more. The response that is returned goes nowhere.
        request.protocol.force_close()
        return web.Response()


def _answer_to(error: Exception, method: str) -> web.Response:
    match error:
        case RequestError():
            return _refusal(error)
        case StreamError():
            response = web.json_response(error.body(), status=error.status)
            if error.retry_after is not None:
                response.headers[hdrs.RETRY_AFTER] = error.retry_after
        case web.HTTPException():
            kind = "not_found_error" if error.status == 404 else "invalid_request_error"
            response = web.json_response(error_body(kind, error.reason), status=error.status)
            if hdrs.ALLOW in error.headers:
                response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        case _:
            _log.error("request failed", method=method, exc_info=error)
            response = web.json_response(error_body("api_error", "this request failed inside the server"), status=500)
    return response


def _refusal(error: RequestError) -> web.Response:
    response = web.json_response(error.body(), status=error.status)
    if error.status == 401:
        response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    if error.retry_after_s is not None:
        response.headers[hdrs.RETRY_AFTER] = str(error.retry_after_s)
    if error.status == 408:
        response.force_close()
    if isinstance(error, DrainingError):
        # `Connection: close` does not tell a proxy that nothing was started: every answer of a drain has it.
        response.headers["Aisse-Draining"] = "1"
    return response
