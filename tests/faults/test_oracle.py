"""The oracle catches what it is there for: histories that break a promise, and stores that do.

Every broken store is used by real nodes, in one process, as a sound one is beside it.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from math import inf
from typing import Any

import httpx2
import pytest
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

from nonstick.errors import StoreUnavailable
from nonstick.store import MAX_READ_BYTES, Appended, Batch, Cursor, Event, Wake
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Cluster
from nonstick.testing.oracle import (
    Answered,
    Called,
    Caught,
    Ending,
    GaveUp,
    Got,
    Lost,
    Opened,
    Place,
    Ran,
    Record,
    Replayed,
    Replied,
    Restarted,
    Vanished,
    judge,
)
from tests.faults.client import Call, History, Patience, Session, error_of

pytestmark = pytest.mark.anyio

# ---- histories, written down


def progress(label: str, step: int, attempt: int = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"message": f"{label}:{attempt}:{step}"}}


def result(request_id: int, label: str, steps: int, attempt: int = 1) -> dict[str, Any]:
    content = [{"type": "text", "text": f"{label}:{attempt}:{steps}"}]
    return {"jsonrpc": "2.0", "id": request_id, "result": {"content": content}}


def got(at: float, label: str, position: int, message: dict[str, Any], stream: int = 1) -> Got:
    return Got(at, "s", label, Place(stream, position), message)


CALL = Called(0, "s", "x", 1, steps=2)
FIRST = got(1, "x", 2, progress("x", 1))
SECOND = got(2, "x", 5, progress("x", 2))
END = got(3, "x", 6, result(1, "x", 2))
RUNS = [Ran(0, "x", "start", 1, "a"), Ran(3, "x", "end", 1, "a")]
SOUND: list[Record] = [CALL, FIRST, SECOND, END, *RUNS]

NEWS = Called(0, "s", "n", 2, steps=2, standalone=True)
NEWS_END = Got(2, "s", "n", None, result(2, "n", 2))
NEWS_RUNS = [Ran(0, "n", "start", 1, "a"), Ran(2, "n", "end", 1, "a")]
FIRST_NEWS = got(1, "", 7, progress("n", 1), stream=0)
SECOND_NEWS = got(2, "", 8, progress("n", 2), stream=0)
NEWS_SOUND: list[Record] = [NEWS, FIRST_NEWS, SECOND_NEWS, NEWS_END, *NEWS_RUNS, Caught(3, "s")]

REPEATED: list[Record] = [
    replace(CALL, repeatable=True),
    FIRST,
    got(2, "x", 4, progress("x", 1, attempt=2)),
    got(3, "x", 5, progress("x", 2, attempt=2)),
    got(4, "x", 6, result(1, "x", 2, attempt=2)),
    *[Ran(0, "x", "start", 1, "a"), Ran(2, "x", "start", 2, "b"), Ran(4, "x", "end", 2, "b")],
]

ASKED = [Replied(1, "s", "x", 1, "yes", None), Ran(1, "x", "reply", 1, "a", 1, "yes")]
DELETED = Answered(9, 8, "s", "DELETE", 200)
VANISHED = Vanished(2, "s", by=20)


LOSS = Lost(1.4, 1.1, 1.5)
"""What was written in between is lost: of `SOUND`, nothing that its client has; of `NEWS`, the second."""
LOSS_OF_ALL = Lost(1.4, -inf, 1.5)
TOLD = got(
    3,
    "x",
    2,
    {"jsonrpc": "2.0", "id": 1, "error": {"code": -32603, "message": "lost", "data": {"reason": "stream_lost"}}},
)
YOUNG = Opened(1.3, 1.2, "s")
LATER_NEWS = replace(SECOND_NEWS, at=2.0, place=Place(0, 7))


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([CALL, FIRST, replace(LOSS, since=0.9), TOLD], id="told on its own connection"),
        pytest.param(
            [
                *SOUND,
                replace(LOSS, at=3.4, until=3.5),
                Replayed(4, "s", "x", Place(1, 1), [(Place(1, 2), FIRST.message), (Place(-1, -1), TOLD.message)], True),
            ],
            id="told when it is replayed",
        ),
        pytest.param(
            [
                *[CALL, FIRST, SECOND, replace(LOSS, since=0.9, at=2.4, until=2.5)],
                replace(TOLD, place=Place(1, 4)),
                Replayed(4, "s", "x", Place(1, 4), [], True),
            ],
            id="replayed after its end at a position given out again",
        ),
        pytest.param(
            [
                *[CALL, FIRST, SECOND, replace(LOSS, since=0.9, at=2.4, until=2.5), replace(TOLD, place=None)],
                Replayed(4, "s", "x", Place(1, 1), [(Place(1, 2), FIRST.message)], False),
            ],
            id="replayed from a place that is left, of a stream that goes on",
        ),
        pytest.param([YOUNG, *SOUND, LOSS, Answered(4, 3, "s", "POST", 404)], id="a young session"),
        pytest.param([Opened(0, 0, "s"), *SOUND, LOSS_OF_ALL, Answered(4, 3, "s", "POST", 404)], id="every session"),
        pytest.param([NEWS, LOSS, SECOND_NEWS, NEWS_END, *NEWS_RUNS, Caught(3, "s")], id="news"),
        pytest.param(
            [NEWS, FIRST_NEWS, replace(LOSS, since=0.9), LATER_NEWS, NEWS_END, *NEWS_RUNS, Caught(3, "s")],
            id="news at positions given out again",
        ),
        pytest.param(
            [CALL, FIRST, replace(LOSS, since=0.5, until=0.9, at=0.6), replace(TOLD, place=Place(1, 1))],
            id="told after what arrived late",
        ),
        pytest.param([*SOUND, DELETED, Lost(9.5, 8.5, 9.6), Answered(11, 10, "s", "POST", 200)], id="an end"),
        pytest.param([*REPEATED, Ran(2.5, "x", "start", 2, "c"), Lost(2.2, 1.9, 2.3)], id="a take-over"),
    ],
)
async def test_told_losses_are_excused(history: list[Record]) -> None:
    """P9: by an error for its request or, of a whole session, by 404."""
    assert judge(history) == []


@pytest.mark.parametrize(
    ("history", "said"),
    [
        pytest.param([CALL, replace(LOSS, since=-1), SECOND, END, *RUNS], "step 2", id="a gap in a request's stream"),
        pytest.param([CALL, FIRST, LOSS_OF_ALL, END, *RUNS], "1 of 2 steps", id="a result after a gap"),
        pytest.param(
            [CALL, FIRST, LOSS_OF_ALL, replace(FIRST, place=Place(1, 3)), TOLD], "step 1", id="an event again"
        ),
        pytest.param(
            [CALL, FIRST, LOSS_OF_ALL, replace(SECOND, place=Place(1, 2)), END, *RUNS],
            "twice",
            id="an event over a lost one",
        ),
        pytest.param([CALL, FIRST, LOSS, GaveUp(9, "s", "x", "hung")], "in vain", id="nobody was told"),
        pytest.param(
            [
                *SOUND,
                replace(LOSS, at=3.4, until=3.5),
                Replayed(4, "s", "x", Place(1, 1), [(Place(1, 6), END.message)], True),
            ],
            "other events",
            id="a replay with a gap",
        ),
        pytest.param(
            [*SOUND, Replayed(4, "s", "x", Place(1, 1), [(Place(-1, -1), TOLD.message)], True)],
            "other events",
            id="told of a loss that there was not",
        ),
        pytest.param(
            [Opened(0, 0, "s"), *SOUND, LOSS, Answered(4, 3, "s", "POST", 404)], "while it lived", id="an old session"
        ),
        pytest.param(
            [YOUNG, LOSS_OF_ALL, Answered(1.2, 1.2, "s", "POST", 404)], "while it lived", id="404 before the loss"
        ),
        pytest.param(
            [NEWS, LOSS, SECOND_NEWS, replace(SECOND_NEWS, place=Place(0, 9)), NEWS_END, *NEWS_RUNS],
            "step 2",
            id="news twice",
        ),
        pytest.param([*SOUND, LOSS, Answered(4, 3, "s", "POST", 500)], "500", id="500"),
        pytest.param([CALL, FIRST, replace(LOSS, since=5, until=6), TOLD], "there was not", id="told before a loss"),
    ],
)
async def test_loss_excuses_neither_gap_nor_repetition(history: list[Record], said: str) -> None:
    """P3, P9: never a silent gap, never an event twice."""
    found = judge(history)
    assert any(said in one.text for one in found), found


@pytest.mark.parametrize(
    "history",
    [
        SOUND,
        NEWS_SOUND,
        [*SOUND, *ASKED],
        [*SOUND, Replayed(4, "s", "x", Place(1, 2), [(Place(1, 5), SECOND.message), (Place(1, 6), END.message)], True)],
        [CALL, FIRST, GaveUp(4, "s", "x", "lost")],
        [CALL, FIRST, DELETED, Answered(11, 10, "s", "POST", 404)],
        [NEWS, Restarted(1.5, "s"), SECOND_NEWS, NEWS_END, *NEWS_RUNS, Caught(3, "s")],
        REPEATED,
        [*SOUND, Ending(3.5, "s"), Answered(4, 3.2, "s", "GET", 404)],
        [CALL, FIRST, VANISHED, Answered(19, 18, "s", "POST", 200), Answered(22, 21, "s", "POST", 404)],
    ],
)
async def test_sound_history_passes(history: list[Record]) -> None:
    assert judge(history) == []


@pytest.mark.parametrize(
    ("history", "promise", "said"),
    [
        pytest.param([CALL, FIRST, FIRST, SECOND, END, *RUNS], "P3", "arrived twice", id="an event twice"),
        pytest.param([CALL, SECOND, FIRST, END, *RUNS], "P3", "after a later one", id="out of order"),
        pytest.param([CALL, FIRST, END, *RUNS], "P3", "1 of 2 steps", id="an event lost at the end"),
        pytest.param([CALL, SECOND, END, *RUNS], "P3", "step 2", id="an event lost in the middle"),
        pytest.param(
            [CALL, FIRST, replace(FIRST, place=Place(1, 3)), SECOND, END, *RUNS], "P3", "step 1", id="written twice"
        ),
        pytest.param(
            [CALL, FIRST, SECOND, END, replace(END, place=Place(1, 9)), *RUNS], "P7", "went on", id="two terminals"
        ),
        pytest.param([*SOUND, got(4, "x", 9, progress("x", 3))], "P7", "went on", id="an event after the end"),
        pytest.param([CALL, FIRST, RUNS[0]], "P3", "never ended", id="no end"),
        pytest.param([*SOUND[:-3], GaveUp(9, "s", "x", "hung")], "P3", "in vain", id="hung"),
        pytest.param([*SOUND, got(4, "x", 9, progress("y", 1))], "P3", "of another session", id="another call's event"),
        pytest.param(
            [*SOUND, replace(CALL, session="t", label="y"), got(4, "x", 9, progress("y", 1))],
            "P3",
            "of another session",
            id="another session's event",
        ),
        pytest.param(
            [CALL, FIRST, SECOND, got(3, "x", 6, result(7, "x", 2)), *RUNS], "P3", "another request", id="another's id"
        ),
        pytest.param([CALL, FIRST, replace(SECOND, place=Place(4, 5)), END, *RUNS], "P3", "2 streams", id="mixed"),
        pytest.param([CALL, FIRST, SECOND, END, RUNS[0]], "P7", "did not end", id="a result of nothing"),
        pytest.param([*SOUND, Ran(4, "x", "start", 1, "b")], "P7", "run twice", id="executed twice"),
        pytest.param([*SOUND, Ran(4, "x", "start", 2, "b")], "P7", "run again", id="executed again unasked"),
        pytest.param([*SOUND, *ASKED, ASKED[1]], "P4", "replied to twice", id="a reply twice"),
        pytest.param([*SOUND, ASKED[1]], "P4", "nobody made", id="a reply from nowhere"),
        pytest.param(
            [*SOUND, DELETED, Answered(11, 10, "s", "POST", 200)], "P6", "after 's' ended", id="alive after its end"
        ),
        pytest.param([*SOUND, Answered(4, 3, "s", "GET", 404)], "P1", "while it lived", id="gone before its end"),
        pytest.param(
            [*SOUND, Answered(4, 3, "s", "GET", 404), Ending(4.5, "s")], "P1", "while it lived", id="gone before DELETE"
        ),
        pytest.param(
            [CALL, FIRST, VANISHED, Answered(22, 21, "s", "POST", 200)], "P10", "had vanished", id="alive for nobody"
        ),
        pytest.param(
            [*SOUND, Answered(1.6, 1.5, "s", "GET", 404), VANISHED], "P1", "while it lived", id="gone before its client"
        ),
        pytest.param([*SOUND, Answered(4, 3, "s", "POST", 503)], "P9", "503", id="503 without an outage"),
        pytest.param([*SOUND, Answered(4, 3, "s", "POST", 500)], "P9", "500", id="500"),
        pytest.param(
            [NEWS, FIRST_NEWS, NEWS_END, *NEWS_RUNS, Caught(3, "s")], "P3", "1 of 2", id="news lost at the end"
        ),
        pytest.param(
            [NEWS, SECOND_NEWS, NEWS_END, *NEWS_RUNS, Caught(3, "s")], "P3", "step 2", id="news lost at the beginning"
        ),
        pytest.param(
            [*SOUND, Replayed(4, "s", "x", Place(1, 5), [], True)], "P3", "other events", id="a replay without the end"
        ),
        pytest.param(
            [*SOUND, Replayed(4, "s", "x", Place(1, 6), [], False)], "P3", "did not end", id="a replay that hangs"
        ),
    ],
)
async def test_broken_history_is_caught(history: list[Record], promise: str, said: str) -> None:
    found = judge(history)
    assert any(one.promise == promise and said in one.text for one in found), found


async def test_streams_named_by_request_are_caught() -> None:
    """P3: as an event store that all sessions share, with the request id for the stream's name: ids repeat."""
    store: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for label in ("mine", "yours"):
        store[1] += [progress(label, 1), result(1, label, 1)]
    calls = [Called(0, "s", "mine", 1, 1), Called(0, "t", "yours", 1, 1)]
    runs = [Ran(0, label, what, 1, "a") for label in ("mine", "yours") for what in ("start", "end")]
    replayed = [Got(1, "t", "yours", Place(1, n), message) for n, message in enumerate(store[1], 1)]
    sound = [Got(1, "s", "mine", Place(1, 1), store[1][0]), Got(1, "s", "mine", Place(1, 2), store[1][1])]
    assert any("of another session" in one.text for one in judge([*calls, *runs, *sound, *replayed]))


# ---- broken stores, under real nodes


class Bench:
    """A cluster whose one tool counts as far as it is let, a client, and their history."""

    def __init__(self, stores: Sequence[MemoryStore]) -> None:
        self.history = History()
        self.let = asyncio.Semaphore(0)
        remaining = list(stores)
        self.cluster = Cluster(self._server, lambda: remaining.pop(0), nodes=len(stores), window=5.0)

    def _server(self) -> MCPServer[Any]:
        server: MCPServer[Any] = MCPServer("counting")

        @server.tool(structured_output=False)
        async def count(label: str, steps: int, ctx: Context[Any, Any]) -> str:
            self.history.add(Ran(0, label, "start", 1, ""))
            for step in range(1, steps + 1):
                await self.let.acquire()
                await ctx.report_progress(step, steps, f"{label}:1:{step}")
            await self.let.acquire()
            self.history.add(Ran(0, label, "end", 1, ""))
            return f"{label}:1:{steps}"

        return server

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self.let.release()


@asynccontextmanager
async def bench(*stores: MemoryStore) -> AsyncIterator[tuple[Bench, Session]]:
    made = Bench(stores)
    async with made.cluster, httpx2.AsyncClient(timeout=60) as http:
        patience = Patience(idle=10.0, call=20.0)
        client = Session(http, list(made.cluster), made.history, random.Random(1), name="s", patience=patience)
        await client.open()
        yield made, client
        await client.close()


class LosesReplies(MemoryStore):
    """Executes each append, and loses the first answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: set[tuple[str, int]] = set()

    async def append(self, key: str, batch: Batch) -> Appended:
        appended = await super().append(key, batch)
        if batch.writer and (batch.writer, batch.sequence) not in self.answered:
            self.answered.add((batch.writer, batch.sequence))
            raise StoreUnavailable("the answer was lost")
        return appended


class WritesRepeatsAgain(LosesReplies):
    async def append(self, key: str, batch: Batch) -> Appended:
        if (batch.writer, batch.sequence) in self.answered:
            # No check of the writer's sequence, and so it is just another append.
            batch = replace(batch, writer="")
        return await super().append(key, batch)


@pytest.mark.parametrize(("store", "caught"), [(LosesReplies, False), (WritesRepeatsAgain, True)])
async def test_store_without_sequences_is_caught(store: type[LosesReplies], caught: bool) -> None:
    """P3: an append whose answer was lost is repeated, and must not be written twice."""
    async with bench(store()) as (made, client):
        call = client.call("count", steps=3)
        made.allow(4)
        await call.end()
        await client.replay(call, after=call.ids[0])
    found = judge(made.history.records)
    assert any("replay" in one.text for one in found) if caught else found == [], found


class Shared(MemoryStore):
    """Takes every lease for lapsed, as after a pause of everything; a node may be deaf to what others append."""

    closes = True

    def __init__(self, data: MemoryStore | None = None, *, deaf: bool = False) -> None:
        super().__init__()
        self._data = data
        self._deaf = deaf
        if data is not None:
            self._sessions, self._watches = data._sessions, data._watches

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        return set(nodes)

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return super().watch(key, (lambda _: None) if self._deaf else wake)

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        return [] if self._deaf else await super().read(key, after, limit=limit, max_bytes=max_bytes)

    async def append(self, key: str, batch: Batch) -> Appended:
        return await super().append(key, replace(batch, terminal=batch.terminal and self.closes))


class NeverCloses(Shared):
    closes = False


@pytest.mark.parametrize(("store", "caught"), [(Shared, False), (NeverCloses, True)])
async def test_store_without_terminal_check_is_caught(store: type[Shared], caught: bool) -> None:
    """P7: a node that hears nothing, is taken for dead, and ends its request none the less."""
    data = store()
    async with bench(store(data, deaf=True), store(data)) as (made, client):
        a, b = made.cluster
        call = client.call("count", on=a, steps=3)
        made.allow(1)
        await call.started.wait()
        await client.has(f"{call.label}:1:1", call)
        # While the first connection is still open.
        await client.resume(call, on=b)
        assert error_of(call.terminal)["reason"] == "node_lost"
        made.allow(3)
        await call.end()
    found = [one for one in judge(made.history.records) if one.promise == "P7"]
    assert any("went on" in one.text for one in found) if caught else found == [], found


class Forgetful(MemoryStore):
    """Can lose the end of its logs, as a failover to a replica that was behind."""

    def lose(self, entries: int) -> None:
        for session in self._sessions.values():
            if len(session.events) <= entries:
                continue  # the cluster log
            for position in sorted(session.events)[-entries:]:
                session.size -= len(session.events.pop(position).data)
            session.head = session.events[max(session.events)].cursor


@pytest.mark.parametrize("tags", [True, False])
async def test_log_without_tags_is_caught(tags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: positions are given out again; only the tag tells that another event stands there now."""
    if not tags:
        monkeypatch.setattr("nonstick.core.events.new_tag", lambda: bytes(8))
    store = Forgetful()
    async with bench(store) as (made, client):
        call = client.call("count", steps=6)
        made.allow(3)
        await client.has(f"{call.label}:1:3", call)
        assert call.task is not None
        call.task.cancel()
        store.lose(2)
        made.allow(4)
        await ended(store, call)
        await client.resume(call)
    found = judge(made.history.records)
    # The store did lose something.
    found = [one for one in found if one.promise == "P3"]
    assert found == [] if tags else found, found
    assert ("stream_lost" in str(call.terminal)) == tags


async def ended(store: MemoryStore, call: Call) -> None:
    """Returns once the call's terminal event is in the log."""
    async with asyncio.timeout(60):
        while True:
            for session in store._sessions.values():
                if any(b'"result"' in event.data for event in session.events.values()):
                    return
            await asyncio.sleep(0.01)
