"""A place where one task waits until something has changed."""

from __future__ import annotations

import asyncio


class Latch:
    """Opens for the one task that waits.

    It remembers nothing: opening it while nobody waits does nothing, so whoever waits has looked just before. The task
    may be cancelled while it waits, and may wait again at any time.
    """

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Returns once `open` was called. One caller at a time."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def open(self) -> None:
        """Lets the task that waits go on with the event loop's next turn."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
