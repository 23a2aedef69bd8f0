"""Nodes as real processes, with a verb for each way to lose one: SIGKILL, SIGSTOP, SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from nonstick.testing.servers.valkey import DIE_WITH_PARENT, ReservedPort

__all__ = ["NodeProcess"]

START_SECONDS: Final = 120.0
"""How long a node may take to listen: it imports everything first, maybe on a busy machine."""

_POLL: Final = 0.01


class NodeProcess:
    """`uvicorn module:app` in a process of its own, on a free loopback port that stays the same through restarts.

    An async context manager: listening once entered, gone once left. Nothing here blocks the event loop. The process
    dies with this one, also when that is killed (on Linux, if the main thread started it).

    Args:
        target: What uvicorn serves, `module:attribute`.
        name: The node's name, handed over as `NONSTICK_NODE`.
        store: URL of the store, handed over as `NONSTICK_STORE`. May be set anew before a start.
        env: Further environment variables: the server reads its settings from there.
        path: Of the MCP endpoint.
        log: File that the process's output is appended to; a temporary one by default.
    """

    def __init__(
        self,
        target: str,
        *,
        name: str,
        store: str,
        env: Mapping[str, str] | None = None,
        path: str = "/mcp",
        log: Path | None = None,
    ) -> None:
        self.name = name
        self._reserved = ReservedPort()
        self.port = self._reserved.port
        self.url = f"http://127.0.0.1:{self.port}{path}"
        self.frozen = False
        self._target = target
        self.store = store
        self._env = {**(env or {}), "NONSTICK_NODE": name}
        self._children: list[subprocess.Popen[bytes]] = []
        if log is None:
            handle, temporary = tempfile.mkstemp(prefix=f"nonstick-{name}-", suffix=".log")
            os.close(handle)
            log = Path(temporary)
            weakref.finalize(self, log.unlink, missing_ok=True)
        self.log = log
        self._clean = weakref.finalize(self, _end, self._children)

    @property
    def running(self) -> bool:
        """Whether the process lives (a frozen one does)."""
        return bool(self._children) and self._children[-1].poll() is None

    @property
    def status(self) -> int | None:
        """The latest process's exit status, negative for a signal's number; None while it runs."""
        return self._children[-1].poll()

    @property
    def pid(self) -> int:
        """The latest process's id."""
        return self._children[-1].pid

    @property
    def written(self) -> str:
        """What it has logged, all starts together."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._clean()

    async def start(self) -> None:
        """Starts it, and returns once it listens.

        Raises:
            RuntimeError: It ended before, or took too long; the message ends with its log.
        """
        assert all(child.poll() is not None for child in self._children), f"{self.name} runs already"
        self.frozen = False
        command = [sys.executable, "-m", "uvicorn", self._target, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--log-level", "warning"]
        # The kernel's promise is bound to the thread that started the child, so only the main one may ask for it.
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-ISc", DIE_WITH_PARENT, *command]
        with self.log.open("ab") as log:
            child = subprocess.Popen(  # noqa: ASYNC220 - returns at once
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self._env | {"NONSTICK_STORE": self.store},
            )
        self._children[:] = [child]
        try:
            async with asyncio.timeout(START_SECONDS):
                while self.running:
                    if await self._listens():
                        return
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            pass
        raise RuntimeError(f"{self.name} did not start:\n{self.written[-4000:]}")

    def kill(self) -> None:
        """SIGKILL; returns once it is gone."""
        _end(self._children)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and are accepted, nothing answers."""
        self.frozen = True
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT. Harmless for a process that is gone."""
        self.frozen = False
        if self.running:
            os.kill(self.pid, signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: it begins its drain. Returns at once."""
        os.kill(self.pid, signal.SIGTERM)

    async def wait(self, seconds: float) -> bool:
        """Waits for its end. Returns whether that came in time."""
        try:
            async with asyncio.timeout(seconds):
                while self.running:  # noqa: ASYNC110 - a process sets no event
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            return False
        return True

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass
        return True


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
