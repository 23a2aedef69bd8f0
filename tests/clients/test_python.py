"""The official Python client against nonstick on three nodes, with a session and without one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
import httpx2
import mcp_types as types
import pytest
from mcp import Client
from mcp.client.client import ConnectMode
from mcp.client.session import ClientRequestContext, IncomingMessage
from mcp.client.subscriptions import ResourceUpdated, ToolsListChanged

from nonstick.testing.servers.balancer import Balancer, Exchange
from tests.clients.conftest import NODES

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning"),
]

SECONDS = 120.0
WATCHED = "test://watched-resource"
ROOT = "file:///home"


class Peer:
    """The client's side: answers what the server asks, and keeps what it tells."""

    def __init__(self) -> None:
        self.logs: list[Any] = []
        self.messages: list[IncomingMessage] = []
        self._arrived = anyio.Condition()

    async def sample(
        self, context: ClientRequestContext, params: types.CreateMessageRequestParams
    ) -> types.CreateMessageResult:
        content = params.messages[0].content
        assert isinstance(content, types.TextContent)
        echo = types.TextContent(type="text", text=f"Echo: {content.text}")
        return types.CreateMessageResult(role="assistant", content=echo, model="echo")

    async def elicit(self, context: ClientRequestContext, params: types.ElicitRequestParams) -> types.ElicitResult:
        assert isinstance(params, types.ElicitRequestFormParams)
        fields = params.requested_schema["properties"]
        return types.ElicitResult(
            action="accept",
            content={name: True if kind["type"] == "boolean" else f"my {name}" for name, kind in fields.items()},
        )

    async def roots(self, context: ClientRequestContext) -> types.ListRootsResult:
        return types.ListRootsResult(roots=[types.Root.model_validate({"uri": ROOT})])

    async def log(self, params: types.LoggingMessageNotificationParams) -> None:
        async with self._arrived:
            self.logs.append(params.data)
            self._arrived.notify_all()

    async def message(self, message: IncomingMessage) -> None:
        async with self._arrived:
            self.messages.append(message)
            self._arrived.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once this holds; fails after `SECONDS`."""
        with anyio.fail_after(SECONDS):
            async with self._arrived:
                while not condition():
                    await self._arrived.wait()

    def heard(self, kind: type[types.ServerNotification]) -> bool:
        return any(isinstance(message, kind) for message in self.messages)


@asynccontextmanager
async def connected(nodes: Balancer, peer: Peer, mode: ConnectMode) -> AsyncIterator[Client]:
    client = Client(
        f"{nodes.url}/mcp",
        mode=mode,
        cache=None,
        read_timeout_seconds=SECONDS,
        sampling_callback=peer.sample,
        elicitation_callback=peer.elicit,
        list_roots_callback=peer.roots,
        logging_callback=peer.log,
        log_level="info",
        message_handler=peer.message,
    )
    with anyio.fail_after(2 * SECONDS):
        async with client:
            yield client


async def call(client: Client, name: str, arguments: dict[str, Any] | None = None) -> str:
    """The text that the tool answers."""
    result = await client.call_tool(name, arguments or {})
    assert isinstance(result, types.CallToolResult)
    text = "".join(part.text for part in result.content if isinstance(part, types.TextContent))
    assert not result.is_error, text
    return text


async def count(client: Client) -> None:
    """Calls a tool that reports progress; everything arrives, in order."""
    seen: list[float] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)

    result = await client.call_tool("test_tool_with_progress", progress_callback=hear)
    assert isinstance(result, types.CallToolResult)
    assert not result.is_error
    assert seen == [0, 50, 100]


@pytest.fixture(params=["legacy", "auto"])
def mode(request: pytest.FixtureRequest) -> Literal["legacy", "auto"]:
    """By the handshake, or however the client finds that the server speaks."""
    chosen: Literal["legacy", "auto"] = request.param
    return chosen


def session_ids(exchanges: list[Exchange]) -> set[str]:
    return {one.request_headers["mcp-session-id"] for one in exchanges if "mcp-session-id" in one.request_headers}


# ---- both eras


async def test_lists_reads_and_calls_work(nodes: Balancer, mode: ConnectMode) -> None:
    """P1: any node serves any request; a client of either era sees one server."""
    async with connected(nodes, Peer(), mode) as client:
        assert client.protocol_version == ("2025-11-25" if mode == "legacy" else "2026-07-28")
        assert "test_simple_text" in {tool.name for tool in (await client.list_tools()).tools}
        assert WATCHED in {str(resource.uri) for resource in (await client.list_resources()).resources}
        templates = (await client.list_resource_templates()).resource_templates
        assert [template.uri_template for template in templates] == ["test://template/{id}/data"]
        assert "test_simple_prompt" in {prompt.name for prompt in (await client.list_prompts()).prompts}
        assert await call(client, "test_simple_text") == "This is a simple text response for testing."
        result = await client.call_tool("test_error_handling")
        assert isinstance(result, types.CallToolResult)
        assert result.is_error
        contents = (await client.read_resource("test://static-text")).contents[0]
        assert isinstance(contents, types.TextResourceContents)
        assert contents.text == "This is the content of the static text resource."
        prompt = await client.get_prompt("test_prompt_with_arguments", {"arg1": "one", "arg2": "two"})
        said = prompt.messages[0].content
        assert isinstance(said, types.TextContent)
        assert said.text == "Prompt with arguments: arg1='one', arg2='two'"
        reference = types.PromptReference(type="ref/prompt", name="test_prompt_with_arguments")
        completion = await client.complete(reference, {"name": "arg1", "value": "par"})
        assert completion.completion.values == ["paris", "park", "party"]


async def test_calls_run_on_every_node(nodes: Balancer, mode: ConnectMode) -> None:
    """P1: there is no affinity."""
    async with connected(nodes, Peer(), mode) as client:
        assert len({await call(client, "test_node") for _ in range(4 * NODES)}) == NODES


async def test_progress_arrives_in_order(nodes: Balancer, mode: ConnectMode) -> None:
    """P3."""
    async with connected(nodes, Peer(), mode) as client:
        await count(client)


async def test_log_messages_arrive_in_order(nodes: Balancer, mode: ConnectMode) -> None:
    """P3."""
    peer = Peer()
    async with connected(nodes, peer, mode) as client:
        await call(client, "test_tool_with_logging")
        await peer.until(lambda: len(peer.logs) == 3)
    assert peer.logs == ["Tool execution started", "Tool processing data", "Tool execution completed"]


async def test_concurrent_calls_get_their_own_answers(nodes: Balancer, mode: ConnectMode) -> None:
    """P3: a message goes to exactly one stream."""
    async with connected(nodes, Peer(), mode) as client:

        async def read(index: int) -> None:
            contents = (await client.read_resource(f"test://template/{index}/data")).contents[0]
            assert isinstance(contents, types.TextResourceContents)
            assert json.loads(contents.text)["id"] == str(index)

        async with anyio.create_task_group() as group:
            for index in range(24):
                group.start_soon(read, index)
            for _ in range(6):
                group.start_soon(count, client)


# ---- the handshake era


async def test_session_lives_and_ends_everywhere(nodes: Balancer) -> None:
    """P1, P6: one id for all requests, and 404 from all nodes once the client has closed it."""
    before = len(nodes.exchanges)
    async with connected(nodes, Peer(), "legacy") as client:
        for _ in range(2 * NODES):
            await client.send_ping()
    mine = nodes.exchanges[before:]
    (session_id,) = session_ids(mine)
    assert len({one.backend for one in mine}) == NODES
    assert [one.status for one in mine if one.method == "DELETE"] == [200]
    headers = {
        "accept": "application/json, text/event-stream",
        "mcp-session-id": session_id,
        "mcp-protocol-version": "2025-11-25",
    }
    ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    async with httpx2.AsyncClient(timeout=60) as http:
        for _ in range(NODES):
            assert (await http.post(f"{nodes.url}/mcp", json=ping, headers=headers)).status_code == 404
            assert (await http.get(f"{nodes.url}/mcp", headers=headers)).status_code == 404


async def test_client_answers_what_the_server_asks(nodes: Balancer) -> None:
    """P4: on the call's own stream and on the standalone one."""
    async with connected(nodes, Peer(), "legacy") as client:
        for turn in range(NODES):
            said = await call(client, "test_sampling", {"prompt": f"prompt {turn}"})
            assert said == f"LLM response: Echo: prompt {turn}"
            said = await call(client, "test_elicitation", {"message": "Who?"})
            assert said == 'User response: action=accept, content={"username": "my username", "email": "my email"}'
            assert await call(client, "test_list_roots") == ROOT
            assert await call(client, "test_ping_client") == "pong"


async def test_replies_find_the_waiting_handler(nodes: Balancer) -> None:
    """P4: many handlers wait at once, each on some node, and every reply comes to some other."""
    async with connected(nodes, Peer(), "legacy") as client:

        async def ask(index: int) -> None:
            said = await call(client, "test_sampling", {"prompt": f"prompt {index}"})
            assert said == f"LLM response: Echo: prompt {index}"

        async with anyio.create_task_group() as group:
            for index in range(12):
                group.start_soon(ask, index)


async def test_notifications_arrive_on_the_standalone_stream(nodes: Balancer) -> None:
    """P3, P11: sent on whichever node the call runs, read on whichever holds the GET."""
    peer = Peer()
    async with connected(nodes, peer, "legacy") as client:
        await client.set_logging_level("debug")
        await client.subscribe_resource(WATCHED)
        for _ in range(NODES):
            peer.messages.clear()
            await call(client, "test_trigger_resource_update")
            await peer.until(lambda: peer.heard(types.ResourceUpdatedNotification))
            await call(client, "test_trigger_tool_change")
            await peer.until(lambda: peer.heard(types.ToolListChangedNotification))
        await client.unsubscribe_resource(WATCHED)


async def test_client_comes_back_for_an_answer(nodes: Balancer) -> None:
    """P3: the stream was closed before the answer, and is resumed on another node."""
    before = len(nodes.exchanges)
    async with connected(nodes, Peer(), "legacy") as client:
        assert await call(client, "test_reconnection") == "Reconnection test completed successfully"
    assert any("last-event-id" in one.request_headers for one in nodes.exchanges[before:])


# ---- 2026-07-28


async def test_sessionless_protocol_opens_no_session(nodes: Balancer) -> None:
    """P1: the two eras do not meet."""
    before = len(nodes.exchanges)
    async with connected(nodes, Peer(), "auto") as client:
        await call(client, "test_simple_text")
    mine = nodes.exchanges[before:]
    assert not session_ids(mine)
    assert not any("mcp-session-id" in one.response_headers for one in mine)


async def test_every_node_accepts_the_request_state(nodes: Balancer) -> None:
    """The nodes share the keys that seal `requestState`."""
    async with connected(nodes, Peer(), "auto") as client:
        for _ in range(NODES):
            assert await call(client, "test_input_required_result_elicitation") == "Hello, my name!"
            assert await call(client, "test_input_required_result_request_state") == "state-ok"
            assert await call(client, "test_input_required_result_multi_round") == "my name likes my color"


async def test_clients_of_both_eras_hear_events(nodes: Balancer) -> None:
    """P11: one event in the store for all."""
    peer = Peer()
    async with (
        connected(nodes, peer, "legacy") as old,
        connected(nodes, Peer(), "auto") as new,
        new.listen(tools_list_changed=True, resource_subscriptions=[WATCHED]) as subscription,
    ):
        await old.subscribe_resource(WATCHED)
        for client in (new, old, new):
            peer.messages.clear()
            await call(client, "test_trigger_resource_update")
            assert await anext(subscription) == ResourceUpdated(uri=WATCHED)
            await peer.until(lambda: peer.heard(types.ResourceUpdatedNotification))
            await call(client, "test_trigger_tool_change")
            assert await anext(subscription) == ToolsListChanged()
            await peer.until(lambda: peer.heard(types.ToolListChangedNotification))


async def test_subscriber_hears_changes_from_every_node(nodes: Balancer) -> None:
    """P11: the subscription bus is shared."""
    async with (
        connected(nodes, Peer(), "auto") as client,
        client.listen(tools_list_changed=True, resource_subscriptions=[WATCHED]) as subscription,
    ):
        for _ in range(2 * NODES):
            await call(client, "test_trigger_resource_update")
            assert await anext(subscription) == ResourceUpdated(uri=WATCHED)
            await call(client, "test_trigger_tool_change")
            assert await anext(subscription) == ToolsListChanged()
