"""A deadline for what is awaited. Every request has some, and an `asyncio.timeout` costs more."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

__all__ = ["Deadline"]


class Deadline:
    """Cancels what is awaited within it after so many seconds, and turns that into a `TimeoutError`.

    A cancellation that is not the deadline's stays one, also when both come together. Entered once, in a task.

    Args:
        seconds: None if it passes only when it is hastened.
    """

    __slots__ = ("_before", "_handle", "_passed", "_seconds", "_task", "was_hastened")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._passed = False
        self.was_hastened = False

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        task: asyncio.Task[Any] | None = asyncio.current_task(loop)
        assert task is not None
        self._task = task
        self._before = task.cancelling()
        self._handle = None if self._seconds is None else loop.call_later(self._seconds, self._pass)

    def hasten(self) -> None:
        """The deadline passes now. Called only while its block runs, and from another task."""
        if not self._passed:
            self.was_hastened = True
            self._pass()

    def _pass(self) -> None:
        self._passed = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
        if self._passed and self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise TimeoutError from error
