"""The script that looks for changes which no test sees: on a small project of its own."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import mutants
import pytest

if TYPE_CHECKING:
    from pathlib import Path

CODE = """def double(number):
    # Of course.
    return 2 * number
"""

TEST = """from code_of_ours import double


def test_double_of_four_is_eight():
    assert double(4) == 8
"""

LIST = """
[[module]]
file = "code_of_ours.py"
tests = ["test_code.py"]

[[module.change]]
old = 'return 2 * number'
new = 'return 3 * number'
why = "it is no double"

[[module.change]]
old = 'return 2 * number'
new = 'return 2 * abs(number)'
why = "debts become riches"

[[module.change]]
old = '# Of course.'
new = '# No doubt.'
equivalent = "a comment"
why = "nothing"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    (root / "code_of_ours.py").write_text(CODE)
    (root / "test_code.py").write_text(TEST)
    (root / "changes.toml").write_text(LIST)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


def test_change_is_noticed_or_survives_and_the_checkout_stays_as_it_is(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutants.main(["--list", str(project / "changes.toml")], root=project) == 1
    said = capsys.readouterr().out
    assert "noticed   test_code.py::test_double_of_four_is_eight" in said
    assert "3 changes: 1 noticed, 1 survive, 1 change nothing" in said
    assert said.rstrip().endswith("debts become riches\n--- return 2 * number\n+++ return 2 * abs(number)")
    assert (project / "code_of_ours.py").read_text() == CODE
    assert mutants.main(["--list", str(project / "changes.toml"), "--text", "is no double"], root=project) == 0


@pytest.mark.parametrize("arguments", [["--check"], []])
def test_entry_that_fits_the_code_no_more_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (project / "code_of_ours.py").write_text(CODE.replace("2 * number", "number + number"))
    assert mutants.main(["--list", str(project / "changes.toml"), *arguments], root=project) == 2
    said = capsys.readouterr().out
    assert "stale: this stands 0 times in code_of_ours.py, not once:\nreturn 2 * number" in said


def test_tests_that_fail_without_any_change_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would notice everything."""
    (project / "test_code.py").write_text(TEST.replace("== 8", "== 9"))
    assert mutants.main(["--list", str(project / "changes.toml")], root=project) == 2
    assert "without any change, pytest test_code.py says" in capsys.readouterr().out
