"""What every format promises to those who are given one: the contract of `formats/format.py`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from aisse.formats.format import OURS, RESERVED, Mark
from aisse.formats.known import FORMATS
from aisse.settings import Settings
from aisse.sse import Parser, frame

if TYPE_CHECKING:
    from aisse.formats.format import Format

SOAK = os.environ.get("TESTS_SOAK") == "1"
PROPERTY = settings(max_examples=5_000 if SOAK else 300)

each = pytest.mark.parametrize("wire_format", [make(Settings()) for make in FORMATS.values()], ids=list(FORMATS))


def none_used() -> dict[str, int]:
    return {"input_tokens": 0, "output_tokens": 0}


# Words that mean something in some format, so that what is made up comes close to it.
words = st.sampled_from(
    [
        *("", "message", "ping", "error", "end", "reconnect", "message_start", "message_delta", "message_stop"),
        *("content_block_delta", "content_block_start", "an_event_of_next_year"),
    ]
)
names = st.sampled_from(["type", "usage", "message", "error", "input_tokens", "output_tokens"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "[DONE]"])
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
payloads = values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)


@each
@PROPERTY
@given(events=st.lists(st.tuples(words, payloads), max_size=3))
def test_nothing_that_an_upstream_sends_raises_or_spoils_usage(
    wire_format: Format, events: list[tuple[str, bytes]]
) -> None:
    usage = none_used()
    follower = wire_format.follow(usage)
    for event_type, payload in events:
        lines = b"event: " + event_type.encode() + b"\n" if event_type else b""
        for raw in Parser(1 << 20).feed(lines + b"data: " + payload + b"\n\n"):
            assert isinstance(follower.observe(*raw), Mark)
        assert follower.is_whole(payload) in {True, False}
        assert follower.is_complete() in {True, False}
        said = wire_format.read_error(payload)
        assert isinstance(said.message, str)
        assert all(isinstance(kind, str) for kind in said.kinds)
        assert said.status is None or 400 <= said.status < 600
    assert usage.keys() == none_used().keys()
    assert all(type(count) is int and 0 <= count <= 2**53 for count in usage.values())


@each
@pytest.mark.parametrize("name", sorted(OURS))
@pytest.mark.parametrize("data", ["{}", "[DONE]", '{"type":"message_stop"}'])
def test_event_with_a_name_of_ours_is_not_passed_on(wire_format: Format, name: bytes, data: str) -> None:
    (event,) = Parser(1 << 10).feed(frame(name.decode(), data))
    assert wire_format.follow(none_used()).observe(*event) is RESERVED


@each
def test_answer_that_has_not_begun_is_not_complete(wire_format: Format) -> None:
    assert not wire_format.follow(none_used()).is_complete()


@each
def test_two_answers_are_followed_apart(wire_format: Format) -> None:
    assert wire_format.follow(none_used()) is not wire_format.follow(none_used())


@each
@PROPERTY
@given(events=st.lists(st.tuples(words.filter(bool), values.map(json.dumps)), max_size=9))
def test_compact_frames_are_whole_have_ids_that_were_there_and_stay_as_they_are(
    wire_format: Format, events: list[tuple[str, str]]
) -> None:
    frames = b"".join(frame(name, data, f"x.{seq}") for seq, (name, data) in enumerate(events, 1))
    compact = wire_format.compact(frames)
    assert wire_format.compact(compact) == compact
    ids = [block.rpartition(b"\nid: ")[2] for block in frames.split(b"\n\n")]
    left = [block.rpartition(b"\nid: ")[2] for block in compact.split(b"\n\n")]
    assert left == [one for one in ids if one in left]
    assert left[-2:] == ids[-2:]  # the last event's, and nothing after it


@each
@pytest.mark.parametrize("path", ["/", "/v1", "/a/v1/", "/a%2Fb"])
def test_endpoint_is_its_own(wire_format: Format, path: str) -> None:
    """An operator may give the whole of it as the base URL."""
    endpoint = wire_format.endpoint(path)
    assert endpoint.startswith("/")
    assert wire_format.endpoint(endpoint) == endpoint


@each
def test_key_goes_into_one_header_and_no_key_into_none(wire_format: Format) -> None:
    assert [value for value in wire_format.headers("sk-canary").values() if "sk-canary" in value] != []
    assert wire_format.headers(None).items() < wire_format.headers("sk-canary").items()


@each
def test_headers_of_a_client_that_is_a_stranger_do_not_go_on(wire_format: Format) -> None:
    """Its key or token is for this server, and goes no further."""
    fields = {"Authorization": "x", "x-api-key": "x", "Cookie": "x", "X-Forwarded-For": "x"}
    assert wire_format.passed_on(CIMultiDict(fields)) == {}
