"""A history by what its records are about, for the rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nonstick.testing.oracle.records import (
    Answered,
    Called,
    Caught,
    Ending,
    Fault,
    GaveUp,
    Got,
    Lost,
    Opened,
    Ran,
    Record,
    Replayed,
    Replied,
    Restarted,
    Vanished,
)

__all__ = ["Index", "is_error", "is_terminal"]


@dataclass(slots=True)
class Index:
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
        return next((got for got in self.chain_of(call) if is_terminal(got.message)), None)

    def deletes(self, session: str) -> list[Answered]:
        """The deletes of this session that were answered: by then it had ended."""
        answers = self.answers.get(session, [])
        return [one for one in answers if one.method == "DELETE" and one.status in (200, 404)]


def is_terminal(message: Mapping[str, Any]) -> bool:
    return "method" not in message


def is_error(message: Mapping[str, Any]) -> bool:
    return "error" in message
