"""Every error that aisse raises on purpose, in one tree.

AisseError
├── ConfigError               the start is refused (exit 78, sysexits' EX_CONFIG)
├── RequestError              the client's request is at fault, or cannot be taken now: a 4xx or 503 of ours
│   ├── UnknownStreamError    there is no such stream
│   ├── KeyReusedError        an Idempotency-Key came with another request
│   ├── DrainingError         nothing was started, because the server is shutting down
│   └── LogUnavailableError   the shared log does not answer
└── StreamError               what ends a stream otherwise than complete
    ├── UpstreamError         the upstream refused, failed or said so in an `error` event
    └── LimitError            a bound of ours was reached

Messages say what to do. They never carry keys, prompts, completions or an upstream's text. UpstreamError.message is the
one exception: it is for the client's eyes, is shortened, and goes out as JSON only. Logs carry its `kind`,
`upstream_status` and `cause`, which are our own words.
"""

from __future__ import annotations

from dataclasses import dataclass

# How much of an upstream's own words reaches a client.
MESSAGE_CHARS = 500


class AisseError(Exception):
    """Base of all errors of this package."""


@dataclass(eq=False)
class ConfigError(AisseError):
    """A setting is wrong or a needed part is missing: one line that names it."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(eq=False)
class RequestError(AisseError):
    """A request is refused, with `status` and the protocol's error `kind`. `field` is the one at fault, if any."""

    status: int
    kind: str
    message: str
    field: str | None = None
    retry_after_s: int | None = None

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def body(self) -> dict[str, object]:
        """The error as clients get it, in the shape of an `error` event."""
        return error_body(self.kind, str(self), self.field)


class UnknownStreamError(RequestError):
    """There is no such stream, or none any more."""

    def __init__(self) -> None:
        super().__init__(404, "not_found_error", "there is no such stream; it may have expired")


class KeyReusedError(RequestError):
    """The key belongs to another request."""

    def __init__(self) -> None:
        super().__init__(422, "invalid_request_error", "was used for another request before", "Idempotency-Key")


class DrainingError(RequestError):
    """The server is shutting down and has started nothing. The same request may be sent to another instance."""

    def __init__(self) -> None:
        super().__init__(503, "overloaded_error", "the server is shutting down", retry_after_s=1)


class LogUnavailableError(RequestError):
    """The shared log does not answer, and only the log knows what was asked for. The same request may succeed later."""

    def __init__(self) -> None:
        super().__init__(503, "overloaded_error", "the log of answers does not respond", retry_after_s=1)


@dataclass(eq=False)
class StreamError(AisseError):
    """Ends a stream with `error` and `end`. `status` is what a client gets that has no answer yet."""

    kind: str
    message: str
    status: int = 502
    retry_after: str | None = None

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, object]:
        """`data:` of the `error` event."""
        return error_body(self.kind, self.message)


@dataclass(eq=False)
class UpstreamError(StreamError):
    """The upstream refused, broke off, kept silent, or sent an `error` event.

    `cause` is for the operator, in our own words; it is None if only the client can mend the failure. `request_id` is
    the upstream's own name for the request, if it told one.
    """

    upstream_status: int | None = None
    cause: str | None = None
    request_id: str | None = None


@dataclass(eq=False)
class LimitError(StreamError):
    """A bound in bytes or streams was reached."""


def error_body(kind: str, message: str, field: str | None = None) -> dict[str, object]:
    """The one shape of an error, on a response and in an `error` event."""
    error: dict[str, object] = {"type": kind, "message": message}
    if field is not None:
        error["field"] = field
    return {"type": "error", "error": error}
