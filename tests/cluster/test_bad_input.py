"""Whatever a client sends, a node answers it, says what is wrong, and serves everybody else as before."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from nonstick.core.names import new_session_id, session_key
from nonstick.core.record import opening_fields
from nonstick.errors import SessionNotFound
from nonstick.log.cluster_log import CLUSTER_KEY
from nonstick.store import Cursor, Loaded, Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing import ManualClock
from nonstick.testing.cluster import HEADERS, Cluster, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.raw import BAD, GOOD, Raw, outcome, send
from tests.cluster.servers import World, answer, call, error, eventually, messages, opening, request

pytestmark = pytest.mark.anyio


@pytest.fixture
def shared() -> World:
    return World()


@pytest.fixture
async def cluster(shared: World, make_store: MakeStore) -> AsyncIterator[Cluster]:
    async with Cluster(shared.server, make_store) as cluster:
        yield cluster


@pytest.fixture
async def in_memory(shared: World) -> AsyncIterator[Cluster]:
    """For what does not depend on the store."""
    async with Cluster(shared.server, one(MemoryStore())) as cluster:
        yield cluster


async def test_no_bad_request_is_servers_fault(
    cluster: Cluster, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    """No 5xx, no traceback, nothing in the session's log; and the session is as good as before, on every node."""
    sessions = {"live": await cluster[0].open(), "fresh": await cluster[0].open(initialized=False)}
    statuses: dict[str, int] = {}
    for number, raw in enumerate(BAD):
        member = cluster[number % 3]
        response = await send(member.client, member.url, raw, sessions)
        statuses[raw.name] = response.status_code
        assert response.status_code < 500, raw.name
        assert "Traceback" not in response.text
    for record in caplog.records:
        # A handler that raises is the one thing that is worth a traceback.
        assert record.levelno < logging.ERROR or record.getMessage() == "handler for 'tools/call' raised"
    for member in cluster:
        assert answer(await member.post(call("echo", ok=member.name), sessions["live"])) == {"ok": member.name}
    async with make_store() as store:
        assert await store.read(session_key(sessions["live"].id), Cursor(0)) == []
    assert {200, 202, 400, 403, 404, 405, 406, 413, 415, 421} == set(statuses.values())


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("empty body", 400),
        ("batch", 400),
        ("NaN", 400),
        ("very deeply nested lists", 400),
        # As the SDK: what has no valid id is a notification.
        ("id null", 202),
        ("id true", 202),
        ("no session id", 400),
        ("GET without session id", 400),
        ("DELETE without session id", 400),
        ("text content type", 400),
        ("accept JSON only", 406),
        ("GET that accepts JSON", 406),
        ("PUT", 405),
        ("large body", 413),
        ("other host", 421),
        ("other origin", 403),
        ("unknown session id, PUT", 404),
    ],
)
async def test_bad_request_gets_fitting_status(in_memory: Cluster, name: str, status: int) -> None:
    sessions = {"live": await in_memory[0].open()}
    (raw,) = (raw for raw in BAD if raw.name == name)
    for member in in_memory:
        response = await send(member.client, member.url, raw, sessions)
        assert response.status_code == status
        assert (response.headers.get("allow") is not None) == (status == 405)


async def test_every_node_serves_allowed_requests(cluster: Cluster) -> None:
    sessions = {"live": await cluster[0].open(), "fresh": await cluster[0].open(initialized=False)}
    for number, raw in enumerate(GOOD):
        response = await send(cluster[number % 3].client, cluster[number % 3].url, raw, sessions)
        assert response.status_code in (200, 202), raw.name
        assert outcome(response).code is None, raw.name


# ---- session ids


async def test_unusable_ids_get_the_same_404(shared: World) -> None:
    """P1: unknown, expired, ended, foreign and malformed: nobody learns which it was."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    async with Cluster(shared.server, one(store)) as cluster:
        expired = await cluster[0].open()
        await clock.advance(1801)
        ended = await cluster[0].open()
        await cluster[1].delete(ended)
        foreign = Session(new_session_id(), "2025-11-25", {})
        params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}
        fields = opening_fields("2025-11-25", _params(params), b'{"client_id": "somebody"}')
        await store.create(session_key(foreign.id), fields, lifetime=100)
        ids = [expired.id, ended.id, foreign.id, new_session_id(), "malformed", "", "../" * 8, "é" * 30, "a" * 65]
        seen: set[tuple[Any, ...]] = set()
        for session_id in ids:
            for member in cluster:
                for method in ("POST", "GET", "DELETE", "PUT"):
                    raw = Raw("", call("echo"), method, "none", {"mcp-session-id": session_id})
                    response = await send(member.client, member.url, raw, {})
                    headers = {k: v for k, v in response.headers.items() if k not in ("date", "nonstick-node")}
                    seen.add((response.status_code, response.text, tuple(sorted(headers.items()))))
        assert len(seen) == 1
        ((status, text, _headers),) = seen
        assert status == 404
        assert json.loads(text)["error"] == {"code": -32600, "message": "Session not found"}


def _params(params: dict[str, Any]) -> Any:
    from mcp_types import InitializeRequestParams

    return InitializeRequestParams.model_validate(params, by_name=False)


class Watched(MemoryStore):
    """A store that counts the loads of sessions."""

    loads = 0

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        self.loads += key != CLUSTER_KEY
        return await super().load(key, renew=renew)


async def test_malformed_id_never_reaches_the_store(shared: World) -> None:
    """P1, P10."""
    store = Watched()
    async with Cluster(shared.server, one(store)) as cluster:
        for session_id in ("", "x", "a" * 21, "a" * 65, "a" * 31 + "!", "a a" * 10, "ä" * 32):
            raw = Raw("", request("ping"), session="none", headers={"mcp-session-id": session_id})
            for member in cluster:
                assert (await send(member.client, member.url, raw, {})).status_code == 404
        assert store.loads == 0
        assert (await cluster[0].post(call("echo"), Session("a" * 32, "2025-11-25", {}))).status_code == 404
        assert store.loads == 1


# ---- bodies


async def test_large_chunked_body_is_cut_off(in_memory: Cluster) -> None:
    """P10."""
    session = await in_memory[0].open()

    async def body() -> AsyncIterator[bytes]:
        yield b'"'
        for _ in range(5 * 16):
            yield b"x" * 65536

    response = await in_memory[1].client.post(in_memory[1].url, content=body(), headers={**HEADERS, **session.headers})
    assert response.status_code == 413
    assert (await in_memory[1].post(call("echo"), session)).status_code == 200


async def test_body_limit_can_be_set(shared: World) -> None:
    """P10."""
    options = {"max_request_body_size": 2000}
    async with Cluster(shared.server, one(MemoryStore()), nodes=1, app_options=options) as (a,):
        session = await a.open()
        assert (await a.post(call("echo", text="x" * 1000), session)).status_code == 200
        assert (await a.post(call("echo", text="x" * 3000), session)).status_code == 413


async def test_depth_of_json_can_be_set(shared: World) -> None:
    """P10."""
    async with Cluster(shared.server, one(MemoryStore()), nodes=1, max_json_depth=6) as (a,):
        session = await a.open()
        deep: Any = 1
        for _ in range(3):
            deep = [deep]
        assert (await a.post(call("echo", x=deep), session)).status_code == 200
        refused = await a.post(call("echo", x=[deep]), session)
        assert (refused.status_code, error(refused)["message"]) == (400, "Parse error: nested in more than 6 levels")


# ---- handlers


async def test_raising_tool_harms_no_other_request(cluster: Cluster) -> None:
    a, b, _c = cluster
    session, other = await a.open(), await a.open()
    failed = await b.post(call("boom"), session)
    assert error(failed) == {"code": 0, "message": "boom"}
    for one_session in (session, other):
        assert answer(await b.post(call("echo", x=1), one_session)) == {"x": 1}


async def test_blocking_tool_breaks_no_session(cluster: Cluster) -> None:
    """Everybody waits for it, and then goes on."""
    a, b, _c = cluster
    session, other = await a.open(), await b.open()
    blocking = asyncio.create_task(a.post(call("block", 1), session))
    waiting = [asyncio.create_task(member.post(call("echo", 2, x=1), other)) for member in cluster]
    responses = await asyncio.gather(blocking, *waiting)
    assert [response.status_code for response in responses] == [200] * 4
    assert messages(responses[0])[-1]["id"] == 1
    assert answer(await a.post(call("echo", x=2), session)) == {"x": 2}


async def test_request_outlives_its_clients_connection(cluster: Cluster, shared: World) -> None:
    """P3: also what it saves is saved."""
    a, b, _c = cluster
    session = await a.open()
    async with httpx2.AsyncClient(verify=False, timeout=60) as client:
        message = call("wait", door="d", kept="yes")
        posting = asyncio.create_task(client.post(a.url, json=message, headers={**HEADERS, **session.headers}))
        await shared.saw("at d")
        posting.cancel()
        await asyncio.wait([posting])
    shared.doors["d"].set()
    await shared.saw("wait ended")

    async def saved() -> bool:
        return bool(answer(await b.post(call("get"), session)) == {"kept": "yes"})

    await eventually(saved)


@pytest.mark.parametrize("later", [False, True])
async def test_bad_state_is_a_clear_error(cluster: Cluster, later: bool) -> None:
    """P2: at once, or when it was changed in place."""
    a, b, _c = cluster
    session = await a.open()
    await a.post(call("put", before=1), session)
    refused = await a.post(call("object", later=later), session)
    message = error(refused)["message"]
    assert 'placement="owner"' in message
    assert ("'fine'" if later else "'bad'") in message
    state = answer(await b.post(call("get"), session))
    assert state == {"before": 1} | ({} if later else {"fine": []})


async def test_bad_state_spoils_no_other_request(in_memory: Cluster, shared: World) -> None:
    """P2: not of those that share the view with it, and none that comes later."""
    a, b, _c = in_memory
    session = await a.open()
    running = asyncio.create_task(a.post(call("wait", 1, door="d", good=1), session))
    await shared.saw("at d")
    for number in (2, 3):
        assert "'fine'" in error(await a.post(call("object", number, later=True), session))["message"]
        assert answer(await a.post(call("put", 4, **{f"key {number}": number}), session)) is None
    shared.doors["d"].set()
    assert (await running).status_code == 200
    assert answer(await b.post(call("get"), session)) == {"good": 1, "key 2": 2, "key 3": 3}


async def test_too_many_concurrent_requests_are_refused(shared: World) -> None:
    """P10."""
    async with Cluster(shared.server, one(MemoryStore()), nodes=1, max_streams=2) as (a,):
        session, other = await a.open(), await a.open()
        running = [asyncio.create_task(a.post(call("wait", n, door=f"d{n}"), session)) for n in (1, 2)]
        for number in (1, 2):
            await shared.saw(f"at d{number}")
        refused = await a.post(request("ping", id=3), session)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await a.post(request("ping"), other)).status_code == 200
        for number in (1, 2):
            shared.doors[f"d{number}"].set()
        await asyncio.gather(*running)
        assert (await a.post(request("ping", id=3), session)).status_code == 200


async def test_refused_initialize_costs_the_store_nothing(in_memory: Cluster) -> None:
    """P10: also when thousands are sent."""
    store: Store = in_memory[0].app.manager.store
    for _ in range(20):
        response = await in_memory[1].post(request("initialize", {"protocolVersion": 1}))
        assert error(response)["code"] == -32602
    with pytest.raises(SessionNotFound):
        await store.load(session_key("a" * 32))
    accepted = await in_memory[2].post(opening())
    assert accepted.status_code == 200
