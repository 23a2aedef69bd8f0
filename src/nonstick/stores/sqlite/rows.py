"""What each method of the store does to the rows. Synchronous, each inside one statement or one write transaction.

`now` is the store's clock. `append` and the others raise what `nonstick.store.Store` says.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Generator, Mapping
from typing import Any, Final, NamedTuple

from nonstick.errors import (
    AlreadyExists,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StreamClosed,
    TooManySessions,
    Trimmed,
)
from nonstick.store import (
    CANCEL_SECONDS,
    FRESH_SHARE,
    MAX_CANCELS,
    MAX_READ_BYTES,
    NEW_STREAM,
    STANDALONE,
    WRITER_SECONDS,
    Appended,
    Batch,
    Cursor,
    Event,
    Loaded,
    Skimmed,
)
from nonstick.stores.common.bounds import NOT_OPENED, fitting
from nonstick.stores.sqlite.file import SQL

__all__ = [
    "ENDED_SECONDS",
    "Written",
    "append",
    "bury_expired",
    "create",
    "delete",
    "load",
    "read",
    "renew",
    "skim",
    "stale",
]

ENDED_SECONDS: Final = 60.0
"""How long watchers have to notice that a session ended."""

_SKIMMED_BYTES: Final = 4 * MAX_READ_BYTES
"""About how many bytes of a log one `skim` looks at."""

_SWEEP_ROWS: Final = 200
"""Rows of ended sessions that one transaction removes, so that none takes long."""
_BURY_PER_CREATE: Final = 2
"""Expired sessions that one `create` ends: more than it adds, so that they do not pile up."""
_BURY_PER_PURGE: Final = 50


class Written(NamedTuple):
    """What `append` did: the answer, the events, the id of the first event's row, and the entry that they follow."""

    appended: Appended
    events: list[Event]
    row: int
    after: Cursor


class _Head(NamedTuple):
    session: int
    head: int
    tag: bytes
    size: int
    events: int
    tidied_at: float


# ---- the record


def create(
    db: sqlite3.Connection,
    now: float,
    key: str,
    fields: Mapping[str, bytes],
    lifetime: float,
    limits: Mapping[str, int],
) -> bool:
    """Makes the session. False: it first removed some of the expired sessions that filled a group; call it again."""
    old = db.execute(SQL["find"], (key,)).fetchone()
    if old is not None:
        if old[1] > now:
            raise AlreadyExists
        _bury(db, now, old[0], key)
    for group, limit in limits.items():
        if _members(db, group) >= limit:
            if bury_expired(db, now):
                return False
            raise TooManySessions(group)
    session = db.execute(SQL["create"], (key, lifetime, now + lifetime, now)).lastrowid
    db.executemany(SQL["set_field"], [(session, name, value) for name, value in fields.items()])
    db.executemany(SQL["join"], [(session, group) for group in limits])
    db.executemany(SQL["count_in"], [(group,) for group in limits])
    bury_expired(db, now, _BURY_PER_CREATE)
    sweep(db)
    return True


def load(db: sqlite3.Connection, now: float, key: str) -> tuple[Loaded, bool]:
    """The record, and whether the expiry is to be renewed."""
    rows = db.execute(SQL["load"], (key, now, key, now - CANCEL_SECONDS)).fetchall()
    if not rows or rows[0][0] is None:
        raise SessionNotFound
    expires_at, lifetime, head, tag, size, count, _, _ = rows[0]
    fields = {row[6]: row[7] for row in rows if row[0] is not None and row[6] is not None}
    cancels = frozenset(row[6] for row in rows if row[0] is None)
    return Loaded(fields, Cursor(head, tag), cancels, size, count), expires_at - now < (1 - FRESH_SHARE) * lifetime


def renew(db: sqlite3.Connection, now: float, keys: Collection[str]) -> int:
    """Renews the expiry of the live ones; returns how many those are."""
    return sum(db.execute(SQL["renew"], (now, key, now)).rowcount for key in keys)


def update(
    db: sqlite3.Connection,
    now: float,
    key: str,
    changes: Mapping[str, bytes | None],
    expect: Mapping[str, bytes | None],
    lifetime: float | None,
) -> bool:
    session = _head(db, now, key).session
    for name, value in expect.items():
        row = db.execute(SQL["get_field"], (session, name)).fetchone()
        if (None if row is None else row[0]) != value:
            return False
    _change(db, session, changes)
    if lifetime is not None:
        db.execute(SQL["prolong"], (lifetime, now + lifetime, session))
    return True


def delete(db: sqlite3.Connection, now: float, key: str) -> bool:
    """Ends the session; returns whether it was live."""
    row = db.execute(SQL["find"], (key,)).fetchone()
    if row is None:
        return False
    _bury(db, now, row[0], key)
    sweep(db)
    return bool(row[1] > now)


# ---- the log


def append(db: sqlite3.Connection, now: float, key: str, batch: Batch) -> Written:
    log = _head(db, now, key)
    if now - log.tidied_at > WRITER_SECONDS:
        _tidy(db, now, log.session)
    owner, before = batch.stream, 0
    if batch.writer:
        latest = db.execute(SQL["latest_written"], (log.session, batch.writer)).fetchone()
        if latest is not None and batch.sequence <= latest[0]:
            (first,) = db.execute(SQL["first_written"], (log.session, batch.writer, batch.sequence)).fetchone()
            return Written(Appended(first, True, log.size, log.events), [], 0, Cursor(0))
        # A writer belongs to its stream, also while it writes to the standalone stream in between.
        owner = batch.stream or (latest[2] if latest else STANDALONE)
        before = latest[0] if latest else 0
    attempt = _admit(db, log.session, batch, before)

    first = log.head + 1 if batch.events else log.head
    stream = first if batch.stream == NEW_STREAM else batch.stream
    events = [Event(first + n, draft.tag, stream, draft.data) for n, draft in enumerate(batch.events)]
    row = _add(db, log, events)
    if stream != STANDALONE:
        _settle_stream(db, log.session, batch, stream, attempt, last=max(log.head, first + len(events) - 1))
    _settle_record(db, now, log.session, batch)
    if batch.writer:
        owner = first if owner == NEW_STREAM else owner
        db.execute(SQL["write"], (log.session, batch.writer, batch.sequence, first, owner, now))
    size = log.size + sum(len(event.data) for event in events)
    return Written(Appended(first, False, size, log.events + len(events)), events, row, Cursor(log.head, log.tag))


def read(db: sqlite3.Connection, now: float, key: str, after: Cursor, limit: int, max_bytes: int) -> list[Event]:
    # Row by row: what does not fit is not fetched.
    with contextlib.closing(_rows_after(db, now, key, after, limit, SQL["read"], after.position)) as rows:
        return list(fitting((Event(*row) for row in rows), max_bytes))


def skim(db: sqlite3.Connection, now: float, key: str, after: Cursor, limit: int, clip: int) -> list[Skimmed]:
    with contextlib.closing(_rows_after(db, now, key, after, limit, SQL["skim"], clip)) as rows:
        found: list[Skimmed] = []
        looked_at = 0
        for row in rows:
            found.append(Skimmed(Event(*row[:4]), row[4]))
            # What is cut off is fetched from the file all the same, in the event loop.
            looked_at += row[4]
            if looked_at >= _SKIMMED_BYTES:
                break
        return found


def _rows_after(
    db: sqlite3.Connection, now: float, key: str, after: Cursor, limit: int, query: str, argument: int
) -> Generator[tuple[Any, ...], None, None]:
    """The rows of the events after this cursor, without the log's head that each begins with.

    One statement, so one snapshot. Raises what `Store.read` raises, at its first row.
    """
    checked = bool(after.position and after.tag)
    start = after.position if checked else after.position + 1
    with contextlib.closing(db.execute(query, (argument, start, key, now, limit + checked))) as rows:
        first = next(rows, None)
        if first is None:
            raise SessionNotFound
        if after.position > first[0]:
            raise Diverged
        if checked and first[1] != after.position:
            raise Trimmed(_oldest(db, now, key))
        if checked and first[2] != after.tag:
            raise Diverged
        if not checked and first[1] is not None:
            yield first[1:]
        for row in rows:
            yield row[1:]


def stale(db: sqlite3.Connection, now: float, places: Mapping[str, Cursor]) -> set[str]:
    return {key for key, place in places.items() if not _ends_at(db, now, key, place)}


def _ends_at(db: sqlite3.Connection, now: float, key: str, place: Cursor) -> bool:
    row = db.execute(SQL["place"], (key, now)).fetchone()
    return row is not None and row[0] == place.position and (not place.tag or row[1] == place.tag)


def trim(db: sqlite3.Connection, now: float, key: str, streams: Collection[int], standalone_before: int) -> None:
    try:
        session = _head(db, now, key).session
    except SessionNotFound:
        return
    for name in set(streams):
        stream = db.execute(SQL["get_stream"], (session, name)).fetchone()
        if stream is not None and stream[1]:
            _remove(db, session, name, first=name, last=stream[1])
            db.execute(SQL["remove_stream"], (session, name))
    if standalone_before > 1:
        _remove(db, session, STANDALONE, first=1, last=standalone_before - 1)


# ---- what is over


def bury_expired(db: sqlite3.Connection, now: float, limit: int = _BURY_PER_PURGE) -> int:
    """Ends so many of the sessions that expired; returns how many it found."""
    rows = db.execute(SQL["expired"], (now, limit)).fetchall()
    for session, key in rows:
        _bury(db, now, session, key)
    return len(rows)


def sweep(db: sqlite3.Connection) -> bool:
    """Removes a few rows of an ended session. Returns whether there was one."""
    grave = db.execute(SQL["graves"]).fetchone()
    if grave is None:
        return False
    for statement in ("sweep_events", "sweep_written"):
        if db.execute(SQL[statement], (grave[0], _SWEEP_ROWS)).rowcount == _SWEEP_ROWS:
            return True
    for statement in ("sweep_streams", "sweep_fields", "sweep_pending", "sweep_cancels", "fill"):
        db.execute(SQL[statement], grave)
    return True


def purge(db: sqlite3.Connection, now: float) -> bool:
    """One small step of removing what is over. Returns whether there may be more."""
    db.execute(SQL["forget_ended"], (now - ENDED_SECONDS,))
    db.execute(SQL["forget_nodes"], (now,))
    buried = bury_expired(db, now)
    return sweep(db) or buried > 0


def untidy(db: sqlite3.Connection, now: float) -> bool:
    """Whether `purge` would find something."""
    return bool(db.execute(SQL["untidy"], (now, now - ENDED_SECONDS, now)).fetchone()[0])


def _bury(db: sqlite3.Connection, now: float, session: int, key: str) -> None:
    """Ends a session at once, for everybody; its rows elsewhere are left to `sweep`, but for those that count."""
    db.execute(SQL["bury"], (session,))
    for statement in ("count_out", "remove_empty_groups", "leave"):
        db.execute(SQL[statement], (session,))
    db.execute(SQL["note_end"], (key, now))
    db.execute(SQL["dig"], (session,))


def _tidy(db: sqlite3.Connection, now: float, session: int) -> None:
    """Forgets old appends whose stream is not kept, and old cancels. The latest of a writer is old when it idled."""
    db.execute(SQL["forget_written"], (session, now - WRITER_SECONDS))
    db.execute(SQL["forget_cancels"], (session, now - CANCEL_SECONDS))
    db.execute(SQL["set_tidied"], (now, session))


# ---- parts


def _head(db: sqlite3.Connection, now: float, key: str) -> _Head:
    row = db.execute(SQL["head"], (key, now)).fetchone()
    if row is None:
        raise SessionNotFound
    return _Head(*row)


def _members(db: sqlite3.Connection, group: str) -> int:
    row = db.execute(SQL["tally"], (group,)).fetchone()
    return 0 if row is None else int(row[0])


def _change(db: sqlite3.Connection, session: int, changes: Mapping[str, bytes | None]) -> None:
    for name, value in changes.items():
        if value is None:
            db.execute(SQL["remove_field"], (session, name))
        else:
            db.execute(SQL["set_field"], (session, name, value))


def _admit(db: sqlite3.Connection, session: int, batch: Batch, before: int) -> int:
    """Whether this batch may be written now, after the writer's last, `before`; returns the stream's attempt."""
    if batch.stream == NEW_STREAM and not batch.events:
        raise ValueError(NOT_OPENED)
    attempt = batch.attempt
    if batch.stream > STANDALONE:
        stream = db.execute(SQL["get_stream"], (session, batch.stream)).fetchone()
        if stream is None or stream[1]:
            raise StreamClosed
        if stream[0] != batch.attempt:
            raise Fenced
        if batch.writer and batch.sequence != before + 1:
            raise Diverged
    for request in (batch.answers, batch.settle):
        if request is not None and db.execute(SQL["is_pending"], (session, request)).fetchone() is None:
            raise NotPending
    return attempt


def _add(db: sqlite3.Connection, log: _Head, events: list[Event]) -> int:
    """Adds these at the end of the log; returns the id of the first one's row."""
    last = 0
    for event in events:
        row = (log.session, event.position, event.tag, event.stream, event.data)
        last = db.execute(SQL["add_event"], row).lastrowid or 0
    if events:
        size = log.size + sum(len(event.data) for event in events)
        end = events[-1]
        db.execute(SQL["set_head"], (end.position, end.tag, size, log.events + len(events), log.session))
    return last - len(events) + 1


def _settle_stream(db: sqlite3.Connection, session: int, batch: Batch, stream: int, attempt: int, *, last: int) -> None:
    attempt += batch.take_over
    ended = last if batch.terminal else 0
    if batch.stream == NEW_STREAM:
        db.execute(SQL["open_stream"], (session, stream, attempt, ended))
    elif batch.take_over or batch.terminal:
        db.execute(SQL["set_stream"], (attempt, ended, session, stream))


def _settle_record(db: sqlite3.Connection, now: float, session: int, batch: Batch) -> None:
    for request in batch.expect:
        db.execute(SQL["expect"], (session, request))
    if batch.settle is not None:
        db.execute(SQL["settle"], (session, batch.settle))
    if batch.cancel is not None:
        db.execute(SQL["cancel"], (session, batch.cancel, now))
        db.execute(SQL["drop_cancels"], (session, batch.cancel, session, batch.cancel, MAX_CANCELS - 1))
    if batch.uncancel is not None:
        db.execute(SQL["uncancel"], (session, batch.uncancel))
    _change(db, session, batch.fields)


def _remove(db: sqlite3.Connection, session: int, stream: int, *, first: int, last: int) -> None:
    count, size = db.execute(SQL["measure_range"], (session, first, last, stream)).fetchone()
    if count:
        db.execute(SQL["remove_range"], (session, first, last, stream))
        db.execute(SQL["shrink"], (count, size, session))


def _oldest(db: sqlite3.Connection, now: float, key: str) -> int:
    """Position of the first event that is left; 0 if none is."""
    row = db.execute(SQL["skim"], (0, 0, key, now, 1)).fetchone()
    return row[1] or 0 if row else 0
