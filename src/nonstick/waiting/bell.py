"""A bell: wakes tasks that wait. Every open stream has some, and an `asyncio.Event` costs ten times the memory."""

from __future__ import annotations

import asyncio

__all__ = ["Bell"]


class Bell:
    """An edge-triggered event: `ring` wakes only the tasks that are waiting now, and is not remembered.

    Check your condition, and then await `rung` with no other `await` in between, or a ring may be missed.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def ring(self) -> None:
        """Wakes all tasks that wait."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    def rung(self) -> asyncio.Future[None]:
        """To be awaited: done at the next `ring`. May be cancelled at any time."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting = [*(one for one in self._waiting if not one.done()), future]
        return future
