"""How one request is answered at the connection at which its client waits: with a body, a refusal or a stream."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Self

from mcp_types import RequestId
from starlette.requests import Request

from nonstick.core.jsonrpc import error_body
from nonstick.core.lazy import lazy
from nonstick.core.refusals import STREAM_LOST, Refusal
from nonstick.core.requests import ANSWER, AnswerEvent, AnswerState
from nonstick.core.sse import sse_frame, sse_message, sse_priming, sse_retry
from nonstick.session.outlet import Outlet
from nonstick.session.services import Services

__all__ = ["Answer", "Outcome"]

Outcome = bytes | Refusal | Outlet
"""A whole JSON-RPC answer, an HTTP status with its error, or the frames of a stream."""


class Answer:
    """What the client of one request gets. As a context manager: while the block runs, the client waits for it.

    Args:
        resumes: The client understands a priming event, and so can come back for the rest of any stream.
        gone: Returns when the client has closed its connection. None if there is no connection to look at.

    Attributes:
        outcome: How the response begins. A task that awaits this may be cancelled.
        began: When the request's window passed, in the loop's time; infinity until then.
        watching: Waits until the client goes, from when the window has passed.
    """

    def __init__(
        self, services: Services, request: Request, *, resumes: bool, gone: Callable[[], Awaitable[None]] | None
    ) -> None:
        self._services = services
        self._request = request
        self.resumes = resumes
        self.gone = gone
        self.state = AnswerState.OPEN
        self.outcome: asyncio.Future[Outcome] = asyncio.Future(loop=asyncio.get_running_loop())
        self.began = math.inf
        self.is_awaited = False
        self.watching: asyncio.Task[None] | None = None
        self._gave_id = False
        """The client has an event id of the stream, with which it can come back for the rest."""

    @lazy
    def outlet(self) -> Outlet:
        """The stream's frames on their way to the client."""
        settings = self._services.settings
        return Outlet(
            patience=settings.send_timeout,
            ping=settings.ping_interval,
            until_closing=self._services.drain.until_closing,
        )

    # ---- the client

    def __enter__(self) -> Self:
        self.is_awaited = True
        # Its handler holds the same slot: the request takes one until both have ended.
        self._services.requests.acquire(self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self.is_awaited = False
        self._services.requests.release(self._request)
        if self.state not in (AnswerState.BODY, AnswerState.REFUSED):
            # What it streams now, or will stream, goes to nobody.
            self.outlet.leave()

    def client_left(self) -> None:
        """The client closed its connection."""
        self.is_awaited = False
        self.outlet.leave()

    def shows_client(self, now: float) -> bool:
        """Whether the client is there at this time of the loop, as far as its connection tells."""
        return self.is_awaited and now - self.began < self._services.settings.connection_lifetime

    # ---- how the response begins, and how a stream ends

    def begin_stream(self) -> None:
        """The store has the stream's first event: the response is a stream."""
        self._decide(AnswerEvent.STREAMED, self.outlet)
        if self.state in (AnswerState.BODY, AnswerState.REFUSED):
            # The client has its answer: nobody is to wait until somebody reads what comes.
            self.outlet.end()

    def give(self, body: bytes) -> None:
        """The answer is this. A stream has it already as its last event, and ends."""
        self._decide(AnswerEvent.RESULT, body)

    def refuse(self, refusal: Refusal) -> None:
        """The answer is an HTTP status. A stream, whose status is out, ends."""
        self._decide(AnswerEvent.REFUSE, refusal)

    def lose(self, request_id: RequestId) -> None:
        """The stream is another node's, or lost. A client with an id of it learns more by resuming, others are told."""
        if not self._gave_id:
            self.outlet.put(sse_message(error_body(request_id, STREAM_LOST)))
        self._decide(AnswerEvent.LOSE, self.outlet)

    def _decide(self, event: AnswerEvent, outcome: Outcome) -> None:
        """The response begins with this, unless something else decided that: then at most its stream ends."""
        state = ANSWER[self.state].get(event)
        if state is None:
            return
        self.state = state
        if state is AnswerState.ENDED:
            self.outlet.end()
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    # ---- what the stream brings

    def put(self, event_id: str, body: bytes) -> None:
        """A message of the stream, which the store has acknowledged (P3)."""
        self.outlet.put(sse_frame(event_id, body))
        self._gave_id = True

    def prime(self, event_id: str) -> None:
        """Gives the client the id of the stream's first event, if it knows what to do with that."""
        if self.resumes:
            self.outlet.put(sse_priming(event_id, self._services.settings.retry_interval))
            self._gave_id = True

    # ---- the connection is closed before the end

    def hang_up(self) -> None:
        """Closes the stream's connection. The client comes back for the rest."""
        self._decide(AnswerEvent.HAND_OVER, self.outlet)

    def hand_over(self) -> None:
        """As `hang_up`, and says when to come back; does nothing if the client could not."""
        if self._gave_id:
            self.outlet.put(sse_retry(self._services.settings.retry_interval))
            self.hang_up()

    def disconnect(self, body: bytes) -> None:
        """Closes the response without the request's own end. A client that can resume does, others get this error."""
        if self._gave_id:
            self.hand_over()
            return
        if self.state is AnswerState.STREAM:
            self.outlet.put(sse_message(body))
        self.give(body)
