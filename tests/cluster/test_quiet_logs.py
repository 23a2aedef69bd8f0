"""What no wake tells is found by the common look at quiet logs, on every store; also where a store has no such look."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from nonstick.core.names import session_key
from nonstick.errors import Diverged, SessionNotFound
from nonstick.log.follow import Follower, Subscription
from nonstick.log.guard import GuardedStore
from nonstick.log.lookout import Lookout
from nonstick.store import Batch, Cursor, Event, Store, Wake
from nonstick.testing.contract.tools import drafts, read_all
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import DEADLINE, getting
from tests.cluster.stage import eventually
from tests.cluster.test_listener import heard, talking, tell

pytestmark = pytest.mark.anyio

KEY = "k" * 40


class Deaf:
    """A node's way to a store, by which no wake comes. Counts looks and reads, of each log.

    Args:
        tells: Whether the store has `stale`.
    """

    def __init__(self, store: Store, *, tells: bool = True) -> None:
        self.store = store
        self.tells = tells
        self.names_all = False
        self.looks, self.reads = Counter[str](), Counter[str]()
        self.way = asyncio.Lock()
        """Whoever holds it changes what is there before anybody looks or reads again."""

    def __getattr__(self, name: str) -> Any:
        if name == "stale":
            if not self.tells:
                raise AttributeError(name)
            return self._stale
        return getattr(self.store, name)

    async def __aenter__(self) -> Deaf:
        await self.store.__aenter__()
        return self

    async def __aexit__(self, *what: Any) -> None:
        await self.store.__aexit__(*what)

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return lambda: None

    async def _stale(self, places: Mapping[str, Cursor]) -> set[str]:
        self.looks.update(list(places))
        async with self.way:
            named: set[str] = await cast("Any", self.store).stale(places)
        return set(places) if self.names_all else named

    async def read(self, key: str, after: Cursor, **bounds: int) -> list[Event]:
        self.reads[key] += 1
        async with self.way:
            return await self.store.read(key, after, **bounds)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no wake told is found soon."""
    monkeypatch.setattr("nonstick.log.lookout._TURN_SECONDS", 0.02)


# ---- nodes


@pytest.mark.parametrize("tells", [True, False])
async def test_clients_hear_without_any_wake(make_store: MakeStore, tells: bool) -> None:
    """P3, P14: on two nodes at once, however often nothing tells of a message. A log in which none came is not read."""
    nodes: list[Deaf] = []

    def make() -> Store:
        nodes.append(Deaf(make_store(), tells=tells))
        return cast("Store", nodes[-1])

    async with talking(make) as (_, a, b, c):
        first, second, silent = [await a.open() for _ in range(3)]
        async with getting(b, first) as one, getting(c, second) as other, getting(c, silent) as third:
            for stream in (one, other, third):
                await stream.event()
            for number in range(3):
                await tell(a, first, f"first {number}")
                await heard(one, f"first {number}")
                await tell(a, second, f"second {number}")
                await heard(other, f"second {number}")
            key = session_key(silent.id)

            def counted() -> tuple[int, int]:
                return sum(node.looks[key] for node in nodes), sum(node.reads[key] for node in nodes)

            looks, reads = counted()
            if tells:
                # Whatever read it at first has done so by the third look from here.
                await eventually(lambda: counted()[0] >= looks + 2)
                looks, reads = counted()
                await eventually(lambda: counted()[0] >= looks + 3)
                assert counted()[1] == reads
            else:
                await eventually(lambda: counted()[1] >= reads + 3)
                assert counted()[0] == 0
            await tell(a, silent, "at last")
            await heard(third, "at last")


# ---- one follower


@asynccontextmanager
async def followed(make_store: MakeStore, *, tells: bool = True) -> AsyncIterator[tuple[Store, Deaf, Subscription]]:
    """Another node's store, a deaf one, and a subscription there that has the three events of a log."""
    async with make_store() as theirs, make_store() as ours:
        deaf = Deaf(ours, tells=tells)
        await theirs.create(KEY, {}, lifetime=600)
        await theirs.append(KEY, Batch(drafts(b"1", b"2", b"3")))
        guarded = GuardedStore(cast("Store", deaf))
        subscription = Follower(guarded, Lookout(guarded), KEY).subscribe(Cursor(0))
        try:
            await positions(subscription, 3)
            yield theirs, deaf, subscription
        finally:
            subscription.close()
            await theirs.delete(KEY)


async def positions(subscription: Subscription, last: int) -> list[int]:
    """Of what comes, up to this one."""
    seen: list[int] = []
    async with asyncio.timeout(DEADLINE):
        while not seen or seen[-1] < last:
            seen += [event.position for event in await subscription.next()]
    return seen


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("count", [3, 2, 5])
async def test_lost_place_is_found_without_wakes(make_store: MakeStore, tells: bool, count: int) -> None:
    """P9: another log has taken its place, as long, shorter or longer. By position alone the first would go unseen."""
    async with followed(make_store, tells=tells) as (theirs, deaf, subscription):
        async with deaf.way:
            await theirs.delete(KEY)
            await theirs.create(KEY, {}, lifetime=600)
            await theirs.append(KEY, Batch(drafts(*[b"other"] * count)))
        with pytest.raises(Diverged):
            async with asyncio.timeout(DEADLINE):
                await subscription.next()


@pytest.mark.parametrize("tells", [True, False])
async def test_sessions_end_is_found_without_wakes(make_store: MakeStore, tells: bool) -> None:
    """P6, P15: that it is gone is a read's answer; a look only has it read."""
    async with followed(make_store, tells=tells) as (theirs, _, subscription):
        await theirs.delete(KEY)
        with pytest.raises(SessionNotFound):
            async with asyncio.timeout(DEADLINE):
                await subscription.next()


async def test_wrong_looks_only_cost_reads(make_store: MakeStore) -> None:
    """P14: a store that names what has not changed gets nothing delivered, twice or wrong, and ends nothing."""
    async with followed(make_store) as (theirs, deaf, subscription):
        deaf.names_all = True
        reads = deaf.reads[KEY]
        await eventually(lambda: deaf.reads[KEY] >= reads + 3)
        await theirs.append(KEY, Batch(drafts(b"4", b"5")))
        assert await positions(subscription, 5) == [4, 5]
        assert len(await read_all(theirs, KEY)) == 5
