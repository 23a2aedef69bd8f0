"""`SessionManager`: takes the place of the SDK's `StreamableHTTPSessionManager`, with the sessions in a store.

Each request comes in here: head and body are admitted, and the request is routed by the era of its client, to
`Sessions` or, for clients that have no session, to the SDK's own manager. Code that refuses a request raises a
`Refusal` (`core/refusals`), which becomes the response here or in `Sessions`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, Unpack

from mcp.server import MCPServer, Server
from mcp.server.streamable_http import (
    MCP_SESSION_ID_HEADER,
    EventStore,
)
from mcp.server.streamable_http_manager import (
    DEFAULT_MAX_SESSIONS,
    DEFAULT_SESSION_IDLE_TIMEOUT,
    StreamableHTTPSessionManager,
)
from mcp.server.transport_security import (
    DEFAULT_MAX_REQUEST_BODY_SIZE,
    TransportSecurityMiddleware,
    TransportSecuritySettings,
)
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from nonstick.cluster.cluster import Cluster
from nonstick.cluster.state_store import Allowance, within_request
from nonstick.core.names import UNNAMED, identity
from nonstick.core.principals import principal_of
from nonstick.core.refusals import (
    NOT_FOUND,
    NOT_RUNNING,
    SHUT_DOWN,
    Refusal,
)
from nonstick.core.settings import Options, Settings, check_arguments, settings_of
from nonstick.errors import ConfigurationError, NonstickError, NotRunning, SessionNotFound
from nonstick.http.endpoint import Endpoint
from nonstick.http.intake import TRANSPORT, Routed, arrived, check_headers, header
from nonstick.http.respond import refuse, with_header
from nonstick.http.sessionless import Contained, Sessionless, forget_session, listens
from nonstick.http.sessions import Sessions
from nonstick.http.unshared_memory import warned_of_unshared_memory
from nonstick.log.guard import GuardedStore
from nonstick.node.node import Node
from nonstick.session.kernel import KernelRunner, offer
from nonstick.session.live import LiveSession
from nonstick.session.runner import Runner
from nonstick.session.services import Served
from nonstick.store import Loaded, Store
from nonstick.stores import open_store
from nonstick.stores.encrypted import EncryptedStore

__all__ = ["SessionManager", "is_stateless"]

logger = logging.getLogger(__name__)

_NEVER: Final = 10 * 365 * 86_400.0
"""The lifetime, in seconds, of sessions that are not to expire: no key in a store is without one."""

_NO_NAME: Final = "mcp-server"
"""What the SDK calls an `MCPServer` that was given no name."""


class SessionManager:
    """Serves an MCP server on Streamable HTTP, any session on any node.

    Args:
        app: The low-level MCP server, or an `MCPServer`. Routes, and so the authentication in front of them, are the
            caller's here; `nonstick.app` keeps those of an `MCPServer`.
        store: Where the sessions live: a `Store`, or a URL (`memory:`, `sqlite:///path`, `redis://`, `rediss://`,
            `unix://`).
        event_store: Refused: what was sent can be resumed from the session store.
        json_response: As `answer="json"`.
        stateless: No sessions at all, as the SDK's manager does it.
        security_settings: Host and Origin checks, as for the SDK's manager.
        retry_interval: Milliseconds after which a client is to come back to a closed stream. Default 1000.
        session_idle_timeout: Seconds after which an idle session expires; None for ten years.
        max_request_body_size: Bytes; a larger body gets 413.
        max_sessions: Live sessions in the whole store; over it `initialize` gets 503. None for no limit.
        cluster: The `Cluster` that the server was built with. Need not be said if it is the only one in the process.
        modern: The SDK's manager that serves clients of 2026-07-28 and later; one is made if none is given.
        endpoint: The path of this endpoint, or whatever else tells it from others of the same server. With the server's
            name, or `namespace`, it says whose sessions these are, where several servers share one store: the others
            have never heard of them. The same on every replica.
        options: nonstick's own settings. With `encryption_keys` the store is wrapped in an `EncryptedStore`.

    Raises:
        ConfigurationError: An argument that cannot work.
    """

    def __init__(
        self,
        app: Server[Any] | MCPServer[Any],
        event_store: EventStore | None = None,
        json_response: bool = False,
        stateless: bool = False,
        security_settings: TransportSecuritySettings | None = None,
        retry_interval: int | None = None,
        session_idle_timeout: float | None = DEFAULT_SESSION_IDLE_TIMEOUT,
        max_request_body_size: int = DEFAULT_MAX_REQUEST_BODY_SIZE,
        max_sessions: int | None = DEFAULT_MAX_SESSIONS,
        *,
        store: str | Store,
        cluster: Cluster | None = None,
        modern: StreamableHTTPSessionManager | None = None,
        endpoint: str = "",
        **options: Unpack[Options],
    ) -> None:
        if event_store is not None:
            raise ConfigurationError(
                "event_store= is not needed and would be ignored: streams are resumed from the session store. "
                "Remove it."
            )
        check_arguments(options, SessionManager, "SessionManager()")
        if max_request_body_size <= 0:
            raise ConfigurationError("max_request_body_size must be a positive number of bytes")
        if json_response and options.get("answer", "json") != "json":
            raise ConfigurationError('json_response=True means answer="json": give one of the two')
        if not isinstance(store, str) and not callable(getattr(store, "load", None)):
            raise ConfigurationError(f"store must be a URL or a Store, not {type(store).__name__}")
        if isinstance(app, MCPServer):
            # The public way to the low-level server in it.
            app.streamable_http_app()
            app = app.session_manager.app
        if not isinstance(app, Server):
            raise ConfigurationError(
                f"a SessionManager needs an MCPServer or a low-level Server of the SDK, not {type(app).__module__}."
                f"{type(app).__qualname__}. A FastMCP server is for nonstick.app(), and what its http_app() returned "
                "for nonstick.adopt()."
            )
        keys = options.pop("encryption_keys", None)
        if json_response:
            options["answer"] = "json"
        given = {**options, "max_sessions": max_sessions}
        given["lifetime"] = _NEVER if session_idle_timeout is None else session_idle_timeout
        if retry_interval is not None:
            given["retry_interval"] = retry_interval
        self.settings = settings_of(given)
        stateless = is_stateless(stateless, self.settings.placement)
        if stateless and modern is not None and not modern.stateless:
            raise ConfigurationError(
                "give stateless_http=True where the app is made: to streamable_http_app() or http_app()"
            )
        self.app = app
        self.store = open_store(store) if keys is None else EncryptedStore(open_store(store), keys)
        _check_relayed(self.settings, self.store)
        self.stateless = stateless
        self.security_settings = security_settings
        self.retry_interval = retry_interval
        self.session_idle_timeout = session_idle_timeout
        self.max_request_body_size = max_request_body_size
        self._modern = modern or StreamableHTTPSessionManager(
            app,
            json_response=self.json_response,
            stateless=stateless,
            security_settings=security_settings,
            max_request_body_size=max_request_body_size,
        )
        self.cluster = cluster or Cluster.only() or Cluster.private()
        """Tells every client: `await manager.cluster.notify_tools_changed()`."""
        self.has_tasks = False
        """Whether requests begin tasks that other nodes run: FastMCP's."""
        self.endpoint = Endpoint(self.settings.namespace or self.app.name, endpoint)
        """Whose sessions these are."""
        self.cluster.serve(self.endpoint.namespace, sealed_apart=self.settings.namespace is not None)
        self._node: Node | None = None
        self._sessions: Sessions
        self._sessionless = Sessionless(SHUT_DOWN, lifetime=self.settings.connection_lifetime)
        self._started = False

    @property
    def json_response(self) -> bool:
        """Whether answers are never streams."""
        return self.settings.answer == "json"

    @property
    def max_sessions(self) -> int | None:
        """Live sessions in the whole store; None for no limit."""
        return self.settings.max_sessions

    # ---- running

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Runs the server's lifespan, the store and this node. Once per manager, as the SDK's."""
        if self._started:
            raise RuntimeError(
                "SessionManager.run() can only be called once per instance. Create a new instance to run again."
            )
        self._started = True
        # Before the server's lifespan, which may want to tell something, and until that has ended.
        async with self._taking_part() as store, self._serve_modern() as state, self._serving(store, state):
            yield

    @asynccontextmanager
    async def serving(self, state: Any) -> AsyncIterator[None]:
        """Runs the store and this node, for a server whose lifespan and whose SDK manager run already.

        Args:
            state: What the server's lifespan yielded.
        """
        async with self._taking_part() as store, self._serving(store, state):
            yield

    @asynccontextmanager
    async def _taking_part(self) -> AsyncIterator[GuardedStore]:
        """Opens the store, and takes part in the cluster."""
        if not self.cluster.may_use(self.store):
            # The only one in the process, but of an app on another store.
            self.cluster = Cluster.private()
            self.cluster.serve(self.endpoint.namespace, sealed_apart=self.settings.namespace is not None)
        if not self.stateless:
            offer(self.app)
        settings = self.settings
        room = Allowance(settings.max_state_records, settings.max_state_records_per_principal)
        with warned_of_unshared_memory(self.store.url):
            async with GuardedStore(self.store) as store, self.cluster.taking_part(store, room):
                yield store

    def runners(self, state: Any) -> Callable[[LiveSession], Runner]:
        """What makes the runner of a session, for each of its live views. Another kind of manager overrides this.

        Args:
            state: What the server's lifespan yielded.
        """
        return partial(KernelRunner, self.app, state)

    @asynccontextmanager
    async def _serving(self, store: GuardedStore, state: Any) -> AsyncIterator[None]:
        served = Served(self.runners(state), identity(self.endpoint.namespace))
        node = Node(served, store, self.settings, cluster_log=self.cluster.log, guests=[self._sessionless])
        with node.signals():
            async with node:
                self._node = node
                self._sessions = Sessions(node, self.endpoint, TransportSecurityMiddleware(self.security_settings))
                where = (self.endpoint.namespace, self.endpoint.path, self.store.url)
                logger.info("node %s serves sessions of %r at %r from %s", self.node, *where)
                if self.endpoint.namespace == _NO_NAME and not self.store.url.startswith("memory:"):
                    logger.warning(UNNAMED, "MCPServer")
                contained: Any = Contained(node.services.tasks)
                self.app.middleware.insert(0, contained)
                try:
                    yield
                finally:
                    # Until the drain is over requests that are under way still need it.
                    await node.drain()
                    self._node = None
                    self.app.middleware.remove(contained)

    @asynccontextmanager
    async def _serve_modern(self) -> AsyncIterator[Any]:
        """Runs the SDK's manager, which enters the user's lifespan, and yields what that yielded: it runs once."""
        lifespan = self.app.lifespan
        states: list[Any] = []

        @asynccontextmanager
        async def keep(server: Server[Any]) -> AsyncIterator[Any]:
            async with lifespan(server) as state:
                states.append(state)
                yield state

        self.app.lifespan = keep
        try:
            # Of its class: on an adopted manager itself, `run` is ours.
            running = type(self._modern).run(self._modern)
            await running.__aenter__()
        finally:
            self.app.lifespan = lifespan
        try:
            yield states[0]
        except BaseException as error:
            if not await running.__aexit__(type(error), error, error.__traceback__):
                raise
        else:
            await running.__aexit__(None, None, None)

    @property
    def node(self) -> str:
        """This node's id: its name and a random incarnation.

        Raises:
            NotRunning: Outside of `run()`.
        """
        return self._running().services.node_id

    async def check_ready(self) -> None:
        """Returns if this node can take work.

        Raises:
            NotRunning: Outside of `run()`.
            NonstickError: It drains.
            StoreUnavailable: The store cannot be reached or written to.
            StoreUnusable, Undecryptable: The store can be reached, and cannot be used until somebody changes something.
        """
        services = self._running().services
        if services.drain.begun:
            raise NonstickError("this node is draining")
        await services.store.ping()
        if (misfit := self.cluster.misfit) is not None:
            raise misfit

    async def load(self, key: str) -> Loaded:
        """As `Store.load`, of the store that this node uses.

        Raises:
            NotRunning: Outside of `run()`.
            SessionNotFound, StoreUnavailable: As `Store.load`.
        """
        return await self._running().services.store.load(key)

    def begin_drain(self) -> None:
        """Stops taking work, and returns at once, as on SIGTERM: for a host that stops without a signal (P8).

        Raises:
            NotRunning: Outside of `run()`.
        """
        self._running().begin_drain()

    async def drain(self) -> None:
        """Stops taking work and returns when what runs here has finished, or was ended after the grace period (P8)."""
        await self._running().drain()

    def _running(self) -> Node:
        if self._node is None:
            raise NotRunning(NOT_RUNNING.message)
        return self._node

    # ---- requests

    async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one HTTP request to the MCP endpoint."""
        await self.asgi_app(scope, receive, send)

    async def asgi_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """This manager as an ASGI application."""
        if self._node is None:
            await refuse(send, Refusal(NOT_RUNNING), [])
            return
        if self.settings.node_header:
            send = with_header(send, (b"nonstick-node", self._node.name.encode()))
        version = header(scope, MCP_PROTOCOL_VERSION_HEADER)
        try:
            check_headers(scope, self.settings.max_header_bytes)
            limit, seconds = self.max_request_body_size, self.settings.receive_timeout
            body, receive = await arrived(
                scope, receive, limit=limit, seconds=seconds, until_closing=self._node.services.drain.until_closing
            )
            if self.stateless or (version is not None and version not in HANDSHAKE_PROTOCOL_VERSIONS):
                await self._serve_sessionless(self._node, scope, body, receive, send)
            else:
                await self._sessions.serve(scope, body, receive, send)
        except ClientDisconnect:
            logger.debug("a client went before its request was whole")
        except SessionNotFound:
            await refuse(send, Refusal(NOT_FOUND), [])
        except Refusal as refusal:
            # The rest of the request is not waited for. But a client in the middle of a large body would not read the
            # answer of a connection that closes.
            await refuse(send, refusal, [] if refusal.reason.status == 413 else [(b"connection", b"close")])

    async def _serve_sessionless(self, node: Node, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Newer clients have no session: the SDK's own manager serves them."""
        routed: Routed | None = scope.get(TRANSPORT)
        if routed is not None:
            routed.check(header(scope, MCP_SESSION_ID_HEADER))
        forget_session(scope)
        quota = node.listeners if listens(scope) else node.services.requests
        principal = principal_of(scope)
        quota.check(principal)
        try:
            server = node.services.served.identity
            with quota.hold(object(), principal), within_request(server=server, travels=self.has_tasks):
                await self._sessionless.serve(self._modern.handle_request, scope, body, receive, send)
        finally:
            node.services.drain.left()


def _check_relayed(settings: Settings, store: Store) -> None:
    """Returns if the store encrypts, or if relayed requests are to keep nothing that may be a credential (P13).

    Raises:
        ConfigurationError: They are to, and the store does not.
    """
    for name in ("relay_headers", "relay_query"):
        if getattr(settings, name) and not getattr(store, "encrypts", False):
            raise ConfigurationError(
                f"{name} has parts of requests written into the store, which may be credentials: give encryption_keys= "
                "too (for nonstick serve: NONSTICK_ENCRYPTION_KEYS); the first of them must not be plaintext"
            )


def is_stateless(stateless: bool, placement: object) -> bool:
    """Whether there are to be no sessions: `stateless` and `placement` both can say so.

    Raises:
        ConfigurationError: They contradict each other.
    """
    if stateless and placement == "owner":
        raise ConfigurationError('placement="owner" holds sessions, of which there are none if stateless: give one')
    return stateless or placement == "stateless"
