"""How fast something counts, over the last seconds."""

from __future__ import annotations

from collections import deque


class Rate:
    """Of a count that is looked at once a second."""

    def __init__(self, span_s: int) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=span_s + 1)

    def sample(self, now: float, count: int) -> None:
        """Notes what the count is."""
        self._samples.append((now, count))

    @property
    def per_s(self) -> float:
        """Over the span, or what of it has passed; 0 before there is any."""
        if len(self._samples) < 2:
            return 0.0
        (begun, before), (ended, after) = self._samples[0], self._samples[-1]
        return (after - before) / (ended - begun)
