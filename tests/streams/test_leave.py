"""How long a stream goes on that nobody reads. The clock is the test's."""

from __future__ import annotations

import math

import pytest

from aisse.streams.leave import LeaveTime


def read_and_left(leave: LeaveTime, now: float, *, expected: bool = False) -> None:
    """The only reader comes and leaves at once."""
    leave.reader_came(expected=expected)
    assert leave.ends_at is None
    leave.last_reader_left(now)


def test_stream_that_nobody_has_read_yet_does_not_end() -> None:
    assert LeaveTime(0).ends_at is None
    assert not LeaveTime(0).over(1e9)


def test_stream_ends_its_leave_time_after_its_last_reader_has_left() -> None:
    leave = LeaveTime(10)
    read_and_left(leave, 100)
    assert (leave.over(109.9), leave.over(110)) == (False, True)
    read_and_left(leave, 200)
    assert (leave.over(209.9), leave.over(210)) == (False, True)


def test_stream_that_goes_on_without_readers_never_ends() -> None:
    leave = LeaveTime(math.inf, 1)
    read_and_left(leave, 100)
    assert not leave.over(1e9)


@pytest.mark.parametrize(("leave_s", "ends_at"), [(10, 111.5), (0, 100)])
def test_grace_is_for_streams_with_a_leave_time(leave_s: float, ends_at: float) -> None:
    leave = LeaveTime(leave_s, 1.5)
    read_and_left(leave, 100)
    assert leave.ends_at == ends_at


def test_who_was_told_of_a_stream_is_waited_for_until_all_have_come() -> None:
    leave = LeaveTime(0)
    leave.expect_reader(200)
    leave.expect_reader(150)
    read_and_left(leave, 100)  # it knew of the stream by itself
    assert leave.ends_at == 200
    read_and_left(leave, 101, expected=True)
    assert leave.ends_at == 200
    read_and_left(leave, 102, expected=True)
    assert leave.ends_at == 102


def test_readers_that_were_moved_have_their_time_whoever_joins() -> None:
    for expected in (False, True):
        leave = LeaveTime(0)
        leave.readers_moved(200)
        leave.readers_moved(150)
        read_and_left(leave, 100, expected=expected)
        assert leave.ends_at == 200


def test_somebody_who_is_expected_where_nobody_was_told_shortens_nothing() -> None:
    """A second tab may come before the stream's 202 was told."""
    leave = LeaveTime(0)
    leave.reader_came(expected=True)
    leave.expect_reader(200)
    leave.last_reader_left(100)
    assert leave.ends_at == 200
