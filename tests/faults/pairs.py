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
_DEADLINE = 120.0


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

    async def fail_over(self) -> None:
        """The primary dies, and the replica takes its place."""
        self.primary.kill()
        await self.link.cut()
        await self._promote()

    @abstractmethod
    async def replicated(self) -> None:
        """Returns once the replica has all that the primary had when this was called."""

    @abstractmethod
    async def rejoin(self) -> None:
        """The server that died becomes the replica of the one that took its place."""

    @abstractmethod
    async def follow_anew(self) -> None:
        """The primary has lost its data: the replica copies what it has now."""

    async def restart(self, *, keep_data: bool) -> None:
        """The primary is killed, unless it is dead already, and comes back."""
        self.primary.restart(keep_data=keep_data)

    @abstractmethod
    async def _begin(self) -> None: ...

    @abstractmethod
    async def _promote(self) -> None: ...


class ValkeyPair(Pair):
    primary: ValkeyServer
    _replica: ValkeyServer

    async def _begin(self) -> None:
        self.primary = self._stack.enter_context(ValkeyServer("--repl-diskless-sync-delay", "0", appendonly=True))
        self._replica = self._stack.enter_context(ValkeyServer("--repl-diskless-sync-delay", "0", appendonly=True))
        self._link = await self._stack.enter_async_context(FaultProxy(self.primary.url))
        await self._ask(self._replica, f"REPLICAOF 127.0.0.1 {self.link.port}")

    async def replicated(self) -> None:
        wanted = int((await self._info(self.primary))["master_repl_offset"])
        async with asyncio.timeout(_DEADLINE):
            while True:
                info = await self._info(self._replica)
                if info.get("master_link_status") == "up" and int(info["slave_repl_offset"]) >= wanted:
                    return
                await asyncio.sleep(_POLL)

    async def _info(self, server: ValkeyServer) -> dict[str, str]:
        lines = (await self._ask(server, "INFO replication")).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    async def _promote(self) -> None:
        await self._ask(self._replica, "REPLICAOF NO ONE")
        self.primary, self._replica = self._replica, self.primary

    async def rejoin(self) -> None:
        self._replica.start()
        await self.link.lead_to(self.primary.url)
        await self.link.heal()
        await self._ask(self._replica, f"REPLICAOF 127.0.0.1 {self.link.port}")

    async def follow_anew(self) -> None:
        """It does so by itself."""

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

    async def restart(self, *, keep_data: bool) -> None:
        # Beside the loop: it takes a second or more.
        await asyncio.to_thread(self.primary.restart, keep_data=keep_data)

    async def _promote(self) -> None:
        assert await self._ask(self._replica, "SELECT pg_promote()")
        self.primary, self._replica = self._replica, self.primary

    async def rejoin(self) -> None:
        await self._follow()

    async def follow_anew(self) -> None:
        self._replica.kill()
        await self._follow()

    @staticmethod
    async def _ask(server: PostgresServer, query: str) -> object:
        connection = await asyncpg.connect(server.url)
        try:
            return await connection.fetchval(query)
        finally:
            connection.terminate()
