"""`nonstick.adopt`: takes over the MCP endpoints of an app that the SDK or FastMCP has built, and nothing else of it.

Each endpoint of theirs is an object whose `session_manager` can be assigned; it is found wherever it stands in the app.
Their own manager still runs, and the host enters it as before: it serves the clients that have no session, and enters
the server's lifespan, once. Our manager runs inside of theirs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar, Unpack

from mcp.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPASGIApp, StreamableHTTPSessionManager
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Mount, Route, Router
from starlette.types import ASGIApp

from nonstick import fastmcp
from nonstick.cluster.cluster import Cluster
from nonstick.core.settings import Options, check_arguments
from nonstick.errors import ConfigurationError
from nonstick.http.manager import SessionManager
from nonstick.store import Store

__all__ = ["Adopted", "adopt", "take_over"]

_Make = Callable[[StreamableHTTPSessionManager | None], SessionManager]
"""Makes our manager. If their manager is there already, ours is set up like it."""

AppT = TypeVar("AppT", bound=ASGIApp)

_KEPT: Final = (
    "json_response",
    "stateless",
    "event_store",
    "security_settings",
    "retry_interval",
    "session_idle_timeout",
    "max_request_body_size",
    "max_sessions",
)
"""How their manager was set up, and so is ours."""

_TWICE: Final = (
    "nonstick serves the MCP endpoint of this app already. Call nonstick.adopt() once for it, and not on what "
    "nonstick.app() returned."
)
_NONE: Final = (
    "there is no MCP endpoint in this app. nonstick.adopt() takes what streamable_http_app() of the SDK or http_app() "
    "of FastMCP returned, or an app in which that is mounted. {hint}"
)
_NO_HINT: Final = "For a server that was not made into an app yet, use nonstick.app(server)."
_OWN_ROUTE: Final = (
    "Here a route calls a StreamableHTTPSessionManager itself: put a nonstick.SessionManager in its place, it takes "
    "the same arguments."
)
_SSE: Final = "Here FastMCP's http_app() was made with the SSE transport: make it with transport='http'."


def adopt(app: AppT, *, store: str | Store, cluster: Cluster | None = None, **options: Unpack[Options]) -> AppT:
    """Has any replica of this app serve any session; returns the same app.

    Only what answers at its MCP endpoints is replaced. Routes, authentication, middleware and lifespans stay, and what
    its endpoints were made with (`json_response`, `stateless_http`, `session_idle_timeout` and so on) holds. Call it
    once, before the app runs.

    Args:
        app: What `streamable_http_app()` of the SDK or `http_app()` of FastMCP returned, or a Starlette or FastAPI app
            in which such apps are mounted. With several, each has its own sessions: a session is of the server that
            opened it, by the server's name (or `namespace`) and the path.
        store: Where sessions live, the same for every replica; as for `nonstick.app`.
        cluster: The `Cluster` that the server was built with. Need not be said if it is the only one in the process.
        options: nonstick's own settings; see `Settings`.

    Raises:
        ConfigurationError: There is no MCP endpoint in it, it is nonstick's already, or an argument cannot work.
    """
    take_over(app, store=store, cluster=cluster, given={}, options=options)
    return app


class Adopted:
    """The MCP endpoints of one app that nonstick serves. An app that is a Starlette has it as `app.state.nonstick`."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self._endpoints = endpoints

    @property
    def managers(self) -> list[SessionManager]:
        """One for each endpoint, in the order of the routes."""
        return [endpoint.manager for endpoint in self._endpoints]

    @property
    def cluster(self) -> Cluster:
        """What is told to every client goes through this: `await app.state.nonstick.cluster.notify_tools_changed()`."""
        return self.managers[0].cluster

    @property
    def paths(self) -> list[str]:
        """Where the endpoints are."""
        return [endpoint.site.path for endpoint in self._endpoints]

    def is_endpoint(self, asgi: object) -> bool:
        """Whether this is one of the endpoints itself, with nothing around it."""
        return any(endpoint.site.asgi is asgi for endpoint in self._endpoints)

    @property
    def from_fastmcp(self) -> list[bool]:
        """Whether each endpoint is FastMCP's: what its server is, `manager.app` says only while that runs."""
        return [isinstance(endpoint, FastMcpEndpoint) for endpoint in self._endpoints]

    @property
    def servers(self) -> list[Server[Any] | None]:
        """What each endpoint serves; None for FastMCP's while they do not run."""
        return [endpoint.server for endpoint in self._endpoints]

    @property
    def fastmcp_apps(self) -> list[Starlette | None]:
        """FastMCP's app around each endpoint; None for the SDK's."""
        return [endpoint.site.owner if isinstance(endpoint, FastMcpEndpoint) else None for endpoint in self._endpoints]

    def begin_drain(self) -> None:
        """As `SessionManager.begin_drain`, of all of them."""
        for manager in self.managers:
            manager.begin_drain()

    async def drain(self) -> None:
        """As `SessionManager.drain`, of all of them."""
        await asyncio.gather(*(manager.drain() for manager in self.managers))

    async def check_ready(self) -> None:
        """As `SessionManager.check_ready`, of all of them."""
        for manager in self.managers:
            await manager.check_ready()


def take_over(
    app: ASGIApp, *, store: str | Store, cluster: Cluster | None, given: dict[str, Any], options: Options
) -> Adopted:
    """As `adopt`. What is `given` of the SDK manager's arguments goes before what the endpoint was made with.

    Raises:
        ConfigurationError: As `adopt`. The app is as it was.
    """
    if misplaced := sorted(set(options) & {"app", "modern", "endpoint", *_KEPT}):
        raise ConfigurationError(
            f"give {misplaced[0]}= where the app is made: to streamable_http_app(), http_app() or nonstick.app()"
        )
    check_arguments(options, adopt, "nonstick.adopt()")
    sites = list(_sites_in(app))
    if not sites:
        raise ConfigurationError(_NONE.format(hint=_hint(app)))
    if any(isinstance(site.asgi.session_manager, SessionManager) for site in sites):
        raise ConfigurationError(_TWICE)
    if len(sites) > 1 and not isinstance(store, str):
        raise ConfigurationError(
            f"this app has {len(sites)} MCP endpoints, and each opens the store for itself: give store= as a URL"
        )
    cluster = cluster or Cluster.only() or Cluster.private()
    endpoints: list[Endpoint] = []
    for site, name in zip(sites, _names(sites, options.get("namespace")), strict=True):

        def make(
            theirs: StreamableHTTPSessionManager | None, site: EndpointSite = site, name: str = name
        ) -> SessionManager:
            kept = {} if theirs is None else {name: getattr(theirs, name) for name in _KEPT}
            own = options.copy()
            if not own.get("namespace") and fastmcp.is_nameless(site.owner):
                own["namespace"] = _server_name(site)
            return SessionManager(
                # What its server is, FastMCP says when it starts. Until then there is nothing to serve.
                Server(_server_name(site) or "") if theirs is None else theirs.app,
                **{**kept, **given},
                store=store,
                cluster=cluster,
                modern=theirs,
                endpoint=name,
                **own,
            )

        if fastmcp.is_endpoint(site.asgi):
            endpoints.append(FastMcpEndpoint(site, make))
        else:
            endpoints.append(SdkEndpoint(site, make))
    for endpoint in endpoints:
        endpoint.put_ours()
    adopted = Adopted(endpoints)
    host = _host(app)
    if host is not None:
        _run_with(host, [endpoint for endpoint in endpoints if isinstance(endpoint, FastMcpEndpoint)])
    if isinstance(app, Starlette):
        app.state.nonstick = adopted
    return adopted


# ---- endpoints


@dataclass(frozen=True, eq=False)
class EndpointSite:
    """Where an MCP endpoint stands.

    Attributes:
        asgi: The endpoint, the SDK's or FastMCP's: an object with an assignable `session_manager`.
        way: The mounts and host names on the way to it, and its path, as the routes have them.
        path: Under which it is reached.
        own_path: Under which the app has it that it was made in.
        owner: That app.
    """

    asgi: Any
    way: tuple[str, ...]
    path: str
    own_path: str
    owner: Starlette | None


class SdkEndpoint:
    """An endpoint of the SDK: its manager is there from the beginning. Where that is run, ours is."""

    def __init__(self, site: EndpointSite, make: _Make) -> None:
        self.site = site
        self.manager = make(site.asgi.session_manager)
        self.server: Server[Any] | None = self.manager.app

    def put_ours(self) -> None:
        """Puts our manager in the place of the one that the endpoint calls."""
        # The host of a mounted app enters `run()` of their manager, so this has to be the `run()` of ours, which enters
        # theirs in turn.
        self.site.asgi.session_manager.run = self.manager.run
        self.site.asgi.session_manager = self.manager


class FastMcpEndpoint:
    """An endpoint of FastMCP, which makes its manager and runs it in the app's lifespan."""

    def __init__(self, site: EndpointSite, make: _Make) -> None:
        self.site = site
        self._make = make
        self.manager = make(None)
        self.server: Server[Any] | None = None

    def put_ours(self) -> None:
        """Puts our manager in the place of the one that the endpoint calls."""
        # A request that comes before the lifespan, or without it, is told what is missing.
        self.site.asgi.session_manager = self.manager

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Takes the place of the manager that FastMCP runs, while it runs."""
        theirs = self.site.asgi.session_manager
        if theirs is self.manager:  # the host has not entered its lifespan
            yield
            return
        self.manager = self._make(theirs)
        fastmcp.keep_levels(theirs.app)
        fastmcp.name_sessions_by_hash()
        try:
            # The lifespan is entered already. FastMCP counts how often, and gives each time what was yielded first.
            async with theirs.app.lifespan(theirs.app) as state, self.manager.serving(state):
                if self.site.owner is not None:
                    await fastmcp.check_state(self.site.owner, self.manager.cluster)
                    self.manager.has_tasks = fastmcp.has_tasks(self.site.owner)
                fastmcp.listen(theirs.app, self.manager.cluster.subscription_bus)
                self.site.asgi.session_manager = self.manager
                self.server = theirs.app
                yield
        finally:
            self.server = None
            self.site.asgi.session_manager = theirs  # FastMCP stops what it finds there


Endpoint = SdkEndpoint | FastMcpEndpoint


def _run_with(host: Router, endpoints: list[FastMcpEndpoint]) -> None:
    """Has these endpoints run while the host's lifespan does."""
    if not endpoints:
        return
    inner = host.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        try:
            async with inner(app) as state, AsyncExitStack() as stack:
                for endpoint in endpoints:
                    await stack.enter_async_context(endpoint.running())
                yield state
        finally:
            for endpoint in endpoints:
                endpoint.put_ours()

    host.lifespan_context = lifespan


# ---- the way through an app


def _host(app: Any) -> Router | None:
    """The router that runs the lifespan of this app; None if there is none."""
    for layer in _layers(app):
        if isinstance(layer, Starlette):
            return layer.router
        if isinstance(layer, Router):
            return layer
    return None


def _layers(app: Any) -> Iterator[Any]:
    """The app, the app that it wraps as middleware, and so on inwards, up to the first one with routes."""
    seen: set[int] = set()
    while app is not None and id(app) not in seen:
        seen.add(id(app))
        yield app
        if isinstance(app, Starlette | Router):
            return
        app = getattr(app, "app", None)


def _sites_in(app: Any, begun: EndpointSite | None = None) -> Iterator[EndpointSite]:
    site = begun or EndpointSite(None, (), "", "", None)
    for layer in _layers(app):
        if isinstance(layer, StreamableHTTPASGIApp) or fastmcp.is_endpoint(layer):
            yield replace(site, asgi=layer)
            return
        if isinstance(layer, Starlette):
            yield from _in_routes(layer.router.routes, replace(site, own_path="", owner=layer))
        elif isinstance(layer, Router):
            yield from _in_routes(layer.routes, site)


def _in_routes(routes: list[BaseRoute], site: EndpointSite) -> Iterator[EndpointSite]:
    for route in routes:
        if isinstance(route, Route):
            yield from _sites_in(route.endpoint, _further(site, route.path))
        elif isinstance(route, Mount):
            yield from _sites_in(route.app, _further(site, route.path))
        elif isinstance(route, Host):
            way = (*site.way, f"host {route.host}")
            yield from _sites_in(route.app, replace(site, way=way, path=f"{route.host}{site.path}"))


def _further(site: EndpointSite, path: str) -> EndpointSite:
    return replace(site, way=(*site.way, path), path=site.path + path, own_path=site.own_path + path)


def _server_name(site: EndpointSite) -> str | None:
    if fastmcp.is_endpoint(site.asgi):
        return fastmcp.name_of(site.owner)
    name: str = site.asgi.session_manager.app.name
    return name or None


def _names(sites: list[EndpointSite], namespace: str | None) -> list[str]:
    """What tells each endpoint from others of its server, or of the namespace.

    The path that a server's own app has, wherever that is mounted: so replicas agree that stand behind different
    prefixes. Where two in one app could be taken for each other, the whole way to them.
    """
    short = [(namespace or _server_name(site), site.own_path) for site in sites]
    return [
        site.own_path if short.count(name) == 1 else json.dumps(site.way)
        for site, name in zip(sites, short, strict=True)
    ]


def _hint(app: Any) -> str:
    """What to do about an app without an MCP endpoint, as far as its routes show why there is none."""
    for route in _all_routes(app):
        called = getattr(route, "endpoint", None) or getattr(route, "app", None)
        if isinstance(getattr(called, "__self__", None), StreamableHTTPSessionManager):
            return _OWN_ROUTE
    if isinstance(app, Starlette) and getattr(app.state, "transport_type", None) == "sse":
        return _SSE
    return _NO_HINT


def _all_routes(app: Any) -> Iterator[BaseRoute]:
    for layer in _layers(app):
        if isinstance(layer, Starlette | Router):
            for route in layer.routes:
                yield route
                if isinstance(route, Mount | Host):
                    yield from _all_routes(route.app)
