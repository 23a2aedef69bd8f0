"""A resource that changes, and whoever watches it: one call tells every watcher, on whichever node it is (P11).

uvicorn examples.watcher:app --workers 4

A client subscribes (`resources/subscribe`, or `subscriptions/listen` from 2026-07-28 on) and hears of each change. A
session that is away at that moment hears of it when it comes back.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from mcp.server import MCPServer

import nonstick

cluster = nonstick.Cluster()
mcp = MCPServer(
    "watcher",
    subscriptions=cluster.subscription_bus,
    request_state_security=cluster.request_state_security,
)


# Whatever is watched is not the session's, but everybody's: a file here, a table or a device elsewhere.
THERMOSTAT = Path(os.environ.get("THERMOSTAT", "thermostat.txt"))


@mcp.resource("home://thermostat")
def thermostat() -> str:
    """What it is set to."""
    return THERMOSTAT.read_text() if THERMOSTAT.exists() else "20 degrees"


@mcp.tool()
async def set_thermostat(degrees: int) -> str:
    """Turns it up or down, and tells whoever watches."""
    await asyncio.to_thread(THERMOSTAT.write_text, f"{degrees} degrees")
    await cluster.notify_resource_updated("home://thermostat")
    return "set"


app = nonstick.app(mcp, store=os.environ.get("NONSTICK_STORE", "sqlite:///watcher.db"), cluster=cluster)
