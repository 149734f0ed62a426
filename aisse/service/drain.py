"""The shutdown, in its order: not ready, no listener, every reader told, streams waited for, the rest ended.

Where the log is shared, readers are moved: they are told to come back elsewhere, and their connections are closed. This
process goes on generating for them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from aisse.streams.response import BREAK_OFF_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aisse.settings import Settings
    from aisse.streams.farewell import Farewell
    from aisse.streams.reader import Reader
    from aisse.streams.registry import Registry

    Report = Callable[[int, int, float], None]

# The process has to be gone two seconds after the deadline, and aiohttp needs one of them for its part. Readers get so
# long to take their `end`, and then they are cut off. Those that have taken nothing for so long already are cut off at
# once.
_LAST_BYTES_S = 0.5

# How many readers are told before other tasks get a turn. Each reader that is told makes its own task run.
_BATCH = 50

# A client that connected just before the listener closed, or that has just read an answer, may have a request on its
# way. It gets an answer, even if that is a 503: aiohttp's cleanup would close the connection without one. This is a
# little more than a packet takes round the world.
_RACING_S = 0.3

_REPORT_S = 1.0

# How often the drain looks for readers that can be moved, and after how long it cuts off one that takes nothing.
_MOVE_S = 0.1
_STALLED_S = 3.0

_log = structlog.get_logger("aisse.drain")


class Drain:
    """Ends a server's streams. It cuts off no reader that it can wait for.

    - Every reader is told once, between two frames: test_every_reader_is_told_once_between_frames_and_reads_on.
    - Every request that is on its way gets an answer: test_request_on_its_way_when_the_listener_closes_is_answered.
    - It ends at the deadline: test_streams_that_run_at_the_deadline_end_as_shutdown_and_their_readers_get_it,
      test_reader_that_takes_nothing_is_cut_off_after_the_deadline_and_not_ended.
    """

    def __init__(self, settings: Settings, registry: Registry, farewell: Farewell) -> None:
        self._settings = settings
        self._registry = registry
        self._farewell = farewell
        self._lock = asyncio.Lock()
        self._done = False

    async def run(
        self, close_listener: Callable[[], Awaitable[None]] | None = None, report: Report | None = None
    ) -> None:
        """Returns when every stream has ended and every reader is gone: after `unready_s` + `drain_s` + 1 s at most.

        No `close_listener` means that no connections are taken any more; `unready_s` does not pass then. Once a second
        `report` gets the numbers of streams and readers that are left and the seconds until the deadline; without it,
        they are logged. Idempotent: a second call waits for the first one. Cancelling it leaves the streams running;
        `Registry.close` has to end them.
        """
        async with self._lock:
            if not self._done:
                await self._run(close_listener, report or _log_progress)
                self._done = True

    async def _run(self, close_listener: Callable[[], Awaitable[None]] | None, report: Report) -> None:
        registry = self._registry
        settings = self._settings
        farewell = self._farewell
        loop = asyncio.get_running_loop()
        unready_s = settings.unready_s if close_listener is not None else 0.0
        farewell.deadline = loop.time() + unready_s + settings.drain_s
        registry.draining = True
        if close_listener is not None:
            await asyncio.sleep(unready_s)
            await close_listener()
        farewell.begin(moving=registry.hands_over)
        for count, reader in enumerate(registry.attached(), 1):
            farewell.greet(reader)
            if count % _BATCH == 0:
                await asyncio.sleep(0)
        mover = asyncio.create_task(self._move()) if farewell.moving else None
        try:
            if await self._wait_idle(report) and close_listener is not None:
                await asyncio.sleep(_RACING_S)
        finally:
            if mover is not None:
                mover.cancel()
                await asyncio.gather(mover, return_exceptions=True)
        if registry.active_streams:
            _log.warning(
                "streams still run at the deadline and are ended; drain_s says how long they may",
                streams=registry.active_streams,
                drain_s=settings.drain_s,
            )
        await registry.close()
        self._cut_off([reader for reader in registry.attached() if reader.stalled_for(loop.time()) >= _LAST_BYTES_S])
        if not await registry.idle(_LAST_BYTES_S):
            self._cut_off(registry.attached())
            await registry.idle(_LAST_BYTES_S)

    async def _move(self) -> None:
        """Moves the readers that were told, each after it has had the time to hear it. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(_MOVE_S)
            if not self._registry.hands_over:
                continue  # for now their streams are nowhere else
            now = asyncio.get_running_loop().time()
            for count, reader in enumerate(self._registry.attached(), 1):
                if reader.stalled_for(now) >= _STALLED_S:
                    reader.evict()  # what it was told may wait behind bytes that it does not take
                elif reader.told_for(now) >= BREAK_OFF_S:
                    reader.part()
                if count % _BATCH == 0:
                    await asyncio.sleep(0)

    def _cut_off(self, readers: list[Reader]) -> None:
        if readers:
            _log.warning("readers do not take their last bytes and are cut off", readers=len(readers))
        for reader in readers:
            reader.evict()

    async def _wait_idle(self, report: Report) -> bool:
        loop = asyncio.get_running_loop()
        registry = self._registry
        if await registry.idle(0) and await registry.settled(0):
            return True
        deadline = self._farewell.deadline
        while (left_s := deadline - loop.time()) > 0:
            idle = await registry.idle(min(left_s, _REPORT_S))
            idle = idle and await registry.settled(min(left_s, _REPORT_S))
            report(registry.active_streams, registry.readers, max(0.0, deadline - loop.time()))
            if idle:
                return True
        return False


def _log_progress(streams: int, readers: int, left_s: float) -> None:
    _log.info("draining", streams=streams, readers=readers, left_s=round(left_s, 1))
