"""The proxies' configurations in `deploy/`, as they stand, in front of three real nodes (P1, P3, P4, P8).

They need HAProxy and nginx: `apt-get install haproxy nginx-light`. CI has them; elsewhere they are skipped without.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
from mcp import Client
from mcp.client.context import ClientRequestContext
from mcp_types import ElicitRequestParams, ElicitResult

from nonstick.testing.cluster import HEADERS
from nonstick.testing.servers.valkey import free_port

pytestmark = pytest.mark.anyio

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
NODES: Final = ("node-1", "node-2", "node-3")
DEADLINE: Final = 120.0


class Site:
    """Three nodes of `deploy/server.py` and the proxy in front of them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ports = {name: free_port() for name in NODES}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def start_node(self, name: str) -> None:
        arguments = ["serve", str(DEPLOY / "server.py"), "--port", str(self.ports[name]), "--grace", "5"]
        env = {**os.environ, "NONSTICK_NODE": name, "NONSTICK_STORE": f"sqlite:///{self.home}/sessions.db"}
        self._start(name, [sys.executable, "-m", "nonstick", *arguments], env)

    def start_proxy(self, kind: str) -> None:
        if kind == "haproxy":
            command = ["haproxy", "-W", "-f", str(self._configured("haproxy.cfg"))]
        else:
            command = ["nginx", "-p", str(self.home), "-c", str(self._configured("nginx.conf"))]
            command += ["-g", f"daemon off; pid {self.home}/pid; error_log {self.home}/error.log;"]
        self._start(kind, command)

    def _configured(self, name: str) -> Path:
        """The file, with this machine's addresses in the place of a deployment's."""
        text = (DEPLOY / name).read_text()
        for node, port in self.ports.items():
            assert f"{node}:8000" in text
            text = text.replace(f"{node}:8000", f"127.0.0.1:{port}")
        text, found = re.subn(r"(bind |listen )\S*8080", rf"\g<1>127.0.0.1:{self.port}", text)
        assert found == 1
        if name == "nginx.conf":
            # Where a user other than root may write.
            folders = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            places = "".join(f"    {what}_temp_path {self.home}/{what};\n" for what in folders)
            text = text.replace("http {\n", f"http {{\n    access_log off;\n{places}", 1)
        path = self.home / name
        path.write_text(text)
        return path

    def _start(self, name: str, command: list[str], env: dict[str, str] | None = None) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.children[name] = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.home)

    def wait_until_ready(self) -> None:
        """Every node is, and the proxy reaches them all."""
        for port in self.ports.values():
            self._wait(f"http://127.0.0.1:{port}/readyz")
        self._wait(f"http://127.0.0.1:{self.port}/readyz")

    def _wait(self, url: str) -> None:
        limit = time.monotonic() + DEADLINE
        while True:
            try:
                if httpx2.get(url, timeout=DEADLINE).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            if time.monotonic() > limit:
                raise AssertionError(f"{url} was not ready:\n{self.logs()}")
            time.sleep(0.05)

    def stop_node(self, name: str) -> int:
        """SIGTERM, as a deployment does it; returns its exit status."""
        child = self.children.pop(name)
        child.send_signal(signal.SIGTERM)
        return child.wait(DEADLINE)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.home.glob("*.log"))

    def close(self) -> None:
        for child in self.children.values():
            child.terminate()
        for child in self.children.values():
            try:
                child.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@pytest.fixture(scope="module", params=["haproxy", "nginx"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed: apt-get install haproxy nginx-light")
    site = Site(tmp_path_factory.mktemp(request.param))
    try:
        for name in NODES:
            site.start_node(name)
        site.start_proxy(request.param)
        site.wait_until_ready()
        yield site
    finally:
        site.close()


async def where(client: Client) -> str:
    result = await client.call_tool("where", {})
    assert result.structured_content is not None
    return str(result.structured_content["result"])


async def test_one_sessions_requests_reach_all_nodes(site: Site) -> None:
    """P1. Without stickiness, in both modes of the official client."""
    for mode in ("legacy", "2026-07-28"):
        async with Client(site.url, mode=mode, read_timeout_seconds=DEADLINE) as client:
            # The balancers take the node with the fewest connections: several calls at once reach all of them.
            async with asyncio.timeout(DEADLINE):
                seen: set[str] = set()
                while seen != set(NODES):
                    seen |= set(await asyncio.gather(*(where(client) for _ in range(6))))


async def test_question_passes_while_the_call_runs(site: Site) -> None:
    """P3, P4. A proxy that held events back until the response is whole would never show the question."""
    asked = 0

    async def answer(context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
        nonlocal asked
        asked += 1
        return ElicitResult(action="accept", content={"name": "Ada"})

    async with Client(site.url, mode="legacy", read_timeout_seconds=DEADLINE, elicitation_callback=answer) as client:
        results = await asyncio.gather(*(client.call_tool("greet", {}) for _ in range(6)))
        assert [result.structured_content for result in results] == [{"result": "Hello, Ada!"}] * 6
        assert asked == 6


async def test_open_stream_carries_all_nodes_events(site: Site) -> None:
    """P3. The standalone stream is open, and silent, before the first event."""
    async with httpx2.AsyncClient(timeout=DEADLINE, headers=HEADERS) as http:
        session = await opened(http, site.url)
        async with http.stream("GET", site.url, headers=session) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            # Primed: the connection is in place.
            assert (await anext(lines)).startswith("id:")
            params = {"name": "announce", "arguments": {}}
            messages = [{"jsonrpc": "2.0", "id": n, "method": "tools/call", "params": params} for n in range(1, 7)]
            said = await asyncio.gather(*(http.post(site.url, json=one, headers=session) for one in messages))
            assert all("announced" in response.text for response in said)
            events = [line async for line in first(6, lines)]
            assert all("notifications/tools/list_changed" in event for event in events)


async def first(count: int, lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """That many lines of data that are not empty."""
    while count:
        line = await anext(lines)
        if line.startswith("data:") and line != "data:" and line != "data: ":
            count -= 1
            yield line


async def opened(http: httpx2.AsyncClient, url: str) -> dict[str, str]:
    """The headers of a new session."""
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    response = await http.post(url, json={"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
    session = {"mcp-session-id": response.headers["mcp-session-id"], "mcp-protocol-version": "2025-11-25"}
    done = await http.post(url, json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=session)
    assert done.status_code == 202
    return session


async def test_session_survives_replacing_every_node(site: Site) -> None:
    """P8. No call fails, although every node is stopped once."""
    seen: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)

    async with Client(site.url, mode="legacy", read_timeout_seconds=DEADLINE) as client:
        for name in NODES:
            assert await asyncio.to_thread(site.stop_node, name) == 0
            for _ in range(4):
                assert await where(client) != name
            result: Any = await client.call_tool("count", {"to": 3, "pause": 0.01}, progress_callback=note)
            assert result.structured_content == {"result": "counted to 3"}
            site.start_node(name)
            await asyncio.to_thread(site.wait_until_ready)
    assert seen == [1, 2, 3] * 3
