"""A request whose node is gone, or that its session's owner cannot make sense of: it ends once, and not too early."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection
from typing import Any

import mcp_types as types
import pydantic_core
import pytest
from mcp.server import Server
from opentelemetry.baggage import get_baggage, set_baggage
from opentelemetry.context import attach, detach

from nonstick.core.event_ids import EventId
from nonstick.core.events import Kind, decode, draft, kind_of
from nonstick.core.names import session_key
from nonstick.errors import NotPending
from nonstick.store import NEW_STREAM, Batch, Cursor, Store
from nonstick.testing.cluster import Member, Session
from tests.cluster.asgi import Call
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import getting, posting
from tests.cluster.stage import Context, HeldStore, Stage, call, cancel, eventually, node_of, say, text_of
from tests.cluster.test_placement import lose

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads looks often after the node that should write."""
    monkeypatch.setattr("nonstick.session.rescue._BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr("nonstick.session.reader.LIVENESS_POLL", 0.05)


class Safe(Stage):
    """Its tool `count` may be called again."""

    def __init__(self, make_store: MakeStore, **options: Any) -> None:
        super().__init__(make_store, **options)
        self.runs = 0
        self.tool(self.count)
        self.tool(self.linger)

    def server(self) -> Server[Any]:
        return Server("safe", version="1", on_list_tools=self._list, on_call_tool=self._call)

    async def count(self, ctx: Context, arguments: dict[str, Any]) -> str:
        self.runs += 1
        return f"run {self.runs}"

    async def linger(self, ctx: Context, arguments: dict[str, Any]) -> str:
        self.runs += 1
        await say(ctx, f"begun {self.runs}")
        await self.door("go on")
        return f"run {self.runs}"

    async def _list(self, ctx: Context, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        annotations = types.ToolAnnotations(idempotent_hint=True)
        tools = [types.Tool(name=n, input_schema={"type": "object"}, annotations=annotations) for n in self.tools]
        return types.ListToolsResult(tools=tools)


async def opened(stage: Stage, session: Session, message: dict[str, Any], **more: Any) -> str:
    """The stream of this request, which a node opened that is not there any more; returns its event id."""
    body: dict[str, Any] = {"node": "gone-00000000", "attempt": 5, "request": message, **more}
    event = draft(Kind.OPENED, pydantic_core.to_json(body))
    batch = Batch([event], writer=secrets.token_hex(4), sequence=1, stream=NEW_STREAM, attempt=5)
    first = (await stage.store.append(session_key(session.id), batch)).first
    return EventId(first, Cursor(first, event.tag), message["id"]).seal(session.id)


async def test_lost_request_runs_again_for_resumer(memory: MakeStore) -> None:
    """P7: what the tests below take away from."""
    async with Safe(memory, reexecute="idempotent") as stage:
        a, b, c = stage.cluster
        session = await a.open()
        place = await opened(stage, session, call("count"))
        async with getting(b, session, place) as here, getting(c, session, place) as there:
            assert text_of((await here.rest())[-1]) == text_of((await there.rest())[-1]) == "run 1"


async def test_cancelled_lost_request_never_runs_again(memory: MakeStore) -> None:
    """P5, P7: its client hears of the cancel."""
    async with Safe(memory, reexecute="idempotent") as stage:
        a, b, c = stage.cluster
        session = await a.open()
        place = await opened(stage, session, call("count"))
        assert (await c.post(cancel(1), session)).status_code == 202
        async with getting(b, session, place) as stream:
            [answer] = await stream.rest()
        assert answer["error"]["message"] == "Request cancelled"
        assert stage.runs == 0


@pytest.mark.parametrize("reexecute", ["idempotent", "never"])
async def test_next_run_keeps_the_trace(memory: MakeStore, reexecute: Any) -> None:
    """P7, P18: the log keeps the trace of a request that may be run again, and of no other."""
    async with Safe(memory, reexecute=reexecute) as stage:

        @stage.tool
        async def who(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "said")
            return str(get_baggage("who"))

        a, b, _ = stage.cluster
        session = await a.open()
        before = attach(set_baggage("who", "Ada"))
        first = Call(a.app, "POST", session.headers, call("who"))
        detach(before)
        await first.whole()
        assert text_of(first.messages[-1]) == "Ada"
        [begun] = [event for event in await stage.log(session) if kind_of(event.data) is Kind.OPENED]
        trace = decode(begun.data).get("trace")
        assert trace == ({"baggage": "who=Ada"} if reexecute == "idempotent" else None)
        if trace is not None:
            async with getting(b, session, await opened(stage, session, call("who", 2), trace=trace)) as again:
                assert text_of((await again.rest())[-1]) == "Ada"


async def test_rerun_before_resuming_goes_on(memory: MakeStore) -> None:
    """P7: who comes back later knows of the lost node alone, and finds out first that another one runs the request."""
    asked: list[set[str]] = []

    class Asked(HeldStore):
        async def lapsed(self, nodes: Collection[str]) -> set[str]:
            asked.append(set(nodes))
            return await self._store.lapsed(nodes)

    async with Safe(lambda: _as_store(Asked(memory(), "", after=False)), reexecute="idempotent") as stage:
        a, b, c = stage.cluster
        session = await a.open()
        place = await opened(stage, session, call("linger"))
        async with getting(b, session, place) as here:
            assert text_of(await here.message()) == "begun 1"
            asked.clear()
            async with getting(c, session, here.last_id) as there:
                running = {node_of(b).services.node_id}
                await eventually(lambda: running in asked or there.waiting)
                stage.open("go on")
                assert text_of(await there.message()) == text_of(await here.message()) == "run 1"
        assert (await stage.kinds(session)).count(Kind.TAKEN) == 1


async def test_partly_kept_request_never_runs_again(memory: MakeStore) -> None:
    """P7: without its arguments. Its client may make it again."""
    async with Safe(memory, reexecute="idempotent") as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        place = await opened(stage, session, call("count"), partial=True)
        async with getting(b, session, place) as stream:
            [answer] = await stream.rest()
        assert answer["error"]["data"] == {"reason": "node_lost", "retrySafe": True}
        assert stage.runs == 0


async def test_forgotten_request_of_living_node_ends(memory: MakeStore) -> None:
    """P9, P16: the node lives, and nothing there runs it any more."""
    async with Safe(memory) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        place = await opened(stage, session, call("count"), node=node_of(b).services.node_id)
        async with getting(b, session, place) as stream:
            [answer] = await stream.rest()
        assert answer["error"]["data"]["reason"] == "node_lost"


@pytest.mark.parametrize(
    ("annotations", "safe"),
    [
        ({"readOnlyHint": True}, True),
        ({"idempotentHint": True}, True),
        ({"readOnlyHint": False, "destructiveHint": False}, False),
        (None, False),
    ],
    ids=["reads", "idempotent", "writes", "says nothing"],
)
async def test_tool_says_whether_it_is_repeatable(
    memory: MakeStore, annotations: dict[str, bool] | None, safe: bool
) -> None:
    """P7: on whichever page of the list it is."""

    class Paged(Safe):
        async def _list(self, ctx: Context, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
            if params is None or params.cursor is None:
                return types.ListToolsResult(tools=[], next_cursor="more")
            tool = {"name": "count", "inputSchema": {"type": "object"}, "annotations": annotations}
            return types.ListToolsResult(tools=[types.Tool.model_validate(tool, by_name=False)])

    async with Paged(memory) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        place = await opened(stage, session, call("count"))
        async with getting(b, session, place) as stream:
            [answer] = await stream.rest()
        assert answer["error"]["data"] == {"reason": "node_lost", "retrySafe": safe}
        assert stage.runs == 0


@pytest.mark.parametrize("again", [True, False])
async def test_lost_nodes_question_awaits_no_reply(memory: MakeStore, again: bool) -> None:
    """P4, P10: whether its request ends or is run again."""
    async with Safe(memory, reexecute="idempotent" if again else "never") as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        place = await opened(stage, session, call("count"))
        asked = draft(Kind.MESSAGE, pydantic_core.to_json({"jsonrpc": "2.0", "id": "q", "method": "ping"}))
        batch = Batch([asked], stream=_stream_of(place), attempt=5, expect=["q"])
        await stage.store.append(session_key(session.id), batch)
        async with getting(b, session, place) as stream:
            answer = (await stream.rest())[-1]
        assert ("result" in answer) == again

        async def is_withdrawn() -> bool:
            try:
                await stage.store.append(session_key(session.id), Batch([], answers="q"))
            except NotPending:
                return True
            return False

        await eventually(is_withdrawn)


def _stream_of(place: str) -> int:
    return int(place.split(".")[1], 16)


async def test_lease_lapsed_once_loses_nothing(memory: MakeStore) -> None:
    """P7: after an outage of the store every lease has lapsed, and the living need a moment."""
    looks: list[bool] = []

    class Blinking(HeldStore):
        """Says once that a node is dead."""

        async def lapsed(self, nodes: Collection[str]) -> set[str]:
            looks.append(not looks)
            return set(nodes) if looks[-1] else set()

    async with Safe(lambda: _as_store(Blinking(memory(), "", after=False)), reexecute="idempotent") as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        place = await opened(stage, session, call("count"))
        async with getting(b, session, place) as stream:
            await eventually(lambda: len(looks) > 4)
            assert await stage.kinds(session) == [Kind.OPENED]
            assert not stream.waiting
        assert stage.runs == 0


def _as_store(store: Any) -> Store:
    kept: Store = store
    return kept


@pytest.mark.parametrize("broken", [{}, {"http": {}, "since": 0, "version": "2025-11-25"}], ids=["nothing", "no http"])
async def test_unreadable_relayed_request_is_answered(memory: MakeStore, broken: dict[str, Any]) -> None:
    """P16, P12: of another release, say; who relayed it would wait for ever."""
    async with Safe(memory, placement="owner") as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        place = await opened(stage, session, call("count", "broken"), relay=broken)
        async with getting(b, session, place) as stream:
            [answer] = await stream.rest()
        assert answer["id"] == "broken"
        assert answer["error"]["data"] == {"reason": "request_not_started", "retrySafe": True}
        assert text_of((await b.post(call("count"), session)).json()) == "run 1"


async def test_unreadable_answer_ends_relayed_request(
    memory: MakeStore,
) -> None:
    """P16: also for a client that cannot come back, as it has no event id yet."""
    async with Safe(memory, placement="owner") as stage:
        a, b, _ = stage.cluster

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("never")
            return "done"

        session = await a.open(version="2025-06-18")
        async with posting(b, session, call("wait")) as stream:
            await stage.reached("begun")
            [exchange] = _running(a, session)
            garbage = Batch([draft(Kind.TAKEN, b"{")], stream=exchange.stream, attempt=exchange.own_stream().attempt)
            await stage.store.append(session_key(session.id), garbage)
            [answer] = await stream.rest()
        assert (answer["id"], answer["error"]["data"]["reason"]) == (1, "answer_unread")


def _running(member: Member, session: Session) -> list[Any]:
    return list(node_of(member).sessions[session_key(session.id)].exchanges.values())


async def test_taking_over_passes_over_unreadable_events(memory: MakeStore) -> None:
    """P7, P16: one event that no release writes keeps nobody from the others."""

    async def rehydrate(_: Any) -> None:
        await asyncio.sleep(0)

    async with Safe(memory, placement="owner", rehydrate=rehydrate) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        key = session_key(session.id)
        await stage.store.append(
            key, Batch([draft(Kind.OPENED, b'{"node": 1}')], stream=NEW_STREAM, writer="w", sequence=1)
        )
        a.app.manager.begin_drain()
        await eventually(lambda: key not in node_of(a).sessions)
        async with posting(b, session, call("count")) as stream:
            assert text_of(await stream.outcome()) == "run 1"


async def test_owner_is_suspected_anew_later(memory: MakeStore) -> None:
    """P7: of a session's owner, too, it has to be seen twice, a second apart, with no sign of life in between."""
    looks: list[bool] = []
    script = [True, False, False]

    class Blinking(HeldStore):
        async def lapsed(self, nodes: Collection[str]) -> set[str]:
            looks.append(script.pop(0) if script else True)
            return set(nodes) if looks[-1] else set()

    async def rehydrate(_: Any) -> None:
        stage.open("rehydrated")

    make_store = lambda: _as_store(Blinking(memory(), "", after=False))  # noqa: E731
    async with Safe(make_store, placement="owner", rehydrate=rehydrate) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        await lose(stage, session, a)
        looks.clear()
        script[:] = [True, False, False]
        async with posting(b, session, call("count")) as stream:
            assert text_of(await stream.outcome()) == "run 1"
        assert looks[:4] == [True, False, False, True]
        assert len(looks) >= 5
