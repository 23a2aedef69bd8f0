"""What the bytes in a log mean, and how a place in a stream looks on the wire. Pure: no clock, no I/O.

An event's data is a version byte, a kind byte and a JSON body. A reader passes over a kind that it does not know,
so that a newer version may add kinds (P12). The body of a message is kept as the exact bytes that go to the client:
it is serialised once, by the node that sent it.
"""

from __future__ import annotations

import re
import secrets
from enum import IntEnum
from typing import Any, Final, NamedTuple

import pydantic_core

from nonstick.store import Cursor, Draft

__all__ = ["EventId", "Kind", "decode", "draft", "kind_of", "parse_event_id"]

_VERSION: Final = b"1"


class Kind(IntEnum):
    """The kinds of events, each by its byte."""

    OPENED = ord("o")
    """A POST became a stream. Body: `{"node", "attempt", "request"}`."""
    MESSAGE = ord("m")
    """A JSON-RPC message to the client, on this event's stream. Body: the message."""
    TERMINAL = ord("t")
    """The JSON-RPC response that ends the stream. Body: the message."""
    TAKEN = ord("a")
    """Another node took the stream over. Body: `{"node", "attempt"}`."""
    HANGUP = ord("h")
    """Connections that carry this stream are to be closed; the client comes back. No body."""
    REPLY = ord("r")
    """The client's response to a server request. Body: the message."""
    PROGRESS = ord("p")
    """The client's progress on a server request. Body: the notification's params."""
    CANCEL = ord("c")
    """The client cancelled a request. Body: the notification's params."""
    LISTENING = ord("l")
    """A connection to the standalone stream opened. Body: `{"listener", "node"}`."""
    LEFT = ord("x")
    """That connection went. Body: `{"listener", "read"}`: the last position that it had written out."""


def draft(kind: Kind, body: bytes = b"") -> Draft:
    """An event of this kind, ready to append, under a new random tag."""
    return Draft(secrets.token_bytes(8), _VERSION + bytes((kind,)) + body)


def kind_of(data: bytes) -> Kind | None:
    """The kind of these event bytes, or None if this version does not know it."""
    if data[:1] != _VERSION or len(data) < 2:
        return None
    try:
        return Kind(data[1])
    except ValueError:
        return None


def body_of(data: bytes) -> bytes:
    """The body in these event bytes."""
    return data[2:]


def decode(data: bytes) -> dict[str, Any]:
    """The JSON object in these event bytes."""
    body: dict[str, Any] = pydantic_core.from_json(data[2:])
    return body


class EventId(NamedTuple):
    """A stream and a place in the log: what an SSE `id` says. Opaque to clients; the tag makes it unguessable.

    Attributes:
        stream: The stream that the client was reading.
        cursor: The entry that it has.
    """

    stream: int
    cursor: Cursor

    def __str__(self) -> str:
        return f"1.{self.stream:x}.{self.cursor.position:x}.{self.cursor.tag.hex()}"


_EVENT_ID: Final = re.compile(r"1\.([0-9a-f]{1,15})\.([0-9a-f]{1,15})\.((?:[0-9a-f]{16})?)")


def parse_event_id(text: str) -> EventId | None:
    """The place that an SSE `id` names, or None if we never wrote it. Only position 0 goes without a tag."""
    match = _EVENT_ID.fullmatch(text)
    if match is None:
        return None
    stream, position, tag = int(match[1], 16), int(match[2], 16), bytes.fromhex(match[3])
    if (position == 0) != (not tag) or stream > position:
        return None
    return EventId(stream, Cursor(position, tag))
