"""What upstreams say of their errors, whatever the shape."""

from __future__ import annotations

import json

import pytest

from aisse.formats.errors import Said, error_of


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
