"""A plugin for pytest in a copy: notes the first test that fails, and ends the process also where its end hangs.

What a change has broken may keep an event loop from closing, long after it was noticed.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

_END_S = 5.0


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each phase of each test."""
    note = Path(os.environ["FIRST_FAILURE"])
    if report.failed and not note.exists():
        note.write_text(report.nodeid, encoding="utf-8")
        timer = threading.Timer(_END_S, os._exit, (1,))
        timer.daemon = True
        timer.start()
