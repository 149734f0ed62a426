"""How streams end, and how it is said."""

from __future__ import annotations

import pytest

from aisse.streams.endings import WITHOUT_ERROR, Reason, ending, failure, told_by

ID = "fqBYVmVpYWb0mJ4ZXc_-1A"


def test_only_what_went_well_ends_without_error() -> None:
    assert {Reason.COMPLETE, Reason.STOPPED} == WITHOUT_ERROR
    assert {reason for reason in Reason if failure(reason) is None} == WITHOUT_ERROR


@pytest.mark.parametrize("reason", Reason)
def test_what_the_frames_of_an_end_tell_is_what_they_were_made_of(reason: Reason) -> None:
    usage = {"input_tokens": 25, "output_tokens": 80}
    frames, last_seq = ending(ID, 7, reason, failure(reason), usage)
    assert told_by(frames) == (reason, usage)
    assert frames.endswith(b"\nid: %s.%d\n\n" % (ID.encode(), last_seq))
    assert frames.count(b"\n\n") == (1 if reason in WITHOUT_ERROR else 2)
