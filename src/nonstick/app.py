"""The ASGI door: has the SDK, or FastMCP, build the server's app, and takes it over."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Unpack

from mcp.server import MCPServer, Server
from mcp.server.auth.provider import OAuthAuthorizationServerProvider, TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.streamable_http_manager import DEFAULT_MAX_SESSIONS, DEFAULT_SESSION_IDLE_TIMEOUT
from mcp.server.transport_security import DEFAULT_MAX_REQUEST_BODY_SIZE, TransportSecuritySettings
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from nonstick import fastmcp
from nonstick.adopt import Adopted, take_over
from nonstick.cluster.cluster import Cluster
from nonstick.core.settings import Options, check_arguments
from nonstick.errors import ConfigurationError
from nonstick.http.manager import SessionManager, is_stateless
from nonstick.store import Store

if TYPE_CHECKING:
    from fastmcp import FastMCP

__all__ = ["App", "app"]

_DEFAULTS: Final = {
    "max_request_body_size": DEFAULT_MAX_REQUEST_BODY_SIZE,
    "session_idle_timeout": DEFAULT_SESSION_IDLE_TIMEOUT,
    "max_sessions": DEFAULT_MAX_SESSIONS,
}


class App(Starlette):
    """The SDK's app, or FastMCP's, with its routes, middleware and authentication, whose sessions any node can serve.

    Run it with an ASGI server. Where it is mounted in another app, that app must enter `lifespan`.
    """

    def __init__(self, inner: Starlette, adopted: Adopted) -> None:
        super().__init__(
            debug=inner.debug,
            routes=inner.router.routes,
            middleware=inner.user_middleware,
            exception_handlers=dict(inner.exception_handlers),
            lifespan=self.lifespan,
        )
        self.state = inner.state
        self._inner = inner
        self._adopted = adopted
        self._bare_path = _bare_path(self.routes, adopted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request. What is for the MCP endpoint goes straight to it, where nothing stands before it."""
        if (
            self._bare_path is not None
            and scope["type"] == "http"
            and scope["path"] == f"{scope.get('root_path', '')}{self._bare_path}"
            and not self.user_middleware
        ):
            scope["app"] = self
            await self.manager.asgi_app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    @property
    def manager(self) -> SessionManager:
        """The manager that serves the MCP endpoint. A FastMCP server's app has a new one each time it starts."""
        return self._adopted.managers[0]

    @property
    def cluster(self) -> Cluster:
        """What is told to every client goes through this: `await app.cluster.notify_tools_changed()` (P11)."""
        return self.manager.cluster

    def begin_drain(self) -> None:
        """Stops taking work, and returns at once, as on SIGTERM: for a host that stops without a signal (P8).

        Raises:
            NotRunning: The app does not run.
        """
        self._adopted.begin_drain()

    async def drain(self) -> None:
        """As `begin_drain`, and returns when what runs here has finished, or was ended after the grace period (P8).

        Raises:
            NotRunning: The app does not run.
        """
        await self._adopted.drain()

    @asynccontextmanager
    async def lifespan(self, _app: object = None) -> AsyncIterator[Any]:
        """Runs the server, its own lifespan included. Fits as `FastAPI(lifespan=app.lifespan)`."""
        async with self._inner.router.lifespan_context(self._inner) as state:
            yield state


def app(
    server: MCPServer[Any] | Server[Any] | FastMCP[Any],
    *,
    store: str | Store,
    cluster: Cluster | None = None,
    path: str | None = None,
    json_response: bool = False,
    stateless_http: bool = False,
    retry_interval: int | None = None,
    max_request_body_size: int = DEFAULT_MAX_REQUEST_BODY_SIZE,
    session_idle_timeout: float | None = DEFAULT_SESSION_IDLE_TIMEOUT,
    max_sessions: int | None = DEFAULT_MAX_SESSIONS,
    transport_security: TransportSecuritySettings | None = None,
    host: str = "127.0.0.1",
    auth: AuthSettings | None = None,
    token_verifier: TokenVerifier | None = None,
    auth_server_provider: OAuthAuthorizationServerProvider[Any, Any, Any] | None = None,
    custom_starlette_routes: list[Route] | None = None,
    debug: bool = False,
    **options: Unpack[Options],
) -> App:
    """The server as an ASGI app, any of whose replicas serves any session.

    Args:
        server: Of the SDK: an `MCPServer` or a low-level `Server`. Or a `FastMCP` (version 4): then authentication,
            Host checks and all else are as its own `http_app()` has them.
        store: Where sessions live, the same for every replica: `sqlite:///sessions.db`, `redis://host:6379`,
            `rediss://`, `unix://`, `memory:` for one process, or a `Store`.
        cluster: The `Cluster` that the server was built with. Need not be said if it is the only one in the process.
        path: Of the MCP endpoint; `/mcp`, or what FastMCP is set to.
        host: What the server is bound to. As with the SDK, a loopback address turns on the Host and Origin checks
            for local use, unless `transport_security` says otherwise.
        json_response, stateless_http, retry_interval, max_request_body_size, session_idle_timeout, max_sessions,
            transport_security: As for the SDK's `streamable_http_app`; see `SessionManager`.
        auth, token_verifier, auth_server_provider, custom_starlette_routes, debug: As for the `streamable_http_app` of
            a low-level `Server`. An `MCPServer` has them already.
        options: nonstick's own settings; see `Settings`.

    Raises:
        ConfigurationError: The server is none, or an argument cannot work.
    """
    check_arguments(options, app, "nonstick.app()")
    own: dict[str, Any] = {
        "auth": auth,
        "token_verifier": token_verifier,
        "auth_server_provider": auth_server_provider,
        "custom_starlette_routes": custom_starlette_routes,
        "debug": debug,
    }
    own = {name: value for name, value in own.items() if value}
    stateless_http = is_stateless(stateless_http, options.get("placement"))
    ours: dict[str, Any] = {
        "max_request_body_size": max_request_body_size,
        "session_idle_timeout": session_idle_timeout,
        "max_sessions": max_sessions,
    }
    inner: Starlette
    given: dict[str, Any] = {}
    if fastmcp.is_server(server):
        inner = fastmcp.http_app(
            server,
            path=path,
            refused=own if transport_security is None else {**own, "transport_security": transport_security},
            json_response=json_response,
            stateless_http=stateless_http,
            retry_interval=retry_interval,
        )
        # These FastMCP cannot be told; its own setting holds where nothing else is said here.
        given = {name: value for name, value in ours.items() if value != _DEFAULTS[name]}
    elif isinstance(server, MCPServer | Server):
        _check_own(server, own)
        inner = server.streamable_http_app(
            streamable_http_path=path or "/mcp",
            json_response=json_response,
            stateless_http=stateless_http,
            retry_interval=retry_interval,
            transport_security=transport_security,
            host=host,
            **ours,
            **own,
        )
    else:
        raise ConfigurationError(
            f"nonstick.app() needs an MCP server of the official SDK (mcp.server.MCPServer or mcp.server.Server) or of "
            f"FastMCP 4, not {type(server).__module__}.{type(server).__qualname__}. An app that was made of one "
            "already is for nonstick.adopt()."
        )
    return App(inner, take_over(inner, store=store, cluster=cluster, given=given, options=options))


def _check_own(server: MCPServer[Any] | Server[Any], own: dict[str, Any]) -> None:
    """Returns if this server takes these arguments, and they protect what they seem to protect."""
    if isinstance(server, MCPServer) and own:
        raise ConfigurationError(
            f"give {', '.join(own)} to the MCPServer, not to nonstick.app(): MCPServer(..., auth=, token_verifier=, "
            "auth_server_provider=, debug=) and @server.custom_route()"
        )
    if own.keys() & {"auth", "token_verifier", "auth_server_provider"} and not own.keys() >= {"auth", "token_verifier"}:
        # The SDK would leave the MCP endpoint open, or closed to everybody.
        raise ConfigurationError(
            "authentication needs both auth= and token_verifier=; with an auth_server_provider= of your own, "
            "token_verifier=mcp.server.auth.provider.ProviderTokenVerifier(provider)"
        )


def _bare_path(routes: Sequence[BaseRoute], adopted: Adopted) -> str | None:
    """The MCP endpoint's path, if its requests pass nothing else: no authentication, no other route. Else None."""
    path = adopted.paths[0]
    asked = {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": []}
    first = next((route for route in routes if route.matches(asked)[0] is not Match.NONE), None)
    return path if isinstance(first, Route) and adopted.is_endpoint(first.endpoint) else None
