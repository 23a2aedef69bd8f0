"""The balancer has no affinity, hides no disconnect, and sends nothing twice. The other cluster tests rest on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2
import pytest

from nonstick.testing.servers.balancer import Backend, Balancer, Exchange
from nonstick.testing.servers.valkey import ReservedPort

pytestmark = pytest.mark.anyio

DEADLINE = 60.0

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def node(name: str, script: Script) -> AsyncIterator[Backend]:
    """A node that does with each connection what the script says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Backend(name, server.sockets[0].getsockname()[1])


def says(text: str) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()

    return script


@contextlib.asynccontextmanager
async def three_nodes() -> AsyncIterator[list[Backend]]:
    async with node("a", says("a")) as a, node("b", says("b")) as b, node("c", says("c")) as c:
        yield [a, b, c]


async def test_each_request_visits_the_next_node() -> None:
    async with three_nodes() as nodes, Balancer(nodes) as balancer, httpx2.AsyncClient(timeout=60) as client:
        assert [(await client.get(balancer.url)).text for _ in range(5)] == ["a", "b", "c", "a", "b"]


async def test_random_pick_repeats_from_its_seed() -> None:
    async def picks(seed: int) -> str:
        async with Balancer(nodes, pick="random", seed=seed) as balancer, httpx2.AsyncClient(timeout=60) as client:
            return "".join([(await client.get(balancer.url)).text for _ in range(20)])

    async with three_nodes() as nodes:
        first = await picks(7)
        assert set(first) == set("abc")
        assert await picks(7) == first
        assert await picks(8) != first


async def test_node_that_refuses_is_passed_over() -> None:
    async with three_nodes() as nodes:
        closed = ReservedPort()
        nodes[1] = Backend("b", closed.port)
        async with Balancer(nodes) as balancer, httpx2.AsyncClient(timeout=60) as client:
            served = [(await client.get(balancer.url)).text for _ in range(6)]
            assert set(served) == {"a", "c"}
            assert [exchange.backend for exchange in balancer.exchanges] == served


async def test_empty_cluster_is_a_502() -> None:
    reports = asyncio.Queue[Exchange]()
    closed = ReservedPort()
    dead = Backend("a", closed.port)
    async with Balancer([dead], observe=reports.put_nowait) as balancer, httpx2.AsyncClient(timeout=60) as client:
        assert (await client.get(balancer.url)).status_code == 502
        exchange = await asyncio.wait_for(reports.get(), DEADLINE)
    assert (exchange.status, exchange.backend, exchange.complete) == (502, "", False)


async def test_response_streams_unbuffered() -> None:
    """The node sends its second part only after the client has the first."""
    received = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"5\r\nfirst\r\n")
        await received.wait()
        writer.write(b"6\r\nsecond\r\n0\r\n\r\n")
        await writer.drain()

    async with node("a", script) as a, Balancer([a]) as balancer, httpx2.AsyncClient(timeout=60) as client:
        async with asyncio.timeout(DEADLINE), client.stream("GET", balancer.url) as response:
            parts = response.aiter_raw()
            assert await anext(parts) == b"first"
            received.set()
            assert await anext(parts) == b"second"
        (exchange,) = balancer.exchanges
        assert exchange.content_type == "text/event-stream"


async def test_request_body_streams_unbuffered() -> None:
    """The client sends its second part only after the node has the first."""
    arrived = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"first")
        arrived.set()
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    async def parts() -> AsyncIterator[bytes]:
        yield b"first"
        await arrived.wait()
        yield b"second"

    async with node("a", script) as a, Balancer([a]) as balancer, httpx2.AsyncClient(timeout=60) as client:
        async with asyncio.timeout(DEADLINE):
            assert (await client.post(balancer.url, content=parts())).status_code == 202


async def test_leaving_client_leaves_its_node() -> None:
    gone = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async with node("a", script) as a, Balancer([a]) as balancer, httpx2.AsyncClient(timeout=60) as client:
        async with asyncio.timeout(DEADLINE):
            async with client.stream("GET", balancer.url):
                pass
            await gone.wait()


async def test_cut_exchange_breaks_no_other() -> None:
    gone = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async with node("a", script) as a, node("b", says("b")) as b, httpx2.AsyncClient(timeout=60) as client:
        async with Balancer([a, b]) as balancer, asyncio.timeout(DEADLINE):
            async with client.stream("GET", balancer.url) as response:
                assert (await client.get(balancer.url)).text == "b"
                cut, whole = balancer.exchanges
                balancer.cut(whole)
                balancer.cut(cut)
                with pytest.raises(httpx2.TransportError):
                    await response.aread()
            await gone.wait()
        assert (cut.complete, whole.complete) == (False, True)


async def test_dying_node_breaks_its_connection() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        await writer.drain()
        writer.transport.abort()

    async with node("a", script) as a, Balancer([a]) as balancer, httpx2.AsyncClient(timeout=60) as client:
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(httpx2.TransportError):
                await client.get(balancer.url)
        (exchange,) = balancer.exchanges
        assert not exchange.complete


async def test_dying_node_is_not_replaced() -> None:
    """No request is sent twice."""
    count = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    async with (
        node("a", script) as a,
        node("b", script) as b,
        Balancer([a, b]) as balancer,
        httpx2.AsyncClient(timeout=60) as client,
        asyncio.timeout(DEADLINE),
    ):
        with pytest.raises(httpx2.TransportError):
            await client.post(balancer.url, json={"jsonrpc": "2.0", "method": "ping", "id": 1})
    assert count == 1


async def test_exchange_records_the_json_rpc_message() -> None:
    reports = asyncio.Queue[tuple[int, bool]]()

    def observe(exchange: Exchange) -> None:
        reports.put_nowait((exchange.status, exchange.total is not None))

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}}")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json; x=y\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()

    async with (
        node("a", script) as a,
        Balancer([a], observe=observe) as balancer,
        httpx2.AsyncClient(timeout=60) as client,
    ):
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "count"}}
        assert (await client.post(f"{balancer.url}/mcp?x=1", json=body)).json() == {}
        async with asyncio.timeout(DEADLINE):
            assert [await reports.get(), await reports.get()] == [(200, False), (200, True)]
        (exchange,) = balancer.exchanges
    assert exchange.message == body
    assert (exchange.method, exchange.path, exchange.rpc) == ("POST", "/mcp?x=1", "tools/call")
    assert (exchange.backend, exchange.status, exchange.content_type) == ("a", 200, "application/json")
    assert exchange.complete


async def test_large_response_arrives_whole() -> None:
    body = "x" * 3_000_000
    async with node("a", says(body)) as a, Balancer([a]) as balancer, httpx2.AsyncClient(timeout=60) as client:
        response = await client.get(balancer.url, headers={"connection": "close"})
        assert len(response.content) == len(body)
