"""Valkey Cluster and Sentinel: slots move and primaries die while sessions stream (P9)."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import pytest

from nonstick.core.names import session_key
from nonstick.stores import open_store
from nonstick.testing import ValkeyCluster, ValkeySentinel
from tests.cluster.servers import request as asking
from tests.cluster.sse import getting, posting
from tests.cluster.stage import staged, text_of, texts_of
from tests.faults.places import counting, repeated, step, steps, up_to

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster("--appendonly", "yes", replicas=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def sentinel() -> Iterator[ValkeySentinel]:
    with ValkeySentinel("--appendonly", "yes") as sentinel:
        yield sentinel


def url(servers: ValkeyCluster | ValkeySentinel) -> str:
    return f"{servers.url}?prefix=faults-{secrets.token_hex(6)}"


async def test_moved_slot_is_not_noticed(cluster: ValkeyCluster) -> None:
    """P3, P9: there and back, while events are appended and read."""
    place = url(cluster)
    async with staged(lambda: open_store(place), window=0.1) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        slot = cluster.slot(f"{{{session_key(session.id)}}}")
        home = cluster.primary(slot)
        away = next(one for one in map(cluster.primary, (0, 8000, 16000)) if one is not home)
        async with posting(a, session, steps(4)) as stream:
            step(stage, 1)
            first = await stream.message()
            seen = stream.last_id
            async with getting(b, session, seen) as resumed:
                await asyncio.to_thread(cluster.migrate_slot, slot, away)
                step(stage, 2)
                await asyncio.to_thread(cluster.migrate_slot, slot, home)
                step(stage, 3, 4)
                stage.open("end")
                assert texts_of([first, *await stream.rest()]) == up_to(4)
                assert texts_of(await resumed.rest()) == up_to(4, 2)
        assert (await c.post(asking("ping"), session)).status_code == 200


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
async def test_killed_primary_is_503_until_replaced(kind: str, request: pytest.FixtureRequest) -> None:
    """P9: replication is asynchronous, so the stream is whole or its client is told; the session is not 404."""
    servers: ValkeyCluster | ValkeySentinel = request.getfixturevalue(kind)
    place = url(servers)
    async with staged(lambda: open_store(place), window=0.1) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        slot = f"{{{session_key(session.id)}}}"
        primary = servers.primary(slot) if isinstance(servers, ValkeyCluster) else servers.primary
        async with posting(a, session, steps(3)) as stream:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            seen = stream.last_id
            await asyncio.to_thread(servers.wait_until_ok)
            primary.kill()
            step(stage, 2)
            assert (await b.post(asking("ping", id="p"), session)).status_code == 503
            if isinstance(servers, ValkeyCluster):
                await asyncio.to_thread(servers.wait_for_successor, slot, primary)
            else:
                await asyncio.to_thread(servers.wait_for_successor, primary)
            await repeated(lambda: b.post(asking("ping", id="p"), session), until=200, allowed=[503])
            step(stage, 3)
            stage.open("end")
            rest = await stream.rest()
        whole = texts_of(rest) == up_to(3, 2)
        assert whole or rest[-1]["error"]["data"]["reason"] == "stream_lost"
        async with getting(c, session, seen) as resumed:
            (*_, end) = again = await resumed.rest()
            assert texts_of(again) == up_to(3, 2) if whole else end["error"]["data"]["reason"] == "stream_lost"
    primary.start()
    if isinstance(servers, ValkeySentinel):
        await asyncio.to_thread(servers.rejoin, primary)
    await asyncio.to_thread(servers.wait_until_ok)
