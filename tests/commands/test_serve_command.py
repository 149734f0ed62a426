"""`aisse serve`, as far as it goes without a process of its own; tests/e2e has the rest."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest
import structlog
from here import SECRET, running_here

from aisse.commands import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from here import Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with running_here(monkeypatch, capsys) as run:
        yield run


@pytest.mark.parametrize("key", [f"{SECRET} {SECRET}", f"{SECRET}\u00e9", f"{SECRET}\r\nX: y"])
def test_key_that_cannot_be_a_header_is_refused_and_not_repeated(run: Run, key: str) -> None:
    assert run("serve", "--port", "0", EZAI_API_KEY=key).refusal.startswith("EZAI_API_KEY: ")


@pytest.mark.parametrize("upstream", ["https://api.ezaiapi.com", "https://eu.ezaiapi.com/v2"])
def test_serve_without_the_key_of_its_upstream_is_refused(run: Run, upstream: str) -> None:
    refusal = run("serve", "--port", "0", "--upstream", upstream, ANTHROPIC_API_KEY=SECRET).refusal
    assert "EZAI_API_KEY" in refusal
    assert "simulator" in refusal


@pytest.mark.parametrize(
    ("limits", "raised_to", "warned"),
    [
        ((256, 100_000), (100_000, 100_000), False),
        ((100_000, 100_000), None, False),
        ((256, 10_063), (10_063, 10_063), True),
        ((256, 10_064), (10_064, 10_064), False),
        ((1024, 1024), None, True),
        ((256, resource.RLIM_INFINITY), (resource.RLIM_INFINITY, resource.RLIM_INFINITY), False),
    ],
)
def test_descriptor_limit_is_raised_and_a_low_one_is_said(
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[int, int],
    raised_to: tuple[int, int] | None,
    warned: bool,
) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _which, given: set_to.append(given))
    with structlog.testing.capture_logs() as lines:
        serve.raise_descriptor_limit(5000)
    assert set_to == ([raised_to] if raised_to else [])
    assert [(line["log_level"], line["open_files"], line["needed"]) for line in lines] == (
        [("warning", limits[1], 10_064)] if warned else []
    )
    assert all("max_streams" in line["event"] for line in lines)
