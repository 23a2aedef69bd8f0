"""How what a connection has to do with is written on a tape."""

from __future__ import annotations

import hashlib
from typing import Any

from mcp.shared import subscriptions

from nonstick.core.broadcasts import Broadcast, Broadcasts
from nonstick.session.outlet import Mark
from nonstick.store import Cursor, Event

__all__ = [
    "broadcasts_form",
    "broadcasts_of",
    "cursor_form",
    "cursor_of",
    "digest",
    "event_form",
    "event_of",
    "mark_form",
    "mark_of",
]


def digest(frame: bytes) -> str:
    return hashlib.blake2b(frame, digest_size=8).hexdigest()


def cursor_form(cursor: Cursor) -> Any:
    return [cursor.position, cursor.tag.hex()]


def cursor_of(form: Any) -> Cursor:
    return Cursor(form[0], bytes.fromhex(form[1]))


def event_form(event: Event) -> Any:
    return [event.position, event.tag.hex(), event.stream, event.data.decode("latin-1")]


def event_of(form: Any) -> Event:
    return Event(form[0], bytes.fromhex(form[1]), form[2], form[3].encode("latin-1"))


def mark_form(mark: Mark) -> Any:
    return [mark.position, cursor_form(mark.heard), mark.losses]


def mark_of(form: Any) -> Mark:
    return Mark(form[0], cursor_of(form[1]), form[2])


def broadcasts_form(found: Broadcasts) -> Any:
    tags = [[position, tag.hex()] for position, tag in found._tags.items()]
    latest = [
        [type(what).__name__, getattr(what, "uri", None), cursor_form(one.cursor)]
        for what, one in found._latest.items()
    ]
    return {"head": cursor_form(found.head), "tags": tags, "latest": latest}


def broadcasts_of(form: Any) -> Broadcasts:
    found = Broadcasts(2000, cursor_of(form["head"]))
    found._tags = {position: bytes.fromhex(tag) for position, tag in form["tags"]}
    for name, uri, cursor in form["latest"]:
        what = getattr(subscriptions, name)(**({} if uri is None else {"uri": uri}))
        found._latest[what] = Broadcast.of(what, cursor_of(cursor))
    return found
