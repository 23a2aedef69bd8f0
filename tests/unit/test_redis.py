"""What only the Redis store has: its keys, its connections, its scripts, its URLs. The contract is tested elsewhere."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from nonstick.errors import (
    ConfigurationError,
    Diverged,
    NotPending,
    SessionNotFound,
    StoreUnavailable,
    StreamClosed,
    TooManySessions,
)
from nonstick.store import NEW_STREAM, WRITER_SECONDS, Batch, Cursor, Draft, Event, News
from nonstick.stores.redis.connection import Connection
from nonstick.stores.redis.pubsub import Subscriber
from nonstick.stores.redis.scripts import INLINE_BYTES
from nonstick.stores.redis.store import RedisStore
from nonstick.stores.redis.url import Address, Deployment
from nonstick.testing.contract.tools import drafts, texts
from nonstick.testing.servers.proxy import FaultProxy
from nonstick.testing.servers.valkey import ValkeyServer
from tests.pace import in_time
from tests.tls import self_signed, tls_in_front_of

pytestmark = pytest.mark.anyio

PATIENT = 10.0
"""Longer than anything here takes on a busy machine."""

LONG = 600.0
SECRET = "hunter2/@#"
QUOTED = "hunter2%2F%40%23"

Hints = asyncio.Queue[News | None]


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def own() -> Iterator[ValkeyServer]:
    """A server that no other test uses: to be restarted, secured or broken."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def prefix() -> str:
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def key() -> str:
    return secrets.token_hex(16)


@pytest.fixture
async def store(server: ValkeyServer, prefix: str) -> AsyncIterator[RedisStore]:
    async with RedisStore(server.url, prefix=prefix, timeout=PATIENT) as store:
        yield store


@pytest.fixture
async def proxy(server: ValkeyServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def admin(server: ValkeyServer) -> Iterator[redis.Redis]:
    with administrator(server) as client:
        yield client


def administrator(server: ValkeyServer, **login: str) -> redis.Redis:
    """Talks to the server behind the store's back."""
    return redis.Redis.from_url(server.url, protocol=2, **login)


async def heard(hints: Hints) -> News | None:
    async with asyncio.timeout(PATIENT):
        return await hints.get()


async def heard_none(hints: Hints) -> None:
    while await heard(hints) is not None:
        pass


# ---- keys


async def test_no_key_is_left_without_expiry(store: RedisStore, prefix: str, admin: redis.Redis) -> None:
    """Whatever is done to sessions, every key of the store but its mark expires by itself (P10)."""
    for n in range(4):
        await store.create(f"k{n}", {"a": b"1"}, lifetime=LONG + n, limits={"all": 9, f"group{n % 2}": 9})
    batches = [
        Batch(drafts(b"x"), writer="w", sequence=1, expect=["q"], cancel="r", fields={"b": b"2"}),
        Batch(drafts(b"x" * 9000), stream=NEW_STREAM),
        Batch(drafts(b"x"), stream=2, terminal=True),
        Batch((), settle="q", uncancel="r", fields={"b": None}),
    ]
    for n in range(3):
        for batch in batches[n:]:
            with suppress(StreamClosed, NotPending):
                await store.append(f"k{n}", batch)
    await store.trim("k0", streams=[2], standalone_before=2)
    await store.append("k0", Batch(drafts(b"again")))
    await store.update("k1", {"c": b"3"}, expect={"a": b"1"})
    await store.touch(["k0", "k1", "k3", "nobody"])
    await store.load("k2")
    await store.delete("k3")
    await store.ping()
    lease = store.lease("node")
    await asyncio.to_thread(lease.renew, 30)
    await asyncio.to_thread(lease.close, release=False)
    for late in (store.append("k3", batches[0]), store.update("k3", {"c": b"3"}), store.load("k3")):
        with pytest.raises(SessionNotFound):
            await late

    names = sorted(admin.scan_iter(f"{prefix}:*"))
    assert f"{prefix}:{{k0}}:l".encode() in names
    assert f"{prefix}:g:all".encode() in names
    assert [name for name in names if admin.pttl(name) <= 0] == [f"{prefix}:mark".encode()]


async def test_keys_of_a_session_expire_together(store: RedisStore, prefix: str, key: str, admin: redis.Redis) -> None:
    """A session's end takes all of it: record, books and log carry one and the same instant."""
    await store.create(key, {}, lifetime=LONG)
    await store.append(key, Batch(drafts(b"x"), writer="w", sequence=1))
    before = expiries(admin, prefix, key)
    await store.touch([key])
    after = expiries(admin, prefix, key)
    assert len(before) == len(after) == 1
    assert min(after) >= min(before)


def expiries(admin: redis.Redis, prefix: str, key: str) -> set[int]:
    return {int(admin.pexpiretime(f"{prefix}:{{{key}}}:{kind}")) for kind in "rwl"}


async def test_delete_leaves_nothing(store: RedisStore, prefix: str, key: str, admin: redis.Redis) -> None:
    """`delete` ends the record, the log and all, its place in the groups included (P6)."""
    await store.create(key, {}, lifetime=LONG, limits={"g": 1})
    await store.append(key, Batch(drafts(b"x"), writer="w", sequence=1))
    with pytest.raises(TooManySessions):
        await store.create("other", {}, lifetime=LONG, limits={"g": 1})
    await store.delete(key)
    assert list(admin.scan_iter(f"{prefix}:*")) == [f"{prefix}:mark".encode()]


async def test_trimmed_log_gives_its_memory_back(store: RedisStore, prefix: str, key: str, admin: redis.Redis) -> None:
    """An idle session is its record: a log of which nothing is left is no key. Positions go on all the same (P10)."""
    await store.create(key, {}, lifetime=LONG)
    await store.append(key, Batch(drafts(b"1", b"2"), stream=NEW_STREAM, terminal=True))
    await store.append(key, Batch(drafts(b"3")))
    await store.trim(key, streams=[1], standalone_before=4)
    assert admin.exists(f"{prefix}:{{{key}}}:l") == 0
    assert (await store.append(key, Batch(drafts(b"4")))).first == 4
    assert texts(await store.read(key, Cursor(0))) == [b"4"]


async def test_idle_record_is_about_a_kilobyte(store: RedisStore, prefix: str, key: str, admin: redis.Redis) -> None:
    """An idle session costs little: its record has few fields of the store's own (P10)."""
    await store.create(key, {"client": b"x" * 300, "principal": b"x" * 60}, lifetime=LONG, limits={"all": 9})
    assert admin.keys(f"{prefix}:{{*") == [f"{prefix}:{{{key}}}:r".encode()]
    assert 0 < (admin.memory_usage(f"{prefix}:{{{key}}}:r") or 0) < 1024


async def test_prefixes_and_databases_are_separate(server: ValkeyServer, key: str) -> None:
    """Deployments that share a server see nothing of each other, nor are they woken by each other."""
    places = [(server.url, "one"), (server.url, "two"), (f"{server.url}/1", "one"), (f"{server.url}?db=2", "one")]
    for url, prefix in places:
        async with (
            RedisStore(url, prefix=prefix + key) as here,
            RedisStore(server.url, prefix="one" + key) as first,
        ):
            hints: Hints = asyncio.Queue()
            first.watch(key, hints.put_nowait)
            assert await heard(hints) is None
            await here.create(key, {"at": f"{url} {prefix}".encode()}, lifetime=LONG, limits={"g": 1})
            await here.append(key, Batch(drafts(b"x")))
            if (url, prefix) != places[0]:
                assert (await first.load(key)).fields == {"at": f"{server.url} one".encode()}
                # A fence: the first one's own event is the next that it hears.
                await first.append(key, Batch(drafts(b"fence")))
                news = await heard(hints)
                assert news is not None
                assert texts(news.events) == [b"fence"]


async def test_only_forgotten_writers_are_purged(store: RedisStore, prefix: str, key: str, admin: redis.Redis) -> None:
    """Books stay small: a writer goes when it was idle for long and its stream is not kept (P10)."""
    books = f"{prefix}:{{{key}}}:w"
    await store.create(key, {}, lifetime=LONG)
    await store.append(key, Batch(drafts(b"x"), writer="kept", sequence=1, stream=NEW_STREAM))
    await store.append(key, Batch(drafts(b"x"), writer="gone", sequence=1))
    await store.append(key, Batch(drafts(b"x"), writer="busy", sequence=1))
    long_ago = int(time.time() - WRITER_SECONDS - 1) * 1000
    admin.hset(books, "wkept", f"{long_ago} 1 1:1 ")
    admin.hset(books, "wgone", f"{long_ago} 0 1:2 ")
    admin.hset(books, "#p", 1)
    await store.append(key, Batch(drafts(b"x"), writer="new", sequence=1))
    assert {name for name in admin.hkeys(books) if name[:1] == b"w"} == {b"wkept", b"wbusy", b"wnew"}
    assert int(admin.hget(books, "#p") or 0) > time.time() * 1000


async def test_stale_cancels_do_not_pile_up(store: RedisStore, prefix: str, key: str, admin: redis.Redis) -> None:
    """A cancel counts for a while only; the next one clears it away (P5, P10)."""
    record = f"{prefix}:{{{key}}}:r"
    await store.create(key, {}, lifetime=LONG)
    await store.append(key, Batch(drafts(b"x"), cancel="old"))
    admin.hset(record, "#cold", 1)
    assert (await store.load(key)).cancels == frozenset()
    await store.append(key, Batch(drafts(b"x"), cancel="new"))
    assert (await store.load(key)).cancels == {"new"}
    assert admin.hexists(record, "#cold") == 0


# ---- what the server loses


async def test_evicted_log_is_not_read_empty(store: RedisStore, prefix: str, key: str, admin: redis.Redis) -> None:
    """Data that the store lost is reported, never skipped over (P9); the log goes on after it."""
    await store.create(key, {}, lifetime=LONG)
    await store.append(key, Batch(drafts(b"1", b"2", b"3")))
    head = (await store.load(key)).head
    admin.delete(f"{prefix}:{{{key}}}:l")
    for lost in (Cursor(2), Cursor(3, b"another!")):
        with pytest.raises(Diverged):
            await store.read(key, lost)
    assert await store.read(key, head) == []

    assert (await store.append(key, Batch(drafts(b"4")))).first == 4
    for lost in (Cursor(2), Cursor(3, b"another!")):
        with pytest.raises(Diverged):
            await store.read(key, lost)
    # Whoever begins at the beginning has nothing that this could be taken for the rest of.
    assert texts(await store.read(key, Cursor(0))) == [b"4"]
    assert texts(await store.read(key, head)) == [b"4"]
    assert admin.pttl(f"{prefix}:{{{key}}}:l") > 0


@pytest.mark.parametrize("first", ["read", "append"])
async def test_evicted_books_are_reported(
    store: RedisStore, prefix: str, key: str, admin: redis.Redis, first: str
) -> None:
    """Which streams are open and who wrote what is lost: nobody is up to date any more (P9); the log goes on."""
    await store.create(key, {}, lifetime=LONG)
    opening = Batch(drafts(b"opened"), writer="w", sequence=1, stream=NEW_STREAM)
    stream = (await store.append(key, opening)).first
    head = (await store.load(key)).head
    admin.delete(f"{prefix}:{{{key}}}:w")
    step = Batch(drafts(b"step"), writer="w", sequence=2, stream=stream)
    if first == "append":
        with pytest.raises(StreamClosed):
            await store.append(key, step)
    for lost in (head, Cursor(head.position), Cursor(1, b"another!")):
        with pytest.raises(Diverged):
            await store.read(key, lost)
    with pytest.raises(StreamClosed):
        await store.append(key, step)
    assert await store.read(key, Cursor(0)) == []
    after = (await store.load(key)).head
    assert await store.read(key, after) == []
    assert (await store.append(key, opening)).first == 3
    assert texts(await store.read(key, after)) == [b"opened"]
    with pytest.raises(Diverged):
        await store.read(key, head)


async def test_older_versions_evicted_books_are_missed(
    store: RedisStore, prefix: str, key: str, admin: redis.Redis
) -> None:
    """From the first append of this version on (P9, P12)."""
    await store.create(key, {}, lifetime=LONG)
    await store.append(key, Batch(drafts(b"1"), writer="w", sequence=1))
    admin.hdel(f"{prefix}:{{{key}}}:r", "#b")
    await store.append(key, Batch(drafts(b"2"), writer="w", sequence=2))
    head = (await store.load(key)).head
    admin.delete(f"{prefix}:{{{key}}}:w")
    with pytest.raises(Diverged):
        await store.read(key, head)


async def test_server_without_data_has_no_sessions(own: ValkeyServer, key: str) -> None:
    """The next call reconnects by itself (P9) and every watch is told to read. Nothing is brought back (P15)."""
    async with RedisStore(own.url, timeout=PATIENT, connect_timeout=PATIENT, heartbeat=0.2, empty_grace=0.1) as store:
        hints: Hints = asyncio.Queue()
        await store.create(key, {}, lifetime=LONG)
        store.watch(key, hints.put_nowait)
        assert await heard(hints) is None
        await store.append(key, Batch(drafts(b"x")))
        assert await heard(hints) is not None
        await asyncio.to_thread(own.restart, keep_data=False)
        with pytest.raises(SessionNotFound):
            await repeated(store.load, key)
        await heard_none(hints)
        await store.create(key, {}, lifetime=LONG)
        await store.append(key, Batch(drafts(b"y")))
        news = await heard(hints)
        assert news is not None
        assert texts(news.events) == [b"y"]


async def repeated(call: Any, *args: Any) -> Any:
    """The call's outcome once the store can be reached."""
    async with asyncio.timeout(PATIENT):
        while True:
            try:
                return await call(*args)
            except StoreUnavailable:
                await asyncio.sleep(0)


async def test_forgotten_scripts_are_sent_again(store: RedisStore, key: str, admin: redis.Redis) -> None:
    """A server that was restarted or flushed its scripts is served without an error (P9)."""
    await store.create(key, {}, lifetime=LONG)
    admin.script_flush()
    answers = await asyncio.gather(*(store.append(key, Batch(drafts(b"%d" % n))) for n in range(20)))
    assert sorted(answer.first for answer in answers) == list(range(1, 21))
    assert (await store.load(key)).head.position == 20


async def test_full_memory_is_named_as_unavailable(own: ValkeyServer, key: str) -> None:
    """A store that cannot be written to is trouble for `ping` too, and nothing is half written (P9)."""
    async with RedisStore(own.url) as store:
        await store.create(key, {}, lifetime=LONG)
        await store.append(key, Batch(drafts(b"1"), writer="w", sequence=1))
        with administrator(own) as admin:
            admin.config_set("maxmemory", "1")
            second = Batch(drafts(b"2"), writer="w", sequence=2, expect=["q"], fields={"a": b"1"})
            calls: list[Awaitable[object]] = [
                store.ping(),
                store.create("another", {}, lifetime=LONG),
                store.create("third", {"a": b"1"}, lifetime=LONG, limits={"g": 1}),
                store.update(key, {"a": b"1"}),
                store.append(key, second),
            ]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, StoreUnavailable)
                assert "out of memory" in str(outcome)
            admin.config_set("maxmemory", "0")
        assert (await store.load(key)).fields == {}
        assert texts(await store.read(key, Cursor(0))) == [b"1"]
        assert not (await store.append(key, second)).duplicate
        await store.create("third", {}, lifetime=LONG, limits={"g": 1})


# ---- what is looked at when a server is first connected to


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ((), None),
        (("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), "maxmemory-policy is allkeys-lru"),
    ],
)
async def test_session_losing_server_is_warned_of(
    options: tuple[str, ...], warned: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with what to change; it is no reason not to work."""
    with ValkeyServer(*options) as server:
        async with RedisStore(server.url) as store:
            for _ in range(2):
                with suppress(StoreUnavailable):
                    await store.ping()
    warnings = [record.getMessage() for record in caplog.records if record.name == "nonstick.store"]
    assert len(warnings) == (warned is not None)
    assert all(re.search(warned or "", warning) for warning in warnings)


async def test_user_without_info_is_served(own: ValkeyServer, caplog: pytest.LogCaptureFixture) -> None:
    """Neither INFO nor CONFIG has to be permitted."""
    with administrator(own) as admin:
        admin.acl_setuser(
            "app", enabled=True, passwords=[f"+{SECRET}"], keys=["*"], channels=["*"],
            commands=["+@all", "-info", "-config"],
        )  # fmt: skip
    async with RedisStore(own.url.replace("//", f"//app:{QUOTED}@")) as store:
        await store.create("key", {}, lifetime=LONG)
    assert "does not tell about itself" in caplog.text
    assert "+info" in caplog.text


# ---- a bad network


async def test_black_hole_is_unavailable_until_healed(proxy: FaultProxy, key: str) -> None:
    """A store that does not answer is unavailable, in time; recovery needs no restart, for watches either (P9)."""
    async with RedisStore(proxy.url, prefix=key, timeout=0.4, connect_timeout=0.4, heartbeat=0.2) as store:
        hints: Hints = asyncio.Queue()
        store.watch(key, hints.put_nowait)
        assert await heard(hints) is None
        await repeated(lambda: store.create(key, {}, lifetime=LONG))
        proxy.black_hole()
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await store.load(key)
            assert in_time(time.monotonic() - began, 2)
        await proxy.heal()
        await repeated(store.load, key)
        await heard_none(hints)


async def test_silently_dead_subscription_is_replaced(server: ValkeyServer, own: ValkeyServer) -> None:
    """A server that answers here, but is not the one that others publish at, is found out (P9)."""
    elsewhere = Connection(Address.parse(own.url))
    subscriber = Subscriber[bytes](
        Address.parse(server.url),
        prefix="lonely",
        decode=lambda body: body,
        publish=lambda channel: elsewhere.call("PUBLISH", channel, ""),
        interval=0.05,
    )
    try:
        hints: asyncio.Queue[bytes | None] = asyncio.Queue()
        subscriber.watch("channel", hints.put_nowait)
        async with asyncio.timeout(PATIENT):
            assert [await hints.get() for _ in range(3)] == [None] * 3
    finally:
        await subscriber.close()
        await elsewhere.close()


async def test_healthy_subscription_is_left_alone(
    server: ValkeyServer, admin: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Proofs of life come back in time: one connection serves every watch, and ends when nothing is watched."""
    connection = Connection(Address.parse(server.url))
    probes: asyncio.Queue[str] = asyncio.Queue()

    async def publish(channel: str) -> None:
        await connection.call("PUBLISH", channel, "")
        probes.put_nowait(channel)

    subscriber = Subscriber[bytes](
        Address.parse(server.url), name="healthy", prefix="h", decode=lambda body: body, publish=publish, interval=0.2
    )
    try:
        hints: asyncio.Queue[bytes | None] = asyncio.Queue()
        stops = [subscriber.watch(channel, hints.put_nowait) for channel in ("a", "a", "b")]
        async with asyncio.timeout(PATIENT):
            for _ in range(5):
                await probes.get()
            assert [await hints.get() for _ in stops] == [None] * 3
            assert hints.empty()
            stops[0]()
            stops[0]()
            await connection.call("PUBLISH", "a", "still watched")
            assert await hints.get() == b"still watched"
            for stop in stops:
                stop()
            while any(client["name"] == "healthy" for client in admin.client_list()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            subscriber.watch("a", hints.put_nowait)
            assert await hints.get() is None
    finally:
        await subscriber.close()
        await connection.close()
    assert caplog.text == ""


async def test_cancelled_call_disturbs_no_neighbours(store: RedisStore, key: str) -> None:
    """A cancelled call has an unknown outcome and must not disturb any other call."""
    keys = [f"{key}{n}" for n in range(30)]
    await asyncio.gather(*(store.create(one, {"is": one.encode()}, lifetime=LONG) for one in keys))
    loads = [asyncio.ensure_future(store.load(one)) for one in keys]
    await asyncio.sleep(0)
    for doomed in loads[::2]:
        doomed.cancel()
    answers = await asyncio.gather(*loads, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
    for one, answer in zip(keys[1::2], answers[1::2], strict=True):
        assert not isinstance(answer, BaseException)
        assert answer.fields == {"is": one.encode()}


async def test_append_with_lost_reply_lands_once(proxy: FaultProxy, key: str) -> None:
    """Repeating an append with the same writer and sequence tells its outcome, and writes nothing twice."""
    async with RedisStore(proxy.url, prefix=key, timeout=PATIENT) as store:
        await store.create(key, {}, lifetime=LONG)
        await store.append(key, Batch(drafts(b"1")))
        batch = Batch(drafts(b"2", b"3"), writer="w", sequence=1)
        proxy.lose_next_reply(after=b"EVALSHA")
        with pytest.raises(StoreUnavailable):
            await store.append(key, batch)
        answer = await store.append(key, batch)
        assert (answer.first, answer.duplicate) == (2, True)
        assert texts(await store.read(key, Cursor(0))) == [b"1", b"2", b"3"]


async def test_full_queue_is_unavailable_at_once(proxy: FaultProxy, key: str) -> None:
    """What waits for the store is bounded (P10)."""
    async with RedisStore(proxy.url, prefix=key, timeout=PATIENT, max_waiting=3) as store:
        await store.ping()
        proxy.black_hole(requests=False)
        waiting = [asyncio.ensure_future(store.ping()) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="too slow"):
            await store.ping()
        await proxy.heal()
        await asyncio.gather(*waiting)


async def test_unreachable_store_opens_and_closes(key: str) -> None:
    """Entering does not fail when the store cannot be reached: the first calls do (P9)."""
    async with FaultProxy("redis://127.0.0.1:1") as proxy, RedisStore(proxy.url, heartbeat=0.1) as store:
        await proxy.cut()
        stop = store.watch(key, lambda news: None)
        for call in (store.ping(), store.load(key), store.lapsed(["n"]), store.touch([key])):
            with pytest.raises(StoreUnavailable):
                await call
        lease = store.lease("n")
        with pytest.raises(StoreUnavailable):
            await asyncio.to_thread(lease.renew, 10)
        await asyncio.to_thread(lease.close, release=True)
        stop()


async def test_replica_that_lags_ends_nothing(server: ValkeyServer, own: ValkeyServer, prefix: str, admin: Any) -> None:
    """P9: a name that still points to a demoted primary means "unavailable", never that a session or event is gone."""
    with redis.Redis(port=own.port) as replica:
        async with RedisStore(server.url, prefix=prefix) as primary, RedisStore(own.url, prefix=prefix) as lagging:
            await primary.create("old", {"a": b"1"}, lifetime=LONG)
            await primary.append("old", Batch(drafts(b"1", b"2"), stream=NEW_STREAM))
            replica.execute_command("REPLICAOF", "127.0.0.1", str(server.port))
            admin.config_set("repl-diskless-sync-delay", 0)
            assert await asyncio.to_thread(admin.execute_command, "WAIT", 1, int(PATIENT * 1000)) == 1
            replica.execute_command("REPLICAOF", "127.0.0.1", "1")  # it keeps what it has, and gets no more
            await primary.create("new", {}, lifetime=LONG)
            opened = await primary.append("old", Batch(drafts(b"3"), stream=NEW_STREAM))
            await primary.append("old", Batch([], expect=["srv-1"]))
            await primary.update("old", {"a": b"2"})
            (*_, last) = await primary.read("old", Cursor(0))
            calls: dict[str, Awaitable[Any]] = {
                "load": lagging.load("new"),
                "touch": lagging.touch(["new"]),
                "trim": lagging.trim("new", standalone_before=1),
                "delete": lagging.delete("new"),
                "update": lagging.update("new", {"a": b"1"}),
                "update expecting": lagging.update("old", {"a": b"3"}, expect={"a": b"2"}),
                "update expecting none": lagging.update("old", {"a": b"3"}, expect={"a": None}),
                "create": lagging.create("old", {}, lifetime=LONG),
                "create in a full group": lagging.create("third", {}, lifetime=LONG, limits={"g": 0}),
                "append": lagging.append("new", Batch(drafts(b"x"))),
                "append to a stream": lagging.append("old", Batch(drafts(b"x"), stream=opened.first)),
                "append as another attempt": lagging.append("old", Batch(drafts(b"x"), stream=1, attempt=7)),
                "append a reply": lagging.append("old", Batch(drafts(b"x"), settle="srv-1")),
                "read": lagging.read("new", Cursor(0)),
                "read on": lagging.read("old", last.cursor),
                "read after another tag": lagging.read("old", Cursor(1, bytes(8))),
            }
            for name, call in calls.items():
                with pytest.raises(StoreUnavailable, match="read-only replica"):
                    print(name, await call)
            assert (await primary.load("old")).fields == {"a": b"2"}
            assert await primary.read("old", Cursor(2)) == [last]


async def test_unanswered_lease_fails_within_seconds(proxy: FaultProxy, key: str) -> None:
    """A node has to find out in time that it cannot renew."""
    async with RedisStore(proxy.url, prefix=key) as store:
        lease = store.lease("n")
        await asyncio.to_thread(lease.renew, 30)
        proxy.black_hole()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await asyncio.to_thread(lease.renew, 30)
        assert in_time(time.monotonic() - began, 6)
        await proxy.heal()
        await asyncio.to_thread(lease.renew, 30)
        assert await store.lapsed(["n", "m"]) == {"m"}
        await asyncio.to_thread(lease.close, release=True)
        assert await store.lapsed(["n", "m"]) == {"n", "m"}


# ---- wakes


async def test_only_small_appends_carry_events(store: RedisStore, key: str) -> None:
    """A wake with events has them complete and byte for byte; one without says: read."""
    hints: Hints = asyncio.Queue()
    await store.create(key, {}, lifetime=LONG)
    store.watch(key, hints.put_nowait)
    assert await heard(hints) is None
    small = [Draft(bytes(8), b""), Draft(b"\n\r\n 1 2 3", bytes(range(256)) * 16), Draft(b"\xff" * 8, b"\n")]
    opened = await store.append(key, Batch(small, stream=NEW_STREAM))
    news = await heard(hints)
    events = [Event(n + 1, draft.tag, opened.first, draft.data) for n, draft in enumerate(small)]
    assert news == News(Cursor(0), events)
    assert events == await store.read(key, Cursor(0))
    await store.append(key, Batch(drafts(bytes(INLINE_BYTES + 1))))
    assert await heard(hints) is None
    before = (await store.load(key)).head
    await store.append(key, Batch(drafts(bytes(INLINE_BYTES))))
    news = await heard(hints)
    assert news is not None
    assert news.after == before


async def test_message_of_another_version_means_read(store: RedisStore, prefix: str, key: str, admin: Any) -> None:
    """What this version cannot read is a wake all the same (P12), and so is what names no entry before it."""
    hints: Hints = asyncio.Queue()
    store.watch(key, hints.put_nowait)
    assert await heard(hints) is None
    of_0_1 = b"1 1 0 8 1\ntag-tagX"
    of_a_later_one = b"3 1 0 0 8 1\ntag-tagX"
    for message in (of_0_1, of_a_later_one, b"2 whatever\nbody", b"2 1\n", b"2 1 0 0 8\ntag-tag", b"more", b""):
        admin.publish(f"{prefix}:{{{key}}}:c0", message)
        assert await heard(hints) is None


async def test_raising_wake_silences_no_other(store: RedisStore, key: str, caplog: pytest.LogCaptureFixture) -> None:
    """Several watches of one log in one process are independent."""
    hints: Hints = asyncio.Queue()

    def broken(news: News | None) -> None:
        raise RuntimeError("broken wake")

    await store.create(key, {}, lifetime=LONG)
    store.watch(key, broken)
    store.watch(key, hints.put_nowait)
    assert await heard(hints) is None
    await store.append(key, Batch(drafts(b"payload")))
    assert await heard(hints) is not None
    assert "a wake raised" in caplog.text


# ---- logging in


async def test_wrong_password_is_never_repeated(own: ValkeyServer, key: str, caplog: pytest.LogCaptureFixture) -> None:
    """No credential appears in an error, a URL, a repr or a log (P13)."""
    caplog.set_level(logging.DEBUG)
    with administrator(own) as admin:
        admin.config_set("requirepass", SECRET)
        admin.acl_setuser(
            "app", enabled=True, passwords=[f"+{SECRET}x"], keys=["*"], channels=["*"], commands=["+@all"]
        )
    for login in (f":{QUOTED}@", f"default:{QUOTED}@", f"app:{QUOTED}x@"):
        async with RedisStore(own.url.replace("//", f"//{login}"), prefix=login.partition(":")[0] or "n") as store:
            hints: Hints = asyncio.Queue()
            await store.create(key, {}, lifetime=LONG)
            store.watch(key, hints.put_nowait)
            assert await heard(hints) is None
            lease = store.lease("n")
            await asyncio.to_thread(lease.renew, 10)
            await asyncio.to_thread(lease.close, release=True)
    for login, advice in (("", "wants a login"), (f":{QUOTED}y@", "check user"), (f"app:{QUOTED}@", "check user")):
        async with RedisStore(own.url.replace("//", f"//{login}")) as store:
            store.watch(key, lambda news: None)
            with pytest.raises(StoreUnavailable, match=advice) as refused:
                await store.ping()
            lease = store.lease("n")
            with pytest.raises(StoreUnavailable) as unrenewed:
                await asyncio.to_thread(lease.renew, 10)
            await asyncio.to_thread(lease.close, release=False)
            said = f"{refused.value!r} {unrenewed.value!r} {store.url} {store!r} {store.__dict__} {caplog.text}"
            assert "hunter2" not in said


async def test_unix_socket_serves_as_well(key: str) -> None:
    """`unix:///path/to.sock?db=1`, subscription and lease included."""
    with ValkeyServer(unix=True) as local:
        async with RedisStore(f"{local.url}?db=1") as store:
            assert store.url == f"{local.url}?db=1"
            await store.create(key, {}, lifetime=LONG)
            hints: Hints = asyncio.Queue()
            store.watch(key, hints.put_nowait)
            assert await heard(hints) is None
            lease = store.lease("n")
            await asyncio.to_thread(lease.renew, 10)
            assert await store.lapsed(["n"]) == set()
            await asyncio.to_thread(lease.close, release=True)


async def test_tls_checks_the_servers_certificate(server: ValkeyServer, tmp_path: Path, key: str) -> None:
    """`rediss://` encrypts, for the lease too, and refuses a server whose certificate nobody vouches for."""
    certificate = self_signed(tmp_path)
    async with tls_in_front_of(server, certificate) as port:
        async with RedisStore(f"rediss://127.0.0.1:{port}/3?ssl_ca_certs={certificate}", prefix=key) as store:
            assert store.url == f"rediss://127.0.0.1:{port}/3"
            await store.create(key, {}, lifetime=LONG)
            hints: Hints = asyncio.Queue()
            store.watch(key, hints.put_nowait)
            assert await heard(hints) is None
            lease = store.lease("n")
            await asyncio.to_thread(lease.renew, 10)
            assert await store.lapsed(["n"]) == set()
            await asyncio.to_thread(lease.close, release=True)
        async with RedisStore(f"rediss://127.0.0.1:{port}") as suspicious:
            with pytest.raises(StoreUnavailable, match=r"certificate .* is not trusted here"):
                await suspicious.ping()
        async with RedisStore(f"rediss://127.0.0.1:{port}?ssl_cert_reqs=none") as careless:
            await careless.ping()


# ---- URLs


@pytest.mark.parametrize(
    ("url", "shown", "login"),
    [
        ("redis://", "redis://localhost:6379/0", ("", "")),
        ("redis://cache", "redis://cache:6379/0", ("", "")),
        ("redis://:p%40ss@cache:7000/2", "redis://cache:7000/2", ("", "p@ss")),
        ("redis://me:pw@[::1]:7000", "redis://[::1]:7000/0", ("me", "pw")),
        ("redis://cache?db=4", "redis://cache:6379/4", ("", "")),
        ("rediss://me:pw@cache/1?ssl_cert_reqs=none", "rediss://cache:6379/1", ("me", "pw")),
        ("redis://cache?durability=replicated", "redis://cache:6379/0", ("", "")),
        ("unix:///run/valkey.sock", "unix:///run/valkey.sock", ("", "")),
        ("unix://me:pw@/run/valkey.sock?db=3", "unix:///run/valkey.sock?db=3", ("me", "pw")),
        ("redis+cluster://me:pw@a:1,b,[::1]:3", "redis+cluster://a:1,b:6379,[::1]:3", ("me", "pw")),
        ("rediss+cluster://a/?ssl_cert_reqs=none", "rediss+cluster://a:6379", ("", "")),
        ("redis+sentinel://me:pw@a,b:1/my-service/3", "redis+sentinel://a:26379,b:1/my-service/3", ("me", "pw")),
        ("redis+sentinel://a/s?sentinel_password=pw", "redis+sentinel://a:26379/s/0", ("", "")),
        ("unix:///run/valkey.sock?username=me&password=pw", "unix:///run/valkey.sock", ("me", "pw")),
    ],
)
def test_url_hides_the_login(url: str, shown: str, login: tuple[str, str]) -> None:
    """`url` is fit for logs; so is the repr (P13)."""
    deployment = Deployment.parse(url)
    address = deployment.address
    assert deployment.url == shown
    assert (address.username, address.password) == login
    assert "pw" not in repr(deployment)
    assert RedisStore(url).url == shown


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("", "must look like"),
        ("redis+swarm://cache", "must look like"),
        ("redis+cluster://:hunter2/x@a,b", "percent-encode"),
        ("redis+cluster://:hunter2@a,b:sixty", "percent-encode"),
        ("redis+cluster://:hunter2@a,b/1", "one database only"),
        ("redis+sentinel://:hunter2@a,b", "name the service"),
        ("redis+sentinel://:hunter2@a,b/service/x", "must be a number"),
        ("redis://:hunter2@cache?durability=hunter2", "primary or replicated"),
        ("cache:6379", "must look like"),
        ("http://cache", "must look like"),
        ("redis://:hunter2/x@cache", "percent-encode"),
        ("redis://:hunter2#x@cache", "percent-encode"),
        ("redis://:hunter2@cache:sixty", "percent-encode"),
        ("redis://:hunter2@cache:70000", "percent-encode"),
        ("redis://[::1", "percent-encode"),
        ("redis://:hunter2@cache/first", "must be a number"),
        ("redis://:hunter2@cache/-1", "must be a number"),
        ("redis://:hunter2@cache?db=x", "must be a number"),
        ("redis://:hunter2@cache?hunter2=1", "has an option that is not known"),
        ("redis://cache?poolsize=3", "'poolsize' that is not known"),
        ("redis://cache?prefixes=hunter2", "Did you mean prefix"),
        ("redis://:secret?hunter@cache", "percent-encode"),
        ("redis://cache?ssl_cert_reqs=none", "rediss://"),
        ("rediss://cache?ssl_cert_reqs=maybe", "required, optional or none"),
        ("rediss://cache?ssl_ca_certs=/does/not/exist", "cannot be read"),
        ("unix://", "socket's path"),
    ],
)
def test_malformed_url_is_explained_unquoted(url: str, advice: str) -> None:
    """An argument that cannot work is refused before anything starts; a password in it is not repeated (P13)."""
    with pytest.raises(ConfigurationError, match=advice) as refused:
        RedisStore(url)
    assert "hunter2" not in repr(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("prefix", ["", "a b", "{a}", "\N{SNOWMAN}", "a\n"])
def test_impossible_prefix_is_refused(prefix: str) -> None:
    """Braces would move a session's keys apart on a Cluster."""
    with pytest.raises(ConfigurationError, match="prefix"):
        RedisStore("redis://", prefix=prefix)


def test_missing_package_names_the_command() -> None:
    """The message names the command."""
    code = "import sys; sys.modules['hiredis'] = None; import nonstick.stores.redis.store"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "ConfigurationError" in done.stderr
    assert "pip install 'nonstick[redis]'" in done.stderr


def test_scripts_use_redis_6_2_commands() -> None:
    """The oldest server that is supported has no PEXPIRETIME, no EXPIRE … GT and no functions."""
    folder = Path(sys.modules["nonstick.stores.redis.store"].__file__ or "").parent / "lua"
    sources = [path.read_text() for path in sorted(folder.glob("*.lua"))]
    assert len(sources) == 10
    for source in sources:
        for newer in ("PEXPIRETIME", "'GT'", "'NX'", "FCALL", "SPUBLISH", "HPEXPIRE", "HSETEX"):
            assert newer not in source
