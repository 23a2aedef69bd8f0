"""The opponents' processes, their stores, and what they have used of the processor."""

from __future__ import annotations

import asyncio
import platform
import resource
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from bench.opponents import Opponent
from nonstick.testing import PostgresServer, ValkeyServer
from nonstick.testing.servers.valkey import DIE_WITH_PARENT, free_port

__all__ = ["Stage", "Stores", "raise_file_limit"]

# A run that is killed leaves no servers behind.
_LINUX_ONLY: Final = (sys.executable, "-ISc", DIE_WITH_PARENT) if platform.system() == "Linux" else ()

START_SECONDS: Final = 240.0
"""All opponents start at once, maybe on a busy machine."""


class Stores:
    """One server of each kind for the whole run, started when it is first asked for."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._stack = ExitStack()
        self._made: Counter[str] = Counter()
        self._valkey: ValkeyServer | None = None
        self._postgres: PostgresServer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._stack.close()

    def url(self, kind: str) -> str:
        """Of a store of this kind, empty. Of Valkey there are as many as it has databases, 16."""
        number = self._made[kind]
        self._made[kind] += 1
        match kind:
            case "valkey":
                if self._valkey is None:
                    self._valkey = self._stack.enter_context(ValkeyServer())
                return f"{self._valkey.url}/{number}"
            case "postgres":
                if self._postgres is None:
                    self._postgres = self._stack.enter_context(PostgresServer())
                return f"{self._postgres.url}?schema=bench_{number}"
            case "sqlite":
                return f"sqlite:///{self._home}/bench-{number}.db"
            case "memory":
                return "memory:"
            case _:
                return ""


class Stage:
    """One opponent, up and running."""

    def __init__(self, opponent: Opponent, url: str, home: Path, node: str) -> None:
        self.opponent = opponent
        self.ports = [free_port() for _ in range(opponent.nodes)]
        self.url = url
        self._log = home / f"{opponent.name}.log"
        self._node = node
        self._processes: list[psutil.Popen] = []

    async def start(self) -> None:
        """Starts its processes, and returns once they listen."""
        self.launch()
        await self.listening()

    def launch(self) -> None:
        """Starts its processes."""
        for port in self.ports:
            with self._log.open("ab") as log:
                self._processes.append(
                    psutil.Popen(
                        [*_LINUX_ONLY, *self.opponent.command(port, self._node)],
                        env=self.opponent.environment(port, self.url),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )

    async def listening(self) -> None:
        """Returns once its processes listen.

        Raises:
            RuntimeError: One of them does not; the message ends with its log.
        """
        limit = time.monotonic() + START_SECONDS
        for port in self.ports:
            while not _listens(port):
                if time.monotonic() > limit or any(process.poll() is not None for process in self._processes):
                    raise RuntimeError(f"{self.opponent.name} did not start:\n{self._log.read_text()[-3000:]}")
                await asyncio.sleep(0.02)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def cpu(self) -> float:
        """Seconds of processor time, user and system, that its processes have used so far."""
        return sum(_cpu(process) for process in self._processes)

    def memory(self) -> int:
        """Bytes that its processes hold."""
        return sum(int(process.memory_info().rss) for process in self._processes)

    def stop(self) -> None:
        """Kills them: there is nothing to save."""
        for process in self._processes:
            process.kill()
        while self._processes:
            self._processes.pop().wait()


def raise_file_limit() -> None:
    """As many open files, connections that is, as this process and those that it starts may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _cpu(process: psutil.Popen) -> float:
    if platform.system() == "Linux":
        # The clock of another process, in nanoseconds (clock_getcpuclockid); what psutil reads counts in 10 ms.
        return time.clock_gettime(~process.pid << 3 | 2)
    times = process.cpu_times()
    return float(times.user + times.system)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
