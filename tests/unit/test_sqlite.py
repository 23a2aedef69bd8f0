"""What is particular to the SQLite store; what every store promises is in the contract."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nonstick.errors import AlreadyExists, ConfigurationError, SessionNotFound, StoreUnavailable, TooManySessions
from nonstick.store import MAX_READ, NEW_STREAM, Batch, Cursor, Draft, Event, Loaded, News
from nonstick.stores.sqlite import SQLiteStore
from nonstick.stores.sqlite import file as sqlite_file
from nonstick.stores.sqlite.file import DatabaseFile, checkpoints_race, network_filesystem
from nonstick.stores.sqlite.keeper import CHECKPOINT_BYTES, Keeper
from nonstick.testing.contract.tools import drafts, read_all
from tests.pace import unhurried

pytestmark = pytest.mark.anyio

TAG = b"tag tag "


class Clock:
    """The store's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(path: Path, clock: Clock) -> AsyncIterator[SQLiteStore]:
    async with SQLiteStore(path, clock=clock) as store:
        yield store


@contextlib.contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of somebody else's."""
    db = sqlite3.connect(path, isolation_level=None)
    try:
        yield db
    finally:
        db.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Somebody else holds the write lock."""
    with connected(path) as db:
        db.execute("BEGIN IMMEDIATE")
        yield db


@pytest.fixture
def keeper(path: Path, clock: Clock) -> Iterator[Keeper]:
    """Another process's keeper, which does its work when the test says so."""
    keeper = Keeper(DatabaseFile(path, clock))
    yield keeper
    keeper.retire()


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while True:
            held = condition()
            if held if isinstance(held, bool) else await held:
                return
            await asyncio.sleep(0.002)


def event(data: bytes = b"data") -> Batch:
    return Batch([Draft(TAG, data)])


def rows(path: Path) -> dict[str, int]:
    """How many rows each of the tables has that has any; `meta` always has one."""
    with connected(path) as db:
        tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        names = {name for (name,) in tables} - {"meta", "sqlite_sequence"}
        assert "event" in names
        counts = {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names}
    return {name: count for name, count in counts.items() if count}


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def wal_size(path: Path) -> int:
    return path.with_name(path.name + "-wal").stat().st_size


# ---- who may read it


def modes(path: Path) -> dict[str, str]:
    """Of the file and all that is beside it."""
    return {one.name: oct(one.stat().st_mode & 0o777) for one in path.parent.iterdir()}


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


PRIVATE = {"sessions.db": "0o600", "sessions.db-shm": "0o600", "sessions.db-wal": "0o600"}


@pytest.mark.usefixtures("open_umask")
async def test_files_are_for_this_user_only(path: Path) -> None:
    """P13: whatever the umask is, no other user of the machine reads what clients sent."""
    async with SQLiteStore(path) as store:
        await store.create("key", {"x": b"1"}, lifetime=60)
        assert modes(path) == PRIVATE
    assert modes(path) == {"sessions.db": "0o600"}


@pytest.mark.usefixtures("open_umask")
async def test_readable_file_is_closed_to_others(path: Path) -> None:
    """P13: one that an earlier release made, and its companions that a process of that has open."""
    async with SQLiteStore(path) as store:
        await store.create("key", {"x": b"1"}, lifetime=60)
        for name in PRIVATE:
            path.with_name(name).chmod(0o644)
        async with SQLiteStore(path) as other:
            assert (await other.load("key")).fields == {"x": b"1"}
            assert modes(path) == PRIVATE


async def test_foreign_files_mode_is_kept(path: Path) -> None:
    with connected(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    path.chmod(0o644)  # noqa: ASYNC240
    with pytest.raises(ConfigurationError, match="another application"):
        async with SQLiteStore(path):
            pass
    assert modes(path) == {"sessions.db": "0o644"}


# ---- several processes

APPENDER = """
import asyncio, sys
from nonstick.errors import AlreadyExists
from nonstick.store import Batch, Draft
from nonstick.stores.sqlite import SQLiteStore

async def main(path, name, count):
    async with SQLiteStore(path) as store:
        try:
            await store.create("key", {}, lifetime=600)
        except AlreadyExists:
            pass
        print("ready", flush=True)
        sys.stdin.readline()
        for n in range(1, count + 1):
            batch = Batch([Draft(b"8 bytes.", name.encode())], writer=name, sequence=n)
            print((await store.append("key", batch)).first, flush=True)
        sys.stdin.readline()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@contextlib.asynccontextmanager
async def appender(path: Path, name: str, count: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that appends `count` events once it gets a line, prints their positions, and waits for another line."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", APPENDER, str(path), name, str(count), stdin=pipe, stdout=pipe
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()


def proceed(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")


async def test_racing_processes_leave_no_gaps(path: Path) -> None:
    """Four create the schema and the session at the same time, then append to one log (P1, P3)."""
    count, names = 50, ("a", "b", "c", "d")
    async with contextlib.AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(appender(path, name, count)) for name in names]
        assert await asyncio.gather(*map(line, processes)) == ["ready"] * 4
        for process in processes:
            proceed(process)
        firsts = {
            name: [int(await line(each)) for _ in range(count)] for name, each in zip(names, processes, strict=True)
        }

        async with SQLiteStore(path) as store:
            events = await store.read("key", Cursor(0), limit=MAX_READ)
    assert [each.position for each in events] == list(range(1, 4 * count + 1))
    assert {name: [each.position for each in events if each.data == name.encode()] for name in names} == firsts


async def test_acknowledged_events_survive_a_kill(path: Path) -> None:
    """What was acknowledged may be on a client's screen (P3)."""
    async with appender(path, "victim", 3) as process:
        assert await line(process) == "ready"
        proceed(process)
        assert [await line(process) for _ in range(3)] == ["1", "2", "3"]
        process.kill()
    async with SQLiteStore(path) as store:
        assert len(await store.read("key", Cursor(0))) == 3


async def test_file_outlives_its_processes(path: Path) -> None:
    """A restart of every node keeps the sessions."""
    async with SQLiteStore(path) as store:
        await store.create("key", {"name": b"value"}, lifetime=600)
        await store.append("key", event())
    async with SQLiteStore(path) as store:
        assert (await store.load("key")).fields == {"name": b"value"}
        assert await store.read("key", Cursor(0)) == [Event(1, TAG, 0, b"data")]


async def test_same_store_can_be_entered_again(path: Path) -> None:
    store = SQLiteStore(path)
    async with store:
        await store.create("key", {}, lifetime=600)
    with pytest.raises(StoreUnavailable):
        await store.load("key")
    async with store:
        await store.load("key")


async def test_unentered_store_opens_nothing(path: Path) -> None:
    """It may be made before a fork: an SQLite connection must not be carried across one."""
    store = SQLiteStore(path)
    store.lease("node").close(release=True)
    assert content(path) is None


# ---- locks


async def test_locked_file_delays_writes_only(store: SQLiteStore, path: Path) -> None:
    """A lock that another process holds must not stop this one (P9)."""
    await store.create("key", {}, lifetime=600)
    with locked(path) as holder:
        append = asyncio.create_task(store.append("key", event()))
        for _ in range(100):
            await asyncio.sleep(0)
            assert (await store.load("key")).head == Cursor(0)
        assert not append.done()
        holder.execute("ROLLBACK")
        assert (await append).first == 1


async def test_repeat_after_lock_is_written_once(store: SQLiteStore, path: Path) -> None:
    """The wait is bounded, and a repeat of the same append learns the outcome (P9)."""
    await store.create("key", {}, lifetime=600)
    batch = Batch([Draft(TAG, b"data")], writer="w", sequence=1)
    with locked(path):
        async with asyncio.timeout(60):
            with pytest.raises(StoreUnavailable, match="locked"):
                await store.append("key", batch)
    assert not (await store.append("key", batch)).duplicate
    assert (await store.append("key", batch)).duplicate
    assert len(await store.read("key", Cursor(0))) == 1


async def test_write_has_its_locks_time(path: Path) -> None:
    """A session that expires while a write waits is gone when the write's turn comes."""
    held: set[bool] = set()
    here = threading.get_ident()

    def clock() -> float:
        if threading.get_ident() == here:
            with connected(path) as other:
                other.execute("PRAGMA busy_timeout = 0")
                try:
                    other.execute("BEGIN IMMEDIATE")
                    held.add(False)
                except sqlite3.OperationalError:
                    held.add(True)
        return 1000.0

    async with SQLiteStore(path, clock=clock) as store:
        await store.create("key", {}, lifetime=600)
        for write in (
            lambda: store.create("other", {}, lifetime=600),
            lambda: store.append("key", event()),
            lambda: store.update("key", {"x": b"1"}),
            lambda: store.trim("key", standalone_before=1),
            lambda: store.delete("key"),
        ):
            held.clear()
            await write()
            assert held == {True}


async def test_cancelled_waiter_disturbs_no_other(store: SQLiteStore, path: Path) -> None:
    await store.create("key", {}, lifetime=600)
    with locked(path) as holder:
        first = asyncio.create_task(store.append("key", event(b"first")))
        second = asyncio.create_task(store.append("key", event(b"second")))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        holder.execute("ROLLBACK")
        appended = await second
    assert (await store.read("key", Cursor(0)))[-1] == Event(appended.first, TAG, 0, b"second")


async def test_delayed_write_wakes_own_watchers(store: SQLiteStore, path: Path) -> None:
    """It was written by another thread's connection; the watchers hear of it all the same."""
    await store.create("key", {}, lifetime=600)
    seen = await watched(store, "key")
    with locked(path) as holder:
        append = asyncio.create_task(store.append("key", event()))
        await asyncio.sleep(0)
        holder.execute("ROLLBACK")
        await append
    await eventually(lambda: seen[:1] == [Event(1, TAG, 0, b"data")])


async def test_lease_waits_in_its_own_thread(store: SQLiteStore, path: Path) -> None:
    """`Lease.renew` blocks its thread, not the loop."""
    lease = store.lease("node")
    with locked(path) as holder:
        renewal = asyncio.create_task(asyncio.to_thread(lease.renew, 10))
        assert await store.lapsed({"node"}) == {"node"}
        holder.execute("ROLLBACK")
        await renewal
    assert await store.lapsed({"node"}) == set()
    with locked(path), pytest.raises(StoreUnavailable):
        await asyncio.to_thread(lease.renew, 10)
    lease.close(release=True)
    assert await store.lapsed({"node"}) == {"node"}


# ---- where it lies and what it is

MOUNTS = """\
21 1 0:20 / / rw,relatime - ext4 /dev/sda1 rw
22 21 0:21 / /srv/my\\040share rw,relatime shared:5 - nfs4 server:/export rw
23 22 0:22 / /srv/my\\040share/local rw - ext4 /dev/sdb1 rw
24 21 0:23 / /mnt rw - ext4 /dev/sdc1 rw
25 24 0:24 / /mnt rw - fuse.sshfs host:/ rw
26 21 0:25 / /ntfs rw - fuseblk /dev/sdd1 rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/sessions.db", None),
        ("/srv/my share/sessions.db", "nfs4"),
        ("/srv/my share/local/sessions.db", None),
        ("/srv/my shares/sessions.db", None),
        ("/mnt/sessions.db", "fuse.sshfs"),
        ("/ntfs/sessions.db", None),
    ],
)
def test_innermost_mount_tells_network_file_system(path: str, kind: str | None) -> None:
    assert network_filesystem(Path(path), MOUNTS) == kind


async def test_network_file_system_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's locks do not work there: better not to start than to corrupt."""
    mounts = path.with_name("mounts")
    mounts.write_text(f"21 1 0:20 / {path.parent} rw - cifs //server/share rw\n")
    monkeypatch.setattr(sqlite_file, "MOUNTS", mounts)
    with pytest.raises(ConfigurationError, match=r"network file system \(cifs\)"):
        async with SQLiteStore(path):
            pass
    assert content(path) is None


async def test_newer_schema_is_refused(path: Path) -> None:
    """An older version must not write into what it does not understand (P12)."""
    async with SQLiteStore(path):
        pass
    with connected(path) as db:
        db.execute("PRAGMA user_version = 1000")
    with pytest.raises(ConfigurationError, match="newer nonstick"):
        async with SQLiteStore(path):
            pass


async def test_foreign_file_is_refused_unchanged(path: Path) -> None:
    with connected(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = content(path)
    with pytest.raises(ConfigurationError, match="another application"):
        async with SQLiteStore(path):
            pass
    assert content(path) == before


@pytest.mark.parametrize("path", ["", ":memory:", "file:x?mode=memory"])
def test_path_without_file_is_refused(path: str) -> None:
    with pytest.raises(ConfigurationError, match="memory:"):
        SQLiteStore(path)


@pytest.fixture
def damaged(path: Path) -> Path:
    path.write_bytes(b"this is no database, but as long as one" * 100)
    return path


async def test_damaged_file_is_unavailable_and_logged(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with SQLiteStore(damaged) as store:
        with pytest.raises(StoreUnavailable, match="damaged, or no SQLite database"):
            await store.load("key")
    assert any(record.levelno == logging.ERROR and "damaged" in record.message for record in caplog.records)


async def test_missing_directory_is_named(tmp_path: Path) -> None:
    """Entering does not fail, the calls do, and recovery needs no restart (P9)."""
    path = tmp_path / "later" / "sessions.db"
    async with SQLiteStore(path) as store:
        with pytest.raises(StoreUnavailable, match="the directory of the store's file does not exist"):
            await store.ping()
        path.parent.mkdir()
        await store.ping()
        await store.create("key", {}, lifetime=600)


async def test_watch_begun_in_trouble_reads_later(tmp_path: Path) -> None:
    """`wake(None)` comes after every interruption, so that no window remains (P3)."""
    path = tmp_path / "later" / "sessions.db"
    async with SQLiteStore(path) as store:
        wakes: list[object] = []
        stop = store.watch("key", wakes.append)
        with pytest.raises(StoreUnavailable):
            await store.ping()
        assert not wakes
        path.parent.mkdir()
        await eventually(lambda: wakes == [None])
        stop()


# ---- what is over


async def fill(store: SQLiteStore, key: str, *, lifetime: float) -> None:
    """A session with a row in every table."""
    await store.create(key, {"name": b"value"}, lifetime=lifetime, limits={"group": 10})
    await store.append(
        key, Batch([Draft(TAG, b"x")], writer="w", sequence=1, stream=NEW_STREAM, expect=["q"], cancel="c")
    )


async def test_expired_session_leaves_no_rows(store: SQLiteStore, path: Path, clock: Clock, keeper: Keeper) -> None:
    """An idle store returns to its base (P10)."""
    await fill(store, "key", lifetime=10)
    lease = store.lease("node")
    lease.renew(10)
    assert {"session", "field", "event", "stream", "written", "pending", "cancel", "member", "tally", "node"} == set(
        rows(path)
    )
    clock.now += 11
    keeper.keep()
    assert set(rows(path)) == {"ended"}
    clock.now += 61
    keeper.keep()
    assert rows(path) == {}
    lease.close(release=False)


async def test_long_deleted_session_leaves_no_rows(
    store: SQLiteStore, path: Path, clock: Clock, keeper: Keeper
) -> None:
    """It ends at once, and is removed in small transactions, so that nobody waits for long (P6, P10)."""
    await fill(store, "key", lifetime=600)
    await store.append("key", Batch([Draft(TAG, b"x")] * 1000))
    assert await store.delete("key")
    with pytest.raises(SessionNotFound):
        await store.load("key")
    assert rows(path)["event"] > 0
    keeper.keep()
    assert set(rows(path)) == {"ended"}


async def test_session_under_old_key_is_clean(store: SQLiteStore) -> None:
    """Also while the old one's rows are still there."""
    await fill(store, "key", lifetime=600)
    await store.append("key", Batch([Draft(TAG, b"x")] * 1000))
    await store.delete("key")
    await store.create("key", {}, lifetime=600)
    assert await store.load("key") == Loaded({}, Cursor(0), frozenset())
    assert await store.read("key", Cursor(0)) == []


async def test_creates_remove_expired_sessions(store: SQLiteStore, path: Path, clock: Clock) -> None:
    """Also where no keeper comes around."""
    for n in range(30):
        await store.create(f"key{n}", {"name": b"value"}, lifetime=1)
        clock.now += 2
    assert rows(path)["session"] <= 3
    assert rows(path)["field"] <= 3


async def test_expired_sessions_leave_group_room(store: SQLiteStore, clock: Clock) -> None:
    """Limits count live sessions, however many expired ones are still in the file (P10)."""
    for n in range(120):
        await store.create(f"key{n}", {}, lifetime=10, limits={"group": 120})
    with pytest.raises(TooManySessions):
        await store.create("more", {}, lifetime=10, limits={"group": 120})
    clock.now += 11
    await store.create("more", {}, lifetime=10, limits={"group": 1})
    with pytest.raises(AlreadyExists):
        await store.create("more", {}, lifetime=10)


# ---- the write-ahead log


async def outgrow(store: SQLiteStore) -> None:
    """Makes the write-ahead log large enough for a checkpoint."""
    for _ in range(CHECKPOINT_BYTES // 250_000 + 1):
        await store.append("key", event(b"x" * 250_000))


async def test_large_write_ahead_log_is_emptied(store: SQLiteStore, path: Path, keeper: Keeper) -> None:
    """Nobody checkpoints inside an append, so somebody must elsewhere (P10)."""
    await store.create("key", {}, lifetime=600)
    await outgrow(store)
    assert wal_size(path) >= CHECKPOINT_BYTES
    keeper.keep()
    assert wal_size(path) == 0
    assert len(await read_all(store, "key")) == CHECKPOINT_BYTES // 250_000 + 1


async def test_one_process_at_a_time_checkpoints(store: SQLiteStore, path: Path, clock: Clock, keeper: Keeper) -> None:
    """Two could corrupt the file in older versions of SQLite; if the one dies, the other follows it."""
    await store.create("key", {}, lifetime=600)
    await outgrow(store)
    keeper.keep()
    other = Keeper(DatabaseFile(path, clock))
    await outgrow(store)
    other.keep()
    assert wal_size(path) >= CHECKPOINT_BYTES
    clock.now += 31
    other.keep()
    assert wal_size(path) == 0
    other.retire()
    await outgrow(store)
    keeper.keep()
    assert wal_size(path) == 0


@pytest.mark.parametrize(
    ("version", "races"),
    [
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 0), False),
    ],
)
def test_wal_reset_bug_versions_are_known(version: tuple[int, ...], races: bool) -> None:
    assert checkpoints_race(version) == races


# ---- the clock


async def test_sessions_live_on_after_reboot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's clock begins anew with each boot; the store's goes on."""
    now = {"boot": 500_000.0, "wall": 1_700_000_000.0}
    monkeypatch.setattr(time, "time", lambda: now["wall"])

    def boot(name: str) -> SQLiteStore:
        monkeypatch.setattr(sqlite_file, "_machine_clock", lambda: (name, lambda: now["boot"]))
        return SQLiteStore(path)

    async with boot("first") as store:
        await store.create("key", {}, lifetime=100)
        now["boot"] += 50
    now.update(boot=3.0, wall=1_700_000_060.0)
    async with boot("second") as store:
        await store.read("key", Cursor(0))
        now["boot"] += 41
        with pytest.raises(SessionNotFound):
            await store.read("key", Cursor(0))
        await store.create("key", {}, lifetime=100)
    now.update(boot=3.0, wall=0.0)  # a dead battery
    async with boot("third") as store:
        await store.read("key", Cursor(0))
        now["boot"] += 101
        with pytest.raises(SessionNotFound):
            await store.read("key", Cursor(0))


async def test_set_wall_clock_expires_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens the file after the wall clock was set keeps the same time as those who had it open."""
    async with SQLiteStore(path) as before:
        await before.create("key", {}, lifetime=100)
        monkeypatch.setattr(time, "time", lambda: 4_000_000_000.0)
        async with SQLiteStore(path) as after:
            await after.load("key")


# ---- watching


async def watched(store: SQLiteStore, key: str) -> list[Event]:
    """A list that grows by what the store announces. Returns once the watch is in force."""
    seen: list[Event] = []
    watching = asyncio.Event()

    def wake(news: News | None) -> None:
        watching.set()
        seen.extend(() if news is None else news.events)

    store.watch(key, wake)
    async with asyncio.timeout(60):
        await watching.wait()
    return seen


async def test_append_after_removed_rows_is_noticed(store: SQLiteStore, path: Path, clock: Clock) -> None:
    """Watchers look for rows with higher ids than they saw: an id must not be given out again (P3)."""
    await store.create("key", {}, lifetime=600)
    async with SQLiteStore(path, clock=clock) as other:
        wakes: list[News | None] = []
        other.watch("key", wakes.append)
        await eventually(lambda: wakes == [None])
        for position in (1, 2):
            await store.append("key", event())
            await eventually(lambda: len(wakes) == 1 + position)  # noqa: B023
            await store.trim("key", standalone_before=10)
            assert "event" not in rows(path)
        # The entry before the second is gone, and with it what would tell whether the second continues a log (P14).
        assert isinstance(wakes[1], News)
        assert wakes[2] is None


async def test_many_appends_are_announced_in_order(store: SQLiteStore, path: Path, clock: Clock) -> None:
    """More than one look takes at once (P3)."""
    for key in ("key", "other"):
        await store.create(key, {}, lifetime=600)
    async with SQLiteStore(path, clock=clock) as other:
        seen = await watched(other, "key")
        for _ in range(600):  # without a pause for the poll
            await store.append("other", event())
            await store.append("key", event())
        await eventually(lambda: len(seen) == 600)
    assert [each.position for each in seen] == list(range(1, 601))


# ---- nothing is left


async def test_closing_ends_every_task_and_thread(path: Path) -> None:
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    async with SQLiteStore(path) as store:
        await store.create("key", {}, lifetime=600)
        store.watch("key", lambda events: None)
        await store.append("key", event())
    assert asyncio.all_tasks() == tasks
    assert set(threading.enumerate()) == threads
    assert [each.name for each in path.parent.iterdir()] == [path.name]


async def test_polling_ends_with_the_last_watch(store: SQLiteStore) -> None:
    """An idle session costs a node nothing (P10)."""
    tasks = asyncio.all_tasks()
    wakes: list[object] = []
    stops = [store.watch(key, wakes.append) for key in ("one", "one", "other")]
    await eventually(lambda: len(wakes) >= 3)
    assert asyncio.all_tasks() > tasks
    for stop in stops:
        stop()
    await eventually(lambda: asyncio.all_tasks() == tasks)
    store.watch("one", wakes.append)
    before = len(wakes)
    await eventually(lambda: len(wakes) > before)


async def test_quiet_feed_looks_less_often(path: Path) -> None:
    """A node that idles shall not cost more than it must."""
    async with SQLiteStore(path) as here, SQLiteStore(path) as there:
        await here.create("k", {}, lifetime=60.0)
        woken = asyncio.Event()
        stop = here.watch("k", lambda _: woken.set())
        async with asyncio.timeout(60):
            await woken.wait()
        feed = here._feed
        assert await feed._step() == 0.005
        feed._news_at -= 10
        assert await feed._step() == 0.05
        await there.append("k", Batch([Draft(TAG, b"news")]))
        assert await feed._step() == 0.005
        stop()


# ---- a file that is removed or replaced while nodes run


def remove(path: Path) -> None:
    """As somebody who tidies up."""
    for companion in ("", "-wal", "-shm"):
        path.with_name(path.name + companion).unlink(missing_ok=True)


@unhurried("grace", 1.0, 4.0, 16.0)
async def test_removed_file_never_says_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture, grace: float) -> None:
    """P15: another process has made the file anew, and has the session. In the end both have the same file."""
    path = tmp_path / f"after {grace:g} seconds.db"
    caplog.clear()
    async with SQLiteStore(path, empty_grace=grace) as old:
        await old.create("before", {}, lifetime=600)
        with pytest.raises(SessionNotFound):
            await old.load("nobody")
        lease = old.lease("old")
        await asyncio.to_thread(lease.renew, 600)
        remove(path)
        async with SQLiteStore(path) as new:
            await new.create("after", {"a": b"1"}, lifetime=600)
            calls: dict[str, Callable[[], Awaitable[Any]]] = {
                "load": lambda: old.load("after"),
                "update": lambda: old.update("after", {"a": b"2"}),
                "delete": lambda: old.delete("after"),
                "append": lambda: old.append("after", Batch(drafts(b"x"))),
                "read": lambda: old.read("after", Cursor(0)),
                "skim": lambda: old.skim("after", Cursor(0)),
                "lapsed": lambda: old.lapsed(["new"]),
            }
            for call in calls.values():
                with pytest.raises(StoreUnavailable, match="removed or replaced"):
                    await call()
            assert (await old.load("before")).fields == {}
            async with asyncio.timeout(60):
                while True:
                    try:
                        assert (await old.load("after")).fields == {"a": b"1"}
                        break
                    except StoreUnavailable:
                        await asyncio.sleep(0.05)
            with pytest.raises(SessionNotFound):
                await old.load("before")
            await asyncio.to_thread(lease.renew, 600)
            assert await new.lapsed(["old"]) == set()
            woken: asyncio.Queue[object] = asyncio.Queue()
            old.watch("after", woken.put_nowait)
            async with asyncio.timeout(60):
                assert await woken.get() is None
                await new.append("after", Batch(drafts(b"x")))
                assert await woken.get() is not None
        await asyncio.to_thread(lease.close, release=True)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 2
    assert "stop every node" in told[0]


async def test_replaced_file_is_noticed_unasked(tmp_path: Path) -> None:
    """P15: also one that is never asked for what is not there: it would serve for ever what nobody else sees."""
    path = tmp_path / "sessions.db"
    async with SQLiteStore(path, empty_grace=0.1) as old:
        await old.create("before", {}, lifetime=600)
        remove(path)
        async with SQLiteStore(path), asyncio.timeout(60):
            while True:
                try:
                    await old.load("before")
                except SessionNotFound:
                    break
                except StoreUnavailable:
                    pass
                await asyncio.sleep(0.05)
