"""What of a log may go is said by its outline, in time that grows with the log and no faster (P10)."""

from __future__ import annotations

import random

import pytest

from nonstick.core.events import Kind, draft
from nonstick.core.retention import Amount, Outline, Portion, Waste
from nonstick.store import STANDALONE, Event, Skimmed
from tests.unit.steps import steps

MEGABYTE = 1024 * 1024


class Log:
    """Entries in the order in which they are added."""

    def __init__(self) -> None:
        self.entries: list[Skimmed] = []

    def add(self, stream: int, kind: Kind = Kind.MESSAGE, size: int = 100) -> int:
        position = len(self.entries) + 1
        event = draft(kind)
        self.entries.append(Skimmed(Event(position, event.tag, stream or position, event.data), size))
        return position

    def tell(self, size: int = 100) -> int:
        """A message on the standalone stream."""
        position = len(self.entries) + 1
        event = draft(Kind.MESSAGE)
        self.entries.append(Skimmed(Event(position, event.tag, STANDALONE, event.data), size))
        return position

    def finished(self, events: int = 3, size: int = 100) -> int:
        name = self.add(0, Kind.OPENED, size)
        for _ in range(events - 2):
            self.add(name, size=size)
        self.add(name, Kind.TERMINAL, size)
        return name

    def outline(self) -> Outline:
        outline = Outline()
        for start in range(0, len(self.entries), 7):
            outline.add(self.entries[start : start + 7])
        return outline

    def waste(self, size: int = 1 << 60, events: int = 1 << 60) -> Waste:
        return self.outline().waste(Amount(size, events), 0.5)

    def without(self, waste: Waste) -> list[Skimmed]:
        """What a store leaves of it."""
        streams = {stream for portion in waste.portions for stream in portion.streams}
        before = max((portion.standalone_before for portion in waste.portions), default=0)
        return [
            entry
            for entry in self.entries
            if entry.event.stream not in streams
            and not (entry.event.stream == STANDALONE and entry.event.position < before)
        ]


def amount(entries: list[Skimmed]) -> Amount:
    return Amount(sum(size for _, size in entries), len(entries))


def streams_of(waste: Waste) -> list[int]:
    return [stream for portion in waste.portions for stream in portion.streams]


def test_oldest_finished_streams_go_first() -> None:
    """Down to half the bounds."""
    log = Log()
    names = [log.finished(4) for _ in range(10)]
    waste = log.waste(events=38)
    assert streams_of(waste) == names[:6]
    assert waste.amount == Amount(2400, 24)
    assert amount(log.without(waste)) == Amount(1600, 16)


def test_unfinished_streams_never_go() -> None:
    log = Log()
    name = log.add(0, Kind.OPENED)
    for _ in range(100):
        log.add(name)
    waste = log.waste(size=1000)
    assert waste == Waste()
    assert log.outline().unfinished() == {name: Amount(10_100, 101)}


def test_standalone_messages_outlast_finished_streams() -> None:
    """Those who were told nothing else have not read them: between half and full bounds they stay."""
    log = Log()
    for _ in range(25):
        log.tell()
    names = [log.finished(4) for _ in range(5)]
    waste = log.waste(events=40)
    assert streams_of(waste) == names
    assert waste.messages == 0
    assert all(portion.standalone_before == 0 for portion in waste.portions)
    assert len(log.without(waste)) == 25


def test_oldest_standalone_messages_go_last() -> None:
    """They go where the streams that have finished are not enough."""
    log = Log()
    for _ in range(50):
        log.tell()
    stream = log.finished(3)
    waste = log.waste(events=40)
    assert streams_of(waste) == [stream]
    left = log.without(waste)
    assert [entry.event.position for entry in left] == list(range(31, 51))
    assert waste.messages == 30


def test_only_messages_count_as_messages() -> None:
    log = Log()
    for _ in range(30):
        position = log.tell()
        event = draft(Kind.CANCEL)
        log.entries[-1] = Skimmed(Event(position, event.tag, STANDALONE, event.data), 10)
    waste = log.waste(events=10)
    assert waste.amount.events >= 20
    assert waste.messages == 0


def test_portions_span_little_of_log() -> None:
    """A store may look at all that lies between the ends of what it drops: no call is to hold it up."""
    log = Log()
    for _ in range(40):
        log.finished(4, MEGABYTE // 8)
    waste = log.waste(size=MEGABYTE)
    assert len(waste.portions) > 3
    for portion in waste.portions:
        first = min(portion.streams)
        last = max(entry.event.position for entry in log.entries if entry.event.stream in portion.streams)
        between = [entry for entry in log.entries if first <= entry.event.position <= last]
        assert amount(between).size <= 4 * MEGABYTE


def test_interleaved_streams_go_together() -> None:
    """One look at the log is enough for them, not one for each."""
    log = Log()
    names = [log.add(0, Kind.OPENED) for _ in range(30)]
    for _ in range(10):
        for name in names:
            log.add(name, size=MEGABYTE // 16)
    for name in names:
        log.add(name, Kind.TERMINAL)
    waste = log.waste(size=MEGABYTE)
    assert sorted(streams_of(waste)) == names
    assert len(waste.portions) == 1


def test_portions_have_few_streams_and_events() -> None:
    log = Log()
    for _ in range(300):
        log.finished(2, 1)
    for _ in range(5000):
        log.tell(1)
    waste = log.waste(events=100)
    assert max(len(portion.streams) for portion in waste.portions) <= 64
    before = [portion.standalone_before for portion in waste.portions if portion.standalone_before]
    dropped = [b - a for a, b in zip([601, *before], before, strict=False)]
    assert max(dropped) <= 1000
    assert amount(log.without(waste)).events <= 100


@pytest.mark.parametrize("seed", range(20))
def test_no_more_goes_than_must(seed: int) -> None:
    """Of any log: no more goes than has to, and the account is right."""
    print(f"seed {seed}")
    dice = random.Random(seed)
    log, running = Log(), list[int]()
    for _ in range(dice.randrange(200)):
        size = dice.choice([0, 1, 10, 1000])
        match dice.randrange(4):
            case 0:
                log.tell(size)
            case 1:
                running.append(log.add(0, Kind.OPENED, size))
            case 2 if running:
                log.add(dice.choice(running), size=size)
            case 3 if running:
                log.add(running.pop(dice.randrange(len(running))), Kind.TERMINAL, size)
            case _:
                pass
    bounds = Amount(dice.choice([100, 3000, 1 << 40]), dice.choice([5, 50, 1 << 40]))
    waste = log.outline().waste(bounds, 0.5)
    left = log.without(waste)
    assert amount(left) == amount(log.entries).minus(waste.amount)
    droppable = [e for e in left if e.event.stream == STANDALONE or e.event.stream not in running]
    assert not amount(left).exceeds(bounds) or not droppable
    if waste.portions:
        assert amount(log.entries).exceeds(bounds, 0.5)
    assert all(isinstance(portion, Portion) for portion in waste.portions)


@pytest.mark.parametrize("kind", ["many streams", "long streams", "interleaved", "standalone"])
def test_trimming_time_grows_linearly(kind: str) -> None:
    """P10: the event loop is not held up by a long log."""

    def log(events: int) -> Log:
        made = Log()
        match kind:
            case "many streams":
                for _ in range(events // 2):
                    made.finished(2)
            case "long streams":
                for _ in range(2):
                    made.finished(events // 2)
            case "interleaved":
                names = [made.add(0, Kind.OPENED) for _ in range(events // 4)]
                for end in (Kind.MESSAGE, Kind.MESSAGE, Kind.TERMINAL):
                    for name in names:
                        made.add(name, end)
            case _:
                for _ in range(events):
                    made.tell()
        return made

    few, many = log(200), log(2000)
    one = steps(lambda: few.waste(size=1, events=1))
    ten = steps(lambda: many.waste(size=1, events=1))
    assert ten < 14 * one
