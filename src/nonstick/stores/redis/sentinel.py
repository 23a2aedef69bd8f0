"""The primary that Redis Sentinels name: found anew for every connection, and left as soon as they name another.

For a while after a failover Sentinels disagree: most of them may still name the old primary. Each failover has a
number, higher than all before it (`config-epoch`), so the one that names the highest is right, however few say so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from nonstick.errors import StoreUnavailable, StoreUnusable
from nonstick.stores.redis.pubsub import Subscriber
from nonstick.stores.redis.replies import Forbidden, UnknownCommand
from nonstick.stores.redis.servers import Answer, Limits, Server, examine_briefly
from nonstick.stores.redis.sockets import Arg, Socket, ask, ask_each, discard, open_socket
from nonstick.stores.redis.url import Address, Deployment
from nonstick.waiting import background

__all__ = ["LastFailover", "SentinelServers"]

logger = logging.getLogger("nonstick.store")

_SWITCH: Final = "+switch-master"
"""The channel on which a Sentinel tells of a failover."""

_HEARTBEAT_SECONDS: Final = 1.0

_LATE_SECONDS: Final = 0.25
"""How long the other Sentinels are waited for once most have answered: one of them may know of a later failover."""

_STARTED_OVER_SECONDS: Final = 60.0
"""After so long Sentinels that all have forgotten the last failover are taken for new ones, which count from 0."""


class _View(NamedTuple):
    """What one Sentinel says: the number of the last failover that it knows of, and the primary since then."""

    epoch: int
    host: str
    port: int


class LastFailover:
    """The last failover that was heard of. Shared by all that a store opens, in any thread."""

    def __init__(self) -> None:
        self._epoch = 0
        self._behind_since: float | None = None

    def latest(self, views: list[_View], sentinels: int) -> _View:
        """The view with the highest number of a failover; of several with that number, the one that most share.

        Raises:
            StoreUnavailable: All of them are behind what was heard before.
        """
        epoch = max(view.epoch for view in views)
        if epoch < self._epoch and not (len(views) == sentinels and self._have_started_over()):
            raise StoreUnavailable("the Sentinels that answer do not know of the last failover yet")
        self._epoch, self._behind_since = epoch, None
        return Counter(view for view in views if view.epoch == epoch).most_common(1)[0][0]

    def _have_started_over(self) -> bool:
        now = time.monotonic()
        self._behind_since = self._behind_since or now
        return now - self._behind_since >= _STARTED_OVER_SECONDS


class SentinelServers:
    """The primary of a service.

    A server counts as the primary if the Sentinel that knows of the latest failover names it and its own ROLE says so.
    After a failover the old one may go on answering as if nothing had happened, for ten seconds or when it wakes up: so
    every Sentinel is listened to all the time, and the connections are given up when they name another primary.

    Args:
        listen: Whether to listen to the Sentinels for failovers. Without, the caller closes this before each use.
        last: What is known of failovers already.
    """

    def __init__(
        self, deployment: Deployment, limits: Limits, *, listen: bool = True, last: LastFailover | None = None
    ) -> None:
        self.on_switch: Callable[[], None] = lambda: None
        self._deployment = deployment
        self._limits = limits
        self._last = last or LastFailover()
        self._examined: set[str] = set()
        # What the Sentinels named last, and what there are connections to.
        self._named: Address | None = None
        self._current: Address | None = None
        # The address is for messages only.
        self.only = Server(deployment.seeds[0], limits, open=self._open)
        self._warned = False
        self._looking: asyncio.Task[None] | None = None
        self._look_again = False
        self._listeners = [self._listener(seed) for seed in deployment.seeds] if listen else []

    async def ask(self, key: str, *args: Arg, replicated: bool = False) -> Answer:
        server, openings = self.only, self.only.openings
        return await server.call(args, replicated=replicated), server, openings

    async def call(self, key: str, *args: Arg, replicated: bool = False) -> Any:
        return await self.only.call(args, replicated=replicated)

    async def call_each(self, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
        return await self.only.call_each(commands)

    async def is_owner(self, key: str, server: Server) -> bool:
        """Asks the Sentinels. Most have to answer: a few may have been cut off, and not know of a failover."""
        views = await self._views()
        if len(views) <= len(self._deployment.seeds) // 2:
            raise StoreUnavailable("too few Sentinels answer to confirm that something is gone")
        self._settle(views)
        return self._current == self._named

    def marks(self, stem: str) -> list[str]:
        return [stem]

    def marks_at(self, stem: str, server: Server) -> list[str]:
        return [stem]

    async def open_subscription(self) -> Socket:
        return await self._open()

    async def names_for_each(self, stem: str) -> Iterable[str]:
        return (stem,)

    async def each(self) -> list[tuple[Address, Callable[..., Awaitable[Any]]]]:
        await self.only.call(("PING",))
        return [(self._current or self.only.address, lambda *args: self.only.call(args))]

    async def close(self) -> None:
        await asyncio.gather(*(listener.close() for listener in self._listeners))
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await self.only.close()

    # ---- finding it

    async def _open(self) -> Socket:
        """A socket to the primary."""
        address = self._settle(await self._views())
        socket = await open_socket(
            address,
            name=self._limits.name,
            timeout=self._limits.connect_timeout,
            check=lambda socket: self._check(socket, address),
        )
        self._current, self.only.place = address, address.place
        return socket

    async def _check(self, socket: Socket, address: Address) -> None:
        if (await ask(socket, "ROLE"))[0] != b"master":
            raise StoreUnavailable(f"{address.url}, which the Sentinels name, is no primary: a failover is under way")
        # A primary that hangs may wake up and answer this, long after another one was named in its place.
        if self._named != address:
            raise StoreUnavailable(f"{address.url} is not the primary any more")
        if self._limits.examine and address.place not in self._examined:
            self._examined.add(address.place)
            await examine_briefly(socket, address)

    def _settle(self, views: list[_View]) -> Address:
        """The primary, as these say. Gives up the connections to any other."""
        latest = self._last.latest(views, len(self._deployment.seeds))
        self._named = address = self._deployment.address.at(latest.host, latest.port)
        if self._current is not None and self._current != address:
            logger.warning("%s: the primary is now %s", self._deployment.url, address.place)
            self._current = None
            self.only.reopen("another server is the primary now")
            self.on_switch()
        return address

    async def _views(self) -> list[_View]:
        """What each Sentinel says that answers.

        Raises:
            StoreUnavailable: None does.
        """
        asked = [asyncio.ensure_future(self._view_of(seed)) for seed in self._deployment.seeds]
        waiting, views, problems = set(asked), list[_View](), list[StoreUnavailable]()
        try:
            while waiting:
                late = len(views) > len(asked) // 2
                done, waiting = await asyncio.wait(
                    waiting, timeout=_LATE_SECONDS if late else None, return_when=asyncio.FIRST_COMPLETED
                )
                for one in done:
                    match one.exception():
                        case None:
                            views.append(one.result())
                        case StoreUnavailable() as problem:
                            problems.append(problem)
                        case error:
                            raise error
                if late and not done:
                    break
        finally:
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if not views:
            raise _nobody(problems)
        return views

    async def _view_of(self, seed: Address) -> _View:
        """Within half the time for connecting: it is only the first half of the way."""
        views: list[_View] = []

        async def check(socket: Socket) -> None:
            views.append(await self._ask(socket))

        try:
            await discard(await open_socket(seed, timeout=self._limits.connect_timeout / 2, check=check))
        except StoreUnusable as error:
            raise StoreUnusable(f"a Sentinel was asked for the primary: {error}") from None
        return views[0]

    async def _ask(self, socket: Socket) -> _View:
        of = ("SENTINEL", "MASTER", self._deployment.service)
        at = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._deployment.service)
        try:
            # In this order: the Sentinel that leads a failover knows its number before it names the new primary.
            facts, named = await ask_each(socket, of, at)
        except UnknownCommand:
            raise StoreUnusable(
                "what answers there is no Sentinel: name the Sentinels, which mostly have port 26379; or write "
                "redis://host:port for one server, and redis+cluster:// for a Cluster"
            ) from None
        except Forbidden:
            # Nobody asked for it in the last release. The name alone is what this one has to make do with.
            if not self._warned:
                self._warned = True
                logger.warning(
                    "%s: the Sentinels' user may not run SENTINEL MASTER, so Sentinels that are out of date are "
                    "believed. Add +sentinel|master to its ACL line (docs/stores.md)",
                    self._deployment.url,
                )
            facts, named = (b"config-epoch", 0), await ask(socket, *at)
        except StoreUnavailable as error:
            if "No such master" not in str(error):
                raise
            named = None
        if named is None:
            raise StoreUnusable(
                "the service in the store's URL is not known there: `SENTINEL MASTERS` lists those that are"
            )
        epoch = dict(zip(facts[::2], facts[1::2], strict=True))[b"config-epoch"]
        return _View(int(epoch), named[0].decode(), int(named[1]))

    # ---- hearing of another

    def _listener(self, seed: Address) -> Subscriber[bytes]:
        listener = Subscriber[bytes](
            seed,
            prefix="nonstick",
            decode=lambda body: body,
            open=partial(open_socket, seed, timeout=self._limits.connect_timeout),
            interval=_HEARTBEAT_SECONDS,
        )
        listener.watch(_SWITCH, self._on_switch)
        return listener

    def _on_switch(self, message: bytes | None) -> None:
        """A hint: "<service> …", or that something may have been missed. The Sentinels are asked what is true."""
        if message is not None and message.partition(b" ")[0] != self._deployment.service.encode():
            return
        self._look_again = True
        if self._looking is None:
            self._looking = background.spawn(self._look(), name="nonstick-redis-sentinel")

    async def _look(self) -> None:
        try:
            while self._look_again:
                self._look_again = False
                try:
                    self._settle(await self._views())
                except StoreUnavailable as error:
                    logger.debug("%s: %s", self._deployment.url, error)
        finally:
            self._looking = None


def _nobody(problems: list[StoreUnavailable]) -> StoreUnavailable:
    """What to raise where no Sentinel named a primary. One that was just set up knows nothing: most have to agree."""
    unusable = [problem for problem in problems if isinstance(problem, StoreUnusable)]
    if len(unusable) > len(problems) // 2:
        return unusable[0]
    return StoreUnavailable(f"no Sentinel names the primary: {(unusable or problems)[0]}")
