"""Server requests: sent on a stream, replied to by the client at any node, counted once (P4).

Each is in the session's pending set from when it is sent until its reply, or its withdrawal, takes it out, in the same
step as the append: so a reply counts once, and a flood of others costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any, Final

import anyio
import pydantic_core
from mcp.shared.dispatcher import CallOptions, ProgressFnT
from mcp.shared.exceptions import MCPError
from mcp_types import REQUEST_TIMEOUT, RequestId

from nonstick.core.clipping import progress_params
from nonstick.core.events import Kind, draft
from nonstick.core.jsonrpc import as_number, notification_body, request_body, request_key
from nonstick.errors import NotPending, SessionNotFound, without_text
from nonstick.log.session_log import SessionLog
from nonstick.session import tracing
from nonstick.session.inbox import Inbox
from nonstick.store import Batch, Draft
from nonstick.waiting.tasks import Tasks

__all__ = ["BackChannel", "Emit"]

logger = logging.getLogger(__name__)

Emit = Callable[[Draft, Sequence[str]], Awaitable[None]]
"""Appends a message to a stream, with ids for the pending set, and sees that its readers get it."""

_WITHDRAW_SECONDS: Final = 5.0


@dataclass(slots=True)
class _Waiter:
    """A handler that waits for the client's reply to a server request."""

    reply: asyncio.Future[dict[str, Any]]
    on_progress: ProgressFnT | None
    context: Context
    """The handler's own, in which it also hears of progress."""

    def fail(self, error: MCPError) -> None:
        """The handler gets this error in place of a reply."""
        if not self.reply.done():
            self.reply.set_exception(error)


class BackChannel:
    """The server requests of one session that handlers on this node wait for.

    Args:
        view: Keeps the session's live view while it is entered.
        timeout: Seconds to wait for a reply where a handler says nothing: a client that never replies, or is gone, must
            not hold its handler for ever (P10).

    Attributes:
        is_over: The session has ended.
    """

    def __init__(
        self, log: SessionLog, inbox: Inbox[Any], tasks: Tasks, view: AbstractContextManager[object], *, timeout: float
    ) -> None:
        self._log = log
        self._inbox = inbox
        self._tasks = tasks
        self._view = view
        self._timeout = timeout
        self._waiters: dict[str, _Waiter] = {}
        self.is_over = False

    async def ask(
        self, emit: Emit, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None
    ) -> dict[str, Any]:
        """Sends a server request on a stream and waits for the client's reply, whichever node receives it.

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
            timeout = self._timeout
        with self._view, self._inbox.opened():
            try:
                with tracing.asking(request_id, method, sent) as span:
                    await emit(draft(Kind.MESSAGE, request_body(request_id, method, sent)), (key,))
                    try:
                        async with asyncio.timeout(timeout):
                            return await waiter.reply
                    except MCPError as error:
                        failure = error
                        if not self.is_over:
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
                if self._waiters.get(key) is waiter:
                    del self._waiters[key]
                waiter.reply.cancel()

    async def _withdraw(self, emit: Emit, request_id: RequestId, opts: CallOptions, reason: str) -> None:
        """Takes the request out of the pending set and tells the client that nobody waits for it any more."""
        if self.is_over:
            return
        with anyio.move_on_after(_WITHDRAW_SECONDS, shield=True):
            try:
                await self._log.append(Batch([], settle=request_key(request_id)))
                if opts.get("cancel_on_abandon", True):
                    params = {"requestId": request_id, "reason": reason}
                    await emit(draft(Kind.MESSAGE, notification_body("notifications/cancelled", params)), ())
            except (NotPending, SessionNotFound):
                pass
            except Exception as error:
                shown = without_text(error)
                logger.debug("session %s: a server request could not be withdrawn", self._log.key[:12], exc_info=shown)

    # ---- what the client sends

    async def take_reply(self, request_id: RequestId, body: bytes, *, patience: float) -> None:
        """The client replied, at this node. A reply counts once, whichever node's handler waits; others are dropped."""
        batch = Batch([draft(Kind.REPLY, body)], settle=request_key(request_id))
        try:
            await self._log.append(batch, patience=patience)
        except NotPending:
            logger.debug("session %s: dropped a reply that nothing waits for", self._log.key[:12])
            return
        self.deliver_reply(body)

    async def take_progress(self, token: RequestId, params: Mapping[str, Any], *, patience: float) -> None:
        """The client reports progress on a server request, at this node."""
        key = request_key(token)
        params = progress_params(token, key, params)
        if key in self._waiters:
            self.deliver_progress(params)
            return
        batch = Batch([draft(Kind.PROGRESS, pydantic_core.to_json(params))], answers=key)
        with contextlib.suppress(NotPending):
            await self._log.append(batch, patience=patience)

    def deliver_reply(self, body: bytes) -> None:
        """This reply of the client's counts, here if anybody waits for it."""
        message: dict[str, Any] = pydantic_core.from_json(body)
        waiter = self._waiters.get(request_key(message["id"]))
        if waiter is None or waiter.reply.done():
            return
        if "error" in message:
            error = message["error"]
            waiter.fail(MCPError(error["code"], error["message"], error.get("data")))
        else:
            waiter.reply.set_result(message["result"])

    def deliver_progress(self, params: Mapping[str, Any]) -> None:
        """Tells the handler that waits for the reply, if it is here."""
        waiter = self._waiters.get(request_key(params["progressToken"]))
        progress, text = as_number(params["progress"]), params.get("message")
        if waiter is None or waiter.on_progress is None or progress is None:
            return
        text = text if isinstance(text, str) else None
        told = _tell(waiter.on_progress, progress, as_number(params.get("total")), text)
        self._tasks.spawn(self._tasks.contained(told, "progress callback"), waiter.context.copy())

    # ---- its end

    def end(self, error: MCPError) -> None:
        """The session has ended: every handler that waits gets this error."""
        self.is_over = True
        self.drop(error)

    def drop(self, error: MCPError) -> None:
        """Every handler that waits gets this error. Server requests that are sent later are not concerned."""
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            waiter.fail(error)


async def _tell(callback: ProgressFnT, progress: float, total: float | None, message: str | None) -> None:
    await callback(progress, total, message)
