"""`nonstick.session_state()`: changes that race on three nodes, each one step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastmcp import FastMCP
from mcp.server import MCPServer

import nonstick
from nonstick import current_connection, session_state
from nonstick.core.record import CHANGED, STATE
from nonstick.core.values import SessionState
from nonstick.errors import NoSession, StoreUnavailable
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Cluster
from tests.cluster.conftest import MakeStore, one
from tests.cluster.sse import DEADLINE, posting
from tests.cluster.stage import Context, Stage, call, say, staged, text_of

pytestmark = pytest.mark.anyio

INCREMENTS = 5


def add_tools(stage: Stage) -> None:
    @stage.tool
    async def add(ctx: Context, arguments: dict[str, Any]) -> Any:
        return await session_state().increment("n", arguments.get("by", 1))

    @stage.tool
    async def put(ctx: Context, arguments: dict[str, Any]) -> Any:
        for key, value in arguments.items():
            await session_state().set(key, value)
        return json.dumps(current_connection().state)

    @stage.tool
    async def look(ctx: Context, arguments: dict[str, Any]) -> Any:
        key = arguments["key"]
        return json.dumps([await session_state().get(key, "nothing"), current_connection().state.get(key, "nothing")])

    @stage.tool
    async def drop(ctx: Context, arguments: dict[str, Any]) -> Any:
        return await session_state().delete(arguments["key"])

    @stage.tool
    async def swap(ctx: Context, arguments: dict[str, Any]) -> Any:
        return await session_state().compare_and_set(arguments["key"], arguments["expected"], arguments["new"])


async def says(member: Any, session: Any, message: dict[str, Any]) -> Any:
    async with posting(member, session, message) as stream:
        return text_of(await stream.outcome())


async def test_concurrent_increments_lose_none(make_store: MakeStore) -> None:
    """Every sum is seen once; `Connection.state`, saved at the same time, disturbs none of it."""
    async with staged(make_store) as (stage, *nodes):
        add_tools(stage)

        @stage.tool
        async def keep(ctx: Context, arguments: dict[str, Any]) -> Any:
            current_connection().state[arguments["key"]] = 1
            await asyncio.sleep(0)
            return "kept"

        session = await nodes[0].open()
        calls = [says(node, session, call("add", id=n + 1)) for n in range(INCREMENTS) for node in nodes]
        keeps = [
            says(node, session, call("keep", id=n + 100, key=f"{node.name}{n}")) for n in range(2) for node in nodes
        ]
        sums = await asyncio.gather(*calls, *keeps)
        total = INCREMENTS * len(nodes)
        assert sorted(int(sum_) for sum_ in sums[: len(calls)]) == list(range(1, total + 1))
        for number, node in enumerate(nodes):
            assert json.loads(await says(node, session, call("look", id=number + 200, key="n"))) == [total, total]
            assert json.loads(await says(node, session, call("look", id=number + 210, key="c1"))) == [1, 1]


async def test_all_operations_are_seen_elsewhere(make_store: MakeStore) -> None:
    """Get, set, delete, and compare and set: both views are the same data, on every node."""
    async with staged(make_store) as (stage, a, b, c):
        add_tools(stage)
        session = await a.open()
        assert json.loads(await says(a, session, call("put", x=[1, {"y": None}]))) == {"x": [1, {"y": None}]}
        assert json.loads(await says(b, session, call("look", key="x"))) == [[1, {"y": None}]] * 2
        assert await says(c, session, call("swap", key="x", expected=1, new=2)) == "False"
        assert await says(c, session, call("swap", key="x", expected=[1, {"y": None}], new=2)) == "True"
        assert await says(a, session, call("swap", key="x", expected=2.0, new=3)) == "False"
        assert await says(b, session, call("swap", key="new", expected=None, new=3)) == "True"
        assert json.loads(await says(a, session, call("look", key="x"))) == [2, 2]
        assert await says(b, session, call("drop", key="x")) == "True"
        assert await says(a, session, call("drop", key="x")) == "False"
        assert json.loads(await says(a, session, call("look", key="x"))) == ["nothing", "nothing"]
        assert await says(c, session, call("add", by=1.5)) == "1.5"


async def test_older_request_undoes_no_value() -> None:
    """It shows in `Connection.state` of its node at once, and another node's older view does not write over it."""
    async with staged(one(MemoryStore())) as (stage, a, b, c):
        add_tools(stage)

        @stage.tool
        async def slow(ctx: Context, arguments: dict[str, Any]) -> Any:
            state = current_connection().state
            before = dict(state)
            state[f"mine {arguments['name']}"] = 1
            await say(ctx, "began")
            await stage.door("go")
            return json.dumps([before.get("x"), state.get("x")])

        session = await a.open()
        await says(c, session, call("put", x="old"))
        async with (
            posting(a, session, call("slow", id=1, name="a")) as on_a,
            posting(b, session, call("slow", id=2, name="b")) as on_b,
        ):
            assert text_of(await on_a.message()) == text_of(await on_b.message()) == "began"
            await says(a, session, call("put", id=3, x="new"))
            stage.open("go")
            assert json.loads(text_of((await on_a.rest())[-1])) == ["old", "new"]
            assert json.loads(text_of((await on_b.rest())[-1])) == ["old", "old"]
        assert json.loads(await says(c, session, call("look", key="x"))) == ["new", "new"]
        assert json.loads(await says(c, session, call("look", key="mine b"))) == [1, 1]


async def test_unsaved_value_counts_as_set_before() -> None:
    """What a handler put into `Connection.state` is what it then gets, and increments."""
    async with staged(one(MemoryStore())) as (stage, a, b, _):
        add_tools(stage)

        @stage.tool
        async def mix(ctx: Context, arguments: dict[str, Any]) -> Any:
            state, connection = session_state(), current_connection()
            connection.state["n"] = 5
            seen = [await state.get("n"), await state.increment("n"), connection.state["n"]]
            del connection.state["n"]
            return json.dumps([*seen, await state.get("n"), await state.increment("n")])

        session = await a.open()
        assert json.loads(await says(a, session, call("mix"))) == [5, 6, 6, None, 1]
        assert json.loads(await says(b, session, call("look", key="n"))) == [1, 1]


class Forgetful(MemoryStore):
    """Its answers to the next so many changes are lost; they were made."""

    lose = 0

    async def update(self, key: str, changes: Mapping[str, bytes | None], **options: Any) -> bool:
        done = await super().update(key, changes, **options)
        if CHANGED in changes and self.lose:
            self.lose -= 1
            raise StoreUnavailable("lost by the test")
        return done


async def test_repeated_increment_counts_once() -> None:
    """P9: the change is repeated as it was, and found to be there."""
    store = Forgetful()
    async with staged(one(store)) as (stage, a, b, c):
        add_tools(stage)
        session = await a.open()
        for count, node in enumerate((a, b, c), 1):
            store.lose = 1
            assert await says(node, session, call("add", id=count)) == str(count)
            assert not store.lose
        assert json.loads(await says(a, session, call("look", id=9, key="n"))) == [3, 3]


class Overtaken(MemoryStore):
    """The answer to a change of `n` is lost; before that is known, a change of `m` is made that was decided earlier."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.may_go, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def update(self, key: str, changes: Mapping[str, bytes | None], **options: Any) -> bool:
        if f"{STATE}m" in changes and not self.held.is_set():
            self.held.set()
            await self.may_go.wait()
            done = await super().update(key, changes, **options)
            self.gone.set()
            return done
        done = await super().update(key, changes, **options)
        if f"{STATE}n" in changes and not self.may_go.is_set():
            self.may_go.set()
            await self.gone.wait()
            raise StoreUnavailable("lost by the test")
        return done


async def test_doubtful_increment_counts_once() -> None:
    """P9: no change of another key, on another node, takes away the mark by which it is found."""
    store = Overtaken()
    async with staged(one(store)) as (stage, a, b, c):
        add_tools(stage)
        session = await a.open()
        async with posting(c, session, call("put", m=1)) as stream:
            async with asyncio.timeout(DEADLINE):
                await store.held.wait()
            assert await says(b, session, call("add")) == "1"
            assert json.loads(text_of(await stream.outcome()))["m"] == 1
        assert store.gone.is_set()
        assert json.loads(await says(a, session, call("look", key="n"))) == [1, 1]
        assert json.loads(await says(a, session, call("look", key="m"))) == [1, 1]


async def test_limits_and_bad_values_are_refused() -> None:
    """P10: over both views together; what was there stays."""
    async with staged(one(MemoryStore()), max_state_bytes=200) as (stage, a, b, _):
        add_tools(stage)

        @stage.tool
        async def refuse(ctx: Context, arguments: dict[str, Any]) -> Any:
            state, errors = session_state(), []
            for change in (
                state.set("x", "x" * 200),
                state.set("x", {1}),
                state.set("\n", 1),
                state.set("x", float("nan")),
                state.compare_and_set("small", "fits", "x" * 200),
                state.increment("small"),
            ):
                try:
                    await change
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {error}")
            return json.dumps(errors)

        @stage.tool
        async def grow(ctx: Context, arguments: dict[str, Any]) -> Any:
            current_connection().state["y"] = "y" * 200

        session = await a.open()
        await says(a, session, call("put", small="fits"))
        errors = json.loads(await says(b, session, call("refuse")))
        kinds = ["StateTooLarge", "StateNotJSON", "StateNotJSON", "StateNotJSON", "StateTooLarge", "TypeError"]
        assert [error.partition(":")[0] for error in errors] == kinds
        assert "200 bytes of state (max_state_bytes)" in errors[0]
        refused = await b.post(call("grow"), session)
        assert "max_state_bytes" in refused.json()["error"]["message"]
        assert json.loads(await says(b, session, call("look", key="y"))) == ["nothing", "nothing"]
        assert json.loads(await says(a, session, call("look", key="small"))) == ["fits", "fits"]


def test_record_loaded_earlier_is_passed_over() -> None:
    """A load that was under way while the state was changed brings nothing back."""
    state = SessionState()
    state.refresh({"n": b"1"}, 1)
    state.adopt("n", b"2", 2)
    state.refresh({"n": b"1"}, 1)
    assert state == {"n": 2}
    state.refresh({"n": b"3"}, 3)
    assert state == {"n": 3}


def sdk_server() -> MCPServer[Any]:
    server: MCPServer[Any] = MCPServer("counter")

    @server.tool(structured_output=False)
    async def count() -> str:
        return str(await nonstick.session_state().increment("n"))

    return server


def fastmcp_server() -> FastMCP[Any]:
    server: FastMCP[Any] = FastMCP("counter")

    @server.tool
    async def count() -> str:
        return str(await nonstick.session_state().increment("n"))

    return server


@pytest.mark.parametrize("server", [sdk_server, fastmcp_server])
async def test_every_servers_tools_have_it(server: Callable[[], Any]) -> None:
    """In tools of the SDK's `MCPServer` and of FastMCP alike; without a session the error says so."""
    async with Cluster(server, one(MemoryStore())) as cluster:
        session = await cluster[0].open()
        sums = [text_of((await node.post(call("count", id=n), session)).json()) for n, node in enumerate(cluster)]
        assert sums == ["1", "2", "3"]
        meta = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "newer", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        newer = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": "count"}
        answer = await cluster[0].post(call("count", meta=meta), None, **newer)
        assert answer.status_code == 200, answer.text
        assert '"isError":true' in answer.text.replace(" ", "") or "error" in answer.json()


async def test_sessionless_error_gives_advice() -> None:
    with pytest.raises(NoSession, match="requestState"):
        session_state()
