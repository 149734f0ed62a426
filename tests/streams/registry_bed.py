"""A registry in front of an upstream that says nothing, and readers that are none."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from aisse.errors import UpstreamError
from aisse.formats.anthropic import Anthropic
from aisse.settings import Settings
from aisse.sse import frame
from aisse.streams.endings import Reason
from aisse.streams.registry import Registry
from aisse.upstream.client import Upstream
from aisse.upstream.question import Question

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aisse.streams.stream import Stream
    from aisse.upstream.connection import UpstreamResponse

NOWHERE = "http://127.0.0.1:9"


class SilentUpstream(Upstream):
    """Never answers. `waiting` is how many requests wait for it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(NOWHERE, settings, Anthropic(settings))
        self.waiting = 0

    async def open(self, question: Question) -> UpstreamResponse:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        raise AssertionError


class FailingUpstream(SilentUpstream):
    """Has a bug in it for the body `bug`, refuses `refuse`, and is silent for every other."""

    async def open(self, question: Question) -> UpstreamResponse:
        body = question.pieces[0]
        if body == b"bug":
            raise KeyError("a bug")
        if body == b"refuse":
            raise UpstreamError("invalid_request_error", "no", 400, None, 400)
        if body == b"fail":
            raise UpstreamError("api_error", "failed", 502, None, 500)
        return await super().open(question)


class Attached:
    """A reader at the tail, as far as a stream knows."""

    def __init__(self, stream: Stream) -> None:
        self.position = 0
        self.got = b""
        self._stream = stream
        stream.attach(self)
        stream.catch_up(self)

    def push(self, frames: bytes) -> bool:
        self.got += frames
        return True

    def wake(self) -> None:
        pass

    def leave(self) -> None:
        self._stream.detach(self)


class Bed:
    """A registry in front of an upstream that does not answer: streams that do what the test says."""

    def __init__(self, kind: type[SilentUpstream], **settings: Any) -> None:
        self.settings = Settings.model_validate({"upstream": NOWHERE, **settings})
        self.upstream = kind(self.settings)
        self.registry = Registry(self.settings, self.upstream)

    def create(self, body: bytes = b"{}", leave_s: float = 60.0) -> Stream:
        return self.registry.create(Question([body]), leave_s)

    def finished(self, size: int = 1000) -> Stream:
        """A stream of at least `size` bytes that is complete."""
        stream = self.create()
        publish(stream, size)
        stream.finish(Reason.COMPLETE)
        return stream

    @property
    def kept(self) -> list[Stream]:
        """Finished streams that can still be read again, oldest end first."""
        return list(self.registry._table.kept.values())


def goes_on(stream: Stream) -> bool:
    return stream.reason is None


def publish(stream: Stream, size: int = 1000) -> None:
    stream.begin()
    seq = stream.log.last_seq + 1
    stream.publish(frame("content_block_delta", "x" * size, f"{stream.id}.{seq}"), seq)


@contextlib.asynccontextmanager
async def bed(kind: type[SilentUpstream] = SilentUpstream, **settings: Any) -> AsyncIterator[Bed]:
    bed = Bed(kind, **settings)
    await bed.registry.start()
    try:
        yield bed
    finally:
        await bed.registry.close()


def sweeps(registry: Registry) -> Callable[[int], Callable[[], bool]]:
    """Gives conditions: so many whole sweeps have ended since this call."""
    loop = asyncio.get_running_loop()
    since = loop.time()

    def ended(count: int) -> Callable[[], bool]:
        return lambda: sum(at > since for at, _ in registry.figures._rate._samples) >= count

    return ended
