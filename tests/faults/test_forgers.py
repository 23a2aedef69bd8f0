"""Who forges in a campaign does what it is there for: it is heard, it hears, and it notices content (P14)."""

from __future__ import annotations

import asyncio
import random
from binascii import b2a_base64

import asyncpg
import pytest
import redis.asyncio

from nonstick.testing import PostgresServer, ValkeyServer
from tests.faults.forgers import Intruder, repeat_wakes

pytestmark = pytest.mark.anyio

KEY = "0123456789" * 4


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


async def test_intruder_connects_and_hears_and_forges() -> None:
    """P14: what every role of a database can do to a channel."""
    content = b2a_base64(b'{"jsonrpc": "2.0"}', newline=False).decode()
    heard: list[str] = []
    with PostgresServer() as server:
        await Intruder.admit(server.url)
        intruder = Intruder()
        listener, announcer = await asyncpg.connect(server.url), await asyncpg.connect(server.url)
        try:
            await listener.add_listener("nonstick", lambda *told: heard.append(str(told[3])))
            at_work = asyncio.create_task(intruder.disturb(server.url, random.Random(1), 30.0))
            async with asyncio.timeout(60):
                while not any(KEY in text for text in heard if text.startswith("forged")):
                    await announcer.execute("SELECT pg_notify('nonstick', $1)", f"sender\n{KEY} 7 0 AAAA {content}")
                    await asyncio.sleep(0.01)
            at_work.cancel()
            await asyncio.gather(at_work, return_exceptions=True)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await announcer.execute(f"SET ROLE {Intruder.name}; CREATE TABLE public.mine ()")
        finally:
            listener.terminate()
            announcer.terminate()
    assert intruder.overheard


async def test_what_was_published_is_repeated() -> None:
    """P14: wakes may be repeated and reordered."""
    with ValkeyServer() as server:
        async with redis.asyncio.Redis(port=server.port, protocol=2) as client:
            at_work = asyncio.create_task(repeat_wakes(server.port, random.Random(1), 30.0))
            async with client.pubsub() as pubsub, asyncio.timeout(60):
                await pubsub.subscribe("news")
                sent = heard = 0
                while heard <= sent:
                    await client.publish("news", b"once")
                    sent += 1
                    while await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.01):
                        heard += 1
            while not at_work.done():
                at_work.cancel()
                await asyncio.wait([at_work], timeout=0.05)
