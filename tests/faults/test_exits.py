"""A handler that tells its process to exit: as SIGTERM would, and with the status that it said (P8, P16)."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests.cluster.test_cli import Start, home, initialize, start
from tests.faults.client import error_of
from tests.faults.stage import Stage, gone_in

pytestmark = pytest.mark.anyio

__all__ = ["home", "start"]

GRACE = 3.0
TOLD = {"reason": "server_exit", "retrySafe": False}


@pytest.mark.parametrize(
    ("loop", "thread"),
    [
        pytest.param("uvloop", False, id="in the loop"),
        pytest.param("asyncio", True, id="in a thread, without uvloop", marks=pytest.mark.slow),
    ],
)
async def test_exit_is_told_once_and_waits(stage: Stage, loop: str, thread: bool) -> None:
    """P8, P16: others finish or are handed over; the process ends with the status; the end is read on another node."""
    a, b = await stage.start(2, grace=GRACE, env={"UVICORN_LOOP": loop})
    client = stage.client(nodes=[a])
    await client.open()
    client.listen()
    count = client.call("count", steps=10, pause=0.1)
    waiting = client.call("wait", seconds=1.0)
    await count.started.wait()
    await stage.recorded(waiting.label, "start")
    leave = client.call("leave", status=7, thread=thread)
    await leave.started.wait()
    client.targets = [b]
    assert error_of(await leave.end()) == TOLD
    assert "result" in (await count.end() or {})
    assert "result" in (await waiting.end() or {})
    assert await gone_in(a, GRACE + 2.0), a.written
    assert a.status == 7, a.written
    await client.replay(leave)
    assert await client.ping(b) == 200
    assert await client.catch_up()
    assert stage.judge() == []


async def test_exit_before_first_message_is_told(stage: Stage) -> None:
    """P16: the plain answer reaches its client before the process is gone."""
    (a,) = await stage.start(1, grace=GRACE)
    client = stage.client()
    await client.open()
    leave = client.call("leave", status=9, silent=True)
    assert error_of(await leave.end()) == TOLD
    assert await gone_in(a, GRACE + 2.0), a.written
    assert a.status == 9, a.written


EXITING = """
import asyncio
import sys

from mcp.server import MCPServer
from mcp.server.mcpserver import Context

mcp = MCPServer("exiting")


@mcp.tool()
async def leave(status: int) -> str:
    sys.exit(status)


@mcp.tool()
async def stubborn(ctx: Context) -> str:
    await ctx.report_progress(0.5)
    while True:
        try:
            await asyncio.sleep(60)
        except BaseException:
            pass


@mcp.tool()
async def interrupt() -> str:
    raise KeyboardInterrupt


@mcp.tool()
async def leave_in_a_task(ctx: Context, status: int) -> str:
    async def inner() -> None:
        sys.exit(status)

    left.set()
    await asyncio.create_task(inner())


left = asyncio.Event()


@mcp.tool()
async def wait(ctx: Context) -> str:
    await ctx.report_progress(0.5)
    await left.wait()
    await asyncio.sleep(0.5)
    return "waited"
"""


@pytest.mark.parametrize(("tool", "status"), [("leave", 5), pytest.param("interrupt", 0, marks=pytest.mark.slow)])
async def test_nonstick_serve_ends_with_tools_status(home: Path, start: Start, tool: str, status: int) -> None:
    """P8, P16: and a keyboard interrupt is as Ctrl-C."""
    (home / "exiting.py").write_text(EXITING)
    served = start("exiting.py", "--grace", "2")
    url = await asyncio.to_thread(served.url)
    headers = await asyncio.to_thread(initialize, url)

    message = {
        "jsonrpc": "2.0",
        "id": 3,
        "method": "tools/call",
        "params": {"name": tool, "arguments": {"status": status} if status else {}},
    }
    async with httpx2.AsyncClient(timeout=60) as client:
        answer = await client.post(url, json=message, headers=headers)
    assert answer.json()["error"]["data"] == TOLD
    assert await asyncio.to_thread(served.stop, signal.SIGCONT) == status
    assert "Traceback" not in str(served.seen)


async def test_exit_in_background_task_drains(home: Path, start: Start) -> None:
    """P8, P16: with `nonstick serve`, though asyncio raises it out of the loop; another request comes to its end."""
    (home / "exiting.py").write_text(EXITING)
    served = start("exiting.py", "--grace", "5")
    url = await asyncio.to_thread(served.url)
    headers = await asyncio.to_thread(initialize, url)

    def calling(tool: str, **arguments: object) -> dict[str, object]:
        params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": tool}}
        return {"jsonrpc": "2.0", "id": tool, "method": "tools/call", "params": params}

    async with (
        httpx2.AsyncClient(timeout=30) as client,
        client.stream("POST", url, json=calling("wait"), headers=headers) as stream,
    ):
        lines = stream.aiter_lines()
        assert "progress" in await anext(line async for line in lines if line.startswith("data: {"))
        answer = await client.post(url, json=calling("leave_in_a_task", status=5), headers=headers)
        assert answer.json()["error"]["data"] == TOLD
        assert '"waited"' in await anext(line async for line in lines if '"result"' in line)
    assert await asyncio.to_thread(served.stop, signal.SIGCONT) == 5
    assert "Traceback" not in str(served.seen)


@pytest.mark.slow
async def test_ended_process_has_the_tools_status(home: Path, start: Start) -> None:
    """P8, P16: another tool did not stop when it was cancelled."""
    (home / "exiting.py").write_text(EXITING)
    served = start("exiting.py", "--grace", "0.5")
    url = await asyncio.to_thread(served.url)
    headers = await asyncio.to_thread(initialize, url)

    def calling(tool: str, **arguments: object) -> dict[str, object]:
        meta = {"progressToken": tool}
        params = {"name": tool, "arguments": arguments, "_meta": meta}
        return {"jsonrpc": "2.0", "id": tool, "method": "tools/call", "params": params}

    async with (
        httpx2.AsyncClient(timeout=60) as client,
        client.stream("POST", url, json=calling("stubborn"), headers=headers) as stream,
    ):
        assert "progress" in await anext(text async for text in stream.aiter_text() if "progress" in text)
        answer = await client.post(url, json=calling("leave", status=5), headers=headers)
        assert answer.json()["error"]["data"] == TOLD
        assert await asyncio.to_thread(served.stop, signal.SIGCONT) == 5


HOST = """
import asyncio
import sys

import nonstick
from mcp.server import MCPServer

mcp = MCPServer("hosted")


@mcp.tool()
async def leave() -> str:
    sys.exit(6)


async def main() -> None:
    # A host without handlers of signals.
    app = nonstick.app(mcp, store="memory:", grace=1.0)
    async with app.lifespan():
        session = ""
        for number, (method, params) in enumerate([
            ("initialize", {"protocolVersion": "2025-11-25", "capabilities": {},
                            "clientInfo": {"name": "t", "version": "1"}}),
            ("tools/call", {"name": "leave", "arguments": {}}),
        ]):
            message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
            headers = {"accept": "application/json, text/event-stream", "content-type": "application/json",
                       "host": "127.0.0.1:80"} | ({"mcp-session-id": session} if session else {})
            session = await post(app, message, headers) or session
        await asyncio.sleep(60)


async def post(app, message, headers):
    import json
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
             "path": "/mcp", "raw_path": b"/mcp", "root_path": "", "query_string": b"",
             "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
    body = [{"type": "http.request", "body": json.dumps(message).encode(), "more_body": False}]
    found = {}

    async def receive():
        if body:
            return body.pop()
        await asyncio.sleep(60)

    async def send(part):
        found.update({k.decode(): v.decode() for k, v in part.get("headers", [])})
        print(part.get("body", b"").decode(), flush=True)

    await app(scope, receive, send)
    return found.get("mcp-session-id")


asyncio.run(main())
"""


def test_host_without_signals_ends_with_status() -> None:
    """P8, P16: after the drain: the answer is out, and the lifespan was left in order."""
    run = subprocess.run(
        [sys.executable, "-c", HOST], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False
    )
    assert "server_exit" in run.stdout, run.stdout + run.stderr
    assert run.returncode == 6, run.stderr
    assert "Traceback" not in run.stderr
    assert "never retrieved" not in run.stderr
