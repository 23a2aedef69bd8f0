"""One POST that carries a request: a JSON answer, or a stream.

The handler runs in a task of its own: a client that goes away does not stop it. Until it sends something, or the window
passes, nothing of it is in the log. Then the request is *promoted*: from there on every message is appended first,
then acknowledged by the store, then written to the socket (P3).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import Context, ContextVar, copy_context
from functools import cached_property
from typing import Any, Final, Literal, assert_never

import anyio
import pydantic_core
from mcp.shared.dispatcher import CallOptions
from mcp.shared.exceptions import MCPError, NoBackChannelError
from mcp.shared.jsonrpc_dispatcher import progress_token_from_params
from mcp.shared.message import ServerMessageMetadata
from mcp.shared.transport_context import TransportContext
from mcp_types import INTERNAL_ERROR, ErrorData, JSONRPCRequest, RequestId
from mcp_types.version import is_version_at_least
from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import Send

from nonstick.core.event_ids import EventId, cursor_text
from nonstick.core.events import Kind, decode, draft
from nonstick.core.jsonrpc import LONGEST_METHOD, error_body, notification_body, request_key, result_body
from nonstick.core.names import new_attempt, new_name
from nonstick.core.record import UNCONFIRMED, Record, opening_fields, subscription_field
from nonstick.core.refusals import (
    CANCELLED_BY_CLIENT,
    INTERRUPTED,
    NOT_FOUND,
    NOT_OPENED,
    NOT_RUN_HERE,
    NOT_STORED,
    SHUT_DOWN,
    STORE_UNAVAILABLE,
    STREAM_LOST,
    TOO_MANY_SESSIONS,
    TOO_MANY_SESSIONS_OF_PRINCIPAL,
    Refusal,
)
from nonstick.core.settings import EVERYBODY, Answer
from nonstick.core.sse import SSE_HEADERS, sse_frame, sse_message, sse_priming, sse_retry
from nonstick.errors import (
    AlreadyExists,
    Diverged,
    Fenced,
    SessionNotFound,
    StateNotJSON,
    StateTooLarge,
    StoreError,
    StoreUnavailable,
    StreamClosed,
    TooManySessions,
    without_text,
)
from nonstick.http.intake import after_body
from nonstick.http.respond import JSON_TYPE, refuse, send_body
from nonstick.log.trim import Hold
from nonstick.session import ending, tracing
from nonstick.session.kernel import initialization
from nonstick.session.live import Session
from nonstick.session.outlet import Outlet
from nonstick.session.renewal import unattended_seconds
from nonstick.store import NEW_STREAM, Batch, Cursor, Draft, Event

__all__ = ["Exchange", "current_attempt"]

logger = logging.getLogger(__name__)

_UNSAVED: Final = ErrorData(
    code=INTERNAL_ERROR,
    message="The request ran, but the session store could not be reached to save what it changed in the session",
    data={"reason": "state_not_saved", "retrySafe": False},
)
_NOT_RUN: Final = ErrorData(
    code=INTERNAL_ERROR,
    message="The request was not run: the session store could not be reached",
    data={"reason": "store_unavailable", "retrySafe": True},
)

_NEVER_OPENED: Final = ErrorData(code=INTERNAL_ERROR, message="The session took too long to open")

_UNSENT: Final = 1000
_UNSENT_BYTES: Final = 1024 * 1024
"""Messages of one request that wait for a store that is away; beyond that the oldest are dropped."""


_MOST_TRIES: Final = 3
"""Tasks that are to tell one request's end, one after the other: somebody may cancel each of them."""

_EMIT_PATIENCE: Final = 20.0
_RETRY_PAUSE: Final = 1.0


_attempt: ContextVar[int] = ContextVar("nonstick_attempt", default=1)


def current_attempt() -> int:
    """Which attempt at the current request this is: 1, or more where a lost node's request is run again (P7)."""
    return _attempt.get()


class Exchange:
    """A client's request while it runs on this node; the `DispatchContext` that the SDK's kernel sees.

    Args:
        head: The log's head when the record was loaded: what came later may concern this request.
        protocol_version: What the client speaks; decides whether it understands a priming event.
        opens: This is the `initialize` that the session begins with.
        hold: Room in the log for the request, which is kept there whole.
        connection: What the client waits at for the answer: `request`, unless that was made of one.
    """

    def __init__(
        self,
        session: Session,
        message: JSONRPCRequest,
        request: Request,
        *,
        head: Cursor,
        protocol_version: str,
        principal: bytes = b"",
        opens: bool = False,
        connection: Request | None = None,
        hold: Hold | None = None,
    ) -> None:
        self.session = session
        self.message = message
        self.key = request_key(message.id)
        self._request = request
        self._connection = connection
        self._hold = hold
        self.head = head
        self.stream = 0
        self.attempt = self._first_attempt = new_attempt()
        self._settings = session.services.settings
        self._answer: Answer = self._settings.answer
        self._principal = principal or session.principal
        self._opens = opens
        self._visible = not opens
        self._held: list[Draft] = []
        self._resumable = is_version_at_least(protocol_version, "2025-11-25")
        self._progress_token = progress_token_from_params(message.params)
        self.transport = TransportContext(
            kind="streamable-http", can_send_request=self._answer != "json", headers=request.headers
        )
        self._scope = anyio.CancelScope()
        self._stopped: Literal["cancelled", "ended", "failed", "fenced"] | None = None
        self._failure: ErrorData | None = None
        self._closed = False
        self._abandoned = False
        """Its end is told without waiting for its handler."""
        self._concluded = False
        """Its end was told, or is another's to tell."""
        self._tries = 0
        """Tasks, beside the handler's, that were to tell its end."""
        self._body: bytes | None = None
        """The answer, once the handler has ended."""
        self._window: asyncio.TimerHandle | None = None
        self._trace: dict[str, str] = {}
        self._writing = asyncio.Lock()
        self._sequence = 0
        self._in_doubt: Batch | None = None
        self._gave_id = False
        # How the response begins; None for a stream.
        self._outcome: bytes | Refusal | None = None
        self._decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_decided = False
        self._attending = False
        self.began = math.inf
        """When, in the loop's time, as far as that matters: not while the window lasts."""
        self._is_awaited = False
        """The client waits at its connection."""
        self._watching: asyncio.Task[None] | None = None
        self._limit: asyncio.TimerHandle | None = None

    # Most requests end before they need these.

    @cached_property
    def cancel_requested(self) -> anyio.Event:
        """Set when the request is to stop."""
        return anyio.Event()

    @cached_property
    def _writer(self) -> str:
        return new_name()

    @cached_property
    def _unsent(self) -> deque[Draft]:
        return deque(maxlen=_UNSENT)

    @cached_property
    def _outlet(self) -> Outlet:
        return Outlet(
            patience=self._settings.send_timeout,
            ping=self._settings.ping_interval,
            until_closing=self.session.services.drain.until_closing,
        )

    # ---- the HTTP side

    async def serve(self, send: Send, headers: list[tuple[bytes, bytes]], context: Context) -> None:
        """Runs the request and writes its response.

        Args:
            headers: Go out with every response of the session.
            context: The handler's.
        """
        self._is_awaited = True
        self._start(context)
        try:
            # A caller that is cancelled leaves the handler alone.
            await self._decided
            await self._respond(send, headers)
        finally:
            self._is_awaited = False
            if self._outcome is None:
                # It streams, or will: to nobody.
                self._outlet.leave()

    async def _respond(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        outcome = self._outcome
        if outcome is None:
            await send({"type": "http.response.start", "status": 200, "headers": [*headers, *SSE_HEADERS]})
            await self._outlet.pump(send)
        elif isinstance(outcome, Refusal):
            await refuse(send, outcome, [] if self._opens else headers)
        else:
            if self._opens and not self._visible:
                headers = []
            await send_body(send, 200, outcome, [*headers, JSON_TYPE])

    def shows_client(self, now: float) -> bool:
        """Whether the client is there, as far as its connection tells."""
        return self._is_awaited and now - self.began < self._settings.connection_lifetime

    def hand_over(self) -> None:
        """Closes the client's connection, if it can come back for the rest."""
        if self._gave_id:
            self._outlet.put(sse_retry(self._settings.retry_interval))
            self._outlet.end()

    async def _watch(self, connection: Request) -> None:
        """Waits until the client goes. Nothing stops for that, but it is not seen here any more (P10)."""
        receive = after_body(connection.receive)
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_awaited = False
        if self._opens:
            # Nobody else was told of the session.
            self.end()
        self._outlet.leave()

    async def take_over(self, stream: int, attempt: int, *, first: int) -> bool:
        """Makes the stream of a request that another node opened this node's, as the next attempt at it.

        To run it, `start`. False if it is another node's already, or has ended. May be repeated as it was.
        """
        self.stream, self.attempt, self._first_attempt = stream, attempt + 1, first
        body = {"node": self.session.services.node_id, "attempt": self.attempt}
        taken = draft(Kind.TAKEN, pydantic_core.to_json(body))
        self._sequence = 1
        batch = Batch([taken], writer=self._writer, sequence=1, stream=stream, attempt=attempt, take_over=True)
        try:
            await self.session.services.store.append(self.session.key, batch)
        except (StreamClosed, Fenced):
            return False
        return True

    def start(self, context: Context) -> None:
        """Runs a request that was taken over, for those who read its stream."""
        self._outlet.leave()
        self._answer_with(None)
        self._start(context)

    def _start(self, context: Context) -> None:
        session = self.session
        if self._settings.reexecute != "never":
            self._trace = context.run(tracing.here)
        session.exchanges[self.key] = self
        session.__enter__()
        # Its connection holds the same place: it takes one until both have ended.
        session.services.requests.acquire(self._request, self._principal)
        session.services.tasks.spawn(self._run(), context).add_done_callback(self._ran)

    # ---- the handler's side

    async def _run(self) -> None:
        """Runs the handler, and tells its end. If the handler left this task unfit for that, `_ran` sees to it."""
        self._window = asyncio.get_running_loop().call_later(self._settings.window, self._window_passed)
        _attempt.set(self.attempt - self._first_attempt + 1)
        self.session.make_current()
        if self.session.was_cancelled(self.key, self.head):
            self.session.use_up_cancel(self.key)
            self.cancel()
        if self._answer == "sse" and not self._opens and not await self._promote_first():
            return
        try:
            with self._scope:
                if self._scope.cancel_called:
                    # Cancelled before it began, the handler does not run to its first wait either.
                    await anyio.lowlevel.checkpoint_if_cancelled()
                self._body = await self._handle()
        except BaseException as exception:
            # A cancellation that is none of ours, or what a scope says that the handler did not leave.
            if self._body is None:
                self._body = self._told(exception)
            return
        await self._conclude()

    async def _promote_first(self) -> bool:
        """Makes the request a stream before its handler runs. False if that is the end of it already."""
        try:
            await self._promote()
        except StoreError as error:
            self._closed = self._concluded = True
            await self._give_up(error)
            self._leave()
            return False
        return True

    def _ran(self, _: asyncio.Task[None]) -> None:
        """The task has ended. If it did not tell the request's end, another one does, which nobody cancels (P16)."""
        services = self.session.services
        if not self._concluded and not services.tasks.stopped and self._tries < _MOST_TRIES:
            self._tries += 1
            services.tasks.spawn(self._conclude()).add_done_callback(self._ran)
            return
        if not self._concluded:
            self._closed = True
            self._leave()
            self._outlet.end()
        if not self._is_decided:
            # Nobody shall wait for what will not come.
            if self._window is None:
                self._refuse(Refusal(NOT_RUN_HERE))
            else:
                self._refuse(Refusal(INTERRUPTED))
        services.requests.release(self._request)
        self.session.__exit__()

    async def _conclude(self) -> None:
        """Tells the request's end, once, whatever it is."""
        if self._window is not None:
            self._window.cancel()
        if not self._abandoned:
            self._closed = True
            try:
                await self._finish(self._body if self._stopped is None else self._stopped_body())
            except StoreError as error:
                await self._give_up(error)
            except Exception as error:
                logger.error(
                    "the answer to %r could not be written as it was; the client gets an error instead",
                    self.message.method,
                    exc_info=without_text(error),
                )
                await self._say_untold()
        self._concluded = True
        self._leave()

    async def _give_up(self, error: StoreError) -> None:
        """The store says that this request's end is not ours to tell, or cannot take it now."""
        match error:
            case SessionNotFound():
                self._refuse(Refusal(NOT_FOUND))
                self.session.services.tasks.spawn(self.session.end())
            case StreamClosed() | Fenced():
                # Another node has ended this stream: nothing more of it is ours to say, or to keep (P7).
                self.session.state.revert()
                self._give_up_stream()
            case StoreUnavailable():
                self._refuse(Refusal(STORE_UNAVAILABLE))
                if self._in_doubt is not None:
                    # A stream may have been opened that nobody would end.
                    await self._end_stream(error_body(self.message.id, _NOT_RUN), {})
            case _:
                logger.error(
                    "session %s: the end of a request could not be stored: %s",
                    self.session.key[:12],
                    type(error).__name__,
                )
                await self._say_untold()

    async def _say_untold(self) -> None:
        """What should have been said could not be: this can."""
        body = error_body(self.message.id, ending.UNTOLD)
        if self.stream or self._in_doubt is not None:
            with contextlib.suppress(SessionNotFound, StreamClosed, Fenced):
                await self._end_stream(body, {})
            self._outlet.end()
        self._answer_with(body)

    def _leave(self) -> None:
        if self.session.exchanges.get(self.key) is self:
            del self.session.exchanges[self.key]
        self.session.services.drain.left()
        if self._hold is not None:
            self._hold.release()
        if self._watching is not None:
            self._watching.cancel()
        if self._limit is not None:
            self._limit.cancel()
        if self._attending:
            self._attending = False
            self.session.leave()
        if not self._visible:
            self.session.services.tasks.spawn(self.session.end())

    async def _handle(self) -> bytes:
        """Runs the kernel. The single place where an exception becomes a JSON-RPC error."""
        message = self.message
        if message.method == "initialize":
            self.session.runner.init_options = initialization(self.session.services.served.app)
        try:
            result = await self.session.runner.on_request(self, message.method, message.params)
            return result_body(message.id, result)
        except (asyncio.CancelledError, GeneratorExit):
            # Maybe of this task, and so for the code that began it.
            raise
        except BaseException as exception:
            return self._told(exception)

    def _told(self, exception: BaseException) -> bytes:
        """The answer to a request whose handler raised this. Never raises."""
        self._failure = ending.error_of(exception)
        if not isinstance(exception, MCPError | ValidationError):
            self.session.services.tasks.report(exception, "handler for %r", self.message.method)
        return error_body(self.message.id, self._failure)

    def _stopped_body(self) -> bytes | None:
        match self._stopped:
            case "cancelled":
                # This era's wire ends a request only with a response, also a cancelled one (as the SDK).
                self._failure = CANCELLED_BY_CLIENT
            case "failed":
                assert self._failure is not None
            case "fenced":
                raise Fenced
            case "ended" | None:
                return None
            case _ as never:
                assert_never(never)
        return error_body(self.message.id, self._failure)

    async def _finish(self, body: bytes | None) -> None:
        """Saves what the request changed, and gives the answer: none if the session has ended."""
        if body is None and self._stopped is None:
            body = self._told(asyncio.CancelledError())
        async with self._writing:
            if body is None:
                self._refuse(Refusal(NOT_FOUND))
                return
            if self._opens:
                await self._open(body)
                return
            body, changes = self._changes(body)
            if not changes:
                await self._save(body, changes)
                return
            async with self.session.changing_state:
                await self._save(*self._changes(body))

    async def _save(self, body: bytes, changes: Mapping[str, bytes | None]) -> None:
        """Stores these changes of session state, and those of the record, and gives the answer."""
        fields = {**changes, **self._record_changes()}
        news = self._news()
        if self.stream or self._in_doubt is not None:
            await self._end_stream(body, fields, news)
        else:
            try:
                if news:
                    await self.session.append(Batch(news, fields=fields))
                elif fields:
                    await self.session.services.store.update(self.session.key, fields)
            except StoreUnavailable:
                # Not 503, which says "try again": it would run twice.
                self._answer_with(error_body(self.message.id, _UNSAVED))
                return
            self._answer_with(body)
        self.session.state.saved(changes)
        if (level := fields.get("level")) is not None:
            # Other requests that run here may not follow the log, which says so too.
            self.session.log_level = level.decode()
        if self._failure is None:
            self.session.confirm()

    def _changes(self, body: bytes) -> tuple[bytes, dict[str, bytes | None]]:
        """The answer, which is an error if state cannot be saved, and the state to save in either case."""
        try:
            return body, self.session.state.changes()
        except (StateNotJSON, StateTooLarge) as error:
            self._failure = ErrorData(code=INTERNAL_ERROR, message=str(error))
            return error_body(self.message.id, self._failure), self.session.state.changes()

    async def _end_stream(self, body: bytes, fields: Mapping[str, bytes | None], news: Sequence[Draft] = ()) -> None:
        """Appends the terminal event. It waits as long as it must for the store: without it no resume would end."""
        terminal = draft(Kind.TERMINAL, body)
        while True:
            try:
                await self._append([*news, terminal], terminal=True, fields=fields)
                break
            except Diverged:
                terminal = draft(Kind.TERMINAL, error_body(self.message.id, STREAM_LOST))
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_PAUSE)
            except (SessionNotFound, StreamClosed, Fenced):
                raise
            except Exception as error:
                # A defect of the store's, maybe with what it was to write: the end alone is tried, as another writer.
                logger.error("the end of a stream could not be written", exc_info=without_text(error))
                terminal, news, fields = draft(Kind.TERMINAL, error_body(self.message.id, ending.UNTOLD)), (), {}
                self._forget_doubt()
                await asyncio.sleep(_RETRY_PAUSE)
        self._outlet.end()

    def _record_changes(self) -> dict[str, bytes | None]:
        """What a successful request of the protocol changes in the session record (P2)."""
        if self._failure is not None:
            return {}
        params = self.message.params or {}
        match self.message.method:
            case "initialize":
                connection = self.session.connection
                assert connection.client_params is not None
                fields = opening_fields(connection.protocol_version, connection.client_params, self._principal)
                return {name: fields[name] for name in ("protocol", "client")}
            case "logging/setLevel":
                return {"level": str(params["level"]).encode()}
            case "resources/subscribe":
                return {subscription_field(str(params["uri"])): str(params["uri"]).encode()}
            case "resources/unsubscribe":
                return {subscription_field(str(params["uri"])): None}
            case _:
                return {}

    def _news(self) -> list[Draft]:
        """What other nodes have to know of the record's changes at once: those that carry the session's streams."""
        if self._failure is not None:
            return []
        params = self.message.params or {}
        match self.message.method:
            case "logging/setLevel":
                body = {"level": params["level"]}
            case "resources/subscribe":
                # What was broadcast after this, the client expects to hear, whoever learns of this however late.
                head = self.session.services.cluster_log.broadcasts.head
                body = {"subscribed": params["uri"], "heard": cursor_text(head)}
            case "resources/unsubscribe":
                body = {"unsubscribed": params["uri"]}
            case _:
                return []
        return [draft(Kind.CHANGED, pydantic_core.to_json(body))]

    # ---- opening a session

    async def _open(self, body: bytes) -> None:
        """Makes the session visible, now that its `initialize` succeeded; a failed one leaves nothing (P2)."""
        session, settings = self.session, self._settings
        body, changes = self._changes(body)
        if self._failure is not None:
            self._answer_with(body)
            return
        connection = session.connection
        assert connection.client_params is not None
        fields = opening_fields(connection.protocol_version, connection.client_params, self._principal)
        fields |= {name: data for name, data in changes.items() if data is not None} | session.first_fields
        fields |= session.services.owners.opening_fields()
        # Before the session is there: what comes later it is to hear, what came before it may (P11).
        fields["heard"] = (cursor_text(session.services.cluster_log.broadcasts.head) or "").encode()
        fields |= UNCONFIRMED if settings.confirms else {}
        try:
            await session.services.store.create(
                session.key, fields, lifetime=settings.first_lifetime, limits=settings.session_limits(self._principal)
            )
        except TooManySessions as error:
            full = TOO_MANY_SESSIONS if error.group == EVERYBODY else TOO_MANY_SESSIONS_OF_PRINCIPAL
            self._answer_with(Refusal(full))
            return
        except AlreadyExists:
            if not self._tries:
                # What is there is nobody's whom this client could ask for it. The next try draws another id.
                self._answer_with(Refusal(NOT_OPENED))
                return
            # The task before this one made it, and was cancelled before it heard so.
        self._visible = True
        session.record = Record.from_fields(fields)
        session.unconfirmed = settings.confirms
        session.services.views[session.key] = session
        session.state.saved(changes)
        session.services.owners.opened(session.key)
        await session.opened()
        if self._held or self._answer == "sse":
            # What a middleware sent meanwhile is on this request's stream, before its answer.
            terminal = draft(Kind.TERMINAL, body)
            await self._append([*self._held, terminal], terminal=True)
            self._outlet.end()
        else:
            self._answer_with(body)

    # ---- promotion

    def _window_passed(self) -> None:
        """From here on the node follows the log, so that cancels and ends from elsewhere reach the request (P5, P6)."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        self.began = loop.time()
        if self._connection is not None and self._is_awaited:
            # What the host made of `receive` goes on in the context of the request.
            self._watching = self.session.services.tasks.spawn(self._watch(self._connection), copy_context())
        if self._opens:
            # It has no session yet whose expiry would end it.
            self._limit = loop.call_later(unattended_seconds(self._settings), self.fail, _NEVER_OPENED)
            return
        self._attending = True
        self.session.attend()
        if self._answer == "auto":
            self.session.services.tasks.spawn(self._promote_in_time())

    async def _promote_in_time(self) -> None:
        while not self._closed:
            try:
                await self._promote()
                return
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_PAUSE)
            except (SessionNotFound, StreamClosed, Fenced, Diverged):
                return

    async def _promote(self) -> None:
        """Makes the request a stream, if it is none and its handler still runs."""
        with anyio.CancelScope(shield=True):
            async with self._writing:
                if not self.stream and not self._closed:
                    await self._append([])

    async def _emit(self, event: Draft, expect: Sequence[str] = ()) -> None:
        """Appends a message, then writes it to the socket.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.append`.
            StreamClosed, Fenced: Another node ended the stream; the handler is cancelled.
            Diverged: The store lost events of the stream; the handler is cancelled.
        """
        if self._opens:
            self._held.append(event)
            return
        with anyio.CancelScope(shield=True):
            async with self._writing:
                await self._append([event], expect=expect)
        if await self.session.trimmer.full():
            self.fail(ErrorData(code=INTERNAL_ERROR, message="The session's log is full; the request was ended"))
            await anyio.lowlevel.checkpoint()
        await self._outlet.room()

    async def _append(
        self,
        drafts: Sequence[Draft],
        *,
        terminal: bool = False,
        expect: Sequence[str] = (),
        fields: Mapping[str, bytes | None] | None = None,
    ) -> None:
        """Appends to the stream, which the first append opens, and gives what was acknowledged to the socket.

        Only under `_writing`, and never cancelled: at most one append is outstanding, and one whose outcome is not
        known is repeated as it was before the next.
        """
        if (doubted := self._in_doubt) is not None:
            try:
                await self._write(doubted)
            except StoreUnavailable:
                if not expect and not terminal:
                    self._keep(drafts)
                raise
            if doubted.terminal:
                return
        opens = not self.stream
        events = [*([self._opened()] if opens else []), *self._unsent, *drafts]
        self._unsent.clear()
        if not events:
            return
        self._sequence += 1
        await self._write(
            Batch(
                events,
                writer=self._writer,
                sequence=self._sequence,
                stream=NEW_STREAM if opens else self.stream,
                attempt=self.attempt,
                terminal=terminal,
                expect=expect,
                fields=fields or {},
            )
        )

    def _keep(self, drafts: Sequence[Draft]) -> None:
        """Keeps these until the store is back, and of all that are kept the latest."""
        self._unsent.extend(drafts)
        size = sum(len(draft.data) for draft in self._unsent)
        while size > _UNSENT_BYTES:
            size -= len(self._unsent.popleft().data)

    async def _write(self, batch: Batch) -> None:
        session = self.session
        self._in_doubt = batch
        try:
            appended = await session.append(batch, patience=_EMIT_PATIENCE)
        except Diverged:
            # Whoever reads on would not know what is missing: the request ends here, under a new name (P9).
            logger.warning("session %s: the store lost events of a request's stream", session.key[:12])
            self._forget_doubt()
            self.fail(STREAM_LOST)
            raise
        self._in_doubt = None
        opens = batch.stream == NEW_STREAM
        if opens:
            self.stream = appended.first
            self._answer_with(None)
            if self._hold is not None:
                self._hold.release()
        for offset, event in enumerate(batch.events):
            event_id = self._event_id(Cursor(appended.first + offset, event.tag))
            if event.data[1] in (Kind.MESSAGE, Kind.TERMINAL):
                self._outlet.put(sse_frame(event_id, event.data[2:]))
                self._gave_id = True
            elif event.data[1] == Kind.OPENED and self._resumable:
                self._outlet.put(sse_priming(event_id, self._settings.retry_interval))
                self._gave_id = True

    def _forget_doubt(self) -> None:
        """Goes on as another writer: what the one before wrote last is not known, and not repeated."""
        self._writer, self._sequence, self._in_doubt = new_name(), 0, None

    def _opened(self) -> Draft:
        message = self.message.model_dump(mode="json", by_alias=True, exclude_unset=True)
        body = {"node": self.session.services.node_id, "attempt": self.attempt, "request": message}
        if self._settings.reexecute == "never":
            # Nobody needs its arguments again, which may be long (P10), and secret.
            name = (self.message.params or {}).get("name")
            message["params"] = {"name": name[:LONGEST_METHOD]} if isinstance(name, str) else {}
            body["partial"] = True
        elif self._trace:
            body["trace"] = self._trace
        return draft(Kind.OPENED, pydantic_core.to_json(body))

    def _event_id(self, cursor: Cursor) -> str:
        return EventId(self.stream, cursor, self.message.id).seal(self.session.id)

    async def _close_stream(self) -> None:
        """`close_sse_stream`: the client's connection is closed, wherever it is; it comes back for the rest."""
        try:
            with anyio.CancelScope(shield=True):
                async with self._writing:
                    if not self._closed:
                        await self._append([draft(Kind.HANGUP)])
        except (SessionNotFound, StreamClosed, Fenced, Diverged) as error:
            await self._heed(error)
        self._outlet.end()

    # ---- what stops it

    def cancel(self) -> None:
        """The client cancelled it (P5)."""
        self.cancel_requested.set()
        self._stop("cancelled")

    def end(self) -> None:
        """The session ended (P6)."""
        self._stop("ended")
        self._refuse(Refusal(NOT_FOUND))

    def fail(self, error: ErrorData) -> None:
        """It is ended from this side, with this error."""
        if self._stopped is None:
            self._failure = error
        self._stop("failed")

    async def abandon(self) -> None:
        """Ends the request without its handler, which did not stop when it was told to: it has no say any more."""
        if self._closed:
            return
        self._closed = self._abandoned = True
        try:
            with anyio.CancelScope(shield=True), contextlib.suppress(SessionNotFound, StreamClosed, Fenced):
                await self._finish(self._stopped_body())
        finally:
            self._leave()

    def fence(self, error: ErrorData) -> None:
        """The session has another owner now: nothing that this request does counts any more (P7)."""
        if self.stream or self._in_doubt is not None:
            self._stop("fenced")
            self._give_up_stream()
        else:
            self.fail(error)

    def let_go(self) -> None:
        """Closes the client's connection, whatever is still to be said: another node says it when this one is gone."""
        if self._opens:
            self._refuse(Refusal(NOT_STORED))
            return
        # Not 503, which says "try again": it ran.
        self._answer_with(error_body(self.message.id, SHUT_DOWN))
        if self._gave_id:
            self.hand_over()
        else:
            self._outlet.put(sse_message(error_body(self.message.id, SHUT_DOWN)))
            self._outlet.end()

    def observe(self, kind: Kind, event: Event) -> None:
        """The log brought something on this request's stream that may not be of our own making."""
        # What is followed may begin before this attempt.
        if self._closed or (kind is Kind.TAKEN and decode(event.data)["attempt"] <= self.attempt):
            return
        if kind is Kind.PROBE:
            # Somebody who resumed the stream asks.
            self.show_life()
        elif kind in (Kind.TERMINAL, Kind.TAKEN):
            logger.warning("session %s: another node ended a request of this node's", self.session.key[:12])
            self._stop("fenced")
            self._give_up_stream()

    def show_life(self) -> None:
        """Says in the log that the request still runs; finds out, so, whether the store has all of its stream (P9)."""
        self.session.spawn(self._show_life())

    async def _show_life(self) -> None:
        async with self._writing:
            if self._closed or not self.stream:
                return
            try:
                await self._append([draft(Kind.ALIVE)])
            except (StreamClosed, Fenced):
                self._stop("fenced")
            except StoreError as error:
                logger.debug("session %s: %s", self.session.key[:12], type(error).__name__)

    def _give_up_stream(self) -> None:
        """The stream is another node's, or lost. A client that has an id of it learns more by resuming; others here."""
        self._answer_with(None)
        if not self._gave_id:
            self._outlet.put(sse_message(error_body(self.message.id, STREAM_LOST)))
        self._outlet.end()

    async def _heed(self, error: StoreError) -> None:
        """The session or the stream has ended elsewhere: the handler, which has done nothing wrong, is cancelled."""
        self._stop("ended" if isinstance(error, SessionNotFound) else "fenced")
        await anyio.lowlevel.checkpoint()

    def _stop(self, reason: Literal["cancelled", "ended", "failed", "fenced"]) -> None:
        if self._stopped is None and not self._closed:
            self._stopped = reason
            self._scope.cancel()

    def _refuse(self, refusal: Refusal) -> None:
        self._answer_with(refusal)
        self._outlet.end()

    def _answer_with(self, outcome: bytes | Refusal | None) -> None:
        """How the response begins, unless that is decided: the session may end while its last answer is being saved."""
        if self._is_decided:
            return
        self._is_decided = True
        self._outcome = outcome
        if not self._decided.done():  # else nobody waits any more
            self._decided.set_result(None)

    # ---- DispatchContext

    @property
    def message_metadata(self) -> ServerMessageMetadata:
        # Not kept: it refers to this.
        streams = self._answer != "json"
        closes = streams and self._resumable
        return ServerMessageMetadata(
            request_context=self._request,
            close_sse_stream=self._close_stream if closes else None,
            close_standalone_sse_stream=self.session.close_standalone if closes else None,
            can_send_request=streams,
        )

    @property
    def request_id(self) -> RequestId | None:
        return self.message.id

    @property
    def can_send_request(self) -> bool:
        return self.transport.can_send_request and not self._closed

    async def send_raw_request(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        if not self.can_send_request or self._opens:
            raise NoBackChannelError(method)
        try:
            return await self.session.ask(self._emit, method, params, opts)
        except (SessionNotFound, StreamClosed, Fenced, Diverged) as error:
            await self._heed(error)
            raise

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        if self._closed or self._answer == "json" or not self.session.wants(method, params):
            logger.debug("dropped %s: the request is over, answered with JSON, or the level is not wanted", method)
            return
        try:
            await self._emit(draft(Kind.MESSAGE, notification_body(method, params)))
        except (SessionNotFound, StreamClosed, Fenced, Diverged) as error:
            await self._heed(error)
        except StoreUnavailable:
            # It is in doubt, not lost: the next append repeats it first.
            logger.warning("session %s: %s waits for the store", self.session.key[:12], method)

    async def progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        if self._progress_token is None:
            return
        params: dict[str, Any] = {"progressToken": self._progress_token, "progress": progress}
        if total is not None:
            params["total"] = total
        if message is not None:
            params["message"] = message
        await self.notify("notifications/progress", params)
