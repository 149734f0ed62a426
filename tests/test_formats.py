"""What the relay learns from an event: marks, usage, errors."""

from __future__ import annotations

import json
import os
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aisse.formats import AnthropicFormat, Mark, compact, error_of
from aisse.sse import Parser

SOAK = os.environ.get("TESTS_SOAK") == "1"
PROPERTY = settings(max_examples=5_000 if SOAK else 300)


def none_used() -> dict[str, int]:
    return {"input_tokens": 0, "output_tokens": 0}


def observe(stream: bytes, usage: dict[str, int] | None = None) -> list[Mark]:
    """The marks of a stream's events, which come as the parser gives them."""
    observed = AnthropicFormat(none_used() if usage is None else usage)
    return [observed.observe(event_type, body) for event_type, body in Parser(1 << 20).feed(stream)]


def event(event_type: str, data: Any) -> bytes:
    return f"event: {event_type}\ndata: {json.dumps(data)}\n\n".encode()


def unnamed(data: Any) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


MARKS = [
    ("message_start", Mark.CONTENT),
    ("content_block_start", Mark.CONTENT),
    ("content_block_delta", Mark.CONTENT),
    ("content_block_stop", Mark.CONTENT),
    ("message_delta", Mark.CONTENT),
    ("message_stop", Mark.END),
    ("ping", Mark.PING),
    ("end", Mark.RESERVED),
    ("reconnect", Mark.RESERVED),
    ("error", Mark.ERROR),
    ("an_event_of_next_year", Mark.CONTENT),
    ("", Mark.CONTENT),
    ("Ping", Mark.CONTENT),
    ("message_stop ", Mark.CONTENT),
]


# --- marks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("event_type", "mark"), MARKS)
def test_event_named_by_its_event_line_has_its_mark(event_type: str, mark: Mark) -> None:
    assert observe(event(event_type, {"type": event_type})) == [mark]


@pytest.mark.parametrize(("event_type", "mark"), MARKS)
def test_event_without_event_line_has_the_mark_that_its_data_names(event_type: str, mark: Mark) -> None:
    assert observe(unnamed({"type": event_type})) == [mark]
    # Which is what a client makes of it, and so the same.
    assert observe(event("message", {"type": event_type})) == [mark]


def test_event_whose_line_and_data_differ_goes_by_its_line() -> None:
    assert observe(event("ping", {"type": "message_stop"})) == [Mark.PING]
    assert observe(event("message_stop", {"type": "ping"})) == [Mark.END]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'"message_stop"', b"\xff\xfe", b"\0"])
def test_named_event_has_its_mark_whatever_its_data(data: bytes) -> None:
    for event_type, mark in MARKS[:-3]:
        assert observe(b"event: %b\ndata: %b\n\n" % (event_type.encode(), data)) == [mark]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[DONE]",
        b'{"type":"message_stop"',
        b'["message_stop"]',
        b'"message_stop"',
        b"null",
        b"NaN",
        b"1e999",
        b'{"type":null}',
        b'{"type":["message_stop"]}',
        b'{"type":{"message_stop":1}}',
        b'{"type":true}',
        b'{"type":"\\ud800"}',
        b'{"type":"\xff"}',
        b'{"kind":"message_stop"}',
        b"\xff\xfe{\0}\0",
    ],
)
def test_event_without_event_line_nor_readable_type_is_content(data: bytes) -> None:
    assert observe(b"data: " + data + b"\n\n") == [Mark.CONTENT]


def test_event_without_event_line_over_several_data_lines_is_read_as_one() -> None:
    assert observe(b'data: {\ndata: "type":\ndata: "message_stop"}\n\n') == [Mark.END]


@pytest.mark.parametrize("depth", [100, 900, 100_000])
@pytest.mark.parametrize("nest", ['{"type":%s}', '{"type":"message_stop","x":%s}', '{"message":{"usage":%s}}', "%s"])
def test_nesting_of_any_depth_is_survived(nest: str, depth: int) -> None:
    data = (nest % ("[" * depth + "]" * depth)).encode()
    usage = none_used()
    for event_type in (b"message_start", b"message_delta"):
        assert observe(b"event: %b\ndata: %b\n\n" % (event_type, data), usage) == [Mark.CONTENT]
    assert observe(b"data: %b\n\n" % data, usage)[0] in {Mark.CONTENT, Mark.END}
    assert error_of(b'{"error":%b}' % data)[0] in {"", "message_stop"}
    assert usage == none_used()


# --- usage --------------------------------------------------------------------------------------------------------


def start(usage: Any) -> bytes:
    return event("message_start", {"type": "message_start", "message": {"id": "msg_1", "usage": usage}})


def delta(usage: Any) -> bytes:
    return event("message_delta", {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage})


def used(stream: bytes) -> tuple[int, int]:
    usage = none_used()
    observe(stream, usage)
    assert usage.keys() == none_used().keys()
    return usage["input_tokens"], usage["output_tokens"]


def test_usage_begins_with_message_start() -> None:
    assert used(start({"input_tokens": 25, "output_tokens": 1})) == (25, 1)


def test_usage_of_message_delta_is_cumulative() -> None:
    """Later figures replace earlier ones; a figure that an event leaves out stays."""
    stream = (
        start({"input_tokens": 25, "output_tokens": 1}) + delta({"output_tokens": 7}) + delta({"output_tokens": 15})
    )
    assert used(stream) == (25, 15)


def test_usage_of_message_delta_may_correct_the_input() -> None:
    stream = start({"input_tokens": 25, "output_tokens": 1}) + delta({"input_tokens": 40, "output_tokens": 15})
    assert used(stream) == (40, 15)


def test_usage_is_taken_without_event_line_too() -> None:
    message_start = {"type": "message_start", "message": {"usage": {"input_tokens": 25, "output_tokens": 1}}}
    message_delta = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 15}}
    assert used(unnamed(message_start) + unnamed(message_delta)) == (25, 15)


def test_usage_goes_into_the_mapping_that_was_given() -> None:
    usage = none_used()
    observed = AnthropicFormat(usage)
    observed.observe(b"message_delta", b'event: message_delta\ndata: {"usage":{"output_tokens":3}}')
    assert usage == {"input_tokens": 0, "output_tokens": 3}


@pytest.mark.parametrize("event_type", ["content_block_delta", "content_block_start", "message_stop", "ping", "error"])
def test_usage_in_other_events_is_not_taken(event_type: str) -> None:
    figures = {"input_tokens": 5, "output_tokens": 5}
    assert used(event(event_type, {"usage": figures, "message": {"usage": figures}})) == (0, 0)


@pytest.mark.parametrize(
    "count",
    [-1, 1.5, 3.0, True, False, None, "3", [3], {"n": 3}, 2**53 + 1, float("nan"), pytest.param(10**4000, id="huge")],
)
def test_usage_that_is_no_count_changes_nothing(count: Any) -> None:
    before = start({"input_tokens": 25, "output_tokens": 1})
    assert used(before + start({"input_tokens": count, "output_tokens": count})) == (25, 1)
    assert used(before + delta({"input_tokens": count, "output_tokens": 2})) == (25, 2)


@pytest.mark.parametrize("count", [0, 1, 2**53])
def test_usage_at_the_ends_of_its_range_is_taken(count: int) -> None:
    assert used(start({"input_tokens": 7, "output_tokens": 7}) + delta({"output_tokens": count})) == (7, count)


@pytest.mark.parametrize("usage", [None, [], "usage", 3, True, {}, {"tokens": 3}])
def test_usage_of_a_wrong_type_changes_nothing(usage: Any) -> None:
    before = start({"input_tokens": 25, "output_tokens": 1})
    assert used(before + start(usage) + delta(usage)) == (25, 1)


@pytest.mark.parametrize(
    "data", ["[]", "null", '{"message":[]}', '{"message":"usage"}', "{", '{"usage":', "\ufffd", "1" * 5000]
)
@pytest.mark.parametrize("event_type", ["message_start", "message_delta"])
def test_usage_of_an_unreadable_event_changes_nothing(event_type: str, data: str) -> None:
    before = start({"input_tokens": 25, "output_tokens": 1})
    assert used(before + f"event: {event_type}\ndata: {data}\n\n".encode()) == (25, 1)


# --- errors -------------------------------------------------------------------------------------------------------


def test_error_has_type_and_message() -> None:
    payload = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"},"request_id":"req_1"}'
    assert error_of(payload) == ("overloaded_error", "Overloaded")


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"error":{"type":"a"}}', ("a", "")),
        (b'{"error":{"message":"b"}}', ("", "b")),
        (b'{"error":{"type":1,"message":["b"]}}', ("", "")),
        (b'{"error":{"type":"a","message":null}}', ("a", "")),
        (b'{"error":"b"}', ("", "")),
        (b'{"error":null}', ("", "")),
        (b'{"error":["a","b"]}', ("", "")),
        (b'{"type":"error","message":"b"}', ("", "")),
        (b"{}", ("", "")),
        (b"[]", ("", "")),
        (b"", ("", "")),
        (b"<html>502 Bad Gateway</html>", ("", "")),
        (b'{"error":{"type":"a","message":"b"}', ("", "")),
        (b'{"error":{"type":"\xff","message":"b"}}', ("", "")),
        (b"\x1f\x8b\x08\x00", ("", "")),
        ('{"error":{"type":"a","message":"\u00e4\u2028\\n"}}'.encode(), ("a", "\u00e4\u2028\n")),
    ],
)
def test_error_is_empty_where_it_is_missing(payload: bytes, expected: tuple[str, str]) -> None:
    assert error_of(payload) == expected


# --- compact ------------------------------------------------------------------------------------------------------


def text_delta(seq: int, text: bytes) -> bytes:
    """A frame that adds `text`, as JSON spells it."""
    data = b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%b"}}' % text
    return b"event: content_block_delta\ndata: %b\nid: %b.%d\n\n" % (data, b"A" * 22, seq)


@pytest.mark.parametrize(
    ("sizes", "merged"),
    [
        ([32 << 10, 32 << 10], [64 << 10]),
        ([32 << 10, (32 << 10) + 1], [32 << 10, (32 << 10) + 1]),
        ([1, 64 << 10], [1, 64 << 10]),
        ([64 << 10, 1], [64 << 10, 1]),
        ([64 << 10, 0], [64 << 10]),
        ([5, 1 << 20, 5, 5], [5, 1 << 20, 10]),
        ([30 << 10] * 5, [60 << 10, 60 << 10, 30 << 10]),
    ],
)
def test_no_more_than_64_kib_of_text_are_merged_into_one_event(sizes: list[int], merged: list[int]) -> None:
    frames = compact(b"".join(text_delta(seq, b"~" * size) for seq, size in enumerate(sizes, 1)))
    assert [event.count(b"~") for event in frames.split(b"\n\n")[:-1]] == merged


@pytest.mark.parametrize("escape", [rb"\n", rb"\u00e4", rb"ab\""])
def test_text_of_escapes_takes_no_memory_beside_its_copies(escape: bytes) -> None:
    frames = text_delta(1, escape * ((1 << 20) // len(escape)))
    tracemalloc.start()
    try:
        assert compact(frames) == frames
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(frames)


# --- anything -----------------------------------------------------------------------------------------------------


names = st.sampled_from(["type", "usage", "message", "error", "input_tokens", "output_tokens"])
known_types = st.sampled_from([event_type for event_type, _ in MARKS])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800"])
    | known_types,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
payloads = values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)


@PROPERTY
@given(event_type=known_types, payload=payloads, named=st.booleans())
def test_nothing_that_an_upstream_sends_raises_or_spoils_usage(event_type: str, payload: bytes, named: bool) -> None:
    usage = none_used()
    lines = b"event: " + event_type.encode() + b"\n" if named else b""
    for mark in observe(lines + b"data: " + payload + b"\n\n", usage):
        assert isinstance(mark, Mark)
    assert usage.keys() == none_used().keys()
    assert all(type(count) is int and 0 <= count <= 2**53 for count in usage.values())
    assert all(isinstance(text, str) for text in error_of(payload))
