"""The page in Chromium, against processes that are killed, drained and cut off: what a person would see of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import aiohttp
import pytest
import pytest_asyncio
from breakable_proxy import BreakableProxy
from browser import CHROMIUM, launched, opened, watched
from command import health, refuses_connections, served
from conftest import eventually
from node import NodeMissingError, node_with
from pictures import take
from rawupstream import (
    LAST_CHUNK,
    MESSAGE_STOP,
    Connection,
    Request,
    chunk,
    delta,
    head,
    message_delta,
    message_start,
    raw_upstream,
)

from aisse.simulator import Script
from nginx import Nginx, found, nginx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from command import Command
    from playwright.async_api import Browser, Page

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")
WAIT_MS = 60_000  # ten times what anything takes; for a machine that has other things to do
OFFLINE_S = 1.0  # in which 16 events would come
RESET_EVERY_S = 0.5

# Plain words, so that the page shows them as they are; each place has its own.
WORDS = " ".join(f"{number} Wörter 漢字 слова 🙂" for number in range(44))
LONG = f"[[pace=16 text='{WORDS}']]"
"""Fourteen seconds of answer: time enough for all that happens to it, also where the machine has other things to do."""


def missing(reason: str, what: str) -> NoReturn:
    if what in REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        missing("chromium is not installed", "chromium")
    async with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def binary() -> Path:
    path = next((path for path in found().values() if path is not None), None)
    if path is None:
        missing("nginx is not installed", "nginx")
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def simulated() -> AsyncIterator[Command]:
    """A server with its own simulator, for what breaks neither."""
    async with served("--upstream", "simulator", "--heartbeat-s", "1") as running:
        yield running


def answer(question: str) -> str:
    """What the simulator answers."""
    return Script.parse(question, Script()).answer()


# --- what a person does, and sees -----------------------------------------------------------------------------------


async def ask(page: Page, question: str) -> None:
    await page.locator("#prompt").fill(question)
    await page.keyboard.press("Enter")


async def state(page: Page, expected: str) -> None:
    """Returns once the strip shows that state."""
    await page.locator(f"#strip[data-state={expected}]").wait_for(timeout=WAIT_MS)


async def until(page: Page, condition: str) -> None:
    # By timer: a hidden tab has no frames.
    await page.wait_for_function(f"() => {condition}", timeout=WAIT_MS, polling=50)


async def begun(page: Page, characters: int = 100) -> None:
    """Returns once so much of the answer is shown."""
    await until(page, f"document.querySelector('article:last-of-type .text')?.textContent.length >= {characters}")


async def settled(page: Page, expected: str = "ended") -> None:
    """Returns once the answer is over, and all of it is shown."""
    await state(page, expected)
    await page.locator("article.answer footer").last.wait_for(timeout=WAIT_MS)


async def shown(page: Page) -> str:
    """The text of the last answer, with all that has come for it."""
    await page.evaluate(
        "() => document.hidden || new Promise((shown) => requestAnimationFrame(() => setTimeout(shown)))"
    )
    return await page.locator("article.answer .text").last.text_content() or ""


async def reconnects(page: Page) -> int:
    return int(await page.locator("#reconnects").text_content() or "")


async def generations(upstream: Command) -> int:
    """How many answers that simulator was asked for."""
    async with aiohttp.ClientSession() as client, client.get(upstream.url + "/stats") as response:
        stats = await response.json()
        requests: int = stats["requests"]
        return requests


# The pauses between attempts are drawn by chance; with this they come out short.
SHORT_PAUSES = "Math.random = () => 0.001;"
LONGEST_PAUSE_MS = 10  # the page's ten seconds, times that


# --- the connection -------------------------------------------------------------------------------------------------


async def stands_still(page: Page) -> None:
    """Lasts as long as the network is gone. What was on its way may still come, but nothing later."""
    async with asyncio.timeout(WAIT_MS / 1000):
        before = ""
        while (now := await shown(page)) != before:
            before = now
            await asyncio.sleep(OFFLINE_S)
    assert len(before) < len(WORDS)


async def goes_offline(page: Page, proxy: BreakableProxy) -> None:
    """The network ends with a reset of all that used it."""
    await page.context.set_offline(offline=True)
    proxy.down()
    await state(page, "reconnecting")
    await stands_still(page)
    proxy.up()
    await page.context.set_offline(offline=False)
    await settled(page)
    assert proxy.broken == 1


async def goes_offline_silently(page: Page, proxy: BreakableProxy) -> None:
    """Nobody says that the connection is gone; it stays open, and dead, when the network is back."""
    await page.context.set_offline(offline=True)
    proxy.down(silently=True)
    await stands_still(page)
    await state(page, "streaming")
    proxy.up()
    await page.context.set_offline(offline=False)
    await settled(page)
    assert proxy.broken == 1


async def is_reset_again_and_again(page: Page, proxy: BreakableProxy) -> None:
    ended = asyncio.create_task(settled(page))
    while not ended.done():
        await asyncio.sleep(RESET_EVERY_S)
        proxy.reset()
    await ended
    assert proxy.broken >= 3
    assert await reconnects(page) >= 3


async def is_reloaded(page: Page, proxy: BreakableProxy) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(f"{request.method} {re.sub('[?].*', '', request.url)}"))
    await page.reload()
    assert await page.locator(".question").all_text_contents() == [LONG]
    await settled(page)
    (resumed,) = [request for request in asked if "/api/" in request]
    assert re.fullmatch(rf"GET {proxy.url}/api/chat/[\w-]{{22}}", resumed)
    assert proxy.streams == 2


BREAKS: list[Callable[[Page, BreakableProxy], Awaitable[None]]] = [
    goes_offline,
    goes_offline_silently,
    is_reset_again_and_again,
    is_reloaded,
]


async def test_answer_is_whole_however_its_connection_breaks(browser: Browser, binary: Path) -> None:
    """All at the same time, each on a page and a connection of its own."""
    # Heartbeats that are rarer than anything waits for: none of them saves what ought to come back by itself.
    rare = ("--heartbeat-s", "100")
    async with served("simulate") as llm, served("--upstream", llm.url, "--open", *rare) as aisse:

        async def broken(how: Callable[[Page, BreakableProxy], Awaitable[None]]) -> None:
            # Else most resets would find it waiting for its next attempt.
            init = SHORT_PAUSES if how is is_reset_again_and_again else ""
            async with BreakableProxy(aisse.address) as proxy, opened(browser, proxy.url + "/", init=init) as page:
                await ask(page, LONG)
                await begun(page)
                assert proxy.streams == 1
                await how(page, proxy)
                assert await shown(page) == WORDS
                assert await reconnects(page) >= (how is not is_reloaded)

        async with asyncio.TaskGroup() as tasks:
            for how in BREAKS:
                tasks.create_task(broken(how), name=how.__name__).add_done_callback(named)
            tasks.create_task(hidden(browser, aisse), name="hidden").add_done_callback(named)
            tasks.create_task(behind_a_proxy_that_is_killed(browser, binary, aisse), name="proxy").add_done_callback(
                named
            )
        assert await generations(llm) == len(BREAKS) + 2


def named(task: asyncio.Task[None]) -> None:
    """Lets a failure say which of several it is."""
    if not task.cancelled() and (error := task.exception()) is not None:
        error.add_note(f"in: {task.get_name()}")


async def hidden(browser: Browser, aisse: Command) -> None:
    """A tab behind another is no lost one; and one whose connection breaks comes back before anybody looks at it."""
    tabs = browser.contexts[0]
    async with BreakableProxy(aisse.address) as proxy, watched(tabs, proxy.url + "/") as page:
        await ask(page, LONG)
        await begun(page)
        other = await tabs.new_page()
        await until(page, "document.hidden")
        await begun(page, 300)
        assert (proxy.streams, await reconnects(page)) == (1, 0)
        proxy.reset()
        assert proxy.broken == 1
        await settled(page)
        assert await page.evaluate("document.visibilityState") == "hidden"
        assert await shown(page) == WORDS
        assert await reconnects(page) == 1
        await other.close()


async def behind_a_proxy_that_is_killed(browser: Browser, binary: Path, aisse: Command) -> None:
    async with nginx(binary, [aisse.address]) as first, opened(browser, first.url + "/") as page:
        failed: list[str] = []
        await ask(page, LONG)
        await begun(page)
        page.on("requestfailed", lambda request: failed.append(request.method))
        await kill(first)
        await state(page, "reconnecting")
        # The running answer, and at least one attempt to go on with it.
        await eventually(lambda: len(failed) >= 2, timeout_s=WAIT_MS / 1000)
        assert len(await shown(page)) < len(WORDS)
        async with nginx(binary, [aisse.address], port=first.address[1]) as second:
            await settled(page)
            assert await shown(page) == WORDS
            assert await reconnects(page) == 1
            await eventually(lambda: bool(second.access_log()))
            assert [line["path"][:10] for line in second.access_log()] == ["/api/chat/"]


async def kill(server: Nginx) -> None:
    os.killpg(server.process.pid, signal.SIGKILL)
    await server.process.wait()


# --- servers that end -----------------------------------------------------------------------------------------------


class Upstream:
    """An LLM that says the first half of its answer, and the rest when it may."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.asked = 0

    async def answer(self, _: Request, connection: Connection) -> None:
        self.asked += 1
        half = len(WORDS) // 2
        connection.send(head(), chunk(message_start() + delta(WORDS[:half])))
        await self.may_end.wait()
        connection.send(chunk(delta(WORDS[half:]) + message_delta() + MESSAGE_STOP), LAST_CHUNK)


async def test_answer_of_a_server_that_is_killed_is_kept_and_asked_for_again(browser: Browser) -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url) as killed,
        opened(browser, killed.url + "/", init=SHORT_PAUSES) as page,
    ):
        await ask(page, "Why?")
        await begun(page)
        killed.process.kill()
        await killed.exit()
        async with turning_away(killed.address) as turned_away:
            await settled(page, "lost")
            kept = await shown(page)
            assert kept == WORDS[: len(WORDS) // 2].rstrip()
            problem = page.locator("article.answer .problem")
            assert re.search("The connection was lost.*Reconnect", await problem.text_content() or "")
            assert await page.locator("#prompt").is_enabled()
            # Some attempts met nobody; each of the others may have been two connections.
            attempts = len(turned_away)
            assert attempts <= 22
            await page.evaluate("(ms) => new Promise((later) => setTimeout(later, ms))", 50 * LONGEST_PAUSE_MS)
            assert len(turned_away) == attempts
        async with served("--upstream", llm.url, "--port", str(killed.address[1])):
            await page.get_by_role("button", name="Reconnect").click()
            await until(page, "document.querySelector('.problem').textContent.includes('no longer has')")
            await settled(page, "lost")
            assert await shown(page) == kept
            assert not await page.get_by_role("button", name="Reconnect").is_visible()
            upstream.may_end.set()
            await page.get_by_role("button", name="Try again").click()
            await settled(page)
            assert await shown(page) == WORDS
            assert await page.locator(".question").count() == 1
            assert not await problem.is_visible()
            assert len(llm.requests) == 2


@contextlib.asynccontextmanager
async def turning_away(address: tuple[str, int]) -> AsyncIterator[list[None]]:
    """Listens in place of a server that is gone, and ends each connection; one item for each."""
    came: list[None] = []

    def turn_away(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(None)
        writer.transport.abort()

    listener = await asyncio.start_server(turn_away, *address)
    try:
        yield came
    finally:
        listener.close()
        await listener.wait_closed()


async def test_native_eventsource_as_in_the_readme_resumes_and_stops_by_itself(browser: Browser) -> None:
    readme = Path(__file__).parents[2] / "aisse" / "web" / "README.md"
    (code,) = [code for code in re.findall(r"```js\n(.*?)```", readme.read_text(), re.DOTALL) if "EventSource" in code]
    assert len(code.splitlines()) <= 10
    async with (
        served("simulate", "--tokens", "300", "--pace", "25") as llm,
        served("--upstream", llm.url) as aisse,
        BreakableProxy(aisse.address) as proxy,
        opened(browser, proxy.url + "/") as page,
    ):
        logged: list[str] = []
        page.on("console", lambda message: logged.append(message.text) if message.type == "log" else None)
        run = (
            "async () => { const answer = window.answer = document.createElement('p');"
            + code
            + "window.source = source; }"
        )
        await page.evaluate(run)
        await until(page, "answer.textContent.length > 50")
        proxy.reset()
        await until(page, "source.readyState === EventSource.CONNECTING")
        assert await page.evaluate("answer.textContent.length") < len(Script(tokens=300).answer())
        # It is told that there is nothing more by the answer to one attempt after the end.
        await until(page, "source.readyState === EventSource.CLOSED")
        assert await page.evaluate("answer.textContent") == Script(tokens=300).answer()
        assert logged == ["complete"]
        assert (proxy.broken, proxy.streams) == (1, 2)
        assert await generations(llm) == 1


# --- below a path ---------------------------------------------------------------------------------------------------


async def test_page_and_native_eventsource_find_their_way_below_a_path(browser: Browser, binary: Path) -> None:
    """All at the same time, each on a page and a connection of its own."""
    async with (
        served("simulate") as llm,
        served("--upstream", llm.url, "--base-path", "/llm") as aisse,
        served("--upstream", llm.url) as unaware,
        nginx(binary, [aisse.address], prefix="left") as left,
        nginx(binary, [aisse.address], prefix="taken off") as taken_off,
        # What this server says leads beside its path. The page does not go by that.
        nginx(binary, [unaware.address], prefix="taken off") as forgotten,
    ):

        async def used(site: Nginx, use: Callable[[Page, BreakableProxy], Awaitable[None]]) -> None:
            async with BreakableProxy(site.address) as proxy, opened(browser, proxy.url + "/llm/") as page:
                await use(page, proxy)

        sites = {"left": left, "taken off": taken_off, "forgotten": forgotten}
        uses = [(page_is_used, name) for name in sites]
        uses += [(native_eventsource_is_used, name) for name in sites if name != "forgotten"]
        async with asyncio.TaskGroup() as tasks:
            for use, name in uses:
                tasks.create_task(used(sites[name], use), name=f"{use.__name__}, {name}").add_done_callback(named)
        assert await generations(llm) == 2 * len(uses)


async def page_is_used(page: Page, proxy: BreakableProxy) -> None:
    asked: list[str] = []
    bad: list[tuple[str, int]] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("response", lambda got: bad.append((got.url, got.status)) if got.status >= 400 else None)
    await page.reload()
    await page.get_by_text("Answered by").wait_for(timeout=WAIT_MS)
    await ask(page, LONG)
    await begun(page)
    proxy.reset()
    await until(page, "document.querySelector('#reconnects').textContent === '1'")
    await page.reload()
    await page.locator("#drawer-toggle").click()
    await page.locator("#second").click()
    await settled(page)
    assert await shown(page) == WORDS
    await page.locator(".second[data-same=true]").wait_for(timeout=WAIT_MS)
    await page.locator("#drawer-close").click()
    await ask(page, "[[tokens=3000 pace=20]]")
    await begun(page, 20)
    await page.get_by_role("button", name="Stop").click()
    await settled(page)
    paths = [url.removeprefix(proxy.url) for url in asked if not url.startswith("data:")]
    assert [path for path in paths if not path.startswith("/llm/")] == []
    # Asked, come back, again after the reload, the second reader; asked, stopped.
    assert len([path for path in paths if path.startswith("/llm/api/chat")]) >= 6
    assert bad == []


async def native_eventsource_is_used(page: Page, proxy: BreakableProxy) -> None:
    readme = Path(__file__).parents[2] / "aisse" / "web" / "README.md"
    (code,) = [code for code in re.findall(r"```js\n(.*?)```", readme.read_text(), re.DOTALL) if "EventSource" in code]
    assert code.count('"/api/chat"') == 1
    code = code.replace('"/api/chat"', '"/llm/api/chat"').replace("Why is the sky blue?", "[[tokens=300 pace=25]]")
    run = (
        "async () => { const answer = window.answer = document.createElement('p'); window.reason = '';"
        + code
        + "window.source = source;"
        + "source.addEventListener('end', (event) => (window.reason = JSON.parse(event.data).reason)); }"
    )
    await page.evaluate(run)
    await until(page, "answer.textContent.length > 50")
    proxy.reset()
    await until(page, "source.readyState === EventSource.CONNECTING")
    await until(page, "source.readyState === EventSource.CLOSED")
    assert await page.evaluate("[answer.textContent, reason]") == [answer("[[tokens=300]]"), "complete"]
    assert (proxy.broken, proxy.streams) == (1, 2)
    await page.evaluate(run)
    await until(page, "answer.textContent.length > 50")
    assert await page.evaluate("async () => (await fetch(source.url, { method: 'DELETE' })).status") == 204
    await until(page, "source.readyState === EventSource.CLOSED")
    assert await page.evaluate("reason") == "stopped"


async def test_conversations_of_two_servers_below_paths_of_one_origin_do_not_mix(browser: Browser) -> None:
    """One server stands for both: it answers below its path and without it."""
    async with (
        served("--upstream", "simulator", "--base-path", "/llm") as aisse,
        opened(browser, aisse.url + "/llm/") as page,
    ):

        async def listed(path: str) -> list[str]:
            await page.goto(aisse.url + path)
            return await page.locator("#history li button").all_text_contents()

        await ask(page, "[[tokens=5]] below")
        await settled(page)
        assert await listed("/") == []
        await ask(page, "[[tokens=5]] beside")
        await settled(page)
        assert len(beside := await listed("/")) == 1
        assert len(below := await listed("/llm/")) == 1
        assert beside != below
        assert await shown(page) == answer("[[tokens=5]]")


async def test_server_that_shuts_down_ends_its_answer_and_the_other_takes_questions(
    browser: Browser, binary: Path
) -> None:
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url, "--open") as one,
        served("--upstream", llm.url, "--open") as other,
        nginx(binary, [one.address, other.address]) as front,
        aiohttp.ClientSession() as client,
        opened(browser, front.url + "/") as page,
    ):
        await ask(page, "Why?")
        await begun(page)
        running = [(await health(client, instance))["activeStreams"] for instance in (one, other)]
        assert sorted(running) == [0, 1]
        ending, staying = (one, other) if running[0] else (other, one)
        ending.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_MS / 1000):
            while not await refuses_connections(ending):
                await asyncio.sleep(0.005)
        async with opened(browser, front.url + "/") as later:
            await ask(later, "Why then?")
            await begun(later)
            # The first one goes on at its old place while the other begins.
            await state(page, "streaming")
            assert (await health(client, staying))["activeStreams"] == 1
            upstream.may_end.set()
            for each in (page, later):
                await settled(each)
                assert await shown(each) == WORDS
                assert await reconnects(each) == 0
        assert await ending.exit() == 0
        assert len(llm.requests) == 2


# --- six connections ------------------------------------------------------------------------------------------------

CONNECTIONS = 6
"""What a browser has for an origin, over HTTP/1.1."""

# `asked` are the chats of `ask`, in order; `stop` tells how many milliseconds it took.
MANY = """async () => {
  const { streamChat } = await import("/aisse.js");
  window.asked = [];
  window.ask = () => {
    const states = [];
    const chat = streamChat({ messages: [{ role: "user", content: "Why?" }] }, { onState: (it) => states.push(it) });
    asked.push(Object.assign(chat, { states }));
  };
  window.stop = async (index) => {
    const from = performance.now();
    await asked[index].stop();
    return performance.now() - from;
  };
}"""


@contextlib.asynccontextmanager
async def six_answers(browser: Browser, upstream: Upstream) -> AsyncIterator[tuple[Page, Command]]:
    """A page that can `ask` and `stop` (see MANY), with six answers half said."""
    async with (
        raw_upstream(upstream.answer) as llm,
        # Rare, so that no deadline is short; and who leaves without a stop is seen to run on.
        served("--upstream", llm.url, "--heartbeat-s", "100", "--leave-s", "100") as aisse,
        opened(browser, aisse.url + "/") as page,
    ):
        await page.locator("#upstream").get_by_text("Answered by").wait_for(timeout=WAIT_MS)
        await page.evaluate(MANY)
        await ask_six(page)
        yield page, aisse


async def ask_six(page: Page) -> None:
    await page.evaluate(f"() => {{ for (let n = 0; n < {CONNECTIONS}; n += 1) ask(); }}")
    await until(page, f"asked.slice(-{CONNECTIONS}).every((chat) => chat.text.length >= {len(WORDS) // 2})")


async def stop(page: Page, index: int) -> float:
    async with asyncio.timeout(WAIT_MS / 1000):
        took: float = await page.evaluate(f"stop({index})")
    return took


async def told(page: Page, index: int) -> dict[str, Any]:
    """What a chat of the page says of itself."""
    chat: dict[str, Any] = await page.evaluate(
        """(index) => {
          const { id, states, reason = "", text, error } = asked[index];
          return { id, states, reason, text, failed: error !== undefined };
        }""",
        index,
    )
    assert not chat["failed"], chat
    return chat


STOPPED = ["connecting", "streaming", "connecting", "streaming", "ended"]
UNDISTURBED = ["connecting", "streaming", "ended"]


async def test_stop_among_six_answers_ends_its_own_and_disturbs_none(browser: Browser) -> None:
    """Nobody else's connection would ever be free for it."""
    upstream, rounds = Upstream(), 50 if os.environ.get("TESTS_SOAK") == "1" else 3
    took = []
    async with six_answers(browser, upstream) as (page, aisse), aiohttp.ClientSession() as client:
        for number in range(rounds):
            if number:
                await ask_six(page)
            first, stopped = CONNECTIONS * number, CONNECTIONS * number + number % CONNECTIONS
            took.append(await stop(page, stopped))
            upstream.may_end.set()
            await until(page, "asked.every((chat) => chat.state === 'ended')")
            upstream.may_end.clear()
            for index in range(first, first + CONNECTIONS):
                chat = await told(page, index)
                said = (
                    ("stopped", WORDS[: len(WORDS) // 2], STOPPED)
                    if index == stopped
                    else ("complete", WORDS, UNDISTURBED)
                )
                assert (chat["reason"], chat["text"], chat["states"]) == said
                assert (await server_state(client, aisse, chat["id"]))["reason"] == chat["reason"]
    took.sort()
    sys.stdout.write(f"stop among six, {rounds} times: {took[rounds // 2]:.0f} ms, longest {took[-1]:.0f} ms\n")


async def server_state(client: aiohttp.ClientSession, aisse: Command, stream: str) -> dict[str, Any]:
    async with client.get(f"{aisse.url}/api/chat/{stream}", headers={"Accept": "application/json"}) as response:
        state: dict[str, Any] = await response.json()
        return state


async def test_seventh_question_says_that_it_waits_and_is_answered_once_one_is_stopped(browser: Browser) -> None:
    """Whoever reads that it waits stops another: the stop is not behind it in the browser's queue."""
    upstream = Upstream()
    async with six_answers(browser, upstream) as (page, aisse), aiohttp.ClientSession() as client:
        await page.evaluate("ask()")
        await until(page, "asked[6].state === 'waiting'")
        await page.evaluate("ask()")
        await until(page, "asked[7].state === 'waiting'")
        await stop(page, 7)  # it may never have been sent
        assert (await told(page, 7))["states"] == ["connecting", "waiting", "detached"]
        await stop(page, 2)
        # The question had the connection before it could come back for its end.
        stopped = await told(page, 2)
        assert stopped["states"] == ["connecting", "streaming", "connecting", "detached"]
        assert (await server_state(client, aisse, stopped["id"]))["reason"] == "stopped"
        await until(page, "asked[6].state === 'streaming'")
        upstream.may_end.set()
        await until(page, "asked.filter((chat) => chat.state === 'ended').length === 6")
        for index in (0, 1, 3, 4, 5):
            assert (await told(page, index))["states"] == UNDISTURBED
        assert (await told(page, 6))["text"] == WORDS
        assert (await health(client, aisse))["activeStreams"] == 0
        assert upstream.asked == 7


async def test_page_with_seven_questions_says_what_the_seventh_waits_for(browser: Browser) -> None:
    """And so does a second reader. Stopping one of the six, in the history or on show, makes room."""
    upstream = Upstream()
    async with (
        raw_upstream(upstream.answer) as llm,
        served("--upstream", llm.url, "--heartbeat-s", "100", "--leave-s", "100") as aisse,
        opened(browser, aisse.url + "/") as page,
    ):
        for number in range(CONNECTIONS):
            await page.locator("#new").click()
            await ask(page, f"Question {number}")
            await begun(page)
        notice = page.locator("article.answer .notice")
        assert not await notice.is_visible()
        await page.locator("#drawer-toggle").click()
        await page.locator("#second").click()
        await page.locator(".second .verdict").get_by_text("no connection free").wait_for(timeout=WAIT_MS)
        await page.locator(".second .close").click()
        await page.locator("#drawer-close").click()

        await page.locator("#new").click()
        await ask(page, "The seventh")
        await state(page, "waiting")
        assert "no connection free" in (await notice.text_content() or "")
        assert not await notice.locator("button").is_visible()
        assert await page.locator("#state").text_content() == "No answer yet"
        await page.locator("#history li button").get_by_text("Question 2").click()
        await page.get_by_role("button", name="Stop").click()
        await page.locator("article.answer .outcome").get_by_text(re.compile("^Stopped$")).wait_for(timeout=WAIT_MS)
        assert not await page.locator("article.answer .problem").is_visible()
        await page.locator("#history li button").get_by_text("The seventh").click()
        await begun(page)
        await state(page, "streaming")
        assert not await notice.is_visible()
        await page.get_by_role("button", name="Stop").click()
        await settled(page)
        assert await page.locator("article.answer .outcome").text_content() == "Stopped"
        assert await page.locator("#state").text_content() == "Ended: stopped"
        assert await reconnects(page) == 0
        async with aiohttp.ClientSession() as client:
            assert (await health(client, aisse))["activeStreams"] == CONNECTIONS - 1


# --- hostile answers ------------------------------------------------------------------------------------------------

EVENTS_A_SECOND = 200
EVENTS = 3 * EVENTS_A_SECOND
FRAME_MS = 50
HOSTILE = f"""
<script>ran = 1</script><img src=x onerror="ran = 1"><svg onload="ran = 1">
<iframe srcdoc="<script>top.ran = 1</script>"></iframe><a href="javascript:ran = 1" autofocus onfocus="ran = 1">a</a>
<style>* {{ display: none }}</style><base href=http://evil.example>

[a](javascript:ran=1) [b](JaVaScRiPt:ran=1) [c](java&#x73;cript:ran=1) [d](data:text/html,<script>ran=1</script>)
<javascript:ran=1> [e](vbscript:ran) [f](//evil.example) [g](https://good.example "x\\" onclick=ran=1 y=\\"")
![h](https://evil.example/pixel.png) ![i](data:image/svg+xml,<svg/onload=ran=1>)

\u202etxt.exe \u2067 \u2066 unclosed, שלום and مرحبا

{"> " * 500}deep {"*" * 2000}a {"[" * 2000} {"`" * 999}

"""
CODE = "\n```js\n" + "const ran = 1;\n" * 20_000 + "```\n\n"
TABLE = "\n|a|b|\n|-|-|\n" + "|c|<b>d|\n" * 5_000
LINE = "word " * 160_000
UNBROKEN = "x" * 200_000 + "\n\n"
ANSWER = f"{HOSTILE}{LINE}end\n\n{HOSTILE}{CODE}{HOSTILE}{UNBROKEN}{TABLE}{HOSTILE}{LINE}End."

OBSERVE = """
window.frames = [];
window.longTasks = [];
new PerformanceObserver((list) => longTasks.push(...list.getEntries().map(({ duration }) => duration)))
  .observe({ type: "longtask" });
let before = 0;
requestAnimationFrame(function frame(now) {
  if (before) frames.push(now - before);
  before = now;
  requestAnimationFrame(frame);
});
"""

FOUND = """() => {
  const text = document.querySelector(".text");
  return {
    ran: window.ran,
    elements: [...text.querySelectorAll("script, img, svg, iframe, style, base, object, embed, form, input")].length,
    handlers: [...text.querySelectorAll("*")].flatMap((node) =>
      node.getAttributeNames().filter((name) => /^on|^style$|^src/.test(name))),
    links: [...new Set([...text.querySelectorAll("a")].map(({ href }) => href))].sort(),
    counts: ["word ", "const ran = 1;", "x".repeat(200000), "<script>ran = 1", "txt.exe", "<b>d"].map(
      (words) => text.textContent.split(words).length - 1),
    end: text.textContent.slice(-4),
    wide: document.documentElement.scrollWidth > innerWidth,
  };
}"""


async def test_hostile_answer_neither_runs_nor_freezes_the_page(browser: Browser) -> None:
    """Two megabytes at 200 events a second. The page's own work counts: what else the machine does is not its fault.

    A thread's time grows, too, where others share its core: what is too long has to be so three times.
    """
    begin = asyncio.Event()

    async def say(_: Request, connection: Connection) -> None:
        connection.send(head(), chunk(message_start()))
        await begin.wait()
        loop = asyncio.get_running_loop()
        start = loop.time()
        for number in range(EVENTS):
            await asyncio.sleep(start + number / EVENTS_A_SECOND - loop.time())
            connection.send(chunk(delta(ANSWER[len(ANSWER) * number // EVENTS : len(ANSWER) * (number + 1) // EVENTS])))
            await connection.drain()
        connection.send(chunk(message_delta() + MESSAGE_STOP), LAST_CHUNK)

    async def longest_task_ms() -> float:
        begin.clear()
        async with opened(browser, aisse.url + "/") as page:
            await ask(page, "Break it")
            await state(page, "streaming")
            await browser.start_tracing(page=page, categories=["toplevel", "__metadata"])
            await page.evaluate(OBSERVE)
            begin.set()
            await settled(page)
            frames, long_tasks = await page.evaluate("[frames, longTasks]")
            tasks = cpu_ms(await browser.stop_tracing())
            found = await page.evaluate(FOUND)
        assert found["ran"] is None
        assert (found["elements"], found["handlers"], found["wide"]) == (0, [], False)
        assert found["links"] == ["http://evil.example/", "https://evil.example/pixel.png", "https://good.example/"]
        assert found["counts"] == [320_000, 20_000, 1, 4, 4, 5_000]
        assert found["end"] == "End."
        figures = {"longest frame": max(frames), "long tasks": long_tasks, "tasks, longest CPU": tasks[-3:]}
        print(figures)  # noqa: T201 - the figures
        return tasks[-1]

    async with raw_upstream(say) as llm, served("--upstream", llm.url) as aisse:
        longest_ms = [await longest_task_ms()]
        while min(longest_ms) >= FRAME_MS and len(longest_ms) < 3:
            longest_ms.append(await longest_task_ms())
        assert min(longest_ms) < FRAME_MS, longest_ms


def cpu_ms(trace: bytes) -> list[float]:
    """What each task of the main threads took, in milliseconds of their own time, ascending."""
    events = json.loads(trace)["traceEvents"]
    mains = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    return sorted(
        event.get("tdur", 0) / 1000
        for event in events
        if event["name"] == "ThreadControllerImpl::RunTask" and (event["pid"], event["tid"]) in mains
    )


# --- people ---------------------------------------------------------------------------------------------------------

AXE = Path(__file__).parent / "axe"
MARKDOWN = (
    "# A\n\nb *c* `d` [e](https://f.example)\n\n```python\ng = 1\n```\n\n|h|i|\n|-|-|\n|j|k|\n\n> l\n\n1. m\n\n- n\n"
)
ENDED = f"[[thinking_tokens=5 pace=0 text='{MARKDOWN}']]"

# What a violation says: its rule, how bad it is, and where.
CHECK = """async () => {
  const { violations } = await axe.run(document, { resultTypes: ["violations"] });
  return violations.filter(({ impact }) => impact === "serious" || impact === "critical").map(
    ({ id, impact, nodes }) => `${impact}: ${id}: ${nodes.map(({ html }) => html).join(" ")}`);
}"""


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core."""
    try:
        node_with(AXE)
    except NodeMissingError as error:
        missing(str(error), "node")
    return (AXE / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark", "viewport": {"width": 360, "height": 640}}], ids=str)
async def test_page_has_no_serious_violation_of_accessibility(
    browser: Browser, simulated: Command, axe: str, options: dict[str, Any]
) -> None:
    """In each of its states: wide and light, narrow and dark."""
    async with opened(browser, simulated.url + "/", reduced_motion="reduce", **options) as page:
        await page.evaluate(axe)
        found: dict[str, list[str]] = {}

        async def check(what: str) -> None:
            found[what] = await page.evaluate(CHECK)

        await check("empty")
        await ask(page, "[[pace=0 thinking_tokens=3 fault=stall at=30]]")
        await begun(page, 1)
        await check("streaming")
        await page.locator("#send").click()
        await settled(page)
        await check("stopped")
        await ask(page, ENDED)
        await settled(page)
        await check("ended")
        await ask(page, "[[fault=error at=9]]")
        await settled(page)
        await check("error")
        await page.locator("#drawer-toggle").click()
        await check("drawer")
        await page.keyboard.press("Escape")
        # Where there is room the history is always there.
        if await page.locator("#history-toggle").is_visible():
            await page.locator("#history-toggle").click()
        await check("history")
    assert {what: violations for what, violations in found.items() if violations} == {}
    assert len(found) == 7


# What can be operated, and the looks of one of them: its own, and those of what is around it.
OPERABLE = """() => {
  const all = document.querySelectorAll("a[href], button, input, select, textarea, summary, [tabindex]");
  const seen = (node) => node.checkVisibility({ visibilityProperty: true });
  window.operable = [...all].filter((node) => node.tabIndex >= 0 && !node.disabled && seen(node));
  window.looks = (node) => node && [node, node.parentElement].map((one) => {
    const { outline, outlineStyle, boxShadow, borderColor, backgroundColor } = getComputedStyle(one);
    return [outlineStyle !== "none" && outline, boxShadow, borderColor, backgroundColor].join();
  }).join(" ");
  return operable.map((node) => node.outerHTML.slice(0, 60));
}"""
FOCUSED = """() => {
  const index = operable.indexOf(document.activeElement);
  return [index, looks(operable[index])];
}"""


@pytest.mark.parametrize("width", [1280, 360])
async def test_everything_is_reached_by_tab_in_order_and_shows_its_focus(
    browser: Browser, simulated: Command, width: int
) -> None:
    async with opened(browser, simulated.url + "/", viewport={"width": width, "height": 640}) as page:
        await ask(page, ENDED)
        await settled(page)
        await page.locator("#drawer-toggle").click()
        await page.locator("#prompt").fill("once more")
        await page.evaluate("() => document.activeElement.blur()")
        operable = await page.evaluate(OPERABLE)
        focused: dict[int, str] = {}
        for _ in range(2 * len(operable)):
            await page.keyboard.press("Tab")
            index, looks = await page.evaluate(FOCUSED)
            if index >= 0:  # else it has left the page
                focused.setdefault(index, looks)
        # It goes on from where the focus was.
        start = [*focused].index(0)
        assert [*focused][start:] + [*focused][:start] == list(range(len(operable))), operable
        await page.evaluate("() => document.activeElement.blur()")
        plain = await page.evaluate("operable.map(looks)")
        assert [operable[index] for index, looks in focused.items() if plain[index] == looks] == []
        assert len(operable) >= 15


async def test_page_is_used_by_keyboard_alone(browser: Browser, simulated: Command) -> None:
    async with opened(browser, simulated.url + "/", viewport={"width": 360, "height": 640}) as page:

        async def go_to(selector: str) -> None:
            for _ in range(40):
                if await page.evaluate("(to) => document.activeElement.matches(to)", selector):
                    return
                await page.keyboard.press("Tab")
            raise AssertionError(f"{selector} is not reached")

        async def focused() -> str:
            name: str = await page.evaluate("document.activeElement.id")
            return name

        # The focus is where one writes, from the beginning.
        await page.keyboard.type("[[tokens=40 pace=0 fault=stall at=30]]")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("one")
        await page.keyboard.press("Enter")
        await begun(page, 10)
        assert await page.locator(".question").text_content() == "[[tokens=40 pace=0 fault=stall at=30]]\none"
        await page.keyboard.press("Escape")
        await settled(page)
        kept = await shown(page)
        assert answer("").startswith(kept)
        assert kept != ""
        assert await focused() == "prompt"
        await go_to(".again")
        await page.keyboard.press("Enter")
        await begun(page, 10)
        await go_to("#send")
        assert await page.locator("#send").text_content() == "Stop"
        await page.keyboard.press("Enter")
        await settled(page)
        assert await focused() == "prompt"
        await go_to("#drawer-toggle")
        await page.keyboard.press("Enter")
        await go_to("#second")
        await page.keyboard.press("Enter")
        await page.locator(".second[data-same=true]").wait_for(timeout=WAIT_MS)
        await go_to("#drop")
        await page.keyboard.press("Escape")
        assert not await page.locator("#drawer").is_visible()
        assert await focused() == "drawer-toggle"
        await go_to("#new")
        await page.keyboard.press("Enter")
        assert await focused() == "prompt"
        assert await page.locator(".question").count() == 0
        await go_to("#history-toggle")
        await page.keyboard.press("Enter")
        await go_to("#history li button")
        await page.keyboard.press("Enter")
        assert await page.locator(".question").count() == 1
        assert await shown(page) == kept


# --- what the page offers -------------------------------------------------------------------------------------------


async def test_drawer_breaks_things_and_nothing_is_lost(browser: Browser, simulated: Command) -> None:
    question = "[[tokens=150 pace=50]]"
    async with opened(browser, simulated.url + "/") as page:
        await page.locator("#drawer-toggle").click()
        await ask(page, question)
        await begun(page, 10)
        await page.locator("#drop").click()
        await until(page, "document.querySelector('#reconnects').textContent === '1'")
        offline = page.locator("#offline")
        await offline.click()
        assert await offline.get_attribute("aria-pressed") == "true"
        await page.get_by_text(
            re.compile("^(Connection lost|Not connected), trying again .*You are offline")
        ).wait_for()
        before = await shown(page)
        assert before != answer(question)
        await offline.click()
        assert await offline.get_attribute("aria-pressed") == "false"
        await begun(page, len(before) + 1)
        await page.locator("#second").click()
        await page.locator("#silence").get_by_text(re.compile("^[0-9.]+ s ago$")).wait_for()
        await until(page, "+document.querySelector('#tokens-rate').textContent > 0")
        await settled(page)
        assert await shown(page) == answer(question)
        assert await reconnects(page) == 2
        assert re.fullmatch(r"[\w-]{22}\.[0-9]+", await page.locator("#last-id").get_attribute("title") or "")
        await page.locator(".second[data-same=true]").wait_for(timeout=WAIT_MS)
        assert await page.locator(".second .copied").text_content() == answer(question)

        await page.locator("#fault").select_option("error")
        await ask(page, "[[pace=0]]")
        await settled(page)
        kept = await shown(page)
        assert answer("").startswith(kept)
        assert "overloaded" in (await page.locator(".problem").last.text_content() or "")
        # It comes once.
        await page.get_by_role("button", name="Try again").click()
        await settled(page)
        assert await shown(page) == answer("")
        assert await page.locator(".question").count() == 2


async def test_conversations_and_a_stopped_answer_are_there_after_a_reload(
    browser: Browser, simulated: Command
) -> None:
    async with opened(browser, simulated.url + "/", permissions=["clipboard-read", "clipboard-write"]) as page:
        await ask(page, ENDED)
        await settled(page)
        await page.get_by_role("button", name="Copy", exact=True).click()
        assert await page.evaluate("navigator.clipboard.readText()") == answer(ENDED)
        whole = await shown(page)
        await page.locator("#new").click()
        await ask(page, "[[tokens=300 pace=30]] second")
        await begun(page, 20)
        await page.get_by_role("button", name="Stop").click()
        await settled(page)
        stopped = await shown(page)
        assert answer("[[tokens=300]]").startswith(stopped)
        assert 20 <= len(stopped) < len(answer("[[tokens=300]]"))
        assert not await page.locator(".problem").is_visible()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.reload()
        assert await shown(page) == stopped
        # The last one first.
        await page.locator("#history li button").nth(1).click()
        assert await page.locator(".question").text_content() == ENDED
        await until(page, f"document.querySelector('.text').textContent.length === {len(whole)}")
        assert await shown(page) == whole
        assert await page.locator(".thoughts").text_content() == Script.parse(ENDED, Script()).thinking()
        assert not [url for url in asked if "/api/" in url]


async def test_question_without_access_token_asks_for_it_and_is_not_lost(browser: Browser) -> None:
    token = "a-token-of-some-length"
    environ = {"AISSE_ACCESS_TOKENS": token}
    async with (
        served("--upstream", "simulator", environ=environ) as aisse,
        opened(browser, aisse.url + "/") as page,
    ):
        await ask(page, "[[tokens=5]]")
        await page.locator("#access").wait_for()
        assert await page.locator("#prompt").input_value() == "[[tokens=5]]"
        assert await page.evaluate("document.activeElement.id") == "token"
        assert await page.locator(".question").count() == 0
        await page.keyboard.type(token)
        await page.keyboard.press("Enter")
        await settled(page)
        assert await shown(page) == answer("[[tokens=5]]")
        assert await page.locator("#prompt").input_value() == ""
        assert not await page.locator("#access").is_visible()
        assert token not in await page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}])")


async def test_page_is_not_there_where_it_is_switched_off() -> None:
    async with served("--upstream", "simulator", "--no-page") as aisse, aiohttp.ClientSession() as client:
        statuses = {}
        for path in ("/", "/chat.js", "/aisse.js", "/health"):
            async with client.get(aisse.url + path) as response:
                statuses[path] = response.status
        assert statuses == {"/": 404, "/chat.js": 404, "/aisse.js": 200, "/health": 200}


async def test_screenshots_are_taken(browser: Browser, tmp_path: Path) -> None:
    expected = {"empty": (1200, 800), "narrow-history": (360, 740)}
    await take(browser, tmp_path, expected)
    assert {name: size(tmp_path / f"{name}.png") for name in expected} == expected


def size(png: Path) -> tuple[int, ...]:
    return struct.unpack(">II", png.read_bytes()[16:24])
