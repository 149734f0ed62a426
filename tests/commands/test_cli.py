"""The commands, as far as they go without a process of their own; tests/e2e has the rest."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import sys
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import structlog

import aisse
from aisse.commands import cli, serve, simulate
from aisse.commands.output import EX_CONFIG
from aisse.commands.sources import load
from aisse.settings import SECRETS, Settings
from aisse.simulator import Script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Run = Callable[..., "Outcome"]

SECRET = "canary-secret-0123456789"
KEYS = ("EZAI_API_KEY", "ANTHROPIC_API_KEY", "CREDENTIALS_DIRECTORY")


class Outcome:
    """What one command said and how it ended."""

    def __init__(self, code: str | int | None, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def refusal(self) -> str:
        """The one line of a refused start."""
        assert self.code == EX_CONFIG, (self.code, self.out, self.err)
        assert self.out == ""
        assert self.err.count("\n") == 1
        assert self.err.startswith("aisse: ")
        return self.err.removeprefix("aisse: ").rstrip("\n")


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """A command sets logging up for its process, which here is everybody's."""
    root, configured = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.configure(**configured)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def run(logging_restored: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command with no settings in its environment but those given."""
    for name in list(os.environ):
        if name.startswith("AISSE_") or name in KEYS:
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "1000")  # no line of help is broken

    def run(*arguments: str, **environ: str) -> Outcome:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        code: str | int | None = 0
        try:
            cli.main(arguments)
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert SECRET not in captured.out + captured.err
        return Outcome(code, captured.out, captured.err)

    return run


def table(text: str) -> dict[str, tuple[str, str]]:
    """The rows of `aisse config`: value and origin by name; what stands in comments is left out."""
    rows: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+) += (.*?) +# (.+)", line)
        if not line.startswith("#"):
            assert found is not None, line
            rows[found[1]] = found[2], found[3]
    return rows


# --- config ---------------------------------------------------------------------------------------------------


def test_config_shows_every_setting_with_its_value_and_origin(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "aisse.toml"
    file.write_text("stall_s = 12.5\nheartbeat_s = 1\nport = 1\n")
    outcome = run("config", "--config", str(file), "--port", "3", AISSE_PORT="2", AISSE_HEARTBEAT_S="2")
    assert outcome.code == 0
    assert outcome.err == ""
    rows = table(outcome.out)
    assert list(rows) == list(Settings.model_fields)
    assert rows["stall_s"] == ("12.5", f"{file}: stall_s")
    assert rows["heartbeat_s"] == ("2", "AISSE_HEARTBEAT_S")
    assert rows["port"] == ("3", "--port")
    assert rows["replay_bytes"] == ('"512MiB"', "default")
    assert all(value for value, _ in rows.values())


def test_config_kept_as_a_file_gives_the_same_settings(run: Run, tmp_path: Path) -> None:
    given = {
        "AISSE_MODELS": "claude-sonnet-4-20250514,other",
        "AISSE_CORS_ORIGINS": "https://a,https://b",
        "AISSE_HEARTBEAT_S": "0.123456789",
        "AISSE_STREAM_BYTES": "1.5MiB",
        "AISSE_UPSTREAM": 'http://a/"b"',
        "AISSE_OPEN": "true",
        "EZAI_API_KEY": SECRET,
    }
    outcome = run("config", **given)
    tomllib.loads(outcome.out)
    file = tmp_path / "aisse.toml"
    file.write_text(outcome.out)
    assert load({}, {}, file).settings == load({}, given | {"EZAI_API_KEY": ""}).settings


@pytest.mark.parametrize("variable", sorted(f"AISSE_{name.upper()}" for name in SECRETS))
def test_config_masks_secrets_and_makes_no_value_of_the_mask(run: Run, variable: str) -> None:
    outcome = run("config", **{variable: SECRET})
    name = variable.removeprefix("AISSE_").lower()
    assert re.search(rf"^# {name} += \*{{8}} +# {variable}$", outcome.out, re.MULTILINE)
    assert name not in tomllib.loads(outcome.out)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "none"),
        ({"EZAI_API_KEY": SECRET}, "EZAI_API_KEY"),
        ({"ANTHROPIC_API_KEY": SECRET}, "none"),
        ({"AISSE_UPSTREAM_KEY": SECRET, "EZAI_API_KEY": SECRET}, "AISSE_UPSTREAM_KEY"),
        ({"AISSE_UPSTREAM": "https://api.anthropic.com", "ANTHROPIC_API_KEY": SECRET}, "ANTHROPIC_API_KEY"),
        ({"AISSE_UPSTREAM": "https://example.org", "ANTHROPIC_API_KEY": SECRET, "EZAI_API_KEY": SECRET}, "none"),
    ],
)
def test_config_says_which_key_the_upstream_gets(run: Run, environ: dict[str, str], said: str) -> None:
    outcome = run("config", **environ)
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("# key for upstream")]
    assert line.rpartition(" ")[2] == said
    assert ("********" in line) == (said != "none")


@pytest.mark.parametrize("upstream", ["simulator", "local"])
def test_config_names_no_key_for_a_built_in_upstream(run: Run, upstream: str) -> None:
    outcome = run("config", "--upstream", upstream, EZAI_API_KEY=SECRET)
    assert "key for upstream" not in outcome.out


def test_config_names_the_credential_of_systemd(run: Run, tmp_path: Path) -> None:
    (tmp_path / "upstream_key").write_text(SECRET + "\n")
    outcome = run("config", CREDENTIALS_DIRECTORY=str(tmp_path))
    assert re.search(r"^# key for upstream += \*{8} +# credential upstream_key$", outcome.out, re.MULTILINE)


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


@pytest.mark.parametrize("key", [f"{SECRET} {SECRET}", f"{SECRET}\u00e9", f"{SECRET}\r\nX: y"])
def test_key_that_cannot_be_a_header_is_refused_and_not_repeated(run: Run, key: str) -> None:
    assert run("serve", "--port", "0", EZAI_API_KEY=key).refusal.startswith("EZAI_API_KEY: ")


@pytest.mark.parametrize("upstream", ["https://api.ezaiapi.com", "https://eu.ezaiapi.com/v2"])
def test_serve_without_the_key_of_its_upstream_is_refused(run: Run, upstream: str) -> None:
    refusal = run("serve", "--port", "0", "--upstream", upstream, ANTHROPIC_API_KEY=SECRET).refusal
    assert "EZAI_API_KEY" in refusal
    assert "simulator" in refusal


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


def test_help_of_simulate_shows_every_field_of_a_script(run: Run) -> None:
    text = run("simulate", "--help").out
    for name, field in Script.model_fields.items():
        assert re.search(rf"^  --{name.replace('_', '-')}[ ,]", text, re.MULTILINE), name
        assert str(field.description) in " ".join(text.split()), name
    assert "(default: 45)" in text
    assert "None" not in text
    assert "`" + "stats" not in text  # the text of a class is not for its users


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_lists_the_commands(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 0
    for command in ("serve", "config", "simulate"):
        assert re.search(rf"^ +{command} ", outcome.out, re.MULTILINE)


def test_version_is_shown(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"aisse {aisse.__version__}\n")


# --- simulate -------------------------------------------------------------------------------------------------


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


# --- the process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "raised_to", "warned"),
    [
        ((256, 100_000), (100_000, 100_000), False),
        ((100_000, 100_000), None, False),
        ((256, 10_063), (10_063, 10_063), True),
        ((256, 10_064), (10_064, 10_064), False),
        ((1024, 1024), None, True),
        ((256, resource.RLIM_INFINITY), (resource.RLIM_INFINITY, resource.RLIM_INFINITY), False),
    ],
)
def test_descriptor_limit_is_raised_and_a_low_one_is_said(
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[int, int],
    raised_to: tuple[int, int] | None,
    warned: bool,
) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _which, given: set_to.append(given))
    with structlog.testing.capture_logs() as lines:
        serve.raise_descriptor_limit(5000)
    assert set_to == ([raised_to] if raised_to else [])
    assert [(line["log_level"], line["open_files"], line["needed"]) for line in lines] == (
        [("warning", limits[1], 10_064)] if warned else []
    )
    assert all("max_streams" in line["event"] for line in lines)


def test_main_takes_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["aisse", "--version"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out.startswith("aisse ")
