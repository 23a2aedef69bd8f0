"""One session that this node holds: its live view is kept, and what other nodes relay is run here.

The session's log is followed for as long. A relayed request is an `opened` event that is run once it was taken over, by
the compare-and-set that fences every stream: once at most, even if another node believes to hold the session too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic_core
from mcp_types import (
    ErrorData,
    JSONRPCNotification,
    JSONRPCRequest,
)
from starlette.requests import Request

from nonstick.core.events import Kind, decode, draft, kind_of
from nonstick.core.jsonrpc import error_body, request_key
from nonstick.core.owners import owner_in
from nonstick.core.record import OWNER, RELEASED, Record
from nonstick.core.refusals import ID_IN_USE, NODE_LOST, NOT_REBUILT, NOT_STARTED, SHUT_DOWN, TOO_MANY_REQUESTS, Refusal
from nonstick.core.settings import Rehydrate
from nonstick.errors import Diverged, SessionNotFound
from nonstick.log.follow import whole
from nonstick.log.lost import end_open, end_stream
from nonstick.log.session_log import SessionLog
from nonstick.log.survey import OpenStream, note_unreadable, survey
from nonstick.session import portable
from nonstick.session.exchange import Exchange
from nonstick.session.kernel import handle_notification
from nonstick.session.live import LiveSession
from nonstick.store import Batch, Cursor, Event
from nonstick.waiting.retry import retry_until_answered

__all__ = ["Holding", "announce"]

logger = logging.getLogger(__name__)


class Holding:
    """This node's hold on a session, from when it was opened or taken to its end or to another owner's.

    It keeps the session's live view. Of what the log brings it heeds relayed requests and notifications, and `owner`
    events of other nodes.

    Args:
        among: The holds of this node, by their sessions' keys. This one is among them until its session has ended, or
            goes on elsewhere.

    Attributes:
        ready: What the session holds is there: its requests may run.
    """

    def __init__(self, session: LiveSession, among: dict[str, Holding]) -> None:
        self.session = session
        self.ready = False
        self._services = session.services
        self._among = among
        self._accepted = 0
        """Relayed requests that are to be taken over, and not started yet."""
        self._taking: set[str] = set()
        """Keys of relayed requests that are being taken over."""
        among[session.key] = session.pin = self
        session.keep_anything()

    def gone(self) -> None:
        if self._among.get(self.session.key) is self:
            del self._among[self.session.key]

    @property
    def idle(self) -> bool:
        """Nothing of the session runs here, or is about to."""
        return self.ready and not (self.session.exchanges or self.session.notices or self._accepted)

    # ---- beginning

    def begin(self) -> None:
        """The session was opened here."""
        self.ready = True
        self.session.inbox.hold(self, Cursor(0))

    async def take(self, previous: str | None) -> None:
        """This node has become the owner: ends what ran on the previous one, builds the state anew, then begins (P7).

        Requests that were relayed to the previous one, and that it did not begin, are run here.
        """
        session = self.session
        try:
            found = await retry_until_answered(lambda: survey(session.services.store, session.key))
            for stream in found.open:
                if stream.life.node == previous and not stream.life.is_relayed:
                    await retry_until_answered(lambda: end_open(session.log.append, stream, NODE_LOST))  # noqa: B023
            await retry_until_answered(lambda: announce(session.log, self._services.node_id))
            if not await self._rebuild():
                await self._fail()
                return
            self.ready = True
            session.inbox.hold(self, found.head)
            await self._accept(stream for stream in found.open if stream.life.is_relayed)
        except SessionNotFound:
            await session.end()

    async def _rebuild(self) -> bool:
        """Has the session's state built, in a task of its own: what builds it may cancel it, say (P16)."""
        rehydrate = self._services.settings.rehydrate
        if rehydrate is None:
            return True
        work = self._services.tasks.contained(
            self._rehydrate(rehydrate), "session %s: rehydrate", self.session.key[:12]
        )
        task = self._services.tasks.spawn(work)
        await asyncio.wait([task])
        return not task.cancelled() and task.result() is True

    async def _rehydrate(self, rehydrate: Rehydrate) -> bool:
        self.session.make_current()
        await rehydrate(self.session.connection)
        return True

    async def _fail(self) -> None:
        """The state could not be built: what waits for it gets an error, and the next request tries again."""
        found = await retry_until_answered(lambda: survey(self._services.store, self.session.key))
        for stream in found.open:
            if stream.life.is_relayed:
                await retry_until_answered(lambda: end_open(self.session.log.append, stream, NOT_REBUILT))  # noqa: B023
        await self.session.drop(NODE_LOST.error(retry_safe=False))
        await retry_until_answered(self._release)

    # ---- what the log brings

    async def is_over(self, events: Sequence[Event]) -> bool:
        """Whether another node has taken the session, as these events may say."""
        return any(self._names_another(event) for event in events) and await retry_until_answered(self.look)

    def _names_another(self, event: Event) -> bool:
        if kind_of(event.data) is not Kind.OWNER:
            return False
        try:
            return decode(event.data)["node"] not in (self._services.node_id, RELEASED)
        except (LookupError, TypeError, ValueError) as error:
            # Not what any release writes: it keeps nobody from what else comes.
            note_unreadable(self.session.key, event, error)
            return False

    async def catch_up(self) -> Cursor:
        """The store lost entries, maybe also that the session has another owner."""
        found = await retry_until_answered(lambda: survey(self._services.store, self.session.key))
        if not await retry_until_answered(self.look):
            await self._accept(found.open)
        return found.head

    async def look(self) -> bool:
        """Looks whether another node has become the owner, and gives everything up if so. Whether that was so.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.load`.
        """
        session = self.session
        owner = owner_in((await self._services.store.load(session.key, renew=False)).fields)
        if owner == self._services.node_id or session.pin is not self:
            return owner != self._services.node_id
        logger.warning("session %s: another node has taken it; its live view here is dropped", session.key[:12])
        # Not in this task: what is dropped may be what runs it.
        self._services.tasks.spawn(self.clean_up(NODE_LOST.error(retry_safe=False)))
        return True

    async def _accept(self, streams: Iterable[OpenStream]) -> None:
        """Runs what was relayed, and not begun, of these."""
        for stream in streams:
            opened = await retry_until_answered(lambda: whole(self._services.store, self.session.key, stream.opened))  # noqa: B023
            if opened is not None:
                try:
                    self._take_opened(opened)
                except Exception as error:
                    note_unreadable(self.session.key, opened, error)

    def _take_opened(self, event: Event) -> None:
        body = decode(event.data)
        if "relay" in body:
            self._accepted += 1
            self.session.spawn(self._run(event, body)).add_done_callback(self._has_run)

    def _has_run(self, _: asyncio.Task[None]) -> None:
        self._accepted -= 1
        self._services.drain.left()

    def hear(self, kind: Kind, event: Event, /) -> None:
        if kind is Kind.OPENED:
            self._take_opened(event)
        elif kind is Kind.NOTICE:
            self._handle_notice(decode(event.data))

    def _handle_notice(self, body: dict[str, Any]) -> None:
        if len(self.session.notices) >= self._services.settings.max_streams:
            logger.warning("session %s: dropped one notification of too many", self.session.key[:12])
            return
        message = JSONRPCNotification.model_validate(body["notification"], by_name=False)
        request = portable.unpack(body["http"], self.session.id)
        context = portable.context_of(request, body.get("trace", {}))
        self.session.spawn_notice(handle_notification(self.session, message, request), request, context)

    # ---- relayed requests

    async def _run(self, event: Event, body: dict[str, Any]) -> None:
        """Takes a relayed request over, and starts it if this node still holds the session then."""
        session = self.session
        if self._services.drain.is_closing:
            # The next owner's.
            return
        try:
            await self._try(event, body)
        except SessionNotFound:
            session.end_soon()
        except Diverged:
            # The store lost the stream: the connection that reads it finds out.
            pass
        except Exception as error:
            # What another release wrote, maybe: its client shall not wait for ever (P16).
            note_unreadable(session.key, event, error)
            answer = error_body(body["request"]["id"], NOT_STARTED.error(retry_safe=True))
            for attempt in (body["attempt"], body["attempt"] + 1):  # taken over, or not yet
                await retry_until_answered(lambda: end_stream(session.log.append, event.position, attempt, answer))  # noqa: B023

    async def _try(self, event: Event, body: dict[str, Any]) -> None:
        session = self.session
        message = JSONRPCRequest.model_validate(body["request"], by_name=False)
        key = request_key(message.id)
        request = portable.unpack(body["relay"]["http"], session.id)
        if (refusal := self._refusal(key)) is not None:
            await retry_until_answered(
                lambda: end_stream(session.log.append, event.position, body["attempt"], error_body(message.id, refusal))
            )
            return
        self._taking.add(key)
        try:
            with self._services.requests.hold(request, session.record.principal):
                await self._take_over(event, body, message, request)
        finally:
            self._taking.discard(key)

    def _refusal(self, key: str) -> ErrorData | None:
        session = self.session
        if key in session.exchanges or key in self._taking:
            return Refusal(ID_IN_USE).error
        if len(session.exchanges) + len(self._taking) >= self._services.settings.max_streams:
            return Refusal(TOO_MANY_REQUESTS).error
        try:
            self._services.requests.check(session.record.principal)
        except Refusal as refusal:
            return refusal.error
        return None

    async def _take_over(self, event: Event, body: dict[str, Any], message: JSONRPCRequest, request: Request) -> None:
        session, relay, attempt = self.session, body["relay"], body["attempt"]
        exchange = Exchange(session, message, request, head=Cursor(relay["since"]), protocol_version=relay["version"])
        if not await retry_until_answered(lambda: exchange.take_over(event.position, attempt, first=attempt + 1)):
            return
        # The owner is checked only after this node won the stream. If another node becomes the owner later, it sees the
        # stream as this one's and ends it: so the request cannot run twice.
        loaded = await retry_until_answered(lambda: self._services.store.load(session.key, renew=False))
        record = Record.from_fields(loaded.fields)
        if record.owner != self._services.node_id or not self.ready:
            failure = error_body(message.id, NODE_LOST.error(retry_safe=True))
            await retry_until_answered(lambda: end_stream(session.log.append, event.position, attempt + 1, failure))
            await self.look()
            return
        session.refresh(loaded, record)
        exchange.start(portable.context_of(request, relay.get("trace", {})))

    # ---- giving it up

    async def clean_up(self, error: ErrorData = SHUT_DOWN) -> None:
        """Stops what runs of the session here and runs its clean-up; what it held is gone then."""
        self.ready = False
        self.session.inbox.release(self)
        if error is SHUT_DOWN and self._services.settings.rehydrate is None:
            await self.session.end()
        else:
            await self.session.drop(error)

    async def hand_on(self) -> None:
        """Leaves the session to another node if it can be built anew there, else ends it.

        Raises:
            StoreUnavailable: As the store's methods. Other nodes then see that this node's lease lapses.
        """
        with contextlib.suppress(SessionNotFound):
            if self._services.settings.rehydrate is None:
                await self._services.store.delete(self.session.key)
            else:
                await self._release()

    async def _release(self) -> None:
        changes, expected = {OWNER: RELEASED.encode()}, {OWNER: self._services.node_id.encode()}
        if await self._services.store.update(self.session.key, changes, expect=expected):
            await announce(self.session.log, RELEASED)


async def announce(log: SessionLog, owner: str) -> None:
    """Says in the log which node holds the session now: to a former owner, and to requests that wait for one."""
    await log.append(Batch([draft(Kind.OWNER, pydantic_core.to_json({"node": owner}))]))
