"""`/api/chat`: a prompt in, a stream of events out; reading a stream again, and stopping it."""

from __future__ import annotations

import asyncio
import math
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

from aisse.errors import RequestError, UnknownStreamError
from aisse.guard.access import Access
from aisse.routes.intake import read_away
from aisse.routes.question import Asking
from aisse.streams.reader import Reader, StreamResponse, stream_url, turn_away
from aisse.streams.stream import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from multidict import CIMultiDictProxy

    from aisse.settings import Settings
    from aisse.streams.farewell import Farewell
    from aisse.streams.registry import Registry
    from aisse.streams.stream import Stream

# A stream that was asked for by `Prefer: respond-async` waits at least so long for its first reader.
_FIRST_READER_S = 10.0

# Beyond this JavaScript's numbers have holes.
_MAX_SEQ = 2**53

_ID = r"[A-Za-z0-9_-]{22}"
_CURSOR = re.compile(rf"({_ID})\.([0-9]{{1,16}})")


def routes(settings: Settings, registry: Registry, farewell: Farewell) -> list[web.RouteDef]:
    """The chat API. Handlers raise RequestError and StreamError; `app` turns them into responses."""
    access = Access(settings)
    asking = Asking(settings)

    async def post(request: web.Request) -> web.StreamResponse:
        who = access.check(request)
        cursor = parse_cursor(request.headers.get("Last-Event-ID", ""))
        if cursor is not None:
            # Clients repeat their POST on a lost connection: it joins, whatever its body, and never starts anything.
            await read_away(request, settings)
            try:
                return await read(request, await registry.find(cursor[0]), cursor[1])
            except RequestError:
                # It may be on the server that follows this one.
                registry.admit()
                raise
        stream = await start(request, who)
        # Nothing may wait before a reader is attached: a stream that nobody has attached to is nobody's to end.
        if _prefers_async(request.headers):
            return await accept(stream)
        return await read(request, stream, 0)

    async def start(request: web.Request, who: bytes) -> Stream:
        # A function of its own, so that nothing here keeps the body when it has been sent.
        with registry.bodies.hold() as hold:
            question = await asking.read(request, hold)
            leave_s = parse_leave(request.headers, settings)
            if (key := parse_key(request.headers)) is None:
                return registry.create(question, leave_s)
            return await registry.create_once((who, key), question, leave_s)

    async def get(request: web.Request) -> web.StreamResponse:
        stream_id = stream_in(request)
        # RFC 9110, section 5.3: several fields of one name are one list.
        wants_state = _wants_state(",".join(request.headers.getall(hdrs.ACCEPT, [])))
        if registry.draining and registry.hands_over and not wants_state:
            return await elsewhere(request, settings, farewell)
        try:
            stream = await registry.find(stream_id)
        except RequestError as error:
            # A native EventSource gives up for good on a 503, and on a 404 from a server that is about to go.
            if not wants_state and (registry.draining or error.status == 503):
                return await elsewhere(request, settings, farewell)
            raise
        if wants_state:
            return web.json_response(state_of(stream), headers=_location(stream.id, settings))
        seq = cursor_in(request) or 0
        compacted = request.query.get("compact") == "1"
        if stream.state is State.ENDED and seq == stream.log.last_seq:
            # The one answer on which a native EventSource stops for good.
            return web.Response(status=204, headers=_location(stream.id, settings))
        return await read(request, stream, seq, compacted=compacted, expected=True)

    async def stop(request: web.Request) -> web.Response:
        stream_id = stream_in(request)
        await registry.stop(stream_id)
        return web.Response(status=204, headers=_location(stream_id, settings))

    async def read(
        request: web.Request, stream: Stream, seq: int, *, compacted: bool = False, expected: bool = False
    ) -> web.StreamResponse:
        reader = Reader(stream, settings, seq, compacted=compacted, expected=expected)
        farewell.greet(reader)
        with registry.reading(reader):
            return await reader.run(request)

    async def accept(stream: Stream) -> web.Response:
        with stream.asked():
            await stream.answerable(settings.first_byte_commit_s)
            stream.expect_reader(asyncio.get_running_loop().time() + _FIRST_READER_S)
        url = stream_url(stream.id, settings)
        return web.json_response(
            {"id": stream.id, "url": url, "status": stream.state.value},
            status=202,
            headers={hdrs.LOCATION: url} | _location(stream.id, settings),
        )

    return [
        web.post("/api/chat", post),
        web.get("/api/chat/{stream}", get, allow_head=False),
        web.delete("/api/chat/{stream}", stop),
        web.post("/api/chat/{stream}/stop", stop),
    ]


def stream_in(request: web.Request) -> str:
    """The id in the path of `request`. Raises RequestError (404) for other text, which must not get into headers."""
    stream_id = request.match_info["stream"]
    if re.fullmatch(_ID, stream_id) is None:
        raise UnknownStreamError
    return stream_id


async def elsewhere(request: web.Request, settings: Settings, farewell: Farewell) -> web.StreamResponse:
    """Has the client come back with its cursor, to another instance or later."""
    seq = cursor_in(request)
    stream_id = request.match_info["stream"]
    cursor = f"{stream_id}.{seq}" if seq is not None else None
    return await turn_away(request, StreamResponse(stream_id, settings), cursor, farewell.event(resume=True))


def cursor_in(request: web.Request) -> int | None:
    """After which event of the stream in its path `request` goes on; None for no cursor. Raises RequestError (400)."""
    given = ((request.headers, "Last-Event-ID"), (request.query, "last_event_id"), (request.query, "lastEventId"))
    for source, name in given:
        cursor = parse_cursor(source.get(name, ""), name)
        if cursor is None:
            continue
        if cursor[0] != request.match_info["stream"]:
            raise RequestError(400, "invalid_request_error", "is a cursor of another stream", name)
        return cursor[1]
    return None


def parse_cursor(text: str, field: str = "Last-Event-ID") -> tuple[str, int] | None:
    """Stream and sequence number of `<stream>.<seq>`, None for no text. Raises RequestError (400)."""
    if not text:
        return None
    match = _CURSOR.fullmatch(text)
    if match is None or int(match[2]) > _MAX_SEQ:
        raise RequestError(400, "invalid_request_error", "is no cursor of this server", field)
    return match[1], int(match[2])


def parse_key(headers: Mapping[str, str]) -> str | None:
    """The Idempotency-Key, None where there is none. Raises RequestError (400)."""
    key = headers.get("Idempotency-Key")
    if key is not None and re.fullmatch(r"[\x21-\x7e]{1,255}", key) is None:
        raise RequestError(400, "invalid_request_error", "must be 1 to 255 printable characters", "Idempotency-Key")
    return key


def parse_leave(headers: Mapping[str, str], settings: Settings) -> float:
    """Seconds for which the stream may run without readers; infinite for `continue`. Raises RequestError (400)."""
    text = headers.get("Aisse-On-Leave")
    if text is None:
        return settings.leave_s
    if text == "cancel":
        return 0.0
    if text == "continue":
        if not settings.allow_continue:
            raise RequestError(400, "invalid_request_error", "`continue` is not allowed here", "Aisse-On-Leave")
        return math.inf
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text) is None:
        raise RequestError(400, "invalid_request_error", "must be `cancel`, seconds, or `continue`", "Aisse-On-Leave")
    if float(text) > settings.leave_max_s:
        raise RequestError(
            400, "invalid_request_error", f"must be at most {settings.leave_max_s:g} seconds", "Aisse-On-Leave"
        )
    return float(text)


def state_of(stream: Stream) -> dict[str, object]:
    """A stream's state as JSON; times are RFC 3339 in UTC."""
    return {
        "id": stream.id,
        "status": stream.state.value,
        "reason": stream.reason,
        "events": stream.events,
        "last_event_id": f"{stream.id}.{stream.log.last_seq}",
        "usage": stream.usage,
        "created": _time(stream.created_at),
        "ended": _time(stream.ended_at) if stream.ended_at is not None else None,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _location(stream_id: str, settings: Settings) -> dict[str, str]:
    return {hdrs.CONTENT_LOCATION: stream_url(stream_id, settings)}


def _prefers_async(headers: CIMultiDictProxy[str]) -> bool:
    # RFC 7240, section 2: in any number of fields, separated by commas, each with parameters.
    preferences = ",".join(headers.getall("Prefer", [])).split(",")
    return any(preference.partition(";")[0].strip().lower() == "respond-async" for preference in preferences)


def _wants_state(accept: str) -> bool:
    """Whether JSON is preferred to a stream (RFC 9110, section 12.5.1): by its weight, then as what is named closer.

    `*/*` alone means the stream, and so does no header.
    """
    qualities = dict(map(_media_range, accept.split(",")))
    json_quality = _quality(qualities, "application/json")
    return json_quality[0] > 0 and json_quality > _quality(qualities, "text/event-stream")


def _quality(qualities: Mapping[str, float], media: str) -> tuple[float, int]:
    """The weight of a media type, by the closest range that it is in, and how close that is."""
    ranges = ("*/*", media.partition("/")[0] + "/*", media)
    close = max((close for close, name in enumerate(ranges) if name in qualities), default=-1)
    return (qualities[ranges[close]], close) if close >= 0 else (0.0, -1)


def _media_range(text: str) -> tuple[str, float]:
    media, *parameters = (part.strip().lower() for part in text.split(";"))
    weight = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
    return media, float(weight) if re.fullmatch(r"[01](\.[0-9]{0,3})?", weight) else 0.0
