"""Load: HTTP/1.1 by hand on connections that are kept, so that the client is never what is waited for."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

from bench.opponents import Speaks

__all__ = ["Load", "Wire", "Worker", "get", "runner"]

VERSION: Final = "2025-11-25"
MODERN: Final = "2026-07-28"
_META: Final = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientInfo": {"name": "bench", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
_INITIALIZE: Final = {
    "protocolVersion": VERSION,
    "capabilities": {},
    "clientInfo": {"name": "bench", "version": "1"},
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP response, whole."""

    status: int
    head: bytes
    body: bytes

    @property
    def session(self) -> str:
        """The session id in its headers, or ""."""
        for line in self.head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"mcp-session-id":
                return value.strip().decode()
        return ""


class Wire(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._waiting: asyncio.Future[Answer] | None = None

    @classmethod
    async def open(cls, port: int) -> Wire:
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(cls, "127.0.0.1", port)
        return wire

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error or ConnectionError("the server closed the connection"))

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        """Sends it; the answer is whole when the future is done."""
        assert self._transport is not None
        if self._transport.is_closing():
            raise ConnectionError("the server has closed the connection")
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._waiting

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        low = head.lower()
        at = low.find(b"\r\ncontent-length:")
        if at >= 0:
            size = int(low[at + 17 :].split(b"\r\n", 1)[0])
            if len(body) < size:
                return
        elif b"\r\ntransfer-encoding: chunked" in low and not body.endswith(b"0\r\n\r\n"):
            return
        self._buffer = b""
        assert self._waiting is not None
        if not self._waiting.done():
            self._waiting.set_result(Answer(int(head[9:12]), head, body))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Worker:
    """One client: a connection to each node, used in turn, and a session if there are sessions."""

    def __init__(self, ports: Sequence[int], speaks: Speaks) -> None:
        self._ports = ports
        self._speaks = speaks
        self._wires: list[Wire] = []
        self._turn = itertools.count()
        self._ids = itertools.count(1)
        self.session = ""

    async def open(self) -> None:
        """Connects; does not open a session yet."""
        self._wires = [await Wire.open(port) for port in self._ports]

    async def reconnect(self) -> None:
        """Opens the connections again that the server has closed meanwhile: some servers wait for seconds only."""
        self._wires = [
            wire if wire.is_open else await Wire.open(port) for wire, port in zip(self._wires, self._ports, strict=True)
        ]

    async def initialize(self) -> None:
        """Opens a session, if this era has them."""
        if self._speaks != "sessions":
            return
        await self.introduce()
        await self.confirm()

    async def introduce(self) -> None:
        """The first half of opening a session: returns with the answer to `initialize`."""
        self.session = ""
        answer = await self._send({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": _INITIALIZE})
        self.session = answer.session
        if not self.session:
            raise RuntimeError("initialize opened no session")

    async def confirm(self) -> None:
        """The second half."""
        await self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    async def call(self, tool: str, arguments: dict[str, Any]) -> Answer:
        """Calls a tool; returns the whole answer."""
        params: dict[str, Any] = {"name": tool, "arguments": arguments}
        number = next(self._ids)
        meta: dict[str, Any] = dict(_META) if self._speaks == "modern" else {}
        if tool == "progress":
            meta["progressToken"] = number
        if meta:
            params["_meta"] = meta
        return await self._send({"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}, tool)

    async def _send(self, message: dict[str, Any], tool: str = "") -> Answer:
        return await self.send(self.request(json.dumps(message).encode(), tool))

    async def send(self, request: bytes) -> Answer:
        """Sends these bytes; returns the whole answer.

        Raises:
            RuntimeError: It is an error.
        """
        wire = self._wires[next(self._turn) % len(self._wires)]
        answer = await wire.ask(request)
        if answer.status not in (200, 202) or b'"error"' in answer.body or b'"isError":true' in answer.body:
            raise RuntimeError(f"status {answer.status}: {answer.body[:500].decode(errors='replace')}")
        return answer

    def request(self, body: bytes, tool: str = "") -> bytes:
        """The bytes of a POST."""
        lines = [
            "POST /mcp HTTP/1.1",
            "host: 127.0.0.1:80",
            "accept: application/json, text/event-stream",
            "content-type: application/json",
            f"content-length: {len(body)}",
        ]
        if self._speaks == "modern":
            lines += [f"mcp-protocol-version: {MODERN}", "mcp-method: tools/call", f"mcp-name: {tool}"]
        elif self.session:
            lines += [f"mcp-session-id: {self.session}", f"mcp-protocol-version: {VERSION}"]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def close(self) -> None:
        for wire in self._wires:
            wire.close()


class Load:
    """Workers that all do the same, each one request after the other."""

    def __init__(self, ports: Sequence[int], speaks: Speaks, connections: int) -> None:
        self._workers = [Worker(_rotated(ports, n), speaks) for n in range(connections)]

    async def open(self) -> None:
        for worker in self._workers:
            await worker.open()
            await worker.initialize()

    async def run(self, requests: int, tool: str, arguments: dict[str, Any]) -> list[float]:
        """So many calls in all; returns how long each took, in seconds."""
        share = max(1, requests // len(self._workers))
        took: list[float] = []

        async def work(worker: Worker) -> None:
            for _ in range(share):
                begun = time.perf_counter()
                if tool == "initialize":
                    await worker.initialize()
                else:
                    await worker.call(tool, arguments)
                took.append(time.perf_counter() - begun)

        for worker in self._workers:
            await worker.reconnect()
        await asyncio.gather(*map(work, self._workers))
        return took

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def _rotated(ports: Sequence[int], by: int) -> list[int]:
    """Each worker begins at another node."""
    by %= len(ports)
    return [*ports[by:], *ports[:by]]


def get(session: str, after: str = "") -> bytes:
    """The bytes of a GET, which resumes after this event id if there is one."""
    lines = [
        "GET /mcp HTTP/1.1",
        "host: 127.0.0.1:80",
        "accept: text/event-stream",
        f"mcp-session-id: {session}",
        f"mcp-protocol-version: {VERSION}",
        *([f"last-event-id: {after}"] if after else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def runner() -> asyncio.Runner:
    """With the event loop that the nodes run on: uvicorn takes uvloop where it is installed."""
    if find_spec("uvloop") is None:
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)
