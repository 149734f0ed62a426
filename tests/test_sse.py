"""The parser and the frames.

`samples/` holds event streams with what a browser makes of each beside it, in JSON, so that parsers in other
languages can be held to the same files.
"""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse._decoders import SSEDecoder, SSELineDecoder
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aisse.sse import (
    HEARTBEAT,
    EventTooLargeError,
    Parser,
    RawEvent,
    cut_at,
    data_of,
    frame,
    is_end,
    last_data,
    last_seq_of,
    offset_after,
    opening,
)

SOAK = os.environ.get("TESTS_SOAK") == "1"
PROPERTY = settings(max_examples=5_000 if SOAK else 250)

SAMPLES = sorted(Path(__file__).parent.glob("samples/*.sse"))
BOM = b"\xef\xbb\xbf"
LARGE = 1 << 20

SeenEvent = tuple[str, str]


def parse(*chunks: bytes, limit: int = LARGE) -> list[RawEvent]:
    parser = Parser(limit)
    return [event for chunk in chunks for event in parser.feed(chunk)]


def outcome(*chunks: bytes, limit: int) -> tuple[list[RawEvent], bool]:
    """The events up to the bound, and whether it was exceeded."""
    parser = Parser(limit)
    events: list[RawEvent] = []
    for chunk in chunks:
        try:
            events += parser.feed(chunk)
        except EventTooLargeError as error:
            return events + error.args[0], True
    return events, False


def seen(events: list[RawEvent]) -> list[SeenEvent]:
    """Type and data of events as a client gets them."""
    return [
        (event_type.decode(errors="replace") or "message", data_of(body).decode(errors="replace"))
        for event_type, body in events
    ]


def single_bytes(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    return [stream[start:end] for start, end in pairwise([0, *sorted(places), len(stream)])]


# --- samples ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=SAMPLES, ids=lambda path: path.stem)
def sample(request: pytest.FixtureRequest) -> tuple[bytes, list[SeenEvent]]:
    path: Path = request.param
    expected: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return path.read_bytes(), [(event["type"], event["data"]) for event in expected["events"]]


def test_samples_each_have_their_expectation() -> None:
    assert len(SAMPLES) > 20
    assert {path.stem for path in SAMPLES} == {path.stem for path in SAMPLES[0].parent.glob("*.json")}


def test_sample_fed_whole_gives_its_events(sample: tuple[bytes, list[SeenEvent]]) -> None:
    stream, expected = sample
    assert seen(parse(stream)) == expected


def test_sample_fed_a_byte_at_a_time_gives_the_same(sample: tuple[bytes, list[SeenEvent]]) -> None:
    stream, expected = sample
    events = parse(*single_bytes(stream))
    assert seen(events) == expected
    assert events == parse(stream)


def test_sample_fed_in_every_two_way_split_gives_the_same(sample: tuple[bytes, list[SeenEvent]]) -> None:
    stream, _ = sample
    whole = parse(stream)
    for at in range(len(stream) + 1):
        assert parse(stream[:at], stream[at:]) == whole, at


def test_sample_fed_with_empty_chunks_between_gives_the_same(sample: tuple[bytes, list[SeenEvent]]) -> None:
    stream, _ = sample
    spaced = [piece for byte in single_bytes(stream) for piece in (byte, b"")]
    assert parse(b"", *spaced) == parse(stream)


def test_sample_read_by_the_other_parser_gives_the_same_events_and_ids() -> None:
    """The expectations hold what this parser does not see too (ids, the last `retry:`); they have to be right."""
    for path in SAMPLES:
        expected = json.loads(path.with_suffix(".json").read_text())
        decoder, events = independently([path.read_bytes().removeprefix(BOM)])
        assert events == [(event["type"], event["data"], event["id"]) for event in expected["events"]], path.stem
        assert decoder == expected["retry"], path.stem


def test_event_is_complete_with_the_first_byte_of_its_last_line_end() -> None:
    """A CR ends its line at once: an event must not wait for the LF that may follow it."""
    parser = Parser(LARGE)
    assert parser.feed(b"data: 1\r\n\r") == [(b"", b"data: 1")]
    assert parser.feed(b"\ndata: 2\n\n") == [(b"", b"data: 2")]


def test_event_without_data_gives_no_type_to_the_next_in_another_chunk() -> None:
    assert parse(b"event: lost\n\n", b"data: x\n\n") == [(b"", b"data: x")]


def test_event_as_llm_apis_send_it_passes_byte_for_byte() -> None:
    body = b'event: content_block_delta\ndata: {"a": "\xff\xe2\x80\xa8 "}'
    assert parse(body + b"\n\n") == [(b"content_block_delta", body)]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"event:a\ndata:b\n\n", (b"a", b"event: a\ndata: b")),
        (b"data: b\nevent: a\n\n", (b"a", b"event: a\ndata: b")),
        (b"id: 1\nevent: a\nretry: 1\n: c\ndata: b\nx: y\ndata\n\n", (b"a", b"event: a\ndata: b\ndata: ")),
        (b"event\ndata:  b\n\n", (b"", b"data:  b")),
        (b"event: a\r\ndata: b\r\n\r\n", (b"a", b"event: a\ndata: b")),
        (b"\nevent: a\ndata: b\n\n", (b"a", b"event: a\ndata: b")),
    ],
)
def test_event_in_another_form_is_written_in_ours(stream: bytes, expected: RawEvent) -> None:
    assert parse(stream) == [expected]


# --- the bound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("lines", [[b"data: 1234"], [b"data: 1", b"data: 2"], [b": comment"], [b"event: abcd"]])
def test_event_at_the_limit_passes_however_it_is_split(lines: list[bytes], end: bytes) -> None:
    limit = len(b"\n".join(lines))
    stream = end.join([*lines, b"", b""])
    expected = parse(stream)
    assert outcome(stream, limit=limit) == (expected, False)
    assert outcome(*single_bytes(stream), limit=limit) == (expected, False)
    for at in range(len(stream)):
        assert outcome(stream[:at], stream[at:], limit=limit) == (expected, False)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("lines", [[b"data: 1234"], [b"data: 1", b"data: 2"], [b": comment"], [b"event: abcd"]])
def test_event_one_past_the_limit_is_refused_however_it_is_split(lines: list[bytes], end: bytes) -> None:
    limit = len(b"\n".join(lines)) - 1
    stream = end.join([*lines, b"", b""])
    assert outcome(stream, limit=limit) == ([], True)
    assert outcome(*single_bytes(stream), limit=limit) == ([], True)
    for at in range(len(stream)):
        assert outcome(stream[:at], stream[at:], limit=limit) == ([], True)


def test_event_over_the_limit_is_refused_before_it_ends() -> None:
    """The bound is on memory: it must not take the end of the event to notice."""
    parser = Parser(100)
    parser.feed(b"data: " + b"x" * 94)
    with pytest.raises(EventTooLargeError):
        parser.feed(b"x")


def test_event_over_the_limit_leaves_the_events_before_it_in_the_same_chunk() -> None:
    good = b"event: a\ndata: 1\n\ndata: 2\n\n"
    expected = [(b"a", b"event: a\ndata: 1"), (b"", b"data: 2")]
    for bad in (b"data: " + b"x" * 20 + b"\n\n", b"data: " + b"x" * 20):
        with pytest.raises(EventTooLargeError) as raised:
            Parser(20).feed(good + bad + b"data: 3\n\n")
        assert raised.value.args[0] == expected


def test_event_over_the_limit_leaves_the_event_that_its_chunk_completed() -> None:
    parser = Parser(20)
    assert parser.feed(b"data: 1") == []
    with pytest.raises(EventTooLargeError) as raised:
        parser.feed(b"\n\ndata: " + b"x" * 20)
    assert raised.value.args[0] == [(b"", b"data: 1")]


def test_comments_without_end_are_refused_past_the_limit() -> None:
    comment = b": comment\n"
    assert outcome(*[comment] * 10, limit=100) == ([], False)
    assert outcome(*[comment] * 11, limit=100) == ([], True)


def test_blank_lines_without_end_are_no_large_event() -> None:
    assert outcome(*[b"\n"] * 1000, b"\r\n" * 1000, b"data: x\n\n", limit=7) == ([(b"", b"data: x")], False)


def test_many_events_together_larger_than_the_limit_pass() -> None:
    events, too_large = outcome(b"data: 1\n\n" * 100, limit=7)
    assert (len(events), too_large) == (100, False)


@pytest.mark.parametrize(
    "large",
    [b"data: " + b"x" * (4 << 20), b"data: x\n" * (512 << 10), b"data: x\r\n" * (466 << 10)],
    ids=["one line", "many lines", "many lines crlf"],
)
def test_large_event_in_small_chunks_costs_linear_time(large: bytes) -> None:
    """Held against small events of the same total size in the same chunks, in CPU time; quadratic is 100 times off."""

    def cost(stream: bytes) -> float:
        parser = Parser(len(stream))
        chunks = [stream[at : at + 16] for at in range(0, len(stream), 16)]
        began = time.process_time()
        count = sum(len(parser.feed(chunk)) for chunk in chunks)
        spent = time.process_time() - began
        assert count > 0
        return spent

    small = b"data: 12345678\n\n" * (len(large) // 16)
    assert cost(large + b"\n\n") < 8 * cost(small)


# --- properties ---------------------------------------------------------------------------------------------------


def independently(chunks: list[bytes]) -> tuple[int | None, list[tuple[str, str, str]]]:
    """The last `retry:`, and type, data and id of each event, as httpx decodes text and httpx-sse lines and fields.

    The two agree with WHATWG but for these, which are evened out here or by the caller:
    - httpx-sse dispatches an event without data where it has a type, an id or a `retry:`; WHATWG (9.2.6, "if the data
      buffer is an empty string") does not. Only the decoder's own state tells it from one with empty data.
    - neither drops a leading BOM: the caller does.
    """
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=iter(chunks))
    lines, fields = SSELineDecoder(), SSEDecoder()
    events = []
    retry = None

    def take(line: str) -> None:
        nonlocal retry
        has_data = bool(fields._data)
        event = fields.decode(line)
        retry = fields._retry if fields._retry is not None else retry
        if event is not None and has_data:
            events.append((event.event, event.data, event.id))

    for text in response.iter_text():
        for line in lines.decode(text):
            take(line)
    for line in lines.flush():
        take(line)
    return retry, events


def their_events(chunks: list[bytes]) -> list[SeenEvent]:
    return [(event_type, data) for event_type, data, _ in independently(chunks)[1]]


line_end = st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"])
text_value = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12).map(str.encode)
binary_value = st.binary(max_size=12).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))
odd_value = st.sampled_from(
    [
        b"",
        b" ",
        b"  x ",
        b":",
        b": x",
        b"data: x",
        b"\0",
        BOM,
        b"a\xe2\x80\xa8b\xe2\x80\xa9c\xc2\x85\x0b\x0c\x1c",
        b"\xe2\x80",
    ]
)
value = text_value | binary_value | odd_value
field_name = st.sampled_from(
    [b"data"] * 5 + [b"event"] * 3 + [b"id", b"retry", b"", b"Data", b" data", b"data2", b"event "]
)
separator = st.sampled_from([b": ", b": ", b":", b":  ", b"", b" : ", b":\t"])
line = st.builds(lambda *parts: b"".join(parts), field_name, separator, value, line_end)
fields_stream = st.lists(line | line_end, max_size=24).map(b"".join)
tokens = [b"\n", b"\n", b"\r", b"\r\n", b"data", b"data:", b"data: ", b"event: ", b"id: ", b":", b" ", b"x", b"\0"]
tokens += [BOM, b"\xef", b"\xbb", b"\xbf", b"\xe2\x80\xa8", b"\xff", b"\xf0\x9f\x98", "\U0001f600".encode()]
token_stream = st.lists(st.sampled_from(tokens), max_size=40).map(b"".join)
streams = st.builds(
    lambda bom, body, rest: bom + body + rest,
    st.sampled_from([b"", b"", BOM, BOM + BOM, BOM[:2]]),
    fields_stream | token_stream | st.binary(max_size=60),
    value,
)
# Places beyond a short stream's end make empty chunks, which must not matter either.
places = st.lists(st.integers(0, 400), max_size=8)


def cut_within(stream: bytes, at: list[int]) -> list[bytes]:
    return cut(stream, [min(place, len(stream)) for place in at])


@PROPERTY
@given(stream=streams, ours=places, theirs=places)
@example(stream=b"data: x\r", ours=[], theirs=[])
@example(stream=b"data: x\n\r", ours=[8], theirs=[])
@example(stream=b"data: x\r\r\n", ours=[8, 9], theirs=[9])
@example(stream=b"\r\ndata: x\n\n", ours=[1], theirs=[1])
@example(stream=BOM + b"data: x\n\n", ours=[1, 2, 3], theirs=[2])
@example(stream=b"event: a\n\ndata: x\n\n", ours=[9], theirs=[])
@example(stream=b"event: \ndata: \n\n", ours=[], theirs=[])
def test_any_stream_gives_what_another_parser_makes_of_it(stream: bytes, ours: list[int], theirs: list[int]) -> None:
    expected = their_events(cut_within(stream.removeprefix(BOM), theirs))
    assert seen(parse(*cut_within(stream, ours))) == expected


@PROPERTY
@given(stream=streams, at=places)
def test_any_stream_gives_the_same_in_any_split(stream: bytes, at: list[int]) -> None:
    whole = parse(stream)
    assert parse(*cut_within(stream, at)) == whole
    assert parse(*single_bytes(stream)) == whole


@PROPERTY
@given(stream=streams, at=places, limit=st.integers(len(BOM), 30))
@example(stream=b"data: 1234\n\n", at=[11], limit=10)
def test_any_stream_meets_the_bound_at_the_same_event_in_any_split(stream: bytes, at: list[int], limit: int) -> None:
    lines = stream.removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    *blocks, rest = lines.split(b"\n\n")
    too_large = any(len(block) > limit for block in blocks) or len(rest.removesuffix(b"\n")) > limit
    whole = outcome(stream, limit=limit)
    assert whole[1] == too_large
    assert outcome(*cut_within(stream, at), limit=limit) == whole
    assert outcome(*single_bytes(stream), limit=limit) == whole


@PROPERTY
@given(stream=streams)
def test_any_event_is_safe_to_put_into_a_frame(stream: bytes) -> None:
    """The relay writes an event's lines and its own `id:` as they are: no line in them may be anything else."""
    for event_type, body in parse(stream):
        assert b"\r" not in body
        first, *others = body.split(b"\n")
        if first.startswith(b"event: "):
            assert first == b"event: " + event_type
            assert others
        else:
            assert event_type == b""
            others.insert(0, first)
        assert all(other.startswith(b"data: ") for other in others)
        assert data_of(body) == b"\n".join(other[6:] for other in others)
        framed = body + b"\nid: s.1\n\n"
        assert parse(framed) == [(event_type, body)]


one_line = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)
noise = st.sampled_from(["", "", ":", ": c", "id: 1", "retry: 5", "unknown: data", "unknown"])


@PROPERTY
@given(
    data=st.data(),
    events=st.lists(st.tuples(one_line, st.lists(one_line, min_size=1, max_size=3)), max_size=6),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    at=places,
)
def test_any_events_written_in_any_style_are_read_back(
    data: st.DataObject, events: list[tuple[str, list[str]]], end: str, at: list[int]
) -> None:
    """The third witness, which shares no code with either parser: what was written."""

    def field(name: str, text: str) -> str:
        return f"{name}: {text}" if text.startswith(" ") or data.draw(st.booleans()) else f"{name}:{text}"

    written = []
    for event_type, texts in events:
        block = [field("event", event_type)] if event_type or data.draw(st.booleans()) else []
        block += [field("data", text) for text in texts]
        block.insert(data.draw(st.integers(0, len(block))), data.draw(noise) or ":")
        written += [*block, "", *[""] * data.draw(st.integers(0, 2))]
    stream = "".join(text + end for text in written).encode()
    assert seen(parse(*cut_within(stream, at))) == [
        (event_type or "message", "\n".join(texts)) for event_type, texts in events
    ]


# --- what we send -------------------------------------------------------------------------------------------------


def test_frame_has_its_id_last_and_one_blank_line() -> None:
    assert frame("end", '{"a":1}', "s.3") == b'event: end\ndata: {"a":1}\nid: s.3\n\n'


def test_frame_without_id_moves_no_cursor() -> None:
    assert frame("reconnect", "{}") == b"event: reconnect\ndata: {}\n\n"


def test_frame_cut_anywhere_before_its_last_byte_but_one_shows_no_id() -> None:
    """Some clients note an id as soon as they have read its line: a cut event must not have shown it."""
    whole = frame("end", "{}", "s.3")
    for at in range(len(whole) - 1):
        complete_lines = whole[:at].split(b"\n")[:-1]
        assert not any(text.startswith(b"id:") for text in complete_lines), at


def test_opening_lines_are_not_closed() -> None:
    assert opening(2000, "s.7") == b"retry: 2000\nid: s.7\n"


def test_heartbeat_is_one_comment_line_that_is_not_closed() -> None:
    assert HEARTBEAT.startswith(b":")
    assert HEARTBEAT.endswith(b"\n")
    assert HEARTBEAT.count(b"\n") == 1


def test_response_of_ours_is_read_by_the_other_parser_as_its_events_alone() -> None:
    """No event of its own for the opening lines or for a heartbeat, wherever it stands between frames."""
    frames = [frame("a", "1", "s.8"), frame("reconnect", "{}"), frame("end", "2", "s.9")]
    body = opening(2000, "s.7") + HEARTBEAT + (2 * HEARTBEAT).join(frames) + HEARTBEAT
    assert independently([body]) == (2000, [("a", "1", "s.8"), ("reconnect", "{}", "s.8"), ("end", "2", "s.9")])
    assert seen(parse(body)) == [("a", "1"), ("reconnect", "{}"), ("end", "2")]


@pytest.mark.parametrize(
    ("body", "data"),
    [
        (b"data: x", b"x"),
        (b"data: ", b""),
        (b"event: a\ndata: x", b"x"),
        (b"event: \ndata: x", b"x"),
        (b"event: data: y\ndata: x", b"x"),
        (b"event: a\ndata:  x ", b" x "),
        (b"event: a\ndata: x\ndata: \ndata: data: y", b"x\n\ndata: y"),
        (b"data: event: a\ndata: x", b"event: a\nx"),
        (b"data: \ndata: ", b"\n"),
    ],
)
def test_data_of_lines_is_their_values_joined(body: bytes, data: bytes) -> None:
    assert data_of(body) == data


# --- whole frames of a stream -------------------------------------------------------------------------------------

# What an answer may spell that looks like the end of a frame, or like `end`.
texts = st.sampled_from(["", "x", "s.2", r"\n\nid: s.99.77\n\n", "event: end", "id: s.1", "\u2028id: s.3\u2028\u2028"])


@st.composite
def whole_frames(draw: st.DrawFn) -> list[tuple[int, str, bytes]]:
    """Of each its number, its data and the frame. Numbers grow, and may have holes; some have several data lines."""
    frames = []
    seq = 0
    for step in draw(st.lists(st.sampled_from([1, 1, 1, 2, 9, 10**9]), min_size=1, max_size=30)):
        seq += step
        data, event_type = draw(texts), draw(st.sampled_from(["a", "end", "event: end"]))
        lines = draw(st.sampled_from(["", f"data: {data}\n"]))
        body = f"event: {event_type}\ndata: {data}\n{lines}id: fqBYVm-1A.{seq}\n\n".encode()
        frames.append((seq, data + ("\n" + data if lines else ""), body))
    return frames


@PROPERTY
@given(whole_frames())
def test_last_frame_is_known_by_its_number_its_data_and_whether_it_is_the_end(
    frames: list[tuple[int, str, bytes]],
) -> None:
    together = b"".join(body for _, _, body in frames)
    seq, data, body = frames[-1]
    assert last_seq_of(together) == seq
    assert last_data(together) == data.encode()
    assert is_end(together) is body.startswith(b"event: end\n")


@PROPERTY
@given(frames=whole_frames(), data=st.data())
def test_frames_behind_a_number_are_all_that_have_a_greater_one(
    frames: list[tuple[int, str, bytes]], data: st.DataObject
) -> None:
    """Also where no frame has that number."""
    together = b"".join(body for _, _, body in frames)
    # Those that are there, what their digits end with, and any other one.
    numbers = {int(str(number)[at:]) for number, _, _ in frames for at in range(len(str(number)))}
    seq = data.draw(st.sampled_from(sorted(numbers)) | st.integers(0, 2 * 10**9))
    rest = b"".join(body for number, _, body in frames if number > seq)
    assert together[offset_after(together, seq) :] == rest


@PROPERTY
@given(frames=whole_frames(), at=st.integers(0, 30), limit=st.integers(1, 2000))
def test_frames_are_cut_where_as_many_end_as_fit_but_at_least_one(
    frames: list[tuple[int, str, bytes]], at: int, limit: int
) -> None:
    bodies = [body for _, _, body in frames]
    at = min(at, len(bodies) - 1)
    fitting = [count for count in range(len(bodies) - at + 1) if len(b"".join(bodies[at : at + count])) <= limit]
    expected = b"".join(bodies[: at + max(1, fitting[-1])])
    assert cut_at(b"".join(bodies), len(b"".join(bodies[:at])), limit) == len(expected)


# --- the end of a body that is whole ------------------------------------------------------------------------------


def finished(*chunks: bytes) -> list[RawEvent]:
    """The events of a whole body: those that a blank line ends, and the one that its end does."""
    parser = Parser(LARGE)
    return [event for chunk in chunks for event in parser.feed(chunk)] + parser.finish()


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("missing", [1, 2])
def test_last_event_is_taken_without_its_blank_line_or_its_line_end(line_end: str, missing: int) -> None:
    lines = ["event: a", "data: 1", "", "event: b", "data: 2", "data: 3", "", ""]
    stream = line_end.join(lines[: len(lines) - missing]).encode()
    for at in range(len(stream) + 1):
        assert finished(stream[:at], stream[at:]) == [
            (b"a", b"event: a\ndata: 1"),
            (b"b", b"event: b\ndata: 2\ndata: 3"),
        ]


@pytest.mark.parametrize(
    "stream",
    [b"", b"\n", b"\r", b"data: 1\n\n", b"event: a", b"event: a\n", b": comment", b"id: 1\n", BOM, BOM[:2], b"\n\n"],
)
def test_end_of_a_body_ends_no_event_where_there_is_none(stream: bytes) -> None:
    parser = Parser(LARGE)
    parser.feed(stream)
    assert parser.finish() == []


def test_byte_order_mark_is_no_part_of_an_event_that_the_end_ends() -> None:
    assert finished(*single_bytes(BOM + b"data: 1")) == [(b"", b"data: 1")]


@PROPERTY
@given(
    stream=st.lists(
        st.sampled_from([b"data: 1", b"data:", b"event: a", b"id: 3", b": c", b"x", b"\n", b"\r", b"\r\n", b"\xef"]),
        max_size=12,
    ).map(b"".join),
    places=st.lists(st.integers(0, 60), max_size=6),
)
def test_whole_body_has_the_events_that_a_blank_line_more_would_give(stream: bytes, places: list[int]) -> None:
    """Of any stream, however it was split: its end is what two line ends would have been."""
    expected = parse(stream + (b"\n\n" if not stream.endswith(b"\r") else b"\r\r"))
    assert finished(*cut(stream, [min(place, len(stream)) for place in places])) == expected
