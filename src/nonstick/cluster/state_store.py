"""FastMCP's session state, in the session records: what `ctx.set_state()` keeps is there on the next node.

FastMCP keeps this state under text keys in a key-value store (the `AsyncKeyValue` protocol of py-key-value-aio), which
this is. A session's record is reached only through the session that a request was admitted to: a key that begins with
its id goes there, and ends with the session. What a request without a session keeps under the name that FastMCP gives
it ends with the request. Any other key (per-user sessions, sessions of clients of 2026-07-28) has a record of its own,
of which there may be so many (P10).
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, SupportsFloat

from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser

from nonstick.cluster.probing import is_probe
from nonstick.core.names import identity
from nonstick.core.principals import principal_of
from nonstick.core.values import check_size, encoded
from nonstick.errors import (
    AlreadyExists,
    SessionNotFound,
    StateFull,
    StateNotJSON,
    StoreUnavailable,
    TooManySessions,
)
from nonstick.log.guard import GuardedStore
from nonstick.session.live import BeforeOpen, LiveSession, current_session
from nonstick.session.state import change_fields, discreet
from nonstick.stores.memory import MemoryStore

__all__ = ["MAX_STATE", "PROBE", "Allowance", "StateStore", "within_request"]

logger = logging.getLogger(__name__)

FIELD: Final = "kv:"
"""Begins the names of record fields that hold such values: `kv:<hash of collection and key>`."""

LIFETIME: Final = "lifetime"
"""The field of a record of a value's own that says what it was made for, in seconds: a store only lengthens it."""

MAX_STATE: Final = 1024 * 1024
"""Bytes of such values that one record holds (P10), where no session says otherwise by its `max_state_bytes`."""

PROBE: Final = "nonstick-probe"
"""The id of no session: a key with it shows a store that it is being probed."""

_LIFETIME: Final = 30 * 86_400.0
"""Seconds after its last use that a value in a record of its own is kept, if it was put there without a limit."""

_TRIES: Final = 5

_EVERYBODY: Final = "state"
"""The group that every value in a record of its own is counted in."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many values may have records of their own, in the whole store; None for any number (P10).

    Attributes:
        records: In all.
        per_principal: Of one authenticated principal.
    """

    records: int | None = 100_000
    per_principal: int | None = 1000

    def limits(self, principal: bytes) -> dict[str, int]:
        """The groups that such a record of this principal is counted in, and how many each may hold."""
        limits: dict[str, int] = {}
        if principal and self.per_principal is not None:
            limits[f"{_EVERYBODY}:{hashlib.sha256(principal).hexdigest()[:32]}"] = self.per_principal
        if self.records is not None:
            limits[_EVERYBODY] = self.records
        return limits


@dataclass(slots=True)
class _Request:
    """What one request without a session keeps.

    Attributes:
        server: Identity of the server whose request it is.
        travels: A background task that it begins may look for this, on any node: it is kept in the store as well.
    """

    server: str
    travels: bool
    values: dict[str, bytes] = field(default_factory=dict[str, bytes])


_request: ContextVar[_Request | None] = ContextVar("nonstick_request_state", default=None)


@contextmanager
def within_request(*, server: str, travels: bool) -> Iterator[None]:
    """What runs in here is one request, of the server of this identity, that has no session."""
    token = _request.set(_Request(server, travels))
    try:
        yield
    finally:
        _request.reset(token)


class StateStore:
    """An `AsyncKeyValue` store, for `FastMCP(session_state_store=...)`. Values are JSON objects.

    A write is in the store when it returns, and other nodes read it from then on. Until an app of nonstick runs, and
    where none does (on stdio, say), it works within the process.

    Raises:
        StoreUnavailable: From each method. What a write did is unknown then.
    """

    def __init__(self) -> None:
        self._store = GuardedStore(MemoryStore())
        self._room = Allowance()
        self._servers: Sequence[str] = ()

    def use(self, store: GuardedStore, room: Allowance, servers: Sequence[str] = ()) -> None:
        """Keeps everything in this store from now on. Values outside of sessions are kept apart for each server."""
        self._store = store
        self._room = room
        self._servers = servers

    # ---- AsyncKeyValue

    async def get(self, key: str, *, collection: str | None = None) -> dict[str, Any] | None:
        """The value; None for a key without one, or whose time is over."""
        return (await self.ttl(key, collection=collection))[0]

    async def ttl(self, key: str, *, collection: str | None = None) -> tuple[dict[str, Any] | None, float | None]:
        """The value, and the seconds for which it is kept; None for no limit of its own."""
        if is_probe(self):
            return None, None
        with discreet():
            at = self._field_of(key, collection)
            return _unpack((await at.load() or {}).get(at.field))

    async def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Keeps the value for `ttl` seconds, and no longer than its session.

        Raises:
            StateNotJSON: JSON cannot hold it.
            StateTooLarge: Its record would hold too much: a session's more than `max_state_bytes`.
            StateFull: There are as many records of values as there may be.
            SessionNotFound: The session has ended.
        """
        seconds = None if ttl is None else float(ttl)
        with discreet():
            await self._field_of(key, collection).put(_pack(value, seconds), lifetime=seconds or _LIFETIME)

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Removes the value; whether there was one."""
        with discreet():
            return await self._field_of(key, collection).drop()

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

    def _field_of(self, key: str, collection: str | None) -> RecordField:
        name = json.dumps([collection, key])
        field = FIELD + identity(name)
        whose, colon, _ = key.partition(":")
        session, request = current_session(), _request.get()
        if colon and session is not None and whose == session.id:
            return _InOpening(session, session.opening, field) if session.opening else _InSession(session, field)
        server = self._server_of(session, request)
        own = _Own(self._store, FIELD + identity(server, name), field, self._room)
        if colon and request is not None and whose == _name_of_request():
            return _InRequest(request, field, own)
        return own

    def _server_of(self, session: LiveSession | None, request: _Request | None) -> str:
        """Identity of the server whose work this is: several in one process may be built with this store."""
        if session is not None:
            return session.services.served.identity
        if request is not None:
            return request.server
        # A background task's.
        context = _fastmcp_context()
        named = "" if context is None else identity(context.fastmcp.name)
        return named if named in self._servers else next(iter(self._servers), "")


def _fastmcp_context() -> Any:
    """What FastMCP knows of the request or task that runs here, if anything."""
    fastmcp = sys.modules.get("fastmcp.server.dependencies")
    if fastmcp is None:
        return None
    try:
        return fastmcp.get_context()
    except RuntimeError:
        return None


def _name_of_request() -> str | None:
    """The name under which FastMCP keeps what belongs to the request that is served here."""
    context = _fastmcp_context()
    return None if context is None else context.session_id


def _principal() -> bytes:
    """Whose work this is. FastMCP knows it also of a background task."""
    fastmcp = sys.modules.get("fastmcp.server.dependencies")
    token = get_access_token() if fastmcp is None else fastmcp.get_access_token()
    return b"" if token is None else principal_of({"user": AuthenticatedUser(token)})


class RecordField(Protocol):
    """A field of a record."""

    field: str

    async def load(self) -> Mapping[str, bytes] | None:
        """The fields of the record; None if the record is not there."""
        ...

    async def put(self, data: bytes, *, lifetime: float) -> None:
        """Gives the field this value, and a record of its own that lifetime at least."""
        ...

    async def drop(self) -> bool:
        """Removes the field; whether it was there."""
        ...


class _InSession:
    """A field of the record of the session that the request was admitted to."""

    def __init__(self, session: LiveSession, field: str) -> None:
        self.field = field
        self._store = session.services.store
        self._key = session.key
        self._limit = session.services.settings.max_state_bytes

    async def load(self) -> Mapping[str, bytes] | None:
        try:
            return (await self._store.load(self._key, renew=False)).fields
        except SessionNotFound:
            return None

    async def put(self, data: bytes, *, lifetime: float) -> None:
        def changes(fields: Mapping[str, bytes]) -> dict[str, bytes | None]:
            _check_size(self.field, data, fields, self._limit)
            return {self.field: data}

        await change_fields(self._store, self._key, changes)

    async def drop(self) -> bool:
        was_there = False

        def changes(fields: Mapping[str, bytes]) -> dict[str, bytes | None]:
            nonlocal was_there
            there = self.field in fields
            # Seen once, it counts: should the answer to its removal be lost, the next look finds nothing.
            was_there = was_there or there
            return {self.field: None} if there else {}

        try:
            await change_fields(self._store, self._key, changes)
        except SessionNotFound:
            pass
        return was_there


class _InOpening:
    """A field of the record that a session which is being opened will have: a failed one leaves nothing (P2)."""

    def __init__(self, session: LiveSession, opening: BeforeOpen, field: str) -> None:
        self.field = field
        self._fields = opening.fields
        self._limit = session.services.settings.max_state_bytes

    async def load(self) -> Mapping[str, bytes] | None:
        return self._fields

    async def put(self, data: bytes, *, lifetime: float) -> None:
        _check_size(self.field, data, self._fields, self._limit)
        self._fields[self.field] = data

    async def drop(self) -> bool:
        return self._fields.pop(self.field, None) is not None


class _Own:
    """The field of a record that a value has for itself."""

    def __init__(self, store: GuardedStore, key: str, field: str, room: Allowance) -> None:
        self.field = field
        self._store = store
        self._key = key
        self._room = room

    async def load(self) -> Mapping[str, bytes] | None:
        try:
            return (await self._store.load(self._key)).fields
        except SessionNotFound:
            return None

    async def put(self, data: bytes, *, lifetime: float) -> None:
        _check_size(self.field, data, {}, MAX_STATE)
        for _ in range(_TRIES):
            fields = await self.load()
            try:
                if fields is None:
                    await self._create(data, lifetime)
                else:
                    await self._replace(data, max(lifetime, float(fields.get(LIFETIME, b"0"))))
            except (AlreadyExists, SessionNotFound):
                continue
            return
        raise StoreUnavailable("a value's record kept ending while it was written")

    async def _create(self, data: bytes, lifetime: float) -> None:
        fields = {self.field: data, LIFETIME: str(lifetime).encode()}
        try:
            await self._store.create(self._key, fields, lifetime=lifetime, limits=self._room.limits(_principal()))
        except TooManySessions as error:
            whose = "the store keeps" if error.group == _EVERYBODY else "of this user the store keeps"
            setting = "max_state_records" if error.group == _EVERYBODY else "max_state_records_per_principal"
            raise StateFull(
                f"{whose} as many values as it may ({setting}): end sessions that are not needed any more, or wait "
                "until some have expired"
            ) from None

    async def _replace(self, data: bytes, lifetime: float) -> None:
        changes = {self.field: data, LIFETIME: str(lifetime).encode()}
        await self._store.update(self._key, changes, lifetime=lifetime)

    async def drop(self) -> bool:
        return await self._store.delete(self._key)


class _InRequest:
    """What a request without a session keeps for itself: nobody else asks for it but a task that it begins."""

    def __init__(self, request: _Request, field: str, own: _Own) -> None:
        self.field = field
        self._request = request
        self._own = own

    async def load(self) -> Mapping[str, bytes] | None:
        return self._request.values

    async def put(self, data: bytes, *, lifetime: float) -> None:
        _check_size(self.field, data, self._request.values, MAX_STATE)
        self._request.values[self.field] = data
        if not self._request.travels:
            return
        try:
            await self._own.put(data, lifetime=lifetime)
        except StateFull as error:
            logger.warning(
                "background tasks do not find what the request that began them kept (ctx.set_state()): %s", error
            )

    async def drop(self) -> bool:
        if self._request.travels:
            await self._own.drop()
        return self._request.values.pop(self.field, None) is not None


def _check_size(name: str, data: bytes, fields: Mapping[str, bytes], limit: int) -> None:
    check_size({name: data for name, data in fields.items() if name.startswith(FIELD)}, {name: data}, limit)


def _pack(value: Mapping[str, Any], seconds: float | None) -> bytes:
    kept: dict[str, Any] = {"value": dict(value)}
    if seconds is not None:
        kept["until"] = time.time() + seconds
    if (data := encoded(kept)) is None:
        raise StateNotJSON("session state has to be JSON: other nodes could not load this value")
    return data


def _unpack(data: bytes | None) -> tuple[dict[str, Any] | None, float | None]:
    if data is None:
        return None, None
    kept = json.loads(data)
    if "until" not in kept:
        return kept["value"], None
    left = kept["until"] - time.time()
    return (kept["value"], left) if left > 0 else (None, None)
