"""What all nodes share beside sessions: what is told to every client, and the `requestState` keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Final
from weakref import WeakSet

from mcp.server.request_state import RequestStateSecurity
from mcp.server.subscriptions import InMemorySubscriptionBus, SubscriptionBus
from mcp.shared.subscriptions import (
    PromptsListChanged,
    ResourcesListChanged,
    ResourceUpdated,
    ServerEvent,
    ToolsListChanged,
)

from nonstick.cluster import request_state
from nonstick.cluster.bus import Bus
from nonstick.cluster.state_store import Allowance, StateStore
from nonstick.core.names import identity
from nonstick.errors import ConfigurationError, NotRunning, StoreUnavailable
from nonstick.log.cluster_log import ClusterLog
from nonstick.log.guard import GuardedStore
from nonstick.store import Store
from nonstick.stores import open_store
from nonstick.stores.encrypted import EncryptedStore

__all__ = ["Cluster"]

_SPREAD_SECONDS: Final = 10.0
"""Longer than it takes a node that missed a wake to read."""


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
        log: The cluster log.
        request_state_security: Any node accepts the `requestState` that another has sealed.
        session_state_store: For `FastMCP(session_state_store=...)`: what `ctx.set_state()` keeps is on every node.
    """

    _made: ClassVar[WeakSet[Cluster]] = WeakSet()

    def __init__(self, *, request_state_ttl: float = 600.0) -> None:
        self._made.add(self)
        self._servers: list[str] = []
        """Identities of the servers whose clients are told here; nobody's in a process that serves nobody."""
        self._codec = request_state.Codec()
        self._state = StateStore()
        local = InMemorySubscriptionBus()
        self._received = _Received(local, self._codec, self._state, self._servers)
        self.log = ClusterLog(self._received, self._servers)
        self._bus = Bus(self.log, local, self._servers)
        self._security = RequestStateSecurity(codec=self._codec, ttl=request_state_ttl)
        self._taken: set[str] = set()
        self._on: Store | None = None
        self._rotating = asyncio.Lock()

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
    def private(cls) -> Cluster:
        """A cluster that `only()` does not find: made for an app whose server was given none."""
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
        cluster, opened = cls.private(), open_store(store)
        if namespace:
            cluster.serve(namespace)
        if encryption_keys is not None:
            opened = EncryptedStore(opened, encryption_keys)
        async with GuardedStore(opened) as guarded:
            await cluster.log.join(guarded)
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
        """As `notify_tools_changed`, for one resource: tells clients that have subscribed to exactly this URI."""
        await self._bus.publish(ResourceUpdated(str(uri)))

    # ---- taking part

    @property
    def misfit(self) -> StoreUnavailable | None:
        """Why the store will not do until somebody changes something; None while it does, or cannot be reached."""
        return self.log.misfit

    def may_use(self, store: Store) -> bool:
        """Whether a node on this store can take part as well: those in one process that share this share one log."""
        if not self.log.nodes or self._on is None or self._on is store:
            return True
        return self._on.url == store.url and not store.url.startswith("memory:")

    @asynccontextmanager
    async def taking_part(self, store: GuardedStore, room: Allowance | None = None) -> AsyncIterator[None]:
        """Follows the cluster log while the block runs. `store` is open, and has this room for FastMCP's state."""
        if not self.log.nodes:
            self._received.room = room or Allowance()
        self._on = store.store
        async with self.log.taking_part(store):
            yield

    async def rotate_request_state_key(self) -> None:
        """Seals with a new key from now on. What older keys sealed is still accepted, up to the last two of them.

        Every node knows the new key before any node seals with it: it is added first, for accepting only.

        Raises:
            NotRunning: The app's lifespan is not entered.
            StoreUnavailable: As `Store.update`. The rotation may be called again.
        """
        if self.log.sender is None:
            raise NotRunning("the cluster is not joined: enter the app's lifespan first")
        async with self._rotating:
            new = request_state.first_key()
            # Both changes may be made twice: where the store's answer was lost, the first try may have made them.
            await self.log.change_keys(lambda keys: request_state.accepting(keys, new))
            await asyncio.sleep(_SPREAD_SECONDS)
            await self.log.change_keys(lambda keys: request_state.sealing(keys, new))


class _Received:
    """What the cluster log brings for clients of 2026-07-28: what changed, and the keys.

    Attributes:
        room: For values of FastMCP's session state that have records of their own.
    """

    def __init__(
        self, local: InMemorySubscriptionBus, codec: request_state.Codec, state: StateStore, servers: Sequence[str]
    ) -> None:
        self._local = local
        self._codec = codec
        self._state = state
        self._servers = servers
        self.room = Allowance()

    def following(self, store: GuardedStore) -> None:
        self._codec.use([])
        self._state.use(store, self.room, self._servers)

    def first_keys(self) -> bytes:
        return request_state.pack([request_state.first_key()])

    def take_keys(self, keys: bytes) -> None:
        self._codec.use(request_state.unpack(keys))

    async def publish(self, what: ServerEvent) -> None:
        await self._local.publish(what)
