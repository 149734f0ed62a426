"""The browser client, and the page at `/` with what it loads."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from importlib.resources.abc import Traversable

_CLIENT = {"aisse.js": "text/javascript", "aisse.d.ts": "text/plain"}
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript"}

# Nothing from elsewhere, nothing inline: text that a model wrote stays text even if the page had a bug.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def routes(*, page: bool) -> list[web.RouteDef]:
    """GET and HEAD of the client and, with `page`, of the page's files, read once, here.

    A new version of them is seen at the next load.
    """
    folder = resources.files("aisse") / "web"
    # Pages of any origin may load the client; whether they may call the API is for `cors_origins` to say.
    found = [(f"/{name}", folder / name, kind, {"Access-Control-Allow-Origin": "*"}) for name, kind in _CLIENT.items()]
    if page:
        found += [("/" if path == "/index.html" else path, file, kind, {}) for path, file, kind in _page_files(folder)]
    return [web.get(path, _serving(file.read_bytes(), kind, headers)) for path, file, kind, headers in found]


def _page_files(folder: Traversable, path: str = "") -> Iterator[tuple[str, Traversable, str]]:
    for file in folder.iterdir():
        if file.is_dir():
            yield from _page_files(file, f"{path}/{file.name}")
        elif file.name not in _CLIENT and (kind := _KINDS.get(PurePosixPath(file.name).suffix)):
            yield f"{path}/{file.name}", file, kind


def _serving(
    body: bytes, content_type: str, more: Mapping[str, str]
) -> Callable[[web.Request], Awaitable[web.Response]]:
    tag = hashlib.sha256(body).hexdigest()[:32]
    headers = {
        hdrs.CACHE_CONTROL: "no-cache",
        hdrs.ETAG: f'"{tag}"',
        "Content-Security-Policy": _POLICY,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        **more,
    }

    async def serve(request: web.Request) -> web.Response:
        if any(known.value in (tag, "*") for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)

    return serve
