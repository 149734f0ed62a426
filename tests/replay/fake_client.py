"""A Redis that says what a test wants it to say, when the test wants it, and a clock that stands until it is moved.

How the scripts behave inside a real one is for tests/test_fake_redis.py and the fleets in tests/streams/test_shared.py:
here they are answered, not run.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from aisse.replay.troubles import Attempts

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from aisse.replay.scripts import Answer, Script


class Clock:
    """Stands in for the module `time` of some modules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
        self.now = 1000.0
        for module in modules:
            monkeypatch.setattr(
                f"aisse.replay.{module}.time", SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now)
            )


def turns_of_loops(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each loop waits before its next attempt, by the last word of its task's name."""
    turned: Counter[str] = Counter()
    pause = Attempts.pause

    async def counted(attempts: Attempts, usual_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        turned[task.get_name().rpartition(" ")[2]] += 1
        await pause(attempts, usual_s)

    monkeypatch.setattr(Attempts, "pause", counted)
    return turned


class Range(NamedTuple):
    """A call of XRANGE: what is behind an entry of a key."""

    key: bytes
    after: str


class Read(NamedTuple):
    """A call of XREAD: behind which entry of each key; it waits unless `block` is None."""

    after: dict[bytes, bytes]
    block: int | None


class Unblock(NamedTuple):
    """A call of CLIENT UNBLOCK."""

    connection: int


Entry = tuple[bytes, dict[bytes, bytes]]
Call = TypeVar("Call", bound="Script[Any] | Range | Read | Unblock")


def entry(before: int, last: int, frames: bytes) -> Entry:
    """As Redis has it: the frames, the number of the one before and that of the last."""
    return b"%d-0" % last, {b"p": b"%d" % before, b"f": frames}


class FakeRedis:
    """As much of a client as is used. `answers` says, for each kind of script, what its call is answered.

    An answer that is an exception is raised. `held` are the kinds that are not answered until they are taken out of it.
    """

    def __init__(self) -> None:
        self.calls: list[Script[Any] | Range | Read | Unblock] = []
        self.answers: dict[type[Script[Any]], Callable[[Any], Any]] = {}
        self.held: set[type[Script[Any]]] = set()
        self.entries: dict[bytes, list[Entry]] = {}
        self.arrivals: asyncio.Queue[Any] = asyncio.Queue()
        self.marked = True
        self.disconnected = 0
        self.connection_pool = SimpleNamespace(disconnect=self._disconnect)

    def calls_of(self, kind: type[Call]) -> list[Call]:
        return [call for call in self.calls if isinstance(call, kind)]

    def count(self, kind: type[Call]) -> int:
        return len(self.calls_of(kind))

    def fails(self, kind: type[Script[Any]], error: Exception) -> None:
        """From now on."""
        self.answers[kind] = lambda _call: error

    async def run(self, script: Script[Answer]) -> Answer:
        kind = type(script)
        self.calls.append(script)
        await asyncio.sleep(0)
        while kind in self.held:
            await asyncio.sleep(0.001)
        answer: Answer = self.answers[kind](script)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def load_scripts(self) -> None:
        pass

    async def _disconnect(self, **_options: Any) -> None:
        self.disconnected += 1

    async def aclose(self) -> None:
        pass

    # --- commands ---------------------------------------------------------------------------------------------

    async def xrevrange(self, key: bytes, count: int) -> Any:
        return self.entries.get(key, [])[::-1][:count]

    async def xrange(self, key: bytes, after: str, count: int) -> Any:
        self.calls.append(Range(key, after))
        number = int(after.strip("(").partition("-")[0])
        return [entry for entry in self.entries.get(key, []) if int(entry[0].partition(b"-")[0]) > number][:count]

    async def xread(self, after: dict[bytes, bytes], count: int, block: int | None = None) -> Any:
        """What is in `arrivals` next; one that does not block brings what there is, or nothing."""
        self.calls.append(Read(dict(after), block))
        if block is None and self.arrivals.empty():
            return []
        came = await self.arrivals.get()
        if isinstance(came, BaseException):
            raise came
        return came

    async def client_id(self) -> int:
        return 7

    async def client_unblock(self, connection: int) -> bool:
        self.calls.append(Unblock(connection))
        self.arrivals.put_nowait([])
        return True

    async def pexpire(self, _key: bytes, _ms: int) -> bool:
        return self.marked

    async def set(self, _key: bytes, _value: int, px: int) -> bool:
        self.marked = True
        return True

    async def info(self, section: str) -> dict[str, str]:
        return {"redis_version": "7.2.0"} if section == "server" else {}
