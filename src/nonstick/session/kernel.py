"""The SDK's kernel as the runner of a session: what it calls, and what it has beyond a server's own handlers.

Those are handlers for what the session record keeps, and their capabilities.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any

import anyio
import mcp_types as types
from mcp.server import NotificationOptions, Server, ServerRequestContext
from mcp.server.models import InitializationOptions
from mcp.server.runner import ServerRunner
from mcp.shared.dispatcher import CallOptions, OnRequest
from mcp.shared.exceptions import MCPError, NoBackChannelError
from mcp.shared.jsonrpc_dispatcher import progress_token_from_params
from mcp.shared.message import ServerMessageMetadata
from mcp.shared.transport_context import TransportContext
from mcp_types import JSONRPCNotification, RequestId
from starlette.requests import Request

from nonstick.session.inbox import opened_later
from nonstick.session.live import LiveSession, current_connection
from nonstick.session.runner import Call
from nonstick.session.state import save

__all__ = ["KernelRunner", "handle_notification", "offer"]


class KernelRunner:
    """Runs the handlers of an SDK server.

    Args:
        lifespan_state: What the server's lifespan yielded.
    """

    keeps_nothing = True

    def __init__(self, server: Server[Any], lifespan_state: Any, session: LiveSession) -> None:
        self._session = session
        self._kernel: ServerRunner[Any] = ServerRunner(server, session.connection, lifespan_state)
        self._on_request: OnRequest | None = None

    def on_request(self, call: Call) -> Awaitable[Mapping[str, Any]]:
        kernel, message = self._kernel, call.message
        if message.method == "initialize":
            kernel.init_options = _initialization(kernel.server)
        if (run := self._on_request) is None:
            run = self._on_request = kernel.on_request
            # It keeps this and so itself: each session would leave it to the garbage collector.
            del vars(kernel)["on_request"]
        return run(_RequestContext(call), message.method, message.params)

    def on_notify(self, message: JSONRPCNotification, request: Request) -> Awaitable[None]:
        kernel = self._kernel
        run = kernel.on_notify
        del vars(kernel)["on_notify"]
        return run(_NoticeContext(self._session, request), message.method, message.params)

    def answers(self, method: str) -> bool:
        return self._kernel.server.get_request_handler(method) is not None

    def heeds(self, method: str) -> bool:
        return self._kernel.server.get_notification_handler(method) is not None

    def handshake(self) -> tuple[str, types.InitializeRequestParams]:
        connection = self._session.connection
        assert connection.client_params is not None
        return connection.protocol_version, connection.client_params


async def handle_notification(session: LiveSession, message: JSONRPCNotification, request: Request) -> None:
    """Has a notification of the client's handled, and saves what that changed, however it ended (P16)."""
    session.make_current()
    with opened_later(lambda: session.inbox, session.services.settings.window):
        work = session.runner.on_notify(message, request)
        await session.services.tasks.contained(work, "handler of a notification")
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        await save(session)
    elif not (session.ended or session.services.tasks.stopped):
        # The handler cancelled its own task, which would strike here.
        session.spawn(save(session))


# ---- what the kernel knows of a message


class _Context:
    """A `DispatchContext` by which nothing can be sent."""

    request_id: RequestId | None = None
    message_metadata: ServerMessageMetadata | None = None

    def __init__(self, transport: TransportContext) -> None:
        self.transport = transport

    @property
    def can_send_request(self) -> bool:
        return False

    @property
    def cancel_requested(self) -> anyio.Event:
        return anyio.Event()

    async def send_raw_request(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        raise NoBackChannelError(method)

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        return None

    async def progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        return None


class _RequestContext(_Context):
    """The `DispatchContext` of a request: what its handler sends goes to the request's own stream."""

    def __init__(self, call: Call) -> None:
        self._call = call
        request = call.request
        self.transport = TransportContext(
            kind="streamable-http",
            can_send_request=call.streams,
            headers=None if request is None else request.headers,
        )
        self.request_id = call.message.id
        self._progress_token = progress_token_from_params(call.message.params)

    @property
    def message_metadata(self) -> ServerMessageMetadata | None:  # type: ignore[override]
        # Not kept: it refers to this.
        call = self._call
        if call.request is None:
            return None
        closes = call.can_close_stream
        return ServerMessageMetadata(
            request_context=call.request,
            close_sse_stream=call.close_stream if closes else None,
            close_standalone_sse_stream=call.close_standalone_stream if closes else None,
            can_send_request=self.transport.can_send_request,
        )

    @property
    def can_send_request(self) -> bool:
        return self._call.can_send_request

    @property
    def cancel_requested(self) -> anyio.Event:
        return self._call.cancel_requested

    async def send_raw_request(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        return await self._call.ask(method, params, opts)

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        await self._call.notify(method, params)

    async def progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        if self._progress_token is None:
            return
        params: dict[str, Any] = {"progressToken": self._progress_token, "progress": progress}
        if total is not None:
            params["total"] = total
        if message is not None:
            params["message"] = message
        await self._call.notify("notifications/progress", params)


class _NoticeContext(_Context):
    """The `DispatchContext` of a notification: what its handler sends goes to the session's standalone stream."""

    def __init__(self, session: LiveSession, request: Request) -> None:
        self._outbound = session.connection.outbound
        self.transport = TransportContext(kind="streamable-http", can_send_request=True, headers=request.headers)
        self.message_metadata = ServerMessageMetadata(request_context=request)

    @property
    def can_send_request(self) -> bool:
        return True

    async def send_raw_request(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        return await self._outbound.send_raw_request(method, params, opts)

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        await self._outbound.notify(method, params, opts)


# ---- what a server can do beyond its own handlers


def offer(server: Server[Any]) -> None:
    """Gives the server handlers for subscriptions to its resources and for the log level, if it has none of its own.

    What they ask for is kept in the session record and honoured by every node: see `Saving`. The SDK advertises what
    has a handler.
    """
    if server.get_request_handler("logging/setLevel") is None:
        server.add_request_handler("logging/setLevel", types.SetLevelRequestParams, _keep)
    has_resources = any(server.get_request_handler(f"resources/{what}") for what in ("list", "read"))
    has_own = any(server.get_request_handler(f"resources/{what}") for what in ("subscribe", "unsubscribe"))
    if has_resources and not has_own:
        server.add_request_handler("resources/subscribe", types.SubscribeRequestParams, _keep)
        server.add_request_handler("resources/unsubscribe", types.UnsubscribeRequestParams, _keep)


async def _keep(ctx: ServerRequestContext[Any, Any], _params: Any) -> types.EmptyResult:
    try:
        current_connection()
    except LookupError:
        # The same server on stdio, say: nothing there would heed it.
        raise MCPError(types.METHOD_NOT_FOUND, "Method not found", ctx.method) from None
    return types.EmptyResult()


def _initialization(server: Server[Any]) -> InitializationOptions:
    """What a client is told in the handshake: that changes of lists will be notified of, for they can be (P11).

    There are clients that take no notice of them otherwise.
    """
    return server.create_initialization_options(
        NotificationOptions(prompts_changed=True, resources_changed=True, tools_changed=True)
    )
