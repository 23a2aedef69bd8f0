"""What is admitted: places for what a node or a session does at once, and how long what a client names may be (P10).

Where there is no place the client is told so at once, with when to come back; nothing that runs is ended for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from itertools import chain
from typing import Any, Final

from mcp.shared.jsonrpc_dispatcher import progress_token_from_params
from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, JSONRPCMessage, JSONRPCNotification, JSONRPCRequest
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from nonstick.http import wire
from nonstick.waiting.deadline import Deadline

__all__ = [
    "LONGEST_ID",
    "LONGEST_METHOD",
    "Place",
    "Room",
    "after_body",
    "arrived",
    "check_headers",
    "check_names",
    "header",
]

LONGEST_ID: Final = 1024
"""Characters of a request id or a progress token: the log and each of a stream's messages repeat them."""

LONGEST_METHOD: Final = 256
"""Characters of a method: it is logged, and kept with a stream."""

_HEADERS: Final = "nonstick.headers"
"""Where a scope keeps its headers by name, with the list that they are from."""

_LARGEST_NUMBER: Final = 2**63
"""Beyond any number that a client counts its requests with."""


class Room:
    """So many places. What holds one twice, under the same name, takes one.

    Args:
        places: How many there are.
        status: HTTP status of the refusal where none is left: 429 if the client has them, 503 if all clients have.
        message: What to tell the client.
        share: The share of the places that may be one principal's. Clients without one, who cannot be told apart, are
            not limited by it.
        share_message: What to tell the client where its principal has that many.
    """

    def __init__(self, places: int, status: int, message: str, *, share: float = 1.0, share_message: str = "") -> None:
        self._places = places
        self._share = max(1, int(places * share))
        self._status = status
        self._code = INVALID_REQUEST if status < 500 else INTERNAL_ERROR
        self._message = message
        self._share_message = share_message
        self._held: dict[object, int] = {}
        self._whose: dict[object, bytes] = {}
        """The principal that has a place, if there is one."""
        self._taken: dict[bytes, int] = {}
        """Places of each principal."""

    def __len__(self) -> int:
        """Places that are taken."""
        return len(self._held)

    def check(self, principal: bytes = b"") -> None:
        """Returns if there is a place for this principal, b"" for none.

        Raises:
            Refusal: There is none, or the principal has its share.
        """
        if principal:
            self.check_share(principal)
        if len(self._held) >= self._places:
            raise wire.Refusal(self._status, self._message, self._code, retry_after=1)

    def check_share(self, principal: bytes) -> None:
        """Returns if this principal may have one more place, if there is one.

        Raises:
            Refusal: It has its share.
        """
        if self._taken.get(principal, 0) >= self._share:
            raise wire.Refusal(429, self._share_message, INVALID_REQUEST, retry_after=1)

    def held(self, name: object, principal: bytes = b"") -> Place:
        """Takes a place meanwhile, also where there is none left: see `check`."""
        return Place(self, name, principal)

    def held_while(self, name: object, task: asyncio.Task[Any], principal: bytes = b"") -> None:
        """Takes a place until the task has ended."""
        self.take(name, principal)
        task.add_done_callback(lambda _: self.give_back(name))

    def take(self, name: object, principal: bytes = b"") -> None:
        """As on entering `held`."""
        held = self._held.get(name, 0)
        self._held[name] = held + 1
        if principal and not held:
            self._whose[name] = principal
            self._taken[principal] = self._taken.get(principal, 0) + 1

    def give_back(self, name: object) -> None:
        """As on leaving `held`."""
        left = self._held[name] - 1
        if left:
            self._held[name] = left
            return
        del self._held[name]
        if name in self._whose:
            principal = self._whose.pop(name)
            self._taken[principal] -= 1
            if not self._taken[principal]:
                del self._taken[principal]


class Place:
    """A place in a room that is taken from entering to leaving."""

    __slots__ = ("_name", "_principal", "_room")

    def __init__(self, room: Room, name: object, principal: bytes) -> None:
        self._room = room
        self._name = name
        self._principal = principal

    def __enter__(self) -> None:
        self._room.take(self._name, self._principal)

    def __exit__(self, *_: object) -> None:
        self._room.give_back(self._name)


async def arrived(
    scope: Scope, receive: Receive, *, limit: int, seconds: float, until_closing: dict[Deadline, None]
) -> tuple[bytes, Receive]:
    """The request's body, once it is here whole, and what gives it again to whoever receives it later.

    Args:
        until_closing: Where the node finds what would keep it from closing.

    Raises:
        Refusal: It is longer than `limit` bytes, or not here after so many seconds.
        ClientDisconnect: Nobody waits for an answer any more.
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
            raise wire.shutting_down() from None
        raise wire.Refusal(408, f"Request Timeout: the request did not arrive within {seconds:g} s") from None
    if message["type"] != "http.request":
        raise ClientDisconnect
    if len(body) > limit:
        raise _too_large()
    return body, _Again(body, receive)


class _Again:
    """Gives a body that has arrived, once, and then what comes after it."""

    __slots__ = ("_body", "connection")

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self.connection = receive

    def __call__(self) -> Awaitable[Message]:
        body, self._body = self._body, None
        return self.connection() if body is None else _whole(body)


def after_body(receive: Receive) -> Receive:
    """What gives only what comes after the body, which somebody else may still want."""
    return receive.connection if isinstance(receive, _Again) else receive


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


def _too_large() -> wire.Refusal:
    # The SDK's own words.
    return wire.Refusal(413, "Request body too large", plain=True)


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
        raise wire.Refusal(431, f"Request Header Fields Too Large: the headers are longer than {limit} bytes")


def check_names(message: JSONRPCMessage) -> None:
    """Returns if this message's method, id and progress token are short enough to be kept.

    Raises:
        Refusal: One is too long.
    """
    if not isinstance(message, JSONRPCRequest | JSONRPCNotification):
        return
    if len(message.method) > LONGEST_METHOD:
        raise _too_long("method", f"{LONGEST_METHOD} characters")
    if isinstance(message, JSONRPCRequest):
        _check_id("request id", message.id)
        _check_id("progress token", progress_token_from_params(message.params))


def _check_id(what: str, value: str | int | None) -> None:
    if isinstance(value, str) and len(value) > LONGEST_ID:
        raise _too_long(what, f"{LONGEST_ID} characters")
    if isinstance(value, int) and abs(value) >= _LARGEST_NUMBER:
        raise _too_long(what, "63 bits")


def _too_long(what: str, limit: str) -> wire.Refusal:
    return wire.Refusal(400, f"Bad Request: the {what} is longer than {limit}", INVALID_REQUEST)
