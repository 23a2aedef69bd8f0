"""Which node holds a session: what a node makes of the owner that a record names (P7).

The rules:

- What is ready here, and this node's by the record, runs here.
- What another node holds is relayed to that node; also what this node is to hold, while it is not ready.
- Where nobody holds the session, somebody is to see to it: it is taken by a node that can build it anew, and ended by
  any if it cannot be. A session that has no owner yet is taken in any case: there is nothing to build anew.
- A node that holds a session which the record says is another's looks whether that is so.
- Nobody is dead at first sight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, NamedTuple

from nonstick.core.record import LOST, OWNER

__all__ = ["HERE", "NOBODY", "Elsewhere", "Found", "Step", "Suspects", "Where", "find", "next_step", "owner_in"]


class _Place(Enum):
    HERE = "here"
    NOBODY = "nobody"


HERE: Final = _Place.HERE
"""This node runs what arrived for the session."""
NOBODY: Final = _Place.NOBODY
"""No node holds the session; what arrived for it waits in the log for the one that will."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """This node holds the session, and is to run what arrived for it: another one, or this one once it is ready."""

    node: str


Where = Literal[_Place.HERE, _Place.NOBODY] | Elsewhere


class Found(NamedTuple):
    """What a node makes of an owner.

    Attributes:
        where: The node that is to run what arrived; None if the session is lost.
        looks: This node holds the session, and the record names another owner: this node is to look again.
        settles: No node holds the session: this one is to see to that.
    """

    where: Where | None
    looks: bool = False
    settles: bool = False


def owner_in(fields: Mapping[str, bytes]) -> str | None:
    """The owner that a record names; None if the session has none."""
    owner = fields.get(OWNER)
    return None if owner is None else owner.decode()


def find(owner: str | None, *, here: str, ready: bool | None) -> Found:
    """Which node is to run what arrived here, for a session that is to have an owner.

    Args:
        owner: As the record names it.
        here: The node's id.
        ready: Whether what the node holds of the session is ready; None if it holds nothing.
    """
    looks = ready is not None and owner != here
    if ready and not looks:
        return Found(HERE)
    if owner == LOST:
        return Found(None, looks, settles=True)
    if not owner:
        return Found(NOBODY, looks, settles=True)
    return Found(Elsewhere(owner), looks)


class Step(Enum):
    """What becomes of a session that this node does not hold."""

    LEAVE = "its owner lives"
    TAKE = "this node becomes its owner"
    END = "its owner is gone, and what it held with it"


def next_step(owner: str | None, *, lives: bool, rebuilds: bool) -> Step:
    """What this node is to do about a session.

    Args:
        owner: As the record names it.
        lives: The owner is another node than this, and is not known to be dead.
        rebuilds: What an owner held can be built anew.
    """
    if lives:
        return Step.LEAVE
    if owner == LOST or (owner is not None and not rebuilds):
        return Step.END
    return Step.TAKE


class Suspects:
    """Nodes that were seen dead, and for how long."""

    FORGET_AFTER: Final = 30.0
    """Seconds without a look at a node after which it counts as never seen dead."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}
        """Of each node, when it was first seen dead, and when last."""

    def seen(self, node: str, lapsed: bool, now: float) -> float:
        """The node's lease was looked at, and had `lapsed` or not. Seconds since it was first seen to have; -1 if not.

        Args:
            now: In seconds, by any clock.
        """
        if not lapsed:
            self._seen.pop(node, None)
            return -1.0
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen[1] < self.FORGET_AFTER}
        first = self._seen.get(node, (now, now))[0]
        self._seen[node] = first, now
        return now - first
