"""What systemd and its service say to each other: sd_notify(3) and sd_listen_fds(3), without systemd's library.

The caller passes the environment in, and systemd's variables are taken out of it. They are meant for this process: a
child that inherited them would speak in its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from typing import TYPE_CHECKING, Self

from aisse.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, MutableMapping

    from aisse.streams.registry import Registry

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START

# How often the supervisor is told how many streams run.
_STATUS_S = 1.0


class Notifier:
    """Tells the supervisor how the service is, each call in one datagram.

    Where there is no supervisor, no method does anything. None ever blocks or raises: a supervisor that is gone or busy
    must not harm the service (test_full_queue_never_blocks_and_only_delays_what_has_to_arrive,
    test_supervisor_that_went_away_harms_nobody). `alive_every_s` is how often `alive` has to be called, half of the
    watchdog's time, or None where there is no watchdog.
    """

    alive_every_s: float | None

    def __init__(self, address: str | None = None, alive_every_s: float | None = None) -> None:
        self.alive_every_s = alive_every_s
        self._address = address
        self._socket: socket.socket | None = None
        # What has to arrive, but found the supervisor's queue full. It is sent ahead of what is said next.
        self._unsent: list[str] = []
        if address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Self:
        """Takes NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID out of `environ`; ignores what is malformed."""
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds = environ.pop("WATCHDOG_USEC", "")
        watched = environ.pop("WATCHDOG_PID", str(os.getpid()))
        if address[:1] not in {"/", "@"}:  # it may be a vsock of a virtual machine's host, which is not for services
            return cls()
        # No more digits than a number of 64 bits has: a longer one is no time.
        watchdog = re.fullmatch(r"0*[1-9][0-9]{0,17}", microseconds) is not None and watched == str(os.getpid())
        return cls(
            "\0" + address[1:] if address.startswith("@") else address,  # "@" stands for the abstract namespace
            int(microseconds) / 2e6 if watchdog else None,
        )

    def ready(self) -> None:
        """Connections are accepted from now on."""
        self._send("READY=1", keep=True)

    def stopping(self) -> None:
        """The shutdown has begun."""
        self._send("STOPPING=1", keep=True)

    def status(self, text: str) -> None:
        """One line for people, which `systemctl status` shows."""
        self._send("STATUS=" + " ".join(text.split()))

    def alive(self) -> None:
        """The event loop runs. systemd restarts a process that has not said so for twice `alive_every_s`."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Nothing is sent from now on. Closing twice is harmless."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, assignment: str, *, keep: bool = False) -> None:
        if self._socket is None:
            return
        lines = [*self._unsent, assignment]
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address or "")
        except BlockingIOError:
            if keep:
                self._unsent = lines
        except OSError:
            pass  # the supervisor went away; the service goes on
        else:
            self._unsent.clear()


@contextlib.asynccontextmanager
async def supervised(notifier: Notifier, registry: Registry) -> AsyncIterator[None]:
    """Tells the supervisor that the event loop turns, and what it is busy with, as long as the block runs."""
    every_s = min(_STATUS_S, notifier.alive_every_s or _STATUS_S)

    async def tell() -> None:
        while True:
            notifier.alive()
            state = "draining: " if registry.draining else ""
            notifier.status(f"{state}{registry.active_streams} streams, {registry.readers} readers")
            await asyncio.sleep(every_s)

    task = asyncio.create_task(tell(), name="supervisor")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening sockets that systemd opened for this process, none if it was started otherwise.

    Takes LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES out of `environ`. Children do not inherit the sockets. Raises
    ConfigError for a descriptor that is no listening TCP socket.
    """
    count = environ.pop("LISTEN_FDS", "")
    meant_for = environ.pop("LISTEN_PID", "")
    environ.pop("LISTEN_FDNAMES", None)
    if meant_for != str(os.getpid()) or not count.isdecimal():
        return []
    sockets: list[socket.socket] = []
    for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count)):
        try:
            os.set_inheritable(descriptor, False)
            sockets.append(socket.socket(fileno=descriptor))
        except OSError:
            listens = False
        else:
            listens = _listens(sockets[-1])
        if not listens:
            for taken in sockets:
                taken.close()
            raise ConfigError(
                f"LISTEN_FDS: descriptor {descriptor} is no listening TCP socket; "
                "ListenStream= of the socket unit names an address and a port, and Accept= is no"
            )
    return sockets


def _listens(candidate: socket.socket) -> bool:
    return (
        candidate.family in {socket.AF_INET, socket.AF_INET6}
        and candidate.type == socket.SOCK_STREAM
        and candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    )
