"""The store protocol: a session is a small record plus an ordered log. These docstrings are the specification.

Words (docs/glossary.md): an *event* is one immutable entry of a session's log; its *position* is an int from 1,
without gaps, assigned by the append; its *tag* is 8 random bytes, chosen by the writer. A *stream* is named by the
position of its `opened` event; 0 is the session's standalone stream, to which everything belongs that is not one
POST's. A *writer* is one that appends, with at most one append outstanding, numbered by its own sequence from 1.

Rules for every method:

* A `key` names a session: the hash of its id (`security.session_key`), visible ASCII, at most 64 characters. The store
  never sees the id itself (P13).
* Only the store's clock decides expiry. An expired session is indistinguishable from one that never existed.
* `SessionNotFound` makes a client drop its session, so it is raised only on the word of a server that can know (P15):
  not of one that was replaced and has not noticed, nor of one that came back without its data. Until that is certain,
  the call raises `StoreUnavailable`. The same holds for each other answer that says that something is not there.
* A failure to reach the store, or to hear its answer, raises `StoreUnavailable` and nothing else. A write then has
  an unknown outcome. Every write here may be repeated as it was, with the same arguments: that is how the outcome is
  learned.
* A cancelled call also has an unknown outcome, and must not disturb any other call.
* A call that need not wait may return without ever suspending: a loop of calls has to yield by itself.
* Methods are atomic: another node sees all of a call's effects or none.

The published suite `nonstick.testing.contract.suite` holds an implementation to all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

__all__ = [
    "CANCEL_SECONDS",
    "EMPTY_GRACE_SECONDS",
    "FRESH_SHARE",
    "MAX_CANCELS",
    "MAX_CLIP",
    "MAX_PLACES",
    "MAX_READ",
    "MAX_READ_BYTES",
    "NEW_STREAM",
    "STANDALONE",
    "WRITER_SECONDS",
    "Appended",
    "Batch",
    "Cursor",
    "Draft",
    "Event",
    "Lease",
    "Loaded",
    "News",
    "Skimmed",
    "Store",
    "TellsStale",
    "Wake",
]

STANDALONE = 0
"""The stream of everything that is not one POST's."""

NEW_STREAM = -1
"""As `Batch.stream`: the batch opens a stream, named by the position of its first event."""

CANCEL_SECONDS = 60
"""How long a cancel stays in the record, to catch a request that it overtook."""

MAX_CANCELS = 128
"""How many cancels a record keeps: a client may send them without end (P10)."""

WRITER_SECONDS = 120
"""How long a store remembers an idle writer at least. A writer gives up its retries well before that."""

MAX_READ = 1000
"""The largest `limit` that `read` and `skim` take."""

MAX_READ_BYTES = 1024 * 1024
"""The largest `max_bytes` that `read` takes: a thousand events may be gigabytes, and fetching them at once holds
everybody up, in the store as in the node (P10)."""

MAX_CLIP = 1024
"""The largest `clip` that `skim` takes: with `MAX_READ` events about as much as one `read` gives."""

MAX_PLACES = 128
"""The most places that one `stale` is asked about."""

EMPTY_GRACE_SECONDS = 15.0
"""How long a store that seems to have lost all of its data is not believed, unless it is told otherwise (P15)."""

FRESH_SHARE = 0.1
"""`load` renews the expiry only when more than this share of the lifetime has passed (a write saved per request)."""


class Cursor(NamedTuple):
    """A place in a log: just after the entry at `position`, which must still carry `tag`.

    Position 0 is the beginning, before any entry, and its tag is empty. An empty tag elsewhere means "do not check".
    """

    position: int
    tag: bytes = b""


class Draft(NamedTuple):
    """An event to append: its writer's random `tag` (8 bytes) and its bytes (`events.py` gives them meaning)."""

    tag: bytes
    data: bytes


class Event(NamedTuple):
    """One immutable entry of a log."""

    position: int
    tag: bytes
    stream: int
    data: bytes

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.position, self.tag)


class Skimmed(NamedTuple):
    """One entry of a log as `skim` shows it.

    Attributes:
        event: Its data are the first `clip` bytes alone.
        size: Bytes of data that it has in all.
    """

    event: Event
    size: int


class Loaded(NamedTuple):
    """What `load` answers.

    Attributes:
        fields: The record, all of its fields.
        head: Cursor of the last entry that was ever appended; `Cursor(0)` while there was none. If `trim` has dropped
            the entry since, the position is still its, and the tag may be empty.
        cancels: Request keys of the cancels that were left within the last `CANCEL_SECONDS`, the last `MAX_CANCELS`.
        size: Bytes of event data that the session's log holds, as in `Appended`.
        count: Events that it holds.
    """

    fields: dict[str, bytes]
    head: Cursor
    cancels: frozenset[str]
    size: int = 0
    count: int = 0  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one append writes, all or nothing: events, and what else changes in the same step.

    Most batches have `events`, `writer`, `sequence` and `stream` alone. The others are about the stream's life
    (`attempt`, `take_over`, `terminal`), the pending set (`expect`, `answers`, `settle`), the record's cancels
    (`cancel`, `uncancel`) and its `fields`; each stands for itself.

    Attributes:
        events: One or more drafts, except where only `settle`, `uncancel` or `fields` is wanted: then none.
        writer: Random name of the writer, or "" for a batch that may harmlessly be written twice.
        sequence: 1 for the writer's first append, then one more each time. Ignored without a writer.
        stream: `STANDALONE`, `NEW_STREAM`, or the position that names an open stream.
        attempt: The writer's attempt at that stream, from 1. Ignored on the standalone stream. With `NEW_STREAM` the
            stream starts at this attempt.
        take_over: The stream's attempt must be `attempt`, and becomes `attempt + 1` in this step (P7).
        terminal: The last event ends the stream; later appends to it get `StreamClosed`.
        expect: Ids of server requests to put into the session's pending set.
        answers: Id that must be in the pending set, else `NotPending` and nothing is written. It stays there.
        settle: Id to take out of the pending set; it must be there, else `NotPending` and nothing is written.
        cancel: Request key, of at most 64 characters, to leave in the record for `CANCEL_SECONDS`. Beyond
            `MAX_CANCELS` the oldest are dropped, in this step; which ones, where the store's clock tells no difference,
            is open, but never this one.
        uncancel: Request key whose cancel is taken out of the record.
        fields: Record fields to set, or with None to remove, in the same step.
    """

    events: Sequence[Draft]
    writer: str = ""
    sequence: int = 0
    stream: int = STANDALONE
    attempt: int = 1
    take_over: bool = False
    terminal: bool = False
    expect: Sequence[str] = ()
    answers: str | None = None
    settle: str | None = None
    cancel: str | None = None
    uncancel: str | None = None
    fields: Mapping[str, bytes | None] = field(default_factory=dict[str, "bytes | None"])


class Appended(NamedTuple):
    """What `append` answers.

    Attributes:
        first: Position of the batch's first event; the others follow without a gap. The log's head if it had none.
        duplicate: This (writer, sequence) had been written before; `first` is from then and nothing was written now.
        size: Bytes of event data that the session's log now holds (tags and overhead not counted).
        count: Events that the session's log now holds.
    """

    first: int
    duplicate: bool
    size: int
    count: int  # type: ignore[assignment]


class News(NamedTuple):
    """What a wake says was appended, and what it follows: only so can it be told whether it continues a log (P14).

    Attributes:
        after: Cursor of the entry just before the first of these events, whether `trim` has dropped it since or not;
            `Cursor(0)` if there never was one.
        events: One or more, one after the other, without a gap.
    """

    after: Cursor
    events: Sequence[Event]

    def since(self, place: Cursor) -> Sequence[Event] | None:
        """What of this comes after a place, which may be nothing; None unless exactly that entry is before it.

        A position alone proves nothing: after a failover, another entry may have it.
        """
        if place.position and not place.tag:
            return None
        before = [self.after, *(event.cursor for event in self.events)]
        if place not in before:
            return None
        rest = self.events[before.index(place) :]
        gapless = all(event.position == place.position + n for n, event in enumerate(rest, 1))
        return rest if gapless else None


Wake = Callable[["News | None"], None]
"""A hint that something was appended to a watched log, or that its session ended.

Called in the event loop's thread. With news: these events were appended, in this order, after the entry that they name.
With None: read. May be lost, repeated, reordered, or wrong: a wake comes over a channel that others may reach, or from
a server that does not know yet that it was replaced. So only `read` is truth, and news are taken only where they
continue exactly the entry that is there (P14). A store that cannot name that entry, or whose channel anybody may use,
says None.
Must not raise and must not block.
"""


class Lease(Protocol):
    """A node's lease, kept from a thread of its own: these calls block, and share nothing with the event loop."""

    def renew(self, seconds: float) -> None:
        """The node is alive for `seconds` from now, by the store's clock.

        Raises:
            StoreUnavailable: Also when the store did not answer within a few seconds.
        """
        ...

    def close(self, *, release: bool) -> None:
        """Closes the connection; with `release` ends the lease first, if the store can be reached. Never raises."""
        ...


class Store(Protocol):
    """Where sessions live. One instance per process, opened and closed in one event loop."""

    @property
    def url(self) -> str:
        """Where it is, without any credentials: fit for logs."""
        ...

    async def __aenter__(self) -> Self:
        """Prepares to work. Does not fail when the store cannot be reached: the first calls do (P9)."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Closes every connection and ends every task that this instance started."""
        ...

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        """Makes the session visible, with these fields, for `lifetime` seconds from now.

        Args:
            fields: Names are visible ASCII, at most 512 characters; values any bytes.
            lifetime: Seconds, positive. Kept with the session: every touch grants it again.
            limits: Groups that the session belongs to until it ends, each with the number of live sessions that
                the group may hold, this one included. Group names are visible ASCII, at most 128 characters. Counts
                are exact at one store and may be exceeded by the creates that are under way at once.

        Raises:
            AlreadyExists: A live session has this key. A repeated create gets it too.
            TooManySessions: A group is full. Nothing is evicted for it.
        """
        ...

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        """The record, the log's head and the recent cancels, in one round trip; renews the expiry if it is time.

        Renews when more than `FRESH_SHARE` of the lifetime has passed since the last renewal, else writes nothing.

        Args:
            renew: False for what the client has no part in: nothing is renewed.

        Raises:
            SessionNotFound: No live session has this key.
        """
        ...

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        """Sets fields, or with None removes them, if every field in `expect` has that value (None: is absent).

        Args:
            lifetime: Seconds, not fewer than before: the session's lifetime from now on, granted in this step as a
                touch grants it. Without it an update does not renew the expiry.

        Returns:
            Whether it was written. False means that `expect` did not hold, and nothing changed.

        Raises:
            SessionNotFound: No live session has this key. An update never brings one back.
        """
        ...

    async def touch(self, keys: Collection[str]) -> None:
        """Renews the expiry of those of these sessions that are live; the others are ignored."""
        ...

    async def delete(self, key: str) -> bool:
        """Ends the session: record, log and all, and wakes its watchers. Returns whether it was live.

        From then on every method answers `SessionNotFound` for this key, on every node.
        """
        ...

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        """Writes the batch at the end of the log, or nothing of it; wakes the watchers.

        A sequence that is not above its writer's last is a duplicate and is not written: that check comes first. For
        the last one the answer is the position from then, whatever has happened to the stream and the pending set
        since; for an older one it may be that of a later append. A writer is remembered for `WRITER_SECONDS` after
        its last append and, if it wrote to a stream of its own, while that stream is kept. A refused append has not
        used its number up. An append does not renew the session's expiry.

        Raises:
            SessionNotFound: No live session has this key.
            StreamClosed: The stream has ended or is not known.
            Fenced: The stream's attempt is not `batch.attempt`.
            NotPending: See `Batch.answers` and `Batch.settle`.
            Diverged: The stream is a POST's that was opened before, and the writer's last sequence, 0 if there is
                none, is not the one before this: the store lost appends of this writer (P9).
        """
        ...

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        """Committed events after `after`, oldest first, without gaps but for what `trim` took out (P3).

        Args:
            after: Exclusive.
            limit: Events, 1 to `MAX_READ`. Fewer may come; none come only at the end of the log.
            max_bytes: Of the events' data together, 1 to `MAX_READ_BYTES`: it ends before the event with which they
                would be more. The first one comes however large it is.

        Raises:
            SessionNotFound: No live session has this key.
            Trimmed: The entry at the cursor was dropped by `trim`. Not raised for a cursor without a tag, which
                reads on from the next entry that is left.
            Diverged: The cursor is beyond the log's end, or the entry there carries another tag.
        """
        ...

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        """As `read`, with the first `clip` bytes of each event alone: for looking for something in a whole log.

        Args:
            after: Exclusive.
            limit: Events, 1 to `MAX_READ`. Fewer may come; none come only at the end of the log.
            clip: Bytes, 0 to `MAX_CLIP`.

        Raises:
            SessionNotFound, Trimmed, Diverged: As `read`.
        """
        ...

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        """Drops events: all of the closed `streams`, and those of the standalone stream before a position (exclusive).

        Positions are never given out again. Streams that are open or unknown are passed over, and so is a
        session that has ended.
        """
        ...

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        """Has `wake` called for what is appended to this log from now on, and for the session's end.

        Returns at once, with the function that stops it. `wake(None)` is called once the watch is in force, and
        again after every interruption, so that one `read` at each call leaves no window. Several watches of one log
        in one process are independent. Does not raise; does not check that the session exists.
        """
        ...

    # ---- nodes and the store itself

    def lease(self, node: str) -> Lease:
        """A lease for this node, on a connection of its own. Does not connect yet."""
        ...

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        """Those of these nodes whose lease has run out, by the store's clock, or that never had one."""
        ...

    async def ping(self) -> None:
        """One round trip.

        Raises:
            StoreUnavailable: The store cannot be reached or cannot be written to.
        """
        ...


class TellsStale(Protocol):
    """What a store may have beside `Store`, so that a node need not read each of the logs in which nothing happens."""

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        """The keys of those of these logs, at most `MAX_PLACES`, whose end may not be at the place given: to be read.

        A key is left out only if its session is live and the log's last entry, dropped by `trim` or not, stands at that
        position with that tag, if one is given; at position 0, if there was no entry. In doubt it is named, and `read`
        tells what is true: so "gone" needs no proof here (P15). Renews no expiry. Each log is looked at for itself;
        `StoreUnavailable` is raised only where nothing is known of any of them.
        """
        ...
