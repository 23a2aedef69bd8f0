"""Nodes that all tests of a module share: real processes behind a balancer that knows no sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from nonstick.testing.balancer import Balancer
from tests.conformance.nodes import balanced, nonstick, store_url

NODES = 3


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """As everywhere, but for a whole module: its nodes and its balancer live in one event loop."""
    return "asyncio"


@pytest.fixture(scope="module", params=["sqlite", "valkey"])
async def nodes(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Balancer]:
    """Three nonstick nodes on one store."""
    with store_url(request.param) as url:
        async with balanced(NODES, nonstick(url)) as balancer:
            yield balancer
