"""Which servers a store's URL means: one, the members of a Cluster, or the primary that Sentinels name."""

from __future__ import annotations

from nonstick.stores.redis.cluster import ClusterServers
from nonstick.stores.redis.sentinel import LastFailover, SentinelServers
from nonstick.stores.redis.servers import Limits, Servers, SingleServer
from nonstick.stores.redis.url import Deployment

__all__ = ["servers_of"]


def servers_of(
    deployment: Deployment, limits: Limits, *, listen: bool = True, last: LastFailover | None = None
) -> Servers:
    """The servers of this deployment, not connected to yet. `listen`, `last`: see `SentinelServers`."""
    match deployment.kind:
        case "cluster":
            return ClusterServers(deployment, limits)
        case "sentinel":
            return SentinelServers(deployment, limits, listen=listen, last=last)
        case "server":
            return SingleServer(deployment.address, limits)
