"""From the log alone every connection to the standalone stream knows whose turn it is and where to go on."""

from __future__ import annotations

import pydantic_core

from nonstick.core.events import Kind, draft
from nonstick.core.turns import Turns
from nonstick.store import STANDALONE, Cursor, Event
from tests.unit.steps import steps


def noted(*entries: tuple[str, str, int | None]) -> Turns:
    """The turns after these entries, at positions 1, 2 …: `("l", name, since)`, `("x", name, read)`, or
    `("w", name, None)` for one that asks, `("y", name, None)` for one that answers."""
    turns = Turns()
    for position, (kind, name, number) in enumerate(entries, 1):
        if kind == "l":
            body = {"listener": name, "node": f"node of {name}", "since": number}
        elif kind == "x":
            body = {"listener": name, "read": number}
        else:
            body = {"listener": name, "node": f"node of {name}"}
        event = draft(Kind(ord(kind)), pydantic_core.to_json(body))
        turns.note(Event(position, event.tag, STANDALONE, event.data))
    return turns


def open_before(turns: Turns, position: int) -> str | None:
    turn = turns.open_before(position)
    return None if turn is None else turn.name


def test_the_first_begins_at_the_beginning() -> None:
    """P3: nothing sent before it opened is lost."""
    turns = noted(("l", "one", 0))
    assert open_before(turns, 1) is None
    assert turns.read_before(1) == 0


def test_the_next_waits_for_the_one_before_and_begins_where_it_got_to() -> None:
    """P3: two never carry the same message."""
    assert open_before(noted(("l", "one", 0), ("l", "two", 0)), 2) == "one"
    turns = noted(("l", "one", 0), ("l", "two", 0), ("x", "one", 2))
    assert open_before(turns, 2) is None
    assert turns.read_before(2) == 2


def test_one_that_carried_nothing_passes_on_what_it_would_have_waited_for() -> None:
    """P3."""
    turns = noted(("l", "one", 0), ("l", "two", 0), ("x", "two", None), ("l", "three", 0))
    assert open_before(turns, 4) == "one"
    turns = noted(("l", "one", 0), ("l", "two", 0), ("x", "two", None), ("x", "one", 3), ("l", "three", 0))
    assert open_before(turns, 5) is None
    assert turns.read_before(5) == 3


def test_of_several_that_must_leave_the_oldest_is_waited_for() -> None:
    """P3: the others wait for it too, so that it would be wrong to give up one of them first."""
    turns = noted(("l", "one", 4), ("l", "two", 4), ("l", "three", 4))
    turn = turns.open_before(3)
    assert turn is not None
    assert turn.name == "one"
    turn.give_up()
    assert open_before(turns, 3) == "two"


def test_a_place_beyond_the_log_is_not_believed() -> None:
    """P9: it is from before the store lost entries; rather again than never."""
    turns = noted(("l", "one", 0), ("x", "one", 90), ("l", "two", 0))
    assert turns.read_before(3) == 0


def test_older_asking_changes_no_turn() -> None:
    """P12: it names the turn that it would begin, and says that it left before anybody knew it."""
    turns = noted(("l", "one", 0), ("w", "refused", None), ("y", "one", None), ("x", "refused", None))
    assert open_before(turns, 5) == "one"
    assert (turns.read_before(2), turns.read_before(5)) == (0, 0)
    turns = noted(("l", "one", 0), ("x", "one", 1), ("w", "refused", None), ("x", "refused", None), ("l", "two", 1))
    assert open_before(turns, 5) is None
    assert turns.read_before(5) == 1


def test_newer_turns_do_not_matter_to_an_older_one() -> None:
    """P3: also when they are over before it could begin."""
    turns = noted(("l", "one", 0), ("l", "two", 0), ("l", "three", 9), ("x", "three", 12))
    assert open_before(turns, 2) == "one"


def test_one_whose_node_died_counts_as_having_read_what_it_began_with() -> None:
    """P3: rather again than never."""
    turns = noted(("l", "one", 4), ("l", "two", 4))
    turn = turns.open_before(2)
    assert turn is not None
    turn.give_up()
    assert open_before(turns, 2) is None
    assert turns.read_before(2) == 4


def test_an_older_turn_that_never_left_holds_up_nobody_after_one_that_left() -> None:
    """P3: what the older one carried, the one after it waited for."""
    turns = noted(("l", "old", 0), ("l", "one", 0), ("x", "one", 2), ("l", "two", 2))
    assert open_before(turns, 4) is None
    assert turns.read_before(4) == 2


def test_where_a_turn_is_open_the_next_one_begins_where_that_began() -> None:
    """P3: not where an older one got to; nobody knows yet how far it will get."""
    turns = noted(("l", "one", 0), ("x", "one", 1), ("l", "two", 7), ("l", "three", 0))
    assert open_before(turns, 4) == "two"
    assert turns.read_before(4) == 7


def test_what_a_turn_says_that_it_read_counts_only_of_that_entry() -> None:
    """P9: it left before its node knew that the store had lost the entry, whose position was given out again."""
    turns = noted(("l", "one", 0), ("y", "one", None), ("y", "one", None))
    there = turns.tag_at(2)
    assert there is not None
    for tag, read in ((there, 2), (b"another.", 0)):
        again = noted(("l", "one", 0))
        again.trail.append(Cursor(2, there))
        body = {"listener": "one", "read": 2, "tag": tag.hex()}
        event = draft(Kind.LEFT, pydantic_core.to_json(body))
        again.note(Event(4, event.tag, STANDALONE, event.data))
        assert again.read_before(5) == read


def test_a_lost_place_leads_to_where_the_first_went_on_who_came_with_it() -> None:
    """P9: on every node, whoever comes later."""
    turns = Turns()
    assert turns.found_again(None) is None
    assert turns.found_again("9.00") is None
    for position, since in ((5, 4), (8, 7)):
        body = {"listener": f"{position}", "node": "n", "since": since, "lost": "9.00"}
        event = draft(Kind.LISTENING, pydantic_core.to_json(body))
        turns.note(Event(position, event.tag, STANDALONE, event.data))
    assert turns.found_again("9.00") == 4


def test_a_turn_whose_beginning_was_trimmed_still_tells_how_far_it_got() -> None:
    """P10."""
    turns = noted(("x", "gone", 1), ("l", "two", 0))
    assert open_before(turns, 2) is None
    assert turns.read_before(2) == 1
    turns = noted(("l", "two", 0), ("x", "gone", 2), ("l", "three", 0))
    assert open_before(turns, 1) is None
    assert turns.read_before(1) == 2
    assert open_before(turns, 3) == "two"


def test_what_is_forgotten_does_not_matter() -> None:
    """P10: a connection that stays for long keeps no list of all that came and went."""
    turns = noted(
        *(entry for n in range(100) for entry in (("l", f"{n}", n), ("x", f"{n}", n + 1))), ("l", "last", 100)
    )
    before = turns.read_before(201), open_before(turns, 201), turns.latest
    turns.forget()
    assert (turns.read_before(201), open_before(turns, 201), turns.latest) == before
    assert len(turns._turns) == 2


def heard(turns: Turns, position: int) -> int | None:
    found = turns.heard_before(position)
    return None if found is None else found.position


def take(turns: Turns, position: int, kind: Kind, **body: object) -> None:
    if kind is Kind.LISTENING:
        body |= {"node": "n", "since": 0}
    event = draft(kind, pydantic_core.to_json(body))
    turns.note(Event(position, event.tag, STANDALONE, event.data))


def test_the_next_hears_the_cluster_log_on_from_where_the_one_before_left() -> None:
    """P11: or from where that one began, if it never said."""
    turns = Turns()
    take(turns, 1, Kind.LISTENING, listener="one", heard="5.")
    assert heard(turns, 1) is None
    assert heard(turns, 2) == 5
    take(turns, 2, Kind.LEFT, listener="one", read=1, heard="9.")
    assert heard(turns, 3) == 9
    take(turns, 3, Kind.LISTENING, listener="two", heard="9.")
    take(turns, 4, Kind.LISTENING, listener="three", heard="9.")
    take(turns, 5, Kind.LEFT, listener="two", read=3, heard="c.")
    # It never carried anything, and began before the other had said how far it got.
    take(turns, 6, Kind.LEFT, listener="three", read=None, heard=None)
    assert heard(turns, 7) == 12


def test_a_turn_on_a_node_of_the_last_release_has_heard_nothing() -> None:
    """P11, P12: it says nothing of the cluster log; the next one begins where the one before it left."""
    turns = Turns()
    take(turns, 1, Kind.LISTENING, listener="new", heard="5.")
    take(turns, 2, Kind.LEFT, listener="new", read=1, heard="7.")
    take(turns, 3, Kind.LISTENING, listener="old")
    take(turns, 4, Kind.LEFT, listener="old", read=3)
    turns.forget()
    assert heard(turns, 5) == 7


def test_ten_times_the_turns_take_ten_times_the_steps() -> None:
    """P10: a client that comes back without end fills its log with them; reading it holds up nobody else."""

    def coming(count: int) -> None:
        turns = Turns()
        for number in range(count):
            take(turns, 3 * number + 1, Kind.LISTENING, listener=f"{number}", heard="5.")
            take(turns, 3 * number + 2, Kind.CARRYING, listener=f"{number}")
            take(turns, 3 * number + 3, Kind.LISTENING, listener=f"{number} of 0.1")

    coming(1)
    assert steps(lambda: coming(500)) < 14 * steps(lambda: coming(50))


def test_of_many_lost_places_the_latest_are_known() -> None:
    """P10: a client may come with any number of them."""
    turns = Turns()
    for position in range(1, 101):
        body = {"listener": f"{position}", "node": "n", "since": position, "lost": f"{position:x}.00"}
        event = draft(Kind.LISTENING, pydantic_core.to_json(body))
        turns.note(Event(position, event.tag, STANDALONE, event.data))
    known = [position for position in range(1, 101) if turns.found_again(f"{position:x}.00") is not None]
    assert known == list(range(37, 101))


def test_entries_are_known_again_for_some_hundreds_more() -> None:
    """P9: after a failover they tell what a connection can have read."""
    turns = Turns()
    for position in range(1, 601):
        turns.note(Event(position, position.to_bytes(8), STANDALONE, b"1m{}"))
    assert turns.tag_at(101) == (101).to_bytes(8)
    assert turns.tag_at(100) is None
