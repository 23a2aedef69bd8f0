"""An app that the SDK or FastMCP has built keeps everything but the place where its sessions are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastmcp import FastMCP
from fastmcp.server.auth import StaticTokenVerifier
from mcp.server import MCPServer
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from pydantic import AnyHttpUrl
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Host, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

import nonstick
from nonstick.adopt import Adopted
from nonstick.core.names import session_key
from nonstick.errors import ConfigurationError, NonstickError, NotRunning
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Session
from tests.cluster.servers import call, error, messages, opening, request
from tests.cluster.test_mounting import client_of, running
from tests.conformance.event_store import MemoryEventStore

pytestmark = pytest.mark.anyio

Make = Callable[..., Any]


class Made:
    """A server of each kind, and how often its lifespan was entered."""

    def __init__(self) -> None:
        self.starts = 0
        self.running = 0

    @asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[dict[str, str]]:
        self.starts += 1
        self.running += 1
        yield {"database": f"open {self.starts}"}
        self.running -= 1

    def sdk(self, name: str = "sdk", **options: Any) -> MCPServer[Any]:
        server = MCPServer[Any](name, lifespan=self.lifespan, **options)

        @server.custom_route("/health", methods=["GET"])  # type: ignore[untyped-decorator]
        async def health(_: Request) -> Response:
            return PlainTextResponse("well")

        @server.tool()
        def echo(text: str) -> str:
            return text

        return server

    def fastmcp(self, name: str = "fastmcp", **options: Any) -> FastMCP[Any]:
        server = FastMCP[Any](name, lifespan=self.lifespan, **options)

        @server.custom_route("/health", methods=["GET"])
        async def health(_: Request) -> Response:
            return PlainTextResponse("well")

        @server.tool
        def echo(text: str) -> str:
            return text

        return server


def app_of(server: MCPServer[Any] | FastMCP[Any], **options: Any) -> Starlette:
    """What its own library makes of it."""
    return server.streamable_http_app(**options) if isinstance(server, MCPServer) else server.http_app(**options)


@pytest.fixture(params=["sdk", "fastmcp"])
def kind(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


async def opened(client: httpx2.AsyncClient, path: str = "/mcp", **headers: str) -> Session:
    response = await client.post(path, json=opening(), headers=headers)
    assert response.status_code == 200, response.text
    return Session(response.headers["mcp-session-id"], "2025-11-25", headers)


async def says(client: httpx2.AsyncClient, session: Session, path: str = "/mcp") -> Any:
    response = await client.post(path, json=call("echo", text="x"), headers=session.headers)
    return messages(response)[-1]["result"]["content"][0]["text"] if response.status_code == 200 else response


async def test_adopted_apps_share_sessions_keep_routes(kind: str) -> None:
    """P1: as replicas would. The lifespan of each runs once."""
    store, made = MemoryStore(), [Made(), Made()]
    apps = [nonstick.adopt(app_of(getattr(one, kind)()), store=store) for one in made]
    async with running(apps[0]) as a, running(apps[1]) as b:
        session = await opened(a)
        assert await says(b, session) == "x"
        assert (await a.get("/health")).text == "well"
        assert [one.starts for one in made] == [1, 1]
        assert (await b.delete("/mcp", headers=session.headers)).status_code == 200
        assert (await a.post("/mcp", json=request("ping"), headers=session.headers)).status_code == 404
    assert [one.running for one in made] == [0, 0]


async def test_adopted_app_is_same_object(kind: str) -> None:
    """The app also tells whether it is ready."""
    inner = app_of(getattr(Made(), kind)())
    assert nonstick.adopt(inner, store="memory:") is inner
    adopted: Adopted = inner.state.nonstick
    assert adopted.paths == ["/mcp"]
    with pytest.raises(NotRunning):
        await adopted.check_ready()
    async with running(inner):
        await adopted.check_ready()
        adopted.begin_drain()
        with pytest.raises(NonstickError, match="draining"):
            await adopted.check_ready()


class _Marked:
    """Somebody's middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-marked", b"yes")]}
            await send(message)

        await self.app(scope, receive, marked)


async def test_middleware_inside_and_around_stays(kind: str) -> None:
    inner = app_of(getattr(Made(), kind)())
    inner.add_middleware(_Marked)
    around = CORSMiddleware(inner, allow_origins=["http://page.example"], expose_headers=["mcp-session-id"])
    assert nonstick.adopt(around, store="memory:") is around
    async with inner.router.lifespan_context(inner), client_of(around) as client:
        response = await client.post("/mcp", json=opening(), headers={"origin": "http://127.0.0.1:8000"})
        assert response.status_code == 200, response.text
        assert response.headers["x-marked"] == "yes"
        assert response.headers["access-control-expose-headers"] == "mcp-session-id"


class _Tokens:
    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id="app", scopes=["use"]) if token == "good" else None


AUTH = AuthSettings(
    issuer_url=AnyHttpUrl("https://issuer.example"),
    resource_server_url=AnyHttpUrl("https://server.example/mcp"),
    required_scopes=["use"],
    validate_token_resource=False,
)


async def test_authentication_of_the_app_stays(kind: str) -> None:
    """And its principal is the session's."""
    secured: dict[str, Any] = {
        "sdk": {"auth": AUTH, "token_verifier": _Tokens()},
        "fastmcp": {"auth": StaticTokenVerifier({"good": {"client_id": "app", "scopes": ["use"]}})},
    }
    inner = nonstick.adopt(app_of(getattr(Made(), kind)(**secured[kind])), store="memory:")
    async with running(inner) as client:
        assert (await client.post("/mcp", json=opening())).status_code == 401
        session = await opened(client, authorization="Bearer good")
        assert await says(client, session) == "x"
        loaded = await inner.state.nonstick.managers[0].load(session_key(session.id))
        assert b'"app"' in loaded.fields["principal"]


# ---- mounted


def hosts() -> list[Any]:
    def fastapi(*mounts: Mount, lifespan: Any) -> Any:
        return FastAPI(routes=[*mounts], lifespan=lifespan)

    def starlette(*mounts: Mount, lifespan: Any) -> Any:
        return Starlette(routes=[Mount("/deep", routes=[*mounts])], lifespan=lifespan)

    def by_name(*mounts: Mount, lifespan: Any) -> Any:
        return Starlette(routes=[Host("127.0.0.1", Starlette(routes=[*mounts]))], lifespan=lifespan)

    return [
        pytest.param(fastapi, "", id="fastapi"),
        pytest.param(starlette, "/deep", id="starlette"),
        pytest.param(by_name, "", id="host"),
    ]


def entering(server: MCPServer[Any] | FastMCP[Any], inner: Starlette) -> Any:
    """The host's lifespan, as the manuals of both have it."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        running = server.session_manager.run() if isinstance(server, MCPServer) else inner.router.lifespan_context(app)
        async with running:
            yield

    return lifespan


@pytest.mark.parametrize(("make", "prefix"), hosts())
@pytest.mark.parametrize("whole", [True, False], ids=["adopt the host", "adopt the mounted app"])
async def test_mounted_app_is_adopted_in_place(kind: str, make: Make, prefix: str, *, whole: bool) -> None:
    made = Made()
    server = getattr(made, kind)()
    inner = app_of(server)
    if not whole:
        nonstick.adopt(inner, store="memory:", node_header=True)
    host = make(Mount("/tools", inner), lifespan=entering(server, inner))
    if whole:
        nonstick.adopt(host, store="memory:", node_header=True)
    async with running(host) as client:
        session = await opened(client, f"{prefix}/tools/mcp")
        assert await says(client, session, f"{prefix}/tools/mcp") == "x"
        ours = await client.post(f"{prefix}/tools/mcp", json=request("ping"), headers=session.headers)
        assert ours.headers["nonstick-node"]
    assert (made.starts, made.running) == (1, 0)


async def test_lifespan_in_fastmcp_host_is_found() -> None:
    """`FastAPI(lifespan=mcp_app.lifespan)`, whether the app was adopted before or the host is afterwards."""
    for whole in (True, False):
        made = Made()
        inner = made.fastmcp().http_app()
        if not whole:
            nonstick.adopt(inner, store="memory:")
        host = FastAPI(lifespan=inner.lifespan)
        host.mount("/tools", inner)
        if whole:
            nonstick.adopt(host, store="memory:")
        async with running(host) as client:
            assert await says(client, await opened(client, "/tools/mcp"), "/tools/mcp") == "x"
        assert (made.starts, made.running) == (1, 0)


async def test_request_before_lifespan_gets_missing_line(kind: str) -> None:
    inner = app_of(getattr(Made(), kind)())
    host = nonstick.adopt(Starlette(routes=[Mount("/tools", inner)]), store="memory:")
    async with running(host) as client:
        response = await client.post("/tools/mcp", json=opening())
        assert response.status_code == 500
        assert "async with app.router.lifespan_context(app): yield" in error(response)["message"]


async def test_fastmcps_app_may_start_again() -> None:
    """As it may without nonstick."""
    made = Made()
    inner = nonstick.adopt(made.fastmcp().http_app(), store="memory:")
    for _ in range(2):
        async with running(inner) as client:
            assert await says(client, await opened(client)) == "x"
        async with client_of(inner) as client:
            assert (await client.post("/mcp", json=opening())).status_code == 500
    assert (made.starts, made.running) == (2, 0)


async def test_endpoints_of_one_app_stay_apart(tmp_path: Any) -> None:
    """P1: what one has opened, the other has never heard of, though they share the store."""
    made = [Made(), Made(), Made()]
    servers: list[MCPServer[Any] | FastMCP[Any]] = [
        made[0].sdk("one"),
        made[1].fastmcp("two"),
        made[2].fastmcp("three"),
    ]
    apps = [app_of(server) for server in servers]

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with (
            entering(servers[0], apps[0])(app),
            entering(servers[1], apps[1])(app),
            entering(servers[2], apps[2])(app),
        ):
            yield

    host = Starlette(routes=[Mount(f"/{n}", app) for n, app in enumerate(apps)], lifespan=lifespan)
    nonstick.adopt(host, store=f"sqlite:///{tmp_path}/sessions.db")
    paths = [f"/{n}/mcp" for n in range(3)]
    assert host.state.nonstick.paths == paths
    async with running(host) as client:
        for own in paths:
            session = await opened(client, own)
            for path in paths:
                told = await says(client, session, path)
                assert told == "x" if path == own else told.status_code == 404
    assert [one.starts for one in made] == [1, 1, 1]


# ---- how it was set up


async def test_endpoints_own_settings_hold(kind: str) -> None:
    settings: dict[str, Any] = {"json_response": True, "session_idle_timeout": 77.0, "retry_interval": 300}
    inner = nonstick.adopt(app_of(getattr(Made(), kind)(), **settings), store="memory:", node_header=True)
    async with running(inner) as client:
        manager = inner.state.nonstick.managers[0]
        assert (manager.json_response, manager.session_idle_timeout, manager.retry_interval) == (True, 77.0, 300)
        assert (await client.post("/mcp", json=opening())).headers["nonstick-node"]


async def test_stateless_endpoint_has_no_sessions(kind: str) -> None:
    inner = nonstick.adopt(app_of(getattr(Made(), kind)(), stateless_http=True), store="memory:")
    async with running(inner) as client:
        response = await client.post("/mcp", json=opening())
        assert response.status_code == 200
        assert "mcp-session-id" not in response.headers


async def test_fastmcp_app_takes_the_same_arguments() -> None:
    inner = nonstick.app(
        Made().fastmcp(), store="memory:", path="/elsewhere", max_sessions=1, session_idle_timeout=None, window=0.1
    )
    assert isinstance(inner.state.fastmcp_server, FastMCP)
    async with running(inner) as client:
        assert (inner.manager.max_sessions, inner.manager.session_idle_timeout) == (1, None)
        await opened(client, "/elsewhere")
        assert (await client.post("/elsewhere", json=opening())).status_code == 503
        assert (await client.get("/health")).text == "well"


# ---- what cannot work


def twice() -> Any:
    return nonstick.adopt(Made().sdk().streamable_http_app(), store="memory:")


def twice_by_fastmcp() -> Any:
    return nonstick.adopt(Made().fastmcp().http_app(), store="memory:")


def in_a_host() -> Any:
    return Starlette(routes=[Mount("/", nonstick.app(Made().fastmcp(), store="memory:"))])


def own_route() -> Any:
    return Starlette(routes=[Mount("/mcp", StreamableHTTPSessionManager(Made().sdk().streamable_http_app).handle_request)])  # type: ignore[arg-type] # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (twice, "serves the MCP endpoint of this app already"),
        (twice_by_fastmcp, "serves the MCP endpoint of this app already"),
        (in_a_host, "serves the MCP endpoint of this app already"),
        (lambda: nonstick.app(Made().sdk(), store="memory:"), "serves the MCP endpoint of this app already"),
        (lambda: Starlette(routes=[Route("/", lambda _: Response())]), "there is no MCP endpoint in this app"),
        (FastAPI, "there is no MCP endpoint in this app"),
        (lambda: Made().fastmcp().http_app(transport="sse"), "made with the SSE transport"),
        (own_route, "put a nonstick.SessionManager in its place"),
        (lambda: Made().fastmcp(), "use nonstick.app"),
        (lambda: 7, "use nonstick.app"),
        (lambda: Made().sdk().streamable_http_app(event_store=MemoryEventStore()), "resumed from the session store"),
    ],
)
async def test_unadoptable_app_is_refused_with_reason(make: Make, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        nonstick.adopt(make(), store="memory:")


async def test_fastmcp_event_store_is_refused() -> None:
    """Before, FastMCP does not say that there is one. What it started is stopped."""
    made = Made()
    inner = nonstick.adopt(made.fastmcp().http_app(event_store=MemoryEventStore()), store="memory:")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with running(inner):
            pass
    assert caught.group_contains(ConfigurationError, match="streams are resumed from the session store")
    assert made.running == 0


@pytest.mark.parametrize("make", [Made().sdk, Made().fastmcp])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"windov": 1}, "unknown option 'windov'"),
        ({"store": "mongodb://x"}, "scheme is not known"),
        ({"max_sessions": 3}, "give max_sessions= where the app is made"),
    ],
)
async def test_unworkable_argument_changes_nothing(make: Make, arguments: dict[str, Any], reason: str) -> None:
    """It is refused at once."""
    inner = app_of(make())
    with pytest.raises(ConfigurationError, match=reason):
        nonstick.adopt(inner, **{"store": "memory:", **arguments})
    nonstick.adopt(inner, store="memory:")


async def test_store_object_serves_one_endpoint() -> None:
    inner = Starlette(routes=[Mount(f"/{n}", app_of(Made().sdk())) for n in range(2)])
    with pytest.raises(ConfigurationError, match=r"has 2 MCP endpoints, .* give store= as a URL"):
        nonstick.adopt(inner, store=MemoryStore())


@pytest.mark.parametrize(
    "argument", ["transport_security", "auth", "token_verifier", "custom_starlette_routes", "debug"]
)
async def test_misplaced_fastmcp_setting_is_refused(argument: str) -> None:
    """What FastMCP has another place for."""
    with pytest.raises(ConfigurationError, match=f"{argument}: a FastMCP server is given auth= in FastMCP"):
        nonstick.app(Made().fastmcp(), store="memory:", **{argument: [object()]})  # type: ignore[arg-type]


async def test_own_manager_is_not_for_fastmcp() -> None:
    """Its low-level server is known only while its app runs."""
    with pytest.raises(ConfigurationError, match=r"A FastMCP server is for nonstick\.app\(\)"):
        nonstick.SessionManager(Made().fastmcp(), store="memory:")  # type: ignore[arg-type]


async def test_middleware_of_fastmcp_app_stays() -> None:
    made = Made().fastmcp().http_app(middleware=[Middleware(_Marked)])
    async with running(nonstick.adopt(made, store="memory:")) as client:
        assert (await client.post("/mcp", json=opening())).headers["x-marked"] == "yes"
