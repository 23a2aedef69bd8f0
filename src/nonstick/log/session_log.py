"""One session's log, as a node writes and reads it."""

from __future__ import annotations

import time
from typing import NamedTuple

from nonstick.core.lazy import lazy
from nonstick.core.retention import Amount
from nonstick.errors import StoreUnavailable
from nonstick.log.follow import Follower
from nonstick.log.guard import GuardedStore, withheld
from nonstick.log.lookout import Lookout
from nonstick.log.lost import end_lost
from nonstick.log.trim import Trimmer, Trimming
from nonstick.log.writer import Sender
from nonstick.store import NEW_STREAM, Appended, Batch, Cursor, Loaded

__all__ = ["Logs", "SessionLog"]


class Logs(NamedTuple):
    """What a node has for the logs of all sessions.

    Attributes:
        lookout: Looks after those that are quiet here.
        here: The node's id.
    """

    store: GuardedStore
    trimming: Trimming
    lookout: Lookout
    here: str


class SessionLog:
    """One session's log.

    Args:
        logs: What the node has for all of them.
        key: The session's.

    Attributes:
        head: The end of the log when it was loaded last.
        loaded_at: Position of the log's end when this node loaded the session's record last.
        heard_at: When, by the monotonic clock, the session's client was last heard or seen at this node.
    """

    # What the lazy attributes keep goes into a dictionary, which most never need.
    __slots__ = ("__dict__", "_events", "_logs", "_size", "head", "heard_at", "key", "loaded_at")

    def __init__(self, logs: Logs, key: str) -> None:
        self.key = key
        self.head = Cursor(0)
        self.loaded_at = 0
        self.heard_at = 0.0
        self._logs = logs
        self._size = self._events = 0

    # Most requests end before they need these.

    @lazy
    def follower(self) -> Follower:
        """The one reader of the log on this node."""
        return Follower(self._logs.store, self._logs.lookout, self.key)

    @lazy
    def trimmer(self) -> Trimmer:
        """Keeps the log within its bounds (P10)."""
        return Trimmer(self._logs.trimming, self.key, Amount(self._size, self._events), end_lost=self._end_lost)

    @lazy
    def sender(self) -> Sender:
        """This node's writer of the standalone stream."""
        return Sender(self.append)

    def rest(self) -> None:
        """Nothing here writes to it until it is loaded again: what that needs is made anew then."""
        vars(self).clear()

    def refresh(self, loaded: Loaded) -> None:
        """The record was loaded for something that its client sent. A record that was loaded earlier may come later."""
        self.heard_at = time.monotonic()
        self.loaded_at = loaded.head.position
        if loaded.head >= self.head:
            self.head, self._size, self._events = loaded.head, loaded.size, loaded.count
            if "trimmer" in vars(self):
                self.trimmer.refresh(Amount(self._size, self._events))

    async def append(self, batch: Batch, *, patience: float | None = None) -> Appended:
        """As `Store.append`, and sees to the log's size afterwards (P10)."""
        try:
            appended = await self._logs.store.append(self.key, batch, patience=patience)
        except StoreUnavailable as error:
            raise withheld(error, "session %s", self.key[:12]) from None
        ended = None
        if batch.terminal:
            ended = appended.first if batch.stream == NEW_STREAM else batch.stream
        self.trimmer.note(appended, ended=ended)
        return appended

    async def _end_lost(self) -> bool:
        return await end_lost(self._logs.store, self.key, self.append, here=self._logs.here)
