"""All rules, applied to one history."""

from __future__ import annotations

from collections.abc import Iterable

from nonstick.testing.oracle import calls, sessions, streams
from nonstick.testing.oracle.index import Index
from nonstick.testing.oracle.records import Record, Violation

__all__ = ["judge"]

_RULES = (
    streams.no_message_strays,
    streams.every_event_comes_once_in_order,
    streams.no_step_is_missing,
    calls.a_call_ends_once,
    calls.no_loss_is_made_up,
    streams.a_result_is_whole,
    streams.the_standalone_stream_is_whole,
    streams.a_replay_is_the_rest,
    calls.a_call_runs_once,
    calls.a_reply_counts_once,
    sessions.an_ended_session_stays_ended,
    sessions.a_session_lives_until_it_is_ended,
    sessions.a_client_that_vanished_leaves_nothing,
    sessions.statuses_are_the_promised_ones,
)


def judge(history: Iterable[Record], *, outages: bool = False) -> list[Violation]:
    """Everything in this history that breaks a promise, in no particular order.

    Args:
        history: In the order in which things were recorded.
        outages: The store was out of reach now and then, so that 503 is an answer.
    """
    index = Index(outages)
    for record in history:
        index.add(record)
    return [violation for rule in _RULES for violation in rule(index)]
