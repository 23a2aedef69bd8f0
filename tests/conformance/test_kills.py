"""The kills come when no request can be lost by them, and only then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from nonstick.testing.servers.balancer import Backend, Balancer
from tests.conformance.kills import Kills

pytestmark = pytest.mark.anyio

NAME = "node-1"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n: open\n\n"


class Node:
    """Opens a stream for every request, and answers nothing further until told so."""

    def __init__(self) -> None:
        self.killed = asyncio.Event()
        self.finish = asyncio.Event()
        self.port = 0

    def kill(self) -> None:
        self.killed.set()

    async def start(self) -> None:
        await asyncio.Event().wait()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(STREAM)
            await self.finish.wait()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            self.finish.set()
            server.close()


@asynccontextmanager
async def requested(method: str, node: Node, kills: Kills) -> AsyncIterator[Balancer]:
    """A balancer that carries this request to the node: its stream is open."""
    async with node.listening(), Balancer([Backend(NAME, node.port)], observe=kills.observe) as balancer:
        reader, writer = await asyncio.open_connection("127.0.0.1", balancer.port)
        try:
            writer.write(f"{method} /mcp HTTP/1.1\r\nhost: here\r\ncontent-length: 0\r\n\r\n".encode())
            await reader.readuntil(b": open\n\n")
            yield balancer
        finally:
            writer.close()


async def test_no_kill_takes_a_post_along() -> None:
    """The POST's stream has ended, and has settled, before its node is killed."""
    node, kills = Node(), Kills(0.01)
    async with asyncio.timeout(60), requested("POST", node, kills) as balancer, kills.happening(balancer, {NAME: node}):
        (exchange,) = balancer.exchanges
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(node.killed.wait(), 0.2)
        assert exchange.total is None
        node.finish.set()
        await node.killed.wait()
        assert exchange.complete
    assert (kills.count, kills.streams) == (1, 0)


async def test_open_get_delays_no_kill() -> None:
    """It is resumed on another node, so its node may go; what was broken is counted."""
    node, kills = Node(), Kills(0.01)
    async with asyncio.timeout(60), requested("GET", node, kills) as balancer, kills.happening(balancer, {NAME: node}):
        await node.killed.wait()
        assert balancer.exchanges[0].total is None
    assert (kills.count, kills.streams) == (1, 1)
