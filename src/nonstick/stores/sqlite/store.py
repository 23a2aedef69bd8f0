"""A store in one SQLite file: for several processes on one machine.

The modules beside this one: `file` opens the file, `rows` has what each method does to it, `engine` runs that without
blocking the event loop, `feed` watches, `keeper` tidies, and `store.sql` holds the statements.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

from nonstick.errors import NonstickError, SessionNotFound, StoreUnavailable
from nonstick.store import (
    EMPTY_GRACE_SECONDS,
    MAX_CLIP,
    MAX_READ_BYTES,
    Appended,
    Batch,
    Cursor,
    Event,
    Lease,
    Loaded,
    Skimmed,
    Wake,
)
from nonstick.stores.common.bounds import check_bounds, check_places
from nonstick.stores.common.options import checked_grace
from nonstick.stores.common.upkeep import Finding, Plan, Step
from nonstick.stores.sqlite import examine as sqlite_examine
from nonstick.stores.sqlite import rows
from nonstick.stores.sqlite.engine import Engine
from nonstick.stores.sqlite.feed import Feed
from nonstick.stores.sqlite.file import BUSY_SECONDS, SQL, DatabaseFile, transact
from nonstick.stores.sqlite.keeper import Keeper

__all__ = ["SQLiteStore"]

T = TypeVar("T")


class SQLiteStore:
    """Sessions in a file that the processes of one machine share. A commit survives a crash of the process.

    After a power cut the last commits may be missing (`synchronous=NORMAL`): cursors into them answer `Diverged`.

    Args:
        path: The file, on a local file system. It is created, its directory is not.
        poll_interval: Seconds between two looks for what other processes appended, while somebody watches. At
            least 0.05 once nothing has come for a second.
        clock: The store's clock, in seconds; by default the machine's time since boot, kept up over reboots.
        empty_grace: Seconds after which a process goes on with another file, if its own was removed or replaced. Until
            then it does not believe its own that a session is gone (P15).

    Raises:
        ConfigurationError: On entering: a network file system, a file of another application or of a newer version.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        poll_interval: float = 0.005,
        clock: Callable[[], float] | None = None,
        empty_grace: float = EMPTY_GRACE_SECONDS,
    ) -> None:
        self._file = DatabaseFile(path, clock, grace=checked_grace(empty_grace))
        self._engine = Engine(self._file)
        self._feed = Feed(self._engine, poll_interval)
        self._keeper = Keeper(self._file)

    @property
    def url(self) -> str:
        return self._file.url

    async def __aenter__(self) -> Self:
        self._engine.start()
        try:
            await self._engine.connection()
        except StoreUnavailable:
            pass  # the calls try again, and say so
        except BaseException:
            await self._engine.close()
            raise
        self._keeper.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._feed.close()
        await self._keeper.close()
        await self._engine.close()

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        while not await self._engine.write(lambda db, now: rows.create(db, now, key, fields, lifetime, limits or {})):
            pass

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        with self._doubting():
            loaded, stale = await self._engine.run(lambda db: rows.load(db, self._file.now(), key))
            if stale and renew and not await self._engine.write(lambda db, now: rows.renew(db, now, (key,))):
                raise SessionNotFound
        return loaded

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        with self._doubting():
            return await self._engine.write(lambda db, now: rows.update(db, now, key, changes, expect or {}, lifetime))

    async def touch(self, keys: Collection[str]) -> None:
        if keys:
            await self._engine.write(lambda db, now: rows.renew(db, now, keys))

    async def delete(self, key: str) -> bool:
        ended = await self._engine.write(lambda db, now: rows.delete(db, now, key))
        if ended:
            self._feed.announce_end(key)
        # Also where it was there: the file that has the name now may have it too.
        self._file.check_loss()
        return ended

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        with self._doubting():
            written = await self._engine.write(lambda db, now: rows.append(db, now, key, batch))
        self._feed.announce(key, written)
        return written.appended

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        check_bounds(limit=limit, max_bytes=max_bytes)
        with self._doubting():
            return await self._engine.run(lambda db: rows.read(db, self._file.now(), key, after, limit, max_bytes))

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        check_bounds(limit=limit, clip=clip)
        with self._doubting():
            return await self._engine.run(lambda db: rows.skim(db, self._file.now(), key, after, limit, clip))

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        await self._engine.write(lambda db, now: rows.trim(db, now, key, streams, standalone_before))

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        """See `nonstick.store.TellsStale`."""
        check_places(places)
        return await self._engine.run(lambda db: rows.stale(db, self._file.now(), places))

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return self._feed.watch(key, wake)

    # ---- nodes and the store itself

    def lease(self, node: str) -> Lease:
        return _SQLiteLease(self._file, node)

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        live = await self._engine.run(lambda db: db.execute(SQL["live_nodes"], (self._file.now(),)).fetchall())
        if gone := set(nodes) - {node for (node,) in live}:
            self._file.check_loss()
        return gone

    async def ping(self) -> None:
        await self._engine.write(lambda db, now: db.execute(SQL["ping"], (now,)))

    # ---- upkeep

    async def examine(self) -> list[Finding]:
        """See `nonstick.stores.common.upkeep.Examinable`."""
        return await self._apart(lambda: sqlite_examine.examine(self._file))

    async def plan(self) -> Plan:
        """See `nonstick.stores.common.upkeep.Migratable`."""
        return await self._apart(self._file.plan)

    async def migrate(self, done: Callable[[Step], None]) -> None:
        """See `nonstick.stores.common.upkeep.Migratable`. Opening the file does it, as for every node."""
        steps = (await self.plan()).steps
        await self._apart(lambda: self._file.connect().close())
        for step in steps:
            done(step)

    @contextmanager
    def _doubting(self) -> Iterator[None]:
        """Inside, "gone" counts only if the file that is open can know that (P15)."""
        try:
            yield
        except SessionNotFound:
            self._file.check_loss()
            raise

    async def _apart(self, work: Callable[[], T]) -> T:
        """What `work` returns, in a thread and on connections of its own, open store or not."""
        try:
            return await asyncio.to_thread(work)
        except sqlite3.Error as error:
            raise self._file.unavailable(error) from error


class _SQLiteLease:
    """A row in `node`, on a connection that waits for locks."""

    def __init__(self, file: DatabaseFile, node: str) -> None:
        self._file = file
        self._node = node
        self._db: sqlite3.Connection | None = None
        self._db_of = file.generation
        self._asked = False

    def renew(self, seconds: float) -> None:
        self._asked = True
        try:
            self._write("grant", lambda now: (self._node, now + seconds))
        except sqlite3.Error as error:
            self._drop()
            raise self._file.unavailable(error) from error

    def close(self, *, release: bool) -> None:
        try:
            if release and self._asked:
                self._write("release", lambda _: (self._node,))
        except (sqlite3.Error, NonstickError):
            pass  # it runs out by itself
        self._drop()

    def _write(self, statement: str, values: Callable[[float], tuple[object, ...]]) -> None:
        if self._db_of != self._file.generation:
            self._drop()
        if self._db is None:
            self._db_of = self._file.generation
            self._db = self._file.connect(BUSY_SECONDS)
        transact(self._db, self._file.now, lambda db, now: db.execute(SQL[statement], values(now)))

    def _drop(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
