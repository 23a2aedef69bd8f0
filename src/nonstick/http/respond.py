"""Answers on their way out: a body, a refusal, or a stream."""

from __future__ import annotations

from typing import Final

from mcp.server.streamable_http import MCP_SESSION_ID_HEADER
from mcp_types import ErrorData
from starlette.types import Message, Send

from nonstick.core.jsonrpc import error_body
from nonstick.core.refusals import Refusal
from nonstick.core.sse import SSE_HEADERS
from nonstick.session.outlet import Outlet

__all__ = ["JSON_TYPE", "refuse", "respond", "send_body", "session_header", "with_header"]

JSON_TYPE: Final = (b"content-type", b"application/json")


async def respond(send: Send, outcome: bytes | Refusal | Outlet, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole response: a JSON-RPC answer, a refusal, or the frames of a stream until it ends or its client goes."""
    if isinstance(outcome, bytes):
        await send_body(send, 200, outcome, [*headers, JSON_TYPE])
    elif isinstance(outcome, Refusal):
        await refuse(send, outcome, headers)
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, *SSE_HEADERS]})
        await outcome.pump(send)


async def refuse(send: Send, refusal: Refusal, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole response that says why a request is refused."""
    headers, reason = [*headers], refusal.reason
    if reason.retry_after is not None:
        headers.append((b"retry-after", str(reason.retry_after).encode()))
    if reason.allow is not None:
        headers.append((b"allow", reason.allow.encode()))
    if reason.plain:
        await send_body(send, reason.status, refusal.message.encode(), headers)
    else:
        body = error_body(None, ErrorData(code=reason.code, message=refusal.message))
        await send_body(send, reason.status, body, [*headers, JSON_TYPE])


async def send_body(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole response."""
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def session_header(session_id: str) -> tuple[bytes, bytes]:
    """The header by which a response names its session."""
    return MCP_SESSION_ID_HEADER.encode(), session_id.encode()


def with_header(send: Send, header: tuple[bytes, bytes]) -> Send:
    """Sends responses with one header more."""

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return send_with
