"""What all nodes share beside sessions: what is told to every client, and the `requestState` keys.

Both live in one record and one log for the whole cluster, the *cluster log*: the same primitives, in the same store,
under a key that no session can have. Each node reads that log once, for all who listen there.

Different servers on one store share that log, as long as nodes of version 0.1 do (P12): so an entry says whose it is,
and others' are passed over.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Final, Protocol
from weakref import WeakSet

import anyio.lowlevel
import pydantic_core
from mcp.server.request_state import AESGCMRequestStateCodec, InvalidRequestState, RequestStateSecurity
from mcp.server.subscriptions import InMemorySubscriptionBus, SubscriptionBus
from mcp.shared.exceptions import MCPError
from mcp.shared.subscriptions import (
    PromptsListChanged,
    ResourcesListChanged,
    ResourceUpdated,
    ServerEvent,
    ToolsListChanged,
    event_from_wire,
)
from mcp_types import INTERNAL_ERROR

from nonstick.cluster.probing import is_probe
from nonstick.cluster.state_store import Allowance, StateStore
from nonstick.core.broadcasts import LISTS, METHODS, NOWHERE, Broadcasts
from nonstick.core.events import Kind, decode, draft, kind_of
from nonstick.core.names import identity
from nonstick.core.refusals import STORE_AWAY
from nonstick.errors import (
    AlreadyExists,
    ConfigurationError,
    Diverged,
    NotRunning,
    SessionNotFound,
    StoreError,
    StoreUnavailable,
    StoreUnusable,
    Trimmed,
    Undecryptable,
)
from nonstick.log.follow import Follower
from nonstick.log.guard import PATIENCE, GuardedStore
from nonstick.log.writer import Sender
from nonstick.store import MAX_READ, Appended, Batch, Cursor, Event, Loaded, Store
from nonstick.stores import open_store
from nonstick.stores.encrypted import EncryptedStore
from nonstick.waiting import background

__all__ = ["CLUSTER_KEY", "Cluster", "Hearer"]

logger = logging.getLogger(__name__)

CLUSTER_KEY: Final = "cluster"
"""The cluster log's key. A session's is 40 hexadecimal digits."""

_LIFETIME: Final = 30 * 86_400.0
_KEYS: Final = "request-state-keys"
_KEPT_KEYS: Final = 3
_LOG_EVENTS: Final = 2000
_PAUSE: Final = 1.0
_TRIES: Final = 20
_SPREAD_SECONDS: Final = 10.0
"""Longer than it takes a node that missed a wake to read."""
_AT_ONCE: Final = 100
"""So many connections are told of a broadcast before others get their turn of the event loop."""


class Hearer(Protocol):
    """A connection of the handshake era, which hears what is broadcast. Called in the event loop; must not block."""

    def hear(self) -> None:
        """There is something new."""
        ...

    def hear_anew(self) -> None:
        """The store lost the cluster log, or the end of it. What is there now is known."""
        ...


class Cluster:
    """What the nodes of one deployment share beside sessions: one call tells every client, on every node (P11).

        await app.cluster.notify_tools_changed()

    Every app has one. Made before the server and given to it, it also serves clients of 2026-07-28:

        cluster = nonstick.Cluster()
        mcp = MCPServer(
            "name", subscriptions=cluster.subscription_bus, request_state_security=cluster.request_state_security
        )
        app = nonstick.app(mcp, store="redis://cache:6379")

    Nothing is connected until the app's lifespan runs; that lifespan may already use it. Where no app of nonstick runs
    (on stdio, say) all work within the process, as the SDK's own do. A process that serves nobody uses `connect`.

    Apps that share one of these share all of it: what is told tells the clients of all. Servers that are to have
    nothing to do with each other get one each, and their apps are told which, by `cluster=`.

    Args:
        request_state_ttl: Seconds for which a client may come back with a `requestState`.

    Attributes:
        subscription_bus: What is published on any node reaches `subscriptions/listen` streams on every node, and the
            sessions of older clients.
        broadcasts: What is in the cluster log.
        request_state_security: Any node accepts the `requestState` that another has sealed.
        session_state_store: For `FastMCP(session_state_store=...)`: what `ctx.set_state()` keeps is on every node.
    """

    _made: ClassVar[WeakSet[Cluster]] = WeakSet()

    def __init__(self, *, request_state_ttl: float = 600.0) -> None:
        self._made.add(self)
        self._servers: list[str] = []
        """Identities of the servers whose clients are told here; nobody's in a process that serves nobody."""
        self._bus = _Bus(self._servers)
        self._codec = _Codec()
        self._security = RequestStateSecurity(codec=self._codec, ttl=request_state_ttl)
        self._taken: set[str] = set()
        self._state = StateStore()
        self._room = Allowance()
        self.broadcasts = Broadcasts(_LOG_EVENTS)
        self.hearers: set[Hearer] = set()
        """Connections that are told when there is something new."""
        self.nodes = 0
        """How many in this process take part."""
        self._following = asyncio.Lock()
        self._on: Store | None = None
        self._store: GuardedStore | None = None
        self._rotating = asyncio.Lock()
        self.misfit: StoreUnavailable | None = None
        """Why the store will not do until somebody changes something; None while it does, or cannot be reached."""
        self._tried = asyncio.Event()

    @property
    def subscription_bus(self) -> SubscriptionBus:
        self._taken.add("subscription_bus")
        return self._bus

    @property
    def request_state_security(self) -> RequestStateSecurity:
        self._taken.add("request_state_security")
        return self._security

    @property
    def session_state_store(self) -> StateStore:
        self._taken.add("session_state_store")
        return self._state

    @property
    def taken(self) -> frozenset[str]:
        """Which of these attributes anybody has asked for. A server was certainly not built with the others."""
        return frozenset(self._taken)

    def has(self, thing: object) -> bool:
        """Whether this is what a server uses that was built with one of these attributes."""
        return thing is self._bus or thing is self._codec or thing is self._state

    @classmethod
    def apart(cls) -> Cluster:
        """One that no server was built with."""
        cluster = cls()
        cls._made.discard(cluster)
        return cluster

    @classmethod
    def only(cls) -> Cluster | None:
        """The one that was made in this process; None if there is none, or more than one."""
        made = list(cls._made)
        return made[0] if len(made) == 1 else None

    def serve(self, name: str, *, sealed_apart: bool = False) -> None:
        """Takes part for the server of this name, or in this namespace, beside those that it takes part for already.

        Args:
            sealed_apart: `requestState` is to be sealed for this namespace alone. Else the server's name, which the SDK
                puts into it, tells it from others'.
        """
        server = identity(name)
        if server not in self._servers:
            self._servers.append(server)
            self._codec.bind(name if sealed_apart else "")

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        store: str | Store,
        *,
        encryption_keys: Sequence[str | bytes] | None = None,
        namespace: str | None = None,
    ) -> AsyncIterator[Cluster]:
        """The cluster whose nodes use this store, for a process that is none of them, such as a script:

            async with nonstick.Cluster.connect("redis://cache:6379") as cluster:
                await cluster.notify_resource_updated("db://prices")

        Args:
            encryption_keys: Those of the nodes, if they have any.
            namespace: The servers' name, or the namespace that they were given. Without it the clients of all servers
                on this store are told.

        Raises:
            ConfigurationError: No other process could use this store, or a key is none.
            StoreUnavailable: It cannot be reached, or is encrypted under other keys than these (`Undecryptable`).
        """
        if isinstance(store, str) and store.lower().startswith("memory:"):
            raise ConfigurationError("no other process can use memory:; give the URL of the store that the nodes use")
        cluster, opened = cls.apart(), open_store(store)
        if namespace:
            cluster.serve(namespace)
        if encryption_keys is not None:
            opened = EncryptedStore(opened, encryption_keys)
        async with GuardedStore(opened) as guarded:
            await cluster.join(guarded)
            yield cluster

    # ---- telling everyone

    async def notify_tools_changed(self) -> None:
        """Every client, of either era and on any node, is told that the list of tools changed (P11).

        One that is not connected is told when it comes back, with or without an event id; only clients of 2026-07-28
        have to be connected, by their specification. The call returns once the store has it: one append, however many
        clients there are. It may be called anywhere in a process that has joined: by handlers, or background tasks.

        Raises:
            StoreUnavailable: The outcome is not known; may be called again.
        """
        await self._bus.publish(ToolsListChanged())

    async def notify_prompts_changed(self) -> None:
        """As `notify_tools_changed`, for the list of prompts."""
        await self._bus.publish(PromptsListChanged())

    async def notify_resources_changed(self) -> None:
        """As `notify_tools_changed`, for the lists of resources and of resource templates."""
        await self._bus.publish(ResourcesListChanged())

    async def notify_resource_updated(self, uri: str) -> None:
        """As `notify_tools_changed`, for one resource: tells those who have subscribed to exactly this URI."""
        await self._bus.publish(ResourceUpdated(str(uri)))

    # ---- hearing

    async def settle(self, place: Cursor) -> Cursor:
        """This place in the cluster log; `NOWHERE` if the store no longer has it.

        Raises:
            StoreUnavailable: As `Store.read`.
        """
        if self._store is None or place.position <= self.broadcasts.head.position:
            return place
        # Either this node has not read as far yet, or what there was is lost.
        try:
            await self._store.read(CLUSTER_KEY, place, limit=1)
        except (SessionNotFound, Diverged, Trimmed):
            return NOWHERE
        return place

    # ---- taking part

    def may_use(self, store: Store) -> bool:
        """Whether a node on this store can take part as well: those in one process that share this share one log."""
        if not self.nodes or self._on is None or self._on is store:
            return True
        return self._on.url == store.url and not store.url.startswith("memory:")

    @asynccontextmanager
    async def taking_part(self, store: GuardedStore, room: Allowance | None = None) -> AsyncIterator[None]:
        """Follows the cluster log meanwhile. `store` is open, and has this room for FastMCP's state."""
        if not self.nodes:
            # It belongs to one event loop.
            self._following, self._tried = asyncio.Lock(), asyncio.Event()
            self._room = room or Allowance()
        self.nodes += 1
        self._on = store.store
        joined = self._bus.joined = self._bus.joined or asyncio.Event()
        task = background.spawn(self.keep(store, joined), name="cluster log")
        task.add_done_callback(_report)
        try:
            try:
                # A store that is down must not keep the node from starting; until it is up, what needs it fails.
                async with asyncio.timeout(store.patience):
                    while not joined.is_set() and self.misfit is None:
                        self._tried.clear()
                        await self._tried.wait()
            except TimeoutError:
                logger.warning("the cluster log could not be joined yet: the store cannot be reached")
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            self.nodes -= 1
            if not self.nodes:
                self._bus.joined = None

    async def join(self, store: GuardedStore) -> None:
        """Makes sure of the cluster's record and keys, and takes part from here on.

        Raises:
            StoreUnavailable: Nothing was joined; may be called again.
        """
        self._codec.use(_unpack(await _ensured_keys(store)))
        self._store = store
        if self._bus.sender is None:
            self._bus.sender = Sender(self._append)

    async def keep(self, store: GuardedStore, joined: asyncio.Event) -> None:
        """Follows the cluster log until it is cancelled: joins, and joins again after a loss.

        `joined` is set while what is in the log is known. Of several nodes in one process one follows for all.
        """
        async with self._following:
            self._codec.use([])
            self._state.use(store, self._room, self._servers)
            try:
                await self._keep(store, joined)
            finally:
                joined.clear()
                self._store = self._bus.sender = None
                self.misfit = None

    async def _keep(self, store: GuardedStore, joined: asyncio.Event) -> None:
        lost = False
        while True:
            try:
                await self.join(store)
                if not joined.is_set():
                    await self._catch_up(store)
                    joined.set()
                self._settle(None)
                if lost:
                    await self._tell_everything()
                    lost = False
                await self._follow(store)
            except (SessionNotFound, Diverged):
                if lost:
                    # Again, before anything was known of it.
                    await asyncio.sleep(_PAUSE)
                logger.warning("the cluster log was lost; it begins anew")
                self.broadcasts = Broadcasts(_LOG_EVENTS)
                lost = True
                joined.clear()
            except StoreUnavailable as error:
                self._settle(error if isinstance(error, StoreUnusable | Undecryptable) else None)
                # Clients that listen here already do not hear what was said until then.
                lost = lost or not joined.is_set()
                await asyncio.sleep(_PAUSE)

    def _settle(self, misfit: StoreUnavailable | None) -> None:
        """Notes how the last try to use the store went, and says it where that is news."""
        if misfit is not None and str(misfit) != str(self.misfit):
            logger.error("the store at %s cannot be used: %s", self._on.url if self._on else "", misfit)
        self.misfit = misfit
        self._tried.set()

    async def rotate_request_state_key(self) -> None:
        """Seals with a new key from now on. What older keys sealed is still accepted, up to the last two of them.

        Every node knows the new key before any node seals with it: it is added first, for accepting only.

        Raises:
            NotRunning: The app's lifespan is not entered.
            StoreUnavailable: As `Store.update`. The rotation may be called again.
        """
        if self._store is None:
            raise NotRunning("the cluster is not joined: enter the app's lifespan first")
        async with self._rotating:
            new = secrets.token_bytes(32)
            # May be done twice: where an answer was lost, it has been done.
            await self._change_keys(lambda keys: [*[key for key in keys if key != new][: _KEPT_KEYS - 1], new])
            await asyncio.sleep(_SPREAD_SECONDS)
            await self._change_keys(lambda keys: [new, *(key for key in keys if key != new)])

    async def _change_keys(self, change: Callable[[list[bytes]], list[bytes]]) -> None:
        assert self._store is not None
        for _ in range(_TRIES):
            old = await _ensured_keys(self._store)
            new = _pack(change(_unpack(old)))
            with contextlib.suppress(SessionNotFound):
                if await self._store.update(CLUSTER_KEY, {_KEYS: new}, expect={_KEYS: old}):
                    break
        else:
            raise StoreUnavailable("the keys that all nodes share kept changing while they were to be changed")
        self._codec.use(_unpack(new))
        assert self._bus.sender is not None
        await self._bus.sender.send(draft(Kind.KEYS))

    async def _catch_up(self, store: GuardedStore) -> None:
        """Takes what is in the log already, which nobody here waits for."""
        try:
            while events := await self._read(store):
                for event in events:
                    self.broadcasts.take(event, self._what(event))
        except Undecryptable:
            # The record is read, so this node has the keys of today. What is there under older ones counts as trimmed,
            # for else no node could take part until it is.
            self.broadcasts = Broadcasts(_LOG_EVENTS, head=(await store.load(CLUSTER_KEY)).head)
        # They may have changed since they were loaded.
        await self._renew_keys(store)

    async def _read(self, store: GuardedStore) -> list[Event]:
        head = self.broadcasts.head
        try:
            return await store.read(CLUSTER_KEY, head, limit=MAX_READ)
        except Trimmed:
            return await store.read(CLUSTER_KEY, Cursor(head.position), limit=MAX_READ)

    async def _renew_keys(self, store: GuardedStore) -> None:
        keys = (await store.load(CLUSTER_KEY)).fields.get(_KEYS)
        if keys is None:
            # Lost with the record, which another node is just making anew.
            await self.join(store)
        else:
            self._codec.use(_unpack(keys))

    async def _follow(self, store: GuardedStore) -> None:
        subscription = Follower(store, CLUSTER_KEY).subscribe(self.broadcasts.head)
        try:
            while True:
                for event in await subscription.next():
                    await self._take(store, event)
                await self._tell()
        finally:
            subscription.close()

    async def _take(self, store: GuardedStore, event: Event) -> None:
        what = self._what(event)
        self.broadcasts.take(event, what)
        if what is not None:
            await self._bus.local.publish(what)
        elif kind_of(event.data) is Kind.KEYS:
            await self._renew_keys(store)

    def _what(self, event: Event) -> ServerEvent | None:
        """What this entry of the cluster log says that changed, for clients that are told here."""
        if kind_of(event.data) is not Kind.PUBLISHED:
            return None
        body = decode(event.data)
        servers = body.get("servers")  # version 0.1 does not say whose it is
        if servers is not None and self._servers and not set(servers) & set(self._servers):
            return None
        return event_from_wire(body["method"], body)

    async def _tell(self) -> None:
        for count, hearer in enumerate(list(self.hearers), 1):
            _contained(hearer.hear)
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)

    async def _tell_everything(self) -> None:
        """Nobody knows what else was lost: whoever listens here is told of everything once (P9)."""
        for what in [*LISTS.values(), *self.broadcasts.resources()]:
            await self._bus.local.publish(what)
        for hearer in list(self.hearers):
            _contained(hearer.hear_anew)

    async def _append(self, batch: Batch, /, *, patience: float) -> Appended:
        assert self._store is not None
        try:
            try:
                appended = await self._store.append(CLUSTER_KEY, batch, patience=patience)
            except SessionNotFound:
                # Lost with all its entries: it begins anew with this one.
                await self.join(self._store)
                appended = await self._store.append(CLUSTER_KEY, batch, patience=patience)
        except (SessionNotFound, StoreUnavailable) as error:
            logger.warning("the cluster log: %s", error)
            # Handlers pass on to their clients what they get, and what the store said may name its host.
            raise StoreUnavailable(STORE_AWAY) from None
        if appended.count > _LOG_EVENTS:
            try:
                await self._store.trim(CLUSTER_KEY, standalone_before=appended.first - _LOG_EVENTS // 2)
            except StoreError as error:
                logger.debug("could not trim the cluster log: %s", error)
        return appended


class _Bus:
    """The SDK's `SubscriptionBus` over the cluster log."""

    def __init__(self, servers: Sequence[str]) -> None:
        self._servers = servers
        self.local = InMemorySubscriptionBus()
        self.sender: Sender | None = None
        self.joined: asyncio.Event | None = None
        """Set when the cluster log is joined; None where nothing of it runs."""

    async def publish(self, event: ServerEvent) -> None:
        """Appends the event; every node, this one too, delivers it from the log.

        Raises:
            StoreUnavailable: As `Store.append`.
        """
        if self.sender is None and self.joined is not None:
            # The node is starting, or its store was away when it did.
            try:
                async with asyncio.timeout(PATIENCE):
                    await self.joined.wait()
            except TimeoutError:
                raise StoreUnavailable(STORE_AWAY) from None
        if self.sender is None:
            await self.local.publish(event)
            return
        body = {"method": METHODS[type(event)], "uri": getattr(event, "uri", None)}
        if self._servers:
            body["servers"] = list(self._servers)
        await self.sender.send(draft(Kind.PUBLISHED, pydantic_core.to_json(body)))
        await anyio.lowlevel.checkpoint()

    def subscribe(self, listener: Callable[[ServerEvent], None]) -> Callable[[], None]:
        """Registers the listener on this node; returns an idempotent function that removes it."""
        if is_probe(self):
            return lambda: None
        return self.local.subscribe(listener)


class _Codec:
    """The SDK's own sealing, under the cluster's keys, or one of this process's own where no cluster is joined."""

    def __init__(self) -> None:
        self._keys = [secrets.token_bytes(32)]
        self._namespaces: list[str] = []
        self._keyed: AESGCMRequestStateCodec | None
        self.use(self._keys)

    def use(self, keys: list[bytes]) -> None:
        """Seals with the first of these keys and accepts all of them; with none, neither until there are some."""
        self._keys = keys
        ring = [_key_for(namespace, key) for namespace in self._namespaces or [""] for key in keys]
        self._keyed = AESGCMRequestStateCodec(ring) if ring else None

    def bind(self, namespace: str) -> None:
        """Seals for this namespace, or the first, and accepts what was sealed for it; "" for what belongs to none."""
        if namespace not in self._namespaces:
            self._namespaces.append(namespace)
            self.use(self._keys)

    def seal(self, payload: bytes) -> str:
        if is_probe(self):
            return ""
        if self._keyed is None:
            raise MCPError(INTERNAL_ERROR, "The keys for requestState are not loaded yet; try again")
        return self._keyed.seal(payload)

    def unseal(self, token: str) -> bytes:
        if self._keyed is None:
            raise InvalidRequestState("keys not loaded")
        return self._keyed.unseal(token)


def _key_for(namespace: str, key: bytes) -> bytes:
    return hmac.digest(key, f"nonstick namespace {namespace}".encode(), "sha256") if namespace else key


async def _ensured_keys(store: GuardedStore) -> bytes:
    """The `requestState` keys in the cluster's record, which is made if there is none.

    Raises:
        StoreUnavailable: It cannot be, or is lost again at once.
    """
    try:
        loaded = await _ensured_record(store)
        if _KEYS not in loaded.fields:
            # Of all nodes that start at once, one writes the first key.
            await store.update(CLUSTER_KEY, {_KEYS: _pack([secrets.token_bytes(32)])}, expect={_KEYS: None})
            loaded = await store.load(CLUSTER_KEY)
        return loaded.fields[_KEYS]
    except (SessionNotFound, KeyError):
        raise StoreUnavailable("the record that all nodes share is lost as soon as it is made") from None


async def _ensured_record(store: GuardedStore) -> Loaded:
    try:
        return await store.load(CLUSTER_KEY)
    except SessionNotFound:
        with contextlib.suppress(AlreadyExists):
            await store.create(CLUSTER_KEY, {}, lifetime=_LIFETIME)
        return await store.load(CLUSTER_KEY)


def _pack(keys: list[bytes]) -> bytes:
    return json.dumps([base64.b64encode(key).decode() for key in keys]).encode()


def _unpack(data: bytes) -> list[bytes]:
    try:
        return [base64.b64decode(key) for key in json.loads(data)]
    except ValueError:
        raise Undecryptable(
            "what the nodes share is encrypted, or of another version of nonstick: give the encryption keys of the "
            "nodes that wrote it"
        ) from None


def _contained(tell: Callable[[], None]) -> None:
    """One connection that cannot be told must not keep the others from being told."""
    try:
        tell()
    except Exception:
        logger.exception("a connection could not be told of a broadcast")


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the cluster log is followed no more", exc_info=error)
