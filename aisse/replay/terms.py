"""For how long what is said to Redis holds, and how often it is said."""

from __future__ import annotations

from dataclasses import dataclass

# Several renewals may be lost before a lease lapses; that somebody asked for a stream's end is seen within a second.
_RENEWALS = 8
_LONGEST_INTERVAL_S = 0.75


@dataclass(frozen=True, slots=True)
class Terms:
    """The same on all instances. What is called so is a setting."""

    tick_s: float
    lease_s: float
    retention_s: float
    stream_s: float

    @property
    def interval_s(self) -> float:
        """Seconds between two renewals, and between two looks at what others renew."""
        return interval_s(self.lease_s)

    @property
    def lease_ms(self) -> int:
        """For how long a producer, or an instance with readers, is taken to be there."""
        return round(self.lease_s * 1000)

    @property
    def keep_ms(self) -> int:
        """For how long Redis keeps a stream after its end. Who is a lease behind still finds how it ended."""
        return round((self.retention_s + self.lease_s) * 1000)

    @property
    def claim_ms(self) -> int:
        """For how long an Idempotency-Key holds at most; it holds no longer than its stream does."""
        return self.keep_ms + round(self.stream_s * 1000)


def interval_s(lease_s: float) -> float:
    """Seconds between two renewals of leases of so many seconds."""
    return min(lease_s / _RENEWALS, _LONGEST_INTERVAL_S)
