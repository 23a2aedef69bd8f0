"""Event ids: how a place in a stream looks on the wire. Pure: no clock, no I/O."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from functools import lru_cache
from typing import Final, NamedTuple

from mcp_types import RequestId

from nonstick.core import places
from nonstick.store import STANDALONE, Cursor

__all__ = ["MAX_REQUEST_ID", "EventId", "cursor_text", "parse_cursor", "parse_event_id"]


class EventId(NamedTuple):
    """A stream and a place in the log: what an SSE `id` says, opaque to clients.

    The text is bound to its session by a keyed hash, so that an id of another session, or one that somebody made up,
    is told from one whose entry the store has lost since. The entry's tag then tells the latter (P3, P9).

    Attributes:
        stream: The stream that the client was reading.
        cursor: The entry that it has.
        request: Id of the stream's request, so that even a stream that was lost can be ended with an error for it.
            None on the standalone stream, and for an id of more than `MAX_REQUEST_ID` characters.
        heard: On the standalone stream, up to where the client has heard the cluster log. None if that is not known,
            as to version 0.1.
        told: On the standalone stream, while a client that may have missed anything is told of everything: what was
            last, of all there was at `heard`. "" if it is told of nothing, or has been.
        before: On the standalone stream, the messages before this place, the latest ones, oldest first: should the
            store lose this place, they tell up to where it still has what the client has. Their tags are cut short.
    """

    stream: int
    cursor: Cursor
    request: RequestId | None = None
    heard: Cursor | None = None
    told: str = ""
    before: tuple[Cursor, ...] = ()

    def seal(self, session_id: str) -> str:
        """The SSE `id` for this place in this session."""
        # In the field that streams of requests have their request's id in: 0.1 reads both, and gives both back (P12).
        if self.stream == STANDALONE:
            request = _pack_text(self._text())
        else:
            # What is too long is not kept here either (P10).
            long = type(self.request) is str and len(self.request) > MAX_REQUEST_ID
            request = "" if long else _pack(self.request)
        text = f"1.{self.stream:x}.{self.cursor.position:x}.{self.cursor.tag.hex()}.{request}"
        return f"{text}.{_mac(text, session_id)}"

    def _text(self) -> str:
        """What the id of a place on the standalone stream says beside the place: `heard!told~before`."""
        heard = cursor_text(self.heard) or ""
        if self.told:
            heard += f"!{self.told}"
        room = MAX_REQUEST_ID - len('""~') - len(heard)
        before = places.pack(self.before, self.cursor.position, room)
        return f"{heard}~{before}" if before else heard


MAX_REQUEST_ID: Final = 128
"""Characters of a request id, as JSON, that an event id carries."""

_LARGEST_NUMBER: Final = 2**63
"""No request's id is as large (`jsonrpc.check_names`)."""

_EVENT_ID: Final = re.compile(
    r"(1\.([0-9a-f]{1,15})\.([0-9a-f]{1,15})\.([0-9a-f]{16})\.([A-Za-z0-9_-]{0,700}))\.([0-9a-f]{16})"
)


def parse_event_id(text: str, session_id: str) -> EventId | None:
    """The place that an SSE `id` names, or None if we never sent it in this session.

    A client has its session's id, and so can make up text whose hash is right. What such text says is held to be what
    `seal` would have written, to the letter.
    """
    match = _EVENT_ID.fullmatch(text)
    if match is None or not hmac.compare_digest(match[6], _mac(match[1], session_id)):
        return None
    stream, cursor = int(match[2], 16), Cursor(int(match[3], 16), bytes.fromhex(match[4]))
    try:
        packed = _unpack(match[5]) if match[5] else None
        found = _standalone(cursor, packed) if stream == STANDALONE else EventId(stream, cursor, packed)
    except (ValueError, RecursionError):
        return None
    # A stream is named by its first event.
    return found if cursor.position >= max(stream, 1) and found.seal(session_id) == text else None


def _standalone(cursor: Cursor, packed: object) -> EventId:
    """The event id of a place on the standalone stream, of which `packed` says all but the place.

    Raises:
        ValueError: `packed` says what no event id says.
    """
    heard, _, before = packed.partition("~") if isinstance(packed, str) else ("", "", "")
    heard, _, told = heard.partition("!")
    before_it = places.unpack(before, cursor.position)
    return EventId(STANDALONE, cursor, heard=parse_cursor(heard), told=told, before=before_it)


def cursor_text(cursor: Cursor | None) -> str | None:
    """A cursor as text, for JSON; None for one that is before everything, or for none."""
    if cursor is None or cursor.position < 0:
        return None
    return f"{cursor.position:x}.{cursor.tag.hex()}"


_CURSOR: Final = re.compile(r"([0-9a-f]{1,15})\.((?:[0-9a-f]{2}){0,8})")


def parse_cursor(text: object) -> Cursor | None:
    """The cursor in this text; None if there is none in it."""
    match = _CURSOR.fullmatch(text) if isinstance(text, str) else None
    return None if match is None else Cursor(int(match[1], 16), bytes.fromhex(match[2]))


def _mac(text: str, session_id: str) -> str:
    key = session_id.encode()[:64]
    return hashlib.blake2b(text.encode(), key=key, digest_size=8, person=b"nonstick-eventid").hexdigest()


@lru_cache(maxsize=256, typed=True)
def _pack(request: RequestId | None) -> str:
    # Each event of a stream says it.
    text = "" if request is None else json.dumps(request)
    return _base64(text) if len(text) <= MAX_REQUEST_ID else ""


def _pack_text(text: str) -> str:
    return _base64(f'"{text}"') if text else ""


def _base64(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def _unpack(text: str) -> RequestId:
    """The request id in this text.

    Raises:
        ValueError, RecursionError: There is none in it.
    """
    request = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    if isinstance(request, bool) or not isinstance(request, str | int):
        raise ValueError("no request id")
    if isinstance(request, int) and abs(request) >= _LARGEST_NUMBER:
        raise ValueError("a number that no request is counted with")
    if isinstance(request, str):
        request.encode()  # not with half of a surrogate pair, which no body could hold
    return request
