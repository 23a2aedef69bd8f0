"""Whatever becomes of its wakes, a follower gives every event, in order, once (P3)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, cast

import pytest

from nonstick.errors import Diverged, SessionNotFound, StoreUnavailable, Trimmed
from nonstick.log.follow import Follower, Subscription, _Pace, whole
from nonstick.log.guard import PATIENCE, GuardedStore
from nonstick.log.lookout import Lookout
from nonstick.store import MAX_READ_BYTES, Batch, Cursor, Draft, Event, News, Store, Wake
from nonstick.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

KEY = "k" * 40
DEADLINE = 60.0


class Careless(MemoryStore):
    """A store that loses, repeats, empties, delays and so reorders its wakes, and is slow to read, as told."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)
        self.mangles = False
        self.loses_wakes = False
        self.unavailable = False
        self.reads = 0
        self.looks = 0
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

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        self.looks += 1
        if self.unavailable:
            raise StoreUnavailable("down")
        lost = {key for key, place in places.items() if place.tag in self.lost}
        found = {
            key: place._replace(tag=place.tag[::-1]) for key, place in places.items() if place.tag[::-1] in self.lost
        }
        return lost | await super().stale({**places, **found})


class Reticent:
    """A store that has not got `stale`: a third party's, of before there was one."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        if name == "stale":
            raise AttributeError(name)
        return getattr(self.store, name)


def following(store: Store, *, patience: float = PATIENCE) -> Follower:
    guarded = GuardedStore(store, patience=patience)
    return Follower(guarded, Lookout(guarded), KEY)


@pytest.fixture
async def store() -> AsyncIterator[Careless]:
    async with Careless() as store:
        await store.create(KEY, {}, lifetime=600)
        yield store


@pytest.fixture(params=["tells", "is read"])
def follower(store: Careless, request: pytest.FixtureRequest) -> Follower:
    """Of a store that tells whether a log has to be read, or of one that has to be read to know."""
    return following(store if request.param == "tells" else cast("Store", Reticent(store)))


@pytest.fixture
def unpolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a wake can have the log read, however slow the machine is."""
    monkeypatch.setattr("nonstick.log.lookout._TURN_SECONDS", 100.0)


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


async def test_events_around_subscribing_arrive(store: Careless, follower: Follower) -> None:
    before = await append(store, 3)
    whole, rest = follower.subscribe(Cursor(0)), follower.subscribe(before)
    assert await collect(whole, 3) == [1, 2, 3]
    await append(store, 2)
    assert await collect(whole, 5) == [4, 5]
    assert await collect(rest, 5) == [4, 5]
    whole.close()
    rest.close()


@pytest.mark.parametrize("seed", range(25))
async def test_disordered_wakes_lose_and_double_nothing(store: Careless, follower: Follower, seed: int) -> None:
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


async def test_poll_brings_event_without_wake(store: Careless, follower: Follower) -> None:
    """P3: a wake is only a hint."""
    subscription = follower.subscribe(await append(store))
    await asyncio.sleep(0.05)
    store.loses_wakes = True
    await append(store)
    assert await collect(subscription, 2) == [2]
    subscription.close()


async def test_wakes_only_postpone_the_poll(store: Careless, follower: Follower) -> None:
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


@pytest.mark.usefixtures("unpolled")
async def test_wake_with_next_events_spares_read(store: Careless, follower: Follower) -> None:
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
        # Turns of the loop, not a time: on a busy machine there may be none in any time.
        for _ in range(1000):
            await asyncio.sleep(0)


@pytest.mark.usefixtures("unpolled")
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


async def test_slow_subscription_holds_up_nobody(store: Careless, follower: Follower) -> None:
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


async def test_bytes_waiting_for_subscription_are_bounded(store: Careless, follower: Follower) -> None:
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


async def test_events_waiting_for_subscription_are_bounded(store: Careless, follower: Follower) -> None:
    """P10: however small they are."""
    quick, slow = follower.subscribe(Cursor(0)), follower.subscribe(Cursor(0))
    for _ in range(40):
        await append(store, 100)
    assert await collect(quick, 4000) == between(1, 4000)
    waiting = slow.take()
    assert 100 < len(waiting) <= 1100
    assert await collect(slow, 4000) == between(len(waiting) + 1, 4000)
    quick.close()
    slow.close()


async def test_small_events_are_read_in_bulk(store: Careless, follower: Follower) -> None:
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


async def test_wholly_trimmed_log_is_waited_on(store: Careless, follower: Follower) -> None:
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


async def test_lost_place_is_reported_to_all(store: Careless, follower: Follower) -> None:
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


async def test_loss_behind_existing_place_is_reported(store: Careless, follower: Follower) -> None:
    """P9: what comes after it is not what came after it once."""
    first = await append(store)
    ahead = follower.subscribe(Cursor(0))
    await append(store, 4)
    await collect(ahead, 5)
    behind = follower.subscribe(first)
    store.lost = {event.tag for event in await store.read(KEY, first)}
    store.wakes[0](None)
    with pytest.raises(Diverged):
        async with asyncio.timeout(DEADLINE):
            await ahead.next()
    with pytest.raises(Diverged):
        await behind.next()
    # Though they stay, whoever begins again gets what there is, and what comes.
    again = follower.subscribe(Cursor(0))
    assert await collect(again, 5) == between(1, 5)
    await append(store)
    assert await collect(again, 6) == [6]
    for subscription in (ahead, behind, again):
        subscription.close()


async def test_subscription_at_lost_place_hears_loss(store: Careless, follower: Follower) -> None:
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


# ---- wakes that are not true


def entry(position: int, name: bytes = b"phantom!") -> Event:
    """An event that no store accepted."""
    return Event(position, name, 0, b"1m{}")


async def up_to_date(store: Careless, follower: Follower, count: int = 1) -> tuple[Subscription, Cursor]:
    """A subscription that has these events, and where the last one is."""
    subscription = follower.subscribe(Cursor(0))
    last = await append(store, count)
    await collect(subscription, count)
    await settled(store)
    return subscription, last


def tell(store: Careless, news: News | None) -> None:
    for wake in store.wakes:
        wake(news)


async def cursors(subscription: Subscription, last: Cursor) -> list[Cursor]:
    """Of what comes, until this one has."""
    seen: list[Cursor] = []
    async with asyncio.timeout(DEADLINE):
        while last not in seen:
            seen += [event.cursor for event in await subscription.next()]
    return seen


@pytest.mark.parametrize("wrong", ["another tag", "no tag", "one behind", "one ahead", "a gap", "nothing before"])
async def test_wake_without_exact_continuation_means_read(store: Careless, follower: Follower, wrong: str) -> None:
    """P14: by position and tag; nothing of it is delivered, and what is true is."""
    subscription, last = await up_to_date(store, follower, 3)
    told = {
        "another tag": News(Cursor(3, b"another!"), [entry(4)]),
        "no tag": News(Cursor(3), [entry(4)]),
        "one behind": News(Cursor(2, last.tag), [entry(3), entry(4)]),
        "one ahead": News(Cursor(4, last.tag), [entry(5)]),
        "a gap": News(last, [entry(4), entry(6)]),
        "nothing before": News(Cursor(0), [entry(1)]),
    }[wrong]
    reads = store.reads
    store.loses_wakes = True
    true = await append(store)
    tell(store, told)
    assert await cursors(subscription, true) == [true]
    assert store.reads > reads
    subscription.close()


async def test_wake_without_predecessor_means_read(store: Careless, follower: Follower) -> None:
    """P14: a store of a third party may say events alone, as to 0.1."""
    subscription, _ = await up_to_date(store, follower)
    store.loses_wakes = True
    true = await append(store)
    tell(store, [entry(2)])  # type: ignore[arg-type]
    assert await cursors(subscription, true) == [true]
    subscription.close()


@pytest.mark.usefixtures("unpolled")
async def test_wake_with_known_events_spares_read(store: Careless, follower: Follower) -> None:
    """It is heard after a read brought the same; of one that says more, the rest is new."""
    subscription = follower.subscribe(Cursor(0))
    drafts = [Draft(b"tag of %d" % n, b"1m{}") for n in range(3)]
    await store.append(KEY, Batch(drafts[:2]))
    await collect(subscription, 2)
    await settled(store)
    events = [Event(n, draft.tag, 0, draft.data) for n, draft in enumerate(drafts, 1)]
    store.loses_wakes = True
    await store.append(KEY, Batch(drafts[2:]))
    reads = store.reads
    tell(store, News(Cursor(0), events[:2]))
    tell(store, News(Cursor(0), events))
    assert await collect(subscription, 3) == [3]
    assert store.reads == reads
    subscription.close()


async def test_event_replacing_phantom_follows_the_loss(store: Careless, follower: Follower) -> None:
    """P9, P14: what an old primary says last continues the log exactly; the true event in its place is not skipped."""
    subscription, last = await up_to_date(store, follower)
    tell(store, News(last, [entry(2)]))
    assert await cursors(subscription, entry(2).cursor) == [entry(2).cursor]
    true = await append(store)  # its wake names the entry before it, which is not the phantom
    with pytest.raises(Diverged):
        async with asyncio.timeout(DEADLINE):
            await subscription.next()
    subscription.close()
    again = follower.subscribe(last)
    assert await cursors(again, true) == [true]
    again.close()


async def test_phantom_is_discovered_without_wakes(store: Careless, follower: Follower) -> None:
    """P14: wakes are trusted for a while only."""
    subscription, last = await up_to_date(store, follower)
    store.loses_wakes = True
    tell(store, News(last, [entry(2)]))
    await cursors(subscription, entry(2).cursor)
    with pytest.raises(Diverged):
        async with asyncio.timeout(DEADLINE):
            await subscription.next()
    subscription.close()


async def test_phantoms_without_end_are_found_out(
    store: Careless, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P14: as long as wakes seem to tell everything, the log is read all the same from time to time."""
    monkeypatch.setattr("nonstick.log.lookout._TURN_SECONDS", 0.005)
    monkeypatch.setattr("nonstick.log.follow._LONGEST_TRUST", 0.3)
    subscription, _ = await up_to_date(store, follower)
    store.loses_wakes = True
    with pytest.raises(Diverged):
        async with asyncio.timeout(DEADLINE):
            while True:
                # What is told while a read is due anyhow is passed over.
                last = follower.cursor
                tell(store, News(last, [entry(last.position + 1, secrets.token_bytes(8))]))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(subscription.next(), 0.01)
    subscription.close()


@pytest.mark.parametrize("during", ["before the read", "after the read"])
async def test_phantom_racing_a_read_skips_nothing(
    store: Careless, follower: Follower, during: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P14: what a read brought, and a cursor that a wake has moved on meanwhile, are compared by tag."""
    subscription, last = await up_to_date(store, follower)
    reached, go_on = asyncio.Event(), asyncio.Event()
    read = MemoryStore.read

    async def held(self: MemoryStore, key: str, after: Cursor, **options: int) -> list[Event]:
        events = await read(self, key, after, **options) if during == "after the read" else []
        reached.set()
        await go_on.wait()
        return events or await read(self, key, after, **options)

    monkeypatch.setattr(MemoryStore, "read", held)
    store.loses_wakes = True
    true = await append(store, 2)
    tell(store, None)
    async with asyncio.timeout(DEADLINE):
        await reached.wait()
    tell(store, News(last, [entry(2)]))
    go_on.set()
    assert await cursors(subscription, entry(2).cursor) == [entry(2).cursor]
    with pytest.raises(Diverged):
        async with asyncio.timeout(DEADLINE):
            await subscription.next()
    subscription.close()
    again = follower.subscribe(last)
    assert (await cursors(again, true))[-1] == true
    again.close()


async def test_buffer_is_filled_by_tag(store: Careless, follower: Follower) -> None:
    """P14: a subscription whose entry is another than the one before it reads for itself, and hears of the loss."""
    ahead, last = await up_to_date(store, follower, 2)
    elsewhere = follower.subscribe(Cursor(2, b"another!"))
    true = await append(store)
    assert await cursors(ahead, true) == [true]
    with pytest.raises(Diverged):
        async with asyncio.timeout(DEADLINE):
            await elsewhere.next()
    assert last.position == 2
    for one in (ahead, elsewhere):
        one.close()


@pytest.mark.usefixtures("unpolled")
async def test_flood_of_wakes_costs_few_reads(store: Careless, follower: Follower) -> None:
    """P10, P14: one at a time, and the more bring nothing, the longer until the next. A true wake is heard."""
    subscription, _ = await up_to_date(store, follower)
    store.loses_wakes = True
    loop = asyncio.get_running_loop()
    reads, began = store.reads, loop.time()
    far_away = News(Cursor(10**15, b"far away"), [entry(10**15 + 1)])
    for _ in range(5_000):
        tell(store, None)
        tell(store, far_away)
        await asyncio.sleep(0)
    assert store.reads - reads < 12 + (loop.time() - began) / 0.1
    true = await append(store)
    tell(store, None)
    assert await cursors(subscription, true) == [true]
    subscription.close()


# ---- the session's end, the store's absence


@pytest.mark.parametrize("loses_wakes", [False, True])
async def test_sessions_end_reaches_every_subscription(store: Careless, follower: Follower, loses_wakes: bool) -> None:
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


async def test_follower_goes_on_after_an_outage(store: Careless) -> None:
    """P9."""
    follower = following(store, patience=0.01)
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


async def test_silent_log_needs_no_task(store: Careless, follower: Follower) -> None:
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


async def test_unneeded_follower_does_nothing(store: Careless, follower: Follower) -> None:
    """P10: neither by a read that is under way, nor by a wake that comes late, nor by the clock."""
    before = asyncio.all_tasks()
    begun = asyncio.Event()

    class Hanging(MemoryStore):
        async def read(self, *_args: Any, **_more: Any) -> list[Event]:
            begun.set()
            await asyncio.Event().wait()
            return []

    subscription = following(Hanging(), patience=2 * DEADLINE).subscribe(Cursor(0))
    await begun.wait()
    subscription.close()
    await ended(asyncio.all_tasks() - before)
    await append(store)
    subscription = follower.subscribe(Cursor(0))
    await collect(subscription, 1)
    await ended(asyncio.all_tasks() - before)
    subscription.close()
    reads = store.reads
    for wake in store.wakes:
        wake(None)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert store.reads == reads


async def test_silent_log_is_polled_until_left(
    store: Careless, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P9: at the slowest pace that there is, and no slower; P10: a timer that is left behind would go on."""
    monkeypatch.setattr("nonstick.log.lookout._TURN_SECONDS", 0.0002)
    store.loses_wakes = True
    subscription = follower.subscribe(Cursor(0))
    async with asyncio.timeout(DEADLINE):
        while store.reads + store.looks < 40:  # noqa: ASYNC110 - nothing tells of a look
            await asyncio.sleep(0.001)
    subscription.close()
    before = store.reads, store.looks
    other = Careless()
    await other.create(KEY, {}, lifetime=600)
    fence = following(other).subscribe(Cursor(0))
    async with asyncio.timeout(DEADLINE):
        while other.looks < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    fence.close()
    assert (store.reads, store.looks) == before


class Defective(MemoryStore):
    """Raises at its first read what no store may raise."""

    broken = True

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        if self.broken:
            self.broken = False
            raise ValueError("a defect")
        return await super().read(key, after, limit=limit, max_bytes=max_bytes)


async def test_follower_survives_an_unexpected_error(caplog: pytest.LogCaptureFixture) -> None:
    """P9: one read that fails must not make a node deaf for the session."""
    async with Defective() as store:
        await store.create(KEY, {}, lifetime=600)
        follower = following(store)
        await append(store)
        subscription = follower.subscribe(Cursor(0))
        assert await collect(subscription, 1) == [1]
        subscription.close()
    assert not store.broken
    assert "its log could not be read" in caplog.text


async def test_long_backlog_lets_others_run() -> None:
    """P10: on a store whose calls never wait, too."""
    turns = 0
    read: list[int] = []

    class Counted(MemoryStore):
        async def read(
            self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES
        ) -> list[Event]:
            read.append(turns)
            return await super().read(key, after, limit=limit, max_bytes=max_bytes)

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with Counted() as store:
        await store.create(KEY, {}, lifetime=600)
        for _ in range(40):
            await append(store, 100)
        turning = asyncio.create_task(turn())
        follower = following(store)
        subscription = follower.subscribe(Cursor(0))
        assert await collect(subscription, 4000) == between(1, 4000)
        subscription.close()
        turning.cancel()
    assert len(read) > 10
    # The follower and its subscription may each read once in a turn.
    assert max(read.count(turn) for turn in read) <= 2


# ---- how often


def test_vain_reads_for_wakes_become_rare() -> None:
    """P10: four are free, then each waits longer, up to a fifth of a second; what brings something is free again."""
    pace, now, pauses = _Pace(), 1000.0, list[float]()
    pace.took(now, brought=True)
    for _ in range(12):
        pauses.append(round(pace.pause(now), 9))
        now += pauses[-1]
        pace.took(now, brought=False)
    assert pauses == [0.0, 0.0, 0.0, 0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.2, 0.2, 0.2]
    assert pace.pause(now + 0.15) == pytest.approx(0.05)
    pace.took(now, brought=True)
    assert pace.pause(now) == 0.0


def test_vain_reads_are_forgotten_in_silence() -> None:
    """P10: between two looks that nobody asked for there is more."""
    pace, now = _Pace(), 1000.0
    for _ in range(20):
        pace.took(now, brought=False)
    assert pace.pause(now) == pytest.approx(0.2)
    pace.took(now + 0.39, brought=False)
    assert pace.pause(now + 0.39) == pytest.approx(0.2)
    pace.took(now + 0.8, brought=False)
    assert pace.pause(now + 0.8) == 0.0


# ---- the whole of what was skimmed


async def test_truncated_event_is_read_whole(store: Careless) -> None:
    """And one that was not is there already."""
    guarded = GuardedStore(store)
    large, small = Draft(b"1 bytes.", b"x" * 2000), Draft(b"2 bytes.", b"small")
    await store.append(KEY, Batch([large, small]))
    store.reads = 0
    one, two = await guarded.skim(KEY, Cursor(0), clip=10)
    event = await whole(guarded, KEY, one)
    assert event is not None
    assert event.data == large.data
    event = await whole(guarded, KEY, two)
    assert event is not None
    assert event.data == small.data
    assert store.reads == 1


async def test_dropped_and_lost_events_are_nothing(store: Careless) -> None:
    """P9, P10: nor is what has its place now."""
    guarded = GuardedStore(store)
    await store.append(KEY, Batch([Draft(tag, b"x" * 2000) for tag in (b"1 bytes.", b"2 bytes.", b"3 bytes.")]))
    skimmed = await guarded.skim(KEY, Cursor(0), clip=10)
    await store.trim(KEY, standalone_before=3)
    assert [await whole(guarded, KEY, one) for one in skimmed[:2]] == [None, None]
    store.lost.add(b"3 bytes.")
    assert await whole(guarded, KEY, skimmed[2]) is None
    beyond = skimmed[2]._replace(event=skimmed[2].event._replace(position=7))
    assert await whole(guarded, KEY, beyond) is None
