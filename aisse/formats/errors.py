"""What upstreams say of their errors in the field, in whatever shape, and which of our kinds that is."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from aisse.formats.document import object_in

STATUS_OF_KIND = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""The kinds of error that clients are told of, and the status that each stands for.

Both are those of the Messages API: https://docs.anthropic.com/en/api/errors.
"""


def _bare(word: str) -> str:
    return re.sub("[^a-z]", "", word.lower()).removesuffix("error")


# What other servers call these kinds, without case, punctuation and a last "error": OpenAI and its many likes
# (https://platform.openai.com/docs/guides/error-codes), vLLM and LiteLLM (names of Python's exceptions), Google.
_KINDS = {_bare(kind): kind for kind in STATUS_OF_KIND} | {
    "badrequest": "invalid_request_error",
    "contextlengthexceeded": "invalid_request_error",
    "contextwindowexceeded": "invalid_request_error",
    "contentpolicyviolation": "invalid_request_error",
    "contentfilter": "invalid_request_error",
    "invalidargument": "invalid_request_error",
    "invalidprompt": "invalid_request_error",
    "invalidvalue": "invalid_request_error",
    "missingrequiredparameter": "invalid_request_error",
    "stringabovemaxlength": "invalid_request_error",
    "unprocessableentity": "invalid_request_error",
    "unsupportedparameter": "invalid_request_error",
    "unsupportedvalue": "invalid_request_error",
    "validation": "invalid_request_error",
    "modelnotfound": "not_found_error",
    "invalidapikey": "authentication_error",
    "unauthenticated": "authentication_error",
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "permissiondenied": "permission_error",
    "accountdeactivated": "billing_error",
    "billinghardlimitreached": "billing_error",
    "billingnotactive": "billing_error",
    "insufficientbalance": "billing_error",
    "insufficientcredits": "billing_error",
    "insufficientquota": "billing_error",
    "paymentrequired": "billing_error",
    "payloadtoolarge": "request_too_large",
    "requests": "rate_limit_error",
    "ratelimitexceeded": "rate_limit_error",
    "resourceexhausted": "rate_limit_error",
    "throttling": "rate_limit_error",
    "tokens": "rate_limit_error",
    "toomanyrequests": "rate_limit_error",
    "internal": "api_error",
    "internalserver": "api_error",
    "server": "api_error",
    "engineoverloaded": "overloaded_error",
    "serveroverloaded": "overloaded_error",
    "serviceunavailable": "overloaded_error",
    "unavailable": "overloaded_error",
    "deadlineexceeded": "timeout_error",
    "requesttimeout": "timeout_error",
}


class Said(NamedTuple):
    """What an upstream says of an error."""

    message: str = ""
    """Empty where it has none."""
    kinds: tuple[str, ...] = ()
    """Codes and types in the upstream's own words, the one that says most first."""
    status: int | None = None
    """An HTTP status that its JSON carries."""

    @property
    def kind(self) -> str | None:
        """One of `STATUS_OF_KIND`: the first that one of `kinds` stands for. None where none of them does."""
        return next((kind for word in self.kinds if (kind := _KINDS.get(_bare(word))) is not None), None)


# Where the words stand, in the order of what says most: the Messages API and OpenAI, FastAPI, OAuth, RFC 9457.
_INNER = ("error", "errors", "detail", "message")
_WORDS = ("message", "msg", "detail", "error_description", "error_message", "error", "title", "reason")
_NESTING = 8
_LISTED = 3

# How much of a plain text's first line is taken. More is a traceback, or a page.
_LINE_CHARS = 200

# The words in JSON that was cut off, because we do not read an error to its end: FastAPI quotes the whole request
# behind its words.
_CUT_WORDS = re.compile(r'"(?:message|msg|detail|error)" ?: ?"((?:[^"\\]|\\.)*+)"')


def error_of(payload: bytes) -> Said:
    """What `payload` says, whatever its shape: the body of an error, or the data of an event. It never raises.

    `{"type": "error", "error": {"type", "message"}}` is the Messages API's own. In the field there are also
    `{"error": "text"}`, `{"detail": ...}`, `{"message": ...}`, lists of these, errors inside errors, and plain text.
    Nothing is made up: a page of HTML says nothing.
    """
    text = payload.decode(errors="replace").removeprefix("\ufeff").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _said_as_text(text)
    return _said(value, _NESTING)


def _said_as_text(text: str) -> Said:
    if text.startswith(("{", "[")):
        found = _CUT_WORDS.search(text)
        return Said(_unescaped(found[1])) if found else Said()
    line = text.partition("\n")[0].strip()
    # A page, or no text at all. The status says more.
    if text.startswith("<") or not line.replace("\t", " ").isprintable() or "\ufffd" in line:
        return Said()
    if len(line) > _LINE_CHARS:
        # It is cut between two words: half of a key would not be recognised as one.
        line = line[:_LINE_CHARS].rpartition(" ")[0]
    return Said(line)


def _unescaped(spelt: str) -> str:
    try:
        text: str = json.loads(f'"{spelt}"')
    except ValueError:
        return ""
    return text


def _said(value: Any, depth: int) -> Said:
    if depth == 0:
        return Said()
    if isinstance(value, str):
        # Gateways put the error that they were told into a string.
        inner = object_in(value.encode(errors="replace")) if value.lstrip().startswith("{") else None
        return _said(inner, depth - 1) if inner else Said(value.strip())
    if isinstance(value, list):
        found = [_said(item, depth - 1) for item in value[:_LISTED]]
        message = "; ".join(said.message for said in found if said.message)
        return found[0]._replace(message=message) if found else Said()
    if isinstance(value, dict):
        return _said_by_object(value, depth)
    return Said()


def _said_by_object(value: dict[str, Any], depth: int) -> Said:
    kinds = tuple(word for name in ("code", "type", "status") if isinstance(word := value.get(name), str) and word)
    numbers = (value.get(name) for name in ("status", "code", "status_code", "statusCode"))
    status = next((number for number in numbers if type(number) is int and 400 <= number < 600), None)
    for name in _INNER:
        if isinstance(value.get(name), dict | list):
            inner = _said(value[name], depth - 1)
            if inner.message or inner.kinds:
                message = inner.message or _words(value, depth).message
                return Said(message, inner.kinds + kinds, inner.status or status)
    words = _words(value, depth)
    if isinstance(error := value.get("error"), str) and words.message != error.strip():
        kinds = (error, *kinds)  # OAuth has a word for machines beside one for people
    return Said(words.message, words.kinds + kinds, words.status or status)


def _words(value: dict[str, Any], depth: int) -> Said:
    for name in _WORDS:
        if isinstance(text := value.get(name), str) and text.strip():
            said = _said(text, depth - 1)
            # What pydantic says of a field means nothing without the field's name.
            where = value.get("loc")
            if isinstance(where, list) and said.message:
                path = ".".join(str(part) for part in where if isinstance(part, str | int) and part != "body")
                said = said._replace(message=f"{path}: {said.message}" if path else said.message)
            return said
    return Said()
