"""Who watches which log in this process, for the stores that dispatch wakes themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nonstick.store import News, Wake

__all__ = ["Watch", "Watches"]


class Watch:
    """One watch. Its wake is called from the loop, never from inside the call that caused it, and not once stopped."""

    __slots__ = ("_active", "_wake")

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._active = True

    def call_soon(self, news: News | None) -> None:
        asyncio.get_running_loop().call_soon(self._call, news)

    def stop(self) -> None:
        self._active = False

    def _call(self, news: News | None) -> None:
        if self._active:
            self._wake(news)


class Watches:
    """The watches of one process, by key. `key in watches` says whether somebody watches it."""

    def __init__(self) -> None:
        self._by_key: dict[str, list[Watch]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def add(self, key: str, wake: Wake) -> tuple[Watch, Callable[[], None]]:
        """The new watch, and what stops it, which may be called more than once. The caller greets it with None."""
        watch = Watch(wake)
        self._by_key.setdefault(key, []).append(watch)

        def stop() -> None:
            watch.stop()
            watching = self._by_key.get(key, [])
            if watch in watching:
                watching.remove(watch)
            if not watching:
                self._by_key.pop(key, None)

        return watch, stop

    def announce(self, key: str, news: News | None) -> None:
        """Wakes those who watch this key."""
        for watch in self._by_key.get(key, ()):
            watch.call_soon(news)

    def announce_all(self) -> None:
        """Has everybody read."""
        for key in self._by_key:
            self.announce(key, None)

    def clear(self) -> None:
        """Stops every watch."""
        for watches in self._by_key.values():
            for watch in watches:
                watch.stop()
        self._by_key.clear()
