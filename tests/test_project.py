"""What several files of the project say, and have to say alike."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pythons_that_are_supported_are_those_that_the_tests_run_on() -> None:
    said = [name.rpartition(" :: ")[2] for name in PYPROJECT["project"]["classifiers"] if "Python :: 3." in name]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (run_on,) = re.findall(r"^ +python: \[(.*)\]$", workflow, re.MULTILINE)
    assert re.findall(r'"(.*?)"', run_on) == said
    assert PYPROJECT["project"]["requires-python"] == f">={said[0]}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{said[0].replace('.', '')}"


def test_every_tool_of_the_check_runs_before_a_commit() -> None:
    (recipe,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    tools = re.findall(r"\$\(BIN\)/(ruff \w+|[\w-]+)", recipe)
    hooks = re.findall(r"entry: \.venv/bin/(ruff \w+|[\w-]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == tools
