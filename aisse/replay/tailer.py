"""The shared log on the side of who reads: streams of other processes, followed in Redis or Valkey.

A stream that is followed has a local log like any other; one task brings what is new of all of them, however many, and
another tells who is read here, and watches the leases. Whoever sees one lapse first ends its stream, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog
from redis import exceptions

from aisse.replay import scripts
from aisse.replay.connection import PROMPT_S, Troubles, backoff_s, heed_cancellation
from aisse.replay.mirror import interval_s
from aisse.replay.scripts import entries_key, instance_key, readers_key, state_key
from aisse.sse import is_end, last_seq_of, offset_after

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from redis.asyncio import Redis
    from redis.commands.core import AsyncScript

    from aisse.replay.memory import MemoryLog

# What one call brings of each stream: two entries, which are at most a segment and a frame.
_ENTRIES = 2
# When a stream is opened it alone is read.
_PAGE = 16

# How long one call waits for something new, and how soon it is called again to take a stream in that has come.
BLOCK_S = 1.0
_UNBLOCK_AGAIN_S = 0.005

# At most so many streams in one call while there is much to catch up on, so that its reply stays small.
_SLICE = 64

_BATCH = 256

# What a process that ends takes at most to say that nobody reads here.
_LEAVE_S = 0.2

_log = structlog.get_logger("aisse.replay")


class Follower(Protocol):
    """A stream that is generated elsewhere, as it stands here. Everything is synchronous."""

    id: str
    log: MemoryLog
    last_reader_stalled: bool
    """Whether the reader that left last had bytes waiting for it."""

    @property
    def moved_until(self) -> float:
        """Until then readers that were moved from here may come back, on the loop's clock."""

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
        """The frames that end it where it was withdrawn, and the number of the last of them."""


class Found(NamedTuple):
    """A stream that Redis knows. Times are seconds since the epoch."""

    created_at: float
    ended_at: float | None


class _Followed:
    """What is known of one stream beside the stream."""

    __slots__ = ("entries", "lapsed_since", "missing_since", "readers", "state", "stream", "told")

    def __init__(self, stream: Follower) -> None:
        self.stream = stream
        self.entries = entries_key(stream.id)
        self.state = state_key(stream.id)
        self.readers = readers_key(stream.id)
        self.told = 0  # the position that Redis was told of
        self.lapsed_since: float | None = None
        self.missing_since: float | None = None


class Tailer:
    """Follows streams. `run` is one task's."""

    def __init__(
        self,
        client: Redis,
        blocking: Redis,
        instance: str,
        *,
        tick_s: float,
        lease_s: float,
        retention_s: float,
        read_ahead_bytes: int,
        troubles: Troubles | None = None,
    ) -> None:
        """`blocking` has one connection, which is this object's alone; `client` is anybody's.

        `troubles` are there where others tell of theirs together with these.
        """
        self._client = client
        self._blocking = blocking
        self._instance = instance
        self._tick_s = tick_s
        self._lease_s = lease_s
        self._lease_ms = round(lease_s * 1000)
        self._interval_s = interval_s(lease_s)
        self._keep_ms = round((retention_s + lease_s) * 1000)
        self._report_bytes = read_ahead_bytes // 4
        self._followed: dict[bytes, _Followed] = {}
        self._leaving: dict[bytes, _Followed] = {}
        self._work = asyncio.Event()
        self._round = 0  # of calls that wait; odd while one does
        self._blocking_id: int | None = None
        self._attend = client.register_script(scripts.ATTEND)
        self._bury = client.register_script(scripts.BURY)
        self._look = client.register_script(scripts.LOOK)
        self._ask = client.register_script(scripts.STOP_ASKED)
        self._steady_since = time.monotonic()
        self._attended = time.monotonic()
        self._troubles = troubles or Troubles()
        self._marker = instance_key(instance)
        self._marked = False
        self._doubtful_since = -math.inf

    @property
    def trouble(self) -> str | None:
        """Why nothing comes from Redis, in words; None while it can."""
        return self._troubles.first

    async def find(self, stream_ids: Sequence[str]) -> list[Found | None]:
        """What Redis knows of each stream, whoever generates it; None if nothing. Raises RedisError.

        Where that may be because Redis was emptied, `doubtful` says so.
        """
        found = await self._said(self._look, stream_ids)
        return [
            Found(int(each[0]) / 1000, int(each[1]) / 1000 if each[1] is not None else None) if each else None
            for each in found
        ]

    async def ask_to_stop(self, stream_ids: Sequence[str]) -> list[bool | None]:
        """Has each stream's producer end it; None where there is no such stream. Raises as `find` does. Idempotent."""
        return [True if each else None for each in await self._said(self._ask, stream_ids)]

    async def _said(self, script: AsyncScript, stream_ids: Sequence[str]) -> Any:
        there, *said = await script(keys=[self._marker, *map(state_key, stream_ids)])
        if not there:
            await self.mark()
        return said

    async def load(self, stream: Follower) -> None:
        """Brings a stream up to what Redis has of it. Raises RedisError."""
        while True:
            entries: Any = await self._client.xrange(entries_key(stream.id), f"({stream.log.last_seq}-0", count=_PAGE)
            for _, fields in entries:
                self._deliver(stream, fields)
            if len(entries) < _PAGE or stream.reason is not None:
                return

    def follow(self, stream: Follower) -> None:
        """Brings what comes of a stream from now on, a little later unless `hasten` is called."""
        followed = _Followed(stream)
        key = followed.entries.encode()
        self._followed[key] = followed
        self._leaving.pop(key, None)
        self._work.set()

    async def hasten(self, stream_ids: Sequence[str]) -> list[bool | None]:
        """Has streams that are followed since a moment ago count as read here, and come at once.

        None for one that was withdrawn before it counted; it is not followed any more. Raises RedisError.
        """
        keys = [entries_key(stream_id).encode() for stream_id in stream_ids]
        some = [followed for key in keys if (followed := self._followed.get(key)) is not None]
        withdrawn: set[str] = set()
        for at in range(0, len(some), _BATCH):
            withdrawn |= await self._look_after(some[at : at + _BATCH], about_to_be_read=True)
        # The call that waits does not know of them yet, or is on its way to wait.
        waiting = self._round
        while waiting % 2 and waiting == self._round and self._blocking_id is not None:
            if await self._client.client_unblock(self._blocking_id):
                break
            await asyncio.sleep(_UNBLOCK_AGAIN_S)
        return [None if stream_id in withdrawn else True for stream_id in stream_ids]

    def unfollow(self, stream: Follower) -> None:
        """Nothing comes any more, and soon it does not count as read here. Idempotent."""
        key = entries_key(stream.id).encode()
        if (followed := self._followed.pop(key, None)) is not None:
            self._leaving[key] = followed

    async def leave(self) -> None:
        """Has none count as read here. Redis may be away: then that lapses."""
        for followed in list(self._followed.values()):
            self.unfollow(followed.stream)
        with contextlib.suppress(exceptions.RedisError, OSError, TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await self._look_after_all([])

    def reconnected(self) -> None:
        """The connection that waits is a new one, and has another id."""
        self._blocking_id = None

    async def run(self) -> None:
        """Follows and watches until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tail_for_ever(), name="shared log: tail")
            tasks.create_task(self._attend_for_ever(), name="shared log: attend")

    # --- what comes -------------------------------------------------------------------------------------------

    async def _tail_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            heed_cancellation()
            if not self._followed:
                self._troubles.over("tail")
                failures = 0
                self._work.clear()
                await self._work.wait()
            begun = loop.time()
            try:
                if failures:
                    await self._catch_up()
                await self._tail_once()
            except Exception as error:
                # Whatever it is must not end the task for ever, and with it all that others generate.
                self._troubles.met("tail", error)
                self._blocking_id = None
                with contextlib.suppress(Exception):
                    await self._blocking.connection_pool.disconnect()
                failures += 1
                await asyncio.sleep(backoff_s(failures))
                continue
            self._troubles.over("tail")
            failures = 0
            await asyncio.sleep(max(0.0, begun + self._tick_s - loop.time()))

    async def _tail_once(self) -> None:
        if self._blocking_id is None:
            self._blocking_id = await self._blocking.client_id()
        if not (after := self._after(self._followed)):
            return  # the last one has ended meanwhile; Redis refuses a call that names none
        self._round += 1
        try:
            came = await self._blocking.xread(after, count=_ENTRIES, block=round(BLOCK_S * 1000))
        finally:
            self._round += 1
        self._take(came)

    async def _catch_up(self) -> None:
        """Some streams at a time, without waiting for any: there may be much of each."""
        keys = list(self._followed)
        for at in range(0, len(keys), _SLICE):
            while after := self._after(key for key in keys[at : at + _SLICE] if key in self._followed):
                if not (came := await self._blocking.xread(after, count=_ENTRIES)):
                    break
                self._take(came)
                await asyncio.sleep(0)

    def _after(self, keys: Iterable[bytes]) -> dict[Any, Any]:
        return {key: b"%d-0" % self._followed[key].stream.log.last_seq for key in keys}

    def _take(self, came: Any) -> None:
        for key, entries in came:
            for _, fields in entries:
                if (followed := self._followed.get(key)) is not None:
                    self._deliver(followed.stream, fields)

    def _deliver(self, stream: Follower, fields: dict[bytes, bytes]) -> None:
        frames, before = fields[b"f"], int(fields[b"p"])
        last_seq = last_seq_of(frames)
        if last_seq <= stream.log.last_seq:
            return
        if before > stream.log.last_seq:
            _log.error("shared log has a hole", stream_id=stream.id[:8])
            self._followed.pop(entries_key(stream.id).encode(), None)
            stream.conclude(*stream.burial())
            return
        if before < stream.log.last_seq:
            # Redis was emptied and given everything again, cut in other places. Or it is the end of a lost producer, of
            # which Redis had got less than this process: its number lies behind a hole, and all of it is new.
            frames = frames[offset_after(frames, stream.log.last_seq) :]
        if is_end(frames):
            self._followed.pop(entries_key(stream.id).encode(), None)
            stream.conclude(frames, last_seq)
        else:
            stream.publish(frames, last_seq)

    # --- leases -----------------------------------------------------------------------------------------------

    async def _attend_for_ever(self) -> None:
        failures = 0
        due = 0.0
        while True:
            heed_cancellation()
            await asyncio.sleep(2 * self._tick_s if not failures else backoff_s(failures))
            try:
                if time.monotonic() >= due:
                    due = time.monotonic() + self._interval_s
                    await self.mark()
                    await self._look_after_all(list(self._followed.values()))
                elif some := [each for each in self._followed.values() if self._has_news(each)]:
                    await self._look_after_all(some)
            except Exception as error:
                self._troubles.met("attend", error)
                failures += 1
                due = 0.0  # a turn in which nothing is asked would look as if Redis were well
            else:
                self._troubles.over("attend")
                failures = 0

    async def _look_after_all(self, some: list[_Followed]) -> None:
        """Also where there are none: how long Redis has been there is to be known when the first comes."""
        leaving, self._leaving = self._leaving, {}
        some = some + list(leaving.values())
        for at in range(0, max(1, len(some)), _BATCH):
            await self._look_after(some[at : at + _BATCH])

    async def mark(self) -> None:
        """Notes whether Redis was emptied: who generates needs a moment to say everything again. Raises RedisError."""
        if not await self._client.pexpire(self._marker, self._keep_ms):
            if self._marked:
                self._doubtful_since = self._steady_since = time.monotonic()
            with contextlib.suppress(exceptions.ResponseError):  # it is full
                self._marked = bool(await self._client.set(self._marker, 1, px=self._keep_ms))

    @property
    def doubtful(self) -> bool:
        """Whether Redis may not have everything at the moment that the instances do."""
        return time.monotonic() - self._doubtful_since < self._lease_s

    def _has_news(self, followed: _Followed) -> bool:
        return followed.stream.furthest - followed.told >= self._report_bytes

    async def _look_after(self, some: list[_Followed], *, about_to_be_read: bool = False) -> set[str]:
        """The ids of those that were withdrawn, where nobody reads them yet and so nobody needs to be told."""
        withdrawn: set[str] = set()
        args: list[Any] = [self._instance, self._lease_ms]
        positions = [each.stream.furthest for each in some]
        now = asyncio.get_running_loop().time()
        for each, position in zip(some, positions, strict=True):
            here = self._followed.get(each.entries.encode()) is each
            args += (int(here and (about_to_be_read or each.stream.readers > 0)), position)
            args += (max(0, round((each.stream.moved_until - now) * 1000)), int(each.stream.last_reader_stalled))
        begun = time.monotonic()
        if begun - self._attended > max(self._lease_s, PROMPT_S):
            self._steady_since = begun  # it was we who stood still
        answered = False
        try:
            now_ms, *said = await self._attend(
                keys=[key for each in some for key in (each.state, each.readers)], args=args
            )
            answered = True
        finally:
            self._attended = time.monotonic()
            if not answered or self._attended - begun > PROMPT_S:
                self._doubtful_since = self._steady_since = self._attended
        # Where Redis was away, who generates had no chance to renew: they get the time of a lease for it.
        trusted = self._attended - self._steady_since >= self._lease_s
        for each, position, left_ms, last_seq, ended in zip(
            some, positions, said[::3], said[1::3], said[2::3], strict=True
        ):
            each.told = position
            if self._followed.get(each.entries.encode()) is not each:
                continue  # it has ended, or nobody reads it any more
            if left_ms is None and ended and about_to_be_read and not each.stream.readers:
                del self._followed[each.entries.encode()]
                withdrawn.add(each.stream.id)
                continue
            if left_ms is None:
                self._miss(each, withdrawn=bool(ended))
                continue
            each.missing_since = None
            if left_ms >= 0 or ended or not trusted:
                each.lapsed_since = None
                continue
            if each.lapsed_since is None:
                each.lapsed_since = begun
            # Seen twice, with a renewal's time in between: Redis's clock may have been set.
            # Redis may have less than this process, if it was replaced or emptied; what it has more of comes first.
            if begun - each.lapsed_since >= self._interval_s * 0.9 and last_seq <= each.stream.log.last_seq:
                frames, end_seq = each.stream.burial()
                args = [last_seq, end_seq, frames, self._keep_ms, now_ms + round(PROMPT_S * 1000)]
                if await self._bury(keys=[each.state, each.entries], args=args):
                    _log.warning("producer lost", stream_id=each.stream.id[:8])
        return withdrawn

    def _miss(self, followed: _Followed, *, withdrawn: bool) -> None:
        """Redis does not know the stream: it was emptied. Who generates has the time of a lease to say it again.

        Not so for one that was `withdrawn`, which never comes.
        """
        now = time.monotonic()
        if followed.missing_since is None:
            followed.missing_since = now
        if withdrawn or now - max(followed.missing_since, self._steady_since) >= self._lease_s:
            self._followed.pop(followed.entries.encode(), None)
            stream = followed.stream
            stream.conclude(*(stream.renunciation() if withdrawn else stream.burial()))
