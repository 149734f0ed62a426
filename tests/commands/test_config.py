"""`aisse config`: every setting, its value and its origin; and no secret."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

import pytest
from here import SECRET, running_here

from aisse.commands.sources import load
from aisse.settings import SECRETS, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from here import Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with running_here(monkeypatch, capsys) as run:
        yield run


def table(text: str) -> dict[str, tuple[str, str]]:
    """The rows of `aisse config`: value and origin by name; what stands in comments is left out."""
    rows: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+) += (.*?) +# (.+)", line)
        if not line.startswith("#"):
            assert found is not None, line
            rows[found[1]] = found[2], found[3]
    return rows


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
