"""Real servers for the stores' contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nonstick.testing import PostgresServer, ValkeyCluster, ValkeySentinel, ValkeyServer


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """One Valkey for all tests; each takes a prefix of its own."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[ValkeyCluster]:
    """One Cluster of three primaries, each with a replica, for all tests; each takes a prefix of its own."""
    with ValkeyCluster(replicas=1) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def sentinel() -> Iterator[ValkeySentinel]:
    """One primary behind Sentinels for all tests; each takes a prefix of its own."""
    with ValkeySentinel() as sentinel:
        yield sentinel


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests; each takes a schema of its own."""
    with PostgresServer() as server:
        yield server


GROUPS = ("TestRedisStoreOnCluster", "TestRedisStoreBehindSentinels")
SOON = {
    "test_created_session_is_whole_elsewhere",
    "test_repeated_create_in_full_group_exists",
    "test_full_group_refuses_and_evicts_nothing",
    "test_ended_session_leaves_its_group",
    "test_deleted_session_is_gone_everywhere",
    "test_append_wakes_watchers_on_every_node",
    "test_racing_terminals_end_the_stream_once",
    "test_released_lease_lapses_closed_lease_holds",
    "test_lease_is_renewed_beside_blocked_loop",
    "test_store_answers_ping_and_has_url",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a Cluster and behind Sentinels, what is no different from one server runs with the slow tests only."""
    for item in items:
        owner = getattr(item, "cls", None)
        if owner is not None and owner.__name__ in GROUPS and getattr(item, "originalname", "") not in SOON:
            item.add_marker(pytest.mark.slow)
