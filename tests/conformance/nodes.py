"""The everything server as real processes, alone or several behind a balancer that knows no sessions."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from types import TracebackType
from typing import Final, Literal, Self

from nonstick.testing import PostgresServer, ValkeyServer
from nonstick.testing.servers.balancer import Backend, Balancer
from nonstick.testing.servers.valkey import ReservedPort
from tests.conformance.kills import Kills

__all__ = ["ROOT", "SDK", "Answer", "Server", "Setup", "StoreKind", "balanced", "nonstick", "serving", "store_url"]

ROOT: Final = Path(__file__).resolve().parents[2]
"""The repository: the processes import the server from here."""

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02

LOGS: Final = "NONSTICK_TEST_LOGS"
"""Environment variable: if it is set, what the servers write comes out on stderr, not only if one fails."""

StoreKind = Literal["sqlite", "valkey", "postgres"]
Answer = Literal["auto", "sse", "json"]

Setup = Sequence[str]
"""What to run with `python -m`, up to its `--port`."""

SDK: Final[Setup] = ("tests.conformance.everything_server", "--sdk")
"""The everything server on the SDK's own transport."""


def nonstick(store: str, answer: Answer = "auto") -> Setup:
    """The everything server on nonstick, as an operator would start it."""
    target = "tests.conformance.everything_server:server"
    return ("nonstick", "serve", target, "--store", store, "--answer", answer, "--grace", "2")


@contextmanager
def store_url(kind: StoreKind) -> Iterator[str]:
    """A fresh store's URL."""
    if kind == "valkey":
        with ValkeyServer() as valkey:
            yield valkey.url
        return
    if kind == "postgres":
        with PostgresServer() as postgres:
            yield postgres.url
        return
    with tempfile.TemporaryDirectory(prefix="nonstick-conformance-") as home:
        yield f"sqlite:///{home}/store.db"


class Server:
    """One everything server, on a free loopback port that stays the same when it is killed and started again.

    An async context manager: listening once entered, gone once left. If it is not running then, what it wrote comes
    out on stderr.

    Raises:
        RuntimeError: On entering and from `start`: it ended before it listened, or took too long.
    """

    def __init__(self, setup: Setup) -> None:
        self._reserved = ReservedPort()
        self.port = self._reserved.port
        self._command = [sys.executable, "-m", *setup, "--port", str(self.port)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed on leaving
        self._process: Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._leave()

    async def start(self) -> None:
        """Starts it, and returns once it listens."""
        self._process = Popen(self._command, cwd=ROOT, stdin=DEVNULL, stdout=self._log, stderr=self._log)  # noqa: ASYNC220
        try:
            async with asyncio.timeout(START_SECONDS):
                while self.running:
                    if await self._listens():
                        return
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            pass
        raise RuntimeError(f"the server on port {self.port} did not start")

    def kill(self) -> None:
        """SIGKILL. Blocks for the moment until it is gone, so that nothing in this process can still connect to it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True

    async def _leave(self) -> None:
        served = self.running
        await self._stop()
        with self._log as log:
            if LOGS in os.environ or not served:
                log.seek(0)
                written = log.read().decode(errors="replace")
                print(f"---- what the server on port {self.port} wrote\n{written[-8000:]}", file=sys.stderr)

    async def _stop(self) -> None:
        if self._process is None or not self.running:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                while self.running:  # noqa: ASYNC110 - a process sets no event
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            pass
        finally:
            self.kill()


@asynccontextmanager
async def serving(setup: Setup) -> AsyncIterator[int]:
    """One everything server; gives its port once it listens there.

    Raises:
        RuntimeError: It ended before it listened; what it wrote is on stderr.
    """
    async with Server(setup) as server:
        yield server.port


@asynccontextmanager
async def balanced(nodes: int, setup: Setup, *, kills: Kills | None = None) -> AsyncIterator[Balancer]:
    """This many everything servers, and a round robin in front that picks anew for every request.

    With `kills`, one server after another is killed and started again meanwhile.
    """
    async with AsyncExitStack() as stack:
        servers = await asyncio.gather(*(stack.enter_async_context(Server(setup)) for _ in range(nodes)))
        named = {f"node-{index}": server for index, server in enumerate(servers, start=1)}
        backends = [Backend(name, server.port) for name, server in named.items()]
        observe = None if kills is None else kills.observe
        balancer = await stack.enter_async_context(Balancer(backends, observe=observe))
        if kills is not None:
            await stack.enter_async_context(kills.happening(balancer, named))
        yield balancer
