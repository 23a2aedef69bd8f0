"""How the tests themselves are run."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pace import crowding, in_time, unhurried


def test_slow_random_test_passes() -> None:
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


def test_promised_times_follow_the_machine() -> None:
    """And is broken by what takes for ever on any."""
    assert crowding() >= 1.0
    assert in_time(0.9, 1.0)
    assert not in_time(1e6, 1.0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("late_by", "least", "tried"),
    [
        pytest.param(0.0, 2.0, [8.0], id="a machine of its own"),
        pytest.param(4.0, 2.0, [8.0], id="no failure"),
        pytest.param(4.0, 10.0, [8.0, 32.0], id="busy"),
        pytest.param(4.0, 100.0, [8.0, 32.0], id="busy for ever"),
        pytest.param(0.0, 10.0, [8.0], id="no excuse"),
    ],
)
async def test_only_a_busy_machine_excuses_failure(
    late_by: float, least: float, tried: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails on a machine that is busy otherwise is tried again with more seconds; with the most it has to pass."""
    given, late = [], 0.0
    monkeypatch.setattr("tests.pace._now", lambda: late)

    @unhurried("seconds", 8.0, 32.0)
    async def test(seconds: float) -> None:
        nonlocal late
        given.append(seconds)
        await asyncio.sleep(0)
        late += late_by
        assert seconds >= least

    if tried[-1] >= least:
        await test()
    else:
        with pytest.raises(AssertionError):
            await test()
    assert given == tried
