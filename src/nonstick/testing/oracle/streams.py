"""The rules of what is on a stream: each is a generator of violations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import inf
from typing import Any

from nonstick.testing.oracle.index import Index, is_error, is_terminal
from nonstick.testing.oracle.records import Got, Place, Replayed, Violation, token_of

__all__ = [
    "a_replay_is_the_rest",
    "a_result_is_whole",
    "every_event_comes_once_in_order",
    "no_message_strays",
    "no_step_is_missing",
    "the_standalone_stream_is_whole",
]


def no_message_strays(index: Index) -> Iterator[Violation]:
    """P3: never an event of another session or stream."""
    for (session, chain), events in index.chains.items():
        streams = {got.place.stream for got in events if got.place is not None}
        if len(streams) > 1:
            yield Violation("P3", f"chain {chain!r} carried events of {len(streams)} streams", tuple(events))
        for got in events:
            token = token_of(got.message)
            if token is None and not is_terminal(got.message):
                continue  # says nothing of itself, as the withdrawal of a server request
            label = token.label if token is not None else chain
            call = index.calls.get(label)
            if call is None or call.session != session:
                yield Violation("P3", f"{label!r} of another session, or of none, arrived in {session!r}", (got,))
            elif is_terminal(got.message):
                if label != chain or got.message.get("id") != call.request_id:
                    yield Violation("P3", f"the response to another request arrived on {chain!r}", (call, got))
            elif chain != ("" if call.standalone else label):
                yield Violation("P3", f"a message of {label!r} arrived on {chain!r}", (call, got))


def every_event_comes_once_in_order(index: Index) -> Iterator[Violation]:
    """P3: a stream is ordered and without duplicates, over all connections that carried it."""
    for (_, chain), events in index.chains.items():
        placed = [got for got in events if got.place is not None]
        call = index.calls.get(chain)
        for before, got in pairwise(placed):
            assert before.place is not None
            assert got.place is not None
            # Positions that were lost are given out again; on a request's stream only its end may follow then. What
            # arrived late may have been written at any time since the call.
            written = before.at if call is None else call.at
            if (not chain or is_error(got.message)) and index.may_have_lost(written, before.at, seen=got.at):
                continue
            if got.place.position == before.place.position:
                yield Violation("P3", f"an event of {chain!r} arrived twice", (before, got))
            elif got.place.position < before.place.position:
                yield Violation("P3", f"an event of {chain!r} arrived after a later one", (before, got))


def no_step_is_missing(index: Index) -> Iterator[Violation]:
    """P3: a stream is gapless: the steps of each attempt come as 1, 2, 3 … and none twice."""
    for (session, chain), events in index.chains.items():
        restarted = index.restarts.get(session, -inf) if not chain else -inf
        latest: dict[tuple[str, int], Got | None] = {}
        for got in events:
            token = token_of(got.message)
            if token is None or is_terminal(got.message):
                continue
            before = latest.get(token[:2])
            step = 0 if before is None else token_of(before.message)[2]  # type: ignore[index]
            missed = token.step > step + 1 and (0.0 if before is None else before.at) < restarted < got.at
            if not chain and token.step > step + 1 and token.label in index.calls:
                missed |= index.may_have_lost(index.calls[token.label].at, got.at, seen=got.at)
            if token.step != step + 1 and not missed:
                shown = (got,) if before is None else (before, got)
                yield Violation("P3", f"on {chain!r}, step {token.step} of {token.label!r} followed {step}", shown)
            latest[token[:2]] = got


def a_result_is_whole(index: Index) -> Iterator[Violation]:
    """P3: a result follows all that was sent before it, and comes from a run that ended."""
    for call in index.calls.values():
        terminal = index.terminal_of(call)
        if terminal is None or "result" not in terminal.message:
            continue
        token = token_of(terminal.message)
        if token is None or token.step != call.steps:
            yield Violation("P3", f"{call.label!r} has a result that is not its own", (call, terminal))
            continue
        runs = index.runs.get(call.label, [])
        if not any(ran.what == "end" and ran.attempt == token.attempt for ran in runs):
            yield Violation("P7", f"{call.label!r} has the result of a run that did not end", (terminal, *runs))
        if not call.standalone:
            got = _steps(index.chain_of(call), call.label, token.attempt)
            if got != call.steps:
                yield Violation("P3", f"{call.label!r} ended with {got} of {call.steps} steps", (call, terminal))


def the_standalone_stream_is_whole(index: Index) -> Iterator[Violation]:
    """P3: once a client has caught up, it has all that was sent on the standalone stream."""
    for call in index.calls.values():
        caught = index.caught.get(call.session)
        terminal = index.terminal_of(call)
        if not call.standalone or caught is None or terminal is None or "result" not in terminal.message:
            continue
        token = token_of(terminal.message)
        got = _steps(index.chains.get((call.session, ""), []), call.label, 1 if token is None else token.attempt)
        if index.may_have_lost(call.at, terminal.at, seen=caught.at):
            continue
        if got != call.steps and index.restarts.get(call.session, -inf) < call.at < caught.at:
            yield Violation("P3", f"the standalone stream carried {got} of {call.steps} of {call.label!r}", (call,))


def _steps(events: Sequence[Got], label: str, attempt: int) -> int:
    tokens = (token_of(got.message) for got in events if not is_terminal(got.message))
    return sum(token is not None and token[:2] == (label, attempt) for token in tokens)


def a_replay_is_the_rest(index: Index) -> Iterator[Violation]:
    """P3: from any event id, on any node, exactly the rest of that stream, and then its end."""
    for replay in index.replays:
        chain = index.chains.get((replay.session, replay.chain), [])
        if _was_told_of_a_loss_alone(index, replay, chain):
            continue
        rest = _rest(chain, replay.after)
        found = list(replay.events)
        if found != rest and not _is_cut_short(index, replay, chain, rest):
            yield Violation("P3", f"a replay of {replay.chain!r} gave other events than before", (replay, *chain[-2:]))
        if not replay.ended:
            yield Violation("P3", f"a replay of {replay.chain!r}, which is finished, did not end", (replay,))


def _rest(chain: Sequence[Got], after: Place) -> list[tuple[Place, Mapping[str, Any]]]:
    """What arrived after this place. Lost positions are given out again, so the order decides where it can."""
    placed = [(got.place, got.message) for got in chain if got.place is not None]
    at = max((n for n, (place, _) in enumerate(placed) if place == after), default=None)
    if at is not None:
        return placed[at + 1 :]
    return [(place, message) for place, message in placed if place.position > after.position]


def _was_told_of_a_loss_alone(index: Index, replay: Replayed, chain: Sequence[Got]) -> bool:
    """Whether only the client's own place was lost, and it was told so: the stream may go on from an older one."""
    if not chain or chain[-1].place is not None:
        return False
    data = (chain[-1].message.get("error") or {}).get("data") or {}
    lost = index.may_have_lost(index.calls[replay.chain].at, chain[-1].at, seen=chain[-1].at)
    return data.get("reason") == "stream_lost" and lost


def _is_cut_short(
    index: Index, replay: Replayed, chain: Sequence[Got], rest: Sequence[tuple[Place, Mapping[str, Any]]]
) -> bool:
    """Whether the store may have lost the end of this stream, and one error says so in its place."""
    *found, (_, end) = replay.events or [(replay.after, {})]
    told = is_error(end) and end.get("id") == index.calls[replay.chain].request_id
    lost = bool(chain) and index.may_have_lost(index.calls[replay.chain].at, chain[-1].at, seen=replay.at)
    return told and lost and found == list(rest[: len(found)])
