"""The command line: what is wrong on it is one line, and its help shows everything."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest
from here import KEYS, SECRET, running_here

import aisse
from aisse.commands import cli
from aisse.settings import SECRETS, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from here import Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with running_here(monkeypatch, capsys) as run:
        yield run


def test_main_takes_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["aisse", "--version"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out.startswith("aisse ")


# --- what is wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "config"])
@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["--port", "x"], {}, "--port: "),
        (["--heartbeat-s=0"], {}, "--heartbeat-s: "),
        ([], {"AISSE_PORT": "x"}, "AISSE_PORT: "),
        ([], {"AISSE_PROT": "1"}, "AISSE_PROT: there is no such setting"),
        (["--prot", "1"], {}, "--prot: there is no such flag"),
        (["--prot=1"], {}, "--prot: there is no such flag"),
        (["--heartbeat_s", "1"], {}, "--heartbeat_s: there is no such flag"),
        (["--heart", "1"], {}, "--heart: there is no such flag"),
        (["--port"], {}, "--port: expected one argument"),
        (["--config"], {}, "--config: expected one argument"),
        (["--config", "/nowhere.toml"], {}, "/nowhere.toml: cannot be read"),
        (["--host", "0.0.0.0"], {}, "--host: "),
        ([], {"AISSE_HOST": "0.0.0.0"}, "AISSE_HOST: "),
        (["more"], {}, "there is an argument too many"),
    ],
)
def test_wrong_name_or_value_is_refused_in_one_line(
    run: Run, command: str, arguments: list[str], environ: dict[str, str], named: str
) -> None:
    assert run(command, *arguments, **environ).refusal.startswith(named)


@pytest.mark.parametrize("name", sorted(SECRETS))
@pytest.mark.parametrize("separator", [" ", "="])
def test_secret_as_a_flag_is_refused_with_its_variable_and_not_repeated(run: Run, name: str, separator: str) -> None:
    """What is refused stands in the service's log."""
    flag = "--" + name.replace("_", "-")
    refusal = run("serve", *f"{flag}{separator}{SECRET}".split(" ")).refusal
    assert refusal.startswith(f"{flag}: ")
    assert f"AISSE_{name.upper()}" in refusal


@pytest.mark.parametrize("arguments", [[], ["sever"], ["--port", "1"]])
def test_no_or_unknown_command_is_refused_in_one_line(run: Run, arguments: list[str]) -> None:
    assert "--help" in run(*arguments).refusal


# --- help -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "config"])
def test_help_shows_every_setting_with_its_value_and_origin(run: Run, tmp_path: Path, command: str) -> None:
    file = tmp_path / "aisse.toml"
    file.write_text("stall_s = 12.5\n")
    environ = {"AISSE_HEARTBEAT_S": "7", "AISSE_ACCESS_TOKENS": SECRET, "AISSE_UPSTREAM_KEY": SECRET}
    text = run(command, "--config", str(file), "--help", **environ).out
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        assert (re.search(rf"^  {flag}[ ,]", text, re.MULTILINE) is None) == (name in SECRETS), name
        if name not in SECRETS:
            assert str(field.description) in " ".join(text.split()), name
    assert f"(12.5, {file}: stall_s)" in text
    assert "(7, AISSE_HEARTBEAT_S)" in text
    assert '("512MiB", default)' in text
    assert "(false, default)" in text
    for variable in ("AISSE_ACCESS_TOKENS", "AISSE_UPSTREAM_KEY", *KEYS[:2]):
        assert variable in text


def test_help_is_shown_even_where_settings_are_wrong(run: Run) -> None:
    outcome = run("serve", "--help", AISSE_PORT="x")
    assert outcome.code == 0
    assert "--port PORT" in outcome.out


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_lists_the_commands(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 0
    for command in ("serve", "config", "simulate"):
        assert re.search(rf"^ +{command} ", outcome.out, re.MULTILINE)


def test_version_is_shown(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"aisse {aisse.__version__}\n")
