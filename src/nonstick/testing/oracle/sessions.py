"""The rules of a session, as the statuses of its requests tell it: each is a generator of violations."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from nonstick.testing.oracle.index import Index
from nonstick.testing.oracle.records import Violation

__all__ = [
    "a_client_that_vanished_leaves_nothing",
    "a_session_lives_until_it_is_ended",
    "an_ended_session_stays_ended",
    "statuses_are_the_promised_ones",
]


def an_ended_session_stays_ended(index: Index) -> Iterator[Violation]:
    """P6: from the moment that a DELETE is answered, the session is 404 everywhere."""
    for session, answers in index.answers.items():
        for ended in index.deletes(session)[:1]:
            for late in answers:
                if index.may_have_lost(ended.sent, ended.at, seen=late.at):
                    continue
                if late.sent > ended.at and late.status not in (404, 503):
                    yield Violation("P6", f"{late.method} got {late.status} after {session!r} ended", (ended, late))


def a_session_lives_until_it_is_ended(index: Index) -> Iterator[Violation]:
    """P1, P9: no 404 for a session that nobody ended."""
    for session, answers in index.answers.items():
        ending = min((one.sent for one in answers if one.method == "DELETE"), default=inf)
        ending = min(ending, index.ending.get(session, inf))
        if (vanished := index.vanished.get(session)) is not None:
            ending = min(ending, vanished.at)
        opened = index.opened.get(session)
        for one in answers:
            if opened is not None and index.may_have_lost(opened.sent, opened.at, seen=one.at):
                continue
            if one.status == 404 and one.at < ending:
                yield Violation("P1", f"{session!r} was not found while it lived", (one,))


def a_client_that_vanished_leaves_nothing(index: Index) -> Iterator[Violation]:
    """P10: a session whose client is gone for ever ends, whatever waits for that client."""
    for session, vanished in index.vanished.items():
        for one in index.answers.get(session, []):
            if one.sent > vanished.by and one.status not in (404, 503):
                yield Violation("P10", f"{session!r} lived on after its client had vanished", (vanished, one))


def statuses_are_the_promised_ones(index: Index) -> Iterator[Violation]:
    """P9: nothing but success, 404, and 503 while the store is out of reach."""
    allowed = {200, 202, 404} | ({503} if index.outages else set())
    for answers in index.answers.values():
        for one in answers:
            if one.status not in allowed:
                yield Violation("P9", f"{one.method} was answered with {one.status}", (one,))
