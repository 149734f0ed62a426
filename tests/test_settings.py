"""Settings: their defaults, what each may be, and that they show no secret."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from aisse.settings import SECRETS, Settings, is_loopback

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


def test_defaults_are_the_documented_ones() -> None:
    assert {name: getattr(Settings(), name) for name in DEFAULTS} == DEFAULTS


def test_defaults_are_valid() -> None:
    """They are not checked when they are used, so that the start stays quick."""
    assert Settings.model_validate(Settings().model_dump()) == Settings()


# --- what they may be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["", "/llm", "/a/b/c", "/LLM", "/~me", "/a.b", "/.a", "/...", "/-_", "/apis", "/v11", "/llm/api", "/a/health"],
)
def test_base_path_is_taken_as_it_is(path: str) -> None:
    assert Settings(base_path=path).base_path == path


@pytest.mark.parametrize("text", ["a,b", "a, b", " a b ", "a\nb", ",a,,b,"])
def test_lists_are_split_however_they_are_written(text: str) -> None:
    assert Settings.model_validate({"models": text, "model": "a"}).models == ("a", "b")


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
    assert Settings.model_validate({"stream_bytes": text}).stream_bytes == size


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
def test_wrong_value_is_refused_with_its_name(name: str, value: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate({name: value})
    first = refused.value.errors()[0]
    # One that does not fit to another setting is of no field; its message begins with its name.
    assert (first["loc"][0] if first["loc"] else first["msg"].removeprefix("Value error, ").partition(":")[0]) == name


# --- who can reach it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_loopback_needs_neither_token_nor_open(host: str) -> None:
    assert is_loopback(host)
    assert Settings(host=host).host == host


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.1", "::ffff:10.0.0.1", "*"]
)
def test_anything_else_needs_a_token_or_open(host: str) -> None:
    assert not is_loopback(host)
    for values in ({"host": host}, {"host": host, "access_tokens": ""}):
        with pytest.raises(ValidationError, match=r"host: .*AISSE_ACCESS_TOKENS.*--open"):
            Settings.model_validate(values)
    assert Settings(host=host, open=True).host == host
    assert Settings.model_validate({"host": host, "access_tokens": "a-token-of-some-length"}).host == host


# --- secrets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, SECRET) for name in sorted(SECRETS)),
        *(("log", url) for url in (f"redis://:{SECRET}@a/0", f"rediss://u:{SECRET}@a", f"unix:///a?password={SECRET}")),
    ],
)
def test_secret_is_masked_wherever_settings_are_printed(name: str, value: str) -> None:
    settings = Settings.model_validate({name: value})
    for text in (str(settings), repr(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert SECRET not in text


def test_wrong_value_is_not_quoted() -> None:
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate({"port": SECRET, "access_tokens": [SECRET + "!"]})
    assert SECRET not in str(refused.value)


def test_empty_secret_is_none_at_all() -> None:
    settings = Settings.model_validate({"access_tokens": "", "upstream_key": ""})
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
    assert Settings(upstream=given).upstream == kept
