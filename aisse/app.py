"""Builds the parts and the aiohttp application, and starts and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from aiohttp import web

import aisse
from aisse.errors import ConfigError
from aisse.formats.known import FORMATS
from aisse.routes import api, chat, operations, pages
from aisse.routes.base_path import below
from aisse.routes.errors import errors
from aisse.service.connection import connections, server_header
from aisse.service.drain import Drain
from aisse.service.listener import Listener
from aisse.service.systemd import Notifier, supervised
from aisse.settings import log_kind
from aisse.streams.farewell import Farewell
from aisse.streams.registry import Registry
from aisse.upstream.configured import configured

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from aisse.service.drain import Report
    from aisse.settings import Settings
    from aisse.streams.registry import OpenShared
    from aisse.upstream.client import Upstream

Result = TypeVar("Result")

REGISTRY: web.AppKey[Registry] = web.AppKey("registry", Registry)
DRAIN: web.AppKey[Drain] = web.AppKey("drain", Drain)

# How long the rest of a refused body is read. Without that the client would not get to see the refusal.
_LINGERING_S = 2.0

# How long aiohttp waits for handlers that still work after the drain. Then it cancels them and waits as long again.
_LAST_HANDLERS_S = 0.5

_log = structlog.get_logger("aisse.app")


def create_app(
    settings: Settings, upstream: Upstream, log_lines_dropped: Callable[[], int] = lambda: 0
) -> web.Application:
    """The application. Its runner needs `runner_arguments`; `serve` is both together.

    Starting it opens the upstream's session. Its shutdown drains, whoever's runner it is in: it takes no new streams,
    gives running ones `drain_s`, and ends what is left then as `shutdown`. `log_lines_dropped` gives what `/health`
    says of the log.
    """
    registry = Registry(settings, upstream, _shared_log(settings))
    farewell = Farewell(settings)
    drain = Drain(settings, registry, farewell)
    started = time.monotonic()

    async def parts(_app: web.Application) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            # Each part's close comes before its start, so that a start that fails half way leaves nothing open either.
            # The registry is closed first.
            stack.push_async_callback(upstream.close)
            await upstream.start()
            stack.push_async_callback(registry.close)
            await registry.start()
            yield

    async def shutdown(_app: web.Application) -> None:
        await drain.run()

    app = web.Application(
        middlewares=[api.drained(settings, registry), errors], client_max_size=settings.max_body_bytes
    )
    app[REGISTRY] = registry
    app[DRAIN] = drain
    routes = [
        *chat.routes(settings, upstream.format, registry, farewell),
        *operations.routes(settings, registry, upstream.name, lambda: time.monotonic() - started, log_lines_dropped),
        *pages.routes(page=settings.page),
        *api.preflights(upstream.format.request_headers),
    ]
    app.add_routes(routes)
    if settings.base_path:
        app.add_routes(below(settings.base_path, routes))
    app.on_response_prepare.append(api.headers(settings))
    app.on_response_prepare.append(server_header)
    app.on_shutdown.append(shutdown)
    app.cleanup_ctx.append(parts)
    return app


def _shared_log(settings: Settings) -> OpenShared | None:
    if log_kind(settings) == "memory":
        return None
    try:
        from aisse.streams.shared import Shared  # noqa: PLC0415 - an optional extra
    except ModuleNotFoundError:
        raise ConfigError(f"log: {log_kind(settings)}:// needs the package redis: pip install 'aisse[redis]'") from None
    return Shared


def runner_arguments(settings: Settings) -> dict[str, Any]:
    """What every runner of `create_app`'s application has to be given."""
    return {
        "access_log": None,  # it would log query strings
        "auto_decompress": False,  # it happens before client_max_size is checked
        "handler_cancellation": True,  # a reader that leaves is known at once
        "keepalive_timeout": settings.keep_alive_s,
        "lingering_time": _LINGERING_S,
    }


async def serve(
    settings: Settings,
    stop: asyncio.Event,
    *,
    key_for: Callable[[str], str | None],
    announce: Callable[[str, str], None],
    notifier: Notifier | None = None,
    sockets: Sequence[socket.socket] = (),
    report: Report | None = None,
    log_lines_dropped: Callable[[], int] = lambda: 0,
) -> None:
    """Serves until `stop` is set, then drains: it returns `unready_s` + `drain_s` + 2 s later at the latest.

    `key_for` gives the key that belongs to a base URL. `announce` gets our own URL and the upstream's name once
    connections are accepted. The server listens on `sockets` in place of `host` and `port`, and leaves them open for
    whoever else holds them. `notifier` tells the supervisor; `report` is `Drain.run`'s, `log_lines_dropped` is
    `create_app`'s. Raises ConfigError where the start is not possible.
    """
    notifier = notifier or Notifier()
    async with contextlib.AsyncExitStack() as stack:
        wire_format = FORMATS["anthropic"](settings)
        upstream = await _unless_stopped(stop, stack.enter_async_context(configured(settings, wire_format, key_for)))
        if upstream is None:
            return
        app = create_app(settings, upstream, log_lines_dropped)
        registry = app[REGISTRY]
        # Before the runner, so that it ends after the runner's cleanup: a watchdog has to be told through that, too.
        await stack.enter_async_context(supervised(notifier, registry))
        listener = await stack.enter_async_context(_listening(app, settings, sockets))
        if not settings.access_tokens:
            _log.warning("no access tokens are set: whoever reaches this address can start streams", url=listener.url)
        _log.info("listening", url=listener.url, upstream=upstream.name, version=aisse.__version__)
        announce(listener.url, upstream.name)
        notifier.ready()

        await stop.wait()
        notifier.stopping()
        _log.info(
            "stopping",
            streams=registry.active_streams,
            readers=registry.readers,
            unready_s=settings.unready_s,
            drain_s=settings.drain_s,
        )
        await app[DRAIN].run(listener.close, report)
    _log.info("stopped")


@contextlib.asynccontextmanager
async def _listening(
    app: web.Application, settings: Settings, sockets: Sequence[socket.socket]
) -> AsyncIterator[Listener]:
    """Starts the application and takes connections for it. At the end of the block both are over."""
    arguments = runner_arguments(settings)
    runner = web.AppRunner(
        app,
        handle_signals=False,  # aiohttp's would end the process in the middle of our own shutdown
        shutdown_timeout=_LAST_HANDLERS_S,
        **arguments,
    )
    await runner.setup()
    try:
        assert runner.server is not None
        listener = await Listener.open(connections(runner.server, arguments), settings.host, settings.port, sockets)
        try:
            yield listener
        finally:
            await listener.close()
    finally:
        await runner.cleanup()


async def _unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` returns, or None if `stop` is set before it does: a model may take a minute to load."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        stopped.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
