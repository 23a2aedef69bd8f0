"""What the acts of `nonstick demo` play on: node processes, a client behind the balancer, and a narrator."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx2
from mcp import Client
from mcp.client.session import ElicitationFnT
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, Implementation, TextContent

from nonstick.commands.log_format import wants_colour
from nonstick.core.event_ids import parse_event_id
from nonstick.store import STANDALONE
from nonstick.testing.servers.balancer import Backend, Balancer, Exchange
from nonstick.testing.servers.valkey import DIE_WITH_PARENT, ReservedPort

__all__ = ["CLIENT_NAME", "LEASE", "DemoNode", "DemoNodes", "Narrator", "Problem", "Stage", "served", "text_of", "what"]

CLIENT_NAME: Final = "demo-client"

LEASE: Final = 2.0
"""Seconds after which a node that is not heard of counts as dead: less than usual, so that nobody has to wait long."""

_START_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.05
_CALL_SECONDS: Final = 15.0
_STOP_SECONDS: Final = 4.0
_LOG_LINES: Final = 15


class Problem(Exception):
    """Something is not as it must be. The message says what."""


# ---- telling


class Narrator:
    """Writes the story to stdout, in colour on a terminal."""

    _HUES: Final = (36, 33, 35, 34, 32, 96, 93, 95, 94)

    def __init__(self) -> None:
        self._colour = wants_colour(sys.stdout, os.environ)

    def line(self, text: str = "") -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def title(self, text: str) -> None:
        self.line()
        self.line(self._paint(text, "1"))

    def aside(self, text: str) -> None:
        """A remark below what it is about."""
        self.line(self._paint(f"      {text}", "2"))

    def event(self, text: str) -> None:
        """Something that happens to the nodes."""
        self.line(self._paint(f"   *  {text}", "1;31"))

    def exchange(self, exchange: Exchange, *, bad: bool) -> None:
        """One line: what was asked, who answered, and how."""
        status = self._paint(str(exchange.status), "31" if bad else "32")
        kind = {"application/json": "json", "text/event-stream": "sse"}.get(exchange.content_type, "")
        if exchange.status != 200 or exchange.method == "DELETE":
            kind = ""  # the type of a body that says nothing
        node = self._paint(f"{exchange.backend or 'no node':<7}", str(self._hue(exchange.backend)))
        self.line(f"   {what(exchange):<28} -> {node} {status} {kind:<4} {exchange.first * 1000:5.0f} ms")

    def verdict(self, good: bool, text: str) -> None:
        self.line()
        self.line(f"{self._paint('PASS' if good else 'FAIL', '1;32' if good else '1;31')}  {text}")

    def _hue(self, node: str) -> int:
        return self._HUES[(ord(node[-1]) - ord("a")) % len(self._HUES)] if node else 31

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def what(exchange: Exchange) -> str:
    """What was asked, in a few words."""
    if exchange.method == "GET":
        return "GET (rest of a call)" if _resumes_a_call(exchange) else "GET (stream)"
    if exchange.rpc is None:
        return exchange.method
    params = (exchange.message or {}).get("params")
    if exchange.rpc == "tools/call" and isinstance(params, dict):
        return f"tools/call {params.get('name')}"
    return {"response": "reply"}.get(exchange.rpc, exchange.rpc)


def _resumes_a_call(exchange: Exchange) -> bool:
    """Whether it asks for the rest of a POST's stream, and not for the session's standalone one."""
    headers = exchange.request_headers
    place = parse_event_id(headers.get("last-event-id", ""), headers.get("mcp-session-id", ""))
    return place is not None and place.stream != STANDALONE


# ---- the nodes


class DemoNode:
    """One process that serves the demo's server."""

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self._reserved = ReservedPort()
        self.port = self._reserved.port
        self.log = home / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, store: str, *, sdk: bool) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "nonstick.commands.demo.server:sdk_app"]
        if not sdk:
            options = ["--grace", "2", "--lease", str(LEASE)]
            command = [sys.executable, "-m", "nonstick", "serve", "nonstick.commands.demo.server:mcp", *options]
        if sys.platform == "linux":
            command = [sys.executable, "-ISc", DIE_WITH_PARENT, *command]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own interpreter)
                [*command, "--port", str(self.port)],
                env=os.environ | {"NONSTICK_NODE": self.name, "NONSTICK_STORE": store},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def ready(self, http: httpx2.AsyncClient, path: str) -> None:
        """Returns once the node answers on `path` with a status below 500.

        Raises:
            Problem: The node ended, or did not get ready in time.
        """
        why = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_SECONDS):
                while self.running:
                    try:
                        answer = await http.get(f"http://127.0.0.1:{self.port}{path}")
                        if answer.status_code < 500:
                            return
                        why = f" ({answer.text.strip()[:200]})"
                    except httpx2.TransportError:
                        pass
                    await asyncio.sleep(_POLL_SECONDS)
        state = "did not get ready in time" if self.running else "ended at its start"
        raise Problem(f"{self.name} {state}{why}\n{self.tail()}")

    def signal(self, signum: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signum)

    def wait(self, seconds: float) -> bool:
        """Waits for the end of the node's process, which may never have been started. Whether it ended in time."""
        if self._process is None:
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def tail(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"   {self.name}'s log ends with:", *(f"   | {line}" for line in lines[-_LOG_LINES:])])


class DemoNodes:
    """The nodes: all ready once entered, all gone once left, however that happens."""

    def __init__(self, home: Path, store: str, size: int, *, sdk: bool) -> None:
        self.sdk = sdk
        self.members = [DemoNode(f"node-{letter}", home) for letter in "abcdefghi"[:size]]
        self._store = store

    @property
    def backends(self) -> list[Backend]:
        return [Backend(node.name, node.port) for node in self.members]

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    async def start(self) -> None:
        """Starts the nodes that do not run, and returns when all are ready.

        Raises:
            Problem: As `DemoNode.ready`.
        """
        idle = [node for node in self.members if not node.running]
        for node in idle:
            node.start(self._store, sdk=self.sdk)
        async with httpx2.AsyncClient(timeout=_START_SECONDS) as http:
            for node in idle:
                await node.ready(http, "/" if self.sdk else "/readyz")

    def kill(self, name: str) -> None:
        """SIGKILL, and returns when the process is gone."""
        (node,) = [node for node in self.members if node.name == name]
        node.signal(signal.SIGKILL)
        node.wait(_STOP_SECONDS)

    def running(self, name: str) -> bool:
        return any(node.running for node in self.members if node.name == name)

    def _stop(self) -> None:
        for node in self.members:
            node.signal(signal.SIGTERM)
        for node in self.members:
            if not node.wait(_STOP_SECONDS):
                node.signal(signal.SIGKILL)
                node.wait(_STOP_SECONDS)


# ---- the stage


class Stage:
    """What an act has in hand: the narrator, the nodes, and, once entered, a balancer in front of them."""

    def __init__(self, tell: Narrator, nodes: DemoNodes) -> None:
        self.tell = tell
        self.nodes = nodes
        self.exchanges: list[Exchange] = []
        self.progress = 0
        self.killed: list[str] = []
        self.cuts = 0
        self.unexpected: list[str] = []
        self._expected = 0
        self._balancer = Balancer(nodes.backends, observe=self._saw)
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._balancer.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._balancer.__aexit__(kind, error, trace)

    @property
    def url(self) -> str:
        return f"{self._balancer.url}/mcp"

    @contextlib.asynccontextmanager
    async def client(self, elicitation: ElicitationFnT | None = None) -> AsyncIterator[Client]:
        """A client with a session of its own, which it ends when it is left; ready when its GET stream is answered."""
        before = len(self.streams())
        transport = streamable_http_client(self.url)
        async with Client(
            transport,
            mode="legacy",  # a client of 2026-07-28 has no session: there would be nothing to show
            read_timeout_seconds=_CALL_SECONDS,
            client_info=Implementation(name=CLIENT_NAME, version="1"),
            elicitation_callback=elicitation,
        ) as client:
            await self.until(lambda: len(self.streams()) > before)
            yield client

    def session_id(self) -> str:
        """Of the session that was opened last."""
        return self.last("initialize").response_headers.get("mcp-session-id", "")

    def last(self, rpc: str) -> Exchange:
        """The latest exchange with this method."""
        return next(exchange for exchange in reversed(self.exchanges) if exchange.rpc == rpc)

    def streams(self) -> list[Exchange]:
        """The GETs of standalone streams so far."""
        return [exchange for exchange in self.exchanges if what(exchange) == "GET (stream)"]

    def carriers(self) -> list[Exchange]:
        """What the latest call is answered through: its POST, and the GETs that went on with its stream."""
        carriers: list[Exchange] = []
        for exchange in reversed(self.exchanges):
            if exchange.rpc == "tools/call" or _resumes_a_call(exchange):
                carriers.insert(0, exchange)
            if exchange.rpc == "tools/call":
                break
        return carriers

    async def ping(self, session_id: str) -> int:
        """The status of a ping in this session, sent without the client."""
        headers = {"mcp-session-id": session_id, "accept": "application/json, text/event-stream"}
        message = {"jsonrpc": "2.0", "id": "after-the-end", "method": "ping"}
        async with httpx2.AsyncClient(timeout=_CALL_SECONDS) as http:
            return (await http.post(self.url, json=message, headers=headers)).status_code

    def kill(self, name: str) -> None:
        """SIGKILL for a node; the balancer is not told."""
        self.tell.event(f"kill -9 {name}")
        self.nodes.kill(name)
        self.killed.append(name)

    async def restart(self) -> None:
        """Starts the nodes again that were killed."""
        for node in self.nodes.members:
            if not node.running:
                self.tell.event(f"{node.name} is started again")
        await self.nodes.start()

    def cut(self, exchange: Exchange) -> None:
        """Cuts the connection that carries this exchange."""
        self.tell.event(f"the client's connection to {exchange.backend} is cut")
        self.cuts += 1
        self._balancer.cut(exchange)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once an exchange has made this true."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    @contextlib.contextmanager
    def expecting(self, status: int) -> Iterator[None]:
        """Within, this status is as it must be."""
        self._expected = status
        try:
            yield
        finally:
            self._expected = 0

    def _saw(self, exchange: Exchange) -> None:
        bad = exchange.status >= 400 and exchange.status != self._expected
        if exchange.total is None or not exchange.backend:
            self.exchanges.append(exchange)
            self.tell.exchange(exchange, bad=bad)
            if bad:
                self.unexpected.append(f"{what(exchange)} got {exchange.status} from {exchange.backend or 'no node'}")
        elif not exchange.complete and not self.nodes.running(exchange.backend):
            self.tell.aside(f"{what(exchange)} of {exchange.backend} is cut off")
        self._changed.set()


def text_of(result: CallToolResult) -> str:
    """The text that a tool answered.

    Raises:
        Problem: The tool answered with an error.
    """
    text = " ".join(block.text for block in result.content if isinstance(block, TextContent))
    if result.is_error:
        raise Problem(f"a tool failed: {text}")
    return text


def served(exchanges: list[Exchange]) -> str:
    """How many requests each node served."""
    counts = Counter(exchange.backend for exchange in exchanges if exchange.backend)
    return ", ".join(f"{node} {count}" for node, count in sorted(counts.items()))
