"""What is said of a Redis-compatible server: a real Valkey in several states, and what others say of themselves."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from typing import Any

import pytest
import redis.asyncio as redis

from nonstick.errors import StoreUnavailable
from nonstick.stores.common.clocks import clock_finding
from nonstick.stores.common.upkeep import Examinable, Finding
from nonstick.stores.redis import RedisStore
from nonstick.stores.redis.examine import HARMLESS, check_server
from nonstick.testing import ValkeyServer

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer(appendonly=True) as server:
        yield server


@pytest.fixture
async def admin(server: ValkeyServer) -> AsyncIterator[Any]:
    async with redis.Redis.from_url(server.url) as admin:
        yield admin


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


async def said(**info: object) -> dict[str, Finding]:
    """What is made of a server that says this of itself."""

    async def call(*command: object) -> bytes:
        assert command == ("INFO",)
        return "\r\n".join(f"{name}:{value}" for name, value in info.items()).encode()

    return by_subject(await check_server(call))


async def test_healthy_server_is_left_unchanged(server: ValkeyServer, admin: Any) -> None:
    """`Examinable.examine`: every finding is ok, and nothing stays behind."""
    store = RedisStore(server.url)
    assert isinstance(store, Examinable)
    findings = await store.examine()
    assert {finding.level for finding in findings} == {"ok"}
    assert {finding.subject for finding in findings} >= {"version", "role", "eviction", "clock", "permissions"}
    assert [key for key in await admin.keys("*") if key != b"nonstick:ping"] == []


async def test_missing_permissions_come_with_commands(server: ValkeyServer, admin: Any) -> None:
    """A user of the prefix only, without XADD and INFO: the rest of what there is to know is still told."""
    await admin.execute_command(
        *["ACL", "SETUSER", "limited", "on", ">hunter2", "~mine:*", "&mine:*", "+@all", "-xadd", "-info"],
    )
    url = server.url.replace("redis://", "redis://limited:hunter2@")
    found = by_subject(await RedisStore(url, prefix="mine").examine())
    assert found["permissions"].level == "error"
    assert "may not run XADD on mine:*" in found["permissions"].text
    assert "ACL SETUSER limited ~mine:* &mine:* +xadd" in found["permissions"].advice
    assert found["version"].level == "warning"
    assert "hunter2" not in repr(found)
    others = by_subject(await RedisStore(url, prefix="theirs").examine())
    assert "HSET" in others["permissions"].text


async def test_users_of_channels_alone_are_named(server: ValkeyServer, admin: Any) -> None:
    """P14: it reads what is announced, or announces; who has the sessions as well gains nothing by that."""
    users = {
        "listener": ["on", ">a", "resetkeys", "&*", "-@all", "+subscribe"],
        "sender": ["on", ">b", "~other:*", "resetchannels", "&mine:*", "+@all"],
        "reader": ["on", ">c", "~mine:*", "&mine:*", "-@all", "+subscribe", "+xrange", "+publish"],
        "operator": ["on", ">d", "~*", "&*", "+@all"],
        "elsewhere": ["on", ">e", "~other:*", "resetchannels", "&other:*", "+@all"],
        "nobody": ["off", ">f", "resetkeys", "&*", "+@all"],
    }
    try:
        for name, rules in users.items():
            await admin.execute_command("ACL", "SETUSER", name, *rules)
        channels = by_subject(await RedisStore(server.url, prefix="mine").examine())["channels"]
        assert channels.level == "warning"
        for outsider in ("listener (hears)", "sender (hears and sends)", "reader (sends)"):
            assert outsider in channels.text
        assert not [name for name in ("operator", "elsewhere", "nobody", "default") if name in channels.text]
        assert "resetchannels" in channels.advice
    finally:
        await admin.execute_command("ACL", "DELUSER", *users, "limited")
    channels = by_subject(await RedisStore(server.url, prefix="mine").examine())["channels"]
    assert channels.level == "ok"
    assert "has no password" in channels.text


async def test_unreadable_rules_are_reported_unknown(server: ValkeyServer, admin: Any) -> None:
    """Nothing is said to be well that was not looked at."""
    await admin.execute_command(*["ACL", "SETUSER", "plain", "on", ">hunter2", "~mine:*", "&mine:*", "+@all", "-acl"])
    try:
        url = server.url.replace("redis://", "redis://plain:hunter2@")
        channels = by_subject(await RedisStore(url, prefix="mine").examine())["channels"]
        assert (channels.level, "is not known" in channels.text) == ("ok", True)
    finally:
        await admin.execute_command("ACL", "DELUSER", "plain")


async def test_wrong_password_is_reported_unrepeated(server: ValkeyServer) -> None:
    """`Examinable.examine`: StoreUnavailable if it lets nobody in; the message holds no credentials (P13)."""
    with pytest.raises(StoreUnavailable) as refused:
        await RedisStore(server.url.replace("redis://", "redis://nobody:hunter2@")).examine()
    assert "login" in str(refused.value)
    assert "hunter2" not in str(refused.value)


async def test_evicting_server_with_limit_is_error(server: ValkeyServer, admin: Any) -> None:
    """Any policy but noeviction drops one key of a session and not the rest."""
    try:
        await admin.config_set("maxmemory-policy", "volatile-lru")
        assert by_subject(await RedisStore(server.url).examine())["eviction"].level == "warning"
        await admin.config_set("maxmemory", "100mb")
        eviction = by_subject(await RedisStore(server.url).examine())["eviction"]
        assert eviction.level == "error"
        assert "CONFIG SET maxmemory-policy noeviction" in eviction.advice
    finally:
        await admin.config_set("maxmemory-policy", "noeviction")
        await admin.config_set("maxmemory", "0")


async def test_replica_is_refused(server: ValkeyServer) -> None:
    """A replica takes no writes: nothing else can be tried."""
    with ValkeyServer("--replicaof", f"127.0.0.1 {server.port}") as replica:
        found = by_subject(await RedisStore(replica.url).examine())
    assert found["role"].level == "error"
    assert found["role"].blocks
    assert "primary" in found["role"].advice
    assert "permissions" not in found


@pytest.mark.parametrize(
    ("info", "subject", "level"),
    [
        ({"redis_version": "6.0.16"}, "version", "error"),
        ({"redis_version": "6.2.0"}, "version", "ok"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, "version", "ok"),
        ({"redis_mode": "sentinel"}, "role", "error"),
        ({"redis_mode": "cluster"}, "role", "error"),
        ({"role": "master"}, "role", "ok"),
        ({"used_memory": 95, "maxmemory": 100}, "memory", "warning"),
        ({"aof_enabled": 1}, "persistence", "ok"),
        ({"aof_enabled": 0}, "persistence", "warning"),
        ({"aof_enabled": 1, "aof_last_write_status": "err"}, "persistence", "error"),
    ],
)
async def test_servers_facts_are_judged(info: dict[str, object], subject: str, level: str) -> None:
    """Each finding that is not ok says what to do."""
    finding = (await said(**info))[subject]
    assert finding.level == level
    assert bool(finding.advice) == (level != "ok")


def test_every_scripts_command_is_checked() -> None:
    """A permission that a script needs must not be found out by a client."""
    folder = resources.files("nonstick.stores.redis") / "lua"
    scripts = [entry.read_text() for entry in folder.iterdir() if entry.name.endswith(".lua")]
    used = {command for script in scripts for command in re.findall(r"redis\.p?call\('(\w+)'", script)}
    assert len(used) > 15
    assert used <= {str(command[0]) for command in HARMLESS}


def test_clock_is_judged_within_round_trip() -> None:
    """A slow answer makes the comparison less exact, not the clock wrong."""
    now = 1_700_000_000.0
    assert clock_finding(now + 0.5, now, now + 1).level == "ok"
    assert clock_finding(now - 60, now, now + 0.01).level == "warning"
    assert clock_finding(now + 7, now, now + 20).level == "ok"


async def test_examining_opens_no_store(server: ValkeyServer) -> None:
    """`Examinable.examine`: whether or not the store is entered."""
    store = RedisStore(server.url, prefix=f"t{secrets.token_hex(4)}")
    await store.examine()
    async with store:
        await store.create("key", {}, lifetime=60)
        await store.examine()
        await store.load("key")
