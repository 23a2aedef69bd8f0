"""Repeats calls to a store that does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from nonstick.errors import StoreUnavailable

__all__ = ["retry_until_answered"]

T = TypeVar("T")


async def retry_until_answered(call: Callable[[], Awaitable[T]], *, pause: float = 1.0) -> T:
    """Repeats the call until the store answers. For background work that has no caller to report an error to.

    Args:
        pause: Seconds between two tries.

    Raises:
        Whatever the call raises, but for `StoreUnavailable`: any other refusal is an answer.
    """
    while True:
        try:
            return await call()
        except StoreUnavailable:
            await asyncio.sleep(pause)
