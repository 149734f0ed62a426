"""`aisse config`: every setting, its value and where it came from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from aisse.commands import flags
from aisse.commands.output import show
from aisse.commands.sources import MASK, load, shown
from aisse.settings import Settings
from aisse.upstream.keys import key_for

if TYPE_CHECKING:
    from pathlib import Path

    from aisse.commands.sources import Loaded


def add(new_parser: flags.NewParser, loaded: Loaded | None) -> None:
    """Adds the command."""
    text = "show every setting, its value and where it came from"
    flags.add_settings_command(new_parser, "config", text, _run, loaded)


def _run(given: dict[str, Any], file: Path | None) -> None:
    loaded = load(given, os.environ, file)
    rows = [(name, shown(name, getattr(loaded.settings, name)), loaded.origins[name]) for name in Settings.model_fields]
    # A mask is no value. In a comment nobody takes it for one when the output is kept as a file.
    rows = [(f"# {name}" if MASK in value else name, value, origin) for name, value, origin in rows]
    if loaded.settings.upstream not in {"simulator", "local"}:
        found = key_for(loaded.settings.upstream, loaded.settings, os.environ)
        rows.append(("# key for upstream", MASK if found else "none", found[1] if found else ""))
    name_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    show(
        "\n".join(
            f"{name:<{name_width}} = {value:<{value_width}}  # {origin}".rstrip(" #") for name, value, origin in rows
        )
    )
