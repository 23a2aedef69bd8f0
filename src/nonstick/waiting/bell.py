"""What wakes those who wait: as `asyncio.Event`, which costs ten times the memory, and every open stream has some."""

from __future__ import annotations

import asyncio

__all__ = ["Bell"]


class Bell:
    """Wakes all who wait when it is rung. It keeps nothing: whoever comes later waits for the next time.

    So look whether there is anything to wait for, and wait, with no other `await` in between.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def ring(self) -> None:
        """Wakes all who wait."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    def rung(self) -> asyncio.Future[None]:
        """To be awaited: done the next time it is rung. May be cancelled at any time."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting = [*(one for one in self._waiting if not one.done()), future]
        return future
