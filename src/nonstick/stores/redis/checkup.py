"""What can be wrong with the servers of a deployment, each of them. See `nonstick.stores.common.upkeep.Examinable`."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from nonstick.stores.common.upkeep import Finding
from nonstick.stores.redis import examine
from nonstick.stores.redis.channels import check_channels
from nonstick.stores.redis.servers import Limits, Servers
from nonstick.stores.redis.sockets import Arg
from nonstick.stores.redis.topology import servers_of
from nonstick.stores.redis.url import Deployment

__all__ = ["examine_all"]


async def examine_all(deployment: Deployment, limits: Limits, *, prefix: str) -> list[Finding]:
    """What each server is and may do, over connections of its own. On a Cluster, each text names its server."""
    servers = servers_of(deployment, replace(limits, examine=False))
    try:
        return await _examine(servers, prefix, cluster=deployment.kind == "cluster")
    finally:
        await servers.close()


async def _examine(servers: Servers, prefix: str, *, cluster: bool) -> list[Finding]:
    findings: list[Finding] = []
    key = secrets.token_hex(20)
    for address, call in await servers.each():
        here = [*await examine.check_server(call, cluster=cluster), await examine.check_clock(call)]
        if not any(finding.blocks for finding in here):
            here.append(await check_channels(call, prefix=prefix, key=key))
        findings += [replace(one, text=f"{address.place}: {one.text}") for one in here] if cluster else here
    if any(finding.blocks for finding in findings):
        return findings

    async def routed(*command: Arg) -> Any:
        key = next((str(part) for part in command if str(part).startswith(f"{prefix}:")), "")
        return await servers.call(key, *command)

    return findings + await examine.check_permissions(routed, prefix=prefix, key=key)
