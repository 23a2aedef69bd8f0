"""The contract of `append`: positions, writers, streams, the pending set, cancels and fields, in one step."""

from __future__ import annotations

import secrets

import pytest

from nonstick.errors import Diverged, Fenced, NotPending, StoreError, StreamClosed
from nonstick.store import NEW_STREAM, STANDALONE, WRITER_SECONDS, Appended, Batch, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.record import LONG
from nonstick.testing.contract.tools import Clock, drafts, open_stream, read_all, texts

MIB = 1 << 20


async def empty_log(store: Store, key: str) -> str:
    """Creates a session; returns its key."""
    await store.create(key, {}, lifetime=LONG)
    return key


class AppendContract(ContractFixtures):
    """A batch is written once and whole, or not at all."""

    @pytest.fixture
    async def log(self, a: Store, key: str) -> str:
        """The key of a session with an empty log."""
        return await empty_log(a, key)

    # ---- positions

    async def test_positions_run_from_one_without_gaps(self, a: Store, b: Store, log: str) -> None:
        """`append` writes at the end of the log; a position is an int from 1, without gaps (P3)."""
        first = await a.append(log, Batch(drafts(b"1")))
        second = await b.append(log, Batch(drafts(b"2", b"3", b"4")))
        third = await a.append(log, Batch(drafts(b"5")))
        assert (first, second, third) == (
            Appended(1, False, 1, 1),
            Appended(2, False, 4, 4),
            Appended(5, False, 5, 5),
        )
        events = await read_all(b, log)
        assert [event.position for event in events] == [1, 2, 3, 4, 5]
        assert texts(events) == [b"1", b"2", b"3", b"4", b"5"]
        assert {event.stream for event in events} == {STANDALONE}

    async def test_event_keeps_its_bytes_and_its_tag(self, a: Store, b: Store, log: str) -> None:
        """`Event` is what its `Draft` was, byte by byte."""
        written = drafts(b"", b"\0", b"\r\n\r\n", bytes(range(256)), b"\xff" * 300, "\N{SNOWMAN}".encode())
        written += [written[0]._replace(tag=tag) for tag in (bytes(8), b"\xff" * 8, b"\r\n\0\x80'\"\\{")]
        await a.append(log, Batch(written))
        events = await read_all(b, log)
        assert [(event.tag, event.data) for event in events] == written
        assert (await b.load(log)).head == events[-1].cursor

    async def test_megabyte_is_kept_whole(self, a: Store, b: Store, log: str) -> None:
        """`append` takes events as large as the transport lets through."""
        large = secrets.token_bytes(MIB)
        answer = await a.append(log, Batch(drafts(b"before", large, b"after")))
        assert (answer.size, answer.count) == (MIB + 11, 3)
        assert texts(await read_all(b, log)) == [b"before", large, b"after"]

    async def test_load_returns_the_last_entry_as_the_head(self, a: Store, b: Store, log: str) -> None:
        """`Loaded.head`: cursor of the log's last entry."""
        for batch in (drafts(b"1"), drafts(b"2", b"3")):
            answer = await a.append(log, Batch(batch))
            assert (await b.load(log)).head == (answer.first + len(batch) - 1, batch[-1].tag)

    # ---- writers

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

    async def test_append_that_arrives_late_is_not_written_again(self, a: Store, b: Store, log: str) -> None:
        """A (writer, sequence) written before is a duplicate, also when the writer has gone on since."""
        batches = [Batch(drafts(b"%d" % n), writer="w", sequence=n) for n in (1, 2, 3)]
        for batch in batches:
            await a.append(log, batch)
        for batch in batches:
            assert (await b.append(log, batch)).duplicate
        assert texts(await read_all(a, log)) == [b"1", b"2", b"3"]

    async def test_lower_number_of_another_writer_is_not_lost(self, a: Store, b: Store, log: str) -> None:
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

    async def test_batch_without_writer_is_written_each_time(self, a: Store, log: str) -> None:
        """`Batch.writer`: "" is for a batch that may harmlessly be written twice."""
        batch = Batch(drafts(b"x"), sequence=1)
        assert [(await a.append(log, batch)).first for _ in range(3)] == [1, 2, 3]

    async def test_refused_append_is_judged_anew_when_repeated(self, a: Store, b: Store, log: str) -> None:
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

    async def test_hole_in_the_numbers_of_a_streams_writer_is_reported(self, a: Store, b: Store, log: str) -> None:
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

    async def test_writer_of_a_kept_stream_is_remembered(self, a: Store, b: Store, log: str, clock: Clock) -> None:
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

    async def test_writer_of_a_kept_stream_is_remembered_for_what_it_wrote_elsewhere(
        self, a: Store, b: Store, log: str, clock: Clock
    ) -> None:
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

    # ---- streams

    async def test_new_stream_is_named_by_its_first_position(self, a: Store, b: Store, log: str) -> None:
        """`NEW_STREAM`: the batch opens a stream, named by the position of its first event (P3)."""
        await a.append(log, Batch(drafts(b"0")))
        opened = await a.append(log, Batch(drafts(b"opened", b"one"), stream=NEW_STREAM))
        await b.append(log, Batch(drafts(b"two"), stream=opened.first))
        await b.append(log, Batch(drafts(b"aside")))
        assert [(event.stream, event.data) for event in await read_all(a, log)] == [
            (STANDALONE, b"0"),
            (2, b"opened"),
            (2, b"one"),
            (2, b"two"),
            (STANDALONE, b"aside"),
        ]

    async def test_repeated_opening_opens_one_stream(self, a: Store, b: Store, log: str) -> None:
        """A repeated `NEW_STREAM` batch answers the stream that it opened then."""
        batch = Batch(drafts(b"opened"), writer="w", sequence=1, stream=NEW_STREAM)
        first = await a.append(log, batch)
        await a.append(log, Batch(drafts(b"aside")))
        assert await b.append(log, batch) == (first.first, True, 11, 2)

    async def test_nothing_follows_the_terminal(self, a: Store, b: Store, log: str) -> None:
        """`Batch.terminal` ends the stream; later appends to it get StreamClosed (P3)."""
        stream = await open_stream(a, log)
        await a.append(log, Batch(drafts(b"last", b"terminal"), stream=stream, terminal=True))
        for late in (
            Batch(drafts(b"late"), stream=stream),
            Batch(drafts(b"late"), stream=stream, terminal=True),
            Batch(drafts(b"late"), stream=stream, take_over=True),
            Batch((), stream=stream, fields={"late": b"1"}),
        ):
            await self.assert_refused(b, log, StreamClosed, late)

    async def test_stream_may_open_and_end_in_one_batch(self, a: Store, b: Store, log: str) -> None:
        """`Batch.terminal` with `NEW_STREAM`: the last event ends the stream that the first one opened."""
        opened = await a.append(log, Batch(drafts(b"opened", b"terminal"), stream=NEW_STREAM, terminal=True))
        await self.assert_refused(b, log, StreamClosed, Batch(drafts(b"late"), stream=opened.first))

    async def test_streams_end_one_by_one(self, a: Store, b: Store, log: str) -> None:
        """The end of a stream is its own: other streams and the standalone stream go on."""
        ended, open_ = await open_stream(a, log), await open_stream(b, log)
        await a.append(log, Batch(drafts(b"terminal"), stream=ended, terminal=True))
        await a.append(log, Batch(drafts(b"more"), stream=open_))
        await b.append(log, Batch(drafts(b"aside")))
        assert texts(await read_all(a, log))[3:] == [b"more", b"aside"]

    async def test_unknown_stream_is_closed(self, a: Store, b: Store, log: str) -> None:
        """StreamClosed: the stream has ended or is not known; an event inside a stream names none."""
        await a.append(log, Batch(drafts(b"0")))
        opened = await a.append(log, Batch(drafts(b"opened", b"inside"), stream=NEW_STREAM))
        for unknown in (1, opened.first + 1, 4, 10**9):
            await self.assert_refused(b, log, StreamClosed, Batch(drafts(b"x"), stream=unknown))

    async def test_terminal_that_is_repeated_is_a_duplicate(self, a: Store, b: Store, log: str) -> None:
        """The duplicate check comes first, whatever has happened to the stream since."""
        stream = await open_stream(a, log)
        message = Batch(drafts(b"message"), writer="v", sequence=1, stream=stream)
        terminal = Batch(drafts(b"terminal"), writer="w", sequence=1, stream=stream, terminal=True)
        await a.append(log, message)
        await a.append(log, terminal)
        assert await b.append(log, terminal) == Appended(3, True, 21, 3)
        assert await b.append(log, message) == Appended(2, True, 21, 3)

    async def test_other_attempt_is_fenced(self, a: Store, b: Store, log: str) -> None:
        """Fenced: the stream's attempt is not `batch.attempt` (P7)."""
        for attempt in (1, 3):
            stream = await open_stream(a, log, attempt=attempt)
            for other in (attempt - 1, attempt + 1):
                batch = Batch(drafts(b"x"), stream=stream, attempt=other, terminal=True, fields={"x": b"1"})
                await self.assert_refused(b, log, Fenced, batch)
            await a.append(log, Batch(drafts(b"x"), stream=stream, attempt=attempt))

    async def test_stream_that_was_taken_over_refuses_its_old_writer(self, a: Store, b: Store, log: str) -> None:
        """`Batch.take_over`: the attempt must be `attempt`, and becomes `attempt + 1` in this step (P7)."""
        stream = await open_stream(a, log)
        taken = Batch(drafts(b"taken"), writer="w", sequence=1, stream=stream, take_over=True)
        assert (await b.append(log, taken)).first == 2
        assert (await b.append(log, taken)).duplicate
        await self.assert_refused(a, log, Fenced, Batch(drafts(b"stale"), stream=stream, fields={"x": b"1"}))
        await self.assert_refused(a, log, Fenced, Batch((), stream=stream, fields={"x": b"1"}))
        await self.assert_refused(a, log, Fenced, Batch(drafts(b"again"), stream=stream, take_over=True))
        await b.append(log, Batch(drafts(b"mine"), stream=stream, attempt=2))
        await a.append(log, Batch(drafts(b"third"), stream=stream, attempt=2, take_over=True, terminal=True))
        await self.assert_refused(b, log, StreamClosed, Batch(drafts(b"late"), stream=stream, attempt=3))

    async def test_what_was_written_before_a_take_over_stays_a_duplicate(self, a: Store, b: Store, log: str) -> None:
        """The duplicate check comes before the fence: a writer learns that its last append was written (P7)."""
        stream = await open_stream(a, log)
        mine = Batch(drafts(b"mine"), writer="w", sequence=1, stream=stream)
        await a.append(log, mine)
        await b.append(log, Batch(drafts(b"taken"), stream=stream, take_over=True))
        assert await a.append(log, mine) == Appended(2, True, 15, 3)

    async def test_attempt_is_ignored_on_the_standalone_stream(self, a: Store, log: str) -> None:
        """`Batch.attempt`: ignored on the standalone stream."""
        assert [(await a.append(log, Batch(drafts(b"x"), attempt=n))).first for n in (7, 1)] == [1, 2]

    # ---- the pending set

    async def test_expected_answer_is_pending_until_it_is_settled(self, a: Store, b: Store, log: str) -> None:
        """`Batch.expect`, `answers`, `settle`: in the pending set, still there, taken out (P4)."""
        await a.append(log, Batch(drafts(b"ask"), expect=["q1", "q2"]))
        await b.append(log, Batch(drafts(b"progress"), answers="q1"))
        await b.append(log, Batch(drafts(b"progress"), answers="q1"))
        await b.append(log, Batch(drafts(b"reply"), settle="q1"))
        await self.assert_refused(a, log, NotPending, Batch(drafts(b"again"), settle="q1"))
        await self.assert_refused(a, log, NotPending, Batch(drafts(b"late progress"), answers="q1"))
        await a.append(log, Batch(drafts(b"progress"), answers="q2"))

    async def test_answer_that_nobody_expects_is_refused(self, a: Store, b: Store, log: str) -> None:
        """NotPending, and nothing is written; another session's question does not count (P4)."""
        await a.create(f"{log}2", {}, lifetime=LONG)
        await a.append(f"{log}2", Batch(drafts(b"ask"), expect=["q"]))
        for batch in (
            Batch(drafts(b"x"), settle="q", fields={"x": b"1"}),
            Batch(drafts(b"x"), answers="q", cancel="r"),
            Batch((), settle="q", fields={"x": b"1"}),
        ):
            await self.assert_refused(b, log, NotPending, batch)

    async def test_repeated_reply_is_a_duplicate_although_it_is_settled(self, a: Store, b: Store, log: str) -> None:
        """The duplicate check comes first, whatever has happened to the pending set since (P4)."""
        await a.append(log, Batch(drafts(b"ask"), expect=["q"]))
        reply = Batch(drafts(b"reply"), writer="w", sequence=1, settle="q")
        assert (await a.append(log, reply)).first == 2
        assert await b.append(log, reply) == Appended(2, True, 8, 2)

    async def test_refused_append_leaves_nothing_pending(self, a: Store, log: str) -> None:
        """All or nothing: a refused batch expects nothing and settles nothing."""
        stream = await open_stream(a, log)
        await a.append(log, Batch(drafts(b"ask"), expect=["kept"]))
        await a.append(log, Batch(drafts(b"terminal"), stream=stream, terminal=True))
        closed = Batch(drafts(b"x"), stream=stream, expect=["q"], settle="kept")
        await self.assert_refused(a, log, StreamClosed, closed)
        await self.assert_refused(a, log, NotPending, Batch(drafts(b"x"), answers="q"))
        await a.append(log, Batch((), settle="kept"))

    # ---- cancels and fields

    async def test_cancel_is_left_in_the_record_and_taken_out(self, a: Store, b: Store, log: str) -> None:
        """`Batch.cancel` leaves a request key in the record, `uncancel` takes it out (P5)."""
        await a.append(log, Batch(drafts(b"x"), cancel="r1"))
        await a.append(log, Batch(drafts(b"x"), cancel="r2"))
        assert (await b.load(log)).cancels == {"r1", "r2"}
        assert await b.append(log, Batch((), uncancel="r1")) == Appended(2, False, 2, 2)
        assert (await a.load(log)).cancels == {"r2"}
        await b.append(log, Batch((), uncancel="never"))
        assert (await a.load(log)).cancels == {"r2"}

    async def test_cancels_are_no_fields(self, a: Store, b: Store, log: str) -> None:
        """`Loaded.fields` is the record and nothing else, whatever the store keeps beside it."""
        await a.append(log, Batch(drafts(b"x"), cancel="r", expect=["q"], writer="w", sequence=1))
        await open_stream(a, log)
        assert (await b.load(log)).fields == {}

    async def test_fields_are_set_and_removed_in_the_same_step(self, a: Store, b: Store, log: str) -> None:
        """`Batch.fields`: record fields to set, or with None to remove, in the same step (P2)."""
        await a.append(log, Batch(drafts(b"x"), fields={"one": b"1", "two": b"2"}))
        stream = await open_stream(a, log)
        last = Batch(drafts(b"t"), stream=stream, terminal=True, fields={"one": None, "two": b"", "three": b"\0"})
        await a.append(log, last)
        assert (await b.load(log)).fields == {"two": b"", "three": b"\0"}

    async def test_batch_without_events_answers_the_head(self, a: Store, b: Store, log: str) -> None:
        """`Batch.events`: none where only `settle`, `uncancel` or `fields` is wanted; `first` is then the head."""
        assert await a.append(log, Batch((), fields={"x": b"1"})) == Appended(0, False, 0, 0)
        await a.append(log, Batch(drafts(b"ask", b"more"), expect=["q"]))
        assert await b.append(log, Batch((), settle="q")) == Appended(2, False, 7, 2)
        stream = await open_stream(a, log)
        assert await b.append(log, Batch((), stream=stream, fields={"x": b"2"})) == Appended(3, False, 13, 3)
        assert (await a.load(log)).fields == {"x": b"2"}
        assert len(await read_all(a, log)) == 3

    async def test_batch_without_events_is_written_once(self, a: Store, b: Store, log: str) -> None:
        """A (writer, sequence) counts without events too: a repeat does not undo what came after it."""
        first = Batch((), writer="w", sequence=1, fields={"x": b"1"})
        await a.append(log, first)
        await b.update(log, {"x": b"2"})
        assert (await b.append(log, first)).duplicate
        assert (await a.load(log)).fields == {"x": b"2"}

    async def assert_refused(self, store: Store, key: str, error: type[StoreError], batch: Batch) -> None:
        """The batch gets this error, and neither the record nor the log has changed."""
        record, log = await store.load(key), await read_all(store, key)
        with pytest.raises(error):
            await store.append(key, batch)
        assert await store.load(key) == record
        assert await read_all(store, key) == log
