"""A flood leaves the node serving others, in bounded memory, and nothing of it stays (P10)."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nonstick.testing.cluster import HEADERS
from nonstick.testing.servers.valkey import START_SECONDS, ReservedPort
from tests.pace import unhurried

pytestmark = pytest.mark.anyio

SERVER = Path(__file__).with_name("flooded.py")
INITIALIZE: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "flood", "version": "1"}},
}
SLOW = (pytest.mark.slow, pytest.mark.timeout(900))

PATIENCE = 30.0
"""Seconds within which everybody else is served. The machine is busy with the flood itself, and its sender."""

MEGABYTE = 1024 * 1024


class Node:
    """`nonstick serve` with these settings, as a process."""

    def __init__(self, home: Path, **settings: object) -> None:
        self._reserved = ReservedPort()
        self.port = self._reserved.port
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        named = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        command = [sys.executable, "-m", "nonstick", "serve", str(SERVER), "--port", str(self.port)]
        command += ["--log-level", "error", "--store", f"sqlite:///{home}/sessions.db", *named]
        with (home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | {"PYTHONDEVMODE": ""}, stdin=subprocess.DEVNULL, stderr=log
            )
        self.log = home / "log"

    @property
    def memory(self) -> int:
        """Bytes that it has in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def connections(self) -> int:
        """Connections of clients that it holds open."""
        mine = f":{self.port:04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        # Its ends of connections that the kernel still knows a process for.
        return sum(row[1].endswith(mine) and row[3] != "0A" and row[9] != "0" for row in rows)

    async def ready(self, client: httpx2.AsyncClient) -> None:
        async with asyncio.timeout(START_SECONDS):
            while self.process.poll() is None:
                try:
                    if (await client.get(self.url.replace("/mcp", "/readyz"))).status_code == 200:
                        return
                except httpx2.TransportError:
                    pass
                await asyncio.sleep(0.02)
        raise RuntimeError(self.log.read_text())


@asynccontextmanager
async def serving(home: Path, **settings: object) -> AsyncIterator[tuple[Node, Polite]]:
    """A node, and a client that goes on calling it and must be served throughout."""
    node = Node(home, **settings)
    try:
        async with httpx2.AsyncClient(timeout=PATIENCE) as client:
            await node.ready(client)
            polite = Polite(client, node.url)
            await polite.open()
            calling = asyncio.create_task(polite.go_on())
            try:
                yield node, polite
                assert not calling.done(), "the polite client was not served"
            finally:
                calling.cancel()
                await asyncio.wait([calling])
                if not calling.cancelled():
                    calling.result()
    finally:
        node.process.kill()
        node.process.wait()


class Polite:
    """A client that behaves."""

    def __init__(self, client: httpx2.AsyncClient, url: str) -> None:
        self.client = client
        self.url = url
        self.served = 0
        self.slowest = 0.0
        self.headers: dict[str, str] = dict(HEADERS)

    async def open(self) -> int:
        """Opens its session; the status."""
        response = await self.client.post(self.url, json=INITIALIZE, headers=HEADERS)
        if response.status_code == 200:
            version = {"mcp-session-id": response.headers["mcp-session-id"], "mcp-protocol-version": "2025-11-25"}
            self.headers = {**HEADERS, **version}
            initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
            await self.client.post(self.url, json=initialized, headers=self.headers)
        return response.status_code

    async def call(self, tool: str, *, timeout: float = PATIENCE, **arguments: Any) -> httpx2.Response:
        params = {"name": tool, "arguments": arguments}
        message = {"jsonrpc": "2.0", "id": self.served, "method": "tools/call", "params": params}
        return await self.client.post(self.url, json=message, headers=self.headers, timeout=timeout)

    async def go_on(self) -> None:
        """Calls again and again. Ends only if it is not served."""
        while True:
            began = time.monotonic()
            response = await self.call("plain")
            assert response.status_code == 200, response.text
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.served += 1
            await asyncio.sleep(0.02)

    async def served_again(self, count: int = 3) -> None:
        """Returns once it was served some times from now on."""
        until = self.served + count
        async with asyncio.timeout(PATIENCE * count):
            while self.served < until:  # noqa: ASYNC110 - another task counts
                await asyncio.sleep(0.01)


async def flood(node: Node, count: int, *, connections: int = 16) -> Counter[int]:
    """Sends so many `initialize`; how often which status came. Checks that what is refused says when to come back."""
    body = json.dumps(INITIALIZE).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    request = f"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:{node.port}\r\n{head}content-length: {len(body)}\r\n\r\n"
    left = iter(range(count))
    statuses: Counter[int] = Counter()

    async def send() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        for _ in left:
            writer.write(request.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            headers = dict(line.lower().split(b": ", 1) for line in answer.split(b"\r\n")[1:] if line)
            await reader.readexactly(int(headers[b"content-length"]))
            status = int(answer.split(b" ", 2)[1])
            assert status == 200 or b"retry-after" in headers
            statuses[status] += 1
        writer.close()

    await asyncio.gather(*(send() for _ in range(connections)))
    return statuses


@pytest.mark.parametrize("count", [1500, pytest.param(50_000, marks=SLOW)])
@unhurried("first", 3.0, 12.0, 48.0)
async def test_flood_of_initialize_leaves_others_served(tmp_path: Path, count: int, first: float) -> None:
    """P10: 503 with when to come back over `max_sessions`; what was opened and not used makes room again soon."""
    home = tmp_path / f"{first:g}"
    home.mkdir()
    async with serving(home, max_sessions=500, unconfirmed_lifetime=first) as (node, polite):
        before = node.memory
        statuses = await flood(node, count)
        assert statuses.keys() == {200, 503}
        assert statuses.total() == count
        if count < 5000:  # else the first of them have expired meanwhile
            assert statuses[200] >= 499
        await polite.served_again()
        assert node.memory - before < 64 * MEGABYTE
        another = Polite(polite.client, node.url)
        async with asyncio.timeout(60):
            while await another.open() != 200:  # noqa: ASYNC110 - in another process
                await asyncio.sleep(0.2)
        assert (await another.call("plain")).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_unlimited_initialize_flood_costs_no_memory(tmp_path: Path) -> None:
    """P10: sessions are in the store; an idle one costs a node nothing."""
    async with serving(tmp_path, max_sessions=None) as (node, polite):
        before = node.memory
        assert await flood(node, 50_000) == {200: 50_000}
        await polite.served_again()
        assert node.memory - before < 96 * MEGABYTE


async def never_reading(node: Node, headers: dict[str, str]) -> socket.socket:
    """A GET whose client never reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", node.port))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"GET /mcp HTTP/1.1\r\nhost: 127.0.0.1:{node.port}\r\n{lines}\r\n".encode()
    await asyncio.get_running_loop().sock_sendall(client, request)
    return client


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("sessions", "each", "count"), [(6, 20, 140), pytest.param(10, 100, 600, marks=SLOW)])
async def test_flood_of_unread_gets_is_released(tmp_path: Path, sessions: int, each: int, count: int) -> None:
    """P10: one session has no more than its listeners; the connections are gone though their clients never read."""
    settings = {"send_timeout": 1.0, "ping_interval": 0.5, "max_listeners": 8, "max_log_bytes": 64 * MEGABYTE}
    async with serving(tmp_path, **settings) as (node, polite):
        floods = [Polite(polite.client, node.url) for _ in range(sessions)]
        clients: list[socket.socket] = []
        for one in floods:
            assert await one.open() == 200
        idle, before = node.connections, node.memory
        try:
            for one in floods:
                clients += [await never_reading(node, one.headers) for _ in range(each)]
            await polite.served_again()
            # More than the kernel takes for a connection.
            told = await asyncio.gather(*(one.call("tell", timeout=120, count=count, size=50_000) for one in floods))
            assert {response.status_code for response in told} == {200}
            await polite.served_again()
            assert node.memory - before < (64 + sessions * 8) * MEGABYTE, "what nobody reads piles up"
            async with asyncio.timeout(60):
                # Those that were told nothing but pings are still there: these fit into any buffer.
                while node.connections > idle + sessions * 8 - sessions:  # noqa: ASYNC110 - in another process
                    await asyncio.sleep(0.1)
            await polite.served_again()
        finally:
            for client in clients:
                client.close()
        async with asyncio.timeout(60):
            while node.connections > idle:  # noqa: ASYNC110 - in another process
                await asyncio.sleep(0.1)
        # There is room again.
        async with polite.client.stream("GET", node.url, headers=floods[0].headers) as response:
            assert response.status_code == 200
        await polite.served_again()
