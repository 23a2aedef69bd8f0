"""The contract of `append`: positions, the pending set, cancels and fields, in one step."""

from __future__ import annotations

import secrets

from nonstick.errors import NotPending, StreamClosed
from nonstick.store import STANDALONE, Appended, Batch, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.checks import LONG, assert_refused
from nonstick.testing.contract.tools import drafts, open_stream, read_all, texts

MIB = 1 << 20


class AppendContract(ContractFixtures):
    """A batch is written once and whole, or not at all."""

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

    async def test_event_keeps_bytes_and_tag(self, a: Store, b: Store, log: str) -> None:
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

    async def test_load_answers_the_last_entry(self, a: Store, b: Store, log: str) -> None:
        """`Loaded.head`: cursor of the log's last entry."""
        for batch in (drafts(b"1"), drafts(b"2", b"3")):
            answer = await a.append(log, Batch(batch))
            assert (await b.load(log)).head == (answer.first + len(batch) - 1, batch[-1].tag)

    # ---- the pending set

    async def test_expected_answer_is_pending_until_settled(self, a: Store, b: Store, log: str) -> None:
        """`Batch.expect`, `answers`, `settle`: in the pending set, still there, taken out (P4)."""
        await a.append(log, Batch(drafts(b"ask"), expect=["q1", "q2"]))
        await b.append(log, Batch(drafts(b"progress"), answers="q1"))
        await b.append(log, Batch(drafts(b"progress"), answers="q1"))
        await b.append(log, Batch(drafts(b"reply"), settle="q1"))
        await assert_refused(a, log, NotPending, Batch(drafts(b"again"), settle="q1"))
        await assert_refused(a, log, NotPending, Batch(drafts(b"late progress"), answers="q1"))
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
            await assert_refused(b, log, NotPending, batch)

    async def test_repeated_settled_reply_is_a_duplicate(self, a: Store, b: Store, log: str) -> None:
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
        await assert_refused(a, log, StreamClosed, closed)
        await assert_refused(a, log, NotPending, Batch(drafts(b"x"), answers="q"))
        await a.append(log, Batch((), settle="kept"))

    # ---- cancels and fields

    async def test_record_keeps_a_cancel_until_uncancelled(self, a: Store, b: Store, log: str) -> None:
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

    async def test_append_sets_and_removes_fields(self, a: Store, b: Store, log: str) -> None:
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
