"""Settings: defaults < TOML file < environment < flags, and one line for whatever is wrong."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr, ValidationError

from aisse.errors import ConfigError
from aisse.settings import SECRETS, Settings, is_loopback, load, shown

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "canary-secret-0123456789"

# DESIGN: the values that people who read the documentation count on.
DEFAULTS: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 3000,
    "open": False,
    "upstream": "https://api.ezaiapi.com",
    "upstream_key": None,
    "model": "claude-sonnet-4-20250514",
    "models": (),
    "max_tokens": 4096,
    "max_tokens_limit": 64_000,
    "max_streams": 5000,
    "max_body_bytes": 32 << 20,
    "bodies_bytes": 256 << 20,
    "allow_fields": (),
    "allow_betas": (),
    "max_event_bytes": 1 << 20,
    "read_ahead_bytes": 64 << 10,
    "stream_bytes": 16 << 20,
    "replay_bytes": 512 << 20,
    "access_tokens": (),
    "cors_origins": (),
    "base_path": "",
    "heartbeat_s": 15,
    "first_byte_commit_s": 5,
    "connect_s": 10,
    "first_byte_s": 300,
    "silence_s": 60,
    "no_content_s": 300,
    "stream_s": 3600,
    "leave_s": 10,
    "leave_max_s": 300,
    "allow_continue": False,
    "stall_s": 30,
    "retention_s": 300,
    "drain_s": 25,
    "log": SecretStr("memory"),
    "log_format": "auto",
    "write_buffer_bytes": 16 << 10,
    "send_buffer_bytes": 32 << 10,
}


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


def test_defaults_are_the_documented_ones() -> None:
    loaded = load({}, {})
    assert {name: getattr(loaded.settings, name) for name in DEFAULTS} == DEFAULTS
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.origins.keys() == Settings.model_fields.keys()


def test_defaults_are_valid() -> None:
    """They are not checked when they are used, so that the start stays quick."""
    assert Settings.model_validate(Settings().model_dump()) == Settings()


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


@pytest.mark.parametrize(
    "path",
    ["", "/llm", "/a/b/c", "/LLM", "/~me", "/a.b", "/.a", "/...", "/-_", "/apis", "/v11", "/llm/api", "/a/health"],
)
def test_base_path_is_taken_as_it_is(path: str) -> None:
    assert load({}, {"AISSE_BASE_PATH": path}).settings.base_path == path


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


@pytest.mark.parametrize("text", ["a,b", "a, b", " a b ", "a\nb", ",a,,b,"])
def test_lists_are_split_however_they_are_written(text: str) -> None:
    settings = load({}, {"AISSE_MODELS": text, "AISSE_MODEL": "a"}).settings
    assert settings.models == ("a", "b")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("2KiB", 2048),
        ("2 KiB", 2048),
        ("2kib", 2048),
        ("2KB", 2000),
        ("1MiB", 1 << 20),
        ("1.5MiB", 3 << 19),
        ("1GiB", 1 << 30),
    ],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert load({}, {"AISSE_STREAM_BYTES": text}).settings.stream_bytes == size


# --- what is wrong --------------------------------------------------------------------------------------------

WRONG_VALUES: list[tuple[str, str]] = [
    ("host", ""),
    *(("port", value) for value in ("", "x", "-1", "65536", "3000.5", "0x10", "[1]")),
    *(("open", value) for value in ("", "perhaps", "2")),
    *(
        ("upstream", value)
        for value in ("", "x", "ftp://a", "http://", "//a", "http://u:p@a", "http://a?key=x", "http://a#x", "http://[")
    ),
    *(("cors_origins", value) for value in ("*", "null", "app.example", "https://a/", "https://a/b", "ftp://a")),
    *(("cors_origins", value) for value in ("https://a,*", "https://u@a", "HTTPS://A", "https://a:443")),
    *(
        ("base_path", value)
        for value in ("/", "llm", "llm/", "/llm/", "//llm", "/a//b", "//", "/a/b/", " /llm", "/llm ")
    ),
    *(
        ("base_path", value)
        for value in ("/.", "/..", "/a/..", "/../a", "/a/./b", "/a%2Fb", "/a?b", "/a#b", "/a;b", "/é")
    ),
    *(
        ("base_path", value)
        for value in ("/{a}", "/a\\b", "/a\n", "/a:b", "http://a/llm", "/api", "/health", "/aisse.js")
    ),
    *(("base_path", value) for value in ("/api/chat", "/v1", "/v1/llm", "/metrics", "/vendor/x", "/style.css")),
    *(("model", value) for value in ("", "a b", "../a", "a\nb")),
    *(("models", value) for value in ("a/../b c!", "é")),
    *(("max_tokens", value) for value in ("0", "-1", "1.5", "x")),
    *(("max_tokens_limit", value) for value in ("0", "x")),
    *(("max_streams", value) for value in ("0", "-5", "x")),
    *(("max_body_bytes", value) for value in ("", "x", "0", "1023", "-1", "1XB", "1023B", "nan")),
    *(("replay_bytes", value) for value in ("lots", "1 KiB KiB")),
    ("bodies_bytes", "31MiB"),  # no body of max_body_bytes would fit
    *(("allow_fields", value) for value in ("a!b", "a/b", "é", "x" * 129)),
    *(("allow_betas", value) for value in ("a!b", "é", "x" * 129)),
    *(("heartbeat_s", value) for value in ("", "x", "0", "-1", "nan", "inf", "1e9", "5s")),
    *(("leave_s", value) for value in ("-0.1", "nan", "inf", "x")),
    *(("log", value) for value in ("", "redis", "MEMORY", "file", "redis://", "unix://", "http://a", "redis://a:b/0")),
    *(("lease_s", value) for value in ("0", "0.9", "x", "inf")),
    *(("log_tick_s", value) for value in ("0", "2", "x")),
    *(("log_format", value) for value in ("xml", "")),
    *(("log_level", value) for value in ("trace", "INFO!", "")),
    *(("access_tokens", value) for value in ("short", "a-token-of-some-length,short", "white space in it!")),
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


# --- who can reach it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_loopback_needs_neither_token_nor_open(host: str) -> None:
    assert is_loopback(host)
    assert load({"host": host}, {}).settings.host == host


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.1", "::ffff:10.0.0.1", "*"]
)
def test_anything_else_needs_a_token_or_open(host: str) -> None:
    assert not is_loopback(host)
    refused = wrong(flags={"host": host})
    assert "AISSE_ACCESS_TOKENS" in refused
    assert "--open" in refused
    assert load({"host": host, "open": True}, {}).settings.host == host
    assert load({"host": host}, {"AISSE_ACCESS_TOKENS": "a-token-of-some-length"}).settings.host == host
    assert "host" in wrong(flags={"host": host}, environ={"AISSE_ACCESS_TOKENS": ""})


# --- secrets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_secret_is_masked_wherever_settings_are_printed(name: str) -> None:
    settings = load({}, {f"AISSE_{name.upper()}": SECRET}).settings
    for text in (str(settings), repr(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert SECRET not in text
    assert SECRET not in shown(name, getattr(settings, name))
    assert "****" in shown(name, getattr(settings, name))


@pytest.mark.parametrize(
    "url", [f"redis://:{SECRET}@a/0", f"rediss://u:{SECRET}@a", f"unix:///a?password={SECRET}&db=1"]
)
def test_password_of_the_log_is_masked_and_refused_as_a_flag(url: str) -> None:
    settings = load({}, {"AISSE_LOG": url}).settings
    for text in (str(settings), repr(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert SECRET not in text
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


def test_settings_built_by_hand_do_not_quote_what_is_wrong_either() -> None:
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate({"port": SECRET, "access_tokens": [SECRET + "!"]})
    assert SECRET not in str(refused.value)


def test_empty_secret_is_none_at_all() -> None:
    settings = load({}, {"AISSE_ACCESS_TOKENS": "", "AISSE_UPSTREAM_KEY": ""}).settings
    assert settings.access_tokens == ()
    assert not settings.upstream_key


# --- the object -----------------------------------------------------------------------------------------------


def test_settings_are_frozen_and_know_no_other_names() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]  # that it cannot be set is the point
    with pytest.raises(ValidationError):
        Settings.model_validate({"ports": 1})


@pytest.mark.parametrize(
    ("given", "kept"),
    [("http://a/", "http://a"), ("http://a/base/", "http://a/base"), ("https://A:8443", "https://A:8443")],
)
def test_upstream_is_a_base_without_its_last_slash(given: str, kept: str) -> None:
    assert load({"upstream": given}, {}).settings.upstream == kept


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
