"""How long the campaign's client waits for the end of a replay (P9)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass

import httpx2
import pytest

from nonstick.testing.oracle import Lost, Replayed
from tests.faults import client
from tests.faults.client import Call, History, Session

pytestmark = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
END = b'data: {"jsonrpc": "2.0", "id": 1, "error": {"code": -32603, "message": "lost"}}\n\n'
SHORT = 0.3


@dataclass
class Node:
    name: str
    url: str


@asynccontextmanager
async def node_that_ends(after: float) -> AsyncIterator[Node]:
    """It shows signs of life all the time, and ends a stream so many seconds after it was asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD)
            limit = asyncio.get_running_loop().time() + after
            while asyncio.get_running_loop().time() < limit:
                writer.write(b": alive\n\n")
                await writer.drain()
                await asyncio.sleep(SHORT / 10)
            writer.write(END)
            await writer.drain()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield Node("a", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp")


async def replayed(after: float, losses: list[Lost]) -> Replayed:
    """What is recorded of a replay of a finished call, among these losses."""
    history = History()
    for loss in losses:
        history.add(loss)
    async with node_that_ends(after) as node, httpx2.AsyncClient() as http:
        session = Session(http, [node], history, random.Random(1), name="s")
        call = Call("s-0-count", 1, terminal={"id": 1}, ids=["one"], begun=100.0)
        await session.replay(call)
    [found] = [record for record in history.records if isinstance(record, Replayed)]
    return found


async def test_lost_end_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failover that may have lost it came after the call began."""
    monkeypatch.setattr(client, "REPLAY_SECONDS", SHORT)
    found = await replayed(3 * SHORT, [Lost(101.0, 100.5, 101.5)])
    assert found.ended
    assert [message["error"]["message"] for _, message in found.events] == ["lost"]


@pytest.mark.parametrize("losses", [[], [Lost(99.0, 98.0, 99.5)]], ids=["no loss", "an older loss"])
async def test_kept_end_is_not_waited_for(losses: list[Lost], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a stream that hangs would be excused."""
    monkeypatch.setattr(client, "REPLAY_SECONDS", SHORT)
    found = await replayed(client.LOST_REPLAY_SECONDS, losses)
    assert not found.ended
    assert found.events == []


async def test_stream_that_never_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the store may have lost."""
    monkeypatch.setattr(client, "REPLAY_SECONDS", SHORT)
    monkeypatch.setattr(client, "LOST_REPLAY_SECONDS", 3 * SHORT)
    assert not (await replayed(3600.0, [Lost(101.0, 100.5, 101.5)])).ended
