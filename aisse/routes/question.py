"""What a client may ask: the body of `POST /api/chat`, checked, and what the upstream is asked for it.

Nothing that is passed on becomes Python objects, which would take a hundred times as long: msgspec finds where each
value begins and ends (`Raw`), and the bytes between go out as they came. It passes over every byte of them, so that
what is no JSON is refused, and no value can close the object that is built around it. That they are UTF-8 it does not
look at: `intake` does.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw
from msgspec.json import Decoder

from aisse.errors import RequestError
from aisse.routes.intake import read_body
from aisse.settings import MODEL_NAME
from aisse.upstream.question import Question

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from aisse.settings import Settings
    from aisse.upstream.question import Hold

_MESSAGES = 10_000
_BLOCKS = 10_000
_TOOLS = 1_000
_STOP_SEQUENCES = 1_000

# What is no longer than this is sent in one piece, and checked without letting others run in between.
_SMALL_BYTES = 64 << 10

# What checking a message takes beside its bytes, in bytes that could be parsed meanwhile.
_MESSAGE_BYTES = 100

_MOMENT_S = 0.001

# A name or a number that is longer is not what it should be, and is not decoded to find out.
_SCALAR_BYTES = 1024

# What a value of `anthropic-beta` looks like; other text is not repeated.
_BETA = re.compile(r"[A-Za-z0-9._-]{1,128}")

# What kind of value it is shows in its first byte; whether it is whole was seen before.
_STARTS = {"an object": ord("{"), "a list": ord("["), "a string": ord('"')}
_NULL = ord("n")
_TRUE = ord("t")

_ABSENT = Raw(b"")

Scalar = TypeVar("Scalar")


class _Message(msgspec.Struct, forbid_unknown_fields=True, frozen=True, gc=False):
    role: Raw = _ABSENT
    content: Raw = _ABSENT


_MESSAGE_LIST = Decoder(list[_Message])
_LIST = Decoder(list[Raw])
_ROLE = Decoder(Literal["user", "assistant"])
_TEXT = Decoder(str)
_COUNT = Decoder(Annotated[int, Meta(ge=0)])
_FROM_0_TO_1 = Decoder(Annotated[float, Meta(ge=0, le=1)])
_FROM_0_TO_2 = Decoder(Annotated[float, Meta(ge=0, le=2)])


class Asking:
    """Reads and checks questions. `allow_fields` and `allow_betas` open what is closed without them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        opened = [name for name in dict.fromkeys(settings.allow_fields) if name not in _FIELDS]
        names = [*_FIELDS, *opened]
        # Names of its own, since what an operator opens need not be an identifier.
        inner = [f"f{number}" for number in range(len(names))]
        document = msgspec.defstruct(
            "Document",
            [(name, Raw, _ABSENT) for name in inner],
            rename=dict(zip(inner, names, strict=True)),
            forbid_unknown_fields=True,
            frozen=True,
            gc=False,
        )
        self._decoder = Decoder(document)
        self._keys = {name: b"," + json.dumps(name).encode() + b":" for name in names}
        self._model = json.dumps(settings.model).encode()
        self._max_tokens = b"%d" % settings.max_tokens

    async def read(self, request: web.Request, hold: Hold) -> Question:
        """The question that `request` asks. Raises RequestError, which names what is wrong and quotes no content."""
        betas = self._betas(request)
        digest = None
        if "Idempotency-Key" in request.headers:
            digest = hashlib.sha256(betas.encode() + b"\n")
        body = await read_body(request, self._settings, hold, digest)
        pieces = await self.pieces(body)
        return Question(pieces, betas, digest.digest() if digest is not None else b"", hold)

    def _betas(self, request: web.Request) -> str:
        """What of `anthropic-beta` is passed on: all of it, or RequestError (400) names what is not."""
        fields = request.headers.getall("anthropic-beta", ())
        asked = dict.fromkeys(value.strip() for field in fields for value in field.split(","))
        asked.pop("", None)
        for value in asked:
            if value not in self._settings.allow_betas:
                said = value if _BETA.fullmatch(value) else "one of its values"
                raise RequestError(400, "invalid_request_error", f"{said} is not allowed here", "anthropic-beta")
        return ",".join(asked)

    async def pieces(self, body: bytes | bytearray) -> tuple[bytes | memoryview, ...]:
        """The upstream's request for a client's: checked, with defaults, in pieces that follow each other.

        A field that is null counts as absent; of one that is given twice the last counts. `body` is UTF-8.
        """
        values = self._values(body)
        turns = _Turns(len(body))
        await turns.took(len(body))
        for name, value in values.items():
            if (check := _FIELDS.get(name)) is not None:
                check(value, name)
                await turns.took(len(value))
        await _check_messages(values.get("messages"), turns)
        self._check_limits(values)
        values.pop("stream", None)
        out: list[bytes | memoryview] = [b'{"model":', values.pop("model", self._model)]
        out += b',"max_tokens":', values.pop("max_tokens", self._max_tokens), b',"stream":true'
        for name, value in values.items():
            out += self._keys[name], value
        out.append(b"}")
        return (b"".join(out),) if len(body) <= _SMALL_BYTES else tuple(out)

    def _values(self, body: bytes | bytearray) -> dict[str, memoryview]:
        try:
            document = self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _named(error, "") from None
        except msgspec.DecodeError as error:
            # Where it broke, as a position in bytes; nothing is quoted.
            said = str(error).removeprefix("JSON is malformed: ")
            if said == "Input data was truncated":
                # It says so of half an emoji, too, which JavaScript makes where it cuts a text.
                said = "it ends too soon, or has half of a surrogate pair, such as \\ud83d alone"
            raise _invalid("body", f"Invalid JSON: {said}") from None
        except RecursionError:
            raise _invalid("body", "Invalid JSON: it is nested too deeply") from None
        return {
            name: value
            for name, raw in zip(self._keys, msgspec.structs.astuple(document), strict=True)
            if raw is not _ABSENT and (value := memoryview(raw))[0] != _NULL
        }

    def _check_limits(self, values: dict[str, memoryview]) -> None:
        settings = self._settings
        if settings.models and "model" in values and _TEXT.decode(values["model"]) not in settings.models:
            raise _invalid("model", "this model is not offered here")
        if "max_tokens" in values and _COUNT.decode(values["max_tokens"]) > settings.max_tokens_limit:
            raise _invalid("max_tokens", f"must be at most {settings.max_tokens_limit}")


class _Turns:
    """Lets others run between one pass over many bytes and the next.

    After a long one for a moment: to answer a request takes several turns of the event loop, and in each of them this
    would be back with its next pass.
    """

    def __init__(self, size: int) -> None:
        self._small = size <= _SMALL_BYTES
        self._bytes = 0

    async def took(self, size: int) -> None:
        """A pass over so many bytes was made."""
        if self._small:
            return
        self._bytes += size
        if self._bytes > _SMALL_BYTES:
            self._bytes = 0
            await asyncio.sleep(_MOMENT_S if size > _SMALL_BYTES else 0)


async def _check_messages(value: memoryview | None, turns: _Turns) -> None:
    if value is None:
        raise _invalid("messages", "is missing")
    _check_start(value, "messages", "a list")
    try:
        messages = _MESSAGE_LIST.decode(value)
    except msgspec.ValidationError as error:
        raise _named(error, "messages") from None
    await turns.took(len(value))
    _check_count(len(messages), "messages", 1, _MESSAGES)
    index = 0
    try:
        for index, message in enumerate(messages):  # noqa: B007 - of the message that was refused
            role, content = message.role, memoryview(message.content)
            try:
                # A long one is not what it should be, and is not decoded to find out.
                _ROLE.decode(role if len(role) <= _SCALAR_BYTES else b"")
            except msgspec.DecodeError:
                raise _invalid("role", "must be `user` or `assistant`") from None
            _check_content(content, "content")
            await turns.took(len(content) + _MESSAGE_BYTES)
    except RequestError as error:
        error.field = f"messages.{index}.{error.field}"
        raise


def _check_content(value: memoryview, field: str) -> None:
    """Text, or blocks as the upstream's API has them."""
    start = value[0] if value else 0
    if start == _STARTS["a list"]:
        _check_items(value, field, "an object", _BLOCKS, at_least=1)
    elif start != _STARTS["a string"]:
        raise _invalid(field, "must be text or a list of blocks" if start else "is missing")
    elif len(value) == 2:
        raise _invalid(field, "must not be empty")


def _check_start(value: memoryview, field: str, kind: str) -> None:
    if value[0] != _STARTS[kind]:
        raise _invalid(field, f"must be {kind}")


def _check_items(value: memoryview, field: str, kind: str, at_most: int, *, at_least: int = 0) -> None:
    _check_start(value, field, "a list")
    items = _LIST.decode(value)
    _check_count(len(items), field, at_least, at_most)
    for index, item in enumerate(items):
        _check_start(memoryview(item), f"{field}.{index}", kind)


def _check_count(count: int, field: str, at_least: int, at_most: int) -> None:
    if count < at_least:
        raise _invalid(field, "must not be empty")
    if count > at_most:
        raise _invalid(field, f"must have at most {at_most} items")


def _check_object(value: memoryview, field: str) -> None:
    _check_start(value, field, "an object")


def _check_string(value: memoryview, field: str) -> None:
    _check_start(value, field, "a string")


def _check_tools(value: memoryview, field: str) -> None:
    _check_items(value, field, "an object", _TOOLS)


def _check_stop_sequences(value: memoryview, field: str) -> None:
    _check_items(value, field, "a string", _STOP_SEQUENCES)


def _check_model(value: memoryview, field: str) -> None:
    if re.fullmatch(MODEL_NAME, _scalar(_TEXT, value, field)) is None:
        raise _invalid(field, "is no well-formed name of a model")


def _check_max_tokens(value: memoryview, field: str) -> None:
    if _scalar(_COUNT, value, field) < 1:
        raise _invalid(field, "must be at least 1")


def _check_stream(value: memoryview, field: str) -> None:
    if value[0] != _TRUE:
        raise _invalid(field, "must be true, or absent")


def _scalar(decoder: Decoder[Scalar], value: memoryview, field: str) -> Scalar:
    if len(value) > _SCALAR_BYTES:
        raise _invalid(field, "is too long")
    try:
        return decoder.decode(value)
    except msgspec.ValidationError as error:
        # "Expected `int`, got `str`": it names types, and quotes nothing.
        raise _invalid(field, str(error)) from None


# What may be asked, and how each is checked: by what it begins with where it is passed on as it is.
_FIELDS: dict[str, Callable[[memoryview, str], object] | None] = {
    "model": _check_model,
    "max_tokens": _check_max_tokens,
    "stream": _check_stream,
    "messages": None,  # by _check_messages, last
    "system": _check_content,
    "temperature": partial(_scalar, _FROM_0_TO_2),
    "top_p": partial(_scalar, _FROM_0_TO_1),
    "top_k": partial(_scalar, _COUNT),
    "stop_sequences": _check_stop_sequences,
    "thinking": _check_object,
    "tools": _check_tools,
    "tool_choice": _check_object,
    "metadata": _check_object,
    "output_config": _check_object,
    "cache_control": _check_object,
    "service_tier": _check_string,
}


_AT = re.compile(r"(.*?)(?: - at `\$\[(\d+)\]`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


def _named(error: msgspec.ValidationError, field: str) -> RequestError:
    """What msgspec says of the document, or of a list in it, by the name that it has for clients."""
    match = _AT.fullmatch(str(error))
    assert match is not None
    message, index = match.groups()
    path = [part for part in (field, index) if part]
    if (unknown := _UNKNOWN.fullmatch(message)) is not None:
        # It is the client's own text: enough of it to be found, no more.
        path.append(unknown[1][:128])
        message = "Extra inputs are not permitted"
    return _invalid(".".join(path) or "body", message)


def _invalid(field: str, message: str) -> RequestError:
    return RequestError(400, "invalid_request_error", message, field)
