"""What a session's log brings to this node: the one loop that follows it, and what is told, by an event's kind.

- A task that waits for something opens the inbox, and closes it again. The log is followed while the inbox is open.
- A session has a handler for each kind that it heeds. An event may come to it twice: once the store has lost entries,
  the whole log is read again. Seen again, a reply or a cancel does nothing; missed, somebody would wait for
  ever.
- Whatever holds the session registers as its holder (`placement="owner"`), and gets each event once at most. What came
  before a loss, or before it began to hold the session, it learns from the log by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from nonstick.core.events import Kind, kind_of
from nonstick.errors import Diverged, SessionNotFound, StoreUnavailable
from nonstick.log.session_log import SessionLog
from nonstick.log.survey import note_unreadable
from nonstick.session.cancels import Cancels
from nonstick.store import Cursor, Event
from nonstick.waiting.tasks import Spawn

__all__ = ["Handlers", "Holder", "Inbox", "Subject", "opened_later"]

_RETRY_PAUSE: Final = 1.0
"""Seconds between two tries to read from a store that cannot be reached."""


class Subject(Protocol):
    """A session, as its inbox knows it."""

    log: SessionLog

    def inbox_start(self) -> Cursor:
        """From where on what comes may concern what runs here."""
        ...

    def prove_life(self) -> None:
        """The store has lost entries of the log."""
        ...

    def end_soon(self) -> None:
        """The log has come to its end, and with it the session."""
        ...


S = TypeVar("S", bound=Subject)

Handlers = Mapping[Kind, Callable[[S, Event], None]]
"""Of each kind that is heeded, what is done about one event. What that raises is logged, and keeps no other event from
those who wait for it."""


class Holder(Protocol):
    """Who holds the session on this node."""

    def hear(self, kind: Kind, event: Event, /) -> None:
        """The log brought this event, which is new. Events that are heeded by others do not come here."""
        ...

    async def is_over(self, events: Sequence[Event], /) -> bool:
        """Whether another node holds the session by now, as these events may say: then none of them is for this one.

        Raises:
            SessionNotFound: The session has ended.
        """
        ...

    async def catch_up(self) -> Cursor:
        """The store lost entries: finds out what is in the log. Returns up to where, which is not new any more.

        Raises:
            SessionNotFound: The session has ended.
        """
        ...


class Inbox(Generic[S]):
    """Follows a session's log while anybody waits for what it brings.

    Args:
        session: Hears of each event by one of the handlers, maybe twice.

    Attributes:
        cancels: Of the requests that run here.
    """

    __slots__ = (
        "_at",
        "_following",
        "_handlers",
        "_holder",
        "_news_after",
        "_session",
        "_spawn",
        "_stays_open",
        "_waiting",
        "cancels",
    )

    def __init__(self, session: S, handlers: Handlers[S], cancels: Cancels, spawn: Spawn) -> None:
        self.cancels = cancels
        self._session = session
        self._handlers = handlers
        self._spawn = spawn
        self._holder: Holder | None = None
        self._news_after = 0
        """Up to this position nothing is new to the holder."""
        self._waiting = 0
        """Calls of `open` and `hold` that were not undone yet."""
        self._stays_open = False
        self._at = 0
        """The position up to which it has delivered."""
        self._following: asyncio.Task[None] | None = None

    # ---- what waits

    def open(self) -> None:
        """Follows the log while anything here needs it: until each `open` was undone by a `close`.

        It begins where the earliest of the requests that run here loaded its record.
        """
        self._waiting += 1
        if self._following is None:
            self._begin(self._session.inbox_start())

    def close(self) -> None:
        """Undoes one `open`."""
        self._waiting -= 1
        if not self._waiting:
            self.stop()

    def stay_open(self) -> None:
        """Follows the log until `stop`: something is owed when the session ends, wherever that is."""
        if not self._stays_open:
            self._stays_open = True
            self.open()

    def stop(self) -> None:
        """Follows the log no more, even if something waits."""
        if self._following is not None:
            self._following.cancel()
            self._following = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The inbox is open while the block runs."""
        self.open()
        try:
            yield
        finally:
            self.close()

    def hold(self, holder: Holder, after: Cursor) -> None:
        """From here on, what comes after this place is new to this holder."""
        self._holder, self._news_after = holder, after.position
        self._waiting += 1
        if self._following is None:
            self._begin(after)
        elif after.position < self._at:
            self.stop()
            self._begin(after)

    def release(self, holder: Holder) -> None:
        """Undoes `hold`, if this is still the holder."""
        if self._holder is holder:
            self._holder = None
            self.close()

    # ---- following

    def _begin(self, after: Cursor) -> None:
        if not self._session.log.follower.ended:
            self._at = after.position
            self._following = self._spawn(self._follow(after))

    async def _follow(self, after: Cursor) -> None:
        follower = self._session.log.follower
        subscription = follower.subscribe(after)
        try:
            while True:
                try:
                    events = await subscription.next()
                except StoreUnavailable:
                    await asyncio.sleep(_RETRY_PAUSE)
                except Diverged:
                    subscription.close()
                    self._session.prove_life()
                    if (holder := self._holder) is not None:
                        self._news_after = (await holder.catch_up()).position
                    subscription = follower.subscribe(Cursor(0))
                else:
                    await self.deliver(events)
        except SessionNotFound:
            # Not in this task, which the end cancels.
            self._session.end_soon()
        finally:
            subscription.close()

    async def deliver(self, events: Sequence[Event]) -> None:
        """Tells of these events whom they concern, in their order."""
        if (holder := self._holder) is not None and await holder.is_over(events):
            self.release(holder)
        for event in events:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        self._at = event.position
        kind = kind_of(event.data)
        if kind is None:
            return
        try:
            if (handle := self._handlers.get(kind)) is not None:
                handle(self._session, event)
            elif self._holder is not None and event.position > self._news_after:
                self._holder.hear(kind, event)
        except Exception as error:
            # It must not keep the next from those who wait for it (P4, P5).
            note_unreadable(self._session.log.key, event, error)


@contextlib.contextmanager
def opened_later(inbox: Callable[[], Inbox[Any]], window: float) -> Iterator[None]:
    """As `Inbox.opened`, from when so many seconds have passed: most work is done by then."""
    with contextlib.ExitStack() as stack:
        timer = asyncio.get_running_loop().call_later(window, lambda: stack.enter_context(inbox().opened()))
        stack.callback(timer.cancel)
        yield
