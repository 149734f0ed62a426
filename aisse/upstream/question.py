"""Questions on their way from a client to the upstream, and the memory that all of them take."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from aiohttp import payload

from aisse.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from aiohttp.abc import AbstractStreamWriter

# What is written at once. A socket on loopback takes 32 MiB without a pause. In one go, nothing else ran for 9 ms.
_WRITE_BYTES = 64 << 10


class Bodies:
    """Counts the bytes of all questions whose answers have not begun; never more than `limit`.

    The count is what all Holds have: test_count_of_bodies_is_what_a_model_says_whatever_becomes_of_them.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def hold(self) -> Hold:
        """The share for a body that is about to come. It is a context manager, see Hold."""
        return Hold(self)


class Hold:
    """The share of one body. The end of the `with` gives it back, unless a relay has taken it over."""

    __slots__ = ("_bodies", "_size", "taken_over")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._size = 0
        self.taken_over = False

    def grow(self, size: int) -> None:
        """Counts bytes that have come. Raises RequestError (503) where there is no room for them."""
        bodies = self._bodies
        if bodies.used + size > bodies.limit:
            raise RequestError(503, "overloaded_error", "the memory for questions is full", retry_after_s=1)
        bodies.used += size
        self._size += size

    def release(self) -> None:
        """Gives the share back: nothing of the body is kept any more. Idempotent."""
        self._bodies.used -= self._size
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if not self.taken_over:
            self.release()


@dataclass(frozen=True, eq=False, slots=True)
class Question:
    """What the upstream is asked for a client: its body in pieces, which are sent one after the other.

    `headers` are sent beside those that every question has. `digest` tells this request from another one that comes
    with the same Idempotency-Key; it is empty where none came.
    """

    pieces: Sequence[bytes | memoryview]
    headers: Mapping[str, str] = field(default_factory=dict)
    digest: bytes = b""
    hold: Hold | None = None


class Pieces(payload.Payload):
    """The body of one request of aiohttp's client. Its pieces are sent unjoined, and other tasks run in between."""

    _autoclose = True  # there is nothing to close

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        super().__init__(pieces, content_type="application/json")
        self._size = sum(len(piece) for piece in pieces)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Writes everything; waits while the connection takes nothing."""
        for piece in self._value:
            if len(piece) <= _WRITE_BYTES:
                await writer.write(piece)
                continue
            view = memoryview(piece)
            for start in range(0, len(view), _WRITE_BYTES):
                await writer.write(view[start : start + _WRITE_BYTES])
                await asyncio.sleep(0)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The body as text. aiohttp demands this method, but does not call it where it writes."""
        return b"".join(self._value).decode(encoding, errors)
