"""Plays a tape to a connection: it is given what the recorded one was given, and is to do what that one did."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from types import SimpleNamespace
from typing import Any

from mcp_types import InitializeRequestParams

from nonstick import errors
from nonstick.core.event_ids import parse_event_id
from nonstick.core.record import opening_fields, subscription_field
from nonstick.session.outlet import Mark
from nonstick.session.standalone import StandaloneConnection
from nonstick.store import Appended, Cursor, Event, Skimmed
from tests.unit.replay.forms import (
    broadcasts_of,
    cursor_form,
    cursor_of,
    digest,
    event_of,
    mark_form,
    mark_of,
)

__all__ = ["Clock", "Player"]

Entry = list[Any]

_INTRODUCTION = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "of the tape", "version": "1"},
}

TURNS = 12
"""Of the loop, after which a connection has done all that it can."""


class Clock(asyncio.SelectorEventLoop):
    """A loop in which it is as late as the tape says."""

    now: float | None = None

    def time(self) -> float:
        return super().time() if self.now is None else self.now


class Player:
    """One connection that is played its tape.

    Attributes:
        did: What it put, passed over, followed and heard, as the tape would say it.
        asks: What it waits for, or has said.
    """

    def __init__(self, tape: list[Entry], clock: Clock) -> None:
        self.tape, self.clock = tape, clock
        self.did: list[Entry] = []
        self.asks: list[tuple[str, Any, asyncio.Future[Any]]] = []
        self.around: dict[str, Any] = {}
        self.tasks: list[asyncio.Task[Any]] = []
        self.hearer: Any = None
        self.names: dict[str, str] = {}
        """The names of its turns, and what they were called on the tape."""
        self.rooms = deque(entry[1] for entry in tape if entry[0] == "room")
        self.broadcasts: Any = None
        self.open: dict[int, asyncio.Future[Any]] = {}

    async def play(self) -> None:
        """Plays the whole tape.

        Raises:
            AssertionError: The connection does something else than the recorded one.
        """
        for number, (kind, *rest) in enumerate(self.tape):
            match kind:
                case "init":
                    self.clock.now = rest[1]
                    self._build(rest[0])
                case "in":
                    await self._quiet()
                    self.clock.now = rest[1]
                    self._tell(rest[0])
                case "env":
                    self._see(rest[0], rest[1])
                case "start":
                    await self._quiet()
                    self.open[rest[0]] = self._asked(number, rest[1], rest[2])
                case "end":
                    self.clock.now = rest[2]
                    self._answer(self.open.pop(rest[0]), rest[1])
                    await self._quiet()
                case _:
                    pass
        await self._quiet()
        self._check()

    def _check(self) -> None:
        done = [entry for entry in self.tape if entry[0] in ("put", "skip", "follow", "hears")]
        assert self.did[: len(done)] == done
        # A connection that is cancelled may be a step behind on the tape: what it followed, it did not come to.
        assert [entry for entry in self.did[len(done) :] if entry[0] in ("put", "skip")] == []
        said = [ask for ask in self.asks if ask[0] == "append" and not ask[2].done()]
        assert said == []

    async def stop(self) -> None:
        """Ends what is under way."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _quiet(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self.tasks.append(task)
        return task

    # ---- what it is given

    def _tell(self, what: str) -> None:
        match what:
            case "prepare" | "gone":
                self._spawn(getattr(self.connection, what)())
            case "feed":
                self.feeding = self._spawn(self.connection.feed())
            case "cancelled":
                self.feeding.cancel()
            case "prime":
                self.connection.prime()
            case _:
                getattr(self.hearer, what)()

    def _see(self, what: str, value: Any) -> None:
        self.around[what] = value
        if what == "broadcasts":
            self.broadcasts = broadcasts_of(value)

    def _answer(self, asked: asyncio.Future[Any], result: dict[str, Any]) -> None:
        if asked.done():
            return
        match result.get("error"):
            case None:
                asked.set_result(result["value"])
            case "CancelledError":
                pass
            case "Trimmed":
                asked.set_exception(errors.Trimmed(0))
            case name:
                asked.set_exception(getattr(errors, name)())

    # ---- what it asks for

    async def call(self, name: str, arguments: Any) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asks.append((name, arguments, future))
        return await future

    def _asked(self, number: int, name: str, arguments: Any) -> asyncio.Future[Any]:
        for index, (asked, with_these, future) in enumerate(self.asks):
            if asked == name and self._same(name, with_these, arguments):
                del self.asks[index]
                return future
        raise AssertionError(f"entry {number}: {name} {arguments} was not asked for; but {self.asks}")

    def _same(self, name: str, ours: Any, theirs: Any) -> bool:
        if name != "append":
            return json.dumps(ours) == json.dumps(theirs)
        for mine, recorded in zip(ours, theirs, strict=True):
            if mine[1] == recorded[1] == "l":
                self.names.setdefault(json.loads(mine[2:])["listener"], json.loads(recorded[2:])["listener"])
        return bool([self._as_recorded(text) for text in ours] == theirs)

    def _as_recorded(self, text: str) -> str:
        for ours, theirs in self.names.items():
            text = text.replace(ours, theirs)
        return text

    def _event(self, form: Any) -> Event:
        text = form[3]
        for ours, theirs in self.names.items():
            text = text.replace(theirs, ours)
        return event_of([*form[:3], text])

    # ---- the world around it

    def _build(self, facts: dict[str, Any]) -> None:
        settings = SimpleNamespace(
            send_timeout=facts["patience"],
            ping_interval=15.0,
            retry_interval=facts["retry"],
            connection_lifetime=3600.0,
        )
        services = SimpleNamespace(
            node_id=facts["node"],
            store=_Store(self),
            cluster_log=_ClusterLog(self),
            tasks=SimpleNamespace(spawn=self._spawn),
            drain=SimpleNamespace(begun=False, until_closing={}),
            settings=settings,
        )
        place = None if facts["place"] is None else parse_event_id(facts["place"], facts["session"])
        # No tape has a record that changed.
        introduction = InitializeRequestParams.model_validate(_INTRODUCTION)
        self.fields = opening_fields(facts["version"], introduction, b"")
        self.fields |= {subscription_field(uri): uri.encode() for uri in facts["subscriptions"]}
        self.connection = _Played(_Session(self, facts, services), place, self)

    @contextlib.contextmanager
    def followed(self, after: Cursor) -> Any:
        self.did.append(["follow", cursor_form(after)])
        yield _Following(self)


class _Played(StandaloneConnection):
    def __init__(self, session: Any, place: Any, player: Player) -> None:
        super().__init__(session, place)
        self.player = player
        self.outlet = self._delivery.outlet = _Outlet(player)  # type: ignore[assignment]

    def follow(self, after: Cursor) -> Any:
        return self.player.followed(after)


class _Part:
    def __init__(self, player: Player) -> None:
        self.player = player


class _Store(_Part):
    async def skim(self, _key: str, after: Cursor, **more: Any) -> list[Skimmed]:
        found = await self.player.call("skim", [cursor_form(after), more])
        return [Skimmed(self.player._event(form), size) for form, size in found]

    async def load(self, _key: str) -> Any:
        head = cursor_of(await self.player.call("load", []))
        return SimpleNamespace(head=head, fields=self.player.fields)

    async def lapsed(self, nodes: list[str]) -> set[str]:
        return set(await self.player.call("lapsed", nodes))


class _ClusterLog(_Part):
    @property
    def broadcasts(self) -> Any:
        return self.player.broadcasts

    @property
    def hearers(self) -> _ClusterLog:
        return self

    def add(self, hearer: Any) -> None:
        self.player.hearer = hearer
        self.player.did.append(["hears", True])

    def discard(self, _hearer: Any) -> None:
        self.player.did.append(["hears", False])

    async def settle(self, place: Cursor) -> Cursor:
        return cursor_of(await self.player.call("settle", cursor_form(place)))


class _Session(_Part):
    def __init__(self, player: Player, facts: dict[str, Any], services: Any) -> None:
        super().__init__(player)
        self.id = facts["session"]
        self.key = "key of the session"
        self.record = SimpleNamespace(
            protocol_version=facts["version"],
            subscriptions=frozenset(facts["subscriptions"]),
            heard=cursor_of(facts["heard"]),
        )
        self.loaded_at = facts["loaded_at"]
        self.log = self
        self.services = services
        self.runner = SimpleNamespace(answers=lambda name: name in facts["handlers"])
        self.spawn = player._spawn

    @property
    def ended(self) -> bool:
        return bool(self.player.around.get("ended"))

    async def append(self, batch: Any) -> Appended:
        data = [event.data.decode("latin-1") for event in batch.events]
        return Appended(await self.player.call("append", data), duplicate=False, size=0, count=0)


class _Outlet(_Part):
    gone = False

    @property
    def sent(self) -> Mark:
        return mark_of(self.player.around["sent"])

    @property
    def has_room(self) -> bool:
        found: bool = self.player.rooms.popleft()
        return found

    async def room(self) -> None:
        await self.player.call("room", [])

    async def flushed(self) -> None:
        await self.player.call("flushed", [])

    def put(self, frame: bytes, mark: Mark) -> None:
        frame = self.player._as_recorded(frame.decode("latin-1")).encode("latin-1")
        self.player.did.append(["put", digest(frame), mark_form(mark)])

    def skip_to(self, mark: Mark) -> None:
        self.player.did.append(["skip", "", mark_form(mark)])


class _Following(_Part):
    async def next(self, *_silence: float) -> list[Event]:
        return [self.player._event(form) for form in await self.player.call("next", [])]
