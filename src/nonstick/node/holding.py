"""One session that this node holds: its live view is kept, and what other nodes relay is run here.

The session's log is followed for as long. A relayed request is an `opened` event that is run once it was taken over, by
the compare-and-set that fences every stream: once at most, whoever else believes to hold the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pydantic_core
from mcp_types import (
    INVALID_REQUEST,
    ErrorData,
    JSONRPCNotification,
    JSONRPCRequest,
    RequestId,
)
from starlette.requests import Request

from nonstick.core.events import Kind, decode, draft, glimpse, kind_of
from nonstick.core.jsonrpc import error_body, request_key
from nonstick.core.names import new_name
from nonstick.core.record import OWNER, RELEASED, Record
from nonstick.core.refusals import NODE_LOST, NOT_REBUILT, NOT_STARTED, SHUT_DOWN, Failure, Refusal
from nonstick.core.settings import Rehydrate
from nonstick.errors import Diverged, Fenced, SessionNotFound, StoreUnavailable, StreamClosed, without_text
from nonstick.log.follow import Slice, whole
from nonstick.session import notice, portable
from nonstick.session.exchange import Exchange
from nonstick.session.live import Session
from nonstick.store import MAX_READ, Batch, Cursor, Event, Skimmed
from nonstick.waiting.patience import patiently

__all__ = ["Holding", "OpenStream", "Survey", "announce", "end_lost", "survey"]

logger = logging.getLogger(__name__)

_RETRY_PAUSE: Final = 1.0
_CERTAIN_AFTER: Final = 1.0
"""Seconds that a node must be seen dead for."""


@dataclass(slots=True)
class OpenStream:
    """A stream without its end, as the log tells it.

    Attributes:
        opened: Its first event, of which its data may be cut off.
        relayed: Its request was relayed, and no node took it yet.
    """

    opened: Skimmed
    request: RequestId
    node: str
    attempt: int
    relayed: bool

    async def end(self, session: Session, failure: Failure) -> None:
        """Writes its end, unless it has one, or another attempt began."""
        body = error_body(self.request, failure.error(retry_safe=self.relayed))
        await _end_stream(session, self.opened.event.position, self.attempt, body)


@dataclass(slots=True)
class Survey:
    """What is open in a log, up to `head`."""

    head: Cursor
    open: list[OpenStream]


async def survey(session: Session) -> Survey:
    """Looks through the whole log for streams that have not ended.

    Raises:
        SessionNotFound, StoreUnavailable: As `Store.read`.
    """
    try:
        return await _survey(session)
    except Diverged:
        # Whoever needs to know asks again.
        raise StoreUnavailable("the session's log lost entries while it was read") from None


async def _survey(session: Session, only: Callable[[Skimmed], bool] = lambda _: True) -> Survey:
    head, unfinished = await _unfinished(session)
    # One after the other: a relayed request may be as long as any.
    found: list[OpenStream] = []
    for opened, taken in unfinished:
        try:
            if only(taken or opened) and (one := await _open_stream(session, opened, taken)) is not None:
                found.append(one)
        except (LookupError, TypeError, ValueError) as error:
            # Not what any release writes: it keeps nobody from the others.
            _pass_over(session, opened.event, error)
    return Survey(head, found)


async def _unfinished(session: Session) -> tuple[Cursor, list[tuple[Skimmed, Skimmed | None]]]:
    """The log's head; and of each stream that has not ended how it was opened, and who took it over last."""
    store, key, part = session.node.store, session.key, Slice(MAX_READ)
    opened: dict[int, Skimmed] = {}
    taken: dict[int, Skimmed] = {}
    head = Cursor(0)
    # Without its tag: what was dropped meanwhile is no stream that is open.
    while entries := await part.skim(store, key, Cursor(head.position)):
        for entry in entries:
            match kind_of(entry.event.data):
                case Kind.OPENED:
                    opened[entry.event.position] = entry
                case Kind.TAKEN:
                    taken[entry.event.stream] = entry
                case Kind.TERMINAL:
                    opened.pop(entry.event.stream, None)
        head = entries[-1].event.cursor
    return head, [(entry, taken.get(stream)) for stream, entry in opened.items()]


async def _open_stream(session: Session, opened: Skimmed, taken: Skimmed | None) -> OpenStream | None:
    """What the log tells of a stream; None if it was dropped meanwhile."""
    first = await whole(session.node.store, session.key, opened)
    if first is None:
        return None
    body = decode(first.data)
    stream = OpenStream(opened, body["request"]["id"], body["node"], body["attempt"], "relay" in body)
    if taken is not None and (last := await whole(session.node.store, session.key, taken)) is not None:
        body = decode(last.data)
        stream.node, stream.attempt, stream.relayed = body["node"], body["attempt"], False
    return stream


class Holding:
    """This node's hold on a session, from when it was opened or taken to its end or to another owner's."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.ready = False
        """What the session holds is there: its requests may run."""
        self._node = session.node
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
        self._following = self._node.spawn(self._follow(Cursor(0)))

    async def take(self, previous: str | None) -> None:
        """This node has become the owner: ends what ran on the previous one, builds the state anew, then begins (P7).

        Requests that were relayed to the previous one, and that it did not begin, are run here.
        """
        session = self.session
        try:
            found = await patiently(lambda: survey(session))
            for stream in found.open:
                if stream.node == previous and not stream.relayed:
                    await patiently(lambda: stream.end(session, NODE_LOST))  # noqa: B023
            await patiently(lambda: announce(session, self._node.id))
            if not await self._rebuild():
                await self._fail()
                return
            self.ready = True
            self._following = self._node.spawn(self._follow(found.head))
            for stream in found.open:
                if stream.relayed:
                    await patiently(lambda: self._accept_opened(stream))  # noqa: B023
        except SessionNotFound:
            await session.end()

    async def _rebuild(self) -> bool:
        """Has the session's state built, in a task of its own: what builds it may cancel it, say (P16)."""
        rehydrate = self._node.settings.rehydrate
        if rehydrate is None:
            return True
        work = self._node.contained(self._rehydrate(rehydrate), "session %s: rehydrate", self.session.key[:12])
        task = self._node.spawn(work)
        await asyncio.wait([task])
        return not task.cancelled() and task.result() is True

    async def _rehydrate(self, rehydrate: Rehydrate) -> bool:
        self.session.make_current()
        await rehydrate(self.session.connection)
        return True

    async def _fail(self) -> None:
        """The state could not be built: what waits for it gets an error, and the next request tries again."""
        for stream in (await patiently(lambda: survey(self.session))).open:
            if stream.relayed:
                await patiently(lambda: stream.end(self.session, NOT_REBUILT))  # noqa: B023
        await self.session.drop(NODE_LOST.error(retry_safe=False))
        await patiently(self._release)

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
                    found = await patiently(lambda: survey(self.session))
                    subscription = self.session.follower.subscribe(found.head)
                    if await patiently(self.look):
                        return
                    for stream in found.open:
                        await patiently(lambda: self._accept_opened(stream))  # noqa: B023
                    continue
                if any(self._names_another(event) for event in events) and await patiently(self.look):
                    return
                for event in events:
                    self._accept_contained(event)
        except SessionNotFound:
            # Not in this task, which the end stops.
            self._node.spawn(self.session.end())
        finally:
            subscription.close()

    def _names_another(self, event: Event) -> bool:
        return kind_of(event.data) is Kind.OWNER and decode(event.data)["node"] not in (self._node.id, RELEASED)

    async def look(self) -> bool:
        """Looks whether another node has become the owner, and gives everything up if so. Whether that was so.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.load`.
        """
        session = self.session
        owner = Record.from_fields((await self._node.store.load(session.key, renew=False)).fields).owner
        if owner == self._node.id or session.held is not self:
            return owner != self._node.id
        logger.warning("session %s: another node has taken it; its live view here is dropped", session.key[:12])
        # Not in this task: what is dropped may be what runs it.
        self._node.spawn(self.clean_up(NODE_LOST.error(retry_safe=False)))
        return True

    async def _accept_opened(self, stream: OpenStream) -> None:
        if (opened := await whole(self._node.store, self.session.key, stream.opened)) is not None:
            self._accept_contained(opened)

    def _accept_contained(self, event: Event) -> None:
        """One event that this node makes nothing of must not keep the next from being run."""
        try:
            self._accept(event)
        except Exception as error:
            _pass_over(self.session, event, error)

    def _accept(self, event: Event) -> None:
        kind = kind_of(event.data)
        if kind is Kind.OPENED:
            body = decode(event.data)
            if "relay" in body:
                self.session.spawn(self._run(event, body))
        elif kind is Kind.NOTICE:
            self._handle_notice(decode(event.data))

    def _handle_notice(self, body: dict[str, Any]) -> None:
        if len(self.session.notices) >= self._node.settings.max_streams:
            logger.warning("session %s: dropped one notification of too many", self.session.key[:12])
            return
        message = JSONRPCNotification.model_validate(body["notification"], by_name=False)
        request = portable.unpack(body["http"], self.session.id)
        context = portable.context_of(request, body.get("trace", {}))
        self.session.spawn_notice(notice.handle(self.session, message, request), request, context)

    # ---- relayed requests

    async def _run(self, event: Event, body: dict[str, Any]) -> None:
        """Takes a relayed request over, and starts it if this node still holds the session then."""
        session = self.session
        if self._node.is_closing:
            # The next owner's.
            return
        try:
            await self._try(event, body)
        except SessionNotFound:
            self._node.spawn(session.end())
        except Diverged:
            # The store lost the stream: whoever reads it finds out.
            pass
        except Exception as error:
            # What another release wrote, maybe: its client shall not wait for ever (P16).
            _pass_over(session, event, error)
            answer = error_body(body["request"]["id"], NOT_STARTED.error(retry_safe=True))
            for attempt in (body["attempt"], body["attempt"] + 1):  # taken over, or not yet
                await patiently(lambda: _end_stream(session, event.position, attempt, answer))  # noqa: B023

    async def _try(self, event: Event, body: dict[str, Any]) -> None:
        session = self.session
        message = JSONRPCRequest.model_validate(body["request"], by_name=False)
        key = request_key(message.id)
        request = portable.unpack(body["relay"]["http"], session.id)
        if (refusal := self._refusal(key)) is not None:
            await patiently(
                lambda: _end_stream(session, event.position, body["attempt"], error_body(message.id, refusal))
            )
            return
        self._taking.add(key)
        try:
            with self._node.requests.hold(request, session.principal):
                await self._take_over(event, body, message, request)
        finally:
            self._taking.discard(key)

    def _refusal(self, key: str) -> ErrorData | None:
        session = self.session
        if key in session.exchanges or key in self._taking:
            return ErrorData(
                code=INVALID_REQUEST, message="Conflict: a request with this id is still running in this session"
            )
        if len(session.exchanges) + len(self._taking) >= self._node.settings.max_streams:
            return ErrorData(
                code=INVALID_REQUEST, message="Too many requests of this session are running; wait for some"
            )
        try:
            self._node.requests.check(session.principal)
        except Refusal as refusal:
            return ErrorData(code=refusal.code, message=refusal.message)
        return None

    async def _take_over(self, event: Event, body: dict[str, Any], message: JSONRPCRequest, request: Request) -> None:
        session, relay, attempt = self.session, body["relay"], body["attempt"]
        exchange = Exchange(session, message, request, head=Cursor(relay["since"]), protocol_version=relay["version"])
        if not await patiently(lambda: exchange.take_over(event.position, attempt, first=attempt + 1)):
            return
        # Looked at after the compare-and-set: an owner that takes the session from here on ends this stream.
        loaded = await patiently(lambda: self._node.store.load(session.key, renew=False))
        record = Record.from_fields(loaded.fields)
        if record.owner != self._node.id or not self.ready:
            failure = error_body(message.id, NODE_LOST.error(retry_safe=True))
            await patiently(lambda: _end_stream(session, event.position, attempt + 1, failure))
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
        if error is SHUT_DOWN and self._node.settings.rehydrate is None:
            await self.session.end()
        else:
            await self.session.drop(error)

    async def let_go(self) -> None:
        """Leaves the session to another node if it can be built anew there, else ends it.

        Raises:
            StoreUnavailable: As the store's methods. Its lease's end then says the same.
        """
        with contextlib.suppress(SessionNotFound):
            if self._node.settings.rehydrate is None:
                await self._node.store.delete(self.session.key)
            else:
                await self._release()

    async def _release(self) -> None:
        changes, expected = {OWNER: RELEASED.encode()}, {OWNER: self._node.id.encode()}
        if await self._node.store.update(self.session.key, changes, expect=expected):
            await announce(self.session, RELEASED)


def _pass_over(session: Session, event: Event, error: Exception) -> None:
    where = (session.key[:12], event.position)
    logger.error("session %s: passed over event %d of its log", *where, exc_info=without_text(error))


async def announce(session: Session, owner: str) -> None:
    """Says in the log who holds the session now, for an owner of old, and for requests that wait for one."""
    await session.append(Batch([draft(Kind.OWNER, pydantic_core.to_json({"node": owner}))]))


async def end_lost(session: Session) -> bool:
    """Ends the streams of nodes that are gone: nobody may ever resume them, and the log keeps what has not ended.

    Returns whether there were any.

    Raises:
        SessionNotFound, StoreUnavailable: As the store's methods.
    """
    store = session.node.store
    nodes = {
        str(glimpse((taken or opened).event.data).get("node")) for opened, taken in (await _unfinished(session))[1]
    }
    lost = await store.lapsed(nodes - {session.node.id})
    if not lost:
        return False
    # Twice, because after an outage of the store every lease has lapsed.
    await asyncio.sleep(_CERTAIN_AFTER)
    lost &= await store.lapsed(lost)
    found = await _survey(session, lambda entry: glimpse(entry.event.data).get("node") in lost)
    ended = [stream for stream in found.open if not stream.relayed]
    for stream in ended:
        await stream.end(session, NODE_LOST)
    return bool(ended)


async def _end_stream(session: Session, stream: int, attempt: int, body: bytes) -> None:
    batch = Batch(
        [draft(Kind.TERMINAL, body)],
        writer=new_name(),
        sequence=1,
        stream=stream,
        attempt=attempt,
        terminal=True,
    )
    with contextlib.suppress(StreamClosed, Fenced):
        await session.append(batch)
