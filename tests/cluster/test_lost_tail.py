"""A store that lost the end of a session's log: on every node clients of a standalone stream get what is new, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from nonstick.core.event_ids import EventId, parse_event_id
from nonstick.core.events import Kind, decode, kind_of
from nonstick.core.names import session_key
from nonstick.store import MAX_CLIP, Batch, Cursor, Draft, Skimmed
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import one
from tests.cluster.sse import Stream, getting, posting
from tests.cluster.stage import Context, Stage, call, eventually, node_of, text_of
from tests.cluster.test_listener import count, has_left, heard, talking, tell
from tests.cluster.test_streams import Forgetful

pytestmark = pytest.mark.anyio

TOLD = 10
"""Messages that the client had before the loss."""


class Scene:
    """A session whose client had ten messages, of which the store then loses the end."""

    def __init__(self, store: Forgetful, stage: Stage, nodes: tuple[Member, Member, Member]) -> None:
        self.store = store
        self.stage = stage
        self.a, self.b, self.c = self.nodes = nodes

    async def begin(self, version: str = "2025-11-25", told: int = TOLD) -> None:
        self.session = await self.a.open(version=version)
        self.ids: list[str] = []
        async with getting(self.c, self.session) as stream:
            await eventually(lambda: self._is_listening(1))
            for number in range(told):
                await tell(self.b, self.session, number)
                while not (event := await stream.event()).data:
                    pass
                assert event.id is not None
                self.ids.append(event.id)
        await has_left(self.stage, self.session)

    async def _is_listening(self, times: int) -> bool:
        return await count(self.stage, self.session, Kind.LISTENING) >= times

    def lose_after(self, message: int) -> None:
        """The store has this message, and nothing behind it."""
        place = parse_event_id(self.ids[message], self.session.id)
        assert place is not None
        self.store.lose(session_key(self.session.id), place.cursor.position)

    @asynccontextmanager
    async def resumed(self, node: Member, last_id: str | None) -> AsyncIterator[Stream]:
        """A connection from this id on, which has left when it is closed."""
        left = await count(self.stage, self.session, Kind.LEFT)
        async with getting(node, self.session, last_id) as stream:
            assert (await stream.response()).status_code == 200
            yield stream
        await has_left(self.stage, self.session, left + 1)


@asynccontextmanager
async def scene(**options: object) -> AsyncIterator[Scene]:
    store = Forgetful()
    async with talking(one(store), **options) as (stage, *nodes):
        a, b, c = nodes
        yield Scene(store, stage, (a, b, c))


def is_lost(warning: str) -> bool:
    return "standalone stream are lost" in warning


@pytest.mark.parametrize("new", [0, 30], ids="{} new".format)
@pytest.mark.parametrize("seen", [False, True], ids=["unseen", "seen by a node"])
@pytest.mark.parametrize("has", [3, 6, 9], ids="client has {}".format)
async def test_returning_clients_get_exactly_the_new(
    has: int, seen: bool, new: int, caplog: pytest.LogCaptureFixture
) -> None:
    """P3, P9: messages 0 to 5 are left of 0 to 9. A client that has fewer gets the rest of them too, and one that has
    more gets none again; also if a node has followed the log all the time, and if all positions were given out anew."""
    async with scene() as it, AsyncExitStack() as stack:
        await it.begin()
        if seen:

            @it.stage.tool
            async def wait(ctx: Context, arguments: dict[str, str]) -> str:
                await it.stage.door("done")
                return "done"

            await stack.enter_async_context(posting(it.b, it.session, call("wait", "w")))
            await eventually(lambda: _follows(it.b, it.session))
        it.lose_after(5)
        fresh = [f"new {number}" for number in range(new)]
        await tell(it.a, it.session, *fresh)
        caplog.clear()
        for number, node in enumerate(it.nodes):
            fresh.append(f"fence {number}")
            await tell(it.nodes[number - 1], it.session, fresh[-1])
            async with it.resumed(node, it.ids[has]) as stream:
                await heard(stream, *range(has + 1, 6), *fresh)
                own = stream.last_id
            async with it.resumed(it.nodes[number - 2], own) as stream:
                fresh.append(f"fence {number} again")
                await tell(it.a, it.session, fresh[-1])
                await heard(stream, fresh[-1])
        told = [record for record in caplog.messages if is_lost(record)]
        assert len(told) == (has > 5), told
        it.stage.open("done")


async def _follows(node: Member, session: Session) -> bool:
    live = node_of(node).sessions.get(session_key(session.id))
    return live is not None and bool(live.log.follower.subscriptions)


@pytest.mark.parametrize("version", ["2025-11-25", "2025-06-18"])
async def test_overlong_loss_is_told_once(version: str, caplog: pytest.LogCaptureFixture) -> None:
    """P9: forty messages are lost, and nobody followed the log. One id leads to one place on every node."""
    async with scene() as it:
        await it.begin(version, told=45)
        it.lose_after(1)
        caplog.clear()
        async with it.resumed(it.a, it.ids[-1]):
            pass
        for number, node in enumerate((it.b, it.c, it.a)):
            await tell(it.a, it.session, f"new {number}")
            async with it.resumed(node, it.ids[-1]) as stream:
                await heard(stream, *(f"new {n}" for n in range(number + 1)))
        assert len([record for record in caplog.messages if is_lost(record)]) == 1


async def test_id_without_predecessors_repeats_nothing() -> None:
    """P9, P12: of the last release, or of a client that had one message."""
    async with scene() as it:
        await it.begin()
        place = parse_event_id(it.ids[8], it.session.id)
        assert place is not None
        old = EventId(place.stream, place.cursor, heard=place.heard).seal(it.session.id)
        it.lose_after(5)
        async with it.resumed(it.b, old) as stream:
            await tell(it.a, it.session, "new")
            await heard(stream, "new")
        await tell(it.b, it.session, "newer")
        async with it.resumed(it.c, old) as stream:
            await heard(stream, "new", "newer")


@pytest.mark.parametrize("refilled", [False, True], ids=["shorter", "with other entries"])
async def test_open_connections_continue_after_loss(refilled: bool) -> None:
    """P9: several at once, of which one carries each message; then one that comes back with what it was given."""
    async with scene() as it:
        await it.begin()
        async with getting(it.a, it.session, it.ids[-1]) as first, getting(it.b, it.session) as second:
            await second.event()
            await tell(it.c, it.session, "before")
            await heard(second, "before")
            given = second.last_id
            it.lose_after(4)
            fresh = [f"new {number}" for number in range(30 if refilled else 1)]
            await tell(it.c, it.session, *fresh, "newer")
            got: list[str] = []
            async with asyncio.TaskGroup() as group:
                readers = [group.create_task(_gather(stream, got)) for stream in (first, second)]
                await eventually(lambda: "newer" in got)
                await tell(it.a, it.session, "fence")
                await eventually(lambda: "fence" in got)
                for reader in readers:
                    reader.cancel()
            assert sorted(got) == sorted([*fresh, "newer", "fence"])
        for node in it.nodes:
            async with it.resumed(node, given) as stream:
                await heard(stream, *fresh, "newer", "fence")


async def _gather(stream: Stream, got: list[str]) -> None:
    while (block := await stream.block()) is not None:
        if block.data:
            got.append(text_of(block.message))


async def test_early_returner_is_sent_nothing_again() -> None:
    """P9: it has seen nothing of the log but what its id named, and that is gone."""
    async with scene() as it:
        await it.begin()
        async with it.resumed(it.b, it.ids[-1]) as stream:
            await stream.event()
            await eventually(lambda: it._is_listening(2))
            it.lose_after(6)
            await tell(it.a, it.session, "new")
            await heard(stream, "new")


async def test_second_loss_is_told_once() -> None:
    """P9: what was given after the first one is lost in the second."""
    async with scene() as it:
        await it.begin()
        it.lose_after(6)
        async with it.resumed(it.b, it.ids[-1]) as stream:
            await tell(it.a, it.session, "new", "newer")
            await heard(stream, "new", "newer")
            last = stream.last_id
        it.lose_after(3)
        await tell(it.a, it.session, *(f"newest {number}" for number in range(20)))
        for node in it.nodes:
            async with it.resumed(node, last) as stream:
                await heard(stream, *(f"newest {number}" for number in range(20)))


async def test_outdated_claims_are_not_believed() -> None:
    """P9: it left before its node knew of the loss, when its place had been given to another message."""
    async with scene() as it:
        await it.begin()
        key = session_key(it.session.id)
        left = (await it.stage.log(it.session))[-1]
        assert kind_of(left.data) is Kind.LEFT
        assert decode(left.data)["read"] == left.position - 1
        it.lose_after(5)
        await tell(it.a, it.session, *(f"new {number}" for number in range(4)))
        # As that node would write it now.
        await it.store.append(key, Batch([Draft(left.tag, left.data)]))
        async with it.resumed(it.b, None) as stream:
            got = []
            while text_of(message := await stream.message()) != "new 3":
                got.append(text_of(message))
            assert got[-3:] == ["new 0", "new 1", "new 2"]


async def test_replaced_trimmed_entry_is_lost() -> None:
    """P9: a request's stream had its position meanwhile; messages before that are new, and nobody has them."""
    async with scene() as it:
        await it.begin()

        @it.stage.tool
        async def stream(ctx: Context, arguments: dict[str, str]) -> str:
            await ctx.session.report_progress(1)
            return "done"

        it.lose_after(5)
        await tell(it.a, it.session, "new")
        async with posting(it.b, it.session, call("stream", "s", meta={"progressToken": 1})) as request:
            await request.rest()
        opened = next(event for event in await it.stage.log(it.session) if kind_of(event.data) is Kind.OPENED)
        place = parse_event_id(it.ids[7], it.session.id)
        assert place is not None
        assert opened.position <= place.cursor.position
        await it.stage.store.trim(session_key(it.session.id), streams=[opened.stream])
        await tell(it.c, it.session, "newer")
        async with it.resumed(it.a, it.ids[7]) as resumed:
            await heard(resumed, "new", "newer")


async def test_log_trimmed_mid_read_is_finished() -> None:
    """P10: a GET that comes while the log is being trimmed is served; the entry that it had got to is gone."""
    store = TrimsWhileRead()
    async with talking(one(store), max_log_events=100_000) as (_, a, b, c):
        session = await a.open()
        await tell(b, session, *range(40))
        store.key = session_key(session.id)
        async with getting(c, session) as stream:
            assert (await stream.response()).status_code == 200
            await tell(a, session, "new")
            await heard(stream, "new")
        assert store.trimmed


class TrimsWhileRead(Forgetful):
    """Drops what was read from one log, each time."""

    key = ""
    trimmed = 0

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        entries = await super().skim(key, after, limit=limit, clip=clip)
        if key == self.key and entries and self.trimmed < 3:
            self.trimmed += 1
            await self.trim(key, standalone_before=entries[-1].event.position + 1)
        return entries


async def test_log_losing_entries_is_read_anew() -> None:
    """P9: a GET that comes during the failover."""
    async with scene() as it:
        await it.begin()
        lost = asyncio.Event()
        skim = it.store.skim

        async def losing(key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
            found = await skim(key, after, limit=limit, clip=clip)
            if key == session_key(it.session.id) and not lost.is_set():
                lost.set()
                it.lose_after(2)
            return found

        it.store.skim = losing  # type: ignore[method-assign]
        async with getting(it.b, it.session, it.ids[-1]) as stream:
            assert (await stream.response()).status_code == 200
            assert lost.is_set()
            await tell(it.a, it.session, "new")
            await heard(stream, "new")
