"""Routes of your own, and no dictionary of transports: any node rebuilds a session's transport from its id.

Two processes behind a load balancer without stickiness: the first request is `initialize` and lands on one, the next is
`notifications/initialized` and lands on the other.

uvicorn examples.own_routing:app --workers 2
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mcp.server import MCPServer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import nonstick
from nonstick.errors import SessionNotFound, StoreUnavailable

mcp = MCPServer("own-routing")


@mcp.tool()
def remember(key: str, value: str) -> str:
    """Remembers something for this session, whichever process is asked for it later."""
    nonstick.current_connection().state[key] = value
    return "remembered"


@mcp.tool()
def recall(key: str) -> str:
    """What was remembered."""
    return str(nonstick.current_connection().state.get(key, "nothing"))


manager = nonstick.SessionManager(mcp, store=os.environ.get("NONSTICK_STORE", "sqlite:///own-routing.db"))


async def serve(request: Request) -> ASGIApp:
    """POST, GET and DELETE of one session."""
    session_id = request.headers.get("mcp-session-id")
    if session_id is None:
        # An `initialize` opens it; anything else is refused with 400.
        session = nonstick.Session(manager)
    else:
        # Known, live, and this caller's; else 404. With `existing_session_id=session_id` instead, nothing is loaded
        # before the request is served, which checks the same: one round trip less.
        session = await nonstick.Session.hydrate(session_id, manager=manager, scope=request.scope)
    return session.handle_request


async def not_found(_: Request, __: Exception) -> Response:
    """The client is to open a new session."""
    body = {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "Session not found"}}
    return JSONResponse(body, status_code=404)


async def unavailable(_: Request, __: Exception) -> Response:
    """The session is kept: the client is to try again."""
    body = {"jsonrpc": "2.0", "id": None, "error": {"code": -32603, "message": "The store cannot be reached"}}
    return JSONResponse(body, status_code=503, headers={"Retry-After": "1"})


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    async with manager.run():
        yield


app = Starlette(
    routes=[Route("/mcp", serve, methods=["POST", "GET", "DELETE"])],
    exception_handlers={SessionNotFound: not_found, StoreUnavailable: unavailable},
    lifespan=lifespan,
)
