"""An MCP server inside a web application, with a page of its own beside it.

uvicorn examples.mounted:site --workers 2
"""

from __future__ import annotations

import os

from fastapi import FastAPI, HTTPException
from mcp.server import MCPServer

import nonstick
from nonstick.errors import NonstickError

mcp = MCPServer("mounted")


@mcp.tool()
def greet(name: str) -> str:
    """Greets somebody."""
    return f"Hello, {name}!"


app = nonstick.app(mcp, store=os.environ.get("NONSTICK_STORE", "sqlite:///mounted.db"), path="/")

# A host does not run the lifespan of what is mounted in it, so it is given to the host. One that has its own writes
# `async with app.lifespan(): yield` in it.
site = FastAPI(lifespan=app.lifespan)


@site.get("/")
def home() -> str:
    """The site's own page."""
    return "The MCP endpoint is /mcp/"


@site.get("/readyz")
async def ready() -> str:
    """For the load balancer: 503 while the store cannot be reached or the node drains."""
    try:
        await app.manager.check_ready()
    except NonstickError as error:
        raise HTTPException(503, "not ready") from error
    return "ready"


site.mount("/mcp", app)
