"""How the tests themselves are run."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st


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
