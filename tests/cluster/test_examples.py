"""The examples run as they say, and any of their nodes serves any session (P1)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.context import ClientRequestContext
from mcp_types import ElicitRequestParams, ElicitResult, ResourceUpdatedNotification

from nonstick.testing.servers.balancer import Backend, Balancer
from nonstick.testing.servers.processes import NodeProcess

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
PATH = f"{ROOT}{os.pathsep}{ROOT / 'src'}"


@pytest.mark.parametrize(
    ("target", "path", "tool", "arguments", "said"),
    [
        pytest.param("examples.mounted:site", "/mcp/", "greet", {"name": "Ada"}, "Hello, Ada!", marks=pytest.mark.slow),
        pytest.param("examples.quickstart:app", "/mcp", "count", {"to": 3}, "counted to 3", marks=pytest.mark.slow),
        pytest.param(
            "examples.placement_stateless:app", "/mcp", "fahrenheit", {"celsius": 100}, 212.0, marks=pytest.mark.slow
        ),
        ("examples.own_routing:app", "/mcp", "remember", {"key": "a", "value": "b"}, "remembered"),
    ],
)
async def test_examples_serve_sessions_from_two_nodes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    path: str,
    tool: str,
    arguments: dict[str, object],
    said: object,
) -> None:
    """P1. They keep their SQLite files in the working directory."""
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": PATH}
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
            async with httpx2.AsyncClient(timeout=60) as http:
                assert (await http.get(f"{balancer.url}/readyz")).json() == "ready"


@asynccontextmanager
async def balanced(
    target: str, home: Path, nodes: list[NodeProcess] | None = None, **client: Any
) -> AsyncIterator[tuple[Client, Balancer]]:
    """A client of three nodes of this example, which are put into `nodes`."""
    async with AsyncExitStack() as stack:
        nodes = [] if nodes is None else nodes
        nodes += [
            await stack.enter_async_context(
                NodeProcess(target, name=name, store=f"sqlite:///{home}/example.db", env={"PYTHONPATH": PATH})
            )
            for name in ("node-a", "node-b", "node-c")
        ]
        backends = [Backend(node.name, node.port) for node in nodes]
        balancer = await stack.enter_async_context(Balancer(backends))
        url = f"{balancer.url}/mcp"
        yield (
            await stack.enter_async_context(Client(url, mode="legacy", read_timeout_seconds=40, **client)),
            balancer,
        )


async def test_wizard_is_answered_through_other_nodes(tmp_path: Path) -> None:
    """P4."""
    pages: list[dict[str, Any]] = [{"to": "Rome", "nights": 3}, {"kind": "suite"}, {"book": True}]
    asked: list[str] = []

    async def answer(context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
        asked.append(params.message)
        return ElicitResult(action="accept", content=pages[len(asked) - 1])

    async with balanced("examples.wizard:app", tmp_path, elicitation_callback=answer) as (client, balancer):
        booked = await client.call_tool("book_trip", {})
        assert booked.structured_content == {"result": "Booked: 3 nights in Rome, suite room."}
        assert asked[-1] == "3 nights in Rome, suite room. Shall I book it?"
        for _ in range(3):
            kept = await client.call_tool("bookings", {})
            assert kept.structured_content == {"result": ["3 nights in Rome, suite room"]}
        assert len({exchange.backend for exchange in balancer.exchanges}) == 3


@pytest.mark.slow
async def test_long_report_survives_closed_connection(tmp_path: Path) -> None:
    """P3. The client comes back by itself, and hears of every chapter once."""
    seen: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)

    async with balanced("examples.long_report:app", tmp_path) as (client, balancer):
        arguments = {"subject": "trees", "seconds": 2.0}
        written = await client.call_tool("report", arguments, progress_callback=note)
        assert written.structured_content is not None
        assert written.structured_content["result"].splitlines()[-1] == "5. print trees"
        assert seen == [1, 2, 3, 4, 5]
        resumed = [exchange for exchange in balancer.exchanges if "last-event-id" in exchange.request_headers]
        assert resumed


@pytest.mark.slow
async def test_basket_is_there_on_every_node(tmp_path: Path) -> None:
    """P2."""
    async with balanced("examples.placement_any:app", tmp_path) as (client, balancer):
        for count, item in enumerate(("bread", "milk", "tea"), 1):
            basket = await client.call_tool("add", {"item": item})
            assert basket.structured_content == {"result": ["bread", "milk", "tea"][:count]}
        assert len(served_by(balancer)) > 1


@pytest.mark.slow
async def test_transaction_stays_open_across_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P1, P8: it is on one node; where that is replaced, the client is told what became of it."""
    monkeypatch.setenv("LEDGER", str(tmp_path / "ledger.db"))
    nodes: list[NodeProcess] = []
    async with balanced("examples.placement_owner:app", tmp_path, nodes) as (client, balancer):
        for amount in (1, 2, 3):
            await client.call_tool("enter", {"account": "ada", "amount": amount})
        await client.call_tool("commit", {})
        await client.call_tool("enter", {"account": "ada", "amount": 100})
        seen = [await client.call_tool("balance", {"account": "ada"}) for _ in range(3)]
        assert [one.structured_content for one in seen] == [{"result": 106}] * 3
        assert len(served_by(balancer)) > 1
        opened = next(exchange.backend for exchange in balancer.exchanges if exchange.rpc == "initialize")
        owner = next(node for node in nodes if node.name == opened)
        owner.terminate()
        assert await owner.wait(30), owner.written
        told = await client.call_tool("balance", {"account": "ada"})
        assert told.is_error
        assert "rolled back" in str(told.content)
        left = await client.call_tool("balance", {"account": "ada"})
        assert left.structured_content == {"result": 6}


def served_by(balancer: Balancer) -> set[str]:
    """The nodes that tool calls came to."""
    return {str(exchange.backend) for exchange in balancer.exchanges if exchange.rpc == "tools/call"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning")
async def test_watchers_elsewhere_hear_of_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P11."""
    heard = asyncio.Event()

    async def hear(message: object) -> None:
        if isinstance(message, ResourceUpdatedNotification) and str(message.params.uri) == "home://thermostat":
            heard.set()

    monkeypatch.setenv("THERMOSTAT", str(tmp_path / "thermostat.txt"))
    async with balanced("examples.watcher:app", tmp_path, message_handler=hear) as (watcher, balancer):
        await watcher.subscribe_resource("home://thermostat")
        async with Client(f"{balancer.url}/mcp", mode="legacy", read_timeout_seconds=40) as other:
            await other.call_tool("set_thermostat", {"degrees": 23})
        async with asyncio.timeout(60):
            await heard.wait()
        read = await watcher.read_resource("home://thermostat")
        assert "23 degrees" in read.model_dump_json()
