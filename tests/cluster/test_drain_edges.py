"""What else may happen while a node drains, and at its very end (P8)."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import mcp_types as types
import pytest
from mcp.server import MCPServer, Server
from mcp.server.mcpserver import Context as ToolContext

import nonstick
from nonstick import current_connection
from nonstick.core.names import session_key
from nonstick.core.record import OWNER, Record
from nonstick.store import Batch
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import HEADERS
from tests.cluster.conftest import MakeStore, one
from tests.cluster.servers import messages, opening
from tests.cluster.sse import DEADLINE, getting, posting
from tests.cluster.stage import Context, HeldStore, call, eventually, node_of, notification, staged, text_of
from tests.cluster.test_placement import Desk, desk, lose, use

pytestmark = pytest.mark.anyio


async def test_request_during_lifespans_end_is_served() -> None:
    """P8: a host may still have connections then; 500 would say that nonstick does not run."""
    began, may_end, leave = asyncio.Event(), asyncio.Event(), asyncio.Event()
    server = MCPServer[Any]("ends")

    @server.tool()
    async def wait(ctx: ToolContext[Any, Any]) -> str:
        began.set()
        await may_end.wait()
        return "done"

    @server.tool()
    async def quick() -> str:
        return "quick"

    app = nonstick.app(server, store="memory:", grace=DEADLINE, window=DEADLINE)
    running = asyncio.Event()

    async def live() -> None:
        async with app.lifespan():
            running.set()
            await leave.wait()

    host = asyncio.create_task(live())
    transport = httpx2.ASGITransport(app=app)
    async with asyncio.timeout(DEADLINE), httpx2.AsyncClient(transport=transport) as client:
        await running.wait()
        url = "http://127.0.0.1:8000/mcp"
        opened = await client.post(url, json=opening(), headers=HEADERS)
        headers = {**HEADERS, "mcp-session-id": opened.headers["mcp-session-id"]}
        waiting = asyncio.create_task(client.post(url, json=call("wait", 1), headers=headers))
        await began.wait()
        leave.set()
        await eventually(lambda: app.manager._node is None or app.manager._node.services.drain.begun)
        assert text_of((await client.post(url, json=call("quick", 2), headers=headers)).json()) == "quick"
        may_end.set()
        assert text_of((await waiting).json()) == "done"
        await host
        assert (await client.post(url, json=call("quick", 3), headers=headers)).status_code == 500


async def test_stopping_node_returns_its_lease(make_store: MakeStore) -> None:
    """P7, P8: nobody waits until it would have lapsed."""
    async with staged(make_store, lease=600.0) as (_, a, b, __):
        name = a.app.manager.node

        async def holds() -> bool:
            return not await node_of(b).services.store.lapsed([name])

        await eventually(holds)
        await a.stop()
        assert await node_of(b).services.store.lapsed([name]) == {name}


async def test_draining_node_takes_no_session(memory: MakeStore) -> None:
    """P7, P8: what waits is run elsewhere, where it may stay."""
    async with desk(memory, movable=True, grace=DEADLINE) as (stage, a, b, c):
        session = await a.open()
        key = session_key(session.id)
        await lose(stage, session, a)
        b.app.manager.begin_drain()
        placement, loaded = node_of(b).placement, await stage.store.load(key)
        with node_of(b).hydrate(session.id, key, loaded, Record.from_fields(loaded.fields)):
            await placement.settle(key, gone="gone-00000000")
        assert key not in placement._working
        assert (await stage.store.load(key)).fields[OWNER] == b"gone-00000000"
        # A client of it is handed over, with what it asked in the log.
        async with posting(b, session, call("use", 1)) as stream:
            events = await stream.events()
            assert events[-1].retry == 1000
        async with getting(c, session, events[0].id) as resumed:
            assert text_of((await resumed.rest())[-1]) == "101"
        assert (await stage.store.load(key)).fields[OWNER] == node_of(c).services.node_id.encode()


async def test_session_moves_after_its_notifications_handler(memory: MakeStore) -> None:
    """P8: that is work too, and mostly nothing follows it."""

    class Roots(Desk):
        def server(self) -> Server[Any]:
            server = super().server()

            async def changed(ctx: Context, params: Any) -> None:
                self.open("handling")
                await self.door("handled")

            server.add_notification_handler("notifications/roots/list_changed", types.NotificationParams, changed)
            return server

    async def rehydrate(connection: Any) -> None:
        await stage.rehydrate(connection)

    async with Roots(memory, rehydrate=rehydrate, grace=DEADLINE) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        assert (await b.post(notification("notifications/roots/list_changed"), session)).status_code == 202
        await stage.reached("handling")
        a.app.manager.begin_drain()
        assert await use(b, session, 1) == 1
        stage.open("handled")
        await eventually(lambda: session_key(session.id) not in node_of(a).sessions)
        assert await use(b, session, 2) == 101


async def test_session_idle_mid_move_moves_too() -> None:
    """P8: whichever ends while the store is asked."""
    stores: list[HeldStore] = []
    shared = one(MemoryStore())

    def gives_up(key: str, changes: dict[str, bytes]) -> bool:
        return changes.get(OWNER) == b""

    def make_store() -> Any:
        stores.append(HeldStore(shared(), "update", after=False, when=gives_up))
        return stores[-1]

    async with desk(make_store, movable=True, grace=DEADLINE, window=0.02) as (stage, a, b, _):
        busy, idle = await a.open(), await a.open()
        async with posting(a, busy, call("wait", 1, texts=["0"])) as stream:
            await stream.message()
            held = stores[1]  # the first is the stage's own
            held.holding = True
            a.app.manager.begin_drain()
            await held.held.wait()
            stage.open("go on")
            assert text_of(await stream.outcome()) == "done 1"
        await eventually(lambda: not node_of(a).sessions[session_key(busy.id)].exchanges)
        held.released.set()
        await eventually(lambda: not node_of(a).sessions)
        answers = [await b.post(call("use", 2), session) for session in (idle, busy)]
        assert [text_of(messages(answer)[-1]) for answer in answers] == ["101", "101"]


async def test_relay_runs_on_no_dying_state() -> None:
    """P7, P8: its owner took it over, and stopped before it heard so."""
    stores: list[HeldStore] = []
    shared = one(MemoryStore())

    def takes_over(key: str, batch: Batch) -> bool:
        return batch.take_over

    def make_store() -> Any:
        stores.append(HeldStore(shared(), "append", after=True, when=takes_over))
        return stores[-1]

    async with desk(make_store, movable=True, window=0.02) as (stage, a, b, _):
        ran: list[str] = []

        @stage.tool
        async def owe(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open_page(current_connection())
            current_connection().exit_stack.push_async_callback(stage.door, "cleaned up")
            return "owed"

        @stage.tool
        async def count(ctx: Context, arguments: dict[str, Any]) -> str:
            ran.append(str(current_connection().state.get("page")))
            return "counted"

        session = await a.open()
        assert text_of((await a.post(call("owe", 1), session)).json()) == "owed"
        for store in stores:
            store.holding = True
        held = stores[1]  # the first is the stage's own
        async with posting(b, session, call("count", 2)) as stream:
            await held.held.wait()
            stopping = asyncio.create_task(a.stop())
            holding = node_of(a).placement.held.get(session_key(session.id))
            assert holding is not None
            await eventually(lambda: not holding.ready or bool(ran))
            held.released.set()
            outcome = await stream.outcome()
            assert outcome["error"]["data"] == {"reason": "node_lost", "retrySafe": True}
            assert ran == []
            stage.open("cleaned up")
            await stopping
