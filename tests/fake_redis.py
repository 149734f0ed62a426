"""A Redis inside the test: the scripts run as they are, in a real Lua; the commands below it are a few lines each.

Its time is whatever the test says, which no real Redis can be told. tests/test_fake_redis.py holds it against one.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hiredis
from lupa import lua51

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextvars import Context

Id = tuple[int, int]
Entry = tuple[Id, list[bytes]]


class RefusedError(Exception):
    """What Redis answers with an error."""


class Status(str):
    """An answer that is no data."""

    __slots__ = ()


class Store:
    """The data of one Redis, and its scripts. `now` says what time it is, in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._data: dict[bytes, Any] = {}
        self._expires: dict[bytes, float] = {}  # ms
        self._scripts: dict[bytes, Any] = {}
        self._lua = lua51.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        table = self._lua.table()
        table[b"call"] = self._call
        table[b"pcall"] = self._pcall
        table[b"error_reply"] = lambda text: self._lua.table_from({b"err": text})
        self._lua.globals()[b"redis"] = table

    @property
    def now_ms(self) -> int:
        return int(self._now() * 1000)

    def keys(self) -> list[bytes]:
        """What is there now."""
        return [key for key in list(self._data) if self._get(key) is not None]

    def left_ms(self, key: bytes) -> float | None:
        """How long a key stays; None for one that stays for ever."""
        expires = self._expires.get(key)
        return None if expires is None else expires - self._now() * 1000

    def without_end(self) -> list[bytes]:
        """The keys that stay for ever."""
        return [key for key in self.keys() if key not in self._expires]

    def last_id(self, key: bytes) -> Id:
        entries = self._get(key)
        return entries[-1][0] if entries else (0, 0)

    def execute(self, name: bytes, *args: bytes) -> Any:
        """Bytes, an int, a Status, None, or a list of these. Raises RefusedError."""
        command = getattr(self, "do_" + name.lower().decode().replace(" ", "_"), None)
        if command is None:
            raise RefusedError(f"ERR unknown command '{name.decode()}'")
        return command(*args)

    # --- scripts ----------------------------------------------------------------------------------------------

    def do_script(self, _load: bytes, text: bytes) -> bytes:
        sha = hashlib.sha1(text).hexdigest().encode()
        if sha not in self._scripts:
            flags, _, body = text.partition(b"\n")
            assert flags.startswith(b"#!lua"), "all have flags"
            self._scripts[sha] = self._lua.execute(b"return function(KEYS, ARGV)\n" + body + b"\nend")
        return sha

    def do_evalsha(self, sha: bytes, count: bytes, *args: bytes) -> Any:
        if sha not in self._scripts:
            raise RefusedError("NOSCRIPT No matching script.")
        keys, argv = args[: int(count)], args[int(count) :]
        return self._from_lua(self._scripts[sha](self._lua.table_from(keys), self._lua.table_from(argv)))

    def _call(self, name: bytes, *args: Any) -> Any:
        return self._to_lua(self.execute(name, *map(_text, args)))

    def _pcall(self, name: bytes, *args: Any) -> Any:
        try:
            return self._call(name, *args)
        except RefusedError as error:
            return self._lua.table_from({b"err": str(error).encode()})

    def _to_lua(self, value: Any) -> Any:
        if isinstance(value, list):
            return self._lua.table_from([self._to_lua(each) for each in value])
        if isinstance(value, Status):
            return self._lua.table_from({b"ok": value.encode()})
        return False if value is None else value

    def _from_lua(self, value: Any) -> Any:
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, (int, float)):
            return int(value)
        if isinstance(value, bytes):
            return value
        if (error := value[b"err"]) is not None:
            raise RefusedError(error.decode())
        said: list[Any] = []
        while (each := value[len(said) + 1]) is not None:
            said.append(self._from_lua(each))
        return said

    # --- keys -------------------------------------------------------------------------------------------------

    def _get(self, key: bytes) -> Any:
        expires = self._expires.get(key)
        if expires is not None and expires <= self._now() * 1000:
            self.do_del(key)
        return self._data.get(key)

    def _made(self, key: bytes, kind: type) -> Any:
        value = self._get(key)
        if value is None:
            value = self._data[key] = kind()
        return value

    def do_time(self) -> list[bytes]:
        now = self._now()
        return [b"%d" % now, b"%d" % (now % 1 * 1e6)]

    def do_keys(self, _pattern: bytes) -> list[bytes]:
        return self.keys()

    def do_exists(self, *keys: bytes) -> int:
        return sum(self._get(key) is not None for key in keys)

    def do_del(self, *keys: bytes) -> int:
        for key in keys:
            self._expires.pop(key, None)
        return sum(self._data.pop(key, None) is not None for key in keys)

    def do_pexpire(self, key: bytes, ms: bytes) -> int:
        if self._get(key) is None:
            return 0
        self._expires[key] = self._now() * 1000 + int(ms)
        return 1

    def do_set(self, key: bytes, value: bytes, _px: bytes, ms: bytes) -> Status:
        self._data[key] = value
        self._expires[key] = self._now() * 1000 + int(ms)
        return Status("OK")

    # --- hashes -----------------------------------------------------------------------------------------------

    def do_hset(self, key: bytes, *pairs: bytes) -> int:
        value = self._made(key, dict)
        before = len(value)
        value.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(value) - before

    def do_hsetnx(self, key: bytes, name: bytes, text: bytes) -> int:
        return self.do_hset(key, name, text) if self.do_hget(key, name) is None else 0

    def do_hget(self, key: bytes, name: bytes) -> bytes | None:
        return (self._get(key) or {}).get(name)

    def do_hmget(self, key: bytes, *names: bytes) -> list[bytes | None]:
        return [self.do_hget(key, name) for name in names]

    # --- sorted sets ------------------------------------------------------------------------------------------

    def do_zadd(self, key: bytes, score: bytes, member: bytes) -> int:
        value = self._made(key, dict)
        before = len(value)
        value[member] = float(score)
        return len(value) - before

    def do_zrem(self, key: bytes, member: bytes) -> int:
        value = self._get(key) or {}
        found = value.pop(member, None) is not None
        if found and not value:
            self.do_del(key)
        return int(found)

    do_hdel = do_zrem

    def do_zcount(self, key: bytes, low: bytes, high: bytes) -> int:
        return sum(float(low) <= score <= float(high) for score in (self._get(key) or {}).values())

    # --- streams ----------------------------------------------------------------------------------------------

    def do_xadd(self, key: bytes, name: bytes, *fields: bytes) -> bytes:
        if _id(name) <= self.last_id(key):
            raise RefusedError("ERR The ID specified in XADD is equal or smaller than the target stream top item")
        self._made(key, list).append((_id(name), list(fields)))
        return name

    def do_xrange(self, key: bytes, low: bytes, high: bytes, _count: bytes, count: bytes) -> list[Any]:
        assert low.startswith(b"(")
        assert high == b"+"
        return self._after(key, _id(low[1:]), int(count))

    def do_xrevrange(self, key: bytes, high: bytes, low: bytes, _count: bytes, count: bytes) -> list[Any]:
        assert (high, low) == (b"+", b"-")
        return [_entry(each) for each in reversed((self._get(key) or [])[-int(count) :])]

    def do_xread(self, *args: bytes) -> list[Any] | None:
        """Without waiting."""
        at = [arg.upper() for arg in args].index(b"STREAMS") + 1
        count = int(args[args.index(b"COUNT") + 1])
        names = args[at:]
        half = len(names) // 2
        if not half or len(names) % 2:
            raise RefusedError("ERR Unbalanced 'xread' list of streams: for each stream key an ID must be specified")
        found = [
            [key, self._after(key, _id(after), count)] for key, after in zip(names[:half], names[half:], strict=True)
        ]
        return [each for each in found if each[1]] or None

    def _after(self, key: bytes, after: Id, count: int) -> list[Any]:
        return [_entry(each) for each in self._get(key) or [] if each[0] > after][:count]


def _id(text: bytes) -> Id:
    first, _, second = text.partition(b"-")
    return int(first), int(second or 0)


def _entry(entry: Entry) -> list[Any]:
    return [b"%d-%d" % entry[0], entry[1]]


def _text(value: Any) -> bytes:
    """As Redis has it that Lua gives a number."""
    return value if isinstance(value, bytes) else b"%.17g" % value


def packed(value: Any) -> bytes:
    """In RESP 2."""
    match value:
        case None:
            return b"$-1\r\n"
        case RefusedError():
            return b"-%b\r\n" % str(value).encode()
        case Status():
            return b"+%b\r\n" % value.encode()
        case int():
            return b":%d\r\n" % value
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(value), value)
    return b"*%d\r\n" % len(value) + b"".join(map(packed, value))


@dataclass
class Server:
    """What answers on connections. Each command is on its way for a while, and so is its answer, as `delay_s` says.

    Commands of one connection stay in order, those of two do not.
    """

    store: Store
    delay_s: Callable[[], tuple[float, float]]
    lines: list[Line] = field(default_factory=list)
    made: int = 0

    def connect(self, protocol: asyncio.Protocol, context: Context) -> Line:
        """A new connection of a client, whose callbacks run in `context`."""
        self.made += 1
        line = Line(self, self.made, protocol, context)
        self.lines.append(line)
        return line

    def unblock(self, number: int) -> int:
        line = next((line for line in self.lines if line.number == number), None)
        if line is None or line.waiting is None:
            return 0
        line.wake()
        return 1

    def news(self) -> None:
        """Whoever waits for entries looks again."""
        for line in list(self.lines):
            if line.waiting is not None and self.store.execute(*line.waiting) is not None:
                line.wake()


class Line(asyncio.Transport):
    """One connection to the server, as its client has it."""

    def __init__(self, server: Server, number: int, protocol: asyncio.Protocol, context: Context) -> None:
        super().__init__()
        self.number = number
        self.waiting: Sequence[bytes] | None = None
        self._server = server
        self._protocol = protocol
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._requests = hiredis.Reader()
        self._queue: list[Sequence[bytes]] = []
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._closing:
            return
        self._requests.feed(bytes(data))
        while (request := self._requests.gets()) is not False:
            self._queue.append(request)
        self._next()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self.lose(None)

    abort = close

    def lose(self, error: Exception | None) -> None:
        """The connection is gone. What it was given is on its way all the same; what is answered finds nobody."""
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._protocol.connection_lost, error, context=self._context)
            if self.waiting is not None:
                self.wake()

    def _next(self) -> None:
        if self._busy or not self._queue:
            if self._closing and not self._busy and self in self._server.lines:
                self._server.lines.remove(self)
            return
        self._busy = True
        request = self._queue.pop(0)
        there_s, back_s = self._server.delay_s()
        self._loop.call_later(there_s, self._execute, request, back_s)

    def _execute(self, request: Sequence[bytes], back_s: float) -> None:
        said = self._said(request)
        if said is None and b"BLOCK" in request and not self._closing:
            self.waiting = request
            block_s = int(request[request.index(b"BLOCK") + 1]) / 1000
            self._timer = self._loop.call_later(block_s or math.inf, self.wake)
            return
        self._loop.call_later(back_s, self._answer, packed_or_nothing(request, said))
        if request[0] in {b"EVALSHA", b"XADD"}:
            self._server.news()

    def wake(self) -> None:
        """What was waited for has come, or will not."""
        assert self._timer is not None
        assert self.waiting is not None
        self._timer.cancel()
        request, self.waiting = self.waiting, None
        _, back_s = self._server.delay_s()
        self._loop.call_later(back_s, self._answer, packed_or_nothing(request, self._said(request)))

    def _said(self, request: Sequence[bytes]) -> Any:
        match [part.upper() for part in request[:2]]:
            case [b"CLIENT", b"ID"]:
                return self.number
            case [b"CLIENT", b"UNBLOCK"]:
                return self._server.unblock(int(request[2]))
            case [b"CLIENT", _] | [b"SELECT", _]:
                return Status("OK")
            case [b"INFO", b"SERVER"]:
                return b"redis_version:7.2.0\r\n"
            case [b"INFO", _]:
                return b"maxmemory_policy:noeviction\r\n"
        try:
            return self._server.store.execute(*request)
        except RefusedError as error:
            return error

    def _answer(self, data: bytes) -> None:
        self._busy = False
        if not self._closing:
            self._context.run(self._protocol.data_received, data)
        self._next()


def packed_or_nothing(request: Sequence[bytes], said: Any) -> bytes:
    """A list that is none is one, where XREAD answers."""
    return b"*-1\r\n" if said is None and request[0] == b"XREAD" else packed(said)
