"""The upstream that the settings name: an API elsewhere, or a server of our own that has to be started first."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from aisse.upstream.client import Upstream
from aisse.upstream.keys import check_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aisse.formats.format import Format
    from aisse.local import LocalModel
    from aisse.settings import Settings
    from aisse.simulator import Simulator


@contextlib.asynccontextmanager
async def configured(
    settings: Settings, wire_format: Format, key_for: Callable[[str], str | None]
) -> AsyncIterator[Upstream]:
    """Gives the upstream, which its user has to start and close. A server of our own runs as long as the block does.

    It speaks `wire_format`. `key_for` gives the key that belongs to a base URL. Raises ConfigError where a key is
    missing, or where our own server cannot be started.
    """
    own = _own_server(settings.upstream)
    if own is None:
        key = key_for(settings.upstream)
        check_key(settings.upstream, key)
        yield Upstream(settings.upstream, settings, wire_format, key=key)
        return
    try:
        yield Upstream(await own.start(), settings, wire_format, name=settings.upstream)
    finally:
        await own.close()


def _own_server(name: str) -> Simulator | LocalModel | None:
    match name:
        case "simulator":
            from aisse.simulator import Simulator  # noqa: PLC0415 - only where it is used

            return Simulator()
        case "local":
            from aisse.local import LocalModel  # noqa: PLC0415 - an optional extra

            return LocalModel()
        case _:
            return None
