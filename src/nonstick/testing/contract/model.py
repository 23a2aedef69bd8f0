"""The specification once more, on plain lists, in the shortest form that we know: no clock, no concurrency, no bytes.

Where two refusals apply at once, the specification leaves open which one is given, and so does the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nonstick.errors import (
    AlreadyExists,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StoreError,
    StreamClosed,
    Trimmed,
)
from nonstick.store import NEW_STREAM, STANDALONE, Appended, Batch, Cursor, Event, Loaded, Skimmed

__all__ = ["ModelSession", "ModelStore", "Refused"]


class Refused(Exception):
    """The model refuses, with any one of these errors."""

    def __init__(self, *errors: type[StoreError], oldest: int | None = None) -> None:
        super().__init__(*errors)
        self.errors = errors
        self.oldest = oldest


@dataclass
class ModelStream:
    """A stream: where it stands."""

    attempt: int
    closed: bool = False


class Written(NamedTuple):
    """A writer's last append."""

    batch: Batch
    first: int


@dataclass
class ModelSession:
    """A session: its record and its log, with all that was ever written to it."""

    fields: dict[str, bytes]
    written: list[Event] = field(default_factory=list[Event])
    dropped: set[int] = field(default_factory=set[int])
    streams: dict[int, ModelStream] = field(default_factory=dict[int, ModelStream])
    writers: dict[str, Written] = field(default_factory=dict[str, Written])
    pending: set[str] = field(default_factory=set[str])
    cancels: set[str] = field(default_factory=set[str])

    @property
    def log(self) -> list[Event]:
        return [event for event in self.written if event.position not in self.dropped]

    @property
    def end(self) -> int:
        return len(self.written)

    def appended(self, first: int, *, duplicate: bool) -> Appended:
        return Appended(first, duplicate, sum(len(event.data) for event in self.log), len(self.log))

    def change(self, changes: dict[str, bytes | None]) -> None:
        for name, value in changes.items():
            if value is None:
                self.fields.pop(name, None)
            else:
                self.fields[name] = value


class ModelStore:
    """The specification on lists, for one node and no clock."""

    def __init__(self) -> None:
        self.sessions: dict[str, ModelSession] = {}

    def session(self, key: str) -> ModelSession:
        if key not in self.sessions:
            raise Refused(SessionNotFound)
        return self.sessions[key]

    def create(self, key: str, fields: dict[str, bytes]) -> None:
        if key in self.sessions:
            raise Refused(AlreadyExists)
        self.sessions[key] = ModelSession(dict(fields))

    def load(self, key: str) -> Loaded:
        session = self.session(key)
        head = session.written[-1].cursor if session.written else Cursor(0)
        size = sum(len(event.data) for event in session.log)
        return Loaded(dict(session.fields), head, frozenset(session.cancels), size, len(session.log))

    def update(self, key: str, changes: dict[str, bytes | None], expect: dict[str, bytes | None]) -> bool:
        session = self.session(key)
        if any(session.fields.get(name) != value for name, value in expect.items()):
            return False
        session.change(changes)
        return True

    def delete(self, key: str) -> bool:
        return self.sessions.pop(key, None) is not None

    def append(self, key: str, batch: Batch) -> Appended:
        session = self.session(key)
        before = session.writers.get(batch.writer)
        if before is not None and before.batch.sequence == batch.sequence:
            return session.appended(before.first, duplicate=True)
        if errors := _refusals(session, batch):
            raise Refused(*errors)
        first = session.end + 1 if batch.events else session.end
        stream = first if batch.stream == NEW_STREAM else batch.stream
        session.written += [Event(first + n, tag, stream, data) for n, (tag, data) in enumerate(batch.events)]
        _move_stream(session, stream, batch)
        session.pending |= set(batch.expect)
        session.pending -= {batch.settle}
        session.cancels |= {batch.cancel} if batch.cancel else set()
        session.cancels -= {batch.uncancel}
        session.change(dict(batch.fields))
        if batch.writer:
            session.writers[batch.writer] = Written(batch, first)
        return session.appended(first, duplicate=False)

    def read(self, key: str, after: Cursor) -> list[Event]:
        session = self.session(key)
        log = session.log
        if after.position > session.end:
            raise Refused(Diverged)
        if after.tag and after.position in session.dropped:
            raise Refused(Trimmed, oldest=log[0].position if log else 0)
        if after.tag and session.written[after.position - 1].tag != after.tag:
            raise Refused(Diverged)
        return [event for event in log if event.position > after.position]

    def skim(self, key: str, after: Cursor, clip: int) -> list[Skimmed]:
        return [Skimmed(event._replace(data=event.data[:clip]), len(event.data)) for event in self.read(key, after)]

    def stale(self, places: dict[str, Cursor]) -> set[str]:
        return {key for key, place in places.items() if not self._ends_at(key, place)}

    def _ends_at(self, key: str, place: Cursor) -> bool:
        session = self.sessions.get(key)
        if session is None or session.end != place.position:
            return False
        return not place.tag or session.written[-1].tag == place.tag

    def trim(self, key: str, streams: list[int], standalone_before: int) -> None:
        session = self.sessions.get(key)
        for event in session.log if session else []:
            assert session is not None
            stream = session.streams.get(event.stream)
            old = event.stream == STANDALONE and event.position < standalone_before
            if old or (event.stream in streams and stream is not None and stream.closed):
                session.dropped.add(event.position)


def _refusals(session: ModelSession, batch: Batch) -> list[type[StoreError]]:
    errors: list[type[StoreError]] = []
    if batch.stream not in (STANDALONE, NEW_STREAM):
        stream = session.streams.get(batch.stream)
        if stream is None or stream.closed:
            errors.append(StreamClosed)
        if stream is not None and stream.attempt != batch.attempt:
            errors.append(Fenced)
    if any(name is not None and name not in session.pending for name in (batch.answers, batch.settle)):
        errors.append(NotPending)
    return errors


def _move_stream(session: ModelSession, stream: int, batch: Batch) -> None:
    if stream == STANDALONE:
        return
    if batch.stream == NEW_STREAM:
        session.streams[stream] = ModelStream(batch.attempt)
    session.streams[stream].attempt += batch.take_over
    session.streams[stream].closed |= batch.terminal
