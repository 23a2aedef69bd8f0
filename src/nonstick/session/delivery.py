"""What goes to one client of a standalone stream: messages of the session's log, and broadcasts in between (P11)."""

from __future__ import annotations

import asyncio
import hashlib

from mcp.shared.subscriptions import ResourceUpdated

from nonstick.core.broadcasts import LISTS, NOWHERE, Broadcast
from nonstick.core.carrier import Carrier
from nonstick.core.event_ids import EventId, parse_cursor
from nonstick.core.events import body_of, decode
from nonstick.core.sse import sse_frame
from nonstick.session.live import LiveSession
from nonstick.session.outlet import Mark, Outlet
from nonstick.store import STANDALONE, Cursor, Event

__all__ = ["Delivery"]


class Delivery:
    """Puts messages and broadcasts into the outlet of one connection, each with the event id to come back with.

    Messages come from the session's log, in its order. Broadcasts come from the cluster log: each is put once, after
    what the session's log had when the broadcast came here.

    Args:
        place: Where the client goes on, if it said so.

    Attributes:
        outlet: On the way to the client.
        broadcasts_queued_to: The entry of the cluster log up to which broadcasts were put.
        subscriptions_as_of: Position up to which what the client subscribed to is known, from the record or the log.
    """

    __slots__ = (
        "_at_turn_start",
        "_carrier",
        "_live_to",
        "_puts_later",
        "_session",
        "_subscriptions",
        "_told",
        "broadcasts_queued_to",
        "outlet",
        "subscriptions_as_of",
    )

    def __init__(self, session: LiveSession, outlet: Outlet, carrier: Carrier, place: EventId | None) -> None:
        self._session = session
        self._carrier = carrier
        self.outlet = outlet
        self.broadcasts_queued_to = NOWHERE if place is None else place.heard or session.record.heard
        self._told = "" if place is None else place.told
        """While the client is told of everything: what it was told last, of all there was at `broadcasts_queued_to`."""
        self._at_turn_start = NOWHERE if self._told else self.broadcasts_queued_to
        """Up to where the client had heard the cluster log when its turn began."""
        self._live_to: Cursor | None = None
        """The entry up to which its turn has come; None while it carries nothing new."""
        self._subscriptions = session.record.subscriptions
        self.subscriptions_as_of = session.log.loaded_at
        self._puts_later: asyncio.Task[None] | None = None
        """Waits for room for broadcasts."""

    # ---- how far the client is

    @property
    def delivered_to(self) -> int:
        """Position up to which the connection took the stream."""
        sent, carrier = self.outlet.sent, self._carrier
        return max(sent.position if sent.losses == carrier.losses else 0, carrier.resume_after)

    @property
    def broadcasts_delivered_to(self) -> Cursor:
        """The entry up to which the connection took broadcasts."""
        return max(self.outlet.sent.heard, self._at_turn_start)

    def mark(self, position: int, heard: Cursor | None = None) -> Mark:
        """How far a frame for what is at this position brings the client."""
        if heard is None:
            heard = NOWHERE if self._told else self.broadcasts_queued_to
        return Mark(position, heard, self._carrier.losses)

    def place_at(self, at: Cursor, heard: Cursor, told: str) -> EventId:
        """What the client is to come back with."""
        self._carrier.last_given = at
        return EventId(STANDALONE, at, heard=heard, told=told, before=tuple(self._carrier.given))

    # ---- its turn

    def hears_on_from(self) -> Cursor:
        """The entry up to which the client has heard the cluster log, as far as is known."""
        return max(self.broadcasts_queued_to, self._carrier.heard_before(self._session.record.heard))

    def heard_it_all_to(self) -> Cursor | None:
        """As `hears_on_from`; None for a client that is being told of everything: it has not heard it all."""
        return None if self._told else self.hears_on_from()

    def begin(self, heard: Cursor, there: Cursor) -> None:
        """Its turn begins.

        Args:
            heard: Up to where the client has heard the cluster log.
            there: That place, or the place from which on the cluster log is still there.
        """
        self.broadcasts_queued_to = there
        if there != heard:
            self._told = ""
        self._at_turn_start = NOWHERE if self._told else there

    def live(self, event: Event) -> None:
        """The client has been put all up to here."""
        if event.position >= self._carrier.position:
            self._live_to = event.cursor

    def pause(self) -> None:
        """Its turn is over."""
        self._live_to = None

    # ---- what its client subscribed to

    def load(self, subscriptions: frozenset[str], as_of: int) -> None:
        """The record says that its client has subscribed to these, as of this position in the session's log."""
        self._subscriptions, self.subscriptions_as_of = subscriptions, as_of

    def note_change(self, event: Event) -> None:
        """The client subscribed or unsubscribed, on any node, and while any connection carried the stream."""
        if event.position <= self.subscriptions_as_of:
            return
        self.subscriptions_as_of = event.position
        body = decode(event.data)
        if (uri := body.get("unsubscribed")) is not None:
            self._subscriptions -= {uri}
        if (uri := body.get("subscribed")) is not None:
            self._subscriptions |= {uri}

    # ---- messages

    async def put(self, event: Event) -> None:
        """Puts a message of the session's log, once there is room."""
        await self.outlet.room()
        self._put(body_of(event.data), event.cursor, self.broadcasts_queued_to, self._told)

    def place_of_turn(self, event: Event) -> EventId:
        """The event id of the connection's own `listening`."""
        return self.place_at(event.cursor, self.broadcasts_queued_to, self._told)

    def _put(self, body: bytes, at: Cursor, heard: Cursor, told: str = "") -> None:
        event_id = self.place_at(at, heard, told)
        mark = self.mark(at.position, NOWHERE if told else heard)
        self.outlet.put(sse_frame(event_id.seal(self._session.id), body), mark)

    # ---- broadcasts

    def hear(self) -> None:
        """Puts what was broadcast since, each thing once, if the stream has come to its live end and there is room."""
        broadcasts = self._session.services.cluster_log.broadcasts
        heard = self.broadcasts_queued_to
        if self._live_to is None or heard.position > broadcasts.head.position:
            return
        if heard == broadcasts.head and not self._told:
            return
        if not self.outlet.has_room:
            if self._puts_later is None:
                self._puts_later = self._session.services.tasks.spawn(self._hear_later())
            return
        news = broadcasts.since(heard)
        if news is None:
            self._told = ""
            self._put_everything(self._live_to, broadcasts.head)
        else:
            if self._told:
                self._put_everything(self._live_to, heard)
            for broadcast in news:
                if broadcast.uri is None or broadcast.uri in self._subscriptions:
                    self._put(broadcast.body, self._live_to, broadcast.cursor)
        self.broadcasts_queued_to = broadcasts.head
        self.outlet.skip_to(self.mark(self._live_to.position))

    async def _hear_later(self) -> None:
        await self.outlet.room()
        self._puts_later = None
        self.hear()

    def hear_anew(self) -> None:
        """The store lost entries of the cluster log, and what there is now is known."""
        head = self._session.services.cluster_log.broadcasts.head
        if self._live_to is not None and self.broadcasts_queued_to.position > head.position:
            self.broadcasts_queued_to, self._told = NOWHERE, ""
        self.hear()

    def _put_everything(self, at: Cursor, head: Cursor) -> None:
        """Tells the client once that anything may have changed: nobody knows any more what it has missed.

        Each event id says what was told last, so that a client which comes back with it is told of the rest.
        """
        runner = self._session.runner
        changed = [what for request, what in LISTS.items() if runner.answers(request)]
        everything = [*changed, *map(ResourceUpdated, sorted(self._subscriptions))]
        bodies = {_name_of(what.body): what.body for what in (Broadcast.of(what, head) for what in everything)}
        names = list(bodies)
        rest = names[names.index(self._told) + 1 :] if self._told in bodies else names
        self._at_turn_start = NOWHERE
        for name in rest:
            # Only with the last does the client have it all.
            self._put(bodies[name], at, head, "" if name == names[-1] else name)
        self._told = ""

    async def take_change(self, event: Event) -> None:
        """The client subscribed, and what it subscribed to may have been broadcast here first, and been passed over."""
        body = decode(event.data)
        if (uri := body.get("subscribed")) is None or uri not in self._subscriptions:
            return
        since = parse_cursor(body["heard"]) or Cursor(0)
        said = self._session.services.cluster_log.broadcasts.said_of(uri, since)
        if said is not None and said.position <= self.broadcasts_queued_to.position:
            await self.outlet.room()
            notification = Broadcast.of(ResourceUpdated(uri), said).body
            self._put(notification, event.cursor, self.broadcasts_queued_to, self._told)


def _name_of(body: bytes) -> str:
    """Names what a broadcast tells, in an event id."""
    return hashlib.blake2b(body, digest_size=4).hexdigest()
