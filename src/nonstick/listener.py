"""One GET: what the client has not seen of a stream, then what comes, from any node (P3).

`Resumption` reads one POST's stream from an event id. `Listener` is a connection to the session's standalone stream,
of which there may be several: the log is the arbiter, so that two never carry the same new message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import anyio
import pydantic_core
from mcp_types import INTERNAL_ERROR, ErrorData
from starlette.types import Receive, Send

from nonstick import wire
from nonstick.errors import Diverged, SessionNotFound, StoreError, StoreUnavailable
from nonstick.events import EventId, Kind, body_of, decode, draft, kind_of
from nonstick.follow import Subscription
from nonstick.rescue import Rescue
from nonstick.session import Session, request_key
from nonstick.store import MAX_READ, STANDALONE, Batch, Cursor, Event

__all__ = ["Listener", "Resumption"]

logger = logging.getLogger(__name__)

_LEAVE_SECONDS: Final = 2.0

_LIVENESS_POLL: Final = 1.5
"""Seconds of silence after which it is looked whether the node that should write still lives."""


class Reader(ABC):
    """A connection that carries a stream: a task feeds the outlet from the log, the ASGI task pumps it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        settings = session.node.settings
        self.outlet = wire.Outlet(patience=settings.send_timeout, ping=settings.ping_interval)

    async def serve(self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Sends the stream until it ends, the session ends, or the client goes."""
        node = self.session.node
        node.readers.add(self)
        tasks = [node.spawn(self._feed()), node.spawn(self._watch(receive))]
        try:
            with self.session:
                await send({"type": "http.response.start", "status": 200, "headers": [*headers, *wire.SSE_HEADERS]})
                await self.outlet.pump(send)
        finally:
            node.readers.discard(self)
            self.outlet.leave()
            for task in tasks:
                task.cancel()

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
        except Exception:
            logger.exception("session %s: a stream broke off", self.session.key[:12])
        finally:
            self.outlet.end()

    @abstractmethod
    async def feed(self) -> None:
        """Puts everything that the client is to get, in order. Returns at the stream's end."""

    def hand_over(self) -> None:
        """The node stops: the client is told to come back, and the connection is closed (P8)."""
        self.outlet.put(wire.sse_retry(self.session.node.settings.retry_interval), self.outlet.sent)
        self.outlet.end()

    def follow(self, after: Cursor) -> contextlib.closing[Subscription]:
        return contextlib.closing(self.session.follower.subscribe(after))

    async def next(self, subscription: Subscription) -> list[Event]:
        """The next events; none after some silence.

        Raises:
            SessionNotFound, Diverged: As `Subscription.next`.
        """
        await self.outlet.room()
        try:
            async with asyncio.timeout(_LIVENESS_POLL):
                return await subscription.next()
        except TimeoutError:
            return []
        except StoreUnavailable:
            await asyncio.sleep(_LIVENESS_POLL)
            return []

    def put(self, event: Event, event_id: EventId) -> None:
        frame = wire.sse_frame(event_id.seal(self.session.id), body_of(event.data))
        self.outlet.put(frame, event.position)


async def _entry(session: Session, cursor: Cursor) -> list[Event]:
    """The entry that a client's event id names, and what follows it; empty if the store no longer has it."""
    events = await session.node.store.read(session.key, Cursor(cursor.position - 1), limit=MAX_READ)
    if not events or events[0].cursor != cursor:
        return []
    return events


class Resumption(Reader):
    """The rest of one POST's stream."""

    def __init__(self, session: Session, place: EventId) -> None:
        super().__init__(session)
        self._place = place
        self._events: list[Event] = []
        self._opened: Event | None = None

    async def prepare(self) -> None:
        """Reads what the log has.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.read`.
        """
        stream = self._place.stream
        self._events = await _entry(self.session, self._place.cursor)
        if not self._events:
            return
        first = self._events[0]
        if first.position != stream:
            found = await self.session.node.store.read(self.session.key, Cursor(stream - 1), limit=1)
            first = found[0] if found else first
        if first.position == stream and kind_of(first.data) is Kind.OPENED:
            self._opened = first

    async def feed(self) -> None:
        if self._opened is None:
            self._lose()
            return
        rescue = Rescue(self.session, self._opened)
        backlog = self._events[-1].position
        if self._carry(self._events, rescue, live=False):
            return
        with self.follow(self._events[-1].cursor) as subscription:
            while True:
                try:
                    events = await self.next(subscription)
                except Diverged:
                    self._lose()
                    return
                if self._carry(events, rescue, live=True, after=backlog):
                    return
                if not events:
                    with contextlib.suppress(StoreUnavailable):
                        await rescue.look()

    def _carry(self, events: Iterable[Event], rescue: Rescue, *, live: bool, after: int = 0) -> bool:
        """Puts the stream's own messages. Whether that was its end."""
        place = self._place
        for event in events:
            if event.stream != place.stream:
                continue
            kind = kind_of(event.data)
            if kind is Kind.TAKEN:
                rescue.taken(event)
            if event.position <= place.cursor.position:
                if kind is Kind.TERMINAL:
                    return True
                continue
            if kind in (Kind.MESSAGE, Kind.TERMINAL):
                self.put(event, EventId(place.stream, event.cursor, place.request))
            if kind is Kind.TERMINAL:
                return True
            # An older hang-up was meant for the connections of then.
            if kind is Kind.HANGUP and live and event.position > after:
                return True
        return False

    def _lose(self) -> None:
        """The store no longer has this stream: its request is answered with one error, so that nobody waits (P9)."""
        logger.warning("session %s: a stream that a client resumes is lost", self.session.key[:12])
        error = ErrorData(
            code=INTERNAL_ERROR,
            message="The stream of this request is no longer in the session store; its outcome is not known",
            data={"reason": "stream_lost", "retrySafe": False},
        )
        frame = b"event: message\r\ndata: %b\r\n\r\n" % wire.error_body(self._place.request, error)
        self.outlet.put(frame)


@dataclass(slots=True)
class _Rival:
    """The latest connection to the standalone stream that the log knows of."""

    listener: str
    node: str
    position: int
    since: int
    read: int | None = None


class Listener(Reader):
    """A connection to the session's standalone stream.

    Args:
        place: Where the client wants to go on, if it said so.
        primes: The client understands a priming event.
    """

    def __init__(self, session: Session, place: EventId | None, *, primes: bool) -> None:
        super().__init__(session)
        self._name = secrets.token_hex(8)
        self._place = place
        self._primes = primes
        self._rival: _Rival | None = None
        self._after = Cursor(0)
        self._end = Cursor(0)
        self._position = 0
        self._active = False
        self._settled: set[str] = set()
        self._delivered = 0

    async def prepare(self, *, reject: bool = False) -> bool:
        """Reads what the log has. False if `reject` and another live connection carries the stream.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.read`.
        """
        if self._place is not None:
            if await _entry(self.session, self._place.cursor):
                self._after = self._place.cursor
            else:
                logger.warning("session %s: events of its standalone stream are lost", self.session.key[:12])
        await self._scan()
        return not (reject and self._place is None and await self._rival_lives())

    async def _scan(self) -> None:
        after = self._after
        while events := await self.session.node.store.read(self.session.key, after, limit=MAX_READ):
            for event in events:
                self._note(event)
            after = events[-1].cursor
        self._end = after

    def _note(self, event: Event) -> None:
        """Keeps account of who listens and which server requests are settled."""
        kind = kind_of(event.data)
        if kind is Kind.LISTENING:
            body = decode(event.data)
            if body["listener"] != self._name:
                self._rival = _Rival(body["listener"], body["node"], event.position, body["since"])
        elif kind is Kind.LEFT:
            body = decode(event.data)
            if self._rival is not None and body["listener"] == self._rival.listener:
                self._rival.read = body["read"]
        elif kind is Kind.REPLY:
            self._settled.add(request_key(decode(event.data)["id"]))
        elif kind is Kind.MESSAGE and event.stream == STANDALONE and b'"notifications/cancelled"' in event.data:
            self._settled.add(request_key((decode(event.data).get("params") or {}).get("requestId", "")))

    async def _rival_lives(self) -> bool:
        rival = self._rival
        if rival is None or rival.read is not None:
            return False
        return not await self.session.node.store.lapsed([rival.node])

    async def feed(self) -> None:
        while True:
            try:
                await self._listen()
                return
            except Diverged:
                logger.warning("session %s: its standalone stream is followed from the start", self.session.key[:12])
                self._after, self._place = Cursor(0), None
                self._rival = None
                await self._scan()

    async def _listen(self) -> None:
        # A client that comes back with what it had, while a newer connection lives, stays silent: else the two would
        # take the stream from each other for ever.
        if self._place is not None and self._rival is not None and await self._patient(self._rival_lives):
            with self.follow(self._end) as subscription:
                await self._stay_silent(subscription)
        while True:
            await self._announce()
            if await self._carry_on():
                return

    async def _patient(self, question: object) -> bool:
        while True:
            try:
                return await self._rival_lives()
            except StoreUnavailable:
                await asyncio.sleep(_LIVENESS_POLL)

    async def _announce(self) -> None:
        """Says in the log that this connection carries the stream from here on."""
        body = {"listener": self._name, "node": self.session.node.id, "since": self._after.position}
        while True:
            try:
                appended = await self.session.node.store.append(
                    self.session.key, Batch([draft(Kind.LISTENING, pydantic_core.to_json(body))])
                )
                break
            except StoreUnavailable:
                await asyncio.sleep(_LIVENESS_POLL)
        self._position = appended.first
        self._active = True

    async def _carry_on(self) -> bool:
        """Carries the stream until it is taken over and left again by a newer connection (False), or hung up."""
        after = self._after
        if self._place is None and self._rival is not None:
            after = Cursor(await self._where_rival_left())
        self._delivered = after.position
        with self.follow(after) as subscription:
            while True:
                events = await self.next(subscription)
                if not events:
                    continue
                for event in events:
                    if self._carry(event):
                        return True
                    if not self._active:
                        await self._leave()
                        self._end = event.cursor
                        break
                if not self._active:
                    break
        with self.follow(self._end) as subscription:
            await self._stay_silent(subscription)
        return False

    def _carry(self, event: Event) -> bool:
        """Handles one event in the log's order. Whether the connection is to be closed."""
        kind = kind_of(event.data)
        self._note(event)
        if event.stream != STANDALONE:
            return False
        if kind is Kind.MESSAGE:
            if not self._is_settled(event):
                self.put(event, EventId(STANDALONE, event.cursor))
            self._delivered = event.position
        elif kind is Kind.LISTENING and event.position == self._position:
            if self._primes:
                event_id = EventId(STANDALONE, event.cursor).seal(self.session.id)
                self.outlet.put(wire.sse_priming(event_id, self.session.node.settings.retry_interval), event.position)
        elif kind is Kind.LISTENING and event.position > self._position:
            self._active = False
        elif kind is Kind.HANGUP and event.position > self._position:
            return True
        return False

    def _is_settled(self, event: Event) -> bool:
        """Whether this is a server request that was answered or given up meanwhile."""
        if not self._settled or b'"id"' not in event.data:
            return False
        message = decode(event.data)
        return "method" in message and "id" in message and request_key(message["id"]) in self._settled

    async def _where_rival_left(self) -> int:
        """How far the connection before this one is known to have got. It says so when it is superseded."""
        rival = self._rival
        assert rival is not None
        with self.follow(self._end) as subscription:
            while rival.read is None and self._rival is rival:
                events = await self.next(subscription)
                for event in events:
                    if event.position < self._position or kind_of(event.data) is Kind.LEFT:
                        self._note(event)
                if not events and not await self._patient(self._rival_lives):
                    return rival.since
        return rival.read if rival.read is not None else rival.since

    async def _stay_silent(self, subscription: Subscription) -> None:
        """Holds the connection open without a word while a newer one lives; goes on where that one got to."""
        rival = self._rival
        assert rival is not None
        while rival is not None and rival.read is None:
            events = await self.next(subscription)
            for event in events:
                self._note(event)
            rival = self._rival
            assert rival is not None
            if not events and not await self._patient(self._rival_lives):
                break
        # What that connection had written, the client has; if it never said, what this one did not deliver.
        reached = rival.read if rival.read is not None else max(rival.since, self._delivered)
        self._after = Cursor(reached)
        self._rival = None

    async def _leave(self) -> None:
        """Says in the log how far this connection got."""
        body = {"listener": self._name, "read": max(self.outlet.sent, self._after.position)}
        with contextlib.suppress(StoreError):
            await self.session.node.store.append(
                self.session.key, Batch([draft(Kind.LEFT, pydantic_core.to_json(body))])
            )

    async def serve(self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        try:
            await super().serve(receive, send, headers)
        finally:
            if self._active and not self.session.ended:
                self._active = False
                with anyio.move_on_after(_LEAVE_SECONDS, shield=True):
                    await self._leave()
