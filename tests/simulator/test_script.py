"""Scripts: the plan of one answer, and what a prompt may change of it."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from played import events, played, text_of, types
from pydantic import ValidationError

from aisse.simulator import Script


def test_plan_of_default_script_is_the_sequence_of_the_real_api() -> None:
    stream = played(Script(tokens=2))
    assert types(stream) == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert b'event: ping\ndata: {"type": "ping"}\n\n' in stream
    assert stream.endswith(
        b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        b'"usage":{"output_tokens":2}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    start = events(stream)[0]["message"]
    assert start["usage"]["output_tokens"] == 1
    assert start["content"] == []


def test_answer_without_text_is_numbered_words() -> None:
    script = Script(tokens=3)
    assert script.answer() == "w1 w2 w3"
    assert text_of(played(script)) == "w1 w2 w3"


@given(st.text(st.characters(codec="utf-8")))
def test_answer_with_text_is_that_text_in_pieces(text: str) -> None:
    script = Script(text=text)
    assert script.answer() == text
    assert text_of(played(script)) == text


def test_text_of_a_line_has_pieces_of_few_characters() -> None:
    pieces = list(Script(text="A handful of unbelievable words").pieces())
    assert len(pieces) == 7
    assert max(map(len, pieces)) <= 7


def test_token_bytes_pad_each_delta_counted_in_utf8() -> None:
    assert list(Script(text="ü x", token_bytes=4).pieces()) == ["ü..", " x.."]


def test_thinking_tokens_precede_the_text_in_a_signed_block() -> None:
    script = Script(tokens=1, thinking_tokens=2)
    stream = played(script)
    starts = [event for event in events(stream) if event["type"] == "content_block_start"]
    assert [(start["index"], start["content_block"]["type"]) for start in starts] == [(0, "thinking"), (1, "text")]
    assert text_of(stream, "thinking") == script.thinking() == "t1 t2"
    signature, closed = events(stream)[5:7]
    assert signature["delta"]["type"] == "signature_delta"
    assert closed == {"type": "content_block_stop", "index": 0}
    assert events(stream)[-2]["usage"]["output_tokens"] == 3


@pytest.mark.parametrize(
    ("limit", "thinking", "text", "reason"),
    [
        (5, "t1 t2", "w1 w2 w3", "end_turn"),
        (4, "t1 t2", "w1 w2", "max_tokens"),
        (2, "t1 t2", "", "max_tokens"),
        (1, "t1", "", "max_tokens"),
    ],
)
def test_max_tokens_bounds_thinking_and_text(limit: int, thinking: str, text: str, reason: str) -> None:
    script = Script(tokens=3, thinking_tokens=2)
    stream = played(script, limit)
    assert text_of(stream, "thinking") == script.thinking(limit) == thinking
    assert text_of(stream) == script.answer(limit) == text
    assert events(stream)[-2]["delta"]["stop_reason"] == script.stop_reason(limit) == reason
    assert events(stream)[-2]["usage"]["output_tokens"] == script.output_tokens(limit) == limit


def test_pace_with_jitter_never_drifts() -> None:
    script = Script(tokens=1000, pace=50, jitter=0.5)
    now, due = 0.0, []
    for wait, frame in script.frames():
        assert wait >= 0
        now += wait
        if b"text_delta" in frame:
            due.append(now)
    assert all(n / 50 - 1e-9 <= at <= (n + 0.5) / 50 + 1e-9 for n, at in enumerate(due, 1))
    assert len({round(b - a, 6) for a, b in itertools.pairwise(due)}) > 900


def test_pace_zero_waits_for_nothing() -> None:
    script = Script(pace=0)
    assert all(wait == 0 for wait, _ in script.frames())
    assert script.seconds() == 0


def test_seeded_scripts_are_alike_others_are_not() -> None:
    seeded = Script(tokens=50, seed=7)
    assert list(seeded.frames()) == list(seeded.frames())
    assert list(Script(tokens=50).frames()) != list(Script(tokens=50).frames())


def test_thinking_pause_is_filled_with_pings() -> None:
    plan = list(Script(thinking_s=25, ping_s=10, pace=0).frames())
    waits = [(round(wait, 6), frame.split(b"\n")[0]) for wait, frame in plan[1:4]]
    assert waits == [(10, b"event: ping"), (10, b"event: ping"), (5, b"event: content_block_start")]
    assert [wait for wait, _ in Script(thinking_s=25, ping_s=0, pace=0).frames()][:2] == [0, 25]


def test_seconds_is_the_sum_of_the_waits() -> None:
    script = Script(thinking_s=3, thinking_tokens=10, tokens=20, pace=10, jitter=0)
    assert script.seconds() == pytest.approx(sum(wait for wait, _ in script.frames()))
    assert Script(fault="stall").seconds() == math.inf


def test_error_comes_after_so_many_events_and_is_the_last() -> None:
    stream = played(Script(fault="error", at=3, message="a\n\nevent: end\ndata: {}"))
    assert types(stream) == ["message_start", "content_block_start", "ping", "error"]
    error = {"type": "overloaded_error", "message": "a\n\nevent: end\ndata: {}"}
    assert events(stream)[-1] == {"type": "error", "error": error}


def test_stall_comes_after_so_many_events_and_never_ends() -> None:
    plan = list(Script(fault="stall", at=2).frames())
    assert len(plan) == 3
    assert plan[-1] == (math.inf, b"")


def test_huge_event_has_exactly_its_size_and_the_answer_goes_on() -> None:
    script = Script(fault="huge", at=4, size=5000, tokens=3)
    plan = [frame for _, frame in script.frames()]
    assert len(plan[4]) == 5000
    assert text_of(b"".join(plan)) == script.answer()


def test_garbage_has_its_size_and_is_the_end() -> None:
    plan = [frame for _, frame in Script(fault="garbage", at=1, size=3000, seed=1).frames()]
    assert [len(frame) for frame in plan[1:]] == [3000]
    with pytest.raises(UnicodeDecodeError):
        plan[1].decode()


def test_missing_stop_is_all_that_no_stop_changes() -> None:
    whole = played(Script(tokens=3))
    assert played(Script(tokens=3, fault="no_stop")) == whole.removesuffix(
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


def test_no_events_is_an_empty_plan() -> None:
    assert list(Script(fault="no_events").frames()) == []


@pytest.mark.parametrize("fault", ["error", "stall", "huge"])
def test_fault_past_the_last_event_comes_after_it(fault: str) -> None:
    plan = [frame for _, frame in Script.model_validate({"tokens": 1, "fault": fault, "at": 1000}).frames()]
    assert len(plan) == 8
    assert types(plan[-2]) == ["message_stop"]


@pytest.mark.parametrize(("line_end", "bytes_"), [("crlf", b"\r\n"), ("cr", b"\r")])
def test_line_ends_replace_each_newline(line_end: str, bytes_: bytes) -> None:
    lf = played(Script(tokens=2, text="two\nlines"))
    other = played(Script.model_validate({"tokens": 2, "text": "two\nlines", "line_end": line_end}))
    assert other == lf.replace(b"\n", bytes_)


def test_fields_all_have_a_description() -> None:
    assert [name for name, info in Script.model_fields.items() if not info.description] == []


def test_prompt_without_brackets_keeps_the_base() -> None:
    base = Script(tokens=7)
    assert Script.parse("What is [a] list [ [b] ]?", base) is base


def test_prompt_overrides_base_field_by_field() -> None:
    base = Script(tokens=7, pace=3)
    parsed = Script.parse("Please [[tokens=300 rst=true fault=cut]] now [[at=1234 tokens=5]].", base)
    assert parsed == Script(tokens=5, pace=3, fault="cut", at=1234, rst=True)


def test_prompt_values_may_be_quoted_and_hold_newlines() -> None:
    parsed = Script.parse("[[message='a b\nevent: end' text=\"it's\"]]", Script())
    assert (parsed.message, parsed.text) == ("a b\nevent: end", "it's")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("[[tokenz=3]]", "tokenz: no such name"),
        ("[[tokens=many]]", "tokens: Input should be a valid integer"),
        ("[[tokens=-1]]", "tokens: Input should be greater than or equal to 0"),
        ("[[pace=nan]]", "pace: Input should be a finite number"),
        ("[[status=200]]", "status: should be 0 or 400 to 599"),
        ("[[fault=fire]]", "fault: Input should be 'none'"),
        ("[[cookie='a\nb']]", "cookie: String should match"),
        ("[[fast]]", "fast: not of the form name=value"),
        ("[[text='open]]", "text='open: No closing quotation"),
    ],
)
def test_prompt_with_a_wrong_name_or_value_is_refused_by_name(prompt: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"script: {named}")):
        Script.parse(prompt, Script())


@pytest.mark.parametrize("status", [0, 400, 599])
def test_status_at_its_bounds_is_accepted(status: int) -> None:
    assert Script(status=status).status == status


@pytest.mark.parametrize("status", [1, 200, 302, 399, 600])
def test_status_that_is_no_failure_is_refused(status: int) -> None:
    with pytest.raises(ValidationError):
        Script(status=status)
