"""aisse.telemetry.log: what reaches standard error, and what never does."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import logging
import re
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import uvloop

from aisse.telemetry import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CANARY = "canary-4f1d"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Takes back what `configure` does to the whole process."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], level, logging.raiseExceptions = before
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[dict[str, Any]]]:
    """What was logged as JSON since the last call. Fails where a line is not JSON, or quotes the canary."""

    def read() -> list[dict[str, Any]]:
        text = capsys.readouterr().err
        assert CANARY not in text
        return [json.loads(line) for line in text.splitlines()]

    return read


class QuotingError(Exception):
    """As libraries' errors do, it says what it was given."""


def fail() -> None:
    raise QuotingError(f"cannot parse {CANARY}")


def fail_with(_text: str) -> None:
    fail()


# --- formats and levels ---------------------------------------------------------------------------------------


def test_line_as_json_has_its_fields(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.configure("json", "info")
    structlog.get_logger("aisse.part").info("stream ended", stream_id="abc", events=3)
    [line] = lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    assert line == {
        "event": "stream ended",
        "level": "info",
        "logger": "aisse.part",
        "stream_id": "abc",
        "events": 3,
    }


def test_line_with_line_ends_stays_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json", "info")
    structlog.get_logger("aisse").info("one\ntwo", value='a\r\n{"event":"forged"}\u2028')
    text = capsys.readouterr().err
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1


def test_line_on_the_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("console", "info")
    structlog.get_logger("aisse.part").warning("too slow", seconds=3)
    text = capsys.readouterr().err
    assert "too slow" in text
    assert "seconds=3" in text
    assert not text.startswith("{")
    assert "\x1b" not in text  # colours are for terminals, which this is not


def test_format_auto_without_a_terminal_is_json(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.configure("auto", "info")
    structlog.get_logger("aisse").info("hello")
    assert [line["event"] for line in lines()] == ["hello"]


def test_format_auto_on_a_terminal_is_console(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log.configure("auto", "info")
    structlog.get_logger("aisse").info("hello")
    assert "\x1b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
@pytest.mark.parametrize(
    "logger", [structlog.get_logger("aisse.x"), logging.getLogger("library.x")], ids=["own", "lib"]
)
def test_level_shows_itself_and_what_is_more_severe(
    lines: Callable[[], list[dict[str, Any]]], logger: Any, level: str, shown: list[str]
) -> None:
    log.configure("json", level)
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("said")
    assert [line["level"] for line in lines()] == shown


def test_configure_twice_writes_each_line_once(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.configure("json", "info")
    log.configure("json", "info")
    structlog.get_logger("aisse").info("hello")
    logging.getLogger("library").info("hello")
    assert len(lines()) == 2


# --- exceptions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("name", ["aisse.part", "library"])
def test_exception_is_logged_as_type_and_place_without_message(
    capsys: pytest.CaptureFixture[str], log_format: Any, name: str
) -> None:
    log.configure(log_format, "debug")
    logger = structlog.get_logger(name) if name.startswith("aisse") else logging.getLogger(name)
    try:
        try:
            fail()
        except QuotingError as error:
            raise ValueError(CANARY) from error
    except ValueError as error:
        kept = error
        logger.exception("in a handler")
        logger.debug("as a tuple", exc_info=sys.exc_info())
    logger.error("given", exc_info=kept)
    text = capsys.readouterr().err
    assert CANARY not in text
    assert text.count("builtins.ValueError") == 3
    assert text.count("test_log.py") == 3
    assert "Traceback" not in text


def test_exception_names_where_it_was_raised(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.configure("json", "info")
    try:
        fail()
    except QuotingError:
        structlog.get_logger("aisse").exception("failed")
    [line] = lines()
    assert line["exception"] == f"{QuotingError.__module__}.QuotingError"
    raised_at = line["raised_at"]
    assert re.fullmatch(r".*test_log\.py:\d+ fail", raised_at[-1])
    assert raised_at[0].endswith(" test_exception_names_where_it_was_raised")


def test_exception_without_one_at_work_is_only_its_line(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.configure("json", "info")
    structlog.get_logger("aisse").exception("nothing was raised")
    logging.getLogger("library").exception("nothing was raised")  # noqa: LOG004 - what libraries may do
    assert [line["event"] for line in lines()] == ["nothing was raised"] * 2


# --- what libraries log ---------------------------------------------------------------------------------------


def test_library_line_is_its_template_without_arguments(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.configure("json", "debug")
    logging.getLogger("aiohttp.server").error("Error handling request from %s: %r", "127.0.0.1", CANARY)
    logging.getLogger("aiohttp.server").debug("%(path)s", {"path": f"/?{CANARY}"})
    assert [line["event"] for line in lines()] == ["Error handling request from %s: %r", "%(path)s"]


def test_library_line_with_wrong_arguments_quotes_none(lines: Callable[[], list[dict[str, Any]]]) -> None:
    """Standard logging would print its own traceback, with the arguments."""
    log.configure("json", "debug")
    logging.getLogger("library").error("one %s of two %s", CANARY)  # noqa: PLE1206 - what libraries may do
    assert [line["event"] for line in lines()] == ["one %s of two %s"]


def test_line_that_cannot_be_written_is_not_quoted_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.configure("json", "debug")

    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            pass

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Full())
        logging.getLogger("library").error("what %s", CANARY)
        structlog.get_logger("aisse").error("what", value=CANARY)
    assert CANARY not in capsys.readouterr().err


class Unspeakable:
    def __repr__(self) -> str:
        raise QuotingError(f"cannot say {CANARY}")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_value_that_cannot_be_rendered_costs_its_line_and_nothing_else(
    capsys: pytest.CaptureFixture[str], log_format: Any
) -> None:
    log.configure(log_format, "info")
    structlog.get_logger("aisse").info("said", value=Unspeakable())
    structlog.get_logger("aisse").info("next")
    text = capsys.readouterr().err
    assert CANARY not in text
    assert "QuotingError" in text
    assert 0 <= text.index("log line cannot be rendered") < text.index("next")


# --- elsewhere than to standard error -------------------------------------------------------------------------


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_line_is_given_whole_to_whoever_writes(capsys: pytest.CaptureFixture[str], log_format: Any) -> None:
    written: list[bytes] = []
    log.configure(log_format, "info", written.append)
    structlog.get_logger("aisse").info("own", text="\udcff\u2028")
    logging.getLogger("library").info("theirs")
    assert [b"own" in written[0], b"theirs" in written[1]] == [True, True]
    assert all(line.endswith(b"\n") for line in written)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_number_of_dropped_lines_is_a_line_like_others(log_format: Any) -> None:
    line = log.dropped_line(log_format)(17).decode()
    assert line.endswith("\n")
    assert "log lines were dropped" in line
    assert "17" in line
    if log_format == "json":
        said = json.loads(line)
        assert (said["lines"], said["level"], said["logger"]) == (17, "warning", "aisse.log")


def test_thread_that_fails_is_logged_without_the_message(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.configure("json", "info")
    with hooked():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        leaving = threading.Thread(target=sys.exit)  # no failure
        leaving.start()
        leaving.join()
    (line,) = lines()
    assert line["event"] == "thread failed"
    assert line["exception"].endswith("QuotingError")
    assert line["raised_at"][-1].endswith(" fail")


def test_destructor_that_fails_is_logged_without_the_message(lines: Callable[[], list[dict[str, Any]]]) -> None:
    class Fails:
        def __del__(self) -> None:
            fail()

    log.configure("json", "info")
    with hooked():
        Fails()
        gc.collect()
    (line,) = lines()
    assert line["event"] == "exception ignored"
    assert line["exception"].endswith("QuotingError")


@contextlib.contextmanager
def hooked() -> Iterator[None]:
    """With what Python would print by itself in the log, as the command has it."""
    before = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = log.unraisable, log.thread_failed
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = before


def test_warning_is_logged_as_category_and_place_without_message(lines: Callable[[], list[dict[str, Any]]]) -> None:
    """pydantic's, for one, quote the value that they warn of."""
    log.configure("json", "debug")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"unexpected value {CANARY}\n: x: {CANARY}", UserWarning, stacklevel=1)
    [line] = lines()
    assert line["logger"] == "py.warnings"
    assert line["level"] == "warning"
    assert re.fullmatch(r".*test_log\.py:\d+: UserWarning", line["event"])


# --- what the event loop logs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
async def test_task_exception_never_retrieved_carries_no_message(
    lines: Callable[[], list[dict[str, Any]]], debug: bool
) -> None:
    asyncio.get_running_loop().set_debug(debug)
    log.configure("json", "debug")

    async def bug() -> None:
        fail()

    task = asyncio.create_task(bug(), name=f"task {CANARY}")
    await asyncio.wait([task])
    del task
    gc.collect()
    [line] = [line for line in lines() if line["level"] == "error"]
    assert line["logger"] == "asyncio"
    assert line["event"] == "Task exception was never retrieved"
    assert line["exception"].endswith("QuotingError")
    assert line["raised_at"][-1].endswith(" fail")


class Holder:
    def __repr__(self) -> str:
        return f"<Holder of {CANARY}>"

    def fail(self) -> None:
        fail()


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
@pytest.mark.parametrize(
    ("callback", "arguments", "name"),
    [
        (fail_with, (CANARY,), r"fail_with"),
        (functools.partial(fail_with, CANARY), (), r"functools\.partial|fail_with"),
        (Holder().fail, (), r"Holder\.fail"),
    ],
)
def test_callback_that_fails_is_named_without_its_arguments(
    lines: Callable[[], list[dict[str, Any]]],
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    callback: Callable[..., None],
    arguments: tuple[str, ...],
    name: str,
) -> None:
    log.configure("json", "debug")
    loop = new_loop()
    try:
        loop.call_soon(callback, *arguments)
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()
    [line] = [line for line in lines() if line["level"] == "error"]
    assert re.fullmatch(rf"Exception in callback ({name})", line["event"])
    assert line["exception"].endswith("QuotingError")


async def test_slow_callback_in_debug_mode_is_logged_without_its_arguments(
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0
    log.configure("json", "debug")
    loop.call_soon(str, CANARY)
    await asyncio.sleep(0)
    assert any(line["event"].startswith("Executing %") for line in lines())


async def test_context_of_an_exception_handler_is_not_quoted(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.configure("json", "debug")
    asyncio.get_running_loop().call_exception_handler(
        {"message": "Unclosed connection", "client_connection": f"Connection<{CANARY}>"}
    )
    assert [line["event"] for line in lines()] == ["Unclosed connection"]
