"""What an upstream's failure becomes: a status and words for its client, a cause for the operator."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import ssl
from typing import Any, cast

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aisse.errors import MESSAGE_CHARS
from aisse.formats.errors import error_of
from aisse.upstream.failures import cleaned, refusal, request_id, retry_after, said_error, said_in_success, unreachable

SOAK = os.environ.get("TESTS_SOAK") == "1"
PROPERTY = settings(max_examples=5_000 if SOAK else 300)

KEY = "sk-canary-5f0e7d"
NO_KEY = "the upstream did not accept this server's key"
NO_ACCOUNT = "the upstream does not serve this server's account at the moment"


def error_json(message: str, kind: str = "", code: str = "") -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "code": code}}).encode()


# --- whose fault it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", range(400, 500))
def test_mistake_of_a_client_is_never_a_5xx(status: int) -> None:
    """But for what a client has no part in: the account, the address, the headers."""
    error = refusal(status, {}, error_of(error_json("what is wrong")), KEY)
    if status in {401, 402, 403, 405, 406, 407, 408, 411, 415, 417, 421, 426, 431}:
        assert error.status == (504 if status == 408 else 502)
        assert error.cause
        assert "what is wrong" not in error.message or status == 408
    else:
        assert error.status == status
        assert error.cause == ("rate limit reached" if status == 429 else None)
        assert error.message == "what is wrong"


ACCOUNT = [
    (401, error_json("Incorrect API key provided: sk-abc", "invalid_request_error", "invalid_api_key"), NO_KEY),
    (401, b"", NO_KEY),
    (403, error_json("Your key may not use this model", "permission_error"), NO_KEY),
    (402, b'{"error":{"message":"Insufficient Balance","code":"invalid_request_error"}}', NO_ACCOUNT),
    (402, b"", NO_ACCOUNT),
    # under a client's status
    (
        400,
        error_json("Your credit balance is too low to access the Anthropic API.", "invalid_request_error"),
        NO_ACCOUNT,
    ),
    (400, error_json("You have reached your specified API usage limits.", "invalid_request_error"), NO_ACCOUNT),
    (400, error_json("This organization has been disabled.", "invalid_request_error"), NO_ACCOUNT),
    (400, error_json("API key not valid. Please pass a valid API key.", "INVALID_ARGUMENT"), NO_KEY),
    (400, error_json("no", "invalid_request_error", "billing_hard_limit_reached"), NO_ACCOUNT),
    (429, error_json("You exceeded your current quota", "insufficient_quota", "insufficient_quota"), NO_ACCOUNT),
    (429, b'{"error":"You exceeded your current quota, please check your plan and billing details"}', NO_ACCOUNT),
    (403, b'{"detail":"insufficient credits"}', NO_ACCOUNT),
    (500, error_json("no", "authentication_error"), NO_KEY),
]


@pytest.mark.parametrize(("status", "payload", "message"), ACCOUNT, ids=range(len(ACCOUNT)))
def test_what_concerns_the_account_is_told_to_the_operator_and_not_to_strangers(
    status: int, payload: bytes, message: str
) -> None:
    error = refusal(status, {"Retry-After": "3"}, error_of(payload), KEY)
    assert (error.status, error.kind, error.message, error.retry_after) == (502, "api_error", message, None)
    assert error.upstream_status == status
    assert error.cause is not None
    assert ("key" in error.cause) is (message == NO_KEY)
    assert ("account" in error.cause) is (message == NO_ACCOUNT)


@pytest.mark.parametrize(
    ("kind", "ours"), [("invalid_request_error", 400), ("NotFoundError", 404), ("request_too_large", 413)]
)
def test_mistake_of_a_client_that_is_said_under_500_is_a_4xx(kind: str, ours: int) -> None:
    """Clients would ask the same ten times more."""
    error = refusal(500, {}, error_of(error_json("what is wrong", kind)), KEY)
    assert (error.status, error.upstream_status, error.message) == (ours, 500, "what is wrong")
    assert refusal(500, {}, error_of(error_json("m", "server_error")), KEY).status == 502


@pytest.mark.parametrize(
    "message",
    [
        "tools.0.name: 'billing' must match pattern",
        "max_tokens exceeds the quota of this model",
        "messages: the balance field is unknown",
        "the key 'api' is missing",
    ],
)
def test_mistake_of_a_client_that_sounds_like_money_stays_its_own(message: str) -> None:
    assert refusal(400, {}, error_of(error_json(message)), KEY).status == 400


@pytest.mark.parametrize(
    ("kind", "code", "status", "ours"),
    [
        ("invalid_request_error", "", 400, "invalid_request_error"),
        ("BadRequestError", "", 400, "invalid_request_error"),
        ("invalid_request_error", "context_length_exceeded", 400, "invalid_request_error"),
        ("invalid_request_error", "model_not_found", 404, "not_found_error"),
        ("NotFoundError", "", 404, "not_found_error"),
        ("request_too_large", "", 413, "request_too_large"),
        ("tokens", "rate_limit_exceeded", 429, "rate_limit_error"),
        ("RateLimitError", "", 429, "rate_limit_error"),
        ("RESOURCE_EXHAUSTED", "", 429, "rate_limit_error"),
        ("server_error", "", 502, "api_error"),
        ("Internal Server Error", "", 502, "api_error"),
        ("api_error", "", 502, "api_error"),
        ("overloaded_error", "", 503, "overloaded_error"),
        ("engine_overloaded", "", 503, "overloaded_error"),
        ("timeout_error", "", 504, "timeout_error"),
        ("insufficient_quota", "", 502, "api_error"),
        ("authentication_error", "", 502, "api_error"),
        ("invented_error", "", 502, "api_error"),
        ("", "", 502, "api_error"),
    ],
)
def test_error_without_a_status_has_that_of_its_type(kind: str, code: str, status: int, ours: str) -> None:
    """In an `error` event, and under status 200."""
    what = error_of(error_json("m", kind, code))
    event = said_error(what, KEY)
    assert (event.status, event.kind, event.upstream_status) == (status, ours, None)
    body = said_in_success({"Retry-After": "3"}, what, KEY)
    assert (body.status, body.kind, body.upstream_status) == (status, ours, 200)
    assert body.retry_after == ("3" if status in {429, 503} else None)
    assert (event.cause is None) is (400 <= status < 429)


@pytest.mark.parametrize(("said", "ours"), [(400, 400), (404, 404), (429, 429), (500, 502), (503, 503), (401, 502)])
@pytest.mark.parametrize("name", ["code", "status", "status_code"])
def test_error_without_a_status_may_have_one_in_its_json(name: str, said: int, ours: int) -> None:
    what = error_of(json.dumps({"error": {"message": "m", name: said}}).encode())
    assert said_in_success({}, what, None).status == ours


@pytest.mark.parametrize("payload", [b"", b"<html>", b'{"type":"message","content":[]}', b'{"choices":[]}', b"[]"])
def test_success_that_says_no_error_is_no_stream(payload: bytes) -> None:
    error = said_in_success({}, error_of(payload), KEY)
    assert (error.status, error.message) == (502, "the upstream answered with something else than a stream")
    assert error.cause == "answered with something else than an event stream"


def test_answer_404_that_names_nothing_is_told_to_the_operator_too() -> None:
    """A wrong base URL looks like this."""
    assert refusal(404, {}, error_of(b"<html>not here</html>"), None).cause is not None
    for said in ("Not Found", "404 page not found\n", "Cannot POST /v1/v1/messages", error_json("Not found")):
        payload = said if isinstance(said, bytes) else said.encode()
        for body in (payload, json.dumps({"detail": payload.decode()}).encode()):
            assert refusal(404, {}, error_of(body), None).cause is not None
    for body in (b"model llama9 not found", error_json("model: x")):
        assert refusal(404, {}, error_of(body), None).cause is None


# --- Retry-After --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("milliseconds", "given", "expected"),
    [
        ("1500", None, "2"),
        ("1000", None, "1"),
        ("1", None, "1"),
        ("0", None, "0"),
        ("250.5", None, "1"),
        ("1500", "7", "2"),
        ("soon", "7", "7"),
        ("-1", "7", "7"),
        ("", "7", "7"),
        ("1e9", None, None),
        (None, "7", "7"),
        (None, "0.2", "1"),
        (None, "7.0", "7"),
        (None, "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 GMT"),
        (None, "99999999", None),
        (None, "7; evil", None),
        (None, None, None),
    ],
)
def test_retry_after_is_whole_seconds_and_milliseconds_count_first(
    milliseconds: str | None, given: str | None, expected: str | None
) -> None:
    headers = {"retry-after-ms": milliseconds, "Retry-After": given}
    assert retry_after({name: value for name, value in headers.items() if value is not None}) == expected


# --- ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["request-id", "x-request-id"])
@pytest.mark.parametrize("found", ["req_011CSHoEeqs5C35K2UUqR7Fy", "0af7651916cd43dd-8448eb211c80319c", "a", "x" * 64])
def test_request_id_is_what_the_upstream_sent(name: str, found: str) -> None:
    assert request_id({name: found}, KEY) == found


@pytest.mark.parametrize("found", ["", " ", "a b", "a\tb", "ä", "x" * 65, '"a"', "a\x1b[31m", "-a", KEY, f"req_{KEY}"])
def test_request_id_that_is_none_does_not_get_into_the_log(found: str) -> None:
    assert request_id({"request-id": found}, KEY) is None
    assert request_id({"request-id": found, "x-request-id": "b"}, KEY) == "b"


# --- why nobody answers -------------------------------------------------------------------------------------------


def connector_error(error: OSError, kind: type[aiohttp.ClientConnectorError] = aiohttp.ClientConnectorError) -> Any:
    return kind(cast("Any", ("host", 443, True, True, None, None, None, None)), error)


def certificate_error(code: int) -> OSError:
    error = ssl.SSLCertVerificationError(1, "secret")
    error.verify_code = code
    return error


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (connector_error(OSError(errno.ECONNREFUSED, "secret")), "connection refused"),
        (connector_error(OSError(errno.ENETUNREACH, "secret")), "network unreachable"),
        (connector_error(OSError(errno.EHOSTUNREACH, "secret")), "host unreachable"),
        (connector_error(OSError(errno.EMFILE, "secret")), "too many open files"),
        (connector_error(OSError(errno.EADDRNOTAVAIL, "secret")), "no local port free"),
        (connector_error(OSError("secret")), "connection failed"),
        (
            connector_error(OSError(errno.ECONNREFUSED, "x"), aiohttp.ClientProxyConnectionError),
            "proxy: connection refused",
        ),
        (
            connector_error(socket.gaierror(socket.EAI_NONAME, "secret"), aiohttp.ClientConnectorDNSError),
            "name not found",
        ),
        (
            connector_error(socket.gaierror(socket.EAI_AGAIN, "secret"), aiohttp.ClientConnectorDNSError),
            "name not found: the name server does not answer",
        ),
        (connector_error(OSError(None, "secret"), aiohttp.ClientConnectorDNSError), "name not found"),
        (connector_error(OSError(errno.EMFILE, "x"), aiohttp.ClientConnectorDNSError), "too many open files"),
        (
            connector_error(certificate_error(10), aiohttp.ClientConnectorCertificateError),
            "certificate expired",
        ),
        (
            connector_error(certificate_error(62), aiohttp.ClientConnectorCertificateError),
            "certificate for another name",
        ),
        (
            connector_error(certificate_error(999), aiohttp.ClientConnectorCertificateError),
            "certificate not accepted",
        ),
        (connector_error(ssl.SSLError(1, "secret"), aiohttp.ClientConnectorSSLError), "TLS failed"),
        (aiohttp.ConnectionTimeoutError("secret"), "timed out connecting"),
        (aiohttp.ServerDisconnectedError("secret"), "connection closed before an answer"),
        (aiohttp.ClientOSError(errno.ECONNRESET, "secret"), "connection reset"),
        (aiohttp.ClientOSError(errno.EPIPE, "secret"), "connection reset"),
        (aiohttp.ClientConnectionResetError("secret"), "connection reset"),
        (caused(aiohttp.ClientConnectionError("secret"), OSError(errno.ECONNRESET, "x")), "connection reset"),
        (aiohttp.ClientHttpProxyError(cast("Any", None), (), status=407, message="secret"), "proxy refused with 407"),
        (aiohttp.ClientResponseError(cast("Any", None), (), status=400), "answered with something that is not HTTP"),
        (aiohttp.ClientConnectionError("secret"), "connection failed"),
    ],
)
def test_cause_of_a_connection_that_failed_is_said_in_our_words(error: BaseException, words: str) -> None:
    assert unreachable(error) == words


def test_cause_that_is_its_own_cause_is_found_out() -> None:
    error = aiohttp.ClientConnectionError()
    error.__context__ = caused(ValueError(), error)
    assert unreachable(error) == "connection failed"


# --- anything -----------------------------------------------------------------------------------------------------


@PROPERTY
@given(
    status=st.integers(200, 599),
    payload=st.binary(max_size=60)
    | st.recursive(
        st.text(max_size=9) | st.just(KEY) | st.integers() | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["error", "message", "type", "code", "detail"]), inner, max_size=3)
        ),
        max_leaves=9,
    ).map(lambda value: json.dumps(value).encode()),
)
def test_nothing_that_an_upstream_says_gets_into_the_log_or_out_of_bounds(status: int, payload: bytes) -> None:
    """`kind`, `cause` and the status go into the log; the message is for a client, and has no key."""
    said = error_of(payload)
    errors = [said_error(said, KEY), said_in_success({}, said, KEY), refusal(status, {}, said, KEY)]
    for error in errors:
        assert 300 <= error.status < 600
        assert re.fullmatch(r"[a-z_]{1,30}", error.kind)
        assert error.cause is None or re.fullmatch(r"[A-Za-z0-9 ,;()]{1,80}", error.cause)
        assert error.status < 500 or error.cause
        assert KEY not in error.message
        assert error.message.isprintable()
        assert len(error.message) <= 500


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"a {KEY}{KEY} b",
        "in organization org-a1b2c3d4e5 on",
        "Bearer abcdefgh12345678",
        "x" * 40,
        "of AIzaSyA-" + "b1" * 15 + "b",
        "hf_" + "aB" * 17,
        "AKIA" + "A1" * 8,
    ],
)
def test_words_lose_what_looks_like_a_key(text: str) -> None:
    assert "[removed]" in cleaned(text, KEY)
    assert KEY not in cleaned(text, KEY)


@pytest.mark.parametrize("status", [400, 401, 404, 408, 422, 429, 500, 502, 503, 504, 529])
def test_time_to_wait_is_passed_on_only_where_waiting_helps(status: int) -> None:
    error = refusal(status, {"Retry-After": "7"}, error_of(b"{}"), None)
    assert error.retry_after == ("7" if error.status in {429, 503} else None)
    assert error.status not in {429, 503} or status in {429, 503, 529}


@pytest.mark.parametrize("key", ["sk-ant-REDACTED", "our own key 123456789"])
def test_key_that_lies_across_the_cut_leaves_no_part_of_it(key: str) -> None:
    for place in range(MESSAGE_CHARS - len(key) - 5, MESSAGE_CHARS + 5):
        text = ("ab " * MESSAGE_CHARS)[:place] + " " + key + " and more"
        said = cleaned(text, "our own key 123456789")
        assert len(said) <= MESSAGE_CHARS
        assert key[:6] not in said
