"""How long the upstream of one stream may take, and for what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aisse.errors import UpstreamError

if TYPE_CHECKING:
    from aisse.settings import Settings
    from aisse.streams.stream import Stream
    from aisse.upstream.body import Body


class Deadlines:
    """The settings `first_byte_s`, `silence_s`, `no_content_s` and `stream_s`, applied to one stream.

    Times are the event loop's.

    - While the stream holds its upstream back, only `stream_s` counts: it is we who do not read
      (test_silence_is_not_held_against_an_upstream_that_we_do_not_read).
    - Any byte ends the silence; only an event that is more than a ping is content
      (test_silence_and_no_content_are_measured_apart).
    """

    __slots__ = ("_bytes", "_created", "_events", "_last_byte", "_last_content", "_settings", "_stream")

    def __init__(self, stream: Stream, settings: Settings) -> None:
        self._stream = stream
        self._settings = settings
        self._created = stream.created
        self._bytes = 0  # as of the last look
        self._events = 0
        self._last_byte = 0.0  # 0: none yet
        self._last_content = stream.created

    def passed(self, now: float, body: Body | None) -> UpstreamError | None:
        """What is said of the first limit that has passed at `now`; None while none has.

        `body` is the upstream's answer, None before it has begun. This is asked once a second. It sees by the counts
        what has come since, so that a chunk needs not read the clock.
        """
        settings = self._settings
        held = self._stream.holds_back
        if body is not None and (held or body.size > self._bytes):
            self._bytes = body.size
            self._last_byte = now
        if held or self._stream.content_events > self._events:
            self._events = self._stream.content_events
            self._last_content = now
        if now - self._created >= settings.stream_s:
            return _late("the answer took longer than the server allows", "took longer than stream_s")
        if self._last_byte == 0.0:
            if now - self._created >= settings.first_byte_s:
                return _late("the upstream did not begin its answer in time", "no answer within first_byte_s")
            return None
        if now - self._last_byte >= settings.silence_s:
            return _late("the upstream fell silent", "silent for silence_s")
        if now - self._last_content >= settings.no_content_s:
            return _late("the upstream sends pings only", "pings only for no_content_s")
        return None


def _late(message: str, cause: str) -> UpstreamError:
    return UpstreamError("timeout_error", message, 504, cause=cause)
