"""The server that the files in this directory deploy: put your own in its place."""

from __future__ import annotations

import asyncio
import os

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from pydantic import BaseModel

import nonstick

cluster = nonstick.Cluster()
mcp = MCPServer(
    "deployed",
    subscriptions=cluster.subscription_bus,
    request_state_security=cluster.request_state_security,
)


@mcp.tool()
def where() -> str:
    """The name of the node that serves this request."""
    return os.environ.get("NONSTICK_NODE", "?")


class Answer(BaseModel):
    """What the client's user is asked for."""

    name: str


@mcp.tool()
async def greet(ctx: Context) -> str:
    """Asks for a name, and greets. The answer may arrive at any other node."""
    answer = await ctx.elicit("What is your name?", schema=Answer)
    return f"Hello, {answer.data.name}!" if answer.action == "accept" else "Hello, whoever you are!"


@mcp.tool()
async def announce(ctx: Context) -> str:
    """Tells this session's client, on its open stream, that there are other tools now."""
    await ctx.session.send_tool_list_changed()
    return "announced"


@mcp.tool()
async def count(to: int, ctx: Context, pause: float = 0.1) -> str:
    """Counts, with progress on the way."""
    for number in range(1, to + 1):
        await ctx.report_progress(number, to, f"{number} of {to}")
        await asyncio.sleep(pause)
    return f"counted to {to}"
