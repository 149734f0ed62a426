"""The Anthropic Messages stream: its terminal event, its usage, its errors.

https://docs.anthropic.com/en/docs/build-with-claude/streaming describes the events: `message_start`, blocks of
`content_block_start`, `content_block_delta` and `content_block_stop`, `message_delta`, `message_stop`; `ping` and
`error` at any time; unknown types are to be expected.
"""

from __future__ import annotations

import enum
import json
import re
from typing import Any

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
            named = _loads(data_of(body)).get("type")
            # JSON can spell lone surrogates, which do not encode.
            event_type = named.encode(errors="replace") if isinstance(named, str) else b""
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


def error_of(payload: bytes) -> tuple[str, str]:
    """Type and message of an error's JSON, `{"type": "error", "error": {"type", "message"}}`; empty where missing."""
    error = _loads(payload).get("error")
    if not isinstance(error, dict):
        return "", ""
    kind, message = error.get("type"), error.get("message")
    return kind if isinstance(kind, str) else "", message if isinstance(message, str) else ""


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
