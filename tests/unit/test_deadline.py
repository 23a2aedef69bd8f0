"""A deadline is `asyncio.timeout` to whoever waits: it ends only what is late, and hides nobody else's cancellation."""

from __future__ import annotations

import asyncio

import pytest

from nonstick.waiting.deadline import Deadline

pytestmark = pytest.mark.anyio


async def test_what_is_late_is_a_timeout() -> None:
    with pytest.raises(TimeoutError), Deadline(0.01):
        await asyncio.Event().wait()
    # The task is not left cancelled.
    await asyncio.sleep(0)


async def test_work_in_time_is_left_alone() -> None:
    async with asyncio.timeout(60):
        with Deadline(0.01):
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)


async def test_error_inside_a_deadline_is_unchanged() -> None:
    with pytest.raises(KeyError), Deadline(5):
        raise KeyError


async def test_cancellation_from_elsewhere_stays_one() -> None:
    """A node that stops must not take its own stop for a slow store."""
    begun = asyncio.Event()

    async def wait() -> None:
        with Deadline(5):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(wait())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_simultaneous_cancellation_stays_one() -> None:
    """Where the deadline and a cancellation come together."""
    begun = asyncio.Event()

    async def wait() -> None:
        with Deadline(0.0):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(wait())
    await begun.wait()
    # Both are requested before the task runs again.
    asyncio.get_running_loop().call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(("inner", "outer"), [(0.01, 5.0), (5.0, 0.01)])
async def test_only_the_passed_deadline_says_so(inner: float, outer: float) -> None:
    said = ""
    try:
        with Deadline(outer):
            try:
                with Deadline(inner):
                    await asyncio.Event().wait()
            except TimeoutError:
                said = "inner"
    except TimeoutError:
        said = "outer"
    assert said == ("inner" if inner < outer else "outer")


async def test_hastened_deadline_passes_at_once() -> None:
    """Also one that has no time of its own; one that passed by itself was not hastened."""
    for seconds in (None, 60.0):
        deadline = Deadline(seconds)
        with pytest.raises(TimeoutError), deadline:
            asyncio.get_running_loop().call_soon(deadline.hasten)
            await asyncio.Event().wait()
        assert deadline.was_hastened
    passed = Deadline(0.0)
    with pytest.raises(TimeoutError), passed:
        await asyncio.Event().wait()
    passed.hasten()
    assert not passed.was_hastened


async def test_cancellation_beats_a_hastened_deadline() -> None:
    """A cancellation that comes with a hastened deadline stays a cancellation."""
    deadline = Deadline(None)

    async def wait() -> None:
        with deadline:
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    deadline.hasten()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
