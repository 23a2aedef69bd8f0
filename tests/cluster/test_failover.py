"""A failover that lost acknowledged writes: it is reported, and nothing of one request gets into another (P3, P9).

The store is one in memory, whose sessions are put back to how they were some appends ago.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

import nonstick.log.writer
import nonstick.session.rescue
from nonstick import current_connection
from nonstick.core.events import Kind, draft
from nonstick.core.names import session_key
from nonstick.store import Batch
from nonstick.stores.memory import MemoryStore
from tests.cluster.conftest import one
from tests.cluster.sse import DEADLINE, getting, posting
from tests.cluster.stage import DownStore, call, eventually, say, staged, text_of

pytestmark = pytest.mark.anyio


class Failover:
    """What a replica had, to which the store falls back."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._sessions = copy.deepcopy(store._sessions)

    def happen(self) -> None:
        self._store._sessions = self._sessions
        for key in list(self._store._watches._by_key):
            self._store._watches.announce(key, None)


async def test_lost_streams_request_writes_nothing_more() -> None:
    """P3: the store gives the lost positions out again."""
    store = MemoryStore()
    async with staged(one(store), window=0.1) as (stage, a, b, c):

        @stage.tool
        async def lost(ctx: Any, args: dict[str, Any]) -> str:
            await say(ctx, "lost 1")
            await stage.door("go on lost")
            await say(ctx, "lost 2")
            return "lost done"

        @stage.tool
        async def later(ctx: Any, args: dict[str, Any]) -> str:
            await say(ctx, "later 1")
            await stage.door("go on later")
            return "later done"

        session = await a.open()
        failover = Failover(store)
        async with posting(a, session, call("lost", "x")) as first:
            assert text_of(await first.message()) == "lost 1"
            failover.happen()
            async with posting(b, session, call("later", "y")) as second:
                assert text_of(await second.message()) == "later 1"
                place = second.last_id
            stage.open("go on lost")
            # Its own client holds an id of what is lost: it comes back and hears so.
            assert await first.rest() == []
            async with getting(c, session, first.last_id) as resumed:
                (end,) = await resumed.rest()
                assert end["id"] == "x"
                assert end["error"]["data"]["reason"] == "stream_lost"
            async with getting(c, session, place) as resumed:
                stage.open("go on later")
                (end,) = await resumed.rest()
                assert (end["id"], text_of(end)) == ("y", "later done")


async def test_stream_with_a_hole_ends() -> None:
    """P3, P9: a client that has less than was lost cannot see the gap, so nothing may come after it."""
    store = MemoryStore()
    async with staged(one(store), window=0.1) as (stage, a, b, _c):

        @stage.tool
        async def count(ctx: Any, args: dict[str, Any]) -> str:
            await say(ctx, "1")
            await stage.door("two")
            await say(ctx, "2")
            stage.open("said two")
            await stage.door("three")
            await say(ctx, "3")
            return "done"

        session = await a.open()
        async with posting(a, session, call("count", 1)) as stream:
            assert text_of(await stream.message()) == "1"
            failover, place = Failover(store), stream.last_id
            stage.open("two")
            await stage.reached("said two")
            assert text_of(await stream.message()) == "2"
            failover.happen()
            # Another writer takes the place: no position shows that something is missing.
            await stage.store.append(session_key(session.id), Batch([draft(Kind.MESSAGE, b"{}")]))
            stage.open("three")
            (end,) = await stream.rest()
            assert end["error"]["data"] == {"reason": "stream_lost", "retrySafe": False}
        async with getting(b, session, place) as resumed:
            assert await resumed.rest() == [end]


async def test_silent_request_notices_lost_events() -> None:
    """P9: its client is told when the loss is seen, not when the handler has something to say."""
    store = MemoryStore()
    async with staged(one(store), window=0.1) as (stage, a, _b, _c):

        @stage.tool
        async def count(ctx: Any, args: dict[str, Any]) -> str:
            await stage.door("one")
            await say(ctx, "1")
            await asyncio.Event().wait()
            return "never"

        session = await a.open()
        async with posting(a, session, call("count", 1)) as stream:
            await stream.response()
            failover = Failover(store)
            stage.open("one")
            assert text_of(await stream.message()) == "1"
            failover.happen()
            (end,) = await stream.rest()
            assert end["error"]["data"]["reason"] == "stream_lost"


async def test_idless_client_hears_of_lost_stream() -> None:
    """P9: a client of before 2025-11-25 got no priming event, and would wait for ever."""
    store = MemoryStore()
    async with staged(one(store), window=0.1) as (stage, a, _b, _c):

        @stage.tool
        async def wait(ctx: Any, args: dict[str, Any]) -> str:
            await stage.door("go on")
            return "done"

        session = await a.open(version="2025-06-18")
        failover = Failover(store)
        async with posting(a, session, call("wait", 5)) as stream:
            await stream.response()
            failover.happen()
            stage.open("go on")
            (end,) = await stream.rest()
            assert end["id"] == 5
            assert end["error"]["data"] == {"reason": "stream_lost", "retrySafe": False}


async def test_resume_after_lost_end_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P7, P9: nobody works for the stream any more, and nobody answers when it is asked."""
    monkeypatch.setattr(nonstick.session.rescue, "_PROBE_AFTER_SECONDS", 1.5)
    store = MemoryStore()
    async with staged(one(store), window=0.1, lease=1.0, max_stall=2.0) as (stage, a, b, _c):

        @stage.tool
        async def count(ctx: Any, args: dict[str, Any]) -> str:
            await say(ctx, "1")
            await stage.door("go on")
            return "done"

        session = await a.open()
        async with posting(a, session, call("count", 1)) as stream:
            assert text_of(await stream.message()) == "1"
            failover, place = Failover(store), stream.last_id
            stage.open("go on")
            assert [text_of(message) for message in await stream.rest()] == ["done"]
        failover.happen()
        async with getting(b, session, place) as resumed, asyncio.timeout(DEADLINE):
            (end,) = await resumed.rest()
            assert end["error"]["data"]["reason"] == "node_lost"


async def test_running_request_answers_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """P7: a tool may be silent for long; a resumed client waits for it."""
    monkeypatch.setattr(nonstick.session.rescue, "_PROBE_AFTER_SECONDS", 1.2)
    store = MemoryStore()
    async with staged(one(store), window=0.1, lease=1.0, max_stall=2.0) as (stage, a, b, _c):

        @stage.tool
        async def think(ctx: Any, args: dict[str, Any]) -> str:
            await say(ctx, "1")
            await stage.door("go on")
            return "done"

        session = await a.open()
        async with posting(a, session, call("think", 1)) as stream:
            assert text_of(await stream.message()) == "1"
            async with getting(b, session, stream.last_id) as resumed:

                async def asked_twice() -> bool:
                    kinds = [kind.name for kind in await stage.kinds(session) if kind is not None]
                    return kinds.count("ALIVE") >= 2

                await eventually(asked_twice)
                stage.open("go on")
                assert [text_of(message) for message in await resumed.rest()] == ["done"]
            assert [text_of(message) for message in await stream.rest()] == ["done"]


async def test_unsaveable_state_asks_for_no_repeat() -> None:
    """P9: it ran, so 503 would have it run twice."""
    store = MemoryStore()
    downs: list[DownStore] = []

    def make() -> Any:
        downs.append(DownStore(store, "update", after=False))
        return downs[-1]

    async with staged(make) as (stage, a, _b, _c):
        runs: list[int] = []

        @stage.tool
        async def put(ctx: Any, args: dict[str, Any]) -> str:
            runs.append(1)
            current_connection().state["key"] = 1
            return "done"

        session = await a.open()
        for down in downs:
            down.holding = True
        answer = await a.post(call("put", 5), session)
        assert answer.status_code == 200
        assert answer.json()["id"] == 5
        assert answer.json()["error"]["data"] == {"reason": "state_not_saved", "retrySafe": False}
        assert runs == [1]


async def test_stream_closed_after_answer_never_opens() -> None:
    """P10: nobody would ever end it."""
    store = MemoryStore()
    async with staged(one(store), window=5.0) as (stage, a, _b, _c):
        closing: list[asyncio.Task[None]] = []

        @stage.tool
        async def answer(ctx: Any, args: dict[str, Any]) -> str:
            async def later() -> None:
                await stage.door("answered")
                await ctx.close_sse_stream()

            closing.append(asyncio.create_task(later()))
            return "done"

        session = await a.open()
        assert text_of((await a.post(call("answer", 1), session)).json()) == "done"
        stage.open("answered")
        await closing[0]
        assert await stage.kinds(session) == []


async def test_messages_outlast_an_outage_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P3, P9: the first is in doubt, those after it wait for it."""
    monkeypatch.setattr(nonstick.log.writer, "_PATIENCE", 0.2)
    store = MemoryStore()
    downs: list[DownStore] = []

    def make() -> Any:
        downs.append(DownStore(store, "append", after=False))
        return downs[-1]

    async with staged(make, window=5.0) as (stage, a, _b, _c):

        @stage.tool
        async def count(ctx: Any, args: dict[str, Any]) -> str:
            for number in range(1, 7):
                if number == 3:
                    for down in downs:
                        down.holding = True
                if number == 6:
                    for down in downs:
                        down.holding = False
                await say(ctx, str(number))
            return "done"

        session = await a.open()
        async with posting(a, session, call("count", 1)) as stream:
            assert [text_of(message) for message in await stream.rest()] == ["1", "2", "3", "4", "5", "6", "done"]
