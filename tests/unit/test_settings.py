"""How the tests themselves are run."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pace import crowding, in_time


def test_random_test_whose_examples_are_slow_to_make_and_to_run_passes() -> None:
    """No test depends on the machine's speed: a busy one is no failure."""
    ran: list[int] = []

    def slow(number: int) -> int:
        time.sleep(0.25)
        return number

    @settings(max_examples=8, database=None)
    @given(st.integers().map(slow))
    def check(number: int) -> None:
        time.sleep(0.25)  # longer than what Hypothesis allows by itself
        ran.append(number)

    check()
    assert ran


def test_promise_about_time_is_held_to_the_pace_of_the_machine() -> None:
    """And is broken by what takes for ever on any."""
    assert crowding() >= 1.0
    assert in_time(0.9, 1.0)
    assert not in_time(1e6, 1.0)
