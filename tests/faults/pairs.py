"""A primary and its replica, whose replication can be held back: a failover then loses what was acknowledged."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import asyncpg

from nonstick.testing import FaultProxy, PostgresServer, ValkeyServer

__all__ = ["Pair", "PostgresPair", "ValkeyPair"]

_POLL = 0.005
_DEADLINE = 30.0


class Pair(ABC):
    """Two servers, replicating through a bad network. An async context manager.

    Attributes:
        primary: The server that nodes are to use.
    """

    primary: ValkeyServer | PostgresServer

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._link: FaultProxy | None = None

    @property
    def link(self) -> FaultProxy:
        """The network between the two."""
        assert self._link is not None
        return self._link

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
            await self.replicated()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._stack.aclose()

    def hold_back(self) -> None:
        """What is written from here on does not reach the replica."""
        self.link.black_hole()

    async def fail_over(self, *, rejoin: bool = False) -> None:
        """The primary dies and the replica takes its place; with `rejoin` the dead one becomes its replica, empty."""
        self.primary.kill()
        await self.link.cut()
        await self._promote()
        if rejoin:
            await self._rejoin()

    @abstractmethod
    async def replicated(self) -> None:
        """Returns once the replica has all that the primary has."""

    @abstractmethod
    async def _begin(self) -> None: ...

    @abstractmethod
    async def _promote(self) -> None: ...

    @abstractmethod
    async def _rejoin(self) -> None: ...


class ValkeyPair(Pair):
    primary: ValkeyServer
    _replica: ValkeyServer

    async def _begin(self) -> None:
        self.primary = self._stack.enter_context(ValkeyServer("--repl-diskless-sync-delay", "0"))
        self._replica = self._stack.enter_context(ValkeyServer("--repl-diskless-sync-delay", "0"))
        self._link = await self._stack.enter_async_context(FaultProxy(self.primary.url))
        await self._ask(self._replica, f"REPLICAOF 127.0.0.1 {self.link.port}")

    async def replicated(self) -> None:
        async with asyncio.timeout(_DEADLINE):
            while await self._offset(self.primary, "master") != await self._offset(self._replica, "slave"):  # noqa: ASYNC110
                await asyncio.sleep(_POLL)

    async def _offset(self, server: ValkeyServer, role: str) -> str:
        """How far it is in the stream of writes; a server that is not linked yet is nowhere."""
        info = dict(
            line.split(":", 1) for line in (await self._ask(server, "INFO replication")).splitlines() if ":" in line
        )
        if role == "slave" and info.get("master_link_status") != "up":
            return "not linked"
        return info["master_repl_offset" if role == "master" else "slave_repl_offset"]

    async def _promote(self) -> None:
        await self._ask(self._replica, "REPLICAOF NO ONE")
        self.primary, self._replica = self._replica, self.primary

    async def _rejoin(self) -> None:
        self._replica.start()
        await self.link.lead_to(self.primary.url)
        await self.link.heal()
        await self._ask(self._replica, f"REPLICAOF 127.0.0.1 {self.link.port}")

    @staticmethod
    async def _ask(server: ValkeyServer, command: str) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(f"{command}\r\n".encode())
            head = (await reader.readline()).decode().rstrip()
            assert not head.startswith("-"), head
            return (await reader.readexactly(int(head[1:]))).decode() if head.startswith("$") else head
        finally:
            writer.close()


class PostgresPair(Pair):
    primary: PostgresServer
    _replica: PostgresServer

    async def _begin(self) -> None:
        self.primary = self._stack.enter_context(PostgresServer())
        await self._follow()

    async def _follow(self) -> None:
        self._link = await self._stack.enter_async_context(FaultProxy(self.primary.url))
        where = f"host=127.0.0.1 port={self.link.port} user=nonstick sslmode=disable gssencmode=disable"
        standby = PostgresServer(standby_of=self.primary, primary_conninfo=where)
        # Beside the loop: the proxy, through which it begins to stream, has to work meanwhile.
        self._replica = await asyncio.to_thread(standby.__enter__)
        self._stack.push(standby)

    async def replicated(self) -> None:
        head = str(await self._ask(self.primary, "SELECT pg_current_wal_lsn()::text"))
        query = f"SELECT coalesce(pg_last_wal_replay_lsn() >= '{head}'::pg_lsn, false)"
        async with asyncio.timeout(_DEADLINE):
            while not await self._ask(self._replica, query):  # noqa: ASYNC110
                await asyncio.sleep(_POLL)

    async def _promote(self) -> None:
        assert await self._ask(self._replica, "SELECT pg_promote()")
        self.primary, self._replica = self._replica, self.primary

    async def _rejoin(self) -> None:
        await self._follow()

    @staticmethod
    async def _ask(server: PostgresServer, query: str) -> object:
        connection = await asyncpg.connect(server.url)
        try:
            return await connection.fetchval(query)
        finally:
            connection.terminate()
