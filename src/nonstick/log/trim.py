"""Keeping a session's log within its bounds (P10), in the background.

`core/retention.py` says what of a log goes. A log that is over its bounds, and of which little can go, is not looked
through again before there is something to gain: the node remembers that for a while, also when nothing of the session
is left here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from nonstick.core.refusals import LOG_FULL, Refusal
from nonstick.core.retention import Amount, Outline, Waste
from nonstick.core.settings import Settings
from nonstick.errors import StoreError
from nonstick.log.follow import Slice
from nonstick.log.guard import GuardedStore
from nonstick.store import MAX_READ, Appended, Cursor
from nonstick.waiting.tasks import Spawn

__all__ = ["Hold", "Looks", "Trimmer", "Trimming"]

logger = logging.getLogger(__name__)

_AIM: Final = 0.5
"""Trim down to this share of the bounds, so that it is not due again at once."""
_AGAIN: Final = 0.25
"""By this share of the bounds the log must grow, or streams end, before it is looked through again."""
_FULL: Final = 2.0
"""At so many times its bounds a log that cannot be trimmed takes no more."""

_SOON: Final = 1.0
"""Seconds, at least, between two looks for a request that waits for room: other nodes may have ended streams."""

_REMEMBERED_LOOKS: Final = 256
_REMEMBERED_SECONDS: Final = 300.0

_NOTHING: Final = Amount()


@dataclass(slots=True)
class Look:
    """What a node saw when it looked through a log last.

    Attributes:
        left: Of the log, after it was trimmed.
        open: Streams that had not ended, and what they held.
        freed: What those of them held that have ended since.
    """

    at: float
    left: Amount
    open: dict[int, Amount] = field(default_factory=dict[int, Amount])
    freed: Amount = _NOTHING

    def note(self, amount: Amount, ended: int | None) -> None:
        """The log is this large now; a stream of it `ended`."""
        if ended is not None:
            self.freed = self.freed.plus(self.open.pop(ended, _NOTHING))
        # It may have been trimmed elsewhere.
        self.left = Amount(min(self.left.size, amount.size), min(self.left.events, amount.events))

    def gain(self, amount: Amount) -> Amount:
        """What may go of a log that is this large now: what came since, and what ended."""
        return amount.minus(self.left).plus(self.freed)


class Looks:
    """The latest looks at logs that this node had, for some minutes.

    Args:
        clock: Seconds.

    Attributes:
        kept: By the session's key, the oldest first.
        under_way: The logs that are being looked through, and trimmed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.kept: dict[str, Look] = {}
        self.under_way: dict[str, asyncio.Task[None]] = {}
        self._ended_unseen: dict[str, set[int]] = {}
        """Of the logs that are being looked through, by key: the streams that ended, maybe unseen by the look."""

    def get(self, key: str, seconds: float = _REMEMBERED_SECONDS) -> Look | None:
        """The latest look at this log, if it is no older."""
        look = self.kept.get(key)
        return None if look is None or self._clock() - look.at >= seconds else look

    def begin(self, key: str, task: asyncio.Task[None]) -> None:
        """This task looks through the log now."""
        self.under_way[key], self._ended_unseen[key] = task, set()
        task.add_done_callback(lambda _: self._end(key))

    def _end(self, key: str) -> None:
        del self.under_way[key], self._ended_unseen[key]

    def note(self, key: str, amount: Amount, ended: int | None) -> None:
        """The log is this large now; a stream of it `ended`."""
        if ended is not None and key in self._ended_unseen:
            self._ended_unseen[key].add(ended)
        if (look := self.kept.get(key)) is not None:
            look.note(amount, ended)

    def put(self, key: str, left: Amount, unfinished: dict[int, Amount]) -> None:
        """This node has just looked."""
        self.kept.pop(key, None)
        look = self.kept[key] = Look(self._clock(), left, unfinished)
        ended = self._ended_unseen.get(key, set())
        while ended:
            look.note(left, ended.pop())
        for old in [old for old in self.kept if self.get(old) is None] or list(self.kept)[:-_REMEMBERED_LOOKS]:
            del self.kept[old]


class Trimming:
    """The trimming of the sessions' logs by one node.

    Args:
        spawn: Runs it in the background.

    Attributes:
        looks: At logs that are over their bounds, or were.
        dropped: Messages of standalone streams that went since the node started.
    """

    def __init__(self, store: GuardedStore, settings: Settings, spawn: Spawn) -> None:
        self.store = store
        self.settings = settings
        self.spawn = spawn
        self.looks = Looks()
        self.dropped = 0


class Hold:
    """Bytes of a log that are held for what is to be appended soon: until `release`, or while the block runs."""

    def __init__(self, trimmer: Trimmer, size: int) -> None:
        self._trimmer = trimmer
        self._size = size

    def release(self) -> None:
        """What the bytes were held for is in the log, or will not be. May be called more than once."""
        self._trimmer.give_back(self._size)
        self._size = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.release()


class Trimmer:
    """Watches the size that appends report, and trims in the background when it passes the bounds.

    Args:
        amount: Of the log when its record was loaded.
        end_lost: Ends streams in the log that nobody else would end; whether there were any.
    """

    def __init__(
        self, trimming: Trimming, key: str, amount: Amount, *, end_lost: Callable[[], Awaitable[bool]]
    ) -> None:
        self._trimming = trimming
        self._key = key
        self._size, self._events = amount
        """As the last append or trim left it, as far as this node knows."""
        self._end_lost = end_lost
        self._held = 0
        """Bytes that are about to be appended."""

    def note(self, appended: Appended, *, ended: int | None) -> None:
        """An append left this much in the log. It may have `ended` a stream, which may go now."""
        self._size, self._events = appended.size, appended.count
        looks = self._trimming.looks
        if looks.kept or looks.under_way:
            looks.note(self._key, Amount(self._size, self._events), ended)
        settings = self._trimming.settings
        if self._size > settings.max_log_bytes or self._events > settings.max_log_events:
            self._trim_if_due()

    def ended(self, stream: int) -> None:
        """Another node ended this stream."""
        self._trimming.looks.note(self._key, Amount(self._size, self._events), stream)

    def refresh(self, amount: Amount) -> None:
        """The log is this large, by its record."""
        self._size, self._events = amount

    # ---- no room

    async def full(self) -> bool:
        """Whether the log is far over its bounds, and trimming does not help: a stream that has not ended fills it."""
        while self.is_full and await self._trimmed():
            pass
        return self.is_full

    @property
    def is_full(self) -> bool:
        """Whether the log is far over its bounds."""
        settings = self._trimming.settings
        return self._size > _FULL * settings.max_log_bytes or self._events > _FULL * settings.max_log_events

    async def hold(self, size: int) -> Hold:
        """Holds so many bytes of the log for what is to be appended soon. Trims first if that may help.

        Raises:
            Refusal: There is no room, because requests that have not ended fill the log.
        """
        while not self._has_room(size) and await self._trimmed():
            pass
        if not self._has_room(size) and self._may_gain(size):
            self._begin(size)
            await self._trimmed()
        if not self._has_room(size):
            raise Refusal(LOG_FULL)
        self._held += size
        return Hold(self, size)

    def give_back(self, size: int) -> None:
        """So many of the bytes that were held are in the log, or will not be."""
        self._held -= size

    def _may_gain(self, size: int) -> bool:
        look = self._trimming.looks.get(self._key, _SOON)
        missing = self._size + self._held + size - self._trimming.settings.max_log_bytes
        return look is None or look.gain(Amount(self._size, self._events)).size >= missing

    def _has_room(self, size: int) -> bool:
        taken = self._size + self._held
        # An empty log takes anything.
        return not taken or taken + size <= self._trimming.settings.max_log_bytes

    # ---- trimming

    def _trim_if_due(self) -> None:
        if self._is_due():
            self._begin()

    def _is_due(self) -> bool:
        look = self._trimming.looks.get(self._key)
        return look is None or look.gain(Amount(self._size, self._events)).exceeds(self._bounds(), _AGAIN)

    def _begin(self, room: int = 0) -> None:
        if self._key not in self._trimming.looks.under_way:
            self._trimming.looks.begin(self._key, self._trimming.spawn(self._trim(self._bounds(room))))

    async def _trimmed(self) -> bool:
        """Waits for the trim that is under way, whichever request began it. Whether there was one."""
        looks = self._trimming.looks
        task = looks.under_way.get(self._key)
        if task is None or task.done():
            return False
        await asyncio.wait([task])
        if (look := looks.kept.get(self._key)) is not None:
            self._size, self._events = look.left
        return True

    def _bounds(self, room: int = 0) -> Amount:
        settings = self._trimming.settings
        return Amount(max(0, settings.max_log_bytes - room), settings.max_log_events)

    async def _trim(self, bounds: Amount) -> None:
        try:
            while await self._is_over_when_trimmed(bounds) and self._is_due():
                # Streams ended while the log was trimmed, and maybe no append comes that would trim them.
                pass
        except StoreError as error:
            logger.debug("session %s: could not trim its log: %s", self._key[:12], error)

    async def _is_over_when_trimmed(self, bounds: Amount) -> bool:
        outline = await self._outline()
        waste = outline.waste(bounds, _AIM)
        if outline.amount.minus(waste.amount).exceeds(bounds) and await self._end_lost():
            outline = await self._outline()
            waste = outline.waste(bounds, _AIM)
        for streams, before in waste.portions:
            await self._trimming.store.trim(self._key, streams=streams, standalone_before=before)
            await asyncio.sleep(0)
        self._account(outline, waste)
        return outline.amount.minus(waste.amount).exceeds(bounds)

    def _account(self, outline: Outline, waste: Waste) -> None:
        left = outline.amount.minus(waste.amount)
        self._size, self._events = left
        self._trimming.looks.put(self._key, left, outline.unfinished())
        if waste.messages:
            self._trimming.dropped += waste.messages
            logger.warning(
                "session %s: dropped the oldest %d messages of its standalone stream", self._key[:12], waste.messages
            )

    async def _outline(self) -> Outline:
        """The log as it is. Others get their turns of the event loop between its pages."""
        outline, part, after = Outline(), Slice(MAX_READ), 0
        while entries := await part.skim(self._trimming.store, self._key, Cursor(after), clip=2):
            outline.add(entries)
            after = entries[-1].event.position
        return outline
