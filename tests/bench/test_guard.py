"""What a request costs, in figures that noise does not touch, is what was committed, and does not grow."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis.asyncio
import redis.asyncio.client

from bench import guard
from nonstick.stores.memory import MemoryStore
from nonstick.stores.redis import RedisStore
from nonstick.testing import ValkeyServer

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.10
"""Of the number of calls: versions of Python and of the libraries differ by less."""
FLAT = 0.03
"""Of the number of instructions: ids of other lengths and the like."""
HOW = "If that is meant, say why in the commit and run: python -m bench.guard --commit"


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
async def client(valkey: ValkeyServer) -> AsyncIterator[redis.asyncio.client.Redis]:
    client = redis.asyncio.Redis.from_url(valkey.url)
    yield client
    await client.aclose()


async def figures_of_a_process_of_its_own() -> dict[str, guard.Figures]:
    """What other tests leave in theirs, a provider of traces say, costs calls."""
    counted = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.guard", "--json"), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    told, _ = await counted.communicate()
    assert counted.returncode == 0
    return {name: guard.Figures(**figure) for name, figure in json.loads(told).items()}


async def test_requests_cost_no_more_than_committed() -> None:
    """Store round trips exactly; functions called up to a tenth more; nothing for the garbage collector."""
    committed, found = guard.committed(), await figures_of_a_process_of_its_own()
    assert found.keys() == committed.keys(), f"other requests are counted than were committed. {HOW}"
    worse = [
        f"{name}: store round trips {figure.trips}, committed {committed[name]['trips']}"
        for name, figure in found.items()
        if figure.trips != committed[name]["trips"]
    ] + [
        f"{name}: {figure.calls} functions called, committed {committed[name]['calls']}"
        for name, figure in found.items()
        if figure.calls > committed[name]["calls"] * (1 + TOLERANCE)
    ]
    worse += [
        f"{name}: {figure.garbage} objects are left in cycles" for name, figure in found.items() if figure.garbage
    ]
    assert not worse, "\n".join([*worse, HOW])


def test_committed_round_trips_keep_their_budgets() -> None:
    """One for an ordinary request, which writes nothing; none for a malformed id; one append for each message."""
    trips = {name: kept["trips"] for name, kept in guard.committed().items()}
    assert trips["echo"] == {"load": 1}
    assert trips["malformed session id"] == {}
    assert trips["initialize"] == {"create": 1}
    assert trips['echo, answer="sse"'] == {"load": 1, "append": 2}
    assert trips["10 notifications"]["append"] <= 12


@pytest.mark.parametrize("sessions", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_many_sessions_add_no_request_cost(sessions: int) -> None:
    """An idle session costs a node nothing (P10)."""
    store = MemoryStore()
    async with guard.nodes(store=store) as [node]:
        session = await node.open()
        alone = await node.count(guard.ECHO, session)
        await guard.fill(store, session, sessions)
        _is_flat(alone, await node.count(guard.ECHO, session))


async def test_many_nodes_add_no_request_cost() -> None:
    async with guard.nodes() as [node]:
        alone = await node.count(guard.ECHO, await node.open())
    async with guard.nodes(8) as callers:
        session = await callers[0].open()
        for caller in callers[1:]:
            await caller.post(guard.ECHO, session)
        _is_flat(alone, await callers[-1].count(guard.ECHO, session))


def _is_flat(alone: guard.Figures, among_many: guard.Figures) -> None:
    assert among_many.trips == alone.trips
    assert among_many.instructions <= alone.instructions * (1 + FLAT)


async def test_ordinary_request_is_one_valkey_read(valkey: ValkeyServer, client: redis.asyncio.client.Redis) -> None:
    """One command, which writes nothing."""
    requests = 20
    seen: set[tuple[int, int]] = set()
    async with guard.nodes(store=RedisStore(valkey.url, prefix="ordinary"), lease=600.0) as [node]:
        session = await node.open()
        # Three times: the node's lease and its upkeep may come in between, once.
        for _ in range(3):
            before, written = await _scripts(client), await _writes(client)
            for _ in range(requests):
                status, _, _ = await node.post(guard.ECHO, session)
                assert status == 200
            seen.add((await _scripts(client) - before, await _writes(client) - written))
    assert min(seen) == (requests, 0), seen


async def test_used_session_is_seldom_touched(valkey: ValkeyServer, client: redis.asyncio.client.Redis) -> None:
    """Once in a tenth of its expiry, on Valkey."""
    lifetime, rounds = 2.0, 3
    async with guard.nodes(
        store=RedisStore(valkey.url, prefix="touched"), lease=600.0, unconfirmed_lifetime=None, lifetime=lifetime
    ) as [node]:
        session = await node.open()
        begun, requests, before = time.monotonic(), 0, await _hsets(client)
        while time.monotonic() - begun < rounds * lifetime / 10:
            status, _, _ = await node.post(guard.ECHO, session)
            assert status == 200
            requests += 1
        took = time.monotonic() - begun
        # The node itself touches the cluster's record each fifth.
        allowed = took / (lifetime / 10) + took / (lifetime / 5) + 1
        touches = await _hsets(client) - before
        assert 1 <= touches <= allowed
        assert requests > 2 * allowed, "the machine was too slow to tell"


async def _scripts(client: redis.asyncio.client.Redis) -> int:
    return await _calls(client, "evalsha")


async def _hsets(client: redis.asyncio.client.Redis) -> int:
    return await _calls(client, "hset")


async def _calls(client: redis.asyncio.client.Redis, command: str) -> int:
    found = await client.info("commandstats")
    return int(found.get(f"cmdstat_{command}", {}).get("calls", 0))


async def _writes(client: redis.asyncio.client.Redis) -> int:
    return int((await client.info("persistence"))["rdb_changes_since_last_save"])
