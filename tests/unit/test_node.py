"""What a node does for its sessions by itself."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from mcp.server import Server

from nonstick import Cluster, EncryptedStore
from nonstick.core.settings import Settings
from nonstick.errors import StoreUnavailable
from nonstick.log.cluster_log import CLUSTER_KEY
from nonstick.log.guard import GuardedStore
from nonstick.node.node import Node
from nonstick.session.kernel import KernelRunner
from nonstick.session.live import LiveSession
from nonstick.session.renewal import confirm
from nonstick.session.services import Served
from nonstick.store import Store
from nonstick.stores.encrypted.keys import KeyRing
from nonstick.stores.memory import MemoryStore
from nonstick.testing.contract.tools import eventually

pytestmark = pytest.mark.anyio


class PartlyAway(MemoryStore):
    """As a Cluster, one of whose servers is down: it has the first session."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: set[str] = set()
        self.changed = asyncio.Event()

    async def touch(self, keys: Collection[str]) -> None:
        if "0" in keys:
            raise StoreUnavailable
        self.touched.update(keys)
        self.changed.set()


@asynccontextmanager
async def running(store: Store, *, open_sessions: int = 0, **settings: Any) -> AsyncIterator[Node]:
    """A node with so many sessions that are in use: "0", "1", ..."""
    runner = partial(KernelRunner, Server("test"), None)
    async with GuardedStore(store, patience=0.05) as guarded, asyncio.timeout(60):
        node = Node(Served(runner, ""), guarded, Settings(**settings), cluster_log=Cluster.private().log)
        for number in range(open_sessions):
            session = node.sessions[str(number)] = LiveSession(node.services, f"id {number}", str(number))
            session.__enter__()
            session.log.heard_at = time.monotonic()
        async with node:
            yield node


async def test_partial_outage_expires_no_other_session() -> None:
    """P9: what is open is renewed as far as it can be, however much is open."""
    store, count = PartlyAway(), 1000
    async with running(store, open_sessions=count, lifetime=1.0, unconfirmed_lifetime=None, unattended_timeout=60.0):
        while str(count - 1) not in store.touched:
            store.changed.clear()
            await store.changed.wait()
    assert len(store.touched) >= count // 2


async def test_shared_secrets_follow_a_changed_key() -> None:
    """P13: a node that starts with the new key alone finds nothing under the old one."""
    raw, (old, new) = MemoryStore(), (secrets.token_bytes(32) for _ in range(2))
    store = EncryptedStore(raw, [old])
    await store.create(CLUSTER_KEY, {"a": b"1"}, lifetime=600)
    async with running(store, lifetime=1.0):
        store.use([new, old])
        await eventually(lambda: is_under(raw, new))


async def is_under(raw: Store, key: bytes) -> bool:
    return KeyRing([key]).is_current((await raw.load(CLUSTER_KEY)).fields["a"])


class Away(MemoryStore):
    """One that takes no changes."""

    async def update(self, *args: Any, **kwargs: Any) -> bool:
        raise StoreUnavailable


async def test_unconfirmed_session_keeps_short_renewal() -> None:
    """P9, P10: the lifetime in the store is the short one."""
    async with running(Away(), open_sessions=1, unconfirmed_lifetime=None) as node:
        session = node.sessions["0"]
        session.note(unconfirmed=True)
        confirm(session)
        assert not session.record.unconfirmed
        await eventually(lambda: tried_in_vain(session))


async def tried_in_vain(session: LiveSession) -> bool:
    return session.record.unconfirmed
