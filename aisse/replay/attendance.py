"""Tells Redis who reads streams of others here, for their producers, and watches the producers' leases.

If a lease lapses, its producer is lost. Whoever sees that first ends the stream for everybody, once.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

import structlog

from aisse.replay.follower_scripts import Attend, Bury, ReadHere
from aisse.replay.scripts import StreamKeys
from aisse.replay.troubles import PROMPT_S, Attempts

if TYPE_CHECKING:
    from aisse.replay.catalogue import Catalogue
    from aisse.replay.connection import Client
    from aisse.replay.follower_scripts import Lease
    from aisse.replay.memory import MemoryLog
    from aisse.replay.terms import Terms
    from aisse.replay.troubles import Troubles

# At most so many streams in one call, so that Redis is not kept from others.
_BATCH = 256

_log = structlog.get_logger("aisse.replay")


class Follower(Protocol):
    """A stream that is generated elsewhere, as it stands here. Everything is synchronous."""

    id: str
    log: MemoryLog
    last_reader_stalled: bool
    """Whether the reader that left last had bytes waiting for it."""

    @property
    def awaits_until(self) -> float:
        """Until then readers that were moved from here, or told of it here, may come; on the loop's clock."""

    @property
    def reason(self) -> object:
        """Why it ended; None while it runs."""

    @property
    def furthest(self) -> int:
        """Position up to which some reader here has got."""

    @property
    def readers(self) -> int:
        """How many readers it has here."""

    def publish(self, frames: bytes, last_seq: int) -> None:
        """Adds whole frames."""

    def conclude(self, frames: bytes, last_seq: int) -> None:
        """Adds the frames that end it."""

    def burial(self) -> tuple[bytes, int]:
        """The frames that would end it as `producer_lost`, and the number of the last of them."""

    def renunciation(self) -> tuple[bytes, int]:
        """The frames that end it if it was withdrawn, and the number of the last of them."""


class Followed:
    """What is known of one stream beside the stream."""

    __slots__ = ("keys", "lapsed_since", "missing_since", "stream", "told_position")

    def __init__(self, stream: Follower) -> None:
        self.stream = stream
        self.keys = StreamKeys(stream.id)
        self.told_position = 0
        """The position that Redis was told of last."""
        self.lapsed_since: float | None = None
        """When its lease was first seen to have lapsed, and has not been renewed since."""
        self.missing_since: float | None = None
        """Since when Redis has not known it."""


class Attendance:
    """Tells who reads `followed` here, and ends those whose producer is lost. `attend_for_ever` is one task's.

    A producer is lost only if its lease was seen to have lapsed twice, with the time of a renewal in between
    (test_producer_whose_lease_lapsed_is_lost_when_that_is_seen_twice), and if Redis and this process have been there
    for the time of a lease (test_producer_has_the_time_of_a_lease_after_redis_or_we_were_away).

    A producer that waits for readers here hears of them as they get on, not with the next look alone
    (test_reader_that_has_got_on_is_told_of_at_once).
    """

    def __init__(
        self,
        client: Client,
        catalogue: Catalogue,
        instance: str,
        followed: dict[bytes, Followed],
        *,
        terms: Terms,
        read_ahead_bytes: int,
        troubles: Troubles,
    ) -> None:
        """`instance` names this process. `followed` has the streams by the keys of their entries."""
        self._client = client
        self._catalogue = catalogue
        self._instance = instance
        self._followed = followed
        self._leaving: dict[bytes, Followed] = {}
        self._terms = terms
        self._news_bytes = read_ahead_bytes // 4
        self._troubles = troubles
        self._attended = time.monotonic()

    async def attend_for_ever(self) -> None:
        """Tells of everything in time, and at once of what a producer may wait for."""
        attendance = Attempts("attend", self._troubles)
        due = 0.0
        while True:
            await attendance.pause(2 * self._terms.tick_s)
            # What failed is tried again, and not later: only an answer of Redis says that the trouble is over.
            if attendance.failures or time.monotonic() >= due:
                due = time.monotonic() + self._terms.interval_s
                await attendance.succeeds(self._attend_all())
            elif some := [each for each in self._followed.values() if self._has_news(each)]:
                await attendance.succeeds(self.attend(some))

    async def attend(self, some: list[Followed]) -> None:
        """Tells of these streams, and of those that have left, and looks at their leases. Raises RedisError.

        Redis is asked also if there are none: when the first comes, it has to be known how long Redis has been there.
        """
        leaving, self._leaving = self._leaving, {}
        some = some + list(leaving.values())
        for at in range(0, max(1, len(some)), _BATCH):
            await self._attend_some(some[at : at + _BATCH])

    async def expect_readers(self, some: list[Followed]) -> None:
        """Tells of streams that are about to be read, as if they were. Raises RedisError."""
        for at in range(0, len(some), _BATCH):
            await self._attend_some(some[at : at + _BATCH], about_to_be_read=True)

    def leave(self, followed: Followed) -> None:
        """A stream is not followed any more: soon it does not count as read here."""
        self._leaving[followed.keys.entries] = followed

    def come_back(self, followed: Followed) -> None:
        """A stream is followed again."""
        self._leaving.pop(followed.keys.entries, None)

    async def _attend_all(self) -> None:
        await self._catalogue.mark()
        await self.attend(list(self._followed.values()))

    def _has_news(self, followed: Followed) -> bool:
        return followed.stream.furthest - followed.told_position >= self._news_bytes

    async def _attend_some(self, some: list[Followed], *, about_to_be_read: bool = False) -> None:
        now = asyncio.get_running_loop().time()
        told = [self._told(each, now, about_to_be_read=about_to_be_read) for each in some]
        begun = time.monotonic()
        if begun - self._attended > max(self._terms.lease_s, PROMPT_S):
            self._catalogue.distrust_leases()  # it was we who stood still
        answered = False
        try:
            attended = await self._client.run(Attend(self._instance, self._terms.lease_ms, told))
            answered = True
        finally:
            self._attended = time.monotonic()
            if not answered or self._attended - begun > PROMPT_S:
                self._catalogue.doubt()
        for each, here, lease in zip(some, told, attended.leases, strict=True):
            each.told_position = here.position
            if self._follows(each):  # it may have ended, or nobody may read it any more
                await self._judge(each, lease, begun, attended.now_ms)

    def _told(self, followed: Followed, now: float, *, about_to_be_read: bool) -> ReadHere:
        stream = followed.stream
        return ReadHere(
            followed.keys,
            self._follows(followed) and (about_to_be_read or stream.readers > 0),
            stream.furthest,
            max(0, round((stream.awaits_until - now) * 1000)),
            stream.last_reader_stalled,
        )

    def _follows(self, followed: Followed) -> bool:
        return self._followed.get(followed.keys.entries) is followed

    # --- whose producer is lost -------------------------------------------------------------------------------

    async def _judge(self, followed: Followed, lease: Lease, seen: float, now_ms: int) -> None:
        if lease.left_ms is None:
            self._miss(followed, withdrawn=lease.over)
            return
        followed.missing_since = None
        # While Redis was away, producers had no chance to renew: they get the time of a lease for it.
        trusted = self._attended - self._catalogue.steady_since >= self._terms.lease_s
        if lease.left_ms >= 0 or lease.over or not trusted:
            followed.lapsed_since = None
            return
        if followed.lapsed_since is None:
            followed.lapsed_since = seen
        # Seen twice, with a renewal's time in between: Redis's clock may have been set.
        # Redis may have less than this process, if it was replaced or emptied; what it has more of comes first.
        stream = followed.stream
        if seen - followed.lapsed_since >= self._terms.interval_s * 0.9 and lease.last <= stream.log.last_seq:
            frames, end = stream.burial()
            latest_ms = now_ms + round(PROMPT_S * 1000)
            if await self._client.run(Bury(followed.keys, lease.last, end, frames, self._terms.keep_ms, latest_ms)):
                _log.warning("producer lost", stream_id=stream.id[:8])

    def _miss(self, followed: Followed, *, withdrawn: bool) -> None:
        """Redis does not know the stream. It was emptied: the producer has the time of a lease to say everything again.

        A stream that was `withdrawn` never comes back, and ends at once.
        """
        now = time.monotonic()
        if followed.missing_since is None:
            followed.missing_since = now
        if withdrawn or now - max(followed.missing_since, self._catalogue.steady_since) >= self._terms.lease_s:
            self._followed.pop(followed.keys.entries, None)
            stream = followed.stream
            stream.conclude(*(stream.renunciation() if withdrawn else stream.burial()))
