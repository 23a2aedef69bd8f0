"""The contract of `append` about streams: they open, are taken over, and end."""

from __future__ import annotations

from nonstick.errors import Fenced, StreamClosed
from nonstick.store import NEW_STREAM, STANDALONE, Appended, Batch, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.checks import assert_refused
from nonstick.testing.contract.tools import drafts, open_stream, read_all, texts


class StreamContract(ContractFixtures):
    """A stream has one attempt at a time, and nothing after its terminal event."""

    async def test_first_position_names_new_stream(self, a: Store, b: Store, log: str) -> None:
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
            await assert_refused(b, log, StreamClosed, late)

    async def test_one_batch_opens_and_ends_stream(self, a: Store, b: Store, log: str) -> None:
        """`Batch.terminal` with `NEW_STREAM`: the last event ends the stream that the first one opened."""
        opened = await a.append(log, Batch(drafts(b"opened", b"terminal"), stream=NEW_STREAM, terminal=True))
        await assert_refused(b, log, StreamClosed, Batch(drafts(b"late"), stream=opened.first))

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
            await assert_refused(b, log, StreamClosed, Batch(drafts(b"x"), stream=unknown))

    async def test_repeated_terminal_is_a_duplicate(self, a: Store, b: Store, log: str) -> None:
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
                await assert_refused(b, log, Fenced, batch)
            await a.append(log, Batch(drafts(b"x"), stream=stream, attempt=attempt))

    async def test_stream_taken_over_fences_old_writer(self, a: Store, b: Store, log: str) -> None:
        """`Batch.take_over`: the attempt must be `attempt`, and becomes `attempt + 1` in this step (P7)."""
        stream = await open_stream(a, log)
        taken = Batch(drafts(b"taken"), writer="w", sequence=1, stream=stream, take_over=True)
        assert (await b.append(log, taken)).first == 2
        assert (await b.append(log, taken)).duplicate
        await assert_refused(a, log, Fenced, Batch(drafts(b"stale"), stream=stream, fields={"x": b"1"}))
        await assert_refused(a, log, Fenced, Batch((), stream=stream, fields={"x": b"1"}))
        await assert_refused(a, log, Fenced, Batch(drafts(b"again"), stream=stream, take_over=True))
        await b.append(log, Batch(drafts(b"mine"), stream=stream, attempt=2))
        await a.append(log, Batch(drafts(b"third"), stream=stream, attempt=2, take_over=True, terminal=True))
        await assert_refused(b, log, StreamClosed, Batch(drafts(b"late"), stream=stream, attempt=3))

    async def test_append_before_take_over_stays_duplicate(self, a: Store, b: Store, log: str) -> None:
        """The duplicate check comes before the fence: a writer learns that its last append was written (P7)."""
        stream = await open_stream(a, log)
        mine = Batch(drafts(b"mine"), writer="w", sequence=1, stream=stream)
        await a.append(log, mine)
        await b.append(log, Batch(drafts(b"taken"), stream=stream, take_over=True))
        assert await a.append(log, mine) == Appended(2, True, 15, 3)

    async def test_standalone_stream_ignores_the_attempt(self, a: Store, log: str) -> None:
        """`Batch.attempt`: ignored on the standalone stream."""
        assert [(await a.append(log, Batch(drafts(b"x"), attempt=n))).first for n in (7, 1)] == [1, 2]
