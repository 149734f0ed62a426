"""One look a second at every reader and stream.

It is the only clock of running streams: heartbeats, stalled readers, streams that nobody reads, upstreams that are
late, retention. One task for all keeps an idle stream at two parked coroutines and no timer.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

import structlog

from aisse.streams.endings import Reason
from aisse.streams.stream import State

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from aisse.settings import Settings
    from aisse.streams.figures import Figures
    from aisse.streams.reader import Reader
    from aisse.streams.relay import Relay
    from aisse.streams.shared import Shared
    from aisse.streams.stream import Stream
    from aisse.streams.table import Table

SWEEP_S = 1.0

# How many records the sweep looks at before other tasks get a turn: it delays no token by more than that.
_BATCH = 100

# Users filter their logs by this name. It stays, wherever the module is.
_log = structlog.get_logger("aisse.registry")


class Sweep:
    """`run` is one task's.

    - A record that fails costs no other its turn (test_reader_whose_record_fails_costs_the_others_no_heartbeat,
      test_stream_whose_record_fails_ends_and_the_others_are_looked_after).
    - However many records there are, others get a turn in between
      (test_sweep_over_hundreds_of_records_lets_others_run_in_between).
    """

    def __init__(
        self,
        settings: Settings,
        table: Table,
        figures: Figures,
        *,
        relays: Mapping[str, tuple[Relay, asyncio.Task[None]]],
        readers: AbstractSet[Reader],
        shared: Shared | None,
    ) -> None:
        """`relays` and `readers` are those that run and read now; `shared` is there where the log is."""
        self._settings = settings
        self._table = table
        self._relays = relays
        self._readers = readers
        self._figures = figures
        self._shared = shared

    async def run(self) -> None:
        """Sweeps once a second until it is cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            # From due time to due time, for the sweep's own length would add up; times that were missed are skipped.
            due += SWEEP_S * max(1, math.ceil((loop.time() - due) / SWEEP_S))
            await asyncio.sleep(due - loop.time())
            self._figures.loop_lag_s = max(0.0, loop.time() - due)
            try:
                await self._look()
            except Exception:
                # It guards each record by itself; this is for what is left, and must not stop all heartbeats for ever.
                _log.exception("sweep failed")

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for count, reader in enumerate(list(self._readers), 1):
            self._look_at_reader(reader, now)
            if count % _BATCH == 0:
                await asyncio.sleep(0)
        for count, stream in enumerate(list(self._table.running.values()), 1):
            self._look_at_stream(stream, now)
            if count % _BATCH == 0:
                await asyncio.sleep(0)
        if self._shared is not None:
            self._shared.following.sweep(now)
        self._table.make_room()
        self._table.expire(now)
        self._figures.sample(now)

    def _look_at_reader(self, reader: Reader, now: float) -> None:
        try:
            stalled_s = reader.stalled_for(now)
            if stalled_s >= self._settings.stall_s:
                _log.info(
                    "reader evicted",
                    stream_id=reader.stream.id[:8],
                    stalled_s=round(stalled_s, 1),
                    buffered_bytes=reader.buffered_bytes,
                )
                reader.evict()
            else:
                # Half a sweep early rather than half late: a heartbeat leaves within heartbeat_s, give or take half
                # a second.
                reader.beat(now, self._settings.heartbeat_s - SWEEP_S / 2, SWEEP_S)
        except Exception:
            # Left alone it would be met again in a second, and all who come after it would wait for ever.
            _log.exception("reader failed", stream_id=reader.stream.id[:8])
            reader.evict()

    def _look_at_stream(self, stream: Stream, now: float) -> None:
        if stream.state is State.ENDED:
            return  # while this sweep let others run
        try:
            relay, _ = self._relays[stream.id]
            if stream.leave.over(now):
                stream.finish(Reason.ABANDONED)
            elif (late := relay.overdue(now)) is not None:
                stream.finish(Reason.TIMEOUT, late)
        except Exception:
            _log.exception("stream failed", stream_id=stream.id[:8])
            stream.finish(Reason.ERROR)
