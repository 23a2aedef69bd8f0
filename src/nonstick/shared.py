"""Whether a server was built with what clients of 2026-07-28 need shared between nodes.

The SDK gives no public way to see which bus and which keys a server has. What can be known: whether the server needs
them at all, whether a `Cluster` was made in this process, and whether anybody took its bus or its keys. Nothing that
nobody took can be in a server. (That what was taken went into this server is assumed.)
"""

from __future__ import annotations

from typing import Any, Final

from mcp.server import Server
from mcp.server.request_state import RequestStateBoundary

from nonstick.adopt import Adopted
from nonstick.cluster import Cluster
from nonstick.examine import Finding

__all__ = ["check_shared", "check_state"]

_LISTEN: Final = "subscriptions/listen"

_SHARED: Final = {
    "subscription_bus": (
        "subscriptions=cluster.subscription_bus",
        f"{_LISTEN} on one node does not hear what is published on another",
    ),
    "request_state_security": (
        "request_state_security=cluster.request_state_security",
        "a requestState of one node is refused by the others",
    ),
}
"""By attribute of the cluster: how a server gets it, and what is missed without it."""


def check_shared(adopted: Adopted) -> list[Finding]:
    """What clients of 2026-07-28 miss on other nodes, and the two lines that give it to them. One for each endpoint."""
    endpoints = zip(adopted.managers, adopted.from_fastmcp, strict=True)
    # FastMCP seals always, and is given the bus by nonstick.
    return [
        _check("FastMCP", ["request_state_security"]) if fastmcp else _check("MCPServer", _needs(manager.app))
        for manager, fastmcp in endpoints
    ]


def check_state(adopted: Adopted) -> list[Finding]:
    """Whether FastMCP servers were built with the session state that all nodes share: one for each such endpoint."""
    cluster = Cluster.only()
    if cluster is not None and "session_state_store" in cluster.taken:
        finding = Finding("ok", "FastMCP", "the server was built with session state that the nodes share")
    else:
        finding = Finding(
            "warning",
            "FastMCP",
            "what ctx.set_state() and per-session visibility keep on one node is not on the others, unless the server "
            "was given another store that they share",
            "Give it nonstick's:\ncluster = nonstick.Cluster()\n"
            "mcp = FastMCP(..., session_state_store=cluster.session_state_store)",
        )
    return [finding for fastmcp in adopted.from_fastmcp if fastmcp]


def _check(kind: str, needs: list[str]) -> Finding:
    cluster = Cluster.only()
    taken = cluster.taken if cluster is not None else frozenset[str]()
    missing = [_SHARED[name] for name in needs if name not in taken]
    if not missing:
        return Finding("ok", "2026-07-28", "the server was built with what these clients need shared between nodes")
    without = "a nonstick.Cluster" if cluster is None else "all that its nonstick.Cluster has for it"
    lines = f"cluster = nonstick.Cluster()\nmcp = {kind}(..., {', '.join(argument for argument, _ in missing)})"
    return Finding(
        "warning",
        "2026-07-28",
        f"the server was built without {without}: {'; '.join(missed for _, missed in missing)}",
        f"Make one before the server, only one in this process, and give it to the server:\n{lines}",
    )


def _needs(server: Server[Any]) -> list[str]:
    needs = ["subscription_bus"] if server.get_request_handler(_LISTEN) is not None else []
    seals = any(isinstance(one, RequestStateBoundary) for one in server.middleware)
    return [*needs, "request_state_security"] if seals else needs
