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
    "test_every_node_serves_a_session_that_another_one_opened",
    "test_concurrent_writes_of_different_keys_on_different_nodes_all_survive",
    "test_delete_on_any_node_is_404_on_every_node_at_once",
    "test_a_handler_that_notifies_is_answered_with_a_stream",
    "test_a_running_stream_is_resumed_with_the_rest_then_live_then_ends",
    "test_a_model_is_sampled_through_another_node",
    "test_a_reply_counts_once",
    "test_what_is_sent_on_one_node_reaches_the_connection_on_another",
    "test_concurrent_increments_on_three_nodes_lose_none",
    "test_messages_that_come_while_connections_take_over_are_delivered_once",
    "test_state_that_cannot_be_stored_is_used_from_every_node",
    "test_session_of_a_lost_owner_is_built_anew_once",
    "test_one_call_on_one_node_is_heard_on_every_node_at_once",
    "test_what_goes_on_in_the_background_keeps_no_requests_variables",
    "test_what_was_broadcast_while_nobody_listened_is_heard_on_return",
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
