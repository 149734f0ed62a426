"""Chromium as it is installed: a process of its own, driven by Playwright."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.async_api import async_playwright

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page

CHROMIUM = shutil.which("chromium")
START_S = 60.0

# As root it needs --no-sandbox; the others keep it from calling home.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

_WATCH_POLICY = """
addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI, sample }) =>
  console.error("policy violated:", violatedDirective, blockedURI, sample));
"""


@contextlib.asynccontextmanager
async def process(folder: Path, *arguments: str) -> AsyncIterator[None]:
    """Chromium with a new profile in `folder`; it and the processes that it started end with this."""
    assert CHROMIUM is not None
    running = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={folder}",
        *arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        await running.wait()


@contextlib.asynccontextmanager
async def launched() -> AsyncIterator[Browser]:
    """A browser. In its first context, `contexts[0]`, tabs that are not in front are hidden, as they are for people.

    In every other context Playwright makes each page believe that it is in front.
    """
    with tempfile.TemporaryDirectory(prefix="aisse-chromium-", ignore_cleanup_errors=True) as name:
        port_file = Path(name) / "DevToolsActivePort"
        async with process(Path(name), "--remote-debugging-port=0"), async_playwright() as playwright:
            async with asyncio.timeout(START_S):
                while not (port_file.exists() and (said := port_file.read_text()).count("\n") == 1):
                    await asyncio.sleep(0.01)
            # Its defaults would show hidden tabs.
            url = f"http://127.0.0.1:{said.splitlines()[0]}"
            browser = await playwright.chromium.connect_over_cdp(url, no_defaults=True)
            try:
                yield browser
            finally:
                await browser.close()


@contextlib.asynccontextmanager
async def opened(browser: Browser, url: str, *, init: str = "", **options: Any) -> AsyncIterator[Page]:
    """A page of a context of its own, with those `options`, where `init` runs before any script; else as `watched`."""
    context = await browser.new_context(**options)
    try:
        if init:
            await context.add_init_script(init)
        async with watched(context, url) as page:
            yield page
    finally:
        await context.close()


@contextlib.asynccontextmanager
async def watched(context: BrowserContext, url: str) -> AsyncIterator[Page]:
    """A new page that shows `url`. It must not throw, open a dialog, ask another origin, or break its policy."""
    page = await context.new_page()
    trouble: list[str] = []

    async def dialog(shown: Dialog) -> None:
        trouble.append(f"dialog: {shown.message}")
        await shown.dismiss()

    def said(message: ConsoleMessage) -> None:
        # That a request failed is the browser's to say, and often what a test is about.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            trouble.append(message.text)

    origin = re.sub(r"(?<=\w)/.*", "/", url)
    page.on("dialog", dialog)
    page.on("console", said)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url))
    await page.add_init_script(_WATCH_POLICY)
    await page.goto(url)
    try:
        yield page
    finally:
        await page.close()
    trouble = [what for what in trouble if not what.startswith((origin, "data:", "blob:"))]
    assert not trouble, trouble
