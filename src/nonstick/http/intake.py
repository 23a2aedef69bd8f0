"""What is admitted of a request on its way in: its head, its body, and the one message in that (P10)."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import lru_cache
from itertools import chain
from typing import Final, Protocol

import pydantic_core
from mcp.server.streamable_http import check_accept_headers
from mcp_types import JSONRPCMessage, jsonrpc_message_adapter
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from nonstick.core.jsonrpc import check_names, json_depth_exceeds
from nonstick.core.refusals import (
    BODY_TOO_LARGE,
    HEAD_TOO_LARGE,
    NO_BATCHES,
    NO_MESSAGE,
    NO_STREAM_ACCEPTED,
    NOT_BOTH_ACCEPTED,
    NOT_JSON,
    NOT_JSON_ACCEPTED,
    NOT_PARSED,
    SHUTTING_DOWN,
    TOO_DEEP,
    TOO_SLOW,
    Refusal,
)
from nonstick.waiting.deadline import Deadline

__all__ = ["TRANSPORT", "Routed", "arrived", "check_accepts_stream", "check_headers", "client_gone", "header", "parse"]

TRANSPORT: Final = "nonstick.session"
"""Where an ASGI scope says that this request was routed to one session."""


_HEADERS: Final = "nonstick.headers"
"""Where a scope keeps its headers by name, with the list that they are from."""


class Routed(Protocol):
    """The session that a request was routed to, by an application that does its own routing. See `http/transport`."""

    def check(self, session_id: str | None) -> None:
        """Returns if a request with this id in its headers may be served there.

        Raises:
            SessionNotFound: It is another session's.
        """
        ...

    def open(self) -> str:
        """The id that an `initialize` without one opens.

        Raises:
            Refusal: The session is open already: its requests carry its id.
        """
        ...


async def arrived(
    scope: Scope, receive: Receive, *, limit: int, seconds: float, until_closing: dict[Deadline, None]
) -> tuple[bytes, Receive]:
    """Waits for the request's whole body. Returns the body, and a `receive` that gives it once more to later readers.

    Args:
        until_closing: Where the node finds what would keep it from closing.

    Raises:
        Refusal: The body is longer than `limit` bytes, or is not here after so many seconds.
        ClientDisconnect: The client closed its connection.
    """
    declared = header(scope, "content-length")
    if declared is not None and declared.isdecimal() and int(declared) > limit:
        raise _too_large()
    deadline = Deadline(seconds)
    try:
        with deadline:
            until_closing[deadline] = None
            try:
                message = await receive()
                body: bytes = message.get("body", b"")
                if message.get("more_body", False):
                    body = await _rest(body, receive, limit)
            finally:
                del until_closing[deadline]
    except TimeoutError:
        if deadline.was_hastened:
            raise Refusal(SHUTTING_DOWN) from None
        raise Refusal(TOO_SLOW, seconds=seconds) from None
    if message["type"] != "http.request":
        raise ClientDisconnect
    if len(body) > limit:
        raise _too_large()
    return body, _Again(body, receive)


class _Again:
    """A `receive` that gives a body which has arrived, once, and then what comes after the body."""

    __slots__ = ("_body", "connection")

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self.connection = receive

    def __call__(self) -> Awaitable[Message]:
        body, self._body = self._body, None
        return self.connection() if body is None else _whole(body)


def _after_body(receive: Receive) -> Receive:
    """A `receive` that gives only what comes after the body, and leaves the body to other readers."""
    return receive.connection if isinstance(receive, _Again) else receive


async def client_gone(request: Request) -> None:
    """Returns when the client of this request, whose body has arrived, has closed its connection."""
    receive = _after_body(request.receive)
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole(body: bytes) -> Message:
    return {"type": "http.request", "body": body, "more_body": False}


async def _rest(begun: bytes, receive: Receive, limit: int) -> bytes:
    body = bytearray(begun)
    more = True
    while more and len(body) <= limit:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _too_large() -> Refusal:
    # The SDK's own words.
    return Refusal(BODY_TOO_LARGE)


def header(scope: Scope, name: str) -> str | None:
    """The first header of this name, which is in lower case."""
    headers = scope["headers"]
    kept = scope.get(_HEADERS)
    if kept is None or kept[0] is not headers:  # a copy of the scope may have others
        kept = scope[_HEADERS] = headers, dict(reversed(headers))
    value = kept[1].get(name.encode())
    return None if value is None else value.decode("latin-1")


def check_headers(scope: Scope, limit: int) -> None:
    """Returns if this request's headers are together no longer than `limit` bytes.

    Raises:
        Refusal: They are longer.
    """
    if sum(map(len, chain.from_iterable(scope["headers"]))) > limit:
        raise Refusal(HEAD_TOO_LARGE, limit=limit)


def parse(scope: Scope, body: bytes, *, json_alone: bool, max_depth: int) -> JSONRPCMessage:
    """The one JSON-RPC message in this body.

    Args:
        json_alone: Answers are never streams, so that clients need not accept any.
        max_depth: Levels of nesting.

    Raises:
        Refusal: The body is no such message, or the headers do not fit one.
    """
    has_json, has_sse = _accepts(scope)
    if json_alone:
        if not has_json:
            raise Refusal(NOT_JSON_ACCEPTED)
    elif not (has_json and has_sse):
        raise Refusal(NOT_BOTH_ACCEPTED)
    content_type = header(scope, "content-type") or ""
    if not (_is_json(content_type) if len(content_type) <= _KEPT_HEADER else _read_is_json(content_type)):
        raise Refusal(NOT_JSON)
    if body.lstrip()[:1] == b"[":
        # Before it is parsed: a body full of empty lists takes twenty times its size.
        raise Refusal(NO_BATCHES)
    try:
        raw = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(NOT_PARSED, error=error) from None
    if body.count(b"[") + body.count(b"{") > max_depth and json_depth_exceeds(raw, max_depth):
        raise Refusal(TOO_DEEP, limit=max_depth)
    try:
        parsed = jsonrpc_message_adapter.validate_python(raw, by_name=False)
    except ValidationError:
        raise Refusal(NO_MESSAGE) from None
    check_names(parsed)
    return parsed


def _accepts(scope: Scope) -> tuple[bool, bool]:
    """Whether JSON, and whether an event stream, may be the answer."""
    accept = header(scope, "accept") or ""
    return _accepted(accept) if len(accept) <= _KEPT_HEADER else _read_accept(accept)


def _read_accept(accept: str) -> tuple[bool, bool]:
    """As the SDK reads it."""
    return check_accept_headers(Request({"type": "http", "headers": [(b"accept", accept.encode("latin-1"))]}))


def _read_is_json(content_type: str) -> bool:
    return "application/json" in (part.strip() for part in content_type.split(";")[0].split(","))


# Clients send few different values. A long one, with which a client may fill its head, is not kept (P10).
_KEPT_HEADER: Final = 256
_accepted: Final = lru_cache(maxsize=64)(_read_accept)
_is_json: Final = lru_cache(maxsize=64)(_read_is_json)


def check_accepts_stream(scope: Scope) -> None:
    """Returns if an event stream may be the answer.

    Raises:
        Refusal: The client does not accept one.
    """
    if not _accepts(scope)[1]:
        raise Refusal(NO_STREAM_ACCEPTED)
