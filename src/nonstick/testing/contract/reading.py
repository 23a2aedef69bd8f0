"""The contract of `read` and `trim`: what a cursor gets, and what it is told when that is not there."""

from __future__ import annotations

import pytest

from nonstick.errors import Diverged, SessionNotFound, StreamClosed, Trimmed
from nonstick.store import (
    MAX_CLIP,
    MAX_READ,
    MAX_READ_BYTES,
    NEW_STREAM,
    STANDALONE,
    Appended,
    Batch,
    Cursor,
    Event,
    Store,
)
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.checks import LONG
from nonstick.testing.contract.tools import BEGINNING, drafts, open_stream, read_all, skim_all, texts


async def five_events(store: Store, key: str) -> list[Event]:
    """Creates a session with five standalone events; returns them."""
    await store.create(key, {}, lifetime=LONG)
    await store.append(key, Batch(drafts(b"1", b"2", b"3", b"4", b"5")))
    return await read_all(store, key)


class ReadContract(ContractFixtures):
    """A reader gets exactly the rest, or hears that it cannot."""

    @pytest.fixture
    async def five(self, a: Store, key: str) -> list[Event]:
        """A session under `key` with five standalone events."""
        return await five_events(a, key)

    # ---- read

    async def test_read_begins_after_its_cursor(self, b: Store, key: str, five: list[Event]) -> None:
        """`read`: committed events after `after` (exclusive), oldest first, without gaps (P3)."""
        assert texts(await read_all(b, key)) == [b"1", b"2", b"3", b"4", b"5"]
        for n, event in enumerate(five, start=1):
            assert await read_all(b, key, event.cursor) == five[n:]
            assert await read_all(b, key, Cursor(n)) == five[n:]

    async def test_read_gives_at_most_its_limit(self, b: Store, key: str, five: list[Event]) -> None:
        """`read`, `limit`: fewer may come; none come only at the end of the log."""
        for limit in (1, 2, 5, MAX_READ):
            part = await b.read(key, five[0].cursor, limit=limit)
            assert part
            assert part == five[1 : 1 + limit][: len(part)]
        assert await b.read(key, five[-1].cursor, limit=1) == []

    async def test_thousand_events_are_read_whole(self, a: Store, b: Store, key: str) -> None:
        """`read`, `limit`: 1 to MAX_READ."""
        await a.create(key, {}, lifetime=LONG)
        for start in range(0, MAX_READ + 100, 100):
            await a.append(key, Batch(drafts(*(b"%d" % n for n in range(start, start + 100)))))
        part = await b.read(key, Cursor(0), limit=MAX_READ)
        assert 1 <= len(part) <= MAX_READ
        assert texts(await read_all(b, key)) == [b"%d" % n for n in range(MAX_READ + 100)]

    async def test_read_ends_before_its_byte_bound(self, a: Store, b: Store, key: str) -> None:
        """`read`, `max_bytes`: it ends before the event with which they would be more; the first always comes (P10)."""
        sizes = (700, 300, 1, 5000, 10, 10, 0, 4000)
        await a.create(key, {}, lifetime=LONG)
        for size in sizes:
            await a.append(key, Batch(drafts(b"x" * size)))
        whole = await read_all(a, key)
        assert [len(event.data) for event in whole] == list(sizes)
        for most in (1, 20, 1000, 1001, 5000, 20_000):
            found: list[Event] = []
            after = BEGINNING
            while part := await b.read(key, after, max_bytes=most):
                assert len(part) == 1 or sum(len(event.data) for event in part) <= most
                found += part
                after = part[-1].cursor
            assert found == whole

    async def test_large_events_are_read_in_parts(self, a: Store, b: Store, key: str) -> None:
        """`MAX_READ_BYTES`: a read takes no more unless it is told, and yet gives an event that is larger (P10)."""
        size = MAX_READ_BYTES * 2 // 5
        await a.create(key, {}, lifetime=LONG)
        for n in range(5):
            await a.append(key, Batch(drafts(b"%d" % n * size)))
        await a.append(key, Batch(drafts(b"L" * (2 * MAX_READ_BYTES), b"after")))
        found: list[Event] = []
        after = BEGINNING
        while part := await b.read(key, after, limit=MAX_READ):
            assert len(part) == 1 or sum(len(event.data) for event in part) <= MAX_READ_BYTES
            found += part
            after = part[-1].cursor
        assert [len(event.data) for event in found] == [size] * 5 + [2 * MAX_READ_BYTES, 5]

    # ---- skim

    @pytest.mark.parametrize("clip", [0, 3, MAX_CLIP])
    async def test_skimmed_events_are_clipped_and_sized(self, a: Store, b: Store, key: str, clip: int) -> None:
        """`skim`: the first `clip` bytes of each event, with its size; what is no longer comes whole (P10)."""
        data = [b"", b"abc", b"abcd", b"x" * (MAX_CLIP + 1), b"y" * (2 * MAX_READ_BYTES), b"end"]
        await a.create(key, {}, lifetime=LONG)
        for one in data:
            await a.append(key, Batch(drafts(one)))
        found = await skim_all(b, key, clip=clip)
        assert [(entry.event.data, entry.size) for entry in found] == [(one[:clip], len(one)) for one in data]
        assert [entry.event.cursor for entry in found] == [event.cursor for event in await read_all(a, key)]
        assert {entry.event.stream for entry in found} == {0}

    async def test_skim_begins_after_its_cursor(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """`skim`: as `read`, also in what it raises."""
        for n, event in enumerate(five, start=1):
            assert [entry.event for entry in await skim_all(b, key, event.cursor)] == five[n:]
        part = await b.skim(key, five[0].cursor, limit=2, clip=0)
        assert 1 <= len(part) <= 2
        assert await b.skim(key, five[-1].cursor) == []
        for cursor in (Cursor(6), Cursor(2, five[0].tag)):
            with pytest.raises(Diverged):
                await b.skim(key, cursor)
        await a.trim(key, standalone_before=4)
        with pytest.raises(Trimmed) as trimmed:
            await b.skim(key, five[0].cursor)
        assert trimmed.value.oldest == 4
        await a.delete(key)
        with pytest.raises(SessionNotFound):
            await b.skim(key, Cursor(0))

    async def test_load_answers_the_logs_size(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """`Loaded.size`, `Loaded.count`: what the log holds now."""
        assert (await b.load(key))[3:] == (5, 5)
        stream = await open_stream(a, key)
        await a.append(key, Batch(drafts(b"end"), stream=stream, terminal=True))
        assert (await b.load(key))[3:] == (14, 7)
        await a.trim(key, streams=[stream], standalone_before=3)
        assert (await b.load(key))[3:] == (3, 3)

    async def test_empty_log_reads_as_empty(self, a: Store, b: Store, key: str) -> None:
        """`Cursor`: position 0 is the beginning, before any entry."""
        await a.create(key, {}, lifetime=LONG)
        assert await b.read(key, Cursor(0)) == []
        with pytest.raises(Diverged):
            await b.read(key, Cursor(1))

    async def test_cursor_beyond_the_end_has_diverged(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """Diverged: the cursor is beyond the log's end, so the store has lost what was there (P9)."""
        for cursor in (Cursor(6, b"someone?"), Cursor(6), Cursor(10**9, five[0].tag)):
            for store in (a, b):
                with pytest.raises(Diverged):
                    await store.read(key, cursor)

    async def test_cursor_with_other_tag_has_diverged(self, b: Store, key: str, five: list[Event]) -> None:
        """Diverged: the entry at the cursor carries another tag (P9)."""
        for cursor in (Cursor(3, five[1].tag), Cursor(5, bytes(8)), Cursor(1, b"someone?")):
            with pytest.raises(Diverged):
                await b.read(key, cursor)

    async def test_cursor_of_earlier_session_has_diverged(
        self, a: Store, b: Store, key: str, five: list[Event]
    ) -> None:
        """Diverged: what was read before the session was made anew is not the beginning of what is there now (P9)."""
        await a.delete(key)
        await a.create(key, {}, lifetime=LONG)
        await a.append(key, Batch(drafts(b"1", b"2", b"3", b"4", b"5", b"6")))
        with pytest.raises(Diverged):
            await b.read(key, five[2].cursor)

    # ---- trim

    async def test_trim_drops_closed_streams_whole(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """`trim` drops all of the closed `streams`, and nothing else."""
        one, two = await open_stream(a, key), await open_stream(a, key)
        for stream in (one, two, one):
            await a.append(key, Batch(drafts(b"x"), stream=stream))
        await a.append(key, Batch(drafts(b"end"), stream=one, terminal=True))
        before = await read_all(a, key)
        await b.trim(key, streams=[one])
        left = [event for event in before if event.stream != one]
        assert await read_all(a, key) == left
        assert await a.append(key, Batch(drafts(b"y"))) == Appended(len(before) + 1, False, 5 + 6 + 1 + 1, 8)

    async def test_trim_keeps_events_between_a_streams(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """`trim` drops all of the closed `streams`: not what was appended to others, or to none, meanwhile."""
        one, two = await open_stream(a, key), await open_stream(a, key)
        for stream in (one, STANDALONE, two, one, STANDALONE):
            await a.append(key, Batch(drafts(b"x"), stream=stream))
        await a.append(key, Batch(drafts(b"end"), stream=one, terminal=True))
        before = await read_all(a, key)
        await b.trim(key, streams=[one], standalone_before=3)
        kept = [event for event in before if event.stream != one and event.position not in (1, 2)]
        assert await read_all(a, key) == kept
        assert [event.stream for event in kept] == [0, 0, 0, two, 0, two, 0]

    async def test_trim_skips_open_and_unknown_streams(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """`trim`: streams that are open or unknown are passed over (P10)."""
        stream = await open_stream(a, key)
        before = await read_all(a, key)
        await b.trim(key, streams=[stream, 1, 99, 0])
        await b.trim(key)
        assert await read_all(a, key) == before
        await a.append(key, Batch(drafts(b"still open"), stream=stream))

    async def test_trim_drops_standalone_events_before_position(
        self, a: Store, b: Store, key: str, five: list[Event]
    ) -> None:
        """`trim`, `standalone_before`: exclusive; events of POST streams stay."""
        stream = await open_stream(a, key)
        await a.append(key, Batch(drafts(b"7")))
        before = await read_all(a, key)
        await b.trim(key, standalone_before=4)
        assert await read_all(b, key) == before[3:]
        await a.trim(key, standalone_before=100)
        assert await read_all(b, key) == [before[5]]
        await a.append(key, Batch(drafts(b"still open"), stream=stream))

    async def test_trimmed_positions_are_never_reused(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """`trim`: positions are never given out again, also when nothing is left."""
        await a.trim(key, standalone_before=100)
        assert await read_all(b, key) == []
        assert await b.append(key, Batch(drafts(b"6"))) == Appended(6, False, 1, 1)
        await a.trim(key, standalone_before=7)
        await a.trim(key, standalone_before=7)
        assert (await a.append(key, Batch(drafts(b"7"), stream=NEW_STREAM))).first == 7

    async def test_cursor_at_dropped_entry_is_trimmed(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """Trimmed: the entry at the cursor was dropped; `oldest` is the first position that is left, 0 if none is."""
        await a.trim(key, standalone_before=4)
        for event in five[:3]:
            with pytest.raises(Trimmed) as trimmed:
                await b.read(key, event.cursor)
            assert trimmed.value.oldest == 4
        assert await read_all(b, key, five[3].cursor) == five[4:]
        await a.trim(key, standalone_before=6)
        with pytest.raises(Trimmed) as trimmed:
            await b.read(key, five[3].cursor)
        assert trimmed.value.oldest == 0

    async def test_untagged_cursor_reads_past_trimmed_entries(
        self, a: Store, b: Store, key: str, five: list[Event]
    ) -> None:
        """Trimmed is not raised for a cursor without a tag, which reads on from the next entry that is left."""
        await a.trim(key, standalone_before=4)
        for position in (0, 1, 3):
            assert await read_all(b, key, Cursor(position)) == five[3:]
        await a.trim(key, standalone_before=6)
        assert await b.read(key, Cursor(5)) == []
        with pytest.raises(Diverged):
            await b.read(key, Cursor(6))

    async def test_read_passes_over_dropped_stream(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """`read`: without gaps but for what `trim` took out (P3)."""
        opened = await a.append(key, Batch(drafts(b"x", b"x", b"x"), stream=NEW_STREAM, terminal=True))
        await a.append(key, Batch(drafts(b"after")))
        await b.trim(key, streams=[opened.first])
        for limit in (1, 2, MAX_READ):
            part = await b.read(key, five[-1].cursor, limit=limit)
            assert texts(part) == [b"after"]
        assert (await b.load(key)).head == part[-1].cursor

    async def test_head_outlives_its_trimmed_entry(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """`Loaded.head`: if `trim` has dropped the entry since, the position is still its."""
        last = Batch(drafts(b"x", b"x"), stream=NEW_STREAM, terminal=True)
        opened = await a.append(key, last)
        await b.trim(key, streams=[opened.first])
        for before in (0, 100):
            await a.trim(key, standalone_before=before)
            head = (await b.load(key)).head
            assert head in (Cursor(7, last.events[-1].tag), Cursor(7))
            assert await b.read(key, Cursor(head.position)) == []
        assert await a.append(key, Batch((), fields={"x": b"1"})) == Appended(7, False, 0, 0)
        await a.append(key, Batch(drafts(b"later")))
        assert texts(await read_all(b, key, Cursor(head.position))) == [b"later"]

    async def test_trimmed_stream_keeps_its_writer_known(self, a: Store, b: Store, key: str, five: list[Event]) -> None:
        """A duplicate stays one within WRITER_SECONDS, whatever has happened to the stream since."""
        opened = await a.append(key, Batch(drafts(b"x"), stream=NEW_STREAM, writer="w", sequence=1))
        last = Batch(drafts(b"end"), stream=opened.first, writer="w", sequence=2, terminal=True)
        await a.append(key, last)
        await b.trim(key, streams=[opened.first])
        assert await a.append(key, last) == Appended(7, True, 5, 5)
        with pytest.raises(StreamClosed):
            await b.append(key, Batch(drafts(b"late"), stream=opened.first))
