"""The command line: a parser whose errors are one line, and a flag for each field of a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from aisse.commands.output import show
from aisse.commands.sources import flag, shown, variable
from aisse.errors import ConfigError
from aisse.settings import SECRETS, Settings
from aisse.upstream.keys import PROVIDER_KEYS

if TYPE_CHECKING:
    from pydantic import BaseModel

    from aisse.commands.sources import Loaded

Command = Callable[[dict[str, Any], Path | None], None]
"""Runs a command: gets the flags that were given, by the names of their fields, and the file that --config names."""

NewParser = Callable[..., argparse.ArgumentParser]
"""Makes the parser of one more command. It takes what `add_parser` of argparse's sub-parsers takes."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all commands do, instead of in a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        # argparse quotes what was typed after these words. It may be a secret in the wrong place.
        where, unknown, _ = message.removeprefix("argument ").partition("invalid choice")
        raise ConfigError(f"{where}{'there is no such command' if unknown else ''}; --help shows how")

    def _print_message(self, message: str, _file: object = None) -> None:
        # For help and version. argparse's own method goes on if it cannot write them, and exits with 0.
        show(message.removesuffix("\n"))


def add_settings_command(new_parser: NewParser, name: str, text: str, command: Command, loaded: Loaded | None) -> None:
    """Adds a command that takes the settings. `loaded` is what --help shows; without it, --help shows the defaults."""
    example = variable("heartbeat_s")
    secrets = ", ".join(map(variable, sorted(SECRETS)))
    keys = ", ".join(key for key, _, _ in PROVIDER_KEYS)
    epilog = (
        f"Each setting is also an environment variable ({example}) and a name in the TOML file. "
        f"Secrets are no flags: {secrets}, "
        f"{keys} (by environment, each sent to its own host alone), or the systemd credential upstream_key."
    )
    parser = new_parser(name, help=text, description=text, epilog=epilog)
    parser.set_defaults(command=command)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    add_fields(parser, Settings, loaded)


def add_fields(parser: argparse.ArgumentParser, model: type[BaseModel], loaded: Loaded | None = None) -> None:
    """Adds a flag for each field. Values stay strings: the model checks them, whichever source they come from."""
    for name, field in model.model_fields.items():
        if name in SECRETS:
            continue
        if loaded is not None:
            now = f"{shown(name, getattr(loaded.settings, name))}, {loaded.origins[name]}"
        else:
            now = f"default: {'none' if field.default is None else shown(name, field.default)}"
        options: dict[str, Any]
        if field.annotation is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            unit = "SECONDS" if name.endswith("_s") else "BYTES" if name.endswith("_bytes") else name.upper()
            options = {"metavar": unit}
        help_text = f"{field.description} ({now})".replace("%", "%%")
        parser.add_argument(flag(name), default=argparse.SUPPRESS, help=help_text, **options)
