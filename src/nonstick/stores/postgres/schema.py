"""The tables and functions of a PostgreSQL store: makes them, and says what is wrong with those that are there."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from typing import TYPE_CHECKING, Final

import asyncpg

from nonstick.errors import ConfigurationError
from nonstick.store import CANCEL_SECONDS, FRESH_SHARE, MAX_CANCELS, WRITER_SECONDS
from nonstick.stores.common.upkeep import Plan, Step
from nonstick.stores.postgres.url import Address

if TYPE_CHECKING:
    from nonstick.stores.postgres.pool import Connection

__all__ = ["READ_BYTES", "VERSION", "plan", "prepare", "version"]

READ_BYTES: Final = 1 << 20
"""A `read` stops after about as many bytes: its rows are gathered in the server's memory first."""

_STEPS: Final = ("store.sql", "2.sql")
"""The n-th script leads from version n - 1 to n. Released ones do not change; nodes of the last release go on working
after them (P12), or `_OLDEST` says that they cannot."""

VERSION: Final = len(_STEPS)
"""The newest version that this code knows."""

_OLDEST: Final = 1
"""The oldest code, by its VERSION, that can use a schema of this version."""

_CONSTANTS: Final = {
    "CANCEL_SECONDS": CANCEL_SECONDS,
    "WRITER_SECONDS": WRITER_SECONDS,
    "MAX_CANCELS": MAX_CANCELS,
    "FRESH_SHARE": FRESH_SHARE,
    "READ_BYTES": READ_BYTES,
}

_LOCK: Final = 0x6E6F6E737469636B
"""The advisory lock of those who make or change a schema: the letters of "nonstick"."""


async def prepare(
    connection: Connection, address: Address, *, migrate: bool, done: Callable[[Step], None] = lambda _: None
) -> None:
    """Returns once the schema is one that this code can use; with `migrate` makes or upgrades it first.

    Several that do so at once are fine: one does it, the others wait for it. `done` is told of each step.

    Raises:
        ConfigurationError: The schema is newer than this code can use, or not there and not to be made.
    """
    if await version(connection, address) >= VERSION:
        return
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        raise asyncpg.ReadOnlySQLTransactionError("a standby, whose primary may have them")
    if not migrate:
        raise ConfigurationError(
            f"the store's schema {address.schema!r} is not there or too old: run `nonstick migrate --store URL`"
        )
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        for step in (await plan(connection, address)).steps:
            await connection.execute(step.sql)
            done(step)


async def plan(connection: Connection, address: Address) -> Plan:
    """What separates the schema from the one that this code makes.

    Raises:
        ConfigurationError: The schema is newer than this code can use.
    """
    name = address.schema
    current = await version(connection, address)
    steps = [Step(f"version {n}", _script(script, address)) for n, script in enumerate(_STEPS, 1) if n > current]
    if not current and not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", name):
        # Not with IF NOT EXISTS, which wants the permission even where there is nothing to do.
        steps.insert(0, Step(f"schema {name}", f'CREATE SCHEMA "{name}";'))
    if steps:
        note = (
            f'INSERT INTO "{name}".meta (version, oldest) VALUES ({VERSION}, {_OLDEST}) '  # noqa: S608 - checked name
            "ON CONFLICT (only_row) DO UPDATE SET version = excluded.version, oldest = excluded.oldest;"
        )
        steps.append(Step(f"note that it has version {VERSION}", note))
    return Plan(f"schema {name}", current, VERSION, steps)


async def version(connection: Connection, address: Address) -> int:
    """The schema's version; 0 if it is not there.

    Raises:
        ConfigurationError: It is newer than this code can use.
    """
    there = await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", f"{address.schema}.meta")
    row = there and await connection.fetchrow(f'SELECT version, oldest FROM "{address.schema}".meta')  # noqa: S608
    if not row:
        return 0
    if row["oldest"] > VERSION:
        raise ConfigurationError(
            f"the store's schema {address.schema!r} has version {row['version']}, for newer releases: "
            "upgrade nonstick, or name another schema"
        )
    found: int = row["version"]
    return found


def _script(name: str, address: Address) -> str:
    text = (resources.files("nonstick.stores.postgres") / name).read_text()
    for constant, value in _CONSTANTS.items():
        text = re.sub(rf"\b{constant}\b", str(value), text)
    if address.unlogged:
        # But for `meta`: after a crash the schema is to be known, and its tables empty.
        text = re.sub(r"^CREATE TABLE (?!nonstick\.meta\b)", "CREATE UNLOGGED TABLE ", text, flags=re.MULTILINE)
    return text.replace("nonstick.", f'"{address.schema}".')
