"""The protocol that gives up on heads which are too long or take too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from nonstick.protocols.bounded_heads import HEAD_BYTES, BoundedHeads

pytestmark = pytest.mark.anyio

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Where uvicorn serves with it."""
    config = uvicorn.Config(app, http=BoundedHeads, lifespan="off", log_config=None)
    config.load()
    state = uvicorn.Server(config).server_state
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: BoundedHeads(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    yield server.sockets[0].getsockname()[1]
    server.close()
    for connection in list(state.connections):
        connection.transport.abort()
    await server.wait_closed()


async def test_only_a_long_head_is_refused(port: int) -> None:
    """P10: also on a connection that was used before."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(REQUEST)
        await writer.drain()
        for _ in range(10):
            writer.write(b"x: " + b"y" * (HEAD_BYTES // 12) + b"\r\n")
            await writer.drain()
        writer.write(b"\r\n")
        assert b"200 OK" in await reader.readuntil(b"ok")
    writer.write(REQUEST + b"x: " + b"y" * (HEAD_BYTES - 100))
    await writer.drain()
    writer.write(b"y" * 200)  # the last that is sent: what came after the answer would reset the connection
    assert await reader.read(12) == b"HTTP/1.1 431"
    writer.close()


async def test_slow_head_and_silence_are_abandoned(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: but a request that was whole may take as long as it takes."""
    monkeypatch.setattr("nonstick.protocols.bounded_heads.HEAD_SECONDS", 0.2)
    for said in (b"", REQUEST):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        writer.close()


async def test_head_behind_another_request_is_bounded(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: it begins in the bytes that the request before it ends with. In time, and in size, which begins anew."""
    whole = REQUEST + b"\r\n"
    for more, answer in ((b"", b""), (b"x: " + b"y" * HEAD_BYTES, b"HTTP/1.1 431")):
        monkeypatch.setattr("nonstick.protocols.bounded_heads.HEAD_SECONDS", 60.0 if more else 0.2)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(whole + REQUEST)
        async with asyncio.timeout(60):
            assert b"200 OK" in await reader.readuntil(b"ok")
            writer.write(more)
            assert await reader.read(12) == answer
        writer.close()


async def test_whole_heads_start_no_timer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[BoundedHeads] = []
    expect = BoundedHeads._expect

    def counted(self: BoundedHeads) -> None:
        begun.append(self)
        expect(self)

    monkeypatch.setattr(BoundedHeads, "_expect", counted)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(3):
        writer.write(REQUEST + b"\r\n")
        assert b"200 OK" in await reader.readuntil(b"ok")
    assert len(begun) == 1  # of the connection, which was silent at first
    writer.close()
