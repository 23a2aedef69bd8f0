"""The node that holds a session is killed, freezes, or stops (P7, P8). On real processes, with short leases."""

from __future__ import annotations

import asyncio

import pytest

from nonstick.testing.servers.processes import NodeProcess
from tests.faults.client import Session, error_of
from tests.faults.stage import Stage, gone_in

pytestmark = pytest.mark.anyio

LEASE = 2.0


async def owned(stage: Stage, *, movable: bool) -> tuple[Session, list[NodeProcess]]:
    """A session that the first of three nodes holds, and a client that talks to the two others."""
    nodes = await stage.start(3, lease=LEASE, placement="owner", movable=movable)
    client = stage.client(nodes=nodes[:1])
    await client.open()
    client.targets = nodes[1:]
    return client, nodes


async def used(client: Session, on: NodeProcess | None = None) -> str:
    """How often what the session holds was used."""
    terminal = await client.call("hold", on=on).end()
    assert terminal is not None
    assert "result" in terminal, terminal
    return str(terminal["result"]["content"][1]["text"])


@pytest.mark.slow
async def test_killed_owners_session_is_built_anew(stage: Stage) -> None:
    """P7: what ran ends with one error; what comes then works."""
    client, [a, b, c] = await owned(stage, movable=True)
    assert await used(client, b) == "1"
    running = client.call("count", on=b, steps=1000, pause=0.05)
    await stage.recorded(running.label, "start")
    await running.started.wait()
    a.kill()
    found = await asyncio.gather(used(client, b), used(client, c))
    assert sorted(found) == ["101", "102"]
    assert error_of(await running.end()) == {"reason": "node_lost", "retrySafe": False}
    assert [await used(client) for _ in range(3)] == ["103", "104", "105"]
    assert stage.judge() == []


@pytest.mark.slow
async def test_session_that_cannot_be_rebuilt_ends(stage: Stage) -> None:
    """P7: what ran, and what finds it out, get an error that says so; what comes then gets 404."""
    client, [a, b, c] = await owned(stage, movable=False)
    assert await used(client, b) == "1"
    running = client.call("count", on=b, steps=1000, pause=0.05)
    await running.started.wait()
    a.kill()
    finds = client.call("hold", on=c)
    assert error_of(await finds.end()) == {"reason": "session_lost", "retrySafe": True}
    assert error_of(await running.end()) == {"reason": "session_lost", "retrySafe": False}
    for node in (b, c):
        assert await client.ping(node) == 404


async def test_woken_owner_gives_its_session_up(stage: Stage) -> None:
    """P7: it writes nothing more to what it ran, and runs its clean-up."""
    client, [a, b, c] = await owned(stage, movable=True)
    assert await used(client, b) == "1"
    running = client.call("count", on=b, steps=1000, pause=0.05)
    await running.started.wait()
    a.freeze()
    assert await used(client, c) == "101"
    terminal = await running.end()
    assert error_of(terminal) == {"reason": "node_lost", "retrySafe": False}
    a.thaw()
    await stage.recorded(running.label, "cancelled")
    cleaned = await stage.recorded("held", "cleaned")
    assert (cleaned.node, cleaned.value) == ("a", "0")
    client.targets = [a, b, c]
    assert [await used(client, on) for on in (a, b, c)] == ["102", "103", "104"]
    for node in (a, b, c):
        await client.replay(running, on=node)
    assert stage.judge() == []


@pytest.mark.slow
async def test_stopped_owner_leaves_session_to_another(stage: Stage) -> None:
    """P8: SIGTERM; nobody gets an error, and its clean-up runs before."""
    client, [a, b, c] = await owned(stage, movable=True)
    assert await used(client, b) == "1"
    running = client.call("count", on=c, steps=10, pause=0.05)
    await running.started.wait()
    a.terminate()
    found = [int(await used(client, b))]
    terminal = await running.end()
    assert terminal is not None
    assert "result" in terminal
    while len(found) < 20 and found[-1] < 101:
        found.append(int(await used(client)))
    assert found[-1] == 101
    assert await gone_in(a, 10.0), a.written
    assert (await stage.recorded("held", "cleaned")).node == "a"
    assert stage.judge() == []
