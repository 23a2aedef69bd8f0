"""Connections that go, and what they leave: the next one gets what they did not bring to their client."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from nonstick.core.events import Kind, kind_of
from nonstick.core.names import session_key
from nonstick.session import resumption
from nonstick.store import Batch
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Session
from tests.cluster.asgi import Call
from tests.cluster.conftest import MakeStore, one
from tests.cluster.sse import getting, posting
from tests.cluster.stage import Context, HeldStore, Stage, call, eventually, node_of, say, staged, texts_of

pytestmark = pytest.mark.anyio

TOOLS = "notifications/tools/list_changed"


def listening(member: Any, session: Session) -> Call:
    return Call(member.app, "GET", session.headers)


async def test_next_connection_hears_whatever_waited(memory: MakeStore) -> None:
    """P11: `left` claims only what the client has taken, not what waits in the outlet."""
    async with staged(memory, send_timeout=0.5) as (stage, a, b, c):
        session = await a.open()
        slow = listening(b, session)
        assert await slow.until(lambda: slow.last_id)
        slow.stop_reading()
        await c.app.cluster.notify_tools_changed()
        await slow.is_stuck()
        slow.go()
        await eventually(lambda: _has(stage, session, Kind.LEFT))
        async with getting(a, session) as stream:
            assert (await stream.message())["method"] == TOOLS
        slow.read_on()
        await slow.close()


async def _has(stage: Stage, session: Session, kind: Kind) -> bool:
    return kind in await stage.kinds(session)


async def test_leaving_follows_an_unfinished_greeting() -> None:
    """P3: a connection that goes while it says that it listens leaves after that, or others would wait for ever."""
    memory = MemoryStore()
    held: list[HeldStore] = []

    def make() -> Any:
        held.append(HeldStore(memory, "append", after=False, when=_listens))
        return held[-1]

    async with staged(make) as (stage, a, b, _c):
        session = await a.open()
        for store in held:
            store.holding = True
        goes = listening(b, session)
        await goes.begun()
        async with asyncio.timeout(60):
            await asyncio.wait(
                [asyncio.create_task(store.held.wait()) for store in held], return_when=asyncio.FIRST_COMPLETED
            )
        goes.go()
        await eventually(lambda: not node_of(b).services.readers)
        for store in held:
            store.holding = False
            store.released.set()
        await eventually(lambda: _has(stage, session, Kind.LEFT))
        kinds = [kind for kind in await stage.kinds(session) if kind in (Kind.LISTENING, Kind.LEFT)]
        assert kinds == [Kind.LISTENING, Kind.LEFT]
        await goes.close()


def _listens(_key: str, batch: Batch) -> bool:
    return any(kind_of(draft.data) is Kind.LISTENING for draft in batch.events)


async def test_gone_connection_hears_no_broadcasts(memory: MakeStore) -> None:
    """P10: a node keeps nothing of connections that went."""
    async with staged(memory) as (stage, a, b, _c):
        session = await a.open()
        async with AsyncExitStack() as stack:
            for _ in range(3):
                stream = await stack.enter_async_context(getting(b, session))
                await stream.event()
            assert node_of(b).services.cluster_log.hearers
        await eventually(lambda: not node_of(b).services.cluster_log.hearers)
        assert await _has(stage, session, Kind.LEFT)


class MissedOnce(MemoryStore):
    """Does not find one stream's first event, once."""

    first = 0
    missed = 0

    async def skim(self, key: str, *args: Any, **more: Any) -> Any:
        found = await super().skim(key, *args, **more)
        if (
            self.first
            and not self.missed
            and found
            and found[0].event.position == self.first
            and more.get("limit") == 1
        ):
            self.missed += 1
            return found[1:]
        return found


async def test_stream_missed_once_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3, P9: what was written before it was trimmed may still be on its way; only seen twice it is lost."""
    monkeypatch.setattr(resumption, "_EXISTENCE_POLL", 0.1)
    store = MissedOnce()
    async with staged(one(store)) as (stage, a, b, c):

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "0")
            await stage.door("go on")
            return "done"

        session = await a.open()
        async with posting(b, session, call("wait")) as stream:
            priming = await stream.event()
            async with getting(c, session, priming.id) as resumed:
                events = await stage.log(session)
                store.first = next(event.position for event in events if kind_of(event.data) is Kind.OPENED)
                await eventually(lambda: bool(store.missed))
                stage.open("go on")
                assert texts_of(await resumed.rest()) == ["0", "done"]


async def test_early_delete_stops_the_handler(memory: MakeStore) -> None:
    """P6: no node follows the log for it yet."""
    async with staged(memory, window=3600.0) as (stage, a, _b, _c):

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("running")
            try:
                await stage.door("never")
            finally:
                stage.open("stopped")
            return "done"

        session = await a.open()
        async with posting(a, session, call("wait")) as stream:
            await stage.reached("running")
            assert (await a.delete(session)).status_code == 200
            await stage.reached("stopped")
            assert (await stream.response()).status_code == 404


async def test_newer_releases_record_is_503(memory: MakeStore) -> None:
    """P9, P12: the session is there, and a node that knows the format serves it."""
    async with staged(memory) as (stage, a, b, _c):
        session = await a.open()
        key = session_key(session.id)
        await stage.store.update(key, {"v": b"9"})
        for message in (call("echo"), {"jsonrpc": "2.0", "method": "notifications/initialized"}):
            response = await b.post(message, session)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
        await stage.store.update(key, {"v": b"1"})
        assert (await b.post({"jsonrpc": "2.0", "id": 2, "method": "ping"}, session)).status_code == 200
