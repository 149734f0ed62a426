"""What other instances say of the streams that run here."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from aisse.streams.endings import Reason
from aisse.streams.stream import StandIn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aisse.streams.stream import Stream

# Users filter their logs by this name. It stays, wherever the module is.
_log = structlog.get_logger("aisse.shared")


class Elsewhere:
    """The mirror's Producer. All readers elsewhere count like one here that is behind.

    A stream that has ended meanwhile is ignored.
    """

    def __init__(self, running: Mapping[str, Stream]) -> None:
        """`running` are the streams that run here."""
        self._running = running
        self._readers: dict[str, StandIn] = {}

    def read_elsewhere(self, stream_id: str, instances: int, position: int, *, stalled: bool) -> None:
        """So many other instances have readers of the stream, the furthest of which has got up to `position`.

        `stalled` if the last one there left with bytes waiting for it.
        """
        if (stream := self._running.get(stream_id)) is None:
            return
        # This comes first: a reader that had taken everything before it left was no brake.
        stream.advance(position)
        if instances:
            stream.attach(self._readers.setdefault(stream_id, StandIn()))
        else:
            self.nobody_reads(stream, stalled=stalled)

    def moved_elsewhere(self, stream_id: str, within_s: float) -> None:
        """Readers that other instances have moved, or told of the stream, may come within so many seconds."""
        if (stream := self._running.get(stream_id)) is not None:
            stream.leave.readers_moved(asyncio.get_running_loop().time() + within_s)

    def nobody_reads(self, stream: Stream, *, stalled: bool = False) -> None:
        """Other instances have no readers of it, or it has ended and they do without it."""
        if (readers := self._readers.pop(stream.id, None)) is not None:
            # A reader that was the brake stays so until the stream is read again, like one that leaves here. Where an
            # instance died, nobody says whether its readers stalled.
            stream.detach(readers, stalled=stalled or stream.holds_back)

    def stop_asked(self, stream_id: str) -> None:
        """Somebody asked another instance to stop the stream."""
        if (stream := self._running.get(stream_id)) is not None:
            stream.finish(Reason.STOPPED)

    def lost(self, stream_id: str, frames: bytes, last_seq: int) -> None:
        """Another instance has ended the stream; `frames` are empty where it is not known how."""
        if (stream := self._running.get(stream_id)) is None:
            return
        _log.warning("stream lost to other instances", stream_id=stream_id[:8])
        if frames:
            stream.conclude(frames, last_seq)
        else:
            stream.finish(Reason.PRODUCER_LOST)

    def held_back(self, stream_id: str) -> bool:
        """Whether the stream waits for its readers."""
        return (stream := self._running.get(stream_id)) is not None and stream.holds_back
