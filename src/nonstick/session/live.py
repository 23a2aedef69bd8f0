"""A session's live view on this node: what is built from the record and the log while the node works for it.

There is at most one per session and node, and none while nothing of the session runs here: the truth is in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from mcp.server.connection import Connection
from mcp.shared.exceptions import MCPError
from mcp_types import CONNECTION_CLOSED, ErrorData
from starlette.requests import Request

from nonstick.core.events import Kind, body_of, decode
from nonstick.core.lazy import lazy
from nonstick.core.record import UNKNOWN, Record
from nonstick.log.session_log import SessionLog
from nonstick.session.backchannel import BackChannel
from nonstick.session.cancels import Cancels
from nonstick.session.connection import ConnectionState, clean_up, connect, introduce
from nonstick.session.inbox import Handlers, Inbox
from nonstick.session.runner import Runner
from nonstick.session.running import Running
from nonstick.session.services import Services
from nonstick.store import Cursor, Draft, Event, Loaded

__all__ = ["BeforeOpen", "LiveSession", "Pin", "current_connection", "current_session"]

T = TypeVar("T")

_LONGEST_KEPT: Final = 1536
"""Bytes of a record's values that are kept beside what they say."""

_LOG_LEVELS: Final = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")

_session: ContextVar[LiveSession] = ContextVar("nonstick_session")


def current_connection() -> Connection:
    """The SDK's `Connection` of the session that the current request or notification is part of.

    Its `state` is the session state, which every node shares; its `exit_stack` is run when the session ends. The
    contexts that the SDK gives to handlers show neither.

    Raises:
        LookupError: Not inside a handler or middleware of a session.
    """
    return _session.get().connection


def current_session() -> LiveSession | None:
    """The session that the current request or notification is part of; None outside of one."""
    return _session.get(None)


class Pin(Protocol):
    """Keeps a session's live view, whether anything runs or not: this node's hold on a session that it owns."""

    def gone(self) -> None:
        """The view is kept no more: the session has ended, or goes on elsewhere."""
        ...


@dataclass(slots=True)
class BeforeOpen:
    """What waits until a session that is being opened is in the store (P2).

    Attributes:
        fields: What its record is to begin with, beside what every record does.
        messages: What was sent on its standalone stream.
    """

    fields: dict[str, bytes] = field(default_factory=dict[str, bytes])
    messages: list[Draft] = field(default_factory=list[Draft])


class LiveSession:
    """One session on this node: its connection, the requests that run here, and its place in the log.

    Args:
        session_id: Opens the session: never to be logged.
        key: Its name in the store.

    Attributes:
        record: What the store last said of it, and what became of that here.
        loaded: The fields of its record as they were loaded last, and what they say. None where these are not to be
            kept: they are long, or have session state or an owner.
        state: The values of `Connection.state` that are stored.
        exchanges: The requests that run here, by the keys of their ids.
        notices: The handlers of notifications that run here.
        opening: Not None until it is in the store.
        users: How much runs for it here.
        pin: Keeps this view, beside what runs.
        as_made: The attributes of its connection, when they were last seen to be as they are made.
    """

    # Defaults are class attributes, not set in `__init__`: most sessions never change them, and thousands may be open.

    record: Record = UNKNOWN
    loaded: tuple[dict[str, bytes], Record] | None = None
    opening: BeforeOpen | None = None
    ended = False
    users = 0
    pin: Pin | None = None
    as_made: dict[str, Any] | None = None

    def __init__(self, services: Services, session_id: str, key: str) -> None:
        self.services = services
        self.id = session_id
        self.key = key
        self.log = SessionLog(services.logs, key)
        self.state = ConnectionState(secret=session_id, limit=services.settings.max_state_bytes)
        self.exchanges: dict[str, Running] = {}
        self.notices: set[asyncio.Task[Any]] = set()

    # Most requests end before they need these.

    @lazy
    def connection(self) -> Connection:
        """What the SDK's kernel, and handlers, know of the client."""
        return connect(self, self.id, self.state, self.record)

    @lazy
    def runner(self) -> Runner:
        """What runs its requests and notifications."""
        return self.services.served.new_runner(self)

    @lazy
    def inbox(self) -> Inbox[LiveSession]:
        """What the log brings."""
        services, spawn = self.services, self.services.tasks.spawn
        return Inbox(self, _HEEDED, Cancels(self.exchanges, services.store, self.log, spawn), spawn)

    @lazy
    def backchannel(self) -> BackChannel:
        """Server requests and their replies."""
        timeout = self.services.settings.server_request_timeout
        channel = BackChannel(self.log, self.inbox, self.services.tasks, self, timeout=timeout)
        channel.is_over = self.ended
        return channel

    # ---- the record

    def refresh(self, loaded: Loaded, record: Record) -> None:
        """Takes over what the store knows: other nodes may have changed it since."""
        self._keep(loaded.fields, record)
        if "connection" in vars(self):
            introduce(self.connection, record)
        self.state.refresh(record.state, record.changes)
        self.log.refresh(loaded)

    def begin(self, fields: dict[str, bytes]) -> None:
        """It is in the store now, with these fields, and lives here."""
        record = Record.from_fields(fields)
        self._keep(fields, record)
        introduce(self.connection, record)
        self.services.views[self.key] = self

    def _keep(self, fields: dict[str, bytes], record: Record) -> None:
        self.record = record
        if self.loaded is None or self.loaded[1] is not record:
            is_small = sum(map(len, fields.values())) <= _LONGEST_KEPT
            self.loaded = (fields, record) if is_small and not record.state and record.owner is None else None

    def keep_less(self) -> None:
        """Drops what only spares the next request work: this view may be kept for hours."""
        self.loaded = self.as_made = None

    def note(self, **changes: Any) -> None:
        """The record has these values now. What runs here goes by them."""
        self.record = self.record._replace(**changes)

    def wants(self, method: str, params: Mapping[str, Any] | None) -> bool:
        """Whether the client asked for this: a log message may be below the level that it set."""
        if method != "notifications/message" or (level := self.record.log_level) not in _LOG_LEVELS:
            return True
        said = (params or {}).get("level")
        return said not in _LOG_LEVELS or _LOG_LEVELS.index(said) >= _LOG_LEVELS.index(level)

    # ---- what uses this view

    def make_current(self) -> None:
        """What runs in this task and its children is part of this session."""
        _session.set(self)

    def __enter__(self) -> LiveSession:
        self.users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.users -= 1
        if self.users or (self.pin is not None and not self.ended):
            return
        connection: Connection | None = vars(self).get("connection")
        if connection is not None and getattr(connection.exit_stack, "holds", False) and not self.ended:
            # Its clean-up is owed, here, when the session ends anywhere.
            self.inbox.stay_open()
            return
        if not self.services.views.park(self):
            self.evict()

    def spawn(self, work: Coroutine[Any, Any, T], context: Context | None = None) -> asyncio.Task[T]:
        """Runs this in the background, and keeps the session's view until it ends. `context` as in `Tasks.spawn`."""
        self.users += 1
        task = self.services.tasks.spawn(work, context)
        task.add_done_callback(lambda _: self.__exit__())
        return task

    def spawn_notice(self, work: Coroutine[Any, Any, None], request: Request, context: Context) -> None:
        """As `spawn`, for the handler of a notification: the session's end cancels it (P6)."""
        task = self.spawn(work, context)
        self.services.requests.hold_while(request, task, self.record.principal)
        self.notices.add(task)
        task.add_done_callback(self.notices.discard)
        task.add_done_callback(lambda _: self.services.drain.left())

    def evict(self) -> None:
        """Forgets this view; the session lives on in the store."""
        self.services.views.forget(self)
        if (inbox := vars(self).get("inbox")) is not None:
            inbox.stop()
        if not self.users:  # else the end came while handlers run, and the last of them does it
            self.part()

    def part(self) -> None:
        """Parts what refers to each other: each request would leave it to the garbage collector."""
        own = vars(self)
        for name in ("runner", "connection", "backchannel", "inbox", "as_made"):
            own.pop(name, None)

    # ---- its end

    async def end(self) -> None:
        """The session is over: its requests here are cancelled, its streams closed, its clean-up is run (P6)."""
        if self.ended:
            return
        self.ended = True
        self.services.views.forget(self)
        self.log.follower.end()
        self._unpin()
        for exchange in list(self.exchanges.values()):
            exchange.end()
        for notice in self.notices:
            notice.cancel()
        if "backchannel" in vars(self):
            self.backchannel.end(MCPError(CONNECTION_CLOSED, "Session ended"))
        await clean_up(self.connection, self.services.tasks)
        self.evict()

    def end_soon(self) -> None:
        """As `end`, in a task of its own: that of the caller may be ended by it."""
        self.services.tasks.spawn(self.end())

    async def drop(self, error: ErrorData) -> None:
        """The session goes on elsewhere: what runs of it here is stopped, and the live view begins anew (P7)."""
        self._unpin()
        for exchange in list(self.exchanges.values()):
            exchange.fence(error)
        for notice in self.notices:
            notice.cancel()
        if "backchannel" in vars(self):
            self.backchannel.drop(MCPError.from_error_data(error))
        dropped = self.connection
        vars(self).pop("runner", None)
        vars(self).pop("connection", None)
        self.state = ConnectionState(secret=self.id, limit=self.services.settings.max_state_bytes)
        self.connection.protocol_version = dropped.protocol_version
        self.connection.client_params = dropped.client_params
        if dropped.initialized.is_set():
            self.connection.initialized.set()
        await clean_up(dropped, self.services.tasks)
        if not self.users:
            self.evict()

    async def close(self) -> None:
        """The node stops, the session does not: what only this node can clean up is cleaned up."""
        connection = self.connection
        self.evict()
        await clean_up(connection, self.services.tasks)

    def _unpin(self) -> None:
        pin, self.pin = self.pin, None
        if pin is not None:
            pin.gone()

    def keep_anything(self) -> None:
        """The connection's state is this node's alone: it may hold anything, and is not stored."""
        if self.connection.state is self.state:  # else what `initialize` put there is to stay
            self.connection.state = dict(self.state)

    # ---- the standalone stream

    async def emit(self, event: Draft, expect: Sequence[str] = ()) -> None:
        """Appends a message to the standalone stream.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.append`.
        """
        if self.opening is not None:
            self.opening.messages.append(event)
            return
        await self.log.sender.send(event, expect)
        # A store may answer without a wait: a handler that sends without end would hold the event loop.
        await asyncio.sleep(0)

    # ---- what the log brings

    def was_cancelled(self, key: str, head: Cursor) -> bool:
        """Whether a cancel for this request came after its record was loaded and before it was registered here.

        Then it has done its work with that.
        """
        inbox: Inbox[LiveSession] | None = vars(self).get("inbox")
        if inbox is None or not inbox.cancels.concerns(key, head):
            return False
        inbox.cancels.use_up(key)
        return True

    def inbox_start(self) -> Cursor:
        """Where the earliest of the requests that run here loaded its record."""
        return min((exchange.head for exchange in self.exchanges.values()), default=self.log.head)

    def prove_life(self) -> None:
        """The store has lost entries of the log: what runs here says that it still does."""
        for exchange in list(self.exchanges.values()):
            exchange.show_life()


def _take_reply(session: LiveSession, event: Event) -> None:
    if "backchannel" in vars(session):
        session.backchannel.deliver_reply(body_of(event.data))


def _take_progress(session: LiveSession, event: Event) -> None:
    if "backchannel" in vars(session):
        session.backchannel.deliver_progress(decode(event.data))


def _take_cancel(session: LiveSession, event: Event) -> None:
    session.inbox.cancels.take(event)


def _take_change(session: LiveSession, event: Event) -> None:
    # Requests that run here go by it from now on.
    session.note(log_level=decode(event.data).get("level", session.record.log_level))


def _observe(session: LiveSession, event: Event) -> None:
    for exchange in list(session.exchanges.values()):
        if exchange.stream == event.stream:
            exchange.observe(event)


_HEEDED: Final[Handlers[LiveSession]] = {
    Kind.REPLY: _take_reply,
    Kind.PROGRESS: _take_progress,
    Kind.CANCEL: _take_cancel,
    Kind.CHANGED: _take_change,
    Kind.TERMINAL: _observe,
    Kind.TAKEN: _observe,
    Kind.PROBE: _observe,
}
"""What a session makes of what its log brings."""
