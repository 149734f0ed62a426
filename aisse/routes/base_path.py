"""The same routes once more below `base_path`, for a proxy that leaves that path in its requests."""

from __future__ import annotations

from aiohttp import hdrs, web


def below(base_path: str, routes: list[web.RouteDef]) -> list[web.RouteDef]:
    """The routes, each with `base_path` in front. The path itself leads to the page."""

    async def to_page(request: web.Request) -> web.Response:
        query = request.rel_url.raw_query_string
        url = f"{base_path}/?{query}" if query else f"{base_path}/"
        # A redirect that browsers keep would outlive the setting.
        return web.Response(status=308, headers={hdrs.LOCATION: url, hdrs.CACHE_CONTROL: "no-cache"})

    copies = [web.route(route.method, base_path + route.path, route.handler, **route.kwargs) for route in routes]
    return [*copies, web.get(base_path, to_page)]
