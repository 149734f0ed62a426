"""How long a stream goes on that nobody reads."""

from __future__ import annotations


class LeaveTime:
    """Knows when one stream is to end for want of a reader. Times are the event loop's, in seconds.

    - Nothing ends while a reader is attached, and each time the last one leaves the time begins anew
      (test_reader_that_comes_back_within_the_leave_time_saves_the_stream).
    - Whoever was told of the stream without reading it is waited for. Once all of them have come, the leave time alone
      counts; nobody else shortens it (test_stream_goes_on_until_everybody_has_come_who_was_told_of_it).
    - Readers that were moved to another instance have their time whoever joins meanwhile
      (test_readers_that_were_moved_have_their_time_whoever_joins), and nothing shortens it
      (test_time_of_readers_that_others_have_moved_is_never_shortened).
    """

    __slots__ = ("_expected", "_expected_until", "_grace_s", "leave_s", "moved_until", "unread_since")

    def __init__(self, leave_s: float, grace_s: float = 0.0) -> None:
        """`leave_s` is infinite for a stream that goes on without readers.

        `grace_s` is how much later a reader on another instance is heard of than one here. A stream that ends with its
        last reader (`leave_s` is 0) waits for neither.
        """
        self.leave_s = leave_s
        self._grace_s = grace_s if leave_s else 0.0
        self.unread_since: float | None = None
        """When the last reader left; None while there is one, and before the first."""
        self.moved_until = 0.0
        """Until then readers that were moved may come back."""
        self._expected = 0  # who was told of the stream, and has not come to read it
        self._expected_until = 0.0

    @property
    def awaits_until(self) -> float:
        """Until when somebody may come who was moved, or told of the stream."""
        return max(self._expected_until, self.moved_until)

    @property
    def ends_at(self) -> float | None:
        """When the stream is to end; None while somebody reads it."""
        if self.unread_since is None:
            return None
        return max(self.unread_since + self.leave_s, self.awaits_until) + self._grace_s

    def over(self, now: float) -> bool:
        """Whether the stream is to end at `now`."""
        return (ends_at := self.ends_at) is not None and now >= ends_at

    def reader_came(self, *, expected: bool) -> None:
        """A reader is attached; `expected` if it may be one that was told of the stream."""
        self.unread_since = None
        if expected and self._expected:
            self._expected -= 1
            if not self._expected:
                self._expected_until = 0.0

    def last_reader_left(self, now: float) -> None:
        """Nobody reads the stream any more."""
        self.unread_since = now

    def expect_reader(self, until: float) -> None:
        """Somebody was told of the stream without reading it, and is waited for `until` then."""
        self._expected += 1
        self._expected_until = max(self._expected_until, until)

    def readers_moved(self, until: float) -> None:
        """Readers were moved, and are waited for `until` then."""
        self.moved_until = max(self.moved_until, until)
