"""Bytes on the wire: JSON bodies, SSE frames, and the errors that a client sees. No session logic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import pydantic_core
from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, ErrorData, JSONRPCError, RequestId
from starlette.types import Send

from nonstick.store import Cursor
from nonstick.waiting.bell import Bell
from nonstick.waiting.deadline import Deadline

__all__ = [
    "SSE_HEADERS",
    "STREAM_LOST",
    "Outlet",
    "Refusal",
    "error_body",
    "missing_id",
    "notification_body",
    "request_body",
    "result_body",
    "send_body",
    "shutting_down",
    "sse_frame",
    "sse_message",
    "sse_priming",
    "unknown_event_id",
]

JSON_TYPE: Final = (b"content-type", b"application/json")

SSE_HEADERS: Final = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"connection", b"keep-alive"),
    (b"x-accel-buffering", b"no"),
]

STORE_AWAY: Final = "the session store cannot be reached"
"""All that a client is told about it."""

PING: Final = b": ping\r\n\r\n"


@dataclass(slots=True)
class Refusal(Exception):
    """A request is refused: an HTTP status and a JSON-RPC error, which carries no request id.

    Attributes:
        status: HTTP status.
        message: What is wrong and, where it is not obvious, what to do. Never a session id or a payload.
        code: JSON-RPC error code.
        retry_after: Seconds for a `Retry-After` header.
        allow: Value of an `Allow` header.
        plain: The body is the message alone, with no type, as the SDK does it.
    """

    status: int
    message: str
    code: int = INVALID_REQUEST
    retry_after: int | None = None
    allow: str | None = None
    plain: bool = False

    async def send(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        headers = list(headers)
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        if self.allow is not None:
            headers.append((b"allow", self.allow.encode()))
        if self.plain:
            await send_body(send, self.status, self.message.encode(), headers)
        else:
            body = error_body(None, ErrorData(code=self.code, message=self.message))
            await send_body(send, self.status, body, [*headers, JSON_TYPE])


def unknown_event_id() -> Refusal:
    """There is no such place in this session's streams."""
    return Refusal(400, "Bad Request: Last-Event-ID is not an id that this session's streams sent")


def missing_id() -> Refusal:
    """400: only `initialize` needs no session id."""
    # Made anew each time: an exception that is raised twice keeps what the first one's frames held.
    return Refusal(400, "Bad Request: Missing session ID")


def unavailable(message: str) -> Refusal:
    """503: try again soon. The session is as it was (P9)."""
    return Refusal(503, message, INTERNAL_ERROR, retry_after=1)


def shutting_down() -> Refusal:
    """503: another node takes it."""
    return unavailable("This node is shutting down. Try again.")


async def send_body(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole response."""
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def result_body(request_id: RequestId, result: Mapping[str, Any]) -> bytes:
    """A JSON-RPC response with this result.

    Raises:
        pydantic_core.PydanticSerializationError: The result holds what JSON cannot.
    """
    return pydantic_core.to_json({"jsonrpc": "2.0", "id": request_id, "result": result}, inf_nan_mode="null")


def error_body(request_id: RequestId | None, error: ErrorData) -> bytes:
    """A JSON-RPC error response. What of it JSON cannot hold is replaced or left out, and the rest told (P16)."""
    try:
        return _error_json(request_id, error)
    except Exception:
        readable = str.encode(error.message, errors="replace").decode()
    try:
        return _error_json(request_id, ErrorData(code=error.code, message=readable, data=error.data))
    except Exception:
        return _error_json(request_id, ErrorData(code=error.code, message=readable))


def _error_json(request_id: RequestId | None, error: ErrorData) -> bytes:
    return (
        JSONRPCError(jsonrpc="2.0", id=request_id, error=error)
        .model_dump_json(by_alias=True, exclude_unset=True)
        .encode()
    )


def request_body(request_id: RequestId, method: str, params: Mapping[str, Any] | None) -> bytes:
    """A JSON-RPC request."""
    message = {"jsonrpc": "2.0", "id": request_id, "method": method}
    return pydantic_core.to_json(message if not params else message | {"params": params}, inf_nan_mode="null")


def notification_body(method: str, params: Mapping[str, Any] | None) -> bytes:
    """A JSON-RPC notification."""
    message = {"jsonrpc": "2.0", "method": method}
    return pydantic_core.to_json(message if params is None else message | {"params": params}, inf_nan_mode="null")


STREAM_LOST: Final = ErrorData(
    code=INTERNAL_ERROR,
    message="The stream of this request is no longer in the session store; its outcome is not known",
    data={"reason": "stream_lost", "retrySafe": False},
)


def sse_message(body: bytes) -> bytes:
    """One SSE event that carries a message and has no id: it is not in the log."""
    return b"event: message\r\ndata: %b\r\n\r\n" % body


def sse_frame(event_id: str, body: bytes) -> bytes:
    """One SSE event that carries a message. JSON has no line breaks outside of strings, and none unescaped in them."""
    return b"id: %b\r\nevent: message\r\ndata: %b\r\n\r\n" % (event_id.encode(), body)


def sse_retry(retry: int) -> bytes:
    """How soon to come back, in milliseconds, without an event."""
    return b"retry: %d\r\n\r\n" % retry


def sse_priming(event_id: str, retry: int | None) -> bytes:
    """An SSE event without data: it gives the client an id to come back with, and how soon, in milliseconds."""
    return b"id: %b\r\n%bdata: \r\n\r\n" % (event_id.encode(), b"" if retry is None else b"retry: %d\r\n" % retry)


class Mark(NamedTuple):
    """How far a frame brings its client.

    Attributes:
        position: In the session's log.
        heard: In the cluster log.
        losses: How often the store had lost entries of the session's log by then.
    """

    position: int = 0
    heard: Cursor = Cursor(-1)
    losses: int = 0


class Outlet:
    """Frames on their way to one client, which may be slow or gone.

    Whoever produces waits when more than `room` bytes are waiting, so that a slow reader slows its own request down
    and nobody else's. A reader that takes nothing for `patience` seconds is cut off: it can resume (P10).

    Args:
        until_closing: Where the node finds what would keep it from closing.
    """

    def __init__(
        self,
        *,
        room: int = 256 * 1024,
        patience: float = 30.0,
        ping: float = 15.0,
        until_closing: dict[Deadline, None] | None = None,
    ) -> None:
        self._until_closing: dict[Deadline, None] = {} if until_closing is None else until_closing
        self._frames: list[bytes] = []
        self._mark = Mark()
        self.sent = Mark()
        """The mark of the last frame that the connection took."""
        self._waiting = 0
        self._room = room
        self._patience = patience
        self._ping = ping
        self._ended = False
        self._gone = False
        self._changed = Bell()
        self._freed = Bell()

    @property
    def gone(self) -> bool:
        """Nothing more reaches the client through this connection."""
        return self._gone

    @property
    def has_room(self) -> bool:
        """Whether more may be put without waiting."""
        return self._waiting <= self._room

    async def room(self) -> None:
        """Waits until there is room for more, or nobody who reads."""
        while not self.has_room and not self._gone and not self._ended:
            await self._freed.rung()

    async def flushed(self) -> None:
        """Waits until the connection took all that was put, or nobody reads any more."""
        while self._waiting and not self._gone:
            await self._freed.rung()

    def put(self, frame: bytes, mark: Mark | None = None) -> None:
        """Takes a frame, and how far it brings the client. Does nothing when the client is gone or the end was put."""
        if self._gone or self._ended:
            return
        self._frames.append(frame)
        self._mark = mark or self._mark
        self._waiting += len(frame)
        self._changed.ring()

    def pass_over(self, mark: Mark) -> None:
        """The client is this far: there was nothing for it on the way."""
        if self._gone or self._ended:
            return
        self._mark = mark
        if not self._waiting:
            self.sent = mark

    def end(self) -> None:
        """What was put is the last."""
        self._ended = True
        self._changed.ring()
        self._freed.ring()

    def leave(self) -> None:
        """The client is gone."""
        self._gone = True
        self._changed.ring()
        self._freed.ring()

    async def pump(self, send: Send) -> bool:
        """Writes until the end. Whether all of it was taken by the connection; False if the client is gone."""
        try:
            while True:
                if self._gone:
                    return False
                if self._frames:
                    body = b"".join(self._frames)
                    self._frames.clear()
                    mark = self._mark
                    await self._send(send, body, more=True)
                    self.sent = mark
                    self._waiting -= len(body)
                    self._freed.ring()
                elif self._ended:
                    await self._send(send, b"", more=False)
                    return True
                else:
                    await self._pause(send)
        except TimeoutError:
            return False
        finally:
            self.leave()

    async def _pause(self, send: Send) -> None:
        try:
            with Deadline(self._ping):
                await self._changed.rung()
        except TimeoutError:
            await self._send(send, PING, more=True)

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        deadline = Deadline(self._patience)
        with deadline:
            self._until_closing[deadline] = None
            try:
                await send({"type": "http.response.body", "body": body, "more_body": more})
            finally:
                del self._until_closing[deadline]
