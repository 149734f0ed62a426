"""Client libraries that nobody here wrote, cut off at every byte of an answer: they come back, and miss nothing.

Each run is a stream of its own, read through a port of its own, whose first connection breaks off at one place. All
runs of a test wait at the same time: for the upstream, which thinks long enough for heartbeats, and for `retry`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import ssl
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Self

import aiohttp
import httpx
import pytest
from aiohttp import web
from browser import CHROMIUM, process
from conftest import Server, prompt, serving
from cutting_proxy import CuttingProxy, Line, Part, Place
from httpx_sse import aconnect_sse
from node import CLIENTS, NodeMissingError, node_with

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from aisse.simulator import Simulator

# The first test installs the Node clients, and all runs of a test share the machine with whatever else it does.
pytestmark = pytest.mark.timeout(400)

REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")
EVERYTHING = os.environ.get("TESTS_SOAK") == "1"
RUN_S = 200.0  # ten times what it takes; for a machine that has other things to do
AT_ONCE = 200  # the next begins where one has ended: a machine that is slower is not asked for more than it can do
APART_S = 0.008  # begun all at once, runs wait for each other, and begin to read when the thinking is over

# Seeded, so that every run's answer is the same to the byte, but for the stream's id, whose length never changes. While
# it thinks, who was cut early comes back to a stream that runs; the pace sends the deltas one by one.
BODY = prompt("[[tokens=2 thinking_s=2.5 ping_s=0 pace=50 seed=1]]", model="m")
# For those that are cut in a heartbeat: long enough for one also where a busy machine begins the reading late.
THOUGHTFUL = prompt("[[tokens=2 thinking_s=9.0 ping_s=0 pace=50 seed=1]]", model="m")
HEAD_STEP = 1 if EVERYTHING else 24
BODY_STEP = 1 if EVERYTHING else 4  # beside every byte of the opening, and of each place where clients differ
HEARTBEAT_BYTES = len(": heartbeat\n")
END_BYTES = len("0\r\n\r\n")
# Around the first two chunks, opening and message_start, however those are grouped.
FRAMING_BYTES = 7

Event = list[str]
"""Type, data and id."""

Numbered = tuple[str, str, int]
"""Type, data and sequence number."""


@dataclass
class Answer:
    """What one undisturbed run looks like."""

    head: int
    """Bytes before the body."""
    body: bytes
    """Without heartbeats and chunks."""
    events: list[Numbered]
    """Type, data and number of each event."""

    @property
    def opening(self) -> int:
        """Bytes of the opening lines."""
        return self.body.index(b"event: ")

    def between_id_and_blank_line(self) -> set[int]:
        """The places in the body where an event's id has been read and the event has not."""
        return {match.end() - 1 for match in re.finditer(rb"^id: .*\n\n", self.body, re.MULTILINE)}


@dataclass
class Bench:
    """A server, a proxy before it, and the answer that all runs must come to."""

    server: Server
    proxy: CuttingProxy
    simulator: Simulator
    answer: Answer
    generations: int
    """The upstream's count before the first run."""

    def places(self, body: Iterable[int]) -> list[Place]:
        """Those bytes of the body, every byte of a heartbeat, and a sample of what surrounds them.

        The heartbeat's come first, while nothing else can delay them.
        """
        return [
            *in_part("heartbeat", range(HEARTBEAT_BYTES)),
            *in_part("head", range(0, self.answer.head, HEAD_STEP)),
            *in_part("head", [self.answer.head - 1]),
            *in_part("framing", range(FRAMING_BYTES)),
            *in_part("body", body),
            *in_part("end", range(END_BYTES)),
        ]

    def everywhere(self) -> list[Place]:
        """`places` with every byte of the body; in a short run every byte of the opening, and a sample after it."""
        body = self.answer.body
        after = range(self.answer.opening, len(body), BODY_STEP)
        return self.places(sorted({*range(self.answer.opening), *after, *self.answer.between_id_and_blank_line()}))

    async def lines(self, places: Iterable[Place]) -> list[Line]:
        return [await self.proxy.line(place) for place in places]

    def generated(self) -> int:
        """How many generations the runs have cost."""
        return self.simulator.stats.requests - self.generations


def in_part(part: Part, numbers: Iterable[int]) -> list[Place]:
    return [(part, number) for number in numbers]


_answers: list[Answer] = []


@pytest.fixture
async def bench(simulator: Simulator) -> AsyncIterator[Bench]:
    async with (
        serving(simulator.url, heartbeat_s=1) as server,
        CuttingProxy(server.address) as proxy,
    ):
        if not _answers:  # the same for all that have this server, thanks to its seed
            _answers.append(await undisturbed(server, proxy))
        yield Bench(server, proxy, simulator, _answers[0], simulator.stats.requests)


async def undisturbed(server: Server, proxy: CuttingProxy) -> Answer:
    line = await proxy.line(None)
    async with (
        asyncio.timeout(RUN_S),
        aiohttp.ClientSession() as client,
        client.post(f"{line.origin}/api/chat", json=BODY) as response,
    ):
        body = await response.read()
    # A heartbeat's line is within the thinking, between two events.
    body = body.replace(b": heartbeat\n", b"")
    events = re.findall(r"^event: (.*)\ndata: (.*)\nid: .*\.(\d+)\n\n", body.decode(), re.MULTILINE)
    assert [int(seq) for _, _, seq in events] == list(range(1, len(events) + 1))
    head = bytes(line.passed).index(b"\r\n\r\n") + 4
    return Answer(head, body, [(kind, data, int(seq)) for kind, data, seq in events])


def numbered(events: list[Event]) -> list[Numbered]:
    """Events with their numbers; AssertionError unless all have ids, of one stream."""
    streams = {event_id.rpartition(".")[0] for _, _, event_id in events}
    assert "" not in streams, f"the application got an empty message: {events}"
    assert len(streams) <= 1
    return [(kind, data, int(event_id.rpartition(".")[2])) for kind, data, event_id in events]


def unlike(
    lines: list[Line], outcomes: list[list[Event]], expected: dict[Place, list[Numbered]], answer: Answer
) -> str:
    """The runs whose events are others than `expected` says, or the answer's, in words; empty if none."""
    wrong = []
    for line, events in zip(lines, outcomes, strict=True):
        assert line.place is not None
        if not line.cut:
            wrong.append(f"{line.place}: was not cut; passed {bytes(line.passed[-60:])!r}")
        elif (got := numbered(events)) != expected.get(line.place, answer.events):
            wrong.append(f"{line.place}: {[(kind, seq) for kind, _, seq in got]} in {line.requests} requests")
    return "\n".join(wrong)


# --- Node -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def node() -> str:
    """Node's path, with the client libraries installed."""
    try:
        return node_with(CLIENTS)
    except NodeMissingError as error:
        missing(str(error), "node")


def missing(reason: str, what: str) -> NoReturn:
    if what in REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)


async def run_in_node(
    node: str, script: str, bench: Bench, lines: list[Line], headers: list[dict[str, str]] | None = None
) -> list[dict[str, Any]]:
    """Each line's outcome, as the script of that name tells it."""
    work = job(bench, lines, headers)
    with tempfile.TemporaryFile() as stderr:
        process = await asyncio.create_subprocess_exec(
            node, str(CLIENTS / script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, limit=1 << 20
        )
        assert process.stdin is not None
        assert process.stdout is not None
        outcomes: dict[int, dict[str, Any]] = {}
        try:
            process.stdin.write(json.dumps(work).encode())
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RUN_S):
                    async for text in process.stdout:
                        outcome = json.loads(text)
                        outcomes[outcome["run"]] = outcome
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.wait()
            stderr.seek(0)
        return finished(lines, outcomes, stderr.read().decode())


def job(
    bench: Bench, lines: list[Line], headers: list[dict[str, str]] | None = None, at_once: int = AT_ONCE
) -> dict[str, Any]:
    """What the scripts and the page are told."""
    types = sorted({kind for kind, _, _ in bench.answer.events} | {"message", "reconnect"})
    runs = [
        {"run": run, "origin": line.origin, "body": body_of(line), "headers": headers[run] if headers else {}}
        for run, line in enumerate(lines)
    ]
    return {
        "server": bench.server.url,
        "types": types,
        "at_once": at_once,
        "apart_s": APART_S,
        "runs": runs,
    }


def body_of(line: Line) -> dict[str, Any]:
    return THOUGHTFUL if line.place is not None and line.place[0] == "heartbeat" else BODY


def finished(lines: list[Line], outcomes: dict[int, dict[str, Any]], said: str) -> list[dict[str, Any]]:
    hanging = [line.place for run, line in enumerate(lines) if run not in outcomes]
    assert not hanging, f"never came to an end: {hanging[:50]} ({len(hanging)} in all); {said[-1000:]}"
    return [outcomes[run] for run in range(len(lines))]


async def test_eventsource_cut_at_every_byte_misses_nothing_and_stops(bench: Bench, node: str) -> None:
    lines = await bench.lines(bench.everywhere())
    outcomes = await run_in_node(node, "eventsource.mjs", bench, lines)

    assert unlike(lines, [outcome["events"] for outcome in outcomes], {}, bench.answer) == ""
    assert {outcome["code"] for outcome in outcomes} == {204}
    assert bench.generated() == len(lines)


async def test_fetch_event_source_with_a_key_joins_and_ends(bench: Bench, node: str) -> None:
    """It misses one event where it was cut between that event's id line and its blank line, and there alone.

    What it samples after the opening lies between what the test without a key does.
    """
    opening, size = bench.answer.opening, len(bench.answer.body)
    later = range(opening, size, BODY_STEP)
    lines = await bench.lines(
        bench.places(sorted({*range(opening), *later, *bench.answer.between_id_and_blank_line()}))
    )
    headers = [{"Idempotency-Key": f"run-{run}"} for run in range(len(lines))]
    outcomes = await run_in_node(node, "fetch-event-source.mjs", bench, lines, headers)

    expected = missed_by_fetch_event_source(bench.answer) | told_again(bench.answer)
    assert unlike(lines, [outcome["events"] for outcome in outcomes], expected, bench.answer) == ""
    assert bench.generated() == len(lines)
    assert {line.requests for line in lines} == {2}


async def test_fetch_event_source_without_a_key_joins_from_the_opening_on(bench: Bench, node: str) -> None:
    """Before its id line has come nobody can know what the repeated POST repeats: that is a second generation."""
    opening = bench.answer.opening
    later = range(opening + BODY_STEP // 2, len(bench.answer.body), BODY_STEP)
    known = [
        *in_part("heartbeat", range(HEARTBEAT_BYTES)),
        *in_part("body", sorted({*later, *bench.answer.between_id_and_blank_line()})),
        *in_part("end", range(END_BYTES)),
    ]
    unknown = [*in_part("head", [0, 1, bench.answer.head - 1]), *in_part("body", [0, opening - 1])]
    lines = await bench.lines([*known, *unknown])
    outcomes = await run_in_node(node, "fetch-event-source.mjs", bench, lines)

    expected = missed_by_fetch_event_source(bench.answer) | told_again(bench.answer)
    assert unlike(lines, [outcome["events"] for outcome in outcomes], expected, bench.answer) == ""
    assert bench.generated() == len(known) + 2 * len(unknown)
    assert {line.requests for line in lines} == {2}


def missed_by_fetch_event_source(answer: Answer) -> dict[Place, list[Numbered]]:
    """What it gets where it was cut after it had noted an event's id, and before it passed the event on."""
    missed: dict[Place, list[Numbered]] = {}
    for index in answer.between_id_and_blank_line():
        before = answer.body.count(b"\n\n", 0, index)
        missed["body", index] = answer.events[:before] + answer.events[before + 1 :]
    # Not the last: a POST at the end is told so again.
    del missed["body", len(answer.body) - 1]
    return missed


def told_again(answer: Answer) -> dict[Place, list[Numbered]]:
    """What a POST gets that was cut after the last event: `end` once more, as there is no 204 for it."""
    return {("end", index): [*answer.events, answer.events[-1]] for index in range(END_BYTES)}


# --- Python ---------------------------------------------------------------------------------------------------


async def test_httpx_sse_cut_at_every_byte_misses_nothing_and_ends(bench: Bench) -> None:
    lines = await bench.lines(bench.everywhere())
    tls = ssl.create_default_context()  # made once: it costs more than a run
    turn = asyncio.Semaphore(AT_ONCE)

    async def read(index: int, line: Line) -> list[Event]:
        await asyncio.sleep(APART_S * index)
        async with turn, httpx.AsyncClient(verify=tls, trust_env=False, timeout=RUN_S) as client:
            return await read_again_until_it_ends(client, line)

    async with asyncio.timeout(RUN_S):
        outcomes = await asyncio.gather(*(read(*run) for run in enumerate(lines)))
    assert unlike(lines, outcomes, told_again(bench.answer), bench.answer) == ""
    assert bench.generated() == len(lines)
    assert {line.requests for line in lines} == {2}


async def read_again_until_it_ends(client: httpx.AsyncClient, line: Line) -> list[Event]:
    """The recipe for reconnection in the library's README."""
    events: list[Event] = []
    last_event_id = ""
    delay_s = 0.0
    while True:
        await asyncio.sleep(delay_s)
        headers = {"Idempotency-Key": str(line.port)} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
        try:
            async with aconnect_sse(
                client, "POST", f"{line.origin}/api/chat", json=body_of(line), headers=headers
            ) as source:
                async for event in source.aiter_sse():
                    last_event_id = event.id
                    if event.retry is not None:
                        delay_s = event.retry / 1000
                    events.append([event.event, event.data, event.id])
        except httpx.TransportError:
            continue
        return events


# --- a browser ------------------------------------------------------------------------------------------------

BROWSER_SOCKETS = 200  # it has 256 for all hosts together


async def test_native_eventsource_misses_nothing_and_stops(simulator: Simulator, tmp_path: Path) -> None:
    """It is not cut within the head: Chromium takes half a head for a whole one, and what it lacks for a refusal."""
    if CHROMIUM is None:
        missing("chromium is not installed", "chromium")
    async with (
        Page() as page,
        serving(simulator.url, heartbeat_s=1, cors_origins=(page.origin,)) as server,
        CuttingProxy(server.address) as proxy,
    ):
        answer = await undisturbed(server, proxy)
        bench = Bench(server, proxy, simulator, answer, simulator.stats.requests)
        border = answer.body.index(b"\n\n") + 1
        places = [
            *in_part("heartbeat", range(HEARTBEAT_BYTES)),
            *in_part("head", [0]),
            *in_part("body", range(0, len(answer.body), 1 if EVERYTHING else 13)),
            *in_part("body", range(border - 12, border + 12)),
            *in_part("end", range(END_BYTES)),
        ]
        lines = await bench.lines(places)
        page.job = job(bench, lines, at_once=BROWSER_SOCKETS)
        page.expected = len(lines)
        async with process(tmp_path, page.origin):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RUN_S):
                    await page.complete.wait()
        outcomes = finished(lines, page.outcomes, "")
        assert unlike(lines, [outcome["events"] for outcome in outcomes], {}, answer) == ""
        assert bench.generated() == len(lines)


class Page:
    """The page that reads, on a port of its own: it gets its job here and brings its outcomes."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = {}
        self.outcomes: dict[int, dict[str, Any]] = {}
        self.expected = 0
        self.complete = asyncio.Event()
        self.origin = ""
        app = web.Application()
        app.add_routes([web.get("/", self._page), web.get("/job", self._job), web.post("/outcome", self._outcome)])
        self._runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.origin = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._runner.cleanup()

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=(CLIENTS / "native.html").read_text(), content_type="text/html")

    async def _job(self, request: web.Request) -> web.Response:
        return web.json_response(self.job)

    async def _outcome(self, request: web.Request) -> web.Response:
        outcome = await request.json()
        self.outcomes[outcome["run"]] = outcome
        if len(self.outcomes) == self.expected:
            self.complete.set()
        return web.Response(status=204)
