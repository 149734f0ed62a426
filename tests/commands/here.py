"""Runs commands in this process."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

import structlog

from aisse.commands import cli
from aisse.commands.output import EX_CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    Run = Callable[..., "Outcome"]

SECRET = "canary-secret-0123456789"
KEYS = ("EZAI_API_KEY", "ANTHROPIC_API_KEY", "CREDENTIALS_DIRECTORY")


class Outcome:
    """What one command said and how it ended."""

    def __init__(self, code: str | int | None, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def refusal(self) -> str:
        """The one line of a refused start."""
        assert self.code == EX_CONFIG, (self.code, self.out, self.err)
        assert self.out == ""
        assert self.err.count("\n") == 1
        assert self.err.startswith("aisse: ")
        return self.err.removeprefix("aisse: ").rstrip("\n")


@contextlib.contextmanager
def running_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Gives what runs a command, with no settings in its environment but those given."""
    for name in list(os.environ):
        if name.startswith("AISSE_") or name in KEYS:
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "1000")  # no line of help is broken

    def run(*arguments: str, **environ: str) -> Outcome:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        code: str | int | None = 0
        try:
            cli.main(arguments)
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert SECRET not in captured.out + captured.err
        return Outcome(code, captured.out, captured.err)

    # A command sets logging up for its process, which here is everybody's.
    root, configured = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    try:
        yield run
    finally:
        structlog.configure(**configured)
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
