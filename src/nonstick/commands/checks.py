"""Whether a server was built with what its nodes have to share: the bus and the keys of clients of 2026-07-28, and the
state of FastMCP.

A server cannot be asked what it has. So each thing is used once, and the cluster notes whether its own was: see
`cluster/probing.py`. A FastMCP server shows its keys only while it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from mcp.server import Server, ServerRequestContext
from mcp.server.request_state import RequestStateBoundary
from mcp.server.subscriptions import ListenHandler
from mcp_types import SubscriptionFilter, SubscriptionsListenRequestParams

from nonstick import fastmcp
from nonstick.adopt import Adopted
from nonstick.cluster.cluster import Cluster
from nonstick.cluster.probing import probed
from nonstick.errors import without_text
from nonstick.stores.common.upkeep import Finding

__all__ = ["check_shared", "check_state"]

logger = logging.getLogger(__name__)

_LISTEN: Final = "subscriptions/listen"

_BUS: Final = (
    "subscriptions=cluster.subscription_bus",
    f"{_LISTEN} on one node does not hear what is published on another",
)
_KEYS: Final = (
    "request_state_security=cluster.request_state_security",
    "a requestState of one node is refused by the others, unless it was given keys that they share",
)
"""Of each thing: the argument that gives it to a server, and what clients miss without it."""


async def check_shared(adopted: Adopted) -> list[Finding]:
    """What clients of 2026-07-28 miss on other nodes, and the lines that give it to them. One for each endpoint."""
    findings: list[Finding] = []
    for manager, server, is_fastmcp in zip(adopted.managers, adopted.servers, adopted.from_fastmcp, strict=True):
        kind = "FastMCP" if is_fastmcp else "MCPServer"
        if server is None:
            findings.append(_unseen(manager.cluster))
        else:
            # FastMCP is given the bus by nonstick.
            bus = None if is_fastmcp else await _bus(server, manager.cluster)
            findings.append(_finding(kind, {_BUS: bus, _KEYS: await _keys(server, manager.cluster)}, manager.cluster))
    return findings


async def check_state(adopted: Adopted) -> list[Finding]:
    """Whether FastMCP servers, and those mounted in them, keep their session state where all nodes find it."""
    findings: list[Finding] = []
    for manager, app in zip(adopted.managers, adopted.fastmcp_apps, strict=True):
        server = getattr(getattr(app, "state", None), "fastmcp_server", None)
        if not fastmcp.is_server(server):
            continue
        apart = [one.name for one in await fastmcp.without_shared_state(server, manager.cluster)]
        findings.append(_apart(apart) if apart else _STATE_IS_SHARED)
    return findings


_STATE_IS_SHARED: Final = Finding("ok", "FastMCP", "the server was built with session state that the nodes share")


def _apart(names: list[str]) -> Finding:
    return Finding(
        "warning",
        "FastMCP",
        "what ctx.set_state() and per-session visibility keep on one node is not on the others, unless the server was "
        f"given another store that they share: {', '.join(map(repr, names))}",
        "Give it nonstick's, and to each server that is mounted in it:\ncluster = nonstick.Cluster()\n"
        "mcp = FastMCP(..., session_state_store=cluster.session_state_store)",
    )


def _unseen(cluster: Cluster) -> Finding:
    """Of a FastMCP server that does not run: nobody can have what was never taken, and that is all that is known."""
    if "request_state_security" not in cluster.taken:
        return _finding("FastMCP", {_KEYS: False}, cluster)
    return Finding(
        "warning",
        "2026-07-28",
        "somebody took the keys of a nonstick.Cluster; whether this server did is not known before it runs",
        "See its log when it starts: nothing is said there if it has them.",
    )


def _finding(kind: str, has: Mapping[tuple[str, str], bool | None], cluster: Cluster) -> Finding:
    """What is missing of these things. None stands for one that the server does not need, or that cannot be tried."""
    missing = [lines for lines, there in has.items() if there is False]
    if not missing:
        return Finding("ok", "2026-07-28", "the server was built with what these clients need shared between nodes")
    without = "all that its nonstick.Cluster has for it" if cluster.taken else "a nonstick.Cluster"
    lines = f"cluster = nonstick.Cluster()\nmcp = {kind}(..., {', '.join(argument for argument, _ in missing)})"
    return Finding(
        "warning",
        "2026-07-28",
        f"the server was built without {without}: {'; '.join(missed for _, missed in missing)}",
        "Make one before the server, only one in this process or the one that nonstick.app() is given, and give it to "
        f"the server:\n{lines}",
    )


# ---- trying


class _Enough(Exception):
    """Ends the trial: what it was made for has been seen."""


class _Session:
    """Stands for a client's session in a trial."""

    async def send_notification(self, *_: Any, **__: Any) -> None:
        raise _Enough


def _context(method: str, params: Mapping[str, Any]) -> ServerRequestContext[Any, Any]:
    session: Any = _Session()
    return ServerRequestContext(
        session=session,
        lifespan_context=None,
        protocol_version="2026-07-28",
        method=method,
        params=params,
        request_id="nonstick-probe",
    )


async def _bus(server: Server[Any], cluster: Cluster) -> bool | None:
    """Whether the server listens to this cluster's bus; None if it does not listen, or in a way of its own."""
    entry = server.get_request_handler(_LISTEN)
    if entry is None or not isinstance(entry.handler, ListenHandler):
        return None
    with probed() as used:
        try:
            params = SubscriptionsListenRequestParams(notifications=SubscriptionFilter())
            await entry.handler(_context(_LISTEN, {}), params)
        except _Enough:
            pass
        except Exception as error:
            logger.debug("tried the bus of a server", exc_info=without_text(error))
            return None
    return any(cluster.has(thing) for thing in used)


async def _keys(server: Server[Any], cluster: Cluster) -> bool | None:
    """Whether the server seals each requestState with this cluster's keys; None if it seals none."""
    sealed: list[bool] = []

    async def answer(_: Any) -> dict[str, Any]:
        return {"resultType": "input_required", "requestState": "nonstick-probe"}

    for boundary in server.middleware:
        if isinstance(boundary, RequestStateBoundary):
            with probed() as used:
                try:
                    await boundary(_context("tools/call", {"name": "nonstick-probe"}), answer)
                except Exception as error:
                    logger.debug("tried the keys of a server", exc_info=without_text(error))
            sealed.append(any(cluster.has(thing) for thing in used))
    return all(sealed) if sealed else None
