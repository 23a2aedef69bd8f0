"""A request that becomes a stream: what its client reads, where it resumes, and that nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

import pytest

from nonstick import current_connection
from nonstick.core.event_ids import EventId, parse_event_id
from nonstick.core.events import Kind, kind_of
from nonstick.core.names import session_key
from nonstick.store import MAX_CLIP, MAX_READ_BYTES, Cursor, Event, Skimmed, Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.sse import DEADLINE, Sse, getting, posting
from tests.cluster.stage import (
    Context,
    DownStore,
    HeldStore,
    Stage,
    accept,
    ask,
    call,
    eventually,
    node_of,
    say,
    staged,
    text_of,
    texts_of,
)

pytestmark = pytest.mark.anyio

OLD_VERSIONS = ["2024-11-05", "2025-03-26", "2025-06-18"]


def counting(stage: Stage) -> None:
    """A tool that says 0, 1, 2 … `count` - 1; before each it waits at the door of that name, if `doors`."""

    @stage.tool
    async def count(ctx: Context, arguments: dict[str, Any]) -> str:
        for number in range(arguments["count"]):
            if arguments.get("doors"):
                await stage.door(f"{number}")
            await say(ctx, f"{number}")
        await stage.door("end") if arguments.get("doors") else None
        return "done"


def primed(last_id: str | None) -> Sse:
    """What a connection begins with that goes on from this id."""
    return Sse(id=last_id, retry=1000, data="")


# ---- promotion


async def test_quick_silent_handler_answers_json(
    make_store: MakeStore,
) -> None:
    """P3: the log is not touched."""
    async with staged(make_store) as (stage, a, b, _):

        @stage.tool
        async def quick(ctx: Context, arguments: dict[str, Any]) -> str:
            return "done"

        session = await a.open()
        async with posting(b, session, call("quick")) as stream:
            assert text_of(await stream.answer()) == "done"
        assert await stage.log(session) == []


async def test_seeding_handlers_lose_nothing(memory: MakeStore) -> None:
    """P3: what names an append must not repeat, or the store takes the second stream's events for the first one's."""
    async with staged(memory) as (stage, a, _, _):

        @stage.tool
        async def seeded(ctx: Context, arguments: dict[str, Any]) -> str:
            random.seed(7)
            await say(ctx, arguments["text"])
            return "done"

        session = await a.open()
        for number in range(2):
            async with posting(a, session, call("seeded", id=number, text=f"{number}")) as stream:
                _, *events = await stream.events()
            assert texts_of([event.message for event in events]) == [f"{number}", "done"]
        assert await stage.kinds(session) == [Kind.OPENED, Kind.MESSAGE, Kind.TERMINAL] * 2


async def test_notifying_handler_answers_with_stream(make_store: MakeStore) -> None:
    """P3: primed with an id, every message has one, the answer ends it."""
    async with staged(make_store) as (stage, a, b, _):
        counting(stage)
        session = await a.open()
        async with posting(b, session, call("count", "x-1", count=3)) as stream:
            response = await stream.response()
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/event-stream"
            assert response.headers["x-accel-buffering"] == "no"
            assert "no-cache" in response.headers["cache-control"]
            assert response.headers["mcp-session-id"] == session.id
            priming, *events = await stream.events()
        assert priming.id
        assert priming.data == ""
        assert priming.retry == 1000
        messages = [event.message for event in events]
        assert texts_of(messages) == ["0", "1", "2", "done"]
        assert [message.get("id") for message in messages] == [None, None, None, "x-1"]
        assert all(event.event == "message" for event in events)
        ids = [parse_event_id(event.id or "", session.id) for event in (priming, *events)]
        positions = [place.cursor.position for place in ids if place is not None]
        assert positions == list(range(positions[0], positions[0] + 5))
        assert {place.stream for place in ids if place is not None} == {positions[0]}


@pytest.mark.parametrize("version", OLD_VERSIONS)
async def test_older_clients_get_only_ids(memory: MakeStore, version: str) -> None:
    """P3: they cannot parse one."""
    async with staged(memory) as (stage, a, b, _):
        counting(stage)
        session = await a.open(version=version)
        async with posting(b, session, call("count", count=1)) as stream:
            events = await stream.events()
        assert texts_of([event.message for event in events]) == ["0", "done"]
        assert all(event.id for event in events)


@pytest.mark.parametrize("version", OLD_VERSIONS)
async def test_older_clients_get_no_close_callbacks(memory: MakeStore, version: str) -> None:
    """P3: they would not come back."""
    async with staged(memory) as (stage, a, b, _):

        @stage.tool
        async def callbacks(ctx: Context, arguments: dict[str, Any]) -> str:
            return f"{ctx.close_sse_stream} {ctx.close_standalone_sse_stream}"

        session = await a.open(version=version)
        assert text_of((await b.post(call("callbacks"), session)).json()) == "None None"


async def test_asking_handler_answers_with_stream(make_store: MakeStore) -> None:
    """P3, P4."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def name(ctx: Context, arguments: dict[str, Any]) -> str:
            return str((await ask(ctx))["content"]["name"])

        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            request = await stream.message()
            assert request["method"] == "elicitation/create"
            assert (await c.post(accept(request), session)).status_code == 202
            assert texts_of(await stream.rest()) == ["Ada"]


async def test_slow_silent_handler_answers_with_stream(make_store: MakeStore) -> None:
    """P3."""
    async with staged(make_store, window=0.05) as (stage, a, b, _):

        @stage.tool
        async def slow(ctx: Context, arguments: dict[str, Any]) -> str:
            await stage.door("end")
            return "done"

        session = await a.open()
        async with posting(b, session, call("slow")) as stream:
            priming = await stream.event()
            assert priming.id
            assert not priming.data
            stage.open("end")
            assert texts_of(await stream.rest()) == ["done"]


async def test_answer_sse_always_streams(make_store: MakeStore) -> None:
    """P3."""
    async with staged(make_store, answer="sse") as (stage, a, b, c):
        stage.tool(_quick)
        session = await a.open()
        async with posting(b, session, call("_quick")) as stream:
            priming, event = await stream.events()
            assert not priming.data
            assert text_of(event.message) == "quick"
        async with getting(c, session, priming.id) as stream:
            assert texts_of(await stream.rest()) == ["quick"]


async def test_answer_json_never_streams(make_store: MakeStore) -> None:
    """P3: what belongs to the request is dropped."""
    async with staged(make_store, answer="json", window=0.02) as (stage, a, b, _):

        @stage.tool
        async def talks(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "unheard")
            await ctx.session.report_progress(0.5)
            stage.open("talked")
            await stage.door("end")
            return "done"

        session = await a.open()
        async with posting(b, session, call("talks", meta={"progressToken": 1})) as stream:
            await stage.reached("talked")
            # The window passes: the node follows the log, and still does not stream.
            await eventually(lambda: any(s.log.follower.subscriptions for s in _node(b).sessions.values()))
            assert not stream.started
            stage.open("end")
            assert text_of(await stream.answer()) == "done"
        assert await stage.log(session) == []


async def _quick(ctx: Context, arguments: dict[str, Any]) -> str:
    return "quick"


def _node(member: Member) -> Any:
    return member.app.manager._node


async def test_progress_is_on_the_requests_stream(memory: MakeStore) -> None:
    """P3."""
    async with staged(memory) as (stage, a, b, _):

        @stage.tool
        async def work(ctx: Context, arguments: dict[str, Any]) -> str:
            await ctx.session.report_progress(1, 2, "half")
            return "done"

        session = await a.open()
        async with posting(b, session, call("work", meta={"progressToken": "t"})) as stream:
            progress, _ = await stream.rest()
        assert progress["params"] == {"progressToken": "t", "progress": 1, "total": 2, "message": "half"}


async def test_failing_handler_ends_its_stream(memory: MakeStore) -> None:
    """P3."""
    async with staged(memory) as (stage, a, b, _):

        @stage.tool
        async def fails(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "0")
            raise ValueError("boom")

        session = await a.open()
        async with posting(b, session, call("fails", 5)) as stream:
            said, error = await stream.rest()
        assert text_of(said) == "0"
        assert error["id"] == 5
        assert error["error"]["message"] == "boom"


async def test_concurrent_requests_keep_messages_apart(make_store: MakeStore) -> None:
    """P3: a message goes to exactly one stream; streams of one log, from three nodes, do not mix."""
    async with staged(make_store) as (stage, *members):

        @stage.tool
        async def many(ctx: Context, arguments: dict[str, Any]) -> str:
            for number in range(20):
                await say(ctx, f"{arguments['me']}-{number}")
            return f"{arguments['me']}-end"

        session = await members[0].open()

        async def run(me: int) -> None:
            async with posting(members[me % 3], session, call("many", me, me=me)) as stream:
                assert texts_of(await stream.rest()) == [f"{me}-{n}" for n in range(20)] + [f"{me}-end"]

        await asyncio.gather(*(run(me) for me in range(12)))
        positions = [event.position for event in await stage.log(session)]
        assert positions == list(range(1, 12 * 22 + 1))


# ---- acknowledged first


@pytest.mark.parametrize("written", [False, True], ids=["before it is written", "before it is acknowledged"])
async def test_no_byte_precedes_its_acknowledgement(make_store: MakeStore, written: bool) -> None:
    """P3: append, wait for the acknowledgement, then write to the socket."""
    held: list[HeldStore] = []

    def make() -> Store:
        held.append(HeldStore(make_store(), "append", after=written))
        return held[-1]

    async with staged(make) as (stage, a, b, _):
        stage.tool(_quick)
        store = held[2]  # the stage's own is the first

        @stage.tool
        async def talk(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "0")
            store.holding = True
            stage.open("holding")
            await say(ctx, "1")
            return "done"

        session = await a.open()
        async with posting(b, session, call("talk")) as stream:
            assert text_of(await stream.message()) == "0"
            async with asyncio.timeout(DEADLINE):
                await store.held.wait()
            # A fence: what b has written to its sockets until now has come.
            assert (await b.post(call("_quick", 2), session)).status_code == 200
            assert not stream.waiting
            store.holding = False
            store.released.set()
            assert texts_of(await stream.rest()) == ["1", "done"]


async def test_no_header_precedes_its_stream(make_store: MakeStore) -> None:
    """P3: a client that saw a stream open can resume it."""
    held: list[HeldStore] = []

    def make() -> Store:
        held.append(HeldStore(make_store(), "append", after=True))
        return held[-1]

    async with staged(make) as (stage, a, b, _):
        stage.tool(_quick)
        counting(stage)
        session = await a.open()
        held[2].holding = True
        async with posting(b, session, call("count", count=1)) as stream:
            async with asyncio.timeout(DEADLINE):
                await held[2].held.wait()
            assert (await b.post(call("_quick", 2), session)).status_code == 200
            assert not stream.started
            held[2].holding = False
            held[2].released.set()
            assert texts_of(await stream.rest()) == ["0", "done"]


@pytest.mark.parametrize("written", [False, True], ids=["not written", "written but not acknowledged"])
@pytest.mark.parametrize("position", [-1, 0, 1, 2], ids=["opening", "first", "second", "answer"])
async def test_doubtful_events_are_written_once(
    make_store: MakeStore, position: int, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3, P9: the store comes back after all patience is over; nothing is lost, doubled or out of order."""
    monkeypatch.setattr("nonstick.log.writer._PATIENCE", 0.05)
    monkeypatch.setattr("nonstick.session.stream._RETRY_PAUSE", 0.05)
    stores: list[DownStore] = []

    def make() -> Store:
        stores.append(DownStore(make_store(), "append", after=written))
        return stores[-1]

    async with staged(make) as (stage, a, b, _):

        @stage.tool
        async def talk(ctx: Context, arguments: dict[str, Any]) -> str:
            for number in range(-1, 2):
                down.holding = number == position
                if number >= 0:
                    await say(ctx, f"{number}")
                elif down.holding:
                    await say(ctx, "opening")
            down.holding = position == 2
            return "done"

        session = await a.open()
        down = stores[2]
        async with posting(b, session, call("talk")) as stream:
            if position == 2:
                # Each round of the guard has fewer tries: the terminal is in doubt, and is repeated (P9).
                await eventually(lambda: down.count > 20)
                down.holding = False
            messages = await stream.rest()
            assert texts_of(messages) == [*(["opening"] if position < 0 else []), "0", "1", "done"]
        events = [event for event in await stage.log(session) if kind_of(event.data) is not Kind.OPENED]
        assert len(events) == len(messages)


async def test_doubtful_state_is_not_saved_again(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """P2, P9: it would undo what another node saved since."""
    monkeypatch.setattr("nonstick.log.writer._PATIENCE", 0.05)
    monkeypatch.setattr("nonstick.session.stream._RETRY_PAUSE", 0.05)
    stores: list[DownStore] = []

    def make() -> Store:
        stores.append(DownStore(make_store(), "append", after=True))
        return stores[-1]

    async with staged(make) as (stage, a, b, c):

        @stage.tool
        async def put(ctx: Context, arguments: dict[str, Any]) -> str:
            current_connection().state["number"] = arguments["number"]
            await say(ctx, "put")
            stores[2].holding = arguments["down"]
            return "done"

        @stage.tool
        async def get(ctx: Context, arguments: dict[str, Any]) -> str:
            return str(current_connection().state["number"])

        session = await a.open()
        # The session's view stays on b.
        async with getting(b, session) as standalone:
            await standalone.event()
            async with posting(b, session, call("put", number=1, down=True)) as stream:
                async with asyncio.timeout(DEADLINE):
                    await stores[2].held.wait()
                stores[2].holding = False
                assert texts_of(await stream.rest()) == ["put", "done"]
            async with posting(c, session, call("put", number=2, down=False)) as stream:
                await stream.rest()
            for member in (b, c, a):
                assert text_of((await member.post(call("get"), session)).json()) == "2"


# ---- a tool that makes its client poll


async def test_closed_stream_makes_client_return(make_store: MakeStore) -> None:
    """P3: the connection ends, the request goes on, and the rest is had on another node."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def poll(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "0")
            assert ctx.close_sse_stream is not None
            await ctx.close_sse_stream()
            await say(ctx, "1")
            await stage.door("end")
            return "done"

        session = await a.open()
        async with posting(b, session, call("poll")) as stream:
            assert texts_of(await stream.rest()) == ["0"]
        async with getting(c, session, stream.last_id) as resumed:
            assert text_of(await resumed.message()) == "1"
            stage.open("end")
            assert texts_of(await resumed.rest()) == ["done"]


async def test_closing_reaches_resumed_connections_elsewhere(make_store: MakeStore) -> None:
    """P3: wherever it is; and does not close those that come afterwards."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def poll(ctx: Context, arguments: dict[str, Any]) -> str:
            assert ctx.close_sse_stream is not None
            for number in range(3):
                await stage.door(f"{number}")
                await ctx.close_sse_stream()
                await say(ctx, f"{number}")
            await stage.door("end")
            return "done"

        session = await a.open()
        stage.open("0")
        async with posting(b, session, call("poll")) as stream:
            assert await stream.rest() == []
        last = stream.last_id
        for number, member in ((0, c), (1, a)):
            async with getting(member, session, last) as resumed:
                assert text_of(await resumed.message()) == f"{number}"
                stage.open(f"{number + 1}")
                assert await resumed.rest() == []
                last = resumed.last_id
        async with getting(b, session, last) as resumed:
            assert text_of(await resumed.message()) == "2"
            stage.open("end")
            assert texts_of(await resumed.rest()) == ["done"]


# ---- resume


async def test_finished_stream_is_resumed_exactly(make_store: MakeStore) -> None:
    """P3: on every node, at every id; then it ends."""
    async with staged(make_store) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(b, session, call("count", 9, count=4)) as stream:
            events = await stream.events()
        for number, event in enumerate(events):
            for member in (a, b, c):
                async with getting(member, session, event.id) as resumed:
                    response = await resumed.response()
                    assert response.headers["x-accel-buffering"] == "no"
                    # Byte for byte what the first connection carried, the same ids among it.
                    assert await resumed.events() == [primed(event.id), *events[number + 1 :]]


async def test_running_stream_is_resumed_then_live(make_store: MakeStore) -> None:
    """P3: while the request runs on another node."""
    async with staged(make_store) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        stage.open("0")
        stage.open("1")
        async with posting(b, session, call("count", 9, count=4, doors=True)) as stream:
            first = await stream.event()
            assert text_of(await stream.message()) == "0"
            assert text_of(await stream.message()) == "1"
        async with getting(c, session, first.id) as resumed:
            assert text_of(await resumed.message()) == "0"
            assert text_of(await resumed.message()) == "1"
            stage.open("2")
            assert text_of(await resumed.message()) == "2"
            stage.open("3")
            stage.open("end")
            assert texts_of(await resumed.rest()) == ["3", "done"]


async def test_stream_is_resumed_beside_its_first(make_store: MakeStore) -> None:
    """P3: both carry all of it."""
    async with staged(make_store) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(b, session, call("count", count=3, doors=True)) as stream:
            stage.open("0")
            assert text_of(await stream.message()) == "0"
            async with getting(c, session, stream.last_id) as resumed:
                for door in ("1", "2", "end"):
                    stage.open(door)
                assert texts_of(await resumed.rest()) == ["1", "2", "done"]
            assert texts_of(await stream.rest()) == ["1", "2", "done"]


async def test_silent_resumed_connection_gives_its_id(make_store: MakeStore) -> None:
    """P3: some clients come back without an id from a connection that brought none."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def poll(ctx: Context, arguments: dict[str, Any]) -> str:
            assert ctx.close_sse_stream is not None
            for number in range(2):
                await stage.door(f"{number}")
                await ctx.close_sse_stream()
            await stage.door("end")
            return "done"

        session = await a.open()
        stage.open("0")
        async with posting(b, session, call("poll")) as stream:
            assert await stream.rest() == []
        async with getting(c, session, stream.last_id) as resumed:
            assert await resumed.event() == primed(stream.last_id)
            stage.open("1")
            assert await resumed.events() == []
        async with getting(a, session, resumed.last_id) as again:
            assert await again.event() == primed(stream.last_id)
            stage.open("end")
            assert texts_of(await again.rest()) == ["done"]


async def test_resumed_connection_is_primed_when_stopping(make_store: MakeStore) -> None:
    """P8: its client comes back with the id, not without one."""
    async with staged(make_store, grace=20.0) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        stage.open("0")
        async with posting(b, session, call("count", count=2, doors=True)) as stream:
            await stream.message()
            node_of(c).services.drain.begun = True
            async with getting(c, session, stream.last_id) as resumed:
                assert await resumed.events() == [primed(stream.last_id), Sse(retry=1000)]
            node_of(c).services.drain.begun = False
        for door in ("1", "end"):
            stage.open(door)
        async with getting(a, session, resumed.last_id) as again:
            assert texts_of(await again.rest()) == ["1", "done"]


@pytest.mark.parametrize("version", OLD_VERSIONS)
async def test_older_clients_resumption_is_not_primed(memory: MakeStore, version: str) -> None:
    """P3: it cannot parse that."""
    async with staged(memory) as (stage, a, b, c):
        counting(stage)
        session = await a.open(version=version)
        async with posting(b, session, call("count", count=3)) as stream:
            events = await stream.events()
        async with getting(c, session, events[0].id) as resumed:
            assert await resumed.events() == events[1:]


async def test_twenty_clients_resume_one_stream(make_store: MakeStore) -> None:
    """P3."""
    async with staged(make_store) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        stage.open("0")
        async with posting(b, session, call("count", count=10, doors=True)) as stream:
            priming = await stream.event()
            assert text_of(await stream.message()) == "0"

            async def resume(number: int) -> None:
                async with getting((a, b, c)[number % 3], session, priming.id) as resumed:
                    assert text_of(await resumed.message()) == "0"
                    stage.open(f"resumed {number}")
                    assert texts_of(await resumed.rest()) == [*(f"{n}" for n in range(1, 10)), "done"]

            async with asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(resume(number))
                for number in range(20):
                    await stage.reached(f"resumed {number}")
                for door in (*(f"{n}" for n in range(1, 10)), "end"):
                    stage.open(door)


async def test_a_long_backlog_is_resumed_whole(memory: MakeStore) -> None:
    """P3: more events than one read takes, with another stream's among them."""
    async with staged(memory, max_log_events=20_000) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with (
            posting(a, session, call("count", 1, count=1500)) as one_,
            posting(b, session, call("count", 2, count=1500)) as two,
        ):
            first = await one_.event()
            assert len(await one_.rest()) == len(await two.rest()) == 1501
        async with getting(c, session, first.id) as resumed:
            assert texts_of(await resumed.rest()) == [*(f"{n}" for n in range(1500)), "done"]


async def test_foreign_and_forged_ids_are_refused(make_store: MakeStore) -> None:
    """P3: never an event of another session or stream."""
    async with staged(make_store) as (stage, a, b, c):
        counting(stage)
        session, other = await a.open(), await b.open()
        async with posting(b, session, call("count", count=1)) as stream:
            first = (await stream.events())[0].id
        assert first is not None
        version, name, position, tag, request, mac = first.split(".")
        forged = [
            f"{version}.{name}.{int(position, 16) - 1:x}.{tag}.{request}.{mac}",
            f"{version}.0.{position}.{tag}.{request}.{mac}",
            EventId(int(name, 16), Cursor(int(position, 16), bytes.fromhex(tag)), 1).seal("guessed"),
            first[:-1],
            first + "0",
            "1",
            "0",
            "1_0",
            "x" * 5000,
            "1.1.1..",
            "¹.².³",
        ]
        for text in forged:
            headers = {**_stream_headers(session), b"last-event-id": text.encode()}
            response = await c.client.get(c.url, headers=headers)
            assert response.status_code == 400, text
            assert "error" in response.json()
        for member in (a, b, c):
            async with getting(member, other, first) as refused:
                assert (await refused.response()).status_code == 400
            unknown = Session("0" * len(session.id), session.version, {})
            async with getting(member, unknown, first) as refused:
                assert (await refused.response()).status_code == 404


async def test_invented_event_id_is_never_500(
    make_store: MakeStore,
) -> None:
    """P3: its session's id is the key of the hash, and events tell it their tags."""
    async with staged(make_store) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        places = []
        for number in (1, 2):
            async with posting(a, session, call("count", number, count=1)) as stream:
                place = parse_event_id((await stream.events())[1].id or "", session.id)
                assert place is not None
                places.append(place)
        mine, other = places
        requests: list[Any] = [True, 1.5, float("nan"), 10**100, "\ud800"]
        refused = [
            mine._replace(stream=mine.stream + 1),
            other._replace(stream=mine.stream),
            mine._replace(stream=other.stream),
            other._replace(stream=other.cursor.position),
            *(mine._replace(request=request) for request in requests),
            EventId(0, Cursor(0, bytes(8))),
            EventId(7, Cursor(0, bytes(8)), 7),
        ]
        for member, forged in [(member, forged) for member in (b, c) for forged in refused]:
            headers = {**_stream_headers(session), b"last-event-id": forged.seal(session.id).encode()}
            response = await member.client.get(member.url, headers=headers)
            assert response.status_code == 400, forged
        # Nothing tells these from places that the store has lost.
        for lost in (Cursor(mine.cursor.position, bytes(8)), Cursor(16**15 - 1, bytes(8))):
            async with getting(b, session, EventId(mine.stream, lost, 7).seal(session.id)) as resumed:
                (told,) = await resumed.rest()
                assert (told["id"], told["error"]["data"]["reason"]) == (7, "stream_lost")
        async with getting(c, session, mine.seal(session.id)) as resumed:
            assert texts_of(await resumed.rest()) == ["done"]


def _stream_headers(session: Session) -> dict[bytes, bytes]:
    headers = {"accept": "application/json, text/event-stream", **session.headers}
    return {name.encode(): value.encode() for name, value in headers.items()}


# ---- what the store lost


async def test_trimmed_stream_answers_one_error(make_store: MakeStore) -> None:
    """P9: its client does not wait for ever."""
    async with staged(make_store) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(b, session, call("count", "mine", count=2)) as stream:
            events = await stream.events()
        place = parse_event_id(events[0].id or "", session.id)
        assert place is not None
        await stage.store.trim(session_key(session.id), streams=[place.stream])
        for event in events:
            async with getting(c, session, event.id) as resumed:
                (error,) = await resumed.rest()
            assert error["id"] == "mine"
            assert error["error"]["data"]["reason"] == "stream_lost"


async def test_stream_trimmed_mid_resume_ends() -> None:
    """P9, P10: its client does not wait for ever for the rest."""
    reading = MemoryStore()
    stores: list[HeldStore] = []

    def make() -> Store:
        stores.append(HeldStore(reading, "read", after=False, when=lambda _, after, **__: after.position >= 1000))
        return stores[-1]

    async with staged(make) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(b, session, call("count", "mine", count=1200)) as stream:
            first = await stream.event()
            assert len(await stream.rest()) == 1201
        place = parse_event_id(first.id or "", session.id)
        assert place is not None
        # The store of the third node: the first one is the stage's own.
        held = stores[3]
        held.holding = True
        async with getting(c, session, first.id) as resumed:
            await held.held.wait()
            await reading.trim(session_key(session.id), streams=[place.stream])
            held.released.set()
            *messages, error = await resumed.rest()
        assert texts_of(messages) == [f"{n}" for n in range(len(messages))]
        assert error["id"] == "mine"
        assert error["error"]["data"]["reason"] == "stream_lost"


async def test_slowly_read_backlog_is_resumed() -> None:
    """P3, P9: a read that takes longer than it is silent between two looks is not begun anew for ever."""
    reads: list[int] = []

    class Slow(MemoryStore):
        async def read(
            self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES
        ) -> list[Event]:
            if slow and after.position >= 1000:
                reads.append(after.position)
                await asyncio.sleep(1.7)
            return await super().read(key, after, limit=limit, max_bytes=max_bytes)

    slow = False
    async with staged(one(Slow())) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(b, session, call("count", count=1200)) as stream:
            first = await stream.event()
            assert len(await stream.rest()) == 1201
        # The node follows the log already, so that what is behind must be read for the new connection alone.
        async with getting(c, session) as standalone:
            await standalone.event()
            slow = True
            async with getting(c, session, first.id) as resumed:
                assert texts_of(await resumed.rest()) == [*(f"{n}" for n in range(1200)), "done"]
        assert reads


class Forgetful(MemoryStore):
    """A store that can lose what it has acknowledged, as a failover to a replica that lagged does."""

    def lose(self, key: str, after: int) -> None:
        """Forgets every event behind this position, and the streams and writers that they made."""
        session = self._sessions[key]
        session.events = {position: event for position, event in session.events.items() if position <= after}
        session.size = sum(len(event.data) for event in session.events.values())
        session.head = session.events[after].cursor if after else Cursor(0)
        session.streams = {name: stream for name, stream in session.streams.items() if name <= after}
        session.writers.clear()
        self._watches.announce(key, None)


@pytest.mark.parametrize("refilled", [False, True], ids=["shorter", "with other entries"])
async def test_lost_stream_answers_one_error(refilled: bool) -> None:
    """P9: a failover lost acknowledged writes; positions are given out again, and are not taken for the old ones."""
    store = Forgetful()
    async with staged(one(store)) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(b, session, call("count", 1, count=2)) as stream:
            await stream.rest()
        async with posting(b, session, call("count", "mine", count=5)) as stream:
            events = await stream.events()
        store.lose(session_key(session.id), 4)
        if refilled:
            async with posting(a, session, call("count", 3, count=8)) as stream:
                await stream.rest()
        for event in events:
            async with getting(c, session, event.id) as resumed:
                (error,) = await resumed.rest()
            assert error["id"] == "mine"
            assert error["error"]["data"]["reason"] == "stream_lost"


async def test_open_lost_stream_ends_with_error() -> None:
    """P9."""
    store = Forgetful()
    async with staged(one(store)) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        stage.open("0")
        async with posting(b, session, call("count", "mine", count=3, doors=True)) as stream:
            priming = await stream.event()
            await stream.message()
            async with getting(c, session, priming.id) as resumed:
                assert text_of(await resumed.message()) == "0"
                store.lose(session_key(session.id), 0)
                (error,) = await resumed.rest()
            assert error["id"] == "mine"
            # The request itself cannot go on either: its stream is gone.
            stage.open("1")
            assert await stream.rest() == []


# ---- ids


@pytest.mark.parametrize("request_id", [0, -1, 2**53, "", "7", "ü" * 40, "x" * 1000, 'a"b.c\\'])
async def test_any_request_id_can_be_resumed(memory: MakeStore, request_id: Any) -> None:
    """P3."""
    async with staged(memory) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(b, session, call("count", request_id, count=1)) as stream:
            events = await stream.events()
        assert all(re.fullmatch(r"[\x21-\x7e]+", event.id or "") for event in events)
        async with getting(c, session, events[0].id) as resumed:
            assert await resumed.events() == [primed(events[0].id), *events[1:]]
        assert events[-1].message["id"] == request_id


async def test_reused_request_id_resumes_right_stream(make_store: MakeStore) -> None:
    """P3: streams are named by position, never by the request's id."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def echo(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, arguments["text"])
            return str(arguments["text"])

        session = await a.open()
        ids: list[str | None] = []
        for text in ("first", "second"):
            async with posting(b, session, call("echo", 7, text=text)) as stream:
                ids.append((await stream.events())[0].id)
        for text, last in zip(("first", "second"), ids, strict=True):
            async with getting(c, session, last) as resumed:
                assert texts_of(await resumed.rest()) == [text, text]


async def test_a_client_that_goes_stops_nothing(make_store: MakeStore) -> None:
    """P3: its request goes on, and the answer waits for it."""
    async with staged(make_store) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        stage.open("0")
        async with posting(b, session, call("count", count=2, doors=True)) as stream:
            await stream.message()
        for door in ("1", "end"):
            stage.open(door)
        async with getting(c, session, stream.last_id) as resumed:
            assert texts_of(await resumed.rest()) == ["1", "done"]


async def test_stream_missed_once_goes_on() -> None:
    """P3, P9: what came before a trim, its end too, may still be on its way to the node that looks."""
    misses = 0

    class Forgetful(MemoryStore):
        async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
            nonlocal misses
            if limit == 1 and after.position == stream_of_it - 1 and misses < 1:
                misses += 1
                stage.open("missed")
                return []
            return await super().skim(key, after, limit=limit, clip=clip)

    stream_of_it = 0
    async with staged(one(Forgetful())) as (stage, a, _, c):
        counting(stage)

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "waiting")
            await stage.door("go on")
            return "done"

        session = await a.open()
        async with posting(a, session, call("wait")) as stream:
            place = (await stream.event()).id
            await stream.message()
            async with getting(c, session, place) as resumed:
                assert text_of(await resumed.message()) == "waiting"
                stream_of_it = next(event.stream for event in await stage.log(session) if event.stream)
                await stage.reached("missed")
                stage.open("go on")
                assert texts_of(await resumed.rest()) == ["done"]
