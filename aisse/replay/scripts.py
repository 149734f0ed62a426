"""What runs inside Redis: one script for each step that must not be torn apart, and the names of keys.

A stream has three keys: its entries (a Redis stream; an entry's id is the number of its last frame), its state (a hash)
and its readers (a sorted set of instances by the time until which each counts). All carry the stream's bucket as hash
tag, so that scripts may touch them together also in a Cluster; the bucket is the id's first character, one of 64.

The state: `owner` (the producer's token), `last` (number of the last frame), `until` (when the lease lapses),
`created`, `closed` (who ended it; unset while it runs), `ended`, `stop` (somebody asked for it); and of its readers
elsewhere `read` (there has been one), `far` (position up to which some have got), `moved` (until when those that were
moved may come back) and `stalled` (the last one left with bytes waiting for it). Times are Redis's own, in
milliseconds: instances' clocks are not compared.
"""

from __future__ import annotations

PREFIX = "aisse:"


def entries_key(stream_id: str) -> str:
    """The frames."""
    return f"{PREFIX}{{{stream_id[0]}}}:{stream_id}"


def state_key(stream_id: str) -> str:
    """What is known of the stream."""
    return entries_key(stream_id) + ":state"


def readers_key(stream_id: str) -> str:
    """Where its readers are."""
    return entries_key(stream_id) + ":readers"


def withdrawn_key(stream_id: str) -> str:
    """That nobody may begin the stream any more: what says so may be overtaken on another connection."""
    return entries_key(stream_id) + ":withdrawn"


def instance_key(token: str) -> str:
    """That Redis was not emptied since the instance was there."""
    return f"{PREFIX}instance:{token}"


def claim_key(digest: str) -> str:
    """An Idempotency-Key, by a digest in base64url."""
    return f"{PREFIX}{{{digest[0]}}}:key:{digest}"


_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# A script without flags is refused as a whole where memory is full. What keeps leases alive and tells of ends must not
# be: it overwrites a few small values.
_SMALL = "#!lua flags=allow-oom\n"

# So that it runs where Redis is read-only, too.
_READS = "#!lua flags=no-writes,allow-oom\n"

OK, STOP, MISSING, CLOSED = range(4)
"""What `APPEND` and `RENEW` say of a stream: nothing; somebody asks for its end; Redis does not know it, or as another
producer's; somebody else has ended it. A negative number n: the last frame that is there is number -n - 1."""

CREATE = (
    "#!lua\n"
    + _NOW
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

APPEND = (
    "#!lua\n"
    + _NOW
    + """
-- KEYS: state and entries of each stream. ARGV: token, keep ms; of each stream the number of the frame before, that of
-- the last, whether the stream ends with it, and the frames. Appends nothing unless the frame before is the last there.
local said = {}
for i = 1, #KEYS / 2 do
  local state, entries, at = KEYS[2 * i - 1], KEYS[2 * i], 4 * i - 1
  local before, last, ends = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local known = redis.call('HMGET', state, 'owner', 'closed', 'last', 'stop')
  if known[1] ~= ARGV[1] then
    said[i] = 2
  elseif known[2] and known[2] ~= ARGV[1] then
    said[i] = 3
  elseif known[2] or known[3] ~= before then
    said[i] = -known[3] - 1
  elseif redis.pcall('XADD', entries, last .. '-0', 'p', before, 'f', ARGV[at + 3]).err then
    -- What stands there fits to nothing: its producer says everything again. The others' appends are not held up.
    redis.call('DEL', state, entries)
    said[i] = 2
  else
    redis.call('HSET', state, 'last', last)
    if ends == '1' then
      redis.call('HSET', state, 'closed', ARGV[1], 'ended', now)
      redis.call('PEXPIRE', state, ARGV[2])
    end
    if ends == '1' or before == '0' then redis.call('PEXPIRE', entries, ARGV[2]) end
    said[i] = known[4] and 1 or 0
  end
end
return said
"""
)

RENEW = (
    _SMALL
    + _NOW
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

ATTEND = (
    _SMALL
    + _NOW
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
    elseif redis.call('ZREM', readers, ARGV[1]) == 1 and stalled == '1' then
      redis.call('HSET', state, 'stalled', 1)
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

BURY = (
    _SMALL
    + _NOW
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

LOOK = (
    _READS
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

STOP_ASKED = (
    _SMALL
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

CLAIM = (
    "#!lua\n"
    + _NOW
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

WITHDRAW = (
    _SMALL
    + _NOW
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

ALL = (CREATE, APPEND, RENEW, ATTEND, BURY, LOOK, STOP_ASKED, CLAIM, WITHDRAW)
