"""What can be wrong with a PostgreSQL server, the way to it, and the schema in it."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from nonstick.errors import ConfigurationError
from nonstick.stores.common.clocks import clock_finding
from nonstick.stores.common.upkeep import Finding
from nonstick.stores.postgres.pool import TROUBLE, connected, refusal
from nonstick.stores.postgres.schema import plan
from nonstick.stores.postgres.url import Address

if TYPE_CHECKING:
    from nonstick.stores.postgres.pool import Connection

__all__ = ["examine"]

OLDEST: Final = 14
"""Major versions before this one get no fixes any more."""

_BESIDES: Final = 2
"""Connections of a process besides its pool's: the one that listens and the lease's."""

_SETTINGS: Final = (
    "server_version",
    "server_version_num",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "synchronous_commit",
    "fsync",
)

_TABLES: Final = """
SELECT c.relname FROM pg_class c
WHERE c.relnamespace = to_regnamespace($1) AND c.relkind = 'r'
AND NOT (has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
    AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE'))
ORDER BY c.relname
"""
_FUNCTIONS: Final = """
SELECT p.proname FROM pg_proc p
WHERE p.pronamespace = to_regnamespace($1) AND NOT has_function_privilege(p.oid, 'EXECUTE') ORDER BY p.proname
"""
_UNLOGGED: Final = """
SELECT count(*) FROM pg_class WHERE relnamespace = to_regnamespace($1) AND relkind = 'r' AND relpersistence = 'u'
"""
_FREE: Final = """
SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
    - (SELECT sum(numbackends) FROM pg_stat_database)::int
"""


async def examine(address: Address, *, timeout: float) -> list[Finding]:
    """Everything about the server behind this address. Makes nothing and changes nothing there.

    Raises:
        ConfigurationError: The URL has options that the driver refuses.
        StoreUnavailable: It cannot be reached, or lets nobody in.
    """
    try:
        async with asyncio.timeout(10 * timeout), connected(address, timeout=timeout) as connection:
            settings = {name: await connection.fetchval("SELECT current_setting($1)", name) for name in _SETTINGS}
            findings = [
                _version(settings),
                await _role(connection, settings),
                await _clock(connection),
                _isolation(settings),
                _durability(settings),
                *await _way(connection, address, timeout),
                await _schema(connection, address),
            ]
            if not findings[-1].blocks:
                findings += [await _permissions(connection, address.schema), await _unlogged(connection, address)]
            return findings
    except TROUBLE as error:
        raise refusal(error) from None


def _version(settings: dict[str, str]) -> Finding:
    text = f"PostgreSQL {settings['server_version']}"
    if int(settings["server_version_num"]) < OLDEST * 10_000:
        advice = (
            f"Upgrade the server: nonstick is not tested with anything before {OLDEST}, which gets no fixes either."
        )
        return Finding("warning", "version", text, advice)
    return Finding("ok", "version", text)


async def _role(connection: Connection, settings: dict[str, str]) -> Finding:
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        advice = "Point the URL at the primary, or name all servers and add target_session_attrs=read-write."
        return Finding("error", "role", "a hot standby: it refuses every write", advice, blocks=True)
    if settings["default_transaction_read_only"] == "on":
        advice = "ALTER ROLE … SET default_transaction_read_only = off, for the user of this URL."
        return Finding("error", "role", "transactions are read-only here", advice, blocks=True)
    return Finding("ok", "role", "primary")


async def _clock(connection: Connection) -> Finding:
    before = time.time()
    theirs: float = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
    return clock_finding(theirs, before, time.time())


def _isolation(settings: dict[str, str]) -> Finding:
    level = settings["default_transaction_isolation"]
    if level == "read committed":
        return Finding("ok", "isolation", level)
    advice = "ALTER ROLE … SET default_transaction_isolation = 'read committed', for the user of this URL."
    return Finding("error", "isolation", f"{level}: appends of two nodes to one session would fail", advice)


def _durability(settings: dict[str, str]) -> Finding:
    if settings["fsync"] == "off":
        advice = "Set fsync = on, unless the data may be lost: a crash of the machine can damage all of the server's."
        return Finding("warning", "durability", "fsync is off", advice)
    if settings["synchronous_commit"] == "off":
        text = "synchronous_commit is off: a crash of the server loses the last moments, which clients are told"
        advice = "ALTER ROLE … SET synchronous_commit = on, if nothing that was acknowledged may be lost."
        return Finding("warning", "durability", text, advice)
    return Finding("ok", "durability", f"synchronous_commit is {settings['synchronous_commit']}")


# ---- the way to the server


async def _way(connection: Connection, address: Address, timeout: float) -> list[Finding]:
    """What stands between, whether LISTEN gets through, and how many connections are left."""
    # A pooler makes up what it tells of the process behind the connection.
    pooled = connection.get_server_pid() != await connection.fetchval("SELECT pg_backend_pid()")
    return [
        _pooler(address, pooled=pooled),
        await _listen(connection, address, timeout),
        await _room(connection, address),
    ]


def _pooler(address: Address, *, pooled: bool) -> Finding:
    if not pooled:
        return Finding("ok", "pooler", "none")
    if address.listen_dsn is not None:
        return Finding("ok", "pooler", "there is one, and listen_dsn leads past it")
    advice = "Add listen_dsn=postgresql%3A%2F%2F… (percent-encoded) to the URL: a DSN that leads to the server itself."
    return Finding("warning", "pooler", "there is one, and no listen_dsn that leads past it", advice)


async def _listen(connection: Connection, address: Address, timeout: float) -> Finding:
    """Whether what is announced by the store's connections is heard where it listens. On a channel of its own."""
    channel = f"nonstick_doctor_{secrets.token_hex(8)}"
    heard = asyncio.Event()
    try:
        async with connected(address.direct(), timeout=timeout) as listener:
            await listener.add_listener(channel, lambda *_: heard.set())
            sent = time.perf_counter()
            await connection.execute("SELECT pg_notify($1, '')", channel)
            async with asyncio.timeout(timeout):
                await heard.wait()
            return Finding("ok", "listen", f"NOTIFY was heard after {1000 * (time.perf_counter() - sent):.1f} ms")
    except TimeoutError:
        text = "NOTIFY is not heard: LISTEN does not get through to the same database"
    except (*TROUBLE, ConfigurationError) as error:
        reason = error if isinstance(error, ConfigurationError) else refusal(error)
        text = f"cannot listen: {reason}"
    where = "listen_dsn has to" if address.listen_dsn else "give a listen_dsn that does"
    advice = f"{where} lead to the server itself and to the same database. Until then nodes learn of news by asking."
    return Finding("error", "listen", text, advice[0].upper() + advice[1:])


async def _room(connection: Connection, address: Address) -> Finding:
    free: int = await connection.fetchval(_FREE)
    text = f"{free} free; a process uses up to {address.pool_size + _BESIDES}"
    if free < address.pool_size + _BESIDES:
        advice = "Lower pool_size in the URL, raise the server's max_connections, or put a pooler in between."
        return Finding("warning", "connections", text, advice)
    return Finding("ok", "connections", text)


# ---- the schema


async def _schema(connection: Connection, address: Address) -> Finding:
    try:
        found = await plan(connection, address)
    except ConfigurationError as error:
        return Finding("error", "schema", str(error), "Upgrade nonstick, or name another schema.", blocks=True)
    except TROUBLE as error:
        grant = f"GRANT USAGE ON SCHEMA {address.schema} and all rights on its tables to the user of this URL."
        return Finding("error", "schema", f"it cannot be looked at: {refusal(error)}", grant, blocks=True)
    if not found.steps:
        return Finding("ok", "schema", str(found))
    made = "Run `nonstick migrate --store URL`"
    if not address.migrate:
        return Finding("error", "schema", str(found), f"{made}: with migrate=false no node does it.", blocks=True)
    if not found.version and not await _may_make(connection, address.schema):
        text = f"{found}; the user of this URL may not make them"
        return Finding(
            "error", "schema", text, f"{made} with a user who may, then grant this one its use.", blocks=True
        )
    return Finding("warning", "schema", str(found), f"{made}, or let the first node do it.", blocks=True)


async def _may_make(connection: Connection, schema: str) -> bool:
    """Whether this user may make the schema, or the tables in it where it is there."""
    allowed: bool = await connection.fetchval(
        "SELECT CASE WHEN to_regnamespace($1) IS NULL THEN has_database_privilege(current_database(), 'CREATE') "
        "ELSE has_schema_privilege($1, 'CREATE') END",
        schema,
    )
    return allowed


async def _permissions(connection: Connection, schema: str) -> Finding:
    user: str = await connection.fetchval("SELECT current_user")
    grants: list[str] = []
    if not await connection.fetchval("SELECT has_schema_privilege($1, 'USAGE')", schema):
        grants.append(f"GRANT USAGE ON SCHEMA {schema}")
    tables, functions = await _names(connection, _TABLES, schema), await _names(connection, _FUNCTIONS, schema)
    if tables:
        grants.append(f"GRANT ALL ON ALL TABLES IN SCHEMA {schema}")
    if functions:
        grants.append(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema}")
    if not grants:
        return Finding("ok", "permissions", f"the user {user} may use the schema, its tables and its functions")
    lacks = ", ".join([*tables, *(f"{name}()" for name in functions)]) or f"the schema {schema}"
    advice = " ".join(f'{grant} TO "{user}";' for grant in grants)
    return Finding("error", "permissions", f"the user {user} may not use {lacks}", advice)


async def _names(connection: Connection, query: str, schema: str) -> list[str]:
    rows: list[Any] = await connection.fetch(query, schema)
    return [row[0] for row in rows]


async def _unlogged(connection: Connection, address: Address) -> Finding:
    if await connection.fetchval(_UNLOGGED, address.schema):
        text = "unlogged: every session ends with a crash of the server, and a standby has none"
        return Finding("ok" if address.unlogged else "warning", "tables", text, "" if address.unlogged else _RELOG)
    if address.unlogged:
        text = "logged, because they were there before: unlogged=true counts when they are made"
        return Finding("warning", "tables", text, f"DROP SCHEMA {address.schema} CASCADE, which ends every session.")
    return Finding("ok", "tables", "logged")


_RELOG: Final = "Say unlogged=true in the URL if that is meant; else drop the schema, and have it made anew."
