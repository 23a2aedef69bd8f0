"""The server that all opponents of the SDK's kind serve: the same two tools."""

from __future__ import annotations

from typing import Any

import mcp_types as types
from mcp.server import MCPServer, Server, ServerRequestContext
from mcp.server.mcpserver import Context

__all__ = ["lowlevel", "mcpserver"]


def mcpserver() -> MCPServer[Any]:
    server: MCPServer[Any] = MCPServer("bench", log_level="WARNING")

    @server.tool(structured_output=False)
    async def echo(text: str) -> str:
        return text

    @server.tool(structured_output=False)
    async def progress(count: int, ctx: Context[Any, Any]) -> str:
        for number in range(1, count + 1):
            await ctx.report_progress(number, count)
        return "done"

    return server


def lowlevel() -> Server[Any]:
    async def call(_: ServerRequestContext[Any, Any], params: types.CallToolRequestParams) -> types.CallToolResult:
        text = str((params.arguments or {})["text"])
        return types.CallToolResult(content=[types.TextContent(text=text)])

    async def tools(
        _: ServerRequestContext[Any, Any], __: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[types.Tool(name="echo", input_schema={"type": "object"})])

    return Server("bench", version="1", on_list_tools=tools, on_call_tool=call)
