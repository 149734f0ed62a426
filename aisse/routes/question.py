"""A question: read from its request, checked by its format, and held against the operator's limits."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from aisse.errors import RequestError
from aisse.routes.intake import read_body
from aisse.upstream.question import Question

if TYPE_CHECKING:
    from aiohttp import web

    from aisse.formats.format import Asked, Format
    from aisse.settings import Settings
    from aisse.upstream.question import Hold


async def read_question(request: web.Request, wire_format: Format, settings: Settings, hold: Hold) -> Question:
    """The question that `request` asks. Raises RequestError, which names what is wrong and quotes no content."""
    headers = wire_format.passed_on(request.headers)
    digest = None
    if "Idempotency-Key" in request.headers:
        digest = hashlib.sha256(("\n".join(headers.values()) + "\n").encode())
    body = await read_body(request, settings, hold, digest)
    asked = await wire_format.ask(body)
    _check_limits(asked, settings)
    return Question(asked.pieces, headers, digest.digest() if digest is not None else b"", hold)


def _check_limits(asked: Asked, settings: Settings) -> None:
    if settings.models and asked.model not in settings.models:
        raise RequestError(400, "invalid_request_error", "this model is not offered here", "model")
    if asked.most_tokens > settings.max_tokens_limit:
        message = f"must be at most {settings.max_tokens_limit}"
        raise RequestError(400, "invalid_request_error", message, asked.most_tokens_field)
