"""Where a client of the standalone stream goes on after the store lost entries, by the log and its event id (P9).

A store that lost the end of its log gives the same positions to other entries. What tells them apart is the tag. So an
event id names, beside the client's own place, the messages before it, each by its position and a part of its tag: the
latest of them that is still in the log is where the client goes on. The client has that message and all before it. It
has nothing of what stands behind it, which came after the loss. Pure: no clock, no I/O.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from nonstick.store import STANDALONE, Cursor, Event

__all__ = ["MAX_PLACES", "Search", "pack", "unpack"]

MAX_PLACES: Final = 16
"""Earlier messages that an event id names, at most: so many may be lost at once, and still each is known."""

_PLACE: Final = struct.Struct(">H3s")
"""How many positions a place is before the next one, and the beginning of its tag."""


def pack(places: Sequence[Cursor], before: int, room: int) -> str:
    """These places, oldest first, as text of at most so many characters; of those before a position, the latest."""
    found: list[bytes] = []
    most = min(MAX_PLACES, room * 3 // 4 // _PLACE.size)
    for place in reversed(places):
        distance = before - place.position
        if distance <= 0:
            continue
        if len(found) == most or distance > 0xFFFF:
            break
        found.append(_PLACE.pack(distance, place.tag))
        before = place.position
    return base64.urlsafe_b64encode(b"".join(found)).rstrip(b"=").decode()


def unpack(text: str, before: int) -> tuple[Cursor, ...]:
    """The places in this text, oldest first. Each has the beginning of its tag only.

    Raises:
        ValueError: It is no such text.
    """
    found: list[Cursor] = []
    try:
        for distance, tag in _PLACE.iter_unpack(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))):
            before -= distance
            found.append(Cursor(before, tag))
    except struct.error as error:
        raise ValueError(str(error)) from None
    if before < 0:
        raise ValueError("a place before the beginning")
    return tuple(reversed(found))


class Search:
    """Looks through a whole log, from its beginning, for the latest of some places.

    Args:
        places: Each with its tag, or the beginning of it. A client that has one of them has all that was before it.
    """

    def __init__(self, places: Iterable[Cursor]) -> None:
        self._tags: Mapping[int, bytes] = {place.position: place.tag for place in places}
        self._found: dict[int, bool] = {}
        """By the position of a place: whether the entry that the log has there is the same."""
        self._oldest: int | None = None
        """Position of the oldest entry that is left of the standalone stream."""

    def note(self, event: Event) -> None:
        """Takes the next entry of the log into account."""
        if self._oldest is None and event.stream == STANDALONE:
            self._oldest = event.position
        if (tag := self._tags.get(event.position)) is not None:
            self._found[event.position] = event.tag.startswith(tag)

    def latest(self, head: int) -> int | None:
        """The position of the latest of the places that the log has, or had until it was trimmed; None if of none.

        Args:
            head: Position of the last entry that was ever appended.
        """
        return next((position for position in sorted(self._tags, reverse=True) if self._is_there(position, head)), None)

    def _is_there(self, position: int, head: int) -> bool:
        if position in self._found:
            return self._found[position]
        # The standalone stream is trimmed from its beginning.
        return position <= head and (self._oldest is None or position < self._oldest)

    def new_after(self, head: int) -> int:
        """Where none of the places is there: a position behind which all is certainly new."""
        return min([head, *(position - 1 for position in self._tags)])
