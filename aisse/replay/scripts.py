"""What runs inside Redis: the names of keys, and what a script is on this side.

A script is a step that must not be torn apart. Each is a class. Its Lua stands beside what makes keys and arguments of
typed values, and a typed answer of what Redis returns. Whoever runs a script deals in names alone. An instance that
generates streams runs the `producer_scripts`, one that reads them the `follower_scripts`.

A stream has three keys: its entries (a Redis stream; an entry's id is the number of its last frame), its state (a hash)
and its readers (a sorted set of instances by the time until which each counts). All carry the stream's bucket as hash
tag, so that scripts may touch them together also in a Cluster. The bucket is the id's first character, one of 64.

The state: `owner` (the producer's token), `last` (number of the last frame), `until` (when the lease lapses),
`created`, `closed` (who ended it; unset while it runs), `ended`, `stop` (somebody asked for it); and of its readers
elsewhere `read` (there has been one), `far` (position up to which some have got), `moved` (until when those that were
moved may come back) and `stalled` (the last one left with bytes waiting for it). Times are Redis's own, in
milliseconds: instances' clocks are not compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PREFIX = b"aisse:"

NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

WRITES = "#!lua\n"
"""A script without flags is refused as a whole if memory is full."""

SMALL = "#!lua flags=allow-oom\n"
"""A script that keeps leases alive or tells of ends must not be refused then. It overwrites a few small values."""

READS = "#!lua flags=no-writes,allow-oom\n"
"""A script that only reads also runs if Redis is read-only."""

Answer = TypeVar("Answer")
Argument = bytes | str | int


class Script(ABC, Generic[Answer]):
    """One call of a script. Nothing else knows in which order its Lua takes and returns what it does."""

    LUA: ClassVar[str]

    @abstractmethod
    def keys(self) -> list[bytes]:
        """What it touches."""

    @abstractmethod
    def args(self) -> list[Argument]:
        """What it is told."""

    @abstractmethod
    def read(self, said: Any) -> Answer:
        """The answer, from what it returns."""


class StreamKeys:
    """The names of a stream's keys. Made once for a stream that is at work: they are sent with every append."""

    __slots__ = ("entries", "id", "readers", "state")

    def __init__(self, stream_id: str) -> None:
        self.id = stream_id
        self.entries = entries_prefix(stream_id) + stream_id.encode()
        """The frames."""
        self.state = self.entries + b":state"
        """What is known of the stream."""
        self.readers = self.entries + b":readers"
        """Where its readers are."""

    @property
    def withdrawn(self) -> bytes:
        """That nobody may begin the stream any more: what says so may be overtaken on another connection."""
        return self.entries + b":withdrawn"


def entries_prefix(stream_id: str) -> bytes:
    """What the entries of all streams in this one's bucket are called, without their ids."""
    return b"%b{%b}:" % (PREFIX, stream_id[0].encode())


def instance_key(token: str) -> bytes:
    """That Redis was not emptied since the instance was there."""
    return b"%binstance:%b" % (PREFIX, token.encode())


def claim_key(digest: str) -> bytes:
    """An Idempotency-Key, by a digest in base64url."""
    return b"%b{%b}:key:%b" % (PREFIX, digest[0].encode(), digest.encode())


def flat(rows: Iterable[tuple[Argument, ...]]) -> Iterator[Argument]:
    """The values of one stream after those of another."""
    return chain.from_iterable(rows)


def rows(said: Sequence[Any], width: int) -> Iterator[tuple[Any, ...]]:
    """So many values at a time, those of one stream after those of another."""
    return zip(*[iter(said)] * width, strict=True)
