"""The two machines of a request: every state and every event, and random orders beside what flags would have said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonstick.core.requests import (
    ANSWER,
    HANDLER,
    LAST_WORD,
    AnswerEvent,
    AnswerState,
    HandlerEvent,
    HandlerState,
    LastWord,
)

REASONS: Final = {
    HandlerEvent.CANCEL: HandlerState.CANCELLED,
    HandlerEvent.FAIL: HandlerState.FAILED,
    HandlerEvent.FENCE: HandlerState.FENCED,
    HandlerEvent.SESSION_ENDED: HandlerState.ENDED,
}
STOPPED: Final = sorted(REASONS.values())
CLOSED: Final = [HandlerState.DONE, HandlerState.ABANDONED, HandlerState.TOLD]

S = TypeVar("S", bound=IntEnum)
E = TypeVar("E", bound=IntEnum)


def after(table: Mapping[S, Mapping[E, S]], state: S, event: E) -> S:
    """The state in which this event leaves the machine."""
    return table[state].get(event, state)


# ---- the handler


def expected_handler(state: HandlerState, event: HandlerEvent) -> HandlerState:
    """As the rules say it."""
    if state is HandlerState.TOLD:
        return state
    if event is HandlerEvent.TELL:
        return HandlerState.TOLD
    if state in CLOSED:
        return state
    if event is HandlerEvent.RETURNED:
        return HandlerState.DONE
    if state is HandlerState.RUNNING:
        return REASONS.get(event, state)
    return HandlerState.ABANDONED if event is HandlerEvent.ABANDON else state


@pytest.mark.parametrize("event", HandlerEvent)
@pytest.mark.parametrize("state", HandlerState)
def test_handler_goes_where_the_rules_say(state: HandlerState, event: HandlerEvent) -> None:
    assert after(HANDLER, state, event) is expected_handler(state, event)


def test_tables_cover_each_state() -> None:
    assert HANDLER.keys() == set(HandlerState)
    assert ANSWER.keys() == set(AnswerState)


@pytest.mark.parametrize("second", REASONS)
@pytest.mark.parametrize("first", REASONS)
def test_second_reason_never_replaces_the_first(first: HandlerEvent, second: HandlerEvent) -> None:
    stopped = after(HANDLER, HandlerState.RUNNING, first)
    assert stopped is REASONS[first]
    assert after(HANDLER, stopped, second) is stopped


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("state", CLOSED)
def test_no_reason_counts_after_end(state: HandlerState, reason: HandlerEvent) -> None:
    assert after(HANDLER, state, reason) is state


def test_closed_states_are_the_last_ones() -> None:
    """So that one comparison tells."""
    assert [state for state in HandlerState if state >= HandlerState.DONE] == CLOSED


def test_every_end_has_a_last_word() -> None:
    ends = {state for state, row in HANDLER.items() if HandlerEvent.RETURNED in row}
    assert LAST_WORD.keys() == ends
    assert {state.name: word.name for state, word in LAST_WORD.items()} == {
        "RUNNING": "RESULT",
        "CANCELLED": "CANCELLED",
        "FAILED": "FAILURE",
        "FENCED": "NOTHING",
        "ENDED": "NOT_FOUND",
    }


@dataclass
class HandlerFlags:
    """The same, as flags: an independent way to say it."""

    stopped: HandlerEvent | None = None
    closed: bool = False
    abandoned: bool = False
    concluded: bool = False

    def note(self, event: HandlerEvent) -> None:
        if event is HandlerEvent.TELL:
            self.closed = self.concluded = True
        elif event is HandlerEvent.RETURNED:
            self.closed = True
        elif event is HandlerEvent.ABANDON:
            if self.stopped is not None and not self.closed:
                self.closed = self.abandoned = True
        elif self.stopped is None and not self.closed:
            self.stopped = event


WORDS: Final = {
    None: LastWord.RESULT,
    HandlerEvent.CANCEL: LastWord.CANCELLED,
    HandlerEvent.FAIL: LastWord.FAILURE,
    HandlerEvent.FENCE: LastWord.NOTHING,
    HandlerEvent.SESSION_ENDED: LastWord.NOT_FOUND,
}


@given(st.lists(st.sampled_from(HandlerEvent), max_size=12))
def test_handler_is_as_its_flags(events: Sequence[HandlerEvent]) -> None:
    state, word, flags = HandlerState.RUNNING, None, HandlerFlags()
    for event in events:
        before, state = state, after(HANDLER, state, event)
        if before < HandlerState.DONE <= state:
            assert word is None
            word = LAST_WORD[before]
        flags.note(event)
        assert (state >= HandlerState.DONE) is flags.closed
        assert (state is HandlerState.TOLD) is flags.concluded
        if state < HandlerState.DONE:
            assert state is REASONS.get(flags.stopped or HandlerEvent.RETURNED, HandlerState.RUNNING)
        elif state is not HandlerState.TOLD:
            assert (state is HandlerState.ABANDONED) is flags.abandoned
    if flags.closed:
        assert word is WORDS[flags.stopped]


# ---- the answer


def expected_answer(state: AnswerState, event: AnswerEvent) -> AnswerState:
    """As the rules say it."""
    if state is AnswerState.STREAM:
        return state if event is AnswerEvent.STREAMED else AnswerState.ENDED
    if state is AnswerState.OPEN:
        return {
            AnswerEvent.STREAMED: AnswerState.STREAM,
            AnswerEvent.RESULT: AnswerState.BODY,
            AnswerEvent.REFUSE: AnswerState.REFUSED,
            AnswerEvent.LOSE: AnswerState.ENDED,
            AnswerEvent.HAND_OVER: AnswerState.OPEN,
        }[event]
    return state


@pytest.mark.parametrize("event", AnswerEvent)
@pytest.mark.parametrize("state", AnswerState)
def test_answer_goes_where_the_rules_say(state: AnswerState, event: AnswerEvent) -> None:
    assert after(ANSWER, state, event) is expected_answer(state, event)


STREAMS: Final = {AnswerState.STREAM, AnswerState.ENDED}


@given(st.lists(st.sampled_from(AnswerEvent), max_size=12))
def test_answer_remains_what_it_became(events: Sequence[AnswerEvent]) -> None:
    """A body, a refusal or a stream: whatever comes behind."""
    state = AnswerState.OPEN
    for event in events:
        before, state = state, after(ANSWER, state, event)
        if before in STREAMS:
            assert state in STREAMS
        elif before is not AnswerState.OPEN:
            assert state is before
        if before is AnswerState.ENDED:
            assert state is before


@given(st.lists(st.sampled_from(AnswerEvent), max_size=12))
def test_first_deciding_event_decides_the_answer(events: Sequence[AnswerEvent]) -> None:
    state = AnswerState.OPEN
    for event in events:
        state = after(ANSWER, state, event)
    first = next((event for event in events if event is not AnswerEvent.HAND_OVER), None)
    kinds = {
        None: {AnswerState.OPEN},
        AnswerEvent.STREAMED: STREAMS,
        AnswerEvent.RESULT: {AnswerState.BODY},
        AnswerEvent.REFUSE: {AnswerState.REFUSED},
        AnswerEvent.LOSE: {AnswerState.ENDED},
    }
    assert state in kinds[first]
