"""The front of the engine: who may start a stream, where one is found, who reads, and how all of it ends."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import structlog

from aisse.errors import DrainingError, KeyReusedError, RequestError, UnknownStreamError
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.streams.endings import Reason
from aisse.streams.figures import Figures
from aisse.streams.latch import Latch
from aisse.streams.leave import LeaveTime
from aisse.streams.relay import Relay
from aisse.streams.stream import Stream
from aisse.streams.sweep import Sweep
from aisse.streams.table import Table
from aisse.upstream.question import Bodies

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aisse.formats.format import Format
    from aisse.settings import Settings
    from aisse.streams.reader import Reader
    from aisse.streams.shared import Shared
    from aisse.streams.table import Key
    from aisse.upstream.client import Upstream
    from aisse.upstream.question import Question

OpenShared = Callable[["Settings", Table, "Format"], "Shared"]

# How long the shared log may take for the last events at shutdown.
_SHARED_S = 0.3

# So many ids of streams that were here are remembered where the log is shared: some 2 MB, and half an hour at five new
# ones a second.
_PAST = 10_000

_log = structlog.get_logger("aisse.registry")


class Registry:
    """Owns the streams and their relays' tasks. `start` and `close` bracket its life, on one event loop.

    - However a relay comes to its end, its stream ends, and no other
      (test_relay_that_fails_ends_its_stream_and_no_other).
    - However a stream comes to its end, its relay does not outlive it
      (test_end_closes_the_upstream_and_a_second_end_does_nothing).
    - A key starts one stream, however many ask with it at once (test_key_starts_one_generation_on_all_instances).
    """

    def __init__(self, settings: Settings, upstream: Upstream, open_shared: OpenShared | None = None) -> None:
        """`open_shared` is there where the log is shared."""
        self._settings = settings
        self._upstream = upstream
        self.bodies = Bodies(settings.bodies_bytes)
        """The memory of questions whose answers have not begun."""
        self.draining = False
        """No stream is started any more."""
        self.generations = 0
        """Streams that were started here."""
        self._table = Table(
            ReplayMemory(settings.replay_bytes),
            retention_s=settings.retention_s,
            past=_PAST if open_shared is not None else 0,
        )
        self._relays: dict[str, tuple[Relay, asyncio.Task[None]]] = {}
        self._readers: set[Reader] = set()
        self._unanswered = 0
        self._idle = Latch()
        # One a key, for as long as somebody waits.
        self._claiming: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()
        self._shared = open_shared(settings, self._table, upstream.format) if open_shared is not None else None
        self.figures = Figures(settings, self._table, self._readers, self._shared)
        """What operators see."""
        self._sweep = Sweep(
            settings, self._table, self.figures, relays=self._relays, readers=self._readers, shared=self._shared
        )
        self._sweeper: asyncio.Task[None] | None = None
        self._closing = asyncio.Lock()

    async def start(self) -> None:
        """Starts the sweep. Raises ConfigError where the shared log is not ours to use."""
        if self._shared is not None:
            await self._shared.start()
        self._sweeper = asyncio.create_task(self._sweep.run(), name="registry sweep")

    async def idle(self, within_s: float) -> bool:
        """Whether all streams have ended and all requests are answered, now or `within_s`. One caller at a time."""
        if self._busy:
            try:
                async with asyncio.timeout(within_s):
                    await self._idle.wait()
            except TimeoutError:
                return False
        return True

    async def close(self) -> None:
        """Ends every stream as `shutdown`, cancels and awaits every task. Idempotent: whoever calls again waits for it.

        What the shared log has not got by then is said in the log, once.
        """
        self.draining = True
        for stream in list(self._table.running.values()):
            stream.finish(Reason.SHUTDOWN)
        tasks = [task for _, task in self._relays.values()]
        for task in tasks:
            task.cancel()
        if self._sweeper is not None:
            self._sweeper.cancel()
            tasks.append(self._sweeper)
            self._sweeper = None
        await asyncio.gather(*tasks, return_exceptions=True)
        async with self._closing:
            if (shared := self._shared) is None:
                return
            # A log that is in trouble is not waited for: the process is to be gone in time.
            if shared.runs and not await shared.settled(_SHARED_S if shared.trouble is None else 0.0):
                _log.warning("the shared log has not got everything", streams=shared.behind)
            await shared.close()

    async def settled(self, within_s: float) -> bool:
        """Whether nothing is left to be shared, now or `within_s`. One caller at a time.

        While the shared log is in trouble nothing counts as left: readers elsewhere could not be reached, however long
        that took.
        """
        return not self.hands_over or (self._shared is not None and await self._shared.settled(within_s))

    # --- streams ----------------------------------------------------------------------------------------------

    def get(self, stream_id: str) -> Stream | None:
        """The stream of that id that runs or is retained here."""
        return self._table.get(stream_id)

    async def find(self, stream_id: str) -> Stream:
        """The stream of that id, here or elsewhere. Raises UnknownStreamError, or LogUnavailableError: nobody knows."""
        # A stream may be forgotten between its coming and this task's turn, to make room or because its time is over.
        # Then it is looked for again. Whoever gets it attaches a reader before anybody else gets a turn.
        while (stream := self._here(stream_id)) is None:
            if self._shared is None or not await self._shared.following.bring(stream_id):
                raise UnknownStreamError
        return stream

    def _here(self, stream_id: str) -> Stream | None:
        stream = self.get(stream_id)
        if stream is None and self._shared is not None:
            stream = self._shared.following.get(stream_id)
        return stream

    async def stop(self, stream_id: str) -> None:
        """Somebody asked for it. Idempotent, also for a stream that has ended. Raises as `find` does."""
        if (stream := self._table.get(stream_id)) is not None:
            stream.finish(Reason.STOPPED)
        elif self._shared is None or not await self._shared.following.ask_to_stop(stream_id):
            raise UnknownStreamError

    async def create_once(self, key: Key, question: Question, leave_s: float) -> Stream:
        """As `create`, but once for a key, on all instances: the same key gets the stream that it started.

        A key is remembered for as long as its stream is. Raises RequestError (422) for a key that came with another
        question before, as their digests say, and LogUnavailableError where nobody knows. Where the log is not shared,
        or the stream is from here, nothing waits in here: of two requests that race, the second finds the stream of the
        first. Otherwise requests with the same key wait for each other. Cancelling one leaves the key to the next.
        """
        digest = question.digest
        if (stream := self._table.by_key(key, digest)) is not None:
            return stream
        if self._shared is None:
            return self._create_for(key, question, leave_s)
        claiming = self._claiming.setdefault(key, asyncio.Lock())
        while True:
            async with claiming:
                if (stream := self._table.by_key(key, digest)) is not None:
                    return stream
                self.admit()
                claimed, holder = await self._shared.claim(key, digest)
                if holder is None:
                    raise KeyReusedError
                if holder == claimed:
                    try:
                        return self._create_for(key, question, leave_s, claimed)
                    except BaseException:
                        self._shared.claims.renounce(claimed, key)
                        raise
            with contextlib.suppress(UnknownStreamError):
                return await self.find(holder)
            # That stream was refused meanwhile, and has left the key to whoever comes next.

    def _create_for(self, key: Key, question: Question, leave_s: float, stream_id: str | None = None) -> Stream:
        stream = self.create(question, leave_s, stream_id, (key, question.digest))
        self._table.add_key(key, stream, question.digest)
        return stream

    def create(
        self, question: Question, leave_s: float, stream_id: str | None = None, claim: tuple[Key, bytes] | None = None
    ) -> Stream:
        """Starts a generation for `question`; `stream_id` and `claim` are those of a claimed key.

        The question's share of `bodies` is the relay's from then on, until the answer begins or the stream ends.
        Raises RequestError (503) where there is no room.
        """
        self.admit()
        if len(self._table.running) >= self._settings.max_streams:
            raise RequestError(503, "overloaded_error", "too many answers are being generated", retry_after_s=5)
        self._table.need_room()
        if stream_id is None:
            # 128 bits from the system: whoever has the id may read the stream, nobody may guess it.
            stream_id = secrets.token_urlsafe(16)
        settings, shared = self._settings, self._shared
        stream = Stream(
            stream_id,
            shared.log(stream_id, claim) if shared is not None else MemoryLog(self._table.memory),
            now=asyncio.get_running_loop().time(),
            # One more read of the socket may bring what the kernel holds: twice SO_RCVBUF, socket(7).
            read_ahead_bytes=max(
                settings.read_ahead_bytes // 2, settings.read_ahead_bytes - 2 * settings.receive_buffer_bytes
            ),
            stream_bytes=settings.stream_bytes,
            leave=LeaveTime(leave_s, shared.leave_grace_s if shared is not None else 0.0),
            on_left=self._left,
            on_end=self._ended,
        )
        relay = Relay(stream, self._upstream, question, settings)
        if question.hold is not None:
            question.hold.taken_over = True
        task = asyncio.create_task(relay.run(), name=f"relay {stream_id[:8]}")
        self._table.running[stream_id] = stream
        self._relays[stream_id] = relay, task
        self.generations += 1
        task.add_done_callback(lambda done: self._relay_done(stream, done))
        return stream

    def admit(self) -> None:
        """Raises DrainingError where no stream is started any more."""
        if self.draining:
            raise DrainingError

    @contextlib.contextmanager
    def reading(self, reader: Reader) -> Iterator[None]:
        """Has the sweep look after `reader` for as long as the block runs."""
        self._readers.add(reader)
        try:
            yield
        finally:
            self._readers.discard(reader)
            self._tell_idle()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Counts a request as unanswered for as long as the block runs, whether it reads a stream or not."""
        self._unanswered += 1
        try:
            yield
        finally:
            self._unanswered -= 1
            self._tell_idle()

    def attached(self) -> list[Reader]:
        """The readers that the sweep looks after now."""
        return list(self._readers)

    @property
    def _busy(self) -> bool:
        return bool(self._table.running or self._readers or self._unanswered)

    def _tell_idle(self) -> None:
        if not self._busy:
            self._idle.open()

    def _left(self, stream: Stream) -> None:
        # Without a leave time the upstream is cancelled now, not at the next sweep.
        if stream.leave.over(asyncio.get_running_loop().time()):
            stream.finish(Reason.ABANDONED)

    def _relay_done(self, stream: Stream, task: asyncio.Task[None]) -> None:
        relay, _ = self._relays.pop(stream.id)
        relay.let_go()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("relay failed", stream_id=stream.id[:8], exc_info=error)
        # However the relay came to its end, its readers are told. After a run without a bug this does nothing.
        stream.finish(Reason.ERROR)

    def _ended(self, stream: Stream) -> None:
        relay, task = self._relays.get(stream.id, (None, None))
        if relay is not None and task is not None and not relay.finished:
            task.cancel()  # whoever ended it, nothing is generated that nobody gets
        if stream.refusal is None:
            self._table.keep(stream)
        else:
            if self._shared is not None:
                self._shared.claims.withdraw(stream)
            self._table.refuse(stream)
        if self._shared is not None:
            self._shared.elsewhere.nobody_reads(stream)
        self.figures.ended(stream, relay.request_id if relay is not None else None)
        self._tell_idle()

    # --- what there is ----------------------------------------------------------------------------------------

    @property
    def active_streams(self) -> int:
        """Generations that run now."""
        return len(self._table.running)

    @property
    def readers(self) -> int:
        """Requests that read a stream now."""
        return len(self._readers)

    @property
    def replay_bytes(self) -> int:
        """Bytes that the logs of running and finished streams hold."""
        return self._table.memory.used

    @property
    def hands_over(self) -> bool:
        """Whether a reader that leaves finds its stream on another instance, as far as it has got here."""
        return self._shared is not None and self._shared.trouble is None
