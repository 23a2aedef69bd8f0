"""One POST that carries a request, while it runs here: a JSON answer, or a stream.

The handler runs in a task of its own: a client that goes away does not stop it. Until it sends something, or the window
passes, nothing of it is in the log. Then the request is *promoted*: from there on every message is appended first,
then acknowledged by the store, then written to the socket (P3).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, ContextVar, copy_context
from typing import Final

import anyio
import anyio.lowlevel
from mcp.shared.exceptions import MCPError
from mcp_types import ErrorData, JSONRPCRequest
from mcp_types.version import is_version_at_least
from pydantic import ValidationError
from starlette.requests import Request

from nonstick.core.events import Kind, decode, draft, kind_of
from nonstick.core.jsonrpc import error_body, request_key, result_body
from nonstick.core.refusals import (
    CANCELLED_BY_CLIENT,
    FILLED_LOG,
    INTERRUPTED,
    NOT_FOUND,
    NOT_RUN,
    NOT_RUN_HERE,
    SHUT_DOWN,
    STORE_UNAVAILABLE,
    STREAM_LOST,
    Refusal,
)
from nonstick.core.requests import AnswerState, HandlerEvent, HandlerState, LastWord
from nonstick.core.streams import OBSERVED, Meaning
from nonstick.errors import (
    Diverged,
    Fenced,
    SessionNotFound,
    StoreError,
    StoreUnavailable,
    StreamClosed,
    without_text,
)
from nonstick.log.trim import Hold
from nonstick.session import ending, tracing
from nonstick.session.answer import Answer
from nonstick.session.call import RunningCall
from nonstick.session.handler import Handler
from nonstick.session.live import LiveSession
from nonstick.session.saving import Saving
from nonstick.session.stream import Stream
from nonstick.store import Cursor, Draft, Event

__all__ = ["Exchange", "current_attempt"]

logger = logging.getLogger(__name__)

_RETRY_PAUSE: Final = 1.0
"""Seconds between two tries to make a request a stream."""


_attempt: ContextVar[int] = ContextVar("nonstick_attempt", default=1)


def current_attempt() -> int:
    """Which attempt at the current request this is: 1, or more where a lost node's request is run again (P7)."""
    return _attempt.get()


class Exchange(Handler):
    """A client's request while it runs on this node, from its arrival to the end of its answer.

    Args:
        head: The log's head when the record was loaded: what came later may concern this request.
        protocol_version: What the client speaks; decides whether it understands a priming event.
        principal: Who makes the request; the session's if none is given.
        gone: Returns when the client has closed its connection. None if there is no connection to look at.
        hold: Room in the log for the request, which is kept there whole.

    Attributes:
        key: Correlates the request with what names it.
        answer: What the client gets.
    """

    opens = False
    """Whether this is the `initialize` that a session begins with."""

    def __init__(
        self,
        session: LiveSession,
        message: JSONRPCRequest,
        request: Request,
        *,
        head: Cursor,
        protocol_version: str,
        principal: bytes | None = None,
        gone: Callable[[], Awaitable[None]] | None = None,
        hold: Hold | None = None,
    ) -> None:
        self._services = session.services
        self._scope = anyio.CancelScope()
        self.session = session
        self.message = message
        self.request = request
        self.key = request_key(message.id)
        self.head = head
        resumes = is_version_at_least(protocol_version, "2025-11-25")
        self.answer = Answer(session.services, request, resumes=resumes, gone=gone)
        self.principal = session.record.principal if principal is None else principal
        self._stream = None if hold is None else Stream(session, message, self.answer, hold)
        self._timer: asyncio.TimerHandle | None = None
        """Of the window. None until the handler's task runs."""
        self._follows_log = False

    @property
    def stream(self) -> int:
        """The position that names the request's stream; 0 while the request is none."""
        return 0 if self._stream is None else self._stream.position

    def own_stream(self) -> Stream:
        """The request's stream, of which nothing may be in the log yet."""
        if self._stream is None:
            self._stream = Stream(self.session, self.message, self.answer)
        return self._stream

    # ---- it begins

    def start(self, context: Context) -> None:
        """Runs the request, its handler in this context."""
        session = self.session
        if session.services.settings.reexecute != "never":
            self.own_stream().trace = context.run(tracing.here)
        session.exchanges[self.key] = self
        session.__enter__()
        session.services.requests.acquire(self.request, self.principal)
        self._services.tasks.spawn(self.run(), context).add_done_callback(self.ran)

    async def take_over(self, stream: int, attempt: int, *, first: int) -> bool:
        """Makes the stream of a request that another node opened this node's, as the next attempt at it.

        Returns whether this node now owns the stream; if so, call `start`. False if it is another node's already, or
        has ended. Safe to retry with the same arguments.
        """
        taken = await self.own_stream().take_over(stream, attempt, first=first)
        if taken:
            # It is run for those who read its stream.
            self.answer.outlet.leave()
            self.answer.begin_stream()
        return taken

    async def prepare(self) -> bool:
        session, settings = self.session, self.session.services.settings
        self._timer = asyncio.get_running_loop().call_later(settings.window, self._window_passed)
        # Also the first: the context may be that of another request's handler.
        _attempt.set(1 if (stream := self._stream) is None else stream.attempt - stream.first_attempt + 1)
        session.make_current()
        if session.was_cancelled(self.key, self.head):
            self.cancel()
        if settings.answer == "sse" and not self.opens:
            try:
                await self._promote()
            except StoreError as error:
                self.note(HandlerEvent.TELL)
                await self.give_up(error)
                self.leave()
                return False
        return True

    async def handle(self) -> None:
        message = self.message
        try:
            answer = await self.session.runner.on_request(RunningCall(self))
            self.result = answer if isinstance(answer, bytes) else result_body(message.id, answer)
        except (asyncio.CancelledError, GeneratorExit):
            # Maybe of this task, and so for the code that began it.
            raise
        except Refusal as refusal:
            self.result, self.raised = refusal, True
        except BaseException as exception:
            self.tell_raised(exception)

    def tell_raised(self, exception: BaseException) -> None:
        if not isinstance(exception, MCPError | ValidationError):
            self._services.tasks.report(exception, "handler for %r", self.message.method)
        self.result, self.raised = error_body(self.message.id, ending.error_of(exception)), True

    # ---- it is promoted

    def _window_passed(self) -> None:
        """From here on the node follows the log, so that cancels and ends from elsewhere reach the request (P5, P6)."""
        if self.is_closed:
            return
        answer = self.answer
        answer.began = asyncio.get_running_loop().time()
        if answer.gone is not None and answer.is_awaited:
            # What the host made of `receive` goes on in the context of the request.
            answer.watching = self._services.tasks.spawn(self._watch(answer.gone), copy_context())
        self.follow()

    async def _watch(self, gone: Callable[[], Awaitable[None]]) -> None:
        """Waits until the client goes. Nothing stops for that, but it is not seen here any more (P10)."""
        await gone()
        self.client_left()

    def client_left(self) -> None:
        """The client closed its connection. The request runs on."""
        self.answer.client_left()

    def follow(self) -> None:
        """The window has passed."""
        self._follows_log = True
        self.session.inbox.open()
        if self._services.settings.answer == "auto":
            self._services.tasks.spawn(self._promote_in_time())

    async def _promote_in_time(self) -> None:
        while not self.is_closed:
            try:
                await self._promote()
                return
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_PAUSE)
            except Diverged:
                self.fail(STREAM_LOST)
                return
            except (SessionNotFound, StreamClosed, Fenced):
                return

    async def _promote(self) -> None:
        """Makes the request a stream, if it is none and its handler still runs."""
        stream = self.own_stream()
        with anyio.CancelScope(shield=True):
            async with stream.lock:
                if not stream.position and self.state < HandlerState.DONE:
                    await stream.append([])

    async def emit(self, event: Draft, expect: Sequence[str] = ()) -> None:
        """Appends a message, then writes it to the socket. Waits while the client is slow.

        Raises:
            StoreError: As `Stream.append`.
        """
        stream = self._stream or self.own_stream()
        try:
            with anyio.CancelScope(shield=True):
                async with stream.lock:
                    await stream.append([event], expect=expect)
        except Diverged:
            self.fail(STREAM_LOST)
            raise
        trimmer, outlet = self.session.log.trimmer, self.answer.outlet
        if trimmer.is_full and await trimmer.full():
            self.fail(FILLED_LOG)
            await anyio.lowlevel.checkpoint()
        if not outlet.has_room:
            await outlet.room()

    # ---- what stops it

    def end(self) -> None:
        """The session ended (P6)."""
        self.stop(HandlerEvent.SESSION_ENDED)
        self.answer.refuse(Refusal(NOT_FOUND))

    def fence(self, error: ErrorData) -> None:
        """The session has another owner now: nothing that this request does counts any more (P7)."""
        if self._stream is not None and self._stream.is_begun:
            self.stop(HandlerEvent.FENCE)
            self.answer.lose(self.message.id)
        else:
            self.fail(error)

    def disconnect_client(self) -> None:
        """Closes the HTTP response without a terminal event. A client that resumes the stream gets it elsewhere."""
        # Not 503, which says "try again": it ran.
        self.answer.disconnect(error_body(self.message.id, SHUT_DOWN))

    def observe(self, event: Event) -> None:
        """The log brought something on this request's stream that may not be of our own making."""
        kind = kind_of(event.data)
        meaning = Meaning.NOTHING if kind is None else OBSERVED.get(kind, Meaning.NOTHING)
        # What is followed may begin before this attempt.
        if self.is_closed or (kind is Kind.TAKEN and decode(event.data)["attempt"] <= self.own_stream().attempt):
            return
        if meaning is Meaning.IS_ASKED:
            self.show_life()
        elif meaning is Meaning.IS_OVER:
            logger.warning("session %s: another node ended a request of this node's", self.session.key[:12])
            self.stop(HandlerEvent.FENCE)
            self.answer.lose(self.message.id)

    def show_life(self) -> None:
        """Says in the log that the request still runs; finds out, so, whether the store has all of its stream (P9)."""
        if self.stream:
            self.session.spawn(self._show_life(self.own_stream()))

    async def _show_life(self, stream: Stream) -> None:
        async with stream.lock:
            if self.is_closed:
                return
            try:
                await stream.append([draft(Kind.ALIVE)])
            except (StreamClosed, Fenced):
                self.stop(HandlerEvent.FENCE)
            except Diverged:
                self.fail(STREAM_LOST)
            except StoreError as error:
                logger.debug("session %s: %s", self.session.key[:12], type(error).__name__)

    # ---- its end

    async def tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        answer: bytes | Refusal | None
        if self.last_word is not LastWord.RESULT:
            answer, failed = self._last_error(), True
        else:
            if self.result is None:
                # Its task was cancelled, and no `stop` was called for it.
                self.tell_raised(asyncio.CancelledError())
            answer, failed = self.result, self.raised
        if self._stream is None:
            await self.settle(answer, failed=failed)
            return
        async with self._stream.lock:
            await self.settle(answer, failed=failed)

    def _last_error(self) -> bytes | None:
        """The answer to a request that was stopped; None if the session has ended.

        Raises:
            Fenced: The end is another node's to tell.
        """
        if self.last_word is LastWord.NOTHING:
            raise Fenced
        if self.last_word is LastWord.NOT_FOUND:
            return None
        # This era's wire ends a request only with a response, also a cancelled one (as the SDK).
        return error_body(self.message.id, self.failure or CANCELLED_BY_CLIENT)

    async def settle(self, answer: bytes | Refusal | None, *, failed: bool) -> None:
        """Saves what the request changed, and gives the answer: none if the session has ended."""
        if isinstance(answer, Refusal) and self.stream:
            answer = error_body(self.message.id, answer.error)
        if answer is None or isinstance(answer, Refusal):
            self.answer.refuse(answer or Refusal(NOT_FOUND))
        else:
            await Saving(self.session, self.message, answer, failed=failed).give(self.answer, self._stream)

    async def give_up(self, error: StoreError) -> None:
        match error:
            case SessionNotFound():
                self.answer.refuse(Refusal(NOT_FOUND))
                self.session.end_soon()
            case StreamClosed() | Fenced():
                # Another node has ended this stream: nothing more of it is ours to say, or to keep (P7).
                self.session.state.revert()
                self.answer.lose(self.message.id)
            case StoreUnavailable():
                self.answer.refuse(Refusal(STORE_UNAVAILABLE))
                if self._stream is not None and self._stream.is_in_doubt:
                    # A stream may have been opened that nobody would end.
                    await self._stream.end(error_body(self.message.id, NOT_RUN), {})
            case _:
                await self.say_untold(error)

    async def say_untold(self, error: Exception) -> None:
        logger.error(
            "the answer to %r could not be written as it was; the client gets an error instead",
            self.message.method,
            exc_info=without_text(error),
        )
        body = error_body(self.message.id, ending.UNTOLD)
        if self._stream is not None and self._stream.is_begun:
            with contextlib.suppress(SessionNotFound, StreamClosed, Fenced):
                await self._stream.end(body, {})
        self.answer.give(body)

    def leave(self) -> None:
        session = self.session
        if session.exchanges.get(self.key) is self:
            del session.exchanges[self.key]
        self._services.drain.left()
        if self._stream is not None and self._stream.hold is not None:
            self._stream.hold.release()
        if self.answer.watching is not None:
            self.answer.watching.cancel()
        if self._follows_log:
            self._follows_log = False
            session.inbox.close()

    def finish(self) -> None:
        untold = self.state is not HandlerState.TOLD
        if untold:
            self.note(HandlerEvent.RETURNED)
            self.leave()
        if untold or self.answer.state is AnswerState.OPEN:
            self.answer.refuse(Refusal(NOT_RUN_HERE) if self._timer is None else Refusal(INTERRUPTED))
        self._services.requests.release(self.request)
        self.session.__exit__()
