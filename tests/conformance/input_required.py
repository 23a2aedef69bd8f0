"""The everything server's tools and prompt for clients of the 2026-07-28 era, which are asked by a result (SEP-2322).

There is no request in the middle of the call: the server answers with what it wants to know, and the client calls
again with the answers and the sealed `requestState`. Any node must be able to take the second call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import mcp_types as types
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.shared.exceptions import MCPError

__all__ = ["register"]

Reply = types.CallToolResult | types.InputRequiredResult
AnswerT = TypeVar("AnswerT", bound=types.InputResponse)


def said(text: str) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)])


def form(message: str, field: str, kind: str = "string") -> types.ElicitRequest:
    schema = {"type": "object", "properties": {field: {"type": kind}}, "required": [field]}
    return types.ElicitRequest(params=types.ElicitRequestFormParams(message=message, requested_schema=schema))


def sample(text: str, max_tokens: int) -> types.CreateMessageRequest:
    message = types.SamplingMessage(role="user", content=types.TextContent(type="text", text=text))
    return types.CreateMessageRequest(
        params=types.CreateMessageRequestParams(messages=[message], max_tokens=max_tokens)
    )


def want(requests: dict[str, types.InputRequest], state: str | None = None) -> types.InputRequiredResult:
    return types.InputRequiredResult(input_requests=requests, request_state=state)


def answer(ctx: Context[Any, Any], key: str, kind: type[AnswerT]) -> AnswerT | None:
    """The client's answer under this key, if there is one and it is of this kind."""
    found = (ctx.input_responses or {}).get(key)
    return found if isinstance(found, kind) else None


def filled(ctx: Context[Any, Any], key: str, field: str) -> Any:
    """A field of the form that the user accepted under this key; None if there is no such answer."""
    reply = answer(ctx, key, types.ElicitResult)
    return None if reply is None or reply.action != "accept" else (reply.content or {}).get(field)


async def test_input_required_result_elicitation(ctx: Context[Any, Any]) -> Reply:
    """Asks for a name."""
    name = filled(ctx, "user_name", "name")
    return want({"user_name": form("What is your name?", "name")}) if name is None else said(f"Hello, {name}!")


async def test_input_required_result_sampling(ctx: Context[Any, Any]) -> Reply:
    """Asks the client's model."""
    reply = answer(ctx, "capital_question", types.CreateMessageResult)
    if reply is None:
        return want({"capital_question": sample("What is the capital of France?", 100)})
    return said(reply.content.text if isinstance(reply.content, types.TextContent) else str(reply.content))


async def test_input_required_result_list_roots(ctx: Context[Any, Any]) -> Reply:
    """Asks for the client's roots."""
    reply = answer(ctx, "client_roots", types.ListRootsResult)
    if reply is None:
        return want({"client_roots": types.ListRootsRequest()})
    return said(", ".join(str(root.uri) for root in reply.roots))


async def test_input_required_result_request_state(ctx: Context[Any, Any]) -> Reply:
    """Asks for a confirmation, and expects its state back."""
    if filled(ctx, "confirm", "ok") is None or ctx.request_state != "asked":
        return want({"confirm": form("Please confirm", "ok", "boolean")}, "asked")
    return said("state-ok")


async def test_input_required_result_tampered_state(ctx: Context[Any, Any]) -> Reply:
    """Asks for a confirmation; the SDK refuses a state that it did not seal."""
    return await test_input_required_result_request_state(ctx)


async def test_input_required_result_multiple_inputs(ctx: Context[Any, Any]) -> Reply:
    """Asks for three things at once."""
    name = filled(ctx, "user_name", "name")
    greeting = answer(ctx, "greeting", types.CreateMessageResult)
    roots = answer(ctx, "client_roots", types.ListRootsResult)
    if name is None or greeting is None or roots is None:
        return want(
            {
                "user_name": form("What is your name?", "name"),
                "greeting": sample("Generate a greeting", 50),
                "client_roots": types.ListRootsRequest(),
            },
            "asked",
        )
    return said(f"Greeted {name}, who has {len(roots.roots)} roots")


async def test_input_required_result_multi_round(ctx: Context[Any, Any]) -> Reply:
    """Asks twice, one question after the other."""
    state = ctx.request_state or ""
    if state.startswith("named:"):
        color = filled(ctx, "step2", "color")
        name = state.removeprefix("named:")
        if color is not None:
            return said(f"{name} likes {color}")
    else:
        name = filled(ctx, "step1", "name")
        if name is None:
            return want({"step1": form("Step 1: What is your name?", "name")}, "new")
    return want({"step2": form("Step 2: What is your favorite color?", "color")}, f"named:{name}")


def questions(capabilities: types.ClientCapabilities | None) -> Iterator[tuple[str, types.InputRequest]]:
    """What may be asked of a client with these capabilities."""
    if capabilities is None:
        return
    if capabilities.elicitation is not None:
        yield "user_name", form("What is your name?", "name")
    if capabilities.sampling is not None:
        yield "greeting", sample("Generate a greeting", 50)
    if capabilities.roots is not None:
        yield "client_roots", types.ListRootsRequest()


async def test_input_required_result_capabilities(ctx: Context[Any, Any]) -> Reply:
    """Asks only what the client said that it can answer."""
    if ctx.input_responses:
        return said("Answered")
    wanted = dict(questions(ctx.client_capabilities))
    return want(wanted) if wanted else said("This client can answer nothing")


async def test_missing_capability(ctx: Context[Any, Any]) -> Reply:
    """Refuses a client without sampling."""
    capabilities = ctx.client_capabilities
    if capabilities is None or capabilities.sampling is None:
        needed = types.ClientCapabilities(sampling=types.SamplingCapability())
        data = types.MissingRequiredClientCapabilityErrorData(required_capabilities=needed)
        raise MCPError(
            code=types.MISSING_REQUIRED_CLIENT_CAPABILITY,
            message="This tool needs the client's model",
            data=data.model_dump(by_alias=True, mode="json", exclude_none=True),
        )
    return said("Sampling is there")


async def test_streaming_elicitation(ctx: Context[Any, Any]) -> Reply:
    """Reports progress on its stream, then asks for a name."""
    await ctx.report_progress(1, 2)
    return await test_input_required_result_elicitation(ctx)


async def test_input_required_result_prompt(ctx: Context[Any, Any]) -> str | types.InputRequiredResult:
    """A prompt that asks for its context."""
    context = filled(ctx, "user_context", "context")
    if context is None:
        return want({"user_context": form("What context should the prompt use?", "context")})
    return f"Use this context: {context}"


TOOLS = (
    test_input_required_result_elicitation,
    test_input_required_result_sampling,
    test_input_required_result_list_roots,
    test_input_required_result_request_state,
    test_input_required_result_tampered_state,
    test_input_required_result_multiple_inputs,
    test_input_required_result_multi_round,
    test_input_required_result_capabilities,
    test_missing_capability,
    test_streaming_elicitation,
)


def register(server: MCPServer[Any]) -> None:
    """Gives `server` these tools and the prompt."""
    for tool in TOOLS:
        server.tool(structured_output=False)(tool)
    server.prompt()(test_input_required_result_prompt)
