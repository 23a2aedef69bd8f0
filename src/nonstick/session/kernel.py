"""What a server can do on nonstick beyond its own handlers: those for what the session record keeps, and their
capabilities.
"""

from __future__ import annotations

from typing import Any

import mcp_types as types
from mcp.server import NotificationOptions, Server, ServerRequestContext
from mcp.server.models import InitializationOptions
from mcp.shared.exceptions import MCPError

from nonstick.session.live import current_connection

__all__ = ["initialization", "offer"]


def offer(server: Server[Any]) -> None:
    """Gives the server handlers for subscriptions to its resources and for the log level, if it has none of its own.

    What they ask for is kept in the session record and honoured by every node: see `Exchange`. The SDK advertises what
    has a handler.
    """
    if server.get_request_handler("logging/setLevel") is None:
        server.add_request_handler("logging/setLevel", types.SetLevelRequestParams, _keep)
    has_resources = any(server.get_request_handler(f"resources/{what}") for what in ("list", "read"))
    has_own = any(server.get_request_handler(f"resources/{what}") for what in ("subscribe", "unsubscribe"))
    if has_resources and not has_own:
        server.add_request_handler("resources/subscribe", types.SubscribeRequestParams, _keep)
        server.add_request_handler("resources/unsubscribe", types.UnsubscribeRequestParams, _keep)


async def _keep(ctx: ServerRequestContext[Any, Any], _params: Any) -> types.EmptyResult:
    try:
        current_connection()
    except LookupError:
        # The same server on stdio, say: nothing there would heed it.
        raise MCPError(types.METHOD_NOT_FOUND, "Method not found", ctx.method) from None
    return types.EmptyResult()


def initialization(server: Server[Any]) -> InitializationOptions:
    """What a client is told in the handshake: that changes of lists will be notified of, for they can be (P11).

    There are clients that take no notice of them otherwise.
    """
    return server.create_initialization_options(
        NotificationOptions(prompts_changed=True, resources_changed=True, tools_changed=True)
    )
