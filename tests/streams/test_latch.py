"""A place where one task waits."""

from __future__ import annotations

import asyncio

import pytest

from aisse.streams.latch import Latch


async def waiting(latch: Latch) -> asyncio.Task[None]:
    task = asyncio.create_task(latch.wait())
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_latch_opens_for_who_waits_and_for_nobody_who_comes_later() -> None:
    latch = Latch()
    latch.open()
    first = await waiting(latch)
    latch.open()
    latch.open()
    await asyncio.wait_for(first, 5)
    second = await waiting(latch)
    latch.open()
    await asyncio.wait_for(second, 5)


async def test_latch_whose_waiter_was_cancelled_may_be_waited_for_again() -> None:
    latch = Latch()
    cancelled = await waiting(latch)
    cancelled.cancel()
    latch.open()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    again = await waiting(latch)
    latch.open()
    await asyncio.wait_for(again, 5)
