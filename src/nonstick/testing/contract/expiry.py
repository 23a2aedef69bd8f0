"""The contract of expiry, by the store's clock: of sessions, and of the cancels in their records."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from nonstick.errors import NotPending, SessionNotFound, TooManySessions
from nonstick.store import CANCEL_SECONDS, FRESH_SHARE, MAX_CANCELS, Batch, Cursor, Loaded, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.checks import LONG, SHORT, assert_gone, leave_of_everything
from nonstick.testing.contract.tools import Clock, drafts, gone_at

__all__ = ["ExpiryContract"]

NOISE = 0.01
"""How far the store's clock and ours may differ over a second, seconds."""


class ExpiryContract(ContractFixtures):
    """A session is there for as long as it was promised, and no longer."""

    async def test_session_lives_exactly_its_lifetime(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`create`: visible for `lifetime` seconds from now, by the store's clock; then as if it had never been."""
        before = clock.now()
        await a.create(key, {"x": b"1"}, lifetime=SHORT)
        created = clock.now()
        alive, gone = await gone_at(b, key, clock)
        assert gone >= before + SHORT - NOISE
        assert alive <= created + SHORT + NOISE
        await assert_gone(b, key, 1, Cursor(1, bytes(8)))
        assert not await a.delete(key)

    async def test_expired_session_leaves_nothing_behind(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """An expired session is indistinguishable from one that never existed."""
        await a.create(key, {"old": b"1"}, lifetime=SHORT)
        old = await leave_of_everything(a, key)
        await gone_at(b, key, clock)
        await b.create(key, {"new": b"1"}, lifetime=LONG)
        assert await a.load(key) == Loaded({"new": b"1"}, Cursor(0), frozenset())
        with pytest.raises(NotPending):
            await a.append(key, Batch(drafts(b"x"), answers="pending"))
        again = await b.append(key, old)
        assert (again.first, again.duplicate) == (1, False)

    async def test_load_renews_a_session_not_fresh(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`load` renews when more than FRESH_SHARE of the lifetime has passed since the last renewal."""
        renewed = await _after_half_a_life(a, key, clock, lambda: b.load(key))
        _, gone = await gone_at(b, key, clock)
        assert gone >= renewed + SHORT - NOISE

    async def test_load_without_renewal_leaves_the_expiry(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`load`: what the client has no part in does not keep its session."""
        await a.create(key, {"x": b"1"}, lifetime=SHORT)
        created = clock.now()
        await clock.advance(SHORT / 2)
        assert (await b.load(key, renew=False)).fields == {"x": b"1"}
        alive, _ = await gone_at(b, key, clock)
        assert alive <= created + SHORT + NOISE

    async def test_touch_renews_live_sessions_only(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`touch` renews the expiry of those of these sessions that are live; the others are passed over."""
        await b.create(f"{key}ended", {}, lifetime=LONG)
        await b.delete(f"{key}ended")
        await b.touch([])
        renewed = await _after_half_a_life(a, key, clock, lambda: b.touch({f"{key}never", key, f"{key}ended"}))
        _, gone = await gone_at(b, key, clock)
        assert gone >= renewed + SHORT - NOISE
        for other in (f"{key}never", f"{key}ended"):
            with pytest.raises(SessionNotFound):
                await b.load(other)

    async def test_update_lengthens_the_lifetime_for_good(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`update`: a lifetime is granted in the same step, and at every touch from then on."""
        await a.create(key, {}, lifetime=SHORT, limits={f"g{key}": 1})
        assert await b.update(key, {"x": b"1"}, lifetime=2 * SHORT)
        await clock.advance(1.2 * SHORT)
        renewed = clock.now()
        assert (await a.load(key)).fields == {"x": b"1"}
        with pytest.raises(TooManySessions):
            await a.create(f"{key}2", {}, lifetime=LONG, limits={f"g{key}": 1})
        _, gone = await gone_at(b, key, clock)
        assert gone >= renewed + 2 * SHORT - NOISE

    async def test_update_without_lifetime_renews_nothing(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`update`: without `lifetime`, or where `expect` does not hold, the expiry stays where it was."""
        await a.create(key, {}, lifetime=SHORT)
        created = clock.now()
        await clock.advance(SHORT / 2)
        assert await b.update(key, {"x": b"1"})
        assert not await b.update(key, {"x": b"2"}, expect={"x": b"3"}, lifetime=LONG)
        alive, _ = await gone_at(b, key, clock)
        assert alive <= created + SHORT + NOISE

    async def test_load_of_fresh_session_writes_nothing(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`load` writes nothing before FRESH_SHARE of the lifetime has passed: the expiry stays where it was."""
        for attempt in range(8):
            # Where this machine stalls for longer than a session is fresh, the next one is fresh for twice as long.
            name, lifetime = f"{key}{attempt}", SHORT * 2**attempt
            await a.create(name, {}, lifetime=lifetime)
            created = clock.now()
            await clock.advance(lifetime * FRESH_SHARE * 0.7)
            asked = clock.now()
            await b.load(name)
            if clock.now() - created > lifetime * FRESH_SHARE * 0.95:
                continue
            alive, gone = await gone_at(b, name, clock, step=0.004)
            assert alive <= created + lifetime + NOISE * 2**attempt, "the load has renewed it"
            if gone < asked + lifetime:
                return
        raise AssertionError("the machine was too busy to tell a renewal from none")

    async def test_cancel_is_forgotten_after_a_minute(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`Loaded.cancels`: those left within the last CANCEL_SECONDS."""
        if not clock.exact:
            pytest.skip("would take a minute of the real clock")
        await a.create(key, {}, lifetime=LONG)
        await a.append(key, Batch(drafts(b"x"), cancel="r1"))
        await clock.advance(CANCEL_SECONDS / 2)
        await a.append(key, Batch(drafts(b"x"), cancel="r2"))
        await clock.advance(CANCEL_SECONDS / 2 - 1)
        assert (await b.load(key)).cancels == {"r1", "r2"}
        await clock.advance(2)
        assert (await b.load(key)).cancels == {"r2"}

    async def test_record_keeps_the_latest_cancels_only(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`Batch.cancel`: beyond MAX_CANCELS the oldest are dropped; one that is left again is new again (P10)."""
        await a.create(key, {}, lifetime=LONG)
        extra = 30
        for number in range(MAX_CANCELS + extra):
            if clock.exact:
                await clock.advance(0.01)
            await a.append(key, Batch(drafts(b"x"), cancel=f"r{number}"))
            if number in (0, 80):
                await a.append(key, Batch(drafts(b"x"), cancel="again"))
        kept = (await b.load(key)).cancels
        assert len(kept) == MAX_CANCELS
        # Where the store's clock ticks slowly, a few of the oldest are equally old.
        assert kept >= {"again", *(f"r{number}" for number in range(2 * extra, MAX_CANCELS + extra))}
        assert kept.isdisjoint(f"r{number}" for number in range(extra // 2))


async def _after_half_a_life(store: Store, key: str, clock: Clock, renew: Callable[[], Awaitable[object]]) -> float:
    """Creates the session, waits for half of its life, renews it; returns when. Again if the machine stalled."""
    for _ in range(5):
        await store.create(key, {}, lifetime=SHORT)
        created = clock.now()
        await clock.advance(SHORT / 2)
        renewed = clock.now()
        try:
            await renew()
            if clock.now() < created + SHORT - NOISE:
                return renewed
        except SessionNotFound:
            assert clock.now() >= created + SHORT - NOISE
        await store.delete(key)
    raise AssertionError("the machine was too busy to renew a session in time")
