"""The smallest server: run it on as many processes and machines as you like.

nonstick serve examples/quickstart.py                             # SQLite, one machine
nonstick serve examples/quickstart.py --store redis://cache:6379  # any number of machines

Or with any ASGI server, here two workers that serve each other's sessions: uvicorn examples.quickstart:app --workers 2
"""

from __future__ import annotations

from mcp.server.mcpserver import Context, MCPServer

import nonstick

mcp = MCPServer("quickstart")


@mcp.tool()
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@mcp.tool()
async def count(to: int, ctx: Context) -> str:
    """Counts, and reports progress: whichever node runs this, the client hears it."""
    for step in range(1, to + 1):
        await ctx.report_progress(step, to)
    return f"counted to {to}"


app = nonstick.app(mcp, store="sqlite:///quickstart.db")
