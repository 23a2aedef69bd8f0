"""Encryption at rest: a wrapper over any store, so that what the store keeps tells nothing of what was said (P13).

Encrypted are the values of record fields and the bytes of events, each with AES-256-GCM under a key that is derived
for its session. A value is bound to where it belongs, and does not decrypt anywhere else: a field's to the deployment,
the session and its name; an event's to the deployment, the session, its stream, its tag, and its writer, sequence and
index in its batch (`EventPlace`). Positions, tags, stream and field names, ids in the pending set and times stay as
they are: the store works with them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Self

from nonstick.errors import StoreError
from nonstick.store import (
    MAX_CLIP,
    MAX_READ_BYTES,
    Appended,
    Batch,
    Cursor,
    Event,
    Lease,
    Loaded,
    Skimmed,
    Store,
    Wake,
)
from nonstick.stores.common.bounds import check_bounds
from nonstick.stores.encrypted.keys import KeyRing
from nonstick.stores.encrypted.sealing import Sealer

__all__ = ["EncryptedStore"]


class EncryptedStore:
    """A store that keeps only ciphertext in another one. Has its promises, all of them.

        app = nonstick.app(mcp, store=EncryptedStore(open_store("redis://cache:6379"), keys))

    What cannot be decrypted raises `Undecryptable`, which is a `StoreUnavailable`: clients get 503, and nothing is
    passed over (P9).

    Args:
        store: Where the ciphertext goes.
        keys: The first one encrypts, all of them decrypt. Each 32 random bytes, or their base64, or `PLAINTEXT`.
        deployment: What everything is bound to besides its session; by default the store's prefix or schema, if it
            has one.

    Raises:
        ConfigurationError: There is no key, or one that cannot be.
    """

    def __init__(self, store: Store, keys: Iterable[str | bytes], *, deployment: str | None = None) -> None:
        self.store = store
        self._deployment = getattr(store, "namespace", "") if deployment is None else deployment
        self._stack = AsyncExitStack()
        self.use(keys)

    def use(self, keys: Iterable[str | bytes]) -> None:
        """Works with these keys from now on. May be called while calls are under way.

        Add a new key at the end on every node first, then make it the first one.
        """
        self._sealer = Sealer(KeyRing(keys, deployment=self._deployment))

    @property
    def key_names(self) -> list[str]:
        """The keys as logs name them, the first one first."""
        return self._sealer.ring.names

    @property
    def encrypts(self) -> bool:
        """Whether what is written is encrypted."""
        return self._sealer.ring.encrypts

    @property
    def url(self) -> str:
        return self.store.url

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.store)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._stack.aclose()

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        sealed = {name: self._sealer.seal_field(key, name, value) for name, value in fields.items()}
        await self.store.create(key, sealed, lifetime=lifetime, limits=limits)

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        loaded = await self.store.load(key, renew=renew)
        fields = {name: self._sealer.open_field(key, name, data) for name, data in loaded.fields.items()}
        stale = {name: data for name, data in loaded.fields.items() if not self._sealer.ring.is_current(data)}
        if stale:
            await self._renew(key, stale, fields)
        return loaded._replace(fields=fields, size=self._sealer.clear_size(loaded.size, loaded.count))

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        sealed = self._sealer.seal_changes(key, changes)
        if not expect:
            return await self.store.update(key, sealed, lifetime=lifetime)
        if self._sealer.ring.is_single:
            return await self.store.update(
                key, sealed, expect=self._sealer.seal_changes(key, expect), lifetime=lifetime
            )
        # While keys change, a value may be stored in one of several ciphertexts. The store compares with the one that
        # held the value a moment ago: if that is still there, so is the value, and this is one step.
        while True:
            stored = (await self.store.load(key, renew=False)).fields
            found = {name: stored.get(name) for name in expect}
            if any(self._sealer.open_if_any(key, name, data) != expect[name] for name, data in found.items()):
                return False
            if await self.store.update(key, sealed, expect=found, lifetime=lifetime):
                return True

    async def touch(self, keys: Collection[str]) -> None:
        await self.store.touch(keys)

    async def delete(self, key: str) -> bool:
        return await self.store.delete(key)

    async def _renew(self, key: str, stale: Mapping[str, bytes], fields: Mapping[str, bytes]) -> None:
        """Writes these fields again under the first key: so older keys come out of use, also for sessions that last."""
        try:
            again = {name: self._sealer.seal_field(key, name, fields[name]) for name in stale}
            await self.store.update(key, again, expect=stale)
        except StoreError:
            pass  # the next load tries again

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        events = self._sealer.seal_events(key, batch)
        fields = self._sealer.seal_changes(key, batch.fields)
        appended = await self.store.append(key, replace(batch, events=events, fields=fields))
        return appended._replace(size=self._sealer.clear_size(appended.size, appended.count))

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        return self._sealer.open_events(key, await self.store.read(key, after, limit=limit, max_bytes=max_bytes))

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        # What is cut off cannot be authenticated: each event has to be read whole.
        check_bounds(limit=limit, clip=clip)
        events = await self.read(key, after, limit=limit)
        return [Skimmed(event._replace(data=event.data[:clip]), len(event.data)) for event in events]

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        await self.store.trim(key, streams=streams, standalone_before=standalone_before)

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        """See `nonstick.store.TellsStale`: all of them, where the store below cannot tell."""
        stale: Callable[[Mapping[str, Cursor]], Awaitable[set[str]]] | None = getattr(self.store, "stale", None)
        return set(places) if stale is None else await stale(places)

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        # An event is bound to its stream and its tag, but not to its place in the log, which its writer did not know:
        # said again one place later, it would decrypt. So nothing is taken that does not come from a read (P14).
        return self.store.watch(key, lambda _: wake(None))

    # ---- nodes and the store itself

    def lease(self, node: str) -> Lease:
        return self.store.lease(node)

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        return await self.store.lapsed(nodes)

    async def ping(self) -> None:
        await self.store.ping()
