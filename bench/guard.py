"""What a request costs in figures that noise does not touch: store round trips, function calls, instructions, garbage.

    python -m bench.guard           # shows them beside the committed ones
    python -m bench.guard --commit  # writes bench/guard.json, which tests/bench/test_guard.py holds every change to

In this process, without a socket: the app is called as an ASGI server calls it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple, cast

import nonstick
from bench.servers import mcpserver
from nonstick.core.names import session_key
from nonstick.store import Store
from nonstick.stores.memory import MemoryStore

__all__ = ["COMMITTED", "Caller", "CountingStore", "Figures", "committed", "figures", "fill", "growth", "nodes"]

COMMITTED: Final = Path(__file__).with_name("guard.json")

LIFETIME: Final = 1800.0
REPEATS: Final = 5
"""Of what is counted inside the interpreter: the least is what the request alone costs."""

ROUNDS: Final = 3
"""Of so many requests each, for what they leave for the garbage collector: the least counts here too."""

INITIALIZE: Final = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "guard", "version": "1"}},
}
INITIALIZED: Final = {"jsonrpc": "2.0", "method": "notifications/initialized"}
ECHO: Final = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "echo", "arguments": {"text": "hello"}},
}
PROGRESS: Final = {
    "jsonrpc": "2.0",
    "id": 2,
    "method": "tools/call",
    "params": {"name": "progress", "arguments": {"count": 10}, "_meta": {"progressToken": 1}},
}

_ROUND_TRIPS: Final = frozenset(
    {"create", "load", "update", "touch", "delete", "append", "read", "skim", "trim", "stale", "lapsed", "ping"}
)
_counter: ContextVar[Counter[str] | None] = ContextVar("_counter", default=None)


class Figures(NamedTuple):
    """What a request costs.

    Attributes:
        trips: Store round trips, by the store's method.
        calls: Python functions called. Their number differs a little between versions of Python and of libraries.
        instructions: Of the interpreter. Their number differs a lot between versions: compared within one run only.
        garbage: Objects that only the garbage collector frees, whose pauses are other requests' latency.
    """

    trips: dict[str, int]
    calls: int
    instructions: int
    garbage: int


class CountingStore:
    """Passes every call on, and counts those of the request that they are made for, its tasks included."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        counter = _counter.get()
        if counter is not None and name in _ROUND_TRIPS:
            counter[name] += 1
        return getattr(self._store, name)

    async def __aenter__(self) -> CountingStore:
        await self._store.__aenter__()
        return self

    async def __aexit__(self, *what: Any) -> None:
        await self._store.__aexit__(*what)


class Caller:
    """A client of one node, without a network."""

    def __init__(self, app: nonstick.App) -> None:
        self._app = app

    async def open(self) -> str:
        """Opens a session; returns its id."""
        status, headers, body = await self.post(INITIALIZE)
        if status != 200:
            raise RuntimeError(f"status {status}: {body.decode(errors='replace')}")
        session = headers["mcp-session-id"]
        await self.post(INITIALIZED, session)
        return session

    async def post(self, message: dict[str, Any], session: str = "") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the whole answer."""
        headers = {
            "host": "127.0.0.1:80",
            "accept": "application/json, text/event-stream",
            "content-type": "application/json",
        }
        if session:
            headers |= {"mcp-session-id": session, "mcp-protocol-version": "2025-11-25"}
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/mcp",
            "raw_path": b"/mcp",
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        received = [{"type": "http.request", "body": json.dumps(message).encode(), "more_body": False}]
        sent: list[Any] = []
        gone = asyncio.Event()

        async def receive() -> Any:
            if received:
                return received.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(part: Any) -> None:
            sent.append(part)

        await self._app(scope, receive, send)
        gone.set()
        answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], answered, b"".join(part.get("body", b"") for part in sent[1:])

    async def count(self, message: dict[str, Any], session: str = "") -> Figures:
        """What this request costs once it has been made a few times."""
        # The client's side is the same each time, so it may be counted too.
        for _ in range(2):
            await self.post(message, session)
        trips: Counter[str] = Counter()
        token = _counter.set(trips)
        try:
            await self.post(message, session)
        finally:
            _counter.reset(token)
        calls = [await _counted(self.post(message, session), _count_calls) for _ in range(REPEATS)]
        instructions = [await _counted(self.post(message, session), _count_instructions) for _ in range(REPEATS)]
        return Figures(
            dict(sorted(trips.items())), min(calls), min(instructions), await self._garbage(message, session)
        )

    async def _garbage(self, message: dict[str, Any], session: str) -> int:
        """The least of several rounds, as for what else is counted: what a node does in the background leaves some."""
        return min([await self._garbage_of_one_round(message, session) for _ in range(ROUNDS)])

    async def _garbage_of_one_round(self, message: dict[str, Any], session: str) -> int:
        gc.collect()
        gc.disable()
        try:
            for _ in range(REPEATS):
                await self.post(message, session)
            return gc.collect() // REPEATS
        finally:
            gc.enable()


async def _counted(work: Awaitable[Any], count: Callable[[list[int]], Callable[[], None]]) -> int:
    """What is counted while this is done."""
    total = [0]
    gc.disable()
    stop = count(total)
    try:
        await work
    finally:
        stop()
        gc.enable()
    return total[0]


def _count_calls(total: list[int]) -> Callable[[], None]:
    def profile(_: FrameType, event: str, __: object) -> None:
        if event == "call":
            total[0] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    return lambda: sys.setprofile(before)


def _count_instructions(total: list[int]) -> Callable[[], None]:
    def local(_: FrameType, event: str, __: object) -> Any:
        if event == "opcode":
            total[0] += 1
        return local

    def begin(frame: FrameType, _: str, __: object) -> Any:
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return local

    before = sys.gettrace()
    sys.settrace(begin)
    return lambda: sys.settrace(before)


@asynccontextmanager
async def nodes(
    count: int = 1, store: Store | None = None, *, lifetime: float = LIFETIME, **options: Any
) -> AsyncIterator[list[Caller]]:
    """So many nodes, on one store: of each a client."""
    counting = cast("Store", CountingStore(store or MemoryStore()))
    async with AsyncExitStack() as stack:
        callers = []
        for number in range(count):
            app = nonstick.app(
                mcpserver(),
                store=counting,
                max_sessions=None,
                node_name=f"node-{number}",
                session_idle_timeout=lifetime,
                **options,
            )
            await stack.enter_async_context(app.lifespan())
            callers.append(Caller(app))
        yield callers


async def fill(store: Store, like: str, sessions: int) -> None:
    """So many further sessions, with the record of this one."""
    fields = (await store.load(session_key(like))).fields
    for _ in range(sessions):
        await store.create(session_key(secrets.token_hex(16)), fields, lifetime=LIFETIME)


async def figures() -> dict[str, Figures]:
    """Of each kind of request."""
    async with nodes() as [node]:
        session = await node.open()
        found = {
            "echo": await node.count(ECHO, session),
            "10 notifications": await node.count(PROGRESS, session),
            "initialize": await node.count(INITIALIZE),
            "malformed session id": await node.count(ECHO, "none of ours"),
        }
    async with nodes(answer="sse") as [node]:
        found['echo, answer="sse"'] = await node.count(ECHO, await node.open())
    return found


GROWTH: Final = ((1, 1), (1_000, 1), (100_000, 1), (1, 8), (100_000, 8))


async def growth(tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """What an echo costs among so many sessions on so many nodes: first alone.

    All nodes are in this process, on a store in memory. One session is opened; the other records are written to the
    store directly.
    """
    found = []
    for sessions, count in GROWTH:
        tell(f"one echo among {sessions:,}, {count} node{'s' if count > 1 else ''}")
        store = MemoryStore()
        async with nodes(count, store) as callers:
            session = await callers[0].open()
            for caller in callers[1:]:
                await caller.post(ECHO, session)
            await fill(store, session, sessions - 1)
            figure = await callers[-1].count(ECHO, session)
        found.append({"sessions": sessions, "nodes": count, **figure._asdict()})
    return found


def committed() -> dict[str, dict[str, Any]]:
    """The `trips` and `calls` that `bench/guard.json` has of each kind of request."""
    kept: dict[str, dict[str, Any]] = json.loads(COMMITTED.read_text())
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", action="store_true", help="write them to bench/guard.json")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    arguments = parser.parse_args()
    before = committed() if COMMITTED.exists() else {}
    now = asyncio.run(figures())
    if arguments.json:
        print(json.dumps({name: figure._asdict() for name, figure in now.items()}))
        return
    for name, figure in now.items():
        was = f"; committed: {before[name]['calls']} calls" if name in before else ""
        counts = f"{figure.calls:6} calls, {figure.instructions:7} instructions, {figure.garbage:3} objects of garbage"
        print(f"{name:22} {counts}, store {figure.trips}{was}")
    if arguments.commit:
        kept = {name: {"trips": figure.trips, "calls": figure.calls} for name, figure in now.items()}
        COMMITTED.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
