"""What the runner of a request may send while the request runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import anyio
import anyio.lowlevel
from mcp.shared.dispatcher import CallOptions
from mcp.shared.exceptions import NoBackChannelError
from mcp_types import ErrorData, JSONRPCRequest
from starlette.requests import Request

from nonstick.core.events import Kind, draft
from nonstick.core.jsonrpc import notification_body
from nonstick.core.refusals import STREAM_LOST
from nonstick.core.requests import HandlerEvent, HandlerState
from nonstick.errors import Diverged, Fenced, SessionNotFound, StoreError, StoreUnavailable, StreamClosed
from nonstick.session.answer import Answer
from nonstick.session.live import LiveSession
from nonstick.session.stream import Stream
from nonstick.store import Draft

__all__ = ["RunningCall"]

logger = logging.getLogger(__name__)


class Asked(Protocol):
    """A running request, as far as it matters to what is sent for it. See `Exchange`."""

    session: LiveSession
    message: JSONRPCRequest
    request: Request
    answer: Answer
    opens: bool

    @property
    def state(self) -> HandlerState:
        """Where its handler is."""

    @property
    def cancel_requested(self) -> anyio.Event:
        """Set when the client cancels it."""

    def own_stream(self) -> Stream:
        """Where its messages go, of which nothing may be in the log yet."""

    async def emit(self, event: Draft, expect: Sequence[str] = ()) -> None:
        """Appends a message to its stream."""

    def stop(self, reason: HandlerEvent) -> bool:
        """Cancels its handler."""

    def fail(self, error: ErrorData) -> None:
        """Ends it with this error."""


class RunningCall:
    """A running request, as its runner sees it."""

    def __init__(self, exchange: Asked) -> None:
        self._exchange = exchange
        self.streams = exchange.session.services.settings.answer != "json"
        self.message = exchange.message
        self.request = exchange.request
        self.can_close_stream = self.streams and exchange.answer.resumes

    @property
    def can_send_request(self) -> bool:
        return self.streams and self._exchange.state < HandlerState.DONE

    @property
    def cancel_requested(self) -> anyio.Event:
        return self._exchange.cancel_requested

    async def ask(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        exchange = self._exchange
        if not self.can_send_request or exchange.opens:
            raise NoBackChannelError(method)
        try:
            return await exchange.session.backchannel.ask(exchange.emit, method, params, opts)
        except (SessionNotFound, StreamClosed, Fenced, Diverged) as error:
            await self._heed(error)
            raise

    async def notify(self, method: str, params: Mapping[str, Any] | None) -> None:
        exchange = self._exchange
        session = exchange.session
        if exchange.state >= HandlerState.DONE or not self.streams or not session.wants(method, params):
            logger.debug("dropped %s: the request is over, answered with JSON, or the level is not wanted", method)
            return
        try:
            await exchange.emit(draft(Kind.MESSAGE, notification_body(method, params)))
        except (SessionNotFound, StreamClosed, Fenced, Diverged) as error:
            await self._heed(error)
        except StoreUnavailable:
            # It is in doubt, not lost: the next append repeats it first.
            logger.warning("session %s: %s waits for the store", session.key[:12], method)

    async def close_stream(self) -> None:
        exchange = self._exchange
        stream = exchange.own_stream()
        try:
            with anyio.CancelScope(shield=True):
                async with stream.lock:
                    if exchange.state < HandlerState.DONE:
                        await stream.append([draft(Kind.HANGUP)])
        except (SessionNotFound, StreamClosed, Fenced, Diverged) as error:
            await self._heed(error)
        exchange.answer.hang_up()

    async def close_standalone_stream(self) -> None:
        await self._exchange.session.emit(draft(Kind.HANGUP))

    async def _heed(self, error: StoreError) -> None:
        """The session or the stream has ended elsewhere: the handler, which has done nothing wrong, is cancelled."""
        match error:
            case SessionNotFound():
                self._exchange.stop(HandlerEvent.SESSION_ENDED)
            case Diverged():
                self._exchange.fail(STREAM_LOST)
            case _:
                self._exchange.stop(HandlerEvent.FENCE)
        await anyio.lowlevel.checkpoint()
