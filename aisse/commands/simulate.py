"""`aisse simulate`: the built-in upstream alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

import aisse
from aisse.commands import loop
from aisse.commands.flags import add_fields
from aisse.commands.output import show
from aisse.commands.sources import flag
from aisse.errors import ConfigError
from aisse.simulator import Script, Simulator
from aisse.simulator.script import first_error

if TYPE_CHECKING:
    from pathlib import Path

    from aisse.commands.flags import NewParser
    from aisse.commands.sources import Loaded


def add(new_parser: NewParser, _loaded: Loaded | None) -> None:
    """Adds the command."""
    parser = new_parser(
        "simulate",
        help="run the built-in upstream alone",
        description="Runs an Anthropic-format API that needs no key and answers from a script, faults included. "
        "`[[name=value ...]]` in a prompt overrides a flag for its own answer; GET /stats counts.",
    )
    parser.set_defaults(command=_run)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=0, help="TCP port (default: a free one)")
    add_fields(parser, Script)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:  # uvloop would take it modulo 65536
        raise argparse.ArgumentTypeError("must be 0 to 65535")
    return int(text)


def _run(given: dict[str, Any], _file: Path | None) -> None:
    host, port = given.pop("host"), given.pop("port")
    try:
        script = Script.model_validate(given)
    except ValidationError as error:
        name, _, message = first_error(error).partition(": ")
        raise ConfigError(f"{flag(name)}: {message}") from None
    loop.run(_simulate(script, host, port))


async def _simulate(script: Script, host: str, port: int) -> None:
    stop = loop.stop_on_signals()
    simulator = Simulator(script, host=host, port=port)
    try:
        try:
            url = await simulator.start()
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or "that is no host name"
            raise ConfigError(f"--host, --port: cannot listen on {host}:{port}: {why}") from None
        show(f"aisse {aisse.__version__} simulator on {url}")
        await stop.wait()
    finally:
        await simulator.close()
