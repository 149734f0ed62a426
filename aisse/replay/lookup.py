"""Streams that Redis is asked for by their ids, some of which it is about to know.

A client may be told of a stream up to a tick and Redis's delay before Redis is. Its answer does not wait for that.
Whoever asks for the stream on another instance does: an id that is unknown is asked for again until nobody can have
been told of it, and only then taken for one that there is not.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

from aisse.errors import LogUnavailableError
from aisse.replay.connection import heed_cancellation, in_words

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

PATIENCE_S = 0.25
"""How long an id is asked for at least, with the producer's tick on top: a producer may be busy, or its Redis slow.

Where Redis takes 0.1 s for an answer, and the last question waits for the one before, it is said within 0.5 s that
there is no such stream.
"""

EXCHANGES = 2
"""Where Redis is slow, the time of so many answers is waited if that is longer: a producer may have to wait for the
answer to its last call before it says which streams are new, and one is spare: it may have to connect."""

WAITING = 1 << 14
"""At most so many ids wait, of 2.2 KB each beside their requests. Past it nobody knows whether there is such a stream;
to say that there is not would be a lie to those whose stream is about to come."""

# How long questions are gathered for one call, but for the first, which leaves at once. A crowd whose questions come
# one after the other would make as many calls, which cost more than what is asked.
GATHER_S = 0.02

# When an unknown id is asked for again: then after twice the time, and so on. Most are there the first time.
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

    However many ask, there is one call at a time, one place in it for each id, and at most one in GATHER_S.
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
        """Asks until it is cancelled. Whoever waits then is told that nobody knows."""
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
            # Whatever it is must not end the task for ever, and with it what others generate.
            in_words(error)  # logs what is no trouble of Redis, of which others tell
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
