"""Hosts that stop, with a signal or without one: open streams are handed over, the process is gone in time (P8)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx2
import hypercorn.asyncio
import hypercorn.config
import pytest
import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

import nonstick
from nonstick.app import App
from nonstick.errors import NotRunning
from nonstick.protocols import Draining
from nonstick.protocols.draining import DrainingH11
from nonstick.testing.cluster import HEADERS, Member, Session
from nonstick.testing.servers.valkey import ReservedPort
from tests.cluster.sse import DEADLINE, getting, posting
from tests.cluster.stage import call, eventually, text_of
from tests.pace import in_time

pytestmark = pytest.mark.anyio

GRACE: Final = 1.0
GONE: Final = GRACE + 2.0
"""Seconds after the signal within which the process has ended."""
START: Final = 60.0
"""Seconds that a host may take to listen: it imports everything first, maybe on a busy machine."""

SERVER: Final = """
import asyncio, os, time
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
import nonstick

mcp = MCPServer("stops")

@mcp.tool()
async def talk(ctx: Context, steps: int, pause: float) -> str:
    for step in range(steps):
        await ctx.report_progress(step)
        await asyncio.sleep(pause)
    return "done"

@mcp.tool()
async def stubborn(ctx: Context) -> str:
    await ctx.report_progress(0)
    ends_at = time.monotonic() + 60
    while time.monotonic() < ends_at:
        try:
            await asyncio.sleep(60)
        except BaseException:
            pass
    return "done"

@mcp.tool()
def blocking() -> str:
    time.sleep(60)
    return "done"

@mcp.tool()
async def flood(ctx: Context) -> str:
    while True:
        await ctx.report_progress(0, message="x" * 500_000)

app = nonstick.app(mcp, store=os.environ["NONSTICK_STORE"], grace=float(os.environ["GRACE"]), window=0.05)
"""


class Process:
    """A host's command as a child process, on a port of its own. Talked to as a node of the tests' own process is."""

    def __init__(self, home: Path, *command: str, name: str) -> None:
        (home / "stops.py").write_text(SERVER)
        self.name = name
        self._reserved = ReservedPort()
        self.port = self._reserved.port
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self.client = httpx2.AsyncClient(timeout=30)
        self._child = subprocess.Popen(
            [sys.executable, "-m", *(part.format(port=self.port) for part in command)],
            cwd=home,
            env=os.environ
            | {"NONSTICK_STORE": f"sqlite:///{home}/sessions.db", "GRACE": str(GRACE), "PYTHONPATH": str(home)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    async def started(self) -> None:
        async def listens() -> bool:
            assert self._child.poll() is None
            try:
                await self.client.get(self.url)
            except httpx2.TransportError:
                return False
            return True

        async with asyncio.timeout(START):
            while not await listens():  # noqa: ASYNC110 - a process sets no event
                await asyncio.sleep(0.02)

    async def stop(self, seconds: float) -> float:
        """SIGTERM. How long it took to end, which must be less than this."""
        began = time.monotonic()
        self._child.send_signal(signal.SIGTERM)
        async with asyncio.timeout(2 * DEADLINE):
            while self._child.poll() is None:  # noqa: ASYNC110 - a process sets no event
                await asyncio.sleep(0.01)
        took = time.monotonic() - began
        assert in_time(took, seconds), took
        return took

    async def clean(self) -> None:
        await self.client.aclose()
        # With the processes that it started, which a SIGKILL of it alone would leave behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    post = Member.post
    stream = Member.stream
    open = Member.open


@asynccontextmanager
async def running(home: Path, *command: str, name: str) -> AsyncIterator[Any]:
    process = Process(home, *command, name=name)
    try:
        await process.started()
        yield process
    finally:
        await process.clean()


SERVED: Final = (
    "nonstick",
    "serve",
    "stops.py:mcp",
    "--grace",
    str(GRACE),
    "--port",
    "{port}",
    "--log-level",
    "warning",
)
BY_UVICORN: Final = ("uvicorn", "stops:app", "--port", "{port}", "--log-level", "warning")
DRAINING: Final = (*BY_UVICORN, "--http", "nonstick.protocols:Draining")


def stepping(steps: int, pause: float) -> dict[str, Any]:
    return call("talk", f"talk {steps}", {"progressToken": "t"}, steps=steps, pause=pause)


async def sending(process: Process, session: Session, message: Any, *, whole: bool) -> asyncio.StreamWriter:
    """A POST that is sent in part, or whose answer nobody reads."""
    _, writer = await asyncio.open_connection("127.0.0.1", process.port)
    body = json.dumps(message).encode()
    named = {**HEADERS, **session.headers, "content-length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    writer.write(f"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:{process.port}\r\n{lines}\r\n".encode())
    writer.write(body if whole else body[:10])
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await writer.drain()
    return writer


@pytest.mark.parametrize("command", [SERVED, DRAINING], ids=["nonstick serve", "uvicorn"])
async def test_process_is_always_gone_in_time(tmp_path: Path, command: tuple[str, ...]) -> None:
    """P8: half-sent requests, clients that do not read, handlers that do not stop or block a thread, open streams."""
    async with running(tmp_path, *command, name="a") as a:
        session = await a.open()
        async with getting(a, session) as listening, posting(a, session, stepping(1000, 0.05)) as talking:
            await listening.event()
            await talking.event()
            names = ("stubborn", "blocking")
            begun = [posting(a, session, call(name, name, {"progressToken": name})) for name in names]
            stuck = [await one.__aenter__() for one in begun]
            half = await sending(a, session, call("talk", "half"), whole=False)
            unread = await sending(a, session, call("flood", "flood", {"progressToken": "f"}), whole=True)
            for stream in stuck:
                await stream.event()
            took = await a.stop(GONE)
            print(f"gone {took:.2f} s after SIGTERM, with a grace of {GRACE:g} s")
            assert (await listening.events())[-1].retry == 1000
            assert text_of((await talking.rest())[-1]).endswith("was shut down before it finished")
            for one, stream in zip(begun, stuck, strict=True):
                assert text_of(await stream.outcome()).endswith("was shut down before it finished")
                await one.__aexit__(None, None, None)
            for writer in (half, unread):
                writer.transport.abort()


@pytest.mark.slow
async def test_worker_processes_end_in_time(tmp_path: Path) -> None:
    """P8."""
    async with running(tmp_path, *SERVED, "--workers", "2", name="a") as a:
        session = await a.open()
        async with getting(a, session) as listening, posting(a, session, call("blocking", 1)) as blocking:
            await listening.event()
            await blocking.event()
            took = await a.stop(DEADLINE)  # the handler blocks its thread for a minute
            print(f"gone {took:.2f} s after SIGTERM, with a grace of {GRACE:g} s")
            assert (await listening.events())[-1].retry == 1000


# ---- stops without a signal


class Doors:
    """An app with a tool that waits for the test."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        server = MCPServer[Any]("doors")

        @server.tool()
        async def wait(ctx: Context[Any, Any]) -> str:
            await ctx.report_progress(0)
            await self.may_end.wait()
            return "done"

        self.app = nonstick.app(server, store="memory:", grace=DEADLINE, window=0.05)


@asynccontextmanager
async def hosted(
    app: App, serve: Callable[[socket.socket], Coroutine[Any, Any, None]]
) -> AsyncIterator[tuple[Any, asyncio.Task[None]]]:
    """What talks to the app, and the task that ends when its host has."""
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    # The app may be ready before its host listens.
    listener.listen()
    member: Any = Member("a", app)
    member.port = listener.getsockname()[1]
    member.url = f"http://127.0.0.1:{member.port}/mcp"
    host = asyncio.create_task(serve(listener))
    try:
        await eventually(lambda: app.manager._node is not None)
        yield member, host
        async with asyncio.timeout(DEADLINE):
            await host
    finally:
        host.cancel()
        await member.stop()


async def open_streams_are_handed_over_and_requests_finish(
    doors: Doors, member: Any, stop: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    session = await member.open()
    async with getting(member, session) as listening, posting(member, session, call("wait", 1)) as waiting:
        await listening.event()
        await waiting.event()
        await stop()
        assert (await listening.events())[-1].retry == 1000
        doors.may_end.set()
        assert text_of(await waiting.outcome()) == "done"


@pytest.mark.parametrize("protocol", [Draining, DrainingH11])
async def test_uvicorn_told_to_exit_drains(protocol: Any) -> None:
    """P8: with a protocol of nonstick's, as under `nonstick serve`. Else it would wait for the open streams."""
    doors = Doors()
    server = uvicorn.Server(uvicorn.Config(doors.app, http=protocol, log_level="error"))
    async with hosted(doors.app, lambda listener: server.serve([listener])) as (member, _):

        async def stop() -> None:
            server.should_exit = True

        await open_streams_are_handed_over_and_requests_finish(doors, member, stop)


async def test_uvicorn_at_its_request_limit_drains() -> None:
    """P8: `--limit-max-requests`."""
    doors = Doors()
    config = uvicorn.Config(doors.app, http=Draining, log_level="error", limit_max_requests=4)
    async with hosted(doors.app, lambda listener: uvicorn.Server(config).serve([listener])) as (member, _):

        async def stop() -> None:
            # `initialize` and `initialized` were two; streams do not count until they have ended.
            for _ in range(2):
                await member.post({"jsonrpc": "2.0", "method": "notifications/x"})

        await open_streams_are_handed_over_and_requests_finish(doors, member, stop)


async def test_uvicorn_of_any_protocol_drains() -> None:
    """P8: what docs/stopping says to call."""
    doors = Doors()
    server = uvicorn.Server(uvicorn.Config(doors.app, log_level="error"))
    async with hosted(doors.app, lambda listener: server.serve([listener])) as (member, _):

        async def stop() -> None:
            doors.app.begin_drain()
            server.should_exit = True

        await open_streams_are_handed_over_and_requests_finish(doors, member, stop)


async def test_hypercorn_drains_by_its_trigger() -> None:
    """P8: as docs/stopping shows."""
    doors, stopping = Doors(), asyncio.Event()

    async def told_to_stop() -> None:
        await stopping.wait()
        doors.app.begin_drain()

    async def serve(listener: socket.socket) -> None:
        config = hypercorn.config.Config()
        config.bind = [f"fd://{listener.detach()}"]
        config.graceful_timeout = DEADLINE
        config.errorlog = None
        app: Any = doors.app
        await hypercorn.asyncio.serve(app, config, shutdown_trigger=told_to_stop)

    async with hosted(doors.app, serve) as (member, _):

        async def stop() -> None:
            stopping.set()

        await open_streams_are_handed_over_and_requests_finish(doors, member, stop)


@pytest.mark.slow
async def test_hypercorn_without_signals_drains_late(tmp_path: Path) -> None:
    """P8: connections are cut by hypercorn; what runs may finish, for a client that goes on elsewhere."""
    command = ("hypercorn", "stops:app", "--bind", "127.0.0.1:{port}", "--graceful-timeout", "1")
    async with running(tmp_path, *command, name="a") as a, running(tmp_path, *BY_UVICORN, name="b") as b:
        session = await a.open()
        async with posting(a, session, stepping(8, 0.1)) as stream:
            last = (await stream.event()).id
            await a.stop(DEADLINE)
        async with getting(b, session, last) as resumed:
            assert text_of((await resumed.rest())[-1]) == "done"


def test_stopped_app_cannot_be_drained() -> None:
    app = nonstick.app(MCPServer("any"), store="memory:")
    with pytest.raises(NotRunning):
        app.begin_drain()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("hypercorn", "stops:app", "--workers", "0", "--bind", "127.0.0.1:{port}", "--graceful-timeout", "30"),
        ("gunicorn", "stops:app", "--worker-class", "asgi", "--bind", "127.0.0.1:{port}"),
    ],
    ids=["hypercorn", "gunicorn"],
)
async def test_hosts_signal_handlers_are_chained(tmp_path: Path, command: tuple[str, ...]) -> None:
    """P8: their handlers are chained, whichever way they are set up."""
    async with running(tmp_path, *command, name="a") as a:
        session = await a.open()
        async with getting(a, session) as listening, posting(a, session, stepping(4, 0.1)) as talking:
            await listening.event()
            await talking.event()
            await a.stop(DEADLINE)
            assert (await listening.events())[-1].retry == 1000
            assert text_of((await talking.rest())[-1]) == "done"
