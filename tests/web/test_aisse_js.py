"""The browser client, in Node: its parser, and what it makes of every way in which a connection can end.

Most tests play scenes of a scripted server, all of a test at the same time. The client's own pauses take no time then,
and are noted; those of the watchdog are real, and short.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from conftest import Server, eventually, prompt, serving
from rawupstream import chunk, head

sys.path.append(str(Path(__file__).parents[1] / "e2e"))

from cutting_proxy import CuttingProxy, Line, Place
from driver import CLIENT, HERE, Driver, Run
from node import NodeMissingError, node_with
from scripted import (
    Scene,
    end,
    error,
    frame,
    nothing,
    raw,
    reconnect,
    says,
    stage,
    status,
    stopped,
    text,
)

from aisse import __version__
from aisse.simulator import Script

if TYPE_CHECKING:
    from collections.abc import Iterator

    from driver import Outcome
    from rawupstream import Connection, Request
    from scripted import Turn

    from aisse.simulator import Simulator

# The first test that compiles installs the compiler.
pytestmark = pytest.mark.timeout(300)

SAMPLES = sorted((HERE.parent / "samples").glob("*.sse"))
REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")
WEB = CLIENT.parent
GZIPPED_BYTES = 7_000

UNSTEADY = 1000
"""`retries` of scenes that come to an end by themselves."""


def missing(reason: str) -> NoReturn:
    if "node" in REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        missing("node is not installed")
    return found


@pytest.fixture(scope="module")
def driver(node: str) -> Iterator[Driver]:
    driver = Driver(node)
    try:
        yield driver
    finally:
        driver.close()


def begin(driver: Driver, url: str, scene: Scene, **job: Any) -> Run:
    """A chat that meets `scene`. `options` are its options; `resume` goes on with an answer in place of asking."""
    options = {"url": url} | job.pop("options", {})
    return driver.begin(body=scene.body, options=options, **job)


async def play(driver: Driver, scene: Scene, **job: Any) -> Outcome:
    patch = job.pop("patch", {})
    async with stage(scene) as at:
        with driver.patched(**patch):
            return await begin(driver, at.url, scene, **job).outcome()


async def play_all(
    driver: Driver, scenes: list[Scene], patch: dict[str, Any] | None = None, **job: Any
) -> list[Outcome]:
    """The outcomes of the same job with each scene."""
    async with stage(*scenes) as at:
        with driver.patched(**(patch or {})):
            runs = [begin(driver, at.url, scene, **job) for scene in scenes]
            return [await run.outcome() for run in runs]


def states(outcome: Outcome) -> list[str]:
    return [entry["state"] for entry in outcome["states"]]


def pauses(outcome: Outcome) -> list[dict[str, Any]]:
    """The details of the state `reconnecting`, each time."""
    return [entry for entry in outcome["states"] if entry["state"] == "reconnecting"]


def delays(outcome: Outcome) -> list[float]:
    return [pause["delayMs"] for pause in pauses(outcome)]


def whole(outcome: Outcome, said: str) -> None:
    """AssertionError unless it ended well, with this text and every event once, in order."""
    assert outcome["thrown"] is None, outcome
    assert outcome["finished"] is None
    chat = outcome["chat"]
    assert chat["text"] == said
    assert "".join(outcome["texts"]) == said
    assert (chat["state"], chat["reason"], chat["error"]) == ("ended", "complete", None)
    assert states(outcome)[-1] == "ended"
    in_order(outcome)


def in_order(outcome: Outcome) -> None:
    seqs = [int(event["id"].rpartition(".")[2]) for event in outcome["seen"] if event["type"] != "reconnect"]
    assert seqs == sorted(set(seqs)), outcome["seen"]
    assert outcome["taken"] == outcome["seen"]


# --- the parser -----------------------------------------------------------------------------------------------------


async def test_samples_in_every_way_give_their_events(driver: Driver) -> None:
    """Whole, a byte at a time, in every two pieces, and with more behind them."""
    told = await driver.value(call="parse", files=[str(path) for path in SAMPLES])

    assert len(told) > 20
    for path, found in zip(SAMPLES, told, strict=True):
        expected = json.loads(path.with_suffix(".json").read_text())
        assert found["whole"]["error"] is None, path.stem
        assert found["whole"]["events"] == expected["events"], path.stem
        assert found["whole"]["retry"] == expected["retry"], path.stem
        assert found["bytes"] == found["whole"], path.stem
        assert found["splits"] == [], path.stem
        # What was not complete is, and then comes one more; the closing lines must not close that before it came.
        before, after = found["closed"]["events"], found["more"]["events"]
        assert after[:-1] == before, path.stem
        assert after[-1] == {"type": "message", "data": "more", "id": found["closed"]["id"]}, path.stem
        assert before[: len(expected["events"])] == expected["events"], path.stem


async def parsed(driver: Driver, *pieces: bytes, limit: int | None = None) -> Outcome:
    encoded = [base64.b64encode(piece).decode() for piece in pieces]
    found: Outcome = await driver.value(call="parse", pieces=encoded, maxLength=limit)
    return found


async def test_event_is_complete_with_the_first_byte_of_its_last_line_end(driver: Driver) -> None:
    assert len((await parsed(driver, b"data: 1\r\n\r"))["events"]) == 1
    assert len((await parsed(driver, b"data: 1\r\n\r", b"\ndata: 2\n\n"))["events"]) == 2


@pytest.mark.parametrize("value", [b"1e3", b"-5", b"2000 ", b"", b"0x10", "٣".encode()])
async def test_retry_that_is_not_all_digits_is_ignored(driver: Driver, value: bytes) -> None:
    assert (await parsed(driver, b"retry: " + value + b"\n"))["retry"] is None


async def test_event_beyond_the_bound_is_a_range_error(driver: Driver) -> None:
    """In one line or many, whole or in pieces; events before it are told."""
    line = b"data: " + b"x" * 200 + b"\n\n"
    lines = (b"data: " + b"x" * 20 + b"\n") * 10 + b"\n"
    first = b"data: first\n\n"
    for pieces in (
        [first, line],
        [first, *(line[at : at + 7] for at in range(0, len(line), 7))],
        [first, line[:-2]],
        [first, lines],
        [first, *lines.splitlines(keepends=True)],
        [first, b"data\n" * 200 + b"\n"],
    ):
        found = await parsed(driver, *pieces, limit=100)
        assert found["error"] == "RangeError", pieces
        assert [event["data"] for event in found["events"]] == ["first"], pieces


async def test_events_within_the_bound_are_no_error_however_many(driver: Driver) -> None:
    """Nor are comments, a heartbeat for hours within an event."""
    event = b"data: " + b"x" * 90 + b"\n\n"
    beats = [b"data: 1\n", *[b": heartbeat\n"] * 50, b"data: 2\n", b"\n"]
    for pieces, count in (([event * 20], 20), ([event[:9], event[9:]] * 20, 20), (beats, 1)):
        found = await parsed(driver, *pieces, limit=100)
        assert (found["error"], len(found["events"])) == (None, count)


@pytest.mark.parametrize(
    ("opening", "unit"),
    [("data: ", "x"), ("data: a\n", "data: b\n"), ("data: a\n", ": heartbeat\n"), ("data: a\n", "id: 1\r\n")],
    ids=["one long line", "many lines", "comments", "ids"],
)
async def test_parsing_takes_time_in_proportion_to_what_comes(driver: Driver, opening: str, unit: str) -> None:
    """Four times as much in tiny pieces takes about four times as long, and not sixteen times."""
    times = 1 << 20
    costs = await driver.value(
        call="parse", long=[[opening, unit, size // len(unit), 16] for size in (times // 4, times)]
    )

    assert costs[1] < 10 * costs[0], costs


async def test_response_in_single_bytes_with_a_byte_order_mark_is_read_as_it_is(driver: Driver) -> None:
    said = "ä€🙂\u2028 e\u0301 \ufeff"
    events = [text(1, said), text(2, "\n"), end(3)]
    scene = Scene([])
    stream = b"\xef\xbb\xbf" + b"".join(frame(scene, event) for event in events).replace(b"\n", b"\r\n")
    scene.turns = [says(*(stream[at : at + 1] for at in range(len(stream))), opening=b"")]
    whole(await play(driver, scene), said + "\n")


# --- an answer, undisturbed -----------------------------------------------------------------------------------------


async def test_answer_of_a_real_server_is_told_in_every_way(
    driver: Driver, server: Server, simulator: Simulator
) -> None:
    """By the iteration, the callbacks and the fields alike, with and without an iteration."""
    words = "Grüße, 🙂! Zwei\u2028Zeilen  und <b>mehr</b>"
    body = prompt(f"[[text='{words}' thinking_tokens=30]]")
    thinking = Script(pace=0, thinking_tokens=30).thinking()
    iterated, only_told = await asyncio.gather(
        driver.run(body=body, options={"url": server.chat}),
        driver.run(body=body, options={"url": server.chat + "/"}, iterate=False),
    )

    whole(iterated, words)
    assert only_told["taken"] == []
    for outcome in (iterated, only_told):
        chat, seen = outcome["chat"], outcome["seen"]
        assert (chat["text"], "".join(outcome["texts"])) == (words, words)
        assert (chat["thinking"], "".join(outcome["thoughts"])) == (thinking, thinking)
        assert states(outcome) == ["connecting", "streaming", "ended"]
        assert chat["cursor"] == f"{chat['id']}.{len(seen)}" == seen[-1]["id"]
        assert chat["usage"] == seen[-1]["usage"] == seen[-1]["data"]["usage"]
        assert chat["usage"]["output_tokens"] == len(outcome["texts"]) + 30
        assert chat["tools"] == []
        assert (outcome["thrown"], outcome["finished"]) == (None, None)
        assert [event["text"] for event in seen if event["type"] == "text"] == outcome["texts"]
        assert {event["event"] for event in seen if event["type"] == "thinking"} == {"content_block_delta"}
        assert [event["type"] for event in seen].count("end") == 1
        assert {"message_start", "content_block_stop", "message_stop"} <= {
            event["event"] for event in seen if event["type"] == "other"
        }
    assert simulator.stats.requests == 2


async def test_every_request_carries_the_headers_that_the_page_gives(driver: Driver, simulator: Simulator) -> None:
    """An access token above all: with the question, with what is read again, with what stops."""
    headers = {"Authorization": "Bearer page-of-this-test"}
    async with serving(simulator.url, access_tokens=["page-of-this-test"]) as server:
        outcome = await driver.run(body=prompt("[[tokens=2]]"), options={"url": server.chat, "headers": headers})
        refused = await driver.run(body=prompt("[[tokens=2]]"), options={"url": server.chat})
    whole(outcome, "w1 w2")
    assert (refused["thrown"]["kind"], refused["thrown"]["status"]) == ("refused", 401)

    scene = Scene([says(text(1, "a"), then="cut"), stopped(2), stopped(2)])
    await play(driver, scene, options={"headers": headers}, rules=[{"at": "text", "nth": 2, "do": "stop"}])

    asked = [*scene.requests, *scene.stops]
    assert [request.line.split()[0] for request in asked] == ["POST", "GET", "GET", "DELETE"]
    assert {request.headers.get("authorization") for request in asked} == {headers["Authorization"]}
    assert {request.headers.get("accept") for request in scene.requests} == {"text/event-stream"}


async def test_page_can_bring_a_fetch_of_its_own_and_credentials(driver: Driver) -> None:
    scene = Scene([says(text(1, "a"), then="cut"), says(end(2))])
    outcome = await play(driver, scene, fetch=True, options={"credentials": "include"})

    whole(outcome, "a")
    assert [(called["method"], called["credentials"]) for called in outcome["fetched"]] == [
        ("POST", "include"),
        ("GET", "include"),
    ]


async def test_end_is_the_end_where_the_body_goes_on(driver: Driver) -> None:
    """It decides, not the connection."""
    scenes = [Scene([says(text(1, "a"), end(2), then=then)]) for then in ("hang", "cut", "reset")]
    for scene, outcome in zip(scenes, await play_all(driver, scenes), strict=True):
        whole(outcome, "a")
        assert len(scene.requests) == 1


async def test_tool_calls_are_accumulated_each_by_its_block(driver: Driver) -> None:
    """Two at once, one whose JSON is broken, one without any input, one that has it all from the start."""

    def start(seq: int, index: int, name: str, **given: int) -> tuple[int, str, Any]:
        block = {"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": given}
        return (
            seq,
            "content_block_start",
            {"type": "content_block_start", "index": index, "content_block": block},
        )

    def piece(seq: int, index: int, json_text: str) -> tuple[int, str, Any]:
        delta = {"type": "input_json_delta", "partial_json": json_text}
        return seq, "content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta}

    def stop(seq: int, index: int) -> tuple[int, str, Any]:
        return seq, "content_block_stop", {"type": "content_block_stop", "index": index}

    scene = Scene(
        [
            says(text(1, "Let me see."), start(2, 1, "weather"), piece(3, 1, ""), piece(4, 1, '{"ci'), then="cut"),
            says(
                *(start(5, 2, "broken"), piece(6, 2, '{"a": '), piece(7, 1, 'ty": "Köln"}'), stop(8, 1)),
                *(stop(9, 2), start(10, 3, "now"), stop(11, 3)),
                *(start(12, 4, "roll", sides=6), stop(13, 4), end(14)),
            ),
        ]
    )
    outcome = await play(driver, scene)

    whole(outcome, "Let me see.")
    weather = {"id": "toolu_1", "name": "weather", "json": '{"city": "Köln"}', "input": {"city": "Köln"}}
    broken = {"id": "toolu_2", "name": "broken", "json": '{"a": '}
    now = {"id": "toolu_3", "name": "now", "json": "", "input": {}}
    roll = {"id": "toolu_4", "name": "roll", "json": "", "input": {"sides": 6}}
    assert outcome["chat"]["tools"] == [weather, broken, now, roll]
    told = [event["tool"] for event in outcome["seen"] if event["type"] == "tool"]
    assert told == [weather, broken, now, roll]


async def test_upstream_without_event_lines_or_with_other_data_is_understood(driver: Driver) -> None:
    """The data says the same as `event:`; what is no JSON, or not of the format, is told as it is."""
    odd = [
        "[DONE]",
        "null",
        "5",
        '"text"',
        "[]",
        "{}",
        '{"delta": null}',
        '{"delta": "x"}',
        '{"delta": {"text": null}}',
    ]
    odd += ['{"content_block": {}}', '{"content_block": null}', '{"delta": {"partial_json": "x"}}', ""]
    block = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}}
    scene = Scene(
        [
            says(
                (1, "", text(1, "a")[2]),
                (2, "", {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}}),
                *((at, "", data) for at, data in enumerate(odd, 3)),
                *((at, "unheard_of", data) for at, data in enumerate(odd, 3 + len(odd))),
                text(100, "b"),
                (101, "", {"type": "content_block_start", "index": 1, "content_block": block}),
                (102, "", {"type": "content_block_stop", "index": 1}),
                (103, "", {"type": "error", "error": {"type": "some_error", "message": "and it goes on"}}),
                end(104),
            )
        ]
    )
    outcome = await play(driver, scene)

    whole(outcome, "ab")
    assert outcome["thoughts"] == ["hm"]
    others = [event["data"] for event in outcome["seen"] if event["type"] == "other"]
    assert others[:-1] == [decoded(data) for data in odd] * 2
    assert [event["event"] for event in outcome["seen"]][-5:-3] == ["content_block_delta", "message"]
    assert [event["type"] for event in outcome["seen"]][-5:] == ["text", "other", "tool", "error", "end"]


def decoded(data: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data


async def test_client_works_where_pages_have_little(driver: Driver, server: Server) -> None:
    """Over plain HTTP there is no crypto.randomUUID; storage can be forbidden."""
    with driver.patched(insecure=True, forbidden=True):
        outcome = await driver.run(body=prompt("[[tokens=3]]"), options={"url": server.chat, "keep": "chat"})
        assert await driver.value(call="saved", name="chat") is None
    whole(outcome, "w1 w2 w3")


# --- a connection that breaks ---------------------------------------------------------------------------------------


CUT = prompt("[[tokens=6 thinking_tokens=2 seed=1]]", model="m")


async def undisturbed(driver: Driver, proxy: CuttingProxy) -> tuple[Outcome, bytes, int]:
    """An answer through the proxy, its body without chunks, the length of its head."""
    line = await proxy.line(None)
    outcome = await driver.run(body=CUT, options={"url": f"{line.origin}/api/chat"})
    head_bytes, _, rest = bytes(line.passed).partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return outcome, body, len(head_bytes) + 4


async def test_connection_cut_anywhere_gives_the_same_answer_from_one_generation(
    driver: Driver, server: Server, simulator: Simulator
) -> None:
    """In the head, in the opening, in frames, between an id and its blank line, before the last chunk."""
    async with CuttingProxy(server.address) as proxy:
        undisturbed_run, body, head_bytes = await undisturbed(driver, proxy)
        before_blank_line = [match.end() - 1 for match in re.finditer(rb"^id: .*\n\n", body, re.MULTILINE)]
        places: list[Place] = [
            *(("head", number) for number in (0, 1, 30, head_bytes - 2, head_bytes - 1)),
            *(("framing", number) for number in range(4)),
            *(("body", number) for number in sorted({*before_blank_line, *range(0, len(body), 29), 1, len(body) - 1})),
            *(("end", number) for number in range(5)),
        ]
        lines: list[Line] = [await proxy.line(place) for place in places]
        with driver.patched():
            runs = [driver.begin(body=CUT, options={"url": f"{line.origin}/api/chat"}) for line in lines]
            outcomes = [await run.outcome() for run in runs]

    expected = undisturbed_run["chat"]
    for line, outcome in zip(lines, outcomes, strict=True):
        whole(outcome, expected["text"])
        assert outcome["chat"]["thinking"] == expected["thinking"], line.place
        assert outcome["chat"]["usage"] == expected["usage"], line.place
        assert outcome["chat"]["cursor"].rpartition(".")[2] == expected["cursor"].rpartition(".")[2], line.place
        # What comes after `end` is nobody's loss.
        after_end = line.place is not None and line.place[0] == "end"
        assert line.cut, line.place
        assert line.requests == (1 if after_end else 2), line.place
        assert bool(pauses(outcome)) is not after_end, line.place
    assert simulator.stats.requests == 1 + len(lines)


async def test_body_that_ends_without_end_is_resumed_at_the_cursor(driver: Driver) -> None:
    """Cleanly, cut off, reset; in an event or between two. What was half told is told whole, and once."""
    half = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"te'
    scenes = [
        Scene([says(text(1, "a"), text(2, "b"), *half_told, then=then), says(text(3, "c"), end(4))])
        for then in ("end", "cut", "reset")
        for half_told in ((), (half,))
    ]
    for scene, outcome in zip(scenes, await play_all(driver, scenes), strict=True):
        whole(outcome, "abc")
        assert states(outcome) == ["connecting", "streaming", "reconnecting", "connecting", "streaming", "ended"]
        assert scene.methods() == ["POST", "GET"]
        assert scene.requests[1].line.split()[1] == f"/api/chat/{scene.id}?compact=1"
        assert scene.cursors() == [None, scene.cursor(2)]
        (pause,) = pauses(outcome)
        assert pause["attempt"] == 1
        assert pause["error"]["kind"] in {"broken", "unreachable"}
        assert pause["error"]["ours"] is True


async def test_question_that_was_not_answered_is_asked_again_with_its_key(driver: Driver) -> None:
    """Until the stream's id is known: no answer, a 503, half of a head, an event stream that does not say its id."""
    scenes = [
        Scene([turn, turn, says(text(1, "a"), end(2))])
        for turn in (
            nothing("cut"),
            nothing("reset"),
            status("503 Service Unavailable", error("overloaded_error", "busy")),
            raw(head()[:40]),
            raw(head("200 OK", "text/event-stream", "Content-Length: 5")),
            says(located=False, opening=b"retry: 2000\n", then="cut"),
        )
    ]
    for scene, outcome in zip(scenes, await play_all(driver, scenes), strict=True):
        whole(outcome, "a")
        assert scene.methods() == ["POST"] * 3
        assert len({request.headers["idempotency-key"] for request in scene.requests}) == 1
        assert len(scene.requests[0].headers["idempotency-key"]) >= 22
        assert {request.body for request in scene.requests} == {json.dumps(scene.body, separators=(",", ":")).encode()}
    assert len({scene.requests[0].headers["idempotency-key"] for scene in scenes}) == len(scenes)


async def test_stream_is_known_by_its_header_or_by_its_opening_line_alone(driver: Driver) -> None:
    """A page of another origin sees no header that is not exposed, and the opening line comes with the first byte."""
    scenes = [
        Scene([says(opening=b"", then="cut"), says(text(1, "a"), end(2))]),
        Scene([says(located=False, then="cut"), says(text(1, "a"), end(2))]),
        Scene([says(text(1, "a"), located=False, opening=b"", then="cut"), says(text(2, ""), end(3))]),
    ]
    for scene, outcome in zip(scenes, await play_all(driver, scenes), strict=True):
        whole(outcome, "a")
        assert outcome["chat"]["id"] == scene.id
        assert scene.methods() == ["POST", "GET"]
    assert [scene.cursors()[1] in {None, scene.cursor(0)} for scene in scenes] == [True, True, False]


async def test_events_that_it_has_are_dropped_but_an_end_never_is(driver: Driver) -> None:
    """A server may tell again what was asked for, and more; after a crash its `end` may come before our cursor."""
    again = Scene(
        [
            says(text(1, "a"), text(2, "b"), then="cut"),
            says(text(1, "a"), text(2, "b"), text(2, "b"), text(3, "c"), text(3, "c"), end(4)),
        ]
    )
    behind = Scene([says(text(1, "a"), text(2, "b"), text(3, "c"), then="cut"), says(end(2))])
    merged = Scene([says(text(1, "a"), then="cut"), says(text(9, "bcdefghi"), text(10, "j"), end(11))])
    outcomes = await play_all(driver, [again, behind, merged])

    whole(outcomes[0], "abc")
    assert (outcomes[1]["chat"]["text"], outcomes[1]["chat"]["reason"]) == ("abc", "complete")
    assert (outcomes[1]["thrown"], states(outcomes[1])[-1]) == (None, "ended")
    whole(outcomes[2], "abcdefghij")
    assert len(behind.requests) == 2


async def test_answer_that_ended_at_the_cursor_is_asked_for_its_end(driver: Driver) -> None:
    """204 says that there is nothing behind the cursor; how it ended, only `end` says."""
    scene = Scene([says(text(1, "a"), then="cut"), status("204 No Content"), says(end(1))])
    outcome = await play(driver, scene)

    assert (outcome["thrown"], outcome["chat"]["text"], outcome["chat"]["reason"]) == (None, "a", "complete")


async def test_server_that_always_answers_204_is_given_up(driver: Driver) -> None:
    """It is none of ours, and must not be asked for ever."""
    scene = Scene([says(text(1, "a"), then="cut"), status("204 No Content")], forever=True)
    outcome = await play(driver, scene, options={"retries": 3})

    assert outcome["thrown"]["kind"] == "lost"
    assert len(scene.requests) < 12


async def test_real_answer_that_is_over_ends_again_from_any_cursor(
    driver: Driver, server: Server, simulator: Simulator
) -> None:
    first = await driver.run(body=prompt("[[tokens=3]]"), options={"url": server.chat})
    chat = first["chat"]
    last = int(chat["cursor"].rpartition(".")[2])
    runs = [
        driver.begin(resume=chat["id"], options={"url": server.chat}, after=f"{chat['id']}.{seq}")
        for seq in (0, 1, last - 1, last, last + 5)
    ]
    outcomes = [await run.outcome() for run in [*runs, driver.begin(resume=chat["id"], options={"url": server.chat})]]

    for outcome in outcomes:
        assert (outcome["thrown"], outcome["chat"]["reason"]) == (None, "complete")
        assert outcome["chat"]["usage"] == chat["usage"]
        assert states(outcome)[-1] == "ended"
    assert [outcome["chat"]["text"] for outcome in outcomes] == ["w1 w2 w3", "w1 w2 w3", "", "", "", "w1 w2 w3"]
    assert simulator.stats.requests == 1


# --- refusals -------------------------------------------------------------------------------------------------------


async def test_question_that_is_refused_is_not_kept(driver: Driver) -> None:
    scene = Scene([status("400 Bad Request", error("some_error", "what is wrong"))])
    outcome = await play(driver, scene, options={"keep": "chat"}, patch={"stored": {}})
    assert outcome["chat"]["state"] == "refused"
    assert outcome["kept"] == {}


async def test_4xx_is_an_error_at_once(driver: Driver) -> None:
    """With what the server says of it; a proxy's page says nothing."""
    said = error("some_error", "what is wrong")
    lines = ["400 Bad Request", "401 Unauthorized", "404 Not Found", "413 Content Too Large"]
    lines += ["422 Unprocessable Content", "429 Too Many Requests"]
    scenes = [Scene([status(line, said, "Retry-After: 7")]) for line in lines]
    scenes.append(Scene([status("403 Forbidden", "<h1>No</h1>", content_type="text/html")]))
    outcomes = await play_all(driver, scenes)

    for line, scene, outcome in zip([*lines, "403"], scenes, outcomes, strict=True):
        thrown = outcome["thrown"]
        assert thrown == outcome["finished"] == outcome["chat"]["error"]
        assert (thrown["name"], thrown["kind"], thrown["status"]) == ("ChatError", "refused", int(line[:3]))
        assert states(outcome) == ["connecting", "refused"]
        assert outcome["states"][-1]["error"] == thrown
        assert (len(scene.requests), outcome["delays"]) == (1, [])
        assert outcome["taken"] == []
    for outcome in outcomes[:-1]:
        thrown = outcome["thrown"]
        assert (thrown["type"], thrown["message"], thrown["retryAfter"]) == ("some_error", "what is wrong", 7)
    assert "403" in outcomes[-1]["thrown"]["message"]
    assert (outcomes[-1]["thrown"].get("type"), outcomes[-1]["thrown"].get("retryAfter")) == (None, None)


async def test_real_refusals_say_what_is_wrong(driver: Driver, server: Server) -> None:
    """Of the server, and of its upstream through it."""
    bodies = [{"messages": []}, prompt("[[status=429 retry_after=9 message=slowly]]"), prompt("[[status=413]]")]
    outcomes = [await driver.run(body=body, options={"url": server.chat}) for body in bodies]

    errors = [outcome["thrown"] for outcome in outcomes]
    assert [(found["kind"], found["status"]) for found in errors] == [
        ("refused", 400),
        ("refused", 429),
        ("refused", 413),
    ]
    assert "messages" in errors[0]["message"]
    assert (errors[1]["type"], errors[1]["retryAfter"], errors[1]["message"]) == ("rate_limit_error", 9, "slowly")


async def test_answer_that_the_server_does_not_know_is_lost(driver: Driver, server: Server) -> None:
    """On coming back to it, in mid-answer or after a reload; that is no refusal, and no second attempt."""
    gone = status("404 Not Found", error("not_found_error", "there is no such stream"))
    scene = Scene([says(text(1, "a"), then="cut"), gone])
    midway = await play(driver, scene, options={"keep": "chat"}, patch={"stored": {}})
    reloaded = await driver.run(resume="A" * 22, options={"url": server.chat})

    for outcome in (midway, reloaded):
        assert (outcome["thrown"]["kind"], outcome["thrown"]["status"]) == ("lost", 404)
        assert states(outcome)[-1] == outcome["chat"]["state"] == "lost"
        assert outcome["states"][-1]["error"] == outcome["thrown"]
    assert midway["chat"]["text"] == "a"
    assert midway["kept"] == {}
    assert len(scene.requests) == 2


async def test_wrong_use_is_thrown_at_once(driver: Driver) -> None:
    """An address that is none, no question, a cursor of another answer: nothing is asked, or retried."""
    url = "http://127.0.0.1:9/api/chat"
    for job in (
        {"body": prompt("x"), "options": {"url": "no address"}},
        {"resume": {}, "options": {"url": url}},
        {"resume": "A" * 22, "options": {"url": url, "after": "B" * 22 + ".1"}},
    ):
        found = await driver.value(call="create", **job)
        assert found is not None, job
        assert found["name"] == "TypeError", job


# --- trying again ---------------------------------------------------------------------------------------------------


def unavailable(*fields: str) -> Turn:
    return status("503 Service Unavailable", error("overloaded_error", "busy"), *fields)


@pytest.mark.parametrize("random", [0, 0.5, 0.999])
async def test_pauses_grow_twofold_with_full_jitter_up_to_the_longest(driver: Driver, random: float) -> None:
    scene = Scene([unavailable()], forever=True)
    capped = Scene([unavailable()], forever=True)
    outcomes = [
        await play(driver, scene, options={"retries": 6}, patch={"random": random}),
        await play(driver, capped, options={"retries": 4, "maxDelayMs": 5000}, patch={"random": random}),
    ]

    ceilings = [2000, 4000, 8000, 16_000, 30_000, 30_000], [2000, 4000, 5000, 5000]
    for outcome, most in zip(outcomes, ceilings, strict=True):
        assert outcome["delays"] == delays(outcome) == pytest.approx([random * ms for ms in most])
        assert [pause["attempt"] for pause in pauses(outcome)] == list(range(1, len(most) + 1))
    assert len(scene.requests) == 7


async def test_attempts_that_are_used_up_are_lost(driver: Driver) -> None:
    """Ten by default: the error says after what, and what there is of the answer stays, to be come back to."""
    scenes = [
        Scene([turn], forever=True)
        for turn in (
            unavailable(),
            status("502 Bad Gateway", "<h1>nginx</h1>", content_type="text/html"),
            nothing("cut"),
            status("200 OK", "<h1>Log in</h1>", content_type="text/html"),
            says(then="cut"),
            says(then="end"),
        )
    ]
    partial = Scene([says(text(1, "a"), then="cut"), nothing("reset")], forever=True)
    outcomes = await play_all(driver, [*scenes, partial], options={"keep": "chat"}, patch={"stored": {}})

    for scene, outcome in zip([*scenes, partial], outcomes, strict=True):
        thrown = outcome["thrown"]
        assert (thrown["name"], thrown["kind"], thrown["ours"]) == ("ChatError", "lost", True)
        assert states(outcome)[-1] == outcome["chat"]["state"] == "lost"
        assert outcome["states"][-1]["error"] == thrown == outcome["chat"]["error"]
        # After progress the connection that brought it is no attempt.
        assert len(scene.requests) == 11
    kinds = [[pause["error"]["kind"] for pause in pauses(outcome)] for outcome in outcomes]
    assert [set(found) for found in kinds[:4]] == [{"unavailable"}, {"unavailable"}, {"unreachable"}, {"broken"}]
    assert [set(found) <= {"broken", "unreachable"} for found in kinds[4:]] == [True] * 3
    assert pauses(outcomes[0])[0]["error"]["status"] == 503
    assert pauses(outcomes[0])[0]["error"]["type"] == "overloaded_error"
    assert pauses(outcomes[1])[0]["error"]["status"] == 502
    assert "streaming" not in states(outcomes[3])
    assert outcomes[-1]["chat"]["text"] == "a"
    assert json.loads(outcomes[-1]["kept"]["chat"])["id"]


async def test_limit_of_attempts_is_the_pages(driver: Driver) -> None:
    scenes = [Scene([unavailable()], forever=True), Scene([*[unavailable()] * 40, says(text(1, "a"), end(2))])]
    none = await play(driver, scenes[0], options={"retries": 0})
    endless = await play(driver, scenes[1], options={"retries": "Infinity"})

    assert (none["thrown"]["kind"], len(scenes[0].requests)) == ("lost", 1)
    whole(endless, "a")


async def test_refused_connections_are_tried_again(driver: Driver) -> None:
    """Nobody listens, then somebody does."""
    scene = Scene([says(text(1, "a"), end(2))])
    async with stage(scene) as at:
        port = int(at.url.rpartition(":")[2].partition("/")[0])
    with driver.patched():
        run = begin(driver, f"http://127.0.0.1:{port}/api/chat", scene, options={"retries": 3})
        outcome = await run.outcome()

    assert outcome["thrown"]["kind"] == "lost"
    assert {pause["error"]["kind"] for pause in pauses(outcome)} == {"unreachable"}
    assert len(pauses(outcome)) == 3


async def test_retry_after_is_waited_for_at_least(driver: Driver) -> None:
    """As seconds or as a date; jitter comes on top, and what it says is not cut by the page's longest pause."""
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(minutes=1), usegmt=True)
    ended = says(text(1, "a"), end(2))
    for random in (0, 0.5):
        scene = Scene([unavailable("Retry-After: 45"), unavailable(f"Retry-After: {in_a_minute}"), ended])
        odd = Scene([*(unavailable(f"Retry-After: {value}") for value in ("soon", "-5", "")), ended])
        outcome, other = await play_all(driver, [scene, odd], patch={"random": random})
        whole(outcome, "a")
        first, second = delays(outcome)
        assert 45_000 + random * 2000 == pytest.approx(first)
        assert 40_000 < second <= 61_000 + 4000
        assert pauses(outcome)[0]["error"]["retryAfter"] == 45
        assert delays(other) == pytest.approx([random * ms for ms in (2000, 4000, 8000)])


async def test_retry_after_beyond_what_timers_can_is_no_busy_loop(driver: Driver) -> None:
    """A timer of more than 2^31 - 1 milliseconds fires at once."""
    scene = Scene([unavailable("Retry-After: 99999999999"), says(text(1, "a"), end(2))])
    outcome = await play(driver, scene, rules=[{"at": "state:reconnecting", "do": "reconnect"}])

    whole(outcome, "a")
    assert 1_000_000_000 < delays(outcome)[0] < 2**31


async def test_retry_of_the_stream_is_the_base(driver: Driver) -> None:
    down = unavailable()
    scene = Scene(
        [
            says(b"retry: 300\n", text(1, "a"), then="cut"),
            down,
            down,
            says(text(2, "b"), opening=b"retry: 10000\n", then="cut"),
            down,
            says(end(3)),
        ]
    )
    outcome = await play(driver, scene, patch={"random": 0.999})

    whole(outcome, "ab")
    assert delays(outcome) == pytest.approx([0.999 * ms for ms in (300, 600, 1200, 10_000, 20_000)])


async def test_attempts_begin_anew_with_every_new_event(driver: Driver) -> None:
    """A connection that is reset after each event brings the answer, however few attempts are allowed."""
    count = 40
    scene = Scene([*(says(text(seq, "x"), then="cut") for seq in range(1, count + 1)), says(end(count + 1))])
    outcome = await play(driver, scene, options={"retries": 1})

    whole(outcome, "x" * count)
    assert {pause["attempt"] for pause in pauses(outcome)} == {1}
    assert max(delays(outcome)) <= 2000


async def test_events_that_are_not_new_are_no_progress(driver: Driver) -> None:
    """Nor is an opening, nor a heartbeat: else a server that breaks off at the same place is asked for ever."""
    again = Scene([says(text(1, "a"), then="cut")], forever=True)
    beats = Scene([says(text(1, "a"), then="cut"), says(b": heartbeat\n", then="cut")], forever=True)
    for scene, outcome in zip(
        [again, beats], await play_all(driver, [again, beats], options={"retries": 4}), strict=True
    ):
        assert (outcome["thrown"]["kind"], outcome["chat"]["text"]) == ("lost", "a")
        assert len(scene.requests) == 5


# --- a server that shuts down ---------------------------------------------------------------------------------------


async def test_reconnect_with_resume_comes_back_elsewhere_after_its_retry(driver: Driver) -> None:
    """What comes before the server closes is read; one that does not close is left."""
    retry = b"retry: 120\n"
    closes = Scene(
        [says(text(1, "a"), retry, reconnect(resume=True), text(2, "b"), then="cut"), says(text(3, "c"), end(4))]
    )
    stays = Scene([says(text(1, "a"), retry, reconnect(resume=True), then="hang"), says(text(2, "bc"), end(3))])
    drained = Scene([says(text(1, "a"), retry, reconnect(resume=True), text(2, "bc"), end(3))])
    scenes = [closes, stays, drained]
    async with stage(*scenes) as at:
        runs = [begin(driver, at.url, scene, options={"retries": 1}) for scene in scenes]
        outcomes = [await run.outcome() for run in runs]

    for outcome in outcomes:
        whole(outcome, "abc")
        (told,) = (event for event in outcome["seen"] if event["type"] == "reconnect")
        assert (told["event"], told["resume"], told["data"]["deadline_ms"]) == ("reconnect", True, 25000)
        assert told["id"].endswith(".1")
    for scene, outcome in zip([closes, stays], outcomes, strict=False):
        assert scene.methods() == ["POST", "GET"]
        assert scene.connections[0] is not scene.connections[1]
        (pause,) = pauses(outcome)
        assert pause["error"]["kind"] == "moved"
        assert pause["attempt"] == 1
        assert 0 <= pause["delayMs"] <= 120
    assert closes.cursors()[1] == closes.cursor(2)
    assert len(drained.requests) == 1


async def test_reconnect_without_resume_stays(driver: Driver) -> None:
    go = asyncio.Event()
    scene = Scene(
        [
            says(
                text(1, "a"),
                b"retry: 10\n",
                reconnect(resume=False),
                text(2, "b"),
                until=go,
                last=(text(3, "c"), end(4)),
            )
        ]
    )
    async with stage(scene) as at:
        run = begin(driver, at.url, scene)
        while (await run.so_far())["chat"]["text"] != "ab":
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # ten times its `retry`; it must not come back then
        go.set()
        outcome = await run.outcome()

    whole(outcome, "abc")
    assert len(scene.requests) == 1
    (told,) = (event for event in outcome["seen"] if event["type"] == "reconnect")
    assert told["resume"] is False


async def test_server_that_was_told_to_stop_ends_its_running_answer(driver: Driver, simulator: Simulator) -> None:
    """A real drain: `reconnect`, and the answer goes on to its end on the same connection."""
    async with serving(simulator.url, drain_s=600) as server:
        run = driver.begin(body=prompt("[[tokens=30 pace=60]]"), options={"url": server.chat})
        while not (await run.so_far())["chat"]["text"]:
            await asyncio.sleep(0.01)
        draining = asyncio.create_task(server.drain.run())
        outcome = await run.outcome()
        await draining
    whole(outcome, Script(tokens=30).answer())
    assert [event["resume"] for event in outcome["seen"] if event["type"] == "reconnect"] == [False]
    assert states(outcome) == ["connecting", "streaming", "ended"]


# --- silence --------------------------------------------------------------------------------------------------------


async def test_connection_that_falls_silent_is_left_for_another(driver: Driver) -> None:
    """In mid-answer and before the first line alike; the server's own heartbeat counts where it tells."""
    ended = says(text(2, "b"), end(3))
    scenes = [
        Scene([says(text(1, "a"), then="hang"), ended]),
        Scene([nothing("hang"), says(text(1, "ab"), end(2))]),
        Scene([raw(head()[:30], then="hang"), says(text(1, "ab"), end(2))]),
    ]
    told = Scene([says(text(1, "a"), then="hang", fields=("Aisse-Heartbeat: 0.25",)), ended])
    async with stage(*scenes, told) as at:
        with driver.patched():
            runs = [begin(driver, at.url, scene, options={"heartbeatMs": 250}) for scene in scenes]
            runs.append(begin(driver, at.url, told, options={"heartbeatMs": 3_600_000}))
            outcomes = [await run.outcome() for run in runs]
            for scene in [*scenes, told]:
                await scene.connections[0].lost.wait()

    for scene, outcome in zip([*scenes, told], outcomes, strict=True):
        whole(outcome, "ab")
        (pause,) = pauses(outcome)
        assert (pause["error"]["kind"], pause["attempt"]) == ("silent", 1)
        # Timers may be a millisecond early.
        before = outcome["states"][outcome["states"].index(pause) - 1]
        assert pause["at"] - before["at"] > 745
        assert len(scene.requests) == 2
    assert scenes[1].methods() == ["POST", "POST"]
    assert len({request.headers["idempotency-key"] for request in scenes[1].requests}) == 1


async def test_server_that_is_always_silent_is_given_up(driver: Driver) -> None:
    scenes = [Scene([says(then="hang")], forever=True), Scene([nothing()], forever=True)]
    outcomes = await play_all(driver, scenes, options={"heartbeatMs": 60, "retries": 2})

    for scene, outcome in zip(scenes, outcomes, strict=True):
        assert outcome["thrown"]["kind"] == "lost"
        assert len(scene.requests) == 3


async def test_heartbeats_keep_a_connection(driver: Driver) -> None:
    """However little comes; and where the server says that they are rarer, the client waits for longer."""

    async def beating(scene: Scene, *_: Any) -> None:
        connection = scene.connections[0]
        connection.send(head(), chunk(frame(scene, text(1, "a"))))
        # Each is less than a heartbeat's line, all of them take longer than the client bears silence.
        for byte in b": heartbeat\n: heartbeat\n":
            await asyncio.sleep(0.06)
            connection.send(chunk(bytes([byte])))
        connection.send(chunk(frame(scene, end(2))))

    after = asyncio.Event()
    rare = Scene([says(text(1, "a"), fields=("Aisse-Heartbeat: 1000",), until=after, last=(end(2),))])
    scenes = [Scene([beating]), rare]
    async with stage(*scenes) as at:
        runs = [
            begin(driver, at.url, scene, options={"heartbeatMs": ms})
            for scene, ms in zip(scenes, (300, 200), strict=True)
        ]
        outcomes = [await runs[0].outcome()]
        so_far = await runs[1].so_far()
        after.set()
        outcomes.append(await runs[1].outcome())

    for scene, outcome in zip(scenes, outcomes, strict=True):
        whole(outcome, "a")
        assert len(scene.requests) == 1
    # That is as long as the other took.
    assert so_far["chat"]["silenceMs"] > 1000
    assert outcomes[1]["chat"]["silenceMs"] == 0


async def test_tab_that_was_suspended_finds_its_connection_as_it_was(driver: Driver) -> None:
    """Its timers fire before it reads what came meanwhile: that is no silence."""
    go = asyncio.Event()
    scene = Scene([says(text(1, "a"), text(2, "b"), until=go, last=(text(3, "c"), end(4)))])
    async with stage(scene) as at:
        run = begin(
            driver, at.url, scene, options={"heartbeatMs": 200}, rules=[{"at": "text", "do": "freeze"}], freeze_ms=1400
        )
        go.set()
        outcome = await run.outcome()

    whole(outcome, "abc")
    assert len(scene.requests) == 1


@pytest.mark.parametrize("what", ["online", "reconnect"])
async def test_online_and_reconnect_come_back_at_once(driver: Driver, what: str) -> None:
    """Out of a pause, and on a connection that says nothing; from within a callback, and from outside."""
    pausing = [unavailable("Retry-After: 3600"), says(text(1, "ab"), end(2))]
    hanging = [says(text(1, "a"), then="hang"), says(text(2, "b"), end(3))]
    for turns, state, at_what in ((pausing, "reconnecting", "state:reconnecting"), (hanging, "streaming", "text")):
        scenes = [Scene(turns), Scene(turns)]
        async with stage(*scenes) as at:
            outside = begin(driver, at.url, scenes[0])
            while (await outside.so_far())["chat"]["state"] != state:
                await asyncio.sleep(0.01)
            outside.do(what)
            # One after the other: all chats of a page hear that it is online.
            outcomes = [await outside.outcome()]
            outcomes.append(await begin(driver, at.url, scenes[1], rules=[{"at": at_what, "do": what}]).outcome())
        for scene, outcome in zip(scenes, outcomes, strict=True):
            whole(outcome, "ab")
            assert len(scene.requests) == 2
            (pause,) = pauses(outcome)
            assert (pause["delayMs"] == 0) is (turns is hanging)
        assert await driver.value(call="listeners") == 0


async def test_tab_that_is_shown_again_comes_back_where_its_timer_is_late(driver: Driver) -> None:
    """Those of hidden tabs are. Who only looks elsewhere and back does not ask before the time."""
    scene = Scene([unavailable("Retry-After: 3000"), says(text(1, "a"), end(2))])
    async with stage(scene) as at:
        run = begin(driver, at.url, scene)
        while (await run.so_far())["chat"]["state"] != "reconnecting":
            await asyncio.sleep(0.01)
        for action in ("hide", "show", "an hour passes", "hide"):
            run.do(action)
        await asyncio.sleep(0.1)  # for what must not happen
        assert (await run.so_far())["chat"]["state"] == "reconnecting"
        assert len(scene.requests) == 1
        run.do("show")
        outcome = await run.outcome()

    whole(outcome, "a")
    assert await driver.value(call="listeners") == 0


# --- stopping -------------------------------------------------------------------------------------------------------


def after(event: asyncio.Event, turn: Turn) -> Turn:
    async def late(scene: Scene, request: Request, connection: Connection) -> None:
        await event.wait()
        await turn(scene, request, connection)

    return late


def ends_as(outcome: Outcome, state: str, reason: str | None = None) -> None:
    """AssertionError unless it ended so, and nothing was thrown."""
    chat = outcome["chat"]
    assert (outcome["thrown"], outcome["finished"]) == (None, None), outcome
    assert (chat["state"], chat.get("reason"), states(outcome)[-1]) == (state, reason, state)


async def test_stop_deletes_and_resolves_at_the_end(driver: Driver) -> None:
    """Whenever it is called: in mid-answer, before there is an id, twice, and over DELETEs that fail."""
    midway = {"rules": [{"at": "text", "do": "stop"}]}
    turn, deaf = stopped(1), stopped(1, "Aisse-Heartbeat: 0.3")
    cases: list[tuple[list[Turn], list[Turn], dict[str, Any]]] = [
        ([turn], [], midway),
        ([turn], [], {"at_start": "stop"}),
        ([turn], [], {"rules": [{"at": "state:connecting", "do": "stop"}]}),
        ([turn], [], {"rules": [{"at": "state:streaming", "do": "stop"}]}),
        ([turn], [], {"rules": [*midway["rules"], {"at": "state:connecting", "nth": 2, "do": "stop"}]}),
        ([turn], [], {"rules": [*midway["rules"], {"at": "event:end", "do": "stop"}]}),
        ([turn], [unavailable(), nothing("reset")], midway),
        ([deaf], [nothing()], midway),
        ([says(text(1, "a"), then="cut"), stopped(2)], [], {"rules": [{"at": "state:reconnecting", "do": "stop"}]}),
    ]
    scenes = [Scene(turns, forever=True, stop_turns=refusals) for turns, refusals, _ in cases]
    async with stage(*scenes) as at:
        with driver.patched(stored={}):
            runs = [
                # No attempt is left for what fails: freeing its connection is no attempt.
                begin(driver, at.url, scene, options={"keep": "chat", "retries": 0 if turns == [turn] else 10}, **job)
                for scene, (turns, _, job) in zip(scenes, cases, strict=True)
            ]
            outcomes = [await run.outcome() for run in runs]

    for scene, (turns, _, _), outcome in zip(scenes, cases, outcomes, strict=True):
        ends_as(outcome, "ended", "stopped")
        in_order(outcome)
        if turns == [turn]:
            assert "reconnecting" not in states(outcome)
            assert states(outcome)[-3:] == ["connecting", "streaming", "ended"]
        assert outcome["seen"][-1]["reason"] == "stopped"
        assert len(scene.stops) == 1 + len(scene.stop_turns)
        assert scene.stops[0].line == f"DELETE /api/chat/{scene.id} HTTP/1.1"
    assert outcomes[-1]["kept"] == {}


async def test_stop_of_a_real_answer_keeps_what_came(driver: Driver, server: Server) -> None:
    outcome = await driver.run(
        body=prompt("[[tokens=100000 pace=500]]"),
        options={"url": server.chat},
        rules=[{"at": "text", "nth": 3, "do": "stop"}],
    )
    ends_as(outcome, "ended", "stopped")
    assert Script(tokens=1000).answer().startswith(outcome["chat"]["text"])
    assert outcome["chat"]["text"].startswith("w1 w2 w3")
    assert outcome["stops"] == 1
    await eventually(lambda: server.registry.active_streams == 0)


async def test_stop_has_a_deadline_whatever_the_heartbeat(driver: Driver) -> None:
    """Of whole milliseconds: 1000 times 2.01 is not one, for a computer."""
    scene = Scene([stopped(1, "Aisse-Heartbeat: 2.01")], forever=True)
    ends_as(await play(driver, scene, rules=[{"at": "text", "do": "stop"}]), "ended", "stopped")
    assert len(scene.stops) == 1


async def test_stop_in_a_pause_comes_back_for_the_end_at_once(driver: Driver) -> None:
    scene = Scene([says(text(1, "a"), then="cut"), unavailable("Retry-After: 3600"), stopped(2)])
    rules = [{"at": "state:reconnecting", "nth": 2, "do": "stop"}]
    outcome = await play(driver, scene, rules=rules, patch={"quick": 60_000})

    ends_as(outcome, "ended", "stopped")


async def test_stop_where_there_is_no_answer_yet_leaves(driver: Driver) -> None:
    """Nothing was begun that could be stopped, and nothing is kept to be asked again."""
    cases: list[tuple[Scene, dict[str, Any]]] = [
        (Scene([unavailable("Retry-After: 3600")]), {"rules": [{"at": "state:reconnecting", "do": "stop"}]}),
        (Scene([unavailable()]), {"at_start": "stop"}),
    ]
    for scene, job in cases:
        outcome = await play(driver, scene, **job, options={"keep": "chat"}, patch={"stored": {}})
        ends_as(outcome, "detached")
        assert (len(scene.requests), len(scene.stops)) == (1, 0)
        assert outcome["kept"] == {}


async def test_stop_that_is_refused_is_an_error(driver: Driver) -> None:
    """But for an answer that the server does not know any more: that is over."""
    scenes = [
        Scene([says(text(1, "a"), then="hang")], stop_turns=[status(line, error("some_error", "no"))])
        for line in ("403 Forbidden", "404 Not Found")
    ]
    forbidden, gone = await play_all(driver, scenes, rules=[{"at": "text", "do": "stop"}])

    assert (forbidden["thrown"]["kind"], forbidden["thrown"]["status"]) == ("refused", 403)
    ends_as(gone, "detached")


async def test_stop_within_the_loop_is_resolved_however_much_has_come(driver: Driver) -> None:
    """Whoever awaits it there takes no event meanwhile; what came before the end is told after."""
    many = [text(seq, "x") for seq in range(2, 400)]

    async def turn(scene: Scene, request: Any, connection: Any) -> None:
        await says(text(1, "x"), *many, until=scene.stopped, last=(end(400, "stopped"),))(scene, request, connection)

    scene = Scene([turn], forever=True)
    outcome = await play(driver, scene, stop_at="content_block_delta")

    ends_as(outcome, "ended", "stopped")
    assert outcome["chat"]["text"] == "x" * 399
    in_order(outcome)


async def test_stop_frees_its_connection_then_asks_then_reads_what_is_left(driver: Driver) -> None:
    """One after the other: the only connection that is to be had serves all three."""
    asked_with: list[int] = []

    async def after_the_first(scene: Scene, request: Request, connection: Connection) -> None:
        await scene.connections[0].lost.wait()
        # What would come back too early comes within these.
        for _ in range(100):
            await asyncio.sleep(0.001)
        asked_with.append(len(scene.requests))
        connection.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    left = says(text(2, "b"), end(3, "stopped"))
    scene = Scene([says(text(1, "a"), then="hang"), left], stop_turns=[after_the_first])
    outcome = await play(driver, scene, rules=[{"at": "text", "do": "stop"}])

    ends_as(outcome, "ended", "stopped")
    in_order(outcome)
    assert (asked_with, scene.methods(), scene.cursors()) == ([1], ["POST", "GET"], [None, scene.cursor(1)])
    assert outcome["chat"]["text"] == "ab"
    assert states(outcome) == ["connecting", "streaming", "connecting", "streaming", "ended"]


async def test_stop_among_six_connections_disturbs_no_other_and_drops_a_question_that_waits(
    driver: Driver, server: Server, simulator: Simulator
) -> None:
    took: list[float] = []
    rounds = 50 if os.environ.get("TESTS_SOAK") == "1" else 5
    endless = {"body": prompt("[[tokens=100000 pace=50]]"), "options": {"url": server.chat}}
    with driver.patched(connections=6):
        others = [driver.begin(**endless) for _ in range(5)]
        for _ in range(rounds):
            sixth = driver.begin(**endless, rules=[{"at": "text", "nth": 3, "do": "stop"}])
            outcome = await sixth.outcome()
            ends_as(outcome, "ended", "stopped")
            in_order(outcome)
            assert Script(tokens=100_000).answer().startswith(outcome["chat"]["text"])
            assert states(outcome) == ["connecting", "streaming", "connecting", "streaming", "ended"]
            took.append(outcome["states"][-1]["at"] - outcome["states"][2]["at"])
        sixth = driver.begin(**endless)
        for run in [*others, sixth]:
            while not (await run.so_far())["chat"]["text"]:
                await asyncio.sleep(0.01)
        seventh = driver.begin(**endless, rules=[{"at": "state:waiting", "do": "stop"}])
        never_sent = await seventh.outcome()
        assert simulator.stats.requests == 6 + rounds
        for run in [*others, sixth]:
            assert states(await run.so_far()) == ["connecting", "streaming"]
            run.do("stop")
        outcomes = [await run.outcome() for run in [*others, sixth]]

    ends_as(never_sent, "detached")
    assert states(never_sent) == ["connecting", "waiting", "detached"]
    for outcome in outcomes:
        ends_as(outcome, "ended", "stopped")
        in_order(outcome)
        assert Script(tokens=100_000).answer().startswith(outcome["chat"]["text"])
    took.sort()
    sys.stdout.write(f"stop among six, {rounds} times: {took[rounds // 2]:.0f} ms, longest {took[-1]:.0f} ms\n")


async def test_stop_of_a_question_whose_answer_is_late_waits_for_its_id_but_not_for_ever(driver: Driver) -> None:
    """What the server has begun is stopped there. A question that a browser queues may never get there."""
    go = asyncio.Event()
    late, never = Scene([after(go, stopped(1)), stopped(1)]), Scene([nothing()])
    early = Scene([nothing()])
    options = {"keep": "chat"}
    rules = [{"at": "state:waiting", "do": "stop"}]
    async with stage(late, never, early) as at:
        with driver.patched():
            stopped_late = begin(driver, at.url, late, rules=rules)
            others = [
                begin(driver, at.url, never, rules=rules),
                begin(driver, at.url, early, at_start="stop", options=options),
            ]
            while (await stopped_late.so_far())["chat"]["state"] != "waiting":
                await asyncio.sleep(0.01)
            assert not late.stops
            go.set()
            ends_as(await stopped_late.outcome(), "ended", "stopped")
            for run in others:
                outcome = await run.outcome()
                ends_as(outcome, "detached")
                first, *_, last = outcome["states"]
                assert last["at"] - first["at"] > 5900  # longer than a server's first_byte_commit_s
    assert (len(late.stops), len(never.stops), len(early.stops)) == (1, 0, 0)


async def test_stop_that_fails_is_asked_again_after_pauses_that_grow(driver: Driver) -> None:
    """Each takes the connection away for a moment."""
    scene = Scene([stopped(1)], forever=True, stop_turns=[unavailable()] * 6)
    outcome = await play(driver, scene, rules=[{"at": "text", "do": "stop"}])

    ends_as(outcome, "ended", "stopped")
    in_order(outcome)
    assert outcome["delays"] == [2000, 4000, 8000, 16000, 30000, 30000]
    assert len(scene.stops) == 7


async def test_failure_after_a_stop_is_one_as_any_other(driver: Driver) -> None:
    """It counts, it is waited for, and it is no move of which the stopped connection was told."""
    moved = says(text(1, "a"), reconnect(resume=True), then="hang")
    scene = Scene([moved, unavailable("Retry-After: 1"), says(end(2, "stopped"))])
    outcome = await play(driver, scene, rules=[{"at": "event:reconnect", "do": "stop"}])

    ends_as(outcome, "ended", "stopped")
    (pause,) = pauses(outcome)
    assert (pause["error"]["kind"], pause["attempt"], pause["delayMs"]) == ("unavailable", 1, 2000)


async def test_stop_that_was_answered_does_not_wait_long_for_what_is_left(driver: Driver) -> None:
    """The connection that it freed may be a question's by now."""
    scene = Scene([says(text(1, "a"), then="hang"), nothing()])
    outcome = await play(driver, scene, rules=[{"at": "text", "do": "stop"}])

    ends_as(outcome, "detached")
    assert states(outcome) == ["connecting", "streaming", "connecting", "detached"]
    assert outcome["chat"]["text"] == "a"
    assert (len(scene.requests), len(scene.stops)) == (2, 1)


async def test_answer_that_is_abandoned_while_it_is_stopped_is_stopped(driver: Driver) -> None:
    """`Aisse-On-Leave: cancel`: freeing the connection ends it before it is asked for. That is no failure."""
    failure = {"type": "error", "error": {"type": "abandoned_error", "message": "nobody was left to read this answer"}}
    gone = says(text(1, "a"), (2, "error", failure), end(3, "abandoned"))
    scene = Scene([says(text(1, "a"), then="hang"), gone])
    outcome = await play(driver, scene, rules=[{"at": "text", "do": "stop"}])

    ends_as(outcome, "ended", "stopped")
    assert [(event["type"], event.get("reason")) for event in outcome["seen"]] == [
        ("text", None), ("other", None), ("end", "stopped"),
    ]  # fmt: skip


@pytest.mark.parametrize("on_leave", ["cancel", "0", "5"])
async def test_stop_of_a_real_answer_is_no_failure_whatever_leaving_means(
    driver: Driver, server: Server, on_leave: str
) -> None:
    outcome = await driver.run(
        body=prompt("[[tokens=100000 pace=500]]"),
        options={"url": server.chat, "headers": {"Aisse-On-Leave": on_leave}},
        rules=[{"at": "text", "nth": 3, "do": "stop"}],
    )
    ends_as(outcome, "ended", "stopped")
    assert "error" not in {event["type"] for event in outcome["seen"]}


async def test_stop_is_asked_for_though_the_page_leaves(driver: Driver) -> None:
    """At once, or because there is no answer: leaving does not wait for it either."""
    stops = {"at": "text", "do": "stop"}
    cases: list[list[dict[str, Any]]] = [
        [{"at": "text", "do": "stop and detach"}],
        [stops, {"at": "state:connecting", "nth": 2, "do": "detach"}],
        [stops, {"at": "state:waiting", "do": "detach"}],
    ]
    scenes = [Scene([says(text(1, "a"), then="hang")], stop_turns=[nothing()]) for _ in cases]
    async with stage(*scenes) as at:
        runs = [
            begin(driver, at.url, scene, rules=rules, options={"heartbeatMs": 3_600_000})
            for scene, rules in zip(scenes, cases, strict=True)
        ]
        for run in runs:
            ends_as(await run.outcome(), "detached")
        await eventually(lambda: [len(scene.stops) for scene in scenes] == [1, 1, 1])
    assert [len(scene.requests) for scene in scenes] == [1, 1, 1]


async def test_stop_of_a_server_that_shuts_down_leaves_where_it_cannot_be_told(driver: Driver) -> None:
    """It was said that nobody comes back to it: no attempt is made."""
    scene = Scene([says(text(1, "a"), reconnect(resume=False), then="hang")], stop_turns=[nothing("reset")])
    outcome = await play(driver, scene, rules=[{"at": "event:reconnect", "do": "stop"}])

    ends_as(outcome, "detached")
    assert (len(scene.requests), len(scene.stops)) == (1, 1)


# --- waiting --------------------------------------------------------------------------------------------------------


async def test_request_without_an_answer_says_so_until_there_is_one(driver: Driver) -> None:
    """A question, a reader that comes back, a stop: each may stand in a browser's queue."""
    go = asyncio.Event()
    whole_answer = says(text(1, "a"), end(2))
    scenes = [
        Scene([after(go, whole_answer)]),
        Scene([says(then="cut"), after(go, whole_answer)]),
        Scene([stopped(1)], forever=True, stop_turns=[after(go, status("503 Service Unavailable"))]),
        Scene([after(go, unavailable()), whole_answer]),
    ]
    rules = [[], [], [{"at": "text", "do": "stop"}], []]
    async with stage(*scenes) as at:
        with driver.patched(quick=0):
            runs = [begin(driver, at.url, scene, rules=what) for scene, what in zip(scenes, rules, strict=True)]
            for run in runs:
                while (await run.so_far())["chat"]["state"] != "waiting":
                    await asyncio.sleep(0.01)
            go.set()
            outcomes = [await run.outcome() for run in runs]

    begun = ["connecting", "streaming"]
    waited = ["connecting", "waiting"]
    assert [states(outcome) for outcome in outcomes] == [
        [*waited, "streaming", "ended"],
        [*begun, "reconnecting", *waited, "streaming", "ended"],
        # The stop came to nothing, so that it reads on, and asks again.
        [*begun, *waited, "streaming", *begun, "ended"],
        [*waited, "reconnecting", *begun, "ended"],
    ]
    for outcome in outcomes:
        times = [entry["at"] for entry in outcome["states"]]
        waits = states(outcome).index("waiting")
        assert times[waits] - times[waits - 1] > 1990


# --- leaving --------------------------------------------------------------------------------------------------------


async def test_leaving_closes_the_connection_and_stops_nothing(driver: Driver) -> None:
    """By `detach`, out of the loop, by the signal with its reason; nothing is thrown but that."""
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"rules": [{"at": "text", "do": "detach"}]}, None),
        ({"break_at": "content_block_delta"}, None),
        ({"rules": [{"at": "text", "do": "abort"}]}, "AbortError"),
        ({"rules": [{"at": "text", "do": "abort for a reason"}]}, "Error"),
    ]
    scenes = [Scene([says(text(1, "a"), then="hang")]) for _ in cases]
    async with stage(*scenes) as at:
        with driver.patched():
            runs = [begin(driver, at.url, scene, **job) for scene, (job, _) in zip(scenes, cases, strict=True)]
            outcomes = [await run.outcome() for run in runs]
        for scene in scenes:
            await scene.connections[0].lost.wait()

    for scene, outcome, (_, thrown) in zip(scenes, outcomes, cases, strict=True):
        if thrown is None:
            ends_as(outcome, "detached")
        else:
            assert outcome["thrown"]["name"] == outcome["finished"]["name"] == thrown
            assert states(outcome)[-1] == outcome["chat"]["state"] == "detached"
        assert outcome["chat"]["text"] == "a"
        assert (len(scene.requests), len(scene.stops)) == (1, 0)
    assert outcomes[3]["thrown"]["message"] == "the page's reason"
    assert await driver.value(call="listeners") == 0


@pytest.mark.parametrize("how", ["detach", "abort"])
async def test_leaving_in_a_callback_is_told_nothing_of_what_came_in_the_same_bytes(driver: Driver, how: str) -> None:
    scene = Scene([says(text(1, "a"), text(2, "b"), text(3, "c"), end(4))])
    rules = [{"at": "text", "nth": 2, "do": how}]
    outcome = await play(driver, scene, rules=rules, options={"keep": "chat"}, patch={"stored": {}})

    assert (outcome["chat"]["state"], outcome["chat"]["text"]) == ("detached", "ab")
    assert (outcome["thrown"] is None) is (how == "detach")
    assert json.loads(outcome["kept"]["chat"]) == {"id": scene.id, "cursor": f"{scene.id}.2"}


async def test_chat_that_ends_leaves_what_the_next_one_keeps(driver: Driver) -> None:
    """Under the same name: a page that stops an answer and asks the next question at once."""
    go = asyncio.Event()
    scenes = [Scene([says(text(1, "a"), until=go, last=(end(2, "stopped"),))]), Scene([nothing("hang")])]
    async with stage(*scenes) as at:
        with driver.patched(stored={}):
            first, second = (begin(driver, at.url, scene, options={"keep": "chat"}) for scene in scenes)
            while not scenes[1].requests:
                await asyncio.sleep(0.01)
            go.set()
            outcome = await first.outcome()
            second.do("detach")
            await second.outcome()
    assert outcome["chat"]["state"] == "ended"
    assert json.loads(outcome["kept"]["chat"])["key"] == scenes[1].requests[0].headers["idempotency-key"]


async def test_leaving_ends_whatever_it_waits_for(driver: Driver) -> None:
    """A request without an answer, a pause; and one that had left before asks nothing."""
    cases: list[tuple[Turn, dict[str, Any]]] = [
        (nothing(), {"rules": [{"at": "state:connecting", "do": "abort"}]}),
        (unavailable("Retry-After: 3600"), {"rules": [{"at": "state:reconnecting", "do": "abort"}]}),
        (nothing(), {"rules": [{"at": "state:connecting", "do": "detach"}]}),
        (unavailable("Retry-After: 3600"), {"rules": [{"at": "state:reconnecting", "do": "detach"}]}),
        (nothing(), {"before": "abort"}),
        (nothing(), {"at_start": "detach"}),
    ]
    scenes = [Scene([turn]) for turn, _ in cases]
    async with stage(*scenes) as at:
        runs = [begin(driver, at.url, scene, **job) for scene, (_, job) in zip(scenes, cases, strict=True)]
        outcomes = [await run.outcome() for run in runs]

    for outcome, (_, job) in zip(outcomes, cases, strict=True):
        aborted = job.get("before", job.get("rules", [{}])[0].get("do")) == "abort"
        assert (outcome["thrown"] is not None) is aborted, outcome
        assert states(outcome)[-1] == "detached"
    assert [len(scene.requests) for scene in scenes[-2:]] == [0, 0]


async def test_what_a_callback_throws_is_thrown_and_not_retried(driver: Driver) -> None:
    """Also an error of our own kind: the connection did not break."""
    places = ["state:connecting", "state:streaming", "text", "event:content_block_delta", "event:end", "state:ended"]
    cases = [(place, "throw") for place in places] + [("text", "throw ours"), ("state:streaming", "throw ours")]
    scenes = [Scene([says(text(1, "a"), end(2), then="hang")]) for _ in cases]
    broken = Scene([unavailable()])
    async with stage(*scenes, broken) as at:
        with driver.patched():
            runs = [
                begin(driver, at.url, scene, rules=[{"at": place, "do": what}])
                for scene, (place, what) in zip(scenes, cases, strict=True)
            ]
            runs.append(begin(driver, at.url, broken, rules=[{"at": "state:reconnecting", "do": "throw"}]))
            outcomes = [await run.outcome() for run in runs]
        for scene, (place, _) in zip(scenes, cases, strict=True):
            if place in {"state:streaming", "text", "event:content_block_delta"}:
                await scene.connections[0].lost.wait()

    for scene, outcome in zip([*scenes, broken], outcomes, strict=True):
        assert outcome["thrown"] is not None, outcome
        assert outcome["thrown"]["message"] == outcome["finished"]["message"] == "the page's own"
        assert len(scene.requests) <= 1
        assert outcome["chat"]["state"] not in {"connecting", "streaming", "reconnecting", "lost", "refused"}
    assert await driver.value(call="listeners") == 0


async def test_loop_that_takes_its_time_slows_the_server_and_loses_nothing(driver: Driver) -> None:
    """Reading pauses, and the watchdog does not take that for silence."""
    count, sent = 400, 0

    async def plenty(scene: Scene, request: Any, connection: Any) -> None:
        nonlocal sent
        connection.send(head())
        for seq in range(1, count + 1):
            connection.send(chunk(frame(scene, text(seq, "x" * 65_536))))
            await connection.drain()
            sent = seq
        connection.send(chunk(frame(scene, end(count + 1))))

    scene = Scene([plenty])
    async with stage(scene) as at:
        run = begin(driver, at.url, scene, options={"heartbeatMs": 100}, pause_at="content_block_delta", brief=True)
        before = -1
        while not sent or sent != before:  # the kernels take what they take
            before = sent
            await asyncio.sleep(0.5)
        paused_at = sent
        so_far = await run.so_far()
        run.do("go")
        outcome = await run.outcome()

    assert paused_at < count // 2
    assert len(so_far["taken"]) == 1
    assert len(so_far["seen"]) < 100
    assert outcome["thrown"] is None
    in_order(outcome)
    assert outcome["chat"]["text"] == count * 65_536
    assert len(scene.requests) == 1


async def test_signal_ends_reading_while_the_loop_takes_nothing(driver: Driver) -> None:
    scene = Scene([says(*(text(seq, "x") for seq in range(1, 200)), then="hang")])
    async with stage(scene) as at:
        run = begin(driver, at.url, scene, pause_at="content_block_delta")
        while len((await run.so_far())["seen"]) < 64:
            await asyncio.sleep(0.01)
        run.do("abort")
        await scene.connections[0].lost.wait()
        assert (await run.so_far())["chat"]["state"] == "detached"
        run.do("go")
        outcome = await run.outcome()

    assert outcome["thrown"]["name"] == "AbortError"


# --- how an answer ends ---------------------------------------------------------------------------------------------


async def test_answer_that_is_not_whole_is_told_to_its_end_and_then_thrown(driver: Driver) -> None:
    reasons = ["abandoned", "error", "truncated", "timeout", "limit", "shutdown", "producer_lost"]
    failure = {"type": "error", "error": {"type": "some_error", "message": "what went wrong"}}
    scenes = [Scene([says(text(1, "a"), (2, "error", failure), end(3, reason))]) for reason in reasons]
    outcomes = await play_all(driver, scenes)

    for reason, outcome in zip(reasons, outcomes, strict=True):
        thrown, chat = outcome["thrown"], outcome["chat"]
        assert (thrown["kind"], thrown["type"], thrown["message"]) == ("failed", "some_error", "what went wrong")
        assert thrown == outcome["finished"] == chat["error"] == outcome["states"][-1]["error"]
        assert (chat["state"], chat["reason"], chat["text"]) == ("ended", reason, "a")
        assert chat["usage"]["input_tokens"] == 7
        assert [event["type"] for event in outcome["taken"]] == ["text", "error", "end"]
        assert outcome["taken"][1]["error"] == failure["error"]


@pytest.mark.parametrize(("fault", "reason"), [("error", "error"), ("cut at=900", "truncated")])
async def test_real_answer_that_fails_is_thrown_with_its_error(
    driver: Driver, server: Server, fault: str, reason: str
) -> None:
    outcome = await driver.run(body=prompt(f"[[tokens=60 fault={fault}]]"), options={"url": server.chat})

    assert (outcome["thrown"]["kind"], outcome["chat"]["reason"]) == ("failed", reason)
    assert outcome["thrown"]["type"]
    assert outcome["thrown"]["message"]
    assert states(outcome) == ["connecting", "streaming", "ended"]
    assert Script(tokens=60).answer().startswith(outcome["chat"]["text"])
    assert outcome["chat"]["text"] != ""


# --- coming back after a reload -------------------------------------------------------------------------------------


async def test_answer_is_read_again_from_its_beginning_or_after_a_cursor(driver: Driver) -> None:
    scenes = [Scene([says(text(1, "a"), text(2, "b"), end(3))]), Scene([says(text(2, "b"), end(3))])]
    async with stage(*scenes) as at:
        outcomes = [
            await driver.run(resume=scenes[0].id, options={"url": at.url}),
            await driver.run(resume={"id": scenes[1].id}, options={"url": at.url}, after=scenes[1].cursor(1)),
        ]

    assert [outcome["chat"]["text"] for outcome in outcomes] == ["ab", "b"]
    assert [scene.cursors() for scene in scenes] == [[None], [scenes[1].cursor(1)]]
    for scene, outcome in zip(scenes, outcomes, strict=True):
        ends_as(outcome, "ended", "complete")
        assert scene.requests[0].line == f"GET /api/chat/{scene.id}?compact=1 HTTP/1.1"


async def saved(driver: Driver, entry: str | None) -> Any:
    with driver.patched(stored={"entries": {} if entry is None else {"chat": entry}}):
        return await driver.value(call="saved", name="chat")


async def test_unfinished_answer_is_kept_with_its_cursor_and_gone_on_with(driver: Driver) -> None:
    """Up to the last event that the callbacks have had; and until it is finished, then no more."""
    first = Scene([says(text(1, "a"), text(2, "b"), then="hang"), says(text(3, "c"), end(4))])
    async with stage(first) as at:
        with driver.patched(stored={}):
            job = {"options": {"keep": "chat"}, "rules": [{"at": "text", "nth": 2, "do": "detach"}]}
            left = await begin(driver, at.url, first, **job).outcome()
        found = await saved(driver, left["kept"]["chat"])
        assert (found["id"], found["cursor"]) == (first.id, first.cursor(2))
        with driver.patched(stored={"entries": left["kept"]}):
            options = {"url": at.url, "keep": "chat"}
            rest = await driver.run(resume=found, options=options, after=found["cursor"])

    ends_as(rest, "ended", "complete")
    assert left["chat"]["text"] + rest["chat"]["text"] == "abc"
    assert first.cursors() == [None, first.cursor(2)]
    assert rest["kept"] == {}
    # A reload may come at any time.
    steps = [json.loads(entry).get("cursor") for entry in left["written"]]
    assert steps[-2:] == [first.cursor(1), first.cursor(2)]
    assert json.loads(rest["written"][0])["cursor"] == first.cursor(2)


async def test_question_without_an_answer_is_kept_and_asked_again_with_its_key(driver: Driver) -> None:
    scene = Scene([nothing(), says(text(1, "a"), end(2))])
    async with stage(scene) as at:
        with driver.patched(stored={}):
            run = begin(driver, at.url, scene, options={"keep": "chat"})
            await eventually(lambda: len(scene.requests) == 1)
            run.do("detach")
            left = await run.outcome()
        found = await saved(driver, left["kept"]["chat"])
        with driver.patched(stored={"entries": left["kept"]}):
            again = await driver.run(resume=found, options={"url": at.url, "keep": "chat"})

    whole(again, "a")
    assert scene.methods() == ["POST", "POST"]
    assert scene.requests[0].body == scene.requests[1].body
    assert scene.requests[0].headers["idempotency-key"] == scene.requests[1].headers["idempotency-key"]
    assert json.loads(again["written"][-2])["id"] == scene.id
    assert again["kept"] == {}


async def test_what_cannot_be_kept_or_was_damaged_is_no_error(driver: Driver) -> None:
    scene = Scene([says(text(1, "a"), end(2))])
    full = await play(driver, scene, options={"keep": "chat"}, patch={"stored": {"full": True}})

    whole(full, "a")
    for entry in (
        None,
        "",
        "{",
        "null",
        "5",
        "true",
        "[]",
        '"text"',
        "{}",
        '{"id":""}',
        '{"cursor":"x.1"}',
        '{"key":"k"}',
    ):
        assert await saved(driver, entry) is None, entry


# --- elsewhere, and the package -------------------------------------------------------------------------------------


async def test_client_runs_in_a_worker_and_lets_it_end(node: str, server: Server) -> None:
    """Where there is no window, no document and no storage; no timer of it keeps the process."""
    process = await asyncio.create_subprocess_exec(
        node,
        str(HERE / "node" / "worker.mjs"),
        CLIENT.as_uri(),
        server.chat,
        json.dumps(prompt("[[tokens=5]]")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    assert err == b""
    told = json.loads(out)
    assert (told["text"], told["reason"], told["saved"]) == (Script(tokens=5).answer(), "complete", None)
    assert told["events"] > 5


@pytest.fixture(scope="module")
def npm(node: str) -> str:
    found = shutil.which("npm")
    if found is None:
        missing("npm is not installed")
    return found


@pytest.fixture(scope="module")
def compiler() -> Path:
    """tsc, installed where it is not."""
    folder = HERE / "node"
    try:
        node_with(folder)
    except NodeMissingError as error:
        missing(str(error))
    return folder / "node_modules" / ".bin" / "tsc"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A folder in which the package is installed."""
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "aisse").symlink_to(WEB)
    shutil.copy(HERE / "node" / "usage.mts", tmp_path)
    return tmp_path


def test_declarations_hold_for_a_page_that_uses_all_of_them(node: str, compiler: Path, page: Path) -> None:
    options = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom,dom.iterable"]
    done = subprocess.run(
        [node, str(compiler), *options, "usage.mts"], cwd=page, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout


def test_exports_are_those_that_are_declared_and_used(node: str, page: Path) -> None:
    script = 'import * as aisse from "aisse"; console.log(JSON.stringify(Object.keys(aisse).sort()))'
    done = subprocess.run(
        [node, "--input-type=module", "--eval", script],
        cwd=page,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    declared = re.findall(r"^export (?:class|function|const) (\w+)", (WEB / "aisse.d.ts").read_text(), re.MULTILINE)
    assert json.loads(done.stdout) == sorted(declared)
    types = re.findall(r"^export (?:interface|type) (\w+)", (WEB / "aisse.d.ts").read_text(), re.MULTILINE)
    usage = (page / "usage.mts").read_text()
    assert [name for name in declared + types if not re.search(rf"\b{name}\b", usage)] == []


def test_package_holds_the_client_its_types_and_its_page(npm: str) -> None:
    """And nothing of the chat page beside it; its version is the server's."""
    done = subprocess.run(
        [npm, "pack", "--dry-run", "--json"], cwd=WEB, capture_output=True, text=True, check=True, timeout=60
    )
    (packed,) = json.loads(done.stdout)
    names = {file["path"] for file in packed["files"]}
    assert names == {"LICENSE", "README.md", "aisse.d.ts", "aisse.js", "package.json"}
    assert (WEB / "LICENSE").read_text() == (WEB.parents[1] / "LICENSE").read_text()
    assert packed["version"] == __version__
    manifest = json.loads((WEB / "package.json").read_text())
    assert not {"dependencies", "scripts", "private"} & set(manifest)


def test_client_is_small() -> None:
    assert len(gzip.compress(CLIENT.read_bytes(), 9)) < GZIPPED_BYTES
