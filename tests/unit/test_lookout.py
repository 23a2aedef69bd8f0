"""The lookout of a node: each quiet log is looked at in time, whatever becomes of others, and at little cost (P10)."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping

import pytest

from nonstick.errors import StoreUnavailable
from nonstick.log.guard import GuardedStore
from nonstick.log.lookout import LONGEST_WAIT, Lookout
from nonstick.store import MAX_PLACES, Cursor
from nonstick.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

PLACE = Cursor(3, b"an entry")
TURN = 0.1
"""Seconds. What happens a little before its time comes a turn later, by the steps of the tests' clock."""


class Clock:
    """The loop's time, which stands still but in `advance`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def advance(self, seconds: float) -> None:
        """Lets so much time pass, in steps of half a turn, and all that is due in each of them happen."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + TURN / 2)
            for _ in range(12):
                await asyncio.sleep(0)


class Log:
    """A quiet log, and what the lookout does with it."""

    def __init__(self, key: str, lookout: Lookout) -> None:
        self.key = key
        self.cursor = PLACE
        self.looks = self.turn = 0
        self.is_told = False
        self.reads = 0
        self._lookout = lookout

    def needs_look(self, now: float) -> bool:
        return not self.is_told

    def read_soon(self) -> None:
        self.reads += 1
        self._lookout.forget(self)


class Told(MemoryStore):
    """Answers looks as told, and notes them."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.loop_clock = clock
        self.names: set[str] = set()
        self.fails: Callable[[Mapping[str, Cursor]], Exception | None] = lambda places: None
        self.holds: Callable[[Mapping[str, Cursor]], bool] = lambda places: False
        self.go_on = asyncio.Event()
        self.is_down = False
        self.calls: list[tuple[float, dict[str, Cursor]]] = []

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        self.calls.append((self.loop_clock.now, dict(places)))
        if self.holds(places):
            await self.go_on.wait()
        if self.is_down:
            raise StoreUnavailable("down")
        if (error := self.fails(places)) is not None:
            raise error
        return self.names & set(places)

    async def ping(self) -> None:
        if self.is_down:
            raise StoreUnavailable("down")

    def times(self) -> dict[str, list[float]]:
        """When each log was looked at."""
        times = defaultdict[str, list[float]](list)
        for at, places in self.calls:
            for key in places:
                times[key].append(at)
        return times


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)
    return clock


@pytest.fixture
async def store(clock: Clock) -> Told:
    return Told(clock)


@pytest.fixture
def patience() -> float:
    """Of the guard, in seconds: it repeats nothing, unless a test says otherwise."""
    return 0.0


PATIENT = pytest.mark.parametrize("patience", [1000.0])


@pytest.fixture
async def lookout(store: Told, patience: float) -> Lookout:
    return Lookout(GuardedStore(store, patience=patience))


Logs = Callable[[int], list[Log]]


@pytest.fixture
def quiet(lookout: Lookout) -> Iterator[Logs]:
    """Makes so many logs that fall quiet now."""
    made: list[Log] = []

    def quiet(count: int) -> list[Log]:
        logs = [Log(f"{len(made) + n}", lookout) for n in range(count)]
        made.extend(logs)
        for log in logs:
            lookout.expect(log)
        return logs

    yield quiet
    for log in made:
        lookout.forget(log)


# ---- when


@pytest.mark.parametrize("count", [1, 7, 300])
async def test_each_log_gets_timely_looks(clock: Clock, store: Told, quiet: Logs, count: int) -> None:
    """P3: within a second, then less often, and never later than five seconds after the last look."""
    began = clock.now
    logs = quiet(count)
    await clock.advance(40)
    times = store.times()
    assert times.keys() == {log.key for log in logs}
    for each in times.values():
        gaps = [after - before for before, after in zip([began, *each], [*each, clock.now], strict=False)]
        assert gaps[0] <= 1.0 + TURN
        assert max(gaps) <= LONGEST_WAIT + TURN
        # As rare as they may be: early ones, and then one in five seconds.
        assert len(each) <= 5 + 40 / LONGEST_WAIT


async def test_woken_log_is_looked_at_sooner(clock: Clock, store: Told, lookout: Lookout, quiet: Logs) -> None:
    [log] = quiet(1)
    await clock.advance(60)
    woken, log.looks = clock.now, 0
    lookout.expect(log)
    await clock.advance(1.0 + TURN)
    assert store.calls[-1][0] > woken


async def test_looks_at_ten_thousand_are_few(clock: Clock, store: Told, quiet: Logs) -> None:
    """P10: two questions in a tenth of a second, however the logs fell quiet, and none about many."""
    logs = quiet(10_000)
    await clock.advance(30)
    store.calls.clear()
    await clock.advance(LONGEST_WAIT)
    assert set(store.times()) == {log.key for log in logs}
    assert len(store.calls) <= 110
    assert max(len(places) for _, places in store.calls) <= MAX_PLACES
    turns = Counter[float]()
    for at, places in store.calls:
        turns[at] += len(places)
    assert sum(turns.values()) <= 10_000 * (1 + TURN)
    assert max(turns.values()) <= 2 * 10_000 * TURN / LONGEST_WAIT


async def test_looks_spread_again_after_standstill(clock: Clock, store: Told, quiet: Logs) -> None:
    """P10: an event loop that stood still has many turns to make up for."""
    quiet(1000)
    await clock.advance(30)
    clock.now += 60
    store.calls.clear()
    await clock.advance(TURN)
    assert len(store.times()) == 1000
    assert max(len(places) for _, places in store.calls) <= MAX_PLACES
    await clock.advance(2 * LONGEST_WAIT)
    turns = Counter[float]()
    for at, places in store.calls:
        if at > clock.now - LONGEST_WAIT:
            turns[at] += len(places)
    assert max(turns.values()) <= 100


async def test_told_log_needs_no_look(clock: Clock, store: Told, quiet: Logs) -> None:
    told, other = quiet(2)
    told.is_told = True
    await clock.advance(20)
    assert store.times().keys() == {other.key}
    told.is_told = False
    await clock.advance(1.0 + TURN)
    assert told.key in store.times()


# ---- what is found


async def test_only_named_logs_are_read(clock: Clock, store: Told, quiet: Logs) -> None:
    """P14: and by those who follow them; the lookout reads nothing and tells nobody."""
    logs = quiet(200)
    store.names = {log.key for log in logs[::7]}
    await clock.advance(1.0 + TURN)
    assert [log.reads for log in logs] == [int(n % 7 == 0) for n in range(200)]
    # What is read is not quiet, until its follower says so.
    store.calls.clear()
    await clock.advance(LONGEST_WAIT)
    assert store.times().keys() == {log.key for log in logs} - store.names


@PATIENT
async def test_place_left_meanwhile_is_not_read(clock: Clock, store: Told, quiet: Logs) -> None:
    """A wake brought what the answer is about: it says nothing of the place that is known now."""
    [log] = quiet(1)
    store.names, store.holds = {log.key}, lambda places: True
    await clock.advance(1.0 + TURN)
    log.cursor = Cursor(4, b"the next")
    store.go_on.set()
    await clock.advance(TURN)
    assert log.reads == 0
    await clock.advance(LONGEST_WAIT)
    assert log.reads == 1


@PATIENT
@pytest.mark.parametrize("since", ["forgotten", "expected anew"])
async def test_late_answers_count_for_nothing(
    clock: Clock, store: Told, lookout: Lookout, quiet: Logs, since: str
) -> None:
    log, _other = quiet(2)
    store.names, store.holds = {log.key}, lambda places: len(store.calls) == 1
    while not store.calls:
        await clock.advance(TURN / 2)
    lookout.forget(log)
    if since == "expected anew":
        lookout.expect(log)
    turn = log.turn
    store.go_on.set()
    await clock.advance(TURN / 2)
    assert (log.reads, log.turn) == (0, turn)


# ---- a store in trouble


async def test_failed_look_is_repeated_without_reads(clock: Clock, store: Told, quiet: Logs) -> None:
    """P9: for all logs, by as few questions as before; nobody reads a store that is down."""
    logs = quiet(300)
    await clock.advance(30)
    store.is_down = True
    await clock.advance(20)
    assert [log.reads for log in logs] == [0] * 300
    store.calls.clear()
    await clock.advance(1.0)
    assert len(store.calls) <= 10
    store.is_down = False
    store.names = {log.key for log in logs}
    await clock.advance(1.0 + 2 * TURN)
    assert [log.reads for log in logs] == [1] * 300


@pytest.mark.parametrize("error", [StoreUnavailable("for this one"), ValueError("a secret")])
async def test_one_bad_key_hides_no_other(
    clock: Clock, store: Told, quiet: Logs, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """P9, P13: where the store answers otherwise, what was asked about with it is read."""
    logs = quiet(500)
    store.fails = lambda places: error if "42" in places else None
    await clock.advance(1.0 + TURN)
    asked_together = [places for _, places in store.calls if "42" in places]
    assert {log.key for log in logs if log.reads} == set(asked_together[0])
    assert "secret" not in caplog.text
    assert ("could not be looked at" in caplog.text) == isinstance(error, ValueError)


@PATIENT
async def test_hanging_look_delays_no_other(clock: Clock, store: Told, quiet: Logs) -> None:
    logs = quiet(500)
    store.holds = lambda places: "42" in places
    store.names = {log.key for log in logs}
    await clock.advance(LONGEST_WAIT)
    asked_together = {key for _, places in store.calls if "42" in places for key in places}
    assert {log.key for log in logs if not log.reads} == asked_together
    store.go_on.set()
    await clock.advance(TURN)
    assert all(log.reads for log in logs)


# ---- nothing is left


@PATIENT
async def test_nothing_runs_without_quiet_logs(clock: Clock, store: Told, lookout: Lookout, quiet: Logs) -> None:
    """P10: neither a timer nor a look that is under way."""
    before = asyncio.all_tasks()
    logs = quiet(200)
    store.holds = lambda places: True
    await clock.advance(LONGEST_WAIT)
    assert asyncio.all_tasks() > before
    for log in logs:
        lookout.forget(log)
        lookout.forget(log)
    await clock.advance(TURN)
    assert asyncio.all_tasks() == before
    store.calls.clear()
    await clock.advance(2 * LONGEST_WAIT)
    assert store.calls == []
    [log] = quiet(1)
    await clock.advance(1.0 + TURN)
    assert store.calls[0][1] == {log.key: PLACE}
