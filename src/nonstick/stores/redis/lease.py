"""A node's lease as a key that expires."""

from __future__ import annotations

from typing import Final

from nonstick.errors import StoreUnavailable
from nonstick.store import Lease
from nonstick.stores.common.lease import LEASE_SECONDS, BlockingLease
from nonstick.stores.redis.messages import milliseconds
from nonstick.stores.redis.sentinel import LastFailover
from nonstick.stores.redis.servers import Limits, Servers
from nonstick.stores.redis.sockets import Arg
from nonstick.stores.redis.topology import servers_of
from nonstick.stores.redis.url import Deployment

__all__ = ["lease_key", "lease_on"]

_RELEASE_SECONDS: Final = 0.5


def lease_key(prefix: str, node: str) -> str:
    """The name of the key that is there while the node's lease holds."""
    return f"{prefix}:n:{node}"


def lease_on(deployment: Deployment, *, prefix: str, node: str, last: LastFailover) -> Lease:
    """The lease of this node. Does not connect yet."""
    client = _LeaseKey(deployment, prefix, lease_key(prefix, node), last)
    return BlockingLease(client, url=deployment.url, release_seconds=_RELEASE_SECONDS)


class _LeaseKey:
    """See `nonstick.stores.common.lease.LeaseClient`."""

    def __init__(self, deployment: Deployment, prefix: str, key: str, last: LastFailover) -> None:
        self._deployment = deployment
        self._last = last
        self._limits = Limits(name=prefix, timeout=LEASE_SECONDS, connect_timeout=LEASE_SECONDS, examine=False)
        self._key = key
        self._open: Servers | None = None

    async def grant(self, seconds: float) -> None:
        await self._send("SET", self._key, "1", "PX", milliseconds(seconds))

    async def release(self) -> None:
        await self._send("DEL", self._key)

    async def disconnect(self) -> None:
        servers, self._open = self._open, None
        if servers is not None:
            await servers.close()

    async def _send(self, *command: Arg) -> None:
        try:
            await self._call(*command)
        except StoreUnavailable:
            # What was lost since the last renewal is only noticed now, and another server may have taken over.
            await self._call(*command)
        if self._deployment.kind == "sentinel":
            # Nobody listens for a failover between the renewals, so each begins with finding the primary.
            await self.disconnect()

    async def _call(self, *command: Arg) -> None:
        if self._open is None:
            self._open = servers_of(self._deployment, self._limits, listen=False, last=self._last)
        await self._open.call(self._key, *command)
