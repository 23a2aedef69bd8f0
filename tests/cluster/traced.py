"""A server whose spans are written down, behind a middleware that makes one for each HTTP request, as a host's would.

Settings come from the environment: `NONSTICK_STORE`, `TRACED_OPTIONS` (JSON, for `nonstick.app`), `TRACED_SDK`, with
which the SDK serves alone, and `TRACED_SPANS`, a file that the spans of all nodes are appended to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mcp_types as types
from mcp.server import Server, ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp.shared.message import ServerMessageMetadata
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

import nonstick

__all__ = ["app"]


class Written:
    """An exporter: one line of JSON for each span."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            own, parent = span.get_span_context(), span.parent
            assert own is not None
            line = {
                "name": span.name,
                "kind": span.kind.name,
                "node": os.environ["NONSTICK_NODE"],
                "trace": f"{own.trace_id:032x}",
                "span": f"{own.span_id:016x}",
                "parent": None if parent is None else f"{parent.span_id:016x}",
                "status": span.status.status_code.name,
                "attributes": dict(span.attributes or {}),
                "events": [event.name for event in span.events],
            }
            with Path(os.environ["TRACED_SPANS"]).open("a") as file:
                file.write(json.dumps(line) + "\n")
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held back."""


provider = TracerProvider()
exporter: Any = Written()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)


class Traced:
    """A span for each HTTP request, under the trace that its headers name."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        carrier = {name.decode(): value.decode() for name, value in scope["headers"]}
        token = context.attach(propagate.extract(carrier))
        try:
            with trace.get_tracer("host").start_as_current_span("http", kind=trace.SpanKind.SERVER):
                await self._app(scope, receive, send)
        finally:
            context.detach(token)


async def _call(ctx: ServerRequestContext[Any, Any], params: types.CallToolRequestParams) -> types.CallToolResult:
    """Asks the client what it is told to, and says in which trace and with which baggage it runs."""
    shown: Any = None
    if method := (params.arguments or {}).get("asks"):
        kind, result = ASKED[method]
        session: Any = ctx.session
        related = ServerMessageMetadata(related_request_id=ctx.request_id)
        message = kind.model_validate({"method": method, **QUESTIONS.get(method, {})})
        try:
            await session.send_request(message, result, metadata=related)
        except MCPError as error:
            shown = error.code
    answer = {"who": baggage.get_baggage("who"), "trace": current(), "shown": shown}
    return types.CallToolResult(content=[types.TextContent(text=json.dumps(answer))])


ASKED: dict[str, tuple[Any, Any]] = {
    "elicitation/create": (types.ElicitRequest, types.ElicitResult),
    "sampling/createMessage": (types.CreateMessageRequest, types.CreateMessageResult),
    "roots/list": (types.ListRootsRequest, types.ListRootsResult),
    "ping": (types.PingRequest, types.EmptyResult),
}
QUESTIONS: dict[str, dict[str, Any]] = {
    "elicitation/create": {"params": {"message": "name?", "requestedSchema": {"type": "object", "properties": {}}}},
    "sampling/createMessage": {"params": {"messages": [], "maxTokens": 1, "_meta": {"kept": 1}}},
}


def current() -> str:
    """The trace that this code is in."""
    return f"{trace.get_current_span().get_span_context().trace_id:032x}"


async def _list(
    ctx: ServerRequestContext[Any, Any], params: types.PaginatedRequestParams | None
) -> types.ListToolsResult:
    return types.ListToolsResult(tools=[])


server: Server[Any] = Server("traced", version="1", on_list_tools=_list, on_call_tool=_call)
app: Starlette
if os.environ.get("TRACED_SDK"):
    app = server.streamable_http_app()
else:
    app = nonstick.app(server, store=os.environ["NONSTICK_STORE"], **json.loads(os.environ["TRACED_OPTIONS"]))
app.add_middleware(Traced)
