"""Every command and every snippet in every README is run, as far as a test may."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from markdown_pages import BLOCKS, ROOT, Block, recipes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Longer than anything here takes on any machine.
PATIENCE_S = 100
REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")

QUESTION = b'{"messages": [{"role": "user", "content": "Why?"}]}'


@dataclass(frozen=True)
class Bench:
    """An aisse that runs, in front of a simulator that answers as fast as it is read."""

    url: str
    simulator: str

    def here(self, command: str) -> str:
        """The command with our interpreter, and with these servers in place of those on the ports that READMEs name."""
        command = command.replace("http://127.0.0.1:3000", self.url).replace("http://127.0.0.1:9000", self.simulator)
        command = command.replace("--port 9000", "--port 0")
        return re.sub(r"(/opt/aisse|\.venv)/bin/", f"{Path(sys.executable).parent}/", command)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    # Below a path, of which one page tells. What is asked without it is understood, too.
    with (
        serving("python -m aisse simulate --pace 0") as simulator,
        serving(f"python -m aisse serve --upstream {simulator} --base-path /llm") as url,
    ):
        yield Bench(url, simulator)


@contextlib.contextmanager
def serving(command: str) -> Iterator[str]:
    """The URL of a server that a command starts. At the end it is told to stop, and has to exit with 0."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            cwd=ROOT,
            env=environ() | {"AISSE_PORT": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            found = re.fullmatch(r"aisse \S+ (?:simulator )?on (http://\S+:\d+)\n", first)
            errors.seek(0)
            assert found is not None, first + errors.read().decode()
            yield found[1]
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.communicate()


def said(command: str) -> str:
    """What a command prints. It has to end well."""
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=ROOT,
        env=environ(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environ() -> dict[str, str]:
    """No settings and no keys. `python` is this one, and imports this tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AISSE_", "EZAI_", "ANTHROPIC_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT)}


def fetched(url: str, question: bytes | None = None) -> str:
    request = urllib.request.Request(url, question, {"Content-Type": "application/json"} if question else {})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        text: str = response.read().decode()
    return text


def reason(answer: str) -> str:
    """How an answer ended, as its last event says."""
    kind, data = re.findall(r"^event: (.*)\ndata: (.*)$", answer, re.MULTILINE)[-1]
    assert kind == "end"
    found: str = json.loads(data)["reason"]
    return found


# --- commands -------------------------------------------------------------------------------------------------------


def commands(block: Block) -> list[str]:
    """One a line, without comments. A line that ends in a backslash goes on in the next one."""
    lines = (re.sub(r"(^|\s+)#.*", "", line) for line in re.sub(r"\\\n\s*", "", block.text).splitlines())
    return [line for line in lines if line]


SHELL = list(dict.fromkeys(command for block in BLOCKS if block.language == "sh" for command in commands(block)))


def asks(bench: Bench, command: str) -> None:
    """Gets a whole answer, or the URL of one."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    out = said(bench.here(command).replace("curl ", "curl --silent --show-error ", 1))
    if "respond-async" in command:
        assert out.startswith("HTTP/1.1 202 ")
        location = re.search(r"^Location: (/llm/api/chat/\S+)\r?$", out, re.MULTILINE)
        assert location is not None
        out = fetched(bench.url + location[1])
    # The simulator breaks off where it is told to.
    assert reason(out) == ("truncated" if "fault=cut" in command else "complete")


def serves(bench: Bench, command: str) -> None:
    """It starts, answers, and ends when it is told to."""
    with serving(bench.here(command)) as url:
        if " serve" in command:
            assert reason(fetched(f"{url}/api/chat", QUESTION)) == "complete"
        else:
            assert json.loads(fetched(f"{url}/stats"))["requests"] == 0


def prints(bench: Bench, command: str) -> None:
    assert said(bench.here(command))


def is_configured(_bench: Bench, command: str) -> None:
    """It names other machines, and is not started. Its settings are taken."""
    printed = said(command.replace(" serve", " config"))
    for name, value in re.findall(r"AISSE_(\w+)=(\S+)", command):
        shown = re.sub(r":[^:@/]+@", ":********@", value)
        assert re.search(rf'{name.lower()}\s+= "{re.escape(shown)}"', printed), printed


def has_its_target(_bench: Bench, command: str) -> None:
    """Not run, since make may be what runs this. Its targets exist, and what they run knows the flags in ARGS."""
    line = re.fullmatch(r'(?:[A-Z_]+=\S+ )*make ((?:[a-z-]+ ?)+)(?:ARGS="(.*)")?', command)
    assert line is not None
    for target in line[1].split():
        recipe = recipes()[target]
        for flag in re.findall(r"--[a-z-]+", line[2] or ""):
            assert flag in help_of(recipe), f"{flag} of {target}"
    for path in re.findall(r"tests/\S+", line[2] or ""):
        assert (ROOT / path).exists()


@cache
def help_of(recipe: str) -> str:
    """What the program in a recipe says to --help."""
    program = re.search(r"\$\(BIN\)/python (-m aisse serve|-m pytest|tests/\S+\.py)", recipe)
    assert program is not None, recipe
    return said(f"python {program[1]} --help")


def names(*paths: str) -> Callable[[Bench, str], None]:
    """It is not run. What it names exists."""

    def check(_bench: Bench, command: str) -> None:
        for path in paths:
            assert path in command
            assert (ROOT / path).exists()

    return check


def names_its_extra(_bench: Bench, command: str) -> None:
    """It would fetch packages, and is not run. The extra that it names is declared."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"aisse\[(\w+)\]", command):
        assert name in extras


def names_units(_bench: Bench, command: str) -> None:
    """The host's systemd is not ours to change; tests/e2e/test_service.py runs one of its own. The units exist."""
    units = re.findall(r"aisse(?:@\$port|\.service|\.socket)", command)
    assert units
    for unit in units:
        assert (ROOT / "aisse" / "deploy" / unit.replace("@$port", "@.service")).exists()


# How a command is run: by the first pattern that it matches. What is not run for real says why.
RUN: list[tuple[str, Callable[[Bench, str], None]]] = [
    (r"curl .*", asks),
    (r"(python|/opt/aisse/bin/python) -m aisse (config|unit|.*--help)", prints),
    (r"AISSE_LOG=rediss?://\S*@10\.\S+ python -m aisse serve", is_configured),
    (r"python -m aisse (serve|simulate)( .*)?", serves),
    (r"([A-Z_]+=\S+ )*make .*", has_its_target),
    (r"pip install .*", names_its_extra),
    # It needs root and packages. tests/dist installs into an environment, and runs what is there.
    (r"python3 -m venv /opt/aisse && /opt/aisse/bin/pip install \.", names()),
    # The host's nginx is not ours to change. tests/e2e/test_nginx.py runs these files in one of its own.
    (r"cp nginx/aisse.conf /etc/nginx/conf.d/", names("nginx/aisse.conf")),
    (r"mkdir -p /etc/nginx/aisse.d && cp nginx/tls.conf /etc/nginx/aisse.d/", names("nginx/tls.conf")),
    (r"nginx -t && systemctl reload nginx", names()),
    (r".*systemctl (restart|start|reset-failed) aisse.*", names_units),
    # They publish, or fetch what they need.
    (r"git tag .*", names()),
    (r"npm publish aisse/web", names("aisse/web")),
    (r"pipx run twine upload dist/\*", names()),
    (r"pipx run pre-commit install", names()),
]


@pytest.mark.parametrize("command", SHELL, ids=[command[:80] for command in SHELL])
def test_command_does_what_it_is_shown_for(bench: Bench, command: str) -> None:
    ways = [way for pattern, way in RUN if re.fullmatch(pattern, command)]
    assert ways, "say in RUN how this is run"
    ways[0](bench, command)


def test_every_way_to_run_a_command_is_used() -> None:
    assert [pattern for pattern, _ in RUN if not any(re.fullmatch(pattern, command) for command in SHELL)] == []


# --- snippets -------------------------------------------------------------------------------------------------------

# What a page would have, and addresses that count from it.
PRELUDE = """
const BASE = "%s", real = globalThis.fetch, kept = new Map();
globalThis.location = new URL("/page", BASE);
globalThis.fetch = (url, options) => real(new URL(url, BASE), options);
globalThis.sessionStorage = {
  getItem: (name) => kept.get(name) ?? null,
  setItem: (name, value) => kept.set(name, value),
  removeItem: (name) => kept.delete(name),
};
const element = () => ({ textContent: "", append(text) { this.textContent += text; } });
const answer = element(), thoughts = element(), status = element(), stopButton = element();
const question = { messages: [{ role: "user", content: "Why?" }] };
const run = async () => {};
"""
AFTERWARDS = """
await chat.finished;
const seen = { text: chat.text, shown: answer.textContent, reason: chat.reason, kept: kept.size };
console.log(`\\n${JSON.stringify(seen)}`);
"""

JAVASCRIPT = [block for block in BLOCKS if block.language == "js"]
IN_CHROMIUM = [block for block in JAVASCRIPT if "EventSource" in block.text]
IN_NODE = [block for block in JAVASCRIPT if block not in IN_CHROMIUM]


@pytest.mark.parametrize("block", IN_NODE, ids=[block.page for block in IN_NODE])
def test_snippet_reads_a_whole_answer(bench: Bench, tmp_path: Path, block: Block) -> None:
    node = shutil.which("node")
    if node is None:
        if "node" in REQUIRED:
            pytest.fail("node is not installed")
        pytest.skip("node is not installed")
    client = (ROOT / "aisse" / "web" / "aisse.js").as_uri()
    line = re.search(r'^import (\{.*\}) from "[a-z/]*/aisse\.js";.*\n', block.text)
    imported = line[1] if line else "{ resumeChat, savedChat, streamChat }"
    code = block.text[line.end() if line else 0 :]
    script = tmp_path / "snippet.mjs"
    script.write_text(f'import {imported} from "{client}";\n{PRELUDE % bench.url}{code}{AFTERWARDS}')
    done = subprocess.run([node, str(script)], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["reason"] == "complete"
    assert len(seen["text"]) > 50
    assert seen["shown"] == (seen["text"] if "answer.append" in code else "")
    assert seen["kept"] == 0  # what has ended needs no reload


def test_snippet_for_the_platforms_own_client_is_the_one_that_chromium_runs() -> None:
    """By tests/e2e/test_page.py: Node has no EventSource."""
    assert [block.page for block in IN_CHROMIUM] == ["aisse/web/README.md"]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} == {"sh", "js", ""}
