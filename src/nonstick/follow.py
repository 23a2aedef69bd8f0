"""Following a log: every event after a cursor, in order, once, for ever.

One follower per session and node reads the log, however many follow it. A wake is only a hint: what it carries is
taken when it is the very next event, and otherwise the log is read; it is also read after some seconds of silence,
because wakes may be lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Sequence
from typing import Final

from nonstick.errors import Diverged, SessionNotFound, StoreUnavailable, Trimmed
from nonstick.guard import GuardedStore
from nonstick.store import Cursor, Event

__all__ = ["Follower", "Slice", "Subscription"]

logger = logging.getLogger(__name__)

_FIRST_POLL: Final = 1.0
_SLOWEST_POLL: Final = 5.0
_BATCH: Final = 256
_FIRST_SLICE: Final = 16
_SLICE_BYTES: Final = 256 * 1024
"""About so much is read at once (P10): a node may do it for thousands of slow clients."""
_BUFFER: Final = 1024
_BUFFER_BYTES: Final = 128 * 1024
"""Events, and their bytes, that wait for one slow subscription before it has to read for itself."""


class Slice:
    """How many events to read next, so that they are neither many round trips nor many bytes.

    Args:
        most: Events, at most.
    """

    def __init__(self, most: int = _BATCH) -> None:
        self.limit = min(_FIRST_SLICE, most)
        self._most = most

    def took(self, events: Sequence[Event]) -> None:
        """Learns from what the last read brought."""
        size = sum(len(event.data) for event in events)
        if size > _SLICE_BYTES:
            self.limit = max(1, self.limit * _SLICE_BYTES // size)
        elif len(events) == self.limit and size < _SLICE_BYTES / 4:
            self.limit = min(self._most, self.limit * 4)


class Subscription:
    """One reader's place in a followed log. `next` gives what came after it; several do not disturb each other."""

    def __init__(self, follower: Follower, after: Cursor) -> None:
        self.cursor = after
        self._follower = follower
        self._losses = follower.losses
        self._buffer: deque[Event] = deque()
        self._buffered_bytes = 0
        self._buffered_to = after.position
        self._slice = Slice()
        self._wake = asyncio.Event()

    async def next(self) -> list[Event]:
        """The next events, at least one, oldest first.

        Raises:
            SessionNotFound: The session ended.
            Diverged: The store lost the entry at this subscription's cursor.
            StoreUnavailable: Only while it has to catch up by itself. May be called again.
        """
        while True:
            if events := self.take():
                return events
            await self.wait()
            follower = self._follower
            if self._buffer:
                continue
            if follower.ended:
                raise SessionNotFound
            if self._losses != follower.losses:
                raise Diverged
            if events := await self._catch_up():
                return events

    def take(self) -> list[Event]:
        """The next events as far as they are here; may be none."""
        events = list(self._buffer)
        if events:
            self._clear()
            self.cursor = events[-1].cursor
        return events

    async def wait(self) -> None:
        """Waits until `next` would give or raise something, or has to read. May be cancelled at any time."""
        while not self._is_due():
            self._buffered_to = self.cursor.position
            self._wake.clear()
            await self._wake.wait()

    def _is_due(self) -> bool:
        follower = self._follower
        return (
            bool(self._buffer)
            or follower.ended
            or self._losses != follower.losses
            or self.cursor.position < follower.cursor.position
        )

    async def _catch_up(self) -> list[Event]:
        store, key = self._follower.store, self._follower.key
        try:
            events = await store.read(key, self.cursor, limit=self._slice.limit)
        except Trimmed:
            events = await store.read(key, Cursor(self.cursor.position), limit=self._slice.limit)
        self._slice.took(events)
        if events:
            self.cursor = events[-1].cursor
        else:
            # All that was missing has been trimmed.
            self.cursor = max(self.cursor, self._follower.cursor)
        self._buffered_to = self.cursor.position
        self._clear()
        return events

    def _clear(self) -> None:
        self._buffer.clear()
        self._buffered_bytes = 0

    def offer(self, events: Sequence[Event]) -> None:
        """Takes these events if they are the next ones and there is room; else `next` will read for itself."""
        if self._losses != self._follower.losses:
            # What follows a place that is lost is not its continuation.
            return
        for event in events:
            has_room = len(self._buffer) < _BUFFER and self._buffered_bytes < _BUFFER_BYTES
            if event.position == self._buffered_to + 1 and has_room:
                self._buffer.append(event)
                self._buffered_bytes += len(event.data)
                self._buffered_to = event.position
        self._wake.set()

    def poke(self) -> None:
        self._wake.set()

    def close(self) -> None:
        self._follower.leave(self)


class Follower:
    """The one reader of a session's log on this node. Works while it has subscriptions."""

    def __init__(self, store: GuardedStore, key: str) -> None:
        self.store = store
        self.key = key
        self.cursor = Cursor(0)
        self.ended = False
        self.losses = 0
        self._subscriptions: set[Subscription] = set()
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._slice = Slice()
        self._must_read = True
        self._poll = _FIRST_POLL
        self._heard = False
        """Whether a wake brought events since the task last looked."""

    @property
    def subscriptions(self) -> int:
        return len(self._subscriptions)

    def subscribe(self, after: Cursor) -> Subscription:
        """A place just after this cursor, which the caller knows to be good."""
        subscription = Subscription(self, after)
        self._subscriptions.add(subscription)
        if self._task is None:
            self.cursor = after
            self._must_read = True
            self._task = asyncio.create_task(self._run(), name=f"follow {self.key[:12]}")
        return subscription

    def leave(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
        if not self._subscriptions and self._task is not None:
            self._task.cancel()
            self._task = None

    def end(self) -> None:
        """The session is over: every subscription hears it."""
        self.ended = True
        for subscription in self._subscriptions:
            subscription.poke()
        self._wake.set()

    async def _run(self) -> None:
        unwatch = self.store.watch(self.key, self._on_wake)
        self._poll = _FIRST_POLL
        try:
            while not self.ended:
                if self._must_read:
                    self._must_read = False
                    if not await self._read():
                        await asyncio.sleep(_FIRST_POLL * random.uniform(0.3, 1.0))  # noqa: S311
                        self._must_read = True
                    continue
                self._wake.clear()
                try:
                    async with asyncio.timeout(self._poll * random.uniform(0.5, 1.0)):  # noqa: S311
                        await self._wake.wait()
                    self._poll = _FIRST_POLL
                except TimeoutError:
                    if not self._heard:
                        self._must_read = True
                        self._poll = min(self._poll * 1.5, _SLOWEST_POLL)
                self._heard = False
        finally:
            unwatch()

    def _on_wake(self, events: Sequence[Event] | None) -> None:
        if events is not None and (self._task is None or events[-1].position <= self.cursor.position):
            return
        if events is not None and events[0].position <= self.cursor.position + 1 and not self._must_read:
            self._advance([event for event in events if event.position > self.cursor.position])
            self._heard = True
            if self._poll == _FIRST_POLL:
                # Nothing is left to do for the task: when it looks up next, it knows that this was no silence.
                return
        else:
            self._must_read = True
        self._wake.set()

    async def _read(self) -> bool:
        """Reads to the end of the log. Whether the store could be reached, and knew the place."""
        try:
            while True:
                before = self.cursor
                try:
                    events = await self.store.read(self.key, before, limit=self._slice.limit)
                except Trimmed:
                    events = await self.store.read(self.key, Cursor(before.position), limit=self._slice.limit)
                self._slice.took(events)
                # A wake may have brought the same events while the read was under way.
                events = [event for event in events if event.position > self.cursor.position]
                if not events:
                    if self.cursor == before:
                        return True
                    continue
                self._advance(events)
        except SessionNotFound:
            self.end()
        except Diverged:
            logger.warning(
                "session %s: the store lost entries of its log before %d", self.key[:12], self.cursor.position
            )
            self._lose()
            # Not at once: a store in such a state may say so again.
            return False
        except StoreUnavailable:
            return False
        return True

    def _advance(self, events: list[Event]) -> None:
        self.cursor = events[-1].cursor
        for subscription in self._subscriptions:
            subscription.offer(events)

    def _lose(self) -> None:
        """Every subscription hears that its place may be gone; the log is followed from its beginning again."""
        self.losses += 1
        for subscription in self._subscriptions:
            subscription.poke()
        self.cursor = Cursor(0)
        self._must_read = True
