"""The lookout of a node: looks after all logs that are quiet there, many of them by one question to the store.

Wakes may be lost, so a log in which nothing seems to happen is looked at again and again: some tenths of a second after
it fell quiet, then less and less often, but never later than five seconds after the last look. A look asks which of
many places are not the end of their log any more. Its answer is a hint like a wake (P14): what it names is read, by the
one reader that the log has here, and that finds out what is true.

Looks are spread over *turns* of a tenth of a second, so that none is about many logs. A look that fails is repeated. If
the store answers otherwise, the question is at fault, and its logs are read one by one: none is hidden by another.
"""

from __future__ import annotations

import asyncio
import logging
import random
from itertools import islice
from typing import Final, Protocol

from nonstick.errors import StoreUnavailable, without_text
from nonstick.log.guard import GuardedStore
from nonstick.store import MAX_PLACES, Cursor
from nonstick.waiting import background

__all__ = ["LONGEST_WAIT", "Lookout", "Quiet"]

logger = logging.getLogger(__name__)

_TURN_SECONDS: Final = 0.1

_WAITS: Final = (10, 15, 22, 33, 50)
"""Turns within which a log is looked at, after so many looks since its last wake."""

_REPEAT: Final = 10
"""Turns within which a look that failed is repeated."""

LONGEST_WAIT: Final = _TURN_SECONDS * _WAITS[-1]
"""Seconds from one look at a log to the next, at most: for so long a lost wake may go unnoticed."""


class Quiet(Protocol):
    """A log in which nothing happens, as far as this node knows.

    Attributes:
        looks: How often it was looked at since its last wake. Counted by the lookout.
        turn: When it is looked at next, or is just being looked at; 0 while it is not expected. Kept by the lookout.
    """

    key: str
    cursor: Cursor
    looks: int
    turn: int

    def needs_look(self, now: float) -> bool:
        """Whether it is to be looked at now, in the loop's time. If not, it is expected again."""
        ...

    def read_soon(self) -> None:
        """It has to be read, and is not quiet any more."""
        ...


class Lookout:
    """Looks at the logs that it expects. Has a timer only while there are some, and a task only for a look."""

    def __init__(self, store: GuardedStore) -> None:
        self._store = store
        self._turns: dict[int, set[Quiet]] = {}
        """What each of the coming turns is about. Turns are numbered as time goes on, and none is empty."""
        self._shift = random.random()  # noqa: S311
        """By what part of a turn they are shifted: nodes on one machine do not take theirs at once."""
        self._expected = 0
        """How many logs are expected, or just being looked at."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_turn = 0
        self._looks: set[asyncio.Task[None]] = set()
        self._has_complained = False
        """Of what no store may raise, since a look that did not end so."""

    def expect(self, log: Quiet) -> None:
        """Looks at this log when it is time, or when it is time from now on if it is expected already."""
        wait = _WAITS[min(log.looks, len(_WAITS) - 1)]
        if log.turn and wait == _WAITS[-1] and log.turn + wait > self._now():
            # What has its place among the turns keeps it, and they stay as full as they are.
            self._put(log, log.turn + wait)
        else:
            self._put(log, self._emptiest(wait))

    def forget(self, log: Quiet) -> None:
        """Does not look at this log any more, whatever comes of a look that is under way."""
        if log.turn:
            self._withdraw(log)
            log.turn = 0
            self._expected -= 1
            if not self._expected:
                self._stop()

    def _put(self, log: Quiet, turn: int) -> None:
        if log.turn:
            self._withdraw(log)
        else:
            self._expected += 1
        log.turn = turn
        self._turns.setdefault(turn, set()).add(log)
        if self._timer is None or turn < self._timer_turn:
            self._set_timer()

    def _withdraw(self, log: Quiet) -> None:
        # Of a log that is just being looked at, the turn is over.
        if (logs := self._turns.get(log.turn)) is not None:
            logs.discard(log)
            if not logs:
                del self._turns[log.turn]

    def _emptiest(self, wait: int) -> int:
        """The turn with the fewest logs in the second half of this time, and of several the last."""
        now, turns = self._now(), self._turns
        return min(range(now + wait, now + wait // 2, -1), key=lambda turn: len(turns.get(turn, ())))

    # ---- turns

    def _now(self) -> int:
        """The last turn that has begun. The next n of them begin within n times as long as a turn is."""
        return int(asyncio.get_running_loop().time() / _TURN_SECONDS + self._shift)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._turns:
            self._timer_turn = min(self._turns)
            begins = (self._timer_turn - self._shift) * _TURN_SECONDS
            self._timer = background.later(begins - asyncio.get_running_loop().time(), self._take_turn)

    def _take_turn(self) -> None:
        """Begins to look at what is due. After a while in which the event loop stood still, that may be many turns."""
        self._timer = None
        time, now = asyncio.get_running_loop().time(), max(self._now(), self._timer_turn)
        due: list[Quiet] = []
        for turn in sorted(turn for turn in self._turns if turn <= now):
            for log in self._turns.pop(turn):
                if log.needs_look(time):
                    log.looks += 1
                    due.append(log)
                else:
                    self.expect(log)
        logs = iter(due)
        while some := list(islice(logs, MAX_PLACES)):
            look = background.spawn(self._look(some, now), name="look at quiet logs")
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)
        self._set_timer()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for look in self._looks:
            look.cancel()

    # ---- a look

    async def _look(self, logs: list[Quiet], turn: int) -> None:
        """Looks at these logs, which were due in this turn or before."""
        places = {log.key: log.cursor for log in logs}
        stale = await self._stale(places)
        for log in logs:
            if not 0 < log.turn <= turn:
                continue  # forgotten, or expected anew, since
            if stale is None:
                self._put(log, self._emptiest(_REPEAT))
            elif log.key in stale and log.cursor == places[log.key]:
                log.read_soon()
            else:
                # What a wake has brought since the question may be why the place is not the end any more.
                self.expect(log)

    async def _stale(self, places: dict[str, Cursor]) -> set[str] | None:
        """What of this has to be read; None if the store does not answer."""
        try:
            stale = await self._store.stale(places)
            self._has_complained = False
            return stale
        except StoreUnavailable as error:
            logger.debug("%d quiet logs could not be looked at: %s", len(places), error)
        except Exception as error:
            # Of a store, a defect, which there may be in each turn. Nobody else looks at these logs.
            if not self._has_complained:
                logger.error("%d quiet logs could not be looked at", len(places), exc_info=without_text(error))
            self._has_complained = True
        try:
            await self._store.ping()
        except Exception as error:
            logger.debug("nor does the store answer otherwise", exc_info=without_text(error))
            return None
        return set(places)
