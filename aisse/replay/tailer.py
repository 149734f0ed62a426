"""The shared log on the side of who reads: streams of other processes, followed in Redis or Valkey.

A stream that is followed has a local log like any other. One task brings what is new of all of them, however many, by
one connection. `attendance` tells who reads them here, and ends those whose producer is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import structlog
from redis import exceptions

from aisse.replay.attendance import Attendance, Followed
from aisse.replay.scripts import StreamKeys
from aisse.replay.troubles import Attempts, heed_cancellation
from aisse.sse import is_end, last_seq_of, offset_after

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from redis.asyncio import Redis

    from aisse.replay.attendance import Follower
    from aisse.replay.catalogue import Catalogue
    from aisse.replay.connection import Client
    from aisse.replay.terms import Terms
    from aisse.replay.troubles import Troubles

# What one call brings of each stream: two entries, which are at most a segment and a frame.
_ENTRIES = 2
# When a stream is opened it alone is read.
_PAGE = 16

# How long one call waits for something new, and how soon it is called again to take a stream in that has come.
BLOCK_S = 1.0
_UNBLOCK_AGAIN_S = 0.005

# At most so many streams in one call while there is much to catch up on, so that its reply stays small.
_SLICE = 64

# What a process that ends takes at most to say that nobody reads here.
_LEAVE_S = 0.2

_log = structlog.get_logger("aisse.replay")


class Tailer:
    """Follows streams. `run` is one task's.

    Each stream gets its frames in order and once (test_what_comes_is_published_in_order_and_once), also where they come
    again, cut in other places (test_entries_cut_in_other_places_are_joined_where_this_process_stands). No frame comes
    from behind a hole (test_hole_ends_the_stream_and_is_told_to_the_operator), and none after the end
    (test_end_is_the_last_that_comes).
    """

    def __init__(
        self,
        client: Client,
        blocking: Redis,
        catalogue: Catalogue,
        instance: str,
        *,
        terms: Terms,
        read_ahead_bytes: int,
        troubles: Troubles,
    ) -> None:
        """`blocking` has one connection, which is this object's alone; `client` is anybody's. `instance` names us."""
        self._client = client
        self._blocking = blocking
        self._tick_s = terms.tick_s
        self._followed: dict[bytes, Followed] = {}  # by the keys of their entries
        self._work = asyncio.Event()
        self._round = 0  # of calls that wait; odd while one does
        self._blocking_id: int | None = None
        self._troubles = troubles
        self._attendance = Attendance(
            client,
            catalogue,
            instance,
            self._followed,
            terms=terms,
            read_ahead_bytes=read_ahead_bytes,
            troubles=self._troubles,
        )

    async def load(self, stream: Follower) -> None:
        """Brings a stream up to what Redis has of it. Raises RedisError."""
        key = StreamKeys(stream.id).entries
        while True:
            entries: Any = await self._client.xrange(key, f"({stream.log.last_seq}-0", count=_PAGE)
            for _, fields in entries:
                self._deliver(stream, fields)
            if len(entries) < _PAGE or stream.reason is not None:
                return

    def follow(self, stream: Follower) -> None:
        """Brings what comes of a stream from now on, a little later unless `hasten` is called."""
        followed = Followed(stream)
        self._followed[followed.keys.entries] = followed
        self._attendance.come_back(followed)
        self._work.set()

    async def hasten(self, stream_ids: Sequence[str]) -> list[bool]:
        """Has streams that are followed since a moment ago count as read here, and come at once. Raises RedisError."""
        keys = [StreamKeys(stream_id).entries for stream_id in stream_ids]
        some = [self._followed[key] for key in keys if key in self._followed]
        await self._attendance.expect_readers(some)
        # The call that waits does not know of them yet, or is on its way to wait.
        waiting = self._round
        while waiting % 2 and waiting == self._round and self._blocking_id is not None:
            if await self._client.client_unblock(self._blocking_id):
                break
            await asyncio.sleep(_UNBLOCK_AGAIN_S)
        return [True] * len(stream_ids)

    def unfollow(self, stream: Follower) -> None:
        """Nothing comes any more, and soon it does not count as read here. Idempotent."""
        if (followed := self._followed.pop(StreamKeys(stream.id).entries, None)) is not None:
            self._attendance.leave(followed)

    async def leave(self) -> None:
        """Has none count as read here. Redis may be away: then that lapses."""
        for followed in list(self._followed.values()):
            self.unfollow(followed.stream)
        with contextlib.suppress(exceptions.RedisError, OSError, TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await self._attendance.attend([])

    def reconnected(self) -> None:
        """The connection that waits is a new one, and has another id."""
        self._blocking_id = None

    async def run(self) -> None:
        """Follows and watches until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tail_for_ever(), name="shared log: tail")
            tasks.create_task(self._attendance.attend_for_ever(), name="shared log: attend")

    # --- what comes -------------------------------------------------------------------------------------------

    async def _tail_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        tailing = Attempts("tail", self._troubles)
        while True:
            heed_cancellation()
            if not self._followed:
                tailing.over()
                self._work.clear()
                await self._work.wait()
            begun = loop.time()
            if not await tailing.succeeds(self._tail(catch_up=tailing.failures > 0)):
                self._blocking_id = None
                with contextlib.suppress(Exception):
                    await self._blocking.connection_pool.disconnect()
            await tailing.pause(max(0.0, begun + self._tick_s - loop.time()))

    async def _tail(self, *, catch_up: bool) -> None:
        """Brings what comes next; first what was missed, in order to `catch_up`."""
        if catch_up:
            await self._catch_up()
        if self._blocking_id is None:
            self._blocking_id = await self._blocking.client_id()
        if not (after := self._after(self._followed)):
            return  # the last one has ended meanwhile; Redis refuses a call that names none
        self._round += 1
        try:
            came = await self._blocking.xread(after, count=_ENTRIES, block=round(BLOCK_S * 1000))
        finally:
            self._round += 1
        self._deliver_all(came)

    async def _catch_up(self) -> None:
        """Some streams at a time, without waiting for any: there may be much of each."""
        keys = list(self._followed)
        for at in range(0, len(keys), _SLICE):
            while after := self._after(key for key in keys[at : at + _SLICE] if key in self._followed):
                if not (came := await self._blocking.xread(after, count=_ENTRIES)):
                    break
                self._deliver_all(came)
                await asyncio.sleep(0)

    def _after(self, keys: Iterable[bytes]) -> dict[Any, Any]:
        return {key: b"%d-0" % self._followed[key].stream.log.last_seq for key in keys}

    def _deliver_all(self, came: Any) -> None:
        for key, entries in came:
            for _, fields in entries:
                if (followed := self._followed.get(key)) is not None:
                    self._deliver(followed.stream, fields)

    def _deliver(self, stream: Follower, fields: dict[bytes, bytes]) -> None:
        """Publishes what is new in an entry: its frames, behind the one that it says was the last before."""
        frames, before = fields[b"f"], int(fields[b"p"])
        last_seq = last_seq_of(frames)
        if last_seq <= stream.log.last_seq:
            return
        if before > stream.log.last_seq:
            _log.error("shared log has a hole", stream_id=stream.id[:8])
            self._conclude(stream, *stream.burial())
            return
        if before < stream.log.last_seq:
            # Redis was emptied and given everything again, cut in other places. Or it is the end of a lost producer, of
            # which Redis had got less than this process: its number lies behind a hole, and all of it is new.
            frames = frames[offset_after(frames, stream.log.last_seq) :]
        if is_end(frames):
            self._conclude(stream, frames, last_seq)
        else:
            stream.publish(frames, last_seq)

    def _conclude(self, stream: Follower, frames: bytes, last_seq: int) -> None:
        # First: of a stream that has ended nobody needs to be told that it is not read here.
        self._followed.pop(StreamKeys(stream.id).entries, None)
        stream.conclude(frames, last_seq)
