"""Logging: structlog for ourselves and for the libraries below us, JSON or console, to standard error.

An exception is logged as its type and where it was raised, never with its message: messages of libraries quote
what they were given (a request line with its query, a body that did not parse).

A line is rendered where it is said: what it names may have changed a moment later, and a buffer of bytes has a bound.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NoReturn

import structlog

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from types import TracebackType

    from structlog.typing import EventDict, WrappedLogger

    Render = Callable[[EventDict, str, str], bytes]
    Write = Callable[[bytes], object]


_log = structlog.get_logger("aisse.log")

CLEAR_LINE = "\r\x1b[2K"
"""To the beginning of a terminal's line, and nothing on it (ECMA-48, EL)."""


def configure(log_format: Literal["auto", "json", "console"], level: str, write: Write | None = None) -> None:
    """Sets logging up for the whole process. Safe to call again.

    `write` gets each line as bytes, its end included; it must neither wait nor raise. Without it lines go to standard
    error at once, which waits for whoever reads that.
    """
    render = _renderer(log_format)
    write = write or _write_now
    number = logging.getLevelNamesMapping()[level.upper()]

    def say(logger: WrappedLogger, method: str, event: EventDict) -> NoReturn:
        _write_event(event, method, logger.name)
        raise structlog.DropEvent

    def _write_event(event: EventDict, level: str, logger: str) -> None:
        try:
            line = render(event, level, logger)
        except Exception as error:
            # Of what cannot be rendered not even the text is safe to quote; and whoever logs must not fail of it.
            line = render({"event": "log line cannot be rendered", "exc_info": error}, "error", logger)
        write(line)

    structlog.configure(
        processors=[say],
        context_class=dict,
        logger_factory=_Name,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=False,
    )
    # What logging prints about a line that it could not write quotes the line's arguments.
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers[:] = [_Handler(_write_event)]
    root.setLevel(number)
    logging.captureWarnings(True)


def dropped_line(log_format: Literal["auto", "json", "console"]) -> Callable[[int], bytes]:
    """What makes of a number of lines the one that says that they were dropped."""
    render = _renderer(log_format)
    return lambda lines: render(
        {"event": "log lines were dropped: nobody read them, or there was no room", "lines": lines},
        "warning",
        "aisse.log",
    )


def unraisable(args: sys.UnraisableHookArgs) -> None:
    """For `sys.unraisablehook`: what a destructor or a callback from C raised."""
    _log.error("exception ignored", exc_info=args.exc_value)


def thread_failed(args: threading.ExceptHookArgs) -> None:
    """For `threading.excepthook`."""
    if args.exc_type is not SystemExit:
        _log.error("thread failed", exc_info=args.exc_value)


class _Name:
    """All that a logger of ours needs to have: what it says is written before it would be called."""

    __slots__ = ("name",)

    def __init__(self, name: str = "") -> None:
        self.name = name


class _Handler(logging.Handler):
    """Library lines are logged as their template: the arguments may be a path with its query, or a body."""

    def __init__(self, write_event: Callable[[EventDict, str, str], None]) -> None:
        super().__init__()
        self._write_event = write_event

    def emit(self, record: logging.LogRecord) -> None:
        event: EventDict = {"event": _template(record.name, str(record.msg))}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        self._write_event(event, record.levelname.lower(), record.name)


def _write_now(line: bytes) -> None:
    try:
        sys.stderr.write(line.decode())
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # there is nowhere left to say it


def _renderer(log_format: Literal["auto", "json", "console"]) -> Render:
    terminal = sys.stderr.isatty()
    if log_format == "json" or (log_format == "auto" and not terminal):
        # Non-ASCII is escaped: some of it ends lines for some readers, and some of it means something to terminals.
        encode = json.JSONEncoder(default=repr).encode

        def as_json(event: EventDict, level: str, logger: str) -> bytes:
            return encode(_completed(event, level, logger)).encode() + b"\n"

        return as_json

    pretty = structlog.dev.ConsoleRenderer(colors=terminal)
    # A drain's progress stands on the terminal's last line without an end; it is written again in a second.
    ahead = CLEAR_LINE if terminal else ""

    def for_people(event: EventDict, level: str, logger: str) -> bytes:
        line = pretty(None, level, _completed(event, level, logger))
        return f"{ahead}{line}\n".encode(errors="backslashreplace")

    return for_people


def _completed(event: EventDict, level: str, logger: str) -> EventDict:
    if "exc_info" in event:
        _exception_without_message(event)
    event["level"] = level
    event["logger"] = logger
    event["timestamp"] = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return event


def _template(logger: str, text: str) -> str:
    if logger == "asyncio":
        # The first line is the cause, the rest quotes objects; a callback is quoted with its arguments at once.
        text = text.partition("\n")[0]
        callback = re.match(r"(Exception in callback )(?:<[a-z -]+ )?([\w.]*)", text)
        return callback[1] + callback[2] if callback else text
    if logger == "py.warnings":
        # "file:line: category: message": pydantic's, for one, quote the value that they warn of.
        return ": ".join(text.split(": ", 2)[:2])
    return text


def _exception_without_message(event: EventDict) -> None:
    exc_info = event.pop("exc_info")
    if exc_info is True:
        exc_info = sys.exc_info()
    error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
    if isinstance(error, BaseException):
        event["exception"] = f"{type(error).__module__}.{type(error).__qualname__}"
        event["raised_at"] = _frames(error.__traceback__)


def _frames(trace: TracebackType | None) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)[-8:]]
