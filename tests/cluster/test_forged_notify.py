"""A role that may connect to the PostgreSQL server, and nothing else, neither reads nor writes a session (P14).

LISTEN and NOTIFY have no access control: whoever may connect hears each payload, and may send any.
"""

from __future__ import annotations

import asyncio
import secrets
from binascii import b2a_base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

import asyncpg
import pydantic_core
import pytest

from nonstick.core.events import Kind, draft
from nonstick.core.names import session_key
from nonstick.log.cluster_log import CLUSTER_KEY
from nonstick.store import Cursor, Event
from nonstick.stores.encrypted import EncryptedStore
from nonstick.stores.postgres import PostgresStore
from nonstick.testing import PostgresServer
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import getting, posting
from tests.cluster.stage import Context, Stage, accept, announce, ask, call, say, staged, text_of, texts_of

pytestmark = pytest.mark.anyio

SECRET = "the secret that only its client may see"


class Intruder:
    """A connection of the role. Its payloads look as those of 0.1, which carried events, and in other ways."""

    def __init__(self, connection: Any, channel: str) -> None:
        self._connection = connection
        self._channel = channel
        self.heard: list[str] = []

    @classmethod
    @asynccontextmanager
    async def let_in(cls, server: PostgresServer, schema: str) -> AsyncIterator[Self]:
        role = f"intruder_{secrets.token_hex(4)}"
        owner = await asyncpg.connect(server.url)
        await owner.execute(f"CREATE ROLE {role} LOGIN")
        connection = await asyncpg.connect(server.url.replace("nonstick@", f"{role}@"))
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch(f"SELECT * FROM {schema}.event")
        intruder = cls(connection, schema)
        await connection.add_listener(schema, lambda *args: intruder.heard.append(args[3]))
        try:
            yield intruder
        finally:
            await connection.close()
            await owner.execute(f"DROP ROLE {role}")
            await owner.close()

    async def say(self, *lines: str) -> None:
        """One payload."""
        await self._connection.execute("SELECT pg_notify($1, $2)", self._channel, "\n".join(("intruder", *lines)))

    async def forge(self, key: str, after: Cursor, kind: Kind, body: object) -> None:
        """Says that this event was appended, in every way in which that was ever said, or could be."""
        event = draft(kind, pydantic_core.to_json(body))
        tag, data = _text(event.tag), _text(event.data)
        await self.say(f"{key} {after.position + 1} 0 {tag} {data}")
        await self.say(f"{key} {after.position + 1} 0 {_text(after.tag)} {tag} {data}")
        await self.say(f"{key} {after.position} {_text(after.tag)} {after.position + 1} 0 {tag} {data}")
        await self.say(f"{key} {after.position + 1}")


def _text(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode()


@pytest.fixture
def schema() -> str:
    return f"test_{secrets.token_hex(6)}"


@pytest.fixture(params=["in clear", pytest.param("encrypted", marks=pytest.mark.slow)])
def make(request: pytest.FixtureRequest, postgres: PostgresServer, schema: str) -> MakeStore:
    keys = [secrets.token_bytes(32)]

    def make() -> Any:
        store = PostgresStore(postgres.url, schema=schema)
        return store if request.param == "in clear" else EncryptedStore(store, keys)

    return make


@asynccontextmanager
async def besieged(make: MakeStore, postgres: PostgresServer, schema: str, **options: Any) -> AsyncIterator[Any]:
    """The nodes, and an intruder."""
    async with staged(make, window=0.05, **options) as (stage, a, b, c):

        @stage.tool
        async def tell(ctx: Context, args: dict[str, Any]) -> str:
            await announce(ctx, str(args["text"]))
            return "told"

        @stage.tool
        async def question(ctx: Context, args: dict[str, Any]) -> str:
            await say(ctx, SECRET)
            return f"{SECRET}: {(await ask(ctx))['content']['name']}"

        async with Intruder.let_in(postgres, schema) as intruder:
            yield stage, intruder, a, b, c


async def head(stage: Stage, session: Any) -> Cursor:
    return (await stage.store.load(session_key(session.id))).head


async def test_intruder_hears_no_content(make: MakeStore, postgres: PostgresServer, schema: str) -> None:
    """P13, P14: that something happened, and to which log: no message, no tag, no id."""
    async with besieged(make, postgres, schema) as (stage, intruder, a, b, c):
        session = await a.open()
        async with getting(b, session) as stream, posting(a, session, call("question")) as request:
            await stream.event()
            assert text_of(await request.message()) == SECRET
            asked = await request.message()
            await c.post(accept(asked, name=SECRET), session)
            assert texts_of(await request.rest()) == [f"{SECRET}: {SECRET}"]
            await a.post(call("tell", 2, text=SECRET), session)
            assert text_of(await stream.message()) == SECRET
            log: list[Event] = await stage.log(session)
        assert any(session_key(session.id) in payload for payload in intruder.heard)
        secrets_of_it = [SECRET, _text(SECRET.encode())[:-4], session.id, "jsonrpc", _text(b"jsonrpc")]
        secrets_of_it += [form for event in log for form in (_text(event.tag), event.tag.hex())]
        for payload in intruder.heard:
            assert not [secret for secret in secrets_of_it if secret in payload], payload
            keys = payload.split("\n")[1:]
            assert all(key in (session_key(session.id), CLUSTER_KEY) or key.startswith("!") for key in keys), payload


async def test_intruder_adds_nothing_to_streams(make: MakeStore, postgres: PostgresServer, schema: str) -> None:
    """P3, P14: and displaces nothing."""
    async with besieged(make, postgres, schema) as (stage, intruder, a, b, _c):
        session = await a.open()
        key = session_key(session.id)
        async with getting(b, session) as stream:
            await stream.event()
            forged = {
                "jsonrpc": "2.0",
                "method": "notifications/message",
                "params": {"level": "info", "data": "forged"},
            }
            for number in range(3):
                await intruder.forge(key, await head(stage, session), Kind.MESSAGE, forged)
                await a.post(call("tell", number, text=f"true {number}"), session)
                assert text_of(await stream.message()) == f"true {number}"


async def test_intruder_answers_nothing_for_the_user(make: MakeStore, postgres: PostgresServer, schema: str) -> None:
    """P4, P14: nor cancels, nor ends anything."""
    async with besieged(make, postgres, schema) as (stage, intruder, a, _b, c):
        session = await a.open()
        key = session_key(session.id)
        async with posting(a, session, call("question", 7)) as request:
            assert text_of(await request.message()) == SECRET
            asked = await request.message()
            before = await head(stage, session)
            await intruder.forge(key, before, Kind.REPLY, accept(asked, name="Mallory"))
            await intruder.forge(key, before, Kind.CANCEL, {"requestId": 7})
            await intruder.forge(key, before, Kind.TERMINAL, {"jsonrpc": "2.0", "id": 7, "result": {}})
            await c.post(accept(asked, name="Ada"), session)
            assert texts_of(await request.rest()) == [f"{SECRET}: Ada"]


class Counted(PostgresStore):
    """Counts the reads of a log."""

    def __init__(self, url: str, *, schema: str) -> None:
        super().__init__(url, schema=schema)
        self.reads = 0
        self.under_way: dict[str, int] = {}
        self.most_at_once = 0

    async def read(self, key: str, after: Cursor, **options: int) -> list[Event]:
        self.reads += 1
        self.under_way[key] = self.under_way.get(key, 0) + 1
        self.most_at_once = max(self.most_at_once, *self.under_way.values())
        try:
            return await super().read(key, after, **options)
        finally:
            self.under_way[key] -= 1


FLOODS: dict[str, Callable[[str, int], list[str]]] = {
    "a log that is watched": lambda key, n: [(key, CLUSTER_KEY)[n % 2]],
    "everybody": lambda key, n: [" "],
    "anything": lambda key, n: [
        f"{key} {10**12 + n} 0 {_text(b'a tag...')} {_text(b'1m{}')}",
        f"{key} x y z \x7f",
        f"{key} -1 -1 x x",
        "!",
        "",
        *(secrets.token_hex(20) for _ in range(10)),
    ],
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_forged_flood_costs_bounded_work(kind: str, postgres: PostgresServer, schema: str) -> None:
    """P10, P14: at most one read of a log is under way, and the more bring nothing, the fewer are made."""
    stores: list[Counted] = []

    def make() -> Any:
        stores.append(Counted(postgres.url, schema=schema))
        return stores[-1]

    async with besieged(make, postgres, schema) as (_stage, intruder, a, b, _c):
        session = await a.open()
        async with getting(b, session) as stream:
            await stream.event()
            await a.post(call("tell", 1, text="before"), session)
            assert text_of(await stream.message()) == "before"
            for store in stores:
                store.reads = store.most_at_once = 0
            loop = asyncio.get_running_loop()
            began = loop.time()
            for number in range(800):
                await intruder.say(*FLOODS[kind](session_key(session.id), number))
            # It comes over the same channel, after all of that.
            await a.post(call("tell", 2, text="true"), session)
            assert text_of(await stream.message()) == "true"
            took = loop.time() - began
        # Logs that are followed here: the session's by one node or two, the cluster log by one for all.
        assert sum(store.reads for store in stores) < 3 * (15 + took / 0.1)
        assert max(store.most_at_once for store in stores) <= 2, "the follower's, and one of a connection that looks"
