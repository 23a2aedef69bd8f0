"""`SessionManager`: takes the place of the SDK's `StreamableHTTPSessionManager`, with the sessions in a store.

One request after the other comes in here, is checked in the SDK's order, and is routed by era, method and kind of
message. All HTTP statuses that nonstick gives are decided here and in `Refusal`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from functools import lru_cache
from typing import Any, Final, Unpack

import pydantic_core
from mcp.server import MCPServer, Server
from mcp.server.streamable_http import (
    LAST_EVENT_ID_HEADER,
    MCP_SESSION_ID_HEADER,
    EventStore,
    check_accept_headers,
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
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params, progress_token_from_params
from mcp_types import (
    DEFAULT_NEGOTIATED_VERSION,
    INVALID_PARAMS,
    INVALID_REQUEST,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    jsonrpc_message_adapter,
)
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from nonstick.cluster.cluster import Cluster
from nonstick.cluster.state_store import Allowance, within_request
from nonstick.core.events import EventId, parse_event_id
from nonstick.core.jsonrpc import as_number, check_names, error_body, json_depth_exceeds, request_key
from nonstick.core.names import UNNAMED, identity, is_session_id, is_session_of, new_session_id, session_key
from nonstick.core.principals import principal_of
from nonstick.core.record import CONFIRMED, Record
from nonstick.core.refusals import (
    CANCELLED_BY_CLIENT,
    ID_IN_USE,
    INITIALIZE_TOO_LONG,
    NO_BATCHES,
    NO_ID,
    NO_MESSAGE,
    NO_STREAM_ACCEPTED,
    NO_SUCH_METHOD,
    NOT_BOTH_ACCEPTED,
    NOT_FOUND,
    NOT_JSON,
    NOT_JSON_ACCEPTED,
    NOT_PARSED,
    NOT_RUNNING,
    SHUT_DOWN,
    SHUTTING_DOWN,
    STORE_UNAVAILABLE,
    TOO_DEEP,
    TOO_MANY_NOTICES,
    TOO_MANY_REQUESTS,
    UNKNOWN_EVENT_ID,
    Refusal,
)
from nonstick.core.settings import Options, Settings, check_arguments, settings_of
from nonstick.errors import ConfigurationError, NonstickError, NotRunning, SessionNotFound, StoreUnavailable
from nonstick.http.intake import arrived, check_headers, header
from nonstick.http.respond import JSON_TYPE, refuse, send_body
from nonstick.http.sessionless import Contained, Sessionless, forget_session, listens
from nonstick.http.transport import TRANSPORT
from nonstick.http.unshared_memory import warned_of_unshared_memory
from nonstick.log.guard import GuardedStore
from nonstick.log.trim import Hold
from nonstick.node.node import Node
from nonstick.node.relay import Relay, packed, relay_notice
from nonstick.session import notice, portable, tracing
from nonstick.session.exchange import Exchange
from nonstick.session.kernel import offer
from nonstick.session.live import Session
from nonstick.session.reader import Reader
from nonstick.session.resumption import Resumption
from nonstick.session.services import Served
from nonstick.session.standalone import StandaloneConnection
from nonstick.store import STANDALONE, Batch, Loaded, Store
from nonstick.stores import open_store
from nonstick.stores.encrypted import EncryptedStore
from nonstick.waiting.deadline import Deadline

__all__ = ["SessionManager", "is_stateless"]

logger = logging.getLogger(__name__)

_NOTICE_PATIENCE: Final = 5.0
"""Seconds for what a client sends but once: it does not repeat a notification or a reply that got 503 (P9)."""

_NEVER: Final = 10 * 365 * 86_400.0
"""The lifetime, in seconds, of sessions that are not to expire: no key in a store is without one."""

_NO_NAME: Final = "mcp-server"
"""What the SDK calls an `MCPServer` that was given no name."""

_OFTEN: Final = ("notifications/progress", "notifications/cancelled")
"""Notifications that concern nobody but those who wait for them, unless the server says otherwise."""

_LONGEST_URI: Final = 2048
"""Characters of a resource's URI that a record keeps."""


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
        self.json_response = self.settings.answer == "json"
        self.stateless = stateless
        self.security_settings = security_settings
        self.retry_interval = retry_interval
        self.session_idle_timeout = session_idle_timeout
        self.max_request_body_size = max_request_body_size
        self.max_sessions = max_sessions
        self._modern = modern or StreamableHTTPSessionManager(
            app,
            json_response=self.json_response,
            stateless=stateless,
            security_settings=security_settings,
            max_request_body_size=max_request_body_size,
        )
        self._security = TransportSecurityMiddleware(security_settings)
        self.cluster = cluster or Cluster.only() or Cluster.apart()
        """What is told to every client goes through this: `await manager.cluster.notify_tools_changed()`."""
        self.has_tasks = False
        """Whether requests begin tasks that other nodes run: FastMCP's."""
        self.namespace = self.settings.namespace or self.app.name
        """With the endpoint: whose sessions these are."""
        self._endpoint = endpoint
        self._server = identity(self.namespace, endpoint)
        self.cluster.serve(self.namespace, sealed_apart=self.settings.namespace is not None)
        self._strangers = False
        self._node: Node | None = None
        self._sessionless = Sessionless(SHUT_DOWN, lifetime=self.settings.connection_lifetime)
        self._started = False

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
            self.cluster = Cluster.apart()
            self.cluster.serve(self.namespace, sealed_apart=self.settings.namespace is not None)
        if not self.stateless:
            offer(self.app)
        settings = self.settings
        room = Allowance(settings.max_state_records, settings.max_state_records_per_principal)
        with warned_of_unshared_memory(self.store.url):
            async with GuardedStore(self.store) as store, self.cluster.taking_part(store, room):
                yield store

    @asynccontextmanager
    async def _serving(self, store: GuardedStore, state: Any) -> AsyncIterator[None]:
        served = Served(self.app, state, identity(self.namespace))
        node = Node(served, store, self.settings, cluster_log=self.cluster.log, guests=[self._sessionless])
        with node.signals():
            async with node:
                self._node = node
                where = (self.namespace, self._endpoint, self.store.url)
                logger.info("node %s serves sessions of %r at %r from %s", self.node, *where)
                if self.namespace == _NO_NAME and not self.store.url.startswith("memory:"):
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
            StoreUnusable, Undecryptable: It can, and will not do like this.
        """
        services = self._running().services
        if services.drain.begun:
            raise NonstickError("this node is draining")
        await services.store.ping()
        if (misfit := self.cluster.misfit) is not None:
            raise misfit

    def key(self, session_id: str) -> str:
        """The name of this session in the store.

        Raises:
            SessionNotFound: This can be no id of a session of this server. Nobody need ask the store.
        """
        if not is_session_of(self._server, session_id):
            self._tell_of_stranger(session_id)
            raise SessionNotFound
        return session_key(session_id)

    def new_session_id(self) -> str:
        """The id of a session that is to be opened at this server."""
        return new_session_id(self._server)

    def _tell_of_stranger(self, session_id: str) -> None:
        """Once: replicas that do not agree on what server they are would send every client away."""
        if not self._strangers and is_session_id(session_id):
            self._strangers = True
            logger.warning(
                "a request named a session that was not opened at this server, which is %r at %r. If a replica opened "
                "it, give all of them the same name, or the same namespace=",
                self.namespace,
                self._endpoint,
            )

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
            send = _with_header(send, (b"nonstick-node", self._node.name.encode()))
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
                await self._handle(scope, body, receive, send)
        except ClientDisconnect:
            logger.debug("a client went before its request was whole")
        except SessionNotFound:
            await refuse(send, Refusal(NOT_FOUND), [])
        except Refusal as refusal:
            # What is still to come of the request is not waited for; but who is in the middle of a large body would not
            # read the answer of a connection that closes.
            await refuse(send, refusal, [] if refusal.reason.status == 413 else [(b"connection", b"close")])

    async def _serve_sessionless(self, node: Node, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Newer clients have no session: the SDK's own manager serves them."""
        if (routed := scope.get(TRANSPORT)) is not None:
            routed.check(header(scope, MCP_SESSION_ID_HEADER))
        forget_session(scope)
        room = node.listeners if listens(scope) else node.services.requests
        principal = principal_of(scope)
        room.check(principal)
        try:
            server = node.services.served.identity
            with room.hold(object(), principal), within_request(server=server, travels=self.has_tasks):
                await self._sessionless.serve(self._modern.handle_request, scope, body, receive, send)
        finally:
            node.services.drain.left()

    async def _handle(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        headers: list[tuple[bytes, bytes]] = []
        try:
            refused = await self._security.validate_request(request, is_post=request.method == "POST")
            if refused is not None:
                await refused(scope, receive, send)
                return
            session_id = header(scope, MCP_SESSION_ID_HEADER)
            if (routed := scope.get(TRANSPORT)) is not None:
                routed.check(session_id)
            if session_id is None:
                await self._serve_without_session(request, body, send)
            else:
                await self._serve_session(request, session_id, body, receive, send, headers)
        except Refusal as refusal:
            await refuse(send, refusal, headers)
        except SessionNotFound:
            await refuse(send, Refusal(NOT_FOUND), [])
        except StoreUnavailable as error:
            logger.warning("answered 503: %s", error)
            later = Refusal(STORE_UNAVAILABLE)
            await refuse(send, later, headers)

    async def _serve_without_session(self, request: Request, body: bytes, send: Send) -> None:
        """Only `initialize` needs no session id. Everything is checked in the SDK's order."""
        node = self._running()
        if request.method == "POST":
            message = self._parse(request.scope, body)
            if not (isinstance(message, JSONRPCRequest) and message.method == "initialize"):
                raise Refusal(NO_ID)
            principal = principal_of(request.scope)
            node.services.requests.check(principal)
            self._check_initialize(message)
            routed = request.scope.get(TRANSPORT)
            session_id = self.new_session_id() if routed is None else routed.open()
            session = Session(node.services, session_id, self.key(session_id))
            session.hold_back()
            if self.settings.placement == "owner":
                session.keep_anything()
            exchange = Exchange(
                session,
                message,
                request,
                head=session.head,
                protocol_version=str((message.params or {}).get("protocolVersion", DEFAULT_NEGOTIATED_VERSION)),
                principal=principal,
                opens=True,
                connection=request,
            )
            with node.services.requests.hold(request, principal):
                await exchange.serve(send, [_session_header(session_id)], copy_context())
        elif request.method == "GET":
            _check_accepts_stream(request)
            raise Refusal(NO_ID)
        elif request.method == "DELETE":
            raise Refusal(NO_ID)
        else:
            raise Refusal(NO_SUCH_METHOD)

    async def _serve_session(
        self,
        request: Request,
        session_id: str,
        body: bytes,
        receive: Receive,
        send: Send,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        node = self._running()
        key = self.key(session_id)
        message: JSONRPCMessage | None = None
        problem: Refusal | None = None
        if request.method == "POST":
            try:
                message = self._parse(request.scope, body)
            except Refusal as refusal:
                # Whether there is such a session is said first, as the SDK does.
                problem = refusal
        principal = principal_of(request.scope)
        if isinstance(message, JSONRPCRequest):
            node.services.requests.check(principal)
        elif request.method == "GET":
            node.listeners.check(principal)
        sent_once = isinstance(message, JSONRPCNotification | JSONRPCResponse | JSONRPCError)
        loaded = await node.services.store.load(key, patience=_NOTICE_PATIENCE if sent_once else None)
        record = Record.from_fields(loaded.fields)
        if record.principal != principal:
            logger.warning("session %s: refused a request of another principal", key[:12])
            raise SessionNotFound
        headers.append(_session_header(session_id))
        if problem is not None:
            raise problem
        if message is not None:
            session = node.hydrate(session_id, key, loaded, record)
            await self._serve_message(node, session, message, request, loaded, send, headers)
        elif request.method == "GET":
            _check_accepts_stream(request)
            session = node.hydrate(session_id, key, loaded, record)
            # A stream may be open for hours, and there are thousands.
            del loaded, record
            await self._serve_stream(session, request, receive, send, headers)
        elif request.method == "DELETE":
            await self._delete(key, send, headers)
        else:
            raise Refusal(NO_SUCH_METHOD)

    def _parse(self, scope: Scope, body: bytes) -> JSONRPCMessage:
        """The one JSON-RPC message in this body.

        Raises:
            Refusal: It is no such thing, or the headers are wrong.
        """
        has_json, has_sse = _accepts(scope)
        if self.json_response:
            if not has_json:
                raise Refusal(NOT_JSON_ACCEPTED)
        elif not (has_json and has_sse):
            raise Refusal(NOT_BOTH_ACCEPTED)
        content_type = header(scope, "content-type") or ""
        if not (_is_json(content_type) if len(content_type) <= _KEPT_HEADER else _read_is_json(content_type)):
            raise Refusal(NOT_JSON)
        if body.lstrip()[:1] == b"[":
            # Before it is parsed: a body full of empty lists takes twenty times its size.
            raise Refusal(NO_BATCHES)
        try:
            raw = pydantic_core.from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise Refusal(NOT_PARSED, error=error) from None
        limit = self.settings.max_json_depth
        if body.count(b"[") + body.count(b"{") > limit and json_depth_exceeds(raw, limit):
            raise Refusal(TOO_DEEP, limit=limit)
        try:
            parsed = jsonrpc_message_adapter.validate_python(raw, by_name=False)
        except ValidationError:
            raise Refusal(NO_MESSAGE) from None
        check_names(parsed)
        return parsed

    # ---- POST

    async def _serve_message(
        self,
        node: Node,
        session: Session,
        message: JSONRPCMessage,
        request: Request,
        loaded: Loaded,
        send: Send,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        with session:
            if isinstance(message, JSONRPCRequest):
                await self._serve_request(node, session, message, request, loaded, send, headers)
                return
            if isinstance(message, JSONRPCNotification):
                await self._take_notification(session, message)
                await self._handle_notification(node, session, message, request, loaded)
            else:
                await self._take_response(session, message)
            await send_body(send, 202, b"", [*headers, JSON_TYPE])

    async def _handle_notification(
        self, node: Node, session: Session, message: JSONRPCNotification, request: Request, loaded: Loaded
    ) -> None:
        """Has the server's handler run, here or where the session is held."""
        if node.placement.elsewhere(session, loaded) is not None:
            handler = self.app.get_notification_handler(message.method)
            if handler is not None or message.method not in _OFTEN:
                await relay_notice(session, message, request, patience=_NOTICE_PATIENCE)
            return
        if len(session.notices) >= self.settings.max_streams:
            raise Refusal(TOO_MANY_NOTICES)
        if session.principal:
            session.services.requests.check_share(session.principal)
        request, context = _as_relayed(session, request)
        # In the background: the client waits for no handler of a notification (as the SDK).
        session.spawn_notice(notice.handle(session, message, request), request, context)

    async def _serve_request(
        self,
        node: Node,
        session: Session,
        message: JSONRPCRequest,
        request: Request,
        loaded: Loaded,
        send: Send,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        if session.services.drain.is_closing:
            raise Refusal(SHUTTING_DOWN)
        elsewhere = node.placement.elsewhere(session, loaded)
        key = request_key(message.id)
        if key in session.exchanges or key in session.relays:
            raise Refusal(ID_IN_USE)
        if len(session.exchanges) + len(session.relays) >= self.settings.max_streams:
            raise Refusal(TOO_MANY_REQUESTS)
        if key in loaded.cancels:
            # It was overtaken by its own cancel (P5), which has done its work with that.
            session.services.tasks.spawn(session.services.store.append(session.key, Batch([], uncancel=key)))
            error = CANCELLED_BY_CLIENT
            await send_body(send, 200, error_body(message.id, error), [*headers, JSON_TYPE])
            return
        if message.method == "resources/subscribe" and (no_room := self._refuse_subscription(session, message.params)):
            await send_body(send, 200, error_body(message.id, no_room), [*headers, JSON_TYPE])
            return
        if message.method == "initialize":
            self._check_initialize(message)
            version = str((message.params or {}).get("protocolVersion", DEFAULT_NEGOTIATED_VERSION))
        else:
            version = session.protocol_version
        if elsewhere is not None:
            relay = Relay(session, message, request, owner=elsewhere, since=loaded.head, version=version)
            with session.services.requests.hold(request, session.principal):
                await relay.serve(request.receive, send, headers)
            return
        hold = await self._room_in_log(session, message)
        if hold is not None and key in session.exchanges:
            hold.release()
            raise Refusal(ID_IN_USE)
        connection = request
        request, context = _as_relayed(session, request)
        with session.services.requests.hold(request, session.principal):
            exchange = Exchange(
                session,
                message,
                request,
                head=loaded.head,
                protocol_version=version,
                connection=connection,
                hold=hold,
            )
            await exchange.serve(send, headers, context)

    async def _room_in_log(self, session: Session, message: JSONRPCRequest) -> Hold | None:
        """Room for a request that the log is to keep whole once it streams, so that another node may run it again.

        Raises:
            Refusal: There is none.
        """
        if self.settings.reexecute == "never" or message.method == "initialize":
            return None
        return await session.trimmer.hold(len(pydantic_core.to_json(message.params)))

    def _check_initialize(self, message: JSONRPCRequest) -> None:
        limit = self.settings.max_initialize_bytes
        if len(pydantic_core.to_json(message.params)) > limit:
            raise Refusal(INITIALIZE_TOO_LONG, limit=limit)

    def _refuse_subscription(self, session: Session, params: dict[str, Any] | None) -> ErrorData | None:
        """The error for a subscription that the session's record has no room for (P10)."""
        uri = str((params or {}).get("uri", ""))
        if len(uri) > _LONGEST_URI:
            return ErrorData(code=INVALID_PARAMS, message=f"The URI is longer than {_LONGEST_URI} characters")
        limit = self.settings.max_subscriptions
        if uri in session.subscriptions or len(session.subscriptions) < limit:
            return None
        return ErrorData(
            code=INVALID_REQUEST,
            message=f"This session is subscribed to {limit} resources already; unsubscribe from some first",
        )

    async def _take_notification(self, session: Session, message: JSONRPCNotification) -> None:
        """What a notification means to the session, before it is acknowledged."""
        params = message.params or {}
        match message.method:
            case "notifications/initialized" if not session.connection.initialized.is_set():
                changes: dict[str, bytes | None] = {"initialized": b"1"}
                lifetime = None
                if session.unconfirmed:
                    changes |= CONFIRMED
                    lifetime = self.settings.lifetime
                await session.services.store.update(session.key, changes, lifetime=lifetime, patience=_NOTICE_PATIENCE)
                session.unconfirmed = False
            case "notifications/cancelled":
                request_id = cancelled_request_id_from_params(params)
                if request_id is not None:
                    await session.take_cancel(request_id, params, patience=_NOTICE_PATIENCE)
            case "notifications/progress":
                token = progress_token_from_params({"_meta": params})
                if token is not None and as_number(params.get("progress")) is not None:
                    await session.take_progress(token, params, patience=_NOTICE_PATIENCE)
            case _:
                pass

    async def _take_response(self, session: Session, message: JSONRPCResponse | JSONRPCError) -> None:
        if message.id is None:
            return
        body = message.model_dump_json(by_alias=True, exclude_unset=True).encode()
        await session.take_reply(message.id, body, patience=_NOTICE_PATIENCE)

    # ---- GET and DELETE

    async def _serve_stream(
        self,
        session: Session,
        request: Request,
        receive: Receive,
        send: Send,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        with session:
            text = request.headers.get(LAST_EVENT_ID_HEADER)
            place = parse_event_id(text, session.id) if text else None
            if text and place is None:
                raise Refusal(UNKNOWN_EVENT_ID)
            resumes = place is not None and place.stream != STANDALONE
            room = session.resumptions if resumes else session.listeners
            room.check()
            with room.hold(request), self._running().listeners.hold(request, session.principal):
                reader = await self._prepared(session, place)
                await reader.serve(receive, send, headers)

    async def _prepared(self, session: Session, place: EventId | None) -> Reader:
        """The reader, unless the node closes before it has read what it needs.

        Raises:
            Refusal, SessionNotFound, StoreUnavailable: As `_reader`; the client may come back, or go elsewhere.
        """
        deadline, until_closing = Deadline(None), session.services.drain.until_closing
        try:
            with deadline:
                until_closing[deadline] = None
                try:
                    return await self._reader(session, place)
                finally:
                    del until_closing[deadline]
        except TimeoutError:
            raise Refusal(SHUTTING_DOWN) from None

    async def _reader(self, session: Session, place: EventId | None) -> Reader:
        if place is not None and place.stream != STANDALONE:
            reader: Reader = Resumption(session, place)
        else:
            reader = StandaloneConnection(session, place)
        await reader.prepare()
        return reader

    async def _delete(self, key: str, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        node = self._running()
        await node.services.store.delete(key)
        if (session := node.sessions.get(key)) is not None:
            node.services.tasks.spawn(session.end())
        await send_body(send, 200, b"", [*headers, JSON_TYPE])


def _as_relayed(session: Session, request: Request) -> tuple[Request, Context]:
    """The request and the context of its handler; where the session is held, as had it come to another node."""
    if session.held is None:
        return request, copy_context()
    request = portable.unpack(packed(session, request), session.id)
    return request, portable.context_of(request, tracing.here())


def _accepts(scope: Scope) -> tuple[bool, bool]:
    """Whether JSON, and whether an event stream, may be the answer."""
    accept = header(scope, "accept") or ""
    return _accepted(accept) if len(accept) <= _KEPT_HEADER else _read_accept(accept)


def _read_accept(accept: str) -> tuple[bool, bool]:
    """As the SDK reads it."""
    return check_accept_headers(Request({"type": "http", "headers": [(b"accept", accept.encode("latin-1"))]}))


def _read_is_json(content_type: str) -> bool:
    return "application/json" in (part.strip() for part in content_type.split(";")[0].split(","))


# Clients say few things. One may fill a head with them, which is not kept (P10).
_KEPT_HEADER: Final = 256
_accepted: Final = lru_cache(maxsize=64)(_read_accept)
_is_json: Final = lru_cache(maxsize=64)(_read_is_json)


def _check_accepts_stream(request: Request) -> None:
    if not _accepts(request.scope)[1]:
        raise Refusal(NO_STREAM_ACCEPTED)


def _session_header(session_id: str) -> tuple[bytes, bytes]:
    return MCP_SESSION_ID_HEADER.encode(), session_id.encode()


def _with_header(send: Send, header: tuple[bytes, bytes]) -> Send:
    async def with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return with_header


def _check_relayed(settings: Settings, store: Store) -> None:
    """Whether what is asked to be written of requests is written encrypted (P13)."""
    for name in ("relay_headers", "relay_query"):
        if getattr(settings, name) and not getattr(store, "encrypts", False):
            raise ConfigurationError(
                f"{name} has parts of requests written into the store, which may be credentials: give encryption_keys= "
                "too (for nonstick serve: NONSTICK_ENCRYPTION_KEYS); the first of them must not be plaintext"
            )


def is_stateless(stateless: bool, placement: object) -> bool:
    """Whether there are to be no sessions, of two ways to say so.

    Raises:
        ConfigurationError: They say different things.
    """
    if stateless and placement == "owner":
        raise ConfigurationError('placement="owner" holds sessions, of which there are none if stateless: give one')
    return stateless or placement == "stateless"
