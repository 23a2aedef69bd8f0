"""The SDK's subscription bus, over the cluster log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import anyio.lowlevel
import pydantic_core
from mcp.server.subscriptions import InMemorySubscriptionBus
from mcp.shared.subscriptions import ServerEvent

from nonstick.cluster.probing import is_probe
from nonstick.core.broadcasts import METHODS
from nonstick.core.events import Kind, draft
from nonstick.core.refusals import STORE_AWAY
from nonstick.errors import StoreUnavailable
from nonstick.log.cluster_log import ClusterLog
from nonstick.log.guard import PATIENCE

__all__ = ["Bus"]


class Bus:
    """The SDK's `SubscriptionBus` over the cluster log."""

    def __init__(self, log: ClusterLog, local: InMemorySubscriptionBus, servers: Sequence[str]) -> None:
        self._log = log
        self._local = local
        self._servers = servers

    async def publish(self, event: ServerEvent) -> None:
        """Appends the event; every node, this one too, delivers it from the log.

        Raises:
            StoreUnavailable: As `Store.append`.
        """
        if self._log.sender is None and self._log.joined is not None:
            # The node is starting, or its store was away when it did.
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._log.joined.wait()
            except TimeoutError:
                raise StoreUnavailable(STORE_AWAY) from None
        if self._log.sender is None:
            await self._local.publish(event)
            return
        body = {"method": METHODS[type(event)], "uri": getattr(event, "uri", None)}
        if self._servers:
            body["servers"] = list(self._servers)
        await self._log.sender.send(draft(Kind.PUBLISHED, pydantic_core.to_json(body)))
        await anyio.lowlevel.checkpoint()

    def subscribe(self, listener: Callable[[ServerEvent], None]) -> Callable[[], None]:
        """Registers the listener on this node; returns an idempotent function that removes it."""
        if is_probe(self):
            return lambda: None
        return self._local.subscribe(listener)
