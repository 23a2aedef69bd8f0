"""Runs work on the file in the event loop and, where another process holds the lock, again in a thread that waits."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nonstick.errors import StoreUnavailable
from nonstick.stores.sqlite.file import BUSY_SECONDS, DatabaseFile, is_busy, is_misuse, is_passing, transact
from nonstick.waiting import background

__all__ = ["Engine"]

T = TypeVar("T")

Work = Callable[[sqlite3.Connection], T]


class Engine:
    """Two connections: one that the event loop uses and that never waits, one for a thread that may.

    A query takes a few microseconds, a tenth of what a hop to a thread takes.
    """

    def __init__(self, file: DatabaseFile) -> None:
        self.file = file
        self._inline: sqlite3.Connection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._patient: sqlite3.Connection | None = None  # the thread's
        # Of the file, when each was opened.
        self._inline_of = self._patient_of = file.generation

    def start(self) -> None:
        self._thread = ThreadPoolExecutor(1, "nonstick-sqlite")

    async def close(self) -> None:
        """Ends the thread, after what it still has to do, and closes both connections."""
        thread, self._thread = self._thread, None
        if self._opening is not None:
            await asyncio.wait([self._opening])
        self._drop_inline()
        if thread is not None:
            # Last in the thread: the last connection to close checkpoints, which may take a while.
            await asyncio.get_running_loop().run_in_executor(thread, self._drop_patient)
            thread.shutdown()

    async def connection(self) -> sqlite3.Connection:
        """The event loop's connection, for reading. Not to be used across an await.

        Raises:
            StoreUnavailable: The file cannot be opened, or the store is not entered.
            ConfigurationError: See `DatabaseFile.connect`.
        """
        if self._inline_of != self.file.generation:
            self._drop_inline()
        # Another caller, which got the connection a moment earlier, may have dropped it again.
        while self._inline is None:
            if self._opening is None:
                self._opening = background.spawn(self._open(), name="nonstick: open SQLite")
                self._opening.add_done_callback(_look_at)
            # Shielded: other callers wait for the same opening.
            await asyncio.shield(self._opening)
        return self._inline

    async def run(self, work: Work[T]) -> T:
        """Does `work`: one statement, or one transaction. It may be called several times, of which one counts.

        Raises:
            StoreUnavailable: For every error of SQLite.
        """
        db = await self.connection()
        try:
            return work(db)
        except sqlite3.Error as error:
            if is_misuse(error):
                raise
            if not is_busy(error):
                raise self.failed(error) from error
        deadline = time.monotonic() + BUSY_SECONDS
        # If the caller is cancelled, the work goes on; nobody hears of the outcome.
        return await asyncio.get_running_loop().run_in_executor(self._pool(), self._insist, work, deadline)

    async def write(self, work: Callable[[sqlite3.Connection, float], T]) -> T:
        """Does `work` in one write transaction; it gets the store's time."""
        return await self.run(lambda db: transact(db, self.file.now, work))

    def failed(self, error: sqlite3.Error) -> StoreUnavailable:
        """What to raise for an error on the event loop's connection; drops the connection if it may be spoilt."""
        if not is_passing(error):
            self._drop_inline()
        return self.file.unavailable(error)

    def _pool(self) -> ThreadPoolExecutor:
        if self._thread is None:
            raise StoreUnavailable(f"{self.file.url} is not open")
        return self._thread

    async def _open(self) -> None:
        try:
            self._inline_of = self.file.generation
            self._inline = await asyncio.get_running_loop().run_in_executor(self._pool(), self.file.connect)
        except sqlite3.Error as error:
            raise self.file.unavailable(error) from error
        finally:
            self._opening = None

    def _insist(self, work: Work[T], deadline: float) -> T:
        """In the thread: tries until the lock is free."""
        pause = 0.0005
        while True:
            try:
                if self._patient_of != self.file.generation:
                    self._drop_patient()
                if self._patient is None:
                    self._patient_of = self.file.generation
                    self._patient = self.file.connect()
                return work(self._patient)
            except sqlite3.Error as error:
                if is_misuse(error):
                    raise
                if not is_passing(error):
                    self._drop_patient()
                if not is_busy(error) or time.monotonic() > deadline:
                    raise self.file.unavailable(error) from error
            # SQLite's own waiting backs off to 0.1 s, which starves this thread beside a busy process.
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
            pause = min(2 * pause, 0.008)

    def _drop_inline(self) -> None:
        if self._inline is not None:
            self._inline.close()
            self._inline = None

    def _drop_patient(self) -> None:
        if self._patient is not None:
            self._patient.close()
            self._patient = None


def _look_at(task: asyncio.Task[None]) -> None:
    """Takes the outcome: by now every caller that waited for it may be gone, and asyncio would complain."""
    if not task.cancelled():
        task.exception()
