"""One POST with a request of a session that another node holds: through the log to its owner, and the answer back.

The request is the `opened` event of its stream. The owner takes the stream over to run the request, so that the request
runs once at most, even if the session moves to another node. This node reads the stream for its client as it would for
a client that resumes it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import pydantic_core
from mcp_types import ErrorData, JSONRPCNotification, JSONRPCRequest
from mcp_types.version import is_version_at_least
from starlette.requests import Request
from starlette.types import Receive

from nonstick.core.event_ids import EventId
from nonstick.core.events import Kind, body_of, draft, kind_of
from nonstick.core.jsonrpc import error_body
from nonstick.core.names import new_attempt
from nonstick.core.owners import Elsewhere, Where
from nonstick.core.refusals import ANSWER_UNREAD, IN_DOUBT, NOT_FOUND, SESSION_ENDED, SHUT_DOWN, Refusal
from nonstick.core.sse import sse_message
from nonstick.errors import SessionNotFound, StoreUnavailable
from nonstick.log.writer import once
from nonstick.session import portable, tracing
from nonstick.session.answer import Outcome
from nonstick.session.live import LiveSession
from nonstick.session.resumption import Resumption
from nonstick.store import NEW_STREAM, Cursor, Draft, Event

__all__ = ["Relay", "packed", "relay_notice"]

logger = logging.getLogger(__name__)

_PATIENCE: Final = 20.0
"""Seconds for the one append; well below `WRITER_SECONDS`, within which a repeat is recognised."""


def packed(session: LiveSession, request: Request) -> dict[str, Any]:
    """The request as the handlers of a session see it that one node holds: what may be written into its log."""
    services = session.services
    if not getattr(services.store.store, "encrypts", False):
        return portable.pack(request)
    return portable.pack(request, more=services.settings.relay_headers, query=services.settings.relay_query)


async def relay_notice(
    session: LiveSession, message: JSONRPCNotification, request: Request, *, patience: float
) -> None:
    """Has the session's owner run its handler for this notification, at most once.

    Raises:
        Refusal: The session's log has no room for it.
        SessionNotFound, StoreUnavailable: As `Store.append`.
    """
    notification = message.model_dump(mode="json", by_alias=True, exclude_unset=True)
    body = {"notification": notification, "http": packed(session, request), **_trace()}
    event = draft(Kind.NOTICE, pydantic_core.to_json(body))
    with await session.log.trimmer.hold(len(event.data)):
        await session.log.append(once(event), patience=patience)


def _trace() -> dict[str, Any]:
    """What the handler's spans belong to, wherever it runs (P18)."""
    trace = tracing.here()
    return {"trace": trace} if trace else {}


class Relay(Resumption):
    """A request that the session's owner runs, and its answer on its way to the client here.

    It is answered as the owner would have answered it: with JSON if the result is the first that comes, within the
    window, else with a stream.

    Args:
        owner: Who held the session when its record was loaded.
        since: The log's head then: a cancel that came later may concern this request.
        version: What the client speaks.
    """

    def __init__(
        self,
        session: LiveSession,
        message: JSONRPCRequest,
        request: Request,
        *,
        owner: Where,
        since: Cursor,
        version: str,
    ) -> None:
        super().__init__(session, EventId(0, Cursor(0)))
        self._primes = is_version_at_least(version, "2025-11-25")
        self._message = message
        self._answer = session.services.settings.answer
        attempt = new_attempt()
        body: dict[str, Any] = {
            "node": owner.node if isinstance(owner, Elsewhere) else "",
            "attempt": attempt,
            "request": message.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "relay": {"http": packed(session, request), "since": since.position, "version": version, **_trace()},
        }
        self._event = draft(Kind.OPENED, pydantic_core.to_json(body))
        self._attempt = attempt
        self._gave_id = self._primes
        self._outcome: asyncio.Future[bytes | Refusal | None] = asyncio.get_running_loop().create_future()

    async def begin(self, receive: Receive) -> Outcome:
        """Writes the request into the log, and reads its stream. Returns what to respond, once that is known.

        Raises:
            Refusal: The log has no room for it.
            SessionNotFound: As `Store.append`.
        """
        if not await self._open(self._event):
            return error_body(self._message.id, IN_DOUBT)
        await super().begin(receive)
        return await self._begun() or self.outlet

    async def end(self) -> None:
        await super().end()
        self.session.services.drain.left()

    async def _open(self, event: Draft) -> bool:
        """Writes the request into the log. False if nobody knows whether that was done.

        Raises:
            Refusal: The log has no room for it.
        """
        with await self.session.log.trimmer.hold(len(event.data)):
            return await self._write(event)

    async def _write(self, event: Draft) -> bool:
        batch = once(event, stream=NEW_STREAM, attempt=self._attempt)
        try:
            stream = (await self.session.log.append(batch, patience=_PATIENCE)).first
        except StoreUnavailable:
            # Not 503, which says "try again": it may run.
            return False
        self._opened = Event(stream, event.tag, stream, event.data)
        self._events = [self._opened]
        self._place = EventId(stream, self._opened.cursor, self._message.id)
        return True

    # ---- how it is answered

    async def _begun(self) -> bytes | Refusal | None:
        """The whole answer, or None for a stream."""
        window = {"auto": self.session.services.settings.window, "sse": 0.0, "json": None}[self._answer]
        await asyncio.wait([self._outcome], timeout=window)
        self._answer_with(None)
        return self._outcome.result()

    def _answer_with(self, outcome: bytes | Refusal | None) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    async def put(self, event: Event, event_id: EventId) -> None:
        if kind_of(event.data) is Kind.TERMINAL:
            self.session.log.trimmer.ended(event.stream)
            if self._answer != "sse":
                self._answer_with(body_of(event.data))
        self._answer_with(None)
        await super().put(event, event_id)
        self._gave_id = True

    async def feed(self) -> None:
        try:
            await super().feed()
        except SessionNotFound:
            self._answer_with(Refusal(NOT_FOUND))
            self._say(SESSION_ENDED)
        except Exception:
            if not self._gave_id:
                # It could not come back for the rest.
                self._say(ANSWER_UNREAD)
            raise
        finally:
            self._answer_with(None)

    async def _watch(self, receive: Receive) -> None:
        await super()._watch(receive)
        self._answer_with(None)

    # ---- when the node stops

    def hand_over(self) -> None:
        if self._gave_id:
            self._answer_with(None)
            super().hand_over()
        else:
            # It could not come back for the rest.
            self.stays = True

    def cut_off(self) -> None:
        self._answer_with(error_body(self._message.id, SHUT_DOWN))
        self._say(SHUT_DOWN)
        super().cut_off()

    def _say(self, error: ErrorData) -> None:
        self.outlet.put(sse_message(error_body(self._message.id, error)))
