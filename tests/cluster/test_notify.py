"""One call tells everyone: clients of the handshake era hear what is broadcast, on any node, also if they were away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import mcp_types as types
import pytest
from mcp.server import MCPServer, Server

import nonstick
import nonstick.log.cluster_log
from nonstick.core.event_ids import EventId, parse_event_id
from nonstick.core.events import Kind
from nonstick.core.names import session_key
from nonstick.errors import ConfigurationError
from nonstick.log.cluster_log import CLUSTER_KEY
from nonstick.log.guard import GuardedStore
from nonstick.session.standalone import StandaloneConnection
from nonstick.store import MAX_READ, MAX_READ_BYTES, Cursor, Event, Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Cluster, Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.sse import DEADLINE, Stream, getting, posting
from tests.cluster.stage import Context, HeldStore, Stage, announce, call, eventually, node_of, say, text_of
from tests.cluster.test_listener import has_left
from tests.cluster.test_streams import Forgetful

pytestmark = pytest.mark.anyio

TOOLS = "notifications/tools/list_changed"
PROMPTS = "notifications/prompts/list_changed"
RESOURCES = "notifications/resources/list_changed"


class Hall(Stage):
    """A stage whose server has prompts and resources too."""

    def server(self) -> Server[Any]:
        server = super().server()
        server.add_request_handler("prompts/list", types.PaginatedRequestParams, _no_prompts)
        server.add_request_handler("resources/list", types.PaginatedRequestParams, _no_resources)
        return server


async def _no_prompts(_ctx: Context, _params: Any) -> types.ListPromptsResult:
    return types.ListPromptsResult(prompts=[])


async def _no_resources(_ctx: Context, _params: Any) -> types.ListResourcesResult:
    return types.ListResourcesResult(resources=[])


@asynccontextmanager
async def gathered(make_store: MakeStore, **options: Any) -> AsyncIterator[tuple[Stage, Member, Member, Member]]:
    async with Hall(make_store, **options) as stage:

        @stage.tool
        async def tell(ctx: Context, arguments: dict[str, Any]) -> str:
            await announce(ctx, arguments["text"])
            return "told"

        a, b, c = stage.cluster
        yield stage, a, b, c


async def subscribe(member: Member, session: Session, *uris: str, undo: bool = False) -> None:
    for uri in uris:
        method = "resources/unsubscribe" if undo else "resources/subscribe"
        response = await member.post(
            {"jsonrpc": "2.0", "id": uri[:99], "method": method, "params": {"uri": uri}}, session
        )
        assert response.json()["result"] == {}, response.text


def said(message: dict[str, Any]) -> str:
    """The URI of an update, the method of all else."""
    assert message["jsonrpc"] == "2.0"
    if message["method"] == "notifications/resources/updated":
        return str(message["params"]["uri"])
    return str(message["method"])


async def heard(stream: Stream, *what: str) -> None:
    """These, and nothing else, come next."""
    assert [said(await stream.message()) for _ in what] == list(what)


async def knows(member: Member, position: int) -> None:
    """The node has read the cluster log this far."""
    await eventually(lambda: node_of(member).services.cluster_log.broadcasts.head.position >= position)


async def position_of(stage: Stage) -> int:
    return (await stage.store.load(CLUSTER_KEY)).head.position


# ---- everyone


async def test_one_call_is_heard_everywhere(make_store: MakeStore) -> None:
    """P11: list changes by everyone; an update by those alone who subscribed to that resource, on whichever node."""
    async with gathered(make_store) as (stage, a, b, c):
        sessions = [await member.open() for member in (a, b, c)]
        await subscribe(c, sessions[0], "x://1", "x://2")
        await subscribe(a, sessions[1], "x://2")
        async with (
            getting(b, sessions[0]) as first,
            getting(c, sessions[1]) as second,
            getting(a, sessions[2]) as third,
        ):
            for stream in (first, second, third):
                await stream.event()
            cluster = b.app.cluster
            await cluster.notify_tools_changed()
            await cluster.notify_resource_updated("x://1")
            await cluster.notify_prompts_changed()
            await cluster.notify_resource_updated("x://2")
            await cluster.notify_resources_changed()
            await heard(first, TOOLS, "x://1", PROMPTS, "x://2", RESOURCES)
            await heard(second, TOOLS, PROMPTS, "x://2", RESOURCES)
            await heard(third, TOOLS, PROMPTS, RESOURCES)
        for session in sessions:
            assert Kind.MESSAGE not in await stage.kinds(session), "it costs one append, not one for each session"


async def test_a_handler_may_tell_everyone(memory: MakeStore) -> None:
    """P11: from a tool, whose own client hears it as well."""
    async with gathered(memory) as (stage, a, b, c):

        @stage.tool
        async def change(ctx: Context, arguments: dict[str, Any]) -> str:
            await c.app.cluster.notify_tools_changed()
            return "changed"

        session = await a.open()
        async with getting(b, session) as stream:
            await stream.event()
            assert "result" in (await c.post(call("change"), session)).json()
            await heard(stream, TOOLS)


async def test_absent_client_hears_broadcasts_on_return(make_store: MakeStore) -> None:
    """P11: on any node, without an event id, once; with one exactly what came after it."""
    async with gathered(make_store) as (stage, a, b, c):
        await a.app.cluster.notify_prompts_changed()
        await knows(b, 1)
        session = await b.open()
        await subscribe(b, session, "x://1")
        await c.app.cluster.notify_tools_changed()
        # What came before the session is not its business.
        async with getting(a, session) as stream:
            await heard_in_all(stream, TOOLS)
            assert stream.last_id is not None
            early = stream.last_id
        await has_left(stage, session)
        await b.app.cluster.notify_resource_updated("x://1")
        await b.app.cluster.notify_resource_updated("x://2")
        async with getting(c, session) as stream:
            await heard_in_all(stream, "x://1")
            await b.app.cluster.notify_resources_changed()
            await heard(stream, RESOURCES)
            late = stream.last_id
        await has_left(stage, session, 2)
        async with getting(b, session) as stream:
            await a.app.cluster.notify_tools_changed()
            await heard_in_all(stream, TOOLS)
        await has_left(stage, session, 3)
        async with getting(c, session, late) as stream:
            await heard_in_all(stream, TOOLS)
        await has_left(stage, session, 4)
        async with getting(a, session, early) as stream:
            await heard_in_all(stream, "x://1", RESOURCES, TOOLS)


async def heard_in_all(stream: Stream, *what: str) -> None:
    """These come next, priming events apart."""
    got: list[str] = []
    while len(got) < len(what):
        event = await stream.event()
        if event.data:
            got.append(said(event.message))
    assert got == list(what)


async def test_messages_and_broadcasts_share_one_stream(make_store: MakeStore) -> None:
    """P3, P11: from any of its ids exactly the rest of both."""
    async with gathered(make_store) as (stage, a, b, c):

        async def happen(stream: Stream, number: int) -> None:
            if number % 2:
                await b.app.cluster.notify_resource_updated(f"x://{number}")
            else:
                await c.post(call("tell", text=f"x://{number}"), session)
            assert _text(await stream.message()) == f"x://{number}"

        session = await a.open()
        await subscribe(a, session, *(f"x://{number}" for number in range(8)))
        async with getting(a, session) as stream:
            ids = [(await stream.event()).id]
            for number in range(8):
                await happen(stream, number)
                ids.append(stream.last_id)
        await has_left(stage, session)
        for number, event_id in enumerate(ids):
            async with getting((a, b, c)[number % 3], session, event_id) as stream:
                got: set[str] = set()
                while len(got) < 8 - number:
                    event = await stream.event()
                    if event.data:
                        assert _text(event.message) not in got
                        got.add(_text(event.message))
                assert got == {f"x://{n}" for n in range(number, 8)}
            await has_left(stage, session, number + 2)


def _text(message: dict[str, Any]) -> str:
    return text_of(message) if message["method"] == "notifications/message" else said(message)


async def test_broadcasts_during_takeover_come_once(make_store: MakeStore) -> None:
    """P3, P11: exactly once among all connections that name no event."""
    async with gathered(make_store) as (_, a, b, c):
        session = await a.open()
        uris = [f"x://{number}" for number in range(30)]
        await subscribe(a, session, *uris, "x://fence")
        got: list[str] = []
        complete = asyncio.Event()

        async def listen(stream: Stream) -> None:
            while (block := await stream.block()) is not None:
                if block.data:
                    got.append(said(block.message))
                if "x://fence" in got:
                    complete.set()

        async def tell() -> None:
            for uri in uris:
                await b.app.cluster.notify_resource_updated(uri)

        async with asyncio.TaskGroup() as group:
            telling = group.create_task(tell())
            streams = []
            for number in range(6):
                stream = Stream((a, b, c)[number % 3], "GET", session, None, {})
                await stream.response()
                streams.append(stream)
                group.create_task(listen(stream))
            await telling
            await c.app.cluster.notify_resource_updated("x://fence")
            async with asyncio.timeout(60):
                await complete.wait()
            await a.delete(session)
        for stream in streams:
            await stream.close()
        assert sorted(got) == sorted([*uris, "x://fence"])


def connections(member: Member) -> list[StandaloneConnection]:
    """To standalone streams, at this node."""
    return [reader for reader in node_of(member).services.readers if isinstance(reader, StandaloneConnection)]


async def test_slow_reader_hears_each_thing_once(memory: MakeStore) -> None:
    """P10, P11: what was broadcast meanwhile takes no room."""
    async with gathered(memory) as (_, a, b, c):
        session = await a.open()
        await subscribe(a, session, "x://1", "x://2")
        async with slow_reader(b, session) as reader:
            while not (waits := [one for one in connections(b) if not one.outlet.has_room]):
                await a.post(call("tell", text="x" * 200_000), session)
            for _ in range(50):
                await c.app.cluster.notify_resource_updated("x://1")
                await c.app.cluster.notify_resource_updated("x://2")
            await knows(b, 100)
            assert not waits[0].outlet.has_room
            text = ""
            while '"x://2"' not in text:
                text = text[-1000:] + (await asyncio.wait_for(reader.read(1 << 20), 60)).decode()
            assert text.count('"x://1"') == text.count('"x://2"') == 1


@asynccontextmanager
async def slow_reader(member: Member, session: Session) -> AsyncIterator[asyncio.StreamReader]:
    """A GET whose client has taken nothing yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", member.port, limit=1024)
    headers = "".join(f"{name}: {value}\r\n" for name, value in session.headers.items())
    request = f"GET /mcp HTTP/1.1\r\nhost: 127.0.0.1:{member.port}\r\naccept: text/event-stream\r\n{headers}\r\n"
    writer.write(request.encode())
    try:
        await eventually(lambda: bool(node_of(member).services.readers))
        yield reader
    finally:
        writer.close()


# ---- subscriptions


async def test_update_overtaking_its_subscription_is_heard() -> None:
    """P11: subscribed on one node, updated from there at once; the connection's node hears of the update first."""
    store = MemoryStore()
    slow = HeldStore(store, "read", after=False, when=lambda key, *_: key != CLUSTER_KEY)
    stores: Iterator[Any] = iter([store, _Deaf(slow), store, store])
    async with gathered(lambda: next(stores)) as (_, a, b, c):
        session = await b.open()
        async with getting(a, session) as stream:
            await stream.event()
            slow.holding = True
            await subscribe(b, session, "x://1")
            await c.app.cluster.notify_resource_updated("x://1")
            await knows(a, 1)
            assert not stream.waiting
            slow.released.set()
            await heard(stream, "x://1")
            await subscribe(c, session, "x://1", undo=True)
            # What is sent to the session is in the same log, behind it.
            await c.post(call("tell", text="fence"), session)
            assert text_of(await stream.message()) == "fence"
            await c.app.cluster.notify_resource_updated("x://1")
            await c.app.cluster.notify_tools_changed()
            await heard(stream, TOOLS)


async def test_subscription_behind_loaded_record_counts() -> None:
    """P11: another request of its node, which was loaded later, knew of it first."""
    store = MemoryStore()
    slow = HeldStore(store, "load", after=True, when=lambda key, *_: key != CLUSTER_KEY)
    stores: Iterator[Any] = iter([store, slow, store, store])
    async with gathered(lambda: next(stores)) as (_, a, b, c):
        session = await b.open()
        async with getting(a, session) as first:
            await first.event()
            slow.holding = True
            connecting = Stream(a, "GET", session, None, {})
            async with asyncio.timeout(DEADLINE):
                await slow.held.wait()
            slow.holding = False
            await subscribe(b, session, "x://1")
            assert (await a.post({"jsonrpc": "2.0", "id": 2, "method": "ping"}, session)).json()["result"] == {}
            slow.released.set()
            await connecting.event()
            await c.app.cluster.notify_resource_updated("x://1")
            await c.app.cluster.notify_tools_changed()
            await heard(connecting, "x://1", TOOLS)
            await connecting.close()


async def test_subscription_during_silence_counts(make_store: MakeStore) -> None:
    """P11: it goes on behind what tells of the subscription, for another connection carried what came after that."""
    async with gathered(make_store) as (stage, a, b, c):
        session = await b.open()
        await subscribe(b, session, "x://2")
        async with getting(a, session) as first:
            await first.event()
            async with getting(b, session) as second:
                await second.event()
                await has_left(stage, session)
                await subscribe(c, session, "x://1")
                await subscribe(c, session, "x://2", undo=True)
                await c.post(call("tell", text="fence"), session)
                assert text_of(await second.message()) == "fence"
            await has_left(stage, session, 2)
            for uri in ("x://2", "x://1"):
                await c.app.cluster.notify_resource_updated(uri)
            await heard(first, "x://1")


class _Counting(MemoryStore):
    """Counts the calls that read one entry."""

    def __init__(self) -> None:
        super().__init__()
        self.single = 0

    async def read(
        self, key: str, after: Cursor, *, limit: int = MAX_READ, max_bytes: int = MAX_READ_BYTES
    ) -> list[Event]:
        self.single += limit == 1
        return await super().read(key, after, limit=limit, max_bytes=max_bytes)


async def test_known_subscriptions_are_not_read_again() -> None:
    """P10: however many long ones a client has added, no connection reads each of them."""
    store = _Counting()
    async with gathered(one(store)) as (_, a, b, c):
        session = await b.open()
        await subscribe(b, session, *("x://" + f"{number}" * 2000 for number in range(8)))
        store.single = 0
        async with getting(a, session) as stream:
            await stream.event()
            await c.app.cluster.notify_resource_updated("x://" + "7" * 2000)
            await heard(stream, "x://" + "7" * 2000)
        assert store.single == 0


@pytest.mark.parametrize("uri", ["x://1", "x://" + "1" * 2000], ids=["short", "long"])
async def test_subscription_during_a_beginning_counts(uri: str) -> None:
    """P11: after the new connection loaded the record, and before an older one carried the last message."""
    store = MemoryStore()
    slow = HeldStore(store, "load", after=True, when=lambda key, *_: key != CLUSTER_KEY)
    stores: Iterator[Any] = iter([store, slow, store, store])
    async with gathered(lambda: next(stores)) as (stage, a, b, c):
        session = await b.open()
        async with getting(b, session) as older:
            await older.event()
            slow.holding = True
            newer = Stream(a, "GET", session, None, {})
            async with asyncio.timeout(DEADLINE):
                await slow.held.wait()
            slow.holding = False
            await subscribe(c, session, uri)
            await c.post(call("tell", text="fence"), session)
            assert text_of(await older.message()) == "fence"
            slow.released.set()
            await newer.event()
            await has_left(stage, session)
            await c.app.cluster.notify_resource_updated(uri)
            await c.app.cluster.notify_tools_changed()
            await heard(newer, uri)
            await newer.close()


async def test_subscription_at_lost_place_counts() -> None:
    """P9, P11: positions up to which the record was known are given out again."""
    store = Forgetful()
    async with gathered(one(store)) as (stage, a, b, c):
        session = await b.open()
        for number in range(8):
            await c.post(call("tell", text=number), session)
        async with getting(a, session) as stream:
            while (await stream.event()).data:
                pass
            store.lose(session_key(session.id), 2)
            await subscribe(c, session, "x://1")
            await has_left(stage, session)
            await c.app.cluster.notify_resource_updated("x://1")
            await c.app.cluster.notify_tools_changed()
            while (message := await stream.message())["method"] == "notifications/message":
                pass
            assert said(message) == "x://1"


class _Deaf:
    """A store that carries no events with its wakes."""

    def __init__(self, store: HeldStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def watch(self, key: str, wake: Any) -> Any:
        return self._store._store.watch(key, wake if key == CLUSTER_KEY else lambda _: wake(None))

    async def __aenter__(self) -> Any:
        return await self._store.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        await self._store.__aexit__(*error)


async def test_subscription_by_streamed_answer_counts(memory: MakeStore) -> None:
    """P2, P11: `answer="sse"`."""
    async with gathered(memory, answer="sse") as (_, a, b, c):
        session = await a.open()
        async with getting(b, session) as stream:
            await stream.event()
            message = {"jsonrpc": "2.0", "id": 1, "method": "resources/subscribe", "params": {"uri": "x://1"}}
            async with posting(c, session, message) as request:
                assert (await request.rest())[-1]["result"] == {}
            await a.app.cluster.notify_resource_updated("x://2")
            await a.app.cluster.notify_resource_updated("x://1")
            await heard(stream, "x://1")


# ---- what is lost


async def test_trimmed_broadcasts_are_told_in_full(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """P11: each list once, and each resource that it has subscribed to; then what comes."""
    monkeypatch.setattr(nonstick.log.cluster_log, "_LOG_EVENTS", 8)
    async with gathered(make_store) as (stage, a, b, c):
        session = await a.open()
        await subscribe(a, session, "x://2", "x://1")
        async with getting(c, session) as stream:
            await stream.event()
            first = stream.last_id
        await has_left(stage, session)
        for number in range(20):
            await b.app.cluster.notify_resource_updated(f"y://{number}")
        last = await position_of(stage)
        for member in (a, b, c):
            await knows(member, last)
        for number, last_id in enumerate((None, first)):
            async with getting(a, session, last_id) as stream:
                await heard_in_all(stream, TOOLS, PROMPTS, RESOURCES, "x://1", "x://2")
                await b.app.cluster.notify_resource_updated("x://1")
                await heard(stream, "x://1")
                late = stream.last_id
            await has_left(stage, session, number + 2)
        await b.app.cluster.notify_prompts_changed()
        async with getting(b, session, late) as stream:
            await heard_in_all(stream, PROMPTS)


@pytest.mark.parametrize("refilled", [False, True], ids=["shorter", "with other entries"])
async def test_lost_cluster_log_tells_everyone_everything(refilled: bool) -> None:
    """P9, P11: connected or away, with or without an event id."""
    store = Forgetful()
    async with gathered(one(store)) as (stage, a, b, c):
        away, here = await a.open(), await b.open()
        await subscribe(a, away, "x://1")
        for number in range(4):
            await a.app.cluster.notify_resource_updated(f"y://{number}")
        async with getting(a, away) as stream:
            await stream.event()
            await a.app.cluster.notify_tools_changed()
            await heard(stream, TOOLS)
            last_id = stream.last_id
        await has_left(stage, away)
        async with getting(c, here) as stream:
            await heard_in_all(stream, TOOLS)
            store.lose(CLUSTER_KEY, 1)
            if refilled:
                for number in range(6):
                    await b.app.cluster.notify_resource_updated(f"z://{number}")
            await heard(stream, TOOLS, PROMPTS, RESOURCES)
            await b.app.cluster.notify_prompts_changed()
            await heard(stream, PROMPTS)
        async with getting(b, away, last_id) as stream:
            await heard_in_all(stream, TOOLS, PROMPTS, RESOURCES, "x://1")
        await has_left(stage, away, 2)
        async with getting(c, away) as stream:
            await a.app.cluster.notify_tools_changed()
            await heard_in_all(stream, TOOLS)


async def test_retold_changes_have_own_event_ids() -> None:
    """P3, P9: an id names one event. From each of them, on any node, exactly the rest follows, and what came since."""
    store = Forgetful()
    async with gathered(one(store)) as (stage, a, b, c):
        session = await a.open()
        await subscribe(a, session, "x://1", "x://2")
        everything = [TOOLS, PROMPTS, RESOURCES, "x://1", "x://2"]
        async with getting(c, session) as stream:
            await stream.event()
            await a.app.cluster.notify_tools_changed()
            await heard(stream, TOOLS)
            store.lose(CLUSTER_KEY, 0)
            told = [await stream.event() for _ in everything]
        assert [said(event.message) for event in told] == everything
        assert len({event.id for event in told}) == len(told)
        await has_left(stage, session)
        await a.app.cluster.notify_resource_updated("x://2")
        end = "notifications/message"
        for number, event in enumerate(told):
            async with getting((a, b, c)[number % 3], session, event.id) as again:
                await heard_in_all(again, *[end] * 2 * number, *everything[number + 1 :], "x://2")
                await a.post(call("tell", "t", text="end"), session)
                await heard_in_all(again, end)
                last = again.last_id
            await has_left(stage, session, 2 + 2 * number)
            async with getting(b, session, last) as again:
                await a.post(call("tell", "t", text="end"), session)
                await heard_in_all(again, end)
            await has_left(stage, session, 3 + 2 * number)


async def test_interrupted_retelling_is_finished() -> None:
    """P9, P11: by whichever connection comes without an id. One that has taken a part has not heard it all."""
    store = Forgetful()
    async with gathered(one(store)) as (stage, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            await stream.event()
            await a.app.cluster.notify_tools_changed()
            await heard(stream, TOOLS)
            store.lose(CLUSTER_KEY, 0)
            told = await stream.event()
            await heard(stream, PROMPTS, RESOURCES)
        await has_left(stage, session)
        async with getting(b, session, told.id) as stream:
            await heard_in_all(stream, PROMPTS, RESOURCES)
            await a.post(call("tell", "t", text="end"), session)
            await heard_in_all(stream, "notifications/message")
        await has_left(stage, session, 2)
        async with getting(a, session) as stream:
            await a.post(call("tell", "t", text="end"), session)
            await heard_in_all(stream, "notifications/message")


async def test_lost_cluster_log_begins_anew(memory: MakeStore) -> None:
    """P9: a broadcast that finds no cluster log makes one."""
    async with gathered(memory) as (stage, a, b, c):
        session = await a.open()
        async with getting(c, session) as stream:
            await stream.event()
            await a.app.cluster.notify_tools_changed()
            await heard(stream, TOOLS)
            await stage.store.delete(CLUSTER_KEY)
            await b.app.cluster.notify_prompts_changed()
            got = {said(await stream.message()) for _ in range(3)}
            assert got == {TOOLS, PROMPTS, RESOURCES}
            await eventually(lambda: all(node_of(m).services.cluster_log.broadcasts.head.position for m in (a, b, c)))
            await a.app.cluster.notify_resources_changed()
            while said(await stream.message()) != RESOURCES:
                pass


async def test_last_releases_event_id_is_good(memory: MakeStore) -> None:
    """P12: it does not say how much of the cluster log was heard: all since the session began is said again, once."""
    async with gathered(memory) as (stage, a, b, c):
        session = await a.open()
        async with getting(a, session) as stream:
            await stream.event()
            await b.app.cluster.notify_tools_changed()
            await b.app.cluster.notify_tools_changed()
            await heard(stream, TOOLS)
            place = parse_event_id(stream.last_id or "", session.id)
        await has_left(stage, session)
        assert place is not None
        old = EventId(place.stream, place.cursor).seal(session.id)
        async with getting(c, session, old) as stream:
            await heard_in_all(stream, TOOLS)
            await b.app.cluster.notify_prompts_changed()
            await heard(stream, PROMPTS)


# ---- who may call


async def test_clientless_process_tells_everyone(make_store: MakeStore) -> None:
    """P11: a script that has the store's URL alone."""
    async with gathered(make_store) as (_, a, b, _c):
        session = await a.open()
        async with getting(b, session) as stream:
            await stream.event()
            async with nonstick.Cluster.connect(make_store()) as cluster:
                await cluster.notify_tools_changed()
            await heard(stream, TOOLS)


async def test_connect_refuses_an_unshared_store() -> None:
    with pytest.raises(ConfigurationError, match="memory:"):
        async with nonstick.Cluster.connect("memory:"):
            pass


async def test_servers_lifespan_may_tell_everyone(memory: MakeStore) -> None:
    """P11: as early as its beginning, and to its end."""
    cluster = nonstick.Cluster()

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        await cluster.notify_tools_changed()
        yield
        await cluster.notify_prompts_changed()

    async with Hall(memory) as stage:
        a, b, _c = stage.cluster
        session = await a.open()
        async with getting(b, session) as stream:
            await stream.event()
            async with nonstick.app(Server("x", lifespan=lifespan), store=stage.store, cluster=cluster).lifespan():
                await heard(stream, TOOLS)
            await heard(stream, PROMPTS)


# ---- what a server offers


async def capabilities(server: Server[Any] | MCPServer[Any]) -> dict[str, Any]:
    async with Cluster(lambda: server, lambda: "memory:", nodes=1) as cluster:
        params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        response = await cluster[0].post({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
        found: dict[str, Any] = response.json()["result"]["capabilities"]
        return found


async def test_capabilities_are_offered_where_useful() -> None:
    """P2: subscriptions and log levels, by any kind of server; no resources are offered that there are not."""
    without = await capabilities(Server("x"))
    assert "resources" not in without
    assert without["logging"] == {}
    assert (await capabilities(MCPServer("x")))["resources"] == {"subscribe": True, "listChanged": True}


async def test_server_keeps_its_own_handlers() -> None:
    """P2."""
    called: list[str] = []

    async def own(ctx: Context, _params: Any) -> types.EmptyResult:
        called.append(ctx.method)
        return types.EmptyResult()

    server = Server("x")
    server.add_request_handler("logging/setLevel", types.SetLevelRequestParams, own)
    server.add_request_handler("resources/list", types.PaginatedRequestParams, _no_resources)
    server.add_request_handler("resources/subscribe", types.SubscribeRequestParams, own)
    async with Cluster(lambda: server, lambda: "memory:", nodes=1) as cluster:
        session = await cluster[0].open()
        for method, params in {"logging/setLevel": {"level": "error"}, "resources/subscribe": {"uri": "x://1"}}.items():
            await cluster[0].post({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}, session)
        assert called == ["logging/setLevel", "resources/subscribe"]
        unsubscribe = {"jsonrpc": "2.0", "id": 1, "method": "resources/unsubscribe", "params": {"uri": "x://1"}}
        assert (await cluster[0].post(unsubscribe, session)).json()["error"]["code"] == types.METHOD_NOT_FOUND


async def test_log_level_counts_for_running_requests(make_store: MakeStore) -> None:
    """P2: what is below it is not sent."""
    async with gathered(make_store, window=0.05) as (stage, a, b, c):

        @stage.tool
        async def chat(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "before")
            await stage.door("set")
            await say(ctx, "after")
            return "done"

        session = await a.open()
        async with posting(b, session, call("chat", 1)) as running:
            assert text_of(await running.message()) == "before"
            level = {"jsonrpc": "2.0", "id": 2, "method": "logging/setLevel", "params": {"level": "warning"}}
            assert (await c.post(level, session)).json()["result"] == {}
            view = node_of(b).sessions[session_key(session.id)]
            await eventually(lambda: view.record.log_level == "warning")
            stage.open("set")
            assert text_of(await running.message()) == "done"
        async with posting(a, session, call("chat", 3)) as quiet:
            assert text_of(await quiet.outcome()) == "done"
        bad = level | {"params": {"level": "loud"}}
        assert (await b.post(bad, session)).json()["error"]["code"] == types.INVALID_PARAMS


@pytest.mark.parametrize("placement", ["any", "owner"])
async def test_log_level_counts_on_same_node(memory: MakeStore, placement: Any) -> None:
    """P2: also while they are too young to follow the log, which says so to others."""
    async with gathered(memory, window=60.0, placement=placement) as (stage, a, *_):

        @stage.tool
        async def chat(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            await stage.door("set")
            await say(ctx, "after")
            return "done"

        session = await a.open()
        async with posting(a, session, call("chat", 1)) as running:
            await stage.reached("begun")
            level = {"jsonrpc": "2.0", "id": 2, "method": "logging/setLevel", "params": {"level": "warning"}}
            assert (await a.post(level, session)).json()["result"] == {}
            stage.open("set")
            assert text_of(await running.outcome()) == "done"


async def test_unreachable_store_is_said_to_teller(memory: MakeStore) -> None:
    """P9: a broadcast whose outcome is not known raises, and names no store."""

    class Away:
        url = "away:"

        def __getattr__(self, name: str) -> Any:
            async def away(*_args: Any, **_options: Any) -> Any:
                raise nonstick.errors.StoreUnavailable("cannot connect to secret-host:6379")

            return away

    cluster = nonstick.Cluster()
    store = GuardedStore(_typed(Away()), patience=0.1)
    async with cluster.taking_part(store):
        with pytest.raises(nonstick.errors.StoreUnavailable) as caught:
            await cluster.notify_tools_changed()
    assert "secret-host" not in str(caught.value)


def _typed(store: Any) -> Store:
    found: Store = store
    return found
