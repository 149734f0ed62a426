"""What the relay learns from an event: marks, usage, errors."""

from __future__ import annotations

import json
import os
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aisse.formats.anthropic import AnthropicFormat, Mark, Said, compact, error_of, is_json
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
    assert error_of(b'{"error":%b}' % data).message == ""
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
    assert error_of(payload) == Said("Overloaded", ("overloaded_error", "error"))


@pytest.mark.parametrize(
    ("payload", "message", "kinds", "status"),
    [
        # Ollama, and what many write by hand
        ({"error": "model is required"}, "model is required", (), None),
        ({"error": "x", "message": "y"}, "y", ("x",), None),
        # OpenAI
        (
            {"error": {"message": "m", "type": "tokens", "param": None, "code": "rate_limit_exceeded"}},
            "m",
            ("rate_limit_exceeded", "tokens"),
            None,
        ),
        # vLLM
        ({"object": "error", "message": "m", "type": "BadRequestError", "code": 400}, "m", ("BadRequestError",), 400),
        ({"error": {"message": "m", "type": "NotFoundError", "code": 404}}, "m", ("NotFoundError",), 404),
        # FastAPI
        ({"detail": "m"}, "m", (), None),
        ({"detail": {"error": "m"}}, "m", (), None),
        (
            {"detail": [{"loc": ["body", "model"], "msg": "field required", "type": "missing"}]},
            "model: field required",
            ("missing",),
            None,
        ),
        (
            {"detail": [{"loc": ["body", "messages", 0], "msg": "a"}, {"msg": "b"}, {"msg": "c"}, {"msg": "d"}]},
            "messages.0: a; b; c",
            (),
            None,
        ),
        # NestJS, Spring
        ({"statusCode": 400, "message": ["a", "b"], "error": "Bad Request"}, "a; b", (), 400),
        ({"status": 404, "error": "Not Found", "path": "/v1"}, "Not Found", (), 404),
        # OAuth, RFC 9457, Google
        ({"error": "invalid_grant", "error_description": "m"}, "m", ("invalid_grant",), None),
        ({"type": "about:blank", "title": "t", "status": 403, "detail": "m"}, "m", ("about:blank",), 403),
        ({"title": "t", "status": 503}, "t", (), 503),
        (
            [{"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}}],
            "m",
            ("RESOURCE_EXHAUSTED",),
            429,
        ),
        # inside each other
        (
            {"type": "error", "error": {"type": "error", "error": {"type": "a", "message": "m"}}},
            "m",
            ("a", "error", "error"),
            None,
        ),
        ({"error": {"message": '{"error": {"type": "a", "message": "m"}}'}}, "m", ("a",), None),
        ({"error": {"message": {"error": "m"}, "code": 500}}, "m", (), 500),
        ({"errors": [{"message": "a"}, {"message": "b"}]}, "a; b", (), None),
        ({"errors": ["a"]}, "a", (), None),
        ({"message": "m"}, "m", (), None),
        ({"msg": "m"}, "m", (), None),
        ("m", "m", (), None),
        (["m"], "m", (), None),
    ],
)
def test_error_of_any_shape_in_the_field_is_understood(
    payload: object, message: str, kinds: tuple[str, ...], status: int | None
) -> None:
    assert error_of(json.dumps(payload).encode()) == Said(message, kinds, status)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"upstream connect error\nreset reason: overflow", "upstream connect error"),
        (b"  no healthy upstream\r\n", "no healthy upstream"),
        (b"\xef\xbb\xbfa", "a"),
        (b"x " * 101, ("x " * 100).strip()),
        # cut where it was too long or too slow
        (
            b'{"detail":[{"type":"missing","loc":["body"],"msg":"Field \\"a\\" required","input":{"x":"',
            'Field "a" required',
        ),
        (b'{"error":{"type":"a","message":"b"}', "b"),
        (b'{"error":{"type":"a","message":"b', ""),
        (b'{"input":"message: x', ""),
        # cut between words, for the last one may be a key
        (b"x " * 95 + b"y" * 30, ("x " * 95).strip()),
        (b"y" * 201, ""),
        (b"y" * 200, "y" * 200),
        # no words at all
        (b"", ""),
        (b"{}", ""),
        (b"[]", ""),
        (b"null", ""),
        (b"7", ""),
        (b'{"error":null}', ""),
        (b'{"error":{"type":"a"}}', ""),
        (b'{"error":{"type":"a","message":null}}', ""),
        (b'{"error":{"type":1,"message":7}}', ""),
        (b"<html>502 Bad Gateway</html>", ""),
        (b"\n <!DOCTYPE html>", ""),
        (b"\x1f\x8b\x08\x00", ""),
        (b"\xff\xfe text", ""),
        (b"a\x00b", ""),
    ],
)
def test_error_that_is_no_json_is_its_first_line_or_nothing(payload: bytes, message: str) -> None:
    assert error_of(payload).message == message


def test_error_nested_without_end_says_nothing() -> None:
    value: dict[str, object] = {"message": "m"}
    for _ in range(50):
        value = {"error": value}
    assert error_of(json.dumps(value).encode()) == Said()


def test_error_that_quotes_the_question_does_not_show_it() -> None:
    """FastAPI's validation errors have the whole input beside the words."""
    detail = [{"type": "missing", "loc": ["body"], "msg": "Field required", "input": {"messages": "private"}}]
    whole = json.dumps({"detail": detail}).encode()
    for size in range(len(whole) + 1):
        assert "private" not in error_of(whole[:size]).message


@pytest.mark.parametrize("data", [b'{"error":{"message":"m"}}', b'{"error":"m"}'])
def test_event_without_a_type_that_has_an_error_is_one(data: bytes) -> None:
    assert observe(b"data: " + data + b"\n\n") == [Mark.ERROR]


def test_event_whose_error_is_none_is_content() -> None:
    assert observe(b'data: {"error":null,"text":"x"}\n\n') == [Mark.CONTENT]


@pytest.mark.parametrize(("data", "whole"), [(b"{}", True), (b'{"a":1', False), (b"", False), (b"[" * 9999, False)])
def test_json_is_told_from_half_of_it(data: bytes, whole: bool) -> None:
    assert is_json(data) is whole


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
    said = error_of(payload)
    assert isinstance(said.message, str)
    assert all(isinstance(kind, str) for kind in said.kinds)
    assert said.status is None or 400 <= said.status < 600
