"""The Redis store on a Valkey Cluster and behind Sentinels: the contract, and what only several servers can do.

They move its keys, take over from each other, and lose writes.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nonstick.errors import AlreadyExists, ConfigurationError, Diverged, SessionNotFound, StoreUnavailable
from nonstick.log.follow import Follower
from nonstick.log.guard import GuardedStore
from nonstick.log.lookout import Lookout
from nonstick.store import NEW_STREAM, Batch, Cursor, Event, Store
from nonstick.stores import open_store
from nonstick.stores.redis.scripts import APPEND
from nonstick.stores.redis.sockets import pack
from nonstick.stores.redis.store import RedisStore
from nonstick.testing import (
    Opener,
    StoreContract,
    ValkeyCluster,
    ValkeySentinel,
    ValkeyServer,
    follow,
    opening,
    read_all,
)
from nonstick.testing.contract.staleness import assert_stale
from nonstick.testing.contract.tools import DEADLINE, deadline, drafts, eventually, open_stream, texts
from nonstick.testing.servers.valkey_cluster import ask, until
from tests.tls import self_signed, tls_in_front_of

pytestmark = pytest.mark.anyio

LONG = 600.0

T = TypeVar("T")


@pytest.fixture
def prefix() -> str:
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def key() -> str:
    return secrets.token_hex(16)


@asynccontextmanager
async def opened(url: str, prefix: str, **options: str) -> AsyncIterator[Store]:
    query = "&".join(f"{name}={value}" for name, value in {"prefix": prefix, **options}.items())
    async with open_store(f"{url}?{query}") as store:
        yield store


async def repeated(call: Callable[[], Awaitable[T]]) -> T:
    """What the store answers once it can be reached."""
    async with deadline():
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await asyncio.sleep(0)


async def stop_replication(primary: ValkeyServer, replica: ValkeyServer) -> None:
    """The replica gets nothing any more, and stands still."""
    replica.freeze()
    await asyncio.to_thread(ask, primary, "CLIENT", "KILL", "TYPE", "replica")


def slot_name(key: str) -> str:
    return f"{{{key}}}"


class TestRedisStoreOnCluster(StoreContract):
    """Each test's sessions lie on one of three servers, and their groups on others."""

    @pytest.fixture
    async def opener(self, cluster: ValkeyCluster) -> AsyncIterator[Opener]:
        prefix = f"test-{secrets.token_hex(6)}"
        async with opening(lambda: RedisStore(cluster.url, prefix=prefix, timeout=DEADLINE)) as opener:
            yield opener


class TestRedisStoreBehindSentinels(StoreContract):
    """Each node asks the Sentinels for the primary."""

    @pytest.fixture
    async def opener(self, sentinel: ValkeySentinel) -> AsyncIterator[Opener]:
        prefix = f"test-{secrets.token_hex(6)}"
        async with opening(lambda: RedisStore(sentinel.url, prefix=prefix, timeout=DEADLINE)) as opener:
            yield opener


# ---- slots that move


async def append_all(store: Store, key: str, count: int, stop: asyncio.Event) -> int:
    """Appends numbered events until it is stopped, at least `count`; each counts once however often it is repeated."""
    n = 0
    while n < count or not stop.is_set():
        n += 1
        assert await append_one(store, key, n) == n
    return n


async def append_one(store: Store, key: str, n: int) -> int:
    batch = Batch(drafts(b"%d" % n), writer="w", sequence=n)
    return (await repeated(lambda: store.append(key, batch))).first


async def follow_into(seen: list[Event], store: Store, key: str) -> None:
    """Follows for ever; while the session is unavailable it goes on after what it has, as a node does."""
    while True:
        try:
            async for event in follow(store, key, seen[-1].cursor if seen else Cursor(0)):
                seen.append(event)  # noqa: PERF401 - what it has is wanted even if it fails
        except StoreUnavailable:
            pass


async def are(seen: list[Event], count: int) -> bool:
    return len(seen) >= count


async def test_slot_moves_under_a_busy_session(cluster: ValkeyCluster, prefix: str, key: str) -> None:
    """P3: through migrations key by key and whole, forth and back: no event is lost, doubled, or skipped."""
    slot = cluster.slot(slot_name(key))
    home = cluster.primary(slot)
    away = cluster.primary((slot + 8192) % 16384)
    assert home is not away

    def migrate(stop: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
        cluster.migrate_slot(slot, away)
        cluster.migrate_slot_whole(slot, home)
        cluster.migrate_slot(slot, away)
        cluster.migrate_slot(slot, home)
        loop.call_soon_threadsafe(stop.set)

    async with opened(cluster.url, prefix) as writer, opened(cluster.url, prefix) as reader:
        await writer.create(key, {"a": b"1"}, lifetime=LONG, limits={"g": 5})
        stop = asyncio.Event()
        appending = asyncio.ensure_future(append_all(writer, key, 200, stop))
        moving = asyncio.ensure_future(asyncio.to_thread(migrate, stop, asyncio.get_running_loop()))
        seen: list[Event] = []
        following = asyncio.ensure_future(follow_into(seen, reader, key))
        await moving
        count = await appending
        await eventually(lambda: are(seen, count))
        following.cancel()
        assert texts(seen) == texts(await read_all(reader, key)) == [b"%d" % n for n in range(1, count + 1)]
        assert (await reader.load(key)).fields == {"a": b"1"}


async def test_session_is_served_during_migration(cluster: ValkeyCluster, prefix: str, key: str) -> None:
    """ASK is followed, with ASKING; while its keys lie on two servers a session is unavailable, never gone (P9)."""
    slot = cluster.slot(slot_name(key))
    home, away = cluster.primary(slot), cluster.primary((slot + 8192) % 16384)
    record, books, log = (f"{prefix}:{{{key}}}:{kind}" for kind in "rwl")
    # Any key may lie in the same slot.
    ask(home, "SET", f"{slot_name(key)} of somebody else", "1")
    async with (
        RedisStore(cluster.url, prefix=prefix, timeout=0.5) as store,
        RedisStore(cluster.url, prefix=prefix, timeout=15) as patient,
    ):
        await store.create(key, {}, lifetime=LONG)
        await store.append(key, Batch(drafts(b"1"), writer="w", sequence=1))
        cluster.begin_migration(slot, away)
        assert (await store.append(key, Batch(drafts(b"2"), writer="w", sequence=2))).first == 2
        cluster.move_keys(slot, away, log)
        with pytest.raises(StoreUnavailable, match="moving"):
            await store.load(key)
        refused = times_refused(home)
        waiting = asyncio.ensure_future(patient.append(key, Batch(drafts(b"3"), writer="w", sequence=3)))
        while times_refused(home) == refused:  # noqa: ASYNC110 - what is waited for happens in the server
            await asyncio.sleep(0.01)
        await asyncio.to_thread(cluster.move_keys, slot, away, record, books)
        assert (await waiting).first == 3
        # Most of its commands are answered by the old owner with ASK now.
        assert (await store.append(key, Batch(drafts(b"4"), writer="w", sequence=4))).first == 4
        assert texts(await read_all(store, key)) == [b"1", b"2", b"3", b"4"]
        ask(away, "SCRIPT", "FLUSH")
        assert (await store.append(key, Batch(drafts(b"5"), writer="w", sequence=5))).first == 5
        cluster.end_migration(slot, away)
        assert (await store.load(key)).head.position == 5
        cluster.migrate_slot(slot, home)
        assert (await store.load(key)).head.position == 5


def times_refused(server: ValkeyServer) -> int:
    """How many commands it has answered with TRYAGAIN."""
    return int(ask(server, "INFO", "errorstats").get("errorstat_TRYAGAIN", {"count": 0})["count"])


async def test_repeated_delete_leaves_the_sessions_groups(
    cluster: ValkeyCluster, prefix: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P10: the server was not believed at first, and has forgotten the session's groups when it says so again."""
    async with RedisStore(cluster.url, prefix=prefix, timeout=DEADLINE) as store:
        await store.create(key, {}, lifetime=LONG, limits={"g": 1})
        proof, doubts = store._opened.proof, iter([True])
        for name in ("of_owner", "of_loss"):
            believed = getattr(proof, name)

            async def doubted(*args: Any, believed: Any = believed, **options: Any) -> bool:
                return not next(doubts, False) and await believed(*args, **options)

            monkeypatch.setattr(proof, name, doubted)
        assert await store.delete(key)
        assert next(doubts, None) is None
        await store.create(f"{key}2", {}, lifetime=LONG, limits={"g": 1})


# ---- servers that take over


async def test_killed_primary_is_unavailable_until_replaced(cluster: ValkeyCluster, prefix: str, key: str) -> None:
    """P9: StoreUnavailable, then it goes on by itself: the session, its follower, the lease and the subscriptions."""
    name = slot_name(key)
    async with (
        opened(cluster.url, prefix, durability="replicated") as writer,
        opened(cluster.url, prefix) as reader,
    ):
        await writer.create(key, {}, lifetime=LONG)
        stream = (await writer.append(key, Batch(drafts(b"1"), stream=NEW_STREAM, terminal=True))).first
        lease = writer.lease("node")
        await asyncio.to_thread(lease.renew, LONG)
        seen: list[Event] = []
        following = asyncio.ensure_future(follow_into(seen, reader, key))
        await eventually(lambda: are(seen, 1))

        old = cluster.primary(name)
        await asyncio.to_thread(old.kill)
        try:
            with pytest.raises(StoreUnavailable):
                await writer.load(key)
            assert (await repeated(lambda: writer.load(key))).head.position == stream
            await repeated(lambda: writer.append(key, Batch(drafts(b"2"), writer="w", sequence=1)))
            await eventually(lambda: are(seen, 2))
            following.cancel()
            assert texts(seen) == [b"1", b"2"]
            await asyncio.to_thread(cluster.wait_for_successor, name, old)
            await repeated(writer.ping)
            # It has to find out as well: a node tries again every second.
            await repeated(lambda: asyncio.to_thread(lease.renew, LONG))
            assert await writer.lapsed(["node", "nobody"]) == {"nobody"}
        finally:
            await asyncio.to_thread(lease.close, release=True)
            await asyncio.to_thread(come_back, cluster, old)


async def key_at(cluster: ValkeyCluster, server: ValkeyServer, *, there: bool) -> str:
    """A new session's key, which this server owns, or does not."""
    while True:
        key = secrets.token_hex(16)
        if (cluster.primary(slot_name(key)) is server) is there:
            return key


async def test_impatient_calls_leave_a_frozen_primary(cluster: ValkeyCluster, prefix: str, key: str) -> None:
    """P9: a node gives up when the store's own deadline does, or before; it must find the new primary all the same."""
    name = slot_name(key)
    old = cluster.primary(name)
    node = next(node for node in map(str, range(1000)) if cluster.primary(f"{prefix}:n:{node}") is old)
    # As a node has them, only sooner; nothing is watched, which would find it out too.
    async with GuardedStore(RedisStore(cluster.url, prefix=prefix, timeout=1.0), patience=1.0) as store:
        await store.create(key, {}, lifetime=LONG)
        lease = store.lease(node)
        await asyncio.to_thread(lease.renew, LONG)
        old.freeze()
        try:
            with pytest.raises(StoreUnavailable):
                await store.load(key)
            with pytest.raises(StoreUnavailable):
                await asyncio.to_thread(lease.renew, LONG)
            # The other servers' sessions are served meanwhile: the node is ready.
            await store.ping()
            await asyncio.to_thread(cluster.wait_for_successor, name, old)
            await repeated(lambda: store.load(key))
            await repeated(lambda: asyncio.to_thread(lease.renew, LONG))
            await asyncio.to_thread(lease.close, release=True)
            assert await store.lapsed([node]) == {node}
        finally:
            old.thaw()
            await asyncio.to_thread(cluster.wait_until_whole)


async def test_frozen_group_server_delays_no_session(cluster: ValkeyCluster, prefix: str) -> None:
    """P9: what was done to a session is answered so; only its count lags behind."""
    frozen = cluster.primary(f"{prefix}:g:all")
    keys = [await key_at(cluster, frozen, there=False) for _ in range(3)]
    async with GuardedStore(RedisStore(cluster.url, prefix=prefix)) as store:
        for key in keys:
            await store.create(key, {}, lifetime=LONG, limits={"all": 5, "own": 5})
        frozen.freeze()
        try:
            _, deleted, updated = await asyncio.gather(
                store.touch(keys[:1]), store.delete(keys[1]), store.update(keys[2], {"a": b"1"}, lifetime=LONG)
            )
        finally:
            # It is replaced while it cannot be reached, not in the middle of the next test.
            await asyncio.to_thread(cluster.wait_for_successor, f"{prefix}:g:all", frozen)
            frozen.thaw()
            await asyncio.to_thread(cluster.wait_until_whole)
        assert (deleted, updated) == (True, True)
        assert (await store.load(keys[2])).fields == {"a": b"1"}


async def test_lost_subscriptions_move_to_another_server(cluster: ValkeyCluster, prefix: str, key: str) -> None:
    """Every watch is told to read, and hears again (P3)."""
    async with opened(cluster.url, prefix) as store:
        await store.create(key, {}, lifetime=LONG)
        hints: asyncio.Queue[object] = asyncio.Queue()
        store.watch(key, hints.put_nowait)
        async with deadline():
            assert await hints.get() is None
            for node in cluster.nodes:
                ask(node, "CLIENT", "KILL", "TYPE", "pubsub")
            assert await hints.get() is None
            await store.append(key, Batch(drafts(b"x")))
            assert await hints.get() is not None


@pytest.mark.parametrize("kind", ["cluster", pytest.param("sentinel", marks=pytest.mark.slow)])
async def test_failover_that_lost_writes_diverges(
    request: pytest.FixtureRequest, kind: str, prefix: str, key: str
) -> None:
    """P9: what the new primary never got is reported to whoever had it, and to who wrote it; never skipped."""
    group: ValkeyCluster | ValkeySentinel = request.getfixturevalue(kind)
    old = group.primary(slot_name(key)) if isinstance(group, ValkeyCluster) else group.primary
    (replica,) = group.replicas(old) if isinstance(group, ValkeyCluster) else group.replicas
    async with opened(group.url, prefix) as store:
        await store.create(key, {}, lifetime=LONG)
        opening = Batch(drafts(b"opened"), writer="w", sequence=1, stream=NEW_STREAM)
        stream = (await store.append(key, opening)).first
        kept = (await store.load(key)).head
        assert await asyncio.to_thread(ask, old, "SET", f"{prefix}:{slot_name(key)}:x", "", "PX", 1000)
        await eventually(lambda: has_all_of(replica, old))
        await stop_replication(old, replica)
        for n in (2, 3):
            await store.append(key, Batch(drafts(b"lost"), writer="w", sequence=n, stream=stream))
        lost = (await store.load(key)).head
        old.kill()
        replica.thaw()
        with pytest.raises(Diverged):
            await repeated(lambda: store.read(key, lost))
        with pytest.raises(Diverged):
            await store.append(key, Batch(drafts(b"next"), writer="w", sequence=4, stream=stream))
        assert await store.read(key, kept) == []
        await store.append(key, Batch(drafts(*[b"other"] * 3)))
        with pytest.raises(Diverged):
            await store.read(key, lost)
        assert texts(await store.read(key, kept)) == [b"other"] * 3
    await asyncio.to_thread(come_back, group, old)


class Followed:
    """A node's place in a log: what it was given since it was last told of a loss."""

    def __init__(self, store: Store, key: str) -> None:
        guarded = GuardedStore(store)
        self._follower = Follower(guarded, Lookout(guarded), key)
        self.seen: list[Event] = []
        self.losses = 0

    async def run(self) -> None:
        subscription = self._follower.subscribe(Cursor(0))
        try:
            while True:
                try:
                    self.seen += await subscription.next()
                except StoreUnavailable:
                    pass
                except Diverged:
                    subscription.close()
                    self.seen, self.losses = [], self.losses + 1
                    subscription = self._follower.subscribe(Cursor(0))
        finally:
            subscription.close()

    async def has(self, log: list[Event]) -> bool:
        return self.seen == log


@asynccontextmanager
async def followed(store: Store, key: str) -> AsyncIterator[Followed]:
    place = Followed(store, key)
    task = asyncio.create_task(place.run())
    yield place
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.slow
async def test_entry_in_lost_entrys_place_arrives(cluster: ValkeyCluster, prefix: str, key: str) -> None:
    """P3, P14: a node had the last event, which the replica did not; the next one takes its position."""
    old = cluster.primary(slot_name(key))
    (replica,) = cluster.replicas(old)
    async with opened(cluster.url, prefix) as store, opened(cluster.url, prefix) as other:
        await store.create(key, {}, lifetime=LONG)
        async with followed(other, key) as place:
            await store.append(key, Batch(drafts(b"kept")))
            await eventually(lambda: has_all_of(replica, old))
            await stop_replication(old, replica)
            await store.append(key, Batch(drafts(b"lost")))
            await eventually(lambda: are(place.seen, 2))
            old.kill()
            replica.thaw()
            await repeated(lambda: store.append(key, Batch(drafts(b"next"), writer="w", sequence=1)))
            await repeated(lambda: store.append(key, Batch(drafts(b"last"), writer="w", sequence=2)))
            log = await read_all(store, key)
            assert texts(log) == [b"kept", b"next", b"last"]
            await eventually(lambda: place.has(log))
            assert place.losses
    await asyncio.to_thread(come_back, cluster, old)


@pytest.mark.slow
async def test_thawed_primarys_news_displace_nothing(cluster: ValkeyCluster, prefix: str, key: str) -> None:
    """P3, P14: it runs what lay in its buffers before it hears that it was replaced, and tells everybody of it."""
    name = slot_name(key)
    old = cluster.primary(name)
    (replica,) = cluster.replicas(old)
    async with opened(cluster.url, prefix) as store, opened(cluster.url, prefix) as other:
        await store.create(key, {}, lifetime=LONG)
        async with followed(other, key) as place:
            await store.append(key, Batch(drafts(b"kept")))
            await eventually(lambda: are(place.seen, 1))
            await eventually(lambda: has_all_of(replica, old))
            script = old.port, script_of(key, prefix)
            with socket.create_connection(("127.0.0.1", script[0])) as waiting:
                old.freeze()
                try:
                    waiting.sendall(script[1])
                    await asyncio.to_thread(cluster.wait_for_successor, name, old)
                finally:
                    old.thaw()
                for n in range(1, 4):
                    await repeated(lambda: store.append(key, Batch(drafts(b"%d" % n), writer="w", sequence=n)))  # noqa: B023
                log = await read_all(store, key)
                await eventually(lambda: place.has(log))
    await asyncio.to_thread(cluster.wait_until_whole)


def script_of(key: str, prefix: str) -> bytes:
    """The command that appends one event to this log."""
    stem = f"{prefix}:{{{key}}}:"
    args = (
        "EVALSHA",
        APPEND.on_cluster.sha,
        3,
        f"{stem}r",
        f"{stem}w",
        f"{stem}l",
        f"{stem}c0",
        "",
        0,
        0,
        1,
        "",
        b"phantom!",
        b"phantom",
    )
    return pack(args)


async def has_all_of(replica: ValkeyServer, primary: ValkeyServer) -> bool:
    return bool(ask(replica, "ROLE")[4] >= ask(primary, "ROLE")[1])


def come_back(group: ValkeyCluster | ValkeySentinel, server: ValkeyServer) -> None:
    if not server.running:
        server.start()
    if isinstance(group, ValkeySentinel):
        group.rejoin(server)
    else:
        group.wait_until_whole()


@pytest.mark.parametrize("fault", ["planned", pytest.param("frozen", marks=pytest.mark.slow)])
async def test_answering_old_primary_gets_no_write(sentinel: ValkeySentinel, prefix: str, key: str, fault: str) -> None:
    """After a planned failover, or when it wakes up, it takes writes for ten seconds, then throws them away (P9)."""
    old = sentinel.primary
    async with opened(sentinel.url, prefix) as store, opened(sentinel.url, prefix) as idle:
        await store.create(key, {}, lifetime=LONG)
        await idle.ping()
        lease = idle.lease("node")
        await asyncio.to_thread(lease.renew, LONG)
        if fault == "planned":
            # Until they have named the other one, the Sentinels let the old one take writes that will be lost.
            new = await asyncio.to_thread(sentinel.failover)
        else:
            old.freeze()
            trying = asyncio.ensure_future(repeated(store.ping))
            new = await asyncio.to_thread(sentinel.wait_for_successor, old)
            await asyncio.to_thread(old.thaw)
            await trying
        # The one that has not asked for anything since has heard of it, too.
        await eventually(lambda: has_left(old, prefix))
        assert (ask(old, "ROLE")[0], ask(new, "ROLE")[0]) == ("master", "master"), "nobody but the Sentinels told them"
        await repeated(lambda: idle.append(key, Batch(drafts(b"idle"), writer="i", sequence=1)))
        await append_one(store, key, 1)
        await asyncio.to_thread(lease.renew, LONG + 60)
        assert ask(new, "PTTL", f"{prefix}:n:node") > LONG * 1000
        await asyncio.to_thread(lease.close, release=True)
        assert await idle.lapsed(["node"]) == {"node"}
        await asyncio.to_thread(sentinel.rejoin, old)
        assert texts(await repeated(lambda: read_all(store, key))) == [b"idle", b"1"]


async def has_left(server: ValkeyServer, prefix: str) -> bool:
    """No store is connected to it any more."""
    return f" name={prefix} " not in ask(server, "CLIENT", "LIST")


# ---- durability


@pytest.mark.parametrize("kind", ["cluster", pytest.param("sentinel", marks=pytest.mark.slow)])
async def test_replicated_writes_wait_for_a_replica(
    request: pytest.FixtureRequest, kind: str, prefix: str, key: str
) -> None:
    """`durability="replicated"`: unconfirmed means unknown, and the repeat is a duplicate at the same position."""
    group: ValkeyCluster | ValkeySentinel = request.getfixturevalue(kind)
    primary = group.primary(slot_name(key)) if isinstance(group, ValkeyCluster) else group.primary
    (replica,) = group.replicas(primary) if isinstance(group, ValkeyCluster) else group.replicas
    async with (
        opened(group.url, prefix, durability="replicated") as store,
        opened(group.url, prefix, durability="replicated") as another,
        opened(group.url, prefix) as careless,
    ):
        await store.create(key, {}, lifetime=LONG)
        stream = await open_stream(store, key)
        replica.freeze()
        try:
            terminal = Batch(drafts(b"end"), writer="w", sequence=1, stream=stream, terminal=True)
            question = Batch(drafts(b"?"), writer="q", sequence=1, expect=["id"])
            outcomes = await asyncio.gather(
                store.append(key, terminal), store.append(key, question), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 2
            assert "no replica confirmed" in str(outcomes[0])
            # A repeat by way of a connection that has written nothing itself is not confirmed either.
            with pytest.raises(StoreUnavailable, match="no replica confirmed"):
                await another.append(key, terminal)
            with pytest.raises(StoreUnavailable, match="no replica confirmed"):
                await another.create(key, {}, lifetime=LONG)
            # What does not matter so much does not wait, nor does who did not ask for it.
            await store.append(key, Batch(drafts(b"progress")))
            await careless.append(key, Batch(drafts(b"?"), expect=["other"]))
        finally:
            replica.thaw()
        again = await repeated(lambda: store.append(key, terminal))
        assert (again.duplicate, again.first) == (True, 2)
        assert (await repeated(lambda: another.append(key, question))).duplicate
        with pytest.raises(AlreadyExists):
            await repeated(lambda: another.create(key, {}, lifetime=LONG))
        assert texts(await read_all(store, key)) == [b"opened", b"end", b"?", b"progress", b"?"]


async def test_server_without_replica_confirms_nothing(valkey: ValkeyServer, prefix: str, key: str) -> None:
    """`durability="replicated"` says what it needs."""
    async with RedisStore(valkey.url, prefix=prefix, durability="replicated") as store:
        with pytest.raises(StoreUnavailable, match="needs one that is connected"):
            await store.create(key, {}, lifetime=LONG)
        await store.delete(key)
        with pytest.raises(SessionNotFound):
            await store.read(key, Cursor(0))


async def test_write_awaiting_replica_ends_with_store(valkey: ValkeyServer, prefix: str, key: str) -> None:
    """A store that is closed leaves nobody waiting."""
    async with RedisStore(valkey.url, prefix=prefix, durability="replicated", timeout=100.0) as store:
        creating = asyncio.ensure_future(store.create(key, {}, lifetime=LONG))
        await eventually(lambda: waits_for_replicas(valkey, prefix))
    async with deadline():
        with pytest.raises(StoreUnavailable):
            await creating


async def waits_for_replicas(server: ValkeyServer, prefix: str) -> bool:
    clients = ask(server, "CLIENT", "LIST").splitlines()
    return any(f" name={prefix} " in client and " cmd=wait " in client for client in clients)


# ---- who may do what, and who may listen


PASSWORD = "hunter2"


def acl(channel: str, **places: str) -> list[str]:
    """The words of the one line in docs/stores.md that grants this channel, for another password and prefix."""
    page = (Path(__file__).parents[2] / "docs" / "stores.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("ACL SETUSER") and f"&{channel} " in line]
    for name, value in places.items():
        line = line.replace(name, value)
    return line.split(" ")


@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
async def test_least_privileged_user_can_do_everything(
    request: pytest.FixtureRequest, kind: str, prefix: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The ACL lines of the manual are exact: enough for every method, and for nothing outside the prefix."""
    group: ValkeyCluster | ValkeySentinel = request.getfixturevalue(kind)
    servers = [*group.nodes] if isinstance(group, ValkeyCluster) else [*group.servers]
    line = acl("nonstick:*", PASSWORD=PASSWORD, nonstick=prefix)
    login = f"//{prefix}:{PASSWORD}@"
    options = {"durability": "replicated"}
    for server in servers:
        ask(server, *line)
    if isinstance(group, ValkeySentinel):
        for watcher in group.sentinels:
            ask(watcher, *acl("+switch-master", PASSWORD=PASSWORD, nonstick=prefix))
        options |= {"sentinel_username": prefix, "sentinel_password": PASSWORD}
    try:
        async with opened(group.url.replace("//", login), prefix, **options) as store:
            await everything(store, key)
            assert isinstance(store, RedisStore)
            assert {one.subject: one.level for one in await store.examine()}["permissions"] == "ok"
            assert PASSWORD not in caplog.text + store.url + repr(store)
        async with opened(group.url.replace("//", login), f"x{prefix}") as stranger:
            with pytest.raises(StoreUnavailable, match="permission"):
                await stranger.ping()
    finally:
        for server in [*servers, *(group.sentinels if isinstance(group, ValkeySentinel) else [])]:
            ask(server, "ACL", "DELUSER", prefix)
    assert [record.message for record in caplog.records if "refused" in record.message] == []


async def everything(store: Store, key: str) -> None:
    """Every method of a store, once at least, and a wake."""
    await store.ping()
    await store.create(key, {"a": b"1"}, lifetime=LONG, limits={"g": 5})
    hints: asyncio.Queue[object] = asyncio.Queue()
    store.watch(key, hints.put_nowait)
    async with deadline():
        assert await hints.get() is None
        stream = (await store.append(key, Batch(drafts(b"1"), stream=NEW_STREAM, cancel="c", expect=["q"]))).first
        assert await hints.get() is not None
    await store.append(key, Batch(drafts(b"2"), stream=stream, terminal=True, uncancel="c", fields={"b": b"2"}))
    await store.append(key, Batch(drafts(b"3"), settle="q", cancel="d"))
    assert await store.update(key, {"a": None}, expect={"a": b"1"}, lifetime=LONG + 1)
    events = await store.read(key, Cursor(0))
    assert len(events) == 3
    await assert_stale(store, {key: events[-1].cursor, "nobody's": Cursor(0)}, {"nobody's"})
    await store.trim(key, streams=[stream], standalone_before=4)
    await store.touch([key])
    assert (await store.load(key)).fields == {"b": b"2"}
    lease = store.lease("node")
    await asyncio.to_thread(lease.renew, LONG)
    assert await store.lapsed(["node", "other"]) == {"other"}
    await asyncio.to_thread(lease.close, release=True)
    assert await store.delete(key)


def announced(node: ValkeyServer) -> set[int]:
    return {owner[1] for _, _, owner, *_ in ask(node, "CLUSTER", "SLOTS")}


@pytest.mark.slow
async def test_tls_checks_every_cluster_member(
    prefix: str, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`rediss+cluster://`: also the members that the URL does not name, the subscription and the lease."""
    certificate = self_signed(tmp_path)
    with ValkeyCluster() as cluster:
        async with AsyncExitStack() as stack:
            ports = [await stack.enter_async_context(tls_in_front_of(node, certificate)) for node in cluster.nodes]
            keys = [f"{key}{n}" for n in range(12)]
            assert len({cluster.primary(slot_name(one)).port for one in keys}) == 3
            for node, port in zip(cluster.nodes, ports, strict=True):
                ask(node, "CONFIG", "SET", "cluster-announce-client-port", port)
            await asyncio.to_thread(until, lambda: all(announced(node) == {*ports} for node in cluster.nodes), "known")
            url = f"rediss+cluster://127.0.0.1:{ports[0]}"
            async with opened(url, prefix, ssl_ca_certs=str(certificate)) as store:
                for one in keys:
                    await everything(store, one)
            async with opened(url, prefix) as suspicious:
                with pytest.raises(StoreUnavailable):
                    await suspicious.ping()
            with pytest.raises(ConfigurationError, match="rediss"):
                open_store(f"redis+cluster://127.0.0.1:{ports[0]}?ssl_cert_reqs=none")
