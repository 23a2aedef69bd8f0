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


def test_same_introduction_is_parsed_once() -> None:
    kept = Introductions()
    first = kept.parse(said("ada"))
    assert first.client_info.name == "ada"
    assert kept.recent[said("ada")] is first
    kept.age()
    assert kept.parse(said("ada")) is first


def test_unused_introduction_is_forgotten() -> None:
    """After two periods in which no session used it: nothing of a session that expired stays."""
    kept = Introductions()
    kept.parse(said("ada"))
    kept.age()
    kept.parse(said("bob"))
    kept.age()
    assert len(kept) == 1
    kept.age()
    assert not len(kept)


@pytest.mark.parametrize("kept", [Introductions(), Introductions(longest=1024, most=64)], ids=["by default", "so much"])
def test_introductions_of_many_clients_are_bounded(kept: Introductions) -> None:
    """However many clients come, and however much they say."""
    for number in range(500):
        assert kept.parse(said(f"{number}", 700 if number % 2 else 60_000)).client_info.name == f"{number}"
    assert 0 < len(kept) <= 128
    assert max(map(len, kept.recent)) <= 1024


def test_what_is_no_introduction_is_refused() -> None:
    with pytest.raises(ValidationError):
        Introductions().parse(b"{}")


def test_introductions_fill_the_room_they_have() -> None:
    kept = Introductions(longest=len(said("a")), most=2)
    for name in ("a", "bb"):
        kept.parse(said(name))
    assert list(kept.recent) == [said("a")]
    for name in ("b", "c", "d", "e"):
        kept.parse(said(name))
    assert len(kept.recent) == 1
    assert len(kept) == 3
