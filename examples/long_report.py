"""A report that takes long, with progress on the way. A client whose connection breaks resumes it on any node (P3).

uvicorn examples.long_report:app --workers 4

Two habits make a long call robust:

* It says what it does: progress keeps the client's own timeout from running out, and each notification is a place that
  the client can resume from.
* It closes the connection itself when a pause is long (`close_sse_stream`): the client comes back by itself, to
  whichever node, and gets the rest. No connection has to last as long as the report.
"""

from __future__ import annotations

import asyncio
import os

from mcp.server import MCPServer
from mcp.server.mcpserver import Context

import nonstick

mcp = MCPServer("long-report")

CHAPTERS = ("collect", "clean", "compare", "draw", "print")


@mcp.tool()
async def report(subject: str, ctx: Context, seconds: float = 20.0) -> str:
    """Writes a report, chapter by chapter."""
    pages = []
    for number, chapter in enumerate(CHAPTERS, start=1):
        await ctx.report_progress(number, len(CHAPTERS), f"{chapter} {subject}")
        if chapter == "compare":
            await ctx.close_sse_stream()
        await asyncio.sleep(seconds / len(CHAPTERS))
        pages.append(f"{number}. {chapter} {subject}")
    return "\n".join(pages)


app = nonstick.app(mcp, store=os.environ.get("NONSTICK_STORE", "sqlite:///long-report.db"))
