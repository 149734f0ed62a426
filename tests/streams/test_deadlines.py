"""How long an upstream may take. The clock is the test's; real upstreams are tests/streams/test_relay.py's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from aisse.replay.memory import MemoryLog, ReplayMemory
from aisse.settings import Settings
from aisse.streams.deadlines import Deadlines
from aisse.streams.leave import LeaveTime
from aisse.streams.stream import StandIn, Stream

ID = "s" * 22
CREATED = 1000.0


class Case:
    """A stream that is not held back, unless its reader takes nothing."""

    def __init__(self) -> None:
        self.stream = Stream(
            ID,
            MemoryLog(ReplayMemory(1 << 30)),
            now=CREATED,
            read_ahead_bytes=1,
            stream_bytes=1 << 30,
            leave=LeaveTime(10),
            on_left=lambda _: None,
            on_end=lambda _: None,
        )
        self.body = SimpleNamespace(size=0)
        self.deadlines = Deadlines(self.stream, Settings(first_byte_s=30, silence_s=10, no_content_s=20, stream_s=100))

    def late(self, seconds: float, *, body: bool = True) -> str | None:
        error = self.deadlines.passed(CREATED + seconds, cast("Any", self.body) if body else None)
        return error.cause if error is not None else None


@pytest.mark.parametrize("body", [False, True])
def test_answer_that_has_not_begun_has_the_time_to_its_first_byte_alone(body: bool) -> None:
    case = Case()
    assert case.late(29.9, body=body) is None
    assert case.late(30, body=body) == "no answer within first_byte_s"


def test_byte_that_comes_ends_the_silence_and_content_alone_the_pings() -> None:
    case = Case()
    case.body.size = 1
    case.stream.content_events = 1
    assert case.late(1) is None
    assert (case.late(10.9), case.late(11)) == (None, "silent for silence_s")
    case.body.size = 2
    assert case.late(11) is None
    assert case.late(20.9) is None
    case.body.size = 3
    assert case.late(20.9) is None
    assert case.late(21) == "pings only for no_content_s"
    case.stream.content_events = 2
    assert case.late(21) is None


def test_time_in_which_readers_hold_the_upstream_back_counts_for_the_whole_answer_alone() -> None:
    case = Case()
    case.body.size = case.stream.content_events = 1
    case.stream.attach(StandIn())
    case.stream.publish(b"id: x\n\n", 1)
    assert [case.late(seconds) for seconds in (1, 50, 99.9)] == [None] * 3
    assert case.late(100) == "took longer than stream_s"
