"""What a command prints, where nobody may read it or nothing can be written; and the exit codes of commands."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys

EX_CONFIG = 78  # sysexits.h: something was found unconfigured or misconfigured
EX_IOERR = 74  # sysexits.h: an error on some file

STDOUT, STDERR = 1, 2
"""The descriptors below sys.stdout and sys.stderr, for writing that must not wait."""

LAST_LINES_S = 1.0
"""How long a process that ends waits for its last lines to be written, where nobody seems to read them."""


def note(text: str) -> None:
    """Writes one line on standard error. Gives up after a second where nobody reads it."""
    poll = select.poll()
    poll.register(STDERR, select.POLLOUT)
    if not poll.poll(LAST_LINES_S * 1000):
        return
    try:
        print(f"aisse: {text}", file=sys.stderr, flush=True)
    except OSError:
        _into_nowhere(STDERR)


def show(text: str) -> None:
    """Writes lines on standard output at once. Where that is not possible, it ends the process.

    The exit code is 141 where nobody reads standard output any more, and 74 for every other reason.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        print(text, flush=True)
    except UnicodeEncodeError as error:
        # Others may read the text as a file. So no character is replaced by another one.
        note(f"standard output: {error.encoding} lacks a character; set PYTHONIOENCODING=utf-8")
        sys.exit(EX_IOERR)
    except OSError as error:
        _into_nowhere(STDOUT)
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)  # other programs end like this, too: `| head` has read what it wanted
        note(f"standard output: {error.strerror}")
        sys.exit(EX_IOERR)


def _into_nowhere(descriptor: int) -> None:
    """Puts /dev/null in place of a stream that failed.

    Otherwise the interpreter would write to it once more at its exit, and change the exit code.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
