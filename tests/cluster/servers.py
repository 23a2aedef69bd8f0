"""The server that these tests run on several nodes, and what they need to talk to it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import mcp_types as types
from mcp.server import Server, ServerRequestContext

from nonstick import current_connection

Context = ServerRequestContext[Any, Any]
Tool = Callable[[Context, dict[str, Any]], Awaitable[Any]]

DEADLINE = 60.0
"""Seconds that a test waits for a condition before it fails."""


class World:
    """What the servers of all nodes share with the test: doors that hold tools up, and a list of what happened."""

    def __init__(self) -> None:
        self.doors: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.happened: list[str] = []
        self.starts = 0

    def server(self) -> Server[Any]:
        """One node's server."""
        server = Server("world", version="1", lifespan=self._lifespan, on_list_tools=_list, on_call_tool=self._call)
        server.add_request_handler("logging/setLevel", types.SetLevelRequestParams, _empty)
        server.add_request_handler("resources/subscribe", types.SubscribeRequestParams, _empty)
        server.add_request_handler("resources/unsubscribe", types.UnsubscribeRequestParams, _empty)
        return server

    @asynccontextmanager
    async def _lifespan(self, _: Server[Any]) -> AsyncIterator[str]:
        self.starts += 1
        yield f"started {self.starts}"

    async def _call(self, ctx: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        self.happened.append(f"{params.name} began")
        arguments = params.arguments or {}
        tool: Tool | None = getattr(self, f"tool_{params.name}", None)
        if tool is None:
            raise ValueError(f"no tool {params.name!r}")
        answer = await tool(ctx, arguments)
        self.happened.append(f"{params.name} ended")
        return types.CallToolResult(content=[types.TextContent(text=json.dumps(answer))])

    async def saw(self, what: str) -> None:
        """Returns once this has happened."""
        await eventually(lambda: what in self.happened)

    async def tool_echo(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        return arguments

    async def tool_put(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        current_connection().state.update(arguments)

    async def tool_drop(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        current_connection().state.pop(arguments["key"], None)

    async def tool_get(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        return current_connection().state

    async def tool_wait(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        """Waits at a door, then puts the rest into the session state."""
        door = arguments.pop("door")
        self.happened.append(f"at {door}")
        await self.doors[door].wait()
        current_connection().state.update(arguments)
        return id(current_connection())

    async def tool_who(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        client, connection = ctx.session.client_params, current_connection()
        return {
            "version": ctx.protocol_version,
            "client": client.client_info.model_dump(exclude_none=True) if client else None,
            "capabilities": client.capabilities.model_dump(exclude_none=True) if client else None,
            "initialized": connection.initialized.is_set(),
            "lifespan": ctx.lifespan_context,
        }

    async def tool_boom(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        raise ValueError("boom")

    async def tool_block(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        time.sleep(1)  # noqa: ASYNC251

    async def tool_object(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        """What JSON cannot hold, put in at once or, with `later`, changed in place."""
        current_connection().state["fine"] = []
        if arguments.get("later"):
            current_connection().state["fine"].append(object())
        else:
            current_connection().state["bad"] = object()

    async def tool_shout(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        for level in arguments["levels"]:
            message = types.LoggingMessageNotification(
                params=types.LoggingMessageNotificationParams(level=level, data=level)
            )
            await ctx.session.send_notification(message, related_request_id=ctx.request_id)

    async def tool_owe(self, ctx: Context, arguments: dict[str, Any]) -> Any:
        """Owes a clean-up when the session ends."""
        current_connection().exit_stack.callback(self.happened.append, "cleaned up")


async def _empty(ctx: Context, params: Any) -> types.EmptyResult:
    return types.EmptyResult()


async def _list(ctx: Context, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
    return types.ListToolsResult(tools=[types.Tool(name="echo", input_schema={"type": "object"})])


# ---- what a client sends and gets


def request(method: str, params: Any = None, id: Any = 1) -> dict[str, Any]:  # noqa: A002
    """A JSON-RPC request."""
    message = {"jsonrpc": "2.0", "id": id, "method": method}
    return message if params is None else message | {"params": params}


def call(tool: str, id: Any = 1, **arguments: Any) -> dict[str, Any]:  # noqa: A002
    """A call of a tool."""
    return request("tools/call", {"name": tool, "arguments": arguments}, id)


def opening(version: str = "2025-11-25", **params: Any) -> dict[str, Any]:
    """An `initialize`."""
    client = {"name": "test", "version": "1"}
    return request("initialize", {"protocolVersion": version, "capabilities": {}, "clientInfo": client, **params}, 0)


def messages(response: httpx2.Response) -> list[Any]:
    """Every JSON-RPC message in a response that was read whole, be it JSON or a stream."""
    if response.headers.get("content-type", "").startswith("application/json"):
        return [json.loads(response.text)] if response.text else []
    lines = (line.removeprefix("data:").strip() for line in response.text.splitlines() if line.startswith("data:"))
    return [json.loads(line) for line in lines if line]


def answer(response: httpx2.Response) -> Any:
    """What the tool returned."""
    assert response.status_code == 200, response.text
    last = messages(response)[-1]
    assert "result" in last, last
    return json.loads(last["result"]["content"][0]["text"])


def error(response: httpx2.Response) -> Any:
    """The JSON-RPC error in the answer."""
    return messages(response)[-1]["error"]


async def eventually(true: Callable[[], bool | Awaitable[bool]]) -> None:
    """Returns once this is true."""
    async with asyncio.timeout(DEADLINE):
        while True:
            outcome = true()
            if outcome if isinstance(outcome, bool) else await outcome:
                return
            await asyncio.sleep(0.01)
