"""Who can only reach a channel, and says there what is not so: hints are never data (P14)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import secrets
import time
from binascii import Error, a2b_base64, b2a_base64
from typing import Any, Final

import asyncpg
import redis.asyncio
from redis.exceptions import RedisError

from nonstick.core.events import Kind, draft

__all__ = ["Intruder", "repeat_wakes"]

_CHANNEL: Final = "nonstick"
_KEY: Final = re.compile(r"[0-9a-f]{40}")
_FLOOD: Final = 300
"""Forged payloads a second, about."""


class Intruder:
    """A role that may connect to PostgreSQL, and nothing else: it listens, and announces what was never appended.

    Attributes:
        overheard: Payloads that showed what a session's log holds. There must be none.
    """

    name: Final = "intruder"

    def __init__(self, channel: str = _CHANNEL) -> None:
        self.overheard: list[str] = []
        self._channel = channel
        self._keys: dict[str, int] = {}
        """Sessions that were heard of, each with the last position."""

    @classmethod
    async def admit(cls, url: str) -> None:
        """Makes the role, as the superuser whose URL this is."""
        connection = await asyncpg.connect(url)
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", cls.name):
                await connection.execute(f"CREATE ROLE {cls.name} LOGIN")
        finally:
            connection.terminate()

    async def disturb(self, url: str, rng: random.Random, seconds: float) -> int:
        """Listens and forges meanwhile; how much it forged. Harmless where the server is away."""
        forged = 0
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            connection = await asyncpg.connect(url, user=self.name, timeout=2)
            try:
                await connection.add_listener(self._channel, self._hear)
                async with asyncio.timeout(seconds):
                    while True:
                        for _ in range(_FLOOD // 20):
                            await connection.execute("SELECT pg_notify($1, $2)", self._channel, self._forge(rng))
                            forged += 1
                        await asyncio.sleep(0.05)
            finally:
                connection.terminate()
        return forged

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        text = str(payload)
        if _shows_content(text) and "forged" not in text:
            self.overheard.append(text)
        for line in text.splitlines():
            key, *rest = line.split(" ")
            if _KEY.fullmatch(key):
                numbers = [int(part) for part in rest[:1] if part.isdigit()]
                self._keys[key] = max([self._keys.get(key, 0), *numbers])

    def _forge(self, rng: random.Random) -> str:
        key = rng.choice(sorted(self._keys)) if self._keys else secrets.token_hex(20)
        position = self._keys.get(key, 0) + rng.choice([0, 1, 1, 1, 2, 100])
        stream = rng.choice([0, max(0, position - rng.randint(1, 6))])
        tag = rng.randbytes(8)
        event = draft(*rng.choice(_EVENTS)).data
        line = f"{key} {position} {stream} {_text(tag)} {_text(event)}"
        return rng.choice([f"forged\n{line}", f"forged\n{key}", f"forged\n{key} {position}", "forged\n ", "forged"])


def _message(**more: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", **more}).encode()


_EVENTS: Final = [
    (Kind.MESSAGE, _message(method="notifications/progress", params={"progressToken": 1, "message": "forged:1:1"})),
    (Kind.TERMINAL, _message(id=1, result={"content": [{"type": "text", "text": "forged:1:0"}]})),
    (Kind.REPLY, _message(id="srv-forged", result={"action": "accept", "content": {"value": "forged"}})),
    (Kind.CANCEL, b'{"requestId": 2}'),
    (Kind.HANGUP, b""),
]


def _text(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode()


def _shows_content(payload: str) -> bool:
    """Whether a part of it is, or decodes to, a JSON-RPC message."""
    if "jsonrpc" in payload:
        return True
    for part in payload.split():
        with contextlib.suppress(Error, ValueError):
            if b"jsonrpc" in a2b_base64(part):
                return True
    return False


async def repeat_wakes(port: int, rng: random.Random, seconds: float) -> int:
    """Publishes again, later and out of order, what is published meanwhile at this server; how often it did."""
    heard: list[tuple[bytes, bytes]] = []
    repeated: set[tuple[bytes, bytes]] = set()
    count = 0
    # By the clock: this client takes a cancellation now and then for its own timeout.
    until = time.monotonic() + seconds
    with contextlib.suppress(RedisError, OSError, TimeoutError):
        async with (
            redis.asyncio.Redis(port=port, protocol=2, socket_timeout=2) as client,
            client.pubsub() as pubsub,
        ):
            await pubsub.psubscribe("*")
            while time.monotonic() < until:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.05)
                if message is not None and len(heard) < 2000:
                    one = (message["channel"], message["data"])
                    if one not in repeated:
                        heard.append(one)
                if heard and rng.random() < 0.5:
                    again = rng.choice(heard)
                    repeated.add(again)
                    await client.publish(*again)
                    count += 1
    return count
