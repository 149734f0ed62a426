"""The replay log of one process: a stream's frames, in order, from its first to its last.

A position is a byte offset that lies between two frames; 0 is the beginning. Frames carry their own numbers, so a
number is looked for in the frames: no index is kept beside them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from aisse.sse import cut_at, offset_after

# A segment is closed once it holds this much: large enough that its overhead vanishes, small enough that one
# read of it does not flood a socket's buffer.
SEGMENT_BYTES = 16 << 10


class ReplayMemory:
    """Counts what all logs hold, in bytes, against one bound."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class MemoryLog:
    """One stream's log in this process's memory. Everything is synchronous, and nothing fails; bounds are the caller's.

    Streams and readers know this alone. A log that is shared with other instances is mirrored from here to where it is
    shared, or brought from there to here, beside these calls.

    What was appended is what is read, from any frame on, with readers that follow while it grows
    (test_any_log_is_the_list_of_its_frames). It costs hardly more memory than it counts
    (test_log_costs_little_more_than_it_counts), and gives all of it back once
    (test_discarded_log_gives_back_what_it_held_and_no_more).
    """

    __slots__ = ("_lasts", "_memory", "_open", "_open_bytes", "_segments", "_starts", "last_seq", "tail")

    def __init__(self, memory: ReplayMemory) -> None:
        self._memory = memory
        self._segments: list[bytes] = []
        self._starts: list[int] = []  # position of each closed segment's first byte
        self._lasts: list[int] = []  # sequence number of each closed segment's last frame
        # As they came: a buffer that grows, and is copied at its end, leaves holes in the heap. With answers just over
        # one segment the holes were 0.6 of all that is kept.
        self._open: list[bytes] = []
        self._open_bytes = 0
        self.tail = 0
        """Position behind the last frame."""
        self.last_seq = 0
        """Number of the last frame; 0 while there is none."""

    def append(self, frames: bytes, last_seq: int) -> None:
        """Adds whole frames, the last of which has number `last_seq`. Not to be called after `seal`."""
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
        """Whole frames from `position` on, at most `limit` bytes of them but at least one; empty at the tail.

        They never go beyond the end of a segment.
        """
        if position >= self.tail - self._open_bytes:
            segment, offset = self._open_from(position)
        else:
            index = bisect_right(self._starts, position) - 1
            segment, offset = self._segments[index], position - self._starts[index]
        end = len(segment)
        if end - offset > limit:
            end = cut_at(segment, offset, limit)
        # A slice that is the whole is no copy.
        return segment[offset:end]

    def position_after(self, seq: int) -> int:
        """The position that follows frame `seq`; 0 for 0, the tail for whatever lies at or beyond it.

        Where the numbers have a hole, there is no such frame, and it is that of the first frame behind the hole.
        One segment is looked through.
        """
        if seq <= 0:
            return 0
        if seq >= self.last_seq:
            return self.tail
        index = bisect_left(self._lasts, seq)
        if index < len(self._segments):
            segment, start = self._segments[index], self._starts[index]
        else:
            segment, start = b"".join(self._open), self.tail - self._open_bytes
        return start + offset_after(segment, seq)

    def seal(self) -> None:
        """The stream has ended: nothing more comes. Gives back spare memory."""
        if not self._open:
            return
        if self._segments and len(self._segments[-1]) < 2 * SEGMENT_BYTES:
            # A short piece beside whole ones would leave a hole, too, where the next stream's whole one does not fit.
            self._open.insert(0, self._segments.pop())
            self._open_bytes += len(self._open[0])
            del self._starts[-1], self._lasts[-1]
        self._close_segment()

    def discard(self) -> None:
        """Forgets everything and counts its bytes as free; the log must not be used again. Idempotent."""
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
