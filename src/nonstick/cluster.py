"""What clients of 2026-07-28 need shared between nodes: the subscription bus and the `requestState` keys.

They have no session, so both live in one record and one log for the whole cluster, the *cluster log*: the same
primitives, in the same store, under a key that no session can have.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
from collections.abc import Callable
from typing import ClassVar, Final
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

from nonstick.errors import AlreadyExists, Diverged, NotRunning, SessionNotFound, StoreError, StoreUnavailable
from nonstick.events import Kind, decode, draft, kind_of
from nonstick.follow import Follower
from nonstick.guard import GuardedStore
from nonstick.sender import Sender
from nonstick.state_store import StateStore
from nonstick.store import Appended, Batch, Cursor, Event
from nonstick.wire import STORE_AWAY

__all__ = ["CLUSTER_KEY", "Cluster"]

logger = logging.getLogger(__name__)

CLUSTER_KEY: Final = "cluster"
"""The cluster log's key. A session's is 40 hexadecimal digits."""

_LIFETIME: Final = 30 * 86_400.0
_KEYS: Final = "request-state-keys"
_KEPT_KEYS: Final = 3
_LOG_EVENTS: Final = 2000
_PAUSE: Final = 1.0
_SPREAD_SECONDS: Final = 10.0
"""Longer than it takes a node that missed a wake to read."""

_METHODS: Final[dict[type[ServerEvent], str]] = {
    ToolsListChanged: "notifications/tools/list_changed",
    PromptsListChanged: "notifications/prompts/list_changed",
    ResourcesListChanged: "notifications/resources/list_changed",
    ResourceUpdated: "notifications/resources/updated",
}


class Cluster:
    """What the nodes of one deployment share beside sessions. Made before the server, and given to it:

        cluster = nonstick.Cluster()
        mcp = MCPServer(
            "name", subscriptions=cluster.subscription_bus, request_state_security=cluster.request_state_security
        )
        app = nonstick.app(mcp, store="redis://cache:6379")

    Nothing is connected until the app's lifespan runs. Where no app of nonstick runs (on stdio, say) both work within
    the process, as the SDK's own do.

    Args:
        request_state_ttl: Seconds for which a client may come back with a `requestState`.

    Attributes:
        subscription_bus: What is published on any node reaches `subscriptions/listen` streams on every node.
        request_state_security: Any node accepts the `requestState` that another has sealed.
        session_state_store: For `FastMCP(session_state_store=...)`: what `ctx.set_state()` keeps is on every node.
    """

    _made: ClassVar[WeakSet[Cluster]] = WeakSet()

    def __init__(self, *, request_state_ttl: float = 600.0) -> None:
        self._made.add(self)
        self._bus = _Bus()
        self._codec = _Codec()
        self._security = RequestStateSecurity(codec=self._codec, ttl=request_state_ttl)
        self._taken: set[str] = set()
        self.session_state_store = StateStore()
        self._store: GuardedStore | None = None
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
    def taken(self) -> frozenset[str]:
        """Which of the two attributes anybody has asked for. A server was certainly not built with the others."""
        return frozenset(self._taken)

    @classmethod
    def only(cls) -> Cluster | None:
        """The one that was made in this process; None if there is none, or more than one."""
        made = list(cls._made)
        return made[0] if len(made) == 1 else None

    async def join(self, store: GuardedStore) -> Cursor:
        """Makes sure of the cluster's record and keys, and takes part from here on. Returns where its log is now.

        Raises:
            StoreUnavailable: Nothing was joined; may be called again.
        """
        try:
            loaded = await store.load(CLUSTER_KEY)
        except SessionNotFound:
            try:
                await store.create(CLUSTER_KEY, {}, lifetime=_LIFETIME)
            except AlreadyExists:
                pass
            loaded = await store.load(CLUSTER_KEY)
        if _KEYS not in loaded.fields:
            # Of all nodes that start at once, one writes the first key.
            await store.update(CLUSTER_KEY, {_KEYS: _pack([secrets.token_bytes(32)])}, expect={_KEYS: None})
            loaded = await store.load(CLUSTER_KEY)
        self._codec.use(_unpack(loaded.fields[_KEYS]))
        self._store = store
        self._bus.sender = Sender(self._append)
        return loaded.head

    async def keep(self, store: GuardedStore, joined: asyncio.Event) -> None:
        """Follows the cluster log for as long as the node runs: joins, and joins again after a loss."""
        self._codec.use([])
        self.session_state_store.use(store)
        while True:
            try:
                head = await self.join(store)
                joined.set()
                await self._follow(store, head)
            except (SessionNotFound, Diverged):
                logger.warning("the cluster log was lost; it begins anew")
            except StoreUnavailable:
                await asyncio.sleep(_PAUSE)

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
            await self._change_keys(lambda keys: [*keys[: _KEPT_KEYS - 1], new])
            await asyncio.sleep(_SPREAD_SECONDS)
            await self._change_keys(lambda keys: [new, *(key for key in keys if key != new)])

    async def _change_keys(self, change: Callable[[list[bytes]], list[bytes]]) -> None:
        assert self._store is not None
        while True:
            old = (await self._store.load(CLUSTER_KEY)).fields[_KEYS]
            new = _pack(change(_unpack(old)))
            if await self._store.update(CLUSTER_KEY, {_KEYS: new}, expect={_KEYS: old}):
                break
        self._codec.use(_unpack(new))
        assert self._bus.sender is not None
        await self._bus.sender.send(draft(Kind.KEYS))

    async def _follow(self, store: GuardedStore, after: Cursor) -> None:
        subscription = Follower(store, CLUSTER_KEY).subscribe(Cursor(after.position))
        try:
            while True:
                for event in await subscription.next():
                    await self._take(store, event)
        finally:
            subscription.close()

    async def _take(self, store: GuardedStore, event: Event) -> None:
        kind = kind_of(event.data)
        if kind is Kind.PUBLISHED:
            body = decode(event.data)
            published = event_from_wire(body["method"], body)
            if published is not None:
                await self._bus.local.publish(published)
        elif kind is Kind.KEYS:
            self._codec.use(_unpack((await store.load(CLUSTER_KEY)).fields[_KEYS]))

    async def _append(self, batch: Batch, /, *, patience: float) -> Appended:
        assert self._store is not None
        try:
            appended = await self._store.append(CLUSTER_KEY, batch, patience=patience)
        except StoreUnavailable as error:
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

    def __init__(self) -> None:
        self.local = InMemorySubscriptionBus()
        self.sender: Sender | None = None

    async def publish(self, event: ServerEvent) -> None:
        """Appends the event; every node, this one too, delivers it from the log.

        Raises:
            StoreUnavailable: As `Store.append`.
        """
        if self.sender is None:
            await self.local.publish(event)
            return
        body = {"method": _METHODS[type(event)], "uri": getattr(event, "uri", None)}
        await self.sender.send(draft(Kind.PUBLISHED, pydantic_core.to_json(body)))
        await anyio.lowlevel.checkpoint()

    def subscribe(self, listener: Callable[[ServerEvent], None]) -> Callable[[], None]:
        """Registers the listener on this node; returns an idempotent function that removes it."""
        return self.local.subscribe(listener)


class _Codec:
    """The SDK's own sealing, under the cluster's keys, or one of this process's own where no cluster is joined."""

    def __init__(self) -> None:
        self._keyed: AESGCMRequestStateCodec | None = AESGCMRequestStateCodec([secrets.token_bytes(32)])

    def use(self, keys: list[bytes]) -> None:
        """Seals with the first of these keys and accepts all of them; with none, neither until there are some."""
        self._keyed = AESGCMRequestStateCodec(keys) if keys else None

    def seal(self, payload: bytes) -> str:
        if self._keyed is None:
            raise MCPError(INTERNAL_ERROR, "The keys for requestState are not loaded yet; try again")
        return self._keyed.seal(payload)

    def unseal(self, token: str) -> bytes:
        if self._keyed is None:
            raise InvalidRequestState("keys not loaded")
        return self._keyed.unseal(token)


def _pack(keys: list[bytes]) -> bytes:
    return json.dumps([base64.b64encode(key).decode() for key in keys]).encode()


def _unpack(data: bytes) -> list[bytes]:
    return [base64.b64decode(key) for key in json.loads(data)]
