"""Pictures of the page in its states, in Chromium, with the built-in simulator: `make screenshots`."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from breakable_proxy import BreakableProxy
from browser import CHROMIUM, launched, opened
from command import served

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from playwright.async_api import Browser, Page

WAIT_MS = 60_000
WIDE: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}}
NARROW: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
DARK: dict[str, Any] = {"color_scheme": "dark"}
README = "drawer"
"""The picture that the README shows."""


async def _empty(page: Page, _: BreakableProxy) -> None:
    await page.locator("#examples button").first.wait_for()


async def _streaming(page: Page, _: BreakableProxy) -> None:
    await _ask(page, "sky")
    await page.locator(".text table").wait_for(timeout=WAIT_MS)
    await page.locator(".text ol").wait_for(timeout=WAIT_MS)


async def _reconnecting(page: Page, proxy: BreakableProxy) -> None:
    await _ask(page, "sky")
    await page.locator(".text table").wait_for(timeout=WAIT_MS)
    proxy.down()
    await page.locator(".notice").wait_for(timeout=WAIT_MS)


async def _error(page: Page, _: BreakableProxy) -> None:
    await page.locator("#drawer-toggle").click()
    await page.locator("#fault").select_option("error")
    await page.locator("#drawer-close").click()
    await _ask(page, "sky")
    await page.locator(".problem").wait_for(timeout=WAIT_MS)


async def _drawer(page: Page, _: BreakableProxy) -> None:
    await page.locator("#drawer-toggle").click()
    await _ask(page, "sky")
    await page.locator(".text p").first.wait_for(timeout=WAIT_MS)
    # For the plot to show what an outage looks like.
    await page.locator("#offline").click()
    await page.locator(".notice").wait_for(timeout=WAIT_MS)
    await asyncio.sleep(1)
    await page.locator("#offline").click()
    await page.locator(".text ol").wait_for(timeout=WAIT_MS)


async def _second(page: Page, _: BreakableProxy) -> None:
    await page.locator("#drawer-toggle").click()
    await _ask(page, "sky")
    await page.locator(".text p").first.wait_for(timeout=WAIT_MS)
    await page.locator("#second").click()
    await page.locator(".second .copied table").wait_for(timeout=WAIT_MS)


async def _code(page: Page, _: BreakableProxy) -> None:
    await _ask(page, "Merge")
    await page.locator(".outcome").get_by_text("Complete").wait_for(timeout=WAIT_MS)


async def _history(page: Page, _: BreakableProxy) -> None:
    await _ask(page, "Merge")
    await page.locator("#new").click()
    await _ask(page, "sky")
    await page.locator("#history-toggle").click()
    await page.locator("#history li").nth(1).wait_for()


PICTURES: Mapping[str, tuple[dict[str, Any], Callable[[Page, BreakableProxy], Awaitable[None]]]] = {
    "empty": (WIDE, _empty),
    "streaming": (WIDE, _streaming),
    "reconnecting": (WIDE, _reconnecting),
    "error": (WIDE, _error),
    "drawer": (WIDE, _drawer),
    "second": (WIDE, _second),
    "dark": (WIDE | DARK, _code),
    "dark-drawer": (WIDE | DARK, _drawer),
    "narrow": (NARROW, _streaming),
    "narrow-dark": (NARROW | DARK, _code),
    "narrow-empty": (NARROW, _empty),
    "narrow-drawer": (NARROW, _drawer),
    "narrow-history": (NARROW | DARK, _history),
}
"""The context, and how the page gets there."""


async def take(browser: Browser, folder: Path, names: Iterable[str] = PICTURES) -> None:
    """Writes `name.png` into `folder` for each of those pictures."""
    async with served("--upstream", "simulator") as aisse:
        for name in names:
            options, prepare = PICTURES[name]
            async with (
                BreakableProxy(aisse.address) as proxy,
                opened(browser, proxy.url + "/", **options) as page,
            ):
                await prepare(page, proxy)
                # The caret would blink.
                await page.screenshot(path=folder / f"{name}.png", caret="hide")


async def _ask(page: Page, example: str) -> None:
    await page.locator("#examples button").get_by_text(example).click()


async def _take(folder: Path, names: Iterable[str]) -> None:
    async with launched() as browser:
        await take(browser, folder, names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("screenshots"), help="where they go: screenshots")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=PICTURES, default=[*PICTURES])
    parser.add_argument("--readme", metavar="PATH", type=Path, help=f"copies {README}.png there")
    arguments = parser.parse_args()
    if CHROMIUM is None:
        sys.stderr.write("chromium is not installed\n")
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(_take(arguments.folder, {*arguments.only} | ({README} if arguments.readme else set())))
    if arguments.readme:
        shutil.copyfile(arguments.folder / f"{README}.png", arguments.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
