"""The systemd units: their texts for this interpreter and these settings, and what they hide from a service."""

from __future__ import annotations

import ipaddress
import math
import re
import shlex
from importlib import resources
from typing import TYPE_CHECKING

from aisse.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from aisse.settings import Settings

UNITS = ("aisse.service", "aisse.socket", "aisse@.service")

# How long the end of a drain takes at most, and how much longer systemd waits before its SIGKILL.
_END_S = 2
_MARGIN_S = 8

_DESCRIPTORS_A_STREAM = 4
_SPARE_DESCRIPTORS = 64

# The directories that an option of the units hides from the service.
_HIDDEN = {"ProtectHome": ("/home", "/root", "/run/user"), "PrivateTmp": ("/tmp", "/var/tmp")}  # noqa: S108 - nothing is written there


def unit(name: str, settings: Settings, python: Path, config: Path | None) -> str:
    """The text of one of UNITS for this interpreter, these settings and the TOML file that they come from.

    Raises ConfigError for another name, and for a `host` that a socket unit cannot have.
    """
    if name not in UNITS:
        raise ConfigError(f"there is no such unit; name one of {', '.join(UNITS)}, or none for all")
    text = (resources.files("aisse.deploy") / name).read_text(encoding="utf-8")
    if name.endswith(".socket"):
        return _set(text, "ListenStream", _address(settings.host, settings.port))
    command = [_word(str(python)), "-m", "aisse", "serve"]
    if config is not None:
        command += ["--config", _word(str(config.absolute()).replace("$", "$$"))]
    if name == "aisse@.service":
        command += ["--port", "%i"]
    text = _set(text, "ExecStart", " ".join(command))
    text = _set(text, "TimeoutStopSec", str(math.ceil(settings.unready_s + settings.drain_s) + _END_S + _MARGIN_S))
    return _set(text, "LimitNOFILE", str(_DESCRIPTORS_A_STREAM * settings.max_streams + _SPARE_DESCRIPTORS))


def all_units(settings: Settings, python: Path, config: Path | None) -> str:
    """All UNITS, under a comment that says where each belongs and how they are started."""
    aisse = f"{shlex.quote(str(python))} -m aisse unit"
    if config is not None:
        aisse += f" --config {shlex.quote(str(config.absolute()))}"
    install = "\n".join(f"#   {aisse} {name} | sudo tee /etc/systemd/system/{name}" for name in UNITS)
    units = [f"# --- /etc/systemd/system/{name}\n\n{unit(name, settings, python, config)}" for name in UNITS]
    header = f"""\
# The units of aisse for systemd. Each belongs into a file of its own; these commands put them there:
{install}
#   sudo systemctl daemon-reload
#
# The upstream's key; paste it and end with Ctrl-D:
#   sudo install -D -m 0600 /dev/stdin /etc/aisse/upstream_key
#
# Then either one aisse on {settings.host}:{settings.port}, whose port systemd holds while it restarts:
#   sudo systemctl enable --now aisse.socket aisse.service
# or several behind nginx, one a port:
#   sudo systemctl enable --now aisse@3001 aisse@3002 aisse@3003
"""
    return "\n".join([header, *units])


def hidden(paths: Iterable[Path]) -> list[str]:
    """A line for each of `paths` that a service of these units cannot see: what is hidden, and by which option."""
    # The service follows links, too: it has to see both ends of one.
    ends = dict.fromkeys(end for path in paths for end in (path.absolute(), path.resolve()))
    return [
        f"{end} is hidden from the service by {option}"
        for end in ends
        for option, directories in _HIDDEN.items()
        if any(end.is_relative_to(directory) for directory in directories)
    ]


def _set(text: str, name: str, value: str) -> str:
    changed, count = re.subn(rf"^{name}=.*$", lambda _found: f"{name}={value}", text, flags=re.MULTILINE)
    assert count == 1, name
    return changed


def _address(host: str, port: int) -> str:
    if port == 0:
        raise ConfigError("port: the socket unit needs one that readers can know, not 0")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ConfigError("host: the socket unit needs an IP address; systemd looks up no names") from None
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _word(text: str) -> str:
    """One word of a command line, as systemd.service(5) and systemd.syntax(7) read it."""
    text = text.replace("%", "%%")
    if re.fullmatch(r"[A-Za-z0-9_@%$+=:,./-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
