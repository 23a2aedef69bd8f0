"""Ends of calls, all by one timer: each is a deadline to whoever waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from nonstick.waiting import background
from nonstick.waiting.ends import End, Ends
from tests.pace import in_time

pytestmark = pytest.mark.anyio

FOR_EVER = 600.0


async def waiting(ends: Ends, seconds: float, *, begun: asyncio.Event | None = None, at: float | None = None) -> str:
    """Waits for ever, until the end: tells whether it came."""
    end = End(ends, seconds, at=at)
    try:
        if begun is not None:
            begun.set()
        await asyncio.Event().wait()
    except BaseException as error:
        if end.passed(error):
            return "passed"
        raise
    return "never"


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.TimerHandle]:
    """The timers that were set."""
    found: list[asyncio.TimerHandle] = []
    later = background.later

    def kept(seconds: float, call: Callable[[], object]) -> asyncio.TimerHandle:
        found.append(later(seconds, call))
        return found[-1]

    monkeypatch.setattr(background, "later", kept)
    return found


async def test_earliest_of_many_ends_first() -> None:
    ends = Ends()
    async with asyncio.timeout(60):
        long, short = (asyncio.create_task(waiting(ends, seconds)) for seconds in (FOR_EVER, 0.01))
        assert await short == "passed"
        assert list(ends.under_way) != []
        assert not long.done()
        ends.hasten()
        assert await long == "passed"
    assert not ends.under_way


async def test_each_end_comes_in_time() -> None:
    """Also those that are set while others are waited for, and pass later."""
    ends, loop = Ends(), asyncio.get_running_loop()
    started = loop.time()
    async with asyncio.timeout(60):
        told = await asyncio.gather(*(waiting(ends, seconds) for seconds in (0.2, 0.01, 0.1, 0.15, 0.05)))
    assert told == ["passed"] * 5
    assert loop.time() - started >= 0.19
    assert in_time(loop.time() - started, 2)


async def test_many_calls_have_one_timer(timers: list[asyncio.TimerHandle]) -> None:
    """It is set anew only where an end is to come before it."""
    ends = Ends()
    for seconds in (3, 2, 4, 5):
        for _ in range(10):
            End(ends, seconds).leave()
    assert len(timers) == 2
    assert [timer.cancelled() for timer in timers] == [True, False]
    ends.close()
    assert all(timer.cancelled() for timer in timers)


async def test_done_in_time_is_left_alone() -> None:
    ends = Ends()
    async with asyncio.timeout(60):
        End(ends, 0.01).leave()
        # That end would have come before this one.
        assert await waiting(ends, 0.1) == "passed"
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_no_end_is_after_the_latest() -> None:
    ends = Ends()
    ends.latest = asyncio.get_running_loop().time()
    async with asyncio.timeout(60):
        assert await waiting(ends, FOR_EVER) == "passed"


async def test_next_try_has_the_same_end() -> None:
    ends = Ends()
    first = End(ends, FOR_EVER)
    first.leave()
    second = first.again()
    assert second.at == first.at
    assert first.has_time(FOR_EVER / 2)
    assert not first.has_time(FOR_EVER * 2)
    second.leave()
    ends.close()


async def test_other_cancellation_stays_one() -> None:
    ends, begun = Ends(), asyncio.Event()
    task = asyncio.create_task(waiting(ends, FOR_EVER, begun=begun))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not ends.under_way


async def test_simultaneous_cancellation_stays_one() -> None:
    ends, begun = Ends(), asyncio.Event()
    task = asyncio.create_task(waiting(ends, FOR_EVER, begun=begun))
    await begun.wait()
    # Both are requested before the task runs again.
    ends.hasten()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_error_at_the_end_stays_one() -> None:
    """What was raised before the end came is no timeout, and the task is not left cancelled."""
    ends = Ends()
    end = End(ends, FOR_EVER)
    end.come()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)
    assert not end.passed(KeyError())
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_swallowed_end_cancels_nothing_else() -> None:
    """A store may finish its call though it was told to end: whoever called it is cancelled no more."""
    ends = Ends()
    begun = asyncio.Event()

    async def stubborn() -> int:
        end = End(ends, FOR_EVER)
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        end.leave()
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    async with asyncio.timeout(60):
        calling = asyncio.create_task(stubborn())
        await begun.wait()
        ends.hasten()
        assert await calling == 0
    assert not ends.under_way
