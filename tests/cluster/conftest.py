"""Stores for several nodes in one process: every test that asks for `make_store` runs on each of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nonstick.store import Store
from nonstick.stores.memory import MemoryStore
from nonstick.stores.redis import RedisStore
from nonstick.stores.sqlite import SQLiteStore
from nonstick.testing import ValkeyServer

MakeStore = Callable[[], Store]
"""Each call gives another node's instance, all on the same data (in memory: the one instance)."""


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """One Valkey for all tests; each takes a prefix of its own."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "valkey"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    """A store for every node of a cluster."""
    match request.param:
        case "memory":
            return one(MemoryStore())
        case "sqlite":
            return lambda: SQLiteStore(tmp_path / "sessions.db")
        case _:
            # Asked for only here, so that tests on other stores start no server.
            server: ValkeyServer = request.getfixturevalue("valkey")
            prefix = f"test-{secrets.token_hex(6)}"
            return lambda: RedisStore(server.url, prefix=prefix)


def one(store: Store) -> MakeStore:
    """All nodes share this instance."""
    return lambda: store
