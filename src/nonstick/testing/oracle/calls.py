"""The rules of what becomes of a request: each is a generator of violations."""

from __future__ import annotations

from collections.abc import Iterator

from nonstick.testing.oracle.index import Index
from nonstick.testing.oracle.records import Ran, Violation

__all__ = ["a_call_ends_once", "a_call_runs_once", "a_reply_counts_once", "no_loss_is_made_up"]


def a_call_ends_once(index: Index) -> Iterator[Violation]:
    """P3, P7: exactly one terminal, and nothing after it."""
    for call in index.calls.values():
        events = index.chain_of(call)
        terminal = index.terminal_of(call)
        reason = index.gave_up.get(call.label)
        if terminal is not None:
            rest = events[events.index(terminal) + 1 :]
            if rest:
                yield Violation("P7", f"{call.label!r} went on after its end", (terminal, *rest))
        elif reason is None and not index.deletes(call.session) and call.session not in index.vanished:
            yield Violation("P3", f"{call.label!r} never ended", (call, *events[-2:]))
        if reason is not None and reason.why == "hung":
            yield Violation("P3", f"{call.label!r} was waited for in vain", (call, *events[-2:], reason))


def no_loss_is_made_up(index: Index) -> Iterator[Violation]:
    """P9: a client is told that its stream is lost only if the store may have lost it."""
    for call in index.calls.values():
        for got in index.chain_of(call):
            data = (got.message.get("error") or {}).get("data") or {}
            if data.get("reason") == "stream_lost" and not index.may_have_lost(call.at, got.at, seen=got.at):
                yield Violation("P9", f"{call.label!r} was told of a loss that there was not", (call, got))


def a_call_runs_once(index: Index) -> Iterator[Violation]:
    """P7: a request is run once; again only as the next attempt, and only where that is declared harmless."""
    for label, runs in index.runs.items():
        starts = [ran for ran in runs if ran.what == "start"]
        attempts = [ran.attempt for ran in starts]
        call = index.calls.get(label)
        if len(set(attempts)) != len(attempts):
            harmless = call is not None and call.repeatable
            if harmless and index.may_have_lost(starts[0].at, starts[-1].at, seen=starts[-1].at):
                continue  # the store forgot that it had been taken over
            yield Violation("P7", f"an attempt at {label!r} was run twice", tuple(starts))
        elif len(starts) > 1 and (call is None or not call.repeatable):
            yield Violation("P7", f"{label!r} was run again, though it must not be", tuple(starts))


def a_reply_counts_once(index: Index) -> Iterator[Violation]:
    """P4: a reply reaches the handler that waits, once, and is one that the client made."""
    for label, runs in index.runs.items():
        seen: dict[tuple[int, int], Ran] = {}
        for ran in (ran for ran in runs if ran.what == "reply"):
            if (before := seen.get((ran.attempt, ran.step))) is not None:
                yield Violation("P4", f"step {ran.step} of {label!r} was replied to twice", (before, ran))
            seen[ran.attempt, ran.step] = ran
            replies = index.replies.get((label, ran.step), [])
            if all(reply.value != ran.value for reply in replies):
                yield Violation("P4", f"{label!r} got a reply that nobody made", (ran, *replies))
