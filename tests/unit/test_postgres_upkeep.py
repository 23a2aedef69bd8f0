"""What is said of a PostgreSQL server and its schema, how the schema is upgraded, and what stands between."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest

from nonstick.commands import doctor, migrate
from nonstick.commands.doctor import diagnose
from nonstick.errors import ConfigurationError, StoreUnavailable
from nonstick.store import Batch
from nonstick.stores import open_store
from nonstick.stores.common.upkeep import Examinable, Finding, Migratable, Step
from nonstick.stores.postgres import PostgresStore
from nonstick.stores.postgres import schema as postgres_schema
from nonstick.testing import Opener, PostgresServer, StoreContract, opening, read_all
from nonstick.testing.contract.tools import deadline, drafts
from tests.pgbouncer import PgBouncer

pytestmark = pytest.mark.anyio

LONG = 600.0
PATIENT = 60.0
"""Longer than any call takes, also on a busy machine."""

Sql = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(fsync="on") as server:
        yield server


@pytest.fixture(scope="module")
def pooler(server: PostgresServer) -> Iterator[PgBouncer]:
    with PgBouncer(server) as pooler:
        yield pooler


@pytest.fixture
def schema() -> str:
    return f"t_{secrets.token_hex(6)}"


@pytest.fixture
async def sql(server: PostgresServer) -> AsyncIterator[Sql]:
    """Executes something past the store; one value."""
    connection = await asyncpg.connect(server.url)
    yield connection.fetchval
    await connection.close()


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


async def examined(url: str, **options: Any) -> dict[str, Finding]:
    return by_subject(await PostgresStore(url, **options).examine())


async def done(store: PostgresStore) -> list[str]:
    """Migrates; the names of the steps."""
    steps: list[Step] = []
    await store.migrate(steps.append)
    return [step.name for step in steps]


# ---- what is found out


async def test_healthy_server_gets_no_complaint(server: PostgresServer, schema: str) -> None:
    """`Examinable.examine`: every finding is ok."""
    store = PostgresStore(server.url, schema=schema)
    assert isinstance(store, Examinable)
    assert isinstance(store, Migratable)
    await done(store)
    found = by_subject(await store.examine())
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found.keys() >= {"version", "role", "clock", "isolation", "durability", "pooler", "listen", "schema"}


async def test_missing_tables_are_reported_not_made(server: PostgresServer, schema: str, sql: Sql) -> None:
    """The first node makes them, unless it was told not to: then it is an error, which names the command."""
    found = await examined(server.url, schema=schema)
    assert (found["schema"].level, found["schema"].blocks) == ("warning", True)
    assert (await examined(f"{server.url}?migrate=false", schema=schema))["schema"].level == "error"
    assert "nonstick migrate --store" in found["schema"].advice
    assert await sql("SELECT to_regnamespace($1) IS NULL", schema)


async def test_missing_rights_come_with_grants(server: PostgresServer, schema: str, sql: Sql) -> None:
    """What the advice says is enough for the store to work."""
    await done(PostgresStore(server.url, schema=schema))
    role = f"r{schema}"
    await sql(f"CREATE ROLE {role} LOGIN")
    url = server.url.replace("nonstick@", f"{role}@")
    found = await examined(url, schema=schema)
    assert (found["schema"].level, found["schema"].blocks) == ("error", True)
    await sql(f"GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT SELECT ON {schema}.meta TO {role}".partition(";")[0])
    await sql(f"GRANT SELECT ON {schema}.meta TO {role}")
    await sql(f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} FROM PUBLIC")
    permissions = (await examined(url, schema=schema))["permissions"]
    assert permissions.level == "error"
    assert "append()" in permissions.text
    for statement in permissions.advice.rstrip(";").split("; "):
        await sql(statement)
    assert (await examined(url, schema=schema))["permissions"].level == "ok"
    async with PostgresStore(url, schema=schema, migrate=False) as store:
        await store.create("key", {}, lifetime=LONG)
        await store.append("key", Batch(drafts(b"1")))


async def test_harmful_settings_are_named(server: PostgresServer, schema: str, sql: Sql) -> None:
    """Each says how to put it right."""
    role = f"r{schema}"
    await sql(f"CREATE ROLE {role} LOGIN SUPERUSER")
    await sql(f"ALTER ROLE {role} SET default_transaction_isolation = 'serializable'")
    await sql(f"ALTER ROLE {role} SET synchronous_commit = off")
    url = server.url.replace("nonstick@", f"{role}@")
    found = await examined(url, schema=schema, pool_size=500)
    assert [(name, found[name].level) for name in ("isolation", "durability", "connections")] == [
        ("isolation", "error"),
        ("durability", "warning"),
        ("connections", "warning"),
    ]
    await sql(f"ALTER ROLE {role} SET default_transaction_read_only = on")
    role_finding = (await examined(url, schema=schema))["role"]
    assert (role_finding.level, role_finding.blocks) == ("error", True)


async def test_wanted_unlogged_tables_are_fine(server: PostgresServer, schema: str) -> None:
    """`unlogged`: a crash of the server ends every session."""
    await done(PostgresStore(server.url, schema=schema, unlogged=True))
    assert (await examined(server.url, schema=schema, unlogged=True))["tables"].level == "ok"
    assert (await examined(server.url, schema=schema))["tables"].level == "warning"


async def test_hot_standby_is_an_error(server: PostgresServer, schema: str) -> None:
    """It refuses every write."""
    await done(PostgresStore(server.url, schema=schema))
    with PostgresServer(standby_of=server, fsync="off") as standby:
        found = await examined(standby.url, schema=schema)
    assert (found["role"].level, found["role"].blocks) == ("error", True)
    assert "primary" in found["role"].advice


async def test_closed_server_is_unavailable(server: PostgresServer) -> None:
    """StoreUnavailable, without any credentials (P13)."""
    with pytest.raises(StoreUnavailable) as refused:
        await PostgresStore(f"postgresql://nobody:hunter2@127.0.0.1:{server.port}/postgres").examine()
    assert "hunter2" not in str(refused.value)


async def test_too_new_tables_are_an_error(server: PostgresServer, schema: str, sql: Sql) -> None:
    """With what to do."""
    await done(PostgresStore(server.url, schema=schema))
    await sql(f"UPDATE {schema}.meta SET oldest = 99, version = 99")
    found = (await examined(server.url, schema=schema))["schema"]
    assert (found.level, found.blocks) == ("error", True)
    assert "Upgrade nonstick" in found.advice


# ---- a pooler


async def test_pooler_without_bypass_is_reported(
    server: PostgresServer, pooler: PgBouncer, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LISTEN does not get through, and the doctor says so and what to add; with `listen_dsn` all is well."""
    monkeypatch.setattr(doctor, "SLOW_SECONDS", PATIENT)
    await done(PostgresStore(server.url, schema=schema))
    found = await examined(pooler.url, schema=schema, timeout=1.0)
    assert (found["pooler"].level, found["listen"].level) == ("warning", "error")
    assert "listen_dsn=" in found["pooler"].advice
    url = f"{pooler.url}&listen_dsn={quote(server.url, safe='')}"
    findings = await diagnose(lambda: PostgresStore(url, schema=schema, timeout=PATIENT))
    assert [finding for finding in findings if finding.level != "ok"] == []
    assert by_subject(findings)["pooler"].text.startswith("there is one")


async def test_nodes_behind_pooler_wake_each_other(server: PostgresServer, pooler: PgBouncer, schema: str) -> None:
    """Everything but LISTEN goes through a pooler that pools transactions, also making the tables."""
    url = f"{pooler.url}&schema={schema}&listen_dsn={quote(server.url, safe='')}"
    async with PostgresStore(url, timeout=PATIENT) as a, PostgresStore(url, timeout=PATIENT) as b:
        await asyncio.gather(*(store.ping() for store in (a, b) for _ in range(10)))
        await a.create("key", {}, lifetime=LONG)
        woken = asyncio.Event()
        stop = b.watch("key", lambda _: woken.set())
        async with deadline():
            await woken.wait()  # the watch is in force
            woken.clear()
            await a.append("key", Batch(drafts(b"x")))
            await woken.wait()
        stop()
        await asyncio.gather(*(s.append("key", Batch(drafts(b"y"))) for s in (a, b) for _ in range(20)))
        events = await read_all(b, "key")
        assert [event.position for event in events] == list(range(1, len(events) + 1))


@pytest.mark.slow
class TestPostgresStoreBehindAPooler(StoreContract):
    """The whole contract, with every call but LISTEN through a pooler that pools transactions."""

    @pytest.fixture
    async def opener(self, server: PostgresServer, pooler: PgBouncer) -> AsyncIterator[Opener]:
        listen = quote(server.url, safe="")
        async with opening(lambda: PostgresStore(f"{pooler.url}&schema=pooled&listen_dsn={listen}")) as opener:
            yield opener


# ---- upgrades


async def test_racing_upgrades_run_each_step_once(
    server: PostgresServer, schema: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P12. Versions lead from one to the next, each by its step, executed once; what was there stays."""
    scripts = postgres_schema._STEPS
    with monkeypatch.context() as old:
        old.setattr(postgres_schema, "_STEPS", scripts[:1])
        old.setattr(postgres_schema, "VERSION", 1)
        assert await done(PostgresStore(server.url, schema=schema)) == [
            f"schema {schema}",
            "version 1",
            _NOTE.format(1),
        ]
    assert await sql(f"SELECT version FROM {schema}.meta") == 1
    await sql(f"SELECT {schema}.create('old', {LONG}, '{{}}', '{{}}', '{{}}', '{{}}')")
    stores = [PostgresStore(server.url, schema=schema) for _ in range(4)]
    steps = await asyncio.gather(*map(done, stores))
    newest = len(scripts)
    wanted = [*(f"version {n}" for n in range(2, newest + 1)), _NOTE.format(newest)]
    assert sorted(steps, key=len) == [[], [], [], wanted]
    assert await sql(f"SELECT version FROM {schema}.meta") == newest
    async with PostgresStore(server.url, schema=schema, migrate=False) as store:
        await store.load("old")


_NOTE = "note that it has version {}"


async def test_nodes_starting_together_upgrade_once(
    server: PostgresServer, schema: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Automatic on first use, unless told not to: then the error names the command."""
    with monkeypatch.context() as old:
        old.setattr(postgres_schema, "_STEPS", postgres_schema._STEPS[:1])
        old.setattr(postgres_schema, "VERSION", 1)
        await done(PostgresStore(server.url, schema=schema))
    with pytest.raises(ConfigurationError, match="nonstick migrate --store"):
        async with open_store(f"{server.url}?schema={schema}&migrate=false"):
            pass
    assert await sql(f"SELECT version FROM {schema}.meta") == 1
    stores = [PostgresStore(server.url, schema=schema) for _ in range(2)]
    async with stores[0], stores[1]:
        await asyncio.gather(*(store.ping() for store in stores))
    assert await sql(f"SELECT version FROM {schema}.meta") == len(postgres_schema._STEPS)


async def test_failed_step_leaves_the_old_version(
    server: PostgresServer, schema: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Migratable.migrate`: all or nothing."""
    script = postgres_schema._script
    monkeypatch.setattr(postgres_schema, "_script", lambda *given: f"{script(*given)}; SELECT 1/0")
    with pytest.raises(StoreUnavailable):
        await done(PostgresStore(server.url, schema=schema))
    assert await sql("SELECT to_regnamespace($1) IS NULL", schema)


async def test_printed_sql_makes_the_tables(server: PostgresServer, schema: str, sql: Sql) -> None:
    """`nonstick migrate --print-sql`: for whoever runs SQL on that server; nothing else is printed."""
    store = PostgresStore(server.url, schema=schema)
    printed: list[str] = []
    await migrate.run(store, say=printed.append, print_sql=True)
    assert await sql("SELECT to_regnamespace($1) IS NULL", schema)
    connection = await asyncpg.connect(server.url)
    await connection.execute("\n".join(printed))
    await connection.close()
    assert (await store.plan()).steps == []
    printed.clear()
    await migrate.run(store, say=printed.append, print_sql=True)
    assert all(line.startswith("--") for line in printed)


async def test_dry_run_and_run_tell_steps(server: PostgresServer, schema: str, sql: Sql) -> None:
    """`nonstick migrate`: the version that is there, the one that is wanted, and each step."""
    store = PostgresStore(server.url, schema=schema)
    said: list[str] = []
    await migrate.run(store, say=said.append, dry_run=True)
    assert "no tables yet" in said[0]
    assert "  would be executed: version 1" in said
    assert await sql("SELECT to_regnamespace($1) IS NULL", schema)
    said.clear()
    await migrate.run(store, say=said.append)
    assert "  version 1: done" in said
    assert said[-1] == f"the tables have version {postgres_schema.VERSION} now"
    said.clear()
    await migrate.run(store, say=said.append)
    assert said[-1] == "nothing to do"
