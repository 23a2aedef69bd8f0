"""From the log alone every connection to the standalone stream knows whose turn it is and where to go on."""

from __future__ import annotations

from typing import Any

import pydantic_core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonstick.core.events import Kind, draft
from nonstick.core.turns import Turns
from nonstick.store import STANDALONE, Cursor, Event
from tests.unit.steps import steps

Entry = tuple[Kind, dict[str, Any]]


def listens(name: str, since: int, **more: Any) -> Entry:
    """A turn of this name begins; its client has the stream up to `since`."""
    return Kind.LISTENING, {"listener": name, "node": f"node of {name}", "since": since, **more}


def leaves(name: str, read: int | None, **more: Any) -> Entry:
    """That turn is over; its client has the stream up to `read`."""
    return Kind.LEFT, {"listener": name, "read": read, **more}


def answers(name: str) -> Entry:
    return Kind.CARRYING, {"listener": name}


def asks(name: str | None) -> Entry:
    return Kind.ASKING, {"listener": name, "node": f"node of {name}"}


def take(turns: Turns, position: int, entry: Entry, stream: int = STANDALONE) -> None:
    kind, body = entry
    event = draft(kind, pydantic_core.to_json(body))
    turns.note(Event(position, event.tag, stream, event.data))


def noted(*entries: Entry) -> Turns:
    """The turns after these entries, at positions 1, 2 …"""
    turns = Turns()
    for position, entry in enumerate(entries, 1):
        take(turns, position, entry)
    return turns


def open_before(turns: Turns, position: int) -> str | None:
    turn = turns.open_before(position)
    return None if turn is None else turn.name


# ---- a turn's life, event by event

LIVES = {
    "never seen": [],
    "open": [listens("one", 4)],
    "open, and answered": [listens("one", 4), answers("one")],
    "left": [listens("one", 1), leaves("one", 2)],
    "left without carrying": [listens("one", 4), leaves("one", None)],
}
EVENTS = {
    "listens": listens("one", 6),
    "answers": answers("one"),
    "leaves": leaves("one", 7),
    "leaves without carrying": leaves("one", None),
    "another leaves": leaves("other", 7),
    "another asks": asks("one"),
    "a message": (Kind.MESSAGE, {"listener": "one"}),
}
# Whether it is open, up to where its client has the stream, and its last sign of life; None if nothing is known of it.
AFTER: dict[tuple[str, str], tuple[bool, int | None, int] | None] = {
    ("never seen", "listens"): (True, None, 9),
    ("never seen", "answers"): None,
    ("never seen", "leaves"): (False, 7, 0),
    ("never seen", "leaves without carrying"): (False, None, 0),
    ("never seen", "another leaves"): None,
    ("never seen", "another asks"): None,
    ("never seen", "a message"): None,
    ("open", "listens"): (True, None, 9),
    ("open", "answers"): (True, None, 9),
    ("open", "leaves"): (False, 7, 1),
    ("open", "leaves without carrying"): (False, None, 1),
    ("open", "another leaves"): (True, None, 1),
    ("open", "another asks"): (True, None, 1),
    ("open", "a message"): (True, None, 1),
    ("open, and answered", "listens"): (True, None, 9),
    ("open, and answered", "answers"): (True, None, 9),
    ("open, and answered", "leaves"): (False, 7, 2),
    ("open, and answered", "leaves without carrying"): (False, None, 2),
    ("open, and answered", "another leaves"): (True, None, 2),
    ("open, and answered", "another asks"): (True, None, 2),
    ("open, and answered", "a message"): (True, None, 2),
    ("left", "listens"): (True, None, 9),
    ("left", "answers"): (False, 2, 9),
    ("left", "leaves"): (False, 7, 1),
    ("left", "leaves without carrying"): (False, None, 1),
    ("left", "another leaves"): (False, 2, 1),
    ("left", "another asks"): (False, 2, 1),
    ("left", "a message"): (False, 2, 1),
    ("left without carrying", "listens"): (True, None, 9),
    ("left without carrying", "answers"): (False, None, 9),
    ("left without carrying", "leaves"): (False, 7, 1),
    ("left without carrying", "leaves without carrying"): (False, None, 1),
    ("left without carrying", "another leaves"): (False, None, 1),
    ("left without carrying", "another asks"): (False, None, 1),
    ("left without carrying", "a message"): (False, None, 1),
}


def test_every_life_and_event_is_listed() -> None:
    assert AFTER.keys() == {(life, event) for life in LIVES for event in EVENTS}


@pytest.mark.parametrize(("life", "event"), list(AFTER))
def test_each_event_changes_a_turn(life: str, event: str) -> None:
    """P3: whatever it was up to; the event stands at position 9 of the log."""
    turns = noted(*LIVES[life])
    take(turns, 9, EVENTS[event])
    found = [turn for turn in turns._turns if turn.name == "one"]
    turn = found[-1] if found else None
    assert (turn and (not turn.left, turn.delivered_to, turn.last_seen)) == AFTER[life, event]


# ---- where the next one begins


def test_the_first_begins_at_the_beginning() -> None:
    """P3: nothing sent before it opened is lost."""
    turns = noted(listens("one", 0))
    assert open_before(turns, 1) is None
    assert turns.delivered_before(1) == 0


def test_next_turn_waits_for_last() -> None:
    """P3: and begins where that got to, so that two never carry the same message."""
    assert open_before(noted(listens("one", 0), listens("two", 0)), 2) == "one"
    turns = noted(listens("one", 0), listens("two", 0), leaves("one", 2))
    assert open_before(turns, 2) is None
    assert turns.delivered_before(2) == 2


def test_empty_turn_passes_its_wait_on() -> None:
    """P3."""
    turns = noted(listens("one", 0), listens("two", 0), leaves("two", None), listens("three", 0))
    assert open_before(turns, 4) == "one"
    turns = noted(listens("one", 0), listens("two", 0), leaves("two", None), leaves("one", 3), listens("three", 0))
    assert open_before(turns, 5) is None
    assert turns.delivered_before(5) == 3


def test_oldest_of_several_is_awaited() -> None:
    """P3: the others wait for it too, so that it would be wrong to give up one of them first."""
    turns = noted(listens("one", 4), listens("two", 4), listens("three", 4))
    turn = turns.open_before(3)
    assert turn is not None
    assert turn.name == "one"
    turn.give_up()
    assert open_before(turns, 3) == "two"


def test_place_beyond_the_log_is_disbelieved() -> None:
    """P9: it is from before the store lost entries; rather again than never."""
    turns = noted(listens("one", 0), leaves("one", 90), listens("two", 0))
    assert turns.delivered_before(3) == 0


def test_older_asking_changes_no_turn() -> None:
    """P12: it asks, names the turn that it would begin, and says that it left before anybody knew it."""
    turns = noted(listens("one", 0), asks("refused"), answers("one"), leaves("refused", None))
    assert open_before(turns, 5) == "one"
    assert (turns.delivered_before(2), turns.delivered_before(5)) == (0, 0)
    turns = noted(listens("one", 0), leaves("one", 1), asks("refused"), leaves("refused", None), listens("two", 1))
    assert open_before(turns, 5) is None
    assert turns.delivered_before(5) == 1


def test_newer_turns_leave_older_one_alone() -> None:
    """P3: also when they are over before it could begin."""
    turns = noted(listens("one", 0), listens("two", 0), listens("three", 9), leaves("three", 12))
    assert open_before(turns, 2) == "one"


def test_abandoned_turn_counts_from_its_beginning() -> None:
    """P3: its node died, so nobody knows how far it got; rather again than never."""
    turns = noted(listens("one", 4), listens("two", 4))
    turn = turns.open_before(2)
    assert turn is not None
    turn.give_up()
    assert open_before(turns, 2) is None
    assert turns.delivered_before(2) == 4


def test_unended_older_turn_is_passed_over() -> None:
    """P3: an older turn that never left holds up nobody after one that left."""
    turns = noted(listens("old", 0), listens("one", 0), leaves("one", 2), listens("two", 2))
    assert open_before(turns, 4) is None
    assert turns.delivered_before(4) == 2


def test_next_begins_where_open_turn_began() -> None:
    """P3: not where an older one got to; nobody knows yet how far it will get."""
    turns = noted(listens("one", 0), leaves("one", 1), listens("two", 7), listens("three", 0))
    assert open_before(turns, 4) == "two"
    assert turns.delivered_before(4) == 7


@pytest.mark.parametrize(("same", "delivered"), [(True, 2), (False, 0)])
def test_reading_counts_only_of_own_entries(same: bool, delivered: int) -> None:
    """P9: it left before its node knew that the store had lost the entry, whose position was given out again."""
    turns = noted(listens("one", 0))
    turns.trail.append(Cursor(2, b"the tag."))
    take(turns, 4, leaves("one", 2, tag=(b"the tag." if same else b"another.").hex()))
    assert turns.delivered_before(5) == delivered


def test_lost_place_leads_everybody_alike() -> None:
    """P9: on every node, whoever comes with it later."""
    turns = Turns()
    assert turns.found_again(None) is None
    assert turns.found_again("9.00") is None
    for position, since in ((5, 4), (8, 7)):
        take(turns, position, listens(f"{position}", since, lost="9.00"))
    assert turns.found_again("9.00") == 4


def test_lost_places_are_bounded() -> None:
    """P10: the latest ones."""
    turns = noted(*(listens(f"{n}", n, lost=f"{n:x}.00") for n in range(200)))
    assert turns.found_again("0.00") is None
    assert turns.found_again("c7.00") == 199
    assert len(turns._found) <= 64


def test_trimmed_turn_still_counts() -> None:
    """P10: it still tells how far it got."""
    turns = noted(leaves("gone", 1), listens("two", 0))
    assert open_before(turns, 2) is None
    assert turns.delivered_before(2) == 1
    turns = noted(listens("two", 0), leaves("gone", 2), listens("three", 0))
    assert open_before(turns, 1) is None
    assert turns.delivered_before(1) == 2
    assert open_before(turns, 3) == "two"


# ---- what may be forgotten


def test_what_is_forgotten_does_not_matter() -> None:
    """P10: a connection that stays for long keeps no list of all that came and went."""
    turns = noted(
        *(entry for n in range(100) for entry in (listens(f"{n}", n), leaves(f"{n}", n + 1))), listens("l", 9)
    )
    before = turns.delivered_before(201), open_before(turns, 201), turns.latest
    turns.forget()
    assert (turns.delivered_before(201), open_before(turns, 201), turns.latest) == before
    assert len(turns._turns) == 2


ENTRIES = st.lists(
    st.one_of(
        st.builds(listens, st.sampled_from("abcde"), st.integers(0, 5), heard=st.sampled_from([None, "1.", "2."])),
        st.builds(leaves, st.sampled_from("abcde"), st.none() | st.integers(0, 9), heard=st.sampled_from([None, "3."])),
        st.builds(answers, st.sampled_from("abcde")),
        st.builds(asks, st.none() | st.sampled_from("abcde")),
    ),
    max_size=20,
)


@given(ENTRIES, ENTRIES, st.sets(st.integers(1, 20)))
def test_one_that_forgets_knows_as_much(past: list[Entry], future: list[Entry], forgets: set[int]) -> None:
    """P3: of any log, a connection whose turn begins behind it all learns the same, whenever it forgot."""
    whole, short = Turns(), Turns()
    said: set[tuple[Kind, str]] = set()
    all_say_what_was_heard = True
    for position, (kind, body) in enumerate([*past, *future], 1):
        # A name is of one turn alone, which begins once and then leaves once.
        begins_late = kind is Kind.LISTENING and (Kind.LEFT, body["listener"]) in said
        if begins_late or (kind in (Kind.LISTENING, Kind.LEFT) and (kind, body["listener"]) in said):
            continue
        said.add((kind, body["listener"]))
        all_say_what_was_heard &= body.get("heard", "") is not None
        take(whole, position, (kind, body))
        take(short, position, (kind, body))
        if position in forgets:
            short.forget()
    end = len(past) + len(future) + 1
    assert open_before(short, end) == open_before(whole, end)
    assert short.delivered_before(end) == whole.delivered_before(end)
    heard_by_all = whole.heard_before(end)
    # Where the last turns do not say it, as those of 0.1, an older one may: whoever forgot that one has its client hear
    # again what it may have heard.
    assert short.heard_before(end) in ((heard_by_all,) if all_say_what_was_heard else (heard_by_all, None))


# ---- the cluster log


def heard(turns: Turns, position: int) -> int | None:
    found = turns.heard_before(position)
    return None if found is None else found.position


def test_cluster_log_is_heard_on_seamlessly() -> None:
    """P11: in the cluster log; or from where that one began, if it never said."""
    turns = noted(listens("one", 0, heard="5."))
    assert heard(turns, 1) is None
    assert heard(turns, 2) == 5
    take(turns, 2, leaves("one", 1, heard="9."))
    assert heard(turns, 3) == 9
    take(turns, 3, listens("two", 0, heard="9."))
    take(turns, 4, listens("three", 0, heard="9."))
    take(turns, 5, leaves("two", 3, heard="c."))
    # It never carried anything, and began before the other had said how far it got.
    take(turns, 6, leaves("three", None, heard=None))
    assert heard(turns, 7) == 12


def test_last_releases_turn_has_heard_nothing() -> None:
    """P11, P12: it says nothing of the cluster log; the next one begins where the one before it left."""
    turns = noted(listens("new", 0, heard="5."), leaves("new", 1, heard="7."), listens("old", 0), leaves("old", 3))
    turns.forget()
    assert heard(turns, 5) == 7


def test_reading_turns_takes_linear_time() -> None:
    """P10: a client that comes back without end fills its log with them; reading it holds up nobody else."""

    def coming(count: int) -> None:
        turns = Turns()
        for number in range(count):
            take(turns, 3 * number + 1, listens(f"{number}", 0, heard="5."))
            take(turns, 3 * number + 2, answers(f"{number}"))
            take(turns, 3 * number + 3, listens(f"{number} of 0.1", 0))

    coming(1)
    assert steps(lambda: coming(500)) < 14 * steps(lambda: coming(50))


def test_latest_lost_places_are_known() -> None:
    """P10: a client may come with any number of them."""
    turns = Turns()
    for position in range(1, 101):
        body = {"listener": f"{position}", "node": "n", "since": position, "lost": f"{position:x}.00"}
        event = draft(Kind.LISTENING, pydantic_core.to_json(body))
        turns.note(Event(position, event.tag, STANDALONE, event.data))
    known = [position for position in range(1, 101) if turns.found_again(f"{position:x}.00") is not None]
    assert known == list(range(37, 101))


def test_recent_entries_are_known_again() -> None:
    """P9: after a failover they tell what a connection can have read."""
    turns = Turns()
    for position in range(1, 601):
        turns.note(Event(position, position.to_bytes(8), STANDALONE, b"1m{}"))
    assert turns.tag_at(101) == (101).to_bytes(8)
    assert turns.tag_at(100) is None
