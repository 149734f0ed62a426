"""The body of an upstream's response, given out in the same step of the event loop in which the socket gave it.

aiohttp reads a body through a StreamReader. For each chunk that takes a future, a wake-up, a task switch and a second
look at its parser, which together cost more than all that the relay does with the chunk. So a Body stands between the
socket and aiohttp's protocol. The head passes through to aiohttp, which owns requests, connections and errors. If the
response is a chunked event stream, the chunks are taken off here (RFC 9112, section 7.1), and aiohttp gets only the
end, so that it has its connection back. Every other body goes through aiohttp's parser, and from there to the same
listener.
"""

from __future__ import annotations

import asyncio
import enum
import re
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_HEAD_BYTES = 64 << 10
_TLS_READ_BYTES = 16 << 10
_EVENT_STREAM = re.compile(rb"\r?\ncontent-type:[ \t]*text/event-stream[ \t]*[;\r\n]", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r?\ntransfer-encoding:[ \t]*chunked[ \t]*\r?\n", re.IGNORECASE)
_FRAMED = re.compile(rb"\r?\n(?:content-length:|transfer-encoding:[^\r\n]*chunked)", re.IGNORECASE)
_CODED = re.compile(rb"\r?\ncontent-encoding:(?![ \t]*identity[ \t]*\r?\n)", re.IGNORECASE)

# Eight digits are enough for any chunk that fits into memory. An extension (after the semicolon) means nothing to us.
_SIZE_LINE = re.compile(rb"0*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
_SIZE_LINE_BYTES = 4 << 10
_LAST_CHUNK = b"0\r\n\r\n"
_HEX_DIGITS = b"0123456789abcdefABCDEF"


class _State(enum.Enum):
    HEAD = enum.auto()  # nothing known yet
    PLAIN = enum.auto()  # everything goes through aiohttp
    SIZE = enum.auto()  # a chunk's size line is next
    DATA = enum.auto()  # inside a chunk
    DATA_END = enum.auto()  # the line end after a chunk's data
    TRAILER = enum.auto()  # after the last chunk


# To look a member up in its enum would take longer than anything else that is done for a chunk.
_HEAD, _PLAIN, _SIZE, _DATA, _DATA_END, _TRAILER = _State


class Body(asyncio.Protocol):
    """Stands in front of aiohttp's protocol, as the connection's protocol, until the body has ended.

    It is made before the first byte of the response is read. `size` counts the bytes that were given out. `begun` says
    that a byte of the response has come (one of an interim response counts), `ended` that no more will come, and
    `whole` that none is missing.

    - How the bytes are cut makes no difference: test_any_spelling_in_any_cut_is_what_a_plain_dechunker_says.
    - A body that was damaged is never whole: test_any_damage_in_any_cut_is_what_a_plain_dechunker_says,
      test_body_is_whole_where_its_framing_says_so_and_nothing_else.
    - After its end it touches the connection no more, which may be another response's by then:
      test_late_end_of_one_body_leaves_the_next_ones_in_place.
    - While it is paused, the rest stays in the kernel: test_paused_body_leaves_bytes_in_the_kernel_until_resumed,
      test_reading_ahead_of_a_pause_is_bounded_over_tls.
    """

    __slots__ = (
        "_content",
        "_early",
        "_left",
        "_on_data",
        "_on_end",
        "_protocol",
        "_reset",
        "_rest",
        "_state",
        "_transport",
        "_until_close",
        "begun",
        "ended",
        "size",
        "whole",
    )

    def __init__(self, connection: Connection) -> None:
        transport, protocol = connection.transport, connection.protocol
        assert transport is not None
        assert protocol is not None
        self.size = 0
        self.begun = False
        self.ended = False
        self.whole = False
        self._transport: asyncio.Transport = transport
        # Over TLS, a pause only stops what is given to us. This bounds what is read ahead of that.
        set_limits = getattr(transport, "set_read_buffer_limits", None)
        if set_limits is not None:
            set_limits(high=_TLS_READ_BYTES)
        self._protocol: ResponseHandler = protocol
        self._state = _HEAD
        self._rest = b""  # not yet understood: part of a head, a line or a line end
        self._left = 0  # bytes that the chunk still has
        self._until_close = False  # the body ends where the connection does (RFC 9112, section 6.3)
        self._reset = False
        self._early: list[bytes] = []  # given out before anybody listened
        self._content: aiohttp.StreamReader | None = None
        self._on_data: Callable[[bytes], None] | None = None
        self._on_end: Callable[[], None] | None = None
        transport.set_protocol(self)

    def listen(
        self, content: aiohttp.StreamReader, on_data: Callable[[bytes], None], on_end: Callable[[], None]
    ) -> None:
        """Calls `on_data` with every piece of the body, beginning with what has come already, then `on_end` once.

        Both are called by the event loop and must not raise. `content` is the response's own.
        """
        self._content = content
        self._on_data = on_data
        self._on_end = on_end
        early, self._early = b"".join(self._early), []
        if early:
            on_data(early)
        ended = self.ended
        if self._state is _PLAIN:
            self._hand_out_plain()
        if ended:
            on_end()

    def pause(self) -> None:
        """Stops reading the socket. What the upstream sends stays in the kernel, and then with the upstream."""
        if not self.ended:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Reads the socket again."""
        if not self.ended and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Cuts the connection at once, unless the body has ended.

        To close it would mean to wait: for the upstream to take what is left of the request, and over TLS for its
        goodbye.
        """
        if not self.ended and self._transport.get_protocol() is self:
            self._transport.abort()

    # --- asyncio.Protocol -------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Takes what the socket gave. It must not raise: the loop would close the connection."""
        state = self._state
        if state is _SIZE and not self._rest and self._on_data is not None:
            # An upstream that writes event by event sends one whole chunk at a time.
            start = data.find(b"\r\n", 1, 9) + 2
            digits = data[: start - 2]
            if data.endswith(b"\r\n") and not digits.translate(None, _HEX_DIGITS):
                size = int(digits, 16)
                if size and start + size + 2 == len(data):
                    self.size += size
                    self._on_data(data[start:-2])
                    return
        if state is _HEAD:
            self._read_head(data)
        elif state is _PLAIN:
            self._protocol.data_received(data)
            self._hand_out_plain()
        else:
            self._read_chunks(data)

    def eof_received(self) -> None:
        """The upstream sends no more. The loop closes the connection, so the upstream gets no more either."""
        self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._reset = exc is not None
        self._protocol.connection_lost(exc)
        if self._state is _PLAIN:
            self._hand_out_plain()
            if self._content is None:
                return  # aiohttp keeps what has come until somebody listens
        self._end()

    def pause_writing(self) -> None:
        """The request's body waits for the upstream."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """The request's body may go on."""
        self._protocol.resume_writing()

    # --- the head ---------------------------------------------------------------------------------------------

    def _read_head(self, data: bytes) -> None:
        self.begun = True
        data = self._rest + data
        self._rest = b""
        while True:
            end = _HEAD_END.search(data)
            if not data.startswith(b"HTTP/1."[: len(data)]) or (end is None and len(data) > _HEAD_BYTES):
                break  # aiohttp will say what is wrong with this
            if end is None:
                self._rest = data
                return
            head, rest = data[: end.end()], data[end.end() :]
            if head[9:10] == b"1":  # an interim response (RFC 9110, section 15.2); the real one follows
                self._protocol.data_received(head)
                data = rest
                continue
            if (
                head[9:12] == b"200"
                and _EVENT_STREAM.search(head)
                and _CHUNKED.search(head)
                and not _CODED.search(head)
            ):
                self._state = _SIZE
                self._protocol.data_received(head)
                if rest:
                    self._read_chunks(rest)
                return
            self._until_close = _FRAMED.search(head) is None
            break
        self._state = _PLAIN
        self._protocol.data_received(data)
        self._hand_out_plain()

    # --- a body through aiohttp -------------------------------------------------------------------------------

    def _hand_out_plain(self) -> None:
        content = self._content
        if content is None:
            return
        broken = False
        try:
            data = content.read_nowait()
        except (aiohttp.ClientError, OSError):
            # After a reset it raises before it gives out the bytes that had arrived.
            broken = True
            data = content._read_nowait(-1)  # noqa: SLF001 - no public method gives these bytes; a test pins this one
        if not broken and not content.at_eof():
            self._hand_out(data)
            return
        # At the end aiohttp already has the connection back. What the last piece leads to must not touch it.
        on_end, self._on_end = self._on_end, None
        # aiohttp takes a connection that was reset for one that was closed, and its body for whole. Over TLS, an end
        # without a close_notify counts as clean: uvloop does not tell, and many servers end so.
        self._end(whole=not broken and not (self._until_close and self._reset))
        self._hand_out(data)
        if on_end is not None:
            on_end()

    # --- a chunked body ---------------------------------------------------------------------------------------

    def _read_chunks(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        state = self._state
        position, size = 0, len(data)
        pieces: list[bytes] = []
        while position < size:
            if state is _SIZE:
                line = _SIZE_LINE.match(data, position)
                if line is None:
                    if size - position > _SIZE_LINE_BYTES or b"\n" in data[position:]:
                        self._break(pieces)
                        return
                    break
                position = line.end()
                self._left = int(line[1], 16)
                state = _DATA if self._left else _TRAILER
            elif state is _DATA:
                piece = data[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                if not self._left:
                    state = _DATA_END
            elif state is _DATA_END:
                if not data.startswith(b"\r\n"[: size - position], position):
                    self._break(pieces)
                    return
                if size - position < 2:
                    break
                position += 2
                state = _SIZE
            else:
                end = position if data.startswith(b"\r\n", position) else data.find(b"\r\n\r\n", position) + 2
                if end == 1:
                    if size - position > _HEAD_BYTES:
                        self._break(pieces)
                        return
                    break
                self._hand_out(b"".join(pieces))
                self._give_back(data[end + 2 :])
                return
        self._rest = data[position:]
        self._state = state
        if pieces:
            self._hand_out(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _give_back(self, rest: bytes) -> None:
        """The body is whole. aiohttp takes its connection back into the pool, or closes it if more bytes follow."""
        self._transport.set_protocol(self._protocol)
        self._protocol.data_received(_LAST_CHUNK + rest)
        self._cut_if_unsent()
        self._end(whole=True)

    def _break(self, pieces: list[bytes]) -> None:
        """The chunks make no sense, and nothing that follows can be trusted."""
        self._hand_out(b"".join(pieces))
        self._transport.abort()
        self._end()

    # --- both -------------------------------------------------------------------------------------------------

    def _hand_out(self, data: bytes) -> None:
        if not data:
            return
        self.size += len(data)
        if self._on_data is not None:
            self._on_data(data)
        else:
            self._early.append(data)

    def _cut_if_unsent(self) -> None:
        """Cuts the connection if part of the question is unsent. A close would wait for the upstream to read it."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()

    def _end(self, *, whole: bool = False) -> None:
        if self.ended:
            return
        self.ended = True
        self.whole = whole
        # By now the connection may belong to another response, with a Body of its own.
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._protocol)
            self._cut_if_unsent()
        if self._on_end is not None:
            self._on_end()
