"""The replay log of one process: a stream's frames, in order, from its first to its last.

A position is a byte offset that lies between two frames; 0 is the beginning. Frames carry their own ids, so a
sequence number is found by looking for its `id:` line: no index is kept beside them.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from typing import Protocol

# A segment is closed once it holds this much: large enough that its overhead vanishes, small enough that one
# read of it does not flood a socket's buffer.
SEGMENT_BYTES = 16 << 10


class Log(Protocol):
    """What streams and readers know of a log. Everything is synchronous and answers from this process's own memory.

    A log that is shared mirrors from here to where it is shared, or from there to here, beside these calls.
    """

    tail: int
    """Position behind the last frame."""
    last_seq: int
    """Number of the last frame; 0 while there is none."""

    def append(self, frames: bytes, last_seq: int) -> None:
        """Adds whole frames, the last of which has number `last_seq`. Not to be called after `seal`."""

    def read(self, position: int, limit: int = ...) -> bytes:
        """Whole frames from `position` on, at most `limit` bytes of them but at least one; empty at the tail."""

    def position_after(self, seq: int) -> int:
        """The position that follows frame `seq`; 0 for 0, the tail for whatever lies at or beyond it.

        Where there is no such frame, numbers having a hole there, that of the first frame behind the hole.
        """

    def seal(self) -> None:
        """The stream has ended: nothing more comes."""

    def discard(self) -> None:
        """Forgets everything and gives its memory back; the log must not be used again."""


class ReplayMemory:
    """Counts what all logs hold, in bytes, against one bound."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class MemoryLog:
    """A log in this process's memory alone. Nothing here fails; bounds are the caller's."""

    __slots__ = ("_id_line", "_lasts", "_memory", "_open", "_open_bytes", "_segments", "_starts", "last_seq", "tail")

    def __init__(self, stream_id: str, memory: ReplayMemory) -> None:
        self._id_line = b"\nid: " + stream_id.encode() + b"."
        self._memory = memory
        self._segments: list[bytes] = []
        self._starts: list[int] = []  # position of each closed segment's first byte
        self._lasts: list[int] = []  # sequence number of each closed segment's last frame
        # As they came: a buffer that grows, and is copied at its end, leaves holes in the heap. With answers just over
        # one segment the holes were 0.6 of all that is kept.
        self._open: list[bytes] = []
        self._open_bytes = 0
        self.tail = 0
        self.last_seq = 0

    def append(self, frames: bytes, last_seq: int) -> None:
        """Counts the bytes as used; closes the segment that they fill."""
        size = len(frames)
        if size >= SEGMENT_BYTES and not self._open:
            self._starts.append(self.tail)
            self._lasts.append(last_seq)
            self._segments.append(frames)
        else:
            self._open.append(frames)
            self._open_bytes += size
        self.tail += size
        self.last_seq = last_seq
        self._memory.used += size
        if self._open_bytes >= SEGMENT_BYTES:
            self._close_segment()

    def read(self, position: int, limit: int = SEGMENT_BYTES) -> bytes:
        """Never beyond the end of a segment."""
        if position >= self.tail - self._open_bytes:
            segment, offset = self._open_from(position)
        else:
            index = bisect_right(self._starts, position) - 1
            segment, offset = self._segments[index], position - self._starts[index]
        end = len(segment)
        if end - offset > limit:
            # Frames end in a blank line and contain none.
            last = segment.rfind(b"\n\n", offset, offset + limit)
            end = (last if last >= 0 else segment.index(b"\n\n", offset + limit - 1)) + 2
        # A slice that is the whole is no copy.
        return segment[offset:end]

    def position_after(self, seq: int) -> int:
        """Looks through one segment."""
        if seq <= 0:
            return 0
        if seq >= self.last_seq:
            return self.tail
        index = bisect_left(self._lasts, seq)
        if index < len(self._segments):
            segment, start = self._segments[index], self._starts[index]
        else:
            segment, start = b"".join(self._open), self.tail - self._open_bytes
        # Data lines cannot contain this: they hold no line end, and it begins with one.
        line = self._id_line + b"%d\n\n" % seq
        if (at := segment.find(line)) >= 0:
            return start + at + len(line)
        # A hole, as a producer that was lost leaves.
        end = 0
        for match in re.finditer(re.escape(self._id_line) + rb"(\d+)\n\n", segment):
            if int(match[1]) > seq:
                break
            end = match.end()
        return start + end

    def seal(self) -> None:
        """Gives back spare memory."""
        if not self._open:
            return
        if self._segments and len(self._segments[-1]) < 2 * SEGMENT_BYTES:
            # A short piece beside whole ones would leave a hole, too, where the next stream's whole one does not fit.
            self._open.insert(0, self._segments.pop())
            self._open_bytes += len(self._open[0])
            del self._starts[-1], self._lasts[-1]
        self._close_segment()

    def discard(self) -> None:
        """Counts the bytes as free."""
        self._memory.used -= self.tail
        self._segments.clear()
        self._starts.clear()
        self._lasts.clear()
        self._open.clear()
        self._open_bytes = 0
        self.tail = 0

    def _open_from(self, position: int) -> tuple[bytes, int]:
        """The open segment's frames from the append on that `position` lies in, and its offset in them."""
        index, start = len(self._open), self.tail
        while start > position:
            index -= 1
            start -= len(self._open[index])
        return b"".join(self._open[index:]), position - start

    def _close_segment(self) -> None:
        self._starts.append(self.tail - self._open_bytes)
        self._lasts.append(self.last_seq)
        self._segments.append(b"".join(self._open))
        self._open.clear()
        self._open_bytes = 0
