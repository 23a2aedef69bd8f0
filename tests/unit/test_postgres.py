"""What only the PostgreSQL store has: tables, connections, news, URLs. The contract is tested elsewhere."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import asyncpg
import pytest

from nonstick.errors import (
    AlreadyExists,
    ConfigurationError,
    Diverged,
    NotPending,
    SessionNotFound,
    StoreUnavailable,
    TooManySessions,
)
from nonstick.store import NEW_STREAM, WRITER_SECONDS, Batch, Cursor, News
from nonstick.stores.postgres.news import MAX_PAYLOAD, pack
from nonstick.stores.postgres.schema import READ_BYTES
from nonstick.stores.postgres.store import PostgresStore, migrate
from nonstick.stores.postgres.url import Address
from nonstick.testing import FaultProxy, PostgresServer, read_all
from nonstick.testing.contract.tools import deadline, drafts, eventually, follow, take, texts
from tests.pace import unhurried

pytestmark = pytest.mark.anyio

LONG = 600.0
SHORT = 0.2
PATIENT = 60.0
"""Longer than anything here takes on a busy machine."""

SECRET = "hunter2/@#"
QUOTED = "hunter2%2F%40%23"

Hints = asyncio.Queue[News | None]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def frail() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture
def own(frail: PostgresServer) -> Iterator[PostgresServer]:
    """A server that no other test uses at the time: to be restarted, frozen or broken. It is healthy at first."""
    yield frail
    frail.kill()
    frail.start()


@pytest.fixture
def schema() -> str:
    return f"t_{secrets.token_hex(6)}"


@pytest.fixture
async def store(server: PostgresServer, schema: str) -> AsyncIterator[PostgresStore]:
    """A store with tables of its own, which does not sweep by itself while a test looks on."""
    async with PostgresStore(server.url, schema=schema, sweep_interval=LONG, timeout=PATIENT) as store:
        yield store


@pytest.fixture
async def sql(server: PostgresServer, schema: str) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Looks into the test's tables, past the store: one value."""
    connection = await asyncpg.connect(server.url)
    await connection.execute(f"SET search_path TO {schema}")
    yield connection.fetchval
    await connection.close()


async def at_locks(sql: Any, schema: str) -> int:
    """How many of the store's connections wait for a lock."""
    # Else a transaction goes on with the list of connections that there were when it looked first.
    await sql("SELECT pg_stat_clear_snapshot()")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'"
    return int(await sql(waiting, schema))


async def recovered(call: Callable[[], Awaitable[Any]]) -> Any:
    """What the call returns once the store can be reached again."""
    async with deadline():
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await asyncio.sleep(0.01)


async def heard(hints: Hints) -> News | None:
    async with deadline():
        return await hints.get()


@asynccontextmanager
async def watching(store: PostgresStore, key: str) -> AsyncIterator[Hints]:
    """The wakes for this log, from the first one after the greeting on."""
    hints: Hints = asyncio.Queue()
    stop = store.watch(key, hints.put_nowait)
    assert await heard(hints) is None
    yield hints
    stop()


# ---- the URL


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_url_names_the_place_without_credentials(scheme: str) -> None:
    """`Store.url` is fit for logs, and so is everything that shows the store (P13)."""
    store = PostgresStore(
        f"{scheme}://user:{QUOTED}@db1:5433,db2/app?password={QUOTED}&schema=mine&listen_dsn="
        f"postgresql%3A%2F%2Fuser%3A{SECRET}%40direct%2Fapp".replace(SECRET, "hunter2")
    )
    assert store.url == "postgresql://db1:5433,db2/app"
    assert "hunter2" not in repr(store) + repr(Address.parse(f"{scheme}://user:{QUOTED}@host/app"))


def test_url_options_of_store_are_read() -> None:
    """What is left is the driver's; a keyword goes before the URL."""
    url = "postgresql://host/db?schema=a&sslmode=require&prepared=no&unlogged=1&pool_size=3&listen_dsn=postgres://d/db"
    address = Address.parse(url, schema="b")
    assert address.dsn == "postgresql://host/db?sslmode=require"
    assert (address.schema, address.prepared, address.unlogged, address.pool_size) == ("b", False, True, 3)
    assert address.direct().dsn == "postgres://d/db"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@host/db",
        "postgresql://user:hun/ter2@host/db",
        "postgresql://user:hunter2@host:port/db",
        "postgresql://user:hunter2@[::1/db",
        "postgresql://user:hunter2@host/db?schema=Robert');--",
        "postgresql://user:hunter2@host/db?schema=pg_mine",
        "postgresql://user:hunter2@host/db?pool_size=0",
        "postgresql://user:hunter2@host/db?unlogged=perhaps",
        "postgresql://user:hunter2@host/db?listen_dsn=redis://host",
        "mysql://user:hunter2@host/db",
    ],
)
def test_impossible_url_is_refused_unquoted(url: str) -> None:
    """ConfigurationError: the message never repeats the URL (P13)."""
    with pytest.raises(ConfigurationError) as refused:
        PostgresStore(url)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("printed", "kept", "own"),
    [
        ("sslmode=require&channel_binding=prefer", "sslmode=require", {}),  # Neon, but for its channel binding
        ("pgbouncer=true&connection_limit=1", "", {"prepared": False, "pool_size": 1}),  # Supabase, Prisma
        ("pgbouncer=true&prepared=true&connection_limit=3&pool_size=7", "", {"prepared": True, "pool_size": 7}),
        ("sslmode=require&supa=base-pooler.x", "sslmode=require", {}),  # Supabase by way of Vercel
        ("pgbouncer=true&connect_timeout=15&sslmode=require", "sslmode=require", {"prepared": False}),  # Vercel
        ("schema=public&connect_timeout=0", "", {"schema": "public", "connect_timeout": None}),  # Prisma
        ("statement_cache_size=0", "", {"prepared": False}),
        ("prepared_statement_cache_size=0", "", {"prepared": False}),  # SQLAlchemy
        ("gssencmode=disable&keepalives=1&keepalives_idle=30&keepalives_interval=10&keepalives_count=3", "", {}),
        ("tcp_user_timeout=3000&sslsni=1&sslcompression=0&load_balance_hosts=disable&client_encoding=utf8", "", {}),
        (
            "application_name=shop&target_session_attrs=read-write",
            "application_name=shop&target_session_attrs=read-write",
            {},
        ),
        ("fallback_application_name=shop", "application_name=shop", {}),
        ("options=--cluster%3Dshop-12", "options=--cluster%3Dshop-12", {}),  # CockroachDB, and Neon for old clients
        ("options=endpoint%3Dcool-sun-1", "options=endpoint%3Dcool-sun-1", {}),
        (
            "statement_timeout=5000&search_path=x&pg_stat_statements.track=all",
            "statement_timeout=5000&search_path=x&pg_stat_statements.track=all",
            {},
        ),
        ("sslmode=verify-full&sslrootcert=system", "", {"system_authorities": True}),
        ("sslnegotiation=direct&sslmode=require", "sslnegotiation=direct&sslmode=require", {}),
    ],
)
def test_printed_options_of_hosts_are_taken(printed: str, kept: str, own: dict[str, object]) -> None:
    """With their meaning: what the driver does not know is turned into what does the same, or is so anyway."""
    address = Address.parse(f"postgresql://u:{QUOTED}@host/db?{printed}")
    assert address.dsn == f"postgresql://u:{QUOTED}@host/db" + (f"?{kept}" if kept else "")
    assert {name: getattr(address, name) for name in own} == own


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("channel_binding=require", "channel_binding in the store URL cannot be as it is: .*sslmode=verify-full"),
        ("gssencmode=require", "gssencmode .* use TLS, with sslmode"),
        ("ssl=true", "ssl in the store URL .* write sslmode=require"),
        ("sslmode=no-verify", "write sslmode=require"),
        ("sslmode=required", "sslmode in the store URL .* prefer, require"),
        ("sslrootcert=/hunter2/ca.pem", "sslrootcert .* no file of that name"),
        ("sslrootcert=system&sslmode=require", "system goes with sslmode=verify-full only"),
        ("require_auth=scram-sha-256", "require_auth .* pg_hba"),
        ("load_balance_hosts=random", "load_balance_hosts .* order of the URL"),
        ("keepalives=hunter2", "keepalives .* a number"),
        ("pool_timeout=20", "pool_timeout .* leave it out"),
        ("sslaccept=strict", "sslaccept .* sslmode=verify-full"),
        ("hostaddr=10.0.0.1", "hostaddr .* in the host's place"),
        ("connect_timeout=soon", "connect_timeout .* whole seconds"),
        ("connection_limit=0", "connection_limit .* a number from 1"),
        ("pgbouncer=perhaps", "pgbouncer in the store URL must be true or false"),
        ("poolsize=3", "'poolsize' that is not known. Did you mean pool_size?"),
        ("sslmod=require", "'sslmod' that is not known. Did you mean sslmode?"),
        ("target_session_attr=read-write", "Did you mean target_session_attrs?"),
        ("enable_seqscan=off", "options=-c%20NAME%3DVALUE"),
        ("hunter2=1", "has an option that is not known"),
        ("sslmode", "sslmode in the store URL has no value"),
        ("listen_dsn=postgresql%3A%2F%2Fhost%2Fdb%3Fschema%3Dhunter2", "schema belongs into the store URL"),
        ("listen_dsn=postgresql%3A%2F%2Fhost%2Fdb%3Fchannel_binding%3Drequire", "channel_binding"),
    ],
)
def test_impossible_option_is_refused_by_name(printed: str, said: str) -> None:
    """When the store is made, before anything is connected; the value is never shown (P13)."""
    with pytest.raises(ConfigurationError, match=said) as refused:
        PostgresStore(f"postgresql://u:hunter2@host/db?{printed}")
    assert "hunter2" not in str(refused.value)


async def test_printed_options_of_hosts_work(server: PostgresServer, schema: str) -> None:
    """Together, as a long URL has them."""
    options = (
        "pgbouncer=true&connection_limit=2&connect_timeout=15&gssencmode=prefer&keepalives=1&channel_binding=prefer"
    )
    async with PostgresStore(f"{server.url}?{options}&options=-c%20work_mem%3D8MB", schema=schema) as store:
        await store.create("key", {"x": b"1"}, lifetime=60)
        assert (await store.load("key")).fields == {"x": b"1"}


async def test_drivers_refusal_comes_on_entering(server: PostgresServer) -> None:
    """ConfigurationError: the store URL has options that cannot work."""
    with pytest.raises(ConfigurationError, match=r"sslrootcert=FILE, or .* sslrootcert=system"):
        async with PostgresStore(f"{server.url}?sslmode=verify-full"):
            pass


# ---- the tables


async def test_four_processes_make_tables_at_once(server: PostgresServer, schema: str) -> None:
    """Four workers may start at once; positions of one log have no gaps, and each writer keeps its order (P3)."""
    code = """
import asyncio, sys
from nonstick.errors import AlreadyExists
from nonstick.store import Batch, Draft
from nonstick.stores.postgres import PostgresStore

async def main(url, schema, name):
    async with PostgresStore(url, schema=schema) as store:
        try:
            await store.create("key", {}, lifetime=600)
        except AlreadyExists:
            pass
        for n in range(1, 41):
            events = [Draft(b"8 bytes!", b"%s %d" % (name.encode(), n))] * (1 + n % 3)
            assert not (await store.append("key", Batch(events, writer=name, sequence=n))).duplicate

asyncio.run(main(*sys.argv[1:]))
"""
    names = ["a", "b", "c", "d"]
    processes = [await asyncio.create_subprocess_exec(sys.executable, "-c", code, server.url, schema, n) for n in names]
    async with asyncio.timeout(60):
        assert [await process.wait() for process in processes] == [0, 0, 0, 0]
    async with PostgresStore(server.url, schema=schema, timeout=PATIENT) as store:
        events = await read_all(store, "key")
    assert [event.position for event in events] == list(range(1, len(events) + 1))
    for name in names:
        mine = [event.data for event in events if event.data.startswith(name.encode())]
        assert mine == [b"%s %d" % (name.encode(), n) for n in range(1, 41) for _ in range(1 + n % 3)]


async def test_unwanted_tables_are_not_made(server: PostgresServer, schema: str) -> None:
    """`migrate=False`: refused on entering, with the command that makes them."""
    with pytest.raises(ConfigurationError, match="nonstick migrate --store"):
        async with PostgresStore(server.url, schema=schema, migrate=False):
            pass
    await migrate(f"{server.url}?schema={schema}")
    await migrate(f"{server.url}?schema={schema}")
    async with PostgresStore(server.url, schema=schema, migrate=False, timeout=PATIENT) as store:
        await store.create("key", {}, lifetime=LONG)


async def test_user_without_create_right_works(
    server: PostgresServer, schema: str, store: PostgresStore, sql: Any
) -> None:
    """`migrate=False` needs USAGE on the schema, EXECUTE on its functions and all rights on its tables."""
    role = f"r{schema}"
    await sql(f"CREATE ROLE {role} LOGIN")
    await sql(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
    await sql(f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {role}")
    url = server.url.replace("nonstick@", f"{role}@")
    async with PostgresStore(url, schema=schema, migrate=False) as user:
        await user.create("key", {"x": b"1"}, lifetime=LONG, limits={"g": 5})
        await user.append("key", Batch(drafts(b"1"), writer="w", sequence=1, stream=NEW_STREAM, expect=["q"]))
        assert (await store.load("key")).fields == {"x": b"1"}
        assert await user.delete("key")
        await user.ping()


async def test_first_releases_tables_are_upgraded(
    server: PostgresServer, schema: str, sql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that version 1 calls stays beside the one that takes its place (P12)."""
    with monkeypatch.context() as first:
        first.setattr("nonstick.stores.postgres.schema._STEPS", ("store.sql",))
        first.setattr("nonstick.stores.postgres.schema.VERSION", 1)
        await migrate(f"{server.url}?schema={schema}")
    async with PostgresStore(server.url, schema=schema, timeout=PATIENT) as store:
        await store.create("key", {"x": b"1"}, lifetime=LONG)
        assert await store.update("key", {"x": b"2"}, lifetime=2 * LONG)
        await sql("SELECT \"update\"('key', ARRAY['x'], ARRAY['3'::bytea], ARRAY[]::text[], ARRAY[]::bytea[])")
        assert (await store.load("key")).fields == {"x": b"3"}


async def test_unusable_newer_tables_are_refused(
    server: PostgresServer, store: PostgresStore, schema: str, sql: Any
) -> None:
    """A schema of a newer release is used if that release allows it (P12), and refused clearly otherwise."""
    await sql("UPDATE meta SET version = 99")
    async with PostgresStore(server.url, schema=schema, timeout=PATIENT) as other:
        await other.ping()
    await sql("UPDATE meta SET oldest = 99")
    with pytest.raises(ConfigurationError, match="upgrade nonstick"):
        async with PostgresStore(server.url, schema=schema):
            pass
    with pytest.raises(ConfigurationError, match="upgrade nonstick"):
        await migrate(f"{server.url}?schema={schema}")


async def test_everything_is_under_one_schema(store: PostgresStore, schema: str, sql: Any) -> None:
    """`schema`: holds everything, so that it can be dropped in one piece."""
    elsewhere = (
        "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'public'"
    )
    assert await sql(elsewhere) == 0
    assert (
        await sql("SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relnamespace = $1::regnamespace", schema) > 9
    )


async def test_unlogged_store_works_after_a_crash(own: PostgresServer) -> None:
    """`unlogged`: what a crash took is gone, not half there; the tables need not be made again (P9, P15)."""
    async with PostgresStore(own.url, schema="unlogged", unlogged=True, empty_grace=0.1) as store:
        await store.create("key", {"x": b"1"}, lifetime=LONG)
        await store.append("key", Batch(drafts(b"1")))
        own.restart(keep_data=True)
        with pytest.raises(SessionNotFound):
            await recovered(lambda: store.load("key"))
        await store.create("key", {}, lifetime=LONG)
        assert (await store.append("key", Batch(drafts(b"1")))).first == 1


async def test_lost_tables_are_made_again(own: PostgresServer) -> None:
    """A server that comes back empty needs no restart of the nodes (P9, P15)."""
    async with PostgresStore(own.url, empty_grace=0.1) as store:
        await store.create("key", {}, lifetime=LONG)
        own.restart(keep_data=False)
        with pytest.raises(SessionNotFound):
            await recovered(lambda: store.load("key"))
        await store.create("key", {}, lifetime=LONG)


# ---- a hot standby


@pytest.fixture
async def standby(server: PostgresServer) -> AsyncIterator[PostgresServer]:
    """Streams from the server, but has stopped to replay what it gets: it lags."""
    with PostgresServer(standby_of=server) as standby:
        connection = await asyncpg.connect(standby.url)
        await connection.execute("SELECT pg_wal_replay_pause()")

        async def paused() -> bool:
            return bool(await connection.fetchval("SELECT pg_get_wal_replay_pause_state() = 'paused'"))

        await eventually(paused)
        await connection.close()
        yield standby


async def test_lagging_standby_is_never_believed(
    server: PostgresServer, store: PostgresStore, schema: str, standby: PostgresServer
) -> None:
    """What a standby lacks may be there, and what it has may have ended: StoreUnavailable, never `gone` (P6, P9).

    Once it is promoted, it is the store.
    """
    lease = store.lease("node")
    await asyncio.to_thread(lease.renew, LONG)
    await store.create("late", {}, lifetime=LONG)
    await store.append("late", Batch(drafts(b"1")))
    async with PostgresStore(standby.url, schema=schema) as behind:
        for call in (
            lambda: behind.load("late"),
            lambda: behind.read("late", Cursor(1)),
            lambda: behind.append("late", Batch(drafts(b"2"))),
            lambda: behind.update("late", {"x": b"1"}),
            lambda: behind.touch(["late"]),
            lambda: behind.trim("late", standalone_before=1),
            lambda: behind.delete("late"),
            lambda: behind.lapsed(["node"]),
            behind.ping,
        ):
            with pytest.raises(StoreUnavailable, match="primary"):
                await call()
        await asyncio.to_thread(lease.close, release=True)
        server.kill()
        promoted = await asyncpg.connect(standby.url)
        await promoted.execute("SELECT pg_wal_replay_resume()")
        await promoted.fetchval("SELECT pg_promote()")
        await promoted.close()
        try:
            await recovered(behind.ping)
            assert (await behind.load("late")).head.position == 1
        finally:
            server.start()


async def test_standby_without_tables_is_waited_for(standby: PostgresServer, schema: str) -> None:
    """Its primary may have them: unavailable for now, where a primary without them is refused on entering (P9)."""
    async with PostgresStore(standby.url, schema=schema, migrate=False) as store:
        with pytest.raises(StoreUnavailable, match="primary"):
            await store.load("key")


# ---- the record and the log


async def test_hundred_racing_creates_keep_the_limit(server: PostgresServer, schema: str, sql: Any) -> None:
    """`create`: near its limit a group is counted exactly (P10)."""

    async def create(store: PostgresStore, n: int) -> bool:
        try:
            await store.create(f"key{n}", {}, lifetime=LONG, limits={"all": 1000, f"group{n % 5}": 4})
        except TooManySessions as full:
            return full.group == "all"
        return True

    async with PostgresStore(server.url, schema=schema, pool_size=40, timeout=PATIENT) as store:
        await asyncio.gather(*(store.ping() for _ in range(40)))  # all connections are there
        made = await asyncio.gather(*(create(store, n) for n in range(100)))
        assert sum(made) == 5 * 4
        assert await sql("SELECT sum(n) FROM tally WHERE grp = 'all'") == 5 * 4
        await asyncio.gather(*(store.delete(f"key{n}") for n in range(100)))
        assert await sql("SELECT count(*) FROM tally") == 0


async def test_twin_creates_make_one_session(store: PostgresStore) -> None:
    """`create`: AlreadyExists for a repeated create, also while the first is under way in a group of one."""
    for n in range(10):
        calls = [store.create(f"key{n}", {}, lifetime=LONG, limits={f"g{n}": 1}) for _ in range(4)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes if outcome is not None] == [AlreadyExists] * 3


async def test_swept_sessions_leave_nothing(server: PostgresServer, schema: str, sql: Any) -> None:
    """What has expired is removed by those who use the store; what was renewed is kept."""
    async with PostgresStore(server.url, schema=schema, sweep_interval=0.05, timeout=PATIENT) as store:
        await store.create("kept", {"x": b"1"}, lifetime=3.0, limits={"g": 100})
        for n in range(5):
            await store.create(f"key{n}", {"x": b"1"}, lifetime=SHORT, limits={"g": 100})
            stream = Batch(drafts(b"x"), stream=NEW_STREAM, writer="w", sequence=1, expect=["q"], cancel="r")
            await store.append(f"key{n}", stream)
        await store.delete("key0")

        async def clean() -> bool:
            tables = ["event", "stream", "writer", "pending", "cancel", "grave"]
            rows = await sql(" + ".join(f"(SELECT count(*) FROM {table})" for table in tables).join(["SELECT ", ""]))
            return bool(rows == 0 and await sql("SELECT count(*) FROM session") == 1)

        await eventually(clean)
        assert await sql("SELECT (SELECT count(*) FROM field) + (SELECT sum(n) FROM tally)") == 2
        await store.load("kept")


async def test_create_sweeps_a_full_expired_group(store: PostgresStore, sql: Any) -> None:
    """`create`: a limit counts live sessions, also before anybody has swept the others (P10)."""
    for n in range(300):
        await store.create(f"key{n}", {}, lifetime=LONG, limits={"g": 300})
    await sql("UPDATE session SET expires_at = 0")
    await sql("UPDATE expiry SET due = 0")
    await store.create("key", {}, lifetime=LONG, limits={"g": 1})
    assert await sql("SELECT sum(n) FROM tally") == 1


async def test_racing_ends_and_sweeps_never_deadlock(store: PostgresStore, sql: Any) -> None:
    """Locks are taken in one order: nothing is given up as a deadlock, and every session is counted out once."""
    keys = [f"key{n}" for n in range(120)]
    await asyncio.gather(*(store.create(key, {}, lifetime=LONG, limits={"a": 999, "b": 999}) for key in keys))
    await sql("UPDATE expiry SET due = 0")
    await sql("UPDATE session SET expires_at = 0 WHERE id % 2 = 0")
    sweeps = [store._functions.call("sweep", 20) for _ in range(20)]
    await asyncio.gather(*sweeps, *(store.delete(key) for key in keys), *(store.touch(keys[n:]) for n in range(20)))
    assert await sql("SELECT count(*) FROM session") == 0
    assert await sql("SELECT count(*) FROM tally") == 0
    assert await sql("SELECT count(*) FROM expiry") == 0


async def test_renewed_sessions_sweep_is_put_off(store: PostgresStore, sql: Any) -> None:
    """A session costs the index of due looks one change per lifetime, however often it was renewed."""
    await store.create("key", {}, lifetime=LONG)
    due = await sql("SELECT due FROM expiry")
    for _ in range(5):
        await store.touch(["key"])
    assert await sql("SELECT due FROM expiry") == due
    await sql("UPDATE expiry SET due = 0")
    assert (await store._functions.call("sweep", 10))[0][0] == 1
    assert await sql("SELECT e.due = s.expires_at FROM expiry e JOIN session s ON s.id = e.session")
    assert (await store._functions.call("sweep", 10))[0][0] == 0


async def test_ended_log_is_swept_in_batches(store: PostgresStore, sql: Any) -> None:
    """No sweep takes long: rows of ended sessions are removed a few at a time."""
    await store.create("key", {}, lifetime=LONG)
    await store.append("key", Batch(drafts(*[b"x"] * 25)))
    await store.delete("key")
    left = []
    while (await store._functions.call("sweep", 10))[0][0]:
        left.append(await sql("SELECT count(*) FROM event"))
    assert left == [15, 5, 0]


async def test_renewals_and_appends_touch_no_index(server: PostgresServer, schema: str, sql: Any) -> None:
    """The session's row is updated in place (HOT), because nothing that changes in it is indexed."""
    async with PostgresStore(server.url, schema=schema, timeout=PATIENT) as store:
        for n in range(20):
            await store.create(f"key{n}", {}, lifetime=LONG)
        for _ in range(20):
            await store.touch([f"key{n}" for n in range(20)])
        for n in range(200):
            await store.append(f"key{n % 20}", Batch(drafts(b"x")))

    async def counted() -> bool:
        return bool(await sql("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relid = 'session'::regclass") == 600)

    await eventually(counted)  # the server's backends report what they did when they end
    assert await sql("SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = 'session'::regclass") > 540


@pytest.mark.parametrize("kept", [True, False])
async def test_idle_writer_without_stream_is_forgotten(store: PostgresStore, sql: Any, kept: bool) -> None:
    """`WRITER_SECONDS`, and longer while the writer's stream is kept."""
    await store.create("key", {}, lifetime=LONG)
    opening = Batch(drafts(b"x"), stream=NEW_STREAM, writer="w", sequence=1, terminal=True)
    await store.append("key", opening)
    await store.append("key", Batch((), cancel="old"))
    if not kept:
        await store.trim("key", streams=[1])
    for passed, remembered in ((WRITER_SECONDS - 5, True), (10, kept)):
        await sql(f"UPDATE session SET tidied_at = tidied_at - {passed}")
        await sql(f"UPDATE writer SET at = at - {passed}")
        await sql(f"UPDATE cancel SET at = at - {passed}")
        assert (await store.append("key", Batch(()))).first == 1
        assert await sql("SELECT count(*) FROM writer") == remembered
    assert (await store.load("key")).cancels == frozenset()
    assert await sql("SELECT count(*) FROM cancel") == 0
    assert (await store.append("key", opening)).duplicate == kept


async def test_requests_may_have_any_name(store: PostgresStore) -> None:
    """A client names its requests, also with what no text of PostgreSQL can hold (P4, P5)."""
    await store.create("key", {}, lifetime=LONG)
    for odd in ("\0", "\ud800", "", "\N{SNOWMAN}", "'; --", "x" * 1000):
        with pytest.raises(NotPending):
            await store.append("key", Batch((), settle=odd))
        await store.append("key", Batch((), expect=[odd], cancel=odd))
        assert (await store.load("key")).cancels == {odd}
        await store.append("key", Batch((), settle=odd, uncancel=odd))


async def test_read_stops_before_filling_memory(store: PostgresStore) -> None:
    """`read`: fewer than `limit` may come; none come only at the end of the log (P10)."""
    await store.create("key", {}, lifetime=LONG)
    large = secrets.token_bytes(READ_BYTES // 2)
    await store.append("key", Batch(drafts(*[large] * 5)))
    parts = []
    cursor = Cursor(0)
    while part := await store.read("key", cursor):
        parts.append(len(part))
        cursor = part[-1].cursor
    assert parts == [2, 2, 1]


async def test_position_beyond_any_number_diverges(store: PostgresStore) -> None:
    """Diverged, not an error of the driver: a cursor comes from a client."""
    await store.create("key", {}, lifetime=LONG)
    with pytest.raises(Diverged):
        await store.read("key", Cursor(10**30, bytes(8)))


# ---- trouble


async def test_watchers_read_after_a_restart(own: PostgresServer) -> None:
    """StoreUnavailable while it is away; then everything goes on, and every watcher is told to read (P9)."""
    async with PostgresStore(own.url, schema="restarted") as store, PostgresStore(own.url, schema="restarted") as other:
        await store.create("key", {}, lifetime=LONG)
        async with watching(store, "key") as hints:
            batch = Batch(drafts(b"1"), writer="w", sequence=1)
            own.kill()
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await store.append("key", batch)
                with pytest.raises(StoreUnavailable):
                    await store.load("key")
            own.start()
            await recovered(lambda: store.append("key", batch))
            while await heard(hints) is not None:
                pass
            await recovered(lambda: other.append("key", Batch(drafts(b"2"))))
            assert texts(await read_all(store, "key")) == [b"1", b"2"]


async def test_ended_connections_are_replaced(store: PostgresStore, sql: Any) -> None:
    """pg_terminate_backend: at most the calls under way fail, and every watcher is told to read (P9)."""
    await store.create("key", {}, lifetime=LONG)
    async with watching(store, "key") as hints:
        others = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1"
        assert await sql(others, store._address.schema) >= 2
        assert await heard(hints) is None
        await recovered(lambda: store.append("key", Batch(drafts(b"1"), writer="w", sequence=1)))
        news = await heard(hints)
        assert news is None or texts(news.events) == [b"1"]


async def test_append_with_lost_answer_lands_once(server: PostgresServer, schema: str) -> None:
    """Every write may be repeated as it was; a (writer, sequence) is written once (P3)."""
    async with FaultProxy(server.url) as proxy, PostgresStore(proxy.url, schema=schema) as store:
        await store.create("key", {}, lifetime=LONG)
        lost = 0
        for n in range(1, 31):
            marker = f"event-{n:03}-{secrets.token_hex(4)}".encode()
            batch = Batch(drafts(marker), writer="w", sequence=n)
            if n % 3 == 0:
                proxy.lose_next_reply(after=marker)
                with pytest.raises(StoreUnavailable):
                    await store.append("key", batch)
                lost += 1
            answer = await recovered(partial(store.append, "key", batch))
            assert answer[:2] == (n, n % 3 == 0)
        assert lost == 10
        assert [data[:9] for data in texts(await read_all(store, "key"))] == [b"event-%03d" % n for n in range(1, 31)]


async def test_silent_server_is_unavailable_in_time(own: PostgresServer) -> None:
    """Every call is bounded: StoreUnavailable, also for those that wait behind others (P9)."""
    async with PostgresStore(own.url, schema="silent", timeout=PATIENT) as store:
        await store.create("key", {}, lifetime=LONG)
    async with PostgresStore(own.url, schema="silent", timeout=0.5, pool_size=2) as store:
        await recovered(lambda: store.load("key"))
        own.freeze()
        calls = [store.load("key"), *(store.append("key", Batch(drafts(b"x"))) for _ in range(5)), store.ping()]
        async with asyncio.timeout(60):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
        own.thaw()
        await recovered(lambda: store.load("key"))


async def test_abandoned_call_ends_in_the_server(
    server: PostgresServer, store: PostgresStore, sql: Any, schema: str
) -> None:
    """A call that waits for a lock in vain is ended there too: it holds no connection and writes nothing later."""
    await store.create("key", {}, lifetime=LONG)
    async with PostgresStore(server.url, schema=schema, sweep_interval=LONG) as hurried:
        await sql("BEGIN")
        await sql("SELECT id FROM session FOR UPDATE")
        given_up = asyncio.ensure_future(hurried.append("key", Batch(drafts(b"x"))))

        async def at_the_lock() -> bool:
            return given_up.done() or await at_locks(sql, schema) == 1

        await eventually(at_the_lock)
        await store.load("key")  # which needs no lock
        with pytest.raises(StoreUnavailable):
            await given_up

        async def left() -> bool:
            return await at_locks(sql, schema) == 0

        await eventually(left)
        await sql("COMMIT")
        assert await read_all(store, "key") == []


@pytest.mark.parametrize("method", ["append", "update", "trim", "delete", "touch"])
async def test_session_expiring_during_wait_is_gone(server: PostgresServer, schema: str, sql: Any, method: str) -> None:
    """The time of a write is when it has the session's row, not when it was sent."""
    async with PostgresStore(server.url, schema=schema, sweep_interval=LONG, timeout=60.0) as store:
        await store.create("key", {}, lifetime=LONG)
        await store.append("key", Batch(drafts(b"x")))
        call: dict[str, Callable[[], Awaitable[Any]]] = {
            "append": lambda: store.append("key", Batch(drafts(b"y"))),
            "update": lambda: store.update("key", {"x": b"1"}),
            "trim": lambda: store.trim("key", standalone_before=2),
            "delete": lambda: store.delete("key"),
            "touch": lambda: store.touch(["key"]),
        }
        await sql("BEGIN")
        await sql("SELECT id FROM session FOR UPDATE")
        waiting = asyncio.ensure_future(call[method]())

        async def at_the_lock() -> bool:
            return await at_locks(sql, schema) == 1

        await eventually(at_the_lock)
        await sql("UPDATE session SET expires_at = extract(epoch FROM clock_timestamp())::float8")
        await sql("COMMIT")
        if method in ("append", "update"):
            with pytest.raises(SessionNotFound):
                await waiting
        else:
            assert not await waiting
        with pytest.raises(SessionNotFound):
            await store.load("key")
        assert await sql("SELECT coalesce(min(size), 1) FROM session") == 1


async def test_cancelled_calls_keep_their_connections(store: PostgresStore, sql: Any, schema: str) -> None:
    """A cancelled call disturbs no other: its statement runs on, and its connection is used again."""
    await store.create("key", {}, lifetime=LONG)
    for _ in range(50):
        call = asyncio.ensure_future(store.append("key", Batch(drafts(b"x"))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])

    async def written() -> bool:
        return len(await read_all(store, "key")) == 50

    await eventually(written)
    assert await sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", schema) <= 10
    assert (await store.append("key", Batch(drafts(b"x")))).first == 51


async def test_too_many_calls_fail_at_once(server: PostgresServer, schema: str) -> None:
    """`max_waiting`: what waits is bounded (P10)."""
    async with PostgresStore(server.url, schema=schema, max_waiting=5) as store:
        calls = [store.ping() for _ in range(8)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(outcome, StoreUnavailable) for outcome in outcomes) == 3


@pytest.mark.parametrize(
    ("setup", "url", "advice"),
    [
        ("", "?default_transaction_read_only=on", "point the URL at the primary"),
        ("", "nowhere", "does not exist: create it"),
        ("CREATE ROLE {role} LOGIN", "role", "lacks a permission"),
        ("CREATE ROLE {role} LOGIN CONNECTION LIMIT 0", "role", "no connection left"),
        ("CREATE ROLE {role}", "role", "refused the login"),
        ("", "port", "cannot be reached"),
    ],
)
async def test_trouble_is_named_without_secrets(
    server: PostgresServer, schema: str, store: PostgresStore, sql: Any, setup: str, url: str, advice: str
) -> None:
    """StoreUnavailable says what to do, without payload or credentials (P9, P13). Entering does not fail."""
    role = f"r{schema}"
    if setup:
        await sql(setup.format(role=role))
    urls = {
        "role": server.url.replace("nonstick@", f"{role}:hunter2@"),
        "nowhere": server.url.replace("/postgres", "/nowhere"),
        "port": "postgresql://nonstick:hunter2@127.0.0.1:1/postgres",
    }
    async with PostgresStore(urls.get(url, server.url + url), schema=schema) as broken:
        for call in (broken.create("payload", {"x": b"payload"}, lifetime=LONG), broken.ping()):
            with pytest.raises(StoreUnavailable, match=advice) as trouble:
                await call
            assert "hunter2" not in str(trouble.value)
            assert "payload" not in str(trouble.value)


async def test_lease_outlives_trouble(own: PostgresServer) -> None:
    """`renew` raises StoreUnavailable within seconds; the next renewal connects again (P7)."""
    async with PostgresStore(own.url) as store:
        lease = store.lease("node")
        await asyncio.to_thread(lease.renew, 60.0)
        assert await store.lapsed(["node", "other"]) == {"other"}
        own.freeze()
        with pytest.raises(StoreUnavailable, match=r"^the lease at postgresql://127"):
            await asyncio.to_thread(lease.renew, 60.0)
        own.thaw()
        await asyncio.to_thread(lease.renew, 60.0)
        own.kill()
        with pytest.raises(StoreUnavailable):
            await asyncio.to_thread(lease.renew, 60.0)
        await asyncio.to_thread(lambda: lease.close(release=True))
        own.start()
        assert await recovered(lambda: store.lapsed(["node"])) == set()


async def test_closed_store_leaves_nothing(server: PostgresServer, schema: str, sql: Any) -> None:
    """Closing ends every connection and every task that the store has begun."""
    before = asyncio.all_tasks()
    async with PostgresStore(server.url, schema=schema, timeout=PATIENT) as store:
        await store.create("key", {}, lifetime=LONG)
        async with watching(store, "key"):
            await asyncio.gather(*(store.append("key", Batch(drafts(b"x"))) for _ in range(30)))
            assert await sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", schema) > 1
    assert asyncio.all_tasks() == before

    async def gone() -> bool:
        return bool(await sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", schema) == 0)

    await eventually(gone)


# ---- the news


def test_news_are_packed_in_order() -> None:
    """Several logs share a payload, which has at most 7,999 bytes; what does not fit goes with the next ones."""
    assert pack("me", ["a", "b"]) == (["me\na\nb"], 2)
    keys = [f"{n:04}" + "x" * 60 for n in range(5_000)]
    heard_keys: list[str] = []
    waiting = keys
    while waiting:
        payloads, taken = pack("me", waiting)
        assert all(len(payload) <= MAX_PAYLOAD for payload in payloads)
        heard_keys += [key for payload in payloads for key in payload.split("\n")[1:]]
        waiting = waiting[taken:]
    assert heard_keys == keys


async def test_only_own_news_carry_events(server: PostgresServer, store: PostgresStore) -> None:
    """P14: what the server answered an append is known here; what comes over the channel says at most "read"."""
    async with PostgresStore(server.url, schema=store._address.schema, timeout=PATIENT) as other:
        await store.create("key", {}, lifetime=LONG)
        async with watching(store, "key") as here, watching(other, "key") as there:
            for batch in (Batch(drafts(b"1")), Batch(drafts(b"2", b"\0\n "), stream=NEW_STREAM)):
                before = (await store.load("key")).head
                await store.append("key", batch)
                assert await heard(here) == News(before, await read_all(store, "key", before))
                assert await heard(there) is None
        async with aclosing(follow(other, "key")) as followed:
            appends = [store.append("key", Batch(drafts(b"%d" % n))) for n in range(50)]
            seen, *_ = await asyncio.gather(take(followed, 53), *appends)
        assert seen == await read_all(store, "key")


async def test_reads_for_everybody_are_paced(server: PostgresServer, store: PostgresStore, sql: Any) -> None:
    """P10, P14: one short payload costs work in proportion to all that is watched, and any role may send it."""
    schema = store._address.schema
    await store.create("key", {}, lifetime=LONG)
    async with PostgresStore(server.url, schema=schema, timeout=PATIENT) as other, watching(store, "key") as hints:
        loop = asyncio.get_running_loop()
        began, sent = loop.time(), 500
        for _ in range(sent):
            await sql("SELECT pg_notify($1, $2)", schema, "anybody\n ")
        async with aclosing(follow(store, "key")) as followed:
            await other.append("key", Batch(drafts(b"fence")))
            assert texts(await take(followed, 1)) == [b"fence"]
        assert 1 <= hints.qsize() <= 3 + (loop.time() - began) / 0.2
        while hints.qsize():
            assert hints.get_nowait() is None


async def test_subscription_that_went_silent_is_replaced(
    server: PostgresServer, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A black hole looks like silence: what a process sends itself it has to hear, else everybody reads (P9)."""
    async with (
        FaultProxy(server.url) as proxy,
        PostgresStore(server.url, schema=schema, listen_dsn=proxy.url, heartbeat=0.1) as store,
        PostgresStore(server.url, schema=schema, timeout=PATIENT) as other,
    ):
        await store.create("key", {}, lifetime=LONG)
        async with watching(store, "key") as hints:
            with caplog.at_level(logging.WARNING, logger="nonstick.store"):
                proxy.black_hole()
                await other.append("key", Batch(drafts(b"unheard")))

                async def noticed() -> bool:
                    return "silent" in caplog.text

                await eventually(noticed)
            await proxy.heal()
            while await heard(hints) is not None:
                pass
            assert texts(await read_all(store, "key")) == [b"unheard"]


async def test_unsent_news_are_sent_later(server: PostgresServer, schema: str) -> None:
    """An append whose announcement failed is announced as soon as the store can be reached again (P9)."""
    async with (
        FaultProxy(server.url) as proxy,
        PostgresStore(proxy.url, schema=schema) as store,
        PostgresStore(server.url, schema=schema, timeout=PATIENT) as other,
    ):
        await store.create("key", {}, lifetime=LONG)
        async with watching(other, "key") as hints:
            proxy.drop_replies(1, after=b"event-1")
            with pytest.raises(StoreUnavailable):
                await store.append("key", Batch(drafts(b"event-1"), writer="w", sequence=1))
            assert hints.empty()
            await proxy.cut()
            store._wakes.announce("key", None)
            with pytest.raises(StoreUnavailable):
                await store.ping()
            await proxy.heal()
            assert await heard(hints) is None


async def test_repeated_append_is_announced_again(server: PostgresServer, schema: str) -> None:
    """Where the first answer was lost, nobody has been woken yet: the duplicate does it."""
    async with (
        FaultProxy(server.url) as proxy,
        PostgresStore(proxy.url, schema=schema) as store,
        PostgresStore(server.url, schema=schema, timeout=PATIENT) as other,
    ):
        await store.create("key", {}, lifetime=LONG)
        async with watching(other, "key") as hints:
            batch = Batch(drafts(b"event-1"), writer="w", sequence=1)
            proxy.lose_next_reply(after=b"event-1")
            with pytest.raises(StoreUnavailable):
                await store.append("key", batch)
            assert (await recovered(lambda: store.append("key", batch))).duplicate
            assert await heard(hints) is None


async def test_store_works_without_prepared_statements(server: PostgresServer, schema: str) -> None:
    """`prepared=False`: for poolers that hand each transaction to another server session."""
    async with PostgresStore(server.url, schema=schema, prepared=False, timeout=PATIENT) as store:
        await store.create("key", {"x": b"1"}, lifetime=LONG, limits={"g": 5})
        await store.append("key", Batch(drafts(b"1"), writer="w", sequence=1, fields={"x": None}))
        assert (await store.load("key")).fields == {}
        assert texts(await read_all(store, "key")) == [b"1"]
        assert await store.delete("key")


@unhurried("grace", 1.0, 4.0, 16.0)
async def test_database_without_its_tables_is_doubted(
    server: PostgresServer, schema: str, sql: Any, caplog: pytest.LogCaptureFixture, grace: float
) -> None:
    """P15: what it does not have is unavailable, new sessions open at once; then its mark is another one."""
    async with PostgresStore(server.url, schema=schema, empty_grace=grace, timeout=PATIENT) as store:
        caplog.clear()
        await store.create("key", {}, lifetime=LONG)
        with pytest.raises(SessionNotFound):
            await store.load("nobody")
        mark = await sql(f"SELECT mark FROM {schema}.mark")
        await sql(f"DROP SCHEMA {schema} CASCADE")
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "load": lambda: store.load("key"),
            "update": lambda: store.update("key", {"a": b"1"}),
            "delete": lambda: store.delete("key"),
            "append": lambda: store.append("key", Batch(drafts(b"x"))),
            "read": lambda: store.read("key", Cursor(0)),
            "skim": lambda: store.skim("key", Cursor(0)),
            "lapsed": lambda: store.lapsed(["node"]),
        }
        for call in calls.values():
            with pytest.raises(StoreUnavailable, match="empty or of another history"):
                await call()
        await store.create("young", {}, lifetime=LONG)
        assert (await store.load("young")).fields == {}
        async with asyncio.timeout(60):
            while True:
                try:
                    await store.load("key")
                except StoreUnavailable:
                    await asyncio.sleep(0.05)
                except SessionNotFound:
                    break
        assert await store.lapsed(["node"]) == {"node"}
        assert await sql(f"SELECT mark FROM {schema}.mark") not in ("", mark)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 2
    assert "bring that back now" in told[0]
    assert "404 from now on" in told[1]


async def test_tables_restored_in_time_end_nothing(server: PostgresServer, schema: str, sql: Any) -> None:
    """P15: nobody ever heard "gone", and nothing is doubted any more."""
    async with PostgresStore(server.url, schema=schema, timeout=PATIENT) as store:
        await store.create("key", {"a": b"1"}, lifetime=LONG)
        await sql(f"ALTER SCHEMA {schema} RENAME TO {schema}_away")
        with pytest.raises(StoreUnavailable, match="empty or of another history"):
            await store.load("key")
        await sql(f"DROP SCHEMA {schema} CASCADE")
        await sql(f"ALTER SCHEMA {schema}_away RENAME TO {schema}")
        assert (await store.load("key")).fields == {"a": b"1"}
        with pytest.raises(SessionNotFound):
            await store.load("nobody")


async def test_crashed_unlogged_tables_are_doubted(schema: str) -> None:
    """P15: the mark goes where the sessions go."""
    with PostgresServer() as own:
        async with PostgresStore(own.url, schema=schema, unlogged=True) as store:
            await store.create("key", {}, lifetime=LONG)
            with pytest.raises(SessionNotFound):
                await store.load("nobody")
            await asyncio.to_thread(own.restart, keep_data=True)
            async with asyncio.timeout(60):
                with pytest.raises(StoreUnavailable, match="empty or of another history"):
                    while True:
                        try:
                            await store.load("key")
                        except StoreUnavailable as error:
                            if "empty" in str(error):
                                raise
                            await asyncio.sleep(0.05)
