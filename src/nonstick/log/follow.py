"""Following a log: every event after a cursor, in order, once, for ever.

One follower per session and node reads the log, however many follow it. A wake is only a hint (P14): what it carries is
taken when it continues, by position and tag, exactly the entry up to which the log is known here. Anything else means
"read". While a log is quiet the node's lookout looks at it, because wakes may be lost, and has it read where its end is
not what is known here. A replaced primary may still announce what is not in the log: the next look or read finds that
out, because both name the entry and its tag.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from nonstick.errors import Diverged, SessionNotFound, StoreUnavailable, Trimmed, without_text
from nonstick.log.guard import LESS, GuardedStore
from nonstick.log.lookout import Lookout
from nonstick.store import MAX_CLIP, Cursor, Event, News, Skimmed
from nonstick.waiting import background
from nonstick.waiting.bell import Bell

__all__ = ["Follower", "Slice", "Subscription", "whole"]

logger = logging.getLogger(__name__)

_REPEAT_SECONDS: Final = 1.0
"""At most so long after a read that failed, the log is read again."""
_LONGEST_TRUST: Final = 10.0
"""Seconds for which wakes alone may say what is in the log. Then it is looked at, though they seem to tell all."""
_FREE_READS: Final = 4
"""Reads in a row that may bring nothing: a wake and a read often bring the same."""
_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.2
_FORGIVEN_SECONDS: Final = 0.4
"""Seconds of silence after which wakes that brought nothing are forgotten. Between two looks there are more."""
_BATCH: Final = 256
_SLICE_BYTES: Final = 256 * 1024
"""About how many bytes are read at once (P10): a node may read for thousands of slow clients."""
_BUFFER_EVENTS: Final = 1024
_BUFFER_BYTES: Final = 128 * 1024
"""How much waits for one slow subscription before the subscription has to read for itself."""


class Slice:
    """How much of a log is read at once. What failed is tried again for less, until something is read (P10).

    Args:
        events: At most.
        size: Bytes of their data, at most.
    """

    __slots__ = ("_events", "_most_events", "_most_size", "_size")

    def __init__(self, events: int = _BATCH, size: int = _SLICE_BYTES) -> None:
        self._events = self._most_events = events
        self._size = self._most_size = size

    async def read(self, store: GuardedStore, key: str, after: Cursor) -> list[Event]:
        """As `Store.read`, but goes on with what is left where the entry at the cursor was trimmed."""
        with self._learning():
            events = await store.read_on(key, after, limit=self._events, max_bytes=self._size)
        if events:
            # There may be many such slices, and stores that answer without a wait: others get their turns.
            await asyncio.sleep(0)
        return events

    async def skim(self, store: GuardedStore, key: str, after: Cursor, *, clip: int = MAX_CLIP) -> list[Skimmed]:
        """As `Store.skim`, but goes on as `read` does."""
        with self._learning():
            try:
                entries = await store.skim(key, after, limit=self._events, clip=clip)
            except Trimmed:
                entries = await store.skim(key, Cursor(after.position), limit=self._events, clip=clip)
        if entries:
            await asyncio.sleep(0)
        return entries

    @contextlib.contextmanager
    def _learning(self) -> Iterator[None]:
        try:
            yield
        except StoreUnavailable:
            self._events, self._size = max(1, self._events // LESS), max(1, self._size // LESS)
            raise
        self._events = min(self._most_events, self._events * LESS)
        self._size = min(self._most_size, self._size * LESS)


async def whole(store: GuardedStore, key: str, entry: Skimmed) -> Event | None:
    """The event of which this was skimmed; None if it was dropped, or lost, since."""
    event, size = entry
    if len(event.data) == size:
        return event
    try:
        found = await store.read(key, Cursor(event.position - 1), limit=1)
    except Diverged:
        return None
    return found[0] if found and found[0].cursor == event.cursor else None


class _Pace:
    """When to read again: at once, unless reads that wakes asked for bring nothing, again and again (P10).

    Somebody who can reach a store's channel can send wakes without end, for any log whose key they have heard.
    """

    __slots__ = ("_in_vain", "read_at")

    def __init__(self) -> None:
        self.read_at = -math.inf
        self._in_vain = 0

    def pause(self, now: float) -> float:
        """Seconds to wait before the next read."""
        beyond = self._in_vain - _FREE_READS
        if beyond < 0:
            return 0.0
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * (1 << min(beyond, 10)))
        return max(0.0, self.read_at + pause - now)

    def took(self, now: float, *, brought: bool) -> None:
        """A read ended, and brought something or not."""
        self._in_vain = 0 if brought or now - self.read_at > _FORGIVEN_SECONDS else self._in_vain + 1
        self.read_at = now


def _continued(place: Cursor, before: Cursor, events: Sequence[Event]) -> Sequence[Event]:
    """What comes after a place, of events that stand in the log after `before`; none if the place is not among them."""
    if place == before:
        return events
    at_any_tag = place.position > 0 and not place.tag
    for n, cursor in enumerate((before, *(event.cursor for event in events))):
        if cursor == place or (at_any_tag and cursor.position == place.position):
            return events[n:]
    return ()


class Subscription:
    """One reader's place in a followed log. `next` gives what came after. Subscriptions do not disturb each other."""

    __slots__ = ("_buffer", "_buffered_bytes", "_buffered_to", "_follower", "_losses", "_slice", "_wake", "cursor")

    def __init__(self, follower: Follower, after: Cursor) -> None:
        self.cursor = after
        self._follower = follower
        self._losses = follower.losses
        self._buffer: list[Event] = []
        self._buffered_bytes = 0
        self._buffered_to = after
        """Up to where the log is in the buffer."""
        self._slice = Slice()
        self._wake = Bell()

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
        events = self._buffer
        if events:
            self._clear()
            self.cursor = events[-1].cursor
        return events

    async def wait(self) -> None:
        """Waits until `next` would give or raise something, or has to read. May be cancelled at any time."""
        while not self._is_due():
            self._buffered_to = self.cursor
            await self._wake.rung()

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
        events = await self._slice.read(store, key, self.cursor)
        if events:
            self.cursor = events[-1].cursor
        else:
            # All that was missing has been trimmed.
            self.cursor = max(self.cursor, self._follower.cursor)
        self._buffered_to = self.cursor
        self._clear()
        return events

    def _clear(self) -> None:
        self._buffer = []
        self._buffered_bytes = 0

    def offer(self, before: Cursor, events: Sequence[Event]) -> None:
        """Takes of these events, which follow `before`, those that are next and for which there is room.

        `next` reads the others from the store.
        """
        if self._losses != self._follower.losses:
            # What follows a place that is lost is not its continuation.
            return
        for event in _continued(self._buffered_to, before, events):
            if len(self._buffer) >= _BUFFER_EVENTS or self._buffered_bytes >= _BUFFER_BYTES:
                break
            self._buffer.append(event)
            self._buffered_bytes += len(event.data)
            self._buffered_to = event.cursor
        self._wake.ring()

    def poke(self) -> None:
        """The follower has ended, or lost its place: `next` is to say so."""
        self._wake.ring()

    def close(self) -> None:
        self._follower.leave(self)


class Follower:
    """The one reader of a session's log on this node. Works while it has subscriptions.

    It has a task only while it has to read: most logs are quiet, and there may be thousands. The lookout looks at them.
    """

    __slots__ = (
        "_heard",
        "_lookout",
        "_must_read",
        "_pace",
        "_reading",
        "_slice",
        "_subscriptions",
        "_unwatch",
        "cursor",
        "ended",
        "key",
        "looks",
        "losses",
        "store",
        "turn",
    )

    def __init__(self, store: GuardedStore, lookout: Lookout, key: str) -> None:
        self.store = store
        self.key = key
        self.cursor = Cursor(0)
        self.ended = False
        self.losses = 0
        self.looks = self.turn = 0
        self._lookout = lookout
        self._subscriptions: list[Subscription] = []
        self._unwatch: Callable[[], None] | None = None
        """Stops the wakes, while it follows."""
        self._reading: asyncio.Task[None] | None = None
        self._slice = Slice()
        self._pace = _Pace()
        self._must_read = False
        self._heard = False
        """Whether a wake brought events since the lookout was told to expect it."""

    @property
    def subscriptions(self) -> int:
        return len(self._subscriptions)

    def subscribe(self, after: Cursor) -> Subscription:
        """A place just after this cursor, which the caller knows to be good."""
        subscription = Subscription(self, after)
        self._subscriptions.append(subscription)
        if self._unwatch is None and not self.ended:
            self.cursor = after
            self.looks = 0
            self._unwatch = self.store.watch(self.key, self._on_wake)
            self.read_soon()
        return subscription

    def leave(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
        if not self._subscriptions:
            self._stop()

    def end(self) -> None:
        """The session is over: every subscription hears it."""
        self.ended = True
        for subscription in self._subscriptions:
            subscription.poke()
        self._stop()

    def _stop(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        self._lookout.forget(self)
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    # ---- when to read

    def read_soon(self) -> None:
        """There may be something in the log that no wake brought here."""
        self._must_read = True
        if self._reading is None:
            self._lookout.forget(self)
            self._reading = background.spawn(self._keep_reading(), name=f"follow {self.key[:12]}")

    async def _keep_reading(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._must_read and not self.ended:
            if pause := self._pace.pause(clock()):
                await asyncio.sleep(pause)
            self._must_read = False
            before = self.cursor
            try:
                done = await self._read()
            except Exception as error:
                # Of a store, a defect; here, nobody else would go on following.
                logger.error("session %s: its log could not be read", self.key[:12], exc_info=without_text(error))
                done = False
            self._pace.took(clock(), brought=self.cursor != before)
            if not done:
                await asyncio.sleep(_REPEAT_SECONDS * random.uniform(0.3, 1.0))  # noqa: S311
                self._must_read = True
        if not self.ended:
            self._reading = None
            self._fall_quiet()

    def _fall_quiet(self) -> None:
        self._heard = False
        self._lookout.expect(self)

    def needs_look(self, now: float) -> bool:
        """Whether wakes have not told of it, or have for so long that they are not trusted any more."""
        trusted = self._heard and now - self._pace.read_at < _LONGEST_TRUST
        self._heard = False
        return not trusted

    def _on_wake(self, news: News | None) -> None:
        if self._unwatch is None:
            return
        # A store of a third party may still say events alone, which prove nothing.
        fresh = news.since(self.cursor) if isinstance(news, News) else None
        if fresh is not None and not fresh:
            return
        slow, self.looks = self.looks > 0, 0
        if fresh is None or self._must_read:
            self.read_soon()
            return
        self._advance(fresh)
        self._heard = True
        if slow and self._reading is None:
            self._lookout.expect(self)

    async def _read(self) -> bool:
        """Reads to the end of the log. Whether the store could be reached, and knew the place."""
        try:
            while True:
                before = self.cursor
                events = await self._slice.read(self.store, self.key, before)
                # A wake may have brought the same events while the read was under way. Others than these, or more, are
                # what the next read begins with.
                if fresh := _continued(self.cursor, before, events):
                    self._advance(fresh)
                elif self.cursor == before:
                    return True
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

    def _advance(self, events: Sequence[Event]) -> None:
        before, self.cursor = self.cursor, events[-1].cursor
        for subscription in self._subscriptions:
            subscription.offer(before, events)

    def _lose(self) -> None:
        """Every subscription hears that its place may be gone; the log is followed from its beginning again."""
        self.losses += 1
        for subscription in self._subscriptions:
            subscription.poke()
        self.cursor = Cursor(0)
        self._must_read = True
