"""The SDK's OAuth set-up keeps working, and a session is its principal's alone, whichever node is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from mcp.server import MCPServer
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from pydantic import AnyHttpUrl

from nonstick.record import Record
from nonstick.security import session_key
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import HEADERS, Cluster, Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.raw import Raw, send
from tests.cluster.servers import call, error, messages, opening, request

pytestmark = pytest.mark.anyio

ADA = "Bearer ada-1"
RESOURCE = "https://server.example/mcp"


class Tokens:
    """Who each token stands for."""

    known: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "ada-1": {"client_id": "app", "subject": "ada", "claims": {"iss": "https://one"}},
        "ada-2": {"client_id": "app", "subject": "ada", "claims": {"iss": "https://one", "jti": "2"}},
        "bob": {"client_id": "app", "subject": "bob", "claims": {"iss": "https://one"}},
        "ada elsewhere": {"client_id": "app", "subject": "ada", "claims": {"iss": "https://two"}},
        "ada's other app": {"client_id": "other", "subject": "ada", "claims": {"iss": "https://one"}},
        "nobody": {"client_id": "app"},
    }

    async def verify_token(self, token: str) -> AccessToken | None:
        who = self.known.get(token)
        return None if who is None else AccessToken(token=token, scopes=["use"], resource=RESOURCE, **who)


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
    async def ask() -> str:
        doors["asked"].set()
        await doors["answer"].wait()
        return "done"

    return server


doors: dict[str, asyncio.Event] = {}


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    doors.update(asked=asyncio.Event(), answer=asyncio.Event())
    async with Cluster(server, one(MemoryStore())) as cluster:
        yield cluster


def as_(session: Session, token: str) -> Session:
    return Session(session.id, session.version, {"authorization": f"Bearer {token}"})


def others() -> list[str]:
    return [token for token in Tokens.known if not token.startswith("ada-")]


async def test_request_without_a_token_or_with_a_bad_one_gets_401(cluster: Cluster) -> None:
    session = await cluster[0].open(authorization=ADA)
    for member in cluster:
        for headers in ({}, {"authorization": "Bearer forged"}, {"authorization": "Basic x"}):
            for method in ("POST", "GET", "DELETE"):
                raw = Raw("", call("echo", text="x"), method, "none", {"mcp-session-id": session.id, **headers})
                response = await send(member.client, member.url, raw, {})
                assert response.status_code == 401
                assert "resource_metadata=" in response.headers["www-authenticate"]
        assert (await member.post(opening())).status_code == 401


async def test_metadata_of_the_protected_resource_is_still_served(cluster: Cluster) -> None:
    for member in cluster:
        url = member.url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
        response = await member.client.get(url)
        assert response.status_code == 200
        assert response.json()["resource"] == "https://server.example/mcp"


async def test_principal_is_in_the_record_and_the_token_is_not(cluster: Cluster) -> None:
    """P2, P13."""
    session = await cluster[0].open(authorization=ADA)
    loaded = await cluster[1].app.manager.store.load(session_key(session.id))
    principal = Record.from_fields(loaded.fields).principal
    assert all(part in principal for part in (b"app", b"ada", b"https://one"))
    assert not any(b"ada-1" in value for value in loaded.fields.values())


async def test_refreshed_token_of_the_same_principal_keeps_the_session(cluster: Cluster) -> None:
    """P1: the session is not bound to the token."""
    session = await cluster[0].open(authorization=ADA)
    for member in cluster:
        response = await member.post(call("echo", text="x"), as_(session, "ada-2"))
        assert response.status_code == 200
        assert messages(response)[-1]["result"]["content"][0]["text"] == "x"
    assert (await cluster[2].delete(as_(session, "ada-2"))).status_code == 200


@pytest.mark.parametrize("token", others())
async def test_another_principal_gets_the_404_of_an_unknown_session(cluster: Cluster, token: str) -> None:
    """P1: on every method, with every kind of message, on every node; and nothing of it takes effect."""
    session = await cluster[0].open(authorization=ADA)
    intruder = as_(session, token)
    unknown = await cluster[0].post(request("ping"), as_(Session("u" * 32, "2025-11-25", {}), token))
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
        for method in ("GET", "DELETE", "PUT"):
            raw = Raw("", method=method, session="none", headers={**HEADERS, **intruder.headers})
            assert _same(await send(member.client, member.url, raw, {}), unknown)
        assert (await member.post(call("echo", text="x"), session)).status_code == 200


def _same(one_response: httpx2.Response, other: httpx2.Response) -> bool:
    def seen(response: httpx2.Response) -> Any:
        headers = {k: v for k, v in response.headers.items() if k not in ("date", "nonstick-node")}
        return response.status_code, response.text, headers

    return bool(seen(one_response) == seen(other))


async def test_another_principal_cannot_cancel_a_running_request(cluster: Cluster) -> None:
    """P5 is for those whose session it is."""
    session = await cluster[0].open(authorization=ADA)
    running = asyncio.create_task(cluster[0].post(call("ask", 5), session))
    await doors["asked"].wait()
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 5}}
    assert (await cluster[0].post(cancel, as_(session, "bob"))).status_code == 404
    doors["answer"].set()
    assert messages(await running)[-1]["result"]["content"][0]["text"] == "done"


async def test_second_initialize_does_not_change_whose_session_it_is(cluster: Cluster) -> None:
    session = await cluster[0].open(authorization=ADA)
    assert (await cluster[1].post(opening(), as_(session, "ada-2"))).status_code == 200
    assert (await cluster[2].post(call("echo", text="x"), session)).status_code == 200
    refused = await cluster[2].post(call("echo", text="x"), as_(session, "bob"))
    assert error(refused)["message"] == "Session not found"


async def test_session_without_a_principal_is_not_for_those_who_have_one() -> None:
    """A store that servers with and without authentication share mixes nothing up."""
    store = MemoryStore()
    async with (
        Cluster(lambda: MCPServer("open"), one(store), nodes=1) as (unsecured,),
        Cluster(server, one(store), nodes=1) as (secured,),
    ):
        public, private = await unsecured.open(), await secured.open(authorization=ADA)
        assert (await _status(secured, as_(public, "bob"))) == 404
        assert (await _status(unsecured, private)) == 404


async def _status(member: Member, session: Session) -> int:
    return (await member.post(request("ping"), session)).status_code


@pytest.mark.parametrize("make_store", ["memory", "sqlite", "valkey"], indirect=True)
async def test_sessions_of_one_principal_are_limited_and_nobody_elses_for_it(make_store: MakeStore) -> None:
    """P10: counted in the whole store, by who it is and not by the token; a session that ends makes room."""
    async with Cluster(server, make_store, max_sessions_per_principal=2) as cluster:
        first = await cluster[0].open(authorization=ADA)
        await cluster[1].open(authorization="Bearer ada-2")
        for member in cluster:
            refused = await member.post(opening(), authorization=ADA)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert "mcp-session-id" not in refused.headers
            assert "end one with DELETE" in error(refused)["message"]
        for token in others():
            await cluster[2].open(authorization=f"Bearer {token}")
        assert (await cluster[2].delete(first)).status_code == 200
        await cluster[0].open(authorization=ADA)


async def test_limit_for_a_principal_is_none_for_those_without_authentication() -> None:
    """P10: they are all alike, so one could lock out the others."""
    async with Cluster(lambda: MCPServer("open"), one(MemoryStore()), max_sessions_per_principal=1) as cluster:
        for member in cluster:
            await member.open()


async def test_limit_for_a_principal_may_be_turned_off() -> None:
    async with Cluster(server, one(MemoryStore()), nodes=1, max_sessions_per_principal=None) as (member,):
        for _ in range(3):
            await member.open(authorization=ADA)
