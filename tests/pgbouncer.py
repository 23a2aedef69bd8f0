"""A PgBouncer that pools transactions, in front of a PostgreSQL of the tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from nonstick.testing import PostgresServer
from nonstick.testing.servers.valkey import ReservedPort

START_SECONDS = 120.0

CONFIG = """\
[databases]
* = host=127.0.0.1 port={server} user=nonstick
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
logfile = {home}/log
"""


class PgBouncer:
    """`pgbouncer` as a child process, with four connections to the server for all clients; a context manager.

    Skips the test where the program is not installed (Debian: `apt-get install pgbouncer`).
    """

    def __init__(self, server: PostgresServer) -> None:
        program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            pytest.skip("needs pgbouncer: apt-get install pgbouncer")
        self._program = program
        self._server = server
        self._home = Path(tempfile.mkdtemp(prefix="nonstick-pgbouncer-"))
        self._reserved = ReservedPort()
        self.port = self._reserved.port

    @property
    def url(self) -> str:
        """Through the pooler, without prepared statements, which it may be too old for."""
        return f"{self._server.url.replace(str(self._server.port), str(self.port))}?prepared=false"

    def __enter__(self) -> Self:
        config = self._home / "pgbouncer.ini"
        config.write_text(CONFIG.format(server=self._server.port, port=self.port, home=self._home))
        user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
        if user:
            shutil.chown(self._home, user)
        self._process = subprocess.Popen(
            [self._program, "-q", str(config)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user
        )
        limit = time.monotonic() + START_SECONDS
        while not _listens(self.port):
            if self._process.poll() is not None or time.monotonic() > limit:
                log = (self._home / "log").read_text()
                self._stop()
                raise RuntimeError(f"pgbouncer did not start:\n{log[-2000:]}")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
