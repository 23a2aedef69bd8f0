"""Whether a database that says that something is gone can know that (P15).

It cannot if its tables were made anew, or were unlogged and emptied by a crash, while nodes remember more. So there is
a *mark* beside the tables, a random value, which is replicated, dumped and restored with them. Every answer that
something is gone brings it along, from the same statement, and every node remembers it. A database without the mark, or
with another one, is empty or of another history, and is not believed for a grace period: somebody may bring the data
back. It is like the mark on Redis (redis/proof.py), but nobody has to be asked whether the database was replaced: a
standby is never believed at all.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from nonstick.errors import ConfigurationError, StoreUnavailable
from nonstick.waiting import background

if TYPE_CHECKING:
    from nonstick.stores.postgres.pool import Connection

__all__ = ["History", "make_mark", "mark_at"]

logger = logging.getLogger("nonstick.store")

_LOOK_SECONDS: Final = 1.0
"""Between two looks at a database that is not believed."""


class History:
    """The mark that is remembered.

    Args:
        look: The mark that is there now, or None.
        make: Makes one, if there is none; returns the one that is there then.
        grace: Seconds for which a database without the mark is not believed.
    """

    def __init__(
        self,
        url: str,
        *,
        look: Callable[[], Awaitable[str | None]],
        make: Callable[[], Awaitable[str]],
        grace: float,
    ) -> None:
        self.known: str | None = None
        self._url = url
        self._look = look
        self._make = make
        self._grace = grace
        self._doubt: asyncio.Task[None] | None = None

    def check(self, mark: str | None) -> None:
        """Returns if a database that has this mark is to be believed when it says that something is gone.

        Raises:
            StoreUnavailable: It is not, for a while.
        """
        if mark is not None and mark == self.known:
            return
        if self._doubt is None:
            logger.error(
                "%s: the database is empty or of another history: its mark is not there. For %g s what it does not "
                "have is answered 503. If another server or a backup has the data, bring that back now; if they are "
                "lost, do nothing: clients will open new sessions (docs/stores.md)",
                self._url,
                self._grace,
            )
            self._doubt = background.spawn(self._wait(), name="nonstick: doubt PostgreSQL")
        raise StoreUnavailable("the store is empty or of another history: it is not believed for a while")

    async def close(self) -> None:
        if self._doubt is not None:
            self._doubt.cancel()
            await asyncio.wait([self._doubt])

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace
        try:
            while True:
                await asyncio.sleep(min(_LOOK_SECONDS, max(until - loop.time(), 0.1)))
                try:
                    if await self._look() == self.known:
                        logger.warning("%s: the database has its data again", self._url)
                        return
                    if loop.time() >= until:
                        self.known = await self._make()
                        logger.error(
                            "%s: after %g s the database is still without the data that it had: sessions that it does "
                            "not have are answered 404 from now on",
                            self._url,
                            self._grace,
                        )
                        return
                except (StoreUnavailable, ConfigurationError) as error:
                    logger.debug("%s cannot be looked at: %s", self._url, error)
        finally:
            self._doubt = None


async def mark_at(connection: Connection, schema: str) -> str | None:
    """The mark of these tables; None if they have none."""
    mark: str | None = await connection.fetchval(f'SELECT mark FROM "{schema}".mark')  # noqa: S608 - checked name
    return mark


async def make_mark(connection: Connection, schema: str) -> str:
    """Gives these tables a mark, if they have none; the one that they have then."""
    query = f'INSERT INTO "{schema}".mark (mark) VALUES ($1) ON CONFLICT DO NOTHING'  # noqa: S608 - checked name
    await connection.execute(query, secrets.token_hex(8))
    return await mark_at(connection, schema) or ""
