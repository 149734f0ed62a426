"""Who may start streams: access tokens and origins."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import TYPE_CHECKING

from aiohttp import hdrs

from aisse.errors import RequestError
from aisse.settings import is_loopback

if TYPE_CHECKING:
    from aiohttp import web

    from aisse.settings import Settings


class Access:
    """Checks requests against the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # They are compared as digests, because the time of compare_digest tells the length of what it compares.
        self._tokens = [_digest(token.get_secret_value()) for token in settings.access_tokens]

    def check(self, request: web.Request) -> bytes:
        """Whose `request` is: a digest of its access token, empty where none is needed.

        Raises RequestError: 403 where its page's origin may not start streams, 401 where it has no valid token.
        """
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and not is_allowed_origin(request, origin, self._settings):
            raise RequestError(403, "permission_error", "pages of this origin may not call this server", "Origin")
        if not self._tokens:
            return b""
        scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        given = _digest(token.strip())
        # Every token is compared, so that the time does not tell which one came close.
        matches = [hmac.compare_digest(given, known) for known in self._tokens]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestError(401, "authentication_error", "a valid access token is needed", "Authorization")
        return given


def is_allowed_origin(request: web.Request, origin: str, settings: Settings) -> bool:
    """Whether a page of `origin` may start streams: one of our own pages, or one of exactly those in `cors_origins`.

    We know our own pages by their host alone, because we do not see the scheme behind a proxy that ends TLS. Where
    neither a token nor `open` says who may call, only this machine's own names count as our host: any site can have
    its name lead here.
    """
    scheme, _, host = origin.partition("://")
    # Without the first two conditions, `null` would be our own origin for a request that names no host.
    own = scheme in {"http", "https"} and host != "" and host.lower() == request.headers.get(hdrs.HOST, "").lower()
    if own and not settings.access_tokens and not settings.open:
        name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
        own = is_loopback(name.strip("[]").lower())
    return own or origin in settings.cors_origins


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
