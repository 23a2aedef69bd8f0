"""The servers behind a Redis store's URL: which one a command goes to, and over which connection.

One server is a `Servers` by itself; sentinel.py and cluster.py have the others. What they have in common:

* A command that may have run is never sent again: only the store's callers repeat. One that has certainly not run (the
  server said so: MOVED, ASK, TRYAGAIN) is sent where it belongs, within its deadline.
* A write that a replica has to confirm goes over a connection of its own, because WAIT holds its connection up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from nonstick.errors import StoreUnavailable, StoreUnusable
from nonstick.stores.redis.connection import Connection
from nonstick.stores.redis.examine import check_server
from nonstick.stores.redis.replies import Redirected
from nonstick.stores.redis.sockets import Arg, Socket, ask, open_socket
from nonstick.stores.redis.url import Address
from nonstick.waiting import background

__all__ = ["Answer", "Limits", "Server", "Servers", "SingleServer", "write_anywhere"]

logger = logging.getLogger("nonstick.store")

_LOGGED: Final = ("version", "role", "eviction")
"""What is looked at when a server is first connected to; `nonstick doctor` looks at more. A member of a
Cluster may well be a replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What every connection of a store is held to: see `RedisStore`."""

    name: str = ""
    timeout: float = 2.0
    connect_timeout: float = 2.0
    max_waiting: int = 10_000
    max_bytes: int = 64 * 1024 * 1024
    examine: bool = True
    """Whether a server is looked at when it is first connected to."""
    cluster: bool = False
    """Whether servers are members of a Cluster."""

    @property
    def replica_seconds(self) -> float:
        """How long a write waits for a replica to confirm it: twice fits into a call's deadline."""
        return self.timeout / 4


class Servers(Protocol):
    """Whichever server has a key."""

    on_switch: Callable[[], None]
    """Called when another server has become the primary, where that is told."""

    @property
    def only(self) -> Server | None:
        """The one that has every key; None where it depends on the key."""
        ...

    async def ask(self, key: str, *args: Arg, replicated: bool = False) -> Answer:
        """The reply to a command about this key, and which server has given it.

        Args:
            replicated: Returns only once a replica has it too, and everything before it.

        Raises:
            StoreUnavailable: There is none, or no replica confirmed it in time. The outcome is unknown.
        """
        ...

    async def call(self, key: str, *args: Arg, replicated: bool = False) -> Any:
        """The reply alone: see `ask`."""
        ...

    async def call_each(self, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
        """The replies to these commands, of which each is about the one key that it names first.

        They go together to each server that has some of the keys, once: one that a server sends elsewhere is not sent
        there. In place of a reply that is an error, or has not come, there is what `call` would raise.
        """
        ...

    async def is_owner(self, key: str, server: Server) -> bool:
        """Whether this server still has the key, as others say that can know, and are asked now (P15).

        Raises:
            StoreUnavailable: None of them answers.
        """
        ...

    def marks(self, stem: str) -> list[str]:
        """The keys that tell a server's history: they begin with `stem`, and lie on as many servers as there may be."""
        ...

    def marks_at(self, stem: str, server: Server) -> list[str]:
        """Those that lie on this server: one at least."""
        ...

    async def open_subscription(self) -> Socket:
        """A socket to a server at which every channel can be subscribed to."""
        ...

    async def names_for_each(self, stem: str) -> Iterable[str]:
        """Keys that begin with `stem`, such that each server which takes writes has one of them."""
        ...

    async def each(self) -> list[tuple[Address, Callable[..., Awaitable[Any]]]]:
        """Each server that takes writes, and what runs a command on it."""
        ...

    async def close(self) -> None:
        """Closes every connection; nothing is left running."""
        ...


class Server:
    """One server, and the connections to it.

    Attributes:
        place: Host and port, or path, of what is connected to: for logs.
        plain: Has the replies to commands that no replica is to confirm.
        openings: How often a connection to it was opened. While that is the same, it is the same process that answers.
        owned, proven: Openings, and a time of the loop up to which they count. With so many openings the server is
            known to have its keys (owned), and to be right about what it does not have (proven): see proof.py.
    """

    def __init__(
        self,
        address: Address,
        limits: Limits,
        *,
        open: Callable[[], Awaitable[Socket]] | None = None,  # noqa: A002
    ) -> None:
        self.address = address
        self.place = address.path or address.place
        self.openings = 0
        self.owned = self.proven = (0, 0.0)
        self._limits = limits
        self._open = open or self._open_itself
        self._examined = not limits.examine
        self.plain = self._connection()
        self._confirmed: _Confirmed | None = None

    def call(
        self, args: tuple[Arg, ...], *, asking: bool = False, replicated: bool = False, timeout: float | None = None
    ) -> Awaitable[Any]:
        """The reply to this command: see `Servers.call`, and `Connection.send` for `asking`."""
        if not replicated:
            return self.plain.send(args, timeout, asking=asking)
        if self._confirmed is None:
            self._confirmed = _Confirmed(self._connection(), self._limits.replica_seconds)
        return self._confirmed.call(args, timeout, asking=asking)

    async def call_each(self, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
        """The replies to these commands, or errors in their places: see `Servers.call_each`."""
        try:
            # Half of a call's time: callers have answers of other servers by then, and no more time than a call.
            return await self.plain.send_each(commands, self._limits.timeout / 2)
        except StoreUnavailable as error:
            return [error] * len(commands)

    @property
    def is_idle(self) -> bool:
        """Nothing waits for a reply."""
        return self.plain.is_idle and (self._confirmed is None or self._confirmed.connection.is_idle)

    def reopen(self, reason: str) -> None:
        """Gives the connections up; the next call opens others."""
        self.plain.reopen(reason)
        if self._confirmed is not None:
            self._confirmed.connection.reopen(reason)

    async def close(self) -> None:
        """Closes the connections; nothing is left running."""
        await self.plain.close()
        if self._confirmed is not None:
            await self._confirmed.close()

    def _connection(self) -> Connection:
        limits = self._limits
        return Connection(
            self.address,
            timeout=limits.timeout,
            connect_timeout=limits.connect_timeout,
            max_waiting=limits.max_waiting,
            max_bytes=limits.max_bytes,
            open=self._open_counted,
        )

    async def _open_counted(self) -> Socket:
        socket = await self._open()
        self.openings += 1
        return socket

    async def _open_itself(self) -> Socket:
        limits = self._limits
        return await open_socket(self.address, name=limits.name, timeout=limits.connect_timeout, check=self._check)

    async def _check(self, socket: Socket) -> None:
        if not self._examined:
            await examine_briefly(socket, self.address, cluster=self._limits.cluster)
            self._examined = True


Answer = tuple[Any, Server, int]
"""A reply, the server that gave it, and that server's `openings` before it was asked."""


class SingleServer:
    """The one server that has every key."""

    def __init__(self, address: Address, limits: Limits) -> None:
        self.on_switch: Callable[[], None] = lambda: None
        self.only = Server(address, limits)
        self._address = address
        self._limits = limits

    async def ask(self, key: str, *args: Arg, replicated: bool = False) -> Answer:
        server, openings = self.only, self.only.openings
        return await server.call(args, replicated=replicated), server, openings

    async def call(self, key: str, *args: Arg, replicated: bool = False) -> Any:
        try:
            return await self.only.call(args, replicated=replicated)
        except Redirected as error:
            raise StoreUnusable(str(error)) from None

    async def call_each(self, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
        return await self.only.call_each(commands)

    async def is_owner(self, key: str, server: Server) -> bool:
        """There is no other."""
        return True

    def marks(self, stem: str) -> list[str]:
        return [stem]

    def marks_at(self, stem: str, server: Server) -> list[str]:
        return [stem]

    async def open_subscription(self) -> Socket:
        return await open_socket(self._address, name=self._limits.name, timeout=self._limits.connect_timeout)

    async def names_for_each(self, stem: str) -> Iterable[str]:
        return (stem,)

    async def each(self) -> list[tuple[Address, Callable[..., Awaitable[Any]]]]:
        return [(self._address, lambda *args: self.only.call(args))]

    async def close(self) -> None:
        await self.only.close()


async def write_anywhere(servers: Servers, stem: str) -> None:
    """Returns once one server has taken a write, of a key that begins with `stem` and is gone after a second.

    Of a Cluster one server is enough: should another be away, no node would be ready, though all can serve most
    sessions.

    Raises:
        StoreUnavailable: None has.
    """
    names = await servers.names_for_each(stem)
    tries = [asyncio.ensure_future(servers.call(name, "SET", name, "", "PX", 1000)) for name in names]
    waiting = set(tries)
    try:
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            failures = [failure for tried in done if (failure := tried.exception()) is not None]
            if len(failures) < len(done):
                return
            if not waiting:
                raise failures[0]
    finally:
        for tried in tries:
            tried.cancel()


async def examine_briefly(socket: Socket, address: Address, *, cluster: bool = False) -> None:
    """Logs what is wrong with the version, role or eviction policy of a server. Whatever it permits, it is no error.

    Raises:
        StoreUnusable: The URL names the wrong kind of server.
    """
    try:
        findings = await check_server(lambda *args: ask(socket, *args), cluster=cluster)
    except StoreUnavailable as error:
        logger.debug("%s was not examined: %s", address.url, error)
        return
    for finding in findings:
        if finding.lasts:
            raise StoreUnusable(f"what answers there is {finding.text}. {finding.advice}")
        if finding.level != "ok" and finding.subject in _LOGGED and not (cluster and finding.subject == "role"):
            logger.warning("%s: %s. %s", address.url, finding.text, finding.advice)


class _Confirmed:
    """Calls that return once a replica has what they wrote. One WAIT serves all that were answered before it."""

    def __init__(self, connection: Connection, seconds: float) -> None:
        self.connection = connection
        self._seconds = seconds
        self._waiting: list[tuple[asyncio.Future[None], int]] = []
        self._task: asyncio.Task[None] | None = None

    async def call(self, args: tuple[Arg, ...], timeout: float | None = None, *, asking: bool = False) -> Any:
        losses = self.connection.losses
        reply = await self.connection.send(args, timeout, asking=asking)
        loop = asyncio.get_running_loop()
        confirmed: asyncio.Future[None] = loop.create_future()
        self._waiting.append((confirmed, losses))
        if self._task is None:
            self._task = background.spawn(self._confirm(), name="nonstick-redis-confirm")
        await confirmed
        return reply

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self.connection.close()

    async def _confirm(self) -> None:
        same: list[asyncio.Future[None]] = []
        try:
            while self._waiting:
                some, self._waiting = self._waiting, []
                # WAIT speaks of what was written over its own connection. Another socket may lead to another server,
                # which would confirm what it never got.
                same = [one for one, losses in some if losses == self.connection.losses]
                _settle((one for one, losses in some if losses != self.connection.losses), _unconfirmed("in time"))
                if same:
                    _settle(same, await self._asked())
        finally:
            self._task = None
            _settle((*same, *(one for one, _ in self._waiting)), StoreUnavailable("the store was closed"))

    async def _asked(self) -> StoreUnavailable | None:
        try:
            count: int = await self.connection.call("WAIT", 1, int(self._seconds * 1000))
        except StoreUnavailable as error:
            return error
        return None if count else _unconfirmed(f"within {self._seconds:g} s")


def _unconfirmed(when: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"no replica confirmed the write {when}: durability=replicated needs one that is connected and keeps up"
    )


def _settle(waiting: Iterable[asyncio.Future[None]], error: StoreUnavailable | None) -> None:
    for one in waiting:
        if not one.done():
            if error is None:
                one.set_result(None)
            else:
                one.set_exception(error)
