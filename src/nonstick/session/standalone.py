"""A connection to the session's standalone stream: what its client has not seen, then what comes, from any node (P3).

There may be several: the log is the arbiter, so that no two carry the same new message. `core/carrier.py` has the
rules, and says what a connection is to do. Here the connection does that.

The places of one connection in the session's log, from its oldest entry to its newest. Each is the last entry of what
is said there; the order of those on different lines may be another.

    --------- delivered_to -------- queued_to -------------- live_to ------------ scanned_to ---------->
    --------- resume_after --------                       subscriptions_as_of

    resume_after            the client had this when the connection came, or when its turn began
    delivered_to            the client's connection took this
    queued_to               this is in the outlet
    live_to                 `queued_to`, once that is not before the connection's own `listening`: from there on
                            broadcasts may be put in between
    scanned_to              taken into account: whose turn it is, which server requests are settled, and what the
                            client subscribed to
    subscriptions_as_of     what the client subscribed to is known up to here, from the record or from the log

And in the cluster log, which has what is broadcast to everyone:

    broadcasts_at_turn_start    the client had heard this when the connection's turn began
    broadcasts_queued_to        this is in the outlet
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Final

import anyio
import pydantic_core

from nonstick.core.carrier import ON_ENTERING, Action, Carrier, Happening, Means, Phase
from nonstick.core.event_ids import EventId
from nonstick.core.events import Kind, draft, kind_of
from nonstick.core.names import new_name
from nonstick.core.places import Search
from nonstick.core.record import Record
from nonstick.errors import Diverged, StoreError, StoreUnavailable
from nonstick.log.follow import Slice, whole
from nonstick.log.writer import once
from nonstick.session import reader
from nonstick.session.delivery import Delivery
from nonstick.session.live import LiveSession
from nonstick.session.outlet import Mark
from nonstick.session.reader import Following, Reader
from nonstick.store import MAX_READ, Appended, Cursor, Event, Skimmed

__all__ = ["StandaloneConnection"]

logger = logging.getLogger(__name__)

_LEAVE_SECONDS: Final = 2.0

_SILENCE: Final = 60.0
"""Seconds after which a connection that carries the standalone stream looks up, though nothing came."""

_ANSWER_SECONDS: Final = 3.0
"""A connection that lives answers what it reads in the log within so long, once its client has taken what it had."""

_READINGS: Final = 5
"""How often a log is read anew that loses entries while it is read."""


class StandaloneConnection(Reader):
    """A connection to the session's standalone stream.

    Args:
        place: Where the client wants to go on, if it said so.
    """

    __slots__ = ("_carrier", "_claiming", "_delivery", "_slice")

    def __init__(self, session: LiveSession, place: EventId | None) -> None:
        super().__init__(session, place)
        self._carrier = Carrier(session.services.node_id, named=place is not None)
        self._delivery = Delivery(session, self.outlet, self._carrier, place)
        self._slice = Slice(MAX_READ)
        self._claiming: asyncio.Task[Appended] | None = None
        """Says `listening`, until that is in the log."""

    # ---- where the client goes on

    async def prepare(self) -> None:
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
        places = [*place.before, cursor]
        if await self._has(cursor):
            self._carrier.begin_after(places, cursor.position)
            await self._scan(Cursor(cursor.position))
            return
        self._carrier.begin_after(places, await self._look_for(places, own=cursor))
        if self._carrier.lost is not None:
            # It is not given this id again.
            self._place = None

    async def _look_for(self, places: Sequence[Cursor], *, own: Cursor | None) -> int:
        """Takes the whole log into account, of which the store has lost entries. Up to where the client has it (P9).

        Args:
            places: What the client had, or this connection has seen.
            own: The one among them that the client will name.
        """
        session, search = self.session, Search(places)
        loaded = await session.services.store.load(session.key)
        head = loaded.head.position
        # The positions behind what is lost are given out again: what is known as of one of them may be another's.
        self._delivery.load(Record.from_fields(loaded.fields).subscriptions, head)
        await self._scan(Cursor(0), search)
        found = search.latest(head)
        if found is not None and not await self._goes_on_after(found):
            found = None
        others = self._carrier.miss(own, found)
        if self._carrier.lost is not None and others is None:
            logger.warning("session %s: events of its standalone stream are lost", session.key[:12])
        if found is not None:
            return found
        new = search.new_after(head) if others is None else others
        # If the store lost the whole log, all that is there now is new.
        return new if await self._goes_on_after(new) else 0

    async def _find_again(self) -> None:
        """The store lost entries: goes on after the last one that is still there (P9)."""
        carrier = self._carrier
        places = carrier.places()
        while True:
            try:
                found = await self.until_answered(lambda: self._look_for(places, own=carrier.last_given))
                break
            except Diverged:
                await asyncio.sleep(reader.LIVENESS_POLL)
        logger.info("session %s: its standalone stream goes on after %d", self.session.key[:12], found)
        carrier.found_again(self._delivery.delivered_to, found)
        await self._leave()
        self._place = None
        carrier.happen(Happening.FREE)

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

    # ---- what the log has

    async def _scan(self, after: Cursor, search: Search | None = None) -> None:
        """Takes the log into account, all of it from this place on."""
        carrier = self._carrier
        carrier.scan(after)
        while entries := await self._slice.skim(self.session.services.store, self.session.key, carrier.scanned_to):
            for entry in entries:
                if search is not None:
                    search.note(entry.event)
                is_cut = len(entry.event.data) < entry.size
                self._note(await self._whole(entry) if is_cut and self._is_news(entry.event) else entry.event)
            # This connection's own turn is not begun yet.
            carrier.turns.forget()

    def _is_news(self, event: Event) -> bool:
        """Whether more than the beginning of this event counts: not of what the record says already.

        There may be thousands of those, and each is a call to read (P10).
        """
        return kind_of(event.data) is Kind.CHANGED and event.position > self._delivery.subscriptions_as_of

    async def _whole(self, entry: Skimmed) -> Event:
        """The event of which this was cut off."""
        event = await whole(self.session.services.store, self.session.key, entry)
        if event is None:
            raise Diverged
        return event

    def _note(self, event: Event) -> Means:
        means = self._carrier.note(event)
        if means is Means.CHANGE:
            self._delivery.note_change(event)
        elif means is Means.ANSWER:
            self.session.spawn(self._answer(self._carrier.turn))
        return means

    # ---- what it does

    async def feed(self) -> None:
        carrier = self._carrier
        newer_lives = self._place is not None and await self.until_answered(self._is_carried)
        carrier.happen(Happening.NEWER_LIVES if newer_lives else Happening.FREE)
        while carrier.phase is not Phase.OVER:
            try:
                for action in ON_ENTERING[carrier.phase]:
                    await self._do(action)
            except Diverged:
                carrier.happen(Happening.LOST)

    async def _do(self, action: Action) -> None:
        match action:
            case Action.FLUSH:
                await self.outlet.flushed()
            case Action.FIND:
                await self._find_again()
            case Action.ASK:
                await self._ask()
            case Action.CLAIM:
                await self._claim()
            case Action.AWAIT_OLDER:
                await self._await_older()
            case Action.CARRY:
                await self._carry()
            case Action.LEAVE:
                await self._leave()
                self._carrier.happen(Happening.SAID)
            case Action.AWAIT_NEWER:
                await self._await_turns()
                self._carrier.happen(Happening.NEWER_ARE_OVER)

    async def _is_carried(self) -> bool:
        """Whether a newer connection carries the stream."""
        turn = self._carrier.turns.latest
        return turn is not None and not turn.left and not await self.session.services.store.lapsed([turn.node])

    async def _ask(self) -> None:
        asked = await self._say(Kind.ASKING, {"listener": None, "node": self.session.services.node_id})
        self._carrier.asked(asked.first)

    async def _answer(self, turn: str) -> None:
        """Somebody asks whether this connection carries the stream: it does."""
        with contextlib.suppress(StoreError):
            await self._say(Kind.CARRYING, {"listener": turn})

    async def _claim(self) -> None:
        """Says in the log that this connection carries the stream from here on."""
        carrier = self._carrier
        carrier.turns.forget()
        self._place = None
        body = carrier.claim(new_name(), self._delivery.heard_it_all_to())
        # Its outcome must be known even if this connection goes before it is: others wait for the connection to leave.
        self._claiming = self.session.services.tasks.spawn(self._say(Kind.LISTENING, body))
        appended = await asyncio.shield(self._claiming)
        self._claiming = None
        carrier.claimed(appended.first)

    async def _await_older(self) -> None:
        """Waits until this connection may carry the stream, and finds out where to go on."""
        await self._await_turns()
        self._carrier.begin()
        heard = self._delivery.hears_on_from()
        there = await self.until_answered(lambda: self.session.services.cluster_log.settle(heard))
        self._delivery.begin(heard, there)
        self._carrier.happen(Happening.OLDER_ARE_OVER)

    async def _await_turns(self) -> None:
        """Follows the log while there is a turn to wait for.

        One whose node is seen dead twice in a row is over; so is one that does not say what it should within the
        patience: its connection has gone, and the store lost that it said so (P9).
        """
        doubted, awaited, patience = "", "", 0.0
        loop = asyncio.get_running_loop()
        looked = loop.time()
        with self.follow(self._carrier.scanned_to) as following:
            while (turn := self._carrier.awaited()) is not None:
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
                if await self.until_answered(lambda: self.session.services.store.lapsed([node])):  # noqa: B023
                    if doubted == turn.name:
                        turn.give_up()
                    doubted = turn.name
                    continue
                doubted = ""
                # Only time in which the store can be reached counts.
                patience -= reader.LIVENESS_POLL
                if patience <= 0 and self._carrier.expects_word_of(turn):
                    turn.give_up()

    @property
    def _patience(self) -> float:
        """Seconds within which a connection that lives says what others wait for."""
        return self.session.services.settings.send_timeout + _ANSWER_SECONDS

    async def _carry(self) -> None:
        """Carries the stream until a newer turn begins, or until it is hung up."""
        with self.follow(Cursor(self._carrier.resume_after)) as following:
            hearers = self.session.services.cluster_log.hearers
            hearers.add(self._delivery)
            try:
                await self._carry_until_end(following)
            finally:
                hearers.discard(self._delivery)
                self._delivery.pause()

    async def _carry_until_end(self, following: Following) -> None:
        while True:
            for event in await following.next(_SILENCE):
                means = self._note(event)
                if self._carrier.phase is not Phase.CARRYING:
                    return
                await self._put(means, event)
            self._delivery.hear()

    async def _put(self, means: Means, event: Event) -> None:
        """Puts what this event is to the client."""
        match means:
            case Means.PUT:
                await self._delivery.put(event)
            case Means.PRIME if self._primes:
                self.put_priming(self._delivery.place_of_turn(event))
            case Means.CHANGE:
                await self._delivery.take_change(event)
            case _:
                pass
        self._carrier.queued(event, means)
        self._delivery.live(event)

    def mark(self, position: int) -> Mark:
        return self._delivery.mark(position)

    # ---- what it says

    async def _say(self, kind: Kind, body: dict[str, Any]) -> Appended:
        """Appends this to the session's log, as soon as the store can be reached."""
        batch = once(draft(kind, pydantic_core.to_json(body)))
        return await self.until_answered(lambda: self.session.log.append(batch))

    async def _leave(self) -> None:
        """Says in the log up to where the client has the stream, if others wait for that."""
        if not self._carrier.turn:
            return
        body = self._carrier.leave(self._delivery.delivered_to, self._delivery.broadcasts_delivered_to)
        with contextlib.suppress(StoreError):
            if self._claiming is not None:
                await asyncio.shield(self._claiming)
            await self._say(Kind.LEFT, body)
        self._claiming = None
        self._carrier.left()

    async def gone(self) -> None:
        self._carrier.happen(Happening.GONE)
        if not self.session.ended:
            # Until it is said, others wait; but not this response, for a store that is away.
            leaving = self.session.services.tasks.spawn(self._leave())
            with anyio.move_on_after(_LEAVE_SECONDS, shield=True):
                await asyncio.wait([leaving])
