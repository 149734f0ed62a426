"""Reads the arguments and runs one command."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aisse
from aisse.commands import config, serve, simulate, unit
from aisse.commands.flags import Parser
from aisse.commands.output import EX_CONFIG, note
from aisse.commands.sources import Loaded, load, variable
from aisse.errors import ConfigError
from aisse.settings import SECRETS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from aisse.commands.flags import Command

COMMANDS = (serve, config, unit, simulate)
"""In the order in which --help lists them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: with 0 when it went well, with 78 and one line for a wrong name or value.

    Where standard output cannot be written and the command is there to print, it exits with 74, or with 141 if nobody
    reads standard output any more.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        file = _config_file(arguments)
        known, unknown = _parser(file).parse_known_args(arguments)
        given = vars(known)
        command: Command = given.pop("command")
        given.pop("config", None)
        if unknown:
            raise ConfigError(_unknown(unknown[0]))
        command(given, file)
    except ConfigError as error:
        note(str(error))
        sys.exit(EX_CONFIG)


def _unknown(argument: str) -> str:
    # No more than the flag's name is quoted: what stands after it may be a key.
    flag = argument.partition("=")[0]
    name = flag.removeprefix("--").replace("-", "_")
    if name in SECRETS:
        return f"{flag}: other users of this machine can read flags; set {variable(name)} instead"
    return (
        f"{flag}: there is no such flag; --help lists them" if flag.startswith("-") else "there is an argument too many"
    )


def _config_file(arguments: Sequence[str]) -> Path | None:
    """The file that `--config` names. It is read before everything else: the help texts show what the file says."""
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    found: Path | None = early.parse_known_args(arguments)[0].config
    return found


def _parser(file: Path | None) -> argparse.ArgumentParser:
    parser = Parser(
        prog="aisse",
        description="Relays AI token streams to browsers as Server-Sent Events.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aisse {aisse.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new_parser = functools.partial(commands.add_parser, allow_abbrev=False)
    loaded = _loaded_for_help(file)
    for command in COMMANDS:
        command.add(new_parser, loaded)
    return parser


def _loaded_for_help(file: Path | None) -> Loaded | None:
    try:
        return load({}, os.environ, file)
    except ConfigError:
        return None  # the command itself will say it
