"""The node's sign of life: a lease in the store, which others see lapse when the node is gone (P7)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import Final

from nonstick.core.settings import Settings
from nonstick.errors import StoreError
from nonstick.log.guard import GuardedStore
from nonstick.store import Lease

__all__ = ["LeaseKeeper"]

logger = logging.getLogger(__name__)

_TICK: Final = 1.0
"""Seconds, at most, between two signs of life of the event loop."""


class LeaseKeeper:
    """Renews the node's lease from a thread, while the event loop has ticked within `max_stall`.

    A thread, because a tool that blocks the loop does not make its node dead; a tick, because a loop that hangs for
    good does (P7).

    Args:
        node: The node's id.
    """

    def __init__(self, node: str, store: GuardedStore, settings: Settings) -> None:
        self._node = node
        self._store = store
        self._settings = settings
        self._ticked = time.monotonic()
        self._stop = threading.Event()
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._keep, name="nonstick-lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self, seconds: float) -> None:
        """Ends the lease, if the store can be reached within so many seconds. The event loop is not blocked.

        Else the lease lapses by itself; the thread does not keep the process.
        """
        self._stop.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    async def tick(self) -> None:
        """Shows, again and again, that the event loop runs."""
        while True:
            self._ticked = time.monotonic()
            await asyncio.sleep(min(_TICK, self._settings.max_stall / 4))

    def _keep(self) -> None:
        lease: Lease | None = None
        wait = 0.0
        while not self._stop.wait(wait):
            wait = self._settings.lease / 3
            if time.monotonic() - self._ticked > self._settings.max_stall:
                continue
            try:
                lease = lease or self._store.lease(self._node)
                lease.renew(self._settings.lease)
            except StoreError as error:
                logger.warning("the lease of this node could not be renewed: %s", error)
                wait = min(1.0, wait)
        if lease is not None:
            lease.close(release=True)
        with contextlib.suppress(RuntimeError):  # the loop did not wait for it
            self._loop.call_soon_threadsafe(self._ended.set)
