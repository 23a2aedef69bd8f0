"""The cluster log: one log, in the same store as the sessions, that every node follows.

What is told to every client, and the keys of `requestState`, lie in one record and one log for the whole cluster, under
a key that no session can have. Each node reads that log once, for all connections that listen there.

Different servers on one store share that log, as long as nodes of version 0.1 do (P12). So an entry says to which
servers it belongs, and a node passes over the entries of other servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, Protocol

from mcp.shared.subscriptions import ServerEvent, event_from_wire

from nonstick.core.broadcasts import LISTS, NOWHERE, Broadcasts
from nonstick.core.events import Kind, decode, draft, kind_of
from nonstick.errors import (
    AlreadyExists,
    Diverged,
    SessionNotFound,
    StoreError,
    StoreUnavailable,
    StoreUnusable,
    Trimmed,
    Undecryptable,
)
from nonstick.log.follow import Follower
from nonstick.log.guard import GuardedStore, withheld
from nonstick.log.lookout import Lookout
from nonstick.log.writer import Sender
from nonstick.store import MAX_READ, Appended, Batch, Cursor, Event, Loaded
from nonstick.waiting import background

__all__ = ["CLUSTER_KEY", "ClusterLog", "Hearer", "Receiver"]

logger = logging.getLogger(__name__)

CLUSTER_KEY: Final = "cluster"
"""The cluster log's key. A session's is 40 hexadecimal digits."""

_LIFETIME: Final = 30 * 86_400.0
"""Seconds without any entry after which the store forgets the cluster log."""

_KEYS: Final = "request-state-keys"
"""The field of the cluster's record that holds the keys of `requestState`."""

_LOG_EVENTS: Final = 2000
"""Entries that the cluster log is trimmed to."""

_PAUSE: Final = 1.0
"""Seconds between two tries to use a store that cannot be reached."""

_TRIES: Final = 20
"""How often the keys are changed anew while others change them."""

_AT_ONCE: Final = 100
"""How many connections are told of a broadcast before other tasks get their turn of the event loop."""


class Hearer(Protocol):
    """A connection of the handshake era, which hears what is broadcast. Called in the event loop; must not block."""

    def hear(self) -> None:
        """There is something new."""
        ...

    def hear_anew(self) -> None:
        """The store lost the cluster log, or the end of it. What is there now is known."""
        ...


class Receiver(Protocol):
    """What the cluster log is read for in this process, beside connections of the handshake era."""

    def following(self, store: GuardedStore) -> None:
        """The log is followed in this store from now on. Nothing that was read elsewhere counts."""
        ...

    def first_keys(self) -> bytes:
        """Keys for a cluster that has none yet."""
        ...

    def take_keys(self, keys: bytes) -> None:
        """These are the cluster's keys from now on.

        Raises:
            Undecryptable: They cannot be read: they are encrypted, or of another version.
        """
        ...

    async def publish(self, what: ServerEvent) -> None:
        """Clients of 2026-07-28 on this node are told of this change."""
        ...


class ClusterLog:
    """The cluster log, as this process follows it: once, however many nodes it has.

    Args:
        servers: Identities of the servers whose clients are told here; nobody's in a process that serves nobody.

    Attributes:
        broadcasts: What is in the log.
        hearers: Connections that are told when there is something new.
        nodes: How many in this process take part.
        joined: Set while the log is joined; None where nothing of it runs.
        sender: Appends to the log; None until it is joined.
        misfit: Why the store will not do until somebody changes something; None while it does, or cannot be reached.
    """

    def __init__(self, receiver: Receiver, servers: Sequence[str]) -> None:
        self._receiver = receiver
        self._servers = servers
        self.broadcasts = Broadcasts(_LOG_EVENTS)
        self.hearers: set[Hearer] = set()
        self.nodes = 0
        self.joined: asyncio.Event | None = None
        self.sender: Sender | None = None
        self.misfit: StoreUnavailable | None = None
        self._following = asyncio.Lock()
        self._tried = asyncio.Event()
        self._url = ""
        self._store: GuardedStore | None = None

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

    @asynccontextmanager
    async def taking_part(self, store: GuardedStore) -> AsyncIterator[None]:
        """Follows the cluster log while the block runs. `store` is open."""
        if not self.nodes:
            # It belongs to one event loop.
            self._following, self._tried = asyncio.Lock(), asyncio.Event()
        self.nodes += 1
        self._url = store.store.url
        joined = self.joined = self.joined or asyncio.Event()
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
                self.joined = None

    async def join(self, store: GuardedStore) -> None:
        """Makes sure of the cluster's record and keys, and takes part from here on.

        Raises:
            StoreUnavailable: Nothing was joined; may be called again.
        """
        self._receiver.take_keys(await self._ensured_keys(store))
        self._store = store
        if self.sender is None:
            self.sender = Sender(self._append)

    async def keep(self, store: GuardedStore, joined: asyncio.Event) -> None:
        """Follows the cluster log until it is cancelled: joins, and joins again after a loss.

        `joined` is set while what is in the log is known. Of several nodes in one process one follows for all.
        """
        async with self._following:
            self._receiver.following(store)
            try:
                await self._keep(store, joined)
            finally:
                joined.clear()
                self._store = self.sender = None
                self.misfit = None

    async def _keep(self, store: GuardedStore, joined: asyncio.Event) -> None:
        lost = False
        while True:
            try:
                await self.join(store)
                if not joined.is_set():
                    await self._catch_up(store)
                    joined.set()
                self._note(None)
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
                self._note(error if isinstance(error, StoreUnusable | Undecryptable) else None)
                # Clients that listen here already do not hear what was said until then.
                lost = lost or not joined.is_set()
                await asyncio.sleep(_PAUSE)

    def _note(self, misfit: StoreUnavailable | None) -> None:
        """Notes how the last try to use the store went, and says it where that is news."""
        if misfit is not None and str(misfit) != str(self.misfit):
            logger.error("the store at %s cannot be used: %s", self._url, misfit)
        self.misfit = misfit
        self._tried.set()

    # ---- the keys

    async def change_keys(self, change: Callable[[bytes], bytes]) -> None:
        """Puts other keys in the place of the cluster's, and has every node read them.

        Raises:
            StoreUnavailable: They were not changed, or nobody knows; may be called again.
        """
        assert self._store is not None
        assert self.sender is not None
        for _ in range(_TRIES):
            old = await self._ensured_keys(self._store)
            new = change(old)
            with contextlib.suppress(SessionNotFound):
                if await self._store.update(CLUSTER_KEY, {_KEYS: new}, expect={_KEYS: old}):
                    break
        else:
            raise StoreUnavailable("the keys that all nodes share kept changing while they were to be changed")
        self._receiver.take_keys(new)
        await self.sender.send(draft(Kind.KEYS))

    async def _ensured_keys(self, store: GuardedStore) -> bytes:
        """The keys in the cluster's record, which is made if there is none.

        Raises:
            StoreUnavailable: It cannot be, or is lost again at once.
        """
        try:
            loaded = await _ensured_record(store)
            if _KEYS not in loaded.fields:
                # Of all nodes that start at once, one writes the first key.
                await store.update(CLUSTER_KEY, {_KEYS: self._receiver.first_keys()}, expect={_KEYS: None})
                loaded = await store.load(CLUSTER_KEY)
            return loaded.fields[_KEYS]
        except (SessionNotFound, KeyError):
            raise StoreUnavailable("the record that all nodes share is lost as soon as it is made") from None

    async def _renew_keys(self, store: GuardedStore) -> None:
        keys = (await store.load(CLUSTER_KEY)).fields.get(_KEYS)
        if keys is None:
            # Lost with the record, which another node is just making anew.
            await self.join(store)
        else:
            self._receiver.take_keys(keys)

    # ---- following

    async def _catch_up(self, store: GuardedStore) -> None:
        """Takes what is in the log already, without telling anybody: no client here waits for it."""
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

    async def _follow(self, store: GuardedStore) -> None:
        subscription = Follower(store, Lookout(store), CLUSTER_KEY).subscribe(self.broadcasts.head)
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
            await self._receiver.publish(what)
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
        """Nobody knows what else was lost: every client that listens here is told of everything once (P9)."""
        for what in [*LISTS.values(), *self.broadcasts.resources()]:
            await self._receiver.publish(what)
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
            raise withheld(error, "the cluster log") from None
        if appended.count > _LOG_EVENTS:
            try:
                await self._store.trim(CLUSTER_KEY, standalone_before=appended.first - _LOG_EVENTS // 2)
            except StoreError as error:
                logger.debug("could not trim the cluster log: %s", error)
        return appended


async def _ensured_record(store: GuardedStore) -> Loaded:
    try:
        return await store.load(CLUSTER_KEY)
    except SessionNotFound:
        with contextlib.suppress(AlreadyExists):
            await store.create(CLUSTER_KEY, {}, lifetime=_LIFETIME)
        return await store.load(CLUSTER_KEY)


def _contained(tell: Callable[[], None]) -> None:
    """One connection that cannot be told must not keep the others from being told."""
    try:
        tell()
    except Exception:
        logger.exception("a connection could not be told of a broadcast")


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the cluster log is followed no more", exc_info=error)
