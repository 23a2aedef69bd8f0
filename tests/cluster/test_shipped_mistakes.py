"""Mistakes that other systems for the same purpose have shipped. Each has a test here, so that this one does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from mcp.server.context import CallNext, HandlerResult

from nonstick import current_connection
from nonstick.core.events import Kind
from nonstick.core.names import session_key
from nonstick.errors import SessionNotFound
from nonstick.store import STANDALONE, Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Cluster, Session
from tests.cluster import test_auth as auth
from tests.cluster.conftest import MakeStore, one
from tests.cluster.sse import DEADLINE, getting, posting
from tests.cluster.stage import (
    Context,
    DownStore,
    HeldStore,
    Stage,
    accept,
    announce,
    ask,
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


def echoing(stage: Stage) -> None:
    @stage.tool
    async def echo(ctx: Context, arguments: dict[str, Any]) -> str:
        await say(ctx, f"said {arguments['text']}")
        if door := arguments.get("door"):
            await stage.door(door)
        return str(arguments["text"])


async def test_stream_is_not_its_requests_id(make_store: MakeStore) -> None:
    """P3: a shared event store replayed another session's tool result to whoever used the same id."""
    async with staged(make_store) as (stage, a, b, c):
        echoing(stage)
        mine, theirs = await a.open(), await a.open()
        async with posting(b, mine, call("echo", 1, text="mine")) as stream:
            my_id = (await stream.event()).id
            await stream.rest()
        async with posting(b, theirs, call("echo", 1, text="theirs")) as stream:
            their_id = (await stream.event()).id
            await stream.rest()
        assert my_id is not None
        for session, own, other in ((mine, my_id, their_id), (theirs, their_id, my_id)):
            async with getting(c, session, own) as resumed:
                assert text_of((await resumed.rest())[-1]) == ("mine" if session is mine else "theirs")
            async with getting(c, session, other) as refused:
                assert (await refused.response()).status_code == 400


async def test_resuming_finished_stream_never_hangs(make_store: MakeStore) -> None:
    """P3: also from its very last event, where nothing is left to send."""
    async with staged(make_store) as (stage, a, b, c):
        echoing(stage)
        session = await a.open()
        async with posting(b, session, call("echo", text="x")) as stream:
            events = await stream.events()
        for member in (a, b, c):
            async with getting(member, session, events[-1].id) as resumed:
                assert await resumed.rest() == []


async def test_reply_counts_however_early(make_store: MakeStore) -> None:
    """P4: the reply's route was registered only after the request had been sent.

    Here the reply comes while the asking node does not even know yet that its question is in the log.
    """
    held: list[HeldStore] = []

    def make() -> Store:
        held.append(HeldStore(make_store(), "append", after=True, when=lambda _key, batch: bool(batch.expect)))
        return held[-1]

    async with staged(make) as (stage, a, b, c):

        @stage.tool
        async def name(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "first")
            return str((await ask(ctx))["content"]["name"])

        session = await a.open()
        held[2].holding = True
        async with posting(b, session, call("name")) as stream:
            await stream.message()
            async with getting(c, session, stream.last_id) as resumed:
                assert (await a.post(accept(await resumed.message()), session)).status_code == 202
                assert not held[2].released.is_set()
                held[2].released.set()
                assert texts_of(await resumed.rest()) == ["Ada"]


async def test_unfinished_session_is_invisible(make_store: MakeStore) -> None:
    """P2: another node served requests of a session that was not one yet, or never became one."""
    stage = Stage(make_store)
    ids: list[str] = []
    for member in stage.cluster:

        async def hold(ctx: Context, call_next: CallNext) -> HandlerResult:
            result = await call_next(ctx)
            if ctx.method == "initialize":
                session_id = current_connection().session_id
                assert session_id is not None
                ids.append(session_id)
                stage.open("initializing")
                await stage.door("finish")
            return result

        member.app.manager.app.middleware.append(hold)
    async with stage:
        a, b, c = stage.cluster
        opening = asyncio.create_task(a.open())
        await stage.reached("initializing")
        early = Session(ids[0], "2025-11-25", {})
        for member in (a, b, c):
            assert (await member.post(call("x"), early)).status_code == 404
        stage.open("finish")
        assert (await opening).id == ids[0]
        for member in (a, b, c):
            assert (await member.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}, early)).status_code == 200


async def test_a_second_writer_overwrites_nothing(make_store: MakeStore) -> None:
    """P3: its sequence began at 0 again, at what another node, or the same one before, had written."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def tell(ctx: Context, arguments: dict[str, Any]) -> str:
            await announce(ctx, str(arguments["number"]))
            return "told"

        session = await a.open()
        for number in range(12):
            member = (a, a, b, c)[number % 4]
            # Each time by a new view of the session: nothing of it runs there in between.
            await eventually(lambda member=member: not node_of(member).sessions)  # type: ignore[misc]
            await member.post(call("tell", number, number=number), session)
        assert [event.position for event in await stage.log(session)] == list(range(1, 13))
        async with getting(c, session) as stream:
            assert texts_of([await stream.message() for _ in range(12)]) == [f"{number}" for number in range(12)]


async def test_delete_leaves_no_live_copy(make_store: MakeStore) -> None:
    """P6: only the node that got the DELETE forgot the session."""
    async with staged(make_store, window=0.02) as (stage, a, b, c):
        echoing(stage)
        session = await a.open()
        async with posting(b, session, call("echo", text="x", door="never")) as stream:
            await stream.message()
            assert (await c.delete(session)).status_code == 200
            assert (await b.post(call("echo", 2, text="y"), session)).status_code == 404
            assert await stream.rest() == []
        await eventually(lambda: not node_of(b).sessions)


async def test_restored_session_keeps_its_principal() -> None:
    """P1: it belongs to who opened it; a node that never saw it before asks nobody else."""
    auth.doors.update(asked=asyncio.Event(), answer=asyncio.Event())
    async with Cluster(auth.server, one(MemoryStore())) as cluster:
        session = await cluster[0].open(authorization=auth.ADA)
        for member in list(cluster)[1:]:
            thief = auth.as_(session, "Bearer bob")
            assert (await member.post(call("echo", text="x"), thief)).status_code == 404
            assert (await member.delete(thief)).status_code == 404
            assert (await member.post(call("echo", text="x"), session)).status_code == 200


async def test_session_survives_a_token_refresh() -> None:
    """P1: sessions were bound to a token's hash, and died with the token."""
    auth.doors.update(asked=asyncio.Event(), answer=asyncio.Event())
    async with Cluster(auth.server, one(MemoryStore())) as cluster:
        session = await cluster[0].open(authorization=auth.ADA)
        for member in cluster:
            refreshed = auth.as_(session, "Bearer ada-2")
            assert (await member.post(call("echo", text="x"), refreshed)).status_code == 200


async def test_unknown_ids_are_not_minted_again(make_store: MakeStore) -> None:
    """P1: an id that somebody sends never becomes a session, whatever comes with it."""
    async with staged(make_store) as (stage, a, b, c):
        params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}
        initialize = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
        guessed = Session("A" * 32, "2025-11-25", {})
        for member in (a, b, c):
            for message in (initialize, call("x"), {"jsonrpc": "2.0", "method": "notifications/initialized"}):
                response = await member.post(message, guessed)
                assert response.status_code == 404
                assert "mcp-session-id" not in response.headers
        with pytest.raises(SessionNotFound):
            await stage.store.load(session_key(guessed.id))


async def test_lost_acknowledgement_runs_nothing_twice(make_store: MakeStore) -> None:
    """P3: a node ran the request itself when forwarding it had failed, and the other one ran it too."""
    stores: list[DownStore] = []

    def make() -> Store:
        stores.append(DownStore(make_store(), "append", after=True))
        return stores[-1]

    async with staged(make) as (stage, a, b, c):
        executions: list[str] = []

        @stage.tool
        async def once(ctx: Context, arguments: dict[str, Any]) -> str:
            executions.append("once")
            stores[2].holding = True
            await say(ctx, "0")
            return "done"

        session = await a.open()
        async with posting(b, session, call("once")) as stream:
            async with asyncio.timeout(DEADLINE):
                await stores[2].held.wait()
            stores[2].holding = False
            assert texts_of(await stream.rest()) == ["0", "done"]
        async with getting(c, session, stream.last_id) as resumed:
            assert await resumed.rest() == []
        assert executions == ["once"]
        assert await stage.kinds(session) == [Kind.OPENED, Kind.MESSAGE, Kind.TERMINAL]


async def test_outage_is_never_404(make_store: MakeStore) -> None:
    """P9: clients took it for the end of their session, and threw it away."""
    stores: list[DownStore] = []

    def make() -> Store:
        stores.append(DownStore(make_store(), "load", after=False))
        return stores[-1]

    async with staged(make) as (stage, a, b, _):
        echoing(stage)
        session = await a.open()
        stores[2].holding = True
        for response in await asyncio.gather(
            b.post(call("echo", text="x"), session),
            b.delete(session),
            b.client.get(b.url, headers={"accept": "text/event-stream", **session.headers}),
        ):
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
        stores[2].holding = False
        async with posting(b, session, call("echo", text="x")) as stream:
            assert text_of((await stream.rest())[-1]) == "x"


async def test_nothing_falls_between_replay_and_tail(make_store: MakeStore) -> None:
    """P3: what was written after the replay was read and before the tail was heard was lost."""
    held: list[HeldStore] = []

    def make() -> Store:
        held.append(HeldStore(make_store(), "read", after=True))
        return held[-1]

    async with staged(make) as (stage, a, b, c):

        @stage.tool
        async def count(ctx: Context, arguments: dict[str, Any]) -> str:
            for number in range(6):
                await say(ctx, f"{number}")
                if number in (1, 3):
                    stage.open(f"said {number}")
                    await stage.door(f"after {number}")
            return "done"

        session = await a.open()
        on_c = held[3]
        async with posting(b, session, call("count")) as stream:
            priming = await stream.event()
            await stage.reached("said 1")
            on_c.holding = True
            resuming = asyncio.create_task(_resume(c, session, priming.id))
            async with asyncio.timeout(DEADLINE):
                await on_c.held.wait()
            # What c has read ends at 1. Before it hears of it, 2 and 3 are written.
            stage.open("after 1")
            await stage.reached("said 3")
            on_c.holding = False
            on_c.released.set()
            stage.open("after 3")
            assert await resuming == [*(f"{number}" for number in range(6)), "done"]
            await stream.rest()


async def _resume(member: Any, session: Session, last_id: str | None) -> list[Any]:
    async with getting(member, session, last_id) as resumed:
        return texts_of(await resumed.rest())


async def test_concurrent_requests_have_own_sequences(make_store: MakeStore) -> None:
    """P3: one sequence for all took a retried lower number for a duplicate, and lost it."""
    stores: list[DownStore] = []

    def make() -> Store:
        stores.append(DownStore(make_store(), "append", after=False, when=_writes_slow))
        return stores[-1]

    async with staged(make) as (stage, a, b, _):
        echoing(stage)
        session = await a.open()
        async with posting(b, session, call("echo", 1, text="slow", door="end")) as slow:
            await slow.event()
            stores[2].holding = True
            stage.open("end")
            async with asyncio.timeout(DEADLINE):
                await stores[2].held.wait()
            # While that is being repeated, others write with higher numbers.
            for number in range(5):
                async with posting(b, session, call("echo", number + 2, text=f"{number}")) as quick:
                    assert texts_of(await quick.rest()) == [f"said {number}", f"{number}"]
            stores[2].holding = False
            assert texts_of(await slow.rest()) == ["said slow", "slow"]


def _writes_slow(_key: str, batch: Any) -> bool:
    return any(b'"slow"' in event.data for event in batch.events)


async def test_reused_ids_get_their_own_end(make_store: MakeStore) -> None:
    """P3: terminals were kept by request id."""
    async with staged(make_store) as (stage, a, b, c):
        echoing(stage)
        session = await a.open()
        async with posting(b, session, call("echo", 1, text="old")) as stream:
            await stream.rest()
        async with posting(b, session, call("echo", 1, text="new", door="end")) as stream:
            first = (await stream.event()).id
            async with getting(c, session, first) as resumed:
                assert text_of(await resumed.message()) == "said new"
                assert not resumed.waiting
                stage.open("end")
                assert texts_of(await resumed.rest()) == ["new"]
            assert texts_of(await stream.rest()) == ["said new", "new"]


async def test_lossy_failover_is_noticed() -> None:
    """P9: an epoch alone does not tell it; the entries' tags do, though their positions are taken again."""
    store = Forgetful()
    async with staged(one(store)) as (stage, a, b, c):
        echoing(stage)
        session = await a.open()
        async with posting(b, session, call("echo", 1, text="kept")) as stream:
            await stream.rest()
        async with posting(b, session, call("echo", 2, text="lost")) as stream:
            lost = await stream.events()
        store.lose(session_key(session.id), 3)
        async with posting(b, session, call("echo", 3, text="new")) as stream:
            await stream.rest()
        assert STANDALONE not in {event.stream for event in await stage.log(session)}
        for event in lost:
            async with getting(c, session, event.id) as resumed:
                (error,) = await resumed.rest()
                assert error["id"] == 2
                assert error["error"]["data"]["reason"] == "stream_lost"
