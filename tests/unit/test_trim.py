"""What a node remembers of logs that it looked through (P10)."""

from __future__ import annotations

import asyncio

import pytest

from nonstick.core.retention import Amount
from nonstick.log.trim import Look, Looks
from nonstick.testing import ManualClock

pytestmark = pytest.mark.anyio


def test_look_is_remembered_for_some_minutes() -> None:
    clock = ManualClock()
    looks = Looks(clock)
    looks.put("k", Amount(10, 1), {})
    assert looks.get("k") is not None
    assert looks.get("k", 0.0) is None
    assert looks.get("other") is None
    clock._now += 299
    assert looks.get("k") is not None
    clock._now += 1
    assert looks.get("k") is None
    looks.put("other", Amount(), {})
    assert list(looks.kept) == ["other"]


def test_remembered_looks_are_bounded() -> None:
    """Of however many logs over their bounds the latest looks are kept."""
    looks = Looks(ManualClock())
    for number in range(1000):
        looks.put(f"{number}", Amount(10, 1), {1: Amount(5, 1)})
    assert list(looks.kept) == [f"{number}" for number in range(1000 - 256, 1000)]
    looks.put("900", Amount(20, 1), {})
    assert len(looks.kept) == 256
    assert list(looks.kept)[-1] == "900"


def test_gain_counts_new_and_ended() -> None:
    """What came since the last look, and what ended since."""
    look = Look(0.0, Amount(100, 10), {1: Amount(40, 4), 2: Amount(50, 5)})
    assert look.gain(Amount(130, 12)) == Amount(30, 2)
    look.note(Amount(130, 12), None)
    look.note(Amount(131, 13), 1)
    look.note(Amount(132, 14), 1)
    look.note(Amount(133, 15), 99)
    assert look.gain(Amount(133, 15)) == Amount(73, 9)


async def test_stream_ending_mid_look_counts() -> None:
    """Whether the look saw its end or not; and only of the log that it ended in."""
    looks = Looks(ManualClock())
    looking = asyncio.create_task(asyncio.sleep(0))
    looks.begin("k", looking)
    looks.note("k", Amount(100, 10), None)
    for ended in (1, 3):
        looks.note("k", Amount(100, 10), ended)
    looks.note("other", Amount(100, 10), 2)
    looks.put("k", Amount(100, 10), {1: Amount(40, 4), 2: Amount(50, 5)})
    look = looks.kept["k"]
    assert (look.gain(Amount(100, 10)), look.open) == (Amount(40, 4), {2: Amount(50, 5)})
    looks.note("k", Amount(100, 10), 2)
    assert look.gain(Amount(100, 10)) == Amount(90, 9)
    await looking
    await asyncio.sleep(0)
    assert not looks.under_way
    looks.put("k", Amount(100, 10), {2: Amount(50, 5)})
    assert looks.kept["k"].gain(Amount(100, 10)) == Amount(0, 0)


def test_log_trimmed_elsewhere_is_taken_anew() -> None:
    """As it is now, whoever trimmed it."""
    look = Look(0.0, Amount(100, 10))
    look.note(Amount(20, 2), None)
    assert look.gain(Amount(90, 9)) == Amount(70, 7)
