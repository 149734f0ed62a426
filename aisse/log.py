"""Logging: structlog for ourselves and for the libraries below us, JSON or console, to standard error.

An exception is logged as its type and where it was raised, never with its message: messages of libraries quote
what they were given (a request line with its query, a body that did not parse).
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from typing import TYPE_CHECKING, Any, Literal

import structlog

if TYPE_CHECKING:
    from types import TracebackType

    from structlog.typing import EventDict, Processor, WrappedLogger


CLEAR_LINE = "\r\x1b[2K"
"""To the beginning of a terminal's line, and nothing on it (ECMA-48, EL)."""


def configure(log_format: Literal["auto", "json", "console"], level: str) -> None:
    """Sets logging up for the whole process. Safe to call again."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exception_without_message,
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if console else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    rendering: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
    if console and sys.stderr.isatty():
        rendering.append(_in_place_of_progress)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_without_arguments, *shared],
            processors=rendering,
            use_get_message=False,
        )
    )
    # What logging prints about a line that it could not write quotes the line's arguments.
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    logging.captureWarnings(True)


def _in_place_of_progress(_logger: WrappedLogger, _name: str, line: Any) -> Any:
    """A drain's progress stands on the terminal's last line without an end; it is written again in a second."""
    return CLEAR_LINE + line


def _without_arguments(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Library lines are logged as their template: the arguments may be a path with its query, or a body."""
    record = event.get("_record")
    if isinstance(record, logging.LogRecord):
        event["event"] = _template(record.name, str(record.msg))
        if record.exc_info:
            event["exc_info"] = record.exc_info
            # The formatter would otherwise print it again, with its message.
            record.exc_info = None
            record.exc_text = None
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


def _exception_without_message(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    exc_info = event.pop("exc_info", None)
    if exc_info is True:
        exc_info = sys.exc_info()
    error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
    if isinstance(error, BaseException):
        event["exception"] = f"{type(error).__module__}.{type(error).__qualname__}"
        event["raised_at"] = _frames(error.__traceback__)
    return event


def _frames(trace: TracebackType | None) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)[-8:]]
