"""The PostgreSQL store keeps the contract, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from nonstick.stores.postgres import PostgresStore
from nonstick.testing import Opener, PostgresServer, StoreContract, opening
from nonstick.testing.contract.tools import DEADLINE


class TestPostgresStore(StoreContract):
    """Each node has its own connections to one server; the tests share its tables, under keys of their own."""

    @pytest.fixture
    async def opener(self, postgres: PostgresServer) -> AsyncIterator[Opener]:
        async with opening(lambda: PostgresStore(postgres.url, timeout=DEADLINE)) as opener:
            yield opener
