"""Every call to a store ends in time, and one that failed is repeated until then (P9)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from nonstick.errors import (
    AlreadyExists,
    ConfigurationError,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StoreError,
    StoreUnavailable,
    StoreUnusable,
    StreamClosed,
    TooManySessions,
    Trimmed,
    Undecryptable,
)
from nonstick.log.follow import Slice
from nonstick.log.guard import GuardedStore
from nonstick.store import (
    MAX_CLIP,
    MAX_READ_BYTES,
    NEW_STREAM,
    Batch,
    Cursor,
    Draft,
    Event,
    Loaded,
    Skimmed,
    Store,
    Wake,
)
from nonstick.stores.memory import MemoryStore
from tests.cluster.commanded import CALLS, every_error, make
from tests.pace import in_time

pytestmark = pytest.mark.anyio

KEY = "k" * 40


class Unsteady(MemoryStore):
    """A store that does first what the script says: fails, before or after it has done its work, or hangs."""

    def __init__(self, *script: str) -> None:
        super().__init__()
        self.script = list(script)
        self.calls = 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in _CALLS:
            return found

        async def call(*args: Any, **more: Any) -> Any:
            self.calls += 1
            step = self.script.pop(0) if self.script else "work"
            if step == "fail":
                raise StoreUnavailable("down")
            if step == "hang":
                await asyncio.Event().wait()
            result = await found(*args, **more)
            if step == "lose":
                raise StoreUnavailable("the answer is lost")
            return result

        return call


_CALLS = ("create", "load", "update", "touch", "delete", "append", "read", "trim", "lapsed", "ping")


def calls(store: GuardedStore) -> list[Any]:
    return [
        lambda: store.create(KEY, {}, lifetime=9),
        lambda: store.load(KEY),
        lambda: store.update(KEY, {}),
        lambda: store.touch([KEY]),
        lambda: store.append(KEY, Batch([])),
        lambda: store.read(KEY, Cursor(0)),
        lambda: store.trim(KEY),
        lambda: store.lapsed(["n"]),
        lambda: store.ping(),
        lambda: store.delete(KEY),
    ]


async def test_failed_call_is_repeated_unchanged() -> None:
    unsteady = Unsteady()
    for call in calls(GuardedStore(unsteady)):
        unsteady.script, unsteady.calls = ["fail", "fail"], 0
        await call()
        assert unsteady.calls == 3


@pytest.mark.parametrize("step", ["fail", "hang"])
async def test_failing_call_ends_in_time(step: str) -> None:
    unsteady = Unsteady(*[step] * 10_000)
    loop = asyncio.get_running_loop()
    for call in calls(GuardedStore(unsteady, patience=0.05)):
        started = loop.time()
        with pytest.raises(StoreUnavailable):
            await call()
        assert in_time(loop.time() - started, 1)
    # With growing pauses in between, not in a busy loop.
    assert unsteady.calls < 100


async def test_caller_may_grant_more_time() -> None:
    unsteady = Unsteady()
    guarded = GuardedStore(unsteady, patience=0.01)
    await guarded.create(KEY, {}, lifetime=9)
    patient: list[Any] = [
        lambda: guarded.load(KEY, patience=5),
        lambda: guarded.update(KEY, {}, patience=5),
        lambda: guarded.append(KEY, Batch([]), patience=5),
    ]
    for call in patient:
        unsteady.script = ["fail"] * 4  # takes at least 0.02 + 0.04 + 0.08 + 0.16 seconds, halved
        await call()
    unsteady.script = ["fail"] * 4
    with pytest.raises(StoreUnavailable):
        await guarded.load(KEY)


async def test_answered_refusal_is_not_repeated() -> None:
    unsteady = Unsteady()
    guarded = GuardedStore(unsteady)
    for call in (lambda: guarded.load(KEY), lambda: guarded.update(KEY, {}), lambda: guarded.append(KEY, Batch([]))):
        unsteady.calls = 0
        with pytest.raises(SessionNotFound):
            await call()
        assert unsteady.calls == 1


async def test_doubtful_create_has_succeeded() -> None:
    """Its repeat finds the session that it made itself."""
    unsteady = Unsteady("lose")
    guarded = GuardedStore(unsteady)
    await guarded.create(KEY, {"a": b"1"}, lifetime=9)
    assert (await guarded.load(KEY)).fields == {"a": b"1"}


async def test_create_of_existing_key_is_refused() -> None:
    guarded = GuardedStore(Unsteady())
    await guarded.create(KEY, {}, lifetime=9)
    with pytest.raises(AlreadyExists):
        await guarded.create(KEY, {}, lifetime=9)


async def test_doubtful_delete_has_succeeded() -> None:
    guarded = GuardedStore(Unsteady())
    await guarded.create(KEY, {}, lifetime=9)
    guarded = GuardedStore(_after(guarded.store, "lose"))
    await guarded.delete(KEY)
    with pytest.raises(SessionNotFound):
        await guarded.load(KEY)


def _after(store: Store, *script: str) -> Store:
    assert isinstance(store, Unsteady)
    store.script = list(script)
    return store


async def test_cancelled_call_is_cancelled_at_once() -> None:
    guarded = GuardedStore(Unsteady("hang"), patience=60)
    calling = asyncio.create_task(guarded.load(KEY))
    await asyncio.sleep(0)
    calling.cancel()
    async with asyncio.timeout(60):
        with pytest.raises(asyncio.CancelledError):
            await calling


async def test_callers_timeout_is_not_the_stores() -> None:
    guarded = GuardedStore(Unsteady("hang"), patience=60)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await guarded.load(KEY)


# ---- when it is no use to wait


async def test_no_call_outlasts_its_node() -> None:
    """P8: whatever patience it was granted."""
    guarded = GuardedStore(Unsteady(*["hang"] * 10), patience=600)
    loop = asyncio.get_running_loop()
    guarded.end_at(loop.time() + 0.05)
    started = loop.time()
    for call in calls(guarded):
        with pytest.raises(StoreUnavailable):
            await call()
    assert in_time(loop.time() - started, 5)


async def test_hanging_store_lets_its_node_go(caplog: pytest.LogCaptureFixture) -> None:
    """P8: once the node's end is near."""

    class Hanging(MemoryStore):
        async def __aexit__(self, *error: Any) -> None:
            await asyncio.Event().wait()

    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60), GuardedStore(Hanging()) as guarded:
        guarded.end_at(loop.time())
    assert "could not be closed in time" in caplog.text


async def test_only_pending_calls_may_be_ended() -> None:
    """`end_pending`: neither what has ended, nor what comes after it."""
    unsteady = Unsteady("work", "work", "hang")
    guarded = GuardedStore(unsteady, patience=600)
    await guarded.create(KEY, {}, lifetime=9)
    await guarded.load(KEY)
    guarded.end_pending()
    await asyncio.sleep(0)
    hanging = asyncio.create_task(guarded.load(KEY))
    await asyncio.sleep(0)
    assert unsteady.calls == 3
    async with asyncio.timeout(60):
        guarded.end_pending()
        with pytest.raises(StoreUnavailable):
            await hanging
        await guarded.load(KEY)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StoreUnusable("make its directory"), StoreUnusable),
        (Undecryptable("make its directory"), Undecryptable),
        (ConfigurationError("make its directory"), StoreUnusable),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_lasting_faults_are_said_at_once(error: Exception, said: type[StoreError]) -> None:
    """P9: somebody has to change something first, and reads what."""
    asked: list[str] = []

    class Misfit(MemoryStore):
        async def load(self, key: str, *, renew: bool = True) -> Loaded:
            asked.append(key)
            raise error

    with pytest.raises(StoreUnavailable, match="make its directory") as caught:
        await GuardedStore(Misfit(), patience=600).load(KEY)
    assert caught.type is said
    assert asked == [KEY]


async def test_pauses_grow_up_to_half_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: a store that was away for long is asked again soon after it is back."""
    pauses: list[float] = []

    async def pass_at_once(seconds: float) -> None:
        pauses.append(seconds)

    unsteady = Unsteady(*["fail"] * 20)
    guarded = GuardedStore(unsteady, patience=600)
    with monkeypatch.context() as patched:
        patched.setattr("nonstick.log.guard.asyncio.sleep", pass_at_once)
        await guarded.ping()
    assert len(pauses) == 20
    assert 0.01 <= pauses[0] <= 0.02
    assert all(0.25 <= pause <= 0.5 for pause in pauses[5:])


# ---- errors that a method may not raise

MAY: dict[str, set[type[StoreError]]] = {
    "create": {AlreadyExists, TooManySessions},
    "load": {SessionNotFound},
    "update": {SessionNotFound},
    "append": {SessionNotFound, StreamClosed, Fenced, NotPending, Diverged},
    "read": {SessionNotFound, Trimmed, Diverged},
    "skim": {SessionNotFound, Trimmed, Diverged},
}
"""What the protocol lets each method answer with, beside that the store cannot be reached."""

ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "create": ((KEY, {}), {"lifetime": 9, "limits": {"all": 1}}),
    "append": ((KEY, Batch([Draft(b"8 bytes.", b"")], writer="w", sequence=2, stream=1, settle="s")), {}),
    "read": ((KEY, Cursor(1, b"8 bytes.")), {}),
    "skim": ((KEY, Cursor(1, b"8 bytes.")), {}),
    "update": ((KEY, {}), {}),
    "touch": (([KEY],), {}),
    "lapsed": ((["n"],), {}),
    "ping": ((), {}),
}


class Raising(MemoryStore):
    """A store all of whose methods raise this error."""

    error: StoreError

    def __getattribute__(self, name: str) -> Any:
        if name not in CALLS:
            return super().__getattribute__(name)

        async def call(*_args: Any, **_more: Any) -> Any:
            raise self.error

        return call


@pytest.mark.parametrize("error", list(every_error().values()), ids=lambda error: error.__name__)
async def test_unforeseen_error_means_unreachable_store(
    error: type[StoreError], caplog: pytest.LogCaptureFixture
) -> None:
    """P9: nobody else has to know what to do about it; a method that is new is covered."""
    raising = Raising()
    raising.error = make(error)
    store = GuardedStore(raising, patience=0.05)
    for method in CALLS:
        args, more = ARGUMENTS.get(method, ((KEY,), {}))
        if method == "watch":
            continue
        caplog.clear()
        with pytest.raises(StoreError) as caught:
            await getattr(store, method)(*args, **more)
        if error in MAY.get(method, ()) or issubclass(error, StoreUnavailable):
            assert caught.type is error
        else:
            assert caught.type is StoreUnavailable
            assert [record.levelname for record in caplog.records] == ["ERROR"]
            assert "on command" not in caplog.text


@pytest.mark.parametrize(
    ("batch", "may"),
    [
        (Batch([]), {SessionNotFound}),
        (Batch([], stream=NEW_STREAM, writer="w", sequence=1), {SessionNotFound}),
        (Batch([], stream=1), {SessionNotFound, StreamClosed, Fenced}),
        (Batch([], stream=1, writer="w", sequence=1), {SessionNotFound, StreamClosed, Fenced}),
        (Batch([], stream=1, writer="w", sequence=2), {SessionNotFound, StreamClosed, Fenced, Diverged}),
        (Batch([], answers="s"), {SessionNotFound, NotPending}),
        (Batch([], settle="s"), {SessionNotFound, NotPending}),
    ],
)
async def test_append_raises_only_its_batchs_refusals(batch: Batch, may: set[type[StoreError]]) -> None:
    """P9: so that a writer on the standalone stream is never told that its stream has ended."""
    raising = Raising()
    store = GuardedStore(raising, patience=0.05)
    for error in every_error().values():
        raising.error = make(error)
        with pytest.raises(StoreError) as caught:
            await store.append(KEY, batch)
        assert caught.type is (error if error in may or issubclass(error, StoreUnavailable) else StoreUnavailable)
        # What a store says may name its host, or what it keeps.
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.type is error


async def test_plain_calls_have_fewer_answers() -> None:
    """P9: `Trimmed` is for a cursor that is checked, `TooManySessions` for who asked for limits."""
    raising = Raising()
    store = GuardedStore(raising, patience=0.05)
    raising.error = Trimmed(1)
    with pytest.raises(StoreUnavailable):
        await store.read(KEY, Cursor(1))
    raising.error = TooManySessions("all")
    with pytest.raises(StoreUnavailable):
        await store.create(KEY, {}, lifetime=9)


def test_failed_watch_is_no_watch(caplog: pytest.LogCaptureFixture) -> None:
    """P9: who follows the log looks for itself as well."""

    class Watchless(MemoryStore):
        def watch(self, key: str, wake: Wake) -> Callable[[], None]:
            raise StoreUnavailable("down")

    stop = GuardedStore(Watchless()).watch(KEY, lambda _: None)
    stop()
    assert "the store has a defect" in caplog.text


class Overtaxed(MemoryStore):
    """Answers in time only what is small enough."""

    def __init__(self, most_events: int, most_bytes: int) -> None:
        super().__init__()
        self.most = most_events, most_bytes
        self.asked: list[tuple[int, int]] = []

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        self.asked.append((limit, max_bytes))
        if limit > self.most[0] or max_bytes > self.most[1]:
            raise StoreUnavailable("no answer in time")
        return await super().read(key, after, limit=limit, max_bytes=max_bytes)

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        self.asked.append((limit, 0))
        if limit > self.most[0]:
            raise StoreUnavailable("no answer in time")
        return await super().skim(key, after, limit=limit, clip=clip)


async def test_failed_read_asks_for_less() -> None:
    """P9, P10: what was too much for the store once is not asked of it again."""
    async with GuardedStore(Overtaxed(20, 70_000)) as guarded:
        store = guarded.store
        assert isinstance(store, Overtaxed)
        await guarded.create(KEY, {}, lifetime=60)
        await guarded.append(KEY, Batch([Draft(bytes(8), b"x")]))
        assert len(await guarded.read(KEY, Cursor(0), limit=256, max_bytes=1 << 20)) == 1
        assert store.asked == [(256, 1 << 20), (64, 1 << 18), (16, 1 << 16)]
        del store.asked[:]
        assert len(await guarded.skim(KEY, Cursor(0), limit=256)) == 1
        assert store.asked == [(256, 0), (64, 0), (16, 0)]


async def test_failing_read_asks_for_one_event() -> None:
    """P10: less than that is no question."""
    store = Overtaxed(0, 0)
    guarded = GuardedStore(store, patience=0.2)
    await guarded.create(KEY, {}, lifetime=60)
    with pytest.raises(StoreUnavailable):
        await guarded.read(KEY, Cursor(0), limit=2, max_bytes=5)
    assert store.asked[:3] == [(2, 5), (1, 1), (1, 1)]


async def test_reading_goes_on_after_a_trim() -> None:
    """P10: not from the beginning: what is left before the place was read."""
    guarded = GuardedStore(MemoryStore())
    await guarded.create(KEY, {}, lifetime=60)
    await guarded.append(KEY, Batch([Draft(b"1 bytes.", b"kept")], stream=NEW_STREAM))
    await guarded.append(KEY, Batch([Draft(b"2 bytes.", b"trimmed"), Draft(b"3 bytes.", b"new")]))
    await guarded.trim(KEY, standalone_before=3)
    with pytest.raises(Trimmed):
        await guarded.read(KEY, Cursor(2, b"2 bytes."))
    assert [event.position for event in await guarded.read_on(KEY, Cursor(2, b"2 bytes."))] == [3]
    assert [event.position for event in await Slice().read(guarded, KEY, Cursor(2, b"2 bytes."))] == [3]
    assert [entry.event.position for entry in await Slice().skim(guarded, KEY, Cursor(2, b"2 bytes."))] == [3]


async def test_slice_stays_small_while_reads_fail() -> None:
    """P9, P10: also between the calls of one reader, whose patience ran out in between."""
    async with GuardedStore(Overtaxed(0, 0), patience=0.001) as guarded:
        store = guarded.store
        assert isinstance(store, Overtaxed)
        await guarded.create(KEY, {}, lifetime=60)
        part = Slice(256, 1 << 20)
        for _ in range(6):
            with pytest.raises(StoreUnavailable):
                await part.read(guarded, KEY, Cursor(0))
        assert store.asked == [(256, 1 << 20), (64, 1 << 18), (16, 1 << 16), (4, 1 << 14), (1, 1 << 12), (1, 1 << 10)]
        store.most = (256, 1 << 20)
        del store.asked[:]
        for _ in range(6):
            await part.read(guarded, KEY, Cursor(0))
        assert store.asked[0] == (1, 1 << 8)
        assert store.asked[-1] == (256, 1 << 18)
