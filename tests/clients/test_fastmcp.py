"""A FastMCP server on three nodes, used by FastMCP's client, the official Python client and the TypeScript client.

The nodes are in this process, behind a balancer that sends each request to the next one.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import anyio
import mcp_types as types
import pytest
from fastmcp import Client
from fastmcp.client.elicitation import ElicitResult
from fastmcp.client.logging import LogMessage
from mcp.client.client import ConnectMode

import nonstick
from nonstick.stores.postgres import PostgresStore
from nonstick.testing import PostgresServer, ValkeyServer
from nonstick.testing.cluster import Member
from nonstick.testing.servers.balancer import Backend, Balancer
from tests.clients import fastmcp_server
from tests.clients.conftest import NODES
from tests.clients.test_python import (  # noqa: F401 - found here too, they run on this module's nodes
    mode,
    test_calls_run_on_every_node,
    test_client_answers_what_the_server_asks,
    test_client_comes_back_for_an_answer,
    test_concurrent_calls_get_their_own_answers,
    test_every_node_accepts_the_request_state,
    test_lists_reads_and_calls_work,
    test_log_messages_arrive_in_order,
    test_notifications_arrive_on_the_standalone_stream,
    test_progress_arrives_in_order,
    test_replies_find_the_waiting_handler,
    test_session_lives_and_ends_everywhere,
    test_sessionless_protocol_opens_no_session,
    test_subscriber_hears_changes_from_every_node,
)
from tests.clients.test_typescript import drive, node  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning"),
]

SECONDS = 120.0
MakeStore = Callable[[], Any]


@contextmanager
def stores(kind: str) -> Iterator[MakeStore]:
    """Makes a store for each node, all on the same data."""
    match kind:
        case "sqlite":
            with tempfile.TemporaryDirectory(prefix="nonstick-fastmcp-") as home:
                yield lambda: f"sqlite:///{home}/store.db"
        case "valkey":
            with ValkeyServer() as valkey:
                yield lambda: valkey.url
        case _:
            with PostgresServer() as postgres:
                schema = f"test_{secrets.token_hex(6)}"
                yield lambda: PostgresStore(postgres.url, schema=schema)


@pytest.fixture(scope="module", params=["sqlite", "valkey", "postgres"])
async def nodes(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Balancer]:
    """Three nodes with a FastMCP server on one store."""
    async with AsyncExitStack() as stack:
        make_store = stack.enter_context(stores(request.param))
        members = []
        for name in ("a", "b", "c"):
            cluster = nonstick.Cluster()
            server = fastmcp_server.make(cluster, name)
            application = nonstick.app(server, store=make_store(), cluster=cluster, node_name=name, grace=2.0)
            member = Member(name, application)
            await member.start()
            stack.push_async_callback(member.stop)
            members.append(member)
        assert len(members) == NODES
        backends = [Backend(member.name, member.port) for member in members]
        yield await stack.enter_async_context(Balancer(backends))


# ---- FastMCP's own client


class Peer:
    """The client's side."""

    def __init__(self) -> None:
        self.logs: list[Any] = []
        self.messages: list[Any] = []

    async def elicit(self, message: str, kind: Any, params: Any, context: Any) -> Any:
        return ElicitResult(
            action="accept", content={name: f"my {name}" for name in params.requested_schema["properties"]}
        )

    async def sample(self, messages: Any, params: Any, context: Any) -> str:
        return f"Echo: {messages[0].content.text}"

    async def log(self, message: LogMessage) -> None:
        self.logs.append(message.data["msg"])

    async def message(self, message: Any) -> None:
        self.messages.append(message)


@asynccontextmanager
async def connected(nodes: Balancer, mode: ConnectMode, peer: Peer | None = None) -> AsyncIterator[Client[Any]]:  # noqa: F811
    peer = peer or Peer()
    client = Client[Any](
        f"{nodes.url}/mcp",
        mode=mode,
        cache=False,
        roots=["file:///home"],
        timeout=SECONDS,
        elicitation_handler=peer.elicit,
        sampling_handler=peer.sample,
        log_handler=peer.log,
        message_handler=peer.message,
    )
    with anyio.fail_after(2 * SECONDS):
        async with client:
            yield client


async def call(client: Client[Any], name: str, **arguments: Any) -> Any:
    return (await client.call_tool(name, arguments)).data


async def test_fastmcps_client_works_on_every_node(nodes: Balancer, mode: ConnectMode) -> None:  # noqa: F811
    """P1, P3: lists, reads, calls and progress, in both eras."""
    async with connected(nodes, mode) as client:
        assert "vault" in {tool.name for tool in await client.list_tools()}
        assert {await call(client, "test_node") for _ in range(2 * NODES)} == {"a", "b", "c"}
        contents = (await client.read_resource("test://template/7/data"))[0]
        assert isinstance(contents, types.TextResourceContents)
        assert '"7"' in contents.text
        prompt = await client.get_prompt("test_prompt_with_arguments", {"arg1": "one", "arg2": "two"})
        said = prompt.messages[0].content
        assert isinstance(said, types.TextContent)
        assert said.text == "Prompt with arguments: arg1='one', arg2='two'"
        seen: list[float] = []

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            seen.append(progress)

        await client.call_tool("test_tool_with_progress", progress_handler=hear)
        assert seen == [0, 50, 100]


async def test_session_state_is_on_every_node(nodes: Balancer) -> None:
    """P2: `ctx.session_id` is one, and what `ctx.set_state` kept is what `ctx.get_state` finds."""
    async with connected(nodes, "legacy") as client, connected(nodes, "legacy") as other:
        session = await call(client, "remember", key="cart", value={"apples": [1, 2], "né": None})
        for _ in range(NODES):
            found = {"session": session, "value": {"apples": [1, 2], "né": None}}
            assert await call(client, "recall", key="cart") == found
            assert (await call(other, "recall", key="cart"))["value"] is None
        for turn in range(NODES):
            await call(client, "remember", key="cart", value=turn)
            assert (await call(client, "recall", key="cart"))["value"] == turn
        await call(client, "forget", key="cart")
        for _ in range(NODES):
            assert (await call(client, "recall", key="cart"))["value"] is None


async def test_session_hides_components_on_every_node(nodes: Balancer) -> None:
    """P2. The client is told that its tools changed, and no other's tools have."""
    peer = Peer()
    async with connected(nodes, "legacy", peer) as client, connected(nodes, "legacy") as other:
        await call(client, "hide")
        for _ in range(NODES):
            assert "vault" not in {tool.name for tool in await client.list_tools()}
            assert "vault" in {tool.name for tool in await other.list_tools()}
        assert await call(other, "vault") == "gold"
        assert any(isinstance(message, types.ToolListChangedNotification) for message in peer.messages)


async def test_explicit_sessions_work_on_every_node(
    nodes: Balancer,
    mode: ConnectMode,  # noqa: F811
) -> None:
    """What FastMCP offers to clients that have no session: an id that the model passes on."""
    async with connected(nodes, mode) as client:
        session = await call(client, "create_session")
        for turn in range(NODES):
            await call(client, "note", text=f"note {turn}", session_id=session)
            assert await call(client, "noted", session_id=session) == f"note {turn}"
        await call(client, "end_session", session_id=session)
        for _ in range(NODES):
            refused = await client.call_tool("noted", {"session_id": session}, raise_on_error=False)
            assert refused.is_error


async def test_replies_reach_fastmcps_tools(nodes: Balancer) -> None:
    """P4: elicitation, sampling, roots."""
    async with connected(nodes, "legacy") as client:
        for turn in range(NODES):
            assert await call(client, "wizard") == "accept: my value"
            assert await call(client, "test_sampling", prompt=f"{turn}") == f"LLM response: Echo: {turn}"
            assert await call(client, "test_list_roots") == "file:///home"


async def test_log_level_of_session_holds_everywhere(nodes: Balancer) -> None:
    """P2: set on one node, heeded by all; changed on another, that holds everywhere too."""
    peer = Peer()
    async with connected(nodes, "legacy", peer) as client:
        for level, wanted in (
            ("error", ["error"]),
            ("info", ["info", "warning", "error"]),
            ("warning", ["warning", "error"]),
        ):
            await client.set_logging_level(level)  # type: ignore[arg-type]
            for _ in range(NODES):
                peer.logs.clear()
                await call(client, "shout")
                assert peer.logs == wanted


async def test_fastmcps_client_answers_what_results_ask(nodes: Balancer) -> None:
    """Any node takes the next round of a multi-round-trip tool that another one began."""
    async with connected(nodes, "auto") as client:
        for _ in range(NODES):
            result = await client.call_tool("test_input_required_result_multi_round", {})
            assert result.content[0].text == "my name likes my color"  # type: ignore[union-attr]


# ---- the TypeScript client


@pytest.mark.parametrize("version", ["2025-11-25", "auto"])
async def test_typescript_client_works_with_fastmcp_server(node: str, nodes: Balancer, version: str) -> None:  # noqa: F811
    """P1, P3, P4, P6; what it checks is in `typescript.mjs`."""
    status, said = await drive(node, nodes.url, version, NODES)
    assert status == 0, said
