"""Connections to Redis: aisse/replay/connection.py. That the scripts run is for tests/test_fake_redis.py."""

from __future__ import annotations

from typing import Any

import pytest
from redis import exceptions
from redis.asyncio import Redis

from aisse.replay.connection import Client, wrong_url
from aisse.replay.follower_scripts import Look


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (exceptions.AuthenticationError(), True),
        (exceptions.NoPermissionError(), True),
        (exceptions.InvalidResponse(), True),
        (exceptions.ResponseError("NOAUTH Authentication required."), True),
        (exceptions.ResponseError("ERR DB index is out of range"), True),
        (exceptions.BusyLoadingError("LOADING Redis is loading the dataset in memory"), False),
        (exceptions.ConnectionError(), False),
        (exceptions.TimeoutError(), False),
        (OSError(), False),
    ],
)
def test_start_is_stopped_by_what_waiting_does_not_mend(error: Exception, wrong: bool) -> None:
    assert (wrong_url(error) is not None) is wrong


@pytest.mark.parametrize("disconnects", [True, False])
async def test_read_only_redis_is_left_for_what_takes_its_address(
    monkeypatch: pytest.MonkeyPatch, *, disconnects: bool
) -> None:
    """Connections that nobody uses at the moment: an answer may still come on the others.

    A command alone shows it, too: an instance without streams of its own sends no script that writes.
    """
    client = Client()
    left: list[dict[str, Any]] = []

    async def refuse(*_: Any, **_options: Any) -> None:
        raise exceptions.ReadOnlyError

    async def disconnect(**options: Any) -> None:
        left.append(options)
        if not disconnects:
            raise OSError

    monkeypatch.setattr(Redis, "execute_command", refuse)
    monkeypatch.setattr(client.connection_pool, "disconnect", disconnect)
    with pytest.raises(exceptions.ReadOnlyError):
        await client.run(Look("me", ["a"]))
    assert left == [{"inuse_connections": False}]
    with pytest.raises(exceptions.ReadOnlyError):
        await client.pexpire("mark", 1000)
    assert len(left) == 2
