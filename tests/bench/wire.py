"""What the benchmark's upstream writes and its load verifies: numbered, stamped tokens in Anthropic's format."""

import re

# One token: stream, number, send time (CLOCK_MONOTONIC, ns, the same clock in every process of one machine).
# Fixed widths keep each frame at 150 bytes, which is what a token of a real answer takes on the wire.
_DELTA = (
    "event: content_block_delta\n"
    'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"~%05d.%08d.%019d~"}}\n\n'
)
_START = (
    "event: message_start\n"
    'data: {"type":"message_start","message":{"id":"msg_bench_%05d","type":"message","role":"assistant",'
    '"model":"bench","content":[],"stop_reason":null,"stop_sequence":null,'
    '"usage":{"input_tokens":25,"output_tokens":1}}}\n\n'
)
_BLOCK_START = (
    "event: content_block_start\n"
    'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
)
_CLOSING = (
    'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n',
    (
        "event: message_delta\n"
        'data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        '"usage":{"output_tokens":%d}}\n\n'
    ),
    'event: message_stop\ndata: {"type":"message_stop"}\n\n',
)

# A frame as any of the relays passes it on, a relay's own id line included: groups are the event's name, the
# token's three numbers (empty for other events) and the relay's sequence number (empty where it adds none).
_FRAME = re.compile(
    rb"event: (\w+)\n"
    rb'data: (?:\{"type":"content_block_delta","index":0,'
    rb'"delta":\{"type":"text_delta","text":"~(\d{5})\.(\d{8})\.(\d{19})~"\}\}|[^\n]*)\n'
    rb"(?:id: [\w-]{22}\.(\d+)\n)?\n"
)
_HEARTBEAT = b": heartbeat\n"


def chunk(frame: bytes) -> bytes:
    """One piece of an HTTP/1.1 chunked body."""
    return b"%x\r\n%b\r\n" % (len(frame), frame)


LAST_CHUNK = b"0\r\n\r\n"


def delta(stream: int, number: int, sent_ns: int) -> bytes:
    """The frame of one token."""
    return (_DELTA % (stream, number, sent_ns)).encode()


def opening(stream: int) -> list[bytes]:
    """The frames before the first token; a model that thinks has sent only the first of them."""
    return [(_START % stream).encode(), _BLOCK_START.encode()]


def closing(tokens: int) -> list[bytes]:
    """The frames after the last token, with the usage."""
    stop, usage, end = _CLOSING
    return [stop.encode(), (usage % tokens).encode(), end.encode()]


class Dechunker:
    """Takes a chunked body apart, whatever way it is cut into reads. `ended` after the terminating chunk."""

    __slots__ = ("_head", "_left", "ended")

    def __init__(self) -> None:
        self.ended = False
        self._head = b""  # a size line that has not arrived whole
        self._left = 0  # bytes of the current chunk still to come, its CRLF included

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in `data`. ValueError for a size line that is none."""
        if self._head:
            data, self._head = self._head + data, b""
        parts: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self.ended:
            if not self._left:
                eol = data.find(b"\r\n", at)
                if eol < 0:
                    self._head = data[at:]
                    break
                length = int(data[at:eol], 16)
                self.ended = not length
                self._left = length + 2
                at = eol + 2
                continue
            take = min(self._left, size - at)
            payload = min(take, self._left - 2)
            if payload > 0:
                parts.append(data[at : at + payload])
            at += take
            self._left -= take
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Verifier:
    """Reads one stream's SSE bytes and checks every token by its number and every relay id by its sequence.

    `lost` is settled by `settle`, once it is known how many tokens the upstream sent; the other counts are
    current at any time. `malformed` counts frames that are not what the upstream wrote plus at most an id line,
    and tokens of another stream.
    """

    __slots__ = (
        "_missing",
        "_next",
        "_rest",
        "_stream",
        "doubled",
        "ended",
        "heartbeats",
        "id_faults",
        "last_id",
        "lost",
        "malformed",
        "reordered",
        "started",
        "stopped",
    )

    def __init__(self, stream: int) -> None:
        self._stream = b"%05d" % stream
        self._next = 0
        self._missing: set[int] = set()
        self._rest = b""
        self.lost = self.doubled = self.reordered = self.malformed = 0
        self.heartbeats = 0
        self.id_faults = 0
        self.last_id = 0  # 0 as long as the relay adds no ids
        self.started = self.stopped = False
        self.ended = False  # the relay's own `end` event, with the reason `complete`

    def feed(self, body: bytes) -> list[int]:
        """The send times (ns) of the tokens that `body` completed."""
        text = self._rest + body
        cut = text.rfind(b"\n\n") + 2
        if cut == 1:
            self._rest = self._without_heartbeats(text)
            return []
        frames, self._rest = (text, b"") if cut == len(text) else (text[:cut], text[cut:])
        if self._rest:
            self._rest = self._without_heartbeats(self._rest)
        if _HEARTBEAT in frames:
            self.heartbeats += frames.count(_HEARTBEAT)
        found = _FRAME.findall(frames)
        self.malformed += frames.count(b"\n\n") - len(found)
        stamps = []
        for name, stream, number, stamp, relay_id in found:
            if stamp:
                self._token(stream, int(number))
                stamps.append(int(stamp))
            else:
                self._other(name, frames)
            if relay_id or self.last_id:
                self._id(relay_id)
        return stamps

    def settle(self, sent: int) -> None:
        """Counts as lost what never came of the `sent` tokens; a token beyond them was never sent."""
        self.lost = len(self._missing) + max(sent - self._next, 0)
        self.malformed += max(self._next - sent, 0)

    def _token(self, stream: bytes, number: int) -> None:
        if stream != self._stream:
            self.malformed += 1
        elif number == self._next:
            self._next += 1
        elif number > self._next:
            self._missing.update(range(self._next, number))
            self._next = number + 1
        elif number in self._missing:
            self._missing.remove(number)
            self.reordered += 1
        else:
            self.doubled += 1

    def _other(self, name: bytes, frames: bytes) -> None:
        if name == b"message_start":
            self.started = True
        elif name == b"message_stop":
            self.stopped = True
        elif name == b"end":
            self.ended = b'"reason":"complete"' in frames
        elif name == b"content_block_delta":
            self.malformed += 1

    def _id(self, relay_id: bytes) -> None:
        number = int(relay_id or 0)
        self.id_faults += number != self.last_id + 1
        self.last_id = number

    def _without_heartbeats(self, rest: bytes) -> bytes:
        # A heartbeat is one line with no blank line after it: on a silent stream no frame ever follows it.
        if _HEARTBEAT not in rest:
            return rest
        self.heartbeats += rest.count(_HEARTBEAT)
        return rest.replace(_HEARTBEAT, b"")
