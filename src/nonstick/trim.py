"""Keeping a session's log within its bounds (P10).

Finished streams go first, the oldest first, those within the replay window last; then the oldest events of the
standalone stream. A stream that is not finished is never touched.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from nonstick.errors import StoreError
from nonstick.events import Kind, kind_of
from nonstick.store import MAX_READ, STANDALONE, Appended, Cursor, Event

if TYPE_CHECKING:
    from nonstick.node import Node

__all__ = ["Trimmer"]

logger = logging.getLogger(__name__)

_AIM: Final = 0.5
"""Trim down to this share of the bounds, so that it is not due again at once."""


class Trimmer:
    """Watches the size that appends report, and trims in the background when it passes the bounds."""

    def __init__(self, node: Node, key: str) -> None:
        self._node = node
        self._key = key
        self._busy = False
        self.size = 0
        self.count = 0

    def note(self, appended: Appended) -> None:
        """An append reported this much in the log."""
        self.size, self.count = appended.size, appended.count
        settings = self._node.settings
        over = self.size > settings.max_log_bytes or self.count > settings.max_log_events
        if over and not self._busy:
            self._busy = True
            self._node.spawn(self._trim())

    @property
    def full(self) -> bool:
        """Trimming does not help any more: what fills the log is a stream that has not ended."""
        settings = self._node.settings
        return self.size > 2 * settings.max_log_bytes or self.count > 2 * settings.max_log_events

    async def _trim(self) -> None:
        try:
            events = await self._read_all()
            streams, before = self._plan(events)
            await self._node.store.trim(self._key, streams=streams, standalone_before=before)
            if before:
                dropped = sum(e.stream == STANDALONE and e.position < before for e in events)
                self._node.counters.standalone_dropped += dropped
                logger.warning(
                    "session %s: dropped the oldest %d events of its standalone stream", self._key[:12], dropped
                )
        except StoreError as error:
            logger.debug("session %s: could not trim its log: %s", self._key[:12], error)
        finally:
            self._busy = False

    async def _read_all(self) -> list[Event]:
        events: list[Event] = []
        after = Cursor(0)
        while batch := await self._node.store.read(self._key, after, limit=MAX_READ):
            events += batch
            after = Cursor(batch[-1].position)
        return events

    def _plan(self, events: list[Event]) -> tuple[list[int], int]:
        """Which finished streams go, and before which position the standalone stream goes."""
        settings = self._node.settings
        size, count = sum(len(e.data) for e in events), len(events)

        def too_much() -> bool:
            return size > settings.max_log_bytes * _AIM or count > settings.max_log_events * _AIM

        finished = [e.stream for e in events if kind_of(e.data) is Kind.TERMINAL and e.stream != STANDALONE]
        going: list[int] = []
        for stream in finished:
            if not too_much():
                return going, 0
            own = [e for e in events if e.stream == stream]
            size, count = size - sum(len(e.data) for e in own), count - len(own)
            going.append(stream)
        # Only what is over the bounds even so is taken from those who have not read it yet.
        if size <= settings.max_log_bytes and count <= settings.max_log_events:
            return going, 0
        before = 0
        for event in (e for e in events if e.stream == STANDALONE):
            if not too_much():
                break
            before = event.position + 1
            size, count = size - len(event.data), count - 1
        return going, before
