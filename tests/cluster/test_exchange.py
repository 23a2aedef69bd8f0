"""One POST with a request, where its client, its store or its session goes away in the middle."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR

from nonstick import current_connection, session_state
from nonstick.core.events import Kind
from nonstick.core.names import session_key
from nonstick.core.record import Record
from nonstick.core.refusals import CANCELLED_BY_CLIENT, SHUT_DOWN
from nonstick.session.exchange import Exchange
from nonstick.session.live import LiveSession as View
from nonstick.store import Store
from nonstick.testing.cluster import HEADERS, Member, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import DEADLINE, posting
from tests.cluster.stage import (
    Context,
    DownStore,
    HeldStore,
    accept,
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

pytestmark = pytest.mark.anyio

FOR_EVER = 600.0
"""A window that does not pass: the node does not follow the log."""


def view(member: Member, session: Session) -> View:
    """What the node holds of the session."""
    return node_of(member).sessions[session_key(session.id)]


def has_ended(session: View, key: str) -> bool:
    """Whether the handler of this request has ended, and the request has not."""
    exchange = session.exchanges.get(key)
    return isinstance(exchange, Exchange) and exchange.is_closed


async def test_abandoned_handler_runs_to_its_end(memory: MakeStore) -> None:
    """P3: a middleware's timeout, say; more than a client's connection would have taken is sent to nobody."""
    async with staged(memory) as (stage, a, _, _):

        @stage.tool
        async def talk(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("go on")
            for _ in range(4):
                await say(ctx, "x" * 200_000)
            stage.open("done")
            return "done"

        session = await a.open()
        caller = asyncio.create_task(_call_app(a, session, call("talk")))
        await stage.reached("begun")
        caller.cancel()
        await asyncio.wait([caller])
        stage.open("go on")
        await stage.reached("done")


async def test_session_of_cancelled_caller_expires(memory: MakeStore) -> None:
    """P10: nobody waits for the answer any more, though the connection was not seen to end."""
    async with staged(memory, window=0.02, app_options={"session_idle_timeout": 1.0}) as (stage, a, _, _):

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            try:
                await stage.door("never")
            finally:
                stage.open("stopped")
            return "done"

        session = await a.open()
        caller = asyncio.create_task(_call_app(a, session, call("wait")))
        await stage.reached("begun")
        caller.cancel()
        await asyncio.wait([caller])
        await stage.reached("stopped")


async def _call_app(member: Member, session: Session, message: dict[str, Any]) -> None:
    """As an ASGI server would."""
    headers = {**HEADERS, **session.headers, "host": "127.0.0.1:80"}
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/mcp",
        "raw_path": b"/mcp",
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    body = [{"type": "http.request", "body": json.dumps(message).encode(), "more_body": False}]

    async def receive() -> Any:
        if body:
            return body.pop()
        return await asyncio.Event().wait()

    async def send(part: Any) -> None:
        await asyncio.Event().wait()

    await member.app(scope, receive, send)


@pytest.mark.parametrize("how", ["saves", "streams"])
async def test_request_of_ended_session_gets_404(make_store: MakeStore, how: str) -> None:
    """P6, P9: not 503, with which the client would try for ever."""
    async with staged(make_store, window=FOR_EVER) as (stage, a, b, c):

        @stage.tool
        async def work(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("go on")
            current_connection().state["kept"] = 1
            if how == "streams":
                await say(ctx, "said")
            return "done"

        session = await a.open()
        async with posting(b, session, call("work")) as stream:
            await stage.reached("begun")
            assert (await c.delete(session)).status_code == 200
            stage.open("go on")
            response = await stream.response()
            assert response.status_code == 404
            assert "retry-after" not in response.headers


async def test_state_set_while_saving_stays(memory: MakeStore) -> None:
    """P2: what it saves is looked up once it is its turn."""
    stores: list[HeldStore] = []

    def make() -> Store:
        stores.append(HeldStore(memory(), "update", after=False))
        return stores[-1]

    async with staged(make) as (stage, a, b, c):

        @stage.tool
        async def early(ctx: Context, arguments: dict[str, Any]) -> str:
            current_connection().state["key"] = "early"
            return "done"

        @stage.tool
        async def late(ctx: Context, arguments: dict[str, Any]) -> str:
            await session_state().set("key", "late")
            return "done"

        @stage.tool
        async def get(ctx: Context, arguments: dict[str, Any]) -> str:
            return str(current_connection().state["key"])

        session = await a.open()
        held = stores[2]
        held.holding = True
        async with posting(b, session, call("late", 1)) as setting:
            async with asyncio.timeout(DEADLINE):
                await held.held.wait()
            async with posting(b, session, call("early", 2)) as saving:
                await eventually(lambda: has_ended(view(b, session), "2"))
                held.holding = False
                held.released.set()
                assert text_of(await setting.answer()) == "done"
                assert text_of(await saving.answer()) == "done"
        for member in (c, b):
            assert text_of((await member.post(call("get"), session)).json()) == "late"


async def test_log_level_holds_at_once(memory: MakeStore) -> None:
    """P2: though that does not follow the log yet."""
    async with staged(memory, window=FOR_EVER) as (stage, a, b, _):

        @stage.tool
        async def talk(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("go on")
            await say(ctx, "unwanted")
            return "done"

        session = await a.open()
        async with posting(b, session, call("talk")) as stream:
            await stage.reached("begun")
            level = {"jsonrpc": "2.0", "id": 2, "method": "logging/setLevel", "params": {"level": "error"}}
            assert "result" in (await b.post(level, session)).json()
            stage.open("go on")
            assert text_of(await stream.answer()) == "done"


async def test_reply_to_full_log_is_503(memory: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """P4, P9: it counts once the log can take it: 202 means that the handler gets it."""
    monkeypatch.setattr("nonstick.http.post.PATIENCE_FOR_WHAT_COMES_ONCE", 0.05)
    stores: list[DownStore] = []

    def make() -> Store:
        stores.append(DownStore(memory(), "append", after=False))
        return stores[-1]

    async with staged(make) as (stage, a, b, c):

        @stage.tool
        async def name(ctx: Context, arguments: dict[str, Any]) -> str:
            return str((await ask(ctx))["content"]["name"])

        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            question = await stream.message()
            stores[3].holding = True
            refused = await c.post(accept(question), session)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == INTERNAL_ERROR
            stores[3].holding = False
            assert (await c.post(accept(question), session)).status_code == 202
            assert texts_of(await stream.rest()) == ["Ada"]


async def test_cancel_reaches_the_earlier_request(memory: MakeStore) -> None:
    """P5: the node follows from where the earliest of what runs there began."""
    async with staged(memory, window=0.5) as (stage, a, b, c):

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("never")
            return "done"

        @stage.tool
        async def quick(ctx: Context, arguments: dict[str, Any]) -> str:
            return "quick"

        session = await a.open()
        async with posting(b, session, call("wait", 1)) as stream:
            await stage.reached("begun")
            assert (await c.post(cancel(1), session)).status_code == 202
            assert text_of((await b.post(call("quick", 2), session)).json()) == "quick"
            assert (await stream.outcome())["error"]["message"] == "Request cancelled"


async def test_log_is_followed_while_needed(make_store: MakeStore) -> None:
    """P10: when the last request has ended, nothing watches the session."""
    async with staged(make_store, window=0.02) as (stage, a, b, _):

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("go on")
            return "done"

        session = await a.open()
        async with posting(b, session, call("wait")) as stream:
            await stage.reached("begun")
            followed = view(b, session).log.follower
            await eventually(lambda: followed.subscriptions > 0)
            stage.open("go on")
            assert text_of(await stream.outcome()) == "done"
        await eventually(lambda: followed.subscriptions == 0)


async def test_doubtful_answer_still_confirms_its_session(memory: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """P9, P10: the end that was in doubt is the end: nothing is written behind it, and what follows an end is done."""
    monkeypatch.setattr("nonstick.log.writer._PATIENCE", 0.05)
    monkeypatch.setattr("nonstick.session.stream._RETRY_PAUSE", 0.05)
    stores: list[DownStore] = []

    def make() -> Store:
        stores.append(DownStore(memory(), "append", after=True))
        return stores[-1]

    async with staged(make) as (stage, a, b, _):

        @stage.tool
        async def talk(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "said")
            down.holding = True
            return "done"

        session = await a.open(initialized=False)
        down = stores[2]
        async with posting(b, session, call("talk")) as stream:
            # More tries than one round of the guard has: the end is in doubt.
            await eventually(lambda: down.count > 20)
            down.holding = False
            assert texts_of(await stream.rest()) == ["said", "done"]

        async def confirmed() -> bool:
            record = await stage.store.load(session_key(session.id))
            return not Record.from_fields(record.fields).unconfirmed

        await eventually(confirmed)
        assert (await stage.kinds(session)).count(Kind.TERMINAL) == 1


async def test_request_without_its_stream_never_runs(memory: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: 503 says "try again", and its id is free again as soon as the stream that may have been opened has ended."""
    monkeypatch.setattr("nonstick.log.writer._PATIENCE", 0.05)
    monkeypatch.setattr("nonstick.session.stream._RETRY_PAUSE", 0.05)
    stores: list[DownStore] = []

    def make() -> Store:
        stores.append(DownStore(memory(), "append", after=True))
        return stores[-1]

    async with staged(make, answer="sse") as (stage, a, b, _):
        runs: list[Any] = []

        @stage.tool
        async def run(ctx: Context, arguments: dict[str, Any]) -> str:
            runs.append(ctx.request_id)
            return "ran"

        session = await a.open()
        stores[2].holding = True
        refused = await b.post(call("run", 1), session)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["id"] is None
        stores[2].holding = False

        async def answered() -> bool:
            async with posting(b, session, call("run", 1)) as stream:
                response = await stream.response()
                if response.status_code == 409:
                    return False
                assert response.status_code == 200
                return texts_of(await stream.rest()) == ["ran"]

        await eventually(answered)
        assert runs == [1]
        # The answer to `initialize` is a stream too.
        assert await stage.kinds(session) == [Kind.OPENED, Kind.TERMINAL] * 3


async def test_handlers_own_error_is_no_failure(memory: MakeStore, caplog: pytest.LogCaptureFixture) -> None:
    """P16: it is logged only where a handler ends in a way that it did not choose."""
    async with staged(memory) as (stage, a, _, _):

        @stage.tool
        async def refuse(ctx: Context, arguments: dict[str, Any]) -> str:
            raise MCPError(-32001, "not today")

        @stage.tool
        async def fail(ctx: Context, arguments: dict[str, Any]) -> str:
            raise LookupError("not found")

        session = await a.open()
        for tool, logged in (("refuse", 0), ("fail", 1)):
            caplog.clear()
            assert "error" in (await a.post(call(tool), session)).json()
            errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
            assert len(errors) == logged


@pytest.mark.parametrize("how", ["drained", "cancelled"])
async def test_first_reason_outlasts_later_errors(memory: MakeStore, how: str) -> None:
    """P5, P8: a handler that makes an error of its cancellation does not replace why it was cancelled."""
    async with staged(memory, grace=0.05) as (stage, a, b, c):

        @stage.tool
        async def stubborn(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "said")
            stage.open("begun")
            try:
                await stage.door("never")
            except asyncio.CancelledError:
                raise ValueError("never mind") from None
            return "done"

        session = await a.open()
        async with posting(b, session, call("stubborn")) as stream:
            await stage.reached("begun")
            if how == "drained":
                b.app.begin_drain()
            else:
                assert (await c.post(cancel(1), session)).status_code == 202
            last = (await stream.rest())[-1]
            expected = SHUT_DOWN if how == "drained" else CANCELLED_BY_CLIENT
            assert last["error"] == expected.model_dump(exclude_none=True)
