"""The primary that Redis Sentinels name: found anew for every connection, and left as soon as they name another."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from nonstick.errors import StoreUnavailable, StoreUnusable
from nonstick.stores.redis_pubsub import Subscriber
from nonstick.stores.redis_servers import Limits, Server, examine_briefly
from nonstick.stores.redis_url import Address, Deployment
from nonstick.stores.resp import Arg, UnknownCommand, Wire, ask, discard, open_wire

__all__ = ["SentinelServers"]

logger = logging.getLogger("nonstick.store")

_SWITCH: Final = "+switch-master"
"""The channel on which a Sentinel tells of a failover."""

_HEARTBEAT_SECONDS: Final = 1.0


class SentinelServers:
    """The primary of a service.

    A server counts as the primary if most Sentinels that answer name it and its own ROLE says so. After a failover the
    old one may go on answering as if nothing had happened, for ten seconds or when it wakes up: so a Sentinel is
    listened to all the time, and the connections are given up when it tells of another primary.

    Args:
        listen: Whether to listen; without, whoever keeps this for long has to reopen it by itself.
    """

    def __init__(self, deployment: Deployment, limits: Limits, *, listen: bool = True) -> None:
        self.on_switch: Callable[[], None] = lambda: None
        self._deployment = deployment
        self._limits = limits
        self._examined: set[str] = set()
        self._current: Address | None = None
        # What the listener heard last, and how often that changed.
        self._heard: tuple[str, int] | None = None
        self._changes = 0
        # The address is for messages only.
        self._server = Server(deployment.seeds[0], limits, open=self._open)
        self._listener: Subscriber[bytes] | None = None
        if listen:
            self._listener = Subscriber(
                deployment.seeds[0],
                prefix="nonstick",
                decode=lambda body: body,
                open=self._open_listener,
                interval=_HEARTBEAT_SECONDS,
            )
            self._listener.watch(_SWITCH, self._on_switch)

    async def call(self, key: str, *args: Arg, replicated: bool = False) -> Any:
        return await self._server.call(args, replicated=replicated)

    async def open_subscription(self) -> Wire:
        return await self._open()

    async def names_for_each(self, stem: str) -> Iterable[str]:
        return (stem,)

    async def each(self) -> list[tuple[Address, Callable[..., Awaitable[Any]]]]:
        await self._server.call(("PING",))
        return [(self._current or self._server.address, lambda *args: self._server.call(args))]

    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        await self._server.close()

    # ---- finding it

    async def _open(self) -> Wire:
        """A wire to the primary."""
        changes = self._changes
        address = await self._locate()
        wire = await open_wire(
            address,
            name=self._limits.name,
            timeout=self._limits.connect_timeout,
            check=lambda wire: self._check(wire, address, changes),
        )
        self._current = address
        return wire

    async def _check(self, wire: Wire, address: Address, changes: int) -> None:
        if (await ask(wire, "ROLE"))[0] != b"master":
            raise StoreUnavailable(f"{address.url}, which the Sentinels name, is no primary: a failover is under way")
        # A primary that hangs may wake up and answer this, long after another one was named in its place.
        if self._changes != changes and self._heard != (address.host, address.port):
            raise StoreUnavailable(f"{address.url} is not the primary any more")
        if self._limits.examine and address.place not in self._examined:
            self._examined.add(address.place)
            await examine_briefly(wire, address)

    async def _locate(self) -> Address:
        """The address that most Sentinels name. The first that more than half of all agree on is taken at once."""
        seeds = self._deployment.seeds
        asked = [asyncio.ensure_future(self._named_by(seed)) for seed in seeds]
        votes: Counter[tuple[str, int]] = Counter()
        problems: list[StoreUnavailable] = []
        try:
            for answer in asyncio.as_completed(asked):
                try:
                    named = await answer
                except StoreUnavailable as error:
                    problems.append(error)
                    continue
                votes[named] += 1
                if votes[named] > len(seeds) // 2:
                    break
        finally:
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if not votes:
            raise _nobody(problems)
        (host, port), _ = votes.most_common(1)[0]
        return self._deployment.address.at(host, port)

    async def _named_by(self, seed: Address) -> tuple[str, int]:
        """What one Sentinel says. Within half the time for connecting: it is only the first half of the way."""
        named: list[tuple[str, int]] = []

        async def check(wire: Wire) -> None:
            named.append(await self._ask(wire, seed))

        try:
            await discard(await open_wire(seed, timeout=self._limits.connect_timeout / 2, check=check))
        except StoreUnusable as error:
            raise StoreUnusable(f"a Sentinel was asked for the primary: {error}") from None
        return named[0]

    async def _ask(self, wire: Wire, seed: Address) -> tuple[str, int]:
        try:
            answer = await ask(wire, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._deployment.service)
        except UnknownCommand:
            raise StoreUnusable(
                "what answers there is no Sentinel: name the Sentinels, which mostly have port 26379; or write "
                "redis://host:port for one server, and redis+cluster:// for a Cluster"
            ) from None
        if answer is None:
            raise StoreUnusable(
                "the service in the store's URL is not known there: `SENTINEL MASTERS` lists those that are"
            )
        return answer[0].decode(), int(answer[1])

    # ---- hearing of another

    async def _open_listener(self) -> Wire:
        """A wire to any Sentinel. What it told while nobody listened is asked for first."""
        seed = random.choice(self._deployment.seeds)  # noqa: S311

        async def check(wire: Wire) -> None:
            self._is_at(*await self._ask(wire, seed))

        return await open_wire(seed, timeout=self._limits.connect_timeout, check=check)

    def _on_switch(self, message: bytes | None) -> None:
        """ "<service> <old host> <old port> <new host> <new port>"."""
        words = message.decode(errors="replace").split(" ") if message else []
        if len(words) == 5 and words[0] == self._deployment.service:
            self._is_at(words[3], int(words[4]))

    def _is_at(self, host: str, port: int) -> None:
        if self._heard != (host, port):
            self._heard = (host, port)
            self._changes += 1
        current = self._current
        if current is not None and (current.host, current.port) != (host, port):
            logger.warning("%s: the primary is now %s:%d", self._deployment.url, host, port)
            self._current = None
            self._server.reopen("another server is the primary now")
            self.on_switch()


def _nobody(problems: list[StoreUnavailable]) -> StoreUnavailable:
    """What to raise where no Sentinel named a primary. One that was just set up knows nothing: most have to agree."""
    unusable = [problem for problem in problems if isinstance(problem, StoreUnusable)]
    if len(unusable) > len(problems) // 2:
        return unusable[0]
    return StoreUnavailable(f"no Sentinel names the primary: {(unusable or problems)[0]}")
