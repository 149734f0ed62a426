"""The Anthropic Messages API: what it may be asked, its terminal event, its usage, its errors.

https://docs.anthropic.com/en/docs/build-with-claude/streaming describes the events: `message_start`, blocks of
`content_block_start`, `content_block_delta` and `content_block_stop`, `message_delta`, `message_stop`; `ping` and
`error` at any time; unknown types are to be expected.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw
from msgspec.json import Decoder

from aisse.errors import RequestError
from aisse.formats.document import (
    ABSENT,
    SCALAR_BYTES,
    STARTS,
    Document,
    Turns,
    check_count,
    check_items,
    check_object,
    check_start,
    check_string,
    invalid,
    is_json,
    named,
    object_in,
    scalar,
)
from aisse.formats.errors import error_of
from aisse.formats.format import CONTENT, END, ERROR, OURS, PING, RESERVED, Asked, Mark
from aisse.settings import MODEL_NAME
from aisse.sse import data_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from multidict import MultiMapping

    from aisse.formats.document import Check
    from aisse.formats.errors import Said
    from aisse.settings import Settings

_VERSION = "2023-06-01"

_MESSAGES = 10_000
_BLOCKS = 10_000
_TOOLS = 1_000
_STOP_SEQUENCES = 1_000

# What checking a message costs beside its bytes, as the number of bytes that could be parsed meanwhile.
_MESSAGE_BYTES = 100

# What a value of `anthropic-beta` looks like. Other text is not repeated in an error.
_BETA = re.compile(r"[A-Za-z0-9._-]{1,128}")

_TRUE = ord("t")


class Anthropic:
    """The Messages API as a Format. `allow_fields` and `allow_betas` open what is closed without them."""

    request_headers: tuple[str, ...] = ("anthropic-beta",)
    # In the text of an answer its quotes have backslashes.
    usage_word = b'"usage"'

    def __init__(self, settings: Settings) -> None:
        self._allow_betas = settings.allow_betas
        self._document = Document(_FIELDS, settings.allow_fields)
        self._model = memoryview(json.dumps(settings.model).encode())
        self._max_tokens = memoryview(b"%d" % settings.max_tokens)

    def passed_on(self, headers: MultiMapping[str]) -> dict[str, str]:
        """The values of `anthropic-beta`, each once. Raises RequestError (400), which names one that is not allowed."""
        fields = headers.getall("anthropic-beta", [])
        asked = dict.fromkeys(value.strip() for field in fields for value in field.split(","))
        asked.pop("", None)
        for value in asked:
            if value not in self._allow_betas:
                said = value if _BETA.fullmatch(value) else "one of its values"
                raise RequestError(400, "invalid_request_error", f"{said} is not allowed here", "anthropic-beta")
        return {"anthropic-beta": ",".join(asked)} if asked else {}

    async def ask(self, body: bytes | bytearray) -> Asked:
        """As in Format: a field that is null counts as absent, and of one that is given twice the last counts."""
        turns = Turns(len(body))
        values = await self._document.read(body, turns)
        await _check_messages(values.get("messages"), turns)
        values.pop("stream", None)
        model = values.pop("model", self._model)
        max_tokens = values.pop("max_tokens", self._max_tokens)
        head = (b'{"model":', model, b',"max_tokens":', max_tokens, b',"stream":true')
        pieces = self._document.join(head, values, turns)
        return Asked(pieces, _TEXT.decode(model), _COUNT.decode(max_tokens), "max_tokens")

    def endpoint(self, path: str) -> str:
        """People paste the URL that their other tools want: it may end in `/v1`, or in all of the path."""
        return re.sub(r"/v1(?:/messages)?$", "", path.rstrip("/")) + "/v1/messages"

    def headers(self, key: str | None) -> Mapping[str, str]:
        """The version of the API, and the key."""
        version = {"anthropic-version": _VERSION}
        return version if key is None else version | {"x-api-key": key}

    def follow(self, usage: dict[str, int]) -> AnthropicFollower:
        """A follower for one answer."""
        return AnthropicFollower(usage)

    def compact(self, frames: bytes) -> bytes:
        """As in Format: what is merged are the deltas of one block's text, and of one block's thinking."""
        return _compact(frames)

    def read_error(self, payload: bytes) -> Said:
        """What an error says in whatever shape: what calls itself compatible with this API has many."""
        return error_of(payload)


# --- questions ------------------------------------------------------------------------------------------------


class _Message(msgspec.Struct, forbid_unknown_fields=True, frozen=True, gc=False):
    role: Raw = ABSENT
    content: Raw = ABSENT


_MESSAGE_LIST = Decoder(list[_Message])
_ROLE = Decoder(Literal["user", "assistant"])
_TEXT = Decoder(str)
_COUNT = Decoder(Annotated[int, Meta(ge=0)])
_FROM_0_TO_1 = Decoder(Annotated[float, Meta(ge=0, le=1)])
_FROM_0_TO_2 = Decoder(Annotated[float, Meta(ge=0, le=2)])


async def _check_messages(value: memoryview | None, turns: Turns) -> None:
    if value is None:
        raise invalid("messages", "is missing")
    check_start(value, "messages", "a list")
    try:
        messages = _MESSAGE_LIST.decode(value)
    except msgspec.ValidationError as error:
        raise named(error, "messages") from None
    await turns.took(len(value))
    check_count(len(messages), "messages", 1, _MESSAGES)
    index = 0
    try:
        for index, message in enumerate(messages):  # noqa: B007 - names the message that was refused
            role, content = message.role, memoryview(message.content)
            try:
                _ROLE.decode(role if len(role) <= SCALAR_BYTES else b"")
            except msgspec.DecodeError:
                raise invalid("role", "must be `user` or `assistant`") from None
            _check_content(content, "content")
            await turns.took(len(content) + _MESSAGE_BYTES)
    except RequestError as error:
        error.field = f"messages.{index}.{error.field}"
        raise


def _check_content(value: memoryview, field: str) -> None:
    """It must be text, or blocks; what is in a block is the upstream's to judge."""
    start = value[0] if value else 0
    if start == STARTS["a list"]:
        check_items(value, field, "an object", _BLOCKS, at_least=1)
    elif start != STARTS["a string"]:
        raise invalid(field, "must be text or a list of blocks" if start else "is missing")
    elif len(value) == 2:
        raise invalid(field, "must not be empty")


def _check_tools(value: memoryview, field: str) -> None:
    check_items(value, field, "an object", _TOOLS)


def _check_stop_sequences(value: memoryview, field: str) -> None:
    check_items(value, field, "a string", _STOP_SEQUENCES)


def _check_model(value: memoryview, field: str) -> None:
    if re.fullmatch(MODEL_NAME, scalar(_TEXT, value, field)) is None:
        raise invalid(field, "is no well-formed name of a model")


def _check_max_tokens(value: memoryview, field: str) -> None:
    if scalar(_COUNT, value, field) < 1:
        raise invalid(field, "must be at least 1")


def _check_stream(value: memoryview, field: str) -> None:
    if value[0] != _TRUE:
        raise invalid(field, "must be true, or absent")


# What may be asked, and how each is checked. What is passed on as it is is checked by what it begins with.
_FIELDS: dict[str, Check | None] = {
    "model": _check_model,
    "max_tokens": _check_max_tokens,
    "stream": _check_stream,
    "messages": None,  # by _check_messages, last
    "system": _check_content,
    "temperature": partial(scalar, _FROM_0_TO_2),
    "top_p": partial(scalar, _FROM_0_TO_1),
    "top_k": partial(scalar, _COUNT),
    "stop_sequences": _check_stop_sequences,
    "thinking": check_object,
    "tools": _check_tools,
    "tool_choice": check_object,
    "metadata": check_object,
    "output_config": check_object,
    "cache_control": check_object,
    "service_tier": check_string,
}


# --- events ---------------------------------------------------------------------------------------------------


class AnthropicFollower:
    """Follows one answer. Only the few events that carry usage are parsed as JSON, once each."""

    __slots__ = ("_usage",)

    def __init__(self, usage: dict[str, int]) -> None:
        self._usage = usage

    def observe(self, event_type: bytes, body: bytes) -> Mark:
        """What the next event is; see Follower."""
        # Deltas are nearly all there is: they take this one comparison.
        if event_type == b"content_block_delta":
            return CONTENT
        if event_type in {b"", b"message"}:  # clients cannot tell the two apart
            # Some compatible servers leave `event:` out. The data says the same.
            data = object_in(data_of(body))
            name = data.get("type")
            # JSON can spell lone surrogates, which do not encode.
            event_type = name.encode(errors="replace") if isinstance(name, str) else b""
            if not event_type and data.get("error"):
                return ERROR  # gateways in front of the API say theirs so
        if event_type == b"ping":
            return PING
        if event_type == b"message_stop":
            return END
        if event_type == b"error":
            return ERROR
        if event_type in OURS:
            return RESERVED
        if event_type == b"message_start":
            self._take(object_in(data_of(body)).get("message"))
        elif event_type == b"message_delta":
            self._take(object_in(data_of(body)))
        return CONTENT

    def _take(self, message: Any) -> None:
        usage = message.get("usage") if isinstance(message, dict) else None
        if not isinstance(usage, dict):
            return
        for name in ("input_tokens", "output_tokens"):
            count = usage.get(name)
            # Beyond 2^53 no client's JSON could hold it, and far beyond that Python refuses to print it.
            if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= 2**53:
                self._usage[name] = count

    def is_whole(self, data: bytes) -> bool:
        """The data of every event is JSON, and half of it is not."""
        return is_json(data)

    def is_complete(self) -> bool:
        """An answer without `message_stop` has been cut off, however its body ended."""
        return False


# A delta that only adds text: everything up to the text, the text as JSON spells it, the rest, and the id. Its
# quantifiers are possessive. There is one way to read it, and to remember others at every escape would take ninety
# times the memory of the text.
_DELTA = re.compile(
    rb"(event: content_block_delta\ndata: "
    rb'\{"type": ?"content_block_delta", ?"index": ?[0-9]++, ?"delta": ?'
    rb'\{"type": ?"(?:text_delta", ?"text|thinking_delta", ?"thinking)": ?")'
    rb'([^"\\\n]*+(?:\\.[^"\\\n]*+)*+)'
    rb'("\} ?\}\n)'
    rb"(id: [^\n]*+\n\n)"
)

# No more text than this is merged into one event, so that it fits through clients that bound an event.
_MERGED_BYTES = 64 << 10


def _compact(frames: bytes) -> bytes:
    """JSON strings are joined as they are spelt.

    Of valid UTF-8, what a client adds up is the same to the byte, also where a surrogate pair was split between two
    events.
    """
    merged: list[bytes] = []
    head = tail = last_id = b""
    texts: list[bytes] = []
    size = position = 0

    def close_run() -> None:
        if texts:
            merged.extend((head, *texts, tail, last_id))
            texts.clear()

    while position < len(frames):
        delta = _DELTA.match(frames, position)
        if delta is None:
            close_run()
            end = frames.index(b"\n\n", position) + 2
            merged.append(frames[position:end])
            position = end
            continue
        if delta[1] != head or size + len(delta[2]) > _MERGED_BYTES:
            close_run()
        if not texts:
            head, size = delta[1], 0
        texts.append(delta[2])
        size += len(delta[2])
        tail, last_id = delta[3], delta[4]
        position = delta.end()
    close_run()
    return b"".join(merged)
