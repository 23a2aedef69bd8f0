"""A connection to the session's standalone stream: what its client has not seen, then what comes, from any node (P3).

There may be several: the log is the arbiter, so that two never carry the same new message.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import anyio
import pydantic_core
from mcp.shared.subscriptions import ResourceUpdated
from mcp_types import RequestId

from nonstick.core.broadcasts import LISTS, NOWHERE, Broadcast
from nonstick.core.event_ids import EventId, cursor_text, parse_cursor
from nonstick.core.events import Kind, body_of, decode, draft, glimpse, kind_of
from nonstick.core.jsonrpc import request_key
from nonstick.core.names import new_name
from nonstick.core.places import MAX_PLACES, Search
from nonstick.core.sse import sse_frame
from nonstick.core.turns import Turn, Turns
from nonstick.errors import Diverged, StoreError, StoreUnavailable
from nonstick.log.follow import Slice
from nonstick.session import reader
from nonstick.session.live import Session
from nonstick.session.outlet import Mark
from nonstick.session.reader import Following, Reader
from nonstick.store import MAX_CLIP, MAX_READ, STANDALONE, Appended, Batch, Cursor, Draft, Event

__all__ = ["StandaloneConnection"]

logger = logging.getLogger(__name__)

_LEAVE_SECONDS: Final = 2.0

_SILENCE: Final = 60.0
"""Seconds after which a connection that carries the standalone stream looks up, though nothing came."""

_ANSWER_SECONDS: Final = 3.0
"""A connection that lives answers what it reads in the log within so long, once its client has taken what it had."""

_READINGS: Final = 5
"""How often a log is read anew that loses entries while it is read."""

_SETTLED: Final = 1000
"""Server requests that a connection knows to be settled. One beyond them is sent, and its answer dropped."""

_CANCELLED: Final = b'"notifications/cancelled"'


class StandaloneConnection(Reader):
    """A connection to the session's standalone stream.

    The log is the arbiter of several: each begins its turn with a `listening` event, carries what comes before the next
    one's, then says how far it got and is silent. The next one begins there, so that two never carry the same message;
    but one whose client named an event goes on after that, for only its client knows what it has.
    The superseded one stays open, for a client whose connection is closed comes back, and the two would take turns for
    ever; it goes on when the newer one has left. So does one that comes back with an event id while a newer one lives.

    What is broadcast to everyone is in the cluster log. The one that carries the stream puts it in between as it
    comes, and every event id, `listening` and `left` says how far that log was heard as well (P11).

    Args:
        place: Where the client wants to go on, if it said so.
    """

    def __init__(self, session: Session, place: EventId | None) -> None:
        super().__init__(session, place)
        self._named = place is not None
        self._turns = Turns()
        self._settled: dict[str, None] = {}
        """Keys of server requests that nobody waits for any more, of those that are not carried yet."""
        self._scanned = Slice(MAX_READ)
        self._seen = Cursor(0)
        """Up to where the log is taken into account."""
        self._given: deque[Cursor] = deque(maxlen=MAX_PLACES)
        """The last entries of the stream that the client has."""
        self._last: Cursor | None = None
        """The place that the last event id names which it was given here."""
        self._lost: str | None = None
        """The place that it came with, or was given, if the store has lost that."""
        self._losses = 0
        """How often the store lost entries of the log."""
        self._start = 0
        """Up to where the client had the stream when its connection came, or its turn began."""
        self._reached = 0
        """Up to where it was put into the outlet."""
        self._turn = ""
        """What others know it by; "" if it told them nothing yet, or has left. They wait for it to leave."""
        self._position = sys.maxsize
        """Of the event that began its turn."""
        self._carries = False
        self._claim: asyncio.Task[Appended] | None = None
        """What it tells others, until that is in the log."""
        self._at: Cursor | None = None
        """The entry up to which its turn has come; None while it carries nothing new."""
        self._subscribed = session.subscriptions
        self._known = session.loaded_at
        """The entry up to which the log is in `_subscribed`."""
        self._heard = NOWHERE if place is None else place.heard or session.heard
        """Up to where the cluster log was put into the outlet."""
        self._told = "" if place is None else place.told
        """While the client is told of everything: what it was told last, of all there was at `_heard`."""
        self._heard_before = NOWHERE if self._told else self._heard
        """Up to where the client had heard it when its turn began."""
        self._hears_later: asyncio.Task[None] | None = None
        """Waits for room for what was broadcast."""

    # ---- before the response

    async def prepare(self) -> None:
        """Takes the log into account, from where the client wants to go on.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.read`.
        """
        for _ in range(_READINGS):
            try:
                await (self._scan(Cursor(0)) if self._place is None else self._find(self._place))
            except Diverged:
                # The store lost entries while they were read.
                continue
            return
        raise StoreUnavailable("the session's log lost entries each time that it was read")

    async def _find(self, place: EventId) -> None:
        """Finds out where to go on for a client that has everything up to here."""
        cursor = place.cursor
        self._given = deque([*place.before, cursor], maxlen=MAX_PLACES)
        if await self._has(cursor):
            self._start = self._reached = cursor.position
            await self._scan(Cursor(cursor.position))
            return
        self._start = self._reached = await self._go_on(list(self._given), own=cursor)
        if self._lost is not None:
            # It is not given this id again.
            self._place = None

    async def _has(self, cursor: Cursor) -> bool:
        """Whether the log has this entry."""
        try:
            before = Cursor(cursor.position - 1)
            found = await self.session.services.store.skim(self.session.key, before, limit=1, clip=0)
        except Diverged:
            return False
        return bool(found) and found[0].event.cursor == cursor

    async def _goes_on_after(self, position: int) -> bool:
        """Whether the store can tell what came after this position: not where it lost all of the log up to there."""
        try:
            await self.session.services.store.skim(self.session.key, Cursor(position), limit=1, clip=0)
        except Diverged:
            return False
        return True

    async def _go_on(self, places: Sequence[Cursor], *, own: Cursor | None) -> int:
        """Takes the whole log into account, in which the store has lost entries. Up to where the client has it (P9).

        Args:
            places: What the client had, or this connection has seen.
            own: The one among them that the client will name.
        """
        session, search = self.session, Search(places)
        head = (await session.services.store.load(session.key)).head.position
        await self._scan(Cursor(0), search)
        start = search.latest(head)
        if start is not None and not await self._goes_on_after(start):
            start = None
        if own is not None and (start is None or start < own.position):
            self._lost = cursor_text(own)
        known = self._turns.found_again(self._lost)
        if self._lost is not None and known is None:
            logger.warning("session %s: events of its standalone stream are lost", session.key[:12])
        if start is None:
            start = search.new_after(head) if known is None else known
            if not await self._goes_on_after(start):
                # The store lost the whole log: all that is there now is new.
                start = 0
        self._given = deque((place for place in self._given if place.position <= start), maxlen=MAX_PLACES)
        return start

    # ---- what the log has

    async def _scan(self, after: Cursor, search: Search | None = None) -> None:
        """Takes the log into account, all of it from this place on."""
        self._seen, self._turns = after, Turns()
        while entries := await self._scanned.skim(self.session.services.store, self.session.key, self._seen):
            for event, _ in entries:
                if search is not None:
                    search.note(event)
                self._note(event)
            # This connection's own turn is not begun yet.
            self._turns.forget()

    def _note(self, event: Event) -> None:
        """Keeps account of whose turn it is and which server requests are settled. Large events may be cut off."""
        if event.position <= self._seen.position:
            return
        self._seen = event.cursor
        self._turns.note(event)
        kind = kind_of(event.data)
        if kind is Kind.REPLY:
            self._settle(glimpse(event.data).get("id"))
        elif kind is Kind.MESSAGE and event.stream == STANDALONE and _CANCELLED in event.data[:MAX_CLIP]:
            self._settle((glimpse(event.data).get("params") or {}).get("requestId"))
        elif kind is Kind.ASKING and event.position > self._position:
            self.session.spawn(self._answer(self._turn))

    def _settle(self, request_id: RequestId | None) -> None:
        """A server request was answered, or given up. The latest are kept, while it may still have to be carried."""
        if request_id is None:
            return
        self._settled[request_key(request_id)] = None
        if len(self._settled) > _SETTLED:
            del self._settled[next(iter(self._settled))]

    async def _answer(self, turn: str) -> None:
        """Somebody asks whether this connection carries the stream: it does."""
        with contextlib.suppress(StoreError):
            await self._append(draft(Kind.CARRYING, pydantic_core.to_json({"listener": turn})))

    async def _ask(self) -> Appended:
        body = {"listener": None, "node": self.session.services.node_id}
        return await self._append(draft(Kind.ASKING, pydantic_core.to_json(body)))

    async def _is_carried(self) -> bool:
        """Whether a newer connection carries the stream."""
        turn = self._turns.latest
        return turn is not None and not turn.left and not await self.session.services.store.lapsed([turn.node])

    # ---- carrying it

    async def feed(self) -> None:
        while True:
            try:
                await self._take_turns()
                return
            except Diverged:
                await self._find_again()

    async def _find_again(self) -> None:
        """The store lost entries: goes on after the last one that is still there (P9)."""
        self._at = None
        await self.outlet.flushed()
        # Of those that were given only the beginning of the tag may be known.
        seen = [*self._given, *self._turns.trail, *([] if self._last is None else [self._last])]
        places = sorted({place.position: place for place in seen}.values())
        while True:
            try:
                left = await self.patiently(lambda: self._go_on(places, own=self._last))
                break
            except Diverged:
                await asyncio.sleep(reader.LIVENESS_POLL)
        logger.info("session %s: its standalone stream goes on after %d", self.session.key[:12], left)
        self._start = min(self._read, left)
        self._reached = min(self._reached, left)
        self._known = min(self._known, left)
        self._losses += 1
        await self._leave()
        self._place = None

    async def _take_turns(self) -> None:
        if self._place is not None and await self.patiently(self._is_carried):
            asked = (await self._ask()).first
            # It may have left, and the store lost that.
            await self._stay_silent(answers=lambda turn: turn.shown < asked)
        while True:
            await self._begin_turn()
            if await self._carry_on():
                return
            await self._stay_silent()

    async def _begin_turn(self) -> None:
        """Says in the log that this connection carries the stream from here on, and finds out where to go on."""
        self._turns.forget()
        self._place = None
        self._turn = self._turn or new_name()
        self._position = sys.maxsize
        body = {
            "listener": self._turn,
            "node": self.session.services.node_id,
            "since": self._where_to_begin(),
            # A client that is being told of everything has not heard it all.
            "heard": None if self._told else cursor_text(self._where_to_hear_on()),
        }
        if self._lost is not None:
            body["lost"] = self._lost
        # Its outcome must be known when this connection goes meanwhile: others wait for it to leave.
        work = self._append(draft(Kind.LISTENING, pydantic_core.to_json(body)))
        self._claim = self.session.services.tasks.spawn(work)
        self._position = (await asyncio.shield(self._claim)).first
        self._claim = None
        turn_open = self._what_is_mine if self._named else self._what_is_open_before_mine
        await self._follow_while(turn_open, answers=lambda _: True)
        self._start = self._reached = self._where_to_begin()
        self._lost = None
        if not self._given:
            self._given.extend(place for place in self._turns.trail if place.position <= self._start)
        heard = self._where_to_hear_on()
        self._heard = await self.patiently(lambda: self.session.services.cluster_log.settle(heard))
        if self._heard != heard:
            self._told = ""
        self._heard_before = NOWHERE if self._told else self._heard
        self._carries = True

    def _where_to_begin(self) -> int:
        """Up to where the client has the stream, as far as is known."""
        if not self._named:
            return max(self._reached, self._turns.read_before(self._position))
        # What others carried, a client that names an event need not have had. But one that came with the same lost
        # place to another node went on first.
        found = self._turns.found_again(self._lost)
        return self._reached if found is None else min(self._reached, found)

    def _where_to_hear_on(self) -> Cursor:
        """Up to where the client has heard the cluster log, as far as is known."""
        if self._named:
            return self._heard
        return max(self._heard, self._turns.heard_before(self._position) or self.session.heard)

    def _what_is_mine(self) -> Turn | None:
        """The turn of this connection, until the log has been taken into account up to there."""
        if self._seen.position >= self._position:
            return None
        return Turn(self._turn, self.session.services.node_id, self._position, 0)

    def _what_is_open_before_mine(self) -> Turn | None:
        return self._what_is_mine() or self._turns.open_before(self._position)

    def _what_is_newer(self) -> Turn | None:
        self._turns.forget()
        turn = self._turns.latest
        return None if turn is None or turn.left else turn

    @property
    def _patience(self) -> float:
        """Seconds within which a connection that lives says what others wait for."""
        return self.session.services.settings.send_timeout + _ANSWER_SECONDS

    async def _follow_while(
        self, turn_open: Callable[[], Turn | None], *, answers: Callable[[Turn], bool] = lambda _: False
    ) -> None:
        """Follows the log while there is such a turn.

        One whose node is seen dead twice in a row is over; so is one that `answers`, but has not within the patience:
        its connection has gone, and the store lost that it said so (P9).
        """
        doubted, awaited, patience = "", "", 0.0
        loop = asyncio.get_running_loop()
        looked = loop.time()
        with self.follow(self._seen) as following:
            while (turn := turn_open()) is not None:
                if turn.name != awaited:
                    awaited, patience = turn.name, self._patience
                events = await following.next()
                for event in events:
                    self._note(event)
                # Other streams may never be silent.
                if events and loop.time() - looked < reader.LIVENESS_POLL:
                    continue
                looked = loop.time()
                node = turn.node
                if await self.patiently(lambda: self.session.services.store.lapsed([node])):  # noqa: B023
                    if doubted == turn.name:
                        turn.give_up()
                    doubted = turn.name
                    continue
                doubted = ""
                # Only time in which the store can be reached counts.
                patience -= reader.LIVENESS_POLL
                if answers(turn) and patience <= 0:
                    turn.give_up()

    async def _carry_on(self) -> bool:
        """Carries the stream until the next turn begins (False), or it is hung up (True)."""
        with self.follow(Cursor(self._start)) as following:
            hearers = self.session.services.cluster_log.hearers
            hearers.add(self)
            try:
                end = await self._carry_until_end(following)
            finally:
                hearers.discard(self)
            self._at = None
            if end is Kind.HANGUP:
                return True
            await self.outlet.flushed()
            await self._leave()
            return False

    async def _carry_until_end(self, following: Following) -> Kind:
        """Carries the stream until somebody says that this connection shall not: what it said."""
        while True:
            for event in await following.next(_SILENCE):
                self._note(event)
                kind = kind_of(event.data)
                is_new = event.stream == STANDALONE and event.position > self._position
                if is_new and kind in (Kind.LISTENING, Kind.HANGUP):
                    return kind
                await self._carry(kind, event)
                if event.position >= self._position:
                    self._at = event.cursor
                if event.position >= self._seen.position:
                    # Replies come after their requests.
                    self._settled.clear()
            self.hear()

    async def _carry(self, kind: Kind | None, event: Event) -> None:
        if kind is Kind.CHANGED:
            await self._take_change(event)
        elif event.stream != STANDALONE:
            pass
        elif kind is Kind.MESSAGE:
            if not self._is_settled(event):
                await self.outlet.room()
                self._put(body_of(event.data), event.cursor, self._heard, self._told)
            self._reached = event.position
            self._given.append(event.cursor)
        elif kind is Kind.LISTENING and event.position == self._position:
            if self._primes:
                self.put_priming(self._place_at(event.cursor, self._heard, self._told))
            self._given.append(event.cursor)

    def _put(self, body: bytes, at: Cursor, heard: Cursor, told: str = "") -> None:
        event_id = self._place_at(at, heard, told)
        mark = self.mark(at.position, NOWHERE if told else heard)
        self.outlet.put(sse_frame(event_id.seal(self.session.id), body), mark)

    def _place_at(self, at: Cursor, heard: Cursor, told: str) -> EventId:
        """What the client is to come back with."""
        self._last = at
        return EventId(STANDALONE, at, heard=heard, told=told, before=tuple(self._given))

    # ---- what is broadcast to everyone

    def hear(self) -> None:
        """Puts what was broadcast since, each thing once, if the stream has come to its live end and there is room."""
        broadcasts = self.session.services.cluster_log.broadcasts
        if self._at is None or self._heard.position > broadcasts.head.position:
            return
        if self._heard == broadcasts.head and not self._told:
            return
        if not self.outlet.has_room:
            if self._hears_later is None:
                self._hears_later = self.session.services.tasks.spawn(self._hear_later())
            return
        news = broadcasts.since(self._heard)
        if news is None:
            self._told = ""
            self._put_everything(self._at, broadcasts.head)
        else:
            if self._told:
                self._put_everything(self._at, self._heard)
            for broadcast in news:
                if broadcast.uri is None or broadcast.uri in self._subscribed:
                    self._put(broadcast.body, self._at, broadcast.cursor)
        self._heard = broadcasts.head
        self.outlet.pass_over(self.mark(self._at.position))

    async def _hear_later(self) -> None:
        await self.outlet.room()
        self._hears_later = None
        self.hear()

    def hear_anew(self) -> None:
        """The store lost entries of the cluster log, and what there is now is known."""
        if self._at is not None and self._heard.position > self.session.services.cluster_log.broadcasts.head.position:
            self._heard, self._told = NOWHERE, ""
        self.hear()

    def _put_everything(self, at: Cursor, head: Cursor) -> None:
        """Nobody knows any more what the client has missed: it is told once that anything may have changed.

        Each event id says what was told last, so that a client which comes back with it is told of the rest.
        """
        runner = self.session.runner
        changed = [what for request, what in LISTS.items() if runner.answers(request)]
        everything = [*changed, *map(ResourceUpdated, sorted(self._subscribed))]
        bodies = {_name_of(what.body): what.body for what in (Broadcast.of(what, head) for what in everything)}
        names = list(bodies)
        rest = names[names.index(self._told) + 1 :] if self._told in bodies else names
        self._heard_before = NOWHERE
        for name in rest:
            # Only with the last does the client have it all.
            self._put(bodies[name], at, head, "" if name == names[-1] else name)
        self._told = ""

    async def _take_change(self, event: Event) -> None:
        """The client subscribed or unsubscribed, on whichever node.

        A broadcast may have come here first, and been passed over.
        """
        body = decode(event.data)
        if (uri := body.get("unsubscribed")) is not None and event.position > self._known:
            self._subscribed -= {uri}
        if (uri := body.get("subscribed")) is None:
            return
        if event.position > self._known:
            self._subscribed |= {uri}
        since = parse_cursor(body["heard"]) or Cursor(0)
        said = self.session.services.cluster_log.broadcasts.said_of(uri, since)
        if said is not None and said.position <= self._heard.position and uri in self._subscribed:
            await self.outlet.room()
            self._put(Broadcast.of(ResourceUpdated(uri), said).body, event.cursor, self._heard, self._told)

    def _is_settled(self, event: Event) -> bool:
        """Whether this is a server request that was answered or given up meanwhile."""
        if not self._settled or b'"id"' not in event.data:
            return False
        message = decode(event.data)
        return "method" in message and "id" in message and request_key(message["id"]) in self._settled

    async def _stay_silent(self, answers: Callable[[Turn], bool] = lambda _: False) -> None:
        """Holds the connection open without a word while a newer one lives."""
        await self._follow_while(self._what_is_newer, answers=answers)

    # ---- leaving

    def mark(self, position: int, heard: Cursor | None = None) -> Mark:
        if heard is None:
            heard = NOWHERE if self._told else self._heard
        return Mark(position, heard, self._losses)

    @property
    def _read(self) -> int:
        """Up to where the connection took the stream."""
        sent = self.outlet.sent
        return max(sent.position if sent.losses == self._losses else 0, self._start)

    async def _leave(self) -> None:
        """Says in the log up to where the client has the stream; not known if its turn never came."""
        if not self._turn:
            return
        read = heard = None
        if self._carries:
            read, heard = self._read, cursor_text(max(self.outlet.sent.heard, self._heard_before))
        body = {"listener": self._turn, "read": read, "heard": heard}
        if read is not None and (tag := self._turns.tag_at(read)) is not None:
            # Should the store have lost that entry, this connection may not know it yet.
            body["tag"] = tag.hex()
        with contextlib.suppress(StoreError):
            if self._claim is not None:
                await asyncio.shield(self._claim)
            await self._append(draft(Kind.LEFT, pydantic_core.to_json(body)))
        self._turn, self._claim, self._carries, self._position = "", None, False, sys.maxsize

    async def _append(self, event: Draft) -> Appended:
        batch = Batch([event], writer=new_name(), sequence=1)
        return await self.patiently(lambda: self.session.append(batch))

    async def gone(self) -> None:
        if not self.session.ended:
            # Until it is said, others wait; but not this response, for a store that is away.
            leaving = self.session.services.tasks.spawn(self._leave())
            with anyio.move_on_after(_LEAVE_SECONDS, shield=True):
                await asyncio.wait([leaving])


def _name_of(body: bytes) -> str:
    """Names what a broadcast tells, in an event id."""
    return hashlib.blake2b(body, digest_size=4).hexdigest()
