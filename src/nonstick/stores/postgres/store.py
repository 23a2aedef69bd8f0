"""Sessions in PostgreSQL: every method is one call of one function, and so one transaction.

store.sql holds the tables and the functions, and says what they rely on; 2.sql what changed since. The modules beside
this one: `url` and `options` read the URL, `schema` makes and checks the tables, `pool` has the connections,
`functions` makes the calls, `history` says whether "gone" is believed, `news` wakes. docs/why/asyncpg.md says why the
driver is asyncpg.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any, Final, Self

from nonstick.errors import (
    AlreadyExists,
    ConfigurationError,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StoreError,
    StoreUnavailable,
    StreamClosed,
    TooManySessions,
    Trimmed,
)
from nonstick.store import (
    FRESH_SHARE,
    MAX_CLIP,
    MAX_READ_BYTES,
    NEW_STREAM,
    Appended,
    Batch,
    Cursor,
    Event,
    Lease,
    Loaded,
    News,
    Skimmed,
    Wake,
)
from nonstick.stores.common.bounds import NOT_OPENED, check_bounds, check_places
from nonstick.stores.common.upkeep import Finding, Plan, Step
from nonstick.stores.postgres import examine as postgres_examine
from nonstick.stores.postgres.functions import MIGRATE_SECONDS, Functions
from nonstick.stores.postgres.lease import lease_on
from nonstick.stores.postgres.news import Wakes
from nonstick.stores.postgres.pool import TROUBLE, connected, refusal
from nonstick.stores.postgres.schema import plan, prepare
from nonstick.stores.postgres.url import Address
from nonstick.waiting import background

__all__ = ["PostgresStore", "migrate"]

logger = logging.getLogger("nonstick.store")

_DICE: Final = random.SystemRandom()
"""Not the global one, whose state tests of random programs depend on."""

_TOUCHES: Final = 500
_SWEEP: Final = 200
_MOST: Final = 2**63 - 1
"""Beyond any position: the largest number that the server knows."""

_REFUSALS: Final[dict[str, type[StoreError]]] = {
    "gone": SessionNotFound,
    "exists": AlreadyExists,
    "closed": StreamClosed,
    "fenced": Fenced,
    "not pending": NotPending,
    "diverged": Diverged,
}


async def migrate(url: str, *, timeout: float = MIGRATE_SECONDS) -> None:
    """Makes the tables and functions of the store that `url` names, or upgrades them; does nothing if all is well.

    Raises:
        ConfigurationError: The URL cannot work, or the schema is newer than this code.
        StoreUnavailable: It could not be reached, or refused.
    """
    await _prepare(Address.parse(url), timeout=timeout)


async def _prepare(address: Address, *, timeout: float, done: Callable[[Step], None] = lambda _: None) -> None:
    address = address.direct()
    try:
        async with asyncio.timeout(timeout), connected(address, timeout=timeout) as connection:
            await prepare(connection, address, migrate=True, done=done)
    except TROUBLE as error:
        raise refusal(error) from None


class PostgresStore:
    """The store protocol over one PostgreSQL database, under one schema name of it.

    Args:
        url: `postgresql://[user[:password]@]host[:port]/database`, with the options of the driver and of libpq as
            query parameters (`sslmode`, `target_session_attrs`, several hosts), and those below but the last four.
        schema: The PostgreSQL schema that holds everything, and the channel of the news. It is made on first use.
            Deployments that share a database need different ones.
        listen_dsn: Where to LISTEN, when `url` leads through a pooler that pools transactions; leases go there too.
        prepared: Use prepared statements. Without, each call takes two round trips: only for a pooler that does not
            know them (PgBouncer before 1.21, or with `max_prepared_statements=0`).
        unlogged: When the tables are made: unlogged. Faster, not replicated, and empty after a crash of the server.
        pool_size: Connections at most, besides the one that listens and the lease's.
        migrate: Make and upgrade the tables as needed. Else that is refused, and left to `nonstick migrate`.
        empty_grace: Seconds for which a database that has lost its data is not believed when it says that a session is
            gone: somebody may bring the data back (P15).
        timeout: Seconds that any call waits for its answer, connecting included.
        max_waiting: Calls that may be under way at once; beyond that they fail immediately (P10).
        heartbeat: Seconds between two proofs of life on the connection that listens.
        sweep_interval: Seconds, about, between two looks for sessions that have expired.

    Raises:
        ConfigurationError: The URL or an option cannot work. On entering: the schema is of a newer version, or is
            missing and not to be made.
    """

    def __init__(
        self,
        url: str,
        *,
        schema: str | None = None,
        listen_dsn: str | None = None,
        prepared: bool | None = None,
        unlogged: bool | None = None,
        pool_size: int | None = None,
        migrate: bool | None = None,
        empty_grace: float | None = None,
        timeout: float = 2.0,
        max_waiting: int = 10_000,
        heartbeat: float = 3.0,
        sweep_interval: float = 5.0,
    ) -> None:
        self._address = Address.parse(
            url,
            schema=schema,
            listen_dsn=listen_dsn,
            prepared=prepared,
            unlogged=unlogged,
            pool_size=pool_size,
            migrate=migrate,
            empty_grace=empty_grace,
        )
        self._timeout = timeout
        self._sweep_interval = sweep_interval
        self._functions = Functions(self._address, timeout=timeout, max_waiting=max_waiting)
        self._wakes = Wakes(
            self._address.direct(), notify=self._functions.notify, connect_timeout=timeout, interval=heartbeat
        )
        self._keeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"PostgresStore({self.url!r}, schema={self._address.schema!r})"

    @property
    def namespace(self) -> str:
        """What sets this deployment's tables apart in the database."""
        return self._address.schema

    @property
    def url(self) -> str:
        """Where it is, without any credentials: fit for logs."""
        return self._address.url

    async def __aenter__(self) -> Self:
        self._functions.open()
        try:
            await self._functions.prepared()
        except StoreUnavailable as error:
            logger.warning("%s: %s", self.url, error)  # the calls try again, and say so
        except BaseException:
            await self._functions.close()
            raise
        self._keeper = background.spawn(self._keep(), name="nonstick: keep PostgreSQL")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.wait([self._keeper])
        await self._wakes.close(self._timeout)
        await self._functions.close()

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        groups = dict(limits or {})
        arguments = (key, lifetime, *_columns(fields), *_columns(groups))
        deadline = asyncio.get_running_loop().time() + self._timeout
        while asyncio.get_running_loop().time() < deadline:
            outcome, group, *_ = (await self._functions.call("create", *arguments))[0]
            match outcome:
                case "ok":
                    return
                case "full":
                    raise TooManySessions(group)
                case "bury":
                    await self._functions.call("delete", key)
                case "sweep":
                    # Whatever is due has expired or is looked at later. If nothing was done, others are at it.
                    if not (await self._functions.call("sweep", _SWEEP))[0][0]:
                        await asyncio.sleep(0.01)
                case _:
                    raise _REFUSALS[outcome]
        raise StoreUnavailable("the store is busy removing expired sessions")

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        share = FRESH_SHARE if renew else 1.0
        live, names, values, position, tag, cancels, size, count, *_ = (await self._functions.call("load", key, share))[
            0
        ]
        if not live:
            raise SessionNotFound
        fields = dict(zip(names or (), values or (), strict=True))
        return Loaded(fields, Cursor(position, tag), frozenset(map(_from_bytes, cancels)), size, count)

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        written = (await self._functions.call("update", key, *_columns(changes), *_columns(expect or {}), lifetime))[0][
            0
        ]
        if written is None:
            raise SessionNotFound
        return bool(written)

    async def touch(self, keys: Collection[str]) -> None:
        waiting = list(keys)
        while waiting:
            some, waiting = waiting[:_TOUCHES], waiting[_TOUCHES:]
            await self._functions.call("touch", some)

    async def delete(self, key: str) -> bool:
        # Announced also when nothing was there: the first attempt's answer may have been lost.
        rows = await self._functions.call("delete", key, done=lambda _: self._wakes.announce(key, None))
        return bool(rows[0][0])

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        if batch.stream == NEW_STREAM and not batch.events:
            raise ValueError(NOT_OPENED)
        rows = await self._functions.call(
            "extend",
            key,
            batch.writer,
            batch.sequence,
            batch.stream,
            batch.attempt,
            batch.take_over,
            batch.terminal,
            [event.tag for event in batch.events],
            [event.data for event in batch.events],
            [_to_bytes(request) for request in batch.expect],
            *map(_maybe_to_bytes, (batch.answers, batch.settle, batch.cancel, batch.uncancel)),
            *_columns(batch.fields),
            done=lambda rows: self._appended(key, batch, rows[0]),
        )
        outcome, first, size, count, *_ = rows[0]
        if outcome in _REFUSALS:
            raise _REFUSALS[outcome]
        return Appended(first, outcome == "duplicate", size, count)

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        check_bounds(limit=limit, max_bytes=max_bytes)
        rows = await self._rows_after("read", key, after, limit, max_bytes)
        return [Event(position, tag, stream, data) for _, position, tag, stream, data, *_ in rows]

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        check_bounds(limit=limit, clip=clip)
        rows = await self._rows_after("skim", key, after, limit, clip)
        return [Skimmed(Event(position, tag, stream, data), size) for _, position, tag, stream, data, size, *_ in rows]

    async def _rows_after(self, name: str, key: str, after: Cursor, *bounds: int) -> list[Any]:
        rows = await self._functions.call(name, key, min(after.position, _MOST), after.tag, *bounds)
        outcome = rows[0][0] if rows else None
        if outcome == "trimmed":
            raise Trimmed(rows[0][1])
        if outcome is not None:
            raise _REFUSALS[outcome]
        return rows

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        await self._functions.call("trim", key, list(streams), standalone_before)

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        """See `nonstick.store.TellsStale`."""
        check_places(places)
        positions = [min(place.position, _MOST) for place in places.values()]
        tags = [place.tag for place in places.values()]
        return set((await self._functions.call("stale", list(places), positions, tags))[0][0])

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return self._wakes.watch(key, wake)

    # ---- nodes and the store itself

    def lease(self, node: str) -> Lease:
        return lease_on(self._address.direct(), node)

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        if not nodes:
            return set()
        return set(nodes) - set((await self._functions.call("live", list(nodes)))[0][0])

    async def ping(self) -> None:
        await self._functions.call("ping")

    # ---- upkeep

    async def examine(self) -> list[Finding]:
        """See `nonstick.stores.common.upkeep.Examinable`."""
        return await postgres_examine.examine(self._address, timeout=self._timeout)

    async def plan(self) -> Plan:
        """See `nonstick.stores.common.upkeep.Migratable`."""
        address = self._address.direct()
        try:
            async with asyncio.timeout(self._timeout), connected(address, timeout=self._timeout) as connection:
                return await plan(connection, address)
        except TROUBLE as error:
            raise refusal(error) from None

    async def migrate(self, done: Callable[[Step], None]) -> None:
        """See `nonstick.stores.common.upkeep.Migratable`."""
        await _prepare(self._address, timeout=MIGRATE_SECONDS, done=done)

    # ---- inside

    def _appended(self, key: str, batch: Batch, answer: Any) -> None:
        """Announces what an append wrote; of a duplicate, whose first announcement may be lost, that there was one."""
        outcome, first, _, _, before, *_ = answer
        if outcome == "duplicate":
            self._wakes.announce(key, None)
        elif outcome == "ok" and batch.events:
            stream = first if batch.stream == NEW_STREAM else batch.stream
            events = [Event(first + n, tag, stream, data) for n, (tag, data) in enumerate(batch.events)]
            self._wakes.announce(key, News(Cursor(first - 1, before), events))

    async def _keep(self) -> None:
        """Removes what has expired, in small batches. Every process does, and they do not wait for each other."""
        while True:
            await asyncio.sleep(self._sweep_interval * _DICE.uniform(0.5, 1.5))
            self._functions.close_idle()
            try:
                while (await self._functions.call("sweep", _SWEEP))[0][0]:
                    pass
            except (StoreUnavailable, ConfigurationError) as error:
                logger.debug("%s could not be swept: %s", self.url, error)  # calls report its trouble


# ---- between Python and the functions


def _columns(pairs: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    return list(pairs), list(pairs.values())


def _to_bytes(request: str) -> bytes:
    return request.encode("utf-8", "surrogatepass")


def _maybe_to_bytes(request: str | None) -> bytes | None:
    return None if request is None else _to_bytes(request)


def _from_bytes(request: bytes) -> str:
    return request.decode("utf-8", "surrogatepass")
