"""`python -m aisse`, and the command `aisse`: what has to be done before anything else is imported.

Importing the rest takes half a second, and may open descriptors.
"""

import os
import signal
import sys


def main() -> None:
    """Runs the command that the process's arguments name; see `aisse.commands.cli.main`.

    Until a command has handlers of its own, Ctrl-C ends the process as it ends programs that are not written in Python:
    by the signal, and without a traceback.
    """
    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from aisse.commands import cli  # noqa: PLC0415 - not before what is above

    cli.main()


def _open_closed_streams() -> None:
    """Puts /dev/null in place of standard input, output and error where the parent closed them.

    Otherwise the next thing that is opened would get such a number. Log lines would go into a connection, and libuv
    aborts the process when it has to close a socket of that number. `sys.stdout` stays None, so that commands which
    print can tell.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - it stays open


if __name__ == "__main__":
    main()
