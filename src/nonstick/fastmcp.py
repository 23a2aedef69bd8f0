"""What FastMCP needs of its own: by its public names, and without importing it, since few processes have it."""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from mcp.server import Server, ServerRequestContext
from mcp.server.subscriptions import ListenHandler, SubscriptionBus
from mcp_types import EmptyResult, SetLevelRequestParams, SubscriptionsListenRequestParams
from starlette.applications import Starlette

from nonstick.cluster.probing import probed
from nonstick.cluster.state_store import PROBE
from nonstick.core.names import UNNAMED
from nonstick.errors import ConfigurationError, without_text
from nonstick.session.live import current_session

if TYPE_CHECKING:
    from fastmcp import FastMCP

    from nonstick.cluster.cluster import Cluster

__all__ = [
    "check_state",
    "has_tasks",
    "http_app",
    "is_endpoint",
    "is_nameless",
    "is_server",
    "keep_levels",
    "listen",
    "name_of",
    "name_sessions_by_hash",
    "without_shared_state",
]

logger = logging.getLogger(__name__)

_SPAN_ATTRIBUTES: Final = "get_session_span_attributes"
"""The function of theirs that tells each span what session it is of."""

_RAW_IDS: Final = (
    "this version of FastMCP is not known to nonstick: its spans may hold session ids. Whoever can read the traces "
    "could use the sessions"
)

_SET_LEVEL: Final = "logging/setLevel"
_LISTEN: Final = "subscriptions/listen"

_NOT_SHARED: Final = (
    "FastMCP server %r was not built with nonstick's state store: what ctx.set_state() and per-session visibility keep "
    "is in this process only, unless it was given another store that all nodes share. Build it with "
    "FastMCP(..., session_state_store=cluster.session_state_store), where cluster = nonstick.Cluster()"
)


_TASKS_APART: Final = (
    "FastMCP server %r keeps its background tasks in this process: asked for at another node, a task is unknown. Give "
    "them a Redis or Valkey that all nodes share: FASTMCP_DOCKET_URL=redis://..., or TasksExtension(url=...)"
)


def is_server(thing: object) -> TypeGuard[FastMCP[Any]]:
    """Whether it is a FastMCP server."""
    return _is_a(thing, "fastmcp.server.server", "FastMCP")


def is_endpoint(thing: object) -> bool:
    """Whether it is what FastMCP answers MCP requests with: an object whose `session_manager` can be assigned."""
    return _is_a(thing, "fastmcp.server.http", "StreamableHTTPASGIApp")


def _is_a(thing: object, module: str, name: str) -> bool:
    # Where FastMCP was not imported, nobody can have made one.
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)


def http_app(server: FastMCP[Any], *, path: str | None, refused: dict[str, Any], **arguments: Any) -> Starlette:
    """The server's own app.

    Raises:
        ConfigurationError: An argument is one that FastMCP has another place for.
    """
    if refused:
        raise ConfigurationError(
            f"{', '.join(sorted(refused))}: a FastMCP server is given auth= in FastMCP(...), routes with "
            "@server.custom_route(), and allowed_hosts=, allowed_origins= or middleware= in http_app(): "
            "nonstick.adopt(server.http_app(...), store=...)"
        )
    return server.http_app(path=path, **{name: value for name, value in arguments.items() if value})


def name_of(app: Starlette | None) -> str | None:
    """A name for the FastMCP server in this app that is the same in every process; None if there is no such server.

    One that was given none has a name that FastMCP makes up anew in each process.
    """
    server = None if app is None else getattr(app.state, "fastmcp_server", None)
    if not is_server(server):
        return None
    return type(server).__name__ if _is_nameless(server) else server.name


def is_nameless(app: Starlette | None) -> bool:
    """Whether the FastMCP server in this app was given no name."""
    server = None if app is None else getattr(app.state, "fastmcp_server", None)
    return is_server(server) and _is_nameless(server)


def _is_nameless(server: FastMCP[Any]) -> bool:
    return re.fullmatch(rf"{re.escape(type(server).__name__)}-[0-9a-f]{{4}}", server.name) is not None


# ---- the level of log messages


class _KeepLevel:
    """FastMCP's handler would keep the level in this process, and the session's live view for as long as it lives.

    In a session the level is in the record, and every node heeds it. Elsewhere (on stdio, say) FastMCP's own runs.
    """

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    async def __call__(self, ctx: ServerRequestContext[Any], params: SetLevelRequestParams) -> Any:
        if current_session() is not None:
            return EmptyResult()
        return await self._theirs(ctx, params)


def keep_levels(server: Server[Any]) -> None:
    """Has `logging/setLevel` be of the session and not of the process."""
    entry = server.get_request_handler(_SET_LEVEL)
    if entry is not None and not isinstance(entry.handler, _KeepLevel):
        server.add_request_handler(_SET_LEVEL, SetLevelRequestParams, _KeepLevel(entry.handler))


# ---- traces


class _ByHash:
    """What FastMCP's spans say of a session: its id only where that was asked for, else a part of its hash (P13)."""

    def __init__(self, theirs: Callable[[], dict[str, str]]) -> None:
        self._theirs = theirs

    def __call__(self) -> dict[str, str]:
        said, session = self._theirs(), current_session()
        if session is None or session.services.settings.trace_session_ids == "raw":
            return said
        return {name: session.key[:12] if value == session.id else value for name, value in said.items()}


def name_sessions_by_hash() -> None:
    """Has FastMCP's spans, of all its servers in this process, name sessions of nonstick as its logs do."""
    telemetry = sys.modules.get("fastmcp.server.telemetry")
    theirs = getattr(telemetry, _SPAN_ATTRIBUTES, None)
    if theirs is None:
        logger.warning(_RAW_IDS)
    elif not isinstance(theirs, _ByHash):
        setattr(telemetry, _SPAN_ATTRIBUTES, _ByHash(theirs))


# ---- subscriptions of clients of 2026-07-28


def listen(server: Server[Any], bus: SubscriptionBus) -> None:
    """Has these clients hear what is published on the bus (P11): FastMCP has no handler that could."""
    entry = server.get_request_handler(_LISTEN)
    if entry is None or isinstance(entry.handler, ListenHandler):
        server.add_request_handler(_LISTEN, SubscriptionsListenRequestParams, ListenHandler(bus))


# ---- session state


def has_tasks(app: Starlette) -> bool:
    """Whether the server in this app, which runs, has background tasks, which run on any node."""
    server = getattr(app.state, "fastmcp_server", None)
    return is_server(server) and server.docket is not None


async def check_state(app: Starlette, cluster: Cluster) -> None:
    """Warns if the server in this app keeps session state or background tasks where other nodes do not find them."""
    server = getattr(app.state, "fastmcp_server", None)
    if not is_server(server):
        return
    if _is_nameless(server):
        logger.warning(UNNAMED, "FastMCP")
    for one in await without_shared_state(server, cluster):
        logger.warning(_NOT_SHARED, one.name)
    # Servers that are mounted in it have no tasks of their own: FastMCP gives them those of the outermost.
    if server.docket is not None and server.docket.url.startswith("memory:"):
        logger.warning(_TASKS_APART, server.name)


async def without_shared_state(server: FastMCP[Any], cluster: Cluster) -> list[FastMCP[Any]]:
    """This server and those mounted in it, as far as they were not built with the cluster's state store."""
    from fastmcp import Context
    from fastmcp.server.dependencies import get_session

    apart: list[FastMCP[Any]] = []
    for one in [server, *_mounted(server)]:
        # FastMCP does not tell what store it has. To look for a session that cannot be, it asks it.
        with probed() as used:
            try:
                async with Context(fastmcp=one):
                    await get_session(PROBE)
            except Exception as error:
                logger.debug("looked for a session that is not there", exc_info=without_text(error))
        if not any(cluster.has(thing) for thing in used):
            apart.append(one)
    return apart


def _mounted(server: FastMCP[Any]) -> list[FastMCP[Any]]:
    """The servers that are mounted in this one, at any depth. Those behind a proxy are other processes."""
    from fastmcp.server.providers import FastMCPProvider, Provider

    found: dict[int, FastMCP[Any]] = {}
    seen: set[int] = set()
    held: list[object] = [*server.providers]
    while held:
        thing = held.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, FastMCPProvider):
            found.setdefault(id(thing.server), thing.server)
            held += thing.server.providers
        elif isinstance(thing, Provider | dict | list):
            # One that is mounted under a name is wrapped in another provider, which does not show it.
            held += gc.get_referents(thing)
    found.pop(id(server), None)
    return list(found.values())
