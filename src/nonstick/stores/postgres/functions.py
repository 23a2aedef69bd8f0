"""Calls of the functions in store.sql, and one query: each is one statement, and so one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from nonstick.errors import StoreUnavailable
from nonstick.stores.postgres.history import History, make_mark, mark_at
from nonstick.stores.postgres.pool import STANDBY, Pool, SchemaMissing
from nonstick.stores.postgres.schema import prepare
from nonstick.stores.postgres.url import Address
from nonstick.waiting import background

if TYPE_CHECKING:
    from nonstick.stores.postgres.pool import Connection

__all__ = ["MIGRATE_SECONDS", "Functions"]

MIGRATE_SECONDS: Final = 60.0
"""How long to make or upgrade the tables may take, waiting for others that do so included."""

_ARGUMENTS: Final = {
    "create": 6,
    "load": 2,
    "update": 6,
    "touch": 1,
    "delete": 1,
    "sweep": 1,
    "extend": 16,
    "read": 5,
    "skim": 5,
    "trim": 3,
    "live": 1,
    "ping": 0,
}

_SAYS_GONE: Final = {
    "load": "NOT f.live",
    "update": "f.f IS NULL",
    "delete": "NOT f.f",
    "extend": "f.outcome = 'gone'",
    "read": "f.outcome = 'gone'",
    "skim": "f.outcome = 'gone'",
    "live": "true",
}
"""When an answer says that something is gone. It then has the database's mark in its last column, "" for none."""

_STALE: Final = """(
    SELECT coalesce(array_agg(p.key), '{}') AS keys
    FROM unnest($1::text[], $2::bigint[], $3::bytea[]) AS p (key, head, tag)
    LEFT JOIN nonstick.session s ON s.key = p.key AND s.expires_at > extract(epoch FROM clock_timestamp())
    WHERE s.head IS DISTINCT FROM p.head OR (p.tag <> '' AND s.tag <> p.tag)
)"""
"""No function: it came after the schema's last version, and needs nothing that version 1 does not have."""


class Functions:
    """Calls the functions, once there are any. What is gone counts only if the database can know that (P15).

    Args:
        timeout: Seconds that a call may take, making the tables not included.
        max_waiting: Calls that may be under way at once.
    """

    def __init__(self, address: Address, *, timeout: float, max_waiting: int) -> None:
        self._address = address
        self._timeout = timeout
        self._max_waiting = max_waiting
        schema = f'"{address.schema}"'
        self._statements = {
            name: _statement(schema, f"{schema}.{name}({', '.join(f'${n}' for n in range(1, count + 1))})", name)
            for name, count in _ARGUMENTS.items()
        }
        self._statements["stale"] = _statement(schema, _STALE.replace("nonstick", schema), "stale")
        self._pool: Pool | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._history = History(
            address.url,
            look=lambda: self._opened.use(self._mark_at),
            make=lambda: self._opened.use(self._make_mark),
            grace=address.empty_grace,
        )

    def open(self) -> None:
        """Prepares to connect; from now on calls can be made, in this event loop."""
        if self._pool is not None:
            raise RuntimeError("a store is entered once")
        self._pool = Pool(self._address, timeout=self._timeout, max_waiting=self._max_waiting)

    async def close(self) -> None:
        """Ends every task, waits for the calls that are under way, and closes every connection."""
        await self._history.close()
        await self._opened.close()
        if self._preparing is not None:
            await asyncio.wait([self._preparing])

    @property
    def _opened(self) -> Pool:
        if self._pool is None:
            raise RuntimeError("the store is not open: use `async with PostgresStore(...) as store`")
        return self._pool

    async def call(self, name: str, *args: object, done: Callable[[list[Any]], None] | None = None) -> list[Any]:
        """The rows that this function answers. A call that found no function has not run: it is made again.

        Args:
            done: Gets the rows too, even when the caller has been cancelled since.

        Raises:
            ConfigurationError: As `prepared`.
            StoreUnavailable: There is no answer, or one that says "gone" and is not believed.
        """
        pool = self._opened
        await self.prepared()
        try:
            rows = await pool.fetch(self._statements[name], *args, done=done)
        except SchemaMissing:
            self._preparing = None
            await self.prepared()
            rows = await pool.fetch(self._statements[name], *args, done=done)
        if rows and (mark := rows[0][-1]) is not None:
            self._history.check(mark or None)
        return rows

    async def notify(self, payloads: list[str]) -> None:
        """Sends these to all that listen on the deployment's channel, in one transaction."""
        query = "SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload"
        await self._opened.fetch(query, self._address.schema, payloads)

    def close_idle(self) -> None:
        """Closes connections that nobody has used for a while."""
        self._opened.close_idle()

    async def prepared(self) -> None:
        """Returns once the schema has been looked at, which is done once, for all who wait for it.

        Raises:
            ConfigurationError: It cannot be used. Each call asks anew: somebody may have put it right.
            StoreUnavailable: It could not be looked at yet.
        """
        task = self._preparing
        if task is None:
            self._preparing = task = background.spawn(self._prepare())
        if not task.done():
            await asyncio.wait([task], timeout=self._timeout)
            if not task.done():
                raise StoreUnavailable("the store's tables are still being made, or their maker is waited for")
        if error := task.exception():
            if self._preparing is task:
                self._preparing = None
            raise type(error)(*error.args)

    async def _prepare(self) -> None:
        async def work(connection: Connection) -> None:
            await prepare(connection, self._address, migrate=self._address.migrate)
            if self._history.known is None:
                self._history.known = await self._mark_at(connection) or await self._make_mark(connection)

        await self._opened.use(work, timeout=MIGRATE_SECONDS)

    async def _mark_at(self, connection: Connection) -> str | None:
        return await mark_at(connection, self._address.schema)

    async def _make_mark(self, connection: Connection) -> str:
        return await make_mark(connection, self._address.schema)


def _statement(schema: str, source: str, name: str) -> str:
    """What this gives: a call or a query. It also tells, for `Pool.fetch`, whether a standby answers."""
    # In the same statement, so in the same server.
    return (
        f"SELECT f.*, pg_is_in_recovery() AS {STANDBY}, "  # noqa: S608 - checked name
        f"CASE WHEN {_SAYS_GONE.get(name, 'false')} THEN "
        f"coalesce((SELECT m.mark FROM {schema}.mark m), '') END AS mark "
        f"FROM {source} AS f"
    )
