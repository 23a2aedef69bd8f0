"""The contract of `stale`, which a store may have: which of many logs have to be read, asked at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeGuard

import pytest

from nonstick.store import MAX_PLACES, NEW_STREAM, Batch, Cursor, Store, TellsStale
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.checks import LONG, SHORT
from nonstick.testing.contract.tools import BEGINNING, Clock, drafts, eventually

__all__ = ["StaleContract", "assert_stale", "tells_stale"]


def tells_stale(store: object) -> TypeGuard[TellsStale]:
    """Whether this store has `stale`, itself or from a store to which it passes all calls on."""
    return callable(getattr(store, "stale", None))


async def assert_stale(
    store: Store, places: Mapping[str, Cursor], stale: Collection[str], *, in_doubt: Collection[str] = ()
) -> None:
    """These are named, and of the others at most those in doubt. Where a store cannot tell, all logs are read."""
    if tells_stale(store):
        assert set(stale) <= await store.stale(places) <= {*stale, *in_doubt}


async def quiet_logs(store: Store, key: str, count: int) -> dict[str, Cursor]:
    """So many sessions, and where their logs end: the n-th has n events, the first none."""
    places: dict[str, Cursor] = {}
    for n in range(count):
        name = f"{key}{n}"
        await store.create(name, {}, lifetime=LONG)
        events = drafts(*(b"x" for _ in range(n % 5)))
        if events:
            await store.append(name, Batch(events))
        places[name] = Cursor(len(events), events[-1].tag) if events else BEGINNING
    return places


class StaleContract(ContractFixtures):
    """A log that is not named has nothing that a read would tell; one in which nothing happened is not named."""

    async def test_quiet_logs_are_not_named(self, a: Store, b: Store, key: str) -> None:
        """`stale`: a key is left out if the last entry stands at that position and carries that tag."""
        places = await quiet_logs(a, key, 4)
        await assert_stale(b, places, ())
        await assert_stale(b, {name: Cursor(place.position) for name, place in places.items()}, ())
        await assert_stale(b, {}, ())

    async def test_log_with_more_is_named(self, a: Store, b: Store, key: str) -> None:
        """`stale`, from whichever node the entry came, and to an empty log too (P14: no wake is needed)."""
        places = await quiet_logs(a, key, 4)
        for n, name in enumerate(places):
            await (a, b)[n % 2].append(name, Batch(drafts(b"more")))
            for store in (a, b):
                await assert_stale(store, places, list(places)[: n + 1])

    async def test_place_further_back_is_named(self, a: Store, b: Store, key: str) -> None:
        """`stale`: the place is not the end, whether its tag is the entry's or none."""
        await a.create(key, {}, lifetime=LONG)
        events = drafts(b"1", b"2", b"3")
        await a.append(key, Batch(events))
        for place in (BEGINNING, Cursor(1), Cursor(2, events[1].tag), Cursor(2)):
            await assert_stale(b, {key: place}, [key])

    async def test_place_in_lost_log_is_named(self, a: Store, b: Store, key: str) -> None:
        """`stale`: where `read` would raise Diverged, beyond the end or at another tag (P9)."""
        places = await quiet_logs(a, key, 3)
        for name, place in places.items():
            await assert_stale(b, places | {name: Cursor(place.position + 1)}, [name])
            await assert_stale(b, places | {name: Cursor(place.position + 2, b"no event")}, [name])
            if place.position:
                await assert_stale(b, places | {name: Cursor(place.position, b"no event")}, [name])

    async def test_ended_session_is_named(self, a: Store, b: Store, key: str) -> None:
        """`stale`: a key is left out only if its session is live. One that is made anew is another one (P6)."""
        places = await quiet_logs(a, key, 3)
        ended = list(places)[:2]
        for name in ended:
            await a.delete(name)
        for store in (a, b):
            await assert_stale(store, places | {f"{key}-never": BEGINNING}, [*ended, f"{key}-never"])
        for name in ended:
            await b.create(name, {}, lifetime=LONG)
        await assert_stale(a, places, [name for name in ended if places[name].position])

    async def test_expired_session_is_named(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`stale`, by the store's clock; and no look puts the end off."""
        await a.create(key, {}, lifetime=SHORT)

        async def is_named() -> bool:
            await clock.advance(SHORT / 10)
            return not tells_stale(b) or key in await b.stale({key: BEGINNING})

        await eventually(is_named)
        await assert_stale(a, {key: BEGINNING}, [key])

    async def test_trimmed_end_stays_the_end(self, a: Store, b: Store, key: str) -> None:
        """`stale`: whether `trim` has dropped the last entry or not. What a store no longer knows, it names."""
        await a.create(key, {}, lifetime=LONG)
        last = Batch(drafts(b"1", b"2"), stream=NEW_STREAM, terminal=True)
        await a.append(key, last)
        await b.trim(key, streams=[1])
        end = Cursor(2, last.events[-1].tag)
        await assert_stale(b, {key: Cursor(2)}, ())
        await assert_stale(b, {key: end}, (), in_doubt=[key])
        await assert_stale(b, {key: Cursor(1)}, [key])
        await a.append(key, Batch(drafts(b"3")))
        await assert_stale(b, {key: end}, [key])

    async def test_many_logs_are_told_apart(self, a: Store, b: Store, key: str) -> None:
        """`stale`, `places`: at most MAX_PLACES."""
        places = await quiet_logs(a, key, MAX_PLACES)
        stale = list(places)[::3]
        for name in stale:
            await a.append(name, Batch(drafts(b"more")))
        await assert_stale(b, places, stale)
        if tells_stale(b):
            with pytest.raises(ValueError, match=str(MAX_PLACES)):
                await b.stale(places | {key: BEGINNING})
