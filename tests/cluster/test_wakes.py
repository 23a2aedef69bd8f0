"""Whatever a node is told over the store's channel, or is not told: nothing that is in the log is skipped (P14).

A node's wakes are lost, or tell it of a phantom first: an entry that continues exactly what the node has, and that the
store never accepted, as a primary that was replaced still announces. The true entry then has the phantom's position,
and others follow it at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import mcp_types as types
import pydantic_core
import pytest

from nonstick.core.events import Kind, decode, draft, kind_of
from nonstick.core.names import new_tag, session_key
from nonstick.core.record import OWNER
from nonstick.core.refusals import STREAM_LOST
from nonstick.store import Appended, Batch, Cursor, Event, News, Wake
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import one
from tests.cluster.servers import messages
from tests.cluster.sse import DEADLINE, Stream, getting, posting
from tests.cluster.stage import (
    Context,
    Stage,
    accept,
    announce,
    ask,
    call,
    cancel,
    eventually,
    node_of,
    notification,
    say,
    staged,
    text_of,
    texts_of,
)

pytestmark = pytest.mark.anyio

TOOLS = "notifications/tools/list_changed"


class Misinformed(MemoryStore):
    """Once it is told to, its watches hear no more, or of a phantom first; then what is true, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mode: Literal["true", "lost", "phantom", "phantom, then lost"] = "true"
        self._followed: set[str] = set()

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        ear = _Ear(self, key, wake)
        return super().watch(key, ear.hear)

    def head(self, key: str) -> Cursor | None:
        session = self._sessions.get(key)
        return None if session is None else session.head

    def forget(self, key: str) -> None:
        """Loses the session's log, and gives its positions out again."""
        self._sessions[key].events.clear()
        self._sessions[key].head = Cursor(0)

    async def append(self, key: str, batch: Batch) -> Appended:
        appended = await super().append(key, batch)
        if self.mode == "phantom" and batch.events and key not in self._followed:
            self._followed.add(key)
            await super().append(key, Batch([draft(Kind.ALIVE)]))
        return appended


class _Ear:
    """One watch, and what it is told."""

    def __init__(self, store: Misinformed, key: str, wake: Wake) -> None:
        self._store = store
        self._key = key
        self._wake = wake
        self._misled = False
        self._last = Cursor(0)

    def hear(self, news: News | None) -> None:
        after = self._last if news is None else news.after
        self._last = self._store.head(self._key) or self._last
        if self._store.mode.startswith("phantom") and not self._misled:
            self._misled = True
            said = draft(Kind.ALIVE)
            stream = 0 if news is None else news.events[0].stream
            self._wake(News(after, [Event(after.position + 1, said.tag, stream, said.data)]))
        if self._store.mode in ("true", "phantom"):
            self._wake(news)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no wake told is found soon."""
    monkeypatch.setattr("nonstick.log.lookout._TURN_SECONDS", 0.02)


@pytest.fixture(params=["lost", "phantom", pytest.param("phantom, then lost", marks=pytest.mark.slow)])
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


Nodes = tuple[Stage, Misinformed, Member, Member, Member]


@asynccontextmanager
async def misinformed(**options: Any) -> AsyncIterator[Nodes]:
    store = Misinformed()
    async with staged(one(store), window=0.05, **options) as (stage, a, b, c):

        @stage.tool
        async def wait(ctx: Context, args: dict[str, Any]) -> str:
            await say(ctx, "begun")
            try:
                await stage.door("end")
            except asyncio.CancelledError:
                stage.open("stopped")
                raise
            return "done"

        yield stage, store, a, b, c


async def begun(member: Member, session: Session, stream: Stream) -> None:
    """Returns once the request runs, and its node follows the log without reading it."""
    assert text_of(await stream.message()) == "begun"
    view = node_of(member).sessions[session_key(session.id)]
    await eventually(lambda: view.log.follower.subscriptions > 0 and view.log.follower._reading is None)


async def opened(stage: Stage, session: Session) -> tuple[int, int]:
    """Name and attempt of the session's first stream."""
    (event,) = [event for event in await stage.log(session) if kind_of(event.data) is Kind.OPENED]
    return event.position, decode(event.data)["attempt"]


def to_stream(stream: int, attempt: int, kind: Kind, body: object, **options: Any) -> Batch:
    event = draft(kind, pydantic_core.to_json(body))
    return Batch([event], stream=stream, attempt=attempt, **options)


async def test_reply_reaches_the_node_that_asked(mode: Any) -> None:
    """P4, P14."""
    async with misinformed() as (stage, store, _a, b, c):

        @stage.tool
        async def question(ctx: Context, args: dict[str, Any]) -> str:
            return str((await ask(ctx))["content"]["name"])

        session = await b.open()
        async with posting(b, session, call("question")) as stream:
            asked = await stream.message()
            view = node_of(b).sessions[session_key(session.id)]
            await eventually(lambda: view.log.follower._reading is None)
            store.mode = mode
            assert (await c.post(accept(asked), session)).status_code == 202
            assert texts_of(await stream.rest()) == ["Ada"]


async def test_cancel_reaches_its_node(mode: Any) -> None:
    """P5, P14."""
    async with misinformed() as (stage, store, _a, b, c):
        session = await b.open()
        async with posting(b, session, call("wait", 7)) as stream:
            await begun(b, session, stream)
            store.mode = mode
            assert (await c.post(cancel(7), session)).status_code == 202
            (end,) = await stream.rest()
            assert text_of(end) == "Request cancelled"
        await stage.reached("stopped")


async def test_sessions_end_stops_handlers_elsewhere(mode: Any) -> None:
    """P6, P14."""
    async with misinformed() as (stage, store, _a, b, c):
        session = await b.open()
        async with posting(b, session, call("wait")) as stream, getting(c, session) as standalone:
            await begun(b, session, stream)
            await standalone.event()
            store.mode = mode
            assert (await c.delete(session)).status_code == 200
            assert await stream.rest() == []
            assert await standalone.rest() == []
        await stage.reached("stopped")


async def test_streams_rest_reaches_client_elsewhere(mode: Any) -> None:
    """P3, P14: whole, in order, once, and without an error: nothing of the stream was lost."""
    async with misinformed() as (stage, store, _a, b, c):

        @stage.tool
        async def count(ctx: Context, args: dict[str, Any]) -> str:
            await say(ctx, "1")
            await stage.door("2")
            await say(ctx, "2")
            await stage.door("end")
            return "done"

        session = await b.open()
        async with posting(b, session, call("count")) as stream:
            assert text_of(await stream.message()) == "1"
            async with getting(c, session, stream.last_id) as resumed:
                await resumed.event()
                view = node_of(c).sessions[session_key(session.id)]
                await eventually(lambda: view.log.follower.subscriptions > 0 and view.log.follower._reading is None)
                store.mode = mode
                stage.open("2")
                assert text_of(await resumed.message()) == "2"
                stage.open("end")
                assert texts_of(await resumed.rest()) == ["done"]


async def test_standalone_message_reaches_connection_elsewhere(mode: Any) -> None:
    """P3, P14: once."""
    async with misinformed() as (stage, store, a, b, c):

        @stage.tool
        async def tell(ctx: Context, args: dict[str, Any]) -> str:
            await announce(ctx, str(args["text"]))
            return "told"

        session = await b.open()
        async with getting(c, session) as stream:
            await stream.event()
            await a.post(call("tell", 1, text="before"), session)
            assert text_of(await stream.message()) == "before"
            store.mode = mode
            for text in ("1", "2"):
                await a.post(call("tell", 2, text=text), session)
                assert text_of(await stream.message()) == text


async def test_foreign_end_stops_the_request(mode: Any) -> None:
    """P7, P14."""
    async with misinformed() as (stage, store, _a, b, _c):
        session = await b.open()
        async with posting(b, session, call("wait", 7)) as stream:
            await begun(b, session, stream)
            place = await opened(stage, session)
            store.mode = mode
            end = STREAM_LOST.model_dump(exclude_none=True)
            batch = to_stream(*place, Kind.TERMINAL, {"jsonrpc": "2.0", "id": 7, "error": end}, terminal=True)
            await stage.store.append(session_key(session.id), batch)
            await stage.reached("stopped")


async def test_takeover_elsewhere_stops_the_request(mode: Any) -> None:
    """P7, P14."""
    async with misinformed() as (stage, store, _a, b, c):
        session = await b.open()
        async with posting(b, session, call("wait")) as stream:
            await begun(b, session, stream)
            name, attempt = await opened(stage, session)
            store.mode = mode
            body = {"node": node_of(c).services.node_id, "attempt": attempt + 1}
            await stage.store.append(
                session_key(session.id), to_stream(name, attempt, Kind.TAKEN, body, take_over=True)
            )
            await stage.reached("stopped")


async def test_question_about_request_is_answered(mode: Any) -> None:
    """P7, P14: else it would be taken for lost."""
    async with misinformed() as (stage, store, _a, b, _c):
        session = await b.open()
        async with posting(b, session, call("wait")) as stream:
            await begun(b, session, stream)
            name, attempt = await opened(stage, session)
            store.mode = mode
            await stage.store.append(session_key(session.id), to_stream(name, attempt, Kind.PROBE, None))

            async def answered() -> bool:
                kinds = [kind_of(event.data) for event in await stage.log(session) if event.stream == name]
                return Kind.ALIVE in kinds[kinds.index(Kind.PROBE) :]

            await eventually(answered)
            stage.open("end")
            assert texts_of(await stream.rest()) == ["done"]


async def test_old_owner_hears_of_new_owner(mode: Any) -> None:
    """P7, P14: `placement="owner"`."""
    async with misinformed(placement="owner") as (stage, store, _a, b, c):
        session = await b.open()
        key = session_key(session.id)
        assert node_of(b).placement.held.get(key) is not None
        follower = node_of(b).sessions[key].log.follower
        await eventually(lambda: follower.subscriptions > 0 and follower._reading is None)
        store.mode = mode
        await stage.store.update(key, {OWNER: node_of(c).services.node_id.encode()})
        said = draft(Kind.OWNER, pydantic_core.to_json({"node": node_of(c).services.node_id}))
        await stage.store.append(key, Batch([said]))
        await eventually(lambda: key not in node_of(b).sessions)


async def test_relayed_request_reaches_the_owner(mode: Any) -> None:
    """P1, P14: `placement="owner"`; and its answer the node that its client came to."""
    async with misinformed(placement="owner") as (stage, store, _a, b, c):
        session = await b.open()
        follower = node_of(b).sessions[session_key(session.id)].log.follower
        await eventually(lambda: follower.subscriptions > 0 and follower._reading is None)
        store.mode = mode
        stage.open("end")
        assert texts_of(messages(await c.post(call("wait"), session))) == ["begun", "done"]


async def test_broadcast_is_heard_on_another_node(mode: Any) -> None:
    """P11, P14: the cluster log is followed as a session's is."""
    async with misinformed() as (_, store, a, b, c):
        session = await a.open()
        async with getting(b, session) as stream:
            await stream.event()
            await c.app.cluster.notify_tools_changed()
            assert (await stream.message())["method"] == TOOLS
            store.mode = mode
            await c.app.cluster.notify_tools_changed()
            assert (await stream.message())["method"] == TOOLS


async def test_cancel_in_reused_place_counts() -> None:
    """P5, P14: the request began behind entries that the store then lost; the cancel takes one of their places."""
    async with misinformed(answer="json") as (stage, store, _a, b, c):

        @stage.tool
        async def think(ctx: Context, args: dict[str, Any]) -> str:
            await stage.door("end")
            return "done"

        session = await b.open()
        key = session_key(session.id)
        older = asyncio.create_task(b.post(call("think", "older"), session))
        await eventually(lambda: key in node_of(b).sessions)
        follower = node_of(b).sessions[key].log.follower
        await eventually(lambda: follower.subscriptions > 0 and follower._reading is None)
        store.mode = "lost"
        for _ in range(5):
            await store.append(key, Batch([draft(Kind.ALIVE)]))
        late = asyncio.create_task(b.post(call("think", "late"), session))
        await eventually(lambda: "late" in node_of(b).sessions[key].exchanges)
        store.forget(key)
        store.mode = "true"
        await c.post(cancel("late"), session)
        async with asyncio.timeout(DEADLINE):
            assert (await late).json()["error"]["message"] == "Request cancelled"
        stage.open("end")
        assert text_of((await older).json()) == "done"


async def test_reply_before_newer_head_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """P4, P14: the log is gone through anew from its beginning, not from where the node last heard that it ends."""
    monkeypatch.setattr("nonstick.log.lookout._TURN_SECONDS", 0.1)
    async with misinformed() as (stage, store, _a, b, c):

        @stage.tool
        async def question(ctx: Context, args: dict[str, Any]) -> str:
            return str((await ask(ctx))["content"]["name"])

        @stage.tool
        async def quick(ctx: Context, args: dict[str, Any]) -> str:
            return "done"

        session = await b.open()
        async with posting(b, session, call("question", 1)) as stream:
            asked = await stream.message()
            view = node_of(b).sessions[session_key(session.id)]
            await eventually(lambda: view.log.follower._reading is None)
            store.mode = "phantom, then lost"
            assert (await c.post(accept(asked), session)).status_code == 202
            assert text_of((await b.post(call("quick", 2), session)).json()) == "done"
            assert view.log.head == store.head(session_key(session.id))
            assert texts_of(await stream.rest()) == ["Ada"]


async def test_cancel_before_newer_head_counts() -> None:
    """P5: each request that runs is looked after from where its own record was loaded."""
    async with staged(one(MemoryStore()), window=1.0) as (stage, _a, b, c):

        @stage.tool
        async def think(ctx: Context, args: dict[str, Any]) -> str:
            await stage.door("end")
            return "done"

        @stage.tool
        async def quick(ctx: Context, args: dict[str, Any]) -> str:
            return "done"

        session = await b.open()
        key = session_key(session.id)
        running = asyncio.create_task(b.post(call("think", "first"), session))
        await eventually(lambda: key in node_of(b).sessions and "first" in node_of(b).sessions[key].exchanges)
        assert (await c.post(cancel("first"), session)).status_code == 202
        assert text_of((await b.post(call("quick", "second"), session)).json()) == "done"
        async with asyncio.timeout(DEADLINE):
            assert text_of(messages(await running)[-1]) == "Request cancelled"


class Watched(MemoryStore):
    """Knows how many watches there are of each log."""

    def __init__(self) -> None:
        super().__init__()
        self.watches: Counter[str] = Counter()

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        stop = super().watch(key, wake)
        self.watches[key] += 1

        def stopped() -> None:
            stop()
            self.watches[key] -= 1

        return stopped


async def test_log_is_watched_while_needed() -> None:
    """P10: nor is it read then."""
    store = Watched()
    async with staged(one(store), window=0.05) as (stage, _a, b, c):

        @stage.tool
        async def wait(ctx: Context, args: dict[str, Any]) -> str:
            await say(ctx, "begun")
            await stage.door("end")
            return "done"

        session = await b.open()
        key = session_key(session.id)
        async with posting(b, session, call("wait")) as stream, getting(c, session) as standalone:
            await begun(b, session, stream)
            await standalone.event()
            view = node_of(b).sessions[key]
            assert store.watches[key] == 2
            stage.open("end")
            assert texts_of(await stream.rest()) == ["done"]
        await eventually(lambda: view.log.follower.subscriptions == 0)
        await eventually(lambda: store.watches[key] == 0)


async def test_ended_handlers_log_is_not_followed() -> None:
    """P10: of a notification, say, though its window passes later."""
    store = Watched()
    async with staged(one(store), window=0.2) as (stage, _a, b, _c):
        ended: list[str] = []

        @stage.tool
        async def wait(ctx: Context, args: dict[str, Any]) -> str:
            await stage.door("end")
            return "done"

        async def handle(ctx: Context, params: types.NotificationParams) -> None:
            ended.append("x/done")

        b.app.manager.app.add_notification_handler("x/done", types.NotificationParams, handle)
        session = await b.open()
        key = session_key(session.id)
        assert (await b.post(notification("x/done"), session)).status_code == 202
        await eventually(lambda: bool(ended))
        await eventually(lambda: key not in node_of(b).sessions)
        # The window of another session's request passes after that of the notification, and then it has an event id.
        async with posting(b, await b.open(), call("wait")) as stream:
            await stream.event()
            assert store.watches[key] == 0
            stage.open("end")
            assert texts_of(await stream.rest()) == ["done"]


async def test_old_cancel_hits_no_new_request() -> None:
    """P5: the log ends with it when the next request of that id begins, on a view that took note of it."""
    async with staged(one(MemoryStore()), window=0.05, answer="json") as (stage, _a, b, c):

        @stage.tool
        async def think(ctx: Context, args: dict[str, Any]) -> str:
            stage.open("thinks")
            await stage.door("never")
            return "done"

        @stage.tool
        async def quick(ctx: Context, args: dict[str, Any]) -> str:
            return "quick"

        session = await b.open()
        key = session_key(session.id)
        async with getting(b, session) as standalone:
            await standalone.event()
            thinking = asyncio.create_task(b.post(call("think", "same"), session))
            await stage.reached("thinks")
            await eventually(lambda: node_of(b).sessions[key].log.follower.subscriptions > 1)
            assert (await c.post(cancel("same"), session)).status_code == 202
            assert text_of((await thinking).json()) == "Request cancelled"
            assert (await stage.kinds(session))[-1] is Kind.CANCEL

            async def used_up() -> bool:
                return not (await stage.store.load(key)).cancels

            await eventually(used_up)
            assert text_of((await b.post(call("quick", "same"), session)).json()) == "quick"


async def test_late_second_reply_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """P4, P14: the first that the store took counts, not the first that the handler's node hears of."""
    monkeypatch.setattr("nonstick.log.lookout._TURN_SECONDS", 0.1)
    async with misinformed() as (stage, store, _a, b, c):

        @stage.tool
        async def question(ctx: Context, args: dict[str, Any]) -> str:
            return str((await ask(ctx))["content"]["name"])

        session = await b.open()
        async with posting(b, session, call("question", 1)) as stream:
            asked = await stream.message()
            view = node_of(b).sessions[session_key(session.id)]
            await eventually(lambda: view.log.follower._reading is None)
            store.mode = "lost"
            assert (await c.post(accept(asked, "Ada"), session)).status_code == 202
            assert (await b.post(accept(asked, "Bob"), session)).status_code == 202
            assert texts_of(await stream.rest()) == ["Ada"]


def test_every_mode_but_one_misleads() -> None:
    """The counterpart: a node is misled indeed."""
    told: list[News | None] = []
    store = Misinformed()
    store.mode = "phantom"
    ear = _Ear(store, "key", told.append)
    true = News(Cursor(3, b"the last"), [Event(4, new_tag(), 0, b"")])
    ear.hear(true)
    assert [news.since(Cursor(3, b"the last")) is not None for news in told if news] == [True, True]
    assert told[1] == true
