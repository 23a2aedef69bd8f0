"""`nonstick serve` as a process: it serves, stops, and says in one paragraph what cannot work."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nonstick.commands import cli
from nonstick.commands.cli import main
from nonstick.testing import PostgresServer
from nonstick.testing.servers.valkey import ValkeyServer
from nonstick.testing.servers.valkey_cluster import ask as administer

DEADLINE = 120.0

SOURCE = """
from mcp.server import MCPServer

mcp = MCPServer("served")
other = 42


@mcp.tool()
def add(a: int, b: int) -> int:
    return a + b


async def make():
    return mcp


def broken():
    raise RuntimeError("no database")
"""


class Served:
    """`nonstick serve …` as a child process. Its log is JSON; `wait_for` reads it."""

    def __init__(self, home: Path, *arguments: str, store: str = "sqlite:///sessions.db", **environment: str) -> None:
        self.seen: list[dict[str, Any]] = []
        self._lines = queue.Queue[str | None]()
        self._process = subprocess.Popen(
            [*NONSTICK, "serve", *arguments, "--store", store, "--port", "0", "--log-format", "json"],
            cwd=home,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, message: str) -> dict[str, Any]:
        """The next record with this message.

        Raises:
            AssertionError: The process ended before. The records are in the message.
        """
        limit = time.monotonic() + DEADLINE
        while True:
            line = self._lines.get(timeout=max(0.0, limit - time.monotonic()))
            if line is None:
                self._lines.put(None)  # for the next who reads to the end
                raise AssertionError(f"no record {message!r}: {self.seen}")
            self.seen.append(json.loads(line))
            if self.seen[-1]["message"] == message:
                return self.seen[-1]

    def url(self) -> str:
        """Of the MCP endpoint, once it serves."""
        return str(self.wait_for("serving")["url"])

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """Sends the signal, and returns the exit status."""
        self._process.send_signal(signum)
        return self._process.wait(DEADLINE)

    def clean(self) -> None:
        if self._process.poll() is None:
            # It passes the signal on to its workers, which a SIGKILL would leave behind.
            self._process.terminate()
            try:
                self._process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        while self._lines.get(timeout=DEADLINE) is not None:
            pass
        self._process.stderr.close()


NONSTICK = [sys.executable, "-m", "nonstick"]

Start = Callable[..., Served]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "server.py").write_text(SOURCE)
    return tmp_path


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: str) -> Served:
            served = Served(home, *arguments, **options)
            stack.callback(served.clean)
            return served

        yield start


def root(url: str) -> str:
    return url.removesuffix("/mcp")


HEADERS = {"accept": "application/json, text/event-stream"}


def open_session(url: str) -> httpx2.Response:
    params = {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    }
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    return httpx2.post(url, json=message, headers=HEADERS, timeout=DEADLINE)


def initialize(url: str) -> dict[str, str]:
    """Opens a session; returns the headers of its later requests."""
    answer = open_session(url)
    assert answer.status_code == 200, answer.text
    return {**HEADERS, "mcp-session-id": answer.headers["mcp-session-id"], "mcp-protocol-version": "2025-11-25"}


def list_tools(url: str, headers: dict[str, str]) -> int:
    message = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
    return httpx2.post(url, json=message, headers=headers, timeout=DEADLINE).status_code


def nonstick(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*NONSTICK, *arguments],
        cwd=home,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


# ---- it serves


def test_two_processes_serve_one_session(start: Start) -> None:
    """P1."""
    first, second = start("server.py"), start("server:make")
    opened, other = first.url(), second.url()
    headers = initialize(opened)
    assert list_tools(other, headers) == 200
    assert httpx2.delete(other, headers=headers, timeout=DEADLINE).status_code == 200
    assert list_tools(opened, headers) == 404


SHOP = """
import nonstick
from fastmcp import FastMCP

cluster = nonstick.Cluster()
shop = FastMCP(
    "shop",
    session_state_store=cluster.session_state_store,
    request_state_security=cluster.request_state_security,
)


@shop.tool
def fail(a: int) -> int:
    raise RuntimeError("a secret of the client's")


def app():
    return shop.http_app(path="/shop")
"""


@pytest.mark.slow
def test_fastmcp_server_and_app_are_served(start: Start, home: Path) -> None:
    """P1: one process has the server, the other an app that was made of it. Probes, logs and the end are as ever."""
    (home / "shop.py").write_text(SHOP)
    server, app = start("shop.py", "--path", "/shop"), start("shop.py:app")
    opened, other = server.url(), app.url()
    assert opened.endswith("/shop")
    assert other.endswith("/shop")
    headers = initialize(opened)
    assert list_tools(other, headers) == 200
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "fail", "arguments": {"a": 1}}}
    assert httpx2.post(other, json=call, headers=headers, timeout=DEADLINE).json()["result"]["isError"]
    assert httpx2.get(other.replace("/shop", "/readyz"), timeout=DEADLINE).status_code == 200
    assert not [one for one in server.seen + app.seen if one["level"] == "warning" and "FastMCP" in one["message"]]
    assert (server.stop(), app.stop()) == (0, 0)
    with pytest.raises(AssertionError):
        app.wait_for("the end")  # reads the rest: every line is a record of ours (P13)
    assert any("Error calling tool" in one["message"] for one in app.seen)
    assert "a secret of the client's" not in str(app.seen)


@pytest.mark.slow
def test_app_without_endpoint_is_refused(home: Path) -> None:
    (home / "web.py").write_text("from fastapi import FastAPI\napp = FastAPI()\n")
    ended = nonstick(home, "serve", "web.py:app", "--port", "0", "--log-level", "error")
    assert ended.returncode == 2
    assert ended.stderr.startswith("nonstick: there is no MCP endpoint in this app.")


def test_probes_answer_and_sigterm_succeeds(start: Start) -> None:
    served = start("server.py")
    url = root(served.url())
    for probe, said in (("/healthz", "ok"), ("/readyz", "ready")):
        answer = httpx2.get(url + probe, timeout=DEADLINE)
        assert (answer.status_code, answer.json()) == (200, {"status": said})
    assert served.stop() == 0


@pytest.mark.slow
def test_ctrl_c_ends_with_status_0(start: Start) -> None:
    served = start("server.py")
    served.url()
    assert served.stop(signal.SIGINT) == 0


def test_sigterm_awaits_no_open_stream(start: Start) -> None:
    """P8: the stream is handed over, long before the grace period is over."""
    served = start("server.py", "--grace", "600")
    url = served.url()
    with httpx2.stream("GET", url, headers=initialize(url), timeout=DEADLINE) as stream:
        assert stream.status_code == 200
        assert served.stop() == 0
        stream.read()


@pytest.mark.slow
def test_two_workers_serve_one_session(start: Start) -> None:
    """P1."""
    served = start("server.py", "--workers", "2")
    url, pid = served.url(), served.seen[-1]["pid"]
    assert served.wait_for("serving")["pid"] != pid
    headers = initialize(url)
    assert {list_tools(url, headers) for _ in range(20)} == {200}
    assert served.stop() == 0


@pytest.mark.slow
def test_failing_workers_end_the_command(home: Path) -> None:
    ended = nonstick(home, "serve", "server.py:broken", "--workers", "2", "--port", "0")
    assert ended.returncode == 1
    assert 'raise RuntimeError("no database")' in ended.stderr
    assert "nonstick: server.py:broken raised RuntimeError: no database." in ended.stderr


@pytest.mark.slow
def test_reload_serves_the_changed_file(start: Start, home: Path) -> None:
    served = start("server.py", "--reload")
    served.url()
    (home / "server.py").write_text(SOURCE.replace('MCPServer("served")', 'MCPServer("changed")'))
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    answer = httpx2.post(served.url(), json=message, headers=HEADERS, timeout=DEADLINE)
    assert answer.json()["result"]["serverInfo"]["name"] == "changed"


@pytest.mark.slow
def test_node_without_store_is_not_ready(start: Start) -> None:
    """P9: it stays up, and recovers without a restart."""
    with ValkeyServer() as valkey:
        url = root(start("server.py", store=valkey.url).url())
        assert httpx2.get(f"{url}/readyz", timeout=DEADLINE).status_code == 200
        valkey.kill()
        answer = httpx2.get(f"{url}/readyz", timeout=DEADLINE)
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the session store cannot be reached"
        assert httpx2.get(f"{url}/healthz", timeout=DEADLINE).status_code == 200
        valkey.start()
        limit = time.monotonic() + DEADLINE
        while httpx2.get(f"{url}/readyz", timeout=DEADLINE).status_code != 200:
            assert time.monotonic() < limit


@pytest.mark.slow
def test_loopback_refuses_foreign_host_header(start: Start) -> None:
    """As with the SDK: protection against DNS rebinding."""
    local, public = start("server.py"), start("server.py", "--host", "0.0.0.0")
    foreign = {"host": "mcp.example.com"}
    assert httpx2.get(local.url(), headers=foreign, timeout=DEADLINE).status_code == 421
    assert (
        httpx2.get(public.url().replace("0.0.0.0", "127.0.0.1"), headers=foreign, timeout=DEADLINE).status_code == 400
    )


def test_log_names_node_without_session(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """P13."""
    monkeypatch.setenv("NONSTICK_NODE", "node-x")
    served = start("server.py", "--log-level", "debug")
    url = served.url()
    headers = initialize(url)
    list_tools(url, headers)
    httpx2.delete(url, headers=headers, timeout=DEADLINE)
    served.stop()
    served.wait_for(f"Finished server process [{served.seen[-1]['pid']}]")
    assert {record["node"].rpartition("-")[0] for record in served.seen if record["logger"] == "uvicorn.access"} == {
        "node-x"
    }
    assert [record["method"] for record in served.seen if record["logger"] == "uvicorn.access"] == [
        "POST",
        "POST",
        "DELETE",
    ]
    assert headers["mcp-session-id"] not in json.dumps(served.seen)


def test_endless_head_is_refused(start: Start) -> None:
    """P10: before it fills the memory, in the middle of one header or after many."""
    served = start("server.py")
    port = int(served.url().split(":")[2].split("/")[0])
    with httpx2.Client(
        transport=httpx2.HTTPTransport(retries=6), timeout=DEADLINE
    ) as patient:  # it says so just before it listens
        assert patient.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    for endless in (b"x: " + b"y" * 100_000, b"x: y\r\n" * 20_000):
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n")
            answer = b""
            with contextlib.suppress(ConnectionError):
                for _ in range(50):
                    client.sendall(endless)
            with contextlib.suppress(ConnectionError):
                answer = client.recv(1000)
            assert answer[:12] in (b"", b"HTTP/1.1 431")
    assert httpx2.get(f"http://127.0.0.1:{port}/healthz", timeout=DEADLINE).status_code == 200


@pytest.mark.slow
def test_settings_are_given_by_their_names(start: Start, home: Path) -> None:
    """P10: every limit can be set, and what cannot work is said in one paragraph."""
    served = start("server.py", "--set", "max_header_bytes=2000", "--set", "unconfirmed_lifetime=null")
    with httpx2.Client(transport=httpx2.HTTPTransport(retries=6), timeout=DEADLINE) as patient:
        answer = patient.post(served.url(), json={}, headers={**HEADERS, "x": "y" * 3000})
    assert answer.status_code == 431
    ended = nonstick(home, "serve", "server.py", "--port", "0", "--set", "max_sessions=0")
    assert ended.returncode == 2
    assert "max_sessions must be a positive number" in ended.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("max_header_bytes", "is not NAME=VALUE"),
        ("windov=3", "there is no setting 'windov': did you mean window?"),
        ("session_idle_timout=3", "did you mean session_idle_timeout?"),
        ("worker=3", "did you mean --workers?"),
        ("second_listener=reject", "there is no setting 'second_listener'; docs/limits.md and docs/cli.md have all"),
        ("log_level=debug", "has an option of its own: --log-level"),
        ("encryption_keys=k", "it is given in NONSTICK_ENCRYPTION_KEYS"),
        ("rehydrate=1", "only be given to nonstick.app()"),
        ("custom_starlette_routes=[]", "only be given to nonstick.app()"),
        ("lease=3", "has an option of its own: --lease"),
        ("max_sessions=many", "give a number"),
        ("auth=1", "only be given to nonstick.app()"),
    ],
)
def test_unsettable_setting_is_refused(wrong: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "server.py", "--set", wrong])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["serve", "server.py", "--wrokers", "3"], "there is no option --wrokers: did you mean --workers?"),
        (["serve", "server.py", "--logformat=json"], "there is no option --logformat: did you mean --log-format?"),
        (["serve", "server.py", "--max-streams=3"], "--max-streams is given as --set max_streams=VALUE"),
        (["serve", "server.py", "--max_stream", "3"], "did you mean --set max_streams=VALUE?"),
        (["serve", "server.py", "--xyz"], "there is no option --xyz; --help lists those that there are"),
        (["serve", "server.py", "another.py"], "there is no option another.py; --help"),
        (["migrate", "--store", "memory:", "--dryrun"], "there is no option --dryrun; --help"),
    ],
)
def test_unknown_option_is_refused(wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nonstick: ")
    assert said in line


@pytest.mark.slow
def test_default_store_is_in_working_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the ping before the server: the target's failure comes after."""
    monkeypatch.delenv("NONSTICK_STORE", raising=False)
    nonstick(home, "serve", "server.py:broken", "--port", "0")
    assert (home / ".nonstick" / "sessions.db").stat().st_mode & 0o777 == 0o600
    assert (home / ".nonstick").stat().st_mode & 0o077 == 0
    assert (home / ".nonstick" / ".gitignore").read_text() == "*\n"


# ---- it refuses


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["servr.py"], "servr.py does not exist. Did you mean server.py?"),
        (["no_such_module:mcp"], "there is no module 'no_such_module'. Looked in "),
        (["server.py:mpc"], "server.py has no 'mpc'. Try server.py:mcp."),
        (["server.py:other"], "server.py:other is of type int, not an MCP server. Name an MCPServer"),
        (["server.py", "--store", "mysql://x"], "scheme"),
        (
            ["server.py", "--store", "postgresql://x/y?poolsize=3"],
            "'poolsize' that is not known. Did you mean pool_size?",
        ),
        (
            ["server.py", "--store", "sqlite:///absent/x.db"],
            "x.db cannot be used: the directory of the store's file does not exist",
        ),
        (["server.py", "--store", "memory:", "--workers", "2"], "several --workers cannot share memory:"),
        (["server.py", "--host", "192.0.2.1"], "192.0.2.1 is no address of this machine."),
    ],
)
def test_unworkable_command_gets_one_paragraph(home: Path, arguments: list[str], said: str) -> None:
    ended = nonstick(home, "serve", *arguments, "--port", "0", "--log-level", "error")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("nonstick: ")
    assert said in line
    assert ended.stdout == ""


@pytest.mark.parametrize("command", ["serve server.py", "doctor", "migrate"])
def test_empty_store_setting_is_refused(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A secret that was not filled in must not become a file that nobody shares."""
    for empty in ("", " \n"):
        monkeypatch.setenv("NONSTICK_STORE", empty)
        assert cli.main(command.split()) == 2
        assert "NONSTICK_STORE is set, and empty: name a store there, or leave it out." in capsys.readouterr().err


# ---- a store that is away, or not what it should be, when a node starts


def answers(url: str, status: int) -> dict[str, Any]:
    """Waits until /readyz has this status; returns its answer."""
    limit = time.monotonic() + DEADLINE
    while (answer := httpx2.get(f"{root(url)}/readyz", timeout=DEADLINE)).status_code != status:
        assert time.monotonic() < limit, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_node_started_in_outage_serves_later(start: Start) -> None:
    """P9: it listens, is not ready, keeps trying; and the log names the store, without its password (P13)."""
    with ValkeyServer() as valkey:
        valkey.kill()
        served = start("server.py", store=valkey.url.replace("//", "//:secret@") + "/3")
        url = served.url()
        assert answers(url, 503)["reason"] == "the session store cannot be reached"
        said = next(one["message"] for one in served.seen if "cannot be reached yet" in one["message"])
        assert f"{valkey.url}/3" in said
        assert "secret" not in json.dumps(served.seen)
        assert open_session(url).status_code == 503
        valkey.start()
        # A login is refused by a server that has none: that shows only now, and is told like any other mistake.
        assert "check user and password in its URL" in answers(url, 503)["reason"]
        administer(valkey, "CONFIG", "SET", "requirepass", "secret")
        answers(url, 200)
        assert list_tools(url, initialize(url)) == 200
        assert served.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["valkey", "postgres"])
def test_workers_started_in_outage_serve_later(start: Start, kind: str) -> None:
    with ValkeyServer() if kind == "valkey" else PostgresServer() as server:
        server.kill()
        served = start("server.py", "--workers", "2", store=server.url)
        url = served.url()
        served.url()
        answers(url, 503)
        server.start()
        limit = time.monotonic() + DEADLINE
        headers: dict[str, str] | None = None
        while headers is None:
            assert time.monotonic() < limit
            if open_session(url).status_code == 200:
                headers = initialize(url)
        # Two workers, each of which finds the store by itself.
        row = 0
        while row < 20:
            assert time.monotonic() < limit
            row = row + 1 if list_tools(url, headers) == 200 else 0
        assert served.stop() == 0


@pytest.mark.slow
def test_silent_store_is_waited_for(start: Start) -> None:
    """It accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        served = start("server.py", store=f"redis://127.0.0.1:{silent.getsockname()[1]}")
        assert answers(served.url(), 503)["reason"] == "the session store cannot be reached"
        assert served.stop() == 0


def test_mistake_seen_by_server_ends_command(home: Path) -> None:
    """In one paragraph, with what to do and without the password (P13)."""
    with ValkeyServer() as valkey:
        for store, said in (
            (valkey.url.replace("//", "//user:secret@"), "check user and password in its URL"),
            (valkey.url.replace("redis", "redis+cluster"), "write redis:// instead of redis+cluster://"),
        ):
            ended = nonstick(home, "serve", "server.py", "--port", "0", "--log-level", "error", NONSTICK_STORE=store)
            assert ended.returncode == 2
            (line,) = ended.stderr.splitlines()
            assert said in line
            assert "secret" not in line


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_mistake_seen_on_joining_ends_command(home: Path, workers: str) -> None:
    """The first look is a mere write; what a node needs besides, it tries when it starts."""
    with ValkeyServer() as valkey:
        administer(valkey, "ACL", "SETUSER", "weak", "on", ">secret", "~*", "&*", "+@all", "-eval", "-evalsha")
        store = valkey.url.replace("//", "//weak:secret@")
        ended = nonstick(home, "serve", "server.py", "--port", "0", "--workers", workers, NONSTICK_STORE=store)
    assert ended.returncode == (2 if workers == "1" else 1)
    assert "lacks a permission: docs/stores.md has the ACL line that it needs" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stderr


@pytest.mark.slow
def test_many_nodes_make_one_new_file(start: Start) -> None:
    """One of them makes it; the others wait for that, however busy the machine is, and all share it (P1)."""
    nodes = [start("server.py") for _ in range(16)]
    urls = [node.url() for node in nodes]
    headers = initialize(urls[0])
    for url in urls:
        answers(url, 200)
        assert list_tools(url, headers) == 200


@pytest.mark.slow
def test_port_in_use_is_told(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = nonstick(home, "serve", "server.py", "--port", str(port))
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"nonstick: port {port} on 127.0.0.1 is in use. Choose another with --port")


def test_users_failing_module_shows_only_itself(home: Path) -> None:
    (home / "server.py").write_text("import helper\n")
    (home / "helper.py").write_text("def load():\n    return {}['key']\n\nload()\n")
    ended = nonstick(home, "serve", "server.py", "--port", "0")
    assert ended.returncode == 2
    assert "return {}['key']" in ended.stderr
    assert "nonstick/" not in ended.stderr
    assert "importlib" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("nonstick: importing server.py failed: KeyError: 'key'.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["serve"], "required: TARGET"),
        (["serve", "server.py", "--port", "65536"], "'65536' is not a port"),
        (["serve", "server.py", "--path", "mcp"], "'mcp' does not start with a slash"),
        (["serve", "server.py", "--workers", "0"], "'0' is not a number of processes"),
        (["serve", "server.py", "--workers", "2", "--reload"], "not allowed with argument"),
        (["serve", "server.py", "--grace", "nan"], "'nan' is not a number of seconds"),
        (["serve", "server.py", "--lease", "0.5"], "'0.5' is not a number of seconds (1 to 86400)"),
        (["serve", "server.py", "--placement", "sticky"], "invalid choice: 'sticky'"),
        (["demo", "--nodes", "1"], "'1' is not a number of nodes"),
        (["migrate", "--dry-run", "--print-sql"], "not allowed with argument"),
    ],
)
def test_wrong_options_are_explained(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


# ---- the store


def test_doctor_tells_healthy_from_broken(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 0, 1 and 2; `--json` for machines; never the password (P13)."""
    monkeypatch.delenv("NONSTICK_STORE", raising=False)
    store = f"sqlite:///{home}/sessions.db"
    assert cli.main(["migrate", "--store", store]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the tables have version 1 now"
    assert cli.main(["migrate", "--store", store]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to do"
    assert cli.main(["doctor", "--store", store, "--json"]) == 0
    assert {finding["subject"] for finding in json.loads(capsys.readouterr().out)["findings"]} > {"wakes", "lease"}

    monkeypatch.setenv("NONSTICK_STORE", "redis://user:hunter2@127.0.0.1:1/0")
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "ERROR    reach  redis://127.0.0.1:1/0 cannot be used" in shown.out
    assert "hunter2" not in shown.out + shown.err
    monkeypatch.delenv("NONSTICK_STORE")
    for wrong in (["doctor"], ["doctor", "--store", "nope://hunter2"], ["doctor", "--store", "memory:", "missing.py"]):
        assert cli.main(wrong) == 2
        assert "hunter2" not in capsys.readouterr().err


def test_migrate_says_nothing_to_migrate(capsys: pytest.CaptureFixture[str]) -> None:
    """Redis and Valkey have no tables; the server is not even asked."""
    assert cli.main(["migrate", "--store", "redis://user:hunter2@127.0.0.1:1/0"]) == 0
    assert capsys.readouterr().out == "redis://127.0.0.1:1/0: nothing to migrate, this store has no tables\n"


@pytest.mark.slow
def test_doctor_shows_lines_a_server_lacks(home: Path) -> None:
    """With TARGET; and `serve` says the same in its log."""
    ended = nonstick(home, "doctor", "--store", "memory:", "server.py:mcp")
    assert ended.returncode == 0
    assert "cluster = nonstick.Cluster()" in ended.stdout


@pytest.mark.slow
def test_serve_says_what_server_lacks(start: Start) -> None:
    """Clients of 2026-07-28 need two things shared between nodes."""
    served = start("server.py:mcp")
    served.url()
    (told,) = [one["message"] for one in served.seen if "2026-07-28" in one["message"]]
    assert "cluster = nonstick.Cluster()" in told


# ---- it explains


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], ["serve", "doctor", "migrate", "demo", "examples:"]),
        (["doctor", "--help"], ["TARGET", "--store", "--json", "NONSTICK_STORE", "exit status", "examples:"]),
        (["migrate", "--help"], ["--store", "--dry-run", "--print-sql", "migrate=false", "examples:"]),
        (["serve", "--help"], ["TARGET is one of", "--store", "--answer", "NONSTICK_STORE", "/readyz", "examples:"]),
        (["demo", "--help"], ["--store", "--sdk", "--nodes", "examples:"]),
        (["--version"], ["nonstick "]),
    ],
)
def test_help_explains(capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert [word for word in said if word not in shown] == []


@pytest.mark.slow
def test_installed_command_runs(home: Path) -> None:
    ended = subprocess.run(
        [Path(sys.executable).with_name("nonstick"), "--version"],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    assert ended.stdout == f"nonstick {version('nonstick')}\n"


@pytest.mark.slow
def test_encryption_keys_come_from_the_environment(start: Start, home: Path) -> None:
    """P13: what is kept is not readable, and a node without the key does not serve it as if it were gone (P9)."""
    key = base64.b64encode(bytes(32)).decode()
    served, other = start("server.py", NONSTICK_ENCRYPTION_KEYS=key), start("server.py")
    headers = initialize(served.url())
    assert list_tools(served.seen[-1]["url"], headers) == 200
    kept = b"".join(file.read_bytes() for file in home.glob("sessions.db*"))
    assert b"2025-11-25" not in kept
    assert list_tools(other.url(), headers) == 503
    refused = nonstick(home, "serve", "server.py", NONSTICK_ENCRYPTION_KEYS="too-short")
    assert refused.returncode == 2
    assert "NONSTICK_ENCRYPTION_KEYS: encryption key 1 is not 32 bytes" in refused.stderr
    assert "too-short" not in refused.stderr
