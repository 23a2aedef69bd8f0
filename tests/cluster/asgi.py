"""A client's side of requests to an app in this process, without a socket: for hundreds of cases a second."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message

from tests.cluster.sse import Sse

DEADLINE = 60.0
"""Seconds that a test waits for something before it fails."""


class Call:
    """One HTTP request under way."""

    def __init__(
        self, app: ASGIApp, method: str, headers: dict[str, str], message: Any = None, *, path: str = "/mcp"
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.last_id: str | None = None
        """Id of the last event that arrived."""
        self.messages: list[Any] = []
        """The JSON-RPC messages that arrived."""
        self.ids: list[str | None] = []
        """Of each message, its event's id."""
        self._request = b"" if message is None else json.dumps(message).encode()
        self._sent = False
        self._gone = asyncio.Event()
        self._changed = asyncio.Event()
        self._reads = asyncio.Event()
        self._reads.set()
        self._stuck = asyncio.Event()
        common = {"host": "127.0.0.1:80", "accept": "application/json, text/event-stream"}
        common |= {"content-type": "application/json"} if message is not None else {}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in {**common, **headers}.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        self._task = asyncio.create_task(self._run(app, scope))
        self._task.add_done_callback(lambda _: self._changed.set())

    async def _run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._request, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self._reads.is_set():
            self._stuck.set()
            await self._reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self._take(message.get("body", b""))
        self._changed.set()

    def _take(self, body: bytes) -> None:
        self.body += body
        if not self.streams:
            return
        *blocks, self.body = self.body.split(b"\r\n\r\n")
        for block in map(Sse.parse, map(bytes.decode, blocks)):
            self.last_id = block.id or self.last_id
            if block.data:
                self.messages.append(block.message)
                self.ids.append(block.id)

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def ended(self) -> bool:
        """Whether the response is whole."""
        return self._task.done()

    def json(self) -> Any:
        """The body of an answer that is no stream; None if it is empty."""
        return json.loads(self.body) if self.body else None

    async def until(self, condition: Any) -> bool:
        """Returns once this holds (True), or the response has ended without (False)."""
        async with asyncio.timeout(DEADLINE):
            while not condition():
                if self.ended:
                    # What the app raised, the test is to see.
                    self._task.result()
                    return bool(condition())
                self._changed.clear()
                await self._changed.wait()
        return True

    async def begun(self) -> None:
        """Returns once the response has begun."""
        assert await self.until(lambda: self.status), "no response"

    async def whole(self) -> None:
        """Returns once the response has ended."""
        await self.until(lambda: self.ended)

    def stop_reading(self) -> None:
        """From here on nothing is taken of what the app sends."""
        self._reads.clear()

    async def is_stuck(self) -> None:
        """Returns once the app waits for something to be taken."""
        async with asyncio.timeout(DEADLINE):
            await self._stuck.wait()

    def read_on(self) -> None:
        self._reads.set()

    def go(self) -> None:
        """The client goes."""
        self._gone.set()

    async def close(self) -> None:
        """The client goes, and the app has noticed."""
        self.go()
        async with asyncio.timeout(DEADLINE):
            await asyncio.wait([self._task])
