"""Logging: structlog for ourselves and for the libraries below us, JSON or console, to standard error.

An exception is logged as its type and the place where it was raised, never with its message: messages of libraries
quote what they were given (a request line with its query, a body that did not parse).

A line is rendered at once, before it waits for its turn to be written. The objects in it may change a moment later, and
only a buffer of bytes has a bound.
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
"""Moves a terminal's cursor to the beginning of the line, and clears the line (ECMA-48, EL)."""


def configure(log_format: Literal["auto", "json", "console"], level: str, write: Write | None = None) -> None:
    """Sets logging up for the whole process. Safe to call again.

    `write` gets each line as bytes, its end included; it must neither wait nor raise. Without it, lines go to standard
    error directly, and every caller waits for whoever reads that.
    """
    render = _renderer(log_format)
    write = write or _to_standard_error
    least = logging.getLevelNamesMapping()[level.upper()]

    def our_line(logger: WrappedLogger, method: str, event: EventDict) -> NoReturn:
        write_line(event, method, logger.name)
        raise structlog.DropEvent

    def write_line(event: EventDict, level: str, logger: str) -> None:
        try:
            line = render(event, level, logger)
        except Exception as error:
            # Not even the text of such a line is safe to quote. And whoever logs must not fail because of it.
            line = render({"event": "log line cannot be rendered", "exc_info": error}, "error", logger)
        write(line)

    structlog.configure(
        processors=[our_line],
        context_class=dict,
        logger_factory=_Logger,
        wrapper_class=structlog.make_filtering_bound_logger(least),
        cache_logger_on_first_use=False,
    )
    # Otherwise logging would report a line that it could not write, and quote the arguments of that line.
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers[:] = [_LibraryLines(write_line)]
    root.setLevel(least)
    logging.captureWarnings(True)


def dropped_line(log_format: Literal["auto", "json", "console"]) -> Callable[[int], bytes]:
    """Gives what makes the line which says how many lines were dropped."""
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


class _Logger:
    """What structlog wraps. It needs a name and nothing more: a line is written before this would be called."""

    __slots__ = ("name",)

    def __init__(self, name: str = "") -> None:
        self.name = name


class _LibraryLines(logging.Handler):
    """Logs what libraries say as its template alone: the arguments may be a path with its query, or a body."""

    def __init__(self, write_line: Callable[[EventDict, str, str], None]) -> None:
        super().__init__()
        self._write_line = write_line

    def emit(self, record: logging.LogRecord) -> None:
        event: EventDict = {"event": _template(record.name, str(record.msg))}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        self._write_line(event, record.levelname.lower(), record.name)


def _to_standard_error(line: bytes) -> None:
    try:
        sys.stderr.write(line.decode())
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # there is nowhere left to say it


def _renderer(log_format: Literal["auto", "json", "console"]) -> Render:
    terminal = sys.stderr.isatty()
    if log_format == "json" or (log_format == "auto" and not terminal):
        # Non-ASCII is escaped. Some characters end a line for some readers of logs, and some are commands to terminals.
        encode = json.JSONEncoder(default=repr).encode

        def as_json(event: EventDict, level: str, logger: str) -> bytes:
            return encode(_completed(event, level, logger)).encode() + b"\n"

        return as_json

    pretty = structlog.dev.ConsoleRenderer(colors=terminal)
    # A drain's progress stands in the terminal's last line, without a line end. It comes again within a second.
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
        # The first line is the cause, and the rest quotes objects. A callback is quoted with its arguments even there.
        text = text.partition("\n")[0]
        callback = re.match(r"(Exception in callback )(?:<[a-z -]+ )?([\w.]*)", text)
        return callback[1] + callback[2] if callback else text
    if logger == "py.warnings":
        # "file:line: category: message". The messages of pydantic, for one, quote the value that they warn of.
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
