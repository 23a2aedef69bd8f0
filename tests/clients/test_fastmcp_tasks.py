"""FastMCP's background tasks on three nodes: their state is Docket's, and nonstick has nothing to add but a warning."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import mcp_types as types
import pytest
from fastmcp import Client, Context, FastMCP
from fastmcp.client.elicitation import ElicitResult
from fastmcp.server.middleware import Middleware
from fastmcp.tools import ToolResult
from fastmcp_tasks import TasksExtension, call_tool_task

import nonstick
from nonstick.testing import ValkeyServer
from nonstick.testing.cluster import Member
from nonstick.testing.servers.balancer import Backend, Balancer
from tests.clients.conftest import NODES
from tests.conformance.input_required import form, want

pytestmark = [
    pytest.mark.anyio,
    # Docket calls what its own client calls deprecated.
    pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning"),
]

SECONDS = 120.0


class Greeter(Middleware):
    """Keeps something for each request before its tool runs."""

    async def on_call_tool(self, context: Any, call_next: Any) -> Any:
        await context.fastmcp_context.set_state("greeting", f"hello {context.message.arguments.get('x')}")
        return await call_next(context)


def make(cluster: nonstick.Cluster, docket: str) -> FastMCP[Any]:
    server = FastMCP[Any](
        "tasks",
        request_state_security=cluster.request_state_security,
        session_state_store=cluster.session_state_store,
        middleware=[Greeter()],
    )
    server.add_extension(TasksExtension(url=docket, name="tests"))

    @server.tool(task=True)
    async def double(x: int) -> int:
        await asyncio.sleep(0.05)
        return 2 * x

    @server.tool(task=True)
    async def kept(x: int, ctx: Context) -> str:
        return str(await ctx.get_state("greeting"))

    @server.tool(task=True)
    async def greet(ctx: Context) -> ToolResult | types.InputRequiredResult:
        reply = (ctx.input_responses or {}).get("who")
        if not isinstance(reply, types.ElicitResult):
            return want({"who": form("Who?", "name")})
        return ToolResult(f"Hello, {(reply.content or {})['name']}!")

    return server


@asynccontextmanager
async def nodes(store: str, docket: str, count: int = NODES) -> AsyncIterator[Balancer]:
    async with AsyncExitStack() as stack:
        backends = []
        for number in range(count):
            cluster = nonstick.Cluster()
            member = Member(f"{number}", nonstick.app(make(cluster, docket), store=store, cluster=cluster, grace=2.0))
            await member.start()
            stack.push_async_callback(member.stop)
            backends.append(Backend(member.name, member.port))
        yield await stack.enter_async_context(Balancer(backends))


async def answer(message: str, kind: Any, params: Any, context: Any) -> Any:
    return ElicitResult(action="accept", content={"name": "Ada"})


async def test_background_task_is_known_everywhere() -> None:
    """Begun at one node, run by the worker of any, asked for and answered at others; with what its request kept."""
    with ValkeyServer() as valkey, anyio.fail_after(2 * SECONDS):
        async with (
            nodes(valkey.url, valkey.url) as balancer,
            Client[Any](f"{balancer.url}/mcp", timeout=SECONDS, elicitation_handler=answer) as client,
        ):
            for x in range(NODES):
                task = await call_tool_task(client, "double", {"x": x})
                assert (await task.result()).data == 2 * x
                kept = await call_tool_task(client, "kept", {"x": x})
                assert (await kept.result()).data == f"hello {x}"
            greeted = await client.call_tool("greet", {})
            assert greeted.content[0].text == "Hello, Ada!"
            asked = [one for one in balancer.exchanges if one.rpc in ("tools/call", "tasks/get", "tasks/update")]
            assert {one.backend for one in asked} == {str(number) for number in range(NODES)}
            assert {one.status for one in asked} == {200}


async def test_process_local_tasks_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Docket's default is the memory of one process."""
    with caplog.at_level(logging.WARNING, "nonstick"):
        async with nodes("memory:", "memory://", count=1):
            pass
    assert any("FASTMCP_DOCKET_URL=redis://" in record.getMessage() for record in caplog.records)
