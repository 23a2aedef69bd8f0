"""A node stops while the SDK serves clients there that have no session (P8)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import HEADERS, Cluster, Member
from tests.cluster.stage import node_of

pytestmark = pytest.mark.anyio

VERSION = "2026-07-28"
DEADLINE = 60.0
ABOUT_CLIENT = {
    "io.modelcontextprotocol/protocolVersion": VERSION,
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


class Tools:
    """A server with a tool that runs until it is stopped."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.stopped = asyncio.Event()
        self.may_end = asyncio.Event()

    def server(self) -> MCPServer[Any]:
        mcp: MCPServer[Any] = MCPServer("tools")

        @mcp.tool()
        async def work(ctx: Context[Any], aloud: bool) -> str:
            if aloud:
                await ctx.report_progress(0.5)
            self.began.set()
            try:
                await self.may_end.wait()
            except asyncio.CancelledError:
                self.stopped.set()
                raise
            return "done"

        return mcp


def stream(member: Member, method: str, params: dict[str, Any], **headers: str) -> Any:
    params["_meta"] = {**ABOUT_CLIENT, **params.get("_meta", {})}
    body = {"jsonrpc": "2.0", "id": "mine", "method": method, "params": params}
    named = {**HEADERS, "mcp-protocol-version": VERSION, "mcp-method": method, **headers}
    return member.client.stream("POST", member.url, json=body, headers=named)


def listening(member: Member) -> Any:
    return stream(member, "subscriptions/listen", {"notifications": {"toolsListChanged": True}})


def working(member: Member, *, aloud: bool) -> Any:
    params: dict[str, Any] = {"name": "work", "arguments": {"aloud": aloud}, "_meta": {"progressToken": "t"}}
    return stream(member, "tools/call", params, **{"mcp-name": "work"})


async def test_drain_ends_sessionless_streams() -> None:
    """P8: an ASGI server waits for them, for ever. Nothing is lost: they are not resumable, and are asked for anew."""
    store = MemoryStore()
    async with Cluster(Tools().server, lambda: store, nodes=1, grace=60.0) as cluster, asyncio.timeout(DEADLINE):
        a = cluster[0]
        async with listening(a) as response:
            chunks = response.aiter_text()
            assert "acknowledged" in await anext(chunks)
            a.app.manager.begin_drain()
            # Ended as HTTP has it, or reading on would raise.
            assert [chunk async for chunk in chunks] == []
        async with listening(a) as refused:
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert not len(node_of(a).listeners)


async def test_drain_lets_sessionless_requests_finish() -> None:
    """P8."""
    store, tools = MemoryStore(), Tools()
    async with Cluster(tools.server, lambda: store, nodes=1, grace=60.0) as cluster, asyncio.timeout(DEADLINE):
        a = cluster[0]
        async with working(a, aloud=True) as response:
            await tools.began.wait()
            draining = asyncio.create_task(a.app.manager.drain())
            await asyncio.sleep(0)
            assert not draining.done()
            tools.may_end.set()
            assert "done" in (await response.aread()).decode()
        await draining


@pytest.mark.parametrize("aloud", [True, False])
async def test_overlong_sessionless_request_ends_with_error(aloud: bool) -> None:
    """P8: as a stream if it had become one, and its handler is cancelled."""
    store, tools = MemoryStore(), Tools()
    async with Cluster(tools.server, lambda: store, nodes=1, grace=0.05) as cluster, asyncio.timeout(DEADLINE):
        a = cluster[0]

        async def drain() -> None:
            await tools.began.wait()
            a.app.manager.begin_drain()

        draining = asyncio.create_task(drain())
        async with working(a, aloud=aloud) as response:
            text = (await response.aread()).decode()
        assert response.status_code == (200 if aloud else 500)
        assert ("data: " in text) is aloud
        assert '"reason":"node_shut_down"' in text
        assert '"id":"mine"' in text
        await tools.stopped.wait()
        await draining
