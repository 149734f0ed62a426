"""The listening sockets, our own or a supervisor's, and how they close without losing clients that just connected."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Self

from aisse.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# How many connections may wait to be accepted. With aiohttp's 128, one burst of readers that come back is refused.
_BACKLOG = 4096


class Listener:
    """Hands new connections to `factory`'s protocols, from `open` to `close`.

    Whoever has connected before the close is served:
    test_everybody_who_has_connected_is_answered_when_the_listener_closes.
    """

    def __init__(
        self, factory: Callable[[], asyncio.BaseProtocol], servers: Sequence[asyncio.Server], *, ours: bool
    ) -> None:
        self._factory = factory
        self._servers = servers
        self._ours = ours
        self.url = _url(servers[0].sockets[0].getsockname())
        """Where the first socket listens."""

    @classmethod
    async def open(
        cls,
        factory: Callable[[], asyncio.BaseProtocol],
        host: str,
        port: int,
        inherited: Sequence[socket.socket] = (),
    ) -> Self:
        """Listens on the `inherited` sockets, or on `host` and `port` if there are none. Raises ConfigError."""
        loop = asyncio.get_running_loop()
        servers: list[asyncio.Server] = []
        try:
            for sock in inherited:
                servers.append(await loop.create_server(factory, sock=sock, backlog=_BACKLOG))  # noqa: PERF401 - closed if one fails
            if not inherited:
                servers.append(await loop.create_server(factory, host, port, backlog=_BACKLOG))
        except (OSError, UnicodeError) as error:
            for server in servers:
                server.close()
            # A name that cannot be one does not get as far as the system.
            why = getattr(error, "strerror", None) or "that is no host name"
            what = "an inherited socket" if inherited else f"{host}:{port}"
            raise ConfigError(f"host, port: cannot listen on {what}: {why}") from None
        return cls(factory, servers, ours=not inherited)

    async def close(self) -> None:
        """Takes no further connections. Idempotent.

        Connections that wait in a socket of ours are accepted first. Closing the socket would reset them, and a proxy
        that has sent its POST by then cannot ask again. The loop would accept them only one at a time, between all
        other work. An inherited socket stays open for whoever holds it, and so do the connections that wait in it.
        """
        accepted: list[socket.socket] = []
        for server in self._servers:
            if self._ours:
                for sock in server.sockets:
                    # The loop shows an object that cannot accept. A socket made of its descriptor can.
                    with socket.socket(fileno=os.dup(sock.fileno())) as waiting:
                        accepted += _accept_all(waiting)
            # In the same step of the loop, so that hardly anybody connects in between.
            server.close()
        self._servers = ()
        loop = asyncio.get_running_loop()
        for sock in accepted:
            await loop.connect_accepted_socket(self._factory, sock)


def _accept_all(waiting: socket.socket) -> list[socket.socket]:
    waiting.setblocking(False)
    accepted: list[socket.socket] = []
    try:
        while len(accepted) < _BACKLOG:
            sock, _ = waiting.accept()
            sock.setblocking(False)
            accepted.append(sock)
    except OSError:
        pass  # nobody waits any more; or there are no descriptors left, and the rest is lost as it would have been
    return accepted


def _url(address: tuple[str, int] | str) -> str:
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
