"""uvicorn's own workers on one SQLite file: what most people start with when one process is not enough."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from asyncio.subprocess import STDOUT, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from mcp.server import MCPServer

import nonstick
from nonstick.testing.servers.valkey import ReservedPort
from tests.cluster.servers import call, opening

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

WORKERS: Final = 4
SESSIONS: Final = 100
CONNECTIONS: Final = 16
REQUESTS: Final = 10_000

SERVER: Final = """
from mcp.server import MCPServer

import nonstick

server = MCPServer("workers", log_level="ERROR")


@server.tool()
def echo(text: str) -> str:
    nonstick.current_connection().state.setdefault("first", text)
    return text


app = nonstick.app(server, store="sqlite:///sessions.db", node_header=True)
"""


class Response:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body


class Connection:
    """One kept-alive connection: a few lines that cost next to nothing, so that the servers are what is measured."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    async def post(self, message: Any, session_id: str | None = None) -> Response:
        body = json.dumps(message).encode()
        head = (
            f"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\naccept: application/json, text/event-stream\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nmcp-protocol-version: 2025-11-25\r\n"
        )
        if session_id is not None:
            head += f"mcp-session-id: {session_id}\r\n"
        self._writer.write(head.encode() + b"\r\n" + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = answer.strip().split("\r\n")
        headers = dict(
            line.lower().split(": ", 1) if "session-id" not in line else line.split(": ", 1) for line in lines
        )
        return Response(int(status.split()[1]), headers, await self._body(headers))

    async def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await self._reader.readexactly(int(headers["content-length"]))
        body = b""
        while size := int(await self._reader.readline(), 16):
            body += (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readline()
        return body

    async def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def workers(
    home: Path, source: str = SERVER, *, count: int = WORKERS
) -> AsyncIterator[tuple[int, Process, Path]]:
    """`uvicorn server:app --workers 4`."""
    (home / "server.py").write_text(source)
    reserved = ReservedPort()
    port = reserved.port
    log = home / "log"
    command = ["-m", "uvicorn", "server:app", "--workers", str(count), "--port", str(port), "--log-level", "warning"]
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=home, stdout=out, stderr=STDOUT)
    try:
        await _listens(process, port)
        yield port, process, log
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(60):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _listens(process: Process, port: int) -> None:
    async with asyncio.timeout(60):
        while process.returncode is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return
    raise RuntimeError("uvicorn did not start")


async def spread(port: int) -> list[Connection]:
    """Connections to all workers, as many to each. The system gives a connection to whichever worker is idle."""
    found: dict[str, list[Connection]] = {}
    async with asyncio.timeout(60):
        while len(found) < WORKERS or any(len(kept) < CONNECTIONS // WORKERS for kept in found.values()):
            burst = [Connection(port) for _ in range(CONNECTIONS)]
            await asyncio.gather(*(connection.open() for connection in burst))
            answers = await asyncio.gather(*(connection.post({}) for connection in burst))
            for connection, answer in zip(burst, answers, strict=True):
                kept = found.setdefault(answer.headers["nonstick-node"], [])
                if len(kept) < CONNECTIONS // WORKERS:
                    kept.append(connection)
                else:
                    await connection.close()
    return [connection for kept in found.values() for connection in kept]


@pytest.mark.slow
async def test_many_requests_on_workers_never_fail(tmp_path: Path) -> None:
    """P1: no affinity: 10,000 requests of 100 sessions go to whichever of four workers has the connection."""
    async with workers(tmp_path) as (port, process, log):
        connections = await spread(port)
        sessions: list[str] = []
        nodes: dict[str, Counter[str]] = {}
        failures: list[str] = []

        async def open_sessions(connection: Connection) -> None:
            while len(sessions) < SESSIONS:
                sessions.append("")
                index = len(sessions) - 1
                sessions[index] = (await connection.post(opening())).headers["mcp-session-id"]
                initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
                assert (await connection.post(initialized, sessions[index])).status == 202

        async def use(number: int) -> None:
            for request in range(number, REQUESTS, CONNECTIONS):
                # Every connection goes through all sessions, each beginning with another one.
                session = sessions[(request // CONNECTIONS + number * 7) % SESSIONS]
                text = secrets.token_hex(4)
                response = await connections[number].post(call("echo", request, text=text), session)
                nodes.setdefault(session, Counter())[response.headers["nonstick-node"]] += 1
                if response.status != 200 or _text(response) != (request, text):
                    failures.append(f"{request}: {response.status} {response.body[:200]!r}")

        await asyncio.gather(*(open_sessions(connection) for connection in connections))
        await asyncio.gather(*(use(number) for number in range(CONNECTIONS)))
        await asyncio.gather(*(connection.close() for connection in connections))
        assert failures == []
        assert sum(sum(counter.values()) for counter in nodes.values()) == REQUESTS
        # Every session was served by every worker.
        assert len(nodes) == SESSIONS
        assert all(len(counter) == WORKERS for counter in nodes.values())
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() in (0, -signal.SIGTERM)
    assert "Traceback" not in log.read_text()


def _text(response: Response) -> tuple[int, str]:
    body = response.body
    if response.headers["content-type"].startswith("text/event-stream"):
        body = [line for line in body.splitlines() if line.startswith(b"data: {")][-1][6:]
    message = json.loads(body)
    return message["id"], message["result"]["content"][0]["text"]


@pytest.mark.skipif(sys.platform != "linux", reason="the name is one of Linux")
async def test_workers_without_shared_memory_are_warned(tmp_path: Path) -> None:
    """P1: a session that one of them opens is unknown to the others. One process alone is told nothing."""
    source = SERVER.replace("sqlite:///sessions.db", "memory:").replace(", node_header=True", "")
    async with workers(tmp_path, LOGGING + source, count=2) as (_, process, log):
        async with asyncio.timeout(DEADLINE):
            # The fence: both workers have started.
            while log.read_text().count("serves sessions of") < 2:
                assert process.returncode is None
                await asyncio.sleep(0.05)
        said = log.read_text()
        assert said.count("another worker of this server runs beside this one") == 1


LOGGING: Final = "import logging\n\nlogging.basicConfig(level=logging.INFO)\n"
DEADLINE: Final = 90.0


async def test_apps_in_one_process_are_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Each has a memory of its own, and says so in its URL; and one that serves anew is alone again."""
    for _ in range(2):
        one, other = (nonstick.app(MCPServer("x"), store="memory:") for _ in range(2))
        async with one.lifespan(), other.lifespan():
            pass
    assert "another worker" not in caplog.text
