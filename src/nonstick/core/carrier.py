"""What one connection to a session's standalone stream is up to. Pure: no clock, no loop, no I/O.

Of all connections to a standalone stream one carries it. The rules, which every node and every version of nonstick
keeps, so that no two carry the same message and none is lost (P3):

1. A connection that is to carry the stream says `listening` in the session's log. That begins its turn.
2. It carries nothing before every older turn is over, and begins where the latest of them ended. But one whose client
   named an event begins after that event and waits for nobody: only that client knows what it has.
3. It carries what stands in the log up to the next `listening` of another connection. Then it says with `left` up to
   where its client has the stream, and is silent.
4. A silent connection stays open: a client whose connection is closed comes back, and two would take the stream from
   each other for ever. The connection goes on, with a turn of its own, when the latest turn is over.
5. A connection whose client named an event is silent from the beginning while another one carries the stream. With
   `asking` it has the other one say that it does. Whatever carries the stream answers with `carrying`.
6. A connection that never says that it left has the client where its turn began, at least. It is given up if its node
   is dead, or if it should have said something, and did not in time.
7. Where the store lost entries of the log, all of it is read again, and the connection says `listening` anew. That
   `listening` says which place of the client is lost, and where its client goes on: the same for each connection that
   comes with the same place (P9).

`CONNECTION` has the phases of a connection, and `ON_ENTERING` what it does in each. `CARRIED` says what each event of
the log is to the connection that carries the stream. What is not here: room in the outlet, how often the node of
another connection is looked after, and the broadcasts that are put in between.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, Final

from mcp_types import RequestId

from nonstick.core.broadcasts import NOWHERE
from nonstick.core.event_ids import cursor_text
from nonstick.core.events import Kind, decode, glimpse, kind_of
from nonstick.core.jsonrpc import request_key
from nonstick.core.places import MAX_PLACES
from nonstick.core.turns import Turn, Turns
from nonstick.store import MAX_CLIP, STANDALONE, Cursor, Event

__all__ = ["CARRIED", "CONNECTION", "ON_ENTERING", "Action", "Carrier", "Happening", "Means", "Phase", "next_phase"]

_NONE: Final = sys.maxsize
"""The position of a turn that has not begun: all that stands in the log is before it."""

_SETTLED: Final = 1000
"""Server requests that a connection knows to be settled. One beyond them is sent, and its answer dropped."""

_CANCELLED: Final = b'"notifications/cancelled"'


class Phase(IntEnum):
    """What a connection is up to."""

    FINDING = 0
    """It reads the log, to find out where its client goes on."""
    ASKING = 1
    """It says `asking`: another connection seems to carry the stream."""
    CLAIMING = 2
    """It says `listening`."""
    WAITING = 3
    """Its turn has begun, and older ones may not be over."""
    CARRYING = 4
    """It carries the stream."""
    LEAVING = 5
    """It says `left`: a newer turn has begun."""
    SILENT = 6
    """It is open, and another connection carries the stream."""
    OVER = 7
    """It carries nothing more."""


class Happening(IntEnum):
    """What takes a connection from one phase to another."""

    FREE = 0
    """It is known where its client goes on, and no other connection carries the stream."""
    NEWER_LIVES = 1
    """It is known where its client goes on, and another connection carries the stream."""
    SAID = 2
    """What it had to say is in the log."""
    OLDER_ARE_OVER = 3
    """Every turn that it had to wait for is over."""
    NEWER_BEGAN = 4
    """Another connection said `listening` after it."""
    NEWER_ARE_OVER = 5
    """The latest turn is over."""
    HUNG_UP = 6
    """The server closed the connection that carries the stream."""
    LOST = 7
    """The store lost entries of the log."""
    GONE = 8
    """Its client is gone."""


CONNECTION: Final[Mapping[Phase, Mapping[Happening, Phase]]] = {
    Phase.FINDING: {Happening.FREE: Phase.CLAIMING, Happening.NEWER_LIVES: Phase.ASKING},
    Phase.ASKING: {Happening.SAID: Phase.SILENT},
    Phase.CLAIMING: {Happening.SAID: Phase.WAITING},
    Phase.WAITING: {Happening.OLDER_ARE_OVER: Phase.CARRYING},
    Phase.CARRYING: {Happening.NEWER_BEGAN: Phase.LEAVING, Happening.HUNG_UP: Phase.OVER},
    Phase.LEAVING: {Happening.SAID: Phase.SILENT},
    Phase.SILENT: {Happening.NEWER_ARE_OVER: Phase.CLAIMING},
    Phase.OVER: {},
}
"""The next phase. From each but OVER, LOST leads to FINDING and GONE to OVER. Nothing else can happen in a phase."""


def next_phase(phase: Phase, happening: Happening) -> Phase:
    """The phase after this.

    Raises:
        ValueError: It cannot happen in this phase.
    """
    if phase is not Phase.OVER and happening is Happening.LOST:
        return Phase.FINDING
    if happening is Happening.GONE:
        return Phase.OVER
    try:
        return CONNECTION[phase][happening]
    except KeyError:
        raise ValueError(f"{happening.name} cannot happen to a connection that is {phase.name}") from None


class Action(IntEnum):
    """What a connection does."""

    FLUSH = 0
    """Waits until its client has all that was put."""
    FIND = 1
    """Reads the whole log again; says `left` if its turn had begun."""
    ASK = 2
    CLAIM = 3
    AWAIT_OLDER = 4
    """Follows the log until the older turns are over, and finds out where to begin."""
    CARRY = 5
    """Follows the log and puts what is the client's."""
    LEAVE = 6
    AWAIT_NEWER = 7
    """Follows the log until the latest turn is over."""


ON_ENTERING: Final[Mapping[Phase, tuple[Action, ...]]] = {
    Phase.FINDING: (Action.FLUSH, Action.FIND),
    Phase.ASKING: (Action.ASK,),
    Phase.CLAIMING: (Action.CLAIM,),
    Phase.WAITING: (Action.AWAIT_OLDER,),
    Phase.CARRYING: (Action.CARRY,),
    Phase.LEAVING: (Action.FLUSH, Action.LEAVE),
    Phase.SILENT: (Action.AWAIT_NEWER,),
    Phase.OVER: (),
}
"""What a connection does in each phase, in this order. The last of it brings the next phase about."""


class Means(IntEnum):
    """What an event of the log is to a connection."""

    NOTHING = 0
    PUT = 1
    """Its client is to get this message."""
    SKIP = 2
    """A message that its client need not get any more: a server request that is settled."""
    PRIME = 3
    """Its turn begins here: a client that understands it is given the place."""
    CHANGE = 4
    """Its client subscribed or unsubscribed. A connection takes note of that even while another carries the stream."""
    GIVE_WAY = 5
    """A newer turn begins here."""
    HANG_UP = 6
    ANSWER = 7
    """Somebody asks whether it carries the stream: it does."""


CARRIED: Final[Mapping[Kind, tuple[Means, Means, Means]]] = {
    # Where its turn began:  before        there          after
    Kind.MESSAGE: (Means.PUT, Means.NOTHING, Means.PUT),
    Kind.CHANGED: (Means.CHANGE, Means.NOTHING, Means.CHANGE),
    Kind.LISTENING: (Means.NOTHING, Means.PRIME, Means.GIVE_WAY),
    Kind.HANGUP: (Means.NOTHING, Means.NOTHING, Means.HANG_UP),
}
"""What an event is to the connection that carries the stream, by where it stands to the `listening` of its turn.

A message, `listening` and `hang_up` count on the standalone stream alone. Any other event means nothing. To a
connection that carries nothing, `changed` means the same, and all else nothing.
"""

_WHAT_HAPPENED: Final = {Means.GIVE_WAY: Happening.NEWER_BEGAN, Means.HANG_UP: Happening.HUNG_UP}


class Carrier:
    """One connection's part in carrying its session's standalone stream.

    Args:
        node: Where it is.
        named: Its client named the event after which it goes on.

    Attributes:
        phase: What it is up to.
        turns: What the log tells of turns, up to `scanned_to`.
        turn: The name of its own turn; "" if it said nothing of it yet, or has left. Others wait for it to leave.
        position: Of the `listening` that began its turn; beyond every log while none did.
        scanned_to: The last entry of the log that is taken into account.
        resume_after: Position up to which its client had the stream when it came, or when its turn began.
        queued_to: Position up to which the stream was put into the outlet.
        given: The last entries of the stream that its client has.
        last_given: The place that the last event id names which its client was given here.
        lost: The place that its client came with, or was given, if the store has lost that; as text.
        losses: How often the store lost entries of the log.
    """

    __slots__ = (
        "_asked",
        "_carried",
        "_named",
        "_node",
        "_settled",
        "given",
        "last_given",
        "losses",
        "lost",
        "phase",
        "position",
        "queued_to",
        "resume_after",
        "scanned_to",
        "turn",
        "turns",
    )

    def __init__(self, node: str, *, named: bool) -> None:
        self.phase = Phase.FINDING
        self._node = node
        self._named = named
        self.turns = Turns()
        self.turn = ""
        self.position = _NONE
        self._asked = 0
        """Position of its `asking`; 0 if it asked nothing since its last turn."""
        self._carried = False
        """Its turn has come, and its `left`, which says how far it got, is not in the log yet."""
        self.scanned_to = Cursor(0)
        self.resume_after = 0
        self.queued_to = 0
        self.given: deque[Cursor] = deque(maxlen=MAX_PLACES)
        self.last_given: Cursor | None = None
        self.lost: str | None = None
        self.losses = 0
        self._settled: dict[str, None] = {}
        """Keys of server requests that nobody waits for any more, of those that are not carried yet."""

    def happen(self, happening: Happening) -> None:
        """Enters the next phase.

        Raises:
            ValueError: It cannot happen in this phase.
        """
        self.phase = next_phase(self.phase, happening)
        if self.phase is Phase.CARRYING:
            self._carried = True
        elif self.phase is Phase.CLAIMING:
            self._asked = 0

    # ---- where its client goes on

    def begin_after(self, places: Iterable[Cursor], position: int) -> None:
        """Its client has the stream up to this position, and of its entries these, oldest first."""
        self.given = deque((place for place in places if place.position <= position), maxlen=MAX_PLACES)
        self.resume_after = self.queued_to = position

    def scan(self, after: Cursor) -> None:
        """The log is read anew, from this place on."""
        self.scanned_to, self.turns = after, Turns()

    def places(self) -> list[Cursor]:
        """What its client was given, and what was seen of the log, in the log's order: some may still be there."""
        # Of those that were given only the beginning of the tag may be known.
        seen = [*self.given, *self.turns.trail, *([] if self.last_given is None else [self.last_given])]
        return sorted({place.position: place for place in seen}.values())

    def miss(self, own: Cursor | None, found: int | None) -> int | None:
        """Notes what the store lost. Returns the position after which another connection went on that came with the
        same lost place; None if none did, or if no place of this client's is lost.

        Args:
            own: The last place that its client names.
            found: Up to where the store still has what the client has; None if nothing of it is left.
        """
        if own is not None and (found is None or found < own.position):
            self.lost = cursor_text(own)
        return self.turns.found_again(self.lost)

    def found_again(self, delivered_to: int, position: int) -> None:
        """After a loss, the client has the stream up to `position`, or only up to `delivered_to` if that is before."""
        self.given = deque((place for place in self.given if place.position <= position), maxlen=MAX_PLACES)
        self.resume_after = min(delivered_to, position)
        self.queued_to = min(self.queued_to, position)
        self.losses += 1

    # ---- what the log has

    def note(self, event: Event) -> Means:
        """Takes an event of the log into account: the next one, or one that was before. Large ones may be cut off."""
        kind = kind_of(event.data)
        if event.position > self.scanned_to.position:
            self.scanned_to = event.cursor
            self._fold(kind, event)
            if kind is Kind.ASKING and event.position > self.position:
                return Means.ANSWER
        if self.phase is not Phase.CARRYING or kind is None:
            return Means.CHANGE if kind is Kind.CHANGED else Means.NOTHING
        return self._carry(kind, event)

    def _fold(self, kind: Kind | None, event: Event) -> None:
        self.turns.note(event)
        if kind is Kind.REPLY:
            self._settle(glimpse(event.data).get("id"))
        elif kind is Kind.MESSAGE and event.stream == STANDALONE and _CANCELLED in event.data[:MAX_CLIP]:
            self._settle((glimpse(event.data).get("params") or {}).get("requestId"))

    def _settle(self, request_id: RequestId | None) -> None:
        """A server request was answered, or given up. The latest are kept, while it may still have to be carried."""
        if request_id is None:
            return
        self._settled[request_key(request_id)] = None
        if len(self._settled) > _SETTLED:
            del self._settled[next(iter(self._settled))]

    def _carry(self, kind: Kind, event: Event) -> Means:
        if kind not in CARRIED or (event.stream != STANDALONE and kind is not Kind.CHANGED):
            means = Means.NOTHING
        else:
            where = (event.position > self.position) - (event.position < self.position)
            means = CARRIED[kind][where + 1]
        if means in _WHAT_HAPPENED:
            self.happen(_WHAT_HAPPENED[means])
        elif means is Means.PUT and self._is_settled(event):
            means = Means.SKIP
        if event.position == self.scanned_to.position:
            # Replies come after their requests.
            self._settled.clear()
        return means

    def _is_settled(self, event: Event) -> bool:
        """Whether this is a server request that was answered, or given up, further on in the log."""
        if not self._settled or b'"id"' not in event.data:
            return False
        message = decode(event.data)
        return "method" in message and "id" in message and request_key(message["id"]) in self._settled

    def queued(self, event: Event, means: Means) -> None:
        """The connection has done what this event means to it."""
        if means in (Means.PUT, Means.SKIP):
            self.queued_to = event.position
        if means in (Means.PUT, Means.SKIP, Means.PRIME):
            self.given.append(event.cursor)

    # ---- whose turn it is

    def newer(self) -> Turn | None:
        """The latest turn, while it is not over."""
        self.turns.forget()
        turn = self.turns.latest
        return None if turn is None or turn.left else turn

    def awaited(self) -> Turn | None:
        """The turn that must be over, or seen in the log, before this connection goes on. None if it need not wait."""
        if self.phase is not Phase.WAITING:
            return self.newer()
        if self.scanned_to.position < self.position:
            return Turn(self.turn, self._node, self.position, 0)
        return None if self._named else self.turns.open_before(self.position)

    def expects_word_of(self, turn: Turn) -> bool:
        """Whether a connection that lives says something about its turn now: that it left, or that it carries."""
        return self.phase is Phase.WAITING or turn.last_seen < self._asked

    def where_to_begin(self) -> int:
        """Up to where its client has the stream, as far as is known."""
        if not self._named:
            return max(self.queued_to, self.turns.delivered_before(self.position))
        # What others carried, a client that names an event need not have had. But one that came with the same lost
        # place to another node went on first.
        found = self.turns.found_again(self.lost)
        return self.queued_to if found is None else min(self.queued_to, found)

    def heard_before(self, at_first: Cursor) -> Cursor:
        """Up to where its client has heard the cluster log, by what other connections say: not beyond.

        Args:
            at_first: Up to where it need not hear it, if no other connection carried the stream.
        """
        return NOWHERE if self._named else self.turns.heard_before(self.position) or at_first

    # ---- what it says

    def asked(self, position: int) -> None:
        """Its `asking` is in the log."""
        self._asked = position
        self.happen(Happening.SAID)

    def claim(self, name: str, heard: Cursor | None) -> dict[str, Any]:
        """What its `listening` says.

        Args:
            name: Of its turn, if it has none yet.
            heard: Up to where its client has heard the cluster log; None if not all of it.
        """
        self.turn = self.turn or name
        self.position = _NONE
        body = {"listener": self.turn, "node": self._node, "since": self.where_to_begin(), "heard": cursor_text(heard)}
        return body if self.lost is None else body | {"lost": self.lost}

    def claimed(self, position: int) -> None:
        """Its `listening` is in the log."""
        self.position = position
        self.happen(Happening.SAID)

    def begin(self) -> None:
        """It is known where its turn goes on."""
        self.resume_after = self.queued_to = self.where_to_begin()
        self.lost = None
        if not self.given:
            self.given.extend(place for place in self.turns.trail if place.position <= self.resume_after)

    def leave(self, delivered_to: int, heard: Cursor) -> dict[str, Any]:
        """What its `left` says: nothing is known of what it carried if its turn never came.

        Args:
            delivered_to: Up to where its client has the stream.
            heard: Up to where its client has heard the cluster log.
        """
        if not self._carried:
            return {"listener": self.turn, "read": None, "heard": None}
        body = {"listener": self.turn, "read": delivered_to, "heard": cursor_text(heard)}
        # Should the store have lost that entry, this connection may not know it yet.
        tag = self.turns.tag_at(delivered_to)
        return body if tag is None else body | {"tag": tag.hex()}

    def left(self) -> None:
        """Nobody waits for its turn any more."""
        self.turn, self._carried, self.position = "", False, _NONE
