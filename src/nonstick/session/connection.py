"""The SDK's `Connection` of a session: its state, what it sends, and what it owes when the session ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from typing import Any, Final, Protocol, TypeVar

import anyio
from mcp.server.connection import Connection
from mcp.server.runner import aclose_shielded
from mcp.shared.dispatcher import CallOptions
from mcp_types.version import LATEST_HANDSHAKE_VERSION

from nonstick.core.events import Kind, draft
from nonstick.core.jsonrpc import notification_body
from nonstick.core.lazy import lazy
from nonstick.core.record import UNKNOWN, Record
from nonstick.core.values import SessionState
from nonstick.errors import SessionNotFound
from nonstick.session.backchannel import BackChannel
from nonstick.store import Draft
from nonstick.waiting.tasks import Tasks

__all__ = ["ConnectionState", "Speaker", "clean_up", "connect", "introduce", "is_introduced"]

T = TypeVar("T")


class Speaker(Protocol):
    """A session, as what sends messages on its standalone stream knows it."""

    @property
    def backchannel(self) -> BackChannel:
        """Sends server requests."""
        ...

    def wants(self, method: str, params: Mapping[str, Any] | None) -> bool:
        """Whether the client asked for this."""
        ...

    async def emit(self, event: Draft, expect: Sequence[str] = ()) -> None:
        """Appends a message to the standalone stream."""
        ...

    def end_soon(self) -> None:
        """The session is over, as the store says."""
        ...


class _Standalone:
    """`Connection.outbound`: messages that belong to no request go to the session's standalone stream."""

    def __init__(self, session: Speaker) -> None:
        self._session = session

    async def send_raw_request(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        return await self._session.backchannel.ask(self._session.emit, method, params, opts)

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        if not self._session.wants(method, params):
            return
        try:
            await self._session.emit(draft(Kind.MESSAGE, notification_body(method, params)))
        except SessionNotFound:
            # The end cancels the handler that sent this, which has done nothing wrong (P6).
            self._session.end_soon()
            await anyio.lowlevel.checkpoint()


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


class ConnectionState(SessionState):
    """`Connection.state`, and the lock that its changes take turns by."""

    @lazy
    def changing(self) -> asyncio.Lock:
        """Held while state is saved or changed in a step of its own: what is being saved must not undo that."""
        return asyncio.Lock()


def connect(session: Speaker, session_id: str, state: SessionState, record: Record) -> Connection:
    """The connection of a session, and of the client that its record knows."""
    connection = Connection(_Standalone(session), protocol_version=LATEST_HANDSHAKE_VERSION, session_id=session_id)
    connection.state = state
    connection.exit_stack = _HoldingStack()
    if record is not UNKNOWN:
        introduce(connection, record)
    return connection


def introduce(connection: Connection, record: Record) -> None:
    """Tells the connection what the record knows of the client."""
    connection.protocol_version = record.protocol_version
    if connection.client_params is not record.client_params:
        connection.client_params = record.client_params
    if record.initialized and not connection.initialized.is_set():
        connection.initialized.set()


_ATTRIBUTES: Final = vars(Connection.from_envelope(LATEST_HANDSHAKE_VERSION, None, None)).keys()
"""That the SDK gives to every connection."""


def is_introduced(connection: Connection, record: Record, session_id: str, state: SessionState) -> bool:
    """Whether the connection is as `connect` makes it for this record: nobody has put anything else there.

    But for `initialized`, of which the record may not have heard yet.
    """
    stack, client = connection.exit_stack, record.client_params
    return (
        vars(connection).keys() == _ATTRIBUTES
        and connection.client_params is client
        and connection.client_capabilities is client.capabilities
        and connection.protocol_version == record.protocol_version
        and connection.state is state
        and type(stack) is _HoldingStack
        and not stack.holds
        and type(connection.outbound) is _Standalone
        and connection.session_id is session_id
    )


async def clean_up(connection: Connection, tasks: Tasks) -> None:
    """Runs what handlers left in its `exit_stack`: in a task of its own, which they may cancel, say (P16)."""
    if isinstance(connection.exit_stack, _HoldingStack) and not connection.exit_stack.holds:
        return
    work = tasks.contained(aclose_shielded(connection), "clean-up of a session")
    await asyncio.wait([tasks.spawn(work)])
