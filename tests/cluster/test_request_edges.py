"""What happens around a request at its edges: before its session is there, while its store is away, after its end."""

from __future__ import annotations

import asyncio
from typing import Any

import mcp_types as types
import pytest
from mcp.server import Server, ServerRequestContext
from mcp.shared.exceptions import MCPError, NoBackChannelError

from nonstick import current_connection
from nonstick.core.events import Kind, decode, kind_of
from nonstick.core.names import session_key
from nonstick.errors import StoreUnavailable
from nonstick.store import Store
from nonstick.testing.cluster import Member, Session
from tests.cluster.asgi import Call
from tests.cluster.conftest import MakeStore, one
from tests.cluster.servers import opening
from tests.cluster.sse import getting, posting
from tests.cluster.stage import (
    Context,
    DownStore,
    Stage,
    announce,
    ask,
    call,
    cancel,
    eventually,
    node_of,
    say,
    staged,
    text_of,
    texts_of,
)
from tests.cluster.test_streams import Forgetful

pytestmark = pytest.mark.anyio

FOR_EVER = 600.0
"""A window that does not pass: the node does not follow the log."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is away is soon known to be away, and soon tried again."""
    monkeypatch.setattr("nonstick.log.writer._PATIENCE", 0.05)
    monkeypatch.setattr("nonstick.session.stream._RETRY_PAUSE", 0.05)
    monkeypatch.setattr("nonstick.session.exchange._RETRY_PAUSE", 0.05)


class Downs:
    """Makes the stores of nodes, on the same data, one of whose methods can be cut off."""

    def __init__(self, make_store: MakeStore, method: str = "append", *, after: bool = False) -> None:
        self.made: list[DownStore] = []
        self._make = make_store
        self._method = method
        self._after = after

    def make(self) -> Store:
        self.made.append(DownStore(self._make(), self._method, after=self._after))
        return self.made[-1]

    @property
    def of_b(self) -> DownStore:
        return self.made[2]


# ---- before the session is there


class Greets(Stage):
    """At `initialize` its middleware speaks to the client before the answer, and keeps something."""

    asked: object = None

    def server(self) -> Server[Any]:
        server = super().server()
        server.middleware.append(self._greet)
        return server

    async def _greet(self, ctx: ServerRequestContext[Any, Any], call_next: Any) -> Any:
        if ctx.method == "initialize":
            await announce(ctx, "welcome")
            current_connection().state["key"] = "first"
            current_connection().exit_stack.callback(self.open, "cleaned up")
            try:
                await ask(ctx)
            except NoBackChannelError as error:
                self.asked = error
        return await call_next(ctx)


async def test_initialize_may_speak_before_its_answer(make_store: MakeStore) -> None:
    """P2, P3: what belongs to no request is heard once there is a session; nobody could answer a question yet."""
    async with Greets(make_store) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        assert isinstance(stage.asked, NoBackChannelError)
        async with getting(b, session) as stream:
            assert text_of(await stream.message()) == "welcome"


async def test_initializes_state_is_saved_once(memory: MakeStore) -> None:
    """P2: later requests of its view do not undo what another node saved."""
    async with Greets(memory) as stage:

        @stage.tool
        async def put(ctx: Context, arguments: dict[str, Any]) -> str:
            current_connection().state["key"] = "second"
            return "done"

        @stage.tool
        async def get(ctx: Context, arguments: dict[str, Any]) -> str:
            return str(current_connection().state["key"])

        a, b, c = stage.cluster
        session = await a.open()
        assert session_key(session.id) in node_of(a).sessions
        assert text_of((await c.post(call("get"), session)).json()) == "first"
        await c.post(call("put"), session)
        for member in (a, b, c):
            assert text_of((await member.post(call("get"), session)).json()) == "second"


# ---- while the store is away


async def test_messages_await_the_store_in_order(memory: MakeStore) -> None:
    """P3, P9: each comes once. A question that the store could not take is not asked later, when nobody waits."""
    downs = Downs(memory)
    async with staged(downs.make) as (stage, a, b, _):

        @stage.tool
        async def talk(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "0")
            downs.of_b.holding = True
            await say(ctx, "1")
            await say(ctx, "2")
            with pytest.raises(StoreUnavailable):
                await ask(ctx)
            downs.of_b.holding = False
            await say(ctx, "3")
            downs.of_b.holding = True
            await say(ctx, "4")
            stage.open("returns")
            return "done"

        session = await a.open()
        async with posting(b, session, call("talk")) as stream:
            await stage.reached("returns")
            tries = downs.of_b.count
            await eventually(lambda: downs.of_b.count > tries + 20)
            downs.of_b.holding = False
            assert texts_of(await stream.rest()) == ["0", "1", "2", "3", "4", "done"]
        assert (await stage.kinds(session)).count(Kind.TERMINAL) == 1


async def test_silent_request_streams_after_outage(memory: MakeStore) -> None:
    """P3, P9: its client waits with an event id then, though nothing was said."""
    downs = Downs(memory)
    async with staged(downs.make, window=0.02) as (stage, a, b, c):

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            downs.of_b.holding = True
            await stage.door("go on")
            return "done"

        session = await a.open()
        async with posting(b, session, call("wait")) as stream:
            await eventually(lambda: downs.of_b.count > 20)
            downs.of_b.holding = False
            place = (await stream.event()).id
            async with getting(c, session, place) as resumed:
                stage.open("go on")
                assert texts_of(await resumed.rest()) == texts_of(await stream.rest()) == ["done"]


async def test_stream_missing_messages_ends_as_lost() -> None:
    """P9: its result would hide that the store lost what was said before."""
    store = Forgetful()
    async with staged(one(store), window=FOR_EVER) as (stage, a, b, c):

        @stage.tool
        async def talk(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "0")
            await say(ctx, "1")
            await stage.door("go on")
            return "done"

        session = await a.open()
        async with posting(b, session, call("talk")) as stream:
            place = (await stream.event()).id
            assert [text_of(await stream.message()) for _ in range(2)] == ["0", "1"]
            [opened] = [event for event in await stage.log(session) if kind_of(event.data) is Kind.OPENED]
            store.lose(session_key(session.id), opened.position)
            stage.open("go on")
            (end,) = await stream.rest()
            assert end["error"]["data"]["reason"] == "stream_lost"
        async with getting(c, session, place) as resumed:
            assert await resumed.rest() == [end]


async def test_delete_that_failed_stops_nothing(memory: MakeStore) -> None:
    """P6, P9: the session is kept, and with it what runs."""
    downs = Downs(memory, "delete")
    async with staged(downs.make) as (stage, a, b, _):
        node_of(b).services.store.patience = 0.05

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "begun")
            await stage.door("go on")
            return "done"

        session = await a.open()
        async with posting(b, session, call("wait")) as stream:
            assert text_of(await stream.message()) == "begun"
            downs.of_b.holding = True
            assert (await b.delete(session)).status_code == 503
            downs.of_b.holding = False
            stage.open("go on")
            assert texts_of(await stream.rest()) == ["done"]


# ---- what stops it


async def test_first_reason_to_stop_is_told(memory: MakeStore) -> None:
    """P5, P8: a request that its client cancelled ends so, though its handler goes on until its node drains."""
    async with staged(memory, grace=0.1) as (stage, a, b, c):

        @stage.tool
        async def cling(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "begun")
            while not stage.marks["go on"].is_set():
                try:
                    await stage.door("go on")
                except asyncio.CancelledError:
                    stage.open("cancelled")
            return "done"

        session = await a.open()
        async with posting(b, session, call("cling")) as stream:
            assert text_of(await stream.message()) == "begun"
            assert (await c.post(cancel(1), session)).status_code == 202
            await stage.reached("cancelled")
            b.app.manager.begin_drain()
            place = stream.last_id
            assert texts_of(await stream.rest()) == ["Request cancelled"]
            async with getting(c, session, place) as resumed:
                assert texts_of(await resumed.rest()) == ["Request cancelled"]
            stage.open("go on")


async def test_announcing_to_ended_session_stops_handler(memory: MakeStore) -> None:
    """P6: its node does not follow the log yet."""
    async with staged(memory, window=FOR_EVER) as (stage, a, b, c):

        @stage.tool
        async def tell(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("go on")
            await announce(ctx, "anyone?")
            return "done"

        session = await a.open()
        async with posting(b, session, call("tell")) as stream:
            await stage.reached("begun")
            assert (await c.delete(session)).status_code == 200
            stage.open("go on")
            assert (await stream.response()).status_code == 404


# ---- after its end


async def test_message_after_answer_opens_no_stream(memory: MakeStore) -> None:
    """P3: nobody would ever end it."""
    async with staged(memory) as (stage, a, b, _):
        late: list[asyncio.Task[None]] = []

        @stage.tool
        async def leave(ctx: Context, arguments: dict[str, Any]) -> str:
            async def speak() -> None:
                await stage.door("answered")
                await say(ctx, "late")

            late.append(asyncio.create_task(speak()))
            return "done"

        session = await a.open()
        assert text_of((await b.post(call("leave"), session)).json()) == "done"
        stage.open("answered")
        await late[0]
        assert await stage.log(session) == []


async def test_failed_subscription_changes_nothing(memory: MakeStore) -> None:
    """P2, P11: neither the record nor what other nodes hear of it."""

    class Refuses(Stage):
        def server(self) -> Server[Any]:
            server = super().server()
            for method in ("resources/subscribe", "resources/unsubscribe"):
                server.add_request_handler(method, types.SubscribeRequestParams, _refuse)
            return server

    async with Refuses(memory) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        before = dict((await stage.store.load(session_key(session.id))).fields)
        for method in ("resources/subscribe", "resources/unsubscribe"):
            request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"uri": "x://1"}}
            assert text_of((await b.post(request, session)).json()) == "no such resource"
        assert await stage.log(session) == []
        after = (await stage.store.load(session_key(session.id))).fields
        assert {name for name in {*before, *after} if before.get(name) != after.get(name)} <= {"unconfirmed"}


async def _refuse(ctx: Context, params: Any) -> types.EmptyResult:
    raise MCPError(types.INVALID_PARAMS, "no such resource")


async def test_node_remembers_nothing_that_ended(memory: MakeStore) -> None:
    """P10: of requests and streams that have ended, a node keeps nothing to end when it closes."""
    async with staged(memory) as (stage, a, b, _):

        @stage.tool
        async def talk(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "said")
            return "done"

        session = await a.open()
        async with posting(b, session, call("talk")) as stream:
            place = (await stream.event()).id
            assert texts_of(await stream.rest()) == ["said", "done"]
        async with getting(b, session, place) as resumed, getting(b, session) as standalone:
            await standalone.event()
            await resumed.rest()
        await eventually(lambda: not node_of(b).services.drain.until_closing)
        await eventually(lambda: not len(node_of(b).listeners))


async def test_handler_speaks_at_readers_pace(memory: MakeStore) -> None:
    """P10: what a client does not take is not kept in memory without end."""
    async with staged(memory, send_timeout=FOR_EVER) as (stage, a, b, _):

        @stage.tool
        async def talk(ctx: Context, arguments: dict[str, Any]) -> str:
            for number in range(8):
                await say(ctx, f"{number} " + "x" * 100_000)
            stage.open("said")
            return "done"

        @stage.tool
        async def quick(ctx: Context, arguments: dict[str, Any]) -> str:
            return "quick"

        session = await a.open()
        slow = Call(b.app, "POST", session.headers, call("talk"))
        slow.stop_reading()
        await slow.is_stuck()
        # Each takes the loop around more often than the handler would need to say it all.
        for number in range(10):
            await _quick(b, session, number)
        assert not stage.marks["said"].is_set()
        slow.read_on()
        await slow.whole()
        assert [text_of(message)[:4] for message in slow.messages] == [*(f"{n} xx" for n in range(8)), "done"]


async def _quick(member: Member, session: Session, number: int) -> None:
    assert text_of((await member.post(call("quick", f"q{number}"), session)).json()) == "quick"


async def test_introduction_may_fill_its_limit(memory: MakeStore) -> None:
    """P10: a client that says just as much of itself as it may is let in; one byte more is refused."""
    params = opening()["params"]
    size = len(types.InitializeRequestParams.model_validate(params).model_dump_json(by_alias=True, exclude_unset=True))
    for limit, status in ((size, 200), (size - 1, 400)):
        async with Stage(memory, max_initialize_bytes=limit) as stage:
            response = await stage.cluster[0].post(opening())
            assert response.status_code == status, response.text


async def test_resource_name_has_a_limit(memory: MakeStore) -> None:
    """P10: the record keeps its URI."""

    class Offers(Stage):
        def server(self) -> Server[Any]:
            server = super().server()
            server.add_request_handler("resources/subscribe", types.SubscribeRequestParams, _accept)
            return server

    async with Offers(memory) as stage:
        a = stage.cluster[0]
        session = await a.open()
        for length, key in ((2048, "result"), (2049, "error")):
            params = {"uri": "x://" + "x" * (length - 4)}
            answer = await a.post(
                {"jsonrpc": "2.0", "id": 1, "method": "resources/subscribe", "params": params}, session
            )
            assert key in answer.json()


async def _accept(ctx: Context, params: Any) -> types.EmptyResult:
    return types.EmptyResult()


async def test_log_keeps_only_tools_name(memory: MakeStore) -> None:
    """P10, P13: and of a long name its beginning; another node does not take that for the whole request."""
    async with staged(memory, answer="sse") as (stage, a, b, _):
        session = await a.open()
        async with posting(b, session, call("x" * 100_000, text="secret")) as stream:
            await stream.rest()
        opened = [event for event in await stage.log(session) if kind_of(event.data) is Kind.OPENED][-1]
        body = decode(opened.data)
        assert body["partial"] is True
        assert set(body["request"]["params"]) == {"name"}
        assert len(opened.data) < 10_000
