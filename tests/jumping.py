"""An event loop whose time is the test's own: it jumps to whatever is due next.

Nothing depends on how fast the machine is, and an hour takes no longer than what happens in it.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class Jumps(selectors.SelectSelector):
    """Waits for no time, but notes that it went by."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None and not self.get_map():
            raise AssertionError("everybody waits, and nothing will come")
        self.now += timeout or 0.0
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumps = Jumps()
        super().__init__(self._jumps)

    def time(self) -> float:
        return self._jumps.now
