"""Attributes that are made when they are first needed."""

from __future__ import annotations

import pytest

from nonstick.core.lazy import lazy


class Thing:
    def __init__(self) -> None:
        self.made = 0

    @lazy
    def part(self) -> list[int]:
        """A part."""
        self.made += 1
        return [self.made]


def test_value_is_made_once_when_needed() -> None:
    thing, other = Thing(), Thing()
    assert thing.made == 0
    assert "part" not in vars(thing)
    assert thing.part is thing.part is vars(thing)["part"]
    assert (thing.part, other.part) == ([1], [1])
    assert thing.part is not other.part


def test_dropped_value_is_made_anew() -> None:
    thing = Thing()
    first = thing.part
    del thing.part
    assert (first, thing.part) == ([1], [2])
    thing.part = [7]
    assert thing.part == [7]


def test_failure_to_make_keeps_nothing() -> None:
    class Failing:
        @lazy
        def part(self) -> int:
            raise LookupError("not yet")

    failing = Failing()
    for _ in range(2):
        with pytest.raises(LookupError, match="not yet"):
            _ = failing.part
    assert not vars(failing)


def test_class_shows_what_it_documents() -> None:
    assert Thing.part.__doc__ == "A part."
