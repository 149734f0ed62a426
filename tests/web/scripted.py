"""A server whose every answer a test writes, down to the byte: for what a real aisse says once in a thousand times."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from rawupstream import LAST_CHUNK, Connection, RawUpstream, Request, chunk, head, raw_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Turn = Callable[["Scene", Request, Connection], Awaitable[None]]

Event = tuple[int | None, str, Any]
"""Sequence number (None: no id), type (empty: no `event:` line), data (text as it is, else as JSON)."""

_numbers = count(1)


@dataclass
class Scene:
    """What one chat meets: an answer for each of its requests in turn, the last one for all others if `forever`.

    The question of a chat is its scene's number, the id of its stream is made of it.
    """

    turns: list[Turn]
    forever: bool = False
    number: int = field(default_factory=lambda: next(_numbers))
    requests: list[Request] = field(default_factory=list)
    """But for DELETE."""
    connections: list[Connection] = field(default_factory=list)
    """Each request's."""
    stops: list[Request] = field(default_factory=list)
    """The DELETE requests."""
    stop_turns: list[Turn] = field(default_factory=list)
    """Their answers, then 204."""
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    """A DELETE was answered 204."""

    @property
    def id(self) -> str:
        return f"scene_{self.number:016d}"

    @property
    def body(self) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": str(self.number)}]}

    def cursor(self, seq: int) -> str:
        return f"{self.id}.{seq}"

    def methods(self) -> list[str]:
        return [request.line.split()[0] for request in self.requests]

    def cursors(self) -> list[str | None]:
        """The `Last-Event-ID` of each request."""
        return [request.headers.get("last-event-id") for request in self.requests]

    async def answer(self, request: Request, connection: Connection) -> None:
        if request.line.startswith("DELETE "):
            self.stops.append(request)
            turn = self.stop_turns[len(self.stops) - 1] if len(self.stops) <= len(self.stop_turns) else _deleted
        else:
            self.requests.append(request)
            self.connections.append(connection)
            known = self.forever or len(self.requests) <= len(self.turns)
            turn = self.turns[min(len(self.requests), len(self.turns)) - 1] if known else status("418 Unexpected")
        await turn(self, request, connection)


async def _deleted(scene: Scene, request: Request, connection: Connection) -> None:
    connection.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    scene.stopped.set()


@dataclass
class Stage:
    """The server of several scenes."""

    url: str
    """Of its chat endpoint."""
    upstream: RawUpstream


@contextlib.asynccontextmanager
async def stage(*scenes: Scene) -> AsyncIterator[Stage]:
    by_name = {name: scene for scene in scenes for name in (scene.id, str(scene.number))}

    async def answer(request: Request, connection: Connection) -> None:
        path = request.line.split()[1].partition("?")[0]
        await by_name[request.prompt if request.body else path.rpartition("/")[2]].answer(request, connection)

    async with raw_upstream(answer) as upstream:
        yield Stage(f"{upstream.url}/api/chat", upstream)
    # Node opens connections ahead. One that the listener took as it closed is handed out in the loop's next turns.
    for _ in range(3):
        await asyncio.sleep(0)
    while left := [connection for connection in upstream.connections if not connection.lost.is_set()]:
        for connection in left:
            connection.fin()
        await asyncio.sleep(0.001)


# --- turns ----------------------------------------------------------------------------------------------------------


def text(seq: int, said: str) -> Event:
    return seq, "content_block_delta", {"type": "content_block_delta", "delta": {"type": "text_delta", "text": said}}


def end(seq: int, reason: str = "complete") -> Event:
    usage = {"input_tokens": 7, "output_tokens": 11}
    return seq, "end", {"type": "end", "reason": reason, "events": seq - 1, "usage": usage}


def reconnect(*, resume: bool) -> Event:
    return None, "reconnect", {"type": "reconnect", "resume": resume, "deadline_ms": 25000}


def frame(scene: Scene, event: Event | bytes) -> bytes:
    if isinstance(event, bytes):
        return event
    seq, kind, data = event
    lines = [f"event: {kind}"] if kind else []
    lines.append(f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}")
    if seq is not None:
        lines.append(f"id: {scene.cursor(seq)}")
    return ("\n".join(lines) + "\n\n").encode()


def says(
    *events: Event | bytes,
    then: str = "end",
    fields: tuple[str, ...] = (),
    located: bool = True,
    opening: bytes | None = None,
    until: asyncio.Event | None = None,
    last: tuple[Event | bytes, ...] = (),
) -> Turn:
    """A stream with these events, each in a chunk of its own; bytes are sent as they are.

    `then`: `end` it cleanly, `cut` it off, `reset` it once it is delivered, `hang`. `until` waits before `last`.
    """

    async def turn(scene: Scene, request: Request, connection: Connection) -> None:
        location = [f"Content-Location: /api/chat/{scene.id}"] if located else []
        asked = request.headers.get("last-event-id", scene.cursor(0))
        first = f"retry: 2000\nid: {asked}\n".encode() if opening is None else opening
        connection.send(head("200 OK", "text/event-stream; charset=utf-8", *location, *fields))
        connection.send(*(chunk(part) for part in (first, *(frame(scene, event) for event in events)) if part))
        if until is not None:
            await until.wait()
        connection.send(*(chunk(frame(scene, event)) for event in last))
        await _close(connection, then)

    return turn


def stopped(seq: int, *fields: str) -> Turn:
    """A stream that ends as soon as it is stopped."""

    async def turn(scene: Scene, request: Request, connection: Connection) -> None:
        turn = says(text(seq, "a"), fields=fields, until=scene.stopped, last=(end(seq + 1, "stopped"),))
        await turn(scene, request, connection)

    return turn


def status(line: str, body: str = "", *fields: str, content_type: str = "application/json") -> Turn:
    """A whole response that is no stream."""

    async def turn(scene: Scene, request: Request, connection: Connection) -> None:
        payload = body.encode()
        connection.send(head(line, content_type, *fields, framing=str(len(payload))), payload)

    return turn


def error(kind: str, message: str) -> str:
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}})


def nothing(then: str = "hang") -> Turn:
    """Not a byte."""

    async def turn(scene: Scene, request: Request, connection: Connection) -> None:
        await _close(connection, then)

    return turn


def raw(*parts: bytes, then: str = "cut") -> Turn:
    async def turn(scene: Scene, request: Request, connection: Connection) -> None:
        connection.send(*parts)
        await _close(connection, then)

    return turn


async def _close(connection: Connection, then: str) -> None:
    match then:
        case "end":
            connection.send(LAST_CHUNK)
        case "cut":
            await connection.delivered()
            connection.fin()
        case "reset":
            await connection.delivered()
            connection.rst()
        case _:
            assert then == "hang"
