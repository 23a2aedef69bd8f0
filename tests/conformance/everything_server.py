"""A server with everything that the MCP conformance suite and the client checks ask for, on the official SDK.

    python -m tests.conformance.everything_server --port 8000 --sdk            the SDK's own transport, one process
    python -m tests.conformance.everything_server --port 8000 --store URL      nonstick
    nonstick serve tests.conformance.everything_server:server --store URL      the same

The names and texts are the suite's. What an older client gets through a request in the middle of the call, a
2026-07-28 client gets through an input-required result (`input_required.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import warnings
from typing import Annotated, Any

import mcp_types as types
import uvicorn
from mcp.server import MCPServer, ServerRequestContext
from mcp.server.mcpserver import Context, Message, UserMessage
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.shared.exceptions import MCPDeprecationWarning
from pydantic import Field
from starlette.types import ASGIApp

import nonstick
from tests.conformance import input_required
from tests.conformance.event_store import MemoryEventStore

__all__ = ["server"]

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
"""One red pixel."""

WAV = base64.b64encode(
    b"RIFF\x26\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x80\x3e\x00\x00\x02\x00\x10\x00"
    b"data\x02\x00\x00\x00\x00\x00"
).decode()
"""One silent sample, 8 kHz, 16 bit."""

WATCHED = "test://watched-resource"
STEP = 0.05
"""Seconds between two messages of one tool: the suite wants them apart."""

SCHEMA_2020_12: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}

DEFAULTS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "default": "John Doe"},
        "age": {"type": "integer", "default": 30},
        "score": {"type": "number", "default": 95.5},
        "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
        "verified": {"type": "boolean", "default": True},
    },
}

ENUMS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "untitledSingle": {"type": "string", "enum": ["option1", "option2", "option3"]},
        "titledSingle": {
            "type": "string",
            "oneOf": [
                {"const": "value1", "title": "First Option"},
                {"const": "value2", "title": "Second Option"},
                {"const": "value3", "title": "Third Option"},
            ],
        },
        "legacyEnum": {
            "type": "string",
            "enum": ["opt1", "opt2", "opt3"],
            "enumNames": ["Option One", "Option Two", "Option Three"],
        },
        "untitledMulti": {"type": "array", "items": {"type": "string", "enum": ["option1", "option2", "option3"]}},
        "titledMulti": {
            "type": "array",
            "items": {
                "anyOf": [
                    {"const": "value1", "title": "First Choice"},
                    {"const": "value2", "title": "Second Choice"},
                    {"const": "value3", "title": "Third Choice"},
                ]
            },
        },
    },
}


def schema_2020_12_tool() -> Tool:
    """A tool whose input schema is given as it is: the SDK derives simpler ones from annotations."""

    def json_schema_2020_12_tool() -> str:
        return "ok"

    tool = Tool.from_function(json_schema_2020_12_tool, description="Tool with JSON Schema 2020-12 features")
    return tool.model_copy(update={"parameters": SCHEMA_2020_12})


cluster = nonstick.Cluster()
server: MCPServer[Any] = MCPServer(
    name="everything",
    version="1.0.0",
    tools=[schema_2020_12_tool()],
    subscriptions=cluster.subscription_bus,
    request_state_security=cluster.request_state_security,
)
input_required.register(server)


# ---- tools that only answer


@server.tool(structured_output=False)
def test_simple_text() -> str:
    """Returns a line of text."""
    return "This is a simple text response for testing."


@server.tool(structured_output=False)
def test_image_content() -> types.ImageContent:
    """Returns an image."""
    return types.ImageContent(type="image", data=PNG, mime_type="image/png")


@server.tool(structured_output=False)
def test_audio_content() -> types.AudioContent:
    """Returns a sound."""
    return types.AudioContent(type="audio", data=WAV, mime_type="audio/wav")


def embedded(uri: str, text: str, mime_type: str) -> types.EmbeddedResource:
    contents = types.TextResourceContents(uri=uri, mime_type=mime_type, text=text)
    return types.EmbeddedResource(type="resource", resource=contents)


@server.tool(structured_output=False)
def test_embedded_resource() -> types.EmbeddedResource:
    """Returns a resource inside the result."""
    return embedded("test://embedded-resource", "This is an embedded resource content.", "text/plain")


@server.tool(structured_output=False)
def test_multiple_content_types() -> list[types.ContentBlock]:
    """Returns text, an image and a resource."""
    return [
        types.TextContent(type="text", text="Multiple content types test:"),
        types.ImageContent(type="image", data=PNG, mime_type="image/png"),
        embedded("test://mixed-content-resource", json.dumps({"test": "data", "value": 123}), "application/json"),
    ]


@server.tool(structured_output=False)
def test_error_handling() -> str:
    """Always fails."""
    raise ToolError("This tool intentionally returns an error for testing")


@server.tool(structured_output=False)
def test_custom_header(region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})]) -> str:
    """Repeats an argument that a 2026-07-28 client also sends as an HTTP header."""
    return region


@server.tool(structured_output=False)
def test_node() -> str:
    """Names the process that ran this call."""
    return str(os.getpid())


# ---- tools that send something before they answer


@server.tool(structured_output=False)
async def test_tool_with_logging(ctx: Context[Any, Any]) -> str:
    """Sends three log messages."""
    await ctx.info("Tool execution started")
    await asyncio.sleep(STEP)
    await ctx.info("Tool processing data")
    await asyncio.sleep(STEP)
    await ctx.info("Tool execution completed")
    return "Logging completed"


@server.tool(structured_output=False)
async def test_logging_tool(ctx: Context[Any, Any]) -> str:
    """Logs, which a 2026-07-28 client sees only where it asked for it."""
    await ctx.info("A line for those who asked for it")
    return "Logged"


@server.tool(structured_output=False)
async def test_tool_with_progress(ctx: Context[Any, Any]) -> str:
    """Reports progress three times."""
    await ctx.report_progress(0, 100)
    await asyncio.sleep(STEP)
    await ctx.report_progress(50, 100)
    await asyncio.sleep(STEP)
    await ctx.report_progress(100, 100)
    return "Progress completed"


@server.tool(structured_output=False)
async def test_reconnection(ctx: Context[Any, Any]) -> str:
    """Closes its own SSE stream before it answers, so that the client has to come back for the answer."""
    await ctx.close_sse_stream()
    await asyncio.sleep(2 * STEP)
    return "Reconnection test completed successfully"


@server.tool(structured_output=False)
async def test_trigger_tool_change(ctx: Context[Any, Any]) -> str:
    """Tells every client that the tools changed."""
    await ctx.notify_tools_changed()
    await ctx.session.send_tool_list_changed()
    return "Announced"


@server.tool(structured_output=False)
async def test_trigger_prompt_change(ctx: Context[Any, Any]) -> str:
    """Tells every client that the prompts changed."""
    await ctx.notify_prompts_changed()
    await ctx.session.send_prompt_list_changed()
    return "Announced"


@server.tool(structured_output=False)
async def test_trigger_resource_update(ctx: Context[Any, Any]) -> str:
    """Tells the caller, and whoever listens, that the watched resource changed."""
    await ctx.notify_resource_updated(WATCHED)
    await ctx.session.send_resource_updated(WATCHED)
    return "Announced"


# ---- tools that ask the client something in the middle of the call (handshake era)


@server.tool(structured_output=False)
async def test_sampling(prompt: str, ctx: Context[Any, Any]) -> str:
    """Asks the client's model."""
    message = types.SamplingMessage(role="user", content=types.TextContent(type="text", text=prompt))
    reply = await ctx.session.create_message([message], max_tokens=100, related_request_id=ctx.request_id)
    return f"LLM response: {reply.content.text if isinstance(reply.content, types.TextContent) else reply.content}"


async def ask(ctx: Context[Any, Any], message: str, schema: dict[str, Any]) -> types.ElicitResult:
    reply: types.ElicitResult = await ctx.session.elicit_form(message, schema, related_request_id=ctx.request_id)
    return reply


@server.tool(structured_output=False)
async def test_elicitation(message: str, ctx: Context[Any, Any]) -> str:
    """Asks the user for a name and an address."""
    schema = {
        "type": "object",
        "properties": {
            "username": {"type": "string", "description": "User's response"},
            "email": {"type": "string", "description": "User's email address"},
        },
        "required": ["username", "email"],
    }
    reply = await ask(ctx, message, schema)
    return f"User response: action={reply.action}, content={json.dumps(reply.content)}"


@server.tool(structured_output=False)
async def test_elicitation_sep1034_defaults(ctx: Context[Any, Any]) -> str:
    """Asks the user with a default for every primitive type."""
    reply = await ask(ctx, "Please review the form", DEFAULTS_SCHEMA)
    return f"Elicitation completed: action={reply.action}, content={json.dumps(reply.content)}"


@server.tool(structured_output=False)
async def test_elicitation_sep1330_enums(ctx: Context[Any, Any]) -> str:
    """Asks the user with every kind of enum."""
    reply = await ask(ctx, "Please choose", ENUMS_SCHEMA)
    return f"Elicitation completed: action={reply.action}, content={json.dumps(reply.content)}"


@server.tool(structured_output=False)
async def test_list_roots(ctx: Context[Any, Any]) -> str:
    """Asks the client for its roots, on the standalone stream."""
    reply = await ctx.session.list_roots()
    return ", ".join(str(root.uri) for root in reply.roots)


@server.tool(structured_output=False)
async def test_ping_client(ctx: Context[Any, Any]) -> str:
    """Pings the client, on the standalone stream."""
    await ctx.session.send_ping()
    return "pong"


# ---- resources


@server.resource("test://static-text", mime_type="text/plain")
def static_text() -> str:
    """A line of text."""
    return "This is the content of the static text resource."


@server.resource("test://static-binary", mime_type="image/png")
def static_binary() -> bytes:
    """An image."""
    return base64.b64decode(PNG)


@server.resource("test://template/{id}/data", mime_type="application/json")
def template(id: str) -> str:  # noqa: A002 (the suite's template names the parameter)
    """A resource for each id."""
    return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


@server.resource(WATCHED, mime_type="text/plain")
def watched() -> str:
    """A resource to subscribe to."""
    return "Watched resource content"


# ---- prompts


@server.prompt()
def test_simple_prompt() -> str:
    """A prompt without arguments."""
    return "This is a simple prompt for testing."


@server.prompt()
def test_prompt_with_arguments(
    arg1: Annotated[str, Field(description="First test argument")],
    arg2: Annotated[str, Field(description="Second test argument")],
) -> str:
    """A prompt with two arguments."""
    return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"


@server.prompt()
def test_prompt_with_embedded_resource(
    resourceUri: Annotated[str, Field(description="URI of the resource to embed")],  # noqa: N803 (the suite's name)
) -> list[Message]:
    """A prompt with a resource in it."""
    return [
        UserMessage(embedded(resourceUri, "Embedded resource content for testing.", "text/plain")),
        UserMessage("Please process the embedded resource above."),
    ]


@server.prompt()
def test_prompt_with_image() -> list[Message]:
    """A prompt with an image in it."""
    return [
        UserMessage(types.ImageContent(type="image", data=PNG, mime_type="image/png")),
        UserMessage("Please analyze the image above."),
    ]


WORDS = ["paris", "park", "party", "test", "testing", "tested"]


@server.completion()  # type: ignore[no-untyped-call, untyped-decorator]
async def complete(
    ref: types.PromptReference | types.ResourceTemplateReference,
    argument: types.CompletionArgument,
    context: types.CompletionContext | None,
) -> types.Completion | None:
    """Words that begin with what was typed."""
    values = [word for word in WORDS if word.startswith(argument.value)]
    return types.Completion(values=values, total=len(values), has_more=False)


# ---- methods that only the handshake era has: MCPServer has no decorator for them


async def accept(ctx: ServerRequestContext[Any, Any], params: types.RequestParams) -> types.EmptyResult:
    return types.EmptyResult()


def add_handshake_methods(mcp: MCPServer[Any]) -> None:
    """Registers logging/setLevel and the resource subscriptions with the low-level server below `mcp`."""
    mcp.streamable_http_app()  # makes the session manager, through which the low-level server is public
    low_level = mcp.session_manager.app
    low_level.add_request_handler("logging/setLevel", types.SetLevelRequestParams, accept)
    low_level.add_request_handler("resources/subscribe", types.SubscribeRequestParams, accept)
    low_level.add_request_handler("resources/unsubscribe", types.UnsubscribeRequestParams, accept)


add_handshake_methods(server)


# ---- running it


def sdk_app(*, json_response: bool = False) -> ASGIApp:
    """The SDK's own transport: one process, sessions and events in its memory."""
    return server.streamable_http_app(json_response=json_response, event_store=MemoryEventStore(), retry_interval=100)


def nonstick_app(store: str) -> ASGIApp:
    """nonstick over this store."""
    return nonstick.app(server, store=store)


def main() -> None:
    parser = argparse.ArgumentParser(description="The everything server.")
    parser.add_argument("--port", type=int, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--sdk", action="store_true", help="the SDK's own transport")
    which.add_argument("--store", help="nonstick, over this store")
    parser.add_argument("--json", action="store_true", help="with --sdk: answer with JSON instead of SSE")
    arguments = parser.parse_args()
    # Logging and sampling are what is tested, deprecated or not.
    warnings.simplefilter("ignore", MCPDeprecationWarning)
    app = sdk_app(json_response=arguments.json) if arguments.sdk else nonstick_app(arguments.store)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning", timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()
