"""Starts a program with descriptors as systemd passes them: from 3 on, and named in its environment."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence


class Passed(TypedDict):
    """What a call of subprocess needs besides the command line."""

    pass_fds: tuple[int, ...]


# Copies them out of the way first, so that none is overwritten, then becomes the program, whose process id stays this.
_LAUNCH = """
import fcntl, os, sys
passed = [int(number) for number in sys.argv[1].split(",") if number]
copies = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 100) for number in passed]
for number in passed:
    os.set_inheritable(number, number <= 2)
for number, copy in enumerate(copies, 3):
    os.dup2(copy, number, inheritable=True)
os.environ |= {"LISTEN_FDS": str(len(copies)), "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""


def activated(line: Sequence[str], *descriptors: int) -> tuple[list[str], Passed]:
    """The command line that starts `line` (its program as a path) with `descriptors`, and the arguments it needs."""
    return (
        [sys.executable, "-c", _LAUNCH, ",".join(map(str, descriptors)), *line],
        {"pass_fds": descriptors},
    )
