"""The rest of one POST's stream: what its client has not seen, then what comes, from any node (P3)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Final

from nonstick.core.event_ids import EventId
from nonstick.core.events import Kind, kind_of
from nonstick.core.jsonrpc import error_body
from nonstick.core.refusals import STREAM_LOST, UNKNOWN_EVENT_ID, Refusal
from nonstick.core.sse import sse_message
from nonstick.core.streams import Reading, reading
from nonstick.errors import Diverged, StoreUnavailable
from nonstick.log.follow import Slice
from nonstick.session.live import LiveSession
from nonstick.session.reader import Reader
from nonstick.session.rescue import Rescue
from nonstick.store import Cursor, Event

__all__ = ["Resumption"]

logger = logging.getLogger(__name__)

_FIRST_SLICE: Final = 16
"""Events of what a client missed that are read before its response begins."""

_EXISTENCE_POLL: Final = 4.0
"""Seconds, at least, between two looks whether a silent stream is still there."""


async def _entry(session: LiveSession, cursor: Cursor) -> list[Event]:
    """The entry that a client's event id names, and what follows it; empty if the store no longer has it."""
    try:
        events = await Slice(_FIRST_SLICE).read(session.services.store, session.key, Cursor(cursor.position - 1))
    except Diverged:
        return []
    return events if events and events[0].cursor == cursor else []


class Resumption(Reader):
    """The rest of one POST's stream."""

    def __init__(self, session: LiveSession, place: EventId) -> None:
        super().__init__(session, place)
        self._place: EventId = place
        self._since = session.log.head.position
        """The log's end when this connection came."""
        self._events: list[Event] = []
        self._opened: Event | None = None
        self._looks_at = 0.0
        self._missed = False

    async def prepare(self) -> None:
        """Reads what the log has.

        Raises:
            Refusal: The entry is there, and another stream's.
            SessionNotFound, StoreUnavailable: As `Store.read`.
        """
        stream = self._place.stream
        self._events = await _entry(self.session, self._place.cursor)
        if not self._events:
            return
        first = self._events[0]
        if first.stream != stream:
            raise Refusal(UNKNOWN_EVENT_ID)
        if first.position != stream:
            first = await self._read_first() or first
        if first.position == stream and kind_of(first.data) is Kind.OPENED:
            self._opened = first

    async def feed(self) -> None:
        while True:
            try:
                await self._feed_rest()
                return
            except Diverged:
                # Some place in the log is lost. This client's may not be, and nothing of the stream either.
                self._events = await self.until_answered(lambda: _entry(self.session, self._place.cursor))
                if not self._events:
                    self._lose()
                    return

    async def _feed_rest(self) -> None:
        if self._opened is None:
            self._lose()
            return
        rescue = Rescue(self.session, self._opened)
        events, self._events = self._events, []
        if await self._carry(events, rescue):
            return
        with self.follow(events[-1].cursor) as following:
            while True:
                events = await following.next()
                if await self._carry(events, rescue):
                    return
                # Other streams of the session are no sign of life.
                if any(event.stream == self._place.stream for event in events):
                    self._missed = False
                    continue
                with contextlib.suppress(StoreUnavailable):
                    await rescue.look()
                    if await self._is_missing():
                        self._lose()
                        return

    async def _read_first(self) -> Event | None:
        """What is left of the log from where the stream began; nothing if the store lost that."""
        try:
            found = await self.session.services.store.read(self.session.key, Cursor(self._place.stream - 1), limit=1)
        except Diverged:
            return None
        return found[0] if found else None

    async def _is_there(self) -> bool:
        """Whether the store still has the stream's first event."""
        assert self._opened is not None
        try:
            found = await self.session.services.store.skim(
                self.session.key, Cursor(self._opened.position - 1), limit=1, clip=0
            )
        except Diverged:
            return False
        return bool(found) and found[0].event.cursor == self._opened.cursor

    async def _is_missing(self) -> bool:
        """Whether the stream has ended and been trimmed, so that nothing more comes of it (P9).

        When it is seen twice: what came before the trim may still be on its way here.
        """
        now = asyncio.get_running_loop().time()
        if now < self._looks_at:
            return False
        before, self._missed = self._missed, not await self._is_there()
        self._looks_at = now if self._missed else now + _EXISTENCE_POLL
        return before and self._missed

    async def _carry(self, events: Iterable[Event], rescue: Rescue) -> bool:
        """Puts the stream's own messages. Whether that was its end."""
        for event in events:
            if event.stream != self._place.stream:
                continue
            what = reading(event, place=self._place.cursor.position, came=self._since)
            if what is Reading.NOTE:
                rescue.taken(event)
            if what in (Reading.PUT, Reading.PUT_AND_END):
                self._place = EventId(event.stream, event.cursor, self._place.request)
                await self.put(event, self._place)
            if what in (Reading.END, Reading.PUT_AND_END):
                return True
        return False

    def _lose(self) -> None:
        """The store no longer has this stream: its request is answered with one error, so that nobody waits (P9)."""
        logger.warning("session %s: a stream that a client resumes is lost", self.session.key[:12])
        self.outlet.put(sse_message(error_body(self._place.request, STREAM_LOST)))
