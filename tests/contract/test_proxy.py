"""The fault proxy does what its verbs say, to bytes and connections that a test can see."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from nonstick.testing import FaultProxy
from nonstick.testing.contract.tools import deadline, eventually

pytestmark = pytest.mark.anyio


class Echo:
    """A server that answers each line with itself, and counts the lines."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self._server: asyncio.Server | None = None
        self.url = ""

    async def __aenter__(self) -> Echo:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            while line := await reader.readline():
                self.lines.append(line)
                writer.write(line)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()


class Client:
    """A connection by way of the proxy."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def say(self, line: bytes) -> None:
        self._writer.write(line)
        await self._writer.drain()

    async def hear(self) -> bytes:
        """The next line; b"" for a connection that was closed or reset."""
        async with deadline():
            try:
                return await self._reader.readline()
            except ConnectionError:
                return b""

    async def ask(self, line: bytes) -> bytes:
        await self.say(line)
        return await self.hear()


@asynccontextmanager
async def connected(proxy: FaultProxy) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(proxy.url).port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    async with Echo() as echo:
        yield echo


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(echo.url) as proxy:
        yield proxy


async def test_healthy_proxy_forwards_both_ways(proxy: FaultProxy) -> None:
    """`FaultProxy` is healthy until told otherwise."""
    async with connected(proxy) as one, connected(proxy) as two:
        large = b"x" * 50_000 + b"\n"
        assert await one.ask(large) == large
        assert await two.ask(b"2\n") == b"2\n"
        assert proxy.connections == 2


async def test_closed_connection_is_forgotten(proxy: FaultProxy) -> None:
    """`connections`: how many are open."""
    async with connected(proxy) as client:
        assert await client.ask(b"1\n") == b"1\n"

    async def none() -> bool:
        return proxy.connections == 0

    await eventually(none)


async def test_cut_resets_old_refuses_new_connections(proxy: FaultProxy) -> None:
    """`cut` until `heal`; the port stays the same."""
    async with connected(proxy) as client:
        assert await client.ask(b"1\n") == b"1\n"
        await proxy.cut()
        assert await client.hear() == b""
    assert proxy.connections == 0
    for _ in range(20):
        with pytest.raises(ConnectionRefusedError):
            async with connected(proxy):
                pass
    await proxy.heal()
    async with connected(proxy) as client:
        assert await client.ask(b"2\n") == b"2\n"


async def test_reset_serves_what_comes_next(proxy: FaultProxy) -> None:
    """`reset` resets every connection once."""
    async with connected(proxy) as client:
        assert await client.ask(b"1\n") == b"1\n"
        await proxy.reset()
        assert await client.hear() == b""
    async with connected(proxy) as client:
        assert await client.ask(b"2\n") == b"2\n"


async def test_black_hole_holds_requests_until_healed(proxy: FaultProxy, echo: Echo) -> None:
    """`black_hole` accepts bytes and forwards nothing; what it has held is delivered late."""
    async with connected(proxy) as client:
        assert await client.ask(b"1\n") == b"1\n"
        proxy.black_hole()
        await client.say(b"2\n")
        async with FaultProxy(echo.url) as other, connected(other) as fence:
            assert await fence.ask(b"fence\n") == b"fence\n"
        assert echo.lines == [b"1\n", b"fence\n"]
        await proxy.heal()
        assert await client.hear() == b"2\n"


async def test_black_hole_accepts_new_connections(proxy: FaultProxy) -> None:
    """`black_hole` accepts connections, too, and forwards them when it heals."""
    proxy.black_hole()
    async with connected(proxy) as client:
        await client.say(b"1\n")
        await proxy.heal()
        assert await client.hear() == b"1\n"


async def test_one_way_black_hole_passes_requests(proxy: FaultProxy, echo: Echo) -> None:
    """`black_hole(requests=False)` holds what comes back only."""
    async with connected(proxy) as client:
        assert await client.ask(b"1\n") == b"1\n"
        proxy.black_hole(requests=False)
        await client.say(b"2\n")

        async def arrived() -> bool:
            return echo.lines == [b"1\n", b"2\n"]

        await eventually(arrived)
        await proxy.heal()
        assert await client.hear() == b"2\n"


async def test_request_with_lost_reply_is_executed(proxy: FaultProxy, echo: Echo) -> None:
    """`lose_next_reply`: the server receives the request in full; the client is reset in place of the answer."""
    proxy.lose_next_reply()
    async with connected(proxy) as client:
        assert await client.ask(b"1\n") == b""
    async with connected(proxy) as client:
        assert await client.ask(b"2\n") == b"2\n"
    assert echo.lines == [b"1\n", b"2\n"]


async def test_only_meant_requests_lose_replies(proxy: FaultProxy, echo: Echo) -> None:
    """`drop_replies(count, after=...)` counts the requests that hold these bytes."""
    proxy.drop_replies(2, after=b"write")
    answers = []
    for line in (b"read 1\n", b"write 2\n", b"read 3\n", b"write 4\n", b"write 5\n"):
        async with connected(proxy) as client:
            answers.append(await client.ask(line))
    assert answers == [b"read 1\n", b"", b"read 3\n", b"", b"write 5\n"]
    assert len(echo.lines) == 5
    assert proxy.replies_to_lose == 0


async def test_delay_makes_the_answer_late(proxy: FaultProxy) -> None:
    """`delay`: every piece, in both directions, arrives this much later."""
    clock = asyncio.get_running_loop().time
    async with connected(proxy) as client:
        assert await client.ask(b"1\n") == b"1\n"
        proxy.delay(0.05)
        start = clock()
        assert await client.ask(b"2\n") == b"2\n"
        assert clock() - start >= 0.1 - 0.002
        await proxy.heal()


async def test_failover_leads_to_another_server(proxy: FaultProxy, echo: Echo) -> None:
    """`lead_to`: at the same address; connections to the server before are reset."""
    async with Echo() as other, connected(proxy) as before:
        assert await before.ask(b"1\n") == b"1\n"
        await proxy.lead_to(other.url)
        assert await before.hear() == b""
        async with connected(proxy) as after:
            assert await after.ask(b"2\n") == b"2\n"
        assert (echo.lines, other.lines) == ([b"1\n"], [b"2\n"])


async def test_nothing_is_left_when_it_closes(echo: Echo) -> None:
    """Its end closes what is open, black-holed and delayed alike, and ends every task."""
    before = asyncio.all_tasks()
    async with FaultProxy(echo.url) as proxy, connected(proxy) as open_, connected(proxy) as held:
        assert await open_.ask(b"1\n") == b"1\n"
        proxy.black_hole()
        await held.say(b"2\n")
        await proxy.__aexit__(None, None, None)
        assert await open_.hear() == b""
        assert proxy.connections == 0

    async def ended() -> bool:
        return asyncio.all_tasks() - before == {asyncio.current_task()} - before

    await eventually(ended)


async def test_unreachable_target_closes_the_connection() -> None:
    """The proxy accepts, and closes when it cannot reach its target."""
    async with FaultProxy("tcp://127.0.0.1:9") as proxy, connected(proxy) as client:
        assert await client.hear() == b""
