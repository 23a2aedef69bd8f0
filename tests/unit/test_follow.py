"""Whatever becomes of its wakes, a follower gives every event, in order, once (P3)."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from nonstick.errors import Diverged, SessionNotFound, StoreUnavailable, Trimmed
from nonstick.follow import Follower, Subscription
from nonstick.guard import GuardedStore
from nonstick.store import MAX_READ_BYTES, Batch, Cursor, Draft, Event, News, Wake
from nonstick.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

KEY = "k" * 40
DEADLINE = 20.0


class Careless(MemoryStore):
    """A store that loses, repeats, empties, delays and so reorders its wakes, and is slow to read, as told."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)
        self.mangles = False
        self.loses_wakes = False
        self.unavailable = False
        self.reads = 0
        self.lost: set[bytes] = set()
        """Tags of entries that the store has lost, with others in their places."""
        self.wakes: list[Wake] = []

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        self.wakes.append(wake)

        def mangled(news: News | None) -> None:
            if self.loses_wakes:
                return
            if not self.mangles:
                wake(news)
                return
            for _ in range(self.random.choice([0, 0, 1, 1, 1, 2])):
                sent = self.random.choice([news, news, news, None])
                delay = self.random.choice([0, 0, 0.001, 0.003])
                asyncio.get_running_loop().call_later(delay, wake, sent)

        return super().watch(key, mangled)

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        self.reads += 1
        if self.unavailable:
            raise StoreUnavailable("down")
        if after.tag in self.lost:
            raise Diverged
        if after.tag and after.tag[::-1] in self.lost:
            after = Cursor(after.position, after.tag[::-1])
        if self.mangles:
            limit = self.random.randint(1, limit)
        events = await super().read(key, after, limit=limit, max_bytes=max_bytes)
        events = [event._replace(tag=event.tag[::-1]) if event.tag in self.lost else event for event in events]
        if self.mangles and self.random.random() < 0.5:
            # What is appended while the answer is on its way is not in it.
            await asyncio.sleep(self.random.choice([0, 0.001, 0.002]))
        return events


@pytest.fixture
async def store() -> AsyncIterator[Careless]:
    async with Careless() as store:
        await store.create(KEY, {}, lifetime=600)
        yield store


@pytest.fixture
def follower(store: Careless) -> Follower:
    return Follower(GuardedStore(store), KEY)


async def append(store: MemoryStore, count: int = 1) -> Cursor:
    """Appends so many events in one batch; where the last one is."""
    drafts = [Draft(secrets.token_bytes(8), b"1m{}") for _ in range(count)]
    appended = await store.append(KEY, Batch(drafts))
    return Cursor(appended.first + count - 1, drafts[-1].tag)


async def collect(subscription: Subscription, last: int) -> list[int]:
    """Positions, until this one came."""
    seen: list[int] = []
    async with asyncio.timeout(DEADLINE):
        while not seen or seen[-1] < last:
            seen += [event.position for event in await subscription.next()]
    return seen


async def ended(tasks: set[asyncio.Task[Any]]) -> None:
    """Returns once these tasks, if there are any, have ended."""
    if tasks:
        _, left = await asyncio.wait(tasks, timeout=DEADLINE)
        assert not left


def between(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


# ---- in order, once


async def test_events_before_and_after_the_subscription_arrive(store: Careless, follower: Follower) -> None:
    before = await append(store, 3)
    whole, rest = follower.subscribe(Cursor(0)), follower.subscribe(before)
    assert await collect(whole, 3) == [1, 2, 3]
    await append(store, 2)
    assert await collect(whole, 5) == [4, 5]
    assert await collect(rest, 5) == [4, 5]
    whole.close()
    rest.close()


@pytest.mark.parametrize("seed", range(25))
async def test_lost_repeated_and_reordered_wakes_lose_and_double_nothing(
    store: Careless, follower: Follower, seed: int
) -> None:
    """P3."""
    store.random.seed(seed)
    store.mangles = True
    dice = random.Random(seed)
    cursors = [Cursor(0)]
    readers: list[tuple[int, Subscription, asyncio.Task[list[int]]]] = []
    total = 150
    while cursors[-1].position < total:
        cursors.append(await append(store, dice.randint(1, 7)))
        if dice.random() < 0.15 and len(readers) < 6:
            start = dice.choice(cursors)
            subscription = follower.subscribe(start)
            readers.append((start.position, subscription, asyncio.create_task(collect(subscription, total))))
        if dice.random() < 0.1 and readers:
            # One goes, in the middle of whatever it does.
            _, subscription, task = readers.pop(dice.randrange(len(readers)))
            task.cancel()
            subscription.close()
        await asyncio.sleep(dice.choice([0, 0, 0.001]))
    last = cursors[-1].position
    readers.append(
        (0, subscription := follower.subscribe(Cursor(0)), asyncio.create_task(collect(subscription, total)))
    )
    for wake in store.wakes:
        wake(None)  # only so that nobody has to wait for the poll
    for start_position, subscription, task in readers:
        seen = await task
        assert seen == between(start_position + 1, seen[-1])
        assert total <= seen[-1] <= last
        subscription.close()


async def test_event_whose_wake_was_lost_arrives_with_the_next_poll(store: Careless, follower: Follower) -> None:
    """P3: a wake is only a hint."""
    subscription = follower.subscribe(await append(store))
    await asyncio.sleep(0.05)
    store.loses_wakes = True
    await append(store)
    assert await collect(subscription, 2) == [2]
    subscription.close()


async def test_event_whose_wake_was_lost_after_others_came_arrives_too(store: Careless, follower: Follower) -> None:
    """P3: what a wake brought puts the poll off, not for good."""
    subscription = follower.subscribe(Cursor(0))
    await append(store)
    await collect(subscription, 1)
    await settled(store)
    await append(store)
    assert await collect(subscription, 2) == [2]
    store.loses_wakes = True
    await append(store)
    assert await collect(subscription, 3) == [3]
    subscription.close()


async def test_wake_that_carries_the_next_events_spares_the_read(store: Careless, follower: Follower) -> None:
    subscription = follower.subscribe(Cursor(0))
    await append(store)
    await collect(subscription, 1)
    await settled(store)
    reads = store.reads
    for position in (2, 3, 4):
        await append(store)
        assert await collect(subscription, position) == [position]
    assert store.reads == reads
    subscription.close()


async def settled(store: Careless) -> None:
    """Returns once the follower reads no more of its own accord."""
    reads = -1
    while reads != store.reads:
        reads = store.reads
        await asyncio.sleep(0.02)


async def test_one_reader_serves_however_many_subscriptions(store: Careless, follower: Follower) -> None:
    """P10."""
    subscriptions = [follower.subscribe(Cursor(0)) for _ in range(50)]
    await settled(store)
    reads = store.reads
    await append(store, 5)
    for subscription in subscriptions:
        assert await collect(subscription, 5) == between(1, 5)
    assert store.reads == reads
    assert len(store.wakes) == 1
    for subscription in subscriptions:
        subscription.close()


async def test_slow_subscription_catches_up_by_itself_and_holds_up_nobody(store: Careless, follower: Follower) -> None:
    """P10: what waits for it is bounded."""
    quick, slow = follower.subscribe(Cursor(0)), follower.subscribe(Cursor(0))
    for _ in range(30):
        await append(store, 100)
    assert await collect(quick, 3000) == between(1, 3000)
    assert await collect(slow, 3000) == between(1, 3000)
    await append(store)
    assert await collect(slow, 3001) == [3001]
    quick.close()
    slow.close()


async def test_bytes_that_wait_for_a_slow_subscription_are_bounded(store: Careless, follower: Follower) -> None:
    """P10: a node may have thousands of them; large events are read a few at a time."""
    large = b"1m" + b"x" * 50_000
    quick, slow = follower.subscribe(Cursor(0)), follower.subscribe(Cursor(0))
    for _ in range(200):
        await store.append(KEY, Batch([Draft(secrets.token_bytes(8), large)]))
    assert await collect(quick, 200) == between(1, 200)
    sizes: list[int] = []
    seen: list[int] = []
    while not seen or seen[-1] < 200:
        events = await slow.next()
        sizes.append(sum(len(event.data) for event in events))
        seen += [event.position for event in events]
    assert seen == between(1, 200)
    assert max(sizes[2:]) <= 300_000  # the first read does not know yet how large they are
    assert max(sizes) <= 16 * len(large)
    quick.close()
    slow.close()


async def test_small_events_are_read_many_at_a_time(store: Careless, follower: Follower) -> None:
    """A long log does not take a round trip for every few events."""
    await append(store, 3000)
    subscription = follower.subscribe(Cursor(0))
    assert await collect(subscription, 3000) == between(1, 3000)
    assert store.reads < 30
    subscription.close()


async def test_follower_without_subscriptions_does_nothing(store: Careless, follower: Follower) -> None:
    """P10: and begins anew with the next one."""
    first = follower.subscribe(Cursor(0))
    await append(store, 2)
    await collect(first, 2)
    first.close()
    assert follower.subscriptions == 0
    await asyncio.sleep(0)
    reads = store.reads
    await append(store, 2)
    await asyncio.sleep(0.05)
    assert store.reads == reads
    again = follower.subscribe(first.cursor)
    assert await collect(again, 4) == [3, 4]
    again.close()


async def test_cancelled_next_loses_nothing(store: Careless, follower: Follower) -> None:
    subscription = follower.subscribe(Cursor(0))
    for position in range(1, 20):
        waiting = asyncio.create_task(subscription.next())
        await asyncio.sleep(0)
        await append(store)
        waiting.cancel()
        seen = [e.position for e in waiting.result()] if await _finished(waiting) else []
        assert (seen or await collect(subscription, position)) == [position]
    subscription.close()


async def _finished(task: asyncio.Task[list[Event]]) -> bool:
    await asyncio.wait([task])
    return not task.cancelled()


# ---- what was trimmed or lost


async def test_what_was_trimmed_is_passed_over(store: Careless, follower: Follower) -> None:
    start = await append(store, 4)
    await append(store, 4)
    await store.trim(KEY, standalone_before=7)
    with pytest.raises(Trimmed):
        await store.read(KEY, start)
    subscription = follower.subscribe(start)
    assert await collect(subscription, 8) == [7, 8]
    late = follower.subscribe(Cursor(2, b"x" * 8))
    assert await collect(late, 8) == [7, 8]
    subscription.close()
    late.close()


async def test_log_that_was_trimmed_whole_is_waited_on(store: Careless, follower: Follower) -> None:
    start = await append(store, 4)
    await append(store, 4)
    await store.trim(KEY, standalone_before=9)
    ahead, behind = follower.subscribe(Cursor(8)), follower.subscribe(start)
    await settled(store)
    await append(store)
    assert await collect(ahead, 9) == [9]
    assert await collect(behind, 9) == [9]
    ahead.close()
    behind.close()


async def test_place_that_the_store_lost_is_reported_to_every_subscription(store: Careless, follower: Follower) -> None:
    """P9: lost data is never passed over in silence."""
    subscriptions = [follower.subscribe(Cursor(0)) for _ in range(3)]
    await append(store, 5)
    for subscription in subscriptions:
        await collect(subscription, 5)
    store.lost = {event.tag for event in await store.read(KEY, Cursor(0))}
    for wake in store.wakes:
        wake(None)  # as after every interruption
    for subscription in subscriptions:
        with pytest.raises(Diverged):
            async with asyncio.timeout(DEADLINE):
                await subscription.next()
        subscription.close()
    # Whoever begins again gets what there is.
    again = follower.subscribe(Cursor(0))
    assert await collect(again, 5) == between(1, 5)
    again.close()


async def test_subscription_that_begins_at_a_lost_place_hears_of_it(store: Careless, follower: Follower) -> None:
    """P9."""
    await append(store, 5)
    for bad in (Cursor(3, b"another!"), Cursor(9, b"far away")):
        alone = follower.subscribe(bad)
        with pytest.raises(Diverged):
            await collect(alone, 5)
        alone.close()
    healthy = follower.subscribe(Cursor(0))
    await collect(healthy, 5)
    other = follower.subscribe(Cursor(3, b"another!"))
    with pytest.raises(Diverged):
        await collect(other, 5)
    other.close()
    await append(store)
    # It has disturbed nobody else.
    assert await collect(healthy, 6) == [6]
    healthy.close()


# ---- the session's end, the store's absence


@pytest.mark.parametrize("loses_wakes", [False, True])
async def test_end_of_the_session_reaches_every_subscription(
    store: Careless, follower: Follower, loses_wakes: bool
) -> None:
    """P6: after what it was given before."""
    subscription, idle = follower.subscribe(Cursor(0)), follower.subscribe(Cursor(0))
    await append(store, 2)
    await collect(subscription, 2)
    store.loses_wakes = loses_wakes
    await store.delete(KEY)
    for one in (subscription, idle):
        with pytest.raises(SessionNotFound):
            async with asyncio.timeout(DEADLINE):
                while True:
                    await one.next()
    with pytest.raises(SessionNotFound):
        await follower.subscribe(Cursor(0)).next()


async def test_follower_goes_on_when_the_store_is_back(store: Careless) -> None:
    """P9."""
    follower = Follower(GuardedStore(store, patience=0.01), KEY)
    subscription = follower.subscribe(Cursor(0))
    await append(store)
    await collect(subscription, 1)
    store.loses_wakes = store.unavailable = True
    await append(store, 3)
    for wake in store.wakes:
        wake(None)
    await asyncio.sleep(0.1)
    store.unavailable = False
    assert await collect(subscription, 4) == [2, 3, 4]
    subscription.close()


async def test_silent_log_is_followed_without_a_task(store: Careless, follower: Follower) -> None:
    """P10: thousands of streams may be open on a node."""
    before = asyncio.all_tasks()
    subscription = follower.subscribe(Cursor(0))
    await append(store)
    await collect(subscription, 1)
    await ended(asyncio.all_tasks() - before)
    # Also what no wake tells is found, and by a task that ends again.
    store.loses_wakes = True
    await append(store)
    await collect(subscription, 2)
    await ended(asyncio.all_tasks() - before)
    subscription.close()


async def test_nothing_is_left_behind(store: Careless, follower: Follower) -> None:
    before = asyncio.all_tasks()
    subscriptions = [follower.subscribe(Cursor(0)) for _ in range(3)]
    await append(store)
    for subscription in subscriptions:
        await collect(subscription, 1)
        subscription.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


class Defective(MemoryStore):
    """Raises at its first read what no store may raise."""

    broken = True

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        if self.broken:
            self.broken = False
            raise ValueError("a defect")
        return await super().read(key, after, limit=limit, max_bytes=max_bytes)


async def test_follower_goes_on_after_an_error_that_no_store_may_raise(caplog: pytest.LogCaptureFixture) -> None:
    """P9: one read that fails must not make a node deaf for the session."""
    async with Defective() as store:
        await store.create(KEY, {}, lifetime=600)
        follower = Follower(GuardedStore(store), KEY)
        await append(store)
        subscription = follower.subscribe(Cursor(0))
        assert await collect(subscription, 1) == [1]
        subscription.close()
    assert not store.broken
    assert "its log could not be read" in caplog.text
