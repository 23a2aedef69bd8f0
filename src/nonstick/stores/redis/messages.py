"""What the scripts take and answer, as bytes, and what the store's callers know: from one to the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from nonstick.errors import StoreUnavailable
from nonstick.store import Batch, Cursor, Event, Loaded, News
from nonstick.stores.redis.sockets import Arg

__all__ = [
    "batch_arguments",
    "ends_at",
    "flat",
    "groups_in",
    "loaded_from",
    "milliseconds",
    "news_in",
    "position_of",
    "split",
]

_NO_HEAD: Final = Cursor(0)
_NO_CANCELS: Final[frozenset[str]] = frozenset()


def milliseconds(seconds: float) -> int:
    """For the server, which takes whole ones and nothing below one."""
    return max(1, math.ceil(seconds * 1000))


def flat(pairs: Mapping[str, Any]) -> list[Arg]:
    """Name, value, name, value."""
    return [part for pair in pairs.items() for part in pair]


def split(fields: Mapping[str, bytes | None]) -> tuple[dict[str, bytes], list[str]]:
    """Those with a value, and the names of those with None."""
    values = {name: value for name, value in fields.items() if value is not None}
    return values, [name for name, value in fields.items() if value is None]


def groups_in(groups: bytes) -> list[str]:
    """The names of a session's groups, as its record keeps them: one a line."""
    return groups.decode().split("\n") if groups else []


def _optional(name: str | None) -> str:
    return "" if name is None else "=" + name


def batch_arguments(batch: Batch) -> list[Arg]:
    """The batch as append.lua takes it, after the channel."""
    more = _more_of(batch)
    flags = ("t" if batch.take_over else "") + ("e" if batch.terminal else "") + ("x" if more else "")
    args: list[Arg] = [batch.writer, batch.sequence, batch.stream, batch.attempt, flags, *more]
    for event in batch.events:
        args += event
    return args


def _more_of(batch: Batch) -> list[Arg]:
    """The parts that few batches have, as append.lua takes them; empty without any."""
    names = (batch.answers, batch.settle, batch.cancel, batch.uncancel)
    if names == (None, None, None, None) and not batch.expect and not batch.fields:
        return []
    sets, removes = split(batch.fields)
    return [*map(_optional, names), len(batch.expect), len(sets), len(removes), *batch.expect, *flat(sets), *removes]


def position_of(entry: bytes) -> int:
    """Of an entry in the log, whose name begins with "0-"."""
    return int(entry[2:])


_FIELDS: Final[Mapping[bytes, str]] = {
    b"f" + name.encode(): name
    for name in (
        "v",
        "protocol",
        "client",
        "principal",
        "heard",
        "initialized",
        "unconfirmed",
        "owner",
        "level",
        "changed",
    )
}
"""Fields that many records have, by their names in the store: they need not be decoded each time."""


def loaded_from(now: int, pairs: list[bytes]) -> Loaded:
    """The record as shared.lua describes it. What a newer version may have added is passed over (P12)."""
    fields: dict[str, bytes] = {}
    head, size, count = _NO_HEAD, 0, 0
    cancels = _NO_CANCELS
    parts = iter(pairs)
    for name, value in zip(parts, parts, strict=True):
        if (known := _FIELDS.get(name)) is not None:
            fields[known] = value
        elif name == b"#h":
            position, *books, tag = value.split(b" ", 3)
            head = Cursor(int(position), tag)
            size, count = map(int, books)
        elif name[:1] == b"f":
            fields[name[1:].decode()] = value
        elif name[:2] == b"#c" and int(value) > now:
            cancels |= {name[2:].decode()}
    return Loaded(fields, head, cancels, size, count)


def ends_at(place: Cursor, record: list[bytes | None] | StoreUnavailable, books: int | StoreUnavailable) -> bool:
    """Whether a log certainly ends at this place.

    Args:
        record: The values of #x, #h and #b in the session's record, as shared.lua describes them.
        books: Whether the books are there, 0 or 1.
    """
    if isinstance(record, StoreUnavailable) or isinstance(books, StoreUnavailable):
        return False
    span, head, kept = record
    if span is None or (kept is not None and not books):
        # The session is gone; or its books were evicted, which the next read finds out.
        return False
    if head is None:
        return place.position == 0
    position, _, _, tag = head.split(b" ", 3)
    return int(position) == place.position and (not place.tag or tag == place.tag)


def news_in(message: bytes) -> News | None:
    """What append.lua put into its message, or None: something happened, read."""
    header, found, body = message.partition(b"\n")
    numbers = header.split()
    if not found or numbers[0] != b"2":
        return None
    try:
        first, stream, at, *sizes = map(int, numbers[1:])
        events = _events(first, stream, sizes, body[at:])
    except ValueError:
        return None  # append.lua has not written this
    return News(Cursor(first - 1, body[:at]), events)


def _events(first: int, stream: int, sizes: list[int], body: bytes) -> list[Event]:
    events: list[Event] = []
    at = 0
    for tag_size, data_size in zip(sizes[::2], sizes[1::2], strict=True):
        middle = at + tag_size
        end = middle + data_size
        events.append(Event(first + len(events), body[at:middle], stream, body[middle:end]))
        at = end
    return events
