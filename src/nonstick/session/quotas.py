"""How much a node or a session does at once (P10).

Where no slot is left, the client is told so at once, with when to come back. Nothing that runs is ended for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nonstick.core.refusals import Reason, Refusal

__all__ = ["Quota", "QuotaOfEach", "Slot"]


class Quota:
    """So many slots. The same holder counts once, however often it holds one.

    Args:
        slots: How many there are.
        none_left: Why one is refused where none is left.
        share: The share of the slots that may be one principal's. Clients without a principal cannot be told apart,
            and so are not limited by it.
        share_held: Why one is refused to a principal that has its share; as `none_left` if nothing else is said.
    """

    def __init__(self, slots: int, none_left: Reason, *, share: float = 1.0, share_held: Reason | None = None) -> None:
        self._slots = slots
        self._share = max(1, int(slots * share))
        self._none_left = none_left
        self._share_held = share_held or none_left
        self._held: dict[object, int] = {}
        self._whose: dict[object, bytes] = {}
        """The principal of each holder that has one."""
        self._taken: dict[bytes, int] = {}
        """Slots of each principal."""

    def __len__(self) -> int:
        """Slots that are held."""
        return len(self._held)

    def check(self, principal: bytes = b"") -> None:
        """Returns if a slot is left for this principal, b"" for none.

        Raises:
            Refusal: None is left, or the principal has its share.
        """
        if principal:
            self.check_share(principal)
        if len(self._held) >= self._slots:
            raise Refusal(self._none_left)

    def check_share(self, principal: bytes) -> None:
        """Returns if this principal may have one more slot, as far as its share goes.

        Raises:
            Refusal: It has its share.
        """
        if self._taken.get(principal, 0) >= self._share:
            raise Refusal(self._share_held)

    def hold(self, holder: object, principal: bytes = b"") -> Slot:
        """Holds a slot while the block runs, even where none is left: see `check`."""
        return Slot(self, holder, principal)

    def hold_while(self, holder: object, task: asyncio.Task[Any], principal: bytes = b"") -> None:
        """Holds a slot until the task has ended."""
        self.acquire(holder, principal)
        task.add_done_callback(lambda _: self.release(holder))

    def acquire(self, holder: object, principal: bytes = b"") -> None:
        """As on entering `hold`."""
        held = self._held.get(holder, 0)
        self._held[holder] = held + 1
        if principal and not held:
            self._whose[holder] = principal
            self._taken[principal] = self._taken.get(principal, 0) + 1

    def release(self, holder: object) -> None:
        """As on leaving `hold`."""
        left = self._held[holder] - 1
        if left:
            self._held[holder] = left
            return
        del self._held[holder]
        if holder in self._whose:
            principal = self._whose.pop(holder)
            self._taken[principal] -= 1
            if not self._taken[principal]:
                del self._taken[principal]


class Slot:
    """One slot of a quota, held while the block runs. The same holder counts once."""

    __slots__ = ("_holder", "_principal", "_quota")

    def __init__(self, quota: Quota, holder: object, principal: bytes) -> None:
        self._quota = quota
        self._holder = holder
        self._principal = principal

    def __enter__(self) -> None:
        self._quota.acquire(self._holder, self._principal)

    def __exit__(self, *_: object) -> None:
        self._quota.release(self._holder)


class QuotaOfEach:
    """So many slots for each session.

    Args:
        slots: How many there are for one.
        none_left: Why one is refused where none is left.
    """

    def __init__(self, slots: int, none_left: Reason) -> None:
        self._slots = slots
        self._none_left = none_left
        self._held: dict[str, int] = {}

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """Holds a slot of the session with this key while the block runs.

        Raises:
            Refusal: None is left.
        """
        held = self._held.get(key, 0)
        if held >= self._slots:
            raise Refusal(self._none_left)
        self._held[key] = held + 1
        try:
            yield
        finally:
            left = self._held.pop(key) - 1
            if left:
                self._held[key] = left
