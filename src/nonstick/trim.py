"""Keeping a session's log within its bounds (P10).

Finished streams go first, the oldest first, those within the replay window last; then the oldest events of the
standalone stream. A stream that is not finished is never touched.
"""

from __future__ import annotations

import asyncio
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
_AGAIN: Final = 0.25
"""By this share of the bounds the log must grow before it is looked through again, if little could be trimmed."""


class Trimmer:
    """Watches the size that appends report, and trims in the background when it passes the bounds."""

    def __init__(self, node: Node, key: str) -> None:
        self._node = node
        self._key = key
        self._trimming: asyncio.Task[None] | None = None
        self._size = self._count = 0
        """As the last append or trim left it, on this node."""
        self._kept_size = self._kept_count = 0
        """What the last trim could not take."""

    def note(self, appended: Appended, *, ended: bool) -> None:
        """An append reported this much in the log; or it `ended` a stream, which may go now."""
        if ended:
            self._kept_size = self._kept_count = 0
        self._size, self._count = appended.size, appended.count
        settings = self._node.settings
        size = max(settings.max_log_bytes, self._kept_size + settings.max_log_bytes * _AGAIN)
        count = max(settings.max_log_events, self._kept_count + settings.max_log_events * _AGAIN)
        if self._trimming is None and (self._size > size or self._count > count):
            self._trimming = self._node.spawn(self._trim())

    async def full(self) -> bool:
        """Whether the log is far over its bounds, and trimming does not help: a stream that has not ended fills it."""
        while self._is_full and self._trimming is not None:
            await asyncio.wait([self._trimming])
        return self._is_full

    @property
    def _is_full(self) -> bool:
        settings = self._node.settings
        return self._size > 2 * settings.max_log_bytes or self._count > 2 * settings.max_log_events

    async def _trim(self) -> None:
        try:
            events = await self._read_all()
            streams, before = self._plan(events)
            await self._node.store.trim(self._key, streams=streams, standalone_before=before)
        except StoreError as error:
            logger.debug("session %s: could not trim its log: %s", self._key[:12], error)
        else:
            gone = [e for e in events if e.stream in streams or (e.stream == STANDALONE and e.position < before)]
            self._account(events, gone)
        finally:
            self._trimming = None

    def _account(self, events: list[Event], gone: list[Event]) -> None:
        self._count = self._kept_count = len(events) - len(gone)
        self._size = self._kept_size = sum(len(e.data) for e in events) - sum(len(e.data) for e in gone)
        dropped = sum(e.stream == STANDALONE and kind_of(e.data) is Kind.MESSAGE for e in gone)
        if dropped:
            self._node.counters.standalone_dropped += dropped
            logger.warning(
                "session %s: dropped the oldest %d messages of its standalone stream", self._key[:12], dropped
            )

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
