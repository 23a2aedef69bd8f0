"""The groups that limits are counted by, on a Cluster: sorted sets in slots of their own, beside the sessions' scripts.

A session is let into its groups before it is created, and its place is renewed after it was. What is lost between the
two holds a place for `ADMISSION_SECONDS`; a place that is not renewed or given back makes the count wrong, by that one
session, until it expires or is renewed.
"""

from __future__ import annotations

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
    """

    def __init__(self, prefix: str, *, run: Callable[..., Awaitable[Any]], call: Callable[..., Awaitable[Any]]) -> None:
        self._prefix = prefix
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
        for group in groups:
            try:
                await self._run(self._name(group), key, milliseconds, "")
            except StoreUnavailable:
                pass

    async def leave(self, key: str, groups: Iterable[str]) -> None:
        """Gives the places back, as far as the groups can be reached."""
        for group in groups:
            name = self._name(group)
            try:
                await self._call(name, "ZREM", name, key)
            except StoreUnavailable:
                pass

    def _name(self, group: str) -> str:
        return f"{self._prefix}:g:{group}"
