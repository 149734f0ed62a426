"""What the READMEs name exists: links, settings, tests, files, targets. The front page is short, the map is true."""

from __future__ import annotations

import re
import tomllib
from functools import cache

import pytest
from markdown_pages import BLOCKS, PAGES, ROOT, anchors, links, recipes, spans

from aisse.settings import Settings


def test_front_page_is_read_in_a_minute() -> None:
    assert len(PAGES["README.md"].splitlines()) < 200


def test_every_page_is_found_from_the_front_page_the_map_or_the_guide() -> None:
    reached = {"README.md"}
    for page in ("README.md", "aisse/README.md", ".github/CONTRIBUTING.md"):
        for target in links(page):
            path = ((ROOT / page).parent / target.partition("#")[0]).resolve()
            path = path / "README.md" if path.is_dir() else path
            reached.add(str(path.relative_to(ROOT)))
    assert set(PAGES) - reached == set()


def test_map_draws_the_rooms_as_imports_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [[name.strip().removeprefix("aisse.") for name in layer.split("|")] for layer in contracts[0]["layers"]]
    (drawing,) = [block for block in BLOCKS if block.page == "aisse/README.md" and block.text.startswith("commands/")]
    rows = (re.split(r"\s{2,}", line)[0] for line in drawing.text.splitlines())
    drawn = [re.findall(r"\b([a-z]+)(?:/|\.py)", re.sub(r"\(.*?\)", "", row)) for row in rows]
    assert drawn == [layer for layer in layers if layer != ["__main__"]]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    lost = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_are_named_exist(page: str) -> None:
    named = {span for span in spans(page) if re.fullmatch(r"[a-z_]+_(s|bytes)", span)}
    assert named - set(Settings.model_fields) == set()


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page: str) -> None:
    named = {span for span in spans(page) if re.fullmatch(r"test_\w+", span)}
    assert named - _tests() == set()


@cache
def _tests() -> set[str]:
    files = (path for path in (ROOT / "tests").rglob("test_*.py") if "node_modules" not in path.parts)
    return {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())}


_FILE = re.compile(r"[\w.@-]+(/[\w.@-]+)*(/|\.(py|mjs|js|ts|md|toml|html|css|conf))")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """Counted from the top, the page's folder or aisse/. A file of another program is written with its whole path."""
    folders = [ROOT, (ROOT / page).parent, ROOT / "aisse"]
    named = {span for span in spans(page) if _FILE.fullmatch(span)} - {"dist/"}  # made by `make dist`
    assert {name for name in named if not any((folder / name).exists() for folder in folders)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_that_are_named_exist(page: str) -> None:
    named = {found[1] for span in spans(page) if (found := re.match(r"make ([a-z-]+)", span))}
    assert named - set(recipes()) == set()
