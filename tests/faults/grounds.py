"""What campaigns are fought over: each kind of store, with what can be done to it while nodes use it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import asyncpg
import redis

from nonstick.testing import FaultProxy, ValkeyCluster, ValkeySentinel, ValkeyServer
from nonstick.testing.oracle import Fault, Lost, Violation
from nonstick.testing.servers.valkey_cluster import ask
from tests.faults.forgers import Intruder, repeat_wakes
from tests.faults.pairs import Pair, PostgresPair, ValkeyPair

__all__ = ["GROUNDS", "Ground", "StoreKind"]

StoreKind = Literal["sqlite", "valkey", "postgres", "valkey-cluster", "valkey-sentinel"]

Deed = Callable[[random.Random], Awaitable[None]]

SLACK: Final = 1.0
"""Seconds within which a write, once it is acknowledged, has reached a healthy replica, on a busy machine."""

EMPTY_GRACE: Final = 3.0
"""Seconds for which nodes do not believe a store that has lost its data: fewer than usually, to see more of it."""

_HOLD_LOCK: Final = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
db.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
"""


class Ground(ABC):
    """A store that runs, and is harmed. An async context manager.

    Attributes:
        proxies: The network before each node, by the node's name, where there is one that can be harmed.
        lost: Is told what was lost.
        found: What broke a promise, and no client can see.
    """

    def __init__(self, home: Path, add: Callable[[Lost | Fault], None]) -> None:
        self.home = home
        self.lost: Callable[[Lost], None] = add
        self._add = add
        self.proxies: dict[str, FaultProxy] = {}
        self.found: list[Violation] = []
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self.begin()
        except BaseException:
            await self.stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self.stack.aclose()

    def note(self, what: str) -> None:
        """Says what happened beside what was meant to."""
        self._add(Fault(time.monotonic(), what, "store"))

    @abstractmethod
    async def begin(self) -> None:
        """Starts it."""

    @abstractmethod
    async def way(self, node: str) -> str:
        """The store's URL for this node."""

    @abstractmethod
    def deeds(self) -> dict[str, Deed]:
        """What can be done to it, each of which puts it right again and loses nothing."""

    def losses(self) -> dict[str, Deed]:
        """What loses writes that were acknowledged."""
        return {}


class SQLiteGround(Ground):
    async def begin(self) -> None:
        self.path = self.home / "sessions.db"

    async def way(self, node: str) -> str:
        return f"sqlite:///{self.path}"

    def deeds(self) -> dict[str, Deed]:
        return {"writer frozen": self._freeze_writer}

    async def _freeze_writer(self, rng: random.Random) -> None:
        """Another process takes the write lock and stands still."""
        pipe = asyncio.subprocess.PIPE
        writer = await asyncio.create_subprocess_exec(
            sys.executable,
            "-ISc",
            _HOLD_LOCK,
            str(self.path),
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            assert writer.stdout is not None
            if await writer.stdout.readline():
                writer.send_signal(signal.SIGSTOP)
                await asyncio.sleep(rng.uniform(0.2, 3.0))
        finally:
            writer.kill()
            await writer.wait()


class ServedGround(Ground):
    """One server at a time, reached by each node through a network of its own."""

    pair: Pair
    kind: type[Pair]

    async def begin(self) -> None:
        self.pair = await self.stack.enter_async_context(self.kind())

    async def way(self, node: str) -> str:
        proxy = await self.stack.enter_async_context(FaultProxy(self.pair.primary.url))
        self.proxies[node] = proxy
        return f"{proxy.url}?empty_grace={EMPTY_GRACE:g}"

    def deeds(self) -> dict[str, Deed]:
        return {"server restarted": self._restart, "server frozen": self._freeze}

    def losses(self) -> dict[str, Deed]:
        return {"data lost": self._lose_all, "failover that lost writes": self._fail_over}

    async def _restart(self, rng: random.Random) -> None:
        """Killed, whatever it is doing: appends, always."""
        self.pair.primary.kill()
        await asyncio.sleep(rng.uniform(0.0, 1.5))
        await self.pair.restart(keep_data=True)

    async def _freeze(self, rng: random.Random) -> None:
        self.pair.primary.freeze()
        await asyncio.sleep(rng.uniform(0.2, 3.0))
        self.pair.primary.thaw()

    async def _lose_all(self, rng: random.Random) -> None:
        began = time.monotonic()
        await self.pair.restart(keep_data=False)
        self.lost(Lost(began, -inf, time.monotonic()))
        await self.pair.follow_anew()

    async def _fail_over(self, rng: random.Random) -> None:
        since = time.monotonic()
        await self.pair.replicated()
        self.pair.hold_back()
        await asyncio.sleep(rng.uniform(0.1, 1.5))
        began = time.monotonic()
        await self.pair.fail_over()
        for proxy in self.proxies.values():
            await proxy.lead_to(self.pair.primary.url)
        self.lost(Lost(began, since, time.monotonic()))
        await self.pair.rejoin()


class PostgresGround(ServedGround):
    kind = PostgresPair

    def deeds(self) -> dict[str, Deed]:
        return super().deeds() | {"announcements forged": self._forge}

    async def _forge(self, rng: random.Random) -> None:
        """By a role that may only connect: it hears all announcements, and makes some."""
        with contextlib.suppress(OSError, asyncpg.PostgresError, TimeoutError):
            await Intruder.admit(self.pair.primary.url)
        intruder = Intruder()
        await intruder.disturb(self.pair.primary.url, rng, rng.uniform(0.5, 2.0))
        if intruder.overheard:
            self.found.append(
                Violation("P14", f"whoever may connect hears what a session holds: {intruder.overheard[0]}")
            )


class ValkeyGround(ServedGround):
    kind = ValkeyPair

    def deeds(self) -> dict[str, Deed]:
        return super().deeds() | {"memory full": self._fill, "wakes repeated": self._repeat}

    def losses(self) -> dict[str, Deed]:
        return super().losses() | {"evictions": self._evict}

    def _admin(self) -> redis.Redis:
        return redis.Redis(port=self.pair.primary.port, protocol=2)

    async def _repeat(self, rng: random.Random) -> None:
        await repeat_wakes(self.pair.primary.port, rng, rng.uniform(0.5, 2.0))

    async def _fill(self, rng: random.Random) -> None:
        with self._admin() as admin:
            admin.config_set("maxmemory", 1)
            await asyncio.sleep(rng.uniform(0.2, 2.0))
            admin.config_set("maxmemory", 0)

    async def _evict(self, rng: random.Random) -> None:
        """Some keys of some sessions, as a server that is short of memory and told to evict."""
        began = time.monotonic()
        with self._admin() as admin:
            keys = sorted(admin.scan_iter(match="*}:[rwl]", count=1000))
            if doomed := [key for key in keys if rng.random() < 0.15]:
                admin.delete(*doomed)
        self.lost(Lost(began, -inf, time.monotonic()))


class GroupGround(Ground):
    """Several servers that replace each other. Nodes talk to all of them, so there is no network to harm.

    No fault begins before the last one is over: a replica that has not got everything yet must not be the one that is
    left. What happens although it was not meant to is noted, and stands beside what it leads to.
    """

    async def whole(self) -> None:
        """Returns once a server can be lost again."""
        await asyncio.to_thread(self.wait_until_whole)

    @abstractmethod
    def wait_until_whole(self) -> None: ...

    @abstractmethod
    def choose(self, rng: random.Random) -> ValkeyServer:
        """A primary."""

    @abstractmethod
    def is_primary(self, server: ValkeyServer) -> bool:
        """Whether the others hold it for one."""

    @abstractmethod
    def wait_for_successor(self, old: ValkeyServer) -> ValkeyServer:
        """Returns what took its place."""

    @abstractmethod
    def replica_of(self, primary: ValkeyServer) -> ValkeyServer: ...

    @abstractmethod
    def rejoin(self, server: ValkeyServer) -> None:
        """Has a server that was replaced follow its successor."""

    def losses(self) -> dict[str, Deed]:
        return {
            "primary killed": self._kill,
            "primary replaced, then thawed": self._thaw_late,
            "replica cut off, then primary killed": self._lose_tail,
            "primary restarted empty": self._empty,
        }

    async def _freeze(self, rng: random.Random) -> None:
        """For less than what makes a replica take over; but on a busy machine it may be longer."""
        primary, began = self.choose(rng), time.monotonic()
        primary.freeze()
        try:
            await asyncio.sleep(rng.uniform(0.1, 0.5))
        finally:
            primary.thaw()
        await self._over(primary, began, meant=False)

    async def _kill(self, rng: random.Random) -> None:
        primary, began = self.choose(rng), time.monotonic()
        primary.kill()
        await self._replaced(primary)
        await asyncio.to_thread(primary.start)
        await self._over(primary, began)

    async def _thaw_late(self, rng: random.Random) -> None:
        """The old primary first runs what lies in its buffers, for nodes that have not heard of the new one."""
        primary, began = self.choose(rng), time.monotonic()
        primary.freeze()
        try:
            await self._replaced(primary)
            await asyncio.sleep(rng.uniform(0.0, 0.5))
        finally:
            primary.thaw()
        await self._over(primary, began)

    async def _lose_tail(self, rng: random.Random) -> None:
        """The replica that takes over has not got the last of what was acknowledged."""
        primary = self.choose(rng)
        replica, since = self.replica_of(primary), time.monotonic()
        replica.freeze()
        try:
            await asyncio.to_thread(ask, primary, "CLIENT", "KILL", "TYPE", "replica")
            await asyncio.sleep(rng.uniform(0.1, 0.7))
            began = time.monotonic()
            primary.kill()
        finally:
            replica.thaw()
        await self._replaced(primary)
        await asyncio.to_thread(primary.start)
        await self._over(primary, began, since=since)

    async def _empty(self, rng: random.Random) -> None:
        """Before anybody has missed it: its replica then copies the emptiness."""
        primary, began = self.choose(rng), time.monotonic()
        await asyncio.to_thread(primary.restart, keep_data=False)
        await self._over(primary, began, since=-inf)

    async def _replaced(self, primary: ValkeyServer) -> None:
        new = await asyncio.to_thread(self.wait_for_successor, primary)
        if not await asyncio.to_thread(ask, new, "KEYS", "*:mark*"):
            self.note("an empty replica was elected")
            self.lost(Lost(time.monotonic(), -inf, time.monotonic()))

    async def _over(
        self, primary: ValkeyServer, began: float, *, since: float | None = None, meant: bool = True
    ) -> None:
        """Returns when all is whole again; says what may be lost."""
        replaced = not await asyncio.to_thread(self.is_primary, primary)
        if replaced:
            await asyncio.to_thread(self.rejoin, primary)
        await self.whole()
        replaced = replaced or not await asyncio.to_thread(self.is_primary, primary)
        if replaced and not meant:
            self.note("a primary that was frozen for a moment was replaced")
        if replaced or since is not None:
            self.lost(Lost(began, began - SLACK if since is None else since, time.monotonic()))


class ClusterGround(GroupGround):
    """Three primaries with a replica each."""

    async def begin(self) -> None:
        self.cluster = await asyncio.to_thread(ValkeyCluster("--appendonly", "yes", replicas=1).__enter__)
        self.stack.push(self.cluster)

    async def way(self, node: str) -> str:
        return f"{self.cluster.url}?empty_grace={EMPTY_GRACE:g}"

    def deeds(self) -> dict[str, Deed]:
        return {
            "slots migrated": self._migrate,
            "failover by arrangement": self._fail_over,
            "primary frozen": self._freeze,
        }

    def wait_until_whole(self) -> None:
        self.cluster.wait_until_whole()

    def choose(self, rng: random.Random) -> ValkeyServer:
        self.slot = rng.randrange(16384)
        return self.cluster.primary(self.slot)

    def is_primary(self, server: ValkeyServer) -> bool:
        return self.cluster.primary(self.slot) is server

    def wait_for_successor(self, old: ValkeyServer) -> ValkeyServer:
        return self.cluster.wait_for_successor(self.slot, old)

    def replica_of(self, primary: ValkeyServer) -> ValkeyServer:
        return self.cluster.replicas(primary)[0]

    def rejoin(self, server: ValkeyServer) -> None:
        """It does so by itself."""

    async def _migrate(self, rng: random.Random) -> None:
        """Those of the sessions that there are now, to other primaries."""
        cluster = self.cluster
        primaries = {id(server): server for server in map(cluster.primary, (0, 6000, 16000))}
        with redis.RedisCluster.from_url(f"redis://127.0.0.1:{cluster.primary(0).port}", protocol=2) as admin:
            keys = {key.split(b"}")[0] + b"}" for key in admin.scan_iter(match="*}:r", count=1000)}
        for key in rng.sample(sorted(keys), min(3, len(keys))):
            slot = cluster.slot(key.decode())
            to = rng.choice([server for server in primaries.values() if server is not cluster.primary(slot)])
            await asyncio.to_thread(cluster.migrate_slot, slot, to)
        await self.whole()

    async def _fail_over(self, rng: random.Random) -> None:
        await asyncio.to_thread(self.cluster.failover, rng.randrange(16384))
        await self.whole()


class SentinelGround(GroupGround):
    """A primary, a replica and three Sentinels."""

    async def begin(self) -> None:
        # A primary that came back empty before the Sentinels know better would empty the others.
        self.sentinel = await asyncio.to_thread(ValkeySentinel("--appendonly", "yes").__enter__)
        self.stack.push(self.sentinel)

    async def way(self, node: str) -> str:
        return f"{self.sentinel.url}?empty_grace={EMPTY_GRACE:g}"

    def deeds(self) -> dict[str, Deed]:
        return {"primary frozen": self._freeze, "sentinel killed": self._blind}

    def losses(self) -> dict[str, Deed]:
        return super().losses() | {"most sentinels out of date": self._outdate}

    def wait_until_whole(self) -> None:
        self.sentinel.wait_until_whole()

    def choose(self, rng: random.Random) -> ValkeyServer:
        return self.sentinel.primary

    def is_primary(self, server: ValkeyServer) -> bool:
        return self.sentinel.primary is server

    def wait_for_successor(self, old: ValkeyServer) -> ValkeyServer:
        return self.sentinel.wait_for_successor(old)

    def replica_of(self, primary: ValkeyServer) -> ValkeyServer:
        return self.sentinel.replicas[0]

    def rejoin(self, server: ValkeyServer) -> None:
        self.sentinel.rejoin(server)

    async def _blind(self, rng: random.Random) -> None:
        one: ValkeyServer = rng.choice(self.sentinel.sentinels)
        one.kill()
        await asyncio.sleep(rng.uniform(0.2, 2.0))
        await asyncio.to_thread(one.start)
        await self.whole()

    async def _outdate(self, rng: random.Random) -> None:
        """Two Sentinels stand still while the third arranges a failover; then they name the old primary for a while."""
        old, began = self.sentinel.primary, time.monotonic()
        _, *asleep = rng.sample(self.sentinel.sentinels, 3)
        for one in asleep:
            one.freeze()
        try:
            await asyncio.to_thread(self.sentinel.failover)
        finally:
            for one in asleep:
                one.thaw()
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        await self._over(old, began)


GROUNDS: Final[dict[StoreKind, type[Ground]]] = {
    "sqlite": SQLiteGround,
    "valkey": ValkeyGround,
    "postgres": PostgresGround,
    "valkey-cluster": ClusterGround,
    "valkey-sentinel": SentinelGround,
}
