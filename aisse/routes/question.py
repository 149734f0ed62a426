"""What a client may ask: the body of `POST /api/chat`, checked, and what the upstream is asked for it."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from aiohttp import hdrs, web
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
)
from pydantic_core import from_json

from aisse.errors import RequestError
from aisse.settings import MODEL_NAME

if TYPE_CHECKING:
    from aisse.settings import Settings


def _only_true(value: bool) -> bool:
    if not value:
        raise ValueError("must be true, or absent")
    return value


# Lists fail at their first wrong item: an error for each of half a million would stop every stream for seconds.
Block = dict[str, JsonValue]
Text = Annotated[str, Field(min_length=1)]
Blocks = Annotated[list[Block], Field(min_length=1, max_length=10_000, fail_fast=True)]
# Told apart before they are checked, so that the error is about what was meant.
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Blocks, Tag("blocks")],
    Discriminator(lambda value: "blocks" if isinstance(value, list) else "text"),
]


class Message(BaseModel):
    """One turn: text, or blocks as the upstream's API has them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["user", "assistant"]
    content: Content


class ChatRequest(BaseModel):
    """What a client may ask: the parameters of the Anthropic Messages API that make sense for a browser.

    It checks; what is sent on is the document itself. A field that is null counts as absent.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    model: Annotated[str, Field(pattern=f"^{MODEL_NAME}$")] = Field(default="")
    max_tokens: Annotated[int, Field(ge=1)] = Field(default=1)
    system: Content = Field(default="")
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = Field(default=0)
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(default=0)
    top_k: Annotated[int, Field(ge=0)] = Field(default=0)
    stop_sequences: Annotated[list[str], Field(max_length=1_000, fail_fast=True)] = Field(default_factory=list)
    thinking: Block = Field(default_factory=dict)
    tools: Annotated[list[Block], Field(max_length=1_000, fail_fast=True)] = Field(default_factory=list)
    tool_choice: Block = Field(default_factory=dict)
    metadata: Block = Field(default_factory=dict)
    stream: Annotated[bool, AfterValidator(_only_true)] = Field(default=True)


def upstream_body(body: bytes, settings: Settings) -> bytes:
    """The upstream's request for a client's: checked, with defaults. Raises RequestError (400) that names the field."""
    try:
        document = from_json(body)
    except ValueError as error:
        # The parser's text says where it broke, in line and column, and quotes nothing.
        raise RequestError(400, "invalid_request_error", f"Invalid JSON: {error}", "body") from None
    if isinstance(document, dict):
        document = {name: value for name, value in document.items() if value is not None}
        _refuse_unknown_fields(document)
    try:
        ChatRequest.model_validate(document)
    except ValidationError as error:
        raise _invalid(error) from None
    question = {"model": settings.model, "max_tokens": settings.max_tokens} | document | {"stream": True}
    if settings.models and question["model"] not in settings.models:
        raise RequestError(400, "invalid_request_error", "this model is not offered here", "model")
    if question["max_tokens"] > settings.max_tokens_limit:
        raise RequestError(400, "invalid_request_error", f"must be at most {settings.max_tokens_limit}", "max_tokens")
    try:
        return json.dumps(question, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        # NaN, Infinity and 1e400 are no JSON, but pass the parser.
        field = _infinite_at(question, "") or "body"
        raise RequestError(400, "invalid_request_error", "numbers in it must be finite", field) from None


_FIELDS = ChatRequest.model_fields.keys() | Message.model_fields.keys()


def _refuse_unknown_fields(document: dict[str, Any]) -> None:
    """Ahead of the models, which would collect an error for each of a hundred thousand."""
    messages = document.get("messages")
    found = next((name for name in document if name not in ChatRequest.model_fields), None)
    if found is None and isinstance(messages, list):
        found = next(
            (
                f"messages.{index}.{name}"
                for index, message in enumerate(messages)
                if isinstance(message, dict)
                for name in message
                if name not in Message.model_fields
            ),
            None,
        )
    if found is not None:
        # It is the client's own text: enough of it to be found, no more.
        raise RequestError(400, "invalid_request_error", "Extra inputs are not permitted", found[:128] or "body")


def _infinite_at(value: Any, path: str) -> str | None:
    """The path of the first number in `value` that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return path[:128]
    if isinstance(value, dict):
        inner = iter(value.items())
    elif isinstance(value, list):
        inner = iter(enumerate(value))
    else:
        return None
    paths = (_infinite_at(item, f"{path}.{name}" if path else str(name)) for name, item in inner)
    return next((found for found in paths if found is not None), None)


def _invalid(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # What is no field and no index is pydantic's name for a branch of Content.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or part in _FIELDS]
    field = ".".join(path) or "body"
    return RequestError(400, "invalid_request_error", first["msg"].removeprefix("Value error, "), field)


async def read_body(request: web.Request, settings: Settings) -> bytes:
    """The whole body, before anything is answered: an unread one would hide that the client has left."""
    if request.content_type != "application/json":
        raise RequestError(415, "invalid_request_error", "must be application/json", "Content-Type")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise RequestError(415, "invalid_request_error", "compressed bodies are not taken", "Content-Encoding")
    too_large = RequestError(413, "request_too_large", f"must be at most {settings.max_body_bytes} bytes", "body")
    if request.content_length is not None and request.content_length > settings.max_body_bytes:
        raise too_large
    try:
        async with asyncio.timeout(settings.body_s):
            # Not by request.read(), which keeps the body for as long as the connection lives.
            body = bytearray()
            async for part in request.content.iter_any():
                body += part
                if len(body) > settings.max_body_bytes:
                    raise too_large
            return bytes(body)
    except TimeoutError:
        raise RequestError(408, "timeout_error", f"did not arrive within {settings.body_s:g} seconds", "body") from None
    except web.RequestPayloadError:
        raise RequestError(400, "invalid_request_error", "broke off or was malformed", "body") from None
