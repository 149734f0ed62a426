"""Connections to Redis: how they are made, how long anything may take, and in which words it is told what is wrong."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

import structlog
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from aisse.errors import ConfigError

ANSWER_S = 2.0
"""How long Redis may take for one answer: longer than any of our calls takes by far, and well within a lease."""

PROMPT_S = 1.0
"""An exchange that took longer says that Redis may have stood still, and leases lapsed with it."""

# What is waited after a failure, doubled each time.
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 1.0

_log = structlog.get_logger("aisse.replay")


def connect(url: str, connections: int, answer_s: float, **options: Any) -> Redis:
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
    return Redis.from_pool(pool)  # closes it, too


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


def heed_cancellation() -> None:
    """Raises CancelledError where this task was cancelled in a call that did not pass that on, as redis-py's may not.

    For loops without end: theirs would have none, and whoever awaits them waited for ever.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def backoff_s(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    longest: float = min(_LAST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(failures - 1, 10))
    return longest * random.uniform(0.5, 1)  # noqa: S311 - no secret


class Troubles:
    """What fails at Redis now. The log tells of each trouble once, and once that the last one is over."""

    def __init__(self) -> None:
        self._why: dict[str, str] = {}

    @property
    def first(self) -> str | None:
        """The oldest one, in words; None while all is well."""
        return next(iter(self._why.values()), None)

    def met(self, what: str, error: BaseException) -> None:
        """`what`, which is done again and again, has failed."""
        why = in_words(error)
        if why not in self._why.values():
            _log.warning("shared log in trouble", why=why)
        self._why[what] = why

    def over(self, what: str) -> None:
        """It was done, or there is nothing of it to do."""
        if self._why.pop(what, None) is not None and not self._why:
            _log.info("shared log is back")


def in_words(error: BaseException) -> str:
    """What is the matter with Redis, for operators; nothing of what was sent to it."""
    match error:
        case _ if not isinstance(error, exceptions.RedisError | OSError):  # TimeoutError is an OSError
            _log.error("shared log failed", exc_info=error)
            return "the shared log's client failed; the log tells how"
        case exceptions.OutOfMemoryError():
            return "the shared log is full (maxmemory)"
        case exceptions.ReadOnlyError():
            return "the shared log is read-only"
        case exceptions.BusyLoadingError():
            return "the shared log is still loading its data"
        case exceptions.AuthenticationError() | exceptions.NoPermissionError():
            return "the shared log refuses our user or password"
        case exceptions.ConnectionError() | exceptions.TimeoutError() | OSError():
            return "the shared log does not answer"
    # Redis begins its errors with a word in capitals; the rest may repeat what it was sent.
    word = str(error).partition(" ")[0]
    return f"the shared log refuses what it is asked ({word if word.isupper() and word.isalpha() else 'ERR'})"
