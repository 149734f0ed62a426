"""`aisse serve`: the server as a process, with its log, its signals and its supervisor."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

import structlog

import aisse
from aisse import app
from aisse.commands import flags, loop
from aisse.commands.output import LAST_LINES_S, STDERR, STDOUT
from aisse.commands.sources import load
from aisse.errors import ConfigError
from aisse.service.systemd import Notifier, inherited_sockets
from aisse.settings import is_loopback
from aisse.telemetry import log
from aisse.telemetry.logwriter import LogWriter
from aisse.upstream.keys import key_for

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from aisse.commands.sources import Loaded
    from aisse.settings import Settings

# How long the last lines are waited for at a second signal, which is to end the process at once.
_LAST_LINES_AT_ONCE_S = 0.2

# More than all that is ever said on standard output.
_OUTPUT_BYTES = 1 << 20

# What a process needs besides two descriptors a stream: the log, the loop, the listener, spare ones for probes.
SPARE_DESCRIPTORS = 64

_BUILT_IN = {
    "simulator": " (built in: no key, no network, scripted answers)",
    "local": " (a small model on this machine: no key, no network)",
}


def add(new_parser: flags.NewParser, loaded: Loaded | None) -> None:
    """Adds the command."""
    flags.add_settings_command(new_parser, "serve", "run the server", _run, loaded)


def _run(given: dict[str, Any], file: Path | None) -> None:
    settings = load(given, os.environ, file).settings
    with _logging(settings) as writer:
        _serve(settings, writer)


@contextlib.contextmanager
def _logging(settings: Settings) -> Iterator[LogWriter]:
    """Logs through a thread while the block runs, so that nobody waits for a reader of the log.

    What Python would print by itself goes the same way. At the end the last lines are written, also why the block
    failed. That takes a second at most.
    """
    writer = LogWriter(STDERR, int(settings.log_buffer_bytes), log.dropped_line(settings.log_format))
    log.configure(settings.log_format, settings.log_level, writer.put)
    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = log.unraisable, log.thread_failed
    try:
        yield writer
    except ConfigError:
        raise
    except Exception:
        writer.put(traceback.format_exc().encode(errors="backslashreplace"))
        sys.exit(1)
    finally:
        sys.unraisablehook, threading.excepthook = hooks
        writer.close(LAST_LINES_S)


def _serve(settings: Settings, writer: LogWriter) -> None:
    raise_descriptor_limit(settings.max_streams)
    # Through a thread, too: who does not read standard output must not keep the server from its work.
    output = LogWriter(STDOUT, _OUTPUT_BYTES)

    def key(base_url: str) -> str | None:
        found = key_for(base_url, settings, os.environ)
        return found[0] if found is not None else None

    def announce(url: str, upstream: str) -> None:
        explained = _BUILT_IN.get(upstream, "")
        output.put(f"aisse {aisse.__version__} on {url}\nupstream: {upstream}{explained}\n".encode())

    notifier = Notifier.from_environment(os.environ)
    sockets = inherited_sockets(os.environ)
    _check_addresses(sockets, settings)

    async def run() -> None:
        await app.serve(
            settings,
            loop.stop_on_signals(before_exit=lambda: writer.close(_LAST_LINES_AT_ONCE_S)),
            key_for=key,
            announce=announce,
            notifier=notifier,
            sockets=sockets,
            report=_progress_on_terminal(writer) if sys.stderr.isatty() else None,
            log_lines_dropped=lambda: writer.dropped,
        )

    try:
        with contextlib.closing(notifier):
            loop.run(run())
    finally:
        output.close(_LAST_LINES_AT_ONCE_S)


def _check_addresses(sockets: list[socket.socket], settings: Settings) -> None:
    """Holds inherited sockets to what the settings require of `host`. Raises ConfigError."""
    if settings.open or settings.access_tokens:
        return
    for inherited in sockets:
        if not is_loopback(inherited.getsockname()[0]):
            raise ConfigError(
                "LISTEN_FDS: beyond loopback anybody could start streams; set AISSE_ACCESS_TOKENS, or say --open"
            )


def _progress_on_terminal(writer: LogWriter) -> Callable[[int, int, float], None]:
    """Reports a drain in one line that is written anew each second. Two hundred lines would bury everything else."""

    def progress(streams: int, readers: int, left_s: float) -> None:
        text = f"draining: {streams} streams, {readers} readers, {left_s:.0f} s left" if streams or readers else ""
        if writer.idle:  # a line that waits would be out of date when it is written
            writer.put((log.CLEAR_LINE + text).encode())

    return progress


def raise_descriptor_limit(max_streams: int) -> None:
    """Raises the limit of open files as far as it goes, and logs a warning where that is not enough.

    A stream needs two descriptors: its reader's and its upstream's.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < 2 * max_streams + SPARE_DESCRIPTORS:
        # Users filter their logs by this name. It stays, wherever the module is.
        structlog.get_logger("aisse.cli").warning(
            "too few open files for max_streams; raise the limit (LimitNOFILE, ulimit -n) or lower max_streams",
            open_files=hard,
            needed=2 * max_streams + SPARE_DESCRIPTORS,
        )
