"""A tailer before a Redis in which every lease holds, unless a test says otherwise, and streams for it to follow."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from conftest import eventually
from fake_client import Clock, Entry, FakeRedis, entry

from aisse.errors import StreamError
from aisse.replay.catalogue import Catalogue
from aisse.replay.follower_scripts import Attend, Attended, Bury, Lease, ReadHere
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.replay.scripts import StreamKeys
from aisse.replay.tailer import Tailer
from aisse.replay.terms import Terms, interval_s
from aisse.replay.troubles import Troubles
from aisse.sse import frame
from aisse.streams.endings import Reason, ending, failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

LEASE_S = 2.0
READ_AHEAD_BYTES = 4000
ANOTHER_INTERVAL = interval_s(LEASE_S)


class Follower:
    """A stream that is generated elsewhere."""

    def __init__(self, number: int = 0) -> None:
        self.id = f"{number:022}"
        self.log = MemoryLog(ReplayMemory(1 << 40))
        self.reason: object = None
        self.furthest = 0
        self.readers = 1
        self.awaits_until = 0.0
        self.last_reader_stalled = False
        self.ends: list[tuple[bytes, int]] = []

    def publish(self, frames: bytes, last_seq: int) -> None:
        self.log.append(frames, last_seq)

    def conclude(self, frames: bytes, last_seq: int) -> None:
        self.ends.append((frames, last_seq))
        self.log.append(frames, last_seq)
        self.reason = "ended"

    def burial(self) -> tuple[bytes, int]:
        reason = Reason.PRODUCER_LOST
        return ending(self.id, self.log.last_seq, reason, failure(reason), {"input_tokens": 0, "output_tokens": 0})

    def renunciation(self) -> tuple[bytes, int]:
        error = StreamError("api_error", "withdrawn")
        return ending(self.id, self.log.last_seq, Reason.ERROR, error, {"input_tokens": 0, "output_tokens": 0})

    def frames(self, first: int, last: int) -> bytes:
        return b"".join(frame("a", f"number {seq}", f"{self.id}.{seq}") for seq in range(first, last + 1))

    def entry(self, first: int, last: int) -> Entry:
        return entry(first - 1, last, self.frames(first, last))

    def end_entry(self, seq: int) -> Entry:
        frames, last = ending(self.id, seq, Reason.COMPLETE, None, {"input_tokens": 0, "output_tokens": 0})
        return entry(seq, last, frames)

    @property
    def key(self) -> bytes:
        return StreamKeys(self.id).entries

    @property
    def whole(self) -> bytes:
        return self.log.read(0, 1 << 30)


@dataclass
class TailerBed:
    """All of it."""

    redis: FakeRedis
    waits: FakeRedis
    clock: Clock
    catalogue: Catalogue
    troubles: Troubles
    tailer: Tailer
    left_ms: dict[str, int | None] = field(default_factory=dict)
    """What is left of a stream's lease; None where Redis does not know it."""
    last_seq: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    async def attended(self, times: int = 1) -> None:
        """Returns after so many looks at everything, each in its time."""
        for _ in range(times):
            before = self.redis.count(Attend)
            self.clock.now += ANOTHER_INTERVAL
            await eventually(lambda before=before: self.redis.count(Attend) > before)  # type: ignore[misc]
            for _ in range(20):
                await asyncio.sleep(0)

    @property
    def told(self) -> list[dict[str, ReadHere]]:
        """What each call told Redis of the streams in it."""
        return [{stream.keys.id: stream for stream in call.streams} for call in self.redis.calls_of(Attend)]

    def about(self, follower: Follower) -> list[tuple[bool, int]]:
        """What Redis was told of one stream: whether it is read here, and how far."""
        here = [told[follower.id] for told in self.told if follower.id in told]
        return [(each.read, each.position) for each in here]

    @property
    def buried(self) -> list[str]:
        return [call.stream.id for call in self.redis.calls_of(Bury)]

    def attend(self, call: Attend) -> Attended:
        ids = [stream.keys.id for stream in call.streams]
        return Attended(1000, [Lease(self.left_ms.get(i, 1000), self.last_seq.get(i, 0), i in self.ended) for i in ids])


def tailer_bed(monkeypatch: pytest.MonkeyPatch) -> TailerBed:
    redis, waits, clock = FakeRedis(), FakeRedis(), Clock(monkeypatch, "attendance", "catalogue")
    terms = Terms(0.001, LEASE_S, retention_s=10, stream_s=3600)
    client = cast("Any", redis)
    catalogue, troubles = Catalogue(client, "me", terms), Troubles()
    blocking, ahead = cast("Any", waits), READ_AHEAD_BYTES
    tailer = Tailer(client, blocking, catalogue, "me", terms=terms, read_ahead_bytes=ahead, troubles=troubles)
    bed = TailerBed(redis, waits, clock, catalogue, troubles, tailer)
    redis.answers = {Attend: bed.attend, Bury: lambda _call: True}
    return bed


@contextlib.asynccontextmanager
async def running(bed: TailerBed) -> AsyncIterator[None]:
    task = asyncio.create_task(bed.tailer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
