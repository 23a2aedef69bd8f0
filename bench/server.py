"""The server that the benchmarks put on every node. Stamps are nanoseconds of the machine's monotonic clock."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import mcp_types as types
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from pydantic import BaseModel

import nonstick

__all__ = ["app"]

server: MCPServer[Any] = MCPServer("bench")

_cancelled: dict[str, int] = {}
"""When which call on this node saw its cancel."""


class Stamp(BaseModel):
    """What `ask` asks for: when the client sent its reply."""

    sent: int


async def _ticks(count: int, rate: float) -> AsyncIterator[int]:
    """So many numbers, at this rate a second whatever is done in between."""
    start = time.monotonic()
    for number in range(count):
        await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
        yield number


@server.tool(structured_output=False)
async def announce(count: int, rate: float, ctx: Context[Any, Any]) -> str:
    """Sends stamped notifications on the standalone stream."""
    async for number in _ticks(count, rate):
        # Without a related request it is the standalone stream's.
        params = types.ProgressNotificationParams(
            progress_token="bench", progress=number, message=str(time.monotonic_ns())
        )
        await ctx.session.send_notification(types.ProgressNotification(params=params))
    return "announced"


@server.tool(structured_output=False)
async def ask(count: int, rate: float, ctx: Context[Any, Any]) -> str:
    """Asks the client again and again; answers how many nanoseconds each reply took to get here."""
    took: list[int] = []

    async def one() -> None:
        answer = await ctx.elicit("when?", Stamp)
        now = time.monotonic_ns()
        assert answer.action == "accept"
        took.append(now - answer.data.sent)

    async with asyncio.TaskGroup() as group:
        async for _ in _ticks(count, rate):
            group.create_task(one())
    return json.dumps(took)


@server.tool(structured_output=False)
async def hang(label: str) -> str:
    """Waits to be cancelled."""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        _cancelled[label] = time.monotonic_ns()
        raise
    return "was not cancelled"


@server.tool(structured_output=False)
async def cancelled() -> str:
    """When each call on this node saw its cancel."""
    seen = json.dumps(_cancelled)
    _cancelled.clear()
    return seen


app = nonstick.app(server, store=os.environ["NONSTICK_STORE"])
