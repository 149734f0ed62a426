"""The shared log on the side of who generates: streams of this process, mirrored to Redis or Valkey.

Streams and readers know the local log alone. Beside it one task takes what is new of all streams to Redis, in one call
a tick, and another keeps the leases. Nothing is kept twice for that: what Redis has not got yet is read from the local
log, however long Redis was away, and the number of the last frame that Redis has says where to go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog
from redis import exceptions

from aisse.replay import scripts
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.replay.scripts import claim_key, entries_key, readers_key, state_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from redis.asyncio import Redis

# How long Redis may take for one answer. Longer than any of our calls takes by far, and well within a lease.
ANSWER_S = 2.0

# At most so many streams and bytes in one call, so that Redis is not kept from others, nor this process by the reply.
_BATCH = 256
_BATCH_BYTES = 1 << 20

# What is waited after a failure, doubled each time.
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 1.0

# Nothing here waits for longer between two looks at the clock: so great a gap means that this process stood still.
_AWAY_S = 5.0

# Renewals and looks at leases in the time of one lease: several may be lost before it lapses, and `stop` is seen within
# a second.
RENEWALS = 8

_log = structlog.get_logger("aisse.replay")


class Producer(Protocol):
    """Who generates the streams. Called synchronously; a stream that has ended meanwhile is to be ignored."""

    def read_elsewhere(self, stream_id: str, instances: int, position: int) -> None:
        """So many other instances have readers of the stream, the furthest of which has got up to `position`."""

    def stop_asked(self, stream_id: str) -> None:
        """Somebody asked another instance to stop the stream."""

    def lost(self, stream_id: str, frames: bytes, last_seq: int) -> None:
        """Another instance has ended the stream with `frames` (empty where it is not known how). Nothing is kept."""

    def held_back(self, stream_id: str) -> bool:
        """Whether the stream waits for its readers."""


class Found(NamedTuple):
    """A stream that Redis knows. Times are seconds since the epoch."""

    created_at: float
    ended_at: float | None


class RedisLog(MemoryLog):
    """The local log of a stream that this process generates. `Mirror` takes what it gets to Redis."""

    __slots__ = (
        "_mirror",
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

    def __init__(self, stream_id: str, memory: ReplayMemory, mirror: Mirror) -> None:
        super().__init__(stream_id, memory)
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

    def __init__(self, client: Redis, producer: Producer, *, tick_s: float, lease_s: float, retention_s: float) -> None:
        self.token = secrets.token_urlsafe(12)
        """Names this process, as producer and as reader."""
        self._client = client
        self._producer = producer
        self._tick_s = tick_s
        self._lease_s = lease_s
        self._lease_ms = round(lease_s * 1000)
        # Who is a lease behind still finds how the stream ended.
        self._keep_ms = round((retention_s + lease_s) * 1000)
        self._logs: dict[str, RedisLog] = {}
        self._behind: dict[RedisLog, None] = {}
        self._elsewhere: set[RedisLog] = set()
        self._work = asyncio.Event()
        self._created = asyncio.Event()  # set and replaced whenever Redis has got to know streams
        self._settled: asyncio.Future[None] | None = None
        self._troubles: dict[str, str] = {}
        self._awake = time.monotonic()
        self._append = client.register_script(scripts.APPEND)
        self._create = client.register_script(scripts.CREATE)
        self._renew = client.register_script(scripts.RENEW)
        self._claim = client.register_script(scripts.CLAIM)
        self._ask = client.register_script(scripts.STOP_ASKED)

    def log(self, stream_id: str, memory: ReplayMemory) -> RedisLog:
        """The log of a new stream, which Redis knows of with the next tick."""
        log = self._logs[stream_id] = RedisLog(stream_id, memory, self)
        self.note(log)
        return log

    def note(self, log: RedisLog) -> None:
        """Has what is new in `log` taken to Redis, unless it was dropped."""
        if self._logs.get(log.id) is not log:
            return
        log.listed = True
        self._behind[log] = None
        self._work.set()

    def drop(self, log: RedisLog) -> None:
        """`log` is not mirrored any more."""
        self._logs.pop(log.id, None)
        self._elsewhere.discard(log)
        self._unlist(log)

    @property
    def trouble(self) -> str | None:
        """Why Redis does not get what it should, in words; None while it does."""
        return next(iter(self._troubles.values()), None)

    @property
    def behind(self) -> int:
        """Streams of which Redis has not got everything."""
        return len(self._behind)

    async def known(self, stream_id: str, within_s: float) -> None:
        """Returns once Redis knows of the stream, at the latest `within_s` on, for Redis may be away."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while (log := self._logs.get(stream_id)) is not None and not log.known:
                    await self._created.wait()

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

        Raises RedisError. Where it is cancelled nobody knows; `withdraw` then.
        """
        stream, asked = await self._claim(
            keys=[claim_key(digest), state_key(stream_id)],
            args=[
                # Every id that a claim in this bucket can name lies in the same bucket.
                entries_key(stream_id).removesuffix(stream_id),
                *(stream_id, request, self.token, self._lease_ms, self._keep_ms),
                *(self._keep_ms + 3_600_000, round(time.time() * 1000)),
            ],
        )
        return stream.decode(), asked.decode()

    async def withdraw(self, stream_id: str, digest: str | None) -> None:
        """Forgets a stream that nobody was told of, and its claim. Redis may be away: then they expire."""
        keys = [state_key(stream_id), entries_key(stream_id)] + ([claim_key(digest)] if digest else [])
        with contextlib.suppress(exceptions.RedisError):
            await self._client.delete(*keys)

    async def find(self, stream_id: str) -> Found | None:
        """What Redis knows of a stream, whoever generates it; None if nothing. Raises RedisError."""
        created, ended = await self._client.hmget(state_key(stream_id), ["created", "ended"])
        if created is None:
            return None
        return Found(int(created) / 1000, int(ended) / 1000 if ended is not None else None)

    async def ask_to_stop(self, stream_id: str) -> bool:
        """Has the stream's producer end it; False if there is no such stream. Raises RedisError."""
        return bool(await self._ask(keys=[state_key(stream_id)]))

    async def run(self) -> None:
        """Mirrors and renews until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._append_for_ever(), name="shared log: append")
            tasks.create_task(self._renew_for_ever(), name="shared log: leases")

    # --- appending --------------------------------------------------------------------------------------------

    async def _append_for_ever(self) -> None:
        failures = 0
        while True:
            if not self._behind:
                self._work.clear()
                self._tell_settled()
                await self._work.wait()
            await asyncio.sleep(self._tick_s if not failures else backoff_s(failures))
            failures = 0 if await self._reach("append", self._append_some) else failures + 1

    async def _append_some(self) -> None:
        batch = list(islice(self._behind, _BATCH))
        if unknown := [log for log in batch if not log.known]:
            created = [round(log.created_at * 1000) for log in unknown]
            await self._create(
                keys=[log.state_key for log in unknown],
                args=[self.token, self._lease_ms, self._keep_ms, *created],
            )
            for log in unknown:
                log.known = True
            self._created.set()
            self._created = asyncio.Event()
        keys: list[bytes] = []
        args: list[Any] = [self.token, self._keep_ms]
        groups: list[tuple[RedisLog, int, int]] = []
        size = 0
        for log in batch:
            if log.gone:
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
            return
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
            if log.suspect:
                return True
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
            # A stream that waits for readers elsewhere goes on when it hears of them.
            await asyncio.sleep(2 * self._tick_s if not failures else backoff_s(failures))
            self._look_at_clock()
            if self._awake >= due:
                due = self._awake + self._lease_s / RENEWALS
                logs: Iterable[RedisLog] = self._logs.values()
            else:
                logs = (log for log in self._elsewhere if self._producer.held_back(log.id))
            if some := [log for log in logs if log.known]:
                reached = await self._reach("renew", lambda logs=some: self._renew_all(logs))  # type: ignore[misc]
                failures = 0 if reached else failures + 1

    async def _renew_all(self, logs: list[RedisLog]) -> None:
        for at in range(0, len(logs), _BATCH):
            some = logs[at : at + _BATCH]
            said = await self._renew(
                keys=[key for log in some for key in (log.state_key, log.entries_key, log.readers_key)],
                args=[self.token, self._lease_ms, self._keep_ms],
            )
            lost = []
            for log, code, instances, position in zip(some, said[::3], said[1::3], said[2::3], strict=True):
                if log.gone or log.id not in self._logs:
                    continue
                if self._heed(log, code):
                    lost.append(log)
                elif instances or log.read_elsewhere:
                    log.read_elsewhere = instances > 0
                    (self._elsewhere.add if instances else self._elsewhere.discard)(log)
                    self._producer.read_elsewhere(log.id, instances, min(position, log.tail))
            await self._give_up(lost)

    # --- trouble ----------------------------------------------------------------------------------------------

    def _look_at_clock(self) -> None:
        before, self._awake = self._awake, time.monotonic()
        if self._awake - before > max(_AWAY_S, self._lease_s):
            for log in self._logs.values():
                log.suspect = True

    async def _reach(self, what: str, work: Callable[[], Awaitable[None]]) -> bool:
        """Whether Redis did the work; if not, `trouble` says why."""
        self._look_at_clock()
        try:
            await work()
        except Exception as error:
            # Whatever it is must not end the task for ever, and with it what others get of all streams.
            trouble = in_words(error)
            if trouble not in self._troubles.values():
                _log.warning("shared log in trouble", why=trouble)
            self._troubles[what] = trouble
            if isinstance(error, exceptions.ReadOnlyError):
                # It was replaced by another, to which its address leads by now.
                await self._client.connection_pool.disconnect()
            return False
        finally:
            self._look_at_clock()
        if self._troubles.pop(what, None) is not None and not self._troubles:
            _log.info("shared log is back")
        return True


def backoff_s(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    longest: float = min(_LAST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(failures - 1, 10))
    return longest * random.uniform(0.5, 1)  # noqa: S311 - no secret


def in_words(error: BaseException) -> str:
    """What is the matter with Redis, for operators; nothing of what was sent to it."""
    match error:
        case _ if not isinstance(error, exceptions.RedisError | OSError):  # TimeoutError is an OSError
            _log.error("shared log failed", exc_info=error)
            return "the shared log's client failed; the log tells how"
        case exceptions.OutOfMemoryError():
            return "the shared log is full (maxmemory)"
        case exceptions.ReadOnlyError():
            return "the shared log is read-only"
        case exceptions.BusyLoadingError():
            return "the shared log is still loading its data"
        case exceptions.AuthenticationError() | exceptions.NoPermissionError():
            return "the shared log refuses our user or password"
        case exceptions.ConnectionError() | exceptions.TimeoutError() | OSError():
            return "the shared log does not answer"
    # Redis begins its errors with a word in capitals; the rest may repeat what it was sent.
    word = str(error).partition(" ")[0]
    return f"the shared log refuses what it is asked ({word if word.isupper() and word.isalpha() else 'ERR'})"


def last_seq_of(frames: bytes) -> int:
    """The number of the last of these frames."""
    return int(frames[frames.rindex(b".") + 1 : -2])
