"""A client that vanished does not live for ever: its session expires, and what runs for it is cancelled (P10)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastmcp import FastMCP
from fastmcp.server.middleware import PingMiddleware
from mcp.server import Server, ServerRequestContext
from mcp.shared.exceptions import MCPError

from nonstick import session_state
from nonstick.core.names import session_key
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Cluster, Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.servers import opening
from tests.cluster.sse import DEADLINE, Stream, getting, posting
from tests.cluster.stage import (
    Context,
    Stage,
    accept,
    ask,
    ask_standalone,
    call,
    eventually,
    node_of,
    notification,
    quiet,
    say,
    staged,
    text_of,
)
from tests.cluster.test_sessionless_drain import Tools, listening
from tests.pace import in_time, unhurried

pytestmark = [pytest.mark.anyio, quiet]

with_time_to_be_idle = unhurried("idle", 1.0, 4.0, 16.0)
"""Until a session whose client is silent ends: each client has to come back within it."""

FOR_EVER = 600.0
"""Seconds that do not pass."""


class Renewing(MemoryStore):
    """Counts how often nodes renewed each session."""

    def __init__(self) -> None:
        super().__init__()
        self.renewals: Counter[str] = Counter()

    async def touch(self, keys: Collection[str]) -> None:
        self.renewals.update(keys)
        await super().touch(keys)

    def of(self, session: Session) -> int:
        return self.renewals[session_key(session.id)]

    async def renews(self, session: Session) -> None:
        """Returns after two more rounds in which this session was renewed, and others could have been."""
        wanted = self.of(session) + 2
        await eventually(lambda: self.of(session) >= wanted)


def waiting(stage: Stage) -> None:
    """A tool for each way to wait for a client, or without one."""

    @stage.tool
    async def elicit(ctx: Context, arguments: dict[str, Any]) -> str:
        stage.open(f"at {arguments['name']}")
        return str((await ask(ctx))["content"])

    @stage.tool
    async def standalone(ctx: Context, arguments: dict[str, Any]) -> str:
        stage.open(f"at {arguments['name']}")
        return str(await ask_standalone(arguments["method"], {}))

    @stage.tool
    async def sleep(ctx: Context, arguments: dict[str, Any]) -> str:
        stage.open(f"at {arguments['name']}")
        try:
            await stage.door(arguments.get("door", "never"))
        finally:
            stage.open(f"stopped {arguments['name']}")
        return "awake"

    @stage.tool
    async def ping_for_ever(ctx: Context, arguments: dict[str, Any]) -> str:
        """As FastMCP's PingMiddleware does."""
        stage.open(f"at {arguments['name']}")
        while True:
            try:
                await ask_standalone("ping", timeout=0.1)
            except MCPError:
                await say(ctx, "no answer")

    @stage.tool
    async def look_for_ever(ctx: Context, arguments: dict[str, Any]) -> str:
        """Waits for something in the session state."""
        stage.open(f"at {arguments['name']}")
        while not await session_state().get("there"):  # noqa: ASYNC110 - on another node nothing else can be waited for
            await asyncio.sleep(0.02)
        return "there"


WAYS: dict[str, dict[str, Any]] = {
    "elicit": {},
    "standalone": {"method": "sampling/createMessage"},
    "standalone roots": {"method": "roots/list"},
    "standalone ping": {"method": "ping"},
    "sleep": {},
    "ping_for_ever": {},
    "look_for_ever": {},
}
"""Ways to wait for a client that is gone: the tool's name, and its arguments."""


async def vanish_at(stage: Stage, member: Member, tool: str, **arguments: Any) -> Session:
    """A client that calls this tool, and is gone once it runs; its session."""
    session = await member.open(capabilities={"elicitation": {"form": {}}})
    async with posting(member, session, call(tool.split()[0], 1, name=session.id, **arguments)) as stream:
        await stage.reached(f"at {session.id}")
        await stream.event()
    return session


@asynccontextmanager
async def idle_soon(
    store: MakeStore, idle: float, **options: Any
) -> AsyncIterator[tuple[Stage, Member, Member, Member]]:
    async with staged(store, window=0.02, app_options={"session_idle_timeout": idle}, **options) as on_stage:
        waiting(on_stage[0])
        yield on_stage


@with_time_to_be_idle
async def test_vanished_clients_give_places_back(make_store: MakeStore, idle: float) -> None:
    """P10: whatever the server waits for; and one that is there, at another node, keeps its session."""
    async with idle_soon(make_store, idle, max_streams_per_node=len(WAYS) + 1) as (stage, a, b, c):
        present = await c.open(capabilities={"elicitation": {"form": {}}})
        async with posting(a, present, call("elicit", 1, name="present")) as asked:
            last = (await asked.event()).id
            question = await asked.message()
        async with getting(b, present, last) as resumed:
            gone = [await vanish_at(stage, a, tool, **arguments) for tool, arguments in WAYS.items()]
            # If it came late, places would be free again, and it would wait for ever.
            async with asyncio.timeout(idle):
                assert (await a.post(call("sleep", 2, name="one too many"), present)).status_code == 503
            # An idle session, and the longest time between two looks at its log.
            began = asyncio.get_running_loop().time()
            await eventually(lambda: len(node_of(a).services.requests) == 1)
            assert in_time(asyncio.get_running_loop().time() - began, idle + 5.0 + 2.0)
            for session in gone:
                assert (await c.post(notification("notifications/x"), session)).status_code == 404
            assert (await c.post(accept(question), present)).status_code == 202
            assert text_of((await resumed.rest())[-1]) == "{'name': 'Ada'}"


@with_time_to_be_idle
async def test_pings_keep_no_vanished_clients_session(idle: float) -> None:
    """P10: its `PingMiddleware` asks for ever, and owes a clean-up meanwhile."""
    store, pinged = Renewing(), asyncio.Event()

    class Pings(PingMiddleware):
        async def on_message(self, context: Any, call_next: Any) -> Any:
            pinged.set()
            return await super().on_message(context, call_next)

    def server() -> FastMCP[Any]:
        return FastMCP("pings", middleware=[Pings(interval_ms=20)])

    async with Cluster(server, lambda: store, nodes=2, app_options={"session_idle_timeout": idle}) as (a, b):
        session = await a.open()
        assert "result" in (await b.post({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, session)).json()
        assert pinged.is_set()
        assert node_of(b).sessions
        await eventually(lambda: not node_of(b).sessions)
        assert not store.of(session)
        assert (await a.post(notification("notifications/x"), session)).status_code == 404


@with_time_to_be_idle
async def test_only_clients_node_renews_the_session(idle: float) -> None:
    """P10: not the one where its request runs; and nobody does once the client is gone."""
    store = Renewing()
    async with idle_soon(one(store), idle) as (stage, a, b, c):
        clock = await c.open()
        async with getting(c, clock):
            session = await a.open()
            async with posting(a, session, call("sleep", 1, name="here", door="end")) as stream:
                last = (await stream.event()).id
                await store.renews(session)  # a client that waits at its POST
            async with getting(b, session, last) as resumed:
                await resumed.event()
                await store.renews(session)  # one that resumes elsewhere
            async with getting(c, session) as standalone:
                await standalone.event()
                await store.renews(session)  # one that only listens
            await eventually(
                lambda: not any(len(node_of(member).services.readers) > (member is c) for member in (a, b, c))
            )
            before = store.of(session)
            await store.renews(clock)
            assert store.of(session) == before
            await stage.reached("stopped here")
            assert (await b.post(notification("notifications/x"), session)).status_code == 404


@with_time_to_be_idle
async def test_client_awaiting_json_is_seen(idle: float) -> None:
    """P10: until its connection ends, though nothing is sent on it."""
    store = Renewing()
    async with idle_soon(one(store), idle, answer="json") as (stage, a, _, __):
        session = await a.open()
        async with posting(a, session, call("sleep", 1, name="long", door="end")) as stream:
            await store.renews(session)
            stage.open("end")
            assert text_of(await stream.answer()) == "awake"
        async with posting(a, session, call("sleep", 2, name="left", door="never")):
            await stage.reached("at left")
        await stage.reached("stopped left")


@with_time_to_be_idle
async def test_polling_client_keeps_its_session(idle: float) -> None:
    """P10: each time that it comes back is a sign, on whichever node."""
    async with idle_soon(one(MemoryStore()), idle) as (stage, a, b, c):
        session = await a.open()
        async with posting(a, session, call("sleep", 1, name="polled", door="end")) as stream:
            last = (await stream.event()).id
        for member in (b, c, b, c, b):
            await asyncio.sleep(idle / 2)
            async with getting(member, session, last) as resumed:
                assert (await resumed.event()).id == last
        stage.open("end")
        async with getting(b, session, last) as resumed:
            assert text_of((await resumed.rest())[-1]) == "awake"


@with_time_to_be_idle
async def test_owner_lets_vanished_clients_session_expire(memory: MakeStore, idle: float) -> None:
    """P10: with `placement="owner"`: a relayed request runs on the node that holds the session."""
    async with idle_soon(memory, idle, placement="owner") as (stage, a, b, _):
        session = await a.open()
        async with posting(b, session, call("sleep", 1, name="relayed")) as stream:
            await stage.reached("at relayed")
            await stream.event()
        await stage.reached("stopped relayed")
        await eventually(lambda: not len(node_of(a).services.requests) and not len(node_of(b).services.requests))
        await eventually(lambda: not node_of(a).sessions)


@with_time_to_be_idle
async def test_handler_works_within_its_timeout(idle: float) -> None:
    """P10: `unattended_timeout`, from the client's last sign; also in a session that is not confirmed yet."""
    store = Renewing()
    async with idle_soon(one(store), idle, unattended_timeout=60.0) as (stage, a, b, _):
        session = await vanish_at(stage, a, "sleep")
        await store.renews(session)
        view = node_of(a).sessions[session_key(session.id)]
        view.log.heard_at -= 60.0 - idle
        await stage.reached(f"stopped {session.id}")
        assert (await b.post(notification("notifications/x"), session)).status_code == 404


@unhurried("first", 0.3, 1.2, 4.8)
async def test_unconfirmed_sessions_handler_works_as_long(first: float) -> None:
    """P10: its short first lifetime is for sessions that are not used."""
    store = Renewing()
    async with staged(one(store), window=0.02, unconfirmed_lifetime=first) as (stage, a, _, __):
        waiting(stage)
        session = await a.open(initialized=False)
        async with posting(a, session, call("sleep", 1, name="first", door="end")) as stream:
            last = (await stream.event()).id
        await store.renews(session)
        stage.open("end")
        async with getting(a, session, last) as resumed:
            assert text_of((await resumed.rest())[-1]) == "awake"


# ---- the deadline of a server request


async def test_unanswered_server_request_ends_itself(memory: MakeStore) -> None:
    """P10: after `server_request_timeout`, though the client is there, who is told so. One's own time is kept."""
    async with staged(memory, server_request_timeout=0.5) as (stage, a, b, _):

        @stage.tool
        async def elicit(ctx: Context, arguments: dict[str, Any]) -> str:
            return str((await ask(ctx, **arguments))["content"])

        session = await a.open(capabilities={"elicitation": {"form": {}}})
        async with (
            posting(a, session, call("elicit", 1)) as stream,
            posting(a, session, call("elicit", 2, timeout=DEADLINE)) as patient,
        ):
            question = await stream.message()
            withdrawn = await stream.message()
            assert withdrawn["method"] == "notifications/cancelled"
            assert withdrawn["params"] == {"requestId": question["id"], "reason": "timed out after 0.5 s"}
            assert text_of(await stream.outcome()) == "Request 'elicitation/create' timed out"
            assert not await stage.is_pending(session, question["id"])
            assert (await b.post(accept(await patient.message()), session)).status_code == 202
            assert text_of(await patient.outcome()) == "{'name': 'Ada'}"


# ---- connections that never end


@with_time_to_be_idle
async def test_overlong_connection_is_closed_without_loss(idle: float) -> None:
    """P10, P3: who does not read never comes back, and is no sign of life any more."""
    store = Renewing()
    async with idle_soon(one(store), idle, connection_lifetime=0.6 * idle) as (stage, a, b, _):
        session = await a.open()
        async with (
            posting(a, session, call("sleep", 1, name="here", door="end")) as stream,
            getting(b, session) as standalone,
        ):
            await stage.reached("at here")
            events = await stream.events()
            assert events[-1].retry == 1000
            assert (await standalone.events())[-1].retry == 1000
        stage.open("end")
        async with getting(b, session, events[-2].id) as resumed:
            assert text_of((await resumed.rest())[-1]) == "awake"


@with_time_to_be_idle
async def test_unclosable_connection_becomes_no_sign(idle: float) -> None:
    """P10: an old client without an event id could not come back: left alone, its session expires."""
    store = Renewing()
    async with idle_soon(one(store), idle, connection_lifetime=0.4 * idle) as (stage, a, b, _):
        session = await a.open(version="2025-06-18")
        async with posting(a, session, call("sleep", 1, name="old")) as stream:
            await store.renews(session)
            await stage.reached("stopped old")
            await stream.events()
        assert (await b.post(notification("notifications/x"), session)).status_code == 404


@with_time_to_be_idle
async def test_idless_connection_is_not_closed(idle: float) -> None:
    """P3, P10: its client could not come back for the answer."""
    store = Renewing()
    async with idle_soon(one(store), idle, connection_lifetime=0.4 * idle, unattended_timeout=FOR_EVER) as (
        stage,
        a,
        *_,
    ):
        session = await a.open(version="2025-06-18")
        async with posting(a, session, call("sleep", 1, name="old", door="end")) as stream:
            await stage.reached("at old")
            # Each takes two rounds of 0.2 s, in which connections that are too old are closed.
            await store.renews(session)
            await store.renews(session)
            stage.open("end")
            assert text_of(await stream.outcome()) == "awake"


async def test_sessionless_listening_ends_in_time() -> None:
    """P10: a client of 2026-07-28 asks anew."""
    store = MemoryStore()
    options: dict[str, Any] = {"connection_lifetime": 0.3}
    async with Cluster(Tools().server, lambda: store, nodes=1, **options) as cluster, asyncio.timeout(DEADLINE):
        async with listening(cluster[0]) as response:
            chunks = response.aiter_text()
            assert "acknowledged" in await anext(chunks)
            assert [chunk async for chunk in chunks] == []
        await eventually(lambda: not len(node_of(cluster[0]).listeners))


# ---- initialize


class Hangs:
    """A middleware of a server that never answers `initialize`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: Any) -> Any:
        if ctx.method == "initialize":
            self._stage.open("hangs")
            try:
                await self._stage.door("never")
            finally:
                self._stage.open("stopped")
        return await call_next(ctx)


@with_time_to_be_idle
@pytest.mark.parametrize("leaves", [True, False])
async def test_abandoned_initialize_is_ended(memory: MakeStore, leaves: bool, idle: float) -> None:
    """P10, P2: nobody else could use the session."""
    async with idle_soon(memory, FOR_EVER if leaves else idle) as (stage, a, _, __):
        server: Server[Any] = a.app.manager.app
        server.middleware.append(Hangs(stage))
        nobody = Session("", "", {})
        nobody.headers = {}
        stream = Stream(a, "POST", nobody, opening(), {})
        await stage.reached("hangs")
        if leaves:
            await stream.close()
        await stage.reached("stopped")
        if not leaves:
            assert "took too long" in text_of(await stream.answer())
            await stream.close()
        await eventually(lambda: not len(node_of(a).services.requests))
