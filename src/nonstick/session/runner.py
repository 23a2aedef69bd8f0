"""What runs a session's requests and notifications: the SDK's kernel, or something that is no SDK server."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

import anyio
from mcp.shared.dispatcher import CallOptions
from mcp_types import InitializeRequestParams, JSONRPCNotification, JSONRPCRequest
from starlette.requests import Request

__all__ = ["Call", "Runner"]


class Call(Protocol):
    """A client's request while it runs here, as its runner sees it: what is asked, and what may be sent before the end.

    Everything that is sent before the answer goes to the request's own stream. The first of it makes the request a
    stream (P3).
    """

    @property
    def message(self) -> JSONRPCRequest:
        """The request."""

    @property
    def request(self) -> Request | None:
        """The HTTP request that it came with, or what is known of it here; None if no client made it."""

    @property
    def streams(self) -> bool:
        """Whether anything may be sent before the answer: not where requests are answered with JSON alone."""

    @property
    def can_send_request(self) -> bool:
        """Whether `ask` may be called: if the request `streams`, and is not over."""

    @property
    def can_close_stream(self) -> bool:
        """Whether the client knows how to come back after `close_stream`."""

    @property
    def cancel_requested(self) -> anyio.Event:
        """Set when the client cancels the request. The runner is cancelled then, too (P5)."""

    async def ask(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        """Sends a request to the client. Returns the result with which the client replied, to any node (P4).

        Raises:
            MCPError: The client replied with an error, or not in time; the session ended.
            NoBackChannelError: See `can_send_request`.
            SessionNotFound, StoreUnavailable, StreamClosed, Fenced, Diverged: As `Store.append`.
        """

    async def notify(self, method: str, params: Mapping[str, Any] | None) -> None:
        """Sends a notification to the client, unless the client wants none of its kind. Waits while a reader is slow.

        Where the store cannot be reached, the notification goes out once it can.
        """

    async def close_stream(self) -> None:
        """Closes the client's connection. The client comes back for the rest, to any node."""

    async def close_standalone_stream(self) -> None:
        """As `close_stream`, of the session's standalone stream."""


class Runner(Protocol):
    """Runs one session's requests and notifications, on the node that they came to.

    There is one for each live view of a session, so that what it must not forget between two requests belongs into the
    session state. One whose attribute `keeps_nothing` is true may also run a later request, after nothing of the
    session ran here for a while. A runner is called for `initialize` like for any request; the version, the
    capabilities and all else that the client is told there are its to say.
    """

    def on_request(self, call: Call, /) -> Awaitable[Mapping[str, Any] | bytes]:
        """The result of this request; or, as bytes, the whole JSON-RPC answer, which is sent and stored as it is.

        Cancelled when the request is cancelled, or its session ends. Whatever else is raised becomes the error that
        the client is told (P16), `MCPError` with its own code.

        Raises:
            Refusal: Nothing of the request ran. The client gets this as an HTTP status, or, if the request is a
                stream already, as an error.
        """

    def on_notify(self, message: JSONRPCNotification, request: Request, /) -> Awaitable[None]:
        """Handles this notification, which came with this HTTP request. What is raised is logged."""

    def handshake(self) -> tuple[str, InitializeRequestParams]:
        """The protocol version that both speak from now on, and what the client said of itself.

        Called after `on_request` answered an `initialize` with a result.
        """

    def answers(self, method: str, /) -> bool:
        """Whether requests of this method get a result: clients are told of changes of no other lists."""

    def heeds(self, method: str, /) -> bool:
        """Whether anything is done with notifications of this method."""
