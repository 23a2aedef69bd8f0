"""What the inbox of a session does with events, and who is told: without a store, and with one that loses entries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import pytest

from nonstick.core.events import Kind, draft, kind_of
from nonstick.core.names import new_tag
from nonstick.core.settings import Settings
from nonstick.log.guard import GuardedStore
from nonstick.log.lookout import Lookout
from nonstick.log.session_log import Logs, SessionLog
from nonstick.log.trim import Trimming
from nonstick.session.cancels import Cancels
from nonstick.session.inbox import Handlers, Inbox, opened_later
from nonstick.store import Batch, Cursor, Draft, Event
from nonstick.stores.memory import MemoryStore
from nonstick.waiting.tasks import Tasks
from tests.cluster.servers import eventually

pytestmark = pytest.mark.anyio

KEY = "a" * 40
HEEDED = (Kind.REPLY, Kind.PROGRESS, Kind.CHANGED, Kind.TERMINAL, Kind.TAKEN, Kind.PROBE)
SECRET = "what a client sent"


class Owner:
    """Holds the session, until an event of kind `owner` says that another does."""

    def __init__(self, told: list[tuple[str, int]]) -> None:
        self.told = told
        self.up_to = Cursor(0)
        self.losses = 0

    def hear(self, kind: Kind, event: Event) -> None:
        assert kind is kind_of(event.data)
        self.told.append(("owner", event.position))

    async def is_over(self, events: Sequence[Event]) -> bool:
        return any(kind_of(event.data) is Kind.OWNER for event in events)

    async def catch_up(self) -> Cursor:
        self.losses += 1
        return self.up_to


class Stage:
    """An inbox, what it is told of, and what it has told."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = GuardedStore(store)
        self.tasks = Tasks(lambda error: None)
        settings = Settings()
        self.log = SessionLog(
            Logs(self.store, Trimming(self.store, settings, self.tasks.spawn), Lookout(self.store), "node"), KEY
        )
        self.told: list[tuple[str, int]] = []
        self.ended = asyncio.Event()
        self.lost = 0
        cancels = Cancels({}, self.store, self.log, self.tasks.spawn)
        self.inbox = Inbox(self, HANDLERS, cancels, self.tasks.spawn)

    def inbox_start(self) -> Cursor:
        return self.log.head

    def prove_life(self) -> None:
        self.lost += 1

    def end_soon(self) -> None:
        self.ended.set()

    @property
    def follows(self) -> bool:
        return self.log.follower.subscriptions > 0

    async def comes(self, *kinds: Kind, first: int = 1) -> None:
        await self.inbox.deliver([event(position, kind) for position, kind in enumerate(kinds, first)])


def heed(stage: Stage, event: Event) -> None:
    stage.told.append(("here", event.position))


def make_nothing_of(_: Stage, event: Event) -> None:
    raise LookupError(SECRET)


HANDLERS: Final[Handlers[Stage]] = {**dict.fromkeys(HEEDED, heed), Kind.CANCEL: make_nothing_of}


class Losing(MemoryStore):
    """One that loses the latest entry of a log on demand, and gives its position out again."""

    async def lose_last(self, key: str) -> None:
        session = self._sessions[key]
        last = session.events.pop(session.head.position)
        before = session.events.get(last.position - 1)
        session.head = Cursor(0) if before is None else before.cursor
        await self.append(key, Batch([Draft(new_tag(), last.data)]))


@asynccontextmanager
async def opened_store() -> AsyncIterator[Stage]:
    """A stage whose session is in a store that works."""
    raw = Losing()
    stage = Stage(raw)
    async with stage.store, asyncio.timeout(60):
        await stage.store.create(KEY, {}, lifetime=600)
        try:
            yield stage
        finally:
            stage.inbox.stop()
            await stage.tasks.stop(10)


async def send(stage: Stage, kind: Kind) -> None:
    await stage.store.append(KEY, Batch([draft(kind)]))


async def lose_last(stage: Stage) -> None:
    raw = stage.store.store
    assert isinstance(raw, Losing)
    await raw.lose_last(KEY)


def event(position: int, kind: Kind) -> Event:
    made = draft(kind)
    return Event(position, made.tag, 0, made.data)


@pytest.fixture
def stage() -> Stage:
    return Stage(MemoryStore())


async def test_each_event_reaches_those_concerned(stage: Stage) -> None:
    """P4-P6: every kind there is, with a holder and without."""
    owner = Owner(stage.told)
    for holder in (None, owner):
        if holder is not None:
            stage.inbox.hold(holder, Cursor(0))
        for position, kind in enumerate(Kind, 1):
            if kind in (Kind.CANCEL, Kind.OWNER):
                continue  # the one has a handler that fails, the other ends the hold
            stage.told.clear()
            await stage.comes(kind, first=position)
            heeds = {"here"} if kind in HEEDED else {"owner"} if holder is not None else set()
            assert {who for who, _ in stage.told} == heeds, kind


async def test_unreadable_event_keeps_no_other_back(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """P4, P5, P12: neither what a handler makes nothing of, nor a kind of a later release."""

    unknown = Event(2, b"tag", 0, bytes([1, 255]))
    await stage.inbox.deliver([event(1, Kind.CANCEL), unknown, event(3, Kind.REPLY)])
    assert stage.told == [("here", 3)]
    assert "passed over event 1" in caplog.text
    assert SECRET not in caplog.text


async def test_holder_gets_only_later_events(stage: Stage) -> None:
    """P7: what was there before, it has looked at."""
    stage.inbox.hold(Owner(stage.told), Cursor(2))
    await stage.comes(Kind.OPENED, Kind.REPLY, Kind.OPENED)
    assert stage.told == [("here", 2), ("owner", 3)]


async def test_former_holder_gets_nothing(stage: Stage) -> None:
    """P7: neither of the events that say so nor later; what waits here for the client is told all the same."""
    owner = Owner(stage.told)
    stage.inbox.hold(owner, Cursor(0))
    await stage.comes(Kind.OPENED, Kind.REPLY, Kind.OWNER)
    await stage.comes(Kind.NOTICE, first=4)
    assert stage.told == [("here", 2)]
    stage.inbox.release(owner)  # may be said again
    assert not stage.follows


async def test_log_is_followed_while_anybody_waits() -> None:
    """P14: one subscription, however many wait, from where the first of them begins."""
    async with opened_store() as stage:
        with stage.inbox.opened():
            await eventually(lambda: stage.follows)
            stage.inbox.open()
            assert stage.log.follower.subscriptions == 1
            await send(stage, Kind.REPLY)
            await eventually(lambda: stage.told == [("here", 1)])
        await send(stage, Kind.REPLY)
        await eventually(lambda: stage.told == [("here", 1), ("here", 2)])
        stage.inbox.close()
        await eventually(lambda: not stage.follows)


async def test_inbox_stays_open_until_stopped() -> None:
    async with opened_store() as stage:
        stage.inbox.stay_open()
        stage.inbox.stay_open()
        with stage.inbox.opened():
            await eventually(lambda: stage.follows)
        await send(stage, Kind.REPLY)
        await eventually(lambda: stage.told == [("here", 1)])
        stage.inbox.stop()
        await eventually(lambda: not stage.follows)


async def test_inbox_opens_after_its_window() -> None:
    async with opened_store() as stage:
        with opened_later(lambda: stage.inbox, 3600.0):
            pass
        assert not stage.follows
        with opened_later(lambda: stage.inbox, 0.0):
            await eventually(lambda: stage.follows)
        await eventually(lambda: not stage.follows)


async def test_loss_retells_everything_except_to_holder() -> None:
    """P4, P7, P9: a reply may be seen twice; a relayed request is run once."""
    async with opened_store() as stage:
        owner = Owner(stage.told)
        stage.inbox.hold(owner, Cursor(0))
        for kind in (Kind.REPLY, Kind.OPENED, Kind.REPLY):
            await send(stage, kind)
        await eventually(lambda: len(stage.told) == 3)
        owner.up_to = (await stage.store.load(KEY)).head
        stage.told.clear()
        # What the follower reads on from is not in the log any more: another entry is in its place.
        await lose_last(stage)
        await eventually(lambda: owner.losses == stage.lost == 1)
        await eventually(lambda: [one for one in stage.told if one[1] <= 3] == [("here", 1), ("here", 3)])
        await send(stage, Kind.OPENED)
        await eventually(lambda: stage.told[-1] == ("owner", 4))
        assert [one for one in stage.told if one[0] == "owner"] == [("owner", 4)]


async def test_earlier_holder_is_told_from_there() -> None:
    """P7: though somebody else has followed the log for longer."""
    async with opened_store() as stage:
        await send(stage, Kind.OPENED)
        await send(stage, Kind.REPLY)
        stage.log.head = Cursor(0)
        with stage.inbox.opened():
            await eventually(lambda: stage.told == [("here", 2)])
            stage.inbox.hold(Owner(stage.told), Cursor(0))
            await eventually(lambda: ("owner", 1) in stage.told)


async def test_sessions_end_is_told_once() -> None:
    """P6."""
    async with opened_store() as stage:
        stage.inbox.open()
        await eventually(lambda: stage.follows)
        await stage.store.delete(KEY)
        await asyncio.wait_for(stage.ended.wait(), 60)
        await eventually(lambda: not stage.follows)
