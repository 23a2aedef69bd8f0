"""Purging and checkpointing, in a thread, by one process at a time."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from nonstick.errors import NonstickError
from nonstick.stores.sqlite.file import SQL, DatabaseFile, checkpoints_race, transact
from nonstick.stores.sqlite.rows import purge, untidy
from nonstick.waiting import background

__all__ = ["CHECKPOINT_BYTES", "Keeper"]

_log = logging.getLogger("nonstick.stores.sqlite")

CHECKPOINT_BYTES: Final = 4 * 1024 * 1024
"""The write-ahead log's size that calls for a checkpoint; SQLite's own default is about as much."""

_INTERVAL: Final = 1.0
_TERM: Final = 30.0
"""Seconds for which the process that found something to do is the only one that does it."""
_WAIT: Final = 1.0
_PAUSE: Final = 0.002


class Keeper:
    """Looks every second whether there is something to do. Writes nothing if there is not.

    One process does the work, because two that checkpoint at once can corrupt the file in older versions of SQLite.
    The file names that process for a term; if it dies, the next one waits for the end of the term.
    """

    def __init__(self, file: DatabaseFile, interval: float = _INTERVAL) -> None:
        self._file = file
        self._interval = interval
        self._name = secrets.token_hex(8)
        self._stop = threading.Event()
        self._db: sqlite3.Connection | None = None
        self._db_of = file.generation
        self._thread: ThreadPoolExecutor | None = None
        self._task: asyncio.Task[None] | None = None
        self._keeping = False

    def start(self) -> None:
        self._stop.clear()
        self._thread = ThreadPoolExecutor(1, "nonstick-sqlite-keeper")
        self._task = background.spawn(self._run(self._thread), name="nonstick: keep SQLite")

    async def close(self) -> None:
        self._stop.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(thread, self.retire)
            thread.shutdown()

    async def _run(self, thread: ThreadPoolExecutor) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await asyncio.get_running_loop().run_in_executor(thread, self.keep)

    def keep(self) -> None:
        """Does what there is to do, unless another process does. Blocks; raises nothing."""
        try:
            self._file.look()
            if self._db_of != self._file.generation:
                self._drop()
            if self._db is None:
                self._db_of = self._file.generation
                self._db = self._file.connect(_WAIT)
            db = self._db
            large = self._is_large()
            if not large and not untidy(db, self._file.now()):
                return
            self._keeping = transact(db, self._file.now, self._take_turn)
            if not self._keeping:
                return
            while transact(db, self._file.now, purge) and not self._stop.wait(_PAUSE):
                pass
            if large:
                _checkpoint(db)
        except (sqlite3.Error, NonstickError) as error:
            # Calls of the store report its trouble; the keeper tries again in a second.
            _log.debug("%s could not be tidied: %s", self._file.path, error)
            self._drop()

    def retire(self) -> None:
        """Leaves the work to others at once, and closes the connection. Blocks; raises nothing."""
        if self._db is not None and self._keeping:
            try:
                transact(self._db, self._file.now, lambda db, _: db.execute(SQL["stop_keeping"], (self._name,)))
            except sqlite3.Error:
                pass  # the term ends by itself
        self._drop()

    def _take_turn(self, db: sqlite3.Connection, now: float) -> bool:
        return db.execute(SQL["keep"], (self._name, now + _TERM, self._name, now)).rowcount > 0

    def _is_large(self) -> bool:
        # Its size is looked up, never the file opened: closing it again would drop SQLite's locks.
        try:
            return self._file.path.with_name(self._file.path.name + "-wal").stat().st_size >= CHECKPOINT_BYTES
        except OSError:
            return False

    def _drop(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _checkpoint(db: sqlite3.Connection) -> None:
    """Copies the write-ahead log into the database and empties it."""
    if not checkpoints_race():
        # Most of the work, without holding anybody up.
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    # Holds the write lock, so that no commit can come between (the older versions' bug), and the log really shrinks.
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
