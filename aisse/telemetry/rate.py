"""How fast a count grows, over the last seconds."""

from __future__ import annotations

from collections import deque


class Rate:
    """The rate of a count, which somebody has to sample once a second, over the last `span_s` seconds."""

    def __init__(self, span_s: int) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=span_s + 1)

    def sample(self, now: float, count: int) -> None:
        """Notes the count. `now` is the time in seconds, of any clock that never goes back."""
        self._samples.append((now, count))

    @property
    def per_s(self) -> float:
        """The growth a second over the span, or over the part of it that has passed; 0 before the second sample."""
        if len(self._samples) < 2:
            return 0.0
        (begun, before), (ended, after) = self._samples[0], self._samples[-1]
        return (after - before) / (ended - begun)
