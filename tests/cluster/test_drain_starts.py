"""A drain begins while a request is at any step of its start: each gets a defined answer, and the node is gone (P8)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Self

import pytest

from nonstick.core.names import session_key
from nonstick.store import Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import HEADERS, Member, Session
from tests import pace
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import DEADLINE, Stream
from tests.cluster.stage import Context, Stage, call, eventually, node_of, say

pytestmark = pytest.mark.anyio

STEPS: Final = 8
"""Store calls, and some more, that the start of a request takes."""
SHORT: Final = 0.1
"""Seconds of grace for what cannot finish."""
LONG: Final = 60.0
ENDED: Final = 1.5
"""Seconds after the grace period within which a node has ended all that it has."""


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def speaking(stage: Stage) -> None:
    """A tool that speaks first."""

    @stage.tool
    async def speak(ctx: Context, arguments: dict[str, Any]) -> str:
        stage.open("spoke")
        await say(ctx, "first" + "." * arguments.get("size", 0))
        if door := arguments.get("door"):
            await stage.door(door)
        return "done"


class StandsStill:
    """A node's store that stands still from the n-th call on that concerns one session, once it is told which."""

    def __init__(self, store: Store, nth: int) -> None:
        self._store = store
        self._left = nth
        self.key = ""
        self.stands = asyncio.Event()
        self.goes_on = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._store, name)
        return self._held(attribute) if name in ("load", "read", "append", "update", "lapsed") else attribute

    def _held(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def held(concerns: Any, *args: Any, **options: Any) -> Any:
            if self.key and (concerns == self.key or not isinstance(concerns, str)):
                self._left -= 1
                if self._left <= 0:
                    self.stands.set()
                    await self.goes_on.wait()
            return await method(concerns, *args, **options)

        return held

    @property
    def url(self) -> str:
        return self._store.url

    async def __aenter__(self) -> Self:
        await self._store.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._store.__aexit__(*error)


class Rehearsal:
    """A stage of which each node but the first has a store that stands still at another step."""

    def __init__(self, patience: float, **options: Any) -> None:
        store = MemoryStore()
        self.patience = patience
        """Seconds within which a request comes to its node's step, if it ever does."""
        self.stores: list[StandsStill] = []

        def make() -> Store:
            self.stores.append(StandsStill(store, len(self.stores) - 1))
            return self.stores[-1]

        self.stage = Stage(make, nodes=STEPS + 1, window=0.02, **options)
        self.reached: list[int] = []
        """The steps at which a store stood still before the request had ended."""

        speaking(self.stage)

    async def __aenter__(self) -> Self:
        await self.stage.__aenter__()
        self.first, *self.others = self.stage.cluster
        # The stage has made an instance for itself, before those of the nodes.
        self.own = dict(zip((node.name for node in self.others), self.stores[2:], strict=True))
        return self

    async def __aexit__(self, *error: Any) -> None:
        for store in self.stores:
            store.goes_on.set()
        await self.stage.__aexit__(None, None, None)

    async def at_every_step(
        self, session: Session, begin: Callable[[Member], Stream], *, goes_on: bool
    ) -> list[tuple[int, str]]:
        """Begins this request at each node, and a drain while it is at that node's step. How each one ended."""
        return list(
            await asyncio.gather(*(self._at_step(member, session, begin, goes_on=goes_on) for member in self.others))
        )

    async def _at_step(
        self, member: Member, session: Session, begin: Callable[[Member], Stream], *, goes_on: bool
    ) -> tuple[int, str]:
        store = self.own[member.name]
        store.key = session_key(session.id)
        stream = begin(member)
        try:
            waiting = asyncio.create_task(store.stands.wait())
            await asyncio.wait([waiting, stream.task], timeout=self.patience, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if store.stands.is_set() and not stream.task.done():
                self.reached.append(self.stores.index(store) - 1)
            began = time.monotonic()
            draining = asyncio.create_task(member.app.manager.drain())
            if goes_on:
                await asyncio.sleep(0)
                store.goes_on.set()
            ended = await how_it_ended(stream)
            await draining
            if not goes_on:
                assert pace.in_time(time.monotonic() - began, SHORT + ENDED)
            return ended
        finally:
            await stream.close()


async def how_it_ended(stream: Stream) -> tuple[int, str]:
    """Its status, and what its client can make of it."""
    response = await stream.response()
    if response.headers.get("content-type", "").startswith("application/json"):
        body = response.json()
        if "result" in body:
            return response.status_code, "result"
        reason = (body["error"].get("data") or {}).get("reason", "")
        assert response.status_code != 503 or response.headers["retry-after"] == "1"
        return response.status_code, reason or "refused"
    events = await stream.events()
    for event in reversed(events):
        if event.data and "method" not in event.message:
            return response.status_code, "result" if "result" in event.message else event.message["error"]["data"][
                "reason"
            ]
        if event.retry is not None and not event.id:
            return response.status_code, "handed over"
    raise AssertionError(f"it just ended: {events}")


def posts(session: Session) -> Callable[[Member], Stream]:
    return lambda member: Stream(member, "POST", session, call("speak", member.name), {})


def gets(session: Session, last: str | None = None) -> Callable[[Member], Stream]:
    return lambda member: Stream(member, "GET", session, None, {} if last is None else {"last-event-id": last})


REFUSED: Final = (503, "refused")
HANDED_OVER: Final = (200, "handed over")
RESULT: Final = (200, "result")
SHUT_DOWN: Final = (200, "node_shut_down")
IN_DOUBT: Final = (200, "store_unavailable")


@pace.unhurried("patience", 2.0, 8.0, 16.0)
@pytest.mark.parametrize("goes_on", [True, False])
async def test_get_is_answered_at_every_step(goes_on: bool, patience: float) -> None:
    """P8: it is handed over, or told to come back."""
    async with Rehearsal(patience, grace=LONG if goes_on else SHORT) as play, asyncio.timeout(2 * DEADLINE):
        session = await play.first.open()
        ends = await play.at_every_step(session, gets(session), goes_on=goes_on)
        assert set(ends) == ({HANDED_OVER} if goes_on else {HANDED_OVER, REFUSED}), ends
        assert {1, 2, 3} <= set(play.reached)


@pace.unhurried("patience", 2.0, 8.0, 16.0)
@pytest.mark.parametrize("goes_on", [True, False])
async def test_resumption_is_answered_at_every_step(goes_on: bool, patience: float) -> None:
    """P8: it is handed over, or told to come back."""
    async with Rehearsal(patience, grace=LONG if goes_on else SHORT) as play, asyncio.timeout(2 * DEADLINE):
        session = await play.first.open()
        running = Stream(play.first, "POST", session, call("speak", 1, door="never"), {})
        last = (await running.event()).id
        ends = await play.at_every_step(session, gets(session, last), goes_on=goes_on)
        assert set(ends) == ({HANDED_OVER} if goes_on else {HANDED_OVER, REFUSED}), ends
        assert {1, 2, 3} <= set(play.reached)
        await running.close()


@pace.unhurried("patience", 2.0, 8.0, 16.0)
@pytest.mark.parametrize("goes_on", [True, False])
async def test_request_is_answered_at_every_step(goes_on: bool, patience: float) -> None:
    """P8: it has its result; or its client is told that it did not run, or did not end, or comes back for its end."""
    async with Rehearsal(patience, grace=LONG if goes_on else SHORT) as play, asyncio.timeout(2 * DEADLINE):
        session = await play.first.open()
        ends = await play.at_every_step(session, posts(session), goes_on=goes_on)
        assert set(ends) == ({RESULT} if goes_on else {REFUSED, SHUT_DOWN, HANDED_OVER, RESULT}), ends
        assert {1, 2, 3} <= set(play.reached)


@pace.unhurried("patience", 2.0, 8.0, 16.0)
@pytest.mark.parametrize("goes_on", [True, False])
async def test_relay_is_answered_at_every_step(goes_on: bool, patience: float) -> None:
    """P8: with `placement="owner"`. Once it has an event id it is handed over, for it runs elsewhere."""
    async with (
        Rehearsal(patience, grace=LONG if goes_on else SHORT, placement="owner") as play,
        asyncio.timeout(2 * DEADLINE),
    ):
        session = await play.first.open()
        ends = await play.at_every_step(session, posts(session), goes_on=goes_on)
        assert set(ends) == ({HANDED_OVER, RESULT} if goes_on else {REFUSED, IN_DOUBT, HANDED_OVER, RESULT}), ends
        assert {1, 2, 3} <= set(play.reached)


# ---- clients that do not finish


async def begun(member: Member, session: Session, body: bytes, **headers: str) -> Connection:
    """A POST whose body has begun to come in."""
    reader, writer = await asyncio.open_connection("127.0.0.1", member.port)
    named = {**HEADERS, **session.headers, **headers, "content-length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    writer.write(f"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:{member.port}\r\n{lines}\r\n".encode() + body[:10])
    await writer.drain()
    await eventually(lambda: bool(node_of(member).services.drain.until_closing))
    return reader, writer


@pace.unhurried("grace", 0.5, 2.0, 8.0)
@pytest.mark.parametrize("headers", [{}, {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/list"}])
async def test_half_sent_request_waits_for_grace(memory: MakeStore, headers: dict[str, str], grace: float) -> None:
    """P8: and is refused after it, or it would hold the node for `receive_timeout`."""
    body = json.dumps(call("speak", 1)).encode()
    async with Stage(memory, nodes=1, grace=grace) as stage, asyncio.timeout(DEADLINE):
        (a,) = stage.cluster
        speaking(stage)
        session = await a.open()
        in_time, too_late = [await begun(a, session, body, **headers) for _ in range(2)]
        began = time.monotonic()
        draining = asyncio.create_task(a.app.manager.drain())
        await asyncio.sleep(0)
        in_time[1].write(body[10:])
        status = await in_time[0].readline()
        assert b" 503 " not in status
        assert pace.in_time(time.monotonic() - began, grace)
        answer = await too_late[0].read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"connection: close" in answer
        assert b"retry-after: 1" in answer
        assert pace.in_time(time.monotonic() - began, grace + ENDED)
        for _, writer in (in_time, too_late):
            writer.close()
        await draining


async def test_stalled_client_delays_no_closing_node(memory: MakeStore) -> None:
    """P8: nor for `send_timeout`."""
    async with Stage(memory, nodes=1, grace=0.1) as stage, asyncio.timeout(DEADLINE):
        (a,) = stage.cluster
        speaking(stage)
        session = await a.open()
        body = json.dumps(call("speak", 1, size=20_000_000)).encode()
        _, writer = await begun(a, session, body)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(body[10:])
        await stage.reached("spoke")
        await eventually(lambda: bool(node_of(a).services.drain.until_closing))
        began = time.monotonic()
        await a.app.manager.drain()
        await eventually(lambda: not len(node_of(a).services.requests))
        assert pace.in_time(time.monotonic() - began, 0.1 + ENDED)
        writer.transport.abort()


async def test_request_after_grace_does_not_run(memory: MakeStore) -> None:
    """P8: what began then would be ended at once."""
    async with Stage(memory, nodes=1, grace=0.05) as stage, asyncio.timeout(DEADLINE):
        (a,) = stage.cluster
        speaking(stage)
        session = await a.open()
        a.app.manager.begin_drain()
        await eventually(lambda: node_of(a).services.drain.is_closing)
        response = await a.post(call("speak", 1), session)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert not stage.marks["spoke"].is_set()
