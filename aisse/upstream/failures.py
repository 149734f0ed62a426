"""What a failure of the upstream is: a status and words for the client, a cause for the operator, and no secret.

Clients get UpstreamError's `status`, `kind` and `message`. The log and /health get its `cause`, which has only our own
words in it: what a library or an upstream says may quote a key or a prompt.
"""

from __future__ import annotations

import errno
import math
import re
import socket
import ssl
from typing import TYPE_CHECKING

import aiohttp

from aisse.errors import MESSAGE_CHARS, UpstreamError
from aisse.formats.errors import STATUS_OF_KIND

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aisse.formats.errors import Said

# What keys of any provider look like, and names of accounts. An upstream's message may quote one.
_KEY_LIKE = re.compile(
    r"(?i)\b(?:sk|pk|key|ezai|bearer|api[_-]?key)[-_ :=]+[A-Za-z0-9._~+/-]{8,}=*"
    r"|\b(?:org|proj|acct)[-_][A-Za-z0-9]{8,}|\b(?:AIza|AKIA|hf_|gh[a-z]_|gsk_|xai-)[A-Za-z0-9_-]{8,}|[A-Za-z0-9_-]{40,}"
)

# Seconds or a date (RFC 9110, section 10.2.3): nothing else gets through to clients. Some servers send fractions.
_RETRY_AFTER = re.compile(r"[0-9]{1,6}|[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")
_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")

# A request id comes from elsewhere and goes into the log. So it has to be one word, no longer than ids are.
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=+-]{0,63}")

_KEY_REFUSED = "the upstream did not accept this server's key"
_ACCOUNT_REFUSED = "the upstream does not serve this server's account at the moment"
_REQUEST_REFUSED = "the upstream does not take what this server sends"

# Providers also say this with the status and type of a client's mistake. These are sentences of theirs.
_ABOUT_CREDIT = re.compile(
    r"(?i)credit balance is too low|insufficient (?:account )?(?:balance|credits?|funds|quota)"
    r"|exceeded your current quota|specified (?:api )?usage limits|plans? (?:&|and) billing"
    r"|organization has been disabled|billing hard limit"
)
_ABOUT_KEY = re.compile(
    r"(?i)(?:invalid|incorrect|missing|expired) (?:x-)?api[ -]?key|api key (?:is )?(?:not valid|expired)"
)

# What frameworks say by themselves about a path that they do not have. Then the address is wrong, not the model.
_NOTHING_NAMED = re.compile(r"(?i)(?:(?:404[ :]*)?(?:page |route |path |resource )?not found[.!]?|cannot post /.*)?")

# Only the operator can mend these: the address, the method, what we accept and the headers are ours.
_OURS_TO_MEND = frozenset({405, 406, 407, 411, 415, 417, 421, 426, 431})

# What becomes of an upstream's status, or of its error's type. Every other status from 500 on becomes 502. 522 and 524
# are Cloudflare's timeouts; 408 says that our request did not arrive in time.
_OUR_STATUS = {408: 504, 503: 503, 504: 504, 522: 504, 524: 504, 529: 503}

# Some proxies answer a client's mistake with 500. Clients would repeat it if we passed it on as a 5xx.
_CLIENTS_TO_MEND = frozenset({"invalid_request_error", "not_found_error", "request_too_large"})


def refusal(status: int, headers: Mapping[str, str], said: Said, key: str | None) -> UpstreamError:
    """The error that an upstream's answer is, by its status and by what its body says, as far as that was read."""
    error = _error(status, said, key)
    if error.status in {429, 503}:
        error.retry_after = retry_after(headers)
    if status == 404 and _NOTHING_NAMED.fullmatch(said.message):
        error.cause = "answered 404 without saying of what; its URL may be wrong"
    return error


def said_in_success(headers: Mapping[str, str], said: Said, key: str | None) -> UpstreamError:
    """The error that an answer with status 200 is which is no event stream: what its body says, with its status."""
    if not said.message and said.kind is None and said.status is None:
        return UpstreamError(
            "api_error",
            "the upstream answered with something else than a stream",
            cause="answered with something else than an event stream",
            upstream_status=200,
        )
    error = said_error(said, key)
    error.upstream_status = 200
    if error.status in {429, 503}:
        error.retry_after = retry_after(headers)
    return error


def said_error(said: Said, key: str | None) -> UpstreamError:
    """The error that was said without a status of its own: in an `error` event, or under status 200."""
    status = said.status or STATUS_OF_KIND.get(said.kind or "", 500)
    error = _error(status, said, key)
    error.upstream_status = None
    if error.cause == f"failed with {status}":
        error.cause = "failed, as it says"
    return error


def _error(status: int, said: Said, key: str | None) -> UpstreamError:
    kind = said.kind
    if (account := _account(status, kind, said.message)) is not None:
        message, cause = account
        return UpstreamError("api_error", message, upstream_status=status, cause=cause)
    if 300 <= status < 400:
        message = "the upstream redirects; set its final address"
        return UpstreamError("api_error", message, upstream_status=status, cause="redirects; set its final address")
    ours = _OUR_STATUS.get(status, 502 if status in _OURS_TO_MEND or not 400 <= status < 500 else status)
    if status >= 500 and ours == 502 and kind in _CLIENTS_TO_MEND:
        ours = STATUS_OF_KIND[kind]
    if kind is None or ours == 504 or status in _OURS_TO_MEND:
        # None of an upstream's own words: it goes into the log.
        kind = _kind_of_status(status, ours)
    said_text = _REQUEST_REFUSED if status in _OURS_TO_MEND else cleaned(said.message, key)
    text = said_text or f"the upstream answered with status {status}"
    return UpstreamError(kind, text, ours, upstream_status=status, cause=_cause_of_status(status, ours))


def _account(status: int, kind: str | None, message: str) -> tuple[str, str] | None:
    """The words for clients and the cause for the operator, if the error is about this server's account or key."""
    doubtful = status in {400, 403, 422, 429}
    if status == 402 or kind == "billing_error" or (doubtful and _ABOUT_CREDIT.search(message)):
        return _ACCOUNT_REFUSED, "account without credit, or past its limit"
    if status in {401, 403} or kind in {"authentication_error", "permission_error"}:
        return _KEY_REFUSED, "key not permitted" if 403 in {status, STATUS_OF_KIND.get(kind or "")} else "key refused"
    if doubtful and _ABOUT_KEY.search(message):
        return _KEY_REFUSED, "key refused"
    return None


def _kind_of_status(status: int, ours: int) -> str:
    if status in {404, 413, 429, 529}:
        return {404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error"}[
            status
        ]
    if ours == 504:
        return "timeout_error"
    return "invalid_request_error" if 400 <= ours < 500 else "api_error"


def _cause_of_status(status: int, ours: int) -> str | None:
    """The cause for the operator; None where only the client can mend it."""
    if status == 429:
        return "rate limit reached"
    if status in {503, 529}:
        return "overloaded"
    if ours == 504:
        return "timed out, as it says"
    if status in _OURS_TO_MEND:
        return f"refuses requests as such with {status}; its URL may be wrong"
    if ours < 500:
        return None
    return f"failed with {status}" if status >= 500 else f"answered with {status}"


def retry_after(headers: Mapping[str, str]) -> str | None:
    """`Retry-After` as clients may get it. `retry-after-ms` counts before it, and fractions are rounded up."""
    milliseconds = headers.get("retry-after-ms", "")
    if _DECIMAL.fullmatch(milliseconds):
        return str(math.ceil(float(milliseconds) / 1000))
    given = headers.get("Retry-After", "")
    if _RETRY_AFTER.fullmatch(given):
        return given
    return str(math.ceil(float(given))) if _DECIMAL.fullmatch(given) and float(given) < 1e6 else None


def request_id(headers: Mapping[str, str], key: str | None) -> str | None:
    """The upstream's name for a request, for its support. None if that is no plain name, or has our key in it."""
    for name in ("request-id", "x-request-id"):
        found = headers.get(name, "")
        if _REQUEST_ID.fullmatch(found) and (key is None or key not in found):
            return found
    return None


def cleaned(text: str, key: str | None) -> str:
    """An upstream's words as a client may see them: one line, shortened, without what looks like a key."""
    if key is not None:
        text = text.replace(key, "[removed]")
    text = _KEY_LIKE.sub("[removed]", "".join(c if c.isprintable() else " " for c in text[: 8 * MESSAGE_CHARS]))
    return text if len(text) <= MESSAGE_CHARS else text[: MESSAGE_CHARS - 1] + "…"


# --- connections ----------------------------------------------------------------------------------------------

_BY_ERRNO = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "connection reset",
    errno.ECONNABORTED: "connection reset",
    errno.EPIPE: "connection reset",
    errno.ETIMEDOUT: "timed out connecting",
    errno.ENETUNREACH: "network unreachable",
    errno.ENETDOWN: "network unreachable",
    errno.EHOSTUNREACH: "host unreachable",
    errno.EHOSTDOWN: "host unreachable",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.EADDRNOTAVAIL: "no local port free",
    errno.EACCES: "connection not permitted",
    errno.EPERM: "connection not permitted",
}

# X509_V_ERR_* of OpenSSL, x509_vfy.h.
_BY_VERIFY_CODE = {
    9: "certificate not yet valid",
    10: "certificate expired",
    18: "certificate not trusted (self-signed)",
    19: "certificate not trusted (its authority is unknown)",
    20: "certificate not trusted (its authority is unknown)",
    21: "certificate not trusted (its chain is incomplete)",
    23: "certificate revoked",
    62: "certificate for another name",
    64: "certificate for another address",
}


def unreachable(error: BaseException) -> str:
    """Why a request got no answer, in our words. The first exception in the chain that tells decides."""
    words = next((word for link in _chain(error) if (word := _word(link)) is not None), "connection failed")
    return f"proxy: {words}" if isinstance(error, aiohttp.ClientProxyConnectionError) else words


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, aiohttp.ClientConnectorError):
            yield link.os_error  # it tells more than aiohttp's own exception
        yield link
        link = link.__cause__ or link.__context__


def _word(error: BaseException) -> str | None:
    match error:
        case aiohttp.ConnectionTimeoutError():
            return "timed out connecting"
        case ssl.SSLCertVerificationError(verify_code=int(code)):
            return _BY_VERIFY_CODE.get(code, "certificate not accepted")
        case aiohttp.ClientConnectorDNSError():
            # Resolvers say whether a name does not exist or cannot be looked up at the moment.
            later = getattr(error.os_error, "errno", None) == socket.EAI_AGAIN
            return "name not found: the name server does not answer" if later else "name not found"
        case aiohttp.ClientHttpProxyError(status=int(status)):
            return f"proxy refused with {status}"
        case aiohttp.ClientResponseError():
            return "answered with something that is not HTTP"
        case aiohttp.ServerDisconnectedError():
            return "connection closed before an answer"
        case ssl.SSLError():
            plain = getattr(error, "reason", None) in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}
            return "TLS failed: it does not speak TLS on that port" if plain else "TLS failed"
        case OSError(errno=int(number)) if number in _BY_ERRNO:
            return _BY_ERRNO[number]
        case ConnectionResetError() | BrokenPipeError():
            return "connection reset"
        case _:
            return None
