"""One principal cannot fill a node: it has a share of the places, and the rest is for the others (P10)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import mcp_types as types
import pytest
from mcp.server import MCPServer
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context
from pydantic import AnyHttpUrl

from nonstick.errors import ConfigurationError
from nonstick.http.manager import SessionManager
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import HEADERS, Cluster, Member, Session
from tests.cluster.servers import call, error, opening, request
from tests.cluster.sse import DEADLINE, getting, posting
from tests.cluster.stage import eventually, node_of, notification, text_of
from tests.cluster.test_sessionless_drain import ABOUT_CLIENT, VERSION

pytestmark = pytest.mark.anyio

FULL_OF_REQUESTS = "You have as many requests running on this node as one principal may; wait for some to end"
FULL_OF_STREAMS = "You have as many streams open on this node as one principal may; close one"


class Tokens:
    """Each token is somebody's own."""

    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id="app", scopes=[], subject=token)


class Doors:
    """A server of which each principal is somebody, with a tool that waits for the test."""

    def __init__(self, *, authenticated: bool = True) -> None:
        self._authenticated = authenticated
        self.began = 0
        self.may_end = asyncio.Event()

    def server(self) -> MCPServer[Any]:
        issuer = AnyHttpUrl("https://issuer.example")
        auth = AuthSettings(issuer_url=issuer, resource_server_url=None)
        with_auth: dict[str, Any] = {"token_verifier": Tokens(), "auth": auth} if self._authenticated else {}
        server = MCPServer[Any]("doors", **with_auth)

        @server.tool()
        async def wait(ctx: Context[Any, Any]) -> str:
            self.began += 1
            await self.may_end.wait()
            return "done"

        @server.tool()
        async def quick() -> str:
            return "quick"

        return server

    async def running(self, count: int) -> None:
        await eventually(lambda: self.began == count)


@asynccontextmanager
async def doors(*, authenticated: bool = True, **options: Any) -> AsyncIterator[tuple[Doors, Member, Member]]:
    store, made = MemoryStore(), Doors(authenticated=authenticated)
    async with Cluster(made.server, lambda: store, nodes=2, window=0.02, **options) as cluster:
        a, b = cluster
        try:
            yield made, a, b
        finally:
            made.may_end.set()


async def opened(member: Member, token: str) -> Session:
    return await member.open(authorization=f"Bearer {token}")


def told(response: Any) -> tuple[int, str, str]:
    """Status, Retry-After, message."""
    return response.status_code, response.headers["retry-after"], response.json()["error"]["message"]


async def test_requests_of_principal_leave_room() -> None:
    """P10: of all its sessions together; with 429, because others are served. Elsewhere it has a share of its own."""
    async with doors(max_streams_per_node=6) as (made, a, b), AsyncExitStack() as stack:
        adas = [await opened(a, "ada") for _ in range(3)]
        bob = await opened(a, "bob")
        for session in adas:
            await stack.enter_async_context(posting(b, session, call("wait", 1)))
        await made.running(3)
        for message in (call("quick", 2), opening()):
            response = await b.client.post(b.url, json=message, headers={**HEADERS, **adas[0].headers})
            assert told(response) == (429, "1", FULL_OF_REQUESTS)
        fresh = {**HEADERS, "authorization": "Bearer ada"}
        assert told(await b.client.post(b.url, json=opening(), headers=fresh)) == (429, "1", FULL_OF_REQUESTS)
        assert (await a.post(call("quick", 2), adas[0])).status_code == 200
        for number in range(3):
            await stack.enter_async_context(posting(b, bob, call("wait", number)))
        await made.running(6)
        # Also where the node is full: what the client is told is what it can change.
        assert told(await b.post(call("quick", 2), adas[0])) == (429, "1", FULL_OF_REQUESTS)
        made.may_end.set()
        await eventually(lambda: not len(node_of(b).services.requests))
        assert (await b.post(call("quick", 2), adas[0])).status_code == 200


async def test_sessionless_requests_count_in_share() -> None:
    """P10: clients of 2026-07-28 too."""
    async with doors(max_streams_per_node=4, max_listeners_per_node=2) as (made, a, b), AsyncExitStack() as stack:
        ada = await opened(a, "ada")
        for number in range(2):
            await stack.enter_async_context(posting(b, ada, call("wait", number)))
        await made.running(2)
        listening = await stack.enter_async_context(getting(b, ada))
        await listening.event()
        for method, message in (("tools/list", FULL_OF_REQUESTS), ("subscriptions/listen", FULL_OF_STREAMS)):
            body = request(method, {"_meta": ABOUT_CLIENT, "notifications": {}})
            headers = {**HEADERS, "mcp-protocol-version": VERSION, "mcp-method": method}
            theirs = {**headers, "authorization": "Bearer ada"}
            assert told(await b.client.post(b.url, json=body, headers=theirs)) == (429, "1", message)
        others = {**headers, "mcp-method": "tools/list", "authorization": "Bearer bob"}
        listed = await b.client.post(
            b.url, json=request("tools/list", {"_meta": ABOUT_CLIENT}), headers=others, timeout=DEADLINE
        )
        assert "quick" in listed.text


async def test_streams_of_principal_leave_room() -> None:
    """P10: GETs of all its sessions; requests have places of their own."""
    async with doors(max_listeners_per_node=4) as (_, a, b), AsyncExitStack() as stack:
        adas = [await opened(a, "ada") for _ in range(2)]
        bob = await opened(a, "bob")
        for session in adas:
            await (await stack.enter_async_context(getting(b, session))).event()
        wanted = {**HEADERS, **adas[0].headers, "accept": "text/event-stream"}
        assert told(await b.client.get(b.url, headers=wanted)) == (429, "1", FULL_OF_STREAMS)
        assert (await b.post(call("quick", 2), adas[0])).status_code == 200
        for _ in range(2):
            await (await stack.enter_async_context(getting(b, bob))).event()


async def test_relayed_requests_count_where_they_run() -> None:
    """P10: with `placement="owner"`: what comes in at many nodes must not fill the one that runs it."""
    async with doors(max_streams_per_node=4, placement="owner") as (made, a, b), AsyncExitStack() as stack:
        ada, also_ada, bob = await opened(a, "ada"), await opened(a, "ada"), await opened(a, "bob")
        await stack.enter_async_context(posting(a, ada, call("wait", 1)))
        await stack.enter_async_context(posting(a, also_ada, call("wait", 1)))
        await made.running(2)
        assert error(await b.post(call("quick", 2), ada))["message"] == FULL_OF_REQUESTS
        assert '"text":"quick"' in (await b.post(call("quick", 2), bob)).text


async def test_notification_handlers_count_in_share() -> None:
    """P10, P5: what a notification means to the session takes effect all the same."""
    async with doors(max_streams_per_node=4) as (made, a, b):

        async def handle(ctx: Any, params: types.NotificationParams) -> None:
            made.began += 1
            await made.may_end.wait()

        b.app.manager.app.add_notification_handler("notifications/x", types.NotificationParams, handle)
        ada, bob = await opened(a, "ada"), await opened(a, "bob")
        async with posting(b, ada, call("wait", 1)) as stream:
            await made.running(1)
            assert (await b.post(notification("notifications/x"), ada)).status_code == 202
            await made.running(2)
            assert told(await b.post(notification("notifications/x"), ada)) == (429, "1", FULL_OF_REQUESTS)
            assert (await b.post(notification("notifications/x"), bob)).status_code == 202
            await b.post(notification("notifications/cancelled", requestId=1), ada)
            assert text_of(await stream.outcome()) == "Request cancelled"


async def test_unknown_clients_have_all_places() -> None:
    """P10: without authentication all are one principal, whom a share would keep from half of the node."""
    async with doors(authenticated=False, max_streams_per_node=4) as (made, a, b), AsyncExitStack() as stack:
        session = await a.open()
        for number in range(4):
            await stack.enter_async_context(posting(b, session, call("wait", number)))
        await made.running(4)
        assert told(await b.post(call("quick", 5), session))[0] == 503


async def test_share_can_be_the_whole_node() -> None:
    """P10: for a service that acts for all its users under one name."""
    async with doors(max_streams_per_node=2, max_principal_share=1) as (made, a, b), AsyncExitStack() as stack:
        session = await opened(a, "gateway")
        for number in range(2):
            await stack.enter_async_context(posting(b, session, call("wait", number)))
        await made.running(2)


@pytest.mark.parametrize("share", [0, 1.5, -1, True, "half"])
def test_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_principal_share must be"):
        SessionManager(MCPServer("any"), store="memory:", max_principal_share=share)
