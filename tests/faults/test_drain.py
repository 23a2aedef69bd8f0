"""SIGTERM: a node finishes what it can, hands its streams over, and goes (P8). Plain uvicorn, real processes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest
from mcp.server import MCPServer

from nonstick.stores.memory import MemoryStore
from nonstick.testing import FaultProxy, ValkeyServer
from nonstick.testing.cluster import Cluster
from nonstick.testing.oracle import Answered
from tests.faults.client import Patience, Session, error_of
from tests.faults.stage import Stage, gone_in
from tests.pace import in_time, unhurried

pytestmark = pytest.mark.anyio

GRACE = 3.0
GONE = GRACE + 2.0
"""Within this, in seconds after SIGTERM, the process has ended."""


async def load(stage: Stage, client: Session, over: asyncio.Event) -> Counter[str]:
    """Calls of every kind, each well shorter than the grace period, until it is over. How they ended."""
    ends: Counter[str] = Counter()
    while not over.is_set():
        calls = [
            client.call("count", steps=8, pause=0.1),
            client.call("announce", steps=4, pause=0.1, standalone=True),
            client.call("ask", steps=2),
            client.call("plain"),
            client.call("wait", seconds=0.6),
        ]
        for call in calls:
            terminal = await call.end()
            ends["none" if terminal is None else "result" if "result" in terminal else "error"] += 1
    return ends


@pytest.mark.timeout(900)
@unhurried("grace", GRACE, 4 * GRACE, 16 * GRACE)
async def test_rolling_restart_under_load_loses_nothing(store_url: str, tmp_path: Path, grace: float) -> None:
    """P8: no failed request, no lost or doubled event, every session lives on, every process is gone in time."""
    home = tmp_path / f"{grace:g}"
    home.mkdir()
    async with Stage(store_url, home) as stage:
        await stage.start(3, lease=6.0, grace=grace)

        def not_taken(label: str) -> bool:
            # A listening socket that closes resets what waits in its queue: a balancer repeats that elsewhere. That it
            # was really not taken, and does not run twice, the tools' records show.
            return not stage.runs(label)

        clients = [stage.client(seed=seed, cuts=0.1, retry_unsent=not_taken) for seed in range(4)]
        for client in clients:
            await client.open()
            client.listen()
        over = asyncio.Event()
        loads = [asyncio.create_task(load(stage, client, over)) for client in clients]
        for node in stage.nodes:
            began = time.monotonic()
            node.terminate()
            assert await gone_in(node, grace + 2.0), node.written
            print(f"{node.name} was gone {time.monotonic() - began:.2f} s after SIGTERM")
            await node.start()
        over.set()
        ends = sum([await one for one in loads], Counter[str]())
        for client in clients:
            assert await client.catch_up()
            for node in stage.nodes:
                assert await client.ping(node) == 200
        # Only what the client cut before it had an event id has no end.
        lost = [record for record in stage.history.records if getattr(record, "why", "") == "lost"]
        assert ends["none"] == len(lost)
        assert ends["error"] == 0
        assert ends["result"] > 20
        assert any(client.retry for client in clients), "no stream was handed over with a hint"
        assert stage.judge() == []


async def test_slow_tool_ends_with_error_elsewhere(stage: Stage) -> None:
    """P8: after the grace, in the log, for the client that resumes on another node; the process is gone in time."""
    a, b = await stage.start(2, grace=1.0)
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("count", steps=1000, pause=0.05)
    await call.started.wait()
    client.targets = [b]
    began = time.monotonic()
    a.terminate()
    resumed = asyncio.create_task(client.read_rest(call, call.ids[0]))
    assert await gone_in(a, 1.0 + 2.0), a.written
    print(f"gone {time.monotonic() - began:.2f} s after SIGTERM, with a grace of 1 s")
    assert error_of(await call.end()) == {"reason": "node_shut_down", "retrySafe": False}
    assert await resumed == call.messages
    assert (await stage.recorded(call.label, "cancelled")).node == "a"
    await client.replay(call, on=b)
    assert stage.judge() == []


@pytest.mark.slow
async def test_unstoppable_handler_keeps_no_client_waiting(stage: Stage) -> None:
    """P8: its request ends without it, within the grace period and a little."""
    a, b = await stage.start(2, grace=1.0)
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("stubborn", seconds=6.0)
    await call.started.wait()
    began = time.monotonic()
    a.terminate()
    assert error_of(await call.end())["reason"] == "node_shut_down"
    assert in_time(time.monotonic() - began, 1.0 + 2.0)
    assert await gone_in(a, 1.0 + 2.0)
    client.targets = [b]
    await client.replay(call)
    assert stage.judge() == []


async def test_node_without_store_ends_in_time(valkey: ValkeyServer, tmp_path: Path) -> None:
    """P8, P9: what it could not say any more, another node says for it."""
    async with FaultProxy(f"{valkey.url}?prefix={tmp_path.name}") as proxy, Stage(proxy.url, tmp_path) as stage:
        stage.node(grace=1.0)
        stage.node(store=f"{valkey.url}?prefix={tmp_path.name}")
        a, b = stage.nodes
        await asyncio.gather(a.start(), b.start())
        client = stage.client(nodes=[a])
        await client.open()
        call = client.call("count", steps=1000, pause=0.05)
        await call.started.wait()
        client.targets = [b]
        await proxy.cut()
        a.terminate()
        # What it still tries has a deadline: the end of the request, and of its lease.
        assert await gone_in(a, 1.0 + 2.0), a.written
        assert error_of(await call.end())["reason"] == "node_lost"
        assert stage.judge() == []


async def test_stream_opened_in_drain_moves_on() -> None:
    """P8: it is handed over at once, and does not keep the process from ending."""
    store = MemoryStore()
    async with Cluster(lambda: MCPServer("quiet"), lambda: store, nodes=1) as cluster:
        a = cluster[0]
        session = await a.open()
        a.app.manager.begin_drain()
        began = time.monotonic()
        async with asyncio.timeout(60), a.stream("GET", session) as response:
            assert response.status_code == 200
            assert "retry: 1000" in (await response.aread()).decode()
        assert in_time(time.monotonic() - began, GONE)


async def test_client_returning_keeps_no_draining_node(stage: Stage) -> None:
    """P8: for as long as its socket still takes connections, they are handed over too."""
    a, _ = await stage.start(2, grace=GRACE)
    client = stage.client(nodes=[a])
    await client.open()
    client.listen()
    call = client.call("announce", steps=1, pause=0.0, standalone=True)
    await client.has(f"{call.label}:1:1")
    a.terminate()
    assert await gone_in(a, 2.0), a.written
    assert client.retry
    client.targets = stage.nodes[1:]
    assert await client.catch_up()
    assert stage.judge() == []


async def test_client_without_event_id_keeps_stream(stage: Stage) -> None:
    """P8: the plain answer of a silent tool comes from the node that is going."""
    a, b = await stage.start(2, grace=GRACE, window=10.0)
    client = stage.client(nodes=[a], patience=Patience(idle=5.0))
    await client.open()
    call = client.call("wait", seconds=1.5)
    await stage.recorded(call.label, "start")
    a.terminate()
    client.targets = [b]
    terminal = await call.end()
    assert terminal is not None
    assert "result" in terminal
    assert not call.ids
    assert await gone_in(a, GONE)
    assert not [record for record in stage.history.records if isinstance(record, Answered) and record.status >= 400]
    assert stage.judge() == []
