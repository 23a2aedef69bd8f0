"""The everything server as real processes, alone or several behind a balancer that knows no sessions."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from nonstick.testing.balancer import Backend, Balancer
from nonstick.testing.servers import ValkeyServer

__all__ = ["ROOT", "SDK", "Answer", "Setup", "StoreKind", "balanced", "nonstick", "serving", "store_url"]

ROOT: Final = Path(__file__).resolve().parents[2]
"""The repository: the processes import the server from here."""

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0

LOGS: Final = "NONSTICK_TEST_LOGS"
"""Environment variable: if it is set, what the servers write comes out on stderr, not only if one fails."""

StoreKind = Literal["sqlite", "valkey"]
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
    with tempfile.TemporaryDirectory(prefix="nonstick-conformance-") as home:
        yield f"sqlite:///{home}/store.db"


@asynccontextmanager
async def serving(setup: Setup) -> AsyncIterator[int]:
    """One everything server; gives its port once it listens there.

    Raises:
        RuntimeError: It ended before it listened; what it wrote is on stderr.
    """
    port = _free_port()
    command = [sys.executable, "-m", *setup, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=DEVNULL, stdout=log, stderr=log)
        served = False
        try:
            if not await _listens(process, port):
                raise RuntimeError(f"the server on port {port} did not start")
            yield port
            served = process.returncode is None
        finally:
            await _stop(process)
            if LOGS in os.environ or not served:
                log.seek(0)
                written = log.read().decode(errors="replace")
                print(f"---- what the server on port {port} wrote\n{written[-8000:]}", file=sys.stderr)


@asynccontextmanager
async def balanced(nodes: int, setup: Setup) -> AsyncIterator[Balancer]:
    """This many everything servers, and a round robin in front that picks anew for every request."""
    async with AsyncExitStack() as stack:
        ports = await asyncio.gather(*(stack.enter_async_context(serving(setup)) for _ in range(nodes)))
        backends = [Backend(f"node-{index}", port) for index, port in enumerate(ports, start=1)]
        yield await stack.enter_async_context(Balancer(backends))


async def _listens(process: Process, port: int) -> bool:
    try:
        async with asyncio.timeout(START_SECONDS):
            while process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                    continue
                writer.close()
                return True
    except TimeoutError:
        pass
    return False


async def _stop(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
