"""One upstream response, cut into numbered frames, published to one stream.

A chunk is relayed in the step of the event loop in which its socket gave it: parsed, numbered, logged and written to
every reader at the tail, without a task being woken. Where all readers are slow, the stream's gate closes and the
socket is not read any more; its small buffer fills, and TCP tells the upstream.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aisse.errors import LimitError, StreamError, UpstreamError
from aisse.formats.format import END, ERROR, PING, RESERVED, Mark
from aisse.sse import EventTooLargeError, Parser, RawEvent, data_of
from aisse.streams.deadlines import Deadlines
from aisse.streams.endings import Reason, failure
from aisse.streams.latch import Latch

if TYPE_CHECKING:
    from aisse.settings import Settings
    from aisse.streams.stream import Stream
    from aisse.upstream.body import Body
    from aisse.upstream.client import Upstream
    from aisse.upstream.connection import UpstreamResponse
    from aisse.upstream.question import Question

# After its terminal event an upstream has only the end of its body left to send. Waiting this long for it saves
# the connection for the next request.
_TAIL_S = 1.0


class Relay:
    """Runs one generation. `run` is one task's; the event loop calls `_receive` with what the socket gave.

    - Nothing that follows the end of its stream is relayed (test_events_after_the_terminal_event_are_not_relayed).
    - It ends exactly one stream, whatever the upstream does and whatever bug it meets
      (test_exception_in_one_relay_ends_that_stream_alone).
    - A stream that failed keeps nothing of its question (test_stream_that_failed_keeps_nothing_but_its_error).
    """

    __slots__ = (
        "_begun",
        "_bug",
        "_deadlines",
        "_follower",
        "_id_line",
        "_news",
        "_parser",
        "_question",
        "_response_body",
        "_settings",
        "_stream",
        "_upstream",
        "finished",
        "request_id",
    )

    def __init__(self, stream: Stream, upstream: Upstream, question: Question, settings: Settings) -> None:
        self.finished = False
        """Whether it has ended its stream by itself, and comes to its own end."""
        self.request_id: str | None = None
        """The upstream's name for the request, where it has said one."""
        self._stream = stream
        self._upstream = upstream
        self._question: Question | None = question
        self._settings = settings
        self._follower = upstream.format.follow(stream.usage)
        self._parser = Parser(settings.max_event_bytes)
        self._id_line = b"\nid: " + stream.id.encode() + b"."
        self._deadlines = Deadlines(stream, settings)
        self._response_body: Body | None = None
        self._begun = False
        self._bug: Exception | None = None
        self._news = Latch()  # for the task: what the event loop was given has changed what is to be done

    async def run(self) -> None:
        """Relays until the stream has ended, by whomever. Cancellation closes the upstream's connection at once.

        Whatever the upstream does ends as `error` and `end` in the stream; other exceptions are bugs, and leave.
        """
        assert self._question is not None
        try:
            response = await self._upstream.open(self._question)
        except UpstreamError as error:
            # The stream keeps its error; the frames that it came through would keep the request with it.
            error.__cause__ = error.__context__ = None
            self.request_id = error.request_id
            reason = Reason.TIMEOUT if error.status == 504 else Reason.ERROR
            self._finish(reason, error.with_traceback(None))
            return
        self.request_id = response.request_id
        try:
            await self._pump(response)
            await self._read_tail()
        finally:
            # Where the body was read to its end, the connection is back in the pool and neither does anything.
            response.raw_body.abort()
            response.close()

    def let_go(self) -> None:
        """The question is not needed any more: the answer has begun, or never will. Idempotent."""
        if self._question is not None and self._question.hold is not None:
            self._question.hold.release()
        self._question = None

    def _finish(self, reason: Reason, error: StreamError | None = None) -> None:
        self.finished = True
        self._stream.finish(reason, error)

    def overdue(self, now: float) -> UpstreamError | None:
        """What is said of the upstream's limit that has passed at `now`; None while none has. Asked once a second."""
        return self._deadlines.passed(now, self._response_body)

    async def _pump(self, response: UpstreamResponse) -> None:
        """Has every chunk relayed as it comes; waits for the end of the stream, and for slow readers."""
        stream = self._stream
        self._response_body = body = response.raw_body
        body.listen(response.content, self._receive, self._receive_end)
        while stream.reason is None:
            if self._bug is not None:
                raise self._bug
            if stream.holds_back:
                body.pause()
                try:
                    await stream.flow()
                finally:
                    body.resume()
            else:
                # `_receive` has paused it, and the readers have caught up before this task had its turn.
                body.resume()
                await self._news.wait()

    def _receive(self, chunk: bytes) -> None:
        stream = self._stream
        if stream.reason is not None or self._bug is not None:
            return
        try:
            self._publish(self._parser.feed(chunk))
        except EventTooLargeError as error:
            self._refuse_event(error)
        except Exception as error:
            # The event loop has called this and would blame the connection. The task raises it instead.
            self._bug = error
            self._news.open()
            return
        if stream.holds_back:
            # This is done at once and not when the task runs: by then the socket may have given more.
            assert self._response_body is not None
            self._response_body.pause()
            self._news.open()
        elif self._stream.reason is not None:
            self._news.open()

    def _receive_end(self) -> None:
        stream, body = self._stream, self._response_body
        assert body is not None
        try:
            if stream.reason is None and self._bug is None and body.whole:
                # Half of an event may look like a whole one where a server crashed.
                self._publish([event for event in self._parser.finish() if self._follower.is_whole(data_of(event[1]))])
                if self._follower.is_complete():
                    self._finish(Reason.COMPLETE)
        except Exception as error:
            self._bug = error
        if self._bug is None and stream.reason is None:
            self._finish(Reason.TRUNCATED, _broken_off(body))
        self._news.open()

    def _refuse_event(self, error: EventTooLargeError) -> None:
        self._publish(error.args[0])
        limit = self._settings.max_event_bytes
        self._finish(Reason.LIMIT, LimitError("limit_error", f"the upstream sent an event of over {limit} bytes"))

    def _publish(self, events: list[RawEvent]) -> None:
        stream = self._stream
        seq = stream.log.last_seq
        observe = self._follower.observe
        id_line = self._id_line
        frames: list[bytes] = []
        content = 0
        end: Mark | None = None
        body = b""
        for event_type, body in events:
            mark = observe(event_type, body)
            if mark is ERROR:
                end = mark
                break
            if mark is RESERVED:
                continue
            seq += 1
            frames.append(b"%b%b%d\n\n" % (body, id_line, seq))
            if mark is not PING:
                content += 1
            if mark is END:
                end = mark
                break
        stream.content_events += content
        if frames:
            stream.publish(frames[0] if len(frames) == 1 else b"".join(frames), seq)
            if content and not self._begun:
                self._begun = True
                self.let_go()
                stream.begin()
        if end is END:
            self._finish(Reason.COMPLETE)
        elif end is ERROR:
            self._finish(Reason.ERROR, self._upstream.failure(data_of(body)))

    async def _read_tail(self) -> None:
        body = self._response_body
        if self._stream.reason is not Reason.COMPLETE or body is None:
            return
        try:
            async with asyncio.timeout(_TAIL_S):
                while not body.ended:
                    await self._news.wait()
        except TimeoutError:
            pass  # the answer is complete; only the connection is lost


def _broken_off(body: Body) -> UpstreamError:
    cause = "ended without its last event" if body.whole else "connection lost in the middle of the answer"
    error = failure(Reason.TRUNCATED)
    assert error is not None
    return UpstreamError(error.kind, error.message, error.status, cause=cause)
