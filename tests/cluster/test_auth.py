"""OAuth as the SDK and FastMCP set it up keeps working; a session is its principal's alone, on every node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from fastmcp import Context as FastMCPContext
from fastmcp import FastMCP
from fastmcp.server.auth import AuthProvider, JWTVerifier, MultiAuth, RemoteAuthProvider, StaticTokenVerifier
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider
from fastmcp.server.auth.providers.jwt import RSAKeyPair
from mcp.server import MCPServer
from mcp.server.auth.provider import AccessToken, AuthorizationParams
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context
from mcp.shared.auth import OAuthClientInformationFull
from pydantic import AnyHttpUrl, AnyUrl

from nonstick.core.names import session_key
from nonstick.core.record import Record
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import HEADERS, Cluster, Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.raw import Raw, send
from tests.cluster.servers import call, error, eventually, messages, opening, request
from tests.cluster.sse import getting, posting
from tests.cluster.stage import node_of

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning"),
]

ADA = "Bearer ada-1"
"""Of the SDK's set-up."""

RESOURCE = "https://server.example/mcp"

WHO: dict[str, dict[str, Any]] = {
    "ada-1": {"client_id": "app", "sub": "ada", "iss": "https://one"},
    "ada-2": {"client_id": "app", "sub": "ada", "iss": "https://one", "jti": "2"},
    "bob": {"client_id": "app", "sub": "bob", "iss": "https://one"},
    "ada elsewhere": {"client_id": "app", "sub": "ada", "iss": "https://two"},
    "ada's other app": {"client_id": "other", "sub": "ada", "iss": "https://one"},
    "nobody": {"client_id": "app"},
}
"""Who each token stands for."""

Bearer = Callable[[str], str]
"""The `Authorization` header of somebody in `WHO`."""


class Tokens:
    """The SDK's way: a verifier of one's own."""

    async def verify_token(self, token: str) -> AccessToken | None:
        who = WHO.get(token)
        if who is None:
            return None
        client, subject = who["client_id"], who.get("sub")
        return AccessToken(
            token=token, scopes=["use"], resource=RESOURCE, client_id=client, subject=subject, claims=who
        )


def server() -> MCPServer[Any]:
    auth = AuthSettings(
        issuer_url=AnyHttpUrl("https://issuer.example"),
        resource_server_url=AnyHttpUrl(RESOURCE),
        required_scopes=["use"],
        validate_token_resource=True,
    )
    server = MCPServer[Any]("secured", token_verifier=Tokens(), auth=auth)

    @server.tool()
    def echo(text: str) -> str:
        return text

    @server.tool()
    async def ask(ctx: Context[Any, Any]) -> str:
        return await _ask(ctx)

    return server


async def _ask(ctx: Any) -> str:
    """Asks the client, and waits for the test as well."""
    doors["asked"].set()
    reply = await ctx.session.elicit_form("Who?", FORM, related_request_id=ctx.request_id)
    await doors["answer"].wait()
    return f"done: {reply.content}"


FORM: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string"}}}

doors: dict[str, asyncio.Event] = {}


# ---- FastMCP's ways


@cache
def keys() -> RSAKeyPair:
    return RSAKeyPair.generate()


def jwt(name: str) -> str:
    who = dict(WHO[name])
    return keys().create_token(
        subject=who.pop("sub", ""), issuer=who.pop("iss", "https://one"), scopes=["use"], additional_claims=who
    )


def static() -> StaticTokenVerifier:
    tokens = {name: {**who, "scopes": ["use"]} for name, who in WHO.items()}
    return StaticTokenVerifier(tokens, required_scopes=["use"])


def remote() -> RemoteAuthProvider:
    verifier = JWTVerifier(public_key=keys().public_key, required_scopes=["use"])
    return RemoteAuthProvider(verifier, [AnyHttpUrl("https://issuer.example")], "https://server.example")


PROVIDERS: dict[str, tuple[Callable[[], AuthProvider] | None, Callable[[str], str]]] = {
    "sdk": (None, str),
    "fastmcp-static": (static, str),
    "fastmcp-jwt": (remote, jwt),
    "fastmcp-several": (lambda: MultiAuth(verifiers=[static(), JWTVerifier(public_key=keys().public_key)]), str),
}
"""A server's authentication, if it is FastMCP's, and how somebody's token is made for it."""


def fastmcp(auth: AuthProvider) -> FastMCP[Any]:
    server = FastMCP[Any]("secured", auth=auth)

    @server.tool
    def echo(text: str) -> str:
        return text

    @server.tool
    async def ask(ctx: FastMCPContext) -> str:
        return await _ask(ctx)

    return server


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def bearer(provider: str) -> Bearer:
    return lambda name: f"Bearer {PROVIDERS[provider][1](name)}"


@pytest.fixture
async def cluster(provider: str) -> AsyncIterator[Cluster]:
    doors.update(asked=asyncio.Event(), answer=asyncio.Event())
    auth = PROVIDERS[provider][0]
    async with Cluster(server if auth is None else lambda: fastmcp(auth()), one(MemoryStore())) as cluster:
        yield cluster


def as_(session: Session, authorization: str) -> Session:
    return Session(session.id, session.version, {"authorization": authorization})


def others() -> list[str]:
    return [name for name in WHO if not name.startswith("ada-")]


async def test_missing_or_bad_token_gets_401(cluster: Cluster, bearer: Bearer, provider: str) -> None:
    session = await cluster[0].open(authorization=bearer("ada-1"))
    for member in cluster:
        for headers in ({}, {"authorization": "Bearer forged"}, {"authorization": "Basic x"}):
            for method in ("POST", "GET", "DELETE"):
                raw = Raw("", call("echo", text="x"), method, "none", {"mcp-session-id": session.id, **headers})
                response = await send(member.client, member.url, raw, {})
                assert response.status_code == 401
                if provider in ("sdk", "fastmcp-jwt"):  # the others have no authorization server to name
                    assert "resource_metadata=" in response.headers["www-authenticate"]
        assert (await member.post(opening())).status_code == 401


@pytest.mark.parametrize("provider", ["sdk", "fastmcp-jwt"], indirect=True)
async def test_metadata_of_protected_resource_is_served(cluster: Cluster) -> None:
    for member in cluster:
        url = member.url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
        response = await member.client.get(url)
        assert response.status_code == 200
        assert response.json()["resource"] == "https://server.example/mcp"


async def test_record_holds_principal_and_no_token(cluster: Cluster, bearer: Bearer) -> None:
    """P2, P13."""
    session = await cluster[0].open(authorization=bearer("ada-1"))
    loaded = await cluster[1].app.manager.store.load(session_key(session.id))
    principal = Record.from_fields(loaded.fields).principal
    assert all(part in principal for part in (b"app", b"ada", b"https://one"))
    token = bearer("ada-1").partition(" ")[2].encode()
    assert not any(token in value for value in loaded.fields.values())


async def test_refreshed_token_keeps_the_session(cluster: Cluster, bearer: Bearer) -> None:
    """P1: the session is not bound to the token."""
    session = await cluster[0].open(authorization=bearer("ada-1"))
    for member in cluster:
        response = await member.post(call("echo", text="x"), as_(session, bearer("ada-2")))
        assert response.status_code == 200
        assert messages(response)[-1]["result"]["content"][0]["text"] == "x"
    assert (await cluster[2].delete(as_(session, bearer("ada-2")))).status_code == 200


@pytest.mark.parametrize("token", others())
async def test_another_principal_gets_ordinary_404(cluster: Cluster, bearer: Bearer, provider: str, token: str) -> None:
    """P1: on every method, with every kind of message, on every node; and nothing of it takes effect."""
    session = await cluster[0].open(authorization=bearer("ada-1"))
    intruder = as_(session, bearer(token))
    unknown = await cluster[0].post(request("ping"), as_(Session("u" * 32, "2025-11-25", {}), bearer(token)))
    assert unknown.status_code == 404
    sent: list[Any] = [
        call("echo", text="x"),
        opening(),
        request("logging/setLevel", {"level": "debug"}),
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
        {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": "srv-1", "progress": 1}},
        {"jsonrpc": "2.0", "id": "srv-1", "result": {}},
        {"jsonrpc": "2.0", "id": "srv-1", "error": {"code": 1, "message": "no"}},
        [call("echo", text="x")],
        {},
    ]
    for number, message in enumerate(sent):
        assert _same(await cluster[number % 3].post(message, intruder), unknown)
    for member in cluster:
        for method in ("GET", "DELETE") if provider != "sdk" else ("GET", "DELETE", "PUT"):
            for more in ({}, {"last-event-id": "0"}):
                raw = Raw("", method=method, session="none", headers={**HEADERS, **intruder.headers, **more})
                assert _same(await send(member.client, member.url, raw, {}), unknown)
        assert (await member.post(call("echo", text="x"), session)).status_code == 200


@pytest.mark.parametrize("provider", ["sdk"], indirect=True)  # FastMCP puts something into each session's state
async def test_parked_view_is_principals_alone(cluster: Cluster, bearer: Bearer) -> None:
    """P1: what the node kept of a session for its next request is for nobody else's."""
    session = await cluster[0].open(authorization=bearer("ada-1"))
    intruder, key = as_(session, bearer(others()[0])), session_key(session.id)
    node = node_of(cluster[1])
    for _ in range(2):
        assert (await cluster[1].post(call("echo", text="x"), session)).status_code == 200
        await eventually(lambda: key in node.sessions.parked)
        assert (await cluster[1].post(call("echo", text="x"), intruder)).status_code == 404
        assert key not in node.sessions


def _same(one_response: httpx2.Response, other: httpx2.Response) -> bool:
    def seen(response: httpx2.Response) -> Any:
        headers = {k: v for k, v in response.headers.items() if k not in ("date", "nonstick-node")}
        return response.status_code, response.text, headers

    return bool(seen(one_response) == seen(other))


async def test_another_principal_cannot_act_or_resume(cluster: Cluster, bearer: Bearer) -> None:
    """P1, P3, P4, P5: while a tool waits for its user, what somebody else sends or asks for does nothing at all."""
    session = await cluster[0].open(authorization=bearer("ada-1"), capabilities={"elicitation": {}})
    unknown = await cluster[0].post(request("ping"), as_(Session("u" * 32, "2025-11-25", {}), bearer("bob")))
    bob, refreshed = as_(session, bearer("bob")), as_(session, bearer("ada-2"))
    async with posting(cluster[0], session, call("ask", 5)) as stream:
        opened = await stream.event()
        server_request = (await stream.message())["id"]
        reply = {"jsonrpc": "2.0", "id": server_request}
        accepted = {**reply, "result": {"action": "accept", "content": {"name": "ada"}}}
        for member in cluster:
            for message in (
                {**reply, "result": {"action": "accept", "content": {"name": "bob"}}},
                {**reply, "error": {"code": 1, "message": "no"}},
                {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 5}},
                {
                    "jsonrpc": "2.0",
                    "method": "notifications/progress",
                    "params": {"progressToken": server_request, "progress": 1},
                },
            ):
                assert _same(await member.post(message, bob), unknown)
            assert opened.id is not None
            resume = {**HEADERS, **bob.headers, "last-event-id": opened.id}
            raw = Raw("", method="GET", session="none", headers=resume)
            assert _same(await send(member.client, member.url, raw, {}), unknown)
            assert _same(await member.delete(bob), unknown)
        # Of all these replies only this one counts, which comes with another token of the same principal.
        assert (await cluster[1].post(accepted, refreshed)).status_code == 202
        doors["answer"].set()
        async with getting(cluster[2], refreshed, opened.id) as resumed:
            told = await resumed.rest()
        assert told[0]["id"] == server_request
        assert told[-1]["result"]["content"][0]["text"] == "done: {'name': 'ada'}"


async def test_second_initialize_keeps_the_sessions_principal(cluster: Cluster, bearer: Bearer) -> None:
    session = await cluster[0].open(authorization=bearer("ada-1"))
    assert (await cluster[1].post(opening(), as_(session, bearer("ada-2")))).status_code == 200
    assert (await cluster[2].post(call("echo", text="x"), session)).status_code == 200
    refused = await cluster[2].post(call("echo", text="x"), as_(session, bearer("bob")))
    assert error(refused)["message"] == "Session not found"


async def test_anonymous_session_refuses_known_principals() -> None:
    """A store that replicas with and without authentication share mixes nothing up."""
    store = MemoryStore()
    async with (
        Cluster(lambda: MCPServer(server().name), one(store), nodes=1) as (unsecured,),
        Cluster(server, one(store), nodes=1) as (secured,),
    ):
        public, private = await unsecured.open(), await secured.open(authorization="Bearer ada-1")
        assert (await _status(secured, as_(public, "Bearer bob"))) == 404
        assert (await _status(unsecured, private)) == 404


async def _status(member: Member, session: Session) -> int:
    return (await member.post(request("ping"), session)).status_code


@pytest.mark.parametrize("make_store", ["memory", "sqlite", "valkey"], indirect=True)
async def test_sessions_of_principal_are_limited(make_store: MakeStore) -> None:
    """P10: counted in the whole store, by who it is and not by the token; a session that ends makes room."""
    async with Cluster(server, make_store, max_sessions_per_principal=2) as cluster:
        first = await cluster[0].open(authorization="Bearer ada-1")
        await cluster[1].open(authorization="Bearer ada-2")
        for member in cluster:
            refused = await member.post(opening(), authorization="Bearer ada-1")
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert "mcp-session-id" not in refused.headers
            assert "end one with DELETE" in error(refused)["message"]
        for token in others():
            await cluster[2].open(authorization=f"Bearer {token}")
        assert (await cluster[2].delete(first)).status_code == 200
        await cluster[0].open(authorization="Bearer ada-1")


async def test_anonymous_clients_have_no_principals_limit() -> None:
    """P10: they are all alike, so one could lock out the others."""
    async with Cluster(lambda: MCPServer("open"), one(MemoryStore()), max_sessions_per_principal=1) as cluster:
        for member in cluster:
            await member.open()


async def test_limit_of_principal_may_be_off() -> None:
    async with Cluster(server, one(MemoryStore()), nodes=1, max_sessions_per_principal=None) as (member,):
        for _ in range(3):
            await member.open(authorization="Bearer ada-1")


async def test_token_refreshed_by_fastmcp_keeps_session() -> None:
    """P1: the whole way, from the client's registration on. Another client has no part in it."""
    oauth = InMemoryOAuthProvider(base_url="https://server.example", required_scopes=["use"])
    async with Cluster(lambda: fastmcp(oauth), one(MemoryStore())) as cluster:
        old, refresh = await _tokens(oauth, "ada")
        stranger, _ = await _tokens(oauth, "bob")
        session = await cluster[0].open(authorization=f"Bearer {old}")
        new = await refresh()
        for member in cluster:
            assert (await member.post(call("echo", text="x"), as_(session, f"Bearer {new}"))).status_code == 200
            assert (await member.post(call("echo", text="x"), as_(session, f"Bearer {stranger}"))).status_code == 404
            assert (await member.post(call("echo", text="x"), as_(session, f"Bearer {old}"))).status_code == 401


async def _tokens(oauth: InMemoryOAuthProvider, name: str) -> tuple[str, Callable[[], Awaitable[str]]]:
    """A client's first token, and a function that refreshes it."""
    redirect = AnyUrl("http://localhost:1/callback")
    client = OAuthClientInformationFull(client_id=name, redirect_uris=[redirect], scope="use")
    await oauth.register_client(client)
    params = AuthorizationParams(
        state="s", scopes=["use"], code_challenge="c", redirect_uri=redirect, redirect_uri_provided_explicitly=True
    )
    (code,) = parse_qs(urlsplit(await oauth.authorize(client, params)).query)["code"]
    granted = await oauth.load_authorization_code(client, code)
    assert granted is not None
    tokens = await oauth.exchange_authorization_code(client, granted)

    async def refresh() -> str:
        assert tokens.refresh_token is not None
        known = await oauth.load_refresh_token(client, tokens.refresh_token)
        assert known is not None
        return (await oauth.exchange_refresh_token(client, known, ["use"])).access_token

    return tokens.access_token, refresh
