"""Every stream and every reader: admission, the relays' tasks, and one sweep a second over them.

The sweep is the only clock of running streams: heartbeats, stalled readers, streams that nobody reads, upstreams
that are late, retention. One task for all keeps an idle stream at two parked coroutines and no timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import structlog

from aisse.errors import DrainingError, KeyReusedError, RequestError, UnknownStreamError, UpstreamError
from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.streams.endings import Reason
from aisse.streams.latch import Latch
from aisse.streams.leave import LeaveTime
from aisse.streams.relay import Relay
from aisse.streams.stream import State, Stream
from aisse.telemetry.rate import Rate
from aisse.upstream.question import Bodies

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aisse.formats.format import Format
    from aisse.settings import Settings
    from aisse.streams.reader import Reader
    from aisse.streams.shared import Shared
    from aisse.upstream.client import Upstream
    from aisse.upstream.question import Question

Key = tuple[bytes, str]
"""Whose Idempotency-Key (a digest of the access token, empty without) and the key itself."""

OpenShared = Callable[["Settings", ReplayMemory, "Format"], "Shared"]

SWEEP_S = 1.0

# What a finished stream takes beside its frames: 1.7 KB as tracemalloc counts it, 1.9 KB of resident memory. Uncounted,
# a crowd of tiny answers would take several times replay_bytes.
KEPT_BYTES = 2 << 10

# How many streams the sweep looks at before other tasks get a turn: it delays no token by more than that.
_SWEEP_BATCH = 100

# How long the shared log may take for the last events at shutdown.
_SHARED_S = 0.3

# Loop lag above this, and so many failures in a row, make the service `degraded`.
_LAG_S = 0.5
_FAILURES = 5

_NOT_FAILED = frozenset({Reason.COMPLETE, Reason.STOPPED, Reason.ABANDONED})

_log = structlog.get_logger("aisse.registry")


class Registry:
    """Owns the streams. `start` and `close` bracket its life; everything between runs on one event loop."""

    def __init__(self, settings: Settings, upstream: Upstream, open_shared: OpenShared | None = None) -> None:
        """`open_shared` is there where the log is shared."""
        self._settings = settings
        self._upstream = upstream
        self._memory = ReplayMemory(settings.replay_bytes)
        self.bodies = Bodies(settings.bodies_bytes)
        """The memory of questions whose answers have not begun."""
        self._shared = open_shared(settings, self._memory, upstream.format) if open_shared is not None else None
        # One a key, for as long as somebody waits.
        self._claiming: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()
        self._closing = asyncio.Lock()
        self._running: dict[str, Stream] = {}
        self._finished: OrderedDict[str, Stream] = OrderedDict()  # oldest end first
        self._keys: dict[Key, tuple[Stream, bytes]] = {}
        self._readers: set[Reader] = set()
        self._unanswered = 0
        self._relays: dict[str, tuple[Relay, asyncio.Task[None]]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self.draining = False
        """No stream is started any more."""
        self._idle = Latch()
        self.generations = 0
        self.failed = 0
        self._output_tokens = 0  # of streams that have ended
        self.loop_lag_s = 0.0
        self._failures_in_a_row = 0
        self._failing_since = 0.0  # seconds since 1970, of the first in a row
        self._failing_because = ""  # the last one's cause
        self._content_events = 0  # of streams that have ended
        self._rate = Rate(span_s=10)

    async def start(self) -> None:
        """Starts the sweep. Raises ConfigError where the shared log is not ours to use."""
        if self._shared is not None:
            await self._shared.start(self._running, self)
        self._sweeper = asyncio.create_task(self._sweep_for_ever(), name="registry sweep")

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
        for stream in list(self._running.values()):
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
            # One that is in trouble is not waited for: the process is to be gone in time.
            if shared.runs and not await shared.settled(_SHARED_S if shared.trouble is None else 0.0):
                _log.warning("the shared log has not got everything", streams=shared.behind)
            await shared.close()

    async def settled(self, within_s: float) -> bool:
        """Whether nothing is left to be shared, now or `within_s`. One caller at a time.

        With a shared log in trouble nothing is: readers elsewhere could not be reached however long that took.
        """
        return not self.hands_over or (self._shared is not None and await self._shared.settled(within_s))

    # --- streams ----------------------------------------------------------------------------------------------

    def get(self, stream_id: str) -> Stream | None:
        """The stream of that id that runs or is retained here."""
        return self._running.get(stream_id) or self._finished.get(stream_id)

    async def find(self, stream_id: str) -> Stream:
        """The stream of that id, here or elsewhere. Raises UnknownStreamError, or LogUnavailableError: nobody knows."""
        # Looked for again where it was forgotten between its coming and this task's turn, for room or its time's sake:
        # who gets it attaches a reader before anybody else gets a turn.
        while (stream := self._here(stream_id)) is None:
            if self._shared is None or not await self._shared.bring(stream_id):
                raise UnknownStreamError
        return stream

    def _here(self, stream_id: str) -> Stream | None:
        stream = self.get(stream_id)
        if stream is None and self._shared is not None:
            stream = self._shared.followed(stream_id)
        return stream

    async def stop(self, stream_id: str) -> None:
        """Somebody asked for it. Idempotent, also for a stream that has ended. Raises as `find` does."""
        if (stream := self._running.get(stream_id)) is not None:
            stream.finish(Reason.STOPPED)
        elif stream_id not in self._finished and not (
            self._shared is not None and await self._shared.ask_to_stop(stream_id)
        ):
            raise UnknownStreamError

    async def create_once(self, key: Key, question: Question, leave_s: float) -> Stream:
        """As `create`, but once for a key, on all instances: the same key gets the stream that it started.

        A key is remembered for as long as its stream is. Raises RequestError (422) for one that came with another
        question, as their digests say, and LogUnavailableError where nobody knows. Where the log is not shared, or the
        stream is from here, nothing waits in here, so that of two requests that race the second finds the first's
        stream. Else one waits for the other if they have the same key. Cancelling it leaves the key to the next.
        """
        digest = question.digest
        if (stream := self._known(key, digest)) is not None:
            return stream
        if self._shared is None:
            return self._create_for(key, question, leave_s)
        claiming = self._claiming.setdefault(key, asyncio.Lock())
        while True:
            async with claiming:
                if (stream := self._known(key, digest)) is not None:
                    return stream
                self.admit()
                claimed, holder = await self._shared.claim(key, digest)
                if holder is None:
                    raise KeyReusedError
                if holder == claimed:
                    try:
                        return self._create_for(key, question, leave_s, claimed)
                    except BaseException:
                        self._shared.renounce(claimed, key)
                        raise
            with contextlib.suppress(UnknownStreamError):
                return await self.find(holder)
            # It was refused meanwhile, and has left the key to whoever comes next.

    def _known(self, key: Key, digest: bytes) -> Stream | None:
        if (known := self._keys.get(key)) is None:
            return None
        if known[1] != digest:
            raise KeyReusedError
        return known[0]

    def _create_for(self, key: Key, question: Question, leave_s: float, stream_id: str | None = None) -> Stream:
        stream = self.create(question, leave_s, stream_id, (key, question.digest))
        stream.key = key
        self._keys[key] = stream, question.digest
        return stream

    def create(
        self, question: Question, leave_s: float, stream_id: str | None = None, claim: tuple[Key, bytes] | None = None
    ) -> Stream:
        """Starts a generation for `question`; `stream_id` and `claim` are those of a claimed key.

        The question's share of `bodies` is the relay's from then on, until the answer begins or the stream ends.
        Raises RequestError (503) where there is no room.
        """
        self.admit()
        if len(self._running) >= self._settings.max_streams:
            raise RequestError(503, "overloaded_error", "too many answers are being generated", retry_after_s=5)
        self.need_room()
        if stream_id is None:
            # 128 bits from the system: whoever has the id may read the stream, nobody may guess it.
            stream_id = secrets.token_urlsafe(16)
        stream = Stream(
            stream_id,
            self._shared.log(stream_id, claim) if self._shared is not None else MemoryLog(stream_id, self._memory),
            now=asyncio.get_running_loop().time(),
            # One more read of the socket may bring what the kernel holds: twice SO_RCVBUF, socket(7).
            read_ahead_bytes=max(
                self._settings.read_ahead_bytes // 2,
                self._settings.read_ahead_bytes - 2 * self._settings.receive_buffer_bytes,
            ),
            stream_bytes=self._settings.stream_bytes,
            leave=LeaveTime(leave_s, self._shared.leave_grace_s if self._shared is not None else 0.0),
            on_left=self._left,
            on_end=self._ended,
        )
        relay = Relay(stream, self._upstream, question, self._settings)
        if question.hold is not None:
            question.hold.taken_over = True
        task = asyncio.create_task(relay.run(), name=f"relay {stream_id[:8]}")
        self._running[stream_id] = stream
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
        return bool(self._running or self._readers or self._unanswered)

    def _tell_idle(self) -> None:
        if not self._busy:
            self._idle.open()

    def keep(self, stream: Stream) -> None:
        """A stream from elsewhere has ended, and is kept like those from here."""
        self._finished[stream.id] = stream
        self._memory.used += KEPT_BYTES

    def _left(self, stream: Stream) -> None:
        # With no leave time the upstream is cancelled now, not at the next sweep.
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
        del self._running[stream.id]
        reason = stream.reason
        assert reason is not None
        assert stream.ended is not None
        self._output_tokens += stream.usage["output_tokens"]
        self._content_events += stream.content_events
        if reason not in _NOT_FAILED:
            self.failed += 1
        error = stream.error
        cause = error.cause if isinstance(error, UpstreamError) else None
        if reason in {Reason.ERROR, Reason.TRUNCATED, Reason.TIMEOUT}:
            # 4xx are the request's fault and say nothing about the upstream's health.
            if not (isinstance(error, UpstreamError) and error.status < 500):
                self._failing(stream, cause)
        elif reason is Reason.COMPLETE:
            self._failures_in_a_row = 0
        if stream.refusal is None:
            self._finished[stream.id] = stream
            self._memory.used += KEPT_BYTES
        else:
            # Nobody here was ever told its id; its key may be tried again.
            if self._shared is not None:
                self._shared.withdraw(stream)
            self._release(stream)
        if self._shared is not None:
            self._shared.nobody_elsewhere(stream)
        relay, task = self._relays.get(stream.id, (None, None))
        if relay is not None and task is not None and not relay.finished:
            task.cancel()  # whoever ended it, nothing is generated that nobody gets
        _log.info(
            "stream ended",
            stream_id=stream.id[:8],
            reason=reason.value,
            events=stream.events,
            stream_bytes=stream.log.tail,
            readers=stream.readers,
            duration_s=round(stream.ended - stream.created, 3),
            error_type=error.kind if error is not None else None,
            upstream_status=error.upstream_status if isinstance(error, UpstreamError) else None,
            upstream_error=cause,
            upstream_request_id=relay.request_id if relay is not None else None,
            **stream.usage,
        )
        self._tell_idle()

    def _failing(self, stream: Stream, cause: str | None) -> None:
        assert stream.ended_at is not None
        if not self._failures_in_a_row:
            self._failing_since = stream.ended_at
        self._failures_in_a_row += 1
        self._failing_because = cause or "for a reason inside this server"

    # --- memory -----------------------------------------------------------------------------------------------

    def need_room(self) -> None:
        """Raises RequestError (503) where there is no room for another stream, whatever is forgotten for it."""
        if not self._make_room():
            raise RequestError(503, "overloaded_error", "the memory for answers is full", retry_after_s=5)

    def _make_room(self) -> bool:
        """Forgets finished streams, oldest end first, while the bound is exceeded; readers at work keep theirs."""
        memory = self._memory
        if memory.used < memory.limit:
            return True
        while (oldest := next((stream for stream in self._finished.values() if stream.readers == 0), None)) is not None:
            self._forget(oldest)
            if memory.used < memory.limit:
                return True
        return False

    def _forget(self, stream: Stream) -> None:
        del self._finished[stream.id]
        self._memory.used -= KEPT_BYTES
        self._release(stream)

    def _release(self, stream: Stream) -> None:
        stream.log.discard()
        if stream.key is not None:
            self._keys.pop(stream.key, None)
        if self._shared is not None:
            self._shared.released(stream.id)

    # --- the sweep --------------------------------------------------------------------------------------------

    async def _sweep_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            # From due time to due time, for the sweep's own length would add up; times that were missed are skipped.
            due += SWEEP_S * max(1, math.ceil((loop.time() - due) / SWEEP_S))
            await asyncio.sleep(due - loop.time())
            self.loop_lag_s = max(0.0, loop.time() - due)
            try:
                await self._sweep()
            except Exception:
                # It guards each record by itself; this is for what is left, and must not stop all heartbeats for ever.
                _log.exception("sweep failed")

    async def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        settings = self._settings
        for count, reader in enumerate(list(self._readers), 1):
            self._sweep_reader(reader, now)
            if count % _SWEEP_BATCH == 0:
                await asyncio.sleep(0)
        for count, stream in enumerate(list(self._running.values()), 1):
            self._sweep_stream(stream, now)
            if count % _SWEEP_BATCH == 0:
                await asyncio.sleep(0)
        if self._shared is not None:
            self._shared.sweep(now)
        self._make_room()
        for stream in list(self._finished.values()):
            assert stream.ended is not None
            if now - stream.ended < settings.retention_s:
                break
            if stream.readers == 0:
                self._forget(stream)
        self._rate.sample(now, self._content_events + sum(stream.content_events for stream in self._running.values()))

    def _sweep_reader(self, reader: Reader, now: float) -> None:
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

    def _sweep_stream(self, stream: Stream, now: float) -> None:
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

    # --- what operators see -----------------------------------------------------------------------------------

    @property
    def output_tokens(self) -> int:
        """Output tokens of all generations, as the upstream has reported them so far."""
        return self._output_tokens + sum(stream.usage["output_tokens"] for stream in self._running.values())

    @property
    def active_streams(self) -> int:
        """Generations that run now."""
        return len(self._running)

    @property
    def readers(self) -> int:
        """Requests that read a stream now."""
        return len(self._readers)

    @property
    def replay_bytes(self) -> int:
        """Bytes that the logs of running and finished streams hold."""
        return self._memory.used

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait for readers' sockets."""
        return sum(reader.buffered_bytes for reader in self._readers)

    def stalls(self) -> tuple[int, float]:
        """How many readers have not taken a byte for longer than a sweep, and the longest such time in seconds."""
        now = asyncio.get_running_loop().time()
        stalled = [seconds for reader in self._readers if (seconds := reader.stalled_for(now)) > SWEEP_S]
        return len(stalled), max(stalled, default=0.0)

    def tokens_per_second(self) -> float:
        """Content events relayed a second, over the last ten seconds: most of them carry about one token."""
        return self._rate.per_s

    def troubles(self) -> list[str]:
        """What makes the service `degraded`, in words for operators; empty while it is healthy."""
        troubles = []
        if self.loop_lag_s > _LAG_S:
            troubles.append(f"the event loop is {self.loop_lag_s * 1000:.0f} ms late")
        if self._failures_in_a_row >= _FAILURES:
            since = datetime.fromtimestamp(self._failing_since, UTC).isoformat(timespec="seconds")
            troubles.append(
                f"the last {self._failures_in_a_row} answers of the upstream failed, "
                f"since {since.replace('+00:00', 'Z')}, the last one: {self._failing_because}"
            )
        if len(self._running) >= self._settings.max_streams:
            troubles.append("max_streams is reached; new streams get 503")
        if self._memory.used >= self._memory.limit and not any(s.readers == 0 for s in self._finished.values()):
            troubles.append("replay_bytes is reached; new streams get 503")
        if self._shared is not None and (trouble := self._shared.trouble) is not None:
            troubles.append(f"{trouble}; {self._shared.behind} streams are not up to date for other instances")
        return troubles

    @property
    def hands_over(self) -> bool:
        """Whether a reader that leaves finds its stream on another instance, as far as it has got here."""
        return self._shared is not None and self._shared.trouble is None
