"""Requests of clients that have sessions: checked, and routed by method and kind of message."""

from __future__ import annotations

import logging

from mcp.server.streamable_http import MCP_SESSION_ID_HEADER
from mcp.server.transport_security import TransportSecurityMiddleware
from mcp_types import JSONRPCError, JSONRPCMessage, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from nonstick.core.principals import principal_of
from nonstick.core.refusals import NO_ID, NO_SUCH_METHOD, NOT_FOUND, STORE_UNAVAILABLE, Refusal
from nonstick.errors import SessionNotFound, StoreUnavailable
from nonstick.http.endpoint import Endpoint
from nonstick.http.get import serve_stream
from nonstick.http.intake import TRANSPORT, Routed, check_accepts_stream, header, parse
from nonstick.http.post import PATIENCE_FOR_WHAT_COMES_ONCE, serve_initialize, serve_message
from nonstick.http.respond import JSON_TYPE, refuse, send_body, session_header
from nonstick.node.node import Node

__all__ = ["Sessions"]

logger = logging.getLogger(__name__)


class Sessions:
    """The sessions of one endpoint, on this node.

    Args:
        security: Checks Host and Origin.
    """

    def __init__(self, node: Node, endpoint: Endpoint, security: TransportSecurityMiddleware) -> None:
        self._node = node
        self._endpoint = endpoint
        self._security = security
        settings = node.services.settings
        self._json_alone = settings.answer == "json"
        self._max_depth = settings.max_json_depth

    async def serve(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Serves one request, whose body has arrived. Everything is checked in the SDK's order."""
        request = Request(scope, receive)
        headers: list[tuple[bytes, bytes]] = []
        try:
            refused = await self._security.validate_request(request, is_post=request.method == "POST")
            if refused is not None:
                await refused(scope, receive, send)
                return
            session_id = header(scope, MCP_SESSION_ID_HEADER)
            routed: Routed | None = scope.get(TRANSPORT)
            if routed is not None:
                routed.check(session_id)
            if session_id is None:
                await self._serve_without_session(request, body, send)
            else:
                await self._serve_session(request, session_id, body, receive, send, headers)
        except Refusal as refusal:
            await refuse(send, refusal, headers)
        except SessionNotFound:
            await refuse(send, Refusal(NOT_FOUND), [])
        except StoreUnavailable as error:
            logger.warning("answered 503: %s", error)
            later = Refusal(STORE_UNAVAILABLE)
            await refuse(send, later, headers)

    async def _serve_without_session(self, request: Request, body: bytes, send: Send) -> None:
        """Only `initialize` needs no session id."""
        if request.method == "POST":
            message = parse(request.scope, body, json_alone=self._json_alone, max_depth=self._max_depth)
            await serve_initialize(self._node, self._endpoint, message, request, send)
        elif request.method == "GET":
            check_accepts_stream(request.scope)
            raise Refusal(NO_ID)
        elif request.method == "DELETE":
            raise Refusal(NO_ID)
        else:
            raise Refusal(NO_SUCH_METHOD)

    async def _serve_session(
        self,
        request: Request,
        session_id: str,
        body: bytes,
        receive: Receive,
        send: Send,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        key = self._endpoint.key(session_id)
        message: JSONRPCMessage | None = None
        problem: Refusal | None = None
        if request.method == "POST":
            try:
                message = parse(request.scope, body, json_alone=self._json_alone, max_depth=self._max_depth)
            except Refusal as refusal:
                # Whether there is such a session is said first, as the SDK does.
                problem = refusal
        principal = principal_of(request.scope)
        if isinstance(message, JSONRPCRequest):
            self._node.services.requests.check(principal)
        elif request.method == "GET":
            self._node.listeners.check(principal)
        sent_once = isinstance(message, JSONRPCNotification | JSONRPCResponse | JSONRPCError)
        try:
            loaded = await self._node.services.store.load(
                key, patience=PATIENCE_FOR_WHAT_COMES_ONCE if sent_once else None
            )
        except SessionNotFound:
            self._node.sessions.forget_parked(key)
            raise
        record = self._node.sessions.decode(key, loaded.fields)
        if record.principal != principal:
            logger.warning("session %s: refused a request of another principal", key[:12])
            raise SessionNotFound
        headers.append(session_header(session_id))
        if problem is not None:
            raise problem
        if message is not None:
            session = self._node.hydrate(session_id, key, loaded, record)
            await serve_message(self._node, session, message, request, loaded, send, headers)
        elif request.method == "GET":
            check_accepts_stream(request.scope)
            session = self._node.hydrate(session_id, key, loaded, record)
            # A stream may be open for hours, and there are thousands.
            session.keep_less()
            del loaded, record
            await serve_stream(session, self._node, request, receive, send, headers)
        elif request.method == "DELETE":
            await self._delete(key, send, headers)
        else:
            raise Refusal(NO_SUCH_METHOD)

    async def _delete(self, key: str, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        await self._node.services.store.delete(key)
        self._node.sessions.forget_parked(key)
        if (session := self._node.sessions.get(key)) is not None:
            session.end_soon()
        await send_body(send, 200, b"", [*headers, JSON_TYPE])
