"""Who carries a session's standalone stream, as the log tells it. Pure: no clock, no I/O.

Each connection that is to carry the stream says so with a `listening` event, which begins its *turn*. The next
`listening` ends the turn. With `left` the connection says up to where its client has the stream, and the connection
whose turn is next begins there (P3).

A connection whose client names an event asks first, with `asking`, whether a newer one still carries the stream. The
newer one then says so. An `asking` begins no turn, also where a node of version 0.1.0 names the turn that may begin.

A client whose event id the store has lost is told so once, and goes on somewhere. The `listening` of that turn says
both, so that the same id leads to the same place on every node from then on (P9).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from nonstick.core.event_ids import parse_cursor
from nonstick.core.events import Kind, decode, kind_of
from nonstick.store import Cursor, Event

__all__ = ["Turn", "Turns"]

_TRAIL: Final = 500
"""How many of the latest entries of the log are remembered, to be found again after a failover."""

_FOUND: Final = 64
"""How many lost places are remembered, each with the position after which its client went on."""


@dataclass(slots=True)
class Turn:
    """One connection's time as the one that carries the standalone stream.

    Attributes:
        name: Random, of this turn alone.
        node: Where the connection is.
        position: Of its `listening` event. 0 if that was trimmed.
        since: Up to where the client had the stream when it began, as far as was known: not beyond.
        left: It carries nothing more.
        delivered_to: Last position that its client received. None until it left, and if it never carried the stream.
        last_seen: Position of its last sign of life.
        heard: Up to where its client has heard the cluster log, as far as is known: not beyond.
    """

    name: str
    node: str
    position: int
    since: int
    left: bool = False
    delivered_to: int | None = None
    last_seen: int = 0
    heard: Cursor | None = None

    def give_up(self) -> None:
        """The turn is over without a `left`: what it may have carried comes again, so that nothing is lost."""
        self.left, self.delivered_to = True, self.since


class Turns:
    """The turns that a reader of the log knows of, in the log's order."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []
        self._found: dict[str, int] = {}
        """Of places that the store has lost, as text, after which position their clients went on."""
        self.trail: deque[Cursor] = deque(maxlen=_TRAIL)
        """The last entries that are taken into account."""

    @property
    def latest(self) -> Turn | None:
        return self._turns[-1] if self._turns else None

    def note(self, event: Event) -> None:
        """Takes the next event of the log into account."""
        self.trail.append(event.cursor)
        kind = kind_of(event.data)
        if kind is Kind.LISTENING:
            body = decode(event.data)
            name = body["listener"]
            # A node of version 0.1 says nothing of it, and has let nobody hear it.
            heard = parse_cursor(body.get("heard")) or self.heard_before(event.position)
            turn = Turn(name, body["node"], event.position, body["since"], last_seen=event.position, heard=heard)
            self._turns.append(turn)
            if (lost := body.get("lost")) is not None:
                self._found.setdefault(lost, body["since"])
                if len(self._found) > _FOUND:
                    del self._found[next(iter(self._found))]
        elif kind is Kind.CARRYING:
            name = decode(event.data)["listener"]
            for turn in reversed(self._turns):
                if turn.name == name:
                    turn.last_seen = event.position
                    break
        elif kind is Kind.LEFT:
            body = decode(event.data)
            read = body["read"]
            believed = read is None or self._can_have_read(read, body.get("tag"), event.position)
            self._leave(body["listener"], read, parse_cursor(body.get("heard")), believed=believed)

    def _can_have_read(self, read: int, tag: str | None, position: int) -> bool:
        """Whether one that left at `position` can have read this log up to there: it may not have known yet that the
        store had lost entries, whose positions are given out again (P9).
        """
        known = self.tag_at(read)
        return read <= position and (tag is None or known is None or known.hex() == tag)

    def tag_at(self, position: int) -> bytes | None:
        """The tag of this entry; None if it is not among the last."""
        return next((cursor.tag for cursor in reversed(self.trail) if cursor.position == position), None)

    def found_again(self, lost: str | None) -> int | None:
        """After which position a client went on whose place the store had lost; None if none came with it yet."""
        return None if lost is None else self._found.get(lost)

    def _leave(self, name: str, delivered_to: int | None, heard: Cursor | None, *, believed: bool) -> None:
        turn = next((turn for turn in reversed(self._turns) if turn.name == name), None)
        if turn is None:
            # Its beginning was trimmed, so it is older than all that are known.
            turn = Turn(name, "", 0, 0)
            self._turns.insert(0, turn)
        turn.left, turn.delivered_to = True, delivered_to if believed else turn.since
        turn.heard = heard or turn.heard

    def open_before(self, position: int) -> Turn | None:
        """The turn that must leave before it is known where one that began at `position` is to go on.

        Of several the oldest, for which the others wait too.
        """
        return next(iter(self._open_before(position)), None)

    def _open_before(self, position: int) -> list[Turn]:
        opened: list[Turn] = []
        for turn in self._before(position):
            if turn.delivered_to is not None:
                break
            if not turn.left:
                opened.insert(0, turn)
        return opened

    def delivered_before(self, position: int) -> int:
        """Up to where the client had the stream when a turn began at `position`, as far as is known: not beyond."""
        for turn in self._before(position):
            if turn.delivered_to is not None:
                return turn.delivered_to
            if not turn.left:
                return turn.since
        return 0

    def heard_before(self, position: int) -> Cursor | None:
        """Up to where the client had heard the cluster log when a turn began at `position`; None if nothing is known.

        As far as is known: not beyond.
        """
        # Those that never carried anything began before others said how far they got.
        known = (t.heard for t in self._before(position) if not (t.left and t.delivered_to is None))
        return next((heard for heard in known if heard is not None), None)

    def forget(self) -> None:
        """Drops the turns that do not matter to one that begins from now on."""
        for index in reversed(range(len(self._turns))):
            if self._turns[index].delivered_to is not None:
                del self._turns[:index]
                return

    def _before(self, position: int) -> Iterator[Turn]:
        # One by one: of many, mostly the first is what is looked for.
        return (turn for turn in reversed(self._turns) if turn.position < position)
