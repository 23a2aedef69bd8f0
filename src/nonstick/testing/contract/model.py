"""Random programs, run on a store through two nodes and on a plain list: every answer must be the same.

The model below is the specification once more, in the shortest form that we know: no clock, no concurrency, no bytes
on a wire. Where two refusals apply at once the specification leaves open which one is given, and so does the model.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import anyio.from_thread
import anyio.to_thread
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nonstick.errors import (
    AlreadyExists,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StoreError,
    StreamClosed,
    Trimmed,
)
from nonstick.store import (
    MAX_CLIP,
    MAX_READ_BYTES,
    NEW_STREAM,
    STANDALONE,
    Appended,
    Batch,
    Cursor,
    Draft,
    Event,
    Loaded,
    Skimmed,
    Store,
)
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.tools import read_all, skim_all

__all__ = ["ModelStore", "Program", "Refused", "StoreModelContract", "check_programs", "programs", "run_program"]

EXAMPLES: Final = 60
"""Programs in one run."""

SESSIONS: Final = 2
WRITERS: Final = ("", "u", "v", "w")
QUESTIONS: Final = ("q1", "q2")
REQUESTS: Final = ("r1", "r2")
NAMES: Final = ("x", "y")


# ---- the model


class Refused(Exception):
    """The model refuses, with any one of these errors."""

    def __init__(self, *errors: type[StoreError], oldest: int | None = None) -> None:
        super().__init__(*errors)
        self.errors = errors
        self.oldest = oldest


@dataclass
class ModelStream:
    """A stream: where it stands."""

    attempt: int
    closed: bool = False


class Written(NamedTuple):
    """A writer's last append."""

    batch: Batch
    first: int


@dataclass
class ModelSession:
    """A session: its record and its log, with all that was ever written to it."""

    fields: dict[str, bytes]
    written: list[Event] = field(default_factory=list[Event])
    dropped: set[int] = field(default_factory=set[int])
    streams: dict[int, ModelStream] = field(default_factory=dict[int, ModelStream])
    writers: dict[str, Written] = field(default_factory=dict[str, Written])
    pending: set[str] = field(default_factory=set[str])
    cancels: set[str] = field(default_factory=set[str])

    @property
    def log(self) -> list[Event]:
        return [event for event in self.written if event.position not in self.dropped]

    @property
    def end(self) -> int:
        return len(self.written)

    def appended(self, first: int, *, duplicate: bool) -> Appended:
        return Appended(first, duplicate, sum(len(event.data) for event in self.log), len(self.log))

    def change(self, changes: dict[str, bytes | None]) -> None:
        for name, value in changes.items():
            if value is None:
                self.fields.pop(name, None)
            else:
                self.fields[name] = value


class ModelStore:
    """The specification on lists, for one node and no clock."""

    def __init__(self) -> None:
        self.sessions: dict[str, ModelSession] = {}

    def session(self, key: str) -> ModelSession:
        if key not in self.sessions:
            raise Refused(SessionNotFound)
        return self.sessions[key]

    def create(self, key: str, fields: dict[str, bytes]) -> None:
        if key in self.sessions:
            raise Refused(AlreadyExists)
        self.sessions[key] = ModelSession(dict(fields))

    def load(self, key: str) -> Loaded:
        session = self.session(key)
        head = session.written[-1].cursor if session.written else Cursor(0)
        size = sum(len(event.data) for event in session.log)
        return Loaded(dict(session.fields), head, frozenset(session.cancels), size, len(session.log))

    def update(self, key: str, changes: dict[str, bytes | None], expect: dict[str, bytes | None]) -> bool:
        session = self.session(key)
        if any(session.fields.get(name) != value for name, value in expect.items()):
            return False
        session.change(changes)
        return True

    def delete(self, key: str) -> bool:
        return self.sessions.pop(key, None) is not None

    def append(self, key: str, batch: Batch) -> Appended:
        session = self.session(key)
        before = session.writers.get(batch.writer)
        if before is not None and before.batch.sequence == batch.sequence:
            return session.appended(before.first, duplicate=True)
        if errors := _refusals(session, batch):
            raise Refused(*errors)
        first = session.end + 1 if batch.events else session.end
        stream = first if batch.stream == NEW_STREAM else batch.stream
        session.written += [Event(first + n, tag, stream, data) for n, (tag, data) in enumerate(batch.events)]
        _move_stream(session, stream, batch)
        session.pending |= set(batch.expect)
        session.pending -= {batch.settle}
        session.cancels |= {batch.cancel} if batch.cancel else set()
        session.cancels -= {batch.uncancel}
        session.change(dict(batch.fields))
        if batch.writer:
            session.writers[batch.writer] = Written(batch, first)
        return session.appended(first, duplicate=False)

    def read(self, key: str, after: Cursor) -> list[Event]:
        session = self.session(key)
        log = session.log
        if after.position > session.end:
            raise Refused(Diverged)
        if after.tag and after.position in session.dropped:
            raise Refused(Trimmed, oldest=log[0].position if log else 0)
        if after.tag and session.written[after.position - 1].tag != after.tag:
            raise Refused(Diverged)
        return [event for event in log if event.position > after.position]

    def skim(self, key: str, after: Cursor, clip: int) -> list[Skimmed]:
        return [Skimmed(event._replace(data=event.data[:clip]), len(event.data)) for event in self.read(key, after)]

    def trim(self, key: str, streams: list[int], standalone_before: int) -> None:
        session = self.sessions.get(key)
        for event in session.log if session else []:
            assert session is not None
            stream = session.streams.get(event.stream)
            old = event.stream == STANDALONE and event.position < standalone_before
            if old or (event.stream in streams and stream is not None and stream.closed):
                session.dropped.add(event.position)


def _refusals(session: ModelSession, batch: Batch) -> list[type[StoreError]]:
    errors: list[type[StoreError]] = []
    if batch.stream not in (STANDALONE, NEW_STREAM):
        stream = session.streams.get(batch.stream)
        if stream is None or stream.closed:
            errors.append(StreamClosed)
        if stream is not None and stream.attempt != batch.attempt:
            errors.append(Fenced)
    if any(name is not None and name not in session.pending for name in (batch.answers, batch.settle)):
        errors.append(NotPending)
    return errors


def _move_stream(session: ModelSession, stream: int, batch: Batch) -> None:
    if stream == STANDALONE:
        return
    if batch.stream == NEW_STREAM:
        session.streams[stream] = ModelStream(batch.attempt)
    session.streams[stream].attempt += batch.take_over
    session.streams[stream].closed |= batch.terminal


# ---- programs


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
        true = session.written[position - 1].tag if 0 < position <= session.end else b""
        tag = {"true": true, "none": b"", "other": b"no event" if position else b""}[self.tag]
        cursor = Cursor(position, tag)

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
    """Runs the program on both nodes and on the model, then compares all that is left, and that it can be ended, as
    either node sees it.
    """
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


_bytes = st.binary(max_size=6)
# Not `integers`, which prefers the ends and whatever numbers it finds in the code.
_places = st.sampled_from(range(41))
_value: st.SearchStrategy[bytes | None] = st.sampled_from([b"1", b"", None, b"\0\xff"])
_questions = st.sampled_from(QUESTIONS)
_requests = st.sampled_from(REQUESTS)
_extras: Final[dict[str, st.SearchStrategy[Any]]] = {
    "expect": st.lists(_questions, min_size=1, max_size=2, unique=True),
    "answers": _questions,
    "settle": _questions,
    "cancel": _requests,
    "uncancel": _requests,
    "fields": st.dictionaries(st.sampled_from(NAMES), _value, min_size=1),
}
_values: st.SearchStrategy[dict[str, bytes | None]] = st.dictionaries(st.sampled_from(NAMES), _value)


def _weighted(table: dict[str, tuple[int, st.SearchStrategy[Any]]]) -> st.SearchStrategy[Any]:
    """One of these, each as often as its weight says."""
    names = [name for name, (weight, _) in table.items() for _ in range(weight)]
    return st.sampled_from(names).flatmap(lambda name: table[name][1])


_extra = _weighted(
    {"none": (6, st.builds(dict[str, Any]))}
    | {name: (2, st.fixed_dictionaries({name: value})) for name, value in _extras.items()}
    | {
        f"{name}, fields": (1, st.fixed_dictionaries({n: _extras[n] for n in (name, "fields")}))
        for name in ("settle", "answers")
    }
)
_append_action = st.builds(
    Append,
    data=st.lists(_bytes, max_size=3),
    writer=st.sampled_from(WRITERS),
    stream=st.sampled_from([None, NEW_STREAM, NEW_STREAM, 0, 1, 2, 3]),
    attempt=st.sampled_from([0, 0, 0, 0, 0, 1, -1]),
    take_over=st.sampled_from([False, False, False, True]),
    terminal=st.sampled_from([False, False, True]),
    extra=_extra,
)
_actions: st.SearchStrategy[Action] = _weighted(
    {
        "append": (24, _append_action),
        "repeat": (6, st.builds(Repeat, st.sampled_from(WRITERS[1:]))),
        "read": (
            8,
            st.builds(
                Read,
                _places,
                st.sampled_from(["true", "true", "none", "other"]),
                st.sampled_from([1, 2, 1000]),
                st.sampled_from([1, 7, MAX_READ_BYTES]),
                st.sampled_from([None, None, 0, 3, MAX_CLIP]),
            ),
        ),
        "trim": (6, st.builds(Trim, st.lists(st.integers(0, 3), max_size=4), st.none() | _places)),
        "update": (4, st.builds(Update, _values, _values, st.sampled_from([None, 600.0]))),
        "create": (4, st.builds(Create, st.dictionaries(st.sampled_from(NAMES), _bytes))),
        "load": (3, st.just(Load())),
        "touch": (1, st.just(Touch())),
        "delete": (2, st.builds(Delete, st.booleans())),
    }
)


def programs() -> st.SearchStrategy[Program]:
    """Programs of 10 to 40 calls; most are on one session."""
    steps = st.builds(Step, st.integers(0, 1), st.sampled_from([0, 0, 0, 0, 0, 1]), _actions)
    return st.lists(steps, min_size=10, max_size=40)


async def check_programs(a: Store, b: Store, name: str, *, examples: int = EXAMPLES, shrink: bool = True) -> None:
    """Generates programs and runs them on these two nodes, each on new sessions whose keys begin with `name`.

    Much the same programs every time. A failure carries the program that fails, in the error's notes; with `shrink` the
    smallest that does.
    """
    runs = iter(range(1 << 32))

    async def run(program: Program) -> None:
        number = next(runs)
        await run_program(program, a, b, tuple(f"{name}-{number}-{n}" for n in range(SESSIONS)))

    # Hypothesis calls its tests synchronously: it runs in a thread, and each program comes back to this event loop.
    @settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs())
    def generated(program: Program) -> None:
        anyio.from_thread.run(run, program)

    await anyio.to_thread.run_sync(generated)


class StoreModelContract(ContractFixtures):
    """A store answers what a plain list would."""

    async def test_random_programs_answer_as_the_model_does(self, a: Store, b: Store, key: str) -> None:
        """Every method, in any order, from two nodes: the answers of a list, errors included (P1, P3, P4, P7)."""
        await check_programs(a, b, key)
