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
from nonstick.testing.oracle import Lost, Violation
from tests.faults.forgers import Intruder, repeat_wakes
from tests.faults.pairs import Pair, PostgresPair, ValkeyPair

__all__ = ["GROUNDS", "Ground", "StoreKind"]

StoreKind = Literal["sqlite", "valkey", "postgres", "valkey-cluster", "valkey-sentinel"]

Deed = Callable[[random.Random], Awaitable[None]]

SLACK: Final = 1.0
"""Seconds within which a write, once it is acknowledged, has reached a healthy replica, on a busy machine."""

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

    def __init__(self, home: Path, lost: Callable[[Lost], None]) -> None:
        self.home = home
        self.lost = lost
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
        return proxy.url

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


class ClusterGround(Ground):
    """Three primaries with a replica each. Nodes talk to all of them, so there is no network to harm."""

    async def begin(self) -> None:
        self.cluster = await asyncio.to_thread(ValkeyCluster("--appendonly", "yes", replicas=1).__enter__)
        self.stack.push(self.cluster)

    async def way(self, node: str) -> str:
        return self.cluster.url

    def deeds(self) -> dict[str, Deed]:
        return {
            "slots migrated": self._migrate,
            "failover by arrangement": self._fail_over,
            "primary frozen": self._freeze,
        }

    def losses(self) -> dict[str, Deed]:
        return {"primary killed": self._kill}

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

    async def _kill(self, rng: random.Random) -> None:
        slot = rng.randrange(16384)
        primary = self.cluster.primary(slot)
        began = time.monotonic()
        primary.kill()
        await asyncio.to_thread(self.cluster.wait_for_successor, slot, primary)
        self.lost(Lost(began, began - SLACK, time.monotonic()))
        primary.start()
        await asyncio.to_thread(self.cluster.wait_until_ok)

    async def _fail_over(self, rng: random.Random) -> None:
        await asyncio.to_thread(self.cluster.failover, rng.randrange(16384))
        await asyncio.to_thread(self.cluster.wait_until_ok)

    async def _freeze(self, rng: random.Random) -> None:
        """For less than what makes a replica take over."""
        primary = self.cluster.primary(rng.randrange(16384))
        primary.freeze()
        await asyncio.sleep(rng.uniform(0.1, 0.5))
        primary.thaw()


class SentinelGround(Ground):
    """A primary, a replica and three Sentinels."""

    async def begin(self) -> None:
        # A primary that came back empty before the Sentinels know better would empty the others.
        self.sentinel = await asyncio.to_thread(ValkeySentinel("--appendonly", "yes").__enter__)
        self.stack.push(self.sentinel)

    async def way(self, node: str) -> str:
        return self.sentinel.url

    def deeds(self) -> dict[str, Deed]:
        return {"primary frozen": self._freeze, "sentinel killed": self._blind}

    def losses(self) -> dict[str, Deed]:
        return {"primary killed": self._kill}

    async def _kill(self, rng: random.Random) -> None:
        primary = self.sentinel.primary
        began = time.monotonic()
        primary.kill()
        await asyncio.to_thread(self.sentinel.wait_for_successor, primary)
        self.lost(Lost(began, began - SLACK, time.monotonic()))
        primary.start()
        await asyncio.to_thread(self.sentinel.rejoin, primary)

    async def _freeze(self, rng: random.Random) -> None:
        primary = self.sentinel.primary
        primary.freeze()
        await asyncio.sleep(rng.uniform(0.1, 0.5))
        primary.thaw()

    async def _blind(self, rng: random.Random) -> None:
        one: ValkeyServer = rng.choice(self.sentinel.sentinels)
        one.kill()
        await asyncio.sleep(rng.uniform(0.2, 2.0))
        one.start()


GROUNDS: Final[dict[StoreKind, type[Ground]]] = {
    "sqlite": SQLiteGround,
    "valkey": ValkeyGround,
    "postgres": PostgresGround,
    "valkey-cluster": ClusterGround,
    "valkey-sentinel": SentinelGround,
}
