"""The key-value store that FastMCP keeps session state in."""

from __future__ import annotations

from typing import Any

import pytest
from key_value.aio.protocols import AsyncKeyValue

import nonstick
from nonstick.errors import StateNotJSON, StateTooLarge, StoreUnavailable
from nonstick.guard import GuardedStore
from nonstick.security import new_session_id, session_key
from nonstick.state_store import MAX_STATE, StateStore
from nonstick.store import Loaded
from nonstick.stores.memory import MemoryStore
from nonstick.wire import STORE_AWAY
from tests.cluster.servers import eventually

pytestmark = pytest.mark.anyio

SESSION = new_session_id()


@pytest.fixture
def kept() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def state(kept: MemoryStore) -> StateStore:
    state = StateStore()
    state.use(GuardedStore(kept))
    return state


def keys() -> list[Any]:
    """A value in a session's record, and one in a record of its own."""
    return [
        pytest.param(f"{SESSION}:cart", id="session"),
        pytest.param("session:anon:1", id="own"),
        pytest.param(f"{new_session_id()}:cart", id="no such session"),
    ]


async def opened(kept: MemoryStore) -> None:
    await kept.create(session_key(SESSION), {"v": b"1"}, lifetime=60)


def test_it_is_what_fastmcp_takes() -> None:
    """The protocol of py-key-value-aio."""
    store: AsyncKeyValue = nonstick.Cluster.apart().session_state_store
    assert isinstance(store, StateStore)


async def test_without_an_app_it_works_within_the_process() -> None:
    """On stdio, say."""
    state = StateStore()
    await state.put("a", {"value": 1})
    assert await state.get("a") == {"value": 1}
    assert await StateStore().get("a") is None


@pytest.mark.parametrize("key", keys())
async def test_value_is_there_until_it_is_deleted(kept: MemoryStore, state: StateStore, key: str) -> None:
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


async def test_value_that_is_put_again_for_longer_is_kept_for_longer(kept: MemoryStore, state: StateStore) -> None:
    """The record of its own that it is in lives on with it."""
    await state.put("a", {"value": 1}, ttl=0.1)
    await state.put("a", {"value": 2}, ttl=60)
    await state.put("fence", {"value": 3}, ttl=0.2)

    async def over() -> bool:
        return await state.get("fence") is None

    await eventually(over)
    assert await state.get("a") == {"value": 2}


async def test_value_of_a_session_ends_with_it(kept: MemoryStore, state: StateStore) -> None:
    """P6. Its id is nowhere in the store (P13)."""
    await opened(kept)
    await state.put(f"{SESSION}:cart", {"value": 1}, ttl=1000)
    fields = (await kept.load(session_key(SESSION))).fields
    assert len(fields) == 2
    assert not any(SESSION in name or SESSION.encode() in value for name, value in fields.items())
    await kept.delete(session_key(SESSION))
    assert await state.get(f"{SESSION}:cart") is None


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
async def test_value_that_json_cannot_hold_is_refused(state: StateStore, value: dict[str, Any]) -> None:
    with pytest.raises(StateNotJSON, match="has to be JSON"):
        await state.put("a", value)
    assert await state.get("a") is None


async def test_store_that_is_away_is_said_without_its_name() -> None:
    """P9, P13: FastMCP passes the text on to the client."""

    class Away(MemoryStore):
        async def load(self, key: str) -> Loaded:
            raise StoreUnavailable("cache.internal:6379 refused")

    state = StateStore()
    state.use(GuardedStore(Away(), patience=0.01))
    with pytest.raises(StoreUnavailable) as caught:
        await state.get("a")
    assert str(caught.value) == STORE_AWAY
