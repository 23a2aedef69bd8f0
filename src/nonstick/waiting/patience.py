"""Waiting for a store that does not answer, in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from nonstick.errors import StoreUnavailable

__all__ = ["patiently"]

T = TypeVar("T")


async def patiently(call: Callable[[], Awaitable[T]], *, pause: float = 1.0) -> T:
    """What the store answers, as soon as it can be reached: for callers that have nobody to tell that it cannot.

    Args:
        pause: Seconds between two tries.
    """
    while True:
        try:
            return await call()
        except StoreUnavailable:
            await asyncio.sleep(pause)
