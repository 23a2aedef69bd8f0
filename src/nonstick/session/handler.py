"""A request's handler in a task of its own: how it is stopped, and that its end is told once, whatever it does (P16).

What may happen to it in which order is the table `HANDLER` of `core/requests.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from typing import Final

import anyio
import anyio.lowlevel
from mcp_types import ErrorData

from nonstick.core.lazy import lazy
from nonstick.core.refusals import Refusal
from nonstick.core.requests import HANDLER, LAST_WORD, HandlerEvent, HandlerState, LastWord
from nonstick.errors import Fenced, SessionNotFound, StoreError, StreamClosed
from nonstick.session.services import Services

__all__ = ["Handler"]

_MOST_TRIES: Final = 3
"""Tasks that are to tell one request's end, one after the other: somebody may cancel each of them."""


class Handler(ABC):
    """One request's handler. A subclass says what is handled, and how the request's end is told.

    Attributes:
        result: What the handler ended with, once it has: an answer, which is an error if it `raised`; or the refusal
            to run it. None if its task was cancelled before.
        failure: Why this side ended the request, if that is its last word.
        last_word: What the client is to be told, once the handler is closed.
        tries: Tasks, beside the handler's, that were to tell its end.
    """

    result: bytes | Refusal | None = None
    raised = False
    failure: ErrorData | None = None
    last_word = LastWord.RESULT
    tries = 0
    state = HandlerState.RUNNING
    _services: Services
    _scope: anyio.CancelScope

    @lazy
    def cancel_requested(self) -> anyio.Event:
        """Set when the client cancels the request."""
        return anyio.Event()

    @property
    def is_closed(self) -> bool:
        """Whether it has no say any more: it ended, or was abandoned."""
        return self.state >= HandlerState.DONE

    # ---- what is handled

    @abstractmethod
    async def prepare(self) -> bool:
        """Called in the handler's task, before it begins. False if that was the request's end, and is told."""

    @abstractmethod
    async def handle(self) -> None:
        """Runs the handler, and puts what it ended with into `result`.

        Raises:
            CancelledError, GeneratorExit: Maybe of this task, and so for the code that began it.
        """

    @abstractmethod
    def tell_raised(self, exception: BaseException) -> None:
        """Puts the answer to a request into `result` whose handler raised this. Never raises."""

    @abstractmethod
    async def tell(self) -> None:
        """Tells the end, by `last_word`. Called again by another task if this one is cancelled before it has.

        Raises:
            StoreError: The end could not be told.
        """

    @abstractmethod
    async def give_up(self, error: StoreError) -> None:
        """The store says that the end is not this node's to tell, or cannot take it now."""

    @abstractmethod
    async def say_untold(self, error: Exception) -> None:
        """What should have been told could not be, for this reason. Tells that."""

    @abstractmethod
    def leave(self) -> None:
        """Nothing of the request runs here any more. May be called more than once."""

    @abstractmethod
    def finish(self) -> None:
        """Called once, last. If the end was not told, it will not be: nobody is to wait for it."""

    # ---- its task

    async def run(self) -> None:
        """Runs the handler, and tells its end. If the handler left this task unfit for that, `ran` sees to it."""
        if not await self.prepare():
            return
        try:
            with self._scope:
                if self._scope.cancel_called:
                    # Cancelled before it began, the handler does not run to its first wait either.
                    await anyio.lowlevel.checkpoint_if_cancelled()
                await self.handle()
        except BaseException as exception:
            # A cancellation that is none of ours, or what a scope says that the handler did not leave.
            if self.result is None:
                self.tell_raised(exception)
            return
        await self._conclude()

    def ran(self, _: asyncio.Task[None]) -> None:
        """The task has ended. If it did not tell the request's end, another one does, which nobody cancels (P16)."""
        if self.state is not HandlerState.TOLD and not self._services.tasks.stopped and self.tries < _MOST_TRIES:
            self.tries += 1
            self._services.tasks.spawn(self._conclude()).add_done_callback(self.ran)
        else:
            self.finish()

    async def _conclude(self) -> None:
        """Tells the request's end, once, whatever it is."""
        if self.state is not HandlerState.ABANDONED:
            self.note(HandlerEvent.RETURNED)
            try:
                await self.tell()
            except StoreError as error:
                await self.give_up(error)
            except Exception as error:
                await self.say_untold(error)
        self.state = HandlerState.TOLD
        self.leave()

    # ---- what stops it

    def cancel(self) -> None:
        """The client cancelled the request (P5)."""
        self.cancel_requested.set()
        self.stop(HandlerEvent.CANCEL)

    def fail(self, error: ErrorData) -> None:
        """The request is ended from this side, with this error."""
        if self.stop(HandlerEvent.FAIL):
            self.failure = error

    async def abandon(self) -> None:
        """Ends the request without its handler, which did not stop when it was told to."""
        if not self.note(HandlerEvent.ABANDON):
            return
        try:
            with anyio.CancelScope(shield=True), contextlib.suppress(SessionNotFound, StreamClosed, Fenced):
                await self.tell()
        finally:
            self.leave()

    def stop(self, reason: HandlerEvent) -> bool:
        """Cancels the handler for this reason. False if it was stopped for another one, or has ended."""
        if not self.note(reason):
            return False
        self._scope.cancel()
        return True

    def note(self, event: HandlerEvent) -> bool:
        """Takes an event. Whether it changes anything."""
        state = HANDLER[self.state].get(event)
        if state is None:
            return False
        if state >= HandlerState.DONE > self.state:
            self.last_word = LAST_WORD[self.state]
        self.state = state
        return True
