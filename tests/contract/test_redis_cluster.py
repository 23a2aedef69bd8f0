"""The Redis store keeps the contract, on a real Valkey Cluster and behind real Sentinels."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest

from nonstick.stores.redis import RedisStore
from nonstick.testing import Opener, StoreContract, ValkeyCluster, ValkeySentinel, opening


class TestRedisStoreOnCluster(StoreContract):
    """Each test's sessions lie on one of three servers, and their groups on others."""

    @pytest.fixture
    async def opener(self, valkey_cluster: ValkeyCluster) -> AsyncIterator[Opener]:
        prefix = f"test-{secrets.token_hex(6)}"
        async with opening(lambda: RedisStore(valkey_cluster.url, prefix=prefix)) as opener:
            yield opener


class TestRedisStoreBehindSentinels(StoreContract):
    """Each node asks the Sentinels for the primary."""

    @pytest.fixture
    async def opener(self, valkey_sentinel: ValkeySentinel) -> AsyncIterator[Opener]:
        prefix = f"test-{secrets.token_hex(6)}"
        async with opening(lambda: RedisStore(valkey_sentinel.url, prefix=prefix)) as opener:
            yield opener
