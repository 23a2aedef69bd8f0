"""After the store lost entries, the log and the client's event id say where the client goes on (P9)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonstick.core.places import MAX_PLACES, Search, pack, unpack
from nonstick.store import STANDALONE, Cursor, Event

ROOM = 110


def tag(name: str) -> bytes:
    return name.encode().ljust(8, b".")


def log(*names: str | None) -> list[Event]:
    """Entries of the standalone stream from position 1 on; those of other streams end in `*`; None was trimmed."""
    return [
        Event(position, tag(name), 99 if name.endswith("*") else STANDALONE, b"")
        for position, name in enumerate(names, 1)
        if name is not None
    ]


def latest(events: list[Event], *places: Cursor, head: int = 0) -> int | None:
    search = Search(places)
    for event in events:
        search.note(event)
    return search.latest(max(head, len(events)))


def place(position: int, name: str) -> Cursor:
    return Cursor(position, tag(name))


def test_client_continues_after_latest_surviving_message() -> None:
    """P9: it has that one and all before, and nothing of what came in place of the others."""
    had = [place(1, "a"), place(2, "b"), place(3, "c")]
    assert latest(log("a", "b", "c", "d"), *had) == 3
    assert latest(log("a", "b"), *had) == 2
    assert latest(log("a", "b", "new"), *had) == 2
    assert latest(log("a", "new", "newer", "newest"), *had) == 1


def test_part_of_tag_is_enough() -> None:
    """P9: an event id has no room for more."""
    assert latest(log("a", "b", "new"), Cursor(1, b"a.."), Cursor(2, b"b.."), Cursor(3, b"c..")) == 2


def test_trimmed_place_is_not_lost() -> None:
    """P10: the standalone stream is trimmed from its beginning, so that nothing before the place is left either."""
    assert latest(log(None, None, "c"), place(2, "b"), head=3) == 2
    assert latest(log(None, None, None), place(2, "b"), head=3) == 2
    assert latest(log(None, None, None), place(3, "c"), head=3) == 3
    # Entries of other streams stay where they are.
    assert latest(log("x*", None, "c"), place(2, "b"), head=3) == 2


def test_replaced_place_is_lost_not_trimmed() -> None:
    """P9: another stream's entry had its position meanwhile, and went with its stream."""
    assert latest(log("a"), place(1, "a"), place(2, "b"), head=1) == 1
    assert latest(log("a", None, "c"), place(1, "a"), place(2, "b"), head=3) == 1
    assert latest(log(None, "x*", None), place(3, "b"), head=2) is None


def test_unknown_loss_sends_only_certain_news() -> None:
    """P9: nothing that a client has is sent again."""
    search = Search([place(5, "e"), place(4, "d")])
    for event in log("a", "v", "w", "x", "y", "z"):
        search.note(event)
    assert search.latest(6) is None
    assert search.new_after(6) == 3
    assert search.new_after(2) == 2


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.data())
def test_client_gets_exactly_what_is_new(kept: int, lost: int, new: int, data: st.DataObject) -> None:
    """P3, P9: whatever was lost, as long as it is fewer messages than an event id names."""
    before = [f"old{n}" for n in range(kept + lost)]
    after = before[:kept] + [f"new{n}" for n in range(new)]
    at = data.draw(st.integers(0, len(before)))
    had = [place(position, name) for position, name in enumerate(before, 1) if position <= at]
    if not had:
        return
    named = unpack(pack(had[:-1], at, ROOM), at)
    found = latest(log(*after), *named, had[-1])
    if at <= kept:
        assert found == at
    elif at - kept <= len(named) and kept:
        assert found == kept
    else:
        assert found is None


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(0, 200))
def test_packed_places_are_latest_and_fit(distances: list[int], room: int) -> None:
    """P9: the text has no more characters than there is room for."""
    positions = [sum(distances[: n + 1]) for n in range(len(distances))]
    places = [Cursor(position, position.to_bytes(8, "little")) for position in positions]
    text = pack(places, positions[-1] + 1, room)
    assert len(text) <= room
    found = unpack(text, positions[-1] + 1)
    assert found == tuple(Cursor(position, tag[:3]) for position, tag in places[len(places) - len(found) :])
    assert len(found) <= MAX_PLACES


def test_maximum_of_named_places_is_used() -> None:
    """P9: so many messages may be lost at once, and still each is known."""
    places = [Cursor(position, bytes(8)) for position in range(1, 40)]
    assert [each.position for each in unpack(pack(places, 40, 1000), 40)] == list(range(24, 40))


def test_distant_place_ends_the_list() -> None:
    """It counts in 16 bits."""
    for far, named in ((0xFFFF, 2), (0x10000, 1)):
        places = [Cursor(1, b"old tag."), Cursor(1 + far, b"new tag.")]
        assert len(unpack(pack(places, 2 + far, ROOM), 2 + far)) == named


def test_only_earlier_places_are_named() -> None:
    places = [place(1, "a"), place(2, "b"), place(3, "c")]
    assert [each.position for each in unpack(pack(places, 2, ROOM), 2)] == [1]


def test_places_before_the_beginning_are_refused() -> None:
    """A client may send anything."""
    text = pack([place(1, "a")], 3, ROOM)
    assert unpack(text, 3) == (Cursor(1, b"a.."),)
    with pytest.raises(ValueError, match="before the beginning"):
        unpack(text, 1)
