"""What fails at Redis: what is done again and again, how soon it is tried again, and in which words it is told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog
from redis import exceptions
from redis.backoff import EqualJitterBackoff

if TYPE_CHECKING:
    from collections.abc import Awaitable

PROMPT_S = 1.0
"""An exchange that took longer says that Redis may have stood still, and leases lapsed with it."""

# After the first failure 0.05 to 0.1 s are waited, then twice as long each time, up to 0.5 to 1 s.
_BACKOFF = EqualJitterBackoff(cap=1.0, base=0.05)
# Of more doublings it would make a number too large for it.
_DOUBLINGS = 10

_log = structlog.get_logger("aisse.replay")


def heed_cancellation() -> None:
    """Raises CancelledError where this task was cancelled in a call that did not pass that on, as redis-py's may not.

    For loops without end: they would go on, and whoever awaits their end would wait for ever.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Attempts:
    """One thing that is done at Redis again and again. It is tried less often while it fails, and its trouble is told.

    Nothing that fails ends it (test_failure_of_any_kind_is_trouble_until_it_is_over).
    """

    def __init__(self, what: str, troubles: Troubles) -> None:
        self.failures = 0
        """How often it has failed since it was done last."""
        self._what = what
        self._troubles = troubles

    async def pause(self, usual_s: float) -> None:
        """Waits before the next attempt: `usual_s`, but while it fails longer each time, up to a second."""
        await asyncio.sleep(backoff_s(self.failures) if self.failures else usual_s)

    async def succeeds(self, work: Awaitable[object]) -> bool:
        """Whether the work was done. Whatever else it raises than CancelledError must not end what others depend on."""
        try:
            await work
        except Exception as error:
            self._troubles.met(self._what, error)
            self.failures += 1
        else:
            self.over()
        heed_cancellation()
        return not self.failures

    def over(self) -> None:
        """It was done, or there is nothing of it to do."""
        self._troubles.over(self._what)
        self.failures = 0


def backoff_s(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    return _BACKOFF.compute(min(failures, _DOUBLINGS))


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
