"""Asks Redis for streams by their ids. Redis may be about to know some of them.

A client may be told of a stream before Redis is, by up to a tick and Redis's delay. The client's answer does not wait
for that. Whoever asks another instance for the stream does: an unknown id is asked for again until nobody can have been
told of it. Only then there is no such stream.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

from aisse.errors import LogUnavailableError
from aisse.replay.troubles import heed_cancellation, in_words

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

PATIENCE_S = 0.25
"""How long an unknown id is asked for at least, with the producer's tick on top: that may be busy, or its Redis slow.

If Redis takes 0.1 s for an answer, and the last question waits for the one before, the client is told within 0.5 s that
there is no such stream.
"""

EXCHANGES = 2
"""If so many answers of a slow Redis take longer than that, an unknown id is asked for as long. The producer may have
to wait for one answer before it can tell Redis of new streams. The other one is spare: it may have to connect first."""

WAITING = 1 << 14
"""At most so many ids wait; each takes 2.2 KB beside its requests. Of one more nobody knows whether there is such a
stream. To say that there is none would be a lie to those whose stream is about to come."""

# How long questions are gathered for one call; the first one leaves at once. A crowd whose questions come one after the
# other would make a call for each, and calls cost more than what is asked in them.
GATHER_S = 0.02

# An unknown id is asked for again after so long, then after twice the time, and so on. Most are there the first time.
_AGAIN_S = 0.02

Answer = TypeVar("Answer")


class _Waiting(Generic[Answer]):
    """One id. Times are the loop's."""

    __slots__ = ("answer", "asked", "due", "longest_s", "patient")

    def __init__(self, now: float, answer: asyncio.Future[Answer | None], *, patient: bool) -> None:
        self.asked = now
        self.due = now
        self.patient = patient
        self.longest_s = 0.0  # that a call took
        self.answer = answer


class Lookup(Generic[Answer]):
    """One kind of question, by a stream's id. `run` is one task's.

    Everybody is told what is right (test_everybody_is_told_what_is_right_whatever_interleaves). However many ask, there
    is one call at a time, at most one in GATHER_S, and in it one place for each id
    (test_unknown_id_is_asked_for_a_few_times_and_then_unknown).
    """

    def __init__(self, ask: Callable[[Sequence[str]], Awaitable[Sequence[Answer | None]]], tick_s: float) -> None:
        """`ask` answers for each id, with None for an unknown one; `tick_s` is how late producers tell Redis."""
        self._ask = ask
        self._tick_s = tick_s
        self._waiting: dict[str, _Waiting[Answer]] = {}  # oldest first
        self._work = asyncio.Event()
        self._ended = False

    async def find(self, stream_id: str, *, patient: bool = True) -> Answer | None:
        """The answer; None once the id was unknown for long enough, at once unless `patient`.

        Raises LogUnavailableError where the call failed, too many wait, or `run` has ended. Cancelling it is safe:
        others who ask for the same id get their answer.
        """
        if (waiting := self._waiting.get(stream_id)) is None:
            if self._ended or len(self._waiting) >= WAITING:
                raise LogUnavailableError
            loop = asyncio.get_running_loop()
            waiting = self._waiting[stream_id] = _Waiting(loop.time(), loop.create_future(), patient=patient)
            self._work.set()
        return await asyncio.shield(waiting.answer)

    async def run(self) -> None:
        """Asks until it is cancelled. Those who still wait then are told that nobody knows."""
        loop = asyncio.get_running_loop()
        begun = -GATHER_S
        try:
            while True:
                heed_cancellation()
                if not self._waiting:
                    self._work.clear()
                    await self._work.wait()
                # Also where this took no time, so that all who ask at the same moment are in the call.
                await asyncio.sleep(max(0.0, begun + GATHER_S - loop.time()))
                begun = loop.time()
                if due := [stream_id for stream_id, waiting in self._waiting.items() if waiting.due <= begun]:
                    await self._ask_for(due, begun)
        finally:
            self._ended = True
            for stream_id in list(self._waiting):
                self._fail(stream_id)

    async def _ask_for(self, due: list[str], begun: float) -> None:
        try:
            answers = await self._ask(due)
        except Exception as error:
            # Whatever it is must not end this task, on which all look-ups depend.
            in_words(error)  # This logs what is wrong with us. Of Redis's troubles others tell.
            for stream_id in due:
                self._fail(stream_id)
            return
        took_s = asyncio.get_running_loop().time() - begun
        for stream_id, answer in zip(due, answers, strict=True):
            waiting = self._waiting[stream_id]
            waiting.longest_s = max(waiting.longest_s, took_s)
            age_s = begun - waiting.asked
            patience_s = self._tick_s + max(PATIENCE_S, EXCHANGES * waiting.longest_s)
            if answer is not None or not waiting.patient or age_s >= patience_s:
                del self._waiting[stream_id]
                waiting.answer.set_result(answer)
            else:
                waiting.due = waiting.asked + min(max(_AGAIN_S, 2 * age_s), patience_s)

    def _fail(self, stream_id: str) -> None:
        answer = self._waiting.pop(stream_id).answer
        answer.set_exception(LogUnavailableError())
        answer.exception()  # nobody may be left to take it
