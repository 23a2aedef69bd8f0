"""What is particular to the in-memory store; what every store promises is in the contract."""

from __future__ import annotations

import asyncio
import sys

import pytest

from nonstick.errors import AlreadyExists, SessionNotFound
from nonstick.store import CANCEL_SECONDS, Batch, Cursor, Draft
from nonstick.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio


async def test_expired_sessions_are_dropped() -> None:
    """Memory returns to its base without anybody asking for the expired ones (P10)."""
    now = [0.0]
    field, data = b"field" * 100, b"data" * 100
    base = sys.getrefcount(field), sys.getrefcount(data)
    async with MemoryStore(clock=lambda: now[0]) as store:
        await store.create("live", {}, lifetime=1000)
        for n in range(10):
            await store.create(f"key{n}", {"name": field}, lifetime=5, limits={"group": 10})
            await store.append(f"key{n}", Batch([Draft(b"8 bytes.", data)]))
        assert (sys.getrefcount(field), sys.getrefcount(data)) > base
        now[0] += 20
        await store.load("live")
        assert (sys.getrefcount(field), sys.getrefcount(data)) == base


async def test_instance_closes_with_its_last_user() -> None:
    """Several managers of one process share it; one that leaves ends nothing of the others."""
    store = MemoryStore()
    async with store:
        async with store:
            await store.create("key", {}, lifetime=10)
        woken = asyncio.Event()
        store.watch("key", lambda events: woken.set())
        async with asyncio.timeout(60):
            await woken.wait()
            woken.clear()
            async with store:
                pass
            await store.delete("key")
            await woken.wait()


async def test_lifetime_ends_at_its_last_instant() -> None:
    """As with every store that counts by itself: what expires at an instant is gone at it."""
    now = [0.0]
    async with MemoryStore(clock=lambda: now[0]) as store:
        await store.create("key", {"old": b"1"}, lifetime=5)
        now[0] = 4.75
        with pytest.raises(AlreadyExists):
            await store.create("key", {}, lifetime=5)
        now[0] = 5.0
        with pytest.raises(SessionNotFound):
            await store.read("key", Cursor(0))
        await store.create("key", {}, lifetime=5)
        assert (await store.load("key")).fields == {}


async def test_cancel_stays_for_a_minute() -> None:
    now = [0.0]
    async with MemoryStore(clock=lambda: now[0]) as store:
        await store.create("key", {}, lifetime=1000)
        await store.append("key", Batch([], cancel="7"))
        now[0] = CANCEL_SECONDS - 0.25
        assert (await store.load("key")).cancels == {"7"}
        now[0] = CANCEL_SECONDS
        assert (await store.load("key")).cancels == frozenset()


async def test_closed_store_wakes_nobody() -> None:
    """What its last user watched."""
    woken: list[object] = []
    store = MemoryStore()
    async with store:
        await store.create("key", {}, lifetime=1000)
        store.watch("key", woken.append)
        await asyncio.sleep(0)
        assert woken == [None]
    async with store:
        await store.append("key", Batch([Draft(b"8 bytes.", b"data")]))
        fence = asyncio.Event()
        store.watch("key", lambda _: fence.set())
        await fence.wait()
    assert woken == [None]
