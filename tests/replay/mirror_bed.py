"""A mirror before a Redis that says what a test wants, and whom it tells of its streams."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from conftest import eventually
from fake_client import Clock, FakeRedis

from aisse.replay import leases as leases_module
from aisse.replay.memory import ReplayMemory
from aisse.replay.mirror import Mirror, RedisLog
from aisse.replay.producer_scripts import (
    MISSING,
    OURS,
    STOP_ASKED,
    Append,
    Appended,
    Create,
    Group,
    Renew,
    Renewed,
    Standing,
)
from aisse.replay.terms import Terms, interval_s
from aisse.replay.troubles import Troubles
from aisse.sse import frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

# Twice as long is still less than what a process is taken to have stood still for.
LEASE_S = 2.0
RETENTION_S = 10.0
INTERVAL_S = interval_s(LEASE_S)


class Producer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.holding: set[str] = set()

    def read_elsewhere(self, stream_id: str, instances: int, position: int, *, stalled: bool) -> None:
        self.told.append(("read", stream_id, instances, position, *["stalled"] * stalled))

    def moved_elsewhere(self, stream_id: str, within_s: float) -> None:
        self.told.append(("moved", stream_id, within_s))

    def stop_asked(self, stream_id: str) -> None:
        self.told.append(("stop", stream_id))

    def lost(self, stream_id: str, frames: bytes, last_seq: int) -> None:
        self.told.append(("lost", stream_id, frames, last_seq))

    def held_back(self, stream_id: str) -> bool:
        return stream_id in self.holding


@dataclass
class MirrorBed:
    """A mirror before a Redis that takes everything, unless a test says otherwise."""

    redis: FakeRedis
    clock: Clock
    producer: Producer
    troubles: Troubles
    mirror: Mirror
    memory: ReplayMemory = field(default_factory=lambda: ReplayMemory(1 << 40))
    standings: dict[str, Standing] = field(default_factory=dict)
    """How a stream stands the next time that it is appended to or renewed; if it is missing, until it is created."""
    there: dict[str, int] = field(default_factory=dict)
    """The last frame that is there the next time that a stream is appended to, if it is not the one that fits."""
    elsewhere: dict[str, tuple[int, int]] = field(default_factory=dict)
    moved_ms: int = 0
    stalled: bool = False
    got: dict[str, list[Group]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    """Bytes of frames in each append."""

    def log(self, number: int = 0, claim: tuple[str, str] | None = None) -> RedisLog:
        return self.mirror.log(f"{number:022}", self.memory, claim)

    def whole(self, log: RedisLog) -> bytes:
        return b"".join(group.frames for group in self.got.get(log.id, []))

    async def renewed(self, times: int = 1) -> None:
        """Returns after so many renewals of everything, each in its time."""
        for _ in range(times):
            before = self.redis.count(Renew)
            self.clock.now += INTERVAL_S
            await eventually(lambda before=before: self.redis.count(Renew) > before)  # type: ignore[misc]
            await turns()

    async def steady(self) -> None:
        """Returns once Redis has everything, and has been there for longer than a lease."""
        assert await self.mirror.settled(9)
        await self.renewed()  # no call is under way when the clock jumps: it would seem to have been slow
        self.clock.now += 2 * LEASE_S

    def _standing(self, stream_id: str) -> Standing:
        standing = self.standings.pop(stream_id, OURS)
        if standing is MISSING:
            self.standings[stream_id] = standing
        return standing

    def create(self, call: Create) -> list[bool]:
        for new in call.streams:
            if self.standings.get(new.stream_id) is MISSING:
                del self.standings[new.stream_id]
        return [True] * len(call.streams)

    def append(self, call: Append) -> list[Appended]:
        self.sizes.append(sum(len(group.frames) for group in call.groups))
        return [self._append(group) for group in call.groups]

    def _append(self, group: Group) -> Appended:
        stream_id = group.keys.id
        if (there := self.there.pop(stream_id, None)) is not None:
            return (OURS, there)
        standing = self._standing(stream_id)
        if standing in {OURS, STOP_ASKED}:
            self.got.setdefault(stream_id, []).append(group)
        return (standing, group.last)

    def renew(self, call: Renew) -> list[Renewed]:
        return [
            Renewed(self._standing(keys.id), *self.elsewhere.get(keys.id, (0, 0)), self.moved_ms, self.stalled)
            for keys in call.streams
        ]


def ids(call: Renew) -> list[str]:
    return [keys.id for keys in call.streams]


async def turns(count: int = 20) -> None:
    """Lets every task have its turn."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running(bed: MirrorBed) -> AsyncIterator[None]:
    task = asyncio.create_task(bed.mirror.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def mirror_bed(monkeypatch: pytest.MonkeyPatch, tick_s: float = 0.001) -> MirrorBed:
    monkeypatch.setattr(leases_module, "_CLOCK_S", 0.001)
    redis, clock, producer = FakeRedis(), Clock(monkeypatch, "mirror", "leases"), Producer()
    terms, troubles = Terms(tick_s, LEASE_S, retention_s=RETENTION_S, stream_s=3600), Troubles()
    mirror = Mirror(cast("Any", redis), producer, terms, troubles)
    bed = MirrorBed(redis, clock, producer, troubles, mirror)
    redis.answers = {Create: bed.create, Append: bed.append, Renew: bed.renew}
    return bed


def publish(log: RedisLog, size: int = 1000, count: int = 1) -> None:
    for _ in range(count):
        seq = log.last_seq + 1
        log.append(frame("content_block_delta", "x" * size, f"{log.id}.{seq}"), seq)
