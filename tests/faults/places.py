"""Where sessions lie, for tests that harm it: a real server, one deployment's corner of it, and its nodes' stores."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from nonstick.errors import StoreUnavailable
from nonstick.store import Store
from nonstick.stores import open_store
from nonstick.testing import FaultProxy, PostgresServer, ValkeyServer
from nonstick.testing.cluster import Member, Session
from tests.cluster.servers import opening, request
from tests.cluster.stage import Context, Stage, call, say

__all__ = ["Place", "Server", "asked", "assert_unavailable", "counting", "repeated", "step", "steps", "up_to"]

Server = ValkeyServer | PostgresServer


@dataclass
class Place:
    """One test's deployment on a server that other tests use too, one after the other."""

    kind: str
    server: Server
    name: str = field(default_factory=lambda: f"faults_{secrets.token_hex(6)}")

    def url(self, by: FaultProxy | None = None) -> str:
        """Where a node finds it, directly or by way of a proxy."""
        base = self.server.url if by is None else by.url
        return f"{base}?{'prefix' if self.kind == 'valkey' else 'schema'}={self.name}&empty_grace=1"

    def make(self) -> Store:
        return open_store(self.url())

    def behind(self, *proxies: FaultProxy | None) -> Callable[[], Store]:
        """Makes the stage's own store, which reaches the server directly, then a node's for each proxy or None."""
        urls = iter([self.url(), *map(self.url, proxies)])
        return lambda: open_store(next(urls))


# ---- what runs, and what clients see of it


def counting(stage: Stage, handled: list[str] | None = None) -> None:
    """The tool `count` says 1, 2, … when it is let, and ends when it is let. Notes how each run of it goes."""
    notes = [] if handled is None else handled

    @stage.tool
    async def count(ctx: Context, args: dict[str, Any]) -> str:
        notes.append("began")
        try:
            for number in range(1, args["steps"] + 1):
                await stage.door(f"step {number}")
                await say(ctx, str(number))
            await stage.door("end")
        except asyncio.CancelledError:
            notes.append("cancelled")
            raise
        notes.append("ended")
        return "done"


def step(stage: Stage, *numbers: int) -> None:
    """Lets the tool go these steps."""
    for number in numbers:
        stage.open(f"step {number}")


def steps(count: int, id: Any = 1) -> dict[str, Any]:  # noqa: A002
    """A call of the tool."""
    return call("count", id, steps=count)


def up_to(count: int, first: int = 1) -> list[str]:
    """What it says from the `first` step on, and at its end."""
    return [*map(str, range(first, count + 1)), "done"]


def assert_unavailable(response: httpx2.Response) -> None:
    """503 that says when to come back, and does not say that the session is gone (P9)."""
    assert response.status_code == 503, response.text
    assert int(response.headers["retry-after"]) >= 1
    assert "store" in response.json()["error"]["message"]


async def asked(member: Member, session: Session) -> list[httpx2.Response]:
    """The answers to one request of each kind."""
    return list(
        await asyncio.gather(
            member.post(request("ping", id="asked"), session),
            member.post(opening()),
            member.client.get(member.url, headers={"accept": "text/event-stream", **session.headers}),
        )
    )


async def repeated(ask: Callable[[], Awaitable[httpx2.Response]], *, until: int, allowed: Iterable[int]) -> None:
    """Asks until the status is `until`; each one before it must be allowed."""
    async with asyncio.timeout(60):
        while (status := (await ask()).status_code) != until:
            assert status in allowed, status
            await asyncio.sleep(0.02)


async def reached(store: Store) -> None:
    """Returns once the store answers."""
    async with asyncio.timeout(60):
        while True:
            try:
                await store.ping()
                return
            except StoreUnavailable:
                await asyncio.sleep(0.02)
