"""Broadcasts go to a client in between its messages: after its turn began, each once, and none is missed (P11)."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from mcp.shared.subscriptions import PromptsListChanged, ServerEvent, ToolsListChanged

from nonstick.core.broadcasts import LISTS, NOWHERE, Broadcast, Broadcasts
from nonstick.core.carrier import Carrier
from nonstick.core.event_ids import EventId
from nonstick.core.events import Kind, draft
from nonstick.session.delivery import Delivery, _name_of
from nonstick.session.outlet import Mark, Outlet
from nonstick.store import STANDALONE, Cursor, Event

pytestmark = pytest.mark.anyio

SESSION = "a-session"
MINE = 10
"""Where its turn began."""


class Frames(Outlet):
    """What was put."""

    def __init__(self) -> None:
        super().__init__()
        self.methods: list[str] = []

    def put(self, frame: bytes, mark: Mark | None = None) -> None:
        data = next(line for line in frame.decode().splitlines() if line.startswith("data:"))
        self.methods.append(json.loads(data.removeprefix("data:"))["method"].split("/")[1])
        super().put(frame, mark)


def event(position: int, tag: bytes = b"12345678") -> Event:
    return Event(position, tag, STANDALONE, draft(Kind.PROGRESS).data)


def delivery(place: EventId | None = None) -> tuple[Delivery, Frames, Broadcasts]:
    broadcasts, frames = Broadcasts(100), Frames()
    session: Any = SimpleNamespace(
        id=SESSION,
        record=SimpleNamespace(subscriptions=frozenset(), heard=Cursor(0)),
        log=SimpleNamespace(loaded_at=0),
        runner=SimpleNamespace(answers=LISTS.__contains__),
        services=SimpleNamespace(cluster_log=SimpleNamespace(broadcasts=broadcasts)),
    )
    carrier = Carrier("n", named=place is not None)
    carrier.position = MINE
    return Delivery(session, frames, carrier, place), frames, broadcasts


def say(broadcasts: Broadcasts, *what: ServerEvent) -> None:
    for one in what:
        broadcasts.take(event(broadcasts.head.position + 1), one)


def told(name: str) -> EventId:
    """The place of a client that was being told of everything, and was told this last."""
    return EventId(STANDALONE, Cursor(5, b"12345678"), heard=Cursor(0), told=name)


async def test_broadcasts_wait_for_its_turn() -> None:
    """P3: what stands before its `listening` may have been carried by another connection, with the broadcasts."""
    it, frames, broadcasts = delivery()
    it.begin(Cursor(0), Cursor(0))
    say(broadcasts, ToolsListChanged())
    for position, put in ((MINE - 1, []), (MINE, ["tools"]), (MINE + 1, ["tools"])):
        it.live(event(position))
        it.hear()
        assert frames.methods == put


async def test_who_is_told_has_heard_nothing() -> None:
    """P11: should it go before it was told the rest, the next connection begins anew."""
    it, frames, _ = delivery(told("anything"))
    assert it.heard_it_all_to() is None
    it.begin(Cursor(0), Cursor(0))
    assert frames.sent.heard == it.broadcasts_delivered_to == NOWHERE
    it, *_ = delivery()
    it.begin(Cursor(4), Cursor(4))
    assert it.broadcasts_delivered_to == Cursor(4)


@pytest.mark.parametrize("lost", [False, True], ids=["still there", "lost"])
async def test_the_rest_is_told_once(lost: bool) -> None:
    """P11: what it was told already counts of that place in the cluster log alone; of another it is told all."""
    first, frames, broadcasts = delivery()
    first.begin(NOWHERE, NOWHERE)
    first.live(event(MINE))
    first.hear()
    everything = frames.methods
    assert len(everything) == len(LISTS)
    name = _name_of(Broadcast.of(next(iter(LISTS.values())), broadcasts.head).body)
    it, frames, broadcasts = delivery(told(name))
    say(broadcasts, PromptsListChanged())
    there = NOWHERE if lost else Cursor(0)
    it.begin(Cursor(0), there)
    it.live(event(MINE))
    it.hear()
    assert frames.methods == (everything if lost else [*everything[1:], "prompts"])
