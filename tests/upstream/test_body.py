"""The Body in front of aiohttp's protocol: whatever way a response is cut, broken off or malformed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import zlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rawupstream import LAST_CHUNK, Connection, Request, chunk, head, raw_upstream

from aisse.upstream.body import Body
from aisse.upstream.connection import UpstreamResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HEAD = head()
CHUNKS = (b"data: one\n\n", b"x", b"\r\n", b"0\r\n\r\n", bytes(range(256)))
PAYLOAD = b"".join(CHUNKS)
WIRE = b"".join(map(chunk, CHUNKS)) + LAST_CHUNK


def dechunked(wire: bytes) -> tuple[bytes, str]:
    """What RFC 9112, section 7.1, makes of a body, read line by line: its bytes, and `whole`, `open` or `broken`."""
    body, at = b"", 0
    while True:
        end = wire.find(b"\r\n", at)
        if end < 0:
            return body, "broken" if b"\n" in wire[at:] else "open"
        digits = wire[at:end].partition(b";")[0].rstrip(b" \t")
        # Zeros in front count for nothing (chunk-size is 1*HEXDIG).
        hexadecimal = digits and len(digits.lstrip(b"0")) <= 8 and not digits.strip(b"0123456789abcdefABCDEF")
        if not hexadecimal or b"\n" in wire[at:end] or b"\r" in wire[at:end]:
            return body, "broken"
        size, at = int(digits, 16), end + 2
        if not size:
            break
        body += wire[at : at + size]
        at += size
        line_end = wire[at : at + 2]
        if line_end != b"\r\n"[: len(line_end)]:
            return body, "broken"
        if len(line_end) < 2:
            return body, "open"
        at += 2
    while True:  # the trailer
        end = wire.find(b"\r\n", at)
        if end < 0:
            return body, "open"
        if end == at:
            return body, "whole"
        at = end + 2


class Transport:
    """As much of one as a Body uses."""

    def __init__(self) -> None:
        self.protocol: object = None
        self.aborted = self.closing = False
        self.reading = True
        self.unsent = 0
        self.calls: list[str] = []

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def get_protocol(self) -> object:
        return self.protocol

    def abort(self) -> None:
        self.aborted = self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        self.calls.append("pause")

    def resume_reading(self) -> None:
        self.calls.append("resume")


class Taker:
    """aiohttp's protocol, as far as a Body sees it: notes what it is given."""

    def __init__(self) -> None:
        self.got = b""
        self.lost: list[Exception | None] = []

    def data_received(self, data: bytes) -> None:
        self.got += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


class Fed:
    """A Body on a fake transport, and what came out of it."""

    def __init__(self, *, listening: bool = True) -> None:
        self.transport = Transport()
        self.protocol = self.transport.protocol = Taker()
        self.body = Body(cast("Any", SimpleNamespace(transport=self.transport, protocol=self.protocol)))
        self.out: list[bytes] = []
        self.ends = 0
        if listening:
            self.listen()

    def listen(self) -> None:
        self.body.listen(cast("Any", None), self.out.append, self.end)

    def feed(self, *pieces: bytes) -> Fed:
        """As a socket does: to whichever protocol is the transport's, and not after an abort."""
        for piece in pieces:
            if not self.transport.aborted and piece:
                cast("Any", self.transport.protocol).data_received(piece)
        return self

    def verdict(self) -> tuple[bytes, str]:
        """As `dechunked`, after checking that all that is known of the end agrees."""
        assert self.body.ended == (self.ends == 1) == (self.transport.protocol is self.protocol)
        assert self.body.size == len(b"".join(self.out))
        assert all(self.out)  # never an empty piece
        how = "broken" if self.transport.aborted else "whole" if self.body.ended else "open"
        assert self.body.whole is (how == "whole")
        return b"".join(self.out), how

    def end(self) -> None:
        assert self.body.ended
        self.ends += 1


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The pieces of `data` between places, which need be neither sorted nor inside it."""
    at = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


# --- chunks, however they are spelt and cut ---------------------------------------------------------------------------


@pytest.mark.parametrize("listening", [True, False])
def test_chunked_body_cut_once_at_every_byte_is_given_out_whole(*, listening: bool) -> None:
    """The head included; what came before anybody listened comes first."""
    for at in range(len(HEAD + WIRE) + 1):
        fed = Fed(listening=listening).feed((HEAD + WIRE)[:at])
        if not listening:
            fed.listen()
        fed.feed((HEAD + WIRE)[at:])
        assert fed.verdict() == (PAYLOAD, "whole"), at
        assert fed.protocol.got == HEAD + LAST_CHUNK


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunked_body_in_small_reads_is_given_out_as_it_comes(size: int) -> None:
    """Nothing that has arrived of a chunk waits for the rest of it."""
    fed = Fed().feed(HEAD)
    for at in range(0, len(WIRE), size):
        fed.feed(WIRE[at : at + size])
        assert b"".join(fed.out) == dechunked(WIRE[: at + size])[0]
    assert fed.verdict() == (PAYLOAD, "whole")


@pytest.mark.parametrize(
    "line",
    [b"a", b"A", b"0a", b"0000000A", b"a;x", b"a;name=value", b'a ; n="1;2"', b"a\t", b"A  ", b"a;" + b"x" * 4000],
)
def test_size_line_in_every_legal_spelling_is_understood(line: bytes) -> None:
    """Case, leading zeros, space before the end, extensions; whole, and split at every byte."""
    wire = line + b"\r\n0123456789\r\n" + LAST_CHUNK
    assert Fed().feed(HEAD, wire).verdict() == (b"0123456789", "whole")
    for at in range(min(len(wire), 60)):
        assert Fed().feed(HEAD, wire[:at], wire[at:]).verdict() == (b"0123456789", "whole"), at


@pytest.mark.parametrize("size", [1, 9, 15, 16, 255, 256, 4096, 65_535, 100_000, 1_048_576])
def test_chunk_of_any_size_is_given_out_in_one_piece(size: int) -> None:
    data = bytes(at % 251 for at in range(size))
    fed = Fed().feed(HEAD, chunk(data), chunk(data) + chunk(data), LAST_CHUNK)
    assert fed.out == [data, data + data]
    assert fed.verdict() == (data * 3, "whole")


@pytest.mark.parametrize("trailer", [b"X-A: 1\r\n", b"X-A: 1\r\nX-B: 2\r\n", b"X: " + b"y" * 5000 + b"\r\n"])
@pytest.mark.parametrize("last", [b"0", b"000", b"0;last"])
def test_trailer_is_skipped_wherever_it_is_cut(last: bytes, trailer: bytes) -> None:
    wire = chunk(b"abc") + last + b"\r\n" + trailer + b"\r\n"
    for at in range(len(wire) + 1) if len(wire) < 100 else range(len(wire) - 6, len(wire) + 1):
        fed = Fed().feed(HEAD, wire[:at], wire[at:])
        assert fed.verdict() == (b"abc", "whole"), at
        assert fed.protocol.got == HEAD + LAST_CHUNK


@pytest.mark.parametrize("trailer", [b"", b"X: 1\r\n"])
def test_bytes_behind_the_last_chunk_are_left_to_aiohttp(trailer: bytes) -> None:
    """They are no part of the body, and aiohttp closes a connection on which nobody asked for them."""
    fed = Fed().feed(HEAD, chunk(b"abc") + b"0\r\n" + trailer + b"\r\n" + b"HTTP/1.1 200 OK")
    assert fed.verdict() == (b"abc", "whole")
    assert fed.protocol.got == HEAD + LAST_CHUNK + b"HTTP/1.1 200 OK"
    fed.feed(b"\r\nmore")
    assert fed.protocol.got.endswith(b"OK\r\nmore")


@pytest.mark.parametrize(
    "garbage",
    [
        b"xyz\r\n",
        b"\r\n",
        b"-1\r\n",
        b"+5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"5_0\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5\nhello\n",
        b"5\rhello\r\n",
        b"5 5\r\nhello\r\n",
        b"123456789\r\n",
        b"\xb2\r\nhi\r\n",
        "\N{ARABIC-INDIC DIGIT FIVE}\r\nhello\r\n".encode(),
        b"5;a\nb\r\nhello\r\n",
        b"5\r\nhelloX\r\n",
        b"5\r\nhello\nX",
        b"5\r\nhello\rX",
        b"5\r\nhello5\r\nhello\r\n",
        b"4;" + b"x" * 5000,
        b"0" * 5000,
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_garbage_among_chunks_breaks_the_body_off_after_what_was_right(garbage: bytes, *, together: bool) -> None:
    """However it is cut: the connection is dropped, and no byte of it is taken for the answer's."""
    right = b"hello" if garbage.startswith(b"5\r\nhello") else b""
    pieces = [chunk(b"abc") + garbage] if together else [chunk(b"abc"), garbage]
    assert Fed().feed(HEAD, *pieces).verdict() == (b"abc" + right, "broken")
    if len(garbage) < 100:
        small = [garbage[at : at + 1] for at in range(len(garbage))]
        assert Fed().feed(HEAD, chunk(b"abc"), *small).verdict() == (b"abc" + right, "broken")


def test_size_line_without_end_is_not_collected_for_ever() -> None:
    """Byte by byte, too."""
    fed = Fed().feed(HEAD, *[b"1"] * 9)
    fed.feed(*[b";"] * 5000)
    assert fed.verdict() == (b"", "broken")


def test_trailer_without_end_is_not_collected_for_ever() -> None:
    fed = Fed().feed(HEAD, chunk(b"abc"), b"0\r\n", *[b"X: 1\r\n"] * 20_000)
    assert fed.verdict() == (b"abc", "broken")


SIZES = st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 4096, 100_000]))


@st.composite
def spelt(draw: st.DrawFn) -> bytes:
    """A chunked body in any legal spelling."""
    wire = b""
    for size in draw(st.lists(SIZES, max_size=6)):
        data = draw(st.binary(min_size=min(size, 40), max_size=min(size, 40)))
        data += bytes(size - len(data))
        digits = draw(st.sampled_from([b"%x", b"%X", b"%08x", b"%06X"])) % len(data)
        space = draw(st.sampled_from([b"", b"", b" ", b"\t "]))
        extension = draw(st.sampled_from([b"", b"", b";a", b";a=b", b';a="0"; c']))
        wire += digits + space + extension + b"\r\n" + data + b"\r\n"
    trailer = draw(st.sampled_from([b"", b"", b"X-A: 1\r\n", b"X-A: 1\r\nX-B: 0\r\n"]))
    return wire + draw(st.sampled_from([b"0", b"00", b"0;x"])) + b"\r\n" + trailer + b"\r\n"


@settings(max_examples=300)
@given(spelt(), st.lists(st.integers(0, 1 << 20), max_size=30), st.integers(0, 30))
def test_any_spelling_in_any_cut_is_what_a_plain_dechunker_says(wire: bytes, places: list[int], late: int) -> None:
    """Whenever listening begins."""
    fed = Fed(listening=False)
    for number, piece in enumerate(cut(HEAD + wire, places)):
        if number == late:
            fed.listen()
        fed.feed(piece)
    if late > number:
        fed.listen()
    assert fed.verdict() == dechunked(wire)
    assert fed.protocol.got == HEAD + LAST_CHUNK


@settings(max_examples=500)
@given(spelt(), st.data())
def test_any_damage_in_any_cut_is_what_a_plain_dechunker_says(wire: bytes, data: st.DataObject) -> None:
    """A byte changed, dropped or added: the same bytes are given out, and the same end is seen."""
    at = data.draw(st.integers(0, min(len(wire) - 1, 400)))
    new = data.draw(st.sampled_from([b"", b"\r", b"\n", b"0", b"a", b"g", b"x", b";", b" ", b"\r\n", b"\x00", b"\xff"]))
    wire = wire[:at] + new + wire[at + data.draw(st.integers(0, 2)) :]
    body, how = dechunked(wire)
    fed = Fed().feed(HEAD, *cut(wire, data.draw(st.lists(st.integers(0, 1 << 20), max_size=10))))
    got, seen = fed.verdict()
    assert got == body
    # A line end that has come by halves may be judged before it is whole; never the other way about.
    assert seen == how or (how, seen) == ("open", "broken")


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"]
)
@pytest.mark.parametrize("times", [1, 3])
def test_interim_responses_pass_to_aiohttp_wherever_they_are_cut(interim: bytes, times: int) -> None:
    """RFC 9110, section 15.2; the real response's chunks are still taken off."""
    wire = interim * times + HEAD + WIRE
    for at in range(len(wire)):
        fed = Fed().feed(wire[:at], wire[at:])
        assert fed.verdict() == (PAYLOAD, "whole"), at
        assert fed.protocol.got == interim * times + HEAD + LAST_CHUNK


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked",
        "transfer-encoding:chunked\r\ncontent-type:text/event-stream;charset=utf-8",
        "TRANSFER-ENCODING:\tChunked\t\r\nDate: x\r\nCONTENT-TYPE:  Text/Event-Stream ; charset=utf-8",
    ],
)
@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
def test_heads_in_any_spelling_are_those_of_an_event_stream(fields: str, line_end: str) -> None:
    """Line ends of LF alone included, which aiohttp judges."""
    lines = f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n".replace("\r\n", line_end).encode()
    for at in range(len(lines) + 1):
        fed = Fed().feed(lines[:at], lines[at:] + WIRE)
        assert fed.verdict() == (PAYLOAD, "whole"), at
        assert fed.protocol.got == lines + LAST_CHUNK


@pytest.mark.parametrize(
    "lines",
    [
        head("404 Not Found"),
        head("204 No Content"),
        head(content_type="application/json"),
        head(content_type="text/event-streams"),
        head(framing="5"),
        head(framing="close"),
        head("200 OK", "text/event-stream", "Content-Encoding: gzip"),
        head("200 OK", "text/plain", "X-Note: Content-Type: text/event-stream"),
        b"HTTP/2 200\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
    ],
)
def test_every_other_response_goes_through_aiohttp_byte_for_byte(lines: bytes) -> None:
    for at in {0, 1, 5, 9, 12, len(lines) // 2, len(lines)}:
        fed = Fed(listening=False).feed(lines[:at], lines[at:] + b"hello", b"more")
        assert fed.protocol.got == lines + b"hellomore"
        assert not fed.body.ended


# --- pausing ----------------------------------------------------------------------------------------------------------


def test_pause_after_the_end_leaves_the_next_response_alone() -> None:
    fed = Fed().feed(HEAD)
    fed.body.pause()
    fed.body.resume()
    assert fed.transport.calls == ["pause", "resume"]
    fed.feed(WIRE)
    fed.body.pause()
    fed.body.resume()
    assert fed.transport.calls == ["pause", "resume"]


def test_resume_of_a_connection_that_closes_does_nothing() -> None:
    """Uvloop raises there, and the relay would take it for a fault."""
    fed = Fed().feed(HEAD)
    fed.body.pause()
    fed.transport.closing = True
    fed.body.resume()
    assert fed.transport.calls == ["pause"]


def test_abort_leaves_a_connection_that_has_changed_hands() -> None:
    fed = Fed(listening=False).feed(head(framing="5") + b"hello")
    following = Body(cast("Any", SimpleNamespace(transport=fed.transport, protocol=fed.protocol)))
    fed.body.abort()
    assert not fed.transport.aborted
    following.abort()
    assert fed.transport.aborted


def test_what_came_before_anybody_listened_is_not_kept() -> None:
    fed = Fed(listening=False).feed(HEAD, chunk(b"x" * 1000))
    fed.listen()
    assert fed.out == [b"x" * 1000]
    assert fed.body._early == []


def test_reading_ahead_of_a_pause_is_bounded_over_tls() -> None:
    """Uvloop's own bound is 256 KiB a connection."""
    limits: list[int] = []

    class Encrypted(Transport):
        def set_read_buffer_limits(self, high: int) -> None:
            limits.append(high)

    Body(cast("Any", SimpleNamespace(transport=Encrypted(), protocol=Taker())))
    assert len(limits) == 1
    assert 0 < limits[0] <= 16 << 10


def test_head_without_end_is_left_to_aiohttp_and_not_collected() -> None:
    sent = b"HTTP/1.1 200 OK\r\n" + b"X-Field: y\r\n" * 6000
    fed = Fed(listening=False)
    for at in range(0, len(sent), 4096):
        fed.feed(sent[at : at + 4096])
    assert fed.protocol.got == sent


def test_late_end_of_one_body_leaves_the_next_ones_in_place() -> None:
    """The pool may have lent the connection out again before anybody listened to a body that it parsed itself."""
    fed = Fed(listening=False).feed(head(framing="5") + b"hello")
    following = Body(cast("Any", SimpleNamespace(transport=fed.transport, protocol=fed.protocol)))
    content = SimpleNamespace(read_nowait=lambda: b"hello", at_eof=lambda: True)
    fed.body.listen(cast("Any", content), fed.out.append, fed.end)
    assert (fed.out, fed.ends, fed.body.ended) == ([b"hello"], 1, True)
    assert fed.transport.protocol is following


def test_loss_after_the_end_is_told_to_aiohttp_only() -> None:
    """And one before it to both, once."""
    for wire, ended in ((WIRE, "whole"), (WIRE[:-1], "open")):
        fed = Fed().feed(HEAD, wire)
        assert fed.verdict()[1] == ended
        cast("Any", fed.transport.protocol).connection_lost(None)
        assert (fed.ends, fed.protocol.lost) == (1, [None])
        fed.body.connection_lost(None)
        assert fed.ends == 1


@pytest.mark.parametrize("unsent", [0, 1])
def test_connection_on_which_a_question_is_left_unread_is_cut_at_the_end(unsent: int) -> None:
    """To close it would wait for an upstream that has answered, and need not ever read the rest."""
    fed = Fed()
    fed.transport.unsent = unsent
    fed.feed(HEAD, WIRE[:-1])
    assert not fed.transport.aborted
    fed.feed(WIRE[-1:])
    assert fed.transport.aborted is (unsent > 0)


# --- real sockets -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(response_class=UpstreamResponse, timeout=timeout, read_bufsize=16 << 10) as opened:
        yield opened


async def received(response: aiohttp.ClientResponse) -> bytes:
    """What a listener gets of the body, until its one end."""
    assert isinstance(response, UpstreamResponse)
    out: list[bytes] = []
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    response.raw_body.listen(response.content, out.append, lambda: ended.set_result(None))
    async with asyncio.timeout(60):
        await ended
    assert response.raw_body.ended
    assert response.raw_body.size == len(b"".join(out))
    return b"".join(out)


def answering(wire: bytes, then: Callable[[Connection], None] | None = None) -> Callable[[Request, Connection], Any]:
    """An upstream that sends just that."""

    async def answer(_request: Request, connection: Connection) -> None:
        connection.send(wire)
        if then is not None:
            await connection.delivered()
            then(connection)

    return answer


GZIPPED = zlib.compress(PAYLOAD, wbits=31)


@pytest.mark.parametrize(
    ("wire", "then"),
    [
        (HEAD + WIRE, None),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + HEAD + WIRE, None),
        (head(framing=str(len(PAYLOAD))) + PAYLOAD, None),
        (head(framing="close") + PAYLOAD, Connection.fin),
        (head("404 Not Found") + WIRE, None),
        (head(content_type="application/json") + WIRE, None),
        (head("200 OK", "text/event-stream", "Content-Encoding: gzip") + chunk(GZIPPED) + LAST_CHUNK, None),
    ],
)
@pytest.mark.parametrize("late", [False, True])
async def test_body_of_any_framing_reaches_the_listener(
    wire: bytes, then: Callable[[Connection], None] | None, *, late: bool
) -> None:
    """Before or after all of it has come."""
    async with raw_upstream(answering(wire, then)) as upstream, session() as client:
        response = await client.post(upstream.url)
        if late:
            await asyncio.sleep(0.05)  # nothing else says that what the kernel has was read
        assert await received(response) == PAYLOAD
        response.close()


@pytest.mark.parametrize("how", [Connection.fin, Connection.rst])
async def test_connection_lost_at_every_byte_gives_out_what_came_before(how: Callable[[Connection], None]) -> None:
    """After an orderly end and after a reset."""
    wire = b"".join(map(chunk, (b"data: one\n\n", b"two"))) + LAST_CHUNK

    async def answer(request: Request, connection: Connection) -> None:
        connection.send(HEAD, wire[: int(request.headers["x-at"])])
        await connection.delivered()
        how(connection)

    async with raw_upstream(answer) as upstream, session() as client:

        async def one(at: int) -> None:
            try:
                response = await client.post(upstream.url, headers={"X-At": str(at)})
            except aiohttp.ClientError:
                # A reset may come before the head has been looked at.
                assert how is Connection.rst
                return
            assert await received(response) == dechunked(wire[:at])[0], at
            response.close()

        await asyncio.gather(*map(one, range(len(wire) + 1)))


WHOLE = [
    ("fin", HEAD + WIRE, True),
    ("fin", HEAD + WIRE[:-2], False),
    ("fin", HEAD + WIRE[: -len(LAST_CHUNK)], False),
    ("rst", HEAD + WIRE, True),
    ("fin", head(framing=str(len(PAYLOAD))) + PAYLOAD, True),
    ("rst", head(framing=str(len(PAYLOAD))) + PAYLOAD, True),
    ("fin", head(framing=str(len(PAYLOAD))) + PAYLOAD[:-1], False),
    ("fin", head(framing="close") + PAYLOAD, True),
    ("rst", head(framing="close") + PAYLOAD, False),
    ("fin", b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + PAYLOAD, True),
    ("rst", b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + PAYLOAD, False),
    # aiohttp's parser has these
    ("fin", head("404 Not Found") + WIRE, True),
    ("fin", head("404 Not Found") + WIRE[: -len(LAST_CHUNK)], False),
]


@pytest.mark.parametrize(("how", "wire", "whole"), WHOLE, ids=range(len(WHOLE)))
@pytest.mark.parametrize("late", [False, True])
async def test_body_is_whole_where_its_framing_says_so_and_nothing_else(
    how: str, wire: bytes, whole: bool, late: bool
) -> None:
    """Whether somebody listens when its end comes, or later."""
    async with raw_upstream(answering(wire, getattr(Connection, how))) as upstream, session() as client:
        try:
            response = await client.post(upstream.url)
        except aiohttp.ClientError:
            assert how == "rst"  # it may come before the head has been looked at
            return
        if late:
            async with asyncio.timeout(5):
                await upstream.connections[0].lost.wait()
            await asyncio.sleep(0.05)  # nothing else says that what the kernel has was read
        await received(response)
        assert isinstance(response, UpstreamResponse)
        assert response.raw_body.whole is whole
        response.close()


async def test_garbage_from_a_socket_ends_the_body_and_its_connection() -> None:
    async with raw_upstream(answering(HEAD + chunk(b"abc") + b"garbage\r\n")) as upstream, session() as client:
        response = await client.post(upstream.url)
        assert await received(response) == b"abc"
        async with asyncio.timeout(60):
            await upstream.connections[0].lost.wait()
        response.close()


@pytest.mark.parametrize("pieces", [1, 5])
async def test_connection_carries_twenty_whole_answers(pieces: int) -> None:
    """Each is its own, and aiohttp's protocol is the transport's again after each."""

    async def answer(request: Request, connection: Connection) -> None:
        number = request.headers["x-number"].encode()
        wire = HEAD + chunk(b"answer " + number) * 3 + LAST_CHUNK
        for piece in cut(wire, [len(wire) * part // pieces for part in range(pieces)]):
            connection.send(piece)
            await connection.delivered()

    async with raw_upstream(answer) as upstream, session() as client:
        for number in range(20):
            response = await client.post(upstream.url, headers={"X-Number": str(number)})
            connection = response.connection
            protocol = connection.protocol if connection is not None else None
            transport = connection.transport if connection is not None else None
            assert await received(response) == b"answer %d" % number * 3
            if transport is not None:
                assert transport.get_protocol() is protocol
            response.close()
            assert isinstance(response, UpstreamResponse)
            response.raw_body.pause()  # nothing of the next response's
        assert len(upstream.connections) == 1


async def test_answer_after_every_other_kind_of_body_is_intact() -> None:
    """On one connection, chunks taken off and chunks through aiohttp take turns."""
    kinds = (HEAD + WIRE, head("404 Not Found") + WIRE, head(framing=str(len(PAYLOAD))) + PAYLOAD)
    turns = itertools.cycle(kinds)

    async def answer(_request: Request, connection: Connection) -> None:
        connection.send(next(turns))

    async with raw_upstream(answer) as upstream, session() as client:
        for _ in range(9):
            response = await client.post(upstream.url)
            assert await received(response) == PAYLOAD
            response.close()
        assert len(upstream.connections) == 1


async def test_unasked_bytes_behind_an_answer_cost_the_connection() -> None:
    """They are not the next question's answer."""
    asked = itertools.count()

    async def answer(_request: Request, connection: Connection) -> None:
        number = next(asked)
        connection.send(HEAD + chunk(b"%d" % number) + LAST_CHUNK + (HEAD if not number else b""))

    async with raw_upstream(answer) as upstream, session() as client:
        for number in range(2):
            response = await client.post(upstream.url)
            assert await received(response) == b"%d" % number
            response.close()
        assert len(upstream.connections) == 2


async def test_paused_body_leaves_bytes_in_the_kernel_until_resumed() -> None:
    go = asyncio.Event()

    async def answer(_request: Request, connection: Connection) -> None:
        connection.send(HEAD)
        await go.wait()
        connection.send(WIRE)

    async with raw_upstream(answer) as upstream, session() as client:
        response = await client.post(upstream.url)
        assert isinstance(response, UpstreamResponse)
        response.raw_body.pause()
        go.set()
        async with asyncio.timeout(60):
            while upstream.connections[0].unread() < len(WIRE):
                await asyncio.sleep(0.002)
        assert response.raw_body.size == 0
        response.raw_body.resume()
        assert await received(response) == PAYLOAD
        response.close()
