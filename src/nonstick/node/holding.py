"""One session that this node holds: its live view is kept, and what other nodes relay is run here.

The session's log is followed for as long. A relayed request is an `opened` event that is run once it was taken over, by
the compare-and-set that fences every stream: once at most, whoever else believes to hold the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Final

import pydantic_core
from mcp_types import (
    ErrorData,
    JSONRPCNotification,
    JSONRPCRequest,
)
from starlette.requests import Request

from nonstick.core.events import Kind, decode, draft, kind_of
from nonstick.core.jsonrpc import error_body, request_key
from nonstick.core.record import OWNER, RELEASED, Record
from nonstick.core.refusals import ID_IN_USE, NODE_LOST, NOT_REBUILT, NOT_STARTED, SHUT_DOWN, TOO_MANY_REQUESTS, Refusal
from nonstick.core.settings import Rehydrate
from nonstick.errors import Diverged, SessionNotFound, StoreUnavailable
from nonstick.log.follow import whole
from nonstick.log.lost import end_open, end_stream
from nonstick.log.survey import OpenStream, note_unreadable, survey
from nonstick.session import portable
from nonstick.session.exchange import Exchange
from nonstick.session.kernel import handle_notification
from nonstick.session.live import Session
from nonstick.store import Batch, Cursor, Event
from nonstick.waiting.retry import retry_until_answered

__all__ = ["Holding", "announce"]

logger = logging.getLogger(__name__)

_RETRY_PAUSE: Final = 1.0
_CERTAIN_AFTER: Final = 1.0
"""Seconds that a node must be seen dead for."""


class Holding:
    """This node's hold on a session, from when it was opened or taken to its end or to another owner's."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.ready = False
        """What the session holds is there: its requests may run."""
        self._services = session.services
        self._taking: set[str] = set()
        """Keys of relayed requests that are being taken over."""
        self._following: asyncio.Task[None] | None = None
        session.keep_anything()

    @property
    def idle(self) -> bool:
        """Nothing of the session runs here."""
        return self.ready and not (self.session.exchanges or self.session.notices or self._taking)

    # ---- beginning

    def begin(self) -> None:
        """The session was opened here."""
        self.ready = True
        self._following = self._services.tasks.spawn(self._follow(Cursor(0)))

    async def take(self, previous: str | None) -> None:
        """This node has become the owner: ends what ran on the previous one, builds the state anew, then begins (P7).

        Requests that were relayed to the previous one, and that it did not begin, are run here.
        """
        session = self.session
        try:
            found = await retry_until_answered(lambda: survey(session.services.store, session.key))
            for stream in found.open:
                if stream.life.node == previous and not stream.life.is_relayed:
                    await retry_until_answered(lambda: end_open(session.append, stream, NODE_LOST))  # noqa: B023
            await retry_until_answered(lambda: announce(session, self._services.node_id))
            if not await self._rebuild():
                await self._fail()
                return
            self.ready = True
            self._following = self._services.tasks.spawn(self._follow(found.head))
            for stream in found.open:
                if stream.life.is_relayed:
                    await retry_until_answered(lambda: self._accept_opened(stream))  # noqa: B023
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
                await retry_until_answered(lambda: end_open(self.session.append, stream, NOT_REBUILT))  # noqa: B023
        await self.session.drop(NODE_LOST.error(retry_safe=False))
        await retry_until_answered(self._release)

    # ---- what the log brings

    async def _follow(self, after: Cursor) -> None:
        subscription = self.session.follower.subscribe(after)
        try:
            while True:
                try:
                    events = await subscription.next()
                except StoreUnavailable:
                    await asyncio.sleep(_RETRY_PAUSE)
                    continue
                except Diverged:
                    # The store lost entries, maybe also that the session has another owner.
                    subscription.close()
                    found = await retry_until_answered(lambda: survey(self._services.store, self.session.key))
                    subscription = self.session.follower.subscribe(found.head)
                    if await retry_until_answered(self.look):
                        return
                    for stream in found.open:
                        await retry_until_answered(lambda: self._accept_opened(stream))  # noqa: B023
                    continue
                if any(self._names_another(event) for event in events) and await retry_until_answered(self.look):
                    return
                for event in events:
                    self._accept_contained(event)
        except SessionNotFound:
            # Not in this task, which the end stops.
            self._services.tasks.spawn(self.session.end())
        finally:
            subscription.close()

    def _names_another(self, event: Event) -> bool:
        return kind_of(event.data) is Kind.OWNER and decode(event.data)["node"] not in (
            self._services.node_id,
            RELEASED,
        )

    async def look(self) -> bool:
        """Looks whether another node has become the owner, and gives everything up if so. Whether that was so.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.load`.
        """
        session = self.session
        owner = Record.from_fields((await self._services.store.load(session.key, renew=False)).fields).owner
        if owner == self._services.node_id or session.held is not self:
            return owner != self._services.node_id
        logger.warning("session %s: another node has taken it; its live view here is dropped", session.key[:12])
        # Not in this task: what is dropped may be what runs it.
        self._services.tasks.spawn(self.clean_up(NODE_LOST.error(retry_safe=False)))
        return True

    async def _accept_opened(self, stream: OpenStream) -> None:
        if (opened := await whole(self._services.store, self.session.key, stream.opened)) is not None:
            self._accept_contained(opened)

    def _accept_contained(self, event: Event) -> None:
        """One event that this node makes nothing of must not keep the next from being run."""
        try:
            self._accept(event)
        except Exception as error:
            note_unreadable(self.session.key, event, error)

    def _accept(self, event: Event) -> None:
        kind = kind_of(event.data)
        if kind is Kind.OPENED:
            body = decode(event.data)
            if "relay" in body:
                self.session.spawn(self._run(event, body))
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
            self._services.tasks.spawn(session.end())
        except Diverged:
            # The store lost the stream: whoever reads it finds out.
            pass
        except Exception as error:
            # What another release wrote, maybe: its client shall not wait for ever (P16).
            note_unreadable(session.key, event, error)
            answer = error_body(body["request"]["id"], NOT_STARTED.error(retry_safe=True))
            for attempt in (body["attempt"], body["attempt"] + 1):  # taken over, or not yet
                await retry_until_answered(lambda: end_stream(session.append, event.position, attempt, answer))  # noqa: B023

    async def _try(self, event: Event, body: dict[str, Any]) -> None:
        session = self.session
        message = JSONRPCRequest.model_validate(body["request"], by_name=False)
        key = request_key(message.id)
        request = portable.unpack(body["relay"]["http"], session.id)
        if (refusal := self._refusal(key)) is not None:
            await retry_until_answered(
                lambda: end_stream(session.append, event.position, body["attempt"], error_body(message.id, refusal))
            )
            return
        self._taking.add(key)
        try:
            with self._services.requests.hold(request, session.principal):
                await self._take_over(event, body, message, request)
        finally:
            self._taking.discard(key)
            self._services.drain.left()

    def _refusal(self, key: str) -> ErrorData | None:
        session = self.session
        if key in session.exchanges or key in self._taking:
            return Refusal(ID_IN_USE).error
        if len(session.exchanges) + len(self._taking) >= self._services.settings.max_streams:
            return Refusal(TOO_MANY_REQUESTS).error
        try:
            self._services.requests.check(session.principal)
        except Refusal as refusal:
            return refusal.error
        return None

    async def _take_over(self, event: Event, body: dict[str, Any], message: JSONRPCRequest, request: Request) -> None:
        session, relay, attempt = self.session, body["relay"], body["attempt"]
        exchange = Exchange(session, message, request, head=Cursor(relay["since"]), protocol_version=relay["version"])
        if not await retry_until_answered(lambda: exchange.take_over(event.position, attempt, first=attempt + 1)):
            return
        # Looked at after the compare-and-set: an owner that takes the session from here on ends this stream.
        loaded = await retry_until_answered(lambda: self._services.store.load(session.key, renew=False))
        record = Record.from_fields(loaded.fields)
        if record.owner != self._services.node_id or not self.ready:
            failure = error_body(message.id, NODE_LOST.error(retry_safe=True))
            await retry_until_answered(lambda: end_stream(session.append, event.position, attempt + 1, failure))
            await self.look()
            return
        session.refresh(loaded, record)
        exchange.start(portable.context_of(request, relay.get("trace", {})))

    # ---- giving it up

    async def clean_up(self, error: ErrorData = SHUT_DOWN) -> None:
        """Stops what runs of the session here and runs its clean-up; what it held is gone then."""
        self.ready = False
        if self._following is not None:
            self._following.cancel()
        if error is SHUT_DOWN and self._services.settings.rehydrate is None:
            await self.session.end()
        else:
            await self.session.drop(error)

    async def let_go(self) -> None:
        """Leaves the session to another node if it can be built anew there, else ends it.

        Raises:
            StoreUnavailable: As the store's methods. Its lease's end then says the same.
        """
        with contextlib.suppress(SessionNotFound):
            if self._services.settings.rehydrate is None:
                await self._services.store.delete(self.session.key)
            else:
                await self._release()

    async def _release(self) -> None:
        changes, expected = {OWNER: RELEASED.encode()}, {OWNER: self._services.node_id.encode()}
        if await self._services.store.update(self.session.key, changes, expect=expected):
            await announce(self.session, RELEASED)


async def announce(session: Session, owner: str) -> None:
    """Says in the log who holds the session now, for an owner of old, and for requests that wait for one."""
    await session.append(Batch([draft(Kind.OWNER, pydantic_core.to_json({"node": owner}))]))
