"""Nodes, clients and their history, put together: what every test of faults begins with."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from nonstick.testing.oracle import Ran, Violation, judge
from nonstick.testing.servers.processes import NodeProcess
from tests.faults.client import History, Patience, Session
from tests.pace import in_time

__all__ = ["Stage", "gone_in"]

_POLL = 0.01

_DEADLINE = 60.0


async def gone_in(node: NodeProcess, seconds: float) -> bool:
    """Whether its process ended within so many seconds, or would have on a machine of its own."""
    began = time.monotonic()
    return await node.wait(_DEADLINE) and in_time(time.monotonic() - began, seconds)


class Stage:
    """Node processes of the faults server over one store, and sessions of clients.

    Args:
        store: URL of the store.
        home: A directory for logs and for what the tools record.
    """

    def __init__(self, store: str, home: Path) -> None:
        self.nodes: list[NodeProcess] = []
        self.history = History()
        self.sessions: list[Session] = []
        self.lure: NodeProcess | None = None
        """Where all clients go, while it is set."""
        self.record = home / "record.jsonl"
        self._store = store
        self._home = home
        self._made = 0
        self._stack = AsyncExitStack()
        self._http = httpx2.AsyncClient(limits=httpx2.Limits(max_keepalive_connections=0))

    def __getitem__(self, index: int) -> NodeProcess:
        return self.nodes[index]

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._http)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self.close()
        if kind is not None:
            for node in self.nodes:
                print(f"---- {node.name}\n{node.written[-6000:]}")

    async def close(self) -> None:
        """Ends every client and kills every node."""
        for session in self.sessions:
            await session.close()
        await self._stack.aclose()

    def node(self, *, store: str | None = None, env: Mapping[str, str] | None = None, **options: Any) -> NodeProcess:
        """One more node, not yet started. Options are those of `nonstick.app`."""
        options = {"lease": 2.0, "window": 0.2, "ping_interval": 0.5, "grace": 3.0, "retry_interval": 100} | options
        name = chr(ord("a") + self._made)
        self._made += 1
        node = NodeProcess(
            "tests.faults.server:app",
            name=name,
            store=store or self._store,
            env={"FAULTS_OPTIONS": json.dumps(options), "FAULTS_RECORD": str(self.record), "PYTHONDEVMODE": ""}
            | dict(env or {}),
            log=self._home / f"{name}.log",
        )
        self.nodes.append(node)
        self._stack.callback(node.kill)
        return node

    async def start(self, count: int, **options: Any) -> list[NodeProcess]:
        """Starts so many more nodes."""
        nodes = [self.node(**options) for _ in range(count)]
        await asyncio.gather(*(node.start() for node in nodes))
        return nodes

    def client(self, *, seed: int = 0, nodes: list[NodeProcess] | None = None, **options: Any) -> Session:
        """A client without a session yet."""
        session = Session(
            self._http,
            self.nodes if nodes is None else nodes,
            self.history,
            random.Random(seed),
            name=f"s{len(self.sessions)}",
            patience=options.pop("patience", Patience()),
            lure=lambda: self.lure,
            **options,
        )
        self.sessions.append(session)
        return session

    def runs(self, label: str = "") -> list[Ran]:
        """What the tools recorded, of this call or of all."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        runs = [_ran(json.loads(line)) for line in lines]
        return [ran for ran in runs if label in ("", ran.label)]

    async def recorded(self, label: str, *what: str, count: int = 1) -> Ran:
        """Returns the `count`th record of these kinds once it is there."""
        async with asyncio.timeout(_DEADLINE):
            while True:
                found = [ran for ran in self.runs(label) if ran.what in what]
                if len(found) >= count:
                    return found[count - 1]
                await asyncio.sleep(_POLL)

    def judge(self, *, outages: bool = False) -> list[Violation]:
        """What the oracle says to all that happened."""
        return judge([*self.history.records, *self.runs()], outages=outages)


def _ran(line: dict[str, Any]) -> Ran:
    names = ("at", "label", "what", "attempt", "node", "step", "value")
    return Ran(**{name: line[name] for name in names if name in line})
