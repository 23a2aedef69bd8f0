"""What can happen to a file: somebody holds its lock and stands still, or it is not the file that it was (P9)."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from nonstick.stores.sqlite import SQLiteStore
from tests.cluster.servers import opening, request
from tests.cluster.sse import getting, posting
from tests.cluster.stage import staged, text_of, texts_of
from tests.faults.places import assert_unavailable, counting, repeated, step, steps, up_to

pytestmark = pytest.mark.anyio

WRITER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
"""


@asynccontextmanager
async def frozen_writer(path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process that holds the write lock and is stopped."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-ISc", WRITER, str(path), stdin=pipe, stdout=pipe)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"locked\n"
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL], ids=["thawed", "killed"])
async def test_frozen_writer_makes_writes_503(tmp_path: Path, end: signal.Signals) -> None:
    """P9: reads go on; a stream goes on, whole, once the lock is free."""
    path = tmp_path / "sessions.db"
    async with staged(lambda: SQLiteStore(path), window=0.1) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(a, session, steps(3)) as stream:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            seen = stream.last_id
            async with frozen_writer(path) as writer:
                step(stage, 2)
                assert_unavailable(await b.post(opening()))
                assert (await b.post(request("ping", id="p"), session)).status_code == 200
                async with getting(c, session, seen) as resumed:
                    assert (await c.post(request("ping", id="q"), session)).status_code == 200
                    assert (stream.waiting, resumed.waiting) == (False, False)
                writer.send_signal(end)
                if writer.stdin is not None and end == signal.SIGCONT:
                    writer.stdin.write(b"\n")
                await writer.wait()
            step(stage, 3)
            stage.open("end")
            assert texts_of(await stream.rest()) == up_to(3, 2)
        async with getting(c, session, seen) as resumed:
            assert texts_of(await resumed.rest()) == up_to(3, 2)
        await repeated(lambda: b.post(opening()), until=200, allowed=[503])


def remove(path: Path) -> None:
    """With all that belongs to it."""
    for left in path.parent.glob(f"{path.name}*"):
        left.unlink()


async def test_node_without_its_file_says_404(tmp_path: Path) -> None:
    """P9: 404, after which a client opens another one."""
    path = tmp_path / "sessions.db"
    async with staged(lambda: SQLiteStore(path)) as (_, a, _b, _c):
        session = await a.open()
    remove(path)
    async with staged(lambda: SQLiteStore(path)) as (_, a, b, c):
        for member in (a, b, c):
            assert (await member.post(request("ping"), session)).status_code == 404
        assert (await b.open()).id


async def test_restored_backup_is_reported(tmp_path: Path) -> None:
    """P9: a place after the backup is lost; what the backup knows of goes on, and a session after it is 404."""
    path, backup = tmp_path / "sessions.db", tmp_path / "backup.db"
    async with staged(lambda: SQLiteStore(path), window=0.1, lease=1.0) as (stage, a, b, _c):
        counting(stage)
        session = await a.open()
        async with posting(a, session, steps(2)) as stream:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            kept = stream.last_id
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as target:
                source.backup(target)
            step(stage, 2)
            assert text_of(await stream.message()) == "2"
            lost = stream.last_id
            stage.open("end")
            assert texts_of(await stream.rest()) == ["done"]
        young = await b.open()
    remove(path)
    backup.rename(path)
    async with staged(lambda: SQLiteStore(path), window=0.1, lease=1.0) as (stage, a, b, c):
        assert (await a.post(request("ping"), session)).status_code == 200
        assert (await a.post(request("ping"), young)).status_code == 404
        async with getting(b, session, lost) as resumed:
            (end,) = await resumed.rest()
            assert end["error"]["data"]["reason"] == "stream_lost"
        async with getting(c, session, kept) as resumed:
            (end,) = await resumed.rest()
            assert end["error"]["data"]["reason"] == "node_lost"
