"""Several servers on one store: a session belongs to the server that opened it, and its replicas agree what that is."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastmcp import Context, FastMCP
from fastmcp.server.auth import StaticTokenVerifier
from fastmcp.server.sessions import UserSession
from mcp.server import MCPServer
from mcp.server.request_state import InvalidRequestState
from mcp.server.transport_security import TransportSecuritySettings
from starlette.applications import Starlette
from starlette.routing import Host, Mount

import nonstick
from nonstick.core.names import session_key
from nonstick.errors import ConfigurationError, SessionNotFound
from nonstick.store import Batch, Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import HEADERS, Member, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.servers import call, messages, opening, request
from tests.cluster.sse import getting
from tests.cluster.test_fastmcp import without_session
from tests.cluster.test_mounting import open_session, running

pytestmark = pytest.mark.anyio

TOOLS = "notifications/tools/list_changed"
PROMPTS = "notifications/prompts/list_changed"


class Seen(MemoryStore):
    """Notes under which keys it is asked for anything."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    async def load(self, key: str, *, renew: bool = True) -> Any:
        self.keys.add(key)
        return await super().load(key, renew=renew)

    async def update(self, key: str, changes: Mapping[str, bytes | None], **more: Any) -> bool:
        self.keys.add(key)
        return await super().update(key, changes, **more)

    async def append(self, key: str, batch: Batch) -> Any:
        self.keys.add(key)
        return await super().append(key, batch)

    async def delete(self, key: str) -> bool:
        self.keys.add(key)
        return await super().delete(key)


def server(name: str = "shop") -> MCPServer[Any]:
    made = MCPServer[Any](name)

    @made.tool()
    def echo(text: str) -> str:
        return text

    return made


@asynccontextmanager
async def members(*apps: nonstick.App) -> AsyncIterator[list[Member]]:
    async with AsyncExitStack() as stack:
        found = [Member(f"{number}", app) for number, app in enumerate(apps)]
        for member in found:
            await member.start()
            stack.push_async_callback(member.stop)
        yield found


async def answers(member: Member, session: Session) -> list[int]:
    """What every kind of request of the session gets there."""
    kinds: list[Any] = [
        request("ping"),
        call("echo", text="x"),
        opening(),
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
        {"jsonrpc": "2.0", "id": "srv-1", "result": {}},
        [],
    ]
    found = [(await member.post(message, session)).status_code for message in kinds]
    for more in ({}, {"last-event-id": "1.1.1.0000000000000000..0000000000000000"}):
        headers = {"accept": "text/event-stream", **session.headers, **more}
        found.append((await member.client.get(member.url, headers=headers)).status_code)
    found.append((await member.delete(session)).status_code)
    return found


@pytest.mark.parametrize(
    "options",
    [
        ({"name": "shop"}, {"name": "bank"}),
        ({"path": "/mcp"}, {"path": "/other"}),
        ({"namespace": "one"}, {"namespace": "two"}),
        ({"name": "a", "path": "/b/c"}, {"name": "a/b", "path": "/c"}),
    ],
    ids=["name", "path", "namespace", "parts that are joined alike"],
)
async def test_another_server_answers_404(options: Any) -> None:
    """P1: two apps in one process, as two deployments would be, in both directions."""
    store = Seen()
    apps = [
        nonstick.app(server(own.pop("name", "same")), store=store, grace=1.0, **own)
        for own in [dict(one_) for one_ in options]
    ]
    async with members(*apps) as found:
        for member, own in zip(found, options, strict=True):
            member.url = member.url.removesuffix("/mcp") + own.get("path", "/mcp")
        for mine, other in (found, found[::-1]):
            session = await mine.open()
            store.keys.clear()
            assert set(await answers(other, session)) == {404}
            with pytest.raises(SessionNotFound):
                await nonstick.Session.hydrate(session.id, manager=other.app.manager)
            assert session_key(session.id) not in store.keys
            assert (await mine.post(call("echo", text="x"), session)).status_code == 200
            refused = await other.post(request("ping"), session)
            unknown = await other.post(request("ping"), Session(session.id[::-1], "2025-11-25", {}))
            assert refused.content == unknown.content


async def test_shared_store_tells_servers_apart(make_store: MakeStore) -> None:
    """P1: and a DELETE there does not end the session here."""
    shop, bank = (nonstick.app(server(name), store=make_store(), grace=1.0) for name in ("shop", "bank"))
    async with members(shop, bank) as (a, b):
        session = await a.open()
        assert set(await answers(b, session)) == {404}
        assert (await a.post(call("echo", text="x"), session)).status_code == 200


async def test_namespace_replaces_the_name(memory: MakeStore) -> None:
    """P1: so a server can be renamed, or be named after its node, and keep its sessions."""
    names = {"first": None, "second": "first", "third": "first"}
    apps = [nonstick.app(server(name), store=memory(), namespace=space) for name, space in names.items()]
    async with members(*apps) as found:
        session = await found[0].open()
        assert [(await each.post(request("ping"), session)).status_code for each in found] == [200] * 3


@pytest.mark.parametrize("namespace", ["", 7, ["a"]])
def test_impossible_namespace_is_refused(namespace: Any) -> None:
    with pytest.raises(ConfigurationError, match="namespace must be a text"):
        nonstick.app(server(), store="memory:", namespace=namespace)


async def test_replicas_agree_behind_any_proxy(memory: MakeStore) -> None:
    """P1: another prefix, host, root path."""
    anyhow = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    adopted = server()
    first, second = (nonstick.app(server(), store=memory(), transport_security=anyhow) for _ in range(2))
    third = Starlette(
        routes=[
            Host(
                "{sub}.example",
                Starlette(routes=[Mount("/v2/tools", adopted.streamable_http_app(transport_security=anyhow))]),
            )
        ],
        lifespan=lambda _: adopted.session_manager.run(),
    )
    nonstick.adopt(third, store=memory())
    mounted = Starlette(routes=[Mount("/v1", second)], lifespan=second.lifespan)
    async with running(first) as a, running(mounted) as b, running(third) as c:
        session = await open_session(a)
        shown = httpx2.ASGITransport(app=first, root_path="/shown")
        async with httpx2.AsyncClient(
            transport=shown, base_url="http://127.0.0.1:8000", headers=HEADERS, timeout=60
        ) as d:
            for client, path, named in (
                (a, "/mcp", "other.example"),
                (b, "/v1/mcp", "shop.example"),
                (c, "/v2/tools/mcp", "eu.example"),
                (d, "/shown/mcp", "127.0.0.1:8000"),
            ):
                headers = {**session.headers, "host": named, "x-forwarded-prefix": "/p", "x-forwarded-host": "h"}
                response = await client.post(path, json=request("ping"), headers=headers)
                assert response.status_code == 200, (path, response.text)


@asynccontextmanager
async def all_run(servers: list[MCPServer[Any]]) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for each in servers:
            await stack.enter_async_context(each.session_manager.run())
        yield


def adopted_with(servers: list[MCPServer[Any]], routes: list[Any], store: str, **options: Any) -> Starlette:
    return nonstick.adopt(Starlette(routes=routes, lifespan=lambda _: all_run(servers)), store=store, **options)


async def test_extended_id_opens_nothing_elsewhere(tmp_path: Path) -> None:
    """P1: no two ids make one key, however they are cut."""
    store, servers = f"sqlite:///{tmp_path}/s.db", [server(), server()]
    apps = [each.streamable_http_app() for each in servers]
    host = adopted_with(
        servers, [Mount("/a", apps[0]), Host("127.0.0.1", Starlette(routes=[Mount("/", apps[1])]))], store
    )
    async with running(host) as client:
        session = await open_session(client, "/mcp")
        assert (await client.post("/mcp", json=request("ping"), headers=session.headers)).status_code == 200
        for tail in ("127.0.0.1", "localhost", "/a/mcp", "/mcp", "a", "mcp"):
            for path in ("/a/mcp", "/mcp"):
                headers = {**session.headers, "mcp-session-id": session.id + tail}
                assert (await client.post(path, json=request("ping"), headers=headers)).status_code == 404


@pytest.mark.parametrize("options", [{}, {"namespace": "all"}], ids=["by name", "in a namespace"])
async def test_similar_endpoints_stay_apart(tmp_path: Path, options: Any) -> None:
    """P1: the same name and path of their own, so that only the way to them differs."""
    store, servers = f"sqlite:///{tmp_path}/s.db", [server(), server(), server("bank")]
    apps = [each.streamable_http_app() for each in servers]
    host = adopted_with(servers, [Mount(f"/{n}", app) for n, app in enumerate(apps)], store, **options)
    paths = [f"/{n}/mcp" for n in range(3)]
    async with running(host) as client:
        for own in paths:
            session = await open_session(client, own)
            found = [
                (await client.post(path, json=request("ping"), headers=session.headers)).status_code for path in paths
            ]
            assert found == [200 if path == own else 404 for path in paths]


async def test_added_endpoint_moves_no_sessions(tmp_path: Path) -> None:
    """P12: a rolling update that adds one."""
    store, before, after = f"sqlite:///{tmp_path}/s.db", [server()], [server(), server("bank")]
    old = adopted_with(before, [Mount("/shop", before[0].streamable_http_app())], store)
    routes = [Mount(f"/{each.name}", each.streamable_http_app()) for each in after]
    async with running(old) as a, running(adopted_with(after, routes, store)) as b:
        session = await open_session(a, "/shop/mcp")
        assert (await b.post("/shop/mcp", json=request("ping"), headers=session.headers)).status_code == 200
        assert (await b.post("/bank/mcp", json=request("ping"), headers=session.headers)).status_code == 404


async def test_disagreeing_replicas_are_advised_once(memory: MakeStore, caplog: pytest.LogCaptureFixture) -> None:
    """A server that is named after its node would send every client away."""
    nodes = [nonstick.app(server(name), store=memory()) for name in ("node-1", "node-2")]
    async with members(*nodes) as (a, b):
        sessions = [await a.open() for _ in range(3)]
        with caplog.at_level(logging.WARNING, "nonstick"):
            assert [(await b.post(request("ping"), each)).status_code for each in sessions] == [404] * 3
    (said,) = [record.getMessage() for record in caplog.records if "namespace=" in record.getMessage()]
    assert "'node-2'" in said
    assert not any(each.id in said for each in sessions)


# ---- FastMCP


USERS = StaticTokenVerifier({"ada": {"client_id": "app", "sub": "ada", "scopes": []}})


def fastmcp(cluster: nonstick.Cluster, name: str | None) -> FastMCP[Any]:
    made = FastMCP[Any](name, auth=USERS, session_state_store=cluster.session_state_store)

    @made.tool
    async def put(value: str, ctx: Context) -> str:
        await ctx.set_state("x", value)
        return "done"

    @made.tool
    async def get(ctx: Context) -> Any:
        return {"value": await ctx.get_state("x")}

    @made.tool
    async def remember(value: str, session: UserSession) -> Any:
        before = await session.get("value")
        await session.set("value", value)
        return {"value": before}

    return made


def fastmcp_app(name: str | None, store: Store) -> nonstick.App:
    cluster = nonstick.Cluster()
    return nonstick.app(fastmcp(cluster, name), store=store, cluster=cluster, grace=1.0)


async def test_fastmcp_states_on_store_stay_apart(memory: MakeStore) -> None:
    """P1: of a session, and of a user who uses both."""
    ada = {"authorization": "Bearer ada"}
    names = ("shop", "bank", "shop")
    async with members(*(fastmcp_app(name, memory()) for name in names)) as (shop, bank, again):
        session = await shop.open(authorization="Bearer ada")
        await shop.post(call("put", value="mine"), session)
        assert (await bank.post(call("get"), session)).status_code == 404
        got = await again.post(call("get"), session)
        assert messages(got)[-1]["result"]["structuredContent"]["value"] == "mine"
        told = [
            (await without_session(member, "remember", headers=ada, value=value))["structuredContent"]["value"]
            for member, value in ((shop, "a"), (bank, "b"), (again, "c"), (bank, "d"))
        ]
        assert told == [None, None, "a", "b"]


async def test_fastmcp_states_on_cluster_stay_apart(memory: MakeStore) -> None:
    """P1: two servers in one process, of which another one runs the second alone; with a session and without."""
    ada, both = {"authorization": "Bearer ada"}, nonstick.Cluster()
    apps = [nonstick.app(fastmcp(both, name), store=memory(), cluster=both, grace=1.0) for name in ("shop", "bank")]
    async with members(*apps, fastmcp_app("bank", memory())) as (shop, bank, alone):

        async def remember(member: Member, value: str, session: Session | None = None) -> Any:
            if session is None:
                result = await without_session(member, "remember", headers=ada, value=value)
            else:
                result = messages(await member.post(call("remember", value=value), session))[-1]["result"]
            return result["structuredContent"]["value"]

        told = [await remember(*each) for each in ((shop, "a"), (bank, "b"), (alone, "c"), (shop, "d"), (bank, "e"))]
        assert told == [None, None, "b", "a", "c"]
        session = await bank.open(authorization="Bearer ada")
        assert [await remember(bank, "f", session), await remember(alone, "g", session)] == ["e", "f"]
        assert await remember(shop, "h", await shop.open(authorization="Bearer ada")) == "d"


async def test_nameless_fastmcp_replicas_agree(memory: MakeStore, caplog: pytest.LogCaptureFixture) -> None:
    """P1: FastMCP makes up another name in each process. It is said that a name would be better."""
    with caplog.at_level(logging.WARNING, "nonstick"):
        apps = [fastmcp_app(name, memory()) for name in (None, None, "FastMCP-shop")]
        async with members(*apps) as (a, b, named):
            session = await a.open(authorization="Bearer ada")
            await a.post(call("put", value="mine"), session)
            got = await b.post(call("get"), session)
            assert messages(got)[-1]["result"]["structuredContent"]["value"] == "mine"
            assert (await named.post(call("get"), session)).status_code == 404
    assert sum("has no name" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize(
    ("name", "options", "said"), [(None, {}, 1), (None, {"namespace": "shop"}, 0), ("shop", {}, 0)]
)
async def test_nameless_server_is_told_so(
    name: str | None, options: Any, said: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P1: two of them on one store would serve each other's sessions."""
    app = nonstick.app(MCPServer(name), store=f"sqlite:///{tmp_path}/sessions.db", **options)
    with caplog.at_level(logging.WARNING, "nonstick"):
        async with members(app):
            pass
    assert sum("has no name" in record.getMessage() for record in caplog.records) == said


# ---- what everyone is told


async def heard_until(member: Member, session: Session, last: str) -> list[str]:
    """What the client hears on its standalone stream, up to this."""
    found: list[str] = []
    async with getting(member, session) as stream:
        while last not in found:
            found.append((await stream.message())["method"])
    return found


async def test_broadcasts_stay_with_their_server(make_store: MakeStore) -> None:
    """P11: the cluster log is one, and who is meant is in it."""
    apps = [nonstick.app(server(name), store=make_store(), grace=1.0) for name in ("shop", "bank", "shop")]
    async with members(*apps) as (shop, bank, again):
        sessions = [await member.open() for member in (shop, bank)]
        await shop.app.cluster.notify_tools_changed()
        await bank.app.cluster.notify_prompts_changed()
        await again.app.cluster.notify_prompts_changed()
        assert await heard_until(again, sessions[0], PROMPTS) == [TOOLS, PROMPTS]
        assert await heard_until(bank, sessions[1], PROMPTS) == [PROMPTS]


async def test_script_tells_one_server_or_all(tmp_path: Path) -> None:
    """P11: and nodes of version 0.1, which do not say who is meant, tell all."""
    store = f"sqlite:///{tmp_path}/s.db"
    apps = [nonstick.app(server(name), store=store, grace=1.0) for name in ("shop", "bank")]
    async with members(*apps) as (shop, bank):
        sessions = [await member.open() for member in (shop, bank)]
        async with nonstick.Cluster.connect(store, namespace="shop") as cluster:
            await cluster.notify_tools_changed()
        async with nonstick.Cluster.connect(store) as cluster:
            await cluster.notify_prompts_changed()
        assert await heard_until(shop, sessions[0], PROMPTS) == [TOOLS, PROMPTS]
        assert await heard_until(bank, sessions[1], PROMPTS) == [PROMPTS]


async def test_request_state_stays_in_its_namespace(memory: MakeStore) -> None:
    """P17: of servers of one name, whose state the SDK does not tell apart."""

    def made(namespace: str | None) -> tuple[nonstick.Cluster, nonstick.App]:
        cluster = nonstick.Cluster()
        return cluster, nonstick.app(server(), store=memory(), cluster=cluster, namespace=namespace, grace=1.0)

    clusters, apps = zip(*(made(namespace) for namespace in ("one", "one", "two", None)), strict=True)
    async with members(*apps):
        codecs = [cluster.request_state_security.codec for cluster in clusters]
        token = codecs[0].seal(b"state")
        assert codecs[1].unseal(token) == b"state"
        for other in codecs[2:]:
            with pytest.raises(InvalidRequestState):
                other.unseal(token)
        with pytest.raises(InvalidRequestState):
            codecs[0].unseal(codecs[3].seal(b"state"))
