"""A session that one node opened is a session on every node, whole, until it ends everywhere."""

from __future__ import annotations

import asyncio
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from mcp import Client
from mcp.server import Server
from mcp.server.context import CallNext, HandlerResult
from mcp.shared.exceptions import MCPError

from nonstick import current_connection
from nonstick.core.names import session_key
from nonstick.core.record import Record, subscription_field
from nonstick.errors import SessionNotFound
from nonstick.log.cluster_log import CLUSTER_KEY
from nonstick.node.node import Node
from nonstick.store import Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing import ManualClock
from nonstick.testing.cluster import Cluster, Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.servers import Context, World, answer, call, error, eventually, messages, opening, request

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def world(make_store: MakeStore, **options: Any) -> AsyncIterator[tuple[World, Cluster, Store]]:
    """Three nodes, and a further instance of their store to look into it."""
    shared = World()
    async with make_store() as store, Cluster(shared.server, make_store, **options) as cluster:
        yield shared, cluster, store


def node_of(member: Member) -> Node:
    node = member.app.manager._node
    assert node is not None
    return node


async def gone(store: Store, session: Session) -> bool:
    try:
        await store.load(session_key(session.id))
    except SessionNotFound:
        return True
    return False


# ---- P1: any node


async def test_every_node_serves_every_session(make_store: MakeStore) -> None:
    """P1."""
    async with world(make_store) as (_, (a, b, c), _store):
        session = await a.open(initialized=False)
        done = await b.post({"jsonrpc": "2.0", "method": "notifications/initialized"}, session)
        assert done.status_code == 202
        for number in range(9):
            member = (c, a, b)[number % 3]
            response = await member.post(call("echo", number, text=number), session)
            assert answer(response) == {"text": number}
            assert response.headers["mcp-session-id"] == session.id
            assert response.headers["nonstick-node"] == member.name


async def test_ids_are_random_and_unique(memory: MakeStore) -> None:
    """P1: they have 192 random bits."""
    async with world(memory) as (_, cluster, _store):
        ids = [(await cluster[n % 3].open(initialized=False)).id for n in range(30)]
    assert len(set(ids)) == len(ids)
    for session_id in ids:
        assert len(session_id) == 40
        assert set(session_id) <= set(string.ascii_letters + string.digits + "-_")
    # No position is constant: 30 random characters out of 64 are never all the same.
    assert all(len(set(column)) > 1 for column in zip(*ids, strict=True))


async def test_work_left_by_initialize_knows_client(memory: MakeStore) -> None:
    """P2: the view of a session that nothing uses is forgotten, but not by who is still at work for it."""
    shared, answered = World(), asyncio.Event()
    seen: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        await answered.wait()
        connection = current_connection()
        seen.set_result((connection.client_params, connection.protocol_version, connection.session_id))

    async def leave_work(ctx: Any, call_next: CallNext) -> HandlerResult:
        if ctx.method == "initialize":
            working.append(asyncio.create_task(work()))
        return await call_next(ctx)

    def server() -> Server[Any]:
        made = shared.server()
        made.middleware.append(leave_work)
        return made

    working: list[asyncio.Task[None]] = []
    async with memory() as _, Cluster(server, memory) as (a, _b, _c):
        session = await a.open(version="2025-06-18")
        assert node_of(a).sessions == {}
        answered.set()
        client, version, name = await seen
    assert client.client_info.name
    assert (version, name) == ("2025-06-18", session.id)


async def test_invented_id_is_refused(make_store: MakeStore) -> None:
    """P1: neither adopted nor replaced."""
    async with world(make_store) as (_, (a, _b, _c), store):
        made_up = Session("A" * 32, "2025-11-25", {})
        response = await a.post(opening(), made_up)
        assert response.status_code == 404
        assert "mcp-session-id" not in response.headers
        assert await gone(store, made_up)


async def test_every_node_serves_sessionless_clients(memory: MakeStore) -> None:
    """They have no session; the official client asks for that protocol by itself."""
    async with world(memory) as (shared, cluster, _store):
        for member in cluster:
            async with Client(member.url) as client:
                result = await client.call_tool("echo", {"text": member.name})
                assert member.name in str(result.content)
                assert client.protocol_version == "2026-07-28"
        assert shared.starts == 3


async def test_one_lifespan_serves_both_eras(memory: MakeStore) -> None:
    async with world(memory, nodes=1) as (shared, (a,), _store):
        session = await a.open()
        assert answer(await a.post(call("who"), session))["lifespan"] == "started 1"
        async with Client(a.url) as client:
            await client.call_tool("echo", {})
        assert shared.starts == 1


# ---- P2: the whole session


async def test_hydrated_session_knows_its_client(make_store: MakeStore) -> None:
    """P2: protocol version, client info, capabilities, initialized."""
    async with world(make_store) as (_, (a, b, c), _store):
        session = await a.open(version="2025-06-18", capabilities={"roots": {"listChanged": True}}, initialized=False)
        before = answer(await b.post(call("who"), session))
        assert before["version"] == "2025-06-18"
        assert before["client"] == {"name": "test", "version": "1"}
        assert before["capabilities"] == {"roots": {"list_changed": True}}
        assert before["initialized"] is False
        await b.post({"jsonrpc": "2.0", "method": "notifications/initialized"}, session)
        assert answer(await c.post(call("who"), session)) == before | {
            "initialized": True,
            "lifespan": answer(await c.post(call("who"), session))["lifespan"],
        }


async def test_log_level_holds_on_every_node(make_store: MakeStore) -> None:
    """P2."""
    async with world(make_store) as (_, (a, b, c), _store):
        session = await a.open()
        levels = ["debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"]
        assert _heard(await b.post(call("shout", levels=levels), session)) == levels
        assert (await a.post(request("logging/setLevel", {"level": "warning"}), session)).status_code == 200
        assert _heard(await b.post(call("shout", levels=levels), session)) == levels[3:]
        await c.post(request("logging/setLevel", {"level": "debug"}), session)
        assert _heard(await b.post(call("shout", levels=levels), session)) == levels


async def test_bad_log_level_changes_nothing(memory: MakeStore) -> None:
    """P2: only a request that succeeded changes the record."""
    async with world(memory) as (_, (a, b, _c), store):
        session = await a.open()
        await a.post(request("logging/setLevel", {"level": "error"}), session)
        assert error(await b.post(request("logging/setLevel", {"level": "loud"}), session))["code"] == -32602
        assert (await store.load(session_key(session.id))).fields["level"] == b"error"


def _heard(response: Any) -> list[str]:
    return [m["params"]["level"] for m in messages(response) if m.get("method") == "notifications/message"]


async def test_resource_subscriptions_are_in_the_record(make_store: MakeStore) -> None:
    """P2."""
    async with world(make_store) as (_, (a, b, c), store):
        session = await a.open()
        for number, member in enumerate((a, b, c)):
            done = await member.post(request("resources/subscribe", {"uri": f"memo://{number}"}), session)
            assert done.status_code == 200
        await a.post(request("resources/unsubscribe", {"uri": "memo://1"}), session)
        fields = (await store.load(session_key(session.id))).fields
        assert Record.from_fields(fields).subscriptions == {"memo://0", "memo://2"}
        assert fields[subscription_field("memo://2")] == b"memo://2"


async def test_resource_subscriptions_are_limited(memory: MakeStore) -> None:
    """P10: the request for one too many gets an error that says so; one that is given up makes room."""
    async with world(memory, max_subscriptions=2) as (_, cluster, store):
        session = await cluster[0].open()

        async def subscribe(member: Member, uri: str) -> Any:
            return messages(await member.post(request("resources/subscribe", {"uri": uri}, 7), session))[-1]

        for number, member in enumerate(cluster):
            assert ("result" in await subscribe(member, f"memo://{number}")) == (number < 2)
        refused = await subscribe(cluster[1], "memo://2")
        assert refused["id"] == 7
        assert "unsubscribe" in refused["error"]["message"]
        assert "result" in await subscribe(cluster[2], "memo://0")
        await cluster[0].post(request("resources/unsubscribe", {"uri": "memo://1"}), session)
        assert "longer" in (await subscribe(cluster[1], "memo://" + "x" * 3000))["error"]["message"]
        assert "result" in await subscribe(cluster[1], "memo://2")
        fields = (await store.load(session_key(session.id))).fields
        assert Record.from_fields(fields).subscriptions == {"memo://0", "memo://2"}


async def test_client_information_is_limited(memory: MakeStore) -> None:
    """P10: when it opens a session, and when it initializes it again; the session is as it was."""
    async with world(memory, max_initialize_bytes=500) as (_, cluster, store):
        session = await cluster[0].open()
        before = (await store.load(session_key(session.id))).fields
        long = opening(clientInfo={"name": "x" * 500, "version": "1"})
        for member in cluster:
            for owner in (None, session):
                refused = await member.post(long, owner)
                assert refused.status_code == 400
                assert error(refused)["code"] == -32602
                assert "500 bytes" in error(refused)["message"]
        assert (await store.load(session_key(session.id))).fields == before
        assert answer(await cluster[1].post(call("echo", x=1), session)) == {"x": 1}


async def test_session_state_follows_the_session(make_store: MakeStore) -> None:
    """P2."""
    async with world(make_store) as (_, (a, b, c), _store):
        session = await a.open()
        await a.post(call("put", user="ada", cart=[1, {"two": None}]), session)
        assert answer(await b.post(call("get"), session)) == {"user": "ada", "cart": [1, {"two": None}]}
        await b.post(call("put", user="grace"), session)
        await c.post(call("drop", key="cart"), session)
        assert answer(await a.post(call("get"), session)) == {"user": "grace"}


async def test_concurrent_writes_all_survive(make_store: MakeStore) -> None:
    """P2: changed keys only are written."""
    async with world(make_store) as (shared, cluster, _store):
        session = await cluster[0].open()
        async with asyncio.TaskGroup() as group:
            for number, member in enumerate(cluster):
                waiting = call("wait", number, door=f"door {number}", **{f"key {number}": number})
                group.create_task(member.post(waiting, session))
            for number in range(3):
                await shared.saw(f"at door {number}")
            for number in range(3):
                shared.doors[f"door {number}"].set()
        state = answer(await cluster[1].post(call("get", 9), session))
        assert state == {"key 0": 0, "key 1": 1, "key 2": 2}


async def test_saved_state_reaches_used_view(memory: MakeStore) -> None:
    """P2: a node's live view is brought up to date by every request."""
    async with world(memory) as (shared, (a, b, _c), _store):
        session = await a.open()
        waiting = asyncio.create_task(a.post(call("wait", 1, door="d", own=1), session))
        await shared.saw("at d")
        await b.post(call("put", 2, others=2), session)
        assert answer(await a.post(call("get", 3), session)) == {"others": 2}
        shared.doors["d"].set()
        await waiting
        assert answer(await b.post(call("get", 4), session)) == {"others": 2, "own": 1}


# ---- visible only when it succeeded


async def test_session_appears_after_its_initialize(make_store: MakeStore) -> None:
    """P2."""
    shared, calls = World(), CountingStores(make_store)

    def server() -> Server[Any]:
        server = shared.server()

        async def hold(ctx: Context, call_next: CallNext) -> HandlerResult:
            result = await call_next(ctx)
            if ctx.method == "initialize":
                current_connection().state["early"] = "bird"
                shared.happened.append("held")
                await shared.doors["initialize"].wait()
            return result

        server.middleware.append(hold)
        return server

    async with Cluster(server, calls.make) as cluster:
        opened = asyncio.create_task(cluster[0].post(opening()))
        await shared.saw("held")
        assert calls.created == []
        shared.doors["initialize"].set()
        response = await opened
        session = Session(response.headers["mcp-session-id"], "2025-11-25", {})
        assert calls.created == [session_key(session.id)]
        assert answer(await cluster[1].post(call("get"), session)) == {"early": "bird"}


@pytest.mark.parametrize("failing", ["middleware", "params", "state"])
async def test_failed_initialize_leaves_nothing(make_store: MakeStore, failing: str) -> None:
    """P2: no session id, nothing in the store, and its clean-up has run."""
    shared, calls = World(), CountingStores(make_store)

    def server() -> Server[Any]:
        server = shared.server()

        async def refuse(ctx: Context, call_next: CallNext) -> HandlerResult:
            current_connection().exit_stack.callback(shared.happened.append, "cleaned up")
            if failing == "middleware":
                raise MCPError(code=-32001, message="not today")
            result = await call_next(ctx)
            if failing == "state":
                current_connection().state["list"] = []
                current_connection().state["list"].append(object())
            return result

        server.middleware.append(refuse)
        return server

    async with Cluster(server, calls.make) as cluster:
        message = request("initialize", {"protocolVersion": 7}) if failing == "params" else opening()
        response = await cluster[0].post(message)
        assert response.status_code == 200
        assert error(response)["code"] == {"middleware": -32001, "params": -32602, "state": -32603}[failing]
        assert "mcp-session-id" not in response.headers
        assert calls.created == []
        await shared.saw("cleaned up")
        assert not node_of(cluster[0]).sessions


class CountingStores:
    """Stores that note which sessions were created."""

    def __init__(self, make_store: MakeStore) -> None:
        self._make = make_store
        self._seen: list[Store] = []
        self.created: list[str] = []

    def make(self) -> Store:
        store = self._make()
        if store in self._seen:  # in memory: the one instance
            return store
        self._seen.append(store)
        create = store.create

        async def noting(key: str, *args: Any, **more: Any) -> None:
            await create(key, *args, **more)
            if key != CLUSTER_KEY:
                self.created.append(key)

        store.create = noting  # type: ignore[method-assign]
        return store


# ---- P6: the end


async def test_delete_anywhere_is_404_everywhere(make_store: MakeStore) -> None:
    """P6."""
    async with world(make_store) as (_, (a, b, c), store):
        session = await a.open()
        for member in (a, b, c):
            await member.post(call("echo"), session)
        deleted = await b.delete(session)
        assert deleted.status_code == 200
        for member in (a, b, c):
            refused = await member.post(call("echo"), session)
            assert refused.status_code == 404
            assert error(refused) == {"code": -32600, "message": "Session not found"}
        assert (await c.delete(session)).status_code == 404
        assert await gone(store, session)


async def test_session_expires_by_stores_clock() -> None:
    """P1, P6: no node's own clock counts."""
    clock = ManualClock()
    async with world(one(MemoryStore(clock=clock)), app_options={"session_idle_timeout": 100.0}) as (_, cluster, _s):
        session = await cluster[0].open()
        for member in cluster:
            await clock.advance(90)
            # Used in time, so it lives on.
            assert (await member.post(call("echo"), session)).status_code == 200
        await clock.advance(101)
        for member in cluster:
            assert (await member.post(call("echo"), session)).status_code == 404
            assert (await member.client.get(member.url, headers=_get(session))).status_code == 404


def _get(session: Session) -> dict[str, str]:
    return {"accept": "text/event-stream", **session.headers}


async def test_remote_delete_cleans_up_once(make_store: MakeStore) -> None:
    """P6."""
    async with world(make_store) as (shared, (a, b, c), _store):
        session = await a.open()
        await a.post(call("owe"), session)
        await b.post(call("echo"), session)
        assert "cleaned up" not in shared.happened
        assert (await c.delete(session)).status_code == 200
        await shared.saw("cleaned up")
        assert shared.happened.count("cleaned up") == 1
        await eventually(lambda: not node_of(a).sessions)
    assert shared.happened.count("cleaned up") == 1


async def test_expiry_runs_the_clean_up() -> None:
    """P6: expiry looks like an end."""
    clock = ManualClock()
    async with world(one(MemoryStore(clock=clock)), app_options={"session_idle_timeout": 100.0}) as (
        shared,
        cluster,
        _,
    ):
        session = await cluster[0].open()
        await cluster[0].post(call("owe"), session)
        await clock.advance(101)
        await shared.saw("cleaned up")


async def test_deleted_sessions_request_gets_404(make_store: MakeStore) -> None:
    """P6: also within the window in which it is no stream yet."""
    async with world(make_store, window=0.05) as (shared, (a, b, _c), _store):
        session = await a.open()
        running = asyncio.create_task(a.post(call("wait", door="never", key=1), session))
        await shared.saw("at never")
        assert (await b.delete(session)).status_code == 200
        response = await running
        assert response.status_code == 404 or not any("result" in message for message in messages(response))
        await eventually(lambda: not node_of(a).sessions)


# ---- live views


async def test_concurrent_requests_share_one_view(memory: MakeStore) -> None:
    async with world(memory) as (shared, (a, b, _c), _store):
        session = await a.open()
        waiting = [asyncio.create_task(a.post(call("wait", n, door=f"d{n}"), session)) for n in (1, 2)]
        for number in (1, 2):
            await shared.saw(f"at d{number}")
        assert len(node_of(a).sessions) == 1
        assert not node_of(b).sessions
        for number in (1, 2):
            shared.doors[f"d{number}"].set()
        first, second = [answer(response) for response in await asyncio.gather(*waiting)]
        assert first == second


async def test_idle_session_costs_a_node_nothing(make_store: MakeStore) -> None:
    """P10: no view of it is left."""
    async with world(make_store) as (_, cluster, _store):
        sessions = [await member.open() for member in cluster]
        for session in sessions:
            for member in cluster:
                assert (await member.post(call("put", x=1), session)).status_code == 200
        for member in cluster:
            await eventually(lambda member=member: not node_of(member).sessions)  # type: ignore[misc]


async def test_second_initialize_is_known_everywhere(make_store: MakeStore) -> None:
    """As the SDK; P2."""
    async with world(make_store) as (_, (a, b, _c), _store):
        session = await a.open()
        again = await a.post(opening("2025-06-18", clientInfo={"name": "other", "version": "2"}), session)
        assert again.headers["mcp-session-id"] == session.id
        assert messages(again)[-1]["result"]["protocolVersion"] == "2025-06-18"
        who = answer(await b.post(call("who"), session))
        assert (who["version"], who["client"]["name"]) == ("2025-06-18", "other")
