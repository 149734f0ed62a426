"""What operators see: numbers, and what is wrong, in words."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from aisse.errors import UpstreamError
from aisse.streams.endings import Reason
from aisse.telemetry.rate import Rate

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from aisse.settings import Settings
    from aisse.streams.reader import Reader
    from aisse.streams.shared import Shared
    from aisse.streams.stream import Stream
    from aisse.streams.table import Table

# A reader that has not taken a byte for longer counts as stalled. The sweep looks once in so many seconds, so that no
# shorter time means anything.
_STALLED_S = 1.0

# Loop lag above this, and so many failures in a row, make the service `degraded`.
_LAG_S = 0.5
_FAILURES = 5

_NOT_FAILED = frozenset({Reason.COMPLETE, Reason.STOPPED, Reason.ABANDONED})

# Users filter their logs by this name. It stays, wherever the module is.
_log = structlog.get_logger("aisse.registry")


class Figures:
    """Counts what was, and looks at what is. Everything is synchronous."""

    def __init__(self, settings: Settings, table: Table, readers: AbstractSet[Reader], shared: Shared | None) -> None:
        """`readers` are those that read now; `shared` is there where the log is."""
        self._settings = settings
        self._table = table
        self._readers = readers
        self._shared = shared
        self.loop_lag_s = 0.0
        """How late the event loop was at the last sweep."""
        self.failed = 0
        """Streams that ended with an error of the upstream's or ours."""
        self._output_tokens = 0  # of streams that have ended
        self._content_events = 0  # of streams that have ended
        self._failures_in_a_row = 0
        self._failing_since = 0.0  # seconds since 1970, of the first in a row
        self._failing_because = ""  # the last one's cause
        self._rate = Rate(span_s=10)

    def sample(self, now: float) -> None:
        """Notes how much has been relayed. Called once a second."""
        running = self._table.running.values()
        self._rate.sample(now, self._content_events + sum(stream.content_events for stream in running))

    def ended(self, stream: Stream, request_id: str | None) -> None:
        """Counts a stream that has ended here, and logs it. `request_id` is the upstream's name for its request."""
        reason, error = stream.reason, stream.error
        assert reason is not None
        assert stream.ended is not None
        self._output_tokens += stream.usage["output_tokens"]
        self._content_events += stream.content_events
        if reason not in _NOT_FAILED:
            self.failed += 1
        cause = error.cause if isinstance(error, UpstreamError) else None
        if reason in {Reason.ERROR, Reason.TRUNCATED, Reason.TIMEOUT}:
            # 4xx are the request's fault and say nothing about the upstream's health.
            if not (isinstance(error, UpstreamError) and error.status < 500):
                self._failing(stream, cause)
        elif reason is Reason.COMPLETE:
            self._failures_in_a_row = 0
        _log.info(
            "stream ended",
            stream_id=stream.id[:8],
            reason=reason.value,
            events=stream.events,
            stream_bytes=stream.log.tail,
            readers=stream.readers,
            duration_s=round(stream.ended - stream.created, 3),
            error_type=error.kind if error is not None else None,
            upstream_status=error.upstream_status if isinstance(error, UpstreamError) else None,
            upstream_error=cause,
            upstream_request_id=request_id,
            **stream.usage,
        )

    def _failing(self, stream: Stream, cause: str | None) -> None:
        assert stream.ended_at is not None
        if not self._failures_in_a_row:
            self._failing_since = stream.ended_at
        self._failures_in_a_row += 1
        self._failing_because = cause or "for a reason inside this server"

    # --- what is asked for ------------------------------------------------------------------------------------

    @property
    def output_tokens(self) -> int:
        """Output tokens of all generations, as the upstream has reported them so far."""
        return self._output_tokens + sum(stream.usage["output_tokens"] for stream in self._table.running.values())

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait for readers' sockets."""
        return sum(reader.buffered_bytes for reader in self._readers)

    def stalls(self) -> tuple[int, float]:
        """How many readers have not taken a byte for longer than a sweep, and the longest such time in seconds."""
        now = asyncio.get_running_loop().time()
        stalled = [seconds for reader in self._readers if (seconds := reader.stalled_for(now)) > _STALLED_S]
        return len(stalled), max(stalled, default=0.0)

    def tokens_per_second(self) -> float:
        """Content events relayed a second, over the last ten seconds: most of them carry about one token."""
        return self._rate.per_s

    def troubles(self) -> list[str]:
        """What makes the service `degraded`, in words for operators; empty while it is healthy."""
        troubles = []
        if self.loop_lag_s > _LAG_S:
            troubles.append(f"the event loop is {self.loop_lag_s * 1000:.0f} ms late")
        if self._failures_in_a_row >= _FAILURES:
            since = datetime.fromtimestamp(self._failing_since, UTC).isoformat(timespec="seconds")
            troubles.append(
                f"the last {self._failures_in_a_row} answers of the upstream failed, "
                f"since {since.replace('+00:00', 'Z')}, the last one: {self._failing_because}"
            )
        if len(self._table.running) >= self._settings.max_streams:
            troubles.append("max_streams is reached; new streams get 503")
        if self._table.full:
            troubles.append("replay_bytes is reached; new streams get 503")
        if self._shared is not None and (trouble := self._shared.trouble) is not None:
            troubles.append(f"{trouble}; {self._shared.behind} streams are not up to date for other instances")
        return troubles
