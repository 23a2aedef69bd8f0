"""What a client may put into a log, and what a node fetches of it at once, is bounded by bytes (P10)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, NamedTuple, Self

import pydantic_core
import pytest

from nonstick.core.event_ids import EventId
from nonstick.core.events import Kind, draft
from nonstick.core.introductions import INTRODUCTIONS
from nonstick.core.names import session_key
from nonstick.core.record import OWNER
from nonstick.errors import NotPending
from nonstick.session.standalone import StandaloneConnection
from nonstick.store import MAX_READ_BYTES, NEW_STREAM, STANDALONE, Appended, Batch, Cursor, Event, Skimmed, Store
from nonstick.stores.memory import MemoryStore
from nonstick.stores.redis import RedisStore
from nonstick.testing import ValkeyServer
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.servers import messages
from tests.cluster.sse import DEADLINE, Stream, getting, posting
from tests.cluster.stage import (
    Context,
    HeldStore,
    Stage,
    accept,
    announce,
    ask,
    call,
    cancel,
    eventually,
    node_of,
    notification,
    say,
    staged,
    text_of,
    texts_of,
)
from tests.pace import unhurried

pytestmark = pytest.mark.anyio

MEGABYTE = 1024 * 1024
LARGE = 4 * MEGABYTE - 1000
"""About as much as one message may have."""


class Brought(NamedTuple):
    """What one call that looked into a log brought; `after`: of a skim, the position that it began after."""

    method: str
    sizes: list[int]
    after: int = 0

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

    async def skim(self, key: str, after: Cursor, **options: Any) -> list[Skimmed]:
        entries = await self._store.skim(key, after, **options)
        self._brought.append(Brought("skim", [len(entry.event.data) for entry in entries], after.position))
        return entries

    async def append(self, key: str, batch: Batch) -> Appended:
        if batch.settle is not None and not batch.events:
            self._brought.append(Brought(f"settle {batch.settle}", []))
        return await self._store.append(key, batch)

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


async def test_large_cancels_leave_little_in_log(make_store: MakeStore) -> None:
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


async def test_cancel_of_overlong_id_keeps_hash(memory: MakeStore) -> None:
    """P10."""
    async with staged(memory) as (stage, a, b, _):
        talking(stage)
        session = await a.open()
        for name in ("i" * LARGE, int("9" * 4000)):
            assert (await b.post(cancel(name), session)).status_code == 202
        assert await log_size(stage, session) < 4096


async def test_large_progress_is_clipped_everywhere(make_store: MakeStore) -> None:
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


async def test_logs_of_large_events_delay_nobody(valkey: ValkeyServer) -> None:
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


# ---- requests that the log keeps whole


async def flood(stage: Stage, session: Session, members: list[Member], count: int) -> tuple[list[int], int]:
    """So many large requests at once: the statuses of those that are refused, and how large the log became."""
    largest = 0
    posts = [
        asyncio.create_task(members[n % len(members)].post(call("wait", f"r{n}", padding="p" * MEGABYTE), session))
        for n in range(count)
    ]
    refused: list[int] = []
    async with asyncio.timeout(60):
        while True:
            largest = max(largest, await log_size(stage, session))
            done = [post.result() for post in posts if post.done()]
            refused = [response.status_code for response in done]
            opened = sum(kind is Kind.OPENED for kind in await stage.kinds(session))
            if opened + len(refused) >= count:
                break
            await asyncio.sleep(0.02)
    for response in (post.result() for post in posts if post.done()):
        assert response.headers["retry-after"] == "1"
        assert "log of this session is full" in response.json()["error"]["message"]
    stage.open("go on")
    answers = await asyncio.gather(*posts)
    assert sum(response.status_code == 200 for response in answers) == count - len(refused)
    return refused, largest


async def test_open_relayed_requests_fit_the_log(make_store: MakeStore) -> None:
    """P10: 429, with when to come back, once those that have not ended fill it; and there is room again afterwards."""
    options = {"placement": "owner", "max_log_bytes": 4 * MEGABYTE, "window": 0.02}
    async with staged(make_store, **options) as (stage, a, b, _):
        talking(stage)
        session = await a.open()
        refused, largest = await flood(stage, session, [b], 12)
        assert refused == [429] * 9
        assert largest <= 4 * MEGABYTE
        again = await b.post(call("wait", "again", padding="p" * MEGABYTE), session)
        assert again.status_code == 200


async def test_relayed_notifications_fit_the_log(memory: MakeStore) -> None:
    """P10: what is dropped to make room for one are those before it."""
    options = {"placement": "owner", "max_log_bytes": 4 * MEGABYTE}
    async with staged(memory, **options) as (stage, a, b, _):
        talking(stage)
        session = await a.open()
        for number in range(12):
            response = await b.post(notification("notifications/x", number=number, padding="p" * MEGABYTE), session)
            assert response.status_code == 202
            assert await log_size(stage, session) <= 4 * MEGABYTE


async def test_repeatable_requests_fit_the_log(make_store: MakeStore) -> None:
    """P10: as relayed ones. On several nodes at once each knows what the store said to it last."""
    options = {"reexecute": "idempotent", "max_log_bytes": 4 * MEGABYTE, "window": 0.02}
    async with staged(make_store, **options) as (stage, _, b, c):
        talking(stage)
        session = await b.open()
        refused, largest = await flood(stage, session, [b], 12)
        assert refused == [429] * 9
        assert largest <= 4 * MEGABYTE + 10_000  # and what the tool says
        again = await c.post(call("wait", "again", padding="p" * MEGABYTE), session)
        assert again.status_code == 200


async def test_unused_room_is_free_again(memory: MakeStore) -> None:
    """P10: what is answered with JSON never was in the log."""
    options = {"reexecute": "idempotent", "max_log_bytes": 4 * MEGABYTE}
    async with staged(memory, **options) as (stage, a, b, _):
        talking(stage)
        session = await a.open()
        async with posting(b, session, call("wait", "open")) as stream:
            await stream.message()
            for number in range(8):
                answer = await b.post(call("quick", number, padding="p" * MEGABYTE), session)
                assert text_of(answer.json()) == "quick"
            stage.open("go on")
            assert texts_of(await stream.rest()) == ["done"]


# ---- who tells without end


async def test_talkative_handler_lets_others_run(memory: MakeStore) -> None:
    """P10: on a store whose calls never wait, too; else all that is told waits in memory for those who listen."""
    async with staged(memory) as (stage, a, b, _):
        turns = 0
        during: list[int] = []

        @stage.tool
        async def tell_much(ctx: Context, arguments: dict[str, Any]) -> str:
            for number in range(100):
                before = turns
                await announce(ctx, f"{number}" + " " * 50_000)
                during.append(turns - before)
            return "told"

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        session = await a.open()
        async with getting(b, session) as listening:
            await listening.event()
            turning = asyncio.create_task(turn())
            assert text_of(messages(await b.post(call("tell_much"), session))[-1]) == "told"
            turning.cancel()
            assert min(during) >= 1
            for number in range(100):
                assert text_of(await listening.message()).strip() == f"{number}"


# ---- trimming


async def test_untrimmable_log_is_rarely_read(make_store: MakeStore) -> None:
    """P10: nor are its bodies; though nothing of the session is left on the node between two requests."""
    by_node: list[list[Brought]] = []

    def make() -> Store:
        by_node.append([])
        return measured(make_store, by_node[-1])()

    async with staged(make, window=0.02, max_log_bytes=2 * MEGABYTE) as (stage, a, b, c):
        talking(stage)

        @stage.tool
        async def fill_up(ctx: Context, arguments: dict[str, Any]) -> str:
            for _ in range(25):
                await say(ctx, "x" * 100_000)
            await stage.door("go on")
            return "done"

        session = await a.open()
        async with posting(b, session, call("fill_up", "large")) as stream:
            for _ in range(25):
                await stream.message()
            await eventually(lambda: not node_of(c).sessions)
            brought = by_node[-1]
            del brought[:]
            for number in range(20):
                async with posting(c, session, call("wait", number, name="small")) as small:
                    await small.message()
                    stage.open("go on small")
                    assert texts_of(await small.rest()) == ["done"]
                await eventually(lambda: not node_of(c).sessions)
            await eventually(lambda: not node_of(c).services.logs.trimming.looks.under_way)
            looks = [call_ for call_ in brought if call_.method == "skim"]
            # Once for what may go, and once for whose it is that may not.
            assert [call_.after for call_ in looks].count(0) == 2
            # Each goes on, by however many calls, to the end of a log that grows meanwhile, and shows no event twice.
            head = (await stage.store.load(session_key(session.id))).head
            assert sum(len(call_.sizes) for call_ in looks) <= 2 * head.position
            assert sum(call_.size for call_ in looks) < 64 * 1024
            stage.open("go on")
            assert texts_of(await stream.rest()) == ["done"]

        async def small_again() -> bool:
            return await log_size(stage, session) <= 2 * MEGABYTE

        # It has ended, so that it goes now.
        await eventually(small_again)


async def test_stream_ending_mid_look_goes(memory: MakeStore) -> None:
    """P10: also if nothing is appended after it."""
    held: list[HeldStore] = []

    def make() -> Any:
        held.append(HeldStore(memory(), "lapsed", after=False, when=lambda names: not names))
        return held[-1]

    async with staged(make, max_log_bytes=2 * MEGABYTE) as (stage, a, b, _):

        @stage.tool
        async def fill_up(ctx: Context, arguments: dict[str, Any]) -> str:
            for _ in range(25):
                await say(ctx, "x" * 100_000)
            await stage.door("go on")
            return "done"

        session = await a.open()
        looking = held[-2]
        looking.holding = True
        async with posting(b, session, call("fill_up")) as stream:
            # The log was looked through: nothing in it is of another node, and what is here has not ended.
            async with asyncio.timeout(DEADLINE):
                await looking.held.wait()
            stage.open("go on")
            assert texts_of(await stream.rest())[-1] == "done"
        looking.holding = False
        looking.released.set()

        async def small() -> bool:
            return await log_size(stage, session) <= 2 * MEGABYTE

        await eventually(small)


async def test_trimming_lets_others_run() -> None:
    """P10: the event loop is held for no more than a part of it, on a store whose calls never wait."""
    turns = 0
    longest = 0

    class Counted(MemoryStore):
        """Knows how much was asked of it in one turn of the event loop."""

        turn = -1
        asked = 0

        def _count(self, events: int) -> None:
            nonlocal longest
            self.asked = events + (self.asked if self.turn == turns else 0)
            self.turn = turns
            longest = max(longest, self.asked)

        async def skim(self, *args: Any, **options: Any) -> list[Skimmed]:
            entries = await super().skim(*args, **options)
            self._count(len(entries))
            return entries

        async def trim(self, *args: Any, **options: Any) -> None:
            before = len(self._sessions[args[0]].events)
            await super().trim(*args, **options)
            self._count(before - len(self._sessions[args[0]].events))

    store = Counted()
    async with staged(one(store), max_log_events=6000) as (stage, a, b, _):
        talking(stage)
        session = await a.open()
        key = session_key(session.id)
        for _ in range(2000):
            await store.append(key, Batch([draft(Kind.OPENED, b"{}")] * 2, stream=NEW_STREAM, terminal=True))
        for _ in range(20):
            await store.append(key, Batch([draft(Kind.MESSAGE, b"{}")] * 200))

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn())
        await b.post(call("tell", text="one more"), session)

        async def small() -> bool:
            return (await store.load(key)).count <= 6000

        await eventually(small)
        turning.cancel()
        # As many as one call asks for, and no two calls in one turn.
        assert 0 < longest <= 1000


# ---- what a lost node leaves


async def lost_request(stage: Stage, session: Session, *news: Batch) -> str:
    """The id of the first event of a request whose node is gone; after it these were appended to the log."""
    key = session_key(session.id)
    request = {"jsonrpc": "2.0", "id": "lost", "method": "tools/call", "params": {"name": "wait"}}
    body = {"node": "gone-00000000", "attempt": 1, "request": request, "partial": True}
    opened = draft(Kind.OPENED, pydantic_core.to_json(body))
    first = (await stage.store.append(key, Batch([opened], stream=NEW_STREAM))).first
    for batch in news:
        await stage.store.append(key, replace(batch, stream=first) if batch.stream else batch)
    return EventId(first, Cursor(first, opened.tag), "lost").seal(session.id)


async def test_cancel_with_early_reason_still_counts(memory: MakeStore) -> None:
    """P5, P12: it stops the request of a lost node. 0.1.0 wrote it like this, with megabytes before the id."""
    async with staged(memory) as (stage, a, b, _):
        talking(stage)
        session = await a.open()
        body = pydantic_core.to_json({"reason": "r" * LARGE, "requestId": "lost"})
        place = await lost_request(stage, session, Batch([draft(Kind.CANCEL, body)]))
        async with getting(b, session, place) as resumed:
            assert text_of((await resumed.rest())[-1]) == "Request cancelled"


async def test_lost_nodes_questions_stop_pending(memory: MakeStore) -> None:
    """P10: with the end of its request; what was answered, and what others ask, is left alone."""

    def asked(name: str, stream: int) -> Batch:
        body = pydantic_core.to_json(
            {"jsonrpc": "2.0", "id": name, "method": "roots/list", "params": {"x": "x" * 5000}}
        )
        return Batch([draft(Kind.MESSAGE, body)], stream=stream, expect=[name])

    brought: list[Brought] = []
    async with staged(measured(memory, brought)) as (stage, a, b, _):
        session = await a.open()
        answer = pydantic_core.to_json({"jsonrpc": "2.0", "id": "srv-2", "result": {"y": "y" * 5000}})
        reply = Batch([draft(Kind.REPLY, answer)], settle="srv-2")
        news = [asked("srv-1", 1), asked("srv-2", 1), reply, asked("srv-3", STANDALONE)]
        place = await lost_request(stage, session, *news)
        async with getting(b, session, place) as resumed:
            assert (await resumed.rest())[-1]["error"]["data"]["reason"] == "node_lost"

        async def withdrawn() -> bool:
            loaded = Batch([], answers="srv-1", uncancel="x")
            try:
                await stage.store.append(session_key(session.id), loaded)
            except NotPending:
                return True
            return False

        await eventually(withdrawn)
        assert [call_.method for call_ in brought if call_.method.startswith("settle")] == ["settle srv-1"]
        assert await stage.is_pending(session, "srv-3")
        assert not await stage.is_pending(session, "srv-2")


async def test_large_lost_requests_are_run_next(memory: MakeStore) -> None:
    """P7: they are found by the beginnings of what is in the log, and read one by one."""
    brought: list[Brought] = []

    async def rehydrate(connection: Any) -> None:
        stage.open("rehydrated")

    options = {"placement": "owner", "rehydrate": rehydrate, "window": 0.02}
    async with staged(measured(memory, brought), **options) as (stage, a, b, c):
        talking(stage)
        session = await a.open()
        key = session_key(session.id)
        await stage.store.update(key, {OWNER: b"gone-00000000"})
        held = node_of(a).placement.held.get(key)
        assert held is not None
        assert await held.look()
        posts = [
            asyncio.create_task(member.post(call("wait", f"r{n}", padding="p" * LARGE), session))
            for n, member in enumerate((b, c))
        ]
        await stage.reached("rehydrated")
        stage.open("go on")
        for answer in await asyncio.gather(*posts):
            assert texts_of(messages(answer)) == ["waiting", "done"]
        check_bounded(brought)


# ---- what a connection keeps


async def test_connection_keeps_bounded_settled_requests(memory: MakeStore) -> None:
    """P10: however many are answered while it is silent; none of those that it is past."""
    async with staged(memory) as (stage, a, b, _):
        talking(stage)
        session = await a.open()
        key = session_key(session.id)
        async with getting(b, session) as older, getting(b, session) as newer:
            await older.event()
            await newer.event()
            replies = [draft(Kind.REPLY, b'{"jsonrpc":"2.0","id":"srv-%d","result":{}}' % n) for n in range(3000)]
            for start in range(0, 3000, 500):
                await stage.store.append(key, Batch(replies[start : start + 500]))
            await a.post(call("tell", text="fence"), session)
            assert text_of(await newer.message()) == "fence"
            readers = [reader for reader in node_of(b).services.readers if isinstance(reader, StandaloneConnection)]
            assert len(readers) == 2
            head = (await stage.store.load(key)).head.position
            await eventually(lambda: all(reader._carrier.scanned_to.position >= head for reader in readers))
            assert min(len(reader._carrier._settled) for reader in readers) == 0
            assert max(len(reader._carrier._settled) for reader in readers) <= 1000
        await eventually(lambda: not node_of(b).services.cluster_log.hearers)


@unhurried("idle", 0.5, 2.0, 8.0)
async def test_introduction_outlives_no_session(memory: MakeStore, idle: float) -> None:
    """P10: a node keeps it parsed for those who say the same, while there are any."""
    async with staged(memory, session_idle_timeout=idle, unconfirmed_lifetime=None) as (stage, a, b, _):
        talking(stage)
        names = [f"client {number}" for number in range(20)]
        for name in names:
            session = await a.open(capabilities={"experimental": {name: {}}})
            assert (await b.post(call("quick"), session)).status_code == 200
        assert len(INTRODUCTIONS)
        await eventually(lambda: not len(INTRODUCTIONS))


async def test_lost_abandoned_streams_are_ended(make_store: MakeStore) -> None:
    """P10, P7: they are ended once room is wanted; those of nodes that live are not."""
    options = {"reexecute": "idempotent", "max_log_bytes": 4 * MEGABYTE, "window": 0.02}
    async with staged(make_store, **options) as (stage, a, b, c):
        talking(stage)
        session = await a.open()
        key = session_key(session.id)
        async with posting(c, session, call("wait", "lives")) as living:
            await living.message()
            for number in range(4):
                params = {"name": "wait", "arguments": {"padding": "p" * MEGABYTE}}
                request = {"jsonrpc": "2.0", "id": f"lost {number}", "method": "tools/call", "params": params}
                body = {"node": "gone-00000000", "attempt": 1, "request": request}
                await stage.store.append(
                    key, Batch([draft(Kind.OPENED, pydantic_core.to_json(body))], stream=NEW_STREAM)
                )
            answer = await b.post(call("quick", "new", padding="p" * MEGABYTE), session)
            assert text_of(answer.json()) == "quick"
            assert await log_size(stage, session) <= 2 * MEGABYTE
            stage.open("go on")
            assert texts_of(await living.rest()) == ["done"]
