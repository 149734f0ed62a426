"""The shared log on the side of who generates: streams of this process, mirrored to Redis or Valkey.

Streams and readers know the local log alone. Beside it one task takes what is new of all streams to Redis, in one call
a tick, and another keeps the leases. Nothing is kept twice for that: what Redis has not got yet is read from the local
log, however long Redis was away, and the number of the last frame that Redis has says where to go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import secrets
import time
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from redis import exceptions

from aisse.replay import scripts
from aisse.replay.connection import PROMPT_S, Troubles, backoff_s, heed_cancellation
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.replay.scripts import claim_key, entries_key, readers_key, state_key, withdrawn_key
from aisse.sse import last_seq_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from redis.asyncio import Redis

# At most so many streams and bytes in one call, so that Redis is not kept from others, nor this process by the reply.
_BATCH = 256
_BATCH_BYTES = 1 << 20

# The clock is looked at once a second, by a task that waits for nothing else: so great a gap, or one of a lease if that
# is more, means that this process stood still.
_CLOCK_S = 1.0
_AWAY_S = 5.0

# How long what would begin a stream is refused once that is withdrawn: it may be on its way on another connection, or
# wait in a Redis that stands still. Both are at its door when it has done the withdrawal.
_WITHDRAWN_MS = 60_000

# Several renewals may be lost before a lease lapses; that somebody asked for a stream's end is seen within a second.
_RENEWALS = 8
_LONGEST_INTERVAL_S = 0.75

_log = structlog.get_logger("aisse.replay")


class Producer(Protocol):
    """Who generates the streams. Called synchronously; a stream that has ended meanwhile is to be ignored."""

    def read_elsewhere(self, stream_id: str, instances: int, position: int, *, stalled: bool) -> None:
        """So many other instances have readers of the stream, the furthest of which has got up to `position`.

        `stalled` if the last one there left with bytes waiting for it.
        """

    def moved_elsewhere(self, stream_id: str, within_s: float) -> None:
        """Readers that other instances have moved may come back within so many seconds."""

    def stop_asked(self, stream_id: str) -> None:
        """Somebody asked another instance to stop the stream."""

    def lost(self, stream_id: str, frames: bytes, last_seq: int) -> None:
        """Another instance has ended the stream with `frames` (empty where it is not known how). Nothing is kept."""

    def held_back(self, stream_id: str) -> bool:
        """Whether the stream waits for its readers."""


class RedisLog(MemoryLog):
    """The local log of a stream that this process generates. `Mirror` takes what it gets to Redis."""

    __slots__ = (
        "_mirror",
        "claim",
        "created_at",
        "entries_key",
        "gone",
        "id",
        "kept",
        "kept_seq",
        "known",
        "listed",
        "read_elsewhere",
        "readers_key",
        "sealed",
        "state_key",
        "suspect",
    )

    def __init__(self, stream_id: str, memory: ReplayMemory, mirror: Mirror, claim: tuple[str, str] | None) -> None:
        """`claim` are the digests of the Idempotency-Key and of the request that came with it."""
        super().__init__(memory)
        self.claim = claim
        self.id = stream_id
        # Made once: they are sent with every append.
        self.state_key = state_key(stream_id).encode()
        self.entries_key = entries_key(stream_id).encode()
        self.readers_key = readers_key(stream_id).encode()
        self.created_at = time.time()
        self.kept = 0  # position up to which Redis has it
        self.kept_seq = 0
        self.known = False  # to Redis
        self.sealed = False
        self.gone = False
        self.suspect = False  # of having been given up by others, since this process stood still
        self.listed = False  # as one that Redis has not got all of
        self.read_elsewhere = False
        self._mirror = mirror

    def append(self, frames: bytes, last_seq: int) -> None:
        """As in memory; Redis gets it with the next tick."""
        super().append(frames, last_seq)
        if not self.listed:
            self._mirror.note(self)

    def seal(self) -> None:
        """What was appended last ends the stream, in Redis too."""
        super().seal()
        self.sealed = True
        if not self.listed and not self.gone:
            self._mirror.note(self)

    def discard(self) -> None:
        """Forgets it here. What Redis has goes when its time is over, what it has not got yet is lost."""
        super().discard()
        self.gone = True
        self._mirror.drop(self)


class Mirror:
    """Takes this process's streams to Redis. `run` is one task's; everything else returns at once, or says so."""

    def __init__(
        self,
        client: Redis,
        producer: Producer,
        *,
        tick_s: float,
        lease_s: float,
        retention_s: float,
        stream_s: float = 3600.0,
        troubles: Troubles | None = None,
    ) -> None:
        """`troubles` are there where others tell of theirs together with these."""
        self.token = secrets.token_urlsafe(12)
        """Names this process, as producer and as reader."""
        self._client = client
        self._producer = producer
        self._tick_s = tick_s
        self._lease_s = lease_s
        self._lease_ms = round(lease_s * 1000)
        # Who is a lease behind still finds how the stream ended.
        self._keep_ms = round((retention_s + lease_s) * 1000)
        self._interval_s = interval_s(lease_s)
        self._claim_ms = self._keep_ms + round(stream_s * 1000)
        self._steady_since = 0.0
        self._logs: dict[str, RedisLog] = {}
        self._behind: dict[RedisLog, None] = {}
        self._elsewhere: set[RedisLog] = set()
        self._work = asyncio.Event()
        self._new = asyncio.Event()
        self._unknown: dict[RedisLog, None] = {}  # to Redis, oldest first
        self._settled: asyncio.Future[None] | None = None
        self._troubles = troubles or Troubles()
        self._awake = time.monotonic()
        self._append = client.register_script(scripts.APPEND)
        self._create = client.register_script(scripts.CREATE)
        self._renew = client.register_script(scripts.RENEW)
        self._claim = client.register_script(scripts.CLAIM)
        self._withdraw = client.register_script(scripts.WITHDRAW)

    def log(self, stream_id: str, memory: ReplayMemory, claim: tuple[str, str] | None = None) -> RedisLog:
        """The log of a new stream, which Redis is told of at once, at the latest with the next tick."""
        log = self._logs[stream_id] = RedisLog(stream_id, memory, self, claim)
        self.note(log)
        return log

    def note(self, log: RedisLog) -> None:
        """Has what is new in `log` taken to Redis, unless it was dropped."""
        if self._logs.get(log.id) is not log:
            return
        log.listed = True
        self._behind[log] = None
        if not log.known:
            self._unknown[log] = None
            self._new.set()
        self._work.set()

    def drop(self, log: RedisLog) -> None:
        """`log` is not mirrored any more."""
        self._logs.pop(log.id, None)
        self._elsewhere.discard(log)
        self._unknown.pop(log, None)
        self._unlist(log)

    @property
    def trouble(self) -> str | None:
        """Why Redis does not get what it should, in words; None while it does."""
        return self._troubles.first

    @property
    def behind(self) -> int:
        """Streams of which Redis has not got everything."""
        return len(self._behind)

    async def settled(self, within_s: float) -> bool:
        """Whether Redis has got everything, now or `within_s`. One caller at a time."""
        if not self._behind:
            return True
        self._settled = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(within_s):
                await self._settled
        except TimeoutError:
            return False
        finally:
            self._settled = None
        return True

    async def claim(self, digest: str, stream_id: str, request: str) -> tuple[str, str]:
        """Gives an Idempotency-Key to a stream that is to be, unless one has it: that one, and its request's digest.

        Raises RedisError. Where no answer came or it is cancelled nobody knows; `withdraw` then.
        """
        stream, asked = await self._claim(
            keys=[claim_key(digest), state_key(stream_id), withdrawn_key(stream_id)],
            args=[
                # Every id that a claim in this bucket can name lies in the same bucket.
                entries_key(stream_id).removesuffix(stream_id),
                *(stream_id, request, self.token, self._lease_ms, self._keep_ms),
                *(self._claim_ms, round(time.time() * 1000)),
            ],
        )
        return stream.decode(), asked.decode()

    async def withdraw(self, stream_id: str, digest: str | None, frames: bytes, last_seq: int) -> None:
        """Forgets a stream that nobody was told of, and its claim, also where word of either is still on its way.

        One that has had readers elsewhere is ended there by `frames`, which are all that it has.

        Tries for as long as Redis would keep them.
        """
        keys = [state_key(stream_id), entries_key(stream_id), withdrawn_key(stream_id)]
        until = time.monotonic() + self._keep_ms / 1000
        failures = 0
        while time.monotonic() < until:
            heed_cancellation()
            try:
                await self._withdraw(
                    keys=keys + ([claim_key(digest)] if digest else []),
                    args=[stream_id, _WITHDRAWN_MS, self._keep_ms, last_seq, frames],
                )
            except (exceptions.RedisError, OSError):
                failures += 1
                await asyncio.sleep(backoff_s(failures))
            else:
                return

    async def run(self) -> None:
        """Mirrors and renews until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._create_for_ever(), name="shared log: create")
            tasks.create_task(self._append_for_ever(), name="shared log: append")
            tasks.create_task(self._renew_for_ever(), name="shared log: leases")
            tasks.create_task(self._watch_clock(), name="shared log: clock")

    # --- new streams ------------------------------------------------------------------------------------------

    async def _create_for_ever(self) -> None:
        """Beside the appends, which may take long: who is told of a stream may ask any instance for it at once."""
        failures = 0
        begun = -math.inf
        while True:
            heed_cancellation()
            if not self._unknown:
                self._troubles.over("create")
                failures = 0
                self._new.clear()
                await self._new.wait()
            # The first one at once, those that come within a tick together.
            wait_s = begun + self._tick_s - time.monotonic()
            await asyncio.sleep(max(0.0, wait_s) if not failures else backoff_s(failures))
            begun = time.monotonic()
            failures = 0 if await self._reach("create", self._create_some) else failures + 1

    async def _create_some(self) -> None:
        if logs := list(itertools.islice(self._unknown, _BATCH)):
            await self._make_known(logs)

    async def _make_known(self, logs: list[RedisLog]) -> None:
        args: list[Any] = [self.token, self._lease_ms, self._keep_ms, self._claim_ms]
        for log in logs:
            args += (log.id, int(log.created_at * 1000), log.claim[1] if log.claim else "")
        said = await self._create(
            keys=[
                key
                for log in logs
                for key in (
                    *(log.state_key, log.entries_key, withdrawn_key(log.id)),
                    claim_key(log.claim[0]) if log.claim else log.state_key,
                )
            ],
            args=args,
        )
        for log, ours in zip(logs, said, strict=True):
            log.known = bool(ours)
            self._unknown.pop(log, None)
        await self._give_up([log for log, ours in zip(logs, said, strict=True) if not ours and not log.gone])

    # --- appending --------------------------------------------------------------------------------------------

    async def _append_for_ever(self) -> None:
        failures = 0
        while True:
            heed_cancellation()
            if not self._behind:
                self._troubles.over("append")
                failures = 0
                self._work.clear()
                self._tell_settled()
                await self._work.wait()
            await asyncio.sleep(self._tick_s if not failures else backoff_s(failures))
            failures = 0 if await self._reach("append", self._append_all) else failures + 1

    async def _append_all(self) -> None:
        """What is new at the beginning, of each stream at most one group."""
        logs = list(self._behind)
        while logs:
            del logs[: await self._append_some(logs[:_BATCH])]

    async def _append_some(self, logs: list[RedisLog]) -> int:
        """How many of these were dealt with."""
        keys: list[bytes] = []
        args: list[Any] = [self.token, self._keep_ms]
        groups: list[tuple[RedisLog, int, int]] = []
        size = count = 0
        for log in logs:
            count += 1
            if log.gone or not log.known:
                continue
            frames = log.read(log.kept)
            if not frames:
                self._keep(log)
                continue
            kept = log.kept + len(frames)
            last_seq = log.last_seq if kept == log.tail else last_seq_of(frames)
            keys += (log.state_key, log.entries_key)
            args += (log.kept_seq, last_seq, int(log.sealed and kept == log.tail), frames)
            groups.append((log, kept, last_seq))
            size += len(frames)
            if size > _BATCH_BYTES:
                break
        if not groups:
            return count
        said = await self._append(keys=keys, args=args)
        lost = []
        for (log, kept, last_seq), code in zip(groups, said, strict=True):
            if log.gone:
                continue
            if code in {scripts.OK, scripts.STOP}:
                log.kept, log.kept_seq = kept, last_seq
            elif code < 0:
                # Redis has more than we know of, for an answer was lost, or less, for it was replaced by a replica.
                log.kept_seq = -code - 1
                log.kept = log.position_after(log.kept_seq)
            self._keep(log)
            if self._heed(log, code):
                lost.append(log)
        await self._give_up(lost)
        return count

    def _keep(self, log: RedisLog) -> None:
        """Notes whether there is more for Redis."""
        if log.kept < log.tail:
            self._behind[log] = self._behind.pop(log, None)  # the others first
        elif log.sealed:
            self.drop(log)
        else:
            self._unlist(log)

    def _heed(self, log: RedisLog, code: int) -> bool:
        """Does what Redis says of a stream; True if it is lost."""
        if code == scripts.STOP:
            self._producer.stop_asked(log.id)
        elif code == scripts.MISSING:
            if log.suspect or self._stood_still:
                return True
            self._steady_since = time.monotonic()
            # Redis was emptied. It gets everything again, from here.
            log.known = False
            log.kept = log.kept_seq = 0
            self.note(log)
        else:
            log.suspect = False
        return code == scripts.CLOSED

    async def _give_up(self, lost: Iterable[RedisLog]) -> None:
        for log in lost:
            entries: Any = await self._client.xrevrange(log.entries_key, count=1)
            self.drop(log)
            last, fields = entries[0] if entries else (b"0-0", {b"f": b""})
            self._producer.lost(log.id, fields[b"f"], int(last.partition(b"-")[0]))

    def _unlist(self, log: RedisLog) -> None:
        log.listed = False
        self._behind.pop(log, None)

    def _tell_settled(self) -> None:
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)

    # --- leases -----------------------------------------------------------------------------------------------

    async def _renew_for_ever(self) -> None:
        failures = 0
        due = 0.0
        while True:
            heed_cancellation()
            # A stream that waits for readers elsewhere goes on when it hears of them.
            await asyncio.sleep(2 * self._tick_s if not failures else backoff_s(failures))
            if time.monotonic() >= due:
                due = time.monotonic() + self._interval_s
                logs: Iterable[RedisLog] = self._logs.values()
            else:
                logs = (log for log in self._elsewhere if self._producer.held_back(log.id))
            if some := [log for log in logs if log.known]:
                begun = time.monotonic()
                reached = await self._reach("renew", lambda logs=some: self._renew_all(logs))  # type: ignore[misc]
                failures = 0 if reached else failures + 1
                if not reached or time.monotonic() - begun > PROMPT_S:
                    self._steady_since = time.monotonic()
            elif not self._logs:
                self._troubles.over("renew")
                failures = 0

    async def _renew_all(self, logs: list[RedisLog]) -> None:
        for at in range(0, len(logs), _BATCH):
            some = logs[at : at + _BATCH]
            # Where Redis was away or emptied, readers had no chance to say that they are there.
            steady = time.monotonic() - self._steady_since > self._lease_s
            said = await self._renew(
                keys=[key for log in some for key in (log.state_key, log.entries_key, log.readers_key)],
                args=[self.token, self._lease_ms, self._keep_ms],
            )
            lost = []
            for log, code, instances, position, moved_ms, stalled in zip(
                some, *(said[each::5] for each in range(5)), strict=True
            ):
                if log.gone or log.id not in self._logs:
                    continue
                if moved_ms:  # first: where they were the last readers, only this keeps the stream
                    self._producer.moved_elsewhere(log.id, moved_ms / 1000)
                if self._heed(log, code):
                    lost.append(log)
                elif instances or (log.read_elsewhere and code in {scripts.OK, scripts.STOP} and steady):
                    log.read_elsewhere = instances > 0
                    (self._elsewhere.add if instances else self._elsewhere.discard)(log)
                    self._producer.read_elsewhere(log.id, instances, min(position, log.tail), stalled=bool(stalled))
            await self._give_up(lost)

    # --- trouble ----------------------------------------------------------------------------------------------

    @property
    def _stood_still(self) -> bool:
        return time.monotonic() - self._awake > max(_AWAY_S, self._lease_s)

    async def _watch_clock(self) -> None:
        """Notes when it was this process that stood still, and not Redis: others may have given up its streams."""
        while True:
            self._awake = time.monotonic()
            await asyncio.sleep(_CLOCK_S)
            if self._stood_still:
                for log in self._logs.values():
                    log.suspect = True

    async def _reach(self, what: str, work: Callable[[], Awaitable[None]]) -> bool:
        """Whether Redis did the work; if not, `trouble` says why."""
        try:
            await work()
        except Exception as error:
            # Whatever it is must not end the task for ever, and with it what others get of all streams.
            self._troubles.met(what, error)
            if isinstance(error, exceptions.ReadOnlyError):
                # It was replaced by another, to which its address leads by now.
                with contextlib.suppress(Exception):
                    await self._client.connection_pool.disconnect(inuse_connections=False)
            return False
        self._troubles.over(what)
        return True


def interval_s(lease_s: float) -> float:
    """Seconds between two renewals, and between two looks at what others renew."""
    return min(lease_s / _RENEWALS, _LONGEST_INTERVAL_S)
