"""Which streams Redis knows, whoever generates them, and whether it may lack some at the moment.

A Redis that was emptied, or was away, gets everything again from those who generate, which takes them a moment. Until
then what it does not know may be there all the same.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING

from redis import exceptions

from aisse.replay.follower_scripts import AskToStop, Look
from aisse.replay.scripts import instance_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aisse.replay.connection import Client
    from aisse.replay.follower_scripts import Found
    from aisse.replay.terms import Terms


class Catalogue:
    """What Redis knows. Each instance leaves a mark there: one that is gone says that Redis was emptied.

    Whoever asks first learns that, and its answers are doubtful for the time of a lease
    (test_answers_are_doubtful_for_a_lease_after_redis_was_emptied). An instance that has just begun is in no doubt,
    though its mark is not there yet.
    """

    def __init__(self, client: Client, instance: str, terms: Terms) -> None:
        self._client = client
        self._instance = instance
        self._terms = terms
        self._mark_key = instance_key(instance)
        self._marked = False
        self.steady_since = time.monotonic()
        """Since when every producer could have renewed its lease, and this process could have seen it."""
        self._doubtful_since = -math.inf

    async def find(self, stream_ids: Sequence[str]) -> list[Found | None]:
        """What Redis knows of each stream; None if nothing. Raises RedisError.

        If that may be because Redis was emptied, `doubtful` says so.
        """
        looked = await self._client.run(Look(self._instance, stream_ids))
        if not looked.marked:
            await self.mark()
        return looked.streams

    async def ask_to_stop(self, stream_ids: Sequence[str]) -> list[bool | None]:
        """Has each stream's producer end it; None where there is no such stream. Raises as `find` does. Idempotent."""
        asked = await self._client.run(AskToStop(self._instance, stream_ids))
        if not asked.marked:
            await self.mark()
        return [there or None for there in asked.streams]

    async def mark(self) -> None:
        """Sees whether the mark is still there, and leaves it. Raises RedisError."""
        if not await self._client.pexpire(self._mark_key, self._terms.keep_ms):
            if self._marked:
                self.doubt()
            with contextlib.suppress(exceptions.ResponseError):  # it is full
                self._marked = bool(await self._client.set(self._mark_key, 1, px=self._terms.keep_ms))

    def doubt(self) -> None:
        """Redis was emptied or away: it may lack what there is, and leases may have lapsed for want of it."""
        self._doubtful_since = time.monotonic()
        self.distrust_leases()

    def distrust_leases(self) -> None:
        """Leases may have lapsed for another reason than that their producers are gone."""
        self.steady_since = time.monotonic()

    @property
    def doubtful(self) -> bool:
        """Whether Redis may not have everything at the moment that the instances do."""
        return time.monotonic() - self._doubtful_since < self._terms.lease_s
