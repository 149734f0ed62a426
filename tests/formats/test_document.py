"""What is passed on of a question: all of what was checked, and nothing that is no JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisse.errors import RequestError
from aisse.formats.anthropic import Anthropic
from aisse.routes.intake import Look
from aisse.settings import Settings

FORMAT = Anthropic(Settings(model="m", max_tokens=7, allow_fields=("open",)))
DEFAULTS = {"model": "m", "max_tokens": "7", "stream": True}


def run(body: bytes) -> tuple[tuple[bytes | memoryview, ...], list[float]]:
    """What is sent for a body, and for how long others got their turns meanwhile. Raises RequestError."""
    look = Look()
    look.at(body)
    look.end()
    return run_on(bytearray(body))


def run_on(body: bytearray) -> tuple[tuple[bytes | memoryview, ...], list[float]]:
    turns: list[float] = []

    async def sleep(delay_s: float) -> None:
        turns.append(delay_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        try:
            FORMAT.ask(body).send(None)
        except StopIteration as done:
            return done.value.pieces, turns
    raise AssertionError


def sent(body: bytes) -> bytes:
    return b"".join(run(body)[0])


def no_json(text: str) -> None:
    raise ValueError(text)


def exact(data: bytes) -> Any:
    """JSON as the standard library has it, numbers as they are written, or ValueError."""
    return json.loads(data.decode(), parse_int=str, parse_float=str, parse_constant=no_json)


TEXTS = st.text(st.sampled_from('\\\\"",[{:]}x/é\n\x00\U0001f9e0\u2028'), max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    TEXTS | NUMBERS | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=3)
CONTENTS = TEXTS.filter(bool) | st.lists(OBJECTS, min_size=1, max_size=3)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": CONTENTS})
QUESTIONS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=3)},
    optional={
        "system": CONTENTS,
        "tools": st.lists(OBJECTS, max_size=3),
        "metadata": OBJECTS | st.none(),
        "thinking": OBJECTS,
        "output_config": OBJECTS,
        "temperature": st.floats(0, 2),
        "top_k": st.integers(0, 10**18),
        "max_tokens": st.integers(1, 64_000),
        "stop_sequences": st.lists(TEXTS, max_size=3),
        "service_tier": TEXTS,
        "stream": st.just(value=True),
        "open": VALUES,
    },
)
SPACES = st.text(" \n\r\t", max_size=3)


@given(QUESTIONS, st.booleans(), SPACES, SPACES)
def test_good_question_is_passed_on_by_value(asked: dict[str, Any], ascii_only: bool, one: str, two: str) -> None:
    text = json.dumps(asked, ensure_ascii=ascii_only, separators=(one + "," + two, two + ":" + one))
    body = (one + text + two).encode()
    given = {name: value for name, value in exact(body).items() if value is not None}
    assert exact(sent(body)) == {**DEFAULTS, **given}


MARKS = st.sampled_from(
    [*'"\\{}[]:,0-.eEtfn \n\x00', "null", "NaN", "1e", "01", "\\u", "\\ud800", '","model":"x', "}", "]}", '":', "é"]
).map(str.encode) | st.binary(min_size=1, max_size=2)
MISTAKES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3), MARKS | st.just(b"")), min_size=1, max_size=3)


@given(QUESTIONS, MISTAKES)
def test_whatever_is_passed_on_is_one_document_with_the_values_that_came(
    asked: dict[str, Any], mistakes: list[tuple[int, int, bytes]]
) -> None:
    """A value that were not whole could close the object that is built around it, and add what nobody checked."""
    body = json.dumps(asked).encode()
    for place, dropped, added in mistakes:
        start = place % (len(body) + 1)
        body = body[:start] + added + body[start + dropped :]
    try:
        said = sent(body)
    except RequestError:
        return
    # Of a field that comes twice the last counts, as in json.
    given = {name: value for name, value in exact(body).items() if value is not None}
    assert exact(said) == {**DEFAULTS, **given}


@pytest.mark.parametrize("place", ["messages", "metadata", "open", "system"])
@pytest.mark.parametrize(
    "value",
    [
        *(
            '"\x01"',
            '"\\x"',
            '"\\u12"',
            '"\\ud800"',
            '"\\udc00"',
            '"\\ud800\\ud800"',
            '"\\ud83d\\n"',
            '{"\\ud800":1}',
            '"',
        ),
        *("01", "-", "-01", "1.", ".5", "1e", "1e+", "+1", "0x1", "NaN", "-Infinity", "1_0"),
        *("tru", "nul", "True", "[1,]", "[,1]", "[1 2]", '{"a":1,}', '{"a"}', "{1:2}", '{"a":}', "[1}", '{"a":1]'),
        *("[1],\x0b[2]", "\u00a01", "//x\n1", "'x'", '"a\nb"', '"\\U0041"', '1]}]}],"model":["x"'),
    ],
)
def test_value_that_is_no_json_is_refused_wherever_it_is_passed_on(place: str, value: str) -> None:
    fields = {
        "messages": '[{"role":"user","content":[{"a":%s}]}]',
        "metadata": '{"a":[%s]}',
        "open": "%s",
        "system": '[{"a":%s}]',
    }
    good = {"messages": '[{"role":"user","content":"x"}]'}
    members = {**good, place: fields[place] % value}
    body = "{" + ",".join(f'"{name}":{text}' for name, text in members.items()) + "}"
    with pytest.raises(RequestError) as refused:
        sent(body.encode())
    assert refused.value.status == 400


SIZE = 4 << 20


@pytest.mark.parametrize(
    ("members", "fewest"),
    [
        ('"messages":[{"role":"user","content":"' + "x" * SIZE + '"}]', 3),
        ('"messages":[{"role":"user","content":[{"a":"' + "x" * SIZE + '"}]}]', 3),
        ('"messages":[' + ",".join(['{"role":"user","content":"x"}'] * 10_000) + "]", 15),
        ('"system":[' + ",".join(['{"type":"text","text":"a text"}'] * 10_000) + "]", 2),
        ('"tools":[{"a":"' + "x" * SIZE + '"}],"system":"' + "x" * SIZE + '"', 3),
        ('"stop_sequences":["' + "x" * SIZE + '"],"tools":[{"a":"' + "x" * SIZE + '"}]', 3),
    ],
    ids=["text", "block", "messages", "system", "tools", "stop_sequences"],
)
def test_others_get_a_turn_between_any_two_passes(members: str, fewest: int) -> None:
    """Each pass takes as long as it takes msgspec to pass over the bytes once: 45 ms for the worst 32 MiB."""
    body = "{" + members + ("" if "messages" in members else ',"messages":[{"role":"user","content":"x"}]') + "}"
    turns = run(body.encode())[1]
    assert len(turns) >= fewest
    # An answer takes several turns of the loop: with a turn of one each, it would wait for several passes.
    assert turns[0] > 0


def test_small_question_is_checked_in_one_go() -> None:
    assert run(b'{"messages":[{"role":"user","content":"x"}]}') == (
        (b'{"model":"m","max_tokens":7,"stream":true,"messages":[{"role":"user","content":"x"}]}',),
        [],
    )


def test_text_of_a_long_question_is_not_copied() -> None:
    body = bytearray(b'{"messages":[{"role":"user","content":"' + b"x" * SIZE + b'"}]}')
    (text,) = (piece for piece in run_on(body)[0] if len(piece) > 1000)
    assert isinstance(text, memoryview)
    body[100] = ord("y")
    assert bytes(text[:100]).count(b"y") == 1


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (10_001, "messages"),
        (10_000, None),
    ],
)
def test_messages_are_taken_up_to_ten_thousand(messages: int, named: str | None) -> None:
    body = b'{"messages":[' + b",".join([b'{"role":"user","content":[{}]}'] * messages) + b"]}"
    if named is None:
        assert sent(body).count(b'"role"') == messages
    else:
        with pytest.raises(RequestError) as refused:
            sent(body)
        assert (refused.value.field, refused.value.message) == (named, "must have at most 10000 items")


@pytest.mark.parametrize(
    ("member", "named", "most"),
    [
        ('"tools":[%s]', "tools", 1000),
        ('"system":[%s]', "system", 10_000),
        ('"stop_sequences":[%s]', "stop_sequences", 1000),
    ],
)
@pytest.mark.parametrize("excess", [0, 1])
def test_lists_are_taken_up_to_their_lengths(member: str, named: str, most: int, excess: int) -> None:
    items = ",".join(['""' if named == "stop_sequences" else "{}"] * (most + excess))
    body = f'{{"messages":[{{"role":"user","content":"x"}}],{member % items}}}'.encode()
    if excess:
        with pytest.raises(RequestError) as refused:
            sent(body)
        assert refused.value.field == named
    else:
        assert items.encode() in sent(body)


def test_error_quotes_no_content() -> None:
    """Of a name that is unknown it repeats the beginning, which is how it can be found."""
    secret = "canary"
    for members in (
        f'"messages":[{{"role":"{secret}","content":"x"}}]',
        f'"messages":[{{"role":"user","content":["{secret}"]}}]',
        f'"messages":"{secret}"',
        f'"model":"{secret} x"',
        f'"max_tokens":"{secret}"',
        f'"temperature":"{secret}"',
        f'"stream":"{secret}"',
        f'"tools":["{secret}"]',
        f'"metadata":{{"a":{secret}}}',
        f'"thinking":"{secret}"',
    ):
        body = members if "messages" in members else members + ',"messages":[{"role":"user","content":"x"}]'
        with pytest.raises(RequestError) as refused:
            sent(f"{{{body}}}".encode())
        assert secret not in str(refused.value)


def test_half_of_a_surrogate_pair_is_named_where_the_parser_speaks_of_an_early_end() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        sent(b'{"messages":[{"role":"user","content":"\\ud83d"}]}')
