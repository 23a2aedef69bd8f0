"""What a stream is up to, from its table: each state with each kind of event, and random logs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonstick.core.events import Kind, draft
from nonstick.core.streams import (
    NEXT,
    OBSERVED,
    READ,
    History,
    Life,
    Meaning,
    Reading,
    State,
    Unfinished,
    next_state,
    reading,
)
from nonstick.store import MAX_CLIP, Event, Skimmed

REQUEST: Final[dict[str, Any]] = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "sum"}}

SILENT: Final = frozenset(Kind) - {Kind.OPENED, Kind.TAKEN, Kind.TERMINAL}
"""Kinds that change no stream's state."""

EXPECTED: Final[dict[tuple[State, Kind], State]] = {
    (State.UNKNOWN, Kind.OPENED): State.RUNNING,
    (State.UNKNOWN, Kind.TAKEN): State.UNKNOWN,
    (State.UNKNOWN, Kind.TERMINAL): State.ENDED,
    (State.RELAYED, Kind.OPENED): State.RELAYED,
    (State.RELAYED, Kind.TAKEN): State.RUNNING,
    (State.RELAYED, Kind.TERMINAL): State.ENDED,
    (State.RUNNING, Kind.OPENED): State.RUNNING,
    (State.RUNNING, Kind.TAKEN): State.RUNNING,
    (State.RUNNING, Kind.TERMINAL): State.ENDED,
    (State.ENDED, Kind.OPENED): State.ENDED,
    (State.ENDED, Kind.TAKEN): State.ENDED,
    (State.ENDED, Kind.TERMINAL): State.ENDED,
} | {(state, kind): state for state in State for kind in SILENT}


def event(kind: Kind, position: int, stream: int = 1, **body: Any) -> Event:
    data = draft(kind, json.dumps(body).encode() if body else b"").data
    return Event(position, b"%08d" % position, stream, data)


def opened(position: int = 1, node: str = "a", attempt: int = 1, **more: Any) -> Event:
    return event(Kind.OPENED, position, position, node=node, attempt=attempt, request=REQUEST, **more)


def skimmed(*events: Event) -> list[Skimmed]:
    return [Skimmed(one._replace(data=one.data[:MAX_CLIP]), len(one.data)) for one in events]


# ---- the tables


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("state", State, ids=lambda state: state.name.lower())
def test_each_state_follows_each_kind(state: State, kind: Kind) -> None:
    """Rules 1 to 6."""
    assert next_state(state, kind) == EXPECTED[state, kind]


@pytest.mark.parametrize("state", State, ids=lambda state: state.name.lower())
def test_unknown_kinds_change_no_state(state: State) -> None:
    """Rule 7, P12: a later version's events say nothing to this one."""
    assert next_state(state, None) == state


def test_ended_streams_have_no_way_on() -> None:
    """Rule 4."""
    assert NEXT[State.ENDED] == {}


READINGS: Final = {
    Kind.MESSAGE: (Reading.SKIP, Reading.PUT, Reading.PUT),
    Kind.TERMINAL: (Reading.END, Reading.PUT_AND_END, Reading.PUT_AND_END),
    Kind.HANGUP: (Reading.SKIP, Reading.SKIP, Reading.END),
    Kind.TAKEN: (Reading.NOTE, Reading.NOTE, Reading.NOTE),
}
"""Of each kind: up to the client's place; after that, and before its connection came; after both."""


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_each_kind_is_read_by_place(kind: Kind) -> None:
    """P3: up to its place a client has everything; a hang-up is for the connections of then."""
    up_to, since, later = READINGS.get(kind, (Reading.SKIP,) * 3)
    assert reading(event(kind, 4), place=4, came=9) == up_to
    assert reading(event(kind, 5), place=4, came=9) == since
    assert reading(event(kind, 9), place=4, came=9) == since
    assert reading(event(kind, 10), place=4, came=9) == later
    assert (kind in READ) == (kind in READINGS)


def test_unknown_events_are_not_read() -> None:
    """P12."""
    assert reading(Event(5, b"", 1, b"1?"), place=4, came=0) == Reading.SKIP
    assert reading(Event(5, b"", 1, b""), place=4, came=0) == Reading.SKIP


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_each_kind_means_one_thing(kind: Kind) -> None:
    """To the node that runs the request, and did not write the event."""
    expected = {Kind.PROBE: Meaning.IS_ASKED, Kind.TERMINAL: Meaning.IS_OVER, Kind.TAKEN: Meaning.IS_OVER}
    assert OBSERVED.get(kind, Meaning.NOTHING) == expected.get(kind, Meaning.NOTHING)


# ---- one stream


def test_relayed_requests_run_once_taken() -> None:
    """Rules 2 and 3."""
    life = Life.begun({"node": "owner", "attempt": 5, "request": REQUEST, "relay": {}})
    assert (life.is_relayed, life.node, life.attempt) == (True, "owner", 5)
    life.note(event(Kind.PROBE, 2))
    assert life.is_relayed
    life.note(event(Kind.TAKEN, 3, node="b", attempt=6))
    assert (life.state, life.node, life.attempt) == (State.RUNNING, "b", 6)


@pytest.mark.parametrize("missing", ["node", "attempt", "request"])
def test_bodies_of_no_release_are_told(missing: str) -> None:
    """Whoever looks through a log passes over them."""
    body: dict[str, Any] = {"node": "a", "attempt": 1, "request": REQUEST}
    del body[missing]
    with pytest.raises(LookupError):
        Life.begun(body)


def test_requests_without_an_id_are_told() -> None:
    """Nobody could end their stream: whoever looks through a log passes over it, and ends the others."""
    with pytest.raises(LookupError):
        Life.begun({"node": "a", "attempt": 1, "request": {"method": "tools/call"}})


def test_history_knows_who_runs_it() -> None:
    """Of the stream alone: events of others are theirs."""
    history = History(opened(attempt=3, partial=True, trace={"traceparent": "x"}))
    assert (history.first_attempt, history.is_partial, history.trace) == (3, True, {"traceparent": "x"})
    history.note(event(Kind.TAKEN, 2, stream=9, node="other", attempt=8))
    assert history.life.node == "a"
    history.note(event(Kind.TAKEN, 3, node="b", attempt=4))
    assert (history.life.node, history.life.attempt, history.first_attempt) == ("b", 4, 3)


def test_history_knows_of_its_cancel() -> None:
    """P5: by the key of its request's id, wherever the cancel lies."""
    history = History(opened())
    history.note(event(Kind.CANCEL, 2, stream=0, requestId=8))
    seen = [history.is_cancelled]
    for position, key in ((3, 7), (4, 8)):
        history.note(event(Kind.CANCEL, position, stream=0, requestId=key))
        seen.append(history.is_cancelled)
    assert seen == [False, True, True]


def test_history_counts_its_open_questions() -> None:
    """P4: what its handler asked, and nobody answered; large questions are cut off."""
    history = History(opened())
    for position, number in enumerate(("1", "2"), 2):
        whole = event(Kind.MESSAGE, position, id=number, method="elicitation/create", params={"text": "x" * MAX_CLIP})
        assert not History.wants_whole(whole)
        history.note(whole._replace(data=whole.data[:MAX_CLIP]))
    history.note(event(Kind.MESSAGE, 4, stream=9, id="3", method="ping"))
    history.note(event(Kind.MESSAGE, 5, method="notifications/message"))
    history.note(event(Kind.REPLY, 6, stream=0, id="1", result={}))
    assert history.unanswered == {"2"}


# ---- a whole log


class Log:
    """A random log that keeps the rules, and what a reader of its every event knows of it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.running: dict[int, tuple[str, int]] = {}
        """Node and attempt of each stream that has not ended."""
        self.relayed: set[int] = set()

    def add(self, kind: Kind, stream: int, **body: Any) -> None:
        self.events.append(event(kind, len(self.events) + 1, stream, **body))

    def open(self, node: str, *, relayed: bool) -> None:
        name = len(self.events) + 1
        body: dict[str, Any] = {"relay": {}} if relayed else {}
        self.events.append(opened(name, node, 1, **body))
        self.running[name] = (node, 1)
        if relayed:
            self.relayed.add(name)

    def take(self, stream: int, node: str) -> None:
        attempt = self.running[stream][1] + 1
        self.add(Kind.TAKEN, stream, node=node, attempt=attempt)
        self.running[stream] = (node, attempt)
        self.relayed.discard(stream)

    def end(self, stream: int) -> None:
        self.add(Kind.TERMINAL, stream, id=7, result={})
        del self.running[stream]
        self.relayed.discard(stream)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "relay", "take", "end", "say", "news"]), st.integers(0, 9), st.sampled_from("abc")
    ),
    max_size=60,
)


def written(steps: Sequence[tuple[str, int, str]]) -> Log:
    log = Log()
    for step, number, node in steps:
        streams = list(log.running)
        if step in ("open", "relay"):
            log.open(node, relayed=step == "relay")
        elif step == "news" or not streams:
            log.add(Kind.MESSAGE, 0, method="notifications/message")
        elif step == "take":
            log.take(streams[number % len(streams)], node)
        elif step == "end":
            log.end(streams[number % len(streams)])
        else:
            kind = (Kind.MESSAGE, Kind.PROBE, Kind.ALIVE, Kind.HANGUP)[number % 4]
            log.add(kind, streams[number % len(streams)], method="notifications/message")
    return log


@given(STEPS, st.integers(1, 7))
@settings(deadline=None)
def test_any_log_tells_what_is_open(steps: list[tuple[str, int, str]], page: int) -> None:
    """However it is read in pages: what is open, who runs it, and as which attempt."""
    log, found = written(steps), Unfinished()
    for at in range(0, len(log.events), page):
        found.take(skimmed(*log.events[at : at + page]))
    assert found.head.position == len(log.events)
    lives = {}
    for name, sketch in found.streams.items():
        life = lives[name] = Life.begun(json.loads(sketch.opened.event.data[2:]))
        if sketch.taken is not None:
            life.note(sketch.taken.event)
        assert sketch.node == life.node
    assert {name: (life.node, life.attempt) for name, life in lives.items()} == log.running
    assert {name for name, life in lives.items() if life.is_relayed} == log.relayed


@given(STEPS)
@settings(deadline=None)
def test_any_stream_has_one_history(steps: list[tuple[str, int, str]]) -> None:
    """A history that is told event by event knows what a look through the whole log finds."""
    log = written(steps)
    for first in [one for one in log.events if one.stream == one.position]:
        history = History(first)
        for one in log.events[first.position :]:
            history.note(one)
        state = history.life.state
        assert (state == State.ENDED) == (first.stream not in log.running)
        if state != State.ENDED:
            assert (history.life.node, history.life.attempt) == log.running[first.stream]
            assert history.life.is_relayed == (first.stream in log.relayed)


@given(STEPS, st.data())
@settings(deadline=None)
def test_any_place_has_exactly_the_rest(steps: list[tuple[str, int, str]], data: st.DataObject) -> None:
    """P3: of a stream that is resumed at any of its events, what was not put before it is put after it, once."""
    log = written(steps)
    firsts = [one for one in log.events if one.stream == one.position]
    if not firsts:
        return
    name = data.draw(st.sampled_from(firsts)).stream
    own = [one for one in log.events if one.stream == name]
    place = data.draw(st.sampled_from(own)).position
    put = (Reading.PUT, Reading.PUT_AND_END)
    whole = [one for one in own if reading(one, place=0, came=0) in put]
    rest = [one for one in own if reading(one, place=place, came=0) in put]
    assert rest == [one for one in whole if one.position > place]


def test_headless_logs_open_no_stream() -> None:
    """P9: where a store lost a stream's first event, nothing is known of it but its end."""
    found = Unfinished()
    found.take(skimmed(event(Kind.MESSAGE, 4, method="x"), event(Kind.TAKEN, 5, node="b", attempt=2)))
    assert found.streams == {}
    found.take(skimmed(event(Kind.TERMINAL, 6, id=7, result={})))
    assert found.streams == {}
