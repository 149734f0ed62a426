"""The page in Chromium, against processes that are killed, drained and cut off: what a person would see of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import aiohttp
import pytest
import pytest_asyncio
from breakable_proxy import BreakableProxy
from browser import CHROMIUM, launched, opened, watched
from command import health, refuses_connections, served
from conftest import eventually

from aisse.simulator import Script
from nginx import Nginx, found, nginx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from command import Command
    from playwright.async_api import Browser, Page

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")
WAIT_MS = 60_000  # ten times what anything takes; for a machine that has other things to do
OFFLINE_S = 2.0
RESET_EVERY_S = 0.5

# Plain words, so that the page shows them as they are; each place has its own.
WORDS = " ".join(f"{number} Wörter 漢字 слова 🙂" for number in range(60))
LONG = f"[[pace=40 text='{WORDS}']]"
"""Some six seconds of answer."""


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
    async with served("--upstream", "simulator", "--tokens", "20", "--heartbeat-s", "1") as running:
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


# --- the connection -------------------------------------------------------------------------------------------------


async def goes_offline(page: Page, proxy: BreakableProxy) -> None:
    """The network ends with a reset of all that used it."""
    await page.context.set_offline(offline=True)
    proxy.down()
    await state(page, "reconnecting")
    before = await shown(page)
    await asyncio.sleep(OFFLINE_S)
    assert await shown(page) == before
    proxy.up()
    await page.context.set_offline(offline=False)
    await settled(page)
    assert len(before) < len(WORDS)
    assert proxy.broken == 1


async def goes_offline_silently(page: Page, proxy: BreakableProxy) -> None:
    """Nobody says that the connection is gone; it stays open, and dead, when the network is back."""
    await page.context.set_offline(offline=True)
    proxy.down(silently=True)
    before = await shown(page)
    await asyncio.sleep(OFFLINE_S)
    assert await shown(page) == before
    await state(page, "streaming")
    proxy.up()
    await page.context.set_offline(offline=False)
    await settled(page)
    assert len(before) < len(WORDS)
    assert proxy.broken == 1


async def is_reset_again_and_again(page: Page, proxy: BreakableProxy) -> None:
    ended = asyncio.create_task(settled(page))
    while not ended.done():
        await asyncio.sleep(RESET_EVERY_S)
        proxy.reset()
    await ended
    # Between two there is a pause of two seconds at most.
    assert proxy.broken >= 2
    assert await reconnects(page) >= 2


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
    async with served("simulate") as llm, served("--upstream", llm.url, "--open") as aisse:

        async def broken(how: Callable[[Page, BreakableProxy], Awaitable[None]]) -> None:
            async with BreakableProxy(aisse.address) as proxy, opened(browser, proxy.url + "/") as page:
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
        await begun(page, 500)
        assert (proxy.streams, await reconnects(page)) == (1, 0)
        proxy.reset()
        await state(page, "reconnecting")
        await settled(page)
        assert await page.evaluate("document.visibilityState") == "hidden"
        assert await shown(page) == WORDS
        assert (proxy.broken, await reconnects(page)) == (1, 1)
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
