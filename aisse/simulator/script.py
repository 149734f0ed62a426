"""What the simulator answers: the plan of one answer, and the shapes of the format. It has no I/O and no clock."""

import json
import math
import random
import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import islice, repeat
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Fault = Literal["none", "error", "cut", "stall", "garbage", "huge", "no_stop", "no_events", "html", "redirect"]
Count = Annotated[int, Field(ge=0, le=10_000_000)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
HeaderText = Annotated[str, Field(pattern=r"^[\x20-\x7e]*$")]
Plan = Iterator[tuple[float, bytes]]

_OVERRIDES = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_TOKEN = re.compile(r"\s*\S{1,6}|\s+")
_SIGNATURE = "c2ltdWxhdGVkIHRoaW5raW5nLCBzaWduZWQgYnkgbm9ib2R5"
_ERROR_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

# As the real API sends it: compact, and UTF-8 as it is.
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Script(BaseModel):
    """The plan of one answer. Every field can be a flag of the server and an override in a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: Count = Field(120, description="text deltas of the answer; not used with `text`")
    text: str | None = Field(None, description='text of the answer, cut into tokens; else "w1 w2 w3 ..."')
    token_bytes: int = Field(0, ge=0, le=1 << 20, description="pads the text of each delta to so many bytes")
    thinking_tokens: Count = Field(0, description="deltas of a thinking block before the text; 0 = no block")
    pace: float = Field(45.0, ge=0, le=1e6, description="deltas per second; 0 = as fast as the peer reads")
    jitter: float = Field(0.3, ge=0, le=1, description="share of the interval between deltas that varies")
    seed: int | None = Field(None, description="makes message id, jitter and garbage the same every time")
    first_s: Seconds = Field(0.0, description="seconds before the status line")
    thinking_s: Seconds = Field(0.0, description="seconds between message_start and the first content block")
    ping_s: Seconds = Field(10.0, description="seconds between pings during `thinking_s`; 0 = no pings")
    status: int = Field(0, description="answers with this status, 400 to 599, instead of a stream; 0 = no")
    retry_after: int = Field(3, ge=0, description="Retry-After of status 429, 503 and 529; 0 = no such header")
    fault: Fault = Field(
        "none",
        description="after `at` events: error (an error event, the end), stall (silence), garbage (bytes that "
        "are no SSE, the end), huge (an oversized ping, then the rest); after `at` bytes of the body: cut (the "
        "connection breaks); no_stop (no message_stop), no_events (an empty body), html, redirect",
    )
    at: int = Field(20, ge=0, description="where the fault comes; past the end of the answer: at its end")
    rst: bool = Field(False, description="fault=cut resets the connection (RST) instead of closing it (FIN)")
    size: int = Field(2 << 20, ge=64, le=64 << 20, description="bytes of the huge event, or of the garbage")
    message: str | None = Field(None, description="text of the error that `status` or fault=error sends")
    error_type: str | None = Field(None, description="type of that error; else the one that fits the status")
    location: HeaderText = Field("/v1/elsewhere", description="where fault=redirect points to")
    cookie: HeaderText = Field("", description="value of a Set-Cookie header on the answer; empty = none")
    line_end: Literal["lf", "crlf", "cr"] = Field("lf", description="line ends of the events")
    split: int = Field(0, ge=0, description="bytes per write, 1 = each byte its own; 0 = each event its own")
    close_delimited: bool = Field(False, description="a body that ends with its connection, not chunked")

    @field_validator("status")
    @classmethod
    def _is_failure(cls, status: int) -> int:
        if status and not 400 <= status <= 599:
            raise ValueError("should be 0 or 400 to 599")
        return status

    @classmethod
    def parse(cls, prompt: str, base: "Script") -> "Script":
        """Return `base` with what `prompt` overrides in `[[name=value ...]]`, later ones winning.

        Values with spaces are quoted as in a shell. Raises ValueError, whose text names what is wrong.
        """
        overrides: dict[str, str] = {}
        for inner in _OVERRIDES.findall(prompt):
            try:
                words = shlex.split(inner)
            except ValueError as exc:
                raise ValueError(f"script: {inner}: {exc}") from None
            for word in words:
                name, equals, value = word.partition("=")
                if not equals:
                    raise ValueError(f"script: {word}: not of the form name=value")
                if name not in cls.model_fields:
                    raise ValueError(f"script: {name}: no such name")
                overrides[name] = value
        if not overrides:
            return base
        try:
            return cls.model_validate(base.model_dump() | overrides)
        except ValidationError as exc:
            raise ValueError(f"script: {first_error(exc)}") from None

    def pieces(self) -> Iterator[str]:
        """Yield the text of each text delta of a whole answer."""
        tokens = _words("w", self.tokens) if self.text is None else _TOKEN.findall(self.text)
        return (self._pad(token) for token in tokens)

    def thoughts(self) -> Iterator[str]:
        """Yield the text of each thinking delta of a whole answer."""
        return (self._pad(token) for token in _words("t", self.thinking_tokens))

    def answer(self, max_tokens: int | None = None) -> str:
        """Return the text that an answer without faults has, as far as `max_tokens` allows."""
        return "".join(islice(self.pieces(), self._budget(max_tokens)[1]))

    def thinking(self, max_tokens: int | None = None) -> str:
        """Return the thinking that precedes the text, as far as `max_tokens` allows."""
        return "".join(islice(self.thoughts(), self._budget(max_tokens)[0]))

    def stop_reason(self, max_tokens: int | None = None) -> str:
        """Return "max_tokens" if the answer is longer than that, else "end_turn"."""
        return "end_turn" if self._budget(max_tokens) == self._budget(None) else "max_tokens"

    def output_tokens(self, max_tokens: int | None = None) -> int:
        """Return the count of deltas, thinking included, which is what usage reports."""
        return sum(self._budget(max_tokens))

    def seconds(self, max_tokens: int | None = None) -> float:
        """Return how many seconds an answer takes after its first byte: infinity with a stall.

        Its peer reads at once.
        """
        if self.fault == "stall":
            return math.inf
        return self.thinking_s + (self.output_tokens(max_tokens) / self.pace if self.pace else 0.0)

    def error(self, status: int) -> dict[str, Any]:
        """Return the error object for this status, with the script's own type and message."""
        kind = self.error_type or error_type(status)
        return error_object(kind, kind.replace("_", " ") if self.message is None else self.message)

    def frames(
        self,
        *,
        message_id: str = "msg_simulated",
        model: str = "claude-sonnet-4-20250514",
        input_tokens: int = 10,
        max_tokens: int | None = None,
    ) -> Plan:
        """Yield each event as (seconds after the one before, its bytes), with all faults but `cut`.

        A stall is (infinity, b"").
        """
        plan = self._faultless(message_id, model, input_tokens, max_tokens)
        if self.fault == "no_events":
            return
        if self.fault in ("error", "stall", "garbage", "huge"):
            yield from islice(plan, self.at)
        match self.fault:
            case "error":
                yield 0.0, self._event(self.error(529))
            case "stall":
                yield math.inf, b""
            case "garbage":
                yield 0.0, random.Random(self.seed).randbytes(self.size)  # noqa: S311 - noise, no secret
            case "huge":
                padding = self.size - len(self._event({"type": "ping", "padding": ""}))
                yield 0.0, self._event({"type": "ping", "padding": "x" * padding})
                yield from plan
            case _:
                yield from plan

    def _faultless(self, message_id: str, model: str, input_tokens: int, max_tokens: int | None) -> Plan:
        thinking, text = self._budget(max_tokens)
        usage = usage_object(input_tokens, 1)
        message = message_object(message_id, model, content=[], stop_reason=None, usage=usage)
        yield 0.0, self._event({"type": "message_start", "message": message})

        pings = int(self.thinking_s // self.ping_s) if self.ping_s else 0
        yield from repeat((self.ping_s, self._ping()), pings)
        pause = self.thinking_s - pings * self.ping_s
        beats = self._beats()
        blocks = []
        if thinking:
            blocks.append(("thinking", zip(beats, islice(self.thoughts(), thinking), strict=False)))
        if text or not thinking:
            blocks.append(("text", zip(beats, islice(self.pieces(), text), strict=False)))
        for index, (kind, deltas) in enumerate(blocks):
            yield pause, self._block_start(index, kind)
            pause = 0.0
            if index == 0:
                yield 0.0, self._ping()
            # By far the most events. They are encoded around the one string that differs.
            head, tail = self._delta(index, {"type": f"{kind}_delta", kind: ""}).split(b'""')
            for wait, piece in deltas:
                yield wait, head + encode(piece).encode() + tail
            if kind == "thinking":
                yield 0.0, self._delta(index, {"type": "signature_delta", "signature": _SIGNATURE})
            yield 0.0, self._event({"type": "content_block_stop", "index": index})

        delta = {"stop_reason": self.stop_reason(max_tokens), "stop_sequence": None}
        usage = {"output_tokens": thinking + text}
        yield 0.0, self._event({"type": "message_delta", "delta": delta, "usage": usage})
        if self.fault != "no_stop":
            yield 0.0, self._event({"type": "message_stop"})

    def _block_start(self, index: int, kind: str) -> bytes:
        block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        return self._event({"type": "content_block_start", "index": index, "content_block": block})

    def _delta(self, index: int, delta: Mapping[str, str]) -> bytes:
        return self._event({"type": "content_block_delta", "index": index, "delta": delta})

    def _ping(self) -> bytes:
        return self._frame("ping", '{"type": "ping"}')  # the one line of the real API that is not compact

    def _event(self, data: Mapping[str, Any]) -> bytes:
        return self._frame(data["type"], encode(data))

    def _frame(self, event: str, data: str) -> bytes:
        frame = f"event: {event}\ndata: {data}\n\n"
        if self.line_end != "lf":
            frame = frame.replace("\n", "\r\n" if self.line_end == "crlf" else "\r")
        return frame.encode()

    def _beats(self) -> Iterator[float]:
        """Yield the wait before each delta.

        Delta n is due n intervals after the start, plus up to `jitter` of an interval: the variation never adds up.
        """
        if not self.pace:
            yield from repeat(0.0)
        rng = random.Random(self.seed)  # noqa: S311 - timing, no secret
        before = 0.0
        while True:
            offset = rng.random() * self.jitter
            yield (1 + offset - before) / self.pace
            before = offset

    def _budget(self, max_tokens: int | None) -> tuple[int, int]:
        """Return how many thinking and text deltas fit `max_tokens`."""
        thinking = self.thinking_tokens
        text = self.tokens if self.text is None else len(_TOKEN.findall(self.text))
        if max_tokens is None:
            return thinking, text
        return min(thinking, max_tokens), min(text, max(0, max_tokens - thinking))

    def _pad(self, text: str) -> str:
        return text + "." * (self.token_bytes - len(text.encode()))


class _Block(BaseModel):
    text: str = ""


class _Turn(BaseModel):
    role: Literal["user", "assistant"]
    content: str | list[_Block]

    def plain(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "\n".join(block.text for block in content)


class Ask(BaseModel):
    """The part of a request's body that matters here. Everything else is accepted as it comes."""

    model_config = ConfigDict(strict=True)

    model: str = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    messages: list[_Turn] = Field(min_length=1)
    system: str | list[_Block] = ""
    stream: bool = False

    def prompt(self) -> str:
        """Return the text of the last user message."""
        return next((turn.plain() for turn in reversed(self.messages) if turn.role == "user"), "")

    def input_tokens(self) -> int:
        """Return a token per four characters and a few per turn, about what real tokenizers come to."""
        turns = [*self.messages, _Turn(role="user", content=self.system)]
        return sum(3 + math.ceil(len(turn.plain()) / 4) for turn in turns)


def whole_message(script: Script, ask: Ask, message_id: str) -> dict[str, Any]:
    """Return the answer as the one JSON message that a request without `stream` gets."""
    limit = ask.max_tokens
    content = [{"type": "text", "text": script.answer(limit)}]
    if thinking := script.thinking(limit):
        content.insert(0, {"type": "thinking", "thinking": thinking, "signature": _SIGNATURE})
    usage = usage_object(ask.input_tokens(), script.output_tokens(limit))
    reason = script.stop_reason(limit)
    return message_object(message_id, ask.model, content=content, stop_reason=reason, usage=usage)


def message_object(
    message_id: str,
    model: str,
    *,
    content: list[dict[str, str]],
    stop_reason: str | None,
    usage: dict[str, Any],
) -> dict[str, Any]:
    """Return a message as the real API shapes it."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage,
    }


def usage_object(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Return a usage object as the real API shapes it."""
    return {
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }


def error_object(kind: str, message: str) -> dict[str, Any]:
    """Return an error as the real API shapes it, in bodies and in events."""
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_type(status: int) -> str:
    """Return the error type that the real API sends with this status."""
    return _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def first_error(exc: ValidationError) -> str:
    """Return "field: what is wrong" for the first thing that is, without the value."""
    error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    message = error["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, [".".join(map(str, error["loc"])), message]))


def _words(letter: str, count: int) -> Iterator[str]:
    return (f" {letter}{number}" if number > 1 else f"{letter}1" for number in range(1, count + 1))
