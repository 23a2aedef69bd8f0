"""What a store may offer to those who look after it: `nonstick doctor` examines it, `nonstick migrate` upgrades it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

__all__ = ["Examinable", "Finding", "Level", "Migratable", "Plan", "Step"]

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Nothing in it is secret: no password, session id or payload (P13).

    Attributes:
        level: "ok"; "warning": it works, and something is worth knowing or changing; "error": sessions will fail or be
            lost like this.
        subject: What was looked at, in a word or two: "version", "clock".
        text: What was found.
        advice: What to do, as a sentence; "" where there is nothing to do.
        blocks: Nothing can be tried on the store before this is put right.
        lasts: No failover or restart puts it right either: the URL names the wrong thing.
    """

    level: Level
    subject: str
    text: str
    advice: str = ""
    blocks: bool = False
    lasts: bool = False


@runtime_checkable
class Examinable(Protocol):
    """A store that knows what can be wrong with its server. Optional: `nonstick doctor` tries any store as it is."""

    async def examine(self) -> list[Finding]:
        """Looks at the server: version, settings, permissions, clock. Makes no tables and leaves nothing behind.

        May be called whether or not the store is entered. What cannot be looked at is a finding too.

        Raises:
            StoreUnavailable: It cannot be reached, or lets nobody in.
            ConfigurationError: It can never work like this.
        """
        ...


class Step(NamedTuple):
    """Something to execute: what it is for, in a few words, and the SQL."""

    name: str
    sql: str


class Plan(NamedTuple):
    """What separates a store's tables from those that this release uses.

    Attributes:
        place: What holds the tables, in a few words.
        version: Of the tables that are there; 0 if there are none.
        target: The version that this release makes. A higher `version` that is not refused works too (P12).
        steps: What leads from one to the other, in order, as one transaction; empty if nothing has to be done.
    """

    place: str
    version: int
    target: int
    steps: Sequence[Step]

    def __str__(self) -> str:
        there = f"version {self.version}" if self.version else "no tables yet"
        return f"{self.place}: {there}; this release uses version {self.target}"


@runtime_checkable
class Migratable(Protocol):
    """A store whose tables have versions. Optional: one without tables has nothing to migrate."""

    async def plan(self) -> Plan:
        """Looks at what is there. Changes nothing, and may be called whether or not the store is entered.

        Raises:
            ConfigurationError: The tables are newer than this release can use.
            StoreUnavailable: They could not be looked at.
        """
        ...

    async def migrate(self, done: Callable[[Step], None]) -> None:
        """Executes the plan, all or nothing; `done` is called after each step.

        Several at once are fine: one does it, the others wait and find it done. Nodes may be running meanwhile (P12).

        Raises:
            As `plan`.
        """
        ...
