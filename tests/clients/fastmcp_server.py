"""What the client checks ask for, on FastMCP: the tools, resources and prompts of the everything server.

nonstick serve tests.clients.fastmcp_server:make --store URL
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import mcp_types as types
from fastmcp import Context, FastMCP
from fastmcp.exceptions import ToolError
from fastmcp.server.sessions import SessionId, SessionProvider
from fastmcp.tools import ToolResult
from mcp.shared.subscriptions import ResourceUpdated, ToolsListChanged

import nonstick
from tests.conformance.everything_server import WATCHED, WORDS
from tests.conformance.input_required import form, sample, want

__all__ = ["make"]

STEP = 0.01


def make(cluster: nonstick.Cluster | None = None, node: str = "") -> FastMCP[Any]:
    """The server of one node."""
    cluster = cluster or nonstick.Cluster()
    server = FastMCP[Any](
        "everything",
        session_state_store=cluster.session_state_store,
        request_state_security=cluster.request_state_security,
        providers=[SessionProvider()],
    )
    _answers(server, node or str(os.getpid()))
    _sends(server, cluster)
    _asks(server)
    _rounds(server)
    _sealed_rounds(server)
    _keeps(server)
    _reads(server)
    return server


def _answers(server: FastMCP[Any], node: str) -> None:
    @server.tool
    def test_simple_text() -> str:
        return "This is a simple text response for testing."

    @server.tool
    def test_error_handling() -> str:
        raise ToolError("This tool intentionally returns an error for testing")

    @server.tool
    def test_node() -> str:
        return node


def _sends(server: FastMCP[Any], cluster: nonstick.Cluster) -> None:
    @server.tool
    async def test_tool_with_logging(ctx: Context) -> str:
        for text in ("started", "processing", "completed"):
            what = "Tool processing data" if text == "processing" else f"Tool execution {text}"
            # By the SDK's session: `ctx.info` makes an object of it.
            await ctx.session.send_log_message("info", what, related_request_id=ctx.request_id)
        return "Logging completed"

    @server.tool
    async def shout(ctx: Context) -> str:
        """Logs at every level."""
        for level in ("debug", "info", "warning", "error"):
            await ctx.log(level, level=level)
        return "shouted"

    @server.tool
    async def test_tool_with_progress(ctx: Context) -> str:
        await ctx.report_progress(0, 100)
        await asyncio.sleep(STEP)
        await ctx.report_progress(50, 100)
        await ctx.report_progress(100, 100)
        return "Progress completed"

    @server.tool
    async def test_reconnection(ctx: Context) -> str:
        await ctx.close_sse_stream()
        await asyncio.sleep(2 * STEP)
        return "Reconnection test completed successfully"

    @server.tool
    async def test_trigger_tool_change(ctx: Context) -> str:
        await cluster.subscription_bus.publish(ToolsListChanged())
        await ctx.session.send_tool_list_changed()
        return "Announced"

    @server.tool
    async def test_trigger_resource_update(ctx: Context) -> str:
        await cluster.subscription_bus.publish(ResourceUpdated(uri=WATCHED))
        await ctx.session.send_resource_updated(WATCHED)
        return "Announced"


def _asks(server: FastMCP[Any]) -> None:
    @server.tool
    async def test_sampling(prompt: str, ctx: Context) -> str:
        message = types.SamplingMessage(role="user", content=types.TextContent(type="text", text=prompt))
        reply = await ctx.session.create_message([message], max_tokens=100, related_request_id=ctx.request_id)
        return f"LLM response: {reply.content.text if isinstance(reply.content, types.TextContent) else reply.content}"

    @server.tool
    async def test_elicitation(message: str, ctx: Context) -> str:
        schema = {
            "type": "object",
            "properties": {"username": {"type": "string"}, "email": {"type": "string"}},
            "required": ["username", "email"],
        }
        reply = await ctx.session.elicit_form(message, schema, related_request_id=ctx.request_id)
        return f"User response: action={reply.action}, content={json.dumps(reply.content)}"

    @server.tool
    async def wizard(ctx: Context) -> str:
        """Asks by FastMCP's own `ctx.elicit`."""
        reply = await ctx.elicit("Who?", str)
        return f"{reply.action}: {getattr(reply, 'data', None)}"

    @server.tool
    async def test_list_roots(ctx: Context) -> str:
        reply = await ctx.session.list_roots()
        return ", ".join(str(root.uri) for root in reply.roots)

    @server.tool
    async def test_ping_client(ctx: Context) -> str:
        await ctx.session.send_ping()
        return "pong"


def _filled(ctx: Context, key: str, field: str) -> Any:
    """A field of the form that the user accepted under this key."""
    reply = (ctx.input_responses or {}).get(key)
    accepted = isinstance(reply, types.ElicitResult) and reply.action == "accept"
    return (reply.content or {}).get(field) if accepted and isinstance(reply, types.ElicitResult) else None


def _rounds(server: FastMCP[Any]) -> None:
    """What a client of 2026-07-28 is asked by a result."""

    @server.tool
    async def test_input_required_result_elicitation(ctx: Context) -> ToolResult | types.InputRequiredResult:
        name = _filled(ctx, "user_name", "name")
        if name is None:
            return want({"user_name": form("What is your name?", "name")})
        return ToolResult(f"Hello, {name}!")

    @server.tool
    async def test_input_required_result_sampling(ctx: Context) -> ToolResult | types.InputRequiredResult:
        reply = (ctx.input_responses or {}).get("capital_question")
        if not isinstance(reply, types.CreateMessageResult) or not isinstance(reply.content, types.TextContent):
            return want({"capital_question": sample("What is the capital of France?", 100)})
        return ToolResult(reply.content.text)

    @server.tool
    async def test_input_required_result_list_roots(ctx: Context) -> ToolResult | types.InputRequiredResult:
        reply = (ctx.input_responses or {}).get("client_roots")
        if not isinstance(reply, types.ListRootsResult):
            return want({"client_roots": types.ListRootsRequest()})
        return ToolResult(", ".join(str(root.uri) for root in reply.roots))

    @server.prompt
    async def test_input_required_result_prompt(ctx: Context) -> str | types.InputRequiredResult:
        context = _filled(ctx, "user_context", "context")
        if context is None:
            return want({"user_context": form("What context should the prompt use?", "context")})
        return f"Use this context: {context}"


def _sealed_rounds(server: FastMCP[Any]) -> None:
    """The same, with a state that comes back."""

    @server.tool
    async def test_input_required_result_multiple_inputs(ctx: Context) -> ToolResult | types.InputRequiredResult:
        name, roots = _filled(ctx, "user_name", "name"), (ctx.input_responses or {}).get("client_roots")
        if name is None or not isinstance(roots, types.ListRootsResult):
            form_of_name = form("What is your name?", "name")
            return want({"user_name": form_of_name, "client_roots": types.ListRootsRequest()}, "asked")
        return ToolResult(f"Greeted {name}, who has {len(roots.roots)} roots")

    @server.tool
    async def test_input_required_result_request_state(ctx: Context) -> ToolResult | types.InputRequiredResult:
        if _filled(ctx, "confirm", "ok") is None or ctx.request_state != "asked":
            return want({"confirm": form("Please confirm", "ok", "boolean")}, "asked")
        return ToolResult("state-ok")

    @server.tool
    async def test_input_required_result_multi_round(ctx: Context) -> ToolResult | types.InputRequiredResult:
        state = ctx.request_state or ""
        if state.startswith("named:"):
            name = state.removeprefix("named:")
            if (color := _filled(ctx, "step2", "color")) is not None:
                return ToolResult(f"{name} likes {color}")
        elif (name := _filled(ctx, "step1", "name")) is None:
            return want({"step1": form("Step 1: What is your name?", "name")}, "new")
        return want({"step2": form("Step 2: What is your favorite color?", "color")}, f"named:{name}")


def _keeps(server: FastMCP[Any]) -> None:
    """Session state, in each of FastMCP's ways."""

    @server.tool
    async def remember(key: str, value: Any, ctx: Context) -> str:
        await ctx.set_state(key, value)
        return ctx.session_id

    @server.tool
    async def recall(key: str, ctx: Context) -> Any:
        return {"session": ctx.session_id, "value": await ctx.get_state(key)}

    @server.tool
    async def forget(key: str, ctx: Context) -> None:
        await ctx.delete_state(key)

    @server.tool
    async def note(text: str, session_id: SessionId) -> None:
        from fastmcp.server.dependencies import get_session

        await (await get_session(session_id)).set("note", text)

    @server.tool
    async def noted(session_id: SessionId) -> str | None:
        from fastmcp.server.dependencies import get_session

        text: str | None = await (await get_session(session_id)).get("note")
        return text

    @server.tool(tags={"secret"})
    def vault() -> str:
        return "gold"

    @server.tool
    async def hide(ctx: Context) -> None:
        await ctx.disable_components(tags={"secret"})


def _reads(server: FastMCP[Any]) -> None:
    @server.resource("test://static-text", mime_type="text/plain")
    def static_text() -> str:
        return "This is the content of the static text resource."

    @server.resource("test://template/{id}/data", mime_type="application/json")
    def template(id: str) -> str:  # noqa: A002
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})

    @server.resource(WATCHED, mime_type="text/plain")
    def watched() -> str:
        return "Watched resource content"

    @server.prompt
    def test_simple_prompt() -> str:
        return "This is a simple prompt for testing."

    @server.prompt
    def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
        return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"

    @server.completion
    def complete(ref: Any, argument: types.CompletionArgument, context: Any) -> list[str]:
        return [word for word in WORDS if word.startswith(argument.value)]
