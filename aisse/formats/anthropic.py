"""The Anthropic Messages stream: its terminal event, its usage, its errors.

https://docs.anthropic.com/en/docs/build-with-claude/streaming describes the events: `message_start`, blocks of
`content_block_start`, `content_block_delta` and `content_block_stop`, `message_delta`, `message_stop`; `ping` and
`error` at any time; unknown types are to be expected.
"""

from __future__ import annotations

import enum
import json
import re
from typing import Any, NamedTuple

from aisse.sse import data_of


class Mark(enum.Enum):
    """What the relay has to know of an event."""

    CONTENT = enum.auto()
    PING = enum.auto()
    END = enum.auto()
    ERROR = enum.auto()
    RESERVED = enum.auto()


# Names of their own: looking a member up in its enum is slow, and this is done for every event.
CONTENT, PING, END, ERROR, RESERVED = Mark

# Events of our own: an upstream's would end a reader's stream in the middle, or send it elsewhere.
_OURS = frozenset({b"end", b"reconnect"})


class AnthropicFormat:
    """Follows one stream. Only the few events that carry usage are parsed as JSON, once each."""

    __slots__ = ("_usage",)

    def __init__(self, usage: dict[str, int]) -> None:
        """`usage` is kept up to date: `input_tokens` and `output_tokens`, cumulative as the upstream reports them."""
        self._usage = usage

    def observe(self, event_type: bytes, body: bytes) -> Mark:
        """Classifies an event (type and lines as in sse.RawEvent) and takes its usage."""
        # Deltas are nearly all there is: they take this one comparison.
        if event_type == b"content_block_delta":
            return CONTENT
        if event_type in {b"", b"message"}:  # clients cannot tell the two apart
            # Some compatible servers leave `event:` out; the data says the same.
            data = _loads(data_of(body))
            named = data.get("type")
            # JSON can spell lone surrogates, which do not encode.
            event_type = named.encode(errors="replace") if isinstance(named, str) else b""
            if not event_type and data.get("error"):
                return ERROR  # gateways in front of the API say theirs so
        if event_type == b"ping":
            return PING
        if event_type == b"message_stop":
            return END
        if event_type == b"error":
            return ERROR
        if event_type in _OURS:
            return RESERVED
        if event_type == b"message_start":
            self._take(_loads(data_of(body)).get("message"))
        elif event_type == b"message_delta":
            self._take(_loads(data_of(body)))
        return CONTENT

    def _take(self, message: Any) -> None:
        usage = message.get("usage") if isinstance(message, dict) else None
        if not isinstance(usage, dict):
            return
        for name in ("input_tokens", "output_tokens"):
            count = usage.get(name)
            # Beyond 2^53 no client's JSON could hold it, and far beyond Python refuses to print it.
            if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= 2**53:
                self._usage[name] = count


class Said(NamedTuple):
    """What an upstream says of an error: its message, empty where there is none, and what names its kind."""

    message: str = ""
    kinds: tuple[str, ...] = ()
    """Codes and types, in its own words, what says most first."""
    status: int | None = None
    """An HTTP status that its JSON carries."""


# Where the words stand, what says most first: the Messages API and OpenAI, FastAPI, OAuth, RFC 9457.
_INNER = ("error", "errors", "detail", "message")
_WORDS = ("message", "msg", "detail", "error_description", "error_message", "error", "title", "reason")
_NESTING = 8
_LISTED = 3

# A plain text's first line; more is a traceback, or a page.
_LINE_CHARS = 200

# JSON that was cut off where our patience ended: FastAPI's quote the whole request behind the words.
_CUT_WORDS = re.compile(r'"(?:message|msg|detail|error)" ?: ?"((?:[^"\\]|\\.)*+)"')


def error_of(payload: bytes) -> Said:
    """What the body of an error, or the data of an `error` event, says, whatever its shape; nothing is made up.

    `{"type": "error", "error": {"type", "message"}}` is the API's own. In the field there are also `{"error": "text"}`,
    `{"detail": ...}`, `{"message": ...}`, lists of these, errors inside errors, and plain text. A page says nothing.
    """
    text = payload.decode(errors="replace").removeprefix("\ufeff").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _said_as_text(text)
    return _said(value, _NESTING)


def _said_as_text(text: str) -> Said:
    if text.startswith(("{", "[")):
        found = _CUT_WORDS.search(text)
        return Said(_unescaped(found[1])) if found else Said()
    line = text.partition("\n")[0].strip()
    # A page, or no text at all: what the status says is more.
    if text.startswith("<") or not line.replace("\t", " ").isprintable() or "\ufffd" in line:
        return Said()
    if len(line) > _LINE_CHARS:
        # Between two words: half of a key would not be told for what it is.
        line = line[:_LINE_CHARS].rpartition(" ")[0]
    return Said(line)


def _unescaped(spelt: str) -> str:
    try:
        text: str = json.loads(f'"{spelt}"')
    except ValueError:
        return ""
    return text


def _said(value: Any, depth: int) -> Said:
    if depth == 0:
        return Said()
    if isinstance(value, str):
        # Gateways put what they were told into a string.
        inner = _loads(value.encode(errors="replace")) if value.lstrip().startswith("{") else None
        return _said(inner, depth - 1) if inner else Said(value.strip())
    if isinstance(value, list):
        found = [_said(item, depth - 1) for item in value[:_LISTED]]
        message = "; ".join(said.message for said in found if said.message)
        return found[0]._replace(message=message) if found else Said()
    if isinstance(value, dict):
        return _said_by_object(value, depth)
    return Said()


def _said_by_object(value: dict[str, Any], depth: int) -> Said:
    kinds = tuple(word for name in ("code", "type", "status") if isinstance(word := value.get(name), str) and word)
    numbers = (value.get(name) for name in ("status", "code", "status_code", "statusCode"))
    status = next((number for number in numbers if type(number) is int and 400 <= number < 600), None)
    for name in _INNER:
        if isinstance(value.get(name), dict | list):
            inner = _said(value[name], depth - 1)
            if inner.message or inner.kinds:
                message = inner.message or _words(value, depth).message
                return Said(message, inner.kinds + kinds, inner.status or status)
    words = _words(value, depth)
    if isinstance(error := value.get("error"), str) and words.message != error.strip():
        kinds = (error, *kinds)  # OAuth: a word for machines, beside one for people
    return Said(words.message, words.kinds + kinds, words.status or status)


def _words(value: dict[str, Any], depth: int) -> Said:
    for name in _WORDS:
        if isinstance(text := value.get(name), str) and text.strip():
            said = _said(text, depth - 1)
            # What pydantic says of a field is nothing without the field.
            where = value.get("loc")
            if isinstance(where, list) and said.message:
                path = ".".join(str(part) for part in where if isinstance(part, str | int) and part != "body")
                said = said._replace(message=f"{path}: {said.message}" if path else said.message)
            return said
    return Said()


def is_json(payload: bytes) -> bool:
    """Whether a text is JSON to its end, as the data of every event of this API is."""
    try:
        json.loads(payload)
    except (ValueError, RecursionError):
        return False
    return True


def _loads(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# A delta that only adds text: everything up to the text, the text as JSON spells it, the rest, and the id. Possessive:
# there is one way to read it, and to remember others at every escape takes ninety times the memory of the text.
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


def compact(frames: bytes) -> bytes:
    """Whole frames with each run of adjacent text deltas, or of thinking deltas, of one block merged into one.

    A merged event has the id of its last. JSON strings are joined as they are spelt: of valid UTF-8, what a client
    adds up is the same to the byte, also where a surrogate pair was split between two events.
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
