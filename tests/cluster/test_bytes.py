"""What a client may put into a log, and what a node fetches of it at once, is bounded by bytes (P10)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Self

import pydantic_core
import pytest

from nonstick.events import Kind, draft
from nonstick.security import session_key
from nonstick.store import MAX_READ_BYTES, Batch, Event, Skimmed, Store
from nonstick.stores.redis import RedisStore
from nonstick.testing import ValkeyServer
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import Stream, getting, posting
from tests.cluster.stage import (
    Context,
    Stage,
    accept,
    announce,
    ask,
    call,
    cancel,
    eventually,
    notification,
    say,
    staged,
    text_of,
    texts_of,
)

pytestmark = pytest.mark.anyio

MEGABYTE = 1024 * 1024
LARGE = 4 * MEGABYTE - 1000
"""About as much as one message may have."""


class Brought(NamedTuple):
    """What one call that looked into a log brought."""

    method: str
    sizes: list[int]

    @property
    def size(self) -> int:
        return sum(self.sizes)


class Measured:
    """A store that notes what its calls bring."""

    def __init__(self, store: Store, brought: list[Brought]) -> None:
        self._store = store
        self._brought = brought

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def read(self, *args: Any, **options: Any) -> list[Event]:
        events = await self._store.read(*args, **options)
        self._brought.append(Brought("read", [len(event.data) for event in events]))
        return events

    async def skim(self, *args: Any, **options: Any) -> list[Skimmed]:
        entries = await self._store.skim(*args, **options)
        self._brought.append(Brought("skim", [len(entry.event.data) for entry in entries]))
        return entries

    async def __aenter__(self) -> Self:
        await self._store.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._store.__aexit__(*error)


def measured(make_store: MakeStore, brought: list[Brought]) -> MakeStore:
    return lambda: Measured(make_store(), brought)


def check_bounded(brought: list[Brought]) -> None:
    """No call fetched more than a read may, or one event."""
    assert brought
    for call_ in brought:
        assert len(call_.sizes) <= 1 or call_.size <= MAX_READ_BYTES, call_


async def log_size(stage: Stage, session: Session) -> int:
    return (await stage.store.load(session_key(session.id))).size


# ---- what clients say beside their requests


def talking(stage: Stage) -> None:
    """Tools that wait, ask and announce."""

    @stage.tool
    async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
        await say(ctx, "waiting")
        await stage.door(f"go on {arguments.get('name', '')}".strip())
        return "done"

    @stage.tool
    async def quick(ctx: Context, arguments: dict[str, Any]) -> str:
        return "quick"

    @stage.tool
    async def tell(ctx: Context, arguments: dict[str, Any]) -> str:
        await announce(ctx, arguments["text"] + " " * arguments.get("padding", 0))
        return "told"


async def test_large_cancels_leave_little_in_the_log_and_still_cancel(make_store: MakeStore) -> None:
    """P10, P5: of the reason, and whatever else they carry, next to nothing is kept."""
    async with staged(make_store, window=0.02) as (stage, a, b, c):
        talking(stage)
        session = await a.open()
        for number in range(7):
            message = notification("notifications/cancelled", reason="r" * LARGE, requestId=f"no such {number}")
            assert (await (a, b, c)[number % 3].post(message, session)).status_code == 202
        assert await log_size(stage, session) < 16 * 1024
        async with posting(b, session, call("wait", "mine")) as stream:
            await stream.message()
            message = notification("notifications/cancelled", reason="r" * LARGE, requestId="mine")
            assert (await c.post(message, session)).status_code == 202
            assert "cancelled" in text_of(await stream.outcome())
        overtaken = notification("notifications/cancelled", reason="r" * LARGE, requestId="late")
        await c.post(overtaken, session)
        assert "cancelled" in text_of((await b.post(call("quick", "late"), session)).json())


async def test_cancel_of_an_id_that_is_longer_than_any_is_kept_by_its_hash(memory: MakeStore) -> None:
    """P10."""
    async with staged(memory) as (stage, a, b, _):
        talking(stage)
        session = await a.open()
        for name in ("i" * LARGE, int("9" * 4000)):
            assert (await b.post(cancel(name), session)).status_code == 202
        assert await log_size(stage, session) < 4096


async def test_large_progress_is_clipped_for_handlers_on_every_node(make_store: MakeStore) -> None:
    """P10, P1: the same arrives at the handler, whichever node received it; and little of it is in the log."""
    async with staged(make_store, window=0.02) as (stage, a, b, c):
        heard: list[tuple[float, float | None, str | None]] = []

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            heard.append((progress, total, message))

        @stage.tool
        async def chat(ctx: Context, arguments: dict[str, Any]) -> str:
            await ask(ctx, on_progress=on_progress)
            return "done"

        session = await a.open()
        async with posting(b, session, call("chat")) as stream:
            question = await stream.message()
            token = question["params"]["_meta"]["progressToken"]
            for number, member in enumerate((a, b, c), 1):
                report = notification(
                    "notifications/progress", message="m" * LARGE, progressToken=token, progress=number, total=3
                )
                assert (await member.post(report, session)).status_code == 202
                await eventually(lambda: len(heard) == number)  # noqa: B023
            assert await log_size(stage, session) < 16 * 1024
            await c.post(accept(question), session)
            assert texts_of(await stream.rest()) == ["done"]
        assert [(progress, total) for progress, total, _ in heard] == [(1, 3), (2, 3), (3, 3)]
        assert {message for _, _, message in heard} == {"m" * 1024}


# ---- logs that hold large events all the same


async def fill(stage: Stage, session: Session, count: int = 7) -> None:
    """Large events that a node of 0.1.0 may have written, the id behind all the rest."""
    for number in range(count):
        body = pydantic_core.to_json({"reason": "r" * LARGE, "requestId": f"no such {number}"})
        await stage.store.append(session_key(session.id), Batch([draft(Kind.CANCEL, body)]))


@contextlib.asynccontextmanager
async def all_served(member: Member, session: Session) -> AsyncIterator[list[int]]:
    """Goes on calling meanwhile; what came each time."""
    statuses: list[int] = []

    async def go_on() -> None:
        while True:
            statuses.append((await member.post(call("quick", f"polite {len(statuses)}"), session)).status_code)

    calling = asyncio.create_task(go_on())
    try:
        yield statuses
    finally:
        calling.cancel()
        await asyncio.wait([calling])


async def test_many_connections_to_a_log_of_large_events_hold_nobody_up(valkey: ValkeyServer) -> None:
    """P10, P9: a GET looks at the beginnings alone; no call fetches more than its bound, or one event."""
    brought: list[Brought] = []
    prefix = f"bytes-{id(brought):x}"
    make_store = measured(lambda: RedisStore(valkey.url, prefix=prefix), brought)
    async with staged(make_store, window=0.02) as (stage, a, b, c), contextlib.AsyncExitStack() as stack:
        talking(stage)
        session, polite = await a.open(), await a.open()
        await fill(stage, session)
        async with all_served(c, polite) as statuses:
            streams: list[Stream] = []
            for number in range(32):
                del brought[:]
                stream = await stack.enter_async_context(getting((b, c)[number % 2], session))
                assert (await stream.response()).status_code == 200
                streams.append(stream)
                scanned = [call_ for call_ in brought if call_.method == "skim"]
                assert sum(call_.size for call_ in scanned) < 64 * 1024
                check_bounded(brought)
            assert (await a.post(call("tell", text="hello"), session)).status_code == 200
            assert text_of(await streams[-1].message()) == "hello"
            seen = len(statuses)
            await eventually(lambda: len(statuses) > seen)
        assert set(statuses) == {200}
        check_bounded(brought)
