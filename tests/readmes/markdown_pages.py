"""The Markdown files of this tree, and what is in them."""

from __future__ import annotations

import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_PRUNED = {"node_modules", "__pycache__", "vendor"}
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def _found() -> list[Path]:
    pages = [ROOT / "README.md", *(ROOT / ".github").glob("*.md")]
    for folder in ("aisse", "nginx", "tests"):
        for path, folders, files in os.walk(ROOT / folder):
            folders[:] = [name for name in folders if name not in _PRUNED]
            pages += [Path(path) / name for name in files if name.endswith(".md")]
    return sorted(pages)


PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in _found()}
"""Each page's text by its path. Not the changelog, which tells of what was."""

PROSE = {page: _FENCE.sub("", text) for page, text in PAGES.items()}
"""The same without fenced blocks."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its language (empty for plain text) and what is in it."""

    page: str
    language: str
    text: str


BLOCKS = [
    Block(page, found[2], textwrap.dedent(found[3])) for page, text in PAGES.items() for found in _FENCE.finditer(text)
]


def spans(page: str) -> list[str]:
    """What stands in code type within a page's text."""
    return re.findall(r"`([^`\n]+)`", PROSE[page])


def links(page: str) -> list[str]:
    """Where a page's links lead, as they are written; those to other sites are left out."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]) if not target.startswith("https://")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def recipes() -> dict[str, str]:
    """What each target of the Makefile runs."""
    text = (ROOT / "Makefile").read_text()
    return dict(re.findall(r"^([a-z-]+):(?!=).*\n((?:\t.*\n?)*)", text, re.MULTILINE))
