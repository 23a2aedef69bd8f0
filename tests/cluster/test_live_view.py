"""A session's live view on a node: what it learns of other nodes while requests use it."""

from __future__ import annotations

from typing import Any

import pytest

from nonstick import current_connection
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.servers import opening
from tests.cluster.sse import posting
from tests.cluster.stage import (
    Context,
    Stage,
    call,
    notification,
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


async def test_running_handler_hears_initialized_of_another_node(make_store: MakeStore) -> None:
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


async def test_running_handler_sees_introduction_of_another_node(make_store: MakeStore) -> None:
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
