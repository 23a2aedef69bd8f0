"""Tasks and timers that belong to no request.

asyncio gives a task the context of the code that began it. What goes on for others, or for ever, would then keep one
request's variables, its user and its trace, and go on in them: it begins in an empty context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

__all__ = ["later", "spawn"]

T = TypeVar("T")


def spawn(work: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
    """Runs this in a task of its own."""
    return asyncio.create_task(work, name=name, context=Context())


def later(seconds: float, call: Callable[[], object]) -> asyncio.TimerHandle:
    """Calls this after so many seconds."""
    return asyncio.get_running_loop().call_later(seconds, call, context=Context())
