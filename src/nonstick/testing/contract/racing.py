"""The contract under concurrency: what may happen once happens once, however many race for it or are cancelled."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from itertools import chain
from typing import Any

from nonstick.errors import AlreadyExists, Fenced, NotPending, StoreError, StreamClosed
from nonstick.store import Appended, Batch, Cursor, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.checks import LONG
from nonstick.testing.contract.staleness import assert_stale, tells_stale
from nonstick.testing.contract.tools import drafts, open_stream, read_all, texts

ROUNDS = 15
"""How often each race is run."""


class RaceContract(ContractFixtures):
    """Atomic means: another node sees all of a call's effects or none, and of two that exclude each other one."""

    async def test_racing_creates_make_one_session(self, a: Store, b: Store, key: str) -> None:
        """`create`: AlreadyExists for all but one, whose fields they are."""
        for n in range(ROUNDS):
            name = f"{key}{n}"
            winner = await self.only_one(
                AlreadyExists, [store.create(name, {"by": by}, lifetime=LONG) for store, by in ((a, b"a"), (b, b"b"))]
            )
            assert (await a.load(name)).fields == {"by": (b"a", b"b")[winner]}

    async def test_racing_terminals_end_the_stream_once(self, a: Store, b: Store, key: str) -> None:
        """`Batch.terminal`: a stream ends once, however many race for it (P7)."""
        await a.create(key, {}, lifetime=LONG)
        for _ in range(ROUNDS):
            stream = await open_stream(a, key)
            batches = [Batch(drafts(name), stream=stream, terminal=True) for name in (b"a", b"b")]
            calls = [store.append(key, batch) for store, batch in zip((a, b), batches, strict=True)]
            winner = await self.only_one(StreamClosed, calls)
            ends = [event.data for event in await read_all(b, key) if event.stream == stream][1:]
            assert ends == [(b"a", b"b")[winner]]

    async def test_racing_successors_take_over_once(self, a: Store, b: Store, key: str) -> None:
        """`Batch.take_over`: the attempt goes up by one, for one of those that race for it (P7)."""
        await a.create(key, {}, lifetime=LONG)
        for _ in range(ROUNDS):
            stream = await open_stream(a, key)
            taken = Batch(drafts(b"taken"), stream=stream, take_over=True)
            await self.only_one(Fenced, [a.append(key, taken), b.append(key, taken)])
            await a.append(key, Batch(drafts(b"second"), stream=stream, attempt=2))

    async def test_racing_replies_settle_the_request_once(self, a: Store, b: Store, key: str) -> None:
        """`Batch.settle`: an answer counts once, whichever node receives it (P4)."""
        await a.create(key, {}, lifetime=LONG)
        for n in range(ROUNDS):
            await a.append(key, Batch(drafts(b"ask"), expect=[f"q{n}"]))
            batches = [Batch(drafts(name), settle=f"q{n}", writer=f"{name!r}{n}", sequence=1) for name in (b"a", b"b")]
            calls = [store.append(key, batch) for store, batch in zip((a, b), batches, strict=True)]
            winner = await self.only_one(NotPending, calls)
            assert (await read_all(b, key))[-1].data == (b"a", b"b")[winner]

    async def test_racing_repeats_are_written_once(self, a: Store, b: Store, key: str) -> None:
        """A (writer, sequence) is written once, also when it arrives twice at the same time."""
        await a.create(key, {}, lifetime=LONG)
        for n in range(1, ROUNDS + 1):
            batch = Batch(drafts(b"%d" % n), writer="w", sequence=n)
            answers = await asyncio.gather(*(store.append(key, batch) for store in (a, b, a, b)))
            assert sorted(answer.duplicate for answer in answers) == [False, True, True, True]
            assert {answer.first for answer in answers} == {n}
        assert texts(await read_all(a, key)) == [b"%d" % n for n in range(1, ROUNDS + 1)]

    async def test_concurrent_writers_leave_no_gaps(self, a: Store, b: Store, key: str) -> None:
        """Positions are without gaps and given out once; each batch stays together, each writer in its order (P3)."""
        await a.create(key, {}, lifetime=LONG)
        tasks, appends = 8, 12

        async def write(name: int) -> list[tuple[int, list[bytes]]]:
            written: list[tuple[int, list[bytes]]] = []
            for n in range(1, appends + 1):
                data = [b"%d %d %d" % (name, n, part) for part in range(1 + n % 3)]
                store = (a, b)[name % 2]
                answer = await store.append(key, Batch(drafts(*data), writer=f"w{name}", sequence=n))
                assert not answer.duplicate
                written.append((answer.first, data))
            return written

        written = sorted(chain.from_iterable(await asyncio.gather(*map(write, range(tasks)))))
        events = await read_all(b, key)
        assert [event.position for event in events] == list(range(1, len(events) + 1))
        assert texts(events) == [data for _, batch in written for data in batch]
        assert [first for first, _ in written] == _starts([len(batch) for _, batch in written])

    async def test_reader_never_sees_half_a_batch(self, a: Store, b: Store, key: str) -> None:
        """Methods are atomic: another node sees all of a batch, and the fields of the same step, or none."""
        await a.create(key, {"n": b"0"}, lifetime=LONG)

        async def write() -> None:
            for n in range(1, 41):
                await a.append(key, Batch(drafts(b"1", b"2", b"3"), fields={"n": b"%d" % n}))
                await asyncio.sleep(0)  # a store may answer without ever suspending

        writer = asyncio.ensure_future(write())
        while not writer.done():
            loaded = await b.load(key)
            assert loaded.head.position == 3 * int(loaded.fields["n"])
            assert len(await read_all(b, key)) % 3 == 0
            await asyncio.sleep(0)
        await writer

    async def test_cancelled_and_repeated_append_lands_once(self, a: Store, b: Store, key: str) -> None:
        """A cancelled call has an unknown outcome; the same call repeated makes it known, and others go on."""
        await a.create(key, {}, lifetime=LONG)
        dice = random.Random(20)
        count = 60
        for n in range(1, count + 1):
            mine = Batch(drafts(b"mine %d" % n), writer="w", sequence=n)
            other = Batch(drafts(b"other %d" % n), writer="v", sequence=n)
            cancelled = asyncio.ensure_future(a.append(key, mine))
            spared = asyncio.ensure_future(a.append(key, other))
            for _ in range(dice.randrange(12)):
                await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            await (a, b)[dice.randrange(2)].append(key, mine)
            assert not (await spared).duplicate
        written = texts(await read_all(b, key))
        for name in (b"mine", b"other"):
            assert [data for data in written if data.startswith(name)] == [
                b"%s %d" % (name, n + 1) for n in range(count)
            ]

    async def test_call_after_cancellation_gets_own_answer(self, a: Store, key: str) -> None:
        """A cancelled call must not disturb any other call: no answer is taken for another's."""
        await a.create(key, {"x": b"1"}, lifetime=LONG)
        for n in range(30):
            doomed = asyncio.ensure_future(a.load(key))
            for _ in range(n % 6):
                await asyncio.sleep(0)
            doomed.cancel()
            answer, loaded, events = await asyncio.gather(
                a.append(key, Batch(drafts(b"%d" % n))), a.load(key), a.lapsed([f"{key}{n}"])
            )
            assert answer.first == n + 1
            assert loaded.fields == {"x": b"1"}
            assert events == {f"{key}{n}"}
            await asyncio.wait([doomed])

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

    async def test_acknowledged_append_makes_logs_stale(self, a: Store, b: Store, key: str) -> None:
        """`stale`: whichever looks raced with an append, each that begins after its answer sees it (P3)."""
        await a.create(key, {}, lifetime=LONG)
        place = Cursor(0)
        for n in range(ROUNDS):
            batch = Batch(drafts(b"%d" % n))
            looks = [store.stale({key: place}) for store in (a, b) if tells_stale(store)]
            appended, *seen = await asyncio.gather(a.append(key, batch), *looks)
            assert isinstance(appended, Appended)
            assert all(answer in (set(), {key}) for answer in seen)
            for store in (a, b):
                await assert_stale(store, {key: place}, [key])
            place = Cursor(appended.first, batch.events[0].tag)
            for store in (a, b):
                await assert_stale(store, {key: place}, ())

    async def only_one(self, error: type[StoreError], calls: Sequence[Coroutine[Any, Any, Appended | None]]) -> int:
        """Runs the calls at once; one succeeds, the others get the error. Which one it was."""
        answers = await asyncio.gather(*calls, return_exceptions=True)
        winners = [n for n, answer in enumerate(answers) if not isinstance(answer, BaseException)]
        assert len(winners) == 1, answers
        assert all(isinstance(answer, error) for n, answer in enumerate(answers) if n not in winners), answers
        return winners[0]


def _starts(sizes: Sequence[int]) -> list[int]:
    """The first positions of batches of these sizes."""
    starts, position = [], 1
    for size in sizes:
        starts.append(position)
        position += size
    return starts
