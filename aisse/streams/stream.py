"""One stream: its state, its log, its readers, and the gate that holds its upstream back.

    WAITING ──► STREAMING ──► ENDED
       └──────────────────────►┘

Everything here is synchronous, so that within one step of the event loop a frame is in the log, with every reader
that is up to date, and counted. A stream ends in one of two ways: `finish` ends it here for a reason, `conclude` as
another instance says. The first call wins, and `on_end` tells whoever owns the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import math
import time
from typing import TYPE_CHECKING, Protocol

from aisse.streams.endings import HOLE, Reason, ending, failure, told_by
from aisse.streams.latch import Latch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aisse.errors import StreamError
    from aisse.replay.memory import MemoryLog
    from aisse.streams.leave import LeaveTime


class State(enum.Enum):
    """Where a stream stands; `TRANSITIONS` says what may follow."""

    WAITING = "waiting"
    STREAMING = "streaming"
    ENDED = "ended"


TRANSITIONS = {
    State.WAITING: frozenset({State.STREAMING, State.ENDED}),
    State.STREAMING: frozenset({State.ENDED}),
    State.ENDED: frozenset[State](),
}


class AttachedReader(Protocol):
    """What a stream knows of a reader."""

    position: int
    """Where it goes on reading the log; kept by the reader, and set by the stream when it leaves the tail."""

    def push(self, frames: bytes) -> bool:
        """Writes `frames` at once; False where the reader's socket is full and nothing was written."""

    def wake(self) -> None:
        """Lets the reader's own task look at the stream again."""


class StandIn:
    """Counts as a reader that is behind, and is written nothing.

    One stands for somebody who waits for the answer's status only, one for all the readers that a stream has on other
    instances, which tell how far they are.
    """

    __slots__ = ("position",)

    def __init__(self) -> None:
        self.position = 0

    def push(self, _frames: bytes) -> bool:
        """Is never at the tail."""
        return False

    def wake(self) -> None:
        """Has no task."""


class Stream:
    """One generation and its id.

    - Every reader gets every frame behind its cursor once, in order, and exactly one `end`. The upstream is read ahead
      of the furthest reader by `read_ahead_bytes` at most, by `stream_bytes` while nobody reads
      (test_any_order_of_events_gives_every_reader_every_frame_once).
    - The first end wins (test_first_finish_wins).

    `on_left` is called when the last reader detaches, `on_end` once when the stream ends; both are synchronous.
    """

    __slots__ = (
        "_caught_up",
        "_committed",
        "_decision",
        "_furthest",
        "_gate",
        "_on_end",
        "_on_left",
        "_read_ahead_bytes",
        "_readers",
        "_stream_bytes",
        "content_events",
        "created",
        "created_at",
        "ended",
        "ended_at",
        "error",
        "id",
        "key",
        "known",
        "last_reader_stalled",
        "leave",
        "log",
        "reason",
        "state",
        "usage",
    )

    def __init__(
        self,
        stream_id: str,
        log: MemoryLog,
        *,
        now: float,
        read_ahead_bytes: int,
        stream_bytes: float,
        leave: LeaveTime,
        on_left: Callable[[Stream], None],
        on_end: Callable[[Stream], None],
    ) -> None:
        self.id = stream_id
        self.log = log
        self.state = State.WAITING
        self.reason: Reason | None = None
        self.error: StreamError | None = None
        self.usage: dict[str, int] = {"input_tokens": 0, "output_tokens": 0}
        """Tokens as the upstream has reported them so far."""
        self.created = now
        self.created_at = time.time()
        self.ended: float | None = None
        self.ended_at: float | None = None
        self.key: tuple[bytes, str] | None = None  # the registry's, where the request had one
        self.leave = leave
        """When it is to end for want of a reader."""
        self.content_events = 0
        self._committed = False
        self.known = False
        """Whether somebody knows its id though nobody was answered here: another instance may have given it out."""
        self.last_reader_stalled = False
        """Whether bytes were waiting for the reader that left last."""
        self._readers: set[AttachedReader] = set()
        self._caught_up: dict[AttachedReader, None] = {}  # readers at the tail, in the order in which they got there
        self._furthest = 0
        self._read_ahead_bytes = read_ahead_bytes
        self._stream_bytes = stream_bytes
        self._on_left = on_left
        self._on_end = on_end
        self._gate = Latch()
        self._decision: asyncio.Future[None] | None = None

    @property
    def readers(self) -> int:
        """How many readers are attached, answered or not."""
        return len(self._readers)

    # --- the relay's side -------------------------------------------------------------------------------------

    def publish(self, frames: bytes, last_seq: int) -> None:
        """Adds whole frames, the last numbered `last_seq`: into the log, and to every reader at the tail."""
        position = self.log.tail
        self.log.append(frames, last_seq)
        if blocked := [reader for reader in self._caught_up if not reader.push(frames)]:
            self._expel(blocked, position)
        if self.log.tail > self._stream_bytes:
            self.finish(Reason.LIMIT)

    def begin(self) -> None:
        """The upstream has sent its first event that is neither ping nor error."""
        if self.state is State.WAITING:
            self._enter(State.STREAMING)
            self.commit()

    def commit(self) -> None:
        """From now on every reader is answered with 200 and told of a failure by an event. Too late after the end."""
        if self.state is State.ENDED:
            return  # a refused stream's log is gone: there is nothing left that a 200 could carry
        self._committed = True
        self._decide()

    @property
    def events(self) -> int:
        """How many events there are."""
        return self.log.last_seq - (HOLE if self.reason is Reason.PRODUCER_LOST else 0)

    @property
    def furthest(self) -> int:
        """Position up to which some reader has got."""
        return self.log.tail if self._caught_up else self._furthest

    @property
    def refusal(self) -> StreamError | None:
        """Why the stream failed before it committed, for a real status; None in every other case."""
        return self.error if not self._committed else None

    @property
    def holds_back(self) -> bool:
        """Whether the upstream has been read far enough ahead of the furthest reader."""
        if self._caught_up or self.state is State.ENDED:
            return False
        # Without a reader the stream runs on for one that may come back. It does not if the last reader left bytes
        # untaken: that reader was the brake, and running on would fill the memory with what nobody has asked for. A
        # stream that is to go on without readers was asked for, and would otherwise stand still for good.
        tight = self._readers or (self.last_reader_stalled and self.leave.leave_s < math.inf)
        return self.log.tail - self._furthest >= (self._read_ahead_bytes if tight else self._stream_bytes)

    async def flow(self) -> None:
        """Returns once the upstream may be read on. One caller; cancelling it is safe."""
        while self.holds_back:
            await self._gate.wait()

    def finish(self, reason: Reason, error: StreamError | None = None) -> bool:
        """Ends the stream here, for a reason: `error` unless it went well, then `end`.

        False, and nothing happens, if it had ended.
        """
        if self.state is State.ENDED:
            return False
        if error is None:
            error = failure(reason)
        frames, seq = ending(self.id, self.log.last_seq, reason, error, self.usage)
        self._end(reason, error, frames, seq, time.time())
        return True

    def conclude(self, frames: bytes, last_seq: int, ended_at: float | None = None) -> None:
        """Ends the stream as it was ended elsewhere: by `frames`, the last of which is `end`. Idempotent."""
        if self.state is State.ENDED:
            return
        reason, usage = told_by(frames)
        self.usage.update(usage)
        self._end(reason, failure(reason), frames, last_seq, ended_at or time.time())

    def _end(self, reason: Reason, error: StreamError | None, frames: bytes, last_seq: int, ended_at: float) -> None:
        self._enter(State.ENDED)
        self.reason = reason
        self.error = error
        self.ended = asyncio.get_running_loop().time()
        self.ended_at = ended_at
        self.publish(frames, last_seq)
        self.log.seal()
        self._decide()
        self._open_gate()
        self._expel(tuple(self._caught_up), self.log.tail)
        self._on_end(self)

    # --- the readers' side ------------------------------------------------------------------------------------

    def attach(self, reader: AttachedReader, *, expected: bool = False) -> None:
        """Counts a reader from now on, before it has been answered; `expected` is LeaveTime's."""
        self._readers.add(reader)
        self.leave.reader_came(expected=expected)

    def detach(self, reader: AttachedReader, *, stalled: bool = False) -> None:
        """The reader is gone; `stalled` if bytes were waiting for it, as for one that is evicted. Idempotent."""
        if reader not in self._readers:
            return
        self._readers.remove(reader)
        self.fall_behind(reader)
        self.last_reader_stalled = stalled
        if not self._readers:
            self.leave.last_reader_left(asyncio.get_running_loop().time())
            self._on_left(self)
        self._open_gate()

    def catch_up(self, reader: AttachedReader) -> None:
        """The reader stands at the tail and gets what is published from now on, until `wake` is called."""
        self._caught_up[reader] = None
        self._open_gate()

    def fall_behind(self, reader: AttachedReader) -> None:
        """Has the reader's own task write what comes next, if it stood at the tail."""
        if reader in self._caught_up:
            self._expel((reader,), self.log.tail)

    def advance(self, position: int) -> None:
        """A reader that is behind has got as far as `position`."""
        if position > self._furthest:
            self._furthest = position
            self._open_gate()

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Counts somebody who waits for an answer without reading, like a reader that is never up to date."""
        asker = StandIn()
        self.attach(asker)
        try:
            yield
        finally:
            # It took nothing, so whoever left before it is still the one that counts.
            self.detach(asker, stalled=self.last_reader_stalled)

    async def answerable(self, commit_s: float) -> None:
        """Returns once requests can be answered with 200, at the latest `commit_s` after the stream's creation.

        Raises StreamError where it has failed before. Cancelling it is safe.
        """
        left_s = self.created + commit_s - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await self.decided()
        except TimeoutError:
            self.commit()
        if self.refusal is not None:
            # Each who asks gets an error of its own: one that was raised keeps the frames that it came through.
            raise dataclasses.replace(self.refusal)

    async def decided(self) -> None:
        """Returns once it is known what to answer: committed, or ended. Cancelling it is safe."""
        if self._committed or self.state is State.ENDED:
            return
        if self._decision is None:
            self._decision = asyncio.get_running_loop().create_future()
        # Shielded, because several readers may wait for the same future and one of them may leave.
        await asyncio.shield(self._decision)

    def _expel(self, readers: Iterable[AttachedReader], position: int) -> None:
        for reader in readers:
            del self._caught_up[reader]
            self._furthest = max(self._furthest, position)
            reader.position = position
            reader.wake()

    def _enter(self, state: State) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"{self.state} -> {state}")
        self.state = state

    def _decide(self) -> None:
        if self._decision is not None and not self._decision.done():
            self._decision.set_result(None)

    def _open_gate(self) -> None:
        if not self.holds_back:
            self._gate.open()
