"""The examples run as they say, and any of their nodes serves any session (P1)."""

from __future__ import annotations

import os
from pathlib import Path

import httpx2
import pytest
from mcp import Client

from nonstick.testing.balancer import Backend, Balancer
from nonstick.testing.processes import NodeProcess

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("target", "path", "tool", "arguments", "said"),
    [
        ("examples.mounted:site", "/mcp/", "greet", {"name": "Ada"}, "Hello, Ada!"),
        ("examples.quickstart:app", "/mcp", "count", {"to": 3}, "counted to 3"),
        ("examples.own_routing:app", "/mcp", "remember", {"key": "a", "value": "b"}, "remembered"),
    ],
)
async def test_example_serves_a_session_from_two_nodes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    path: str,
    tool: str,
    arguments: dict[str, object],
    said: str,
) -> None:
    """P1. They keep their SQLite files in the working directory."""
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    store = "sqlite:///mounted.db"
    async with (
        NodeProcess(target, name="node-a", store=store, env=env, path=path) as a,
        NodeProcess(target, name="node-b", store=store, env=env, path=path) as b,
        Balancer([Backend("a", a.port), Backend("b", b.port)]) as balancer,
        Client(f"{balancer.url}{path}", mode="legacy", read_timeout_seconds=20) as client,
    ):
        for _ in range(4):
            result = await client.call_tool(tool, arguments)
            assert result.structured_content == {"result": said}
        served = {exchange.backend for exchange in balancer.exchanges if exchange.rpc == "tools/call"}
        assert served == {"a", "b"}
        if target == "examples.mounted:site":
            async with httpx2.AsyncClient() as http:
                assert (await http.get(f"{balancer.url}/readyz")).json() == "ready"
