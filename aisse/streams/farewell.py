"""What readers are told while the process shuts down: whether to come back elsewhere, and when."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from aisse.sse import reconnect

if TYPE_CHECKING:
    from aisse.settings import Settings
    from aisse.streams.reader import Reader

# How much longer than `reconnect_spread_s` a stream is kept for readers that were moved.
_COME_BACK_S = 10.0


class Farewell:
    """The drain decides when it begins; requests ask it for what to say. Until then nobody is told anything."""

    def __init__(self, settings: Settings) -> None:
        self._spread_s = settings.reconnect_spread_s
        self._telling = False
        self.deadline = 0.0
        """When the streams that still run are ended, on the loop's clock."""
        self.moving = False
        """Whether readers are to come back now, elsewhere; else when they have lost their connection."""

    def begin(self, *, moving: bool) -> None:
        """From now on readers are told."""
        self.moving = moving
        self._telling = True

    def greet(self, reader: Reader) -> None:
        """Tells a reader, if it is time for that. A stream waits for readers that are moved."""
        if not self._telling:
            return
        reader.tell(self.event(resume=self.moving))
        if self.moving:
            # Their time begins now, and not when they are closed: clients that know the event leave by themselves.
            now = asyncio.get_running_loop().time()
            reader.stream.leave.readers_moved(now + self._spread_s + _COME_BACK_S)

    def event(self, *, resume: bool) -> bytes:
        """The event that tells one reader when to come back if its connection ends.

        `resume` says to come back now, elsewhere. The time is drawn evenly from `reconnect_spread_s` for each, so that
        a thousand readers do not come back in the same moment.
        """
        left_s = max(0.0, self.deadline - asyncio.get_running_loop().time())
        # Not for secrets: any even spread will do.
        retry_s = random.uniform(0, self._spread_s)  # noqa: S311
        return reconnect(round(retry_s * 1000), resume=resume, deadline_ms=round(left_s * 1000))
