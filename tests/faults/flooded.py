"""The server that is flooded: `nonstick serve tests/faults/flooded.py`."""

from __future__ import annotations

from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp_types import ProgressNotification, ProgressNotificationParams

mcp: MCPServer[Any] = MCPServer("flooded")


@mcp.tool(structured_output=False)
async def plain() -> str:
    """Answers at once."""
    return "done"


@mcp.tool(structured_output=False)
async def tell(count: int, size: int, ctx: Context[Any, Any]) -> str:
    """Sends so many messages of so many bytes on the standalone stream."""
    for number in range(count):
        params = ProgressNotificationParams(progress_token="t", progress=number, message=" " * size)
        await ctx.session.send_notification(ProgressNotification(params=params))
    return "told"
