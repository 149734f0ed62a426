"""Whether the streams that are generated here are still ours: their leases, and what Redis says of each.

Who generates a stream renews its lease. With the answer comes what other instances have to say: who reads the stream
there and how far, and whether somebody asked for its end. If a lease lapses, others end the stream.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Protocol

from aisse.replay.producer_scripts import CLOSED, MISSING, STOP_ASKED, Renew
from aisse.replay.troubles import PROMPT_S, Attempts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aisse.replay.connection import Client
    from aisse.replay.mirror import RedisLog
    from aisse.replay.producer_scripts import Renewed, Standing
    from aisse.replay.terms import Terms
    from aisse.replay.troubles import Troubles

# At most so many streams in one call, so that Redis is not kept from others.
_BATCH = 256

# A task that waits for nothing else looks at the clock once a second. If that takes so many seconds, or a lease if that
# is more, this process stood still.
_CLOCK_S = 1.0
_AWAY_S = 5.0


class Producer(Protocol):
    """Who generates the streams. Called synchronously; a stream that has ended meanwhile is to be ignored."""

    def read_elsewhere(self, stream_id: str, instances: int, position: int, *, stalled: bool) -> None:
        """So many other instances have readers of the stream, the furthest of which has got up to `position`.

        `stalled` if the last one there left with bytes waiting for it.
        """

    def moved_elsewhere(self, stream_id: str, within_s: float) -> None:
        """Readers that other instances have moved, or told of the stream, may come within so many seconds."""

    def stop_asked(self, stream_id: str) -> None:
        """Somebody asked another instance to stop the stream."""

    def lost(self, stream_id: str, frames: bytes, last_seq: int) -> None:
        """Another instance has ended the stream with `frames`, which are empty if it is not known how.

        The log of the stream is not mirrored any more.
        """

    def held_back(self, stream_id: str) -> bool:
        """Whether the stream waits for its readers."""


class Leases:
    """Renews the leases of `logs`, and does what Redis says of them. Each of its two loops is one task's.

    A stream goes on only while it is known to be ours. If Redis does not know it, Redis was emptied, and everything is
    said again. But if this process stood still, others may have ended the stream: then it is lost
    (test_stream_that_is_missing_after_this_process_stood_still_is_lost_unless_it_was_renewed).

    Readers elsewhere are taken for gone only after Redis has been there for the time of a lease, with all that it was
    told. Before, they had no chance to say that they are there
    (test_readers_elsewhere_stay_for_a_lease_after_redis_was_emptied,
    test_readers_elsewhere_stay_for_a_lease_after_redis_was_away).
    """

    def __init__(
        self,
        client: Client,
        token: str,
        producer: Producer,
        logs: Mapping[str, RedisLog],
        *,
        terms: Terms,
        troubles: Troubles,
    ) -> None:
        """`token` names this process. `logs` are those of all streams that run here, by their ids."""
        self._client = client
        self._token = token
        self._producer = producer
        self._logs = logs
        self._terms = terms
        self._troubles = troubles
        self._read_elsewhere: set[RedisLog] = set()
        self._steady_since = 0.0  # since when Redis has had all that it was told
        self._awake = time.monotonic()

    async def renew_for_ever(self) -> None:
        """Renews all leases in time, and asks at once for what a stream waits for."""
        renewal = Attempts("renew", self._troubles)
        due = 0.0
        while True:
            await renewal.pause(2 * self._terms.tick_s)
            if time.monotonic() >= due:
                due = time.monotonic() + self._terms.interval_s
                self._read_elsewhere.intersection_update(self._logs.values())
                logs: Iterable[RedisLog] = self._logs.values()
            else:
                # A stream that waits for readers elsewhere goes on when it hears of them.
                logs = (log for log in self._read_elsewhere if self._producer.held_back(log.id))
            if some := [log for log in logs if log.known]:
                begun = time.monotonic()
                if not await renewal.succeeds(self._renew(some)) or time.monotonic() - begun > PROMPT_S:
                    self._steady_since = time.monotonic()
            elif not self._logs:
                renewal.over()

    async def watch_clock(self) -> None:
        """Notes when it was this process that stood still, and not Redis: others may have given up its streams."""
        while True:
            self._awake = time.monotonic()
            await asyncio.sleep(_CLOCK_S)
            if self._stood_still:
                for log in self._logs.values():
                    log.suspect = True

    def heed(self, log: RedisLog, standing: Standing) -> bool:
        """Does what Redis says of a stream; True if it is lost, and to be given up."""
        if standing is STOP_ASKED:
            self._producer.stop_asked(log.id)
        elif standing is MISSING:
            if log.suspect or self._stood_still:
                return True
            self._steady_since = time.monotonic()
            # Redis was emptied.
            log.say_again()
            return False
        log.suspect = False
        return standing is CLOSED

    async def give_up(self, lost: Iterable[RedisLog]) -> None:
        """Tells the producer how others have ended streams that were ours. Raises RedisError."""
        for log in lost:
            entries: Any = await self._client.xrevrange(log.keys.entries, count=1)
            log.drop()
            last, fields = entries[0] if entries else (b"0-0", {b"f": b""})
            self._producer.lost(log.id, fields[b"f"], int(last.partition(b"-")[0]))

    async def _renew(self, logs: list[RedisLog]) -> None:
        for at in range(0, len(logs), _BATCH):
            some = logs[at : at + _BATCH]
            steady = time.monotonic() - self._steady_since > self._terms.lease_s
            said = await self._client.run(
                Renew(self._token, self._terms.lease_ms, self._terms.keep_ms, [log.keys for log in some])
            )
            lost = []
            for log, renewed in zip(some, said, strict=True):
                if log.dropped:
                    continue
                if renewed.moved_ms:  # first: if they were the last readers, only this keeps the stream
                    self._producer.moved_elsewhere(log.id, renewed.moved_ms / 1000)
                if self.heed(log, renewed.standing):
                    lost.append(log)
                else:
                    self._tell_of_readers(log, renewed, steady=steady)
            await self.give_up(lost)

    def _tell_of_readers(self, log: RedisLog, said: Renewed, *, steady: bool) -> None:
        if said.instances:
            self._read_elsewhere.add(log)
        elif log in self._read_elsewhere and said.standing is not MISSING and steady:
            self._read_elsewhere.remove(log)
        else:
            return
        # An instance may have got more than this process has, if this one has been given up.
        position = min(said.position, log.tail)
        self._producer.read_elsewhere(log.id, said.instances, position, stalled=said.stalled)

    @property
    def _stood_still(self) -> bool:
        return time.monotonic() - self._awake > max(_AWAY_S, self._terms.lease_s)
