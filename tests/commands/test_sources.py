"""The sources of settings: defaults < TOML file < environment < flags, and one line for whatever is wrong."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from aisse.commands.sources import load, shown
from aisse.errors import ConfigError
from aisse.settings import SECRETS, Settings

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "canary-secret-0123456789"


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "aisse.toml"
    file.write_text(text)
    return file


def wrong(**sources: Any) -> str:
    """Why `load` refuses the sources, which must be one line."""
    with pytest.raises(ConfigError) as refused:
        load(sources.get("flags", {}), sources.get("environ", {}), sources.get("file"))
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


def test_defaults_are_named_as_such() -> None:
    loaded = load({}, {})
    assert loaded.settings == Settings()
    assert loaded.origins == dict.fromkeys(Settings.model_fields, "default")


# --- precedence -----------------------------------------------------------------------------------------------

VALUES: dict[str, tuple[str, str, str]] = {
    "host": ("127.0.0.2", "127.0.0.3", "localhost"),
    "port": ("1", "2", "3"),
    "open": ("true", "false", "true"),
    "upstream": ("http://a", "http://b", "simulator"),
    "model": ("a", "b", "c"),
    "models": ("claude-sonnet-4-20250514", "claude-sonnet-4-20250514,b", "claude-sonnet-4-20250514,c"),
    "max_body_bytes": ("2KiB", "3KiB", "4KiB"),
    "heartbeat_s": ("1", "2.5", "3"),
    "cors_origins": ("http://a", "http://b", "http://c,http://d"),
    "log_format": ("json", "console", "auto"),
}


@pytest.mark.parametrize("name", VALUES)
def test_later_source_wins_and_is_named(tmp_path: Path, name: str) -> None:
    in_file, in_environ, in_flag = VALUES[name]
    file = toml(tmp_path, f'{name} = "{in_file}"\n')
    environ = {f"AISSE_{name.upper()}": in_environ}
    flags = {name: in_flag}
    flag = "--" + name.replace("_", "-")
    for given, origin, expected in (
        (load({}, {}, file), f"{file}: {name}", in_file),
        (load({}, environ, file), f"AISSE_{name.upper()}", in_environ),
        (load(flags, environ, file), flag, in_flag),
        (load(flags, {}, file), flag, in_flag),
        (load(flags, {}), flag, in_flag),
    ):
        assert given.origins[name] == origin
        assert getattr(given.settings, name) == getattr(Settings.model_validate({name: expected}), name)
        assert all(other == "default" for key, other in given.origins.items() if key != name)


def test_sources_complement_each_other(tmp_path: Path) -> None:
    file = toml(tmp_path, "port = 1\nstall_s = 1\nheartbeat_s = 1\n")
    loaded = load({"port": "3"}, {"AISSE_PORT": "2", "AISSE_STALL_S": "2"}, file)
    assert (loaded.settings.port, loaded.settings.stall_s, loaded.settings.heartbeat_s) == (3, 2, 1)


def test_other_variables_are_none_of_ours() -> None:
    assert load({}, {"PORT": "1", "HOST": "0.0.0.0", "aisse_port": "1", "XAISSE_PORT": "1"}).settings == Settings()


def test_file_may_use_types_of_its_own(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        """
        port = 0
        open = true
        models = ["claude-sonnet-4-20250514", "b"]
        cors_origins = []
        max_body_bytes = 4096
        stream_bytes = "1.5MiB"
        heartbeat_s = 0.5
        leave_s = 1
        """,
    )
    settings = load({}, {}, file).settings
    assert settings.models == ("claude-sonnet-4-20250514", "b")
    assert (settings.max_body_bytes, settings.stream_bytes) == (4096, 1_572_864)
    assert (settings.open, settings.heartbeat_s, settings.leave_s) == (True, 0.5, 1.0)


# --- what is wrong --------------------------------------------------------------------------------------------

# One of each kind. tests/test_settings.py has all that is wrong.
WRONG_VALUES = [
    ("host", ""),
    ("port", "x"),
    ("open", "perhaps"),
    ("upstream", "http://u:p@a"),
    ("cors_origins", "https://a,*"),
    ("base_path", "/a\n"),
    ("model", "a b"),
    ("models", "é"),
    ("max_tokens", "0"),
    ("max_body_bytes", "1XB"),
    ("bodies_bytes", "31MiB"),  # no body of max_body_bytes would fit
    ("heartbeat_s", "nan"),
    ("log", "redis://a:b/0"),
    ("log_format", "xml"),
    ("access_tokens", "a-token-of-some-length,short"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_wrong_value_is_named_with_its_source(tmp_path: Path, name: str, value: str) -> None:
    escaped = value.replace("\n", "\\n")
    file = toml(tmp_path, f'{name} = "{escaped}"\n')
    variable = f"AISSE_{name.upper()}"
    assert wrong(file=file).startswith(f"{file}: {name}: ")
    assert wrong(environ={variable: value}).startswith(f"{variable}: ")
    if name not in SECRETS:
        flag = "--" + name.replace("_", "-")
        assert wrong(flags={name: value}).startswith(f"{flag}: ")
        # A later source is the one at fault, whatever stands in the earlier ones.
        assert wrong(flags={name: value}, environ={variable: value}, file=file).startswith(f"{flag}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hartbeat_s = 1", "hartbeat_s: there is no such setting"),
        ("[serve]\nport = 1", "serve: there is no such setting"),
        ("PORT = 1", "PORT: there is no such setting"),
        ('"heartbeat-s" = 1', "heartbeat-s: there is no such setting"),
        ("port = 1\nport = 2", "is not TOML: "),
        ("port =", "is not TOML: "),
        ("port = [1]", "port: "),
        ("port = 2020-01-01", "port: "),
        ("models = [1]", "models"),
        ("models = {a = 1}", "models: "),
        ("models = 5", "models: "),
        ("heartbeat_s = [[1]]", "heartbeat_s: "),
        ("heartbeat_s = inf", "heartbeat_s: "),
        ("heartbeat_s = nan", "heartbeat_s: "),
        ("host = 5", "host: "),
        ("\x00", "is not TOML: "),
    ],
)
def test_wrong_file_is_named_with_what_is_wrong_in_it(tmp_path: Path, text: str, message: str) -> None:
    file = toml(tmp_path, text)
    assert wrong(file=file).startswith(f"{file}: {message}")


def test_file_whose_name_has_braces_is_named(tmp_path: Path) -> None:
    file = tmp_path / "{name}{0}{.toml"
    file.write_text("port = 1")
    assert load({}, {}, file).origins["port"] == f"{file}: port"
    file.write_text("prot = 1")
    assert wrong(file=file).startswith(f"{file}: prot: ")


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.toml"
    assert wrong(file=absent) == f"{absent}: cannot be read: No such file or directory"
    assert wrong(file=tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'host = "\xe9"')
    assert wrong(file=latin).startswith(f"{latin}: is not TOML: ")


WINDOWS = 'heartbeat_s = 3\r\nmodel = "x"  # \u00e9\r\n\r\nmodels = [\r\n  "x",\r\n]\r\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_file_of_a_windows_editor_is_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "aisse.toml"
    file.write_bytes(WINDOWS.encode(encoding))
    settings = load({}, {}, file).settings
    assert (settings.heartbeat_s, settings.model, settings.models) == (3, "x", ("x",))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (WINDOWS.encode("utf-16"), "UTF-16"),
        (WINDOWS.encode("utf-16-le"), "UTF-16"),
        (b"\xfe\xff" + WINDOWS.encode("utf-16-be"), "UTF-16"),
        (WINDOWS.encode("cp1252"), "line 2 is not UTF-8"),
    ],
)
def test_file_in_another_encoding_is_refused_with_what_to_do(tmp_path: Path, data: bytes, why: str) -> None:
    file = tmp_path / "aisse.toml"
    file.write_bytes(data)
    message = wrong(file=file)
    assert message.startswith(f"{file}: is not TOML: ")
    assert why in message
    assert message.endswith("save it as UTF-8")


@pytest.mark.parametrize("name", ["HARTBEAT_S", "", "UPSTREAM_KEYS", "PORT_", "_PORT"])
def test_wrong_variable_is_named(name: str) -> None:
    assert wrong(environ={f"AISSE_{name}": "1"}).startswith(f"AISSE_{name}: there is no such setting")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_tokens": "10", "max_tokens_limit": "9"}, "max_tokens"),
        ({"model": "a", "models": "b,c"}, "model"),
        ({"leave_s": "20", "leave_max_s": "19"}, "leave_s"),
        ({"host": "0.0.0.0"}, "host"),
    ],
)
def test_values_that_do_not_fit_together_name_one_with_its_source(values: dict[str, str], named: str) -> None:
    variables = {f"AISSE_{name.upper()}": value for name, value in values.items()}
    assert wrong(environ=variables).startswith(f"AISSE_{named.upper()}: ")
    assert wrong(flags=values).startswith(f"--{named.replace('_', '-')}: ")


def test_value_that_does_not_fit_a_default_names_the_setting() -> None:
    assert wrong(flags={"max_tokens_limit": "100"}).startswith("max_tokens: ")
    assert wrong(flags={"models": "a"}).startswith("model: ")


# --- secrets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_secret_is_shown_as_a_mask(name: str) -> None:
    settings = load({}, {f"AISSE_{name.upper()}": SECRET}).settings
    assert SECRET not in shown(name, getattr(settings, name))
    assert "****" in shown(name, getattr(settings, name))


@pytest.mark.parametrize(
    "url", [f"redis://:{SECRET}@a/0", f"rediss://u:{SECRET}@a", f"unix:///a?password={SECRET}&db=1"]
)
def test_password_of_the_log_is_masked_and_refused_as_a_flag(url: str) -> None:
    settings = load({}, {"AISSE_LOG": url}).settings
    assert SECRET not in shown("log", settings.log)
    assert "****" in shown("log", settings.log)
    said = wrong(flags={"log": url})
    assert SECRET not in said
    assert "AISSE_LOG" in said


@pytest.mark.parametrize("value", [SECRET + " with a space", SECRET + "!", f"{SECRET},short"])
def test_wrong_secret_is_not_quoted(tmp_path: Path, value: str) -> None:
    assert SECRET not in wrong(environ={"AISSE_ACCESS_TOKENS": value})
    assert SECRET not in wrong(file=toml(tmp_path, f'access_tokens = "{value}"'))


def test_wrong_value_is_not_quoted() -> None:
    """It may be a key that was put into the wrong variable."""
    for name in ("port", "upstream", "log", "model", "heartbeat_s", "replay_bytes", "cors_origins"):
        assert SECRET not in wrong(environ={f"AISSE_{name.upper()}": SECRET + " !"})


# --- shown ----------------------------------------------------------------------------------------------------

SHOWN: list[tuple[str, Any]] = [
    ("port", "65535"),
    ("open", True),
    ("max_body_bytes", "1024"),
    ("max_body_bytes", "1025"),
    ("stream_bytes", "1.5MiB"),
    ("replay_bytes", "3GiB"),
    ("heartbeat_s", "0.1"),
    ("heartbeat_s", "0.123456789"),
    ("heartbeat_s", "1e-7"),
    ("stream_s", "604800"),
    ("stream_s", "123456.75"),
    ("models", "claude-sonnet-4-20250514,b"),
    ("cors_origins", "https://a,http://b:8080,https://xn--bcher-kva.example"),
    ("upstream", 'http://a/"quoted"'),
    ("upstream", "http://a/back\\slash"),
    ("upstream", "simulator"),
    ("log_level", "debug"),
    ("log", "memory"),
    ("log", "redis://127.0.0.1:6379/0"),
    ("log", "rediss://user@redis.example/1"),
    ("log", "unix:///run/redis.sock?db=2"),
]


@pytest.mark.parametrize(("name", "value"), SHOWN)
def test_value_shown_is_toml_that_gives_the_same_value(tmp_path: Path, name: str, value: Any) -> None:
    given = load({name: value}, {}).settings
    text = "\n".join(f"{key} = {shown(key, getattr(given, key))}" for key in Settings.model_fields)
    assert load({}, {}, toml(tmp_path, text)).settings == given


def test_defaults_shown_are_toml_that_gives_the_defaults() -> None:
    text = "\n".join(f"{key} = {shown(key, getattr(Settings(), key))}" for key in Settings.model_fields)
    settings = Settings.model_validate(tomllib.loads(text))
    assert settings.model_copy(update={"upstream_key": None}) == Settings()
    assert not settings.upstream_key
