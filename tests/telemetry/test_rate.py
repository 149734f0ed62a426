"""Rates of counts."""

from __future__ import annotations

from aisse.telemetry.rate import Rate


def test_rate_before_the_second_sample_is_nothing() -> None:
    rate = Rate(10)
    assert rate.per_s == 0
    rate.sample(100.0, 7)
    assert rate.per_s == 0


def test_rate_is_that_of_the_last_seconds_alone() -> None:
    rate = Rate(3)
    for second, count in enumerate((0, 1000, 1000, 1003, 1006, 1009)):
        rate.sample(float(second), count)
    assert rate.per_s == 3


def test_rate_counts_the_time_that_has_passed_between_samples() -> None:
    rate = Rate(3)
    rate.sample(0.0, 0)
    rate.sample(2.5, 10)
    assert rate.per_s == 4
