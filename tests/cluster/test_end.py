"""When a session ends, by DELETE or by itself, it ends everywhere and at once; while it is used it does not."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any

import mcp_types as types
import pytest

from nonstick import current_connection
from nonstick.core.names import session_key
from nonstick.stores.memory import MemoryStore
from nonstick.testing import ManualClock
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.sse import DEADLINE, getting, posting
from tests.cluster.stage import Context, HeldStore, Stage, ask, call, eventually, node_of, say, staged, text_of

pytestmark = pytest.mark.anyio


def playing(stage: Stage) -> list[str]:
    """Tools that wait, say something, or owe a clean-up; and the list of what was cleaned up."""
    cleaned: list[str] = []

    @stage.tool
    async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
        name = arguments["name"]
        if arguments.get("loud"):
            await say(ctx, "0")
        stage.open(f"running {name}")
        try:
            await stage.door("never")
        finally:
            stage.open(f"stopped {name}")
        return "done"

    @stage.tool
    async def quick(ctx: Context, arguments: dict[str, Any]) -> str:
        return "quick"

    @stage.tool
    async def owe(ctx: Context, arguments: dict[str, Any]) -> str:
        current_connection().exit_stack.callback(cleaned.append, arguments["name"])
        return "owing"

    return cleaned


async def gone_everywhere(stage: Stage, session: Session) -> None:
    """404, on every node, for every method."""
    for member in stage.cluster:
        assert (await member.post(call("quick"), session)).status_code == 404
        assert (await member.post({"jsonrpc": "2.0", "method": "notifications/x"}, session)).status_code == 404
        assert (await member.delete(session)).status_code == 404
        async with getting(member, session) as stream:
            assert (await stream.response()).status_code == 404


# ---- DELETE


async def test_delete_stops_handlers_and_streams_everywhere(make_store: MakeStore) -> None:
    """P6."""
    async with staged(make_store, window=0.05) as (stage, a, b, c):
        playing(stage)
        session = await a.open()
        async with AsyncExitStack() as stack:
            posts = []
            for member in (a, b, c):
                loud = posting(member, session, call("wait", f"l{member.name}", name=f"loud {member.name}", loud=True))
                posts.append(await stack.enter_async_context(loud))
                last = (await posts[-1].event()).id
                resumed = getting(c, session, last)
                posts.append(await stack.enter_async_context(resumed))
                assert text_of(await posts[-1].message()) == "0"
                silent = posting(member, session, call("wait", f"s{member.name}", name=f"silent {member.name}"))
                posts.append(await stack.enter_async_context(silent))
                await posts[-1].event()  # the window has passed
            gets = [await stack.enter_async_context(getting(member, session)) for member in (a, b, c)]
            assert (await c.delete(session)).status_code == 200
            await gone_everywhere(stage, session)
            for member in (a, b, c):
                await stage.reached(f"stopped loud {member.name}")
                await stage.reached(f"stopped silent {member.name}")
            for stream in (*posts, *gets):
                # No more than what it had: an ended session says nothing.
                assert all("result" not in message and "error" not in message for message in await stream.rest())
        for member in (a, b, c):
            await eventually(lambda member=member: not node_of(member).sessions)  # type: ignore[misc]


async def test_delete_stops_notification_handlers_everywhere(make_store: MakeStore) -> None:
    """P6."""
    async with staged(make_store, window=0.02) as (stage, a, b, c):
        for member in (a, b, c):

            async def handle(ctx: Context, params: types.NotificationParams, name: str = member.name) -> None:
                stage.open(f"running {name}")
                try:
                    await stage.door("never")
                finally:
                    stage.open(f"stopped {name}")

            member.app.manager.app.add_notification_handler("notifications/x", types.NotificationParams, handle)
        session = await a.open()
        for member in (a, b, c):
            assert (await member.post({"jsonrpc": "2.0", "method": "notifications/x"}, session)).status_code == 202
            await stage.reached(f"running {member.name}")
        assert (await c.delete(session)).status_code == 200
        for member in (a, b, c):
            await stage.reached(f"stopped {member.name}")
            await eventually(lambda member=member: not node_of(member).sessions)  # type: ignore[misc]


async def test_delete_stops_a_young_handler(make_store: MakeStore) -> None:
    """P6: one that has sent nothing yet; its request gets 404, as every later one."""
    async with staged(make_store, window=0.2) as (stage, a, b, c):
        playing(stage)
        session = await a.open()
        async with posting(b, session, call("wait", name="one")) as stream:
            await stage.reached("running one")
            await c.delete(session)
            await stage.reached("stopped one")
            response = await stream.response()
            if response.headers["content-type"] == "text/event-stream":
                assert await stream.rest() == []
            else:
                assert response.status_code == 404


async def test_delete_stops_a_json_handler(make_store: MakeStore) -> None:
    """P6: `answer="json"`."""
    async with staged(make_store, answer="json", window=0.02) as (stage, a, b, c):
        playing(stage)
        session = await a.open()
        async with posting(b, session, call("wait", name="one")) as stream:
            await stage.reached("running one")
            await c.delete(session)
            await stage.reached("stopped one")
            assert (await stream.response()).status_code == 404


async def test_delete_stops_a_waiting_handler(make_store: MakeStore) -> None:
    """P6, P4."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def asks(ctx: Context, arguments: dict[str, Any]) -> str:
            try:
                return str(await ask(ctx))
            finally:
                stage.open("stopped")

        session = await a.open()
        async with posting(b, session, call("asks")) as stream:
            await stream.message()
            await c.delete(session)
            await stage.reached("stopped")
            assert await stream.rest() == []


async def test_delete_runs_owed_clean_up_once(make_store: MakeStore) -> None:
    """P6: `exit_stack`, though nothing of the session runs there any more."""
    async with staged(make_store) as (stage, a, b, c):
        cleaned = playing(stage)
        session = await a.open()
        for member in (a, b):
            for number in range(2):
                name = f"{member.name}{number}"
                assert text_of((await member.post(call("owe", name=name), session)).json()) == "owing"
        assert cleaned == []
        await c.delete(session)
        await eventually(lambda: len(cleaned) >= 4)
        await gone_everywhere(stage, session)
        assert sorted(cleaned) == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize("written", [False, True], ids=["before it is written", "before it is acknowledged"])
async def test_delete_during_saving_goes_smoothly(
    make_store: MakeStore, written: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """P6."""
    held: list[HeldStore] = []

    def make() -> Any:
        held.append(HeldStore(make_store(), "update", after=written))
        return held[-1]

    async with staged(make) as (stage, a, b, _):

        @stage.tool
        async def put(ctx: Context, arguments: dict[str, Any]) -> str:
            current_connection().state["a"] = 1
            return "put"

        session = await a.open()
        held[2].holding = True
        async with posting(b, session, call("put")) as stream:
            async with asyncio.timeout(DEADLINE):
                await held[2].held.wait()
            assert (await b.delete(session)).status_code == 200
            await eventually(lambda: not node_of(b).sessions)
            held[2].released.set()
            assert (await stream.response()).status_code in (200, 404)
        await gone_everywhere(stage, session)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_delete_ends_no_other_session(make_store: MakeStore) -> None:
    """P6."""
    async with staged(make_store) as (stage, a, b, c):
        playing(stage)
        session, other = await a.open(), await a.open()
        async with getting(b, other) as stream:
            await stream.event()
            await c.delete(session)
            await gone_everywhere(stage, session)
            for member in (a, b, c):
                assert text_of((await member.post(call("quick"), other)).json()) == "quick"
            assert not stream.task.done()


# ---- expiry


async def test_idle_session_expires_and_cleans_up() -> None:
    """P6: on the nodes that still hold something for it."""
    clock = ManualClock()
    async with staged(one(MemoryStore(clock=clock)), lease=1e6) as (stage, a, b, c):
        cleaned = playing(stage)
        session = await a.open()
        await b.post(call("owe", name="b"), session)
        await c.post(call("owe", name="c"), session)
        await clock.advance(1801)
        await eventually(lambda: len(cleaned) >= 2)
        await gone_everywhere(stage, session)
        assert sorted(cleaned) == ["b", "c"]
        assert not node_of(b).sessions
        assert not node_of(c).sessions


async def test_idle_session_expires_everywhere(make_store: MakeStore) -> None:
    """P6: in every store."""
    async with staged(make_store, app_options={"session_idle_timeout": 0.5}) as (stage, a, b, _):
        cleaned = playing(stage)
        session = await a.open()
        await b.post(call("owe", name="b"), session)
        await eventually(lambda: cleaned == ["b"])
        await gone_everywhere(stage, session)


@pytest.mark.parametrize("kind", ["standalone", "request", "resumed"])
async def test_streaming_session_does_not_expire(make_store: MakeStore, kind: str) -> None:
    """P6: for several lifetimes, on a node that serves nothing else of it."""
    options: dict[str, Any] = {"app_options": {"session_idle_timeout": 1.0}, "ping_interval": 0.3}
    async with staged(make_store, **options) as (stage, a, b, c):
        playing(stage)
        session = await a.open()
        async with AsyncExitStack() as stack:
            if kind == "standalone":
                stream = await stack.enter_async_context(getting(c, session))
            else:
                stream = await stack.enter_async_context(posting(b, session, call("wait", name="one", loud=True)))
                await stream.message()
            if kind == "resumed":
                stream = await stack.enter_async_context(getting(c, session, stream.last_id))
            pings = 0
            while pings < 9:
                block = await stream.block()
                assert block is not None, "the stream ended"
                pings += block.comment is not None
            assert text_of((await a.post(call("quick"), session)).json()) == "quick"


async def test_requests_keep_a_session_alive(make_store: MakeStore) -> None:
    """P1: the expiry slides."""
    async with staged(make_store, app_options={"session_idle_timeout": 2.5}, ping_interval=0.4) as (stage, a, b, c):
        playing(stage)
        session, metronome = await a.open(), await a.open()
        async with getting(c, metronome) as beats:
            members: list[Member] = [a, b, c]
            for number in range(8):
                block = None
                while block is None or block.comment is None:
                    block = await beats.block()
                assert text_of((await members[number % 3].post(call("quick"), session)).json()) == "quick"


async def test_expired_session_ends_its_streams() -> None:
    """P6: as when a node could not renew it for long."""
    clock = ManualClock()
    async with staged(one(MemoryStore(clock=clock)), window=0.05, lease=1e6) as (stage, a, b, c):
        playing(stage)
        session = await a.open()
        async with posting(b, session, call("wait", name="one")) as stream, getting(c, session) as standalone:
            await stream.event()
            await standalone.event()
            await clock.advance(1801)
            assert await stream.rest() == []
            assert await standalone.rest() == []
            await stage.reached("stopped one")


async def test_closed_node_leaves_sessions_to_others(make_store: MakeStore) -> None:
    """P6: what it owes it cleans up; the session lives on."""
    async with staged(make_store) as (stage, a, b, c):
        cleaned = playing(stage)
        session = await a.open()
        await b.post(call("owe", name="b"), session)
        await b.stop()
        assert cleaned == ["b"]
        assert text_of((await c.post(call("quick"), session)).json()) == "quick"
        assert "principal" in (await stage.store.load(session_key(session.id))).fields
