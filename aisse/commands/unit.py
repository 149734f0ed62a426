"""`aisse unit`: the systemd units with this machine's paths."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aisse
from aisse.commands.output import note, show
from aisse.commands.sources import ENV_PREFIX, load
from aisse.deploy import units

if TYPE_CHECKING:
    from aisse.commands.flags import NewParser
    from aisse.commands.sources import Loaded


def add(new_parser: NewParser, _loaded: Loaded | None) -> None:
    """Adds the command."""
    parser = new_parser(
        "unit",
        help="print the systemd units with this machine's paths",
        description="Prints a systemd unit for the interpreter that runs this command and for the settings of the "
        "TOML file and the environment; without a name all of them, and the commands to install them. "
        "It says on standard error what a service could not read where it is.",
    )
    parser.set_defaults(command=_run)
    parser.add_argument("unit", nargs="?", metavar="UNIT", help=f"one of {', '.join(units.UNITS)}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings, which the service reads")


def _run(given: dict[str, Any], file: Path | None) -> None:
    settings = load({}, os.environ, file).settings
    python = Path(sys.executable)
    name: str | None = given["unit"]
    text = units.unit(name, settings, python, file) if name else units.all_units(settings, python, file)
    show(text.rstrip("\n"))
    if name is not None and name.endswith(".socket"):
        return  # it starts nothing by itself
    needed = [Path(sys.prefix), Path(sys.base_prefix), Path(aisse.__file__).parent]
    hidden = units.hidden(needed if file is None else [*needed, file])
    for line in hidden:
        note(line)
    if hidden:
        note(
            "install where services can read, with a Python that lies in no home either: "
            "/usr/bin/python3 -m venv /opt/aisse, /opt/aisse/bin/pip install ..., and run this command from there"
        )
    variables = sorted(name for name in os.environ if name.startswith(ENV_PREFIX))
    if variables:
        note(f"services do not get this environment; put into /etc/aisse/aisse.env: {', '.join(variables)}")
