"""What a million sessions cost: three nodes on a Valkey, and on a Cluster of three primaries.

    python -m bench.million [--few 100000] [--many 1000000] [--only valkey] [--only valkey-cluster]

A client opens a session on a store in memory, which tells what is written for it. The same is then written to the
measured store for each session. What a request costs is measured twice, among few sessions and among many.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import redis

from bench import guard, opponents
from bench.load import Load, runner
from bench.opponents import OPPONENTS
from bench.stage import Stage
from nonstick.core.names import session_key
from nonstick.store import Store
from nonstick.stores import open_store
from nonstick.stores.memory import MemoryStore
from nonstick.testing import ValkeyCluster, ValkeyServer

__all__ = ["FEW", "MANY", "STORES", "run", "steps"]

STORES: Final = ("valkey", "valkey-cluster")
FEW: Final = 100_000
MANY: Final = 1_000_000
LIFETIME: Final = 7200.0
"""Seconds: no record ends while this runs."""
COUNTED: Final = {"all": opponents.MANY}
"""As the nodes count their sessions for `max_sessions`, which takes room in the store too."""
STEP: Final = 50_000
AT_ONCE: Final = 256
CONNECTIONS: Final = 8
REQUESTS: Final = 2000

Tell = Callable[[str], None]


@contextmanager
def _opened(kind: str) -> Iterator[tuple[str, list[redis.Redis]]]:
    """Its URL, and a client of each of its primaries."""
    with ExitStack() as stack:
        if kind == "valkey":
            server = stack.enter_context(ValkeyServer())
            url, urls = server.url, [server.url]
        else:
            cluster = stack.enter_context(ValkeyCluster(primaries=3))
            url, urls = cluster.url, [primary.url for primary in cluster.nodes]
        clients = [redis.Redis.from_url(one) for one in urls]
        for client in clients:
            stack.callback(client.close)
        yield url, clients


class _Watched(MemoryStore):
    """Remembers what a record was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, Mapping[str, bytes]] = {}

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        self.made[key] = dict(fields)
        await super().create(key, fields, lifetime=lifetime, limits=limits)


@dataclass(frozen=True)
class _Opening:
    """What is written for a session: by `initialize`, in this order, and by `notifications/initialized`.

    The order, and that there are two steps, decide how much room Valkey takes for the record.
    """

    fields: Mapping[str, bytes]
    changes: Mapping[str, bytes | None]

    @classmethod
    async def seen(cls) -> _Opening:
        """As a client opens it."""
        store = _Watched()
        async with guard.nodes(store=store) as [node]:
            key = session_key(await node.open())
            fields, after = store.made[key], (await store.load(key)).fields
        changes: dict[str, bytes | None] = dict.fromkeys(fields.keys() - after.keys())
        return cls(fields, changes | {name: value for name, value in after.items() if fields.get(name) != value})

    async def write(self, store: Store) -> None:
        """The same for another session."""
        key = session_key(secrets.token_hex(16))
        await store.create(key, self.fields, lifetime=LIFETIME, limits=COUNTED)
        await store.update(key, self.changes, lifetime=LIFETIME)


async def measure(kind: str, few: int, many: int, tell: Tell) -> dict[str, Any]:
    """Of one kind of store: the cost of a request among so many sessions, and what the sessions take."""
    with _opened(kind) as (url, primaries), tempfile.TemporaryDirectory(prefix="nonstick-bench-") as home:
        opponent = replace(OPPONENTS["nonstick valkey, 3 nodes"], name=f"nonstick {kind}, 3 nodes")
        stage = Stage(opponent, url, Path(home), "")
        try:
            await stage.start()
            found, opening = [], await _Opening.seen()
            # What is only needed once is there before the memory counts.
            await _cost(stage, primaries)
            empty = _used(primaries)
            empty_data = _used(primaries, "used_memory_dataset")
            async with open_store(url) as store:
                there = 0
                for sessions in (few, many):
                    await _fill(store, opening, there, sessions, lambda what: tell(f"{kind}: {what}"))
                    there = sessions
                    if (kept := _keys(primaries)) < sessions:
                        raise RuntimeError(f"the store has {kept:,} keys for {sessions:,} sessions")
                    tell(f"{kind}: echo among {sessions:,} sessions")
                    found.append(
                        {
                            "sessions": sessions,
                            "store_bytes_per_session": (_used(primaries) - empty) / sessions,
                            "store_data_bytes_per_session": (
                                (_used(primaries, "used_memory_dataset") - empty_data) / sessions
                            ),
                            "node_bytes": stage.memory(),
                            **await _cost(stage, primaries),
                            **await _counted(url),
                        }
                    )
        finally:
            stage.stop()
    return {"store": kind, "among": found}


async def _fill(store: Store, opening: _Opening, there: int, sessions: int, tell: Tell) -> None:
    """Further records, until there are so many."""
    due = iter(range(there, sessions))

    async def write() -> None:
        for number in due:
            if number % STEP == 0:
                tell(f"{number:,} of {sessions:,} sessions")
            await opening.write(store)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(write())


async def _cost(stage: Stage, primaries: Sequence[redis.Redis]) -> dict[str, float]:
    """Of an echo: the nodes' CPU in microseconds, and store round trips, leases included."""
    load = Load(stage.ports, "sessions", CONNECTIONS)
    await load.open()
    await load.run(REQUESTS // 2, "echo", {"text": "hello"})
    before, cpu = _scripts(primaries), stage.cpu()
    took = await load.run(REQUESTS, "echo", {"text": "hello"})
    used, trips = stage.cpu() - cpu, _scripts(primaries) - before
    load.close()
    return {"cpu_us": used / len(took) * 1e6, "round_trips": trips / len(took)}


async def _counted(url: str) -> dict[str, int]:
    """Of an echo on a node in this process, on the same store: functions called, instructions, calls of the store."""
    async with guard.nodes(store=open_store(url), lease=600.0) as [node]:
        figure = await node.count(guard.ECHO, await node.open())
    return {"calls": figure.calls, "instructions": figure.instructions, "trips": sum(figure.trips.values())}


def _used(primaries: Sequence[redis.Redis], what: str = "used_memory") -> int:
    """Bytes that all primaries have allocated: the data, and the tables that find it."""
    return sum(int(_info(client, "memory")[what]) for client in primaries)


def _keys(primaries: Sequence[redis.Redis]) -> int:
    found: list[Any] = [client.dbsize() for client in primaries]
    return sum(found)


def _scripts(primaries: Sequence[redis.Redis]) -> int:
    """That all primaries have run: each is a round trip."""
    return sum(int(_info(client, "commandstats").get("cmdstat_evalsha", {}).get("calls", 0)) for client in primaries)


def _info(client: redis.Redis, section: str) -> dict[str, Any]:
    found: Any = client.info(section)
    return dict(found)


async def run(few: int, many: int, tell: Tell, stores: Sequence[str] = STORES) -> list[dict[str, Any]]:
    """Each kind of store, one after the other."""
    return [await measure(kind, few, many, tell) for kind in stores]


def steps(few: int, many: int, stores: Sequence[str] = STORES) -> int:
    """How often a run says how far it is."""
    return len(stores) * (2 + len(range(0, few, STEP)) + len([n for n in range(few, many) if n % STEP == 0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=FEW, help="sessions at the first measurement")
    parser.add_argument("--many", type=int, default=MANY, help="sessions at the second")
    parser.add_argument("--only", action="append", choices=STORES, help="this kind of store")
    options = parser.parse_args()
    work: Coroutine[Any, Any, Any] = run(
        options.few, options.many, lambda what: print(what, file=sys.stderr), options.only or STORES
    )
    with runner() as loop:
        print(json.dumps(loop.run(work), indent=2))


if __name__ == "__main__":
    main()
