"""The scripts of an instance that reads streams of others: which there are, who reads them, whose producer is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aisse.replay.scripts import NOW, READS, SMALL, Argument, Script, StreamKeys, flat, instance_key, rows

if TYPE_CHECKING:
    from collections.abc import Sequence


class ReadHere(NamedTuple):
    """What this instance tells of one stream."""

    keys: StreamKeys
    read: bool
    """Whether it has readers here."""
    position: int
    """Position up to which some reader has got."""
    moved_ms: int
    """For how long readers that were moved from here, or told of the stream here, may come."""
    stalled: bool
    """Whether the last reader left with bytes waiting for it."""


class Lease(NamedTuple):
    """How a stream stands in Redis, for those who follow it."""

    left_ms: int | None
    """How long its lease lasts; less than 0 where it has lapsed, None where Redis does not know the stream."""
    last: int
    """Number of its last frame."""
    over: bool
    """Whether it has ended, or, if it is not known, was withdrawn."""


class Attended(NamedTuple):
    """Redis's time, and of each stream its lease."""

    now_ms: int
    leases: list[Lease]


@dataclass
class Attend(Script[Attended]):
    """Tells who is read here, and asks for the leases."""

    instance: str
    lease_ms: int
    """For how long the instance counts."""
    streams: Sequence[ReadHere]

    LUA = (
        SMALL
        + NOW
        + """
-- KEYS: state and readers of each stream. ARGV: instance, for how many ms it counts; of each stream whether it is
-- read, the position up to which it was, for how many ms readers that were moved may come back, and whether the last
-- one left with bytes waiting for it. Returns the time; of each stream the milliseconds that its lease lasts (false: it
-- is not known), the number of its last frame, and whether it has ended, or was withdrawn.
local said = {now}
for i = 1, #KEYS, 2 do
  local state, readers = KEYS[i], KEYS[i + 1]
  local known = redis.call('HMGET', state, 'until', 'last', 'closed', 'far', 'moved', 'read')
  local at = #said + 1
  if known[1] then
    local read, far, moved, stalled = ARGV[2 * i + 1], ARGV[2 * i + 2], now + ARGV[2 * i + 3], ARGV[2 * i + 4]
    if read == '1' then
      redis.call('ZADD', readers, now + ARGV[2], ARGV[1])
      redis.call('PEXPIRE', readers, ARGV[2])
      redis.call('HDEL', state, 'stalled')
      if not known[6] then redis.call('HSET', state, 'read', 1) end
    elseif redis.call('ZREM', readers, ARGV[1]) == 1 then
      if stalled == '1' then redis.call('HSET', state, 'stalled', 1) else redis.call('HDEL', state, 'stalled') end
    end
    if tonumber(far) > tonumber(known[4] or 0) then redis.call('HSET', state, 'far', far) end
    if moved > math.max(now, tonumber(known[5] or 0)) then redis.call('HSET', state, 'moved', moved) end
    said[at], said[at + 1], said[at + 2] = known[1] - now, tonumber(known[2]), known[3] and 1 or 0
  else
    said[at], said[at + 1], said[at + 2] = false, 0, redis.call('EXISTS', (state:gsub(':state$', ':withdrawn')))
  end
end
return said
"""
    )

    def keys(self) -> list[bytes]:
        return [key for stream in self.streams for key in (stream.keys.state, stream.keys.readers)]

    def args(self) -> list[Argument]:
        streams = ((int(read), position, moved, int(stalled)) for _, read, position, moved, stalled in self.streams)
        return [self.instance, self.lease_ms, *flat(streams)]

    def read(self, said: Any) -> Attended:
        now_ms, *leases = said
        return Attended(now_ms, [Lease(left_ms, last, over == 1) for left_ms, last, over in rows(leases, 3)])


@dataclass
class Bury(Script[bool]):
    """Ends a stream whose lease has lapsed, once; whether this did it.

    It does nothing late: a Redis that stood still would otherwise run what was sent before ahead of what renews.
    """

    stream: StreamKeys
    last: int
    """Number of the last frame that is there."""
    end: int
    """Number of the last of `frames`; it may lie further ahead than the frames are many."""
    frames: bytes
    keep_ms: int
    latest_ms: int
    """Until when it does something, by Redis's time."""

    LUA = (
        SMALL
        + NOW
        + """
-- KEYS: state and entries. ARGV: number of the last frame, that of the `end`, the frames, keep ms, latest time.
-- Ends a stream whose lease has lapsed, once; 1 where it did. The end may lie further ahead than the last frame says.
-- It does nothing late: a Redis that stood still would otherwise run what was sent before ahead of what renews.
local known = redis.call('HMGET', KEYS[1], 'until', 'last', 'closed')
if not known[1] or known[3] or known[2] ~= ARGV[1] or tonumber(known[1]) > now or now > tonumber(ARGV[5]) then
  return 0
end
redis.call('XADD', KEYS[2], ARGV[2] .. '-0', 'p', ARGV[1], 'f', ARGV[3])
redis.call('HSET', KEYS[1], 'last', ARGV[2], 'closed', 'lost', 'ended', now)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
"""
    )

    def keys(self) -> list[bytes]:
        return [self.stream.state, self.stream.entries]

    def args(self) -> list[Argument]:
        return [self.last, self.end, self.frames, self.keep_ms, self.latest_ms]

    def read(self, said: Any) -> bool:
        return bool(said == 1)


class Found(NamedTuple):
    """A stream that Redis knows. Times are seconds since the epoch."""

    created_at: float
    ended_at: float | None


class Looked(NamedTuple):
    """`marked` is whether the instance's mark is there, which an emptied Redis does not have."""

    marked: bool
    streams: list[Found | None]


@dataclass
class Look(Script[Looked]):
    """What Redis knows of streams, whoever generates them."""

    instance: str
    stream_ids: Sequence[str]

    LUA = (
        READS
        + """
-- KEYS: what says that Redis was not emptied, and the state of each stream. Returns whether the first is there; of each
-- stream false where there is none, else when it was created and when it ended. A hundred that are unknown are one
-- command: a crowd of them is to cost no more than others do.
local said = {redis.call('EXISTS', KEYS[1])}
for first = 2, #KEYS, 100 do
  local last = math.min(first + 99, #KEYS)
  local some = redis.call('EXISTS', unpack(KEYS, first, last)) > 0
  for i = first, last do
    local known = some and redis.call('HMGET', KEYS[i], 'created', 'ended')
    said[i] = known and known[1] and known
  end
end
return said
"""
    )

    def keys(self) -> list[bytes]:
        return [instance_key(self.instance), *(StreamKeys(stream_id).state for stream_id in self.stream_ids)]

    def args(self) -> list[Argument]:
        return []

    def read(self, said: Any) -> Looked:
        marked, *streams = said
        return Looked(marked == 1, [_found(*times) if times else None for times in streams])


def _found(created: bytes, ended: bytes | None) -> Found:
    return Found(int(created) / 1000, int(ended) / 1000 if ended is not None else None)


class Asked(NamedTuple):
    """As `Looked`; of each stream whether there is one."""

    marked: bool
    streams: list[bool]


@dataclass
class AskToStop(Script[Asked]):
    """Asks the producers of streams to end them. Idempotent."""

    instance: str
    stream_ids: Sequence[str]

    LUA = (
        SMALL
        + """
-- KEYS: what says that Redis was not emptied, and the state of each stream. Returns whether the first is there; of each
-- stream 1 where there is one, which is asked for its end unless it has ended, else false.
local said = {redis.call('EXISTS', KEYS[1])}
for first = 2, #KEYS, 100 do
  local last = math.min(first + 99, #KEYS)
  local some = redis.call('EXISTS', unpack(KEYS, first, last)) > 0
  for i = first, last do
    local known = some and redis.call('HMGET', KEYS[i], 'owner', 'closed')
    if known and known[1] and not known[2] then redis.call('HSET', KEYS[i], 'stop', 1) end
    said[i] = known and known[1] and 1
  end
end
return said
"""
    )

    def keys(self) -> list[bytes]:
        return [instance_key(self.instance), *(StreamKeys(stream_id).state for stream_id in self.stream_ids)]

    def args(self) -> list[Argument]:
        return []

    def read(self, said: Any) -> Asked:
        marked, *streams = said
        return Asked(marked == 1, [there == 1 for there in streams])


ALL = (Attend, Bury, Look, AskToStop)
