"""Connections to the upstream that are used again, and what becomes of a question that met the close of one.

An upstream may close an idle connection at any time, also in the moment in which a question leaves (RFC 9112, section
9.3.1). aiohttp alone cannot say whether a request that failed met such a close, and may be sent again, or whether the
upstream may have begun to answer it, and to bill it. These extensions of its request, connector and response can.
"""

from __future__ import annotations

import asyncio
import select
from typing import TYPE_CHECKING, Any

import aiohttp

from aisse.upstream.body import Body
from aisse.upstream.question import Pieces, Question

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection

# A request on a reused connection that fails this soon after it was sent met the connection's close: an upstream that
# had read the request would have answered it. A request that fails later may have been generated, and billed.
_CLOSING_S = 1.0

# When no more than this is written, the kernel as good as always has it at once.
_AT_ONCE_BYTES = 64 << 10


class Sending(Pieces):
    """A question on its way, and whether it may be sent again.

    It may if it met the close of an idle connection. It may not on any doubt, since it would be billed twice:
    test_question_on_a_fresh_connection_is_never_asked_again, test_question_that_waited_too_long_is_not_asked_again,
    test_question_that_got_a_byte_of_an_answer_is_not_asked_again.
    """

    def __init__(self, question: Question) -> None:
        super().__init__(question.pieces)
        self._sent: float | None = None
        self.reused = False
        """Whether its connection had carried an answer before."""
        self.answered = False
        """Whether a byte of an answer has come, or of an interim one. If so, the upstream has read the request."""

    def met_a_close(self) -> bool:
        """Whether the request, which has failed, met the close of an idle connection."""
        if not self.reused or self.answered:
            return False
        return self._sent is None or asyncio.get_running_loop().time() - self._sent <= _CLOSING_S

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Writes the question to the connection, and notes when it has left."""
        await super().write(writer)
        assert self._size is not None
        if self._size > _AT_ONCE_BYTES:
            await _written(writer)
        self._sent = asyncio.get_running_loop().time()


async def _written(writer: AbstractStreamWriter) -> None:
    """Returns once the kernel has everything that was written, or the connection is lost."""
    transport = writer.transport
    if transport is None:
        return
    # Not 0: over TLS, a connection with nothing to write would count as full.
    transport.set_write_buffer_limits(high=1, low=0)
    try:
        await writer.drain()
    finally:
        transport.set_write_buffer_limits()


class Request(aiohttp.ClientRequest):
    """A request that tells its body whether its connection is fresh."""

    fresh = False

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Begins to send the request."""
        sending = self.body
        assert isinstance(sending, Sending)
        sending.reused = not self.fresh
        response = await super().send(conn)
        assert isinstance(response, UpstreamResponse)
        response.sending = sending
        return response


class Connector(aiohttp.TCPConnector):
    """Looks at a connection before it is used again, and tells requests whether theirs is fresh."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._poll = select.poll()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's
    ) -> Connection:
        """Gives a connection that is open, as far as this machine knows by now."""
        while True:
            connection = await super().connect(req, traces, timeout)
            if getattr(req, "fresh", True) or self._is_idle(connection.protocol):
                return connection
            connection.close()

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's
    ) -> ResponseHandler:
        if isinstance(req, Request):
            req.fresh = True
        return await super()._create_connection(req, traces, timeout)

    def _is_idle(self, protocol: ResponseHandler | None) -> bool:
        """Whether nothing has come. What comes while no question is asked is the end, or an answer to none."""
        if protocol is None or protocol.transport is None or protocol.should_close:
            return False
        descriptor = protocol.transport.get_extra_info("socket").fileno()
        if descriptor < 0:
            return False
        # The loop has not looked since it last slept, and may have handled a hundred questions meanwhile.
        self._poll.register(descriptor, select.POLLIN)
        try:
            return not self._poll.poll(0)
        finally:
            self._poll.unregister(descriptor)


class UpstreamResponse(aiohttp.ClientResponse):
    """A response whose body is given out as it comes, by `raw_body`."""

    raw_body: Body
    sending: Sending | None = None
    request_id: str | None = None

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Puts the Body in place before the first byte of the response is read."""
        # Not kept: the answer may go on for an hour, and the question may be large.
        sending, self.sending = self.sending, None
        protocol = connection.protocol
        if protocol is None or protocol.should_close:
            # Something came that nobody had asked for. aiohttp would take it for this answer.
            raise aiohttp.ServerDisconnectedError
        self.raw_body = Body(connection)
        try:
            return await super().start(connection)
        except BaseException:
            if sending is not None:
                sending.answered = self.raw_body.begun
            self.raw_body.abort()
            raise
