"""What clients say of themselves is parsed once for many of them, and little of it is kept (P10)."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from nonstick.core.introductions import Introductions


def said(name: str, size: int = 0) -> bytes:
    """What a client says of itself, with so many bytes beside its name."""
    experimental = {"x": {"x": "x" * size}} if size else {}
    return json.dumps(
        {
            "protocolVersion": "2025-11-25",
            "capabilities": {"experimental": experimental},
            "clientInfo": {"name": name, "version": "1"},
        }
    ).encode()


def test_who_says_the_same_is_parsed_once() -> None:
    kept = Introductions()
    first = kept.parse(said("ada"))
    assert first.client_info.name == "ada"
    assert kept.recent[said("ada")] is first
    kept.age()
    assert kept.parse(said("ada")) is first


def test_what_no_session_used_for_two_periods_is_forgotten() -> None:
    """Nothing of a session that expired stays."""
    kept = Introductions()
    kept.parse(said("ada"))
    kept.age()
    kept.parse(said("bob"))
    kept.age()
    assert len(kept) == 1
    kept.age()
    assert not len(kept)


@pytest.mark.parametrize("kept", [Introductions(), Introductions(longest=1024, most=64)], ids=["by default", "so much"])
def test_however_many_clients_come_and_however_much_they_say_little_is_kept(kept: Introductions) -> None:
    for number in range(500):
        assert kept.parse(said(f"{number}", 700 if number % 2 else 60_000)).client_info.name == f"{number}"
    assert 0 < len(kept) <= 128
    assert max(map(len, kept.recent)) <= 1024


def test_what_is_no_introduction_is_refused() -> None:
    with pytest.raises(ValidationError):
        Introductions().parse(b"{}")


def test_as_much_is_kept_as_there_is_room_for() -> None:
    kept = Introductions(longest=len(said("a")), most=2)
    for name in ("a", "bb"):
        kept.parse(said(name))
    assert list(kept.recent) == [said("a")]
    for name in ("b", "c", "d", "e"):
        kept.parse(said(name))
    assert len(kept.recent) == 1
    assert len(kept) == 3
