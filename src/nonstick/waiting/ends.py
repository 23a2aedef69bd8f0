"""Deadlines of calls, all by one timer: where many calls are under way, and nearly all of them end long before."""

from __future__ import annotations

import asyncio
import math
from typing import Any, Final

from nonstick.waiting import background

__all__ = ["End", "Ends"]

_APART: Final = 0.05
"""Seconds, at least, between two looks for deadlines that have passed: thousands may pass one after the other."""
_RESOLUTION: Final = 0.002
"""Seconds by which a timer may come early."""


class Ends:
    """What is under way, and when each of it is to end. Kept to within a twentieth of a second.

    Attributes:
        latest: No end that is set from now on is later, in the loop's time.
        under_way: Ends that have been set, and not left.
        look_at: When somebody looks next for ends that have come.
    """

    __slots__ = ("_timer", "latest", "look_at", "under_way")

    def __init__(self) -> None:
        self.latest = math.inf
        self.under_way: dict[End, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.look_at = math.inf

    def hasten(self) -> None:
        """What is under way ends now. Called from a task in which nothing of it is."""
        for end in self.under_way:
            end.come()

    def close(self) -> None:
        """Nothing is under way any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self.look_at = None, math.inf

    def look(self, now: float, *, at: float) -> None:
        """Sees to it that somebody looks at that time, and not before."""
        self.close()
        self.look_at = at
        self._timer = background.later(at - now, self._end_late)

    def _end_late(self) -> None:
        self._timer, self.look_at = None, math.inf
        now, nearest = asyncio.get_running_loop().time(), math.inf
        for end in self.under_way:
            if end.at - now <= _RESOLUTION:
                end.come()
            elif end.at < nearest:
                nearest = end.at
        if nearest < math.inf:
            self.look(now, at=max(nearest, now + _APART))


class End:
    """When what the current task does next is to end: then it is cancelled, as by a deadline.

    Until `leave`, or `passed`, is called. A cancellation that is not the end's stays one, also when both come together.

    Args:
        seconds: From now.
        at: In the loop's time, in place of `seconds`.
    """

    __slots__ = ("_before", "_come", "_ends", "_task", "at")

    def __init__(self, ends: Ends, seconds: float, *, at: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        task: asyncio.Task[Any] | None = asyncio.current_task(loop)
        assert task is not None
        now = loop.time()
        if at is None:
            at = now + seconds
            if at > ends.latest:
                at = ends.latest
        self.at = at
        self._ends = ends
        self._task = task
        self._before = task.cancelling()
        self._come = False
        ends.under_way[self] = None
        if at < ends.look_at:
            ends.look(now, at=at)

    def come(self) -> None:
        """The end has come."""
        if not self._come:
            self._come = True
            self._task.cancel()

    def leave(self) -> None:
        """It was done. Should its end have come all the same, nothing else is cancelled for that."""
        del self._ends.under_way[self]
        if self._come:
            self._task.uncancel()

    def passed(self, error: BaseException) -> bool:
        """It failed so. Whether that is because the end has come."""
        self.leave()
        return self._come and self._task.cancelling() <= self._before and isinstance(error, asyncio.CancelledError)

    def has_time(self, seconds: float) -> bool:
        """Whether it could go on after so many seconds."""
        return asyncio.get_running_loop().time() + seconds < self.at

    def again(self) -> End:
        """It is tried again, until the same time."""
        return End(self._ends, 0.0, at=self.at)
