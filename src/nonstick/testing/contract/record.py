"""The contract of the session record: create, load, update, touch, delete, expiry, and the store itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import anyio.to_thread
import pytest

from nonstick.errors import AlreadyExists, NotPending, SessionNotFound, StreamClosed, TooManySessions
from nonstick.store import CANCEL_SECONDS, FRESH_SHARE, MAX_CANCELS, Batch, Cursor, Loaded, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.tools import Clock, drafts, eventually, gone_at, open_stream, read_all, texts

LONG = 600.0
"""Lifetime of sessions that must not expire during a test, seconds."""

SHORT = 0.8
"""Lifetime of those that must."""

NOISE = 0.01
"""How far the store's clock and ours may differ over a second, seconds."""


class RecordContract(ContractFixtures):
    """A session is there, whole, for as long as it was promised, and then it is not."""

    # ---- create

    async def test_created_session_is_whole_on_another_node(self, a: Store, b: Store, key: str) -> None:
        """`create`: makes the session visible, with these fields (P1, P2)."""
        fields = {"one": b"1", "two": b""}
        await a.create(key, fields, lifetime=LONG)
        loaded = await b.load(key)
        assert loaded.fields == fields
        assert loaded.head == Cursor(0)
        assert loaded.cancels == frozenset()

    async def test_second_create_finds_the_session_and_changes_nothing(self, a: Store, b: Store, key: str) -> None:
        """`create`: AlreadyExists. A repeated create gets it too."""
        await a.create(key, {"by": b"a"}, lifetime=LONG)
        with pytest.raises(AlreadyExists):
            await b.create(key, {"by": b"b"}, lifetime=LONG)
        assert (await b.load(key)).fields == {"by": b"a"}

    async def test_repeated_create_in_its_own_full_group_says_that_it_exists(self, a: Store, key: str) -> None:
        """`create`: every write may be repeated as it was, which is how a lost outcome is learned."""
        await a.create(key, {}, lifetime=LONG, limits={f"g{key}": 1})
        with pytest.raises(AlreadyExists):
            await a.create(key, {}, lifetime=LONG, limits={f"g{key}": 1})

    async def test_full_group_refuses_and_nothing_is_evicted(self, a: Store, b: Store, key: str) -> None:
        """`create`: TooManySessions names the group; nothing is evicted for it (P10)."""
        full, roomy = f"full {key}", f"roomy {key}"
        await a.create(f"{key}1", {}, lifetime=LONG, limits={full: 2})
        await b.create(f"{key}2", {}, lifetime=LONG, limits={full: 2})
        with pytest.raises(TooManySessions) as refused:
            await a.create(f"{key}3", {}, lifetime=LONG, limits={roomy: 1, full: 2})
        assert refused.value.group == full
        with pytest.raises(SessionNotFound):
            await a.load(f"{key}3")
        await a.load(f"{key}1")
        await a.load(f"{key}2")
        # The refused one counts nowhere.
        await a.create(f"{key}4", {}, lifetime=LONG, limits={roomy: 1})

    async def test_ended_session_makes_room_in_its_group(self, a: Store, b: Store, key: str) -> None:
        """`create`: a limit counts live sessions, those that end and those that expire no more."""
        group = "g" * 64 + key
        await a.create(f"{key}1", {}, lifetime=LONG, limits={group: 1})
        await b.delete(f"{key}1")
        await a.create(f"{key}2", {}, lifetime=LONG, limits={group: 1})
        with pytest.raises(TooManySessions):
            await a.create(f"{key}3", {}, lifetime=LONG, limits={group: 1})

    async def test_expired_session_makes_room_in_its_group(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`create`: a limit counts live sessions, and the store's clock decides which those are."""
        await a.create(f"{key}1", {}, lifetime=SHORT, limits={f"g{key}": 1})
        await gone_at(b, f"{key}1", clock)
        await b.create(f"{key}2", {}, lifetime=LONG, limits={f"g{key}": 1})

    async def test_record_keeps_any_bytes_under_any_visible_name(self, a: Store, b: Store, key: str) -> None:
        """`create`: names are visible ASCII, at most 512 characters; values any bytes. Keys are visible ASCII to 64."""
        visible = "".join(chr(code) for code in range(33, 127))
        odd = (key + visible[::-1])[:64]
        fields = {(visible * 6)[:512]: bytes(range(256)), "nul": b"\0\r\n\0", "large": b"\xff\x00" * 131072}
        await a.create(odd, fields, lifetime=LONG)
        assert (await b.load(odd)).fields == fields
        assert await b.update(odd, {"large": b"\0"}, expect={"large": fields["large"]})
        assert (await a.load(odd)).fields == fields | {"large": b"\0"}

    # ---- update

    async def test_update_sets_and_removes_fields(self, a: Store, b: Store, key: str) -> None:
        """`update`: sets fields, or with None removes them."""
        await a.create(key, {"keep": b"k", "change": b"1", "go": b"g"}, lifetime=LONG)
        assert await b.update(key, {"change": b"2", "go": None, "new": b"n", "never": None})
        assert (await a.load(key)).fields == {"keep": b"k", "change": b"2", "new": b"n"}

    async def test_update_that_expects_other_values_changes_nothing(self, a: Store, b: Store, key: str) -> None:
        """`update`: False means that `expect` did not hold, for any one field, and nothing changed."""
        await a.create(key, {"x": b"1", "empty": b""}, lifetime=LONG)
        for wrong in ({"x": b"2"}, {"x": None}, {"y": b"1"}, {"x": b"1", "y": b""}, {"empty": None}, {"y": b""}):
            assert not await b.update(key, {"x": b"9", "z": b"9"}, expect=dict(wrong)), wrong
        assert (await a.load(key)).fields == {"x": b"1", "empty": b""}

    async def test_update_that_expects_what_is_there_is_written(self, a: Store, b: Store, key: str) -> None:
        """`update`: if every field in `expect` has that value (None: is absent)."""
        await a.create(key, {"x": b"1", "empty": b""}, lifetime=LONG)
        assert await b.update(key, {"y": b"2"}, expect={"x": b"1", "y": None, "empty": b""})
        assert (await a.load(key)).fields == {"x": b"1", "empty": b"", "y": b"2"}

    async def test_update_never_brings_a_session_back(self, a: Store, b: Store, key: str) -> None:
        """`update`: SessionNotFound, for one that ended and for one that never was (P6)."""
        with pytest.raises(SessionNotFound):
            await a.update(key, {"x": b"1"})
        await a.create(key, {"x": b"1"}, lifetime=LONG)
        await a.delete(key)
        for expect in (None, {"x": b"1"}, {"x": None}):
            with pytest.raises(SessionNotFound):
                await b.update(key, {"x": b"2"}, expect=expect)
        with pytest.raises(SessionNotFound):
            await a.load(key)

    async def test_of_racing_updates_each_that_succeeds_counts(self, a: Store, b: Store, key: str) -> None:
        """`update` is atomic: compare-and-set over two nodes loses no increment."""
        await a.create(key, {"n": b"0"}, lifetime=LONG)

        async def increment(store: Store) -> None:
            done = False
            while not done:
                now = (await store.load(key)).fields["n"]
                done = await store.update(key, {"n": b"%d" % (int(now) + 1)}, expect={"n": now})

        await asyncio.gather(*(increment(store) for store in (a, b) * 5))
        assert (await a.load(key)).fields["n"] == b"10"

    # ---- delete

    async def test_deleted_session_is_gone_on_every_node_for_every_method(self, a: Store, b: Store, key: str) -> None:
        """`delete`: from then on every method answers SessionNotFound for this key, on every node (P6)."""
        await a.create(key, {"x": b"1"}, lifetime=LONG)
        stream = await open_stream(b, key)
        head = (await b.load(key)).head
        assert await a.delete(key)
        for store in (b, a):
            await self.assert_gone(store, key, stream, head)

    async def test_only_the_first_delete_says_that_the_session_was_live(self, a: Store, b: Store, key: str) -> None:
        """`delete` returns whether it was live, and may be repeated."""
        assert not await a.delete(key)
        await a.create(key, {}, lifetime=LONG)
        assert sorted(await asyncio.gather(a.delete(key), b.delete(key))) == [False, True]
        assert not await b.delete(key)

    async def test_session_created_anew_starts_clean(self, a: Store, b: Store, key: str) -> None:
        """`delete` ends the session: record, log and all. Nothing of it is found under the same key later."""
        await a.create(key, {"old": b"1"}, lifetime=LONG)
        stream = await open_stream(a, key)
        old = await _fill(a, key)
        await a.delete(key)
        await b.create(key, {"new": b"1"}, lifetime=LONG)
        assert await b.load(key) == Loaded({"new": b"1"}, Cursor(0), frozenset())
        assert await b.read(key, Cursor(0)) == []
        with pytest.raises(StreamClosed):
            await a.append(key, Batch(drafts(b"x"), stream=stream))
        with pytest.raises(NotPending):
            await a.append(key, Batch(drafts(b"x"), settle="pending"))
        again = await a.append(key, old)
        assert (again.first, again.duplicate, again.count, again.size) == (1, False, 1, 3)

    # ---- expiry

    async def test_session_lives_its_lifetime_and_no_longer(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`create`: visible for `lifetime` seconds from now, by the store's clock; then as if it had never been."""
        before = clock.now()
        await a.create(key, {"x": b"1"}, lifetime=SHORT)
        created = clock.now()
        alive, gone = await gone_at(b, key, clock)
        assert gone >= before + SHORT - NOISE
        assert alive <= created + SHORT + NOISE
        await self.assert_gone(b, key, 1, Cursor(1, bytes(8)))
        assert not await a.delete(key)

    async def test_expired_session_leaves_nothing_to_the_next(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """An expired session is indistinguishable from one that never existed."""
        await a.create(key, {"old": b"1"}, lifetime=SHORT)
        old = await _fill(a, key)
        await gone_at(b, key, clock)
        await b.create(key, {"new": b"1"}, lifetime=LONG)
        assert await a.load(key) == Loaded({"new": b"1"}, Cursor(0), frozenset())
        with pytest.raises(NotPending):
            await a.append(key, Batch(drafts(b"x"), answers="pending"))
        again = await b.append(key, old)
        assert (again.first, again.duplicate) == (1, False)

    async def test_load_renews_a_lifetime_of_which_more_than_the_share_has_passed(
        self, a: Store, b: Store, key: str, clock: Clock
    ) -> None:
        """`load` renews when more than FRESH_SHARE of the lifetime has passed since the last renewal."""
        renewed = await self.after_half_a_life(a, key, clock, lambda: b.load(key))
        _, gone = await gone_at(b, key, clock)
        assert gone >= renewed + SHORT - NOISE

    async def test_load_that_is_not_to_renew_leaves_the_expiry_where_it_was(
        self, a: Store, b: Store, key: str, clock: Clock
    ) -> None:
        """`load`: what the client has no part in does not keep its session."""
        await a.create(key, {"x": b"1"}, lifetime=SHORT)
        created = clock.now()
        await clock.advance(SHORT / 2)
        assert (await b.load(key, renew=False)).fields == {"x": b"1"}
        alive, _ = await gone_at(b, key, clock)
        assert alive <= created + SHORT + NOISE

    async def test_touch_renews_the_live_and_passes_over_the_others(
        self, a: Store, b: Store, key: str, clock: Clock
    ) -> None:
        """`touch` renews the expiry of those of these sessions that are live; the others are passed over."""
        await b.create(f"{key}ended", {}, lifetime=LONG)
        await b.delete(f"{key}ended")
        await b.touch([])
        renewed = await self.after_half_a_life(a, key, clock, lambda: b.touch({f"{key}never", key, f"{key}ended"}))
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

    async def test_update_that_writes_nothing_or_names_no_lifetime_renews_nothing(
        self, a: Store, b: Store, key: str, clock: Clock
    ) -> None:
        """`update`: without `lifetime`, or where `expect` does not hold, the expiry stays where it was."""
        await a.create(key, {}, lifetime=SHORT)
        created = clock.now()
        await clock.advance(SHORT / 2)
        assert await b.update(key, {"x": b"1"})
        assert not await b.update(key, {"x": b"2"}, expect={"x": b"3"}, lifetime=LONG)
        alive, _ = await gone_at(b, key, clock)
        assert alive <= created + SHORT + NOISE

    async def test_load_of_a_fresh_session_writes_nothing(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`load` writes nothing before FRESH_SHARE of the lifetime has passed: the expiry stays where it was."""
        for attempt in range(8):
            name = f"{key}{attempt}"
            await a.create(name, {}, lifetime=SHORT)
            created = clock.now()
            await clock.advance(SHORT * FRESH_SHARE * 0.7)
            asked = clock.now()
            await b.load(name)
            if clock.now() - created > SHORT * FRESH_SHARE * 0.95:
                continue  # this machine stalled: no longer fresh
            alive, gone = await gone_at(b, name, clock, step=0.004)
            assert alive <= created + SHORT + NOISE, "the load has renewed it"
            if gone < asked + SHORT:
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
            await a.append(key, Batch(drafts(b"x"), cancel="again"))
        kept = (await b.load(key)).cancels
        assert len(kept) == MAX_CANCELS
        # Where the store's clock ticks slowly, a few of the oldest are equally old.
        assert kept >= {"again", *(f"r{number}" for number in range(2 * extra, MAX_CANCELS + extra))}
        assert kept.isdisjoint(f"r{number}" for number in range(extra // 2))

    # ---- nodes and the store itself

    async def test_lease_holds_until_it_lapses_by_the_stores_clock(
        self, a: Store, b: Store, key: str, clock: Clock
    ) -> None:
        """`lapsed`: nodes whose lease has run out, or that never had one (P7)."""
        long, short, never = f"{key}-long", f"{key}-short", f"{key}-never"
        lease = a.lease(long)
        brief = a.lease(short)
        try:
            await anyio.to_thread.run_sync(lease.renew, 60.0)
            await anyio.to_thread.run_sync(brief.renew, 0.05)

            async def lapsed() -> bool:
                await clock.advance(0.01)
                return await b.lapsed([long, short, never]) == {short, never}

            await eventually(lapsed)
            await anyio.to_thread.run_sync(brief.renew, 60.0)
            assert await b.lapsed([long, short, never]) == {never}
            assert await b.lapsed([]) == set()
        finally:
            await anyio.to_thread.run_sync(lambda: lease.close(release=True))
            await anyio.to_thread.run_sync(lambda: brief.close(release=True))

    async def test_released_lease_has_lapsed_and_a_closed_one_runs_on(self, a: Store, b: Store, key: str) -> None:
        """`Lease.close`: with `release` ends the lease first; without, it holds for what was granted."""
        released, left = a.lease(f"{key}1"), a.lease(f"{key}2")
        for lease in (released, left):
            await anyio.to_thread.run_sync(lease.renew, 60.0)
        await anyio.to_thread.run_sync(lambda: released.close(release=True))
        await anyio.to_thread.run_sync(lambda: left.close(release=False))
        assert await b.lapsed([f"{key}1", f"{key}2"]) == {f"{key}1"}

    async def test_lease_that_was_never_renewed_can_be_closed(self, a: Store, key: str) -> None:
        """`lease` does not connect yet; `Lease.close` never raises."""
        for release in (True, False):
            await anyio.to_thread.run_sync(lambda release: a.lease(key).close(release=release), release)
        assert await a.lapsed({key}) == {key}

    async def test_lease_is_renewed_while_the_event_loop_stands_still(self, a: Store, key: str) -> None:
        """`Lease`: shares nothing with the event loop, so a node with a blocking tool stays alive (P7)."""
        lease = a.lease(key)
        try:
            thread = threading.Thread(target=lease.renew, args=(60.0,))
            thread.start()
            thread.join(10)  # blocks the event loop, on purpose
            assert not thread.is_alive()
            assert await a.lapsed({key}) == set()
        finally:
            await anyio.to_thread.run_sync(lambda: lease.close(release=True))

    async def test_store_answers_a_ping_and_names_itself(self, a: Store) -> None:
        """`ping` is one round trip; `url` is fit for logs."""
        await a.ping()
        assert a.url
        assert a.url.isprintable()

    async def test_cancelled_call_disturbs_no_other(self, a: Store, key: str) -> None:
        """A cancelled call must not disturb any other call: each still gets its own answer."""
        await asyncio.gather(*(a.create(f"{key}{n}", {"n": b"%d" % n}, lifetime=LONG) for n in range(8)))
        for spared in range(40):
            calls = [asyncio.ensure_future(a.load(f"{key}{n % 8}")) for n in range(24)]
            for _ in range(spared % 5):
                await asyncio.sleep(0)
            for n, call in enumerate(calls):
                if n % 3 != spared % 3:
                    call.cancel()
            for n, answer in enumerate(await asyncio.gather(*calls, return_exceptions=True)):
                if isinstance(answer, BaseException):
                    assert isinstance(answer, asyncio.CancelledError)
                    assert n % 3 != spared % 3
                else:
                    assert answer.fields == {"n": b"%d" % (n % 8)}

    # ---- parts of the above

    async def assert_gone(self, store: Store, key: str, stream: int, head: Cursor) -> None:
        """Every method that can say so says SessionNotFound; those that pass over, pass over; nothing comes back."""
        refused = (
            lambda: store.load(key),
            lambda: store.update(key, {"x": b"2"}),
            lambda: store.append(key, Batch(drafts(b"late"))),
            lambda: store.append(key, Batch(drafts(b"late"), stream=stream, terminal=True)),
            lambda: store.append(key, Batch((), fields={"x": b"2"})),
            lambda: store.append(key, Batch((), settle="pending")),
            lambda: store.read(key, Cursor(0)),
            lambda: store.read(key, head),
        )
        await store.touch([key])
        await store.trim(key, streams=[stream], standalone_before=100)
        for call in refused:
            with pytest.raises(SessionNotFound):
                await call()

    async def after_half_a_life(
        self, store: Store, key: str, clock: Clock, renew: Callable[[], Awaitable[object]]
    ) -> float:
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


async def _fill(store: Store, key: str) -> Batch:
    """Leaves something of every kind in the session; returns a batch that it knows by its writer and sequence."""
    batch = Batch(drafts(b"old"), writer="w", sequence=1, cancel="r", expect=["pending"], fields={"more": b"1"})
    await store.append(key, batch)
    assert texts(await read_all(store, key))[-1:] == [b"old"]
    return Batch(batch.events, writer="w", sequence=1)
