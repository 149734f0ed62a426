"""Connections to Redis: how they are made, how long an answer may take, and what is wrong with a URL."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any, cast

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from aisse.errors import ConfigError
from aisse.replay import follower_scripts, producer_scripts

if TYPE_CHECKING:
    from redis.commands.core import AsyncScript

    from aisse.replay.scripts import Answer, Script

ANSWER_S = 2.0
"""How long Redis may take for one answer: longer than any of our calls takes by far, and well within a lease."""

SCRIPTS = (*producer_scripts.ALL, *follower_scripts.ALL)


class Client(Redis):
    """A client that runs our scripts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._registered: dict[type[Script[Any]], AsyncScript] = {
            script: self.register_script(script.LUA) for script in SCRIPTS
        }

    async def run(self, script: Script[Answer]) -> Answer:
        """Runs it as a whole, or not at all; where no answer comes nobody knows which. Raises RedisError."""
        return script.read(await self._registered[type(script)](keys=script.keys(), args=script.args()))

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """As redis-py's, for every command and every script."""
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except exceptions.ReadOnlyError:
            # This server was replaced by another, to which its address leads by now.
            with contextlib.suppress(Exception):
                await self.connection_pool.disconnect(inuse_connections=False)
            raise

    async def load_scripts(self) -> None:
        """Has Redis know all scripts. Without it, each is sent the first time that it is run. Raises RedisError."""
        await asyncio.gather(*(self.script_load(script.LUA) for script in SCRIPTS))


def connect(url: str, connections: int, answer_s: float, **options: Any) -> Client:
    """A client with at most so many connections, none of them open yet. Raises ConfigError for what is no URL."""
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=answer_s,
            socket_timeout=answer_s,
            socket_connect_timeout=ANSWER_S,
            protocol=2,
            # Whoever calls knows what may be repeated, and when.
            retry=Retry(NoBackoff(), 0),
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"log: is no URL of a Redis: {error}") from None
    return cast("Client", Client.from_pool(pool))  # closes it, too


def wrong_url(error: BaseException) -> str | None:
    """What is wrong with the URL, if waiting does not help; None where it does."""
    match error:
        case exceptions.AuthenticationError() | exceptions.NoPermissionError():
            return "Redis refuses the user or password in the URL"
        case exceptions.InvalidResponse():
            return "what listens there is no Redis"
        case exceptions.BusyLoadingError():
            return None
        case exceptions.ResponseError():
            word = str(error).partition(" ")[0]
            if "DB index" in str(error):
                return "Redis has no database of that number"
            if word == "NOAUTH":
                return "Redis wants a password; put it into the URL, and that into AISSE_LOG"
            return f"Redis refuses us ({re.sub(r'[^A-Z]', '', word) or 'ERR'})"
    return None
