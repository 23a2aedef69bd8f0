"""The Redis store keeps the contract, on a real Valkey."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest

from nonstick.stores.redis import RedisStore
from nonstick.testing import Opener, StoreContract, ValkeyServer, opening
from nonstick.testing.contract.tools import DEADLINE


class TestRedisStore(StoreContract):
    """Each node has its own connections to one server; each test a prefix of its own."""

    @pytest.fixture
    async def opener(self, valkey: ValkeyServer) -> AsyncIterator[Opener]:
        prefix = f"test-{secrets.token_hex(6)}"
        async with opening(lambda: RedisStore(valkey.url, prefix=prefix, timeout=DEADLINE)) as opener:
            yield opener
