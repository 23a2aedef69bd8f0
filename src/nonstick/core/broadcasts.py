"""What was broadcast, as every node has it in memory: the cluster log, read once for all connections there (P11).

A broadcast says that something changed, and its client looks again: two broadcasts of one thing say no more than one.
So of each thing only the latest is kept, and a client that was away for long hears of each thing once.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from mcp.shared.subscriptions import (
    PromptsListChanged,
    ResourcesListChanged,
    ResourceUpdated,
    ServerEvent,
    ToolsListChanged,
)

from nonstick.core.jsonrpc import notification_body
from nonstick.store import Cursor, Event

__all__ = ["LISTS", "METHODS", "NOWHERE", "Broadcast", "Broadcasts"]

NOWHERE: Final = Cursor(-1)
"""A place that the cluster log no longer has: all that was broadcast may have been missed."""

_BEGINNING: Final = Cursor(0)

METHODS: Final[dict[type[ServerEvent], str]] = {
    ToolsListChanged: "notifications/tools/list_changed",
    PromptsListChanged: "notifications/prompts/list_changed",
    ResourcesListChanged: "notifications/resources/list_changed",
    ResourceUpdated: "notifications/resources/updated",
}

LISTS: Final[dict[str, ServerEvent]] = {
    "tools/list": ToolsListChanged(),
    "prompts/list": PromptsListChanged(),
    "resources/list": ResourcesListChanged(),
}
"""What changes with the answer to each of these requests."""


class Broadcast(NamedTuple):
    """One thing that changed, and where in the cluster log it was last said.

    Attributes:
        uri: Of the resource that changed; None for a list.
        body: The notification for a client of the handshake era.
    """

    cursor: Cursor
    uri: str | None
    body: bytes

    @classmethod
    def of(cls, what: ServerEvent, cursor: Cursor) -> Broadcast:
        uri = what.uri if isinstance(what, ResourceUpdated) else None
        params = None if uri is None else {"uri": uri}
        return cls(cursor, uri, notification_body(METHODS[type(what)], params))


class Broadcasts:
    """The latest entries of the cluster log. Pure: no clock, no I/O.

    Args:
        limit: Entries that are kept.
        head: The entry from which on everything is known.
    """

    def __init__(self, limit: int, head: Cursor = _BEGINNING) -> None:
        self._limit = limit
        self.head = head
        self._tags = {head.position: head.tag}
        """The entries from which on everything is known, oldest first."""
        self._latest: dict[ServerEvent, Broadcast] = {}
        """Oldest first."""

    def take(self, event: Event, what: ServerEvent | None) -> None:
        """Notes the next entry of the log, and what it says that changed."""
        if event.position != self.head.position + 1:
            # What is between was trimmed before it was read.
            self._tags.clear()
            self._latest.clear()
        self.head = event.cursor
        self._tags[event.position] = event.tag
        if what is not None:
            self._latest.pop(what, None)
            self._latest[what] = Broadcast.of(what, event.cursor)
        if len(self._tags) > self._limit:
            oldest = next(iter(self._tags))
            del self._tags[oldest]
            self._forget(oldest)

    def _forget(self, position: int) -> None:
        what = next(iter(self._latest), None)
        if what is not None and self._latest[what].cursor.position <= position:
            del self._latest[what]

    def since(self, place: Cursor) -> list[Broadcast] | None:
        """What changed after this place, each once, oldest first; None if the place is not known, or no more."""
        if self._tags.get(place.position) != place.tag:
            return None
        found: list[Broadcast] = []
        for broadcast in reversed(self._latest.values()):
            if broadcast.cursor.position <= place.position:
                break
            found.append(broadcast)
        return found[::-1]

    def said_of(self, uri: str, since: Cursor) -> Cursor | None:
        """Where it was last said that this resource changed; None if it was not after this place."""
        found = self._latest.get(ResourceUpdated(uri))
        if found is None:
            return None
        # A place that this node has not read up to yet is after all that it has.
        known = since.position > self.head.position or self._tags.get(since.position) == since.tag
        return None if known and found.cursor.position <= since.position else found.cursor

    def resources(self) -> list[ServerEvent]:
        """The resources of which it is known that they changed."""
        return [what for what in self._latest if isinstance(what, ResourceUpdated)]
