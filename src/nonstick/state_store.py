"""FastMCP's session state, in the session records: what `ctx.set_state()` keeps is there on the next node.

FastMCP keeps this state under text keys in a key-value store (the `AsyncKeyValue` protocol of py-key-value-aio), which
this is. A key that begins with a session's id goes into that session's record, and so ends with the session. Any other
(per-user sessions, sessions of clients of 2026-07-28) gets a record of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, SupportsFloat

from nonstick.errors import AlreadyExists, SessionNotFound, StateNotJSON, StateTooLarge, StoreUnavailable
from nonstick.guard import GuardedStore
from nonstick.security import session_key, valid_session_id
from nonstick.session import Session, current_session
from nonstick.stores.memory import MemoryStore
from nonstick.wire import STORE_AWAY

__all__ = ["MAX_STATE", "PROBE", "StateStore", "probed"]

logger = logging.getLogger(__name__)

FIELD: Final = "kv:"
"""Begins the names of record fields that hold such values: `kv:<hash of collection and key>`."""

LIFETIME: Final = "lifetime"
"""The field of a record of a value's own that says what it was made for, in seconds: a store only lengthens it."""

MAX_STATE: Final = 1024 * 1024
"""Bytes of such values that one record holds (P10), where no session says otherwise by its `max_state_bytes`."""

PROBE: Final = "nonstick-probe"
"""A session that nobody has, by which a store is told that it is asked."""

_LIFETIME: Final = 30 * 86_400.0
"""Seconds after its last use that a value in a record of its own is kept, if it was put there without a limit."""

_TRIES: Final = 5

_asked: ContextVar[list[str] | None] = ContextVar("nonstick_state_asked", default=None)


@contextmanager
def probed() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether a `StateStore` was asked for `PROBE` in here."""
    keys: list[str] = []
    token = _asked.set(keys)
    try:
        yield lambda: any(key.endswith(PROBE) for key in keys)
    finally:
        _asked.reset(token)


class StateStore:
    """An `AsyncKeyValue` store, for `FastMCP(session_state_store=...)`. Values are JSON objects.

    A write is in the store when it returns, and other nodes read it from then on. Until an app of nonstick runs, and
    where none does (on stdio, say), it works within the process.

    Raises:
        StoreUnavailable: From each method. What a write did is unknown then.
    """

    def __init__(self) -> None:
        self._store = GuardedStore(MemoryStore())

    def use(self, store: GuardedStore) -> None:
        """Keeps everything there from now on."""
        self._store = store

    # ---- AsyncKeyValue

    async def get(self, key: str, *, collection: str | None = None) -> dict[str, Any] | None:
        """The value; None if there is none, or its time is over."""
        return (await self.ttl(key, collection=collection))[0]

    async def ttl(self, key: str, *, collection: str | None = None) -> tuple[dict[str, Any] | None, float | None]:
        """The value, and the seconds for which it is kept; None for no limit of its own."""
        if (asked := _asked.get()) is not None:
            asked.append(key)
        with _discreet():
            for place in self._places(key, collection):
                fields = await place.load()
                if fields is not None:
                    return _unpack(fields.get(place.field))
        return None, None

    async def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Keeps the value for `ttl` seconds, and no longer than its session.

        Raises:
            StateNotJSON: JSON cannot hold it.
            StateTooLarge: Its record would hold too much: a session's more than `max_state_bytes`.
        """
        seconds = None if ttl is None else float(ttl)
        lifetime = seconds or _LIFETIME
        data = _pack(value, seconds)
        with _discreet():
            *in_session, own = self._places(key, collection)
            for place in in_session:
                if await place.put(data):
                    return
            for _ in range(_TRIES):
                try:
                    own.check_size(data, {})
                    first = {own.field: data, LIFETIME: str(lifetime).encode()}
                    await own.store.create(own.key, first, lifetime=lifetime)
                except AlreadyExists:
                    if await own.put(data, lifetime=lifetime):
                        return
                else:
                    return
            raise StoreUnavailable("a value's record kept ending while it was written")

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Removes the value; whether there was one."""
        with _discreet():
            *in_session, own = self._places(key, collection)
            for place in in_session:
                fields = await place.load()
                if fields is not None:
                    if there := place.field in fields:
                        await place.drop()
                    return there
            return await own.store.delete(own.key)

    async def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[dict[str, Any] | None]:
        """As `get`, of each."""
        return [await self.get(key, collection=collection) for key in keys]

    async def ttl_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[tuple[dict[str, Any] | None, float | None]]:
        """As `ttl`, of each."""
        return [await self.ttl(key, collection=collection) for key in keys]

    async def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """As `put`, of each, one after the other."""
        for key, value in zip(keys, values, strict=True):
            await self.put(key, value, collection=collection, ttl=ttl)

    async def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """As `delete`, of each; how many there were."""
        return sum([await self.delete(key, collection=collection) for key in keys])

    # ---- where a value is

    def _places(self, key: str, collection: str | None) -> list[_Place]:
        """Where to look for it, the first that there is counts; the last one is a record of its own."""
        name = hashlib.sha256(json.dumps([collection, key]).encode()).hexdigest()
        field = FIELD + name[:32]
        places = [_Place(self._store, FIELD + name[:40], field)]
        session_id, colon, _ = key.partition(":")
        if colon and valid_session_id(session_id):
            current = current_session()
            if current is None or current.id != session_id:
                places.insert(0, _Place(self._store, session_key(session_id), field))
            elif current.is_opening:
                places.insert(0, _InOpening(current, field))
            else:
                limit = current.node.settings.max_state_bytes
                places.insert(0, _Place(current.node.store, current.key, field, limit))
        return places


class _Place:
    """A field of a record."""

    def __init__(self, store: GuardedStore, key: str, field: str, limit: int = MAX_STATE) -> None:
        self.store = store
        self.key = key
        self.field = field
        self._limit = limit

    async def load(self) -> Mapping[str, bytes] | None:
        """The record; None if there is none."""
        try:
            return (await self.store.load(self.key)).fields
        except SessionNotFound:
            return None

    async def put(self, data: bytes, *, lifetime: float | None = None) -> bool:
        """Whether the record is there; then the field has this value, and the record that lifetime at least."""
        fields = await self.load()
        if fields is None:
            return False
        self.check_size(data, fields)
        changes = {self.field: data}
        if lifetime is not None:
            lifetime = max(lifetime, float(fields.get(LIFETIME, b"0")))
            changes[LIFETIME] = str(lifetime).encode()
        try:
            await self.store.update(self.key, changes, lifetime=lifetime)
        except SessionNotFound:
            return False
        return True

    def check_size(self, data: bytes, fields: Mapping[str, bytes]) -> None:
        """Returns if a record with these fields has room for this value.

        Raises:
            StateTooLarge: It has none.
        """
        others = sum(len(v) for k, v in fields.items() if k.startswith(FIELD) and k != self.field)
        if others + len(data) > self._limit:
            raise StateTooLarge(
                f"a session keeps at most {self._limit} bytes of state (max_state_bytes), and this value would make it "
                f"{others + len(data)}. Keep large things elsewhere, and their names here."
            )

    async def drop(self) -> None:
        """Removes the field."""
        try:
            await self.store.update(self.key, {self.field: None})
        except SessionNotFound:
            pass


class _InOpening(_Place):
    """A field of the record that a session which is being opened will have: a failed one leaves nothing (P2)."""

    def __init__(self, session: Session, field: str) -> None:
        super().__init__(session.node.store, session.key, field, session.node.settings.max_state_bytes)
        self._session = session

    async def load(self) -> Mapping[str, bytes] | None:
        return self._session.first_fields

    async def put(self, data: bytes, *, lifetime: float | None = None) -> bool:
        self.check_size(data, self._session.first_fields)
        self._session.first_fields[self.field] = data
        return True

    async def drop(self) -> None:
        self._session.first_fields.pop(self.field, None)


@contextmanager
def _discreet() -> Iterator[None]:
    """Handlers pass on to their clients what they get, and what the store said may name its host."""
    try:
        yield
    except StoreUnavailable as error:
        logger.warning("session state: %s", error)
        raise StoreUnavailable(STORE_AWAY) from None


def _pack(value: Mapping[str, Any], seconds: float | None) -> bytes:
    kept: dict[str, Any] = {"value": dict(value)}
    if seconds is not None:
        kept["until"] = time.time() + seconds
    try:
        return json.dumps(kept, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        raise StateNotJSON("session state has to be JSON: other nodes could not load this value") from None


def _unpack(data: bytes | None) -> tuple[dict[str, Any] | None, float | None]:
    if data is None:
        return None, None
    kept = json.loads(data)
    if "until" not in kept:
        return kept["value"], None
    left = kept["until"] - time.time()
    return (kept["value"], left) if left > 0 else (None, None)
