"""Requests of clients that have no session, while the SDK serves them on this node: a drain sees to their end (P8)."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pydantic_core
from mcp.server import ServerRequestContext
from mcp.server.context import CallNext, HandlerResult
from mcp.server.streamable_http import MCP_SESSION_ID_HEADER
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import MCP_METHOD_HEADER
from mcp_types import ErrorData
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nonstick.core.jsonrpc import error_body
from nonstick.core.refusals import SHUTTING_DOWN, Refusal
from nonstick.core.sse import sse_message
from nonstick.errors import without_text
from nonstick.http.intake import header
from nonstick.http.respond import JSON_TYPE, send_body
from nonstick.session import ending
from nonstick.session.live import current_session
from nonstick.waiting.tasks import Tasks

__all__ = ["Contained", "Sessionless", "forget_session", "listens"]

logger = logging.getLogger(__name__)


def listens(scope: Scope) -> bool:
    """Whether the answer is a stream without an end: `subscriptions/listen`, or a GET."""
    return scope["method"] == "GET" or header(scope, MCP_METHOD_HEADER) == "subscriptions/listen"


def forget_session(scope: Scope) -> None:
    """Takes out of a request without a session the session id that it names nonetheless.

    Nobody has checked whose session that is. FastMCP would keep state under it: in the session's own record.
    """
    headers = scope["headers"]
    if header(scope, MCP_SESSION_ID_HEADER) is None:
        return
    left = [(name, value) for name, value in headers if name.lower() != MCP_SESSION_ID_HEADER.encode()]
    if isinstance(headers, list):
        # In place: what stands around the endpoint may have made a `Request` of the same list.
        headers[:] = left
    scope["headers"] = left


class Sessionless:
    """What the SDK serves here.

    Streams that listen cannot be resumed, by their specification: a drain ends them at once, and their clients ask
    anew, elsewhere. Requests may finish within the grace period.

    Args:
        shut_down: The error of requests that did not.
        lifetime: Seconds after which a stream that listens ends: a client that reads asks anew.
    """

    def __init__(self, shut_down: ErrorData, *, lifetime: float) -> None:
        self._shut_down = shut_down
        self._lifetime = lifetime
        self._listening: set[anyio.CancelScope] = set()
        self._working: set[anyio.CancelScope] = set()
        self._closed = False

    def __len__(self) -> int:
        """Requests that run."""
        return len(self._working)

    async def serve(self, app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Serves one request by this app.

        Raises:
            Refusal: The request would listen, on a node that drains.
        """
        listening = listens(scope)
        if listening and self._closed:
            raise Refusal(SHUTTING_DOWN)
        response = _Response(send)
        with _listed(self._listening if listening else self._working) as until:
            if listening:
                until.deadline = anyio.current_time() + self._lifetime
            try:
                await app(scope, receive, response.send)
            except (Exception, BaseExceptionGroup) as error:
                # A result that JSON cannot hold, say: the SDK has no answer any more (P16).
                logger.error("a request without a session broke off", exc_info=without_text(error))
                await response.finish(error_body(_id_in(body), ending.UNTOLD))
        if until.cancelled_caught:
            await response.finish(b"" if listening else error_body(_id_in(body), self._shut_down))

    def end_listening(self) -> None:
        """The drain begins: streams that listen end at once, and no further ones begin."""
        self._closed = True
        for until in list(self._listening):
            until.cancel()

    def end_all(self) -> None:
        """The grace period is over: requests that still run are cancelled."""
        for until in list(self._working):
            until.cancel()


class Contained:
    """A middleware, outside of all others, for requests of clients that have no session.

    The SDK answers for exceptions. A cancellation that is none of its own, and whatever else is no `Exception`, would
    take the connection with it, or the process: it becomes an error too (P16).
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> Awaitable[HandlerResult]:
        # For a request of a session its exchange does the same: this middleware is to cost nothing there.
        return call_next(ctx) if current_session() is not None else self._contain(ctx, call_next)

    async def _contain(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        failure: BaseException | None = None
        result: HandlerResult = None
        try:
            result = await call_next(ctx)
        except Exception:
            raise
        except BaseException as error:
            if anyio.current_effective_deadline() == -math.inf:
                # The client went, or the node stops.
                raise
            failure = error
        task = asyncio.current_task()
        if task is not None and task.cancelling() and anyio.current_effective_deadline() > -math.inf:
            await _take_cancellation(task)
        if failure is None:
            return result
        self._tasks.report(failure, "handler for %r", ctx.method)
        raise MCPError.from_error_data(ending.error_of(failure))


async def _take_cancellation(task: asyncio.Task[Any]) -> None:
    """A handler cancelled its own task: the cancellation that is still to strike strikes here."""
    while task.cancelling():
        task.uncancel()
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        pass


@contextmanager
def _listed(scopes: set[anyio.CancelScope]) -> Iterator[anyio.CancelScope]:
    with anyio.CancelScope() as until:
        scopes.add(until)
        try:
            yield until
        finally:
            scopes.discard(until)


class _Response:
    """What has been sent of a response."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._began = self._ended = False
        self._streams = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._began = True
            self._streams = any(value.startswith(b"text/event-stream") for _, value in message.get("headers", ()))
        else:
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def finish(self, body: bytes) -> None:
        """Ends the response, with this message unless it is empty."""
        if not self._began:
            # Not 503, which says "try again": it may have run.
            await send_body(self._send, 500, body, [JSON_TYPE])
        elif self._streams and not self._ended:
            last = sse_message(body) if body else b""
            await self._send({"type": "http.response.body", "body": last, "more_body": False})


def _id_in(body: bytes) -> Any:
    """The id of the request in this body; None if there is none."""
    try:
        message = pydantic_core.from_json(body)
    except ValueError:
        return None
    found = message.get("id") if isinstance(message, dict) else None
    return found if isinstance(found, str | int) and not isinstance(found, bool) else None
