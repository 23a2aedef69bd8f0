"""A server with authentication whose tools come upon what must not be logged, in every way."""

from __future__ import annotations

import asyncio
from typing import Any

from mcp.server import MCPServer
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context
from pydantic import AnyHttpUrl, BaseModel

import nonstick

RESOURCE = "https://server.example/mcp"


class Tokens:
    """Any token is its subject's: `subject:random`."""

    async def verify_token(self, token: str) -> AccessToken | None:
        subject = token.partition("-")[0]
        return AccessToken(token=token, client_id="app", subject=subject, scopes=["use"], resource=RESOURCE)


cluster = nonstick.Cluster()
mcp: MCPServer[Any] = MCPServer(
    "secretive",
    auth=AuthSettings(
        issuer_url=AnyHttpUrl("https://issuer.example"),
        resource_server_url=AnyHttpUrl(RESOURCE),
        required_scopes=["use"],
        validate_token_resource=True,
    ),
    token_verifier=Tokens(),
    subscriptions=cluster.subscription_bus,
    request_state_security=cluster.request_state_security,
)


class Reply(BaseModel):
    """What `work` asks for."""

    value: str


@mcp.tool(structured_output=False)
async def work(text: str, ctx: Context[Any, Any]) -> str:
    """Streams, keeps, asks and answers."""
    nonstick.current_connection().state["text"] = text
    await ctx.report_progress(1, 2, text)
    answer = await ctx.elicit(text, Reply)
    return f"{text} {answer}"


@mcp.tool(structured_output=False)
async def wait(text: str, ctx: Context[Any, Any]) -> str:
    """Waits to be cancelled."""
    await ctx.report_progress(1, 2, text)
    await asyncio.Event().wait()
    return text


@mcp.tool(structured_output=False)
async def boom(text: str) -> str:
    """Raises what names its argument."""
    raise ValueError(text)


@mcp.tool(structured_output=False)
async def misplace(text: str) -> str:
    """Leaves in the session what cannot be kept."""
    state = nonstick.current_connection().state
    state[text] = [text]
    state[text].append({text})
    return text


@mcp.resource("memo://{text}")
async def memo(text: str) -> str:
    """Fails to be read."""
    raise LookupError(text)
