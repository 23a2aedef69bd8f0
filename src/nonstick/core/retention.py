"""A log in outline, its events' sizes without their data, and what of it may go (P10). Pure: no clock, no I/O.

Finished streams go first, the oldest first; then the oldest events of the standalone stream. A stream that is not
finished never goes. All of it takes time in proportion to the number of events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from nonstick.core.events import Kind, kind_of
from nonstick.store import STANDALONE, Skimmed

__all__ = ["Amount", "Outline", "Portion", "Waste"]

_BYTES_AT_ONCE: Final = 4 * 1024 * 1024
_STREAMS_AT_ONCE: Final = 64
_EVENTS_AT_ONCE: Final = 1000
_LITTLE_MORE: Final = 1.25


class Amount(NamedTuple):
    """So many bytes of data, in so many events."""

    size: int = 0
    events: int = 0

    def plus(self, other: Amount) -> Amount:
        return Amount(self.size + other.size, self.events + other.events)

    def minus(self, other: Amount) -> Amount:
        return Amount(self.size - other.size, self.events - other.events)

    def exceeds(self, other: Amount, share: float = 1.0) -> bool:
        """Whether it is more, of either, than this share of the other."""
        return self.size > other.size * share or self.events > other.events * share


_NOTHING: Final = Amount()


class Portion(NamedTuple):
    """What one call of `Store.trim` drops."""

    streams: list[int]
    standalone_before: int = 0


@dataclass(slots=True)
class Waste:
    """What is to go.

    Attributes:
        portions: In as many calls as it takes for none of them to hold the store up.
        amount: Of it in all.
        messages: To the client, on its standalone stream, that are among it.
    """

    portions: list[Portion] = field(default_factory=list[Portion])
    amount: Amount = _NOTHING
    messages: int = 0


@dataclass(slots=True)
class _Stream:
    """A stream's events: where they begin and end among all, by their numbers in the outline."""

    first: int
    last: int
    amount: Amount = _NOTHING
    ended: bool = False


class Outline:
    """The events of a log, of which those that come are added."""

    def __init__(self) -> None:
        self._sums = [0]
        """Bytes before each event."""
        self._streams: dict[int, _Stream] = {}
        self._finished: list[int] = []
        self._standalone: list[tuple[int, int, int, bool]] = []
        """Number, position, size, and whether it is a message, of each of its events."""

    @property
    def amount(self) -> Amount:
        """All of it."""
        return Amount(self._sums[-1], len(self._sums) - 1)

    def add(self, entries: Iterable[Skimmed]) -> None:
        """Takes the next events, of which the first two bytes are enough."""
        for event, size in entries:
            number = len(self._sums) - 1
            self._sums.append(self._sums[-1] + size)
            kind = kind_of(event.data)
            if event.stream == STANDALONE:
                self._standalone.append((number, event.position, size, kind is Kind.MESSAGE))
                continue
            stream = self._streams.get(event.stream)
            if stream is None:
                stream = self._streams[event.stream] = _Stream(number, number)
            stream.last, stream.amount = number, Amount(stream.amount.size + size, stream.amount.events + 1)
            if kind is Kind.TERMINAL:
                stream.ended = True
                self._finished.append(event.stream)

    def unfinished(self) -> dict[int, Amount]:
        """The streams that have not ended, and what each holds."""
        return {name: stream.amount for name, stream in self._streams.items() if not stream.ended}

    def waste(self, bounds: Amount, aim: float) -> Waste:
        """What is to go of a log with these bounds, so that no more than the share `aim` of them is left.

        But of what the client may not have read only what is over the bounds even so.
        """
        waste, left = Waste(), self.amount
        going: list[int] = []
        for name in self._finished:
            if not left.exceeds(bounds, aim):
                break
            going.append(name)
            left = left.minus(self._streams[name].amount)
        waste.portions += self._streams_in_portions(going)
        if left.exceeds(bounds):
            left = self._drop_standalone(waste, left, bounds, aim)
        waste.amount = self.amount.minus(left)
        return waste

    def _drop_standalone(self, waste: Waste, left: Amount, bounds: Amount, aim: float) -> Amount:
        since, dropped, before = 0, 0, 0
        for number, position, size, is_message in self._standalone:
            if not left.exceeds(bounds, aim):
                break
            if dropped == _EVENTS_AT_ONCE or (dropped and self._sums[number + 1] - self._sums[since] > _BYTES_AT_ONCE):
                waste.portions.append(Portion([], before))
                since, dropped = number, 0
            before, dropped = position + 1, dropped + 1
            waste.messages += is_message
            left = Amount(left.size - size, left.events - 1)
        if dropped:
            waste.portions.append(Portion([], before))
        return left

    def _streams_in_portions(self, names: list[int]) -> list[Portion]:
        """Such that little lies between the first and the last event of each, which a store may have to look at.

        Streams that lie in each other's way go together: one look is enough.
        """
        portions: list[Portion] = []
        room, first, last = 0.0, 0, 0
        for name in names:
            stream = self._streams[name]
            begin, end = min(first, stream.first), max(last, stream.last)
            fits = portions and len(portions[-1].streams) < _STREAMS_AT_ONCE
            if not fits or self._sums[end + 1] - self._sums[begin] > room:
                begin, end = stream.first, stream.last
                portions.append(Portion([]))
                room = max(_BYTES_AT_ONCE, _LITTLE_MORE * (self._sums[end + 1] - self._sums[begin]))
            portions[-1].streams.append(name)
            first, last = begin, end
        return portions
