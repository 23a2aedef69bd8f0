"""The in-memory store keeps the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from nonstick.store import Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing import ManualClock, Opener, StoreContract


class TestMemoryStore(StoreContract):
    """Two nodes of it are one object: its data are in this process only."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    async def opener(self, clock: ManualClock) -> AsyncIterator[Opener]:
        async with MemoryStore(clock=clock) as store:

            async def opener() -> Store:
                return store

            yield opener
