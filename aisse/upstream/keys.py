"""Whose key goes where: no key is ever sent to a host that it does not belong to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from yarl import URL

from aisse.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aisse.settings import Settings

PROVIDER_KEYS = (("EZAI_API_KEY", "ezaiapi.com", True), ("ANTHROPIC_API_KEY", "api.anthropic.com", False))
"""The variable of each provider's key, the one domain that the key belongs to, and whether subdomains count."""


def key_for(base_url: str, settings: Settings, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The key that may be sent to `base_url`, and where it came from. None where there is no key for that host.

    `upstream_key` (by environment or credential) belongs to the configured upstream, whichever that is. A provider's
    key belongs to its domain alone, and goes over TLS alone. Raises ConfigError for a key that cannot be a header.
    """
    found: tuple[str, str] | None = None
    directory = environ.get("CREDENTIALS_DIRECTORY")
    url = URL(base_url)
    if settings.upstream_key is not None and settings.upstream_key.get_secret_value():
        found = settings.upstream_key.get_secret_value(), "AISSE_UPSTREAM_KEY"
    elif directory and (credential := _read_credential(directory)):
        found = credential, "credential upstream_key"
    elif url.scheme == "https":
        for variable, domain, subdomains in PROVIDER_KEYS:
            key = environ.get(variable)
            if key and _belongs(url, domain, subdomains):
                found = key, variable
                break
    if found is not None and re.fullmatch(r"[\x21-\x7e]+", found[0]) is None:
        raise ConfigError(f"{found[1]}: is no key: it has spaces, line ends or other than ASCII in it")
    return found


def check_key(base_url: str, key: str | None) -> None:
    """Raises ConfigError where `key` is None and the host is known to ask for one."""
    if key is not None or (variable := needs_key(base_url)) is None:
        return
    if base_url.startswith("http:"):
        raise ConfigError(f"upstream: keys go over TLS only; say https:// instead of {base_url}")
    raise ConfigError(f"upstream: {base_url} needs a key; set {variable}, or try `--upstream simulator`")


def needs_key(base_url: str) -> str | None:
    """The variable whose key this host is known to ask for, or None."""
    for variable, domain, subdomains in PROVIDER_KEYS:
        if _belongs(URL(base_url), domain, subdomains):
            return variable
    return None


def _read_credential(directory: str) -> str:
    try:
        with open(f"{directory}/upstream_key", encoding="ascii") as file:  # noqa: PTH123 - systemd's path, joined as its manual does
            return file.read().strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        raise ConfigError("credential upstream_key: cannot be read") from None


def _belongs(url: URL, domain: str, subdomains: bool) -> bool:
    # Whole labels only: "[2001:db8::1%25.ezaiapi.com]" and "evil.example%00.ezaiapi.com" end in the domain, too.
    labels = r"(?:[a-z0-9_-]+\.)*" if subdomains else ""
    return re.fullmatch(rf"{labels}{re.escape(domain)}\.?", (url.host or "").lower()) is not None
