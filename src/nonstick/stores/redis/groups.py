"""The groups that limits are counted by, on a Cluster: sorted sets in slots of their own, beside the sessions' scripts.

A session is let into its groups before it is created, and its place is renewed after it was. What is lost between the
two holds a place for `ADMISSION_SECONDS`; a place that is not renewed or given back makes the count wrong, by that one
session, until it expires or is renewed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

from nonstick.errors import StoreUnavailable

__all__ = ["Groups"]

ADMISSION_SECONDS: Final = 60.0
"""How long a session that is being created holds a place in its groups."""


class Groups:
    """Places of sessions in groups.

    Args:
        run: Runs group.lua for a key, with these arguments.
        call: Runs a command about a key.
        seconds: How long a group may hold up what was done to a session.
    """

    def __init__(
        self,
        prefix: str,
        *,
        run: Callable[..., Awaitable[Any]],
        call: Callable[..., Awaitable[Any]],
        seconds: float,
    ) -> None:
        self._prefix = prefix
        self._seconds = seconds
        self._run = run
        self._call = call

    async def admit(self, key: str, limits: Mapping[str, int], lifetime: float) -> str | None:
        """Holds a place in each of these groups, or in none; returns the one that is full.

        Raises:
            StoreUnavailable: Some places may be held for a while.
        """
        held: list[str] = []
        milliseconds = int(min(lifetime, ADMISSION_SECONDS) * 1000) or 1
        for group, limit in limits.items():
            if not await self._run(self._name(group), key, milliseconds, limit):
                await self.leave(key, held)
                return group
            held.append(group)
        return None

    async def renew(self, key: str, groups: Iterable[str], milliseconds: int) -> None:
        """Keeps the places for so long from now, as far as the groups can be reached."""
        await self._briefly(_if_reached(self._run, self._name(group), key, milliseconds, "") for group in groups)

    async def leave(self, key: str, groups: Iterable[str]) -> None:
        """Gives the places back, as far as the groups can be reached."""
        names = map(self._name, groups)
        await self._briefly(_if_reached(self._call, name, "ZREM", name, key) for name in names)

    async def _briefly(self, calls: Iterable[Awaitable[None]]) -> None:
        """Makes these calls, and waits for them only a part of the time that the store's caller has.

        What is done to the session is done: a server that hangs, and has nothing but a group, must not undo that.
        """
        try:
            async with asyncio.timeout(self._seconds):
                await asyncio.gather(*calls)
        except TimeoutError:
            pass

    def _name(self, group: str) -> str:
        return f"{self._prefix}:g:{group}"


async def _if_reached(call: Callable[..., Awaitable[Any]], *args: Any) -> None:
    try:
        await call(*args)
    except StoreUnavailable:
        pass
