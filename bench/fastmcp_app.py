"""FastMCP as an opponent."""

from __future__ import annotations

from typing import Any

from fastmcp import Context, FastMCP
from starlette.types import ASGIApp

__all__ = ["build"]


def build() -> ASGIApp:
    server: FastMCP[Any] = FastMCP("bench")

    async def echo(text: str) -> str:
        return text

    async def progress(count: int, ctx: Context) -> str:
        for number in range(1, count + 1):
            await ctx.report_progress(number, count)
        return "done"

    server.tool(echo, output_schema=None)
    server.tool(progress, output_schema=None)
    return server.http_app()
