"""What a stream is up to, as the events of its log tell. Pure: no clock, no I/O.

The rules, which every node and every version of nonstick keeps:

1. A stream begins with `opened`, and its position in the log is the stream's name. `opened` says which node runs the
   request, and which attempt at it that is.
2. If `opened` says `relay`, no node runs the request yet. The owner of the session is to run it, and says `taken`.
3. `taken` says that another node runs the request now, as another attempt. The store takes events of the latest
   attempt only.
4. `terminal` is the answer, and the last event. The store takes none after it.
5. Messages go to the client. `hang_up` closes the connections that carry the stream at that time, and no later ones.
6. `probe` asks whether the request still runs, and `alive` says so. Neither says anything of the stream itself.
7. A kind that a version does not know says nothing to it.

The log of a stream may have lost its beginning, where a store lost entries: then nothing is known of it, but its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from mcp_types import RequestId

from nonstick.core.events import Kind, decode, glimpse, kind_of
from nonstick.core.jsonrpc import request_key
from nonstick.store import MAX_CLIP, Cursor, Event, Skimmed

__all__ = [
    "NEXT",
    "OBSERVED",
    "READ",
    "History",
    "Life",
    "Meaning",
    "Reading",
    "Sketch",
    "State",
    "Unfinished",
    "next_state",
    "reading",
]


class State(IntEnum):
    """What a stream is up to."""

    UNKNOWN = 0
    """Its beginning was not seen, or not yet."""
    RELAYED = 1
    """The owner of its session is to run its request."""
    RUNNING = 2
    """Some node runs its request."""
    ENDED = 3
    """Its request has its answer."""


NEXT: Final[Mapping[State, Mapping[Kind, State]]] = {
    State.UNKNOWN: {Kind.OPENED: State.RUNNING, Kind.TERMINAL: State.ENDED},
    State.RELAYED: {Kind.TAKEN: State.RUNNING, Kind.TERMINAL: State.ENDED},
    State.RUNNING: {Kind.TERMINAL: State.ENDED},
    State.ENDED: {},
}
"""The state after an event of this kind, where that is another one. An `opened` that says `relay` leads to RELAYED."""


def next_state(state: State, kind: Kind | None) -> State:
    """The state of a stream after an event of this kind; None for one that this version does not know."""
    return state if kind is None else NEXT[state].get(kind, state)


class Reading(IntEnum):
    """What a connection does with an event of the stream that it resumes."""

    SKIP = 0
    NOTE = 1
    """Another node runs the request now. Nothing goes to the client."""
    PUT = 2
    PUT_AND_END = 3
    END = 4


READ: Final[Mapping[Kind, tuple[Reading, Reading]]] = {
    Kind.MESSAGE: (Reading.SKIP, Reading.PUT),
    Kind.TERMINAL: (Reading.END, Reading.PUT_AND_END),
    Kind.HANGUP: (Reading.SKIP, Reading.END),
    Kind.TAKEN: (Reading.NOTE, Reading.NOTE),
}
"""By an event's kind: what a client that resumes gets of it where it lies up to its place, and where after that."""


def reading(event: Event, *, place: int, came: int) -> Reading:
    """What a connection does with this event of the stream that it resumes.

    Args:
        place: Position of the last event that its client has.
        came: Position of the log's end when it came: an older `hang_up` was meant for the connections of then.
    """
    kind = kind_of(event.data)
    if kind is None or kind not in READ:
        return Reading.SKIP
    before, after = READ[kind]
    if event.position <= place or (kind is Kind.HANGUP and event.position <= came):
        return before
    return after


class Meaning(IntEnum):
    """What an event of a stream means to the node that runs its request, and did not write the event itself."""

    NOTHING = 0
    IS_ASKED = 1
    """Somebody asks whether the request still runs."""
    IS_OVER = 2
    """The stream has ended, or another node has it."""


OBSERVED: Final[Mapping[Kind, Meaning]] = {
    Kind.PROBE: Meaning.IS_ASKED,
    Kind.TERMINAL: Meaning.IS_OVER,
    Kind.TAKEN: Meaning.IS_OVER,
}
"""By an event's kind. But a `taken` of the node's own attempt, or an earlier one, means nothing to it."""


@dataclass(slots=True)
class Life:
    """A stream whose beginning was seen: its request, and the node that is to answer it.

    Attributes:
        request: The JSON-RPC request, as `opened` has it.
        request_id: The id under which its answer goes out.
        node: The node that runs it, or that received it if it was relayed.
        attempt: The latest attempt at it.
    """

    state: State
    request: Mapping[str, Any]
    request_id: RequestId
    node: str
    attempt: int

    @classmethod
    def begun(cls, opened: Mapping[str, Any]) -> Life:
        """As this body of `opened` tells it.

        Raises:
            LookupError, TypeError: No release writes such a body.
        """
        state = State.RELAYED if "relay" in opened else State.RUNNING
        request = opened["request"]
        return cls(state, request, request["id"], opened["node"], opened["attempt"])

    @property
    def is_relayed(self) -> bool:
        """The owner of its session is to run the request, and was not seen to do so yet."""
        return self.state == State.RELAYED

    def note(self, event: Event) -> None:
        """Takes an event of this stream, in the order of the log."""
        kind = kind_of(event.data)
        self.state = next_state(self.state, kind)
        if kind is Kind.TAKEN:
            body = decode(event.data)
            self.node, self.attempt = body["node"], body["attempt"]


@dataclass(slots=True)
class Sketch:
    """A stream that has not ended, of which the events were only skimmed.

    Attributes:
        opened: Its first event.
        taken: The last event by which a node took it over.
    """

    opened: Skimmed
    taken: Skimmed | None = None

    @property
    def node(self) -> str:
        """The node that runs its request, or that received it; "" if its event does not tell."""
        return str(glimpse((self.taken or self.opened).event.data).get("node", ""))


class Unfinished:
    """The streams of a log that have not ended.

    Attributes:
        head: Up to where the log was taken into account.
        streams: By their names, the oldest first.
    """

    def __init__(self) -> None:
        self.head = Cursor(0)
        self.streams: dict[int, Sketch] = {}

    def take(self, entries: Iterable[Skimmed]) -> None:
        """Takes the next events of the log, of which the first two bytes are enough."""
        for entry in entries:
            event = entry.event
            self.head = event.cursor
            kind = kind_of(event.data)
            sketch = self.streams.get(event.stream)
            if kind is Kind.OPENED and event.stream == event.position:
                self.streams[event.stream] = Sketch(entry)
            elif sketch is None:
                continue
            elif kind is Kind.TAKEN:
                sketch.taken = entry
            elif next_state(State.RUNNING, kind) == State.ENDED:
                del self.streams[event.stream]


_METHOD: Final = b'"method"'


class History:
    """What a node has to know of a stream to end it for the lost node that ran its request.

    Attributes:
        life: The request, and the node that is to answer it.
        first_attempt: The attempt that `opened` names.
        is_partial: `opened` holds the request without its arguments.
        trace: What the request's spans belong to (P18).
        is_cancelled: The client cancelled the request.
        unanswered: Keys of the server requests that the handler made, and that no reply was taken for.
    """

    def __init__(self, opened: Event) -> None:
        body = decode(opened.data)
        self.stream = opened.position
        self.life = Life.begun(body)
        self.first_attempt = self.life.attempt
        self.is_partial = bool(body.get("partial"))
        self.trace: dict[str, str] = body.get("trace", {})
        self.is_cancelled = False
        self.unanswered: set[str] = set()

    @staticmethod
    def wants_whole(event: Event) -> bool:
        """Whether `note` needs all of this event's data, and not only its beginning."""
        return kind_of(event.data) in (Kind.TAKEN, Kind.CANCEL)

    def note(self, event: Event) -> None:
        """Takes any event of the log that came after `opened`. A large one that is not wanted whole may be cut off."""
        kind = kind_of(event.data)
        if kind is Kind.CANCEL:
            key = request_key(decode(event.data)["requestId"])
            self.is_cancelled |= key == request_key(self.life.request_id)
        elif kind is Kind.REPLY:
            if self.unanswered:
                self.unanswered.discard(request_key(glimpse(event.data).get("id", "")))
        elif event.stream == self.stream:
            self._note_own(kind, event)

    def _note_own(self, kind: Kind | None, event: Event) -> None:
        if kind is not Kind.MESSAGE:
            self.life.note(event)
        elif _METHOD in event.data[:MAX_CLIP]:
            body = glimpse(event.data)
            if "method" in body and "id" in body:
                self.unanswered.add(request_key(body["id"]))
