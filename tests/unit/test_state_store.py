"""The key-value store that FastMCP keeps session state in."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from key_value.aio.protocols import AsyncKeyValue
from mcp.server import Server
from mcp.server.auth.middleware.auth_context import auth_context_var
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken

import nonstick
from nonstick.cluster.state_store import MAX_STATE, Allowance, StateStore
from nonstick.core.names import new_session_id, session_key
from nonstick.core.refusals import STORE_AWAY
from nonstick.core.settings import Settings
from nonstick.errors import SessionNotFound, StateFull, StateNotJSON, StateTooLarge, StoreUnavailable
from nonstick.log.guard import GuardedStore
from nonstick.node.node import Node
from nonstick.session.kernel import KernelRunner
from nonstick.session.live import LiveSession
from nonstick.session.services import Served
from nonstick.store import Loaded
from nonstick.stores.memory import MemoryStore
from nonstick.testing import ManualClock
from tests.cluster.servers import eventually

pytestmark = pytest.mark.anyio

SESSION = new_session_id()


@pytest.fixture
def kept() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def state(kept: MemoryStore) -> StateStore:
    state = StateStore()
    state.use(GuardedStore(kept), Allowance())
    return state


def keys() -> list[Any]:
    """A value in a session's record, and one in a record of its own."""
    return [
        pytest.param(f"{SESSION}:cart", id="session"),
        pytest.param("session:anon:1", id="own"),
        pytest.param(f"{new_session_id()}:cart", id="no such session"),
    ]


def work_for(kept: MemoryStore, session_id: str) -> None:
    """What is done in this task from here on is the work of this session."""
    served, cluster_log = Served(partial(KernelRunner, Server(""), None), ""), nonstick.Cluster.private().log
    node = Node(served, GuardedStore(kept), Settings(), cluster_log=cluster_log)
    LiveSession(node.services, session_id, session_key(session_id)).make_current()


async def opened(kept: MemoryStore, session_id: str = SESSION) -> None:
    """As `work_for`, of a session that is opened here."""
    await kept.create(session_key(session_id), {"v": b"1"}, lifetime=60)
    work_for(kept, session_id)


def test_it_is_what_fastmcp_takes() -> None:
    """The protocol of py-key-value-aio."""
    store: AsyncKeyValue = nonstick.Cluster.private().session_state_store
    assert isinstance(store, StateStore)


async def test_appless_state_works_within_process() -> None:
    """On stdio, say."""
    state = StateStore()
    await state.put("a", {"value": 1})
    assert await state.get("a") == {"value": 1}
    assert await StateStore().get("a") is None


@pytest.mark.parametrize("key", keys())
async def test_value_stays_until_deleted(kept: MemoryStore, state: StateStore, key: str) -> None:
    await opened(kept)
    assert await state.get(key) is None
    assert not await state.delete(key)
    for value in ({"value": 1}, {"value": [None, "é", {"a": 1.5}]}):
        await state.put(key, value, collection="x")
        assert await state.get(key, collection="x") == value
        assert await state.get(key, collection="y") is None
        assert await state.get(f"{key}2", collection="x") is None
    assert await state.delete(key, collection="x")
    assert await state.get(key, collection="x") is None
    assert not await state.delete(key, collection="x")


@pytest.mark.parametrize("key", keys())
async def test_value_is_kept_for_its_time(kept: MemoryStore, state: StateStore, key: str) -> None:
    """However often it is looked at."""
    await opened(kept)
    await state.put(key, {"value": 1})
    assert await state.ttl(key) == ({"value": 1}, None)
    await state.put(key, {"value": 2}, ttl=100)
    value, left = await state.ttl(key)
    assert value == {"value": 2}
    assert left is not None
    assert 90 < left <= 100
    await state.put(key, {"value": 3}, ttl=0.05)

    async def over() -> bool:
        return await state.get(key) is None

    await eventually(over)
    await state.put(key, {"value": 4})
    assert await state.get(key) == {"value": 4}


async def test_renewed_value_is_kept_longer(kept: MemoryStore, state: StateStore) -> None:
    """The record of its own that it is in lives on with it."""
    await state.put("a", {"value": 1}, ttl=0.1)
    await state.put("a", {"value": 2}, ttl=60)
    await state.put("fence", {"value": 3}, ttl=0.2)

    async def over() -> bool:
        return await state.get("fence") is None

    await eventually(over)
    assert await state.get("a") == {"value": 2}


async def test_sessions_value_ends_with_session(kept: MemoryStore, state: StateStore) -> None:
    """P6. Its id is nowhere in the store (P13)."""
    await opened(kept)
    await state.put(f"{SESSION}:cart", {"value": 1}, ttl=1000)
    fields = (await kept.load(session_key(SESSION))).fields
    assert len(fields) == 2
    assert not any(SESSION in name or SESSION.encode() in value for name, value in fields.items())
    await kept.delete(session_key(SESSION))
    assert await state.get(f"{SESSION}:cart") is None
    assert not await state.delete(f"{SESSION}:cart")
    with pytest.raises(SessionNotFound):
        await state.put(f"{SESSION}:cart", {"value": 1})


async def test_handler_using_state_keeps_no_session() -> None:
    """P10: the client's requests do; a handler may work on for long after its client left."""
    clock = ManualClock()
    kept, state = MemoryStore(clock=clock), StateStore()
    state.use(GuardedStore(kept), Allowance())
    await opened(kept)  # for a minute
    key = f"{SESSION}:cart"
    for _ in range(3):
        await clock.advance(19)
        await state.put(key, {"value": 1})
        assert await state.get(key) == {"value": 1}
        assert await state.delete(key)
        assert not await state.delete(key)
    await clock.advance(3)
    assert await state.get(key) is None
    with pytest.raises(SessionNotFound):
        await kept.load(session_key(SESSION))


async def test_session_record_admits_only_its_own(kept: MemoryStore, state: StateStore) -> None:
    """P1: neither by work of no session nor by another session's, whatever the key that is asked for."""
    key, other = f"{SESSION}:cart", new_session_id()

    async def meddle(by: str | None) -> None:
        if by is not None:
            await opened(kept, by)
        assert await state.get(key) is None
        await state.put(key, {"value": by})
        assert await state.get(key) == {"value": by}
        assert await state.delete(key)

    async def keep() -> None:
        await opened(kept)
        await state.put(key, {"value": "mine"})

    async def look() -> None:
        work_for(kept, SESSION)
        assert await state.get(key) == {"value": "mine"}

    await asyncio.create_task(keep())
    before = (await kept.load(session_key(SESSION))).fields
    await asyncio.create_task(meddle(None))
    await asyncio.create_task(meddle(other))
    assert (await kept.load(session_key(SESSION))).fields == before
    await asyncio.create_task(look())


async def test_unbound_values_have_limited_room(kept: MemoryStore, state: StateStore) -> None:
    """P10: one that is replaced takes no further place, one that is deleted gives its place back."""
    state.use(GuardedStore(kept), Allowance(records=3))
    for number in (0, 1, 2, 0, 1):
        await state.put(f"session:anon:{number}", {"value": number})
    with pytest.raises(StateFull, match=r"max_state_records\)"):
        await state.put("session:anon:3", {"value": 3})
    assert await state.get("session:anon:3") is None
    await state.delete("session:anon:0")
    await state.put("session:anon:3", {"value": 3})
    await opened(kept)
    await state.put(f"{SESSION}:cart", {"value": "in the session's record"})


async def test_each_principal_has_limited_room(kept: MemoryStore, state: StateStore) -> None:
    """P10."""
    state.use(GuardedStore(kept), Allowance(per_principal=1))

    async def put(who: str, key: str) -> None:
        token = AccessToken(token=f"token of {who}", client_id="app", subject=who, scopes=[])
        auth_context_var.set(AuthenticatedUser(token))
        await state.put(key, {"value": who})

    await asyncio.create_task(put("ada", "session:a:1"))
    with pytest.raises(StateFull, match=r"max_state_records_per_principal\)"):
        await asyncio.create_task(put("ada", "session:a:2"))
    await asyncio.create_task(put("bob", "session:b:1"))


async def test_many_are_as_each(state: StateStore) -> None:
    await state.put_many(["a", "b"], [{"n": 1}, {"n": 2}], ttl=10)
    assert await state.get_many(["b", "c", "a"]) == [{"n": 2}, None, {"n": 1}]
    assert [value for value, _ in await state.ttl_many(["a", "c"])] == [{"n": 1}, None]
    assert await state.delete_many(["a", "b", "c"]) == 2


@pytest.mark.parametrize("key", keys())
async def test_record_has_room_for_so_much(kept: MemoryStore, state: StateStore, key: str) -> None:
    """P10: of all values in it; one that is replaced does not count."""
    await opened(kept)
    large = {"value": "x" * (MAX_STATE - 100)}
    await state.put(key, large)
    await state.put(key, large)
    with pytest.raises(StateTooLarge, match="Keep large things elsewhere"):
        await state.put(key, {"value": "x" * MAX_STATE})
    if key.startswith(SESSION):
        with pytest.raises(StateTooLarge):
            await state.put(f"{key}2", {"value": "x" * 200})
    assert await state.get(key) == large


@pytest.mark.parametrize("value", [{"a": object()}, {"a": float("nan")}, {"a": {1, 2}}])
async def test_unserialisable_value_is_refused(state: StateStore, value: dict[str, Any]) -> None:
    with pytest.raises(StateNotJSON, match="has to be JSON"):
        await state.put("a", value)
    assert await state.get("a") is None


async def test_outage_is_told_without_stores_name() -> None:
    """P9, P13: FastMCP passes the text on to the client."""

    class Away(MemoryStore):
        async def load(self, key: str, *, renew: bool = True) -> Loaded:
            raise StoreUnavailable("cache.internal:6379 refused")

    state = StateStore()
    state.use(GuardedStore(Away(), patience=0.01), Allowance())
    with pytest.raises(StoreUnavailable) as caught:
        await state.get("a")
    assert str(caught.value) == STORE_AWAY
