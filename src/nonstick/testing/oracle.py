"""Judges a recorded history: what clients sent and got, and what the tools ran, against the promises. Pure.

A *call* is one request to a tool, named by a label that is used nowhere else. What the tool says carries the token
`label:attempt:step`, so that a message that strays is known by its text. A *chain* is everything that a client
received of one stream over all of its connections, each of which went on after the last event id that it had; the
chain of a call is named by its label, the standalone stream's by "".

What the store has lost (`Lost`) may be missing, but only where the client was told: by an error for its request, or by
404 where the session itself was lost. On the standalone stream, where no message could say so, there may be a gap.
Nothing is ever allowed to come twice, or after a gap in a request's own stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

__all__ = [
    "Answered",
    "Called",
    "Caught",
    "Ending",
    "Fault",
    "GaveUp",
    "Got",
    "Lost",
    "Opened",
    "Place",
    "Ran",
    "Record",
    "Replayed",
    "Replied",
    "Restarted",
    "Token",
    "Vanished",
    "Violation",
    "judge",
    "token_of",
]


class Place(NamedTuple):
    """What an event id says: the stream, and the position in the session's log."""

    stream: int
    position: int


@dataclass(frozen=True, slots=True)
class Called:
    """A client made a request.

    Attributes:
        steps: How many numbered messages a run that ends with a result has sent.
        standalone: They go to the standalone stream.
        repeatable: The request may be run again where its node was lost.
    """

    at: float
    session: str
    label: str
    request_id: int | str
    steps: int
    standalone: bool = False
    repeatable: bool = False


@dataclass(frozen=True, slots=True)
class Got:
    """A message arrived on a chain. No place: it was a plain JSON answer."""

    at: float
    session: str
    chain: str
    place: Place | None
    message: Mapping[str, Any]
    node: str = ""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A finished chain was read again after one of its events. `ended`: the server closed the stream."""

    at: float
    session: str
    chain: str
    after: Place
    events: Sequence[tuple[Place, Mapping[str, Any]]]
    ended: bool
    node: str = ""


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The client waits no longer for a call's end.

    Attributes:
        why: "lost": the connection broke before there was an event id to come back with. "refused": it was answered
            with 404 or 503. "hung": the deadline passed, for its end or for what it sent on the standalone stream.
    """

    at: float
    session: str
    label: str
    why: str


@dataclass(frozen=True, slots=True)
class Answered:
    """An HTTP request of a session got its status. `sent`: when it was sent."""

    at: float
    sent: float
    session: str
    method: str
    status: int
    node: str = ""


@dataclass(frozen=True, slots=True)
class Replied:
    """The client replied to a server request of this call; None: whether the reply arrived is not known."""

    at: float
    session: str
    label: str
    step: int
    value: str
    status: int | None


@dataclass(frozen=True, slots=True)
class Caught:
    """The client has read the standalone stream to the end of all that was sent there before."""

    at: float
    session: str


@dataclass(frozen=True, slots=True)
class Restarted:
    """A client came to the standalone stream without an event id, after a connection that broke before it had one.

    What that connection was sent counts as received.
    """

    at: float
    session: str


@dataclass(frozen=True, slots=True)
class Ran:
    """A tool's own record: `what` is start, reply, end, cancelled or failed."""

    at: float
    label: str
    what: str
    attempt: int
    node: str
    step: int = 0
    value: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session's `initialize` was answered with success. `sent`: when it was sent."""

    at: float
    sent: float
    session: str


@dataclass(frozen=True, slots=True)
class Ending:
    """A client sends a DELETE: from now on its session may have ended, whether that is answered or not."""

    at: float
    session: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The store lost what it had acknowledged: all that was written from `since` to `until`, or some of it.

    Attributes:
        at: From when on that can be seen.
        since: Minus infinity if all of its data may be gone.
    """

    at: float
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Vanished:
    """A client went away for ever, in the middle of what it did. Its session must have ended at the time `by`."""

    at: float
    session: str
    by: float


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to the cluster. Not judged: shown beside what went wrong."""

    at: float
    kind: str
    target: str


Record = (
    Called
    | Got
    | Replayed
    | GaveUp
    | Answered
    | Replied
    | Caught
    | Restarted
    | Ran
    | Opened
    | Ending
    | Lost
    | Vanished
    | Fault
)


class Token(NamedTuple):
    """What a tool's message says of itself."""

    label: str
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that the history breaks, with the records that show it."""

    promise: str
    text: str
    records: tuple[Record, ...] = ()


def token_of(message: Mapping[str, Any]) -> Token | None:
    """The token in a progress notification, a server request or a result; None if there is none."""
    text: Any = (message.get("params") or {}).get("message")
    if "result" in message:
        content = message["result"].get("content") or [{}]
        text = content[0].get("text")
    parts = text.split(":") if isinstance(text, str) else []
    if len(parts) != 3 or not (parts[1].isdigit() and parts[2].isdigit()):
        return None
    return Token(parts[0], int(parts[1]), int(parts[2]))


def judge(history: Iterable[Record], *, outages: bool = False) -> list[Violation]:
    """Everything in this history that breaks a promise, in no particular order.

    Args:
        history: In the order in which things were recorded.
        outages: The store was out of reach now and then, so that 503 is an answer.
    """
    index = _Index(outages)
    for record in history:
        index.add(record)
    return [violation for rule in _RULES for violation in rule(index)]


@dataclass(slots=True)
class _Index:
    """The history by what its records are about."""

    outages: bool
    calls: dict[str, Called] = field(default_factory=dict)
    chains: dict[tuple[str, str], list[Got]] = field(default_factory=lambda: defaultdict(list))
    gave_up: dict[str, GaveUp] = field(default_factory=dict)
    replays: list[Replayed] = field(default_factory=list)
    answers: dict[str, list[Answered]] = field(default_factory=lambda: defaultdict(list))
    replies: dict[tuple[str, int], list[Replied]] = field(default_factory=lambda: defaultdict(list))
    runs: dict[str, list[Ran]] = field(default_factory=lambda: defaultdict(list))
    caught: dict[str, Caught] = field(default_factory=dict)
    restarts: dict[str, float] = field(default_factory=dict)
    opened: dict[str, Opened] = field(default_factory=dict)
    losses: list[Lost] = field(default_factory=list)
    ending: dict[str, float] = field(default_factory=dict)
    vanished: dict[str, Vanished] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        match record:
            case Called():
                self.calls[record.label] = record
            case Got():
                self.chains[record.session, record.chain].append(record)
            case Replayed():
                self.replays.append(record)
            case GaveUp():
                self.gave_up[record.label] = record
            case Answered():
                self.answers[record.session].append(record)
            case Replied():
                self.replies[record.label, record.step].append(record)
            case Ran():
                self.runs[record.label].append(record)
            case Lost():
                self.losses.append(record)
            case Fault():
                pass
            case _:
                self._add_of_session(record)

    def _add_of_session(self, record: Caught | Restarted | Opened | Ending | Vanished) -> None:
        match record:
            case Caught():
                self.caught[record.session] = record
            case Restarted():
                self.restarts[record.session] = record.at
            case Opened():
                self.opened[record.session] = record
            case Ending():
                self.ending.setdefault(record.session, record.at)
            case Vanished():
                self.vanished[record.session] = record

    def may_have_lost(self, first: float, last: float, *, seen: float) -> bool:
        """Whether something that was written between `first` and `last` may be missing at `seen`."""
        return any(loss.since <= last and first <= loss.until and loss.at <= seen for loss in self.losses)

    def chain_of(self, call: Called) -> list[Got]:
        return self.chains.get((call.session, call.label), [])

    def terminal_of(self, call: Called) -> Got | None:
        return next((got for got in self.chain_of(call) if _is_terminal(got.message)), None)

    def deletes(self, session: str) -> list[Answered]:
        """The deletes of this session that were answered: by then it had ended."""
        answers = self.answers.get(session, [])
        return [one for one in answers if one.method == "DELETE" and one.status in (200, 404)]


def _is_terminal(message: Mapping[str, Any]) -> bool:
    return "method" not in message


def _is_error(message: Mapping[str, Any]) -> bool:
    return "error" in message


# ---- the rules, each a generator of violations


def _no_message_strays(index: _Index) -> Iterator[Violation]:
    """P3: never an event of another session or stream."""
    for (session, chain), events in index.chains.items():
        streams = {got.place.stream for got in events if got.place is not None}
        if len(streams) > 1:
            yield Violation("P3", f"chain {chain!r} carried events of {len(streams)} streams", tuple(events))
        for got in events:
            token = token_of(got.message)
            if token is None and not _is_terminal(got.message):
                continue  # says nothing of itself, as the withdrawal of a server request
            label = token.label if token is not None else chain
            call = index.calls.get(label)
            if call is None or call.session != session:
                yield Violation("P3", f"{label!r} of another session, or of none, arrived in {session!r}", (got,))
            elif _is_terminal(got.message):
                if label != chain or got.message.get("id") != call.request_id:
                    yield Violation("P3", f"the response to another request arrived on {chain!r}", (call, got))
            elif chain != ("" if call.standalone else label):
                yield Violation("P3", f"a message of {label!r} arrived on {chain!r}", (call, got))


def _every_event_comes_once_in_order(index: _Index) -> Iterator[Violation]:
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
            if (not chain or _is_error(got.message)) and index.may_have_lost(written, before.at, seen=got.at):
                continue
            if got.place.position == before.place.position:
                yield Violation("P3", f"an event of {chain!r} arrived twice", (before, got))
            elif got.place.position < before.place.position:
                yield Violation("P3", f"an event of {chain!r} arrived after a later one", (before, got))


def _no_step_is_missing(index: _Index) -> Iterator[Violation]:
    """P3: a stream is gapless: the steps of each attempt come as 1, 2, 3 … and none twice."""
    for (session, chain), events in index.chains.items():
        restarted = index.restarts.get(session, -inf) if not chain else -inf
        latest: dict[tuple[str, int], Got | None] = {}
        for got in events:
            token = token_of(got.message)
            if token is None or _is_terminal(got.message):
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


def _a_call_ends_once(index: _Index) -> Iterator[Violation]:
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


def _no_loss_is_made_up(index: _Index) -> Iterator[Violation]:
    """P9: a client is told that its stream is lost only if the store may have lost it."""
    for call in index.calls.values():
        for got in index.chain_of(call):
            data = (got.message.get("error") or {}).get("data") or {}
            if data.get("reason") == "stream_lost" and not index.may_have_lost(call.at, got.at, seen=got.at):
                yield Violation("P9", f"{call.label!r} was told of a loss that there was not", (call, got))


def _a_result_is_whole(index: _Index) -> Iterator[Violation]:
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


def _the_standalone_stream_is_whole(index: _Index) -> Iterator[Violation]:
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
    tokens = (token_of(got.message) for got in events if not _is_terminal(got.message))
    return sum(token is not None and token[:2] == (label, attempt) for token in tokens)


def _a_replay_is_the_rest(index: _Index) -> Iterator[Violation]:
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


def _was_told_of_a_loss_alone(index: _Index, replay: Replayed, chain: Sequence[Got]) -> bool:
    """Whether only the client's own place was lost, and it was told so: the stream may go on from an older one."""
    if not chain or chain[-1].place is not None:
        return False
    data = (chain[-1].message.get("error") or {}).get("data") or {}
    lost = index.may_have_lost(index.calls[replay.chain].at, chain[-1].at, seen=chain[-1].at)
    return data.get("reason") == "stream_lost" and lost


def _is_cut_short(
    index: _Index, replay: Replayed, chain: Sequence[Got], rest: Sequence[tuple[Place, Mapping[str, Any]]]
) -> bool:
    """Whether the store may have lost the end of this stream, and one error says so in its place."""
    *found, (_, end) = replay.events or [(replay.after, {})]
    told = _is_error(end) and end.get("id") == index.calls[replay.chain].request_id
    lost = bool(chain) and index.may_have_lost(index.calls[replay.chain].at, chain[-1].at, seen=replay.at)
    return told and lost and found == list(rest[: len(found)])


def _a_call_runs_once(index: _Index) -> Iterator[Violation]:
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


def _a_reply_counts_once(index: _Index) -> Iterator[Violation]:
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


def _an_ended_session_stays_ended(index: _Index) -> Iterator[Violation]:
    """P6: from the moment that a DELETE is answered, the session is 404 everywhere."""
    for session, answers in index.answers.items():
        for ended in index.deletes(session)[:1]:
            for late in answers:
                if index.may_have_lost(ended.sent, ended.at, seen=late.at):
                    continue
                if late.sent > ended.at and late.status not in (404, 503):
                    yield Violation("P6", f"{late.method} got {late.status} after {session!r} ended", (ended, late))


def _a_session_lives_until_it_is_ended(index: _Index) -> Iterator[Violation]:
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


def _a_client_that_vanished_leaves_nothing(index: _Index) -> Iterator[Violation]:
    """P10: a session whose client is gone for ever ends, whatever waits for that client."""
    for session, vanished in index.vanished.items():
        for one in index.answers.get(session, []):
            if one.sent > vanished.by and one.status not in (404, 503):
                yield Violation("P10", f"{session!r} lived on after its client had vanished", (vanished, one))


def _statuses_are_the_promised_ones(index: _Index) -> Iterator[Violation]:
    """P9: nothing but success, 404, and 503 while the store is out of reach."""
    allowed = {200, 202, 404} | ({503} if index.outages else set())
    for answers in index.answers.values():
        for one in answers:
            if one.status not in allowed:
                yield Violation("P9", f"{one.method} was answered with {one.status}", (one,))


_RULES = (
    _no_message_strays,
    _every_event_comes_once_in_order,
    _no_step_is_missing,
    _a_call_ends_once,
    _no_loss_is_made_up,
    _a_result_is_whole,
    _the_standalone_stream_is_whole,
    _a_replay_is_the_rest,
    _a_call_runs_once,
    _a_reply_counts_once,
    _an_ended_session_stays_ended,
    _a_session_lives_until_it_is_ended,
    _a_client_that_vanished_leaves_nothing,
    _statuses_are_the_promised_ones,
)
