"""The watches of one process, for all stores: which functions to call when a log changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from nonstick.errors import without_text

__all__ = ["Watch", "Watches"]

logger = logging.getLogger("nonstick.store")

T = TypeVar("T")


class Watch(Generic[T]):
    """One watch. Its wake is called by the event loop, never inside the call that caused it, and never once stopped."""

    __slots__ = ("_active", "_wake")

    def __init__(self, wake: Callable[[T | None], None]) -> None:
        self._wake = wake
        self._active = True

    def call_soon(self, news: T | None) -> None:
        """Calls the wake in the next turn of the event loop."""
        asyncio.get_running_loop().call_soon(self._call, news)

    def stop(self) -> None:
        """From now on the wake is not called."""
        self._active = False

    def _call(self, news: T | None) -> None:
        if not self._active:
            return
        try:
            self._wake(news)
        except Exception as error:
            # A wake must not raise. What this one raises may quote what it was told (P13).
            logger.error("a wake raised", exc_info=without_text(error))


class Watches(Generic[T]):
    """All watches of one process, by the key of what they watch. `key in watches`: whether anybody watches it."""

    def __init__(self) -> None:
        self._by_key: dict[str, list[Watch[T]]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def __iter__(self) -> Iterator[str]:
        """The keys that are watched."""
        return iter(self._by_key)

    def add(self, key: str, wake: Callable[[T | None], None]) -> tuple[Watch[T], Callable[[], None]]:
        """The new watch, and a function that stops it and may be called more than once.

        The wake is not called yet: the caller says None to the watch once it is in force.
        """
        watch: Watch[T] = Watch(wake)
        self._by_key.setdefault(key, []).append(watch)

        def stop() -> None:
            watch.stop()
            watching = self._by_key.get(key, [])
            if watch in watching:
                watching.remove(watch)
            if not watching:
                self._by_key.pop(key, None)

        return watch, stop

    def announce(self, key: str, news: T | None) -> None:
        """Wakes every watch of this key."""
        for watch in self._by_key.get(key, ()):
            watch.call_soon(news)

    def announce_all(self) -> None:
        """Tells every watch to read."""
        for key in self._by_key:
            self.announce(key, None)

    def clear(self) -> None:
        """Stops every watch."""
        for watches in self._by_key.values():
            for watch in watches:
                watch.stop()
        self._by_key.clear()
