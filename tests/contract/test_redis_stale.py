"""`stale` on Redis-compatible servers: what one log of many, one server of several, or the way to them can do wrong."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest
import redis

from nonstick.errors import StoreUnavailable
from nonstick.log.guard import GuardedStore
from nonstick.store import Batch, Cursor
from nonstick.stores.redis import RedisStore
from nonstick.stores.redis.sockets import Socket
from nonstick.testing import FaultProxy, ValkeyCluster, ValkeyServer
from nonstick.testing.contract.checks import LONG
from nonstick.testing.contract.tools import DEADLINE, drafts, eventually

pytestmark = pytest.mark.anyio

SESSIONS = 24
"""So many that of a Cluster no server has all of them, but by a chance of one in a hundred thousand millions."""


@pytest.fixture
def prefix() -> str:
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def admin(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    """Talks to the server behind the store's back."""
    with redis.Redis.from_url(valkey.url, protocol=2) as client:
        yield client


@pytest.fixture
async def store(valkey: ValkeyServer, prefix: str) -> AsyncIterator[RedisStore]:
    async with RedisStore(valkey.url, prefix=prefix, timeout=DEADLINE) as store:
        yield store


async def logs(store: RedisStore) -> dict[str, Cursor]:
    """Sessions with two events each, and the ends of their logs."""
    places: dict[str, Cursor] = {}
    for _ in range(SESSIONS):
        key = secrets.token_hex(16)
        batch = Batch(drafts(b"1", b"2"), writer="w", sequence=1)
        await store.create(key, {}, lifetime=LONG)
        await store.append(key, batch)
        places[key] = Cursor(2, batch.events[-1].tag)
    return places


# ---- one log of many


@pytest.mark.parametrize(("part", "is_named"), [("r", True), ("w", True), ("l", False)])
async def test_evicted_parts_are_named_where_missed(
    store: RedisStore, prefix: str, admin: redis.Redis, part: str, is_named: bool
) -> None:
    """P9: as `read` answers. Without the log itself, whoever has all of it has lost nothing; the books' loss is one."""
    places = await logs(store)
    key = next(iter(places))
    admin.delete(f"{prefix}:{{{key}}}:{part}")
    assert await store.stale(places) == ({key} if is_named else set())


async def test_unreadable_record_names_its_log_alone(store: RedisStore, prefix: str, admin: redis.Redis) -> None:
    """A log about which alone there is no answer is named; no other is."""
    places = await logs(store)
    first, *_, last = places
    for key in (first, last):
        admin.set(f"{prefix}:{{{key}}}:r", "no record")
    assert await store.stale(places) == {first, last}


async def test_cancelled_look_disturbs_no_neighbours(store: RedisStore) -> None:
    """A cancelled call must not disturb any other call: the replies to many commands keep their places."""
    places = await logs(store)
    first = next(iter(places))
    for _ in range(10):
        looks = [asyncio.ensure_future(store.stale(places)) for _ in range(6)]
        loads = [asyncio.ensure_future(store.load(first)) for _ in range(6)]
        await asyncio.sleep(0)
        for look in looks[::2]:
            look.cancel()
        assert await asyncio.gather(*looks[1::2]) == [set()] * 3
        assert [loaded.head for loaded in await asyncio.gather(*loads)] == [places[first]] * 6


async def test_look_is_written_in_one_go(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round trip, however many logs it is about."""
    places = await logs(store)
    written: list[bytes] = []
    write = Socket.write

    def counted(self: Socket, packed: bytes) -> None:
        written.append(packed)
        write(self, packed)

    monkeypatch.setattr(Socket, "write", counted)
    assert await store.stale(places) == set()
    assert len(written) == 1
    assert written[0].count(b"HMGET") == SESSIONS


# ---- the way to the server


async def test_silent_server_is_unavailable_until_healed(valkey: ValkeyServer, prefix: str) -> None:
    """P9: in half of a call's time, so that a caller who waits as long as a call may take hears of it."""
    async with FaultProxy(valkey.url) as proxy, RedisStore(proxy.url, prefix=prefix, timeout=1.0) as store:
        places = await logs(store)
        proxy.black_hole(requests=False)
        with pytest.raises(StoreUnavailable):
            await store.stale(places)
        await proxy.heal()
        assert await GuardedStore(store, patience=DEADLINE).stale(places) == set()


# ---- one server of several


async def test_moved_slots_are_named_once(cluster: ValkeyCluster, prefix: str) -> None:
    """A server that has not got a log any more says where it is, which is believed from then on."""
    async with RedisStore(cluster.url, prefix=prefix, timeout=DEADLINE) as store:
        places = await logs(store)
        assert await store.stale(places) == set()
        key = next(iter(places))
        slot = cluster.slot(f"{prefix}:{{{key}}}:r")
        home = cluster.primary(slot)
        away = cluster.primary((slot + 8192) % 16384)
        await asyncio.to_thread(cluster.migrate_slot, slot, away)
        try:
            assert await store.stale(places) in ({key}, set())
            assert await store.stale(places) == set()
            await store.append(key, Batch(drafts(b"3")))
            assert await store.stale(places) == {key}
        finally:
            await asyncio.to_thread(cluster.migrate_slot, slot, home)


async def test_frozen_server_hides_no_others_logs(cluster: ValkeyCluster, prefix: str) -> None:
    """P9: its own logs are named, the others are told as ever, within the time that a call may take."""
    async with GuardedStore(RedisStore(cluster.url, prefix=prefix, timeout=4.0), patience=4.0) as guarded:
        store = guarded.store
        assert isinstance(store, RedisStore)
        places = await logs(store)
        owners = {key: cluster.primary(f"{prefix}:{{{key}}}:r") for key in places}
        old = owners[next(iter(places))]
        there = {key for key, owner in owners.items() if owner is old}
        assert there < places.keys()
        assert await guarded.stale(places) == set()
        old.freeze()
        try:
            assert await guarded.stale(places) == there
        finally:
            old.thaw()
            await asyncio.to_thread(cluster.wait_until_whole)

        async def none_is_named() -> bool:
            # Another member may have the logs now: one look finds out which, and the next one asks that.
            return await store.stale(places) == set()

        await eventually(none_is_named)
