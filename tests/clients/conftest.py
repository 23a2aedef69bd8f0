"""Nodes that all tests of a module share: real processes behind a balancer that knows no sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from nonstick.testing.servers.balancer import Balancer
from tests.conformance.nodes import balanced, nonstick, store_url

NODES = 3

QUICK = {
    "sqlite": (
        "test_fastmcps_client",
        "test_session_state",
        "test_session_hides_components",
        "test_explicit_sessions",
        "test_replies_reach",
        "test_log_level",
        "test_lists_reads",
        "test_client_answers",
        "test_typescript_client_works_with_fastmcp_server[sqlite-2025-11-25]",
    ),
    "valkey": ("test_session_state", "test_replies_reach"),
    "postgres": (),
}
"""What of FastMCP's tests is not slow, on each store: the nodes are the same, and tested elsewhere."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the others, and the TypeScript client's on Valkey, where the conformance suite is one."""
    for item in items:
        spec = getattr(item, "callspec", None)
        if spec is None or "nodes" not in spec.params:
            continue
        if item.path.name == "test_fastmcp.py" and not item.name.startswith(QUICK[spec.params["nodes"]]):
            item.add_marker(pytest.mark.slow)
        if item.path.name == "test_typescript.py" and spec.params["nodes"] == "valkey":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """As everywhere, but for a whole module: its nodes and its balancer live in one event loop."""
    return "asyncio"


@pytest.fixture(scope="module", params=["sqlite", "valkey", pytest.param("postgres", marks=pytest.mark.slow)])
async def nodes(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Balancer]:
    """Three nonstick nodes on one store."""
    with store_url(request.param) as url:
        async with balanced(NODES, nonstick(url)) as balancer:
            yield balancer
