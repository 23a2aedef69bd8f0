"""The commands of one connection whose replies have not come yet, in the order of writing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from nonstick.errors import StoreUnavailable

__all__ = ["Unanswered"]


class Unanswered:
    """A queue that is bounded by number and by bytes (P10). A caller that gave up keeps its place until its reply came.

    Attributes:
        waiting: The commands, the oldest first: future, deadline, size, number of replies to come, and what takes those
            before the last one.
        unwritten: The bytes of the commands, all of them, while there is no socket to write them to; else empty.
    """

    def __init__(self, *, max_waiting: int, max_bytes: int) -> None:
        self.unwritten: list[bytes] = []
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._bytes = 0
        self.waiting: deque[tuple[asyncio.Future[Any], float, int, int, list[Any] | None]] = deque()

    def add(
        self, future: asyncio.Future[Any], deadline: float, size: int, replies: int, told: list[Any] | None = None
    ) -> bool:
        """Adds a command at the end. Whether there was room.

        Args:
            deadline: Loop time.
            size: Bytes.
            replies: How many come. The last one is the command's own.
            told: Takes those before it, which else are dropped.
        """
        if self._bytes + size > self._max_bytes or len(self.waiting) >= self._max_waiting:
            return False
        self.waiting.append((future, deadline, size, replies, told))
        self._bytes += size
        return True

    def answered(self, reply: Any) -> asyncio.Future[Any] | None:
        """A reply came: the future of its command, which is taken out. None for a reply that is not the last one."""
        future, deadline, size, replies, told = self.waiting.popleft()
        if replies > 1:
            self.waiting.appendleft((future, deadline, size, replies - 1, told))
            if told is not None:
                told.append(reply)
            return None
        self._bytes -= size
        return future

    def to_write(self) -> list[bytes]:
        """The bytes of what still waits, to be written now. Drops what nobody waits for any more: it never was sent."""
        unwritten, commands = self.unwritten, self.waiting
        self.unwritten, self.waiting, self._bytes = [], deque(), 0
        wanted: list[bytes] = []
        for packed, command in zip(unwritten, commands, strict=True):
            if not command[0].done():
                self.waiting.append(command)
                self._bytes += command[2]
                wanted.append(packed)
        return wanted

    def fail(self, reason: str, count: int | None = None, *, kind: type[StoreUnavailable] = StoreUnavailable) -> None:
        """Ends the wait of the oldest `count` commands, or of all."""
        del self.unwritten[:count]
        for _ in range(len(self.waiting) if count is None else count):
            future, _, size, _, _ = self.waiting.popleft()
            self._bytes -= size
            if not future.done():
                future.set_exception(kind(reason))

    def expire(self, now: float, error: Callable[[], StoreUnavailable]) -> None:
        """Ends the wait of all commands whose deadline has passed. They keep their places."""
        for future, deadline, _, _, _ in self.waiting:
            if now >= deadline and not future.done():
                future.set_exception(error())
