"""What the contract is written with: clocks, openers, reading and following a log."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import anyio
import anyio.lowlevel

from nonstick.errors import SessionNotFound
from nonstick.store import MAX_CLIP, MAX_READ, NEW_STREAM, Batch, Cursor, Draft, Event, News, Skimmed, Store

__all__ = [
    "BEGINNING",
    "DEADLINE",
    "Clock",
    "ManualClock",
    "Opener",
    "RealClock",
    "deadline",
    "drafts",
    "eventually",
    "follow",
    "gone_at",
    "open_stream",
    "opening",
    "read_all",
    "skim_all",
    "take",
    "texts",
]

DEADLINE = 60.0
"""Seconds that a test waits for a condition before it fails. Far above what any store needs, even on a busy machine."""

BEGINNING = Cursor(0)
"""Before the first entry of any log."""

Opener = Callable[[], Awaitable[Store]]
"""Gives an entered store on the test's data, as another node would open it; closed at the test's end."""


class Clock(Protocol):
    """The store's clock, as far as a test can see and move it."""

    exact: bool
    """Whether time stands still except in `advance`, so that a test may also skip minutes."""

    def now(self) -> float:
        """Seconds, from anywhere, never backwards."""
        ...

    async def advance(self, seconds: float) -> None:
        """Returns once at least `seconds` have passed."""
        ...


class RealClock:
    """The machine's clock: `advance` waits."""

    exact = False

    def now(self) -> float:
        return time.monotonic()

    async def advance(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class ManualClock:
    """A clock that only `advance` moves, for stores that take their clock as an argument: pass it as `clock=`."""

    exact = True

    def __init__(self, start: float = 1_000.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def now(self) -> float:
        return self._now

    async def advance(self, seconds: float) -> None:
        self._now += seconds
        await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def opening(make: Callable[[], Store]) -> AsyncIterator[Opener]:
    """An `Opener` that enters what `make` returns, each time a new instance, and closes them all at the end."""
    async with AsyncExitStack() as stack:

        async def opener() -> Store:
            return await stack.enter_async_context(make())

        yield opener


def deadline() -> asyncio.Timeout:
    """`async with deadline():` fails what waits for longer than `DEADLINE`."""
    return asyncio.timeout(DEADLINE)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Returns once the condition holds; fails after `DEADLINE`."""
    async with deadline():
        while not await condition():  # noqa: ASYNC110 - what is waited for happens in the store
            await anyio.sleep(0.005)


def drafts(*data: bytes) -> list[Draft]:
    """Events with these bytes, each under a random tag."""
    return [Draft(secrets.token_bytes(8), one) for one in data]


def texts(events: Sequence[Event]) -> list[bytes]:
    """The bytes of these events."""
    return [event.data for event in events]


async def open_stream(store: Store, key: str, *, attempt: int = 1) -> int:
    """Opens a stream in this log; returns its name."""
    opened = await store.append(key, Batch(drafts(b"opened"), stream=NEW_STREAM, attempt=attempt))
    return opened.first


async def read_all(store: Store, key: str, after: Cursor = BEGINNING) -> list[Event]:
    """Everything after the cursor, in as many reads as it takes."""
    events: list[Event] = []
    while part := await store.read(key, after, limit=MAX_READ):
        assert part[0].position > after.position, "read repeats what is before its cursor"
        events += part
        after = part[-1].cursor
    return events


async def skim_all(store: Store, key: str, after: Cursor = BEGINNING, *, clip: int = MAX_CLIP) -> list[Skimmed]:
    """Everything after the cursor, clipped, in as many calls as it takes."""
    found: list[Skimmed] = []
    while part := await store.skim(key, after, limit=MAX_READ, clip=clip):
        assert part[0].event.position > after.position, "skim repeats what is before its cursor"
        found += part
        after = part[-1].event.cursor
    return found


async def follow(store: Store, key: str, after: Cursor = BEGINNING) -> AsyncGenerator[Event, None]:
    """Every event after the cursor, in order, once; ends when the session does.

    As a node does it: news that continue the log, by position and tag, are delivered, every other wake means a read. It
    never reads without a wake, so a store that fails to wake leaves it waiting.
    """
    wakes: asyncio.Queue[News | None] = asyncio.Queue()
    unwatch = store.watch(key, wakes.put_nowait)
    try:
        while True:
            news = await wakes.get()
            for event in await _caught_up(store, key, after, news):
                after = event.cursor
                yield event
    except SessionNotFound:
        return
    finally:
        unwatch()


async def _caught_up(store: Store, key: str, after: Cursor, news: News | None) -> Sequence[Event]:
    fresh = news.since(after) if isinstance(news, News) else None
    return await read_all(store, key, after) if fresh is None else fresh


async def take(events: AsyncGenerator[Event, None], count: int) -> list[Event]:
    """The next `count` events; fails after `DEADLINE`."""
    async with deadline():
        return [await anext(events) for _ in range(count)]


async def gone_at(store: Store, key: str, clock: Clock, *, step: float = 0.01) -> tuple[float, float]:
    """Waits until the session has expired; returns when it was last seen alive, and when it was seen gone.

    Looks through `read`, which renews nothing.
    """
    alive = clock.now()
    async with deadline():
        while True:
            asked = clock.now()
            try:
                await store.read(key, Cursor(0), limit=1)
            except SessionNotFound:
                return alive, clock.now()
            alive = asked
            await clock.advance(step)
