"""A node dies, freezes or hangs while it runs a request (P7). On real processes, with short leases."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.faults.client import Patience, error_of
from tests.faults.stage import Stage
from tests.pace import in_time

pytestmark = pytest.mark.anyio

LEASE = 2.0
POLLS = 3.0
"""A reader looks after every 1.5 s of silence, and acts when it sees the node dead for the second time."""

SLACK = 2.0
"""For a busy machine."""


async def test_killed_nodes_request_ends_with_error(stage: Stage) -> None:
    """P7: within lease + poll, under the request's own id, saying whether it may be made again."""
    a, b, _ = await stage.start(3, lease=LEASE)
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("count", steps=1000, pause=0.05)
    await stage.recorded(call.label, "start")
    await call.started.wait()
    client.targets = stage.nodes[1:]
    killed = time.monotonic()
    a.kill()
    terminal = await call.end()
    took = time.monotonic() - killed
    assert terminal is not None
    assert terminal["id"] == call.request_id
    assert error_of(terminal) == {"reason": "node_lost", "retrySafe": False}
    assert in_time(took, LEASE + POLLS + SLACK)
    print(f"terminal {took:.2f} s after the kill")
    await client.replay(call)
    assert await client.ping(b) == 200
    assert stage.judge() == []


@pytest.mark.slow
async def test_error_says_idempotent_call_is_repeatable(stage: Stage) -> None:
    """P7: `retrySafe` follows the tool's own annotation."""
    a, b = await stage.start(2, lease=LEASE)
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("recount", steps=1000, pause=0.05)
    await call.started.wait()
    client.targets = [b]
    a.kill()
    assert error_of(await call.end()) == {"reason": "node_lost", "retrySafe": True}
    assert stage.judge() == []


@pytest.mark.slow
async def test_racing_resumers_get_the_same_end(stage: Stage) -> None:
    """P7: of all who try to end a lost request, the store lets one."""
    a, b, c = await stage.start(3, lease=LEASE)
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("count", steps=1000, pause=0.05)
    await call.started.wait()
    client.targets = [b]
    a.kill()
    # The same stream from its beginning, on the other node at the same time.
    first = call.ids[0]
    other = stage.client(nodes=[c], patience=Patience(idle=3.0, call=60.0))
    other.id, other.name = client.id, client.name
    second = await other.read_rest(call, first)
    terminal = await call.end()
    assert second[-1] == terminal
    assert sum("method" not in message for message in second) == 1
    assert second == call.messages
    assert stage.judge() == []


async def test_woken_node_adds_nothing_and_serves(stage: Stage) -> None:
    """P7: it writes nothing to the stream, saves no state for the request, and its handler is cancelled."""
    a, b = await stage.start(2, lease=LEASE)
    client = stage.client(nodes=[a])
    await client.open()
    count = client.call("count", steps=1000, pause=0.05)
    remember = client.call("remember", value="of the woken node", seconds=60.0)
    await asyncio.gather(count.started.wait(), remember.started.wait())
    client.targets = [b]
    a.freeze()
    for call in (count, remember):
        assert error_of(await call.end())["reason"] == "node_lost"
    a.thaw()
    await stage.recorded(count.label, "cancelled")
    await stage.recorded(remember.label, "cancelled")
    client.targets = [a, b]
    for call in (count, remember):
        await client.replay(call, on=a)
        await client.replay(call, on=b)
    for node in (a, b):
        recall = client.call("recall", on=node)
        terminal = await recall.end()
        assert terminal is not None
        assert terminal["result"]["content"][1]["text"] == "None"
    assert stage.judge() == []


@pytest.mark.slow
async def test_woken_node_saves_no_old_state(stage: Stage) -> None:
    """P7: a connection to the standalone stream, say, keeps the session's view; a later request must not save it."""
    a, b = await stage.start(2, lease=LEASE)
    client = stage.client(nodes=[a], patience=Patience(idle=60.0, call=60.0))
    await client.open()
    client.listen()
    fence = client.call("announce", steps=1, pause=0.0, standalone=True)
    await client.has(f"{fence.label}:1:1")
    call = client.call("remember", value="of the woken node", seconds=60.0)
    await call.started.wait()
    a.freeze()
    other = stage.client(nodes=[b])
    other.id, other.name = client.id, client.name
    rest = await other.read_rest(call, call.ids[0])
    assert error_of(rest[-1])["reason"] == "node_lost"
    a.thaw()
    await stage.recorded(call.label, "cancelled")
    # Its own connection was closed without an end; it comes back for it.
    assert await call.end() == rest[-1]
    for node in (a, b):
        terminal = await client.call("recall", on=node).end()
        assert terminal is not None
        assert terminal["result"]["content"][1]["text"] == "None"
    assert stage.judge() == []


async def test_request_ending_on_waking_saves_nothing(stage: Stage) -> None:
    """P7: the state goes with the terminal event or not at all, also if the handler returns before it is cancelled."""
    a, b = await stage.start(2, lease=LEASE)
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("remember", value="of the woken node", seconds=1.0)
    await call.started.wait()
    client.targets = [b]
    a.freeze()
    assert error_of(await call.end())["reason"] == "node_lost"
    a.thaw()
    # Either is right: what counts is what the session keeps of it.
    await stage.recorded(call.label, "end", "cancelled")
    recall = await client.call("recall", on=a).end()
    assert recall is not None
    assert recall["result"]["content"][1]["text"] == "None"
    await client.replay(call, on=a)
    assert stage.judge() == []


async def test_idempotent_call_runs_again_elsewhere(stage: Stage) -> None:
    """P7: as the second attempt, whose result is the one end that the client sees."""
    a, b = await stage.start(2, lease=LEASE, reexecute="idempotent")
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("recount", steps=30, pause=0.1, repeatable=True)
    await call.started.wait()
    client.targets = [b]
    a.kill()
    terminal = await call.end()
    assert terminal is not None
    assert terminal["result"]["content"][0]["text"] == f"{call.label}:2:30"
    assert (await stage.recorded(call.label, "end")).node == "b"
    assert stage.judge() == []


@pytest.mark.slow
async def test_call_runs_a_third_time(stage: Stage) -> None:
    """P7: when its second node dies too: each attempt takes over from the one before, also for a later reader."""
    a, b, c = await stage.start(3, lease=LEASE, reexecute="idempotent")
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("recount", steps=30, pause=0.1, repeatable=True)
    await call.started.wait()
    client.targets = [b]
    a.kill()
    assert (await stage.recorded(call.label, "start", count=2)).node == "b"
    await client.has(f"{call.label}:2:3", call)
    client.targets = [c]
    b.kill()
    terminal = await call.end()
    assert terminal is not None
    assert terminal["result"]["content"][0]["text"] == f"{call.label}:3:30"
    assert [ran.attempt for ran in stage.runs(call.label) if ran.what == "start"] == [1, 2, 3]
    assert stage.judge() == []


@pytest.mark.slow
async def test_unsafe_call_never_runs_again(stage: Stage) -> None:
    """P7: not even where the server opted in."""
    a, b = await stage.start(2, lease=LEASE, reexecute="idempotent")
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("count", steps=1000, pause=0.05)
    await call.started.wait()
    client.targets = [b]
    a.kill()
    assert error_of(await call.end()) == {"reason": "node_lost", "retrySafe": False}
    assert stage.judge() == []


@pytest.mark.slow
async def test_early_cancel_stops_the_second_attempt(stage: Stage) -> None:
    """P5, P7: sent while the node was dead: the node that takes the request over reads it from the log."""
    a, b = await stage.start(2, lease=LEASE, reexecute="idempotent")
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("recount", steps=1000, pause=0.05, repeatable=True)
    await call.started.wait()
    a.kill()
    assert await client.cancel(call, on=b) == 202
    client.targets = [b]
    terminal = await call.end()
    assert terminal is not None
    assert terminal["error"]["message"] == "Request cancelled"
    assert stage.judge() == []


@pytest.mark.slow
async def test_busy_session_does_not_hide_death(stage: Stage) -> None:
    """P7: also when the session's log never falls silent, because other requests write to it."""
    a, b = await stage.start(2, lease=LEASE)
    client = stage.client(nodes=[a])
    await client.open()
    call = client.call("count", steps=1000, pause=0.05)
    await call.started.wait()
    busy = client.call("count", steps=1000, pause=0.1, on=b)
    await busy.started.wait()
    client.targets = [b]
    killed = time.monotonic()
    a.kill()
    assert error_of(await call.end())["reason"] == "node_lost"
    assert in_time(time.monotonic() - killed, LEASE + POLLS + SLACK)
    assert busy.terminal is None
    await client.cancel(busy)
    await busy.end()
    assert stage.judge() == []


async def test_blocked_loop_is_not_a_death(stage: Stage) -> None:
    """P7: the lease is renewed from a thread, as long as the loop hangs for less than `max_stall`."""
    a, b = await stage.start(2, lease=LEASE)
    client = stage.client(nodes=[a], patience=Patience(idle=1.5, call=60.0))
    await client.open()
    # Promoted first: it is on the log when the loop hangs.
    call = client.call("stall", seconds=LEASE + POLLS + 1.0)
    await call.started.wait()
    client.targets = [b]
    terminal = await call.end()
    assert terminal is not None
    assert "result" in terminal
    assert stage.judge() == []


@pytest.mark.slow
async def test_overlong_stall_is_a_death(stage: Stage) -> None:
    """P7: within the allowed stall, the lease and the poll; when the tool returns at last, it has no say."""
    a, b = await stage.start(2, lease=1.0, max_stall=1.0)
    client = stage.client(nodes=[a], patience=Patience(idle=1.5, call=60.0))
    await client.open()
    call = client.call("stall", seconds=9.0)
    await call.started.wait()
    client.targets = [b]
    began = time.monotonic()
    assert error_of(await call.end())["reason"] == "node_lost"
    assert in_time(time.monotonic() - began, 1.0 + 1.0 + POLLS + SLACK)
    assert [ran.what for ran in stage.runs(call.label)] == ["start"]
    await stage.recorded(call.label, "end", "cancelled")
    await client.replay(call, on=a)
    assert await client.ping(a) == 200
    assert stage.judge() == []
