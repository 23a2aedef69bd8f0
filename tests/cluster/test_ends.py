"""Whatever ends a handler becomes exactly one answer under its request's id, on whichever node the client listens."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pydantic_core
import pytest
from mcp_types import INTERNAL_ERROR

from nonstick import current_connection
from nonstick.core.event_ids import EventId
from nonstick.core.events import Kind, draft
from nonstick.core.names import session_key
from nonstick.core.record import OWNER
from nonstick.node.node import Node
from nonstick.store import NEW_STREAM, Batch, Cursor
from nonstick.testing.cluster import Member, Session
from nonstick.waiting.tasks import Exit
from tests.cluster.conftest import MakeStore
from tests.cluster.ends import CANCELLED, EXITING, EXITS, INTERRUPTED, INVALID, WAYS, Ends, Way, end_by
from tests.cluster.servers import messages
from tests.cluster.sse import getting, posting
from tests.cluster.stage import Context, accept, call, cancel, eventually, node_of, notification, say, text_of

pytestmark = pytest.mark.anyio

ALL = {**WAYS, **EXITS}


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> list[Exit]:
    """What told a node to exit: this process is the test's own. `tests/faults/test_exits.py` has real ones."""
    told: list[Exit] = []
    monkeypatch.setattr(Node, "exit", lambda _, error: told.append(error))
    return told


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads looks often after the node that should write."""
    monkeypatch.setattr("nonstick.session.rescue._BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr("nonstick.session.reader.LIVENESS_POLL", 0.05)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """The SDK logs what handlers of notifications raise, which no report can hold."""
    caplog.set_level(logging.CRITICAL, logger="mcp")


@asynccontextmanager
async def ends(make_store: MakeStore, **options: Any) -> AsyncIterator[tuple[Ends, Member, Member, Member]]:
    async with Ends(make_store, **options) as stage:
        a, b, c = stage.cluster
        yield stage, a, b, c


async def test_every_end_is_one_plain_answer(memory: MakeStore, exits: list[Exit]) -> None:
    """P16: before anything was sent."""
    async with ends(memory) as (stage, a, b, _):
        session = await a.open()
        for number, (name, way) in enumerate(ALL.items()):
            async with posting(b, session, end_by(name, "", number)) as stream:
                way.check(await stream.answer(), number)
        assert await stage.log(session) == []
    assert [type(told) for told in exits] == [SystemExit, KeyboardInterrupt]


@pytest.mark.parametrize("relayed", [False, True], ids=["here", "relayed"])
async def test_every_end_ends_its_stream_once(make_store: MakeStore, relayed: bool) -> None:
    """P16: where the request came in, and where its client resumes, before the end and after it."""
    options = {"placement": "owner"} if relayed else {}
    async with ends(make_store, **options) as (stage, a, b, c):
        session = await a.open()

        async def see(name: str, way: Way) -> None:
            async with posting(b, session, end_by(name, "streams", name)) as stream:
                begun = await stream.message()
                assert begun["method"] == "notifications/message"
                async with getting(c, session, stream.last_id) as resumed:
                    stage.open(name)
                    [answer] = await stream.rest()
                    way.check(answer, name)
                    assert await resumed.rest() == [answer]
                async with getting(a, session, resumed.last_id) as again:
                    assert await again.rest() == []

        for name, way in ALL.items():
            await see(name, way)
        kinds = await stage.kinds(session)
        assert kinds.count(Kind.TERMINAL) == len(ALL)


@pytest.mark.parametrize("relayed", [False, True], ids=["here", "relayed"])
async def test_every_end_after_asking_comes_once(memory: MakeStore, relayed: bool) -> None:
    """P16, P4: the reply came in on another node."""
    options = {"placement": "owner"} if relayed else {}
    async with ends(memory, **options) as (_, a, b, c):
        session = await a.open()
        for name, way in ALL.items():
            async with posting(b, session, end_by(name, "asks", name)) as stream:
                question = await stream.message()
                assert (await c.post(accept(question), session)).status_code == 202
                [answer] = await stream.rest()
                way.check(answer, name)


async def test_handler_cancelled_while_asking_reports_once(memory: MakeStore) -> None:
    """P16: and so is that nobody waits for the reply any more."""
    async with ends(memory) as (stage, a, b, c):
        session = await a.open()
        request = end_by("its own cancellation, later", "asks when it ends")
        async with posting(b, session, request) as stream:
            *before, answer = await stream.rest()
            WAYS["its own cancellation"].check(answer, 1)
        asked = [message["id"] for message in before if message["method"] == "elicitation/create"]
        assert [message["method"] for message in before[len(asked) :]] == ["notifications/cancelled"] * len(asked)
        assert not [one for one in asked if await stage.is_pending(session, one)]
        async with getting(c, session, stream.last_id) as again:
            assert await again.rest() == []


async def test_progress_callback_may_end_anyhow(memory: MakeStore, exits: list[Exit]) -> None:
    """P16, P4: what it does is its own; the request's end is told all the same."""
    async with ends(memory) as (_, a, b, c):
        session = await a.open(capabilities={"elicitation": {}})
        for name in ALL:
            async with posting(b, session, end_by(name, "hears of progress", name)) as stream:
                question = await stream.message()
                token = question["params"]["_meta"]["progressToken"]
                told = await c.post(notification("notifications/progress", progressToken=token, progress=1), session)
                assert told.status_code == 202
                assert (await c.post(accept(question), session)).status_code == 202
                WAYS["a result"].check((await stream.rest())[-1], name)
    assert [type(told) for told in exits] == [SystemExit, KeyboardInterrupt]


async def test_state_outlives_any_end(memory: MakeStore) -> None:
    """P16, P2: what it had changed before counts on every node."""
    async with ends(memory) as (stage, a, b, c):

        @stage.tool
        async def kept(ctx: Context, arguments: dict[str, Any]) -> Any:
            return current_connection().state.get("kept")

        session = await a.open()
        for name, way in ALL.items():
            async with posting(b, session, end_by(name, "keeps state", name)) as stream:
                way.check(await stream.answer(), name)
            assert text_of((await c.post(call("kept"), session)).json()) == name


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_every_handshake_end_is_one_answer(make_store: MakeStore, after: bool) -> None:
    """P16, P2: and a session that did not open leaves nothing."""
    async with ends(make_store) as (stage, a, _, _):
        stage.opening_after = after
        hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        for name, stage.opening in ALL.items():
            response = await a.post({"jsonrpc": "2.0", "id": name, "method": "initialize", "params": hello})
            assert response.status_code == 200
            stage.opening.check(response.json(), name)
            assert ("mcp-session-id" in response.headers) == (stage.opening.code is None)
        stage.opening = None
        await eventually(lambda: all(session.opening is None for session in node_of(a).sessions.values()))


@pytest.mark.parametrize("relayed", [False, True], ids=["here", "relayed"])
async def test_every_notifications_end_spares_the_session(memory: MakeStore, relayed: bool) -> None:
    """P16: it keeps what it changed, and what follows is served."""
    options = {"placement": "owner"} if relayed else {}
    async with ends(memory, **options) as (stage, a, b, c):

        @stage.tool
        async def noted(ctx: Context, arguments: dict[str, Any]) -> Any:
            return current_connection().state.get("noted")

        session = await a.open()

        async def has_noted(name: str) -> bool:
            return bool(text_of((await c.post(call("noted"), session)).json()) == name)

        for name in ALL:
            assert (await b.post(notification("notifications/end", way=name), session)).status_code == 202
            await eventually(lambda: has_noted(name))  # noqa: B023


ABOUT_CLIENT = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


@pytest.mark.parametrize("phase", ["", "reports"])
async def test_every_sessionless_end_is_one_answer(memory: MakeStore, exits: list[Exit], phase: str) -> None:
    """P16, P17: for clients of 2026-07-28, whom the SDK serves: plain, and at the end of a stream."""
    async with ends(memory) as (_, a, _, _):
        for name, way in ALL.items():
            message = end_by(name, phase, name)
            message["params"]["_meta"] = {**ABOUT_CLIENT, "progressToken": "t"}
            headers = {"mcp-protocol-version": "2026-07-28", "mcp-method": "work/end"}
            response = await a.post(message, None, **headers)
            answers = [one for one in messages(response) if one.get("method") is None]
            assert [one["id"] for one in answers] == [name], response.text[:400]
            # The SDK writes in this era what it does not in the other; and breaks off where a scope is left open.
            if way.text != INVALID and "scope" not in name:
                assert ("result" in answers[0]) == (way.code is None), answers
            if way.text in (CANCELLED, INTERRUPTED, EXITING):
                assert answers[0]["error"]["message"] == way.text
    assert [type(told) for told in exits] == [SystemExit, KeyboardInterrupt]


async def test_every_rehydration_end_is_told(memory: MakeStore) -> None:
    """P16, P7: a session that could not be built here does not stay with this node, silent."""

    async def rehydrate(connection: Any) -> None:
        await stage.rehydrate(connection)

    stage = Ends(memory, placement="owner", rehydrate=rehydrate)
    async with stage:
        a, b, c = stage.cluster
        session = await a.open()
        key = session_key(session.id)
        held = node_of(a).placement.held.get(key)
        assert held is not None
        await stage.store.update(key, {OWNER: b"gone-00000000"})
        assert await held.look()
        await eventually(lambda: key not in node_of(a).sessions)
        for number, (name, way) in enumerate(ALL.items()):
            if way.code is None or way.text == INVALID:
                continue  # then it is built
            stage.rebuilding = way
            async with posting((b, c)[number % 2], session, end_by("a result", "", name)) as stream:
                answer = await stream.outcome()
                assert answer["id"] == name
                assert answer["error"]["data"] == {"reason": "session_not_rebuilt", "retrySafe": True}
        stage.rebuilding = None
        async with posting(b, session, end_by("a result", "", "at last")) as stream:
            WAYS["a result"].check(await stream.outcome(), "at last")


async def lost_request(stage: Ends, session: Session, number: int, message: dict[str, Any]) -> str:
    """The stream of this request, which a node was running that is not there any more; returns its event id."""
    body = {"node": "gone-00000000", "attempt": 5, "request": message}
    event = draft(Kind.OPENED, pydantic_core.to_json(body))
    batch = Batch([event], writer=f"gone-{number}", sequence=1, stream=NEW_STREAM, attempt=5)
    appended = await stage.store.append(session_key(session.id), batch)
    return EventId(appended.first, Cursor(appended.first, event.tag), message["id"]).seal(session.id)


async def test_every_rerun_end_is_told_once(memory: MakeStore) -> None:
    """P16, P7: on the node that took it over, to who resumes there and elsewhere."""
    async with ends(memory, reexecute="idempotent") as (stage, a, b, c):

        @stage.tool
        async def safe(ctx: Context, arguments: dict[str, Any]) -> Any:
            await ALL[arguments["way"]].end()
            return "done"

        session = await a.open()

        async def see(number: int, name: str, way: Way) -> None:
            place = await lost_request(stage, session, number, call("safe", name, way=name))
            async with getting(b, session, place) as here, getting(c, session, place) as there:
                [answer] = await here.rest()
                assert await there.rest() == [answer]
            if way.text == INVALID:
                way = WAYS["a result"]  # which the tool shows as text
            way.check(answer, name)

        await asyncio.gather(*(see(number, *each) for number, each in enumerate(ALL.items())))


async def test_failing_tool_list_ends_lost_request(memory: MakeStore) -> None:
    """P16, P7: which could not be looked up, and so is not run again."""
    lists = {name: way for name, way in ALL.items() if way.code is not None and way.text != INVALID}
    async with ends(memory, reexecute="idempotent") as (stage, a, b, _):
        session = await a.open()
        # Who reads may look again before it reads of the end: there is a way for each look, and every way has its turn.
        stage.listing = itertools.cycle(lists.values())

        async def see(number: int) -> None:
            place = await lost_request(stage, session, number, call("safe", number))
            async with getting(b, session, place) as stream:
                [answer] = await stream.rest()
                assert answer["error"]["data"] == {"reason": "node_lost", "retrySafe": False}

        await asyncio.gather(*map(see, range(len(lists))))


async def test_cancel_swallowed_is_still_a_cancel(memory: MakeStore) -> None:
    """P16, P5: or changed by the handler: the client hears of its own cancel, once."""
    async with ends(memory) as (stage, a, b, c):

        @stage.tool
        async def stubborn(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "begun")
            try:
                await stage.door("never")
            except asyncio.CancelledError:
                if arguments["changes"]:
                    raise ValueError("something else") from None
            return "done"

        session = await a.open()
        for changes in (False, True):
            async with posting(b, session, call("stubborn", f"{changes}", changes=changes)) as stream:
                await stream.message()
                async with getting(c, session, stream.last_id) as resumed:
                    assert (await c.post(cancel(f"{changes}"), session)).status_code == 202
                    [answer] = await stream.rest()
                    assert answer["error"]["message"] == "Request cancelled"
                    assert await resumed.rest() == [answer]


async def test_clean_up_may_end_anyhow(memory: MakeStore, exits: list[Exit]) -> None:
    """P16, P6: the session is gone everywhere, and the node serves on."""
    async with ends(memory) as (stage, a, b, c):

        @stage.tool
        async def owe(ctx: Context, arguments: dict[str, Any]) -> None:
            current_connection().exit_stack.push_async_callback(ALL[arguments["way"]].end)
            current_connection().exit_stack.callback(stage.open, f"cleaned up before {arguments['way']}")

        for name in ALL:
            session = await a.open()
            async with posting(b, session, call("owe", way=name)) as stream:
                assert "result" in await stream.answer()
            assert (await c.delete(session)).status_code == 200
            await stage.reached(f"cleaned up before {name}")
            await eventually(lambda: session_key(session.id) not in node_of(b).sessions)  # noqa: B023
            assert (await b.post(call("owe", way=name), session)).status_code == 404
    assert [type(told) for told in exits] == [SystemExit, KeyboardInterrupt]


class Evil(dict[str, Any]):
    """Nobody looks into it unpunished."""

    def items(self) -> Any:
        raise ArithmeticError("not today")


async def test_raising_state_spares_the_next_request(
    memory: MakeStore,
) -> None:
    """P16, P2."""
    async with ends(memory) as (stage, a, b, c):

        @stage.tool
        async def spoil(ctx: Context, arguments: dict[str, Any]) -> str:
            state = current_connection().state
            if arguments["spoils"]:
                state["list"] = []
                state["list"].append(Evil(a=1))
            return str(sorted(state))

        session = await a.open()
        async with getting(b, session):  # the view stays
            spoiled = (await b.post(call("spoil", 1, spoils=True), session)).json()
            assert (spoiled["id"], spoiled["error"]["code"]) == (1, INTERNAL_ERROR)
            assert "JSON cannot hold" in spoiled["error"]["message"]
            for member in (b, c):
                assert text_of((await member.post(call("spoil", 2, spoils=False), session)).json()) == "[]"


@pytest.mark.parametrize("times", [2, 1000])
async def test_end_survives_its_tellers_cancellation(memory: MakeStore, times: int) -> None:
    """P16: by a handler that cancels every task it finds, say. The client never waits for ever."""
    loop, left = asyncio.get_running_loop(), times

    def cancelling(loop: Any, work: Any, **more: Any) -> asyncio.Task[Any]:
        nonlocal left
        task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **more)
        if work.__qualname__ == "Handler._conclude" and left:
            left -= 1
            task.cancel()
        return task

    factory: Any = cancelling
    async with ends(memory) as (_, a, b, _):
        session = await a.open()
        loop.set_task_factory(factory)
        try:
            for phase in ("", "says"):
                left = times
                async with posting(b, session, end_by("its own cancellation", phase)) as stream:
                    response = await stream.response()
                    if times == 2:
                        WAYS["its own cancellation"].check(await stream.outcome(), 1)
                    elif phase:
                        assert [one.get("method") for one in await stream.rest()] == ["notifications/message"]
                    else:
                        assert response.status_code == 500
        finally:
            loop.set_task_factory(None)
        async with posting(b, session, end_by("a result", "", 2)) as stream:
            WAYS["a result"].check(await stream.answer(), 2)
