"""The Valkey Cluster and the Sentinels of the tests: slots move and replicas take over as they are told."""

from __future__ import annotations

import pytest

from nonstick.testing import ValkeyCluster, ValkeySentinel
from nonstick.testing.servers.valkey_cluster import ask

pytestmark = pytest.mark.slow


def test_slot_moves_and_replica_takes_over() -> None:
    """`migrate_slot`, `migrate_slot_whole`, `failover` and a killed primary: the key is at its owner each time."""
    with ValkeyCluster(replicas=1) as cluster:
        first, slot = cluster.primary("x"), cluster.slot("x")
        second = next(node for node in cluster.nodes[:3] if node is not first)
        ask(first, "SET", "x", "1")
        cluster.migrate_slot(slot, second)
        assert (cluster.primary("x"), ask(second, "GET", "x")) == (second, "1")
        cluster.migrate_slot_whole(slot, first)
        assert (cluster.primary("x"), ask(first, "GET", "x")) == (first, "1")

        new = cluster.failover("x")
        assert new is not first
        assert (cluster.primary("x"), ask(new, "GET", "x"), cluster.replicas(new)) == (new, "1", [first])

        ask(new, "SET", "x", "2")
        assert ask(new, "WAIT", 1, 5000) == 1
        new.kill()
        assert cluster.wait_for_successor("x", new) is first
        assert ask(first, "GET", "x") == "2"
        new.start()
        cluster.wait_until_whole()
        assert cluster.replicas(first) == [new]


def test_sentinels_name_the_promoted_replica() -> None:
    """`failover`, and a frozen primary: the Sentinels agree on the other server."""
    with ValkeySentinel() as sentinel:
        old, (replica,) = sentinel.primary, sentinel.replicas
        ask(old, "SET", "x", "1")
        assert ask(old, "WAIT", 1, 5000) == 1
        assert sentinel.failover() is replica
        assert ask(replica, "GET", "x") == "1"
        sentinel.rejoin(old)
        replica.freeze()
        assert sentinel.wait_for_successor(replica) is old
        replica.thaw()
