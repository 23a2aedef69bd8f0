"""A session's live view on this node: what is built from the record and the log while the node works for it.

There is at most one per session and node, and none while nothing of the session runs here: the truth is in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import pydantic_core
from mcp.server.connection import Connection
from mcp.server.runner import aclose_shielded
from mcp.shared.dispatcher import CallOptions, ProgressFnT
from mcp.shared.exceptions import MCPError
from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT, ErrorData, RequestId
from mcp_types.version import LATEST_HANDSHAKE_VERSION
from starlette.requests import Request

from nonstick.core.clipping import cancel_params, progress_params
from nonstick.core.events import Kind, body_of, decode, draft, kind_of
from nonstick.core.jsonrpc import as_number, notification_body, request_body, request_key
from nonstick.core.record import CONFIRMED, Record
from nonstick.core.refusals import TOO_MANY_RESUMED, TOO_MANY_STREAMS
from nonstick.core.retention import Amount
from nonstick.core.values import SessionState
from nonstick.errors import Diverged, NotPending, SessionNotFound, StoreUnavailable, without_text
from nonstick.log.follow import Follower
from nonstick.log.guard import withheld
from nonstick.log.lost import end_lost
from nonstick.log.trim import Trimmer
from nonstick.log.writer import Sender
from nonstick.session import tracing
from nonstick.session.quotas import Quota
from nonstick.session.runner import Runner
from nonstick.session.services import Services
from nonstick.store import NEW_STREAM, Appended, Batch, Cursor, Draft, Event, Loaded
from nonstick.waiting.retry import retry_until_answered

if TYPE_CHECKING:
    from nonstick.node.holding import Holding
    from nonstick.session.exchange import Exchange

__all__ = ["Emit", "Session", "current_connection", "current_session"]

logger = logging.getLogger(__name__)

Emit = Callable[[Draft, Sequence[str]], Awaitable[None]]
"""Appends a message to a stream, with ids for the pending set, and sees that its readers get it."""

T = TypeVar("T")

_WITHDRAW_SECONDS: Final = 5.0
_RECENT_CANCELS: Final = 32
_LOG_LEVELS: Final = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")

_session: ContextVar[Session] = ContextVar("nonstick_session")


def current_connection() -> Connection:
    """The SDK's `Connection` of the session that the current request or notification is part of.

    Its `state` is the session state, which every node shares; its `exit_stack` is run when the session ends. The
    contexts that the SDK gives to handlers show neither.

    Raises:
        LookupError: Not inside a handler or middleware of a session.
    """
    return _session.get().connection


def current_session() -> Session | None:
    """The session that the current request or notification is part of; None outside of one."""
    return _session.get(None)


@dataclass(slots=True)
class _Waiter:
    """A handler that waits for the client's reply to a server request."""

    reply: asyncio.Future[dict[str, Any]]
    on_progress: ProgressFnT | None
    context: Context
    """The handler's own, in which it also hears of progress."""


class _HoldingStack(AsyncExitStack):
    """`Connection.exit_stack`, which says whether anything was ever pushed: then the view is kept until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = False

    def push(self, exit: Any) -> Any:  # noqa: A002
        self.holds = True
        return super().push(exit)

    def push_async_exit(self, exit: Any) -> Any:  # noqa: A002
        self.holds = True
        return super().push_async_exit(exit)

    def callback(self, callback: Any, /, *args: Any, **kwds: Any) -> Any:
        self.holds = True
        return super().callback(callback, *args, **kwds)

    def push_async_callback(self, callback: Any, /, *args: Any, **kwds: Any) -> Any:
        self.holds = True
        return super().push_async_callback(callback, *args, **kwds)

    def enter_context(self, cm: AbstractContextManager[T, bool | None]) -> T:
        self.holds = True
        return super().enter_context(cm)

    async def enter_async_context(self, cm: AbstractAsyncContextManager[T, bool | None]) -> T:
        self.holds = True
        return await super().enter_async_context(cm)


class _Standalone:
    """`Connection.outbound`: messages that belong to no request go to the session's standalone stream."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def send_raw_request(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        return await self._session.ask(self._session.emit, method, params, opts)

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        if not self._session.wants(method, params):
            return
        try:
            await self._session.emit(draft(Kind.MESSAGE, notification_body(method, params)))
        except SessionNotFound:
            # The end cancels whoever sent this, who has done nothing wrong (P6).
            self._session.services.tasks.spawn(self._session.end())
            await anyio.lowlevel.checkpoint()


class Session:
    """One session on this node: its connection, the requests that run here, and its place in the log."""

    # What most never change is the class's, so that a session is small: there may be thousands with an open stream.

    held: Holding | None = None
    """While this node holds the session (`placement="owner"`)."""
    unconfirmed = False
    """It was opened, and not used yet: it has its first, short lifetime (P10)."""
    log_level: str | None = None
    head = Cursor(0)
    loaded_at = 0
    """The log's head when the record was loaded that this view has."""
    _log = Amount()
    """How large its log was when its record was loaded."""
    ended = False
    record: Record | None = None
    """What the store last said of it."""
    was_heard = False
    """A message of its client came in since that was last looked at."""
    heard_at = 0.0
    """When its client was last seen or heard at this node, in the loop's time, as far as that was looked at."""
    _stack: _HoldingStack | None = None
    _users = 0
    _recent_cancels: tuple[tuple[int, str], ...] = ()
    _attendants = 0
    _inbox: asyncio.Task[None] | None = None
    _holding = False
    _before_open: list[Draft] | None = None

    def __init__(self, services: Services, session_id: str, key: str) -> None:
        self.services = services
        self.id = session_id
        self.key = key
        self.state = self._new_state()
        self.exchanges: dict[str, Exchange] = {}
        self.relays: set[str] = set()
        """Keys of the requests that came here and run on the session's owner."""
        self.notices: set[asyncio.Task[Any]] = set()
        """The handlers of notifications that run here."""
        self._waiters: dict[str, _Waiter] = {}
        self.changing_state = asyncio.Lock()
        """Held while state is saved or changed in a step of its own: what is being saved must not undo that."""
        self.first_fields: dict[str, bytes] = {}
        """What the record is to begin with, beside what every record does."""

    # Most requests end before they need these.

    @cached_property
    def follower(self) -> Follower:
        """Of the session's log."""
        return Follower(self.services.store, self.key)

    @cached_property
    def trimmer(self) -> Trimmer:
        """Of the session's log."""
        return Trimmer(self.services.trimming, self.key, self._log, end_lost=self._end_lost)

    async def _end_lost(self) -> bool:
        return await end_lost(self.services.store, self.key, self.append, here=self.services.node_id)

    @cached_property
    def listeners(self) -> Quota:
        """Connections to the standalone stream."""
        return Quota(
            self.services.settings.max_listeners,
            TOO_MANY_STREAMS,
        )

    @cached_property
    def resumptions(self) -> Quota:
        """Streams of requests that are being resumed."""
        return Quota(
            self.services.settings.max_streams,
            TOO_MANY_RESUMED,
        )

    @cached_property
    def _sender(self) -> Sender:
        return Sender(self.append)

    @cached_property
    def connection(self) -> Connection:
        """What the SDK's kernel, and handlers, know of the client."""
        connection = Connection(_Standalone(self), protocol_version=LATEST_HANDSHAKE_VERSION, session_id=self.id)
        connection.state = self.state
        self._stack = connection.exit_stack = _HoldingStack()
        if self.record is not None:
            _introduce(connection, self.record)
        return connection

    @cached_property
    def runner(self) -> Runner:
        """What runs its requests and notifications."""
        return self.services.served.new_runner(self)

    @property
    def protocol_version(self) -> str:
        """What the client speaks."""
        return self.connection.protocol_version if self.record is None else self.record.protocol_version

    @property
    def principal(self) -> bytes:
        """Who opened it; b"" without authentication."""
        return b"" if self.record is None else self.record.principal

    @property
    def subscriptions(self) -> frozenset[str]:
        """URIs of the resources that the client is subscribed to."""
        return frozenset() if self.record is None else self.record.subscriptions

    @property
    def heard(self) -> Cursor:
        """Where the session begins in the cluster log."""
        return Cursor(0) if self.record is None else self.record.heard

    def _new_state(self) -> SessionState:
        return SessionState(secret=self.id, limit=self.services.settings.max_state_bytes)

    # ---- hydrate and evict

    def refresh(self, loaded: Loaded, record: Record) -> None:
        """Takes over what the store knows: other nodes may have changed it since."""
        self.record = record
        self.was_heard = True
        if "connection" in vars(self):
            _introduce(self.connection, record)
        self.unconfirmed = record.unconfirmed
        self.log_level = record.log_level
        self.state.refresh(record.state, record.changes)
        if loaded.head >= self.head:
            # What was loaded before may come later.
            self.head, self._log = loaded.head, Amount(loaded.size, loaded.count)
            if "trimmer" in vars(self):
                self.trimmer.refresh(self._log)
        self.loaded_at = loaded.head.position

    def make_current(self) -> None:
        """What runs in this task and its children is part of this session."""
        _session.set(self)

    def __enter__(self) -> Session:
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if self._users or (self.held is not None and not self.ended):
            return
        if self._stack is not None and self._stack.holds and not self.ended:
            # Its clean-up is owed, here, when the session ends anywhere.
            if not self._holding:
                self._holding = True
                self.attend()
            return
        self.evict()

    def spawn(self, work: Coroutine[Any, Any, T], context: Context | None = None) -> asyncio.Task[T]:
        """Runs this in the background, for the session, whose view is kept meanwhile. `context` as in `Tasks.spawn`."""
        self.__enter__()
        task = self.services.tasks.spawn(work, context)
        task.add_done_callback(lambda _: self.__exit__())
        return task

    def spawn_notice(self, work: Coroutine[Any, Any, None], request: Request, context: Context) -> None:
        """As `spawn`, for the handler of a notification: the session's end cancels it (P6)."""
        task = self.spawn(work, context)
        self.services.requests.hold_while(request, task, self.principal)
        self.notices.add(task)
        task.add_done_callback(self.notices.discard)
        task.add_done_callback(lambda _: self.services.drain.left())

    def evict(self) -> None:
        """Forgets this view; the session lives on in the store."""
        if self.services.views.get(self.key) is self:
            del self.services.views[self.key]
        if self._inbox is not None:
            self._inbox.cancel()
            self._inbox = None
        if not self._users:  # else the end came while handlers run, and the last of them does it
            self._disconnect()

    def _disconnect(self) -> None:
        """Parts what refers to each other: each request would leave it to the garbage collector."""
        vars(self).pop("runner", None)
        vars(self).pop("connection", None)

    @property
    def is_active(self) -> bool:
        """Whether something runs for it here."""
        return self._users > 0

    async def end(self) -> None:
        """The session is over: its requests here are cancelled, its streams closed, its clean-up is run (P6)."""
        if self.ended:
            return
        self.ended = True
        if self.services.views.get(self.key) is self:
            del self.services.views[self.key]
        self.follower.end()
        for exchange in list(self.exchanges.values()):
            exchange.end()
        for notice in self.notices:
            notice.cancel()
        for waiter in self._waiters.values():
            _fail(waiter, MCPError(CONNECTION_CLOSED, "Session ended"))
        await self._clean_up(self.connection)
        self.evict()

    async def _clean_up(self, connection: Connection) -> None:
        """Runs what handlers left in its `exit_stack`: in a task of its own, which they may cancel, say (P16)."""
        if isinstance(connection.exit_stack, _HoldingStack) and not connection.exit_stack.holds:
            return
        work = self.services.tasks.contained(aclose_shielded(connection), "clean-up of a session")
        await asyncio.wait([self.services.tasks.spawn(work)])

    def keep_anything(self) -> None:
        """The connection's state is this node's alone: it may hold anything, and is not stored."""
        if self.connection.state is self.state:  # else what `initialize` put there is to stay
            self.connection.state = dict(self.state)

    async def drop(self, error: ErrorData) -> None:
        """The session goes on elsewhere: what runs of it here is stopped, and the live view begins anew (P7)."""
        self.held = None
        for exchange in list(self.exchanges.values()):
            exchange.fence(error)
        for notice in self.notices:
            notice.cancel()
        for waiter in self._waiters.values():
            _fail(waiter, MCPError.from_error_data(error))
        dropped, self._waiters = self.connection, {}
        self._disconnect()
        self.state = self._new_state()
        self.connection.protocol_version = dropped.protocol_version
        self.connection.client_params = dropped.client_params
        if dropped.initialized.is_set():
            self.connection.initialized.set()
        await self._clean_up(dropped)
        if not self._users:
            self.evict()

    async def close(self) -> None:
        """The node stops, the session does not: what only this node can clean up is cleaned up."""
        connection = self.connection
        self.evict()
        await self._clean_up(connection)

    # ---- its lifetime

    def confirm(self) -> None:
        """A request of it succeeded: from here on it has its full lifetime."""
        if self.unconfirmed:
            self.unconfirmed = False
            self.spawn(self._confirm())

    async def _confirm(self) -> None:
        try:
            await self.services.store.update(self.key, CONFIRMED, lifetime=self.services.settings.lifetime)
        except SessionNotFound:
            pass
        except StoreUnavailable:
            # The next request does it; until then it is renewed as often as its short lifetime wants.
            self.unconfirmed = True
            raise

    # ---- session state

    async def save(self) -> None:
        """Stores the session state that changed here.

        Raises:
            StateNotJSON, StateTooLarge: As `SessionState.changes`.
            SessionNotFound, StoreUnavailable: As `Store.update`.
        """
        if self.state.changes():
            async with self.changing_state:
                changes = self.state.changes()
                await self.services.store.update(self.key, changes)
                self.state.saved(changes)

    # ---- the standalone stream

    def hold_back(self) -> None:
        """The session is not in the store yet: what is sent on the standalone stream waits until it is (P2)."""
        self._before_open = []

    @property
    def is_opening(self) -> bool:
        """Whether it is not in the store yet."""
        return self._before_open is not None

    async def opened(self) -> None:
        """The session is in the store: what was held back is sent."""
        held, self._before_open = self._before_open or [], None
        for event in held:
            await self.emit(event)

    async def emit(self, event: Draft, expect: Sequence[str] = ()) -> None:
        """Appends a message to the standalone stream.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.append`.
        """
        if self._before_open is not None:
            self._before_open.append(event)
            return
        await self._sender.send(event, expect)
        # A store may answer without a wait. Whoever tells without end would hold the event loop, and it all in memory.
        await asyncio.sleep(0)

    async def close_standalone(self) -> None:
        """`close_standalone_sse_stream`: the connection to the standalone stream is closed; the client comes back."""
        await self.emit(draft(Kind.HANGUP))

    def wants(self, method: str, params: Mapping[str, Any] | None) -> bool:
        """Whether the client asked for this: a log message may be below the level that it set."""
        if method != "notifications/message" or self.log_level not in _LOG_LEVELS:
            return True
        level = (params or {}).get("level")
        return level not in _LOG_LEVELS or _LOG_LEVELS.index(level) >= _LOG_LEVELS.index(self.log_level)

    async def append(self, batch: Batch, *, patience: float | None = None) -> Appended:
        """As `Store.append`, and sees to the log's size afterwards (P10)."""
        try:
            appended = await self.services.store.append(self.key, batch, patience=patience)
        except StoreUnavailable as error:
            raise withheld(error, "session %s", self.key[:12]) from None
        self.trimmer.note(appended, ended=_stream_of(batch, appended) if batch.terminal else None)
        return appended

    # ---- server requests and their replies

    async def ask(
        self, emit: Emit, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None
    ) -> dict[str, Any]:
        """Sends a server request on a stream and waits for the client's reply, whichever node receives it (P4).

        Raises:
            MCPError: The client replied with an error; REQUEST_TIMEOUT; CONNECTION_CLOSED when the session ended.
            ValueError: The caller's own request id is in flight already.
        """
        opts = opts or {}
        # Random, and never a number: a client's own ids, and those of other nodes, cannot collide with it.
        request_id = opts.get("request_id") or f"srv-{secrets.token_hex(8)}"
        key = request_key(request_id)
        if key in self._waiters:
            raise ValueError(f"request id {request_id!r} is already in flight")
        sent = dict(params or {})
        on_progress = opts.get("on_progress")
        if on_progress is not None:
            sent["_meta"] = {**(sent.get("_meta") or {}), "progressToken": request_id}
        waiter = _Waiter(asyncio.get_running_loop().create_future(), on_progress, copy_context())
        self._waiters[key] = waiter
        timeout = opts.get("timeout")
        if timeout is None:
            # A client that never replies, or is gone, must not hold its handler for ever (P10).
            timeout = self.services.settings.server_request_timeout
        with self, self.attending():
            try:
                with tracing.asking(request_id, method, sent) as span:
                    await emit(draft(Kind.MESSAGE, request_body(request_id, method, sent)), (key,))
                    try:
                        async with asyncio.timeout(timeout):
                            return await waiter.reply
                    except MCPError as error:
                        failure = error
                        if not self.ended:
                            tracing.fail(span, error)
                # As the SDK: the span has the error's code, and no exception.
                raise failure
            except TimeoutError:
                await self._withdraw(emit, request_id, opts, f"timed out after {timeout:g} s")
                raise MCPError(code=REQUEST_TIMEOUT, message=f"Request {method!r} timed out") from None
            except asyncio.CancelledError:
                await self._withdraw(emit, request_id, opts, "caller cancelled")
                raise
            finally:
                self._waiters.pop(key, None)
                waiter.reply.cancel()

    async def _withdraw(self, emit: Emit, request_id: RequestId, opts: CallOptions, reason: str) -> None:
        """Takes the request out of the pending set and tells the client that nobody waits for it any more."""
        if self.ended:
            return
        with anyio.move_on_after(_WITHDRAW_SECONDS, shield=True):
            try:
                await self.append(Batch([], settle=request_key(request_id)))
                if opts.get("cancel_on_abandon", True):
                    params = {"requestId": request_id, "reason": reason}
                    await emit(draft(Kind.MESSAGE, notification_body("notifications/cancelled", params)), ())
            except (NotPending, SessionNotFound):
                pass
            except Exception as error:
                shown = without_text(error)
                logger.debug("session %s: a server request could not be withdrawn", self.key[:12], exc_info=shown)

    async def take_reply(self, request_id: RequestId, body: bytes, *, patience: float) -> None:
        """The client replied. Counts once, whoever waits and wherever; anything else is dropped (P4)."""
        key = request_key(request_id)
        batch = Batch([draft(Kind.REPLY, body)], settle=key)
        try:
            await self.append(batch, patience=patience)
        except NotPending:
            logger.debug("session %s: dropped a reply that nothing waits for", self.key[:12])
            return
        self._deliver_reply(body)

    async def take_progress(self, token: RequestId, params: Mapping[str, Any], *, patience: float) -> None:
        """The client reports progress on a server request."""
        key = request_key(token)
        params = progress_params(token, key, params)
        if key in self._waiters:
            self._deliver_progress(params)
            return
        batch = Batch([draft(Kind.PROGRESS, pydantic_core.to_json(params))], answers=key)
        with contextlib.suppress(NotPending):
            await self.append(batch, patience=patience)

    async def take_cancel(self, request_id: RequestId, params: Mapping[str, Any], *, patience: float) -> None:
        """The client cancels a request of its own, wherever it runs, or before it arrives (P5)."""
        key = request_key(request_id)
        if (exchange := self.exchanges.get(key)) is not None:
            exchange.cancel()
            return
        kept = pydantic_core.to_json(cancel_params(request_id, key, params))
        batch = Batch([draft(Kind.CANCEL, kept)], cancel=key)
        await self.append(batch, patience=patience)

    def _deliver_reply(self, body: bytes) -> None:
        message: dict[str, Any] = pydantic_core.from_json(body)
        waiter = self._waiters.get(request_key(message["id"]))
        if waiter is None or waiter.reply.done():
            return
        if "error" in message:
            error = message["error"]
            _fail(waiter, MCPError(error["code"], error["message"], error.get("data")))
        else:
            waiter.reply.set_result(message["result"])

    def _deliver_progress(self, params: Mapping[str, Any]) -> None:
        waiter = self._waiters.get(request_key(params["progressToken"]))
        progress, text = as_number(params["progress"]), params.get("message")
        if waiter is None or waiter.on_progress is None or progress is None:
            return
        text = text if isinstance(text, str) else None
        told = _tell(waiter.on_progress, progress, as_number(params.get("total")), text)
        self.services.tasks.spawn(self.services.tasks.contained(told, "progress callback"), waiter.context.copy())

    # ---- what the log brings

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """Follows the log meanwhile, so that replies, cancels and the session's end reach this node."""
        self.attend()
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def attending_later(self) -> Iterator[None]:
        """As `attending`, from when the window has passed: most work is done by then."""
        with contextlib.ExitStack() as stack:
            window = self.services.settings.window
            timer = asyncio.get_running_loop().call_later(window, stack.enter_context, self.attending())
            stack.callback(timer.cancel)
            yield

    def attend(self) -> None:
        """Follows the log from where the earliest of the requests that run here loaded its record."""
        self._attendants += 1
        if self._inbox is None and not self.ended:
            heads = [exchange.head for exchange in self.exchanges.values()]
            self._inbox = self.services.tasks.spawn(self._attend(min(heads, default=self.head)))

    def leave(self) -> None:
        """One who attends goes; the last one stops the following."""
        self._attendants -= 1
        if not self._attendants and self._inbox is not None:
            self._inbox.cancel()
            self._inbox = None

    async def _attend(self, after: Cursor) -> None:
        subscription = self.follower.subscribe(after)
        try:
            while True:
                try:
                    events = await subscription.next()
                except StoreUnavailable:
                    await asyncio.sleep(1)
                    continue
                except Diverged:
                    # Seen again, a reply or a cancel does nothing; missed, somebody would wait for ever.
                    subscription.close()
                    subscription = self.follower.subscribe(Cursor(0))
                    for exchange in list(self.exchanges.values()):
                        exchange.show_life()
                    continue
                for event in events:
                    self._take_contained(event)
        except SessionNotFound:
            # Not in this task, which the end cancels.
            self.services.tasks.spawn(self.end())
        finally:
            subscription.close()

    def _take_contained(self, event: Event) -> None:
        """One event that this node makes nothing of must not keep the next from those who wait for it (P4, P5)."""
        try:
            self._take(event)
        except Exception as error:
            where = (self.key[:12], event.position)
            logger.error("session %s: passed over event %d of its log", *where, exc_info=without_text(error))

    def _take(self, event: Event) -> None:
        kind = kind_of(event.data)
        if kind is Kind.REPLY:
            self._deliver_reply(body_of(event.data))
        elif kind is Kind.PROGRESS:
            self._deliver_progress(decode(event.data))
        elif kind is Kind.CANCEL:
            key = request_key(decode(event.data)["requestId"])
            self._recent_cancels = (*self._recent_cancels[1 - _RECENT_CANCELS :], (event.position, key))
            exchange = self.exchanges.get(key)
            if exchange is not None and exchange.head.position < event.position:
                self.use_up_cancel(key)
                exchange.cancel()
            elif exchange is not None:
                self.spawn(self._look_for_cancels())
        elif kind is Kind.CHANGED:
            # Requests that run here go by it from now on.
            self.log_level = decode(event.data).get("level", self.log_level)
        elif kind in (Kind.TERMINAL, Kind.TAKEN, Kind.PROBE):
            for exchange in list(self.exchanges.values()):
                if exchange.stream == event.stream:
                    exchange.observe(kind, event)

    def use_up_cancel(self, key: str) -> None:
        """A cancel that is left in the record did its work: a later request of that id is another one."""
        self.services.tasks.spawn(self.append(Batch([], uncancel=key)))

    def was_cancelled(self, key: str, head: Cursor) -> bool:
        """Whether a cancel for this request came after its record was loaded and before it was registered here."""
        cancels = self._recent_cancels
        return bool(cancels) and any(position > head.position and cancelled == key for position, cancelled in cancels)

    async def _look_for_cancels(self) -> None:
        """Cancels what the record says is cancelled (P5).

        A cancel in the log that is not behind a request's beginning was for an earlier request of that id; or the store
        has lost what was behind it, and gives these positions out again. The record keeps only what was not used up.
        """
        try:
            cancels = (await retry_until_answered(lambda: self.services.store.load(self.key))).cancels
        except SessionNotFound:
            return
        for key in cancels & self.exchanges.keys():
            self.use_up_cancel(key)
            self.exchanges[key].cancel()


def _stream_of(batch: Batch, appended: Appended) -> int:
    return appended.first if batch.stream == NEW_STREAM else batch.stream


def _introduce(connection: Connection, record: Record) -> None:
    """Tells the connection what the record knows of the client."""
    connection.protocol_version = record.protocol_version
    if connection.client_params is not record.client_params:
        connection.client_params = record.client_params
    if record.initialized and not connection.initialized.is_set():
        connection.initialized.set()


def _fail(waiter: _Waiter, error: MCPError) -> None:
    if not waiter.reply.done():
        waiter.reply.set_exception(error)


async def _tell(callback: ProgressFnT, progress: float, total: float | None, message: str | None) -> None:
    await callback(progress, total, message)
