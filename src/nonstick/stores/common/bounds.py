"""The bounds of what one call of a store may be asked for, and may answer (P10)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Final

from nonstick.store import MAX_CLIP, MAX_PLACES, MAX_READ, MAX_READ_BYTES, Event

__all__ = ["NOT_OPENED", "check_bounds", "check_places", "fitting"]

NOT_OPENED: Final = "a stream opens with an event"
"""Of the ValueError for a batch that opens a stream and has no event."""


def check_bounds(*, limit: int, max_bytes: int = 1, clip: int = 0) -> None:
    """Returns if the arguments of a `read` or a `skim` are within what `Store` says.

    Raises:
        ValueError: One is not.
    """
    if not 1 <= limit <= MAX_READ:
        raise ValueError(f"limit must be 1 to {MAX_READ}")
    if not 1 <= max_bytes <= MAX_READ_BYTES:
        raise ValueError(f"max_bytes must be 1 to {MAX_READ_BYTES}")
    if not 0 <= clip <= MAX_CLIP:
        raise ValueError(f"clip must be 0 to {MAX_CLIP}")


def check_places(places: Sized) -> None:
    """Returns if these are no more than `TellsStale.stale` takes.

    Raises:
        ValueError: They are more.
    """
    if len(places) > MAX_PLACES:
        raise ValueError(f"places must be at most {MAX_PLACES}")


def fitting(events: Iterable[Event], max_bytes: int) -> Iterator[Event]:
    """The first of these events, and those after it while they are together no more than `max_bytes`.

    Takes from `events` at most one more than it gives.
    """
    size = 0
    for number, event in enumerate(events):
        size += len(event.data)
        if number and size > max_bytes:
            return
        yield event
