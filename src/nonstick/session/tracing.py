"""OpenTelemetry, as the SDK has it: one trace follows a request, wherever it runs and whom it asks (P18).

The SDK makes the spans of handlers. Here are those of server requests, which its dispatcher would have made, and the
trace context of a request that runs on another node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mcp.shared.exceptions import MCPError
from mcp_types import RequestId
from opentelemetry.context import Context, attach
from opentelemetry.propagate import extract, inject
from opentelemetry.trace import Span, SpanKind, StatusCode, get_tracer

__all__ = ["asking", "fail", "here", "resume"]

_LONGEST: Final = 16 * 1024
"""Characters of trace context and baggage that go into a log: W3C allows 8192 of baggage."""

_tracer = get_tracer("nonstick")


def here() -> dict[str, str]:
    """The current trace context and baggage, as JSON; empty if nothing traces, or if they are too long."""
    trace: dict[str, str] = {}
    inject(trace)
    return trace if sum(map(len, trace.values())) <= _LONGEST else {}


def resume(trace: Mapping[str, str]) -> None:
    """Makes this trace context and baggage the current ones."""
    # Malformed is what another release wrote.
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        attach(extract(trace, Context()))


@contextlib.contextmanager
def asking(request_id: RequestId, method: str, params: dict[str, Any]) -> Iterator[Span]:
    """The span of a server request, and its context in the request's `_meta`: with the names of the SDK."""
    target = params.get("name")
    name = f"MCP send {method} {target}" if isinstance(target, str) else f"MCP send {method}"
    attributes = {"mcp.method.name": method, "jsonrpc.request.id": str(request_id)}
    with _tracer.start_as_current_span(name, kind=SpanKind.CLIENT, attributes=attributes) as span:
        meta = dict(params.pop("_meta", None) or {})
        inject(meta)
        if meta:
            params["_meta"] = meta
        yield span


def fail(span: Span, error: MCPError) -> None:
    """The client replied with this error."""
    code = str(error.code)
    span.set_attributes({"error.type": code, "rpc.response.status_code": code})
    span.set_status(StatusCode.ERROR, error.message)
