"""What the bytes in a log mean. Pure: no clock, no I/O.

An event's data is a version byte, a kind byte and a JSON body. A reader passes over a kind that it does not know,
so that a newer version may add kinds (P12). The body of a message is kept as the exact bytes that go to the client:
it is serialised once, by the node that sent it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import pydantic_core

from nonstick.core.names import new_tag
from nonstick.store import MAX_CLIP, Draft

__all__ = ["Kind", "body_of", "decode", "draft", "glimpse", "kind_of"]

_VERSION: Final = b"1"


class Kind(IntEnum):
    """The kinds of events, each by its byte."""

    OPENED = ord("o")
    """A POST became a stream. Body: `{"node", "attempt", "request"}`. With `"relay"` (`{"http", "since", "version"}`)
    its session's owner is to run the request, once it took the stream over. With `"partial"` the request stands there
    without its arguments, and cannot be run again."""
    MESSAGE = ord("m")
    """A JSON-RPC message to the client, on this event's stream. Body: the message."""
    TERMINAL = ord("t")
    """The JSON-RPC response that ends the stream. Body: the message."""
    TAKEN = ord("a")
    """Another node took the stream over. Body: `{"node", "attempt"}`."""
    PROBE = ord("q")
    """A node whose client resumed this stream asks whether its request still runs. No body."""
    ALIVE = ord("v")
    """The request still runs: the answer to `probe`. No body."""
    HANGUP = ord("h")
    """Connections that carry this stream are to be closed; the client comes back. No body."""
    REPLY = ord("r")
    """The client's response to a server request. Body: the message."""
    PROGRESS = ord("p")
    """The client's progress on a server request. Body: the notification's params."""
    CANCEL = ord("c")
    """The client cancelled a request. Body: the notification's params."""
    LISTENING = ord("l")
    """A connection carries the standalone stream from here on. Body: `{"listener", "node", "since", "heard"}`: a name
    for this turn of it, the position up to which its client is known to have the stream, and the cursor up to which it
    is known to have heard the cluster log (null if nothing is known)."""
    PUBLISHED = ord("b")
    """In the cluster log: something changed that clients may have subscribed to. Body: `{"method", "uri"}`."""
    KEYS = ord("k")
    """In the cluster log: its record has other `requestState` keys now. No body."""
    ASKING = ord("w")
    """A connection asks whether another carries the standalone stream. Body: `{"listener", "node"}`: null, and where it
    is. A node of version 0.1.0 may name the turn that it will begin if none does."""
    CARRYING = ord("y")
    """The answer to `asking`: this turn is not over. Body: `{"listener"}`."""
    LEFT = ord("x")
    """This turn is over. Body: `{"listener", "read", "heard"}`: the last position that its connection had written out,
    null if none, and the cursor in the cluster log up to which it had written out broadcasts."""
    OWNER = ord("n")
    """The session has another owner now. Body: `{"node"}`, which is empty where an owner gave it up."""
    NOTICE = ord("i")
    """A notification of the client's, for the owner's handler. Body: `{"notification", "http"}`."""
    CHANGED = ord("d")
    """The session record changed in a way that other nodes have to know of at once. Body: `{"level"}`,
    `{"subscribed", "heard"}` (a URI, and a cursor in the cluster log from before) or `{"unsubscribed"}`."""


_KINDS: Final = {kind.value: kind for kind in Kind}


def draft(kind: Kind, body: bytes = b"") -> Draft:
    """An event of this kind, ready to append, under a new random tag."""
    return Draft(new_tag(), _VERSION + bytes((kind,)) + body)


def kind_of(data: bytes) -> Kind | None:
    """The kind of these event bytes, or None if this version does not know it."""
    if data[:1] != _VERSION or len(data) < 2:
        return None
    return _KINDS.get(data[1])


def body_of(data: bytes) -> bytes:
    """The body in these event bytes."""
    return data[2:]


def decode(data: bytes) -> dict[str, Any]:
    """The JSON object in these event bytes."""
    body: dict[str, Any] = pydantic_core.from_json(data[2:])
    return body


def glimpse(data: bytes) -> dict[str, Any]:
    """The JSON object in these event bytes as far as their beginning tells it, also if they were cut off there.

    For large events, of which only what stands first is wanted. What was cut is not there, or is the beginning of a
    number.
    """
    body: dict[str, Any] = pydantic_core.from_json(data[2 : 2 + MAX_CLIP], allow_partial=True)
    return body
