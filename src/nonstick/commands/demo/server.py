"""The server that `nonstick demo` puts on every node. An ordinary MCP server: it knows nothing of nonstick."""

from __future__ import annotations

import asyncio
import os

from mcp.server.mcpserver import Context, MCPServer
from pydantic import BaseModel
from starlette.applications import Starlette

__all__ = ["mcp", "sdk_app"]

mcp = MCPServer("demo", instructions="Tools that say which node ran them.")

STEP_SECONDS = 0.15


def _node() -> str:
    return os.environ.get("NONSTICK_NODE", "this node")


@mcp.tool()
def where(ctx: Context) -> str:
    """Says which node runs this call, and whom it serves."""
    client = ctx.session.client_params
    name = "an unknown client" if client is None else client.client_info.name
    return f"{_node()} here, serving {name}"


@mcp.tool()
async def count(to: int, ctx: Context) -> str:
    """Counts slowly, and reports progress at each step."""
    for step in range(1, to + 1):
        await asyncio.sleep(STEP_SECONDS)
        await ctx.report_progress(step, to, f"{step} on {_node()}")
    return f"{_node()} counted to {to}"


class Colour(BaseModel):
    """What `paint` asks the user for."""

    colour: str


@mcp.tool()
async def paint(ctx: Context) -> str:
    """Asks the user for a colour before it answers."""
    answer = await ctx.elicit(f"{_node()} asks: which colour?", Colour)
    chosen = answer.data.colour if answer.action == "accept" else f"nothing, but {answer.action}"
    return f"{_node()} was told {chosen}"


def sdk_app() -> Starlette:
    """The same server as the SDK itself serves it: each session lives in one process. For `nonstick demo --sdk`."""
    return mcp.streamable_http_app()
