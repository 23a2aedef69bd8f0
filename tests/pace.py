"""How fast the machine is at this moment: for tests of promises about time, on a machine that is busy otherwise."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["crowding", "in_time", "unhurried"]

_SAMPLE_SECONDS = 0.2
_TICK_SECONDS = 0.01
_MUCH = 0.25

Test = Callable[..., Awaitable[None]]

_now = time.monotonic


def crowding() -> float:
    """How many times longer work takes here than on a machine of its own."""
    began, used = time.monotonic(), time.thread_time()
    while time.thread_time() - used < _SAMPLE_SECONDS:
        pass
    return max(1.0, (time.monotonic() - began) / _SAMPLE_SECONDS)


def in_time(took: float, seconds: float) -> bool:
    """Whether this was less than `seconds`, or would have been on a machine of its own."""
    # Three times, because others come and go; and only where it matters, because it takes a while.
    return took < seconds or any(took < seconds * crowding() for _ in range(3))


def unhurried(name: str, *allowed: float) -> Callable[[Test], Test]:
    """For a test of what ends after some seconds, which has to do something within them: it gets them as `name`.

    If it fails while the machine took a good part of those seconds for others, it is tried again with the next of
    `allowed`. With the last ones it has to pass.
    """

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        async def patient(**fixtures: Any) -> None:
            *few, most = allowed
            for seconds in few:
                try:
                    async with _hindered(seconds * _MUCH):
                        await test(**fixtures, **{name: seconds})
                except _Hindered as hindered:
                    print(f"with {name}={seconds:g} the machine was too busy: {hindered.__cause__!r}")
                else:
                    return
            await test(**fixtures, **{name: most})

        parameters = inspect.signature(test).parameters.values()
        setattr(patient, "__signature__", inspect.Signature([one for one in parameters if one.name != name]))  # noqa: B010
        return patient

    return decorate


class _Hindered(Exception):
    """A test failed, maybe because others had the machine meanwhile."""


@asynccontextmanager
async def _hindered(much: float) -> AsyncIterator[None]:
    """Raises `_Hindered` for what fails if the event loop was late by so many seconds in all."""
    late = 0.0

    async def tick() -> None:
        nonlocal late
        while True:
            due = _now() + _TICK_SECONDS
            await asyncio.sleep(_TICK_SECONDS)
            late += _now() - due

    ticking = asyncio.create_task(tick())
    try:
        yield
    except Exception as error:
        await asyncio.sleep(_TICK_SECONDS)
        if late < much:
            raise
        raise _Hindered from error
    finally:
        ticking.cancel()
