"""Builds the parts and the aiohttp application, and starts and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from aiohttp import hdrs, web

import aisse
from aisse.errors import ConfigError, DrainingError, RequestError, StreamError, error_body
from aisse.formats.known import FORMATS
from aisse.routes import chat, operations, pages
from aisse.service.connection import SERVER, connections
from aisse.service.drain import Drain
from aisse.service.listener import Listener
from aisse.service.systemd import Notifier
from aisse.settings import log_kind
from aisse.streams.farewell import Farewell
from aisse.streams.registry import Registry
from aisse.upstream.client import Upstream
from aisse.upstream.keys import needs_key

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence

    from aiohttp.typedefs import Handler, Middleware

    from aisse.service.drain import Report
    from aisse.settings import Settings
    from aisse.streams.registry import OpenShared

Result = TypeVar("Result")

REGISTRY: web.AppKey[Registry] = web.AppKey("registry", Registry)
DRAIN: web.AppKey[Drain] = web.AppKey("drain", Drain)

# How long the rest of a refused body is read, so that the client gets to see the refusal.
_LINGERING_S = 2.0

# What aiohttp gives handlers that are still at work after the drain; then it cancels them and waits as long again.
_LAST_HANDLERS_S = 0.5

# How often a supervisor is told how many streams run.
_STATUS_S = 1.0

_log = structlog.get_logger("aisse.app")


def create_app(
    settings: Settings, upstream: Upstream, log_lines_dropped: Callable[[], int] = lambda: 0
) -> web.Application:
    """The application. Its runner needs `runner_arguments`; `serve` is both together.

    Starting it opens the upstream's session. Its shutdown drains, in a runner of anybody's: no new streams, running
    ones get `drain_s`, what is left then ends as `shutdown`. `log_lines_dropped` is what `/health` says of the log.
    """
    registry = Registry(settings, upstream, _shared_log(settings))
    farewell = Farewell(settings)
    drain = Drain(settings, registry, farewell)
    started = time.monotonic()

    async def parts(_app: web.Application) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            # Before each start: one that fails half way leaves nothing open either. The registry is closed first.
            stack.push_async_callback(upstream.close)
            await upstream.start()
            stack.push_async_callback(registry.close)
            await registry.start()
            yield

    async def shutdown(_app: web.Application) -> None:
        await drain.run()

    api = (f"{settings.base_path}/api/", "/api/")
    app = web.Application(middlewares=[_drained(registry, api), _errors], client_max_size=settings.max_body_bytes)
    app[REGISTRY] = registry
    app[DRAIN] = drain
    routes = [
        *chat.routes(settings, upstream.format, registry, farewell),
        *operations.routes(settings, registry, upstream.name, lambda: time.monotonic() - started, log_lines_dropped),
        *pages.routes(page=settings.page),
    ]
    asked_across = ("/api/chat", "/api/chat/{stream:[A-Za-z0-9_-]{22}}", "/api/chat/{stream:[A-Za-z0-9_-]{22}}/stop")
    preflight = _preflight(upstream.format.request_headers)
    routes += [web.options(path, preflight) for path in asked_across]
    app.add_routes(routes)
    if settings.base_path:
        app.add_routes(_below(settings.base_path, routes))
    app.on_response_prepare.append(_api_headers(settings.cors_origins, api))
    app.on_response_prepare.append(_server_header)
    app.on_shutdown.append(shutdown)
    app.cleanup_ctx.append(parts)
    return app


def _below(base_path: str, routes: list[web.RouteDef]) -> list[web.RouteDef]:
    """The same routes below `base_path`, for a proxy that leaves it; the path itself leads to the page."""

    async def to_page(request: web.Request) -> web.Response:
        query = request.rel_url.raw_query_string
        url = f"{base_path}/?{query}" if query else f"{base_path}/"
        # A redirect that browsers keep would outlive the setting.
        return web.Response(status=308, headers={hdrs.LOCATION: url, hdrs.CACHE_CONTROL: "no-cache"})

    below = [web.route(route.method, base_path + route.path, route.handler, **route.kwargs) for route in routes]
    return [*below, web.get(base_path, to_page)]


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
    connections are accepted. `sockets` are listened on in place of `host` and `port`; they stay open for whoever else
    holds them. `notifier` tells the supervisor; `report` is `Drain.run`'s, `log_lines_dropped` is
    `create_app`'s. Raises ConfigError where the start is not possible.
    """
    notifier = notifier or Notifier()
    async with contextlib.AsyncExitStack() as stack:
        address = await _unless_stopped(stop, _upstream_address(settings, stack))
        if address is None:
            return
        base_url, name = address
        key = key_for(base_url) if name is None else None
        if key is None and name is None and (variable := needs_key(base_url)) is not None:
            if base_url.startswith("http:"):
                raise ConfigError(f"upstream: keys go over TLS only; say https:// instead of {base_url}")
            raise ConfigError(f"upstream: {base_url} needs a key; set {variable}, or try `--upstream simulator`")
        upstream = Upstream(base_url, settings, FORMATS["anthropic"](settings), key=key, name=name)

        app = create_app(settings, upstream, log_lines_dropped)
        # Before the runner, so that it ends after the runner's cleanup: a watchdog has to be told through that, too.
        await stack.enter_async_context(_supervised(notifier, app[REGISTRY]))

        runner = web.AppRunner(
            app,
            handle_signals=False,  # aiohttp's would end the process in the middle of our own shutdown
            shutdown_timeout=_LAST_HANDLERS_S,
            **runner_arguments(settings),
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        assert runner.server is not None
        connection = connections(runner.server, runner_arguments(settings))
        listener = await Listener.open(connection, settings.host, settings.port, sockets)
        stack.push_async_callback(listener.close)
        url = listener.url
        if not settings.access_tokens:
            _log.warning("no access tokens are set: whoever reaches this address can start streams", url=url)
        _log.info("listening", url=url, upstream=upstream.name, version=aisse.__version__)
        announce(url, upstream.name)
        notifier.ready()

        await stop.wait()
        notifier.stopping()
        _log.info(
            "stopping",
            streams=app[REGISTRY].active_streams,
            readers=app[REGISTRY].readers,
            unready_s=settings.unready_s,
            drain_s=settings.drain_s,
        )

        await app[DRAIN].run(listener.close, report)
    _log.info("stopped")


async def _unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` returns, or None where `stop` is set before: a model may take a minute to load."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        stopped.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


@contextlib.asynccontextmanager
async def _supervised(notifier: Notifier, registry: Registry) -> AsyncIterator[None]:
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


async def _upstream_address(settings: Settings, stack: contextlib.AsyncExitStack) -> tuple[str, str | None]:
    """The base URL, and the name of the built-in upstream if it is one: started first, ended last."""
    if settings.upstream == "simulator":
        from aisse.simulator import Simulator  # noqa: PLC0415 - only where it is used

        simulator = Simulator()
        base_url = await simulator.start()
        stack.push_async_callback(simulator.close)
        return base_url, "simulator"
    if settings.upstream == "local":
        from aisse.local import LocalModel  # noqa: PLC0415 - an optional extra

        model = LocalModel()
        stack.push_async_callback(model.close)
        return await model.start(), "local"
    return settings.upstream, None


def _drained(registry: Registry, api: tuple[str, ...]) -> Middleware:
    """Has a drain wait for the API's requests, and closes their connections with their answers meanwhile.

    The API's are those whose path begins with one of `api`. The next request goes elsewhere then. Not those of health:
    once the listener is closed, connections from before alone can still tell how the drain goes.
    """

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith(api):
            return await handler(request)
        with registry.answering():
            response = await handler(request)
        # A stream's has begun by now, and never carries `Connection: close`.
        if registry.draining and not response.prepared:
            response.force_close()
        return response

    return answer


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure before a response has begun becomes JSON in the one shape of errors; one after it cuts it off."""
    try:
        return await handler(request)
    except Exception as error:
        if request.writer.output_size == 0:
            response = _answer_to(error, request.method)
            if request.content.exception() is not None:
                response.force_close()  # what follows the body is not understood
            return response
        # What we answered now would be taken for more of the body.
        if not isinstance(error, ConnectionError):
            _log.error("request failed after its response had begun", method=request.method, exc_info=error)
        # Not by raising, which aiohttp would log as an error once more. What is returned finds nobody to be sent to.
        request.protocol.force_close()
        return web.Response()


def _answer_to(error: Exception, method: str) -> web.Response:
    match error:
        case RequestError():
            response = web.json_response(error.body(), status=error.status)
            if error.status == 401:
                response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
            if error.retry_after_s is not None:
                response.headers[hdrs.RETRY_AFTER] = str(error.retry_after_s)
            if error.status == 408:
                response.force_close()
            if isinstance(error, DrainingError):
                # `Connection: close` does not tell a proxy that nothing was started: every answer has it meanwhile.
                response.headers["Aisse-Draining"] = "1"
        case StreamError():
            response = web.json_response(error.body(), status=error.status)
            if error.retry_after is not None:
                response.headers[hdrs.RETRY_AFTER] = error.retry_after
        case web.HTTPException():
            kind = "not_found_error" if error.status == 404 else "invalid_request_error"
            response = web.json_response(error_body(kind, error.reason), status=error.status)
            if hdrs.ALLOW in error.headers:
                response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        case _:
            _log.error("request failed", method=method, exc_info=error)
            response = web.json_response(error_body("api_error", "this request failed inside the server"), status=500)
    return response


def _api_headers(
    allowed: tuple[str, ...], api: tuple[str, ...]
) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Keeps responses out of caches, and lets pages of the allowed origins read them and how a stream is found."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        if not request.path.startswith(api):
            return
        # A 404 or 204 without it may be kept (RFC 9111, section 4.2.2), and what it says is soon no longer true.
        response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
        if not allowed:
            return
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin in allowed:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = (
                "Content-Location, Location, Retry-After, Aisse-Heartbeat"
            )

    return add


async def _server_header(_request: web.Request, response: web.StreamResponse) -> None:
    """Says who answers."""
    response.headers[hdrs.SERVER] = SERVER


def _preflight(of_format: Iterable[str]) -> Handler:
    """Fetch, section 3.3 "CORS-preflight": what may be asked; whether a page may is said by `_api_headers`."""
    ours = "Authorization, Content-Type, Accept, Cache-Control, Last-Event-ID, Idempotency-Key, Prefer, Aisse-On-Leave"
    headers = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, DELETE",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: ", ".join((ours, *of_format)),
        hdrs.ACCESS_CONTROL_MAX_AGE: "7200",
    }

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=204, headers=headers)

    return answer
