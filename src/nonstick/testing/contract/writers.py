"""The contract of `append` about its writers: what was written before is not written again."""

from __future__ import annotations

import pytest

from nonstick.errors import Diverged, NotPending
from nonstick.store import NEW_STREAM, WRITER_SECONDS, Appended, Batch, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.checks import LONG
from nonstick.testing.contract.tools import Clock, drafts, read_all, texts


class WriterContract(ContractFixtures):
    """A writer that repeats an append, or has lost one, learns it."""

    async def test_repeated_append_is_written_once(self, a: Store, b: Store, log: str) -> None:
        """A (writer, sequence) that was written before is a duplicate: it answers the positions from then."""
        batch = Batch(drafts(b"1", b"2"), writer="w", sequence=1)
        assert await a.append(log, batch) == Appended(1, False, 2, 2)
        for store in (a, b, a):
            assert await store.append(log, batch) == Appended(1, True, 2, 2)
        assert texts(await read_all(a, log)) == [b"1", b"2"]

    async def test_repeated_append_is_known_behind_others(self, a: Store, b: Store, log: str) -> None:
        """`Appended.first` of a duplicate is from then, `size` and `count` are from now."""
        mine = Batch(drafts(b"mine"), writer="w", sequence=1)
        await a.append(log, Batch(drafts(b"0")))
        await a.append(log, mine)
        await b.append(log, Batch(drafts(b"other"), writer="v", sequence=1))
        await b.append(log, Batch(drafts(b"none")))
        assert await b.append(log, mine) == Appended(2, True, 14, 4)
        assert texts(await read_all(a, log)) == [b"0", b"mine", b"other", b"none"]

    async def test_writer_goes_on_after_a_repeat(self, a: Store, b: Store, log: str) -> None:
        """`Batch.sequence`: one more for each append; what was written before stays written once."""
        batches = [Batch(drafts(b"%d" % n), writer="w", sequence=n) for n in range(1, 6)]
        for n, batch in enumerate(batches):
            assert not (await a.append(log, batch)).duplicate
            assert await b.append(log, batch) == (n + 1, True, n + 1, n + 1)
        assert texts(await read_all(a, log)) == [b"1", b"2", b"3", b"4", b"5"]

    async def test_late_repeat_is_not_written_again(self, a: Store, b: Store, log: str) -> None:
        """A (writer, sequence) written before is a duplicate, also when the writer has gone on since."""
        batches = [Batch(drafts(b"%d" % n), writer="w", sequence=n) for n in (1, 2, 3)]
        for batch in batches:
            await a.append(log, batch)
        for batch in batches:
            assert (await b.append(log, batch)).duplicate
        assert texts(await read_all(a, log)) == [b"1", b"2", b"3"]

    async def test_other_writers_lower_number_is_written(self, a: Store, b: Store, log: str) -> None:
        """Each writer is numbered by its own sequence: a retried lower number of one is not another's duplicate."""
        for n in range(1, 6):
            await a.append(log, Batch(drafts(b"v%d" % n), writer="v", sequence=n))
        for n in range(1, 4):
            answer = await b.append(log, Batch(drafts(b"w%d" % n), writer="w", sequence=n))
            assert (answer.first, answer.duplicate) == (5 + n, False)
        assert texts(await read_all(a, log))[5:] == [b"w1", b"w2", b"w3"]

    async def test_writers_of_two_sessions_are_strangers(self, a: Store, b: Store, log: str) -> None:
        """A writer belongs to its session (P3: never an event of another session)."""
        await a.create(f"{log}2", {}, lifetime=LONG)
        batch = Batch(drafts(b"x"), writer="w", sequence=1)
        await a.append(log, batch)
        assert await b.append(f"{log}2", batch) == Appended(1, False, 1, 1)

    async def test_batch_without_writer_is_always_written(self, a: Store, log: str) -> None:
        """`Batch.writer`: "" is for a batch that may harmlessly be written twice."""
        batch = Batch(drafts(b"x"), sequence=1)
        assert [(await a.append(log, batch)).first for _ in range(3)] == [1, 2, 3]

    async def test_repeated_refusal_is_judged_anew(self, a: Store, b: Store, log: str) -> None:
        """Only what was written is a duplicate; a refusal writes nothing, not even its number."""
        batch = Batch(drafts(b"x"), writer="w", sequence=1, answers="q")
        for store in (a, b):
            with pytest.raises(NotPending):
                await store.append(log, batch)
        await a.append(log, Batch(drafts(b"ask"), expect=["q"]))
        assert (await a.append(log, batch)).first == 2
        assert (await b.append(log, batch)).duplicate

    async def test_writer_goes_on_after_a_refusal(self, a: Store, log: str) -> None:
        """On the standalone stream a refused append uses its number up or not, as the writer likes."""
        with pytest.raises(NotPending):
            await a.append(log, Batch(drafts(b"x"), writer="w", sequence=1, settle="q"))
        assert (await a.append(log, Batch(drafts(b"y"), writer="w", sequence=2))).first == 1

    async def test_gap_in_a_writers_numbers_diverges(self, a: Store, b: Store, log: str) -> None:
        """`Diverged`: what the writer wrote in between, or all of it, is lost, and nothing may hide that (P9)."""
        opening = Batch(drafts(b"opened"), writer="w", sequence=1, stream=NEW_STREAM)
        stream = (await a.append(log, opening)).first
        for writer, sequence in (("w", 3), ("v", 2)):
            with pytest.raises(Diverged):
                await b.append(log, Batch(drafts(b"x"), writer=writer, sequence=sequence, stream=stream, expect=["q"]))
        with pytest.raises(NotPending):
            await a.append(log, Batch([], settle="q"))
        assert (await a.append(log, Batch(drafts(b"y"), writer="w", sequence=2, stream=stream))).first == 2
        end = Batch(drafts(b"end"), writer="v", sequence=1, stream=stream, terminal=True)
        assert (await b.append(log, end)).first == 3

    async def test_idle_writer_is_remembered(self, a: Store, b: Store, log: str, clock: Clock) -> None:
        """`WRITER_SECONDS`: how long a store remembers an idle writer at least."""
        if not clock.exact:
            pytest.skip("would take two minutes of the real clock")
        batch = Batch(drafts(b"x"), writer="w", sequence=1)
        await a.append(log, batch)
        await clock.advance(WRITER_SECONDS - 1)
        assert (await b.append(log, batch)).duplicate

    async def test_writer_of_kept_stream_is_remembered(self, a: Store, b: Store, log: str, clock: Clock) -> None:
        """A duplicate is known as long as its stream is kept, however long that is."""
        if not clock.exact:
            pytest.skip("would take minutes of the real clock")
        opening = Batch(drafts(b"opened"), writer="w", sequence=1, stream=NEW_STREAM)
        stream = (await a.append(log, opening)).first
        await clock.advance(WRITER_SECONDS * 2)
        assert await b.append(log, opening) == Appended(stream, True, 6, 1)
        last = Batch(drafts(b"end"), writer="w", sequence=2, stream=stream, terminal=True)
        await a.append(log, last)
        await clock.advance(WRITER_SECONDS * 2)
        assert await b.append(log, last) == Appended(2, True, 9, 2)

    async def test_stream_writer_is_remembered_elsewhere_too(self, a: Store, b: Store, log: str, clock: Clock) -> None:
        """A writer belongs to its stream, also while it writes to the standalone stream in between."""
        if not clock.exact:
            pytest.skip("would take minutes of the real clock")
        await a.append(log, Batch(drafts(b"opened"), writer="w", sequence=1, stream=NEW_STREAM))
        aside = Batch(drafts(b"aside"), writer="w", sequence=2)
        await a.append(log, aside)
        for _ in range(2):
            await clock.advance(WRITER_SECONDS + 1)
            await a.append(log, Batch(drafts(b"x")))
        assert (await b.append(log, aside)).duplicate
