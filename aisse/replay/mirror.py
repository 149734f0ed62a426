"""The shared log on the side of who generates: streams of this process, mirrored to Redis or Valkey.

Streams and readers know the local log alone. Beside it one task takes what is new of all streams to Redis, in one call
a tick. Nothing is kept twice for that: what Redis has not got yet is read from the local log, however long Redis was
away. The number of the last frame that Redis has says where to go on. `leases` sees to it that the streams stay ours.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import time
from typing import TYPE_CHECKING

from redis import exceptions

from aisse.replay.leases import Leases
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.replay.producer_scripts import OURS, STOP_ASKED, Append, Claim, Create, Group, NewStream, Withdraw
from aisse.replay.scripts import StreamKeys
from aisse.replay.troubles import Attempts, backoff_s, heed_cancellation
from aisse.sse import last_seq_of

if TYPE_CHECKING:
    from aisse.replay.connection import Client
    from aisse.replay.leases import Producer
    from aisse.replay.producer_scripts import Appended
    from aisse.replay.terms import Terms
    from aisse.replay.troubles import Troubles

# At most so many streams and bytes in one call, so that Redis is not kept from others, nor this process by the reply.
_BATCH = 256
_BATCH_BYTES = 1 << 20

# Once a stream is withdrawn, a call that would begin it is refused for so long. Such a call may be on its way by
# another connection, or wait in a Redis that stands still. In both cases it comes soon after the withdrawal was done.
_WITHDRAWN_MS = 60_000


class RedisLog(MemoryLog):
    """The local log of a stream that this process generates. `Mirror` takes what it gets to Redis."""

    __slots__ = (
        "_mirror",
        "behind",
        "claim",
        "created_at",
        "dropped",
        "keys",
        "known",
        "mirrored",
        "mirrored_seq",
        "sealed",
        "suspect",
    )

    def __init__(self, stream_id: str, memory: ReplayMemory, mirror: Mirror, claim: tuple[str, str] | None) -> None:
        """`claim` are the digests of the Idempotency-Key and of the request that came with it."""
        super().__init__(memory)
        self.claim = claim
        self.keys = StreamKeys(stream_id)
        self.created_at = time.time()
        self.mirrored = 0
        """Position up to which Redis has it."""
        self.mirrored_seq = 0
        self.known = False
        """Whether Redis knows the stream."""
        self.sealed = False
        self.dropped = False
        """Whether it is not mirrored any more."""
        self.suspect = False
        """Whether others may have given it up, since this process stood still."""
        self.behind = False
        """Whether Redis has not got all of it."""
        self._mirror = mirror

    @property
    def id(self) -> str:
        """The stream's."""
        return self.keys.id

    def append(self, frames: bytes, last_seq: int) -> None:
        """As in memory; Redis gets it with the next tick."""
        super().append(frames, last_seq)
        if not self.behind:
            self._mirror.note(self)

    def seal(self) -> None:
        """What was appended last ends the stream, in Redis too."""
        super().seal()
        self.sealed = True
        if not self.behind:
            self._mirror.note(self)

    def discard(self) -> None:
        """Forgets it here. What Redis has goes when its time is over; what it has not got yet is lost."""
        super().discard()
        self.drop()

    def drop(self) -> None:
        """Has it not mirrored any more."""
        self._mirror.drop(self)

    def say_again(self) -> None:
        """Has Redis get everything again, from here."""
        self.known = False
        self.mirrored = self.mirrored_seq = 0
        self._mirror.note(self)


class Mirror:
    """Takes this process's streams to Redis. `run` is one task's. What is no coroutine returns at once.

    Redis gets each stream whole and in order, and its end with its last frame alone, however far it is behind and
    whatever fails (test_stream_that_ends_far_ahead_of_redis_is_closed_by_its_last_group_alone,
    test_group_without_an_answer_is_repeated_with_the_same_boundaries,
    test_emptied_redis_gets_everything_again_from_the_beginning). No call grows with what is behind
    (test_appends_of_many_backlogs_are_bounded_in_bytes), and none is made while nothing is
    (test_idle_mirror_is_not_woken_by_each_tick).
    """

    def __init__(self, client: Client, producer: Producer, terms: Terms, troubles: Troubles) -> None:
        self.token = secrets.token_urlsafe(12)
        """Names this process, as producer and as reader."""
        self._client = client
        self._terms = terms
        self._logs: dict[str, RedisLog] = {}
        self._behind: dict[RedisLog, None] = {}  # first those that have waited for longest
        self._unknown: dict[RedisLog, None] = {}  # to Redis, oldest first
        self._work = asyncio.Event()
        self._new = asyncio.Event()
        self._up_to_date = asyncio.Event()
        self._troubles = troubles
        self._leases = Leases(client, self.token, producer, self._logs, terms=terms, troubles=self._troubles)

    def log(self, stream_id: str, memory: ReplayMemory, claim: tuple[str, str] | None = None) -> RedisLog:
        """The log of a new stream, which Redis is told of at once, at the latest with the next tick."""
        log = self._logs[stream_id] = RedisLog(stream_id, memory, self, claim)
        self.note(log)
        return log

    def note(self, log: RedisLog) -> None:
        """Has what is new in `log` taken to Redis, unless it was dropped."""
        if log.dropped:
            return
        log.behind = True
        self._behind[log] = None
        if not log.known:
            self._unknown[log] = None
            self._new.set()
        self._up_to_date.clear()
        self._work.set()

    def drop(self, log: RedisLog) -> None:
        """`log` is not mirrored any more. Idempotent."""
        log.dropped = True
        if self._logs.get(log.id) is log:
            del self._logs[log.id]
        self._unknown.pop(log, None)
        self._take_off(log)

    @property
    def behind(self) -> int:
        """Streams of which Redis has not got everything."""
        return len(self._behind)

    async def settled(self, within_s: float) -> bool:
        """Whether Redis has got everything, now or `within_s`."""
        if not self._behind:
            return True
        try:
            async with asyncio.timeout(within_s):
                await self._up_to_date.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Mirrors and renews until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._create_for_ever(), name="shared log: create")
            tasks.create_task(self._append_for_ever(), name="shared log: append")
            tasks.create_task(self._leases.renew_for_ever(), name="shared log: leases")
            tasks.create_task(self._leases.watch_clock(), name="shared log: clock")

    # --- new streams ------------------------------------------------------------------------------------------

    async def claim(self, digest: str, stream_id: str, request: str) -> tuple[str, str]:
        """Gives an Idempotency-Key to a stream that is to be, unless one has it: that one, and its request's digest.

        Raises RedisError. Where no answer came or it is cancelled nobody knows; `withdraw` then.
        """
        terms = self._terms
        return await self._client.run(
            Claim(digest, stream_id, request, self.token, terms.lease_ms, terms.keep_ms, terms.claim_ms, time.time())
        )

    async def withdraw(self, stream_id: str, digest: str | None, frames: bytes, last_seq: int) -> None:
        """Has Redis forget a stream that nobody was told of, and its claim, also if word of either is still on its way.

        If the stream has had readers elsewhere, it is ended there by `frames`, which are all that it has.

        Tries for as long as Redis would keep them. Nobody is told if that fails.
        """
        withdrawal = Withdraw(stream_id, digest, _WITHDRAWN_MS, self._terms.keep_ms, last_seq, frames)
        until = time.monotonic() + self._terms.keep_ms / 1000
        failures = 0
        while time.monotonic() < until:
            heed_cancellation()
            try:
                await self._client.run(withdrawal)
            except (exceptions.RedisError, OSError):
                failures += 1
                await asyncio.sleep(backoff_s(failures))
            else:
                return

    async def _create_for_ever(self) -> None:
        """Beside the appends, which may take long: who is told of a stream may ask any instance for it at once."""
        creation = Attempts("create", self._troubles)
        begun = -math.inf
        while True:
            if not self._unknown:
                creation.over()
                self._new.clear()
                await self._new.wait()
            # The first one at once, those that come within a tick together.
            await creation.pause(max(0.0, begun + self._terms.tick_s - time.monotonic()))
            begun = time.monotonic()
            await creation.succeeds(self._create())

    async def _create(self) -> None:
        logs = list(itertools.islice(self._unknown, _BATCH))
        if not logs:
            return  # all were dropped meanwhile
        terms = self._terms
        streams = [NewStream(log.id, log.created_at, log.claim) for log in logs]
        said = await self._client.run(Create(self.token, terms.lease_ms, terms.keep_ms, terms.claim_ms, streams))
        for log, ours in zip(logs, said, strict=True):
            log.known = ours
            self._unknown.pop(log, None)
        await self._leases.give_up([log for log, ours in zip(logs, said, strict=True) if not ours and not log.dropped])

    # --- appending --------------------------------------------------------------------------------------------

    async def _append_for_ever(self) -> None:
        appending = Attempts("append", self._troubles)
        while True:
            if not self._behind:
                appending.over()
                self._work.clear()
                self._up_to_date.set()
                await self._work.wait()
            await appending.pause(self._terms.tick_s)
            await appending.succeeds(self._append_all())

    async def _append_all(self) -> None:
        """What is new at the beginning, of each stream at most one group."""
        logs = list(self._behind)
        while logs:
            del logs[: await self._append_some(logs[:_BATCH])]

    async def _append_some(self, logs: list[RedisLog]) -> int:
        """How many of these were dealt with."""
        groups: list[tuple[RedisLog, Group, int]] = []
        size = count = 0
        for log in logs:
            count += 1
            if log.dropped or not log.known:
                continue
            frames = log.read(log.mirrored)
            if not frames:
                self._requeue(log)
                continue
            end = log.mirrored + len(frames)
            last = log.last_seq if end == log.tail else last_seq_of(frames)
            ends = log.sealed and end == log.tail
            groups.append((log, Group(log.keys, log.mirrored_seq, last, ends, frames), end))
            size += len(frames)
            if size > _BATCH_BYTES:
                break
        if groups:
            said = await self._client.run(Append(self.token, self._terms.keep_ms, [group for _, group, _ in groups]))
            await self._heed(groups, said)
        return count

    async def _heed(self, groups: list[tuple[RedisLog, Group, int]], said: list[Appended]) -> None:
        """Notes up to where Redis has each stream, which is the position behind its group, or another one."""
        lost = []
        for (log, group, end), (standing, last) in zip(groups, said, strict=True):
            if log.dropped:
                continue
            if standing in (OURS, STOP_ASKED):
                # Redis has more than we know of where an answer was lost, and less where a replica took its place.
                log.mirrored = end if last == group.last else log.position_after(last)
                log.mirrored_seq = last
            self._requeue(log)
            if self._leases.heed(log, standing):
                lost.append(log)
        await self._leases.give_up(lost)

    def _requeue(self, log: RedisLog) -> None:
        """Puts a log behind the others where there is more for Redis, and takes it off their list where not."""
        if log.mirrored < log.tail:
            self._behind[log] = self._behind.pop(log, None)
        elif log.sealed:
            self.drop(log)
        else:
            self._take_off(log)

    def _take_off(self, log: RedisLog) -> None:
        log.behind = False
        self._behind.pop(log, None)
