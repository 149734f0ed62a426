"""What is said of a Redis, and how soon it is asked again: aisse/replay/troubles.py."""

from __future__ import annotations

import asyncio

import pytest
from redis import exceptions
from structlog.testing import capture_logs

from aisse.replay.troubles import Attempts, Troubles, backoff_s, heed_cancellation, in_words

SECRET = "a prompt"


def test_pauses_grow_and_stay_short() -> None:
    """A Redis that comes back after a night is asked within a second."""
    assert all(0.05 <= backoff_s(1) <= 0.1 for _ in range(50))
    assert all(0.2 <= backoff_s(3) <= 0.4 for _ in range(50))
    assert all(0.5 <= backoff_s(failures) <= 1.0 for failures in (5, 10, 100, 100_000))


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


# --- attempts -----------------------------------------------------------------------------------------------------


async def failing(error: Exception | None) -> None:
    if error is not None:
        raise error


@pytest.mark.parametrize("error", [exceptions.ConnectionError(), TimeoutError(), OSError(), KeyError("surprise")])
async def test_failure_of_any_kind_is_trouble_until_it_is_over(error: Exception) -> None:
    troubles = Troubles()
    attempts = Attempts("append", troubles)
    with capture_logs() as logs:
        for failures in (1, 2, 3):
            assert not await attempts.succeeds(failing(error))
            assert attempts.failures == failures
            assert troubles.first == in_words(error)
        assert await attempts.succeeds(failing(None))
    assert attempts.failures == 0
    assert not troubles.first
    told = [line["event"] for line in logs if line["event"] != "shared log failed"]
    assert told == ["shared log in trouble", "shared log is back"]


async def test_trouble_of_one_thing_lasts_while_another_is_well() -> None:
    troubles = Troubles()
    append, renew = Attempts("append", troubles), Attempts("renew", troubles)
    assert not await append.succeeds(failing(exceptions.ConnectionError()))
    assert await renew.succeeds(failing(None))
    assert troubles.first is not None
    append.over()
    assert append.failures == 0
    assert not troubles.first


async def test_attempts_are_further_apart_while_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("aisse.replay.troubles.asyncio.sleep", sleep)
    attempts = Attempts("append", Troubles())
    await attempts.pause(0.01)
    for _ in range(2000):
        await attempts.succeeds(failing(exceptions.ConnectionError()))
        await attempts.pause(0.01)
    await attempts.succeeds(failing(None))
    await attempts.pause(0.01)
    assert slept[0] == slept[-1] == 0.01
    assert 0.05 <= slept[1] <= 0.1 < slept[3] <= 0.4
    assert all(0.5 <= seconds <= 1.0 for seconds in slept[10:-1])


async def test_attempt_that_swallows_a_cancellation_is_the_last_one() -> None:
    async def swallow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

    async def loop() -> None:
        attempts = Attempts("append", Troubles())
        while True:
            await attempts.succeeds(swallow())
            await asyncio.Event().wait()  # for work

    task = asyncio.create_task(loop())
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done
    assert task.cancelled()
