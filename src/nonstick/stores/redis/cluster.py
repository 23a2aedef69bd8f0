"""A Redis or Valkey Cluster: which server has a slot, also while slots move and replicas take over."""

from __future__ import annotations

import asyncio
import binascii
import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final

from nonstick.errors import StoreUnavailable, StoreUnusable
from nonstick.stores.common.backoff import backoff
from nonstick.stores.redis.replies import Redirected, ScriptMissing, TryAgain
from nonstick.stores.redis.servers import Answer, Limits, Server
from nonstick.stores.redis.sockets import Arg, Socket, open_socket
from nonstick.stores.redis.url import Address, Deployment
from nonstick.waiting import background

__all__ = ["ClusterServers", "key_slot"]

logger = logging.getLogger("nonstick.store")

SLOTS: Final = 16384
_ASK_SECONDS: Final = 0.5
"""How long one member may take to tell which member has which slots, before the next one is asked."""

_PAUSE_SECONDS: Final = 0.1
"""Between two readings of the table, while calls fail."""

_REDIRECTS_AT_ONCE: Final = 3
"""From then on there is a pause before each: two servers that send one to each other have not made up their minds."""

_MAX_NAMES: Final = 100_000

_MARKS: Final = 64
"""So many slots have a mark, which moves with them. A server that has none of these has another one of its own."""


def key_slot(key: str) -> int:
    """The slot of this key: of what is between its first braces, if there is anything."""
    start = key.find("{")
    if start >= 0:
        end = key.find("}", start)
        if end > start + 1:
            key = key[start + 1 : end]
    return binascii.crc_hqx(key.encode(), 0) % SLOTS


@dataclass(slots=True)
class _Table:
    """Which member has which slots, as one of them told it.

    Attributes:
        owners: By slot. Empty until it was told for the first time.
        followers: The replicas of each owner.
        names: What the cluster itself calls each member, wherever it is.
        own_marks: See `ClusterServers.marks_at`.
    """

    owners: list[Address | None] = field(default_factory=list["Address | None"])
    followers: dict[Address, list[Address]] = field(default_factory=dict[Address, "list[Address]"])
    names: dict[Address, bytes] = field(default_factory=dict[Address, bytes])
    own_marks: dict[Address, list[str]] = field(default_factory=dict[Address, "list[str]"])

    @property
    def members(self) -> list[Address]:
        """Those that own slots."""
        return list(dict.fromkeys(owner for owner in self.owners if owner is not None))


class ClusterServers:
    """The members of a Cluster that own slots. The URL's are asked for the others.

    The table of owners is only a guess: a member that does not own a slot any more says so, and is believed.
    """

    only: Server | None = None

    def __init__(self, deployment: Deployment, limits: Limits) -> None:
        self.on_switch: Callable[[], None] = lambda: None
        self._deployment = deployment
        self._limits = replace(limits, cluster=True)
        self._servers: dict[Address, Server] = {}
        self._table = _Table()
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed = -math.inf
        self._unusable = ""
        self._closed = False

    async def call(self, key: str, *args: Arg, replicated: bool = False) -> Any:
        return (await self.ask(key, *args, replicated=replicated))[0]

    async def ask(self, key: str, *args: Arg, replicated: bool = False) -> Answer:
        loop = asyncio.get_running_loop()
        began = loop.time()
        limit = began + self._limits.timeout
        slot, attempts = key_slot(key), 0
        address, asking = await self._owner(slot), False
        owner = self._server(address)
        openings = owner.openings
        while True:
            left = limit - loop.time()
            try:
                server = self._server(address)
                if not asking:
                    # A member that asks another one, in the middle of a migration, vouches for it.
                    owner, openings = server, server.openings
                reply = await server.call(args, asking=asking, replicated=replicated, timeout=left)
                return reply, owner, openings
            except Redirected as to:
                if left <= 0:
                    raise
                address, asking = self._followed(slot, address, to), to.asking
            except TryAgain:
                if left <= 0:
                    raise
                address, asking = await self._owner(slot), False
                attempts = max(attempts, _REDIRECTS_AT_ONCE)
            except ScriptMissing:
                raise
            except StoreUnavailable:
                self._refresh()
                raise
            except asyncio.CancelledError:
                # A caller may be gone before this call is out of time, and yet the server may hang, and be replaced.
                if loop.time() - began >= self._patience():
                    self._refresh()
                raise
            attempts += 1
            if attempts > _REDIRECTS_AT_ONCE:
                await asyncio.sleep(min(backoff(attempts - _REDIRECTS_AT_ONCE), max(limit - loop.time(), 0)))

    async def call_each(self, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
        replies: list[Any] = [None] * len(commands)
        numbers: dict[Address, list[int]] = {}
        for number, command in enumerate(commands):
            try:
                owner = await self._owner(key_slot(str(command[1])))
            except StoreUnavailable as error:
                replies[number] = error
            else:
                numbers.setdefault(owner, []).append(number)
        told = await asyncio.gather(
            *(self._call_each_at(owner, [commands[n] for n in some]) for owner, some in numbers.items())
        )
        for some, answers in zip(numbers.values(), told, strict=True):
            for number, answer in zip(some, answers, strict=True):
                replies[number] = answer
        return replies

    async def _call_each_at(self, address: Address, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
        try:
            replies = await self._server(address).call_each(commands)
        except StoreUnavailable as error:  # closed meanwhile
            return [error] * len(commands)
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, Redirected):
                self._followed(key_slot(str(command[1])), address, reply)
            elif isinstance(reply, StoreUnavailable) and not isinstance(reply, TryAgain):
                self._refresh()
        return replies

    async def open_subscription(self) -> Socket:
        """At any member: all of them get every message. Another one each time, for this one may be cut off."""
        addresses = await self._members()
        limits = self._limits
        return await open_socket(random.choice(addresses), name=limits.name, timeout=limits.connect_timeout)  # noqa: S311

    async def names_for_each(self, stem: str) -> Iterable[str]:
        wanted = set(await self._members())
        names: list[str] = []
        for n in range(_MAX_NAMES):
            name = f"{stem}:{n}"
            owner = self._owner_of(key_slot(name))
            if owner in wanted:
                wanted.discard(owner)
                names.append(name)
            if not wanted:
                break
        return names

    async def each(self) -> list[tuple[Address, Callable[..., Awaitable[Any]]]]:
        return [(address, self._teller(address)) for address in await self._members()]

    async def close(self) -> None:
        self._closed = True
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])
        await asyncio.gather(*(server.close() for server in self._servers.values()))

    def _teller(self, address: Address) -> Callable[..., Awaitable[Any]]:
        return lambda *args: self._server(address).call(args)

    def _server(self, address: Address) -> Server:
        server = self._servers.get(address)
        if server is None:
            if self._closed:
                raise StoreUnavailable("the store was closed")
            server = self._servers[address] = Server(address, self._limits)
        return server

    # ---- owners of slots

    async def _owner(self, slot: int) -> Address:
        if not self._table.owners:
            await self._told()
        address = self._owner_of(slot)
        if address is None:
            self._refresh()
            raise self._untold("tells who has the keys")
        return address

    async def _members(self) -> list[Address]:
        """Those that own slots."""
        if not self._table.owners:
            await self._told()
        members = self._table.members
        if not members:
            raise self._untold("answers")
        return members

    def _untold(self, what: str) -> StoreUnavailable:
        if self._unusable:
            return StoreUnusable(self._unusable)
        return StoreUnavailable(f"no member of {self._deployment.url} {what}")

    def _owner_of(self, slot: int) -> Address | None:
        return self._table.owners[slot] if self._table.owners else None

    def _followed(self, slot: int, at: Address, to: Redirected) -> Address:
        """Where a redirection leads. One that is for good says that the table is out of date."""
        address = self._deployment.address.at(to.host or at.host, to.port)
        if not to.asking:
            if self._table.owners:
                self._table.owners[slot] = address
                self._table.own_marks.clear()
            self._refresh()
        return address

    async def _told(self) -> None:
        """Waits, no longer than a call may, for a table that is being read."""
        self._refresh(pause=0)
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing], timeout=self._limits.timeout)

    def _refresh(self, *, pause: float = _PAUSE_SECONDS) -> None:
        """Begins to read the table anew, unless that is under way or was begun just now."""
        now = asyncio.get_running_loop().time()
        if self._refreshing is None and not self._closed and now - self._refreshed >= pause:
            self._refreshed = now
            self._refreshing = background.spawn(self._read_table(), name="nonstick-redis-cluster")

    async def _read_table(self) -> None:
        """Asks one member after the other, in any order: one that was cut off may be out of date, or silent."""
        try:
            asked = list(dict.fromkeys([*self._table.members, *self._deployment.seeds]))
            random.shuffle(asked)
            unusable = ""
            for address in asked:
                try:
                    table = await self._table_of(address)
                except StoreUnavailable as error:
                    if isinstance(error, StoreUnusable):
                        unusable = str(error)
                    logger.debug("%s does not tell who has which slots: %s", address.url, error)
                    continue
                if table.names:
                    unusable = ""
                    await self._adopt(table)
                    break
            self._unusable = unusable
        finally:
            self._refreshing = None

    def _patience(self) -> float:
        return min(_ASK_SECONDS, self._limits.timeout)

    async def _table_of(self, teller: Address) -> _Table:
        """Which member has which slots, as this one says."""
        reply = await self._server(teller).call(("CLUSTER", "SLOTS"), timeout=self._patience())
        table = _Table([None] * SLOTS)
        for first, last, *members in reply:
            owner, *followers = found = [self._address_of(member, teller) for member in members]
            table.owners[first : last + 1] = [owner] * (last + 1 - first)
            table.followers[owner] = followers
            table.names |= {address: member[2] for address, member in zip(found, members, strict=True)}
        return table

    def _address_of(self, member: list[Any], teller: Address) -> Address:
        host = (member[0] or b"").decode()
        return self._deployment.address.at(host if host not in ("", "?") else teller.host, int(member[1]))

    async def _adopt(self, table: _Table) -> None:
        """Takes the table over, and closes what is not in it and not in use."""
        self._table = table
        members = set(table.owners)
        for address, server in list(self._servers.items()):
            if address not in members and server.is_idle:
                del self._servers[address]
                await server.close()

    # ---- proof

    async def is_owner(self, key: str, server: Server) -> bool:
        """Asks other primaries: so many that, had another owner been elected, one that voted for it is among them.

        Where there is no other primary a replica is asked; and where there is no other member at all nobody is: none
        can have taken over.
        """
        slot, address, name = key_slot(key), server.address, self._table.names.get(server.address)
        others = [one for one in self._table.members if one != address] or self._table.followers.get(address, [])
        if not others:
            return True
        random.shuffle(others)
        waiting = iter(others)
        for table in await asyncio.gather(*(self._told_by_one_of(waiting) for _ in range(max(1, len(others) // 2)))):
            owner = table.owners[slot]
            if owner != address and (owner is None or name is None or table.names.get(owner) != name):
                logger.warning("%s answered for keys that are another server's now: it is not believed", address.url)
                await self._adopt(table)
                self._refresh()
                return False
        return True

    async def _told_by_one_of(self, members: Iterator[Address]) -> _Table:
        for member in members:
            try:
                return await self._table_of(member)
            except StoreUnavailable as error:
                logger.debug("%s does not tell who has which slots: %s", member.url, error)
        raise StoreUnavailable(f"no other member of {self._deployment.url} could be asked whether something is gone")

    def marks(self, stem: str) -> list[str]:
        return [f"{stem}:{n}" for n in range(_MARKS)]

    def marks_at(self, stem: str, server: Server) -> list[str]:
        """Those of `marks`; for a server that has none of these the first after them."""
        table, address = self._table, server.address
        marks = table.own_marks.get(address)
        if marks is None:
            marks = [name for name in self.marks(stem) if self._owner_of(key_slot(name)) == address]
            if not marks and address in table.members:
                more = (f"{stem}:{n}" for n in range(_MARKS, _MAX_NAMES))
                marks = [*islice((name for name in more if self._owner_of(key_slot(name)) == address), 1)]
            table.own_marks[address] = marks
        return marks
