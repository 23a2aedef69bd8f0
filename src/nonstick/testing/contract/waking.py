"""The contract of `watch`: with hints that may be lost, repeated or reordered, a follower misses nothing."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from nonstick.store import NEW_STREAM, STANDALONE, Batch, Cursor, News, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.checks import LONG
from nonstick.testing.contract.tools import deadline, drafts, follow, read_all, take, texts


class Wakes:
    """A `wake` that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[News | None] = []
        self._changed = asyncio.Event()

    def __call__(self, news: News | None) -> None:
        self.calls.append(news)
        self._changed.set()

    async def more(self, than: int) -> None:
        """Returns once there were more calls than that."""
        async with deadline():
            while len(self.calls) <= than:
                self._changed.clear()
                await self._changed.wait()
        assert all(news is None or isinstance(news, News) for news in self.calls), "a wake says None, or `News`"


class WatchContract(ContractFixtures):
    """`watch` and `read` together give every event once, in order, on every node."""

    async def test_watch_first_says_read(self, b: Store, a: Store, key: str) -> None:
        """`watch`: `wake(None)` is called once the watch is in force."""
        await a.create(key, {}, lifetime=LONG)
        wakes = Wakes()
        unwatch = b.watch(key, wakes)
        await wakes.more(0)
        assert wakes.calls[0] is None
        unwatch()

    async def test_append_wakes_watchers_on_every_node(self, a: Store, b: Store, key: str) -> None:
        """`append` wakes the watchers: each batch is announced, to each watch of it."""
        await a.create(key, {}, lifetime=LONG)
        everyone = [Wakes(), Wakes(), Wakes()]
        stop = [store.watch(key, wakes) for store, wakes in zip((a, b, b), everyone, strict=True)]
        for wakes in everyone:
            await wakes.more(0)
        for n in range(3):
            heard = [len(wakes.calls) for wakes in everyone]
            await (a, b)[n % 2].append(key, Batch(drafts(b"%d" % n)))
            for wakes, before in zip(everyone, heard, strict=True):
                await wakes.more(before)
        for one in stop:
            one()

    async def test_news_has_the_logs_events(self, a: Store, b: Store, key: str) -> None:
        """`Wake` with events: they were appended, in this order, and are complete."""
        await a.create(key, {}, lifetime=LONG)
        wakes = Wakes()
        unwatch = b.watch(key, wakes)
        await wakes.more(0)
        sizes = (1, 3, 1)
        for n, size in enumerate(sizes):
            before = len(wakes.calls)
            large = bytes(300_000) if n == 2 else b"\0small\xff"
            await a.append(key, Batch(drafts(*[large] * size), stream=NEW_STREAM))
            await wakes.more(before)
        log = await read_all(b, key)
        assert len(log) == sum(sizes)
        for news in wakes.calls:
            if news:
                start = news.events[0].position - 1
                assert list(news.events) == log[start : start + len(news.events)]
        unwatch()

    async def test_news_names_the_entry_before(self, a: Store, b: Store, key: str) -> None:
        """`News.after`: its position and its tag, by which it is told whether they continue a log (P14)."""
        await a.create(key, {}, lifetime=LONG)
        here, there = Wakes(), Wakes()
        stop = [a.watch(key, here), b.watch(key, there)]
        await here.more(0)
        await there.more(0)
        for n, store in enumerate((a, b, b, a)):
            heard = len(here.calls), len(there.calls)
            await store.append(key, Batch(drafts(*[b"%d" % n] * (1 + n % 2)), stream=(STANDALONE, NEW_STREAM)[n % 2]))
            await here.more(heard[0])
            await there.more(heard[1])
        log = await read_all(a, key)
        cursors = [Cursor(0), *(event.cursor for event in log)]
        for news in (*here.calls, *there.calls):
            if news:
                assert news.after == cursors[news.events[0].position - 1]
        for one in stop:
            one()

    async def test_news_names_a_dropped_entry_too(self, a: Store, b: Store, key: str) -> None:
        """`News.after`: whether `trim` has dropped that entry or not. A store that does not know it says "read"."""
        await a.create(key, {}, lifetime=LONG)
        dropped = drafts(b"dropped")
        await a.append(key, Batch(dropped))
        here, there = Wakes(), Wakes()
        stop = [a.watch(key, here), b.watch(key, there)]
        await here.more(0)
        await there.more(0)
        await a.trim(key, standalone_before=2)
        heard = len(here.calls), len(there.calls)
        await a.append(key, Batch(drafts(b"1", b"2")))
        await here.more(heard[0])
        await there.more(heard[1])
        for news in (*here.calls, *there.calls):
            if news:
                assert news.after == Cursor(1, dropped[0].tag)
        for one in stop:
            one()

    async def test_follower_gets_each_event_in_order(self, a: Store, b: Store, key: str) -> None:
        """`watch`: one `read` at each call with None leaves no window (P3)."""
        await a.create(key, {}, lifetime=LONG)
        await a.append(key, Batch(drafts(b"before")))

        async def write(store: Store, writer: str) -> None:
            for n in range(1, 31):
                size = 1 + n % 3
                await store.append(key, Batch(drafts(*[b"x" * n] * size), writer=writer, sequence=n))

        writers = [asyncio.ensure_future(write(store, f"w{n}")) for n, store in enumerate((a, b, a, b))]
        async with aclosing(follow(a, key)) as here, aclosing(follow(b, key)) as there:
            total = 1 + 4 * 60
            seen = await asyncio.gather(take(here, total), take(there, total))
        await asyncio.gather(*writers)
        log = await read_all(a, key)
        assert list(seen) == [log, log]
        assert [event.position for event in log] == list(range(1, total + 1))

    async def test_follower_begins_where_it_is_told(self, a: Store, b: Store, key: str) -> None:
        """`read` after the cursor at the first wake: what came before is not repeated, what comes is not missed."""
        await a.create(key, {}, lifetime=LONG)
        await a.append(key, Batch(drafts(b"1", b"2", b"3")))
        head = (await a.load(key)).head
        async with aclosing(follow(b, key, head)) as events, aclosing(follow(b, key, Cursor(2))) as earlier:
            for data in (b"4", b"5", b"6"):
                coming = asyncio.ensure_future(take(events, 1))
                await a.append(key, Batch(drafts(data)))
                assert texts(await coming) == [data]
            assert texts(await take(earlier, 4)) == [b"3", b"4", b"5", b"6"]

    async def test_session_end_wakes_its_followers(self, a: Store, b: Store, key: str) -> None:
        """`delete` wakes the session's watchers, on every node (P6)."""
        await a.create(key, {}, lifetime=LONG)
        await a.append(key, Batch(drafts(b"1")))
        async with aclosing(follow(a, key)) as here, aclosing(follow(b, key)) as there:
            await asyncio.gather(take(here, 1), take(there, 1))
            await a.delete(key)
            async with deadline():
                assert [event async for event in here] == []
                assert [event async for event in there] == []

    async def test_stopped_watch_is_never_called(self, a: Store, b: Store, key: str) -> None:
        """`watch` returns the function that stops it; several watches of one log are independent."""
        await a.create(key, {}, lifetime=LONG)
        stopped, kept = Wakes(), Wakes()
        stop, keep = b.watch(key, stopped), b.watch(key, kept)
        await stopped.more(0)
        await kept.more(0)
        stop()
        heard, before = len(stopped.calls), len(kept.calls)
        await a.append(key, Batch(drafts(b"1")))
        await kept.more(before)  # the fence: every watch that is left has been called by now
        await b.append(key, Batch(drafts(b"2")))
        await kept.more(before + 1)
        assert len(stopped.calls) == heard
        keep()

    async def test_one_callback_may_watch_twice(self, a: Store, b: Store, key: str) -> None:
        """Several watches of one log in one process are independent, also with the same `wake`."""
        await a.create(key, {}, lifetime=LONG)
        wakes = Wakes()
        first, second = b.watch(key, wakes), b.watch(key, wakes)
        await wakes.more(1)
        first()
        before = len(wakes.calls)
        await a.append(key, Batch(drafts(b"1")))
        await wakes.more(before)
        second()

    async def test_log_can_be_watched_again(self, a: Store, b: Store, key: str) -> None:
        """A watch that was stopped does not stand in the way of the next one."""
        await a.create(key, {}, lifetime=LONG)
        for n in range(1, 4):
            async with aclosing(follow(b, key, Cursor(n - 1))) as events:
                coming = asyncio.ensure_future(take(events, 1))
                await a.append(key, Batch(drafts(b"%d" % n)))
                assert texts(await coming) == [b"%d" % n]

    async def test_session_can_be_watched_before_creation(self, a: Store, b: Store, key: str) -> None:
        """`watch` does not raise and does not check that the session exists."""
        wakes = Wakes()
        unwatch = b.watch(key, wakes)
        await wakes.more(0)
        await a.create(key, {}, lifetime=LONG)
        before = len(wakes.calls)
        await a.append(key, Batch(drafts(b"1")))
        await wakes.more(before)
        unwatch()

    async def test_watcher_hears_its_own_session_only(self, a: Store, b: Store, key: str) -> None:
        """`watch`: called for what is appended to this log (P3: never an event of another session)."""
        for name in (key, f"{key}2"):
            await a.create(name, {}, lifetime=LONG)
        mine, other = Wakes(), Wakes()
        stop = [b.watch(key, mine), b.watch(f"{key}2", other)]
        await mine.more(0)
        await other.more(0)
        before = len(other.calls)
        await a.append(f"{key}2", Batch(drafts(b"other")))
        await other.more(before)
        before = len(mine.calls)
        await a.append(key, Batch(drafts(b"mine")))
        await mine.more(before)
        heard = [event for news in mine.calls if news for event in news.events]
        assert {event.data for event in heard} <= {b"mine"}
        for one in stop:
            one()
