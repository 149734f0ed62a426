"""The page at `/` and what it loads."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_FILES = (
    ("/", "index.html", "text/html"),
    ("/chat.js", "chat.js", "text/javascript"),
    ("/style.css", "style.css", "text/css"),
)

# Nothing from elsewhere, nothing inline: text that a model wrote stays text even if the page had a bug.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes() -> list[web.RouteDef]:
    """GET and HEAD of exactly these files, read once, here; a new version of them is seen at the next load."""
    folder = resources.files("aisse") / "web"
    return [web.get(path, _serving((folder / name).read_bytes(), kind)) for path, name, kind in _FILES]


def _serving(body: bytes, content_type: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    tag = hashlib.sha256(body).hexdigest()[:32]
    headers = {
        hdrs.CACHE_CONTROL: "no-cache",
        hdrs.ETAG: f'"{tag}"',
        "Content-Security-Policy": _POLICY,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def serve(request: web.Request) -> web.Response:
        if any(known.value in (tag, "*") for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)

    return serve
