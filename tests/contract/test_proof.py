"""P15 on real servers: "gone" is believed only from a server that can know."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nonstick.errors import SessionNotFound, StoreError, StoreUnavailable
from nonstick.store import Batch, Cursor, Store
from nonstick.stores.redis import RedisStore
from nonstick.stores.redis.cluster import key_slot
from nonstick.stores.redis.proof import PROVEN_SECONDS
from nonstick.testing import ValkeyCluster, ValkeySentinel, ValkeyServer
from nonstick.testing.contract.tools import deadline, drafts, eventually, texts
from nonstick.testing.servers.valkey_cluster import ask
from tests.pace import unhurried

pytestmark = pytest.mark.anyio

LONG = 600.0
PATIENT = 20.0
"""Longer than anything here takes on a busy machine, a failover included."""

GRACE = 1.0


@pytest.fixture
def own() -> Iterator[ValkeyServer]:
    """A server that no other test uses."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def prefix() -> str:
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def key() -> str:
    return secrets.token_hex(16)


def made_up() -> str:
    return secrets.token_hex(16)


def questions(store: Store, key: str) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Every call by which a store can say that a session or a node is gone."""
    return {
        "load": lambda: store.load(key),
        "update": lambda: store.update(key, {"b": b"2"}),
        "append": lambda: store.append(key, Batch(drafts(b"x"), writer="late", sequence=1)),
        "read": lambda: store.read(key, Cursor(0)),
        "delete": lambda: store.delete(key),
        "lapsed": lambda: store.lapsed([key]),
    }


async def outcome(call: Callable[[], Awaitable[Any]]) -> str:
    """What came of it: "gone", "unavailable", or "answered"."""
    try:
        answer = await call()
    except SessionNotFound:
        return "gone"
    except StoreUnavailable:
        return "unavailable"
    except StoreError as error:
        return type(error).__name__
    # A set is of nodes that are not there.
    return "gone" if answer is False or (isinstance(answer, set) and answer) else "answered"


async def outcomes(store: Store, key: str) -> dict[str, str]:
    return {name: await outcome(call) for name, call in questions(store, key).items()}


async def until_answered(call: Callable[[], Awaitable[Any]]) -> Any:
    """What the store answers once it can be reached."""
    async with deadline():
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await asyncio.sleep(0.01)


async def is_gone(store: Store, key: str) -> bool:
    return await outcome(lambda: store.load(key)) == "gone"


def mark_of(server: ValkeyServer, prefix: str) -> str | None:
    mark: str | None = ask(server, "GET", f"{prefix}:mark")
    return mark


# ---- a server that has lost its data


async def test_new_deployment_says_gone_at_once(own: ValkeyServer, prefix: str) -> None:
    """P15: a node that has seen no mark, on a store that has none, has nothing to wait for."""
    async with RedisStore(own.url, prefix=prefix) as store:
        assert set((await outcomes(store, made_up())).values()) == {"gone"}
        mark = mark_of(own, prefix)
        assert mark
        async with RedisStore(own.url, prefix=prefix) as another:
            assert await is_gone(another, made_up())
        assert mark_of(own, prefix) == mark


@unhurried("grace", 1.0, 4.0, 16.0)
async def test_server_back_empty_is_doubted(
    own: ValkeyServer, prefix: str, key: str, caplog: pytest.LogCaptureFixture, grace: float
) -> None:
    """P15: unavailable for every call, logged once with what to do; new sessions open; then it has a new mark."""
    async with RedisStore(own.url, prefix=prefix, timeout=PATIENT, empty_grace=grace) as store:
        await store.create(key, {}, lifetime=LONG)
        assert await is_gone(store, made_up())
        before = mark_of(own, prefix)
        await asyncio.to_thread(own.restart, keep_data=False)
        caplog.clear()
        with pytest.raises(StoreUnavailable, match="empty or of another history"):
            while True:
                try:
                    await store.load(key)
                except StoreUnavailable as error:
                    if "lost the connection" not in str(error):
                        raise
        began = asyncio.get_running_loop().time()
        young = made_up()
        await store.create(young, {}, lifetime=LONG)
        assert set((await outcomes(store, key)).values()) == {"unavailable"}
        assert (await store.load(young)).fields == {}
        # It was there, and was deleted here: that is no loss.
        assert await store.delete(young)
        assert mark_of(own, prefix) is None
        await eventually(lambda: is_gone(store, key))
        assert asyncio.get_running_loop().time() - began >= grace * 0.8
        assert set((await outcomes(store, key)).values()) == {"gone"}
        assert mark_of(own, prefix) not in (None, before)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 2
    assert "bring that back now" in told[0]
    assert "docs/stores.md" in told[0]
    assert "404 from now on" in told[1]
    assert key not in "".join(told)


async def test_server_emptied_while_running_is_doubted(own: ValkeyServer, prefix: str, key: str) -> None:
    """P15: whatever it has proven a moment before."""
    async with RedisStore(own.url, prefix=prefix, timeout=PATIENT) as store:
        await store.create(key, {}, lifetime=LONG)
        assert await is_gone(store, made_up())
        mark = mark_of(own, prefix)
        assert mark
        for name, question in questions(store, key).items():
            if name != "lapsed":  # which nodes renew, before anybody believes it
                ask(own, "FLUSHALL")
                assert await outcome(question) == "unavailable", name
                ask(own, "SET", f"{prefix}:mark", mark)
                assert await outcome(question) == "gone", name


async def test_unawaited_check_fails_in_silence(own: ValkeyServer, prefix: str) -> None:
    """P13: a caller may be out of time before it is known whether its server is to be believed."""
    async with RedisStore(own.url, prefix=prefix, timeout=PATIENT) as store:
        assert await is_gone(store, made_up())
        ask(own, "FLUSHALL")
        asking = asyncio.ensure_future(outcome(lambda: store.load(made_up())))
        checks = store._opened.proof._checks
        while not checks:  # noqa: ASYNC110 - it announces nothing
            await asyncio.sleep(0)
        asking.cancel()
        await eventually(lambda: is_empty(checks))
        # What a task raises that nobody asks for is told when it is collected, and fails the test.
        gc.collect()


async def is_empty(checks: Mapping[Any, Any]) -> bool:
    return not checks


async def test_data_restored_in_time_end_nothing(own: ValkeyServer, prefix: str, key: str) -> None:
    """P15: nobody ever heard "gone"."""
    saved = Path(str(ask(own, "CONFIG", "GET", "dir")[1])) / "dump.rdb"
    async with RedisStore(own.url, prefix=prefix, timeout=PATIENT) as store:
        await store.create(key, {"a": b"1"}, lifetime=LONG)
        assert await is_gone(store, made_up())
        ask(own, "SAVE")
        backup = saved.read_bytes()
        await asyncio.to_thread(own.restart, keep_data=False)
        said: list[str] = []
        while "unavailable" not in said[1:]:
            said.append(await outcome(lambda: store.load(key)))
        own.kill()
        saved.write_bytes(backup)
        await asyncio.to_thread(own.start)
        while said[-1] != "answered":
            said.append(await outcome(lambda: store.load(key)))
            assert said[-1] != "gone"
        # Its mark is back too: what is not there is gone, long before the grace period is over.
        await eventually(lambda: is_gone(store, made_up()))


@unhurried("grace", 1.0, 4.0, 16.0)
async def test_another_nodes_mark_shortens_no_grace(own: ValkeyServer, prefix: str, key: str, grace: float) -> None:
    """P15: a node that starts afresh remembers nothing and makes a mark at once; the others have another history."""
    async with RedisStore(own.url, prefix=prefix, timeout=PATIENT, empty_grace=grace) as store:
        await store.create(key, {}, lifetime=LONG)
        assert await is_gone(store, made_up())
        await asyncio.to_thread(own.restart, keep_data=False)
        async with RedisStore(own.url, prefix=prefix, timeout=PATIENT) as fresh:
            assert await is_gone(fresh, key)
            assert await outcome(lambda: store.load(key)) == "unavailable"
            mark = mark_of(own, prefix)
            await eventually(lambda: is_gone(store, key))
            assert mark_of(own, prefix) == mark


async def test_last_releases_keys_need_no_mark(own: ValkeyServer, prefix: str, key: str) -> None:
    """P12: what an older node has written is a store without a mark; whoever comes first makes one."""
    async with RedisStore(own.url, prefix=prefix) as store:
        await store.create(key, {"a": b"1"}, lifetime=LONG)
    ask(own, "DEL", f"{prefix}:mark")
    async with RedisStore(own.url, prefix=prefix) as store:
        assert await is_gone(store, made_up())
        assert (await store.load(key)).fields == {"a": b"1"}


def test_url_sets_the_grace_period() -> None:
    """Whoever opens a store by its URL says there how long it is doubted."""
    for url in ("redis://cache", "redis+cluster://a,b", "redis+sentinel://a/service"):
        assert "empty_grace" not in RedisStore(f"{url}?empty_grace=2.5").url


def calls(server: ValkeyServer, *commands: str) -> int:
    """How many of these commands the server has run."""
    stats = ask(server, "INFO", "commandstats")
    return sum(int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"]) for command in commands)


async def test_made_up_ids_cost_server_nothing(own: ValkeyServer, prefix: str, key: str) -> None:
    """P10, P15: the mark comes with the answer, and only where that is "gone"."""
    async with RedisStore(own.url, prefix=prefix, timeout=PATIENT) as store:
        await store.create(key, {}, lifetime=LONG)
        assert await is_gone(store, made_up())
        before = calls(own, "get"), calls(own, "evalsha")
        for _ in range(10):
            assert set(await asyncio.gather(*(is_gone(store, made_up()) for _ in range(50)))) == {True}
        # Each within its script.
        assert (calls(own, "get") - before[0], calls(own, "evalsha") - before[1]) == (500, 500)
        before = calls(own, "get"), calls(own, "evalsha")
        for _ in range(50):
            await store.load(key)
        assert (calls(own, "get") - before[0], calls(own, "evalsha") - before[1]) == (0, 50)


# ---- a Cluster


def keys_at(server: ValkeyServer, count: int, *others: str) -> list[str]:
    """New sessions' keys that this server owns, and with them these names that are made of a key."""
    own = [(first, last) for first, last, owner, *_ in ask(server, "CLUSTER", "SLOTS") if owner[1] == server.port]
    keys: list[str] = []
    while len(keys) < count:
        # Of keys of one length, what stands before them moves all slots alike: perhaps none would do.
        key = secrets.token_hex(secrets.choice(range(8, 20)))
        slots = [key_slot(f"{{{key}}}"), *(key_slot(other + key) for other in others)]
        if all(any(first <= slot <= last for first, last in own) for slot in slots):
            keys.append(key)
    return keys


async def test_replaced_hung_primary_is_not_believed(cluster: ValkeyCluster, prefix: str) -> None:
    """P15: it wakes up and first runs what lies in its buffers, for a node whose table still names it."""
    old = cluster.primary(0)
    names = questions(RedisStore(cluster.url), "")
    keys = dict(zip(names, keys_at(old, len(names), f"{prefix}:n:"), strict=True))
    async with (
        RedisStore(cluster.url, prefix=prefix, timeout=PATIENT) as late,
        RedisStore(cluster.url, prefix=prefix) as there,
    ):
        # It knows the table, and is connected.
        for key in keys.values():
            assert await is_gone(late, key)
        old.freeze()
        try:
            asked = {name: asyncio.ensure_future(outcome(questions(late, key)[name])) for name, key in keys.items()}
            await asyncio.to_thread(cluster.wait_for_successor, 0, old)
            for key in keys.values():
                await until_answered(lambda key=key: there.create(key, {"a": b"1"}, lifetime=LONG))  # type: ignore[misc]
                lease = there.lease(key)
                await asyncio.to_thread(lease.renew, LONG)
                await asyncio.to_thread(lease.close, release=False)
        finally:
            old.thaw()
        assert {name: await told for name, told in asked.items()} == dict.fromkeys(keys, "answered")
        assert await is_gone(there, keys["delete"])
        assert (await there.load(keys["update"])).fields == {"a": b"1", "b": b"2"}
        assert texts(await there.read(keys["append"], Cursor(0))) == [b"x"]
    await asyncio.to_thread(cluster.wait_until_whole)


async def test_made_up_ids_cost_few_questions(cluster: ValkeyCluster, prefix: str) -> None:
    """P10, P15: each server's word is confirmed by one other."""
    async with RedisStore(cluster.url, prefix=prefix, timeout=PATIENT) as store:
        assert all([await is_gone(store, made_up()) for _ in range(50)])
        servers = [node for node in cluster.nodes if ask(node, "ROLE")[0] == "master"]

        def count() -> int:
            return sum(calls(server, "cluster|slots", "get") for server in cluster.nodes)

        began, before = asyncio.get_running_loop().time(), count()
        for _ in range(10):
            assert all(await asyncio.gather(*(is_gone(store, made_up()) for _ in range(60))))
        seconds = asyncio.get_running_loop().time() - began
        # One asks another member, one looks at the mark.
        assert count() - before <= 2 * len(servers) * (1 + seconds) + len(cluster.nodes)


async def test_lone_primary_can_say_gone(prefix: str) -> None:
    """P15: where there is no other member none can have taken over."""
    with ValkeyCluster(primaries=1) as alone:
        async with RedisStore(alone.url, prefix=prefix, timeout=PATIENT) as store:
            assert await is_gone(store, made_up())


@pytest.fixture(scope="module")
def calm() -> Iterator[ValkeyCluster]:
    """Three primaries without replicas, which take their time to miss each other."""
    with ValkeyCluster(node_timeout=60.0) as cluster:
        yield cluster


@pytest.fixture
async def settled(calm: ValkeyCluster, prefix: str) -> AsyncIterator[RedisStore]:
    """A store on `calm` that has seen its marks."""
    async with RedisStore(calm.url, prefix=prefix, empty_grace=GRACE) as store:
        assert all([await is_gone(store, made_up()) for _ in range(20)])
        yield store


async def test_primary_without_reachable_fellows_is_doubted(calm: ValkeyCluster, settled: RedisStore) -> None:
    """P15: unavailable rather than gone; what is there is served."""
    server, *others = calm.nodes
    here, gone = keys_at(server, 2)
    await settled.create(here, {}, lifetime=LONG)
    await asyncio.sleep(1.1)  # until nothing that was proven counts any more
    for other in others:
        other.freeze()
    try:
        assert await outcome(lambda: settled.load(gone)) == "unavailable"
        assert await outcome(lambda: settled.load(here)) == "answered"
    finally:
        for other in others:
            other.thaw()
    assert await until_answered(lambda: settled.touch([here])) is None
    await eventually(lambda: is_gone(settled, gone))


async def test_only_the_empty_primary_is_doubted(calm: ValkeyCluster, settled: RedisStore) -> None:
    """P15: one mark or more on each primary: the others are believed at once."""
    empty, other, _ = calm.nodes
    (lost,), (elsewhere,) = keys_at(empty, 1), keys_at(other, 1)
    await settled.create(lost, {}, lifetime=LONG)
    await asyncio.to_thread(empty.restart, keep_data=False)
    await asyncio.to_thread(calm.wait_until_ok)
    with pytest.raises(StoreUnavailable, match="empty or of another history"):
        while True:
            try:
                await settled.load(lost)
            except StoreUnavailable as error:
                if "empty" in str(error):
                    raise
    assert await is_gone(settled, elsewhere)
    await eventually(lambda: is_gone(settled, lost))


async def test_marks_move_with_their_slots(calm: ValkeyCluster, settled: RedisStore) -> None:
    """P15: neither who gives a slot away nor who gets it is doubted."""
    source, to, _ = calm.nodes
    names = [f"{settled.namespace}:mark:{n}" for n in range(64)]
    slots = [slot for slot in map(key_slot, names) if calm.primary(slot) is source]
    for slot in slots[:3]:
        await asyncio.to_thread(calm.migrate_slot, slot, to)
    async with RedisStore(calm.url, prefix=settled.namespace) as fresh:
        for store in (settled, fresh):
            assert all(await asyncio.gather(*(is_gone(store, made_up()) for _ in range(30))))


async def test_server_without_moved_marks_is_believed(
    calm: ValkeyCluster, settled: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    """P15: though nobody asks for a key in the slots that were moved, by which a node would hear of it."""
    source, to, _ = calm.nodes
    slots = {key_slot(f"{settled.namespace}:mark:{n}") for n in range(64)}
    key = next(
        key for key in iter(made_up, "") if calm.primary(slot := key_slot(f"{{{key}}}")) is source and slot not in slots
    )
    assert await is_gone(settled, key)
    for slot in slots:
        if calm.primary(slot) is source:
            await asyncio.to_thread(calm.migrate_slot, slot, to)
    await asyncio.sleep(PROVEN_SECONDS)  # so long what was proven before counts
    await eventually(lambda: is_gone(settled, key))
    async with RedisStore(calm.url, prefix=settled.namespace) as fresh:
        assert await is_gone(fresh, key)
    assert "another history" not in caplog.text


@pytest.mark.slow
async def test_server_with_few_slots_is_marked(prefix: str) -> None:
    """P15: a primary that was added later, and has one slot, is not taken for an empty one for ever."""
    with ValkeyCluster(primaries=1, spares=1, node_timeout=60.0) as cluster:
        key = made_up()
        slot, added = key_slot(f"{{{key}}}"), cluster.nodes[-1]
        async with RedisStore(cluster.url, prefix=prefix, empty_grace=GRACE) as store:
            assert await is_gone(store, key)
            await store.create(key, {"a": b"1"}, lifetime=LONG)
            await asyncio.to_thread(cluster.migrate_slot, slot, added)
            assert (await store.load(key)).fields == {"a": b"1"}
            await store.delete(key)
            await eventually(lambda: is_gone(store, key))
        async with RedisStore(cluster.url, prefix=prefix) as fresh:
            assert await is_gone(fresh, key)


# ---- Sentinels


async def test_replaced_primary_behind_sentinels_is_doubted(prefix: str) -> None:
    """P15: its answer and the news of the failover reach the node in the same moment."""
    key = made_up()

    async def create() -> None:
        async with RedisStore(group.url, prefix=prefix) as there:
            await until_answered(lambda: there.create(key, {"a": b"1"}, lifetime=LONG))

    with ValkeySentinel() as group:
        old = group.primary
        async with RedisStore(group.url, prefix=prefix, timeout=PATIENT) as late:
            assert await is_gone(late, key)
            old.freeze()
            asked = asyncio.ensure_future(outcome(lambda: late.load(key)))
            await asyncio.sleep(0.1)  # until it is in the server's buffers
            # From here on the node stands still, and hears of nothing, until everything has happened.
            group.wait_for_successor(old)
            other = threading.Thread(target=lambda: asyncio.run(create()))
            other.start()
            other.join()
            old.thaw()
            ask(old, "PING")
            assert await asked in ("answered", "unavailable")
            assert (await until_answered(lambda: late.load(key))).fields == {"a": b"1"}


async def test_sentinel_with_latest_failover_is_right(prefix: str, key: str) -> None:
    """P15: two of three name the old primary, which has come back without its data."""
    with ValkeySentinel() as group:
        async with RedisStore(group.url, prefix=prefix) as store:
            await store.create(key, {"a": b"1"}, lifetime=LONG)
            assert await is_gone(store, made_up())
            old = group.primary
            new = await asyncio.to_thread(group.failover)
            await until_answered(lambda: store.load(key))
            await asyncio.to_thread(old.restart, keep_data=False)
            # Or the third Sentinel would tell them, at any moment, and make that server a replica again.
            ask(old, "ACL", "SETUSER", "default", "-publish", "-replicaof", "-slaveof")
            for stale in group.sentinels[:2]:
                ask(stale, "ACL", "SETUSER", "default", "-publish")
                ask(stale, "SENTINEL", "REMOVE", "nonstick")
                ask(stale, "SENTINEL", "MONITOR", "nonstick", "127.0.0.1", old.port, 2)
            assert [named_by(watcher) for watcher in group.sentinels] == [old.port, old.port, new.port]
            async with RedisStore(group.url, prefix=prefix) as fresh:
                # At once: it has not been anywhere else.
                assert (await fresh.load(key)).fields == {"a": b"1"}
            ask(new, "CLIENT", "KILL", "TYPE", "normal")
            assert (await until_answered(lambda: store.load(key))).fields == {"a": b"1"}


def named_by(watcher: ValkeyServer) -> int:
    return int(ask(watcher, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "nonstick")[1])
