"""A session's live view on a node: what it learns of other nodes while requests use it."""

from __future__ import annotations

from typing import Any

import pytest
from mcp_types import INTERNAL_ERROR, ErrorData

from nonstick import current_connection
from nonstick.core.events import Kind, decode, draft, kind_of
from nonstick.core.jsonrpc import error_body
from nonstick.core.names import session_key
from nonstick.store import Batch
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.servers import opening
from tests.cluster.sse import getting, posting
from tests.cluster.stage import (
    Context,
    Stage,
    call,
    notification,
    say,
    staged,
    text_of,
)

pytestmark = pytest.mark.anyio

FOR_EVER = 600.0
"""A window that does not pass: the node does not follow the log."""


def add_quick(stage: Stage) -> None:
    @stage.tool
    async def quick(ctx: Context, arguments: dict[str, Any]) -> str:
        return "quick"


async def use(member: Member, session: Session, request_id: int) -> None:
    """Another request of the session comes to this node, which loads the record for it."""
    assert text_of((await member.post(call("quick", request_id), session)).json()) == "quick"


async def test_running_handler_hears_foreign_initialized(make_store: MakeStore) -> None:
    """P2: the view that a handler uses is brought up to date by the next request's record."""
    async with staged(make_store, window=FOR_EVER) as (stage, a, b, c):
        add_quick(stage)

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await current_connection().initialized.wait()
            return "initialized"

        session = await a.open(initialized=False)
        async with posting(b, session, call("wait", 1)) as stream:
            await stage.reached("begun")
            assert (await c.post(notification("notifications/initialized"), session)).status_code == 202
            await use(b, session, 2)
            assert text_of(await stream.answer()) == "initialized"


async def test_running_handler_sees_foreign_introduction(make_store: MakeStore) -> None:
    """P2: a client that introduces itself anew, at whichever node, is that client everywhere."""
    async with staged(make_store, window=FOR_EVER) as (stage, a, b, c):
        add_quick(stage)

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("go on")
            connection = current_connection()
            assert connection.client_params is not None
            return f"{connection.client_params.client_info.name} {connection.protocol_version}"

        session = await a.open()
        async with posting(b, session, call("wait", 1)) as stream:
            await stage.reached("begun")
            again = opening("2025-06-18", clientInfo={"name": "renamed", "version": "2"})
            assert "result" in (await c.post(again, session)).json()
            await use(b, session, 2)
            stage.open("go on")
            assert text_of(await stream.answer()) == "renamed 2025-06-18"


async def test_request_missing_its_session_stops_others(memory: MakeStore) -> None:
    """P6: they run on the same node, which does not follow the log yet."""
    async with staged(memory, window=FOR_EVER) as (stage, a, b, c):

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("waits")
            await stage.door("never")
            return "done"

        @stage.tool
        async def save(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("go on")
            current_connection().state["key"] = 1
            return "done"

        session = await a.open()
        async with posting(b, session, call("wait", 1)) as waiting, posting(b, session, call("save", 2)) as saving:
            await stage.reached("waits")
            await stage.reached("begun")
            assert (await c.delete(session)).status_code == 200
            stage.open("go on")
            for stream in (saving, waiting):
                assert (await stream.response()).status_code == 404


async def test_ended_requests_state_is_not_saved(memory: MakeStore) -> None:
    """P7: nothing of it counts any more, not even where the next request uses the same view."""
    async with staged(memory, window=FOR_EVER) as (stage, a, b, c):

        @stage.tool
        async def put(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "begun")
            current_connection().state["key"] = "lost"
            await stage.door("go on")
            return "done"

        @stage.tool
        async def get(ctx: Context, arguments: dict[str, Any]) -> str:
            return str(current_connection().state.get("key"))

        session = await a.open()
        async with getting(b, session) as standalone:
            await standalone.event()
            async with posting(b, session, call("put", 1)) as stream:
                assert text_of(await stream.message()) == "begun"
                [opened] = [event for event in await stage.log(session) if kind_of(event.data) is Kind.OPENED]
                attempt = decode(opened.data)["attempt"]
                end = draft(Kind.TERMINAL, error_body(1, ErrorData(code=INTERNAL_ERROR, message="lost")))
                batch = Batch([end], stream=opened.position, attempt=attempt, terminal=True)
                await stage.store.append(session_key(session.id), batch)
                stage.open("go on")
                assert await stream.rest() == []
            for member in (b, c):
                assert text_of((await member.post(call("get", 2), session)).json()) == "None"
