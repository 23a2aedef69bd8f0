"""No log says what must not be known: a full life on real nodes at the lowest level, and everything they wrote."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from nonstick.core.names import session_key
from nonstick.testing import FaultProxy, PostgresServer, ValkeyServer
from nonstick.testing.cluster import Member, Session
from tests.cluster.sse import DEADLINE, getting, posting
from tests.cluster.stage import accept, call, cancel, eventually, notification

pytestmark = pytest.mark.anyio

FORMATS = ("text", "json")


class Served(Member):
    """A node in a process of its own: `nonstick serve` at the lowest log level."""

    def __init__(self, home: Path, name: str, style: str, store: str) -> None:
        self.name = name
        self.log = home / f"{name}.log"
        self.client = httpx2.AsyncClient(timeout=30)
        command = [sys.executable, "-m", "nonstick", "serve", "tests.cluster.secretive_server:mcp", "--port", "0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--log-format", style, "--log-level", "debug", "--grace", "1"],
                env=os.environ | {"NONSTICK_STORE": store, "NONSTICK_NODE": name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def written(self) -> str:
        return self.log.read_text()

    async def start(self) -> None:
        def serves() -> bool:
            assert self.process.poll() is None, self.written
            found = re.search(r"http://127\.0\.0\.1:\d+/mcp", self.written)
            self.url = found[0] if found else ""
            return found is not None

        await eventually(serves)

    async def stop(self) -> None:
        await self.client.aclose()
        self.process.terminate()
        await asyncio.to_thread(self.process.wait, DEADLINE)


@asynccontextmanager
async def served(home: Path, store: str) -> AsyncIterator[list[Served]]:
    async with AsyncExitStack() as stack:
        nodes = []
        for number, style in enumerate(FORMATS):
            node = Served(home, f"n{number}", style, store)
            stack.callback(node.process.kill)
            nodes.append(node)
        await asyncio.gather(*(node.start() for node in nodes))
        yield nodes
        await asyncio.gather(*(node.stop() for node in nodes))


def store_with_password(kind: str, request: pytest.FixtureRequest, stack: AsyncExitStack, password: str) -> str:
    """Its URL, the password in it."""
    if kind == "postgres":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        parts = httpx2.URL(postgres.url)
        return f"postgresql://{parts.username or 'postgres'}:{password}@{parts.host}:{parts.port}{parts.path}"
    valkey = stack.enter_context(ValkeyServer())
    with redis.Redis.from_url(valkey.url) as client:
        client.config_set("requirepass", password)
    return f"redis://:{password}@127.0.0.1:{valkey.port}"


@pytest.mark.parametrize("kind", ["valkey", pytest.param("postgres", marks=pytest.mark.slow)])
async def test_no_log_holds_ids_or_secrets(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """P13: opened, called, asked, resumed, cancelled, failed, refused, cut off, deleted; at DEBUG, in both formats."""
    password, token, text = (f"{what}-{secrets.token_hex(8)}" for what in ("password", "ada", "payload"))
    async with AsyncExitStack() as stack:
        direct = store_with_password(kind, request, stack, password)
        proxy = await stack.enter_async_context(FaultProxy(direct))
        nodes = await stack.enter_async_context(served(tmp_path, proxy.url))
        session, ids = await live(nodes, text, token, proxy)
    written = "".join(node.written for node in nodes)
    assert '"node": "n1' in written
    # It was no empty search: what may be said of the session was said, at every level.
    assert session_key(session.id)[:12] in written
    assert all(level in written for level in ("DEBUG", '"debug"', "WARNING", "ERROR"))
    for secret in (session.id, text, token, password, *ids):
        assert secret not in written, [line for line in written.splitlines() if secret in line]


async def live(nodes: list[Served], text: str, token: str, proxy: FaultProxy) -> tuple[Session, list[str]]:
    """A full life; returns the session and the event ids that were given out."""
    a, b = nodes
    c = a
    own: dict[str, Any] = {"authorization": f"Bearer {token}"}
    session = await a.open(capabilities={"elicitation": {}}, **own)
    ids: list[str] = []

    async def refused(message: Any, member: Served = a, **headers: str) -> int:
        response = await member.post(message, session, **headers)
        return response.status_code

    async with getting(c, session) as standalone:
        async with posting(b, session, call("work", meta={"progressToken": text}, text=text)) as stream:
            await stream.message()
            ids.append(stream.last_id or "")
            question = await stream.message()
        assert await refused(notification("notifications/progress", progressToken=question["id"], progress=text)) == 202
        async with getting(c, session, ids[0]) as stream:
            assert (await c.post(accept(question, name=text), session)).status_code == 202
            reply = {"jsonrpc": "2.0", "id": question["id"], "result": {"action": "accept", "content": {"value": text}}}
            await a.post(reply, session)
            await stream.rest()
        async with posting(b, session, call("wait", id=2, meta={"progressToken": text}, text=text)) as stream:
            await stream.message()
            ids.append(stream.last_id or "")
            await c.post(cancel(2) | {"params": {"requestId": 2, "reason": text}}, session)
            await stream.rest()
        await standalone.close()
    for number, message in enumerate(
        (
            call("boom", text=text),
            call("misplace", text=text),
            call("work", value=text),
            call(text),
            {"jsonrpc": "2.0", "method": "resources/read", "params": {"uri": f"memo://{text}"}},
            {"jsonrpc": "2.0", "method": text, "params": {"text": text}},
            {"jsonrpc": "2.0", "method": "completion/complete", "params": {"ref": text, "argument": text}},
        )
    ):
        await nodes[number % 2].post(message | {"id": number + 3}, session)
    for notice in (text, "notifications/initialized", "notifications/roots/list_changed", "notifications/progress"):
        await refused(notification(notice, text=text))
    # What is no message, no id, nobody's, another one's.
    assert await refused([text]) == 400
    assert await refused({"text": text}) == 400
    assert await refused(call("boom"), b, authorization=f"Bearer bob-{text}") == 404
    assert await refused(call("boom"), b, **{"mcp-session-id": session.id[::-1]}) == 404
    got = await c.client.get(
        c.url, headers={**session.headers, "accept": "text/event-stream", "last-event-id": f"1.{text}"}
    )
    assert got.status_code == 400
    # Newer clients have no session, but payloads.
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": text, "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    newer = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": "boom"}
    assert (await a.post(call("boom", id=1, meta=meta, text=text), None, **own, **newer)).status_code == 200
    # The store is away, while a request streams.
    async with posting(b, session, call("wait", id=20, meta={"progressToken": text}, text=text)) as stream:
        await stream.message()
        await proxy.cut()
        assert await refused(call("boom", text=text), c) == 503
        await eventually(lambda: "lost" in a.written + b.written + c.written)
        await proxy.heal()

        async def answers() -> bool:
            return await refused({"jsonrpc": "2.0", "id": 30, "method": "ping"}, c) == 200

        await eventually(answers)
        assert (await a.delete(session)).status_code == 200
        await stream.rest()
    assert await refused(call("boom"), b) == 404
    return session, ids
