"""The encrypting wrapper keeps the contract of the store under it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest

from nonstick.store import Store
from nonstick.stores.encrypted import EncryptedStore
from nonstick.stores.memory import MemoryStore
from nonstick.stores.redis import RedisStore
from nonstick.testing import ManualClock, Opener, StoreContract, ValkeyServer, opening
from nonstick.testing.contract.tools import DEADLINE

KEYS = [secrets.token_bytes(32)]


class TestEncryptedMemoryStore(StoreContract):
    """Each node has a wrapper of its own."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    async def opener(self, clock: ManualClock) -> AsyncIterator[Opener]:
        inner = MemoryStore(clock=clock)
        async with opening(lambda: EncryptedStore(inner, KEYS)) as opener:
            yield opener


@pytest.mark.slow
class TestEncryptedRedisStore(StoreContract):
    """Wakes carry events too, so it is run over a store whose wakes come from elsewhere."""

    @pytest.fixture
    async def opener(self, valkey: ValkeyServer) -> AsyncIterator[Opener]:
        prefix = f"test-{secrets.token_hex(6)}"

        def store() -> Store:
            return EncryptedStore(RedisStore(valkey.url, prefix=prefix, timeout=DEADLINE), KEYS)

        async with opening(store) as opener:
            yield opener
