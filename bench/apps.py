"""The opponents' apps. `app` is the one that the environment's `BENCH_APP` names; all have the same two tools."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import redis.asyncio
from mcp.server import MCPServer, Server
from starlette.types import ASGIApp, Receive, Scope, Send

import nonstick
from bench.event_store import InMemoryEventStore
from bench.opponents import MANY
from bench.servers import lowlevel, mcpserver

__all__ = ["app"]

STORE = os.environ.get("BENCH_STORE", "")


def bare(client: redis.asyncio.Redis | None) -> ASGIApp:
    """Parses the body, reads a key if it has a client, and answers: no server can do less."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = json.loads(body)
        if client is not None:
            await client.get("bench")
        text = (asked.get("params") or {}).get("arguments", {}).get("text", "")
        result = {"content": [{"type": "text", "text": text}], "isError": False}
        answer = json.dumps({"jsonrpc": "2.0", "id": asked.get("id"), "result": result}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return serve


def fastmcp() -> ASGIApp:
    # On its own: the others' processes are not to carry it.
    from bench.fastmcp_app import build

    return build()


def ours(server: MCPServer[Any] | Server[Any]) -> ASGIApp:
    answer: Any = os.environ.get("BENCH_ANSWER", "auto")
    return nonstick.app(server, store=STORE, answer=answer, max_sessions=MANY)


_APPS: dict[str, Callable[[], ASGIApp]] = {
    "bare": lambda: bare(None),
    "bare-read": lambda: bare(redis.asyncio.Redis.from_url(STORE)),
    "nonstick-mcpserver": lambda: ours(mcpserver()),
    "nonstick-lowlevel": lambda: ours(lowlevel()),
    "mcp": lambda: mcpserver().streamable_http_app(max_sessions=MANY),
    "mcp-json": lambda: mcpserver().streamable_http_app(json_response=True, max_sessions=MANY),
    "mcp-events": lambda: mcpserver().streamable_http_app(event_store=InMemoryEventStore(), max_sessions=MANY),
    "mcp-stateless": lambda: mcpserver().streamable_http_app(stateless_http=True),
    "mcp-lowlevel": lambda: lowlevel().streamable_http_app(max_sessions=MANY),
    "fastmcp": fastmcp,
}

app = _APPS[os.environ["BENCH_APP"]]()
