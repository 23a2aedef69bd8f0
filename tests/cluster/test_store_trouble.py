"""A store that is away or slow means 503 and "try again", never "your session is gone"; then all is as before."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nonstick.errors import StoreUnavailable
from nonstick.stores.memory import MemoryStore
from nonstick.stores.redis import RedisStore
from nonstick.stores.sqlite import SQLiteStore
from nonstick.testing import FaultProxy, ValkeyServer
from nonstick.testing.cluster import Cluster, Member, Session
from tests.cluster.conftest import one
from tests.cluster.servers import World, answer, call, error, eventually, messages, opening, request
from tests.cluster.sse import posting
from tests.cluster.stage import DownStore, ask, say, staged, text_of
from tests.pace import in_time

pytestmark = pytest.mark.anyio

DEADLINE = 2.0
"""Seconds within which a call to the store ends (`nonstick.log.guard`)."""

MARGIN = 2.5
"""Seconds on top, for a machine that is busy with other things."""


@pytest.fixture
async def proxy(valkey: ValkeyServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(valkey.url) as proxy:
        yield proxy


@pytest.fixture
def shared() -> World:
    return World()


@pytest.fixture
async def cluster(valkey: ValkeyServer, proxy: FaultProxy, shared: World) -> AsyncIterator[Cluster]:
    """Node `a` reaches the store through the proxy, the others directly."""
    prefix = f"test-{secrets.token_hex(6)}"
    urls = iter([proxy.url, valkey.url, valkey.url])
    async with Cluster(shared.server, lambda: RedisStore(next(urls), prefix=prefix)) as cluster:
        yield cluster
        await proxy.heal()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert in_time(time.monotonic() - started, seconds)


def assert_unavailable(response: httpx2.Response) -> None:
    assert response.status_code == 503, response.text
    assert int(response.headers["retry-after"]) >= 1
    assert error(response)["code"] == -32603
    assert "store" in error(response)["message"]


Fault = Callable[[FaultProxy], Awaitable[None]]


async def _cut(proxy: FaultProxy) -> None:
    await proxy.cut()


async def _black_hole(proxy: FaultProxy) -> None:
    proxy.black_hole()


async def _deaf(proxy: FaultProxy) -> None:
    """What is asked is executed, and the answers never come."""
    proxy.black_hole(requests=False)


async def _slow(proxy: FaultProxy) -> None:
    proxy.delay(10)


FAULTS = [
    pytest.param(_cut, id="cut"),
    pytest.param(_black_hole, id="black hole"),
    pytest.param(_deaf, id="deaf"),
    pytest.param(_slow, id="slow"),
]


@pytest.mark.parametrize("fault", FAULTS)
async def test_store_fault_is_503_in_time(cluster: Cluster, proxy: FaultProxy, shared: World, fault: Fault) -> None:
    """P9: for every kind of request, and no handler runs; then the node recovers without a restart."""
    a, b, _c = cluster
    session, ending = await b.open(), await b.open()
    await a.post(call("put", x=1), session)
    happened = len(shared.happened)
    await fault(proxy)
    with within(DEADLINE + MARGIN):
        responses = await asyncio.gather(
            a.post(call("echo", 1), session),
            a.post(request("ping", id=2), session),
            a.post(opening()),
            a.delete(ending),
            a.client.get(a.url, headers={"accept": "text/event-stream", **session.headers}),
        )
    for response in responses:
        assert_unavailable(response)
    assert "mcp-session-id" not in responses[2].headers
    assert len(shared.happened) == happened
    await b.post(call("put", y=2), session)
    await proxy.heal()

    async def recovered() -> bool:
        return (await a.post(request("ping"), session)).status_code == 200

    await eventually(recovered)
    assert answer(await a.post(call("get"), session)) == {"x": 1, "y": 2}
    assert (await a.open()).id


async def test_unrepeated_messages_are_tried_longer(cluster: Cluster, proxy: FaultProxy) -> None:
    """P9: it would not come again after a 503."""
    a, b, _c = cluster
    session = await b.open(initialized=False)
    await a.post(request("ping"), session)
    await proxy.cut()
    reply = {"jsonrpc": "2.0", "id": "srv-1", "result": {}}
    sending = [asyncio.create_task(a.post(message, session)) for message in (_initialized(), reply)]
    assert_unavailable(await a.post(request("ping"), session))
    # The request's time is over, theirs is not.
    await proxy.heal()
    assert [(await sent).status_code for sent in sending] == [202, 202]
    assert answer(await b.post(call("who"), session))["initialized"] is True


async def test_unknown_session_is_503_in_doubt(cluster: Cluster, proxy: FaultProxy) -> None:
    """P9: not 404, which would be a claim; what cannot be an id is still 404."""
    a = cluster[0]
    await proxy.cut()
    assert_unavailable(await a.post(request("ping"), Session("u" * 32, "2025-11-25", {})))
    assert (await a.post(request("ping"), Session("malformed", "2025-11-25", {}))).status_code == 404
    assert (await a.post(request("ping"))).status_code == 400


async def test_short_interruption_is_not_noticed(cluster: Cluster, proxy: FaultProxy) -> None:
    """P9: a call is repeated until its deadline."""
    a = cluster[0]
    session = await a.open()
    await proxy.cut()
    asking = [asyncio.create_task(a.post(message, session)) for message in (call("echo", 1, x=1), _initialized())]
    asyncio.get_running_loop().call_later(0.5, lambda: healing.append(asyncio.ensure_future(proxy.heal())))
    healing: list[asyncio.Future[None]] = []
    echo, notified = await asyncio.gather(*asking)
    assert (answer(echo), notified.status_code) == ({"x": 1}, 202)
    await asyncio.gather(*healing)


def _initialized() -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": "notifications/initialized"}


async def test_breaking_connections_are_not_noticed(cluster: Cluster, proxy: FaultProxy) -> None:
    """P9."""
    a = cluster[0]
    session = await a.open()
    for number in range(10):
        asking = asyncio.create_task(a.post(call("put", number, **{f"key {number}": number}), session))
        await proxy.reset()
        assert (await asking).status_code == 200
    assert answer(await cluster[1].post(call("get"), session)) == {f"key {n}": n for n in range(10)}


async def test_doubtful_initialize_is_not_doubled(cluster: Cluster, proxy: FaultProxy) -> None:
    """P9: a store write may be repeated as it was."""
    a, b, _c = cluster
    await a.open()
    proxy.lose_next_reply()
    session = await a.open()
    assert proxy.replies_to_lose == 0
    assert answer(await b.post(call("echo", x=1), session)) == {"x": 1}


async def test_running_request_keeps_its_answer(cluster: Cluster, proxy: FaultProxy, shared: World) -> None:
    """P3, P9: a stream is ended when the store is back."""
    a, b, _c = cluster
    session = await a.open()
    running = asyncio.create_task(a.post(call("wait", door="d", late=1), session, **{"x-test": "1"}))
    await shared.saw("at d")
    await eventually(lambda: bool(_streams(a)))  # it is a stream now
    await proxy.cut()
    shared.doors["d"].set()
    await shared.saw("wait ended")
    await proxy.heal()
    assert "result" in messages(await running)[-1]
    assert answer(await b.post(call("get"), session)) == {"late": 1}


def _streams(member: Member) -> list[int]:
    node = member.app.manager._node
    assert node is not None
    return [e.stream for s in node.sessions.values() for e in s.exchanges.values() if e.stream]


async def test_node_says_whether_it_is_ready(cluster: Cluster, proxy: FaultProxy) -> None:
    """P9: what a load balancer may ask."""
    a, b, _c = cluster
    await a.app.manager.check_ready()
    await proxy.cut()
    with within(DEADLINE + MARGIN):
        with pytest.raises(StoreUnavailable):
            await a.app.manager.check_ready()
        await b.app.manager.check_ready()
    await proxy.heal()

    async def ready() -> bool:
        with contextlib.suppress(StoreUnavailable):
            await a.app.manager.check_ready()
            return True
        return False

    await eventually(ready)


async def test_node_starts_without_its_store(shared: World, valkey: ValkeyServer) -> None:
    """P9: a deploy does not fail because of it."""
    async with FaultProxy(valkey.url) as proxy:
        await proxy.cut()
        prefix = f"test-{secrets.token_hex(6)}"
        async with Cluster(shared.server, lambda: RedisStore(proxy.url, prefix=prefix), nodes=1) as (a,):
            assert_unavailable(await a.post(opening()))
            await proxy.heal()

            async def opens() -> bool:
                return (await a.post(opening())).status_code == 200

            await eventually(opens)


# ---- stores that fail in other ways


class Failing(MemoryStore):
    """A store whose named methods fail, so many times."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, int] = {}
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("create", "load", "update", "append", "delete", "ping"):
            return found

        async def call(*args: Any, **more: Any) -> Any:
            self.calls.append(name)
            if self.failures.get(name, 0):
                self.failures[name] -= 1
                raise StoreUnavailable("this store is told to fail")
            return await found(*args, **more)

        return call


FOREVER = 10**9


@pytest.fixture
def failing() -> Failing:
    return Failing()


@pytest.fixture
async def node(failing: Failing, shared: World) -> AsyncIterator[Member]:
    async with Cluster(shared.server, one(failing), nodes=1) as (a,):
        yield a


async def test_few_failures_are_not_noticed(node: Member, failing: Failing) -> None:
    """P9."""
    failing.failures = {"create": 2, "load": 2, "update": 2, "append": 2, "delete": 2, "ping": 2}
    session = await node.open()
    assert (await node.post(call("put", x=1), session)).status_code == 200
    await node.app.manager.check_ready()
    cancelled = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 99}}
    assert (await node.post(cancelled, session)).status_code == 202
    assert (await node.delete(session)).status_code == 200
    assert failing.failures == {"create": 0, "load": 0, "update": 0, "append": 0, "delete": 0, "ping": 0}


async def test_unsaved_answer_asks_for_no_repeat(node: Member, failing: Failing) -> None:
    """P2, P9: no answer without what belongs to it, and no 503, after which it would run twice."""
    session = await node.open()
    failing.failures["update"] = FOREVER
    with within(DEADLINE + MARGIN):
        assert_unsaved(await node.post(call("put", x=1), session))
    failing.failures.clear()
    assert answer(await node.post(call("get"), session)) in ({}, {"x": 1})


def assert_unsaved(response: httpx2.Response) -> None:
    """The request ran, and what it changed is not in the store."""
    assert response.status_code == 200, response.text
    assert response.json()["error"]["data"] == {"reason": "state_not_saved", "retrySafe": False}


async def test_delete_that_failed_leaves_the_session(node: Member, failing: Failing) -> None:
    """P6, P9."""
    session = await node.open()
    failing.failures["delete"] = FOREVER
    assert_unavailable(await node.delete(session))
    assert (await node.post(request("ping"), session)).status_code == 200
    failing.failures.clear()
    assert (await node.delete(session)).status_code == 200
    assert (await node.post(request("ping"), session)).status_code == 404


async def test_unstored_initialize_gives_no_session(node: Member, failing: Failing) -> None:
    """P2, P9."""
    failing.failures["create"] = FOREVER
    response = await node.post(opening())
    assert_unavailable(response)
    assert "mcp-session-id" not in response.headers


async def test_locked_sqlite_file_is_503(shared: World, tmp_path: Path) -> None:
    """P9."""
    path = tmp_path / "sessions.db"
    async with Cluster(shared.server, lambda: SQLiteStore(path), nodes=2) as (a, b):
        session = await a.open()
        await a.post(call("put", x=1), session)
        other = sqlite3.connect(path, isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN EXCLUSIVE")
            with within(DEADLINE + MARGIN):
                refused, changed = await asyncio.gather(a.post(opening()), b.post(call("put", x=2), session))
            assert_unavailable(refused)
            # Whether the session could be loaded, which needs no lock, decides which of the two it is.
            assert_unsaved(changed)
            other.execute("ROLLBACK")
        assert (await a.post(opening())).status_code == 200
        assert answer(await a.post(call("get"), session)) in ({"x": 1}, {"x": 2})


async def test_handlers_error_hides_the_store(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P13: it goes on to the client, in the error that the handler raises; the log says it."""
    monkeypatch.setattr("nonstick.log.writer._PATIENCE", 0.05)
    memory = MemoryStore()
    stores: list[DownStore] = []

    def make() -> Any:
        stores.append(DownStore(memory, "append", after=False, when=lambda _key, batch: bool(batch.expect)))
        return stores[-1]

    async with staged(make) as (stage, a, _b, _c):

        @stage.tool
        async def name(ctx: Any, arguments: dict[str, Any]) -> str:
            try:
                return str(await ask(ctx))
            except StoreUnavailable as refused:
                for store in stores:
                    store.holding = False
                raise RuntimeError(f"failed: {refused}") from refused

        session = await a.open(capabilities={"elicitation": {}})
        for store in stores:
            store.holding = True
        response = await a.post(call("name"), session)
        assert error(response)["message"] == "failed: the session store cannot be reached"
        assert "cut off by the test" in caplog.text


async def test_waiting_messages_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """P9, P10: the latest messages come once it is back; and the end."""
    monkeypatch.setattr("nonstick.log.writer._PATIENCE", 0.01)
    store = DownStore(MemoryStore(), "append", after=False)
    async with staged(one(store)) as (stage, a, _b, _c):

        @stage.tool
        async def count(ctx: Any, arguments: dict[str, Any]) -> str:
            await say(ctx, "first")
            store.holding = True
            for number in range(40):
                await say(ctx, f"{number}" + " " * 100_000)
            store.holding = False
            return "done"

        session = await a.open()
        async with posting(a, session, call("count")) as stream:
            assert text_of(await stream.message()) == "first"
            told = [text_of(message) for message in await stream.rest()]
        assert told[-1] == "done"
        assert told[-2].strip() == "39"
        # The first is in doubt, not lost: it is repeated.
        assert told[0].strip() == "0"
        assert 500_000 < sum(map(len, told)) < 1_200_000
