"""What a node does for its sessions by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest
from mcp.server import Server

from nonstick import Cluster
from nonstick.errors import StoreUnavailable
from nonstick.guard import GuardedStore
from nonstick.node import Node, Settings
from nonstick.session import Session
from nonstick.stores.memory import MemoryStore

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


async def test_part_of_the_store_that_is_away_lets_no_session_of_the_others_expire() -> None:
    """P9: what is open is renewed as far as it can be, however much is open."""
    store, count = PartlyAway(), 1000
    settings = Settings(lifetime=1.0, unconfirmed_lifetime=None)
    server: Server[object] = Server("test")
    async with GuardedStore(store, patience=0.05) as guarded:
        node = Node(server, None, guarded, settings, name=None, cluster=Cluster.apart())
        for number in range(count):
            session = node.sessions[str(number)] = Session(node, f"id {number}", str(number))
            session.__enter__()
        async with node, asyncio.timeout(20):
            while str(count - 1) not in store.touched:
                store.changed.clear()
                await store.changed.wait()
        assert len(store.touched) >= count // 2
