"""What FastMCP keeps for a session, looked at from the inside. What its clients see: tests/clients/test_fastmcp.py."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastmcp import Context, FastMCP
from fastmcp.server.middleware import Middleware
from mcp.shared.exceptions import MCPError

import nonstick
from nonstick.security import session_key
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Member
from tests.cluster.servers import call, error, eventually, messages, opening, request

pytestmark = pytest.mark.anyio


class OnOpening(Middleware):
    """Keeps something for the session before it is open."""

    async def on_initialize(self, context: Any, call_next: Any) -> Any:
        assert context.fastmcp_context is not None
        await context.fastmcp_context.set_state("greeting", "hello")
        if context.message.params.client_info.name == "bad":
            raise MCPError(-32000, "go away")
        return await call_next(context)


def make(cluster: nonstick.Cluster) -> FastMCP[Any]:
    server = FastMCP[Any](
        "kept",
        session_state_store=cluster.session_state_store,
        request_state_security=cluster.request_state_security,
        middleware=[OnOpening()],
    )

    @server.tool
    async def put(key: str, value: Any, ctx: Context) -> str:
        await ctx.set_state(key, value)
        return ctx.session_id

    @server.tool
    async def get(key: str, ctx: Context) -> Any:
        return {"value": await ctx.get_state(key)}

    return server


@asynccontextmanager
async def nodes(store: MemoryStore, **options: Any) -> AsyncIterator[list[Member]]:
    members = []
    try:
        for name in ("a", "b", "c"):
            cluster = nonstick.Cluster()
            app = nonstick.app(make(cluster), store=store, cluster=cluster, node_name=name, grace=2.0, **options)
            members.append(Member(name, app))
            await members[-1].start()
        yield members
    finally:
        for member in members:
            await member.stop()


def value(response: Any) -> Any:
    return messages(response)[-1]["result"]["structuredContent"]["value"]


async def test_session_id_is_not_in_the_store() -> None:
    """P13: FastMCP puts it into the session state and into its keys."""
    store = MemoryStore()
    async with nodes(store) as (a, b, _):
        session = await a.open()
        said = await b.post(call("put", key="cart", value=[1]), session)
        assert messages(said)[-1]["result"]["structuredContent"]["result"] == session.id
        fields = (await store.load(session_key(session.id))).fields
        assert not any(session.id in name or session.id.encode() in data for name, data in fields.items())
        assert not any(name.startswith("state:") for name in fields)


async def test_what_is_kept_while_a_session_opens_is_there_once_it_is_open() -> None:
    """P2: on every node; of one whose `initialize` failed nothing is left."""
    store = MemoryStore()
    async with nodes(store) as members:
        session = await members[0].open()
        for member in members:
            assert value(await member.post(call("get", key="greeting"), session)) == "hello"
        refused = await members[1].post(opening(clientInfo={"name": "bad", "version": "1"}))
        assert error(refused)["message"] == "go away"
        assert "mcp-session-id" not in refused.headers


async def test_session_that_set_its_log_level_costs_an_idle_node_nothing() -> None:
    """P10: FastMCP's own handler would keep the session's live view on the node for good."""
    store = MemoryStore()
    async with nodes(store) as (a, b, _):
        session = await a.open()
        assert (await b.post(request("logging/setLevel", {"level": "error"}), session)).status_code == 200
        assert (await store.load(session_key(session.id))).fields["level"] == b"error"
        for member in (a, b):
            node = member.app.manager._node
            assert node is not None
            await eventually(lambda node=node: not node.sessions)  # type: ignore[misc]


async def test_session_state_is_encrypted_where_the_store_is() -> None:
    """P13."""
    store, key = MemoryStore(), secrets.token_bytes(32)
    async with nodes(store, encryption_keys=[key]) as (a, b, c):
        session = await a.open()
        await b.post(call("put", key="pin", value="secret words"), session)
        assert value(await c.post(call("get", key="pin"), session)) == "secret words"
        fields = (await store.load(session_key(session.id))).fields
        assert not any(b"secret words" in data for data in fields.values())
