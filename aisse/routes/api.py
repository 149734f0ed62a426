"""What every request to the API has in common, whichever route it takes: its headers, CORS, and that a drain waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import hdrs, web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aiohttp.typedefs import Handler, Middleware

    from aisse.settings import Settings
    from aisse.streams.registry import Registry

# What pages of other sites may ask for.
_ACROSS_ORIGINS = (
    "/api/chat",
    "/api/chat/{stream:[A-Za-z0-9_-]{22}}",
    "/api/chat/{stream:[A-Za-z0-9_-]{22}}/stop",
)


def drained(settings: Settings, registry: Registry) -> Middleware:
    """Has a drain wait for the API's requests. During it, each answer closes its connection.

    The next request goes elsewhere then. Requests for health keep their connections: once the listener is closed, only
    connections from before can still tell how the drain goes.
    """
    api = _paths(settings)

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith(api):
            return await handler(request)
        with registry.answering():
            response = await handler(request)
        # A stream's response has begun by now, and never carries `Connection: close`.
        if registry.draining and not response.prepared:
            response.force_close()
        return response

    return answer


def headers(settings: Settings) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """For `on_response_prepare`: keeps responses out of caches, and lets pages of `cors_origins` read them."""
    api = _paths(settings)
    allowed = settings.cors_origins

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        if not request.path.startswith(api):
            return
        # Caches may keep a 404 or 204 without it (RFC 9111, section 4.2.2), and what those say is soon no longer true.
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


def preflights(of_format: Iterable[str]) -> list[web.RouteDef]:
    """OPTIONS of what pages of other sites may ask for (Fetch, section 3.3 "CORS-preflight").

    They say what may be asked, with the headers `of_format` among it. Whether this page may ask is said by `headers`.
    """
    ours = "Authorization, Content-Type, Accept, Cache-Control, Last-Event-ID, Idempotency-Key, Prefer, Aisse-On-Leave"
    allowed = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, DELETE",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: ", ".join((ours, *of_format)),
        hdrs.ACCESS_CONTROL_MAX_AGE: "7200",
    }

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=204, headers=allowed)

    return [web.options(path, answer) for path in _ACROSS_ORIGINS]


def _paths(settings: Settings) -> tuple[str, ...]:
    """What the paths of the API's requests begin with."""
    return f"{settings.base_path}/api/", "/api/"
