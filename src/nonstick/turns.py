"""Who carries a session's standalone stream, as the log tells it. Pure: no clock, no I/O.

Each connection that is to carry the stream says so with a `listening` event, which begins its *turn*; the next one's
ends it. With `left` it says up to where its client has the stream. The one whose turn is next begins there (P3).
"""

from __future__ import annotations

from dataclasses import dataclass

from nonstick.events import Kind, decode, kind_of
from nonstick.store import Event

__all__ = ["Turn", "Turns"]


@dataclass(slots=True)
class Turn:
    """One connection's time as the one that carries the standalone stream.

    Attributes:
        name: Random, of this turn alone.
        node: Where the connection is.
        position: Of its `listening` event. 0 if that was trimmed.
        since: Up to where the client had the stream when it began, as far as was known: not beyond.
        left: It carries nothing more.
        read: Up to where its client has the stream. None until it left, and if it left before it carried anything.
    """

    name: str
    node: str
    position: int
    since: int
    left: bool = False
    read: int | None = None

    def give_up(self) -> None:
        """Its node died and will not say how far it got: nothing is lost if what it may have carried comes again."""
        self.left, self.read = True, self.since


class Turns:
    """The turns that a reader of the log knows of, in the log's order."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []

    @property
    def latest(self) -> Turn | None:
        return self._turns[-1] if self._turns else None

    def note(self, event: Event) -> None:
        """Takes the next event of the log into account."""
        kind = kind_of(event.data)
        if kind is Kind.LISTENING:
            body = decode(event.data)
            self._turns.append(Turn(body["listener"], body["node"], event.position, body["since"]))
        elif kind is Kind.LEFT:
            body = decode(event.data)
            self._leave(body["listener"], body["read"])

    def _leave(self, name: str, read: int | None) -> None:
        turn = next((turn for turn in reversed(self._turns) if turn.name == name), None)
        if turn is None:
            # Its beginning was trimmed, so it is older than all that are known.
            turn = Turn(name, "", 0, 0)
            self._turns.insert(0, turn)
        turn.left, turn.read = True, read

    def open_before(self, position: int) -> Turn | None:
        """The turn that must leave before it is known where one that began at `position` is to go on."""
        for turn in self._before(position):
            if turn.read is not None:
                return None
            if not turn.left:
                return turn
        return None

    def read_before(self, position: int) -> int:
        """Up to where the client had the stream when a turn began at `position`, as far as is known: not beyond."""
        for turn in self._before(position):
            if turn.read is not None:
                return turn.read
            if not turn.left:
                return turn.since
        return 0

    def forget(self) -> None:
        """Drops the turns that do not matter to one that begins from now on."""
        for index in reversed(range(len(self._turns))):
            if self._turns[index].read is not None:
                del self._turns[:index]
                return

    def _before(self, position: int) -> list[Turn]:
        return [turn for turn in reversed(self._turns) if turn.position < position]
