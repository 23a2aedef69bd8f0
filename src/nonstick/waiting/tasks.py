"""The background tasks of one node, until the node stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any, Protocol, TypeVar

from nonstick.errors import StoreError, without_text

__all__ = ["Exit", "Spawn", "Tasks"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

Exit = SystemExit | KeyboardInterrupt
"""What a handler raises that wants the process to end."""


class Spawn(Protocol):
    """`Tasks.spawn`."""

    def __call__(self, work: Coroutine[Any, Any, T], context: Context | None = None, /) -> asyncio.Task[T]: ...


class Tasks:
    """The tasks of one node.

    Args:
        exit: Has the process end as somebody else's code said.

    Attributes:
        stopped: The node is over: what still runs is cancelled, and says no more.
    """

    def __init__(self, exit: Callable[[Exit], None]) -> None:  # noqa: A002
        self._exit = exit
        self._running: set[asyncio.Task[Any]] = set()
        self.stopped = False

    def spawn(self, work: Coroutine[Any, Any, T], context: Context | None = None, /) -> asyncio.Task[T]:
        """Runs this in the background, until the node stops at the latest.

        Args:
            context: A request's, for what is done for that request alone; by default an empty one. What goes on for
                others must not go on in the context of the request that happened to begin it.
        """
        task = asyncio.create_task(work, context=Context() if context is None else context)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    async def contained(self, work: Awaitable[T], what: str, *args: object) -> T | None:
        """Runs somebody else's code in the background. Returns what that gives; None if it ended in any other way.

        To be spawned as a task of its own: that code may leave its task unfit for anything else.
        """
        try:
            return await work
        except BaseException as error:
            self.report(error, what, *args)
        return None

    def report(self, error: BaseException, what: str, *args: object) -> None:
        """Logs that somebody else's code ended with this; has the process end if that is what it says."""
        if isinstance(error, SystemExit | KeyboardInterrupt):
            self._exit(error)
        elif not self.stopped:
            logger.error(f"{what} raised", *args, exc_info=without_text(error))

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, StoreError):
                logger.warning("a background task gave up: %s", type(error).__name__)
            else:
                logger.error("a background task failed", exc_info=without_text(error))

    async def stop(self, seconds: float) -> None:
        """Cancels all that runs, and waits so long for its end: a handler in a thread cannot be stopped."""
        self.stopped = True
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
