"""The formats by their names: one line for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aisse.formats.anthropic import Anthropic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aisse.formats.format import Format
    from aisse.settings import Settings

FORMATS: Mapping[str, Callable[[Settings], Format]] = {
    "anthropic": Anthropic,
}
