"""The contract of the session record: create, update, delete."""

from __future__ import annotations

import asyncio

import pytest

from nonstick.errors import AlreadyExists, NotPending, SessionNotFound, StreamClosed, TooManySessions
from nonstick.store import Batch, Cursor, Loaded, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.checks import LONG, SHORT, assert_gone, leave_of_everything
from nonstick.testing.contract.tools import Clock, drafts, eventually, gone_at, open_stream

__all__ = ["RecordContract"]


class RecordContract(ContractFixtures):
    """A session is there, whole, until it is ended, and then nothing of it is."""

    # ---- create

    async def test_created_session_is_whole_elsewhere(self, a: Store, b: Store, key: str) -> None:
        """`create`: makes the session visible, with these fields (P1, P2)."""
        fields = {"one": b"1", "two": b""}
        await a.create(key, fields, lifetime=LONG)
        loaded = await b.load(key)
        assert loaded.fields == fields
        assert loaded.head == Cursor(0)
        assert loaded.cancels == frozenset()

    async def test_second_create_changes_nothing(self, a: Store, b: Store, key: str) -> None:
        """`create`: AlreadyExists. A repeated create gets it too."""
        await a.create(key, {"by": b"a"}, lifetime=LONG)
        with pytest.raises(AlreadyExists):
            await b.create(key, {"by": b"b"}, lifetime=LONG)
        assert (await b.load(key)).fields == {"by": b"a"}

    async def test_repeated_create_in_full_group_exists(self, a: Store, key: str) -> None:
        """`create`: every write may be repeated as it was, which is how a lost outcome is learned."""
        await a.create(key, {}, lifetime=LONG, limits={f"g{key}": 1})
        with pytest.raises(AlreadyExists):
            await a.create(key, {}, lifetime=LONG, limits={f"g{key}": 1})

    async def test_full_group_refuses_and_evicts_nothing(self, a: Store, b: Store, key: str) -> None:
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

    async def test_ended_session_leaves_its_group(self, a: Store, b: Store, key: str) -> None:
        """`create`: a limit counts live sessions, those that end and those that expire no more."""
        group = "g" * 64 + key
        await a.create(f"{key}1", {}, lifetime=LONG, limits={group: 1})
        await b.delete(f"{key}1")
        await a.create(f"{key}2", {}, lifetime=LONG, limits={group: 1})
        with pytest.raises(TooManySessions):
            await a.create(f"{key}3", {}, lifetime=LONG, limits={group: 1})

    async def test_expired_session_leaves_its_group(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`create`: a limit counts live sessions, and the store's clock decides which those are."""
        await a.create(f"{key}1", {}, lifetime=SHORT, limits={f"g{key}": 1})
        await gone_at(b, f"{key}1", clock)

        async def admitted() -> bool:
            # Where groups lie on another server than their sessions, they hear of each renewal a little later.
            try:
                await b.create(f"{key}2", {}, lifetime=LONG, limits={f"g{key}": 1})
            except TooManySessions:
                await clock.advance(0.01)
                return False
            return True

        await eventually(admitted)

    async def test_record_keeps_any_bytes_and_names(self, a: Store, b: Store, key: str) -> None:
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

    async def test_update_expecting_other_values_changes_nothing(self, a: Store, b: Store, key: str) -> None:
        """`update`: False means that `expect` did not hold, for any one field, and nothing changed."""
        await a.create(key, {"x": b"1", "empty": b""}, lifetime=LONG)
        for wrong in ({"x": b"2"}, {"x": None}, {"y": b"1"}, {"x": b"1", "y": b""}, {"empty": None}, {"y": b""}):
            assert not await b.update(key, {"x": b"9", "z": b"9"}, expect=dict(wrong)), wrong
        assert (await a.load(key)).fields == {"x": b"1", "empty": b""}

    async def test_update_expecting_present_values_is_written(self, a: Store, b: Store, key: str) -> None:
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

    async def test_racing_updates_lose_no_increment(self, a: Store, b: Store, key: str) -> None:
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

    async def test_deleted_session_is_gone_everywhere(self, a: Store, b: Store, key: str) -> None:
        """`delete`: from then on every method answers SessionNotFound for this key, on every node (P6)."""
        await a.create(key, {"x": b"1"}, lifetime=LONG)
        stream = await open_stream(b, key)
        head = (await b.load(key)).head
        assert await a.delete(key)
        for store in (b, a):
            await assert_gone(store, key, stream, head)

    async def test_only_first_delete_answers_true(self, a: Store, b: Store, key: str) -> None:
        """`delete` returns whether it was live, and may be repeated."""
        assert not await a.delete(key)
        await a.create(key, {}, lifetime=LONG)
        assert sorted(await asyncio.gather(a.delete(key), b.delete(key))) == [False, True]
        assert not await b.delete(key)

    async def test_session_created_anew_starts_clean(self, a: Store, b: Store, key: str) -> None:
        """`delete` ends the session: record, log and all. Nothing of it is found under the same key later."""
        await a.create(key, {"old": b"1"}, lifetime=LONG)
        stream = await open_stream(a, key)
        old = await leave_of_everything(a, key)
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
