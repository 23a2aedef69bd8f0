"""How fast the machine is at this moment: for tests of promises about time, on a machine that is busy otherwise."""

from __future__ import annotations

import time

__all__ = ["crowding", "in_time"]

_SAMPLE_SECONDS = 0.2


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
