"""What all connections that read a stream share: a task feeds the outlet from the log, the ASGI task pumps it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Final, TypeVar

from mcp_types.version import is_version_at_least
from starlette.types import Receive

from nonstick.core.event_ids import EventId
from nonstick.core.events import body_of
from nonstick.core.sse import sse_frame, sse_priming, sse_retry
from nonstick.errors import SessionNotFound, StoreUnavailable, without_text
from nonstick.log.follow import Subscription
from nonstick.session.answer import Outcome
from nonstick.session.live import LiveSession
from nonstick.session.outlet import Mark, Outlet
from nonstick.store import Cursor, Event
from nonstick.waiting import background
from nonstick.waiting.deadline import Deadline
from nonstick.waiting.retry import retry_until_answered

__all__ = ["Following", "Reader"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

LIVENESS_POLL: Final = 1.5
"""Seconds of silence after which it is looked whether the node that should write still lives."""


class Reader(ABC):
    """A connection that carries a stream: a task feeds the outlet from the log, the ASGI task pumps it."""

    # There may be thousands, most of them silent.
    __slots__ = ("_place", "_primes", "_tasks", "began", "outlet", "session", "stays")

    def __init__(self, session: LiveSession, place: EventId | None) -> None:
        self.session = session
        self._place = place
        self._primes = is_version_at_least(session.record.protocol_version, "2025-11-25")
        """The client understands a priming event."""
        settings = session.services.settings
        self.outlet = Outlet(
            patience=settings.send_timeout,
            ping=settings.ping_interval,
            until_closing=session.services.drain.until_closing,
        )
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        """What runs between `begin` and `end`."""
        self.stays = False
        """Its client could not come back, so that a drain waits for its end."""
        self.began = asyncio.get_running_loop().time()
        """In the loop's time."""

    @abstractmethod
    async def prepare(self) -> None:
        """Reads what it needs before its response begins.

        Raises:
            Refusal: It cannot be served.
            SessionNotFound, StoreUnavailable: As `Store.read`.
        """

    async def begin(self, receive: Receive) -> Outcome:
        """Begins to fill the outlet: until the stream or the session ends, or the client goes. Returns what to respond.

        Whatever comes of it, call `end` when the response is over.
        """
        services = self.session.services
        services.readers.add(self)
        self.prime()
        if services.drain.begun:
            self.hand_over()
        spawn = services.tasks.spawn
        self.session.__enter__()
        self._tasks = spawn(self._feed()), spawn(self._watch(receive), copy_context())
        return self.outlet

    async def end(self) -> None:
        """The response is over, or there was none."""
        if self._tasks:
            self.session.__exit__()
            self.session.services.readers.discard(self)
            self.outlet.leave()
            for task in self._tasks:
                task.cancel()
            await self.gone()

    @property
    def key(self) -> str:
        """Of the session."""
        return self.session.key

    def shows_client(self, now: float) -> bool:
        """Whether the client is there, as far as its connection tells."""
        return not self.outlet.gone and now - self.began < self.session.services.settings.connection_lifetime

    async def gone(self) -> None:  # noqa: B027 - most have nothing to do
        """The connection has ended."""

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.outlet.leave()

    async def _feed(self) -> None:
        try:
            await self.feed()
        except SessionNotFound:
            # The end of the session is the end of its streams.
            pass
        except Exception as error:
            logger.error("session %s: a stream broke off", self.session.key[:12], exc_info=without_text(error))
        finally:
            self.outlet.end()

    @abstractmethod
    async def feed(self) -> None:
        """Puts everything that the client is to get, in order. Returns at the stream's end."""

    def prime(self) -> None:
        """Gives the client the id again that it came with.

        There are clients that come back with an id only if the connection that broke brought one. They shall not lose
        their place because the connection brought nothing else (P3).
        """
        if self._primes and self._place is not None:
            self.put_priming(self._place)

    def put_priming(self, place: EventId) -> None:
        frame = sse_priming(place.seal(self.session.id), self.session.services.settings.retry_interval)
        self.outlet.put(frame, self.mark(place.cursor.position))

    def mark(self, position: int) -> Mark:
        """How far a frame for what is at this position brings the client."""
        return Mark(position)

    def hand_over(self) -> None:
        """The node stops: the client is told to come back, and the connection is closed (P8)."""
        self.outlet.put(sse_retry(self.session.services.settings.retry_interval))
        self.outlet.end()

    def cut_off(self) -> None:
        """The grace period is over: one that `stays` ends now."""
        self.outlet.end()

    async def until_answered(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeats the call until the store answers: a stream that has begun cannot tell its client of an error."""
        return await retry_until_answered(call, pause=LIVENESS_POLL)

    def follow(self, after: Cursor) -> contextlib.closing[Following]:
        return contextlib.closing(Following(self.session.log.follower.subscribe(after)))

    async def put(self, event: Event, event_id: EventId) -> None:
        """Takes a message as soon as the client has taken enough of those before."""
        await self.outlet.room()
        frame = sse_frame(event_id.seal(self.session.id), body_of(event.data))
        self.outlet.put(frame, self.mark(event.position))


class Following:
    """A place in the log, from which a reader takes what comes, and looks around when nothing does."""

    __slots__ = ("_next", "_subscription")

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._next: asyncio.Task[list[Event]] | None = None

    async def next(self, silence: float | None = None) -> list[Event]:
        """The next events; none after so many seconds of silence.

        Args:
            silence: None for as long as it takes until it is looked whether a node still lives.

        Raises:
            SessionNotFound, Diverged: As `Subscription.next`.
        """
        silence = LIVENESS_POLL if silence is None else silence
        if self._next is None:
            try:
                with Deadline(silence):
                    await self._subscription.wait()
            except TimeoutError:
                return []
            if events := self._subscription.take():
                return events
            self._next = background.spawn(self._subscription.next())
        # A read of a slow store goes on beyond this call: begun anew each time, it would never come to its end.
        await asyncio.wait([self._next], timeout=silence)
        if not self._next.done():
            return []
        done, self._next = self._next, None
        try:
            return done.result()
        except StoreUnavailable:
            await asyncio.sleep(LIVENESS_POLL)
            return []

    def close(self) -> None:
        if self._next is not None:
            self._next.add_done_callback(_look_at)
            self._next.cancel()
        self._subscription.close()


def _look_at(task: asyncio.Task[list[Event]]) -> None:
    """Nobody asks any more how this ended."""
    if not task.cancelled():
        task.exception()
