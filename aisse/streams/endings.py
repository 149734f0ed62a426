"""How streams end: the reasons, what is said of each, and the frames that say it."""

from __future__ import annotations

import enum
import json

from aisse.errors import StreamError
from aisse.sse import frame, last_data


class Reason(enum.StrEnum):
    """Why a stream ended, as `end` says it."""

    COMPLETE = "complete"
    STOPPED = "stopped"
    ABANDONED = "abandoned"
    ERROR = "error"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    LIMIT = "limit"
    SHUTDOWN = "shutdown"
    PRODUCER_LOST = "producer_lost"


WITHOUT_ERROR = frozenset({Reason.COMPLETE, Reason.STOPPED})

_MESSAGES = {
    Reason.ABANDONED: "nobody was left to read this answer",
    Reason.ERROR: "this answer failed inside the server",
    Reason.TRUNCATED: "the upstream broke off before the end of its answer",
    Reason.TIMEOUT: "the upstream took too long",
    Reason.LIMIT: "this answer is longer than the server allows",
    Reason.SHUTDOWN: "the server is shutting down",
    Reason.PRODUCER_LOST: "the server that was generating this answer is gone",
}

# What a client gets that has not been answered yet, 502 for every other reason.
_STATUSES = {Reason.TIMEOUT: 504, Reason.SHUTDOWN: 503}

HOLE = 10**9
"""The numbers jump by so much before the error of a lost producer.

Its readers may have been told more than the shared log got. If one number belonged both to a lost event and to the
end, nobody could tell which of the two a reader has seen.
"""


def ending(
    stream_id: str, seq: int, reason: Reason, error: StreamError | None, usage: dict[str, int]
) -> tuple[bytes, int]:
    """The frames that end a stream whose last event has number `seq`, and the number of the last of them.

    `error` is there for every reason but those `WITHOUT_ERROR`.
    """
    events = seq
    if reason is Reason.PRODUCER_LOST:
        seq += HOLE
    frames = b""
    if error is not None:
        seq += 1
        events += 1
        frames = frame("error", _json(error.body()), f"{stream_id}.{seq}")
    end = {"type": "end", "reason": reason, "events": events, "usage": usage}
    seq += 1
    return frames + frame("end", _json(end), f"{stream_id}.{seq}"), seq


def failure(reason: Reason) -> StreamError | None:
    """What is said of a stream that ends for `reason` where nothing closer is known; None where nothing is wrong."""
    if reason in WITHOUT_ERROR:
        return None
    retry_after = "1" if reason is Reason.SHUTDOWN else None
    kind = "api_error" if reason is Reason.ERROR else f"{reason}_error"
    return StreamError(kind, _MESSAGES[reason], _STATUSES.get(reason, 502), retry_after)


def never_began(stream_id: str, seq: int = 0) -> tuple[bytes, int]:
    """The frames that end a stream for readers elsewhere where its producer is well, but has no answer to give."""
    error = StreamError("api_error", "this answer never began; ask again")
    return ending(stream_id, seq, Reason.ERROR, error, {"input_tokens": 0, "output_tokens": 0})


def told_by(frames: bytes) -> tuple[Reason, dict[str, int]]:
    """The reason and the usage that `frames` tell, the last of which is an `end` of ours."""
    said = json.loads(last_data(frames))
    return Reason(said["reason"]), said["usage"]


def _json(value: object) -> str:
    # ASCII: an upstream may have put lone surrogates or U+2028 into its message.
    return json.dumps(value, separators=(",", ":"))
