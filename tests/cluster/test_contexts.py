"""Whose variables of context a handler sees, and what goes on in the background: never another request's (P18)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from contextvars import Context as Variables
from contextvars import ContextVar, copy_context
from typing import Any

import pytest
from mcp.server.connection import Connection
from starlette.types import ASGIApp, Receive, Scope, Send

from nonstick import current_attempt, current_connection
from nonstick.core.names import session_key
from nonstick.core.record import OWNER
from nonstick.testing.cluster import Member
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import getting, posting
from tests.cluster.stage import (
    Context,
    Stage,
    accept,
    announce,
    ask,
    call,
    eventually,
    node_of,
    notification,
    say,
    text_of,
)

pytestmark = pytest.mark.anyio

TEAM: ContextVar[str] = ContextVar("team")

OWN = {
    "Handler.run",
    "handle_notification",
    "Reader._watch",
    "Relay._watch",
    "Exchange._watch",
    "Node.contained",
    "Pool._use",
}
"""What is done for one request: its handler, that of a notification, its connection, its progress, its queries."""


def of_team(name: str) -> Any:
    """Headers of a request."""
    return {"x-team": name}


class Teams:
    """A middleware of the host's, which keeps a header in a variable of context."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            TEAM.set(next((value.decode() for name, value in scope["headers"] if name == b"x-team"), "none"))
        await self._app(scope, receive, send)


@asynccontextmanager
async def teams(make_store: MakeStore, **options: Any) -> AsyncIterator[tuple[Stage, Member, Member, Member]]:
    stage = Stage(make_store, **options)

    @stage.tool
    async def team(ctx: Context, arguments: dict[str, Any]) -> str:
        if arguments.get("says"):
            await say(ctx, "here")
            await stage.door("go on")
        return TEAM.get("unset")

    @stage.tool
    async def heard(ctx: Context, arguments: dict[str, Any]) -> str:
        found: list[str] = []

        async def hear(*_: object) -> None:
            found.append(TEAM.get("unset"))
            stage.open("heard")

        await ask(ctx, on_progress=hear)
        return " ".join([*found, TEAM.get("unset")])

    for member in stage.cluster:
        member.app.add_middleware(Teams)
    async with stage:
        a, b, c = stage.cluster
        yield stage, a, b, c


async def test_handler_sees_its_own_requests_context(make_store: MakeStore) -> None:
    """P18: of several at once, on any node, as a plain answer and as a stream."""
    async with teams(make_store) as (stage, a, b, c):
        session = await a.open(**of_team("opener"))
        for member, name in ((a, "red"), (b, "blue"), (c, "green")):
            session.headers["x-team"] = name
            assert text_of((await member.post(call("team"), session)).json()) == name
        async with posting(a, session, call("team", 1, says=1), **of_team("one")) as first:
            await first.message()
            async with posting(a, session, call("team", 2, says=1), **of_team("two")) as second:
                await second.message()
                stage.open("go on")
                assert text_of((await first.rest())[-1]) == "one"
                assert text_of((await second.rest())[-1]) == "two"


async def test_handlers_own_requests_are_first_attempts(memory: MakeStore) -> None:
    """P7: a handler that is run again and asks a server in its own process is not asked a second time."""
    stage = Stage(memory)

    @stage.tool
    async def attempt(ctx: Context, arguments: dict[str, Any]) -> int:
        return current_attempt()

    @stage.tool
    async def again(ctx: Context, arguments: dict[str, Any]) -> str:
        variable = next(one for one in copy_context() if one.name == "nonstick_attempt")
        variable.set(2)
        return str(text_of((await member.post(call("attempt", 2), session)).json()))

    async with stage:
        member = next(iter(stage.cluster))
        session = await member.open()
        assert text_of((await member.post(call("again"), session)).json()) == "1"


async def test_relayed_handler_sees_its_own_variables(make_store: MakeStore) -> None:
    """P18: neither of who opened the session nor of who woke the follower; on the owner itself alike."""
    async with teams(make_store, placement="owner") as (_, a, b, c):
        session = await a.open(**of_team("opener"))
        for member, name in ((b, "red"), (a, "blue"), (c, "green"), (b, "red")):
            session.headers["x-team"] = name
            assert text_of((await member.post(call("team"), session)).json()) == "unset"


@pytest.mark.parametrize(("placement", "expected"), [("any", "asker asker"), ("owner", "unset unset")])
async def test_progress_is_heard_by_its_asker(memory: MakeStore, placement: str, expected: str) -> None:
    """P18, P4: in the asker's context, whichever request brought it."""
    async with teams(memory, placement=placement) as (stage, a, b, c):
        session = await a.open(**of_team("opener"))
        for member in (b, a):  # through the log, and at once
            async with posting(b, session, call("heard"), **of_team("asker")) as stream:
                question = await stream.message()
                token = question["params"]["_meta"]["progressToken"]
                session.headers["x-team"] = "replier"
                told = await member.post(
                    notification("notifications/progress", progressToken=token, progress=1), session
                )
                assert told.status_code == 202
                await stage.reached("heard")
                stage.marks["heard"].clear()
                assert (await c.post(accept(question), session)).status_code == 202
                assert text_of((await stream.rest())[-1]) == expected


async def test_state_is_rebuilt_without_requests_context(memory: MakeStore) -> None:
    """P18, P7: it is every later request's."""
    seen: list[str] = []

    async def rehydrate(connection: Connection) -> None:
        assert connection is current_connection()
        seen.append(TEAM.get("unset"))

    async with teams(memory, placement="owner", rehydrate=rehydrate) as (stage, a, b, _):
        session = await a.open(**of_team("opener"))
        key = session_key(session.id)
        held = node_of(a).placement.held.get(key)
        assert held is not None
        await stage.store.update(key, {OWNER: b"gone-00000000"})
        assert await held.look()
        await eventually(lambda: key not in node_of(a).sessions)
        session.headers["x-team"] = "red"
        async with posting(b, session, call("team")) as stream:
            assert text_of(await stream.outcome()) == "unset"
        assert seen == ["unset"]


@pytest.fixture
async def tasks() -> AsyncIterator[dict[str, set[str]]]:
    """Of each kind of task that is begun, whose variables it began with."""
    found: dict[str, set[str]] = {}
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()

    def make(loop: Any, work: Coroutine[Any, Any, Any], context: Variables | None = None, **more: Any) -> Any:
        whose = (copy_context() if context is None else context).get(TEAM)
        if whose is not None:
            found.setdefault(getattr(work, "__qualname__", "?"), set()).add(whose)
        return asyncio.Task(work, loop=loop, context=context, **more)

    factory: Any = make
    loop.set_task_factory(factory)
    yield found
    loop.set_task_factory(before)


@pytest.mark.parametrize("placement", ["any", "owner"])
async def test_background_work_keeps_no_requests_variables(
    make_store: MakeStore, tasks: dict[str, set[str]], placement: str
) -> None:
    """P18, P10: followers, readers, the store's own tasks and all else begin in an empty context."""
    async with teams(make_store, placement=placement, window=0.02, unconfirmed_lifetime=5.0) as (stage, a, b, c):

        @stage.tool
        async def work(ctx: Context, arguments: dict[str, Any]) -> str:
            await announce(ctx, "to all")
            await say(ctx, "begun")
            await ask(ctx)
            current_connection().exit_stack.callback(stage.open, "cleaned up")
            return "done"

        session = await a.open(**of_team("opener"))
        session.headers["x-team"] = "reader"
        async with getting(c, session) as standalone:
            await standalone.event()
            async with posting(b, session, call("work"), **of_team("caller")) as stream:
                question = await stream.message()
                while question["method"] != "elicitation/create":
                    question = await stream.message()
                async with getting(c, session, stream.last_id) as resumed:
                    session.headers["x-team"] = "replier"
                    assert (await c.post(accept(question), session)).status_code == 202
                    assert text_of((await stream.rest())[-1]) == "done"
                    assert text_of((await resumed.rest())[-1]) == "done"
            assert text_of(await standalone.message()) == "to all"
        assert (await b.post(notification("notifications/roots/list_changed"), session)).status_code == 202
        assert (await c.delete(session)).status_code == 200
        await stage.reached("cleaned up")
    ours = {name: whose for name, whose in tasks.items() if not name.startswith(_TESTS)}
    assert set(ours) <= OWN, ours


_TESTS = ("Stream.", "test_", "RequestResponseCycle.", "H11Protocol.", "HttpToolsProtocol.")
"""Tasks of these tests, and of the server that the nodes run in."""
