"""A store with no room: writes get 503 or wait, reads go on, and nothing is half written (P9)."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx2
import pytest
import redis

from nonstick.testing import PostgresServer, ValkeyServer
from tests.cluster.servers import opening, request
from tests.cluster.sse import getting, posting
from tests.cluster.stage import call, eventually, say, staged, text_of, texts_of
from tests.faults.client import HEADERS, Patience
from tests.faults.places import Place, assert_unavailable, counting, repeated, step, steps, up_to
from tests.faults.stage import Stage

if sys.platform == "linux":
    import resource
import time

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux changes the limits of another process"),
]


@contextmanager
def files_at_most(size: int, *pids: int) -> Iterator[None]:
    """No file of these processes grows beyond this size: to them the disk is full."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
            except ProcessLookupError:
                pass


@contextmanager
def full_memory(server: ValkeyServer) -> Iterator[None]:
    """`maxmemory` is reached, and nothing is evicted."""
    with redis.Redis(port=server.port, protocol=2) as admin:
        admin.config_set("maxmemory", "1")
        try:
            yield
        finally:
            admin.config_set("maxmemory", "0")


@contextmanager
def full_disk(server: ValkeyServer) -> Iterator[None]:
    """The append-only file cannot grow."""
    home = Path(f"/proc/{server.pid}/cwd").resolve()
    sizes = [path.stat().st_size for path in home.glob("appendonlydir/*.incr.aof")]
    with files_at_most(max(sizes), server.pid), redis.Redis(port=server.port, protocol=2) as admin:
        with pytest.raises(redis.ResponseError):
            # Executed, and then it cannot be saved; found out later where the disk is busy.
            for _ in range(3000):
                admin.set("filler", "x", px=1)
                time.sleep(0.01)
        yield


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("place", ["valkey"], indirect=True)
@pytest.mark.parametrize("full", [full_memory, full_disk])
async def test_full_server_lets_streams_wait(place: Place, full: Any) -> None:
    """P9: a request that writes nothing is served; an event is sent once it is stored, in its order."""
    assert isinstance(place.server, ValkeyServer)
    async with staged(place.make, window=0.1) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(a, session, steps(3)) as stream:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            seen = stream.last_id
            with full(place.server):
                assert_unavailable(await b.post(opening()))
                assert (await b.post(request("ping", id="p"), session)).status_code == 200
                step(stage, 2)
                async with getting(c, session, seen) as resumed:
                    assert (await b.post(request("ping", id="p"), session)).status_code == 200
                    assert (stream.waiting, resumed.waiting) == (False, False)
            step(stage, 3)
            stage.open("end")
            assert texts_of(await stream.rest()) == up_to(3, 2)
        async with getting(c, session, seen) as resumed:
            assert texts_of(await resumed.rest()) == up_to(3, 2)
        await repeated(lambda: b.post(opening()), until=200, allowed=[503])


# ---- PostgreSQL


ROOM = 17 * 1024 * 1024
"""Bytes: more than a segment of the write-ahead log, whose own failure would be a crash of the server."""


@pytest.fixture
def cramped() -> Iterator[PostgresServer]:
    """None of its files grows beyond `ROOM`: its processes inherit that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    server = PostgresServer()
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, limits[1]))
    try:
        server.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    yield server
    server.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
async def test_full_table_holds_its_writers_up(cramped: PostgresServer) -> None:
    """P9: what was sent while the disk was full comes, in its order, once there is room."""
    place = Place("postgres", cramped)
    async with staged(place.make, window=0.1) as (stage, a, b, c):

        @stage.tool
        async def talk(ctx: Any, args: dict[str, Any]) -> str:
            for number in range(1, 21):
                # Twenty of these need more room than the last pages have.
                await say(ctx, f"{number} {os.urandom(900).hex()}")
                await stage.door("full")
            return "done"

        session = await a.open()
        async with posting(a, session, call("talk")) as stream:
            found = [text_of(await stream.message())]
            seen = stream.last_id
            admin = await asyncpg.connect(cramped.url)
            await _fill(admin, place.name)
            before = cramped.log.count("could not extend")
            stage.open("full")
            await eventually(lambda: cramped.log.count("could not extend") > before)
            assert (await b.post(request("ping", id="p"), session)).status_code == 200
            await admin.execute(f'DELETE FROM "{place.name}".event WHERE session = -1')
            await admin.execute(f'VACUUM "{place.name}".event')
            admin.terminate()
            found += texts_of(await stream.rest())
        assert [one.split()[0] for one in found] == [*map(str, range(1, 21)), "done"]
        async with getting(c, session, seen) as resumed:
            assert texts_of(await resumed.rest()) == found[1:]


async def _fill(connection: asyncpg.Connection[Any], schema: str) -> None:
    """Rows of a session that there is not, until there is no room for even one more."""
    start = 0
    for batch in (500, 20, 1):
        with pytest.raises(asyncpg.PostgresError, match="could not extend"):
            while True:
                await connection.execute(
                    f"INSERT INTO \"{schema}\".event SELECT -1, n, '', 0, decode(repeat(md5(n::text), 60), 'hex') "
                    "FROM generate_series($1::bigint, $1::bigint + $2 - 1) n",
                    start,
                    batch,
                )
                start += batch


# ---- SQLite


PAGE = 4096
"""Bytes: no page fits into the write-ahead log, which would begin anew where its limit were its size."""


@pytest.mark.slow
async def test_full_sqlite_disk_is_503(tmp_path: Path) -> None:
    """P9: on real nodes, whose files have a limit."""
    async with Stage(f"sqlite:///{tmp_path}/sessions.db", tmp_path) as stage, httpx2.AsyncClient(timeout=60) as http:
        a, b = await stage.start(2)
        client = stage.client(nodes=[a, b], patience=Patience(idle=5.0, call=60.0))
        await client.open()
        call = client.call("count", on=a, steps=30, pause=0.05)
        await client.has(f"{call.label}:1:3", call)
        with files_at_most(PAGE, a.pid, b.pid):
            opened = asyncio.gather(*(http.post(node.url, json=opening(), headers=HEADERS) for node in (a, b)))
            pinged = asyncio.gather(*(client.ping(node) for node in (a, b)))
            for answer in await opened:
                assert_unavailable(answer)
            # Whether one can read depends on whether a connection is open still. But never 404.
            assert set(await pinged) <= {200, 503}
            assert call.terminal is None
        terminal = await call.end()
        assert terminal is not None
        assert "result" in terminal
        await client.replay(call, on=b)
        for node in (a, b):
            assert (await http.post(node.url, json=opening(), headers=HEADERS)).status_code == 200
        assert stage.judge(outages=True) == []
