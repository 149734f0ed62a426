"""A question's body as it comes: it is bounded, counted, and looked at piece by piece, so that no step takes long."""

from __future__ import annotations

import asyncio
import codecs
from typing import TYPE_CHECKING, Protocol

from aiohttp import hdrs, web

from aisse.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aisse.settings import Settings
    from aisse.upstream.question import Hold

# A parser takes 8 ms for 32 MiB of plain text. What takes it longer would hold everybody up, and is bounded, far beyond
# what a model reads. Values are counted by the commas, `[` and `{` outside of strings: ten thousand messages of three
# blocks each have as many as this, photos have a handful. The last bound is for all that is outside of strings,
# whitespace and numbers above all.
MAX_VALUES = 200_000
MAX_BACKSLASHES = 2_000_000
MAX_OUTSIDE_BYTES = 4 << 20

# How much is looked at before others get a turn. If it is all quotes, that takes 2 ms.
STEP_BYTES = 64 << 10

# A name up to this long is taken. A longer one is refused. Its escapes do not count in the steps in which it begins
# and ends, so that only one beyond three steps is refused for certain.
MAX_NAME_BYTES = 32 << 10

# A body has `body_s` to arrive, and a second more for each 64 KiB that have come: 32 MiB from a phone take minutes.
_EXTENDING_BYTES = 64 << 10

_WHITESPACE = b" \t\r\n"


class Digest(Protocol):
    """A hash as hashlib has them."""

    def update(self, data: bytes, /) -> None:
        """Adds what has come."""


async def read_body(request: web.Request, settings: Settings, hold: Hold, digest: Digest | None) -> bytearray:
    """The whole body. It is counted in `hold` as it comes, and added to `digest`.

    Raises RequestError where it is refused: what is returned is UTF-8, and no parser needs long for it, see MAX_VALUES
    and those below it.
    """
    # It grows in place, because to join the pieces of 32 MiB at the end would take 20 ms.
    body = bytearray()
    look = Look()

    async def take(piece: bytes) -> None:
        nonlocal body
        hold.grow(len(piece))
        if digest is not None:
            digest.update(piece)
        body += piece
        look.at(piece)
        while look.behind:
            look.go_on(body)
            await asyncio.sleep(0)

    await _receive(request, settings, take)
    look.end()
    return body


async def read_away(request: web.Request, settings: Settings) -> None:
    """Reads a body that nobody needs. Raises RequestError as `read_body` does, but not for what the body says."""

    async def take(_piece: bytes) -> None:
        pass

    await _receive(request, settings, take)


async def _receive(request: web.Request, settings: Settings, take: Callable[[bytes], Awaitable[None]]) -> None:
    """Gives the whole body to `take`. Nothing is answered before, since an unread body hides that its client left."""
    if request.content_type != "application/json":
        raise RequestError(415, "invalid_request_error", "must be application/json", "Content-Type")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise RequestError(415, "invalid_request_error", "compressed bodies are not taken", "Content-Encoding")
    too_large = RequestError(413, "request_too_large", f"must be at most {settings.max_body_bytes} bytes", "body")
    if request.content_length is not None and request.content_length > settings.max_body_bytes:
        raise too_large
    size = 0
    try:
        async with asyncio.timeout(settings.body_s) as limit:
            first_deadline = limit.when() or 0.0
            # It is not read by request.read(), which keeps the body for as long as the connection lives.
            async for piece in request.content.iter_any():
                if size:
                    # aiohttp gives out what has come already without a pause: chunks of one byte for 30 ms.
                    await asyncio.sleep(0)
                more_s = (size + len(piece)) // _EXTENDING_BYTES
                if more_s > size // _EXTENDING_BYTES:
                    limit.reschedule(first_deadline + more_s)
                size += len(piece)
                if size > settings.max_body_bytes:
                    raise too_large
                await take(piece)
    except TimeoutError:
        late = f"did not arrive within {settings.body_s:g} seconds, and one more for each 64 KiB of it"
        raise RequestError(408, "timeout_error", late, "body") from None
    except web.RequestPayloadError:
        raise RequestError(400, "invalid_request_error", "broke off or was malformed", "body") from None


class Look:
    """What is seen of a body without parsing it: whether it is UTF-8, and how much work it is for a parser.

    In what is no JSON it may count too much or too little after the first mistake. A parser stops there anyway.
    """

    __slots__ = (
        "_backslashes",
        "_closed",
        "_counted",
        "_cut",
        "_decoder",
        "_in_character",
        "_in_string",
        "_open",
        "_outside",
        "_size",
        "_strings",
        "_values",
    )

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._in_character = False
        self._size = 0
        self._counted = 0  # how many of these bytes have been counted
        self._in_string = False
        self._cut = False  # whether the last piece ended between a backslash and what it escapes
        self._open = 0  # how much has come of the string in which the last piece ended
        self._closed = 0  # the length of a string that began in an earlier piece, while nothing has come after it
        self._values = 0
        self._strings = 0
        self._backslashes = 0
        self._outside = 0

    def at(self, piece: bytes) -> None:
        """Takes the next piece. Raises RequestError (400) where it is not UTF-8."""
        self._size += len(piece)
        # Base64 and most text are ASCII, and need no more than this.
        if self._in_character or not piece.isascii():
            self._check_utf8(piece)

    @property
    def behind(self) -> bool:
        """Whether there is more to count. A short body has too few values to be counted at all."""
        return self._size > STEP_BYTES and self._counted < self._size

    def go_on(self, body: bytearray) -> None:
        """Counts a part of what has come. Raises RequestError (400) where a parser would take too long."""
        part = bytes(body[self._counted : self._counted + STEP_BYTES])
        self._counted += len(part)
        self._count(part)

    def end(self) -> None:
        """Nothing more comes. Raises RequestError (400) where the last character is not whole."""
        if self._in_character:
            self._check_utf8(b"", final=True)

    def _check_utf8(self, piece: bytes, *, final: bool = False) -> None:
        try:
            self._decoder.decode(piece, final)
        except UnicodeDecodeError:
            raise RequestError(400, "invalid_request_error", "Invalid JSON: it must be UTF-8", "body") from None
        self._in_character = self._decoder.getstate()[0] != b""

    def _count(self, piece: bytes) -> None:
        if self._cut:
            piece = b"\\" + piece
        self._cut = (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1
        if self._cut:
            piece = piece[:-1]
        size = len(piece)
        if backslashes := piece.count(b"\\"):
            self._backslashes += backslashes
            self._bound(self._backslashes, MAX_BACKSLASHES, "backslashes")
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        if self._in_string and len(parts) == 1:
            self._open += size
            return
        outside = parts[self._in_string :: 2]
        if self._in_string:
            self._closed = self._open + len(parts[0])
        after = outside[0].lstrip(_WHITESPACE)
        if self._closed > MAX_NAME_BYTES and after.startswith(b":"):
            # A parser would unescape the name, and would quote one that it does not know.
            raise RequestError(400, "invalid_request_error", "has a name that is too long", "body")
        if after or len(outside) > 1:
            self._closed = 0
        text = b"".join(outside)
        self._values += text.count(b",") + text.count(b"[") + text.count(b"{")
        self._strings += len(parts) // 2
        self._in_string ^= len(parts) % 2 == 0
        self._open = len(parts[-1]) if self._in_string else 0
        self._outside += len(text)
        # Each name and each value can be a string.
        self._bound(max(self._values, self._strings // 2), MAX_VALUES, "values")
        self._bound(self._outside, MAX_OUTSIDE_BYTES, "bytes outside of its strings")

    def _bound(self, count: int, limit: int, what: str) -> None:
        if count > limit:
            raise RequestError(400, "invalid_request_error", f"must have at most {limit} {what}", "body")
