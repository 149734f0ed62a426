"""The settings from their sources: defaults < TOML file < environment < flags, and where each value came from.

A setting has one name in all three: `heartbeat_s`, `AISSE_HEARTBEAT_S`, `--heartbeat-s`.
"""

# pydantic-settings was tried in place of this. It keeps no record of which source a value came from, takes names in
# other case, skips unknown variables and files that do not exist, and needed more code around it than stands here.

from __future__ import annotations

import codecs
import json
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ByteSize, SecretStr, ValidationError

from aisse.errors import ConfigError
from aisse.settings import SECRETS, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ENV_PREFIX = "AISSE_"

MASK = "********"
"""What is shown in place of a secret."""


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def flag(name: str) -> str:
    """The flag of a setting, or of any other field of a model."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Loaded:
    """Settings and, for each, where its value came from: `default`, the file's path, a variable or a flag."""

    settings: Settings
    origins: Mapping[str, str]


def load(flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None = None) -> Loaded:
    """Merges the sources. Raises ConfigError with one line that names the first wrong name or value and its source."""
    from_environ = {
        name.removeprefix(ENV_PREFIX).lower(): value for name, value in environ.items() if name.startswith(ENV_PREFIX)
    }
    sources: list[tuple[Mapping[str, object], Callable[[str], str]]] = [(from_environ, variable), (flags, flag)]
    if file is not None:
        sources.insert(0, (_read_toml(file), lambda name: f"{file}: {name}"))
    values: dict[str, object] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")
    for source, origin in sources:
        for name, value in source.items():
            if name not in Settings.model_fields:
                raise ConfigError(f"{origin(name)}: there is no such setting; `aisse config` lists them")
            if name == "log" and source is flags and _has_password(str(value)):
                raise ConfigError(f"{flag(name)}: other users see a password here; put the URL into {variable(name)}")
            values[name] = value
            origins[name] = origin(name)
    try:
        return Loaded(Settings.model_validate(values), origins)
    except ValidationError as error:
        raise ConfigError(_one_line(error, origins)) from None


def _one_line(error: ValidationError, origins: Mapping[str, str]) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        name, _, message = message.partition(": ")
    else:
        name = str(first["loc"][0])
    origin = origins[name]
    return f"{name if origin == 'default' else origin}: {message}"


def _read_toml(file: Path) -> dict[str, object]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    # Windows' editors: what they call Unicode is UTF-16, and their UTF-8 may begin with a byte order mark.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ConfigError(f"{file}: is not TOML: it seems to be UTF-16; save it as UTF-8")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}: is not TOML: line {line} is not UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: is not TOML: {error}") from None


def shown(name: str, value: object) -> str:
    """A value as a TOML file would hold it; secrets are masked."""
    if name in SECRETS:
        return MASK if value else '""'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, ByteSize):
        for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
            if value % factor == 0:
                return f'"{value // factor}{unit}"'
        return str(int(value))
    if isinstance(value, tuple):
        return "[" + ", ".join(shown(name, item) for item in value) + "]"
    if isinstance(value, SecretStr):
        value = _without_password(value.get_secret_value())
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a basic string of TOML, but for characters that no setting has
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _has_password(text: str) -> bool:
    """Whether a URL has a password in it."""
    return re.search(r"//[^/@]*:[^/]*@|[?&]password=", text) is not None


def _without_password(text: str) -> str:
    """A URL with what stands in it for a password masked."""
    return re.sub(
        r"(//[^/@:]*:)[^/]*@|([?&]password=)[^&]*", lambda it: f"{it[1]}{MASK}@" if it[1] else it[2] + MASK, text
    )
