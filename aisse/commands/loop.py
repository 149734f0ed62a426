"""The event loop of a command's process, and the signals that stop it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs `main` to its end: on uvloop where that exists, else on asyncio's own loop."""
    try:
        import uvloop  # noqa: PLC0415 - it does not exist everywhere
    except ImportError:
        run_on_a_loop = asyncio.run
    else:
        run_on_a_loop = uvloop.run
    before = signal.getsignal(signal.SIGINT)
    try:
        run_on_a_loop(main)
    finally:
        # The loop leaves Python's own handler behind. It would print a traceback in the process's last milliseconds.
        signal.signal(signal.SIGINT, before)


def stop_on_signals(before_exit: Callable[[], object] = lambda: None) -> asyncio.Event:
    """Returns an event that the first SIGTERM, SIGINT or SIGHUP sets. A SIGTERM or SIGINT after it ends the process.

    That one calls `before_exit` and ends the process at once. A second SIGHUP does nothing: a terminal that closes
    sends two, its own and its shell's. A SIGHUP that is ignored at the start (nohup) stays ignored.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            before_exit()
            os._exit(128 + number)
        stop.set()
        # Ignored up to the end of the process. When the loop closes, its handler goes, and SIGHUP would end the
        # process in its last milliseconds.
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal, number)
    return stop
