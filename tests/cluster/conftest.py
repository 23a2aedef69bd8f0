"""Stores for several nodes in one process: every test that asks for `make_store` runs on each of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nonstick.cluster import Cluster
from nonstick.store import Store
from nonstick.stores.memory import MemoryStore
from nonstick.stores.postgres import PostgresStore
from nonstick.stores.redis import RedisStore
from nonstick.stores.sqlite import SQLiteStore
from nonstick.testing import PostgresServer, ValkeyServer

MakeStore = Callable[[], Store]
"""Each call gives another node's instance, all on the same data (in memory: the one instance)."""

ON_POSTGRES_TOO = {
    "test_every_node_serves_every_session",
    "test_concurrent_writes_all_survive",
    "test_delete_anywhere_is_404_everywhere",
    "test_notifying_handler_answers_with_stream",
    "test_running_stream_is_resumed_then_live",
    "test_model_is_sampled_through_another_node",
    "test_a_reply_counts_once",
    "test_message_reaches_connection_elsewhere",
    "test_concurrent_increments_lose_none",
    "test_messages_during_takeover_come_once",
    "test_unstorable_state_serves_every_node",
    "test_lost_owners_session_is_rebuilt_once",
    "test_one_call_is_heard_everywhere",
    "test_background_work_keeps_no_requests_variables",
    "test_absent_client_hears_broadcasts_on_return",
    "test_clients_hear_without_any_wake",
    "test_lost_place_is_found_without_wakes",
    "test_sessions_end_is_found_without_wakes",
}
"""One test of each kind: what PostgreSQL does differently from Valkey, the stores' own tests look at."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out the other tests on PostgreSQL."""
    items[:] = [
        item for item in items if not _on_postgres(item) or getattr(item, "originalname", "") in ON_POSTGRES_TOO
    ]


def _on_postgres(item: pytest.Item) -> bool:
    spec = getattr(item, "callspec", None)
    return spec is not None and spec.params.get("make_store") == "postgres"


@pytest.fixture(autouse=True)
def no_cluster_of_another_test() -> None:
    """An app takes the only `Cluster` of its process, and one that a test made may outlive it."""
    Cluster._made.clear()


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """One Valkey for all tests; each takes a prefix of its own."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests; each takes a schema of its own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "valkey", "postgres"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    """A store for every node of a cluster."""
    match request.param:
        case "memory":
            return one(MemoryStore())
        case "sqlite":
            return lambda: SQLiteStore(tmp_path / "sessions.db")
        case "postgres":
            database: PostgresServer = request.getfixturevalue("postgres")
            schema = f"test_{secrets.token_hex(6)}"
            return lambda: PostgresStore(database.url, schema=schema)
        case _:
            # Asked for only here, so that tests on other stores start no server.
            server: ValkeyServer = request.getfixturevalue("valkey")
            prefix = f"test-{secrets.token_hex(6)}"
            return lambda: RedisStore(server.url, prefix=prefix)


@pytest.fixture
def memory() -> MakeStore:
    """For what does not depend on the store."""
    return one(MemoryStore())


def one(store: Store) -> MakeStore:
    """All nodes share this instance."""
    return lambda: store
