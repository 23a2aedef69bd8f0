"""An HTTP request as another node can see it. Pure: no clock, no I/O.

The owner of a session sees requests that came to it and those that were relayed to it alike, without what opens doors:
neither the bearer token, nor cookies, nor the session id are written into a log (P13).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mcp.server.auth.middleware.auth_context import auth_context_var
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.streamable_http import MCP_SESSION_ID_HEADER
from starlette.authentication import AuthCredentials
from starlette.requests import Request

__all__ = ["acting_for", "pack", "unpack"]

_SECRET: Final = frozenset({"authorization", "proxy-authorization", "cookie", MCP_SESSION_ID_HEADER.lower()})
"""Headers that stay on the node that received them."""

_LATIN: Final = "latin-1"

_ID: Final = "\0session\0"
"""Stands for the session's id, which routes of one's own may have in the path, and proxies in headers."""


def pack(request: Request) -> dict[str, Any]:
    """The request without its body, as JSON: what a handler may see of it on another node."""
    scope = request.scope
    user = scope.get("user")
    session_id = request.headers.get(MCP_SESSION_ID_HEADER)

    def hidden(text: str) -> str:
        return text.replace(session_id, _ID) if session_id else text

    params = {name: value for name, value in request.path_params.items() if isinstance(value, str | int | float)}
    headers = [(name.decode(_LATIN), hidden(value.decode(_LATIN))) for name, value in scope["headers"]]
    return {
        "method": scope["method"],
        "path": hidden(scope["path"]),
        "params": {name: hidden(value) if isinstance(value, str) else value for name, value in params.items()},
        "query": hidden(scope.get("query_string", b"").decode(_LATIN)),
        "scheme": scope.get("scheme", "http"),
        "root": hidden(scope.get("root_path", "")),
        "client": scope.get("client"),
        "server": scope.get("server"),
        "headers": [(name, value) for name, value in headers if name.lower() not in _SECRET],
        "user": user.access_token.model_dump(mode="json", exclude={"token"})
        if isinstance(user, AuthenticatedUser)
        else None,
    }


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


@contextlib.contextmanager
def acting_for(request: Request) -> Iterator[None]:
    """What is begun meanwhile is the work of this request's user, as the SDK's `get_access_token` tells it."""
    user = request.scope.get("user")
    token = auth_context_var.set(user if isinstance(user, AuthenticatedUser) else None)
    try:
        yield
    finally:
        auth_context_var.reset(token)


def _address(packed: list[Any] | None) -> tuple[Any, ...] | None:
    return None if packed is None else tuple(packed)
