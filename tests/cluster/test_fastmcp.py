"""What FastMCP keeps for a session, looked at from the inside. What its clients see: tests/clients/test_fastmcp.py."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
from fastmcp import Context, FastMCP
from fastmcp.server.auth import StaticTokenVerifier
from fastmcp.server.middleware import Middleware
from fastmcp.server.sessions import SessionProvider, UserSession
from mcp.shared.exceptions import MCPError
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import nonstick
from nonstick.core.names import session_key
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Member
from tests.cluster.servers import call, error, eventually, messages, opening, request

pytestmark = pytest.mark.anyio


class OnOpening(Middleware):
    """Keeps something for the session before it is open."""

    async def on_initialize(self, context: Any, call_next: Any) -> Any:
        assert context.fastmcp_context is not None
        await context.fastmcp_context.set_state("greeting", "hello")
        if context.message.params.client_info.name == "bad":
            raise MCPError(-32000, "go away")
        return await call_next(context)


USERS = StaticTokenVerifier(
    {name: {"client_id": "app", "sub": name, "subject": name, "scopes": []} for name in ("ada", "bob", "eve")}
)
MODERN = "2026-07-28"


def make(cluster: nonstick.Cluster, auth: Any = None) -> FastMCP[Any]:
    server = FastMCP[Any](
        "kept",
        auth=auth,
        session_state_store=cluster.session_state_store,
        request_state_security=cluster.request_state_security,
        middleware=[OnOpening()],
    )

    @server.tool
    async def put(key: str, value: Any, ctx: Context) -> str:
        await ctx.set_state(key, value)
        return ctx.session_id

    @server.tool
    async def get(key: str, ctx: Context) -> Any:
        return {"value": await ctx.get_state(key)}

    @server.tool
    async def put_and_get(key: str, value: Any, ctx: Context) -> Any:
        before = await ctx.get_state(key)
        await ctx.set_state(key, value)
        return {"value": [before, await ctx.get_state(key)]}

    @server.tool
    async def forget(key: str, ctx: Context) -> str:
        await ctx.delete_state(key)
        return "done"

    @server.tool
    async def remember(value: str, session: UserSession) -> Any:
        before = await session.get("value")
        await session.set("value", value)
        return {"value": before}

    inner = FastMCP[Any]("inner")

    @inner.tool
    async def where(ctx: Context) -> str:
        await ctx.set_state("here", True)
        return "inner"

    server.mount(inner, "inner")
    server.add_provider(SessionProvider())
    return server


@asynccontextmanager
async def nodes(store: MemoryStore, auth: Any = None, **options: Any) -> AsyncIterator[list[Member]]:
    members = []
    try:
        for name in ("a", "b", "c"):
            cluster = nonstick.Cluster()
            app = nonstick.app(make(cluster, auth), store=store, cluster=cluster, node_name=name, grace=2.0, **options)
            members.append(Member(name, app))
            await members[-1].start()
        yield members
    finally:
        for member in members:
            await member.stop()


def value(response: Any) -> Any:
    return messages(response)[-1]["result"]["structuredContent"]["value"]


async def test_store_holds_no_session_id() -> None:
    """P13: FastMCP puts it into the session state and into its keys."""
    store = MemoryStore()
    async with nodes(store) as (a, b, _):
        session = await a.open()
        said = await b.post(call("put", key="cart", value=[1]), session)
        assert messages(said)[-1]["result"]["structuredContent"]["result"] == session.id
        fields = (await store.load(session_key(session.id))).fields
        assert not any(session.id in name or session.id.encode() in data for name, data in fields.items())
        assert not any(name.startswith("state:") for name in fields)


async def test_state_kept_while_opening_stays() -> None:
    """P2: on every node; of one whose `initialize` failed nothing is left."""
    store = MemoryStore()
    async with nodes(store) as members:
        session = await members[0].open()
        for member in members:
            assert value(await member.post(call("get", key="greeting"), session)) == "hello"
        refused = await members[1].post(opening(clientInfo={"name": "bad", "version": "1"}))
        assert error(refused)["message"] == "go away"
        assert "mcp-session-id" not in refused.headers


async def test_log_level_costs_idle_node_nothing() -> None:
    """P10: FastMCP's own handler would keep the session's live view on the node for good."""
    store = MemoryStore()
    async with nodes(store) as (a, b, _):
        session = await a.open()
        assert (await b.post(request("logging/setLevel", {"level": "error"}), session)).status_code == 200
        assert (await store.load(session_key(session.id))).fields["level"] == b"error"
        for member in (a, b):
            node = member.app.manager._node
            assert node is not None
            await eventually(lambda node=node: not node.sessions)  # type: ignore[misc]


async def test_session_state_is_encrypted_with_store() -> None:
    """P13."""
    store, key = MemoryStore(), secrets.token_bytes(32)
    async with nodes(store, encryption_keys=[key]) as (a, b, c):
        session = await a.open()
        await b.post(call("put", key="pin", value="secret words"), session)
        assert value(await c.post(call("get", key="pin"), session)) == "secret words"
        fields = (await store.load(session_key(session.id))).fields
        assert not any(b"secret words" in data for data in fields.values())


# ---- requests without a session


class Counted(MemoryStore):
    """Notes which records were made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    async def create(self, key: str, *args: Any, **kwargs: Any) -> None:
        await super().create(key, *args, **kwargs)
        self.made.append(key)


async def without_session(member: Member, tool: str, /, *, headers: dict[str, str], **arguments: Any) -> Any:
    """A call as a client of 2026-07-28 makes it."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    message = request("tools/call", {"name": tool, "arguments": arguments, "_meta": meta})
    standard = {"mcp-protocol-version": MODERN, "mcp-method": "tools/call", "mcp-name": tool}
    response = await member.post(message, None, **standard, **headers)
    assert response.status_code == 200, response.text
    assert "mcp-session-id" not in response.headers
    return messages(response)[-1]["result"]


async def test_sessionless_request_reaches_no_record() -> None:
    """P1: neither somebody else's nor its own, on any node, with a token or without."""
    for auth in (USERS, None):
        store = Counted()
        async with nodes(store, auth) as (a, b, c):

            def as_(name: str, auth: Any = auth) -> dict[str, Any]:
                return {} if auth is None else {"authorization": f"Bearer {name}"}

            session = await a.open(**as_("ada"))
            await b.post(call("put", key="pin", value="1234"), session)
            before = (await store.load(session_key(session.id))).fields
            for member, name in ((b, "eve"), (c, "ada")):
                named = as_(name) | {"mcp-session-id": session.id}
                got = await without_session(member, "get", headers=named, key="pin")
                assert got["structuredContent"]["value"] is None
                said = await without_session(member, "put", headers=named, key="pin", value="mine")
                assert said["structuredContent"]["result"] != session.id
                await without_session(member, "forget", headers=named, key="pin")
            assert (await store.load(session_key(session.id))).fields == before
            assert value(await c.post(call("get", key="pin"), session)) == "1234"


async def test_stateless_server_reaches_no_record() -> None:
    """P1: its requests have no session either, of whichever version."""
    store = Counted()
    async with nodes(store) as (a, _, _):
        session = await a.open()
        await a.post(call("put", key="pin", value="1234"), session)
        async with nodes(store, stateless_http=True) as (d, e, _):
            for member in (d, e):
                assert value(await member.post(call("get", key="pin"), session)) is None
                await member.post(call("put", key="pin", value="other"), session)
        assert value(await a.post(call("get", key="pin"), session)) == "1234"


async def test_sessionless_request_leaves_nothing() -> None:
    """P10: FastMCP gives each a name of its own, under which nobody asks again. Made-up session ids leave nothing."""
    store = Counted()
    async with nodes(store, max_state_records=1) as (a, b, _):
        made = list(store.made)
        for number in range(20):
            headers = {"mcp-session-id": secrets.token_urlsafe(24)} if number % 2 else {}
            kept = await without_session(a if number % 3 else b, "put_and_get", headers=headers, key="x", value=number)
            assert kept["structuredContent"]["value"] == [None, number]
        assert store.made == made


async def test_sessionless_values_are_limited_per_user() -> None:
    """P10: with an error that says which limit it was; what is there stays, and goes on."""
    store = Counted()
    async with nodes(store, USERS, max_state_records=4, max_state_records_per_principal=2) as members:
        a, b, c = members

        async def mint(member: Member, name: str) -> Any:
            return await without_session(member, "create_session", headers={"authorization": f"Bearer {name}"})

        for member in (a, b):
            assert not (await mint(member, "ada")).get("isError")
        refused = await mint(c, "ada")
        assert refused["isError"]
        assert "max_state_records_per_principal" in refused["content"][0]["text"]
        for member in (c, a):
            headers = {"authorization": "Bearer bob"}
            kept = await without_session(member, "remember", headers=headers, value="x")
            assert not kept.get("isError")
        assert kept["structuredContent"]["value"] == "x"
        assert not (await mint(b, "bob")).get("isError")
        refused = await mint(b, "eve")
        assert "(max_state_records)" in refused["content"][0]["text"]


# ---- traces


@pytest.fixture
def spans() -> Iterator[Callable[[], list[Any]]]:
    """What is exported, as OpenTelemetry's own SDK exports it."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    exporter = InMemorySpanExporter()
    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield lambda: list(exporter.get_finished_spans())
    exporter.shutdown()


@pytest.mark.parametrize("ids", ["hashed", "raw"])
async def test_spans_hash_the_sessions_id(spans: Callable[[], list[Any]], ids: Literal["hashed", "raw"]) -> None:
    """P13: whoever reads the traces could use the session. On every node, also where a mounted server runs the tool."""
    async with nodes(MemoryStore(), trace_session_ids=ids) as members:
        session = await members[0].open()
        for member in members:
            answer = await member.post(call("put", key="cart", value=[1]), session)
            assert messages(answer)[-1]["result"]["structuredContent"]["result"] == session.id
            await member.post(call("inner_where"), session)
            await member.post(call("nothing"), session)
            await member.post(request("logging/setLevel", {"level": "error"}), session)
    said = [json.loads(span.to_json()) for span in spans()]
    named = {span["attributes"]["mcp.session.id"] for span in said if "mcp.session.id" in span["attributes"]}
    assert named == {session_key(session.id)[:12] if ids == "hashed" else session.id}
    assert sum(span["name"] == "tools/call put" for span in said) == 3
    assert (session.id in json.dumps(said)) == (ids == "raw")
