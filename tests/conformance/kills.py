"""Kills one server after another while the suite runs, at moments when no request can be lost by it.

Whether a request that was under way on a killed node has run is not known, so nobody may send it again, and the suite
does not. Everything else has to survive: sessions, their streams, what waits for the client's next request.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final, Protocol

from nonstick.testing.servers.balancer import Balancer, Exchange

__all__ = ["Kills"]

SETTLE_SECONDS: Final = 0.5
"""How long a request counts as under way after its stream has ended: a tool may close its own stream and go on."""

CALM_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.005


class Mortal(Protocol):
    """A server that can be killed, and started again on the same port."""

    def kill(self) -> None: ...

    async def start(self) -> None: ...


class Kills:
    """One server after another, round and round.

    Args:
        every: Seconds from one kill to the next; longer while a server starts, or is never without a request.

    Attributes:
        count: Servers killed so far.
        streams: Open GET streams that were broken by it.
    """

    def __init__(self, every: float) -> None:
        self.count = 0
        self.streams = 0
        self._every = every
        self._settled: dict[str, float] = {}

    def __str__(self) -> str:
        return f"{self.count} nodes killed, {self.streams} open GET streams broken by it"

    def observe(self, exchange: Exchange) -> None:
        """For the balancer."""
        plain = exchange.complete and exchange.content_type != "text/event-stream"
        if exchange.total is not None and exchange.method != "GET" and not plain:
            self._settled[exchange.backend] = time.monotonic() + SETTLE_SECONDS

    @asynccontextmanager
    async def happening(self, balancer: Balancer, servers: Mapping[str, Mortal]) -> AsyncIterator[None]:
        """Kills while entered. `servers` are named as the balancer's nodes are.

        Raises:
            ExceptionGroup: A server did not start again, or had a request under way for a minute.
        """
        async with asyncio.TaskGroup() as group:
            killing = group.create_task(self._kill(balancer, servers))
            yield
            killing.cancel()

    async def _kill(self, balancer: Balancer, servers: Mapping[str, Mortal]) -> None:
        due = time.monotonic()
        for name, server in itertools.cycle(servers.items()):
            due = max(due + self._every, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            await self._calm(balancer, name)
            # Nothing is awaited in between: no request can start on the server before it is gone.
            self.streams += sum(exchange.backend == name for exchange in balancer.exchanges if exchange.total is None)
            server.kill()
            self.count += 1
            await server.start()

    async def _calm(self, balancer: Balancer, name: str) -> None:
        """Returns at a moment when the server could go without taking a request along."""
        async with asyncio.timeout(CALM_SECONDS):
            while self._busy(balancer, name):  # noqa: ASYNC110 - the balancer sets no event, and time settles some
                await asyncio.sleep(POLL_SECONDS)

    def _busy(self, balancer: Balancer, name: str) -> bool:
        settling = self._settled.get(name, 0.0) > time.monotonic()
        return settling or any(_would_be_lost(exchange, name) for exchange in balancer.exchanges)


def _would_be_lost(exchange: Exchange, name: str) -> bool:
    """Under way on this server, or about to be; a stream that is open by GET can be resumed."""
    resumable = exchange.method == "GET" and exchange.status != 0
    return exchange.total is None and exchange.backend in ("", name) and not resumable
