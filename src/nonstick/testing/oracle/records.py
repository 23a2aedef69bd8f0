"""What a history is made of: what clients sent and got, and what the tools ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
