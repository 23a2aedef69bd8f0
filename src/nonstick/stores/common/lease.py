"""A node's lease over an asynchronous client. Its calls block, and share nothing with the event loop of the node."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from nonstick.errors import StoreUnavailable

__all__ = ["LEASE_SECONDS", "BlockingLease", "LeaseClient"]

LEASE_SECONDS: Final = 2.0
"""How long a renewal may take: a node that cannot renew has to find out well within its lease."""


class LeaseClient(Protocol):
    """What one kind of store does about one lease, on a connection of its own. A call is cancelled at its deadline."""

    async def grant(self, seconds: float) -> None:
        """The node is alive for `seconds` from now, by the store's clock.

        Raises:
            StoreUnavailable: The store cannot be reached, or refused.
        """
        ...

    async def release(self) -> None:
        """The node's lease ends now.

        Raises:
            StoreUnavailable: As `grant`.
        """
        ...

    async def disconnect(self) -> None:
        """Closes the connection, if there is one. Never raises."""
        ...


class BlockingLease:
    """See `nonstick.store.Lease`. The client's event loop runs only while one of these methods does.

    Args:
        url: Of the store, for messages.
        release_seconds: How long a node that stops tries to end its lease, which also ends by itself.
    """

    def __init__(self, client: LeaseClient, *, url: str, release_seconds: float) -> None:
        self._client = client
        self._url = url
        self._release_seconds = release_seconds
        self._loop: asyncio.AbstractEventLoop | None = None

    def renew(self, seconds: float) -> None:
        try:
            self._run(self._client.grant(seconds), LEASE_SECONDS)
        except (StoreUnavailable, TimeoutError) as error:
            why = str(error) or "no answer in time"
            raise StoreUnavailable(f"the lease at {self._url} was not renewed: {why}") from None

    def close(self, *, release: bool) -> None:
        try:
            if release:
                self._run(self._client.release(), self._release_seconds)
        except (StoreUnavailable, TimeoutError):
            pass  # it runs out by itself
        if self._loop is not None:
            self._loop.run_until_complete(self._client.disconnect())
            self._loop.close()
            self._loop = None

    def _run(self, call: Coroutine[Any, Any, None], seconds: float) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(_within(seconds, call))


async def _within(seconds: float, call: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(seconds):
        await call
