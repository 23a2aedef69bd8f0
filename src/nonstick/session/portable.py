"""An HTTP request as another node can see it. Pure: no clock, no I/O.

The owner of a session sees requests that came to it and those that were relayed to it alike, without what opens doors.
Proxies and gateways put credentials into headers of any name, and clients into the query: so headers are written into a
log only if they are known to hold none, or asked for by name; the query only if asked for (P13).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextvars import Context
from typing import Any, Final

from mcp.server.auth.middleware.auth_context import auth_context_var
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.streamable_http import MCP_SESSION_ID_HEADER
from starlette.authentication import AuthCredentials
from starlette.requests import Request

from nonstick.session import tracing

__all__ = ["HARMLESS", "context_of", "pack", "unpack"]

HARMLESS: Final = frozenset(
    {
        "accept",
        "accept-encoding",
        "accept-language",
        "baggage",
        "content-type",
        "host",
        "mcp-method",
        "mcp-name",
        "mcp-protocol-version",
        "origin",
        "traceparent",
        "tracestate",
        "user-agent",
        "x-correlation-id",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-port",
        "x-forwarded-prefix",
        "x-forwarded-proto",
        "x-real-ip",
        "x-request-id",
    }
)
"""Headers that hold no credentials, and tell a handler what the client is and how it came."""

_LATIN: Final = "latin-1"

_TELLING: Final = 16
"""Characters of a token that are in no other text by chance."""

_ID: Final = "\0session\0"
"""Stands for the session's id, which routes of one's own may have in the path, and proxies in headers."""


def pack(request: Request, *, more: Collection[str] = (), query: bool = False) -> dict[str, Any]:
    """The request without its body, as JSON: what a handler may see of it on another node.

    Args:
        more: Names, in lower case, of headers that it is to have beside the `HARMLESS` ones.
        query: Whether it is to have the query string.
    """
    scope = request.scope
    user = scope.get("user")
    session_id = request.headers.get(MCP_SESSION_ID_HEADER)

    def hidden(text: str) -> str:
        return text.replace(session_id, _ID) if session_id else text

    params = {name: value for name, value in request.path_params.items() if isinstance(value, str | int | float)}
    headers = [(name.decode(_LATIN).lower(), hidden(value.decode(_LATIN))) for name, value in scope["headers"]]
    return {
        "method": scope["method"],
        "path": hidden(scope["path"]),
        "params": {name: hidden(value) if isinstance(value, str) else value for name, value in params.items()},
        "query": hidden(scope.get("query_string", b"").decode(_LATIN)) if query else "",
        "scheme": scope.get("scheme", "http"),
        "root": hidden(scope.get("root_path", "")),
        "client": scope.get("client"),
        "server": scope.get("server"),
        "headers": [(name, value) for name, value in headers if name in HARMLESS or name in more],
        "user": _described(user.access_token) if isinstance(user, AuthenticatedUser) else None,
    }


def _described(token: AccessToken) -> dict[str, Any]:
    """What the token says of its user, in the SDK's own fields: not itself, which some verifiers put into claims."""
    fields = token.model_dump(mode="json", include=AccessToken.model_fields.keys() - {"token"})
    described: dict[str, Any] = _without(fields, token.token)
    return described


def _without(value: Any, secret: str) -> Any:
    """The value, with nothing where it has this text."""
    if isinstance(value, dict):
        return {name: _without(inner, secret) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without(inner, secret) for inner in value]
    if isinstance(value, str) and (value == secret or (len(secret) >= _TELLING and secret in value)):
        return ""
    return value


def unpack(packed: Mapping[str, Any], session_id: str) -> Request:
    """The request again, in this session. The access token of its user has every field but the token, which is ""."""

    def shown(text: str) -> str:
        return text.replace(_ID, session_id)

    headers = [(name.encode(_LATIN), shown(value).encode(_LATIN)) for name, value in packed["headers"]]
    path = shown(packed["path"])
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": packed["method"],
        "path": path,
        "raw_path": path.encode(),
        "path_params": {
            name: shown(value) if isinstance(value, str) else value for name, value in packed["params"].items()
        },
        "query_string": shown(packed["query"]).encode(_LATIN),
        "scheme": packed["scheme"],
        "root_path": shown(packed["root"]),
        "client": _address(packed["client"]),
        "server": _address(packed["server"]),
        "headers": [*headers, (MCP_SESSION_ID_HEADER.encode(), session_id.encode())],
    }
    if packed["user"] is not None:
        token = AccessToken.model_validate({**packed["user"], "token": ""})
        scope |= {"user": AuthenticatedUser(token), "auth": AuthCredentials(token.scopes)}
    return Request(scope)


def context_of(request: Request, trace: Mapping[str, str]) -> Context:
    """The context of this request's handler: its user, as the SDK's `get_access_token` tells it, and its trace.

    Nothing else. What the host's middleware set in variables of context stayed on the node that received the request.
    """
    context, user = Context(), request.scope.get("user")
    context.run(auth_context_var.set, user if isinstance(user, AuthenticatedUser) else None)
    if trace:
        context.run(tracing.resume, trace)
    return context


def _address(packed: list[Any] | None) -> tuple[Any, ...] | None:
    return None if packed is None else tuple(packed)
