"""What happens at the edges of a session that one node holds: ids that come again, ends, owners that seem lost."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import mcp_types as types
import pytest
from mcp.server.connection import Connection

from nonstick.core.names import session_key
from nonstick.core.record import OWNER
from nonstick.errors import SessionNotFound
from nonstick.store import Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Session
from tests.cluster.conftest import MakeStore
from tests.cluster.servers import messages
from tests.cluster.sse import getting, posting
from tests.cluster.stage import (
    Context,
    DownStore,
    HeldStore,
    Stage,
    call,
    cancel,
    eventually,
    notification,
    text_of,
)
from tests.cluster.test_placement import desk, lose, use

pytestmark = pytest.mark.anyio

FOR_EVER = 600.0
"""Seconds that do not pass."""


async def owner_of(stage: Stage, session: Session) -> str:
    return (await stage.store.load(session_key(session.id))).fields[OWNER].decode()


async def test_relayed_requests_id_is_freed(memory: MakeStore) -> None:
    """P1: a client may use it again, at whichever node."""
    async with desk(memory) as (_, a, b, c):
        session = await a.open()
        # Its view stays on b.
        async with getting(b, session) as standalone:
            await standalone.event()
            assert [await use(member, session, 1) for member in (b, b, c, a, b)] == [1, 2, 3, 4, 5]


async def test_cancel_hits_no_later_relayed_request(memory: MakeStore) -> None:
    """P5: that has the same id."""
    async with desk(memory) as (stage, a, b, c):
        session = await a.open()
        async with posting(b, session, call("wait", 7)) as stream:
            await stage.reached("running")
            assert (await c.post(cancel(7), session)).status_code == 202
            assert text_of(await stream.outcome()) == "Request cancelled"

        async def used_up() -> bool:
            return not (await stage.store.load(session_key(session.id))).cancels

        await eventually(used_up)
        assert await use(b, session, 7) == 1


async def test_deleted_sessions_relayed_request_gets_404(memory: MakeStore) -> None:
    """P6: within its window."""
    async with desk(memory, window=FOR_EVER) as (stage, a, b, c):
        session = await a.open()
        async with posting(b, session, call("wait")) as stream:
            await stage.reached("running")
            assert (await c.delete(session)).status_code == 200
            response = await stream.response()
            assert (response.status_code, response.json()["id"]) == (404, None)
            await stage.reached("stopped")


async def test_doubtful_relay_says_so(memory: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: not 503, with which the client would send it again."""
    monkeypatch.setattr("nonstick.node.relay._PATIENCE", 0.05)
    stores: list[DownStore] = []

    def make() -> Store:
        stores.append(DownStore(memory(), "append", after=True))
        return stores[-1]

    async with desk(make) as (_, a, b, _c):
        session = await a.open()
        stores[2].holding = True
        answer = await b.post(call("use", 1), session)
        assert answer.status_code == 200
        assert answer.json()["id"] == 1
        assert answer.json()["error"]["data"] == {"reason": "store_unavailable", "retrySafe": False}


@pytest.mark.parametrize("limit", ["max_streams", "max_streams_per_node"])
async def test_relays_take_places_where_they_wait(memory: MakeStore, limit: str) -> None:
    """P10: until their answers are out."""
    options: dict[str, Any] = {limit: 3}
    async with desk(memory, **options) as (stage, a, b, _):
        session = await a.open()
        names = ("1", "2", "3")
        async with (
            posting(b, session, call("wait", 1, name="1")) as first,
            posting(b, session, call("wait", 2, name="2")) as second,
            posting(b, session, call("wait", 3, name="3")) as third,
        ):
            for name in names:
                await stage.reached(f"running {name}")
            full = await b.post(call("use", 4), session)
            assert full.status_code == {"max_streams": 429, "max_streams_per_node": 503}[limit]
            assert full.headers["retry-after"] == "1"
            code = {"max_streams": types.INVALID_REQUEST, "max_streams_per_node": types.INTERNAL_ERROR}[limit]
            assert full.json()["error"]["code"] == code
            for name in names:
                stage.open(f"go on {name}")
            for stream in (first, second, third):
                assert text_of(await stream.outcome()) == "done 1"
        assert await use(b, session, 4) == 1


async def test_session_being_built_runs_nothing(memory: MakeStore) -> None:
    """P7: what comes to its new owner meanwhile waits for the state."""
    built = asyncio.Event()

    async def rehydrate(connection: Connection) -> None:
        stage.open("builds")
        await stage.door("may build")
        stage.open_page(connection, 100)
        built.set()

    async with desk(memory, rehydrate=rehydrate) as (stage, a, b, _):
        session = await a.open()
        await lose(stage, session, a)
        async with posting(b, session, call("use", 1)) as first:
            await stage.reached("builds")
            async with posting(b, session, call("use", 2)) as second:

                async def relayed() -> bool:
                    return len([event for event in await stage.log(session) if event.position == event.stream]) == 2

                await eventually(relayed)
                stage.open("may build")
                answers = [text_of(await stream.outcome()) for stream in (first, second)]
        assert sorted(answers) == ["101", "102"]


class Blinking(MemoryStore):
    """Every second time that it is asked, this node's lease seems to have lapsed."""

    def __init__(self) -> None:
        super().__init__()
        self.node = ""
        self.asked = 0

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        if self.node in nodes:
            self.asked += 1
            return {self.node} if self.asked % 2 else set()
        return await super().lapsed(nodes)


async def test_seemingly_lost_owner_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """P7: a node is lost that is seen dead for some time, without a sign of life in between."""
    monkeypatch.setattr("nonstick.session.rescue._BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr("nonstick.node.placement._CERTAIN_AFTER", 0.2)
    monkeypatch.setattr("nonstick.session.reader.LIVENESS_POLL", 0.05)
    store = Blinking()
    stores: list[HeldStore] = []

    def make() -> Store:
        stores.append(HeldStore(store, "append", after=False, when=lambda _, batch: batch.take_over))
        return stores[-1]

    async with desk(make, movable=True) as (stage, a, b, _):
        session = await a.open()
        assert await use(b, session) == 1
        # The owner is slow to take what is relayed to it, and whoever waits for it looks whether it lives.
        stores[1].holding = True
        store.node = await owner_of(stage, session)
        async with posting(b, session, call("use", 2)) as stream:
            began = asyncio.get_running_loop().time()
            await eventually(lambda: store.asked > 20 and asyncio.get_running_loop().time() - began > 0.5)
            stores[1].released.set()
            assert text_of(await stream.outcome()) == "2"
        assert await owner_of(stage, session) == store.node


async def test_store_forgets_a_lost_session(memory: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """P7, P10: once those that read its streams had time to read their end."""
    monkeypatch.setattr("nonstick.node.placement._LINGER", 0.05)
    async with desk(memory) as (stage, a, b, _):
        session = await a.open()
        await lose(stage, session, a)
        assert "error" in messages(await b.post(call("use"), session))[-1]

        async def gone() -> bool:
            try:
                await stage.store.load(session_key(session.id))
            except SessionNotFound:
                return True
            return False

        await eventually(gone)


async def test_notification_finishes_before_its_session_moves(memory: MakeStore) -> None:
    """P8: a node that drains leaves a session to others when nothing of it runs."""
    async with desk(memory, movable=True) as (stage, a, b, _):

        async def handle(ctx: Context, params: types.NotificationParams) -> None:
            stage.open("handles")
            await stage.door("may end")
            stage.open("handled")

        for member in (a, b):
            server = member.app.manager.app
            server.add_notification_handler("x/long", types.NotificationParams, handle)
        session = await a.open()
        owner = await owner_of(stage, session)
        assert (await a.post(notification("x/long"), session)).status_code == 202
        await stage.reached("handles")
        a.app.manager.begin_drain()
        other = await a.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}, session)
        assert other.json()["result"] == {}
        assert await owner_of(stage, session) == owner
        stage.open("may end")
        await stage.reached("handled")
