"""`aisse simulate`: its flags are what a script has."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest
from here import running_here

import aisse
from aisse.commands import simulate
from aisse.simulator import Script

if TYPE_CHECKING:
    from collections.abc import Iterator

    from here import Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with running_here(monkeypatch, capsys) as run:
        yield run


def test_help_of_simulate_shows_every_field_of_a_script(run: Run) -> None:
    text = run("simulate", "--help").out
    for name, field in Script.model_fields.items():
        assert re.search(rf"^  --{name.replace('_', '-')}[ ,]", text, re.MULTILINE), name
        assert str(field.description) in " ".join(text.split()), name
    assert "(default: 45)" in text
    assert "None" not in text
    assert "`" + "stats" not in text  # the text of a class is not for its users


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "x"], "--tokens: "),
        (["--tokens", "-1"], "--tokens: "),
        (["--status", "200"], "--status: should be"),
        (["--fault", "none-such"], "--fault: "),
        (["--token-bytes=2000000"], "--token-bytes: "),
        (["--port", "x"], "--port: "),
        (["--port", "70000"], "--port"),
        (["--host", "192.0.2.1"], "--host"),
        (["--tokenz", "1"], "--tokenz: there is no such flag"),
        (["--upstream", "x"], "--upstream: there is no such flag"),
    ],
)
def test_simulate_refuses_what_is_wrong_in_one_line(run: Run, arguments: list[str], named: str) -> None:
    assert run("simulate", *arguments).refusal.startswith(named)


def test_simulate_passes_every_flag_to_the_script(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class NoSimulator:
        def __init__(self, script: Script, *, host: str, port: int) -> None:
            started.append((script, host, port))

        async def start(self) -> str:
            os.kill(os.getpid(), signal.SIGTERM)
            return "http://127.0.0.1:1"

        async def close(self) -> None:
            started.append("closed")

    monkeypatch.setattr(simulate, "Simulator", NoSimulator)
    outcome = run(
        *(
            "simulate",
            "--host",
            "127.0.0.2",
            "--port",
            "5",
            "--tokens",
            "7",
            "--pace=0.5",
            "--rst",
            "--no-close-delimited",
        ),
        *("--text", "two words", "--seed", "0", "--fault", "cut", "--at", "9", "--line-end", "crlf", "--first-s", "2"),
    )
    assert outcome.code == 0
    assert outcome.out == f"aisse {aisse.__version__} simulator on http://127.0.0.1:1\n"
    expected = Script(
        tokens=7, pace=0.5, rst=True, text="two words", seed=0, fault="cut", at=9, line_end="crlf", first_s=2
    )
    assert started == [(expected, "127.0.0.2", 5), "closed"]
