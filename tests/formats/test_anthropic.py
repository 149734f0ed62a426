"""The Messages API: marks, usage, what is whole, what is merged, and what of a request's headers goes on."""

from __future__ import annotations

import asyncio
import json
import os
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from rawclient import Frame, joined, mergeable, parse

from aisse.errors import RequestError
from aisse.formats.anthropic import Anthropic
from aisse.formats.format import Mark
from aisse.settings import Settings
from aisse.sse import Parser, frame

SOAK = os.environ.get("TESTS_SOAK") == "1"
FORMAT = Anthropic(Settings())
compact = FORMAT.compact
ALIEN = "A" * 22


def none_used() -> dict[str, int]:
    return {"input_tokens": 0, "output_tokens": 0}


def observe(stream: bytes, usage: dict[str, int] | None = None) -> list[Mark]:
    """The marks of a stream's events, which come as the parser gives them."""
    follower = FORMAT.follow(none_used() if usage is None else usage)
    return [follower.observe(event_type, body) for event_type, body in Parser(1 << 20).feed(stream)]


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
    assert usage == none_used()


@pytest.mark.parametrize("data", [b'{"error":{"message":"m"}}', b'{"error":"m"}'])
def test_event_without_a_type_that_has_an_error_is_one(data: bytes) -> None:
    assert observe(b"data: " + data + b"\n\n") == [Mark.ERROR]


def test_event_whose_error_is_none_is_content() -> None:
    assert observe(b'data: {"error":null,"text":"x"}\n\n') == [Mark.CONTENT]


@pytest.mark.parametrize(("data", "whole"), [(b"{}", True), (b'{"a":1', False), (b"", False), (b"[" * 9999, False)])
def test_event_at_the_end_of_a_body_is_told_from_half_of_one(data: bytes, whole: bool) -> None:
    assert FORMAT.follow(none_used()).is_whole(data) is whole


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
    FORMAT.follow(usage).observe(b"message_delta", b'event: message_delta\ndata: {"usage":{"output_tokens":3}}')
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


def sse(seq: int, data: str, kind: str = "content_block_delta") -> bytes:
    return frame(kind, data, f"{ALIEN}.{seq}")


def text(value: str, index: int = 0) -> str:
    """A text delta whose text is `value` as JSON spells it."""
    return f'{{"type":"content_block_delta","index":{index},"delta":{{"type":"text_delta","text":"{value}"}}}}'


def thinking(value: str, index: int = 0) -> str:
    return f'{{"type":"content_block_delta","index":{index},"delta":{{"type":"thinking_delta","thinking":"{value}"}}}}'


def compacted(*data: str) -> list[tuple[str, int]]:
    frames = parse(compact(b"".join(sse(seq, item) for seq, item in enumerate(data, 1)))).frames
    return [(item.data, item.seq) for item in frames]


def test_run_becomes_one_event_with_the_last_id() -> None:
    assert compacted(text("a"), text("b"), text("c")) == [(text("abc"), 3)]
    assert compacted(thinking("a"), thinking("b")) == [(thinking("ab"), 2)]


def test_blocks_and_kinds_break_runs() -> None:
    assert compacted(text("a"), text("b", 1), text("c", 1)) == [(text("a"), 1), (text("bc", 1), 3)]
    assert compacted(thinking("a"), text("b"), text("c")) == [(thinking("a"), 1), (text("bc"), 3)]
    assert compacted(text("a", 1), text("b", 11)) == [(text("a", 1), 1), (text("b", 11), 2)]


@pytest.mark.parametrize(
    "between",
    [
        '{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"x"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"input_json_delta","partial_json":"{"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"citations_delta","citation":{}}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"x","more":1}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"x"},"more":1}',
        '{"type":"content_block_delta","index":0,"delta":{"text":"x","type":"text_delta"}}',
        '{"type":"content_block_delta","index":-1,"delta":{"type":"text_delta","text":"x"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"x"}} ',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"x',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":null}}',
        "not json",
        "",
    ],
)
def test_other_events_stay_as_they_are_and_break_runs(between: str) -> None:
    assert compacted(text("a"), text("b"), between, text("c"), text("d")) == [
        (text("ab"), 2),
        (between, 3),
        (text("cd"), 5),
    ]


def test_events_of_other_types_break_runs() -> None:
    ping = sse(3, '{"type": "ping"}', "ping")
    same = sse(3, text("x"), "something_else")
    for other in (ping, same):
        frames = sse(1, text("a")) + sse(2, text("b")) + other + sse(4, text("c"))
        assert compact(frames) == sse(2, text("ab")) + other + sse(4, text("c"))


@pytest.mark.parametrize("spaced", [0, 1])
def test_event_of_several_data_lines_or_of_none_named_stays(spaced: int) -> None:
    odd = [
        b'event: content_block_delta\ndata: {"type":"content_block_delta",\ndata: "index":0}\nid: %b.3\n\n',
        b"data: " + text("x").encode() + b"\nid: %b.3\n\n",
    ][spaced] % ALIEN.encode()
    frames = sse(1, text("a")) + sse(2, text("b")) + odd + sse(4, text("c"))
    assert compact(frames) == sse(2, text("ab")) + odd + sse(4, text("c"))


def test_escapes_and_surrogates_survive_the_seam() -> None:
    assert compacted(text(r"\ud83e"), text(r"\udde0")) == [(text(r"\ud83e\udde0"), 2)]
    assert compacted(text(r"\\"), text("u0041")) == [(text(r"\\u0041"), 2)]
    assert compacted(text(r"a\""), text(r"\"b")) == [(text(r"a\"\"b"), 2)]
    assert compacted(text("é\u2028"), text("\N{BRAIN}"), text(r"\n\u0000")) == [(text("é\u2028\N{BRAIN}\\n\\u0000"), 3)]
    assert compacted(text(""), text("")) == [(text(""), 2)]
    assert compacted(text('\\"}}'), text("x")) == [(text('\\"}}x'), 2)]


def test_spaces_of_python_servers_are_understood() -> None:
    data = [json.dumps(json.loads(text(letter))) for letter in "ab"]
    assert compacted(*data) == [(json.dumps(json.loads(text("ab"))), 2)]


def test_merged_event_stays_below_what_clients_bound() -> None:
    frames = parse(compact(b"".join(sse(seq, text("x" * 1000)) for seq in range(1, 301)))).frames
    assert 4 <= len(frames) <= 6
    assert max(len(item.data) for item in frames) < 70_000
    assert sum(len(json.loads(item.data)["delta"]["text"]) for item in frames) == 300_000
    assert frames[-1].seq == 300


def test_compacting_nothing_or_twice_changes_nothing() -> None:
    assert compact(b"") == b""
    once = compact(sse(1, text("a")) + sse(2, text("b")))
    assert compact(once) == once


# Characters, lone surrogates and what JSON escapes, spelt by either habit.
pieces = st.text(st.characters(exclude_categories=()) | st.sampled_from('"\\\n\r\t/ud8{}'), max_size=6)


@st.composite
def events(draw: st.DrawFn) -> tuple[str, str]:
    kind = draw(st.sampled_from(["text", "text", "text", "thinking", "thinking", "signature", "other", "stop"]))
    if kind == "stop":
        return "content_block_stop", '{"type":"content_block_stop","index":0}'
    if kind == "other":
        return "content_block_delta", draw(st.sampled_from(['{"type":"x"}', '{"index":0,"delta":{"text":"t"}}']))
    piece = draw(pieces)
    value = {
        "type": "content_block_delta",
        "index": draw(st.integers(0, 1)),
        "delta": {"type": f"{kind}_delta", kind: piece},
    }
    ascii_only = draw(st.booleans()) or any("\ud800" <= char <= "\udfff" for char in piece)
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    return "content_block_delta", json.dumps(value, ensure_ascii=ascii_only, separators=separators)


@settings(max_examples=2_000 if SOAK else 200, deadline=None, derandomize=not SOAK)
@given(st.lists(events(), max_size=30))
def test_compact_is_the_same_to_who_adds_it_up(sequence: list[tuple[str, str]]) -> None:
    frames = b"".join(sse(seq, data, kind) for seq, (kind, data) in enumerate(sequence, 1))
    before, after = parse(frames).frames, parse(compact(frames)).frames

    def added_up(items: list[Frame]) -> dict[tuple[int, str], bytes]:
        return joined([item for item in items if mergeable(item)])

    assert added_up(after) == added_up(before)
    # The order of blocks and of everything else is that of before, runs of one block taken together.
    positions = [item.seq for item in after]
    assert positions == sorted(set(positions))
    assert set(positions) <= {item.seq for item in before}
    assert [item for item in after if not mergeable(item)] == [item for item in before if not mergeable(item)]
    # At every id that a client can be left with it has added up the same.
    for count, item in enumerate(after, 1):
        assert added_up(after[:count]) == added_up(before[: item.seq])


# --- questions: test_document has what is checked of their bodies -------------------------------------------------


@pytest.mark.parametrize(
    ("question", "model", "most_tokens"),
    [({}, "m", 7), ({"model": "other", "max_tokens": 5}, "other", 5), ({"model": None, "max_tokens": None}, "m", 7)],
)
def test_question_says_its_model_and_what_its_answer_may_cost(
    question: dict[str, Any], model: str, most_tokens: int
) -> None:
    asked = asyncio.run(
        Anthropic(Settings(model="m", max_tokens=7)).ask(
            json.dumps({"messages": [{"role": "user", "content": "x"}], **question}).encode()
        )
    )
    assert (asked.model, asked.most_tokens, asked.most_tokens_field) == (model, most_tokens, "max_tokens")


def test_betas_are_the_only_header_that_goes_on() -> None:
    anthropic = Anthropic(Settings(allow_betas=("a", "b")))
    assert anthropic.passed_on(CIMultiDict({"Authorization": "x", "x-api-key": "x", "Cookie": "x"})) == {}
    fields = CIMultiDict([("Anthropic-Beta", "a"), ("anthropic-beta", " b,,a")])
    assert anthropic.passed_on(fields) == {"anthropic-beta": "a,b"}
    with pytest.raises(RequestError, match="c is not allowed here"):
        anthropic.passed_on(CIMultiDict({"anthropic-beta": "a,c"}))


def test_every_question_has_the_version_of_the_api_and_the_key_if_there_is_one() -> None:
    assert FORMAT.headers(None) == {"anthropic-version": "2023-06-01"}
    assert FORMAT.headers("k") == {"anthropic-version": "2023-06-01", "x-api-key": "k"}
