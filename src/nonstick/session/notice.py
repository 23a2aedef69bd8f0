"""One notification of the client's: the server's handler for it, if it has one."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
from mcp.shared.dispatcher import CallOptions
from mcp.shared.message import ServerMessageMetadata
from mcp.shared.transport_context import TransportContext
from mcp_types import JSONRPCNotification
from starlette.requests import Request

from nonstick.session.live import Session

__all__ = ["handle"]


async def handle(session: Session, message: JSONRPCNotification, request: Request) -> None:
    """Runs the server's handler, if it has one, and saves what it changed, however it ended (P16)."""
    session.make_current()
    with session.attending_later():
        work = session.runner.on_notify(_Context(session, request), message.method, message.params)
        await session.services.tasks.contained(work, "handler of a notification")
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        await session.save()
    elif not (session.ended or session.services.tasks.stopped):
        # The handler cancelled its own task, which would strike here.
        session.spawn(session.save())


class _Context:
    """The `DispatchContext` of a notification: what its handler sends goes to the standalone stream."""

    def __init__(self, session: Session, request: Request) -> None:
        self._outbound = session.connection.outbound
        self.transport = TransportContext(kind="streamable-http", can_send_request=True, headers=request.headers)
        self.can_send_request = True
        self.request_id = None
        self.message_metadata = ServerMessageMetadata(request_context=request)
        self.cancel_requested = anyio.Event()

    async def send_raw_request(self, method: str, params: Any, opts: CallOptions | None = None) -> dict[str, Any]:
        return await self._outbound.send_raw_request(method, params, opts)

    async def notify(self, method: str, params: Any, opts: CallOptions | None = None) -> None:
        await self._outbound.notify(method, params, opts)

    async def progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        return None
