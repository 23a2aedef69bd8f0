"""A client that costs little: its own time is part of what is measured.

HTTP/1.1 written and read by hand, on connections that are kept. Only what the nodes send is understood.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

__all__ = ["Client", "text_of"]

_VERSION = "2025-11-25"
_LIMIT = 1 << 20
_IDLE_SECONDS = 2.0

Heard = Callable[[dict[str, Any]], None]


class _Connection:
    """One connection to a node."""

    def __init__(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._port = port
        self._reader = reader
        self._writer = writer
        self.session = ""
        """The session id in the latest answer."""
        self.used = 0.0
        """When it became idle."""

    @classmethod
    async def open(cls, port: int) -> _Connection:
        return cls(port, *await asyncio.open_connection("127.0.0.1", port, limit=_LIMIT))

    def send(self, method: str, session: str, body: bytes = b"") -> None:
        lines = [
            f"{method} /mcp HTTP/1.1",
            f"host: 127.0.0.1:{self._port}",
            "accept: application/json, text/event-stream",
            "content-type: application/json",
            f"content-length: {len(body)}",
        ]
        if session:
            lines += [f"mcp-session-id: {session}", f"mcp-protocol-version: {_VERSION}"]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def messages(self, started: Callable[[], None] | None = None) -> AsyncIterator[dict[str, Any]]:
        """The JSON-RPC messages in the answer, until it ends. `started` is called when it begins.

        Raises:
            RuntimeError: The status is not 200 or 202, or the node closed the connection.
        """
        status = int((await self._line()).split()[1])
        headers = {}
        while (line := await self._line()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        self.session = headers.get("mcp-session-id", "")
        if started is not None:
            started()
        if "content-length" in headers:
            body = await self._reader.readexactly(int(headers["content-length"]))
            if status not in (200, 202):
                raise RuntimeError(f"status {status}: {body.decode(errors='replace')}")
            if body:
                yield json.loads(body)
            return
        # A node writes whole events, and never one in several chunks.
        while size := int(await self._line(), 16):
            chunk = await self._reader.readexactly(size + 2)
            for text in chunk.split(b"\r\n"):
                if text.startswith(b"data: {"):
                    yield json.loads(text[6:])
        await self._line()

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        if not line:
            raise RuntimeError(f"the node on port {self._port} closed the connection in the middle of an answer")
        return line

    def close(self) -> None:
        self._writer.transport.abort()


class Client:
    """One session, on nodes that each call names by their port. An async context manager: the session is open within.

    Args:
        port: Where the session is opened.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._session = ""
        self._ids = itertools.count(1)
        self._idle: dict[int, list[_Connection]] = {}
        self._all: list[_Connection] = []

    async def __aenter__(self) -> Self:
        params = {
            "protocolVersion": _VERSION,
            "capabilities": {"elicitation": {}},
            "clientInfo": {"name": "bench", "version": "1"},
        }
        await self._post(self._port, {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
        await self.notify(self._port, "notifications/initialized")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            async with self._connected(self._port) as connection:
                connection.send("DELETE", self._session)
                async for _ in connection.messages():
                    pass
        for connection in self._all:
            connection.close()

    def next_id(self) -> int:
        return next(self._ids)

    async def call(
        self,
        port: int,
        tool: str,
        heard: Heard | None = None,
        *,
        started: Callable[[], None] | None = None,
        request_id: int = 0,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Calls a tool, and returns the whole response. `heard` gets what comes before it, after `started`."""
        request_id = request_id or self.next_id()
        params = {"name": tool, "arguments": arguments}
        message = {"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": params}
        return await self._post(port, message, heard, started)

    async def notify(self, port: int, method: str, **params: Any) -> int:
        """Sends a notification; returns when its sending began, once it is accepted."""
        return await self._send(port, lambda _: {"jsonrpc": "2.0", "method": method, "params": params})

    async def reply(self, port: int, request: dict[str, Any]) -> int:
        """Answers an elicitation with the time at which the answer's sending began."""

        def message(now: int) -> dict[str, Any]:
            result = {"action": "accept", "content": {"sent": now}}
            return {"jsonrpc": "2.0", "id": request["id"], "result": result}

        return await self._send(port, message)

    async def listen(self, port: int, heard: Heard) -> None:
        """Reads the standalone stream for as long as it lasts."""
        async with self._connected(port) as connection:
            connection.send("GET", self._session)
            async for message in connection.messages():
                heard(message)

    async def _send(self, port: int, message: Callable[[int], dict[str, Any]]) -> int:
        async with self._connected(port) as connection:
            now = time.monotonic_ns()
            connection.send("POST", self._session, json.dumps(message(now)).encode())
            async for _ in connection.messages():
                pass
        return now

    async def _post(
        self,
        port: int,
        message: dict[str, Any],
        heard: Heard | None = None,
        started: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        async with self._connected(port) as connection:
            connection.send("POST", self._session, json.dumps(message).encode())
            response: dict[str, Any] | None = None
            async for heard_now in connection.messages(started):
                if "method" not in heard_now:
                    response = heard_now
                elif heard is not None:
                    heard(heard_now)
            self._session = connection.session or self._session
        if response is None:
            raise RuntimeError(f"{message['method']} ended without a response")
        return response

    @contextlib.asynccontextmanager
    async def _connected(self, port: int) -> AsyncIterator[_Connection]:
        """A connection of this client's own until it is left; kept for the next one if all went well."""
        idle = self._idle.setdefault(port, [])
        connection = idle.pop() if idle else None
        # uvicorn closes a connection that was idle for 5 s, and those below it were idle for longer.
        if connection is None or time.monotonic() - connection.used > _IDLE_SECONDS:
            idle.clear()
            connection = await _Connection.open(port)
            self._all.append(connection)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        connection.used = time.monotonic()
        idle.append(connection)


def text_of(response: dict[str, Any]) -> str:
    """The text that a tool answered.

    Raises:
        RuntimeError: It answered with an error.
    """
    result = response.get("result")
    if result is None or result.get("isError"):
        raise RuntimeError(f"a tool failed: {response}")
    text: str = result["content"][0]["text"]
    return text
