"""`nonstick doctor`: every store is tried as two nodes would, and what is wrong is told with what to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis
from fastmcp import FastMCP
from mcp.server import MCPServer, Server

import nonstick
from nonstick.adopt import Adopted
from nonstick.cluster import Cluster
from nonstick.commands import doctor
from nonstick.commands.checks import check_shared, check_state
from nonstick.commands.doctor import as_json, as_text, diagnose, failed
from nonstick.errors import SessionNotFound, StoreUnavailable
from nonstick.store import MAX_READ_BYTES, Cursor, Event, Lease, Wake
from nonstick.stores import open_store
from nonstick.stores.common.upkeep import Finding
from nonstick.stores.memory import MemoryStore
from nonstick.stores.sqlite import SQLiteStore
from nonstick.testing import ValkeyServer

pytestmark = pytest.mark.anyio

SECRET = "hunter2"


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer(appendonly=True) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not come in memory does not come."""
    monkeypatch.setattr(doctor, "WAKE_SECONDS", 0.05)
    monkeypatch.setattr(doctor, "LEASE_SECONDS", (0.05, 1.0, 20.0))
    monkeypatch.setattr(doctor, "LAPSE_SECONDS", 0.05)


# ---- what is found


async def test_healthy_store_keeps_nothing_of_doctors(server: ValkeyServer) -> None:
    """Every part of the protocol is tried, and what was written is removed."""
    findings = await diagnose(lambda: open_store(server.url))
    assert [finding for finding in findings if finding.level != "ok"] == []
    found = by_subject(findings)
    assert found.keys() >= {"reach", "load", "append", "wakes", "sharing", "end", "lease"}
    assert "p50" in found["load"].text
    assert "p99" in found["append"].text
    assert "all is well" in as_text(findings)
    async with redis.Redis.from_url(server.url) as admin:
        assert [key for key in await admin.keys("*") if key not in (b"nonstick:ping", b"nonstick:mark")] == []


async def test_memory_store_is_not_called_shared() -> None:
    """One instance acts as both nodes, and nothing is said of another one."""
    findings = await diagnose(MemoryStore, alone=True)
    found = by_subject(findings)
    assert "nobody shares" in found["sharing"].text
    assert found["wakes"].text.startswith("10 of 10 arrived on the one node")
    assert found["end"].text == "a session that one node ends is gone"


@pytest.mark.usefixtures("impatient")
async def test_minimal_store_is_tried_too() -> None:
    """A store of somebody else's needs no method beside the protocol's."""
    made: list[str] = []

    class Recorded(MemoryStore):
        async def create(self, key: str, *args: Any, **options: Any) -> None:
            made.append(key)
            await super().create(key, *args, **options)

    store = Recorded()
    findings = await diagnose(lambda: store)
    assert {finding.level for finding in findings} == {"ok"}
    (key,) = made
    with pytest.raises(SessionNotFound):
        await store.load(key)


class Silent(MemoryStore):
    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return super().watch(key, lambda news: None if news else wake(None))


class Deaf(MemoryStore):
    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return lambda: None


class Torn(MemoryStore):
    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        return (await super().read(key, after, limit=limit, max_bytes=max_bytes))[:-1]


class Immortal(MemoryStore):
    async def delete(self, key: str) -> bool:
        return True


class Lying(MemoryStore):
    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        return set(nodes)


class LyingLate(Lying):
    """The lease may have lapsed meanwhile, if it is not longer than this."""

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        await asyncio.sleep(0.2)
        return await super().lapsed(nodes)


class Stopped(MemoryStore):
    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        return set()


class Forbidden(MemoryStore):
    def lease(self, node: str) -> Lease:
        raise StoreUnavailable("the store's user lacks a permission")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("kind", "subject"),
    [
        (Silent, "wakes"),
        (Deaf, "wakes"),
        (Torn, "sharing"),
        (Immortal, "end"),
        (Lying, "lease"),
        (LyingLate, "lease"),
        (Stopped, "lease"),
        (Forbidden, "trial"),
    ],
)
async def test_store_fault_is_error_with_advice(kind: type[MemoryStore], subject: str) -> None:
    """One fault, one error: the rest is tried all the same, up to what cannot go on."""
    store = kind()
    findings = await diagnose(lambda: store)
    errors = [finding for finding in findings if finding.level == "error"]
    assert [finding.subject for finding in errors][:1] == [subject]
    assert all(finding.advice for finding in errors)
    assert failed(findings)


@pytest.mark.usefixtures("impatient")
async def test_slow_store_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request waits for a round trip at least."""

    class Slow(MemoryStore):
        async def load(self, key: str, *, renew: bool = True) -> Any:
            await asyncio.sleep(0.02)
            return await super().load(key, renew=renew)

    monkeypatch.setattr(doctor, "SLOW_SECONDS", 0.01)
    store = Slow()
    load = by_subject(await diagnose(lambda: store))["load"]
    assert load.level == "warning"
    assert "near the nodes" in load.advice


async def test_unreachable_store_is_error_without_password() -> None:
    """P13: neither in the findings nor in what is shown of them."""
    findings = await diagnose(lambda: open_store(f"redis://user:{SECRET}@127.0.0.1:1/0"))
    assert [(finding.subject, finding.level) for finding in findings] == [("reach", "error")]
    assert SECRET not in as_text(findings) + as_json(findings) + repr(findings)


async def test_forbidden_subscription_means_no_wakes(server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor notices what no single command shows: the other node hears nothing."""
    monkeypatch.setattr(doctor, "WAKE_SECONDS", 0.3)
    admin: Any
    async with redis.Redis.from_url(server.url) as admin:
        await admin.execute_command("ACL", "SETUSER", "deaf", "on", "nopass", "~*", "&*", "+@all", "-subscribe")
    url = server.url.replace("redis://", f"redis://deaf:{SECRET}@")
    found = by_subject(await diagnose(lambda: open_store(url)))
    assert found["wakes"].level == "error"
    assert "rights on the channels" in found["wakes"].advice
    assert {one.subject for one in found.values() if one.level == "error"} == {"wakes"}
    assert SECRET not in repr(found)


# ---- SQLite


async def test_missing_sqlite_file_is_not_made(tmp_path: Path) -> None:
    """The doctor makes no tables: it says who does."""
    findings = await diagnose(lambda: SQLiteStore(tmp_path / "sessions.db"))
    assert by_subject(findings)["schema"].level == "warning"
    assert by_subject(findings)["trial"].text == "nothing was tried"
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240


async def test_open_sqlite_file_is_examined_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside the processes that use it, and after they have gone."""
    monkeypatch.setattr("nonstick.stores.sqlite.examine.checkpoints_race", lambda: False)
    tmp_path.chmod(0o700)  # noqa: ASYNC240
    store = SQLiteStore(tmp_path / "sessions.db")
    async with store:
        await store.create("key", {}, lifetime=60)
        assert {finding.level for finding in await store.examine()} == {"ok"}
    assert {finding.level for finding in await store.examine()} == {"ok"}
    async with store:
        await store.load("key")


async def test_badly_placed_sqlite_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system, a missing directory, a full disk, an old library, a file for all to read."""
    found = by_subject(await SQLiteStore(tmp_path / "missing" / "sessions.db").examine())
    assert (found["permissions"].level, found["permissions"].blocks) == ("error", True)
    assert "mkdir -p" in found["permissions"].advice

    path = tmp_path / "sessions.db"
    async with SQLiteStore(path):
        pass
    tmp_path.chmod(0o755)  # noqa: ASYNC240
    path.chmod(0o644)
    monkeypatch.setattr("nonstick.stores.sqlite.examine.checkpoints_race", lambda: True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    found = by_subject(await SQLiteStore(path).examine())
    assert (found["version"].level, found["disk"].level, found["privacy"].level) == ("warning", "error", "warning")

    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 0:1 / {tmp_path} rw - nfs4 server:/x rw\n")
    monkeypatch.setattr("nonstick.stores.sqlite.file.MOUNTS", mounts)
    found = by_subject(await SQLiteStore(path).examine())
    assert (found["place"].level, found["place"].blocks) == ("error", True)


# ---- the server


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other test's cluster is in this process."""
    monkeypatch.setattr(Cluster, "_made", type(Cluster._made)())


def adopted(server: Any) -> Adopted:
    """What `nonstick.app` makes of it."""
    found: Adopted = nonstick.app(server, store="memory:").state.nonstick
    return found


@pytest.mark.usefixtures("alone")
async def test_missing_cluster_is_told_with_lines() -> None:
    """Both things that clients of 2026-07-28 need shared are missed on other nodes."""
    (finding,) = await check_shared(adopted(MCPServer("x")))
    assert finding.level == "warning"
    assert "subscriptions/listen" in finding.text
    assert "requestState" in finding.text
    assert "cluster = nonstick.Cluster()\nmcp = MCPServer(" in finding.advice


@pytest.mark.usefixtures("alone")
async def test_server_with_a_cluster_is_well() -> None:
    """Those lines are enough."""
    cluster = nonstick.Cluster()
    security = cluster.request_state_security
    server = MCPServer("x", subscriptions=cluster.subscription_bus, request_state_security=security)
    assert [finding.level for finding in await check_shared(adopted(server))] == ["ok"]


@pytest.mark.usefixtures("alone")
async def test_half_of_a_cluster_is_told() -> None:
    """What nobody has taken is in no server."""
    cluster = nonstick.Cluster()
    server = MCPServer("x", subscriptions=cluster.subscription_bus)
    (finding,) = await check_shared(adopted(server))
    assert "subscriptions/listen" not in finding.text
    assert "requestState" in finding.text


@pytest.mark.usefixtures("alone")
async def test_missing_fastmcp_cluster_is_told() -> None:
    """It seals each requestState, and gets its bus from nonstick."""
    (finding,) = await check_shared(adopted(FastMCP("x")))
    assert "mcp = FastMCP(..., request_state_security=cluster.request_state_security)" in finding.advice
    cluster = nonstick.Cluster()
    server: FastMCP[Any] = FastMCP("x", request_state_security=cluster.request_state_security)
    app = nonstick.app(server, store="memory:")
    (finding,) = await check_shared(app.state.nonstick)
    assert "whether this server did is not known before it runs" in finding.text
    async with app.lifespan():
        assert [finding.level for finding in await check_shared(app.state.nonstick)] == ["ok"]


@pytest.mark.usefixtures("alone")
async def test_keys_of_another_server_count_nothing() -> None:
    """P17: an attribute that somebody has read says nothing; what the server uses does."""
    cluster = nonstick.Cluster()
    with_it = MCPServer(
        "x", subscriptions=cluster.subscription_bus, request_state_security=cluster.request_state_security
    )
    (finding,) = await check_shared(adopted(MCPServer("y")))
    assert "subscriptions/listen" in finding.text
    assert "requestState" in finding.text
    other = nonstick.Cluster()
    app = nonstick.app(with_it, store="memory:", cluster=other)
    (finding,) = await check_shared(app.state.nonstick)
    assert "one that nonstick.app() is given" in finding.advice
    assert "requestState" in finding.text


@pytest.mark.usefixtures("alone")
async def test_unused_keys_of_fastmcp_are_told() -> None:
    """P17."""
    cluster = nonstick.Cluster()
    assert cluster.request_state_security is not None
    app = nonstick.app(FastMCP("x"), store="memory:")
    async with app.lifespan():
        (finding,) = await check_shared(app.state.nonstick)
    assert "requestState" in finding.text


@pytest.mark.usefixtures("alone")
async def test_mounted_servers_are_examined_too(caplog: pytest.LogCaptureFixture) -> None:
    """P17: at any depth and under any name, by the doctor and when the server starts; each by its name."""
    cluster = nonstick.Cluster()

    def make(name: str, *, shared: bool) -> FastMCP[Any]:
        return FastMCP(name, session_state_store=cluster.session_state_store if shared else None)

    outer, plain, named, good, deep = (
        make(name, shared=name in ("outer", "good")) for name in ("outer", "plain", "named", "good", "deep")
    )
    outer.mount(plain)
    outer.mount(named, namespace="n")
    outer.mount(good, namespace="g", tool_names={"a": "b"})
    good.mount(deep, namespace="d")
    app = nonstick.app(outer, store="memory:")
    (finding,) = await check_state(app.state.nonstick)
    assert finding.level == "warning"
    for name, apart in (("outer", False), ("plain", True), ("named", True), ("good", False), ("deep", True)):
        assert (repr(name) in finding.text) == apart
    async with app.lifespan():
        pass
    for name, apart in (("outer", False), ("plain", True), ("named", True), ("good", False), ("deep", True)):
        told = f"FastMCP server {name!r} was not built with nonstick's state store"
        assert any(told in record.getMessage() for record in caplog.records) == apart


@pytest.mark.usefixtures("alone")
async def test_missing_shared_state_store_is_told() -> None:
    """Nothing else says that `ctx.set_state()` is of one node only."""
    (finding,) = await check_state(adopted(FastMCP("x")))
    assert "ctx.set_state()" in finding.text
    assert "session_state_store=cluster.session_state_store" in finding.advice
    cluster = nonstick.Cluster()
    server: FastMCP[Any] = FastMCP("x", session_state_store=cluster.session_state_store)
    assert [finding.level for finding in await check_state(adopted(server))] == ["ok"]
    assert not await check_state(adopted(MCPServer("x")))


@pytest.mark.usefixtures("alone")
async def test_server_sharing_nothing_is_well() -> None:
    """A low-level server without `subscriptions/listen` that seals no requestState."""
    assert [finding.level for finding in await check_shared(adopted(Server("x")))] == ["ok"]


# ---- what is shown


async def test_advice_stands_below_aligned_lines() -> None:
    """Readable in 100 columns, code as it is."""
    findings = [
        Finding("ok", "version", "Valkey 9"),
        Finding("error", "x", "word " * 30, "do this\nfirst line\n  second line"),
    ]
    shown = as_text(findings).splitlines()
    assert shown[0] == "ok       version  Valkey 9"
    assert shown[1].startswith("ERROR    x        word word")
    assert all(len(line) <= 100 for line in shown)
    assert "                  -> do this" in shown
    assert " " * 21 + "first line" in shown
    assert " " * 21 + "  second line" in shown
    assert shown[-1] == "1 error"


async def test_json_holds_the_same() -> None:
    """For machines: `ok`, and a list of findings."""
    told = json.loads(as_json([Finding("warning", "disk", "little", "Make room."), Finding("ok", "clock", "right")]))
    assert told == {
        "ok": True,
        "findings": [
            {"level": "warning", "subject": "disk", "text": "little", "advice": "Make room."},
            {"level": "ok", "subject": "clock", "text": "right", "advice": None},
        ],
    }
