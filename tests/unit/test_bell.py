"""A bell wakes all who wait when it is rung, and keeps nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from nonstick.waiting.bell import Bell

pytestmark = pytest.mark.anyio


async def test_all_who_wait_are_woken() -> None:
    bell = Bell()
    waiting = [bell.rung() for _ in range(3)]
    bell.ring()
    async with asyncio.timeout(60):
        await asyncio.gather(*waiting)


async def test_late_waiter_waits_for_next_ring() -> None:
    """Whoever comes after a ring is not woken by it."""
    bell = Bell()
    bell.ring()
    later = bell.rung()
    assert not later.done()
    bell.ring()
    assert later.done()


async def test_who_gives_up_disturbs_nobody_else() -> None:
    bell = Bell()
    given_up, waiting = bell.rung(), bell.rung()
    given_up.cancel()
    bell.ring()
    assert given_up.cancelled()
    assert waiting.done()


async def test_abandoned_waiter_is_forgotten() -> None:
    """P10: a silent stream gives up and waits again every few seconds."""
    bell = Bell()
    given_up = bell.rung()
    given_up.cancel()
    gone = weakref.ref(given_up)
    del given_up
    bell.rung()
    gc.collect()
    assert gone() is None
