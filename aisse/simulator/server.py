"""The simulator's HTTP server. It plays scripts, counts what its peers take, and breaks off as a script says."""

import asyncio
import fcntl
import math
import random
import socket
import struct
import sys
import termios
import time
import uuid
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NoReturn, Self

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler
from pydantic import ValidationError

from aisse.simulator.script import (
    Ask,
    Plan,
    Script,
    encode,
    error_object,
    error_type,
    first_error,
    whole_message,
)

Outcome = Literal["completed", "fault", "refused", "aborted", "closed"]

# The most bytes of one write. So a large event shows in the counts while it is being taken, and not only afterwards.
_PIECE = 16_384
_SEND_BUFFER = 16_384
_YIELD_EVERY = 16


@dataclass(slots=True)
class Record:
    """One request to /v1/messages. Times are of time.monotonic(); `ended` and `outcome` are None while it runs.

    Outcomes: completed; fault (it ended as its script's `fault` or `status` says); refused (with a 4xx of our own);
    aborted (the peer left first, also during a stall); closed (the simulator was closed).
    """

    id: str = ""
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    status: int | None = None
    bytes_written: int = 0
    events: int = 0
    outcome: Outcome | None = None


@dataclass(slots=True)
class Stats:
    """Counters of the requests to /v1/messages; `completed` to `closed` are the outcomes of Record.

    `bytes_written` counts the bytes of bodies, without chunk framing, that our kernel has taken; the peer's kernel has
    all of them but some 32 KiB at most. `keyed` and `cookied` count requests that carried an API key or a cookie.
    """

    requests: int = 0
    active: int = 0
    completed: int = 0
    fault: int = 0
    refused: int = 0
    aborted: int = 0
    closed: int = 0
    events: int = 0
    bytes_written: int = 0
    keyed: int = 0
    cookied: int = 0
    stop_reasons: dict[str, int] = field(default_factory=dict)


class Simulator:
    """The server. `stats`, and `records` from the oldest kept to the latest, may be read at any time.

    `async with Simulator(script) as simulator:` starts and closes it.
    """

    KEPT_RECORDS: ClassVar[int] = 10_000
    MAX_BODY_BYTES: ClassVar[int] = 32 << 20  # as the real API's

    def __init__(self, script: Script | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.script = script or Script()
        self.url = ""
        self.stats = Stats()
        self.records: deque[Record] = deque(maxlen=self.KEPT_RECORDS)
        self._host = host
        self._port = port
        self._runner: web.AppRunner | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._close_lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def start(self) -> str:
        """Listen; return the base URL, which `url` keeps. Raises OSError if the address cannot be had."""
        assert self._runner is None, "already started"
        self._closing = False
        app = web.Application(client_max_size=self.MAX_BODY_BYTES, middlewares=[_errors_as_json])
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_get("/stats", self._show_stats)
        app.router.add_get("/", self._show_help)
        runner = web.AppRunner(
            app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=1.0
        )
        await runner.setup()
        self._runner = runner
        try:
            await web.TCPSite(runner, self._host, self._port, backlog=4096).start()
        except BaseException:
            await self.close()
            raise
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{runner.addresses[0][1]}"
        return self.url

    async def close(self) -> None:
        """End every connection at once, whatever it is doing, and every task of ours. Idempotent."""
        self._closing = True
        async with self._close_lock:
            if self._runner is None:
                return
            for site in list(self._runner.sites):
                await site.stop()
            assert self._runner.server is not None
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
            # An aborted connection cancels its handler.
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._runner.cleanup()
            self._runner = None

    async def _show_stats(self, _request: web.Request) -> web.Response:
        return web.json_response(asdict(self.stats))

    async def _show_help(self, _request: web.Request) -> web.Response:
        fields = "".join(
            f"  {name}={getattr(self.script, name)}  {info.description}\n" for name, info in Script.model_fields.items()
        )
        return web.Response(
            text="POST /v1/messages answers in the Anthropic Messages format; GET /stats counts.\n"
            f"[[name=value ...]] in the last user message scripts its answer. Names, values here:\n{fields}"
        )

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        stats, record = self.stats, Record()
        self.records.append(record)
        stats.requests += 1
        stats.active += 1
        stats.keyed += "x-api-key" in request.headers
        stats.cookied += "Cookie" in request.headers
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            response, record.outcome = await self._answer(request, record)
        except (asyncio.CancelledError, ConnectionError) as exc:
            record.outcome = "closed" if self._closing else "aborted"
            if isinstance(exc, ConnectionError):
                return web.Response(status=400)  # nobody is there to get it
            raise
        except web.HTTPException as exc:
            record.outcome, record.status = "refused", exc.status
            raise
        else:
            record.status = response.status
            return response
        finally:
            self._tasks.discard(task)
            if record.outcome:
                setattr(stats, record.outcome, getattr(stats, record.outcome) + 1)
            record.ended = time.monotonic()
            stats.active -= 1

    async def _answer(self, request: web.Request, record: Record) -> tuple[web.StreamResponse, Outcome]:
        transport = request.transport
        if transport is None or self._closing:
            raise ConnectionResetError
        # Both are as small as they can be, so that a reader that stops shows in the counts instead of in buffers.
        transport.set_write_buffer_limits(high=0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

        # Before anything else: aiohttp notices a peer that leaves only after the peer's body is read.
        raw = await request.read()
        if "anthropic-version" not in request.headers:
            return _failure(400, "anthropic-version: header is required"), "refused"
        try:
            ask = Ask.model_validate_json(raw)
            script = Script.parse(ask.prompt(), self.script)
        except ValidationError as exc:
            return _failure(400, first_error(exc)), "refused"
        except ValueError as exc:
            return _failure(400, str(exc)), "refused"
        about_bytes = script.output_tokens(ask.max_tokens) * max(8, script.token_bytes)
        if not ask.stream and about_bytes > self.MAX_BODY_BYTES:
            return _failure(400, "stream: must be true for an answer of this length"), "refused"

        record.id = f"msg_{random.Random(script.seed).getrandbits(96):024x}"  # noqa: S311 - a name, no secret
        await asyncio.sleep(script.first_s)
        if response := _instead_of_answer(script):
            return response, "fault"
        plan = script.frames(
            message_id=record.id,
            model=ask.model,
            input_tokens=ask.input_tokens(),
            max_tokens=ask.max_tokens,
        )
        body = _Body(request, script, record, self.stats)
        try:
            if ask.stream:
                await body.open("text/event-stream; charset=utf-8")
                await _play(plan, body)
            else:
                await _sleep(script.seconds(ask.max_tokens))
                await body.open("application/json")
                await body.write(encode(whole_message(script, ask, record.id)).encode())
            await body.finish()
        except _BrokenOffError:
            return body.response, "fault"
        if ask.stream and script.fault not in ("none", "huge"):
            return body.response, "fault"
        reason = script.stop_reason(ask.max_tokens)
        self.stats.stop_reasons[reason] = self.stats.stop_reasons.get(reason, 0) + 1
        return body.response, "completed"


class _BrokenOffError(Exception):
    """The connection is broken as the script says; nothing more can be written."""


class _CloseDelimited(web.StreamResponse):
    # Without this aiohttp chunks each HTTP/1.1 body that has no length; its WebSocketResponse does the same.
    _length_check = False

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self.force_close()


class _Body:
    """The body of one answer: written in the script's pieces, counted as the peer takes it, cut on demand."""

    def __init__(self, request: web.Request, script: Script, record: Record, stats: Stats) -> None:
        kind = _CloseDelimited if script.close_delimited else web.StreamResponse
        self.response = kind(headers=_headers(script))
        self._request = request
        self._script = script
        self._record = record
        self._stats = stats

    async def open(self, content_type: str) -> None:
        """Send the status line and headers at once."""
        self.response.headers["Content-Type"] = content_type
        writer = await self.response.prepare(self._request)
        assert writer is not None
        self._writer = writer
        writer.send_headers()
        self._record.status = self.response.status

    async def event(self, frame: bytes) -> None:
        """Write one event, and count it."""
        await self.write(frame)
        self._record.events += 1
        self._stats.events += 1

    async def write(self, data: bytes) -> None:
        """Return once the kernel has all of `data`.

        Raises _BrokenOffError at the script's cut, ConnectionError when the peer is gone.
        """
        script, record = self._script, self._record
        step = min(script.split or _PIECE, _PIECE)
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            if script.fault == "cut" and record.bytes_written + len(piece) >= script.at:
                await self._cut(piece, script.at - record.bytes_written)
            await self._writer.write(piece)
            await self._writer.drain()
            self._count(len(piece))
            if script.split:
                # This lets a peer on the same loop read each piece by itself, as a peer across a network would.
                await asyncio.sleep(0)

    async def finish(self) -> None:
        """End the body cleanly, or by the cut if that is still to come."""
        if self._script.fault == "cut":
            await self._cut(b"", 0)
        await self._writer.write_eof()

    async def _cut(self, piece: bytes, keep: int) -> NoReturn:
        """Send the first `keep` bytes of `piece`, in a chunk that announces all of it, and break off."""
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError
        if keep:
            chunked = self._request.version >= HttpVersion11 and not self._script.close_delimited
            transport.write((b"%x\r\n" % len(piece) if chunked else b"") + piece[:keep])
            await self._writer.drain()
            self._count(keep)
        if self._script.rst:
            sock = transport.get_extra_info("socket")
            while _undelivered(sock):  # noqa: ASYNC110 - a reset would throw it away; the kernel has no event
                await asyncio.sleep(0.001)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()
        raise _BrokenOffError

    def _count(self, size: int) -> None:
        self._record.bytes_written += size
        self._stats.bytes_written += size


async def _play(plan: Plan, body: _Body) -> None:
    """Write each event when it is due, on a schedule from the start, so that delays never add up."""
    due = time.monotonic()
    for index, (wait, frame) in enumerate(plan):
        due += wait
        early = due - time.monotonic()
        if early > 0:
            await _sleep(early)
        elif index % _YIELD_EVERY == 0:
            # A write that the kernel takes at once does not suspend, and other tasks of this loop want their turn.
            await asyncio.sleep(0)
        await body.event(frame)


async def _sleep(seconds: float) -> None:
    """Sleep; for ever if `seconds` is infinite, which the timers of uvloop cannot express."""
    if math.isinf(seconds):
        await asyncio.get_running_loop().create_future()
    await asyncio.sleep(seconds)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as exc:
        return _failure(exc.status, exc.reason)


def _instead_of_answer(script: Script) -> web.Response | None:
    """Return the response of a script that never comes to an answer in the Anthropic format."""
    headers = _headers(script)
    if script.status:
        if script.retry_after and script.status in (429, 503, 529):
            headers["Retry-After"] = str(script.retry_after)
        return _error_response(script.status, script.error(script.status), headers)
    if script.fault == "html":
        page = "<!doctype html><title>Welcome</title><p>This is not the API that you are looking for.\n"
        return web.Response(text=page, content_type="text/html", headers=headers)
    if script.fault == "redirect":
        return web.Response(status=302, headers=headers | {"Location": script.location})
    return None


def _failure(status: int, message: str) -> web.Response:
    return _error_response(status, error_object(error_type(status), message), _headers())


def _error_response(status: int, error: dict[str, Any], headers: dict[str, str]) -> web.Response:
    body = encode(error | {"request_id": headers["request-id"]})
    return web.Response(text=body, content_type="application/json", status=status, headers=headers)


def _headers(script: Script | None = None) -> dict[str, str]:
    headers = {"Cache-Control": "no-cache", "request-id": f"req_{uuid.uuid4().hex}"}
    if script and script.cookie:
        headers["Set-Cookie"] = script.cookie
    return headers


def _undelivered(sock: socket.socket) -> int:
    """Return how many of the bytes written to a TCP socket the peer's kernel has not acknowledged."""
    count = bytearray(4)
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)
