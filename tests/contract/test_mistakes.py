"""A mistake in a store's URL, a login or a server is named with what to do, and told from a store that is away."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nonstick.commands.doctor import diagnose
from nonstick.errors import StoreUnavailable, StoreUnusable
from nonstick.stores import open_store
from nonstick.testing import PostgresServer, ValkeyCluster, ValkeySentinel, ValkeyServer
from nonstick.testing.servers.valkey import ReservedPort
from nonstick.testing.servers.valkey_cluster import ask
from tests.tls import self_signed, tls_in_front_of

pytestmark = pytest.mark.anyio

PASSWORD = "hunter2"
DEADLINE = 60.0


async def trouble(url: str, kind: type[StoreUnavailable] = StoreUnavailable) -> StoreUnavailable:
    """What a node hears that tries this store. On a busy machine its first try may end before the cause is known."""
    async with asyncio.timeout(DEADLINE), open_store(url) as store:
        while True:
            with pytest.raises(StoreUnavailable) as refused:
                await store.ping()
            if isinstance(refused.value, kind):
                return refused.value


async def diagnosis(url: str) -> str:
    """What the doctor says is wrong."""
    findings = await diagnose(lambda: open_store(url))
    return " ".join(f"{finding.text} {finding.advice}" for finding in findings if finding.level == "error")


async def assert_named(url: str, *said: str) -> None:
    """A node is told the cause, in words that may be shown to anybody (P13); and so is who asks the doctor."""
    error = str(await trouble(url, StoreUnusable))
    assert all(words in error for words in said), error
    assert "127.0.0.1" not in error
    assert PASSWORD not in error
    async with asyncio.timeout(DEADLINE):
        told = await diagnosis(url)
        while said[-1] not in told:
            assert PASSWORD not in told
            told = await diagnosis(url)


@asynccontextmanager
async def web_server() -> AsyncIterator[int]:
    """Something that speaks HTTP."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


# ---- Redis and Valkey


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("rediss://127.0.0.1:{port}", "no TLS on this port: write redis instead of rediss"),
        ("rediss+cluster://127.0.0.1:{port}", "no TLS on this port"),
        ("redis+cluster://127.0.0.1:{port}", "no Cluster: write redis:// instead of redis+cluster://"),
        ("redis+sentinel://127.0.0.1:{port}/main", "no Sentinel: name the Sentinels"),
        ("redis://127.0.0.1:{port}/99", "no database of that number"),
        ("redis://user:hunter2@127.0.0.1:{port}", "check user and password in its URL"),
        ("postgresql://user:hunter2@127.0.0.1:{port}/db", "a Redis or Valkey server: write redis://"),
    ],
)
async def test_wrong_server_url_is_named(valkey: ValkeyServer, url: str, said: str) -> None:
    await assert_named(url.format(port=valkey.port), said)


async def test_plain_url_of_tls_is_named(valkey: ValkeyServer, tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    async with tls_in_front_of(valkey, certificate) as port:
        await assert_named(
            f"redis://:hunter2@127.0.0.1:{port}", "wants TLS on this port: write rediss instead of redis"
        )
        await assert_named(f"rediss://127.0.0.1:{port}", "is not trusted here", "ssl_ca_certs=FILE")
        await assert_named(f"rediss://localhost:{port}?ssl_ca_certs={certificate}", "made for another name")
        async with open_store(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}") as store:
            await store.ping()


async def test_missing_client_certificate_is_named(valkey: ValkeyServer, tmp_path: Path) -> None:
    """As a Valkey with TLS wants one by default."""
    certificate = self_signed(tmp_path)
    async with tls_in_front_of(valkey, certificate, of_clients=True) as port:
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}"
        await assert_named(url, "name one with ssl_certfile=")
        async with open_store(f"{url}&ssl_certfile={certificate}") as store:
            await store.ping()


async def test_login_that_is_refused_is_named() -> None:
    """None, a wrong one, and one that may not do enough."""
    with ValkeyServer() as server:
        ask(server, "CONFIG", "SET", "requirepass", "right")
        place = f"127.0.0.1:{server.port}"
        await assert_named(f"redis://{place}", "wants a login: put user and password into its URL")
        await assert_named(f"redis://:hunter2@{place}", "refused the login: check user and password")
        await assert_named(f"redis+cluster://:hunter2@{place}", "refused the login")
        await assert_named(f"redis+sentinel://{place}/main", "a Sentinel was asked", "wants a login")
        async with open_store(f"redis://:right@{place}") as store:
            await store.ping()


async def test_missing_permission_is_named(valkey: ValkeyServer) -> None:
    user = f"weak{secrets.token_hex(4)}"
    ask(valkey, "ACL", "SETUSER", user, "on", ">hunter2", "~*", "&*", "+@all", "-evalsha", "-eval")
    async with open_store(f"redis://{user}:hunter2@127.0.0.1:{valkey.port}") as store:
        await store.ping()
        with pytest.raises(StoreUnusable, match=r"lacks a permission: docs/stores\.md"):
            await store.load("key")
    ask(valkey, "ACL", "SETUSER", user, "-set")
    await assert_named(f"redis://{user}:hunter2@127.0.0.1:{valkey.port}", "permission")


async def test_permission_missing_in_script_is_named(valkey: ValkeyServer) -> None:
    user = f"weak{secrets.token_hex(4)}"
    ask(valkey, "ACL", "SETUSER", user, "on", ">hunter2", "~*", "&*", "+@all", "-hset")
    async with open_store(f"redis://{user}:hunter2@127.0.0.1:{valkey.port}") as store:
        with pytest.raises(StoreUnusable, match="lacks a permission"):
            await store.create(secrets.token_hex(8), {}, lifetime=60)


async def test_member_of_a_cluster_is_named(cluster: ValkeyCluster) -> None:
    """Also the member that has the key which the first command is about."""
    for node in cluster.nodes:
        if ask(node, "ROLE")[0] == b"master":
            await assert_named(f"redis://127.0.0.1:{node.port}", "Write redis+cluster:// instead of redis://")


async def test_sentinels_are_told_from_servers(sentinel: ValkeySentinel) -> None:
    seeds = ",".join(f"127.0.0.1:{one.port}" for one in sentinel.sentinels)
    await assert_named(f"redis+sentinel://{seeds}/nobody", "not known there")
    await assert_named(f"redis://127.0.0.1:{sentinel.sentinels[0].port}", "a Sentinel", "redis+sentinel://")


async def test_one_ignorant_sentinel_is_no_mistake(sentinel: ValkeySentinel) -> None:
    """It may have been set up a moment ago; the others are away."""
    away = [ReservedPort() for _ in range(2)]
    seeds = ",".join(f"127.0.0.1:{port}" for port in (sentinel.sentinels[0].port, *(one.port for one in away)))
    error = await trouble(f"redis+sentinel://{seeds}/nobody")
    assert not isinstance(error, StoreUnusable)
    assert "not known there" in str(error)


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "postgresql"])
async def test_server_away_is_no_mistake(scheme: str) -> None:
    """P9: refused, or silent: a node waits for it."""
    away = ReservedPort()
    assert not isinstance(await trouble(f"{scheme}://u:hunter2@127.0.0.1:{away.port}"), StoreUnusable)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, and nobody answers
        assert not isinstance(await trouble(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"), StoreUnusable)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "postgresql"])
async def test_web_server_is_named(scheme: str) -> None:
    async with web_server() as port:
        await assert_named(f"{scheme}://127.0.0.1:{port}", "a web server")


# ---- PostgreSQL


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("postgres?sslmode=require", "no TLS, which sslmode in the URL demands"),
        ("nowhere", "database does not exist: create it, or correct the URL"),
        ("postgres?options=-c%20nonsense%3D1", "refuses a setting in the URL, or in its options: nonsense"),
        ("postgres?statement_timeout=hunter2", "refuses a setting in the URL, or in its options: statement_timeout"),
    ],
)
async def test_wrong_url_of_postgres_is_named(postgres: PostgresServer, options: str, said: str) -> None:
    await assert_named(f"postgresql://nonstick@127.0.0.1:{postgres.port}/{options}", said)


async def test_postgres_behind_redis_url_is_named(postgres: PostgresServer) -> None:
    for scheme in ("redis", "rediss"):
        await assert_named(f"{scheme}://:hunter2@127.0.0.1:{postgres.port}", "a PostgreSQL server: write postgresql://")


async def test_refused_postgres_login_is_named(postgres: PostgresServer) -> None:
    await assert_named(f"postgresql://stranger:hunter2@127.0.0.1:{postgres.port}/postgres", "refused the login")
