"""What is published to a session's channel on a real Valkey, and was never appended: nothing is skipped for it (P14).

An old primary that was frozen and thawed publishes such a thing, and so does whoever may use the channels.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pydantic_core
import pytest
import redis.asyncio

from nonstick.core.events import Kind, draft
from nonstick.core.names import session_key
from nonstick.store import Batch, Cursor
from nonstick.stores.encrypted import EncryptedStore
from nonstick.stores.redis import RedisStore
from nonstick.testing import ValkeyServer
from nonstick.testing.cluster import Session
from tests.cluster.sse import Stream, getting
from tests.cluster.stage import Context, Stage, announce, call, staged, text_of

pytestmark = pytest.mark.anyio

FORGED = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "forged"}}


class Place:
    """Nodes on one Valkey, a session with a connection to its standalone stream, and what can publish beside them."""

    def __init__(self, stage: Stage, members: list[Any], session: Session, client: Any, prefix: str) -> None:
        self.stage = stage
        self.members = members
        self.session = session
        self.key = session_key(session.id)
        self._client = client
        self._channel = f"{prefix}:{{{self.key}}}:c0"

    async def head(self) -> Cursor:
        return (await self.stage.store.load(self.key)).head

    async def publish(self, message: bytes) -> None:
        assert await self._client.publish(self._channel, message) > 0

    async def tell(self, text: str) -> None:
        await self.members[0].post(call("tell", 1, text=text), self.session)


@asynccontextmanager
async def placed(valkey: ValkeyServer, *, keys: list[bytes] | None = None) -> AsyncIterator[tuple[Place, Stream]]:
    prefix = f"test-{secrets.token_hex(6)}"

    def make() -> Any:
        store = RedisStore(valkey.url, prefix=prefix)
        return EncryptedStore(store, keys) if keys else store

    async with staged(make, window=0.05) as (stage, a, b, c), redis.asyncio.Redis.from_url(valkey.url) as client:

        @stage.tool
        async def tell(ctx: Context, args: dict[str, Any]) -> str:
            await announce(ctx, str(args["text"]))
            return "told"

        session = await a.open()
        async with getting(b, session) as stream:
            await stream.event()
            place = Place(stage, [a, b, c], session, client, prefix)
            await place.tell("before")
            assert text_of(await stream.message()) == "before"
            yield place, stream


def message(version: int, after: Cursor | None, position: int, data: bytes, tag: bytes = b"forged!!") -> bytes:
    """As append.lua writes it for this format."""
    before = b"" if after is None else after.tag
    named = b"" if after is None else b" %d" % len(before)
    return b"%d %d 0%s %d %d\n" % (version, position, named, len(tag), len(data)) + before + tag + data


@pytest.mark.parametrize("kind", ["of 0.1", "no tag", "another tag", "one ahead", "far ahead"])
async def test_unconnected_publication_is_not_believed(kind: str, valkey: ValkeyServer) -> None:
    """P14: 0.1 named no entry before its events; what it publishes is taken for "read" (P12)."""
    data = draft(Kind.MESSAGE, pydantic_core.to_json(FORGED)).data
    async with placed(valkey) as (place, stream):
        head = await place.head()
        forged = {
            "of 0.1": message(1, None, head.position + 1, data),
            "no tag": message(2, Cursor(head.position), head.position + 1, data),
            "another tag": message(2, Cursor(head.position, b"another!"), head.position + 1, data),
            "one ahead": message(2, head, head.position + 2, data),
            "far ahead": message(2, head, 10**15, data),
        }[kind]
        await place.publish(forged)
        await place.tell("true")
        assert text_of(await stream.message()) == "true"


async def test_entry_replacing_phantom_is_not_skipped(valkey: ValkeyServer) -> None:
    """P3, P14: the phantom continues the log exactly. Nothing that comes after it, or in its place, is missed."""
    async with placed(valkey) as (place, stream):
        head = await place.head()
        await place.publish(message(2, head, head.position + 1, draft(Kind.ALIVE).data))
        for text in ("1", "2", "3"):
            await place.tell(text)
        assert [text_of(await stream.message()) for _ in range(3)] == ["1", "2", "3"]


async def test_replayed_payload_displaces_nothing(valkey: ValkeyServer) -> None:
    """P13, P14: under encryption it decrypts there too."""
    async with placed(valkey, keys=[secrets.token_bytes(32)]) as (place, stream):
        sealed: Any = place.stage.store
        heard = draft(Kind.MESSAGE, pydantic_core.to_json(FORGED))
        appended = await sealed.append(place.key, Batch([heard]))
        assert text_of(await stream.message()) == "forged"
        (event,) = await sealed.store.read(place.key, Cursor(appended.first - 1))
        await place.publish(message(2, event.cursor, event.position + 1, event.data, event.tag))
        await place.tell("true")
        assert text_of(await stream.message()) == "true"
