"""Notices what other processes append, by polling SQLite's change counter while anything is watched."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Final

from nonstick.errors import NonstickError
from nonstick.store import MAX_READ_BYTES, Cursor, Event, News, Wake
from nonstick.stores.common.watches import Watch, Watches
from nonstick.stores.sqlite.engine import Engine
from nonstick.stores.sqlite.file import SQL, is_busy
from nonstick.stores.sqlite.rows import ENDED_SECONDS, Written
from nonstick.waiting import background

__all__ = ["Feed"]

_log = logging.getLogger("nonstick.stores.sqlite")

_BATCH: Final = 256
_QUIET_SECONDS: Final = 1.0
_QUIET_INTERVAL: Final = 0.05
"""Seconds, at least, between two looks once nothing has come for so long: each wakes the process, which costs more than
the look."""
_RETRY_SECONDS: Final = 0.5


class Feed:
    """Wakes this process's watchers for its own appends at once, and for those of others within the poll interval.

    After a second without any news the interval is 50 ms at least.

    There is one writer at a time, so the ids of events and of ends follow the order of commits, and whatever has an
    id after the last one seen is new.
    """

    def __init__(self, engine: Engine, interval: float) -> None:
        self._engine = engine
        self._interval = interval
        self._watches = Watches[News]()
        self._task: asyncio.Task[None] | None = None
        self._db: sqlite3.Connection | None = None  # where the marks below hold; None: not in force
        self._version = 0
        self._last_event = 0
        self._last_end = 0
        self._own: set[int] = set()  # events after the last one seen that were announced here already
        self._polled_at = 0.0
        self._news_at = time.monotonic()

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        watch, stop = self._watches.add(key, wake)
        # A new watch mostly belongs to a client that has just asked for something.
        self._news_at = time.monotonic()
        if self._task is None:
            self._task = background.spawn(self._poll(), name="nonstick: watch SQLite")
        else:
            asyncio.get_running_loop().call_soon(self._greet, watch)
        return stop

    def announce(self, key: str, written: Written) -> None:
        """This process appended these."""
        count = len(written.events)
        if not count:
            return
        self._news_at = time.monotonic()
        if self._db is not None:
            if written.row == self._last_event + 1:
                self._last_event += count
            else:
                self._own.update(range(written.row, written.row + count))
        self._watches.announce(key, News(written.after, written.events))

    def announce_end(self, key: str) -> None:
        """This process ended the session."""
        self._watches.announce(key, None)

    async def close(self) -> None:
        self._watches.clear()
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._interrupt()

    def _greet(self, watch: Watch[News]) -> None:
        # If the feed is not in force, everybody is told to read once it is.
        if self._db is not None:
            watch.call_soon(None)

    async def _poll(self) -> None:
        try:
            while self._watches:
                pause = await self._step()
                await asyncio.sleep(pause)
        finally:
            self._task = None
            self._interrupt()

    async def _step(self) -> float:
        """Announces what is new; returns how long to wait before the next time."""
        try:
            db = await self._engine.connection()
            if db is not self._db or time.monotonic() - self._polled_at > ENDED_SECONDS / 2:
                self._begin(db)
                self._watches.announce_all()
            more = self._catch_up(db)
        except sqlite3.Error as error:
            if is_busy(error):
                return self._interval
            self._interrupt()
            self._engine.failed(error)
            return _RETRY_SECONDS
        except NonstickError:
            self._interrupt()
            return _RETRY_SECONDS
        self._polled_at = time.monotonic()
        if more:
            return 0
        quiet = self._polled_at - self._news_at > _QUIET_SECONDS
        return max(self._interval, _QUIET_INTERVAL) if quiet else self._interval

    def _begin(self, db: sqlite3.Connection) -> None:
        self._interrupt()
        db.create_function("watched", 1, self._watches.__contains__)
        self._version = _version(db)
        self._last_event, self._last_end = db.execute(SQL["last_ids"]).fetchone()
        self._db = db

    def _interrupt(self) -> None:
        self._db = None
        self._own.clear()

    def _catch_up(self, db: sqlite3.Connection) -> bool:
        """Announces up to a batch of events, and what ended. Returns whether more events may be left."""
        version = _version(db)
        if version == self._version:
            return False
        last_event, last_end = db.execute(SQL["last_ids"]).fetchone()
        rows, more = self._new_events(db, last_event)
        ends = db.execute(SQL["new_ends"], (self._last_end, last_end)).fetchall()
        if rows or ends:
            self._news_at = time.monotonic()
        new = (row for row in rows if row[0] not in self._own)
        for key, group in groupby(new, key=lambda row: row[1]):
            self._watches.announce(key, _news(list(group)))
        for (key,) in ends:
            self._watches.announce(key, None)
        self._last_event, self._last_end = rows[-1][0] if more else last_event, last_end
        self._own = {row for row in self._own if row > self._last_event}
        if not more:
            # Read before the rows: what was committed since changes it again.
            self._version = version
        return more

    def _new_events(self, db: sqlite3.Connection, last: int) -> tuple[list[tuple[Any, ...]], bool]:
        """Rows of new events, and whether there may be more: as many as fit in one read of a log (P10)."""
        found: list[tuple[Any, ...]] = []
        size = 0
        with contextlib.closing(db.execute(SQL["new_events"], (self._last_event, last, _BATCH))) as rows:
            for row in rows:
                found.append(row)
                size += len(row[-1])
                if size >= MAX_READ_BYTES:
                    return found, True
        return found, len(found) == _BATCH


def _news(rows: Sequence[Any]) -> News | None:
    """The events in these rows of one session; None if the entry before them has been trimmed, and its tag with it."""
    _, _, tag, first, *_ = rows[0]
    if tag is None and first > 1:
        return None
    return News(Cursor(first - 1, tag or b""), [Event(*row[3:]) for row in rows])


def _version(db: sqlite3.Connection) -> int:
    """Changes with every commit of another connection."""
    version: int = db.execute("PRAGMA data_version").fetchone()[0]
    return version
