"""A session lives on whichever release serves it, while one takes the other's place (P12). Real processes."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

import nonstick
from nonstick.testing.oracle import Answered
from nonstick.testing.servers.processes import NodeProcess
from tests.faults.client import HEADERS, VERSION, Patience, Session
from tests.faults.stage import Stage, gone_in
from tests.rolling.releases import released, wheel_version

pytestmark = pytest.mark.anyio

GRACE = 3.0
GONE = GRACE + 3.0


def slow(store: str) -> Any:
    """This store, where there is time."""
    return pytest.param(store, marks=pytest.mark.slow)


def number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3]]


def test_wheel_is_of_the_last_release() -> None:
    """The newest version in the changelog that is older than this code."""
    before = [version for version in released() if number(version) < number(nonstick.__version__)]
    assert wheel_version() == before[0]


async def serves(node: NodeProcess) -> str:
    """The version of nonstick that runs there."""
    client = {"name": "test", "version": "1"}
    params = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": client}
    message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
    async with httpx2.AsyncClient(timeout=60) as http:
        answer = await http.post(node.url, json=message, headers=HEADERS)
    version: str = answer.json()["result"]["serverInfo"]["version"]
    return version


async def across(stage: Stage, one: NodeProcess, other: NodeProcess) -> None:
    """A life in which `one` runs the requests, and everything else comes to `other`."""
    client = stage.client(nodes=[other], cuts=1.0, patience=Patience(idle=5.0, call=60.0))
    await client.open(on=one)
    client.listen()
    assert await client.call("remember", on=one, value="kept", seconds=0.0).end()
    recalled = await client.call("recall").end()
    assert recalled is not None
    assert "kept" in str(recalled["result"])
    # Cut at random bytes, so that the rest is resumed at the other; asked, so that replies come in there.
    calls = [
        client.call("count", on=one, steps=12, pause=0.05),
        client.call("ask", on=one, steps=3),
        client.call("announce", on=one, steps=5, pause=0.05, standalone=True),
        client.call("plain", on=one),
        client.call("wait", on=one, seconds=0.5),
    ]
    for call in calls:
        terminal = await call.end()
        # A connection that was cut before the client had an event id ends unknown: no release's fault.
        assert terminal is None or "result" in terminal, terminal
    for call in calls[:2]:
        await client.replay(call, on=other)
        await client.replay(call, on=one)
    endless = client.call("count", on=one, steps=100_000, pause=0.05)
    await stage.recorded(endless.label, "start")
    assert await client.cancel(endless, on=other) == 202
    await stage.recorded(endless.label, "cancelled")
    await endless.end()
    assert await client.catch_up()
    assert await client.delete(on=other) == 200
    assert await client.ping(one) == 404
    await client.close()


@pytest.mark.parametrize("store_url", [slow("sqlite"), "valkey", slow("postgres")], indirect=True)
async def test_each_release_continues_the_others_sessions(
    store_url: str, tmp_path: Path, last_release: dict[str, str]
) -> None:
    """P12: opened, called, asked, resumed, replayed, cancelled and ended, each way."""
    async with Stage(store_url, tmp_path) as stage:
        old, new = stage.node(env=last_release), stage.node()
        await asyncio.gather(old.start(), new.start())
        assert [await serves(old), await serves(new)] == [wheel_version(), nonstick.__version__]
        await asyncio.gather(across(stage, old, new), across(stage, new, old))
        assert stage.judge() == []
        check_logs(stage)


def check_logs(stage: Stage) -> None:
    for node in stage.nodes:
        assert "Traceback" not in node.written, node.written


async def load(stage: Stage, client: Session, over: asyncio.Event) -> Counter[str]:
    """Calls of every kind until it is over; how they ended."""
    ends: Counter[str] = Counter()
    number = 0
    while not over.is_set():
        number += 1
        kept = await client.call("remember", value=f"value {number}", seconds=0.0).end()
        calls = [
            client.call("count", steps=6, pause=0.05),
            client.call("announce", steps=3, pause=0.05, standalone=True),
            client.call("ask", steps=2),
            client.call("wait", seconds=0.3),
            client.call("recall"),
        ]
        for call in calls:
            terminal = await call.end()
            ends["none" if terminal is None else "result" if "result" in terminal else "error"] += 1
        if kept and "result" in kept and terminal:
            assert f"value {number}" in str(terminal["result"])
        if number % 3 == 0:
            await client.replay(calls[0])
    return ends


async def replace(stage: Stage, node: NodeProcess, env: dict[str, str] | None) -> None:
    """Another node takes this one's place, as in a rolling update."""
    another = stage.node(env=env, lease=6.0, grace=GRACE)
    stage.nodes.remove(another)
    await another.start()
    stage.nodes.append(another)
    node.terminate()
    assert await gone_in(node, GONE), node.written
    stage.nodes.remove(node)


async def roll(stage: Stage, last_release: dict[str, str], *, nodes: int, clients: int, back: bool) -> None:
    for _ in range(nodes):
        stage.node(env=last_release, lease=6.0, grace=GRACE)
    await asyncio.gather(*(node.start() for node in stage.nodes))

    def not_taken(label: str) -> bool:
        return not stage.runs(label)

    users = [
        stage.client(seed=seed, cuts=0.1, retry_unsent=not_taken, patience=Patience(idle=5.0, call=60.0))
        for seed in range(clients)
    ]
    for user in users:
        await user.open()
        user.listen()
    over = asyncio.Event()
    loads = [asyncio.create_task(load(stage, user, over)) for user in users]
    gone: list[NodeProcess] = []
    for env in [None, last_release] if back else [None]:
        for node in list(stage.nodes):
            gone.append(node)
            await replace(stage, node, env)
        assert {await serves(node) for node in stage.nodes} == {wheel_version() if env else nonstick.__version__}
    over.set()
    ends = sum([await one for one in loads], Counter[str]())
    for user in users:
        assert await user.catch_up()
        for node in stage.nodes:
            assert await user.ping(node) == 200
    lost = [record for record in stage.history.records if getattr(record, "why", "") == "lost"]
    assert ends["none"] == len(lost), ends
    assert ends["error"] == 0, ends
    assert ends["result"] > 10, ends
    assert not any(isinstance(record, Answered) and record.status >= 500 for record in stage.history.records)
    assert stage.judge() == []
    stage.nodes += gone
    check_logs(stage)


@pytest.mark.parametrize("store_url", ["sqlite", slow("valkey"), slow("postgres")], indirect=True)
async def test_nodes_are_replaced_under_load(store_url: str, tmp_path: Path, last_release: dict[str, str]) -> None:
    """P12, P8: sessions of the last release go on in this one; no failed request, no lost or doubled event."""
    async with Stage(store_url, tmp_path) as stage:
        await roll(stage, last_release, nodes=2, clients=2, back=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_update_rolls_back_under_load(store_url: str, tmp_path: Path, last_release: dict[str, str]) -> None:
    """P12: what this code wrote the last release can read, also when the update is taken back."""
    async with Stage(store_url, tmp_path) as stage:
        await roll(stage, last_release, nodes=3, clients=6, back=True)
