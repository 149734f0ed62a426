"""The scripts of an instance that generates streams: that they are there, what comes of them, that it lives."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aisse.replay.scripts import (
    NOW,
    SMALL,
    WRITES,
    Argument,
    Script,
    StreamKeys,
    claim_key,
    entries_prefix,
    flat,
    rows,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class Standing(enum.IntEnum):
    """How a stream stands in Redis, for its producer."""

    OURS = 0
    STOP_ASKED = 1
    """It is ours, and somebody asks for its end."""
    MISSING = 2
    """Redis does not know it, or knows it as another producer's."""
    CLOSED = 3
    """Somebody else has ended it."""


# For every append: a member is found slowly by its class.
_STANDINGS = OURS, STOP_ASKED, MISSING, CLOSED = tuple(Standing)


class NewStream(NamedTuple):
    """A stream that Redis is to know."""

    stream_id: str
    created_at: float
    claim: tuple[str, str] | None
    """The digests of its Idempotency-Key and of the request that came with it."""


@dataclass
class Create(Script[list[bool]]):
    """Makes streams known, and the claims of those that have one. Idempotent.

    The answer says of each whether it is this producer's. It is not if another has it, or if it was withdrawn.
    """

    token: str
    lease_ms: int
    keep_ms: int
    claim_ms: int
    """For how long claims hold."""
    streams: Sequence[NewStream]

    LUA = (
        WRITES
        + NOW
        + """
-- KEYS: state, entries, what says that it is withdrawn, and claim of each stream (its state again, if it has none).
-- ARGV: token, lease ms, keep ms, for how many ms claims hold; of each stream its id, when it was created, and the
-- digest of its request, empty without a claim. Returns of each stream whether it is the producer's.
local said = {}
for i = 1, #KEYS / 4 do
  local state, entries, withdrawn, claim = KEYS[4 * i - 3], KEYS[4 * i - 2], KEYS[4 * i - 1], KEYS[4 * i]
  local id, created, digest = ARGV[3 * i + 2], ARGV[3 * i + 3], ARGV[3 * i + 4]
  if redis.call('EXISTS', withdrawn) == 0 and redis.call('HSETNX', state, 'owner', ARGV[1]) == 1 then
    redis.call('DEL', entries)
    redis.call('HSET', state, 'last', 0, 'until', now + ARGV[2], 'created', created)
    redis.call('PEXPIRE', state, ARGV[3])
    if digest ~= '' then
      redis.call('HSET', claim, 'stream', id, 'digest', digest)
      redis.call('PEXPIRE', claim, ARGV[4])
    end
  end
  said[i] = redis.call('HGET', state, 'owner') == ARGV[1] and 1 or 0
end
return said
"""
    )

    def keys(self) -> list[bytes]:
        keys: list[bytes] = []
        for stream_id, _, claim in self.streams:
            names = StreamKeys(stream_id)
            keys += (names.state, names.entries, names.withdrawn, claim_key(claim[0]) if claim else names.state)
        return keys

    def args(self) -> list[Argument]:
        streams = (
            (new.stream_id, int(new.created_at * 1000), new.claim[1] if new.claim else "") for new in self.streams
        )
        return [self.token, self.lease_ms, self.keep_ms, self.claim_ms, *flat(streams)]

    def read(self, said: Any) -> list[bool]:
        return [ours == 1 for ours in said]


class Group(NamedTuple):
    """Frames that are appended to one stream."""

    keys: StreamKeys
    before: int
    """Number of the frame before the first of these."""
    last: int
    """Number of the last of them."""
    ends: bool
    """Whether the stream ends with it."""
    frames: bytes


Appended = tuple[Standing, int]
"""What became of a group: how its stream stands, and, if it is ours, the number of the last frame that is there."""


@dataclass
class Append(Script[list[Appended]]):
    """Appends a group to each stream, unless the last frame there is another than the one before the group."""

    token: str
    keep_ms: int
    groups: Sequence[Group]

    LUA = (
        WRITES
        + NOW
        + """
-- KEYS: state and entries of each stream. ARGV: token, keep ms; of each stream the number of the frame before, that of
-- the last, whether the stream ends with it, and the frames. Returns two numbers of each stream: how it stands, and the
-- last frame that is there.
local said = {}
for i = 1, #KEYS / 2 do
  local state, entries, at = KEYS[2 * i - 1], KEYS[2 * i], 4 * i - 1
  local before, last, ends = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local known = redis.call('HMGET', state, 'owner', 'closed', 'last', 'stop')
  local standing, there = known[4] and 1 or 0, known[3]
  if known[1] ~= ARGV[1] then
    standing = 2
  elseif known[2] and known[2] ~= ARGV[1] then
    standing = 3
  elseif not known[2] and known[3] == before then
    if redis.pcall('XADD', entries, last .. '-0', 'p', before, 'f', ARGV[at + 3]).err then
      -- What stands there fits to nothing: its producer says everything again. The others' appends are not held up.
      redis.call('DEL', state, entries)
      standing = 2
    else
      there = last
      redis.call('HSET', state, 'last', last)
      if ends == '1' then
        redis.call('HSET', state, 'closed', ARGV[1], 'ended', now)
        redis.call('PEXPIRE', state, ARGV[2])
      end
      if ends == '1' or before == '0' then redis.call('PEXPIRE', entries, ARGV[2]) end
    end
  end
  said[2 * i - 1], said[2 * i] = standing, tonumber(there or 0)
end
return said
"""
    )

    # This is done for nearly every token, so it is spelt out.

    def keys(self) -> list[bytes]:
        keys: list[bytes] = []
        for group in self.groups:
            stream = group.keys
            keys += (stream.state, stream.entries)
        return keys

    def args(self) -> list[Argument]:
        args: list[Argument] = [self.token, self.keep_ms]
        for group in self.groups:
            args += (group.before, group.last, 1 if group.ends else 0, group.frames)
        return args

    def read(self, said: Any) -> list[Appended]:
        standing = iter(said)
        return list(zip(map(_STANDINGS.__getitem__, standing), standing, strict=True))


class Renewed(NamedTuple):
    """What Redis says of a stream whose lease was renewed."""

    standing: Standing
    instances: int
    """How many other instances have readers of it."""
    position: int
    """Position up to which some of those have got."""
    moved_ms: int
    """For how long readers that were moved there may come back."""
    stalled: bool
    """Whether the last reader there left with bytes waiting for it."""


@dataclass
class Renew(Script[list[Renewed]]):
    """Renews the leases of streams that run, and keeps what Redis has of them."""

    token: str
    lease_ms: int
    keep_ms: int
    streams: Sequence[StreamKeys]

    LUA = (
        SMALL
        + NOW
        + """
-- KEYS: state, entries and readers of each stream. ARGV: token, lease ms, keep ms.
-- Returns five numbers of each stream: as APPEND, instances that read it, position up to which those have got, for how
-- many ms readers that were moved there may come back, whether the last reader there left with bytes waiting for it.
local said = {}
for i = 1, #KEYS, 3 do
  local state = KEYS[i]
  local known = redis.call('HMGET', state, 'owner', 'closed', 'stop', 'far', 'moved', 'stalled')
  local code, count = 0, 0
  if known[1] ~= ARGV[1] then
    code = 2
  elseif known[2] and known[2] ~= ARGV[1] then
    code = 3
  elseif not known[2] then
    redis.call('HSET', state, 'until', now + ARGV[2])
    redis.call('PEXPIRE', state, ARGV[3])
    redis.call('PEXPIRE', KEYS[i + 1], ARGV[3])
    count = redis.call('ZCOUNT', KEYS[i + 2], now, '+inf')
    if known[3] then code = 1 end
  end
  local moved = math.max(0, tonumber(known[5] or 0) - now)
  local far, stalled = tonumber(known[4] or 0), known[6] and 1 or 0
  for _, each in ipairs({code, count, far, moved, stalled}) do said[#said + 1] = each end
end
return said
"""
    )

    def keys(self) -> list[bytes]:
        return [key for keys in self.streams for key in (keys.state, keys.entries, keys.readers)]

    def args(self) -> list[Argument]:
        return [self.token, self.lease_ms, self.keep_ms]

    def read(self, said: Any) -> list[Renewed]:
        return [
            Renewed(_STANDINGS[standing], instances, position, moved_ms, stalled == 1)
            for standing, instances, position, moved_ms, stalled in rows(said, 5)
        ]


class Holder(NamedTuple):
    """Who has an Idempotency-Key."""

    stream_id: str
    request: str
    """A digest of the request that came with it."""


@dataclass
class Claim(Script[Holder]):
    """Gives an Idempotency-Key to a stream that is to be, unless one has it. Refused if the stream was withdrawn."""

    digest: str
    """The key's."""
    stream_id: str
    request: str
    token: str
    lease_ms: int
    keep_ms: int
    claim_ms: int
    created_at: float

    LUA = (
        WRITES
        + NOW
        + """
-- KEYS: the claim, the state of the stream that would be, what says that it is withdrawn. ARGV: what a stream's entries
-- are called without its id, its id, a digest of the request, token, lease ms, keep ms, ms for which the claim holds,
-- when created. Returns the stream that has the claim, and the digest of its request.
if redis.call('EXISTS', KEYS[3]) == 1 then return redis.error_reply('WITHDRAWN') end
local held = redis.call('HMGET', KEYS[1], 'stream', 'digest')
if held[1] and redis.call('EXISTS', ARGV[1] .. held[1] .. ':state') == 1 then return held end
redis.call('HSET', KEYS[1], 'stream', ARGV[2], 'digest', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[7])
redis.call('HSET', KEYS[2], 'owner', ARGV[4], 'last', 0, 'until', now + ARGV[5], 'created', ARGV[8])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return {ARGV[2], ARGV[3]}
"""
    )

    def keys(self) -> list[bytes]:
        keys = StreamKeys(self.stream_id)
        return [claim_key(self.digest), keys.state, keys.withdrawn]

    def args(self) -> list[Argument]:
        # Every id that a claim in this bucket can name lies in the same bucket.
        return [
            *(entries_prefix(self.stream_id), self.stream_id, self.request, self.token),
            *(self.lease_ms, self.keep_ms, self.claim_ms, round(self.created_at * 1000)),
        ]

    def read(self, said: Any) -> Holder:
        return Holder(*(text.decode() for text in said))


@dataclass
class Withdraw(Script[None]):
    """Forgets a stream, and its claim if it has it. Whatever would begin it is refused for `refused_ms`.

    If the stream was read elsewhere, somebody knows it. Then it is ended and kept instead.
    """

    stream_id: str
    digest: str | None
    """Its key's."""
    refused_ms: int
    keep_ms: int
    last: int
    """Number of its last frame."""
    frames: bytes
    """All that it has, its end too."""

    LUA = (
        SMALL
        + NOW
        + """
-- KEYS: state and entries, what says that the stream is withdrawn, the claim if it has one. ARGV: its id; for how many
-- ms what would begin it is refused; keep ms; the number of its last frame, and all its frames. Forgets the stream, and
-- its claim but no other's. One that was read elsewhere is known to somebody: it is ended instead, and kept.
local known = redis.call('HMGET', KEYS[1], 'read', 'closed')
if not known[1] then
  redis.call('DEL', KEYS[1], KEYS[2])
  redis.call('SET', KEYS[3], 1, 'PX', ARGV[2])
elseif not known[2] then
  redis.call('XADD', KEYS[2], ARGV[4] .. '-0', 'p', 0, 'f', ARGV[5])
  redis.call('HSET', KEYS[1], 'last', ARGV[4], 'closed', 'withdrawn', 'ended', now)
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
end
if KEYS[4] and redis.call('HGET', KEYS[4], 'stream') == ARGV[1] then redis.call('DEL', KEYS[4]) end
"""
    )

    def keys(self) -> list[bytes]:
        keys = StreamKeys(self.stream_id)
        return [keys.state, keys.entries, keys.withdrawn, *([claim_key(self.digest)] if self.digest else [])]

    def args(self) -> list[Argument]:
        return [self.stream_id, self.refused_ms, self.keep_ms, self.last, self.frames]

    def read(self, said: Any) -> None:
        pass


ALL = (Create, Append, Renew, Claim, Withdraw)
