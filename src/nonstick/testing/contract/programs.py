"""Programs of calls, run on a store through two nodes and on the model: every answer must be the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from nonstick.errors import Trimmed
from nonstick.store import MAX_READ_BYTES, NEW_STREAM, STANDALONE, Batch, Cursor, Draft, Event, Loaded, Skimmed, Store
from nonstick.testing.contract.model import ModelSession, ModelStore, Refused
from nonstick.testing.contract.staleness import assert_stale
from nonstick.testing.contract.tools import read_all, skim_all

__all__ = [
    "Action",
    "Append",
    "Create",
    "Delete",
    "Load",
    "Look",
    "Program",
    "Read",
    "Repeat",
    "Step",
    "Touch",
    "Trim",
    "Update",
    "run_program",
]


class World(NamedTuple):
    """What a step acts on: two nodes of the store, the model, the sessions' keys, and tags that never repeat."""

    nodes: tuple[Store, Store]
    model: ModelStore
    keys: tuple[str, ...]
    tags: Callable[[], bytes]


class Step(NamedTuple):
    """One call: by which node, on which session; `do` resolves it against the model's state and compares."""

    node: int
    session: int
    do: Action


class Action:
    """A call in the abstract."""

    async def run(self, world: World, store: Store, key: str) -> None:
        raise NotImplementedError


Program = list[Step]


@dataclass(frozen=True)
class Create(Action):
    fields: dict[str, bytes]

    async def run(self, world: World, store: Store, key: str) -> None:
        await same(lambda: world.model.create(key, self.fields), lambda: store.create(key, self.fields, lifetime=600.0))


@dataclass(frozen=True)
class Load(Action):
    async def run(self, world: World, store: Store, key: str) -> None:
        async def load() -> Loaded:
            loaded = await store.load(key)
            session = world.model.sessions.get(key, ModelSession({}))
            # The tag of an entry that was dropped may be given or not.
            dropped = session.end in session.dropped and not loaded.head.tag
            return loaded._replace(head=session.written[-1].cursor) if dropped else loaded

        await same(lambda: world.model.load(key), load)


@dataclass(frozen=True)
class Update(Action):
    changes: dict[str, bytes | None]
    expect: dict[str, bytes | None]
    lifetime: float | None = None

    async def run(self, world: World, store: Store, key: str) -> None:
        await same(
            lambda: world.model.update(key, self.changes, self.expect),
            lambda: store.update(key, self.changes, expect=self.expect, lifetime=self.lifetime),
        )


@dataclass(frozen=True)
class Touch(Action):
    async def run(self, world: World, store: Store, key: str) -> None:
        await store.touch([key, f"{key}-never"])


@dataclass(frozen=True)
class Delete(Action):
    """`anew`: the session is made again at once, under the same key."""

    anew: bool

    async def run(self, world: World, store: Store, key: str) -> None:
        await same(lambda: world.model.delete(key), lambda: store.delete(key))
        if self.anew:
            await Create({}).run(world, store, key)


@dataclass(frozen=True)
class Append(Action):
    """`stream`: None for the standalone stream, -1 for a new one, else which of those that were opened."""

    data: list[bytes]
    writer: str
    stream: int | None
    attempt: int
    take_over: bool
    terminal: bool
    extra: dict[str, Any]

    async def run(self, world: World, store: Store, key: str) -> None:
        await _append(world, store, key, self.batch(world, key))

    def batch(self, world: World, key: str) -> Batch:
        session = world.model.sessions.get(key, ModelSession({}))
        before = session.writers.get(self.writer)
        stream, attempt = _stream(session, self.stream, self.attempt)
        named = stream not in (STANDALONE, NEW_STREAM)
        bare = not self.data and stream != NEW_STREAM and self.extra.keys() & {"settle", "uncancel", "fields"}
        return Batch(
            [Draft(world.tags(), data) for data in ([] if bare else self.data or [b"?"])],
            writer=self.writer,
            sequence=(before.batch.sequence + 1 if before else 1) if self.writer else 0,
            stream=stream,
            attempt=attempt,
            take_over=self.take_over and named and not bare,
            terminal=self.terminal and stream != STANDALONE and not bare,
            **self.extra,
        )


@dataclass(frozen=True)
class Repeat(Action):
    """The last append of that writer once more."""

    writer: str

    async def run(self, world: World, store: Store, key: str) -> None:
        session = world.model.sessions.get(key)
        if session is not None and self.writer in session.writers:
            await _append(world, store, key, session.writers[self.writer].batch)


@dataclass(frozen=True)
class Read(Action):
    """`place`: which of the events ever written; `tag`: theirs, none or another. With `clip` they are skimmed."""

    place: int
    tag: str
    limit: int
    max_bytes: int = MAX_READ_BYTES
    clip: int | None = None

    async def run(self, world: World, store: Store, key: str) -> None:
        session = world.model.sessions.get(key, ModelSession({}))
        position = self.place % (session.end + 2)
        cursor = Cursor(position, _tag(session, position, self.tag))

        async def read() -> list[Event]:
            part = await store.read(key, cursor, limit=self.limit, max_bytes=self.max_bytes)
            assert len(part) <= self.limit
            assert len(part) <= 1 or sum(len(event.data) for event in part) <= self.max_bytes
            return part + await read_all(store, key, part[-1].cursor) if part else part

        async def skim() -> list[Skimmed]:
            clip = self.clip or 0
            part = await store.skim(key, cursor, limit=self.limit, clip=clip)
            assert len(part) <= self.limit
            return part + await skim_all(store, key, part[-1].event.cursor, clip=clip) if part else part

        if self.clip is None:
            await same(lambda: world.model.read(key, cursor), read)
        else:
            await same(lambda: world.model.skim(key, cursor, self.clip or 0), skim)


@dataclass(frozen=True)
class Look(Action):
    """Which logs are stale: `place` and `tag` as of `Read`, in all sessions, counted from the end of each."""

    place: int
    tag: str

    async def run(self, world: World, store: Store, key: str) -> None:
        places: dict[str, Cursor] = {}
        in_doubt: set[str] = set()
        for name in world.keys:
            session = world.model.sessions.get(name, ModelSession({}))
            position = max(0, session.end - self.place % (session.end + 2)) if self.place else session.end
            places[name] = Cursor(position, _tag(session, position, self.tag))
            if session.end in session.dropped:
                in_doubt.add(name)
        await assert_stale(store, places, world.model.stale(places), in_doubt=in_doubt)


@dataclass(frozen=True)
class Trim(Action):
    """`streams`: which of those that were opened; `before`: None for all."""

    streams: list[int]
    before: int | None

    async def run(self, world: World, store: Store, key: str) -> None:
        session = world.model.sessions.get(key, ModelSession({}))
        streams = sorted({_stream(session, which, 0)[0] for which in self.streams})
        before = session.end + 1 if self.before is None else 1 + self.before % (session.end + 1)
        world.model.trim(key, streams, before)
        await store.trim(key, streams=streams, standalone_before=before)


def _tag(session: ModelSession, position: int, which: str) -> bytes:
    """The tag of the event there, none, or another one."""
    true = session.written[position - 1].tag if 0 < position <= session.end else b""
    return {"true": true, "none": b"", "other": b"no event" if position else b""}[which]


def _stream(session: ModelSession, which: int | None, attempt: int) -> tuple[int, int]:
    """The stream meant, and the attempt: that of the stream and `attempt` more."""
    if which == 0 and not session.streams:
        which = NEW_STREAM
    if which is None or which == NEW_STREAM:
        return (STANDALONE if which is None else NEW_STREAM), 1 + abs(attempt)
    names = sorted(session.streams) or [1]
    name = names[which % len(names)]
    known = session.streams.get(name)
    return name, (known.attempt if known else 1) + attempt


async def _append(world: World, store: Store, key: str, batch: Batch) -> None:
    await same(lambda: world.model.append(key, batch), lambda: store.append(key, batch))


async def same(model: Callable[[], object], real: Callable[[], Awaitable[object]]) -> None:
    """Both give the same answer, or the store refuses with an error that the model allows."""
    try:
        expected = model()
    except Refused as refused:
        try:
            answer = await real()
        except refused.errors as error:
            if isinstance(error, Trimmed):
                assert error.oldest == refused.oldest
            return
        raise AssertionError(f"answered {answer!r}, not one of {refused.errors}") from None
    assert await real() == expected


async def run_program(program: Program, a: Store, b: Store, keys: tuple[str, ...]) -> None:
    """Runs the program on both nodes and on the model; compares what is left on each node, and ends the sessions."""
    count = iter(range(1, 1 << 32))
    world = World((a, b), ModelStore(), keys, lambda: next(count).to_bytes(8, "big"))
    for key in keys:
        await Create({"x": b"1"}).run(world, a, key)
    for step in program:
        await step.do.run(world, world.nodes[step.node], keys[step.session])
    for key in keys:
        for store in world.nodes:
            await Load().run(world, store, key)
            await Read(0, "none", 1000).run(world, store, key)
        await Delete(anew=False).run(world, a, key)
        for store in world.nodes:
            await Load().run(world, store, key)
            await Update({}, {}).run(world, store, key)
