"""The end of a node's work: it takes no more, lets what runs finish, and ends what does not in time (P8)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

from nonstick.core.refusals import SHUT_DOWN
from nonstick.core.settings import Settings
from nonstick.log.guard import GuardedStore
from nonstick.session.live import LiveSession
from nonstick.session.running import Running
from nonstick.session.services import Reading
from nonstick.waiting.deadline import Deadline
from nonstick.waiting.tasks import Tasks

__all__ = ["GONE_AFTER", "STOP_SECONDS", "Drain", "Guest", "seconds_left_here"]

logger = logging.getLogger(__name__)

GONE_AFTER: Final = 1.5
"""Seconds after the grace period within which all that is the node's has ended (P8)."""

STOP_SECONDS: Final = 0.4
"""How many seconds a drain waits for a cancelled handler to stop, and then again for the store to take the end of the
handler's request."""


_gone_by = 0.0
"""When, by the monotonic clock, what the last drain in this process ends has to have ended."""


def seconds_left_here() -> float:
    """Until what the last drain in this process ends has to have ended; 0 if there was none."""
    return max(_gone_by - time.monotonic(), 0.0)


class Guest(Protocol):
    """Work on this node that belongs to none of its sessions."""

    def __len__(self) -> int:
        """How many requests run."""
        ...

    def end_listening(self) -> None:
        """The drain begins: streams without an end are to end."""
        ...

    def end_all(self) -> None:
        """The grace period is over: requests that still run are to end."""
        ...


class Drain:
    """One node's drain, before it begins, too.

    Args:
        sessions: Those of the node.
        readers: Its connections that read streams.

    Attributes:
        begun: Other nodes are to take what comes.
        until_closing: What waits for somebody else, and ends when the grace period does: requests that arrive,
            responses that are taken slowly, GETs that are being prepared.
    """

    def __init__(
        self,
        store: GuardedStore,
        settings: Settings,
        tasks: Tasks,
        sessions: Mapping[str, LiveSession],
        readers: Collection[Reading],
        guests: Sequence[Guest] = (),
    ) -> None:
        self.begun = False
        self.until_closing: dict[Deadline, None] = {}
        self._store = store
        self._grace = settings.grace
        self._grace_ends = 0.0
        """In the loop's time."""
        self._tasks = tasks
        self._sessions = sessions
        self._readers = readers
        self._guests = guests
        self._left = asyncio.Event()

    def begin(self) -> None:
        """Stops taking work. Once."""
        self.begun = True
        self._grace_ends = asyncio.get_running_loop().time() + self._grace
        global _gone_by
        _gone_by = time.monotonic() + self._grace + GONE_AFTER
        self._store.end_at(self._grace_ends + GONE_AFTER)
        for reader in list(self._readers):
            reader.hand_over()
        for guest in self._guests:
            guest.end_listening()
        self._tasks.spawn(self._end_in_time())

    @property
    def is_closing(self) -> bool:
        """The grace period is over: what began now would be ended at once."""
        return self.begun and asyncio.get_running_loop().time() >= self._grace_ends

    def seconds_left(self, reserve: float = 0.0) -> float:
        """Until all that is the node's must have ended, less what is kept for later."""
        return max(self._grace_ends + GONE_AFTER - reserve - asyncio.get_running_loop().time(), 0.0)

    async def finished(self) -> None:
        """Returns when everything here has finished, or been ended at the end of the grace period."""
        patience = self._grace_ends + 2 * STOP_SECONDS - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(patience, 0.0)):
                while self._running() or self._staying() or any(len(guest) for guest in self._guests):
                    await self.next_to_leave()
        except TimeoutError:
            pass

    async def next_to_leave(self) -> None:
        """Waits until a request, or the handler of a notification, has finished."""
        self._left.clear()
        await self._left.wait()

    def left(self) -> None:
        """A request, or the handler of a notification, has finished."""
        self._left.set()

    async def _end_in_time(self) -> None:
        """Ends what still runs after the grace period, also what began in the meantime."""
        await asyncio.sleep(self._grace)
        while True:
            for reader in self._staying():
                reader.cut_off()
            for guest in self._guests:
                guest.end_all()
            if running := self._running():
                logger.warning("%d requests did not finish in %g s of grace", len(running), self._grace)
            for exchange in running:
                exchange.fail(SHUT_DOWN)
            await asyncio.sleep(STOP_SECONDS)
            for exchange in running:
                self._tasks.spawn(exchange.abandon())
            await asyncio.sleep(STOP_SECONDS)
            for exchange in running:
                exchange.disconnect_client()
            self._store.end_pending()
            for deadline in list(self.until_closing):
                deadline.hasten()

    def _running(self) -> list[Running]:
        return [exchange for session in self._sessions.values() for exchange in session.exchanges.values()]

    def _staying(self) -> list[Reading]:
        return [reader for reader in self._readers if reader.stays]
