"""What a connection to the standalone stream is up to: each phase, each happening, each event, and random logs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pydantic_core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonstick.core.broadcasts import NOWHERE
from nonstick.core.carrier import (
    CARRIED,
    CONNECTION,
    ON_ENTERING,
    Action,
    Carrier,
    Happening,
    Means,
    Phase,
    next_phase,
)
from nonstick.core.event_ids import cursor_text
from nonstick.core.events import Kind, decode, draft
from nonstick.core.turns import Turn
from nonstick.store import STANDALONE, Cursor, Event

PHASES = list(Phase)
OTHER_STREAM = 3


def entry(position: int, kind: Kind, stream: int = STANDALONE, **body: Any) -> Event:
    event = draft(kind, pydantic_core.to_json(body))
    return Event(position, event.tag, stream, event.data)


def listens(position: int, name: str, since: int = 0, **more: Any) -> Event:
    return entry(position, Kind.LISTENING, listener=name, node=f"node of {name}", since=since, **more)


def leaves(position: int, name: str, read: int | None) -> Event:
    return entry(position, Kind.LEFT, listener=name, read=read)


# ---- phases


def expected(phase: Phase, happening: Happening) -> Phase | None:
    """The next phase by the rules as the table says them; None where that cannot happen."""
    if happening is Happening.GONE:
        return Phase.OVER
    if happening is Happening.LOST:
        return None if phase is Phase.OVER else Phase.FINDING
    return CONNECTION[phase].get(happening)


@pytest.mark.parametrize("happening", list(Happening), ids=lambda h: h.name)
@pytest.mark.parametrize("phase", PHASES, ids=lambda p: p.name)
def test_happenings_lead_where_tables_say(phase: Phase, happening: Happening) -> None:
    """P3: what cannot happen in a phase is a defect, and changes nothing."""
    carrier = Carrier("n", named=False)
    carrier.phase = phase
    after = expected(phase, happening)
    if after is None:
        with pytest.raises(ValueError, match=f"{happening.name} cannot happen .* {phase.name}"):
            carrier.happen(happening)
        assert carrier.phase is phase
    else:
        carrier.happen(happening)
        assert carrier.phase is after
        assert next_phase(phase, happening) is after


def test_tables_have_every_row() -> None:
    """Each phase is reached and left, each happening and each action belongs to a phase."""
    assert list(CONNECTION) == list(ON_ENTERING) == PHASES
    assert {Phase.FINDING} | {after for row in CONNECTION.values() for after in row.values()} == set(Phase)
    assert {happening for row in CONNECTION.values() for happening in row} == set(Happening) - {
        Happening.LOST,
        Happening.GONE,
    }
    assert {action for actions in ON_ENTERING.values() for action in actions} == set(Action)
    assert all(ON_ENTERING[phase] for phase in set(Phase) - {Phase.OVER})


# ---- events


def at(phase: Phase, *, named: bool = False) -> Carrier:
    """A connection in this phase, which has taken a log of 10 entries into account. Its own `listening` is the 5th."""
    carrier = Carrier("n", named=named)
    carrier.claim("mine", None)
    for position in range(1, 11):
        carrier.note(listens(5, "mine") if position == 5 else entry(position, Kind.PROGRESS))
    carrier.position = 5
    carrier.phase = phase
    return carrier


WHERE = {"before": 3, "there": 5, "after, known": 7, "after, new": 11}


def meaning(phase: Phase, kind: Kind, where: str, stream: int) -> Means:
    if kind is Kind.ASKING and where == "after, new":
        return Means.ANSWER
    if phase is not Phase.CARRYING and kind is Kind.CHANGED:
        return Means.CHANGE
    if phase is not Phase.CARRYING or kind not in CARRIED:
        return Means.NOTHING
    if stream != STANDALONE and kind is not Kind.CHANGED:
        return Means.NOTHING
    return CARRIED[kind][{"before": 0, "there": 1}.get(where, 2)]


@pytest.mark.parametrize("stream", [STANDALONE, OTHER_STREAM], ids=["standalone", "of a request"])
@pytest.mark.parametrize("where", list(WHERE))
@pytest.mark.parametrize("kind", list(Kind), ids=lambda k: k.name)
@pytest.mark.parametrize("phase", PHASES, ids=lambda p: p.name)
def test_events_mean_what_tables_say(phase: Phase, kind: Kind, where: str, stream: int) -> None:
    """P3: in each phase, wherever it stands; a newer turn and a hang-up end the phase at once."""
    carrier = at(phase)
    body = {"listener": "other", "node": "m", "since": 0, "read": None, "id": 1, "params": {}}
    means = carrier.note(entry(WHERE[where], kind, stream, **body))
    assert means is meaning(phase, kind, where, stream)
    after = {Means.GIVE_WAY: Phase.LEAVING, Means.HANG_UP: Phase.OVER}.get(means, phase)
    assert carrier.phase is after
    assert carrier.scanned_to.position == max(10, WHERE[where])


def test_other_streams_entries_are_not_carried() -> None:
    """P3: the table itself: messages and turns count on the standalone stream, subscriptions wherever they change."""
    assert set(CARRIED) == {Kind.MESSAGE, Kind.CHANGED, Kind.LISTENING, Kind.HANGUP}
    before, there, after = zip(*CARRIED.values(), strict=True)
    assert set(before) <= {Means.PUT, Means.CHANGE, Means.NOTHING}
    assert set(there) == {Means.PRIME, Means.NOTHING}
    assert set(after) == {Means.PUT, Means.CHANGE, Means.GIVE_WAY, Means.HANG_UP}


def test_unknown_event_means_nothing() -> None:
    """P12: of a newer version."""
    carrier = at(Phase.CARRYING)
    assert carrier.note(Event(11, b"12345678", STANDALONE, b"1Z{}")) is Means.NOTHING
    assert carrier.note(Event(12, b"12345678", STANDALONE, b"")) is Means.NOTHING
    assert carrier.scanned_to.position == 12


# ---- settled requests


def request(position: int, request_id: str) -> Event:
    return entry(position, Kind.MESSAGE, jsonrpc="2.0", id=request_id, method="roots/list")


def reply(position: int, request_id: str) -> Event:
    return entry(position, Kind.REPLY, jsonrpc="2.0", id=request_id, result={})


def cancelled(position: int, request_id: str, stream: int = STANDALONE) -> Event:
    return entry(
        position,
        Kind.MESSAGE,
        stream,
        jsonrpc="2.0",
        method="notifications/cancelled",
        params={"requestId": request_id},
    )


@pytest.mark.parametrize(
    ("settles", "means"),
    [
        (reply(3, "srv-1"), Means.SKIP),
        (cancelled(3, "srv-1"), Means.SKIP),
        (cancelled(3, "srv-1", OTHER_STREAM), Means.PUT),
        (reply(3, "srv-2"), Means.PUT),
        (entry(3, Kind.PROGRESS, id="srv-1"), Means.PUT),
    ],
    ids=["answered", "given up", "given up on another stream", "another answered", "in progress"],
)
def test_settled_request_is_not_repeated(settles: Event, means: Means) -> None:
    """P4: if it was answered or given up before the connection came to it."""
    carrier, log = Carrier("n", named=False), [request(1, "srv-1"), entry(2, Kind.MESSAGE, id="srv-1"), settles]
    for event in [*log, listens(4, "mine")]:
        carrier.note(event)
    carrier.position, carrier.phase = 4, Phase.CARRYING
    assert carrier.note(log[0]) is means
    # A response bears the same id.
    assert carrier.note(log[1]) is Means.PUT


def test_settled_requests_are_forgotten_when_live() -> None:
    """P10: replies come after their requests. Of those that must be known, the latest are."""
    carrier = Carrier("n", named=False)
    for number in range(3000):
        carrier.note(reply(number + 1, f"srv-{number}"))
    assert len(carrier._settled) == 1000
    carrier.position, carrier.phase = 3001, Phase.CARRYING
    carrier.note(request(5, "srv-2999"))
    assert carrier._settled
    carrier.note(listens(3001, "mine"))
    assert not carrier._settled


# ---- whose turn it is


def turn_of(carrier: Carrier) -> str | None:
    turn = carrier.awaited()
    return None if turn is None else turn.name


def waiting(*log: Event, named: bool, since: int = 0) -> Carrier:
    """A connection whose `listening` is the last of this log, of which it has taken nothing into account."""
    carrier = Carrier("n", named=named)
    carrier.begin_after([], since)
    carrier.happen(Happening.FREE)
    carrier.claim("mine", None)
    carrier.claimed(len(log) + 1)
    assert carrier.phase is Phase.WAITING
    assert turn_of(carrier) == "mine"
    for event in log:
        carrier.note(event)
    assert turn_of(carrier) == "mine"
    carrier.note(listens(len(log) + 1, "mine"))
    return carrier


def test_connection_awaits_the_oldest_open_turn() -> None:
    """P3: until it left; then it begins where that got to."""
    carrier = waiting(listens(1, "one"), listens(2, "two"), named=False)
    assert turn_of(carrier) == "one"
    carrier.note(leaves(4, "one", 3))
    assert turn_of(carrier) == "two"
    carrier.note(leaves(5, "two", None))
    assert turn_of(carrier) is None
    carrier.begin()
    assert (carrier.resume_after, carrier.queued_to) == (3, 3)


def test_connection_naming_event_waits_for_nobody() -> None:
    """P3: only its client knows what it has, so it begins there, whatever others carried."""
    carrier = waiting(listens(1, "one"), leaves(2, "one", 1), listens(3, "two"), named=True, since=1)
    assert turn_of(carrier) is None
    carrier.begin()
    assert carrier.resume_after == 1


def test_continuing_connection_begins_after_its_last() -> None:
    """P3: behind all that it had, also where the connection in between began further back."""
    carrier = waiting(listens(1, "one"), leaves(2, "one", 1), named=False, since=7)
    carrier.begin()
    assert carrier.resume_after == 7


def silent(*log: Event, asked: int = 0) -> Carrier:
    carrier = Carrier("n", named=True)
    for event in log:
        carrier.note(event)
    carrier.happen(Happening.NEWER_LIVES)
    carrier.asked(asked)
    assert carrier.phase is Phase.SILENT
    return carrier


def test_silent_connection_follows_the_latest_turn() -> None:
    """P3: older ones wait for that themselves."""
    carrier = silent(listens(1, "one"), listens(2, "two"))
    assert turn_of(carrier) == "two"
    carrier.note(leaves(3, "two", 2))
    assert turn_of(carrier) is None


def test_asked_connection_is_expected_to_answer() -> None:
    """P9: until it has answered; and of each that must leave, by a connection that waits for its turn."""
    carrier = silent(listens(1, "one"), asked=4)
    turn = carrier.awaited()
    assert turn is not None
    assert carrier.expects_word_of(turn)
    carrier.note(entry(5, Kind.CARRYING, listener="one"))
    assert not carrier.expects_word_of(turn)
    carrier.happen(Happening.NEWER_ARE_OVER)
    assert not carrier.expects_word_of(Turn("old", "m", 1, 0, last_seen=0))
    carrier.claimed(6)
    assert carrier.expects_word_of(Turn("old", "m", 1, 0, last_seen=99))


def test_unasking_silent_connection_expects_nothing() -> None:
    """P3: the one that carries the stream need not say anything."""
    carrier = at(Phase.CARRYING)
    carrier.note(listens(11, "newer"))
    carrier.happen(Happening.SAID)
    turn = carrier.awaited()
    assert turn is not None
    assert not carrier.expects_word_of(turn)


# ---- what it says


def test_listening_says_where_its_client_is() -> None:
    """P3, P11: as far as is known; the name stays until it left."""
    carrier = Carrier("here", named=False)
    carrier.note(listens(1, "one", heard="5."))
    carrier.note(leaves(2, "one", 1))
    assert carrier.claim("mine", None) == {"listener": "mine", "node": "here", "since": 1, "heard": None}
    assert carrier.claim("other", Cursor(3, b"12345678"))["listener"] == "mine"
    assert carrier.claim("other", Cursor(3, b"a"))["heard"] == "3.61"


def test_leaving_claims_no_turn_never_had() -> None:
    """P3: the next one begins where the one before that got to."""
    carrier = waiting(listens(1, "one"), named=False)
    assert carrier.leave(9, Cursor(3)) == {"listener": "mine", "read": None, "heard": None}


def test_leaving_names_the_clients_last_entry() -> None:
    """P9: by its tag, as long as it is known."""
    carrier = waiting(named=False)
    carrier.happen(Happening.OLDER_ARE_OVER)
    tag = carrier.turns.tag_at(1)
    assert tag is not None
    heard = Cursor(3, b"a")
    assert carrier.leave(1, heard) == {"listener": "mine", "read": 1, "heard": "3.61", "tag": tag.hex()}
    assert carrier.leave(7, heard) == {"listener": "mine", "read": 7, "heard": "3.61"}
    carrier.left()
    assert carrier.turn == ""
    assert carrier.note(entry(8, Kind.ASKING)) is not Means.ANSWER
    # Its next turn is another one, which has not come yet.
    assert carrier.claim("again", None)["listener"] == "again"
    assert carrier.leave(7, heard)["read"] is None


def test_others_cluster_log_places_count() -> None:
    """P11: not to a client that named an event, which says so itself."""
    at_first = Cursor(2, b"a")
    for named, before, after in ((False, at_first, Cursor(5)), (True, NOWHERE, NOWHERE)):
        carrier = Carrier("n", named=named)
        assert carrier.heard_before(at_first) == before
        carrier.note(listens(1, "one", heard="5."))
        assert carrier.heard_before(at_first) == after


# ---- what the store lost

OWN = Cursor(9, b"own tag.")


def test_lost_place_is_announced_once() -> None:
    """P9: once; a place that is there, or was trimmed, is not lost."""
    carrier = Carrier("n", named=True)
    assert carrier.miss(OWN, 9) is None
    assert carrier.lost is None
    assert carrier.miss(None, None) is None
    assert carrier.lost is None
    assert carrier.miss(OWN, 4) is None
    carrier.begin_after([Cursor(3), OWN], 4)
    assert carrier.claim("mine", None) == {
        "listener": "mine", "node": "n", "since": 4, "heard": None, "lost": cursor_text(OWN)
    }  # fmt: skip
    assert list(carrier.given) == [Cursor(3)]
    carrier.begin()
    assert "lost" not in carrier.claim("mine", None)


def test_same_lost_place_leads_alike() -> None:
    """P9: another connection came with it and went on first."""
    carrier = Carrier("n", named=True)
    carrier.note(listens(1, "one", since=6, lost=cursor_text(OWN)))
    assert carrier.miss(OWN, None) == 6
    carrier.begin_after([OWN], 8)
    assert carrier.where_to_begin() == 6
    carrier.begin_after([OWN], 4)
    assert carrier.where_to_begin() == 4


def test_claims_shrink_after_a_loss() -> None:
    """P9: neither of what the client took nor of what was put."""
    carrier = Carrier("n", named=False)
    carrier.begin_after([Cursor(2), Cursor(5)], 5)
    carrier.queued_to = 9
    carrier.last_given = OWN
    carrier.note(entry(6, Kind.MESSAGE))
    assert [place.position for place in carrier.places()] == [2, 5, 6, 9]
    carrier.found_again(4, 7)
    assert (carrier.resume_after, carrier.queued_to, carrier.losses) == (4, 7, 1)
    carrier.found_again(9, 3)
    assert (carrier.resume_after, carrier.queued_to, carrier.losses) == (3, 3, 2)
    assert list(carrier.given) == [Cursor(2)]
    carrier.found_again(2, 50)
    assert (carrier.resume_after, carrier.queued_to, carrier.losses) == (2, 3, 3)


@pytest.mark.parametrize("means", list(Means), ids=lambda m: m.name)
def test_what_is_done_moves_on(means: Means) -> None:
    """P3: messages do, also those that need not be sent; its own `listening` is a place to come back with."""
    carrier = Carrier("n", named=False)
    event = entry(6, Kind.MESSAGE)
    carrier.queued(event, means)
    assert carrier.queued_to == (6 if means in (Means.PUT, Means.SKIP) else 0)
    assert list(carrier.given) == ([event.cursor] if means in (Means.PUT, Means.SKIP, Means.PRIME) else [])


def test_reread_log_counts_anew() -> None:
    """P9."""
    carrier = Carrier("n", named=False)
    carrier.note(listens(1, "one"))
    assert turn_of(carrier) == "one"
    carrier.scan(Cursor(0))
    assert turn_of(carrier) is None
    carrier.note(listens(1, "two"))
    assert turn_of(carrier) == "two"


# ---- random logs: several connections of one client, which says of no event that it has it


class Connection:
    """One connection, its node and its client at work on a log, step by step."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.carrier = Carrier(f"node {number}", named=False)
        self.gone = False
        self.node_is_dead = False
        self.carrier.scan(Cursor(0))
        for event in world.log:
            self.carrier.note(event)
        self.carrier.turns.forget()
        self.carrier.happen(Happening.FREE)
        self.follows: int | None = None
        self.got: list[int] = []

    def step(self) -> bool:
        """Does the next thing, if there is anything to do."""
        carrier = self.carrier
        if self.gone:
            return False
        match carrier.phase:
            case Phase.CLAIMING:
                carrier.turns.forget()
                body = carrier.claim(f"{self.number} at {len(self.world.log)}", None)
                carrier.claimed(self.world.append(Kind.LISTENING, **body))
            case Phase.WAITING | Phase.SILENT:
                return self.wait()
            case Phase.CARRYING:
                return self.carry()
            case Phase.LEAVING:
                self.leave()
                carrier.happen(Happening.SAID)
            case _:
                return False
        return True

    def wait(self) -> bool:
        carrier = self.carrier
        if turn := carrier.awaited():
            if not (news := self.world.log[carrier.scanned_to.position :]):
                # What `_await_turns` finds out by leases.
                if turn.node in self.world.dead:
                    turn.give_up()
                    return True
                return False
            carrier.note(news[0])
        elif carrier.phase is Phase.WAITING:
            carrier.begin()
            carrier.happen(Happening.OLDER_ARE_OVER)
            self.follows = carrier.resume_after
        else:
            carrier.happen(Happening.NEWER_ARE_OVER)
        return True

    def carry(self) -> bool:
        assert self.follows is not None
        if self.follows == len(self.world.log):
            return False
        event = self.world.log[self.follows]
        means = self.carrier.note(event)
        if self.carrier.phase is Phase.CARRYING:
            self.follows += 1
            if means is Means.PUT:
                self.got.append(decode(event.data)["number"])
            self.carrier.queued(event, means)
        return True

    def leave(self) -> None:
        if self.carrier.turn:
            body = self.carrier.leave(max(self.follows or 0, self.carrier.resume_after), Cursor(0))
            self.world.append(Kind.LEFT, **body)
            self.carrier.left()

    def close(self) -> None:
        """Its client goes."""
        if not self.gone:
            self.gone = True
            self.carrier.happen(Happening.GONE)
            self.leave()

    def die(self) -> None:
        """Its node goes, without a word."""
        if not self.gone:
            self.gone = True
            self.world.dead.add(f"node {self.number}")


class World:
    def __init__(self) -> None:
        self.log: list[Event] = []
        self.connections: list[Connection] = []
        self.dead: set[str] = set()
        self.sent = 0

    def append(self, kind: Kind, **body: Any) -> int:
        self.log.append(entry(len(self.log) + 1, kind, **body))
        return len(self.log)

    def send(self) -> None:
        self.append(Kind.MESSAGE, number=self.sent)
        self.sent += 1

    def open(self) -> None:
        self.connections.append(Connection(self, len(self.connections)))

    def settle(self, dice: random.Random) -> None:
        """Until nobody has anything to do, which must come."""
        for _ in range(ROUNDS):
            able = [one for one in self.connections if not one.gone]
            dice.shuffle(able)
            did = [one.step() for one in able]
            if not any(did):
                return
        raise AssertionError("connections take the stream from each other for ever")


ROUNDS = 500
"""More than any of these worlds needs to come to rest."""

SEEDS = st.integers(0, 2**32)
"""Of who does something when: what is drawn for that must not be part of an example, or one without end would pass."""

DEEDS = st.lists(
    st.tuples(st.sampled_from(["open", "send", "step", "step", "step", "close", "die"]), st.integers(0, 9))
)


def play(deeds: list[tuple[str, int]], dice: random.Random, *, deaths: bool) -> World:
    world = World()
    for deed, which in deeds:
        one = world.connections[which % len(world.connections)] if world.connections else None
        doing: dict[str, Callable[[], object]] = {"open": world.open, "send": world.send}
        if one is not None:
            doing |= {"step": one.step, "close": one.close} | ({"die": one.die} if deaths else {})
        doing.get(deed, lambda: None)()
    world.open()
    world.settle(dice)
    world.send()
    world.settle(dice)
    return world


@given(DEEDS, SEEDS)
def test_connections_carry_each_message_exactly_once(deeds: list[tuple[str, int]], seed: int) -> None:
    """P3: whichever come and go, in order on each, and one of those that are left carries what comes."""
    world = play(deeds, random.Random(seed), deaths=False)
    assert sorted(number for one in world.connections for number in one.got) == list(range(world.sent))
    for one in world.connections:
        assert one.got == sorted(one.got)
    assert [one.carrier.phase for one in world.connections if not one.gone].count(Phase.CARRYING) == 1


@given(DEEDS, SEEDS)
def test_dead_nodes_have_nothing_lost(deeds: list[tuple[str, int]], seed: int) -> None:
    """P3, P7: nobody knows how far they got, so that what they carried may come again; nothing is left out."""
    world = play(deeds, random.Random(seed), deaths=True)
    assert {number for one in world.connections for number in one.got} == set(range(world.sent))
    for one in world.connections:
        assert one.got == sorted(set(one.got))
