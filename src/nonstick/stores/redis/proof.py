"""Whether a server that says that something is not there can know that (P15).

A 404 makes a client drop its session, so a "no" has to be proven, which a "yes" need not be. There are two servers
that say no and do not know:

* One that was replaced, and does not know it yet: it hung, was taken for dead, and wakes up. After it has answered,
  other servers are asked that would know: see `Servers.is_owner`.
* One that has come back without its data. Each server carries a *mark*, a random value under a key of its own, made
  when the store is first used, and replicated and persisted as all the rest is. Every node remembers the marks that it
  saw. A server without its mark, or with another one, is empty or of another history.

What a server without its mark lacks may be on another one, which somebody can still bring back. So it is not believed
for a grace period, and what it does not have is unavailable. If it is the owner of its keys even then, the data are
lost, and it gets a new mark. A node that has seen no mark yet believes a store that has none: it is new.

A proof counts for a second, and for all that the server says meanwhile over the same connection: so ids that somebody
made up cost one question a second. A server does not hang, get replaced and wake up in less. Where there is one mark,
it comes with each answer that something is gone, from the same step of the server, and costs no question at all.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, Final

from nonstick.errors import StoreUnavailable
from nonstick.stores.redis.replies import Redirected, TryAgain
from nonstick.stores.redis.servers import Server, Servers
from nonstick.waiting import background
from nonstick.waiting.retry import retry_until_answered

__all__ = ["PROVEN_SECONDS", "Proof"]

logger = logging.getLogger("nonstick.store")

PROVEN_SECONDS: Final = 1.0
"""How long a proof counts."""

_LOOK_SECONDS: Final = 1.0
"""Between two looks at a server that is not believed."""


class Proof:
    """What is known of the servers of one store, and what they have to show before their "no" counts.

    Args:
        stem: Of the names of the marks.
        url: Of the store, for logs.
        grace: Seconds for which a server without its mark is not believed.
    """

    def __init__(self, servers: Servers, *, stem: str, url: str, grace: float) -> None:
        self._servers = servers
        self._stem = stem
        self._url = url
        self._grace = grace
        self._loop = asyncio.get_running_loop()
        self._known: dict[str, bytes] = {}
        # One mark there is then, and it comes with every answer that something is gone.
        self._is_alone = len(servers.marks(stem)) == 1
        self._checks: dict[tuple[str, Server, int], asyncio.Task[bool]] = {}
        # By the place of the server that is not believed: what waits for the end of its grace period.
        self._doubts: dict[str, asyncio.Task[None]] = {}
        self._learning = background.spawn(retry_until_answered(self._learn), name="nonstick-redis-marks")

    async def close(self) -> None:
        tasks = [self._learning, *self._checks.values(), *self._doubts.values()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def of_owner(self, key: str, server: Server, openings: int) -> bool:
        """Whether this server, which answered when it had been connected to so often, still has the key.

        Enough for a "no" that says nothing of a loss. If it has not, the caller asks whichever server has the key now.

        Raises:
            StoreUnavailable: No server that would know can be asked.
        """
        if server.openings != openings:
            return False
        if self._counts(server.owned, openings):
            return True
        return await self._once(("owner", server, openings), lambda: self._check_owner(key, server, openings))

    async def of_loss(self, key: str, server: Server, openings: int, *, mark: bytes | None = None) -> bool:
        """As `of_owner`, and whether this server can know that something is not there.

        Args:
            mark: What the server carried when it said so, "" for none; without it, it is asked for.

        Raises:
            StoreUnavailable: That cannot be told, now or for a while.
        """
        if server.openings != openings:
            return False
        if mark is not None and self._is_alone:
            if mark and mark == self._known.get(self._stem):
                return await self.of_owner(key, server, openings)
            server.proven = (0, 0.0)
        if server.place in self._doubts:
            raise self._unavailable(server.place)
        if self._counts(server.proven, openings):
            return True
        return await self._once(("loss", server, openings), lambda: self._check_loss(key, server, openings))

    def _counts(self, proof: tuple[int, float], openings: int) -> bool:
        before, until = proof
        return before == openings and self._loop.time() < until

    async def _once(self, what: tuple[str, Server, int], check: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
        """What `check` finds out. Callers that want to know the same at the same time share one check."""
        task = self._checks.get(what)
        if task is None:
            self._checks[what] = task = background.spawn(check(), name="nonstick-redis-proof")
            task.add_done_callback(lambda done: self._ended(what, done))
        await asyncio.wait([task])
        if task.cancelled():
            raise StoreUnavailable("the store was closed")
        if (error := task.exception()) is not None:
            raise type(error)(*error.args)
        return task.result()

    def _ended(self, what: tuple[str, Server, int], check: asyncio.Task[bool]) -> None:
        del self._checks[what]
        if not check.cancelled():
            # All who waited for it may be out of time: then nobody else asks how it failed.
            check.exception()

    async def _check_owner(self, key: str, server: Server, openings: int) -> bool:
        until = self._loop.time() + PROVEN_SECONDS
        if not await self._servers.is_owner(key, server) or server.openings != openings:
            return False
        server.owned = openings, until
        return True

    async def _check_loss(self, key: str, server: Server, openings: int) -> bool:
        until, place = self._loop.time() + PROVEN_SECONDS, server.place
        if not await self._check_owner(key, server, openings):
            return False
        if not self._known:
            await self._learn()
        has_its_mark = await self._has_its_mark(server)
        if server.openings != openings:
            return False
        if not has_its_mark:
            if place not in self._doubts:
                self._doubts[place] = background.spawn(self._wait(key, server, place), name="nonstick-redis-doubt")
            raise self._unavailable(place)
        server.proven = openings, until
        return True

    # ---- marks

    async def _learn(self) -> None:
        """Sees which marks there are. Where there are none at all the store is new, and gets some.

        Raises:
            StoreUnavailable: No server answers.
        """
        names = self._servers.marks(self._stem)
        if self._is_alone:
            self._known |= await self._make(names)
            return
        found = await asyncio.gather(*(self._servers.call(name, "GET", name) for name in names), return_exceptions=True)
        answered = {
            name: value for name, value in zip(names, found, strict=True) if not isinstance(value, BaseException)
        }
        if not answered:
            raise StoreUnavailable(f"no server of {self._url} answers")
        marks = {name: value for name, value in answered.items() if value is not None}
        self._known |= marks or await self._make(list(answered))

    async def _make(self, names: list[str]) -> dict[str, bytes]:
        """Gives the servers that have these keys marks, where they have none. Returns what they have then."""
        found = await asyncio.gather(*map(self._made, names), return_exceptions=True)
        made = {name: value for name, value in zip(names, found, strict=True) if isinstance(value, bytes)}
        if not made:
            raise StoreUnavailable(f"no server of {self._url} takes a mark: is there room for writes?")
        return made

    async def _made(self, name: str) -> bytes:
        # Sent together, and run in this order.
        _, value = await asyncio.gather(
            self._servers.call(name, "SET", name, secrets.token_hex(8), "NX"), self._servers.call(name, "GET", name)
        )
        mark: bytes = value
        return mark

    async def _has_its_mark(self, server: Server) -> bool:
        """Whether the server carries a mark that it should have. One that this node hears of for the first time counts.

        Raises:
            StoreUnavailable: It does not answer, or its marks are being moved.
        """
        names = self._servers.marks_at(self._stem, server)
        for name in [name for name in names if name in self._known]:
            try:
                return bool(await server.call(("GET", name)) == self._known[name])
            except (Redirected, TryAgain):
                continue  # it is moving, or has moved, with its slot
        new: dict[str, bytes] = {}
        told = False
        for name in names:
            try:
                value = await server.call(("GET", name))
            except (Redirected, TryAgain):
                # Following the redirection teaches `Servers` which marks this server should have now.
                await self._servers.call(name, "GET", name)
                continue
            told = True
            if value is not None:
                new[name] = value
        if not told:
            raise StoreUnavailable(f"the marks of {server.place} are being moved: try again")
        if not new and server.proven[0] == server.openings:
            # Since it was connected to it has had a mark, and now has keys without one: slots were moved, none is lost.
            new = await self._make(names)
        self._known |= new
        return bool(new)

    # ---- doubt

    async def _wait(self, key: str, server: Server, place: str) -> None:
        """Ends when the server has its mark, or is replaced; or, after the grace period, gives it a new mark."""
        logger.error(
            "%s: the server at %s is empty or of another history: its mark is not there. For %g s what it does not "
            "have is answered 503. If another server or a backup has the data, bring that back now; if they are lost, "
            "do nothing: clients will open new sessions. A primary without persistence must not be restarted without "
            "somebody who looks (docs/stores.md)",
            self._url,
            place,
            self._grace,
        )
        until = self._loop.time() + self._grace
        try:
            while True:
                await asyncio.sleep(min(_LOOK_SECONDS, max(until - self._loop.time(), 0.1)))
                try:
                    if await self._is_over(key, server, place, out_of_patience=self._loop.time() >= until):
                        return
                except StoreUnavailable as error:
                    logger.debug("%s cannot be looked at: %s", place, error)
        finally:
            del self._doubts[place]

    async def _is_over(self, key: str, server: Server, place: str, *, out_of_patience: bool) -> bool:
        if server.place != place or not await self._servers.is_owner(key, server):
            logger.warning("%s: another server has taken the place of %s", self._url, place)
            return True
        if await self._has_its_mark(server):
            logger.warning("%s: the server at %s has its data again", self._url, place)
            return True
        if out_of_patience:
            self._known |= await self._make(self._servers.marks_at(self._stem, server))
            logger.error(
                "%s: the server at %s is still the primary after %g s, so what it had is lost: sessions that it does "
                "not have are answered 404 from now on",
                self._url,
                place,
                self._grace,
            )
        return out_of_patience

    def _unavailable(self, place: str) -> StoreUnavailable:
        return StoreUnavailable(f"the server at {place} is empty or of another history: it is not believed for a while")
