"""What is said of a Redis, and how soon it is asked again: aisse/replay/connection.py."""

from __future__ import annotations

import asyncio

import pytest
from redis import exceptions

from aisse.replay.connection import backoff_s, heed_cancellation, in_words, wrong_url

SECRET = "a prompt"


def test_pauses_grow_and_stay_short() -> None:
    """A Redis that comes back after a night is asked within a second."""
    assert all(0.05 <= backoff_s(1) <= 0.1 for _ in range(50))
    assert all(0.2 <= backoff_s(3) <= 0.4 for _ in range(50))
    assert all(0.5 <= backoff_s(failures) <= 1.0 for failures in (5, 10, 100, 100_000))


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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (exceptions.OutOfMemoryError(SECRET), "full"),
        (exceptions.ReadOnlyError(SECRET), "read-only"),
        (exceptions.BusyLoadingError(SECRET), "loading"),
        (exceptions.AuthenticationError(SECRET), "user or password"),
        (exceptions.ConnectionError(SECRET), "does not answer"),
        (TimeoutError(SECRET), "does not answer"),
        (exceptions.ResponseError(f"WRONGTYPE {SECRET}"), "(WRONGTYPE)"),
        (exceptions.ResponseError(SECRET), "(ERR)"),
    ],
)
def test_trouble_is_said_in_words_of_our_own(error: Exception, words: str) -> None:
    assert words in in_words(error)
    assert SECRET not in in_words(error)


async def test_cancellation_that_a_call_has_swallowed_is_heeded() -> None:
    async def loop() -> None:
        while True:
            heed_cancellation()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    task = asyncio.create_task(loop())
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done
    assert task.cancelled()
