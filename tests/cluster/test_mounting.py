"""nonstick in somebody else's app, with somebody else's routes, or without an app at all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields
from typing import Any, cast

import httpx2
import pytest
from fastapi import FastAPI
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server import MCPServer, Server
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.streamable_http import EventStore
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import AnyHttpUrl
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

import nonstick
from nonstick.core.names import session_key
from nonstick.core.settings import Settings
from nonstick.errors import ConfigurationError, NotRunning
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import HEADERS, Session
from tests.cluster.servers import World, answer, call, error, opening, request

pytestmark = pytest.mark.anyio

BASE = "http://127.0.0.1:8000"


@asynccontextmanager
async def running(host: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of this app, whose lifespan is entered as an ASGI server would."""
    async with host.router.lifespan_context(host), client_of(host) as client:
        yield client


def client_of(host: Any) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=host), base_url=BASE, headers=HEADERS, timeout=60)


async def open_session(client: httpx2.AsyncClient, path: str = "/mcp") -> Session:
    response = await client.post(path, json=opening())
    assert response.status_code == 200, response.text
    return Session(response.headers["mcp-session-id"], "2025-11-25", {})


async def talks(client: httpx2.AsyncClient, path: str) -> bool:
    session = await open_session(client, path)
    response = await client.post(path, json=call("echo", x=1), headers=session.headers)
    return bool(answer(response) == {"x": 1})


def hosts() -> list[Any]:
    def starlette(inner: nonstick.App) -> Any:
        return Starlette(routes=[Mount("/tools", inner)], lifespan=inner.lifespan)

    def fastapi(inner: nonstick.App) -> Any:
        host = FastAPI(lifespan=inner.lifespan)
        host.mount("/tools", inner)
        return host

    return [pytest.param(starlette, id="starlette"), pytest.param(fastapi, id="fastapi")]


@pytest.mark.parametrize("mount", hosts())
async def test_mounted_app_serves_sessions(mount: Callable[[nonstick.App], Any]) -> None:
    world = World()
    inner = nonstick.app(world.server(), store="memory:")
    async with running(mount(inner)) as client:
        assert await talks(client, "/tools/mcp")
        assert await talks(client, "/tools/mcp")
    assert world.starts == 1


@pytest.mark.parametrize("mount", hosts())
async def test_hosts_lifespan_can_enter_ours(mount: Callable[[nonstick.App], Any]) -> None:
    world, order = World(), list[str]()
    inner = nonstick.app(world.server(), store="memory:")

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[dict[str, str]]:
        order.append("host")
        async with inner.lifespan():
            yield {"host": "state"}

    host = mount(inner)
    host.router.lifespan_context = lifespan
    async with running(host) as client:
        assert await talks(client, "/tools/mcp")
    assert (order, world.starts) == (["host"], 1)


@pytest.mark.parametrize("mount", hosts())
async def test_request_before_lifespan_gets_missing_line(
    mount: Callable[[nonstick.App], Any],
) -> None:
    """A mounted app's lifespan is never run by its host: whoever forgets it must be told."""
    inner = nonstick.app(World().server(), store="memory:")
    async with client_of(mount(inner)) as client:
        for method in ("POST", "GET", "DELETE"):
            response = await client.request(method, "/tools/mcp", json=opening())
            assert response.status_code == 500
            message = error(response)["message"]
            assert "lifespan=app.lifespan" in message
            assert "async with app.lifespan(): yield" in message


async def test_app_alone_runs_its_own_lifespan() -> None:
    world = World()
    async with running(nonstick.app(world.server(), store="memory:", path="/elsewhere")) as client:
        assert await talks(client, "/elsewhere")
        assert (await client.post("/mcp", json=opening())).status_code == 404
    assert world.starts == 1


async def test_servers_routes_middleware_tools_are_kept() -> None:
    starts = 0

    @asynccontextmanager
    async def lifespan(_: MCPServer[Any]) -> AsyncIterator[dict[str, str]]:
        nonlocal starts
        starts += 1
        yield {"database": "open"}

    server = MCPServer[dict[str, str]]("custom", lifespan=lifespan)

    @server.custom_route("/health", methods=["GET"])  # type: ignore[untyped-decorator]
    async def health(_: Request) -> Response:
        return PlainTextResponse("well")

    @server.tool()
    def double(x: int) -> int:
        return 2 * x

    inner = nonstick.app(server, store="memory:")
    async with running(inner) as client:
        assert (await client.get("/health")).text == "well"
        for mode in ("legacy", "2026-07-28"):
            transport = streamable_http_client(f"{BASE}/mcp", http_client=client)
            async with Client(transport, mode=mode) as official:
                result = await official.call_tool("double", {"x": 21})
                assert result.structured_content == {"result": 42}
    assert starts == 1


class _Tokens:
    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id="app", scopes=["use"]) if token == "good" else None


AUTH = AuthSettings(
    issuer_url=AnyHttpUrl("https://issuer.example"),
    resource_server_url=AnyHttpUrl("https://server.example/mcp"),
    required_scopes=["use"],
    validate_token_resource=False,
)


async def test_low_level_server_gets_routes_too() -> None:
    """And authentication, as with the SDK."""

    async def health(_: Request) -> Response:
        return PlainTextResponse("well")

    routes = [Route("/health", health)]
    inner = nonstick.app(
        World().server(),
        store="memory:",
        auth=AUTH,
        token_verifier=_Tokens(),
        custom_starlette_routes=routes,
        debug=True,
    )
    assert inner.debug
    async with running(inner) as client:
        assert (await client.get("/health")).text == "well"
        metadata = await client.get("/.well-known/oauth-protected-resource/mcp")
        assert metadata.json()["resource"] == "https://server.example/mcp"
        for headers in ({}, {"authorization": "Bearer bad"}):
            assert (await client.post("/mcp", json=opening(), headers=headers)).status_code == 401
        opened = await client.post("/mcp", json=opening(), headers={"authorization": "Bearer good"})
        assert opened.status_code == 200
        manager = inner.manager
        loaded = await manager.store.load(session_key(opened.headers["mcp-session-id"]))
        assert b"app" in loaded.fields["principal"]


# ---- the manager alone


def manager(**more: Any) -> nonstick.SessionManager:
    return nonstick.SessionManager(World().server(), **{"store": MemoryStore(), **more})


async def test_manager_serves_behind_own_routes() -> None:
    """It takes the place of the SDK's: `run`, `handle_request`, `asgi_app`."""
    own = manager()

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        await own.handle_request(scope, receive, send)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with own.run():
            yield

    host = Starlette(routes=[Mount("/a", endpoint), Mount("/b", own.asgi_app)], lifespan=lifespan)
    async with running(host) as client:
        session = await open_session(client, "/a/")
        for path in ("/b/", "/a/"):
            response = await client.post(path, json=call("echo", x=path), headers=session.headers)
            assert answer(response) == {"x": path}
        assert (await client.delete("/b/", headers=session.headers)).status_code == 200
        assert (await client.post("/a/", json=call("echo"), headers=session.headers)).status_code == 404


async def test_manager_takes_the_sdks_arguments() -> None:
    """In the SDK's order, under the SDK's names, with the SDK's defaults."""
    arguments = {
        "event_store": None,
        "json_response": True,
        "stateless": False,
        "security_settings": TransportSecuritySettings(allowed_hosts=["tools.example"]),
        "retry_interval": 500,
        "session_idle_timeout": 60.0,
        "max_request_body_size": 5_000,
        "max_sessions": 10,
    }
    server = World().server()
    theirs = StreamableHTTPSessionManager(server, *arguments.values())  # type: ignore[arg-type]
    ours = nonstick.SessionManager(server, *arguments.values(), store="memory:")  # type: ignore[arg-type]
    plain_theirs, plain_ours = StreamableHTTPSessionManager(server), nonstick.SessionManager(server, store="memory:")
    for name in arguments.keys() - {"event_store"}:
        assert getattr(ours, name) == getattr(theirs, name) == arguments[name]
        assert getattr(plain_ours, name) == getattr(plain_theirs, name)
    host = Starlette(routes=[Mount("/", ours.asgi_app)])
    async with ours.run(), client_of(host) as client:
        assert (await client.post("/", json=opening())).status_code == 421
        accepted = await client.post("/", json=opening(), headers={"host": "tools.example"})
        assert accepted.headers["content-type"] == "application/json"


async def test_stateless_manager_has_no_sessions() -> None:
    own = manager(stateless=True)
    async with own.run(), client_of(Starlette(routes=[Mount("/", own.asgi_app)])) as client:
        response = await client.post("/", json=opening())
        assert response.status_code == 200
        assert "mcp-session-id" not in response.headers
        assert (await client.post("/", json=request("ping"))).status_code == 200


async def test_manager_runs_once() -> None:
    own = manager()
    async with own.run():
        with pytest.raises(RuntimeError, match=r"can only be called once per instance"):
            async with own.run():
                pass
        assert own.node
    with pytest.raises(RuntimeError, match=r"can only be called once per instance"):
        async with own.run():
            pass


async def test_idle_manager_says_so() -> None:
    own = manager()
    with pytest.raises(NotRunning, match=r"async with app\.lifespan\(\): yield"):
        _ = own.node
    with pytest.raises(NotRunning):
        await own.check_ready()
    async with own.run():
        await own.check_ready()
    with pytest.raises(NotRunning):
        own.begin_drain()


async def test_failing_lifespan_leaves_server_unchanged() -> None:
    @asynccontextmanager
    async def lifespan(server: Server[Any]) -> AsyncIterator[None]:
        if not server.name:
            yield
        raise RuntimeError("no database")

    server = Server("broken", lifespan=lifespan)
    own = nonstick.SessionManager(server, store="memory:")
    with pytest.raises(RuntimeError, match="no database"):
        async with own.run():
            pass
    assert server.lifespan is lifespan


async def test_error_in_lifespan_reaches_the_host() -> None:
    world = World()
    own = nonstick.SessionManager(world.server(), store="memory:")
    with pytest.raises(ExceptionGroup) as caught:
        async with own.run():
            raise KeyError("host")
    # In a group, as the SDK's manager does it.
    assert caught.group_contains(KeyError, match="host")


async def test_managers_run_side_by_side() -> None:
    first, second = manager(), manager()
    host = Starlette(routes=[Mount("/1", first.asgi_app), Mount("/2", second.asgi_app)])
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(first.run())
        await stack.enter_async_context(second.run())
        client = await stack.enter_async_context(client_of(host))
        session = await open_session(client, "/1/")
        assert (await client.post("/1/", json=call("echo"), headers=session.headers)).status_code == 200
        assert (await client.post("/2/", json=call("echo"), headers=session.headers)).status_code == 404


# ---- what cannot work


async def _rebuild(_: object) -> None:
    """As `rehydrate`."""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"event_store": cast("EventStore", object())}, "streams are resumed from the session store"),
        ({"session_idle_timeout": 0}, "session_idle_timeout"),
        ({"session_idle_timeout": float("inf")}, "session_idle_timeout"),
        ({"max_sessions": 0}, "max_sessions"),
        ({"max_request_body_size": 0}, "max_request_body_size"),
        ({"json_response": True, "answer": "sse"}, "give one of the two"),
        ({"windov": 1}, r"unknown option 'windov' of SessionManager\(\): did you mean window\?"),
        ({"lifetime": 60}, "lifetime is no option: give session_idle_timeout="),
        ({"placement": "sticky"}, "placement must be one of any, stateless, owner"),
        ({"placement": "owner", "stateless": True}, "of which there are none if stateless"),
        ({"placement": "owner", "rehydrate": lambda _: None}, "rehydrate must be an async function"),
        ({"rehydrate": _rebuild}, 'needs placement="owner"'),
        ({"placement": "owner", "reexecute": "idempotent"}, "what it ran on is gone"),
        ({"window": -1}, "window must be"),
        ({"window": float("nan")}, "window must be"),
        ({"window": "soon"}, "window must be"),
        ({"window": True}, "window must be"),
        ({"ping_interval": 0}, "ping_interval must be a positive"),
        ({"max_streams": None}, "max_streams must be"),
        ({"max_streams": 2.5}, "max_streams must be a positive number without a fraction, not 2.5"),
        ({"retry_interval": -1}, "retry_interval must be zero or a positive number of milliseconds"),
        ({"namespace": ""}, "namespace must be a text that is not empty"),
        ({"node_header": "yes"}, "node_header must be True or False"),
        ({"relay_headers": "x-key"}, "relay_headers must be names of headers"),
        ({"relay_headers": ["mcp-session-id"]}, "handlers see it anyway"),
        ({"max_principal_share": 2}, "max_principal_share must be a share, more than 0 and at most 1"),
        ({"answer": "xml"}, "answer must be one of auto, sse, json"),
        ({"second_listener": "reject"}, "unknown option 'second_listener'"),
        ({"reexecute": "always"}, "reexecute must be one of never, idempotent"),
        ({"store": "mongodb://x"}, "scheme is not known"),
        ({"store": None}, "store must be a URL or a Store, not NoneType"),
        ({"store": ""}, "store"),
    ],
)
async def test_unworkable_argument_is_refused_with_reason(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        manager(**arguments)


async def test_named_options_can_be_given() -> None:
    """Each is taken by the app, with its default; nothing that is a setting of another name is among them."""
    with pytest.raises(ConfigurationError) as refused:
        nonstick.app(World().server(), store="memory:", xyz=1)  # type: ignore[call-arg]
    named = str(refused.value).partition("there are: ")[2].split(", ")
    assert {"node_name", "node_header", "window", "session_idle_timeout", "auth"} < set(named)
    assert "lifetime" not in named
    defaults = {field.name: field.default for field in fields(Settings)} | {"encryption_keys": None}
    settings = set(named) & defaults.keys()
    for name in settings:
        nonstick.app(World().server(), store="memory:", **{name: defaults[name]})  # type: ignore[arg-type]
    assert defaults.keys() - settings == {"lifetime"}


@pytest.mark.parametrize(
    ("door", "wrong", "meant"),
    [
        (nonstick.app, "session_idle_timout", "session_idle_timeout"),
        (nonstick.app, "transport_securty", "transport_security"),
        (nonstick.app, "max_stream", "max_streams"),
        (nonstick.SessionManager, "json_respnse", "json_response"),
        (nonstick.SessionManager, "unconfirmed_life_time", "unconfirmed_lifetime"),
        (nonstick.adopt, "encryption_key", "encryption_keys"),
        (nonstick.adopt, "clutser", "cluster"),
    ],
)
async def test_misspelt_argument_is_recognised(door: Any, wrong: str, meant: str) -> None:
    """Whether it is an option of nonstick's or an argument of the door alone."""
    server = World().server()
    served = server.streamable_http_app() if door is nonstick.adopt else server
    with pytest.raises(ConfigurationError, match=rf"unknown option '{wrong}' of .*\(\): did you mean {meant}\?$"):
        door(served, store="memory:", **{wrong: 1})


@pytest.mark.parametrize(
    "argument",
    [{"auth": AUTH}, {"token_verifier": _Tokens()}, {"auth_server_provider": object()}],
)
async def test_useless_authentication_is_refused(argument: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="needs both auth= and token_verifier="):
        nonstick.app(World().server(), store="memory:", **argument)


@pytest.mark.parametrize("argument", [{"auth": AUTH}, {"custom_starlette_routes": [object()]}, {"debug": True}])
async def test_settings_of_mcpserver_are_refused(argument: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"give {next(iter(argument))} to the MCPServer"):
        nonstick.app(MCPServer("own"), store="memory:", **argument)


async def test_app_wants_an_sdk_server() -> None:
    with pytest.raises(ConfigurationError, match=r"needs an MCP server of the official SDK .* not builtins\.int"):
        nonstick.app(7, store="memory:")  # type: ignore[arg-type]
