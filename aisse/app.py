"""Builds the parts and the aiohttp application, and starts and stops them in order."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import hdrs, web

import aisse
from aisse.errors import ConfigError, RequestError, StreamError, error_body
from aisse.registry import Registry
from aisse.routes import chat, operations, pages
from aisse.upstream import Upstream, needs_key

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aisse.settings import Settings

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REGISTRY: web.AppKey[Registry] = web.AppKey("registry", Registry)

# Connections that wait to be accepted. aiohttp's 128 is refused away by one burst of reconnecting readers.
_BACKLOG = 4096

# How long the rest of a refused body is read, so that the client gets to see the refusal.
_LINGERING_S = 2.0

_log = structlog.get_logger("aisse.app")


def create_app(settings: Settings, upstream: Upstream) -> web.Application:
    """The application. Its runner needs `runner_arguments`; `serve` is both together.

    Starting it opens the upstream's session; its shutdown ends every stream that still runs as `shutdown`.
    """
    registry = Registry(settings, upstream)
    started = time.monotonic()

    async def parts(_app: web.Application) -> AsyncIterator[None]:
        await upstream.start()
        await registry.start()
        yield
        await registry.close()
        await upstream.close()

    async def shutdown(_app: web.Application) -> None:
        await registry.close()

    app = web.Application(middlewares=[_errors], client_max_size=settings.max_body_bytes)
    app[REGISTRY] = registry
    app.add_routes(chat.routes(settings, registry))
    app.add_routes(operations.routes(settings, registry, upstream.name, lambda: time.monotonic() - started))
    app.add_routes(pages.routes())
    for path in ("/api/chat", "/api/chat/{stream:[A-Za-z0-9_-]{22}}"):
        app.router.add_route("OPTIONS", path, _preflight)
    app.on_response_prepare.append(_cors(settings.cors_origins))
    app.on_shutdown.append(shutdown)
    app.cleanup_ctx.append(parts)
    return app


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
) -> None:
    """Serves until `stop` is set, then lets running streams end for at most `drain_s`.

    `key_for` gives the key that belongs to a base URL. `announce` gets our own URL and the upstream's name once
    connections are accepted. Raises ConfigError where the start is not possible.
    """
    async with contextlib.AsyncExitStack() as stack:
        base_url, name = await _upstream_address(settings, stack)
        key = key_for(base_url) if name is None else None
        if key is None and name is None and (variable := needs_key(base_url)) is not None:
            if base_url.startswith("http:"):
                raise ConfigError(f"upstream: keys go over TLS only; say https:// instead of {base_url}")
            raise ConfigError(f"upstream: {base_url} needs a key; set {variable}, or try `--upstream simulator`")
        upstream = Upstream(base_url, settings, key=key, name=name)

        runner = web.AppRunner(
            create_app(settings, upstream),
            handle_signals=False,  # aiohttp's would end the process in the middle of our own shutdown
            shutdown_timeout=5.0,
            **runner_arguments(settings),
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        _check_limits(runner, settings)
        site = web.TCPSite(runner, settings.host, settings.port, backlog=_BACKLOG)
        try:
            await site.start()
        except (OSError, UnicodeError) as error:
            # A name that cannot be one does not get as far as the system.
            why = getattr(error, "strerror", None) or "that is no host name"
            raise ConfigError(f"host, port: cannot listen on {settings.host}:{settings.port}: {why}") from None
        host, port = runner.addresses[0][:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if not settings.access_tokens:
            _log.warning("no access tokens are set: whoever reaches this address can start streams", url=url)
        _log.info("listening", url=url, upstream=upstream.name, version=aisse.__version__)
        announce(url, upstream.name)

        await stop.wait()
        _log.info("stopping", drain_s=settings.drain_s)
        await site.stop()
        await runner.app[REGISTRY].drain(settings.drain_s)
    _log.info("stopped")


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


def _check_limits(runner: web.AppRunner, settings: Settings) -> None:
    # aiohttp meets an argument that it does not know by dropping all of them, with no more than a warning.
    assert runner.server is not None
    handler = runner.server()
    if handler.keepalive_timeout != settings.keep_alive_s or handler._lingering_time != _LINGERING_S:  # noqa: SLF001 - no public way to ask
        raise AssertionError("aiohttp did not take the limits that it was given")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure before a response has begun becomes JSON in the one shape of errors; one after it cuts it off."""
    try:
        return await handler(request)
    except Exception as error:
        if request.writer.output_size == 0:
            return _answer_to(error, request.method)
        # What we answered now would be taken for more of the body. This makes aiohttp close the connection.
        if not isinstance(error, ConnectionError):
            _log.error("request failed after its response had begun", method=request.method, exc_info=error)
        raise ConnectionResetError from error


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


def _cors(allowed: tuple[str, ...]) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Lets pages of the allowed origins read our responses, and the headers that a stream is found by."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        if not allowed or not request.path.startswith("/api/"):
            return
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin in allowed:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = "Content-Location, Location, Retry-After"

    return add


async def _preflight(_request: web.Request) -> web.Response:
    """Fetch, section 3.3 "CORS-preflight": what may be asked; whether a page may is said by `_cors`."""
    return web.Response(
        status=204,
        headers={
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, DELETE",
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: (
                "Authorization, Content-Type, Accept, Cache-Control, "
                "Last-Event-ID, Idempotency-Key, Prefer, Aisse-On-Leave"
            ),
            hdrs.ACCESS_CONTROL_MAX_AGE: "7200",
        },
    )
