"""What can be wrong with a Redis-compatible server: version, role, eviction, persistence, permissions, clock.

All of it works with a function that runs one command, so it serves one server and each node of a cluster alike.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nonstick.errors import StoreUnavailable
from nonstick.stores.common.clocks import clock_finding
from nonstick.stores.common.upkeep import Finding

__all__ = ["HARMLESS", "Call", "check_clock", "check_permissions", "check_server"]

Call = Callable[..., Awaitable[Any]]
"""Runs a command on one server and returns its reply; raises StoreUnavailable also where the server refuses it."""

OLDEST: Final = (6, 2)
"""The scripts use commands from here on."""

_NEARLY_FULL: Final = 0.9

_UNSEEN: Final = "Allow the store's user INFO to have this looked at: ACL SETUSER name +info"

HARMLESS: Final[tuple[tuple[str | int, ...], ...]] = (
    ("EXISTS", "{key}"),
    ("HDEL", "{key}", "x"),
    ("HEXISTS", "{key}", "x"),
    ("HGET", "{key}", "x"),
    ("HGETALL", "{key}"),
    ("HKEYS", "{key}"),
    ("HMGET", "{key}", "x"),
    ("PTTL", "{key}"),
    ("PEXPIREAT", "{key}", 1),
    ("XDEL", "{key}", "0-1"),
    ("XLEN", "{key}"),
    ("XRANGE", "{key}", "-", "+"),
    ("XADD", "{key}", "NOMKSTREAM", "*", "x", ""),
    ("ZCOUNT", "{group}", "-inf", "+inf"),
    ("ZREM", "{group}", "x"),
    ("ZSCORE", "{group}", "x"),
    ("ZREMRANGEBYSCORE", "{group}", "-inf", "-inf"),
    ("ZADD", "{group}", "XX", 1, "x"),
    ("ZSCORE", "{group}", "x"),
    ("TIME",),
    ("PING",),
    ("PUBLISH", "{channel}", ""),
    ("SET", "{ping}", "", "PX", 1000),
    ("GET", "{ping}"),
    ("HSET", "{key}", "x", ""),
    ("DEL", "{key}"),
    ("EVAL", "return 1", 1, "{key}"),
)
"""Every command that the scripts and the store use, in a form that leaves nothing behind."""


async def check_server(call: Call, *, cluster: bool = False) -> list[Finding]:
    """Version, role, eviction and persistence of this server. Also for the start of a node: reads only, one round trip.

    Raises:
        StoreUnavailable: The server cannot be reached. That it refuses INFO is a finding instead.
    """
    try:
        info = _parsed(await call("INFO"))
    except StoreUnavailable as error:
        await call("PING")  # which tells a server that is away from one that refuses
        return [Finding("warning", "version", f"the server does not tell about itself: {error}", _UNSEEN)]
    return [_version(info), _role(info, cluster=cluster), *_memory(info), _persistence(info)]


async def check_clock(call: Call) -> Finding:
    """The server's clock against this machine's, as exactly as one round trip allows."""
    before = time.time()
    try:
        seconds, micros = map(int, await call("TIME"))
    except StoreUnavailable as error:
        await call("PING")
        return Finding("warning", "clock", f"the server does not tell the time: {error}", "See permissions.")
    return clock_finding(seconds + micros / 1e6, before, time.time())


async def check_permissions(call: Call, *, prefix: str, key: str) -> list[Finding]:
    """Whether the store's user may run every command that the store uses, under its prefix.

    Args:
        key: A session key that nobody uses; nothing is left under it.
    """
    names = {
        "{key}": f"{prefix}:{{{key}}}:r",
        "{group}": f"{prefix}:g:{key}",
        "{channel}": f"{prefix}:{{{key}}}:c0",
        "{ping}": f"{prefix}:ping",
    }
    refused: list[str] = []
    for command in HARMLESS:
        try:
            await call(*(names.get(str(part), part) for part in command))
        except StoreUnavailable as error:
            if "permission" not in str(error):
                raise
            refused.append(str(command[0]))
    user = await _whoami(call)
    if refused:
        return [
            Finding(
                "error",
                "permissions",
                f"the user {user} may not run {', '.join(refused)} on {prefix}:*",
                f"ACL SETUSER {user} ~{prefix}:* &{prefix}:* {' '.join('+' + name.lower() for name in refused)} "
                "(and +evalsha +subscribe +unsubscribe), then ACL SAVE or the same in the server's configuration.",
            )
        ]
    return [Finding("ok", "permissions", f"the user {user} may run every command that is needed")]


async def _whoami(call: Call) -> str:
    try:
        name: bytes = await call("ACL", "WHOAMI")
    except StoreUnavailable:
        return "of this URL"
    return name.decode(errors="replace")


def _parsed(reply: bytes) -> dict[str, str]:
    lines = reply.decode(errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def _version(info: dict[str, str]) -> Finding:
    valkey = info.get("valkey_version", "")
    text = f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version', 'of unknown version')}"
    speaks = tuple(int(part) for part in re.findall(r"\d+", info.get("redis_version", ""))[:2])
    if speaks and speaks < OLDEST:
        return Finding("error", "version", text, "Upgrade: nonstick needs Redis 6.2 or newer, or any Valkey.")
    return Finding("ok", "version", text)


def _mode(info: dict[str, str]) -> str:
    """Valkey 9 calls it otherwise."""
    return info.get("redis_mode") or info.get("server_mode", "")


def _role(info: dict[str, str], *, cluster: bool) -> Finding:
    if _mode(info) == "cluster" and not cluster:
        advice = "Write redis+cluster:// instead of redis:// in the URL."
        return Finding(
            "error", "role", "a member of a Cluster, which has only a part of the keys", advice, blocks=True, lasts=True
        )
    if _mode(info) == "sentinel":
        return Finding(
            "error",
            "role",
            "a Sentinel, which keeps no data",
            "Name the Sentinels and their service with a redis+sentinel:// URL.",
            blocks=True,
            lasts=True,
        )
    if info.get("role") == "slave":
        away = "" if info.get("master_link_status") == "up" else ", which has lost its primary"
        return Finding(
            "error",
            "role",
            f"a replica{away}: it refuses every write",
            "Point the URL at the primary.",
            blocks=True,
        )
    replicas = int(info.get("connected_slaves", "0") or 0)
    return Finding("ok", "role", f"primary, with {replicas} replica{'' if replicas == 1 else 's'}")


def _memory(info: dict[str, str]) -> list[Finding]:
    limit = int(info.get("maxmemory", "0") or 0)
    used = int(info.get("used_memory", "0") or 0)
    policy = info.get("maxmemory_policy", "noeviction")
    findings = []
    if policy != "noeviction":
        # Whichever policy: it drops one key of a session and not the rest.
        findings.append(
            Finding(
                "error" if limit else "warning",
                "eviction",
                f"maxmemory-policy is {policy}: "
                + ("" if limit else "with a maxmemory ")
                + "the server drops parts of live sessions when its memory is full",
                "CONFIG SET maxmemory-policy noeviction, and the same in the server's configuration. A cache beside "
                "it needs a server of its own.",
            )
        )
    else:
        findings.append(Finding("ok", "eviction", "maxmemory-policy is noeviction"))
    if not limit:
        text = f"{_size(used)} used, without a limit"
        return [*findings, Finding("ok", "memory", text)]
    text = f"{_size(used)} of {_size(limit)} used"
    if used > _NEARLY_FULL * limit:
        advice = "Raise maxmemory, or lower max_sessions or the session timeout: when it is full, clients get 503."
        return [*findings, Finding("warning", "memory", text, advice)]
    return [*findings, Finding("ok", "memory", text)]


def _persistence(info: dict[str, str]) -> Finding:
    if "err" in (info.get("rdb_last_bgsave_status"), info.get("aof_last_write_status")):
        advice = "See the server's log: its disk may be full or not writable. It may refuse writes until then."
        return Finding("error", "persistence", "the server could not save to its disk", advice)
    if info.get("aof_enabled") == "1":
        return Finding("ok", "persistence", "every write goes to the append-only file")
    saved = int(info.get("rdb_last_save_time", "0") or 0)
    started = int(time.time()) - int(info.get("uptime_in_seconds", "0") or 0)
    snapshots = saved > started + 5
    return Finding(
        "warning",
        "persistence",
        "snapshots only: a crash loses what came after the last one"
        if snapshots
        else "no append-only file: a restart of the server may end every session",
        "CONFIG SET appendonly yes (and the same in the server's configuration), if sessions are to survive that.",
    )


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
