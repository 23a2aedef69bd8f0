"""Every call to the store has a deadline, and a failed call is repeated until then (P9).

All of a store's writes may be repeated as they were (`store.py`), which makes this the one place that retries. It is
also the one place that holds a store to the errors that each method may raise: what comes through are answers that the
callers know, or `StoreUnavailable`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Self, TypeVar

from nonstick.core.refusals import STORE_AWAY
from nonstick.errors import (
    AlreadyExists,
    ConfigurationError,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StoreError,
    StoreUnavailable,
    StoreUnusable,
    StreamClosed,
    TooManySessions,
    Trimmed,
    Undecryptable,
)
from nonstick.store import (
    MAX_CLIP,
    MAX_READ_BYTES,
    STANDALONE,
    Appended,
    Batch,
    Cursor,
    Event,
    Lease,
    Loaded,
    Skimmed,
    Store,
    Wake,
)
from nonstick.waiting.ends import End, Ends

__all__ = ["LESS", "PATIENCE", "GuardedStore", "withheld"]

logger = logging.getLogger(__name__)

PATIENCE: Final = 2.0
"""Seconds that a call may take, repeats included, unless the caller grants more."""

LESS: Final = 4
"""A read that failed is tried again for so many times less."""

_CLOSING: Final = 0.2
"""Seconds, at most, for which a node that ends waits for the store's connections to close."""

_FIRST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 0.5

_Answers = tuple[type[StoreError], ...]
"""Errors that a method may answer with, beside `StoreUnavailable`, which each may raise."""

_NONE: Final[_Answers] = ()
_GONE: Final[_Answers] = (SessionNotFound,)
_READ_ON: Final[_Answers] = (SessionNotFound, Diverged)
_READ: Final[_Answers] = (*_READ_ON, Trimmed)

T = TypeVar("T")


class GuardedStore:
    """A store whose calls end: with an answer, or with `StoreUnavailable` after `patience` seconds.

    An error that a method may not raise, by the protocol, is a defect of the store. It is logged, and is
    `StoreUnavailable` for the caller: nobody can rely on what such a store says of a session (P9).

    Has the methods of `Store`, those of the hot path with `patience` as a further argument.
    """

    def __init__(self, store: Store, *, patience: float = PATIENCE) -> None:
        self.store = store
        self.patience = patience
        self._stack = AsyncExitStack()
        self._calls = Ends()

    @property
    def url(self) -> str:
        return self.store.url

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.store)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        try:
            async with asyncio.timeout(None if math.isinf(self._calls.latest) else _CLOSING):
                await self._stack.aclose()
        except TimeoutError:
            logger.warning("the connections to the store could not be closed in time")
        finally:
            self._calls.close()

    def end_at(self, time: float) -> None:
        """No call lasts longer, in the loop's time: the node is gone soon after."""
        self._calls.latest = time

    def end_pending(self) -> None:
        """Calls that are under way end now, with `StoreUnavailable`."""
        self._calls.hasten()

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        repeated = False

        async def create() -> None:
            nonlocal repeated
            try:
                await self.store.create(key, fields, lifetime=lifetime, limits=limits)
            except AlreadyExists:
                # Keys are 160 bits of a random id's hash: what a repeat finds is what the first try made.
                if not repeated:
                    raise
            except StoreUnavailable:
                repeated = True
                raise

        await self._until(create, self.patience, (AlreadyExists, TooManySessions) if limits else (AlreadyExists,))

    async def load(self, key: str, *, patience: float | None = None, renew: bool = True) -> Loaded:
        # As `_until`, without its frames: every request loads.
        patience = self.patience if patience is None else patience
        call = End(self._calls, patience)
        try:
            loaded = await self.store.load(key, renew=renew)
        except BaseException as error:
            if not self._is_to_be_repeated(error, call, patience, _GONE):
                raise
        else:
            call.leave()
            return loaded
        return await self._until(lambda: self.store.load(key, renew=renew), patience, _GONE, failed=call)

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
        patience: float | None = None,
    ) -> bool:
        return await self._until(
            lambda: self.store.update(key, changes, expect=expect, lifetime=lifetime),
            self.patience if patience is None else patience,
            _GONE,
        )

    async def touch(self, keys: Collection[str]) -> None:
        await self._until(lambda: self.store.touch(keys), self.patience, _NONE)

    async def delete(self, key: str) -> bool:
        return await self._until(lambda: self.store.delete(key), self.patience, _NONE)

    async def append(self, key: str, batch: Batch, *, patience: float | None = None) -> Appended:
        # As `_until`, without its frames: every message is appended.
        patience = self.patience if patience is None else patience
        call = End(self._calls, patience)
        try:
            appended = await self.store.append(key, batch)
        except BaseException as error:
            if not self._is_to_be_repeated(error, call, patience, batch):
                raise
        else:
            call.leave()
            return appended
        return await self._until(lambda: self.store.append(key, batch), patience, batch, failed=call)

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        """As `Store.read`. What failed is repeated for less: it may have been too much to be answered in time (P10)."""
        limits, sizes = _less(limit), _less(max_bytes)
        return await self._until(
            lambda: self.store.read(key, after, limit=next(limits), max_bytes=next(sizes)),
            self.patience,
            _READ if after.tag else _READ_ON,
        )

    async def read_on(
        self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES
    ) -> list[Event]:
        """As `read`, but goes on with what is left where the entry at the cursor was trimmed.

        Raises:
            SessionNotFound, Diverged, StoreUnavailable: As `read`.
        """
        try:
            return await self.read(key, after, limit=limit, max_bytes=max_bytes)
        except Trimmed:
            return await self.read(key, Cursor(after.position), limit=limit, max_bytes=max_bytes)

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        """As `Store.skim`; as `read`."""
        limits = _less(limit)
        return await self._until(
            lambda: self.store.skim(key, after, limit=next(limits), clip=clip),
            self.patience,
            _READ if after.tag else _READ_ON,
        )

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        await self._until(
            lambda: self.store.trim(key, streams=streams, standalone_before=standalone_before),
            self.patience,
            _NONE,
        )

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        """As `TellsStale.stale`; all of them, without a call, where the store does not have it."""
        # Asked of the object: the store may be one that passes on whatever another one has.
        stale: Callable[[Mapping[str, Cursor]], Awaitable[set[str]]] | None = getattr(self.store, "stale", None)
        if stale is None:
            return set(places)
        return await self._until(lambda: stale(places), self.patience, _NONE)

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        try:
            return self.store.watch(key, wake)
        except StoreError as error:
            # Followers also read without a wake, if not as soon.
            _report(error)
            return _nothing

    def lease(self, node: str) -> Lease:
        return self.store.lease(node)

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        return await self._until(lambda: self.store.lapsed(nodes), self.patience, _NONE)

    async def ping(self) -> None:
        await self._until(self.store.ping, self.patience, _NONE)

    async def _until(
        self, call: Callable[[], Awaitable[T]], patience: float, answers: _Answers | Batch, *, failed: End | None = None
    ) -> T:
        """What the call answers, which is repeated until then.

        Args:
            answers: Errors that it may raise.
            failed: The end of a first try, which was made already and is to be repeated.
        """
        pause = _FIRST_PAUSE
        end = failed
        while True:
            if end is not None:
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(pause * 2, _LONGEST_PAUSE)
                end = end.again()
            else:
                end = End(self._calls, patience)
            try:
                answer = await call()
            except BaseException as error:
                if not self._is_to_be_repeated(error, end, patience, answers, pause):
                    raise
            else:
                end.leave()
                return answer

    def _is_to_be_repeated(
        self,
        error: BaseException,
        call: End,
        patience: float,
        answers: _Answers | Batch,
        pause: float = _FIRST_PAUSE,
    ) -> bool:
        """Whether a call that failed is to be repeated after a pause; if not, the caller gets this error.

        Raises:
            StoreUnavailable: The caller gets that in place of the error.
        """
        if call.passed(error) or isinstance(error, TimeoutError):
            raise StoreUnavailable(f"the store did not answer within {patience:g} s") from None
        if isinstance(error, ConfigurationError):
            raise StoreUnusable(str(error)) from error
        if not isinstance(error, StoreError) or isinstance(error, StoreUnusable | Undecryptable):
            return False  # of the latter: it would be so again
        if isinstance(error, StoreUnavailable):
            return call.has_time(pause)
        if isinstance(error, _answers_to(answers) if isinstance(answers, Batch) else answers):
            return False
        _report(error)
        raise StoreUnavailable(f"the store raised {type(error).__name__}, which it may not here") from None


def _less(most: int) -> Iterator[int]:
    """So much, and each time a quarter of that, but one at least."""
    while True:
        yield most
        most = max(1, most // LESS)


def _answers_to(batch: Batch) -> _Answers:
    """The errors that `Store.append` may answer this batch with."""
    answers: _Answers = _GONE
    if batch.stream > STANDALONE:
        answers += (StreamClosed, Fenced)
        if batch.writer and batch.sequence > 1:
            answers += (Diverged,)
    if batch.answers is not None or batch.settle is not None:
        answers += (NotPending,)
    return answers


def withheld(error: Exception, what: str, *args: object) -> StoreUnavailable:
    """What handlers get in place of this error of the store, which is logged.

    Handlers pass on to their clients what they get, and the store's own words may name its host (P13).
    """
    logger.warning(f"{what}: %s", *args, error)
    return StoreUnavailable(STORE_AWAY)


def _report(error: StoreError) -> None:
    logger.error("the store has a defect: it raised %s where it may not", type(error).__name__)


def _nothing() -> None:
    """Stops a watch that never began."""
