"""Records what connections to standalone streams were given, what they asked for, and what they did: their tapes.

    TAPES=directory python -m pytest -p tests.unit.replay.tape tests/cluster/test_listener.py

Each line of a tape is one entry: the number of the connection, then

    init, facts, time               it came; what it knows of its session
    in, what, time                  it is told to do this: `prepare`, `feed`, `hear` …; or its feed is cancelled
    start, number, call, arguments  it asks for something that takes time
    end, number, result, time       and gets it
    env, what, value                what it sees around it is this from here on
    put | skip, what, mark          it puts a frame into its outlet, or passes over what is not the client's
    follow, place                   it follows the log from here
    hears, whether                  it is told of broadcasts from here on, or no more
    room, whether                   it looks whether there is room in the outlet
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from nonstick.core.broadcasts import LISTS, Broadcasts
from nonstick.http import get
from nonstick.session.outlet import Mark
from nonstick.session.standalone import StandaloneConnection
from nonstick.store import Cursor, Event
from tests.unit.replay.forms import broadcasts_form, cursor_form, digest, event_form, mark_form

_numbers = itertools.count()


class Tape:
    """Of one connection."""

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._calls = itertools.count()
        self._seen: dict[str, Any] = {}
        self.around: Callable[[], dict[str, Any]] = dict
        self.hearers: Any = None

    def write(self, *entry: Any) -> None:
        with Path(os.environ["TAPES"], f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps([self._number, *entry]) + "\n")

    def look(self) -> None:
        for what, value in self.around().items():
            if self._seen.get(what, self) != value:
                self._seen[what] = value
                self.write("env", what, value)

    def told(self, what: str) -> None:
        self.look()
        self.write("in", what, asyncio.get_running_loop().time())

    async def call(
        self, name: str, arguments: Any, real: Callable[[], Awaitable[Any]], form: Callable[[Any], Any]
    ) -> Any:
        number, clock = next(self._calls), asyncio.get_running_loop().time
        self.look()
        self.write("start", number, name, arguments)
        try:
            result = await real()
        except BaseException as error:
            self.look()
            self.write("end", number, {"error": type(error).__name__}, clock())
            raise
        self.look()
        self.write("end", number, {"value": form(result)}, clock())
        return result


class Recorded:
    """Something that a connection uses: as it is, but for what is written down."""

    def __init__(self, real: Any, tape: Tape) -> None:
        self.real, self.tape = real, tape

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class Store(Recorded):
    async def skim(self, key: str, after: Cursor, **more: Any) -> Any:
        def form(found: Any) -> Any:
            return [[event_form(entry.event), entry.size] for entry in found]

        return await self.tape.call(
            "skim", [cursor_form(after), more], lambda: self.real.skim(key, after, **more), form
        )

    async def load(self, key: str) -> Any:
        return await self.tape.call("load", [], lambda: self.real.load(key), lambda found: cursor_form(found.head))

    async def lapsed(self, nodes: list[str]) -> Any:
        return await self.tape.call("lapsed", nodes, lambda: self.real.lapsed(nodes), sorted)


class Hearers:
    def __init__(self, real: set[Any], tape: Tape) -> None:
        self.real, self.tape, self.made = real, tape, dict[int, Any]()

    def add(self, hearer: Any) -> None:
        self.tape.write("hears", True)
        self.made[id(hearer)] = heard = Hearer(hearer, self.tape)
        self.real.add(heard)

    def discard(self, hearer: Any) -> None:
        self.tape.write("hears", False)
        self.real.discard(self.made.pop(id(hearer), None))


class Hearer(Recorded):
    def hear(self) -> None:
        self.tape.told("hear")
        self.real.hear()

    def hear_anew(self) -> None:
        self.tape.told("hear_anew")
        self.real.hear_anew()


class ClusterLog(Recorded):
    @property
    def hearers(self) -> Hearers:
        self.tape.hearers = self.tape.hearers or Hearers(self.real.hearers, self.tape)
        found: Hearers = self.tape.hearers
        return found

    async def settle(self, place: Cursor) -> Any:
        return await self.tape.call("settle", cursor_form(place), lambda: self.real.settle(place), cursor_form)


class Services(Recorded):
    def __init__(self, real: Any, tape: Tape) -> None:
        super().__init__(real, tape)
        self.store = Store(real.store, tape)
        self.cluster_log = ClusterLog(real.cluster_log, tape)


class Log(Recorded):
    async def append(self, batch: Any) -> Any:
        data = [event.data.decode("latin-1") for event in batch.events]
        return await self.tape.call("append", data, lambda: self.real.append(batch), lambda found: found.first)


class Session(Recorded):
    def __init__(self, real: Any, tape: Tape) -> None:
        super().__init__(real, tape)
        self.services = Services(real.services, tape)
        self.log = Log(real.log, tape)

    def __enter__(self) -> Any:
        return self.real.__enter__()

    def __exit__(self, *failure: object) -> Any:
        return self.real.__exit__(*failure)


class Outlet(Recorded):
    @property
    def has_room(self) -> bool:
        found: bool = self.real.has_room
        self.tape.write("room", found)
        return found

    async def room(self) -> None:
        await self.tape.call("room", [], self.real.room, lambda _: None)

    async def flushed(self) -> None:
        await self.tape.call("flushed", [], self.real.flushed, lambda _: None)

    def put(self, frame: bytes, mark: Mark | None = None) -> None:
        if mark is not None:
            self.tape.write("put", digest(frame), mark_form(mark))
        self.real.put(frame, mark)

    def skip_to(self, mark: Mark) -> None:
        self.tape.write("skip", "", mark_form(mark))
        self.real.skip_to(mark)


class Following(Recorded):
    async def next(self, *silence: float) -> Any:
        def form(found: list[Event]) -> Any:
            return [event_form(event) for event in found]

        return await self.tape.call("next", [], lambda: self.real.next(*silence), form)


class RecordedConnection(StandaloneConnection):
    """A connection that has its tape written."""

    def __init__(self, session: Any, place: Any) -> None:
        self.tape = tape = Tape()
        super().__init__(Session(session, tape), place)  # type: ignore[arg-type]
        real, services = self.outlet, session.services
        broadcasts: Broadcasts = services.cluster_log.broadcasts
        self.outlet = self._delivery.outlet = Outlet(real, tape)  # type: ignore[assignment]
        handlers = [one for one in LISTS if session.runner.answers(one)]
        facts = {
            "place": None if place is None else place.seal(session.id),
            "session": session.id,
            "version": session.record.protocol_version,
            "node": services.node_id,
            "handlers": handlers,
            "patience": services.settings.send_timeout,
            "retry": services.settings.retry_interval,
            "subscriptions": sorted(session.record.subscriptions),
            "loaded_at": session.log.loaded_at,
            "heard": cursor_form(session.record.heard),
        }
        tape.write("init", facts, asyncio.get_running_loop().time())
        tape.around = lambda: {
            "sent": mark_form(real.sent),
            "ended": session.ended,
            "broadcasts": broadcasts_form(broadcasts),
        }

    def follow(self, after: Cursor) -> Any:
        self.tape.write("follow", cursor_form(after))
        return contextlib.closing(Following(super().follow(after).thing, self.tape))  # type: ignore[attr-defined]

    async def prepare(self) -> None:
        self.tape.told("prepare")
        await super().prepare()

    def prime(self) -> None:
        self.tape.told("prime")
        super().prime()

    async def feed(self) -> None:
        self.tape.told("feed")
        try:
            await super().feed()
        except asyncio.CancelledError:
            self.tape.told("cancelled")
            raise

    async def gone(self) -> None:
        self.tape.told("gone")
        await super().gone()
        self.tape.write("over")


if "TAPES" in os.environ:
    vars(get)["StandaloneConnection"] = RecordedConnection
