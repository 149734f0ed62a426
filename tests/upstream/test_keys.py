"""Whose key goes where: to its own host alone, and nowhere in the clear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from aisse.errors import ConfigError
from aisse.settings import Settings
from aisse.upstream.keys import check_key, key_for, needs_key

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

EZAI, ANTHROPIC, OWN, CREDENTIAL = "ez-key-1f2e3d", "sk-ant-key-4c5b6a", "own-key-7a8b9c", "cred-key-0d1e2f"
PROVIDERS = {"EZAI_API_KEY": EZAI, "ANTHROPIC_API_KEY": ANTHROPIC}

THEIR_HOSTS = [
    ("https://ezaiapi.com", "EZAI_API_KEY"),
    ("https://api.ezaiapi.com", "EZAI_API_KEY"),
    ("https://a.b-c.ezaiapi.com:8443/base", "EZAI_API_KEY"),
    ("https://API.EzaiAPI.Com", "EZAI_API_KEY"),
    ("HTTPS://api.ezaiapi.com", "EZAI_API_KEY"),
    ("https://api.ezaiapi.com.", "EZAI_API_KEY"),
    ("https://api.anthropic.com", "ANTHROPIC_API_KEY"),
    ("https://api.anthropic.com:443/base", "ANTHROPIC_API_KEY"),
    ("https://API.ANTHROPIC.COM", "ANTHROPIC_API_KEY"),
    ("https://api.anthropic.com.", "ANTHROPIC_API_KEY"),
]

OTHER_HOSTS = [
    # look-alikes
    "https://ezaiapi.com.evil.example",
    "https://api.ezaiapi.com.evil.example",
    "https://evilezaiapi.com",
    "https://api-ezaiapi.com",
    "https://ezaiapi.co",
    "https://ezaiapi.comm",
    "https://ezaiapi.example",
    "https://api.anthropic.com.evil",
    "https://evilapi.anthropic.com",
    "https://x.api.anthropic.com",
    "https://anthropic.com",
    "https://console.anthropic.com",
    "https://api.anthropic.co",
    "https://ezai\u0430pi.com",  # a Cyrillic letter
    "https://api.\u0430nthropic.com",
    # the domain is somewhere, but is not the host
    "https://api.anthropic.com@evil.example",
    "https://api.anthropic.com:443@evil.example",
    "https://ezaiapi.com:x@evil.example/",
    "https://evil.example/.ezaiapi.com",
    "https://evil.example/@api.anthropic.com",
    "https://evil.example?.ezaiapi.com",
    "https://evil.example#@api.anthropic.com",
    "https://evil.example:443#.ezaiapi.com",
    # what ends like the domain, and is no host name: a resolver would stop earlier
    "https://[::1%25.ezaiapi.com]",
    "https://[2001:db8::1%25.ezaiapi.com]",
    "https://evil.example\x00.ezaiapi.com",
    "https://evil.example%00.ezaiapi.com",
    "https://evil.example%2F.ezaiapi.com",
    "https://evil.example .ezaiapi.com",
    "https://evil.example;.ezaiapi.com",
    "https://.ezaiapi.com",
    # in the open
    "http://ezaiapi.com",
    "http://api.ezaiapi.com",
    "http://api.ezaiapi.com:443",
    "http://api.anthropic.com",
    # addresses, and this machine
    "https://127.0.0.1",
    "http://127.0.0.1:3000",
    "https://93.184.216.34",
    "https://[::1]",
    "https://[2001:db8::1]:8443",
    "https://[::ffff:127.0.0.1]",
    "https://localhost",
    "https://ezaiapi.com.localhost",
    # no such thing
    "wss://api.ezaiapi.com",
    "ftp://api.anthropic.com",
    "//api.ezaiapi.com",
    "https:///api.ezaiapi.com",
    "api.ezaiapi.com",
]


@pytest.mark.parametrize(("url", "variable"), THEIR_HOSTS)
def test_provider_key_goes_to_its_own_domain(url: str, variable: str) -> None:
    assert key_for(url, Settings(), PROVIDERS) == (PROVIDERS[variable], variable)
    assert key_for(url, Settings(), {variable: "k"}) == ("k", variable)
    assert needs_key(url) == variable


@pytest.mark.parametrize(("url", "variable"), THEIR_HOSTS)
def test_provider_key_of_another_is_not_taken_instead(url: str, variable: str) -> None:
    others = {name: key for name, key in PROVIDERS.items() if name != variable}
    assert key_for(url, Settings(), others) is None


@pytest.mark.parametrize("url", OTHER_HOSTS)
def test_provider_key_goes_to_no_other_host(url: str) -> None:
    assert key_for(url, Settings(), PROVIDERS) is None


@pytest.mark.parametrize(
    "url", ["https://api.ezaiapi.com", "https://api.anthropic.com", "http://127.0.0.1:1", "https://evil.example"]
)
def test_upstream_key_goes_to_the_configured_upstream_before_any_other(url: str, tmp_path: Path) -> None:
    (tmp_path / "upstream_key").write_text(CREDENTIAL)
    environ = PROVIDERS | {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert key_for(url, Settings(upstream_key=SecretStr(OWN)), environ) == (OWN, "AISSE_UPSTREAM_KEY")
    assert key_for(url, Settings(), environ) == (CREDENTIAL, "credential upstream_key")


def test_empty_key_is_none(tmp_path: Path) -> None:
    (tmp_path / "upstream_key").write_text("\n")
    environ = {"EZAI_API_KEY": "", "ANTHROPIC_API_KEY": "", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    settings = Settings(upstream_key=SecretStr(""))
    for url in ("https://api.ezaiapi.com", "https://api.anthropic.com", "https://other.example"):
        assert key_for(url, settings, environ) is None
    assert key_for("https://api.ezaiapi.com", settings, environ | PROVIDERS) == (EZAI, "EZAI_API_KEY")


def test_directory_without_the_credential_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "another_key").write_text(CREDENTIAL)
    assert key_for("https://other.example", Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path)}) is None
    assert key_for("https://other.example", Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path / "gone")}) is None


def test_line_end_of_the_credentials_file_is_not_part_of_the_key(tmp_path: Path) -> None:
    (tmp_path / "upstream_key").write_text(CREDENTIAL + "\r\n")
    found = key_for("https://other.example", Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert found == (CREDENTIAL, "credential upstream_key")


MALFORMED = [
    "sec ret",
    "sec\tret",
    "secret\nx",
    "secret\r\nx-evil: 1",
    "s\u00e9cret",
    "\u2028secret",
    "secret\x00x",
    "secret\x7f",
]


@pytest.mark.parametrize("key", [*MALFORMED, "secret\n", " secret"])
@pytest.mark.parametrize("source", ["EZAI_API_KEY", "AISSE_UPSTREAM_KEY"])
def test_key_that_cannot_be_a_header_is_refused_without_being_quoted(key: str, source: str) -> None:
    own = SecretStr(key) if source == "AISSE_UPSTREAM_KEY" else None
    assert_refused(Settings(upstream_key=own), {} if own else {source: key}, source)


@pytest.mark.parametrize("key", MALFORMED)
def test_credential_that_cannot_be_a_header_is_refused_without_being_quoted(key: str, tmp_path: Path) -> None:
    (tmp_path / "upstream_key").write_bytes(key.encode())
    assert_refused(Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path)}, "credential upstream_key")


def assert_refused(settings: Settings, environ: Mapping[str, str], source: str) -> None:
    with pytest.raises(ConfigError) as refused:
        key_for("https://api.ezaiapi.com", settings, environ)
    message = str(refused.value)
    assert message.startswith(f"{source}: ")
    assert not any(part in message for part in ("sec", "ret", "evil", "\n"))
    assert refused.value.__cause__ is None


def test_credential_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "upstream_key").mkdir()
    with pytest.raises(ConfigError, match="credential upstream_key"):
        key_for("https://api.ezaiapi.com", Settings(), {"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_settings_show_no_key() -> None:
    settings = Settings(upstream_key=SecretStr(OWN))
    assert OWN not in repr(settings)
    assert OWN not in str(settings.model_dump())
    assert OWN not in settings.model_dump_json()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://api.ezaiapi.com", "set EZAI_API_KEY"),
        ("https://API.Anthropic.com/base", "set ANTHROPIC_API_KEY"),
        ("http://api.ezaiapi.com", "say https://"),
    ],
)
def test_missing_key_is_refused_with_what_to_do(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"^upstream: ") as refused:
        check_key(url, None)
    assert said in str(refused.value)
    check_key(url, "any key")


def test_host_that_asks_for_no_key_needs_none() -> None:
    check_key("https://other.example", None)
