"""What is admitted of a request on its way in: how long its head and its body may be, and whose it is (P10)."""

from __future__ import annotations

from collections.abc import Awaitable
from itertools import chain
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from nonstick.core.refusals import BODY_TOO_LARGE, HEAD_TOO_LARGE, SHUTTING_DOWN, TOO_SLOW, Refusal
from nonstick.waiting.deadline import Deadline

__all__ = ["after_body", "arrived", "check_headers", "header"]


_HEADERS: Final = "nonstick.headers"
"""Where a scope keeps its headers by name, with the list that they are from."""


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
            raise Refusal(SHUTTING_DOWN) from None
        raise Refusal(TOO_SLOW, seconds=seconds) from None
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
