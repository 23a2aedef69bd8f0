"""What was broadcast, in memory: what changed after any place that is known, each thing once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.shared.subscriptions import ResourceUpdated, ServerEvent, ToolsListChanged

from nonstick.core.broadcasts import NOWHERE, Broadcasts
from nonstick.store import STANDALONE, Cursor, Event


def entry(position: int) -> Event:
    return Event(position, position.to_bytes(8, "big"), STANDALONE, b"")


def broadcasts(*said: ServerEvent | None, limit: int = 100) -> Broadcasts:
    """What is known after these entries, at positions 1, 2 …; None for one that says nothing."""
    found = Broadcasts(limit)
    for position, what in enumerate(said, 1):
        found.take(entry(position), what)
    return found


def since(found: Broadcasts, position: int) -> list[tuple[int, str | None]] | None:
    cursor = entry(position).cursor if position else Cursor(0)
    news = found.since(cursor)
    return None if news is None else [(each.cursor.position, each.uri) for each in news]


TOOLS = ToolsListChanged()
ONE, TWO = ResourceUpdated("x://1"), ResourceUpdated("x://2")


def test_each_thing_is_said_once() -> None:
    """P11."""
    found = broadcasts(ONE, TOOLS, TWO, None, ONE)
    assert since(found, 0) == [(2, None), (3, "x://2"), (5, "x://1")]
    assert since(found, 3) == [(5, "x://1")]
    assert since(found, 5) == []


def test_notification_is_as_clients_expect() -> None:
    """P11."""
    tools, one = broadcasts(TOOLS, ONE).since(Cursor(0)) or []
    assert tools.body == b'{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}'
    assert one.body == b'{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"x://1"}}'


def test_unknown_place_is_said_so() -> None:
    """P9, P11: forgotten, of another log, or not read up to."""
    found = broadcasts(ONE, TWO, TOOLS, limit=2)
    assert since(found, 0) is None
    assert since(found, 1) is None
    assert since(found, 2) == [(3, None)]
    assert since(found, 4) is None
    assert found.since(NOWHERE) is None
    assert found.since(Cursor(2, b"another!")) is None


def test_trimmed_before_read_is_a_gap() -> None:
    """P11: whoever was before it has missed something."""
    found = broadcasts(ONE, TWO)
    found.take(entry(7), TOOLS)
    assert since(found, 2) is None
    assert since(found, 7) == []
    assert found.resources() == []
    found.take(entry(9), ONE)
    assert since(found, 7) is None
    assert found.resources() == [ONE]


@pytest.mark.parametrize(("after", "expected"), [(0, 3), (2, 3), (3, None), (4, None), (9, None)])
def test_resource_changed_after_place_is_known(after: int, expected: int | None) -> None:
    """P11: for one who subscribed there."""
    found = broadcasts(ONE, TWO, ONE, TOOLS).said_of("x://1", entry(after).cursor if after else Cursor(0))
    assert (found and found.position) == expected


@given(st.lists(st.sampled_from([None, TOOLS, ONE, TWO]), max_size=30), st.integers(1, 10), st.integers(0, 30))
def test_it_says_what_the_log_would(said: list[ServerEvent | None], limit: int, place: int) -> None:
    """P11: for every place that is among the latest."""
    found, place = broadcasts(*said, limit=limit), min(place, len(said))
    if place <= len(said) - limit:
        assert since(found, place) is None
        return
    last = {what: position for position, what in enumerate(said, 1) if what is not None and position > place}
    assert [position for position, _ in since(found, place) or []] == sorted(last.values())


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 10))
def test_known_resources_are_bounded_by_entries(said: list[int], limit: int) -> None:
    """P10: any number of resources may change; what is known is what the latest entries say."""
    what = [ResourceUpdated(f"x://{number}") for number in said]
    expected = dict.fromkeys(reversed(what[-limit:]))
    assert broadcasts(*what, limit=limit).resources() == list(expected)[::-1]
