"""Sessions whose store holds only ciphertext, served by three nodes."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from nonstick import EncryptedStore, current_connection
from nonstick.core.names import session_key
from nonstick.store import Store
from nonstick.stores.encrypted.keys import KeyRing
from nonstick.stores.redis import RedisStore
from nonstick.stores.sqlite import SQLiteStore
from nonstick.testing import ValkeyServer
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import getting, posting
from tests.cluster.stage import Context, Stage, accept, ask, call, eventually, say, staged, text_of

pytestmark = pytest.mark.anyio

OLD, NEW = (secrets.token_bytes(32) for _ in range(2))
PAYLOAD = "marker-of-a-payload"
STATE = "marker-of-state"
Dump = Callable[[], bytes]


@pytest.fixture(params=["sqlite", "valkey"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[MakeStore, Dump]:
    """A store in clear, and all the bytes that its server or file holds."""
    if request.param == "sqlite":
        return (
            lambda: SQLiteStore(tmp_path / "sessions.db"),
            lambda: b"".join(file.read_bytes() for file in tmp_path.iterdir()),
        )
    server: ValkeyServer = request.getfixturevalue("valkey")
    prefix = f"test-{secrets.token_hex(6)}"
    return lambda: RedisStore(server.url, prefix=prefix), lambda: _dump(server.url, prefix)


def _dump(url: str, prefix: str) -> bytes:
    with redis.Redis.from_url(url) as client:
        client.config_set("rdbcompression", "no")
        keys: Any = client.keys(f"{prefix}*")
        return b"".join(key + (client.dump(key) or b"") for key in keys)


def sealed(make: MakeStore, *keys: bytes) -> MakeStore:
    return lambda: EncryptedStore(make(), keys or (OLD,))


async def a_life(make_store: MakeStore) -> str:
    """A session that is streamed, asked and resumed, with state, on three nodes; it is still open. Its id."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def work(ctx: Context, arguments: dict[str, Any]) -> str:
            current_connection().state["kept"] = STATE
            await say(ctx, PAYLOAD)
            return str(await ask(ctx))

        @stage.tool
        async def recall(ctx: Context, arguments: dict[str, Any]) -> str:
            return json.dumps(current_connection().state)

        session = await a.open(capabilities={"elicitation": {}})
        async with posting(b, session, call("work", text=PAYLOAD)) as stream:
            assert text_of(await stream.message()) == PAYLOAD
            last = stream.last_id
            question = await stream.message()
            await c.post(accept(question, name=PAYLOAD), session)
            assert PAYLOAD in text_of((await stream.rest())[-1])
        async with getting(c, session, last) as again:
            assert PAYLOAD in text_of((await again.rest())[-1])
        answer = await a.post(call("recall", id=2), session)
        assert STATE in answer.text
        return session.id


async def test_dump_of_store_tells_nothing(backend: tuple[MakeStore, Dump]) -> None:
    """P13: no payload, no state, no session id; nor does it open a session."""
    make_store, dump = backend
    session_id = await a_life(sealed(make_store))
    kept = dump()
    assert session_key(session_id).encode() in kept
    for secret in (PAYLOAD, STATE, session_id, "elicitation", "2025-11-25", OLD.hex()):
        assert secret.encode() not in kept, secret


async def test_without_encryption_the_dump_would_tell(backend: tuple[MakeStore, Dump]) -> None:
    """The counterpart: what the test above looks for is found where it is."""
    make_store, dump = backend
    session_id = await a_life(make_store)
    kept = dump()
    assert all(secret.encode() in kept for secret in (PAYLOAD, STATE, "elicitation"))
    assert session_id.encode() not in kept


async def test_keys_are_rotated_while_calls_run(backend: tuple[MakeStore, Dump]) -> None:
    """P13: added on every node, made the first, the old one dropped: every call is answered, streams go on."""
    make_store, _ = backend
    stores: list[EncryptedStore] = []

    def keep() -> Store:
        stores.append(EncryptedStore(make_store(), [OLD]))
        return stores[-1]

    async with staged(keep) as (stage, a, b, c):

        @stage.tool
        async def add(ctx: Context, arguments: dict[str, Any]) -> str:
            state = current_connection().state
            state["n"] = state.get("n", 0) + 1
            await say(ctx, "adding")
            return str(state["n"])

        @stage.tool
        async def long(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "began")
            await stage.door("rotated")
            await say(ctx, "ends")
            return "done"

        session, steady = await a.open(), await b.open()
        calls, failed = 0, []
        stop = asyncio.Event()

        async def work() -> None:
            nonlocal calls
            while not stop.is_set():
                calls += 1
                member = (a, b, c)[calls % 3]
                async with posting(member, steady, call("add", id=calls + 10)) as stream:
                    outcome = await stream.outcome()
                    if text_of(outcome) != str(calls):
                        failed.append(outcome)
                stage.open(f"{calls} calls")

        async with posting(a, session, call("long")) as stream:
            assert text_of(await stream.message()) == "began"
            worker = asyncio.create_task(work())
            for keys in ([OLD, NEW], [NEW, OLD]):
                for store in stores:
                    store.use(keys)
                    await stage.reached(f"{calls + 3} calls")
            stop.set()
            await worker
            stage.open("rotated")
            assert [text_of(message) for message in await stream.rest()] == ["ends", "done"]
            last = stream.last_id
        for store in stores:
            store.use([NEW])
        assert not failed
        answer = await c.post(call("add", id=1), steady)
        assert str(calls + 1) in answer.text
        assert last
        # Records came under the new key without anybody's doing.
        async with make_store() as raw:
            fields = (await raw.load(session_key(steady.id))).fields
            assert fields
            assert all(KeyRing([NEW]).is_current(data) for data in fields.values())


async def test_node_with_other_key_answers_503(
    backend: tuple[MakeStore, Dump], caplog: pytest.LogCaptureFixture
) -> None:
    """P9: never 404, which would end the client's session; the other nodes serve on."""
    make_store, _ = backend
    keys = iter([[OLD], [NEW], [OLD], [OLD]])
    async with staged(lambda: EncryptedStore(make_store(), next(keys))) as (_, a, b, c):
        # The stage's own instance came first.
        session = await b.open() if _has(b.app.manager.store, OLD) else await c.open()
        stranger = next(member for member in (a, b, c) if _has(member.app.manager.store, NEW))
        served = next(member for member in (a, b, c) if _has(member.app.manager.store, OLD))
        refused = await stranger.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}, session)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert KeyRing([OLD]).names[0] in caplog.text
        assert KeyRing([OLD]).names[0] not in refused.text
        assert (await served.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}, session)).status_code == 200


def _has(store: Store, key: bytes) -> bool:
    assert isinstance(store, EncryptedStore)
    return store.key_names == KeyRing([key]).names


async def test_one_argument_encrypts(tmp_path: Path) -> None:
    """`nonstick.app(..., encryption_keys=[...])`."""
    path = tmp_path / "sessions.db"
    async with Stage(lambda: SQLiteStore(path), encryption_keys=[OLD]) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        assert (await b.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}, session)).status_code == 200
        await eventually(lambda: path.exists())
        fields = (await stage.store.load(session_key(session.id))).fields
        assert fields
        assert all(KeyRing([OLD]).is_current(data) for data in fields.values())
