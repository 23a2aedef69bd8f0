"""Several nodes in one process, each with its own store instance and a real port: for tests of what crosses nodes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx2
import uvicorn
from mcp.server import MCPServer, Server

from nonstick.app import App, app
from nonstick.core.settings import Options
from nonstick.store import Store

if TYPE_CHECKING:
    from fastmcp import FastMCP

__all__ = ["Cluster", "Member", "Session"]

HEADERS = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
_START_SECONDS = 120.0


class _Server(uvicorn.Server):
    """A uvicorn server that leaves the test runner's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Member:
    """One node: its app, its port, and a client that talks to it alone."""

    def __init__(self, name: str, application: App) -> None:
        self.name = name
        self.app = application
        # Named as TCP, asyncio turns off Nagle's algorithm on its connections, which would cost 40 ms a response.
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        config = uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=5)
        self.server = _Server(config)
        self.client = httpx2.AsyncClient(timeout=60, verify=False)  # loading certificates takes long, for nothing
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self.server.serve(sockets=[self._socket]))
        async with asyncio.timeout(_START_SECONDS):
            while not self.server.started:
                if self._task.done():
                    self._task.result()
                    raise RuntimeError(f"{self.name} did not start")
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """As on SIGTERM: drains, then closes."""
        await self.client.aclose()
        if self._task is not None:
            with contextlib.suppress(Exception):
                self.app.manager.begin_drain()
            self.server.should_exit = True
            await self._task
            self._task = None
        self._socket.close()

    async def post(self, message: Any, session: Session | None = None, **headers: str) -> httpx2.Response:
        """Posts a JSON-RPC message, as `session`, and reads the whole response."""
        own = {} if session is None else session.headers
        return await self.client.post(self.url, json=message, headers={**HEADERS, **own, **headers})

    def stream(self, method: str, session: Session, message: Any = None, **headers: str) -> Any:
        """An open response: `async with member.stream("GET", session) as response`."""
        return self.client.stream(method, self.url, json=message, headers={**HEADERS, **session.headers, **headers})

    async def delete(self, session: Session) -> httpx2.Response:
        return await self.client.delete(self.url, headers={**HEADERS, **session.headers})

    async def open(
        self,
        *,
        version: str = "2025-11-25",
        capabilities: dict[str, Any] | None = None,
        initialized: bool = True,
        **headers: str,
    ) -> Session:
        """A new session, opened on this node."""
        params = {
            "protocolVersion": version,
            "capabilities": capabilities or {},
            "clientInfo": {"name": "test", "version": "1"},
        }
        response = await self.post(
            {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}, None, **headers
        )
        assert response.status_code == 200, response.text
        session = Session(response.headers["mcp-session-id"], version, headers)
        if initialized:
            done = await self.post({"jsonrpc": "2.0", "method": "notifications/initialized"}, session)
            assert done.status_code == 202, done.text
        return session


class Session:
    """What a client keeps of a session."""

    def __init__(self, session_id: str, version: str, headers: dict[str, str]) -> None:
        self.id = session_id
        self.version = version
        self.headers = {**headers, "mcp-session-id": session_id, "mcp-protocol-version": version}


class Cluster:
    """Nodes `a`, `b`, `c` … of one server over one store.

    Args:
        server: Makes the MCP server, once for each node.
        store: Makes a store instance, or its URL, once for each node: all on the same data.
        nodes: How many.
        options: As for `nonstick.app`.
    """

    def __init__(
        self,
        server: Callable[[], MCPServer[Any] | Server[Any] | FastMCP[Any]],
        store: Callable[[], Store | str],
        *,
        nodes: int = 3,
        app_options: dict[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.members: list[Member] = []
        for index in range(nodes):
            name = chr(ord("a") + index)
            own: Options = {"node_name": name, "node_header": True, "grace": 2.0, **options}
            self.members.append(Member(name, app(server(), store=store(), **(app_options or {}), **own)))

    def __getitem__(self, index: int) -> Member:
        return self.members[index]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(member.start() for member in self.members))
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        await asyncio.gather(*(member.stop() for member in self.members))
