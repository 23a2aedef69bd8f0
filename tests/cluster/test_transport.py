"""One session's transport, built by hand on any node (P1, P2)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest
from mcp.server import MCPServer
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

import nonstick
from nonstick.core.names import new_session_id
from nonstick.errors import NotRunning, SessionNotFound
from nonstick.testing.cluster import HEADERS, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.servers import World, answer, call, opening, request

pytestmark = pytest.mark.anyio

INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}


class Pod:
    """One node with routes of its own: `/new`, `/hydrate/<id>` and `/existing/<id>`."""

    def __init__(self, manager: nonstick.SessionManager, client: httpx2.AsyncClient) -> None:
        self.manager = manager
        self.client = client

    async def post(self, path: str, message: object, headers: dict[str, str] | None = None) -> httpx2.Response:
        return await self.client.post(path, json=message, headers=headers)

    async def open(self) -> Session:
        response = await self.post("/new", opening())
        assert response.status_code == 200, response.text
        return Session(response.headers["mcp-session-id"], "2025-11-25", {})


@asynccontextmanager
async def pod(make_store: MakeStore, user: str = "") -> AsyncIterator[Pod]:
    """A node whose requests all come from this user."""
    manager = nonstick.SessionManager(World().server(), store=make_store())

    async def new(_: Request) -> ASGIApp:
        return nonstick.Session(manager).handle_request

    async def hydrate(asked: Request) -> ASGIApp:
        session = await nonstick.Session.hydrate(asked.path_params["id"], manager=manager, scope=asked.scope)
        return session.handle_request

    async def existing(asked: Request) -> ASGIApp:
        return nonstick.Session(manager, existing_session_id=asked.path_params["id"]).handle_request

    methods = ["GET", "POST", "DELETE"]
    routes = [
        Route("/new", new, methods=methods),
        Route("/hydrate/{id}", hydrate, methods=methods),
        Route("/existing/{id}", existing, methods=methods),
    ]

    async def authenticated(scope: Scope, receive: Receive, send: Send) -> None:
        if user:
            token = AccessToken(token=f"token of {user}", client_id=user, scopes=[])
            scope = {**scope, "user": AuthenticatedUser(token)}
        await site(scope, receive, send)

    site = Starlette(routes=routes)
    transport = httpx2.ASGITransport(app=Starlette(routes=[Mount("/", authenticated)]))
    async with (
        manager.run(),
        httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", headers=HEADERS, timeout=60
        ) as client,
    ):
        yield Pod(manager, client)


@pytest.mark.parametrize("route", ["hydrate", "existing"])
async def test_unseen_session_is_served_whole(make_store: MakeStore, route: str) -> None:
    """P1. `initialize` on one node, `notifications/initialized` and what follows on another, the end on the first."""
    async with pod(make_store) as first, pod(make_store) as second:
        session = await first.open()
        path = f"/{route}/{session.id}"
        done = await second.post(path, INITIALIZED, session.headers)
        assert done.status_code == 202
        assert done.headers["mcp-session-id"] == session.id
        for node, x in ((first, 1), (second, 2)):
            echoed = await node.post(path, call("echo", x=x), session.headers)
            assert answer(echoed) == {"x": x}
            assert echoed.headers["mcp-session-id"] == session.id
        assert (await first.client.delete(path, headers=session.headers)).status_code == 200
        with pytest.raises(SessionNotFound):
            await nonstick.Session.hydrate(session.id, manager=second.manager)
        assert (await second.post(f"/existing/{session.id}", call("echo"), session.headers)).status_code == 404


async def test_hydrated_session_shows_its_record(make_store: MakeStore) -> None:
    """P2. What the client said when it opened the session is known on a node that it never spoke to."""
    async with pod(make_store) as first, pod(make_store) as second:
        opened = await first.open()
        session = await nonstick.Session.hydrate(opened.id, manager=second.manager)
        assert session.id == opened.id
        assert session.record is not None
        assert session.record.protocol_version == opening()["params"]["protocolVersion"]
        assert session.record.client_params.client_info.name == opening()["params"]["clientInfo"]["name"]
        assert not session.record.initialized
        await first.post(f"/existing/{opened.id}", INITIALIZED, opened.headers)
        session = await nonstick.Session.hydrate(opened.id, manager=second.manager)
        assert session.record is not None
        assert session.record.initialized


async def test_transport_serves_only_its_session(make_store: MakeStore) -> None:
    """P1. Another session's id gets 404, also where both live; no id gets 400; nothing is opened a second time."""
    async with pod(make_store) as node:
        mine, other = await node.open(), await node.open()
        for route in ("hydrate", "existing"):
            path = f"/{route}/{mine.id}"
            assert (await node.post(path, request("ping"), other.headers)).status_code == 404
            assert (await node.post(path, request("ping"))).status_code == 400
            assert (await node.post(path, opening())).status_code == 400
            assert (await node.post(path, request("ping"), mine.headers)).status_code == 200
        unknown = new_session_id()
        assert (
            await node.post(f"/existing/{unknown}", request("ping"), {"mcp-session-id": unknown})
        ).status_code == 404
        assert (await node.post("/new", request("ping"))).status_code == 400
        assert (await node.post("/new", request("ping"), mine.headers)).status_code == 404


async def test_sessionless_request_stays_sessionless(memory: MakeStore) -> None:
    """P1. Its version says that it has none. To name this route's session is no matter, another one is 404."""
    async with pod(memory) as node:
        mine, other = await node.open(), await node.open()
        newer = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/list"}
        meta = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        for session, status in ((other, 404), (mine, 200)):
            headers = {**session.headers, **newer}
            answered = await node.post(f"/existing/{mine.id}", request("tools/list", {"_meta": meta}), headers)
            assert answered.status_code == status
            assert "mcp-session-id" not in answered.headers


async def test_new_session_is_opened_once() -> None:
    """P2. Its id is known before, and names nothing until its `initialize` succeeded."""
    manager = nonstick.SessionManager(World().server(), store="memory:")
    session = nonstick.Session(manager)
    with pytest.raises(NotRunning):
        await nonstick.Session.hydrate(session.id, manager=manager)
    transport = httpx2.ASGITransport(app=session.handle_request)
    async with (
        manager.run(),
        httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", headers=HEADERS, timeout=60
        ) as client,
    ):
        with pytest.raises(SessionNotFound):
            await nonstick.Session.hydrate(session.id, manager=manager)
        opened = await client.post("/", json=opening())
        assert opened.headers["mcp-session-id"] == session.id
        await nonstick.Session.hydrate(session.id, manager=manager)
        assert (await client.post("/", json=opening())).status_code == 400
        headers = {"mcp-session-id": session.id}
        assert (await client.post("/", json=request("ping"), headers=headers)).status_code == 200


@pytest.mark.parametrize("text", ["", "short", "x" * 5000, "ümlaut", "a/../b", "\x00" * 43])
async def test_malformed_id_is_not_found(text: str) -> None:
    """P1. Anything may come from a client."""
    manager = nonstick.SessionManager(World().server(), store="memory:")
    async with manager.run():
        with pytest.raises(SessionNotFound):
            await nonstick.Session.hydrate(text, manager=manager)


async def test_session_hydrates_only_for_principal(make_store: MakeStore) -> None:
    """P1. Somebody else's session is as unknown as none, to those without authentication as well."""
    async with pod(make_store, "ada") as ada, pod(make_store, "bob") as bob, pod(make_store) as anybody:
        session = await ada.open()
        assert (await ada.post(f"/hydrate/{session.id}", request("ping"), session.headers)).status_code == 200
        for other in (bob, anybody):
            refused = await other.post(f"/existing/{session.id}", request("ping"), session.headers)
            assert refused.status_code == 404
            with pytest.raises(SessionNotFound):
                await other.post(f"/hydrate/{session.id}", request("ping"), session.headers)
        for node in (ada, anybody):
            with pytest.raises(SessionNotFound):
                await nonstick.Session.hydrate(session.id, manager=node.manager)


async def test_manager_takes_an_mcp_server() -> None:
    """As it takes a low-level one."""
    server = MCPServer("plain")

    @server.tool()
    def double(x: int) -> int:
        return 2 * x

    manager = nonstick.SessionManager(server, store="memory:")
    transport = httpx2.ASGITransport(app=nonstick.Session(manager).handle_request)
    async with (
        manager.run(),
        httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", headers=HEADERS, timeout=60
        ) as client,
    ):
        opened = await client.post("/", json=opening())
        headers = {"mcp-session-id": opened.headers["mcp-session-id"]}
        assert "42" in (await client.post("/", json=call("double", x=21), headers=headers)).text
