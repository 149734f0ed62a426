"""The units as they are shipped and printed, and what systemd-analyze says about them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aisse.commands import cli
from aisse.commands.serve import SPARE_DESCRIPTORS
from aisse.deploy import units
from aisse.errors import ConfigError
from aisse.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]

SERVICES = ("aisse.service", "aisse@.service")
PYTHON = Path("/opt/aisse/bin/python")
WORST_EXPOSURE = 15  # tenths, as --threshold takes them

REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None and "systemd" not in REQUIRED,
    reason="systemd-analyze is not installed (Debian's package is systemd)",
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`aisse unit ...` with no settings in its environment but those given: exit code, output, errors."""
    for name in list(os.environ):
        if name.startswith("AISSE_"):
            monkeypatch.delenv(name)

    def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        code = 0
        try:
            cli.main(["unit", *arguments])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were an installation where services can read."""
    monkeypatch.setattr(sys, "executable", str(PYTHON))
    monkeypatch.setattr(sys, "prefix", "/opt/aisse")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr("aisse.__file__", "/opt/aisse/lib/python3.11/site-packages/aisse/__init__.py")


def shipped(name: str) -> str:
    return (resources.files("aisse.deploy") / name).read_text()


def value(text: str, name: str) -> str:
    """What a unit says once."""
    (found,) = re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)
    assert isinstance(found, str)
    return found


# --- the text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", units.UNITS)
def test_shipped_unit_is_the_one_of_default_settings(name: str) -> None:
    """Its timeout and limit are derived from settings: a default that changes has to change them."""
    assert units.unit(name, Settings(), PYTHON, None) == shipped(name)


def test_services_differ_in_what_they_are_for_alone() -> None:
    one, many = (shipped(name).partition("[Service]")[2].splitlines() for name in SERVICES)
    assert [pair for pair in zip(one, many, strict=True) if pair[0] != pair[1]] == [
        ("ExecStart=/opt/aisse/bin/python -m aisse serve", "ExecStart=/opt/aisse/bin/python -m aisse serve --port %i")
    ]


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize(
    ("settings", "timeout_s"),
    [({}, 35), ({"drain_s": 600}, 610), ({"drain_s": 0.5, "unready_s": 0.25}, 11), ({"unready_s": 10}, 45)],
)
def test_stop_timeout_is_the_drain_and_a_margin(name: str, settings: dict[str, float], timeout_s: int) -> None:
    text = units.unit(name, Settings.model_validate(settings), PYTHON, None)
    assert value(text, "TimeoutStopSec") == str(timeout_s)


@pytest.mark.parametrize("name", SERVICES)
def test_limit_of_open_files_is_enough_for_every_stream(name: str) -> None:
    text = units.unit(name, Settings(max_streams=300), PYTHON, None)
    limit = int(value(text, "LimitNOFILE"))
    assert 2 * 300 + SPARE_DESCRIPTORS <= limit == 1264


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({"port": 8080}, "127.0.0.1:8080"),
        ({"host": "localhost"}, "127.0.0.1:3000"),
        ({"host": "::1"}, "[::1]:3000"),
        ({"host": "0.0.0.0", "open": True}, "0.0.0.0:3000"),
    ],
)
def test_socket_listens_where_the_settings_say(settings: dict[str, object], address: str) -> None:
    text = units.unit("aisse.socket", Settings.model_validate(settings), PYTHON, None)
    assert value(text, "ListenStream") == address


@pytest.mark.parametrize(
    ("settings", "named"), [({"port": 0}, "port: "), ({"host": "relay.example", "open": True}, "host: ")]
)
def test_socket_without_a_fixed_address_is_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        units.unit("aisse.socket", Settings.model_validate(settings), PYTHON, None)


def test_paths_are_quoted_as_systemd_reads_them() -> None:
    text = units.unit("aisse.service", Settings(), Path('/opt/a "b" %c/python'), Path("/etc/$x\\y.toml"))
    assert value(text, "ExecStart") == ('"/opt/a \\"b\\" %%c/python" -m aisse serve --config "/etc/$$x\\\\y.toml"')


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", units.UNITS)
def test_unit_prints_one_as_it_belongs_into_its_file(run: Run, installed: None, name: str) -> None:
    assert run(name) == (0, shipped(name), "")


def test_unit_takes_interpreter_and_settings_of_this_machine(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "aisse.toml"
    file.write_text("drain_s = 50\nmax_streams = 100\nport = 8080\n")
    _, text, _ = run("aisse@.service", "--config", str(file), AISSE_UNREADY_S="5")
    assert value(text, "ExecStart") == f"{sys.executable} -m aisse serve --config {file} --port %i"
    assert value(text, "TimeoutStopSec") == "65"
    assert value(text, "LimitNOFILE") == "464"
    _, text, _ = run("aisse.socket", "--config", str(file))
    assert value(text, "ListenStream") == "127.0.0.1:8080"


def test_unit_without_a_name_prints_all_and_how_to_install_them(run: Run, installed: None) -> None:
    code, text, errors = run()
    assert (code, errors) == (0, "")
    header, *parts = re.split(r"^# --- /etc/systemd/system/(.*)\n\n", text, flags=re.MULTILINE)
    assert dict(zip(parts[::2], (text.strip() + "\n" for text in parts[1::2]), strict=True)) == {
        name: shipped(name) for name in units.UNITS
    }
    assert all(line.startswith("#") for line in header.strip().splitlines())
    for command in (
        *(f"/opt/aisse/bin/python -m aisse unit {name} | sudo tee /etc/systemd/system/{name}" for name in units.UNITS),
        "systemctl daemon-reload",
        "/etc/aisse/upstream_key",
        "systemctl enable --now aisse.socket aisse.service",
        "systemctl enable --now aisse@3001",
    ):
        assert command in header


def test_install_commands_name_the_settings_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a b.toml"
    file.write_text("")
    text = run("--config", str(file))[1]
    assert f"-m aisse unit --config {shlex.quote(str(file))} aisse.service |" in text


@pytest.mark.parametrize("arguments", [["nginx.service"], ["aisse"], ["--config", "/nowhere.toml"], ["a", "b"]])
def test_unit_of_another_name_is_refused_in_one_line(run: Run, arguments: list[str]) -> None:
    code, text, errors = run(*arguments)
    assert (code, text) == (78, "")
    assert errors.startswith("aisse: ")
    assert errors.count("\n") == 1


def test_help_of_unit_names_them_all(run: Run) -> None:
    code, text, _ = run("--help")
    assert code == 0
    for name in units.UNITS:
        assert name in text


# --- what a service cannot see --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "option"),
    [
        ("/home/me/aisse/.venv", "ProtectHome"),
        ("/root/aisse", "ProtectHome"),
        ("/run/user/1000/aisse", "ProtectHome"),
        ("/tmp/aisse", "PrivateTmp"),
        ("/var/tmp/aisse", "PrivateTmp"),
    ],
)
@pytest.mark.parametrize("of", ["prefix", "base_prefix"])
@pytest.mark.usefixtures("installed")
def test_interpreter_that_services_cannot_see_is_said_with_what_to_do(
    run: Run, monkeypatch: pytest.MonkeyPatch, prefix: str, option: str, of: str
) -> None:
    monkeypatch.setattr(sys, of, prefix)
    for arguments in [*([name] for name in SERVICES), []]:
        code, text, errors = run(*arguments)
        assert code == 0
        assert "ExecStart=" in text
        assert errors.splitlines()[0] == f"aisse: {prefix} is hidden from the service by {option}"
        assert "/opt/aisse" in errors.splitlines()[1]
    assert run("aisse.socket")[2] == ""


def test_path_that_only_resembles_a_hidden_one_is_fine(
    run: Run, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", "/homes/me")
    assert run("aisse.service")[2] == ""


def test_hidden_settings_file_is_said() -> None:
    assert units.hidden([Path("/etc/aisse/aisse.toml")]) == []
    (line,) = units.hidden([Path("/home/me/aisse.toml")])
    assert line == "/home/me/aisse.toml is hidden from the service by ProtectHome"


def test_link_to_a_hidden_place_is_said(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/root/.pyenv")
    assert "/root/.pyenv is hidden from the service by ProtectHome" in units.hidden([link])


def test_settings_of_this_shell_are_said_to_be_missing_in_the_service(run: Run, installed: None) -> None:
    token = "canary-token-0123456789"
    errors = run("aisse.service", AISSE_DRAIN_S="60", AISSE_ACCESS_TOKENS=token)[2]
    assert errors.count("\n") == 1
    assert "/etc/aisse/aisse.env" in errors
    assert "AISSE_ACCESS_TOKENS, AISSE_DRAIN_S" in errors
    assert token not in errors


# --- what systemd says ----------------------------------------------------------------------------------------


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`systemd-analyze ...`; the test fails where it has to be installed and is not."""
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def printed(tmp_path: Path) -> Path:
    """The units as files, for an interpreter that exists."""
    for name in units.UNITS:
        (tmp_path / name).write_text(units.unit(name, Settings(), Path(sys.executable), None))
    return tmp_path


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_units(printed: Path) -> None:
    files = [str(printed / name) for name in units.UNITS]
    done = analyze("verify", *files)
    # It reads the machine's own units along with them, and may have something to say about those.
    about_ours = [line for line in done.stderr.splitlines() if "aisse" in line or str(printed) in line]
    assert about_ours == []
    assert done.returncode == 0, done.stderr


@needs_systemd
def test_systemd_finds_what_is_wrong_with_a_unit(printed: Path) -> None:
    """So that silence in the test above means something."""
    file = printed / "aisse.service"
    file.write_text(file.read_text().replace("KillMode=mixed", "KillMood=mixed"))
    assert "KillMood" in analyze("verify", str(file)).stderr


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_exposure_of_the_services_is_small(printed: Path, name: str) -> None:
    done = analyze("security", "--offline=true", f"--threshold={WORST_EXPOSURE}", str(printed / name))
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= WORST_EXPOSURE / 10, done.stdout
    assert done.returncode == 0, done.stdout
