"""The server under test: tools that keep a node busy in every way, and write down each run of theirs.

Settings come from the environment: `NONSTICK_STORE`, `FAULTS_OPTIONS` (JSON, for `nonstick.app`) and `FAULTS_RECORD`,
a file that the tools of all nodes append to, one JSON object a line.

The last release serves it too, in `tests/rolling`: it uses nothing that is newer.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import mcp_types as types
from mcp.server import MCPServer
from mcp.server.connection import Connection
from mcp.server.mcpserver import Context
from mcp.shared.exceptions import MCPError
from mcp_types import ToolAnnotations
from pydantic import BaseModel

import nonstick
from nonstick import current_attempt

__all__ = ["app"]

server: MCPServer[Any] = MCPServer("faults", version=nonstick.__version__)


class Reply(BaseModel):
    """What `ask` asks for."""

    value: str


def record(label: str, what: str, **more: Any) -> None:
    """Writes a line to the record. One write each, so that the lines of several processes do not mix."""
    line = {"label": label, "what": what, "node": os.environ["NONSTICK_NODE"], "attempt": current_attempt()} | more
    if path := os.environ.get("FAULTS_RECORD"):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, json.dumps(line | {"at": time.monotonic()}).encode() + b"\n")
        finally:
            os.close(handle)


@asynccontextmanager
async def recorded(label: str) -> AsyncIterator[None]:
    """Records how this run starts and ends."""
    record(label, "start")
    try:
        yield
    except asyncio.CancelledError:
        record(label, "cancelled")
        raise
    except BaseException as error:
        record(label, "failed", error=repr(error)[:200])
        raise
    record(label, "end")


@server.tool(structured_output=False)
async def plain(label: str) -> str:
    """Answers at once."""
    async with recorded(label):
        return f"{label}:{current_attempt()}:0"


@server.tool(structured_output=False)
async def wait(label: str, seconds: float) -> str:
    """Says nothing for so long."""
    async with recorded(label):
        await asyncio.sleep(seconds)
        return f"{label}:{current_attempt()}:0"


@server.tool(structured_output=False)
async def stall(label: str, seconds: float) -> str:
    """Blocks the event loop for so long, once its stream is open."""
    async with recorded(label):
        await asyncio.sleep(1.0)
        time.sleep(seconds)  # noqa: ASYNC251 - that is the fault
        return f"{label}:{current_attempt()}:0"


@server.tool(structured_output=False)
def stubborn(label: str, seconds: float) -> str:
    """Sleeps in a thread, which nothing can stop."""
    record(label, "start")
    time.sleep(seconds)
    record(label, "end")
    return f"{label}:{current_attempt()}:0"


@server.tool(structured_output=False)
async def leave(label: str, status: int, ctx: Context[Any, Any], thread: bool = False, silent: bool = False) -> str:
    """Has its process exit."""
    async with recorded(label):
        if not silent:
            await ctx.report_progress(1, 1, f"{label}:{current_attempt()}:1")
        if thread:
            await asyncio.to_thread(sys.exit, status)
        sys.exit(status)


async def _steps(label: str, steps: int, pause: float, ctx: Context[Any, Any]) -> str:
    async with recorded(label):
        for step in range(1, steps + 1):
            await ctx.report_progress(step, steps, f"{label}:{current_attempt()}:{step}")
            await asyncio.sleep(pause)
        return f"{label}:{current_attempt()}:{steps}"


@server.tool(structured_output=False)
async def count(label: str, steps: int, pause: float, ctx: Context[Any, Any]) -> str:
    """Counts in progress notifications."""
    return await _steps(label, steps, pause, ctx)


@server.tool(structured_output=False, annotations=ToolAnnotations(idempotent_hint=True))
async def recount(label: str, steps: int, pause: float, ctx: Context[Any, Any]) -> str:
    """Counts, and may be made to count again."""
    return await _steps(label, steps, pause, ctx)


@server.tool(structured_output=False)
async def ask(label: str, rounds: int, ctx: Context[Any, Any], patience: float = 3600.0) -> str:
    """Asks the client, several times, and waits so long for each reply."""
    async with recorded(label):
        for step in range(1, rounds + 1):
            try:
                async with asyncio.timeout(patience):
                    answer = await ctx.elicit(f"{label}:{current_attempt()}:{step}", Reply)
            except TimeoutError:
                # A store may lose a reply that it has taken.
                raise MCPError(types.INTERNAL_ERROR, "no reply came", {"reason": "no_reply"}) from None
            value = answer.data.value if answer.action == "accept" else answer.action
            record(label, "reply", step=step, value=value)
        return f"{label}:{current_attempt()}:{rounds}"


@server.tool(structured_output=False)
async def announce(label: str, steps: int, pause: float, ctx: Context[Any, Any]) -> str:
    """Sends numbered notifications on the standalone stream."""
    async with recorded(label):
        for step in range(1, steps + 1):
            # Without a related request it is the standalone stream's.
            params = types.ProgressNotificationParams(
                progress_token=label, progress=step, message=f"{label}:{current_attempt()}:{step}"
            )
            await ctx.session.send_notification(types.ProgressNotification(params=params))
            await asyncio.sleep(pause)
        return f"{label}:{current_attempt()}:{steps}"


@server.tool(structured_output=False)
async def remember(label: str, value: str, seconds: float) -> str:
    """Changes the session state, and ends so much later."""
    async with recorded(label):
        nonstick.current_connection().state["value"] = value
        await asyncio.sleep(seconds)
        return f"{label}:{current_attempt()}:0"


@server.tool(structured_output=False)
async def recall(label: str) -> list[str]:
    """Says what the session state holds."""
    async with recorded(label):
        return [f"{label}:{current_attempt()}:0", str(nonstick.current_connection().state.get("value"))]


class Held:
    """What JSON cannot hold."""

    def __init__(self, connection: Connection, used: int = 0) -> None:
        self.used = used
        connection.state["held"] = self
        connection.exit_stack.callback(record, "held", "cleaned", value=str(used))


@server.tool(structured_output=False)
async def hold(label: str) -> list[str]:
    """Says how often what the session holds was used. On one node, with `placement="owner"`."""
    async with recorded(label):
        connection = nonstick.current_connection()
        held = connection.state.get("held") or Held(connection)
        held.used += 1
        return [f"{label}:{current_attempt()}:0", str(held.used)]


async def rehydrate(connection: Connection) -> None:
    """Builds what a session held anew: it was used 100 times."""
    Held(connection, 100)


_options = json.loads(os.environ.get("FAULTS_OPTIONS", "{}"))
if _options.pop("movable", False):
    _options["rehydrate"] = rehydrate
app = nonstick.app(server, store=os.environ["NONSTICK_STORE"], node_header=True, **_options)
