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
from aisse.routes.question import read_question
from aisse.streams.reader import Reader
from aisse.streams.response import StreamResponse, stream_url, turn_away
from aisse.streams.stream import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from multidict import CIMultiDictProxy

    from aisse.formats.format import Format
    from aisse.settings import Settings
    from aisse.streams.farewell import Farewell
    from aisse.streams.registry import Registry
    from aisse.streams.stream import Stream

# How long, at least, a stream that was asked for with `Prefer: respond-async` waits for its first reader.
_FIRST_READER_S = 10.0

# JavaScript cannot tell all whole numbers beyond this apart.
_MAX_SEQ = 2**53

_ID = r"[A-Za-z0-9_-]{22}"
_CURSOR = re.compile(rf"({_ID})\.([0-9]{{1,16}})")


def routes(settings: Settings, wire_format: Format, registry: Registry, farewell: Farewell) -> list[web.RouteDef]:
    """The chat API. Handlers raise RequestError and StreamError; `errors` turns them into responses."""
    chat = _Chat(settings, wire_format, registry, farewell)
    return [
        web.post("/api/chat", chat.post),
        web.get("/api/chat/{stream}", chat.get, allow_head=False),
        web.delete("/api/chat/{stream}", chat.stop),
        web.post("/api/chat/{stream}/stop", chat.stop),
    ]


class _Chat:
    """The handlers. Questions are asked, and runs of deltas merged, in `wire_format`."""

    def __init__(self, settings: Settings, wire_format: Format, registry: Registry, farewell: Farewell) -> None:
        self._settings = settings
        self._format = wire_format
        self._registry = registry
        self._farewell = farewell
        self._access = Access(settings)

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Starts a stream, or joins the one that `Last-Event-ID` names."""
        who = self._access.check(request)
        cursor = parse_cursor(request.headers.get("Last-Event-ID", ""))
        if cursor is not None:
            return await self._join(request, *cursor)
        stream = await self._ask(request, who)
        # Nothing may wait between here and a reader: a stream that nobody has attached to is nobody's to end.
        if _prefers_async(request.headers):
            return await self._accept(stream)
        return await self._read(request, stream, 0)

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Reads a stream from the request's cursor on, or tells its state."""
        registry = self._registry
        stream_id = stream_in(request)
        # RFC 9110, section 5.3: several fields of one name are one list.
        wants_state = _wants_state(",".join(request.headers.getall(hdrs.ACCEPT, [])))
        if registry.draining and registry.hands_over and not wants_state:
            return await self._send_elsewhere(request)
        try:
            stream = await registry.find(stream_id)
        except RequestError as error:
            # A native EventSource gives up for good on a 503, and on a 404 from a server that is about to go.
            if not wants_state and (registry.draining or error.status == 503):
                return await self._send_elsewhere(request)
            raise
        if wants_state:
            return web.json_response(state_of(stream), headers=self._location(stream.id))
        seq = cursor_in(request) or 0
        if stream.state is State.ENDED and seq == stream.log.last_seq:
            # The one answer on which a native EventSource stops for good.
            return web.Response(status=204, headers=self._location(stream.id))
        compacted = request.query.get("compact") == "1"
        return await self._read(request, stream, seq, compacted=compacted, knows_id=True, expected=True)

    async def stop(self, request: web.Request) -> web.Response:
        """Ends a stream. Idempotent."""
        stream_id = stream_in(request)
        await self._registry.stop(stream_id)
        return web.Response(status=204, headers=self._location(stream_id))

    async def _join(self, request: web.Request, stream_id: str, seq: int) -> web.StreamResponse:
        """Clients repeat their POST on a lost connection: it joins, whatever its body, and never starts anything."""
        await read_away(request, self._settings)
        try:
            return await self._read(request, await self._registry.find(stream_id), seq, knows_id=True)
        except RequestError:
            # The stream may be on the server that follows this one.
            self._registry.admit()
            raise

    async def _ask(self, request: web.Request, who: bytes) -> Stream:
        # This is a method of its own so that no variable of a caller keeps the body when it has been sent.
        registry = self._registry
        with registry.bodies.hold() as hold:
            question = await read_question(request, self._format, self._settings, hold)
            leave_s = parse_leave(request.headers, self._settings)
            if (key := parse_key(request.headers)) is None:
                return registry.create(question, leave_s)
            return await registry.create_once((who, key), question, leave_s)

    async def _read(
        self,
        request: web.Request,
        stream: Stream,
        seq: int,
        *,
        compacted: bool = False,
        knows_id: bool = False,
        expected: bool = False,
    ) -> web.StreamResponse:
        compact = self._format.compact if compacted else None
        reader = Reader(stream, self._settings, seq, compact=compact, knows_id=knows_id, expected=expected)
        self._farewell.greet(reader)
        with self._registry.reading(reader):
            return await reader.run(request)

    async def _accept(self, stream: Stream) -> web.Response:
        """Tells the client where its stream is read; it is read by another request."""
        with stream.asked():
            await stream.answerable(self._settings.first_byte_commit_s)
            stream.leave.expect_reader(asyncio.get_running_loop().time() + _FIRST_READER_S)
        url = stream_url(stream.id, self._settings)
        return web.json_response(
            {"id": stream.id, "url": url, "status": stream.state.value},
            status=202,
            headers={hdrs.LOCATION: url} | self._location(stream.id),
        )

    async def _send_elsewhere(self, request: web.Request) -> web.StreamResponse:
        """Has the client come back with its cursor, to another instance or later."""
        seq = cursor_in(request)
        stream_id = request.match_info["stream"]
        cursor = f"{stream_id}.{seq}" if seq is not None else None
        response = StreamResponse(stream_id, self._settings)
        return await turn_away(request, response, cursor, self._farewell.event(resume=True))

    def _location(self, stream_id: str) -> dict[str, str]:
        return {hdrs.CONTENT_LOCATION: stream_url(stream_id, self._settings)}


# --- what a request says --------------------------------------------------------------------------------------


def stream_in(request: web.Request) -> str:
    """The id in the path of `request`. Raises RequestError (404) for other text, which must not get into a header."""
    stream_id = request.match_info["stream"]
    if re.fullmatch(_ID, stream_id) is None:
        raise UnknownStreamError
    return stream_id


def cursor_in(request: web.Request) -> int | None:
    """The event after which `request` goes on in the stream of its path, or None without a cursor.

    Raises RequestError (400) for what is no cursor, or one of another stream.
    """
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
    """Stream and sequence number in `<stream>.<seq>`, or None for no text. Raises RequestError (400) for other text."""
    if not text:
        return None
    match = _CURSOR.fullmatch(text)
    if match is None or int(match[2]) > _MAX_SEQ:
        raise RequestError(400, "invalid_request_error", "is no cursor of this server", field)
    return match[1], int(match[2])


def parse_key(headers: Mapping[str, str]) -> str | None:
    """The Idempotency-Key, or None without one. Raises RequestError (400) for one that is too long or unprintable."""
    key = headers.get("Idempotency-Key")
    if key is not None and re.fullmatch(r"[\x21-\x7e]{1,255}", key) is None:
        raise RequestError(400, "invalid_request_error", "must be 1 to 255 printable characters", "Idempotency-Key")
    return key


def parse_leave(headers: Mapping[str, str], settings: Settings) -> float:
    """How many seconds the stream may run without readers: infinity for `continue`. Raises RequestError (400)."""
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


def _prefers_async(headers: CIMultiDictProxy[str]) -> bool:
    # RFC 7240, section 2: preferences stand in any number of fields, separated by commas, each with parameters.
    preferences = ",".join(headers.getall("Prefer", [])).split(",")
    return any(preference.partition(";")[0].strip().lower() == "respond-async" for preference in preferences)


def _wants_state(accept: str) -> bool:
    """Whether JSON is preferred to a stream (RFC 9110, section 12.5.1).

    Of the two, the one with the higher weight is preferred; at the same weight, the one that is named more closely.
    `*/*` alone means the stream, and so does a request without the header.
    """
    qualities = dict(map(_media_range, accept.split(",")))
    json_quality = _quality(qualities, "application/json")
    return json_quality[0] > 0 and json_quality > _quality(qualities, "text/event-stream")


def _quality(qualities: Mapping[str, float], media: str) -> tuple[float, int]:
    """The weight that the closest range gives to a media type, and how close that range is."""
    ranges = ("*/*", media.partition("/")[0] + "/*", media)
    close = max((close for close, name in enumerate(ranges) if name in qualities), default=-1)
    return (qualities[ranges[close]], close) if close >= 0 else (0.0, -1)


def _media_range(text: str) -> tuple[str, float]:
    media, *parameters = (part.strip().lower() for part in text.split(";"))
    weight = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
    return media, float(weight) if re.fullmatch(r"[01](\.[0-9]{0,3})?", weight) else 0.0


# --- what it is answered with ---------------------------------------------------------------------------------


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
