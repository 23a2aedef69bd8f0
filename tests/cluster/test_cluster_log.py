"""What nodes share for clients that have no session: the subscription bus and the `requestState` keys."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from mcp.server.request_state import InvalidRequestState
from mcp.shared.subscriptions import ResourceUpdated, ServerEvent, ToolsListChanged

import nonstick.cluster.cluster
from nonstick import Cluster, EncryptedStore
from nonstick.core.events import Kind, draft, kind_of
from nonstick.errors import Undecryptable
from nonstick.log.cluster_log import CLUSTER_KEY
from nonstick.log.guard import GuardedStore
from nonstick.store import Batch, Cursor, Store
from nonstick.stores import open_store
from nonstick.stores.memory import MemoryStore
from tests.cluster.stage import HeldStore, eventually

pytestmark = pytest.mark.anyio

KEYS = "request-state-keys"


class Node:
    """A cluster object that takes part, as a node's does."""

    def __init__(self, store: Store) -> None:
        self.cluster = Cluster()
        self.store = GuardedStore(store)
        self.heard: asyncio.Queue[ServerEvent] = asyncio.Queue()
        self.cluster.subscription_bus.subscribe(self.heard.put_nowait)

    async def start(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self.store)
        joined = asyncio.Event()
        task = asyncio.create_task(self.cluster.log.keep(self.store, joined))

        async def stop() -> None:
            task.cancel()
            await asyncio.wait([task])

        stack.push_async_callback(stop)
        async with asyncio.timeout(60):
            await joined.wait()

    async def hear(self) -> ServerEvent:
        async with asyncio.timeout(60):
            return await self.heard.get()


async def test_publication_is_heard_once_in_order(make_store: Callable[[], Store]) -> None:
    """P11, for clients of 2026-07-28; a last event as a fence shows that nothing came twice."""
    async with AsyncExitStack() as stack:
        a, b = Node(make_store()), Node(make_store())
        await a.start(stack)
        await b.start(stack)
        sent: list[ServerEvent] = [
            ToolsListChanged(),
            ResourceUpdated("test://1"),
            ResourceUpdated("test://2"),
            ToolsListChanged(),
        ]
        for event in sent:
            await a.cluster.subscription_bus.publish(event)
        fence = ResourceUpdated("test://fence")
        await b.cluster.subscription_bus.publish(fence)
        for node in (a, b):
            assert [await node.hear() for _ in range(5)] == [*sent, fence]


async def test_sealed_state_is_unsealed_elsewhere(make_store: Callable[[], Store]) -> None:
    """Nodes that start at once agree on one key."""
    async with AsyncExitStack() as stack:
        nodes = [Node(make_store()) for _ in range(3)]
        await asyncio.gather(*(node.start(stack) for node in nodes))
        token = nodes[0].cluster.request_state_security.codec.seal(b"state")
        for node in nodes:
            assert node.cluster.request_state_security.codec.unseal(token) == b"state"


async def test_rotated_key_waits_for_every_node(
    make_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older tokens stay good, and at no moment does a node meet a key that it does not know."""
    monkeypatch.setattr(nonstick.cluster.cluster, "_SPREAD_SECONDS", 0.5)
    async with AsyncExitStack() as stack:
        a, b = Node(make_store()), Node(make_store())
        await a.start(stack)
        await b.start(stack)
        before = a.cluster.request_state_security.codec.seal(b"before")
        rotation = asyncio.create_task(a.cluster.rotate_request_state_key())
        fence = 0
        while not rotation.done():
            token = a.cluster.request_state_security.codec.seal(b"meanwhile")
            await a.cluster.subscription_bus.publish(ResourceUpdated(f"test://{fence}"))
            # What came before this in the log, b has taken.
            while await b.hear() != ResourceUpdated(f"test://{fence}"):
                pass
            assert b.cluster.request_state_security.codec.unseal(token) == b"meanwhile"
            fence += 1
        await rotation
        after = a.cluster.request_state_security.codec.seal(b"after")
        assert after[:9] != before[:9], "the key's fingerprint has changed"
        assert b.cluster.request_state_security.codec.unseal(before) == b"before"
        assert b.cluster.request_state_security.codec.unseal(after) == b"after"


async def test_new_key_is_known_before_use(make_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the two steps adds it as the last one, also where a node hears of that late."""
    monkeypatch.setattr(nonstick.cluster.cluster, "_SPREAD_SECONDS", 3600.0)
    async with AsyncExitStack() as stack:
        a = Node(make_store())
        await a.start(stack)
        old = a.cluster.request_state_security.codec.seal(b"old")
        fields = (await a.store.load(CLUSTER_KEY)).fields
        rotation = asyncio.create_task(a.cluster.rotate_request_state_key())

        async def said() -> bool:
            return any(kind_of(event.data) is Kind.KEYS for event in await a.store.read(CLUSTER_KEY, Cursor(0)))

        await eventually(said)
        changed = (await a.store.load(CLUSTER_KEY)).fields
        # A node that starts now knows both; one that has not heard of it has the old one alone.
        before, after = (json.loads(found[KEYS]) for found in (fields, changed))
        assert after[:-1] == before
        assert len(after) == len(before) + 1
        assert a.cluster.request_state_security.codec.seal(b"new")[:8] == old[:8], "the key's fingerprint"
        rotation.cancel()
        await asyncio.wait([rotation])


async def test_keys_changed_during_start_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the log says of it is taken before anybody here listens."""
    monkeypatch.setattr(nonstick.cluster.cluster, "_SPREAD_SECONDS", 0.0)
    memory = MemoryStore()
    held: Any = HeldStore(memory, "read", after=False)
    async with AsyncExitStack() as stack:
        a, b = Node(memory), Node(held)
        await a.start(stack)
        held.holding = True
        starting = asyncio.create_task(b.start(stack))
        async with asyncio.timeout(60):
            await held.held.wait()
        await a.cluster.rotate_request_state_key()
        held.released.set()
        await starting
        token = a.cluster.request_state_security.codec.seal(b"state")
        assert b.cluster.request_state_security.codec.unseal(token) == b"state"


async def test_lost_key_takes_only_its_messages(make_store: Callable[[], Store]) -> None:
    """P11, P13: the log outlives the keys of its entries. A node that has but the new one takes part all the same."""
    old, new = (secrets.token_bytes(32) for _ in range(2))

    async def node(*keys: bytes) -> Node:
        one = Node(EncryptedStore(make_store(), keys))
        await one.start(stack)
        return one

    async with AsyncExitStack() as stack:
        first = await node(old)
        await first.cluster.subscription_bus.publish(ToolsListChanged())
        both = await node(new, old)
        last = await node(new)
        assert last.cluster.log.broadcasts.since(Cursor(0)) is None, "whoever was away since then is told of everything"
        for fence, publisher in enumerate((last, both)):
            await publisher.cluster.subscription_bus.publish(ResourceUpdated(f"test://{fence}"))
            for one in (both, last):
                assert await one.hear() == ResourceUpdated(f"test://{fence}")


async def test_keyless_node_is_told_and_silent(tmp_path: Path) -> None:
    """P13: a message in clear would be one that no node reads."""
    url, keys = f"sqlite:///{tmp_path}/sessions.db", [secrets.token_bytes(32)]
    async with Cluster.connect(url, encryption_keys=keys) as cluster:
        await cluster.notify_tools_changed()
    with pytest.raises(Undecryptable, match="give the encryption keys"):
        async with Cluster.connect(url) as cluster:
            await cluster.notify_tools_changed()
    async with open_store(url) as raw:
        assert (await raw.load("cluster")).head.position == 1


async def test_appless_bus_and_keys_work() -> None:
    """The same server also runs on stdio, where nothing is shared."""
    cluster, other = Cluster(), Cluster()
    heard: list[ServerEvent] = []
    stop = cluster.subscription_bus.subscribe(heard.append)
    await cluster.subscription_bus.publish(ToolsListChanged())
    stop()
    stop()
    await cluster.subscription_bus.publish(ToolsListChanged())
    assert heard == [ToolsListChanged()]
    token = cluster.request_state_security.codec.seal(b"state")
    assert cluster.request_state_security.codec.unseal(token) == b"state"
    with pytest.raises(InvalidRequestState):
        other.request_state_security.codec.unseal(token)


async def test_keyless_record_gets_new_keys(make_store: Callable[[], Store]) -> None:
    """P9: a node that looks while another one makes the lost record anew must not stop hearing for good."""
    async with AsyncExitStack() as stack:
        a, b = Node(make_store()), Node(make_store())
        await a.start(stack)
        await b.start(stack)
        await a.store.update(CLUSTER_KEY, {"request-state-keys": None})
        await a.store.append(CLUSTER_KEY, Batch([draft(Kind.KEYS)]))
        await a.cluster.notify_tools_changed()
        assert await a.hear() == await b.hear() == ToolsListChanged()
        assert b.cluster._codec.unseal(a.cluster._codec.seal(b"state")) == b"state"
