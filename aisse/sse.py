"""Server-Sent Events: bytes to events, events to frames, and where one frame ends. No I/O and no clock.

The grammar is WHATWG HTML, section 9.2.6 "Interpreting an event stream": lines end at LF, CRLF or CR and
nowhere else (`str.splitlines` would also split at U+2028), one leading BOM is dropped, a blank line dispatches,
an event without data is none, and what follows the last blank line is discarded at the end of the stream: `finish`
alone reads on, where the body is known to be whole.
"""

from __future__ import annotations

import re

HEARTBEAT = b": heartbeat\n"
"""One line and no blank line after it: clients hand an empty message to the page for a comment that is closed."""

_BOM = b"\xef\xbb\xbf"

RawEvent = tuple[bytes, bytes]
"""An event's type (empty where none was named) and its `event:` and `data:` lines: LF between, none at the end."""


class EventTooLargeError(ValueError):
    """One event is longer than the bound given to the parser."""


class Parser:
    """Cuts a byte stream into events, however it was split. Holds at most `max_event_bytes` plus one chunk."""

    __slots__ = ("_after_cr", "_carry", "_max", "_started")

    def __init__(self, max_event_bytes: int) -> None:
        self._max = max_event_bytes
        self._carry = bytearray()
        self._after_cr = False
        self._started = False

    def feed(self, chunk: bytes) -> list[RawEvent]:
        """Events that `chunk` completes, in order. Their `id:`, `retry:`, comments and unknown fields are gone.

        Raises EventTooLargeError when one event, comments included, exceeds the bound; the events before it in
        the same chunk are in its `args[0]`. The parser must not be fed again after that.
        """
        if not self._started:
            chunk = self._skip_bom(chunk)
        if self._after_cr or b"\r" in chunk:
            chunk = self._to_lf(chunk)
        carry = self._carry
        if carry:
            # Searching only what is new keeps a large event that comes byte by byte linear.
            start = len(carry) - 1
            carry += chunk
            if carry.find(b"\n\n", start) < 0:
                self._check_rest([])
                return []
            chunk = bytes(carry)
            carry.clear()

        events: list[RawEvent] = []
        limit = self._max
        pos = 0
        while (end := chunk.find(b"\n\n", pos)) >= 0:
            if end - pos > limit:
                self._check(end - pos, events)
            block = chunk[pos:end]
            pos = end + 2
            newline = block.find(b"\n")
            # Nearly every event of every LLM API looks like this, and passes through as it is.
            if (
                block.startswith(b"event: ")
                and block.startswith(b"data: ", newline + 1)
                and newline > 0
                and block.find(b"\n", newline + 1) < 0
            ):
                events.append((block[7:newline], block))
            elif (event := _parse_block(block)) is not None:
                events.append(event)
        if pos < len(chunk):
            carry += chunk[pos:]
            self._check_rest(events)
        return events

    def finish(self) -> list[RawEvent]:
        """The event that the end of the body ends in place of a blank line, if there is one. Nothing is fed after it.

        WHATWG has it discarded, since a browser cannot tell a body that is whole from one that was cut, and so cannot
        know that its last line is. Who calls this can: many servers leave the last blank line, or line end, out, and
        what they lose by it is the event that says that the answer is complete.
        """
        block = bytes(self._carry).removesuffix(b"\n") if self._started else b""
        self._carry.clear()
        event = _parse_block(block)
        return [event] if event is not None else []

    def _check_rest(self, events: list[RawEvent]) -> None:
        # A last LF may be half of what ends the event: it counts once something else follows.
        self._check(len(self._carry) - self._carry.endswith(b"\n"), events)

    def _check(self, size: int, events: list[RawEvent]) -> None:
        if size > self._max:
            raise EventTooLargeError(events)

    def _skip_bom(self, chunk: bytes) -> bytes:
        head = bytes(self._carry) + chunk
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._carry[:] = head
            return b""
        self._carry.clear()
        self._started = True
        return head.removeprefix(_BOM)

    def _to_lf(self, chunk: bytes) -> bytes:
        if not chunk:
            return chunk
        # A CR ends its line at once; only the LF that may follow in the next chunk has to be remembered.
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
            if not chunk:
                return chunk
        self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _parse_block(block: bytes) -> RawEvent | None:
    event_type = b""
    data: list[bytes] = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(b"data: " + value)
        elif name == b"event":
            event_type = value
    if not data:
        return None
    if event_type:
        data.insert(0, b"event: " + event_type)
    return event_type, b"\n".join(data)


def data_of(body: bytes) -> bytes:
    """The data of an event's lines, joined with LF where it has several."""
    start = body.find(b"\ndata: ") + 1 if body.startswith(b"event: ") else 0
    return body[start + 6 :].replace(b"\ndata: ", b"\n")


def frame(event_type: str, data: str, event_id: str | None = None) -> bytes:
    """One event of our own. `data` is one line (JSON is); the id comes last, so that a cut event moves no cursor."""
    tail = f"id: {event_id}\n" if event_id is not None else ""
    return f"event: {event_type}\ndata: {data}\n{tail}\n".encode()


def reconnect(retry_ms: int, *, resume: bool, deadline_ms: int) -> bytes:
    """The control event of a server that shuts down. Without an id: it is no part of the stream and moves no cursor."""
    data = f'{{"type":"reconnect","resume":{"true" if resume else "false"},"deadline_ms":{deadline_ms}}}'
    return f"event: reconnect\nretry: {retry_ms}\ndata: {data}\n\n".encode()


def opening(retry_ms: int, cursor: str | None) -> bytes:
    """A response's first lines. No blank line closes them: a parser holds them until the first event.

    None where the response continues from no event of ours.
    """
    return (f"retry: {retry_ms}\n" + (f"id: {cursor}\n" if cursor is not None else "")).encode()


# Whole frames of a stream, as its log has them. Each ends in its id, which is `<stream>.<number>`, and a blank line. No
# other blank line is in a frame, since data has no line end: so what stands before one is always a frame's number.

_NUMBER = re.compile(rb"\.(\d+)\n\n")


def last_seq_of(frames: bytes) -> int:
    """The number of the last of these frames."""
    return int(frames[frames.rindex(b".") + 1 : -2])


def is_end(frames: bytes) -> bool:
    """Whether the last of these frames is `end`."""
    return frames.startswith(b"event: end\n", _last_start(frames))


def last_data(frames: bytes) -> bytes:
    """The data of the last of these frames."""
    return data_of(frames[_last_start(frames) : frames.rindex(b"\nid: ")])


def offset_after(frames: bytes, seq: int) -> int:
    """Where the first of these frames begins whose number is greater than `seq`; their length where there is none.

    The numbers grow from frame to frame, and may have a hole.
    """
    number = b".%d\n\n" % seq
    if (at := frames.find(number)) >= 0:
        return at + len(number)
    end = 0
    for match in _NUMBER.finditer(frames):
        if int(match[1]) > seq:
            break
        end = match.end()
    return end


def cut_at(frames: bytes, start: int, limit: int) -> int:
    """Where the frames end that have at most `limit` bytes from `start` on; at least one, which may have more."""
    last = frames.rfind(b"\n\n", start, start + limit)
    return (last if last >= 0 else frames.index(b"\n\n", start + limit - 1)) + 2


def _last_start(frames: bytes) -> int:
    before = frames.rfind(b"\n\n", 0, -2)
    return before + 2 if before >= 0 else 0
