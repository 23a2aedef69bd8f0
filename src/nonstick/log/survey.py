"""Surveys: a look through a whole log for the streams that have not ended. Others decide what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from nonstick.core.events import decode
from nonstick.core.streams import Life, Sketch, Unfinished
from nonstick.errors import Diverged, StoreUnavailable, without_text
from nonstick.log.follow import Slice, whole
from nonstick.log.guard import GuardedStore
from nonstick.store import MAX_READ, Cursor, Event, Skimmed

__all__ = ["OpenStream", "Survey", "note_unreadable", "survey", "unfinished"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenStream:
    """A stream without its end.

    Attributes:
        opened: Its first event, of which the data may be cut off.
        life: What the log tells of it.
    """

    opened: Skimmed
    life: Life

    @property
    def name(self) -> int:
        """The position of its first event."""
        return self.opened.event.position


@dataclass(slots=True)
class Survey:
    """What is open in a log.

    Attributes:
        head: Up to where the log was looked through.
        open: The oldest first.
    """

    head: Cursor
    open: list[OpenStream]


async def unfinished(store: GuardedStore, key: str) -> Unfinished:
    """The streams of a log that have not ended, from a look through the whole of it.

    Raises:
        SessionNotFound, StoreUnavailable, Diverged: As `Store.skim`.
    """
    found, part = Unfinished(), Slice(MAX_READ)
    # Without its tag: an entry that was trimmed since is of no open stream.
    while entries := await part.skim(store, key, Cursor(found.head.position)):
        found.take(entries)
    return found


async def survey(store: GuardedStore, key: str, only: Callable[[Sketch], bool] = lambda _: True) -> Survey:
    """What the log tells of its streams that have not ended, and that `only` wants.

    Raises:
        SessionNotFound, StoreUnavailable: As `Store.read`; may be called again.
    """
    try:
        return await _survey(store, key, only)
    except Diverged:
        raise StoreUnavailable("the session's log lost entries while it was read") from None


async def _survey(store: GuardedStore, key: str, only: Callable[[Sketch], bool]) -> Survey:
    found = await unfinished(store, key)
    # One after the other: a relayed request may be as long as any.
    streams: list[OpenStream] = []
    for sketch in found.streams.values():
        try:
            if only(sketch) and (life := await _life(store, key, sketch)) is not None:
                streams.append(OpenStream(sketch.opened, life))
        except (LookupError, TypeError, ValueError) as error:
            # No release writes this. The other streams are looked at nonetheless.
            note_unreadable(key, sketch.opened.event, error)
    return Survey(found.head, streams)


async def _life(store: GuardedStore, key: str, sketch: Sketch) -> Life | None:
    """What the log tells of this stream; None if the stream was trimmed since it was skimmed."""
    if (opened := await whole(store, key, sketch.opened)) is None:
        return None
    life = Life.begun(decode(opened.data))
    if sketch.taken is not None and (taken := await whole(store, key, sketch.taken)) is not None:
        life.note(taken)
    return life


def note_unreadable(key: str, event: Event, error: Exception) -> None:
    """Says that this event of the log was passed over. What it holds is not shown (P13)."""
    logger.error("session %s: passed over event %d of its log", key[:12], event.position, exc_info=without_text(error))
