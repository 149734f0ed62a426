"""A Redis that says what a test wants it to say, when the test wants it, and a clock that stands until it is moved.

How the scripts behave inside a real one is for the fleets in tests/streams/test_shared.py: here they are answered, not
run.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aisse.replay import scripts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

NAMES = {text: name for name, text in vars(scripts).items() if name.isupper() and text in scripts.ALL}


class Clock:
    """Stands in for the module `time` of one module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        self.now = 1000.0
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now))


class Call(SimpleNamespace):
    """One call of a script or a command: its name, keys and arguments."""

    name: str
    keys: list[Any]
    args: list[Any]


class FakeRedis:
    """As much of a client as the mirror and the tailer use. `answers[name](keys, args)` says what a script returns.

    An answer that is an exception is raised. `held` names what is not answered until it is taken out of it.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answers: dict[str, Callable[[list[Any], list[Any]], Any]] = {}
        self.held: set[str] = set()
        self.entries: dict[str, list[tuple[bytes, dict[bytes, bytes]]]] = {}
        self.arrivals: asyncio.Queue[Any] = asyncio.Queue()
        self.marked = True
        self.disconnected = 0
        self.connection_pool = SimpleNamespace(disconnect=self._disconnect)

    def named(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]

    def count(self, name: str) -> int:
        return len(self.named(name))

    def register_script(self, text: str) -> Callable[..., Any]:
        name = NAMES[text]

        async def script(keys: Sequence[Any], args: Sequence[Any] = ()) -> Any:
            return await self._answer(name, list(keys), list(args))

        return script

    async def _answer(self, name: str, keys: list[Any], args: list[Any]) -> Any:
        self.calls.append(Call(name=name, keys=keys, args=args))
        await asyncio.sleep(0)
        while name in self.held:
            await asyncio.sleep(0.001)
        said = self.answers[name](keys, args)
        if isinstance(said, BaseException):
            raise said
        return said

    async def _disconnect(self, **_options: Any) -> None:
        self.disconnected += 1

    async def aclose(self) -> None:
        pass

    # --- commands ---------------------------------------------------------------------------------------------

    async def xrevrange(self, key: Any, count: int) -> Any:
        name = key.decode() if isinstance(key, bytes) else key
        return self.entries.get(name, [])[::-1][:count]

    async def xrange(self, key: str, after: str, count: int) -> Any:
        self.calls.append(Call(name="xrange", keys=[key], args=[after, count]))
        number = int(after.strip("(").partition("-")[0])
        return [entry for entry in self.entries.get(key, []) if int(entry[0].partition(b"-")[0]) > number][:count]

    async def xread(self, after: dict[Any, Any], count: int, block: int | None = None) -> Any:
        """What is in `arrivals` next; one that does not block brings what there is, or nothing."""
        self.calls.append(Call(name="xread", keys=list(after), args=[list(after.values()), count, block]))
        if block is None and self.arrivals.empty():
            return []
        came = await self.arrivals.get()
        if isinstance(came, BaseException):
            raise came
        return came

    async def client_id(self) -> int:
        return 7

    async def client_unblock(self, _connection: int) -> bool:
        self.calls.append(Call(name="unblock", keys=[], args=[]))
        self.arrivals.put_nowait([])
        return True

    async def pexpire(self, _key: str, _ms: int) -> bool:
        return self.marked

    async def set(self, _key: str, _value: int, px: int) -> bool:
        self.marked = True
        return True

    async def info(self, section: str) -> dict[str, str]:
        return {"redis_version": "7.2.0"} if section == "server" else {}

    async def script_load(self, _text: str) -> str:
        return ""
