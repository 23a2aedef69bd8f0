"""Who waits for a client's reply, and who does no longer (P4, P7)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pydantic_core
import pytest
from mcp.shared.exceptions import MCPError

from nonstick.session.backchannel import BackChannel
from nonstick.store import Draft
from nonstick.stores.memory import MemoryStore
from tests.unit.test_inbox import KEY, Stage

pytestmark = pytest.mark.anyio

OPTIONS: Any = {"request_id": "mine"}


@pytest.fixture
async def channel() -> BackChannel:
    store = MemoryStore()
    await store.create(KEY, {}, lifetime=600)
    stage = Stage(store)
    return BackChannel(stage.log, stage.inbox, stage.tasks, nullcontext(), timeout=60)


async def ask(channel: BackChannel) -> asyncio.Task[dict[str, Any]]:
    """Asks the client, under an id of its own. Returns when the request was sent."""
    sent = asyncio.Event()

    async def emit(_: Draft, expect: Sequence[str]) -> None:
        assert len(expect) == 1
        sent.set()

    asking = asyncio.ensure_future(channel.ask(emit, "ping", None, OPTIONS))
    async with asyncio.timeout(60):
        await asyncio.wait([asking, asyncio.ensure_future(sent.wait())], return_when=asyncio.FIRST_COMPLETED)
    return asking


def reply(channel: BackChannel, number: int) -> None:
    channel.deliver_reply(pydantic_core.to_json({"jsonrpc": "2.0", "id": "mine", "result": {"number": number}}))


async def test_reply_frees_its_id(channel: BackChannel) -> None:
    for number in range(3):
        asking = await ask(channel)
        with pytest.raises(ValueError, match="already in flight"):
            await (await ask(channel))
        reply(channel, number)
        async with asyncio.timeout(60):
            assert await asking == {"number": number}


async def test_dropped_session_answers_who_waits(channel: BackChannel) -> None:
    """What is asked on from there, under the same id too, is not concerned."""
    before = await ask(channel)
    channel.drop(MCPError(-32000, "moved"))
    after = await ask(channel)
    async with asyncio.timeout(60):
        with pytest.raises(MCPError, match="moved"):
            await before
        with pytest.raises(ValueError, match="already in flight"):
            await (await ask(channel))
        reply(channel, 1)
        assert await after == {"number": 1}
