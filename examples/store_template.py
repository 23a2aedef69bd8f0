"""A store of your own, to begin with: a document per session, in any database that changes a document atomically.

It passes the whole contract (`tests/contract/test_store_template.py`). To make it yours, replace the class `Database`:
nine small methods over two SQLite tables. The rules of the protocol stand above it, in plain Python, on a `Session`
that is loaded, changed and saved in one step. Keep them, or, where your database can do better than to save a session
whole, take them into it one by one: the suite tells whether the promise still holds.

    app = nonstick.app(mcp, store=DocumentStore("sessions.db"))

What makes it a template rather than a product: every append rewrites its session's document, and watches ask the
database 50 times a second. docs/writing-a-store.md goes through it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Final, Self, TypeVar

from nonstick.errors import (
    AlreadyExists,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StoreUnavailable,
    StreamClosed,
    TooManySessions,
    Trimmed,
)
from nonstick.store import (
    CANCEL_SECONDS,
    FRESH_SHARE,
    MAX_CANCELS,
    MAX_CLIP,
    MAX_READ,
    MAX_READ_BYTES,
    NEW_STREAM,
    STANDALONE,
    WRITER_SECONDS,
    Appended,
    Batch,
    Cursor,
    Event,
    Lease,
    Loaded,
    Skimmed,
    Wake,
)

__all__ = ["DocumentStore"]

T = TypeVar("T")

POLL_SECONDS: Final = 0.02
"""How often a watched session is looked at. A database that can notify saves you this."""

WAIT_SECONDS: Final = 2.0
"""How long a call waits for another process's lock before it raises StoreUnavailable."""


# ---- a session


@dataclass
class Session:
    """Everything about one session, as JSON keeps it: bytes are base64, numbers as names are text."""

    lifetime: float
    expires_at: float
    groups: list[str] = field(default_factory=list[str])
    fields: dict[str, str] = field(default_factory=dict[str, str])
    position: int = 0
    tag: str = ""
    events: list[tuple[int, str, int, str]] = field(default_factory=list[tuple[int, str, int, str]])
    streams: dict[str, tuple[int, bool]] = field(default_factory=dict[str, tuple[int, bool]])
    """Name: attempt, and whether it is closed."""
    writers: dict[str, tuple[int, int, int, float]] = field(default_factory=dict[str, tuple[int, int, int, float]])
    """Name: the last sequence, where that append began, the writer's stream, and when."""
    pending: list[str] = field(default_factory=list[str])
    cancels: dict[str, float] = field(default_factory=dict[str, float])
    """Request key: when. The newest comes last."""

    def renew(self, now: float) -> None:
        self.expires_at = now + self.lifetime

    @property
    def size(self) -> int:
        return sum(len(_bytes(data)) for _, _, _, data in self.events)

    def set_fields(self, changes: Mapping[str, bytes | None]) -> None:
        for name, value in changes.items():
            if value is None:
                self.fields.pop(name, None)
            else:
                self.fields[name] = _text(value)


def load(session: Session, now: float) -> tuple[Loaded, bool]:
    """What `load` answers, and whether the expiry was renewed, so that the document has to be saved."""
    stale = session.expires_at - now < (1 - FRESH_SHARE) * session.lifetime
    if stale:
        session.renew(now)
    fields = {name: _bytes(value) for name, value in session.fields.items()}
    cancels = frozenset(request for request, at in session.cancels.items() if now - at < CANCEL_SECONDS)
    head = Cursor(session.position, _bytes(session.tag))
    return Loaded(fields, head, cancels, session.size, len(session.events)), stale


def update(
    session: Session,
    now: float,
    changes: Mapping[str, bytes | None],
    expect: Mapping[str, bytes | None],
    lifetime: float | None,
) -> bool:
    for name, value in expect.items():
        if session.fields.get(name) != (None if value is None else _text(value)):
            return False
    session.set_fields(changes)
    if lifetime is not None:
        session.lifetime = lifetime
        session.renew(now)
    return True


def append(session: Session, now: float, batch: Batch) -> Appended:
    """The order of the checks is part of the promise: a repeated append is a duplicate, whatever has happened since."""
    forget(session, now)
    sequence, first, stream, _ = session.writers.get(batch.writer, (0, 0, STANDALONE, 0.0))
    if batch.writer and batch.sequence <= sequence:
        return Appended(first, True, session.size, len(session.events))
    check(session, batch, sequence)

    first = session.position + 1 if batch.events else session.position
    name = first if batch.stream == NEW_STREAM else batch.stream
    for draft in batch.events:
        session.position += 1
        session.tag = _text(draft.tag)
        session.events.append((session.position, session.tag, name, _text(draft.data)))
    if name != STANDALONE:
        attempt, _ = session.streams.get(str(name), (batch.attempt, False))
        session.streams[str(name)] = (attempt + batch.take_over, batch.terminal)
    if batch.writer:
        session.writers[batch.writer] = (batch.sequence, first, name or stream, now)
    settle(session, batch, now)
    return Appended(first, False, session.size, len(session.events))


def check(session: Session, batch: Batch, sequence: int) -> None:
    """Whether the batch may be written, after its writer's last `sequence`. Nothing was changed if it may not."""
    if batch.stream == NEW_STREAM and not batch.events:
        raise ValueError("a stream opens with an event")
    if batch.stream > STANDALONE:
        attempt, closed = session.streams.get(str(batch.stream), (0, True))
        if closed:
            raise StreamClosed
        if attempt != batch.attempt:
            raise Fenced
        if batch.writer and batch.sequence != sequence + 1:
            raise Diverged
    for request in (batch.answers, batch.settle):
        if request is not None and request not in session.pending:
            raise NotPending


def settle(session: Session, batch: Batch, now: float) -> None:
    """What a batch does beside its events."""
    session.pending += [request for request in batch.expect if request not in session.pending]
    if batch.settle is not None:
        session.pending.remove(batch.settle)
    if batch.cancel is not None:
        session.cancels.pop(batch.cancel, None)
        session.cancels[batch.cancel] = now
        session.cancels = dict(list(session.cancels.items())[-MAX_CANCELS:])
    if batch.uncancel is not None:
        session.cancels.pop(batch.uncancel, None)
    session.set_fields(batch.fields)


def forget(session: Session, now: float) -> None:
    """Drops the writers that were idle for long and whose stream is gone, and old cancels."""
    session.writers = {
        name: writer
        for name, writer in session.writers.items()
        if now - writer[3] < WRITER_SECONDS or str(writer[2]) in session.streams
    }
    session.cancels = {request: at for request, at in session.cancels.items() if now - at < CANCEL_SECONDS}


def events_after(session: Session, after: Cursor, limit: int) -> list[Event]:
    if after.position > session.position:
        raise Diverged
    if after.position and after.tag:
        tags = {position: tag for position, tag, _, _ in session.events}
        if after.position not in tags:
            raise Trimmed(min(tags, default=0))
        if tags[after.position] != _text(after.tag):
            raise Diverged
    later = [event for event in session.events if event[0] > after.position][:limit]
    return [Event(position, _bytes(tag), stream, _bytes(data)) for position, tag, stream, data in later]


def read(session: Session, after: Cursor, limit: int, max_bytes: int) -> list[Event]:
    """Bounded by bytes too: a thousand events may be gigabytes, and the first may be as large as a message."""
    found: list[Event] = []
    size = 0
    for event in events_after(session, after, limit):
        size += len(event.data)
        if found and size > max_bytes:
            break
        found.append(event)
    return found


def skim(session: Session, after: Cursor, limit: int, clip: int) -> list[Skimmed]:
    """Where a log is in rows of its own, have the database cut the data off, and not send the rest."""
    found = events_after(session, after, limit)
    return [Skimmed(event._replace(data=event.data[:clip]), len(event.data)) for event in found]


def trim(session: Session, streams: Collection[int], standalone_before: int) -> None:
    ended = {name for name in streams if session.streams.get(str(name), (0, False))[1]}
    session.events = [
        event
        for event in session.events
        if event[2] not in ended and not (event[2] == STANDALONE and event[0] < standalone_before)
    ]
    for name in ended:
        del session.streams[str(name)]


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _bytes(value: str) -> bytes:
    return base64.b64decode(value)


# ---- the database: replace this


class Database:
    """One connection. Every method is one transaction, or part of the one that `change` is."""

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        self._use_wal()
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS document "
            "(key TEXT PRIMARY KEY, version INTEGER NOT NULL, expires_at REAL NOT NULL, groups TEXT, body TEXT)"
        )
        self._db.execute("CREATE TABLE IF NOT EXISTS node (name TEXT PRIMARY KEY, until REAL NOT NULL)")

    def _use_wal(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                # The switch alone does not wait for processes that open a new file at the same time.
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.005)

    def change(self, work: Callable[[], T]) -> T:
        """Does `work` while nobody else changes anything; if it raises, nothing has happened."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            result = work()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return result

    def get(self, key: str, now: float) -> Session | None:
        """The live session with this key."""
        row = self._db.execute("SELECT body FROM document WHERE key = ? AND expires_at > ?", (key, now)).fetchone()
        return None if row is None else Session(**json.loads(row[0]))

    def put(self, key: str, session: Session) -> None:
        # A new version each time, which none before it has had: a watch compares it.
        row = (key, secrets.randbits(62), session.expires_at, _lines(session.groups), json.dumps(asdict(session)))
        self._db.execute("INSERT OR REPLACE INTO document VALUES (?, ?, ?, ?, ?)", row)

    def remove(self, key: str, now: float) -> bool:
        """Also what has expired is swept here and in `count`. Whether the session was live."""
        self._db.execute("DELETE FROM document WHERE expires_at <= ?", (now,))
        return self._db.execute("DELETE FROM document WHERE key = ?", (key,)).rowcount > 0

    def count(self, group: str, now: float) -> int:
        """Live sessions of this group."""
        self._db.execute("DELETE FROM document WHERE expires_at <= ?", (now,))
        query = "SELECT count(*) FROM document WHERE instr(groups, ?)"
        number: int = self._db.execute(query, (_lines([group]),)).fetchone()[0]
        return number

    def versions(self, keys: Iterable[str]) -> dict[str, int]:
        """What changes with every change of a session; those that are gone have none."""
        query = "SELECT key, version FROM document WHERE key IN (SELECT value FROM json_each(?))"
        return dict(self._db.execute(query, (json.dumps(list(keys)),)).fetchall())

    # ---- leases

    def grant(self, node: str, until: float) -> None:
        self._db.execute("INSERT OR REPLACE INTO node VALUES (?, ?)", (node, until))

    def release(self, node: str) -> None:
        self._db.execute("DELETE FROM node WHERE name = ?", (node,))

    def live(self, now: float) -> set[str]:
        return {name for (name,) in self._db.execute("SELECT name FROM node WHERE until > ?", (now,))}

    def close(self) -> None:
        self._db.close()


def _lines(groups: Iterable[str]) -> str:
    return "\n".join(["", *groups, ""])


# ---- the store


class DocumentStore:
    """The protocol `nonstick.store.Store`.

    Args:
        path: The file that all processes share.
        clock: The store's clock. It has to be the same for all processes: a server's own is better than `time.time`.
    """

    def __init__(self, path: str, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        # One thread, one connection: calls take their turns, and one whose caller was cancelled runs on, unheard.
        self._thread: ThreadPoolExecutor | None = None
        self._database: Database | None = None
        self._watches: dict[object, tuple[str, Wake]] = {}
        self._seen: dict[object, int | None] = {}
        self._polling: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"document:///{self._path}"

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "store")
        return self  # does not connect: the first call does, and every call tries again

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._watches.clear()
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait([self._polling])
        assert self._thread is not None
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()

    async def _call(self, work: Callable[[Database, float], T], *, write: bool = True) -> T:
        """What `work` returns, which gets the database and the store's time, and changes all or nothing.

        Raises:
            StoreUnavailable: For all that the database itself refuses. Never anything else of its errors.
        """

        def connected() -> T:
            if self._database is None:
                self._database = Database(self._path)
            database = self._database
            if not write:
                return work(database, self._clock())
            return database.change(lambda: work(database, self._clock()))

        assert self._thread is not None, "the store is not entered"
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, connected)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{self.url}: {error}") from error

    def _disconnect(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    async def _change(self, key: str, work: Callable[[Session, float], T]) -> T:
        """Loads the session, does `work` on it and saves it, in one step.

        Raises:
            SessionNotFound: There is none, or it has expired.
        """

        def changed(database: Database, now: float) -> T:
            session = _get(database, key, now)
            result = work(session, now)
            database.put(key, session)
            return result

        return await self._call(changed)

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        def work(database: Database, now: float) -> None:
            if database.get(key, now) is not None:
                raise AlreadyExists
            for group, most in (limits or {}).items():
                if database.count(group, now) >= most:
                    raise TooManySessions(group)
            session = Session(lifetime, now + lifetime, list(limits or ()))
            session.set_fields(fields)
            database.put(key, session)

        await self._call(work)

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        loaded, stale = await self._call(lambda database, now: load(_get(database, key, now), now), write=False)
        if stale and renew:
            loaded, _ = await self._change(key, load)
        return loaded

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        return await self._change(key, lambda session, now: update(session, now, changes, expect or {}, lifetime))

    async def touch(self, keys: Collection[str]) -> None:
        for key in keys:
            try:
                await self._change(key, Session.renew)
            except SessionNotFound:
                pass

    async def delete(self, key: str) -> bool:
        return await self._call(lambda database, now: database.remove(key, now))

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        return await self._change(key, lambda session, now: append(session, now, batch))

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        if not 1 <= limit <= MAX_READ or not 1 <= max_bytes <= MAX_READ_BYTES:
            raise ValueError(f"limit must be 1 to {MAX_READ}, max_bytes 1 to {MAX_READ_BYTES}")
        return await self._call(
            lambda database, now: read(_get(database, key, now), after, limit, max_bytes), write=False
        )

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        if not 1 <= limit <= MAX_READ or not 0 <= clip <= MAX_CLIP:
            raise ValueError(f"limit must be 1 to {MAX_READ}, clip 0 to {MAX_CLIP}")
        return await self._call(lambda database, now: skim(_get(database, key, now), after, limit, clip), write=False)

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        try:
            await self._change(key, lambda session, _: trim(session, streams, standalone_before))
        except SessionNotFound:
            pass

    # ---- watches

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        watch = object()
        self._watches[watch] = (key, wake)
        if self._polling is None:
            self._polling = asyncio.get_running_loop().create_task(self._poll())

        def stop() -> None:
            self._watches.pop(watch, None)
            self._seen.pop(watch, None)

        return stop

    async def _poll(self) -> None:
        """Wakes each watch once it is seen for the first time, and whenever its session's version is another one."""
        while self._watches:
            watches = dict(self._watches)
            keys = {key for key, _ in watches.values()}
            try:
                versions = await self._versions(keys)
            except StoreUnavailable:
                self._seen.clear()  # an interruption: all shall read
            else:
                self._wake(watches, versions)
            await asyncio.sleep(POLL_SECONDS)
        self._polling = None

    async def _versions(self, keys: set[str]) -> Mapping[str, int]:
        return await self._call(lambda database, _: database.versions(keys), write=False)

    def _wake(self, watches: dict[object, tuple[str, Wake]], versions: Mapping[str, int]) -> None:
        for watch, (key, wake) in watches.items():
            version = versions.get(key)
            if watch in self._watches and (watch not in self._seen or self._seen[watch] != version):
                self._seen[watch] = version
                # "Read". A store that knows them may say the new events, after the entry that they follow: `News`.
                wake(None)

    # ---- nodes and the store itself

    def lease(self, node: str) -> Lease:
        return _Lease(self._path, self._clock, node)

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        return set(nodes) - await self._call(lambda database, now: database.live(now), write=False)

    async def ping(self) -> None:
        # A write: a full disk would answer a read as if all were well.
        await self._call(lambda database, now: database.grant("ping", now))


def _get(database: Database, key: str, now: float) -> Session:
    session = database.get(key, now)
    if session is None:
        raise SessionNotFound
    return session


class _Lease:
    """Called from a thread of its own, so with a connection of its own."""

    def __init__(self, path: str, clock: Callable[[], float], node: str) -> None:
        self._path = path
        self._clock = clock
        self._node = node
        self._database: Database | None = None

    def renew(self, seconds: float) -> None:
        try:
            if self._database is None:
                self._database = Database(self._path)
            self._database.grant(self._node, self._clock() + seconds)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"the lease was not renewed: {error}") from error

    def close(self, *, release: bool) -> None:
        database, self._database = self._database, None
        if database is None:
            return
        try:
            if release:
                database.release(self._node)
        except sqlite3.Error:
            pass  # it runs out by itself
        database.close()
