"""The session's standalone stream: nothing on it is lost, and no two connections carry the same message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from nonstick.core.event_ids import parse_event_id
from nonstick.core.events import Kind, draft, kind_of
from nonstick.core.names import new_name, session_key
from nonstick.store import Batch
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.servers import messages
from tests.cluster.sse import DEADLINE, Sse, Stream, getting, posting
from tests.cluster.stage import (
    Context,
    Stage,
    announce,
    ask_standalone,
    call,
    eventually,
    node_of,
    say,
    staged,
    text_of,
    texts_of,
)
from tests.cluster.test_streams import Forgetful

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def talking(make_store: MakeStore, **options: Any) -> AsyncIterator[tuple[Stage, Member, Member, Member]]:
    """A stage with a tool that announces what it is told to."""
    async with staged(make_store, **options) as found:

        async def tell(ctx: Context, arguments: dict[str, Any]) -> str:
            await announce(ctx, arguments["text"])
            return "told"

        async def hang_up(ctx: Context, arguments: dict[str, Any]) -> str:
            assert ctx.close_standalone_sse_stream is not None
            await ctx.close_standalone_sse_stream()
            return "hung up"

        found[0].tools |= {"tell": tell, "hang_up": hang_up}
        yield found


async def tell(member: Member, session: Session, *texts: Any) -> None:
    """Has the server send these on the standalone stream, from this node."""
    for text in texts:
        response = await member.post(call("tell", f"tell {text}", text=text), session)
        assert "result" in messages(response)[-1], response.text


async def heard(stream: Stream, *texts: Any) -> None:
    """These, and nothing else, come next."""
    for text in texts:
        assert text_of(await stream.message()) == text


async def count(stage: Stage, session: Session, kind: Kind) -> int:
    return (await stage.kinds(session)).count(kind)


async def has_left(stage: Stage, session: Session, times: int = 1) -> None:
    async def left() -> bool:
        return await count(stage, session, Kind.LEFT) >= times

    await eventually(left)


# ---- delivery


async def test_message_reaches_connection_elsewhere(make_store: MakeStore) -> None:
    """P3."""
    async with talking(make_store) as (_, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            response = await stream.response()
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/event-stream"
            assert response.headers["x-accel-buffering"] == "no"
            assert "no-cache" in response.headers["cache-control"]
            assert response.headers["mcp-session-id"] == session.id
            priming = await stream.event()
            assert priming.id
            assert priming.data == ""
            assert priming.retry == 1000
            for number in range(5):
                await tell(b, session, number)
                event = await stream.event()
                assert text_of(event.message) == number
                assert parse_event_id(event.id or "", session.id) is not None


async def test_message_does_not_await_a_poll(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: twenty messages arrive, one after the other, though nobody looks for them."""
    monkeypatch.setattr("nonstick.log.lookout._TURN_SECONDS", 100.0)
    async with talking(make_store) as (_, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            await stream.event()
            for number in range(20):
                await tell(b, session, number)
                await heard(stream, number)


async def test_early_message_reaches_first_connection(make_store: MakeStore) -> None:
    """P3: nothing sent before it opened is lost."""
    async with talking(make_store) as (_, a, b, c):
        session = await a.open()
        await tell(b, session, 1, 2, 3)
        async with getting(c, session) as stream:
            await heard(stream, 1, 2, 3)
            await tell(b, session, 4)
            await heard(stream, 4)


@pytest.mark.parametrize("version", ["2024-11-05", "2025-06-18"])
async def test_older_clients_get_no_priming_event(memory: MakeStore, version: str) -> None:
    """P3: they cannot parse one."""
    async with talking(memory) as (_, a, b, c):
        session = await a.open(version=version)
        async with getting(c, session) as stream:
            await tell(b, session, 1)
            event = await stream.event()
            assert event.id
            assert text_of(event.message) == 1


async def test_request_messages_are_not_standalone(make_store: MakeStore) -> None:
    """P3: a message goes to exactly one stream."""
    async with talking(make_store) as (stage, a, b, c):

        @stage.tool
        async def both(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "mine")
            await announce(ctx, "everybody's")
            await say(ctx, "mine too")
            return "done"

        session = await a.open()
        async with getting(c, session) as stream:
            async with posting(b, session, call("both")) as request:
                assert texts_of(await request.rest()) == ["mine", "mine too", "done"]
            await tell(b, session, "fence")
            await heard(stream, "everybody's", "fence")


# ---- coming back


async def test_resuming_anywhere_gives_the_rest(make_store: MakeStore) -> None:
    """P3: on another node."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            events = [await stream.event()]
            await tell(b, session, 0, 1, 2)
            events += [await stream.event() for _ in range(3)]
        await has_left(stage, session)
        await tell(b, session, 3)
        for number, event in enumerate(events):
            async with getting((a, b, c)[number % 3], session, event.id) as resumed:
                await heard(resumed, *range(number, 4))
                await tell(c, session, "live")
                await heard(resumed, *["live"] * (number + 1))
            await has_left(stage, session, number + 2)


async def test_idless_client_gets_everything_once(make_store: MakeStore) -> None:
    """P3: it begins where the last connection is known to have got to."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        for number in range(5):
            await tell(b, session, f"{number} while away")
            async with getting((a, b, c)[number % 3], session) as stream:
                await heard(stream, f"{number} while away")
                await tell(a, session, f"{number} while here")
                await heard(stream, f"{number} while here")
            await has_left(stage, session, number + 1)


async def test_closed_stream_makes_client_return(make_store: MakeStore) -> None:
    """P3: the connection is closed wherever it is, and what is sent meanwhile is not lost."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            await tell(b, session, 1)
            await heard(stream, 1)
            await b.post(call("hang_up"), session)
            assert await stream.rest() == []
        await tell(b, session, 2)
        async with getting(a, session, stream.last_id) as stream:
            await heard(stream, 2)
            await tell(b, session, 3)
            await heard(stream, 3)
            await b.post(call("hang_up"), session)
            assert await stream.rest() == []
        await has_left(stage, session, 2)
        async with getting(c, session) as stream:
            await tell(b, session, 4)
            await heard(stream, 4)


# ---- several connections


async def test_second_connection_takes_over_cleanly(make_store: MakeStore) -> None:
    """P3: the first stays open and silent; when the second goes, it goes on."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        async with getting(a, session) as first:
            await tell(b, session, 1)
            await heard(first, 1)
            async with getting(c, session) as second:
                await second.event()  # the priming: it carries the stream now
                await tell(b, session, 2, 3)
                await heard(second, 2, 3)
                assert not first.waiting
                assert not first.task.done()
                assert await count(stage, session, Kind.LISTENING) == 2
            await tell(b, session, 4)
            await heard(first, 4)
            await tell(b, session, 5)
            await heard(first, 5)
            assert await count(stage, session, Kind.LISTENING) == 3


async def test_simultaneous_connections_share_no_message(make_store: MakeStore) -> None:
    """P3: the log is the arbiter, also of what waits in it from before."""
    async with talking(make_store) as (stage, *members):
        session = await members[0].open()
        for attempt in range(5):
            told = [f"{attempt}-{n}" for n in range(5)]
            await tell(members[0], session, *told)
            async with AsyncExitStack() as stack:
                streams = await asyncio.gather(
                    *(stack.enter_async_context(getting(members[n % 3], session)) for n in range(4))
                )
                # Each has begun its turn when it is primed.
                for stream in streams:
                    stack.push_async_callback(stream.close)
                got = await asyncio.gather(*(_until_primed(stream) for stream in streams))
                assert sorted(text for texts in got for text in texts) == told
                await tell(members[1], session, "live")
                carries = await _first_to_hear(streams)
                await heard(carries, "live")
                await tell(members[1], session, "fence")
                await heard(carries, "fence")
                assert not any(stream.waiting for stream in streams)
            await has_left(stage, session, await count(stage, session, Kind.LISTENING))


async def _until_primed(stream: Stream) -> list[str]:
    """What came before the priming event."""
    texts: list[str] = []
    while (event := await stream.event()).data:
        texts.append(text_of(event.message))
    return texts


async def _first_to_hear(streams: list[Stream]) -> Stream:
    await eventually(lambda: any(stream.waiting for stream in streams))
    return next(stream for stream in streams if stream.waiting)


async def test_oldest_of_three_goes_on_last(make_store: MakeStore) -> None:
    """P3: whichever goes, exactly one of those that are left carries the stream."""
    async with talking(make_store) as (_, a, b, c):
        session = await a.open()
        async with getting(a, session) as first:
            await first.event()
            async with getting(b, session) as second:
                await second.event()
                async with getting(c, session) as third:
                    await third.event()
                    await tell(a, session, 1)
                    await heard(third, 1)
                # Both may go on: the later of their turns counts.
                for text in (2, 3, 4):
                    await tell(a, session, text)
                    carries = await _first_to_hear([first, second])
                    await heard(carries, text)
                assert not first.waiting
                assert not second.waiting
            await tell(a, session, 5)
            await heard(first, 5)


async def test_messages_during_takeover_come_once(make_store: MakeStore) -> None:
    """P3: exactly once among all of them, in order on each."""
    async with talking(make_store) as (_, a, b, c):
        session = await a.open()
        got: list[Any] = []
        complete = asyncio.Event()

        async def listen(stream: Stream) -> None:
            mine: list[Any] = []
            while (event := await stream.block()) is not None:
                if event.data:
                    mine.append(text_of(event.message))
                    got.append(mine[-1])
                if len(got) == 60:
                    complete.set()
            numbers = [text for text in mine if text != "fence"]
            assert numbers == sorted(numbers)

        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            telling = group.create_task(tell(b, session, *range(60)))
            for number in range(8):
                stream = await stack.enter_async_context(getting((a, b, c)[number % 3], session))
                group.create_task(listen(stream))
            async with asyncio.timeout(DEADLINE):
                await telling
                await complete.wait()
            await tell(b, session, "fence")
            await a.delete(session)
        assert [text for text in sorted(got, key=str) if text != "fence"] == sorted(range(60), key=str)


async def test_old_cursor_is_silent_beside_newer(make_store: MakeStore) -> None:
    """P3: while a newer connection lives; else the two would take the stream from each other for ever."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        async with getting(a, session) as old:
            await tell(b, session, 1)
            await heard(old, 1)
        await has_left(stage, session)
        async with getting(c, session) as newer:
            await newer.event()
            await tell(b, session, 2)
            await heard(newer, 2)
            async with getting(a, session, old.last_id) as back:
                await tell(b, session, 3)
                await heard(newer, 3)
                await newer.close()
                await has_left(stage, session, 2)
                # From its own id on: only its client knows what it has.
                await tell(b, session, 4)
                await heard(back, 2, 3, 4)


async def test_message_carried_into_nowhere_is_kept(make_store: MakeStore) -> None:
    """P3: a client that names an event goes on after it, whatever a connection took that it never heard of."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        async with getting(a, session) as first:
            await tell(b, session, 1)
            await heard(first, 1)
        await has_left(stage, session)
        async with getting(b, session, first.last_id) as unread, getting(c, session, first.last_id) as third:
            assert (await third.event()).id == first.last_id
            await tell(a, session, 2)
            await eventually(lambda: unread.waiting)
            assert not third.waiting
            await unread.close()
            await tell(a, session, 3)
            await heard(third, 2, 3)


async def test_continuing_connection_has_no_gap(make_store: MakeStore) -> None:
    """P3: also after another one carried the stream in between."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        async with getting(a, session) as first:
            start = (await first.event()).id
        await has_left(stage, session)
        async with getting(a, session, start) as named:
            await tell(b, session, 1)
            await heard(named, 1)
            async with getting(c, session) as second:
                await second.event()
                await tell(b, session, 2)
                await heard(second, 2)
            await has_left(stage, session, 3)
            await tell(b, session, 3)
            await heard(named, 2, 3)


async def test_a_silent_resumed_connection_is_primed(make_store: MakeStore) -> None:
    """P3: its client keeps the id to come back with."""
    async with talking(make_store) as (_, a, b, c):
        session = await a.open()
        async with getting(a, session) as first:
            await tell(b, session, 1)
            await heard(first, 1)
            async with getting(c, session, first.last_id) as silent:
                assert await silent.event() == Sse(id=first.last_id, retry=1000, data="")


async def test_silent_connection_gets_nothing_twice(make_store: MakeStore) -> None:
    """P3: also when the one between began further back."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        async with getting(a, session) as first:
            start = (await first.event()).id
            await tell(b, session, 1, 2)
            await heard(first, 1, 2)
            async with getting(c, session, start) as second:
                await heard(second, 1, 2)
            await has_left(stage, session, 2)
            await tell(b, session, 3)
            await heard(first, 3)


async def test_older_asking_is_answered(make_store: MakeStore) -> None:
    """P12: a node of 0.1.0 may be set to refuse a second GET. It asks in the log, and is told that the first lives."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        async with getting(a, session) as first:
            await first.event()
            key = session_key(session.id)
            for kind, body in (
                (Kind.ASKING, b'{"listener":"refused","node":"old"}'),
                (Kind.LEFT, b'{"listener":"refused","read":null}'),
            ):
                await stage.store.append(key, Batch([draft(kind, body)], writer=new_name(), sequence=1))

            async def answered() -> bool:
                return any(kind_of(event.data) is Kind.CARRYING for event in await stage.log(session))

            await eventually(answered)
            await tell(b, session, 1)
            await heard(first, 1)
        await has_left(stage, session, 2)
        async with getting(c, session) as second:
            await tell(b, session, 2)
            await heard(second, 2)


async def test_dead_nodes_connection_is_followed(make_store: MakeStore) -> None:
    """P3: one that died never says how far it got; its lease says that it died."""
    async with talking(make_store, lease=0.6, grace=0.1) as (_, a, b, c):
        session = await a.open()
        async with getting(c, session) as first:
            await tell(b, session, 1)
            await heard(first, 1)
            # As killed: nothing more of it reaches the store, and its lease lapses.
            node = node_of(c)
            node.services.store.append = _never  # type: ignore[method-assign]
            await node._lease.stop(5.0)
            await first.close()
            await tell(b, session, 2)
            async with getting(a, session) as second:
                # Nobody knows whether its client has the first one.
                await heard(second, 1, 2)
                await tell(b, session, 3)
                await heard(second, 3)


async def _never(*args: Any, **options: Any) -> Any:
    await asyncio.get_running_loop().create_future()


async def test_silent_connection_outlives_newer_node(make_store: MakeStore) -> None:
    """P3."""
    async with talking(make_store, lease=0.6, grace=0.1) as (_, a, b, c):
        session = await a.open()
        async with getting(a, session) as first:
            await first.event()
            async with getting(c, session) as second:
                await second.event()
                node = node_of(c)
                node.services.store.append = _never  # type: ignore[method-assign]
                await node._lease.stop(5.0)
                await second.close()
            await tell(b, session, 1)
            await heard(first, 1)


async def test_leaving_waiter_holds_up_nobody(make_store: MakeStore) -> None:
    """P3: it says that it carried nothing."""
    async with talking(make_store) as (_, a, b, c):
        session = await a.open()
        await tell(b, session, 1)
        for number in range(10):
            async with getting((a, b, c)[number % 3], session):
                pass
        async with getting(c, session) as stream:
            got = await _until_primed(stream)
            assert got in (["1"], [1], [])
            await tell(b, session, 2)
            await heard(stream, 2)


# ---- server requests on it


async def test_settled_server_requests_stay_away(make_store: MakeStore) -> None:
    """P3, P4: answered or timed out meanwhile."""
    async with talking(make_store) as (stage, a, b, c):

        @stage.tool
        async def asks(ctx: Context, arguments: dict[str, Any]) -> str:
            async def one(name: str, **options: Any) -> str:
                try:
                    return str(await ask_standalone("roots/list", {"_meta": {"name": name}}, **options))
                except Exception as error:
                    stage.open(f"{name} failed")
                    return type(error).__name__

            async with asyncio.TaskGroup() as group:
                answers = [
                    group.create_task(one("answered")),
                    group.create_task(one("timed out", timeout=0.01)),
                    group.create_task(one("open")),
                ]
            return " ".join(task.result() for task in answers)

        session = await a.open()
        async with AsyncExitStack() as stack, getting(c, session) as stream:
            start = (await stream.event()).id
            request = await stack.enter_async_context(posting(b, session, call("asks")))
            sent: dict[str, Any] = {}
            while len(sent) < 3:
                if (message := await stream.message()).get("method") == "roots/list":
                    sent[message["params"]["_meta"]["name"]] = message
            await stage.reached("timed out failed")
            reply = {"jsonrpc": "2.0", "id": sent["answered"]["id"], "result": {"roots": []}}
            assert (await a.post(reply, session)).status_code == 202
            async with getting(a, session, start) as again:
                await tell(c, session, "fence")
                seen = []
                while (message := await again.message())["method"] != "notifications/message":
                    seen.append(message)
                requests = [message for message in seen if "id" in message]
                assert [message["id"] for message in requests] == [sent["open"]["id"]]
                await b.post(reply | {"id": sent["open"]["id"]}, session)
                assert text_of(await request.outcome()) == "{'roots': []} MCPError {'roots': []}"


# ---- what keeps it open


async def test_a_silent_stream_carries_comments(memory: MakeStore) -> None:
    """P3: `ping_interval`, so that proxies do not close it."""
    async with talking(memory, ping_interval=0.05) as (_, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            await stream.event()
            for _ in range(3):
                block = await stream.block()
                assert block is not None
                assert block.comment == "ping"
            await tell(b, session, 1)
            await heard(stream, 1)


async def test_get_refusing_streams_is_refused(memory: MakeStore) -> None:
    """P3."""
    async with talking(memory) as (_, a, _b, c):
        session = await a.open()
        response = await c.client.get(c.url, headers={**session.headers, "accept": "application/json"})
        assert response.status_code == 406


# ---- what the store lost


async def test_messages_after_a_loss_are_delivered() -> None:
    """P9: a failover lost acknowledged writes; the positions are given out again."""
    store = Forgetful()
    async with talking(one(store)) as (_, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            await stream.event()
            await tell(b, session, *range(5))
            await heard(stream, *range(5))
            store.lose(session_key(session.id), 2)
            await tell(b, session, "new")
            while text_of(await stream.message()) != "new":
                pass
            await tell(b, session, "newer")
            await heard(stream, "newer")


async def test_messages_surviving_loss_come_once() -> None:
    """P9: the open connection goes on after the last entry that the store still has."""
    store = Forgetful()
    async with talking(one(store)) as (stage, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            await stream.event()
            await tell(b, session, *range(4))
            await heard(stream, *range(4))
            kept = len(await stage.log(session))
            await tell(b, session, "lost")
            await heard(stream, "lost")
            store.lose(session_key(session.id), kept)
            await tell(b, session, "new", "newer")
            await heard(stream, "new", "newer")
        await has_left(stage, session, 2)
        # What it says that it has is counted in the log of now.
        await tell(b, session, "newest")
        async with getting(a, session) as stream:
            await heard(stream, "newest")


@pytest.mark.parametrize("names", [False, True], ids=["without an id", "with an id"])
async def test_lost_leaving_holds_up_nobody(names: bool) -> None:
    """P9: it does not answer; its node lives."""
    store = Forgetful()
    async with talking(one(store), send_timeout=0.5) as (stage, a, b, c):
        session = await a.open()
        async with getting(a, session) as first:
            await first.event()
        await has_left(stage, session)
        async with getting(c, session) as second:
            await second.event()
            await tell(b, session, 1)
            await heard(second, 1)
            there = len(await stage.log(session))
        await has_left(stage, session, 2)
        store.lose(session_key(session.id), there)
        await tell(b, session, 2)
        async with getting(a, session, first.last_id if names else None) as again:
            assert (await again.response()).status_code == 200
            await heard(again, 1, 2)
            await tell(b, session, 3)
            await heard(again, 3)


async def test_lost_cursor_starts_at_the_rest(make_store: MakeStore) -> None:
    """P10: trimmed; everything behind it is delivered."""
    async with talking(make_store) as (stage, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            await tell(b, session, *range(4))
            await heard(stream, 0)
            place = parse_event_id(stream.last_id or "", session.id)
            last = stream.last_id
        assert place is not None
        await has_left(stage, session)
        await stage.store.trim(session_key(session.id), standalone_before=place.cursor.position + 2)
        async with getting(a, session, last) as stream:
            await heard(stream, 2, 3)


async def test_comings_and_goings_are_bounded(memory: MakeStore) -> None:
    """P10: a client that reconnects for ever fills nothing."""
    async with talking(memory, max_log_events=40) as (stage, a, b, c):
        session = await a.open()
        for number in range(60):
            async with getting((a, b, c)[number % 3], session) as stream:
                await stream.event()

        async def small() -> bool:
            return len(await stage.log(session)) <= 45

        await eventually(small)
        assert any(kind_of(event.data) is Kind.LISTENING for event in await stage.log(session))
