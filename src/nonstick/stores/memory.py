"""A store in this process's memory: for tests, for one process, and as the readable model of the specification.

Every method runs from beginning to end without an await, which makes it atomic. Nodes that live in one process share
one instance.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Self

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
    MAX_CLIP,
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
    News,
    Skimmed,
    Wake,
)
from nonstick.stores.common.bounds import NOT_OPENED, check_bounds, check_places, fitting
from nonstick.stores.common.watches import Watches

__all__ = ["MemoryStore"]

_SWEEP_SECONDS = 10.0
"""Between two looks for expired sessions. A look costs time in proportion to the live sessions."""


@dataclass(slots=True)
class _Stream:
    attempt: int
    closed: bool = False


@dataclass(slots=True)
class _Writer:
    """What a writer wrote: sequence -> (first position, when), and the stream that it belongs to."""

    stream: int = STANDALONE
    wrote: dict[int, tuple[int, float]] = field(default_factory=dict[int, "tuple[int, float]"])

    @property
    def latest(self) -> int:
        return max(self.wrote, default=0)

    def first(self, sequence: int) -> int:
        """Where this append began; for one so old that it was forgotten, where the next one that is known began."""
        return self.wrote[min(known for known in self.wrote if known >= sequence)][0]

    def forget(self, before: float) -> None:
        """Keeps what is younger, and the latest, which shows that all lower sequences were written."""
        latest = self.latest
        self.wrote = {n: wrote for n, wrote in self.wrote.items() if n == latest or wrote[1] > before}


@dataclass(slots=True)
class _Session:
    fields: dict[str, bytes]
    lifetime: float
    expires_at: float
    groups: frozenset[str]
    tidied_at: float
    head: Cursor = field(default=Cursor(0))
    size: int = 0
    events: dict[int, Event] = field(default_factory=dict[int, Event])
    streams: dict[int, _Stream] = field(default_factory=dict[int, _Stream])
    writers: dict[str, _Writer] = field(default_factory=dict[str, _Writer])
    pending: set[str] = field(default_factory=set[str])
    cancels: dict[str, float] = field(default_factory=dict[str, float])


class MemoryStore:
    """Sessions in a dictionary.

    Args:
        clock: Seconds, never going backwards: the store's clock.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._groups: dict[str, set[str]] = {}
        self._swept_at = clock()
        self._watches = Watches[News]()
        self._nodes: dict[str, float] = {}
        self._nodes_lock = threading.Lock()
        self._entered = 0

    @property
    def url(self) -> str:
        return "memory:"

    async def __aenter__(self) -> Self:
        self._entered += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._entered -= 1
        if not self._entered:
            self._watches.clear()

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        now = self._now()
        if self._find(key) is not None:
            raise AlreadyExists
        for group, limit in (limits or {}).items():
            self._check_room(group, limit)
        groups = frozenset(limits or ())
        self._sessions[key] = _Session(dict(fields), lifetime, now + lifetime, groups, now)
        for group in groups:
            self._groups.setdefault(group, set()).add(key)

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        now, session = self._now(), self._get(key)
        if renew and session.expires_at - now < (1 - FRESH_SHARE) * session.lifetime:
            session.expires_at = now + session.lifetime
        cancels = frozenset(request for request, at in session.cancels.items() if now - at < CANCEL_SECONDS)
        return Loaded(dict(session.fields), session.head, cancels, session.size, len(session.events))

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        now, session = self._now(), self._get(key)
        if any(session.fields.get(name) != value for name, value in (expect or {}).items()):
            return False
        _change(session.fields, changes)
        if lifetime is not None:
            session.lifetime, session.expires_at = lifetime, now + lifetime
        return True

    async def touch(self, keys: Collection[str]) -> None:
        now = self._now()
        for key in keys:
            if (session := self._find(key)) is not None:
                session.expires_at = now + session.lifetime

    async def delete(self, key: str) -> bool:
        if self._find(key) is None:
            return False
        self._end(key)
        self._watches.announce(key, None)
        return True

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        now, session = self._now(), self._get(key)
        if now - session.tidied_at > WRITER_SECONDS:
            _tidy(session, now)
        writer = session.writers.get(batch.writer)
        if writer is not None and batch.sequence <= writer.latest:
            return Appended(writer.first(batch.sequence), True, session.size, len(session.events))
        _check(session, batch, 0 if writer is None else writer.latest)

        before = session.head
        first = before.position + 1 if batch.events else before.position
        stream = first if batch.stream == NEW_STREAM else batch.stream
        events = [Event(first + n, draft.tag, stream, draft.data) for n, draft in enumerate(batch.events)]
        for event in events:
            session.events[event.position] = event
            session.size += len(event.data)
            session.head = event.cursor
        _settle_stream(session, batch, stream)
        _settle_record(session, batch, now)
        if batch.writer:
            writer = session.writers.setdefault(batch.writer, _Writer())
            writer.wrote[batch.sequence] = (first, now)
            writer.stream = stream or writer.stream
        if events:
            self._watches.announce(key, News(before, events))
        return Appended(first, False, session.size, len(session.events))

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        check_bounds(limit=limit, max_bytes=max_bytes)
        return list(fitting(self._after(key, after, limit), max_bytes))

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        check_bounds(limit=limit, clip=clip)
        found = self._after(key, after, limit)
        return [Skimmed(event._replace(data=event.data[:clip]), len(event.data)) for event in found]

    def _after(self, key: str, after: Cursor, limit: int) -> list[Event]:
        session = self._get(key)
        if after.position > session.head.position:
            raise Diverged
        if after.position and after.tag:
            entry = session.events.get(after.position)
            if entry is None:
                raise Trimmed(min(session.events, default=0))
            if entry.tag != after.tag:
                raise Diverged
        # Positions were inserted in order, and a dictionary keeps that order.
        if len(session.events) == session.head.position:
            positions = range(after.position + 1, min(session.head.position, after.position + limit) + 1)
            return [session.events[position] for position in positions]
        later = (event for event in session.events.values() if event.position > after.position)
        return list(islice(later, limit))

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        session = self._find(key)
        if session is None:
            return
        ended = {name for name in streams if name in session.streams and session.streams[name].closed}
        for event in list(session.events.values()):
            if event.stream in ended or (event.stream == STANDALONE and event.position < standalone_before):
                del session.events[event.position]
                session.size -= len(event.data)
        for name in ended:
            del session.streams[name]

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        """See `nonstick.store.TellsStale`."""
        check_places(places)
        return {key for key, place in places.items() if not self._ends_at(key, place)}

    def _ends_at(self, key: str, place: Cursor) -> bool:
        session = self._find(key)
        return session is not None and session.head == Cursor(place.position, place.tag or session.head.tag)

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        watch, stop = self._watches.add(key, wake)
        watch.call_soon(None)
        return stop

    # ---- nodes and the store itself

    def lease(self, node: str) -> Lease:
        return _MemoryLease(self, node)

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        now = self._clock()
        with self._nodes_lock:
            return {node for node in nodes if self._nodes.get(node, now) <= now}

    async def ping(self) -> None:
        """There is nothing that could be unreachable."""

    # ---- inside

    def _now(self) -> float:
        now = self._clock()
        if now - self._swept_at > _SWEEP_SECONDS:
            self._sweep(now)
        return now

    def _sweep(self, now: float) -> None:
        """Drops what expired."""
        self._swept_at = now
        for key in [key for key, session in self._sessions.items() if session.expires_at <= now]:
            self._end(key)
        with self._nodes_lock:
            self._nodes = {node: until for node, until in self._nodes.items() if until > now}

    def _find(self, key: str) -> _Session | None:
        session = self._sessions.get(key)
        if session is not None and session.expires_at <= self._clock():
            self._end(key)
            return None
        return session

    def _get(self, key: str) -> _Session:
        session = self._find(key)
        if session is None:
            raise SessionNotFound
        return session

    def _end(self, key: str) -> None:
        for group in self._sessions.pop(key).groups:
            self._groups[group].discard(key)
            if not self._groups[group]:
                del self._groups[group]

    def _check_room(self, group: str, limit: int) -> None:
        if len(self._groups.get(group, ())) >= limit:
            self._sweep(self._clock())
        if len(self._groups.get(group, ())) >= limit:
            raise TooManySessions(group)

    def _grant(self, node: str, seconds: float) -> None:
        with self._nodes_lock:
            self._nodes[node] = self._clock() + seconds

    def _release(self, node: str) -> None:
        with self._nodes_lock:
            self._nodes.pop(node, None)


class _MemoryLease:
    def __init__(self, store: MemoryStore, node: str) -> None:
        self._store = store
        self._node = node

    def renew(self, seconds: float) -> None:
        self._store._grant(self._node, seconds)

    def close(self, *, release: bool) -> None:
        if release:
            self._store._release(self._node)


def _check(session: _Session, batch: Batch, latest: int) -> None:
    """Whether this batch may be written now, after the writer's `latest`; raises what `Store.append` raises."""
    if batch.stream == NEW_STREAM and not batch.events:
        raise ValueError(NOT_OPENED)
    if batch.stream > STANDALONE:
        stream = session.streams.get(batch.stream)
        if stream is None or stream.closed:
            raise StreamClosed
        if stream.attempt != batch.attempt:
            raise Fenced
        if batch.writer and batch.sequence != latest + 1:
            raise Diverged
    for request in (batch.answers, batch.settle):
        if request is not None and request not in session.pending:
            raise NotPending


def _settle_stream(session: _Session, batch: Batch, name: int) -> None:
    if name == STANDALONE:
        return
    stream = session.streams.setdefault(name, _Stream(batch.attempt))
    stream.attempt += batch.take_over
    stream.closed = batch.terminal


def _settle_record(session: _Session, batch: Batch, now: float) -> None:
    session.pending.update(batch.expect)
    if batch.settle is not None:
        session.pending.discard(batch.settle)
    if batch.cancel is not None:
        # The newest comes last.
        session.cancels.pop(batch.cancel, None)
        session.cancels[batch.cancel] = now
        while len(session.cancels) > MAX_CANCELS:
            del session.cancels[next(iter(session.cancels))]
    if batch.uncancel is not None:
        session.cancels.pop(batch.uncancel, None)
    _change(session.fields, batch.fields)


def _change(fields: dict[str, bytes], changes: Mapping[str, bytes | None]) -> None:
    for name, value in changes.items():
        if value is None:
            fields.pop(name, None)
        else:
            fields[name] = value


def _tidy(session: _Session, now: float) -> None:
    """Forgets writers that were idle for long and whose stream is gone, old appends of others, and old cancels."""
    session.tidied_at = now
    before = now - WRITER_SECONDS
    for name, writer in list(session.writers.items()):
        if writer.stream in session.streams:
            continue
        writer.forget(before)
        if writer.wrote[writer.latest][1] <= before:
            del session.writers[name]
    session.cancels = {request: at for request, at in session.cancels.items() if now - at < CANCEL_SECONDS}
